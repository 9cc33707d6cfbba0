"""Scales and biases of all layers, trained together towards the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from ..quantize import AffineConfig, Slot
from .solve import Rounded
from .text import Batch
from .walk import call

_JUDGED = 8  # batches that the divergence is taken over


@dataclass
class _Weight:
    """One weight whose scales and biases are learnt, in units of its scales."""

    slot: Slot
    config: AffineConfig
    rounded: Rounded
    scale: Tensor  # [N, groups] float32, 0 at the beginning
    bias: Tensor

    def parts(self) -> tuple[Tensor, Tensor]:
        """Scales and biases as they will be held; gradients pass the rounding."""
        unit = self.rounded.scales.float()
        scales = unit * (1 + self.scale)
        biases = self.rounded.biases.float() + unit * self.bias
        dtype = self.rounded.scales.dtype
        held = [
            part.detach().to(dtype).float() - part.detach() for part in (scales, biases)
        ]
        return scales + held[0], biases + held[1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        scales, biases = self.parts()
        codes = self.rounded.codes.unflatten(-1, (-1, self.config.group_size))
        values = codes.float() * scales[..., None] + biases[..., None]
        return values.flatten(-2).to(dtype)


def tune(
    model: nn.Module,
    chosen: Sequence[Any],
    batches: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float,
    progress: bool = True,
) -> tuple[float, float]:
    """Train scales and biases for `steps` batches, codes fixed, in place in `chosen`.

    `chosen` are objects with `slot`, `config` and `rounded`. The loss is the divergence
    KL(dense || rounded) of the predictions, a token's mean. Returns it before and after,
    in nats, over the first batches; where it did not fall, nothing is changed.
    """
    weights = [_start(one.slot, one.config, one.rounded) for one in chosen]
    leaves = [leaf for weight in weights for leaf in (weight.scale, weight.bias)]
    judged = batches[:_JUDGED]
    before = _mean_divergence(model, weights, judged)
    optimizer = torch.optim.Adam(leaves, lr=learning_rate, betas=(0.9, 0.99))
    for step in tqdm(
        range(steps), "tuning", delay=2, leave=False, disable=not progress
    ):
        for group in optimizer.param_groups:  # a short warmup, then down to zero
            warm = min(1.0, (step + 1) / max(1, steps // 20))
            group["lr"] = (
                learning_rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
            )
        with torch.enable_grad():
            loss = _divergence(model, weights, batches[step % len(batches)])
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
    after = _mean_divergence(model, weights, judged)
    if not after < before:
        return before, before
    for one, weight in zip(chosen, weights, strict=True):
        dtype = weight.rounded.scales.dtype
        scales, biases = (part.detach().to(dtype) for part in weight.parts())
        codes, old = weight.rounded.codes, weight.rounded
        one.rounded = Rounded(codes, scales, biases, old.error, old.plain_error)
    return before, after


def _start(slot: Slot, config: AffineConfig, rounded: Rounded) -> _Weight:
    zero = torch.zeros_like(rounded.scales, dtype=torch.float32)
    scale, bias = (zero.clone().requires_grad_() for _ in range(2))
    return _Weight(slot, config, rounded, scale, bias)


def _mean_divergence(
    model: nn.Module, weights: list[_Weight], batches: Sequence[Batch]
) -> float:
    with torch.no_grad():
        losses = [float(_divergence(model, weights, batch)) for batch in batches]
    return sum(losses) / len(losses)


def _divergence(model: nn.Module, weights: list[_Weight], batch: Batch) -> Tensor:
    names = [weight.slot.name for weight in weights]
    working = {name: model.get_parameter(name) for name in names}
    dtypes = [value.dtype for value in working.values()]
    dense = {
        weight.slot.name: weight.slot.parameter.detach().to(dtype)
        for weight, dtype in zip(weights, dtypes, strict=True)
    }
    with torch.no_grad():
        target = logits_of(model, batch, dense).log_softmax(-1)
    rounded = {
        weight.slot.name: weight.dense(dtype)
        for weight, dtype in zip(weights, dtypes, strict=True)
    }
    own = logits_of(model, batch, rounded).log_softmax(-1)
    return F.kl_div(own, target, log_target=True, reduction="sum") / len(own)


def logits_of(
    model: nn.Module, batch: Batch, parameters: dict[str, Tensor] | None = None
) -> Tensor:
    """The model's logits, float32 ``[tokens, vocabulary]``, masked tokens left out."""
    output = (
        functional_call(_Called(model), _below(parameters), (batch,))
        if parameters
        else call(model, batch)
    )
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"{type(model).__name__} returns a {type(output).__name__} without logits; "
            "tuning and choosing bits need a model with a head"
        )
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and logits.shape[:-1] == mask.shape:
        logits = logits[mask.bool()]
    return logits.flatten(0, -2).float()


class _Called(nn.Module):
    """Passes batches as `call` does, for functional_call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Any:
        return call(self.model, batch)


def _below(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in parameters.items()}
