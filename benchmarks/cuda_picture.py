"""The picture of `nvidia.py`: time over rows for each shape, and one token's products."""

from __future__ import annotations

from typing import Any

from cpu_report import format_of, possible, rows_of, shape_of, short
from cuda_report import contestants

COLORS = {
    "ours": "#4878a8",
    "dense": "#6a9f58",
    "tinygemm": "#d1894b",
    "gemlite": "#b55d60",
    "bitsandbytes": "#857aab",
    "mlx": "#8c8c8c",
}
MOST = 8  # panels of shapes


def draw(path: str, figures: dict[str, Any]) -> None:
    """A panel for each weight with several rows, one for a token; what there is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    products, decode = figures.get("products", {}), figures.get("decode", {})
    weights = [
        one
        for one in possible({"weights": products.get("weights", [])})
        if len(one.get("roundings", {})) > 1 and one["results"]
    ][:MOST]
    panels: list[Any] = [lambda axes, one=one: _over_rows(axes, one) for one in weights]
    if decode.get("results"):
        panels.append(lambda axes: _tokens(axes, decode["results"]))
    if not panels:
        return
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    figure = pyplot.figure(figsize=(3.6 * columns, 3.2 * lines), layout="tight")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{figures['machine']['gpu']}, {figures['date']}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _over_rows(axes: Any, weight: dict[str, Any]) -> None:
    """Lines: microseconds of each contestant over the rows of x, and the floor."""
    counts = rows_of(weight)
    floors = [1e6 * weight["floors"][str(rows)] for rows in counts]
    axes.plot(counts, floors, color="black", linewidth=0.8, label="floor")
    for name in contestants([weight]):
        own = sorted(
            (one["rows"], 1e6 * one["seconds"])
            for one in weight["results"]
            if one["name"] == name
        )
        style = {"marker": "o", "markersize": 3, "color": COLORS[name]}
        axes.plot(*zip(*own, strict=True), label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, counts, fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("rows of x")
    title = f"{shape_of(weight)}, {format_of(weight)}:\nmicroseconds"
    axes.set_title(title, fontsize=8)
    axes.legend(frameon=False, fontsize=7)


def _tokens(axes: Any, results: list[dict[str, Any]]) -> None:
    """Bars: microseconds of a token's products."""
    labels = [f"{one['name']}, {one['how']}" for one in results][::-1]
    values = [1e6 * one["seconds"] for one in results][::-1]
    colors = [COLORS[one["name"]] for one in results][::-1]
    drawn = axes.barh(labels, values, color=colors)
    axes.bar_label(drawn, fmt=short, padding=3, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.2)
    axes.set_title("one token's products: microseconds", fontsize=8)
