"""Checkpoints with their towers speak in stock transformers models as the dense twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_vision import CASES
from seeing import (
    Seeing,
    dense_twin,
    stock_model,
    write_by_hand,
    write_with_mlx_vlm,
)
from transformers import CONFIG_MAPPING

from affine_tensor import AffineQuantizedTensor, load_checkpoint_, save_checkpoint
from affine_tensor.checkpoint.files import open_checkpoint
from affine_tensor.checkpoint.load import make_plan
from affine_tensor.checkpoint.names import Names

pytest.importorskip("mlx_lm", reason="mlx-lm, which comes with MLX, is missing")

TOLERANCE = 1e-5  # relative L2 of the float32 logits


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Seeing:
    found: Seeing = request.param
    if found.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {found.model_type}")
    return found


def write(case: Seeing, twin: Any, folder: Path) -> None:
    (write_with_mlx_vlm if case.mlx_lm else write_by_hand)(case, twin, folder)


def logits(model: Any, case: Seeing, brighter: float = 0.0) -> torch.Tensor:
    inputs = case.inputs()
    inputs["pixel_values"] += brighter
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    stored = open_checkpoint(folder).tensors
    return {name: tensor.read() for name, tensor in stored.items()}


def assert_same_tensors(new: Path, old: Path) -> None:
    got, want = tensors_of(new), tensors_of(old)
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.shape == want[name].shape, name
        assert torch.equal(tensor, want[name]), name


def test_logits_are_those_of_the_twin(case: Seeing, tmp_path: Path) -> None:
    twin = dense_twin(case)
    want = logits(twin, case)
    assert relative_l2(logits(twin, case, brighter=1.0), want) > 1e-3  # it does look
    write(case, twin, tmp_path)
    model = stock_model(case)
    plan = make_plan(model, open_checkpoint(tmp_path))

    report = load_checkpoint_(model, tmp_path)

    assert report.ignored == []
    stored = tensors_of(tmp_path)
    parameters = dict(model.named_parameters())
    packed = set()
    for item in [*plan.items, *plan.repeated]:
        stems = [name.removesuffix(".weight") for name in item.leaves]
        quantized = [stem for stem in stems if f"{stem}.scales" in stored]
        packed |= set(quantized)
        value = parameters.get(item.target.name)
        assert isinstance(value, AffineQuantizedTensor) == bool(quantized)
    assert packed == {
        n.removesuffix(".scales") for n in stored if n.endswith(".scales")
    }
    assert relative_l2(logits(model, case), want) < TOLERANCE


def test_mlx_vlm_writes_what_the_table_says(case: Seeing, tmp_path: Path) -> None:
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is missing")
    if case.mlx_lm:
        pytest.skip("mlx-lm writes this one")
    twin = dense_twin(case)
    write_by_hand(case, twin, tmp_path / "ours")
    write_with_mlx_vlm(case, twin, tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_saving_gives_the_same_file_back(case: Seeing, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    write(case, dense_twin(case), first)
    model = stock_model(case)
    load_checkpoint_(model, first)

    save_checkpoint(model, again)

    assert_same_tensors(again, first)
