"""Every compiler that is here finds the same, the one in the ziglang wheel included."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from metal_emulator import compilers

# Each needs something else of a compiler: guards and lines, its check of bounds, its
# check of alignment, its calls at every access.
PLANTS = ["read past the end", "array of a thread", "misaligned vector load"]
PLANTS += ["simdgroup's barrier for a threadgroup's"]
COMMANDS = {
    "clang++": "clang++",
    "g++": "g++",
    "ziglang": f"{sys.executable} -m ziglang c++",
}


def is_here(name: str) -> bool:
    if name == "ziglang":
        return importlib.util.find_spec("ziglang") is not None
    return shutil.which(name) is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_a_compiler(name: str) -> None:
    if not is_here(name):
        pytest.skip(f"{name} is not installed")
    test = "test_bugs.py::test_planted_bug_is_found_and_its_clean_twin_passes"
    chosen = [f"{test}[{plant}]" for plant in PLANTS]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen],
        cwd=Path(__file__).parent,
        env={**os.environ, "METAL_EMULATOR_CXX": COMMANDS[name]},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert f"{len(PLANTS)} passed" in result.stdout


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAL_EMULATOR_CXX", "no-such-compiler")
    compilers.find_compiler.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="pip install ziglang"):
            compilers.find_compiler()
    finally:
        compilers.find_compiler.cache_clear()
