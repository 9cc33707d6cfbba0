"""Checkpoints written by mlx-lm speak in stock transformers models as in mlx-lm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import (
    CASES,
    TOLERANCE,
    Case,
    mlx_logits,
    mlx_quantized_modules,
    write_mlx_checkpoint,
)
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from affine_tensor import AffineQuantizedTensor, load_checkpoint_

pytest.importorskip("mlx_lm", reason="mlx-lm, which writes the checkpoints, is missing")


def stock_model(folder: Path) -> PreTrainedModel:
    # Only the eager attention of transformers soft-caps Gemma 2's logits in all its
    # versions.
    return AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def packed(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Bits and group size of each module whose weight is packed; a tied weight counts
    where it is first met."""
    return {
        name.removesuffix(".weight"): (parameter.bits, parameter.group_size)
        for name, parameter in model.named_parameters()
        if isinstance(parameter, AffineQuantizedTensor)
    }


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_speaks_as_in_mlx_lm(folder: Path) -> None:
    model = stock_model(folder)
    before = classes(model)

    load_checkpoint_(model, folder)

    assert classes(model) == before
    assert packed(model) == mlx_quantized_modules(folder)
    if model.config.tie_word_embeddings:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert head.weight is embedding.weight

    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(model.config.vocab_size, (2, 24), generator=generator)
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    assert logits.dtype == torch.float32
    assert relative_l2(logits, mlx_logits(folder, input_ids)) < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_mlx_lm(case: Case, tmp_path: Path) -> None:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {case.model_type}")
    write_mlx_checkpoint(case, tmp_path)
    assert_speaks_as_in_mlx_lm(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_are_those_of_mlx_lm_with_scales_of_16_bits(
    dtype: str, tmp_path: Path
) -> None:
    write_mlx_checkpoint(CASES[0], tmp_path, dtype=dtype)
    assert_speaks_as_in_mlx_lm(tmp_path)
