"""Recipes: mlx-lm's own by name, bit for bit, and a user's."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases_experts
import cases_latent
import cases_other
import cases_recurrent
import pytest
import torch
from architectures import (
    CASES,
    Case,
    _write_dense_checkpoint,
    mlx_quantized_modules,
    write_mlx_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import affine_tensor
from affine_tensor import (
    AffineConfig,
    AffineQuantizationConfig,
    AffineQuantizedTensor,
    from_pretrained,
    quantize_,
    recipes,
)

ALL = [
    *CASES,
    *cases_experts.CASES,
    *cases_latent.CASES,
    *cases_other.CASES,
    *cases_recurrent.CASES,
]


def case_of(model_type: str, **changes: Any) -> Case:
    case = next(case for case in ALL if case.model_type == model_type)
    return replace(case, bits=4, config={**case.config, **changes})


# Eight layers, so that first and last eighth and every third differ.
CASES_OF_RECIPES = [
    (case_of("llama", num_hidden_layers=8, tie_word_embeddings=False), "mixed_2_6"),
    (case_of("llama", num_hidden_layers=9, tie_word_embeddings=True), "mixed_3_4"),
    (case_of("qwen3", num_hidden_layers=16), "mixed_4_6"),
    (case_of("phi3"), "mixed_3_6"),
    (case_of("gemma3_text"), "mixed_3_6"),
    (case_of("deepseek_v3"), "mixed_3_6"),  # v_a, v_b, routers that stay dense
    (case_of("mixtral"), "mixed_3_6"),
    (case_of("qwen3_moe"), "mixed_4_6"),
    (case_of("gpt_oss"), "mixed_3_6"),
]
IDS = [f"{case}-{recipe}" for case, recipe in CASES_OF_RECIPES]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def every_module(folder: Path) -> dict[str, tuple[int, int]]:
    """What config.json says of each quantized module, spelled out."""
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    found = {}
    for name in tensors_of(folder):
        if name.endswith(".scales"):
            own = settings.get(name.removesuffix(".scales"), settings)
            found[name.removesuffix(".scales")] = (own["bits"], own["group_size"])
    return found


@pytest.mark.parametrize(("case", "recipe"), CASES_OF_RECIPES, ids=IDS)
def test_mlx_lms_recipes(case: Case, recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is the oracle")
    write_mlx_checkpoint(replace(case, recipe=recipe), tmp_path / "mlx")
    _write_dense_checkpoint(case, tmp_path / "dense")
    affine_tensor.convert(
        tmp_path / "dense",
        tmp_path / "ours",
        recipe=recipe,
        group_size=case.group_size,
    )
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "mlx")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        if not case.drawn_by_mlx:  # its numbers are others then
            assert torch.equal(ours[name], tensor), name
    formats = every_module(tmp_path / "ours")
    assert formats == every_module(tmp_path / "mlx")
    assert formats == mlx_quantized_modules(tmp_path / "ours")
    assert len(Counter(formats.values())) == 2


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    case = case_of("llama", num_hidden_layers=8, tie_word_embeddings=False)
    _write_dense_checkpoint(case, tmp_path / "dense")
    return tmp_path / "dense"


def formats_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(".weight"): (value.bits, value.group_size)
        for name, value in model.named_parameters()
        if isinstance(value, AffineQuantizedTensor)
    }


def test_a_name_as_filter_of_quantize_(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    quantize_(model, filter_fn=recipes.named("mixed_3_6", model, 32))
    config = AffineQuantizationConfig(group_size=32, recipe="mixed_3_6")
    loaded = from_pretrained(llama, quantization_config=config)
    assert formats_of(model) == formats_of(loaded)
    assert formats_of(model)["lm_head"] == (6, 32)
    assert formats_of(model)["model.layers.1.self_attn.v_proj"] == (3, 32)


def test_tied_words_count_as_the_embedding() -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    quantize_(model, filter_fn=recipes.named("mixed_4_6", model, 32))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.bits == 4


def test_models_without_down_proj_and_unknown_names_raise(llama: Path) -> None:
    with pytest.raises(ValueError, match="Sequential has none in MLX"):
        recipes.named("mixed_3_6", nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match="there are mixed_2_6, mixed_3_4, mixed_3_6"):
        recipes.named("mixed_5_6", nn.Sequential(nn.Linear(64, 64)))
    config = AffineQuantizationConfig(recipe="mixed_5_6")
    with pytest.raises(ValueError, match="'mixed_5_6', and there is no such file"):
        from_pretrained(llama, quantization_config=config)


# ---- a user's -------------------------------------------------------------------

WANTED = {
    "model.layers.0.mlp.down_proj": (8, 32),
    "model.layers.0.mlp.up_proj": (4, 64),
    "model.layers.3.self_attn.q_proj": (6, 64),
}
MAPPING = {
    "lm_head": False,
    "*.self_attn.*": AffineConfig(6),
    "model.layers.0.mlp.down_proj": AffineConfig(8, 32),
    "model.layers.0.mlp.*": True,
}


def check_mapping(folder: Path, recipe: Any) -> None:
    config = AffineQuantizationConfig(recipe=recipe)
    formats = formats_of(from_pretrained(folder, quantization_config=config))
    assert "lm_head" not in formats
    assert {name: formats[name] for name in WANTED} == WANTED


def test_a_mapping(llama: Path) -> None:
    check_mapping(llama, MAPPING)


def test_a_function_of_the_name(llama: Path) -> None:
    def recipe(name: str) -> bool | AffineConfig:
        if name.endswith("layers.0.mlp.down_proj"):
            return AffineConfig(8, 32)
        return AffineConfig(6) if "self_attn" in name else name != "lm_head"

    check_mapping(llama, recipe)


def test_a_file(llama: Path, tmp_path: Path) -> None:
    def spelled(value: Any) -> Any:
        if not isinstance(value, AffineConfig):
            return value
        return {"bits": value.bits, "group_size": value.group_size}

    modules = {name: spelled(value) for name, value in MAPPING.items()}
    whole = {"modules": modules, "default": {"bits": 5, "group_size": 32}}
    del modules["model.layers.0.mlp.*"]
    modules["model.layers.0.mlp.up_proj"] = {"bits": 4, "group_size": 64}
    (tmp_path / "recipe.json").write_text(json.dumps(whole))
    check_mapping(llama, str(tmp_path / "recipe.json"))
    config = AffineQuantizationConfig(recipe=tmp_path / "recipe.json")
    formats = formats_of(from_pretrained(llama, quantization_config=config))
    assert formats["model.layers.7.mlp.up_proj"] == (5, 32)
    (tmp_path / "recipe.json").write_text(json.dumps(modules))  # the modules alone
    check_mapping(llama, str(tmp_path / "recipe.json"))


def test_names_of_experts(tmp_path: Path) -> None:
    case = case_of("qwen3_moe")
    _write_dense_checkpoint(case, tmp_path / "dense")
    recipe = {
        "model.layers.1.mlp.experts.gate_up_proj": AffineConfig(6),
        "model.layers.2.mlp.switch_mlp.down_proj": AffineConfig(8),  # MLX's name
    }
    config = AffineQuantizationConfig(recipe=recipe)
    model = from_pretrained(tmp_path / "dense", quantization_config=config)
    formats = formats_of(model)
    assert formats["model.layers.1.mlp.experts.gate_up_proj"] == (6, 64)
    assert formats["model.layers.1.mlp.experts.down_proj"] == (4, 64)
    assert formats["model.layers.2.mlp.experts.down_proj"] == (8, 64)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"model.layers.0.mlp.downproj": False},
            r"It has model\.layers\.\d\.mlp\.down",
        ),
        ({"*.experts": False}, "has no such weights"),
        ({"model.norm": AffineConfig()}, "has no such weights"),
        ({"lm_head": 4}, "lm_head: 4 is no configuration"),
        ({"lm_head": {"bits": 7}}, "recipe, lm_head: .*7"),
        ({"lm_head": {"bits": 4, "mode": "mxfp4"}}, "is no configuration"),
        (4, "recipe is 4; one of mixed_2_6"),
        (lambda name: 4, "the recipe returned 4 for"),
    ],
)
def test_recipes_that_are_refused(llama: Path, recipe: Any, message: str) -> None:
    config = AffineQuantizationConfig(recipe=recipe)
    with pytest.raises((ValueError, TypeError), match=message):
        from_pretrained(llama, quantization_config=config)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_files_that_are_no_recipes(llama: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    config = AffineQuantizationConfig(recipe=str(tmp_path / "recipe.json"))
    with pytest.raises(ValueError, match=r"recipe\.json (is no JSON|holds a list)"):
        from_pretrained(llama, quantization_config=config)
