"""`benchmarks/soak.py` for some seconds, and with a leak."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("peft", reason="peft makes the adapters")
pytest.importorskip("psutil", reason="psutil tells the memory of a process")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SHORT = ["--minutes", "0.01", "--every", "1"]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("soak")
    # A few rounds are not enough for the pools of a C allocator to have settled.
    monkeypatch.setitem(found.ALLOWED, "rss", (200 << 20, 0.0))
    return found


def test_no_memory_is_lost(
    soak: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "soak.json"
    soak.main([*SHORT, "--json", str(figures)])
    assert "GROWS" not in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert set(found["growth"]) == {"rss", "tensors", "tensor_bytes", "files"}
    assert not any(one["fails"] for one in found["growth"].values())
    assert found["rounds"] == len(found["samples"]) >= soak.FEWEST
    assert all(sample["tensors"] > 100 for sample in found["samples"])


def test_a_leak_is_found(soak: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a tensor of 2 MiB a round, of memory that Python does not see, and of a file."""
    held: list[object] = []

    def leak() -> None:
        held.append(torch.ones(1 << 19))
        held.append(b"x" * (60 << 20))
        held.append(Path(__file__).open())  # noqa: SIM115

    with pytest.raises(SystemExit, match="memory grows: rss, tensors, tensor_bytes, f"):
        soak.main(SHORT, planted=leak)
    assert capsys.readouterr().out.count("GROWS") == 4


def test_tensors_of_compilers_do_not_count(soak: ModuleType) -> None:
    before = soak.sample(0, 0.0, "cpu")
    weight = make(32, 64)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    held = [
        mode.from_tensor(one, static_shapes=False)
        for one in (torch.ones(4096), weight, torch.ones(7, 5))
    ]
    held.append(nn.LazyLinear(4).weight)
    after = soak.sample(0, 0.0, "cpu")
    parts = 4  # words, scales, biases, and the tensor of them
    assert 1 <= after.tensors - before.tensors <= parts
    assert after.tensor_bytes - before.tensor_bytes < 32 * 64 * 5
    assert len(held) == 4


def test_what_grows_is_told_from_what_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    soak = importlib.import_module("soak")

    def samples(rss: list[int]) -> list[object]:
        return [
            soak.Sample(i, float(i), mib << 20, 9, 9, 9) for i, mib in enumerate(rss)
        ]

    steady = [100 if i < 20 else 500 + 300 * (i % 7 == 0) for i in range(100)]
    assert not soak.growth(samples(steady))["rss"].fails  # warm-up and peaks
    rising = [500 + i for i in range(100)]
    found = soak.growth(samples(rising))
    assert found["rss"].fails
    assert found["rss"].allowed < found["rss"].late - found["rss"].early < 80 << 20
    assert not found["files"].fails
