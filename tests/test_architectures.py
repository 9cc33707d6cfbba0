"""Checkpoints written by mlx-lm speak in stock transformers models as in mlx-lm."""

from __future__ import annotations

import json
import re
from pathlib import Path

import architectures
import cases_experts
import cases_latent
import cases_other
import cases_recurrent
import cases_seeing
import pytest
import torch
from architectures import (
    Case,
    leave_out_,
    mlx_logits,
    mlx_quantized_modules,
    transformers_model,
    write_mlx_checkpoint,
)
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedModel,
)

from affine_tensor import AffineQuantizedTensor, load_checkpoint_, save_checkpoint
from affine_tensor.checkpoint.files import open_checkpoint
from affine_tensor.checkpoint.load import Plan, make_plan
from affine_tensor.checkpoint.names import Names

CASES = [
    *architectures.CASES,
    *cases_experts.CASES,
    *cases_latent.CASES,
    *cases_recurrent.CASES,
    *cases_seeing.CASES,
    *cases_other.CASES,
]

pytest.importorskip("mlx_lm", reason="mlx-lm, which writes the checkpoints, is missing")


def stock_model(folder: Path, case: Case) -> PreTrainedModel:
    if case.towers or case.mlx_type:
        # mlx-lm leaves their configurations out too. The defaults are of large ones.
        written = json.loads((folder / "config.json").read_text())
        written = {**case.config, **written, "model_type": case.model_type}
        config = CONFIG_MAPPING[case.model_type].from_dict(written)
    else:
        config = AutoConfig.from_pretrained(folder)
    # Only the eager attention of transformers soft-caps Gemma 2's logits in all its
    # versions.
    model: PreTrainedModel = transformers_model(
        case, config, attn_implementation="eager"
    )
    leave_out_(model, case.towers)
    return model.eval()


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def check_packed(model: nn.Module, plan: Plan, case: Case, folder: Path) -> None:
    """Every weight that mlx-lm has quantized went into a packed parameter of the same
    bits and group size, or into one that the case says is dense."""
    quantized = mlx_quantized_modules(folder)
    parameters = dict(model.named_parameters())
    seen = {}
    for item in [*plan.items, *plan.repeated]:
        stems = [name.removesuffix(".weight") for name in item.leaves]
        stems = [stem for stem in stems if stem in quantized]
        seen.update(dict.fromkeys(stems, item.target.name))
        parameter = parameters[item.target.name] if stems else None
        if any(re.search(pattern, item.target.name) for pattern in case.dense):
            assert not isinstance(parameter, AffineQuantizedTensor), item.target.name
        elif stems:
            assert isinstance(parameter, AffineQuantizedTensor), item.target.name
            formats = {quantized[stem] for stem in stems}
            assert formats == {(parameter.bits, parameter.group_size)}
    ignored = Names(model).is_ignored
    assert seen.keys() == {n for n in quantized if not ignored(f"{n}.weight")}


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_speaks_as_in_mlx_lm(case: Case, folder: Path) -> PreTrainedModel:
    model = stock_model(folder, case)
    before = classes(model)
    plan = make_plan(model, open_checkpoint(folder))

    load_checkpoint_(model, folder)

    assert classes(model) == before
    check_packed(model, plan, case, folder)
    if model.config.get_text_config().tie_word_embeddings:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert head is None or head.weight is embedding.weight

    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    input_ids = torch.randint(vocabulary, (2, case.tokens), generator=generator)
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    assert logits.dtype == torch.float32
    error = relative_l2(logits, mlx_logits(folder, input_ids))
    assert error < case.tolerance
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_mlx_lm(case: Case, tmp_path: Path) -> None:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {case.model_type}")
    write_mlx_checkpoint(case, tmp_path)
    assert_speaks_as_in_mlx_lm(case, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_are_those_of_mlx_lm_with_scales_of_16_bits(
    dtype: str, tmp_path: Path
) -> None:
    write_mlx_checkpoint(CASES[0], tmp_path, dtype=dtype)
    assert_speaks_as_in_mlx_lm(CASES[0], tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saving_gives_the_same_file_back(case: Case, tmp_path: Path) -> None:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {case.model_type}")
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first)
    model = stock_model(first, case)
    load_checkpoint_(model, first)

    save_checkpoint(model, again)

    old, new = tensors_of(first), tensors_of(again)
    assert new.keys() - old.keys() == set()
    left_out = {n for n in old.keys() - new.keys() if not Names(model).is_ignored(n)}
    assert left_out == set()
    for name in new.keys() - Names(model).unread.keys():
        tensor = new[name]
        assert (tensor.dtype, tensor.shape) == (old[name].dtype, old[name].shape), name
        assert torch.equal(tensor, old[name]), name
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    input_ids = torch.randint(vocabulary, (1, case.tokens), generator=generator)
    assert torch.equal(mlx_logits(again, input_ids), mlx_logits(first, input_ids))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    stored = open_checkpoint(folder).tensors
    return {name: tensor.read() for name, tensor in stored.items()}
