"""Quantize on emulated Metal: the words, scales and biases of `layout` and of MLX."""

from __future__ import annotations

import math
from typing import Any

import metal_emulator as emulator
import pytest
import torch
from test_layout import (
    FORMATS,
    MLX_GROUP_SIZES,
    assert_same_bits,
    hard_rows,
    mlx_quantize,
)
from torch import Tensor
from value_cases import (
    ORDERS,
    format_of,
    formats_with,
    generator,
    op,
    shifted,
    words_of,
)

from affine_tensor import layout
from affine_tensor.kernels.metal import values as metal_values
from affine_tensor.kernels.metal import values_check as metal_values_check
from affine_tensor.layout import WEIGHT_DTYPES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    formats_with(metafunc, "dtype", WEIGHT_DTYPES)


@pytest.fixture(autouse=True)
def metal(emulated_metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those on MPS, the emulator for Metal."""
    monkeypatch.setattr(metal_values, "_plans", {})


@pytest.fixture(scope="module")
def mx() -> Any:
    return pytest.importorskip("mlx.core")


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


def test_a_wide_grid(monkeypatch: pytest.MonkeyPatch) -> None:
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
