"""`examples/finetune.py` by its command, with few steps and an eighth of its corpus."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft makes the adapters")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_capitals_are_learnt_and_kept_in_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_fallback: None,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("finetune")
    corpus = example.load_corpus()
    part = dataclasses.replace(corpus, train=corpus.train[::8])
    monkeypatch.setattr(example, "load_corpus", lambda: part)
    options = ["--steps", "12", "--prompts", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    example.main()
    text = capsys.readouterr().out
    before, after = (
        int(re.search(rf"^{word}: (\d+)% of the letters", text, re.M)[1])  # type: ignore[index]
        for word in ("before", "after")
    )
    assert before < 10
    assert after > before + 15
    again = re.search(
        r"loaded again: (\d+)% with the adapter, (\d+)% merged at 8 bits", text
    )
    assert again is not None
    assert int(again[1]) == after  # the same weights, and the same kernels
    assert int(again[2]) > before + 15
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"]["bits"] == 8
    assert (tmp_path / "mlx" / "tokenizer.json").is_file()
