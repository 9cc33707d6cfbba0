"""Few rows that hold every pair of values of any two factors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool] = lambda row: True,
    seed: int = 0,
) -> list[Row]:
    """Rows of one value for each factor, always the same ones; a greedy choice.

    `allowed` says whether values go together, of rows that may lack some factors. Pairs
    that it refuses are left out. Raises ValueError where a pair fits in no row.
    """
    chance = random.Random(seed)
    missing = {
        pair: None
        for a, b in combinations(factors, 2)
        for pair in _pairs(a, factors[a], b, factors[b])
        if allowed(dict(pair))
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        others = [name for name in factors if name not in row]
        chance.shuffle(others)
        for name in others:
            row[name] = _best(name, factors[name], row, missing, allowed, chance)
        rows.append({name: row[name] for name in factors})
        for pair in combinations(rows[-1].items(), 2):
            missing.pop(pair, None)
    return rows


def _pairs(
    a: str, of_a: Sequence[Any], b: str, of_b: Sequence[Any]
) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    for x, y in product(of_a, of_b):
        yield (a, x), (b, y)


def _best(
    name: str,
    values: Sequence[Any],
    row: Row,
    missing: Mapping[Any, None],
    allowed: Callable[[Row], bool],
    chance: random.Random,
) -> Any:
    """The value that makes most of the missing pairs with those in the row."""

    def gain(value: Any) -> int:
        pairs = (
            (((other, row[other]), (name, value)), ((name, value), (other, row[other])))
            for other in row
        )
        return sum(one in missing or two in missing for one, two in pairs)

    fitting = [value for value in values if allowed({**row, name: value})]
    if not fitting:
        raise ValueError(f"no value of {name} goes with {row}")
    most = max(gain(value) for value in fitting)
    return chance.choice([value for value in fitting if gain(value) == most])
