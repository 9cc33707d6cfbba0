"""The AWQ formats: which tensors are a module's packed weight, and how they are laid out.

A quantized module has ``qweight``, ``scales`` and as a rule ``qzeros`` in place of
``weight``, which is ``(code - zero) * scale``. Three layouts are read, by the names that
the settings have for them in ``version`` or ``format``. With N rows, K columns, G groups
in a row and codes of b bits in int32 words:

* gemm: ``qweight`` ``[K, N * b / 32]``, packed along N, ``qzeros`` ``[G, N * b / 32]``
  alike, ``scales`` ``[G, N]``. With 4 bits every eight codes lie in the order
  0 2 4 6 1 3 5 7; with others AutoRound keeps that order and gptqmodel has none.
* gemv: ``qweight`` ``[N, K / 8]``, which are this library's words, ``qzeros``
  ``[N, G / 8]``, ``scales`` ``[N, G]``, G padded; 4 bits only.
* gemv_fast, also called llm-awq: ``qweight`` int16 ``[N / 4, K]``, rows and columns
  shuffled, ``scales`` ``[G, N]``, G padded, and ``qzeros`` or ``scaled_zeros`` alike, the
  floats that are added to ``code * scale``; 4 bits only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import layout
from ..tensor import AffineQuantizedTensor
from . import awq_words
from .awq_settings import (
    BITS,
    GEMM,
    GEMV,
    GEMV_FAST,
    VERSIONS,
    Settings,
    check_settings,
    recognizes,
    settings,
    stems,
)
from .files import Checkpoint, CheckpointError, StoredTensor, check_biases, move

__all__ = ["AwqWeight", "check_settings", "recognizes", "stored_weights"]

_INTEGERS = (torch.int32, torch.uint32)

# Of these widths AutoRound and gptqmodel have orders of their own.
_TWO_ORDERS = (5, 6, 7)


@dataclass(frozen=True)
class AwqWeight:
    """The stored tensors of one quantized module, and what they mean."""

    name: str  # of the parameter, "….weight"
    version: str  # GEMM, GEMV or GEMV_FAST
    qweight: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None  # None: all are half of the codes
    shape: tuple[int, int]  # of the dense weight, [N, K]
    bits: int  # of the stored codes
    groups: int  # in a row
    shuffled: bool = False  # whether every eight codes of gemm lie in AWQ's order

    @property
    def format(self) -> tuple[int, int]:
        """Bits and group size of the packed tensor that is read."""
        return awq_words.held_bits(self.bits), _held_group(self.group_size)

    @property
    def group_size(self) -> int:
        """That of the file: any multiple of 16."""
        return self.shape[1] // self.groups

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
        bits, group_size = self.format
        notes = []
        if bits != self.bits:
            notes.append(f"{self.bits} bits, kept exactly in {bits}")
        if group_size != self.group_size:
            notes.append(
                f"groups of {self.group_size} columns, kept exactly as "
                f"{self.group_size // group_size} of {group_size}"
            )
        return "; ".join(notes) or None

    def read(self, dtype: torch.dtype, device: torch.device) -> AffineQuantizedTensor:
        """Read it, as a tensor that counts as `dtype`.

        Codes and scales are the file's. Biases, ``-scale * zero``, have the dtype of the
        scales if that holds them exactly; if not, both are float32, which holds those of
        16-bit scales. Raises CheckpointError where the padding of scales is not empty.
        """
        bits, group_size = self.format
        packed = move(self._packed(), device)
        times = self.group_size // group_size
        scales, biases = (
            part if times == 1 else part.repeat_interleave(times, dim=-1)
            for part in self._scales_and_biases()
        )
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
        words = self.qweight.read()
        if self.version == GEMV_FAST:
            return awq_words.from_gemv_fast(words)
        words = words.view(torch.int32)
        if self.version == GEMV:
            return words
        return awq_words.from_gemm(
            words, self.shape[0], bits=self.bits, shuffled=self.shuffled
        )

    def _scales_and_biases(self) -> tuple[Tensor, Tensor]:
        """Both ``[N, groups]``, of one dtype."""
        scales = self._by_rows(self.scales)
        if self.zeros is not None and self.version == GEMV_FAST:
            biases = self._by_rows(self.zeros)
            both = torch.promote_types(scales.dtype, biases.dtype)
            return scales.to(both), biases.to(both)
        biases = (scales.float() * self._zeros()).neg_()
        check_biases(self.scales, scales, biases)
        short = biases.to(scales.dtype)
        if torch.equal(short.float(), biases):
            return scales, short
        return scales.float(), biases

    def _by_rows(self, stored: StoredTensor) -> Tensor:
        """Floats of the groups ``[N, groups]``, without the padding."""
        values = stored.read()
        values = values if self.version == GEMV else values.t()
        if bool(values[:, self.groups :].any()):
            raise CheckpointError(
                f"{stored.name} has more than the {self.groups} groups that make up "
                f"{self.shape[1]} columns at group size {self.group_size}: what follows "
                "them is not zero. Correct group_size in the settings"
            )
        return values[:, : self.groups].contiguous()

    def _zeros(self) -> Tensor | float:
        """The zeros ``[N, groups]``, float32, or one for all."""
        if self.zeros is None:
            return float(1 << (self.bits - 1))
        codes = awq_words.unpack(self.zeros.read().view(torch.int32), self.bits)
        if self.version == GEMV:
            return codes[:, : self.groups].float()
        return awq_words.by_rows(codes[:, : self.shape[0]], self.shuffled).float()


def stored_weights(
    checkpoint: Checkpoint,
) -> tuple[dict[str, AwqWeight], dict[str, str], set[str]]:
    """The packed weights of a checkpoint, by parameter name (``….weight``).

    Quantized is what has a ``qweight``, whatever ``modules_to_not_convert`` says. Returns
    the weights, what is wrong with those that are broken, and the names of all tensors
    that belong to either.
    """
    weights: dict[str, AwqWeight] = {}
    broken: dict[str, str] = {}
    parts: set[str] = set()
    said = settings(checkpoint) or Settings("config.json", {})
    for stem in stems(checkpoint):
        name = f"{stem}weight"
        own = ("qweight", "qzeros", "scales", "scaled_zeros")
        parts |= {f"{stem}{part}" for part in own}
        try:
            weights[name] = _Module(checkpoint, said, stem).weight()
        except CheckpointError as error:
            broken[name] = f"quant_method {said.method!r}: {error}"
    return weights, broken, parts & checkpoint.tensors.keys()


@dataclass(frozen=True)
class _Module:
    """Makes sense of one module's tensors: shapes decide, and the settings confirm.

    All of it raises CheckpointError, with a text that does not name the module.
    """

    checkpoint: Checkpoint
    said: Settings
    stem: str

    @property
    def name(self) -> str:
        return f"{self.stem}weight"

    def weight(self) -> AwqWeight:
        tensors, stem = self.checkpoint.tensors, self.stem
        qweight, scales = tensors[f"{stem}qweight"], tensors.get(f"{stem}scales")
        if scales is None:
            raise CheckpointError(
                f"its scales are missing: {stem}scales. Fetch the checkpoint again"
            )
        if self.name in tensors:
            raise CheckpointError(
                f"there are both {qweight.name} and {self.name}; remove the one that "
                "does not belong to the checkpoint"
            )
        seen = f"{_seen(qweight)} and {_seen(scales)}"
        if qweight.dtype not in (*_INTEGERS, torch.int16):
            raise CheckpointError(
                f"{seen}: words must be I32, or I16 in gemv_fast. Quantize the original "
                "model again so"
            )
        if scales.dtype not in layout.WEIGHT_DTYPES:
            raise CheckpointError(
                f"{seen}: scales must be F32, F16 or BF16. Quantize the original model "
                "again so"
            )
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            raise CheckpointError(
                f"{seen}: both must be matrices. Fetch the checkpoint again"
            )
        if not all(qweight.shape + scales.shape):
            raise CheckpointError(
                f"{seen}: none of these may be zero. Fetch the checkpoint again"
            )
        if qweight.dtype == torch.int16:
            read, version = self._gemv_fast, GEMV_FAST
        elif scales.shape[0] == qweight.shape[0]:
            # Rows of the weight. In gemm, of a square weight too, it would be a group
            # for each column.
            read, version = self._gemv, GEMV
        else:
            read, version = self._gemm, GEMM
        named = self.said.version
        if named is not None and VERSIONS.get(named) != version:
            raise CheckpointError(
                f"{seen} are of version {version!r}, and {self.said.file} says {named!r}. "
                "If the tensors are right, correct that there"
            )
        weight = read(qweight, scales)
        bits, group_size = weight.format
        reason = layout.why_not(weight.shape[1], bits=bits, group_size=group_size)
        if reason:
            raise CheckpointError(
                f"{reason}. Quantize the original model again, without this module"
            )
        return weight

    def _gemm(self, qweight: StoredTensor, scales: StoredTensor) -> AwqWeight:
        (columns, words), (groups, rows) = qweight.shape, scales.shape
        seen = f"{_seen(qweight)} and {_seen(scales)}"
        fits = [bits for bits in BITS if math.ceil(rows * bits / 32) == words]
        if not fits or columns % groups:
            raise CheckpointError(
                f"{seen} do not fit together: {words} words must hold {rows} codes of 2 "
                f"to 8 bits, and {groups} groups make up {columns} columns. Fetch the "
                "checkpoint again"
            )
        known = [bits for bits in fits if bits in self.said.bits]
        if len(known) != 1:  # of few rows several widths may fit
            raise CheckpointError(
                f"{seen} make {layout.join(fits, ' or ')} bits, and {self.said.file} "
                f"names {_listed(self.said.bits)}. If the tensors are right, correct "
                "that there"
            )
        bits, size = known[0], columns // groups
        named = {columns if size == -1 else size for size in self.said.groups}
        if size not in named:
            raise CheckpointError(
                f"{seen} make groups of {size} columns, and {self.said.file} names "
                f"{_listed(self.said.groups)}. If the tensors are right, correct that "
                "there"
            )
        shuffled = self._is_shuffled(bits)
        if shuffled and rows % 8:
            raise CheckpointError(
                f"{seen}: its {rows} rows are not a multiple of 8, which AWQ's order "
                "needs. Fetch the checkpoint again"
            )
        zeros = self._zeros(_INTEGERS, (groups, words), "qzeros")
        shape = (rows, columns)
        return AwqWeight(
            self.name, GEMM, qweight, scales, zeros, shape, bits, groups, shuffled
        )

    def _gemv(self, qweight: StoredTensor, scales: StoredTensor) -> AwqWeight:
        rows, words = qweight.shape
        groups = self._groups(8 * words, scales, scales.shape[1])
        width = math.ceil(scales.shape[1] / 8)
        zeros = self._zeros(_INTEGERS, (rows, width), "qzeros")
        shape = (rows, 8 * words)
        return AwqWeight(self.name, GEMV, qweight, scales, zeros, shape, 4, groups)

    def _gemv_fast(self, qweight: StoredTensor, scales: StoredTensor) -> AwqWeight:
        rows, columns = 4 * qweight.shape[0], qweight.shape[1]
        if scales.shape[1] != rows or columns % 64:
            raise CheckpointError(
                f"{_seen(qweight)} and {_seen(scales)} do not fit together: in "
                "gemv_fast they are [N / 4, K] and [groups, N], with K a multiple of 64. "
                "Fetch the checkpoint again"
            )
        groups = self._groups(columns, scales, scales.shape[0])
        names = ("scaled_zeros", "qzeros")
        zeros = self._zeros(layout.WEIGHT_DTYPES, scales.shape, *names)
        shape = (rows, columns)
        return AwqWeight(self.name, GEMV_FAST, qweight, scales, zeros, shape, 4, groups)

    def _zeros(
        self, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], *names: str
    ) -> StoredTensor | None:
        """The zeros, or None if there are none and need not be any."""
        tensors = self.checkpoint.tensors
        found = [tensors.get(f"{self.stem}{name}") for name in names]
        zeros = next(filter(None, found), None)
        if zeros is None:
            if self.said.values.get("zero_point") is True:
                raise CheckpointError(
                    f"its zeros are missing: {self.stem}{names[0]}, and zero_point is "
                    f"true in {self.said.file}; only with false they may be. Fetch the "
                    "checkpoint again"
                )
            return None
        if zeros.dtype not in dtypes or zeros.shape != shape:
            kind = "I32" if torch.int32 in dtypes else "F32, F16 or BF16"
            raise CheckpointError(
                f"{_seen(zeros)} must be {kind} {list(shape)}. Fetch the checkpoint again"
            )
        return zeros

    def _is_shuffled(self, bits: int) -> bool:
        """Whether every eight codes of gemm lie in AWQ's order."""
        writer = self.said.writer
        if bits in _TWO_ORDERS and writer is None:
            raise CheckpointError(
                f"it has {bits} bits, which AutoRound and gptqmodel pack in two orders, "
                f"and {self.said.file} does not say which of them wrote it. Add there "
                '"provider": "auto-round", or "meta": {"quantizer": ["gptqmodel"]}'
            )
        if bits not in (4, *_TWO_ORDERS) and writer == "auto-round":
            raise CheckpointError(
                f"it has {bits} bits, and AutoRound packs 4 to 7 bits like this. "
                "Quantize the original model again, in its auto_gptq format"
            )
        return bits == 4 or writer == "auto-round"

    def _groups(self, columns: int, scales: StoredTensor, padded: int) -> int:
        """How many groups a row has; stored is a number that is padded."""
        if 4 not in self.said.bits:
            raise CheckpointError(
                f"its layout has 4 bits, and {self.said.file} names "
                f"{_listed(self.said.bits)}. Correct that there"
            )
        sizes = {columns if size == -1 else size for size in self.said.groups}
        counts = {columns // size: size for size in sizes if columns % size == 0}
        fits = [n for n, size in counts.items() if padded in (n, _padded(n, size))]
        if len(fits) != 1:
            raise CheckpointError(
                f"{_seen(scales)} belong to {columns} columns, and {self.said.file} names "
                f"groups of {_listed(self.said.groups)}: {len(fits) or 'none'} of these "
                "fit, where one must. Correct that there"
            )
        return fits[0]


def _padded(groups: int, group_size: int) -> int:
    """To how many groups gemv and gemv_fast fill up a row: to words of eight zeros each,
    and of these to a multiple that is larger the smaller the groups are."""
    words, multiple = math.ceil(groups / 8), max(1, 128 // group_size)
    return 8 * multiple * math.ceil(words / multiple)


def _held_group(group_size: int) -> int:
    """The largest group size of this library that divides it."""
    held = [size for size in layout.GROUP_SIZES if group_size % size == 0]
    if not held:
        raise CheckpointError(
            f"its groups are {group_size} columns wide; allowed are multiples of 16. "
            "Quantize the original model again with 128, or without this module"
        )
    return held[-1]


def _seen(tensor: StoredTensor) -> str:
    return f"{tensor.name} ({layout.name_of(tensor.dtype)} {list(tensor.shape)})"


def _listed(values: set[int]) -> str:
    return layout.join(sorted(values), " or ")
