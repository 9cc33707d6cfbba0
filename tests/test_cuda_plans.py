"""What kernels.cuda.plans chooses fits the device, whatever the product."""

from __future__ import annotations

import itertools

import pytest
import torch

from affine_tensor import layout
from affine_tensor.kernels.cuda import plans
from affine_tensor.kernels.cuda.plans import Plan, Product

# Capability, multiprocessors, shared bytes of a block: A100, RTX 4090, H200, B200.
DEVICES = [
    ((8, 0), 108, 166912),
    ((8, 9), 128, 101376),
    ((9, 0), 132, 232448),
    ((10, 0), 148, 232448),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def columns(bits: int, group: int, about: int) -> int:
    unit = group
    while unit * bits % 32:
        unit += group
    return max(1, about // unit) * unit


def fits(plan: Plan, product: Product) -> None:
    threads, own = plan.block[0], dict(plan.defines)
    assert plan.shared <= product.shared
    assert threads % 32 == 0
    assert threads <= 1024
    assert plan.grid[0] > 0
    assert max(plan.grid[1:]) <= 65535
    assert own["PDL"] == plan.pdl
    assert all(type(value) is int for value in own.values())
    if product.capability < (9, 0):
        assert plan.cluster == (1, 1, 1)
        assert not plan.pdl
    if plan.entry == "affine_gemv":
        assert threads == 32 * own["WARPS"]
        assert plan.grid[1] * own["TOKENS"] >= product.m
    elif plan.entry == "affine_mma":
        assert own["KS"] % (64 * own["WK"]) == 0
        assert threads % (own["KS"] // 8) == 0
        assert threads % max(1, own["KS"] // own["GROUP"]) == 0
        assert plan.grid[0] * 16 * own["MT"] * own["WN"] >= product.n
        assert plan.grid[1] == own["CK"] == plan.cluster[1]
        assert plan.grid[2] * 8 * own["NT"] >= product.m
        # Weights of another dtype may not fit into float16.
        assert own["SUMS"] or own["X"] != 1 or own["S"] == own["X"]
    else:
        assert plan.entry == "affine_wgmma"
        assert product.capability == (9, 0)
        assert product.aligned
        assert own["STAGES"] > own["TURNS"]
        assert own["DEPTH"] >= 2
        assert own["X"] != 1 or own["S"] == own["X"]
        assert plan.grid[0] * 64 * own["WARPGROUPS"] >= product.n
        assert plan.grid[1] == own["SPLIT"] == plan.cluster[1] <= 8
        assert plan.grid[2] * own["TOKENS"] == plan.ordered.tokens >= product.m
        columns_of_stages = -(-product.k // 128) * 128
        assert plan.ordered.size == plan.ordered.tokens * columns_of_stages * 2
        # A thread of affine_order takes 16 columns of a token.
        places = plan.ordered.tokens * columns_of_stages // 16
        assert plan.ordered.grid[0] * plan.ordered.block[0] >= places


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm_{d[0][0]}{d[0][1]}")
@pytest.mark.parametrize("bits", layout.BITS)
def test_plans_fit_the_device(bits: int, device: tuple) -> None:
    capability, multiprocessors, shared = device
    for group, m, n, about, dtype, scales, grouping in itertools.product(
        layout.GROUP_SIZES,
        (1, 2, 3, 8, 24, 70, 128, 1000),
        (1, 4096, 128256),
        (1, 4096, 60000),
        DTYPES,
        (torch.bfloat16, torch.float32),
        (0, 1, 2),
    ):
        product = Product(
            m=m,
            n=n,
            k=columns(bits, group, about),
            bits=bits,
            group_size=group,
            dtype=dtype,
            scale_dtype=scales,
            experts=8 if grouping else 0,
            grouping=grouping,
            capability=capability,
            multiprocessors=multiprocessors,
            shared=shared,
        )
        plan = plans.choose(product)
        if plan is not None:
            fits(plan, product)
        elif about < 60000 and m <= 16 and grouping != 2:
            raise AssertionError(f"no plan for {product}")


def test_alignments_follow_from_sizes_too() -> None:
    product = Product(1, 8, 48, 4, 16, torch.bfloat16, torch.bfloat16)
    assert not product.aligned  # rows of 24 bytes
    assert product.scale_bytes == 2
    assert product.x_aligned
    assert plans.alignment(0, 32, 72) == 8
    assert plans.alignment(1 << 40, 4096) == 16


def test_nothing_to_do_and_older_devices_have_no_plan() -> None:
    kind = (64, 4, 32, torch.bfloat16, torch.bfloat16)
    assert plans.choose(Product(0, 8, *kind)) is None
    plan = plans.choose(Product(1, 8, 1 << 18, *kind[1:]))
    assert plan is not None
    assert plan.entry == "affine_mma"
    assert plans.choose(Product(1, 8, *kind, capability=(7, 5))) is None
    assert plans.choose(Product(300, 8, *kind)) is None
    assert plans.choose(Product(200, 8, *kind, capability=(8, 0))) is None
    assert plans.choose(Product(200, 8, *kind)).entry == "affine_wgmma"
    assert plans.choose(Product(200, 8, *kind, invariant=True)) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [40, 1024, 14336])
def test_sums_of_invariant_products_are_alike(n: int, dtype: torch.dtype) -> None:
    names = ("UNITS", "WARPS", "KS", "WK", "CK", "SUMS")
    orders = set()
    for m in (1, 2, 3, 16, 40, 500):
        product = Product(m, n, 4096, 4, 64, dtype, dtype, invariant=True)
        plan = plans.choose(product)
        assert plan is not None
        own = dict(plan.defines)
        orders.add((plan.entry, *(own.get(name) for name in names)))
    assert len(orders) == 1


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm_{d[0][0]}{d[0][1]}")
@pytest.mark.parametrize("bits", layout.BITS)
def test_invariant_products_never_change_kernels(bits: int, device: tuple) -> None:
    capability, multiprocessors, shared = device
    for group, scales in itertools.product(
        layout.GROUP_SIZES, (torch.bfloat16, torch.float32)
    ):
        entries = set()
        for m in (1, 16, 48, 49, 64, 200, 3000):
            product = Product(
                m=m,
                n=4096,
                k=columns(bits, group, 4096),
                bits=bits,
                group_size=group,
                dtype=torch.bfloat16,
                scale_dtype=scales,
                invariant=True,
                capability=capability,
                multiprocessors=multiprocessors,
                shared=shared,
            )
            plan = plans.choose(product)
            own = dict(plan.defines) if plan else {}
            entries.add((plan and plan.entry, own.get("KS"), own.get("WK")))
        assert len(entries) == 1, (group, scales)
