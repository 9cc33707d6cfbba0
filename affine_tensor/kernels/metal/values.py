"""Dequantize, embedding and quantize on MPS: what makes or reads values, not products.

All three give the values of the reference on a CPU, bit for bit. A call looks up its plan,
which holds a compiled and checked kernel, allocates the result and enqueues the kernel.
What the kernels do not do (float64, empty weights) the reference does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import layout, ops
from . import values_check as check
from .library import Kernel, kernel, variant

_Size = tuple[int, ...]
_Parts = tuple[Tensor, Tensor, Tensor, "Tensor | None"]

_INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class _Plan:
    """What a call needs. Without a kernel the reference takes it."""

    kernel: Kernel | None
    threads: _Size = ()
    group_size: _Size = ()
    numbers: Any = None  # what the kernel is told of sizes and strides
    shape: _Size = ()  # of the result


_REFERENCE = _Plan(None)

_MOST_PLANS = 1 << 14
_plans: dict[Any, _Plan] = {}


def reset() -> None:
    """Forget all plans."""
    _plans.clear()


def _keep(key: Any, plan: _Plan) -> _Plan:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _weight_key(packed: Tensor, scales: Tensor, biases: Tensor) -> tuple[Any, ...]:
    """All that a plan depends on. Offsets matter as far as wide loads need them aligned."""
    return (
        packed.shape,
        packed.stride(),
        packed.storage_offset() % 4,
        packed.dtype,
        scales.shape,
        scales.stride(),
        scales.dtype,
        biases.shape,
        biases.stride(),
        biases.dtype,
    )


# ---- dequantize -----------------------------------------------------------------


@ops.register_kernel("dequantize", "mps")
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
    own = None
    if permutation is not None:
        own = (permutation.shape, permutation.stride(), permutation.dtype)
    weight_key = _weight_key(packed, scales, biases)
    key = ("dequantize", *weight_key, own, bits, group_size, dtype)
    plan = _plans.get(key)
    if plan is None:
        form = {"bits": bits, "group_size": group_size}
        layout.check_parts(packed, scales, biases, **form)
        parts = (packed, scales, biases, permutation)
        columns = scales.shape[-1] * group_size
        tidied = _tidied(parts, columns)
        if any(a is not b for a, b in zip(tidied, parts, strict=True)):
            y = dequantize(*tidied, **form, dtype=dtype)
            return y.view(*scales.shape[:-1], columns)
        plan = _keep(key, _plan_dequantize(parts, form, dtype))
    if plan.kernel is None:
        return ops.reference("dequantize")(
            packed,
            scales,
            biases,
            permutation,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
        )
    y = scales.new_empty(plan.shape, dtype=dtype)
    plan.kernel(
        packed,
        scales,
        biases,
        y,
        plan.numbers,
        packed if permutation is None else permutation,
        threads=plan.threads,
        group_size=plan.group_size,
    )
    return y


def _tidied(parts: _Parts, columns: int) -> _Parts:
    """The parts with two or three dimensions and what kernels need to be side by side.

    Parts that are so already come back as they are.
    """
    packed, scales, biases, permutation = parts
    if permutation is not None:
        lead = packed.shape[:-2]
        if permutation.shape != (*lead, columns):
            permutation = permutation.expand(*lead, columns)
        if len(lead) > 1:
            permutation = permutation.reshape(-1, columns)
        permutation = permutation.to(torch.int32).contiguous()
    if packed.dim() == 1:
        packed, scales, biases = (p.unsqueeze(0) for p in (packed, scales, biases))
    elif packed.dim() > 3:
        packed, scales, biases = (p.flatten(0, -3) for p in (packed, scales, biases))
    if packed.stride(-1) != 1:
        packed = packed.contiguous()
    if scales.stride(-1) != 1 or scales.stride() != biases.stride():
        scales, biases = scales.contiguous(), biases.contiguous()
    return packed, scales, biases, permutation


def _plan_dequantize(parts: _Parts, form: dict[str, int], dtype: torch.dtype) -> _Plan:
    packed, scales, _, permutation = parts
    if dtype not in layout.WEIGHT_DTYPES or packed.numel() == 0:
        return _REFERENCE
    wanted = variant(
        "dequantize",
        **form,
        X_TYPE=dtype,
        SCALE_TYPE=scales.dtype,
        ALIGNED=_is_aligned(packed),
        PERMUTED=permutation is not None,
    )

    def compare(_: object, made: Kernel) -> str | None:
        return check.compare_dequantize(made, form, dtype, parts)

    made = kernel(wanted, compare)
    if made is None:
        return _REFERENCE
    columns = scales.shape[-1] * form["group_size"]
    experts = len(packed) if packed.dim() == 3 else 1
    threads = (columns // 16, packed.shape[-2], experts)
    return _Plan(
        made,
        threads,
        (*check.tile(threads[0]), 1),
        check.numbers(packed, scales, columns),
        (*scales.shape[:-1], columns),
    )


def _is_aligned(packed: Tensor) -> bool:
    """Whether each row of words begins at a multiple of 16 bytes."""
    steps = (packed.storage_offset(), *packed.stride()[:-1])
    return all(step % 4 == 0 for step in steps)


# ---- embedding ------------------------------------------------------------------


@ops.register_kernel("embedding", "mps")
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
    """Rows `ids` of the weight, ``[*ids, K]``; see `ops`.

    An id that is no row, a negative one too, gives a row of NaN: to raise would need to
    wait for the device.
    """
    weight_key = _weight_key(packed, scales, biases)
    key = ("embedding", ids.dtype, *weight_key, bits, group_size, dtype)
    plan = _plans.get(key)
    if plan is None:
        ops.check_matrix(packed, "embedding")
        form = {"bits": bits, "group_size": group_size}
        layout.check_parts(packed, scales, biases, **form)
        parts = (packed, scales, biases, None)
        tidied = _tidied(parts, scales.shape[-1] * group_size)
        if any(a is not b for a, b in zip(tidied, parts, strict=True)):
            return embedding(ids, *tidied[:3], **form, dtype=dtype)
        plan = _keep(key, _plan_embedding(ids, parts, form, dtype))
    if plan.kernel is None:
        return ops.reference("embedding")(
            ids, packed, scales, biases, bits=bits, group_size=group_size, dtype=dtype
        )
    y = scales.new_empty((*ids.shape, *plan.shape), dtype=dtype)
    count = ids.numel()
    if count:
        plan.kernel(
            packed,
            scales,
            biases,
            ids.contiguous(),
            y,
            plan.numbers,
            threads=(*plan.threads, count),
            group_size=plan.group_size,
        )
    return y


def _plan_embedding(
    ids: Tensor, parts: _Parts, form: dict[str, int], dtype: torch.dtype
) -> _Plan:
    packed, scales = parts[:2]
    served = dtype in layout.WEIGHT_DTYPES and ids.dtype in _INDEX_DTYPES
    if not served or packed.numel() == 0:
        return _REFERENCE
    wanted = variant(
        "embedding",
        **form,
        X_TYPE=dtype,
        SCALE_TYPE=scales.dtype,
        ALIGNED=_is_aligned(packed),
        ID_TYPE=ids.dtype,
    )

    def compare(_: object, made: Kernel) -> str | None:
        return check.compare_embedding(made, form, dtype, parts, ids.dtype)

    made = kernel(wanted, compare)
    if made is None:
        return _REFERENCE
    columns = scales.shape[-1] * form["group_size"]
    return _Plan(
        made,
        (columns // 16,),
        check.tile(columns // 16),
        check.numbers(packed, scales, columns),
        (columns,),
    )


# ---- quantize -------------------------------------------------------------------


@ops.register_kernel("quantize", "mps")
def quantize(w: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and biases of a weight; see `ops`, and `layout.quantize`."""
    w = w.detach().contiguous()
    vector = w.storage_offset() * w.itemsize % 16 == 0
    key = ("quantize", w.shape, w.dtype, vector, bits, group_size)
    plan = _plans.get(key)
    if plan is None:
        layout.check_weight(w, bits=bits, group_size=group_size)
        form = {"bits": bits, "group_size": group_size}
        plan = _keep(key, _plan_quantize(w, vector, form))
    if plan.kernel is None:
        return ops.reference("quantize")(w, bits=bits, group_size=group_size)
    *lead, columns = w.shape
    packed = w.new_empty((*lead, columns * bits // 32), dtype=torch.int32)
    scales, biases = w.new_empty(plan.shape), w.new_empty(plan.shape)
    plan.kernel(
        w,
        packed,
        scales,
        biases,
        plan.numbers,
        threads=plan.threads,
        group_size=plan.group_size,
    )
    layout.check_finite(
        w.view(-1, columns),
        scales.view(-1, plan.shape[-1]),
        biases.view(-1, plan.shape[-1]),
        w.shape[:-1],
    )
    return packed, scales, biases


def _plan_quantize(w: Tensor, vector: bool, form: dict[str, int]) -> _Plan:
    if w.numel() == 0:
        return _REFERENCE

    def compare(_: object, made: Kernel) -> str | None:
        return check.compare_quantize(made, form, w)

    made = kernel(variant("quantize", **form, X_TYPE=w.dtype, X_VECTOR=vector), compare)
    if made is None:
        return _REFERENCE
    size = form["group_size"]
    groups = w.numel() // size
    shape = (*w.shape[:-1], w.shape[-1] // size)
    return _Plan(made, *check.grid_quantize(groups, size), groups, shape)
