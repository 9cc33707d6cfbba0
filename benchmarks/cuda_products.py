"""Timing products with packed weights on a GPU, beside its copy bandwidth."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cuda_clock
import torch
from cpu_contestants import (
    Contestant,
    Weight,
    allowed,
    difference,
    exact_product,
    one_rounding,
)
from cpu_products import DTYPES, WRONG
from cuda_contestants import FAILURES, Lazy, Own, made, told
from torch import Tensor

from affine_tensor import layout, ops

SHAPES = {
    "models": ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096)),
    "tiny": ((64, 256), (33, 192)),  # to see that it works
}
ROWS = {
    "models": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048),
    "tiny": (1, 3, 16),
}
COPIES = {"models": 400 << 20, "tiny": 0}  # bytes of a weight's copies; L2 is 60 MB
SECONDS = {"models": 1.5e-3, "tiny": 0.0}  # of what is timed at once
LIMIT = 40e-3  # seconds of a call, above which a peer is not timed


@dataclass
class Setting:
    """How all is measured."""

    kind: str  # of the device
    sizes: str
    rounds: int
    names: Sequence[str]  # contestants
    deadline: float  # of `time.monotonic`
    say: Callable[[str], Any] = print
    keep: Callable[[], Any] = lambda: None  # after each weight

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


def plan(options: argparse.Namespace) -> Iterator[Weight]:
    """The weights to measure, those of the first format first."""
    shapes = options.shapes or SHAPES[options.sizes]
    for dtype, group, bits, (n, k) in itertools.product(
        options.dtypes, options.groups, options.bits, shapes
    ):
        yield Weight(n, k, bits, group, DTYPES[dtype])


def measure(
    options: argparse.Namespace, setting: Setting, found: dict[str, Any]
) -> None:
    """Fill in all figures; what there is is there, should one fail."""
    rows = tuple(sorted(set(options.m or ROWS[options.sizes])))
    used = {name: DTYPES[name] for name in options.dtypes}
    found |= {
        "ours": our_kernel(setting.kind),
        "limits": cuda_clock.limits(setting.kind, used, setting.rounds),
        "copies_bytes": COPIES[setting.sizes],
        "rounds": setting.rounds,
        "weights": [],
    }
    for weight in plan(options):
        own: dict[str, Any] = {
            "n": weight.n,
            "k": weight.k,
            **weight.form,
            "dtype": layout.name_of(weight.dtype),
        }
        found["weights"].append(own)
        reason = layout.why_not(weight.k, **weight.form)
        if reason:
            own["impossible"] = reason
            continue
        start = time.perf_counter()
        race = Race(weight, rows, setting, found["limits"])
        own |= race.figures
        race.run()
        setting.say(f"{weight}: {time.perf_counter() - start:.1f} s")
        setting.keep()


def our_kernel(kind: str) -> str:
    """What multiplies for us."""
    kernel = ops.kernel("linear", torch.empty(0, device=kind))
    return "the reference" if kernel is None else kernel.__module__


@dataclass
class Entry:
    """A contestant that takes part, and the copies of its weight in turn."""

    name: str
    contestant: Contestant
    turns: Iterator[Any] = field(init=False)
    out: bool = False

    def __post_init__(self) -> None:
        self.turns = itertools.cycle(self.contestant.copies)

    def launch(self, x: Any) -> Callable[[], Any]:
        multiply, turns = self.contestant.multiply, self.turns
        return lambda: multiply(x, next(turns))


class Race:
    """The contestants for one weight, with some numbers of rows one after the other."""

    def __init__(
        self,
        weight: Weight,
        rows: Sequence[int],
        setting: Setting,
        limits: dict[str, Any],
    ) -> None:
        self.weight, self.rows, self.setting = weight, rows, setting
        self.limits, self.parts = limits, weight.parts(setting.kind)
        self.x = weight.x(max(rows), setting.kind)
        self.exact = exact_product(weight, self.parts, self.x)
        self.own_exact: dict[str, Tensor] = {}
        self.missing: dict[str, str] = {}
        self.figures: dict[str, Any] = {
            "bytes": sum(part.nbytes for part in self.parts),
            "roundings": {},
            "floors": {},
            "missing": self.missing,
            "results": [],
        }

    @torch.inference_mode()
    def run(self) -> None:
        setting, entries = self.setting, []
        total = COPIES[setting.sizes]
        for name, one in made(self.weight, self.parts, total, setting.names):
            if isinstance(one, str):
                self.missing[name] = one
                continue
            entries.append(Entry(name, one))
            if isinstance(one, Own) and one.dense is not None:
                self.own_exact[name] = self.x.double() @ one.dense.double().mT
        for count in self.rows:
            if setting.late:
                late = ", ".join(str(m) for m in self.rows if m >= count)
                self.missing["all"] = f"rows {late}: the time limit was reached"
                return
            self._time(count, [one for one in entries if not one.out])

    def _time(self, count: int, entries: list[Entry]) -> None:
        """Check all with so many rows, then time those that are right."""
        dtype, figures = self.weight.dtype, self.figures
        rounding = one_rounding(self.exact[:count], dtype)
        figures["roundings"][str(count)] = rounding
        figures["floors"][str(count)] = self._floor(count)
        errors, blocks = {}, {}
        for entry in entries:
            most = allowed(entry.name, dtype, rounding)
            ready = self._ready(entry, count, most)
            if isinstance(ready, str):
                self.missing[f"{entry.name}, {count} rows"] = ready
            else:
                blocks[entry.name], errors[entry.name] = ready
        times = cuda_clock.in_rounds(blocks, self.setting.rounds)
        for name, taken in times.items():
            one = {
                "name": name,
                "rows": count,
                "seconds": statistics.median(taken),
                "least": min(taken),
                "most": max(taken),
                "error": errors[name],
            }
            if "ours" in times:
                pairs = zip(taken, times["ours"], strict=True)
                one["of_ours"] = statistics.median(a / b for a, b in pairs)
            figures["results"].append(one)

    def _ready(
        self, entry: Entry, count: int, most: float
    ) -> tuple[cuda_clock.Block, float] | str:
        """What times a contestant, with its error; or why not."""
        contestant, kind = entry.contestant, self.setting.kind
        launch = entry.launch(contestant.take(self.x[:count]))
        exact = self.own_exact.get(entry.name, self.exact)[:count]
        try:
            error = difference(contestant.give(launch()), exact)
            if not error <= most:
                return f"{WRONG}: {_off(error, most)}"
            each = cuda_clock.eager_seconds(launch, kind)
            if entry.name != "ours" and each > LIMIT:
                entry.out = True
                return f"and more, not timed: {each:.2f} s a call"
            made = self._block(entry, launch, each)
            again = difference(contestant.give(made.poisoned()), exact)
        except FAILURES as failure:
            entry.out = entry.name != "ours"
            return told(failure)
        if not again <= most:
            return f"{WRONG} in a CUDA graph: {_off(again, most)}"
        return made, max(error, again)

    def _block(
        self, entry: Entry, launch: Callable[[], Any], each: float
    ) -> cuda_clock.Block:
        contestant, kind = entry.contestant, self.setting.kind
        seconds, least = SECONDS[self.setting.sizes], len(contestant.copies)
        if not isinstance(contestant, Lazy):
            return cuda_clock.fitted(launch, kind, seconds, least, each)
        calls = max(least, min(200, round(seconds / each)))
        finish = contestant.finish

        def replay() -> Any:
            results = [launch() for _ in range(calls)]
            finish(results)
            return results[-1]

        return cuda_clock.Block(calls, replay, lambda: cuda_clock.host_seconds(replay))

    def _floor(self, count: int) -> float:
        """Seconds that bytes or arithmetic take at the least."""
        weight, limits = self.weight, self.limits
        moved = self.figures["bytes"]
        moved += count * (weight.n + weight.k) * weight.dtype.itemsize
        flops = 2 * count * weight.n * weight.k
        rate = limits["rates"][layout.name_of(weight.dtype)]
        return float(max(moved / limits["bandwidth"], flops / rate))


def _off(error: float, most: float) -> str:
    return f"relative error {error:.1e}, allowed {most:.1e}"
