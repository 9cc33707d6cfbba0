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

# The shapes here are small: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all combinations, which takes an hour"
    )


@pytest.fixture
def emulated_metal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels for MPS run on the emulator, for tensors on the CPU.

    Operators of this library that make operands or references belong before it.
    """
    from emulated import EmulatedMetal

    return EmulatedMetal(monkeypatch)


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
