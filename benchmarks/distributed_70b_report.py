"""The table of `distributed_70b.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import cuda_machine
from cpu_report import markdown

LABELS = {"one": "one device", "auto": 'device_map="auto"'}


def report(figures: dict[str, Any]) -> str:
    results = figures["results"]
    timed = [name for one in results for name in _first(one).get("speeds", {})]
    speeds = list(dict.fromkeys(timed))
    lines = [
        [
            "tokens/s",
            *("processes", "devices", *speeds, "load s", "first load s"),
            *("GB held", "at the most", "GB read", "difference"),
        ]
    ]
    lines += [_line(one, speeds) for one in results]
    notes = [one["failed"] for one in results if one["failed"]]
    notes += figures["missing"].values()
    text = f"# 70B on several devices\n\n{cuda_machine.headline(figures)}\n\n"
    return text + _what(figures) + markdown(lines) + "\n" + _list(notes)


def _what(figures: dict[str, Any]) -> str:
    prompt, new = figures["given"]
    gpus = f"{figures['gpus']} GPUs are there. " if "gpus" in figures else ""
    return (
        f"{figures['model']}; an MLX checkpoint of {figures['file_bytes'] / 1e9:.2f} GB, "
        f"4 bits, group 64, made in {figures['made_seconds']:.0f} s. {gpus}By stock "
        'transformers: tp2, tp4: `tp_plan="auto"` on so many processes. Difference: of '
        f"float32 logits from those of {_label(figures['reference'])}, relative, the "
        f"larger of maximum and norm, of {prompt + new} tokens read at once and of {new} "
        f"after {prompt}, one by one with a static cache; {figures['limit']:.0e} is "
        "allowed. All else in bfloat16. Decoding: batch 1, greedily, a static cache, "
        f"{figures['new'] - 1} steps after a prompt of {figures['prompt']}; medians of "
        f"{figures['rounds']} rounds. Load: the slowest process; the first load (in "
        "float32) may have come from the disk. GB: of a device, after the load and at the "
        "most while prompts and decoding were timed (on a CPU: of a process, and above "
        "what it held before the load, then and at the most during the load). Read: from "
        "files by a process during a load.\n\n"
    )


def _label(name: str | None) -> str:
    return "none" if name is None else LABELS.get(name, name)


def _first(one: dict[str, Any]) -> dict[str, Any]:
    return next(iter(one["processes"]), {})


def _line(one: dict[str, Any], speeds: list[str]) -> list[str]:
    ranks, first = one["processes"], _first(one)
    line = [_label(one["name"]), str(len(ranks))]
    places = [place for rank in ranks for place in _load(rank).get("devices", {})]
    line.append(str(len(places)) if places else "")
    for what in speeds:
        taken = first.get("speeds", {}).get(what)
        line.append(f"{statistics.median(taken):.4g}" if taken else "")
    for dtype in ("bfloat16", "float32"):
        seconds = [own["seconds"] for own in (_load(r, dtype) for r in ranks) if own]
        line.append(f"{max(seconds):.1f}" if seconds else "")
    line += [_range(h for rank in ranks for h in _held(rank))]
    line += [_range(p for rank in ranks for p in _peak(rank))]
    line += [_range(_load(r)["bytes_read"] for r in ranks if "bytes_read" in _load(r))]
    apart = [
        value
        for rank in ranks
        for own in rank["differences"].values()
        for value in own.values()
    ]
    # What is no number is more than any.
    worst = max(apart, key=lambda value: (value != value, value), default=None)
    return [*line, "" if worst is None else f"{worst:.1e}"]


def _load(rank: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    loads: dict[str, dict[str, Any]] = rank["loads"]
    return loads.get(dtype, {})


def _held(rank: dict[str, Any]) -> list[int]:
    own = _load(rank)
    if own.get("held") or "resident_before" not in own:
        return list(own.get("held", []))
    return [own["resident"] - own["resident_before"]]


def _peak(rank: dict[str, Any]) -> list[int]:
    own = _load(rank)
    if own.get("held") or "resident_before" not in own:
        return list(rank.get("work", {}).get("peak", []))
    return [own["resident_peak"] - own["resident_before"]]


def _range(sizes: Iterable[int]) -> str:
    """In GB, of all devices or processes."""
    texts = [f"{size / 1e9:.2f}" for size in sorted(sizes)]
    if not texts:
        return ""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _list(notes: list[str]) -> str:
    return "\n" + "".join(f"- {note}\n" for note in notes) if notes else ""
