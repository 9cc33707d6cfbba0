"""The tables of `nvidia.py` in Markdown, made of its figures alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import cuda_targets
from cpu_report import (
    format_of,
    markdown,
    missing,
    named,
    possible,
    rows_of,
    shape_of,
    short,
)
from cuda_contestants import PEERS, WHAT
from cuda_machine import headline

MANY = 128  # rows, from which on arithmetic is told rather than bytes


def report(figures: dict[str, Any]) -> str:
    """All of it, a heading for each section."""
    parts = [f"# On an NVIDIA GPU\n\n{headline(figures)}"]
    for section, title in TITLES.items():
        if section in figures:
            parts.append(f"## {title}\n\n{section_text(section, figures[section])}")
    return "\n\n".join(parts) + "\n"


def section_text(section: str, results: dict[str, Any]) -> str:
    failed = f"Failed: {results['failed']}" if "failed" in results else ""
    parts = [failed]
    if results.keys() - {"failed"}:
        try:
            parts.append(TEXTS[section](results))
        except (KeyError, IndexError, ValueError):
            if not failed:
                raise
    return "\n\n".join(filter(None, parts))


# ---- products -------------------------------------------------------------------


def products(results: dict[str, Any]) -> str:
    weights = [one for one in possible(results) if one.get("results")]
    parts = [_how(results, weights), *over_rows(weights)]
    if len({format_of(one) for one in weights}) > 1:
        parts.append(f"All formats\n\n{over_formats(weights)}")
    parts.append(target_table(weights))
    if weights:
        parts.append(f"Relative L2 error, in roundings\n\n{accuracy(weights)}")
    return "\n\n".join(filter(None, [*parts, missing(results)]))


def _how(results: dict[str, Any], weights: list[dict[str, Any]]) -> str:
    there = contestants(weights)
    lines = [
        f"Microseconds of a launch in a CUDA graph of many, gaps included; medians of "
        f"{results['rounds']} rounds in turn. Weights come from memory: copies in turn, "
        f"{results['copies_bytes'] >> 20} MiB together for each.",
        *(f"- {name}: {WHAT[name]}" for name in ("ours", *PEERS) if name in there),
        f"- ours here: {results['ours']}",
        f"- {measured(results)}",
    ]
    return "\n".join(lines)


def measured(results: dict[str, Any]) -> str:
    """What the device was found to do, which floors are made of."""
    limits = results["limits"]
    rates = ", ".join(
        f"{rate / 1e12:.0f} TFLOP/s in {name}" for name, rate in limits["rates"].items()
    )
    return (
        f"floor: bytes over {limits['bandwidth'] / 1e12:.2f} TB/s (a copy, read and "
        f"written) or operations over {rates}, whichever takes longer; a kernel that "
        f"does nothing takes {1e6 * limits['launch']:.2f} µs there"
    )


def contestants(weights: Iterable[dict[str, Any]]) -> list[str]:
    there = {result["name"] for one in weights for result in one["results"]}
    return [name for name in ("ours", *PEERS) if name in there]


def microseconds(one: dict[str, Any] | None) -> str:
    return short(1e6 * one["seconds"]) if one else ""


def times(one: dict[str, Any] | None) -> str:
    return f"{one['of_ours']:.2f}" if one and "of_ours" in one else ""


def over_rows(weights: list[dict[str, Any]]) -> list[str]:
    """A table for each shape of each format that was timed with several rows."""
    texts = []
    for one in weights:
        if len(one["roundings"]) < 2:
            continue
        names = [name for name in contestants([one]) if name != "ours"]
        header = ["rows", "floor µs", "ours µs", "ours", "of the floor", "wanted µs"]
        for name in names:
            header += [f"{name} µs", "/ ours"]
        lines = [header]
        for rows in rows_of(one):
            found = named(one, rows)
            line = [str(rows), *_mine(one, rows, found.get("ours"))]
            for name in names:
                line += [microseconds(found.get(name)), times(found.get(name))]
            lines.append(line)
        title = f"{shape_of(one)}, {format_of(one)}: {one['bytes'] / 1e6:.1f} MB"
        texts.append(f"{title}\n\n{markdown(lines)}")
    return texts


def _mine(weight: dict[str, Any], rows: int, one: dict[str, Any] | None) -> list[str]:
    """Ours: its floor, time, speed, share, and what was wanted."""
    floor = weight["floors"][str(rows)]
    cells = [short(1e6 * floor), microseconds(one), "", "", ""]
    if one is None:
        return cells
    seconds = one["seconds"]
    cells[2] = f"{weight['bytes'] / seconds / 1e9:.0f} GB/s"
    if rows >= MANY:
        flops = 2 * rows * weight["n"] * weight["k"]
        cells[2] = f"{flops / seconds / 1e12:.0f} TFLOP/s"
    cells[3] = f"{floor / seconds:.0%}"
    if cuda_targets.is_theirs(weight):
        shape = (weight["n"], weight["k"])
        verdict = cuda_targets.of_cell(*shape, rows, 1e6 * seconds)
        if verdict is not None:
            wanted = verdict.wanted.removesuffix(" µs")
            cells[4] = f"{wanted}: {verdict.word}"
    return cells


def over_formats(weights: list[dict[str, Any]]) -> str:
    """A line for each weight, ours over the floor and dense over ours at each count."""
    counts = sorted({rows for one in weights for rows in rows_of(one)})
    header = ["N x K", "format"]
    for rows in counts:
        header += [f"{rows} rows, µs", "of the floor", "dense / ours"]
    lines = [header]
    for one in weights:
        line = [shape_of(one), format_of(one)]
        for rows in counts:
            found = named(one, rows)
            mine = found.get("ours")
            share = ""
            if mine:
                share = f"{one['floors'][str(rows)] / mine['seconds']:.0%}"
            line += [microseconds(mine), share, times(found.get("dense"))]
        lines.append(line)
    return markdown(lines)


def accuracy(weights: list[dict[str, Any]]) -> str:
    """Errors against float64 next to that of rounding the exact product once."""
    names = contestants(weights)
    lines = [["N x K", "format", "rows", "one rounding", *names]]
    for one in weights:
        for rows in rows_of(one):
            found, rounding = named(one, rows), one["roundings"][str(rows)]
            line = [shape_of(one), format_of(one), str(rows), f"{rounding:.1e}"]
            for name in names:
                error = found[name]["error"] if name in found else None
                text = "" if error is None else f"{error / rounding:.2f}"
                if error is not None and one["dtype"] == "float32":
                    text = f"{error:.1e}"  # is held to 1e-6
                line.append(text)
            lines.append(line)
    return markdown(lines)


# ---- targets --------------------------------------------------------------------


def target_table(weights: Iterable[dict[str, Any]]) -> str:
    """How many cells of the table pass, and each goal beyond it."""
    theirs = [one for one in weights if cuda_targets.is_theirs(one)]
    cells = [
        verdict
        for one in theirs
        for result in one["results"]
        if result["name"] == "ours"
        for verdict in [
            cuda_targets.of_cell(
                one["n"], one["k"], result["rows"], 1e6 * result["seconds"]
            )
        ]
        if verdict is not None
    ]
    goals = [verdict for one in theirs for verdict in cuda_targets.beyond(one)]
    if not cells and not goals:
        return ""
    passed = sum(one.passed for one in cells)
    text = (
        f"Targets of the project (set for an NVIDIA {cuda_targets.GPU}; 4 bits, group "
        f"64, bfloat16): {passed} of {len(cells)} cells of the table are within "
        f"{cuda_targets.WITHIN - 1:.0%}."
    )
    missed = [one for one in cells if not one.passed]
    return f"{text}\n\n{verdicts([*missed, *goals])}" if missed or goals else text


def verdicts(found: Iterable[cuda_targets.Verdict]) -> str:
    """Each figure, what it should be, and whether it is."""
    lines = [["", "wanted", "at most µs", "µs", ""]]
    lines += [
        [one.what, one.wanted, short(one.most), short(one.measured), one.word]
        for one in found
    ]
    return markdown(lines)


# ---- the other sections ---------------------------------------------------------


def decode(results: dict[str, Any]) -> str:
    lines = [["", "products", "GB", "µs", "GB/s", "/ ours", "worst error"]]
    for one in results["results"]:
        lines.append(
            [
                f"{one['name']}, {one['how']}",
                str(one["linears"]),
                f"{one['bytes'] / 1e9:.2f}",
                microseconds(one),
                f"{one['bytes'] / one['seconds'] / 1e9:.0f}",
                times(one),
                f"{one['error']:.1e}",
            ]
        )
    shapes = results["shapes"]
    parts = [
        f"The products of one token in one CUDA graph: {shapes['layers']} layers, hidden "
        f"{shapes['hidden']}, keys and values {shapes['kv']}, MLP {shapes['mlp']}, "
        f"vocabulary {shapes['vocabulary']}; 4 bits, group 64, bfloat16, one row.",
        markdown(lines),
    ]
    found = list(cuda_targets.of_decoding(results))
    if found:
        parts.append(f"Targets (NVIDIA {cuda_targets.GPU})\n\n{verdicts(found)}")
    left = [f"- not timed: {who}: {why}" for who, why in results["missing"].items()]
    return "\n\n".join(filter(None, [*parts, "\n".join(left)]))


def overhead(results: dict[str, Any]) -> str:
    modes = results["modes"]
    names = list(next(iter(modes.values())))
    lines = [["µs of the host per call", *names, "nn.Linear, packed / torch.mm"]]
    for mode, seconds in modes.items():
        cells = [f"{1e6 * taken:.2f}" for taken in seconds.values()]
        ratio = seconds["nn.Linear, packed"] / seconds["torch.mm"]
        lines.append([mode, *cells, f"{ratio:.2f}"])
    text = (
        f"{results['calls']} calls handed over before the next wait, one row, a matrix "
        f"of {results['side']} x {results['side']}, bfloat16; medians of "
        f"{results['rounds']} rounds in turn. Wanted: at most "
        f"{cuda_targets.OVERHEAD:g} times torch.mm"
    )
    words = [f"{v.what}: {v.word}" for v in cuda_targets.of_overhead(results)]
    return f"{text} ({'; '.join(words)}).\n\n{markdown(lines)}"


TITLES = {
    "products": "Products",
    "decode": "One token's products",
    "overhead": "Host time of a call",
}
TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "products": products,
    "decode": decode,
    "overhead": overhead,
}
