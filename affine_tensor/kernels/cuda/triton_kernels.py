# mypy: disable-error-code="no-untyped-def,untyped-decorator,valid-type"
"""Kernels in Triton, for machines without NVRTC; `fallback` has what calls them.

Imported only there: Triton takes its time, and need not be installed.
"""

from importlib import import_module
from typing import Any

# By name: it comes with torch on Linux, and is no requirement of this package.
triton: Any = import_module("triton")
tl: Any = import_module("triton.language")


@triton.jit
def _codes(words, row, k, mask, BITS: tl.constexpr):
    """The codes of columns k of rows that begin at word `row`, as float32."""
    bit = k * BITS
    at = row + bit // 32
    codes = tl.load(words + at, mask=mask, other=0).to(tl.uint32) >> (bit % 32)
    if 32 % BITS != 0:
        # The rest is in the next word; a shift by 32 is none.
        crosses = bit % 32 + BITS > 32
        high = tl.load(words + at + 1, mask=mask & crosses, other=0).to(tl.uint32)
        codes = codes | tl.where(crosses, high << ((32 - bit % 32) % 32), 0)
    return (codes & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _weights(
    words,
    scales,
    biases,
    n,
    k,
    mask,
    word_stride,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Weights [n, k] as float32."""
    row = n.to(tl.int64)
    codes = _codes(words, row * word_stride, k, mask, BITS)
    group = row * scale_stride + k // GROUP
    scale = tl.load(scales + group, mask=mask, other=0).to(tl.float32)
    bias = tl.load(biases + group, mask=mask, other=0).to(tl.float32)
    return codes * scale + bias


@triton.jit
def one_row(
    x,
    words,
    scales,
    biases,
    bias,
    y,
    N,
    K: tl.constexpr,
    word_stride,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[n] = the sum of x[k] W[n, k]. grid: ROWS outputs each."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        mask = (n < N)[:, None] & (k < K)[None, :]
        weight = _weights(
            words,
            scales,
            biases,
            n[:, None],
            k[None, :],
            mask,
            word_stride,
            scale_stride,
            BITS,
            GROUP,
        )
        inputs = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        sums += tl.where(mask, weight * inputs[None, :], 0.0)
    total = tl.sum(sums, 1)
    if BIASED:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def some_rows(
    x,
    words,
    scales,
    biases,
    bias,
    y,
    M,
    N,
    K: tl.constexpr,
    x_stride,
    word_stride,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[m, n] = the sum of x[m, k] W[n, k]. grid: ROWS outputs each, TOKENS rows of x."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        mask = (n < N)[:, None] & (k < K)[None, :]
        weight = _weights(
            words,
            scales,
            biases,
            n[:, None],
            k[None, :],
            mask,
            word_stride,
            scale_stride,
            BITS,
            GROUP,
        )
        inputs = tl.load(
            x + m[None, :] * x_stride + k[:, None],
            mask=(m < M)[None, :] & (k < K)[:, None],
            other=0,
        )
        weight = tl.where(mask, weight, 0.0).to(inputs.dtype)
        sums = tl.dot(weight, inputs, sums, input_precision="ieee")
    if BIASED:
        sums += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + m[None, :] * N + n[:, None], sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def dense(
    words,
    scales,
    biases,
    y,
    N,
    K: tl.constexpr,
    word_stride,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = W. grid: COLUMNS along K each, ROWS rows."""
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (n < N)[:, None] & (k < K)[None, :]
    weight = _weights(
        words,
        scales,
        biases,
        n[:, None],
        k[None, :],
        mask,
        word_stride,
        scale_stride,
        BITS,
        GROUP,
    )
    at = n[:, None].to(tl.int64) * K + k[None, :]
    tl.store(y + at, weight.to(y.dtype.element_ty), mask=mask)
