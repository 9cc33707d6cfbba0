"""From a product's sizes to a kernel, its definitions and its grid.

Nothing here touches a device. Families: `gemv` (one to four rows of x at a time, any
dtype), `mma` (tensor cores on 16-bit floats) and `wgmma` (Hopper's, for tens to hundreds
of rows); for x @ W `matmul`. Where there is no plan, the weight is to be dequantized and
multiplied by cuBLAS.
"""

from __future__ import annotations

import torch

from .base import (
    LONG,
    NARROW,
    TYPES,
    Ordered,
    Plan,
    Product,
    Size,
    Sizes,
    alignment,
    needs_sums,
    sixteen,
)
from .gemv import gemv_plan, gemv_plans, gemv_shared
from .matmul import matmul_plan, matmul_plans
from .mma import mma_plan, mma_plans, mma_shared, token_tiles
from .wgmma import wgmma_plan, wgmma_plans, wgmma_shared

__all__ = [
    "MOST_ROWS",
    "MOST_TRANSPOSED_ROWS",
    "MOST_WGMMA_ROWS",
    "TYPES",
    "Ordered",
    "Plan",
    "Product",
    "Size",
    "Sizes",
    "alignment",
    "choose",
    "gemv_plan",
    "gemv_plans",
    "gemv_shared",
    "matmul_plan",
    "matmul_plans",
    "mma_plan",
    "mma_plans",
    "mma_shared",
    "token_tiles",
    "wgmma_plan",
    "wgmma_plans",
    "wgmma_shared",
]

# Rows of x up to which the words are multiplied, rather than a dense weight.
MOST_ROWS = 128
MOST_WGMMA_ROWS = 256
MOST_TRANSPOSED_ROWS = 16
_MOST_EXACT_ROWS = 1024  # where dense weights would lose too much
_MOST_FLOAT32_ROWS = 16


def choose(product: Product) -> Plan | None:
    """The kernel for a product, or None: dequantize, then cuBLAS."""
    if product.capability < (8, 0) or product.dtype not in TYPES:
        return None
    if 0 in (product.m, product.n, product.k):
        return None
    if product.transposed:
        few = product.grouping == 2 or product.m <= MOST_TRANSPOSED_ROWS
        exact = product.grouping == 2 or sixteen(product)
        return next(matmul_plans(product), None) if few and exact else None
    plan = None
    if _takes_gemv(product):
        plan = next(gemv_plans(product), None)
    elif _takes_wgmma(product):
        plan = next(wgmma_plans(product), None)
    # Inputs of very many columns do not fit into the shared memory that gemv has.
    most = _MOST_EXACT_ROWS if needs_sums(product) else MOST_ROWS
    few = product.m <= most or product.grouping == 2 or product.invariant
    if plan is None and sixteen(product) and few and product.grouping != 1:
        plan = next(mma_plans(product), None)
    return plan


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
    if not (sixteen(product) and product.aligned) or needs_sums(product):
        return False
    # Of few rows mma is as fast where W is small.
    small = product.n <= NARROW and product.k <= LONG
    return (32 if small else 16) < product.m <= MOST_WGMMA_ROWS
