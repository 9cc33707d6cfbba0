"""Products with packed weights on a CPU; `weights` has what makes or reads the weights.

Words are multiplied as they lie in the checkpoint, without repacking; see
shaders/cpu/product.cpp. What kernels do not take (float64, infinite or huge inputs, a
machine without a compiler) goes to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import layout, ops
from ...tensor import log_once
from .. import settings
from . import library, weights
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

__all__ = ["grouped_linear", "linear", "reset", "weights"]

_P, _I, _N = POINTER, INDEX, NUMBER
# As affine_linear in shaders/cpu/product.cpp declares them.
_ARGUMENTS = (
    *(_P, _I, _N, _I, _P, _I),  # x, permutation
    *(_P, _I, _I, _P, _I, _I, _P, _I, _I, _N),  # words, scales, biases
    *(_P, _P, _I, _I, _I, _I, _P, _P, _N, _N),  # bias, y, sizes, experts, how
)

# What affine_linear returns for inputs that it does not multiply.
_NOT_HERE = 1

_linear_functions: dict[Any, Function | None] = {}


def reset() -> None:
    """Forget which functions there are; `library` keeps what was compiled and checked."""
    _linear_functions.clear()


def _function(bits: int, group_size: int, dtype: torch.dtype) -> Function | None:
    if settings.cpu_backend != "own":
        return None
    key = (bits, group_size, dtype)
    found = _linear_functions.get(key)
    if found is None and (key not in _linear_functions or settings.strict):
        found = _linear_functions[key] = _make(bits, group_size, dtype)
    return found


def _make(bits: int, group_size: int, dtype: torch.dtype) -> Function | None:
    if dtype not in TYPES or dtype == torch.float64:
        return None

    def check(made: Function) -> str | None:
        return _check(made, bits, group_size, dtype)

    return library.function(
        "product.cpp",
        "affine_linear",
        _ARGUMENTS,
        check,
        BITS=bits,
        GROUP=group_size,
        X=library.kind(bits, dtype),
    )


def _check(
    made: Function, bits: int, group_size: int, dtype: torch.dtype
) -> str | None:
    """Compare with float64 for each way of multiplying; numbers of rows choose them."""
    columns = 3 * max(32, group_size)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(19, columns, generator=generator)
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    packed, scales, biases = layout.quantize(dense, **form)
    parts = (packed, scales, biases)
    exact = layout.dequantize(*parts, **form, dtype=torch.float64)
    parts = (packed.view(torch.int32), scales, biases)
    for rows in (1, 2, 3, 4, 7, 17):
        x = torch.randn(rows, columns, generator=generator).to(dtype)
        y = x.new_empty(rows, len(dense))
        _call(made, x, parts, None, None, y)
        wanted = x.double() @ exact.T
        error = float((y.double() - wanted).norm() / wanted.norm())
        if not error < 4 * torch.finfo(dtype).eps + 1e-6:
            return f"the product of {rows} rows has a relative error of {error:.1e}"
    return None


def _call(
    function: Function,
    x: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    permutation: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    ends: Tensor | None = None,
    owners: Tensor | None = None,
) -> int:
    """One call for x [M, K], y [..., N] without gaps, and tidy parts."""
    packed, scales, biases = parts
    experts = packed.dim() == 3
    rows, columns = x.shape
    outputs = y.shape[-1]
    return function(
        x.data_ptr(),
        x.stride(0),
        TYPES[x.dtype],
        rows,
        None if permutation is None else permutation.data_ptr(),
        permutation.stride(0) if experts and permutation is not None else 0,
        packed.data_ptr(),
        packed.stride(0) if experts else 0,
        packed.stride(-2),
        scales.data_ptr(),
        scales.stride(0) if experts else 0,
        scales.stride(-2),
        biases.data_ptr(),
        biases.stride(0) if experts else 0,
        biases.stride(-2),
        TYPES[scales.dtype],
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        outputs,
        outputs,
        columns,
        packed.shape[0] if experts else 1,
        None if ends is None else ends.data_ptr(),
        None if owners is None else owners.data_ptr(),
        library.threads(),
        settings.batch_invariant,
    )


@ops.register_kernel("linear", "cpu")
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
    function = _function(bits, group_size, dtype)
    shape = x.shape
    rows, groups = scales.shape if scales.dim() == 2 else (0, 0)
    columns = groups * group_size
    if (
        function is not None
        and rows
        and x.dtype is dtype
        and x.numel()
        and shape
        and shape[-1] == columns
        and packed.shape == (rows, columns * bits // 32)
        and biases.shape == scales.shape
        and served(packed, scales, biases, permutation, columns)
        and (
            bias is None
            or (bias.is_cpu and bias.dtype is dtype and bias.shape == (rows,))
        )
    ):
        y = x.new_empty((*shape[:-1], rows))
        done = _call(
            function,
            tidy(x if x.dim() == 2 else x.reshape(-1, columns)),
            (tidy(packed), tidy(scales), tidy(biases)),
            None if permutation is None else permutation.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
        )
        if done == DONE:
            return y
        _say_why(done)
    return ops.reference("linear")(
        x,
        packed,
        scales,
        biases,
        permutation,
        bias,
        bits=bits,
        group_size=group_size,
        dtype=dtype,
    )


def _say_why(code: int) -> None:
    if code == _NOT_HERE:
        log_once(
            "cpu inputs",
            "a product dequantizes a packed weight: inputs are infinite, NaN, beyond "
            "2 ** 100 or all below 2 ** -60, which the CPU's kernels do not multiply",
        )


@ops.register_kernel("grouped_linear", "cpu")
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
    """Each row of x times the transpose of its expert's matrix; see `ops`."""
    ops.check_groups(x, packed, offsets, indices, "grouped_linear")
    columns = scales.shape[-1] * group_size
    ops.check_input(x, columns, dtype, "grouped_linear")
    layout.check_parts(packed, scales, biases, bits=bits, group_size=group_size)
    function = _function(bits, group_size, dtype)
    y = x.new_empty((len(x), packed.shape[1]))
    if (
        function is not None
        and y.numel()
        and x.numel()
        and packed.numel()
        and served(packed, scales, biases, permutation, columns)
    ):
        done = _call(
            function,
            tidy(x),
            (tidy(packed), tidy(scales), tidy(biases)),
            None if permutation is None else tidy(permutation),
            None,
            y,
            places_of_experts(offsets),
            places_of_experts(indices),
        )
        if done == DONE:
            return y
        _say_why(done)
    return ops.reference("grouped_linear")(
        x,
        packed,
        scales,
        biases,
        permutation,
        offsets,
        indices,
        bits=bits,
        group_size=group_size,
        dtype=dtype,
    )
