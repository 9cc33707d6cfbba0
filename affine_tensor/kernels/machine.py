"""The machine's devices: what they are called, and where tensors for them are made."""

from __future__ import annotations

import platform

import torch

KINDS = ("cpu", "cuda", "mps")


def emulated() -> bool:
    """Whether something else has taken the place of `torch.mps.compile_shader`.

    That is so on the emulator of `tests/metal`: the kernels are those of MPS, and
    tensors on the CPU count as tensors on MPS.
    """
    return torch.mps.compile_shader.__module__ != "torch.mps"


def is_available(kind: str) -> bool:
    """Whether there is a device of this kind, an emulated one included."""
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return emulated() or torch.backends.mps.is_available()
    return kind == "cpu"


def default_kind() -> str:
    """The accelerator that there is, else "cpu"."""
    return next(kind for kind in ("mps", "cuda", "cpu") if is_available(kind))


def tensor_device(kind: str) -> torch.device:
    """Where to create tensors for the kernels of a device."""
    return torch.device("cpu" if kind == "mps" and emulated() else kind)


def synchronize(kind: str) -> None:
    """Wait until the device has done all that it was given."""
    device = tensor_device(kind)
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "cuda":
        torch.cuda.synchronize()


def empty_cache(kind: str) -> None:
    """Give memory that is not in use back to the system."""
    device = tensor_device(kind)
    if device.type == "mps":
        torch.mps.empty_cache()
    elif device.type == "cuda":
        torch.cuda.empty_cache()


def name_of(kind: str) -> str:
    """What the device is called, for people."""
    if kind == "mps":
        from .metal import tuning

        chip = tuning.chip()
        return f"{chip.name}, {chip.cores} cores"
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def system() -> str:
    """The operating system and its version."""
    release = platform.mac_ver()[0]
    return f"macOS {release}" if release else f"{platform.system()}, not macOS"


EMULATED = "EMULATED on a CPU: nothing here ran on a GPU, times mean nothing"


def banner() -> str:
    """The first line of every table: a warning where nothing ran on a device, else ""."""
    return f"{EMULATED}\n" if emulated() else ""
