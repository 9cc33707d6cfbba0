"""Compiles product kernels for the CPU, and runs a plan on tensors."""

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

import torch
from torch import Tensor

from affine_tensor.kernels import shaders
from affine_tensor.kernels.cuda.plans import Plan

_HERE = Path(__file__).parent


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _folder() -> Path:
    base = os.environ.get("CUDA_EMULATOR_CACHE")
    path = Path(base) if base else Path(tempfile.gettempdir()) / "cuda_emulator"
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def _texts() -> bytes:
    files = [*_HERE.glob("*.h"), *_HERE.glob("*.cpp"), *(shaders() / "cuda").iterdir()]
    return b"\0".join(file.read_bytes() for file in sorted(files) if file.is_file())


@cache
def build(source: str, entry: str, defines: tuple[tuple[str, int], ...]) -> Any:
    """The library of one kernel. Kept by content, in the folder of temporary files."""
    flags = [f"-D{name}={value}" for name, value in defines]
    flags += [f'-DSOURCE="{source}"', f"-DENTRY={entry}"]
    key = hashlib.sha256(_texts() + " ".join(flags).encode()).hexdigest()[:20]
    made = _folder() / f"{key}.so"
    if not made.exists():
        name = compiler()
        assert name is not None
        part = made.with_suffix(f".{os.getpid()}")
        command = [name, "-O1", "-std=c++17", "-shared", "-fPIC", "-w"]
        command += ["-U_FORTIFY_SOURCE", "-ffp-contract=off"]
        command += [f"-I{_HERE}", f"-I{shaders() / 'cuda'}", *flags]
        command += [str(_HERE / "product.cpp"), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        part.rename(made)
    library = ctypes.CDLL(str(made))
    library.run.restype = ctypes.c_char_p
    return library.run


class _Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("z", ctypes.c_int))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", _Index),
        ("threads", ctypes.c_int),
        ("shared", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("order", ctypes.c_uint),
        ("late", ctypes.c_bool),
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("packed", ctypes.c_void_p),
        ("packed_stride", ctypes.c_longlong),
        ("scales", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("scale_stride", ctypes.c_longlong),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("packed_expert", ctypes.c_longlong),
        ("scale_expert", ctypes.c_longlong),
        ("experts", ctypes.c_void_p),
        ("e", ctypes.c_int),
    )


def _alignments(plan: Plan, x: Tensor, scales: Tensor) -> tuple[int, ...]:
    """What the plan counts on, and no more."""
    own = dict(plan.defines)
    item = x.element_size()
    of_x = 16 if own.get("X_ALIGNED") else item
    of_scales = own.get("SCALE_BYTES", scales.element_size())
    return of_x, 16 if own["ALIGNED"] else 4, of_scales, of_scales, item, item, 8


class EmulatorError(RuntimeError):
    """A kernel did what would be undefined on a GPU."""


def run(
    plan: Plan,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    *,
    order: int = 0,
    late: bool = False,
    rows: int | None = None,
) -> Tensor:
    """x ``[M, K]`` times W, ``[M, N]``, by the kernel of a plan; or x @ W.

    Buffers end where their memory ends, or as near as what the plan takes their alignment
    to be allows. order: of the threads (0 forward, 1 backward, else random). late: copies
    happen when they are waited for. rows: that W is said to have.
    """
    m, n = len(x), rows or packed.shape[-2]
    k = scales.shape[-1] * dict(plan.defines)["GROUP"]
    columns = k if plan.entry == "affine_matmul" else n
    y = torch.full((m, columns), float("nan"), dtype=x.dtype)
    tensors = (x, packed, scales, biases, bias, y, experts)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    sizes = [
        0
        if t is None
        else sum((s - 1) * d for s, d in zip(t.shape, t.stride(), strict=True))
        * t.element_size()
        + t.element_size()
        for t in tensors
    ]
    lead = packed.dim() == 3
    arguments = _Arguments(
        addresses[0],
        x.stride(0),
        addresses[1],
        packed.stride(-2),
        addresses[2],
        addresses[3],
        scales.stride(-2),
        addresses[4],
        addresses[5],
        m,
        n,
        k,
        packed.stride(0) if lead else 0,
        scales.stride(0) if lead else 0,
        addresses[6],
        packed.shape[0] if lead else 0,
    )
    how = _Launch(
        _Index(*plan.grid), plan.block[0], plan.shared, plan.cluster[1], order, late
    )
    longs = ctypes.c_longlong * 7
    alignments = longs(*_alignments(plan, x, scales))
    function = build(plan.source, plan.entry, plan.defines)
    fault = function(
        ctypes.byref(how), ctypes.byref(arguments), longs(*sizes), alignments
    )
    if fault:
        raise EmulatorError(f"{plan.entry}: {fault.decode()}; {plan.defines}")
    return y
