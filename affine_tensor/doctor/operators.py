"""Every operator on every kind of kernel, in all formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import methodcaller
from random import Random

import torch
from tqdm import tqdm

from .. import layout, ops
from ..kernels import machine
from .cases import Call, Format, Maker
from .watch import Watch

_SHOWN = 3  # failures of a row


@dataclass
class Row:
    """What was found about one operator and one kind of kernel."""

    name: str
    cases: int = 0
    worst: float = 0.0
    # In order of appearance; "reference" where a case took none.
    kernels: dict[str, None] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return f"{len(self.wrong)} WRONG" if self.wrong else "ok"

    def cells(self) -> tuple[str, ...]:
        kernels = ", ".join(self.kernels) or "none"
        return (self.name, kernels, str(self.cases), f"{self.worst:.2f}", self.verdict)

    def failures(self) -> list[str]:
        """What is wrong, in a few lines."""
        lines = [f"{self.name}: {text}" for text in self.wrong[:_SHOWN]]
        if more := len(self.wrong) - _SHOWN:
            lines += [f"{self.name}: and {more} more"] if more > 0 else []
        return lines


Make = Callable[[Maker], Call]


def _kinds() -> Iterator[tuple[str, list[Make]]]:
    """Rows of the table: a name, and the calls that it may take."""
    rows: dict[str, tuple[str, Sequence[int]]] = {
        "linear, 1 row": ("linear", (1,)),
        "linear, 2 to 8 rows": ("linear", range(2, 9)),
        "linear, 9 to 48 rows": ("linear", (9, 16, 17, 31, 48)),
        "linear, more rows": ("linear", (49, 65, 130, 300)),
        "matmul, 1 to 4 rows": ("matmul", range(1, 5)),
        "matmul, more rows": ("matmul", (5, 9, 17, 70)),
    }
    for name, (op, counts) in rows.items():
        yield name, [methodcaller(op, count) for count in counts]
    # Of 4 experts: always too few for tiles, and enough for them under all limits.
    few, many = (1, 2, 3), (260, 301)
    for op, by, (size, counts) in product(
        ("grouped_linear", "grouped_matmul"),
        ("offsets", "indices"),
        (("few", few), ("many", many)),
    ):
        order = "sorted" if by == "offsets" else "unsorted"
        name = f"{op}, {order}, {size} rows"
        yield name, [methodcaller("grouped", op, count, by) for count in counts]
    for index in (torch.int32, torch.int64):
        name = f"embedding, {layout.name_of(index)}"
        yield name, [methodcaller("embedding", index)]
    yield "dequantize", [methodcaller("dequantize")]
    yield "quantize", [methodcaller("quantize")]


def formats() -> list[Format]:
    return [
        Format(*one)
        for one in product(layout.BITS, layout.GROUP_SIZES, layout.WEIGHT_DTYPES)
    ]


def sample(count: int) -> list[Format]:
    """Formats in which all widths, groups and dtypes take turns."""
    return [
        Format(
            layout.BITS[i % len(layout.BITS)],
            layout.GROUP_SIZES[i % len(layout.GROUP_SIZES)],
            layout.WEIGHT_DTYPES[i % len(layout.WEIGHT_DTYPES)],
        )
        for i in range(count)
    ]


def check_operators(
    kind: str, watch: Watch, *, quick: bool = False, only: str = ""
) -> list[Row]:
    """All rows, or those whose name contains `only`.

    quick: two formats each, which take turns.
    """
    kinds = list(_kinds())
    turns = sample(2 * len(kinds))
    plan = [
        (Row(name), makes, turns[2 * i : 2 * i + 2] if quick else formats())
        for i, (name, makes) in enumerate(kinds)
        if only in name
    ]
    large = not quick and not machine.emulated()
    total = sum(len(own) for *_, own in plan)
    with tqdm(total=total, desc="operators", disable=None, leave=False) as bar:
        for row, makes, own in plan:
            for format in own:
                # Always the same ones.
                random = Random(f"{row.name} {format}")
                maker = Maker(format, random, large=large)
                _check(row, random.choice(makes)(maker), format, kind, watch)
                bar.update()
    return [row for row, *_ in plan]


def _check(row: Row, call: Call, format: Format, kind: str, watch: Watch) -> None:
    """Run it twice: the first call makes a plan, the second finds it."""
    row.cases += 1
    device = machine.tensor_device(kind)
    served = ops.has_kernels(kind)
    try:
        watch.clear()
        first, second = call.run(device), call.run(device)
        slow = watch.slow_path(kind) if served else None
        row.kernels.update(dict.fromkeys(watch.launches or ["reference"]))
        for results in (first, second):
            # The CPU's kernels round float16 inputs to 16-bit integers.
            worst, wrong = call.judge(results, rounds=not served or kind == "cpu")
            row.worst = max(row.worst, worst)
            if wrong:
                break
        wrong = wrong or slow or ""
    except Exception as error:  # whatever it is, it belongs into the table
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        row.wrong.append(f"{call}, {format}: {wrong}")
