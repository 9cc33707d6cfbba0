"""The operators `torch.ops.affine_tensor.*`: schemas, fakes, reference, FLOP formulas.

Each operator has one implementation, which asks `device_of` where it runs and takes the
kernel that is registered for that device (`register_kernel`), or the reference below.
The reference is plain torch: it dequantizes a block of rows at a time and lets torch
multiply. Operators lie below autograd: gradients come from ATen's own formulas through
`AffineQuantizedTensor`. To compilers they are opaque.

Shapes: ``packed`` int32 ``[N, K * bits / 32]``, ``scales`` and ``biases``
``[N, K / group_size]``, all with leading expert dimensions where an operator says so.
``permutation`` (int32 ``[K]``) names, for each stored column, the input channel it
belongs to. ``dtype`` is what the weight counts as: inputs must have it, results do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import layout

Kernel = Callable[..., Any]

_FORMAT = "*, int bits, int group_size, ScalarType dtype"
_GROUPS = "Tensor? offsets=None, Tensor? indices=None"
_WEIGHT = "Tensor packed, Tensor scales, Tensor biases"
_SCHEMAS = {
    "linear": f"(Tensor x, {_WEIGHT}, Tensor? permutation=None, Tensor? bias=None, "
    f"{_FORMAT}) -> Tensor",
    "matmul": f"(Tensor x, {_WEIGHT}, Tensor? permutation=None, {_FORMAT}) -> Tensor",
    "grouped_linear": f"(Tensor x, {_WEIGHT}, Tensor? permutation=None, {_GROUPS}, "
    f"{_FORMAT}) -> Tensor",
    "grouped_matmul": f"(Tensor x, {_WEIGHT}, Tensor? permutation=None, {_GROUPS}, "
    f"{_FORMAT}) -> Tensor",
    "embedding": f"(Tensor ids, {_WEIGHT}, {_FORMAT}) -> Tensor",
    "dequantize": f"({_WEIGHT}, Tensor? permutation=None, {_FORMAT}) -> Tensor",
    "quantize": "(Tensor w, *, int bits, int group_size) -> (Tensor, Tensor, Tensor)",
}

# Elements of the weight that the reference holds dense at a time.
_BLOCK = 1 << 22

_library = torch.library.Library("affine_tensor", "DEF")
_reference: dict[str, Kernel] = {}
_kernels: dict[str, dict[str, Kernel]] = {op: {} for op in _SCHEMAS}
_usable: dict[str, Callable[[], bool]] = {}


def device_of(tensor: Tensor) -> str:
    """The device type whose kernel is used. The one place that tests patch."""
    return tensor.device.type


def register_kernel(op: str, device: str) -> Callable[[Kernel], Kernel]:
    """Use the decorated function for operator `op` on tensors of `device`.

    It takes the operator's arguments; to pass on a case that it does not cover, it may
    call `reference(op)`.
    """
    if op not in _SCHEMAS:
        raise ValueError(
            f"there is no operator {op!r}; there are {', '.join(_SCHEMAS)}"
        )

    def register(kernel: Kernel) -> Kernel:
        _kernels[op][device] = kernel
        return kernel

    return register


def usable_if(device: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """Let the decorated function say whether a device's kernels can be used here."""

    def register(question: Callable[[], bool]) -> Callable[[], bool]:
        _usable[device] = question
        return question

    return register


def has_kernels(device: str) -> bool:
    """Whether a device has kernels that can be used on this machine."""
    registered = any(device in own for own in _kernels.values())
    return registered and (device not in _usable or _usable[device]())


def kernel(op: str, tensor: Tensor) -> Kernel | None:
    """The kernel registered for the device of a tensor, if there is one."""
    return _kernels[op].get(device_of(tensor))


def reference(op: str) -> Kernel:
    """The plain torch implementation of an operator."""
    return _reference[op]


def overload(op: str) -> Any:
    """The operator as `torch.ops` has it, looked up once rather than at each call."""
    return getattr(torch.ops.affine_tensor, op).default


def _define(name: str, fake: Kernel) -> Callable[[Kernel], Kernel]:
    """Define an operator with the decorated function as its reference."""

    def define(function: Kernel) -> Kernel:
        kernels = _kernels[name]

        def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            return kernels.get(device_of(tensor), function)(tensor, *args, **kwargs)

        _reference[name] = function
        _library.define(name + _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
        for key in ("CPU", "CUDA", "MPS"):
            _library.impl(name, run, key)
        torch.library.register_fake(f"affine_tensor::{name}", fake, lib=_library)
        return function

    return define


def _fake_linear(x, packed, scales, biases, permutation=None, bias=None, **format):  # type: ignore[no-untyped-def]
    check_input(x, scales.shape[-1] * format["group_size"], format["dtype"], "linear")
    return x.new_empty((*x.shape[:-1], packed.shape[-2]))


@_define("linear", _fake_linear)
def _linear(
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
    """``x @ W.T + bias``: x ``[..., K]``, W ``[N, K]``, result ``[..., N]``."""
    check_matrix(packed, "linear")
    check_input(x, scales.shape[-1] * group_size, dtype, "linear")
    if permutation is not None:
        x = x.index_select(-1, permutation)
    if bias is not None:
        bias = bias.expand(*bias.shape[:-1], packed.shape[0])  # one for all rows, too
    y: Tensor | None = None
    for rows, weight in _blocks(packed, scales, biases, bits, group_size, dtype):
        if len(weight) == len(packed):
            return F.linear(x, weight, bias)
        if y is None:
            y = x.new_empty((*x.shape[:-1], packed.shape[0]))  # [..., N]
        y[..., rows] = F.linear(x, weight, None if bias is None else bias[..., rows])
    return x.new_empty((*x.shape[:-1], 0)) if y is None else y


def _linear_under_autocast(key: str) -> Kernel:
    """`linear` with x, weight and bias in autocast's dtype, as `F.linear` has it.

    Registered here so that nobody need ask whether autocast is on.
    """
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    linear = overload("linear")

    def run(x: Tensor, *args: Any, dtype: torch.dtype, **format: Any) -> Tensor:
        target = torch.get_autocast_dtype(x.device.type)
        *parts, bias = args if len(args) == 5 else (*args, None)

        def cast(tensor: Tensor) -> Tensor:
            # float64 is left alone, as by autocast itself.
            return tensor if tensor.dtype == torch.float64 else tensor.to(target)

        dtype = dtype if dtype == torch.float64 else target
        bias = None if bias is None else cast(bias)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return linear(cast(x), *parts, bias, dtype=dtype, **format)

    return run


for _key in ("AutocastCPU", "AutocastCUDA", "AutocastMPS"):
    _library.impl("linear", _linear_under_autocast(_key), _key)


def _fake_matmul(x, packed, scales, biases, permutation=None, **format):  # type: ignore[no-untyped-def]
    check_input(x, packed.shape[-2], format["dtype"], "matmul")
    return x.new_empty((*x.shape[:-1], scales.shape[-1] * format["group_size"]))


@_define("matmul", _fake_matmul)
def _matmul(
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
    """``x @ W``: x ``[..., N]``, W ``[N, K]``, result ``[..., K]``."""
    check_matrix(packed, "matmul")
    check_input(x, packed.shape[0], dtype, "matmul")
    # What several blocks add up to is kept in float32 at least, and rounded once.
    sums = torch.promote_types(dtype, torch.float32)
    y: Tensor | None = None
    for rows, weight in _blocks(packed, scales, biases, bits, group_size, dtype):
        if len(weight) == len(packed):
            y = x @ weight
        else:
            part = x[..., rows].to(sums) @ weight.to(sums)
            y = part if y is None else y.add_(part)
    if y is None:  # no rows
        y = x.new_zeros((*x.shape[:-1], scales.shape[-1] * group_size))
    y = y.to(dtype)
    if permutation is None:
        return y
    return torch.empty_like(y).index_copy_(-1, permutation.long(), y)


def _fake_grouped(  # type: ignore[no-untyped-def]
    x, packed, scales, biases, permutation=None, offsets=None, indices=None, **format
):
    columns = scales.shape[-1] * format["group_size"]
    check_input(x, columns, format["dtype"], "grouped_linear")
    return x.new_empty((x.shape[0], packed.shape[-2]))


@_define("grouped_linear", _fake_grouped)
def _grouped_linear(
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
    """Each row of x ``[T, K]`` times the transpose of its expert's W ``[E, N, K]``.

    Either `offsets` (int ``[E]``: rows are sorted by expert and those of expert e end
    at ``offsets[e]``; rows past the last end give zeros) or `indices` (int ``[T]``: the
    expert of each row). Each expert may have its own permutation (``[E, K]``).
    """
    check_groups(x, packed, offsets, indices, "grouped_linear")
    check_input(x, scales.shape[-1] * group_size, dtype, "grouped_linear")
    y = x.new_zeros((len(x), packed.shape[1]))
    parts = (packed, scales, biases, permutation)
    format = {"bits": bits, "group_size": group_size, "dtype": dtype}
    return by_expert(_linear, x, y, parts, offsets, indices, format)


def _fake_grouped_matmul(  # type: ignore[no-untyped-def]
    x, packed, scales, biases, permutation=None, offsets=None, indices=None, **format
):
    check_input(x, packed.shape[-2], format["dtype"], "grouped_matmul")
    return x.new_empty((x.shape[0], scales.shape[-1] * format["group_size"]))


@_define("grouped_matmul", _fake_grouped_matmul)
def _grouped_matmul(
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
    """Each row of x ``[T, N]`` times its expert's W ``[E, N, K]``, result ``[T, K]``.

    `offsets`, `indices` and `permutation` as in `grouped_linear`, whose gradient this
    is.
    """
    check_groups(x, packed, offsets, indices, "grouped_matmul")
    check_input(x, packed.shape[1], dtype, "grouped_matmul")
    y = x.new_zeros((len(x), scales.shape[-1] * group_size))
    parts = (packed, scales, biases, permutation)
    format = {"bits": bits, "group_size": group_size, "dtype": dtype}
    return by_expert(_matmul, x, y, parts, offsets, indices, format)


def _fake_embedding(ids, packed, scales, biases, **format):  # type: ignore[no-untyped-def]
    columns = scales.shape[-1] * format["group_size"]
    return scales.new_empty((*ids.shape, columns), dtype=format["dtype"])


@_define("embedding", _fake_embedding)
def _embedding(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `ids` (int32 or int64, any shape) of W ``[N, K]``, result ``[*ids, K]``."""
    check_matrix(packed, "embedding")
    flat = ids.reshape(-1)
    rows = layout.dequantize(
        packed.index_select(0, flat),
        scales.index_select(0, flat),
        biases.index_select(0, flat),
        bits=bits,
        group_size=group_size,
        dtype=dtype,
    )
    return rows.view(*ids.shape, rows.shape[-1])


def _fake_dequantize(packed, scales, biases, permutation=None, **format):  # type: ignore[no-untyped-def]
    columns = scales.shape[-1] * format["group_size"]
    return scales.new_empty((*packed.shape[:-1], columns), dtype=format["dtype"])


@_define("dequantize", _fake_dequantize)
def _dequantize(
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    permutation: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight ``[..., N, K]``, its columns where the input channels are."""
    weight = layout.dequantize(
        packed, scales, biases, bits=bits, group_size=group_size, dtype=dtype
    )
    if permutation is None:
        return weight
    if weight.dim() > 1:
        permutation = permutation.unsqueeze(-2)  # [..., 1, K]
    target = permutation.long().expand_as(weight)
    return torch.empty_like(weight).scatter_(-1, target, weight)


def _fake_quantize(w, *, bits, group_size):  # type: ignore[no-untyped-def]
    *lead, columns = w.shape
    packed = w.new_empty((*lead, columns * bits // 32), dtype=torch.int32)
    scales = w.new_empty((*lead, columns // group_size))
    return packed, scales, torch.empty_like(scales)


@_define("quantize", _fake_quantize)
def _quantize(
    w: Tensor, *, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`layout.quantize`, its words as int32."""
    w = w.contiguous()  # a transposed weight has its columns strided
    packed, scales, biases = layout.quantize(w, bits=bits, group_size=group_size)
    return packed.view(torch.int32), scales, biases


def _blocks(
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """The dense weight, some rows at a time."""
    step = max(1, _BLOCK // max(1, scales.shape[-1] * group_size))
    for start in range(0, len(packed), step):
        rows = slice(start, start + step)
        yield (
            rows,
            layout.dequantize(
                packed[rows],
                scales[rows],
                biases[rows],
                bits=bits,
                group_size=group_size,
                dtype=dtype,
            ),
        )


def by_expert(
    product: Kernel,
    x: Tensor,
    y: Tensor,
    parts: tuple[Tensor, Tensor, Tensor, Tensor | None],
    offsets: Tensor | None,
    indices: Tensor | None,
    format: dict[str, Any],
) -> Tensor:
    """Fill y with the product of each expert and its rows of x."""
    for expert, rows in _rows_by_expert(len(parts[0]), offsets, indices):
        own = [None if part is None else part[expert] for part in parts]
        y[rows] = product(x[rows], *own, **format)
    return y


def _rows_by_expert(
    experts: int, offsets: Tensor | None, indices: Tensor | None
) -> Iterator[tuple[int, slice | Tensor]]:
    """Each expert that has rows, with them."""
    if offsets is not None:
        ends = offsets.tolist()
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                yield expert, slice(start, end)
    elif indices is not None:
        for expert in indices.unique().tolist():
            if not 0 <= expert < experts:
                raise IndexError(
                    f"expert {expert} is out of range: there are {experts}"
                )
            yield expert, (indices == expert).nonzero().squeeze(-1)


def check_groups(
    x: Tensor, packed: Tensor, offsets: Tensor | None, indices: Tensor | None, op: str
) -> None:
    if packed.dim() != 3 or x.dim() != 2 or (offsets is None) == (indices is None):
        raise ValueError(
            f"{op} takes x of two dimensions, packed [E, N, W] and one of offsets, "
            f"indices; x is {list(x.shape)}, packed {list(packed.shape)}"
        )
    if offsets is not None and offsets.shape != (len(packed),):
        raise ValueError(
            f"{op}: offsets are {list(offsets.shape)}; one end for each of the "
            f"{len(packed)} experts is needed"
        )
    if indices is not None and indices.shape != (len(x),):
        raise ValueError(
            f"{op}: indices are {list(indices.shape)}; one expert for each of the "
            f"{len(x)} rows is needed"
        )


def check_matrix(packed: Tensor, op: str) -> None:
    if packed.dim() != 2:
        raise ValueError(
            f"{op} takes a weight of two dimensions; its words are {list(packed.shape)}"
        )


def check_input(x: Tensor, columns: int, dtype: torch.dtype, op: str) -> None:
    if x.dtype != dtype:
        other = (
            f" or weight.to({x.dtype}), which keeps the packed data, or use autocast"
        )
        raise RuntimeError(
            f"{op}: the input is {x.dtype} and the quantized weight counts as {dtype}; "
            f"they must agree. Convert x.to({dtype})"
            + (other if x.dtype in layout.LOGICAL_DTYPES else "")
        )
    if x.dim() == 0 or x.shape[-1] != columns:
        raise RuntimeError(
            f"{op}: the input has shape {list(x.shape)}; its last dimension must be "
            f"{columns}"
        )


@register_flop_formula(
    [torch.ops.affine_tensor.linear, torch.ops.affine_tensor.grouped_linear]
)
def _linear_flops(x_shape, packed_shape, *_, out_shape=None, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(x_shape) * packed_shape[-2]


@register_flop_formula(
    [torch.ops.affine_tensor.matmul, torch.ops.affine_tensor.grouped_matmul]
)
def _matmul_flops(x_shape, packed_shape, *_, out_shape=None, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(x_shape[:-1]) * math.prod(out_shape[-1:]) * packed_shape[-2]
