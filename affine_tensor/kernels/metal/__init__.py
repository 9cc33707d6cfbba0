"""Products with packed weights on MPS; `values` has what makes or reads the weights.

Each operator makes a plan from shapes, strides and dtypes: a compiled kernel, its grid and
its sizes. Plans are kept, so that a call is one look-up, one allocation and one enqueue.
Kernels take any row and column stride of x, and any row stride of the weight's parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...tensor import log_once
from .. import hub, settings
from . import check, tuning, values
from .library import Kernel, kernel
from .operands import Operands, Parts, check_bias, gather_operands, tidied
from .plans import choose, grid, variant_of

__all__ = ["grouped_linear", "grouped_matmul", "linear", "matmul", "reset"]


@dataclass(frozen=True)
class Plan:
    """What a call of one kind needs. Without a kernel the reference takes it."""

    kernel: Kernel | None
    threads: tuple[int, int, int] = (0, 0, 0)
    group_size: tuple[int, int, int] = (0, 0, 0)
    shape: tuple[int, ...] = ()
    out: tuple[int, ...] = ()
    tiles: bool = False  # the kernel leaves rows without an expert alone


_REFERENCE = Plan(None)
# Operands must be copied first, on each call.
_UNTIDY = Plan(None)

# As many as a server with prompts of all lengths may need, some MB.
_MOST_PLANS = 1 << 14
_plans: dict[Any, Plan] = {}


def reset() -> None:
    """Forget all plans, so that changed limits and settings hold."""
    _plans.clear()
    values.reset()


def _key(
    op: str,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    permutation: Tensor | None,
) -> tuple[Any, ...]:
    """All that a plan depends on, of what every product has.

    Offsets matter as far as wide loads need them aligned.
    """
    return (
        op,
        x.shape,
        x.stride(),
        x.dtype,
        x.storage_offset() % 8,
        packed.shape,
        packed.stride(),
        packed.storage_offset() % 4,
        scales.dtype,
        scales.shape,
        scales.stride(),
        biases.dtype,
        biases.shape,
        biases.stride(),
        None
        if permutation is None
        else (permutation.dtype, permutation.shape, permutation.stride()),
        settings.batch_invariant,
        settings.strict,
    )


def _keep(key: Any, plan: Plan) -> Plan:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def make_plan(operands: Operands, device: torch.device) -> Plan:
    """Choose, compile and check the kernel for a product."""
    if operands.untidy:
        return _UNTIDY
    product = operands.product
    empty = 0 in (product.m, product.n, product.k) or (
        product.grouping and not product.experts
    )
    if empty or not operands.served:
        return _REFERENCE
    choice = choose(
        product, tuning.limits(), tuning.chip().cores, settings.batch_invariant
    )
    tiles = choice.family.startswith("gemm")
    if tiles and product.experts:
        product = replace(product, grouping=2, gathered=product.grouping == 1)
        if product.gathered:  # ends are then made here
            product = replace(product, expert_type=torch.int64)

    def compare(_: object, made: Kernel) -> str | None:
        return check.compare(product, choice, made, device)

    made = kernel(variant_of(product, choice), compare)
    if made is None:
        return _REFERENCE
    threads, group_size = grid(product, choice)
    return Plan(made, threads, group_size, operands.shape, operands.out, tiles)


# ---- one matrix -----------------------------------------------------------------


@ops.register_kernel("linear", "mps")
def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    permutation: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """``x @ W.T + bias``; see `ops`."""
    form = {"bits": bits, "group_size": group_size, "dtype": dtype}
    parts = (packed, scales, biases, permutation)
    if settings.metal_backend == "hub":
        y = _by_hub("linear", x, parts, form)
        if y is not None:
            check_bias(bias, x, packed.shape[-2])
            return y if bias is None else y + bias
    own = None if bias is None else (bias.shape, bias.stride(), bias.dtype)
    key = (*_key("linear", x, *parts), own, bits, group_size, dtype)
    plan = _plans.get(key)
    if plan is None:
        operands = gather_operands("linear", x, parts, form, bias=bias)
        plan = _keep(key, make_plan(operands, x.device))
    if plan is _UNTIDY:
        return linear(*tidied(x, parts, bias, (None, None))[:6], **form)
    if plan.kernel is None:
        return _reference_linear(x, parts, bias, form)
    y = x.new_empty(plan.out)
    plan.kernel(
        packed,
        scales,
        biases,
        x,
        y,
        plan.shape,
        packed if permutation is None else permutation,
        x if bias is None else bias,
        threads=plan.threads,
        group_size=plan.group_size,
    )
    return y


def _reference_linear(
    x: Tensor, parts: Parts, bias: Tensor | None, form: dict[str, Any]
) -> Tensor:
    if bias is None or bias.dim() <= 2:
        return ops.reference("linear")(x, *parts, bias, **form)
    # Spread over the result, which `F.linear` does not take.
    rows = ops.reference("linear")(
        x.flatten(0, -2), *parts, bias.flatten(0, -2), **form
    )
    return rows.unflatten(0, x.shape[:-1])


@ops.register_kernel("matmul", "mps")
def matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    permutation: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """``x @ W``; see `ops`."""
    form = {"bits": bits, "group_size": group_size, "dtype": dtype}
    parts = (packed, scales, biases, permutation)
    if settings.metal_backend == "hub":
        y = _by_hub("matmul", x, parts, form)
        if y is not None:
            return y
    key = (*_key("matmul", x, *parts), bits, group_size, dtype)
    plan = _plans.get(key)
    if plan is None:
        operands = gather_operands("matmul", x, parts, form)
        plan = _keep(key, make_plan(operands, x.device))
    if plan is _UNTIDY:
        return matmul(*tidied(x, parts, None, (None, None))[:5], **form)
    if plan.kernel is None:
        return ops.reference("matmul")(x, *parts, **form)
    y = x.new_empty(plan.out)
    plan.kernel(
        packed,
        scales,
        biases,
        x,
        y,
        plan.shape,
        packed if permutation is None else permutation,
        threads=plan.threads,
        group_size=plan.group_size,
    )
    return y


def _by_hub(op: str, x: Tensor, parts: Parts, form: dict[str, Any]) -> Tensor | None:
    """The product by the Hub's kernels, or None; the log says why, once."""
    *weight, permutation = parts
    if permutation is not None or op not in ("linear", "matmul"):
        log_once(
            f"hub {op} {permutation is None}",
            "%s by our own kernels: those of the Hub know neither experts nor permuted "
            "columns here",
            op,
        )
        return None
    if x.dtype != form["dtype"]:
        return None  # refused, by the message of our own
    return hub.quantized_matmul(
        x,
        *weight,
        bits=form["bits"],
        group_size=form["group_size"],
        transpose=op == "linear",
    )


# ---- experts --------------------------------------------------------------------


@ops.register_kernel("grouped_linear", "mps")
def grouped_linear(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Each row of x times the transpose of its expert's matrix; see `ops`.

    An index that is no expert gives a row of NaN: to raise would need to wait.
    """
    return _grouped("grouped_linear", x, *args, **kwargs)


@ops.register_kernel("grouped_matmul", "mps")
def grouped_matmul(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Each row of x times its expert's matrix; see `ops` and `grouped_linear`."""
    return _grouped("grouped_matmul", x, *args, **kwargs)


def _grouped(
    op: str,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    permutation: Tensor | None = None,
    offsets: Tensor | None = None,
    indices: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    form: dict[str, Any] = {"bits": bits, "group_size": group_size, "dtype": dtype}
    parts = (packed, scales, biases, permutation)
    if settings.metal_backend == "hub":
        _by_hub(op, x, parts, form)
    groups = (offsets, indices)
    kind = tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in groups)
    key = (*_key(op, x, *parts), kind, bits, group_size, dtype)
    plan = _plans.get(key)
    if plan is None:
        operands = gather_operands(op, x, parts, form, groups=groups)
        plan = _keep(key, make_plan(operands, x.device))
    if plan is _UNTIDY:
        own = tidied(x, parts, None, groups)
        return _grouped(op, *own[:5], *own[6:], **form)
    if plan.kernel is None:
        return ops.reference(op)(x, *parts, offsets, indices, **form)
    experts, order = offsets, None
    if indices is not None:
        experts = indices
        if plan.tiles:
            experts, order = _sorted(indices, len(packed))
    y = _result(x, plan, order)
    extra: list[Tensor | None] = [packed if permutation is None else permutation]
    if op == "grouped_linear":
        extra.append(x)  # in place of the linear bias
    extra.append(experts)
    if plan.tiles:
        # The kernel's own type, never read without an order.
        extra.append(experts if order is None else order)
    plan.kernel(
        packed,
        scales,
        biases,
        x,
        y,
        plan.shape,
        *extra,
        threads=plan.threads,
        group_size=plan.group_size,
    )
    return y


def _sorted(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Where each expert's rows end once sorted, and the rows in that order, int64 both.

    Rows whose index is no expert come last, behind all ends.
    """
    valid = (indices >= 0).logical_and_(indices < experts)
    own, order = indices.where(valid, experts).sort(stable=True)
    numbers = torch.arange(experts, device=indices.device, dtype=indices.dtype)
    return torch.searchsorted(own, numbers, right=True), order


def _result(x: Tensor, plan: Plan, order: Tensor | None) -> Tensor:
    """Tiles do not reach rows without an expert: those must be there before."""
    if not plan.tiles:
        return x.new_empty(plan.out)
    if order is None:
        return x.new_zeros(plan.out)
    return x.new_full(plan.out, float("nan"))
