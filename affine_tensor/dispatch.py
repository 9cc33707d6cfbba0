"""What each aten operator does with packed weights: one handler per family.

A handler takes ``(func, args, kwargs)`` as `__torch_dispatch__` gets them. Dimensions
are those of the tensor as it is shown; `_stored` maps them to those of the parts, which
differ where the tensor is transposed. Operators that are not here dequantize, say so
once in the log, and run on the dense weight (of a view too, which is then a copy that
cannot be written to); those that write into a packed weight raise.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from . import layout, ops
from .copied import CopiedPart, written
from .tensor import (
    FALLBACK,
    FROZEN,
    NOT_ON_DISK,
    AffineQuantizedTensor,
    Handler,
    implements,
    log_once,
    of_module,
)

aten = torch.ops.aten

_linear = ops.overload("linear")
_matmul = ops.overload("matmul")
_grouped_linear = ops.overload("grouped_linear")
_grouped_matmul = ops.overload("grouped_matmul")
_embedding = ops.overload("embedding")

_ALL = slice(None)


def _is_packed(value: object) -> bool:
    return isinstance(value, AffineQuantizedTensor)


def _operands(
    weight: AffineQuantizedTensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The parts as operators take them; None stands for no permutation."""
    return weight._packed, weight.scales, weight.biases, weight.permutation


def _format(weight: AffineQuantizedTensor) -> dict[str, Any]:
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "dtype": weight._dtype,
    }


# ---- everything else ------------------------------------------------------------


@implements(FALLBACK)
def _fallback(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Take the operator apart, or run it on dense weights."""
    if getattr(func, "_can_decompose", lambda: False)():
        # Composite operators arrive whole in inference mode, as parts otherwise.
        return func.decompose(*args, **kwargs)
    if func.namespace not in ("aten", "prims", "prim"):
        if str(func) in _FOREIGN:
            return _FOREIGN[str(func)](func, args, kwargs)
        raise NotImplementedError(
            f"{func} does not know packed weights. Give it weight.dequantize()"
        )
    _refuse_to_write(func, args, kwargs)
    text = "%s dequantizes a packed weight on each call: it has no kernel for one"
    if func.is_view:
        text += ". What it gives is a copy, which cannot be written to"
    log_once(str(func), text, func)
    weight = args[0] if func.is_view else None
    with nullcontext() if weight is None else _as_view(weight):
        args, kwargs = tree_map_only(
            AffineQuantizedTensor, lambda weight: weight.dequantize(), (args, kwargs)
        )
        result = func(*args, **kwargs)
        return result if weight is None else _copied(weight, result)


def _copied(weight: AffineQuantizedTensor, result: Any) -> Any:
    """Dense results of a view of `weight`, guarded against writing."""
    if isinstance(result, (list, tuple)):
        return [_copied(weight, one) for one in result]
    unit = math.lcm(weight.group_size, 32 // math.gcd(weight.bits, 32))
    return CopiedPart(result, repr(weight), unit)


def _as_view(base: Tensor) -> Any:
    """A view must not become an inference tensor where its base is none."""
    if torch.is_inference_mode_enabled() and not base.is_inference():
        return torch.inference_mode(False)
    return nullcontext()


def _refuse_to_write(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise if `func` would write into a packed weight."""
    if any(_is_packed(value) for value in written(func, args, kwargs)):
        raise NotImplementedError(f"{func} on a packed weight{of_module()}: {FROZEN}")


def _dense(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A known operator in a form that only the dense weight has."""
    return _fallback(func, args, kwargs)


# ---- products -------------------------------------------------------------------


@implements(aten.linear.default)
def _aten_linear(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = _arguments(func, args, kwargs)
    if not _is_packed(weight) or weight.dim() != 2 or _is_packed(x) or _is_packed(bias):
        return func.decompose(*args, **kwargs)
    if weight.transposed:
        y = _times(x, weight, to_rows=True)
        return y if bias is None else y + _fitting(bias, y)
    return _linear(x, *_operands(weight), bias, **_format(weight))


def _times(x: Tensor, weight: AffineQuantizedTensor, *, to_rows: bool) -> Tensor:
    """``x @ weight.T`` if `to_rows`, else ``x @ weight``, of the tensor as shown."""
    op = _linear if to_rows != weight.transposed else _matmul
    return op(x, *_operands(weight), **_format(weight))


@implements(aten.mm.default, aten.mv.default)
def _mm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    left, right = _arguments(func, args, kwargs)[:2]
    ranks = (2, 1) if func is aten.mv.default else (2, 2)
    if _is_packed(left) == _is_packed(right) or (left.dim(), right.dim()) != ranks:
        return _dense(func, args, kwargs)
    if _is_packed(right):
        if right.dim() == 1:
            return _dense(func, args, kwargs)
        return _times(left, right, to_rows=False)
    # The weight on the left: autograd writes it for column-major inputs.
    if right.dim() == 1:
        return _times(right, left, to_rows=True)
    return _times(right.t(), left, to_rows=True).t()


@implements(aten.addmm.default)
def _addmm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    added, left, right, beta, alpha = _arguments(func, args, kwargs)[:5]
    if _is_packed(added) or _is_packed(left) == _is_packed(right):
        return _dense(func, args, kwargs)
    as_linear = _is_packed(right) and right.transposed and right.dim() == 2
    if as_linear and beta == alpha == 1 and added.dim() == 1:
        return _linear(left, *_operands(right), added, **_format(right))
    product = _mm(aten.mm.default, (left, right), {})
    added = _fitting(added, product)
    if alpha == 0:  # as in BLAS, the product is then ignored, infinities included
        return (added * beta).expand_as(product).clone()
    if alpha != 1:
        product = product * alpha
    if beta == 0:  # as in BLAS, what is added is then ignored, NaN included
        return product
    return torch.add(product, added, alpha=beta)


def _fitting(added: Tensor, product: Tensor) -> Tensor:
    """What is added to a product, refused where torch refuses it for dense weights."""
    if added.dtype != product.dtype:
        raise RuntimeError(
            f"{added.dtype} cannot be added to a product in {product.dtype}; they must "
            "agree"
        )
    return added.expand(product.shape)


@implements(aten.bmm.default)
def _bmm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    left, right = _arguments(func, args, kwargs)[:2]
    if _is_packed(left) == _is_packed(right):
        return _dense(func, args, kwargs)
    if left.shape[0] != right.shape[0] or left.shape[2] != right.shape[1]:
        raise RuntimeError(
            f"bmm: {list(left.shape)} and {list(right.shape)} do not fit together"
        )
    # With the weight on the left: (W x)^T = x^T W^T.
    turned = _is_packed(left)
    weight, x = (left, right.mT) if turned else (right, left)
    batch, rows, columns = x.shape
    product = _grouped_linear if turned != weight.transposed else _grouped_matmul
    own = torch.arange(batch, device=x.device, dtype=torch.int32)
    # One launch for all: each row has its expert, or each expert ends after its rows.
    groups = (None, own) if rows == 1 else ((own + 1) * rows, None)
    y = product(
        x.reshape(batch * rows, columns),
        *_operands(weight),
        *groups,
        **_format(weight),
    )
    y = y.view(batch, rows, y.shape[-1])
    return y.mT.contiguous() if turned else y


@implements(aten._grouped_mm.default)
def _grouped_mm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, weight, offsets, bias, dtype = _arguments(func, args, kwargs)[:5]
    if not _is_packed(weight) or _is_packed(x) or weight.dim() != 3 or x.dim() != 2:
        return _dense(func, args, kwargs)
    if bias is not None or offsets is None:
        return _dense(func, args, kwargs)
    op = _grouped_linear if weight.transposed else _grouped_matmul
    y = op(x, *_operands(weight), offsets, **_format(weight))
    return y if dtype is None else y.to(dtype)


def _grouped_mm_of_transformers(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor:
    x, weight, offsets = _arguments(func, args, kwargs)
    return cast(Tensor, aten._grouped_mm.default(x, weight, offsets))


def _grouped_mm_of_transformers_backward(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    x, weight, offsets, gradient = _arguments(func, args, kwargs)
    # Packed weights are frozen: nobody asks for the second, which must be a tensor.
    none = x.new_zeros(()).expand(weight.shape)
    return aten._grouped_mm.default(gradient, weight.mT, offsets), none


# Operators that exist once their own package has been imported, so known by name.
_FOREIGN: dict[str, Handler] = {}


def implement_foreign(handler: Handler, *names: str) -> None:
    """Enter a handler for operators of other packages: ``"namespace.name.overload"``.

    Raises ValueError where another handler has the name.
    """
    for name in names:
        if _FOREIGN.setdefault(name, handler) is not handler:
            raise ValueError(f"{name} has a handler: {_FOREIGN[name].__name__}")


# transformers' experts have these where they compile in another dtype than bfloat16.
implement_foreign(
    _grouped_mm_of_transformers, "transformers.grouped_mm_fallback.default"
)
implement_foreign(
    _grouped_mm_of_transformers_backward,
    "transformers.grouped_mm_fallback_backward.default",
)


@implements(aten.embedding.default)
def _aten_embedding(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, ids = _arguments(func, args, kwargs)[:2]
    if not _is_packed(weight) or weight.dim() != 2 or weight.transposed:
        return _dense(func, args, kwargs)
    if weight.permutation is not None:
        return (
            _take_rows(weight, 0, ids.reshape(-1))
            .dequantize()
            .view(*ids.shape, weight.shape[1])
        )
    return _embedding(ids, *_operands(weight)[:3], **_format(weight))


@implements(aten.add.Tensor)
def _add(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The sum that DoRA takes the norm of is dense by nature, and so no slow path, and
    so are positions added to what a batch reads.

    It is made in the memory of the dense weight. Other sums are mostly weights to
    multiply with, and how they are made belongs in the log.
    """
    weight, other, alpha = _arguments(func, args, kwargs)
    if _is_packed(other) and _are_positions(other, weight):
        return torch.add(weight, other.dequantize(), alpha=alpha)
    if _is_packed(weight) and _are_positions(weight, other):
        return torch.add(weight.dequantize(), other, alpha=alpha)
    if (
        not _is_packed(weight)
        or type(other) is not Tensor
        or other.shape != weight.shape
        or not is_called_from("peft.tuners.lora.dora")
    ):
        return _dense(func, args, kwargs)
    dense = weight.dequantize()
    if torch.result_type(dense, other) != dense.dtype:
        return torch.add(dense, other, alpha=alpha)
    return dense.add_(other, alpha=alpha)


def _are_positions(weight: AffineQuantizedTensor, other: Any) -> bool:
    """Whether rows of a table are added to each sequence of a batch: the result has no
    fewer elements than the dense rows. Whisper's decoder takes them for each sequence."""
    if type(other) is not Tensor or other.dim() != 3:
        return False
    return weight.shape == other.shape[1:] or (
        weight.shape == other.shape and is_called_from("transformers.models.whisper")
    )


@implements(aten.embedding_renorm_.default)
def _embedding_renorm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    raise NotImplementedError(
        "an embedding with max_norm rewrites its weight on each call, which a packed "
        "weight cannot do. Set max_norm to None, or leave this embedding dense"
    )


# ---- copies ---------------------------------------------------------------------


@implements(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    new = _view(args[0], lambda part: func(part))
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements(aten.clone.default)
def _clone(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    memory_format = kwargs.get("memory_format") or torch.preserve_format
    wants_rows = memory_format == torch.contiguous_format and weight.transposed
    # Who shards a weight only wants its parts in order, to send them.
    if wants_rows and not is_called_from(
        "torch.distributed", "transformers.distributed"
    ):
        return _dense(func, args, kwargs)  # row-major along the wrong axis for groups
    return weight._map(lambda part: part.clone(memory_format=memory_format))


@implements(aten._to_copy.default)
def _to_copy(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A float dtype renames and shares the parts; a device moves them."""
    weight = args[0]
    dtype = kwargs.get("dtype") or weight._dtype
    if dtype not in layout.LOGICAL_DTYPES or kwargs.get("layout") not in (
        None,
        torch.strided,
    ):
        return _dense(func, args, kwargs)
    moves = {k: kwargs[k] for k in ("device", "pin_memory") if kwargs.get(k)}
    device = torch.device(moves.get("device", weight.device))
    if device.type == weight.device.type and device.index is None:
        device = weight.device
    if kwargs.get("memory_format") == torch.contiguous_format and weight.transposed:
        return _dense(func, args, kwargs)
    if dtype != weight._dtype and device == weight.device and "pin_memory" not in moves:
        return weight._map(aten.alias.default, dtype=dtype)
    moves["non_blocking"] = kwargs.get("non_blocking", False)
    return weight._map(lambda part: aten._to_copy.default(part, **moves), dtype=dtype)


@implements(aten.copy_.default)
def _copy(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Packed to packed copies parts, float to packed quantizes, else dequantizes."""
    target, source = args[:2]
    non_blocking = _arguments(func, args, kwargs)[2]
    if not _is_packed(target):
        return target.copy_(source.dequantize(), non_blocking)
    if not _is_packed(source):
        if is_called_from("peft."):  # a merge, of which quantizing would lose most
            raise NotImplementedError(
                f"{func} into a packed weight{of_module()}: {FROZEN}"
            )
        source = _quantized_like(target, source)
    _check_same_format(target, source)
    for to, part in zip(target._parts(), source._parts(), strict=True):
        to.copy_(part, non_blocking)
    return return_and_correct_aliasing(func, args, kwargs, target)


def _quantized_like(target: AffineQuantizedTensor, source: Tensor) -> Tensor:
    """A float source in the packed format of `target`."""
    if not source.is_floating_point():
        raise TypeError(f"copy_ of a {source.dtype} tensor into {target!r}")
    source = source.detach().expand(target.shape)
    if target.transposed:
        source = source.transpose(-1, -2)
    if target.permutation is not None:
        order = target.permutation.to(source.device, torch.int64)
        if target.dim() > 1:
            order = order.unsqueeze(-2)
        source = source.gather(-1, order.expand_as(source))
    new = AffineQuantizedTensor.from_dense(
        source.to(target.scales.dtype), target.bits, target.group_size
    )
    new.permutation = target.permutation
    new.transposed = target.transposed
    return new


def _check_same_format(
    target: AffineQuantizedTensor, source: AffineQuantizedTensor
) -> None:
    same = (
        _stored_format(target) == _stored_format(source)
        and target._packed.shape == source._packed.shape
    )
    if not same:
        raise RuntimeError(
            f"copy_ of {source!r} into {target!r}: bits, group_size, shape, dtype of "
            "the scales, transposition and permutation must agree. Replace the "
            "parameter instead, with load_state_dict(..., assign=True) for example"
        )
    orders = [
        part for part in (target.permutation, source.permutation) if part is not None
    ]
    if len(orders) == 2 and not _has_own_order(target) and not torch.equal(*orders):
        raise RuntimeError(
            f"copy_ of {source!r} into a view of a packed weight: their permutations "
            "differ, and other rows of that weight use the same one. Replace the whole "
            "weight, or copy_ source.dequantize(), which quantizes again"
        )


def _has_own_order(weight: AffineQuantizedTensor) -> bool:
    """Whether no row outside of this weight goes by its permutation.

    It then has the same share of the memory of the words as of the permutation. Not
    `_is_view()`, which is False for views made in inference mode.
    """
    words, order = weight._packed, weight.permutation
    assert order is not None
    of_words, of_order = (part.untyped_storage().nbytes() for part in (words, order))
    return of_words * order.nbytes == of_order * words.nbytes


def _stored_format(weight: AffineQuantizedTensor) -> tuple[Any, ...]:
    has_permutation = weight.permutation is not None
    return (
        weight.bits,
        weight.group_size,
        weight.scales.dtype,
        weight.transposed,
        has_permutation,
    )


@implements(aten.empty_like.default)
def _empty_like(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    dtype = kwargs.get("dtype") or weight._dtype
    if dtype not in layout.LOGICAL_DTYPES:
        return _dense(func, args, kwargs)
    options = {k: kwargs[k] for k in ("device", "pin_memory") if k in kwargs}

    def in_order(permutation: Tensor) -> Tensor:
        # Uninitialized, it would lead out of the row.
        device = options.get("device") or permutation.device
        columns = torch.arange(permutation.shape[-1], dtype=torch.int32, device=device)
        return columns.expand(permutation.shape).contiguous()

    return weight._map(
        lambda part: torch.empty_like(part, **options), in_order, dtype=dtype
    )


@implements(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
def _create(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A dense tensor like this one: only shape, dtype and device matter."""
    weight = args[0]
    if func is aten.new_zeros.default and _is_sharding():
        return _padding(weight, args[1])
    like = torch.empty_strided(
        weight.shape, weight.stride(), dtype=weight._dtype, device=weight.device
    )
    return func(like, *args[1:], **kwargs)


def is_called_from(*modules: str) -> bool:
    """Whether a module whose name begins so is among the callers, up to a dozen."""
    frame = sys._getframe(1)
    for _ in range(12):
        if str(frame.f_globals.get("__name__", "")).startswith(modules):
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


def _is_sharding() -> bool:
    """FSDP2 makes the memory of a shard with new_zeros, and would copy into it what
    it took the shard of: a dense one would make all dense, without a word."""
    return is_called_from("torch.distributed.fsdp._fully_shard._fsdp_param")


def _padding(weight: AffineQuantizedTensor, size: Sequence[int]) -> Tensor:
    """Zeros in the format of `weight`, with another first dimension."""
    if weight.dim() < 2 or list(size[1:]) != list(weight.shape[1:]):
        raise NotImplementedError(
            f"FSDP2 takes {list(size)} of {weight!r} for a shard; packed weights are "
            "sharded along their first dimension only"
        )
    lead = size[0]

    def zeros(part: Tensor) -> Tensor:
        return part.new_zeros(lead, *part.shape[1:])

    def in_order(order: Tensor) -> Tensor:
        if order.dim() == 1:
            return order.clone()
        columns = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
        return columns.expand(lead, *order.shape[1:]).contiguous()

    return weight._map(zeros, in_order)


@implements(aten.constant_pad_nd.default)
def _pad(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Zeros after the last entries, as DTensor makes shards of one size with them."""
    weight, pad, value = _arguments(func, args, kwargs)
    rank, bits, group = weight.dim(), weight.bits, weight.group_size
    after = {rank - 1 - i: n for i, n in enumerate(pad[1::2]) if n}
    columns = sum(n for dim, n in after.items() if _stored(weight, dim) == rank - 1)
    if (
        value
        or any(pad[::2])
        or any(n < 0 for n in after.values())
        or (columns and weight.permutation is not None)
        or columns % group
        or columns * bits % 32
        or (weight.permutation is not None and rank > 2)
    ):
        return _dense(func, args, kwargs)
    more = [0] * rank
    for dim, count in after.items():
        more[_stored(weight, dim)] = count

    def pad_part(part: Tensor) -> Tensor:
        last = columns * bits // 32 if part is weight._packed else columns // group
        sides = [side for n in [last, *more[-2::-1]] for side in (0, n)]
        return torch.nn.functional.pad(part, sides)

    return weight._map(pad_part, torch.clone)


@implements(aten.equal.default)
def _equal(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    left, right = args[:2]
    if left.shape != right.shape:
        return False
    if _alike((left, right)):
        pairs = zip(left._parts(), right._parts(), strict=True)
        if all(a.equal(b) for a, b in pairs):
            return True
    dense = [t.dequantize() if _is_packed(t) else t for t in (left, right)]
    return torch.equal(*dense)


@implements(aten.is_pinned.default)
def _is_pinned(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return all(func(part, *args[1:], **kwargs) for part in args[0]._parts())


@implements(aten._pin_memory.default)
def _pin_memory(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0]._map(lambda part: func(part, *args[1:], **kwargs))


@implements(aten.record_stream.default)
def _record_stream(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for part in args[0]._parts():
        func(part, *args[1:], **kwargs)


# ---- views ----------------------------------------------------------------------


def _view(
    weight: AffineQuantizedTensor,
    part: Callable[[Tensor], Tensor],
    permutation: Callable[[Tensor], Tensor] | None = None,
    **changes: Any,
) -> AffineQuantizedTensor:
    """`_map` for operators that return views."""
    with _as_view(weight):
        return weight._map(part, permutation, **changes)


def _new_axis(rank: int, dim: int) -> int:
    """Where a new dimension goes, counted from 0, in a tensor of `rank` dimensions."""
    if not -rank - 1 <= dim <= rank:
        raise IndexError(f"a new dimension {dim} is out of range for {rank} dimensions")
    return dim % (rank + 1)


def _axis(weight: Tensor, dim: int) -> int:
    """Dimension `dim`, counted from 0."""
    rank = weight.dim()
    if not -rank <= dim < rank:
        raise IndexError(f"dimension {dim} is out of range for {rank} dimensions")
    return dim % rank


def _stored(weight: AffineQuantizedTensor, dim: int) -> int:
    """The dimension of the parts behind dimension `dim`, from 0."""
    rank, dim = weight.dim(), _axis(weight, dim)
    if weight.transposed and dim >= rank - 2:
        return 2 * rank - 3 - dim
    return dim


def _keep(part: Tensor) -> Tensor:
    return part


@implements(aten.t.default, aten.transpose.int)
def _transpose(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, rank = args[0], args[0].dim()
    if rank == 1 and func is aten.t.default:
        return _alias(aten.alias.default, (weight,), {})
    dims = (0, 1) if func is aten.t.default else args[1:3]
    first, second = (_axis(weight, dim) for dim in dims)
    order = list(range(rank))
    order[first], order[second] = second, first
    return _permuted(func, args, kwargs, order)


@implements(aten.permute.default)
def _permute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    order = [_axis(args[0], dim) for dim in args[1]]
    return _permuted(func, args, kwargs, order)


def _permuted(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], order: list[int]
) -> Any:
    """Any order of the leading dimensions, and of the last two."""
    weight, rank = args[0], args[0].dim()
    last = list(range(rank))[-2:]
    if sorted(order) != list(range(rank)):
        raise RuntimeError(f"{func} does not name each of {rank} dimensions once")
    if sorted(order[-2:]) != last:
        return _dense(func, args, kwargs)
    lead = order[: rank - 2]
    flips = order[-2:] != last
    new = _view(
        weight,
        lambda part: part.permute(*lead, *last),
        lambda order: order.permute(*lead, rank - 2),
        transposed=weight.transposed != flips,
    )
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements(aten.slice.Tensor)
def _slice(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, dim, start, end, step = _arguments(func, args, kwargs)
    stored, rank = _stored(weight, dim), weight.dim()
    if stored < rank - 1:  # torch finds the bounds, as compilers do not know them yet

        def cut(part: Tensor) -> Tensor:
            return cast(Tensor, func(part, stored, start, end, step))

        new = _view(weight, cut, cut if stored < rank - 2 else _keep)
        return return_and_correct_aliasing(func, args, kwargs, new)
    start, end, step = slice(start, end, step).indices(weight.shape[dim])
    columns = _sliced(weight, stored, start, max(start, end), step)
    if columns is None:
        return _dense(func, args, kwargs)
    return return_and_correct_aliasing(func, args, kwargs, columns)


def _sliced(
    weight: AffineQuantizedTensor, dim: int, start: int, end: int, step: int = 1
) -> AffineQuantizedTensor | None:
    """A slice along dimension `dim` of the parts, or None where it is not packed."""
    rank = weight.dim()
    if dim < rank - 1:
        cut = (_ALL,) * dim + (slice(start, end, step),)
        own = dim < rank - 2  # experts have a permutation each, rows share one
        return _view(
            weight, lambda part: part[cut], (lambda p: p[cut]) if own else _keep
        )
    if (start, end, step) == (0, weight._packed.shape[-1] * 32 // weight.bits, 1):
        return _view(weight, aten.alias.default)
    if step != 1 or weight.permutation is not None or start == end:
        return None
    bits, group = weight.bits, weight.group_size
    if start % group or end % group or start * bits % 32 or end * bits % 32:
        return None
    words = slice(start * bits // 32, end * bits // 32)
    groups = slice(start // group, end // group)

    def cut_columns(part: Tensor) -> Tensor:
        return part[..., words if part is weight._packed else groups]

    return _view(weight, cut_columns)


def _refuse_shard(weight: AffineQuantizedTensor, start: int, end: int) -> None:
    """A shard must be packed: raise ValueError where DTensor would make a dense one."""
    if is_called_from(
        "torch.distributed.tensor.placement_types",
        "torch.distributed._shard.",
        "torch.distributed.checkpoint.",
    ):
        from .distributed import why_not_cut

        raise ValueError(why_not_cut(weight, start, end))


@implements(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def _split(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Views made of slices; dense where one of them would be."""
    arguments = _arguments(func, args, kwargs)
    weight, dim = arguments[0], arguments[-1]
    size = weight.shape[dim]
    if func is aten.unbind.int:
        if _stored(weight, dim) == weight.dim() - 1:
            return _dense(func, args, kwargs)
        return [_select_view(weight, dim, index) for index in range(size)]
    sizes = arguments[1]
    if isinstance(sizes, int):
        whole = range(0, max(size, 1), sizes) if sizes else [0]
        sizes = [min(sizes, size - start) for start in whole]
    if sum(sizes) != size:
        raise RuntimeError(f"split of {size} into {sizes}: the sizes must add up")
    stored, pieces, start = _stored(weight, dim), [], 0
    for length in sizes:
        pieces.append(_sliced(weight, stored, start, start + length))
        start += length
    if any(piece is None for piece in pieces):
        _refuse_shard(weight, 0, sizes[0])
        return _dense(func, args, kwargs)
    return return_and_correct_aliasing(func, args, kwargs, pieces)


@implements(aten.select.int)
def _select(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    new = _select_view(*args[:3])
    if _is_packed(new):
        return return_and_correct_aliasing(func, args, kwargs, new)
    return new


def _select_view(weight: AffineQuantizedTensor, dim: int, index: int) -> Tensor:
    stored, rank = _stored(weight, dim), weight.dim()
    size = weight.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for {size} entries")
    at = (_ALL,) * stored + (index % size,)
    if stored < rank - 2:
        return _view(weight, lambda part: part[at])
    if stored == rank - 2 and (weight.permutation is None or rank == 2):
        return _view(weight, lambda part: part[at], _keep, transposed=False)
    return cast(
        Tensor, _dense(aten.select.int, (weight, dim, index), {})
    )  # one column of codes is no packed tensor


@implements(aten.unsqueeze.default)
def _unsqueeze(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, dim = args[:2]
    rank = weight.dim()
    dim = _new_axis(rank, dim)
    if dim > max(rank - 2, 0):
        return _dense(func, args, kwargs)
    permutation = None if rank > 1 else _keep
    new = _view(weight, lambda part: part.unsqueeze(dim), permutation)
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, rank = args[0], args[0].dim()
    dims = args[1] if len(args) > 1 else list(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {d % rank for d in dims if weight.shape[d] == 1}
    if any(d >= rank - 2 for d in gone):
        return _dense(func, args, kwargs)
    order = sorted(gone, reverse=True)

    def squeeze(part: Tensor) -> Tensor:
        for dim in order:
            part = part.squeeze(dim)
        return part

    new = _view(weight, squeeze)
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements(aten.expand.default)
def _expand(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Leading dimensions only."""
    weight, sizes = args[0], list(args[1])
    rank = weight.dim()
    kept = [s if s != -1 else 0 for s in sizes[-2:]]
    same = [s in (0, own) for s, own in zip(kept, weight.shape[-2:], strict=False)]
    if rank < 2 or len(sizes) < rank or not all(same):
        return _dense(func, args, kwargs)
    lead = sizes[:-2]
    new = _view(
        weight,
        lambda part: part.expand(*lead, -1, -1),
        lambda order: order.expand(*lead, -1),
    )
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements(aten.view.default, aten._unsafe_view.default)
def _reshape(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Other leading dimensions, or any shape whose rows are whole groups and words; of
    a transposed matrix, blocks of whole groups and words."""
    weight, size = args[0], list(args[1])
    if -1 in size:
        known = math.prod(s for s in size if s != -1)
        size[size.index(-1)] = weight.numel() // known if known else 0
    if list(weight.shape) == size:
        return _alias(aten.alias.default, (weight,), {})
    if math.prod(size) != weight.numel():
        return _dense(func, args, kwargs)
    if len(size) > 1 and size[-2:] == list(weight.shape[-2:]):
        lead = size[:-2]
        new = _view(
            weight,
            lambda part: part.view(*lead, *part.shape[-2:]),
            lambda order: order.view(*lead, order.shape[-1]),
        )
        return return_and_correct_aliasing(func, args, kwargs, new)
    bits, group = weight.bits, weight.group_size
    if (
        weight.transposed
        and weight.dim() == 2
        and weight.permutation is None
        and size[2:]
        and size[-1] == weight.shape[-1]
        and not layout.why_not(size[-2], bits=bits, group_size=group)
    ):  # experts under each other, ``[E * K, N]`` as ``[E, K, N]``

        def cut_columns(part: Tensor) -> Tensor:
            cut = part.unflatten(-1, (*size[:-2], -1))
            return cut.movedim(0, -2)

        new = _view(weight, cut_columns)
        return return_and_correct_aliasing(func, args, kwargs, new)
    columns = size[-1] if size else 0
    bound = weight.transposed or weight.permutation is not None
    if bound and size == [weight.numel()] and _is_sharding():
        # It only keeps this, to know the shard again by.
        return _view(weight, aten.alias.default)
    if bound or layout.why_not(columns, bits=bits, group_size=group):
        return _dense(func, args, kwargs)

    def reshape(part: Tensor) -> Tensor:
        width = columns * bits // 32 if part is weight._packed else columns // group
        return part.view(*size[:-1], width)

    new = _view(weight, reshape)
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements(aten.view.dtype)
def _view_as_dtype(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if is_called_from("accelerate.utils.offload"):
        # It would read the dense bfloat16 back, and put it in place of the packed weight.
        raise RuntimeError(f"{args[0]!r} cannot be offloaded to disk. {NOT_ON_DISK}")
    return _dense(func, args, kwargs)


@implements(aten.as_strided.default)
def _as_strided(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, size, stride = args[:3]
    offset = _arguments(func, args, kwargs)[3]
    if (tuple(size), tuple(stride)) != (weight.shape, weight.stride()) or offset:
        return _dense(func, args, kwargs)
    return _alias(aten.alias.default, (weight,), {})


# ---- gathers and joins ----------------------------------------------------------


@implements(aten.index_select.default)
def _index_select(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, dim, index = args[:3]
    if not _is_packed(weight) or _stored(weight, dim) == weight.dim() - 1:
        return _dense(func, args, kwargs)
    return _take_rows(weight, _stored(weight, dim), index)


def _take_rows(
    weight: AffineQuantizedTensor, dim: int, index: Tensor
) -> AffineQuantizedTensor:
    """Entries `index` (one dimension) along dimension `dim` of the parts, not K."""
    own = dim < weight.dim() - 2
    return weight._map(
        lambda part: part.index_select(dim, index),
        (lambda order: order.index_select(dim, index)) if own else torch.clone,
    )


@implements(aten.index.Tensor)
def _index(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``weight[index]`` with one tensor on the first dimension, unless that is K."""
    weight, indices = args[:2]
    if not _is_packed(weight) or indices[0] is None or len(indices) > 1:
        return _dense(func, args, kwargs)
    index, rank = indices[0], weight.dim()
    rows = rank == 2
    shares = rows and weight.permutation is not None and index.dim() != 1
    if _stored(weight, 0) == rank - 1 or index.dim() == 0 or shares:
        return _dense(func, args, kwargs)
    if index.dtype in (torch.bool, torch.uint8) and index.dim() != 1:
        return _dense(func, args, kwargs)
    return weight._map(lambda part: part[index], torch.clone if rows else None)


@implements(aten.cat.default)
def _cat(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weights, dim = _arguments(func, args, kwargs)
    if not _alike(weights):
        return _dense(func, args, kwargs)
    first, rank = weights[0], weights[0].dim()
    stored = _stored(first, dim)
    if stored == rank - 1 and first.permutation is not None:
        return _dense(func, args, kwargs)
    own = stored < rank - 2
    return _joined(weights, lambda parts: torch.cat(parts, stored), own)


@implements(aten.stack.default)
def _stack(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weights, dim = _arguments(func, args, kwargs)
    rank = weights[0].dim()
    stored = _new_axis(rank, dim)
    if not _alike(weights) or rank < 2 or stored > rank - 2:
        return _dense(func, args, kwargs)
    return _joined(weights, lambda parts: torch.stack(parts, stored), True)


def _alike(weights: Sequence[Any]) -> bool:
    """Whether all are packed in one format and so can be joined."""
    if not all(_is_packed(weight) for weight in weights):
        return False
    formats = {(*_stored_format(w), w._dtype, w.dim()) for w in weights}
    return len(formats) == 1


def _joined(
    weights: Sequence[AffineQuantizedTensor],
    join: Callable[[list[Tensor]], Tensor],
    own: bool,
) -> Any:
    """The parts joined; permutations too, or equal where the weights share one."""
    first = weights[0]
    # A copy: writing into the result must not reach the permutation of its origin.
    permutation = None if first.permutation is None else first.permutation.clone()
    orders = [w.permutation for w in weights if w.permutation is not None]
    if orders and own:
        permutation = join(orders)
    elif any(o is not orders[0] and not torch.equal(o, orders[0]) for o in orders):
        raise ValueError(
            "weights with different permutations cannot be joined along their rows; "
            "dequantize() them first"
        )
    return AffineQuantizedTensor(
        join([w._packed for w in weights]),
        join([w.scales for w in weights]),
        join([w.biases for w in weights]),
        permutation,
        **_format(first),
        transposed=first.transposed,
    )


def _arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments in the order of the schema, defaults filled in."""
    declared = func._schema.arguments
    rest = declared[len(args) :]
    return [
        *args,
        *(
            kwargs.get(a.name, a.default_value if a.has_default_value() else None)
            for a in rest
        ),
    ]
