"""A whole Llama on an NVIDIA GPU: packed weights in stock transformers beside the peers.

    python benchmarks/cuda_models.py [--json cuda_models.json --markdown ... --png ...]
    python benchmarks/cuda_models.py --layers 4 --batches 1 --time-limit 120

A Llama of 8 billion random weights is made on the GPU and saved as an MLX checkpoint (5
GB), from which all load, one after the other. Each is first checked: logits of a prompt and
of tokens after it, by the path that is then timed, against float64 with the weights of the
file. Then prompts and greedy decoding, with a static cache and a CUDA graph of one step;
with `--ways compile` also by transformers' own `generate` under torch.compile (minutes).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.util
import math
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cuda_llama
import cuda_machine
import cuda_models_report
import cuda_runs
import torch
from common import save
from cuda_clock import wait
from cuda_contestants import reason_of
from cuda_llama import ENTRIES, SIZES
from cuda_runs import TRIAL, Run, Wrong

WAYS = ("graph", "compile")
MLX = "mlx-lm"


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _options(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here, or torch does not see it")
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/cuda_models.py", *given]),
        "date": datetime.date.today().isoformat(),
        "machine": cuda_machine.machine(options.device),
        "versions": cuda_machine.versions(),
    }
    measure(options, figures)
    print(cuda_models_report.report(figures))
    if options.png:
        importlib.import_module("cuda_models_report").draw(options.png, figures)
    wrong = [n for n in figures["missing"] if n in ENTRIES and ENTRIES[n].ours]
    if wrong:
        reasons = [f"{name}: {figures['missing'][name]}" for name in wrong]
        raise SystemExit("\n".join(reasons))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, help="of the model (default: 32)")
    add("--tiny", action="store_true", help="a model to see that it works")
    add("--only", nargs="+", choices=[*ENTRIES, MLX], help="these contestants")
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--prefills", type=int, nargs="*", help="tokens (default: 512 and 4096)")
    add("--ways", nargs="+", choices=WAYS, default=["graph"])
    add("--rounds", type=int, default=3)
    add("--folder", help="keep the checkpoint there, or take the one that is there")
    add("--time-limit", type=float, metavar="S", help="seconds; the rest is left out")
    add("--json", help="write the figures there")
    add("--markdown", help="write the tables there")
    add("--png", help="draw them there")
    # To see here that it works: times mean nothing there.
    add("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.png and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib: pip install matplotlib")
    for path in filter(None, (options.json, options.markdown, options.png)):
        if not Path(path).resolve().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    numbers = [options.rounds, *options.batches, *(options.prefills or [])]
    if min(numbers) < 1 or (options.layers or 1) < 1:
        parser.error("layers, batches, prefills and rounds are positive")
    return options


# ---- measuring ------------------------------------------------------------------


def measure(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Fill in all figures, and write them after each contestant."""
    size = cuda_llama.shortened(SIZES["tiny" if options.tiny else "8b"], options.layers)
    prefills = size.prefills if options.prefills is None else tuple(options.prefills)
    figures |= {
        "model": str(size),
        "settings": {
            "batches": options.batches,
            "prefills": list(prefills),
            "prompt": size.prompt,
            "new": size.new,
            "rounds": options.rounds,
            "trial": list(TRIAL),
        },
        "results": [],
        "missing": {},
    }
    deadline = time.monotonic() + (options.time_limit or math.inf)
    with tempfile.TemporaryDirectory() as scratch:
        name = f"{'tiny' if options.tiny else '8b'}-{size.layers}-layers"
        folder = Path(options.folder or scratch) / name
        if not (folder / "config.json").exists():
            _say("making the checkpoint")
            with torch.no_grad():
                figures["made"] = cuda_llama.write(folder, size, options.device)
            _forget()
        files = folder.glob("*.safetensors")
        figures["file_bytes"] = sum(path.stat().st_size for path in files)
        run = Run(options, size, folder, deadline)
        for name in options.only or [*ENTRIES, MLX]:
            _say(name)
            if run.late:
                figures["missing"][name] = "the time limit was reached"
                continue
            try:
                result = _of_mlx(run) if name == MLX else _contestant(name, run)
                figures["results"].append(result)
            except Exception as error:  # peers raise all kinds
                traceback.print_exc()
                figures["missing"][name] = reason_of(error)
            _forget()
            figures["reference"] = add_ratios(figures["results"])
            _write(options, figures)


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    save(options.json, figures)
    if options.markdown:
        text = cuda_models_report.report(figures)
        Path(options.markdown).write_text(text, encoding="utf-8")


def _forget() -> None:
    """Give back what the last model took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _contestant(name: str, run: Run) -> dict[str, Any]:
    entry, kind = ENTRIES[name], run.kind
    memory = torchs(kind)
    memory.reset_peak()
    start = time.perf_counter()
    with torch.no_grad():
        model = entry.load(run.folder, kind)
    wait(kind)
    result: dict[str, Any] = {
        "name": name,
        "label": entry.label,
        "load_seconds": time.perf_counter() - start,
        "load_peak_bytes": memory.peak(),
        "errors": {},
        "speeds": {},
        "peaks": {},
        "notes": [],
    }
    _forget()
    result["held_bytes"] = memory.held()
    if "graph" in run.options.ways:
        for batch in run.options.batches:
            _attempt(
                run, result, f"decode, batch {batch}", cuda_runs.decode, model, batch
            )
        for length in _prefills(run):
            _attempt(run, result, f"prefill {length}", cuda_runs.prefill, model, length)
            what = f"prefill {length}, CUDA graph"
            _attempt(run, result, what, cuda_runs.prefill_graph, model, length)
    if "compile" in run.options.ways:
        _attempt(
            run,
            result,
            "decode, batch 1, generate compiled",
            cuda_runs.compiled,
            model,
            1,
        )
    return result


def _prefills(run: Run) -> Sequence[int]:
    given = run.options.prefills
    return run.size.prefills if given is None else given


def _attempt(
    run: Run,
    result: dict[str, Any],
    what: str,
    take: Callable[..., list[float]],
    model: Any,
    number: int,
    memory: Memory | None = None,
) -> None:
    """One measurement's tokens a second and peak memory; a note where there is none."""
    if run.late:
        result["notes"].append(f"{what}: the time limit was reached")
        return
    memory = memory or torchs(run.kind)
    start = time.perf_counter()
    memory.reset_peak()
    try:
        speeds = take(run, result, model, number)
    except Wrong:
        raise
    except Exception as error:
        traceback.print_exc()
        result["notes"].append(f"{what}: {reason_of(error)}")
        return
    finally:
        _say(f"  {what}: {time.perf_counter() - start:.1f} s")
    result["peaks"][what] = memory.peak()
    result["speeds"][what] = {
        "median": statistics.median(speeds),
        "least": min(speeds),
        "most": max(speeds),
        "values": speeds,
    }
    _forget()


# ---- mlx-lm ---------------------------------------------------------------------


def _of_mlx(run: Run) -> dict[str, Any]:
    """The checkpoint in mlx-lm, by its own loops."""
    peer = importlib.import_module("cuda_mlx")
    start = time.perf_counter()
    model = peer.load(run)
    memory = Memory(peer.reset_peak, peer.peak, peer.held)
    result: dict[str, Any] = {
        "name": MLX,
        "label": MLX,
        "load_seconds": time.perf_counter() - start,
        "load_peak_bytes": memory.peak(),
        "held_bytes": memory.held(),
        "errors": {},
        "speeds": {},
        "peaks": {},
        "notes": [],
    }
    for batch in run.options.batches:
        what = f"decode, batch {batch}"
        _attempt(run, result, what, peer.decode, model, batch, memory)
    for length in _prefills(run):
        what = f"prefill {length}"
        _attempt(run, result, what, peer.prefill, model, length, memory)
    return result


# ---- memory and ratios ----------------------------------------------------------


class Memory(NamedTuple):
    """Of a library: its bytes on the device, where it knows them."""

    reset_peak: Callable[[], None]
    peak: Callable[[], int | None]  # at the most since it was reset
    held: Callable[[], int | None]


def torchs(kind: str) -> Memory:
    if kind != "cuda":
        return Memory(lambda: None, lambda: None, lambda: None)
    cuda = torch.cuda
    return Memory(
        cuda.reset_peak_memory_stats, cuda.max_memory_allocated, cuda.memory_allocated
    )


def add_ratios(results: list[dict[str, Any]]) -> str | None:
    """Ours over each; returns which row of ours: the one that decodes faster."""

    def speed(one: dict[str, Any], what: str) -> float:
        return float(one["speeds"].get(what, {}).get("median", 0.0))

    mine = [one for one in results if one["name"] in ENTRIES]
    mine = [one for one in mine if ENTRIES[one["name"]].ours and one["speeds"]]
    if not mine:
        return None
    first = next(iter(mine[0]["speeds"]))
    best = max(mine, key=lambda one: speed(one, first))
    for one in results:
        for what, own in one["speeds"].items():
            own.pop("ours_over_it", None)
            if speed(best, what):
                own["ours_over_it"] = speed(best, what) / own["median"]
    return str(best["label"])


if __name__ == "__main__":
    main()
