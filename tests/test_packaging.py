"""The wheel and the editable install carry all that the package needs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import affine_tensor
from affine_tensor.kernels import shaders

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p.relative_to(ROOT) for p in (ROOT / "shaders").rglob("*.*"))


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_its_shaders_and_the_typing_marker(
    unpacked_wheel: Path,
) -> None:
    held = {p.relative_to(unpacked_wheel).as_posix() for p in unpacked_wheel.rglob("*")}
    package = {
        p.relative_to(ROOT).as_posix() for p in ROOT.glob("affine_tensor/**/*.py")
    }
    assert package | {"affine_tensor/py.typed"} <= held
    assert {f"affine_tensor/{source.as_posix()}" for source in SOURCES} <= held
    assert not any(name.startswith(("tests", "examples", "shaders")) for name in held)


def test_the_wheel_works_without_the_checkout(
    unpacked_wheel: Path, tmp_path: Path
) -> None:
    program = (
        "import affine_tensor, torch; from affine_tensor.kernels import shaders; "
        "layer = torch.nn.Linear(64, 8); affine_tensor.quantize_(layer); "
        "print(affine_tensor.__file__); print(shaders()); print(layer.weight.bits)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked_wheel)},
        capture_output=True,
        text=True,
        check=True,
    )
    module, sources, bits = done.stdout.split()
    assert Path(module).is_relative_to(unpacked_wheel)
    assert Path(sources) == unpacked_wheel / "affine_tensor" / "shaders"
    assert bits == "4"


def test_the_wheel_has_the_command_line(unpacked_wheel: Path) -> None:
    (scripts,) = unpacked_wheel.glob("*.dist-info/entry_points.txt")
    lines = scripts.read_text().split("\n")
    assert "affine-tensor = affine_tensor.cli:main" in lines
    assert (unpacked_wheel / "affine_tensor" / "__main__.py").is_file()


def test_a_checkout_reads_the_shaders_beside_the_package() -> None:
    if not Path(affine_tensor.__file__).is_relative_to(ROOT):
        pytest.skip("the package under test is an installed wheel, not this checkout")
    assert shaders() == ROOT / "shaders"


def test_the_version_is_one() -> None:
    assert version("affine-tensor") == affine_tensor.__version__


def test_what_the_package_imports_is_declared() -> None:
    """No import of a package that pyproject.toml does not name; of an extra only in the
    command line, which says what is missing."""
    always, extras = set(), set()
    for requirement in distribution("affine-tensor").requires or []:
        name = re.split(r"[^\w-]", requirement)[0].replace("-", "_")
        (extras if "extra ==" in requirement else always).add(name)
    for file in ROOT.glob("affine_tensor/**/*.py"):
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module)
        roots = {name.split(".")[0] for name in imported}
        allowed = always | extras if file.parent.name == "cli" else always
        assert roots - sys.stdlib_module_names <= allowed, file


SCRIPT = Path(sys.executable).with_name("affine-tensor")


@pytest.mark.skipif(not SCRIPT.exists(), reason=f"{SCRIPT} is not installed")
@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"]], ids=str)
def test_the_script_helps_without_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [str(SCRIPT), *arguments],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "affine_tensor.cli.convert" in imported
    assert not imported & {"torch", "transformers", "numpy"}
    assert "Usage: affine-tensor" in done.stdout


def test_the_script_has_all_that_the_package_has(tmp_path: Path) -> None:
    program = """
import sys, affine_tensor
assert "torch" not in sys.modules
assert callable(affine_tensor._rebuild)
assert "torch" in sys.modules
for name in affine_tensor.__all__:
    assert getattr(affine_tensor, name) is not None
assert set(affine_tensor.__all__) <= set(dir(affine_tensor))
"""
    (tmp_path / "affine-tensor").write_text(program)
    subprocess.run([sys.executable, str(tmp_path / "affine-tensor")], check=True)


def test_an_import_brings_the_operators() -> None:
    program = "import torch, affine_tensor; torch.ops.affine_tensor.linear"
    subprocess.run([sys.executable, "-c", program], check=True)
