"""Checkpoints with their towers speak in stock transformers models as the dense twins."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import leave_out_
from cases_vision import CASES
from safetensors.torch import load_file, save_file
from seeing import (
    Seeing,
    dense_twin,
    stock_model,
    write_by_hand,
    write_with_mlx_vlm,
)
from transformers import CONFIG_MAPPING

from affine_tensor import (
    AffineQuantizedTensor,
    CheckpointError,
    from_pretrained,
    load_checkpoint_,
    save_checkpoint,
)
from affine_tensor.checkpoint.files import open_checkpoint
from affine_tensor.checkpoint.load import make_plan

pytest.importorskip("mlx_lm", reason="mlx-lm, which comes with MLX, is missing")

TOLERANCE = 1e-5  # relative L2 of the float32 logits


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Seeing:
    found: Seeing = request.param
    if found.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {found.model_type}")
    return found


def write(case: Seeing, twin: Any, folder: Path) -> None:
    if case.writer:
        pytest.importorskip(case.writer, reason=f"{case.writer} is missing")
        write_with_mlx_vlm(case, twin, folder)
    else:
        write_by_hand(case, twin, folder)


def logits(model: Any, case: Seeing, mirrored: bool = False) -> torch.Tensor:
    inputs = case.inputs()
    if mirrored:
        inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    stored = open_checkpoint(folder).tensors
    return {name: tensor.read() for name, tensor in stored.items()}


def assert_same_tensors(new: Path, old: Path, but: str | None = None) -> None:
    got, want = tensors_of(new), tensors_of(old)
    if but:
        want = {name: tensor for name, tensor in want.items() if but not in name}
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.shape == want[name].shape, name
        assert torch.equal(tensor, want[name]), name


def test_logits_are_those_of_the_twin(case: Seeing, tmp_path: Path) -> None:
    twin = dense_twin(case)
    want = logits(twin, case)
    assert relative_l2(logits(twin, case, mirrored=True), want) > 1e-3  # it does look
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


TEXT_CLASSES = {
    "gemma3": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "qwen2_vl": "Qwen2VLTextModel",
    "qwen3_vl": "Qwen3VLTextModel",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeTextModel",
    "idefics3": "LlamaModel",
}


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.model_type in TEXT_CLASSES], ids=str
)
def test_a_text_model_leaves_the_tower(case: Seeing, tmp_path: Path) -> None:
    twin = dense_twin(case)
    write(case, twin, tmp_path)
    cls = getattr(transformers, TEXT_CLASSES[case.model_type])
    config = stock_model(case).config.get_text_config()
    model = cls._from_config(config, dtype=torch.float32, attn_implementation="eager")

    report = load_checkpoint_(model.eval(), tmp_path)

    assert report.ignored
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        want, got = twin(ids), model(ids)
    if hasattr(got, "logits"):
        assert relative_l2(got.logits, want.logits) < TOLERANCE
    else:
        head = twin.get_output_embeddings()(got.last_hidden_state)
        assert relative_l2(head, want.logits) < TOLERANCE


@pytest.mark.parametrize("model_class", ["AutoModel", "AutoModelForImageTextToText"])
def test_a_missing_tower_is_refused(model_class: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == "qwen3_vl")
    twin = dense_twin(case)
    leave_out_(twin, ["model.visual"])
    write_by_hand(case, twin, tmp_path)
    model = stock_model(replace(case, model_class=model_class))
    with pytest.raises(CheckpointError, match=r"visual\.patch_embed\.proj\.weight"):
        load_checkpoint_(model, tmp_path)


def test_a_body_with_its_tower_loads(tmp_path: Path) -> None:
    """The class without the head, whose names lack the first level."""
    case = next(case for case in CASES if case.model_type == "qwen3_vl")
    twin = dense_twin(case)
    write_by_hand(case, twin, tmp_path)
    model = stock_model(replace(case, model_class="AutoModel"))

    load_checkpoint_(model, tmp_path)

    with torch.no_grad():
        want = twin.model(**case.inputs()).last_hidden_state
        got = model(**case.inputs()).last_hidden_state
    assert relative_l2(got, want) < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [
        ("gemma3", "vision_tower.vision_model.", "vision_tower."),
        ("mistral3", "vision_tower.vision_model.", "model.vision_tower."),
        ("llava", "vision_tower.", "model.vision_tower."),
        ("qwen2_vl", "vision_tower.", "visual."),
        ("qwen3_vl", "language_model.model.", "model.language_model."),
        ("qwen3_vl", "language_model.lm_head.", "lm_head."),
        ("idefics3", "language_model.layers.", "model.text_model.layers."),
    ],
)
def test_other_packagings(model_type: str, old: str, new: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == model_type)
    twin = dense_twin(case)
    write_by_hand(case, twin, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        new + name[len(old) :] if name.startswith(old) else name: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "mlx"})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization"] = {
        new + name[len(old) :] if name.startswith(old) else name: value
        for name, value in config["quantization"].items()
    }
    path.write_text(json.dumps(config))
    model = stock_model(case)

    report = load_checkpoint_(model, tmp_path)

    assert report.ignored == []
    assert relative_l2(logits(model, case), logits(twin, case)) < TOLERANCE


ENCODER = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "xlm-roberta"])
def test_encoders_of_text(model_type: str, tmp_path: Path) -> None:
    config = ENCODER | {"global_attn_every_n_layers": 2, "local_attention": 8}
    case = Seeing(model_type, config, dict, model_class="AutoModel", bits=6)
    twin = dense_twin(case)
    if hasattr(twin, "pooler"):
        twin.pooler = None  # MLX has none
    write_by_hand(case, twin, tmp_path)
    model = stock_model(case)
    if hasattr(model, "pooler"):
        with pytest.raises(CheckpointError, match=r"pooler\.dense\.weight"):
            load_checkpoint_(model, tmp_path)
        model.pooler = None

    load_checkpoint_(model, tmp_path)

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want, got = twin(ids), model(ids)
    assert relative_l2(got.last_hidden_state, want.last_hidden_state) < TOLERANCE


def test_mlx_vlm_writes_what_the_table_says(case: Seeing, tmp_path: Path) -> None:
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is missing")
    if case.writer:
        pytest.skip("there is no table")
    twin = dense_twin(case)
    write_by_hand(case, twin, tmp_path / "ours")
    write_with_mlx_vlm(case, twin, tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_saving_gives_the_same_file_back(case: Seeing, tmp_path: Path) -> None:
    if case.writer:
        pytest.skip("some tensors are written in other pieces")
    first, again = tmp_path / "first", tmp_path / "again"
    write(case, dense_twin(case), first)
    model = stock_model(case)
    load_checkpoint_(model, first)

    save_checkpoint(model, again)

    assert_same_tensors(again, first, but=r"lm_head" if case.head_twice else None)
    auto = getattr(transformers, case.model_class)
    loaded = from_pretrained(again, model_class=auto, attn_implementation="eager")
    assert type(loaded) is type(model)
    assert relative_l2(logits(loaded, case), logits(model, case)) < TOLERANCE


def test_mlx_reads_what_was_saved(case: Seeing, tmp_path: Path) -> None:
    if case.unreadable:
        pytest.skip(case.unreadable)
    reader = case.writer or "mlx_vlm"
    pytest.importorskip(reader, reason=f"{reader} is missing")
    first, again = tmp_path / "first", tmp_path / "again"
    write(case, dense_twin(case), first)
    model = stock_model(case)
    load_checkpoint_(model, first)

    save_checkpoint(model, again)

    got, want = parameters_in_mlx(reader, again), parameters_in_mlx(reader, first)
    assert got.keys() == want.keys()
    for name, value in got.items():
        if name.endswith(("_alpha", "_beta")):  # computed again
            torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, want[name]), name


def parameters_in_mlx(library: str, folder: Path) -> dict[str, torch.Tensor]:
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    utils = importlib.import_module(f"{library}.utils")
    model = utils.load_model(folder)
    model = model[0] if isinstance(model, tuple) else model
    found = {}
    for name, value in tree_flatten(model.parameters()):
        value = value.astype(mx.float32) if value.dtype == mx.bfloat16 else value
        found[name] = torch.from_numpy(np.array(value))
    return found
