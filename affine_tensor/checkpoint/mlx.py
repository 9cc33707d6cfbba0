"""The MLX format: which tensors are a module's packed weight, and how wide its codes.

mlx-lm writes ``name.weight`` (uint32 words), ``name.scales`` and ``name.biases`` for a
quantized module, and in config.json an object ``quantization`` (repeated as
``quantization_config``) with ``bits``, ``group_size``, ``mode`` and, under the names of
modules, settings of their own or false.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import layout
from ..tensor import AffineQuantizedTensor
from .files import Checkpoint, StoredTensor, move

_KEYS = ("quantization", "quantization_config")


@dataclass(frozen=True)
class PackedWeight:
    """The three stored tensors of one quantized module, and their format."""

    name: str  # of the parameter, "….weight"
    packed: StoredTensor
    scales: StoredTensor
    biases: StoredTensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight, ``[..., N, K]``."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group_size)

    @property
    def format(self) -> tuple[int, int]:
        return self.bits, self.group_size

    @property
    def place(self) -> tuple[str, int]:
        return self.packed.place

    def read(self, dtype: torch.dtype, device: torch.device) -> AffineQuantizedTensor:
        """Read it, as a tensor that counts as `dtype`; the words are moved first."""
        # As int32: not every device has uint32.
        packed = move(self.packed.read().view(torch.int32), device)
        scales, biases = self.scales.read(), self.biases.read()
        if scales.dtype != biases.dtype:  # exact: one of them is float32 at most
            wide = torch.promote_types(scales.dtype, biases.dtype)
            scales, biases = scales.to(wide), biases.to(wide)
        return AffineQuantizedTensor.from_packed(
            packed,
            move(scales, device),
            move(biases, device),
            bits=self.bits,
            group_size=self.group_size,
            dtype=dtype,
        )


def settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The quantization objects of a config.json; the first that is there rules."""
    found = [config[key] for key in _KEYS if isinstance(config.get(key), dict)]
    text = config.get("text_config")
    if not found and isinstance(text, dict):
        found = [text[key] for key in _KEYS if isinstance(text.get(key), dict)]
    return found


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint says that it is in MLX format, or has its tensors."""
    method = [s.get("quant_method") for s in settings(checkpoint.config)]
    if any(method) and not any(m in (None, "mlx", "affine") for m in method):
        return False
    return bool(settings(checkpoint.config)) or bool(_stems(checkpoint))


def declared_formats(config: dict[str, Any]) -> set[tuple[int, int]]:
    """The pairs (bits, group_size) that the configuration names anywhere."""
    entries = [e for found in settings(config) for e in _entries(found).values()]
    pairs = [_pair(entry) for entry in entries]
    return {(b, g) for b, g in pairs if isinstance(b, int) and isinstance(g, int)}


def _entries(quantization: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each module that has its own, and the general ones as ''."""
    own = {k: v for k, v in quantization.items() if isinstance(v, dict)}
    return {"": quantization, **{k: quantization | v for k, v in own.items()}}


def _pair(entry: dict[str, Any]) -> tuple[Any, Any]:
    return entry.get("bits"), entry.get("group_size")


def check_settings(config: dict[str, Any]) -> list[str]:
    """What is wrong with the configuration's quantization settings, if anything."""
    problems = []
    for quantization in settings(config)[:1]:
        problems += _check_entry("quantization", quantization)
        for name, value in quantization.items():
            if isinstance(value, dict):
                problems += _check_entry(f"quantization of {name}", value)
    return problems


def _check_entry(where: str, entry: dict[str, Any]) -> list[str]:
    problems = []
    mode = entry.get("mode", "affine")
    if mode != "affine":
        problems.append(
            f"{where}: mode is {mode!r}; only 'affine' is read so far. Convert the "
            "model again with mlx_lm.convert --q-mode affine"
        )
        return problems
    for key, allowed in (("bits", layout.BITS), ("group_size", layout.GROUP_SIZES)):
        value = entry.get(key, allowed[0])
        if type(value) is not int or value not in allowed:
            problems.append(
                f"{where}: {key} is {value!r}; allowed are {layout.join(allowed)}"
            )
    return problems


def _stems(checkpoint: Checkpoint) -> list[str]:
    """What stands before "weight" where scales stand beside one: "model.head.", say;
    nothing if the model itself is the module."""
    tensors = checkpoint.tensors
    ends = [n for n in tensors if n == "scales" or n.endswith(".scales")]
    stems = [name.removesuffix("scales") for name in ends]
    return [stem for stem in stems if f"{stem}weight" in tensors]


def packed_weights(
    checkpoint: Checkpoint, columns: dict[str, int]
) -> tuple[dict[str, PackedWeight], dict[str, str], set[str]]:
    """The packed weights of a checkpoint, by parameter name.

    `columns` gives K for each parameter of the model: with it the shapes alone decide
    bits and group size, and the configuration must name the pair that they give.
    Returns the weights, what is wrong with those that are broken, and the names of all
    tensors that belong to either. Modules that the model does not have are left out.
    """
    declared = declared_formats(checkpoint.config)
    weights: dict[str, PackedWeight] = {}
    broken: dict[str, str] = {}
    parts: set[str] = set()
    stems = _stems(checkpoint)
    entries = _entries(next(iter(settings(checkpoint.config)), {}))
    # Some converters spell modules in config.json otherwise than in the files.
    astray = {_pair(v) for k, v in entries.items() if k and f"{k}." not in stems}
    for stem in stems:
        name = f"{stem}weight"
        if name not in columns:
            continue
        parts |= {name, f"{stem}scales", f"{stem}biases"} & checkpoint.tensors.keys()
        found = _packed_weight(checkpoint, stem, columns[name], declared)
        if isinstance(found, PackedWeight) and found.format not in astray:
            own = entries.get(stem.removesuffix("."), entries[""])
            found = _contradiction(found, *_pair(own)) or found
        if isinstance(found, str):
            broken[name] = found
        else:
            weights[name] = found
    return weights, broken, parts


def _packed_weight(
    checkpoint: Checkpoint, stem: str, columns: int, declared: set[tuple[int, int]]
) -> PackedWeight | str:
    """One packed weight, or what is wrong with it."""
    name, tensors = f"{stem}weight", checkpoint.tensors
    packed, scales = tensors[name], tensors[f"{stem}scales"]
    biases = tensors.get(f"{stem}biases")
    if scales.dtype == torch.uint8:
        return (
            f"it has uint8 scales and {'no biases' if biases is None else 'biases'}: a "
            "float format (mxfp4, nvfp4, mxfp8), not affine"
        )
    if biases is None:
        return f"its biases are missing: {stem}biases"
    if packed.dtype not in (torch.uint32, torch.int32):
        return f"its words are {layout.name_of(packed.dtype)}; U32 is needed"
    for part in (scales, biases):
        if part.dtype not in layout.WEIGHT_DTYPES:
            seen = layout.name_of(part.dtype)
            return f"{part.name} is {seen}; allowed are F32, F16, BF16"
    if not (packed.shape and scales.shape) or not all(packed.shape + scales.shape):
        return f"its shape is {list(packed.shape)}, its scales' {list(scales.shape)}"
    if scales.shape != biases.shape or scales.shape[:-1] != packed.shape[:-1]:
        return (
            f"weight {list(packed.shape)}, scales {list(scales.shape)} and biases "
            f"{list(biases.shape)} do not have the same rows and groups"
        )
    bits, rest = divmod(32 * packed.shape[-1], columns)
    group_size, rest_of_group = divmod(columns, scales.shape[-1])
    if rest or rest_of_group or bits not in layout.BITS:
        return (
            f"{packed.shape[-1]} words and {scales.shape[-1]} groups a row do "
            f"not make {columns} columns of {layout.join(layout.BITS)} bits"
        )
    if group_size not in layout.GROUP_SIZES:
        return (
            f"its groups are {group_size} wide; allowed are "
            f"{layout.join(layout.GROUP_SIZES)}"
        )
    if (bits, group_size) not in declared:
        return (
            f"its shape says {bits} bits, group size {group_size}, which "
            f"config.json does not name (it has {_pairs(declared)})"
        )
    return PackedWeight(name, packed, scales, biases, bits, group_size)


def lone_words(checkpoint: Checkpoint, tensor: StoredTensor) -> str | None:
    """What a packed weight lacks whose scales are not there, if it is one."""
    is_weight = tensor.name == "weight" or tensor.name.endswith(".weight")
    if tensor.dtype != torch.uint32 or not is_weight:
        return None
    stem = tensor.name.removesuffix("weight")
    parts = (f"{stem}scales", f"{stem}biases")
    absent = [name for name in parts if name not in checkpoint.tensors]
    return (
        f"uint32 words {list(tensor.shape)}, of which {' and '.join(absent)} "
        f"{'is' if len(absent) == 1 else 'are'} missing"
    )


def _contradiction(found: PackedWeight, bits: Any, group_size: Any) -> str | None:
    """Whether the module's own settings make another, equally consistent shape of it.

    Twice the columns at half the bits and twice the group size are the same arrays.
    """
    if None in (bits, group_size) or (bits, group_size) == found.format:
        return None
    columns = found.scales.shape[-1] * group_size
    if columns * bits != 32 * found.packed.shape[-1]:
        return None
    return (
        f"{columns} columns of {bits} bits, group size {group_size}, as config.json "
        f"says; the model has {found.shape[-1]} columns"
    )


def _pairs(declared: set[tuple[int, int]]) -> str:
    return (
        ", ".join(f"{b} bits, group size {g}" for b, g in sorted(declared)) or "no pair"
    )
