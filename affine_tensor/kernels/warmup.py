"""Compiling what a model needs before it is asked for its first token."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..tensor import AffineQuantizedTensor


def warmup(model: nn.Module, rows: Sequence[int] = (1, 8, 512)) -> int:
    """Compile and check the kernels of a model's packed weights.

    Each distinct product of the model, by shape, format and dtype, is run once with
    zeros for each number in `rows`: 1 is decoding, 8 a small batch, 512 a prompt. Other
    numbers of rows may still meet a kernel that is not compiled. Weights of embeddings
    are looked up, those of experts (three dimensions) multiplied with rows that are
    sorted by expert and with ones that are not.

    Returns how many products were run: 0 where the device has no kernels of ours. The
    model is left as it is. Raises ValueError for numbers of rows below 1.
    """
    if any(type(count) is not int or count < 1 for count in rows):
        raise ValueError(f"rows is {rows!r}; numbers from 1 on are allowed")
    done: set[Hashable] = set()
    with torch.no_grad():
        for op, weight, bias in _uses(model):
            device = ops.device_of(weight._packed)
            if ops.kernel(op, weight._packed) is None or not ops.has_kernels(device):
                continue
            key = (op, *_kind(weight), *(() if bias is None else (bias.dtype,)))
            if key not in done:
                done.add(key)
                for count in rows:
                    _run(op, weight, bias, count)
    return len(done) * len(rows)


def _uses(
    model: nn.Module,
) -> Iterator[tuple[str, AffineQuantizedTensor, Tensor | None]]:
    """Operators that modules call on their packed weights, with the bias if they do."""
    for module in model.modules():
        for weight in module._parameters.values():
            if not isinstance(weight, AffineQuantizedTensor):
                continue
            rank = weight._packed.dim()
            if isinstance(module, nn.Embedding) and weight.permutation is None:
                yield "embedding", weight, None
            elif rank == 2:
                bias = module._parameters.get("bias")
                plain = bias is not None and bias.dim() == 1
                yield "linear", weight, bias if plain else None
            elif rank == 3:
                # Stored with the outputs in rows, or shown so that they are in columns.
                crosswise = getattr(module, "is_transposed", False)
                matmul = crosswise and not weight.transposed
                yield "grouped_matmul" if matmul else "grouped_linear", weight, None


def _kind(weight: AffineQuantizedTensor) -> tuple[Hashable, ...]:
    """All of a weight that kernels and plans depend on."""
    packed, scales = weight._packed, weight.scales
    return (
        packed.device,
        packed.shape,
        packed.stride(),
        packed.storage_offset() % 4,
        scales.dtype,
        scales.stride(),
        weight.permutation is not None,
        weight.bits,
        weight.group_size,
        weight.dtype,
    )


def _run(op: str, weight: AffineQuantizedTensor, bias: Any, count: int) -> None:
    packed, scales = weight._packed, weight.scales
    device, dtype = packed.device, weight.dtype
    parts = (packed, scales, weight.biases)
    form: dict[str, Any] = {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "dtype": dtype,
    }
    call = ops.overload(op)
    if op == "embedding":
        ids = torch.zeros(1, count, dtype=torch.int64, device=device)
        call(ids, *parts, **form)
        return
    columns = scales.shape[-1] * weight.group_size
    if op == "linear":
        # As models have it: a batch of one.
        x = torch.zeros(1, count, columns, dtype=dtype, device=device)
        fits = bias is not None and bias.dtype == dtype
        call(x, *parts, weight.permutation, bias if fits else None, **form)
        return
    experts, outputs = packed.shape[:2]
    width = outputs if op == "grouped_matmul" else columns
    x = torch.zeros(count, width, dtype=dtype, device=device)
    # All rows are the last expert's.
    ends = torch.zeros(experts, dtype=torch.int32, device=device)
    ends[-1] = count
    own = torch.zeros(count, dtype=torch.int32, device=device)
    call(x, *parts, weight.permutation, ends, None, **form)
    call(x, *parts, weight.permutation, None, own, **form)
