"""Plans of `gemv`: one to four rows of x at a time, of any dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .base import (
    LONG,
    WORD,
    Plan,
    Product,
    Sizes,
    defines_of,
    format_of,
    overlaps,
    up,
)

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
    tiles = up(product.n, 16) * (1 if product.invariant else product.m)
    busy = tiles / product.multiprocessors
    units = _GEMV_UNITS[product.bits]
    if busy > 16:
        units, about, blocks = units // 2, 4, 4
    elif busy > 4:
        about, blocks = 4, 2
    elif product.k > LONG:
        units, about, blocks = 2, 10, 2
    else:
        units, about, blocks = (1, 16, 2) if busy >= 1 else (2, 16, 1)
    while units > 1 and product.k < 512 * units:
        units //= 2
    if product.group_size == 16 or product.scale_dtype == torch.float32:
        units = min(units, 2)  # scales on their way take registers as well
    warps = _gemv_warps(up(product.k, 128 * units), about)
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
    wasted = {warps: up(chunks, warps) * warps / chunks for warps in choices}
    return min(wasted, key=lambda warps: (wasted[warps] > 1.1, abs(warps - about)))


def gemv_shared(product: Product, units: int, warps: int, tokens: int) -> int:
    """Bytes of shared memory of a block."""
    all_units = up(product.k, 128 * units) * units
    sets = 64 // min(64, product.group_size)
    groups = max(1, 128 * units // product.group_size)
    pair = 2 if product.scale_dtype == torch.float32 else 1
    words = warps * groups * 20 * pair + 2 * warps * tokens * 16 + 128
    return WORD * (words + tokens * all_units * (sets * 8 + 128))


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
    early = overlaps(product) if pdl is None else pdl
    tiles, rows = up(product.n, 16), up(product.m, tokens)
    if rows > 65535:
        return None
    wide = max(1, up(product.multiprocessors * blocks, rows))
    defines = {
        **format_of(product),
        "TOKENS": tokens,
        "UNITS": units,
        "WARPS": warps,
        "BLOCKS": blocks,
        "ALIGNED": product.aligned,
        "SCALE_BYTES": product.scale_bytes,
        "TAIL": product.k % (128 * units) != 0,
        "GROUPED": product.grouping == 1,
        "PDL": early,
        "TRIGGER": trigger,
    }
    return Plan(
        "gemv.cu",
        "affine_gemv",
        defines_of(defines),
        (min(tiles, wide), rows, 1),
        (32 * warps, 1, 1),
        shared,
        pdl=early,
    )
