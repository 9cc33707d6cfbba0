"""Compiled functions for each format, checked on first use, on torch's own threads."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import layout, ops
from ...tensor import log_once, logger
from .. import KernelError, settings
from . import compiler

Function = Callable[..., int]

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

_WORDS = (torch.int32, torch.uint32)

# What functions return when all went well. Other codes are those of each source.
DONE = 0

# ctypes' names, for lists of arguments.
POINTER, INDEX, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

# How inputs are multiplied; shaders/cpu/codes.h says more.
BFLOAT16, ONE_PLANE, TWO_PLANES = 0, 1, 2

_lock = threading.RLock()
_functions: dict[Any, Function | None] = {}
_alone = False  # in a forked process, whose parent's threads are not there


@ops.usable_if("cpu")
def available() -> bool:
    """Whether kernels are wanted, and there is what compiles them for this CPU."""
    try:
        return settings.cpu_backend == "own" and compiler.find().vectors is not None
    except KernelError:
        return False


def kind(bits: int, dtype: torch.dtype) -> int:
    """How inputs of a dtype are multiplied on this CPU."""
    if dtype == torch.float32:
        return TWO_PLANES
    # bfloat16 holds 128 + code for seven bits at most.
    if dtype == torch.bfloat16 and bits < 8 and _multiplies_bfloat16():
        return BFLOAT16
    return ONE_PLANE


def _multiplies_bfloat16() -> bool:
    try:
        return compiler.find().multiplies_bfloat16
    except KernelError:  # which `function` tells
        return False


def threads() -> int:
    """How many threads torch would use here."""
    return 1 if _alone else torch.get_num_threads()


def _after_fork() -> None:
    # Those that the runtime started in the parent do not exist here, and it would wait
    # for them.
    global _alone, _lock
    _alone = True
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def function(
    source: str,
    name: str,
    arguments: tuple[Any, ...],
    check: Callable[[Function], str | None],
    **defines: int,
) -> Function | None:
    """A function of a source for one format, or None where it cannot be used.

    On first use `check` runs it and says what is wrong, if anything. Why there is none is
    logged, once, or raised as KernelError with ``settings.strict``.
    """
    key = (source, name, *defines.values())
    with _lock:
        if key not in _functions or (settings.strict and not _functions[key]):
            _functions[key] = _made(source, name, arguments, check, defines)
        return _functions[key]


def _made(
    source: str,
    name: str,
    arguments: tuple[Any, ...],
    check: Callable[[Function], str | None],
    defines: dict[str, int],
) -> Function | None:
    try:
        if compiler.find().vectors is None:
            raise KernelError("this CPU has none of AVX-512, AVX2 and NEON")
        library = compiler.library(source, **defines)
        _hand_over_threads(library)
        made = getattr(library, name)
        made.argtypes, made.restype = arguments, ctypes.c_int
        wrong = check(made)
        if wrong:
            form = ", ".join(f"{key}={value}" for key, value in defines.items())
            raise KernelError(f"{name} ({form}) computes something else: {wrong}")
        logger.debug("compiled %s of %s for %s", name, source, defines)
        return made
    except KernelError as error:
        if settings.strict:
            raise
        log_once(
            f"cpu {error}",
            "the CPU's kernels are not used, weights are dequantized instead: %s",
            error,
        )
        return None


def _hand_over_threads(library: ctypes.CDLL) -> None:
    library.affine_runtime.argtypes = [ctypes.c_void_p] * 4
    library.affine_runtime.restype = None
    library.affine_runtime(*_runtime())


@cache
def _runtime() -> tuple[int | None, ...]:
    """Entry points of the OpenMP runtime that torch has loaded: GNU's, or LLVM's."""
    names = ("GOMP_parallel", "__kmpc_fork_call", "__kmpc_push_num_threads")
    for loaded in _loaded():
        found = [_address(loaded, n) for n in (*names, "__kmpc_global_thread_num")]
        if found[0]:
            return found[0], None, None, None
        if all(found[1:]):
            return tuple(found)
    if torch.get_num_threads() > 1:
        log_once(
            "cpu threads",
            "the CPU's kernels run on one thread: torch's OpenMP runtime is not found",
        )
    return None, None, None, None


def _loaded() -> list[ctypes.CDLL]:
    """What this process has: all that is global, then torch's runtime by its file."""
    found = [ctypes.CDLL(None)]
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    for name in sorted(os.listdir(folder)):
        if name.startswith(("libgomp", "libomp", "libiomp5")):
            found.append(ctypes.CDLL(os.path.join(folder, name)))
    return found


def _address(library: ctypes.CDLL, name: str) -> int | None:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        return None


def served(
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    permutation: Tensor | None,
    columns: int,
) -> bool:
    """Whether functions read these operands as what they are.

    They are given addresses: what lies on another device, or has another dtype or number
    of columns, the reference is to refuse or to convert.
    """
    return (
        packed.is_cpu
        and scales.is_cpu
        and biases.is_cpu
        and packed.dtype in _WORDS
        and scales.dtype in layout.WEIGHT_DTYPES
        and biases.dtype is scales.dtype
        and (
            permutation is None
            or (
                permutation.is_cpu
                and permutation.dtype is torch.int32
                and permutation.shape == (*packed.shape[:-2], columns)
            )
        )
    )


def places_of_experts(given: Tensor | None) -> Tensor | None:
    """Offsets or indices as functions read them."""
    return None if given is None else given.to("cpu", torch.int64).contiguous()


def tidy(part: Tensor) -> Tensor:
    """With neighbours along the last dimension side by side."""
    if part.is_contiguous() or part.stride(-1) == 1:
        return part
    return part.contiguous()
