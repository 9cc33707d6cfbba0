"""The operands of a product: checked, and put into the form that kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ... import layout, ops
from .library import TYPE_NAMES
from .plans import Product


@dataclass(frozen=True)
class Operands:
    """What a plan is made from.

    `untidy`: some of them lie in memory as no kernel takes them; the call begins again
    with what `tidied` makes of them. `served` is False for what only the reference does.
    """

    product: Product
    shape: tuple[int, ...]  # `Shape` in affine.h
    out: tuple[int, ...]
    untidy: bool
    served: bool


Parts = tuple[Tensor, Tensor, Tensor, "Tensor | None"]
Groups = tuple["Tensor | None", "Tensor | None"]


def gather_operands(
    op: str,
    x: Tensor,
    parts: Parts,
    form: dict[str, Any],
    *,
    bias: Tensor | None = None,
    groups: Groups = (None, None),
) -> Operands:
    """Check the operands as the reference does, and describe them.

    `form`: bits, group_size, dtype. `groups`: offsets and indices of experts.
    """
    packed, scales, biases, permutation = parts
    grouped, transposed = op.startswith("grouped"), op.endswith("matmul")
    n, k = packed.shape[-2], scales.shape[-1] * form["group_size"]
    if grouped:
        ops.check_groups(x, packed, *groups, op)
    else:
        ops.check_matrix(packed, op)
    ops.check_input(x, n if transposed else k, form["dtype"], op)
    layout.check_parts(
        packed, scales, biases, bits=form["bits"], group_size=form["group_size"]
    )
    _check_permutation(permutation, scales, k, op)
    check_bias(bias, x, n)

    before = (x, *parts, bias, *groups)
    after = tidied(x, parts, bias, groups)
    untidy = any(a is not b for a, b in zip(after, before, strict=True))
    x, packed, scales, _, permutation, bias, *own_groups = after
    m, x_row = _rows(x)
    bias_row, bias_column = _bias_strides(bias)
    product = Product(
        m=m,
        n=n,
        k=k,
        bits=form["bits"],
        group_size=form["group_size"],
        dtype=x.dtype,
        scale_dtype=scales.dtype,
        transposed=transposed,
        aligned=_is_aligned(packed),
        x_vector=_is_vector(x, m, x_row),
        permuted=permutation is not None,
        biased=bias is not None,
        experts=len(packed) if grouped else 0,
        grouping=0 if not grouped else 1 if own_groups[0] is None else 2,
        expert_type=next((t.dtype for t in own_groups if t is not None), torch.int32),
    )
    shape = (
        *(m, n, k, x_row, x.stride(-1)),
        *(packed.stride(-2), scales.stride(-2), bias_row, bias_column),
        *((len(packed), packed.stride(0), scales.stride(0)) if grouped else (1, 0, 0)),
    )
    served = x.dtype in TYPE_NAMES and scales.dtype in TYPE_NAMES
    out = (*x.shape[:-1], k if transposed else n)
    return Operands(product, shape, out, untidy, served and x.numel() > 0)


def tidied(x: Tensor, parts: Parts, bias: Tensor | None, groups: Groups) -> list[Any]:
    """x, the parts, the bias and the groups as kernels take them.

    Each is the same object where nothing is to do.
    """
    packed, scales, biases, permutation = parts
    if packed.stride(-1) != 1:
        packed = packed.contiguous()
    if scales.stride(-1) != 1 or scales.stride() != biases.stride():
        scales = scales.contiguous()
        biases = biases.contiguous()
    if permutation is not None:
        permutation = permutation.to(torch.int32).contiguous()
    weight = (packed, scales, biases, permutation)
    own = _spread(bias, x, packed.shape[-2])
    return [_collapsible(x), *weight, own, *(_as_index(group) for group in groups)]


def _check_permutation(
    permutation: Tensor | None, scales: Tensor, columns: int, op: str
) -> None:
    if permutation is None:
        return
    expected = (*scales.shape[:-2], columns)
    if permutation.shape != expected or permutation.is_floating_point():
        raise ValueError(
            f"{op}: the permutation is {permutation.dtype} {list(permutation.shape)}; "
            f"integers of shape {list(expected)} are needed, one for each column"
        )


def check_bias(bias: Tensor | None, x: Tensor, n: int) -> None:
    """Refuse what `F.linear` refuses."""
    if bias is None:
        return
    if bias.dtype != x.dtype:
        raise RuntimeError(
            f"linear: the bias is {bias.dtype} and the input {x.dtype}; they must agree"
        )
    try:
        bias.expand(*x.shape[:-1], n)
    except RuntimeError:
        raise RuntimeError(
            f"linear: the bias has shape {list(bias.shape)}, which does not broadcast to "
            f"the result's {[*x.shape[:-1], n]}"
        ) from None


def _spread(bias: Tensor | None, x: Tensor, n: int) -> Tensor | None:
    """A bias of more than one dimension becomes as large as the result."""
    if bias is None or bias.dim() <= 1:
        return bias
    if bias.numel() == bias.shape[-1]:  # one for all rows
        return bias.reshape(-1)
    shape = (*x.shape[:-1], n)
    # The same object where nothing is to do: a view of it would count as copied.
    if bias.shape == shape and bias.is_contiguous():
        return bias
    return bias.expand(shape).contiguous()


def _bias_strides(bias: Tensor | None) -> tuple[int, int]:
    """Strides of a bias along rows of x and outputs."""
    if bias is None or bias.numel() == 1:
        return 0, 0
    if bias.dim() == 1:
        return 0, bias.stride(0)
    # Spread and contiguous, which leaves strides of dimensions of size 1 open.
    return bias.shape[-1], 1


def _collapsible(x: Tensor) -> Tensor:
    """x, copied where its rows do not follow each other at one distance."""
    strides, sizes = x.stride(), x.shape
    kept = [i for i in range(x.dim() - 1) if sizes[i] != 1]
    for outer, inner in pairwise(kept):
        if strides[outer] != strides[inner] * sizes[inner]:
            return x.contiguous()
    return x


def _rows(x: Tensor) -> tuple[int, int]:
    """How many rows x has, and their distance."""
    kept = [i for i in range(x.dim() - 1) if x.shape[i] != 1]
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    return rows, x.stride(kept[-1]) if kept else 0


def _as_index(tensor: Tensor | None) -> Tensor | None:
    """Offsets or indices as int32 or int64, side by side."""
    if tensor is None:
        return None
    if tensor.dtype not in (torch.int32, torch.int64):
        tensor = tensor.to(torch.int64)
    return tensor.contiguous()


def _is_aligned(packed: Tensor) -> bool:
    """Whether each row of words begins at a multiple of 16 bytes."""
    steps = [packed.storage_offset(), *packed.stride()[:-1]]
    return all(step % 4 == 0 for step in steps)


def _is_vector(x: Tensor, m: int, x_row: int) -> bool:
    """Whether 16 bytes of each row of x can be loaded at once."""
    count = 16 // x.itemsize
    together = x.stride(-1) == 1 and x.storage_offset() % count == 0
    return together and (m == 1 or x_row % count == 0)
