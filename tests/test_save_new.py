"""Models that never were MLX checkpoints are saved such that mlx-lm says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import Case, drawn_by_transformers, mlx_logits
from test_architectures import CASES, relative_l2
from transformers import CONFIG_MAPPING

from affine_tensor import AffineConfig, quantize_, save_checkpoint
from affine_tensor.checkpoint.names import Names


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mlx_lm_speaks_as_the_model_that_was_saved(
    case: Case, packed: bool, tmp_path: Path
) -> None:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {case.model_type}")
    model = drawn_by_transformers(
        case, tmp_path / "config", attn_implementation="eager"
    ).eval()
    # Nothing but the model says how it is configured.
    model.config._name_or_path = ""
    # What mlx-lm has no place for must be zero; see below.
    names = Names(model)
    for name, tensor in model.state_dict().items():
        tensor.mul_(not names.is_absent(name))
    if packed:
        quantize_(model, AffineConfig(bits=case.bits, group_size=case.group_size))

    # MLX groups a part of latent attention along the other axis: that part becomes dense.
    report = save_checkpoint(model, tmp_path / "saved", unsupported="dense")

    assert all(name.endswith(".embed_q.weight") for name in report.changed)
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    input_ids = torch.randint(vocabulary, (2, case.tokens), generator=generator)
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    error = relative_l2(logits, mlx_logits(tmp_path / "saved", input_ids))
    assert error < case.tolerance


def test_what_mlx_has_no_place_for_is_not_left_out_in_silence(tmp_path: Path) -> None:
    # The router's correction, which mlx-lm does not apply.
    case = next(case for case in CASES if case.model_type == "ernie4_5_moe")
    model = drawn_by_transformers(case, tmp_path / "config")

    with pytest.raises(ValueError, match="e_score_correction_bias: left out"):
        save_checkpoint(model, tmp_path / "saved")

    report = save_checkpoint(model, tmp_path / "saved", unsupported="dense")
    left_out = [name for name in report.changed if "correction_bias" in name]
    assert left_out == list(report.changed)
    assert left_out
