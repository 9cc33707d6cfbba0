"""From a product's sizes to a kernel, its definitions and its grid.

Nothing here touches a device. Families: `gemv` (one to four rows of x at a time, any
dtype), `mma` (tensor cores on 16-bit floats) and `wgmma` (Hopper's, for tens to hundreds
of rows). Where there is no plan, the weight is to be dequantized and multiplied by cuBLAS.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

Size = tuple[int, int, int]
Sizes = dict[str, Any]  # integers, by name

# As shaders/cuda/machine.cuh numbers them.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Rows of x up to which the words are multiplied, rather than a dense weight.
MOST_ROWS = 128
MOST_WGMMA_ROWS = 256
_MOST_EXACT_ROWS = 1024  # where dense weights would lose too much
_MOST_FLOAT32_ROWS = 16
_WORD = 4  # bytes
_NARROW = 4096  # rows of W
_LONG = 8192  # columns


@dataclass(frozen=True)
class Product:
    """A product as kernels see it: x ``[M, K]``, W ``[N, K]``, y ``[M, N]``.

    `experts` is 0 for one matrix. Otherwise `grouping` says how rows find their expert:
    1 by an index each, 2 by ends of sorted rows. Alignments, as `alignment` finds them:
    the power of two, up to 16, that each row's address is a multiple of, in bytes (of
    scales and biases the smaller one). `invariant`: a row's result must not depend on M.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    biased: bool = False
    experts: int = 0
    grouping: int = 0
    x_alignment: int = 16
    packed_alignment: int = 16
    scale_alignment: int = 16
    invariant: bool = False
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    shared: int = 232448  # bytes that a block may have

    @property
    def aligned(self) -> bool:
        """Whether 16 bytes of packed words can be loaded at once."""
        row = self.k * self.bits // 8
        return alignment(self.packed_alignment, row) == 16

    @property
    def x_aligned(self) -> bool:
        row = self.k * self.dtype.itemsize
        return alignment(self.x_alignment, row) == 16

    @property
    def scale_bytes(self) -> int:
        row = self.k // self.group_size * self.scale_dtype.itemsize
        return alignment(self.scale_alignment, row)


@dataclass(frozen=True)
class Ordered:
    """What `affine_order` of the same source makes of x before the product.

    tokens: M, filled up to whole tiles; size: of the result, in bytes.
    """

    tokens: int
    size: int
    grid: Size
    block: Size


@dataclass(frozen=True)
class Plan:
    """A kernel to compile (`entry` of `source`, with `defines`) and how to launch it.

    shared: dynamic shared memory, in bytes. pdl: the launch may overlap the kernel before
    it in the stream (programmatic stream serialization). ordered: the product reads x in
    the order that another kernel puts it into.
    """

    source: str
    entry: str
    defines: tuple[tuple[str, int], ...]
    grid: Size
    block: Size
    shared: int
    cluster: Size = (1, 1, 1)
    pdl: bool = False
    ordered: Ordered | None = None


def alignment(*bytes_: int) -> int:
    """The power of two, up to 16, that addresses and strides in bytes are multiples of."""
    together = 16
    for number in bytes_:
        together |= number
    return together & -together


def choose(product: Product) -> Plan | None:
    """The kernel for a product, or None: dequantize, then cuBLAS."""
    if product.capability < (8, 0) or product.dtype not in TYPES:
        return None
    if 0 in (product.m, product.n, product.k):
        return None
    plan = None
    if _takes_gemv(product):
        plan = next(gemv_plans(product), None)
    elif _takes_wgmma(product):
        plan = next(wgmma_plans(product), None)
    # Inputs of very many columns do not fit into the shared memory that gemv has.
    most = _MOST_EXACT_ROWS if _needs_sums(product) else MOST_ROWS
    few = product.m <= most or product.grouping == 2 or product.invariant
    if plan is None and _sixteen(product) and few and product.grouping != 1:
        plan = next(mma_plans(product), None)
    return plan


def _sixteen(product: Product) -> bool:
    return product.dtype in (torch.float16, torch.bfloat16)


def _takes_gemv(product: Product) -> bool:
    if product.grouping == 1:
        return True
    if product.grouping == 2:
        return False
    if product.dtype == torch.float32:
        return product.m <= _MOST_FLOAT32_ROWS or product.invariant
    if product.invariant:  # tiles of tokens all add up in the same order
        return False
    return product.m == 1


def _takes_wgmma(product: Product) -> bool:
    if product.capability != (9, 0) or product.grouping or product.invariant:
        return False
    if not (_sixteen(product) and product.aligned) or _needs_sums(product):
        return False
    # Of few rows mma is as fast where W is small.
    small = product.n <= _NARROW and product.k <= _LONG
    return (32 if small else 16) < product.m <= MOST_WGMMA_ROWS


def _up(value: int, unit: int) -> int:
    return -(-value // unit)


# ---- gemv -----------------------------------------------------------------------

# In a chunk, where a block has many tiles; each lane then loads 64 words ahead at most.
_GEMV_UNITS = {1: 8, 2: 8, 3: 8, 4: 8, 5: 4, 6: 4, 8: 4}


def gemv_plans(product: Product) -> Iterator[Plan]:
    """Plans of the family `gemv` that fit, the one to take first."""
    for sizes in _gemv_sizes(product):
        plan = gemv_plan(product, **sizes)
        if plan is not None and plan.shared * sizes["blocks"] <= product.shared:
            yield plan


def _gemv_sizes(product: Product) -> Iterator[Sizes]:
    """As was fastest on an H200, with 4 bits and groups of 64."""
    tiles = _up(product.n, 16) * (1 if product.invariant else product.m)
    busy = tiles / product.multiprocessors
    units = _GEMV_UNITS[product.bits]
    if busy > 16:
        units, about, blocks = units // 2, 4, 4
    elif busy > 4:
        about, blocks = 4, 2
    elif product.k > _LONG:
        units, about, blocks = 2, 10, 2
    else:
        units, about, blocks = (1, 16, 2) if busy >= 1 else (2, 16, 1)
    while units > 1 and product.k < 512 * units:
        units //= 2
    if product.group_size == 16 or product.scale_dtype == torch.float32:
        units = min(units, 2)  # scales on their way take registers as well
    warps = _gemv_warps(_up(product.k, 128 * units), about)
    tokens = 1
    if product.grouping == 0:
        tokens = 1 if product.m == 1 else 2 if product.m == 2 else 4
    own = {"units": units, "warps": warps, "trigger": 0}
    # With fewer tokens the inputs of more columns fit.
    while tokens:
        for less in range(max(blocks, 8 // warps), 0, -1):
            yield {**own, "blocks": less, "tokens": tokens}
        tokens //= 2


def _gemv_warps(chunks: int, about: int) -> int:
    """How many share the chunks of K, so that few wait for others."""
    if chunks <= about:
        return chunks
    choices = range(about * 3 // 4, min(16, about * 3 // 2) + 1)
    wasted = {warps: _up(chunks, warps) * warps / chunks for warps in choices}
    return min(wasted, key=lambda warps: (wasted[warps] > 1.1, abs(warps - about)))


def gemv_shared(product: Product, units: int, warps: int, tokens: int) -> int:
    """Bytes of shared memory of a block."""
    all_units = _up(product.k, 128 * units) * units
    sets = 64 // min(64, product.group_size)
    groups = max(1, 128 * units // product.group_size)
    pair = 2 if product.scale_dtype == torch.float32 else 1
    words = warps * groups * 20 * pair + 2 * warps * tokens * 16 + 128
    return _WORD * (words + tokens * all_units * (sets * 8 + 128))


def gemv_plan(
    product: Product,
    *,
    units: int,
    warps: int,
    blocks: int,
    tokens: int,
    pdl: bool | None = None,
    trigger: int = 1,
) -> Plan | None:
    """The plan with these sizes, or None if it does not fit."""
    shared = gemv_shared(product, units, warps, tokens)
    if shared > product.shared or (tokens > 1 and product.grouping):
        return None
    overlaps = _overlaps(product) if pdl is None else pdl
    tiles, rows = _up(product.n, 16), _up(product.m, tokens)
    if rows > 65535:
        return None
    wide = max(1, _up(product.multiprocessors * blocks, rows))
    defines = {
        **_format(product),
        "TOKENS": tokens,
        "UNITS": units,
        "WARPS": warps,
        "BLOCKS": blocks,
        "ALIGNED": product.aligned,
        "SCALE_BYTES": product.scale_bytes,
        "TAIL": product.k % (128 * units) != 0,
        "GROUPED": product.grouping == 1,
        "PDL": overlaps,
        "TRIGGER": trigger,
    }
    return Plan(
        "gemv.cu",
        "affine_gemv",
        _defines(defines),
        (min(tiles, wide), rows, 1),
        (32 * warps, 1, 1),
        shared,
        pdl=overlaps,
    )


# ---- mma ------------------------------------------------------------------------

# By rows of x up to a limit: sizes for narrow W (N <= 4096), then for wide ones. Fastest on
# an H200, with 4 bits and groups of 64 (from 32 rows on: those of prototypes).
_MMA: dict[int, tuple[Sizes, Sizes]] = {
    4: (
        {"mt": 2, "wn": 1, "wk": 4, "ck": 2, "ks": 512, "stages": 2, "blocks": 2},
        {"mt": 2, "wn": 4, "wk": 2, "ck": 1, "ks": 512, "stages": 2, "blocks": 2},
    ),
    8: (
        {"mt": 2, "wn": 2, "wk": 4, "ck": 2, "ks": 512, "stages": 3, "blocks": 2},
        {"mt": 2, "wn": 4, "wk": 2, "ck": 1, "ks": 512, "stages": 2, "blocks": 2},
    ),
    16: (
        {"mt": 2, "wn": 2, "wk": 4, "ck": 2, "ks": 256, "stages": 2, "blocks": 2},
        {"mt": 4, "wn": 2, "wk": 2, "ck": 2, "ks": 256, "stages": 2, "blocks": 2},
    ),
    32: (
        {"mt": 2, "wn": 2, "wk": 4, "ck": 2, "ks": 256, "stages": 3, "blocks": 1},
        {"mt": 4, "wn": 2, "wk": 2, "ck": 1, "ks": 256, "stages": 3, "blocks": 2},
    ),
    64: (
        {"mt": 2, "wn": 2, "wk": 4, "ck": 2, "ks": 256, "stages": 3, "blocks": 1},
        {"mt": 4, "wn": 2, "wk": 2, "ck": 1, "ks": 256, "stages": 3, "blocks": 1},
    ),
}
# What narrow W of very many columns have otherwise.
_MMA_LONG: dict[int, Sizes] = {16: {"stages": 4, "blocks": 1}}
_TOKEN_TILES = (1, 2, 3, 4, 6, 8)  # that there are kernels for
# The same for all M: one order of sums.
_INVARIANT: Sizes = {
    "mt": 2,
    "wn": 2,
    "wk": 4,
    "ck": 1,
    "ks": 256,
    "stages": 3,
    "blocks": 1,
}


def mma_plans(product: Product) -> Iterator[Plan]:
    """Plans of the family `mma` that fit, the one to take first."""
    most = token_tiles(product)
    yield from _mma_plans(product, most)
    if product.invariant:  # sums do not depend on how many tokens a block has
        for nt in sorted((nt for nt in _TOKEN_TILES if nt < most), reverse=True):
            yield from _mma_plans(product, nt)


def _mma_plans(product: Product, nt: int) -> Iterator[Plan]:
    if product.invariant:
        wanted = _INVARIANT
    else:
        rows = product.m if nt == 1 and product.grouping == 0 else 8 * nt
        most = next(most for most in _MMA if rows <= most)
        narrow, wide = _MMA[most]
        wanted = narrow if product.n <= _NARROW else wide
        if product.n <= _NARROW and product.k > _LONG:
            wanted = {**wanted, **_MMA_LONG.get(most, {})}
        if product.bits > 4 and wanted["ks"] == 512:
            wanted = {**wanted, "ks": 256}
        # What else does not fit into registers.
        if nt > 4 and wanted["mt"] > 2 and product.bits not in (4, 8):
            wanted = {**wanted, "mt": 2, "wn": 4}
        if nt > 2 and _needs_sums(product):
            wanted = {**wanted, "mt": 1, "wn": 4, "wk": 2, "blocks": 1}
    # Codes multiplied as they are cost nothing for few rows, and are exact.
    sums = int(_needs_sums(product) or (nt <= 2 and product.group_size >= 64))
    if product.invariant:
        sums = int(_needs_sums(product))
    for blocks, ks, stages in itertools.product(
        range(wanted["blocks"], 0, -1),
        (wanted["ks"], wanted["ks"] // 2),
        range(wanted["stages"], 1, -1),
    ):
        if product.invariant and ks != wanted["ks"]:
            continue
        sizes = {**wanted, "blocks": blocks, "ks": ks, "stages": stages}
        plan = mma_plan(product, nt=nt, sums=sums, **sizes)
        if plan is not None and plan.shared * blocks <= product.shared:
            yield plan


def token_tiles(product: Product) -> int:
    """Tokens of a block, divided by 8."""
    rows = product.m
    if product.grouping == 2:
        rows = _up(rows, max(1, product.experts))
    tiles = _up(_up(rows, 8), _up(rows, 64))
    return next(nt for nt in _TOKEN_TILES if nt >= tiles)


def _needs_sums(product: Product) -> bool:
    """Whether codes are to be multiplied as they are, however many the tokens.

    float16 may have no room for weights whose scales have another dtype. And of one bit
    there are two weights in a group, whose roundings do not even out.
    """
    same = product.scale_dtype == product.dtype
    return product.bits == 1 or (product.dtype == torch.float16 and not same)


def mma_shared(
    product: Product,
    *,
    nt: int,
    mt: int,
    wn: int,
    wk: int,
    ks: int,
    stages: int,
) -> int:
    """Bytes of shared memory of a block."""
    rows, tokens = 16 * mt * wn, 8 * nt
    segment = ks * product.bits // 8
    past = {8: 64, 4: 32, 2: 16, 1: 16}.get(product.bits, 48)
    stage = rows * (segment + (past - segment) % 128) + tokens * (ks * 2 + 16)
    pair = 2 if product.scale_dtype == torch.float32 else 1
    scales = 2 * max(1, ks // product.group_size) * (rows + 4) * pair * _WORD
    return max(stages * stage + scales, wk * tokens * (rows + 1) * _WORD)


def mma_plan(
    product: Product,
    *,
    nt: int,
    mt: int,
    wn: int,
    wk: int,
    ck: int,
    ks: int,
    stages: int,
    blocks: int,
    sums: int,
    pdl: bool | None = None,
    trigger: int = 1,
) -> Plan | None:
    """The plan with these sizes, or None if it does not fit."""
    if product.capability < (9, 0):
        ck = 1
    ck = min(ck, _up(product.k, ks))
    shared = mma_shared(product, nt=nt, mt=mt, wn=wn, wk=wk, ks=ks, stages=stages)
    if shared > product.shared or ks % (64 * wk):
        return None
    overlaps = (_overlaps(product) and ck == 1) if pdl is None else pdl
    tiles = _up(product.m, 8 * nt)
    if product.grouping == 2:  # each expert begins one of its own, and so does the rest
        begun = min(product.experts + 1, product.m)
        tiles = (product.m + begun * (8 * nt - 1)) // (8 * nt)
    if tiles > 65535:
        return None
    defines = {
        **_format(product),
        "NT": nt,
        "MT": mt,
        "WN": wn,
        "WK": wk,
        "CK": ck,
        "KS": ks,
        "STAGES": stages,
        "SUMS": sums,
        "BLOCKS": blocks,
        "ALIGNED": product.aligned,
        "X_ALIGNED": product.x_aligned,
        "TAIL": product.k % ks != 0,
        "EDGE": product.n % (16 * mt * wn) != 0,
        "GROUPED": product.grouping,
        "PDL": overlaps,
        "TRIGGER": trigger,
    }
    return Plan(
        "mma.cu",
        "affine_mma",
        _defines(defines),
        (_up(product.n, 16 * mt * wn), ck, tiles),
        (32 * wn * wk, 1, 1),
        shared,
        (1, ck, 1),
        overlaps,
    )


# ---- wgmma ----------------------------------------------------------------------

# By rows of x up to a limit: sizes for wide W, for narrow ones, and for narrow ones of very
# many columns. Fastest on an H200, with 4 bits and groups of 64.
_WGMMA: dict[int, tuple[Sizes, Sizes, Sizes]] = {
    32: (
        {"tokens": 32, "warpgroups": 2, "turns": 2, "stages": 6, "depth": 3},
        {"tokens": 32, "warpgroups": 1, "turns": 2, "stages": 8, "depth": 4},
        {"tokens": 32, "warpgroups": 1, "turns": 4, "stages": 6, "depth": 3},
    ),
    64: (
        {"tokens": 64, "warpgroups": 2, "turns": 2, "stages": 5, "depth": 3},
        {"tokens": 64, "warpgroups": 1, "turns": 2, "stages": 7, "depth": 4},
        {"tokens": 64, "warpgroups": 1, "turns": 4, "stages": 7, "depth": 4},
    ),
    128: (
        {"tokens": 128, "warpgroups": 2, "turns": 1, "stages": 4, "depth": 4},
        {"tokens": 128, "warpgroups": 1, "turns": 2, "stages": 5, "depth": 3},
        {"tokens": 128, "warpgroups": 1, "turns": 2, "stages": 4, "depth": 4},
    ),
    256: (
        {"tokens": 256, "warpgroups": 2, "turns": 1, "stages": 3, "depth": 2},
        {"tokens": 128, "warpgroups": 1, "turns": 2, "stages": 4, "depth": 4},
        {"tokens": 128, "warpgroups": 2, "turns": 1, "stages": 4, "depth": 4},
    ),
}
_MOST_CLUSTER = 8  # blocks that every Hopper GPU can place together


def wgmma_plans(product: Product) -> Iterator[Plan]:
    """Plans of the family `wgmma` that fit, the one to take first."""
    wide, narrow, long = next(all for most, all in _WGMMA.items() if product.m <= most)
    few = long if product.k > _LONG else narrow
    wanted = wide if product.n > 2 * _NARROW else few
    split = 1
    tiles = _up(product.n, 64 * wanted["warpgroups"]) * _up(product.m, wanted["tokens"])
    stages = _up(product.k, 128)
    while 2 * split * tiles <= product.multiprocessors and split < _MOST_CLUSTER:
        if stages < 8 * split:
            break
        split *= 2
    for less in range(3):
        sizes = {**wanted, "stages": wanted["stages"] - less, "split": split}
        sizes["depth"] = max(2, wanted["depth"] - less)
        plan = wgmma_plan(product, **sizes)
        if plan is not None:
            yield plan


def wgmma_shared(
    product: Product, tokens: int, warpgroups: int, turns: int, stages: int, depth: int
) -> int:
    """Bytes of shared memory of a block."""
    rows, words = 64 * warpgroups, 16 * product.bits
    unit = 64 if product.bits == 8 else 32 if product.bits in (3, 4) else 16
    stride = (_up(words, unit) | 1) * unit
    staged = stages * 256 * tokens + depth * turns * rows * stride
    sums = turns * tokens * (rows + 4) * _WORD
    return max(staged, sums) + 16 * stages + 1024  # tiles begin at multiples of 1024


def wgmma_plan(
    product: Product,
    *,
    tokens: int,
    warpgroups: int,
    turns: int,
    stages: int,
    depth: int,
    split: int,
    pdl: bool | None = None,
) -> Plan | None:
    """The plan with these sizes, or None if it does not fit."""
    shared = wgmma_shared(product, tokens, warpgroups, turns, stages, depth)
    if shared > product.shared or stages <= turns:
        return None
    overlaps = (split == 1 and tokens <= 64) if pdl is None else pdl
    tiles = _up(product.m, tokens)
    defines = {
        **_format(product),
        "TOKENS": tokens,
        "WARPGROUPS": warpgroups,
        "TURNS": turns,
        "BLOCKS": 2,
        "STAGES": stages,
        "DEPTH": depth,
        "SPLIT": split,
        "PDL": overlaps,
    }
    multipliers = 128 * warpgroups * turns
    moves = (
        tokens >= 192 or multipliers == 512
    )  # registers, between groups of four warps
    all_tokens, columns = tiles * tokens, _up(product.k, 128) * 128
    ordered = Ordered(
        all_tokens,
        all_tokens * columns * 2,
        (_up(all_tokens * columns // 16, 256), 1, 1),
        (256, 1, 1),
    )
    return Plan(
        "wgmma.cu",
        "affine_wgmma",
        _defines(defines),
        (_up(product.n, 64 * warpgroups), split, tiles),
        (multipliers + (128 if moves else 32), 1, 1),
        shared,
        (1, split, 1),
        overlaps,
        ordered,
    )


# ---- what all need --------------------------------------------------------------


def _overlaps(product: Product) -> bool:
    return product.capability >= (9, 0)


def _format(product: Product) -> Sizes:
    return {
        "BITS": product.bits,
        "GROUP": product.group_size,
        "X": TYPES[product.dtype],
        "S": TYPES[product.scale_dtype],
    }


def _defines(values: Sizes) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(value)) for name, value in values.items())
