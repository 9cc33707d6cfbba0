"""Products with one packed weight on a CPU: ours and the peers', on the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from affine_tensor import layout

# What a peer may differ from float64: another matrix is off by 1 or more. MLX sums up in
# the dtype of x, which for bfloat16 and long rows is off by a tenth.
SANE = {torch.bfloat16: 0.3, torch.float16: 0.1, torch.float32: 1e-4}


@dataclass(frozen=True)
class Weight:
    """The shape ``[N, K]`` and the format of a weight."""

    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.n} x {self.k}, {self.format}"

    @property
    def format(self) -> str:
        name = layout.name_of(self.dtype)
        return f"{self.bits} bits, group {self.group_size}, {name}"

    @property
    def form(self) -> dict[str, int]:
        return {"bits": self.bits, "group_size": self.group_size}

    def parts(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Random words, scales and biases.

        Scales are m / 2**e, biases -c (m - d) / 2**e, where c is half the codes: any
        pair of 8 digits each for which bias + c * scale has 8 digits, too. So torch's
        int4 stands for the same matrix, and values do not fit the dtype without rounding.
        """
        generator = torch.Generator(device).manual_seed(0)

        def integers(low: int, end: int, *shape: int) -> Tensor:
            return torch.randint(low, end, shape, generator=generator, device=device)

        packed = integers(-(2**31), 2**31, self.n, self.k * self.bits // 32)
        m = integers(128, 216, self.n, self.groups)
        m *= 2 * integers(0, 2, self.n, self.groups) - 1
        d = integers(-40, 41, self.n, self.groups)
        unit = 2.0 ** (-7 - (self.bits - 1))  # the largest weights are about 1
        scales, biases = m * unit, (d - m) * (unit * 2 ** (self.bits - 1))
        return packed.int(), scales.to(self.dtype), biases.to(self.dtype)

    @property
    def groups(self) -> int:
        return self.k // self.group_size

    def x(self, rows: int, device: str = "cpu") -> Tensor:
        generator = torch.Generator(device).manual_seed(rows)
        x = torch.randn(rows, self.k, generator=generator, device=device)
        return x.to(self.dtype)


def exact_product(weight: Weight, parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """``x @ W.T`` in float64, some rows of W at a time."""
    exact = torch.empty(len(x), weight.n, dtype=torch.float64, device=x.device)
    x = x.double()
    for start in range(0, weight.n, 512):
        words, scales, biases = (part[start : start + 512] for part in parts)
        codes = layout.unpack(words.view(torch.uint32), bits=weight.bits).double()
        grouped = codes.unflatten(-1, (weight.groups, weight.group_size))
        dense = grouped * scales.double()[..., None] + biases.double()[..., None]
        exact[:, start : start + 512] = x @ dense.flatten(-2).mT
    return exact


def difference(y: Tensor, exact: Tensor) -> float:
    """Relative L2 distance from the exact product."""
    return float((y.double() - exact).norm() / exact.norm())


def one_rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """The same of the exact product itself, rounded once to a dtype."""
    return difference(exact.to(dtype), exact)


def allowed(name: str, dtype: torch.dtype, rounding: float) -> float:
    """How much a contestant may differ; ours are held to one rounding."""
    if name != "ours":
        return SANE[dtype]
    return 1e-6 if dtype == torch.float32 else 1.5 * rounding


# ---- contestants ----------------------------------------------------------------


class Missing(Exception):
    """Why a peer is not there."""


@dataclass
class Contestant:
    """Multiplies x with a copy of the weight."""

    copies: list[Any]  # together larger than caches
    multiply: Callable[[Any, Any], Any]
    take: Callable[[Tensor], Any] = lambda x: x  # what it makes of x beforehand
    give: Callable[[Any], Tensor] = lambda y: y


Maker = Callable[[Weight, tuple[Tensor, Tensor, Tensor], int], Contestant]


def copies_of(tensors: tuple[Tensor, ...], total: int) -> list[tuple[Tensor, ...]]:
    """At least two, of `total` bytes or more together."""
    size = sum(tensor.nbytes for tensor in tensors)
    return [
        tuple(tensor.clone() for tensor in tensors)
        for _ in range(max(2, math.ceil(total / size)))
    ]


def ours(
    weight: Weight, parts: tuple[Tensor, Tensor, Tensor], total: int
) -> Contestant:
    linear = torch.ops.affine_tensor.linear.default
    form = {**weight.form, "dtype": weight.dtype}
    return Contestant(
        copies_of(parts, total), lambda x, own: linear(x, *own, None, None, **form)
    )


def int4pack(
    weight: Weight, parts: tuple[Tensor, Tensor, Tensor], total: int
) -> Contestant:
    """torch's int4 on its own repacked words, which torchao calls on a CPU."""
    if weight.bits != 4:
        raise Missing("it has 4 bits only")
    packed, scales, biases = parts
    zeros = biases.double() + 8 * scales.double()  # it computes (code - 8) * s + z
    if not torch.equal(zeros.to(weight.dtype).double(), zeros):
        raise Missing(f"the weight is not exact in its form in {weight.dtype}")
    pairs = torch.stack([scales, zeros.to(weight.dtype)], -1)  # [N, K / g, 2]
    codes = layout.unpack(packed.view(torch.uint32), bits=4).to(torch.int32)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    own = (words, pairs.transpose(0, 1).contiguous())
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    return Contestant(
        copies_of(own, total),
        lambda x, own: multiply(x, own[0], weight.group_size, own[1]),
    )


def dense(
    weight: Weight, parts: tuple[Tensor, Tensor, Tensor], total: int
) -> Contestant:
    """torch's product with the weight made dense, rounded to the dtype."""
    values = layout.dequantize(*parts, **weight.form, dtype=weight.dtype)
    return Contestant(copies_of((values,), total), lambda x, own: F.linear(x, own[0]))


def mlx(weight: Weight, parts: tuple[Tensor, Tensor, Tensor], total: int) -> Contestant:
    try:
        import mlx.core as mx
    except ImportError as error:
        raise Missing("not installed") from error
    mx.set_default_device(mx.cpu)

    def to_mlx(tensor: Tensor) -> Any:
        if tensor.dtype == torch.bfloat16:
            return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())

    def multiply(x: Any, own: Any) -> Any:
        y = mx.quantized_matmul(x, *own, **weight.form)
        mx.eval(y)
        return y

    words, *others = parts
    copies = [
        tuple(map(to_mlx, (copy[0].view(torch.uint32), *copy[1:])))
        for copy in copies_of((words, *others), total)
    ]
    mx.eval(copies)
    return Contestant(
        copies, multiply, to_mlx, lambda y: torch.tensor(y.astype(mx.float32).tolist())
    )


MAKERS: dict[str, Maker] = {
    "ours": ours,
    "int4pack": int4pack,
    "dense": dense,
    "mlx": mlx,
}
WHAT = {
    "ours": "`torch.ops.affine_tensor.linear` on the MLX words",
    "int4pack": "torch's `_weight_int4pack_mm_for_cpu` on its repacked words",
    "dense": "`F.linear` with the weight made dense in the same dtype",
    "mlx": "`mx.quantized_matmul` on the CPU",
}


def made(
    weight: Weight, parts: tuple[Tensor, Tensor, Tensor], total: int
) -> Iterator[tuple[str, Contestant | str]]:
    """Each contestant, or the reason why it is not there."""
    for name, make in MAKERS.items():
        try:
            yield name, make(weight, parts, total)
        except (Missing, RuntimeError, ValueError) as error:
            yield name, str(error).splitlines()[0]
