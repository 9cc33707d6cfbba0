"""`affine-tensor convert`, as it is typed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from architectures import (
    Case,
    _write_dense_checkpoint,
    mlx_logits,
    write_mlx_checkpoint,
)
from safetensors.torch import load_file, save_file
from test_convert import close_in_mlx, equal, tensors_of
from test_other_formats import CONFIGS, LLAMA, act_order, write
from typer.testing import CliRunner, Result

from affine_tensor import cli

MODULE = [sys.executable, "-m", "affine_tensor"]


def flat(text: str) -> str:
    return " ".join(text.split())


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        cli.app, ["convert", *map(str, arguments)], prog_name="affine-tensor"
    )


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    _write_dense_checkpoint(LLAMA, tmp_path / "dense")
    return tmp_path / "dense"


def test_dense_in_a_process_of_its_own(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is the oracle")
    done = subprocess.run(
        [*MODULE, "convert", str(dense), str(tmp_path / "ours")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "16 of 4 bits in groups of 64" in done.stdout
    assert "bits per weight" in done.stdout
    assert "Loading weights" not in done.stderr  # bars are for terminals
    write_mlx_checkpoint(LLAMA, tmp_path / "mlx")
    equal(tmp_path / "ours", tmp_path / "mlx")
    ids = torch.tensor([[5, 17, 200]])
    assert torch.equal(*(mlx_logits(tmp_path / n, ids) for n in ("ours", "mlx")))


@pytest.mark.parametrize("method", list(CONFIGS))
def test_other_formats_keep_their_codes(method: str, tmp_path: Path) -> None:
    twin = write(LLAMA, tmp_path / "q", method)
    done = run(tmp_path / "q", tmp_path / "ours", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["packed"]["model.layers.0.mlp.up_proj.weight"] == {
        "bits": 4,
        "group_size": 32,
    }
    assert report["relative_loss"] == {}
    close_in_mlx(tmp_path / "ours", twin)
    again = run(tmp_path / "q", tmp_path / "again", "--bits", "8")
    assert again.exit_code == 0, again.output
    assert "14 weights were quantized again: relative error 0.0" in again.stdout
    close_in_mlx(tmp_path / "again", twin, 0.1)
    plain = run(tmp_path / "q", tmp_path / "plain", "--dequantize")
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.splitlines()[3].split() == ["packed", "none"]
    close_in_mlx(tmp_path / "plain", twin)


def test_options(dense: Path, tmp_path: Path) -> None:
    recipe = {"modules": {"*.o_proj": {"bits": 8, "group_size": 32}}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = run(
        *(dense, tmp_path / "ours", "--bits", "6", "--group-size", "32"),
        *("--recipe", tmp_path / "recipe.json", "--skip", "lm_head"),
        *("--skip", "embed_tokens", "--dtype", "bfloat16"),
        *("--max-shard-size", "50KB"),
    )
    assert done.exit_code == 0, done.output
    tensors = tensors_of(tmp_path / "ours")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.o_proj.scales"].dtype == torch.bfloat16
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["quantization"]["bits"] == 6
    assert settings["quantization"]["model.layers.0.self_attn.o_proj"]["bits"] == 8
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    told = "dense: model.embed_tokens.weight, lm_head.weight: left out by --skip"
    assert (
        told in done.stdout
        or told.replace(
            "model.embed_tokens.weight, lm_head.weight",
            "lm_head.weight, model.embed_tokens.weight",
        )
        in done.stdout
    )


def test_recipes_by_name(dense: Path, tmp_path: Path) -> None:
    assert run(dense, tmp_path / "ours", "--recipe", "mixed_2_6").exit_code == 0
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["quantization"]["lm_head"]["bits"] == 6
    assert run(dense, tmp_path / "quiet", "--quiet").stdout == ""


def test_out_that_exists(dense: Path, tmp_path: Path) -> None:
    assert run(dense, tmp_path / "ours").exit_code == 0
    before = (tmp_path / "ours" / "model.safetensors").read_bytes()
    done = run(dense, tmp_path / "ours", "--bits", "8")
    assert isinstance(done.exception, FileExistsError)
    assert "--overwrite" in str(done.exception)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == before
    assert run(dense, tmp_path / "ours", "--bits", "8", "--overwrite").exit_code == 0
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "7"], "bits"),
        (
            ["--recipe", "mixed_5_6"],
            "one of mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6",
        ),
        (["--skip", "nothing"], "has no such module"),
        (["--dequantize"], "is dense: --dequantize is for"),
        (["--calibrate", "missing.txt"], "missing.txt"),
        (["--max-shard-size", "big"], "'5GB' or in bytes"),
        (["--dtype", "int8"], "'int8' is not one of float16, bfloat16"),
        (["--unsupported", "no"], "'no' is not one of error, dense"),
    ],
)
def test_what_is_refused(
    dense: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run(dense, tmp_path / "ours", *arguments)
    assert done.exit_code != 0
    assert flat(message) in flat(f"{done.exception} {done.output}")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "'--bits': 9 is not one of 1, 2, 3, 4, 5, 6, 8"),
        (["--bits", "0", "--calibrate", "text"], "'--bits': 0 is not one of"),
        (["--group-size", "48"], "'--group-size': 48 is not one of 32, 64, 128"),
        (["--group-size", "16"], "is not one of 32, 64, 128"),
        (["--group-size", "256"], "is not one of 32, 64, 128"),
        (["--recipe", "nope"], "--recipe: recipe is 'nope', and there is no such file"),
        (["--recipe", "mixed_3_6", "--bits", "8"], "leave --bits 8 out"),
        (["--recipe", "six.json", "--bits", "5"], "has bits 6; leave --bits 5 out"),
        (["--max-shard-size", "abc"], "'abc' is no size of a file"),
        (["--max-shard-size", "1.2.3GB"], "'1.2.3GB' is no size of a file"),
        (["--max-shard-size", "0"], "'0' is no size of a file"),
        (["--dequantize", "--bits", "4"], "does not go together with --bits"),
        (["--dequantize", "--skip", "mlp"], "does not go together with --skip"),
        (["--dequantize", "--calibrate", "text"], "go together with --calibrate"),
        (["--dtype", "keep", "--calibrate", "text"], "--calibrate takes a dense one"),
        (["--skip", ""], "that is to stay dense is empty"),
        (["--skip", "(x"], "'(x' is to stay dense, and is no pattern"),
    ],
)
def test_usage_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    """They come before anything is looked at."""
    monkeypatch.chdir(tmp_path)
    recipe = {"modules": {}, "default": {"bits": 6}}
    (tmp_path / "six.json").write_text(json.dumps(recipe))
    done = run("nowhere", "ours", *arguments)
    assert done.exit_code == 2, done.output
    assert flat(message) in flat(done.output)


def test_a_recipe_may_say_the_same_as_options(dense: Path, tmp_path: Path) -> None:
    recipe = {"modules": {"lm_head": False}, "default": {"bits": 6}}
    (tmp_path / "six.json").write_text(json.dumps(recipe))
    arguments = ["--recipe", str(tmp_path / "six.json"), "--bits", "6"]
    done = run(dense, tmp_path / "ours", *arguments)
    assert done.exit_code == 0, done.output
    assert "15 of 6 bits" in done.stdout


def test_errors_name_options(dense: Path, tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "q", "gptq", lambda name, n: act_order(n, len(name)))
    text = str(run(tmp_path / "q", tmp_path / "ours").exception)
    assert "layers.0.self_attn.q_proj.weight: its columns are permuted" in text
    assert "layers.0.mlp.gate_proj.weight: its columns are permuted" in text
    assert re.search(r"… and [1-9] more\nPass --unsupported dense to write them", text)
    assert "or --unsupported requantize to" in text
    text = str(run(tmp_path / "q", tmp_path / "ours", "--skip", "mlp").exception)
    assert "Give --bits to quantize" in text
    (tmp_path / "file").touch()
    text = str(run(dense, tmp_path / "file" / "ours").exception)
    assert text.endswith("file is a file. Choose another folder")
    assert not (tmp_path / "ours").exists()


def test_the_help_warns_and_has_examples() -> None:
    done = run("--help")
    assert "affine-tensor convert Qwen/Qwen3-0.6B ./qwen-4bit" in done.stdout
    assert flat("loses accuracy twice") in flat(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_an_interruption_leaves_out_as_it_was(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text("{}")
    # It stops in the middle, and waits.
    code = (
        "import sys, time\n"
        "from affine_tensor.checkpoint import save\n"
        "from affine_tensor import cli\n"
        "add = save.ShardWriter.add\n"
        "def slow(self, tensors):\n"
        "    add(self, tensors); print('here', flush=True); time.sleep(600)\n"
        "save.ShardWriter.add = slow\n"
        "cli.main()\n"
    )
    arguments = ["convert", str(dense), str(tmp_path / "ours"), "--overwrite"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate()
    assert child.returncode == 130, errors
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "ours"}
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["config.json"]


def with_tokenizer(folder: Path, text: Path) -> None:
    """Words that are numbers, and a text of them."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(number): number for number in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = torch.randint(256, (4000,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(map(str, ids.tolist())))


def test_calibrated(dense: Path, tmp_path: Path) -> None:
    with_tokenizer(dense, tmp_path / "text")
    done = run(
        dense, tmp_path / "ours", "--calibrate", tmp_path / "text", "--bits", "3"
    )
    assert done.exit_code == 0, done.output
    assert run(dense, tmp_path / "plain", "--bits", "3").exit_code == 0
    ours, plain = (load_file(tmp_path / n / "model.safetensors") for n in BOTH)
    assert ours.keys() == plain.keys()
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(ours[name], plain[name])
    mlx_logits(tmp_path / "ours", torch.tensor([[5, 17, 200]]))


def test_calibrated_with_modules_left_dense(tmp_path: Path) -> None:
    """Of a tied model: what is told counts weights, as the files do."""
    tied = Case("llama", {"tie_word_embeddings": True})
    _write_dense_checkpoint(tied, tmp_path / "dense")
    with_tokenizer(tmp_path / "dense", tmp_path / "text")
    arguments = ["--calibrate", tmp_path / "text", "--skip", "self_attn"]
    done = run(tmp_path / "dense", tmp_path / "ours", *arguments)
    assert done.exit_code == 0, done.output
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines()[:5])
    assert facts["packed"].strip() == "7 of 4 bits in groups of 64"
    assert re.match(r"on [\d,]+ tokens: \d+% of plain", facts["calibrated"].strip())
    assert "and 5 more: left out by --skip" in done.stdout
    assert "filter_fn" not in done.output
    assert "modules quantized" not in done.output
    assert "Loading weights" not in done.stderr  # bars are for terminals


def test_what_calibrating_refuses(dense: Path, tmp_path: Path) -> None:
    with_tokenizer(dense, tmp_path / "text")
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 1000)
    write(LLAMA, tmp_path / "q", "awq")
    gaps = shutil.copytree(dense, tmp_path / "gaps")
    tensors = load_file(dense / "model.safetensors")
    whole = dict(tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, gaps / "model.safetensors", metadata={"format": "pt"})
    nan = shutil.copytree(dense, tmp_path / "nan")
    whole["model.layers.0.mlp.up_proj.weight"][5, 7] = torch.nan
    save_file(whole, nan / "model.safetensors", metadata={"format": "pt"})
    adapter = shutil.copytree(dense, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    alone = shutil.copytree(dense, tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    (alone / "tokenizer_config.json").unlink()
    sixteen = {"modules": {"lm_head": {"bits": 4, "group_size": 16}}}
    (tmp_path / "sixteen.json").write_text(json.dumps(sixteen))
    for source, text, options, message in (
        ("gaps", "text", [], r"missing_keys.*model\.layers\.1\.mlp\.up_proj\.weight"),
        ("nan", "text", [], r"layers\.0\.mlp\.up_proj\.weight.* is NaN.*--skip leaves"),
        ("adapter", "text", [], "has an adapter beside the weights"),
        ("alone", "text", [], "has no tokenizer"),
        ("q", "text", [], "is quantized already"),
        ("dense", "latin", [], r"latin is not UTF-8 \(byte 3\)"),
        ("dense", "missing", [], "missing, and there is no such file"),
        ("dense", "", [], "and it is a folder"),
        ("dense", "text", ["--skip", "nothing"], "has no such module"),
        ("dense", "text", ["--recipe", "sixteen.json"], "group_size is 16, which MLX"),
    ):
        options = [str(tmp_path / o) if o.endswith(".json") else o for o in options]
        arguments = ["--calibrate", str(tmp_path / text), *options]
        done = run(tmp_path / source, tmp_path / "ours", *arguments)
        assert done.exit_code == 1, source
        assert re.search(message, str(done.exception), re.DOTALL), str(done.exception)
        assert not (tmp_path / "ours").exists()
    done = run(dense, dense, "--calibrate", tmp_path / "text", "--overwrite")
    assert "is where it would be written to" in str(done.exception)


def test_calibrating_what_was_made_dense(dense: Path, tmp_path: Path) -> None:
    """Where MLX has the same names; of other names and values it says so."""
    pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoints")
    import cases_recurrent

    next_ = next(c for c in cases_recurrent.CASES if c.model_type == "qwen3_next")
    for case in (LLAMA, next_):
        write_mlx_checkpoint(case, tmp_path / "mlx")
        source = tmp_path / case.model_type
        assert run(tmp_path / "mlx", source, "--dequantize").exit_code == 0
        with_tokenizer(source, tmp_path / "text")
        shutil.rmtree(tmp_path / "mlx")
    text = ["--calibrate", tmp_path / "text"]
    done = run(tmp_path / "llama", tmp_path / "ours", *text)
    assert done.exit_code == 0, done.output
    done = run(tmp_path / "qwen3_next", tmp_path / "no", *text)
    assert "is dense, and has MLX's names and forms" in str(done.exception)


BOTH = ("ours", "plain")
