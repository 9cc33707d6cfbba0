"""The Hub's kernels: asked for once, checked before they are trusted, never in the way.

Stand-ins take the place of the kernels and mostly of the library that loads them, since
both need a Mac. What a stand-in computes comes from numpy's bits and float64.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make, wrapped
from expecttest import assert_expected_inline
from hub_server import HubServer, only_loopback, use_hub
from huggingface_hub import constants
from torch import Tensor

import affine_tensor.tensor
from affine_tensor import AffineQuantizedTensor
from affine_tensor.kernels import hub, settings
from affine_tensor.kernels.metal.library import KernelError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Stand = Callable[..., Tensor]


def dense(words: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """The weight in float64: each row is one little-endian stream of codes."""
    stream = np.unpackbits(words.view(torch.uint8).numpy(), axis=1, bitorder="little")
    codes = stream.reshape(len(stream), -1, bits) @ (1 << np.arange(bits))
    groups = torch.from_numpy(codes).double().unflatten(1, (scales.shape[1], -1))
    parts = (part.double().unsqueeze(-1) for part in (scales, biases))
    return groups.mul(next(parts)).add(next(parts)).flatten(1)


class Kernel:
    """Version 2's function, right unless told otherwise. Remembers what x it was given."""

    def __init__(
        self, change: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.change = change  # (x, result) -> result
        self.calls: list[tuple[int, ...]] = []
        self.noise = b""

    def __call__(
        self,
        x: Tensor,
        w: Tensor,
        scales: Tensor,
        biases: Tensor | None = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
    ) -> Tensor:
        assert w.dtype == torch.uint32
        assert biases is not None
        assert bits
        assert w.shape[1] * 32 == scales.shape[1] * group_size * bits
        assert x.is_contiguous()
        assert mode == "affine"
        self.calls.append(tuple(x.shape))
        os.write(2, self.noise)
        y = self.product(x, w, scales, biases, transpose, bits)
        return y if self.change is None else self.change(x, y)

    def product(
        self,
        x: Tensor,
        w: Tensor,
        scales: Tensor,
        biases: Tensor,
        transpose: bool,
        bits: int,
    ) -> Tensor:
        weight = dense(w, scales, biases, bits).to(x.dtype).float()
        return (x.float() @ (weight.T if transpose else weight)).to(x.dtype)


class Version1(Kernel):
    """Element z of a batch sees the scales shifted by z rows; the first one is right."""

    def product(
        self,
        x: Tensor,
        w: Tensor,
        scales: Tensor,
        biases: Tensor,
        transpose: bool,
        bits: int,
    ) -> Tensor:
        if x.dim() < 3:
            return super().product(x, w, scales, biases, transpose, bits)
        batch = x.flatten(0, -3)
        shifted = [(scales.roll(-z, 0), biases.roll(-z, 0)) for z in range(len(batch))]
        rows = [
            super(Version1, self).product(batch[z], w, *shifted[z], transpose, bits)
            for z in range(len(batch))
        ]
        return torch.stack(rows).unflatten(0, x.shape[:-2])


class Library(ModuleType):
    """The `kernels` library; `get_kernel` gives a module or raises an error."""

    def __init__(self, given: object) -> None:
        super().__init__("kernels")
        self.given, self.noise = given, b""
        self.asked: list[tuple[str, int]] = []

    def get_kernel(self, repo_id: str, *, version: int) -> object:
        self.asked.append((repo_id, version))
        os.write(2, self.noise)
        if isinstance(self.given, BaseException):
            raise self.given
        module = ModuleType("mlx_quantization_metal_kernels")
        if self.given is not None:
            module.quantized_matmul = self.given  # type: ignore[attr-defined]
        return module


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Mac of today on which nothing was tried yet."""
    monkeypatch.setattr(affine_tensor.tensor, "_logged", set())
    monkeypatch.setattr(settings, "strict", False)
    monkeypatch.setattr(settings, "batch_invariant", False)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    on_macos(monkeypatch, "26.1")
    hub.reset()
    yield
    hub.reset()


def on_macos(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    machine = "arm64" if version else ""
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), machine))


def install(monkeypatch: pytest.MonkeyPatch, given: object) -> Library:
    library = Library(given)
    monkeypatch.setitem(sys.modules, "kernels", library)
    return library


def call(x: Tensor, weight: AffineQuantizedTensor, **changes: Any) -> Tensor | None:
    """As `F.linear`, or with ``transpose=False`` as ``x @ weight``."""
    form: dict[str, Any] = {"bits": weight.bits, "group_size": weight.group_size}
    form |= {"transpose": True} | changes
    return hub.quantized_matmul(x, weight._packed, weight.scales, weight.biases, **form)


def case(
    *lead: int, dtype: torch.dtype = torch.float32, transpose: bool = True, **form: int
) -> tuple[Tensor, AffineQuantizedTensor]:
    weight = make(48, 256, dtype=dtype, **{"bits": 4, "group_size": 64, **form})
    generator = torch.Generator().manual_seed(len(lead))
    inner = weight.shape[1] if transpose else weight.shape[0]
    return torch.randn(*lead, inner, generator=generator).to(dtype), weight


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


CHECKED = len(hub._LEADS) * len(hub._weights(64))  # calls of one format's check


# ---- what is served --------------------------------------------------------------


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", hub.GROUP_SIZES)
@pytest.mark.parametrize("bits", hub.BITS)
def test_a_right_kernel_is_used(
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    transpose: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernel = Kernel()
    library = install(monkeypatch, kernel)
    x, weight = case(
        2, 3, dtype=dtype, transpose=transpose, bits=bits, group_size=group_size
    )
    y = call(x, weight, transpose=transpose)
    assert y is not None
    assert y.dtype == dtype
    exact = weight.dequantize(torch.float64)
    want = x.double() @ (exact.T if transpose else exact)
    error = (y.double() - want).norm() / want.norm()
    assert error < 4 * torch.finfo(dtype).eps
    assert library.asked == [(hub.REPOSITORY, 2)]
    assert kernel.calls[-1] == x.shape
    assert len(kernel.calls) == CHECKED + 1
    call(x, weight, transpose=transpose)
    assert len(kernel.calls) == CHECKED + 2  # it is checked once
    assert lines(caplog) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [(3, 32), (4, 64), (8, 128)], ids=str)
@pytest.mark.parametrize("transpose", [True, False])
def test_weights_rounded_as_mlx_rounds_them_pass_the_check(
    form: tuple[int, int],
    dtype: torch.dtype,
    transpose: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mx = pytest.importorskip("mlx.core")
    bits, group_size = form
    own = {torch.float32: mx.float32, torch.float16: mx.float16}

    def to_mlx(tensor: Tensor) -> Any:
        if tensor.dtype == torch.uint32:
            return mx.array(tensor.view(torch.int32).numpy()).view(mx.uint32)
        return mx.array(tensor.float().numpy()).astype(own.get(dtype, mx.bfloat16))

    class Rounded(Kernel):
        """Twice: the product with the scale, and the sum with the bias."""

        def product(
            self,
            x: Tensor,
            w: Tensor,
            scales: Tensor,
            biases: Tensor,
            transpose: bool,
            bits: int,
        ) -> Tensor:
            parts = (to_mlx(part) for part in (w, scales, biases))
            weight = mx.dequantize(*parts, group_size=group_size, bits=bits)
            rounded = torch.from_numpy(np.array(weight.astype(mx.float32)))
            return (x.float() @ (rounded.T if transpose else rounded)).to(x.dtype)

    install(monkeypatch, Rounded())
    x, weight = case(
        2, dtype=dtype, transpose=transpose, bits=bits, group_size=group_size
    )
    assert call(x, weight, transpose=transpose) is not None
    assert lines(caplog) == []


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3, 1)], ids=str)
def test_x_of_any_rank_and_strides(
    lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Kernel())
    x, weight = case(*lead)
    want = x @ weight.dequantize().T
    wide = torch.cat([x, x], -1)[..., : x.shape[-1]]
    for given in (x, wide, x.T.contiguous().T if x.dim() == 2 else x):
        y = call(given, weight)
        assert y is not None
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    if x.dim() > 1:
        expanded = x[:1].expand(4, *x.shape[1:])
        y = call(expanded, weight)
        assert y is not None
        torch.testing.assert_close(y, want[:1].expand_as(y), rtol=1e-4, atol=1e-4)


def test_rows_of_a_weight_and_words_that_are_unsigned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, Kernel())
    x, weight = case(3)
    part = weight[8:40]
    y = call(x, part)
    assert y is not None
    torch.testing.assert_close(y, x @ part.dequantize().T, rtol=1e-4, atol=1e-4)
    form: dict[str, Any] = {"bits": 4, "group_size": 64, "transpose": True}
    again = hub.quantized_matmul(x, part.packed, part.scales, part.biases, **form)
    assert again is not None
    assert again.equal(y)


@pytest.mark.parametrize("mode", ["inference", "meta", "grad"])
def test_whatever_torch_is_set_to(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Kernel())
    x, weight = case(3)
    want = x @ weight.dequantize().T
    around: dict[str, Any] = {
        "inference": torch.inference_mode(),
        "meta": torch.device("meta"),
        "grad": torch.enable_grad(),
    }
    with around[mode]:
        y = call(x.requires_grad_(mode == "grad"), weight)
    assert y is not None
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


# ---- what is not -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"bits": 1}, "do not take 1-bit weights in groups of 64"),
        ({"group_size": 16}, "do not take 4-bit weights in groups of 16"),
        ({"group_size": 256}, "do not take 4-bit weights in groups of 256"),
    ],
    ids=str,
)
def test_formats_that_are_not_there(
    form: dict[str, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernel = Kernel()
    library = install(monkeypatch, kernel)
    for transpose in (True, False, True):
        x, weight = case(2, transpose=transpose, **form)
        assert call(x, weight, transpose=transpose) is None
    (line,) = lines(caplog)
    assert said in line
    assert line.endswith("There our own kernels are used")
    assert library.asked == kernel.calls == []


@pytest.mark.parametrize(
    ("x", "scales", "biases"),
    [
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes_that_are_not_taken(
    x: torch.dtype,
    scales: torch.dtype,
    biases: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernel = Kernel()
    install(monkeypatch, kernel)
    value, weight = case(2)
    parts = (weight._packed, weight.scales.to(scales), weight.biases.to(biases))
    form: dict[str, Any] = {"bits": 4, "group_size": 64, "transpose": True}
    for _ in range(2):
        assert hub.quantized_matmul(value.to(x), *parts, **form) is None
    (line,) = lines(caplog)
    assert "in one dtype of float32, float16, bfloat16; they are" in line
    assert kernel.calls == []


def test_weights_that_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel()
    install(monkeypatch, kernel)
    x, weight = case(2)
    assert call(x, weight) is not None
    kernel.calls.clear()
    for _ in range(2):
        assert call(x[:, :128], weight[:, :128]) is None
        assert call(x, make(2, 48, 256, group_size=64)) is None
    said = lines(caplog)
    assert len(said) == 2
    assert "weights that are not contiguous" in said[0]
    assert "weights of shape [2, 48, 4]" in said[1]
    form: dict[str, Any] = {"bits": 4, "group_size": 64, "transpose": True}
    own = [weight._packed, weight.scales, weight.biases]
    for i in range(3):
        spread = [
            p.repeat(1, 2)[:, : p.shape[1]] if j == i else p for j, p in enumerate(own)
        ]
        assert not spread[i].is_contiguous()
        assert hub.quantized_matmul(x, *spread, **form) is None
    assert call(x[:0], weight) is None  # there is nothing to compute
    assert call(x[:, :-1], weight) is None  # our own say what is wrong
    assert call(torch.tensor(1.0), weight) is None
    assert len(lines(caplog)) == 2
    assert kernel.calls == []


def test_batch_invariance_is_not_theirs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Kernel())
    x, weight = case(2)
    assert call(x, weight) is not None
    monkeypatch.setattr(settings, "batch_invariant", True)
    assert call(x, weight) is None
    (line,) = lines(caplog)
    assert "not batch invariant" in line
    monkeypatch.setattr(settings, "batch_invariant", False)
    assert call(x, weight) is not None


# ---- where they cannot be had ----------------------------------------------------


class Strange(Exception):
    """What HTTP libraries raise is none of the errors that Python has."""


ERRORS = [
    ImportError("no module named torch._six"),
    FileNotFoundError("Cannot find a build variant:\n\ntorch210: no\ntorch211: no"),
    ValueError("could not verify publisher trust status"),
    OSError("image not found"),
    RuntimeError("undefined symbol"),
    TypeError("get_kernel() got an unexpected keyword argument 'version'"),
    Strange("connection refused"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_an_error_is_remembered_and_said_once(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    library = install(monkeypatch, error)
    for form in ({}, {}, {"bits": 8}, {"group_size": 32}):
        x, weight = case(2, **form)
        assert call(x, weight) is None
    assert len(library.asked) == 1
    (line,) = lines(caplog)
    assert f"{type(error).__name__}: {str(error).split()[0]}" in line
    assert "Our own kernels are used" in line
    assert "\n" not in line
    library.given = Kernel()
    assert call(*case(2)) is None
    hub.reset()
    assert call(*case(2)) is not None


def test_what_the_log_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, ERRORS[1])
    call(*case(2))
    hub.reset()
    install(monkeypatch, Version1())
    call(*case(2))
    call(*case(2, bits=1))
    assert_expected_inline(
        "\n".join(map(wrapped, lines(caplog))),
        """\
metal_backend is 'hub', but kernels-community/mlx-quantization-metal-kernels
  cannot be loaded: FileNotFoundError: Cannot find a build variant:
  torch210: no torch211: no. Our own kernels are used
kernels-community/mlx-quantization-metal-kernels, for x @ W.T in float32, 4
  bits, group size 64, is wrong: for x [2, 1, 192] and a weight [1088, 192]
  a row is off by 1.5 of its length; 0.0039 is allowed. Version 1 is known
  to be; look for it in LOCAL_KERNELS and in the cache. For this format our
  own kernels are used from now on
metal_backend is 'hub', but the Hub's kernels do not take 1-bit weights in
  groups of 64. There our own kernels are used""",
    )


def test_a_module_without_the_function(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = install(monkeypatch, None)
    for _ in range(2):
        assert call(*case(2)) is None
    assert len(library.asked) == 1
    (line,) = lines(caplog)
    assert "no attribute 'quantized_matmul'" in line


def test_the_library_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)  # makes the import fail
    for _ in range(2):
        assert call(*case(2)) is None
    (line,) = lines(caplog)
    assert "pip install 'affine-tensor[hub]'" in line


@pytest.mark.parametrize(
    ("version", "served"),
    [("", False), ("15.6.1", False), ("16.0", False), ("26.0", True), ("27", True)],
)
def test_the_version_of_macos(
    version: str,
    served: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on_macos(monkeypatch, version)
    library = install(monkeypatch, Kernel())
    assert (call(*case(2)) is not None) == served
    assert bool(library.asked) == served
    if not served:
        (line,) = lines(caplog)
        here = f"macOS {version}" if version else platform.system()
        assert f"they need macOS 26 or later, and this is {here}" in line


def test_an_interrupt_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    library = install(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        call(*case(2))
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"
    library.given = Kernel()
    assert call(*case(2)) is not None


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import sys, affine_tensor, affine_tensor.kernels.hub\n"
        "assert 'kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- standard error --------------------------------------------------------------


@pytest.mark.parametrize("given", [Kernel(), Version1(), RuntimeError("no"), None])
def test_noise_is_kept_quiet(
    given: object,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    library = install(monkeypatch, given)
    free = os.dup(2)
    os.close(free)
    library.noise = b"failed to load kernel\n"
    if isinstance(given, Kernel):
        given.noise = b"compiling\n"
    with caplog.at_level(logging.DEBUG, logger="affine_tensor"):
        hub._look_up(hub._Form(4, 64, *[torch.float32] * 3, True), torch.device("cpu"))
    assert capfd.readouterr().err == ""
    kept = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert "failed to load kernel" in kept[0]
    assert len(kept) == (2 if isinstance(given, Kernel) else 1)
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"
    again = os.dup(2)
    os.close(again)
    assert again == free  # no file was left open


CHILD = """
import logging, os, platform, sys, types, torch
platform.mac_ver = lambda: ("26.0", ("", "", ""), "arm64")
logging.getLogger("affine_tensor").addHandler(logging.StreamHandler(sys.stdout))
from affine_tensor import AffineQuantizedTensor
from affine_tensor.kernels import hub
def get_kernel(repo_id, version):
    os.write(2, b"from C")
    sys.stderr is None or sys.stderr.write("from Python, without an end of line")
    {then}
library = types.ModuleType("kernels")
library.get_kernel = get_kernel
sys.modules["kernels"] = library
weight = AffineQuantizedTensor.from_dense(torch.ones(8, 64))
parts = (weight._packed, weight.scales, weight.biases)
form = dict(bits=4, group_size=64, transpose=True)
{before}
assert hub.quantized_matmul(torch.ones(2, 64), *parts, **form) is None
{after}
"""


def run_child(**parts: str) -> subprocess.CompletedProcess[str]:
    program = CHILD.format(**({"before": "", "after": ""} | parts))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )


def test_what_python_and_c_write_in_a_process_of_its_own() -> None:
    done = run_child(
        # As a program may have set it up: full lines are not written at once.
        before="sys.stderr = open(2, 'w', closefd=False); sys.stderr.write('before')",
        then="raise OSError('image not found')",
        after="sys.stderr.write('after')",
    )
    assert done.stderr == "beforeafter"
    assert done.stdout.count("\n") == 1
    assert "OSError: image not found" in done.stdout


def test_without_a_standard_error() -> None:
    done = run_child(
        before="os.close(2); sys.stderr = None",
        then="raise OSError('image not found')",
    )
    assert done.stderr == ""
    # Writing to it fails, too.
    assert "OSError: " in done.stdout


# ---- the check -------------------------------------------------------------------


def test_version_1_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Version1()
    library = install(monkeypatch, kernel)
    for dtype in DTYPES:
        for _ in range(2):
            x, weight = case(2, dtype=dtype)
            assert call(x, weight) is None  # though this one would be right
    said = lines(caplog)
    assert len(said) == 3
    for line, dtype in zip(said, ("float32", "float16", "bfloat16"), strict=True):
        assert (
            f"for x @ W.T in {dtype}, 4 bits, group size 64, is wrong: for x [" in line
        )
        assert "Version 1 is known to be" in line
    assert len(library.asked) == 1
    assert (
        max(len(shape) for shape in kernel.calls) == 3
    )  # the first that fails ends it


def test_other_formats_are_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Half(Kernel):
        def product(self, *args: Any) -> Tensor:
            y = super().product(*args)
            return y.zero_() if y.dtype == torch.float16 else y

    install(monkeypatch, Half())
    assert call(*case(2, dtype=torch.float16)) is None
    assert call(*case(2, dtype=torch.bfloat16)) is not None
    assert call(*case(2, dtype=torch.float16)) is None
    assert len(lines(caplog)) == 1


def from_row(start: int, change: Callable[[Tensor], Tensor]) -> Any:
    """A change where x has that many rows or more."""
    return lambda x, y: change(y) if x[..., 0].numel() >= start else y


WRONG: dict[str, Any] = {
    "NaN": lambda x, y: y.masked_fill(torch.ones(y.shape).cumsum(-1) == 3, torch.nan),
    "zeros": lambda x, y: torch.zeros_like(y),
    "another sign": lambda x, y: -y,
    "another dtype": lambda x, y: y.double(),
    "a dimension less": lambda x, y: y.flatten(0, -2) if y.dim() > 2 else y,
    "rows are left": lambda x, y: (
        torch.cat([y[..., :-1, :], 0 * y[..., -1:, :]], -2) if y.dim() > 1 else y
    ),
    "columns past 32 are left": lambda x, y: torch.cat(
        [y[..., :32], 0 * y[..., 32:]], -1
    ),
    "the last column": lambda x, y: torch.cat([y[..., :-1], 2 * y[..., -1:]], -1),
    "one row": lambda x, y: 1.1 * y if y.dim() == 1 else y,
    "a few rows": lambda x, y: 1.1 * y if x[..., 0].numel() == 2 else y,
    "many rows": from_row(50, lambda y: y.roll(1, -1)),
    "the second of a batch": lambda x, y: y[:1].expand_as(y) if y.dim() > 2 else y,
}


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_are_found(
    wrong: str,
    transpose: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(monkeypatch, Kernel(WRONG[wrong]))
    for dtype in DTYPES:
        x, weight = case(2, dtype=dtype, transpose=transpose)
        assert call(x, weight, transpose=transpose) is None
    assert len(lines(caplog)) == 3


class LastGroup(Kernel):
    """Leaves out the last of eight or more groups."""

    def product(self, x: Tensor, w: Tensor, s: Tensor, b: Tensor, *rest: Any) -> Tensor:
        kept = torch.ones_like(s)
        kept[:, -1] = s.shape[1] < 8
        return super().product(x, w, s * kept, b * kept, *rest)


class Unturned(Kernel):
    """Takes a square weight as it stands."""

    def product(
        self, x: Tensor, w: Tensor, s: Tensor, b: Tensor, transpose: bool, bits: int
    ) -> Tensor:
        square = w.shape[0] * bits == w.shape[1] * 32
        return super().product(x, w, s, b, transpose and not square, bits)


class Ragged(Kernel):
    """Leaves out rows of the weight that do not fill a tile."""

    def product(self, x: Tensor, w: Tensor, s: Tensor, b: Tensor, *rest: Any) -> Tensor:
        kept = torch.ones_like(s)
        kept[len(s) // 32 * 32 :] = 0
        return super().product(x, w, s * kept, b * kept, *rest)


class Tail(Kernel):
    """For long ``x @ W`` leaves out columns that do not fill a tile of 64."""

    def product(
        self, x: Tensor, w: Tensor, s: Tensor, b: Tensor, transpose: bool, bits: int
    ) -> Tensor:
        y = super().product(x, w, s, b, transpose, bits)
        if not transpose and len(w) >= 1024:
            y[..., y.shape[-1] // 64 * 64 :] = 0
        return y


class NoBiases(Kernel):
    def product(self, x: Tensor, w: Tensor, s: Tensor, b: Tensor, *rest: Any) -> Tensor:
        return super().product(x, w, s, torch.zeros_like(b), *rest)


class Raises(Kernel):
    def product(self, *args: Any) -> Tensor:
        raise Strange("unable to load the function affine_qmm_t_half_gs_64_b_4")


@pytest.mark.parametrize(
    "kind", [LastGroup, Unturned, NoBiases, Raises, Version1], ids=lambda k: k.__name__
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_wrong_kernels_are_found(
    kind: type[Kernel],
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(monkeypatch, kind())
    for dtype in DTYPES:
        assert call(*case(2, dtype=dtype, bits=bits)) is None
    assert len(lines(caplog)) == 3


@pytest.mark.parametrize("transpose", [True, False])
def test_ragged_weights_are_part_of_the_check(
    transpose: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for kernel in (Ragged(), Tail()):
        hub.reset()
        install(monkeypatch, kernel)
        x, weight = case(2, transpose=transpose, group_size=32)
        y = call(x, weight, transpose=transpose)
        assert (y is None) == (isinstance(kernel, Ragged) or not transpose)


def test_strict_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Version1()
    install(monkeypatch, kernel)
    monkeypatch.setattr(settings, "strict", True)
    for _ in range(2):
        with pytest.raises(KernelError, match=r"4 bits, group size 64, is wrong"):
            call(*case(2))
    monkeypatch.setattr(settings, "strict", False)
    asked = len(kernel.calls)
    assert call(*case(2)) is None
    assert len(kernel.calls) == asked  # it is not checked again
    monkeypatch.setattr(settings, "strict", True)
    assert call(*case(2, bits=1)) is None  # there is nothing wrong with that
    hub.reset()
    install(monkeypatch, OSError("not here"))
    assert call(*case(2)) is None
    assert len(lines(caplog)) == 3


@pytest.mark.parametrize("strict", [True, False])
def test_a_call_that_fails_later(
    strict: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def change(x: Tensor, y: Tensor) -> Tensor:
        if x.shape == (11, 256):
            raise RuntimeError("unable to load the function")
        return y

    kernel = Kernel(change)
    install(monkeypatch, kernel)
    assert call(*case(2)) is not None
    monkeypatch.setattr(settings, "strict", strict)
    asked = len(kernel.calls)
    for lead in (11, 2):
        if strict:
            with pytest.raises(KernelError, match=r"failed for x \[11, 256\]"):
                call(*case(lead))
        else:
            assert call(*case(lead)) is None
    assert len(kernel.calls) == asked + 1
    assert len(lines(caplog)) == 1


def test_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel()
    library = install(monkeypatch, kernel)
    start = threading.Barrier(8)

    def work(number: int) -> Tensor | None:
        x, weight = case(2, bits=(2, 4, 1)[number % 3])
        start.wait(30)
        return call(x, weight)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert [y is None for y in results] == [n % 3 == 2 for n in range(8)]
    assert len(library.asked) == 1
    assert len(kernel.calls) == 2 * CHECKED + 6
    assert len(lines(caplog)) == 1


# ---- the real library ------------------------------------------------------------

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="the kernels library"
)

SOURCE = """
from test_hub_kernel import Kernel, Version1
quantized_matmul = {kind}()
"""


def local_kernel(folder: Path, source: str, version: int = 2) -> Path:
    """A kernel of Python alone, as the library loads it from a folder."""
    folder.mkdir()
    metadata = {
        "id": f"_stand_in_{abs(hash(str(folder)))}",
        "name": "mlx-quantization-metal-kernels",
        "version": version,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "__init__.py").write_text(source)
    return folder


@needs_library
@pytest.mark.parametrize(
    ("kind", "served"), [("Kernel", True), ("Version1", False), (None, False)]
)
def test_a_local_kernel(
    kind: str | None,
    served: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = SOURCE.format(kind=kind) if kind else "def affine_qmm_t(): ..."
    folder = local_kernel(tmp_path / "kernel", source, version=2 if served else 1)
    monkeypatch.setenv("LOCAL_KERNELS", f"{hub.REPOSITORY}={folder}")
    only_loopback(monkeypatch)
    x, weight = case(2, 3)
    y = call(x, weight)
    if served:
        assert y is not None
        torch.testing.assert_close(y, x @ weight.dequantize().T, rtol=1e-4, atol=1e-4)
        assert lines(caplog) == []
    else:
        assert y is None
        (line,) = lines(caplog)
        assert ("is wrong" if kind else "no attribute 'quantized_matmul'") in line


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    only_loopback(monkeypatch)
    with HubServer({}) as server:
        use_hub(monkeypatch, server)
        yield server


@needs_library
@pytest.mark.parametrize("how", ["down", "not found", "offline", "version 1 cached"])
def test_the_hub_does_not_give_it(
    how: str,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if how == "down":
        server.stop()
    if how in ("offline", "version 1 cached"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if how == "version 1 cached":
        name = f"kernels--{hub.REPOSITORY.replace('/', '--')}"
        refs = Path(constants.HF_HUB_CACHE) / name / "refs"
        refs.mkdir(parents=True)
        (refs / "v1").write_text("0" * 40)
    for _ in range(2):
        assert call(*case(2)) is None
    said = [line for line in lines(caplog) if "metal_backend is 'hub'" in line]
    assert len(said) == 1
    reason = {
        "offline": "Version 2 of '.*' is not available in the local cache",
        "version 1 cached": "Version 2 not found, available versions: 1",
    }.get(how, "could not verify publisher trust status")
    assert re.search(f"ValueError: .*{reason}", said[0])
    assert capfd.readouterr().err == ""
