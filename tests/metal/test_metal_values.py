"""Dequantize, embedding and quantize on emulated Metal, through the operators.

The oracles are `layout` on the CPU, MLX's own quantize, and exact fractions.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import metal_emulator as emulator
import pytest
import torch
import torch.nn.functional as F
from metal_emulator import lint
from test_layout import (
    FORMATS,
    HOW,
    MLX_GROUP_SIZES,
    assert_same_bits,
    hard_rows,
    mlx_quantize,
    random_parts,
)
from torch import Tensor

from affine_tensor import AffineQuantizedTensor, layout, ops, tensor
from affine_tensor.kernels import (
    metal_library,
    metal_values,
    metal_values_check,
    settings,
)
from affine_tensor.layout import WEIGHT_DTYPES

op = torch.ops.affine_tensor
ORDERS = ("forward", "backward", "random")
PAIRS = list(itertools.product(WEIGHT_DTYPES, WEIGHT_DTYPES))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Formats with dtypes: all with --full, else each format with one in turn."""
    full = metafunc.config.getoption("--full", default=False)
    for name, values in (("dtype", WEIGHT_DTYPES), ("pair", PAIRS)):
        if {"form", name} <= set(metafunc.fixturenames):
            chosen = [
                (form, value)
                for i, form in enumerate(FORMATS)
                for j, value in enumerate(values)
                # 5 group sizes: each width and each size meets each dtype.
                if full or (i + i // 5 - j) % len(values) == 0
            ]
            metafunc.parametrize(("form", name), chosen, ids=str)


# Plans for the emulator, kept from test to test as its kernels are.
_plans: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def metal(emulated_metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those on MPS, the emulator for Metal."""
    monkeypatch.setattr(metal_values, "_plans", _plans)


@pytest.fixture
def fresh(metal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled yet."""
    monkeypatch.setattr(metal_library, "_kernels", {})
    monkeypatch.setattr(metal_values, "_plans", {})


@pytest.fixture(scope="module")
def mx() -> Any:
    return pytest.importorskip("mlx.core")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def format_of(form: tuple[int, int]) -> dict[str, int]:
    return {"bits": form[0], "group_size": form[1]}


def words_of(parts: Any) -> tuple[Tensor, ...]:
    """Words as the operators have them."""
    return (parts[0].view(torch.int32), *parts[1:])


def shifted(part: Tensor, by: int = 1) -> Tensor:
    """The same values from another storage offset."""
    base = torch.zeros(part.numel() + by, dtype=part.dtype)
    return base[by:].view(part.shape).copy_(part)


def spread(part: Tensor) -> Tensor:
    """The same values, rows further apart and from an odd offset."""
    wide = part.new_zeros((*part.shape[:-1], part.shape[-1] + 3))
    wide[..., 1:-2] = part
    return wide[..., 1:-2]


# ---- quantize -------------------------------------------------------------------


def test_quantize_is_that_of_the_layout_and_of_mlx(
    mx: Any, form: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, names = hard_rows(*form, dtype)
    bits, group_size = form
    expected = words_of(layout.quantize(weight, **format_of(form)))
    turn = FORMATS.index(form)
    own = shifted(weight) if turn % 2 else weight  # single loads, or wide ones
    with emulator.run(order=ORDERS[turn % 3], seed=bits):
        ours = op.quantize(own, **format_of(form))
    assert_same_bits(ours, expected, names)
    if group_size in MLX_GROUP_SIZES:
        theirs = words_of(mlx_quantize(mx, weight, *form))
        assert_same_bits(ours, theirs, names)


@pytest.mark.parametrize(
    "shape", [(1, 48), (3, 16, 48), (112,), (2, 3, 1, 32)], ids=str
)
@pytest.mark.parametrize("bits", [1, 2, 6, 8])
def test_quantize_any_shape(bits: int, shape: tuple[int, ...]) -> None:
    """The last group of 16 may be half of a run of 32."""
    if shape[-1] * bits % 32:
        shape = (*shape[:-1], 96)
    weight = torch.randn(shape, generator=generator()).half()
    form = {"bits": bits, "group_size": 16}
    expected = words_of(layout.quantize(weight, **form))
    with emulator.run(trace=True) as run:
        assert_same_bits(op.quantize(weight, **form), expected)
    loads, words, scales, biases = run.launches[-1].traffic[:4]
    assert loads.load_bytes == weight.nbytes
    stored = [part.store_bytes for part in (words, scales, biases)]
    assert stored == [part.nbytes for part in expected]


def test_quantize_strided() -> None:
    base = torch.randn(128, 6, 192, generator=generator())
    for view in (
        base[:, 0, :64].t(),
        base[..., ::3].permute(1, 0, 2),
        base[:, 2, 1:65],
    ):
        form = {"bits": 4, "group_size": 64}
        assert_same_bits(
            op.quantize(view, **form),
            words_of(layout.quantize(view.contiguous(), **form)),
        )


def test_a_wide_grid(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More simdgroups than fit along one axis take a second, its last row ragged."""
    monkeypatch.setattr(metal_values_check, "_WIDEST", 8)
    weight = torch.randn(7, 192, generator=generator())
    form = {"bits": 3, "group_size": 64}
    with emulator.run() as run:
        ours = op.quantize(weight, **form)
    assert run.launches[-1].threads == (256, 3)
    assert_same_bits(ours, words_of(layout.quantize(weight, **form)))


WRONG = {
    "nan": (torch.float32, [((0, 0), math.nan)]),
    "the last": (torch.float16, [((5, 127), math.nan)]),
    "infinite": (torch.bfloat16, [((3, 70), math.inf)]),
    "minus infinite": (torch.float16, [((3, 70), -math.inf), ((3, 71), math.nan)]),
    "both infinities": (torch.float32, [((2, 3), -math.inf), ((2, 4), math.inf)]),
    "too far apart": (torch.float32, [((4, 100), 3e38), ((4, 101), -3e38)]),
}


@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_quantized_is_told_as_by_the_reference(
    case: str, bits: int, group_size: int
) -> None:
    dtype, changes = WRONG[case]
    weight = torch.randn(6, 256, generator=generator()).to(dtype)
    for place, value in changes:
        weight[place] = value
    weight = weight.view(2, 3, 256)
    form = {"bits": bits, "group_size": group_size}
    with pytest.raises(ValueError, match="weight") as expected:
        layout.quantize(weight, **form)
    with pytest.raises(ValueError, match="weight") as seen, emulator.run() as run:
        op.quantize(weight, **form)
    assert str(seen.value) == str(expected.value)
    assert run.launches[-1].kernel == "quantize"


@pytest.mark.parametrize(
    ("weight", "form"),
    [
        (torch.zeros(4, 40), (4, 32)),
        (torch.zeros(4, 48), (3, 16)),
        (torch.zeros(4, 64), (7, 32)),
        (torch.zeros(4, 64), (4, 48)),
        (torch.zeros(4, 64, dtype=torch.float64), (4, 64)),
        (torch.zeros(()), (4, 64)),
    ],
)
def test_shapes_are_refused_as_by_the_reference(
    weight: Tensor, form: tuple[int, int]
) -> None:
    with pytest.raises((ValueError, TypeError)) as expected:
        layout.quantize(weight, **format_of(form))
    with pytest.raises(type(expected.value)) as seen:
        op.quantize(weight, **format_of(form))
    assert str(seen.value) == str(expected.value)


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


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """A fraction in `dtype`, half to even, in whole numbers all the way."""
    info = torch.finfo(dtype)
    digits = 1 - round(math.log2(info.eps))
    smallest = round(math.log2(info.tiny)) - digits + 1
    if value == 0:
        return 0.0
    place = max(_exponent(abs(value)) - digits + 1, smallest)
    whole = round(value / Fraction(2) ** place)  # half to even
    exact = whole * Fraction(2) ** place
    return math.copysign(math.inf, value) if abs(exact) > info.max else float(exact)


def _exponent(value: Fraction) -> int:
    """The largest e with 2^e <= value."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e if Fraction(2) ** e <= value else e - 1


# By scale and bias; where float32 rounds first, or float64 does, some weight is off.
TIES = {
    "product on a tie": (1025 / 64, 2.0**-20),
    "just below it": (1025 / 64, -(2.0**-20)),
    "negative": (-1025 / 64, 2.0**-20),
    "of bfloat16": (129 / 64, 2.0**-20),
    "of bfloat16, below": (129 / 64, -(2.0**-20)),
    "further than float64 reaches": (129 * 2.0**6, 2.0**-100),
    "and below": (1025 * 2.0**-6, -(2.0**-100)),
    "product next to a tie": (3077 / 64 / 3, 0.0),
    "product next to a tie of bfloat16": (389 / 64 / 3, 0.0),
    "bias on a tie": (2.0**-30, 3075 / 64),
    "bias on a tie of bfloat16": (-(2.0**-30), 387 / 64),
    "sum next to a tie": (1 / 3, 1024.0),
    "cancels": (1 / 3, -1.0),
    "cancels to a rest": (0.1, -0.3),
    "subnormal": (2.0**-24 * 3, 2.0**-25),
    "of bfloat16, subnormal": (2.0**-133 * 5, 2.0**-130),
    "of float32, subnormal": (2.0**-149 * 5001, -(2.0**-148)),
    "the largest": (2e38, -3e38),
    "the largest, bias tiny": (1e38, 1e-38),
    "infinite product": (3.3e38, -3.2e38),
    "infinite": (3.3e38, 3.2e38),
}


@pytest.mark.parametrize(("scale_dtype", "dtype"), PAIRS, ids=str)
def test_dequantize_is_exact_arithmetic_rounded_once(
    scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    pairs = torch.tensor(list(TIES.values()), dtype=torch.float64)
    finite = torch.finfo(scale_dtype).max
    pairs = pairs.clamp(-finite, finite).to(scale_dtype)
    scales, biases = (part.contiguous() for part in pairs.t()[..., None])  # [cases, 1]
    codes = torch.arange(256, dtype=torch.int32).expand(len(pairs), -1)
    packed = layout.pack(codes, bits=8)
    kind = {"bits": 8, "group_size": 256, "dtype": dtype}
    ours = op.dequantize(packed.view(torch.int32), scales, biases, **kind)
    for name, row, scale, bias in zip(
        TIES, ours.double(), scales.tolist(), biases.tolist(), strict=True
    ):
        for code in range(256):
            exact = code * Fraction(scale[0]) + Fraction(bias[0])
            assert row[code] == rounded(exact, dtype), (name, code)


@pytest.mark.parametrize("bits", layout.BITS)
def test_dequantize_is_that_of_mlx_where_mlx_is_exact(mx: Any, bits: int) -> None:
    from test_layout import from_mlx, to_mlx

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


def expert_parts(
    bits: int = 4, group_size: int = 32, lead: tuple[int, ...] = (3, 5)
) -> tuple[Tensor, Tensor, Tensor]:
    packed, scales, biases = words_of(
        random_parts(bits, group_size, torch.bfloat16, "ordinary", lead)
    )
    return packed, scales, biases


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


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 3, 8])
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
@pytest.mark.parametrize(("bits", "group_size"), [(3, 16), (4, 64), (8, 128), (1, 256)])
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


# ---- launches -------------------------------------------------------------------


def test_a_call_is_one_launch_and_kernels_are_compiled_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def compile_shader(source: str) -> Any:
        made.append(source)
        return emulator.compile_shader(source)

    monkeypatch.setattr(torch.mps, "compile_shader", compile_shader)
    weight = torch.randn(4, 128, generator=generator())
    form = {"bits": 4, "group_size": 32}
    ids = torch.tensor([1, 2])
    for turn in range(3):
        with emulator.run() as run:
            parts = op.quantize(weight, **form)
            op.dequantize(*parts, **form, dtype=torch.half)
            op.embedding(ids[:turn], *parts, **form, dtype=torch.half)
        if turn:
            names = [one.kernel for one in run.launches]
            assert names == ["quantize", "dequantize", "embedding"]
    assert len(made) == 3
    assert len(metal_library.compiled()) == 3


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_each_word_is_read_once_and_nothing_beyond(bits: int) -> None:
    parts = words_of(random_parts(bits, 64, torch.float16, "ordinary", (7,)))
    form: dict[str, Any] = {"bits": bits, "group_size": 64}
    kind = {**form, "dtype": torch.bfloat16}
    permutation = torch.rand(1024, generator=generator()).argsort().int()
    ids = torch.tensor([6, 1, 3])
    calls: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: op.dequantize(*parts, **kind), 3),
        (lambda: op.dequantize(*map(spread, parts), **kind), 3),
        (lambda: op.dequantize(*parts, permutation, **kind), 3),
        (lambda: op.embedding(ids, *parts, **kind), 4),
    ]
    for call, place in calls:
        call()  # checked by now
        for front in (False, True):
            with emulator.run(order="random", seed=1, trace=True, front=front) as run:
                y = call()
            (launch,) = run.launches
            words, scales, biases, *_ = launch.traffic
            rows = y.numel() // 1024
            assert words.load_bytes == rows * parts[0].shape[1] * 4
            # One of each for 16 codes, four times the same sector.
            assert scales.load_bytes == biases.load_bytes == y.numel() // 16 * 2
            assert launch.traffic[place].store_bytes == y.nbytes
            assert launch.traffic[place].loads == 0


def test_full_sectors() -> None:
    parts = words_of(random_parts(4, 64, torch.float16, "ordinary", (8,)))
    kind = {"bits": 4, "group_size": 64, "dtype": torch.float32}
    weight = op.dequantize(*parts, **kind)
    with emulator.run(trace=True) as run:
        op.dequantize(*parts, **kind)
        op.quantize(weight, bits=4, group_size=64)
    dequantized, quantized = run.launches[0], run.launches[-1]
    assert dequantized.traffic[0].load_sectors == parts[0].nbytes // 32
    assert quantized.traffic[0].load_sectors == weight.nbytes // 32


def test_threads(fresh: None) -> None:
    """Plans are made by several threads at once."""
    weights = [torch.randn(3 + i % 4, 64 * (1 + i % 3)) for i in range(24)]
    form = {"bits": 6, "group_size": 32}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda w: op.quantize(w, **form), weights))
    for weight, parts in zip(weights, results, strict=True):
        assert_same_bits(parts, words_of(layout.quantize(weight, **form)))


# ---- sources --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dequantize", "embedding", "quantize"])
@pytest.mark.parametrize(("bits", "group_size"), [(1, 16), (3, 256), (4, 64), (8, 128)])
def test_lint(family: str, bits: int, group_size: int) -> None:
    i = layout.BITS.index(bits)
    for dtype, scale_dtype in zip(
        WEIGHT_DTYPES, WEIGHT_DTYPES[i % 3 :] * 2, strict=False
    ):
        defines: dict[str, Any] = {"X_TYPE": dtype, "SCALE_TYPE": scale_dtype}
        if family == "embedding":
            defines["ID_TYPE"] = (torch.int32, torch.int64)[i % 2]
        flags = {"ALIGNED": i % 2, "X_VECTOR": i % 2, "PERMUTED": i // 2 % 2}
        wanted = metal_library.variant(
            family, bits=bits, group_size=group_size, **defines, **flags
        )
        assert not lint.lint(metal_library.source(wanted))


BROKEN = {
    "dequantize": [
        ("made_odd(nearest, rest)", "nearest"),
        ("bits + 1 : bits - 1", "bits - 1 : bits + 1"),
        ("code_at(words, i + 2)", "code_at(words, i + 1)"),
        ("chunk / (GROUP_SIZE / 16)", "chunk / (GROUP_SIZE / 8)"),
        ("expert * shape.scales_expert +", "0 +"),
        ("position.z", "0"),
    ],
    "embedding": [
        ("n >= shape.n", "n > shape.n"),
        ("n < 0 ||", "n < 1 ||"),
        ("n * shape.packed_row", "0 * shape.packed_row"),
        ("X(NAN)", "X(0.0f)"),
    ],
    "quantize": [
        ("rint((value", "round((value"),
        ("rint(edge", "floor(edge"),
        ("abs(low) > abs(high)", "abs(low) >= abs(high)"),
        ("1e-7f", "1e-6f"),
        ("finite ? values[i] : INFINITY", "values[i]"),
        ("float high = -INFINITY", "float high = 0.0f"),  # as MLX's kernel has it
        ("min(code, float(MASK))", "code"),
        ("step > 0", "step > 1"),
        ("i < OWNERS", "i < OWNERS - 1"),
    ],
}
BROKEN_CASES = [(f, *change) for f, changes in BROKEN.items() for change in changes]


@pytest.mark.parametrize(("family", "text", "wrong"), BROKEN_CASES)
def test_a_broken_kernel_is_found_on_first_use(
    family: str,
    text: str,
    wrong: str,
    fresh: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = metal_library.source

    def broken(variant: metal_library.Variant) -> str:
        whole = source(variant)
        assert text in whole
        return whole.replace(text, wrong)

    monkeypatch.setattr(metal_library, "source", broken)
    bits, group_size = 3, 64
    weight = torch.randn(4, 256, generator=generator()).half()
    parts = words_of(layout.quantize(weight, bits=bits, group_size=group_size))
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    ids = torch.tensor([1, 3])
    arguments = {
        "dequantize": (parts, {"dtype": torch.float16}),
        "embedding": ((ids, *parts), {"dtype": torch.float16}),
        "quantize": ((weight,), {}),
    }
    own, more = arguments[family]
    with pytest.raises(metal_library.KernelError, match=f"{family} \\(3 bits"):
        getattr(op, family)(*own, **form, **more)
    monkeypatch.setattr(settings, "strict", False)
    monkeypatch.setattr(tensor, "_logged", set())
    expected = ops.reference(family)(*own, **form, **more)
    with caplog.at_level(logging.WARNING, logger="affine_tensor"):
        for _ in range(2):
            assert_same_bits(getattr(op, family)(*own, **form, **more), expected)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "cannot be used on this machine" in line
    assert list(metal_library.compiled().values()) == [False]
