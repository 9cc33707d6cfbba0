"""The tables of `cpu.py` in Markdown, made of its figures alone."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import peers_report
from cpu_contestants import WHAT
from cpu_machine import ABSENT

PEERS = [name for name in WHAT if name != "ours"]
Table = list[list[str]]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; columns but the first stand to the right."""
    head, *others = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(figures: dict[str, Any]) -> str:
    """All of it, a heading for each section."""
    parts = [f"# On a CPU\n\n{head(figures)}"]
    for section, title in TITLES.items():
        if section in figures:
            parts.append(f"## {title}\n\n{section_text(section, figures[section])}")
    return "\n\n".join(parts) + "\n"


def head(figures: dict[str, Any]) -> str:
    """Machine, versions, command and date."""
    machine, versions = figures["machine"], dict(figures["versions"])
    for one in figures.get("models", {}).get("results", []):
        # A peer may live in another python.
        own = {name.replace("_", "-"): v for name, v in one["versions"].items()}
        versions |= own
    there = [f"{name} {v}" for name, v in versions.items() if v != ABSENT]
    absent = [name for name, v in versions.items() if v == ABSENT]
    cache = machine["cache_bytes"] >> 20
    text = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{cache} MiB of cache ({' '.join(machine['flags'])}), {machine['system']}; "
        f"{', '.join(there)}"
    )
    text += f"; not installed: {', '.join(absent)}" if absent else ""
    return f"{text}. {figures['date']}: `{figures['command']}`"


def section_text(section: str, results: dict[str, Any]) -> str:
    if "failed" in results:
        return f"Failed: {results['failed']}"
    return TEXTS[section](results)


# ---- products -------------------------------------------------------------------


def products(results: dict[str, Any]) -> str:
    lines = [
        "Milliseconds, medians of " + f"{results['rounds']} rounds in turn; ratios"
    ]
    lines[0] += " are medians of each round's own."
    lines += [f"- {name}: {what}" for name, what in WHAT.items()]
    lines.append(f"- ours here: {results['ours']}")
    lines.append(
        f"- weights from memory: copies in turn, {results['copies_bytes'] >> 20} MiB "
        f"together for each; read bandwidth in the same rounds: {results['reader']}"
    )
    parts = ["\n".join(lines), one_row(results), *over_rows(results)]
    parts.append(f"Relative L2 error, in roundings\n\n{accuracy(results)}")
    return "\n\n".join(filter(None, [*parts, missing(results)]))


def possible(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in results["weights"] if "impossible" not in one]


def shape_of(weight: dict[str, Any]) -> str:
    return f"{weight['n']} x {weight['k']}"


def format_of(weight: dict[str, Any], bits: bool = True) -> str:
    text = f"group {weight['group_size']}, {weight['dtype']}"
    return f"{weight['bits']} bits, {text}" if bits else text


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def named(weight: dict[str, Any], rows: int) -> dict[str, dict[str, Any]]:
    """The results with so many rows by contestant."""
    return {r["name"]: r for r in weight["results"] if r["rows"] == rows}


def rows_of(weight: dict[str, Any]) -> list[int]:
    return sorted(map(int, weight["roundings"]))


def peers(weights: Iterable[dict[str, Any]]) -> list[str]:
    there = {result["name"] for one in weights for result in one["results"]}
    return [name for name in PEERS if name in there]


def _cells(found: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Milliseconds of peers and how many times ours they are."""
    cells = []
    for name in names:
        one = found.get(name)
        cells.append(_ms(one))
        cells.append(f"{one['of_ours']:.2f}" if one and "of_ours" in one else "")
    return cells


def _ms(one: dict[str, Any] | None) -> str:
    return f"{1e3 * one['seconds']:.3f}" if one else ""


def _peer_header(names: Sequence[str]) -> list[str]:
    return list(itertools.chain(*((f"{name} ms", "/ ours") for name in names)))


def one_row(results: dict[str, Any], title: str = "One row: {}") -> str:
    """All widths with one row of x, beside what the machine can read."""
    texts = []
    weights = [one for one in possible(results) if "1" in one["roundings"]]
    for name in dict.fromkeys(format_of(one, bits=False) for one in weights):
        own = [one for one in weights if format_of(one, bits=False) == name]
        names = peers({**w, "results": named(w, 1).values()} for w in own)
        rows = [["N x K", "bits", "MB", "ours ms", "GB/s", "read GB/s", "share"]]
        rows[0] += _peer_header(names)
        for one in own:
            found = named(one, 1)
            mine = found.get("ours")
            row = [shape_of(one), str(one["bits"]), f"{one['bytes'] / 1e6:.3g}"]
            speed = f"{one['bytes'] / mine['seconds'] / 1e9:.1f}" if mine else ""
            row += [_ms(mine), speed, f"{one['read'] / 1e9:.1f}"]
            row.append(f"{mine['share']:.0%}" if mine else "")
            rows.append(row + _cells(found, names))
        texts.append(f"{title.format(name)}\n\n{markdown(rows)}")
    return "\n\n".join(texts)


def over_rows(results: dict[str, Any]) -> list[str]:
    """Each format that was timed with more than one row."""
    weights = [one for one in possible(results) if len(one["roundings"]) > 1]
    texts = []
    for name in dict.fromkeys(map(format_of, weights)):
        own = [one for one in weights if format_of(one) == name]
        names = peers(own)
        rows = [["N x K", "rows", "ours ms", "/ one row", "of dense's rate"]]
        rows[0] += _peer_header(names)
        for one in own:
            for count in rows_of(one):
                found = named(one, count)
                mine, dense = found.get("ours", {}), found.get("dense", {})
                row = [shape_of(one), str(count), _ms(mine)]
                row.append(f"{mine['of_one_row']:.2f}" if "of_one_row" in mine else "")
                fast = count >= 64 and "of_ours" in dense
                row.append(f"{dense['of_ours']:.0%}" if fast else "")
                rows.append(row + _cells(found, names))
        texts.append(f"{name}\n\n{markdown(rows)}")
    return texts


def accuracy(results: dict[str, Any]) -> str:
    """Errors against float64 next to that of rounding the exact product once."""
    weights = possible(results)
    names = ["ours", *peers(weights)]
    rows = [["N x K", "format", "rows", "one rounding", *names]]
    for one in weights:
        for count in rows_of(one):
            found, rounding = named(one, count), one["roundings"][str(count)]
            row = [shape_of(one), format_of(one), str(count), f"{rounding:.1e}"]
            for name in names:
                error = found[name]["error"] if name in found else None
                times = "" if error is None else f"{error / rounding:.2f}"
                if error is not None and one["dtype"] == "float32":
                    times = f"{error:.1e}"  # is held to 1e-6
                row.append(times)
            rows.append(row)
    return markdown(rows)


def missing(results: dict[str, Any]) -> str:
    """What was not timed, and why."""
    reasons: dict[str, list[str]] = {}
    for one in results["weights"]:
        where = f"{shape_of(one)}, {format_of(one)}"
        if "impossible" in one:
            reasons.setdefault(f"all: {one['impossible']}", []).append(where)
        for name, reason in one.get("missing", {}).items():
            reasons.setdefault(f"{name}: {reason}", []).append(where)
    lines = []
    for reason, at in reasons.items():
        more = f"; and {len(at) - 2} more" if len(at) > 3 else ""
        lines.append(f"- {reason} ({'; '.join(at[:2] if more else at)}{more})")
    return "\n".join(["Not timed:", *lines]) if lines else ""


# ---- the other sections -----------------------------------------------------------


def load(results: dict[str, Any]) -> str:
    table = importlib.import_module("load").table
    parts = [
        table(title, one["file_bytes"], one["results"])
        for title, one in results["figures"].items()
    ]
    return "\n\n".join([*parts, *_notes(results)])


def quantize(results: dict[str, Any]) -> str:
    figures = results["figures"]
    ours = figures["seconds"]["affine_tensor"]
    rows = [[figures["title"], "ms", "/ ours"]]
    for name, taken in figures["seconds"].items():
        rows.append([name, f"{1e3 * taken:.1f}", f"{taken / ours:.2f}"])
    return "\n\n".join([markdown(rows), *_notes(results)])


def overhead(results: dict[str, Any]) -> str:
    figures = results["figures"]
    rows = [["µs per call, empty kernel", *next(iter(figures.values())), "added"]]
    for mode, seconds in figures.items():
        cells = [f"{1e6 * taken:.2f}" for taken in seconds.values()]
        rows.append([mode, *cells, f"{added(seconds):+.2f}"])
    return "\n\n".join([markdown(rows), *_notes(results)])


def added(seconds: dict[str, float]) -> float:
    """Microseconds that the tensor adds to its operator."""
    return 1e6 * (seconds["nn.Linear, packed"] - seconds["operator on buffers"])


def _notes(results: dict[str, Any]) -> list[str]:
    return ["\n".join(f"- {note}" for note in results["notes"])] * bool(
        results["notes"]
    )


TITLES = {
    "products": "Products",
    "models": "Whole models",
    "load": "Loading and converting",
    "quantize": "Quantizing",
    "overhead": "Overhead of a call",
}
TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "products": products,
    "models": peers_report.table,
    "load": load,
    "quantize": quantize,
    "overhead": overhead,
}
