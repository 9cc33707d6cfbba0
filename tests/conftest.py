"""What several test files share: small packed weights, and a watch on the fallback."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import affine_tensor.tensor
from affine_tensor import AffineQuantizedTensor
from affine_tensor.kernels import settings

# The shapes here are small: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all combinations, which takes an hour"
    )
    parser.addoption("--device", choices=DEVICES, help=DEVICE_HELP)


DEVICES = ("cpu", "cuda", "mps", "emulated")
DEVICE_HELP = (
    "tests/test_devices.py runs on this device only, with its tensors there, and fails "
    "where there is none. mps, on a Mac: in all other tests, too, the operators of this "
    "library run on the GPU, those of tests/metal in place of the emulator; tensors stay "
    "on the CPU and are copied for each launch. Left to the CPU are float64, tests of the "
    "emulator itself, and what ON_THE_CPU in tests/conftest.py names with its reason; "
    "what counts traffic is skipped. emulated: the same, on the emulator"
)

# Files and tests that hold for the reference only.
ON_THE_CPU = {
    "test_quantize.py": "packed and dense weights give the same bits",
    "test_sums_over_blocks_of_rows_are_rounded_once": "of weights that are rounded",
    "test_arguments_that_do_not_fit_are_refused": "no such expert: on a GPU, NaN",
    "test_refusals_say_what_was_seen_and_what_to_do": "the same",
    "test_embedding_refuses_ids_that_are_no_rows": "no such row: on a GPU, NaN",
    "test_embedding_dequantizes_only_the_rows_it_needs": "watches the reference",
    "test_without_kernels_the_reference_is_checked": "a device without kernels",
    "test_without_kernels_nothing_is_run": "the same",
    "test_a_device_that_is_not_there": "the same",
    "test_there_is_nothing_to_tune_without_metal": "the same",
    "test_a_kernel_is_called_without_the_operator_only_where_nobody_watches": (
        "registers a kernel for the CPU"
    ),
}


@pytest.fixture(autouse=True)
def transformers_unregistered() -> Iterator[None]:
    """What a test registers with transformers ends with it."""
    from transformers import PreTrainedModel

    before = PreTrainedModel.__dict__["from_pretrained"]
    yield
    if PreTrainedModel.__dict__["from_pretrained"] is not before:
        PreTrainedModel.from_pretrained = before


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A command sets levels for its process; here others are tested in it afterwards."""
    loggers = [logging.getLogger(n) for n in ("affine_tensor", *QUIET)]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


QUIET = ("torch", "torchao", "transformers")


@pytest.fixture
def emulated_metal(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Kernels for MPS run on the emulator, for tensors on the CPU.

    With --device mps they run on the GPU, still for tensors on the CPU. Operators of this
    library that make operands or references belong before it.
    """
    from emulated import EmulatedMetal
    from on_device import compiler

    compile_shader = torch.mps.compile_shader
    device = EmulatedMetal(monkeypatch)
    if request.config.getoption("--device") == "mps":
        if not torch.backends.mps.is_available():
            pytest.fail("--device mps: there is no mps device on this machine")
        on_device = compiler(compile_shader, "mps")
        monkeypatch.setattr(torch.mps, "compile_shader", on_device)
    return device


@pytest.fixture(autouse=True)
def operators_of_the_device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --device mps or emulated, the operators of all tests are Metal's kernels.

    Without, they are the CPU's; what holds for the reference only has the reference.
    """
    names = {request.node.path.name, request.node.originalname}
    if names & ON_THE_CPU.keys():
        monkeypatch.setattr(settings, "cpu_backend", "reference")
        return
    if request.config.getoption("--device") in ("mps", "emulated"):
        request.getfixturevalue("emulated_metal")


def make(
    *shape: int,
    bits: int = 4,
    group_size: int = 32,
    dtype: torch.dtype = torch.float32,
    permuted: bool = False,
    seed: int = 0,
) -> AffineQuantizedTensor:
    """A packed weight of random numbers, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = AffineQuantizedTensor.from_dense(dense, bits=bits, group_size=group_size)
    if not permuted:
        return weight
    rows = torch.rand(*shape[:-2], shape[-1], generator=generator)
    return AffineQuantizedTensor.from_packed(
        weight.packed,
        weight.scales,
        weight.biases,
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        permutation=rows.argsort(-1),
    )


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def wrapped(text: str) -> str:
    """A text as it is pinned, in lines that fit a page."""
    lines = text.splitlines()
    return "\n".join(textwrap.fill(line, 76, subsequent_indent="  ") for line in lines)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "dequantizes a packed weight" in record.getMessage():
            self.lines.append(record.getMessage())


@pytest.fixture
def fallbacks() -> Iterator[list[str]]:
    """The lines that dequantizing fallbacks log during the test."""
    before = set(affine_tensor.tensor._logged)
    affine_tensor.tensor._logged.clear()
    handler = _Lines()
    logger = logging.getLogger("affine_tensor")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    affine_tensor.tensor._logged.update(before)


@pytest.fixture
def no_fallback(fallbacks: list[str]) -> Iterator[None]:
    """Fails the test if a packed weight was dequantized as a whole."""
    yield
    assert not fallbacks
