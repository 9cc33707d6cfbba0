"""The GPTQ format: of AutoGPTQ, GPTQModel, Optimum, and AutoRound's ``auto_gptq``.

A quantized module has ``qweight`` int32 ``[K * bits / 32, N]``, ``scales`` ``[G, N]``,
``qzeros`` int32 ``[G, N * bits / 32]`` and mostly ``g_idx`` int32 ``[K]``, the group of
each input column: ``w = scale * (code - zero)``. The settings stand in config.json under
``quantization_config``, in old files in ``quantize_config.json``. Bits and group size of
a module follow from its shapes, since rules for single modules (``dynamic``) are regular
expressions over names that loaders spell differently; the settings must name both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import layout
from ..tensor import AffineQuantizedTensor, log_once
from . import gptq_words
from .files import Checkpoint, CheckpointError, StoredTensor, check_biases, move
from .gptq_settings import BITS, Declared, check_settings, recognizes, stems_of

__all__ = ["GptqWeight", "check_settings", "recognizes", "stored_weights"]


@dataclass(frozen=True)
class GptqWeight:
    """The stored tensors of one quantized module, and how to read them."""

    name: str  # of the parameter, "….weight"
    qweight: StoredTensor
    scales: StoredTensor
    qzeros: StoredTensor | None  # None: symmetric
    g_idx: StoredTensor | None  # None: groups are neighbours
    bits: int  # of the stored codes
    columns: int
    source_group: int  # columns of each group but the last, which may be shorter
    planar: bool  # see gptq_words
    zeros_less_one: bool  # as the label says
    symmetric: bool | None  # None: not said of this module alone
    by_gptqmodel: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight, ``[N, K]``."""
        return self.qweight.shape[1], self.columns

    @property
    def group_size(self) -> int:
        """Of the packed tensor: the largest that divides the stored groups and the row."""
        return _group_size(self.source_group, self.columns) or self.source_group

    @property
    def format(self) -> tuple[int, int]:
        """Bits and group size of the packed tensor that is read."""
        return gptq_words.stored_bits(self.bits), self.group_size

    @property
    def place(self) -> tuple[str, int]:
        return self.qweight.place

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        parts = self.qweight, self.scales, self.qzeros, self.g_idx
        return tuple(part for part in parts if part is not None)

    @property
    def note(self) -> str | None:
        """What the report of a load says about this weight, if anything."""
        if self.bits == 7:
            return "7-bit GPTQ: kept exactly, in 8 bits"
        if self.scales.dtype == torch.float32 and not self.symmetric:
            return "GPTQ with float32 scales: biases rounded to float32"
        return None

    def read(self, dtype: torch.dtype, device: torch.device) -> AffineQuantizedTensor:
        """Read it, as a tensor that counts as `dtype`.

        The codes are those of the file. Scales keep their values and, where the zeros
        are symmetric, their dtype; else scales and biases are float32, which holds
        ``-scale * zero`` exactly. Raises CheckpointError where groups or zeros are not
        what the settings say.
        """
        order = self._order()
        packed = gptq_words.repack(
            self.qweight.read().view(torch.int32),
            order,
            bits=self.bits,
            planar=self.planar,
        )
        scales, biases = self._scales_and_biases()
        bits, group_size = self.format
        return AffineQuantizedTensor.from_packed(
            move(packed, device),
            move(scales, device),
            move(biases, device),
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            permutation=None if order is None else move(order.int(), device),
        )

    def _order(self) -> Tensor | None:
        """The input column of each stored one, int64 ``[K]``, sorted by group; None if
        they are sorted already. What the settings say of act-order does not count: files
        with ``desc_act`` may have sorted columns, others without may not."""
        if self.g_idx is None:
            return None
        groups = self.scales.shape[0]
        g_idx = self.g_idx.read().long()
        regular = torch.arange(self.columns) // self.source_group
        if torch.equal(g_idx, regular):
            return None
        low, high = (int(v) for v in g_idx.aminmax())
        if low < 0 or high >= groups:
            raise CheckpointError(
                f"{self.g_idx.name} has groups {low} to {high}; the module has 0 to "
                f"{groups - 1}. Quantize the model again"
            )
        seen, needed = (torch.bincount(g, minlength=groups) for g in (g_idx, regular))
        if not torch.equal(seen, needed):
            group = int((seen != needed).nonzero()[0])
            raise CheckpointError(
                f"{self.g_idx.name} gives group {group} {int(seen[group])} columns; "
                f"{int(needed[group])} are needed (ragged act-order groups cannot be "
                f"packed). Quantize the model again, with desc_act false"
            )
        return torch.argsort(g_idx, stable=True)

    def _scales_and_biases(self) -> tuple[Tensor, Tensor]:
        """Both ``[N, K / group_size]``, of one dtype."""
        scales = self.scales.read().t()  # [N, G]
        zeros = self._zeros()
        biases = scales.float() * -zeros
        check_biases(self.scales, scales, biases)
        if isinstance(zeros, int):
            # Exact, since the zero is a power of two, unless it overflows.
            narrow = biases.to(scales.dtype)
            if torch.equal(narrow.float(), biases):
                biases = narrow
        scales = scales.to(biases.dtype)
        if self.group_size != self.source_group:
            starts = torch.arange(0, self.columns, self.group_size)
            group = starts // self.source_group
            scales, biases = (p.index_select(1, group) for p in (scales, biases))
        return scales.contiguous(), biases.contiguous()

    def _zeros(self) -> Tensor | int:
        """The zeros, uint8-valued float32 ``[N, G]``, or the one that all of them are.

        Of a symmetric module the data say how they are stored: files are in use that
        have the zeros of v2 under the label of v1.
        """
        middle = 1 << (self.bits - 1)
        if self.qzeros is None:
            return middle
        words = self.qzeros.read().view(torch.int32)  # [G, N * bits / 32]
        stored = self._fields(words)
        if self.symmetric is not False:
            low, high = (int(v) for v in stored.aminmax())
            if low == high and low in (middle - 1, middle):
                return middle
            if self.symmetric:
                raise CheckpointError(
                    f"{self.qzeros.name} holds {low} to {high} though the settings say "
                    f"sym is true; allowed is {middle - 1} everywhere (v1) or {middle} "
                    '(v2). If the model is asymmetric, set "sym": false in config.json'
                )
        if not self.zeros_less_one:
            return stored.float()
        largest = (1 << self.bits) - 1
        if not self.by_gptqmodel and int(stored.max()) == largest:
            log_once(
                f"zeros of 0 in {self.qzeros.file.parent}",
                "%s: a zero of 0 in v1 format (checkpoint_format gptq, sym false) that "
                "GPTQModel did not write. AutoGPTQ spoilt the zeros beside it. If the "
                "model answers badly, quantize it again as gptq_v2",
                self.qzeros.name,
            )
        if self.bits in (2, 4, 8) and not self.planar:
            # GPTQModel subtracts from whole words, where a zero of 0 borrows from its
            # neighbour; so they are added to as a whole.
            ones = 0xFFFFFFFF // largest
            return self._fields(words + ones).float()
        return ((stored + 1) & largest).float()

    def _fields(self, words: Tensor) -> Tensor:
        """The fields of words along N, int32 ``[G, W]``: uint8 ``[N, G]``."""
        whole = gptq_words.block_words(self.bits, self.planar)
        rows = words.t().contiguous()
        short = -len(rows) % whole
        if short:  # the last block is not full
            rows = torch.cat([rows, rows.new_zeros(short, rows.shape[1])])
        fields = gptq_words.unpack(rows, bits=self.bits, planar=self.planar)
        return fields[: self.qweight.shape[1]]


def _group_size(group: int, columns: int) -> int | None:
    """The largest group size of the layout that divides both."""
    common = math.gcd(group, columns)
    return max((g for g in layout.GROUP_SIZES if common % g == 0), default=None)


# ---- the weights -----------------------------------------------------------------


def stored_weights(
    checkpoint: Checkpoint,
) -> tuple[dict[str, GptqWeight], dict[str, str], set[str]]:
    """The packed weights of a checkpoint, by parameter name.

    Returns them, what is wrong with those that are broken, and the names of all tensors
    that belong to either. A ``bias`` belongs to the module, not to its weight.
    """
    weights: dict[str, GptqWeight] = {}
    broken: dict[str, str] = {}
    parts: set[str] = set()
    declared = Declared(checkpoint)
    for stem in stems_of(checkpoint):
        found = _weight(checkpoint, stem, declared)
        parts |= {stem + part for part in ("qweight", "qzeros", "scales", "g_idx")}
        if isinstance(found, str):
            broken[f"{stem}weight"] = found
        else:
            weights[f"{stem}weight"] = found
    return weights, broken, parts & checkpoint.tensors.keys()


def _weight(checkpoint: Checkpoint, stem: str, declared: Declared) -> GptqWeight | str:
    """One packed weight as its shapes say, or what is wrong with it."""
    tensors = checkpoint.tensors
    words, scales = tensors[f"{stem}qweight"], tensors.get(f"{stem}scales")
    zeros, g_idx = tensors.get(f"{stem}qzeros"), tensors.get(f"{stem}g_idx")
    if scales is None:
        return f"{stem}scales is missing. Fetch the checkpoint again"
    if f"{stem}weight" in tensors:
        return (
            f"there are both {words.name} and {stem}weight; remove the one that does not "
            "belong to the checkpoint"
        )
    if zeros is None and declared.symmetric is not True:
        return (
            f"{stem}qzeros is missing, and {declared.where} does not say that sym is "
            "true for all modules. Fetch the checkpoint again"
        )
    whole = (torch.int32, torch.uint32)
    for part, dtypes, dimensions in (
        (words, whole, 2),
        (scales, layout.WEIGHT_DTYPES, 2),
        (zeros, whole, 2),
        (g_idx, (torch.int32, torch.int64), 1),
    ):
        if part is None:
            continue
        if part.dtype not in dtypes:
            return (
                f"{part.name} is {layout.name_of(part.dtype)}; allowed are "
                f"{layout.join(dtypes)}. Quantize the model again"
            )
        if len(part.shape) != dimensions or not all(part.shape):
            return (
                f"{part.name} has shape {list(part.shape)}; {dimensions} dimensions are "
                "needed, none of them 0. Quantize the model again"
            )
    rows, n = words.shape
    groups = scales.shape[0]
    if scales.shape[1] != n or (zeros and zeros.shape[0] != groups):
        seen = "".join(f", {p.name} {list(p.shape)}" for p in (scales, zeros) if p)
        return (
            f"{words.name} {list(words.shape)}{seen} do not have the same rows and "
            "groups. Fetch the checkpoint again"
        )
    fits = [
        b
        for b in BITS
        if rows * 32 % b == 0
        and (g_idx is None or g_idx.shape[0] * b == rows * 32)
        and (zeros is None or zeros.shape[1] == -(-n * b // 32))
    ]
    bits = next((b for b in declared.bits if b in fits), None)
    if bits is None:
        others = "".join(f", {p.name} {list(p.shape)}" for p in (zeros, g_idx) if p)
        seen = layout.join(fits, " or ") or "no number of"
        named = layout.join(declared.bits) or "none"
        return (
            f"{words.name} {list(words.shape)}{others} means {seen} bits, of which "
            f"{declared.where} (quant_method {declared.method!r}) names none: bits is "
            f"{named}. Correct the one that is wrong"
        )
    columns = rows * 32 // bits
    planar = declared.label == "gptq_p" and not declared.auto_round
    if bits in (5, 6, 7) and not planar and not declared.auto_round:
        return (
            f"{words.name} is {bits} bits wide; with checkpoint_format "
            f"{declared.label!r} allowed are 2, 3, 4 and 8. If GPTQModel wrote it, set "
            '"checkpoint_format" and "format" to "gptq_p" in config.json'
        )
    if planar and bits in (3, 5, 6, 7) and (columns % 32 or n % 32):
        return (
            f"{words.name} has {columns} columns and {n} rows; gptq_p packs multiples of "
            "32. Quantize the model again"
        )
    group = declared.group(columns, groups)
    if group is None:
        return (
            f"{scales.name} has {groups} groups for {columns} columns, which "
            f"{declared.where} (quant_method {declared.method!r}) does not name "
            f"(group_size {layout.join(declared.groups) or 'none'}). Correct the one "
            "that is wrong"
        )
    if _group_size(group, columns) is None:
        return (
            f"{scales.name} has groups of {group} for {columns} columns; both must be "
            f"multiples of {layout.GROUP_SIZES[0]}. Leave this module dense, or quantize "
            "with group_size 128"
        )
    return GptqWeight(
        name=f"{stem}weight",
        qweight=words,
        scales=scales,
        qzeros=zeros,
        g_idx=g_idx,
        bits=bits,
        columns=columns,
        source_group=group,
        planar=planar,
        zeros_less_one=declared.less_one,
        symmetric=declared.symmetric,
        by_gptqmodel=declared.by_gptqmodel,
    )
