"""Metal kernels from `shaders/metal`: put together, compiled when first asked for, kept.

A `Variant` is one kernel of one source file with its definitions: format, dtypes, tile
sizes. Metal has no templates across its interface, so each variant is a library of its
own, of one kernel, compiled by `torch.mps.compile_shader` in the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ...tensor import log_once, logger
from .. import KernelError, settings, shaders

Kernel = Callable[..., None]

TYPE_NAMES = {
    torch.float32: "float",
    torch.float16: "half",
    torch.bfloat16: "bfloat",
    torch.int32: "int",
    torch.int64: "long",
}

_HEADER = "affine.h"

# What affine.h lists, where a kernel has no use for it.
_DEFAULTS: dict[str, int | str] = {
    "X_TYPE": "float",
    "SCALE_TYPE": "float",
    "ALIGNED": 0,
    "X_VECTOR": 0,
    "PERMUTED": 0,
    "BIASED": 0,
    "EXPERTS": 0,
    "EXPERT_TYPE": "int",
}


@dataclass(frozen=True)
class Variant:
    """A kernel: the name of its file and function, and its definitions."""

    family: str
    defines: tuple[tuple[str, int | str], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.defines)[name]

    def __str__(self) -> str:
        values = dict(self.defines)
        kind = f"{values['BITS']} bits, group {values['GROUP_SIZE']}"
        others = [
            f"{name}={value}"
            for name, value in self.defines
            if name not in ("BITS", "GROUP_SIZE") and value != _DEFAULTS.get(name)
        ]
        return f"{self.family} ({', '.join([kind, *others])})"


def variant(family: str, *, bits: int, group_size: int, **defines: Any) -> Variant:
    """A variant; dtypes are given as torch's, flags as bools."""

    def text(value: Any) -> int | str:
        if isinstance(value, torch.dtype):
            return TYPE_NAMES[value]
        return int(value)

    own = {name: text(value) for name, value in defines.items()}
    values = {"BITS": bits, "GROUP_SIZE": group_size, **_DEFAULTS, **own}
    return Variant(family, tuple(values.items()))


@cache
def _text(name: str) -> str:
    return (shaders() / "metal" / name).read_text(encoding="ascii")


def source(variant: Variant) -> str:
    """The whole source of a variant: definitions, the shared header, the kernel."""
    lines = [f"#define {name} {value}" for name, value in variant.defines]
    body = _text(f"{variant.family}.metal")
    # Before the definitions, whose names Apple's headers may use.
    includes = ["#include <metal_stdlib>", "#include <metal_simdgroup_matrix>"]
    return "\n".join(
        [*includes, *lines, body.replace(f'#include "{_HEADER}"', _text(_HEADER))]
    )


# One compiles at a time, and nobody sees a kernel before it has been checked.
_lock = threading.RLock()
_kernels: dict[Variant, Kernel | None] = {}


def kernel(
    wanted: Variant, check: Callable[[Variant, Kernel], str | None]
) -> Kernel | None:
    """The compiled kernel, or None where it cannot be used; then the log says why.

    On first use `check` compares it with the reference and says what is wrong, if
    anything. With ``settings.strict`` a kernel that cannot be used raises KernelError.
    """
    made = _kernels.get(wanted)
    if made is None:
        with _lock:
            # What is wrong with one that failed is wanted again where that is to raise.
            if wanted not in _kernels or (settings.strict and not _kernels[wanted]):
                made = _checked(wanted, check)
                _kernels[wanted] = made
            made = _kernels[wanted]
    return made


def _checked(
    wanted: Variant, check: Callable[[Variant, Kernel], str | None]
) -> Kernel | None:
    try:
        library = torch.mps.compile_shader(source(wanted))
        # Looked up once: each look-up makes a new object.
        made = getattr(library, wanted.family)
        # Where checks make their inputs, whatever the default is.
        with torch.device("cpu"):
            wrong = check(wanted, made)
    except (SyntaxError, RuntimeError, ValueError) as error:
        made, wrong = None, f"{type(error).__name__}: {error}"
    if wrong is None:
        logger.debug("compiled and checked %s", wanted)
        return made
    text = (
        f"the Metal kernel {wanted} cannot be used on this machine: {wrong}\n"
        "This weight is dequantized instead, which is right but slow. Please report "
        "this, with what `python -m affine_tensor.doctor` prints"
    )
    if settings.strict:
        raise KernelError(text)
    log_once(f"metal {wanted}", "%s", text)
    return None


def compiled() -> dict[Variant, bool]:
    """The variants asked for so far, and whether they can be used."""
    with _lock:
        return {wanted: made is not None for wanted, made in _kernels.items()}


def reset() -> None:
    """Forget all compiled kernels."""
    with _lock:
        _kernels.clear()
