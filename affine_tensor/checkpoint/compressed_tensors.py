"""compressed-tensors' pack-quantized weights (W4A16, W8A16, ...), as they are stored.

A module has, instead of its ``weight``:

* ``weight_packed``  int32 ``[N, K * bits / 32]``: the codes, signed number +
  2 ** (bits - 1), each row one stream as in `layout`: its words are taken over. Up to
  version 0.17 a word held 32 // bits whole codes and the rest of it nothing;
* ``weight_scale``  ``[N, groups]``, with one group a row in the strategy "channel";
* ``weight_zero_point``, if asymmetric: codes ``[N, groups]`` too, packed along N (before
  version 0.9.4 int8 and not packed), so that ``w = (code - zero) * scale``;
* ``weight_shape``  ``[2]``: N and K;
* ``weight_g_idx``  ``[K]``, if act-ordered: the group of each column, -1 for none.

Which modules have them, the names say; config.json names the bits and groups that their
shapes must have, in ``quantization_config.config_groups``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import layout
from ..tensor import AffineQuantizedTensor, log_once
from . import compressed_config
from .compressed_config import AGAIN, FORMAT, METHOD, WEIGHTS_ONLY, Scheme
from .files import Checkpoint, CheckpointError, StoredTensor, check_biases, move

_PARTS = ("packed", "scale", "zero_point", "shape", "g_idx")
_WORDS_32 = (torch.int32, torch.uint32)

# Elements worked on at a time: of a layer of 4096 columns a few hundred rows, which stay
# in the cache.
_SLICE = 1 << 20


@dataclass(frozen=True)
class CompressedWeight:
    """The stored tensors of one quantized module, and how they are to be read."""

    name: str  # of the parameter, "….weight"
    shape: tuple[int, int]  # of the dense weight, N and K
    bits: int  # of the stored codes
    padded: bool  # whether a word holds whole codes only
    group: int  # columns that share a scale; the last group of a row may be shorter
    packed: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None  # None: 2 ** (bits - 1)
    order: StoredTensor | None

    @property
    def format(self) -> tuple[int, int]:
        """Bits and group size of the packed tensor that is read."""
        bits = _held_bits(self.shape[1], self.bits)
        group_size = _held_group(self.shape[1], self.group)
        assert bits is not None  # else it was refused
        assert group_size is not None
        return bits, group_size

    @property
    def place(self) -> tuple[str, int]:
        return self.packed.place

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        every = (self.packed, self.scales, self.zeros, self.order)
        return tuple(part for part in every if part is not None)

    @property
    def note(self) -> str | None:
        """What the report of a load says about this weight, if anything."""
        if self.zeros is not None and self.scales.dtype == torch.float32:
            return "float32 scales with zero points: biases kept to 2**-24"
        return None

    def read(self, dtype: torch.dtype, device: torch.device) -> AffineQuantizedTensor:
        """Read it, as a tensor that counts as `dtype`.

        Raises CheckpointError if the columns of its groups are not as many as they
        should be.
        """
        bits, group_size = self.format
        columns = self.shape[1]
        order = self._permutation()
        words = self.packed.read().view(torch.int32)
        if self.padded or bits != self.bits or order is not None:
            cols = torch.arange(columns) if order is None else order
            words = _repack(words, cols, self.bits, bits, padded=self.padded)
        scales, biases = self._scales_and_biases()
        if group_size != self.group:
            groups = columns // group_size
            repeats = self.group // group_size
            scales, biases = (
                part.repeat_interleave(repeats, -1)[:, :groups].contiguous()
                for part in (scales, biases)
            )
        return AffineQuantizedTensor.from_packed(
            move(words, device),
            move(scales, device),
            move(biases, device),
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            permutation=None if order is None else move(order.int(), device),
        )

    def _permutation(self) -> Tensor | None:
        """The input channel of each column once they are sorted by group, int64 [K];
        None if they are already. It is the numbers that count, not the setting actorder:
        -1 is what compressed-tensors fills in where nothing was reordered."""
        if self.order is None:
            return None
        owners = self.order.read().long()
        if bool((owners == -1).all()):
            return None
        want = torch.arange(self.shape[1]).div_(self.group, rounding_mode="floor")
        if owners.equal(want):
            return None
        order = owners.argsort(stable=True)
        if not owners[order].equal(want):
            raise CheckpointError(self._ragged(owners))
        return order

    def _ragged(self, owners: Tensor) -> str:
        groups = self.scales.shape[1]
        stray = owners[(owners < 0) | (owners >= groups)]
        if len(stray):
            seen = f"names group {int(stray[0])}; groups are 0 to {groups - 1}"
        else:
            counts = owners.bincount(minlength=groups).tolist()
            full = [
                min(self.group, self.shape[1] - i * self.group) for i in range(groups)
            ]
            wrong = next(i for i in range(groups) if counts[i] != full[i])
            has, must = counts[wrong], full[wrong]
            seen = f"gives group {wrong} {has} columns; it must have {must}"
        assert self.order is not None
        return f"{self.order.name} {seen}. {AGAIN}, with actorder 'weight'"

    def _scales_and_biases(self) -> tuple[Tensor, Tensor]:
        """Both [N, groups], in the dtype of the file if it can hold the biases."""
        scales = self.scales.read()
        middle = 1 << (self.bits - 1)
        zeros = self._zeros()
        if zeros is None or bool((zeros == middle).all()):
            biases = scales * -middle  # exact: a power of two
            if bool((biases.isfinite() | scales.isfinite().logical_not()).all()):
                return scales, biases
            zeros = torch.full_like(scales, middle, dtype=torch.int32)
        scales = scales.float()
        biases = scales * -zeros.float()  # exact for 16-bit scales: 11 + 8 bits
        check_biases(self.scales, scales, biases)
        return scales, biases

    def _zeros(self) -> Tensor | None:
        """The zero points as codes, int32 [N, groups]."""
        if self.zeros is None:
            return None
        zeros = self.zeros.read()
        if zeros.dtype == torch.int8:
            return zeros.int().add_(1 << (self.bits - 1))
        rows = torch.arange(self.shape[0])
        return _Places(rows, self.bits, self.padded).codes(zeros.view(torch.int32))


# ---- the bits --------------------------------------------------------------------


def _held_bits(columns: int, bits: int) -> int | None:
    """The fewest bits that hold these codes in whole words: 8 for 7."""
    fits = (b for b in layout.BITS if b >= bits and columns * b % 32 == 0)
    return next(fits, None)


def _held_group(columns: int, group: int) -> int | None:
    """The largest group size that divides both, so that no scale covers too much."""
    fits = (g for g in reversed(layout.GROUP_SIZES) if not (columns % g or group % g))
    return next(fits, None)


def _width(count: int, bits: int, *, padded: bool) -> int:
    """Words that hold so many codes."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


class _Places:
    """Where codes lie in words that run along dimension 0."""

    def __init__(self, index: Tensor, bits: int, padded: bool) -> None:
        """`index`: of the codes, int64 [n]."""
        if padded:
            start = index % (32 // bits) * bits
            self.word = index // (32 // bits)
        else:
            start = index * bits % 32
            self.word = index * bits // 32
        self.shift = start.int().unsqueeze(1)
        # Shifts of int32 drag the sign along: it is masked off, and of a code that goes
        # on in the next word, so are the bits that come from there.
        self.here = ((1 << (32 - start).clamp(max=bits)) - 1).int().unsqueeze(1)
        self.cut = (start + bits > 32).nonzero().flatten()
        self.rest = 32 - self.shift[self.cut]
        self.mask = (1 << bits) - 1

    def codes(self, words: Tensor) -> Tensor:
        """int32 [W, m] to codes int32 [n, m]."""
        codes = words.index_select(0, self.word).bitwise_right_shift_(self.shift)
        if not len(self.cut):
            return codes.bitwise_and_(self.mask)
        high = words.index_select(0, self.word[self.cut] + 1)
        high.bitwise_left_shift_(self.rest).bitwise_and_(self.mask)
        codes.bitwise_and_(self.here)[self.cut] |= high
        return codes


def _repack(
    words: Tensor, order: Tensor, stored: int, bits: int, *, padded: bool
) -> Tensor:
    """Codes of `stored` bits as the stream of `bits` that `layout` has, the columns in
    this order: int32 [N, W] to int32 [N, K * bits / 32].

    Worked on transposed: then a column's words are neighbours, and to gather columns is
    to copy rows. The codes at one place of a period (32 codes or fewer, which fill whole
    words) are taken out together and put in together.
    """
    period = 32 // math.gcd(32, bits)
    places = [_Places(order[i::period], stored, padded) for i in range(period)]
    output = words.new_empty(len(words), len(order) * bits // 32)
    step = max(1, _SLICE // len(order))
    for start in range(0, len(words), step):
        part = words[start : start + step].t().contiguous()  # [W, n]
        new = part.new_zeros(len(order) // period, period * bits // 32, part.shape[1])
        for i, place in enumerate(places):
            word, shift = divmod(i * bits, 32)
            codes = place.codes(part)  # [K / period, n]
            if shift + bits > 32:
                new[:, word + 1] |= codes >> (32 - shift)
            new[:, word] |= codes.bitwise_left_shift_(shift)
        output[start : start + step] = new.flatten(0, 1).t()
    return output


# ---- the tensors -----------------------------------------------------------------


def _stems(checkpoint: Checkpoint, part: str = "packed") -> list[str]:
    """What stands before "weight_packed", or before another part."""
    end = f"weight_{part}"
    names = (n for n in checkpoint.tensors if n == end or n.endswith(f".{end}"))
    return [name.removesuffix(end) for name in names]


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says that it is one of compressed-tensors, or has its tensors
    and says nothing."""
    if compressed_config.settings(checkpoint.config):
        return True
    others = ("quantization", "quantization_config", "compression_config")
    silent = not any(checkpoint.config.get(key) for key in others)
    return silent and bool(_stems(checkpoint))


def check_settings(checkpoint: Checkpoint) -> list[str]:
    """Why a checkpoint cannot be loaded as a whole, if there are reasons."""
    found = compressed_config.settings(checkpoint.config)
    names = [f"{stem}weight_packed" for stem in _stems(checkpoint)]
    return compressed_config.check(found, names)


def stored_weights(
    checkpoint: Checkpoint,
) -> tuple[dict[str, CompressedWeight], dict[str, str], set[str]]:
    """The packed weights of a checkpoint, by parameter name.

    Returns the weights, what is wrong with those that are broken, and the names of all
    tensors that belong to either. Of the data only the shapes are read.
    """
    weights: dict[str, CompressedWeight] = {}
    broken: dict[str, str] = {}
    parts: set[str] = set()
    settings = compressed_config.settings(checkpoint.config)
    schemes = compressed_config.schemes(settings)
    old = compressed_config.is_old(settings)
    families = _families(checkpoint)
    for stem in sorted(families):
        name = f"{stem}weight"
        own = families[stem]
        parts |= {part.name for part in own.values()}
        found = _weight(stem, own, checkpoint.tensors.get(name), schemes, old)
        if isinstance(found, str):
            broken[name] = found
        else:
            weights[name] = found
    if settings.get("kv_cache_scheme"):
        # It only saves memory: keys and values stay as they are computed.
        log_once(
            f"kv_cache_scheme of {checkpoint.folder}",
            "The kv_cache_scheme of %s is not followed: keys and values are not quantized",
            checkpoint.folder,
        )
        parts |= set(filter(_OF_CACHE.search, checkpoint.tensors))
    return weights, broken, parts


_OF_CACHE = re.compile(r"\.([kv]|[kv]_proj\.output)_(scale|zero_point)$")


def _families(checkpoint: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    """The tensors ``weight_…`` of each module that has any of compressed-tensors'."""
    stems = {stem for part in _PARTS for stem in _stems(checkpoint, part)}
    families: dict[str, dict[str, StoredTensor]] = {stem: {} for stem in stems}
    for name, tensor in checkpoint.tensors.items():
        lead, middle, part = name.rpartition("weight_")
        if middle and lead in families:
            families[lead][part] = tensor
    return families


def _weight(
    stem: str,
    own: dict[str, StoredTensor],
    plain: StoredTensor | None,
    schemes: set[Scheme],
    old: bool | None,
) -> CompressedWeight | str:
    """One packed weight, or what is wrong with it. `plain` is its ``weight``, if that is
    there too; `old` says which layout the version of the file has, if it has one."""
    name = f"{stem}weight"
    packed, scales, shape = (own.get(part) for part in ("packed", "scale", "shape"))
    zeros, order = own.get("zero_point"), own.get("g_idx")
    strange = sorted(own.keys() - set(_PARTS))
    if strange:
        return (
            f"{name}_{strange[0]} is there, which {FORMAT} does not have: it is of "
            f"another format. {WEIGHTS_ONLY}"
        )
    if plain is not None:
        seen = layout.name_of(plain.dtype)
        return (
            f"{name} is {seen} and has {name}_{sorted(own)[0]}; {FORMAT} has "
            f"{name}_packed instead. {WEIGHTS_ONLY}, and save it with "
            "save_compressed=True"
        )
    if packed is None or scales is None or shape is None:
        absent = next(p for p in ("packed", "scale", "shape") if p not in own)
        return f"{name}_{absent} is missing. Fetch the checkpoint again"
    if packed.dtype not in _WORDS_32:
        seen = layout.name_of(packed.dtype)
        return f"{packed.name} is {seen}; I32 is needed. {WEIGHTS_ONLY}"
    if scales.dtype not in layout.WEIGHT_DTYPES:
        seen = layout.name_of(scales.dtype)
        return f"{scales.name} is {seen}; allowed are F32, F16, BF16. {WEIGHTS_ONLY}"
    if shape.shape != (2,) or shape.dtype not in (torch.int64, torch.int32):
        seen = f"{layout.name_of(shape.dtype)} {list(shape.shape)}"
        return f"{shape.name} is {seen}; two I64 are needed. {AGAIN}"
    rows, columns = shape.read().tolist()
    both = (packed, scales)
    if columns < 1 or any(len(p.shape) != 2 or p.shape[0] != rows for p in both):
        return (
            f"{shape.name} says {[rows, columns]}, but {packed.name} is "
            f"{list(packed.shape)} and {scales.name} {list(scales.shape)}. {AGAIN}"
        )
    if order is not None and (
        order.shape != (columns,) or order.dtype not in (torch.int32, torch.int64)
    ):
        seen = f"{layout.name_of(order.dtype)} {list(order.shape)}"
        return f"{order.name} is {seen}; I32 {[columns]} is needed. {AGAIN}"
    fits: dict[tuple[int, bool, int], list[Scheme]] = {}
    for scheme, padded in _fitting(schemes, packed, scales, columns):
        group = columns if scheme.group == -1 else min(scheme.group, columns)
        if zeros is None or _fits_zeros(zeros, scales, scheme.bits, padded):
            fits.setdefault((scheme.bits, padded, group), []).append(scheme)
    if len(fits) > 1 and old is not None:
        # Where the width does not tell, the version does: all others have one layout.
        split = (3, 5, 6, 7)
        fits = {k: v for k, v in fits.items() if k[0] not in split or k[1] == old}
    if len(fits) != 1:
        return _misfit(own, schemes, [rows, columns], sorted(fits))
    ((bits, padded, group), named) = next(iter(fits.items()))
    if zeros is None and not any(scheme.symmetric for scheme in named):
        return (
            f"{name}_zero_point is missing; config.json says symmetric false for "
            f"{named[0]}. Fetch the checkpoint again"
        )
    if order is None and all(scheme.by_group for scheme in named):
        return (
            f"{name}_g_idx is missing; config.json says actorder 'group' for {named[0]}. "
            "Fetch the checkpoint again; if columns were never reordered, set actorder "
            "to null there"
        )
    if _held_bits(columns, bits) is None or _held_group(columns, group) is None:
        return (
            f"its {columns} columns in groups of {group} cannot be held: a group size of "
            f"{layout.join(layout.GROUP_SIZES, ' or ')} must divide both. Quantize it "
            "again with such a group_size, or ignore this module"
        )
    return CompressedWeight(
        name, (rows, columns), bits, padded, group, packed, scales, zeros, order
    )


def _fitting(
    schemes: set[Scheme],
    packed: StoredTensor,
    scales: StoredTensor,
    columns: int,
) -> Iterator[tuple[Scheme, bool]]:
    """The schemes that make these shapes, with whether words are padded."""
    for scheme in sorted(schemes):
        groups = 1 if scheme.group == -1 else -(-columns // scheme.group)
        if groups != scales.shape[1]:
            continue
        for padded in (False, True):
            even = 32 % scheme.bits == 0  # no word is padded then
            width = _width(columns, scheme.bits, padded=padded)
            if width == packed.shape[1] and not (padded and even):
                yield scheme, padded


def _fits_zeros(
    zeros: StoredTensor, scales: StoredTensor, bits: int, padded: bool
) -> bool:
    rows, groups = scales.shape
    if zeros.dtype == torch.int8:
        return zeros.shape == (rows, groups)
    width = _width(rows, bits, padded=padded)
    return zeros.dtype in _WORDS_32 and zeros.shape == (width, groups)


def _misfit(
    own: dict[str, StoredTensor],
    schemes: set[Scheme],
    shape: list[int],
    fits: list[tuple[int, bool, int]],
) -> str:
    """What keeps a weight from being one of those that config.json names."""
    seen = [f"weight_{k} is {list(v.shape)}" for k, v in own.items() if k != "shape"]
    names = ", or ".join(sorted({str(scheme) for scheme in schemes})) or "nothing"
    if fits:
        layouts = " or ".join(
            f"{bits} bits{', whole codes in each word' if padded else ''}, group {group}"
            for bits, padded, group in fits
        )
        return (
            f"its shape {shape} could be read in several ways: {layouts}. Write the "
            f"version of {METHOD} that wrote it into quantization_config.version in "
            "config.json, and only the config_groups that there are"
        )
    return (
        f"{', '.join(sorted(seen))} for a weight of {shape} (weight_shape), which "
        f"config.json does not explain: it names {names}. Take the config.json that "
        "belongs to these files"
    )
