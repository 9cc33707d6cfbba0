"""A product as kernels see it, and a plan: a kernel with its definitions and its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Size = tuple[int, int, int]
Sizes = dict[str, Any]  # integers, by name

# As shaders/cuda/machine.cuh numbers them.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

WORD = 4  # bytes
NARROW = 4096  # rows of W
LONG = 8192  # columns


@dataclass(frozen=True)
class Product:
    """A product as kernels see it: x ``[M, K]``, W ``[N, K]``, y ``[M, N]``.

    `experts` is 0 for one matrix. Otherwise `grouping` says how rows find their expert:
    1 by an index each, 2 by ends of sorted rows. Alignments, as `alignment` finds them:
    the power of two, up to 16, that each row's address is a multiple of, in bytes (of
    scales and biases the smaller one). `invariant`: a row's result must not depend on M.
    `transposed`: x ``[M, N]`` @ W, y ``[M, K]``.
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
    transposed: bool = False
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
        row = (self.n if self.transposed else self.k) * self.dtype.itemsize
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


def blocks_of(product: Product, tokens: int) -> int:
    """How many blocks of so many rows of x; experts' rows are sorted by expert."""
    if product.grouping != 2:
        return up(product.m, tokens)
    # Each expert begins one of its own, and so does the rest.
    begun = min(product.experts + 1, product.m)
    return (product.m + begun * (tokens - 1)) // tokens


def up(value: int, unit: int) -> int:
    """How many units make up for a value."""
    return -(-value // unit)


def overlaps(product: Product) -> bool:
    return product.capability >= (9, 0)


def format_of(product: Product) -> Sizes:
    return {
        "BITS": product.bits,
        "GROUP": product.group_size,
        "X": TYPES[product.dtype],
        "S": TYPES[product.scale_dtype],
    }


def defines_of(values: Sizes) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(value)) for name, value in values.items())


def needs_sums(product: Product) -> bool:
    """Whether codes are to be multiplied as they are, however many the tokens.

    float16 may have no room for weights whose scales have another dtype. And of one bit
    there are two weights in a group, whose roundings do not even out.
    """
    same = product.scale_dtype == product.dtype
    return product.bits == 1 or (product.dtype == torch.float16 and not same)


def sixteen(product: Product) -> bool:
    """Whether tensor cores take its inputs."""
    return product.dtype in (torch.float16, torch.bfloat16)
