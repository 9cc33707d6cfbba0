"""Times the kernels on this machine: where one should take over from another.

`python -m affine_tensor.doctor --tune` prints what `tune` finds and keeps it with
`tuning.store`. A limit changes only where that gains something: times waver.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ... import layout
from .. import machine, metal, settings
from . import tuning
from .operands import gather_operands
from .plans import Choice, choose
from .tuning import Limits

_FORM = {"bits": 4, "group_size": 64}

# Summed over all that was timed: by how much times must fall, as a logarithm.
_GAIN = 0.05


@dataclass(frozen=True)
class Plan:
    """What is timed: weights ``[N, K]`` and ``[E, N, K]``, dtypes, numbers of rows.

    `bytes`: weights are copied until they take so much, more than caches hold, and
    used in turn.
    """

    weights: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (1024, 4096))
    experts: tuple[int, int, int] = (32, 768, 2048)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    small: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    skinny: tuple[int, ...] = (16, 24, 32, 40, 48, 56, 64)
    vectors: tuple[int, ...] = (2, 3, 4)
    rows_per_expert: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    simdgroups: tuple[int, ...] = (8, 16, 24, 32, 48, 64)
    bytes: int = 256 << 20
    repeats: int = 7
    seconds: float = 3e-3  # of each repeat


PLANS = {
    "model": Plan(),
    # To see that it works.
    "small": Plan(
        weights=((64, 512),),
        experts=(4, 32, 128),
        dtypes=(torch.float16,),
        small=(2, 8),
        skinny=(64,),
        vectors=(4,),
        rows_per_expert=(1, 4),
        simdgroups=(8, 24),
        bytes=0,
        repeats=1,
        seconds=0.0,
    ),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a product by value of a limit: two values, or all candidates."""

    limit: str
    product: str
    rows: int
    seconds: dict[int, float]


@dataclass
class Tuned:
    """The limits found, and what they were found by."""

    limits: Limits
    timings: list[Timing] = field(default_factory=list)

    def choose(self, limit: str, costs: dict[int, float]) -> None:
        """Take the value of least cost, or leave the limit where it is hardly worse."""
        value = pick(costs, getattr(self.limits, limit))
        self.limits = replace(self.limits, **{limit: value})

    def rows(self) -> list[tuple[str, ...]]:
        """A table of all that was timed."""
        table: list[tuple[str, ...]] = [
            ("limit", "product", "rows", "microseconds by value of the limit")
        ]
        for one in self.timings:
            times = ", ".join(f"{v}: {1e6 * s:.1f}" for v, s in one.seconds.items())
            table.append((one.limit, one.product, str(one.rows), times))
        return table


def tune(plan: Plan = PLANS["model"]) -> Tuned:
    """Time all candidates on MPS. Nothing is stored."""
    found = Tuned(tuning.BY_GENERATION[tuning.chip().generation])
    clock = _Clock(plan, found)
    # First, since it says how K is divided in all that follows.
    costs = dict.fromkeys(plan.simdgroups, 0.0)
    for _, seconds in clock.time_all("simdgroups", "linear", (1,), plan.simdgroups):
        for value, taken in seconds.items():
            costs[value] += math.log(taken)
    found.choose("simdgroups", costs)
    for name, op, counts, (many, few) in (
        ("small", "linear", plan.small, (1, 8)),
        ("skinny", "linear", plan.skinny, (8, 64)),
        ("vectors", "matmul", plan.vectors, (1, 4)),
    ):
        timed = [
            (rows, seconds[few], seconds[many])
            for rows, seconds in clock.time_all(name, op, counts, (many, few))
        ]
        default = getattr(found.limits, name)
        found.choose(name, costs_of_thresholds(timed, many, default))
    # The limit is the first number of rows for an expert that tiles take, not the last
    # that they do not.
    experts = plan.experts[0]
    counts = tuple(experts * rows for rows in plan.rows_per_expert)
    timed = [
        (rows // experts, seconds[64], seconds[1])
        for rows, seconds in clock.time_all(
            "rows_per_expert", "grouped_linear", counts, (1, 64)
        )
    ]
    costs = costs_of_thresholds(timed, 0, found.limits.rows_per_expert - 1)
    found.choose("rows_per_expert", {last + 1: cost for last, cost in costs.items()})
    return found


def costs_of_thresholds(
    timed: Sequence[tuple[int, float, float]], *others: int
) -> dict[int, float]:
    """By the last number of rows that one kernel takes: the sum of logarithms of times.

    timed: rows, seconds of the kernel for fewer rows, seconds of that for more.
    others: last numbers of rows that are candidates, beside those that were timed.
    """
    return {
        last: sum(math.log(few if m <= last else many) for m, few, many in timed)
        for last in sorted({*others, *(m for m, *_ in timed)})
    }


def pick(costs: dict[int, float], default: int) -> int:
    """The value of least cost, or the default where that is hardly worse."""
    best = min(costs, key=lambda value: costs[value])
    if default in costs and costs[default] <= costs[best] + _GAIN:
        return default
    return best


@dataclass
class _Product:
    """An operator with copies of a weight that are used in turn."""

    name: str
    op: str
    dtype: torch.dtype
    copies: list[tuple[Tensor, Tensor, Tensor]]
    columns: int

    def operands(self, rows: int) -> tuple[Tensor, dict[str, Any]]:
        """x, and what else the operator takes."""
        device = self.copies[0][0].device
        x = torch.ones(rows, self.columns, dtype=self.dtype, device=device)
        if not self.op.startswith("grouped"):
            return x, {}
        experts = len(self.copies[0][0])
        ends = torch.arange(1, experts + 1, dtype=torch.int32) * (rows // experts)
        return x, {"offsets": ends.to(device)}

    def choice(self, rows: int, limits: Limits) -> Choice:
        x, more = self.operands(rows)
        form = {**_FORM, "dtype": self.dtype}
        groups = (more.get("offsets"), None)
        parts = (*self.copies[0], None)
        operands = gather_operands(self.op, x, parts, form, groups=groups)
        return choose(operands.product, limits, tuning.chip().cores, False)


class _Clock:
    """Times products under different limits, in turn, so that all see the same chip."""

    def __init__(self, plan: Plan, found: Tuned) -> None:
        self.plan, self.found = plan, found

    def products(self, op: str) -> Iterator[_Product]:
        """The weights of the plan for an operator, one after the other."""
        grouped = op.startswith("grouped")
        shapes = [self.plan.experts] if grouped else self.plan.weights
        for shape, dtype in itertools.product(shapes, self.plan.dtypes):
            *_, n, k = shape
            size = math.prod(shape) * 5 // 8
            count = max(2, min(64, -(-self.plan.bytes // size)))
            parts = _random_parts(shape, dtype)
            copies = [_copy(parts) for _ in range(count)]
            name = f"{' x '.join(map(str, shape))} {layout.name_of(dtype)}"
            yield _Product(name, op, dtype, copies, n if op == "matmul" else k)

    def time_all(
        self, limit: str, op: str, counts: Sequence[int], values: Sequence[int]
    ) -> Iterator[tuple[int, dict[int, float]]]:
        """Rows, and seconds of a call by value of a limit.

        Left out where all values give the same kernel.
        """
        for product in self.products(op):
            for rows in counts:
                limits = {v: replace(self.found.limits, **{limit: v}) for v in values}
                choices = {v: product.choice(rows, limits[v]) for v in values}
                runs = {choices[v]: limits[v] for v in values}
                if len(runs) == 1:
                    continue
                seconds = self._race(product, rows, runs)
                by_value = {v: seconds[choices[v]] for v in values}
                timing = Timing(limit, product.name, rows, by_value)
                self.found.timings.append(timing)
                yield rows, by_value

    def _race(
        self, product: _Product, rows: int, runs: dict[Choice, Limits]
    ) -> dict[Choice, float]:
        x, more = product.operands(rows)
        operator: Callable[..., Tensor] = getattr(metal, product.op)
        copies = product.copies

        def seconds(calls: int) -> float:
            machine.synchronize("mps")
            start = time.perf_counter()
            for i in range(calls):
                parts = copies[i % len(copies)]
                operator(x, *parts, **more, **_FORM, dtype=product.dtype)
            machine.synchronize("mps")
            return (time.perf_counter() - start) / calls

        taken: dict[Choice, list[float]] = {choice: [] for choice in runs}
        for _ in range(self.plan.repeats):
            for choice, limits in runs.items():
                with _using(limits):
                    once = seconds(min(3, len(copies)))  # makes the plan, and warms up
                    calls = int(self.plan.seconds / max(once, 1e-6))
                    taken[choice].append(seconds(max(len(copies), min(calls, 500))))
        return {choice: statistics.median(times) for choice, times in taken.items()}


@contextmanager
def _using(limits: Limits) -> Iterator[None]:
    """Plans are made by these limits, and never end in the reference."""
    before, strict = tuning.limits, settings.strict
    settings.strict = True
    tuning.limits = lambda: limits  # type: ignore[assignment]
    metal.reset()
    try:
        yield
    finally:
        tuning.limits, settings.strict = before, strict
        metal.reset()


def _random_parts(
    shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random words on the CPU, with scales that keep products small."""
    *lead, k = shape
    words = (*lead, k * _FORM["bits"] // 32)
    packed = torch.randint(-(2**31), 2**31, words, dtype=torch.int32)
    scales = torch.full((*lead, k // _FORM["group_size"]), 1e-3, dtype=dtype)
    return packed, scales, torch.full_like(scales, -8e-3)


def _copy(parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The parts once more, on the device."""
    device = machine.tensor_device("mps")
    packed, scales, biases = (part.to(device, copy=True) for part in parts)
    return packed, scales, biases
