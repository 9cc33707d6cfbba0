"""MLX's Metal kernels as the Hugging Face Hub has them: an optional backend for MPS.

The `kernels` library (``pip install affine-tensor[hub]``) fetches them when a product
first asks, once in a process, and never on import. They need macOS 26 and a torch that
they were built for. Version 1 of them is wrong where x has several dimensions, and may be
what a cache or LOCAL_KERNELS holds: each format is compared with the reference before it
is trusted.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import layout
from ..tensor import log_once, logger
from . import KernelError, settings

REPOSITORY = "kernels-community/mlx-quantization-metal-kernels"
VERSION = 2
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

_OLDEST_MACOS = 26

# What a format is checked with: leading dimensions of x here, weights in `_weights`. MLX
# chooses kernels by these shapes: one row, a few and many, ragged and aligned, long ones.
_LEADS: tuple[tuple[int, ...], ...] = ((), (7,), (2, 1), (3, 33), (2, 2, 3))

# The largest distance of a row of results from float64's, as a share of its length. MLX
# rounds weights and sums of x to their dtype (a third of this), and float32 to 11 bits on
# an M5. One group left out makes a tenth and more.
_ALLOWED = {torch.float32: 2.0**-8, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}

Function = Callable[..., Tensor]


class _Form(NamedTuple):
    """What a check holds for."""

    bits: int
    group_size: int
    x: torch.dtype
    scales: torch.dtype
    biases: torch.dtype
    transpose: bool

    def __str__(self) -> str:
        product = "x @ W.T" if self.transpose else "x @ W"
        dtype = layout.name_of(self.x)
        return f"{product} in {dtype}, {self.bits} bits, group size {self.group_size}"


# One thread loads and checks; the others wait, and find what it found.
_lock = threading.RLock()
_loaded: list[Function | None] = []  # empty until it was tried
_forms: dict[_Form, Function | str | None] = {}  # a text: what was found to be wrong


def reset() -> None:
    """Forget what was loaded and checked, so that it is tried again. For tests."""
    with _lock:
        _loaded.clear()
        _forms.clear()


def quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    *,
    bits: int,
    group_size: int,
    transpose: bool,
) -> Tensor | None:
    """``x @ W.T``, or ``x @ W`` if not `transpose`; None where our own must do it.

    x is ``[..., K]`` (or ``[..., N]``), of any rank and strides; `packed`, int32 or uint32
    ``[N, K * bits / 32]``, `scales` and `biases` ``[N, K / group_size]`` are W. None means
    that the kernels are not available here, do not take this format, these dtypes or
    strides, or failed their check; the log says which, once. With ``settings.strict``
    a failed check raises KernelError.
    """
    form = _Form(bits, group_size, x.dtype, scales.dtype, biases.dtype, transpose)
    try:
        function = _forms[form]
    except KeyError:
        function = _look_up(form, x.device)
    if isinstance(function, str):
        if settings.strict:
            raise KernelError(function)
        return None
    if function is None:
        return None
    reason = _why_not(packed, scales, biases)
    if reason is not None:
        _decline(reason)
        return None
    inner = scales.shape[-1] * group_size if transpose else packed.shape[0]
    if not x.numel() or x.dim() == 0 or x.shape[-1] != inner:
        return None  # our own say what is wrong, if anything
    try:
        return _call(function, form, x, packed, scales, biases)
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = f"x {list(x.shape)} and words {list(packed.shape)}"
        text = _give_up(form, f"failed for {shapes}: {_one_line(error)}")
        if settings.strict:
            raise KernelError(text) from error
    return None


def _call(
    function: Function,
    form: _Form,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
) -> Tensor:
    return function(
        x.contiguous(),  # version 1 took any strides for these
        packed.view(torch.uint32),
        scales,
        biases,
        transpose=form.transpose,
        group_size=form.group_size,
        bits=form.bits,
    )


def _why_not(packed: Tensor, scales: Tensor, biases: Tensor) -> str | None:
    """Why the Hub's kernels do not take a call whose format they take."""
    if settings.batch_invariant:
        return "the Hub's kernels are not batch invariant"
    if packed.dim() != 2 or not packed.numel():
        return f"the Hub's kernels do not take weights of shape {list(scales.shape)}"
    if not (
        packed.is_contiguous() and scales.is_contiguous() and biases.is_contiguous()
    ):
        return "the Hub's kernels would copy weights that are not contiguous"
    return None


def _decline(reason: str) -> None:
    with _lock:
        log_once(
            f"hub {reason}",
            "metal_backend is 'hub', but %s. There our own kernels are used",
            reason,
        )


# ---- which formats they serve ---------------------------------------------------


def _look_up(form: _Form, device: torch.device) -> Function | str | None:
    """The function for a format, or what is wrong with it, or None if it has none."""
    with _lock:
        if form not in _forms:
            _forms[form] = _unknown(form, device)
        return _forms[form]


def _unknown(form: _Form, device: torch.device) -> Function | str | None:
    if form.bits not in BITS or form.group_size not in GROUP_SIZES:
        kind = f"{form.bits}-bit weights in groups of {form.group_size}"
        _decline(f"the Hub's kernels do not take {kind}")
        return None
    dtypes = (form.x, form.scales, form.biases)
    if len(set(dtypes)) > 1 or form.x not in _ALLOWED:
        names = ", ".join(map(layout.name_of, dtypes))
        _decline(
            "the Hub's kernels take x, scales and biases in one dtype of "
            f"{layout.join(_ALLOWED)}; they are {names}"
        )
        return None
    function = _load()
    if function is None:
        return None
    wrong = _check(function, form, device)
    if wrong is None:
        return function
    return _give_up(
        form,
        f"is wrong: {wrong}. Version 1 is known to be; look for it in LOCAL_KERNELS "
        "and in the cache",
    )


def _give_up(form: _Form, wrong: str) -> str:
    """Use the kernel for this format no more; what the log says, once."""
    text = (
        f"{REPOSITORY}, for {form}, {wrong}. For this format our own kernels are used "
        "from now on"
    )
    with _lock:
        _forms[form] = text
        log_once(f"hub {form}", "%s", text)
    return text


def _check(function: Function, form: _Form, device: torch.device) -> str | None:
    """What is wrong with the kernel for this format, or None.

    Small products, most of them of an x with three and more dimensions, are compared
    with those of the dequantized weight in float64 on the CPU.
    """
    try:
        with _quiet(), torch.no_grad():
            return _difference(function, form, device)
    except Exception as error:  # whatever a kernel raises, it cannot be used
        return _one_line(error)


def _difference(function: Function, form: _Form, device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(form.x)

    bits, group_size = form.bits, form.group_size
    for rows, columns in _weights(group_size):
        weight = normal(rows, columns)
        parts = layout.quantize(weight, bits=bits, group_size=group_size)
        exact = layout.dequantize(
            *parts, bits=bits, group_size=group_size, dtype=torch.float64
        )
        exact = exact.T if form.transpose else exact
        # As int32: not every device can be sent uint32.
        there = [part.to(device) for part in (parts[0].view(torch.int32), *parts[1:])]
        for lead in _LEADS:
            x = normal(*lead, len(exact))
            want = x.double() @ exact
            y = _call(function, form, x.to(device), *there).cpu()
            case = f"x {list(x.shape)} and a weight [{rows}, {columns}]"
            if y.shape != want.shape or y.dtype != form.x:
                got = f"{list(y.shape)} {layout.name_of(y.dtype)}"
                return f"for {case} the result is {got}, not {list(want.shape)}"
            distance = (y.double() - want).norm(dim=-1) / want.norm(dim=-1)
            worst, allowed = float(distance.max()), _ALLOWED[form.x]
            if not worst <= allowed:  # NaN is not
                return (
                    f"for {case} a row is off by {worst:.2g} of its length; {allowed:.2g} "
                    "is allowed"
                )
    return None


def _weights(group_size: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns."""
    return (1088, 3 * group_size), (37, 512), (128, 128), (64, 512)


# ---- loading --------------------------------------------------------------------


def _load() -> Function | None:
    """The kernels' function, tried once; None if it cannot be had, as the log says."""
    if not _loaded:
        function, reason = None, _wrong_machine()
        if reason is None:
            try:
                with _quiet():
                    function = _fetch()
            # ImportError, ValueError, OSError, ... and what the HTTP library under it
            # raises, which is none of them.
            except Exception as error:
                reason = _one_line(error)
                if isinstance(error, ImportError) and error.name == "kernels":
                    reason = "pip install 'affine-tensor[hub]' brings what loads them"
        if function is None:
            log_once(
                "hub",
                "metal_backend is 'hub', but %s cannot be loaded: %s. Our own kernels "
                "are used",
                REPOSITORY,
                reason,
            )
        _loaded.append(function)
    return _loaded[0]


def _fetch() -> Function:
    # Not imported by name: only those who ask for this backend need to have it.
    library = importlib.import_module("kernels")
    return library.get_kernel(REPOSITORY, version=VERSION).quantized_matmul


def _wrong_machine() -> str | None:
    version = platform.mac_ver()[0]  # "" if it is no Mac
    major = version.partition(".")[0]
    if major.isdigit() and int(major) >= _OLDEST_MACOS:
        return None
    here = f"macOS {version}" if version else platform.system()
    return f"they need macOS {_OLDEST_MACOS} or later, and this is {here}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep standard error quiet, for what C++ writes there too; the debug log has it."""
    try:
        own = os.dup(2)
    except OSError:  # closed: there is nothing to keep quiet
        yield
        return
    with tempfile.TemporaryFile() as file:
        _flush()
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            text = file.read().decode(errors="replace")
            if text:
                logger.debug("while the Hub's kernels were tried: %s", text)


def _flush() -> None:
    if sys.stderr is not None:  # as it is without a console
        sys.stderr.flush()
