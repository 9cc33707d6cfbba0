"""MLX's Metal kernels for affine weights: sources, launches, and what they must return.

The kernels come with the installed ``mlx`` wheel as headers. Nothing of them is copied
or changed: a source here includes them and names instantiations. What a kernel must
return is computed in float64, or from the arithmetic that the header states.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KERNELS = "mlx/backend/metal/kernels"
TYPES = {
    "float": torch.float32,
    "float16_t": torch.float16,
    "bfloat16_t": torch.bfloat16,
}
GROUP_SIZES = (32, 64, 128)
FLOAT_ROUNDOFF = 2.0**-24


class HeadersMissing(Exception):
    """MLX is not installed, or came without its Metal headers."""


@dataclass(frozen=True)
class Headers:
    """MLX's headers, and what differs between the versions of them."""

    folder: Path

    @cached_property
    def text(self) -> str:
        return (self.folder / KERNELS / "quantized.h").read_text(encoding="utf-8")

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of codes; the 1-bit ones came after the others."""
        return (1,) * ("bits == 1" in self.text) + (2, 3, 4, 5, 6, 8)

    @property
    def partial_rows(self) -> bool:
        """Whether qmv_fast can be asked for outputs that are no multiple of 8."""
        return "bool partial_rows" in self.text

    @property
    def reads_past_n(self) -> bool:
        """Whether qmm_t reads weights past N where N is not a multiple of 32.

        The loader of tiles compared a row with the width of its tile, not its height.
        """
        return "bi >= src_tile_dim.x" in self.text

    @property
    def dequantizes_in_type(self) -> bool:
        """Whether qmm_t rounds to T twice in scale * code + bias, not once."""
        return "float s = float(scale)" not in self.text

    def sums_in_type(self, bits: int) -> bool:
        """Whether qmv adds up neighbours of x in T before it widens them."""
        return bits == 1 or (bits != 8 and "U(x[i]) + U(x[i + 1])" not in self.text)


def installed_headers() -> Headers:
    """The headers in the installed wheel; raises HeadersMissing with the reason."""
    try:
        core = importlib.import_module("mlx.core")
    except ImportError as error:
        raise HeadersMissing(f"MLX is not installed: {error}") from error
    folder = Path(str(core.__file__)).parent / "include"
    if not (folder / KERNELS / "quantized.h").is_file():
        raise HeadersMissing(
            f"this MLX has no Metal headers in {folder.name}/{KERNELS}"
        )
    return Headers(folder)


@dataclass(frozen=True)
class Variant:
    """One instantiation of a kernel template of MLX."""

    kernel: str
    type: str
    group_size: int
    bits: int
    flags: tuple[bool, ...] = ()

    @property
    def name(self) -> str:
        flags = "".join(f"_{flag:d}" for flag in self.flags)
        return f"{self.kernel}_{self.type}_gs_{self.group_size}_b_{self.bits}{flags}"

    @property
    def instantiation(self) -> str:
        flags = "".join(f", {str(flag).lower()}" for flag in self.flags)
        function = f"{self.kernel}<{self.type}, {self.group_size}, {self.bits}{flags}>"
        return (
            f'template [[host_name("{self.name}")]] [[kernel]] '
            f"decltype({function}) {function};"
        )


def source(variants: Iterable[Variant]) -> str:
    """What MLX's own quantized.metal does, for the variants asked for."""
    names = ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
    lines = [f'#include "{KERNELS}/{name}"' for name in names]
    lines += [variant.instantiation for variant in variants]
    return "\n".join(lines) + "\n"


# Packed weights


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as the bytes of a little-endian stream of bits for each row."""
    planes = (codes.unsqueeze(-1) >> torch.arange(bits)) & 1
    octets = planes.reshape(*codes.shape[:-1], -1, 8)
    return (octets << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes in a little-endian stream of bits for each row."""
    planes = (packed.long().unsqueeze(-1) >> torch.arange(8)) & 1
    values = planes.reshape(*packed.shape[:-1], -1, bits)
    return (values << torch.arange(bits)).sum(-1)


@dataclass(frozen=True)
class Weights:
    """A packed weight [..., N, K] with its scales and biases [..., N, K/group]."""

    codes: Tensor
    scales: Tensor
    biases: Tensor
    bits: int

    @cached_property
    def packed(self) -> Tensor:
        return pack(self.codes, self.bits)

    def spread(self, per_group: Tensor) -> Tensor:
        """A value a group as a float64 value a weight."""
        size = self.codes.shape[-1] // per_group.shape[-1]
        return per_group.double().repeat_interleave(size, -1)

    @property
    def dense(self) -> Tensor:
        """scale * code + bias in float64: exact, or close to it beside any bound here."""
        return self.spread(self.scales) * self.codes + self.spread(self.biases)

    @property
    def magnitude(self) -> Tensor:
        """|scale| * code + |bias|: what roundings on the way are relative to."""
        scales, biases = self.spread(self.scales), self.spread(self.biases)
        return scales.abs() * self.codes + biases.abs()

    def padded(self, multiple: int) -> Weights:
        """The same with rows added, for kernels that read past the last one."""
        extra = -self.codes.shape[-2] % multiple
        parts = (self.codes, self.scales, self.biases)
        more = (torch.nn.functional.pad(part, (0, 0, 0, extra)) for part in parts)
        return Weights(*more, self.bits)


# Launches: the grids and groups of MLX's host code


def nan_filled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def _int32(*indices: int) -> dict[int, str]:
    return dict.fromkeys(indices, "int32")


def run_qmv(kernel: Any, weights: Weights, x: Tensor) -> Tensor:
    """y[M, N] of affine_qmv or affine_qmv_fast: 4 rows of weights a simdgroup."""
    (m, k), n = x.shape, weights.codes.shape[0]
    y = nan_filled((m, n), x.dtype)
    kernel(
        *(weights.packed, weights.scales, weights.biases, x, y, k, n),
        threads=(32 * m, 2 * -(-n // 8), 1),
        group_size=(32, 2, 1),
        arg_casts=_int32(5, 6),
    )
    return y


def run_batched_qmv(kernel: Any, weights: Weights, x: Tensor) -> Tensor:
    """y[A, B, M, N]: each of x[A, M, K] with each of weights[B, N, K].

    There are two batch dimensions, and each operand is broadcast over one of them.
    """
    (a, m, k), (b, n, _) = x.shape, weights.codes.shape
    y = nan_filled((a, b, m, n), x.dtype)
    words, groups = k * weights.bits // 32, weights.scales.shape[-1]
    per_group = [0, n * groups, groups, 1]
    kernel(
        *(weights.packed, weights.scales, weights.biases, x, y, k, n),
        *(2, [a, b, m, k], [m * k, 0, k, 1]),
        *(2, [a, b, n, words], [0, n * words, words, 1], per_group, per_group),
        threads=(32 * m, 2 * -(-n // 8), a * b),
        group_size=(32, 2, 1),
        arg_casts=_int32(5, 6, 7, 8, 10, 11),
    )
    return y


def run_qmm(kernel: Any, weights: Weights, x: Tensor, n: int | None = None) -> Tensor:
    """y[M, N] of affine_qmm_t: 32 by 32 values a threadgroup of four simdgroups."""
    m, k = x.shape
    n = weights.codes.shape[-2] if n is None else n
    y = nan_filled((m, n), x.dtype)
    kernel(
        *(weights.packed, weights.scales, weights.biases, x, y, k, n, m),
        threads=(32 * -(-n // 32), 2 * -(-m // 32), 2),
        group_size=(32, 2, 2),
        arg_casts=_int32(5, 6, 7),
    )
    return y


def run_quantize(
    kernel: Any,
    values: Tensor,
    codes: Tensor,
    group_size: int,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and biases of affine_quantize: a thread for a 32nd of a group.

    The codes' bytes are written to codes. With a width, the grid is of two dimensions.
    """
    threads = values.numel() * 32 // group_size
    scales = nan_filled(
        (*values.shape[:-1], values.shape[-1] // group_size), values.dtype
    )
    biases = nan_filled(scales.shape, values.dtype)
    kernel(values, codes, scales, biases, **_grid(threads, width))
    return scales, biases


def run_dequantize(kernel: Any, weights: Weights, width: int | None = None) -> Tensor:
    """The weights of affine_dequantize: a thread for the least whole bytes of codes."""
    values = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 8: 1}[weights.bits]
    dense = nan_filled(weights.codes.shape, weights.scales.dtype)
    operands = (weights.packed, weights.scales, weights.biases, dense)
    kernel(*operands, **_grid(dense.numel() // values, width))
    return dense


def _grid(threads: int, width: int | None) -> dict[str, tuple[int, ...]]:
    """One dimension, as MLX has it below 2^32 threads, or two."""
    if width is None:
        return {"threads": (threads,), "group_size": (min(threads, 1024),)}
    return {"threads": (width, threads // width), "group_size": (32, 2)}


# What the kernels must return


def _gamma(steps: int, roundoff: float = FLOAT_ROUNDOFF) -> float:
    """The largest relative error of so many roundings, one on top of the other."""
    return steps * roundoff / (1 - steps * roundoff)


def _smallest(dtype: torch.dtype) -> float:
    """What a rounding below the normal numbers can be off by."""
    limits = torch.finfo(dtype)
    return limits.tiny * limits.eps / 2


def _stored(exact: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound on a float that is off by so much, once it is rounded to T."""
    if dtype == torch.float32:
        return error
    roundoff = torch.finfo(dtype).eps / 2
    return error + roundoff * (exact.abs() + error) + _smallest(dtype)


def expected_qmv(
    headers: Headers, weights: Weights, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far qmv may be off in whatever order it adds.

    In float, a lane multiplies x (times a power of two) by masked codes, at most 32 of
    them a block and a code that straddles bytes as two products, scales the sum, adds
    bias * sum(x), and adds up its blocks, which are of at least 128 values; then 32
    lanes are added. A term passes through at most 1 + 48 + 2 + K/128 + 31 roundings.
    """
    exact = x.double() @ weights.dense.mT
    size = x.double().abs()
    error = _gamma(82 + x.shape[-1] // 128) * (size @ weights.magnitude.mT)
    if headers.sums_in_type(weights.bits) and x.dtype != torch.float32:
        # Up to eight neighbours of x are added in T first: seven more roundings.
        biases = weights.spread(weights.biases).abs()
        error += _gamma(7, torch.finfo(x.dtype).eps / 2) * (size @ biases.mT)
    return exact, _stored(exact, error, x.dtype)


def expected_qmm(
    headers: Headers, weights: Weights, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far qmm_t may be off in whatever order it adds.

    A weight is scale * code + bias in float, two roundings, rounded to T; older headers
    take both roundings in T. Products and sums over K are in float: a term passes
    through at most 1 + K roundings.
    """
    exact = x.double() @ weights.dense.mT
    size, roundoff = x.double().abs(), torch.finfo(x.dtype).eps / 2
    if headers.dequantizes_in_type:
        off = _gamma(2, roundoff) * weights.magnitude
        off += (1 + 2**weights.bits) * _smallest(x.dtype)
    else:
        off = _gamma(2) * weights.magnitude
        off = _stored(weights.dense, off, x.dtype)
    sums = _gamma(1 + x.shape[-1]) * (weights.dense.abs() + off)
    return exact, _stored(exact, size @ (off + sums).mT, x.dtype)


def expected_dequantize(weights: Weights) -> Tensor:
    """scale * code + bias in T, each of the two operations rounded."""
    dtype = weights.scales.dtype
    scaled = weights.codes.to(dtype) * weights.spread(weights.scales).to(dtype)
    return scaled + weights.spread(weights.biases).to(dtype)


def _half_away(value: Tensor) -> Tensor:
    whole = value.trunc()
    return whole + value.sign() * ((value - whole).abs() >= 0.5)


def expected_quantize(
    values: Tensor, bits: int, group_size: int, *, on_metal: bool = True
) -> Weights:
    """Codes, scales and biases of [..., K] by the rule of the Metal kernel, in float.

    By that rule a half is rounded away from zero and the maximum starts at 0; MLX on a
    CPU rounds a half to even and takes the true maximum. The codes come from scale and
    bias before these are rounded to T.
    """
    nearest = _half_away if on_metal else torch.round
    groups = values.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    if on_metal:
        high = high.clamp(min=0)
    eps, bins = torch.tensor(1e-7), 2**bits - 1
    if bits == 1:
        scale, bias = torch.maximum(high - low, eps), low
    else:
        scale = torch.maximum((high - low) / bins, eps)
        below = low.abs() > high.abs()
        scale = torch.where(below, scale, -scale)
        edge = torch.where(below, low, high)
        steps = nearest(edge / scale)
        scale = torch.where(steps == 0, scale, edge / steps)
        bias = torch.where(steps == 0, 0.0, edge)
    codes = nearest((groups - bias.unsqueeze(-1)) / scale.unsqueeze(-1))
    codes = codes.clamp(0, bins).flatten(-2).long()
    return Weights(codes, scale.to(values.dtype), bias.to(values.dtype), bits)
