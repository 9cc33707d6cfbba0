"""accelerate: weights that stay on the CPU until they are used, ties, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from affine_tensor import AffineConfig, AffineQuantizedTensor, footprint, quantize_

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_submodules  # noqa: E402
from accelerate.utils import (  # noqa: E402
    compute_module_sizes,
    get_balanced_memory,
    infer_auto_device_map,
)

IDS = torch.tensor([[1, 2, 63]])

# accelerate runs "cpu" modules on the main device, and takes this for another one.
ACCELERATOR = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128)
        self.head = nn.Linear(128, 64, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(F.relu(self.up(self.embed(ids)))))


def build(tied: bool, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    model = Model(tied).to(dtype)

    def choose(module: nn.Module, name: str) -> AffineConfig:
        return AffineConfig(3, 32) if name == "up" else AffineConfig(4, 64)

    quantize_(model, AffineConfig(4, 64), choose, progress=False)
    return model


WEIGHTS = ("embed", "up", "down", "head")


def offloaded(model: nn.Module) -> list[str]:
    """The modules whose weights are on the meta device between calls."""
    return [name for name in WEIGHTS if model.get_submodule(name).weight.is_meta]


MAPS: dict[str, dict[str, Any]] = {
    "whole": {"": ACCELERATOR},
    "all on the cpu": dict.fromkeys(WEIGHTS, "cpu"),
    "inner ones on the cpu": {
        "embed": ACCELERATOR,
        "up": "cpu",
        "down": "cpu",
        "head": ACCELERATOR,
    },
    "outer ones on the cpu": {
        "embed": "cpu",
        "up": ACCELERATOR,
        "down": ACCELERATOR,
        "head": "cpu",
    },
    "one of the tied on the cpu": {
        "embed": ACCELERATOR,
        "up": ACCELERATOR,
        "down": "cpu",
        "head": "cpu",
    },
}


def dispatch(model: nn.Module, device_map: dict[str, Any]) -> None:
    accelerate.dispatch_model(
        model, device_map, main_device=ACCELERATOR, force_hooks=True
    )


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dispatched_models_give_the_same(
    name: str, tied: bool, dtype: torch.dtype, no_fallback: None
) -> None:
    dense = Model(tied).to(dtype)
    dispatch(dense, MAPS[name])
    expected = [offloaded(dense)]
    dense(IDS)
    expected += [offloaded(dense)]
    assert expected[1] or name == "whole"
    model = build(tied, dtype)
    with torch.no_grad():
        want = model(IDS)
        dispatch(model, MAPS[name])
        assert offloaded(model) == expected[0]
        for _ in range(2):
            assert torch.equal(model(IDS), want)
        assert offloaded(model) == expected[1]
    for own in WEIGHTS:
        assert isinstance(model.get_submodule(own).weight, AffineQuantizedTensor)


def test_tied_weights_stay_one_and_the_others_are_their_own() -> None:
    """data_ptr() of wrapper subclasses is 0: all would be tied to the first."""
    model = build(tied=True)
    accelerate.dispatch_model(
        model, dict.fromkeys(WEIGHTS, "cpu"), main_device="cpu", force_hooks=True
    )
    assert model.head.weight is model.embed.weight
    pointers = {model.get_submodule(own).weight.data_ptr() for own in WEIGHTS}
    assert len(pointers) == 3
    assert 0 not in pointers


def test_cpu_offload_and_back(no_fallback: None) -> None:
    for tied in (True, False):
        model = build(tied)
        want = model(IDS)
        kept = {own: model.get_submodule(own).weight.packed.clone() for own in WEIGHTS}
        accelerate.cpu_offload(model, execution_device=ACCELERATOR)
        assert offloaded(model) == [*WEIGHTS]
        assert torch.equal(model(IDS), want)
        remove_hook_from_submodules(model)
        assert offloaded(model) == []
        assert torch.equal(model(IDS), want)
        for own, packed in kept.items():
            assert torch.equal(model.get_submodule(own).weight.packed, packed)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_of_transformers_with_a_map_of_its_sizes(
    tied: bool, no_fallback: None
) -> None:
    """As device_map="auto" on an accelerator with room for a part of the layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    quantize_(model, AffineConfig(4, 64), progress=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(IDS, **options)
    device_map = infer_auto_device_map(
        model,
        {0: footprint(model).bytes * 2 // 3, "cpu": 10**9},
        no_split_module_classes=["LlamaDecoderLayer"],
    )
    assert {0, "cpu"} == set(device_map.values())
    dispatch(model, {n: ACCELERATOR if d == 0 else d for n, d in device_map.items()})
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(model.generate(IDS, **options), want)


def test_offloaded_weights_train_what_is_beside_them(no_fallback: None) -> None:
    grads = []
    for offload in (False, True):
        model = build(tied=False)
        if offload:
            dispatch(model, dict.fromkeys(WEIGHTS, "cpu"))
        x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        F.relu(model.up(x)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offload_to_disk_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    text = "map the modules to devices and 'cpu' only"
    with pytest.raises(RuntimeError, match=text):
        accelerate.disk_offload(build(True, dtype), tmp_path)
    with pytest.raises(RuntimeError, match=text):
        accelerate.dispatch_model(
            build(True, dtype),
            {"embed": "cpu", "up": "disk", "down": "cpu", "head": "cpu"},
            offload_dir=tmp_path,
        )


# ---- sizes --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("named", [None, torch.float32, torch.bfloat16, "float16"])
def test_sizes_are_those_of_the_parts(dtype: torch.dtype, named: Any) -> None:
    model = build(True, dtype)
    sizes = compute_module_sizes(model, dtype=named)
    width = min(dtype.itemsize, 4 if named in (None, torch.float32) else 2)
    for own in ("up", "down"):
        module = model.get_submodule(own)
        assert sizes[f"{own}.weight"] == pytest.approx(module.weight.nbytes, abs=4)
        assert sizes[f"{own}.bias"] == module.bias.numel() * width
    if named is None:
        assert sizes[""] == footprint(model).bytes


def test_a_device_takes_what_fits_when_packed() -> None:
    """All of it in memory that the dense weights would fill twice over."""
    model = build(tied=False)
    fits = 2 * footprint(model).bytes
    assert fits < sum(p.numel() * 4 for p in model.parameters()) / 2
    assert infer_auto_device_map(model, {0: fits, "cpu": 10**9}) == {"": 0}
    half = infer_auto_device_map(model, {0: fits // 3, "cpu": 10**9})
    assert {0, "cpu"} == set(half.values())
    memory = get_balanced_memory(model, {0: 10**6, 1: 10**6, "cpu": 10**9})
    assert memory[0] < footprint(model).bytes


def test_the_number_of_weights_is_told_to_all_others() -> None:
    weight = build(True).up.weight
    assert weight.numel() == weight.nelement() == 256 * 128

    def compute_module_sizes() -> int:
        return weight.numel()

    assert compute_module_sizes() == 256 * 128
