"""`calibrate_`: a whole model, rounded so that its outputs change least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import layout
from ..quantize import (
    AffineConfig,
    Filter,
    QuantizeReport,
    Slot,
    _choose,
    tell_packed,
)
from ..tensor import AffineQuantizedTensor, logger
from .model import working_copy
from .solve import Rounded, round_plainly, round_weight
from .text import Batch, Data, count_tokens, make_batches
from .tune import tune
from .walk import Walk

Uncovered = Literal["error", "plain"]

# A tied weight is an embedding too, whose rows come in one by one: their squared error
# counts beside that of the logits.
TIED_DAMPING = 0.1


@dataclass
class CalibrationReport(QuantizeReport):
    """What `calibrate_` did.

    `errors`: for each calibrated module the error of its outputs, as a part of plain
    rounding's (squared; 1 where nothing was gained). `plain`: modules without
    calibration, and why. `tokens`: how many were calibrated on.
    """

    errors: dict[str, float] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    divergence: tuple[float, float] | None = None  # before and after tuning, in nats

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.errors:
            mean = sum(self.errors.values()) / len(self.errors)
            lines.append(
                f"calibrated on {self.tokens:,} tokens: {len(self.errors)} modules, "
                f"with {mean:.0%} of plain rounding's squared error on average"
            )
        if self.divergence:
            before, after = self.divergence
            lines.append(f"tuning: divergence {before:.4f} to {after:.4f} nats a token")
        lines += [f"  {name}: {why}" for name, why in self.plain.items()]
        return "\n".join(lines)


@dataclass(eq=False)
class _Chosen:
    slot: Slot
    config: AffineConfig
    rounded: Rounded | None = None

    @property
    def linears(self) -> list[str]:
        return [n for n, module, _ in self.slot.places if isinstance(module, nn.Linear)]

    @property
    def result(self) -> Rounded:
        assert self.rounded is not None
        return self.rounded

    def packed(self) -> AffineQuantizedTensor:
        return AffineQuantizedTensor.from_packed(
            layout.pack(self.result.codes, bits=self.config.bits),
            self.result.scales,
            self.result.biases,
            bits=self.config.bits,
            group_size=self.config.group_size,
            dtype=self.slot.parameter.dtype,
        )


def calibrate_(
    model: nn.Module,
    data: Data,
    config: AffineConfig | None = None,
    filter_fn: Filter | None = None,
    *,
    tokenizer: Any = None,
    length: int | None = None,
    batch_size: int = 4,
    tune_steps: int = 0,
    learning_rate: float = 2e-3,
    damping: float = 0.01,
    uncovered: Uncovered = "error",
    compute_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Quantize as `quantize_` does, in place, with less loss for the same size.

    Which weights, at how many bits, ties: all as in `quantize_`. But codes, scales and
    biases are chosen so that on `data` the outputs of each layer change least (GPTQ,
    arXiv 2210.17323, see `affine_tensor.calibrate.solve`), block by block, so that a
    later layer is fitted to what the earlier ones, rounded, make of its inputs. The
    result is in the same format, and as fast; `save_checkpoint` writes it.

    `data`: a list of texts (then `tokenizer` is needed; windows of `length` tokens,
    `batch_size` at a time), of token tensors ``[B, T]``, or of mappings with the
    model's arguments. Take text like what the model is for, none that it is judged on;
    the paper takes 128 windows of 2048 tokens.

    `tune_steps` > 0 afterwards trains all scales and biases together for so many steps
    of one batch, codes fixed, towards the dense model's predictions (KL divergence;
    Adam at `learning_rate`). This needs the memory of training, and a model that
    returns logits; on the model in examples/ it gained nothing at 3 bits.

    Embeddings are fitted without data; one tied to the head with the head's inputs. A
    layer that no token reaches is an error, or with ``uncovered="plain"`` rounded
    plainly and reported: experts of a mixture, say. Stacks of experts in one parameter
    are left as they are, as by `quantize_`. `compute_dtype` (default: the model's own)
    is what the model computes in meanwhile; float32 is exacter and on a CPU often
    faster. A second dense copy of the weights is in memory, and one Hessian
    (``K x K`` for K inputs) at a time.

    The same data gives the same weights on the same machine. A failure leaves the model
    as it was. Raises ValueError where a weight or an activation is NaN or infinite,
    where there are fewer tokens than the widest layer has inputs, or a layer is not
    reached; TypeError for data of another kind.
    """
    config = AffineConfig() if config is None else config
    if not isinstance(config, AffineConfig):
        raise TypeError(f"config is {config!r}; an AffineConfig is needed")
    if uncovered not in ("error", "plain"):
        raise ValueError(f'uncovered is {uncovered!r}; allowed are "error", "plain"')
    report = CalibrationReport()
    chosen = [_Chosen(*pair) for pair in _choose(model, config, filter_fn, report)]
    batches = make_batches(model, data, tokenizer, length=length, batch_size=batch_size)
    report.tokens = count_tokens(batches)
    _check_enough(chosen, report.tokens)
    with working_copy(model, compute_dtype):
        work = _Work(model, chosen, batches, report, damping, uncovered)
        work.run(progress)
        if tune_steps:
            report.divergence = tune(
                model,
                chosen,
                batches,
                steps=tune_steps,
                learning_rate=learning_rate,
                progress=progress,
            )
    parameters = [nn.Parameter(c.packed(), requires_grad=False) for c in chosen]
    for one, parameter in zip(chosen, parameters, strict=True):
        one.slot.put(parameter)
        report.quantized += [name for name, _, _ in one.slot.places]
    tell_packed(model)
    _note_stacks(model, report)
    if report.plain or report.skipped:
        logger.info("%s", report)
    return report


class _Work:
    """The walk through a model whose weights are rounded one after another."""

    def __init__(
        self,
        model: nn.Module,
        chosen: list[_Chosen],
        batches: list[Batch],
        report: CalibrationReport,
        damping: float,
        uncovered: Uncovered,
    ) -> None:
        self.model, self.chosen, self.report = model, chosen, report
        self.damping, self.uncovered = damping, uncovered
        # What has no one place in the order of layers comes first, and is fitted to the
        # dense model's inputs: embeddings, which all begins with, and tied weights.
        self.first = [c for c in chosen if len(c.slot.places) > 1 or not c.linears]
        self.single = {c.linears[0]: c for c in chosen if c not in self.first}
        modules = dict(model.named_modules())
        self.modules = {n: modules[n] for c in chosen for n in c.linears}
        self.walk = Walk(model, batches, {n: modules[n] for n in self.single})

    def run(self, progress: bool) -> None:
        total = len(self.first) + len(self.single)
        with tqdm(
            total=total,
            desc="calibrating",
            unit="weight",
            delay=2,
            leave=False,
            disable=not progress,
        ) as bar:
            for one in self.first:
                self._round(one, self._hessian(one.linears, None))
                bar.update()
            passed = -1
            for group in self.walk.groups:
                if group.block is None:
                    self.walk.finish(passed)
                else:
                    self.walk.finish(group.block - 1)
                    passed = group.block
                # They share their inputs: the first stands for all.
                hessian = self._hessian(group.names[:1], group.block)
                for name in group.names:
                    self._round(self.single[name], hessian)
                    bar.update()

    def _hessian(self, names: list[str], block: int | None) -> Tensor | None:
        if not names:
            return None
        return self.walk.sums_of_squares([self.modules[n] for n in names], block)

    def _round(self, one: _Chosen, hessian: Tensor | None) -> None:
        form = {"bits": one.config.bits, "group_size": one.config.group_size}
        names = [name for name, _, _ in one.slot.places]
        tied = len(names) > len(one.linears) > 0
        source = one.slot.parameter.detach()
        source = source.float() if source.dtype == torch.float64 else source
        try:
            if one.linears and hessian is None:
                self._refuse_uncovered(names)
                one.rounded = round_plainly(source, **form)
            else:
                damping = max(self.damping, TIED_DAMPING if tied else 0)
                one.rounded = round_weight(source, hessian, damping=damping, **form)
                part = one.rounded.error / (one.rounded.plain_error or 1)
                self.report.errors.update(dict.fromkeys(names, part))
        except ValueError as error:
            raise ValueError(
                f"{one.slot.name}: {error} (filter_fn leaves it dense by returning False)"
            ) from error
        working = next(iter(one.slot.places))[1]._parameters["weight"]
        assert working is not None
        dense = one.packed().dequantize(working.dtype)
        one.slot.put(nn.Parameter(dense, requires_grad=False))

    def _refuse_uncovered(self, names: list[str]) -> None:
        if self.uncovered == "error":
            raise ValueError(
                "no token of the calibration data reaches it. Give more text, or pass "
                'uncovered="plain" to round such layers plainly'
            )
        why = "rounded plainly: no token of the calibration data reaches it"
        self.report.plain.update(dict.fromkeys(names, why))


def _check_enough(chosen: list[_Chosen], tokens: int) -> None:
    """Fewer tokens than inputs leave directions of which nothing is known."""
    for one in chosen:
        columns = one.slot.parameter.shape[-1]
        if one.linears and tokens < columns:
            raise ValueError(
                f"{one.slot.name} has {columns} inputs but the calibration data only "
                f"{tokens} tokens; give at least as many, better ten times as many"
            )


def _note_stacks(model: nn.Module, report: CalibrationReport) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and not isinstance(parameter, AffineQuantizedTensor):
            report.skipped[name] = "a stack in one parameter, left as it was"
