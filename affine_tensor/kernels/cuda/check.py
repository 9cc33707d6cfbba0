"""The check of a product's kernel on first use: a smaller product, against float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ... import layout
from . import plans
from .library import Parts
from .plans import Plan, Product

# Launches a function as a plan of a product says, for x, packed, scales, biases, bias, y
# and experts.
Run = Callable[..., None]

_ROWS = 256  # of W; tiles of all plans divide it
_TOKENS = 64  # of x; where a plan's tiles have more, as many
_EXPERTS = 3


def compare(
    plan: Plan, product: Product, function: int, run: Run, device: torch.device
) -> str | None:
    """What a kernel computes wrongly, if anything. The last row of x has no expert."""
    plan, product = smaller(plan, product)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(product.dtype).to(device)

    parts = _weight(product, generator, device)
    columns = (product.k, product.n)
    taken, made_columns = reversed(columns) if product.transposed else columns
    x = random(product.m, taken)
    bias = random(product.n) if product.biased else None
    y = x.new_full((product.m, made_columns), float("nan"))
    owners = torch.arange(product.m) * product.experts // max(1, product.m - 1)
    groups = None
    if product.grouping == 1:
        groups = owners.to(device)
    elif product.grouping == 2:
        numbers = torch.arange(product.experts)
        groups = torch.searchsorted(owners, numbers, right=True).to(device)
    run(function, plan, product, x, *parts, bias, y, groups)
    dense = layout.dequantize(
        *parts,
        bits=product.bits,
        group_size=product.group_size,
        dtype=torch.float64,
    )
    return _difference(x, dense, bias, y, owners.to(device), product)


def smaller(plan: Plan, product: Product) -> tuple[Plan, Product]:
    """The same kernel, for fewer rows of W and x, and fewer experts."""
    experts = min(product.experts, _EXPERTS)
    small = replace(
        product,
        n=_as_even(product.n, _ROWS),
        m=_as_even(product.m, max(_TOKENS, dict(plan.defines).get("TOKENS", 0))),
        experts=experts,
    )
    # The planner of the family gets the sizes that the definitions name.
    planner = getattr(plans, plan.entry.removeprefix("affine_") + "_plan", None)
    if planner is None:
        return plan, product
    names = inspect.signature(planner).parameters
    own = {n.lower(): value for n, value in plan.defines if n.lower() in names}
    made = planner(small, **own)
    if made is None or made.defines != plan.defines:
        return plan, product
    return made, small


def _as_even(count: int, unit: int) -> int:
    """Fewer than two units more than `count` divided by the unit leaves."""
    return count if count < 2 * unit else count % unit + unit


def _weight(
    product: Product, generator: torch.Generator, device: torch.device
) -> Parts:
    lead = (product.experts, product.n) if product.grouping else (product.n,)
    shape = (*lead, product.k * product.bits // 32)
    words = torch.randint(
        -(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int32
    )
    groups = (*lead, product.k // product.group_size)
    scales = torch.rand(groups, generator=generator).add_(0.5)
    scales /= 1 << product.bits
    biases = torch.randn(groups, generator=generator).div_(8).sub_(0.5)
    own = product.scale_dtype
    return words.to(device), scales.to(own).to(device), biases.to(own).to(device)


def _difference(
    x: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    y: Tensor,
    owners: Tensor,
    product: Product,
) -> str | None:
    """How y is not x times the weight, if so."""
    if product.grouping:
        wanted = x.new_zeros(y.shape, dtype=torch.float64)
        for expert, matrix in enumerate(dense):
            rows = owners == expert
            own = matrix if product.transposed else matrix.T
            wanted[rows] = x[rows].double() @ own
        homeless = (owners == len(dense)).unsqueeze(-1)
        good = y.isnan() if product.grouping == 1 else y == 0
        if not bool((good | ~homeless).all()):
            return "rows without an expert are not as they should be"
        y = y.masked_fill(homeless, 0)
    else:
        wanted = x.double() @ (dense if product.transposed else dense.T)
    if bias is not None:
        wanted += bias
    error = float((y.double() - wanted).norm() / wanted.norm())
    # 1.5 roundings are a third of the distance of two numbers.
    if not error < 0.6 * torch.finfo(product.dtype).eps + 2e-6:
        return f"the relative error is {error:.1e}"
    return None
