"""What `cuda_models.py` writes: text, table and picture of what it measured."""

from __future__ import annotations

from typing import Any

from cpu_report import markdown
from cuda_machine import headline

# How those differ that do not decode as the others do, or load the file otherwise.
PEERS = {
    "torchao": " torchao: `quantize_`, then the file's codes in its tensors.",
    "mlx-lm": (
        " mlx-lm: its own loops (`generate_step`, `BatchGenerator`), and memory as MLX "
        "counts it."
    ),
}
OURS, THEIRS = "#4878a8", "#a8b4c0"


def report(figures: dict[str, Any]) -> str:
    """All of it: what was measured, speeds, memory, and what is missing."""
    results = figures["results"]
    parts = [f"# A whole model on an NVIDIA GPU\n\n{headline(figures)}", head(figures)]
    if results:
        parts += [
            f"Tokens a second\n\n{speeds(results)}",
            f"Memory and accuracy\n\n{memory(results)}",
            foot(figures),
        ]
    left = absent(figures)
    if left:
        parts.append("\n".join(["Not measured:", *(f"- {line}" for line in left)]))
    return "\n\n".join(parts)


def head(figures: dict[str, Any]) -> str:
    settings = figures["settings"]
    text = (
        f"{figures['model']}; an MLX checkpoint of {figures['file_bytes'] / 1e9:.2f} GB, "
        f"4 bits, group 64. Decoding: {settings['new'] - 1} steps after a prompt of "
        f"{settings['prompt']}, greedily, a static cache, a CUDA graph of one step, all "
        f"sequences of the batch together. Medians of {settings['rounds']} rounds."
    )
    there = {one["name"] for one in figures["results"]}
    text += "".join(said for name, said in PEERS.items() if name in there)
    made = figures.get("made")
    if made:
        each = ", ".join(f"{what} in {s:.1f} s" for what, s in made.items())
        text += f" The checkpoint was {each}."
    return text


def kinds_of(results: list[dict[str, Any]]) -> list[str]:
    """What was measured of any, in order."""
    return list(dict.fromkeys(what for one in results for what in one["speeds"]))


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speeds(results: list[dict[str, Any]]) -> str:
    kinds = kinds_of(results)
    header = [""]
    for what in kinds:
        header += [what, "ours / it"]
    lines = [header]
    for one in results:
        line = [one["label"]]
        for what in kinds:
            own = one["speeds"].get(what)
            ratio = own.get("ours_over_it") if own else None
            line += [
                short(own["median"]) if own else "",
                f"{ratio:.2f}" if ratio else "",
            ]
        lines.append(line)
    return markdown(lines)


def memory(results: list[dict[str, Any]]) -> str:
    kinds = kinds_of(results)
    lines = [["GB", "weights", "load, peak", *kinds, "load s", "error"]]
    for one in results:
        line = [one["label"], _gigabytes(one["held_bytes"])]
        line.append(_gigabytes(one["load_peak_bytes"]))
        line += [_gigabytes(one["peaks"].get(what)) for what in kinds]
        line.append(f"{one['load_seconds']:.1f}")
        worst = max(one["errors"].values(), default=None)
        line.append("" if worst is None else f"{worst:.1e}")
        lines.append(line)
    return markdown(lines)


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def foot(figures: dict[str, Any]) -> str:
    text = (
        "GB: tensors on the GPU at the most, weights included. error: the worst relative "
        "L2 of the logits, over batches, against float64 with the weights of the file "
        "(bfloat16's own rounding is most of it). Loading a contestant other than ours "
        "is loading ours and converting."
    )
    if figures.get("reference"):
        text = (
            f'ours / it: "{figures["reference"]}" over it, more than 1 is where ours is '
            f"faster. {text}"
        )
    return text


def absent(figures: dict[str, Any]) -> list[str]:
    """Who is not there, and what of those who are; each with the reason."""
    found = [f"{name}: {why}" for name, why in figures["missing"].items()]
    for one in figures["results"]:
        found += [f"{one['label']}, {note}" for note in one["notes"]]
    return found


def draw(path: str, figures: dict[str, Any]) -> None:
    """Bars, a panel for each measurement."""
    results = figures["results"]
    kinds = kinds_of(results)
    if not kinds:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    size = (3.6 * columns, lines * (1.1 + 0.3 * len(results)))
    figure = pyplot.figure(figsize=size, layout="tight")
    for place, what in enumerate(kinds, 1):
        axes = figure.add_subplot(lines, columns, place)
        own = [one for one in results if what in one["speeds"]][::-1]
        values = [one["speeds"][what]["median"] for one in own]
        labels = [one["label"] for one in own]
        colors = [OURS if label.startswith("ours") else THEIRS for label in labels]
        drawn = axes.barh(labels, values, color=colors)
        axes.bar_label(drawn, fmt=short, padding=3, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.25)
        axes.set_title(f"{what}: tokens/s", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{figures['model']}; {figures['machine']['gpu']}, {figures['date']}"
    figure.suptitle(title, fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
