"""Ways to lose a tensor or get a wrong number that a reader of the code once found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Case, _write_dense_checkpoint, write_mlx_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import affine_tensor
from affine_tensor import (
    AffineConfig,
    AffineQuantizationConfig,
    AffineQuantizedTensor,
    CheckpointError,
    dequantize_,
    from_pretrained,
    load_checkpoint_,
    quantize_,
    save_checkpoint,
)

pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoints")

LLAMA = Case("llama", {"tie_word_embeddings": False})
IDS = torch.tensor([[5, 17, 200, 3, 9, 44, 81, 7]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mlx_checkpoint(LLAMA, tmp_path / "mlx")
    return tmp_path / "mlx"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    _write_dense_checkpoint(LLAMA, tmp_path / "dense")
    return tmp_path / "dense"


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- saving into a folder ------------------------------------------------------------


def test_what_is_not_an_older_checkpoint_stays(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder)
    there = tmp_path / "there"
    there.mkdir()
    mine = ["model_ema.safetensors", "model.vae.safetensors", "notes.txt", "README.md"]
    old = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in (*mine, *old):
        (there / name).write_bytes(b"mine")
    model.save_pretrained(there)
    for name in mine:
        assert (there / name).read_bytes() == b"mine"
    assert not [name for name in old if (there / name).exists()]
    assert not list(there.glob(".*"))


def test_a_save_that_fails_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_pretrained(folder)
    there = tmp_path / "there"
    model.save_pretrained(there, max_shard_size="100KB")
    before = {path.name: path.read_bytes() for path in there.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("affine_tensor.checkpoint.save.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(there)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_parameters_with_one_name_in_mlx(tmp_path: Path) -> None:
    model = nn.Module()
    model.vision_tower = nn.Linear(4, 4)
    model.model = nn.Module()
    model.model.vision_tower = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"would be stored as vision_tower\.weight"):
        save_checkpoint(model, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_one_tensor_fills_one_parameter(tmp_path: Path) -> None:
    model = nn.Module()
    model.norm = nn.LayerNorm(4, bias=False)
    model.model = nn.Module()
    model.model.norm = nn.LayerNorm(4, bias=False)
    file = write(
        tmp_path / "mlx",
        {"model.norm.weight": torch.full((4,), 2.0)},
        quantization={"bits": 4, "group_size": 64},
    )
    with pytest.raises(CheckpointError, match=r"1 missing:\n  norm\.weight"):
        load_checkpoint_(model, file)


def test_kernels_that_could_be_either(tmp_path: Path) -> None:
    """A 3 x 3 kernel of 3 channels has one shape in both orders; the next tells."""
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    for last in (False, True):
        tensors = {n: t.detach().clone() for n, t in twin.state_dict().items()}
        if last:
            for name in ("0.weight", "1.weight"):
                tensors[name] = tensors[name].movedim(1, -1).contiguous()
        file = write(
            tmp_path / str(last), tensors, quantization={"bits": 4, "group_size": 64}
        )
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        load_checkpoint_(model, file)
        for got, want in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(got, want)


def test_a_plain_module_whose_child_sounds_like_a_tower(tmp_path: Path) -> None:
    model = nn.Module()
    model.projector = nn.Linear(64, 8)
    model.config = {"model_type": "deepseek_v3"}
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx")
    again = nn.Module()
    again.projector = nn.Linear(64, 8)
    load_checkpoint_(again, tmp_path / "mlx")
    assert torch.equal(again.projector.weight, model.projector.weight)


def test_adapters_within_the_model_are_not_saved_as_a_base(
    folder: Path, tmp_path: Path
) -> None:
    model = from_pretrained(folder)
    inner = model.model.layers[0].self_attn
    inner.q_proj = nn.ModuleDict({"base_layer": inner.q_proj})
    with pytest.raises(ValueError, match="has an adapter beside it"):
        model.save_pretrained(tmp_path / "again")


def test_what_is_offloaded_is_not_saved(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder, device_map="meta")
    with pytest.raises(ValueError, match=r"is offloaded \(on the meta device\)"):
        model.save_pretrained(tmp_path / "again")


def test_keywords_of_save_pretrained(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder)
    for name, value in {"save_original_format": False, "nonsense": 3}.items():
        with pytest.raises(ValueError, match=f"{name}={value} is not taken"):
            model.save_pretrained(tmp_path / "x", **{name: value})
    model.save_pretrained(tmp_path / "half", dtype="float16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["lm_head.scales"].dtype == torch.float16


# ---- loading -------------------------------------------------------------------------


def test_tensors_missing_of_a_dense_checkpoint_raise(
    dense: Path, tmp_path: Path
) -> None:
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing_keys.*model\.norm\.weight"):
        from_pretrained(dense, quantization_config=AffineQuantizationConfig())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        affine_tensor.convert(dense, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_a_dense_checkpoint_is_not_dequantized(dense: Path) -> None:
    config = AffineQuantizationConfig(dequantize=True)
    with pytest.raises(ValueError, match="there is nothing to dequantize"):
        from_pretrained(dense, quantization_config=config)


def test_a_model_made_dense_is_saved_as_a_dense_one(
    folder: Path, tmp_path: Path
) -> None:
    model = from_pretrained(folder)
    dequantize_(model)
    model.save_pretrained(tmp_path / "dense")
    assert "quant" not in (tmp_path / "dense" / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="has an adapter beside the weights"):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [None, "auto"])
@pytest.mark.parametrize("by_class", [LlamaForCausalLM, AutoModelForCausalLM])
def test_the_dtype_of_the_configuration(
    by_class: Any, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    stock = PreTrainedModel.__dict__["from_pretrained"]
    monkeypatch.setattr(
        PreTrainedModel, "from_pretrained", stock
    )  # put back at the end
    affine_tensor.register()
    write_mlx_checkpoint(LLAMA, tmp_path / "mlx", dtype="bfloat16")
    path = tmp_path / "mlx" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    for name in ("dtype", "torch_dtype"):
        model = by_class.from_pretrained(tmp_path / "mlx", **{name: dtype})
        assert model.dtype == torch.bfloat16
    model = by_class.from_pretrained(tmp_path / "mlx", state_dict=None)
    assert isinstance(model.lm_head.weight, AffineQuantizedTensor)
    with pytest.raises(ValueError, match="force_download is not taken"):
        by_class.from_pretrained(tmp_path / "mlx", force_download=True)


def test_quantized_in_place_and_saved_by_transformers(
    dense: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(dense)
    quantize_(model, AffineConfig(bits=8, group_size=32))
    model.save_pretrained(tmp_path / "mlx")
    again = from_pretrained(tmp_path / "mlx")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.architectures == ["LlamaForCausalLM"]


def test_bodies_stay_bodies(folder: Path) -> None:
    body = from_pretrained(folder, model_class=AutoModel)
    assert type(body).__name__ == "LlamaModel"


@pytest.mark.parametrize("model_type", ["qwen3_next", "mixtral", "llama"])
def test_files_of_metal_config_have_transformers_own_values(
    model_type: str, tmp_path: Path
) -> None:
    """Norms without the one that MLX adds, names of the Hub, torch's convolutions."""
    import cases_experts
    import cases_recurrent

    cases = [LLAMA, *cases_recurrent.CASES, *cases_experts.CASES]
    case = next(case for case in cases if case.model_type == model_type)
    tmp_path = tmp_path / "metal"
    _write_dense_checkpoint(case, tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tensors = load_file(tmp_path / "model.safetensors")
    for name, module in twin.named_modules():
        stored = f"{name}.weight"
        if (
            isinstance(module, nn.Linear)
            and stored in tensors
            and "lm_head" not in name
        ):
            packed = AffineQuantizedTensor.from_dense(tensors[stored], 4, 32)
            tensors[stored] = packed.packed
            tensors[f"{name}.scales"] = packed.scales
            tensors[f"{name}.qbiases"] = packed.biases
            with torch.no_grad():
                module.weight.copy_(packed.dequantize())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "metal",
        "bits": 4,
        "group_size": 32,
        "modules_to_not_convert": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = from_pretrained(tmp_path)
    assert sum(isinstance(p, AffineQuantizedTensor) for p in model.parameters()) > 4
    with torch.no_grad():
        got, want = model(IDS).logits.double(), twin(IDS).logits.double()
    assert (got - want).norm() / want.norm() < 1e-5
