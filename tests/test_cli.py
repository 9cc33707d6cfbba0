"""What all commands share: exit codes, errors in a line, help, completion, pipes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from big_checkpoint import write_sparse
from conftest import wrapped
from expecttest import assert_expected_inline
from rich.console import Console
from typer.testing import CliRunner

import affine_tensor
from affine_tensor import cli
from affine_tensor.cli import inspect, output

MODULE = [sys.executable, "-m", "affine_tensor"]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense checkpoint, for which nothing of transformers is imported."""
    tensors = {f"model.layers.{i}.weight": ("BF16", (64, 64)) for i in range(2000)}
    write_sparse(tmp_path / "dense", {"model_type": "llama"}, tensors)
    return tmp_path / "dense"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the script in this process."""
    monkeypatch.setattr(sys, "argv", ["affine-tensor", *arguments])
    monkeypatch.setattr(cli, "calm", lambda: None)  # this process stays as it is
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def look_at(*args: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "look_at", look_at)


# ---- help and version ------------------------------------------------------------


def test_the_summary_of_the_commands() -> None:
    done = CliRunner().invoke(cli.app, ["--help"], prog_name="affine-tensor")
    assert done.exit_code == 0
    head, _, commands = done.stdout.partition("Commands:")
    assert "--version" in head
    assert "\x1b" not in done.stdout
    names = [line.split()[0] for line in commands.strip().splitlines()]
    assert_expected_inline(
        " ".join(names), """inspect convert generate eval bench doctor"""
    )


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_help_has_examples(command: str) -> None:
    done = CliRunner().invoke(cli.app, [command, "-h"], prog_name="affine-tensor")
    assert done.exit_code == 0
    assert done.stdout.count(f"affine-tensor {command} ") >= 3  # usage and examples
    assert "Examples:" in done.stdout


def test_the_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"affine-tensor {affine_tensor.__version__}\n"


def test_the_module_is_the_script() -> None:
    done = subprocess.run(
        [*MODULE, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("affine-tensor ")
    assert done.stderr == ""


# ---- exit codes and errors -------------------------------------------------------


def test_a_wrong_command_line_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(monkeypatch, "inspect", "--no-such") == 2
    assert run_main(monkeypatch, "inspect") == 2
    assert run_main(monkeypatch, "nope") == 2
    assert run_main(monkeypatch, "doctor", "--device", "tpu") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_expected_inline(
        wrapped(err),
        """\
affine-tensor: No such option: --no-such (affine-tensor inspect --help)
affine-tensor: Missing argument 'PATH|ID' (affine-tensor inspect --help)
affine-tensor: No such command 'nope' (affine-tensor --help)
affine-tensor: Invalid value for '--device': 'tpu' is not one of 'cpu',
  'cuda', 'mps' (affine-tensor doctor --help)""",
    )


def test_a_value_that_is_refused_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(monkeypatch, "generate", "x", "y", "-n", "-7") == 2
    assert run_main(monkeypatch, "generate", "x", "y", "-n", "many") == 2
    assert run_main(monkeypatch, "bench", "x", "--prompt-tokens", "3", "0") == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "--max-tokens" in first
    assert "-7" in first
    assert "'many'" in second
    assert "'--prompt-tokens'" in third
    assert "'0'" in third


@pytest.mark.parametrize(
    "words",
    [
        "inspect --json",
        "inspect --no-such --json x",
        "doctor --tune --json",
        "no --json",
    ],
)
def test_a_wrong_command_line_for_programs(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(monkeypatch, *words.split()) == 2
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert value.keys() == {"error", "kind"}
    assert err == f"affine-tensor: {value['error']}\n"


def test_what_only_looks_like_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(monkeypatch, "generate", "no-such-folder", "--", "--json") == 1
    given = ("generate", "no-such-folder", "x", "--system", "--json")
    assert run_main(monkeypatch, *given) == 1
    assert run_main(monkeypatch, "inspect", "--no-such", "--", "--json") == 2
    assert capsys.readouterr().out == ""


def test_an_error_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(monkeypatch, "inspect", "no-such-folder") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert_expected_inline(
        wrapped(err),
        """\
affine-tensor: 'no-such-folder' is neither a folder nor the name of a Hub
  repository (organization/name)""",
    )


def test_an_error_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(monkeypatch, "inspect", "no-such-folder", "--json") == 1
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert value.keys() == {"error", "kind"}
    assert value["kind"] == "FileNotFoundError"
    assert value["error"] in err


def test_a_long_list_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = "\n".join(f"line {i}" for i in range(40))
    raising(monkeypatch, affine_tensor.CheckpointError(text))
    assert run_main(monkeypatch, "inspect", "x") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[11:] == [
        "line 11",
        "… and 28 more lines (AFFINE_TENSOR_DEBUG=1 prints all)",
    ]


def test_errors_of_others_are_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    raising(monkeypatch, ValueError("first\n\n  second"))
    assert run_main(monkeypatch, "inspect", "x") == 1
    raising(monkeypatch, KeyError("first\nsecond"))
    assert run_main(monkeypatch, "inspect", "x") == 1
    raising(monkeypatch, FileNotFoundError(2, "No such file or directory", "a.txt"))
    assert run_main(monkeypatch, "inspect", "x") == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "affine-tensor: first second"
    assert second.startswith("affine-tensor: unexpected KeyError: 'first")
    assert third == "affine-tensor: a.txt: No such file or directory"


def test_a_mistake_of_the_program_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    raising(monkeypatch, KeyError("weight"))
    assert run_main(monkeypatch, "inspect", "x") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert_expected_inline(
        wrapped(err),
        """\
affine-tensor: unexpected KeyError: 'weight'. Please report it, with what
  AFFINE_TENSOR_DEBUG=1 prints""",
    )


def test_debugging_gives_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ValueError("as it was raised"))
    monkeypatch.setenv("AFFINE_TENSOR_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["affine-tensor", "inspect", "x"])
    with pytest.raises(ValueError, match="as it was raised"):
        cli.main()


def test_interrupted_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert run_main(monkeypatch, "inspect", "x") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What bash does with a line, in which $AT is the script."""
    given = {"AT": " ".join(MODULE), "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env={**os.environ, **given, **env},
    )


posix = pytest.mark.skipif(os.name != "posix", reason="there is no such shell")


@posix
def test_closed_streams(dense: Path) -> None:
    done = shell("$AT --version >&-; echo $?")
    assert (done.stdout, done.stderr) == ("0\n", "")
    done = shell(f"$AT inspect {dense} 2>&-")
    assert done.returncode == 0
    assert done.stdout.startswith("checkpoint")
    done = shell("$AT inspect no-such-folder 2>&-")
    assert (done.returncode, done.stdout) == (1, "")


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_a_line(dense: Path, unbuffered: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    line = f"$AT inspect {dense} --modules --json >/dev/full"
    done = shell(line, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
    done = shell("$AT inspect no-such-folder 2>/dev/full")
    assert (done.returncode, done.stdout) == (1, "")


@posix
def test_an_encoding_that_lacks_characters(tmp_path: Path) -> None:
    folder = tmp_path / "modèle"
    write_sparse(folder, {"model_type": "llama"}, {"a.weight": ("BF16", (64, 64))})
    done = shell(f"$AT inspect {folder}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].endswith("mod\\xe8le")


@pytest.mark.skipif(os.name != "posix", reason="there are no pipes of this kind")
def test_a_reader_that_leaves_is_no_error(dense: Path) -> None:
    with subprocess.Popen(
        [*MODULE, "inspect", str(dense), "--modules"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        # More follows than a pipe holds.
        assert process.stdout.readline().startswith("checkpoint")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


# ---- terminals -------------------------------------------------------------------


def test_a_table_on_a_narrow_terminal_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name = "model.layers.*.mlp.up_proj.weight"
    rows = [("module", "count", "bytes"), (name, "7", "774,144"), ("norm", "1", "512")]
    forms = set()
    for width in range(15, 60):
        console = Console(width=width, file=sys.stdout, force_terminal=True)
        monkeypatch.setattr(output, "_console", lambda own=console: own)
        output.print_table(rows)
        out = capsys.readouterr().out
        cells = [
            re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in out.splitlines()
        ]
        assert any(row[-2:] == ["7", "774,144"] for row in cells)
        assert any(row == ["norm", "1", "512"] for row in cells)
        assert "─" in out or name in out  # folded, or as it is
        forms.add("─" in out)
    assert forms == {True, False}


# ---- the shell -------------------------------------------------------------------


def complete(words: str, **env: str) -> list[str]:
    """What bash is offered for the last of the words."""
    given = {
        "_AFFINE_TENSOR_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        MODULE, capture_output=True, text=True, env={**os.environ, **given, **env}
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_and_paths_are_completed(tmp_path: Path) -> None:
    (tmp_path / "model-a").mkdir()
    (tmp_path / "model-b").mkdir()
    (tmp_path / "model.txt").touch()
    assert complete("affine-tensor in") == ["inspect"]
    # bash does that itself, and goes into folders; other shells are told.
    assert complete(f"affine-tensor inspect {tmp_path}/mod") == []
    found = inspect.paths(f"{tmp_path}/mod")
    assert found == [f"{tmp_path}/model-a/", f"{tmp_path}/model-b/"]


def test_the_completion_of_bash_is_shown() -> None:
    done = subprocess.run(
        [*MODULE, "--show-completion", "bash"],
        capture_output=True,
        text=True,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "_AFFINE_TENSOR_COMPLETE=complete_bash" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


# ---- doctor ----------------------------------------------------------------------


def test_doctor_is_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        given.append(arguments)
        return 1

    monkeypatch.setattr("affine_tensor.doctor.main", main)
    arguments = "doctor --quick --only linear --device cpu --tune --sizes small --store"
    assert run_main(monkeypatch, *arguments.split()) == 1
    from affine_tensor.doctor import _parser

    options = _parser().parse_args(given[0])
    assert vars(options) == {
        "quick": True,
        "only": "linear",
        "device": "cpu",
        "tune": True,
        "sizes": "small",
        "store": True,
    }


def test_doctor_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = "doctor --quick --device cpu --only embedding --json"
    assert run_main(monkeypatch, *arguments.split()) == 0
    value = json.loads(capsys.readouterr().out)
    assert value.keys() == {"device", "name", "versions", "ok", "rows", "in_use"}
    assert value["ok"] is True
    assert [row["operator"] for row in value["rows"]] == [
        "embedding, int32",
        "embedding, int64",
    ]
    assert all(row["cases"] > 0 and not row["failures"] for row in value["rows"])


def test_doctor_says_on_stderr_what_it_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(monkeypatch, *["doctor", "--device", "cpu", "--tune"]) == 1
    for options in ("--store", "--sizes small", "--sizes model --json"):
        assert run_main(monkeypatch, "doctor", "--device", "cpu", *options.split()) == 2
    out, err = capsys.readouterr()
    tuned, *lines = err.splitlines()
    assert tuned.startswith("affine-tensor: there is nothing to tune on cpu")
    assert json.loads(out)["kind"] == "BadParameter"
    for line in lines:
        assert line.startswith("affine-tensor: --sizes and --store go with --tune")


def test_doctor_for_programs_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from affine_tensor.doctor.operators import Row

    row = Row("linear", cases=3, worst=9.5, wrong=["4 bits: off by one"])
    monkeypatch.setattr(
        "affine_tensor.doctor.operators.check_operators", lambda *a, **k: [row]
    )
    monkeypatch.setattr("affine_tensor.doctor.whole.check_whole", lambda *a, **k: [])
    assert run_main(monkeypatch, "doctor", "--device", "cpu", "--json") == 1
    value = json.loads(capsys.readouterr().out)
    assert value["ok"] is False
    assert value["rows"][0]["failures"] == ["linear: 4 bits: off by one"]
