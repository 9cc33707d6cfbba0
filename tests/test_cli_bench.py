"""`affine-tensor bench`: what is counted, and who is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from test_cli import run_main

from affine_tensor.cli import bench

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DENSE, SHIPPED = EXAMPLES / "stdlib-6m", EXAMPLES / "stdlib-6m-4bit"
SMALL = ("--prompt-tokens", "5", "9", "--decode", "3", "--rounds", "2")

Capture = pytest.CaptureFixture
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr("affine_tensor.kernels.machine.default_kind", lambda: "cpu")


def job(source: Path = SHIPPED, **more: Any) -> dict[str, Any]:
    return {
        "name": bench.OURS,
        "source": str(source),
        "prompt_tokens": [5],
        "decode": 3,
        "batch": 1,
        "rounds": 1,
        "device": "cpu",
        "dtype": "auto",
        "revision": None,
        "attention": None,
        "fuse": False,
        "compile": False,
        **more,
    }


def test_speeds_are_tokens_over_seconds(monkeypatch: Patch) -> None:
    """The first round does not count, and all sequences do."""

    class Contestant:
        device, load_seconds = "cpu", 0.5

        def __init__(self, job: dict[str, Any]) -> None:
            self.taken = iter([(9.0, 9.0), (1.0, 2.0), (2.0, 4.0), (4.0, 1.0)])

        def time(self, count: int) -> tuple[float, float]:
            return next(self.taken)

        def peak_bytes(self) -> int:
            return 7

    monkeypatch.setattr(bench, "Transformers", Contestant)
    found = bench.run(job(prompt_tokens=[16], decode=8, batch=2, rounds=3))
    (row,) = found["rows"]
    assert row["prefill"] == {
        "median": 16.0,
        "least": 8.0,
        "most": 32.0,
        "values": [32.0, 16.0, 8.0],
    }
    assert row["decode"]["values"] == [8.0, 4.0, 16.0]
    assert (found["peak_bytes"], found["load_seconds"]) == (7, 0.5)


def test_for_programs(monkeypatch: Patch, capsys: Capture) -> None:
    options = (*SMALL, "--batch", "2", "--fuse", "--json")
    assert run_main(monkeypatch, "bench", str(SHIPPED), *options) == 0
    value = json.loads(capsys.readouterr().out)
    (found,) = value["results"]
    assert (found["name"], found["device"]) == ("affine-tensor", "cpu")
    assert [row["prompt_tokens"] for row in found["rows"]] == [5, 9]
    for row in found["rows"]:
        for kind in ("prefill", "decode"):
            own = row[kind]
            assert len(own["values"]) == 2
            assert 0 < own["least"] <= own["median"] <= own["most"]
    assert found["peak_bytes"] > 10**7
    assert value["missing"] == {}


def test_end_tokens_end_nothing_and_all_tokens_are_timed() -> None:
    made = bench.Transformers(job(decode=20))
    asked: list[dict[str, Any]] = []
    stock = made.loaded.model.generate

    def generate(*args: Any, **options: Any) -> Any:
        asked.append(options)
        result = stock(*args, **options)
        assert result.shape == (1, 5 + 21)
        assert len(options["streamer"].times) == 22  # and one of the prompt
        return result

    made.loaded.model.generate = generate
    # The likeliest token is an end token everywhere.
    head = made.loaded.model.lm_head
    made.loaded.model.lm_head = Favouring(head)
    first, rest = made.time(5)
    assert first > 0
    assert rest > 0
    assert len(asked) == 1


class Favouring(torch.nn.Module):
    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        logits[..., 0] = 1e4
        return logits


def test_compile_asks_torch(monkeypatch: Patch) -> None:
    calls: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        calls.append(options)
        return function

    made = bench.Transformers(job(compile=True))
    monkeypatch.setattr(torch, "compile", compile)
    made.time(5)
    assert len(calls) >= 1


def test_mlx_lm_in_a_process_of_its_own() -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is a peer")
    results, missing = bench._one_by_one(job(), ["mlx-lm"])
    assert missing == {}
    (found,) = results
    assert (found["name"], found["device"]) == ("mlx-lm", "cpu")
    assert found["rows"][0]["decode"]["median"] > 0


def test_the_dense_twin_is_dense() -> None:
    made = bench.Transformers(job(name="dense"))
    assert not made.loaded.packed
    assert type(made.loaded.model.lm_head.weight) is torch.nn.Parameter
    with pytest.raises(ValueError, match="MODEL is dense itself"):
        bench.Transformers(job(DENSE, name="dense"))


def test_a_peer_that_fails_is_a_line(monkeypatch: Patch, capsys: Capture) -> None:
    def run(command: list[str], input: str, **options: Any) -> Any:
        name = json.loads(input)["name"]
        summary = {"median": 2.0, "least": 1.0, "most": 3.0, "values": [2.0, 1.0, 3.0]}
        row = {"prompt_tokens": 5, "prefill": summary, "decode": summary}
        answers = {
            "affine-tensor": {
                "name": name,
                "device": "cpu",
                "load_seconds": 0.5,
                "peak_bytes": 3_000_000,
                "rows": [row],
            },
            "mlx-lm": {"error": "no such model"},
        }
        text = json.dumps(answers[name]) if name in answers else "Killed"

        class Done:
            stdout, stderr, returncode = f"a bar\n{text}\n", "out of memory\n", -9

        return Done()

    monkeypatch.setattr(bench.subprocess, "run", run)
    options = (*SMALL, "--peer", "mlx-lm", "dense")
    assert run_main(monkeypatch, "bench", "a-model", *options) == 0
    assert_expected_inline(
        capsys.readouterr().out,
        """\
model          a-model
affine-tensor  cpu, loaded in 0.50 s, peak memory 3 MB

               prompt  prefill, tokens/s  decode, tokens/s
affine-tensor       5   2.0 (1.0 to 3.0)  2.0 (1.0 to 3.0)
mlx-lm: not measured: no such model
dense: not measured: its process ended with -9: out of memory

1 sequence, 3 tokens decoded; medians of 2 rounds (least to most)
""",
    )


def test_what_is_refused(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def failed(*arguments: str) -> str:
        assert run_main(monkeypatch, "bench", *arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "\naffine-tensor: " in f"\n{err}"
        return str(err)

    line = failed(str(SHIPPED), "--prompt-tokens", "2000", "--decode", "64")
    assert "2065 tokens (--prompt-tokens and --decode) are more than the 2048" in line
    assert "neither a folder" in failed("no-such-model")
    with pytest.raises(ValueError, match="--batch 1"):
        bench.MlxLm(job(batch=2))


def test_no_tokenizer_is_needed(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    ignored = shutil.ignore_patterns("token*")
    folder = shutil.copytree(SHIPPED, tmp_path / "m", ignore=ignored)
    options = ("--prompt-tokens", "4", "--decode", "2", "--rounds", "1")
    assert run_main(monkeypatch, "bench", str(folder), *options) == 0
    head, *_, last = capsys.readouterr().out.splitlines()
    assert head.endswith(str(folder))
    assert last == "1 sequence, 2 tokens decoded; medians of 1 round (least to most)"


def test_a_wrong_command_line(monkeypatch: Patch, capsys: Capture) -> None:
    for options in (
        ("--peer", "llama.cpp"),
        ("--prompt-tokens", "0"),
        ("--decode", "0"),
        ("--rounds", "0"),
        ("--batch", "0"),
    ):
        assert run_main(monkeypatch, "bench", "x", *options) == 2
    assert "--batch" in capsys.readouterr().err
    # Also where the model is loaded by a process of its own.
    options = ("--attention", "bogus", "--peer", "dense")
    assert run_main(monkeypatch, "bench", str(SHIPPED), *options) == 2
    assert "--attention bogus: allowed are eager, " in capsys.readouterr().err
