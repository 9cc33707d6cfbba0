"""Dequantize and embedding on emulated Metal, against `layout` on the CPU and MLX."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import metal_emulator as emulator
import pytest
import torch
import torch.nn.functional as F
from test_layout import (
    FORMATS,
    HOW,
    assert_same_bits,
    from_mlx,
    random_parts,
    to_mlx,
)
from torch import Tensor
from value_cases import (
    ORDERS,
    expert_parts,
    format_of,
    formats_with,
    generator,
    op,
    rounded,
    shifted,
    spread,
    words_of,
)

from affine_tensor import AffineQuantizedTensor, layout, ops
from affine_tensor.kernels.metal import values as metal_values
from affine_tensor.layout import WEIGHT_DTYPES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = list(itertools.product(WEIGHT_DTYPES, WEIGHT_DTYPES))
    formats_with(metafunc, "pair", pairs)


@pytest.fixture(autouse=True)
def metal(emulated_metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those on MPS, the emulator for Metal."""
    monkeypatch.setattr(metal_values, "_plans", {})


@pytest.fixture(scope="module")
def mx() -> Any:
    return pytest.importorskip("mlx.core")


# ---- dequantize -----------------------------------------------------------------


def test_dequantize_is_that_of_the_layout(
    form: tuple[int, int], pair: tuple[torch.dtype, torch.dtype]
) -> None:
    scale_dtype, dtype = pair
    kind = {**format_of(form), "dtype": dtype}
    for i, how in enumerate(HOW):
        parts = random_parts(*form, scale_dtype, how, (9,))
        with emulator.run(order=ORDERS[i % 3], seed=i):
            ours = op.dequantize(*words_of(parts), **kind)
        expected = layout.dequantize(*parts, **kind)
        if how == "any bits":
            expected = corrected(expected, ours, parts, form)
        assert_same_bits(ours, expected, [how] * len(ours))


def corrected(
    expected: Tensor, ours: Tensor, parts: Any, form: tuple[int, int]
) -> Tensor:
    """The layout's weights, but exact where float64 is not: its sums have 53 bits.

    That takes a scale and a bias that lie 2^29 apart, or more.
    """
    expected = expected.clone()
    codes = layout.unpack(parts[0], bits=form[0])
    differ = (expected != ours).nonzero().tolist()
    for n, k in differ:
        scale, bias = (float(part[n, k // form[1]]) for part in parts[1:])
        exact = int(codes[n, k]) * Fraction(scale) + Fraction(bias)
        if exact != Fraction(int(codes[n, k]) * scale + bias):
            expected[n, k] = rounded(exact, expected.dtype)
    return expected


@pytest.mark.parametrize("form", FORMATS[1::3], ids=str)
def test_dequantize_of_an_odd_offset(form: tuple[int, int]) -> None:
    """Words that no wide load may take, here and in rows further apart."""
    kind = {**format_of(form), "dtype": WEIGHT_DTYPES[FORMATS.index(form) // 3 % 3]}
    parts = random_parts(*form, torch.float16, "cancelling", (5,))
    expected = layout.dequantize(*parts, **kind)
    for move in (shifted, spread):
        moved = [move(part) for part in words_of(parts)]
        assert_same_bits(op.dequantize(*moved, **kind), expected)


@pytest.mark.parametrize("bits", layout.BITS)
def test_dequantize_is_that_of_mlx_where_mlx_is_exact(mx: Any, bits: int) -> None:
    packed, scales, biases = random_parts(bits, 64, torch.float16, "ordinary", (4,))
    scales, biases = scales.sign() / 4, (biases * 8).round()
    form = {"bits": bits, "group_size": 64}
    arrays = [to_mlx(mx, part) for part in (packed, scales, biases)]
    theirs = from_mlx(mx, mx.dequantize(*arrays, **form, stream=mx.cpu))
    ours = op.dequantize(*words_of((packed, scales, biases)), **form, dtype=torch.half)
    assert_same_bits(ours, theirs)


def test_scales_that_are_not_finite() -> None:
    packed, scales, biases = random_parts(4, 64, torch.float16, "ordinary", (1,))
    scales[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    biases[0, :4] = torch.tensor([1.0, 1.0, -math.inf, math.nan])
    for dtype in WEIGHT_DTYPES:
        kind = {"bits": 4, "group_size": 64, "dtype": dtype}
        ours = op.dequantize(packed.view(torch.int32), scales, biases, **kind)
        expected = layout.dequantize(packed, scales, biases, **kind)
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(9.0), expected.nan_to_num(9.0))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "experts": lambda part: part,
    "offset": shifted,
    "spread": spread,
    "experts swapped": lambda part: part.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda part: part[:, ::2],
    "one expert": lambda part: part[1],
    "a row": lambda part: part[1, 2],
    "expanded": lambda part: part[:, :1].expand(-1, 4, -1),
    "strided": lambda part: torch.stack([part, part], -1)[..., 0],
    "four dimensions": lambda part: part[None].expand(2, -1, -1, -1),
    "four, strided": lambda part: part[None, ..., :].expand(2, -1, -1, -1)[:, ::2],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantize_any_layout(name: str) -> None:
    for bits in (3, 4):
        parts = [LAYOUTS[name](part) for part in expert_parts(bits)]
        kind = {"bits": bits, "group_size": 32, "dtype": torch.float16}
        expected = layout.dequantize(*(p.contiguous() for p in parts), **kind)
        with emulator.run() as run:
            assert_same_bits(op.dequantize(*parts, **kind), expected)
        assert len(run.launches) <= 2  # the check and the call
        mixed = [parts[0], parts[1].clone(), parts[2]]
        assert_same_bits(op.dequantize(*mixed, **kind), expected)


@pytest.mark.parametrize(
    ("bits", "dtype"), list(zip((1, 3, 8), WEIGHT_DTYPES, strict=True)), ids=str
)
@pytest.mark.parametrize("own", ["each", "shared", "matrix", "row", "int64", "four"])
def test_dequantize_permuted(own: str, bits: int, dtype: torch.dtype) -> None:
    parts = expert_parts(bits)
    permutation = torch.rand(3, 1024, generator=generator()).argsort(-1).int()
    if own == "shared":
        permutation = permutation[0]
    elif own == "int64":
        permutation = permutation.long().t().contiguous().t()
    elif own == "four":
        parts = tuple(part[None].expand(2, -1, -1, -1) for part in parts)
        permutation = permutation[None].expand(2, -1, -1)
    elif own != "each":
        at: Any = 1 if own == "matrix" else (1, 2)
        parts, permutation = tuple(part[at] for part in parts), permutation[1]
    kind = {"bits": bits, "group_size": 32, "dtype": dtype}
    expected = ops.reference("dequantize")(*parts, permutation, **kind)
    for order in ORDERS:
        with emulator.run(order=order, seed=bits):
            assert_same_bits(op.dequantize(*parts, permutation, **kind), expected)


def test_a_broken_permutation_writes_nowhere_else() -> None:
    parts = [part[0] for part in expert_parts()]
    kind = {"bits": 4, "group_size": 32, "dtype": torch.float32}
    permutation = torch.arange(1024, dtype=torch.int32)
    permutation[5], permutation[900] = -1, 1024
    with emulator.run(trace=True):
        ours = op.dequantize(*parts, permutation, **kind)
    kept = (permutation >= 0) & (permutation < 1024)
    expected = layout.dequantize(*parts, **kind)
    assert_same_bits(ours[:, kept].contiguous(), expected[:, kept].contiguous())


def test_a_permutation_of_another_length() -> None:
    parts = [part[0] for part in expert_parts()]
    kind = {"bits": 4, "group_size": 32, "dtype": torch.float32}
    with pytest.raises(RuntimeError, match="size"):
        op.dequantize(*parts, torch.arange(512, dtype=torch.int32), **kind)


# ---- embedding ------------------------------------------------------------------

IDS = {
    "one": torch.tensor([7]),
    "none": torch.tensor([], dtype=torch.int64),
    "none of three": torch.zeros(3, 0, 2, dtype=torch.int32),
    "scalar": torch.tensor(3),
    "matrix": torch.randint(0, 11, (3, 5), generator=generator()),
    "int32": torch.randint(0, 11, (2, 1, 4), generator=generator()).int(),
    "int32, odd offset": torch.arange(11, dtype=torch.int32)[3:],
    "strided": torch.arange(22).remainder(11).view(2, 11).t()[::2],
    "expanded": torch.tensor([4]).expand(9),
    "many": torch.randint(0, 11, (70,), generator=generator()),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("bits", "group_size"), [(3, 16), (4, 64)])
def test_embedding(name: str, bits: int, group_size: int) -> None:
    ids = IDS[name]
    parts = words_of(
        random_parts(bits, group_size, torch.bfloat16, "cancelling", (11,))
    )
    kind = {"bits": bits, "group_size": group_size, "dtype": torch.float16}
    dense = layout.dequantize(*parts, **kind)
    with emulator.run() as run:
        ours = op.embedding(ids, *parts, **kind)
    assert_same_bits(ours, dense[ids.long()])
    assert ids.numel() or not [one for one in run.launches if 0 in one.threads]
    moved = [spread(part) for part in parts]
    assert_same_bits(op.embedding(ids, *moved, **kind), dense[ids.long()])


@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
def test_embedding_of_many_formats(form: tuple[int, int]) -> None:
    i = FORMATS.index(form)
    dtype = WEIGHT_DTYPES[i // 3 % 3]
    scale_dtype = WEIGHT_DTYPES[i // 9 % 3]
    parts = words_of(random_parts(*form, scale_dtype, HOW[i % 4], (6,)))
    kind = {**format_of(form), "dtype": dtype}
    ids = torch.tensor([5, 0, 2, 2, 4])
    with emulator.run(order=ORDERS[i % 3], seed=i, trace=i % 5 == 0):
        ours = op.embedding(ids, *parts, **kind)
    assert_same_bits(ours, layout.dequantize(*parts, **kind)[ids])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_ids_that_are_no_rows_give_nan(index: torch.dtype) -> None:
    parts = words_of(random_parts(4, 64, torch.float32, "ordinary", (6,)))
    ends = torch.iinfo(index)
    ids = torch.tensor([0, 6, 5, -1, ends.min, 2, ends.max], dtype=index)
    for dtype in WEIGHT_DTYPES:
        kind = {"bits": 4, "group_size": 64, "dtype": dtype}
        for front in (False, True):  # guards before the weight, and behind it
            with emulator.run(trace=True, front=front):
                ours = op.embedding(ids, *parts, **kind)
        inside = (ids >= 0) & (ids < 6)
        assert bool(ours[~inside].isnan().all())
        expected = layout.dequantize(*parts, **kind)[ids[inside].long()]
        assert_same_bits(ours[inside], expected)


def test_embedding_refuses_experts_and_what_does_not_fit() -> None:
    ids = torch.tensor([0])
    parts = expert_parts()
    kind = {"bits": 4, "group_size": 32, "dtype": torch.float32}
    with pytest.raises(ValueError, match="embedding takes a weight of two dimensions"):
        op.embedding(ids, *parts, **kind)
    packed, scales, biases = (part[0] for part in parts)
    for call in (
        lambda *own: op.embedding(ids, *own, **kind),
        lambda *own: op.dequantize(*own, **kind),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            call(packed, scales[:4], biases[:4])
        with pytest.raises(ValueError, match="both must agree"):
            call(packed, scales, biases.half())
        with pytest.raises(TypeError, match=r"packed words are torch\.int64"):
            call(packed.long(), scales, biases)
    with pytest.raises((RuntimeError, IndexError), match="int"):
        op.embedding(torch.tensor([0.0]), packed, scales, biases, **kind)


# ---- what the reference takes ---------------------------------------------------


def test_float64_and_empty_weights_are_left_to_the_reference() -> None:
    parts = [part[0] for part in expert_parts()]
    kind: dict[str, Any] = {"bits": 4, "group_size": 32, "dtype": torch.float64}
    expected = layout.dequantize(*parts, **kind)
    none = [part[:0] for part in parts]
    with emulator.run() as run:
        assert torch.equal(op.dequantize(*parts, **kind), expected)
        ids = torch.tensor([2, 1])
        assert torch.equal(op.embedding(ids, *parts, **kind), expected[ids])
        kind["dtype"] = torch.float16
        assert op.dequantize(*none, **kind).shape == (0, 1024)
        with pytest.raises((IndexError, RuntimeError), match="index"):
            op.embedding(ids, *none, **kind)
        empty = op.quantize(torch.zeros(0, 3, 64), bits=4, group_size=32)
    assert not run.launches
    assert [part.shape for part in empty] == [(0, 3, 8), (0, 3, 2), (0, 3, 2)]


def test_meta_tensors() -> None:
    weight = torch.empty(4, 64, device="meta", dtype=torch.float16)
    form = {"bits": 4, "group_size": 32}
    parts = op.quantize(weight, **form)
    assert op.dequantize(*parts, **form, dtype=torch.float32).shape == (4, 64)
    ids = torch.empty(2, 3, device="meta", dtype=torch.int64)
    assert op.embedding(ids, *parts, **form, dtype=torch.half).shape == (2, 3, 64)


def test_through_the_tensor() -> None:
    dense = torch.randn(6, 64, generator=generator()).bfloat16()
    weight = AffineQuantizedTensor.from_dense(dense, bits=5, group_size=32)
    expected = layout.dequantize(
        *layout.quantize(dense, bits=5, group_size=32), bits=5, group_size=32
    )
    ids = torch.tensor([[3, 0], [5, 5]])
    with emulator.run() as run:
        assert_same_bits(weight.dequantize(), expected)
        assert_same_bits(F.embedding(ids, weight), expected[ids])
    assert {one.kernel for one in run.launches} == {"dequantize", "embedding"}
    permutation = torch.rand(64, generator=generator()).argsort()
    permuted = AffineQuantizedTensor.from_packed(
        weight.packed,
        weight.scales,
        weight.biases,
        bits=5,
        group_size=32,
        dtype=torch.float16,
        permutation=permutation,
    )
    half = layout.dequantize(
        weight.packed,
        weight.scales,
        weight.biases,
        bits=5,
        group_size=32,
        dtype=torch.float16,
    )
    assert_same_bits(permuted.dequantize()[:, permutation], half)
