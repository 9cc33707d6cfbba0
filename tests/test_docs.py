"""The examples of README.md and docs/, run as a reader would run them; and the site.

Each file is one session: its Python and shell blocks run in their order, in one namespace
and one temporary folder. Names of the Hub are served by the stand-in of hub_server.py,
which has the models of examples/ under them. In a file's comments, which no reader sees,

    <!-- not run: why -->       the block that follows is not run, and listed as skipped
    <!-- given: statements -->  are run first: what the reader has already
    <!-- prints -->             the block of text is what the block before it prints
    <!-- raises -->             the block of text is an error's, which stands in the source
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from hub_server import HubServer, only_loopback, use_hub
from safetensors.torch import load_file, save_file
from test_other_formats import awq, gptq
from torch import Tensor
from transformers import PreTrainedModel

import affine_tensor
from affine_tensor import AffineQuantizationConfig, AffineQuantizedTensor, cli, ops
from affine_tensor.kernels import settings

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DENSE, PACKED = ROOT / "examples/stdlib-6m", ROOT / "examples/stdlib-6m-4bit"

LAYERS = 2  # of seven: what is compiled or calibrated here

# What stands under these names on the stand-in: a folder, or what `hub` makes.
HUB: dict[str, Path | str] = {
    "mlx-community/Llama-3.2-1B-Instruct-4bit": PACKED,
    "mlx-community/Qwen3-0.6B-4bit": "mlx",
    "mlx-community/Qwen3-30B-A3B-4bit": "mlx",
    "org/dense-model": "dense",
    "org/name": "mlx",
    "org/model-gptq": "gptq",
    "org/model-awq": "awq",
}


# ---- what the files hold ---------------------------------------------------------


@dataclass
class Block:
    """A fenced block, and what the comments before it say."""

    file: Path
    line: int  # of its first line of text
    language: str
    text: str
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


_START = re.compile(r"^(<!-- |`{3,})", re.MULTILINE)
_PART = re.compile(
    r"^<!-- (?P<note>not run|given|prints|raises|command)(?:: *(?P<said>.*?))? *-->$"
    r"|^(?P<fence>`{3,})(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


def blocks(file: Path) -> list[Block]:
    """The fenced blocks of a file, in order."""
    text = file.read_text(encoding="utf-8")
    found: list[Block] = []
    notes: dict[str, str] = {}
    at = 0
    while match := _START.search(text, at):
        part = _PART.match(text, match.start())
        if part is None:  # some other comment
            at = match.end()
            continue
        between = text[at : match.start()]
        if between.strip():
            assert not notes, f"{file.name}: no block follows {notes} at once"
        at = part.end()
        if part["note"]:
            assert part["note"] not in notes, f"{file.name}: twice {part['note']}"
            notes[part["note"]] = part["said"] or ""
            continue
        line = text.count("\n", 0, part.start("text")) + 1
        found.append(Block(file, line, part["language"], part["text"], notes))
        notes = {}
    assert not notes, f"{file.name}: no block follows {notes}"
    return found


ALL = {file: blocks(file) for file in FILES}
NOT_RUN = [
    block
    for own in ALL.values()
    for block in own
    if block.notes.keys() & {"not run", "command"}
]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    kinds = {"python", "bash", "json", "text"}
    others = [f"{b}: {b.language!r}" for own in ALL.values() for b in own]
    others = [one for one in others if one.split("'")[1] not in kinds]
    assert not others
    loose = [
        str(block)
        for own in ALL.values()
        for block in own
        if block.language == "text" and not block.notes
    ]
    assert not loose, "texts that nothing checks"


# ---- running them ----------------------------------------------------------------


class Session:
    """One file's blocks, run one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.monkeypatch = monkeypatch
        self.printed: str | None = None

    def run(self, block: Block) -> None:
        if "given" in block.notes:
            self._python(block.notes["given"], block.file, block.line)
        if block.language == "json":
            json.loads(block.text)
        elif "prints" in block.notes:
            assert self.printed is not None, f"{block}: nothing was run before it"
            assert self.printed.split() == block.text.split(), (
                f"{block}: printed was\n{self.printed}"
            )
        elif block.language in ("python", "bash"):
            run = self._python if block.language == "python" else self._shell
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                run(block.text, block.file, block.line)
            self.printed = printed.getvalue()

    def _python(self, text: str, file: Path, line: int) -> None:
        # At its own lines, for the traceback.
        code = compile("\n" * (line - 1) + text, str(file), "exec")
        exec(code, self.names)

    def _shell(self, text: str, file: Path, line: int) -> None:
        for command in text.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words:
                self._command(words, f"{file.name}: {command}")

    def _command(self, words: list[str], shown: str) -> None:
        if words[0] == "affine-tensor":
            self._main(words[1:], shown)
        elif words[:3] == ["python", "-m", "affine_tensor.doctor"]:
            from affine_tensor import doctor

            assert doctor.main(words[3:]) == 0, shown
        elif words[0] == "python" and (ROOT / words[1]).is_file():
            done = subprocess.run(
                [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{shown}\n{done.stderr[-2000:]}"
            print(done.stdout)
        else:
            pytest.fail(f"{shown}: run it here, or mark it")

    def _main(self, arguments: list[str], shown: str) -> None:
        """The script, in this process, which saves seconds of imports."""
        logger = logging.getLogger("affine_tensor")
        level = logger.level
        with self.monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            stack.callback(logger.setLevel, level)
            patch.setattr(sys, "argv", ["affine-tensor", *arguments])
            patch.setattr(cli, "calm", lambda: None)  # this process stays as it is
            errors = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            with pytest.raises(SystemExit) as caught:
                cli.main()
        assert not caught.value.code, f"{shown}\n{errors.getvalue()[-2000:]}"


def _cut(source: Path, folder: Path) -> Path:
    """The first layers of a model of examples/."""
    folder.mkdir()
    later = re.compile(r"model\.layers\.(\d+)\.")
    tensors = {
        name: value
        for name, value in load_file(source / "model.safetensors").items()
        if not (found := later.match(name)) or int(found[1]) < LAYERS
    }
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    config["layer_types"] = config["layer_types"][:LAYERS]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def _quantized(
    dense: Path,
    folder: Path,
    settings: dict[str, Any],
    pack: Callable[[Tensor, Tensor], tuple[dict[str, Tensor], Tensor]],
) -> Path:
    """The dense model in another format: its Linear modules but the head."""
    shutil.copytree(dense, folder)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = value
            continue
        groups = torch.arange(value.shape[1]) // 64
        parts, _ = pack(value.float(), groups)
        tensors |= {f"{module}.{own}": part for own, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": 64, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": False}
_AWQ = {"quant_method": "awq", "zero_point": True, "version": "gemm"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    folder = tmp_path_factory.mktemp("hub")
    dense = _cut(DENSE, folder / "dense")
    made: dict[Any, Path] = {
        "dense": dense,
        "mlx": _cut(PACKED, folder / "mlx"),
        "gptq": _quantized(dense, folder / "gptq", _GPTQ, gptq),
        "awq": _quantized(dense, folder / "awq", _AWQ, awq),
    }
    with HubServer({name: made.get(own, own) for name, own in HUB.items()}) as server:
        yield server


@pytest.fixture
def session(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    use_hub(monkeypatch, hub)
    only_loopback(monkeypatch)
    monkeypatch.chdir(tmp_path)
    # register() exchanges it for good.
    stock = PreTrainedModel.__dict__["from_pretrained"]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", stock)
    # So does what a page registers for a device.
    for op, kernels in ops._kernels.items():
        monkeypatch.setitem(ops._kernels, op, dict(kernels))
    for name, value in vars(settings).items():
        monkeypatch.setattr(settings, name, value)
    # Graphs are captured, by which the examples stand or fall; C++ is not made of them.
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **own: compile_(*args, **own, backend="eager")
    )
    return Session(monkeypatch)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_examples_run(file: Path, session: Session) -> None:
    for block in ALL[file]:
        if not block.notes.keys() & {"not run", "command"}:
            session.run(block)


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_examples_that_are_not_run_here(block: Block) -> None:
    reason = block.notes.get("not run") or ""
    if "command" in block.notes:
        script = (ROOT / ".ci/run").read_text()
        assert block.notes["command"] in script
        reason = ".ci/run runs it"
    assert reason, f"{block}: say why it is not run"
    for file in re.findall(r"(?:tests|benchmarks)/\w+\.py", reason):
        assert (ROOT / file).is_file(), f"{block}: there is no {file}"
    if block.language == "python":
        compile(block.text, str(block), "exec")
    pytest.skip(f"{block}: {reason}")


# ---- errors that are quoted ------------------------------------------------------


def _template(node: ast.expr) -> str:
    """A text as the source has it; NUL stands for each value that is put into it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "\0"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "\0"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All texts in the package, with their line breaks as spaces."""
    found = []
    for file in sorted((ROOT / "affine_tensor").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                found.append(" ".join(_template(node).replace("%s", "\0").split()))
    return found


QUOTED = [b for own in ALL.values() for b in own if "raises" in b.notes]


def _pattern(block: Block) -> re.Pattern[str]:
    parts = " ".join(block.text.split()).split("…")
    assert max(map(len, parts)) > 15, f"{block}: too little to find it by"
    # A value may be anything but the text around it.
    return re.compile(".*?".join(re.escape(part.strip(" ")) for part in parts))


@pytest.mark.parametrize("block", QUOTED, ids=str)
def test_quoted_errors_stand_in_the_source(block: Block, texts: list[str]) -> None:
    """`…` is a value that the error puts there, or more of the text."""
    wanted = _pattern(block)
    assert any(wanted.search(text) for text in texts), block.text


def test_an_error_that_is_not_in_the_source_is_noticed(texts: list[str]) -> None:
    file = Path("errors.md")
    right = Block(file, 1, "text", "… is dense: there is nothing to dequantize. …")
    wrong = Block(file, 1, "text", "… is dense: there is nothing to quantize. …")
    test_quoted_errors_stand_in_the_source(right, texts)
    with pytest.raises(AssertionError):
        test_quoted_errors_stand_in_the_source(wrong, texts)


def _mistakes(folder: Path) -> dict[str, Callable[[], object]]:
    """What readers of the page may have done, and a part of what they are told."""
    weight = AffineQuantizedTensor.from_dense(torch.ones(32, 64))
    layer = torch.nn.Linear(64, 32)
    broken = shutil.copytree(PACKED, folder / "broken")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-100])
    load = affine_tensor.from_pretrained
    dequantizes = AffineQuantizationConfig(dequantize=True)
    bad = torch.full((32, 64), torch.nan)
    return {
        "neither a folder": lambda: load(folder / "nowhere"),
        "not in MLX format": lambda: load(DENSE),
        "nothing to dequantize": lambda: load(DENSE, quantization_config=dequantizes),
        "its header describes": lambda: load(broken),
        "does not fit the model": lambda: affine_tensor.load_checkpoint_(layer, PACKED),
        "of no use": lambda: affine_tensor.convert(
            PACKED, folder / "new", modules_to_not_convert=["lm_head"]
        ),
        "there is no model": lambda: load(DENSE.parent),
        "neither an argument": lambda: load(PACKED, devicemap="cpu"),
        "cannot be quantized": lambda: affine_tensor.layout.quantize(
            torch.ones(4, 60), bits=4, group_size=64
        ),
        "only finite weights": lambda: AffineQuantizedTensor.from_dense(bad),
        "they must agree": lambda: F.linear(torch.ones(2, 64).half(), weight),
        "changed in place": lambda: weight.add_(1),
        ".data of": lambda: setattr(weight, "data", torch.ones(32, 64)),
        "pass overwrite": lambda: affine_tensor.save_checkpoint(layer, folder),
        "no dense memory": lambda: weight.numpy(),
    }


def test_what_goes_wrong_is_told_in_the_words_of_the_page(tmp_path: Path) -> None:
    patterns = [_pattern(block) for block in QUOTED]
    for told, mistake in _mistakes(tmp_path).items():
        with pytest.raises(Exception, match=re.escape(told)) as caught:
            mistake()
        text = " ".join(str(caught.value).split())
        assert any(pattern.search(text) for pattern in patterns), text


# ---- names -----------------------------------------------------------------------


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs/api.md").read_text()
    shown = re.findall(r"^::: affine_tensor\.(\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(affine_tensor.__all__)


def test_environment_variables_are_all_told() -> None:
    used: set[str] = set()
    for file in (ROOT / "affine_tensor").rglob("*.py"):
        # Not _AFFINE_TENSOR_COMPLETE, which shells and typer keep between them.
        used |= set(re.findall(r"(?<!_)AFFINE_TENSOR_[A-Z_]+", file.read_text()))
    told = set()
    for file in (ROOT / "docs").glob("*.md"):
        told |= set(re.findall(r"AFFINE_TENSOR_[A-Z_]+", file.read_text()))
    assert told == used


def test_options_of_commands_are_all_told() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    group: Any = typer.main.get_command(cli.app)
    for command in group.commands.values():
        for parameter in command.params:
            names = [name for name in parameter.opts if name.startswith("--")]
            told = [name for name in names if re.search(rf"{name}\b", text)]
            assert told or not names, f"{command.name}: {names}"


def test_links_to_files_of_the_repository_lead_somewhere() -> None:
    for file in FILES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


# ---- the site --------------------------------------------------------------------


class _Assets(HTMLParser):
    """What a page loads by itself: not what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        if tag == "link" and own.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(own.get("href", ""))
        if tag != "a":
            self.found += [own[n] for n in ("src", "srcset", "poster") if n in own]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site needs affine-tensor[docs]")
    pytest.importorskip("mkdocstrings", reason="the site needs affine-tensor[docs]")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_built_and_all_pages_are_in_it(site: Path) -> None:
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")}
    assert pages <= {file.stem for file in site.glob("*.html")}
    names = (site / "api.html").read_text()
    assert all(f'id="affine_tensor.{n}"' in names for n in affine_tensor.__all__)
    index = json.loads((site / "search/search_index.json").read_text())
    assert any("doctor" in one["text"] for one in index["docs"])


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assets = _Assets()
        assets.feed(page.read_text())
        assert assets.found
        elsewhere = [a for a in assets.found if re.match(r"(\w+:)?//", a)]
        assert not elsewhere, page.name
    for sheet in site.rglob("*.css"):
        loaded = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", sheet.read_text())
        assert not [one for one in loaded if re.match(r"(https?:)?//", one)], sheet.name


def test_the_site_is_not_in_git() -> None:
    assert "site/" in (ROOT / ".gitignore").read_text().splitlines()
