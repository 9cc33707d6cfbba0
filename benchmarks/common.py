"""Timing side by side, and the table that a benchmark prints."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import torch

from affine_tensor.quantize import format_table

Name = TypeVar("Name", bound=Hashable)


def machine() -> str:
    name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def in_turn(
    contestants: dict[Name, Callable[[], Any]],
    *,
    rounds: int = 15,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = 0.0,
) -> dict[Name, list[float]]:
    """Seconds per call of each in each round, so that all see the same machine.

    `pause`: seconds to wait before each, in which threads that still spin for the one
    before it go to sleep.
    """
    for run in contestants.values():
        run()
    times: dict[Name, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            time.sleep(pause)
            start = clock()
            for _ in range(calls):
                run()
            times[name].append((clock() - start) / calls)
    return times


def side_by_side(
    contestants: dict[Name, Callable[[], Any]], **how: Any
) -> dict[Name, float]:
    """Median seconds per call of each, run in turn (see `in_turn`)."""
    times = in_turn(contestants, **how)
    return {name: statistics.median(taken) for name, taken in times.items()}


def report(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    print(f"{title} ({machine()})")
    print(format_table([header, *rows]))


def save(path: str | None, results: dict[str, Any]) -> None:
    """Write the figures as JSON if a path was given."""
    if path:
        text = json.dumps({"machine": machine(), **results}, indent=2)
        Path(path).write_text(text + "\n")


def picture(path: str | None, title: str, unit: str, bars: dict[str, float]) -> None:
    """Draw the figures as horizontal bars if a path was given."""
    if not path:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.5 + 0.45 * len(bars)))
    names, values = list(bars)[::-1], list(bars.values())[::-1]
    drawn = axes.barh(names, values, color="#4878a8")
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.set_title(title, loc="left")
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
