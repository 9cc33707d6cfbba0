"""`affine-tensor eval`: a row for each width, from the dense weights each time."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline
from test_cli import run_main
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from affine_tensor import AffineConfig, cli, footprint, quantize_
from affine_tensor.cli import evaluate, many, models
from affine_tensor.evaluate import Score, score

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DENSE, SHIPPED = EXAMPLES / "stdlib-6m", EXAMPLES / "stdlib-6m-4bit"

Capture = pytest.CaptureFixture
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr("affine_tensor.kernels.machine.default_kind", lambda: "cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.py"
    path.write_text((EXAMPLES / "quickstart.py").read_text()[:400])
    return path


def run_json(monkeypatch: Patch, capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert run_main(monkeypatch, "eval", *arguments, "--json") == 0
    return dict(json.loads(capsys.readouterr().out))


def alone(text: Path, bits: int | None, group: int = 64) -> tuple[float, int]:
    """Bits per byte and size of a model that was loaded for this width alone."""
    model = AutoModelForCausalLM.from_pretrained(DENSE).eval()
    if bits is not None:
        quantize_(model, AffineConfig(bits=bits, group_size=group))
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    found = score(model, tokenizer, [text.read_text()])
    return found.bits_per_byte, footprint(model).bytes


def test_widths_are_each_quantized_from_the_dense_weights(
    text: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    options = ("--text", str(text), "--bits", "2", "4", "--group-size", "32", "64")
    value = run_json(monkeypatch, capsys, str(DENSE), *options)
    rows = value["rows"]
    forms = [(None, None), (2, 32), (2, 64), (4, 32), (4, 64)]
    assert [(row["bits"], row["group_size"]) for row in rows] == forms
    for row in (rows[0], rows[2], rows[4]):
        bits, size = alone(text, row["bits"])
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        assert row["bytes"] == size
    assert rows[1]["bits_per_byte"] > rows[3]["bits_per_byte"]
    assert value["text_bytes"] == len(text.read_bytes())
    assert value["texts"] == [str(text)]


def test_a_quantized_model_is_measured_as_it_is(
    text: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    (row,) = run_json(monkeypatch, capsys, str(SHIPPED), "--text", str(text))["rows"]
    assert row["name"] == "as it is"
    # Its weights are those of the dense twin at 4 bits.
    assert row["bits_per_byte"] == pytest.approx(alone(text, 4)[0], rel=1e-6)


def test_the_model_is_as_before_afterwards(text: Path) -> None:
    loaded = models.load(str(DENSE))
    before = dict(loaded.model.named_parameters())
    rows = [row for row, _ in evaluate.measure(loaded, [text.read_text()], [(3, 64)])]
    assert [row["name"] for row in rows] == ["dense", "3 bits"]
    after = dict(loaded.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert before.keys() == after.keys()


def test_the_table(text: Path, monkeypatch: Patch, capsys: Capture) -> None:
    options = ("--text", str(text), "--context", "64", "--stride", "32")
    assert run_main(monkeypatch, "eval", str(SHIPPED), *options) == 0
    head, row, _, count, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["width", "group", "bits/byte", "MB", "seconds"]
    assert row.startswith("as it is")
    tokens = len(AutoTokenizer.from_pretrained(SHIPPED).encode(text.read_text()))
    assert count == f"400 bytes of text, {tokens} tokens"
    assert run_main(monkeypatch, "eval", str(SHIPPED), *options, "--perplexity") == 0
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[3] == "perplexity"
    assert 1 < float(row.split()[5]) < 3072


def test_modules_that_stay_dense_are_named(capsys: Capture) -> None:
    row = {
        "name": "4 bits",
        "group_size": 128,
        "bits_per_byte": 1.5,
        "perplexity": 10.0,
        "bytes": 1_500_000,
        "seconds": 2.0,
        "dense_modules": [f"layers.{i}" for i in range(5)],
    }
    evaluate.show([row], Score(10.0, 5, 20), perplexity=True)
    assert_expected_inline(
        capsys.readouterr().out,
        """\
width   group  bits/byte  perplexity    MB  seconds
4 bits    128     1.5000      10.000  1.50      2.0
4 bits: dense stay layers.0, layers.1, layers.2 and 2 more

20 bytes of text, 5 tokens
""",
    )


def test_a_picture(
    text: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib", reason="it draws")
    from matplotlib import image

    path = tmp_path / "widths.png"
    row = {"bits_per_byte": 1.5, "bytes": 4_000_000, "name": "4 bits"}
    forms = [{**row, "group_size": group} for group in (None, 32, 64)]
    evaluate.draw(forms, path)
    pixels = image.imread(path)
    assert pixels.shape[:2] == (675, 1050)
    assert pixels.std() > 0.01
    options = ("--text", str(text), "--picture", str(tmp_path / "one.svg"))
    run_json(monkeypatch, capsys, str(SHIPPED), *options)
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_stdin(text: Path, monkeypatch: Patch, capsys: Capture) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(text.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    value = run_json(monkeypatch, capsys, str(SHIPPED), "--text", "-")
    assert value["text_bytes"] == 400


def test_texts_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("a\r\né\n".encode())
    assert evaluate.read(str(path)) == "a\r\né\n"


# ---- errors ----------------------------------------------------------------------


def failed(monkeypatch: Patch, capsys: Capture, *arguments: str) -> str:
    """The one line of an error."""
    assert run_main(monkeypatch, "eval", *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return str(err)


def test_what_is_refused(
    text: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    given = ("--text", str(text))
    line = failed(monkeypatch, capsys, str(SHIPPED), *given, "--bits", "4")
    assert "is quantized already, and --bits would round it twice" in line
    (tmp_path / "latin").write_bytes(b"abc\xe9")
    line = failed(monkeypatch, capsys, "x", "--text", str(tmp_path / "latin"))
    assert "latin is not UTF-8 (byte 3)" in line
    line = failed(monkeypatch, capsys, "x", "--text", "no-such-file")
    assert "--text no-such-file: No such file or directory. Name a file" in line
    line = failed(monkeypatch, capsys, "x", *given, "--picture", "a.txt")
    assert "must end in .png, .svg or .pdf" in line
    line = failed(monkeypatch, capsys, "x", *given, "--picture", "no-such/a.png")
    assert "there is no folder no-such; make it first" in line
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    line = failed(monkeypatch, capsys, "x", *given, "--picture", "a.png")
    assert "pip install 'affine-tensor[bench]'" in line


def test_a_wrong_command_line(text: Path, monkeypatch: Patch, capsys: Capture) -> None:
    given = ("x", "--text", str(text))
    for options in (
        ("--bits", "7"),
        ("--bits", "four"),
        ("--group-size", "64"),
        ("--context", "16", "--stride", "32"),
    ):
        assert run_main(monkeypatch, "eval", *given, *options) == 2
    assert run_main(monkeypatch, "eval", "x") == 2
    assert "--group-size goes with --bits" in capsys.readouterr().err


def test_unknown_tokens_are_told(
    text: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    loaded = models.load(str(SHIPPED))
    tokenizer = loaded.tokenizer
    often = tokenizer.encode("\n")[0]
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(often)
    assert tokenizer.unk_token_id == often
    monkeypatch.setattr(models, "load", lambda *_, **__: loaded)
    value_of = run_json(monkeypatch, capsys, str(SHIPPED), "--text", str(text))
    assert value_of["unknown_tokens"] > 0
    assert run_main(monkeypatch, "eval", str(SHIPPED), "--text", str(text)) == 0
    assert "the figures flatter the model" in capsys.readouterr().err


# ---- several values after a name -------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("m --bits 2 3 --json", "m --bits 2 --bits 3 --json"),
        ("--bits 2 3 m --text f", "--bits 2 --bits 3 m --text f"),
        ("m --text a b --bits 4", "m --text a --text b --bits 4"),
        ("--text a m", "--text a m"),  # the file is one, as MODEL is yet to come
        ("m --text a - b", "m --text a --text - --text b"),
        ("m --context 4 5", "m --context 4 5"),  # takes one: typer tells
        ("m --text=a b", "m --text=a b"),
        ("m --text a -- --bits 2 3", "m --text a -- --bits 2 3"),
        ("m --text", "m --text"),
    ],
)
def test_values_after_a_name(given: str, meant: str) -> None:
    command: Any = get_command(cli.app)
    params = command.commands["eval"].params
    assert many.spread(params, given.split()) == meant.split()
