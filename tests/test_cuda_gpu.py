"""Kernels on a CUDA device. tests/test_cuda_operators.py has what needs none."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affine_tensor import AffineConfig, AffineQuantizedTensor, layout, ops, quantize_
from affine_tensor.kernels import cuda, settings
from affine_tensor.kernels.cuda import compiler, experts, library, plans, products
from affine_tensor.kernels.cuda.plans import Product

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device"
)

# Relative, in the 2-norm, of dtypes whose errors are not those of one rounding.
BOUND = {torch.float32: 1e-6, torch.float64: 1e-14}
DTYPES = layout.WEIGHT_DTYPES
DEVICE = torch.device("cuda", 0)
NAN = float("nan")
FAST_EMPTY = cuda._fast_empty

op = torch.ops.affine_tensor
Parts = tuple[Tensor, Tensor, Tensor]


# ---- what is compiled before ----------------------------------------------------


def shape_of(bits: int, group_size: int, m: int) -> tuple[int, int]:
    """N and K of a case: no multiples of what kernels work on at a time."""
    n = (37, 130, 513, 71, 300)[(bits + m) % 5]
    return n, max(32, group_size) * (3, 5, 17, 33, 9)[(bits * m + group_size) % 5]


def cases(bits: int, dtype: torch.dtype) -> Iterator[tuple[int, torch.dtype, int]]:
    """Group size, dtype of the scales and rows of x, so that all meet all in turns."""
    some = (5, 12, 24, 33, 64, 100, 128, 3, 7)
    for i, group_size in enumerate(layout.GROUP_SIZES):
        turn = i + bits + DTYPES.index(dtype)
        for m in (1, 2, some[turn % 9], some[(turn + 4) % 9], 200):
            yield group_size, DTYPES[(turn + m) % 3], m


def all_cases() -> Iterator[tuple[int, torch.dtype, int, torch.dtype, int]]:
    for bits, dtype in itertools.product(layout.BITS, DTYPES):
        for group_size, scale_dtype, m in cases(bits, dtype):
            yield bits, dtype, group_size, scale_dtype, m


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """What the tests of products need, compiled by all cores at once."""
    capability = torch.cuda.get_device_capability(0)
    jobs: list[compiler.Job] = [
        ("weights.cu", (("BITS", bits), ("X", x)), capability)
        for bits, x in itertools.product(layout.BITS, library.TYPES.values())
    ]
    for bits, dtype, group_size, scale_dtype, m in all_cases():
        n, k = shape_of(bits, group_size, m)
        product = Product(
            m=m,
            n=n,
            k=k,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            scale_dtype=scale_dtype,
            biased=m % 2 == 0,
            capability=capability,
            multiprocessors=library.multiprocessors(0),
            shared=library.shared_bytes(0),
        )
        transposed = replace(product, biased=False, transposed=True)
        for plan in (plans.choose(product), plans.choose(transposed)):
            if plan is not None:
                jobs.append((plan.source, plan.defines, capability))
    begun = time.perf_counter()
    count = compiler.images(jobs)
    print(f"\n{count} kernels in {time.perf_counter() - begun:.0f} s")


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong raises, and what is not written is NaN."""
    monkeypatch.setattr(settings, "strict", True)
    monkeypatch.setattr(cuda, "_fast_empty", None)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def as_torch_was() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_in_use(checked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not filled first."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(cuda, "_fast_empty", FAST_EMPTY)


def random_parts(
    *lead: int, bits: int, group_size: int, dtype: torch.dtype, k: int, seed: int = 0
) -> Parts:
    """Words, scales and biases of a weight [*lead, K] with entries of about 1."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    own: dict[str, Any] = {"generator": generator, "device": DEVICE}
    words = (*lead, k * bits // 32)
    packed = torch.randint(-(1 << 31), 1 << 31, words, dtype=torch.int32, **own)
    groups = (*lead, k // group_size)
    scales = (torch.rand(groups, **own) + 0.5) / (1 << bits)
    biases = torch.randn(groups, **own) / 8 - 0.5
    return packed, scales.to(dtype), biases.to(dtype)


def dense_of(parts: Parts, bits: int, group_size: int) -> Tensor:
    return layout.dequantize(
        *parts, bits=bits, group_size=group_size, dtype=torch.float64
    )


def randn(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def close(
    y: Tensor,
    wanted: Tensor,
    about: object = "",
    alike: int = 1,
    roundings: float = 1.5,
) -> None:
    """One and a half roundings of the result, relative, in the 2-norm.

    Of few results the errors do not even out: then somewhat more. So many of them have the
    same ones: results of ``x @ W`` in one group have few different weights.
    """
    error = float((y.double() - wanted).norm() / wanted.norm())
    if y.dtype in BOUND:
        assert error < BOUND[y.dtype], f"{about}: the relative error is {error:.2e}"
        return
    one = float((wanted.to(y.dtype).double() - wanted).norm() / wanted.norm())
    most = roundings * (1 + 3 / (y.numel() / alike) ** 0.5)
    assert error < most * one, (
        f"{about}: {error / one:.2f} roundings, {most:.2f} allowed"
    )


# ---- products -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_products(bits: int, dtype: torch.dtype) -> None:
    for group_size, scale_dtype, m in cases(bits, dtype):
        n, k = shape_of(bits, group_size, m)
        parts = random_parts(
            n, bits=bits, group_size=group_size, dtype=scale_dtype, k=k
        )
        form = {"bits": bits, "group_size": group_size, "dtype": dtype}
        x = randn(m, k, dtype=dtype)
        bias = randn(n, dtype=dtype, seed=2) if m % 2 == 0 else None
        y = op.linear(x, *parts, None, bias, **form)
        wanted = x.double() @ dense_of(parts, bits, group_size).T
        about = (group_size, scale_dtype, m, n, k)
        close(y, wanted if bias is None else wanted + bias, about)
        # The same again, bit for bit.
        assert torch.equal(op.linear(x, *parts, None, bias, **form), y)
        x = randn(m, n, dtype=dtype)
        y = op.matmul(x, *parts, None, **form)
        wanted = x.double() @ dense_of(parts, bits, group_size)
        close(y, wanted, ("matmul", *about), group_size)


FORM = {"bits": 4, "group_size": 64, "dtype": torch.bfloat16}


def four_bits(*lead: int, k: int, seed: int = 0) -> Parts:
    return random_parts(
        *lead, bits=4, group_size=64, dtype=torch.bfloat16, k=k, seed=seed
    )


@pytest.mark.parametrize(
    "m", [*range(1, 20), 31, 32, 33, 63, 65, 127, 129, 200, 257, 700]
)
def test_any_number_of_rows(m: int) -> None:
    parts = four_bits(328, k=1088)
    x = randn(m, 1088, dtype=torch.bfloat16)
    y = op.linear(x, *parts, **FORM)
    close(y, x.double() @ dense_of(parts, 4, 64).T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_weights(dtype: torch.dtype) -> None:
    """Several tiles for each multiprocessor, and many steps along K."""
    form = {**FORM, "dtype": dtype}
    for n, k in ((14336, 4096), (1024, 14336)):
        parts = four_bits(n, k=k)
        dense = dense_of(parts, 4, 64)
        for m in (1, 2, 16, 64, 256, 1000):
            x = randn(m, k, dtype=dtype)
            y = op.linear(x, *parts, **form)
            close(y, x.double() @ dense.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_that_do_not_lie_side_by_side(dtype: torch.dtype) -> None:
    form = {**FORM, "dtype": dtype}
    packed, scales, biases = four_bits(210, k=320)
    dense = dense_of((packed, scales, biases), 4, 64)
    wide = randn(4, 3, 700, dtype=dtype)
    inputs = [
        wide[..., :320],
        wide[:, 1:2, 5:325],  # at an odd address
        wide[:2, :2, :320],
        randn(320, 6, dtype=dtype).t(),
        wide[0, 0, 1:321],
        randn(1, 320, dtype=dtype).expand(3, 320),
    ]
    for x in inputs:
        y = op.linear(x, packed, scales, biases, **form)
        assert y.shape == (*x.shape[:-1], 210)
        close(y, x.double() @ dense.T)
    for rows in (slice(1, 200), slice(3, None, 2)):
        own = (packed[rows], scales[rows], biases[rows])
        for m in (1, 2, 11):
            x = randn(m, 320, dtype=dtype)
            close(op.linear(x, *own, **form), x.double() @ dense[rows].T)
    # Columns from the middle, which leaves rows of words at odd addresses.
    words, groups = slice(8 * 1, 8 * 4), slice(1, 4)
    own = (packed[:, words], scales[:, groups], biases[:, groups])
    for m in (1, 2, 11, 150):
        x = randn(m, 192, dtype=dtype)
        y = op.linear(x, *own, **form)
        close(y, x.double() @ dense[:, 64:256].T)
    # Words that begin at an address that is no multiple of 16.
    moved = torch.empty(packed.numel() + 1, dtype=torch.int32, device=DEVICE)[1:]
    moved = moved.view_as(packed).copy_(packed)
    for m in (1, 2, 11):
        x = randn(m, 320, dtype=dtype)
        close(op.linear(x, moved, scales, biases, **form), x.double() @ dense.T)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_permuted_columns(dtype: torch.dtype) -> None:
    parts = four_bits(96, k=256)
    permutation = torch.randperm(256, device=DEVICE).to(torch.int32)
    form = {**FORM, "dtype": dtype}
    dense = torch.empty(96, 256, dtype=torch.float64, device=DEVICE)
    dense[:, permutation.long()] = dense_of(parts, 4, 64)
    for m in (1, 2, 9, 150):
        x = randn(m, 256, dtype=dtype)
        y = op.linear(x, *parts, permutation, **form)
        close(y, x.double() @ dense.T)
        x = randn(m, 96, dtype=dtype)
        y = op.matmul(x, *parts, permutation, **form)
        close(y, x.double() @ dense)
    made = op.dequantize(*parts, permutation, **{**form, "dtype": torch.float64})
    assert torch.equal(made, dense)


def test_scales_beyond_the_range_of_the_inputs() -> None:
    packed, scales, biases = four_bits(64, k=256)
    for factor in (2.0**17, 2.0**-20):
        own = (packed, scales.float() * factor, biases.float() * factor)
        for m in (1, 2, 16):
            x = (randn(m, 256, dtype=torch.float32) / 2.0**9).half()
            y = op.linear(x, *own, **{**FORM, "dtype": torch.float16})
            wanted = x.double() @ dense_of(own, 4, 64).T
            # Small results have the steps of the smallest numbers.
            torch.testing.assert_close(y.double(), wanted, rtol=4e-3, atol=2e-3)
            assert y.isfinite().all()


def test_float32_is_not_rounded_to_tf32() -> None:
    parts = four_bits(512, k=1024)
    for m in (1, 8, 16, 17, 128, 1000):
        x = randn(m, 1024, dtype=torch.float32)
        y = op.linear(x, *parts, **{**FORM, "dtype": torch.float32})
        close(y, x.double() @ dense_of(parts, 4, 64).T)


def test_dense_weights_are_made_a_part_at_a_time() -> None:
    n, k, m = 40000, 4096, 600
    parts = four_bits(n, k=k)
    x = randn(m, k, dtype=torch.bfloat16)
    op.linear(x, *parts, **FORM)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = op.linear(x, *parts, **FORM)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < cuda._SCRATCH + 2 * y.nbytes + (8 << 20)
    some = slice(30000, 30100)
    own = tuple(part[some] for part in parts)
    close(y[:, some], x.double() @ dense_of(own, 4, 64).T)
    for dtype in DTYPES:
        x = randn(100, n, dtype=dtype)
        y = op.matmul(x, *parts, **{**FORM, "dtype": dtype})
        close(y, x.double() @ dense_of(parts, 4, 64), dtype, alike=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_the_same_whatever_others_there_are(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "batch_invariant", True)
    form = {**FORM, "dtype": dtype}
    parts = four_bits(333, k=1088)
    x = randn(300, 1088, dtype=dtype)
    whole = op.linear(x, *parts, **form)
    close(whole, x.double() @ dense_of(parts, 4, 64).T)
    for m in (1, 2, 3, 7, 16, 24, 64, 100, 129, 200):
        assert torch.equal(op.linear(x[:m], *parts, **form), whole[:m])


# ---- experts --------------------------------------------------------------------


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_experts(bits: int, dtype: torch.dtype, permuted: bool) -> None:
    count, n, k, group_size = 8, 100, 320, 32
    parts = random_parts(
        count, n, bits=bits, group_size=group_size, dtype=torch.bfloat16, k=k
    )
    form = {"bits": bits, "group_size": group_size, "dtype": dtype}
    dense = dense_of(parts, bits, group_size)
    permutation = None
    if permuted:
        permutation = torch.rand(count, k, device=DEVICE).argsort(-1).to(torch.int32)
        target = permutation.long().unsqueeze(1).expand_as(dense)
        dense = torch.empty_like(dense).scatter_(-1, target, dense)
    for rows in (1, 7, 40, 513):
        x = randn(rows, k, dtype=dtype)
        owners = torch.randint(0, count, (rows,), device=DEVICE)
        wanted = torch.einsum("tk,tnk->tn", x.double(), dense[owners])
        y = op.grouped_linear(x, *parts, permutation, indices=owners, **form)
        close(y, wanted)
        ends = torch.bincount(owners, minlength=count).cumsum(0).to(torch.int32)
        order = owners.argsort(stable=True)
        y = op.grouped_linear(x[order], *parts, permutation, offsets=ends, **form)
        close(y, wanted[order])
    for rows in (1, 50, 700):
        x = randn(rows, n, dtype=dtype)
        owners = torch.randint(0, count, (rows,), device=DEVICE)
        wanted = torch.einsum("tn,tnk->tk", x.double(), dense[owners])
        y = op.grouped_matmul(x, *parts, permutation, indices=owners, **form)
        close(y, wanted, ("matmul", rows), group_size)
        ends = torch.bincount(owners, minlength=count).cumsum(0).to(torch.int32)
        order = owners.argsort(stable=True)
        y = op.grouped_matmul(x[order], *parts, permutation, offsets=ends, **form)
        close(y, wanted[order], ("matmul", rows), group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sorting", [False, True])
def test_rows_without_an_expert(
    sorting: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_SORTING", 0 if sorting else 1 << 60)
    parts = four_bits(4, 72, k=128)
    form = {**FORM, "dtype": dtype}
    x = randn(9, 128, dtype=dtype)
    owners = torch.tensor([0, 4, 3, -1, 1, 3, 1 << 40, 3, 0], device=DEVICE)
    good = (owners >= 0) & (owners < 4)
    y = op.grouped_linear(x, *parts, indices=owners, **form)
    assert y[~good].isnan().all()
    dense = dense_of(parts, 4, 64)
    close(y[good], torch.einsum("tk,tnk->tn", x[good].double(), dense[owners[good]]))
    ends = torch.tensor([0, 3, 3, 6], device=DEVICE)
    y = op.grouped_linear(x, *parts, offsets=ends, **form)
    assert (y[6:] == 0).all()
    own = torch.tensor([1, 1, 1, 3, 3, 3], device=DEVICE)
    close(y[:6], torch.einsum("tk,tnk->tn", x[:6].double(), dense[own]))
    x = randn(9, 72, dtype=dtype)
    y = op.grouped_matmul(x, *parts, indices=owners, **form)
    assert y[~good].isnan().all()
    wanted = torch.einsum("tn,tnk->tk", x[good].double(), dense[owners[good]])
    close(y[good], wanted, "matmul", 64)
    y = op.grouped_matmul(x, *parts, offsets=ends, **form)
    assert (y[6:] == 0).all()
    wanted = torch.einsum("tn,tnk->tk", x[:6].double(), dense[own])
    close(y[:6], wanted, "matmul", 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 16, 33, 64, 65])
def test_transposed_products(m: int, dtype: torch.dtype) -> None:
    parts = four_bits(3000, k=1088)
    x = randn(m, 3000, dtype=dtype)
    form = {**FORM, "dtype": dtype}
    y = op.matmul(x, *parts, **form)
    close(y, x.double() @ dense_of(parts, 4, 64), alike=64)
    assert torch.equal(op.matmul(x, *parts, **form), y)
    apart = torch.stack([x, x], -1)[..., 0]  # neighbours do not lie side by side
    assert torch.equal(op.matmul(apart, *parts, **form), y)


def test_the_same_rows_by_index_and_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of a model: 128 experts, 8 for each of 300 tokens."""
    parts = four_bits(128, 768, k=2048)
    x = randn(2400, 2048, dtype=torch.bfloat16)
    owners = torch.rand(300, 128, device=DEVICE).topk(8).indices.reshape(-1)
    found = []
    for sorting in (0, 1 << 60):
        monkeypatch.setattr(experts, "_SORTING", sorting)
        found.append(op.grouped_linear(x, *parts, indices=owners, **FORM))
    error = (found[0].double() - found[1].double()).norm() / found[1].double().norm()
    assert float(error) < 5e-3
    some = slice(100, 120)
    own = owners[some]
    dense = dense_of(tuple(part[own] for part in parts), 4, 64)  # type: ignore[arg-type]
    wanted = torch.einsum("tk,tnk->tn", x[some].double(), dense)
    for y in found:
        close(y[some], wanted)


# ---- weights --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", layout.LOGICAL_DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_dense_weights_are_those_of_the_cpu(bits: int, dtype: torch.dtype) -> None:
    for group_size, scale_dtype in zip(
        layout.GROUP_SIZES, itertools.cycle(DTYPES), strict=False
    ):
        k = max(32, group_size) * 5
        parts = random_parts(
            3, 67, bits=bits, group_size=group_size, dtype=scale_dtype, k=k
        )
        form = {"bits": bits, "group_size": group_size, "dtype": dtype}
        wanted = ops.reference("dequantize")(*(p.cpu() for p in parts), None, **form)
        assert torch.equal(op.dequantize(*parts, **form).cpu(), wanted)
        # As `quantize` makes them, where many sums are ties.
        dense = torch.randn(67, k).to(scale_dtype)
        own = layout.quantize(dense, bits=bits, group_size=group_size)
        wanted = layout.dequantize(*own, **form)
        moved = tuple(part.view(part.dtype).to(DEVICE) for part in own)
        assert torch.equal(op.dequantize(*moved, **form).cpu(), wanted)
        ids = torch.tensor([[3, 66, 0], [67, -1, 5]], device=DEVICE)
        rows = op.embedding(ids, *moved, **form).cpu()
        assert torch.equal(rows[0], wanted[[3, 66, 0]])
        assert rows[1, :2].isnan().all()
        assert torch.equal(
            op.embedding(ids.int(), *moved, **form).cpu()[1, 2], wanted[5]
        )


def test_a_large_dense_weight() -> None:
    parts = four_bits(70001, k=4096)
    dense = op.dequantize(*parts, **FORM)
    for some in (slice(0, 9), slice(65530, 65540), slice(70000, None)):
        own = tuple(part[some].cpu() for part in parts)
        wanted = ops.reference("dequantize")(*own, None, **FORM)
        assert torch.equal(dense[some].cpu(), wanted)
    assert not dense.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_codes_are_those_of_the_cpu(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    w = torch.randn(600, 1280)
    w[0] = 0
    w[1] = 3
    w[2] = w[2].round()
    w[3, ::2], w[3, 1::2] = 0.0, -0.0
    w[4] = w[4].relu() * torch.where(w[5] > 0, 1.0, -1.0)
    w[6] *= 1e-9
    w = w.to(dtype)
    for group_size in layout.GROUP_SIZES:
        form = {"bits": bits, "group_size": group_size}
        wanted = ops.reference("quantize")(w, **form)
        for ours, cpu in zip(op.quantize(w.to(DEVICE), **form), wanted, strict=True):
            assert torch.equal(ours.cpu(), cpu)
    for bad in (NAN, float("inf")):
        w[7, 9] = bad
        with pytest.raises(ValueError, match=r"the weight at \[7, 9\]"):
            op.quantize(w.to(DEVICE), bits=bits, group_size=64)


# ---- graphs, streams, devices ---------------------------------------------------


def calls() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Operators by name, each with an input."""
    parts, stacked = four_bits(520, k=1024), four_bits(8, 136, k=256)
    found: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    for m in (1, 2, 8, 16, 60, 128, 250, 600):
        x = randn(m, 1024, dtype=torch.bfloat16)
        found[f"{m} rows"] = (lambda x: op.linear(x, *parts, **FORM), x)
    found["matmul"] = (
        lambda x: op.matmul(x, *parts, **FORM),
        randn(4, 520, dtype=torch.bfloat16),
    )
    for rows in (6, 400):
        owners = torch.randint(0, 8, (rows,), device=DEVICE)
        ends = torch.bincount(owners, minlength=8).cumsum(0)
        x = randn(rows, 256, dtype=torch.bfloat16)

        def by_index(x: Tensor, owners: Tensor = owners) -> Tensor:
            return op.grouped_linear(x, *stacked, indices=owners, **FORM)

        def by_ends(x: Tensor, ends: Tensor = ends) -> Tensor:
            return op.grouped_linear(x, *stacked, offsets=ends, **FORM)

        def sorted_before(x: Tensor, owners: Tensor = owners) -> Tensor:
            before, experts._SORTING = experts._SORTING, 0
            try:
                return op.grouped_linear(x, *stacked, indices=owners, **FORM)
            finally:
                experts._SORTING = before

        def transposed(x: Tensor, owners: Tensor = owners) -> Tensor:
            return op.grouped_matmul(x[:, :136], *stacked, indices=owners, **FORM)

        found[f"{rows} rows, transposed"] = (transposed, x)
        found[f"{rows} rows by index"] = (by_index, x)
        found[f"{rows} rows, sorted"] = (sorted_before, x)
        found[f"{rows} rows by ends"] = (by_ends, x)
    found["embedding"] = (
        lambda ids: op.embedding(ids, *parts, **FORM),
        torch.arange(9, device=DEVICE),
    )
    found["dequantize"] = (lambda x: op.dequantize(*parts, **FORM) + x[0, 0], x)
    return found


def another(x: Tensor) -> Tensor:
    return x.flip(0) if x.is_floating_point() else x + 3


def test_graphs_replay_with_other_inputs(as_in_use: None) -> None:
    for name, (run, x) in calls().items():
        run(x)
        static = x.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(static)
        for own in (x, another(x)):
            static.copy_(own)
            y.fill_(NAN)
            graph.replay()
            assert torch.equal(y, run(own)), name


def test_what_is_first_met_in_a_capture(as_in_use: None) -> None:
    parts = random_parts(75, bits=5, group_size=128, dtype=torch.float16, k=640)
    form = {"bits": 5, "group_size": 128, "dtype": torch.float16}
    for m in (1, 2, 9, 200, 600):
        x = randn(m, 640, dtype=torch.float16)
        cuda.reset()
        torch.mm(x, x.t())  # cuBLAS begins
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op.linear(x, *parts, **form)
        assert not products.calls
        graph.replay()
        close(y, x.double() @ dense_of(parts, 5, 128).T)
        assert torch.equal(op.linear(x, *parts, **form), y)


def test_nothing_waits_for_the_device(as_in_use: None) -> None:
    own = calls()
    for run, x in own.values():
        run(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run, x in own.values():
            run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_at_once(as_in_use: None) -> None:
    own = calls()
    wanted = {name: run(x) for name, (run, x) in own.items()}
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for _ in range(20):
        for stream, (name, (run, x)) in zip(
            itertools.cycle(streams), own.items(), strict=False
        ):
            with torch.cuda.stream(stream):
                found.append((name, run(x)))
    torch.cuda.synchronize()
    for name, y in found:
        assert torch.equal(y, wanted[name]), name


def test_results_are_the_same_each_time_and_after_each_other(as_in_use: None) -> None:
    """What overlaps the kernel before must wait for its input."""
    parts = four_bits(1024, k=1024)
    for m in (1, 2, 8, 64):
        x = randn(m, 1024, dtype=torch.bfloat16)

        def chain(x: Tensor) -> Tensor:
            for _ in range(12):
                x = op.linear(x, *parts, **FORM)
                x = x / x.norm(dim=-1, keepdim=True)
            return x

        def direct(x: Tensor) -> Tensor:
            for _ in range(4):
                x = op.linear(x * 0.05, *parts, **FORM)
                x = op.linear(x, *parts, **FORM)
            return x

        for run in (chain, direct):
            wanted = run(x)
            assert wanted.isfinite().all()
            for _ in range(30):
                assert torch.equal(run(x), wanted)


def test_threads_at_once(as_in_use: None) -> None:
    # Sorting is a setting of the process: who changes it changes it for all.
    own = {name: call for name, call in calls().items() if "sorted" not in name}
    wanted = {name: run(x) for name, (run, x) in own.items()}
    torch.cuda.synchronize()
    wrong: list[object] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(5):
                    for name, (run, x) in own.items():
                        if not torch.equal(run(x), wanted[name]):
                            wrong.append(name)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="there is one CUDA device, or none"
)
def test_two_devices() -> None:
    other = torch.device("cuda", 1)
    parts = four_bits(520, k=1024)
    moved = tuple(part.to(other) for part in parts)
    for m in (1, 2, 9, 200):
        x = randn(m, 1024, dtype=torch.bfloat16)
        y = op.linear(x, *parts, **FORM)
        there = op.linear(
            x.to(other), *moved, **FORM
        )  # the current device is the first
        assert there.device == other
        assert torch.equal(there.cpu(), y.cpu())
        with torch.cuda.device(other):
            assert torch.equal(op.linear(x, *parts, **FORM), y)
        with pytest.raises(RuntimeError):
            op.linear(x, *moved, **FORM)
    dense = op.dequantize(*moved, **FORM)
    assert torch.equal(dense.cpu(), op.dequantize(*parts, **FORM).cpu())
    w = randn(64, 256, dtype=torch.bfloat16)
    for ours, theirs in zip(
        op.quantize(w, bits=4, group_size=64),
        op.quantize(w.to(other), bits=4, group_size=64),
        strict=True,
    ):
        assert torch.equal(ours.cpu(), theirs.cpu())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_modules(mode: str, as_in_use: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 128, bias=False)
    )
    model = model.to(DEVICE, torch.bfloat16)
    quantize_(model, AffineConfig(4, 64))
    torch.compiler.reset()
    compiled = torch.compile(model, mode=mode)
    with torch.no_grad():
        for m in (1, 8, 200):
            for seed in range(4):
                x = randn(m, 256, dtype=torch.bfloat16, seed=seed)
                wanted = model(x)
                y = compiled(x)
                torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    torch.compiler.reset()


# ---- without kernels, and as a whole --------------------------------------------


def test_the_reference_instead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stacked = four_bits(4, 96, k=256)
    x = randn(5, 256, dtype=torch.bfloat16)
    owners = torch.tensor([0, 3, 3, 1, 0], device=DEVICE)

    def check() -> None:
        for bits, dtype in itertools.product(layout.BITS, DTYPES):
            own = random_parts(75, bits=bits, group_size=32, dtype=dtype, k=320)
            form = {"bits": bits, "group_size": 32, "dtype": dtype}
            bias = randn(75, dtype=dtype, seed=2)
            for m in (1, 5, 40, 200):
                x_own = randn(m, 320, dtype=dtype)
                wanted = x_own.double() @ dense_of(own, bits, 32).T
                close(op.linear(x_own, *own, **form), wanted)
                y = op.linear(x_own, *own, None, bias, **form)
                # torch rounds the product of odd sizes before it adds the bias.
                close(y, wanted + bias, roundings=2.0)
        y = op.grouped_linear(x, *stacked, indices=owners, **FORM)
        dense = dense_of(stacked, 4, 64)[owners]
        close(y, torch.einsum("tk,tnk->tn", x.double(), dense))
        assert op.dequantize(*stacked, **FORM).shape == (4, 96, 256)

    assert ops.has_kernels("cuda")
    monkeypatch.setattr(settings, "cuda_backend", "reference")
    assert not ops.has_kernels("cuda")
    check()
    monkeypatch.setattr(settings, "cuda_backend", "own")
    monkeypatch.setattr(settings, "strict", False)
    monkeypatch.setattr(compiler, "_first", lambda: "there is no NVRTC")
    cuda.reset()
    try:
        with caplog.at_level(logging.WARNING, "affine_tensor"):
            check()  # by Triton, where it is installed
        assert not ops.has_kernels("cuda")
    finally:
        cuda.reset()


def test_gradients_through_a_layer() -> None:
    weight = AffineQuantizedTensor.from_packed(
        *four_bits(192, k=256), bits=4, group_size=64
    )
    dense = weight.dequantize(torch.float64)
    for m in (1, 2, 40, 200):
        x = randn(m, 256, dtype=torch.bfloat16).requires_grad_()
        gradient = randn(m, 192, dtype=torch.bfloat16, seed=3)
        F.linear(x, weight).backward(gradient)
        assert x.grad is not None
        close(x.grad, gradient.double() @ dense)


def test_greedy_tokens_of_a_model_are_those_of_the_cpu(
    as_in_use: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(settings, "cpu_backend", "reference")
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    quantize_(
        model,
        AffineConfig(4, 64),
        filter_fn=lambda module, name: isinstance(module, (nn.Linear, nn.Embedding)),
    )
    ids = torch.randint(2, 512, (3, 17))
    own: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    with torch.no_grad():
        here = model.generate(ids, **own)
        model.to(DEVICE)
        there = model.generate(ids.to(DEVICE), **own)
        assert torch.equal(there.cpu(), here)
        one = model.generate(ids[:1].to(DEVICE), **own)
        assert torch.equal(one.cpu(), here[:1])


def test_a_call_costs_the_host_no_more_than_two_plain_products(
    as_in_use: None,
) -> None:
    parts = four_bits(256, k=256)  # so small that the device does not hold it up
    x = randn(1, 256, dtype=torch.bfloat16)
    dense = randn(256, 256, dtype=torch.bfloat16)
    linear = ops.kernel("linear", x)
    assert linear is not None

    def cost(run: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(30):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(100):
                run()
            best = min(best, (time.perf_counter() - begun) / 100)
        return best * 1e6

    with torch.inference_mode():
        ours = cost(lambda: linear(x, *parts, None, None, **FORM))
        layer = nn.Linear(256, 256, bias=False, device=DEVICE, dtype=torch.bfloat16)
        quantize_(layer, AffineConfig(4, 64))
        whole = cost(lambda: F.linear(x, layer.weight))
        plain = cost(lambda: torch.mm(x, dense))
    print(f"\nhost: kernel {ours:.1f} µs, F.linear {whole:.1f}, torch.mm {plain:.1f}")
    assert ours < 2 * plain


def test_plans_of_this_device_fit() -> None:
    """What is planned for other sizes launches, too: no compile, only numbers."""
    shared = library.shared_bytes(0)
    base = Product(
        m=1,
        n=4096,
        k=4096,
        bits=4,
        group_size=64,
        dtype=torch.bfloat16,
        scale_dtype=torch.bfloat16,
        capability=library.capability(0),
        multiprocessors=library.multiprocessors(0),
        shared=shared,
    )
    for bits, m, k in itertools.product(layout.BITS, (1, 8, 128), (256, 28672)):
        plan = plans.choose(replace(base, bits=bits, m=m, k=k))
        if plan is not None:
            assert plan.shared <= shared
