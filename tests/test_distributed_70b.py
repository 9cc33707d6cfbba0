"""`benchmarks/distributed_70b.py` with a tiny Llama, on two gloo processes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_graphs
import pytest
import torch
from torch import Tensor

import affine_tensor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves: the checkpoint, m.json, m.md, and what it printed."""
    folder = tmp_path_factory.mktemp("70b")
    done = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "distributed_70b.py"), *TINY),
            *("--processes", "2", "--rounds", "2", "--folder", str(folder)),
            *("--json", str(folder / "m.json"), "--markdown", str(folder / "m.md")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("distributed_70b")


@pytest.fixture
def worker(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its processes' module, in this process."""
    found = importlib.import_module("distributed_70b_worker")

    def graph(graph: Any, capture_error_mode: str) -> AbstractContextManager[None]:
        assert capture_error_mode == "thread_local"
        return fake_graphs._graph(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake_graphs.Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return found


def job(worker: ModuleType, folder: Path, scratch: Path, **more: Any) -> Any:
    size = importlib.import_module("distributed_70b_file").SIZES["tiny"]
    told = {"way": "one", "kind": "cpu", "rounds": 1, "graph": False, **more}
    path = folder / "tiny-2-layers"
    return worker.Job(folder=path, scratch=scratch, size=size, **told)


def test_command(folder: Path) -> None:
    figures = json.loads((folder / "m.json").read_text())
    assert figures["missing"] == {}
    assert figures["reference"] == "one"
    assert figures["file_bytes"] > 0
    results = {one["name"]: one for one in figures["results"]}
    assert list(results) == ["one", "tp2", "auto"]
    for name, one in results.items():
        assert one["complete"]
        assert one["failed"] is None
        assert len(one["processes"]) == (2 if name == "tp2" else 1)
        for process in one["processes"]:
            assert set(process["loads"]) == {"float32", "bfloat16"}
            assert all(own["seconds"] > 0 for own in process["loads"].values())
            assert list(process["speeds"]) == ["decode", "prefill 8", "prefill 16"]
            assert all(
                len(taken) == 2 and min(taken) > 0
                for taken in process["speeds"].values()
            )
            differences = process["differences"]
            assert set(differences) == (
                set() if name == "one" else {"at once", "one by one"}
            )
            assert all(v < 1e-4 for own in differences.values() for v in own.values())
    whole = results["one"]["processes"][0]["loads"]["bfloat16"]
    for process in results["tp2"]["processes"]:
        # Sums of two halves are rounded otherwise.
        assert process["differences"]["at once"]["norm"] > 0
        own = process["loads"]["bfloat16"]
        norms = 5 * 256
        assert own["devices"]["cpu"] - norms == (whole["devices"]["cpu"] - norms) / 2
        if "bytes_read" in own:  # no process reads all of the file
            assert own["bytes_read"] < 0.8 * whole["bytes_read"]
    table = (folder / "m.md").read_text()
    assert (folder / "printed").read_text().strip() == table.strip()
    for label in ("one device", "tp2", 'device_map="auto"'):
        assert f"| {label} | " in table


def test_one_device_gives_what_the_file_means(folder: Path, worker: ModuleType) -> None:
    """Against float64, from the bits of the file and without our code."""
    files = importlib.import_module("peers_files")
    own = job(worker, folder, folder)
    ids = worker.tokens(own.size, 24)
    assert ids.min() < own.size.vocabulary / 4 < own.size.vocabulary / 2 < ids.max()
    stored = files.weights(own.folder, own.size, "mlx")
    expected = files.reference(stored, own.size, ids[0].tolist(), 24)
    assert 0.3 < expected.std() < 3
    model = affine_tensor.from_pretrained(own.folder, dtype="float32")
    with torch.no_grad():
        logits = model(ids).logits[0]
    found = worker.difference(logits, expected)
    assert max(found.values()) < 1e-5


def test_the_graph_of_a_step_is_compared_and_timed(
    folder: Path, worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = job(worker, folder, tmp_path, graph=True)
    assert worker.Job.read(own.save()) == own
    worker.work(own)
    found = json.loads((tmp_path / "one-0.json").read_text())
    assert found["differences of the graph"]["norm"] == 0
    assert found["speeds"]["decode, graph"][0] > 0
    # One that always reads the same token is found out, and the rest is kept.
    monkeypatch.setattr(
        worker.Graph, "_once", lambda self: self._take(torch.ones_like(self.ids))
    )
    with pytest.raises(worker.Wrong, match="one by one in a graph"):
        worker.work(own)
    found = json.loads((tmp_path / "one-0.json").read_text())
    assert found["failed"].startswith("one, process 0: wrong: logits")
    assert found["complete"]
    assert list(found["speeds"]) == ["decode", "prefill 8", "prefill 16"]


@pytest.mark.parametrize("what", ["at once", "one by one"])
def test_what_differs_is_not_timed(
    what: str, folder: Path, worker: ModuleType, tmp_path: Path
) -> None:
    first = job(worker, folder, tmp_path)
    worker.work(first)
    logits: dict[str, Tensor] = torch.load(tmp_path / "one.pt")
    logits[what][0, -1, 7] += 1e-3 * logits[what].abs().max()
    torch.save(logits, tmp_path / "before.pt")
    with pytest.raises(worker.Wrong, match=f"tokens read {what}, differ by 0.001"):
        worker.work(dataclasses.replace(first, reference="before"))
    found = json.loads((tmp_path / "one-0.json").read_text())
    assert found["failed"].startswith("one, process 0: wrong: logits")
    assert found["speeds"] == {}
    assert "complete" not in found


def test_differences_that_are_no_number_are_refused(worker: ModuleType) -> None:
    exact = torch.tensor([3.0, 4.0])
    found = worker.difference(exact + torch.tensor([0.0, 0.5]), exact)
    assert found == {"max": 0.125, "norm": 0.1}
    worker.check({"at once": found}, 0.125)
    for limit in (0.11, 0.09):
        with pytest.raises(worker.Wrong, match=r"differ by 0\.1"):
            worker.check({"at once": found}, limit)
    spoiled = worker.difference(torch.tensor([math.nan, 4.0]), exact)
    with pytest.raises(worker.Wrong, match="differ by nan"):
        worker.check({"at once": spoiled}, 1.0)


def test_a_model_that_is_not_sharded_is_not_called_parallel(
    folder: Path, worker: ModuleType
) -> None:
    own = job(worker, folder, folder, way="tp2")
    model = affine_tensor.from_pretrained(own.folder)
    with pytest.raises(worker.Wrong, match="0 parameters are shards, at least 15"):
        worker._placed(own, model)
    affine_tensor.dequantize_(model, progress=False)
    with pytest.raises(worker.Wrong, match=r"embed_tokens\.weight is not packed"):
        worker._placed(own, model)


def test_fewer_devices_than_were_asked_for(benchmark: ModuleType) -> None:
    options = benchmark._options([])
    ways, missing = benchmark.plan(options, 2)
    assert ways == ["one", "tp2", "auto"]
    assert missing == {"tp4": "tp4: 4 GPUs were asked for, and there are 2"}
    ways, missing = benchmark.plan(options, 1)
    assert ways == ["one"]
    assert set(missing) == {"tp2", "tp4", "auto"}
    skipped = benchmark._options(["--skip", "one", "auto"])
    assert benchmark.plan(skipped, 4) == (["tp2", "tp4"], {})


def test_a_process_that_dies_leaves_the_figures_of_before(
    benchmark: ModuleType,
    worker: ModuleType,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    partly = {"loads": {}, "differences": {}, "speeds": {"decode": [7.0]}}

    def spawn(own: Any, deadline: float) -> int:
        (own.scratch / f"{own.way}-0.json").write_text(json.dumps(partly))
        return 137

    monkeypatch.setattr(benchmark, "_spawn", spawn)
    path = tmp_path / "m.json"
    with pytest.raises(SystemExit, match="one: exit code 137\ntp2: exit code 137"):
        benchmark.main(
            [
                *(*TINY, "--processes", "2", "--skip", "auto"),
                *("--folder", str(folder), "--json", str(path)),
            ]
        )
    assert "| one device | 1 |  | 7 |" in capsys.readouterr().out
    for one in json.loads(path.read_text())["results"]:
        assert not one["complete"]
        assert one["processes"] == [partly]


SLEEPER = """
import os, pathlib, sys, time
path = pathlib.Path(sys.argv[2]).with_name(os.environ.get("RANK", "alone"))
path.with_suffix(".part").write_text(str(os.getpid()))
path.with_suffix(".part").rename(path.with_suffix(".pid"))
time.sleep(600)
"""


@pytest.fixture
def sleeper(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where processes that never end write their numbers."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "sleeper.py"))
    return tmp_path


def test_a_way_that_takes_too_long_is_ended(
    benchmark: ModuleType, worker: ModuleType, sleeper: Path, folder: Path
) -> None:
    assert benchmark._spawn(job(worker, folder, sleeper), time.monotonic()) == 124


def test_torchrun_ends_its_processes_when_it_is_ended(
    benchmark: ModuleType, worker: ModuleType, sleeper: Path, folder: Path
) -> None:
    process = benchmark._start(job(worker, folder, sleeper, way="tp2"))
    while len(files := list(sleeper.glob("*.pid"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    benchmark._end(process)
    for path in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_a_disk_that_is_too_small_is_refused(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = importlib.import_module("distributed_70b_file")
    full = file.SIZES["70b"]
    assert 39.5e9 < file.bytes_of(full) < 40e9
    monkeypatch.setattr(file.shutil, "disk_usage", lambda _: Disk(30e9))
    with pytest.raises(SystemExit, match=r"takes 39\.7 GB, and .* has 30\.0"):
        file.write(tmp_path / "m", full, "cpu")
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass
class Disk:
    free: float


def test_arguments_that_cannot_be_are_refused(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, text in (
        (["--processes", "3"], "3 processes: the 8 heads of keys and values"),
        (["--tiny", "--processes", "8"], "8 processes: the 4 heads"),
        (["--layers", "0"], "layers and rounds are positive"),
        (["--json", "/no/such/folder/m.json"], "there is no such folder"),
    ):
        with pytest.raises(SystemExit):
            benchmark._options(arguments)
        assert text in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is no NVIDIA GPU here"):
            benchmark.main(["--tiny"])
