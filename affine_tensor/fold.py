"""`fold_permutations_`: act-order that can be had by the order of other weights' rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .tensor import AffineQuantizedTensor


def fold_permutations_(model: nn.Module) -> list[str]:
    """Take the permutations of `down_proj` into the rows of `gate_proj` and `up_proj`.

    The channels between them have no order of their own: what `down_proj` reads permuted
    is computed in that order instead, codes, scales and all, in place and without loss.
    Also of stacks of experts (`gate_up_proj`), each its own. Other permutations stay: their
    channels are the model's. Returns the names of the weights that are no longer permuted.

    Layers with adapters beside them are left alone. An adapter of these projections that
    was trained before does not fit afterwards, since it knows the channels by their order.
    """
    folded = []
    for name, module in model.named_modules():
        if _fold_linears(module):
            folded.append(f"{name}.down_proj.weight".lstrip("."))
        elif not name.endswith("base_layer") and _fold_experts(module):
            folded.append(f"{name}.down_proj".lstrip("."))
    return folded


def _permuted(weight: Any) -> bool:
    return isinstance(weight, AffineQuantizedTensor) and weight.permutation is not None


def _fold_linears(module: nn.Module) -> bool:
    children = [getattr(module, f"{own}_proj", None) for own in ("gate", "up", "down")]
    if not all(type(child) is nn.Linear for child in children):
        return False
    *before, down = children
    if not _permuted(down.weight):  # type: ignore[union-attr]
        return False
    order = down.weight.permutation.long()  # type: ignore
    for linear in before:
        for own in ("weight", "bias"):
            value = getattr(linear, own)
            if value is not None:
                _put(linear, own, value.detach().index_select(0, order))
    _put(down, "weight", _in_order(down.weight))  # type: ignore
    return True


def _fold_experts(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    both = module._parameters.get("gate_up_proj")
    plain = getattr(module, "is_concatenated", True) and not hasattr(
        module, "gate_up_proj_bias"
    )
    if not (_permuted(down) and both is not None and both.dim() == 3 and plain):
        return False
    if down.transposed or getattr(both, "transposed", False):  # type: ignore
        return False
    order = down.permutation.long()  # type: ignore  # [E, I]
    rows = torch.cat([order, order + order.shape[-1]], -1).unsqueeze(
        -1
    )  # [E, 2 * I, 1]

    def taken(part: Tensor) -> Tensor:
        return part.gather(1, rows.to(part.device).expand(-1, -1, part.shape[-1]))

    value = both.detach()
    if isinstance(value, AffineQuantizedTensor):
        new: Tensor = value._map(taken, torch.clone)
    else:
        new = taken(value)
    _put(module, "gate_up_proj", new)
    _put(module, "down_proj", _in_order(down))
    return True


def _in_order(weight: Any) -> AffineQuantizedTensor:
    """The same parts with the columns as they are stored."""
    return AffineQuantizedTensor.from_packed(
        weight.packed,
        weight.scales,
        weight.biases,
        bits=weight.bits,
        group_size=weight.group_size,
        dtype=weight._dtype,
    )


def _put(module: Any, own: str, value: Tensor) -> None:
    old = module._parameters[own]
    packed = isinstance(value, AffineQuantizedTensor)
    grad = old.requires_grad and not packed
    module._parameters[own] = nn.Parameter(value, requires_grad=grad)
