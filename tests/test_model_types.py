"""Every architecture that mlx-lm and transformers both have is among the cases."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import cases_vision
import pytest
from model_types import ALONE, COUNTERPARTS, UNTESTED
from test_architectures import CASES
from transformers import CONFIG_MAPPING


def test_every_model_type_of_mlx_lm_is_in_one_table() -> None:
    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING

    (folder,) = mlx_lm.models.__path__
    # Not imported: some want packages of their own.
    modules = {
        path.stem
        for path in Path(folder).glob("*.py")
        if re.search(r"^class ModelArgs\b", path.read_text(), re.MULTILINE)
    }
    known = {*COUNTERPARTS, *ALONE}
    assert (modules | set(MODEL_REMAPPING)) - known == set()
    assert COUNTERPARTS.keys() & ALONE.keys() == set()


def test_the_counterparts_are_there() -> None:
    if tuple(map(int, version("transformers").split(".")[:2])) < (5, 23):
        pytest.skip("the table is that of transformers 5.23")
    assert set(COUNTERPARTS.values()) - set(CONFIG_MAPPING) == set()


def test_every_model_type_with_a_counterpart_has_a_case() -> None:
    # By the name of its architecture mlx-lm takes this one for another.
    modules = {"bailing_hybrid": "bailing_moe_v3"}
    by_mlx_lm = [case for case in cases_vision.CASES if case.writer == "mlx_lm"]
    types = [case.mlx_type or case.model_type for case in (*CASES, *by_mlx_lm)]
    tested = {modules.get(name, name) for name in types}
    assert COUNTERPARTS.keys() - tested == UNTESTED.keys()
    assert {case.model_type for case in CASES} <= set(COUNTERPARTS.values())
