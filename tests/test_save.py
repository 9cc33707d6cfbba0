"""save_checkpoint: mlx-lm and from_pretrained read what it writes, and it writes all or
nothing.

The oracles are mlx-lm's logits, safetensors' reading, and float64.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    CASES,
    COMMON,
    TOLERANCE,
    Case,
    _write_dense_checkpoint,
    mlx_logits,
    mlx_quantized_modules,
    write_mlx_checkpoint,
)
from expecttest import assert_expected_inline
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import affine_tensor.checkpoint.save as save_module
from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    from_pretrained,
    load_checkpoint_,
    quantize_,
    save_checkpoint,
)
from affine_tensor.checkpoint import place

LLAMA = Case("llama", {"tie_word_embeddings": False})
TIED = Case("llama", {"tie_word_embeddings": True})
IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))


def stock_model(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The case's dense model, read by transformers from a folder of its own."""
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {case.model_type}")
    _write_dense_checkpoint(case, folder)
    # Only eager attention soft-caps Gemma 2's logits in all versions of transformers.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )


def packed_weights(model: nn.Module) -> dict[str, AffineQuantizedTensor]:
    named = model.named_parameters()
    return {n: p for n, p in named if isinstance(p, AffineQuantizedTensor)}


def formats(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(".weight"): (weight.bits, weight.group_size)
        for name, weight in packed_weights(model).items()
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def relative_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_speaks(folder: Path, want: Tensor) -> Any:
    """from_pretrained computes the logits bit for bit, mlx-lm to the tolerance."""
    again = from_pretrained(folder, attn_implementation="eager")
    assert torch.equal(logits(again), want)
    pytest.importorskip("mlx_lm")
    assert relative_l2(mlx_logits(folder, IDS), want) < TOLERANCE
    assert mlx_quantized_modules(folder) == formats(again)
    return again


def stored(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (
            want[name].dtype,
            want[name].shape,
        )
        assert raw_bytes(got[name]) == raw_bytes(want[name]), name


def parts(model: nn.Module) -> dict[str, Tensor]:
    """All that a model holds, packed weights as their parts."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, AffineQuantizedTensor):
            stem = name.removesuffix("weight")
            found |= {f"{stem}scales": value.scales, f"{stem}biases": value.biases}
            value = value.packed
        found[name] = value
    return found


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


# ---- mlx-lm and from_pretrained read it ------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_architectures(case: Case, tmp_path: Path) -> None:
    model = stock_model(case, tmp_path / "dense")

    def recipe(module: nn.Module, name: str) -> bool | AffineConfig:
        if case.recipe and name.endswith(("v_proj", "down_proj", "lm_head")):
            return AffineConfig(6, case.group_size)
        return True

    quantize_(model, AffineConfig(case.bits, case.group_size), recipe)
    assert len(set(formats(model).values())) == (2 if case.recipe else 1)
    report = save_checkpoint(model, tmp_path / "mlx")
    again = assert_speaks(tmp_path / "mlx", logits(model))
    assert formats(again) == formats(model)
    assert report.packed == {f"{n}.weight": f for n, f in formats(model).items()}
    assert (report.cast, report.changed) == ({}, {})
    assert_same_tensors(parts(again), parts(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_models_of_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense", dtype)
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx")
    again = from_pretrained(tmp_path / "mlx", attn_implementation="eager")
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))
    assert {t.dtype for t in stored(tmp_path / "mlx").values()} == {dtype, torch.uint32}
    pytest.importorskip("mlx_lm")
    wide = from_pretrained(tmp_path / "mlx", dtype=torch.float32)
    assert relative_l2(mlx_logits(tmp_path / "mlx", IDS), logits(wide)) < TOLERANCE


SETTINGS: dict[str, dict[str, Any]] = {  # none of them what mlx-lm assumes by default
    "llama": {
        "rope_theta": 2000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    },
    "gemma3_text": {
        "rope_theta": 3000.0,
        "rope_local_base_freq": 500.0,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "phi": {"rope_theta": 2000.0, "partial_rotary_factor": 0.25},
    "gpt_bigcode": {},
}


@pytest.mark.parametrize("model_type", SETTINGS)
def test_a_model_that_comes_from_no_folder(model_type: str, tmp_path: Path) -> None:
    # All that mlx-lm reads has to come from the configuration that transformers keeps.
    (case,) = [c for c in CASES if c.model_type == model_type][:1]
    case = Case(model_type, {**case.config, **SETTINGS[model_type]})
    model = stock_model(case, tmp_path / "dense")
    model.config._name_or_path = ""
    shutil.rmtree(tmp_path / "dense")
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx")
    assert_speaks(tmp_path / "mlx", logits(model))


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    model = stock_model(TIED, tmp_path / "dense")
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx")
    again = assert_speaks(tmp_path / "mlx", logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not [name for name in stored(tmp_path / "mlx") if "lm_head" in name]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_the_model_ties_counts_and_not_its_configuration(
    tied: bool, packed: bool, tmp_path: Path
) -> None:
    model = stock_model(LLAMA if tied else TIED, tmp_path / "dense")
    assert model.config.tie_word_embeddings is not tied
    head, embedding = model.lm_head, model.model.embed_tokens
    if tied:
        head.weight = embedding.weight
    else:
        head.weight = nn.Parameter(head.weight.detach().flip(0))
    quantize_(model, None, lambda module, name: packed or "mlp" in name)
    save_checkpoint(model, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    again = assert_speaks(tmp_path / "mlx", logits(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert isinstance(again.lm_head.weight, AffineQuantizedTensor) is packed


def test_ties_in_a_configuration_within_a_configuration(tmp_path: Path) -> None:
    text = AutoConfig.for_model("gemma3_text", **COMMON)
    model = AutoModelForCausalLM.from_config(text)
    model.config = AutoConfig.for_model("gemma3", text_config=text.to_dict())
    head = model.lm_head
    for tied in (True, False):
        if not tied:
            head.weight = nn.Parameter(head.weight.detach().clone())
        save_checkpoint(model, tmp_path / str(tied))
        config = json.loads((tmp_path / str(tied) / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied
        assert config["text_config"]["tie_word_embeddings"] is tied


def test_modules_left_dense(tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model, None, lambda module, name: "mlp" in name)
    save_checkpoint(model, tmp_path / "mlx")
    again = assert_speaks(tmp_path / "mlx", logits(model))
    assert len(formats(again)) == 6


@pytest.mark.parametrize("bits", [4, 5])
def test_groups_of_256_are_written_as_two(bits: int, tmp_path: Path) -> None:
    case = Case("llama", {"hidden_size": 256, "intermediate_size": 512})
    model = stock_model(case, tmp_path / "dense")
    quantize_(model, AffineConfig(bits, 256), lambda module, name: "o_proj" not in name)
    report = save_checkpoint(model, tmp_path / "mlx")
    assert set(report.packed.values()) == {(bits, 128)}
    again = from_pretrained(tmp_path / "mlx", attn_implementation="eager")
    for name, weight in packed_weights(model).items():
        halves = again.get_parameter(name)
        assert raw_bytes(halves.packed) == raw_bytes(weight.packed)
        assert torch.equal(halves.dequantize(), weight.dequantize())
    assert relative_l2(logits(again), logits(model)) < 1e-6
    assert_speaks(tmp_path / "mlx", logits(again))


def test_one_bit(tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model, AffineConfig(1, 32))
    save_checkpoint(model, tmp_path / "mlx")
    assert_speaks(tmp_path / "mlx", logits(model))


def test_shards(tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model)
    limit = 40_000
    report = save_checkpoint(model, tmp_path / "mlx", max_shard_bytes=limit)
    assert_speaks(tmp_path / "mlx", logits(model))
    files = sorted((tmp_path / "mlx").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "mlx/model.safetensors.index.json").read_text())
    where: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "mlx"}
            where |= dict.fromkeys(opened.keys(), file.name)
        assert sum(t.nbytes for t in load_file(file).values()) <= limit
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == report.bytes
    assert report.bytes == sum(t.nbytes for t in parts(model).values())
    for name in formats(model):
        assert len({where[f"{name}.{p}"] for p in ("weight", "scales", "biases")}) == 1
    save_checkpoint(model, tmp_path / "one")
    assert_same_tensors(stored(tmp_path / "mlx"), stored(tmp_path / "one"))


def test_a_shard_holds_one_module_at_least(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx", max_shard_bytes=1)
    assert len(list((tmp_path / "mlx").glob("*.safetensors"))) == 4
    again = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    load_checkpoint_(again, tmp_path / "mlx")
    assert_same_tensors(parts(again), parts(model))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], TIED], ids=str)
def test_a_checkpoint_of_mlx_lm_loaded_and_saved_is_the_same(
    case: Case, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("mlx_lm")
    write_mlx_checkpoint(case, tmp_path / "a", dtype=dtype)
    model = from_pretrained(tmp_path / "a", dtype=dtype)
    report = save_checkpoint(model, tmp_path / "b")
    assert_same_tensors(stored(tmp_path / "b"), stored(tmp_path / "a"))
    assert report.cast == {}
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"
    )
    assert mlx_quantized_modules(tmp_path / "b") == mlx_quantized_modules(
        tmp_path / "a"
    )
    assert after["quantization"] == after["quantization_config"]
    # Nothing is lost: transformers spells the rest out beside what was there. (The
    # test's own file names the dtype of the weights before they were cast, too.)
    assert after["dtype"] == after["torch_dtype"] == dtype
    scaling = before.pop("rope_scaling", None) or {}
    assert scaling.items() <= (after.get("rope_scaling") or {}).items()
    for name in before.keys() - {"quantization", "quantization_config", "dtype"}:
        assert after[name] == before[name], name


# ---- plain modules ---------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.proj = nn.Linear(64, 64)
        self.head = nn.Linear(64, 24, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(64)
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.ones(3), persistent=False)


def test_a_model_without_a_configuration(tmp_path: Path) -> None:
    model, again = Net(), Net()
    nn.init.normal_(model.norm.weight)
    quantize_(model, AffineConfig(3, 32))
    report = save_checkpoint(model, tmp_path / "mlx")
    load_checkpoint_(again, tmp_path / "mlx")
    assert_same_tensors(parts(again), parts(model))
    assert again.head.weight is again.embed.weight
    assert report.files == [
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ]
    settings = {"bits": 3, "group_size": 32, "mode": "affine"}
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config == {"quantization": settings, "quantization_config": settings}


def test_a_module_by_itself(tmp_path: Path) -> None:
    model, again = nn.Linear(64, 8), nn.Linear(64, 8)
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx")
    assert set(stored(tmp_path / "mlx")) == {"weight", "scales", "biases", "bias"}
    load_checkpoint_(again, tmp_path / "mlx")
    assert_same_tensors(parts(again), parts(model))


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    # Not ties: different parameters over one memory, which safetensors refuses.
    def net() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
        quantize_(model, None, lambda module, name: name == "2")
        return model

    model, again = net(), net()
    model[1].bias = nn.Parameter(model[0].bias.detach())
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    model[2].bias = nn.Parameter(model[0].bias.detach()[3:7])
    save_checkpoint(model, tmp_path / "mlx")
    load_checkpoint_(again, tmp_path / "mlx")
    assert_same_tensors(parts(again), parts(model))


def test_views_of_packed_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(128, 8, bias=False))
    quantize_(model, AffineConfig(4, 32))
    weight = model[0].weight
    model[0].weight = nn.Parameter(weight.detach()[2:6, 32:96], requires_grad=False)
    save_checkpoint(model, tmp_path / "mlx")
    again = nn.Sequential(nn.Linear(64, 4, bias=False))
    load_checkpoint_(again, tmp_path / "mlx")
    assert torch.equal(again[0].weight.dequantize(), weight.dequantize()[2:6, 32:96])
    assert again[0].weight.nbytes == 4 * (64 // 2 + 2 * 2 * 4)


def test_settings_are_written_under_both_of_their_names(tmp_path: Path) -> None:
    # mlx-lm reads num_experts, which transformers 5 calls num_local_experts.
    model = small_model()
    model.config = AutoConfig.for_model("qwen3_moe", num_experts=12, rope_theta=99.0)
    save_checkpoint(model, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 12
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_mixed_recipes_are_named_in_the_configuration(tmp_path: Path) -> None:
    model = Net()
    eight = AffineConfig(8, 64)
    quantize_(model, AffineConfig(4, 32), lambda m, n: eight if n == "proj" else True)
    save_checkpoint(model, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    own = {"bits": 8, "group_size": 64, "mode": "affine"}
    assert config["quantization"]["proj"] == own
    assert config["quantization"].keys() == {"bits", "group_size", "mode", "proj"}


# ---- what MLX cannot hold --------------------------------------------------------


def unsupported_model() -> nn.Module:
    """Groups of 16, columns in another order, and a name that MLX does not know."""
    torch.manual_seed(3)
    model = nn.ModuleDict({n: nn.Linear(64, 8, bias=False) for n in ("a", "b", "c")})
    quantize_(
        model,
        AffineConfig(8, 64),
        lambda m, n: AffineConfig(8, 16) if n == "a" else True,
    )
    weight = model["b"].weight
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    ordered = AffineQuantizedTensor.from_packed(
        weight.packed,
        weight.scales,
        weight.biases,
        bits=8,
        group_size=64,
        permutation=order,
    )
    model["b"].weight = nn.Parameter(ordered, requires_grad=False)
    other = AffineQuantizedTensor.from_dense(torch.randn(8, 64), 8, 64)
    model["d"] = nn.Module()
    model["d"].probe_weight = nn.Parameter(other, requires_grad=False)
    return model


def test_what_mlx_cannot_hold_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MLX has no form") as caught:
        save_checkpoint(unsupported_model(), tmp_path / "mlx")
    assert list(tmp_path.iterdir()) == []
    assert_expected_inline(
        str(caught.value),
        """\
MLX has no form for these weights:
  a.weight: MLX has no group size 16
  b.weight: its columns are permuted (act-order)
  d.probe_weight: MLX keeps scales and biases beside a parameter called weight
Pass unsupported='dense' to write them dense, or 'requantize' to quantize them anew (which loses accuracy). Before that, affine_tensor.fold_permutations_(model) takes the act-order of down_proj into the rows of other weights, without loss""",  # noqa: E501
    )


@pytest.mark.parametrize("unsupported", ["dense", "requantize"])
def test_ways_out(unsupported: Any, tmp_path: Path) -> None:
    model = unsupported_model()
    want = {
        name: w.dequantize(torch.float32) for name, w in packed_weights(model).items()
    }
    report = save_checkpoint(model, tmp_path / "mlx", unsupported=unsupported)
    tensors = stored(tmp_path / "mlx")
    assert set(report.changed) == {"a.weight", "b.weight", "d.probe_weight"}
    assert report.packed["c.weight"] == (8, 64)
    assert ("a.weight" in report.packed) == (unsupported == "requantize")
    assert tensors["d.probe_weight"].equal(want["d.probe_weight"])
    again = unsupported_model()
    load_checkpoint_(again, tmp_path / "mlx")
    for name, group_size in {"a.weight": 32, "b.weight": 64}.items():
        got = again.get_parameter(name)
        if unsupported == "dense":
            assert got.detach().equal(want[name])
        else:
            assert (got.bits, got.group_size, got.permutation) == (8, group_size, None)
            anew = AffineQuantizedTensor.from_dense(want[name], 8, group_size)
            assert torch.equal(got.dequantize(), anew.dequantize())
            assert relative_l2(got.dequantize(), want[name]) < 0.01
    assert torch.equal(again["c"].weight.dequantize(), model["c"].weight.dequantize())


@pytest.mark.parametrize("unsupported", ["dense", "requantize"])
def test_mlx_lm_reads_the_ways_out(unsupported: Any, tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model, AffineConfig(4, 16))
    report = save_checkpoint(model, tmp_path / "mlx", unsupported=unsupported)
    assert len(report.changed) == 16
    pytest.importorskip("mlx_lm")
    if unsupported == "dense":
        assert relative_l2(mlx_logits(tmp_path / "mlx", IDS), logits(model)) < TOLERANCE
        return
    again = from_pretrained(tmp_path / "mlx", attn_implementation="eager")
    assert_speaks(tmp_path / "mlx", logits(again))
    assert set(formats(again).values()) == {(4, 32)}


def test_rows_that_no_group_size_of_mlx_divides(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(48, 8))
    quantize_(model, AffineConfig(8, 16))
    with pytest.raises(
        ValueError, match=r"0\.weight: 48 columns .* unsupported='dense'"
    ):
        save_checkpoint(model, tmp_path / "mlx", unsupported="requantize")
    save_checkpoint(model, tmp_path / "mlx", unsupported="dense")
    assert stored(tmp_path / "mlx")["0.weight"].equal(model[0].weight.dequantize())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unsupported": "skip"}, "unsupported is 'skip'; allowed are"),
        ({"dtype": torch.float64}, "dtype is torch.float64; allowed are float32, "),
        ({"dtype": "half"}, "dtype is 'half'; .*float16, bfloat16 and 'keep'$"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        save_checkpoint(unsupported_model(), tmp_path / "mlx", **options)
    assert list(tmp_path.iterdir()) == []


# ---- casts -----------------------------------------------------------------------


def fp16_scales_in_bf16(bits: int) -> nn.Module:
    """As a checkpoint with float16 scales in a model that computes in bfloat16."""
    generator = torch.Generator().manual_seed(bits)
    model = nn.Sequential(*(nn.Linear(128, 16) for _ in range(3)))
    for layer in model:
        layer.weight.data.normal_(0, 0.02, generator=generator)
    model.half()
    quantize_(model, AffineConfig(bits, 64))
    return model.bfloat16()


def largest_change(old: AffineQuantizedTensor, new: AffineQuantizedTensor) -> float:
    """By how many steps any code of any group moves, tried out in float64."""
    worst = 0.0
    for code in range(2**old.bits):
        before, after = (
            w.scales.double() * code + w.biases.double() for w in (old, new)
        )
        change = (after - before).abs() / old.scales.double().abs()
        worst = max(worst, float(change.max()))
    return worst


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_cast_is_reported_with_its_largest_error(bits: int, tmp_path: Path) -> None:
    model = fp16_scales_in_bf16(bits)
    report = save_checkpoint(model, tmp_path / "mlx")
    again = fp16_scales_in_bf16(bits)
    load_checkpoint_(again, tmp_path / "mlx")
    assert set(report.cast) == set(packed_weights(model))
    for name, weight in packed_weights(model).items():
        new = again.get_parameter(name)
        assert new.scales.dtype == torch.bfloat16
        want = largest_change(weight, new)
        assert want > 0
        assert report.cast[name] == pytest.approx(want, rel=1e-12)
    if bits == 8:
        assert 0.1 < max(report.cast.values()) < 2
    assert f"at most by {max(report.cast.values()):.2g} quantization steps" in str(
        report
    )


def test_keep_writes_scales_as_they_are(tmp_path: Path) -> None:
    model, again = fp16_scales_in_bf16(8), fp16_scales_in_bf16(8)
    for parameter in again.parameters():
        parameter.data.zero_() if parameter.dim() == 1 else None
    report = save_checkpoint(model, tmp_path / "mlx", dtype="keep")
    assert report.cast == {}
    tensors = stored(tmp_path / "mlx")
    assert tensors["0.scales"].dtype == tensors["0.biases"].dtype == torch.float16
    assert tensors["0.bias"].dtype == torch.bfloat16
    load_checkpoint_(again, tmp_path / "mlx")
    assert_same_tensors(parts(again), parts(model))


def test_a_dtype_of_ones_own(tmp_path: Path) -> None:
    model = fp16_scales_in_bf16(4)
    report = save_checkpoint(model, tmp_path / "mlx", dtype=torch.float32)
    assert report.cast == {}  # float32 holds all of float16
    tensors = stored(tmp_path / "mlx")
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.uint32}
    assert tensors["0.scales"].equal(model[0].weight.scales.float())


@pytest.mark.parametrize("name", ["float16", "torch.float16"])
def test_a_dtype_by_its_name(name: str, tmp_path: Path) -> None:
    save_checkpoint(small_model(), tmp_path / "mlx", dtype=name)
    dtypes = {tensor.dtype for tensor in stored(tmp_path / "mlx").values()}
    assert dtypes == {torch.float16, torch.uint32}


def test_what_is_no_dtype(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="dtype is 16; allowed are float32"):
        save_checkpoint(small_model(), tmp_path / "mlx", dtype=16)  # type: ignore
    assert list(tmp_path.iterdir()) == []


def test_other_dtypes_of_dense_tensors_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(64)).bfloat16()
    model[1].float()  # as transformers keeps some norms
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx")
    dtypes = {name: t.dtype for name, t in stored(tmp_path / "mlx").items()}
    assert dtypes.pop("0.weight") == torch.uint32
    assert dtypes == {
        "0.scales": torch.bfloat16,
        "0.biases": torch.bfloat16,
        "0.bias": torch.bfloat16,
        "1.weight": torch.float32,
        "1.bias": torch.float32,
    }


def test_float64_is_written_as_float32_and_reported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(64)).double()
    model.register_buffer("scale", torch.ones(2, dtype=torch.float64))
    quantize_(model)
    report = save_checkpoint(model, tmp_path / "mlx")
    said = "written as float32, from float64"
    assert report.changed == dict.fromkeys(
        ["0.bias", "1.weight", "1.bias", "scale"], said
    )
    dtypes = {t.dtype for t in stored(tmp_path / "mlx").values()}
    assert dtypes == {torch.float32, torch.uint32}


@pytest.mark.parametrize("what", ["scales", "dense", "made dense"])
def test_numbers_beyond_the_dtype_are_refused(what: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(64))
    if what == "dense":
        model[1].weight.data[5] = 1e6
    else:
        model[0].weight.data[2] *= 1e7
    quantize_(model, AffineConfig(4, 16 if what == "made dense" else 64))
    name = "1.weight" if what == "dense" else "0.weight"
    with pytest.raises(ValueError, match=rf"{name}.*float16") as caught:
        save_checkpoint(
            model, tmp_path / "mlx", dtype=torch.float16, unsupported="dense"
        )
    assert "bfloat16" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(model, tmp_path / "mlx", dtype=torch.bfloat16, unsupported="dense")


# ---- all or nothing --------------------------------------------------------------


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    quantize_(model)
    return model


class BrokenTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        raise RuntimeError("no vocabulary")


def break_writing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    calls = []

    def save_file(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise error
        written(*args, **kwargs)

    written = save_module.save_file
    monkeypatch.setattr(save_module, "save_file", save_file)


def break_moving(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def rename(path: Path, target: Path) -> Path:
        new = path.name.startswith(".mlx.") and path.name.endswith(".unfinished")
        if new and Path(target).name == "mlx":
            raise error
        return renamed(path, target)

    renamed = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(place, "_exchange", lambda one, other: False)


@pytest.mark.parametrize("old", ["nothing", "empty", "full"])
@pytest.mark.parametrize("how", [break_writing, break_moving])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=str)
def test_a_failure_leaves_what_was_there(
    old: str,
    how: Callable[[pytest.MonkeyPatch, BaseException], None],
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "mlx"
    if old == "full":
        save_checkpoint(small_model(), folder)
        (folder / "notes.txt").write_text("mine")
    elif old == "empty":
        folder.mkdir()
    before = tree(tmp_path)
    how(monkeypatch, error)
    with pytest.raises(type(error)):
        save_checkpoint(small_model(), folder, overwrite=True, max_shard_bytes=1)
    assert tree(tmp_path) == before


def test_a_tokenizer_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no vocabulary"):
        save_checkpoint(small_model(), tmp_path / "mlx", tokenizer=BrokenTokenizer())
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        save_checkpoint(small_model(), tmp_path / "mlx", tokenizer="no such thing")
    assert list(tmp_path.iterdir()) == []


def test_a_model_on_meta(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = small_model()
    with pytest.raises(NotImplementedError, match="meta"):
        save_checkpoint(model, tmp_path / "mlx")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "mlx"
    save_checkpoint(small_model(), folder, max_shard_bytes=1)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="is not empty; pass overwrite=True"):
        save_checkpoint(small_model(), folder)
    assert tree(tmp_path) == before
    model = small_model()
    report = save_checkpoint(model, folder, overwrite=True)
    # Whole: no shard of the old one is left, by which a reader could be misled.
    assert sorted(tree(tmp_path / "deep" / "mlx")) == report.files
    again = small_model()
    load_checkpoint_(again, folder)
    assert_same_tensors(parts(again), parts(model))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["mlx"]


def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds files and no checkpoint"):
        save_checkpoint(small_model(), tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "mlx").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is a file"):
            save_checkpoint(small_model(), tmp_path / "mlx", overwrite=overwrite)
    assert tree(tmp_path) == {"mlx": b"mine"}


def test_links_and_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_checkpoint(small_model(), tmp_path / "link")
    save_checkpoint(small_model(), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_checkpoint(small_model(), ".")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link", "real"]
    for name in ("real", "here"):
        load_checkpoint_(small_model(), tmp_path / name)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_the_user(umask: int, tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(umask)
    try:
        save_checkpoint(small_model(), tmp_path / "mlx")
        (tmp_path / "private").mkdir(mode=0o700)
        save_checkpoint(small_model(), tmp_path / "private")
    finally:
        os.umask(before)
    assert mode(tmp_path / "mlx") == 0o777 & ~umask
    assert mode(tmp_path / "private") == 0o700
    assert {mode(p) for p in (tmp_path / "mlx").iterdir()} == {0o666 & ~umask}


# ---- the dtype in the configuration ----------------------------------------------


def written_dtype(folder: Path) -> torch.dtype:
    """What config.json names, in both spellings, and from_pretrained gives back."""
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"]
    again = from_pretrained(folder)
    assert again.dtype == getattr(torch, config["dtype"])
    assert {p.dtype for p in again.parameters()} == {again.dtype}
    return again.dtype


def test_the_configuration_of_a_model_that_was_cast(tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense", torch.bfloat16)
    quantize_(model)
    model.float()
    save_checkpoint(model, tmp_path / "mlx")
    assert written_dtype(tmp_path / "mlx") == torch.float32
    loaded = from_pretrained(tmp_path / "mlx", dtype=torch.bfloat16)
    save_checkpoint(loaded.to(torch.float32), tmp_path / "again")
    assert written_dtype(tmp_path / "again") == torch.float32
    save_checkpoint(model.double(), tmp_path / "wide")
    assert written_dtype(tmp_path / "wide") == torch.float32


def test_the_configuration_of_a_model_made_in_code(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **COMMON)
    model = AutoModelForCausalLM.from_config(config).half()
    # Nothing packed: it is the model's own, whatever scales would have been.
    save_checkpoint(model, tmp_path / "dense", dtype=torch.bfloat16)
    text = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert text["dtype"] == text["torch_dtype"] == "float16"
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx")
    assert written_dtype(tmp_path / "mlx") == torch.float16


@pytest.mark.parametrize(
    ("dtype", "scales", "want"),
    [
        (None, torch.bfloat16, torch.bfloat16),
        ("keep", torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_the_configuration_names_what_is_written(
    dtype: Any, scales: torch.dtype, want: torch.dtype, tmp_path: Path
) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model)
    model.to(torch.bfloat16)
    save_checkpoint(model, tmp_path / "mlx", dtype=dtype)
    tensors = stored(tmp_path / "mlx")
    assert {t.dtype for n, t in tensors.items() if n.endswith("scales")} == {scales}
    assert written_dtype(tmp_path / "mlx") == want


def test_the_configurations_within_a_configuration_agree(tmp_path: Path) -> None:
    model = small_model().half()
    model.config = AutoConfig.for_model("gemma3")
    save_checkpoint(model, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    parts = [config, config["text_config"], config["vision_config"]]
    assert [part["dtype"] for part in parts] == ["float16"] * 3


# ---- what goes along -------------------------------------------------------------


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(256)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="w0")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="w2",
        unk_token="w0",
        chat_template="{{ messages[0].content }}",
    )


def test_a_tokenizer_from_an_object_a_folder_or_the_origin(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model)
    assert not save_checkpoint(model, tmp_path / "none").tokenizer
    assert save_checkpoint(model, tmp_path / "object", tokenizer=tokenizer).tokenizer
    given = str(tmp_path / "object")
    assert save_checkpoint(model, tmp_path / "folder", tokenizer=given).tokenizer
    loaded = from_pretrained(tmp_path / "folder")
    assert save_checkpoint(loaded, tmp_path / "origin").tokenizer
    # Over its own origin, which is read before it is replaced.
    save_checkpoint(loaded, tmp_path / "folder", overwrite=True)
    for name in ("object", "folder", "origin"):
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert again("w7 w9")["input_ids"] == [7, 9]
        assert again.chat_template == tokenizer.chat_template
        assert again.eos_token_id == 2
    mlx_lm = pytest.importorskip("mlx_lm")
    _, mlx_tokenizer = mlx_lm.load(str(tmp_path / "origin"))
    assert mlx_tokenizer.encode("w7 w9") == [7, 9]
    talk = [{"role": "user", "content": "w5 w6"}]
    assert mlx_tokenizer.apply_chat_template(talk) == [5, 6]


def test_the_generation_configuration(tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model)
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 7], top_k=12, do_sample=True
    )
    save_checkpoint(model, tmp_path / "mlx")
    again = from_pretrained(tmp_path / "mlx")
    assert (
        again.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    )
    assert again.generation_config.eos_token_id == [2, 7]
    # Settings that contradict each other, as many published ones do, are kept.
    odd = {"do_sample": False, "temperature": 0.6}
    (tmp_path / "mlx" / "generation_config.json").write_text(json.dumps(odd))
    save_checkpoint(from_pretrained(tmp_path / "mlx"), tmp_path / "odd")
    assert from_pretrained(tmp_path / "odd").generation_config.temperature == 0.6


def test_the_model_card(tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model)
    save_checkpoint(model, tmp_path / "mlx")
    card = ModelCard.load(tmp_path / "mlx" / "README.md")
    assert card.data.library_name == "mlx"
    assert card.data.pipeline_tag == "text-generation"
    assert "mlx" in card.data.tags
    assert card.data.base_model is None  # it came from a folder
    model.config._name_or_path = "org/model"
    save_checkpoint(model, tmp_path / "named")
    card = ModelCard.load(tmp_path / "named" / "README.md")
    assert card.data.base_model == "org/model"
    save_checkpoint(small_model(), tmp_path / "plain")
    assert ModelCard.load(tmp_path / "plain" / "README.md").data.library_name == "mlx"


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    model = stock_model(LLAMA, tmp_path / "dense")
    quantize_(model)
    gone = tmp_path / "gone"
    for name in (str(tmp_path / "dense"), str(gone), "/models", "dense/"):
        model.config._name_or_path = name
        save_checkpoint(model, tmp_path / "mlx", overwrite=True)
        for file in (tmp_path / "mlx").iterdir():
            if file.suffix != ".safetensors":
                assert name not in file.read_text(), file.name


def test_the_report(tmp_path: Path) -> None:
    model = fp16_scales_in_bf16(4)
    first = model[0].weight
    wide = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).half()
    narrow = AffineQuantizedTensor.from_dense(wide, 4, 16)
    model[0].weight = nn.Parameter(narrow.to(first.dtype), requires_grad=False)
    report = save_checkpoint(model, tmp_path / "mlx", unsupported="dense")
    assert_expected_inline(
        str(report).replace(str(tmp_path), "PARENT"),
        """\
PARENT/mlx: 6,496 bytes in 4 files, 2 packed weights
casting scales and biases changed 2 weights, at most by 0.052 quantization steps (2.weight); dtype='keep' writes them as they are, and mlx-lm then computes in float32
0.weight: written dense (MLX has no group size 16)
no tokenizer was written: pass tokenizer=""",  # noqa: E501
    )
