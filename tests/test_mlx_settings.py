"""What config.json may say about the quantization, and what MetalConfig writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import save_file
from torch import Tensor, nn

from affine_tensor import AffineQuantizedTensor, CheckpointError, load_checkpoint_
from affine_tensor.checkpoint import mlx
from affine_tensor.checkpoint.files import Checkpoint, open_checkpoint

Q4 = {"bits": 4, "group_size": 32}
Q8 = {"bits": 8, "group_size": 64}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
Tensors = dict[str, Tensor]


def packed(name: str, bits: int, group_size: int, columns: int = 64) -> Tensors:
    generator = torch.Generator().manual_seed(bits)
    dense = torch.randn(8, columns, generator=generator)
    own = AffineQuantizedTensor.from_dense(dense, bits, group_size)
    parts = {"weight": own.packed, "scales": own.scales, "biases": own.biases}
    return {f"{name}.{part}": value for part, value in parts.items()}


def write(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def opened(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(write(folder, tensors, config))


def formats(checkpoint: Checkpoint, columns: int = 64) -> dict[str, Any]:
    """The format of each weight, or what is wrong with it."""
    assert mlx.recognizes(checkpoint)
    assert mlx.check_settings(checkpoint.config) == []
    names = [name for name in checkpoint.tensors if name.endswith("weight")]
    weights, broken, _ = mlx.packed_weights(checkpoint, dict.fromkeys(names, columns))
    return {name: weight.format for name, weight in weights.items()} | broken


BOTH = {**packed("up", 4, 32), **packed("head", 8, 64)}
UP, HEAD = (4, 32), (8, 64)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization": {**Q4, "head": Q8}},
        {"quantization_config": {**Q4, "head": Q8}},
        {"quantization": {**Q4, "head": Q8}, "quantization_config": {**Q4, "head": Q8}},
        # Different, and both are right about something.
        {"quantization": Q4, "quantization_config": {**Q4, "head": Q8}},
        {"quantization": Q4, "quantization_config": Q8},
        # Left over from the model that was converted, and no matter.
        {"quantization": {**Q4, "head": Q8}, "quantization_config": GPTQ},
        {"text_config": {"quantization": {**Q4, "head": Q8}}},
        {"text_config": {"quantization_config": {**Q4, "head": Q8}}},
        {"text_config": {"quantization": Q4, "quantization_config": Q8}},
        *(
            {"quantization_config": {**Q4, "head": Q8, "quant_method": method}}
            for method in ("mlx", "affine", "affine_tensor")
        ),
        # Modules spelled in other ways, false, and keys of others.
        {"quantization": {**Q4, "language_model.model.head": Q8}},
        {"quantization": {**Q4, "lm_head": {**Q8, "mode": "affine", "extra": [1]}}},
        {"quantization": {**Q4, "up": False, "norm": False, "head": Q8}},
        {"quantization": {**Q4, "head": Q8, "extra": {"anything": {"a": 1}}}},
        # Of a module's own settings one is absent: MLX's default, or the general one.
        {"quantization": {**Q4, "head": {"bits": 8}}},
        {"quantization": {**Q8, "up": {"bits": 4, "group_size": 32}}},
        {"quantization": {**Q8, "up": {"group_size": 32}}},
        {"quantization": {"bits": 8, "group_size": 32, "up": {"bits": 4}, "head": Q8}},
        # Other modules are in a float mode.
        {"quantization": {"mode": "mxfp4", "head": Q8, "up": Q4}},
        {"quantization": {**Q4, "mode": "mxfp4", "head": Q8, "up": Q4}},
        {"quantization": {**Q4, "head": Q8, "experts": {"mode": "nvfp4"}}},
        {"quantization": {**Q4, "head": Q8, "experts": {**Q4, "mode": "mxfp4"}}},
        # Neither: the shapes alone.
        {},
        {"quantization": None, "quantization_config": None},
        {"text_config": {"vocab_size": 3}},
    ],
    ids=str,
)
def test_settings_that_name_what_the_shapes_say(
    config: dict[str, Any], tmp_path: Path
) -> None:
    found = formats(opened(tmp_path, BOTH, config))
    assert found == {"up.weight": UP, "head.weight": HEAD}


@pytest.mark.parametrize(
    ("config", "has"),
    [
        ({"quantization": Q4}, "4 bits, group size 32"),
        ({"quantization": {**Q4, "head": {"bits": 6}}}, None),
        ({"quantization": {"mode": "affine"}}, "no pair"),
        ({"quantization": {}}, "no pair"),
        ({"quantization": {**Q8, "mode": "mxfp8"}}, None),
        ({"quantization": {"mode": "mxfp4", "up": Q4}}, "4 bits, group size 32, mxfp4"),
        ({"quantization": Q4, "quantization_config": {**GPTQ, **Q8}}, None),
        ({"text_config": {"quantization": Q4}, "quantization": Q4}, None),
        ({"quantization": {**Q4, "head": False}}, "4 bits, group size 32"),
        ({"quantization": {**Q4, "extra": {"anything": 8}}}, "4 bits, group size 32"),
    ],
    ids=str,
)
def test_settings_that_do_not_name_it(
    config: dict[str, Any], has: str | None, tmp_path: Path
) -> None:
    checkpoint = opened(tmp_path, BOTH, config)
    columns = {"head.weight": 64}
    weights, broken, parts = mlx.packed_weights(checkpoint, columns)
    assert weights == {}
    assert parts == {"head.weight", "head.scales", "head.biases"}
    said = broken["head.weight"]
    assert said.startswith(
        "its shape says 8 bits, group size 64, which config.json does not name (it has "
    )
    assert has is None or said.endswith(f"(it has {has})")


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_settings_that_make_other_columns_of_it(key: str, tmp_path: Path) -> None:
    # 128 columns of 4 bits in groups of 64 are the arrays of 64 of 8 bits in groups of 32.
    tensors = packed("up", 4, 64, columns=128)
    other = ({"quantization", "quantization_config"} - {key}).pop()
    right, wrong = {"bits": 4, "group_size": 64}, {"bits": 8, "group_size": 32}
    checkpoint = opened(tmp_path, tensors, {key: right, other: wrong})
    assert formats(checkpoint, 128) == {
        "up.weight": "64 columns of 8 bits, group size 32, as config.json says; the model "
        "has 128 columns"
    }
    for config in ({key: right}, {key: right, other: right}, {}):
        checkpoint = opened(tmp_path / str(len(config)), tensors, config)
        assert formats(checkpoint, 128) == {"up.weight": (4, 64)}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": GPTQ},
        {"quantization": GPTQ},
        {"quantization": {**Q4, "quant_method": "awq"}, "quantization_config": Q4},
        {"text_config": {"quantization_config": GPTQ}},
    ],
    ids=str,
)
def test_other_methods_are_not_recognized(
    config: dict[str, Any], tmp_path: Path
) -> None:
    assert not mlx.recognizes(opened(tmp_path, BOTH, config))


def test_dense_files_are_not_recognized(tmp_path: Path) -> None:
    dense = {"head.weight": torch.ones(8, 64)}
    assert not mlx.recognizes(opened(tmp_path, dense, {"vocab_size": 3}))


def test_what_is_wrong_with_settings() -> None:
    cases: list[dict[str, Any]] = [
        {"quantization": {"bits": 7, "group_size": 48}},
        {"quantization": {**Q4, "mode": "ternary"}},
        {"quantization": {**Q4, "mode": ["mxfp4"]}},
        {"quantization": {**Q4, "mode": None}},
        {"quantization": {**Q8, "mode": "mxfp8"}},
        {"quantization": {"bits": True, "mode": "nvfp4"}},
        {"quantization": {**Q4, "head": {"mode": "mxfp4", "bits": 8}}},
        {"quantization": {**Q4, "head": {"bits": "8"}}},
        {"quantization": "4bit"},
        {"quantization_config": [4, 64]},
        {"text_config": {"quantization": {"bits": 7}}},
    ]
    said = [line for case in cases for line in mlx.check_settings(case)]
    assert_expected_inline(
        "\n".join(said),
        """\
quantization: bits is 7; allowed are 1, 2, 3, 4, 5, 6, 8
quantization: group_size is 48; allowed are 16, 32, 64, 128, 256
quantization: mode is 'ternary'; allowed are affine, mxfp4, nvfp4, mxfp8. Convert the model again with one of them (mlx_lm.convert --q-mode)
quantization: mode is ['mxfp4']; allowed are affine, mxfp4, nvfp4, mxfp8. Convert the model again with one of them (mlx_lm.convert --q-mode)
quantization: mode is None; allowed are affine, mxfp4, nvfp4, mxfp8. Convert the model again with one of them (mlx_lm.convert --q-mode)
quantization: group_size is 64; mxfp8 has 32. Correct it in config.json
quantization: bits is True; nvfp4 has 4. Correct it in config.json
quantization of head: bits is 8; mxfp4 has 4. Correct it in config.json
quantization of head: bits is '8'; allowed are 1, 2, 3, 4, 5, 6, 8
quantization is '4bit'; an object with bits and group_size is needed, or none
quantization_config is [4, 64]; an object with bits and group_size is needed, or none
quantization: bits is 7; allowed are 1, 2, 3, 4, 5, 6, 8""",  # noqa: E501
    )


@pytest.mark.parametrize(
    "quantization",
    [
        {"mode": "mxfp4"},
        {"mode": "mxfp4", "bits": 4},
        {"mode": "nvfp4", "group_size": 16},
        {"mode": "mxfp8", "bits": 8, "group_size": 32},
        {**Q4, "head": {"mode": "nvfp4", "quantize_input": True}},
        {**Q4, "head": {"mode": "nvfp4", "bits": 4, "group_size": 16}},
        {**Q4, "mode": "mxfp4", "head": Q8},
        {**Q4, "head": False, "tail": True, "other": None},
        {"bits": 4},
        {},
    ],
    ids=str,
)
def test_settings_that_are_right(quantization: dict[str, Any]) -> None:
    assert mlx.check_settings({"quantization": quantization}) == []


def test_only_the_first_settings_are_checked(tmp_path: Path) -> None:
    wrong = {"bits": 7, "mode": ["?"], "head": {"mode": {}}}
    config = {"quantization": {**Q4, "head": Q8}, "quantization_config": wrong}
    assert set(formats(opened(tmp_path, BOTH, config)).values()) == {UP, HEAD}
    swapped = {"quantization": wrong, "quantization_config": Q4}
    assert len(mlx.check_settings(swapped)) == 2


# ---- what transformers' MetalConfig writes ---------------------------------------


def metal(weight: Tensor, bits: int, group_size: int) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a quantized module "0", and the settings beside them."""
    metal = pytest.importorskip("transformers.integrations.metal_quantization")
    from transformers import MetalConfig

    config = MetalConfig(bits=bits, group_size=group_size)
    operation = metal.MetalQuantize(SimpleNamespace(quantization_config=config))
    return operation.convert({"0.weight": weight}), config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal(bits: int, group_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers.integrations.metal_quantization import _affine_dequantize_tensor

    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 128, generator=generator).to(dtype)
    tensors, settings = metal(weight, bits, group_size)
    assert set(tensors) == {"0.weight", "0.scales", "0.qbiases"}
    write(tmp_path, tensors, {"quantization_config": settings})
    model = nn.Sequential(nn.Linear(128, 24, bias=False, dtype=dtype))
    report = load_checkpoint_(model, tmp_path)
    assert report.packed == {"0.weight": (bits, group_size)}
    own = model[0].weight
    assert isinstance(own, AffineQuantizedTensor)
    assert own.scales.dtype == own.biases.dtype == dtype
    want = _affine_dequantize_tensor(*tensors.values(), group_size, bits)
    # Theirs rounds the product and the sum.
    torch.testing.assert_close(own.dequantize(torch.float32), want, rtol=0, atol=1e-6)

    words = tensors["0.weight"].view(torch.int32).to(torch.int64)
    codes = (words.unsqueeze(-1) >> torch.arange(0, 32, bits)) & ((1 << bits) - 1)
    groups = codes.reshape(24, -1, group_size).double()
    scales, biases = (
        tensors[f"0.{part}"].double().unsqueeze(-1) for part in ("scales", "qbiases")
    )
    exact = (groups * scales + biases).flatten(1)
    assert own.dequantize(torch.float64).equal(exact)


def test_metal_with_modules_that_were_not_converted(tmp_path: Path) -> None:
    tensors, settings = metal(torch.randn(8, 64), 4, 32)
    tensors |= {"0.bias": torch.ones(8), "1.weight": torch.ones(8, 8)}
    settings["modules_to_not_convert"] = ["1"]
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8, bias=False))
    write(tmp_path, tensors, {"quantization_config": settings})
    load_checkpoint_(model, tmp_path)
    assert isinstance(model[0].weight, AffineQuantizedTensor)
    assert model[0].bias.tolist() == [1.0] * 8
    assert type(model[1].weight) is nn.Parameter


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("0.qbiases", "0.weight: its biases are missing: 0.biases"),
        ("0.scales", "0.weight: uint32 words [8, 8], of which 0.scales is missing"),
    ],
)
def test_metal_with_a_part_missing(missing: str, said: str, tmp_path: Path) -> None:
    tensors, settings = metal(torch.randn(8, 64), 4, 32)
    del tensors[missing]
    write(tmp_path, tensors, {"quantization_config": settings})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_(nn.Sequential(nn.Linear(64, 8, bias=False)), tmp_path)
    assert said in str(caught.value)


def test_biases_of_both_names(tmp_path: Path) -> None:
    tensors, settings = metal(torch.randn(8, 64), 4, 32)
    tensors["0.biases"] = tensors["0.qbiases"] + 1
    write(tmp_path, tensors, {"quantization_config": settings})
    with pytest.raises(CheckpointError, match=r"1 unexpected:\n  0\.qbiases\n"):
        load_checkpoint_(nn.Sequential(nn.Linear(64, 8, bias=False)), tmp_path)
