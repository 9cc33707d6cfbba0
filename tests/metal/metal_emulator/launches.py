"""How launches run, and what is known of them afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal

ORDERS = ("forward", "backward", "random")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """How often a launch touched one buffer, counted by a traced run.

    Bytes are as issued: each thread's own accesses. Sectors are the distinct aligned
    32 bytes that one instruction of one simdgroup touches, summed over its steps.
    """

    loads: int
    load_bytes: int
    load_sectors: int
    stores: int
    store_bytes: int
    store_sectors: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: its kernel, total threads, group size and what was bound.

    `buffers` holds one text for each argument, such as `float32[4, 8]+16` (a tensor
    whose storage offset is 16 bytes) or `int64 5`. `traffic` is there for traced runs.
    """

    kernel: str
    threads: tuple[int, ...]
    group_size: tuple[int, ...]
    buffers: tuple[str, ...]
    traffic: tuple[Traffic, ...] = ()
    threadgroup_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kernel}({', '.join(self.buffers)}) "
            f"threads {self.threads} group {self.group_size}"
        )


@dataclasses.dataclass
class Run:
    """How kernels run within `with run(...)`, and the launches seen there."""

    order: str = "forward"
    seed: int = 0
    trace: bool = False
    partial_simdgroups: bool = False
    front: bool = False
    seconds: float = 300.0
    launches: list[Launch] = dataclasses.field(default_factory=list)


# Of all threads alike: autograd, for one, launches from threads of its own.
_runs: list[Run] = []


def present_run() -> Run | None:
    """The innermost `run` that is open."""
    return _runs[-1] if _runs else None


@contextlib.contextmanager
def run(
    order: Literal["forward", "backward", "random"] = "forward",
    *,
    seed: int = 0,
    trace: bool = False,
    partial_simdgroups: bool = False,
    front: bool = False,
    seconds: float = 300.0,
) -> Iterator[Run]:
    """Set how kernels launched inside the block run, and log their launches.

    Args:
        order: in which order lanes take turns, and threadgroups follow each other.
        seed: of the random order.
        trace: look at every access: exact bounds, races, and traffic. About 5 to 30 times
            slower.
        partial_simdgroups: let some lanes of a simdgroup meet in a reduction while the
            others wait at a barrier or have returned. Legal in Metal; an error by
            default, since it is seldom meant.
        front: place tensors right behind a guard page, so that reads before their
            beginning are found, not those past their end.
        seconds: of processor time, after which a launch is ended as an error.

    The settings hold for launches from any thread.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it can be one of {', '.join(ORDERS)}")
    state = Run(order, seed, trace, partial_simdgroups, front, seconds)
    _runs.append(state)
    try:
        yield state
    finally:
        _runs[:] = [one for one in _runs if one is not state]
