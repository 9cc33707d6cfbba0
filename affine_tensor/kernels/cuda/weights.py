"""Dequantize, embedding and quantize on CUDA: shaders/cuda/weights.cu.

All three give the values of the reference, bit for bit. What the kernels do not take the
reference does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import layout, ops
from .. import settings
from . import fallback, library
from .launch import Launch, Size
from .library import TYPES, Parts, served, tidy

_THREADS = 256  # of a block
_ROWS = 4  # of a thread, when it makes dense weights; see weights.cu
_BYTES = 16  # of a row, that a thread makes
_EIGHT = 8  # weights that a thread quantizes
_MOST_BLOCKS = 65535  # along the second axis of a grid

_POINTER = None
# Launches differ in numbers of rows, so that a server may need many; some MB.
_MOST_LAUNCHES = 1 << 13
_launches: dict[Any, Launch] = {}


def reset() -> None:
    """Forget all launches."""
    _launches.clear()


def _keep(key: Any, made: Launch) -> Launch:
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    if not library.capturing():
        _launches[key] = made
    return made


def _function(op: str, bits: int, dtype: torch.dtype, device: int) -> int | None:
    """The kernel of an operator for weights of `dtype`, if there is one."""
    if settings.cuda_backend != "own" or dtype not in TYPES:
        return None

    def check(made: int) -> str | None:
        return _check(op, made, bits, dtype, device)

    defines = (("BITS", bits), ("X", TYPES[dtype]))
    return library.function("weights.cu", f"affine_{op}", defines, device, check)


# ---- the check ------------------------------------------------------------------


def _check(
    op: str, made: int, bits: int, dtype: torch.dtype, device: int
) -> str | None:
    """Compare with the reference on small weights, of all dtypes of scales."""
    there = library.device(device)
    generator = torch.Generator().manual_seed(0)
    for group_size, scale_dtype in zip(
        (16, 64, 256), layout.WEIGHT_DTYPES, strict=True
    ):
        form: dict[str, Any] = {"bits": bits, "group_size": group_size}
        dense = torch.randn(5, 3 * max(32, group_size), generator=generator)
        if op == "quantize":
            expected = ops.reference(op)(dense.to(dtype), **form)
            got: tuple[Tensor, ...] = _quantized(
                made, dense.to(dtype).to(there), **form
            )
        else:
            parts = ops.reference("quantize")(dense.to(scale_dtype), **form)
            expected = (ops.reference("dequantize")(*parts, **form, dtype=dtype),)
            moved = tuple(part.to(there) for part in parts)
            y = torch.full(expected[0].shape, float("nan"), dtype=dtype, device=there)
            if op == "dequantize":
                _dequantized(made, moved, None, 1, y, **form)
            else:
                ids = torch.arange(len(dense), device=there)
                _embedded(made, ids, moved, y, **form)
            got = (y,)
        for ours, reference in zip(got, expected, strict=True):
            if not torch.equal(ours.cpu(), reference):
                return f"values differ for group size {group_size}, {scale_dtype}"
    return None


# ---- dequantize -----------------------------------------------------------------


@ops.register_kernel("dequantize", "cuda")
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
    """The dense weight ``[..., N, K]``; see `ops`.

    Columns to which a permutation gives a place that is none are left out.
    """
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    device = packed.get_device()
    if device != library.current_device():
        with torch.cuda.device(device):
            return dequantize(packed, scales, biases, permutation, **form, dtype=dtype)
    layout.check_parts(packed, scales, biases, **form)
    lead, columns = packed.shape[:-1], scales.shape[-1] * group_size
    function = None
    if packed.numel() and served(device, packed, scales, biases, permutation):
        function = _function("dequantize", bits, dtype, device)
    if function is None:
        return ops.reference("dequantize")(
            packed, scales, biases, permutation, **form, dtype=dtype
        )
    order, rows_of_one = None, 1
    if permutation is not None:
        # One order for all rows, or one for each expert.
        order = permutation.expand(*lead[:-1], columns).to(torch.int32).contiguous()
        rows_of_one = lead[-1] if lead else 1
    y = scales.new_empty((*lead, columns), dtype=dtype)
    rows = [part.reshape(-1, part.shape[-1]) for part in (packed, scales, biases)]
    parts = tidy(rows[0], rows[1], rows[2])
    _dequantized(function, parts, order, rows_of_one, y.view(-1, columns), **form)
    return y


def dequantize_into(y: Tensor, parts: Parts, *, bits: int, group_size: int) -> bool:
    """Dense weights into y ``[N, K]`` without gaps, from tidy parts ``[N, ...]``.

    Returns False where there is no kernel. The parts are taken as they are, on the
    current device.
    """
    function = _function("dequantize", bits, y.dtype, y.get_device())
    if function is None:
        return fallback.dequantize_into(y, parts, bits=bits, group_size=group_size)
    _dequantized(function, parts, None, 1, y, bits=bits, group_size=group_size)
    return True


def _dequantized(
    function: int,
    parts: Parts,
    permutation: Tensor | None,
    permuted_rows: int,
    y: Tensor,
    *,
    bits: int,
    group_size: int,
) -> None:
    packed, scales, biases = parts
    rows, columns = y.shape
    device = y.get_device()
    key: Any = (function, rows, columns, packed.stride(0), scales.stride(0))
    key = (*key, scales.dtype, group_size, permuted_rows)
    made = _launches.get(key)
    if made is None:
        arguments = (
            *_weight_arguments(parts, group_size),
            *(_POINTER, ("q", permuted_rows)),
            *(_POINTER, ("q", rows), ("i", columns)),
        )
        grid, block = _tiles(rows, columns, y.itemsize, _ROWS)
        made = _keep(key, Launch(function, device, grid, block, arguments))
    made(
        library.stream_of(device),
        packed.data_ptr(),
        scales.data_ptr(),
        biases.data_ptr(),
        0 if permutation is None else permutation.data_ptr(),
        y.data_ptr(),
    )


def _weight_arguments(
    parts: Parts, group_size: int
) -> tuple[tuple[str, int] | None, ...]:
    """`packed` to `group_shift` in weights.cu."""
    packed, scales, _ = parts
    strides = ("q", packed.stride(0)), ("q", scales.stride(0))
    return (
        *(_POINTER, strides[0], _POINTER, _POINTER, strides[1]),
        *(("i", TYPES[scales.dtype]), ("i", group_size.bit_length() - 1)),
    )


def _tiles(rows: int, columns: int, itemsize: int, each: int) -> tuple[Size, Size]:
    """Grid and block, of threads that make 16 bytes in `each` rows."""
    units = columns * itemsize // _BYTES
    wide = min(_THREADS, 1 << (units - 1).bit_length())
    high = _THREADS // wide
    down = min(-(-rows // (high * each)), _MOST_BLOCKS)
    return (-(-units // wide), down, 1), (wide, high, 1)


# ---- embedding ------------------------------------------------------------------


@ops.register_kernel("embedding", "cuda")
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
    """Rows `ids` of the dense weight, ``[*ids, K]``; see `ops`.

    An id that is no row, a negative one too, gives a row of NaN: to raise would need to
    wait for the device.
    """
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    device = ids.get_device()
    if device != library.current_device():
        with torch.cuda.device(device):
            return embedding(ids, packed, scales, biases, **form, dtype=dtype)
    ops.check_matrix(packed, "embedding")
    layout.check_parts(packed, scales, biases, **form)
    function = None
    if (
        packed.numel()
        and ids.dtype in (torch.int32, torch.int64)
        and served(device, packed, scales, biases)
    ):
        function = _function("embedding", bits, dtype, device)
    if function is None:
        return ops.reference("embedding")(
            ids, packed, scales, biases, **form, dtype=dtype
        )
    y = scales.new_empty((*ids.shape, scales.shape[-1] * group_size), dtype=dtype)
    if ids.numel():
        parts = tidy(packed, scales, biases)
        _embedded(function, ids.contiguous(), parts, y.view(-1, y.shape[-1]), **form)
    return y


def _embedded(
    function: int, ids: Tensor, parts: Parts, y: Tensor, *, bits: int, group_size: int
) -> None:
    packed, scales, biases = parts
    rows, columns = y.shape
    device = y.get_device()
    key: Any = (function, rows, columns, packed.stride(0), scales.stride(0))
    key = (*key, scales.dtype, group_size, ids.dtype, len(packed))
    made = _launches.get(key)
    if made is None:
        arguments = (
            *(_POINTER, ("i", ids.dtype == torch.int64), ("q", len(packed))),
            *_weight_arguments(parts, group_size),
            *(_POINTER, ("q", rows), ("i", columns)),
        )
        grid, block = _tiles(rows, columns, y.itemsize, 1)
        made = _keep(key, Launch(function, device, grid, block, arguments))
    made(
        library.stream_of(device),
        ids.data_ptr(),
        packed.data_ptr(),
        scales.data_ptr(),
        biases.data_ptr(),
        y.data_ptr(),
    )


# ---- quantize -------------------------------------------------------------------


@ops.register_kernel("quantize", "cuda")
def quantize(w: Tensor, *, bits: int, group_size: int) -> Parts:
    """Words as int32, scales and biases; see `ops`, and `layout.quantize`."""
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    device = w.get_device()
    if device != library.current_device():
        with torch.cuda.device(device):
            return quantize(w, **form)
    layout.check_weight(w, **form)
    function = _function("quantize", bits, w.dtype, device) if w.numel() else None
    if function is None:
        found: Parts = ops.reference("quantize")(w, **form)
        return found
    w = w.detach().contiguous()
    packed, scales, biases = _quantized(function, w, **form)
    rows, groups = w.view(-1, w.shape[-1]), scales.shape[-1]
    layout.check_finite(
        rows, scales.view(-1, groups), biases.view(-1, groups), w.shape[:-1]
    )
    return packed, scales, biases


def _quantized(function: int, w: Tensor, *, bits: int, group_size: int) -> Parts:
    *lead, columns = w.shape
    packed = w.new_empty((*lead, columns * bits // 32), dtype=torch.int32)
    scales = w.new_empty((*lead, columns // group_size))
    biases = torch.empty_like(scales)
    device, groups = w.get_device(), scales.numel()
    blocks = -(-w.numel() // (_EIGHT * _THREADS))
    made = Launch(
        function,
        device,
        (blocks, 1, 1),
        (_THREADS, 1, 1),
        (
            *(_POINTER, _POINTER, _POINTER, _POINTER),
            *(("q", groups), ("i", group_size.bit_length() - 1)),
        ),
    )
    pointers = (part.data_ptr() for part in (w, packed, scales, biases))
    made(library.stream_of(device), *pointers)
    return packed, scales, biases
