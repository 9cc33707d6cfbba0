"""Values that would be wrong without an error: folded multipliers, norms of 1 + w, ..."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import Case, mlx_logits, write_mlx_checkpoint
from cases_recurrent import CASES
from safetensors.torch import save_file
from test_architectures import relative_l2, stock_model, tensors_of
from torch import Tensor, nn

from affine_tensor import load_checkpoint_, save_checkpoint
from affine_tensor.checkpoint import load
from affine_tensor.checkpoint.families import FAMILIES, Family
from affine_tensor.checkpoint.files import CheckpointError
from affine_tensor.checkpoint.files import cast as cast_alone
from affine_tensor.checkpoint.names import Names

INPUT_IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))

# Of a published Falcon-H1, but for the keys, which mlx-lm computes otherwise.
PUBLISHED = {
    "attention_out_multiplier": 0.9375,
    "embedding_multiplier": 5.656854249492381,
    "lm_head_multiplier": 0.0390625,
    "mlp_multipliers": [0.8838834764831844, 0.5859375],
    "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.35355339, 0.25, 0.35355339, 0.5, 0.35355339],
    "ssm_out_multiplier": 0.23570226039551587,
}


def case_of(model_type: str, **config: Any) -> Case:
    """The first case of the type, with other settings."""
    case = next(case for case in CASES if case.model_type == model_type)
    return dataclasses.replace(case, config={**case.config, **config})


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits = model(INPUT_IDS, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def loaded(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = stock_model(folder, case)
    model = model.to(dtype)
    load_checkpoint_(model, folder)
    return model


def change(folder: Path, new: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    """Write another tensor, or others, for each tensor of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in tensors_of(folder).items():
        tensors |= {n: t.contiguous() for n, t in new(name, tensor).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


# ---- without what the family says ----------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("falcon_h1", "falcon_h1"),
        ("qwen3_next", "qwen3_next"),
        ("qwen3_5", "qwen3_5_text"),
        ("qwen3_5_moe", "qwen3_5_moe_text"),
    ],
)
def test_only_the_family_makes_the_numbers_right(
    model_type: str, family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = case_of(model_type)
    write_mlx_checkpoint(case, tmp_path)
    want = mlx_logits(tmp_path, INPUT_IDS)

    right = logits_of(loaded(case, tmp_path))
    monkeypatch.setitem(FAMILIES, family, Family())
    wrong = logits_of(loaded(case, tmp_path))

    assert relative_l2(right, want) < 1e-5
    assert relative_l2(wrong, want) > 1e-2


@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("gemma3n", "gemma3n_text"),
        ("lfm2_moe", "lfm2_moe"),
        ("nemotron_h", "nemotron_h"),
        ("olmo_hybrid", "olmo_hybrid"),
    ],
)
def test_without_the_family_nothing_is_loaded(
    model_type: str, family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = case_of(model_type)
    write_mlx_checkpoint(case, tmp_path)
    monkeypatch.setitem(FAMILIES, family, Family())

    with pytest.raises(CheckpointError, match=r"(missing|unexpected):"):
        loaded(case, tmp_path)


# ---- folded multipliers ----------------------------------------------------------


def on_a_grid(weight: Tensor, group_size: int) -> Tensor:
    """Random multiples of one number in each group, which 4 bits hold without loss."""
    groups = weight.reshape(-1, group_size)
    codes = torch.randint(16, groups.shape)
    codes[:, 0], codes[:, 1] = 0, 15
    zero = torch.randint(1, 15, (len(groups), 1))
    scale = groups.std(1, keepdim=True) / 5
    return ((codes - zero) * scale).view_as(weight)


def test_the_multipliers_are_those_of_mlx_lm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where mlx-lm misses multipliers its logits are no reference. The weights are then
    drawn such that quantizing loses nothing, and those of the file are the original's."""
    factors = {"key_multiplier": 0.390625, "attention_in_multiplier": 1.5}
    case = case_of("falcon_h1", **PUBLISHED, **factors)
    original: list[Any] = []
    perturb_ = architectures._perturb_

    def draw(model: Any) -> None:
        perturb_(model)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.data = on_a_grid(module.weight.data, case.group_size)
        original.append(model.eval())

    monkeypatch.setattr(architectures, "_perturb_", draw)
    write_mlx_checkpoint(case, tmp_path)

    model = loaded(case, tmp_path)

    assert relative_l2(logits_of(model), logits_of(original[0])) < 1e-5
    for name, parameter in original[0].named_parameters():
        own = model.get_parameter(name).detach()
        own = own.dequantize() if hasattr(own, "dequantize") else own
        torch.testing.assert_close(own, parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multipliers_that_are_no_powers_of_two(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    case = case_of("falcon_h1", **PUBLISHED)
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first, dtype=str(dtype).removeprefix("torch."))
    want = mlx_logits(first, INPUT_IDS)

    assert relative_l2(logits_of(loaded(case, first)), want) < 1e-5
    save_checkpoint(loaded(case, first, dtype), again)

    new, old = tensors_of(again), tensors_of(first)
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype, name
        # Divided and multiplied again, in float32: equal after the cast to bfloat16.
        rounding = 2e-7 if dtype == torch.float32 and "conv" not in name else 0
        torch.testing.assert_close(tensor, old[name], rtol=rounding, atol=0)


def test_a_dense_matrix_keeps_the_dtype_of_the_model(tmp_path: Path) -> None:
    case = case_of("falcon_h1", **PUBLISHED)
    write_mlx_checkpoint(case, tmp_path, dtype="bfloat16")
    head = loaded(case, tmp_path).lm_head.weight.detach().dequantize()
    head = (head * PUBLISHED["lm_head_multiplier"]).bfloat16()

    def dense(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.startswith("lm_head."):
            return {name: tensor}
        return {name: head} if name.endswith("weight") else {}

    change(tmp_path, dense)
    model = loaded(case, tmp_path, torch.bfloat16)

    assert model.lm_head.weight.dtype == torch.bfloat16
    want = head.double() / PUBLISHED["lm_head_multiplier"]
    assert relative_l2(model.lm_head.weight.detach(), want) < 2**-8
    assert logits_of(model).dtype == torch.bfloat16


# ---- norms of 1 + w -----------------------------------------------------------------

# Minus one it needs nine bits, and bfloat16 has eight.
AWKWARD = 129 / 512


def awkward(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.endswith("layers.0.input_layernorm.weight"):
        tensor = torch.full_like(tensor, AWKWARD)
    return {name: tensor}


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5"])
def test_a_norm_that_does_not_fit_into_bfloat16(
    model_type: str, tmp_path: Path
) -> None:
    case = case_of(model_type)
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first, dtype="bfloat16")
    change(first, awkward)

    model = loaded(case, first, torch.bfloat16)
    save_checkpoint(model, again)

    layer = model.model.layers[0]
    assert layer.input_layernorm.weight.dtype == torch.float32
    assert bool((layer.input_layernorm.weight == AWKWARD - 1).all())
    assert layer.post_attention_layernorm.weight.dtype == torch.bfloat16
    assert logits_of(model).dtype == torch.bfloat16
    new, old = tensors_of(again), tensors_of(first)
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype, name
        assert torch.equal(tensor, old[name]), name


def test_a_cast_alone_would_change_such_a_norm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = case_of("qwen3_next")
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first, dtype="bfloat16")
    change(first, awkward)
    name = "model.layers.0.input_layernorm.weight"

    def cast(self: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return cast_alone(self.target.name, value, dtype)

    monkeypatch.setattr(load.Planned, "_cast", cast)
    save_checkpoint(loaded(case, first, torch.bfloat16), again)

    assert not torch.equal(tensors_of(again)[name], tensors_of(first)[name])


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5"])
def test_which_norms_are_one_more(model_type: str, tmp_path: Path) -> None:
    case = case_of(model_type)
    write_mlx_checkpoint(case, tmp_path)
    model = stock_model(tmp_path, case)
    names = Names(model)
    differ = {
        name.rpartition(".layers.")[2]
        for name, parameter in model.named_parameters()
        if next(names.forms(name, parameter.shape)).changes_values
    }

    norms = ("input_layernorm", "post_attention_layernorm")
    assert differ == {
        "model.norm.weight",
        *(f"{layer}.{norm}.weight" for layer in range(2) for norm in norms),
        "1.self_attn.q_norm.weight",
        "1.self_attn.k_norm.weight",
    }


# ---- whose layout tells --------------------------------------------------------------


def in_torch_layout(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor.mT if name.endswith("conv1d.weight") else tensor}


@pytest.mark.parametrize("model_type", ["falcon_h1", "qwen3_next", "qwen3_5"])
def test_values_that_are_not_those_of_mlx_are_refused(
    model_type: str, tmp_path: Path
) -> None:
    """mlx-lm would fold multipliers and ones into the values of such a file."""
    case = case_of(model_type)
    write_mlx_checkpoint(case, tmp_path)
    change(tmp_path, in_torch_layout)

    with pytest.raises(CheckpointError, match=r"conv1d\.weight: float32 \["):
        loaded(case, tmp_path)


@pytest.mark.parametrize("model_type", ["mamba", "nemotron_h"])
def test_either_layout_of_other_convolutions(model_type: str, tmp_path: Path) -> None:
    case = case_of(model_type)
    write_mlx_checkpoint(case, tmp_path)
    want = logits_of(loaded(case, tmp_path))
    change(tmp_path, in_torch_layout)

    assert torch.equal(logits_of(loaded(case, tmp_path)), want)


def test_the_convolutions_of_queries_keys_and_values(tmp_path: Path) -> None:
    case = case_of("olmo_hybrid")
    write_mlx_checkpoint(case, tmp_path)
    stored = tensors_of(tmp_path)
    place = "model.layers.0.linear_attn"

    whole = loaded(case, tmp_path).get_parameter(f"{place}.conv1d.weight")

    rows = 0
    for part in "qkv":  # the values have twice as many
        piece = stored[f"{place}.{part}_conv1d.weight"].mT
        assert torch.equal(whole[rows : rows + len(piece)], piece)
        rows += len(piece)
    assert rows == len(whole)


# ---- keys and values that are not used -----------------------------------------------


def test_only_layers_that_share_leave_keys_and_values(tmp_path: Path) -> None:
    case = case_of("gemma3n")
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first)
    model = stock_model(first, case)
    report = load_checkpoint_(model, first)
    save_checkpoint(model, again)

    place = "model.language_model.layers"
    for number, shared in enumerate((False, False, True, True)):
        for own in ("k_proj.weight", "v_proj.scales", "k_norm.weight"):
            name = f"{place}.{number}.self_attn.{own}"
            assert (name in report.ignored) == shared, name
    assert not Names(model).is_ignored(f"{place}.2.self_attn.q_proj.weight")
    assert not Names(model).is_ignored(f"{place}.12.self_attn.k_proj.weight")
    saved = tensors_of(again)
    for number in (2, 3):  # mlx-lm must find some
        for own in ("k_proj", "v_proj", "k_norm"):
            tensor = saved[f"{place}.{number}.self_attn.{own}.weight"]
            assert tensor.dtype == torch.float32
            assert not bool(tensor.any())


# ---- models that were no checkpoint ----------------------------------------------------


@pytest.mark.parametrize(
    "model_type",
    ["apertus", "falcon_h1", "lfm2", "mamba2", "qwen3_next", "qwen3_5", "qwen3_5_moe"],
)
def test_mlx_lm_is_told_what_transformers_does_not_say(
    model_type: str, tmp_path: Path
) -> None:
    case = case_of(model_type)
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first)
    model = loaded(case, first)
    known = {field.name for field in dataclasses.fields(model.config)}
    for key in vars(model.config).keys() - known - vars(type(model.config)()).keys():
        delattr(model.config, key)
    model.config.name_or_path = ""

    save_checkpoint(model, again)

    written = json.loads((again / "config.json").read_text())
    assert written["model_type"] == case.model_type
    assert torch.equal(mlx_logits(again, INPUT_IDS), mlx_logits(first, INPUT_IDS))
