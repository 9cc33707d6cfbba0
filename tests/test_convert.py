"""`convert` of quantized checkpoints: codes kept, quantized again, made dense; memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import (
    Case,
    _write_dense_checkpoint,
    mlx_logits,
    write_mlx_checkpoint,
)
from safetensors.torch import load_file, save_file
from test_other_formats import CONFIGS, EXPERTS, LLAMA, act_order, write
from torch import Tensor

import affine_tensor
from affine_tensor import AffineConfig, CheckpointError, from_pretrained

IDS = torch.tensor([[5, 17, 200, 3, 9, 44, 81, 7]])
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def equal(one: Path, other: Path) -> None:
    """The same tensors, bit for bit."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def close_in_mlx(folder: Path, twin: Any, tolerance: float = 1e-5) -> None:
    """mlx-lm computes from the folder what the dense twin does."""
    pytest.importorskip("mlx_lm", reason="mlx-lm reads what was written")
    with torch.no_grad():
        want = twin.float()(IDS).logits.double()
    got = mlx_logits(folder, IDS).double()
    assert (got - want).norm() / want.norm() < tolerance


def folded_away(name: str, columns: int) -> Tensor:
    """Act-order that only `down_proj` has."""
    seed = len(name)
    order = act_order(columns, seed)
    return order if "down_proj" in name else order.sort().values


# ---- codes kept -------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, *EXPERTS[:1]], ids=str)
@pytest.mark.parametrize("method", list(CONFIGS))
def test_codes_are_kept(case: Case, method: str, tmp_path: Path) -> None:
    twin = write(case, tmp_path / "q", method)
    report = affine_tensor.convert(
        tmp_path / "q", tmp_path / "ours", max_shard_bytes=50_000
    )
    assert not report.lost
    assert not report.changed
    close_in_mlx(tmp_path / "ours", twin)
    # As a model that is loaded and saved.
    model = from_pretrained(tmp_path / "q")
    affine_tensor.save_checkpoint(model, tmp_path / "saved")
    equal(tmp_path / "ours", tmp_path / "saved")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    read = [json.loads((tmp_path / n / "config.json").read_text()) for n in TWO]
    assert read[0] == read[1]


TWO = ("ours", "saved")


@pytest.mark.parametrize("case", [LLAMA, *EXPERTS[:1]], ids=str)
def test_act_order_of_down_proj_is_folded(case: Case, tmp_path: Path) -> None:
    twin = write(case, tmp_path / "q", "gptq", folded_away)
    report = affine_tensor.convert(tmp_path / "q", tmp_path / "ours")
    assert not report.changed
    close_in_mlx(tmp_path / "ours", twin)


def test_other_act_order_is_refused_or_changed(tmp_path: Path) -> None:
    def order(name: str, columns: int) -> Tensor:
        return act_order(columns, len(name))

    twin = write(LLAMA, tmp_path / "q", "gptq", order)
    with pytest.raises(ValueError, match=r"(?s)its columns are permuted.*unsupported="):
        affine_tensor.convert(tmp_path / "q", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    report = affine_tensor.convert(
        tmp_path / "q", tmp_path / "ours", unsupported="dense"
    )
    assert "model.layers.0.self_attn.q_proj.weight" in report.changed
    assert "model.layers.0.mlp.down_proj.weight" in report.packed
    close_in_mlx(tmp_path / "ours", twin)
    again = affine_tensor.convert(
        tmp_path / "q", tmp_path / "again", unsupported="requantize"
    )
    assert again.changed["model.layers.0.self_attn.q_proj.weight"].startswith("requan")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_mlx_checkpoint_comes_out_as_it_was(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoint")
    write_mlx_checkpoint(EXPERTS[0], tmp_path / "mlx", dtype=dtype)
    path = tmp_path / "mlx" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}))
    affine_tensor.convert(tmp_path / "mlx", tmp_path / "ours")
    equal(tmp_path / "ours", tmp_path / "mlx")


@pytest.mark.parametrize("dtype", ["auto", "keep"])
def test_norms_that_are_wider_while_loaded_come_out_as_they_were(
    dtype: str, tmp_path: Path
) -> None:
    """Here they are 1 + w, in float32 where bfloat16 would not give w back."""
    pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoint")
    _write_recurrent(tmp_path / "mlx")
    affine_tensor.convert(tmp_path / "mlx", tmp_path / "ours", dtype=dtype)
    equal(tmp_path / "ours", tmp_path / "mlx")


@pytest.mark.parametrize("options", [{"bits": 3}, {"dequantize": True}], ids=str)
def test_their_dtype_stays_whatever_becomes_of_the_weights(
    options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoint")
    _write_recurrent(tmp_path / "mlx")
    affine_tensor.convert(tmp_path / "mlx", tmp_path / "ours", **options)
    before, after = tensors_of(tmp_path / "mlx"), tensors_of(tmp_path / "ours")
    norms = [name for name in before if "norm" in name]
    assert len(norms) > 5
    for name in norms:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name], before[name]), name


def _write_recurrent(folder: Path) -> None:
    import cases_recurrent

    case = next(c for c in cases_recurrent.CASES if c.model_type == "qwen3_next")
    write_mlx_checkpoint(case, folder, dtype="bfloat16")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))


# ---- quantized again, and dense -----------------------------------------------------


@pytest.mark.parametrize("method", list(CONFIGS))
def test_dense(method: str, tmp_path: Path) -> None:
    twin = write(EXPERTS[0], tmp_path / "q", method, folded_away_only_for(method))
    report = affine_tensor.convert(tmp_path / "q", tmp_path / "ours", dequantize=True)
    assert not report.packed
    assert "quantization" not in json.loads(
        (tmp_path / "ours" / "config.json").read_text()
    )
    close_in_mlx(tmp_path / "ours", twin)


def folded_away_only_for(method: str) -> Any:
    return folded_away if method == "gptq" else None


@pytest.mark.parametrize("recipe", [None, "mixed_3_6"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantized_again_is_what_the_dense_values_give(
    method: str, recipe: str | None, tmp_path: Path
) -> None:
    """The twin folder has the exact values, under the names of the Hub."""
    write(EXPERTS[0], tmp_path / "q", method)
    options: dict[str, Any] = {"bits": 3, "group_size": 64, "recipe": recipe}
    report = affine_tensor.convert(tmp_path / "q", tmp_path / "ours", **options)
    affine_tensor.convert(tmp_path / "q-twin", tmp_path / "theirs", **options)
    equal(tmp_path / "ours", tmp_path / "theirs")
    # Against float64: the values of the file, and what was written.
    name = "model.layers.0.self_attn.k_proj.weight"
    before = load_file(tmp_path / "q-twin" / "model.safetensors")[name].double()
    after = dict(from_pretrained(tmp_path / "ours").named_parameters())[name]
    loss = (after.dequantize(torch.float64) - before).norm() / before.norm()
    assert report.lost[name] == pytest.approx(loss.item(), rel=1e-3)
    assert "lm_head.weight" in report.packed
    assert "lm_head.weight" not in report.lost  # it was dense


def test_of_latent_attention(tmp_path: Path) -> None:
    """Its `kv_b_proj` is dense here, of packed parts."""
    pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoint")
    import cases_latent

    case = next(c for c in cases_latent.CASES if c.model_type == "deepseek_v3")
    write_mlx_checkpoint(case, tmp_path / "mlx")
    affine_tensor.convert(tmp_path / "mlx", tmp_path / "same")
    equal(tmp_path / "same", tmp_path / "mlx")
    report = affine_tensor.convert(tmp_path / "mlx", tmp_path / "ours", bits=8)
    name = "model.layers.0.self_attn.embed_q.weight"
    assert report.packed[name][0] == 8
    assert 0 < report.lost[name] < 0.01


@pytest.mark.parametrize("model_type", ["qwen3_next", "deepseek_v3", "gpt_oss"])
def test_what_was_made_dense_is_quantized_as_the_original(
    model_type: str, tmp_path: Path
) -> None:
    """It has MLX's names, which transformers does not know, and MLX's norms."""
    pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoint")
    import cases_latent
    import cases_other
    import cases_recurrent

    cases = [*cases_other.CASES, *cases_latent.CASES, *cases_recurrent.CASES]
    case = next(c for c in cases if c.model_type == model_type)
    source = tmp_path / "mlx"
    write_mlx_checkpoint(case, source)
    affine_tensor.convert(source, tmp_path / "dense", dequantize=True)
    affine_tensor.convert(tmp_path / "dense", tmp_path / "ours", bits=3)
    affine_tensor.convert(source, tmp_path / "theirs", bits=3)
    equal(tmp_path / "ours", tmp_path / "theirs")
    with pytest.raises(ValueError, match="is dense: dequantize"):
        affine_tensor.convert(tmp_path / "dense", tmp_path / "no", dequantize=True)


def test_what_was_made_dense_and_has_parts_missing(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "q", "awq")
    affine_tensor.convert(tmp_path / "q", tmp_path / "dense", dequantize=True)
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "mlx"})
    with pytest.raises(CheckpointError, match=r"(?s)in one step:.*model\.norm\.weight"):
        affine_tensor.convert(tmp_path / "dense", tmp_path / "ours")


# ---- what is refused ---------------------------------------------------------------


def test_what_does_not_go_together(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "q", "awq")
    _write_dense_checkpoint(LLAMA, tmp_path / "dense")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("q", {"dequantize": True, "bits": 4}, "does not go together"),
        ("q", {"modules_to_not_convert": ["lm_head"]}, "of no use"),
        ("q", {"bits": 4, "modules_to_not_convert": ["no"]}, "has no such module"),
        ("dense", {"modules_to_not_convert": ["no"]}, "has no such module"),
        ("dense", {"dequantize": True}, "is dense: dequantize"),
        ("dense", {"dtype": "keep"}, "is dense: dtype='keep'"),
        ("dense", {"recipe": {"lm_heat": False}}, "It has .*lm_head"),
        ("q", {"recipe": {"lm_heat": False}}, "It has .*lm_head"),
        ("dense", {"group_size": 16}, "it has 32, 64 and 128"),
        ("q", {"recipe": {"lm_head": AffineConfig(4, 16)}}, "lm_head.weight: group"),
        ("q", {"attn_implementation": "eager"}, "not taken for"),
    ]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    for source, options, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            affine_tensor.convert(
                tmp_path / source, tmp_path / "old", overwrite=True, **options
            )
        assert [p.name for p in (tmp_path / "old").iterdir()] == ["config.json"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        affine_tensor.convert(tmp_path / "dense", tmp_path / "old")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"q", "q-twin", "dense", "old"}


def test_a_broken_file_leaves_nothing(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "q", "awq")
    file = tmp_path / "q" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        affine_tensor.convert(tmp_path / "q", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_report_says_what_stayed_dense(tmp_path: Path) -> None:
    _write_dense_checkpoint(EXPERTS[0], tmp_path / "dense")
    report = affine_tensor.convert(
        tmp_path / "dense",
        tmp_path / "ours",
        recipe={"model.layers.0.self_attn.q_proj": False, "*.k_proj": AffineConfig(8)},
        modules_to_not_convert=["lm_head"],
    )
    reasons = report.dense
    assert reasons["lm_head.weight"] == "left out by modules_to_not_convert"
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert reasons[q_proj] == "left out by the recipe"
    assert not reasons.keys() & report.packed.keys()
    tensors = tensors_of(tmp_path / "ours")
    size = sum(tensor.nbytes for tensor in tensors.values())
    model = from_pretrained(tmp_path / "ours")
    count = sum(p.numel() for p in model.parameters())
    assert report.bits_per_weight == pytest.approx(8 * size / count)


@pytest.mark.parametrize(
    ("pattern", "dense"),
    [
        ("mlp", r"\.mlp\."),
        ("model.layers.1", r"layers\.1\."),
        ("*mlp*", r"\.mlp\."),
        ("model.layers.?.mlp.up_proj", r"mlp\.up_proj"),
        (r"model\.layers\.\d\.self_attn", r"self_attn"),
        ("_proj", r"_proj\."),
        ("*", ""),
    ],
)
def test_modules_that_stay_dense_take_what_is_in_them_along(
    pattern: str, dense: str, tmp_path: Path
) -> None:
    _write_dense_checkpoint(LLAMA, tmp_path / "dense")
    report = affine_tensor.convert(
        *(tmp_path / "dense", tmp_path / "ours"), modules_to_not_convert=[pattern]
    )
    names = {*report.packed, *report.dense}
    assert len(names) == 16
    assert {*report.dense} == {name for name in names if re.search(dense, name)}
    assert {*report.dense.values()} == {"left out by modules_to_not_convert"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lm_head", "tied to model.embed_tokens. Name model.embed_tokens"),
        ("lm_h*", "tied to model.embed_tokens. Name model.embed_tokens"),
        ("norm", "dense anyway"),
        ("[x", "'\\[x' is to stay dense, and LlamaForCausalLM has no such module"),
        ("(x", "'\\(x' is to stay dense, and is no pattern"),
        ("", "is empty"),
    ],
)
def test_modules_to_leave_dense_that_leave_none(
    pattern: str, message: str, tmp_path: Path
) -> None:
    _write_dense_checkpoint(TIED, tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        affine_tensor.convert(
            *(tmp_path / "dense", tmp_path / "ours"), modules_to_not_convert=[pattern]
        )
    assert not (tmp_path / "ours").exists()


def test_the_name_that_a_tied_head_has_in_a_recipe(tmp_path: Path) -> None:
    _write_dense_checkpoint(TIED, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"lm_head.*tied to model\.embed_tokens"):
        affine_tensor.convert(
            *(tmp_path / "dense", tmp_path / "ours"), recipe={"lm_head": False}
        )


TIED = Case("llama", {"tie_word_embeddings": True})


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    """transformers compares no shapes of weights that are quantized."""
    _write_dense_checkpoint(LLAMA, tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :64].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^{name}: its shape is \[.*64\], and the"):
        affine_tensor.convert(tmp_path / "dense", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_formats_that_are_not_read(tmp_path: Path) -> None:
    _write_dense_checkpoint(LLAMA, tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'bitsandbytes'; MLX.*dense original"):
        affine_tensor.convert(tmp_path / "dense", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_weight_that_is_nan(tmp_path: Path) -> None:
    _write_dense_checkpoint(LLAMA, tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    message = r"^model\.layers\.1\.mlp\.up_proj\.weight: the weight at \[5, 7\] is NaN"
    with pytest.raises(ValueError, match=message):
        affine_tensor.convert(tmp_path / "dense", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    config = affine_tensor.AffineQuantizationConfig()
    with pytest.raises(ValueError, match=message):
        affine_tensor.from_pretrained(tmp_path / "dense", quantization_config=config)


def test_the_original_is_not_replaced_by_what_is_made_of_it(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    _write_dense_checkpoint(LLAMA, outer)
    _write_dense_checkpoint(LLAMA, outer / "within")
    (tmp_path / "link").symlink_to(outer / "within")
    before = {path: path.read_bytes() for path in outer.rglob("*") if path.is_file()}
    for source, folder, message in (
        (outer, outer, "is where it would be written to"),
        (outer / "within", tmp_path / "link", "is where it would be written to"),
        (tmp_path / "link", outer / "within", "is where it would be written to"),
        (outer / "within", outer, "lies in .*outer, which would be replaced"),
    ):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=message):
                affine_tensor.convert(source, folder, overwrite=overwrite)
    after = {path: path.read_bytes() for path in outer.rglob("*") if path.is_file()}
    assert after == before
    affine_tensor.convert(outer, outer / "new")
    assert (outer / "new" / "model.safetensors").exists()


# ---- memory -----------------------------------------------------------------------

CONVERT = """
import os
import affine_tensor

folder, tiny, out = sys.argv[1:4]
for number, options in enumerate(({}, {"bits": 3}, {"dequantize": True})):
    child = os.fork()
    if not child:
        convert = lambda source, name: affine_tensor.convert(
            source, f"{out}-{name}{number}", max_shard_bytes=20 << 20, **options
        )
        convert(tiny, "tiny")
        measure(lambda: convert(folder, "big"))
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="/proc tells how much memory is used"
)
def test_the_peak_is_about_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import load as benchmark

    assert isinstance(benchmark, ModuleType)
    small = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = {**benchmark.MODELS["llama"].config, **small, "intermediate_size": 8192}
    tiny = {
        **{"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"intermediate_size": 128, "vocab_size": 256},
    }
    least = benchmark.Model({**config, **tiny}, int(1e6))
    benchmark.write_checkpoint(tmp_path / "tiny", least, 1e6)
    own = benchmark.Model(config, int(30e6))
    size = benchmark.write_checkpoint(tmp_path / "big", own, 170e6)
    done = subprocess.run(
        [
            *(sys.executable, "-c", benchmark.MEASURE + CONVERT),
            *(str(tmp_path / name) for name in ("big", "tiny", "out")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peaks = [json.loads(line)["peak"] for line in done.stdout.splitlines()]
    assert len(peaks) == 3
    # Dense, the largest weight takes 67 MB in bfloat16, and the model 700 MB.
    shard, largest = 20 << 20, 2 * config["vocab_size"] * config["hidden_size"]
    kept, again, dense = peaks
    assert kept < 2.5 * shard
    assert again < shard + 3 * largest
    assert dense < shard + 2.5 * largest
    assert size > 4 * kept
