"""What would load without a word and compute something else, of `cases_other.py`.

Each test takes one piece of the handling away and sees the logits change.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from architectures import Case, drawn_by_mlx, mlx_logits, write_mlx_checkpoint
from cases_other import CASES
from test_architectures import relative_l2, stock_model

from affine_tensor import AffineQuantizedTensor, load_checkpoint_, save_checkpoint
from affine_tensor.checkpoint import names
from affine_tensor.checkpoint.forms import Transposed

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))


def case_of(model_type: str) -> Case:
    return next(case for case in CASES if case.model_type == model_type)


def error(case: Case, folder: Path) -> float:
    model = stock_model(folder, case)
    load_checkpoint_(model, folder)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    return relative_l2(logits, mlx_logits(folder, IDS))


def test_rows_of_gate_and_up_alternate_in_gpt_oss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("gpt_oss")
    write_mlx_checkpoint(case, tmp_path)
    assert error(case, tmp_path) < case.tolerance

    monkeypatch.setattr(names, "interleaved", torch.arange)

    assert error(case, tmp_path) > 0.01


def test_square_experts_of_gpt_oss_are_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Width and intermediate size are equal, as in the published models.
    case = case_of("gpt_oss")
    write_mlx_checkpoint(case, tmp_path)

    only_others(monkeypatch)

    assert error(case, tmp_path) > 0.01


def test_square_projections_of_gpt2_are_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("gpt2")
    write_mlx_checkpoint(case, tmp_path)
    assert error(case, tmp_path) < case.tolerance

    only_others(monkeypatch)

    assert error(case, tmp_path) > 0.01


def only_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposes no weight that is square, for which nobody would see it."""
    original = Transposed.loaded

    def loaded(self: Transposed, value: torch.Tensor) -> torch.Tensor:
        square = value.shape[-1] == value.shape[-2]
        return value if square else original(self, value)

    monkeypatch.setattr(Transposed, "loaded", loaded)
    monkeypatch.setattr(Transposed, "saved", loaded)


@pytest.mark.parametrize("bits", [4, 8])
def test_gpt_oss_with_experts_of_mxfp4(bits: int, tmp_path: Path) -> None:
    """As mlx-lm converts OpenAI's files: the experts stay as they are, the rest becomes
    affine."""
    case = case_of("gpt_oss")
    first, again = tmp_path / "first", tmp_path / "again"
    write_with_experts_of_mxfp4(case, first, bits)

    assert error(case, first) < case.tolerance

    model = stock_model(first, case)
    load_checkpoint_(model, first)
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            assert isinstance(weight, AffineQuantizedTensor)
            assert weight.transposed
            assert (weight.bits, weight.group_size) == (5, 32)
    save_checkpoint(model, again)
    got, want = mlx_logits(again, IDS), mlx_logits(first, IDS)
    assert relative_l2(got, want) < case.tolerance


def write_with_experts_of_mxfp4(case: Case, folder: Path, bits: int) -> None:
    from mlx import nn
    from mlx_lm.utils import quantize_model, save_config, save_model

    affine = folder.with_name("affine")
    write_mlx_checkpoint(case, affine)
    model, config = drawn_by_mlx(affine)
    mxfp4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    nn.quantize(
        model,
        **mxfp4,
        class_predicate=lambda path, _: ".experts." in path and "_proj" in path,
    )
    config |= {"quantization": dict(mxfp4)}
    with redirect_stdout(StringIO()):  # it prints the bits per weight
        model, config = quantize_model(model, config, 64, bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
