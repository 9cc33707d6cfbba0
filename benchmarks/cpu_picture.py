"""The picture of `cpu.py`: bandwidth, time over rows, tokens a second."""

from __future__ import annotations

from typing import Any

from cpu_report import format_of, peers, possible, rows_of, shape_of, short
from peers_report import kinds_of

OURS, THEIRS = "#4878a8", "#a8b4c0"
COLORS = {"ours": OURS, "int4pack": "#d1894b", "dense": "#6a9f58", "mlx": "#b55d60"}


def draw(path: str, figures: dict[str, Any]) -> None:
    """A line of panels for products, one for whole models; those that there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = []
    products, models = figures.get("products", {}), figures.get("models", {})
    if products.get("weights"):
        lines.append(_product_panels(products))
    if models.get("results"):
        lines.append(_model_panels(models["results"]))
    lines = [line for line in lines if line]
    if not lines:
        return
    widest = max(map(len, lines))
    figure = pyplot.figure(figsize=(3.6 * widest, 3.2 * len(lines)), layout="tight")
    for at, line in enumerate(lines):
        for place, panel in enumerate(line):
            axes = figure.add_subplot(len(lines), len(line), at * len(line) + place + 1)
            panel(axes)
            axes.spines[["top", "right"]].set_visible(False)
    machine = figures["machine"]
    title = f"{machine['cpu']}, {machine['threads']} threads, {figures['date']}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _product_panels(results: dict[str, Any]) -> list[Any]:
    weights = possible(results)
    first = format_of(weights[0], bits=False) if weights else ""
    alike = [one for one in weights if format_of(one, bits=False) == first]
    panels: list[Any] = [lambda axes: _shares(axes, alike, first)]
    for one in weights:
        if len(one["roundings"]) > 1 and len(panels) < 5:
            panels.append(lambda axes, one=one: _over_rows(axes, one))
    return panels if weights else []


def _shares(axes: Any, weights: list[dict[str, Any]], name: str) -> None:
    """Bars: how much of the bandwidth one row takes, for each width."""
    shapes = list(dict.fromkeys(map(shape_of, weights)))
    widths = sorted({one["bits"] for one in weights})
    for at, shape in enumerate(shapes):
        found = {
            one["bits"]: result["share"]
            for one in weights
            for result in one["results"]
            if shape_of(one) == shape
            and result["name"] == "ours"
            and result["rows"] == 1
        }
        step = 0.8 / len(shapes)
        places = [widths.index(bits) - 0.4 + step * (at + 0.5) for bits in found]
        axes.bar(places, [100 * share for share in found.values()], step, label=shape)
    axes.set_xticks(range(len(widths)), widths)
    axes.axhline(100, color="gray", linewidth=0.8)
    axes.set_xlabel("bits")
    axes.set_title(f"one row, {name}:\n% of the read bandwidth", fontsize=8)
    axes.legend(frameon=False, fontsize=7)


def _over_rows(axes: Any, weight: dict[str, Any]) -> None:
    """Lines: milliseconds of each contestant over the rows of x."""
    for name in ["ours", *peers([weight])]:
        own = sorted(
            (r["rows"], 1e3 * r["seconds"])
            for r in weight["results"]
            if r["name"] == name
        )
        if own:
            style = {"marker": "o", "markersize": 3, "color": COLORS[name]}
            axes.plot(*zip(*own, strict=True), label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(rows_of(weight), rows_of(weight), fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("rows of x")
    title = f"{shape_of(weight)}, {format_of(weight)}:\nmilliseconds"
    axes.set_title(title, fontsize=8)
    axes.legend(frameon=False, fontsize=7)


def _model_panels(results: list[dict[str, Any]]) -> list[Any]:
    return [
        lambda axes, kind=kind: _speeds(axes, results, kind)
        for kind in kinds_of(results)
    ]


def _speeds(axes: Any, results: list[dict[str, Any]], kind: str) -> None:
    """Bars: tokens a second of each contestant."""
    labels = [one["label"] for one in results][::-1]
    values = [one[kind]["median"] for one in results][::-1]
    colors = [OURS if label.startswith("ours") else THEIRS for label in labels]
    drawn = axes.barh(labels, values, color=colors)
    axes.bar_label(drawn, fmt=short, padding=3, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.2)
    axes.set_title(f"{kind}: tokens/s", fontsize=8)
