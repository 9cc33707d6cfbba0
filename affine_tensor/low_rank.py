"""Adapters on stacked experts: ``weight + alpha * left @ right``, which stays two terms.

PEFT's `target_parameters` adds an adapter to the parameter itself (``baddbmm``, in a
parametrization that lasts for one forward). That would make the whole stack dense, keep
it for the backward, and want a gradient of its size. Here the sum is an object that knows
its terms: what multiplies by it multiplies by the packed weight and by the two factors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from .tensor import FUNCTIONS, AffineQuantizedTensor, log_once

_PEFT = "peft.tuners.lora.layer"


def _baddbmm(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.baddbmm`; what PEFT asks for as a parameter is a `LowRankSum`.

    Asked by PEFT only: nobody writes to its factors while the sum is in use.
    """
    caller = sys._getframe(2).f_globals if not torch.compiler.is_compiling() else {}
    if (
        caller.get("__name__") == _PEFT
        and len(args) == 3
        and kwargs.keys() == {"alpha"}
    ):
        weight, left, right = args
        plain = all(isinstance(a, Tensor) for a in args) and not any(
            isinstance(factor, AffineQuantizedTensor) for factor in (left, right)
        )
        if plain and isinstance(weight, AffineQuantizedTensor) and _is_plain_eager():
            return LowRankSum(weight, left, right, kwargs["alpha"])
    with torch._C.DisableTorchFunctionSubclass():
        return torch.baddbmm(*args, **kwargs)


def _is_plain_eager() -> bool:
    return (
        forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


class LowRankSum(torch.Tensor):
    """``weight + alpha * left @ right``, ``[..., N, K]``: made dense only where it must.

    `weight` is packed; `left` ``[..., N, R]`` and `right` ``[..., R, K]`` may require
    gradients. Products, transposes and entries of the first dimension keep the terms
    apart. Anything else is computed on the dense sum, with gradients, and logged once.
    """

    weight: AffineQuantizedTensor
    left: Tensor
    right: Tensor
    alpha: float

    @staticmethod
    def __new__(
        cls, weight: AffineQuantizedTensor, left: Tensor, right: Tensor, alpha: float
    ) -> LowRankSum:
        return torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight._dtype, device=weight.device
        )

    def __init__(
        self, weight: AffineQuantizedTensor, left: Tensor, right: Tensor, alpha: float
    ) -> None:
        self.weight = weight
        self.left = left
        self.right = right
        self.alpha = alpha

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LowRankSum({self.weight!r}, rank={self.left.shape[-1]})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _KNOWN:
            found = _KNOWN[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        name = torch.overrides.resolve_name(func) or str(func)
        log_once(f"{name}, adapter", _DENSE, name)
        args, kwargs = tree_map_only(LowRankSum, LowRankSum.dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Below autograd the factors' gradients would be lost.
        raise NotImplementedError(
            f"{func} does not know the sum of a packed weight and an adapter. Give the "
            "adapter to modules that are Linear, or dequantize_ the model"
        )

    def dense(self) -> Tensor:
        """The sum, dense, in the weight's dtype, with gradients for the factors."""
        with torch.autocast(self.left.device.type, enabled=False):
            change = self.left @ self.right
            return self.weight.dequantize().add(change, alpha=self.alpha)


_DENSE = (
    "%s dequantizes a packed weight with an adapter of its own on each call, and the "
    "backward keeps it: it has no kernel for one"
)


def _each(
    total: LowRankSum,
    weight: Tensor,
    change: Callable[[Tensor], Tensor],
) -> Any:
    """The same on each term, where it leaves the last two dimensions alone."""
    if not isinstance(weight, AffineQuantizedTensor):
        return NotImplemented
    return LowRankSum(weight, change(total.left), change(total.right), total.alpha)


def _transposed(total: LowRankSum) -> LowRankSum:
    return LowRankSum(
        total.weight.transpose(-1, -2),  # type: ignore[arg-type]
        total.right.transpose(-1, -2),
        total.left.transpose(-1, -2),
        total.alpha,
    )


def _transpose(total: LowRankSum, dim0: int, dim1: int) -> Any:
    rank = total.weight.dim()
    if {dim0 % rank, dim1 % rank} != {rank - 2, rank - 1}:
        return NotImplemented
    return _transposed(total)


def _entries(total: LowRankSum, index: Any) -> Any:
    """``total[index]``: an expert, or one for each row, by a number or a tensor."""
    number = isinstance(index, int) and not isinstance(index, bool)
    whole = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
    if total.weight.dim() != 3 or not (number or whole):
        return NotImplemented
    return _each(total, total.weight[index], lambda factor: factor[index])


def _to(total: LowRankSum, *args: Any, **kwargs: Any) -> Any:
    return _each(
        total,
        total.weight.to(*args, **kwargs),
        lambda factor: factor.to(*args, **kwargs),
    )


# ---- products -------------------------------------------------------------------


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, LowRankSum) or weight.weight.dim() != 2:
        return NotImplemented
    y = F.linear(input, weight.weight, bias)
    change = F.linear(F.linear(input, weight.right), weight.left)
    return y.add(change, alpha=weight.alpha)


def _product(function: Callable[[Any, Any], Tensor]) -> Callable[..., Any]:
    """`mm`, `bmm` and `matmul`: the thin factor next to what multiplies comes first."""

    def product(*operands: Any, **kwargs: Any) -> Any:
        if kwargs or len(operands) != 2:
            return NotImplemented
        first, second = operands
        if isinstance(first, LowRankSum) and isinstance(second, LowRankSum):
            return NotImplemented
        if isinstance(first, LowRankSum):
            y = function(first.weight, second)
            change = function(first.left, function(first.right, second))
            return y.add(change, alpha=first.alpha)
        y = function(first, second.weight)
        change = function(function(first, second.left), second.right)
        return y.add(change, alpha=second.alpha)

    return product


def _grouped_mm(
    x: Any,
    weight: Any,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> Any:
    """``[S, N] @ [E, N, K]``, rows sorted by expert."""
    if not isinstance(weight, LowRankSum) or isinstance(x, LowRankSum):
        return NotImplemented
    if weight.weight.dim() != 3 or offs is None or bias is not None:
        return NotImplemented
    if out_dtype is not None or x.dim() != 2:
        return NotImplemented
    y = torch._grouped_mm(x, weight.weight, offs=offs)
    # torch wants rows of whole 16 bytes.
    more = -weight.left.shape[-1] % _ALIGNED
    left = F.pad(weight.left, (0, more)).contiguous()
    right = F.pad(weight.right, (0, 0, 0, more)).contiguous()
    change = torch._grouped_mm(torch._grouped_mm(x, left, offs=offs), right, offs=offs)
    return y.add(change, alpha=weight.alpha)


_ALIGNED = 8

_mm = _product(torch.matmul)
_bmm = _product(torch.bmm)

_KNOWN: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch._grouped_mm: _grouped_mm,
    **dict.fromkeys((torch.bmm, torch.Tensor.bmm), _bmm),
    **dict.fromkeys(
        (
            torch.mm,
            torch.Tensor.mm,
            torch.matmul,
            torch.Tensor.matmul,
            torch.Tensor.__matmul__,
        ),
        _mm,
    ),
    torch.Tensor.__rmatmul__: lambda second, first: _mm(first, second),
    torch.Tensor.__getitem__: _entries,
    **dict.fromkeys((torch.transpose, torch.Tensor.transpose), _transpose),
    torch.Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]
    torch.Tensor.to: _to,
    torch.Tensor.requires_grad.__get__: (  # type: ignore[attr-defined]
        lambda total: total.left.requires_grad or total.right.requires_grad
    ),
}

_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.stride,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu")
    ),
}

FUNCTIONS[torch.baddbmm] = _baddbmm
