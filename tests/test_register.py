"""transformers' own from_pretrained and save_pretrained, after register()."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases_experts
import cases_latent
import pytest
import torch
from architectures import (
    Case,
    _write_dense_checkpoint,
    mlx_logits,
    write_mlx_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MetalConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

import affine_tensor
from affine_tensor import (
    AffineQuantizationConfig,
    AffineQuantizedTensor,
    CheckpointError,
    register,
)
from affine_tensor.hf import loading

pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoints")

LLAMA = Case("llama", {"tie_word_embeddings": False})
TIED = Case("llama", {"tie_word_embeddings": True}, bits=3, group_size=32)
MOE = Case(
    "qwen3_moe",
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
)
IDS = torch.tensor([[5, 17, 200, 3, 9, 44, 81, 7]])


@pytest.fixture
def registered() -> Iterator[None]:
    before = PreTrainedModel.__dict__["from_pretrained"]
    register()
    yield
    PreTrainedModel.from_pretrained = before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mlx_checkpoint(LLAMA, tmp_path / "mlx")
    return tmp_path / "mlx"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    _write_dense_checkpoint(LLAMA, tmp_path / "dense")
    return tmp_path / "dense"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def packed(model: nn.Module) -> dict[str, AffineQuantizedTensor]:
    return {
        name: value
        for name, value in model.named_parameters()
        if isinstance(value, AffineQuantizedTensor)
    }


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    error = (got.double() - want.double()).norm() / want.double().norm()
    return bool(error < tolerance)


# ---- loading ----------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, TIED, MOE], ids=str)
def test_the_plain_call_just_works(
    case: Case, tmp_path: Path, registered: None
) -> None:
    write_mlx_checkpoint(case, tmp_path / "mlx")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mlx")
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(model.get_output_embeddings().weight, AffineQuantizedTensor)
    if case is TIED:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    if case is MOE:
        experts = model.model.layers[0].mlp.experts
        assert isinstance(experts.gate_up_proj, AffineQuantizedTensor)
    with torch.no_grad():
        assert close(model(IDS).logits, mlx_logits(tmp_path / "mlx", IDS))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.config._name_or_path == str(tmp_path / "mlx")
    assert not model.training


@pytest.mark.parametrize("name", ["kimi_k2", "joyai_llm_flash", "youtu_llm", "hunyuan"])
def test_model_types_that_only_mlx_calls_so(
    name: str, tmp_path: Path, registered: None
) -> None:
    cases = (*cases_latent.CASES, *cases_experts.CASES)
    case = next(case for case in cases if case.mlx_type == name)
    write_mlx_checkpoint(case, tmp_path)
    want = mlx_logits(tmp_path, IDS)
    for load in (AutoModelForCausalLM.from_pretrained, affine_tensor.from_pretrained):
        model = load(tmp_path, dtype=torch.float32)
        assert model.config.model_type == case.model_type
        with torch.no_grad():
            assert close(model(IDS, use_cache=False).logits, want)


def test_without_register_transformers_refuses(folder: Path) -> None:
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_register_is_idempotent_and_leaves_others_alone(
    folder: Path, dense: Path, registered: None
) -> None:
    first = PreTrainedModel.from_pretrained.__func__
    register()
    assert PreTrainedModel.from_pretrained.__func__ is first
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert not packed(model)
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(folder.parent / "again")
    again = LlamaForCausalLM.from_pretrained(folder.parent / "again")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_it_steps_aside_if_transformers_learns_the_format(
    folder: Path, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AutoHfQuantizer, "supports_quant_method", staticmethod(lambda settings: True)
    )
    with pytest.raises(ValueError, match="quant_method"):  # transformers' own words
        AutoModelForCausalLM.from_pretrained(folder)


def test_classes_and_keywords(folder: Path, registered: None) -> None:
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.scales.dtype == torch.float32
    body = AutoModel.from_pretrained(folder)
    assert isinstance(body.embed_tokens.weight, AffineQuantizedTensor)
    auto = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert auto.hf_quantizer.is_trainable
    assert auto.hf_quantizer.is_compileable
    assert auto.hf_quantizer.is_serializable()
    assert auto.is_quantized
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert packed(model)


def test_disk_offload_is_refused(
    folder: Path, registered: None, tmp_path: Path
) -> None:
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(
        ValueError, match="device_map leaves a part of the model on disk"
    ):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map=places, offload_folder=tmp_path / "off"
        )
    with pytest.raises(ValueError, match="on disk"):
        AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="auto",
            max_memory={"cpu": 100_000},
            offload_folder=tmp_path / "off",
        )


def test_missing_keys_raise(folder: Path, registered: None) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"1 missing:\n  model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_dequantize(folder: Path, registered: None) -> None:
    want = AutoModelForCausalLM.from_pretrained(folder)
    config = AffineQuantizationConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert not packed(model)
    assert not hasattr(model.config, "quantization_config")
    for name, weight in packed(want).items():
        assert torch.equal(model.get_parameter(name), weight.dequantize())
    model = want.dequantize()
    assert not packed(model)


# ---- quantizing while loading ------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [AffineQuantizationConfig(bits=4, group_size=64), MetalConfig(bits=4)],
    ids=["affine", "metal"],
)
def test_quantizing_while_loading(
    config: Any, dense: Path, folder: Path, registered: None
) -> None:
    """The same as what mlx-lm's conversion gives, bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    want = packed(AutoModelForCausalLM.from_pretrained(folder))
    assert packed(model).keys() == want.keys()
    for name, weight in packed(model).items():
        assert torch.equal(weight.packed, want[name].packed)
        assert torch.equal(weight.scales, want[name].scales)
        assert torch.equal(weight.biases, want[name].biases)


def test_modules_that_stay_dense(dense: Path, registered: None) -> None:
    config = AffineQuantizationConfig(modules_to_not_convert=["lm_head", "gate_proj"])
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    names = packed(model)
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not [n for n in names if "gate_proj" in n or "lm_head" in n]
    with pytest.raises(TypeError, match="skip_modules: no option"):
        AffineQuantizationConfig(skip_modules=["x"])
    with pytest.raises(ValueError, match="bits is 7; allowed are 1, 2, 3, 4, 5, 6, 8"):
        AffineQuantizationConfig(bits=7)


def test_experts_are_quantized_while_loading(tmp_path: Path, registered: None) -> None:
    _write_dense_checkpoint(MOE, tmp_path / "dense")
    write_mlx_checkpoint(MOE, tmp_path / "mlx")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=AffineQuantizationConfig()
    )
    want = packed(AutoModelForCausalLM.from_pretrained(tmp_path / "mlx"))
    got = packed(model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(got[name].packed, want[name].packed)
    assert torch.equal(got[name].scales, want[name].scales)


def test_convert_writes_what_mlx_lm_writes(dense: Path, folder: Path) -> None:
    report = affine_tensor.convert(dense, dense.parent / "ours", max_shard_bytes=60_000)
    assert report.packed
    files = sorted((dense.parent / "ours").glob("model-*.safetensors"))
    assert len(files) > 3
    ours: dict[str, torch.Tensor] = {}
    for file in files:
        ours |= load_file(file)
    theirs = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    got, want = mlx_logits(dense.parent / "ours", IDS), mlx_logits(folder, IDS)
    assert torch.equal(got, want)


def test_checkpoints_of_metal_config(folder: Path, registered: None) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        (f"{n.removesuffix('biases')}qbiases" if n.endswith(".biases") else n): t
        for n, t in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"]
    config["quantization_config"] = {
        "quant_method": "metal",
        "bits": 4,
        "group_size": 64,
        "modules_to_not_convert": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight.biases, tensors["lm_head.biases"])


# ---- saving -----------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, TIED, MOE], ids=str)
def test_save_pretrained_writes_an_mlx_checkpoint(
    case: Case, tmp_path: Path, registered: None
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first)
    model = AutoModelForCausalLM.from_pretrained(first)
    again.mkdir()
    (again / "notes.txt").write_text("mine")
    (again / "model-00001-of-00002.safetensors").write_bytes(b"old")
    model.save_pretrained(again, max_shard_size="200KB")
    assert (again / "notes.txt").read_text() == "mine"
    assert torch.equal(mlx_logits(again, IDS), mlx_logits(first, IDS))
    reloaded = AutoModelForCausalLM.from_pretrained(again)
    for (n1, a), (n2, b) in zip(
        model.named_parameters(), reloaded.named_parameters(), strict=True
    ):
        assert n1 == n2
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    config = json.loads((again / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert "quant_method" not in config["quantization"]


def test_save_pretrained_refuses_what_it_cannot_do(
    folder: Path, registered: None
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="variant='fp16' is not taken"):
        model.save_pretrained(folder.parent / "x", variant="fp16")
    with pytest.raises(ValueError, match="max_shard_size is 'much'"):
        model.save_pretrained(folder.parent / "x", max_shard_size="much")
    assert not (folder.parent / "x").exists()
    assert not list(folder.parent.glob(".x*"))


def test_the_stock_loader_is_reached_for_everything_else(
    dense: Path, registered: None
) -> None:
    assert loading._stock_from_pretrained is not PreTrainedModel.from_pretrained
    state = load_file(dense / "model.safetensors")
    config = LlamaForCausalLM.from_pretrained(dense).config
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_an_adapter_of_an_mlx_base(folder: Path, registered: None) -> None:
    peft = pytest.importorskip(
        "peft", reason="peft, which has the adapters, is missing"
    )
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        want = adapted(IDS).logits
    adapted.save_pretrained(folder.parent / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "adapter")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, want)
        plain = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert not torch.equal(plain, want)


def test_what_would_be_lost_is_refused(folder: Path, registered: None) -> None:
    with pytest.raises(
        ValueError, match="key_mapping is not taken with packed weights"
    ):
        AutoModelForCausalLM.from_pretrained(folder, key_mapping={"a": "b"})
    with pytest.raises(ValueError, match="distributed_config has fsdp_size=2"):
        AutoModelForCausalLM.from_pretrained(
            folder, distributed_config={"fsdp_size": 2}
        )
