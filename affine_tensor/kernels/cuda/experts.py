"""Products with the matrices of experts on CUDA.

One launch serves all experts: each row finds its own, or rows are sorted by expert on the
device. Nothing waits for the device but what has no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import layout, ops
from .. import settings
from . import library, products
from .library import Parts, served, tidy
from .products import Call, Form, calls, keep, row_stride

# Bytes of words that may be read twice in the time that it takes to sort rows.
_SORTING = 40 << 20

_MOST_ROWS = 65535  # of one launch: blocks along the second axis of a grid

# How rows find their expert: by an index each, or by the ends of sorted rows.
_BY_INDEX, _BY_ENDS = 1, 2


@ops.register_kernel("grouped_linear", "cuda")
def grouped_linear(
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
    """Each row of x times the transpose of its expert's matrix; see `ops`.

    An index that is no expert gives a row of NaN: to raise would need to wait.
    """
    form: Form = {"bits": bits, "group_size": group_size, "dtype": dtype}
    device = x.get_device()
    if device != library.current_device():
        with torch.cuda.device(device):
            return grouped_linear(
                *(x, packed, scales, biases, permutation, offsets, indices), **form
            )
    ops.check_groups(x, packed, offsets, indices, "grouped_linear")
    k = scales.shape[-1] * group_size
    ops.check_input(x, k, dtype, "grouped_linear")
    layout.check_parts(packed, scales, biases, bits=bits, group_size=group_size)
    own = (packed, scales, biases)
    if not x.numel() or not packed.numel():
        return x.new_zeros((len(x), packed.shape[1]))
    ordered = permutation is None or permutation.shape == (len(packed), k)
    if settings.cuda_backend == "own" and ordered and served(device, *own, permutation):
        if permutation is not None:
            x = _gathered(x, permutation, offsets, indices)
        if row_stride(x) is None:
            x = x.contiguous()
        y = _grouped(x, tidy(*own), offsets, indices, form)
        if y is not None:
            return y
        permutation = None  # x is in its order already
    from . import linear  # which imports this

    return ops.by_expert(
        linear,
        x,
        x.new_zeros((len(x), packed.shape[1])),
        (*own, permutation),
        offsets,
        indices,
        form,
    )


def _grouped(
    x: Tensor, parts: Parts, offsets: Tensor | None, indices: Tensor | None, form: Form
) -> Tensor | None:
    """By kernels alone, or None where none takes it."""
    packed = parts[0]
    if indices is not None:
        owners = indices.to(torch.int64).contiguous()
        if not _is_sorting_better(len(x), packed, form) or x.dtype == torch.float32:
            return _launched(x, parts, owners, _BY_INDEX, form)
        ends, order = _sorted(owners, len(packed))
        y = _launched(x.index_select(0, order), parts, ends, _BY_ENDS, form)
        if y is None:
            return _launched(x, parts, owners, _BY_INDEX, form)
        y = torch.empty_like(y).index_copy_(0, order, y)
        homeless = (owners < 0).logical_or_(owners >= len(packed))
        return y.masked_fill_(homeless.unsqueeze(-1), float("nan"))
    assert offsets is not None
    ends = offsets.to(torch.int64).contiguous()
    y = None
    if x.dtype != torch.float32 and not settings.batch_invariant:
        y = _launched(x, parts, ends, _BY_ENDS, form)
    if y is None:
        owners = _owners(ends, len(x))
        y = _launched(x, parts, owners, _BY_INDEX, form)
        if y is not None:
            y.masked_fill_((owners == len(packed)).unsqueeze(-1), 0)
    return y


def _launched(
    x: Tensor,
    parts: Parts,
    groups: Tensor,
    grouping: int,
    form: Form,
    transposed: bool = False,
) -> Tensor | None:
    """One launch for all experts, if there is a kernel."""
    if grouping == _BY_INDEX and len(x) > _MOST_ROWS:
        each = zip(x.split(_MOST_ROWS), groups.split(_MOST_ROWS), strict=True)
        found = [_launched(rows, parts, own, grouping, form) for rows, own in each]
        made = [y for y in found if y is not None]
        return torch.cat(made) if len(made) == len(found) else None
    packed, scales, biases = parts
    device = x.get_device()
    pointers = [part.data_ptr() for part in (x, packed, scales, biases)]
    key = (
        *("grouped", grouping, transposed, x.shape, x.stride(), x.dtype, device),
        *(packed.shape, packed.stride(), scales.stride(), scales.dtype),
        *(*(pointer & 15 for pointer in pointers), *form.values()),
        *(settings.batch_invariant, settings.strict),
    )
    call = calls.get(key)
    if call is None:
        product = products.product_of(
            x, parts, form, grouping=grouping, transposed=transposed
        )
        launch = products.launch_of(product, x, packed, scales)
        columns = product.k if transposed else product.n
        call = keep(key, Call(launch, (len(x), columns)))
    if call.launch is None:
        return None
    y = x.new_empty(call.out)
    call.launch(
        library.stream_of(device), *pointers, 0, y.data_ptr(), groups.data_ptr()
    )
    return y


def _is_sorting_better(rows: int, packed: Tensor, form: Form) -> bool:
    """Whether words that several rows share had better be read once for all of them.

    Without sorting each row reads its expert's.
    """
    if settings.batch_invariant:
        return False
    experts = len(packed)
    distinct = experts * (1 - (1 - 1 / experts) ** rows)
    words = packed.shape[1] * packed.shape[2] * 4
    return (rows - distinct) * words > _SORTING


def _sorted(owners: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Where each expert's rows end once sorted, and the rows in that order, int64 both.

    Rows whose index is no expert come last, behind all ends.
    """
    valid = (owners >= 0).logical_and_(owners < experts)
    own, order = owners.where(valid, experts).sort(stable=True)
    numbers = torch.arange(experts, device=owners.device)
    return torch.searchsorted(own, numbers, right=True), order


def _owners(ends: Tensor, rows: int) -> Tensor:
    """The expert of each row, where rows are sorted; the number of experts behind all."""
    numbers = torch.arange(rows, device=ends.device)
    return torch.searchsorted(ends, numbers, right=True)


def _gathered(
    x: Tensor, permutation: Tensor, offsets: Tensor | None, indices: Tensor | None
) -> Tensor:
    """x with the columns of each row in the order of its expert."""
    if indices is None:
        assert offsets is not None
        owners = _owners(offsets.to(torch.int64).contiguous(), len(x))
    else:
        owners = indices
    owners = owners.clamp(0, len(permutation) - 1)  # what is none has no order
    return x.gather(1, permutation.index_select(0, owners).long())


@ops.register_kernel("grouped_matmul", "cuda")
def grouped_matmul(
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
    """Each row of x times its expert's matrix; see `ops`. The gradient of `grouped_linear`.

    An index that is no expert gives a row of NaN: to raise would need to wait.
    """
    form: Form = {"bits": bits, "group_size": group_size, "dtype": dtype}
    device = x.get_device()
    if device != library.current_device():
        with torch.cuda.device(device):
            return grouped_matmul(
                *(x, packed, scales, biases, permutation, offsets, indices), **form
            )
    ops.check_groups(x, packed, offsets, indices, "grouped_matmul")
    ops.check_input(x, packed.shape[1], dtype, "grouped_matmul")
    layout.check_parts(packed, scales, biases, bits=bits, group_size=group_size)
    own = (packed, scales, biases)
    k = scales.shape[-1] * group_size
    if not x.numel() or not packed.numel():
        return x.new_zeros((len(x), k))
    ordered = permutation is None or permutation.shape == (len(packed), k)
    if settings.cuda_backend == "own" and ordered and served(device, *own, permutation):
        if row_stride(x) is None:
            x = x.contiguous()
        y = _grouped_matmul(x, tidy(*own), permutation, offsets, indices, form)
        if y is not None:
            return y
    from . import matmul

    return ops.by_expert(
        matmul,
        x,
        x.new_zeros((len(x), k)),
        (packed, scales, biases, permutation),
        offsets,
        indices,
        form,
    )


def _grouped_matmul(
    x: Tensor,
    parts: Parts,
    permutation: Tensor | None,
    offsets: Tensor | None,
    indices: Tensor | None,
    form: Form,
) -> Tensor | None:
    """By one kernel for all experts, or None where none takes it."""
    experts = len(parts[0])
    owners = order = None
    if indices is not None:
        owners = indices.to(torch.int64).contiguous()
        ends, order = _sorted(owners, experts)
        x = x.index_select(0, order)
    else:
        assert offsets is not None
        ends = offsets.to(torch.int64).contiguous()
    y = _launched(x, parts, ends, _BY_ENDS, form, transposed=True)
    if y is None:
        return None
    if order is not None:
        y = torch.empty_like(y).index_copy_(0, order, y)
    if permutation is not None:
        own = _owners(ends, len(x)) if owners is None else owners
        places = permutation.index_select(0, own.clamp(0, experts - 1))
        y = torch.empty_like(y).scatter_(1, places.long(), y)
    if owners is not None:
        homeless = (owners < 0).logical_or_(owners >= experts)
        y.masked_fill_(homeless.unsqueeze(-1), float("nan"))
    return y
