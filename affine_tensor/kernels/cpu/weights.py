"""Dequantize, embedding, quantize and ``x @ W`` on a CPU: shaders/cpu/weights.cpp.

The first three give the values of the reference, bit for bit. What the kernels do not take
the reference does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import layout, ops
from .. import settings
from . import library
from .library import (
    DONE,
    INDEX,
    NUMBER,
    POINTER,
    TYPES,
    Function,
    places_of_experts,
    served,
    tidy,
)

_P, _I, _N = POINTER, INDEX, NUMBER
_PARTS = (_P, _I, _P, _I, _P, _I, _N)  # words, scales, biases
_STACKED = (_P, _I, _I, _P, _I, _I, _P, _I, _I, _N)  # the same of experts
# As shaders/cpu/weights.cpp declares them.
_ARGUMENTS = {
    "dequantize": (*_PARTS, _P, _P, _I, _N, _I, _I, _N),
    "embedding": (_P, _N, _I, *_PARTS, _P, _I, _N, _I, _I, _N),
    "quantize": (_P, _N, _I, _P, _P, _P, _I, _I, _N),
    "matmul": (_P, _I, _N, _I, *_PARTS, _P, _I, _I, _I, _N),
    "grouped_matmul": (
        *(_P, _I, _N, _I, *_STACKED),
        *(_P, _I, _I, _I, _I, _P, _P, _N),
    ),
}

# Up to so many rows of x, the words themselves are multiplied; above, weights are made
# dense a block of columns at a time, which torch multiplies.
_FEW = 8
_BLOCK = 1 << 22  # weights that are dense at a time
_STEP = 256  # columns: whole groups and words of every format

_Parts = tuple[Tensor, Tensor, Tensor]


def _function(op: str, bits: int, group_size: int) -> Function | None:
    if settings.cpu_backend != "own":
        return None

    def check(made: Function) -> str | None:
        return _check(op, made, bits, group_size)

    return library.function(
        "weights.cpp",
        f"affine_{op}",
        _ARGUMENTS[op],
        check,
        BITS=bits,
        GROUP=group_size,
    )


def _check(op: str, made: Function, bits: int, group_size: int) -> str | None:
    """Compare with the reference on a small weight."""
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5, 3 * max(32, group_size), generator=generator).bfloat16()
    packed, scales, biases = layout.quantize(dense, **form)
    parts = (packed.view(torch.int32), scales, biases)
    exact = layout.dequantize(*parts, **form, dtype=torch.float32)
    if op == "quantize":
        found = _quantized(made, dense, bits, group_size)
        same = found and all(map(torch.equal, found, parts))
        return None if same else "codes, scales or biases differ"
    if op in ("dequantize", "embedding"):
        y = torch.empty_like(exact)
        if op == "dequantize":
            _dequantized(made, parts, None, y)
        else:
            _embedded(made, torch.arange(len(dense)), parts, y)
        return None if torch.equal(y, exact) else "weights differ"
    x = torch.randn(3, len(dense), generator=generator)
    y = torch.empty(3, dense.shape[1])
    if op == "matmul":
        _multiplied(made, x, parts, y)
    else:
        stacked = tuple(part.unsqueeze(0) for part in parts)
        _multiplied_by_expert(made, x, stacked, y, None, torch.zeros(3).long())
    wanted = x.double() @ exact.double()
    error = float((y - wanted).norm() / wanted.norm())
    return None if error < 1e-6 else f"the relative error is {error:.1e}"


def _places(parts: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Parts as functions take them, with the strides of experts where there are some."""
    found: list[Any] = []
    for part in parts:
        found += [part.data_ptr(), *part.stride()[:-1]]
    return (*found, TYPES[parts[1].dtype])


# ---- dequantize -----------------------------------------------------------------


@ops.register_kernel("dequantize", "cpu")
def dequantize(
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    permutation: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight ``[..., N, K]``; see `ops`."""
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    layout.check_parts(packed, scales, biases, **form)
    function = _function("dequantize", bits, group_size)
    columns = scales.shape[-1] * group_size
    if (
        function is None
        or dtype not in TYPES
        or not packed.numel()
        or not served(packed, scales, biases, permutation, columns)
        or not _within(permutation, columns)
    ):
        return ops.reference("dequantize")(
            packed, scales, biases, permutation, **form, dtype=dtype
        )
    if permutation is not None and packed.dim() > 2:  # an order for each expert
        last = packed.dim() - 3
        each = zip(
            *(part.flatten(0, last) for part in (packed, scales, biases, permutation)),
            strict=True,
        )
        weights = [dequantize(*parts, **form, dtype=dtype) for parts in each]
        return torch.stack(weights).unflatten(0, packed.shape[:-2])
    rows = [tidy(p.reshape(-1, p.shape[-1])) for p in (packed, scales, biases)]
    y = scales.new_empty((*packed.shape[:-1], columns), dtype=dtype)
    order = None if permutation is None else permutation.contiguous()
    _dequantized(function, (rows[0], rows[1], rows[2]), order, y.view(-1, columns))
    return y


def _within(permutation: Tensor | None, columns: int) -> bool:
    """Whether all entries are columns. Functions pass by what is none, and would leave
    memory that nobody wrote; the reference raises."""
    if permutation is None:
        return True
    low, high = permutation.aminmax()
    return int(low) >= 0 and int(high) < columns


def _dequantized(
    function: Function, parts: _Parts, permutation: Tensor | None, y: Tensor
) -> None:
    function(
        *_places(parts),
        None if permutation is None else permutation.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        TYPES[y.dtype],
        len(y),
        y.shape[1],
        library.threads(),
    )


# ---- embedding ------------------------------------------------------------------


@ops.register_kernel("embedding", "cpu")
def embedding(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the dense weight, ``[*ids, K]``; see `ops`."""
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    ops.check_matrix(packed, "embedding")
    layout.check_parts(packed, scales, biases, **form)
    function = _function("embedding", bits, group_size)
    if (
        function is not None
        and dtype in TYPES
        and ids.dtype in (torch.int32, torch.int64)
        and ids.numel()
        and packed.numel()
        and served(packed, scales, biases, None, 0)
    ):
        y = scales.new_empty((*ids.shape, scales.shape[-1] * group_size), dtype=dtype)
        parts = (tidy(packed), tidy(scales), tidy(biases))
        rows = y.view(-1, y.shape[-1])
        if _embedded(function, ids.contiguous(), parts, rows) == DONE:
            return y
    return ops.reference("embedding")(ids, packed, scales, biases, **form, dtype=dtype)


def _embedded(function: Function, ids: Tensor, parts: _Parts, y: Tensor) -> int:
    return function(
        ids.data_ptr(),
        ids.dtype == torch.int64,
        ids.numel(),
        *_places(parts),
        y.data_ptr(),
        y.stride(0),
        TYPES[y.dtype],
        len(parts[0]),
        y.shape[1],
        library.threads(),
    )


# ---- quantize -------------------------------------------------------------------


@ops.register_kernel("quantize", "cpu")
def quantize(w: Tensor, *, bits: int, group_size: int) -> _Parts:
    """Words as int32, scales and biases; see `ops`."""
    layout.check_weight(w, bits=bits, group_size=group_size)
    function = _function("quantize", bits, group_size)
    if function is not None and w.numel():
        found = _quantized(function, w, bits, group_size)
        if found is not None:
            return found
    return ops.reference("quantize")(w, bits=bits, group_size=group_size)


def _quantized(
    function: Function, w: Tensor, bits: int, group_size: int
) -> _Parts | None:
    """None where a weight, scale or bias is not finite; the reference says which."""
    *lead, columns = w.shape
    rows = tidy(w.detach().reshape(-1, columns))
    packed = w.new_empty((*lead, columns * bits // 32), dtype=torch.int32)
    scales = w.new_empty((*lead, columns // group_size))
    biases = torch.empty_like(scales)
    done = function(
        rows.data_ptr(),
        TYPES[w.dtype],
        rows.stride(0),
        packed.data_ptr(),
        scales.data_ptr(),
        biases.data_ptr(),
        len(rows),
        columns,
        library.threads(),
    )
    return (packed, scales, biases) if done == DONE else None


# ---- x @ W ----------------------------------------------------------------------


@ops.register_kernel("matmul", "cpu")
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
    """``x @ W``: x ``[..., N]``, W ``[N, K]``, result ``[..., K]``; see `ops`."""
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    ops.check_matrix(packed, "matmul")
    ops.check_input(x, packed.shape[0], dtype, "matmul")
    layout.check_parts(packed, scales, biases, **form)
    function = _function("matmul", bits, group_size)
    if (
        function is None
        or dtype not in layout.WEIGHT_DTYPES
        or not x.numel()
        or not packed.numel()
        or not served(packed, scales, biases, None, 0)
    ):
        return ops.reference("matmul")(
            x, packed, scales, biases, permutation, **form, dtype=dtype
        )
    parts = (tidy(packed), tidy(scales), tidy(biases))
    flat = tidy(x.reshape(-1, x.shape[-1]))
    y = x.new_empty((len(flat), scales.shape[-1] * group_size))
    if len(flat) > _FEW:
        _by_blocks(flat, parts, y, form)
    elif _multiplied(function, flat, parts, y) != DONE:
        raise MemoryError("there is no memory for the sums of a product")
    if permutation is not None:
        y = torch.empty_like(y).index_copy_(-1, permutation.long(), y)
    return y.view(*x.shape[:-1], y.shape[-1])


def _multiplied(function: Function, x: Tensor, parts: _Parts, y: Tensor) -> int:
    return function(
        x.data_ptr(),
        x.stride(0),
        TYPES[x.dtype],
        len(x),
        *_places(parts),
        y.data_ptr(),
        y.stride(0),
        x.shape[1],
        y.shape[1],
        library.threads(),
    )


def _by_blocks(x: Tensor, parts: _Parts, y: Tensor, form: dict[str, Any]) -> None:
    """y = x @ W, some columns of W at a time: each sum is one product of torch's."""
    packed, scales, biases = parts
    bits, group = form["bits"], form["group_size"]
    # float16 sums of torch's are coarse, and slow.
    work = torch.float32 if x.dtype == torch.float16 else x.dtype
    x = x.to(work)
    step = max(_STEP, _BLOCK // len(packed) // _STEP * _STEP)
    for start in range(0, y.shape[1], step):
        end = min(start + step, y.shape[1])
        words = slice(start * bits // 32, end * bits // 32)
        groups = slice(start // group, end // group)
        dense = dequantize(
            packed[:, words], scales[:, groups], biases[:, groups], **form, dtype=work
        )
        y[:, start:end] = x @ dense


@ops.register_kernel("grouped_matmul", "cpu")
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
    """Each row of x times its expert's matrix; see `ops`."""
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    ops.check_groups(x, packed, offsets, indices, "grouped_matmul")
    ops.check_input(x, packed.shape[1], dtype, "grouped_matmul")
    layout.check_parts(packed, scales, biases, **form)
    many = len(x) > _FEW * 4 * max(1, len(packed))
    function = _function("grouped_matmul", bits, group_size)
    if (
        function is not None
        and not many  # those are better by blocks, expert by expert
        and permutation is None
        and dtype in layout.WEIGHT_DTYPES
        and x.numel()
        and packed.numel()
        and served(packed, scales, biases, None, 0)
    ):
        y = x.new_empty((len(x), scales.shape[-1] * group_size))
        parts = (tidy(packed), tidy(scales), tidy(biases))
        if _multiplied_by_expert(function, tidy(x), parts, y, offsets, indices) == DONE:
            return y
    return ops.by_expert(
        matmul,
        x,
        x.new_zeros((len(x), scales.shape[-1] * group_size)),
        (packed, scales, biases, permutation),
        offsets,
        indices,
        {**form, "dtype": dtype},
    )


def _multiplied_by_expert(
    function: Function,
    x: Tensor,
    parts: tuple[Tensor, ...],
    y: Tensor,
    offsets: Tensor | None,
    indices: Tensor | None,
) -> int:
    ends, owners = places_of_experts(offsets), places_of_experts(indices)
    return function(
        x.data_ptr(),
        x.stride(0),
        TYPES[x.dtype],
        len(x),
        *_places(parts),
        y.data_ptr(),
        y.stride(0),
        x.shape[1],
        y.shape[1],
        len(parts[0]),
        None if ends is None else ends.data_ptr(),
        None if owners is None else owners.data_ptr(),
        library.threads(),
    )
