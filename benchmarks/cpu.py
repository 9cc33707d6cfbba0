"""Everything that is measured on a CPU, ours and the peers in one run.

    python benchmarks/cpu.py [--json cpu.json --markdown cpu.md --png cpu.png]
    python benchmarks/cpu.py --only products --shape 1000 1056 --bits 3 5 --rows 1 7 24

Products with packed weights (each result is compared with float64 first; weights come
from memory, whose bandwidth is measured in the same rounds), whole models, loading,
quantizing and the overhead of a call. Peers that are not there are named.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cpu_machine
import cpu_products
import cpu_report
import torch
from common import save

from affine_tensor import layout

HERE = Path(__file__).resolve().parent
# What the other scripts are called with.
MODELS = {"models": [], "tiny": ["--sizes", "tiny", "--rounds", "1"]}
LOAD = {
    "models": [],
    "tiny": ["--gigabytes", "0.03", "--rounds", "1", "--models", "llama"],
}
QUANTIZE = {"models": [], "tiny": ["--rows", "64", "--columns", "256"]}


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _options(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/cpu.py", *given]),
        "date": datetime.date.today().isoformat(),
        "machine": cpu_machine.machine(),
        "versions": cpu_machine.versions(),
    }
    for section in options.only:
        figures[section] = run_section(section, options)
        text = cpu_report.section_text(section, figures[section])
        print(f"\n{cpu_report.TITLES[section]}\n\n{text}\n", flush=True)
    print(cpu_report.head(figures))
    save(options.json, figures)
    if options.markdown:
        text = cpu_report.report(figures)
        Path(options.markdown).write_text(text, encoding="utf-8")
    if options.png:
        importlib.import_module("cpu_picture").draw(options.png, figures)
    wrong = problems(figures)
    if wrong:
        raise SystemExit("\n".join(wrong))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--sizes", choices=cpu_products.SHAPES, default="models")
    shape = {"nargs": 2, "type": int, "metavar": ("N", "K"), "action": "append"}
    add("--shape", **shape, help="of a weight; may be given again")
    add("--rows", type=int, nargs="+", help="of x (default: 1 to 512)")
    bits = "default: 4, and one row with the others"
    add("--bits", type=int, nargs="+", choices=layout.BITS, help=bits)
    groups = {"nargs": "+", "choices": layout.GROUP_SIZES, "default": [64]}
    add("--group-size", type=int, **groups)
    dtypes = cpu_products.DTYPES
    add("--dtype", nargs="+", choices=dtypes, default=["bfloat16"])
    add("--rounds", type=int, help="of the products (default: 15)")
    add("--threads", type=int, help="default: torch's own choice")
    add("--llama-python", help="a python that has llama_cpp (default: this one)")
    add("--json", help="write the figures there")
    add("--markdown", help="write the tables there")
    add("--png", help="draw them there")
    options = parser.parse_args(arguments)
    # Better now than after half an hour.
    if options.png and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib: pip install matplotlib")
    for path in filter(None, (options.json, options.markdown, options.png)):
        if not Path(path).resolve().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    if min([1, *(options.rows or []), *itertools.chain(*(options.shape or []))]) < 1:
        parser.error("rows and shapes are positive")
    return options


# ---- sections -------------------------------------------------------------------


def run_section(section: str, options: argparse.Namespace) -> dict[str, Any]:
    """Its figures, or why there are none: one that fails does not spoil the others."""
    try:
        return SECTIONS[section](options)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def products(options: argparse.Namespace) -> dict[str, Any]:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    return cpu_products.measure(options, cpu_machine.last_cache(), say)


def models(options: argparse.Namespace) -> dict[str, Any]:
    script = importlib.import_module("models")
    given = [*MODELS[options.sizes], "--threads", str(torch.get_num_threads())]
    if options.llama_python:
        given += ["--llama-python", options.llama_python]
    found: dict[str, Any] = script.measure(script.parser().parse_args(given))
    return found


def load(options: argparse.Namespace) -> dict[str, Any]:
    more = ["--threads", str(torch.get_num_threads()), *LOAD[options.sizes]]
    return _script("load.py", more)


def quantize(options: argparse.Namespace) -> dict[str, Any]:
    return _script("quantize.py", QUANTIZE[options.sizes])


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    return _script("overhead.py", [])


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "products": products,
    "models": models,
    "load": load,
    "quantize": quantize,
    "overhead": overhead,
}


def _script(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run another benchmark in a process of its own: its figures, and what it misses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        done = subprocess.run(
            [sys.executable, HERE / name, *arguments, "--json", path],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
            raise RuntimeError(f"{name}: {last}")
        figures = json.loads(path.read_text())
    del figures["machine"]  # stands above
    said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return {
        "figures": figures,
        "notes": [one for one in said if one.endswith("left out")],
    }


def problems(figures: dict[str, Any]) -> list[str]:
    """Sections that failed, and products of ours that are wrong."""
    found = []
    for section in SECTIONS:
        results = figures.get(section, {})
        if "failed" in results:
            found.append(f"{section}: {results['failed']}")
        for name, reason in results.get("missing", {}).items():
            if name.startswith("ours"):
                found.append(f"{section}: {name}: {reason}")
        for one in results.get("weights", []):
            reason = one.get("missing", {}).get("ours")
            if reason:
                where = f"{one['n']} x {one['k']}, {cpu_report.format_of(one)}"
                found.append(f"ours, {where}: {reason}")
    return found


if __name__ == "__main__":
    main()
