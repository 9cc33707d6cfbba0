"""`examples/encoder.py` by its command, with few steps."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_digits_are_read_and_kept_in_files(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_fallback: None,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("encoder")
    options = ["--steps", "150", "--images", "500"]
    monkeypatch.setattr(sys, "argv", ["encoder.py", *options])
    example.main()
    text = capsys.readouterr().out
    rows = re.findall(r"^(dense|\d bits) +([\d.]+)% +([\d.]+) +([\d.]+)$", text, re.M)
    assert [row[0] for row in rows] == [
        "dense",
        *(f"{bits} bits" for bits in (8, 6, 4, 3, 2)),
    ]
    right = [float(row[1]) for row in rows]
    size = [float(row[2]) for row in rows]
    distance = [float(row[3]) for row in rows]
    assert right[0] > 25  # of ten digits
    assert abs(right[1] - right[0]) < 1
    assert size == sorted(size, reverse=True)
    assert size[3] < size[0] / 3
    assert distance[0] == 0
    assert distance == sorted(distance)
    assert "ViTForImageClassification, the same bits: True" in text
