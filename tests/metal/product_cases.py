"""Which products are tried: a pairwise sample, and a few for each kernel and tile shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, product
from typing import Any

from pairwise import Row, pairwise
from products import BIASES, EXPERT_LAYOUTS, WEIGHT_LAYOUTS, Case, smallest_row

OPERATORS = ("linear", "matmul", "grouped_linear", "grouped_matmul")
BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128, 256)
FLOATS = ("half", "bfloat", "float")

# In units of the shortest row, after so many columns. Three groups of 16 leave half a run
# of 32; three of 32 with an odd width leave rows that no vector fits.
LENGTHS = {
    "one": (0, 1),
    "three": (0, 3),
    "thousand": (1024, 0),
    "two parts": (2048, 1),
    "four parts": (4096, 3),
    "eight parts": (8192, 1),
}

# How many rows, by family. The sample names the family, M goes round.
ROWS = {
    "linear": {
        "one": (1,),
        "few": (2, 3, 5, 8),
        "skinny": (9, 16, 17, 33),
        "tiles": (49, 70, 130),
    },
    "matmul": {"one": (1,), "few": (2, 3, 4), "tiles": (5, 8, 9, 17, 33, 70)},
    "grouped": {"one": (1,), "few": (2, 3, 5, 8, 9), "many": (17, 49, 70, 130)},
}
LIMITS: dict[str, tuple[tuple[tuple[str, int], ...], ...]] = {
    # Fewer simdgroups for a full chip: K is not divided, and tiles are wide.
    "linear": (
        (),
        (("simdgroups", 1),),
        (("small", 1), ("simdgroups", 1)),
        (("small", 1), ("skinny", 8), ("simdgroups", 1)),
    ),
    "matmul": ((), (("simdgroups", 1),), (("vectors", 1),)),
    "grouped": (
        (),
        (("rows_per_expert", 1),),
        (("rows_per_expert", 64),),
        (("rows_per_expert", 1), ("skinny", 8), ("simdgroups", 1)),
    ),
}
X_LAYOUTS = {
    "linear": (
        *("plain", "offset1", "offset3", "wide odd", "every other", "transposed"),
        *("expanded", "3d swapped", "1d"),
    ),
    "matmul": ("plain", "offset1", "every other", "transposed", "3d swapped"),
    "grouped": ("plain", "offset3", "wide odd", "every other", "transposed"),
}
COLUMNS = {
    "linear": (1, 3, 7, 8, 9, 31, 33, 64, 100, 300),
    "matmul": (1, 9, 33, 100, 200),
    "grouped": (1, 7, 8, 33, 64),
}


def _allowed(row: Row) -> bool:
    x, bias, rows = (row.get(name, "") for name in ("x", "bias", "rows"))
    if x == "1d" and (rows not in ("", "one") or bias in ("matrix", "column", "3d")):
        return False
    if row.get("experts") == 40 and row.get("length") in ("four parts", "eight parts"):
        return False  # a large weight for nothing new
    return bias != "3d" or x == "" or x.startswith("3d")


def _factors(op: str) -> dict[str, Any]:
    grouped = op.startswith("grouped")
    kind = "grouped" if grouped else op
    factors: dict[str, Any] = {
        "rows": tuple(ROWS[kind]),
        "n": COLUMNS[kind],
        "length": tuple(LENGTHS),
        "bits": BITS,
        "group": GROUPS,
        "type": FLOATS,
        "scales": FLOATS,
        "values": ("normal", "shifted", "outliers", "zeros"),
        "x": X_LAYOUTS[kind],
        "weight": EXPERT_LAYOUTS if grouped else WEIGHT_LAYOUTS,
        "permuted": (False, True),
        "limits": LIMITS[kind],
    }
    if op == "linear":
        factors["bias"] = BIASES
    if grouped:
        factors["experts"] = (1, 3, 40)
        factors["by"] = ("ends int32", "ends int64", "indices int32", "indices int64")
    return factors


def sample(op: str) -> Iterator[Case]:
    """Cases that hold every pair of features."""
    kind = "grouped" if op.startswith("grouped") else op
    numbers = {name: cycle(sizes) for name, sizes in ROWS[kind].items()}
    for row in pairwise(_factors(op), _allowed, seed=OPERATORS.index(op)):
        before, units = LENGTHS[row.pop("length")]
        k = before + units * smallest_row(row["bits"], row["group"])
        m = next(numbers[row.pop("rows")])
        yield Case(op=op, m=m, k=k, rows=row.pop("by", ""), **row)


# ---- each kernel, each tile shape -----------------------------------------------


def _gemv(split: int, **other: Any) -> Case:
    """A part of K has 1024 columns at least."""
    base = Case(n=7, **other)
    return replace(base, k=_ragged(base, 1024 * split if split > 1 else 200))


def _gemm(rows: int, wide: int, split: int, **other: Any) -> Case:
    """Tiles of `rows` times 8 rows of x, with four simdgroups: `split` share outputs."""
    limits = (("small", 1), ("skinny", 64), ("simdgroups", 1))
    n = _WIDTHS[wide, split]
    base = Case(m=8 * rows - 3, n=n, limits=limits, **other)
    return replace(base, k=_ragged(base, 128 * split))


# Outputs that lead to N_TILES and SPLIT, with ten simdgroups wanted.
_WIDTHS = {(1, 1): 70, (1, 2): 40, (1, 4): 9, (2, 1): 130, (4, 1): 260}


def _gemm_n(rows: int, split: int, **other: Any) -> Case:
    limits = {"vectors": 1, "simdgroups": 1 if split == 1 else 24}
    base = Case(
        op="matmul", m=8 * rows - 3, n=70, limits=tuple(limits.items()), **other
    )
    return replace(base, k=_ragged(base, 704 if split == 1 else 100))


def _grouped(op: str, tiles: bool, rows: str, cores: int = 24, **other: Any) -> Case:
    limits = (("rows_per_expert", 1 if tiles else 64), ("simdgroups", cores))
    other = {"experts": 3, "m": 20 if tiles else 11, "n": 9, **other}
    base = Case(op=op, rows=rows, limits=limits, **other)
    return replace(base, k=_ragged(base, 200))


def _ragged(case: Case, least: int) -> int:
    """A row that is no shorter, of an odd number of groups if that can be."""
    unit = smallest_row(case.bits, case.group)
    return (-(-least // unit) | 1) * unit


def tile_shapes(full: bool = False) -> list[Case]:
    """Small cases, one for each kernel and tile shape; in `full` for all there can be.

    Formats, dtypes and layouts go round.
    """
    makers: list[tuple[Callable[..., Case], dict[str, Any]]] = []

    def add(maker: Callable[..., Case], **values: Any) -> None:
        makers.append((maker, values))

    for split in (1, 2, 4, 8):
        add(_gemv, split=split, m=1)
    few = [(m, split) for m in range(2, 9) for split in (1, 2, 4, 8)]
    for m, split in few if full else [(2, 8), (3, 1), (4, 4), (5, 2), (8, 1), (7, 2)]:
        add(_gemv, split=split, m=m)
    for m, split, bits in ((1, 1, 4), (1, 2, 8), (3, 1, 2), (8, 2, 6)):
        add(_gemv, split=split, m=m, bits=bits, group=16)  # K ends with half a run
    for m in (1, 2, 3, 4):
        add(_gemv, split=1, op="matmul", m=m)
    tiles = [(rows, *sizes) for rows in range(1, 9) for sizes in _WIDTHS]
    tiles = [(rows, wide, split) for rows, wide, split in tiles if rows * wide <= 16]
    some = [(1, 1, 4), (1, 4, 1), (2, 2, 1), (3, 1, 2), (3, 4, 1), (4, 2, 1)]
    some += [(5, 1, 1), (6, 1, 2), (7, 2, 1), (8, 1, 2), (8, 2, 1), (2, 1, 4)]
    for rows, wide, split in tiles if full else some:
        add(_gemm, rows=rows, wide=wide, split=split)
    for rows, split in ((1, 1), (2, 1), (4, 1), (1, 4), (2, 4)):
        add(_gemm_n, rows=rows, split=split)
    for op, by in product(
        ("grouped_linear", "grouped_matmul"), ("ends int64", "indices int32")
    ):
        permuted = (op == "grouped_linear") == by.startswith("ends")
        other = "ends int32" if by.startswith("ends") else "indices int64"
        add(_grouped, op=op, tiles=True, rows=other, permuted=not permuted)
        add(_grouped, op=op, tiles=True, rows=by, permuted=permuted)
        add(_grouped, op=op, tiles=False, rows=by, permuted=permuted)
    add(_grouped, op="grouped_linear", tiles=True, rows="ends int32", experts=40, m=60)
    for n, by in ((130, "ends int64"), (260, "indices int32")):
        add(_grouped, op="grouped_linear", tiles=True, rows=by, n=n, m=50, cores=1)
    return [_formed(maker, values, i) for i, (maker, values) in enumerate(makers)]


def _formed(maker: Callable[..., Case], values: dict[str, Any], i: int) -> Case:
    """The i-th case, with formats, dtypes and layouts of its own."""
    op = values.get("op", "matmul" if maker is _gemm_n else "linear")
    kind = "grouped" if op.startswith("grouped") else op
    layouts = [name for name in X_LAYOUTS[kind] if name != "1d"]
    weights = EXPERT_LAYOUTS if kind == "grouped" else WEIGHT_LAYOUTS
    other: dict[str, Any] = {
        "bits": BITS[i * 3 % 7],
        "group": GROUPS[i % 5] if values.get("split", 1) == 1 else GROUPS[i % 3],
        "type": FLOATS[i % 3],
        "scales": FLOATS[i // 3 % 3],
        "x": layouts[i % len(layouts)],
        "weight": weights[i % len(weights)],
        "permuted": i % 2 == 1,
    }
    if kind == "linear":
        other["bias"] = ("none", "row", "matrix", "strided row")[i // 2 % 4]
    return maker(**{**other, **values})


# In float, thousands of terms of one sign drift.
LONG_SUMS = [
    Case(op, m, n, k, bits, 64, "float", values=values)
    for bits, values in ((1, "normal"), (4, "shifted"), (8, "shifted"), (8, "outliers"))
    for op, m, n, k in (
        *(("linear", m, 16, 12288) for m in (1, 8, 20, 64)),
        *(("matmul", m, 6000, 128) for m in (1, 4, 20, 64)),
    )
]


# ---- all formats, dtypes and kernels --------------------------------------------

# Rows of x by kernel, two that take the same tile, going round.
_ROWS = {
    "gemv": ((1, 1),),
    "gemv_small": tuple((m, m) for m in range(2, 9)),
    "skinny": ((9, 16), (17, 24), (33, 40), (41, 48)),
    "tiles": ((49, 56), (70, 80), (130, 144)),
    "gemv_n": ((1, 1), (2, 2), (3, 3), (4, 4)),
    "gemm_n": ((5, 8), (9, 16), (33, 70)),
    "gemv experts": ((3, 9),),
    "gemm experts": ((6, 9), (33, 36)),
    "gemm gathered": ((6, 9), (33, 36)),
    "gemv_n experts": ((3, 9),),
    "gemm_n experts": ((6, 9), (33, 36)),
}
KERNELS = tuple(_ROWS)


def all_of(kernel: str, bits: int, group: int) -> Iterator[Case]:
    """Two shapes for each pair of dtypes, of one variant; features go round."""
    form = BITS.index(bits) * len(GROUPS) + GROUPS.index(group)
    row = smallest_row(bits, group)
    for i, (x_type, scales) in enumerate(product(FLOATS, FLOATS)):
        turn = form * 9 + i + KERNELS.index(kernel)
        aligned = turn // 2 % 2 == 0
        step = max(row, 128) if aligned else row
        case = Case(
            op="matmul" if "_n" in kernel else "linear",
            bits=bits,
            group=group,
            type=x_type,
            scales=scales,
            values=("normal", "shifted", "outliers", "zeros")[turn % 4],
            permuted=turn % 2 == 1,
            x=("plain", "wide odd")[turn // 4 % 2],
            weight="plain" if aligned else "offset",
            bias=("none", "row")[turn // 8 % 2],
        )
        if "_n" in kernel:
            case = replace(case, bias="none")
        if kernel.endswith(("experts", "gathered")):
            case = _with_experts(case, kernel, turn)
        for m, n, steps in zip(
            _ROWS[kernel][turn % len(_ROWS[kernel])], (33, 9), (3, 1), strict=True
        ):
            yield replace(case, m=m, n=n, k=steps * step)


def _with_experts(case: Case, kernel: str, turn: int) -> Case:
    tiles = kernel.startswith("gemm")
    if kernel == "gemm gathered":
        by = "indices"
    elif kernel == "gemm experts":
        by = "ends"
    else:
        by = ("ends", "indices")[turn // 2 % 2]
    return replace(
        case,
        op="grouped_" + case.op,
        bias="none",
        experts=3,
        rows=f"{by} {('int32', 'int64')[turn % 2]}",
        limits=(("rows_per_expert", 1 if tiles else 64),),
    )
