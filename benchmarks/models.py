"""A whole Llama on a CPU: stock `generate` with packed weights beside the peers.

    python benchmarks/models.py [--markdown models.md --png models.png --json models.json]
    python benchmarks/models.py --llama-python PATH   (a python that has llama_cpp)

llama.cpp needs `gguf` here, and llama-cpp-python here or there: `pip install -e .[peers]`.

The same random weights are written once for each: an MLX checkpoint (ours and mlx-lm),
dense bfloat16 (transformers, and torchao, which quantizes when it loads), GGUF in Q4_0
and Q4_1 (llama.cpp; every matrix in that format, `output.weight` too). Each contestant
is a process of its own, asleep while others run. It is first checked: the logits of a
prompt and of tokens decoded after it, against float64 with its own dequantized weights.
Then rounds, in which each is asked in turn to decode, and to read prompts, greedily, one
sequence, to the last logits only. The first round is not counted. Ratios are medians
over rounds. Nothing else should run: threads that wait for one another, as llama.cpp's
do, lose most. It takes 5 GB of disk and 12 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import save
from cpu_machine import machine
from peers_files import SIZES, Size, reference, weights, write
from peers_report import about, draw, kinds_of, table
from workers import CONTESTANTS, Worker, WorkerError

TRIAL = (16, 4)  # tokens of a prompt, and decoded after it: to check, and as a trial
PAUSE = 0.2  # seconds, until the last contestant's threads have stopped spinning
TIMEOUT = 1800.0  # seconds for an answer


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    found = measure(options)
    text = f"{about(found)}\n\n{table(found)}"
    print(text)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n", encoding="utf-8")
    draw(options.png, found)
    save(options.json, found)
    if any(CONTESTANTS[name].ours for name in found["missing"]):
        raise SystemExit(1)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--sizes", choices=SIZES, default="llama", help="of the model")
    add("--rounds", type=int, default=5)
    add("--only", nargs="+", choices=CONTESTANTS, help="these contestants")
    add("--threads", type=int, help="of each (default: as many as torch takes)")
    add("--llama-python", help="a python that has llama_cpp (default: this one)")
    add("--folder", help="keep the model's files there, and take those that are there")
    add(
        "--patience", type=float, default=30.0, help="longer than that is timed once, s"
    )
    add("--markdown", help="write the table there")
    add("--png", help="draw it there")
    add("--json", help="write the figures there")
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures; `options` are those of `parser`."""
    size = SIZES[options.sizes]
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    busy = os.getloadavg()[0]
    missing: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch) / options.sizes
        folder.mkdir(parents=True, exist_ok=True)
        paths = _write(folder, size, options.only or list(CONTESTANTS), missing)
        try:
            loaded = {}
            for name, path in paths.items():
                _say(f"loading and checking {name}")
                python = _python(name, options)
                try:
                    log = Path(scratch) / f"{name}.log"
                    workers[name] = Worker(name, python, threads, log)
                    loaded[name] = _start(workers[name], name, path, size, threads)
                except (WorkerError, ImportError, OSError) as error:
                    missing[name] = str(error)
                    if name in workers:
                        workers.pop(name).close()
            speeds = _rounds(workers, size, options, missing)
        finally:
            for worker in workers.values():
                worker.close()
    results = [{**loaded[name], **speeds[name]} for name in speeds]
    return {
        "model": str(size),
        "machine": machine(),
        "settings": {
            "sizes": options.sizes,
            "rounds": options.rounds,
            "threads": threads,
            "prompt": size.prompt,
            "new": size.new,
            "trial": TRIAL,
            "load_average_before": busy,
        },
        "reference": _add_ratios(results),
        "results": results,
        "missing": missing,
    }


def _python(name: str, options: argparse.Namespace) -> str:
    theirs = CONTESTANTS[name].module == "peers_llama" and options.llama_python
    return theirs or sys.executable


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


# ---- before timing ---------------------------------------------------------------


def _write(
    folder: Path, size: Size, names: list[str], missing: dict[str, str]
) -> dict[str, Path]:
    """The file of each contestant that can have one."""
    paths: dict[str, Path] = {}
    for name in names:
        kind = CONTESTANTS[name].file
        _say(f"writing {kind}, if it is not there")
        try:
            paths[name] = write(folder, size, kind)
        except ImportError as error:
            missing[name] = f"its file is not written: {error}"
    return paths


def _start(
    worker: Worker, name: str, path: Path, size: Size, threads: int
) -> dict[str, Any]:
    """Load it, and check what it answers."""
    for file in [path] if path.is_file() else path.glob("*.safetensors"):
        file.read_bytes()  # into the page cache, so that the first is no worse off
    loaded = worker.ask(
        "load", TIMEOUT, path=str(path), threads=threads, longest=size.longest
    )
    return {
        "name": name,
        "label": CONTESTANTS[name].label,
        "weights": CONTESTANTS[name].kind,
        "versions": loaded["versions"],
        "notes": loaded["notes"],
        "load_seconds": loaded["seconds"],
        "load_peak_bytes": loaded["peak_bytes"],
        "error": _error(worker, name, path, size),
    }


def _error(worker: Worker, name: str, path: Path, size: Size) -> float:
    """The worst relative L2 of its logits; a WorkerError if it computes something else."""
    import numpy

    prompt, new = TRIAL
    ids = _ids(prompt, size)
    logits = worker.log.with_suffix(".npy")
    tokens = worker.ask("check", TIMEOUT, ids=ids, new=new, save=str(logits))["tokens"]
    expected = _expected(path, size, CONTESTANTS[name].kind, (*ids, *tokens[:-1]), new)
    got = torch.from_numpy(numpy.load(logits)).double()
    error = ((got - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if not error < CONTESTANTS[name].limit:  # not a number is wrong, too
        raise WorkerError(f"wrong: relative error {error:.2g} against float64")
    return error


@cache  # contestants share files, and mostly tokens
def _expected(
    path: Path, size: Size, kind: str, ids: tuple[int, ...], last: int
) -> torch.Tensor:
    return reference(weights(path, size, kind), size, list(ids), last)


def _ids(count: int, size: Size) -> list[int]:
    return [(37 * i + 11) % size.vocabulary for i in range(count)]


# ---- timing ----------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Tokens to read, and how many to make; of one that is made only reading counts."""

    prompt: int
    new: int

    def run(self, worker: Worker, size: Size) -> tuple[float, float]:
        """Seconds until the first token, and from there to the last."""
        ids = _ids(self.prompt, size)
        taken = worker.ask("time", TIMEOUT, ids=ids, new=self.new)
        return taken["first"], taken["rest"]

    def speed(self, first: float, rest: float) -> float:
        return self.prompt / first if self.new == 1 else (self.new - 1) / rest


def _measurements(size: Size) -> dict[str, Measurement]:
    """What each is asked in a round."""
    prefills = {f"prefill {count}": Measurement(count, 1) for count in size.prefills}
    return {"decode": Measurement(size.prompt, size.new), **prefills}


def _rounds(
    workers: dict[str, Worker],
    size: Size,
    options: argparse.Namespace,
    missing: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Speeds of each that came through, by what was measured."""
    kinds = _measurements(size)
    speeds: dict[str, dict[str, list[float]]] = {}
    slow: dict[str, dict[str, float]] = {}

    def attempt(name: str, kind: str, ask: Callable[[], Any]) -> Any:
        time.sleep(PAUSE)
        try:
            return ask()
        except WorkerError as error:
            missing[name] = f"{kind}: {error}"
            workers.pop(name).close()
            return None

    for name, worker in list(workers.items()):
        speeds[name] = {kind: [] for kind in kinds}
        trial = attempt(
            name, "trial", lambda w=worker: _trial(w, size, options.patience)
        )
        slow[name] = trial or {}
    for number in range(options.rounds + 1):
        _say(f"round {number} of {options.rounds}" + ("" if number else ", to warm up"))
        for kind, measurement in kinds.items():
            for name, worker in list(workers.items()):
                if kind in slow[name]:
                    continue
                ask = partial(measurement.run, worker, size)
                taken = attempt(name, kind, ask)
                if number and taken:
                    speeds[name][kind].append(measurement.speed(*taken))
    return {
        name: {
            kind: _summary([slow[name][kind]], once=True)
            if kind in slow[name]
            else _summary(values, once=False)
            for kind, values in speeds[name].items()
        }
        for name in workers
    }


def _trial(worker: Worker, size: Size, patience: float) -> dict[str, float]:
    """Speeds, from a few tokens, in what would take longer than that."""
    prompt, new = TRIAL
    first, rest = Measurement(prompt, new).run(worker, size)
    slow = {}
    for kind, asked in _measurements(size).items():
        seconds = first / prompt * asked.prompt + rest / (new - 1) * (asked.new - 1)
        if seconds > patience:
            alike = Measurement(prompt, 1 if asked.new == 1 else new)
            slow[kind] = alike.speed(first, rest)
    return slow


def _summary(speeds: list[float], once: bool) -> dict[str, Any]:
    return {
        "median": statistics.median(speeds),
        "least": min(speeds),
        "most": max(speeds),
        "values": speeds,
        "once": once,
    }


def _add_ratios(results: list[dict[str, Any]]) -> str | None:
    """Ours over each; returns which row of ours: the one that decodes faster."""
    ours = [one for one in results if CONTESTANTS[one["name"]].ours]
    if not ours:
        return None
    best = max(ours, key=lambda one: one["decode"]["median"])
    for one in results:
        for kind in kinds_of(results):
            one[kind]["ours_over_it"] = _ratio(best[kind], one[kind])
    return best["label"]


def _ratio(mine: dict[str, Any], its: dict[str, Any]) -> float:
    if mine["once"] or its["once"]:
        return mine["median"] / its["median"]
    return statistics.median(
        a / b for a, b in zip(mine["values"], its["values"], strict=True)
    )


if __name__ == "__main__":
    main()
