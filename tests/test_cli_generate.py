"""`affine-tensor generate`: the text of transformers' `generate`, as it comes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wrapped
from expecttest import assert_expected_inline
from hub_server import HubServer, only_loopback, use_hub
from test_cli import MODULE, run_main
from test_other_formats import CONFIGS, quantize_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from affine_tensor import from_pretrained
from affine_tensor.cli import generate, models

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DENSE, SHIPPED = EXAMPLES / "stdlib-6m", EXAMPLES / "stdlib-6m-4bit"
PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """'
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}def {% endif %}"
)

Capture = pytest.CaptureFixture
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr("affine_tensor.kernels.machine.default_kind", lambda: "cpu")


def expected(model: Any, folder: Path, prompt: str, count: int, **more: Any) -> str:
    """What transformers' own `generate` writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=count, **({"do_sample": False} | more))
    return str(
        tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    )


def with_template(folder: Path, template: str = TEMPLATE) -> Path:
    shutil.copytree(SHIPPED, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps(config))
    return folder


# ---- the text --------------------------------------------------------------------


@pytest.mark.parametrize("folder", [SHIPPED, DENSE], ids=["mlx", "dense"])
def test_greedy_text_is_that_of_transformers(
    folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    load = AutoModelForCausalLM.from_pretrained if folder is DENSE else from_pretrained
    text = expected(load(folder).eval(), folder, PROMPT, 24)
    capsys.readouterr()
    assert run_main(monkeypatch, "generate", str(folder), PROMPT, "-n", "24") == 0
    out, err = capsys.readouterr()
    assert out.removesuffix("\n") == text.removesuffix("\n")
    assert len(text) > 20
    for part in ("prompt: 15 tokens, ", "decode: 24 tokens, ", "first token after "):
        assert part in err


@pytest.mark.parametrize("method", list(CONFIGS))
def test_other_formats(
    method: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    folder = shutil.copytree(DENSE, tmp_path / "q")
    quantize_files(folder, method, AutoModelForCausalLM)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "q-twin", dtype="float32")
    text = expected(twin, DENSE, PROMPT, 12)
    capsys.readouterr()
    options = ("-n", "12", "--dtype", "float32", "--json")
    assert run_main(monkeypatch, "generate", str(folder), PROMPT, *options) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text


def test_for_programs(monkeypatch: Patch, capsys: Capture) -> None:
    options = ("--json", "-n", "3", "--fuse")
    assert run_main(monkeypatch, "generate", str(SHIPPED), "import ", *options) == 0
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert "tokens/s" not in err
    assert (value["prompt"], value["tokens"], value["finish"]) == (
        "import ",
        3,
        "length",
    )
    assert value["seed"] is None
    assert value["peak_bytes"] > 10**7
    for name in ("seconds_to_first_token", "tokens_per_second", "load_seconds"):
        assert value[name] > 0


def test_sampling(monkeypatch: Patch, capsys: Capture) -> None:
    options = ("--temperature", "0.9", "--top-p", "0.9", "--json", "-n", "16")

    def sample(*more: str) -> dict[str, Any]:
        assert (
            run_main(monkeypatch, "generate", str(SHIPPED), "def ", *options, *more)
            == 0
        )
        return dict(json.loads(capsys.readouterr().out))

    seeded = sample("--seed", "5")["text"]
    model = from_pretrained(SHIPPED)
    way = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 0}
    torch.manual_seed(5)
    assert seeded == expected(model, SHIPPED, "def ", 16, **way)
    first, second = sample(), sample()
    assert first["seed"] != second["seed"]
    assert sample("--seed", str(first["seed"]))["text"] == first["text"]


def test_an_end_token_ends(monkeypatch: Patch, capsys: Capture) -> None:
    loaded = models.load(str(SHIPPED))
    ids = generate.encode(loaded.tokenizer, PROMPT)
    first = generate.write(loaded, ids, 8, silent=True)
    assert first["finish"] == "length"
    prompt = torch.tensor([ids])
    made = loaded.model.generate(prompt, max_new_tokens=8, do_sample=False)
    loaded.model.generation_config.eos_token_id = [int(made[0, len(ids) + 3])]
    second = generate.write(loaded, ids, 8, silent=True)
    assert second["finish"] == "stop"
    assert second["tokens"] <= 4
    assert first["text"].startswith(second["text"])


def test_compile_asks_torch(monkeypatch: Patch, capsys: Capture) -> None:
    calls: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        calls.append(options)
        return function

    loaded = models.load(str(SHIPPED))
    ids = generate.encode(loaded.tokenizer, PROMPT)
    plain = generate.write(loaded, ids, 8, silent=True)
    monkeypatch.setattr(torch, "compile", compile)
    found = generate.write(loaded, ids, 8, silent=True, compile=True)
    assert len(calls) >= 1
    assert found["text"] == plain["text"]
    generate.show(found)
    assert "(compiling included)" in capsys.readouterr().err


# ---- prompts ---------------------------------------------------------------------


@pytest.mark.parametrize("folder", [SHIPPED, DENSE], ids=["mlx", "dense"])
def test_attention_by_name(folder: Path, monkeypatch: Patch) -> None:
    used = list[str]()
    load = models.load

    def note(*args: Any, **kwargs: Any) -> models.Loaded:
        loaded = load(*args, **kwargs)
        used.append(loaded.model.config._attn_implementation)
        return loaded

    monkeypatch.setattr(models, "load", note)
    options = ["-n", "2", "-q", "--attention"]
    for name in ("sdpa_float32", "eager"):
        arguments = ("generate", str(folder), PROMPT, *options, name)
        assert run_main(monkeypatch, *arguments) == 0
    assert used == ["sdpa_float32", "eager"]


def test_the_chat_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(with_template(tmp_path / "m"))
    ids = generate.encode(tokenizer, "sort", "be brief")
    assert tokenizer.decode(ids) == "<system>be brief\n<user>sort\ndef "
    plain = generate.encode(tokenizer, "sort", chat=False)
    assert tokenizer.decode(plain) == "sort"
    with pytest.raises(ValueError, match="--no-chat-template leaves it out"):
        generate.encode(tokenizer, "sort", "be brief", chat=False)
    bare = AutoTokenizer.from_pretrained(SHIPPED)
    with pytest.raises(ValueError, match="the tokenizer has none"):
        generate.encode(bare, "sort", "be brief")
    assert generate.encode(bare, "") == [bare.bos_token_id]
    bare.bos_token = None
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate.encode(bare, "")


def test_a_template_that_refuses(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system role') }}"
    tokenizer = AutoTokenizer.from_pretrained(with_template(tmp_path / "m", template))
    with pytest.raises(ValueError, match="refuses the prompt: no system role"):
        generate.encode(tokenizer, "sort", "be brief")


def test_a_prompt_that_is_too_long(monkeypatch: Patch, capsys: Capture) -> None:
    loaded = models.load(str(SHIPPED))
    assert generate._room(loaded, 2000, 100, False) == 48
    assert "at most 48 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"2048 tokens long, .* has 2048 positions"):
        generate._room(loaded, 2048, 1, False)


# ---- a repository, a pipe --------------------------------------------------------


def test_a_repository_of_the_hub(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    only_loopback(monkeypatch)
    with HubServer({"org/model": SHIPPED}) as server:
        use_hub(monkeypatch, server)
        options = ("-n", "2", "--revision", "main", "--json")
        assert run_main(monkeypatch, "generate", "org/model", "def ", *options) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == 2
        assert run_main(monkeypatch, "generate", "org/none", "def ") == 1
        assert "org/none" in capsys.readouterr().err


def test_a_pipe_gets_the_text_as_it_comes_and_ctrl_c_ends_it() -> None:
    command = [*MODULE, "generate", str(SHIPPED), "-", "-n", "2000", "--device", "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, stderr=subprocess.PIPE, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(PROMPT.encode())
        process.stdin.close()
        process.stdin = None
        begun = process.stdout.read(1)
        assert process.poll() is None  # 2000 tokens take longer
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert begun
    assert process.returncode == 130
    assert err.decode() == "interrupted\n"
    assert (begun + out).endswith(b"\n")


# ---- errors ----------------------------------------------------------------------


def failed(monkeypatch: Patch, capsys: Capture, *arguments: str) -> str:
    """The one line of an error."""
    assert run_main(monkeypatch, "generate", *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return str(err)


def test_what_is_no_model(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    for name in ("notok", "notype"):
        (tmp_path / name).mkdir()
        for file in SHIPPED.glob("*"):
            if name == "notype" or "token" not in file.name:
                (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "notype" / "config.json").unlink()
    (tmp_path / "notype" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    errors = [
        failed(monkeypatch, capsys, name, "def ")
        for name in ("nothing", "empty", "notype", "notok")
    ]
    assert_expected_inline(
        wrapped("".join(errors)),
        """\
affine-tensor: 'nothing' is neither a folder nor the name of a Hub
  repository (organization/name)
affine-tensor: there is no model*.safetensors in empty (only safetensors is
  read); it holds no files
affine-tensor: notype/config.json has no model_type, by which transformers
  knows the architecture. Take config.json from the original model
affine-tensor: notok has no tokenizer (tokenizer.json). Copy tokenizer.json
  and tokenizer_config.json from the original model into it""",
    )


def test_devices_that_are_not_here(monkeypatch: Patch, capsys: Capture) -> None:
    if not torch.cuda.is_available():
        text = failed(monkeypatch, capsys, str(SHIPPED), "def ", "--device", "cuda")
        assert "--device cuda: there is none here" in text
    text = failed(monkeypatch, capsys, str(SHIPPED), "def ", "--device", "cpu:7")
    assert "--device cpu:7: there is none here" in text
    for name in ("gpu", "xpu", "meta", "cuda:x", ""):
        for command in ("generate", "eval", "bench"):
            options = ("--text", "x") if command == "eval" else ()
            given = (command, str(SHIPPED), *options, "--device", name)
            assert run_main(monkeypatch, *given) == 2
            err = capsys.readouterr().err
            assert f"{name!r}: allowed are cpu, cuda, mps" in err
            assert err.count("\n") == 1


def test_a_wrong_command_line(monkeypatch: Patch, capsys: Capture) -> None:
    for options in (
        ("--top-p", "0.5"),
        ("--seed", "1"),
        ("--seed", str(2**64), "--temperature", "1"),
        ("--top-p", "0", "--temperature", "1"),
        ("--max-tokens", "0"),
        ("--temperature", "-1"),
        ("--dtype", "int8"),
    ):
        assert run_main(monkeypatch, "generate", "x", "def ", *options) == 2
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert run_main(monkeypatch, "generate", "x") == 2
    assert "PROMPT is missing" in capsys.readouterr().err


def test_the_script_keeps_other_libraries_quiet() -> None:
    """Also those that set their levels when they are imported, which is later there."""
    words = [
        "affine-tensor",
        "generate",
        str(SHIPPED),
        "a",
        "-n1",
        "-q",
        "--device=cpu",
    ]
    code = f"import sys; sys.argv = {words}; from affine_tensor.cli import main; main()"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_largest_seed(monkeypatch: Patch, capsys: Capture) -> None:
    options = ("--temperature", "1", "--seed", str(2**64 - 1), "-n", "1", "--json")
    assert run_main(monkeypatch, "generate", str(SHIPPED), "def ", *options) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 2**64 - 1


def test_an_attention_that_nobody_has(monkeypatch: Patch, capsys: Capture) -> None:
    given = ("generate", str(SHIPPED), "def ", "--attention", "bogus")
    assert run_main(monkeypatch, *given) == 2
    err = capsys.readouterr().err
    assert err.startswith("affine-tensor: --attention bogus: allowed are eager, ")
    assert ", sdpa, sdpa_float32, " in err
    assert err.count("\n") == 1


def broken(folder: Path, source: Path, name: str, text: str) -> Path:
    """A copy of which one file has another text, and the weights are links."""
    folder.mkdir()
    for file in source.glob("*"):
        if file.name != name:
            (folder / file.name).symlink_to(file)
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("source", [SHIPPED, DENSE], ids=["mlx", "dense"])
def test_a_configuration_that_is_broken(
    source: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    config = json.loads((source / "config.json").read_text())
    value = json.dumps({**config, "hidden_size": "x"})
    folder = broken(tmp_path / "value", source, "config.json", value)
    line = failed(monkeypatch, capsys, str(folder), "def ")
    assert line.startswith(f"affine-tensor: {folder}/config.json: ")
    assert "'hidden_size' expected int, got str (value: 'x'). Correct it" in line
    kind = json.dumps({**config, "model_type": "martian"})
    folder = broken(tmp_path / "kind", source, "config.json", kind)
    line = failed(monkeypatch, capsys, str(folder), "def ")
    assert f"{folder}/config.json has model_type 'martian', which transformers" in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_broken(
    name: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    folder = broken(tmp_path / "text", SHIPPED, name, '{"a": "\n"}')
    line = failed(monkeypatch, capsys, str(folder), "def ")
    assert f"{folder}/{name} is not valid JSON" in line


def test_a_tokenizer_that_is_none(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    folder = broken(tmp_path / "m", SHIPPED, "tokenizer.json", '{"a": 1}')
    line = failed(monkeypatch, capsys, str(folder), "def ")
    assert f"the tokenizer in {folder} cannot be loaded: " in line
    assert line.endswith(". Copy it from the original model again\n")


def test_prompts_that_are_no_text(monkeypatch: Patch, capsys: Capture) -> None:
    line = failed(monkeypatch, capsys, "x", "a\udce9")
    assert "PROMPT is not UTF-8 (character 1): convert it" in line
    line = failed(monkeypatch, capsys, "x", "a", "--system", "\udce9")
    assert "--system is not UTF-8 (character 0)" in line
    for errors, place in (("strict", "byte 3"), ("surrogateescape", "character 3")):
        data = io.BytesIO(b"abc\xe9")
        stdin = io.TextIOWrapper(data, encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        line = failed(monkeypatch, capsys, "x", "-")
        assert "stdin is not " in line
        assert f"({place}): convert it, as iconv does" in line


def test_a_closed_stdin(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin is closed" in failed(monkeypatch, capsys, "x", "-")
    assert run_main(monkeypatch, "generate", "x") == 2
    assert run_main(monkeypatch, "eval", "x", "--text", "-") == 1
    assert "stdin is closed" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_no_bars_where_only_the_text_is_wanted(option: str) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [*MODULE, "generate", str(DENSE), "def ", "-n", "1", option]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.write(theirs, b"end")  # so that there is something to read
    assert os.read(ours, 1 << 16) == b"end"
    os.close(ours)
    os.close(theirs)
    assert done.stdout
