"""What would load without a word and compute something else, of `cases_latent.py`.

Most tests take one piece of the handling away and see the logits change, or the load
refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    Case,
    drawn_by_transformers,
    leave_out_,
    mlx_logits,
    write_mlx_checkpoint,
)
from cases_latent import CASES
from safetensors.torch import load_file, save_file
from test_architectures import relative_l2, stock_model
from transformers import PreTrainedConfig, PreTrainedModel

from affine_tensor import (
    AffineQuantizedTensor,
    from_pretrained,
    load_checkpoint_,
    save_checkpoint,
)
from affine_tensor.checkpoint.families import FAMILIES
from affine_tensor.checkpoint.files import CheckpointError, open_checkpoint
from affine_tensor.checkpoint.forms import AbsorbedKV, ChannelsLast, Padded, Rows
from affine_tensor.checkpoint.load import make_plan

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
Patch = Callable[[pytest.MonkeyPatch], None]


def case_of(name: str) -> Case:
    return next(case for case in CASES if str(case).startswith(name))


def loaded(case: Case, folder: Path) -> PreTrainedModel:
    model = stock_model(folder, case)
    load_checkpoint_(model, folder)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS, use_cache=False).logits
    return logits


def keys_as_they_are(patch: pytest.MonkeyPatch) -> None:
    """The keys of each head without the transposition; the matrices are square."""

    def load(self: AbsorbedKV, read: Any) -> torch.Tensor:
        keys, values = (
            part.load(read).dequantize(torch.float32) for part in self.parts
        )
        whole = torch.cat([keys, values], dim=1)
        return whole.reshape(-1, whole.shape[-1])

    patch.setattr(AbsorbedKV, "load", load)


def values_before_keys(patch: pytest.MonkeyPatch) -> None:
    original = AbsorbedKV.load

    def load(self: AbsorbedKV, read: Any) -> torch.Tensor:
        whole = original(self, read).unflatten(0, (self.heads, -1))
        return whole.roll(self.nope, 1).flatten(0, 1)

    patch.setattr(AbsorbedKV, "load", load)


def keys_of_all_heads_first(patch: pytest.MonkeyPatch) -> None:
    original = AbsorbedKV.load

    def load(self: AbsorbedKV, read: Any) -> torch.Tensor:
        whole = original(self, read).unflatten(0, (self.heads, 2, -1))
        return whole.transpose(0, 1).flatten(0, 2)

    patch.setattr(AbsorbedKV, "load", load)


def other_way_round(patch: pytest.MonkeyPatch) -> None:
    """Gate and up exchanged, or queries, keys and values."""
    original = Rows.load

    def load(self: Rows, read: Any) -> torch.Tensor:
        turned = Rows(*reversed(self.parts), axis=self.axis)
        return original(turned, read)

    patch.setattr(Rows, "load", load)


def taps_as_they_are(patch: pytest.MonkeyPatch) -> None:
    """The taps of a convolution backwards."""
    original = ChannelsLast.loaded

    def backwards(self: ChannelsLast, value: torch.Tensor) -> torch.Tensor:
        return original(self, value).flip(-1)

    patch.setattr(ChannelsLast, "loaded", backwards)


def no_family(patch: pytest.MonkeyPatch) -> None:
    for model_type in list(FAMILIES):
        patch.delitem(FAMILIES, model_type)


def unpadded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Padded, "loaded", lambda self, value: value)
    patch.setattr(Padded, "saved", lambda self, value: value)


WRONG: list[tuple[str, Patch]] = [
    ("deepseek_v3-4bit", keys_as_they_are),
    ("deepseek_v3-4bit", values_before_keys),
    ("deepseek_v3-4bit", keys_of_all_heads_first),
    ("longcat_flash", keys_as_they_are),
    ("kimi_linear", other_way_round),
    ("kimi_linear", taps_as_they_are),
    ("bailing_hybrid", other_way_round),
    ("minimax_m3_vl", other_way_round),
]


@pytest.mark.parametrize(
    ("name", "patch"), WRONG, ids=[f"{n}-{p.__name__}" for n, p in WRONG]
)
def test_what_has_the_right_shape_has_the_right_values(
    name: str, patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name)
    write_mlx_checkpoint(case, tmp_path)
    want = mlx_logits(tmp_path, IDS)
    assert relative_l2(logits_of(loaded(case, tmp_path)), want) < case.tolerance

    patch(monkeypatch)

    assert relative_l2(logits_of(loaded(case, tmp_path)), want) > 0.01


REFUSED = [
    "bailing_hybrid",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_k25",
    "kimi_linear",
    "laguna",
    "longcat_flash",
    "mimo_v2_flash",
    "minimax_m3_vl",
    "mistral4",
]


@pytest.mark.parametrize("name", REFUSED)
def test_without_its_family_a_checkpoint_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name)
    write_mlx_checkpoint(case, tmp_path)
    model = stock_model(tmp_path, case)
    no_family(monkeypatch)

    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint_(model, tmp_path)


def test_experts_that_are_the_identity_are_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("longcat_flash")
    write_mlx_checkpoint(case, tmp_path)
    experts = loaded(case, tmp_path).model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape[0] == experts.down_proj.shape[0] + 2
    assert isinstance(experts.gate_up_proj, AffineQuantizedTensor)
    assert not experts.gate_up_proj.dequantize()[-2:].any()
    assert experts.gate_up_proj.dequantize()[:-2].any(-1).all()

    unpadded(monkeypatch)

    with pytest.raises(CheckpointError, match="does not fit the model"):
        loaded(case, tmp_path)


def test_norms_of_minimax_m3_are_not_one_more_in_mlx(tmp_path: Path) -> None:
    """Both libraries add the one when they compute."""
    case = case_of("minimax_m3_vl")
    write_mlx_checkpoint(case, tmp_path)
    stored = open_checkpoint(tmp_path).tensors
    model = loaded(case, tmp_path)

    norm = stored["language_model.model.norm.weight"].read()

    assert torch.equal(model.model.language_model.norm.weight.detach(), norm)


def with_kv_b_proj(case: Case, folder: Path) -> None:
    """Rewrites a checkpoint as mlx-lm wrote it when it did not divide `kv_b_proj`."""
    model = loaded(case, folder)
    tensors = load_file(folder / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        stem = f"model.layers.{number}.self_attn."
        for part in ("weight", "scales", "biases"):
            del tensors[f"{stem}embed_q.{part}"], tensors[f"{stem}unembed_out.{part}"]
        packed = AffineQuantizedTensor.from_dense(
            layer.self_attn.kv_b_proj.weight.detach(), case.bits, case.group_size
        )
        tensors |= {
            f"{stem}kv_b_proj.weight": packed.packed,
            f"{stem}kv_b_proj.scales": packed.scales,
            f"{stem}kv_b_proj.biases": packed.biases,
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


def test_older_files_with_kv_b_proj_stay_packed(tmp_path: Path) -> None:
    case = case_of("deepseek_v3-4bit")
    write_mlx_checkpoint(case, tmp_path / "old")
    with_kv_b_proj(case, tmp_path / "old")
    stored = load_file(tmp_path / "old" / "model.safetensors")

    model = loaded(case, tmp_path / "old")

    attention = model.model.layers[1].self_attn
    assert isinstance(attention.kv_b_proj.weight, AffineQuantizedTensor)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(attention.kv_b_proj.weight.packed, stored[name])
    # mlx-lm would quantize it again.
    with pytest.raises(ValueError, match=r"embed_q\.weight: .* along another axis"):
        save_checkpoint(model, tmp_path / "new")

    save_checkpoint(model, tmp_path / "new", unsupported="dense")

    new = open_checkpoint(tmp_path / "new").tensors
    stem = "model.layers.1.self_attn."
    assert new[f"{stem}embed_q.weight"].dtype == torch.float32
    assert new[f"{stem}unembed_out.weight"].dtype == torch.uint32
    assert name not in new
    error = relative_l2(logits_of(model), mlx_logits(tmp_path / "new", IDS))
    assert error < case.tolerance


def test_layers_that_predict_more_tokens_are_left(tmp_path: Path) -> None:
    case = case_of("glm4_moe_lite")
    write_mlx_checkpoint(case, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    further = {
        name.replace(".layers.1.", ".layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.1." in name
    } | {"model.layers.2.eh_proj.weight": torch.zeros(128, 256)}
    file = tmp_path / "model.safetensors"
    save_file(tensors | further, file, metadata={"format": "mlx"})

    with pytest.raises(CheckpointError, match="unexpected"):
        loaded(case, tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = stock_model(tmp_path, case)
    plan = make_plan(model, open_checkpoint(tmp_path))
    assert {name.rpartition(".")[0] for name in plan.ignored} >= {
        "model.layers.2.eh_proj",
        "model.layers.2.self_attn.embed_q",
    }
    load_checkpoint_(model, tmp_path)
    error = relative_l2(logits_of(model), mlx_logits(tmp_path, IDS))
    assert error < case.tolerance


@pytest.mark.parametrize("name", ["deepseek_v3-kimi_k2", "deepseek_v3-joyai", "youtu"])
def test_model_types_that_transformers_calls_otherwise(
    name: str, tmp_path: Path
) -> None:
    case = case_of(name)
    write_mlx_checkpoint(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == case.mlx_type != case.model_type

    model = from_pretrained(tmp_path)

    assert model.config.model_type == case.model_type
    error = relative_l2(logits_of(model), mlx_logits(tmp_path, IDS))
    assert error < case.tolerance


def only_its_own(config: Any) -> Any:
    """A configuration without what only mlx-lm reads."""
    settings = {}
    for field in dataclasses.fields(config):
        if field.name.startswith("_") or not hasattr(config, field.name):
            continue
        value = getattr(config, field.name)
        nested = isinstance(value, PreTrainedConfig)
        settings[field.name] = only_its_own(value) if nested else value
    if hasattr(config, "linear_head_dim") and "head_dim" in settings:
        # transformers puts another number there than it takes.
        settings["head_dim"] = config.linear_head_dim
    return type(config)(**settings)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mlx_lm_is_told_what_transformers_takes_for_granted(
    case: Case, tmp_path: Path
) -> None:
    drawn = drawn_by_transformers(case, tmp_path / "config")
    config = only_its_own(drawn.config)
    config._attn_implementation = "eager"
    model = type(drawn)(config).float().eval()
    leave_out_(model, case.towers)
    model.load_state_dict(drawn.state_dict())

    save_checkpoint(model, tmp_path / "saved")

    error = relative_l2(logits_of(model), mlx_logits(tmp_path / "saved", IDS))
    assert error < case.tolerance
