"""Products with packed weights on a Mac: ours, MLX's and the Hub kernel's in one run.

    python benchmarks/metal.py [--markdown metal.md --png metal.png]
    python benchmarks/metal.py --model FOLDER   (tokens a second of a checkpoint, too)

Decoding (one row), small batches and prompts, for weights of real models. GB/s are bytes
of packed weights, scales and biases over time, which is what decoding is limited by; the
share is that of the chip's bandwidth as Apple gives it. Weights are used in turn, from
copies that together are larger than caches. All contestants are checked first, and then
timed alternately.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import save, side_by_side
from metal_contestants import (
    Block,
    Format,
    Size,
    Weights,
    bandwidth_of,
    device_of_mlx,
    our_settings,
)
from metal_decode import decode

from affine_tensor import layout
from affine_tensor.kernels import machine
from affine_tensor.kernels.metal import tuning

SIZES = {
    "models": (
        Size("Llama 3.2 1B, up", 8192, 2048),
        Size("Llama 3.1 8B, k", 1024, 4096),
        Size("Llama 3.1 8B, q", 4096, 4096),
        Size("Llama 3.1 8B, up", 14336, 4096),
        Size("Llama 3.1 8B, down", 4096, 14336),
    ),
    # To see that it works.
    "tiny": (Size("", 64, 256), Size("", 96, 512)),
}
ROWS = {
    "models": (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 48, 128, 512, 2048),
    "tiny": (1, 2, 9),
}
CACHES = {"models": 256 << 20, "tiny": 0}  # copies of a weight are larger
SECONDS = {"models": 10e-3, "tiny": 0.0}  # of what is timed at once
ROUNDS = {"models": 9, "tiny": 1}
DTYPES = {layout.name_of(dtype): dtype for dtype in layout.WEIGHT_DTYPES}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    kind = options.device or machine.default_kind()
    if not machine.is_available(kind):
        raise SystemExit(f"there is no {kind} device here")
    format = Format(options.bits, options.group_size, DTYPES[options.dtype])
    rows = options.rows or ROWS[options.sizes]
    results = []
    for size in SIZES[options.sizes]:
        weights = Weights(size, format, kind, CACHES[options.sizes])
        results += measure(weights, rows, options.sizes)
        del weights
        machine.empty_cache(kind)
    first = head(kind, format, results)
    text = f"{first}\n{table(results, kind)}\n"
    speeds = None
    if options.decode or options.model:
        speeds = decode(options.model, kind, format, tiny=options.sizes == "tiny")
        text += "\n" + table_of_decoding(speeds, options.model) + "\n"
    print(text, end="")
    if options.markdown:
        Path(options.markdown).write_text(text, encoding="utf-8")
    draw(options.png, f"{machine.banner()}{machine.name_of(kind)}, {format}", results)
    save(options.json, {"head": first, "products": results, "decode": speeds})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", choices=SIZES, default="models", help="of the weights")
    add("--rows", type=int, nargs="+", help="of x (default: 1 to 2048)")
    add("--bits", type=int, choices=layout.BITS, default=4)
    add("--group-size", type=int, choices=layout.GROUP_SIZES, default=64)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--device", choices=machine.KINDS, help="default: the accelerator there is")
    add("--no-decode", dest="decode", action="store_false", help="products only")
    add("--model", help="an MLX checkpoint to decode with (default: a random one)")
    add("--markdown", help="write the tables there")
    add("--png", help="draw them there")
    add("--json", help="write the figures there")
    return parser


def measure(weights: Weights, rows: Sequence[int], sizes: str) -> list[dict[str, Any]]:
    """Milliseconds of each contestant for each number of rows."""
    contestants = dict(weights.contestants())
    found = []
    for count in rows:
        calls = {n: _calls(block, count, sizes) for n, block in contestants.items()}
        seconds = side_by_side(
            {
                name: lambda block=block, n=calls[name], m=count: block(m, n)
                for name, block in contestants.items()
            },
            rounds=ROUNDS[sizes],
        )
        found.append(
            {
                "weight": str(weights.size),
                "bytes": weights.bytes,
                "rows": count,
                "kernel": weights.kernel(count),
                "seconds": {name: s / calls[name] for name, s in seconds.items()},
            }
        )
    return found


def _calls(block: Block, rows: int, sizes: str) -> int:
    """How many calls take long enough to be timed."""
    block(rows, 1)
    start = time.perf_counter()
    block(rows, 1)
    taken = time.perf_counter() - start
    return max(1, min(64, int(SECONDS[sizes] / taken)))


# ---- what is written ------------------------------------------------------------


def head(kind: str, format: Format, results: list[dict[str, Any]]) -> str:
    """What was timed, and on what."""
    lines = [
        f"Products with packed weights, {format}.",
        f"- {our_settings(kind)}; torch {torch.__version__}, {machine.system()}",
        f"- {device_of_mlx()}",
    ]
    if "hub" not in results[0]["seconds"]:
        lines.append("- the Hub kernel is not available here; the log says why")
    return machine.banner() + "\n".join(lines) + "\n"


def table(results: list[dict[str, Any]], kind: str) -> str:
    """A markdown table; our kernel is named where it changes."""
    names = list(results[0]["seconds"])
    others = [name for name in names if name != "ours"]
    peak = bandwidth_of(tuning.chip()) if kind == "mps" else None
    header = ["weight", "rows", "our kernel, from here on"]
    for name in names:
        header += [f"{name} ms", f"{name} GB/s"] + (["share"] if peak else [])
    header += [f"{name} / ours" for name in others]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for weight, group in itertools.groupby(results, lambda one: one["weight"]):
        kernel = ""
        for i, one in enumerate(group):
            changed = one["kernel"] != kernel
            kernel = one["kernel"]
            line = ["" if i else weight, str(one["rows"]), kernel if changed else ""]
            for name in names:
                seconds = one["seconds"][name]
                speed = one["bytes"] / seconds / 1e9
                line += [f"{1e3 * seconds:.3f}", f"{speed:.1f}"]
                line += [f"{speed / peak:.0%}"] if peak else []
            ours = one["seconds"]["ours"]
            line += [f"{one['seconds'][name] / ours:.2f}" for name in others]
            lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of_decoding(speeds: dict[str, float], model: str | None) -> str:
    what = model or "a small random Llama"
    lines = [f"| decoding, {what} | tokens/s |", "| --- | ---: |"]
    lines += [f"| {name} | {speed:.1f} |" for name, speed in speeds.items()]
    return "\n".join(lines)


def draw(path: str | None, title: str, results: list[dict[str, Any]]) -> None:
    """GB/s over rows, a panel for each weight, if a path was given."""
    if not path:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [
        (weight, list(group))
        for weight, group in itertools.groupby(results, lambda one: one["weight"])
    ]
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(3.4 * len(groups), 3.2), sharey=True, squeeze=False
    )
    for axes, (weight, group) in zip(panels[0], groups, strict=True):
        rows = [one["rows"] for one in group]
        for name in group[0]["seconds"]:
            speeds = [one["bytes"] / one["seconds"][name] / 1e9 for one in group]
            axes.plot(rows, speeds, marker="o", markersize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_yscale("log")
        axes.set_title(weight, fontsize=8)
        axes.set_xlabel("rows of x")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("GB/s of weights")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
