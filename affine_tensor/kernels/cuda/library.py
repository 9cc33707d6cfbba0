"""Kernels for each format and device: compiled, loaded, checked on first use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import layout, ops
from ...tensor import log_once, logger
from .. import KernelError, settings
from . import compiler, launch, plans

# As values.cuh numbers them: products have no float64.
TYPES = {**plans.TYPES, torch.float64: 3}

_WORDS = (torch.int32, torch.uint32)

Check = Callable[[int], "str | None"]
Parts = tuple[Tensor, Tensor, Tensor]  # packed, scales, biases

_lock = threading.RLock()
_functions: dict[Any, int | None] = {}


@ops.usable_if("cuda")
def available() -> bool:
    """Whether kernels are wanted, and there is what compiles them for this GPU."""
    if settings.cuda_backend != "own" or not torch.cuda.is_available():
        return False
    try:
        compiler.target(capability(torch.cuda.current_device()))
        return True
    except KernelError:
        return False


@cache
def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device."""
    return torch.cuda.get_device_capability(device)


@cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_bytes(device: int) -> int:
    """How much shared memory a block may have."""
    return launch.shared_bytes(device)


def device(number: int) -> torch.device:
    return torch.device("cuda", number)


# Both cost a tenth of what torch.cuda has for it.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
stream_of: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda number: 0
)


def capturing() -> bool:
    """Whether what is launched now goes into a graph.

    Kernels are then loaded but not checked, which needs results; whoever keeps functions
    keeps none of that time.
    """
    return torch.cuda.is_current_stream_capturing()


def function(
    source: str,
    entry: str,
    defines: compiler.Defines,
    device: int,
    check: Check,
    shared: int = 0,
) -> int | None:
    """A kernel of a source on the current device, or None where it cannot be used.

    On first use `check` runs it and says what is wrong, if anything. Why there is none is
    logged, once, or raised as KernelError with ``settings.strict``.
    """
    key = (source, entry, defines, device, shared)
    with _lock:
        found = _functions.get(key)
        if found is None and (key not in _functions or settings.strict):
            if capturing():
                return _made(source, entry, defines, device, None, shared)
            found = _made(source, entry, defines, device, check, shared)
            _functions[key] = found
        return found


def _made(
    source: str,
    entry: str,
    defines: compiler.Defines,
    device: int,
    check: Check | None,
    shared: int,
) -> int | None:
    form = ", ".join(f"{name}={value}" for name, value in defines)
    try:
        image = compiler.image(source, defines, capability(device))
        made = launch.function(image, entry, device, shared)
        # Without the modes of whoever is the first to call.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            wrong = None if check is None else check(made)
        if wrong:
            raise KernelError(f"{entry} ({form}) computes something else: {wrong}")
        logger.debug("loaded %s of %s for %s", entry, source, form)
        return made
    except KernelError as error:
        if settings.strict:
            raise
        log_once(
            f"cuda {error}",
            "CUDA kernels are not used, weights are dequantized instead: %s",
            error,
        )
        return None


def reset() -> None:
    """Forget which kernels there are, so that each is checked again."""
    with _lock:
        _functions.clear()


def served(
    device: int,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    permutation: Tensor | None = None,
) -> bool:
    """Whether kernels on a device read these operands as what they are."""
    return (
        packed.get_device() == scales.get_device() == biases.get_device() == device
        and packed.dtype in _WORDS
        and scales.dtype in layout.WEIGHT_DTYPES
        and biases.dtype is scales.dtype
        and (permutation is None or permutation.get_device() == device)
    )


def tidy(packed: Tensor, scales: Tensor, biases: Tensor) -> Parts:
    """The parts with neighbours along K side by side, scales and biases alike.

    Parts that are so already come back as they are.
    """
    if packed.stride(-1) != 1:
        packed = packed.contiguous()
    if scales.stride(-1) != 1 or scales.stride() != biases.stride():
        scales, biases = scales.contiguous(), biases.contiguous()
    return packed, scales, biases
