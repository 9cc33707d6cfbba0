"""What the README says of NVIDIA GPUs, made of the figures of a run alone."""

from __future__ import annotations

from typing import Any

import cuda_models_report
import cuda_report
import cuda_targets
from cpu_report import (
    format_of,
    markdown,
    named,
    possible,
    rows_of,
    shape_of,
    short,
)
from cuda_contestants import PEERS, WHAT
from cuda_machine import headline
from cuda_report import contestants, microseconds, times


def text_of(figures: dict[str, Any] | None, models: dict[str, Any] | None) -> str:
    """All tables for which there are figures, and what they were measured with."""
    parts = []
    if figures is not None:
        for section, write in (
            ("products", products),
            ("decode", decode),
            ("overhead", overhead),
        ):
            results = figures.get(section, {})
            if results and "failed" not in results:
                parts.append(write(results))
        parts.append(headline(figures))
    if models is not None and models["results"]:
        parts += [whole(models), headline(models)]
    return "\n\n".join(parts)


def products(results: dict[str, Any]) -> str:
    """The first format that was timed with several rows: its shapes side by side."""
    several = [
        one
        for one in possible(results)
        if len(one.get("roundings", {})) > 1 and one["results"]
    ]
    alike = [one for one in several if format_of(one) == format_of(several[0])]
    parts = []
    if alike:
        parts.append(_over_rows(alike))
    parts.append(_about(results, alike))
    return "\n\n".join(parts)


def _over_rows(weights: list[dict[str, Any]]) -> str:
    names = [name for name in contestants(weights) if name != "ours"]
    header = [f"{format_of(weights[0])}: rows of x"]
    for one in weights:
        header.append(f"{shape_of(one)}, µs")
        header += [f"{name} / ours" for name in names]
    lines = [header]
    for rows in sorted({rows for one in weights for rows in rows_of(one)}):
        line = [str(rows)]
        for one in weights:
            found = named(one, rows)
            line.append(microseconds(found.get("ours")))
            line += [times(found.get(name)) for name in names]
        lines.append(line)
    return markdown(lines)


def _about(results: dict[str, Any], weights: list[dict[str, Any]]) -> str:
    """How it was measured, our largest error, and the targets."""
    worst = max(
        (
            result["error"] / one["roundings"][str(result["rows"])]
            for one in possible(results)
            for result in one.get("results", [])
            if result["name"] == "ours" and one["dtype"] != "float32"
        ),
        default=float("nan"),
    )
    names = [name for name in contestants(weights) if name != "ours"]
    what = "; ".join(f"{name}: {WHAT[name]}" for name in names)
    absent = sorted(
        {
            f"{name} ({reason})"
            for one in possible(results)
            for name, reason in one.get("missing", {}).items()
            if name in PEERS and name not in names
        }
    )
    text = (
        f"{what}; more than 1 is where ours is faster. Launches in CUDA graphs, gaps "
        f"included, weights from memory and not from L2. {_abilities(results)} Our "
        f"largest relative L2 error against float64 is {worst:.2f} times that of "
        f"rounding the exact result once."
    )
    text += f" Not timed: {'; '.join(absent)}." if absent else ""
    table = cuda_report.target_table(
        one for one in possible(results) if one.get("results")
    )
    return f"{text}\n\n{table}" if table else text


def _abilities(results: dict[str, Any]) -> str:
    limits = results["limits"]
    rates = ", ".join(
        f"{rate / 1e12:.0f} TFLOP/s in {name}" for name, rate in limits["rates"].items()
    )
    return (
        f"The GPU copies {limits['bandwidth'] / 1e12:.2f} TB/s (read and written), large "
        f"dense products reach {rates}, and a kernel that does nothing takes "
        f"{1e6 * limits['launch']:.2f} µs in such a graph."
    )


def decode(results: dict[str, Any]) -> str:
    """One token's products."""
    lines = [
        ["The products of one token of an 8B Llama, in one CUDA graph", "µs", "/ ours"]
    ]
    if not results["is_8b"]:
        lines[0][0] = f"The products of one token, {results['shapes']['layers']} layers"
    for one in results["results"]:
        what = f"{one['name']}, {one['linears']} products ({one['how']})"
        lines.append([what, microseconds(one), times(one)])
    found = "; ".join(
        f"{one.what}: {short(one.measured)} of {one.wanted} ({one.word})"
        for one in cuda_targets.of_decoding(results)
    )
    return f"{markdown(lines)}\n\nWanted: {found}." if found else markdown(lines)


def overhead(results: dict[str, Any]) -> str:
    said = []
    for mode, seconds in results["modes"].items():
        ours, plain = seconds["nn.Linear, packed"], seconds["torch.mm"]
        dense = seconds["nn.Linear, dense"]
        said.append(
            f"{1e6 * ours:.1f} µs under `{mode}` ({ours / plain:.2f} times `torch.mm`, "
            f"{ours / dense:.2f} times a dense `nn.Linear`)"
        )
    what = "The host's time of a call of an `nn.Linear` with a packed weight"
    return f"{what}: {'; '.join(said)}."


def whole(models: dict[str, Any]) -> str:
    """Tokens a second and memory of whole models."""
    results = models["results"]
    parts = [
        cuda_models_report.head(models),
        cuda_models_report.speeds(results),
        _memory(results),
    ]
    if models.get("reference"):
        parts[-1] += f' ours / it: "{models["reference"]}" over it.'
    left = cuda_models_report.absent(models)
    parts[-1] += f" Not measured: {'; '.join(left)}." if left else ""
    return "\n\n".join(parts)


def _memory(results: list[dict[str, Any]]) -> str:
    said = [
        f"{one['label']} {one['held_bytes'] / 1e9:.2f} (at the most "
        f"{max(filter(None, one['peaks'].values()), default=0) / 1e9:.2f})"
        for one in results
        if one["held_bytes"] is not None
    ]
    return f"GB of weights on the GPU: {', '.join(said)}." if said else ""
