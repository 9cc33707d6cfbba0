"""What the tests of values on Metal share: formats, layouts in memory, exact rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from test_layout import FORMATS, random_parts
from torch import Tensor

from affine_tensor.kernels.metal import library as metal_library

op = torch.ops.affine_tensor
ORDERS = ("forward", "backward", "random")


def formats_with(metafunc: pytest.Metafunc, name: str, values: Sequence[Any]) -> None:
    """Parametrize `form` and `name`: all with --full, else each format with one in turn."""
    if not {"form", name} <= set(metafunc.fixturenames):
        return
    full = metafunc.config.getoption("--full")
    chosen = [
        (form, value)
        for i, form in enumerate(FORMATS)
        for j, value in enumerate(values)
        # 5 group sizes: each width and each size meets several values.
        if full or (i + i // 5 - j) % len(values) == 0
    ]
    metafunc.parametrize(("form", name), chosen, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def format_of(form: tuple[int, int]) -> dict[str, int]:
    return {"bits": form[0], "group_size": form[1]}


def words_of(parts: Any) -> tuple[Tensor, ...]:
    """Words as the operators have them."""
    return (parts[0].view(torch.int32), *parts[1:])


def replace_in_source(patch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Kernels compiled from now on are other ones."""
    source = metal_library.source

    def changed(variant: metal_library.Variant) -> str:
        text = source(variant)
        assert old in text
        return text.replace(old, new)

    patch.setattr(metal_library, "source", changed)


def shifted(part: Tensor, by: int = 1) -> Tensor:
    """The same values from another storage offset."""
    base = torch.zeros(part.numel() + by, dtype=part.dtype)
    return base[by:].view(part.shape).copy_(part)


def spread(part: Tensor) -> Tensor:
    """The same values, rows further apart and from an odd offset."""
    wide = part.new_zeros((*part.shape[:-1], part.shape[-1] + 3))
    wide[..., 1:-2] = part
    return wide[..., 1:-2]


def expert_parts(
    bits: int = 4, group_size: int = 32, lead: tuple[int, ...] = (3, 5)
) -> tuple[Tensor, Tensor, Tensor]:
    packed, scales, biases = words_of(
        random_parts(bits, group_size, torch.bfloat16, "ordinary", lead)
    )
    return packed, scales, biases


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """A fraction in `dtype`, half to even, in whole numbers all the way."""
    info = torch.finfo(dtype)
    digits = 1 - round(math.log2(info.eps))
    smallest = round(math.log2(info.tiny)) - digits + 1
    if value == 0:
        return 0.0
    place = max(_exponent(abs(value)) - digits + 1, smallest)
    whole = round(value / Fraction(2) ** place)  # half to even
    exact = whole * Fraction(2) ** place
    return math.copysign(math.inf, value) if abs(exact) > info.max else float(exact)


def _exponent(value: Fraction) -> int:
    """The largest e with 2^e <= value."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e if Fraction(2) ** e <= value else e - 1
