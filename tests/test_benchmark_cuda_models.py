"""`benchmarks/cuda_models.py` with a tiny Llama: on a CPU, and on a GPU if there is one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_graphs
import pytest
import torch

import affine_tensor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With CUDA graphs that are recorded, and computed again, on the CPU."""
    found = module("cuda_models", monkeypatch)
    if not torch.cuda.is_available():
        fake_graphs.install(monkeypatch, module("cuda_clock", monkeypatch))
    return found


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("cuda_llama", monkeypatch)


NAMES = ("ours", "ours-fused", "transformers", "tinygemm")


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"
            ),
        ),
    ],
)
def test_command(
    device: str,
    benchmark: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures, markdown = tmp_path / "m.json", tmp_path / "m.md"
    names = [n for n in NAMES if "fused" not in n or hasattr(affine_tensor, FUSE)]
    benchmark.main(
        [
            *("--tiny", "--device", device, "--rounds", "2", "--only", *names),
            *("--batches", "1", "3", "--folder", str(tmp_path)),
            *("--json", str(figures), "--markdown", str(markdown)),
        ]
    )
    assert "| ours | " in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["missing"] == {}
    assert [one["name"] for one in found["results"]] == names
    for one in found["results"]:
        assert one["notes"] == []
        assert list(one["speeds"]) == [
            "decode, batch 1",
            "decode, batch 3",
            "prefill 8",
            "prefill 8, CUDA graph",
            "prefill 16",
            "prefill 16, CUDA graph",
        ]
        assert set(one["errors"]) == {"batch 1", "batch 3"}
        assert all(1e-4 < error < 0.03 for error in one["errors"].values())  # bfloat16
    assert found["reference"].startswith("ours")
    assert found["file_bytes"] > 0
    # The checkpoint is taken again.
    benchmark.main(
        [
            *("--tiny", "--device", device, "--rounds", "1", "--only", "ours"),
            *("--batches", "1", "--prefills", "--folder", str(tmp_path)),
            *("--json", str(figures)),
        ]
    )
    again = json.loads(figures.read_text())
    assert "made" not in again
    assert list(again["results"][0]["speeds"]) == ["decode, batch 1"]


FUSE = "fuse_projections"


def test_what_is_wrong_is_not_timed(
    benchmark: ModuleType, llama: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(folder: Path, kind: str) -> Any:
        model = llama.ours(folder, kind)
        model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
        return model

    entry = llama.Entry("ours", spoiled, limit=0.05)
    monkeypatch.setitem(llama.ENTRIES, "ours", entry)
    arguments = ["--tiny", "--device", "cpu", "--only", "ours", "--batches", "1"]
    with pytest.raises(SystemExit, match=r"ours: wrong, batch 1: relative error"):
        benchmark.main(arguments)


def test_a_contestant_that_fails_is_named(
    benchmark: ModuleType, llama: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("no memory\nand more")

    monkeypatch.setitem(llama.ENTRIES, "tinygemm", llama.Entry("tinygemm", fail))
    options = benchmark._options(["--tiny", "--device", "cpu", "--only", "tinygemm"])
    figures: dict[str, Any] = {}
    benchmark.measure(options, figures)
    assert figures["missing"] == {"tinygemm": "no memory"}
    assert figures["results"] == []
    late = ["--tiny", "--device", "cpu", "--only", "ours", "--time-limit", "1e-9"]
    benchmark.measure(benchmark._options(late), figures)
    assert figures["missing"] == {"ours": "the time limit was reached"}


@torch.inference_mode()
def test_steps_decode_as_generate_does(
    benchmark: ModuleType, llama: ModuleType, tmp_path: Path
) -> None:
    size = llama.SIZES["tiny"]
    llama.write(tmp_path / "m", size, "cpu")
    model = affine_tensor.from_pretrained(tmp_path / "m", dtype="float32")
    prompt = llama.prompt_of(size, 2, 6, "cpu")
    steps = llama.Steps(model, 2, 20, "cpu")
    for _ in range(2):  # a second prompt takes the place of the first
        steps.read(prompt)
        found = [steps.ids.clone()]
        for _ in range(7):
            steps.step()
            found.append(steps.ids.clone())
    with torch.no_grad():
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
        )
    assert torch.equal(torch.cat(found, 1), expected[:, 6:])


def test_mlx_lm(benchmark: ModuleType) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm, the peer, is not installed")
    options = ["--tiny", "--device", "cpu", "--only", "mlx-lm", "--rounds", "1"]
    figures: dict[str, Any] = {}
    benchmark.measure(benchmark._options([*options, "--batches", "1", "3"]), figures)
    assert figures["missing"] == {}
    (one,) = figures["results"]
    assert one["notes"] == []
    assert list(one["speeds"]) == [
        "decode, batch 1",
        "decode, batch 3",
        "prefill 8",
        "prefill 16",
    ]
    assert set(one["errors"]) == {"batch 1", "batch 3"}
    assert all(1e-4 < error < 0.1 for error in one["errors"].values())


def test_mlx_lm_that_is_wrong_is_not_timed(
    benchmark: ModuleType, llama: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm, the peer, is not installed")
    monkeypatch.setattr(module("cuda_runs", monkeypatch), "LIMIT", 1e-6)
    options = ["--tiny", "--device", "cpu", "--only", "mlx-lm", "--batches", "1"]
    figures: dict[str, Any] = {}
    benchmark.measure(benchmark._options(options), figures)
    assert figures["results"] == []
    assert figures["missing"]["mlx-lm"].startswith("wrong, batch 1: relative error")


def test_ratios(benchmark: ModuleType) -> None:
    def one(name: str, label: str, **speeds: float) -> dict[str, Any]:
        own = {what: {"median": value} for what, value in speeds.items()}
        return {"name": name, "label": label, "speeds": own}

    results = [
        one("ours", "ours", decode=50.0, prefill=10.0),
        one("ours-fused", "ours, fused", decode=60.0),
        one("transformers", "bf16", decode=30.0, prefill=20.0),
    ]
    assert benchmark.add_ratios(results) == "ours, fused"
    assert results[2]["speeds"]["decode"]["ours_over_it"] == 2
    assert "ours_over_it" not in results[2]["speeds"]["prefill"]
    assert benchmark.add_ratios([]) is None


def test_errors_count_what_is_no_number(llama: ModuleType) -> None:
    exact = torch.ones(2, 4, dtype=torch.float64)
    logits = torch.ones(3, 2, 4)
    assert llama.error_of(logits, [exact]) == 0
    logits[1, 1, 0] = float("nan")
    assert not llama.error_of(logits, [exact]) < 1
    second = 2 * exact  # every second sequence
    assert llama.error_of(torch.ones(2, 2, 4), [exact, second]) == 0.5
