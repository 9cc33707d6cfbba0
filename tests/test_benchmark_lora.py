"""`benchmarks/lora.py` with a tiny Llama, on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("peft", reason="peft makes the adapters")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--device", "cpu", "--tiny", "--batches", "1", "--rounds", "1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("lora")


def test_command(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, markdown = tmp_path / "lora.json", tmp_path / "lora.md"
    files = ["--json", str(figures), "--markdown", str(markdown)]
    benchmark.main([*TINY, "--length", "16", "--only", "ours", "dense", *files])
    assert markdown.read_text() == capsys.readouterr().out.removesuffix("\n")
    found = json.loads(figures.read_text())
    assert found["missing"] == {}
    assert {"command", "date", "machine", "versions", "model"} <= found.keys()
    assert found["settings"] == {
        "rank": benchmark.RANK,
        "length": 16,
        "batches": [1],
        "rounds": 1,
    }
    ours, dense = found["results"]
    assert [ours["name"], dense["name"]] == ["ours", "dense"]
    assert ours["trained"] == dense["trained"] > 0
    for one in (ours, dense):
        assert list(one["steps"]) == ["1 x 16", "1 x 16, checkpointing"]
        assert one["held"] is None  # torch counts memory of GPUs only
        plain, checkpointed = one["steps"].values()
        assert len(plain["seconds"]) == 1
        assert plain["losses"][-1] < plain["losses"][0]
        assert checkpointed["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    losses = [one["steps"]["1 x 16"]["losses"] for one in (ours, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # four bits of random ones


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None,
    reason="bitsandbytes is installed",
)
def test_a_peer_that_is_missing_is_skipped_with_its_reason(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "lora.json"
    benchmark.main([*TINY, "--only", "nf4", "nf4-peft", "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert found["results"] == []
    assert found["missing"] == dict.fromkeys(("nf4", "nf4-peft"), "not installed")
    assert "| bitsandbytes nf4 | not installed |" in capsys.readouterr().out


def test_a_peer_that_fails_is_named_and_ours_must_not(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = tmp_path / "lora.json"

    def fail(folder: Path, kind: str) -> None:
        raise RuntimeError("no such kernel")

    broken = benchmark.Entry("broken", fail)
    for name in ("ours", "dense"):
        monkeypatch.setitem(benchmark.ENTRIES, name, broken)
    benchmark.main([*TINY, "--only", "dense", "--json", str(figures)])
    assert "no such kernel" in json.loads(figures.read_text())["missing"]["dense"]
    with pytest.raises(SystemExit, match="no such kernel"):
        benchmark.main([*TINY, "--only", "ours"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "0"], "are positive"),
        (["--hidden", "100"], "whole heads of 128"),
        (["--json", "/no/such/folder/x.json"], "there is no such folder"),
    ],
)
def test_wrong_options(
    options: list[str],
    message: str,
    benchmark: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main([*TINY, *options])
    assert message in capsys.readouterr().err
