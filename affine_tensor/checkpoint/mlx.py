"""The MLX format: which tensors are a module's packed weight, and how wide its codes.

mlx-lm writes ``name.weight`` (uint32 words), ``name.scales`` and ``name.biases`` for a
quantized module, and in config.json an object ``quantization`` (repeated as
``quantization_config``) with ``bits``, ``group_size``, ``mode`` and, under the names of
modules, settings of their own or false. In the float modes (`mlx_float`) the scales are
uint8 and there are no biases. transformers' MetalConfig writes the same with
``quantization_config`` only, and names the biases ``qbiases``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import layout
from ..tensor import AffineQuantizedTensor
from . import mlx_float
from .files import Checkpoint, StoredTensor, move

_KEYS = ("quantization", "quantization_config")

# Whose settings are read. Those of other methods that stand beside are left-overs of
# the model that was converted.
_METHODS = (None, "mlx", "affine", "affine_tensor", "metal")

AFFINE = "affine"
Format = tuple[str, int, int]  # mode, bits, group size


@dataclass(frozen=True)
class PackedWeight:
    """The stored tensors of one quantized module, and their format."""

    name: str  # of the parameter, "….weight"
    packed: StoredTensor
    scales: StoredTensor
    bits: int  # of the stored codes
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight, ``[..., N, K]``."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group_size)

    @property
    def format(self) -> tuple[int, int]:
        """Bits and group size of the packed tensor that is read."""
        return self.bits, self.group_size

    @property
    def place(self) -> tuple[str, int]:
        return self.packed.place

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return self.packed, self.scales

    @property
    def note(self) -> str | None:
        """What the report of a load says about this weight, if anything."""
        return None

    def experts(self, start: int, stop: int) -> PackedWeight:
        """The weight of the experts from `start` to before `stop`."""
        fields = {
            field: part.items(start, stop)
            for field, part in vars(self).items()
            if isinstance(part, StoredTensor) and part.shape[:1] == self.shape[:1]
        }
        return replace(self, **fields)  # type: ignore[arg-type]

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Read it, as a tensor that counts as `dtype`."""
        raise NotImplementedError


@dataclass(frozen=True)
class AffineWeight(PackedWeight):
    """Codes that are evenly spaced, with the biases of their groups."""

    biases: StoredTensor

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return self.packed, self.scales, self.biases

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


@dataclass(frozen=True)
class FloatWeight(PackedWeight):
    """Codes that are small floats, with uint8 scales.

    It is read as affine groups of 5 bits that have the same values, or dense where
    there are none.
    """

    mode: str
    global_scale: StoredTensor | None = None

    @property
    def format(self) -> tuple[int, int]:
        """Bits and group size of the packed tensor that is read, or of the stored one
        if that is read as a dense one."""
        bits = self.bits if self._why_dense else mlx_float.AFFINE_BITS
        return bits, self.group_size

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        whole = () if self.global_scale is None else (self.global_scale,)
        return self.packed, self.scales, *whole

    @property
    def note(self) -> str:
        if self.mode == "mxfp8":
            return "mxfp8 is not affine: made dense"
        if self._why_dense:
            return f"{self.mode}: made dense, since {self._why_dense}"
        if self.global_scale is None:
            how, scale_bits = f"{self.mode}: kept exactly", 16
        else:
            how, scale_bits = f"{self.mode} with a global scale: kept to 2**-21", 32
        total = mlx_float.AFFINE_BITS + 2 * scale_bits / self.group_size
        return f"{how} as 5-bit affine, {total:.1f} bits per weight"

    @property
    def _why_dense(self) -> str | None:
        return mlx_float.why_dense(self.mode, self.shape[-1])

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Read it, as a tensor that counts as `dtype`; raises CheckpointError where its
        scales or weights are not finite numbers, or the weights not of `dtype`."""
        words = self.packed.read().view(torch.int32)
        scales = self.scales.read()
        whole = None if self.global_scale is None else self.global_scale.read()
        if self._why_dense:
            weight = mlx_float.as_dense(
                words, scales, whole, mode=self.mode, name=self.name, dtype=dtype
            )
            return move(weight, device)
        parts = mlx_float.as_affine(
            words, scales, whole, mode=self.mode, name=self.name
        )
        packed, scales, biases = (move(part, device) for part in parts)
        return AffineQuantizedTensor.from_packed(
            packed,
            scales,
            biases,
            bits=mlx_float.AFFINE_BITS,
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
    found = settings(checkpoint.config)
    if found:
        return found[0].get("quant_method") in _METHODS
    return bool(_stems(checkpoint))


def in_other_layout(config: dict[str, Any]) -> bool:
    """Whether names and values are transformers' own, of which only the weights are
    packed: in what its MetalConfig wrote."""
    return any(s.get("quant_method") == "metal" for s in settings(config)[:1])


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """The stored tensors without the scales and biases of packed weights."""
    parts = {
        f"{stem}{part}"
        for stem in _stems(checkpoint)
        for part in ("scales", "biases", "qbiases")
    }
    return [name for name in checkpoint.tensors if name not in parts]


def recognizes_config(config: dict[str, Any]) -> bool:
    """Whether a config.json alone says that its checkpoint is in MLX format."""
    found = settings(config)[:1]
    return any(
        one.get("quant_method") in _METHODS
        and {"bits", "group_size", "mode"} & one.keys()
        for one in found
    )


def _own_settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for s in settings(config) if s.get("quant_method") in _METHODS]


def declared_formats(config: dict[str, Any]) -> set[Format]:
    """The formats that the configuration names anywhere."""
    entries = (_formats(found) for found in _own_settings(config))
    return {one for entry in entries for named in entry.values() for one in named}


def _formats(quantization: dict[str, Any]) -> dict[str, set[Format]]:
    """What is named for each module that has its own settings, and generally, as ''."""
    general = _named(quantization, {})
    own = {k: v for k, v in quantization.items() if isinstance(v, dict)}
    return {"": general, **{k: _named(v, quantization) for k, v in own.items()}}


def _named(entry: dict[str, Any], general: dict[str, Any]) -> set[Format]:
    """The formats that settings may mean. Of a module's own settings one may be absent:
    it is MLX's default then, or in other writers' files the general one."""
    mode = _mode(entry)
    if mode in tuple(mlx_float.MODES):  # it may be anything, a list for example
        return {(mode, *mlx_float.MODES[mode])}
    if mode != AFFINE:
        return set()
    bits, group_size = entry.get("bits"), entry.get("group_size")
    pairs = [(bits, group_size)]
    if general and entry.keys() & {"bits", "group_size", "mode"}:
        for b, g in ((general.get("bits"), general.get("group_size")), (4, 64)):
            pairs.append((entry.get("bits", b), entry.get("group_size", g)))
    return {
        (AFFINE, b, g) for b, g in pairs if isinstance(b, int) and isinstance(g, int)
    }


def _mode(entry: dict[str, Any]) -> Any:
    # A module's own settings without a mode are affine, whatever the others are.
    return entry.get("mode", AFFINE)


def check_settings(config: dict[str, Any]) -> list[str]:
    """What is wrong with the configuration's quantization settings, if anything."""
    problems = [
        f"{key} is {config[key]!r}; an object with bits and group_size is needed, or none"
        for key in _KEYS
        if config.get(key) and not isinstance(config[key], dict)
    ]
    for quantization in _own_settings(config)[:1]:
        problems += _check_entry("quantization", quantization)
        for name, value in quantization.items():
            if isinstance(value, dict):
                problems += _check_entry(f"quantization of {name}", value)
    return problems


def _check_entry(where: str, entry: dict[str, Any]) -> list[str]:
    mode = _mode(entry)
    modes = (AFFINE, *mlx_float.MODES)
    if mode not in modes:
        return [
            f"{where}: mode is {mode!r}; allowed are {layout.join(modes)}. Convert the "
            "model again with one of them (mlx_lm.convert --q-mode)"
        ]
    pair: Iterable[tuple[int, ...]] = (layout.BITS, layout.GROUP_SIZES)
    if mode in mlx_float.MODES:
        pair = ((n,) for n in mlx_float.MODES[mode])
    problems = []
    for key, allowed in zip(("bits", "group_size"), pair, strict=True):
        value = entry.get(key, allowed[0])
        if type(value) is not int or value not in allowed:
            may_be = f"allowed are {layout.join(allowed)}"
            if mode != AFFINE:
                may_be = f"{mode} has {allowed[0]}. Correct it in config.json"
            problems.append(f"{where}: {key} is {value!r}; {may_be}")
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
    weights: dict[str, PackedWeight] = {}
    broken: dict[str, str] = {}
    parts: set[str] = set()
    stems = _stems(checkpoint)
    config = _Declared(checkpoint.config, stems)
    for stem in stems:
        name = f"{stem}weight"
        if name not in columns:
            continue
        found = _packed_weight(checkpoint, stem, columns[name])
        if isinstance(found, PackedWeight):
            found = config.refuses(found, stem) or found
        parts |= {name, f"{stem}scales", _biases(checkpoint, stem)}
        if checkpoint.tensors[f"{stem}scales"].dtype == torch.uint8:
            parts.add(f"{stem}global_scale")
        if isinstance(found, str):
            broken[name] = found
        else:
            weights[name] = found
    return weights, broken, parts & checkpoint.tensors.keys()


def _biases(checkpoint: Checkpoint, stem: str) -> str:
    """What the biases are called."""
    mlx, metal = f"{stem}biases", f"{stem}qbiases"
    tensors = checkpoint.tensors
    return metal if metal in tensors and mlx not in tensors else mlx


def _packed_weight(
    checkpoint: Checkpoint, stem: str, columns: int
) -> PackedWeight | str:
    """One packed weight as its shapes say, or what is wrong with it."""
    name, tensors = f"{stem}weight", checkpoint.tensors
    packed, scales = tensors[name], tensors[f"{stem}scales"]
    biases = tensors.get(_biases(checkpoint, stem))
    is_float = scales.dtype == torch.uint8
    if is_float and biases is not None:
        return (
            f"it has uint8 scales and {biases.name}; float formats (mxfp4, nvfp4, "
            "mxfp8) have no biases, affine ones no uint8 scales. Convert the model again"
        )
    if biases is None and not is_float:
        return f"its biases are missing: {stem}biases"
    if packed.dtype not in (torch.uint32, torch.int32):
        return f"its words are {layout.name_of(packed.dtype)}; U32 is needed"
    for part in (scales, biases):
        if part and not is_float and part.dtype not in layout.WEIGHT_DTYPES:
            seen = layout.name_of(part.dtype)
            return f"{part.name} is {seen}; allowed are F32, F16, BF16"
    if not (packed.shape and scales.shape) or not all(packed.shape + scales.shape):
        return f"its shape is {list(packed.shape)}, its scales' {list(scales.shape)}"
    same = biases is None or biases.shape == scales.shape
    if not same or scales.shape[:-1] != packed.shape[:-1]:
        named = {"weight": packed, "scales": scales, "biases": biases}
        *most, last = [f"{k} {list(v.shape)}" for k, v in named.items() if v]
        return f"{', '.join(most)} and {last} do not have the same rows and groups"
    bits, rest = divmod(32 * packed.shape[-1], columns)
    group_size, rest_of_group = divmod(columns, scales.shape[-1])
    if rest or rest_of_group or bits not in layout.BITS:
        return (
            f"{packed.shape[-1]} words and {scales.shape[-1]} groups a row do "
            f"not make {columns} columns of {layout.join(layout.BITS)} bits"
        )
    if biases is None:
        return _float_weight(checkpoint, stem, bits, group_size)
    if group_size not in layout.GROUP_SIZES:
        return (
            f"its groups are {group_size} wide; allowed are "
            f"{layout.join(layout.GROUP_SIZES)}"
        )
    return AffineWeight(name, packed, scales, bits, group_size, biases)


def _float_weight(
    checkpoint: Checkpoint, stem: str, bits: int, group_size: int
) -> FloatWeight | str:
    """One weight in a float format, or what is wrong with it."""
    name, tensors = f"{stem}weight", checkpoint.tensors
    packed, scales = tensors[name], tensors[f"{stem}scales"]
    modes = [m for m, pair in mlx_float.MODES.items() if pair == (bits, group_size)]
    if not modes:
        allowed = [f"{b} and {g} ({m})" for m, (b, g) in mlx_float.MODES.items()]
        return (
            f"{_HAS_UINT8}. Its shape says {bits} bits, group size {group_size}; allowed "
            f"are {layout.join(allowed)}. Convert the model again"
        )
    mode = modes[0]
    whole = tensors.get(f"{stem}global_scale")
    if whole is not None:
        if mode != "nvfp4":
            return (
                f"it is {mode} and has {whole.name}; only nvfp4 has a global scale. "
                "Convert the model again"
            )
        if whole.dtype not in layout.WEIGHT_DTYPES:
            seen = layout.name_of(whole.dtype)
            return f"{whole.name} is {seen}; allowed are F32, F16, BF16"
        lead = packed.shape[:-2]
        if math.prod(whole.shape) != 1 and whole.shape not in (lead, (*lead, 1, 1)):
            or_many = f", or {list(lead)} of them" if lead else ""
            return (
                f"{whole.name} is {list(whole.shape)}; it must be one number{or_many}. "
                "Convert the model again"
            )
    return FloatWeight(name, packed, scales, bits, group_size, mode, whole)


_HAS_UINT8 = "it has uint8 scales and no biases: a float format (mxfp4, nvfp4, mxfp8)"


class _Declared:
    """What config.json says about formats; it confirms what the shapes say."""

    def __init__(self, config: dict[str, Any], stems: list[str]) -> None:
        self._formats = declared_formats(config)
        self._objects = [_formats(found) for found in _own_settings(config)]
        # Some converters spell modules in config.json otherwise than in the files.
        self._astray = {
            format
            for named in self._objects
            for key, formats in named.items()
            if key and f"{key}." not in stems
            for format in formats
        }

    def refuses(self, found: PackedWeight, stem: str) -> str | None:
        """What it has against this weight, or None. A file without settings is taken as
        its shapes say, as mlx-lm does."""
        mode = found.mode if isinstance(found, FloatWeight) else AFFINE
        format = (mode, found.bits, found.group_size)
        if not self._objects:
            return None
        if format not in self._formats:
            seen = f"shape says {found.bits} bits, group size {found.group_size}"
            has = _pairs(self._formats)
            if mode == AFFINE:
                return f"its {seen}, which config.json does not name (it has {has})"
            return (
                f"{_HAS_UINT8}. Its {seen}: {mode}, which config.json does not name (it "
                f'has {has}). If the file is right, add "mode": "{mode}" to the '
                "module's settings there"
            )
        if mode != AFFINE or format in self._astray:
            return None
        for named in self._objects:
            own = named.get(stem.removesuffix("."), named[""])
            if format not in own and (reason := _contradiction(found, own)):
                return reason
        return None


def lone_words(checkpoint: Checkpoint, tensor: StoredTensor) -> str | None:
    """What a packed weight lacks whose scales are not there, if it is one."""
    is_weight = tensor.name == "weight" or tensor.name.endswith(".weight")
    if tensor.dtype != torch.uint32 or not is_weight:
        return None
    stem = tensor.name.removesuffix("weight")
    parts = (f"{stem}scales", _biases(checkpoint, stem))
    absent = [name for name in parts if name not in checkpoint.tensors]
    return (
        f"uint32 words {list(tensor.shape)}, of which {' and '.join(absent)} "
        f"{'is' if len(absent) == 1 else 'are'} missing"
    )


def _contradiction(found: PackedWeight, own: set[Format]) -> str | None:
    """Whether the module's own settings make another, equally consistent shape of it.

    Twice the columns at half the bits and twice the group size are the same arrays.
    """
    for mode, bits, group_size in sorted(own):
        columns = found.scales.shape[-1] * group_size
        if mode == AFFINE and columns * bits == 32 * found.packed.shape[-1]:
            return (
                f"{columns} columns of {bits} bits, group size {group_size}, as "
                f"config.json says; the model has {found.shape[-1]} columns"
            )
    return None


def _pairs(declared: set[Format]) -> str:
    return (
        ", ".join(
            f"{b} bits, group size {g}" if mode == AFFINE else mode
            for mode, b, g in sorted(declared)
        )
        or "no pair"
    )
