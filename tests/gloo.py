"""Cases for two processes, started once for a whole test file.

A test file names its functions ``case_…(folder)``; both processes call them in the order
of the file. `run` starts the processes; the tests then say what became of each case.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

WORLD = 2
SECONDS = 20  # until a process that waits for another one gives up


def cases_of(module: str) -> list[str]:
    """The names of the cases of a module that is being imported, or has been."""
    return [name for name in vars(sys.modules[module]) if name.startswith("case_")]


def run(request: pytest.FixtureRequest, folder: Path) -> dict[str, list[str]]:
    """What each case raised in each process, as text: "" where all was well.

    Only the cases that pytest was asked for are run.
    """
    module = request.module.__name__
    asked = [
        item for item in request.session.items if isinstance(item, pytest.Function)
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = [
        item.callspec.params["name"] for item in asked if item.module is request.module
    ]
    crash = "not run"
    try:
        multiprocessing.spawn(
            _process, (module, names, str(folder), port), nprocs=WORLD, join=True
        )
    except (
        multiprocessing.ProcessExitedException,
        multiprocessing.ProcessRaisedException,
    ) as error:
        crash = str(error)
    ranks = []
    for rank in range(WORLD):
        file = folder / f"outcome-{rank}.pt"
        ranks.append(torch.load(file) if file.exists() else {})
    return {name: [outcome.get(name, crash) for outcome in ranks] for name in names}


def check(outcomes: dict[str, list[str]], name: str) -> None:
    """Fail, or skip, as the case did."""
    texts = outcomes[name]
    if texts[0].startswith("skip: "):
        pytest.skip(texts[0].removeprefix("skip: "))
    if any(texts):  # where one raised, the other one waits for it in vain
        seen = [f"process {rank}: {text}" for rank, text in enumerate(texts) if text]
        pytest.fail("\n".join(seen), pytrace=False)


def rank() -> int:
    return distributed.get_rank()


def mesh() -> Any:
    return distributed.init_device_mesh("cpu", (WORLD,))


class Fallbacks(logging.Handler):
    """With it, no packed weight may be dequantized as a whole."""

    def emit(self, record: logging.LogRecord) -> None:
        if "dequantizes a packed weight" in record.getMessage():
            self.lines.append(record.getMessage())

    def __enter__(self) -> Fallbacks:
        from affine_tensor import tensor

        self.lines: list[str] = []
        tensor._logged.clear()
        tensor.logger.addHandler(self)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        from affine_tensor import tensor

        tensor.logger.removeHandler(self)
        if kind is None:
            assert not self.lines, self.lines


def _process(
    number: int, module: str, names: list[str], folder: str, port: int
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(WORLD),
    }
    distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    cases = importlib.import_module(module)
    outcome: dict[str, str] = {}
    for name in names:
        outcome[name] = _outcome(getattr(cases, name), Path(folder))
        torch.save(outcome, Path(folder) / f"outcome-{number}.pt")
        try:
            # A process that left a case early must not take part in the next too soon.
            distributed.barrier()
        except RuntimeError:
            break
    distributed.destroy_process_group()


def _outcome(case: Any, folder: Path) -> str:
    torch.manual_seed(0)
    try:
        with torch.random.fork_rng():
            case(folder)
    except pytest.skip.Exception as skipped:
        return f"skip: {skipped}"
    except BaseException:
        return traceback.format_exc()
    return ""
