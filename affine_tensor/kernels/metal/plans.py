"""From a product's sizes to a kernel, its definitions and its grid.

Nothing here touches a device. Families: `gemv` (one row of x), `gemv_small` (up to 8),
`gemm` (tiles; "skinny" where one tile takes all rows), and for ``x @ W`` `gemv_n` and
`gemm_n`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .library import Variant, variant
from .tuning import Limits

# What one threadgroup may use. Below the 32 KB that Metal allows, so that two fit.
_MEMORY = 24 * 1024


@dataclass(frozen=True)
class Product:
    """A product as kernels see it: x ``[M, K]`` (of `matmul`: ``[M, N]``), W ``[N, K]``.

    `experts` is 0 for one matrix. Otherwise `grouping` says how rows find their expert:
    1 by an index each, 2 by ends of sorted rows; `expert_type` is the dtype of those.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    transposed: bool = False  # x @ W rather than x @ W.T
    aligned: bool = False
    x_vector: bool = False
    permuted: bool = False
    biased: bool = False
    experts: int = 0
    grouping: int = 0
    expert_type: torch.dtype = torch.int32
    gathered: bool = False  # tiles take their rows of x through an order


@dataclass(frozen=True)
class Choice:
    """A kernel with its tile sizes."""

    family: str
    sizes: tuple[tuple[str, int], ...]

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]


def _choice(family: str, **sizes: int) -> Choice:
    return Choice(family, tuple(sizes.items()))


def choose(product: Product, limits: Limits, cores: int, invariant: bool) -> Choice:
    """The kernel for a product.

    `invariant`: each row's sums must be made in the same order whatever M is. Tiles do
    that as long as K is not divided.
    """
    wanted = limits.simdgroups * cores
    if product.experts:
        tiles = product.m >= limits.rows_per_expert * product.experts
        if not (tiles or invariant):
            return _few_rows(product, 1, wanted)
        rows = max(1, product.m // product.experts)
    else:
        rows = product.m
        most = limits.vectors if product.transposed else limits.small
        if rows <= most and not invariant:
            return _few_rows(product, rows, wanted)
    if product.transposed:
        return _tiles_n(product, rows, wanted, invariant)
    return _tiles(product, rows, wanted, invariant, limits.skinny)


def _few_rows(product: Product, rows: int, wanted: int) -> Choice:
    if product.transposed:
        return _choice("gemv_n", VECTORS=rows, SIMDGROUPS=8)
    # A part of K must keep all lanes busy and have whole sectors of scales.
    unit = 32 * (32 if product.group_size <= 64 else product.group_size // 2)
    vectors = product.m if product.experts else 1
    split = 1
    while (
        split < 8
        and product.k >= 2 * split * unit
        and -(-product.n // 4) * vectors * split < wanted
    ):
        split *= 2
    sizes = {"SPLIT": split, "GROUPS": max(1, 2 // split)}
    if rows == 1:
        return _choice("gemv", **sizes)
    return _choice("gemv_small", VECTORS=rows, **sizes)


def _tiles(
    product: Product, rows: int, wanted: int, invariant: bool, skinny: int
) -> Choice:
    tall = -(-rows // 8) if rows <= skinny else _rows_of_tile(rows)
    size = product.dtype.itemsize
    # Wide tiles load x less often: as wide as registers allow, and as keeps cores busy.
    wide = 4 if tall <= 3 else 2
    split = 1

    def simdgroups() -> int:
        columns = 32 * wide // split
        return 4 * -(-product.n // columns) * -(-rows // (8 * tall))

    def fits(split: int) -> bool:
        line = 8 * tall + (4 if size == 4 else 8)
        return 64 * split * line * size <= _MEMORY and product.k >= 128 * split

    while wide > 1 and simdgroups() < wanted:
        wide //= 2
    while split < 4 and not invariant and fits(2 * split) and simdgroups() < wanted:
        split *= 2
    return _choice("gemm", M_TILES=tall, N_TILES=wide, SPLIT=split)


def _rows_of_tile(rows: int) -> int:
    """Two tiles or more of up to 64 rows, about equally tall, in units of 8.

    Of many rows all are alike, so that few kernels are compiled.
    """
    if rows > 256:
        return 8
    return -(-rows // (8 * max(2, -(-rows // 64))))


def _tiles_n(product: Product, rows: int, wanted: int, invariant: bool) -> Choice:
    tall = min(4, -(-rows // 8))
    tall = 4 if tall == 3 else tall
    simdgroups = -(-product.k // 64) * -(-rows // (8 * tall))
    split = 4 if tall <= 2 and simdgroups < wanted and not invariant else 1
    return _choice("gemm_n", M_TILES=tall, SPLIT=split)


def variant_of(product: Product, choice: Choice) -> Variant:
    """The kernel to compile."""
    defines: dict[str, Any] = {
        "X_TYPE": product.dtype,
        "SCALE_TYPE": product.scale_dtype,
        "ALIGNED": product.aligned,
        "PERMUTED": product.permuted,
        "EXPERTS": product.grouping,
    }
    if product.experts:
        defines["EXPERT_TYPE"] = product.expert_type
    if choice.family in ("gemv", "gemv_small", "gemm"):
        defines |= {"X_VECTOR": product.x_vector, "BIASED": product.biased}
    if choice.family in ("gemm", "gemm_n"):
        defines["GATHERED"] = product.gathered
    return variant(
        choice.family,
        bits=product.bits,
        group_size=product.group_size,
        **defines,
        **dict(choice.sizes),
    )


Grid = tuple[tuple[int, int, int], tuple[int, int, int]]


def grid(product: Product, choice: Choice) -> Grid:
    """Threads in all, and in a threadgroup."""
    family = choice.family
    if family in ("gemv", "gemv_small"):
        rows = 4
        if family == "gemv_small" and product.bits > 4 and choice["VECTORS"] > 4:
            rows = 2
        count = choice["SPLIT"] * choice["GROUPS"]
        groups = (1, -(-product.n // (rows * choice["GROUPS"])), 1)
        if family == "gemv":
            groups = (1, groups[1], product.m)
        threads = (32, count, 1)
    elif family == "gemv_n":
        groups = (1, -(-product.k // 128), product.m if product.experts else 1)
        threads = (32, choice["SIMDGROUPS"], 1)
    else:
        tall = 8 * choice["M_TILES"]
        # Each expert may begin a tile of its own.
        tiles = -(-product.m // tall) + min(product.m, product.experts)
        wide = 256 if family == "gemm_n" else 32 * choice["N_TILES"]
        outputs = product.k if family == "gemm_n" else product.n
        groups = (-(-outputs * choice["SPLIT"] // wide), tiles, 1)
        threads = (128, 1, 1)
    total = (
        groups[0] * threads[0],
        groups[1] * threads[1],
        groups[2] * threads[2],
    )
    return total, threads
