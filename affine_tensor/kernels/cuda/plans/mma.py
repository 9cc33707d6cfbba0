"""Plans of `mma`: tensor cores on 16-bit floats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from .base import (
    LONG,
    NARROW,
    WORD,
    Plan,
    Product,
    Sizes,
    blocks_of,
    defines_of,
    format_of,
    needs_sums,
    overlaps,
    up,
)

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
# W not so wide that tiles of wide ones give all multiprocessors work: those of
# 64 rows do, for up to 16 rows of x.
_MEDIUM: Sizes = {"mt": 2, "wn": 2, "wk": 2, "ks": 512, "stages": 2, "blocks": 2}
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
        wanted = narrow if product.n <= NARROW else wide
        if product.n <= NARROW and product.k > LONG:
            wanted = {**wanted, **_MMA_LONG.get(most, {})}
        if nt <= 2 and _is_medium(product):
            few = up(product.n, 64) < 0.9 * product.multiprocessors
            wanted = {**_MEDIUM, "ck": 4 if few else 2}
        if product.bits > 4 and wanted["ks"] == 512:
            wanted = {**wanted, "ks": 256}
        # What else does not fit into registers.
        if nt > 4 and wanted["mt"] > 2 and product.bits not in (4, 8):
            wanted = {**wanted, "mt": 2, "wn": 4}
        if nt > 2 and needs_sums(product):
            wanted = {**wanted, "mt": 1, "wn": 4, "wk": 2, "blocks": 1}
    # Codes multiplied as they are cost nothing for few rows, and are exact.
    sums = int(needs_sums(product) or (nt <= 2 and product.group_size >= 64))
    if product.invariant:
        sums = int(needs_sums(product))
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


def _is_medium(product: Product) -> bool:
    """Whether W is wide, but for few rows of x not wide enough.

    Wider codes and smaller groups take more work, which more blocks are to share.
    """
    most = 2 * product.multiprocessors
    if product.bits <= 4 and product.group_size >= 64:
        most = most * 4 // 5
    return product.grouping == 0 and NARROW < product.n <= 64 * most


def token_tiles(product: Product) -> int:
    """Tokens of a block, divided by 8."""
    rows = product.m
    if product.grouping == 2:
        rows = up(rows, max(1, product.experts))
    tiles = up(up(rows, 8), up(rows, 64))
    return next(nt for nt in _TOKEN_TILES if nt >= tiles)


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
    scales = 2 * max(1, ks // product.group_size) * (rows + 4) * pair * WORD
    return max(stages * stage + scales, wk * tokens * (rows + 1) * WORD)


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
    ck = min(ck, up(product.k, ks))
    shared = mma_shared(product, nt=nt, mt=mt, wn=wn, wk=wk, ks=ks, stages=stages)
    if shared > product.shared or ks % (64 * wk):
        return None
    early = (overlaps(product) and ck == 1) if pdl is None else pdl
    tiles = blocks_of(product, 8 * nt)
    if tiles > 65535:
        return None
    defines = {
        **format_of(product),
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
        "PDL": early,
        "TRIGGER": trigger,
    }
    return Plan(
        "mma.cu",
        "affine_mma",
        defines_of(defines),
        (up(product.n, 16 * mt * wn), ck, tiles),
        (32 * wn * wk, 1, 1),
        shared,
        (1, ck, 1),
        early,
    )
