"""The kernels of CUDA products, emulated on a CPU, against float64."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import product_emulator as emulator
import pytest
import torch
from torch import Tensor

from affine_tensor import layout
from affine_tensor.kernels.cuda import plans
from affine_tensor.kernels.cuda.plans import Plan, Product

pytestmark = pytest.mark.skipif(
    emulator.compiler() is None, reason="the emulator needs a C++ compiler"
)

BFLOAT, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
# Relative, in the 2-norm: what one rounding of random numbers costs.
ROUNDING = {BFLOAT: 1.65e-3, HALF: 2.07e-4, SINGLE: 4e-7}


def operands(product: Product, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = (product.experts,) if product.experts else ()
    n, k, bits = product.n, product.k, product.bits
    groups = (*lead, n, k // product.group_size)
    words = (*lead, n, k * bits // 32)
    scales = (torch.rand(groups, generator=generator) + 0.5) / (1 << bits)
    biases = torch.randn(groups, generator=generator) / 8 - 0.5
    made = {
        "x": torch.randn(
            product.m, n if product.transposed else k, generator=generator
        ).to(product.dtype),
        "packed": torch.randint(
            -(1 << 31), 1 << 31, words, generator=generator, dtype=torch.int64
        ).to(torch.int32),
        "scales": scales.to(product.scale_dtype),
        "biases": biases.to(product.scale_dtype),
    }
    if product.biased:
        made["bias"] = torch.randn(n, generator=generator).to(product.dtype)
    if product.grouping == 1:
        made["experts"] = torch.randint(
            0, product.experts, (product.m,), generator=generator
        )
    elif product.grouping == 2:
        ends = torch.randint(0, product.m + 1, (product.experts,), generator=generator)
        made["experts"] = ends.sort().values
    return made


def reference(product: Product, made: dict[str, Tensor]) -> Tensor:
    dense = layout.dequantize(
        made["packed"].view(torch.uint32),
        made["scales"],
        made["biases"],
        bits=product.bits,
        group_size=product.group_size,
        dtype=torch.float64,
    )
    x = made["x"].double()
    if product.transposed:
        dense = dense.mT
    if not product.experts:
        return x @ dense.T + made.get("bias", torch.zeros(())).double()
    owners = made["experts"]
    if product.grouping == 2:
        owners = torch.searchsorted(owners, torch.arange(product.m), right=True)
    y = x.new_zeros(product.m, dense.shape[-2])
    for row, owner in enumerate(owners.tolist()):
        if owner < product.experts:
            y[row] = dense[owner] @ x[row]
    return y


def check(product: Product, plan: Plan | None, **how: Any) -> Tensor:
    assert plan is not None
    made = operands(product)
    y = emulator.run(plan, **made, **how)
    wanted = reference(product, made)
    error = float((y.double() - wanted).norm())
    # Weights and results are rounded; few numbers may do worse than all.
    allowed = 1.5 * (1 + 4 / y.numel() ** 0.5) * ROUNDING[product.dtype]
    assert error <= allowed * float(wanted.norm()), (error / wanted.norm(), plan)
    return y


def columns(bits: int, group: int, about: int) -> int:
    unit = group
    while unit * bits % 32:
        unit += group
    return max(1, about // unit) * unit


def drawn(family: str, seed: int) -> tuple[Product, Plan, dict[str, Any]]:
    """A product of any kind, and one of its plans. Seeds of a family have all bits."""
    r = random.Random(f"{family} {seed}")
    bits = layout.BITS[seed % 7]
    group = layout.GROUP_SIZES[seed % 5]
    gemv, transposed = family == "gemv", family == "matmul"
    dtype = r.choice((BFLOAT, HALF) if family == "mma" else (BFLOAT, HALF, SINGLE))
    grouping = r.choice((0, 0, 1 if gemv else 2))
    k = columns(bits, group, r.randint(40, 1300))
    product = Product(
        m=r.choice((1, 2, 3, 5) if gemv else (2, 7, 8, 9, 17, 24, 40, 70)),
        n=r.randint(1, 70 if gemv else 140),
        k=k,
        bits=bits,
        group_size=group,
        dtype=dtype,
        scale_dtype=r.choice((SINGLE, HALF, BFLOAT, dtype, dtype)),
        biased=not grouping and not transposed and r.random() < 0.5,
        experts=r.choice((1, 3, 40)) if grouping else 0,
        grouping=grouping,
        x_alignment=r.choice((16, 16, 2)),
        packed_alignment=r.choice((16, 16, 4)),
        capability=r.choice(((8, 0), (9, 0))),
        multiprocessors=r.choice((1, 2, 132)),
        transposed=transposed,
    )
    found = list(getattr(plans, f"{family}_plans")(product))
    how = {"order": r.randint(0, 4), "late": r.random() < 0.5}
    return product, r.choice(found), how


@pytest.mark.parametrize("seed", range(14))
@pytest.mark.parametrize("family", ["gemv", "mma", "matmul"])
def test_products_of_all_kinds(family: str, seed: int) -> None:
    product, plan, how = drawn(family, seed)
    check(product, plan, **how)


@pytest.mark.parametrize(
    ("m", "dtype"), [(1, BFLOAT), (8, BFLOAT), (24, BFLOAT), (8, HALF), (3, SINGLE)]
)
def test_the_order_of_threads_changes_nothing(m: int, dtype: torch.dtype) -> None:
    product = Product(m, 40, 1088, 4, 64, dtype, dtype, multiprocessors=1)
    plan = plans.choose(product)
    first = check(product, plan)
    for order, late in ((1, True), (2, False), (3, True)):
        assert torch.equal(check(product, plan, order=order, late=late), first)


def test_rows_without_an_expert() -> None:
    product = Product(
        3, 20, 128, 4, 32, BFLOAT, BFLOAT, experts=2, grouping=1, multiprocessors=1
    )
    made = operands(product)
    made["experts"] = torch.tensor([1, 2, -1])
    plan = plans.choose(product)
    assert plan is not None
    y = emulator.run(plan, **made)
    assert not y[0].isnan().any()
    assert y[1:].isnan().all()

    product = replace(product, grouping=2)
    made["experts"] = torch.tensor([0, 2])
    plan = plans.choose(product)
    assert plan is not None
    y = emulator.run(plan, **made)
    assert (y[:2] != 0).any(-1).all()
    assert (y[2] == 0).all()


@pytest.mark.parametrize("dtype", [BFLOAT, SINGLE])
def test_the_transposed_product_of_experts(dtype: torch.dtype) -> None:
    product = Product(
        *(70, 300, 192, 4, 64, dtype, dtype),
        experts=3,
        grouping=2,
        transposed=True,
    )
    made = operands(product)
    made["experts"] = torch.tensor([40, 40, 66])
    plan = plans.choose(product)
    assert plan is not None
    y = emulator.run(plan, **made)
    wanted = reference(product, made)
    error = (y.double() - wanted).norm()
    assert error <= 1.5 * ROUNDING[dtype] * wanted.norm()
    assert (y[66:] == 0).all()
    for order, late in ((1, True), (2, False), (3, True)):
        assert torch.equal(emulator.run(plan, **made, order=order, late=late), y)


@pytest.mark.parametrize("dtype", [BFLOAT, SINGLE])
def test_inputs_of_very_different_sizes(dtype: torch.dtype) -> None:
    product = Product(1, 16, 512, 4, 64, dtype, SINGLE)
    made = operands(product)
    made["x"] *= torch.logspace(-3, 3, 512).to(dtype)[torch.randperm(512)]
    plan = plans.choose(product)
    assert plan is not None
    y, wanted = emulator.run(plan, **made), reference(product, made)
    assert (y.double() - wanted).norm() <= 1.5 * ROUNDING[dtype] * wanted.norm()
    made["x"][0, 3] = float("inf")
    assert not emulator.run(plan, **made).isfinite().any()
    made["x"].zero_()
    assert (emulator.run(plan, **made) == 0).all()


@pytest.mark.parametrize("dtype", [BFLOAT, SINGLE])
def test_rows_do_not_depend_on_how_many_there_are(dtype: torch.dtype) -> None:
    product = Product(11, 40, 576, 5, 32, dtype, dtype, invariant=True)
    plan = plans.choose(product)
    assert plan is not None
    made = operands(product)
    together = emulator.run(plan, **made)
    for row in (0, 6, 10):
        own = plans.choose(replace(product, m=1))
        assert own is not None
        alone = emulator.run(own, **{**made, "x": made["x"][row : row + 1]})
        assert torch.equal(alone[0], together[row])


def test_reads_beyond_a_buffer_are_seen() -> None:
    product = Product(1, 16, 512, 4, 64, BFLOAT, BFLOAT)
    plan = plans.choose(product)
    assert plan is not None
    made = operands(product)
    made["packed"] = made["packed"][:8]
    with pytest.raises(emulator.EmulatorError, match="in no buffer"):
        emulator.run(plan, **made, rows=16)
