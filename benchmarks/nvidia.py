"""Everything that is measured on an NVIDIA GPU, ours and the peers in one run.

    python benchmarks/nvidia.py [--json cuda.json --markdown cuda.md --png cuda.png]
    python benchmarks/nvidia.py --shapes 4097x4224 --m 3 7 24 200 --bits 2 3 --groups 32
    python benchmarks/nvidia.py --only decode overhead --time-limit 120

Products with packed weights, one token's products of a Llama with 8 billion weights, and
the host's time of a call. Launches are captured in CUDA graphs and replayed in turn; each
result is first compared with float64, where NaN stood before. Whole models are in
`cuda_models.py`. Peers that are not there are named.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import itertools
import math
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cuda_decode
import cuda_machine
import cuda_overhead
import cuda_products
import cuda_report
import torch
from common import save
from cpu_products import DTYPES
from cpu_report import format_of
from cuda_contestants import MAKERS
from cuda_products import Setting

from affine_tensor import layout


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _options(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here, or torch does not see it")
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/nvidia.py", *given]),
        "date": datetime.date.today().isoformat(),
        "machine": cuda_machine.machine(options.device),
        "versions": cuda_machine.versions(),
    }
    limit = options.time_limit or math.inf
    setting = Setting(
        options.device,
        options.sizes,
        options.rounds,
        ["ours", *(name for name in options.peers if name != "ours")],
        time.monotonic() + limit,
        _say,
        lambda: _write(options, figures),
    )
    # What takes least comes first, should the time not do for all.
    for section in sorted(options.only, key=list(SECTIONS).index):
        run_section(section, options, setting, figures)
        text = cuda_report.section_text(section, figures[section])
        print(f"\n{cuda_report.TITLES[section]}\n\n{text}\n", flush=True)
        setting.keep()
    print(cuda_machine.headline(figures))
    if options.png:
        importlib.import_module("cuda_picture").draw(options.png, figures)
    wrong = problems(figures)
    if wrong:
        raise SystemExit("\n".join(wrong))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """What there is so far: the machine may be gone before the end."""
    save(options.json, figures)
    if options.markdown:
        text = cuda_report.report(figures)
        Path(options.markdown).write_text(text, encoding="utf-8")


def shape(text: str) -> tuple[int, int]:
    """``"4096x14336"`` as N and K."""
    n, _, k = text.lower().partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not NxK, such as 4096x14336")
    return int(n), int(k)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--sizes", choices=cuda_products.SHAPES, default="models")
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="of weights")
    add("--m", type=int, nargs="+", help="rows of x (default: 1 to 2048)")
    add("--bits", type=int, nargs="+", choices=layout.BITS, default=[4])
    add("--groups", type=int, nargs="+", choices=layout.GROUP_SIZES, default=[64])
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    add("--peers", nargs="*", choices=MAKERS, default=list(MAKERS))
    add("--rounds", type=int, default=9)
    add("--time-limit", type=float, metavar="S", help="seconds; the rest is left out")
    add("--json", help="write the figures there")
    add("--markdown", help="write the tables there")
    add("--png", help="draw them there")
    # To see here that it works: times mean nothing there.
    add("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # Better now than after minutes.
    if options.png and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib: pip install matplotlib")
    for path in filter(None, (options.json, options.markdown, options.png)):
        if not Path(path).resolve().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    if min(itertools.chain([options.rounds], options.m or [])) < 1:
        parser.error("rows and rounds are positive")
    return options


# ---- sections -------------------------------------------------------------------


def run_section(
    section: str,
    options: argparse.Namespace,
    setting: Setting,
    figures: dict[str, Any],
) -> None:
    """Its figures, and why some are missing: one that fails does not spoil the others."""
    found = figures[section] = {}
    if setting.late:
        found["failed"] = "the time limit was reached"
        return
    start = time.perf_counter()
    try:
        SECTIONS[section](options, setting, found)
    except Exception as error:
        traceback.print_exc()
        found["failed"] = f"{type(error).__name__}: {error}"
    _say(f"{section}: {time.perf_counter() - start:.1f} s")


def overhead(
    options: argparse.Namespace, setting: Setting, found: dict[str, Any]
) -> None:
    cuda_overhead.measure(setting, found)


def decode(
    options: argparse.Namespace, setting: Setting, found: dict[str, Any]
) -> None:
    cuda_decode.measure(setting, cuda_decode.SHAPES[options.sizes], found)


SECTIONS: dict[str, Callable[[argparse.Namespace, Setting, dict[str, Any]], None]] = {
    "overhead": overhead,
    "decode": decode,
    "products": cuda_products.measure,
}


def problems(figures: dict[str, Any]) -> list[str]:
    """Sections that failed, and products of ours that are wrong or not there."""
    found = []
    for section in SECTIONS:
        results = figures.get(section, {})
        if "failed" in results:
            found.append(f"{section}: {results['failed']}")
        for name, reason in results.get("missing", {}).items():
            if name.startswith("ours"):
                found.append(f"{section}: {name}: {reason}")
        for one in results.get("weights", []):
            for name, reason in one.get("missing", {}).items():
                if name.startswith("ours"):
                    where = f"{one['n']} x {one['k']}, {format_of(one)}"
                    found.append(f"{name}, {where}: {reason}")
    return found


if __name__ == "__main__":
    main()
