"""Timing products with packed weights on a CPU, beside the machine's own bandwidth."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bandwidth import Reader, best_reader
from common import in_turn
from cpu_contestants import (
    Contestant,
    Weight,
    allowed,
    difference,
    exact_product,
    made,
    one_rounding,
)

from affine_tensor import layout, ops

SHAPES = {
    "models": ((4096, 4096), (14336, 4096)),
    "tiny": ((48, 256), (33, 192)),  # to see that it works
}
ROWS = {"models": (1, 2, 4, 8, 16, 32, 128, 512), "tiny": (1, 2, 9, 64)}
CACHES = {"models": 256 << 20, "tiny": 0}  # copies of a weight are larger
SECONDS = {"models": 30e-3, "tiny": 0.0}  # of what is timed at once
ROUNDS = {"models": 15, "tiny": 2}
PAUSE = {"models": 10e-3, "tiny": 0.0}  # more than an OpenMP runtime spins
# Seconds per call, above which a peer is not timed. Ours have none.
LIMITS = {"dense": 3.0, "int4pack": 1.0, "mlx": 0.5}
DTYPES = {layout.name_of(dtype): dtype for dtype in layout.WEIGHT_DTYPES}

Key = tuple[str, int]  # contestant, rows
READ: Key = ("read", 0)
WRONG = "WRONG"


def plan(options: argparse.Namespace) -> list[tuple[Weight, tuple[int, ...]]]:
    """The weights to measure, each with its rows of x.

    Where no widths are asked for: 4 bits with all rows, the others with one.
    """
    shapes = options.shape or SHAPES[options.sizes]
    rows = tuple(sorted(set(options.rows or ROWS[options.sizes])))
    found = []
    for dtype, group, (n, k) in itertools.product(
        options.dtype, options.group_size, shapes
    ):
        for bits in options.bits or layout.BITS:
            own = rows if options.bits or bits == 4 else (1,)
            found.append((Weight(n, k, bits, group, DTYPES[dtype]), own))
    return found


def measure(
    options: argparse.Namespace, caches: int = 0, say: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Every weight of the plan; `caches` is how large the machine's caches are."""
    total = CACHES[options.sizes] and max(CACHES[options.sizes], 3 * caches)
    reader = best_reader(max(total, 1 << 20), torch.get_num_threads())
    rounds = options.rounds or ROUNDS[options.sizes]
    weights = []
    for weight, rows in plan(options):
        found: dict[str, Any] = {
            "n": weight.n,
            "k": weight.k,
            **weight.form,
            "dtype": layout.name_of(weight.dtype),
        }
        reason = layout.why_not(weight.k, **weight.form)
        if reason:
            found["impossible"] = reason
        else:
            start = time.perf_counter()
            with torch.inference_mode():
                race = Race(weight, rows, options.sizes)
                race.gather(total)
                found |= race.run(reader, rounds)
            say(f"{weight}: {time.perf_counter() - start:.0f} s")
        weights.append(found)
    return {
        "ours": our_kernel(),
        "reader": reader.how,
        "copies_bytes": total,
        "rounds": rounds,
        "limits": LIMITS,
        "weights": weights,
    }


def our_kernel() -> str:
    """What multiplies for us."""
    kernel = ops.kernel("linear", torch.empty(0))
    return "the reference" if kernel is None else kernel.__module__


class Race:
    """The contestants for one weight, each with some numbers of rows."""

    def __init__(self, weight: Weight, rows: Sequence[int], sizes: str) -> None:
        self.weight, self.rows, self.sizes = weight, rows, sizes
        self.parts = weight.parts()
        self.bytes = sum(part.nbytes for part in self.parts)
        self.x = weight.x(max(rows))
        self.exact = exact_product(weight, self.parts, self.x)
        self.roundings = {m: one_rounding(self.exact[:m], weight.dtype) for m in rows}
        self.missing: dict[str, str] = {}
        self.errors: dict[Key, float] = {}
        self.calls: dict[Key, int] = {}
        self.blocks: dict[Key, Callable[[], Any]] = {}

    def gather(self, total: int) -> None:
        """Take in all that there are, with `total` bytes of copies, and are right."""
        for name, contestant in made(self.weight, self.parts, total):
            reason = (
                contestant
                if isinstance(contestant, str)
                else self._admit(name, contestant)
            )
            if reason:
                self.missing[name] = reason

    def _admit(self, name: str, contestant: Contestant) -> str:
        """Check it at each number of rows; returns why it is left out from some on."""
        turns = itertools.cycle(contestant.copies)
        for count in self.rows:
            taken = contestant.take(self.x[:count])
            try:
                y = contestant.give(contestant.multiply(taken, next(turns)))
            except (RuntimeError, ValueError) as failure:
                return str(failure).splitlines()[0]
            error = difference(y, self.exact[:count])
            most = allowed(name, self.weight.dtype, self.roundings[count])
            if not error <= most:
                return (
                    f"{WRONG} with {count} rows: relative error {error:.1e}, "
                    f"allowed {most:.1e}"
                )

            def run(calls: int = 1, taken: Any = taken) -> None:
                for _ in range(calls):
                    contestant.multiply(taken, next(turns))

            seconds = _seconds(run)
            if seconds > LIMITS.get(name, math.inf):
                return f"not timed from {count} rows on: {seconds:.1f} s a call"
            self.errors[name, count] = error
            self._add((name, count), run, seconds)
        return ""

    def _add(self, key: Key, run: Callable[[int], Any], seconds: float) -> None:
        calls = max(1, min(10_000, round(SECONDS[self.sizes] / seconds)))
        self.calls[key], self.blocks[key] = calls, lambda: run(calls)

    def run(self, reader: Reader, rounds: int) -> dict[str, Any]:
        """Time all, and the reader, in turn."""

        def read(calls: int = 1) -> None:
            for _ in range(calls):
                reader.read()

        self._add(READ, read, _seconds(read))
        # What is compared stands side by side: the reader first, then by rows.
        blocks = dict(sorted(self.blocks.items(), key=lambda item: item[0][1]))
        times = in_turn(blocks, rounds=rounds, pause=PAUSE[self.sizes])
        seconds = {k: [t / self.calls[k] for t in taken] for k, taken in times.items()}
        results = [
            {
                "name": key[0],
                "rows": key[1],
                "seconds": statistics.median(seconds[key]),
                "error": error,
                **_ratios(seconds, key),
            }
            for key, error in self.errors.items()
        ]
        for one in results:
            if one["name"] == "ours":
                share = _median_ratio(seconds[READ], seconds["ours", one["rows"]])
                one["share"] = share * self.bytes / reader.bytes
        return {
            "bytes": self.bytes,
            "read": reader.bytes / statistics.median(seconds[READ]),
            "roundings": {str(rows): r for rows, r in self.roundings.items()},
            "missing": self.missing,
            "results": results,
        }


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _ratios(seconds: dict[Key, list[float]], key: Key) -> dict[str, float]:
    """What a contestant took, as times of ours and of itself with one row."""
    name, rows = key
    others = {"of_ours": ("ours", rows), "of_one_row": (name, 1)}
    return {
        what: _median_ratio(seconds[key], seconds[other])
        for what, other in others.items()
        if other in seconds
    }


def _median_ratio(above: list[float], below: list[float]) -> float:
    """Of each round's own ratio, as the machine's speed changes between rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
