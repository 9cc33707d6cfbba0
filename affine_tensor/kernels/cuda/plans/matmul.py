"""Plans of `matmul`: x @ W, the gradient of x @ W.T, for few rows or sorted ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .base import (
    WORD,
    Plan,
    Product,
    Sizes,
    blocks_of,
    defines_of,
    format_of,
    up,
)

_COLUMNS = 128  # of W, of a block
_MOST_SPLIT = 8  # blocks of a cluster, which every Hopper GPU can place together

# By rows of x (of an expert) up to a limit.
_SIZES: dict[int, Sizes] = {
    16: {"nt": 2, "wt": 1, "wn": 4, "steps": 1, "stages": 4, "blocks": 3},
    32: {"nt": 4, "wt": 1, "wn": 4, "steps": 2, "stages": 3, "blocks": 2},
    64: {"nt": 4, "wt": 2, "wn": 4, "steps": 2, "stages": 3, "blocks": 1},
}
_FLOAT32: Sizes = {"nt": 4, "wt": 1, "wn": 8, "steps": 1, "stages": 1, "blocks": 2}


def matmul_plans(product: Product) -> Iterator[Plan]:
    """Plans of the family `matmul` that fit, the one to take first."""
    rows = product.m
    if product.grouping == 2:
        rows = up(rows, max(1, product.experts))
    wanted = _SIZES[next((most for most in _SIZES if rows <= most), 64)]
    if product.dtype == torch.float32:
        wanted = _FLOAT32
    for less in range(wanted["stages"]):
        sizes = {**wanted, "stages": wanted["stages"] - less}
        sizes["split"] = _split(product, rows, sizes)
        plan = matmul_plan(product, **sizes)
        if plan is not None and (sizes["stages"] > 1 or wanted["stages"] == 1):
            yield plan


def _split(product: Product, rows: int, sizes: Sizes) -> int:
    """Blocks that share N, so that there is work for all multiprocessors."""
    if product.capability < (9, 0) or product.invariant:
        return 1
    tokens = 8 * sizes["nt"] * (1 if product.dtype == torch.float32 else sizes["wt"])
    tiles = up(product.k, _COLUMNS) * up(rows, tokens) * max(1, product.experts)
    stages, split = up(product.n, 16 * sizes["wn"] * sizes["steps"]), 1
    room = product.multiprocessors * sizes["blocks"]
    while 2 * split * tiles <= room and split < _MOST_SPLIT and stages >= 6 * split:
        split *= 2
    return split


def matmul_shared(
    product: Product, nt: int, wt: int, wn: int, steps: int, stages: int
) -> tuple[int, int]:
    """Bytes of shared memory of a block, and its tokens."""
    rows = 16 * wn * steps
    if product.dtype == torch.float32:
        tokens = 8 * nt
        staged = rows * (_COLUMNS + tokens + 1) * WORD
    else:
        tokens = 8 * nt * wt
        token = rows * 2 + (32 - rows * 2) % 128
        stage = rows * (16 * product.bits + 16) + tokens * token
        pair = 2 if product.scale_dtype == torch.float32 else 1
        groups = max(1, _COLUMNS // product.group_size)
        staged = stages * stage + 2 * groups * (rows + 4) * pair * WORD
    return max(staged, tokens * (_COLUMNS + 4) * WORD), tokens


def matmul_plan(
    product: Product,
    *,
    nt: int,
    wt: int,
    wn: int,
    steps: int,
    stages: int,
    blocks: int,
    split: int,
) -> Plan | None:
    """The plan with these sizes, or None if it does not fit."""
    shared, tokens = matmul_shared(product, nt, wt, wn, steps, stages)
    if shared * blocks > product.shared:
        return None
    tiles = blocks_of(product, tokens)
    if tiles > 65535:
        return None
    defines = {
        **format_of(product),
        "NT": nt,
        "WT": wt,
        "WN": wn,
        "STEPS": steps,
        "SPLIT": split,
        "STAGES": stages,
        "BLOCKS": blocks,
        "ALIGNED": product.aligned,
        "X_ALIGNED": product.x_aligned,
        "GROUPED": product.grouping,
    }
    return Plan(
        "matmul.cu",
        "affine_matmul",
        defines_of(defines),
        (up(product.k, _COLUMNS), split, tiles),
        (32 * wn * wt, 1, 1),
        shared,
        (1, split, 1),
    )
