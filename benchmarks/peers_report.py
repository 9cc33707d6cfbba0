"""What `models.py` writes: text, table and picture of what it measured."""

from __future__ import annotations

from typing import Any


def about(found: dict[str, Any]) -> str:
    """On what machine, with which versions."""
    machine, versions = found["machine"], {}
    for one in found["results"]:
        versions |= one["versions"]
    versions = {"Python": machine["python"], **dict(sorted(versions.items()))}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])}), "
        f"{machine['system']}; {listed}"
    )


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown, with what they mean and who is not there."""
    results = found["results"]
    parts = [_head(found)]
    if results:
        kinds = kinds_of(results)
        header = [""]
        for kind in kinds:
            header += [f"{kind}, tokens/s", "ours / it"]
        header += ["error", "load s", "load peak GB"]
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        lines += [_line(one, kinds) for one in results]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts.append(_foot(found, kinds))
    return "\n\n".join(parts)


def _head(found: dict[str, Any]) -> str:
    settings, notes = found["settings"], {}
    for one in found["results"]:
        if one["notes"]:
            notes[one["notes"]] = None
    lines = [
        f"{found['model']}. Decoding: {settings['new']} tokens after a prompt of "
        f"{settings['prompt']}. Medians of {settings['rounds']} rounds (least to most), "
        f"{settings['threads']} threads each.",
        *(f"- {note}" for note in notes),
        *(f"- not measured: {name}: {why}" for name, why in found["missing"].items()),
    ]
    return "\n".join(lines)


def _line(one: dict[str, Any], kinds: list[str]) -> list[str]:
    line = [one["label"]]
    for kind in kinds:
        ratio = one[kind].get("ours_over_it")
        line += [_speed(one[kind]), "" if ratio is None else f"{ratio:.2f}"]
    peak = one["load_peak_bytes"]
    line += [f"{one['error']:.1e}", f"{one['load_seconds']:.1f}"]
    return [*line, "" if peak is None else f"{peak / 1e9:.2f}"]


def kinds_of(results: list[dict[str, Any]]) -> list[str]:
    """What was measured of each: "decode", "prefill 128" ..."""
    return [
        kind
        for kind, value in results[0].items()
        if isinstance(value, dict) and "median" in value
    ]


def _speed(speed: dict[str, Any]) -> str:
    if speed["once"]:
        return f"{_short(speed['median'])} *"
    ends = f"{_short(speed['least'])} to {_short(speed['most'])}"
    return f"{_short(speed['median'])} ({ends})"


def _short(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 1 else 2
    return f"{value:.{digits}f}"


def _foot(found: dict[str, Any], kinds: list[str]) -> str:
    text = (
        "error: relative L2 of the logits against float64 with the contestant's own "
        "weights. load peak: resident memory above what the process had before (torchao "
        "quantizes a dense model, and that is in it; transformers maps a dense file, and "
        "has not read it yet)."
    )
    if found["reference"]:
        text = (
            f'ours / it: "{found["reference"]}" over it, more than 1 is where ours is '
            f"faster. {text}"
        )
    if any(one[kind]["once"] for one in found["results"] for kind in kinds):
        prompt, new = found["settings"]["trial"]
        text += f" \\*: too slow; timed once, {new} tokens after a prompt of {prompt}."
    return text


def draw(path: str | None, found: dict[str, Any]) -> None:
    """Bars, a panel for each measurement, if a path was given."""
    results = found["results"]
    if not path or not results:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = kinds_of(results)
    size = (3 + 2.6 * len(kinds), 0.9 + 0.3 * len(results))
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=size, sharey=True, squeeze=False
    )
    labels = [one["label"] for one in results][::-1]
    colors = ["#4878a8" if name.startswith("ours") else "#a8b4c0" for name in labels]
    for axes, kind in zip(panels[0], kinds, strict=True):
        values = [one[kind]["median"] for one in results][::-1]
        bars = axes.barh(labels, values, color=colors)
        axes.bar_label(bars, [_short(v) for v in values], padding=3, fontsize=8)
        axes.margins(x=0.2)
        axes.tick_params(labelsize=8)
        axes.set_title(f"{kind}, tokens/s", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found['model']}; {found['machine']['cpu']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
