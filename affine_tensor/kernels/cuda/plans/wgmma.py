"""Plans of `wgmma`: Hopper's tensor cores, for tens to hundreds of rows."""

from __future__ import annotations

from collections.abc import Iterator

from .base import (
    LONG,
    NARROW,
    WORD,
    Ordered,
    Plan,
    Product,
    Sizes,
    defines_of,
    format_of,
    up,
)

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
        {"tokens": 128, "warpgroups": 2, "turns": 1, "stages": 3, "depth": 2},
    ),
}
_MOST_CLUSTER = 8  # blocks that every Hopper GPU can place together


def wgmma_plans(product: Product) -> Iterator[Plan]:
    """Plans of the family `wgmma` that fit, the one to take first."""
    wide, narrow, long = next(all for most, all in _WGMMA.items() if product.m <= most)
    few = long if product.k > LONG else narrow
    wanted = wide if product.n > 2 * NARROW else few
    split = 1
    tiles = up(product.n, 64 * wanted["warpgroups"]) * up(product.m, wanted["tokens"])
    stages = up(product.k, 128)
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
    stride = (up(words, unit) | 1) * unit
    staged = stages * 256 * tokens + depth * turns * rows * stride
    sums = turns * tokens * (rows + 4) * WORD
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
    tiles = up(product.m, tokens)
    defines = {
        **format_of(product),
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
    all_tokens, columns = tiles * tokens, up(product.k, 128) * 128
    ordered = Ordered(
        all_tokens,
        all_tokens * columns * 2,
        (up(all_tokens * columns // 16, 256), 1, 1),
        (256, 1, 1),
    )
    return Plan(
        "wgmma.cu",
        "affine_wgmma",
        defines_of(defines),
        (up(product.n, 64 * warpgroups), split, tiles),
        (multipliers + (128 if moves else 32), 1, 1),
        shared,
        (1, split, 1),
        overlaps,
        ordered,
    )
