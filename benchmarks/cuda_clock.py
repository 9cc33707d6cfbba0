"""Times of launches on a GPU: CUDA graphs of many, replayed between two events.

On a CPU, to see that a benchmark works, the same launches are called in a loop.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Launch = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)
MOST_CALLS = 4000  # in one graph


@dataclass
class Block:
    """Some calls of one function, timed together."""

    calls: int
    replay: Callable[[], Any]  # calls all; gives what the last one gave
    seconds: Callable[[], float]  # of all calls together
    memory: Any = None  # where a graph writes its last result (or a list of them)
    launch: Launch | None = None  # holds what a graph reads, which graphs do not

    def poisoned(self) -> Any:
        """What it computes where there was NaN before, so that nothing is left out."""
        held = self.memory if isinstance(self.memory, list) else [self.memory]
        for tensor in held:
            if tensor is not None:
                tensor.fill_(math.nan)
        return self.replay()


def block(launch: Launch, calls: int, kind: str) -> Block:
    """So many launches: a CUDA graph, or on a CPU a loop.

    What the launch needs compiled must be: a graph can only be captured then.
    """
    return _graph(launch, calls) if kind == "cuda" else _loop(launch, calls)


def _graph(launch: Launch, calls: int) -> Block:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            last = launch()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> Any:
        graph.replay()
        return last

    def seconds() -> float:
        # The host has handed over the second replay long before the first one ends, and
        # caches hold what this contestant left there.
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return Block(calls, replay, seconds, last, launch)


def _loop(launch: Launch, calls: int) -> Block:
    def replay() -> Any:
        for _ in range(calls):
            last = launch()
        return last

    return Block(calls, replay, lambda: host_seconds(replay))


def host_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def eager_seconds(launch: Launch, kind: str, calls: int = 3) -> float:
    """Seconds of a call outside a graph; with the host's own where it is slower."""
    launch()
    wait(kind)
    start = time.perf_counter()
    for _ in range(calls):
        launch()
    wait(kind)
    return (time.perf_counter() - start) / calls


def fitted(
    launch: Launch, kind: str, seconds: float, least: int, guess: float
) -> Block:
    """A block that takes about so many seconds, of at least so many calls.

    `guess`: seconds of a call, or more.
    """

    def calls(each: float) -> int:
        return max(least, 1, min(MOST_CALLS, math.ceil(seconds / max(each, 1e-9))))

    first = block(launch, calls(guess), kind)
    if kind != "cuda":
        return first
    wanted = calls(first.seconds() / first.calls)
    if wanted <= 1.25 * first.calls:
        return first
    del first
    return block(launch, wanted, kind)


def in_rounds(blocks: dict[Name, Block], rounds: int) -> dict[Name, list[float]]:
    """Seconds per call of each in each round, in turn, so that all see one machine."""
    times: dict[Name, list[float]] = {name: [] for name in blocks}
    for one in blocks.values():
        one.seconds()
    for _ in range(rounds):
        for name, one in blocks.items():
            times[name].append(one.seconds() / one.calls)
    return times


def wait(kind: str) -> None:
    """Until the device has done all that it was given."""
    if kind == "cuda":
        torch.cuda.synchronize()


# ---- what the machine can do ------------------------------------------------------


def limits(kind: str, dtypes: dict[str, torch.dtype], rounds: int) -> dict[str, Any]:
    """Bytes a second of a copy, FLOP a second of products, seconds of a launch."""
    return {
        "bandwidth": _bandwidth(kind, rounds),
        "rates": {name: _rate(kind, dtype, rounds) for name, dtype in dtypes.items()},
        "launch": _launch(kind, rounds),
    }


def _bandwidth(kind: str, rounds: int) -> float:
    """Read and written, of a copy within the device, outside graphs.

    As a node of a graph a copy is slower than what kernels reach.
    """
    size = 4 << 30 if kind == "cuda" else 8 << 20
    source = torch.arange(size // 4, dtype=torch.int32, device=kind)
    target = torch.empty_like(source)
    return 2 * size / _median(lambda: target.copy_(source), kind, rounds)


def _rate(kind: str, dtype: torch.dtype, rounds: int) -> float:
    """Of a large square product of random numbers."""
    size = 8192 if kind == "cuda" else 64
    a, b = (torch.randn(size, size, device=kind).to(dtype) for _ in range(2))
    return 2 * size**3 / _median(lambda: a @ b, kind, rounds)


def _launch(kind: str, rounds: int) -> float:
    """Of a kernel that does nothing to speak of, after another in a graph."""
    value: Tensor = torch.zeros(1, device=kind)
    one = block(lambda: value.add_(1), 500, kind)
    return statistics.median(one.seconds() for _ in range(rounds)) / one.calls


def _median(run: Launch, kind: str, rounds: int) -> float:
    run()
    if kind != "cuda":
        return statistics.median(host_seconds(run) for _ in range(rounds))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(rounds):
        run()
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)
