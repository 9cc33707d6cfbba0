"""`affine-tensor inspect`: what it says of checkpoints, and that it reads no weights."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from big_checkpoint import (
    MLX_4,
    QWEN3_MOE,
    Tensors,
    mlx_linear,
    norms,
    qwen3_moe,
    with_routers_of_8_bits,
    write_sparse,
)
from expecttest import assert_expected_inline
from hub_server import HubServer, only_loopback, use_hub
from typer.testing import CliRunner

import affine_tensor
from affine_tensor import AffineQuantizedTensor, cli
from affine_tensor.checkpoint.files import StoredTensor

SMALL: dict[str, Any] = {
    **QWEN3_MOE,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

LINEARS = {
    **{f"self_attn.{n}_proj": (128, 128) for n in "qkvo"},
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}


def llama(linear: Any) -> Tensors:
    """A Llama of one layer whose linears have the tensors that `linear` makes."""
    at = "model.layers.0"
    found: Tensors = {"model.embed_tokens.weight": ("BF16", (256, 128))}
    for own, shape in LINEARS.items():
        found |= linear(f"{at}.{own}", *shape)
    both = (f"{at}.input_layernorm", f"{at}.post_attention_layernorm", "model.norm")
    return found | norms(*both, size=128)


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def as_object(*arguments: object, code: int = 0) -> dict[str, Any]:
    exit_code, text = run(*arguments, "--json")
    assert exit_code == code, text
    return json.loads(text)


@pytest.fixture(autouse=True)
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that reads a weight."""

    read_few = StoredTensor.read

    def read(self: StoredTensor) -> torch.Tensor:
        assert self.nbytes <= 16, f"{self.name} was read"
        return read_few(self)

    monkeypatch.setattr(StoredTensor, "read", read)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    write_sparse(folder, with_routers_of_8_bits(SMALL), qwen3_moe(SMALL), shards=3)
    return folder


def test_the_text(small: Path) -> None:
    code, text = run(small)
    assert code == 0
    rows = [line for line in text.splitlines() if "model.layers." in line]
    assert len({len(row) for row in rows}) == 1  # aligned
    text = re.sub("  +", "  ", text.replace(str(small), "./small"))
    assert_expected_inline(
        text,
        """\
checkpoint  ./small
format  MLX: bits 4, group_size 64, mode affine (2 named modules have their own)
architecture  Qwen3MoeForCausalLM (model_type qwen3_moe)
files  3: model-00001-of-00003.safetensors to model-00003-of-00003.safetensors
bytes  205,632 (205.6 kB)
weights  362,368
bits/weight  4.540

module  count  shape  bits  group  bytes  bits/weight
model.embed_tokens.weight  1  256x128  4  64  18,432  4.50
model.layers.*.self_attn.q_proj.weight  2  128x128  4  64  18,432  4.50
model.layers.*.self_attn.k_proj.weight  2  64x128  4  64  9,216  4.50
model.layers.*.self_attn.v_proj.weight  2  64x128  4  64  9,216  4.50
model.layers.*.self_attn.o_proj.weight  2  128x128  4  64  18,432  4.50
model.layers.*.mlp.switch_mlp.gate_proj.weight  2  4x64x128  4  64  36,864  4.50
model.layers.*.mlp.switch_mlp.up_proj.weight  2  4x64x128  4  64  36,864  4.50
model.layers.*.mlp.switch_mlp.down_proj.weight  2  4x128x64  4  64  36,864  4.50
model.layers.*.mlp.gate.weight  2  4x128  8  64  1,088  8.50
model.layers.*.self_attn.q_norm.weight  2  64  16  -  256  16.00
model.layers.*.self_attn.k_norm.weight  2  64  16  -  256  16.00
model.layers.*.input_layernorm.weight  2  128  16  -  512  16.00
model.layers.*.post_attention_layernorm.weight  2  128  16  -  512  16.00
model.norm.weight  1  128  16  -  256  16.00
lm_head.weight  1  256x128  4  64  18,432  4.50
total  27  362,368  205,632  4.54

Loading into Qwen3MoeForCausalLM: 16 stay packed, 9 are dense.
""",
    )


def test_a_row_for_each_module(small: Path) -> None:
    _, text = run(small, "--modules")
    lines = [line.split() for line in text.splitlines()]
    (row,) = [line for line in lines if line[:1] == ["model.layers.1.mlp.gate.weight"]]
    assert row == [
        "model.layers.1.mlp.gate.weight",
        "1",
        "4x128",
        "8",
        "64",
        "544",
        "8.50",
    ]


def test_the_object(small: Path) -> None:
    value = as_object(small)
    shown = {k: v for k, v in value.items() if k not in ("kinds", "folder", "source")}
    assert_expected_inline(
        json.dumps(shown, indent=1),
        """\
{
 "format": {
  "name": "mlx",
  "settings": {
   "bits": 4,
   "group_size": 64,
   "mode": "affine"
  },
  "overrides": 2,
  "readable": true
 },
 "model_type": "qwen3_moe",
 "architectures": [
  "Qwen3MoeForCausalLM"
 ],
 "files": [
  {
   "name": "model-00001-of-00003.safetensors",
   "bytes": 82944,
   "tensors": 21
  },
  {
   "name": "model-00002-of-00003.safetensors",
   "bytes": 46880,
   "tensors": 21
  },
  {
   "name": "model-00003-of-00003.safetensors",
   "bytes": 75808,
   "tensors": 21
  }
 ],
 "tensors": 63,
 "bytes": 205632,
 "weights": 362368,
 "bits_per_weight": 4.539738608265631,
 "loading": {
  "model": "Qwen3MoeForCausalLM",
  "why_no_model": null,
  "packed": 16,
  "dense": 9,
  "notes": {},
  "ignored": [],
  "guessed": []
 },
 "refused": null
}""",
    )
    assert value["folder"] == value["source"] == str(small)
    assert value["kinds"][1] == {
        "name": "model.layers.*.self_attn.q_proj.weight",
        "count": 2,
        "shape": [128, 128],
        "bits": 4,
        "group_size": 64,
        "bytes": 2 * 128 * 128 * 9 // 16,
        "bits_per_weight": 4.5,
    }
    assert sum(kind["bytes"] for kind in value["kinds"]) == value["bytes"]
    assert "modules" not in value
    modules = as_object(small, "--modules")["modules"]
    assert sum(one["bytes"] for one in modules) == value["bytes"]
    assert modules[1].keys() == value["kinds"][1].keys() - {"count"}


def test_it_says_what_loading_does(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = as_object(small)
    monkeypatch.undo()  # now weights are read
    model = affine_tensor.from_pretrained(small)
    packed = [isinstance(p, AffineQuantizedTensor) for p in model.parameters()]
    assert said["loading"]["packed"] == sum(packed) > 0
    assert said["loading"]["dense"] == len(packed) - sum(packed) > 0
    assert said["weights"] == affine_tensor.footprint(model).parameters
    assert said["loading"]["model"] == type(model).__name__


def test_100_gb_take_no_time(tmp_path: Path, small: Path) -> None:
    write_sparse(tmp_path, with_routers_of_8_bits(QWEN3_MOE), qwen3_moe(), shards=25)
    as_object(small)  # imports what is imported once
    start = time.process_time()
    value = as_object(tmp_path)
    took = time.process_time() - start
    print(f"{value['bytes']:,} bytes in {took:.2f} s")
    assert value["bytes"] > 100e9
    assert len(value["files"]) == 25
    assert value["loading"]["packed"] == 562
    assert 4.5 < value["bits_per_weight"] < 4.51
    # 0.5 s where this was written; machines of CI are slower.
    assert took < 5


def test_experts_that_differ_become_dense(tmp_path: Path) -> None:
    tensors = qwen3_moe(SMALL)
    name = "model.layers.1.mlp.switch_mlp.up_proj"
    tensors |= mlx_linear(name, 4, 64, 128, bits=8)
    config = with_routers_of_8_bits(SMALL)
    config["quantization"][name] = {**MLX_4, "bits": 8}
    write_sparse(tmp_path, config, tensors)
    value = as_object(tmp_path)
    ((note, names),) = value["loading"]["notes"].items()
    assert note.startswith(
        "dense, since its parts differ: 4 bits in groups of 64 and 8"
    )
    assert names == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert value["loading"]["packed"] == 15  # of 16


def gptq(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (columns // 8, rows)),
        f"{name}.qzeros": ("I32", (columns // 64, rows // 8)),
        f"{name}.scales": ("F16", (columns // 64, rows)),
        f"{name}.g_idx": ("I32", (columns,)),
    }


def awq(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (columns, rows // 8)),
        f"{name}.qzeros": ("I32", (columns // 64, rows // 8)),
        f"{name}.scales": ("F16", (columns // 64, rows)),
    }


def compressed(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("I32", (rows, columns // 8)),
        f"{name}.weight_scale": ("BF16", (rows, columns // 64)),
    }


GROUPS = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": 64,
            "symmetric": True,
        },
    }
}


@pytest.mark.parametrize(
    ("name", "linear", "settings", "each"),
    [
        (
            "gptq",
            gptq,
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True},
            4 + (16 + 4) / 64,
        ),
        (
            "awq",
            awq,
            {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
            4 + (16 + 4) / 64,
        ),
    ],
)
def test_other_formats(
    tmp_path: Path, name: str, linear: Any, settings: dict[str, Any], each: float
) -> None:
    write_sparse(tmp_path, {**LLAMA, "quantization_config": settings}, llama(linear))
    value = as_object(tmp_path)
    assert value["format"]["name"] == name
    assert value["format"]["settings"]["bits"] == 4
    assert value["format"]["settings"]["group_size"] == 64
    assert value["loading"]["packed"] == len(LINEARS)
    kinds = {kind["name"]: kind for kind in value["kinds"]}
    down = kinds["model.layers.0.mlp.down_proj.weight"]
    own = 32 / 128 if name == "gptq" else 0  # g_idx, of each column
    assert down["bits_per_weight"] == pytest.approx(each + own)
    assert (down["shape"], down["bits"], down["group_size"]) == ([128, 256], 4, 64)
    assert value["weights"] == 256 * 128 + 4 * 128 * 128 + 3 * 256 * 128 + 3 * 128


def write_compressed(folder: Path) -> None:
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": GROUPS,
    }
    values = {}

    def linear(name: str, *shape: int) -> Tensors:
        values[f"{name}.weight_shape"] = struct.pack("<ii", *shape)
        return {**compressed(name, *shape), f"{name}.weight_shape": ("I32", (2,))}

    config = {**LLAMA, "quantization_config": settings}
    write_sparse(folder, config, llama(linear), shards=2, values=values)


def test_compressed_tensors(tmp_path: Path) -> None:
    write_compressed(tmp_path)
    value = as_object(tmp_path)
    assert value["format"]["name"] == "compressed-tensors"
    assert value["format"]["settings"]["bits"] == 4
    assert value["loading"]["packed"] == len(LINEARS)
    kinds = {kind["name"]: kind for kind in value["kinds"]}
    down = kinds["model.layers.0.mlp.down_proj.weight"]
    assert (down["shape"], down["bits"], down["group_size"]) == ([128, 256], 4, 64)
    assert down["bits_per_weight"] == 4.25 + 64 / (
        128 * 256
    )  # its shape is stored, too


def test_float_formats(tmp_path: Path) -> None:
    def linear(name: str, *shape: int) -> Tensors:
        bits = 8 if "down" in name else 4
        return mlx_linear(name, *shape, bits=bits, group=32, biases=False)

    down = "model.layers.0.mlp.down_proj"
    four = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    general = {**four, down: {"bits": 8, "group_size": 32, "mode": "mxfp8"}}
    write_sparse(tmp_path, {**LLAMA, "quantization": general}, llama(linear))
    value = as_object(tmp_path)
    assert value["loading"]["packed"] == len(LINEARS) - 1
    assert value["loading"]["notes"]["mxfp8 is not affine: made dense"] == [
        f"{down}.weight"
    ]
    assert len(value["loading"]["notes"]) == 2


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    config = {"model_type": "quux", "architectures": ["Quux"], "quantization": MLX_4}
    write_sparse(tmp_path, config, llama(mlx_linear))
    value = as_object(tmp_path)
    assert value["loading"]["model"] is None
    assert "'quux'" in value["loading"]["why_no_model"]
    assert value["loading"]["packed"] == len(LINEARS)
    assert value["kinds"][1]["bits"] == 4
    assert "by names alone" in run(tmp_path)[1]


def test_without_any_configuration(tmp_path: Path) -> None:
    write_sparse(tmp_path, {}, llama(mlx_linear))
    value = as_object(tmp_path)
    assert len(value["loading"]["guessed"]) == len(LINEARS)
    assert value["kinds"][1]["group_size"] == 64


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    tensors = llama(lambda name, *shape: {f"{name}.weight": ("BF16", shape)})
    write_sparse(tmp_path, LLAMA, tensors)
    value = as_object(tmp_path)
    assert value["format"]["name"] == "dense"
    assert value["bits_per_weight"] == 16
    assert "affine-tensor convert" in run(tmp_path)[1]


def test_a_dense_checkpoint_with_a_gap(tmp_path: Path) -> None:
    tensors = llama(lambda name, *shape: {f"{name}.weight": ("BF16", shape)})
    del tensors["model.layers.0.mlp.up_proj.weight"]
    write_sparse(tmp_path, LLAMA, tensors)
    (names,) = as_object(tmp_path)["loading"]["notes"].values()
    assert names == ["model.layers.0.mlp.up_proj.weight"]
    assert "up_proj.weight: not in the files under the names" in run(tmp_path)[1]


# ---- what would be refused -------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_beside_the_weights(packed: bool, tmp_path: Path) -> None:
    dense = llama(lambda name, *shape: {f"{name}.weight": ("BF16", shape)})
    tensors = llama(mlx_linear) if packed else dense
    config = {**LLAMA, **({"quantization": MLX_4} if packed else {})}
    write_sparse(tmp_path, config, tensors)
    assert not as_object(tmp_path)["refused"]
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused = as_object(tmp_path, code=1)["refused"]
    assert "has an adapter beside the weights" in refused


def test_a_long_refusal_is_cut(tmp_path: Path) -> None:
    tensors = qwen3_moe(SMALL)
    gone = [name for name in tensors if "self_attn" in name]
    for name in gone:
        del tensors[name]
    write_sparse(tmp_path, with_routers_of_8_bits(SMALL), tensors)
    assert len(as_object(tmp_path, code=1)["refused"].splitlines()) > 12
    text = run(tmp_path)[1]
    assert "more lines (--json has all)" in text
    assert len(text.partition("Loading would be refused")[2].splitlines()) <= 14


def test_words_that_are_not_understood_have_no_bits_per_weight(tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128}

    def marlin(name: str, rows: int, columns: int) -> Tensors:
        return {
            f"{name}.qweight": ("I32", (columns // 16, 2 * rows)),
            f"{name}.scales": ("F16", (columns // 128, rows)),
        }

    config = {**LLAMA, "quantization_config": {**settings, "version": "marlin"}}
    write_sparse(tmp_path, config, llama(marlin))
    value = as_object(tmp_path, code=1)
    assert "the layout of a CUDA kernel" in value["refused"]
    assert value["bits_per_weight"] is None
    assert "bits/weight   unknown" in run(tmp_path)[1]


def test_settings_that_contradict_the_shapes(small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = {**MLX_4, "bits": 3}
    (small / "config.json").write_text(json.dumps(config))
    value = as_object(small, code=1)
    assert "model.layers.1.mlp.gate.weight: " in value["refused"]
    assert "8 bits, group size 64, which config.json does not name" in value["refused"]
    code, text = run(small)
    assert code == 1
    assert "Loading would be refused: " in text


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    tensors = qwen3_moe(SMALL)
    del tensors["model.norm.weight"]
    write_sparse(tmp_path, with_routers_of_8_bits(SMALL), tensors)
    refused = as_object(tmp_path, code=1)["refused"]
    assert "1 missing:\n  model.norm.weight" in refused


def test_a_format_that_is_not_read(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = llama(lambda name, *shape: {f"{name}.weight": ("F8_E4M3", shape)})
    write_sparse(tmp_path, {**LLAMA, "quantization_config": settings}, tensors)
    value = as_object(tmp_path, code=1)
    assert value["format"]["name"] == "fp8"
    assert value["format"]["readable"] is False
    assert value["bits_per_weight"] is None
    assert value["refused"] == "its config.json says quant_method 'fp8'"


def test_a_file_that_is_cut_off(small: Path) -> None:
    shard = small / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(affine_tensor.CheckpointError, match="truncated"):
        run(small)


# ---- the Hub ---------------------------------------------------------------------


def test_a_repository_by_its_headers(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "tokenizer.json").write_text("{}")
    here = as_object(small)
    only_loopback(monkeypatch)
    with HubServer({"org/small": small}) as server:
        use_hub(monkeypatch, server)
        there = as_object("org/small")
        assert sorted(server.downloads) == [
            "config.json",
            "model.safetensors.index.json",
        ]
        assert set(server.peeks) == {file["name"] for file in here["files"]}
        again = as_object("org/small", "--revision", Path(there["folder"]).name)
    assert again == there
    for value in (here, there):
        del value["source"], value["folder"]
    assert here == there


def test_shapes_that_a_repository_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    write_compressed(folder)
    here = as_object(folder)
    only_loopback(monkeypatch)
    with HubServer({"org/model": folder}) as server:
        use_hub(monkeypatch, server)
        there = as_object("org/model")
        assert not any(name.endswith(".safetensors") for name in server.downloads)
    for value in (here, there):
        del value["source"], value["folder"]
    assert here == there


def test_a_repository_that_is_not_there(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_loopback(monkeypatch)
    with HubServer({"org/small": small}) as server:
        use_hub(monkeypatch, server)
        with pytest.raises(OSError, match="Repository Not Found"):
            run("org/other")
        with pytest.raises(OSError, match="Invalid rev id"):
            run("org/small", "--revision", "nope")


# ---- on a terminal, and in a pipe -----------------------------------------------


def test_nothing_else_is_printed(small: Path) -> None:
    """Neither what transformers nor what torchao says of itself when it is imported."""
    command = [sys.executable, "-m", "affine_tensor", "inspect", str(small), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["loading"]["model"] == "Qwen3MoeForCausalLM"


@pytest.mark.skipif(os.name != "posix", reason="there are no pseudo terminals")
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_has_a_table(tmp_path: Path, no_color: bool) -> None:
    import pty

    tensors = llama(lambda name, *shape: {f"{name}.weight": ("BF16", shape)})
    write_sparse(tmp_path, LLAMA, tensors)
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "160"}
    env |= {"NO_COLOR": "1"} if no_color else {}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "affine_tensor", "inspect", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, env=env
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:
            pass  # how Linux says that the other end is closed
        os.close(ours)
        assert process.stderr
        assert process.stderr.read() == b""
        assert process.wait() == 0
    text = shown.decode()
    assert "─" in text
    assert ("\x1b[33m" in text) is not no_color  # yellow
