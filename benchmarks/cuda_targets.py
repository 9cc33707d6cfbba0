"""What the project wants of an NVIDIA H200: microseconds, and what was made of them.

4 bits, groups of 64, bfloat16, CUDA graphs, weights rotated out of L2. The table is
what prototypes of the project reached; the goals beyond it were set when it was planned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GPU = "H200"
WITHIN = 1.05  # of the table
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
_MICROSECONDS = {
    (4096, 4096): (6.0, 7.4, 7.7, 7.9, 9.8, 12.8, 18.1, 25.9, 37.7, 101),
    (14336, 4096): (14.3, 16.0, 16.4, 17.1, 22.9, 29.4, 42.5, 73.6, 130, 346),
    (4096, 14336): (13.6, 15.9, 16.3, 16.8, 24.6, 31.7, 48.2, 72.7, 117, 332),
    (128256, 4096): (83.9, 93.7, 96.3, 98.7, 136, 181, 284, 560, 1093, 3173),
}
TABLE = {
    (*shape, rows): microseconds
    for shape, values in _MICROSECONDS.items()
    for rows, microseconds in zip(_ROWS, values, strict=True)
}
GOALS = {(14336, 4096, 1): 13.0, (14336, 4096, 64): 33.0, (128256, 4096, 1): 80.0}
DENSE_ROWS, OF_DENSE = (128, 256), 1.2  # times cuBLAS in bfloat16
# Microseconds of a token's 225 products: of the table, and the goal.
DECODE = {"one by one": 2050.0, "fused": 1760.0}
DECODE_GOAL = 1700.0
OVERHEAD = 2.0  # times torch.mm on the host


@dataclass(frozen=True)
class Verdict:
    """One figure beside what it should be."""

    what: str
    wanted: str  # for people
    target: float
    measured: float
    slack: float = 1.0

    @property
    def most(self) -> float:
        return self.slack * self.target

    @property
    def passed(self) -> bool:
        return self.measured <= self.most

    @property
    def word(self) -> str:
        return (
            "pass" if self.passed else f"miss ({self.measured / self.target - 1:+.0%})"
        )


def is_theirs(weight: dict[str, Any]) -> bool:
    """Whether there are targets for a weight's format."""
    form = (weight["bits"], weight["group_size"], weight["dtype"])
    return "impossible" not in weight and form == (4, 64, "bfloat16")


def of_cell(n: int, k: int, rows: int, microseconds: float) -> Verdict | None:
    """A cell of the table, where it has one."""
    wanted = TABLE.get((n, k, rows))
    if wanted is None:
        return None
    what = _place(n, k, rows)
    return Verdict(what, f"{wanted:g} µs", wanted, microseconds, WITHIN)


def _place(n: int, k: int, rows: int) -> str:
    return f"{n} x {k}, M = {rows}"


def beyond(weight: dict[str, Any]) -> Iterator[Verdict]:
    """The goals beyond the table that a weight's figures speak of."""
    if not is_theirs(weight):
        return
    by_name = {(one["name"], one["rows"]): one for one in weight["results"]}
    shape = (weight["n"], weight["k"])
    for (name, rows), one in by_name.items():
        if name != "ours":
            continue
        what, taken = _place(*shape, rows), 1e6 * one["seconds"]
        goal = GOALS.get((*shape, rows))
        if goal is not None:
            yield Verdict(what, f"{goal:g} µs", goal, taken)
        dense = by_name.get(("dense", rows))
        if rows in DENSE_ROWS and dense is not None:
            most = OF_DENSE * 1e6 * dense["seconds"]
            yield Verdict(what, f"{OF_DENSE:g} x dense", most, taken)


def of_decoding(results: dict[str, Any]) -> Iterator[Verdict]:
    if not results.get("is_8b"):
        return
    for one in results["results"]:
        if one["name"] == "ours":
            how, taken = one["how"], 1e6 * one["seconds"]
            what = f"decoding, {how}"
            wanted = DECODE[how]
            yield Verdict(what, f"{wanted:g} µs", wanted, taken, WITHIN)
            yield Verdict(what, f"{DECODE_GOAL:g} µs", DECODE_GOAL, taken)


def of_overhead(results: dict[str, Any]) -> Iterator[Verdict]:
    for mode, one in results.get("modes", {}).items():
        taken = one["nn.Linear, packed"] / one["torch.mm"]
        what = f"host time of an nn.Linear, {mode}"
        yield Verdict(what, f"{OVERHEAD:g} x torch.mm", OVERHEAD, taken)
