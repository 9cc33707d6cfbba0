"""One call of an operator: its operands, made on the CPU, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from .. import layout, ops

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
EXPERTS = 4


@dataclass(frozen=True)
class Format:
    bits: int
    group_size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        name = layout.name_of(self.dtype)
        return f"{self.bits} bits, group {self.group_size}, {name}"

    @property
    def form(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size}


@dataclass
class Call:
    """An operator's arguments, and its result in float64 (or exactly, for `quantize`).

    sizes: the sums of the absolute products. squares: the sums of their squares.
    """

    op: str
    args: tuple[Tensor | None, ...]
    keywords: dict[str, Any]
    exact: tuple[Tensor, ...]
    sizes: Tensor | None = None
    squares: Tensor | None = None
    named: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        x = self.args[0]
        assert x is not None
        return f"{self.op} of {list(x.shape)}"

    def run(self, device: torch.device) -> tuple[Tensor, ...]:
        """What comes out on a device, on the CPU."""
        args = [None if a is None else _there(a, device) for a in self.args]
        named = {name: _there(a, device) for name, a in self.named.items()}
        result = ops.overload(self.op)(*args, **named, **self.keywords)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(one.cpu() for one in results)

    def judge(self, results: tuple[Tensor, ...], rounds: bool) -> tuple[float, str]:
        """The largest error over its bound, and what is wrong, if anything.

        `rounds`: the weight may have been rounded to the dtype of x.
        """
        if self.op == "quantize":
            return _judge_codes(results, self.exact)
        y, exact = results[0], self.exact[0]
        bound = error_bound(y.dtype, exact, self.sizes)
        if rounds and self.squares is not None:
            bound = bound + 4 * UNIT[y.dtype] * self.squares.sqrt()
        return compare(y, exact, bound)


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, at the same offset in its storage."""
    offset = tensor.storage_offset()
    if not offset or device.type == "cpu":
        return tensor.to(device)
    room = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device=device)
    return room[offset:].view(tensor.shape).copy_(tensor)


def error_bound(dtype: torch.dtype, exact: Tensor, sizes: Tensor | None) -> Tensor:
    """What float32 sums and one rounding to the dtype explain."""
    smallest = torch.finfo(dtype).smallest_normal
    bound = UNIT[dtype] * exact.abs().clamp_min(smallest)
    return bound if sizes is None else bound + 32 * 2.0**-24 * sizes


def compare(y: Tensor, exact: Tensor, bound: Tensor) -> tuple[float, str]:
    """The largest error over its bound, and what is wrong, if anything."""
    if y.shape != exact.shape:
        return float("inf"), f"its shape is {list(y.shape)}, not {list(exact.shape)}"
    ratio = (y.double() - exact).abs() / bound
    ratio = ratio.nan_to_num(float("inf"), float("inf"))
    worst = float(ratio.max()) if ratio.numel() else 0.0
    if worst <= 1:
        return worst, ""
    first = [int(i) for i in (ratio > 1).nonzero()[0]]
    got, wanted = float(y[tuple(first)]), float(exact[tuple(first)])
    return worst, (
        f"{int((ratio > 1).sum())} of {y.numel()} elements are wrong, the first at "
        f"{first}: {got:.6g} for {wanted:.6g}"
    )


def _judge_codes(
    results: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> tuple[float, str]:
    for name, mine, wanted in zip(
        ("words", "scales", "biases"), results, exact, strict=True
    ):
        if not torch.equal(mine, wanted):
            wrong = int((mine != wanted).sum())
            return float("inf"), f"{wrong} of {mine.numel()} {name} differ"
    return 0.0, ""


class Maker:
    """Makes calls of one format: plain ones, and awkward ones.

    Awkward: few ragged rows, a permutation and a bias where the operator takes them,
    float32 scales, inputs that begin at an odd place.
    """

    def __init__(self, format: Format, random: Random, *, large: bool) -> None:
        self.format = format
        self.awkward = random.random() < 0.5
        self.random = random
        self.generator = torch.Generator().manual_seed(random.randrange(1 << 30))
        if self.awkward:
            self.n, self.k = 37, 3 * max(32, format.group_size)
        else:
            self.n, self.k = (136, 2048) if large else (64, 512)

    def _normal(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator)
        return values.to(self.format.dtype)

    def _shifted(self, x: Tensor) -> Tensor:
        if not self.awkward:
            return x
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    def _weight(self, *lead: int) -> tuple[list[Tensor], Tensor]:
        """Packed, scales and biases, and the dense weight in float64."""
        dense = self._normal(*lead, self.n, self.k)
        dense = dense.float() if self.awkward else dense
        packed, scales, biases = layout.quantize(dense, **self.format.form)
        exact = layout.dequantize(
            packed, scales, biases, **self.format.form, dtype=torch.float64
        )
        return [packed.view(torch.int32), scales, biases], exact

    def _permutation(self, dense: Tensor) -> tuple[Tensor | None, Tensor]:
        """A permutation where it is one's turn, and the dense weight that follows it."""
        if not self.awkward:
            return None, dense
        order = torch.rand(dense.shape[-1], generator=self.generator).argsort()
        columns = order.expand_as(dense)
        if dense.dim() == 3:
            order = order.expand(len(dense), -1).contiguous()
        return order.int(), torch.empty_like(dense).scatter_(-1, columns, dense)

    @property
    def keywords(self) -> dict[str, Any]:
        return {**self.format.form, "dtype": self.format.dtype}

    def linear(self, rows: int) -> Call:
        parts, dense = self._weight()
        permutation, dense = self._permutation(dense)
        x = self._normal(rows, self.k)
        bias = self._normal(self.n) if self.awkward else None
        exact, sizes, squares = products(x, dense.mT)
        if bias is not None:
            exact, sizes = exact + bias.double(), sizes + bias.double().abs()
        args = (self._shifted(x), *parts, permutation, bias)
        return Call("linear", args, self.keywords, (exact,), sizes, squares)

    def matmul(self, rows: int) -> Call:
        parts, dense = self._weight()
        permutation, dense = self._permutation(dense)
        x = self._normal(rows, self.n)
        exact, sizes, squares = products(x, dense)
        args = (self._shifted(x), *parts, permutation)
        return Call("matmul", args, self.keywords, (exact,), sizes, squares)

    def grouped(self, op: str, rows: int, by: str) -> Call:
        """`by`: "offsets" (one expert has no rows) or "indices"."""
        parts, dense = self._weight(EXPERTS)
        permutation, dense = self._permutation(dense)
        owners = torch.randint(EXPERTS, (rows,), generator=self.generator)
        owners = torch.where(owners == 1, 2, owners)
        if by == "offsets":
            owners = owners.sort().values
            counts = torch.bincount(owners, minlength=EXPERTS)
            named = {"offsets": counts.cumsum(0).to(torch.int32)}
        else:
            named = {"indices": owners}
        transposed = op == "grouped_matmul"
        x = self._normal(rows, self.n if transposed else self.k)
        dense = dense if transposed else dense.mT
        sums = torch.empty(3, rows, dense.shape[-1], dtype=torch.float64)
        for expert in range(EXPERTS):
            own = owners == expert
            sums[:, own] = torch.stack(products(x[own], dense[expert]))
        exact, sizes, squares = sums
        args = (self._shifted(x), *parts, permutation)
        return Call(op, args, self.keywords, (exact,), sizes, squares, named)

    def embedding(self, index: torch.dtype) -> Call:
        parts, dense = self._weight()
        ids = torch.randint(self.n, (3, 5), generator=self.generator)
        args = (ids.to(index), *parts)
        return Call("embedding", args, self.keywords, (dense[ids],))

    def dequantize(self) -> Call:
        parts, dense = self._weight()
        permutation, dense = self._permutation(dense)
        return Call("dequantize", (*parts, permutation), self.keywords, (dense,))

    def quantize(self) -> Call:
        dense = self._shifted(self._normal(self.n, self.k))
        packed, scales, biases = layout.quantize(dense, **self.format.form)
        exact = (packed.view(torch.int32), scales, biases)
        return Call("quantize", (dense,), self.format.form, exact)


def products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x @ weight`` in float64, the sums of absolute products and of their squares."""
    x = x.double()
    return x @ weight, x.abs() @ weight.abs(), x.square() @ weight.square()
