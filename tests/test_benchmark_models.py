"""`benchmarks/models.py` with a tiny Llama."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import wrapped
from expecttest import assert_expected_inline

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("models", monkeypatch)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("peers_files", monkeypatch)


# ---- the command ------------------------------------------------------------------


def test_command(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, markdown = tmp_path / "models.json", tmp_path / "models.md"
    before = torch.get_num_threads()
    benchmark.main(
        [
            *("--sizes", "tiny", "--only", "transformers", "ours", "--threads", "1"),
            *("--rounds", "2", "--json", str(figures), "--markdown", str(markdown)),
        ]
    )
    torch.set_num_threads(before)
    text = capsys.readouterr().out
    assert markdown.read_text() == text
    assert "| ours | " in text
    found = json.loads(figures.read_text())
    assert found["missing"] == {}
    assert [one["name"] for one in found["results"]] == ["transformers", "ours"]
    for one in found["results"]:
        assert 1e-4 < one["error"] < 0.03  # bfloat16
        assert one["load_seconds"] > 0
        assert one["versions"]["torch"] == torch.__version__
        for kind in ("decode", "prefill 8", "prefill 16"):
            assert len(one[kind]["values"]) == 2
            assert one[kind]["least"] > 0
    assert found["reference"] == "ours"
    assert found["results"][1]["decode"]["ours_over_it"] == 1


def test_a_peer_that_is_missing_is_named(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"")
    monkeypatch.setattr(benchmark, "write", lambda *_: file)
    options = ["--sizes", "tiny", "--only", "llama-q4_0", "--llama-python"]

    def why(python: str) -> str:
        found = benchmark.measure(benchmark.parser().parse_args([*options, python]))
        assert found["results"] == []
        assert f"- not measured: llama-q4_0: {found['missing']['llama-q4_0']}" in (
            benchmark.table(found)
        )
        return found["missing"]["llama-q4_0"]

    assert "No such file or directory" in why(str(tmp_path / "python"))
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable} -S\nraise SystemExit('not today')\n")
    script.chmod(0o755)
    assert why(str(script)) == "load: it ended, not today"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    assert "No module named 'peers_llama'" in why(str(script))


def test_ours_may_not_be_missing(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise ImportError("no reason")

    monkeypatch.setattr(benchmark, "write", write)
    with pytest.raises(SystemExit, match="1"):
        benchmark.main(["--sizes", "tiny", "--only", "ours"])


# ---- what is checked --------------------------------------------------------------


def test_reference_is_that_of_transformers(files: ModuleType, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    size, ids = files.SIZES["tiny"], [3, 1, 4, 1, 5, 9, 2, 6]
    path = files.write(tmp_path, size, "dense")
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -3:]
    got = files.reference(files.weights(path, size, "dense"), size, ids, 3)
    # transformers takes the angles of its rotation, and the norms, in float32.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_reference_is_that_of_mlx_lm(
    files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx, the peer, is not installed")
    contestant = module("peers_mlx", monkeypatch).MlxLm(1, 16)
    size, ids = files.SIZES["tiny"], [3, 1, 4, 1, 5, 9, 2, 6]
    path = files.write(tmp_path, size, "mlx")
    contestant.load(path)
    contestant.model.set_dtype(mx.float32)
    run = contestant.run(ids, 3, keep_logits=True)
    weight = files.weights(path, size, "mlx")
    expected = files.reference(weight, size, ids + run.tokens[:-1], 3)
    error = (torch.from_numpy(run.logits) - expected).norm() / expected.norm()
    assert error < 3e-6


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_gguf_holds_the_same_weights(
    files: ModuleType, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("gguf", reason="gguf, which writes for llama.cpp, is missing")
    size = files.SIZES["tiny"]
    dense = files.weights(files.write(tmp_path, size, "dense"), size, "dense")
    stored = files.weights(files.write(tmp_path, size, kind), size, kind)
    for name in ("lm_head", "model.layers.1.self_attn.k_proj", "model.norm"):
        expected = dense(f"{name}.weight").float()
        step = expected.abs().max() / 8
        difference = (stored(f"{name}.weight") - expected).abs().max()
        assert difference <= (0 if name == "model.norm" else step)


def test_rows_of_q_and_k_are_turned_around(files: ModuleType) -> None:
    size = files.Size(1, 16, 2, 1, 16, 16)  # heads of 8 rows
    rows = torch.arange(16.0)[:, None]
    turned = files._interleaved("q_proj.weight", rows, size)
    assert turned[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert turned[8:, 0].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]
    back = files._interleaved("q_proj.weight", turned, size, back=True)
    assert back.equal(rows)
    assert files._interleaved("v_proj.weight", rows, size) is rows


def test_a_wrong_answer_is_not_timed(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy

    monkeypatch.setattr(benchmark, "_expected", lambda *_: torch.ones(4, 8).double())

    class Fake:
        log = tmp_path / "fake.log"
        answer = torch.ones(4, 8)

        def ask(self, do: str, timeout: float, save: str, **_: Any) -> dict[str, Any]:
            numpy.save(save, self.answer.numpy())
            return {"tokens": [0, 1, 2, 3]}

    worker, size = Fake(), benchmark.SIZES["tiny"]
    assert benchmark._error(worker, "ours", tmp_path, size) == 0
    worker.answer[3] = 0.85  # the last of the tokens
    with pytest.raises(benchmark.WorkerError, match=r"relative error 0\.15"):
        benchmark._error(worker, "ours", tmp_path, size)
    worker.answer[0] = torch.nan
    with pytest.raises(benchmark.WorkerError, match="relative error nan"):
        benchmark._error(worker, "ours", tmp_path, size)


# ---- speeds -----------------------------------------------------------------------


def test_who_is_too_slow_is_timed_once(benchmark: ModuleType) -> None:
    class Fake:
        def ask(self, *_: Any, **asked: Any) -> dict[str, float]:
            return {"first": 1.6, "rest": 0.3}  # 10 tokens a second, both

    size = benchmark.SIZES["llama"]
    # 128 tokens and 63 more take 19.1 s, 512 take 51.2 s.
    trial = benchmark._trial
    assert trial(Fake(), size, 60) == {}
    assert trial(Fake(), size, 20) == {"prefill 512": pytest.approx(10)}
    assert list(trial(Fake(), size, 15)) == ["decode", "prefill 512"]
    assert trial(Fake(), size, 15)["decode"] == pytest.approx(10)


def speed(*values: float, once: bool = False) -> dict[str, Any]:
    ends = {"median": sorted(values)[len(values) // 2], "least": min(values)}
    return {**ends, "most": max(values), "values": list(values), "once": once}


def test_table(benchmark: ModuleType) -> None:
    def one(name: str, decode: Any, prefill: Any, **more: Any) -> dict[str, Any]:
        common = {"label": name, "versions": {}, "notes": "", "load_peak_bytes": 2**30}
        loaded = {"load_seconds": 1.23, "error": 0.0123, **common, **more}
        return {"name": name, **loaded, "decode": decode, "prefill 128": prefill}

    results = [
        one("ours", speed(10, 12, 11), speed(100, 100, 100)),
        one("ours-compiled", speed(20, 24, 22), speed(98, 99, 97)),
        one("llama-q4_0", speed(10, 8, 11), speed(49, 33, 97), notes="built with care"),
        one("mlx-lm", speed(0.044, once=True), speed(97, 99, 98), load_peak_bytes=None),
    ]
    reference = benchmark._add_ratios(results)
    settings = {"new": 64, "prompt": 128, "rounds": 3, "threads": 2, "trial": (16, 4)}
    found = {
        **{
            "model": "A Llama",
            "settings": settings,
            "missing": {"torchao": "no torchao"},
        },
        **{"reference": reference, "results": results},
    }
    assert_expected_inline(
        wrapped(benchmark.table(found)),
        """\
A Llama. Decoding: 64 tokens after a prompt of 128. Medians of 3 rounds
  (least to most), 2 threads each.
- built with care
- not measured: torchao: no torchao

|  | decode, tokens/s | ours / it | prefill 128, tokens/s | ours / it |
  error | load s | load peak GB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| ours | 11.0 (10.0 to 12.0) | 2.00 | 100 (100 to 100) | 0.98 | 1.2e-02 |
  1.2 | 1.07 |
| ours-compiled | 22.0 (20.0 to 24.0) | 1.00 | 98.0 (97.0 to 99.0) | 1.00 |
  1.2e-02 | 1.2 | 1.07 |
| llama-q4_0 | 10.0 (8.0 to 11.0) | 2.00 | 49.0 (33.0 to 97.0) | 2.00 |
  1.2e-02 | 1.2 | 1.07 |
| mlx-lm | 0.04 * | 500.00 | 98.0 (97.0 to 99.0) | 1.00 | 1.2e-02 | 1.2 |  |

ours / it: "ours-compiled" over it, more than 1 is where ours is faster.
  error: relative L2 of the logits against float64 with the contestant's own
  weights. load peak: resident memory above what the process had before
  (torchao quantizes a dense model, and that is in it; transformers maps a
  dense file, and has not read it yet). \\*: too slow; timed once, 4 tokens
  after a prompt of 16.""",
    )


def test_picture(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is missing")
    one = {"label": "ours", "decode": speed(1.0), "prefill 128": speed(200.0)}
    found = {"model": "A Llama", "machine": {"cpu": "a CPU"}, "results": [one]}
    benchmark.draw(str(tmp_path / "a.png"), found)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
