"""The AWQ formats: which tensors are a module's packed weight, and how they are laid out.

A quantized module has ``qweight``, ``scales`` and as a rule ``qzeros`` instead of
``weight``, and weighs ``(code - zero) * scale``. Three layouts are read, by the names
that config.json has for them in ``version`` or ``format``. With N rows, K columns, G
groups of columns and codes of b bits in int32 words:

* gemm: ``qweight`` ``[K, N * b / 32]``, packed along N, ``qzeros`` ``[G, N * b / 32]``
  alike, ``scales`` ``[G, N]``. With 4 bits every eight codes lie in the order
  0 2 4 6 1 3 5 7. With others AutoRound keeps that order and gptqmodel has none.
* gemv: ``qweight`` ``[N, K / 8]``, which are this library's words, ``qzeros``
  ``[N, G / 8]``, ``scales`` ``[N, G]``, G padded; 4 bits.
* gemv_fast, also called llm-awq: ``qweight`` int16 ``[N / 4, K]``, four rows and eight
  words of a row shuffled; ``scales`` ``[G, N]``, G padded, and beside them what is added
  to ``code * scale``, as ``qzeros`` or ``scaled_zeros``; 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout
from ..tensor import AffineQuantizedTensor
from .files import Checkpoint, StoredTensor, move, read_json

GEMM, GEMV, GEMV_FAST = "gemm", "gemv", "gemv_fast"
VERSIONS = {
    GEMM: GEMM,
    GEMV: GEMV,
    GEMV_FAST: GEMV_FAST,
    "llm-awq": GEMV_FAST,
    "llm_awq": GEMV_FAST,
}
_ALLOWED = "gemm, gemv, gemv_fast and llm-awq"

BITS = (2, 3, 4, 5, 6, 7, 8)
_AUTO_ROUND_BITS = (4, 5, 6, 7)

# Where settings stand that config.json lacks: of AutoAWQ before 0.1.8, of gptqmodel and
# of AutoRound.
_FILES = ("quant_config.json", "quantize_config.json", "quantization_config.json")

_VERSION_KEYS = ("version", "format", "checkpoint_format")
_BITS_KEYS = ("bits", "w_bit")
_GROUP_KEYS = ("group_size", "q_group_size")

_WORDS = (torch.int32, torch.uint32)

# Words transposed and codes unpacked at a time: so that they stay in the cache.
_SLICE = 1 << 17


@dataclass(frozen=True)
class AwqWeight:
    """The stored tensors of one quantized module, and what they mean."""

    name: str  # of the parameter, "….weight"
    version: str
    qweight: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None
    shape: tuple[int, int]  # of the dense weight, [N, K]
    bits: int  # of the stored codes
    groups: int  # in a row
    shuffled: bool  # whether every eight codes of gemm are in AWQ's order

    @property
    def format(self) -> tuple[int, int]:
        """Bits and group size of the packed tensor that is read."""
        group_size = _held_group(self.shape[1] // self.groups)
        assert group_size is not None
        return _held_bits(self.bits), group_size

    @property
    def place(self) -> tuple[str, int]:
        return self.qweight.place

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        parts = (self.qweight, self.scales)
        return parts if self.zeros is None else (*parts, self.zeros)

    @property
    def note(self) -> str | None:
        """What the report of a load says about this weight, if anything."""
        own, held = self.shape[1] // self.groups, self.format[1]
        kept = [f"{self.bits} bits kept exactly in 8"] if self.bits == 7 else []
        if own != held:
            kept.append(f"groups of {own} columns kept exactly as {own // held} of {held}")
        return "; ".join(kept) or None

    def read(self, dtype: torch.dtype, device: torch.device) -> AffineQuantizedTensor:
        """Read it, as a tensor that counts as `dtype`.

        Codes and scales are the file's. Biases, ``-scale * zero``, have the dtype of
        the scales if that holds them exactly; if not, both are float32.
        """
        bits, group_size = self.format
        packed = move(self._packed(), device)
        parts = self._scales_and_biases()
        times = self.shape[1] // self.groups // group_size
        scales, biases = (part.repeat_interleave(times, dim=-1) for part in parts)
        return AffineQuantizedTensor.from_packed(
            packed,
            move(scales, device),
            move(biases, device),
            bits=bits,
            group_size=group_size,
            dtype=dtype,
        )

    def _packed(self) -> Tensor:
        """The words, int32 ``[N, K * bits / 32]``."""
        stored = self.qweight.read()
        if self.version == GEMV_FAST:
            return _from_gemv_fast(stored)
        words = stored.view(torch.int32)
        if self.version == GEMV:
            return words
        if self.bits == 4:
            return _transpose_nibbles(words)
        return _transpose_stream(words, self.shape[0], self.bits, self.shuffled)

    def _scales_and_biases(self) -> tuple[Tensor, Tensor]:
        """Both ``[N, groups]``, of one dtype."""
        scales = self._own_groups(self.scales)
        if self.zeros is None:
            zeros = torch.full_like(scales, 1 << (self.bits - 1), dtype=torch.float32)
        elif self.version == GEMV_FAST:
            biases = self._own_groups(self.zeros)
            both = torch.promote_types(scales.dtype, biases.dtype)
            return scales.to(both), biases.to(both)
        else:
            words = self.zeros.read().view(torch.int32)
            if self.version == GEMV:
                codes = layout.unpack(words, bits=self.bits)[:, : self.groups]
            else:
                codes = _unpack(words, self.bits)[:, : self.shape[0]]
                codes = (_unshuffle(codes) if self.shuffled else codes).t()
            zeros = codes.float()
        biases = (scales.float() * zeros).neg_()
        short = biases.to(scales.dtype)
        if torch.equal(short.float(), biases):
            return scales, short
        return scales.float(), biases

    def _own_groups(self, tensor: StoredTensor) -> Tensor:
        """Its values ``[N, groups]``, without the padding."""
        values = tensor.read()
        values = values if self.version == GEMV else values.t()
        return values[:, : self.groups].contiguous()


# ---- the settings ----------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What a checkpoint says about its quantization, and where."""

    file: str
    values: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.values.get("quant_method") or "awq")

    @property
    def is_auto_round(self) -> bool:
        """Whether AutoRound packed it, under its own name or under awq's."""
        own = str(self.values.get("provider")) + self.method
        return "auto-round" in own or "autoround_version" in self.values

    @property
    def is_awq(self) -> bool:
        if "quant_method" not in self.values:
            return "w_bit" in self.values
        method = self.method.lower()
        if "auto-round" not in method and method not in ("auto_round", "inc"):
            return method == "awq"
        packing = (self.values.get(key) for key in ("packing_format", "backend"))
        return any("awq" in str(name).lower() for name in packing)

    def first(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        """The first of the keys that is set, and its value."""
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        return keys[0], default

    @property
    def version(self) -> str | None:
        """What it calls its layout; None if it does not say."""
        if self.values.get("backend") == "llm-awq":
            return None  # that project has had all three, under one name
        if self.method.lower() != "awq":
            return GEMM  # all that AutoRound writes
        value = self.first(_VERSION_KEYS, None)[1]
        return None if value is None else str(value).lower()

    def named(self, keys: tuple[str, ...], default: int) -> set[int]:
        """All that it names by these keys, for all modules or for some."""
        found = {n for n in _all(self.values, keys) if type(n) is int}
        return found if self.first(keys, None)[1] is not None else found | {default}


def _all(value: Any, keys: tuple[str, ...]) -> Iterator[Any]:
    """The values of these keys at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in keys:
                yield item
            yield from _all(item, keys)


def _settings(checkpoint: Checkpoint) -> _Settings | None:
    """The settings in config.json, else those in a file of their own."""
    config = checkpoint.config
    for one in (config, config.get("text_config")):
        values = one.get("quantization_config") if isinstance(one, dict) else None
        if isinstance(values, dict) and values:
            return _Settings("config.json", values)
    for file in _FILES:
        found = _Settings(file, read_json(checkpoint.folder / file))
        if found.is_awq:
            return found
    return None


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint says that it is AWQ, or has its tensors."""
    settings = _settings(checkpoint)
    if settings is not None:
        return settings.is_awq
    return any(_looks_like_awq(checkpoint, stem) for stem in _stems(checkpoint))


def _stems(checkpoint: Checkpoint) -> list[str]:
    """What stands before "qweight": "model.layers.0.mlp.up_proj.", say."""
    ends = (n for n in checkpoint.tensors if n == "qweight" or n.endswith(".qweight"))
    return [name.removesuffix("qweight") for name in ends]


def _looks_like_awq(checkpoint: Checkpoint, stem: str) -> bool:
    """Whether this is not GPTQ, whose words are as many in a row as its scales."""
    qweight = checkpoint.tensors[f"{stem}qweight"]
    scales = checkpoint.tensors.get(f"{stem}scales")
    if scales is None or f"{stem}g_idx" in checkpoint.tensors:
        return False
    return qweight.shape[-1:] != scales.shape[-1:] or qweight.dtype == torch.int16


def check_settings(checkpoint: Checkpoint) -> list[str]:
    """What keeps the whole checkpoint from being read, if anything."""
    settings = _settings(checkpoint)
    if settings is None:
        return [
            "its tensors named *.qweight look like AWQ's, and there are no settings: "
            f"config.json has no quantization_config, and of {layout.join(_FILES)} "
            "none is there. Fetch the file that belongs to them, or add to config.json "
            '"quantization_config": {"quant_method": "awq", "version": "gemm", "bits": '
            '4, "group_size": 128, "zero_point": true} with the values that are true'
        ]
    problems = [
        *_check_version(settings),
        *_check_numbers(settings),
        *_check_auto_round(settings),
    ]
    where = f"{settings.file}: quant_method {settings.method!r}: "
    problems = [where + problem for problem in problems]
    activations = [
        name
        for name in checkpoint.tensors
        if name.endswith(".act.scales")
        and f"{name.removesuffix('scales')}qweight" not in checkpoint.tensors
    ]
    if activations:
        problems.append(
            f"quant_method {settings.method!r}: {len(activations)} activations are "
            f"divided by scales of their own, {activations[0]} for example; only "
            "weights may be scaled. Quantize the original model again, with another "
            "method"
        )
    return problems


def _check_version(settings: _Settings) -> list[str]:
    for key in _VERSION_KEYS:
        value = settings.values.get(key)
        if str(value).lower() in ("marlin", "bitblas"):
            return [
                f"{key} is {value!r}, a layout for one kernel of CUDA; allowed are "
                f"{_ALLOWED}. Load the checkpoint that it was made from, or quantize "
                "the original model again with one of these"
            ]
    version = settings.version
    if version is None or version in VERSIONS:
        return []
    key, value = settings.first(_VERSION_KEYS, None)
    return [
        f"{key} is {value!r}; allowed are {_ALLOWED}. Quantize the original model again "
        "with one of these"
    ]


def _check_numbers(settings: _Settings) -> list[str]:
    problems = []
    key, bits = settings.first(_BITS_KEYS, 4)
    if type(bits) is not int or bits not in BITS:
        problems.append(
            f"{key} is {bits!r}; allowed are {layout.join(BITS)}. Quantize the original "
            "model again with one of these"
        )
    key, group = settings.first(_GROUP_KEYS, 128)
    if type(group) is not int or (group < 1 and group != -1):
        problems.append(
            f"{key} is {group!r}; allowed are multiples of 16, and -1 for whole rows. "
            "Correct it, or quantize the original model again"
        )
    return problems


def _check_auto_round(settings: _Settings) -> list[str]:
    """What AutoRound may do besides."""
    values, problems = settings.values, []
    for kind in _all(values, ("data_type",)):
        if isinstance(kind, str) and not kind.startswith("int"):
            problems.append(
                f"data_type is {kind!r}; allowed are integers (int). Quantize the "
                "original model again with those"
            )
    for bits in _all(values, ("act_bits",)):
        if isinstance(bits, int) and bits < 16:
            problems.append(
                f"act_bits is {bits}: activations are quantized too; allowed is 16, "
                "weights alone. Quantize the original model again so"
            )
    for key in ("rotation_config", "spinquant_config"):
        if values.get(key):
            problems.append(
                f"{key} is {values[key]!r}: activations are rotated while the model "
                "runs; only weights may be changed. Quantize the original model again "
                "without it"
            )
    return list(dict.fromkeys(problems))


# ---- the weights -----------------------------------------------------------------


def stored_weights(
    checkpoint: Checkpoint,
) -> tuple[dict[str, AwqWeight], dict[str, str], set[str]]:
    """The packed weights of a checkpoint, by parameter name (``….weight``).

    What is quantized is what has a ``qweight``, whatever the settings say. Returns the
    weights, what is wrong with those that are broken, and the names of all tensors that
    belong to either.
    """
    weights: dict[str, AwqWeight] = {}
    broken: dict[str, str] = {}
    parts: set[str] = set()
    settings = _settings(checkpoint) or _Settings("config.json", {})
    for stem in _stems(checkpoint):
        name = f"{stem}weight"
        own = ("qweight", "qzeros", "scales", "scaled_zeros")
        parts |= {f"{stem}{part}" for part in own}
        found = _Reader(checkpoint, settings, stem).weight()
        if isinstance(found, AwqWeight):
            weights[name] = found
        else:
            broken[name] = f"quant_method {settings.method!r}: {found}"
    return weights, broken, parts & checkpoint.tensors.keys()


@dataclass(frozen=True)
class _Reader:
    """Makes sense of the tensors of one module: shapes decide, settings confirm."""

    checkpoint: Checkpoint
    settings: _Settings
    stem: str

    def weight(self) -> AwqWeight | str:
        """The weight, or what is wrong with it."""
        tensors, stem = self.checkpoint.tensors, self.stem
        qweight, scales = tensors[f"{stem}qweight"], tensors.get(f"{stem}scales")
        if scales is None:
            return f"its scales are missing: {stem}scales. Fetch the checkpoint again"
        if f"{stem}weight" in tensors:
            return (
                f"there are {qweight.name} and {stem}weight; remove the one that does "
                "not belong to this checkpoint"
            )
        shapes = f"{_seen(qweight)} and {_seen(scales)}"
        if qweight.dtype not in (*_WORDS, torch.int16):
            return f"{shapes}; its words must be I32, or I16 in gemv_fast"
        if scales.dtype not in layout.WEIGHT_DTYPES:
            return f"{shapes}; its scales must be F32, F16 or BF16"
        if len(qweight.shape) != 2 or len(scales.shape) != 2 or 0 in qweight.shape:
            return f"{shapes}; both must be matrices"
        if qweight.dtype == torch.int16:
            return self._confirm(GEMV_FAST) or self._gemv_fast(qweight, scales)
        # With the scales square matrices cannot be mistaken either: there are as many
        # as there are rows of words only where these are rows of the weight.
        if scales.shape[0] == qweight.shape[0]:
            return self._confirm(GEMV) or self._gemv(qweight, scales)
        return self._confirm(GEMM) or self._gemm(qweight, scales)

    def _confirm(self, version: str) -> str | None:
        """What the settings have against this layout, or None."""
        named = self.settings.version
        if named is None or VERSIONS.get(named, version) == version:
            return None
        return (
            f"its shapes are those of {version!r}, and {self.settings.file} says "
            f"{named!r}. If the file is right, correct that there"
        )

    def _gemm(self, qweight: StoredTensor, scales: StoredTensor) -> AwqWeight | str:
        columns, words = qweight.shape
        groups, rows = scales.shape
        shapes = f"{_seen(qweight)} and {_seen(scales)}"
        named = self.settings.named(_BITS_KEYS, 4)
        fits = [b for b in BITS if math.ceil(rows * b / 32) == words]
        if not fits or groups == 0 or columns % groups:
            return (
                f"{shapes} do not fit together: rows of {words} words must hold {rows} "
                f"codes of 2 to 8 bits, and {groups} groups make up {columns} columns. "
                "Fetch the checkpoint again"
            )
        known = [b for b in fits if b in named]
        if len(known) != 1:
            return (
                f"{shapes} say {layout.join(fits, ' or ')} bits, and "
                f"{self.settings.file} {layout.join(sorted(named), ' or ')}; one must be "
                "common to both. Correct it there"
            )
        bits, group_size = known[0], columns // groups
        if problem := self._unnamed(group_size, groups):
            return problem
        shuffled = self._is_shuffled(bits)
        if isinstance(shuffled, str):
            return shuffled
        if shuffled and rows % 8:
            return f"{shapes}: {rows} rows; in this layout they must be a multiple of 8"
        zeros = self._zeros(_WORDS, (groups, words), "qzeros")
        return self._made(
            GEMM, qweight, scales, zeros, (rows, columns), bits, groups, shuffled
        )

    def _gemv(self, qweight: StoredTensor, scales: StoredTensor) -> AwqWeight | str:
        rows, words = qweight.shape
        groups = self._groups_of(words * 8, scales.shape[1], f"{_seen(scales)}")
        if isinstance(groups, str):
            return groups
        zeros = self._zeros(_WORDS, (rows, math.ceil(scales.shape[1] / 8)), "qzeros")
        shape = rows, words * 8
        return self._made(GEMV, qweight, scales, zeros, shape, 4, groups)

    def _gemv_fast(
        self, qweight: StoredTensor, scales: StoredTensor
    ) -> AwqWeight | str:
        rows, columns = 4 * qweight.shape[0], qweight.shape[1]
        if scales.shape[1] != rows or columns % 64:
            return (
                f"{_seen(qweight)} and {_seen(scales)} do not fit together: in "
                "gemv_fast words are [N / 4, K] and scales [groups, N], and K is a "
                "multiple of 64. Fetch the checkpoint again"
            )
        groups = self._groups_of(columns, scales.shape[0], f"{_seen(scales)}")
        if isinstance(groups, str):
            return groups
        zeros = self._zeros(
            layout.WEIGHT_DTYPES, scales.shape, "scaled_zeros", "qzeros"
        )
        shape = rows, columns
        return self._made(GEMV_FAST, qweight, scales, zeros, shape, 4, groups)

    def _made(
        self,
        version: str,
        qweight: StoredTensor,
        scales: StoredTensor,
        zeros: StoredTensor | str | None,
        shape: tuple[int, int],
        bits: int,
        groups: int,
        shuffled: bool = False,
    ) -> AwqWeight | str:
        """The weight, if this library can hold it."""
        if isinstance(zeros, str):
            return zeros
        own = shape[1] // groups
        group_size = _held_group(own)
        if group_size is None:
            return (
                f"its groups are {own} columns wide; allowed are multiples of 16. "
                "Quantize the original model again, or leave this module dense"
            )
        held = _held_bits(bits)
        if reason := layout.why_not(shape[1], bits=held, group_size=group_size):
            return f"{reason}. Quantize the original model again without this module"
        return AwqWeight(
            f"{self.stem}weight",
            version,
            qweight,
            scales,
            zeros,
            shape,
            bits,
            groups,
            shuffled,
        )

    def _zeros(
        self, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], *names: str
    ) -> StoredTensor | str | None:
        """The zeros, what is wrong with them, or None where half of the codes is meant."""
        tensors = self.checkpoint.tensors
        found = [tensors[f"{self.stem}{n}"] for n in names if f"{self.stem}{n}" in tensors]
        if not found:
            if self.settings.values.get("zero_point") is not True:
                return None
            return (
                f"its zeros are missing: {self.stem}{names[0]}; only with zero_point "
                f"false they may be, and in {self.settings.file} it is true. Fetch the "
                "checkpoint again, or correct that there"
            )
        zeros = found[0]
        if zeros.dtype not in dtypes or zeros.shape != shape:
            allowed = "I32" if torch.int32 in dtypes else "F32, F16 or BF16"
            return (
                f"{_seen(zeros)}; {allowed} {list(shape)} is needed. Fetch the "
                "checkpoint again"
            )
        return zeros

    def _is_shuffled(self, bits: int) -> bool | str:
        """Whether every eight codes are in AWQ's order, in gemm; or why it is unknown."""
        if bits == 4:
            return True
        if self.settings.is_auto_round:
            if bits in _AUTO_ROUND_BITS:
                return True
            return (
                f"it has {bits} bits, and AutoRound packs {layout.join(_AUTO_ROUND_BITS)}"
                " in this layout. Quantize the original model again"
            )
        meta = self.settings.values.get("meta")
        writer = meta.get("quantizer") if isinstance(meta, dict) else None
        if bits in _AUTO_ROUND_BITS and "gptqmodel" not in str(writer):
            return (
                f"it has {bits} bits, which AutoRound and gptqmodel pack in two orders, "
                f"and {self.settings.file} does not say whose it is. If gptqmodel wrote "
                'it, add "meta": {"quantizer": ["gptqmodel"]} there, else "provider": '
                '"auto-round"'
            )
        return False

    def _unnamed(self, group_size: int, groups: int) -> str | None:
        named = self.settings.named(_GROUP_KEYS, 128)
        if group_size in named or (groups == 1 and -1 in named):
            return None
        return (
            f"its shapes say groups of {group_size} columns, and {self.settings.file} "
            f"{layout.join(sorted(named), ' or ')}. If the file is right, correct that "
            "there"
        )

    def _groups_of(self, columns: int, padded: int, seen: str) -> int | str:
        """How many groups a row has, where only their padded number is stored."""
        if 4 not in (named := self.settings.named(_BITS_KEYS, 4)):
            return (
                f"it is in a layout of 4 bits, and {self.settings.file} says "
                f"{layout.join(sorted(named), ' or ')}. Correct it there"
            )
        sizes = sorted(self.settings.named(_GROUP_KEYS, 128))
        wide = [columns if size == -1 else size for size in sizes]
        fits = {
            columns // size
            for size in wide
            if size > 0
            and columns % size == 0
            and padded in (columns // size, _padded(columns // size, size))
        }
        if len(fits) == 1:
            return fits.pop()
        how = f"{len(fits)} of them fit" if fits else "none of them fits"
        return (
            f"{seen} for {columns} columns; {self.settings.file} says groups of "
            f"{layout.join(sizes, ' or ')}, and {how}. Correct it there"
        )


def _padded(groups: int, group_size: int) -> int:
    """To what gemv and gemv_fast pad a row of groups: whole words of zeros, and as many
    words as 128 is times the group size."""
    words = math.ceil(groups / 8)
    several = max(1, 128 // group_size)
    return 8 * several * math.ceil(words / several)


def _held_bits(bits: int) -> int:
    return bits if bits in layout.BITS else 8


def _held_group(group_size: int) -> int | None:
    """The largest group size of this library that divides it."""
    return max((g for g in layout.GROUP_SIZES if group_size % g == 0), default=None)


def _seen(tensor: StoredTensor) -> str:
    return f"{tensor.name} is {layout.name_of(tensor.dtype)} {list(tensor.shape)}"


# ---- the words -------------------------------------------------------------------


def _transpose_nibbles(words: Tensor) -> Tensor:
    """gemm's int32 ``[K, N / 8]`` of 4 bits to int32 ``[N, K / 8]``.

    Eight words below each other are a square of 64 codes. It is transposed by three
    exchanges between pairs of words: of their halves, quarters and eighths.
    """
    columns, across = words.shape
    packed = words.new_empty(across * 8, columns // 8)
    # The nibble at 4 * h + i of a word is its row 2 * i + h.
    rows = packed.view(across, 4, 2, columns // 8)
    step = max(1, _SLICE // columns)
    for start in range(0, across, step):
        part = slice(start, start + step)
        square = words[:, part].clone(memory_format=torch.contiguous_format)
        for apart, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
            pairs = square.view(-1, 2, apart, square.shape[-1])
            above, below = pairs[:, 0], pairs[:, 1]
            # The shift copies the sign bit, and the mask drops the copies.
            swap = (above >> 4 * apart).bitwise_xor_(below).bitwise_and_(mask)
            below.bitwise_xor_(swap)
            above.bitwise_xor_(swap.bitwise_left_shift_(4 * apart))
        rows[part] = square.view(-1, 2, 4, square.shape[-1]).permute(3, 2, 1, 0)
    return packed


def _transpose_stream(words: Tensor, rows: int, bits: int, shuffled: bool) -> Tensor:
    """gemm's int32 ``[K, ceil(N * bits / 32)]`` to int32 ``[N, K * held / 32]``."""
    columns, held = len(words), _held_bits(bits)
    packed = words.new_empty(rows, columns * held // 32)
    step = 32 * max(1, _SLICE // (4 * columns))  # 32 codes end with a word
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = words[:, start * bits // 32 : math.ceil(stop * bits / 32)]
        codes = _unpack(part, bits)[:, : stop - start]
        codes = _unshuffle(codes) if shuffled else codes
        own = layout.pack(codes.t().contiguous(), bits=held)
        packed[start:stop] = own.view(torch.int32)
    return packed


def _unpack(words: Tensor, bits: int) -> Tensor:
    """A stream of codes, int32 ``[..., W]`` to uint8 ``[..., W * 32 / bits]``; if that
    is not whole, up to ``bits`` codes more."""
    words = F.pad(words, (0, -words.shape[-1] % bits))
    if bits in layout.BITS:
        return layout.unpack(words, bits=bits)
    # 7 bits: seven bytes are eight codes.
    eights = F.pad(words.view(torch.uint8).unflatten(-1, (-1, bits)), (0, 8 - bits))
    shifts = torch.arange(0, 8 * bits, bits)
    codes = eights.view(torch.int64) >> shifts
    return codes.bitwise_and_((1 << bits) - 1).to(torch.uint8).flatten(-2)


def _unshuffle(codes: Tensor) -> Tensor:
    """Codes ``[..., N]`` in the order of gemm, in their own."""
    return codes.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).flatten(-3)


def _from_gemv_fast(words: Tensor) -> Tensor:
    """gemv_fast's int16 ``[N / 4, K]`` to int32 ``[N, K / 8]``.

    Of every 64 columns the words of four rows stand one row after the other. Of every
    32 columns, column ``8 * a + 2 * b + c`` is the nibble ``4 * c + a`` of word ``b``.
    """
    fours, columns = words.shape
    packed = torch.empty(4 * fours, columns // 8, dtype=torch.int32)
    rows = packed.view(torch.uint8).view(fours, 4, columns // 64, 2, 4, 4)
    step = max(1, _SLICE // columns)
    for start in range(0, fours, step):
        part = slice(start, start + step)
        own = words[part].contiguous().view(torch.int32)
        # Nibbles 0 1 2 3 4 5 6 7 to 0 4 1 5 2 6 3 7: byte a has those of b and its c.
        for apart, mask in ((8, 0x0000FF00), (4, 0x00F000F0)):
            swap = (own >> apart).bitwise_xor_(own).bitwise_and_(mask)
            own = own ^ swap ^ (swap << apart)
        # [.., 64 columns, row, 32 columns, b, a]
        bytes_of = own.view(torch.uint8).view(-1, columns // 64, 4, 2, 4, 4)
        rows[part] = bytes_of.permute(0, 2, 1, 3, 5, 4)
    return packed
