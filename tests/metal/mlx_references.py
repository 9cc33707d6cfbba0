"""What MLX's Metal kernels must return, and inputs to show whether they do.

Products are computed in float64, with bounds that follow from the kernels' arithmetic;
quantizing and dequantizing by the rules that the kernels' header states.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FLOAT_ROUNDOFF = 2.0**-24


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
    weights: Weights, x: Tensor, *, sums_in_type: bool
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
    if sums_in_type and x.dtype != torch.float32:
        # Up to eight neighbours of x are added in T first: seven more roundings.
        biases = weights.spread(weights.biases).abs()
        error += _gamma(7, torch.finfo(x.dtype).eps / 2) * (size @ biases.mT)
    return exact, _stored(exact, error, x.dtype)


def expected_qmm(
    weights: Weights, x: Tensor, *, dequantizes_in_type: bool
) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far qmm_t may be off in whatever order it adds.

    A weight is scale * code + bias in float, two roundings, rounded to T; older headers
    take both roundings in T. Products and sums over K are in float: a term passes
    through at most 1 + K roundings.
    """
    exact = x.double() @ weights.dense.mT
    size, roundoff = x.double().abs(), torch.finfo(x.dtype).eps / 2
    if dequantizes_in_type:
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


# Inputs


class Inputs:
    """Random inputs of a seed: normal ones, and whole ones with exact products."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def product(
        self,
        shape: tuple[int, int, int],
        group_size: int,
        bits: int,
        dtype: torch.dtype,
    ) -> tuple[Weights, Tensor]:
        """Weights and x of normal numbers, scales of both signs."""
        m, n, k = shape
        codes = self.whole(0, 2**bits - 1, n, k)
        scales = self.normal(n, k // group_size) / 2**bits
        biases = self.normal(n, k // group_size)
        weights = Weights(codes, scales.to(dtype), biases.to(dtype), bits)
        return weights, self.normal(m, k).to(dtype)

    def whole_product(
        self,
        shape: tuple[int, int, int],
        group_size: int,
        bits: int,
        dtype: torch.dtype,
    ) -> tuple[Weights, Tensor]:
        """Such that no operation in T or in float rounds, but the last one."""
        m, n, k = shape
        codes = self.whole(0, 2**bits - 1, n, k)
        scales = 0.5 ** self.whole(0, 2, n, k // group_size)
        scales *= self.whole(0, 1, n, k // group_size) * 2 - 1
        biases = -scales * self.whole(0, 2**bits - 1, n, k // group_size)
        weights = Weights(codes, scales.to(dtype), biases.to(dtype), bits)
        x = self.whole(-3, 3, m, k)
        # Sums are multiples of a quarter, of fewer than 24 bits: exact in any order.
        assert (x.double().abs() @ weights.magnitude.mT).max() * 4 < 2**24
        return weights, x.to(dtype)

    def tied(self, count: int, size: int, bits: int, scale: float) -> Tensor:
        """Groups of which all but the edges lie halfway between two codes."""
        # Of eight bits at most, which a bfloat16 holds.
        values = self.whole(0, min(2**bits, 128) - 2, count, size) + 0.5
        values[:, 0], values[:, 1] = 0, 2**bits - 1
        return values * scale

    def tied_edges(self, count: int, size: int, bits: int) -> Tensor:
        """Groups whose larger edge lies halfway between two multiples of the scale."""
        bins = 2**bits - 1
        edge = bins // 2 + 1.5
        values = self.whole(0, max(0, bins // 2 - 1), count, size).double()
        values[:, 1], values[:, 2] = edge, edge - bins
        values[::2] *= -1
        return values / 4

    def negative(self, count: int, size: int) -> Tensor:
        return -1 - self.normal(count, size).abs()

    def to_quantize(self, size: int, bits: int) -> Tensor:
        """Groups of values, two a row, random and adversarial."""
        single = torch.zeros(2, size)
        single[0, 5], single[1, size - 1] = 3.0, -3.0
        groups = [
            self.normal(12, size),
            self.normal(2, size) * 1000,
            self.normal(2, size) * 1e-7,
            self.whole(-16, 16, 8, size) / 8,
            self.tied(4, size, bits, 0.125),
            self.tied(4, size, bits, -0.25),
            self.tied_edges(4, size, bits),
            self.negative(4, size),
            -self.negative(4, size),
            torch.tensor([[0.3], [-0.3], [1000.0], [-1e-6]]).expand(4, size),
            torch.zeros(2, size),
            single,
        ]
        return torch.cat(groups).view(-1, 2 * size)
