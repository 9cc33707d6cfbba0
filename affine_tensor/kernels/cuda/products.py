"""From the operands of a product to the launch of its kernel.

What is found for one combination of shapes, strides, dtypes and settings is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import settings
from . import check, compiler, library, plans
from .launch import Launch
from .launch import function as load
from .library import Parts
from .plans import Plan, Product

Form = dict[str, Any]  # bits, group_size, dtype

_POINTER = None


class Call:
    """What a call of one kind needs: a launch, or a function that does it otherwise.

    out: the shape of the result, and its strides.
    """

    __slots__ = ("launch", "otherwise", "out", "strides")

    def __init__(
        self,
        launch: Launch | OrderedLaunch | None,
        out: tuple[int, ...] = (),
        otherwise: Callable[..., Tensor] | None = None,
    ) -> None:
        self.launch, self.out, self.otherwise = launch, out, otherwise
        self.strides = torch.empty(out, device="meta").stride()


# As many as a server with prompts of all lengths may need, some MB.
_MOST_CALLS = 1 << 14
calls: dict[Any, Call] = {}


def keep(key: Any, call: Call) -> Call:
    """Have `calls` find it, unless its kernel could not be checked."""
    if len(calls) >= _MOST_CALLS:
        calls.clear()
    if not library.capturing():
        calls[key] = call
    return call


def row_stride(x: Tensor) -> int | None:
    """The distance of x's rows, or None where they do not follow at one distance."""
    strides, sizes = x.stride(), x.shape
    if strides[-1] != 1 and sizes[-1] != 1:
        return None
    kept = [i for i in range(x.dim() - 1) if sizes[i] != 1]
    for outer, inner in pairwise(kept):
        if strides[outer] != strides[inner] * sizes[inner]:
            return None
    return strides[kept[-1]] if kept else sizes[-1]


def product_of(
    x: Tensor,
    parts: Parts,
    form: Form,
    *,
    biased: bool = False,
    grouping: int = 0,
    transposed: bool = False,
) -> Product:
    """The product of tidy operands, where x has its rows at one distance."""
    packed, scales, biases = parts
    device, row = x.get_device(), row_stride(x)
    assert row is not None
    x_bytes = row * x.itemsize
    words = [stride * packed.itemsize for stride in packed.stride()[:-1]]
    pairs = [stride * scales.itemsize for stride in scales.stride()[:-1]]
    return Product(
        m=x.numel() // x.shape[-1],
        n=packed.shape[-2],
        k=scales.shape[-1] * form["group_size"],
        bits=form["bits"],
        group_size=form["group_size"],
        dtype=x.dtype,
        scale_dtype=scales.dtype,
        biased=biased,
        experts=len(packed) if grouping else 0,
        grouping=grouping,
        x_alignment=plans.alignment(x.data_ptr(), x_bytes),
        packed_alignment=plans.alignment(packed.data_ptr(), *words),
        scale_alignment=plans.alignment(scales.data_ptr(), biases.data_ptr(), *pairs),
        invariant=settings.batch_invariant,
        transposed=transposed,
        capability=library.capability(device),
        multiprocessors=library.multiprocessors(device),
        shared=library.shared_bytes(device),
    )


def launch_of(
    product: Product, x: Tensor, packed: Tensor, scales: Tensor
) -> Launch | OrderedLaunch | None:
    """The launch of a product on the current device, or None if it is to be dense.

    It is called with the stream and the addresses of x, packed, scales, biases, bias, y
    and experts; 0 stands for what there is not.
    """
    if settings.cuda_backend != "own":
        return None
    plan = plans.choose(product)
    if plan is None:
        return None
    device = x.get_device()

    def run(made: int, own: Plan, small: Product, *tensors: Any) -> None:
        there = (tensors[0], tensors[1], tensors[2])
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        launch(own, small, *there, made, device)(library.stream_of(device), *pointers)

    def compare(made: int) -> str | None:
        return check.compare(plan, product, made, run, library.device(device))

    made = library.function(
        plan.source, plan.entry, plan.defines, device, compare, plan.shared
    )
    return (
        None if made is None else launch(plan, product, x, packed, scales, made, device)
    )


@cache
def _order(source: str, defines: Any, capability: tuple[int, int], device: int) -> int:
    """The kernel of a product's source that puts x into order."""
    return load(compiler.image(source, defines, capability), "affine_order", device)


class OrderedLaunch:
    """Two launches: one puts x into the order that the other reads."""

    __slots__ = ("_order", "_product", "_scratch")

    def __init__(self, order: Launch, product: Launch, size: int, device: int) -> None:
        self._order, self._product = order, product
        self._scratch = ((size // 4,), library.device(device))

    def __call__(self, stream: int, x: int, *others: int) -> None:
        shape, device = self._scratch
        ordered = torch.empty(shape, dtype=torch.int32, device=device)
        self._order(stream, x, ordered.data_ptr())
        self._product(stream, ordered.data_ptr(), *others)


def launch(
    plan: Plan,
    product: Product,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    function: int,
    device: int,
) -> Launch | OrderedLaunch:
    """A plan's launch. Every kernel of products has the same arguments."""
    row = row_stride(x)
    assert row is not None
    experts = packed.dim() == 3
    strides = (packed.stride(0), scales.stride(0)) if experts else (0, 0)
    ordered = plan.ordered
    arguments = (
        *(_POINTER, ("q", row if ordered is None else ordered.tokens)),
        *(_POINTER, ("q", packed.stride(-2))),
        *(_POINTER, _POINTER, ("q", scales.stride(-2))),
        *(_POINTER, _POINTER),
        *(("i", product.m), ("i", product.n), ("i", product.k)),
        *(("q", strides[0]), ("q", strides[1])),
        *(_POINTER, ("i", product.experts)),
    )
    made = Launch(
        function,
        device,
        plan.grid,
        plan.block,
        arguments,
        plan.shared,
        plan.cluster,
        plan.pdl,
    )
    if ordered is None:
        return made
    order = Launch(
        _order(plan.source, plan.defines, product.capability, device),
        device,
        ordered.grid,
        ordered.block,
        (
            *(_POINTER, ("q", row), _POINTER),
            *(("i", product.m), ("i", product.k), ("i", ordered.tokens)),
        ),
        overlap=plan.pdl,
    )
    return OrderedLaunch(order, made, ordered.size, device)
