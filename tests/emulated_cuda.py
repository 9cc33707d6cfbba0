"""CUDA's kernels on a CPU, behind the driver's functions: see tests/cuda_emulator.

Tensors on the CPU count as tensors on CUDA. Kernels are compiled by the host's compiler;
what the package does from the operator to the launch is what it does on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from affine_tensor import ops
from affine_tensor.kernels import cuda, settings, shaders
from affine_tensor.kernels.cuda import compiler, launch, library, plans

_HERE = Path(__file__).parent / "cuda_emulator"
_FLAGS = ("-std=c++17", "-O1", "-frounding-math", "-ffp-contract=off", "-fPIC")
_ENTRIES = {
    "gemv.cu": "affine_gemv",
    "mma.cu": "affine_mma",
    "matmul.cu": "affine_matmul",
}

COMPILER = shutil.which("g++") or shutil.which("clang++")

needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="there is no C++ compiler, which makes kernels for the CPU"
)


class Seen(ctypes.Structure):
    """What the last launch was given."""

    _fields_ = (
        ("launches", ctypes.c_long),
        ("grid", ctypes.c_int * 3),
        ("block", ctypes.c_int * 3),
        ("shared", ctypes.c_int),
        ("cluster", ctypes.c_int * 3),
        ("overlaps", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    )


@cache
def _folder() -> Path:
    base = os.environ.get("CUDA_EMULATOR_CACHE")
    path = Path(base) if base else Path(tempfile.gettempdir()) / "cuda_emulator"
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def _texts() -> bytes:
    files = sorted([*_HERE.iterdir(), *(shaders() / "cuda").iterdir()])
    return b"\0".join(file.read_bytes() for file in files if file.is_file())


@cache
def build(source: str, *flags: str) -> Path:
    """A library from a source beside this, kept by content with other temporary files."""
    parts = [_texts(), source.encode(), *(flag.encode() for flag in flags)]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    made = _folder() / f"{Path(source).stem}-{key}.so"
    if not made.exists():
        part = made.with_suffix(f".{os.getpid()}")
        folders = [f"-I{_HERE}", f"-I{shaders() / 'cuda'}"]
        command = [str(COMPILER), *_FLAGS, "-U_FORTIFY_SOURCE", "-shared", "-w"]
        command += [*folders, *flags, str(_HERE / source), "-ldl", "-o", str(part)]
        subprocess.run(command, check=True)
        part.rename(made)
    return made


def image(source: str, defines: compiler.Defines, capability: Any) -> bytes:
    """In place of `compiler.image`: the path of a library."""
    flags = [f"-D{name}={value}" for name, value in defines]
    flags.append(f'-DSOURCE="{source}"')
    if source in _ENTRIES:
        flags.append(f"-DENTRY={_ENTRIES[source]}")
    return bytes(build("kernel.cpp", *flags)) + b"\0"


class EmulatedCuda:
    """Within a test, CUDA's kernels run here, checked on first use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The emulator does not know Hopper's instructions for matrices.
        monkeypatch.setattr("affine_tensor.kernels.cuda.plans.MOST_WGMMA_ROWS", 0)
        path = build("driver.cpp")
        self.library = ctypes.CDLL(str(path))
        self._seen = Seen.in_dll(self.library, "seen")
        monkeypatch.setattr(launch, "_LIBRARY", str(path))
        monkeypatch.setattr(launch, "_launch", launch._first_launch)
        monkeypatch.setattr(launch, "_modules", {})
        monkeypatch.setattr(launch, "_allowed", {})
        monkeypatch.setattr(compiler, "image", image)
        monkeypatch.setattr(cuda, "_fast_empty", None)
        monkeypatch.setattr(ops, "device_of", lambda tensor: "cuda")
        # Instructions of Hopper's matrix unit are not emulated.
        monkeypatch.setattr(plans, "_takes_wgmma", lambda product: False)
        monkeypatch.setattr(settings, "strict", True)
        for name, value in {
            "available": True,
            "capability": (9, 0),
            "multiprocessors": 3,
            "shared_bytes": 232448,
            "device": torch.device("cpu"),
            "current_device": -1,  # what tensors on the CPU say
            "stream_of": 7,
            "capturing": False,
        }.items():
            monkeypatch.setattr(library, name, lambda *_, value=value: value)
        self.forget()

    def forget(self) -> None:
        """Drop all that belongs to this driver."""
        launch.driver.cache_clear()
        launch._context.cache_clear()
        cuda.reset()

    @property
    def launches(self) -> int:
        return int(self._seen.launches)

    @property
    def seen(self) -> Seen:
        return self._seen


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    device = EmulatedCuda(monkeypatch)
    yield device
    device.forget()
