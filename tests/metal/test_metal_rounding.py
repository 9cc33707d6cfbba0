"""Dequantize on emulated Metal rounds once: against fractions, with sums fused or not."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import metal_emulator as emulator
import pytest
import torch
from metal_emulator import compilers
from value_cases import op, replace_in_source, rounded

from affine_tensor import layout
from affine_tensor.kernels.metal import library as metal_library
from affine_tensor.kernels.metal import values as metal_values
from affine_tensor.layout import WEIGHT_DTYPES

each_pair = pytest.mark.parametrize(
    ("scale_dtype", "dtype"),
    list(itertools.product(WEIGHT_DTYPES, WEIGHT_DTYPES)),
    ids=str,
)


@pytest.fixture(autouse=True)
def metal(emulated_metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those on MPS, the emulator for Metal."""
    monkeypatch.setattr(metal_values, "_plans", {})


@pytest.fixture
def fresh(metal: None, emulated_metal: Any) -> None:
    """Nothing is compiled yet."""
    emulated_metal.forget()


# By scale and bias; where float32 rounds first, or float64 does, some weight is off.
TIES = {
    "product on a tie": (1025 / 64, 2.0**-20),
    "just below it": (1025 / 64, -(2.0**-20)),
    "negative": (-1025 / 64, 2.0**-20),
    "of bfloat16": (129 / 64, 2.0**-20),
    "of bfloat16, below": (129 / 64, -(2.0**-20)),
    "further than float64 reaches": (129 * 2.0**6, 2.0**-100),
    "and below": (1025 * 2.0**-6, -(2.0**-100)),
    "product next to a tie": (3077 / 64 / 3, 0.0),
    "product next to a tie of bfloat16": (389 / 64 / 3, 0.0),
    "bias on a tie": (2.0**-30, 3075 / 64),
    "bias on a tie of bfloat16": (-(2.0**-30), 387 / 64),
    "sum next to a tie": (1 / 3, 1024.0),
    "cancels": (1 / 3, -1.0),
    "cancels to a rest": (0.1, -0.3),
    "subnormal": (2.0**-24 * 3, 2.0**-25),
    "of bfloat16, subnormal": (2.0**-133 * 5, 2.0**-130),
    "of float32, subnormal": (2.0**-149 * 5001, -(2.0**-148)),
    "the largest": (2e38, -3e38),
    "the largest, bias tiny": (1e38, 1e-38),
    "infinite product": (3.3e38, -3.2e38),
    "infinite": (3.3e38, 3.2e38),
}


def check_exact(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """All codes of 8 bits with each pair above."""
    pairs = torch.tensor(list(TIES.values()), dtype=torch.float64)
    finite = torch.finfo(scale_dtype).max
    pairs = pairs.clamp(-finite, finite).to(scale_dtype)
    scales, biases = (part.contiguous() for part in pairs.t()[..., None])  # [cases, 1]
    codes = torch.arange(256, dtype=torch.int32).expand(len(pairs), -1)
    packed = layout.pack(codes, bits=8).view(torch.int32)
    kind = {"bits": 8, "group_size": 256, "dtype": dtype}
    ours = op.dequantize(packed, scales, biases, **kind)
    for name, row, scale, bias in zip(
        TIES, ours.tolist(), scales.tolist(), biases.tolist(), strict=True
    ):
        for code in range(256):
            exact = code * Fraction(scale[0]) + Fraction(bias[0])
            assert row[code] == rounded(exact, dtype), (name, code)


@each_pair
def test_dequantize_is_exact_arithmetic_rounded_once(
    scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    check_exact(scale_dtype, dtype)


@pytest.fixture
def contracted(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fuses products and sums wherever it can."""
    flags = [flag for flag in compilers.KERNEL if not flag.startswith("-ffp-contract")]
    assert len(flags) < len(compilers.KERNEL)
    flags.append("-ffp-contract=fast")
    monkeypatch.setattr(compilers, "KERNEL", flags)
    probe = emulator.compile_shader("""
        #include <metal_stdlib>
        kernel void fused(device float* x) { x[3] = x[0] * x[1] + x[2]; }""")
    x = torch.tensor([1 + 2**-20, 1 - 2**-20, -1.0, 0.0])
    probe.fused(x, threads=1, group_size=1)
    if x[3] == 0.0:
        pytest.skip("this compiler fuses nothing where it may")
    assert x[3] == -(2.0**-40)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES[1:], ids=str)
@pytest.mark.parametrize("scale_dtype", WEIGHT_DTYPES, ids=str)
def test_dequantize_is_exact_if_the_compiler_fuses(
    scale_dtype: torch.dtype, dtype: torch.dtype, contracted: None
) -> None:
    check_exact(scale_dtype, dtype)


# What a compiler may make of it that this one does not.
FUSED = {
    "in the difference": (
        "return rest_of_sum(code * scale, bias, nearest);",
        """const float other = fma(-code, scale, nearest);
        return (code * scale - (nearest - other)) + (bias - other);""",
        torch.bfloat16,
    ),
    "in both differences": (
        "return rest_of_sum(code * scale, bias, nearest);",
        """const float other = fma(-code, scale, nearest);
        return fma(code, scale, -(nearest - other)) + (bias - other);""",
        torch.float16,
    ),
    "the high product": (
        "code * high + code * (scale - high)",
        "fma(code, high, code * (scale - high))",
        torch.float32,
    ),
    "the low product": (
        "code * high + code * (scale - high)",
        "fma(code, scale - high, code * high)",
        torch.float32,
    ),
    "the sum": (  # a wrong one, to see that it shows
        "const float product = code * high + code * (scale - high)",
        "const float product = fma(code, scale, bias)",
        torch.float32,
    ),
}


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", FUSED)
def test_dequantize_is_exact_however_it_is_fused(
    case: str, dtype: torch.dtype, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, fused, scale_dtype = FUSED[case]
    replace_in_source(monkeypatch, text, fused)
    if case == "the sum":
        with pytest.raises(metal_library.KernelError):
            check_exact(scale_dtype, dtype)
    else:
        check_exact(scale_dtype, dtype)
