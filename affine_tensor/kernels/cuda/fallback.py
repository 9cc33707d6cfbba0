"""Products by kernels in Triton, where there is no NVRTC: slower by a factor of 2 to 4."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

from torch import Tensor

from ... import layout
from ...tensor import log_once
from .. import KernelError, settings
from . import compiler
from .library import Parts

MOST_ROWS = 128  # of x; more are multiplied with dense weights
_FEW_TOKENS = 16  # that tensor cores take at least


def wanted() -> bool:
    """Whether Triton is to do it: there is no NVRTC, but there is Triton."""
    return settings.cuda_backend == "own" and _kernels() is not None and not _compiles()


def _compiles() -> bool:
    try:
        compiler.find()
    except KernelError:
        return False
    return True


@cache
def _kernels() -> Any:
    """The module of kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import triton_kernels
    except Exception as error:  # whatever a foreign package raises
        log_once("cuda triton", "Triton cannot be used: %s", error)
        return None
    log_once("cuda triton", "kernels in Triton are used, which are slower")
    return triton_kernels


def linear(
    x: Tensor, parts: Parts, bias: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """``x @ W.T + bias`` for up to MOST_ROWS rows, of tidy operands."""
    packed, scales, _ = parts
    n, k = len(packed), x.shape[-1]
    rows = x.reshape(-1, k)
    y = x.new_empty((len(rows), n))
    operands = (*parts, y if bias is None else bias, y)
    strides = (packed.stride(0), scales.stride(0))
    form = {"BITS": bits, "GROUP": group_size, "BIASED": bias is not None}
    kernels = _kernels()
    if len(rows) == 1:
        kernels.one_row[(-(-n // 4),)](
            rows, *operands, n, k, *strides, **form, ROWS=4, COLUMNS=1024
        )
    else:
        tokens = max(_FEW_TOKENS, 1 << (len(rows) - 1).bit_length())
        kernels.some_rows[(-(-n // 64), 1)](
            rows,
            *operands,
            *(len(rows), n, k, rows.stride(0)),
            *strides,
            **form,
            TOKENS=tokens,
            ROWS=64,
            COLUMNS=64 if tokens * x.itemsize <= 128 else 32,
            num_stages=2,
        )
    return y.view(*x.shape[:-1], n)


def dequantize_into(y: Tensor, parts: Parts, *, bits: int, group_size: int) -> bool:
    """Dense weights into y ``[N, K]``, from tidy parts; False where Triton does not.

    They are rounded twice, which the operator `dequantize` must not do.
    """
    if not wanted() or y.dtype not in layout.WEIGHT_DTYPES:
        return False
    packed, scales, biases = parts
    rows, columns = y.shape
    grid = (-(-columns // 256), -(-rows // 8))
    if grid[1] > 65535:
        return False
    _kernels().dense[grid](
        *(packed, scales, biases, y, rows, columns),
        *(packed.stride(0), scales.stride(0)),
        BITS=bits,
        GROUP=group_size,
        ROWS=8,
        COLUMNS=256,
    )
    return True
