"""Models that are no causal language models: encoders, vision, speech, T5, diffusion.

The oracle is the dense twin, which holds the same dequantized weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from other_models import DIFFUSERS, TRANSFORMERS, Inputs, Model
from torch import Tensor, nn
from transformers import PreTrainedModel

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    dequantize_,
    footprint,
    from_pretrained,
    load_checkpoint_,
    quantize_,
    register,
    save_checkpoint,
)

ALL = [*TRANSFORMERS, *DIFFUSERS]
BY_NAME = {model.name: model for model in ALL}
CONFIG = AffineConfig(4, 32)
# Relative L2 to the dense twin; CLIP's normalized products double what it sees.
WITHIN = {torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def built(model: Model) -> nn.Module:
    if model in DIFFUSERS:
        pytest.importorskip("diffusers", reason="diffusers has this model")
    torch.manual_seed(0)
    return model.build().eval()


def packed(model: Model) -> nn.Module:
    module = built(model)
    report = quantize_(module, CONFIG, progress=False)
    assert all("columns are not a multiple" in w for w in report.skipped.values())
    assert len(report.quantized) > 2 * len(report.skipped)
    return module


def dense_twin(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    dequantize_(twin, progress=False)
    assert not any(isinstance(p, AffineQuantizedTensor) for p in twin.parameters())
    return twin


def weights(module: nn.Module) -> int:
    return sum(isinstance(p, AffineQuantizedTensor) for p in module.parameters())


def floats(out: Any) -> list[Tensor]:
    """All floating tensors of what a model returns."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if hasattr(out, "values"):
        out = list(out.values())
    if not isinstance(out, (list, tuple)):
        return []
    return [tensor for one in out for tensor in floats(one)]


def call(
    module: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        return floats(module(**cast))


def assert_close(ours: list[Tensor], theirs: list[Tensor], within: float) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert float(error) <= within


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.name)
def test_outputs_are_those_of_the_dense_twin(model: Model, no_fallback: None) -> None:
    module = packed(model)
    twin = dense_twin(module)
    inputs = model.inputs()
    for dtype, within in WITHIN.items():
        ours, theirs = copy.deepcopy(module).to(dtype), copy.deepcopy(twin).to(dtype)
        assert weights(ours) == weights(module)
        assert_close(call(ours, inputs, dtype), call(theirs, inputs, dtype), within)
    half = copy.deepcopy(module).half()
    assert_same(call(half, inputs, torch.float16), call(ours, inputs, torch.float16))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = call(module, inputs), call(twin, inputs)
    assert_close(ours, theirs, WITHIN[torch.bfloat16])


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.name)
def test_copies_and_files_give_the_same_bits(
    model: Model, tmp_path: Path, no_fallback: None
) -> None:
    module = packed(model)
    inputs = model.inputs()
    expected = call(module, inputs)
    torch.manual_seed(1)
    for assign in (False, True):
        other = model.build().eval()
        quantize_(other, CONFIG, progress=False)
        other.load_state_dict(module.state_dict(), assign=assign)
        assert_same(call(other, inputs), expected)
    save_checkpoint(module, tmp_path / "saved", progress=False)
    fresh = model.build().eval()
    before = footprint(fresh).bytes
    load_checkpoint_(fresh, tmp_path / "saved")
    assert weights(fresh) == weights(module)
    assert_same(call(fresh, inputs), expected)
    assert footprint(fresh).bytes == footprint(module).bytes < before / 2
    assert fresh.get_memory_footprint() == footprint(fresh).bytes  # type: ignore
    meta = copy.deepcopy(module).to("meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert weights(meta) == weights(module)


@pytest.mark.parametrize("model", TRANSFORMERS, ids=lambda model: model.name)
def test_transformers_saves_and_loads_them(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = PreTrainedModel.__dict__["from_pretrained"]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", stock)
    register()
    module: Any = packed(model)
    expected = call(module, model.inputs())
    module.save_pretrained(tmp_path)
    loads = [type(module).from_pretrained, from_pretrained]
    for load in loads:
        again = load(tmp_path).eval()
        # BertLMHeadModel is the one that continues a text: the same weights.
        assert type(again) is type(module) or model.name == "bert"
        assert weights(again) == weights(module)
        assert_same(call(again, model.inputs()), expected)


@pytest.mark.parametrize("model", DIFFUSERS, ids=lambda model: model.name)
def test_diffusers_saves_them_as_pickles_and_refuses_safetensors(
    model: Model, tmp_path: Path
) -> None:
    module: Any = packed(model)
    expected = call(module, model.inputs())
    with pytest.raises(RuntimeError, match=r"save_checkpoint\(model, folder\)"):
        module.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    module.save_pretrained(tmp_path, safe_serialization=False)
    again = type(module).from_pretrained(tmp_path, use_safetensors=False)
    assert weights(again) == weights(module)
    assert_same(call(again, model.inputs()), expected)


@pytest.mark.parametrize("model", DIFFUSERS, ids=lambda model: model.name)
def test_a_checkpoint_of_diffusers_has_its_configuration(
    model: Model, tmp_path: Path
) -> None:
    module: Any = packed(model)
    save_checkpoint(module, tmp_path / "saved", progress=False)
    cls = type(module)
    fresh = cls.from_config(cls.load_config(tmp_path / "saved")).eval()
    load_checkpoint_(fresh, tmp_path / "saved")
    assert_same(call(fresh, model.inputs()), call(module, model.inputs()))


def test_safetensors_says_what_to_do(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = packed(BY_NAME["vit"])
    with pytest.raises(RuntimeError, match=r"save_checkpoint\(model, folder\)"):
        save_file(module.state_dict(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bert", "vit", "whisper", "t5", "dit"])
def test_compiled_they_give_the_same(name: str) -> None:
    model = BY_NAME[name]
    module = packed(model)
    expected = call(module, model.inputs())
    torch.compiler.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(call(compiled, model.inputs()), expected, 1e-5)


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_what_is_generated_with_a_cache(name: str, no_fallback: None) -> None:
    model = BY_NAME[name]
    module: Any = packed(model)
    twin: Any = dense_twin(module)
    inputs = {k: v for k, v in model.inputs().items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    results = [
        m.generate(
            **inputs,
            **options,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for m, use_cache in ((module, True), (module, False), (twin, True))
    ]
    ours, uncached, theirs = results
    assert ours.sequences.equal(theirs.sequences)
    assert ours.sequences.equal(uncached.sequences)
    assert_close(list(ours.logits), list(theirs.logits), 1e-5)
    assert_close(list(ours.logits), list(uncached.logits), 1e-5)


@pytest.mark.parametrize("name", ["whisper", "t5", "bert", "modernbert"])
def test_tied_weights_stay_one(name: str) -> None:
    module: Any = packed(BY_NAME[name])
    head = module.get_output_embeddings().weight
    assert isinstance(head, AffineQuantizedTensor)
    assert head is module.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip", "clip"])
def test_positions_for_another_size_of_image(name: str) -> None:
    """SigLIP and CLIP keep them in an embedding, whose weight they resize."""
    model = BY_NAME[name]
    module = packed(model)
    inputs: dict[str, Any] = model.inputs()
    inputs["pixel_values"] = torch.nn.functional.interpolate(
        inputs["pixel_values"], (48, 48)
    )
    if name != "dinov2":  # which always does
        inputs["interpolate_pos_encoding"] = torch.tensor(True)
    twin = dense_twin(module)
    assert_close(call(module, inputs), call(twin, inputs), WITHIN[torch.float32])


@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_torch_encoders_reads_no_packed_weight_as_dense(
    nested: bool, no_fallback: None
) -> None:
    """In eval mode torch gives whole layers, padding cut out, to fused kernels, which
    read `out_proj.weight` themselves. For subclasses of tensors it must not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    report = quantize_(module, CONFIG, progress=False)
    assert "layers.0.self_attn.out_proj" in report.quantized
    twin = dense_twin(module)
    x = torch.randn(2, 7, 64)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            for mask in (None, padding):
                ours, theirs = (
                    m(x, src_key_padding_mask=mask).detach() for m in (module, twin)
                )
                length = min(ours.shape[1], theirs.shape[1])
                kept = torch.ones(2, 7).bool() if mask is None else ~mask
                kept = kept[:, :length]
                assert_close([ours[:, :length][kept]], [theirs[:, :length][kept]], 3e-6)


def test_attention_of_torch() -> None:
    torch.manual_seed(0)
    for options in ({}, {"kdim": 32, "vdim": 32}):
        module = nn.MultiheadAttention(64, 4, batch_first=True, **options).eval()
        assert quantize_(module, CONFIG, progress=False).quantized == ["out_proj"]
        twin = dense_twin(module)
        x = torch.randn(2, 5, 64)
        y = x[..., :32].contiguous() if options else x
        for need_weights in (False, True):
            with torch.no_grad():
                ours, theirs = (
                    m(x, y, y, need_weights=need_weights)[0] for m in (module, twin)
                )
            assert_close([ours], [theirs], 3e-6)
