"""`choose_bits`: a mixed recipe under a size budget, from measured losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import layout
from ..quantize import AffineConfig, Filter, QuantizeReport, Slot, _choose
from .model import working_copy
from .text import Batch, Data, make_batches
from .tune import logits_of

WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass
class Recipe:
    """Which weights get how many bits. `quantize_` takes it as `filter_fn`.

    `modules`: a configuration for each module by name, False where it stays dense;
    `default` is for modules that are not named. `losses`: what was measured, by module
    and width, in nats a token. `bytes`, `bits_per_weight`: of the weights chosen among.
    """

    modules: dict[str, AffineConfig | bool]
    default: AffineConfig = field(default_factory=AffineConfig)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    bytes: int = 0
    bits_per_weight: float = 0.0

    def __call__(self, module: nn.Module, name: str) -> bool | AffineConfig:
        return self.modules.get(name, self.default)

    def save(self, path: str | Path) -> None:
        """Write it as JSON: `modules` and `default`."""
        modules = {
            name: _as_json(own) if isinstance(own, AffineConfig) else False
            for name, own in self.modules.items()
        }
        text = json.dumps(
            {"modules": modules, "default": _as_json(self.default)}, indent=2
        )
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what `save` wrote. Raises ValueError, which names the entry, otherwise."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("modules"), dict):
            raise ValueError(f'{path}: an object with "modules" is needed')
        modules: dict[str, AffineConfig | bool] = {
            name: False if own is False else _from_json(own, f"{path}: {name}")
            for name, own in found["modules"].items()
        }
        return cls(modules, _from_json(found.get("default", {}), f"{path}: default"))

    def __str__(self) -> str:
        counts: dict[int, int] = {}
        for own in self.modules.values():
            if isinstance(own, AffineConfig):
                counts[own.bits] = counts.get(own.bits, 0) + 1
        parts = [f"{counts[bits]} at {bits} bits" for bits in sorted(counts)]
        return f"{', '.join(parts)}; {self.bits_per_weight:.2f} bits per weight"


def _as_json(config: AffineConfig) -> dict[str, int]:
    return {"bits": config.bits, "group_size": config.group_size}


def _from_json(value: Any, where: str) -> AffineConfig:
    if not isinstance(value, dict) or not set(value) <= {"bits", "group_size"}:
        raise ValueError(
            f'{where} is {value!r}; false or {{"bits": 4, "group_size": 64}} is needed'
        )
    try:
        return AffineConfig(**value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def choose_bits(
    model: nn.Module,
    data: Data,
    *,
    bits_per_weight: float | None = None,
    budget_bytes: int | None = None,
    widths: Sequence[int] = WIDTHS,
    group_size: int = 64,
    filter_fn: Filter | None = None,
    tokenizer: Any = None,
    length: int | None = 512,
    batch_size: int = 4,
    batches: int = 2,
    compute_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Recipe:
    """Choose the width of each weight so that the model loses least in a given size.

    Each weight alone is rounded plainly to each of `widths`, the others dense; what the
    predictions on `data` then lose (KL divergence from the dense model's, nats a token)
    is its sensitivity. From the narrowest width on, the step that saves most loss for a
    byte is taken until the budget is full. Losses are taken to add up, which is nearly
    so while they are small.

    The budget is either `bits_per_weight`, scales and biases included (3.5 is what 3
    bits take at group size 64 and 16-bit scales), or `budget_bytes`, over the weights
    that `filter_fn` leaves in (True or False; default: all that `quantize_` takes). A
    weight that several modules share is measured in all its places. `data` is as in
    `calibrate_`, of which the first `batches` batches are used: a run of the model for
    each weight and width. The model is left as it was.

    Give the recipe to `quantize_` or `calibrate_` as `filter_fn`; `save` keeps it.
    Raises ValueError where the budget is below the narrowest width's size.
    """
    allowed = sorted(set(widths))
    if not allowed:
        raise ValueError("widths is empty; give some of 2, 3, 4, 5, 6, 8")
    configs = [AffineConfig(bits, group_size) for bits in allowed]
    if (bits_per_weight is None) == (budget_bytes is None):
        raise ValueError("give one budget: bits_per_weight, or budget_bytes")
    report = QuantizeReport()
    chosen = [slot for slot, _ in _choose(model, configs[0], filter_fn, report)]
    if not chosen:
        raise ValueError(f"nothing to choose for: {report}")
    data_batches = make_batches(
        model, data, tokenizer, length=length, batch_size=batch_size
    )[:batches]
    sizes = [[_bytes(slot, config) for config in configs] for slot in chosen]
    weights = sum(slot.parameter.numel() for slot in chosen)
    budget = _budget(budget_bytes, bits_per_weight, weights, sizes)
    with working_copy(model, compute_dtype):
        losses = _measure(model, chosen, configs, data_batches, progress)
    picked = solve(losses, sizes, budget)
    modules: dict[str, AffineConfig | bool] = dict.fromkeys(report.skipped, False)
    measured = {}
    for slot, index, own in zip(chosen, picked, losses, strict=True):
        for name, _, _ in slot.places:
            modules[name] = configs[index]
            measured[name] = dict(zip(allowed, own, strict=True))
    total = sum(size[index] for size, index in zip(sizes, picked, strict=True))
    return Recipe(
        modules,
        AffineConfig(allowed[-1], group_size),
        measured,
        total,
        8 * total / weights,
    )


def _bytes(slot: Slot, config: AffineConfig) -> int:
    weight = slot.parameter
    held = min(weight.dtype.itemsize, 4)
    groups = weight.numel() // config.group_size
    return weight.numel() * config.bits // 8 + 2 * groups * held


def _budget(
    given: int | None,
    bits_per_weight: float | None,
    weights: int,
    sizes: list[list[int]],
) -> int:
    if given is None:
        assert bits_per_weight is not None
        given = math.floor(bits_per_weight * weights / 8)
    least = sum(size[0] for size in sizes)
    if given < least:
        raise ValueError(
            f"the budget is {given:,} bytes ({8 * given / weights:.2f} bits per weight), "
            f"but the narrowest width takes {least:,} ({8 * least / weights:.2f}, with "
            "scales and biases); raise it, or allow narrower widths or larger groups"
        )
    return given


def solve(losses: list[list[float]], sizes: list[list[int]], budget: int) -> list[int]:
    """The width's index for each weight, widths ascending: greedy on loss per byte.

    A step may jump over widths, so that one which gains little does not hide a later
    one. What no longer fits is passed over.
    """
    # More bits never count as worse: what was measured so is noise.
    best = [[min(own[: i + 1]) for i in range(len(own))] for own in losses]
    picked = [0] * len(losses)
    left = budget - sum(size[0] for size in sizes)
    while True:
        steps = [
            ((best[w][now] - best[w][to]) / (sizes[w][to] - sizes[w][now]), -w, to)
            for w, now in enumerate(picked)
            for to in range(now + 1, len(best[w]))
            if sizes[w][to] - sizes[w][now] <= left and best[w][to] < best[w][now]
        ]
        if not steps:
            return picked
        _, negative, to = max(steps)
        weight = -negative
        left -= sizes[weight][to] - sizes[weight][picked[weight]]
        picked[weight] = to


def _measure(
    model: nn.Module,
    chosen: list[Slot],
    configs: list[AffineConfig],
    batches: list[Batch],
    progress: bool,
) -> list[list[float]]:
    """The loss of each weight at each width, in nats a token."""
    targets = [logits_of(model, batch).log_softmax(-1) for batch in batches]
    losses: list[list[float]] = []
    for slot in tqdm(
        chosen, "measuring", unit="weight", delay=2, leave=False, disable=not progress
    ):
        _, module, own = slot.places[0]
        working = module._parameters[own]
        assert working is not None
        losses.append([])
        for config in configs:
            rounded = _rounded(slot, config).to(working.dtype)
            slot.put(nn.Parameter(rounded, requires_grad=False))
            losses[-1].append(_divergence(model, batches, targets))
        slot.put(working)
    return losses


def _rounded(slot: Slot, config: AffineConfig) -> Tensor:
    bits, group_size = config.bits, config.group_size
    source = slot.parameter.detach()
    source = source.float() if source.dtype == torch.float64 else source
    try:
        parts = layout.quantize(source, bits=bits, group_size=group_size)
        return layout.dequantize(
            *parts, bits=bits, group_size=group_size, dtype=torch.float32
        )
    except ValueError as error:
        raise ValueError(f"{slot.name}: {error}") from error


def _divergence(model: nn.Module, batches: list[Batch], targets: list[Tensor]) -> float:
    nats, tokens = 0.0, 0
    for batch, target in zip(batches, targets, strict=True):
        own = logits_of(model, batch).log_softmax(-1)
        nats += float(F.kl_div(own, target, log_target=True, reduction="sum"))
        tokens += len(target)
    if not math.isfinite(nats):
        raise ValueError(
            "the model's predictions on the calibration data are not finite; measure in "
            "another dtype (compute_dtype=torch.float32), or check the data"
        )
    return nats / tokens
