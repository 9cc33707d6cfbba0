"""Products with packed weights on the emulated device, against float64.

Two conditions: the L2 error is at most 1.5 times that of rounding the exact result once,
and each element's error at most u |y| + 32 * 2^-24 * sum |x w|, u the unit of the dtype.
For float32, sums in float32 cannot meet the first; `FLOAT_LIMITS` has what holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import metal_emulator as emulator
import pytest
import torch
import torch.nn.functional as F
from emulated import EmulatedMetal
from product_cases import (
    BITS,
    GROUPS,
    KERNELS,
    LONG_SUMS,
    OPERATORS,
    all_of,
    sample,
    tile_shapes,
)
from products import LARGEST, Case, complaint, complaint_of_any_schedule, launch, make
from torch import Tensor

from affine_tensor import AffineQuantizedTensor

M = (1, 2, 3, 5, 8, 9, 16, 17, 33, 49, 70, 130)
N = (1, 3, 7, 8, 9, 31, 33, 64, 100)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "tile_shape" in metafunc.fixturenames:
        metafunc.parametrize("tile_shape", tile_shapes(full), ids=str)
    if "kernel" in metafunc.fixturenames:
        everything: list[Any] = list(product(KERNELS, BITS, GROUPS))
        if not full:
            mark = pytest.mark.skip(reason="all formats run with --full")
            everything = [pytest.param("all", 0, 0, marks=mark)]
        metafunc.parametrize(("kernel", "bits", "group"), everything)


@pytest.fixture(autouse=True, scope="module")
def largest(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --full, the largest errors are printed at the end."""
    yield
    if request.config.getoption("--full"):
        lines = ["", "| kernel | dtype | products | L2 ratio | of the bound | drift |"]
        lines.append("|---|---|---|---|---|---|")
        for (kernel, name), (count, most) in sorted(LARGEST.items()):
            numbers = f"{most.ratio:.6f} | {most.worst:.3f} | {most.drift:.2f}"
            lines.append(f"| {kernel} | {name} | {count} | {numbers} |")
        capture = request.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print("\n".join(lines))


def check(case: Case, device: EmulatedMetal) -> Tensor:
    inputs = make(case)
    device.limits(**dict(case.limits))
    y, kernel = launch(inputs)
    wrong = complaint(inputs, y, kernel)
    assert wrong is None, f"{wrong}: {case}"
    return y


@pytest.mark.parametrize(
    "case", [case for op in OPERATORS for case in sample(op)], ids=str
)
def test_sample(case: Case, emulated_metal: EmulatedMetal) -> None:
    check(case, emulated_metal)


def test_tile_shape(tile_shape: Case, emulated_metal: EmulatedMetal) -> None:
    """Traced, in any order of lanes: no race, nothing out of bounds, the same bits."""
    inputs = make(tile_shape)
    emulated_metal.limits(**dict(tile_shape.limits))
    assert complaint_of_any_schedule(inputs) is None


@pytest.mark.parametrize("m", M)
@pytest.mark.parametrize("op", OPERATORS)
def test_sizes(op: str, m: int, emulated_metal: EmulatedMetal) -> None:
    experts = {"experts": 3, "rows": "ends int32"} if op.startswith("grouped") else {}
    for n in N:
        check(Case(op=op, m=m, n=n, k=96, bits=3, group=32, **experts), emulated_metal)


@pytest.mark.parametrize(
    "x",
    [
        "offset4",
        "constant",
        "3d",
        "3d wide",
        "3d swapped",
        "3d expanded",
        "expanded",
        "wide",
        "offset2",
        "4d",
    ],
)
@pytest.mark.parametrize("m", [6, 20])
@pytest.mark.parametrize("op", ["linear", "matmul"])
def test_layouts_of_x(op: str, m: int, x: str, emulated_metal: EmulatedMetal) -> None:
    check(Case(op=op, m=m, n=31, k=192, x=x), emulated_metal)


@pytest.mark.parametrize("case", LONG_SUMS, ids=str)
def test_long_sums(case: Case, emulated_metal: EmulatedMetal) -> None:
    check(case, emulated_metal)


@pytest.mark.parametrize(
    ("op", "m"), [("linear", 3), ("linear", 20), ("matmul", 3), ("matmul", 20)]
)
def test_a_row_of_nan_stays_alone(
    op: str, m: int, emulated_metal: EmulatedMetal
) -> None:
    inputs = make(Case(op=op, m=m, n=9, k=96, bits=3, group=32))
    inputs.x[1] = float("nan")
    inputs.exact[1] = float("nan")
    y, kernel = launch(inputs)
    assert complaint(inputs, y, kernel) is None


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows(shape: tuple[int, ...], emulated_metal: EmulatedMetal) -> None:
    weight = make(Case(n=7, k=64)).parts
    form = {"bits": 4, "group_size": 64, "dtype": torch.half}
    with emulator.run() as run:
        x = torch.zeros(*shape, 64, dtype=torch.half)
        assert torch.ops.affine_tensor.linear(x, *weight, **form).shape == (*shape, 7)
        x = torch.zeros(*shape, 7, dtype=torch.half)
        assert torch.ops.affine_tensor.matmul(x, *weight, **form).shape == (*shape, 64)
    assert not run.launches


@pytest.mark.parametrize("op", ["grouped_linear", "grouped_matmul"])
@pytest.mark.parametrize("tiles", [1, 64])
def test_rows_without_experts(
    op: str, tiles: int, emulated_metal: EmulatedMetal
) -> None:
    """Past the last end: zeros. An index that is no expert: NaN, as nothing can raise."""
    emulated_metal.limits(rows_per_expert=tiles)
    inputs = make(Case(op=op, m=6, n=32, k=64, group=32, experts=3, rows="ends int64"))
    wide = 64 if op == "grouped_linear" else 32
    x = torch.full((6, wide), float("nan"), dtype=torch.half)
    for none in (
        {"offsets": torch.zeros(3).long()},
        {"indices": torch.tensor([-1] * 6)},
    ):
        inputs.x, inputs.extra = x, none
        y, kernel = launch(inputs)
        assert kernel
        assert bool((y == 0).all() if "offsets" in none else y.isnan().all())
    inputs.x, inputs.extra = x[:0], {"offsets": torch.zeros(3).long()}
    assert inputs().shape == (0, 96 - wide)


def test_float64_is_left_to_the_reference(emulated_metal: EmulatedMetal) -> None:
    inputs = make(Case(m=3, n=7, k=64))
    inputs.x = inputs.x.double()
    y, kernel = launch(inputs)
    assert not kernel
    torch.testing.assert_close(y, inputs.exact)


def test_through_the_tensor(emulated_metal: EmulatedMetal) -> None:
    """F.linear, @ and their like on the packed weight."""
    inputs = make(Case(m=6, n=40, k=128, bits=5, group=32, x="3d", bias="row"))
    packed, scales, biases, _ = inputs.parts
    weight = AffineQuantizedTensor.from_packed(
        packed, scales, biases, bits=5, group_size=32, dtype=torch.half
    )
    x, bias = inputs.x, inputs.extra["bias"]
    with emulator.run() as run:
        assert complaint(inputs, F.linear(x, weight, bias), "gemv_small") is None
        without = F.linear(x, weight)
        assert torch.equal(x @ weight.mT, without)
        assert torch.equal(torch.matmul(x, weight.t()), without)
        assert (without @ weight).shape == x.shape
    names = {launch.kernel for launch in run.launches}
    assert names == {"gemv_small", "gemm_n"}


def test_all(kernel: str, bits: int, group: int, emulated_metal: EmulatedMetal) -> None:
    """All formats, dtypes and kernels, with --full."""
    for case in all_of(kernel, bits, group):
        check(case, emulated_metal)
