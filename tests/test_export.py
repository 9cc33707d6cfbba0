"""torch.export and AOTInductor: programs of modules with packed weights, and their files.

A file is loaded by a process that has imported affine_tensor. What one says that has not
is pinned here too.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn
from test_compile import (
    Block,
    has_compiler,
    needs_compiler,
    ours,
    packed_linear,
    products,
)
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from affine_tensor import AffineQuantizedTensor, footprint

pytestmark = [
    pytest.mark.usefixtures("no_fallback"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


class Model(nn.Module):
    """All kinds of packed weights; the head is the embedding, or a copy of it."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 64)
        self.embedding.weight = nn.Parameter(make(48, 64))
        self.positions = nn.Parameter(make(32, 64, seed=1))
        self.linear = packed_linear(64, 64, permuted=True, seed=2)
        self.experts = nn.Parameter(make(3, 64, 64, seed=3))  # [E, out, in]
        self.head = nn.Linear(64, 48, bias=False)
        own = nn.Parameter(make(48, 64))
        self.head.weight = self.embedding.weight if tied else own

    def forward(self, ids: Tensor) -> Tensor:  # [B, S]
        length = ids.shape[1]
        x = self.embedding(ids) + self.positions[:length].dequantize()
        rows = self.linear(x).relu().flatten(0, 1)
        ends = (torch.arange(1, 4) * rows.shape[0] // 3).int()
        y = F.grouped_mm(rows, self.experts.mT, offs=ends)
        return self.head(x + y.view_as(x))


IDS = torch.tensor([[1, 2, 47], [0, 5, 5]])
# Other batches and lengths than the program was made with.
MORE_IDS = [torch.arange(4 * n).view(4, n) % 48 for n in (2, 3, 11)]
SHAPES = ({0: Dim("batch"), 1: Dim("length", max=32)},)


def exported(model: nn.Module, strict: bool = False) -> ExportedProgram:
    return export(model, (IDS,), dynamic_shapes=SHAPES, strict=strict)


def reloaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def operators(program: ExportedProgram) -> Counter[str]:
    calls = (n for n in program.graph.nodes if n.op == "call_function")
    return Counter(str(node.target) for node in calls)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def assert_same(program: ExportedProgram, model: nn.Module) -> None:
    module = program.module()
    for ids in MORE_IDS:
        torch.testing.assert_close(module(ids), model(ids))


# ---- programs --------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_says_what_the_model_says(strict: bool, model: Model) -> None:
    program = exported(model, strict)
    assert operators(program)["aten.linear.default"] == 2
    assert not ours(operators(program)).keys() - {"dequantize.default"}
    assert_same(program, model)
    assert_same(reloaded(program), model)
    lowered = program.run_decompositions()
    assert ours(operators(lowered)) == {
        "embedding.default": 1,
        "dequantize.default": 1,
        "linear.default": 2,
        "grouped_linear.default": 1,
    }
    assert not products(operators(lowered))
    assert_same(lowered, model)
    assert_same(reloaded(lowered), model)


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_holds_the_packed_weights(strict: bool, model: Model) -> None:
    program = exported(model, strict)
    packed = {k for k, v in program.state_dict.items() if hasattr(v, "packed")}
    assert packed == {
        "embedding.weight",
        "positions",
        "linear.weight",
        "experts",
        "head.weight",
    }
    for name, own in model.state_dict().items():  # the same memory
        assert program.state_dict[name].data_ptr() == own.data_ptr()

    # Taken apart, it holds the parts: those of tied weights once.
    parts = dict(program.run_decompositions().state_dict)
    if strict:  # torch leaves the other name of a tied weight where it was
        assert isinstance(parts.pop("head.weight"), AffineQuantizedTensor)
    assert not any(isinstance(v, AffineQuantizedTensor) for v in parts.values())
    assert {k for k, v in parts.items() if v.requires_grad} == {"linear.bias"}
    words = {
        p.data_ptr(): tuple(p.shape)
        for p in parts.values()
        if not p.is_floating_point()
    }
    assert sorted(words.values()) == [
        (3, 64, 8),
        (32, 8),
        (48, 8),
        (64,),  # the permutation
        (64, 8),
    ]


def test_exporting_changes_no_model(model: Model) -> None:
    before = dict(model.named_parameters())
    exported(model).run_decompositions()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is own for name, own in before.items())
    assert type(model.linear) is nn.Linear


def test_a_program_takes_other_weights() -> None:
    block, other = Block(), Block(seed=5)
    x = randn(3, 64)
    module = reloaded(export(block, (x,))).module()
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(x), other(x))


def test_a_program_trains() -> None:
    block, x = Block(), randn(3, 64)
    module = export(block, (x,)).module()
    got = torch.autograd.grad(module(x).sum(), module.get_parameter("up.bias"))
    want = torch.autograd.grad(block(x).sum(), block.up.bias)
    torch.testing.assert_close(got, want)


def test_a_file_is_as_small_as_the_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(512, 512), nn.Linear(512, 512, bias=False))
    model[1].weight = model[0].weight = nn.Parameter(make(512, 512))
    program = export(model, (IDS,))
    sizes = []
    for each in (program, program.run_decompositions()):
        torch.export.save(each, tmp_path / "saved.pt2")
        sizes.append((tmp_path / "saved.pt2").stat().st_size)
    whole = footprint(model).bytes
    assert sizes[1] < whole + 2**15
    assert sizes[0] < 2 * whole + 2**15  # torch writes tensors of this kind by name


# ---- files, in other processes ---------------------------------------------------

FILES = ["compiled", "lowered", "whole-False", "whole-True"]
LOAD = """
import sys, torch
{first}
folder = sys.argv[1]
batches, wanted = torch.load(folder + "/wanted.pt")
for name in sys.argv[2:]:
    path = f"{{folder}}/{{name}}.pt2"
    try:
        if name == "compiled":
            call = torch._inductor.aoti_load_package(path)
        else:
            call = torch.export.load(path).module()
        with torch.no_grad():
            for ids, want in zip(batches, wanted):
                torch.testing.assert_close(call(ids), want)
        print(name, "runs", flush=True)
    except Exception as error:
        print(name, type(error).__name__, *str(error).split(), flush=True)
"""


def in_another_process(first: str, folder: Path) -> tuple[dict[str, str], str]:
    """What became of each file, and what was logged."""
    code = LOAD.format(first=first)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *FILES],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (line.split(" ", 1) for line in done.stdout.splitlines())
    return dict(lines), done.stderr


def _compile_ahead_of_time(kind: str, path: str) -> None:
    if kind == "packed":
        model: nn.Module = Model()
        shapes, batches = SHAPES, MORE_IDS
    else:
        model = nn.Sequential(nn.Embedding(48, 64), nn.Linear(64, 6))
        shapes, batches = None, [IDS]
    quick = {
        "cpp.simdlen": 1,
        "cpp_cache_precompile_headers": False,  # for one use
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    with torch.no_grad(), torch._inductor.config.patch(quick):
        program = export(model, (IDS,), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=path)
        loaded = torch._inductor.aoti_load_package(package)
        for ids in batches:
            torch.testing.assert_close(loaded(ids), model(ids))


def _exit_code_of_compiling(kind: str, path: Path) -> int | None:
    """In a process of its own: some builds of torch crash when they load a package."""
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=_compile_ahead_of_time, args=(kind, str(path)))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds FILES, and what they are to give."""
    folder = tmp_path_factory.mktemp("programs")
    with torch.no_grad():
        wanted = [model(ids) for ids in MORE_IDS]
        torch.save((MORE_IDS, wanted), folder / "wanted.pt")
        for strict in (False, True):
            program = exported(model, strict)
            torch.export.save(program, folder / f"whole-{strict}.pt2")
        lowered = exported(model).run_decompositions()
        torch.export.save(lowered, folder / "lowered.pt2")
    if has_compiler():
        code = _exit_code_of_compiling("packed", folder / "compiled.pt2")
        if code and _exit_code_of_compiling("dense", folder / "dense.pt2"):
            (folder / "no-inductor").touch()
    return folder


@pytest.fixture
def inductor(folder: Path) -> None:
    if (folder / "no-inductor").exists():
        pytest.skip("this torch does not load what it made of a dense nn.Linear")


@pytest.fixture(scope="module")
def importing(folder: Path) -> tuple[dict[str, str], str]:
    return in_another_process("import affine_tensor", folder)


@pytest.fixture(scope="module")
def ignorant(folder: Path) -> tuple[dict[str, str], str]:
    return in_another_process("", folder)


@pytest.mark.parametrize("name", ["lowered", "whole-False", "whole-True"])
def test_programs_run_in_another_process(name: str, importing: Any) -> None:
    assert importing[0][name] == "runs"


def test_a_program_of_operators_does_not_find_them_by_itself(ignorant: Any) -> None:
    found, logged = ignorant
    assert found["lowered"].startswith("RuntimeError We ran into an error when deser")
    assert "failed to resolve torch.ops.affine_tensor.embedding.default" in logged
    assert "Please import the custom op to register it" in logged


def test_a_program_with_tensors_of_ours_imports_the_package(ignorant: Any) -> None:
    assert ignorant[0]["whole-True"] == "runs"


@needs_compiler
@pytest.mark.usefixtures("inductor")
def test_a_package_of_aotinductor_runs_in_another_process(importing: Any) -> None:
    assert importing[0]["compiled"] == "runs"


@needs_compiler
@pytest.mark.usefixtures("inductor")
def test_a_package_of_aotinductor_does_not_find_operators(ignorant: Any) -> None:
    said = "RuntimeError Could not find schema for affine_tensor::"
    assert ignorant[0]["compiled"].startswith(said)
