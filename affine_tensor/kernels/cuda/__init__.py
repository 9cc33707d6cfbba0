"""Products with packed weights on CUDA; `weights` has what makes or reads the weights.

Words are multiplied as they lie in the checkpoint, without repacking. Which kernel takes
a product is decided in `plans`, once for each combination of shapes, strides and dtypes;
what that makes is kept, so that a call is one look-up, one allocation and one launch. No
call waits for the device.

Many rows of x (and what kernels do not take, float64 for example) are multiplied with
dense weights, made a bounded part at a time, by torch's own products.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import layout, ops
from .. import settings
from . import experts, fallback, library, products, weights
from .library import Parts, served, tidy
from .products import Call, Form, calls, keep, row_stride

__all__ = ["experts", "linear", "matmul", "reset", "weights"]

# Bytes of weights that are dense at a time. Smaller parts make slower products, and more
# launches: 33 MB cost 8% at 512 rows of x, nothing at 4096.
_SCRATCH = 128 << 20
_MOST_TERMS = 2048  # of a sum in float32
_STEP = 256  # rows or columns: whole groups, words and tiles of every format


class _WholeSums:
    """Within it cuBLAS adds parts of sums up in float32, as kernels here do.

    torch lets it round them to 16 bits, which then costs more than rounding the weights
    did. The setting is the process's: whoever is the last one out puts it back.
    """

    _NAMES = (
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: dict[str, Any] = {}

    def __enter__(self) -> None:
        matmul = torch.backends.cuda.matmul
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                for name in self._NAMES:
                    # Whether sums are split is a second one, since torch 2.10.
                    split = getattr(matmul, f"{name}_split_k", None)
                    allowed = getattr(matmul, name)
                    self._before[name] = allowed if split is None else (allowed, split)
                    setattr(matmul, name, False if split is None else (False, split))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for name, value in self._before.items():
                    setattr(torch.backends.cuda.matmul, name, value)


_whole_sums = _WholeSums()

# What compiled graphs allocate with, in a third of the time.
_fast_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def reset() -> None:
    """Forget all that was prepared, so that each kernel is checked again."""
    calls.clear()
    weights.reset()
    library.reset()


# ---- one matrix -----------------------------------------------------------------


@ops.register_kernel("linear", "cuda")
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
    device = x.get_device()
    if device != library.current_device():
        with torch.cuda.device(device):
            return linear(
                *(x, packed, scales, biases, permutation, bias),
                bits=bits,
                group_size=group_size,
                dtype=dtype,
            )
    x_at, packed_at = x.data_ptr(), packed.data_ptr()
    scales_at, biases_at = scales.data_ptr(), biases.data_ptr()
    own: Any = None
    if bias is not None:
        own = (bias.shape, bias.stride(), bias.dtype, bias.get_device())
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        dtype,
        device,
        packed.shape,
        packed.stride(),
        packed.dtype,
        packed.get_device(),
        scales.shape,
        scales.stride(),
        scales.dtype,
        scales.get_device(),
        biases.shape,
        biases.stride(),
        biases.dtype,
        biases.get_device(),
        x_at & 15,
        packed_at & 15,
        (scales_at | biases_at) & 15,
        own,
        permutation is None,
        bits,
        group_size,
        settings.batch_invariant,
        settings.cuda_backend,
        settings.strict,
    )
    call = calls.get(key)
    if call is None:
        form = {"bits": bits, "group_size": group_size, "dtype": dtype}
        parts = (packed, scales, biases)
        call = keep(key, _make_linear(x, parts, permutation, bias, form))
    launch = call.launch
    if launch is None:
        form = {"bits": bits, "group_size": group_size, "dtype": dtype}
        assert call.otherwise is not None
        return call.otherwise(x, (packed, scales, biases), permutation, bias, form)
    y = (
        x.new_empty(call.out)
        if _fast_empty is None
        else _fast_empty(call.out, call.strides, dtype)
    )
    launch(
        library.stream_of(device),
        x_at,
        packed_at,
        scales_at,
        biases_at,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0,
    )
    return y


def _make_linear(
    x: Tensor,
    parts: Parts,
    permutation: Tensor | None,
    bias: Tensor | None,
    form: Form,
) -> Call:
    packed, scales, _ = parts
    ops.check_matrix(packed, "linear")
    k = scales.shape[-1] * form["group_size"]
    ops.check_input(x, k, form["dtype"], "linear")
    layout.check_parts(*parts, bits=form["bits"], group_size=form["group_size"])
    n, device = packed.shape[0], x.get_device()
    _check_bias(bias, x, n)
    here = served(device, *parts, permutation)
    if bias is not None and bias.get_device() != device:
        here = False
    if not (here and x.numel() and n):
        return Call(None, otherwise=_reference_linear)
    if permutation is not None:
        return Call(None, otherwise=_permuted_linear)
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous()):
        return Call(None, otherwise=_linear_and_bias)
    tidied = tidy(*parts)
    if row_stride(x) is None or any(
        a is not b for a, b in zip(tidied, parts, strict=True)
    ):
        return Call(None, otherwise=_tidied_linear)
    product = products.product_of(x, parts, form, biased=bias is not None)
    launch = products.launch_of(product, x, packed, scales)
    if launch is None:
        few = product.m <= fallback.MOST_ROWS and x.dtype in layout.WEIGHT_DTYPES
        by_triton = few and not settings.batch_invariant and fallback.wanted()
        return Call(None, otherwise=_triton_linear if by_triton else _dense_linear)
    return Call(launch, (*x.shape[:-1], n))


def _check_bias(bias: Tensor | None, x: Tensor, n: int) -> None:
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


# Each of these takes the arguments of `linear` when a launch alone does not do it.


def _reference_linear(
    x: Tensor,
    parts: Parts,
    permutation: Tensor | None,
    bias: Tensor | None,
    form: Form,
) -> Tensor:
    if bias is None or bias.dim() == 1:
        return ops.reference("linear")(x, *parts, permutation, bias, **form)
    return ops.reference("linear")(x, *parts, permutation, None, **form) + bias


def _permuted_linear(
    x: Tensor,
    parts: Parts,
    permutation: Tensor,
    bias: Tensor | None,
    form: Form,
) -> Tensor:
    return linear(x.index_select(-1, permutation), *parts, None, bias, **form)


def _linear_and_bias(
    x: Tensor, parts: Parts, _: None, bias: Tensor, form: Form
) -> Tensor:
    n = parts[0].shape[0]
    if bias.numel() == 1 or bias.numel() == bias.shape[-1]:  # one for all rows
        return linear(x, *parts, None, bias.reshape(-1).expand(n).contiguous(), **form)
    return linear(x, *parts, **form) + bias


def _tidied_linear(
    x: Tensor, parts: Parts, _: None, bias: Tensor | None, form: Form
) -> Tensor:
    if row_stride(x) is None:
        x = x.contiguous()
    return linear(x, *tidy(*parts), None, bias, **form)


def _triton_linear(
    x: Tensor, parts: Parts, _: None, bias: Tensor | None, form: Form
) -> Tensor:
    own = {"bits": form["bits"], "group_size": form["group_size"]}
    return fallback.linear(x, parts, bias, **own)


def _dense_linear(
    x: Tensor, parts: Parts, _: None, bias: Tensor | None, form: Form
) -> Tensor:
    """By torch's product with dense weights, some rows of them at a time."""
    n, k = parts[0].shape[0], x.shape[-1]
    step = _step(n, k * x.itemsize)
    own = {"bits": form["bits"], "group_size": form["group_size"]}
    dense = x.new_empty((step, k))
    rows, alike = x.reshape(-1, k), settings.batch_invariant
    y = x.new_empty((len(rows), n))
    for start in range(0, n, step):
        block = slice(start, start + step)
        packed, scales, biases = (part[block] for part in parts)
        weight = dense[: len(packed)]
        if not weights.dequantize_into(weight, (packed, scales, biases), **own):
            return _reference_linear(x, parts, None, bias, form)
        some = None if bias is None else bias[block]
        with _whole_sums:
            if alike:
                _multiply_alike(rows, weight, some, y[:, block])
            else:
                _multiply(rows, weight.t(), some, y[:, block])
    return y.view(*x.shape[:-1], n)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y ``[M, N]`` = x ``[M, K]`` @ weight ``[K, N]`` + bias."""
    if x.dtype == torch.float32 and x.shape[1] > _MOST_TERMS:
        # One sum of very many terms loses more than float32 is expected to.
        parts = zip(x.split(_MOST_TERMS, 1), weight.split(_MOST_TERMS), strict=True)
        for number, (own, rows) in enumerate(parts):
            if number:
                torch.addmm(y, own, rows, out=y)
            else:
                torch.mm(own, rows, out=y)
        if bias is not None:
            y += bias
    elif bias is None:
        torch.mm(x, weight, out=y)
    elif y.shape[1] % 8 and y.itemsize == 2 and y.is_cuda:
        # Of odd sizes torch rounds the product before it adds the bias.
        y.copy_(torch.mm(x, weight, out_dtype=torch.float32).add_(bias))
    else:
        torch.addmm(bias, x, weight, out=y)


def _multiply_alike(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = x @ weight.T + bias, the same for a row whatever others there are.

    torch chooses how to multiply by the number of rows: it is made always the same.
    """
    for start in range(0, len(x), _STEP):
        rows = x[start : start + _STEP]
        padded = F.pad(rows, (0, 0, 0, _STEP - len(rows)))
        y[start : start + _STEP] = F.linear(padded, weight, bias)[: len(rows)]


def _step(count: int, each: int) -> int:
    """How many rows or columns of so many bytes are dense at a time."""
    return min(count, max(_STEP, _SCRATCH // each // _STEP * _STEP))


@ops.register_kernel("matmul", "cuda")
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
    """``x @ W``: x ``[..., N]``, W ``[N, K]``, result ``[..., K]``; see `ops`.

    Many rows of x are multiplied by torch's product with dense weights, some rows of
    them at a time.
    """
    form: Form = {"bits": bits, "group_size": group_size}
    device = x.get_device()
    if device != library.current_device():
        with torch.cuda.device(device):
            return matmul(x, packed, scales, biases, permutation, **form, dtype=dtype)
    ops.check_matrix(packed, "matmul")
    ops.check_input(x, packed.shape[0], dtype, "matmul")
    layout.check_parts(packed, scales, biases, **form)
    n, k = packed.shape[0], scales.shape[-1] * group_size
    y = None
    if x.numel() and packed.numel() and served(device, packed, scales, biases):
        rows, parts = x.reshape(-1, n), tidy(packed, scales, biases)
        y = _transposed(rows, parts, {**form, "dtype": dtype})
        if y is None:
            y = _by_rows(rows, parts, k, form)
    if y is None:
        return ops.reference("matmul")(
            x, packed, scales, biases, permutation, **form, dtype=dtype
        )
    if permutation is not None:
        y = torch.empty_like(y).index_copy_(-1, permutation.long(), y)
    return y.view(*x.shape[:-1], k)


def _transposed(x: Tensor, parts: Parts, form: Form) -> Tensor | None:
    """By a kernel, or None where none takes it."""
    packed, scales, _ = parts
    if row_stride(x) is None:
        x = x.contiguous()
    device = x.get_device()
    pointers = [x.data_ptr(), *(part.data_ptr() for part in parts)]
    key = (
        *("transposed", x.shape, x.stride(), x.dtype, device),
        *(packed.shape, packed.stride(), scales.stride(), scales.dtype),
        *(*(pointer & 15 for pointer in pointers), *form.values()),
        *(settings.batch_invariant, settings.cuda_backend, settings.strict),
    )
    call = calls.get(key)
    if call is None:
        product = products.product_of(x, parts, form, transposed=True)
        launch = products.launch_of(product, x, packed, scales)
        call = keep(key, Call(launch, (product.m, product.k)))
    if call.launch is None:
        return None
    y = x.new_empty(call.out)
    call.launch(library.stream_of(device), *pointers, 0, y.data_ptr(), 0)
    return y


def _by_rows(x: Tensor, parts: Parts, k: int, form: Form) -> Tensor | None:
    """By dense weights, some rows of W at a time; their products add up in float32.

    Not some columns: sums as long as a vocabulary over few outputs leave a GPU idle.
    """
    packed, scales, biases = parts
    n, step = len(packed), _step(len(packed), k * x.itemsize)
    wide = torch.float32 if n > step and x.itemsize == 2 else x.dtype
    dense, y = x.new_empty((step, k)), None
    for start in range(0, n, step):
        block = slice(start, start + step)
        some = (packed[block], scales[block], biases[block])
        weight = dense[: len(some[0])]
        if not weights.dequantize_into(weight, some, **form):
            return None
        with _whole_sums:
            product = _product(x[:, block], weight, wide)
        y = product if y is None else y.add_(product)
    assert y is not None
    return y.to(x.dtype)


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x ``[M, N]`` @ weight ``[N, K]`` in x's dtype, or in float32."""
    if dtype == x.dtype:
        y = x.new_empty((len(x), weight.shape[1]))
        _multiply(x, weight, None, y)
        return y
    if x.is_cuda:
        return torch.mm(x, weight, out_dtype=dtype)
    return x.to(dtype) @ weight.to(dtype)
