"""`mutants.py` still changes what it means to change."""

from __future__ import annotations

from mutants import MUTANTS

from affine_tensor.kernels import shaders


def test_texts_are_there() -> None:
    for mutant in MUTANTS:
        text = (shaders() / "metal" / mutant.source).read_text()
        assert mutant.applied(text) != text, mutant


def test_names_differ() -> None:
    names = [(mutant.source, mutant.what) for mutant in MUTANTS]
    assert len(names) == len(set(names))
