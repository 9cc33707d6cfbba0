"""The check of each kernel on first use: a small product against float64 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import layout
from .library import Kernel
from .plans import Choice, Product, grid

# Said each time: programs change torch's defaults.
_HERE: Any = {"device": "cpu", "dtype": torch.float32}

_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def compare(
    product: Product, choice: Choice, kernel: Kernel, device: torch.device
) -> str | None:
    """What is wrong with a kernel, or None.

    A product of the same kind is made of it, small and ragged, and compared with that of
    the dequantized weight in float64.
    """
    case = Case(product, choice)
    return case.differences(case.run(kernel, device))


class Case:
    """A small product of one kind, its operands as kernels take them, and its result."""

    def __init__(self, product: Product, choice: Choice) -> None:
        self.product = small = _small(product, choice)
        self.choice = choice
        generator = torch.Generator("cpu").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, **_HERE)

        form = {"bits": small.bits, "group_size": small.group_size}
        lead = (small.experts, small.n) if small.experts else (small.n,)
        weight = normal(*lead, small.k).to(small.scale_dtype)
        packed, scales, biases = layout.quantize(weight, **form)
        self.parts = [packed.view(torch.int32), scales, biases]
        self.dense = layout.dequantize(
            packed, scales, biases, **form, dtype=torch.float64
        )
        # Rows farther apart than they are long, as those of a slice are.
        columns = small.n if small.transposed else small.k
        self.wide = normal(small.m, columns + 8).to(small.dtype)
        self.x = self.wide[:, :columns]
        self.bias = normal(small.n).to(small.dtype) if small.biased else None
        permutation = self._permute(generator) if small.permuted else self.parts[0]
        self.extra = [permutation]
        if not small.transposed:
            self.extra.append(self.x if self.bias is None else self.bias)
        tiles = choice.family.startswith("gemm")
        self.owners: list[int | None] = [0] * small.m
        if small.experts:
            self._assign(tiles)
        # Tiles leave rows without an expert as they find them.
        columns = small.k if small.transposed else small.n
        self.start = torch.full(
            (small.m, columns), 0.0 if tiles else float("nan"), **_HERE
        ).to(small.dtype)
        steps = [packed.stride(0), scales.stride(0)] if small.experts else [0, 0]
        self.shape = [
            *(small.m, small.n, small.k, *self.x.stride()),
            *(packed.stride(-2), scales.stride(-2), 0, 1, small.experts, *steps),
        ]

    def _permute(self, generator: torch.Generator) -> Tensor:
        """A permutation, for each expert its own; the dense weight follows it."""
        lead = self.dense.shape[:-2]
        columns = self.product.k
        order = torch.rand(*lead, columns, generator=generator, **_HERE).argsort(-1)
        to = order.unsqueeze(-2).expand_as(self.dense)
        self.dense = torch.empty_like(self.dense).scatter_(-1, to, self.dense)
        return order.int()

    def _assign(self, tiles: bool) -> None:
        """Give rows to experts; the middle one has none."""
        m, dtype = self.product.m, self.product.expert_type
        if self.product.grouping == 1:
            indices = torch.arange(m, device="cpu") % 2 * 2
            self.owners = [int(i) for i in indices]
            self.extra.append(indices.to(dtype))
            return
        ends = torch.tensor([2, 2, m - 1], device="cpu")  # the last row has no expert
        owners: list[int | None] = [0, 0, *[2] * (m - 3), None]
        order = torch.arange(m, device="cpu")
        if self.product.gathered:
            order = order.flip(0)
        self.owners = owners[::-1] if self.product.gathered else owners
        self.extra.append(ends.to(dtype))
        if tiles:
            self.extra.append(order)

    def run(self, kernel: Kernel, device: torch.device) -> Tensor:
        """What the kernel makes of it on a device, on the CPU."""
        threads, group_size = grid(self.product, self.choice)
        y = self.start.to(device, copy=True)
        kernel(
            *(part.to(device) for part in self.parts),
            self.wide.to(device)[:, : self.x.shape[1]],
            y,
            self.shape,
            *(tensor.to(device) for tensor in self.extra),
            threads=threads,
            group_size=group_size,
        )
        return y.cpu()

    def differences(self, y: Tensor) -> str | None:
        """What differs by more than float32 sums and one rounding explain."""
        dense = self.dense if self.product.transposed else self.dense.mT
        x = self.x.double()
        exact = torch.zeros_like(y, dtype=torch.float64)
        size = torch.zeros_like(exact)
        for m, owner in enumerate(self.owners):
            if owner is not None:
                own = dense[owner] if self.product.experts else dense
                exact[m], size[m] = x[m] @ own, x[m].abs() @ own.abs()
        if self.bias is not None:
            exact += self.bias.double()
            size += self.bias.double().abs()
        error = (y.double() - exact).abs()
        bound = _UNIT[y.dtype] * exact.abs() + 32 * 2.0**-24 * size
        wrong = (error <= bound).logical_not()
        if not bool(wrong.any()):
            return None
        m, n = (int(i) for i in wrong.nonzero()[0])
        return (
            f"of {y.numel()} elements of a small product {int(wrong.sum())} are wrong, "
            f"the first at {[m, n]}: {float(y[m, n]):.9g} for {float(exact[m, n]):.9g}"
        )


def _small(product: Product, choice: Choice) -> Product:
    """Sizes for which every loop of a kernel makes several turns, the last one ragged."""
    sizes = dict(choice.sizes)
    m, n, family = sizes.get("VECTORS", 1), 13, choice.family
    if "M_TILES" in sizes:
        m = 8 * sizes["M_TILES"] + 3
    elif product.experts:
        m = 5
    step = max(product.group_size, 128 if product.aligned else 32)
    k = 5 * step
    if family in ("gemv", "gemv_small"):
        # Two blocks of 32 groups for each part of K, less the last step.
        n, k = 5, sizes["SPLIT"] * 64 * max(product.group_size, 32) - step
    elif family == "gemm":
        n = 32 * sizes["N_TILES"] // sizes["SPLIT"] + 5
        k = max(k, 640)
    elif family == "gemm_n":
        n = 141  # of which 64 at a time
    elif family == "gemv_n":
        n = 8 * sizes["SIMDGROUPS"] + 5
    # Rows of 16-groups may end with half a run of 32, where whole or aligned words allow.
    if product.group_size == 16 and product.bits % (8 if product.aligned else 2) == 0:
        k -= 16
    experts = 3 if product.experts else 0
    return replace(product, m=m, n=n, k=k, experts=experts)
