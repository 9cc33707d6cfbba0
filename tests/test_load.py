"""load_checkpoint_: what goes where, what is refused, and that a load is a transaction.

The checkpoints are written with safetensors, so that they can be wrong in every way;
those that mlx-lm writes are loaded in test_architectures.py and test_save.py.
"""

from __future__ import annotations

import copy
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from hub_server import REVOKED_TOKEN, HubServer, only_loopback, use_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    CheckpointError,
    load_checkpoint_,
    quantize_,
)
from affine_tensor.checkpoint import load, mlx
from affine_tensor.checkpoint.files import StoredTensor

Q4 = {"bits": 4, "group_size": 32}
Tensors = dict[str, Tensor]


class Net(nn.Module):
    """An embedding, projections with and without bias, a norm, a head, buffers."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64, bias=False)])
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 24, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("table", torch.full((4,), 7.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def packed(
    name: str,
    *shape: int,
    bits: int = 4,
    group_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """The three tensors that MLX stores for a quantized module."""
    dense = random(*shape, seed=len(name) + bits, dtype=dtype)
    weight = AffineQuantizedTensor.from_dense(dense, bits, group_size)
    return {
        f"{name}.weight": weight.packed,
        f"{name}.scales": weight.scales,
        f"{name}.biases": weight.biases,
    }


def checkpoint_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    """A checkpoint that fits `Net`, all of its modules in 4 bits, groups of 32."""
    return {
        **packed("embed", 24, 64, dtype=dtype),
        **packed("layers.0", 96, 64, dtype=dtype),
        "layers.0.bias": random(96, seed=1, dtype=dtype),
        **packed("layers.1", 64, 96, dtype=dtype),
        "norm.weight": random(64, seed=2, dtype=dtype),
        "norm.bias": random(64, seed=3, dtype=dtype),
        **packed("head", 24, 64, dtype=dtype),
        "count": torch.tensor([1, 2, 3]),
    }


def write(
    folder: Path,
    tensors: Tensors,
    quantization: object = Q4,
    config: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint in `folder`; its config.json is `config` if that is given."""
    folder.mkdir(exist_ok=True, parents=True)
    config = {"quantization": quantization} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def parts(tensor: Tensor) -> list[Tensor]:
    if isinstance(tensor, AffineQuantizedTensor):
        return [tensor.packed, tensor.scales, tensor.biases]
    return [tensor.detach()]


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> list[Any]:
    """Every parameter and buffer: which object, what kind, and all its bytes."""
    places = [
        (prefix, own, kind, value)
        for prefix, module in model.named_modules()
        for kind in ("_parameters", "_buffers")
        for own, value in getattr(module, kind).items()
    ]
    return [
        (
            (prefix, own, kind, id(value), type(value), value.requires_grad),
            value.dtype,
            [b"" if p.is_meta else raw_bytes(p) for p in parts(value)],
        )
        for prefix, own, kind, value in places
        if value is not None
    ]


def assert_holds(model: nn.Module, tensors: Tensors) -> None:
    """All parameters and persistent buffers are those of the file, bit for bit."""
    for name, value in model.state_dict().items():
        stem = name.removesuffix("weight")
        if f"{stem}scales" not in tensors:
            want = tensors[name]
            assert value.dtype == want.dtype, name
            assert raw_bytes(value) == raw_bytes(want), name
            continue
        assert isinstance(value, AffineQuantizedTensor), name
        for got, part in zip(parts(value), ("weight", "scales", "biases"), strict=True):
            want = tensors[f"{stem}{part}"]
            assert got.dtype == want.dtype, f"{stem}{part}"
            assert raw_bytes(got) == raw_bytes(want), f"{stem}{part}"


# ---- what goes where -------------------------------------------------------------


def test_every_tensor_goes_to_its_name(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    model = Net()
    dense = {n: p for n, p in model.named_parameters() if p.dim() == 1}
    modules = [type(module) for module in model.modules()]

    report = load_checkpoint_(model, write(tmp_path, tensors))

    assert_holds(model, tensors)
    assert [type(module) for module in model.modules()] == modules
    # Dense parameters are written into, so that optimizers and hooks still hold them.
    assert all(dict(model.named_parameters())[n] is p for n, p in dense.items())
    assert all(p.requires_grad for p in dense.values())
    assert not any(m.weight.requires_grad for m in (model.embed, *model.layers))
    assert model.table.tolist() == [7.0] * 4
    assert report.packed == dict.fromkeys(
        ["embed.weight", "layers.0.weight", "layers.1.weight", "head.weight"], (4, 32)
    )
    assert sorted(report.dense) == [
        "count",
        "layers.0.bias",
        "norm.bias",
        "norm.weight",
    ]
    assert report.ignored == []
    file_bytes = sum(
        t.nbytes for t in load_file(tmp_path / "model.safetensors").values()
    )
    assert report.packed_bytes + report.dense_bytes == file_bytes


def test_the_loaded_model_computes_with_the_weights_of_the_file(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    model = Net()
    load_checkpoint_(model, write(tmp_path, tensors))
    ids = torch.arange(24).view(2, 12)

    def dense(stem: str) -> Tensor:  # MLX's formula, in float64
        words = tensors[f"{stem}.weight"].view(torch.int32).to(torch.int64)
        codes = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
        groups = codes.reshape(len(words), -1, 32).double()
        scales, biases = (
            tensors[f"{stem}.{part}"].double().unsqueeze(-1)
            for part in ("scales", "biases")
        )
        return (groups * scales + biases).flatten(1)

    x = dense("embed")[ids]
    x = x @ dense("layers.0").T + tensors["layers.0.bias"].double()
    x = x @ dense("layers.1").T
    norm = (tensors["norm.weight"].double(), tensors["norm.bias"].double())
    want = torch.nn.functional.layer_norm(x, (64,), *norm) @ dense("head").T
    with torch.no_grad():
        torch.testing.assert_close(model(ids).double(), want, rtol=1e-4, atol=1e-4)


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = checkpoint_tensors() | packed("head", 24, 64, bits=8, group_size=64)
    tensors["table"] = torch.ones(4)
    eight = {"bits": 8, "group_size": 64}
    write(tmp_path / "org" / "model", tensors, {**Q4, "head": eight})
    monkeypatch.chdir(tmp_path)
    assert_expected_inline(
        str(load_checkpoint_(Net(), "org/model")),
        """\
org/model: 12,096 bytes packed, 920 dense
loaded          count  bits  group
packed weights      3     4     32
packed weights      1     8     64
dense tensors       4     -      -
not needed by the model: table""",
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_all_formats(bits: int, group_size: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 3, bias=False))
    tensors = packed("0", 3, 256, bits=bits, group_size=group_size)
    write(tmp_path, tensors, {"bits": bits, "group_size": group_size})
    report = load_checkpoint_(model, tmp_path)
    assert_holds(model, tensors)
    assert report.packed == {"0.weight": (bits, group_size)}


def test_a_module_by_itself_and_three_dimensions(tmp_path: Path) -> None:
    tensors = {k.removeprefix("m."): v for k, v in packed("m", 8, 64).items()}
    layer = nn.Linear(64, 8, bias=False)
    load_checkpoint_(layer, write(tmp_path / "one", tensors))
    assert_holds(layer, tensors)

    experts = nn.Module()
    experts.up = nn.Module()
    experts.up.weight = nn.Parameter(torch.zeros(3, 8, 64))
    tensors = packed("up", 3, 8, 64)
    load_checkpoint_(experts, write(tmp_path / "three", tensors))
    assert_holds(experts, tensors)


FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("own", FLOATS, ids=str)
@pytest.mark.parametrize("stored", FLOATS, ids=str)
def test_scales_keep_their_dtype_and_weights_count_as_the_models(
    own: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    tensors = checkpoint_tensors(stored)
    model = Net().to(own)
    load_checkpoint_(model, write(tmp_path, tensors))
    for module in (model.embed, model.head, *model.layers):
        assert module.weight.dtype == own
        assert module.weight.scales.dtype == module.weight.biases.dtype == stored
        assert (
            module(
                torch.ones(1, 96 if module is model.layers[1] else 64).to(own)
                if isinstance(module, nn.Linear)
                else torch.tensor([1])
            ).dtype
            == own
        )
    cast = {n: t.to(own) for n, t in tensors.items() if t.dim() == 1 and n != "count"}
    assert_holds(model, tensors | cast)


@pytest.mark.parametrize(
    ("scales", "biases", "both"),
    [
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_scales_and_biases_of_different_dtypes_are_joined_exactly(
    scales: torch.dtype, biases: torch.dtype, both: torch.dtype, tmp_path: Path
) -> None:
    tensors = packed("0", 8, 64)
    tensors["0.scales"] = tensors["0.scales"].to(scales)
    tensors["0.biases"] = tensors["0.biases"].to(biases)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    load_checkpoint_(model, write(tmp_path, tensors))
    weight = model[0].weight
    assert weight.scales.dtype == weight.biases.dtype == both
    assert weight.scales.double().equal(tensors["0.scales"].double())
    assert weight.biases.double().equal(tensors["0.biases"].double())


def test_words_may_be_called_signed(tmp_path: Path) -> None:
    tensors = packed("0", 8, 64)
    signed = tensors | {"0.weight": tensors["0.weight"].view(torch.int32)}
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    load_checkpoint_(model, write(tmp_path, signed))
    assert_holds(model, tensors)


def test_modules_that_were_left_dense_stay_dense(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    for part in ("scales", "biases"):
        del tensors[f"layers.1.{part}"]
    tensors["layers.1.weight"] = random(64, 96, seed=9)
    model = Net()
    weight = model.layers[1].weight
    load_checkpoint_(model, write(tmp_path, tensors, {**Q4, "layers.1": False}))
    assert_holds(model, tensors)
    assert model.layers[1].weight is weight
    assert weight.requires_grad


def test_one_element_may_have_another_rank(tmp_path: Path) -> None:
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(64, 8, bias=False))
            self.gain = nn.Parameter(torch.zeros(1))
            self.shift = nn.Parameter(torch.zeros(()))
            self.scale = nn.Parameter(torch.zeros(1, 1))

    tensors = packed("0", 8, 64)
    ones = {"gain": torch.tensor(2.0), "shift": torch.tensor([3.0])}
    ones["scale"] = torch.tensor([4.0])
    model = Scaled()
    load_checkpoint_(model, write(tmp_path, tensors | ones))
    assert model.gain.tolist() == [2.0]
    assert model.shift.tolist() == 3.0
    assert model.scale.tolist() == [[4.0]]


def test_a_model_on_meta(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    with torch.device("meta"):
        model = Net(tied=False)
    model.norm.bias.requires_grad_(False)
    load_checkpoint_(model, write(tmp_path, tensors))
    assert_holds(model, tensors)
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert isinstance(model.norm.weight, nn.Parameter)
    assert model.norm.weight.requires_grad
    assert not model.norm.bias.requires_grad
    assert model.count.tolist() == [1, 2, 3]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_buffer_of_two_modules_stays_shared(device: str, tmp_path: Path) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Module())
        model.register_buffer("scale", torch.zeros(2))
    model[1].register_buffer("scale", model.scale)
    tensors = packed("0", 8, 64) | {"scale": torch.tensor([1.0, 2.0])}
    load_checkpoint_(model, write(tmp_path, tensors))
    assert model.scale.tolist() == [1.0, 2.0]
    assert model[1].scale is model.scale


def test_loading_over_a_quantized_model(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    tensors["layers.1.weight"] = random(64, 96, seed=9)
    del tensors["layers.1.scales"], tensors["layers.1.biases"]
    write(tmp_path, tensors)
    model = Net()
    quantize_(model, AffineConfig(8, 32))
    load_checkpoint_(model, tmp_path)
    assert_holds(model, tensors)
    load_checkpoint_(model, tmp_path)  # over what it loaded itself
    assert_holds(model, tensors)


def test_a_model_made_in_inference_mode(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    write(tmp_path, tensors)
    with torch.inference_mode():
        model, other = Net(), Net()
        load_checkpoint_(other, tmp_path)
    load_checkpoint_(model, tmp_path)  # its dense tensors cannot be written to here
    assert_holds(model, tensors)
    assert_holds(other, tensors)
    assert model.norm.weight.requires_grad


def test_an_expanded_parameter(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    model = Net()
    model.norm.weight = nn.Parameter(torch.ones(1).expand(64))
    load_checkpoint_(model, write(tmp_path, tensors))
    assert_holds(model, tensors)


# ---- the configuration -----------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"quantization": Q4},
        {"quantization_config": Q4},
        {"quantization": Q4, "quantization_config": Q4},
        {"quantization": {**Q4, "mode": "affine"}},
        {"quantization_config": {**Q4, "quant_method": "mlx"}},
        {"text_config": {"quantization": Q4}},
        {"text_config": {"quantization_config": Q4}},
        {"quantization": Q4, "text_config": {"quantization": {"bits": 7}}},
        {"quantization": {"bits": 8, "group_size": 64, "head": Q4}},
        {"quantization": {"bits": 8, "group_size": 32, "head": {"bits": 4}}},
    ],
    ids=str,
)
def test_where_the_settings_may_stand(config: dict[str, Any], tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    model = Net()
    load_checkpoint_(model, write(tmp_path, tensors, config=config))
    assert_holds(model, tensors)


def test_settings_of_single_modules(tmp_path: Path) -> None:
    tensors = (
        checkpoint_tensors()
        | packed("embed", 24, 64, bits=8, group_size=64)
        | packed("layers.0", 96, 64, bits=3, group_size=64)
        | packed("head", 24, 64, bits=6, group_size=32)
    )
    quantization = {
        **Q4,
        "embed": {"bits": 8, "group_size": 64},
        "layers.0": {"bits": 3, "group_size": 64, "mode": "affine"},
        # As some converters spell it: the shapes say which module is meant.
        "language_model.model.head": {"bits": 6, "group_size": 32},
        "norm": False,
    }
    model = Net()
    report = load_checkpoint_(model, write(tmp_path, tensors, quantization))
    assert_holds(model, tensors)
    assert report.packed == {
        "embed.weight": (8, 64),
        "layers.0.weight": (3, 64),
        "layers.1.weight": (4, 32),
        "head.weight": (6, 32),
    }


# ---- ties ------------------------------------------------------------------------


def without(tensors: Tensors, *stems: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in stems}


@pytest.mark.parametrize("absent", ["head", "embed"])
def test_a_tied_weight_is_stored_once(absent: str, tmp_path: Path) -> None:
    tensors = without(checkpoint_tensors(), absent)
    model = Net(tied=True)
    load_checkpoint_(model, write(tmp_path, tensors))
    assert model.head.weight is model.embed.weight
    present = {"head": "embed", "embed": "head"}[absent]
    doubled = {n.replace(present, absent): t for n, t in tensors.items()}
    assert_holds(model, tensors | doubled)


@pytest.mark.parametrize("dense", [False, True])
def test_a_tied_weight_stored_twice(dense: bool, tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    for part in ("weight", "scales", "biases"):
        tensors[f"head.{part}"] = tensors[f"embed.{part}"].clone()
    if dense:
        tensors = without(tensors, "head", "embed")
        for stem in ("embed", "head"):
            tensors[f"{stem}.weight"] = random(24, 64, seed=4)
    model = Net(tied=True)
    load_checkpoint_(model, write(tmp_path / "equal", tensors))
    assert model.head.weight is model.embed.weight
    assert_holds(model, tensors)

    # The last bit of one of them.
    name = "head.weight" if dense else "head.biases"
    tensors[name].view(torch.int32)[-1, -1] ^= 1
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_(model, write(tmp_path / "different", tensors))
    assert "ties embed.weight and head.weight" in str(caught.value)
    assert "tie_word_embeddings=False" in str(caught.value)
    assert state(model) == before
    # The way out for a module that has no configuration.
    way = "model.head.weight = copy.deepcopy(model.head.weight)"
    assert str(caught.value).endswith(way)
    exec(way, {"model": model, "copy": copy})
    load_checkpoint_(model, tmp_path / "different")
    assert_holds(model, tensors)


@pytest.mark.parametrize("dense", ["head", "embed"])
def test_a_tied_weight_stored_packed_and_dense(dense: str, tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    twin = {"head": "embed", "embed": "head"}[dense]
    weight = AffineQuantizedTensor.from_packed(
        *(tensors[f"{twin}.{part}"] for part in ("weight", "scales", "biases")), **Q4
    )
    tensors = without(tensors, dense) | {f"{dense}.weight": weight.dequantize()}
    model = Net(tied=True)
    load_checkpoint_(model, write(tmp_path / "equal", tensors))
    assert isinstance(model.embed.weight, AffineQuantizedTensor)
    assert model.head.weight is model.embed.weight
    tensors[f"{dense}.weight"][5, 6] += 1e-5
    with pytest.raises(
        CheckpointError, match=rf"ties {twin}\.weight and {dense}\.weight"
    ):
        load_checkpoint_(model, write(tmp_path / "different", tensors))


def test_a_missing_tied_weight_is_listed_once(tmp_path: Path) -> None:
    tensors = without(checkpoint_tensors(), "head", "embed")
    with pytest.raises(CheckpointError, match=r"1 missing:\n  embed\.weight\n"):
        load_checkpoint_(Net(tied=True), write(tmp_path, tensors))


def test_ties_on_meta(tmp_path: Path) -> None:
    tensors = without(checkpoint_tensors(), "head")
    with torch.device("meta"):
        model = Net(tied=True)
    load_checkpoint_(model, write(tmp_path, tensors))
    assert model.head.weight is model.embed.weight
    assert not model.head.weight.is_meta


# ---- what is refused, and that the model is then as it was -----------------------

Change = Callable[[Tensors, dict[str, Any]], object]


def change(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, config: tensors.update({name: value(tensors[name])})


def settings(**changes: Any) -> Change:
    return lambda tensors, config: config["quantization"].update(changes)


def remove(*names: str) -> Change:
    return lambda tensors, config: [tensors.pop(name) for name in names]


def packed_as(*shape: int, **format: int) -> Change:
    return lambda tensors, config: tensors.update(packed("head", *shape, **format))


def as_float_format(mode: str, bits: int, group_size: int) -> Change:
    def apply(tensors: Tensors, config: dict[str, Any]) -> None:
        mx = pytest.importorskip("mlx.core")
        words, scales = mx.quantize(
            mx.ones((24, 64)), group_size=group_size, bits=bits, mode=mode
        )
        remove("head.biases")(tensors, config)
        tensors["head.weight"] = torch.tensor(words.tolist(), dtype=torch.uint32)
        tensors["head.scales"] = torch.tensor(scales.tolist(), dtype=torch.uint8)

    return apply


HEAD = "of another shape, format or dtype:\n  head.weight: "
REFUSED: dict[str, tuple[Change, str]] = {
    "missing": (remove("norm.bias"), "1 missing:\n  norm.bias\n"),
    "missing buffer": (remove("count"), "1 missing:\n  count\n"),
    "missing module": (
        remove("head.weight", "head.scales", "head.biases"),
        "1 missing:\n  head.weight\n",
    ),
    "scales alone": (
        remove("head.weight", "head.biases"),
        "1 missing:\n  head.weight\n1 unexpected:\n  head.scales\n",
    ),
    "unexpected": (
        lambda tensors, config: tensors.update({"tail.weight": torch.ones(2)}),
        "1 unexpected:\n  tail.weight\n",
    ),
    "unexpected module": (
        lambda tensors, config: tensors.update(packed("tail", 8, 64)),
        "3 unexpected:\n  tail.biases\n  tail.scales\n  tail.weight\n",
    ),
    "dense of another shape": (
        change("norm.bias", lambda t: t[:32]),
        "norm.bias: float32 [32]; the model has [64]\n",
    ),
    "dense of as many elements": (
        change("norm.bias", lambda t: t.view(8, 8)),
        "norm.bias: float32 [8, 8]; the model has [64]\n",
    ),
    "integers for floats": (
        change("norm.bias", lambda t: t.int()),
        "norm.bias: int32; the model has float32\n",
    ),
    "floats for integers": (
        change("count", lambda t: t.float()),
        "count: float32; the model has int64\n",
    ),
    "narrower integers": (
        change("count", lambda t: t.int()),
        "count: int32; the model has int64\n",
    ),
    "words without scales": (
        remove("head.scales", "head.biases"),
        HEAD
        + "uint32 words [24, 8], of which head.scales and head.biases are missing\n",
    ),
    "words without scales alone": (
        remove("head.scales"),
        HEAD + "uint32 words [24, 8], of which head.scales is missing\n",
    ),
    "words that are no weight": (
        change("norm.bias", lambda t: t.view(torch.int32).view(torch.uint32)),
        "norm.bias: uint32; the model has float32\n",
    ),
    "no biases": (
        remove("head.biases"),
        HEAD + "its biases are missing: head.biases\n",
    ),
    "mxfp4": (
        as_float_format("mxfp4", 4, 32),
        HEAD
        + "it has uint8 scales and no biases: a float format (mxfp4, nvfp4, mxfp8)",
    ),
    "nvfp4": (
        as_float_format("nvfp4", 4, 16),
        HEAD
        + "it has uint8 scales and no biases: a float format (mxfp4, nvfp4, mxfp8)",
    ),
    "mxfp8": (
        as_float_format("mxfp8", 8, 32),
        HEAD
        + "it has uint8 scales and no biases: a float format (mxfp4, nvfp4, mxfp8)",
    ),
    "scales are integers": (
        change("head.scales", lambda t: t.int()),
        HEAD + "head.scales is int32; allowed are F32, F16, BF16\n",
    ),
    "scales are float64": (
        change("head.scales", lambda t: t.double()),
        HEAD + "head.scales is float64; allowed are F32, F16, BF16\n",
    ),
    "biases are integers": (
        change("head.biases", lambda t: t.to(torch.int8)),
        HEAD + "head.biases is int8; allowed are F32, F16, BF16\n",
    ),
    "scales lack rows": (
        change("head.scales", lambda t: t[:-1]),
        HEAD + "weight [24, 8], scales [23, 2] and biases [24, 2] do not have the same "
        "rows and groups\n",
    ),
    "scales and biases lack groups": (
        lambda tensors, config: [
            change(f"head.{part}", lambda t: t[:, :1])(tensors, config)
            for part in ("scales", "biases")
        ],
        HEAD + "its shape says 4 bits, group size 64, which config.json does not name "
        "(it has 4 bits, group size 32)\n",
    ),
    "biases are turned": (
        change("head.biases", lambda t: t.T),
        HEAD + "weight [24, 8], scales [24, 2] and biases [2, 24] do not have the same "
        "rows and groups\n",
    ),
    "scales have one dimension": (
        lambda tensors, config: [
            change(f"head.{part}", lambda t: t[:, 0])(tensors, config)
            for part in ("scales", "biases")
        ],
        HEAD + "weight [24, 8], scales [24] and biases [24] do not have the same rows "
        "and groups\n",
    ),
    "scales are empty": (
        lambda tensors, config: [
            change(f"head.{part}", lambda t: t[:, :0])(tensors, config)
            for part in ("scales", "biases")
        ],
        HEAD + "its shape is [24, 8], its scales' [24, 0]\n",
    ),
    "scalars": (
        lambda tensors, config: [
            change(f"head.{part}", lambda t: t.view(-1)[0])(tensors, config)
            for part in ("weight", "scales", "biases")
        ],
        HEAD + "its shape is [], its scales' []\n",
    ),
    "words are bytes": (
        change("head.weight", lambda t: t.view(torch.uint8)),
        HEAD + "its words are uint8; U32 is needed\n",
    ),
    "words are floats": (
        change("head.weight", lambda t: t.view(torch.float32)),
        HEAD + "its words are float32; U32 is needed\n",
    ),
    "words are missing": (
        change("head.weight", lambda t: t[:, :-1]),
        HEAD + "7 words and 2 groups a row do not make 64 columns of 1, 2, 3, 4, 5, 6, "
        "8 bits\n",
    ),
    "words of 7 bits": (
        change("head.weight", lambda t: torch.cat([t, t[:, :6]], 1)),
        HEAD
        + "14 words and 2 groups a row do not make 64 columns of 1, 2, 3, 4, 5, 6, "
        "8 bits\n",
    ),
    "K is not divisible": (
        lambda tensors, config: [
            change(f"head.{part}", lambda t: torch.cat([t, t[:, :1]], 1))(
                tensors, config
            )
            for part in ("scales", "biases")
        ],
        HEAD + "8 words and 3 groups a row do not make 64 columns",
    ),
    "groups of 8": (
        lambda tensors, config: [
            change(f"head.{part}", lambda t: t.repeat(1, 4))(tensors, config)
            for part in ("scales", "biases")
        ],
        HEAD + "its groups are 8 wide; allowed are 16, 32, 64, 128, 256\n",
    ),
    "more rows than the model": (
        packed_as(25, 64),
        HEAD + "[25, 64]; the model has [24, 64]\n",
    ),
    "more columns than the model": (
        packed_as(24, 96),
        HEAD + "12 words and 3 groups a row do not make 64 columns",
    ),
    "another rank": (
        packed_as(2, 24, 64),
        HEAD + "[2, 24, 64]; the model has [24, 64]\n",
    ),
    "a format that the config does not name": (
        packed_as(24, 64, bits=8),
        HEAD + "its shape says 8 bits, group size 32, which config.json does not name "
        "(it has 4 bits, group size 32)\n",
    ),
    "twice the columns of the model": (
        # The arrays are those of 8 bits in groups of 32, which is another module's.
        lambda tensors, config: (
            settings(bits=4, group_size=64, embed={"bits": 8, "group_size": 32})(
                tensors, config
            ),
            tensors.update(packed("embed", 24, 64, bits=8)),
            tensors.update(packed("layers.0", 96, 64, group_size=64)),
            tensors.update(packed("layers.1", 64, 192, group_size=64)),
            tensors.update(packed("head", 24, 64, group_size=64)),
        ),
        "layers.1.weight: 192 columns of 4 bits, group size 64, as config.json says; the "
        "model has 96 columns\n",
    ),
    "7 bits in the config": (
        settings(bits=7),
        "settings that are not understood:\n  quantization: bits is 7; allowed are 1, 2, "
        "3, 4, 5, 6, 8\n",
    ),
    "bits is text": (settings(bits="4"), "quantization: bits is '4'; allowed are"),
    "bits is a list": (settings(bits=[4]), "quantization: bits is [4]; allowed are"),
    "bits is true": (settings(bits=True), "quantization: bits is True; allowed are"),
    "groups of 48 in the config": (
        settings(group_size=48),
        "quantization: group_size is 48; allowed are 16, 32, 64, 128, 256\n",
    ),
    "7 bits for one module": (
        settings(head={"bits": 7, "group_size": 32}),
        "quantization of head: bits is 7; allowed are",
    ),
    "an unknown mode": (
        settings(mode="ternary"),
        "quantization: mode is 'ternary'; allowed are affine, mxfp4, nvfp4, mxfp8. "
        "Convert the model again with one of them (mlx_lm.convert --q-mode)\n",
    ),
    "mxfp4 in the config": (
        settings(mode="mxfp4"),
        "which config.json does not name (it has mxfp4)",
    ),
    "no pair in the config": (
        lambda tensors, config: config.update(quantization={"mode": "affine"}),
        "which config.json does not name (it has no pair)\n",
    ),
    "another library's": (
        lambda tensors, config: config.update(
            quantization={**Q4, "quant_method": "gptq"}
        ),
        "is not in MLX format: its config.json says quant_method 'gptq'",
    ),
    "a dense checkpoint": (
        lambda tensors, config: (
            tensors.clear(),
            tensors.update(Net().state_dict()),
            config.clear(),
        ),
        "is not in MLX format: its config.json has no 'quantization'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", ["dense", "quantized", "meta"])
def test_what_does_not_fit_is_refused_and_nothing_changes(
    case: str, kind: str, tmp_path: Path
) -> None:
    apply, said = REFUSED[case]
    tensors, config = checkpoint_tensors(), {"quantization": dict(Q4)}
    apply(tensors, config)
    write(tmp_path, tensors, config=config)
    with torch.device("meta" if kind == "meta" else "cpu"):
        model = Net()
    if kind == "quantized":
        quantize_(model, AffineConfig(4, 32))
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_(model, tmp_path)
    assert said in str(caught.value)
    assert state(model) == before


def test_one_error_lists_everything(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    remove("norm.weight", "layers.0.bias", "embed.biases")(tensors, {})
    tensors |= packed("layers.1", 64, 64) | packed("head", 24, 64, bits=8)
    tensors |= {
        "norm.bias": torch.ones(64, dtype=torch.int32),
        "count": torch.ones(4, dtype=torch.int64),
        "mtp.weight": torch.ones(3),
        "table": torch.ones(9),
    }
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_(Net(), write(tmp_path, tensors))
    assert_expected_inline(
        str(caught.value).replace(str(tmp_path), "FOLDER"),
        """\
FOLDER does not fit the model, which was left as it was.
2 missing:
  layers.0.bias
  norm.weight
5 of another shape, format or dtype:
  embed.weight: its biases are missing: embed.biases
  layers.1.weight: 8 words and 2 groups a row do not make 96 columns of 1, 2, 3, 4, 5, 6, 8 bits
  norm.bias: int32; the model has float32
  head.weight: its shape says 8 bits, group size 32, which config.json does not name (it has 4 bits, group size 32)
  count: int64 [4]; the model has [3]
Files read: model.safetensors""",  # noqa: E501
    )


def test_long_lists_are_whole(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    names = [f"extra.{i:03d}" for i in range(333)]
    tensors |= {name: torch.ones(1) for name in names}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_(Net(), write(tmp_path, tensors))
    lines = str(caught.value).splitlines()
    # How many there are stands above them, and what was read after them.
    assert lines[1] == "333 unexpected:"
    assert lines[2:-1] == [f"  {name}" for name in names]
    assert lines[-1] == "Files read: model.safetensors"


def test_a_number_beyond_float16_is_refused(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(torch.bfloat16)
    tensors["norm.weight"][3] = -70000
    write(tmp_path, tensors)
    model = Net().half()
    before = state(model)
    with pytest.raises(
        CheckpointError, match=r"norm\.weight holds 70144, which float16"
    ):
        load_checkpoint_(model, tmp_path)
    assert state(model) == before
    # What is infinite already is meant so.
    tensors["norm.weight"][3] = float("-inf")
    load_checkpoint_(model, write(tmp_path, tensors))
    assert model.norm.weight[3].item() == float("-inf")


def test_an_embedding_with_max_norm_is_refused(tmp_path: Path) -> None:
    model = Net()
    model.embed.max_norm = 1.0
    before = state(model)
    with pytest.raises(CheckpointError, match=r"embed\.weight: quantized; .* max_norm"):
        load_checkpoint_(model, write(tmp_path, checkpoint_tensors()))
    assert state(model) == before


def test_a_quantized_buffer_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.m = nn.Module()
    model.m.register_buffer("weight", torch.zeros(8, 64))
    with pytest.raises(CheckpointError, match=r"m\.weight: quantized; the model has"):
        load_checkpoint_(model, write(tmp_path, packed("m", 8, 64)))
    assert not model.m.weight.any()


@pytest.mark.parametrize("error", [OSError("disk on fire"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_of_reading_changes_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = checkpoint_tensors()
    write(tmp_path, tensors)
    model = Net()
    before = state(model)
    read = StoredTensor.read
    calls: list[str] = []

    def failing(stored: StoredTensor) -> Tensor:
        calls.append(stored.name)
        if len(calls) > works:
            raise error
        return read(stored)

    monkeypatch.setattr(StoredTensor, "read", failing)
    for works in range(len(tensors)):
        calls.clear()
        with pytest.raises(type(error)):
            load_checkpoint_(model, tmp_path)
        assert len(calls) > works  # other threads may have read on meanwhile
        assert state(model) == before
    calls.clear()
    works = len(tensors)
    load_checkpoint_(model, tmp_path)
    assert sorted(calls) == sorted(tensors)
    assert_holds(model, tensors)


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, checkpoint_tensors())
    file = tmp_path / "model.safetensors"
    read = StoredTensor.read

    def shrinking(stored: StoredTensor) -> Tensor:
        value = read(stored)
        with file.open("r+b") as stream:
            stream.truncate(stored.start + stored.nbytes)
        return value

    monkeypatch.setattr(StoredTensor, "read", shrinking)
    model = Net()
    before = state(model)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends inside"):
        load_checkpoint_(model, tmp_path)
    assert state(model) == before


# ---- files -----------------------------------------------------------------------


def split(folder: Path, tensors: Tensors, shards: int) -> None:
    """One tensor after the other into shards in turn: no module is in one alone."""
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def test_shards_that_split_modules(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    split(write(tmp_path, tensors), tensors, 3)
    model = Net()
    load_checkpoint_(model, tmp_path)
    assert_holds(model, tensors)


def test_a_missing_shard(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    split(write(tmp_path, tensors), tensors, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    model = Net()
    before = state(model)
    with pytest.raises(
        CheckpointError, match=r"lacks model-00002-of-00003\.safetensors"
    ):
        load_checkpoint_(model, tmp_path)
    assert state(model) == before


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_truncated_file(keep: int, tmp_path: Path) -> None:
    file = write(tmp_path, checkpoint_tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    model = Net()
    before = state(model)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint_(model, tmp_path)
    assert state(model) == before


def test_an_index_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    write(tmp_path, tensors)
    folder = write(tmp_path / "model", tensors)
    index = {"weight_map": dict.fromkeys(tensors, "../model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = Net()
    before = state(model)
    with pytest.raises(CheckpointError, match="not a file of the folder"):
        load_checkpoint_(model, folder)
    assert state(model) == before


# ---- the Hub ---------------------------------------------------------------------


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with what a checkpoint needs and with what it does not."""
    folder = write(tmp_path / "repo", checkpoint_tensors())
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    for name in ("merges.txt", "chat_template.jinja", "tokenizer.model", "b.tiktoken"):
        (folder / name).write_text(name)  # equal files are fetched once
    for name in (
        "README.md",
        "model.py",
        "pytorch_model.bin",
        "image.png",
        "model.gguf",
    ):
        (folder / name).write_text("not needed")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_text("not needed either")
    return folder


@pytest.fixture
def server(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    tensors = checkpoint_tensors()
    tensors["norm.bias"] = tensors["norm.bias"] + 1
    newer = write(tmp_path / "newer", tensors)
    broken = write(tmp_path / "broken", checkpoint_tensors())
    (broken / "model.safetensors").write_bytes(b"version https://git-lfs")
    repos = {
        "org/model": {"main": repo, "v2": newer},
        "org/private": repo,
        "org/gated": repo,
        "org/broken": broken,
    }
    only_loopback(monkeypatch)
    with HubServer(
        repos, token="hf_good", private={"org/private"}, gated={"org/gated"}
    ) as server:
        use_hub(monkeypatch, server)
        yield server


def test_a_repository_is_fetched_without_what_is_not_needed(server: HubServer) -> None:
    model = Net()
    report = load_checkpoint_(model, "org/model")
    assert_holds(model, checkpoint_tensors())
    assert report.source == "org/model"
    assert sorted(server.downloads) == [
        "b.tiktoken",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]


def test_a_revision_by_name_and_by_commit(server: HubServer) -> None:
    for revision in ("v2", server.snapshot("org/model", "v2")[0]):
        model = Net()
        load_checkpoint_(model, "org/model", revision=revision)
        want = checkpoint_tensors()["norm.bias"] + 1
        assert model.norm.bias.detach().equal(want)
    before = state(model)
    with pytest.raises(hub_errors.RevisionNotFoundError):
        load_checkpoint_(model, "org/model", revision="v9")
    assert state(model) == before


def test_a_cache_of_ones_own(server: HubServer, tmp_path: Path) -> None:
    load_checkpoint_(Net(), "org/model", cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache" / "models--org--model").is_dir()
    assert not Path(constants.HF_HUB_CACHE, "models--org--model").exists()
    server.requests.clear()
    load_checkpoint_(Net(), "org/model", cache_dir=tmp_path / "cache")
    assert server.downloads == []


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("org/private", hub_errors.RepositoryNotFoundError),
        ("org/gated", hub_errors.GatedRepoError),
    ],
)
def test_a_closed_repository_needs_its_token(
    server: HubServer, name: str, error: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    before = state(model)
    for token in (None, False, "hf_wrong"):
        with pytest.raises(error) as caught:
            load_checkpoint_(model, name, token=token)
        assert type(caught.value) is error
    assert state(model) == before
    assert server.downloads == []
    load_checkpoint_(model, name, token="hf_good")
    assert_holds(model, checkpoint_tensors())


def test_the_token_of_the_environment(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    load_checkpoint_(Net(), "org/private")
    assert all(request.token for request in server.requests)


def test_a_revoked_token_is_not_called_not_found(server: HubServer) -> None:
    with pytest.raises(
        hub_errors.HfHubHTTPError, match="Invalid credentials"
    ) as caught:
        load_checkpoint_(Net(), "org/model", token=REVOKED_TOKEN)
    assert not isinstance(caught.value, hub_errors.RepositoryNotFoundError)
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("how", ["environment", "argument", "down"])
def test_without_a_network_the_cache_serves(
    server: HubServer, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_checkpoint_(Net(), "org/model")
    server.requests.clear()
    local = how == "argument"
    if how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if how == "down":
        server.stop()
    model = Net()
    load_checkpoint_(model, "org/model", local_files_only=local)
    assert_holds(model, checkpoint_tensors())
    before = state(model)
    with pytest.raises(hub_errors.LocalEntryNotFoundError):
        load_checkpoint_(model, "org/broken", local_files_only=local)
    assert state(model) == before
    assert server.requests == []


def test_a_repository_that_is_not_there(server: HubServer) -> None:
    with pytest.raises(hub_errors.RepositoryNotFoundError):
        load_checkpoint_(Net(), "org/none")
    with pytest.raises(FileNotFoundError, match="'no such folder' is neither a folder"):
        load_checkpoint_(Net(), "no such folder")
    assert {request.status for request in server.requests} == {404}


def test_a_pointer_instead_of_a_file(server: HubServer) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its header would"):
        load_checkpoint_(Net(), "org/broken")


# ---- devices: tensor by tensor ---------------------------------------------------


class Held:
    """Counts the tensors that were read and whose memory is still there.

    Each is given memory of numpy's, which torch lets go of with the last view of it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.total = 0
        self._lock = threading.RLock()  # an array may be freed while it is held
        read = StoredTensor.read

        def counted(stored: StoredTensor) -> Tensor:
            value = read(stored)
            memory = np.frombuffer(raw_bytes(value), dtype=np.uint8).copy()
            weakref.finalize(memory, self._add, -1)
            self._add(1)
            return torch.from_numpy(memory).view(value.dtype).view(value.shape)

        monkeypatch.setattr(StoredTensor, "read", counted)

    def _add(self, change: int) -> None:
        with self._lock:
            self.now += change
            self.most = max(self.most, self.now)
            self.total += max(change, 0)


# Of a packed weight two are held at once, by each thread.
FEW = 2 * load._READERS


def many(layers: int, tmp_path: Path) -> tuple[Callable[[], nn.Module], Tensors]:
    """A model of several layers, and its checkpoint in `tmp_path`."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))

    tensors: Tensors = {}
    for i in range(layers):
        tensors |= packed(str(i), 64, 64)
        tensors[f"{i}.bias"] = random(64, seed=i)
    write(tmp_path, tensors)
    return build, tensors


class Device:
    """Stands in for an accelerator: what is moved to it is copied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved: list[tuple[Tensor, torch.device]] = []
        self.fails_after = 10**9
        for module in (load, mlx):
            monkeypatch.setattr(module, "move", self.move)

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        if len(self.moved) >= self.fails_after:
            raise RuntimeError("out of memory")
        self.moved.append((tensor.clone(), device))
        return self.moved[-1][0]


def test_each_tensor_is_moved_as_soon_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, tensors = many(12, tmp_path)
    held, there = Held(monkeypatch), Device(monkeypatch)
    with torch.device("meta"):
        model = build()
    load_checkpoint_(model, tmp_path, device="mps:0")
    assert held.total == len(tensors) == len(there.moved)
    assert held.most <= FEW < held.total / 2
    assert held.now == 0
    assert {device for _, device in there.moved} == {torch.device("mps:0")}
    moved = {tensor.data_ptr() for tensor, _ in there.moved}
    for parameter in model.parameters():
        assert {part.data_ptr() for part in parts(parameter)} <= moved
    monkeypatch.undo()
    assert_holds(model, tensors)


def test_what_is_kept_on_the_cpu_is_seen_by_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, tensors = many(12, tmp_path)
    held = Held(monkeypatch)
    with torch.device("meta"):
        model = build()
    load_checkpoint_(model, tmp_path)
    assert held.most == held.now == held.total == len(tensors)


def test_the_meta_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, tensors = many(12, tmp_path)
    held = Held(monkeypatch)
    with torch.device("meta"):
        model = build()
    report = load_checkpoint_(model, tmp_path, device=torch.device("meta"))
    assert held.most <= FEW < held.total == len(tensors)
    assert held.now == 0
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(part.is_meta for layer in model for part in parts(layer.weight))
    assert len(report.packed) == len(report.dense) == 12


def test_one_thread_at_a_time_moves() -> None:
    inside: list[int] = []

    class Slow(Tensor):
        def to(self, *args: Any) -> Tensor:  # type: ignore[override]
            inside.append(1)
            time.sleep(0.01)
            assert len(inside) == 1
            inside.clear()
            return self

    tensor = torch.zeros(1).as_subclass(Slow)
    failed: list[threading.ExceptHookArgs] = []
    hook, threading.excepthook = threading.excepthook, failed.append
    try:
        threads = [
            threading.Thread(target=load.move, args=(tensor, torch.device("mps")))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not failed


def test_a_move_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = checkpoint_tensors()
    write(tmp_path, tensors)
    with torch.device("meta"):
        model = Net()
    before = state(model)
    there = Device(monkeypatch)
    for there.fails_after in range(len(tensors)):
        there.moved.clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            load_checkpoint_(model, tmp_path, device="mps")
        assert state(model) == before
    there.moved.clear()
    there.fails_after = len(tensors)
    load_checkpoint_(model, tmp_path, device="mps")
    assert_holds(model, tensors)
    with pytest.raises(RuntimeError, match="nonsense"):
        load_checkpoint_(model, tmp_path, device="nonsense")


def test_parameters_that_have_a_device_stay_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = checkpoint_tensors()
    model = Net()
    model.norm.to("meta")
    there = Device(monkeypatch)
    load_checkpoint_(model, write(tmp_path, tensors), device="mps")
    found = [device.type for _, device in there.moved]
    assert sorted(found) == ["cpu"] * (len(tensors) - 2) + ["mps"] * 2
    assert_holds(model, tensors)


@pytest.mark.parametrize("kind", ["packed", "dense", "both"])
def test_a_tied_weight_stored_twice_is_compared_on_the_cpu(
    kind: str, tmp_path: Path
) -> None:
    tensors = checkpoint_tensors()
    for part in ("weight", "scales", "biases"):
        tensors[f"head.{part}"] = tensors[f"embed.{part}"].clone()
    weight = AffineQuantizedTensor.from_packed(
        *(tensors[f"head.{part}"] for part in ("weight", "scales", "biases")), **Q4
    ).dequantize()
    dense = {"packed": (), "dense": ("embed", "head"), "both": ("head",)}[kind]
    tensors = without(tensors, *dense)
    tensors |= {f"{stem}.weight": weight.clone() for stem in dense}
    with torch.device("meta"):  # whatever the default is
        model = Net(tied=True)
        load_checkpoint_(model, write(tmp_path / "equal", tensors), device="meta")
    assert model.head.weight is model.embed.weight
    assert all(parameter.is_meta for parameter in model.parameters())

    name = "head.weight" if kind != "packed" else "head.biases"
    tensors[name].view(torch.int32)[-1, -1] ^= 1
    write(tmp_path / "different", tensors)
    with torch.device("meta"):
        model = Net(tied=True)
    before = state(model)
    with pytest.raises(CheckpointError, match=r"ties embed\.weight and head\.weight"):
        load_checkpoint_(model, tmp_path / "different", device="meta")
    assert state(model) == before
