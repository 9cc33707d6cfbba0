"""shaders/cpu/weights.cpp beside `layout`, bit for bit, and its products beside float64.

tests/cpu runs the same functions on other instruction sets, for all formats, and with
sanitizers; here is what needs torch.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from affine_tensor import layout
from affine_tensor.kernels.cpu import library
from affine_tensor.kernels.cpu.library import TYPES

# All widths and all group sizes, each width with groups that fill a vector and that do not.
FORMATS = (
    *((1, 16), (1, 128), (2, 32), (2, 256), (3, 32), (3, 64), (4, 16), (4, 64)),
    *((5, 32), (5, 128), (6, 16), (6, 64), (8, 64), (8, 256)),
)
DTYPES = layout.WEIGHT_DTYPES
P, L, N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
WEIGHT = (P, L, P, L, P, L, N)
ARGUMENTS = {
    "affine_dequantize": (*WEIGHT, P, P, L, N, L, L, N),
    "affine_embedding": (P, N, L, *WEIGHT, P, L, N, L, L, N),
    "affine_quantize": (P, N, L, P, P, P, L, L, N),
    "affine_matmul": (P, L, N, L, *WEIGHT, P, L, L, L, N),
    "affine_grouped_matmul": (
        *(P, L, N, L, P, L, L, P, L, L, P, L, L, N),
        *(P, L, L, L, L, P, P, N),
    ),
}
DONE, REFUSED, NO_OWNER = 0, 1, 2
Parts = tuple[Tensor, Tensor, Tensor]

formats = pytest.mark.parametrize(("bits", "group"), FORMATS)


def call(name: str, bits: int, group: int, *arguments: Any) -> int:
    """A function of weights.cpp. Tensors stand for where they lie."""
    made = library.function(
        "weights.cpp", name, ARGUMENTS[name], lambda _: None, BITS=bits, GROUP=group
    )
    if made is None:
        pytest.skip("no compiler or no vectors here; the log says more")
    given = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    return made(*given)


def weight_arguments(parts: Parts) -> list[Any]:
    strided = [x for part in parts for x in (part, part.stride(-2))]
    return [*strided, TYPES[parts[1].dtype]]


def dequantize(
    bits: int,
    group: int,
    parts: Parts,
    dtype: torch.dtype,
    permutation: Tensor | None = None,
    out: Tensor | None = None,
    threads: int = 2,
) -> Tensor:
    rows, columns = len(parts[1]), parts[1].shape[1] * group
    if out is None:
        out = torch.full((rows, columns + 3), 7, dtype=dtype)[:, :columns]
    where = (permutation, out, out.stride(0), TYPES[dtype])
    arguments = (*weight_arguments(parts), *where, rows, columns, threads)
    assert call("affine_dequantize", bits, group, *arguments) == DONE
    return out


def assert_same(ours: Tensor, oracle: Tensor) -> None:
    """The same bits; any NaN counts as any other."""
    assert (ours.dtype, ours.shape) == (oracle.dtype, oracle.shape)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[oracle.itemsize]
    wrong = ours.contiguous().view(whole) != oracle.contiguous().view(whole)
    if oracle.is_floating_point():
        wrong &= ~(ours.isnan() & oracle.isnan())
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} differ, the first at {first}: "
            f"{ours[first].item()!r} for {oracle[first].item()!r}"
        )


def columns_of(bits: int, group: int, least: int) -> int:
    """That many columns or more, of whole groups and words."""
    return -(-least // math.lcm(group, 32)) * math.lcm(group, 32)


def random_words(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int()


def strided(part: Tensor) -> Tensor:
    """The same values, between others."""
    wide = part.new_full((*part.shape[:-1], part.shape[-1] + 5), 77)
    wide[..., 2:-3] = part
    return wide[..., 2:-3]


# ---- dequantize -----------------------------------------------------------------


def hard_pairs(dtype: torch.dtype) -> list[tuple[float, float]]:
    """Scales and biases whose sums round twice, if they round carelessly."""
    info = torch.finfo(dtype)
    alone = [0.0, -0.0, 1.0, -1 - info.eps, 1 + 3 * info.eps, 1 / 3, info.max]
    alone += [-info.tiny, 3 * info.tiny, 3 * info.smallest_normal * info.eps]
    alone += [info.tiny * info.eps, -info.max / 100, math.inf, math.nan]
    pairs = list(itertools.product(alone, alone))
    # A third of what lies next to a tie of 16-bit numbers, and of float32 in float64.
    near = 2.0**-24
    for tie in (387 / 64, 3075 / 64, 257 * 2.0**-134, 2049 * 2.0**-26):
        pairs += [(tie / 3, near), (tie / 3, -near), (tie, near), (-near, tie)]
    pairs += [(1 + 2.0**-23, 1e-20), (1 + 2.0**-23, -1e-20)]
    pairs += [(16519105 * 2.0**-55, 1.0), (-16519105 * 2.0**-55, -1.0)]
    # One bit too many for float32 and float64, by a carry: with codes 31 and 65.
    return [
        *pairs,
        (1057 * 2.0**-23, 2 - 2.0**-10),
        (16519105 * 2.0**-52, 2 - 2.0**-23),
    ]


def parts_for(bits: int, group: int, dtype: torch.dtype) -> Parts:
    """Random groups, groups as `quantize` makes them, and all hard pairs."""
    generator = torch.Generator().manual_seed(bits)
    hard = torch.tensor(hard_pairs(dtype), dtype=torch.float64)
    columns = columns_of(bits, group, 19 * group)
    groups = columns // group
    rows = 5 + -(-len(hard) // groups)
    pairs = torch.randn(rows, groups, 2, generator=generator, dtype=torch.float64)
    # Zero is within the range of each.
    steps = torch.randint(1 << bits, (2, groups), generator=generator)
    pairs[:2, :, 1] = -pairs[:2, :, 0] * steps
    pairs[5:] = hard.repeat(-(-rows * groups // len(hard)), 1)[
        : (rows - 5) * groups
    ].view(-1, groups, 2)
    scales, biases = pairs.to(dtype).unbind(-1)
    words = random_words((rows, columns * bits // 32), seed=bits)
    return strided(words), strided(scales), strided(strided(biases))


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(bits: int, group: int, dtype: torch.dtype) -> None:
    parts = parts_for(bits, group, dtype)
    for to in layout.LOGICAL_DTYPES:
        oracle = layout.dequantize(*parts, bits=bits, group_size=group, dtype=to)
        assert_same(dequantize(bits, group, parts, to), oracle)
        assert_same(dequantize(bits, group, parts, to, threads=1), oracle)
        order = torch.randperm(oracle.shape[1], dtype=torch.int32)
        placed = torch.empty_like(oracle)
        placed[:, order.long()] = oracle
        assert_same(dequantize(bits, group, parts, to, order), placed)


@formats
def test_dequantize_all_codes_between_exact_and_inexact_sums(
    bits: int, group: int
) -> None:
    """Every code with scales and biases of every distance, and full mantissas."""
    generator = torch.Generator().manual_seed(0)
    columns = columns_of(bits, group, 256)
    codes = torch.arange(columns) % (1 << bits)
    words = layout.pack(codes.to(torch.uint8), bits=bits).view(torch.int32)
    distance = torch.arange(-60, 61).repeat_interleave(4).unsqueeze(-1)
    shape = (len(distance), columns // group)
    for dtype in DTYPES:
        whole, mask = {2: (torch.int16, 0x1FF), 4: (torch.int32, 0x7FFFFF)}[
            dtype.itemsize
        ]
        mask = {torch.float16: 0x3FF, torch.bfloat16: 0x7F}.get(dtype, mask)
        mantissas = torch.randint(mask + 1, (2, *shape), generator=generator) | 1
        one = int(torch.ones((), dtype=dtype).view(whole))
        scales, biases = (one | mantissas).to(whole).view(dtype)
        scales = (scales.double() * 0.5**distance).to(dtype)
        parts = (words.expand(len(distance), -1), scales, -biases)
        for to in DTYPES:
            oracle = layout.dequantize(*parts, bits=bits, group_size=group, dtype=to)
            assert_same(dequantize(bits, group, parts, to), oracle)


def test_dequantize_columns_and_past_the_caches() -> None:
    bits, group = 4, 64
    parts = layout.quantize(torch.randn(2048, 4160), bits=bits, group_size=group)
    parts = (parts[0].view(torch.int32), *parts[1:])
    oracle = layout.dequantize(*parts, bits=bits, group_size=group)
    assert oracle.nbytes >= 1 << 25  # STREAM_BYTES
    for shift in (0, 1):  # aligned and not
        out = torch.empty(oracle.numel() + 16)[shift : oracle.numel() + shift]
        dequantize(bits, group, parts, torch.float32, out=out.view(2048, 4160))
        assert_same(out.view(2048, 4160), oracle)
    block = (parts[0][:, 8:264], parts[1][:, 1:33], parts[2][:, 1:33])
    assert_same(dequantize(bits, group, block, torch.float32), oracle[:, 64:2112])


def test_what_is_no_permutation_stays_within_its_row() -> None:
    bits, group, columns = 8, 64, 128
    parts = parts_for(bits, group, torch.float32)
    parts = (parts[0][:3, :32], parts[1][:3, :2], parts[2][:3, :2])
    order = torch.arange(columns, dtype=torch.int32)
    order[[0, 5, 70]] = torch.tensor([-1, columns, 1 << 30], dtype=torch.int32)
    around = torch.full((5, 3 * columns), 7.0)
    dequantize(
        bits, group, parts, torch.float32, order, around[1:4, columns : 2 * columns]
    )
    oracle = torch.full_like(around, 7.0)
    weight = layout.dequantize(*parts, bits=bits, group_size=group)
    weight[:, [0, 5, 70]] = 7.0
    oracle[1:4, columns : 2 * columns] = weight
    assert_same(around, oracle)


# ---- embedding ------------------------------------------------------------------


@formats
def test_embedding(bits: int, group: int) -> None:
    parts = parts_for(bits, group, torch.bfloat16)
    rows, columns = len(parts[1]), parts[1].shape[1] * group

    def embed(ids: Tensor, out: Tensor) -> int:
        first = (ids, ids.dtype == torch.int64, len(ids))
        last = (out, out.stride(0), TYPES[out.dtype], rows, columns, 2)
        return call(
            "affine_embedding", bits, group, *first, *weight_arguments(parts), *last
        )

    for count, dtype, to in itertools.product(
        (0, 1, 40), (torch.int32, torch.int64), layout.LOGICAL_DTYPES
    ):
        ids = torch.randint(rows, (count,), dtype=dtype)
        oracle = layout.dequantize(
            *(part[ids.long()] for part in parts),
            bits=bits,
            group_size=group,
            dtype=to,
        )
        out = strided(torch.full_like(oracle, 7))
        assert embed(ids, out) == DONE
        assert_same(out, oracle)
        for wrong in (-1, rows, torch.iinfo(dtype).max, torch.iinfo(dtype).min):
            out = torch.full((count + 1, columns), 7, dtype=to)
            ids_and_wrong = torch.cat((ids, torch.tensor([wrong], dtype=dtype)))
            assert embed(ids_and_wrong, out) == REFUSED
            assert bool((out == 7).all())


# ---- quantize -------------------------------------------------------------------


def quantize(
    bits: int, group: int, w: Tensor, threads: int = 2
) -> tuple[int, list[Tensor]]:
    rows, columns = w.shape
    made = [
        torch.full((rows, columns * bits // 32), 7, dtype=torch.int32),
        *(torch.full((rows, columns // group), 7, dtype=w.dtype) for _ in range(2)),
    ]
    first = (w, TYPES[w.dtype], w.stride(0))
    done = call("affine_quantize", bits, group, *first, *made, rows, columns, threads)
    return done, made


def hard_weights(bits: int, group: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows that try each rule of `layout.quantize`."""
    generator = torch.Generator().manual_seed(bits)
    columns = columns_of(bits, group, 19 * group)
    info = torch.finfo(dtype)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    def chosen(*values: float) -> Tensor:
        at = torch.randint(len(values), (6, columns), generator=generator)
        return torch.tensor(values, dtype=torch.float64)[at]

    yield normal(40)
    yield normal(2).abs() + 1  # no zero within the range
    yield -normal(2).abs() - 1
    yield normal(4).clamp(min=0) * chosen(1, -1)[:4]  # zeros of both signs
    yield torch.tensor([0.25, -3.0, 0.0, -0.0, 1e-7]).unsqueeze(-1).expand(-1, columns)
    yield chosen(0.0, -0.0)
    yield chosen(0.0, -0.0, 1.0)
    yield chosen(-1.0, -0.0, 0.0)
    yield normal(3) * 1e-7  # below the smallest scale
    yield normal(3) * 1e-8
    yield chosen(*(info.tiny * info.eps * i for i in (-5, -1, 0, 1, 9)))
    yield chosen(*(i / 2 for i in range(2 << bits)))  # codes halfway
    yield chosen(*(-i / 2 for i in range(2 << bits)))
    yield chosen(*(i * (1 + info.eps) / 6 for i in range(-9, 9)))
    yield chosen(-1.0, 1.0)  # the same magnitude
    yield normal(2) * 1000 + 500
    # As far apart as the dtype has them.
    far = info.max / 4
    yield chosen(-far, far, far / 3, info.tiny, 0)
    yield normal(8) * torch.randn(8, columns, generator=generator).mul(3).exp2()


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize(bits: int, group: int, dtype: torch.dtype) -> None:
    w = torch.cat([rows.double() for rows in hard_weights(bits, group, dtype)])
    w = strided(w.to(dtype))
    oracle = layout.quantize(w, bits=bits, group_size=group)
    for threads in (1, 2):
        done, made = quantize(bits, group, w, threads)
        assert done == DONE
        for ours, right in zip(
            made, (oracle[0].view(torch.int32), *oracle[1:]), strict=True
        ):
            assert_same(ours, right)
    # Rows of which a vector has fewer groups than it has room for.
    for columns in range(columns_of(bits, group, 1), w.shape[1], 96 * group):
        done, made = quantize(bits, group, w[:3, :columns])
        part = layout.quantize(w[:3, :columns], bits=bits, group_size=group)
        assert done == DONE
        assert_same(made[0], part[0].view(torch.int32))


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_refuses(bits: int, group: int, dtype: torch.dtype) -> None:
    columns = columns_of(bits, group, 17 * group)
    w = torch.randn(5, columns).to(dtype)
    assert quantize(bits, group, w)[0] == DONE
    generator = torch.Generator().manual_seed(0)
    for wrong in (math.nan, math.inf, -math.inf):
        for _ in range(4):
            row = int(torch.randint(5, (1,), generator=generator))
            column = int(torch.randint(columns, (1,), generator=generator))
            bad = w.clone()
            bad[row, column] = wrong
            assert quantize(bits, group, bad)[0] == REFUSED
    spread = w.clone()
    spread[4, -2:] = torch.tensor([-1, 1]) * torch.finfo(dtype).max
    try:
        layout.quantize(spread, bits=bits, group_size=group)
        expected = DONE
    except ValueError:
        expected = REFUSED
    assert quantize(bits, group, spread)[0] == expected
    assert expected == REFUSED or (dtype == torch.float16 and bits > 1)


# ---- x @ W ----------------------------------------------------------------------


def error_of(y: Tensor, exact: Tensor) -> float:
    """Relative to what is allowed: 1.5 roundings of 16 bits, 1e-6 of float32."""
    norm = exact.norm()
    allowed = 1e-6
    if y.dtype != torch.float32:
        once = (exact.to(y.dtype).double() - exact).norm() / norm
        allowed = max(1.5 * float(once), 1e-6)
    return float((y.double() - exact).norm() / norm) / allowed


def matmul(bits: int, group: int, x: Tensor, parts: Parts, threads: int = 2) -> Tensor:
    rows, columns = len(parts[1]), parts[1].shape[1] * group
    y = strided(torch.full((len(x), columns), 7, dtype=x.dtype))
    first = (x, x.stride(0), TYPES[x.dtype], len(x), *weight_arguments(parts))
    last = (y, y.stride(0), rows, columns, threads)
    assert call("affine_matmul", bits, group, *first, *last) == DONE
    return y


def quantized(shape: tuple[int, ...], bits: int, group: int, dtype: torch.dtype) -> Any:
    """Strided parts of a random weight, and its values in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator).to(dtype)
    packed, scales, biases = layout.quantize(w, bits=bits, group_size=group)
    parts = (strided(packed.view(torch.int32)), strided(scales), strided(biases))
    form: dict[str, Any] = {"bits": bits, "group_size": group}
    return parts, layout.dequantize(*parts, **form, dtype=torch.float64)


@formats
def test_matmul(bits: int, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Fewer rows of W than are taken at once, and more than one run of them.
    for rows, least in ((1, 1), (7, 19 * group), (523, 520)):
        columns = columns_of(bits, group, least)
        for m, (dtype, part_dtype) in zip(
            (1, 2, 3, 4, 5, 8, 11, 1, 2), itertools.product(DTYPES, DTYPES), strict=True
        ):
            parts, w = quantized((rows, columns), bits, group, part_dtype)
            x = strided(torch.randn(m, rows, generator=generator).to(dtype))
            y = matmul(bits, group, x, parts)
            assert error_of(y, x.double() @ w) < 1
            assert_same(matmul(bits, group, x, parts, threads=1), y)


def test_matmul_of_many_rows_of_weights() -> None:
    """As in a vocabulary: sums of sums of sums."""
    parts, w = quantized((9001, 96), 4, 32, torch.bfloat16)
    x = torch.randn(3, 9001)
    y = matmul(4, 32, x, parts)
    assert error_of(y, x.double() @ w) < 1
    assert_same(matmul(4, 32, x, parts, threads=1), y)
    # Weights and inputs of one sign: nothing cancels.
    positive = (parts[0], parts[1].abs(), parts[2].abs() + 1)
    w = layout.dequantize(*positive, bits=4, group_size=32, dtype=torch.float64)
    y = matmul(4, 32, x.abs(), positive)
    assert error_of(y, x.abs().double() @ w) < 1


def test_matmul_of_nothing_and_of_what_is_not_finite() -> None:
    parts, w = quantized((6, 192), 4, 64, torch.float32)
    none = tuple(part[:0] for part in parts)
    assert_same(matmul(4, 64, torch.empty(2, 0), none), torch.zeros(2, 192))
    assert matmul(4, 64, torch.empty(0, 6), parts).shape == (0, 192)
    x = torch.randn(3, 6)
    x[1, 5] = math.inf
    y = matmul(4, 64, x, parts)
    assert error_of(y[::2], x[::2].double() @ w) < 1
    assert not bool(y[1].isfinite().any())
    parts[1][5, 2], parts[2][4, 1] = math.inf, 3e38
    y = matmul(4, 64, x[:1], parts)[0]
    assert error_of(y[:64], (x[0].double() @ w)[:64]) < 1
    assert not bool(y[128:].isfinite().any())


def grouped(
    bits: int,
    group: int,
    x: Tensor,
    parts: Parts,
    ends: Tensor | None,
    owners: Tensor | None,
    threads: int = 2,
) -> tuple[int, Tensor]:
    experts, rows = parts[1].shape[:2]
    columns = parts[1].shape[2] * group
    y = strided(torch.full((len(x), columns), 7, dtype=x.dtype))
    weight = [x for p in parts for x in (p, p.stride(0), p.stride(1))]
    first = (x, x.stride(0), TYPES[x.dtype], len(x), *weight, TYPES[parts[1].dtype])
    last = (y, y.stride(0), rows, columns, experts, ends, owners, threads)
    return call("affine_grouped_matmul", bits, group, *first, *last), y


@formats
def test_grouped_matmul(bits: int, group: int) -> None:
    experts, rows, columns = 4, 37, columns_of(bits, group, 3 * group)
    for m, dtype in ((1, torch.float32), (23, torch.bfloat16), (40, torch.float16)):
        parts, w = quantized((experts, rows, columns), bits, group, dtype)
        x = strided(torch.randn(m, rows).to(dtype))
        owners = torch.randint(experts - 1, (m,)) * 3 % experts  # one has no rows
        done, y = grouped(bits, group, x, parts, None, owners)
        assert done == DONE
        exact = torch.einsum("mn,mnk->mk", x.double(), w[owners])
        assert error_of(y, exact) < 1
        assert_same(grouped(bits, group, x, parts, None, owners, threads=1)[1], y)
        ends = torch.tensor([m // 3, m // 3, m // 2, m - m // 5])
        done, y = grouped(bits, group, x, parts, ends, None)
        assert done == DONE
        owners = torch.searchsorted(ends, torch.arange(m), right=True)
        exact = torch.einsum("mn,mnk->mk", x.double(), w[owners.clamp(max=3)])
        exact[owners == experts] = 0
        assert error_of(y, exact) < 1
        assert bool((y[owners == experts] == 0).all())
    for wrong in (-1, experts):
        owners = torch.full((m,), wrong)
        assert grouped(bits, group, x, parts, None, owners)[0] == NO_OWNER
