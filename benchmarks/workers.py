"""A process for each contestant of `models.py`, idle on a pipe while others run.

Two OpenMP runtimes in one process fight for the cores, and llama.cpp may live in another
python: so this file, run by that python, imports only what its contestant needs.
Requests and answers are lines of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """Who takes part, and with which file."""

    label: str
    kind: str  # of weights, see peers_files.weights
    module: str  # where its class is
    made_by: str
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: float = 0.1  # relative L2 of logits; a wrong kernel is off by about 1.4

    @property
    def ours(self) -> bool:
        return self.made_by == "Ours"

    @property
    def file(self) -> str:
        """The kind of file it reads."""
        return "dense" if self.kind == "torchao" else self.kind


_COMPILED = {"compiled": True}
CONTESTANTS = {
    "ours": Contestant("ours", "mlx", "peers_torch", "Ours"),
    "ours-compiled": Contestant(
        "ours, compiled", "mlx", "peers_torch", "Ours", _COMPILED
    ),
    "llama-q4_0": Contestant("llama.cpp Q4_0", "q4_0", "peers_llama", "LlamaCpp"),
    "llama-q4_1": Contestant("llama.cpp Q4_1", "q4_1", "peers_llama", "LlamaCpp"),
    "torchao": Contestant("torchao int4", "torchao", "peers_torch", "TorchAO"),
    "torchao-compiled": Contestant(
        "torchao int4, compiled", "torchao", "peers_torch", "TorchAO", _COMPILED
    ),
    "transformers": Contestant("transformers bf16", "dense", "peers_torch", "Dense"),
    # Its kernel for a CPU adds up in bfloat16; tests show that it is right in float32.
    "mlx-lm": Contestant("mlx-lm", "mlx", "peers_mlx", "MlxLm", limit=1.0),
}


@dataclass
class Run:
    """Tokens that were made, and when each was there (`time.perf_counter`)."""

    tokens: list[int]
    times: list[float]
    logits: Any = None  # numpy, a row for each token, if they were asked for


class WorkerError(Exception):
    """Why a contestant is not there."""


class Worker:
    """The parent's end."""

    def __init__(self, name: str, python: str, threads: int, log: Path) -> None:
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [python, __file__, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                text=True,
            )

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Its answer; a WorkerError if it fails, dies or takes too long."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        start = time.perf_counter()
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.process.wait()
            if time.perf_counter() - start >= timeout:
                raise WorkerError(f"{do}: no answer within {timeout:.0f} s")
            raise WorkerError(f"{do}: it ended, {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.returncode}"

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


# ---- the worker's end ------------------------------------------------------------


def serve(name: str) -> None:
    """Answer requests until the pipe ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    contestant: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                contestant, answer = _load(name, **request)
            else:
                answer = {"check": _check, "time": _time}[do](contestant, **request)
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(
    name: str, path: str, threads: int, longest: int
) -> tuple[Any, dict[str, Any]]:
    entry = CONTESTANTS[name]
    made_by = getattr(importlib.import_module(entry.module), entry.made_by)
    contestant = made_by(threads, longest, **entry.arguments)
    before = _forget_peak()
    start = time.perf_counter()
    contestant.load(Path(path))
    taken = time.perf_counter() - start
    peak = _memory("VmHWM")
    return contestant, {
        "seconds": taken,
        "peak_bytes": None if peak is None or before is None else peak - before,
        "versions": {
            **{package: version(package) for package in contestant.packages},
            **getattr(contestant, "versions", {}),
        },
        "notes": getattr(contestant, "notes", ""),
    }


def _check(contestant: Any, ids: Sequence[int], new: int, save: str) -> dict[str, Any]:
    import numpy

    run = contestant.run(list(ids), new, keep_logits=True)
    numpy.save(save, run.logits)
    return {"tokens": run.tokens}


def _time(contestant: Any, ids: Sequence[int], new: int) -> dict[str, Any]:
    start = time.perf_counter()
    run = contestant.run(list(ids), new)
    first, last = run.times[0], run.times[-1]
    assert len(run.times) == new, f"{len(run.times)} tokens instead of {new}"
    return {"first": first - start, "rest": last - first}


def _memory(key: str) -> int | None:
    """Bytes, as Linux counts them; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def _forget_peak() -> int | None:
    """Forget the resident set's high-water mark; returns what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory("VmRSS")


if __name__ == "__main__":
    serve(sys.argv[1])
