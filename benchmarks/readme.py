"""Put the figures of benchmarks into the README, or see that they are there.

    python benchmarks/readme.py            # fails where the README says something else
    python benchmarks/readme.py --write

Every figure, name and version there comes from benchmarks/results: cpu.json, a run of
`cpu.py`, and, where they are, cuda.json and cuda_models.json, of `nvidia.py` and
`cuda_models.py`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_report import (
    added,
    format_of,
    head,
    markdown,
    named,
    peers,
    possible,
    rows_of,
    shape_of,
    short,
)
from peers_report import kinds_of

HERE = Path(__file__).resolve().parent
MARKERS = "<!-- cpu-table:begin -->", "<!-- cpu-table:end -->"
CUDA_MARKERS = "<!-- cuda-table:begin -->", "<!-- cuda-table:end -->"
CUDA_FILES = ("cuda.json", "cuda_models.json")
SECTIONS = ("products", "models", "quantize", "overhead", "load")
LOADERS = ("from_pretrained", "mlx-lm")
CONVERTERS = ("convert", "mlx-lm")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    beside = "of cpu.py; those of GPUs are looked for beside it"
    add("--json", type=Path, default=HERE / "results" / "cpu.json", help=beside)
    add("--readme", type=Path, default=HERE.parent / "README.md")
    add("--write", action="store_true", help="change the README")
    options = parser.parse_args(arguments)
    figures = json.loads(options.json.read_text(encoding="utf-8"))
    old = options.readme.read_text(encoding="utf-8")
    new = filled(old, text_of(figures), options.readme)
    on_gpu = [_figures(options.json.with_name(name)) for name in CUDA_FILES]
    if any(on_gpu):
        text = importlib.import_module("readme_cuda").text_of(*on_gpu)
        new = filled(new, text, options.readme, CUDA_MARKERS)
    if options.write:
        options.readme.write_text(new, encoding="utf-8")
    elif new != old:
        lines = difflib.unified_diff(
            old.splitlines(), new.splitlines(), "README", "figures", lineterm="", n=0
        )
        says = f"{options.readme} differs from {options.json}; use --write"
        raise SystemExit("\n".join([*lines, says]))


def _figures(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def filled(
    content: str, text: str, path: Path, markers: tuple[str, str] = MARKERS
) -> str:
    """The README with this text between its markers."""
    begin, end = markers
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    changed, count = pattern.subn(lambda _: f"{begin}\n{text}\n{end}", content)
    if count != 1:
        raise ValueError(
            f"{path} has the markers {begin} ... {end} {count} times; put them where "
            "the tables belong, once"
        )
    return changed


def text_of(figures: dict[str, Any]) -> str:
    """All tables for which there are figures, and what they were measured with."""
    there = {
        section: figures[section]
        for section in SECTIONS
        if section in figures and "failed" not in figures[section]
    }
    parts = []
    if "products" in there:
        parts += products(there["products"])
    if there.get("models", {}).get("results"):
        parts.append(models(there["models"]))
    rows = costs({s: r["figures"] for s, r in there.items() if "figures" in r})
    if rows:
        parts.append(markdown([("", "ours", "peers", "script"), *rows]))
    return "\n\n".join([*parts, head(figures)])


# ---- products -------------------------------------------------------------------


def products(results: dict[str, Any]) -> list[str]:
    """Over rows for the first format that has them, and one row for all widths."""
    weights = possible(results)
    several = [one for one in weights if len(one["roundings"]) > 1]
    alike = [one for one in several if format_of(one) == format_of(several[0])]
    single = [
        one
        for one in weights
        if "1" in one["roundings"]
        and format_of(one, bits=False) == format_of(weights[0], bits=False)
    ]
    parts = []
    if alike:
        parts.append(_over_rows(alike))
    if len({one["bits"] for one in single}) > 1:
        parts.append(_over_bits(single))
    return [*parts, _accuracy(weights)]


def _over_rows(weights: list[dict[str, Any]]) -> str:
    names = peers(weights)
    header = [f"{format_of(weights[0])}: rows of x"]
    for one in weights:
        header.append(f"{shape_of(one)}, ms")
        header += [f"{name} / ours" for name in names]
    lines = [header]
    for count in rows_of(weights[0]):
        line = [str(count)]
        for one in weights:
            found = named(one, count)
            line.append(_milliseconds(found.get("ours")))
            line += [_times(found.get(name)) for name in names]
        lines.append(line)
    return markdown(lines)


def _over_bits(weights: list[dict[str, Any]]) -> str:
    by_shape = {(shape_of(one), one["bits"]): named(one, 1) for one in weights}
    shapes = list(dict.fromkeys(map(shape_of, weights)))
    header = [f"One row, {format_of(weights[0], bits=False)}: bits"]
    for shape in shapes:
        header += [f"{shape}, ms", "of the read bandwidth", "dense / ours"]
    lines = [header]
    for bits in sorted({one["bits"] for one in weights}):
        line = [str(bits)]
        for shape in shapes:
            found = by_shape.get((shape, bits), {})
            mine = found.get("ours")
            share = f"{mine['share']:.0%}" if mine else ""
            line += [_milliseconds(mine), share, _times(found.get("dense"))]
        lines.append(line)
    return markdown(lines)


def _accuracy(weights: list[dict[str, Any]]) -> str:
    """What was compared, and our largest error."""
    worst = max(
        (
            result["error"] / one["roundings"][str(result["rows"])]
            for one in weights
            for result in one["results"]
            if result["name"] == "ours" and one["dtype"] != "float32"
        ),
        default=float("nan"),
    )
    least = min(one["read"] for one in weights) / 1e9
    most = max(one["read"] for one in weights) / 1e9
    there = {result["name"] for one in weights for result in one["results"]}
    absent = {
        f" Not timed: {name} ({reason})."
        for one in weights
        for name, reason in one["missing"].items()
        if name not in there or name == "ours"
    }
    return (
        "int4pack: torch's `_weight_int4pack_mm_for_cpu` on its repacked words; dense: "
        "`F.linear` with the dense weight; more than 1 is where ours is faster. Weights "
        f"come from memory, which was read at {least:.1f} to {most:.1f} GB/s meanwhile. "
        f"Our largest relative L2 error against float64 is {worst:.2f} times that of "
        "rounding the exact result once." + "".join(sorted(absent))
    )


def _milliseconds(one: dict[str, Any] | None) -> str:
    return short(1e3 * one["seconds"]) if one else ""


def _times(one: dict[str, Any] | None) -> str:
    return f"{one['of_ours']:.2f}" if one and "of_ours" in one else ""


# ---- whole models, and what else it costs -----------------------------------------


def models(results: dict[str, Any]) -> str:
    """Tokens a second, and ours over each."""
    rows = results["results"]
    kinds = kinds_of(rows)
    header = [f"{results['model']}: tokens/s"]
    for kind in kinds:
        header += [kind, "ours / it"]
    lines = [header]
    for one in rows:
        line = [one["label"]]
        for kind in kinds:
            ratio = one[kind].get("ours_over_it")
            once = " (timed once)" if one[kind]["once"] else ""
            speed = short(one[kind]["median"]) + once
            line += [speed, f"{ratio:.2f}" if ratio else ""]
        lines.append(line)
    settings = results["settings"]
    text = (
        f"Decoding: {settings['new']} tokens after a prompt of {settings['prompt']}. "
    )
    if results["reference"]:
        text += f'ours / it: "{results["reference"]}" over it. '
    absent = [f"{name} ({why})" for name, why in results["missing"].items()]
    text += f"Not measured: {'; '.join(absent)}." if absent else ""
    return f"{markdown(lines)}\n\n{text.strip()}"


def costs(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Quantizing, the overhead of a call, loading and converting."""
    rows = []
    if "quantize" in figures:
        rows.append(_quantizing(figures["quantize"]))
    if "overhead" in figures:
        rows.append(_overhead(figures["overhead"]))
    for title, one in figures.get("load", {}).items():
        rows += _loading(title, one["file_bytes"], one["results"])
    return rows


def _quantizing(figures: dict[str, Any]) -> tuple[str, str, str, str]:
    taken = {name: f"{short(1e3 * s)} ms" for name, s in figures["seconds"].items()}
    ours = taken.pop("affine_tensor")
    others = "; ".join(
        f"{name} {ms}" for name, ms in taken.items() if "affine" not in name
    )
    title = f"{figures['title']} (the same bits as MLX)"
    return title, ours, others, "`benchmarks/quantize.py`"


def _overhead(figures: dict[str, Any]) -> tuple[str, str, str, str]:
    more = sorted({f"{added(seconds):+.1f}" for seconds in figures.values()}, key=float)
    one = figures["inference_mode"]
    direct, plain = (
        f"{1e6 * one[name]:.3g} µs"
        for name in ("operator on buffers", "plain nn.Linear")
    )
    return (
        "call of an `nn.Linear` with a packed weight, above calling the operator on "
        "plain buffers, the kernel being empty",
        f"{' to '.join(more)} µs",
        f"(that call: {direct}; a plain `nn.Linear`, with its product: {plain})",
        "`benchmarks/overhead.py`",
    )


def _loading(
    title: str, size: int, results: dict[str, dict[str, float]]
) -> list[tuple[str, str, str, str]]:
    """Peak and time of one file, ours and mlx-lm's."""
    names = CONVERTERS if "converting" in title else LOADERS
    ours, theirs = (results.get(name) for name in names)
    if ours is None or "MetalConfig" in title:
        return []

    def row(what: str, key: str, unit: str, scale: float) -> tuple[str, str, str, str]:
        other = f"{names[1]} {theirs[key] / scale:.2f} {unit}" if theirs else ""
        mine = f"{ours[key] / scale:.2f} {unit}"
        return what, mine, other, "`benchmarks/load.py`"

    peak = f"{title}, {size / 1e9:.2f} GB: peak memory"
    return [
        row(peak, "peak", "x the file", size),
        row(f"{title}: time", "seconds", "s", 1.0),
    ]


if __name__ == "__main__":
    main()
