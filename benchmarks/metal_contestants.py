"""Products with packed weights: ours, MLX's and the Hub kernel's, on the same numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from affine_tensor import AffineQuantizedTensor, layout
from affine_tensor.kernels import hub, machine, metal
from affine_tensor.kernels.metal import tuning
from affine_tensor.kernels.metal.operands import gather_operands
from affine_tensor.kernels.metal.plans import choose

# Apple's figures in GB/s; where a name has several, by the number of GPU cores.
BANDWIDTH: dict[str, int | dict[int, int]] = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": {30: 300, 40: 400},
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": {32: 410, 40: 546},
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": {32: 460, 40: 614},
}


def bandwidth_of(chip: tuning.Chip) -> int | None:
    """GB/s of a chip, or None if that is not known."""
    found = BANDWIDTH.get(chip.name.removeprefix("Apple "))
    return found.get(chip.cores) if isinstance(found, dict) else found


@dataclass(frozen=True)
class Size:
    """A weight ``[N, K]`` of a model."""

    name: str
    n: int
    k: int

    def __str__(self) -> str:
        return (
            f"{self.n} x {self.k} ({self.name})"
            if self.name
            else f"{self.n} x {self.k}"
        )


@dataclass(frozen=True)
class Format:
    bits: int
    group_size: int
    dtype: torch.dtype

    @property
    def form(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size}

    def __str__(self) -> str:
        name = layout.name_of(self.dtype)
        return f"{self.bits} bits, group {self.group_size}, {name}"


# Multiplies x of so many rows with the weights in turn, so often, and waits for the end.
Block = Callable[[int, int], Any]


class Weights:
    """Copies of a weight for each contestant, together larger than caches."""

    def __init__(self, size: Size, format: Format, kind: str, total: int) -> None:
        self.size, self.format, self.kind = size, format, kind
        generator = torch.Generator().manual_seed(0)
        words = (size.n, size.k * format.bits // 32)
        groups = (size.n, size.k // format.group_size)
        packed = torch.randint(
            -(2**31), 2**31, words, dtype=torch.int32, generator=generator
        )
        scales = torch.randn(groups, generator=generator) / size.k**0.5
        middle = (2**format.bits - 1) / 2
        biases = (-middle * scales).to(format.dtype)
        self.parts = (packed, scales.to(format.dtype), biases)
        self.bytes = sum(part.nbytes for part in self.parts)
        self.copies = max(2, min(64, math.ceil(total / self.bytes)))

    def x(self, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, self.size.k, generator=generator)
        return x.to(self.format.dtype)

    def kernel(self, rows: int) -> str:
        """Our kernel for so many rows, with what its tiles are."""
        if self.kind != "mps":
            return "reference"
        form = {**self.format.form, "dtype": self.format.dtype}
        operands = gather_operands("linear", self.x(rows), (*self.parts, None), form)
        cores = tuning.chip().cores
        choice = choose(operands.product, tuning.limits(), cores, False)
        sizes = dict(choice.sizes)
        split = f", K in {sizes['SPLIT']}" if sizes.get("SPLIT", 1) > 1 else ""
        if choice.family == "gemm":
            rows_of_tile, outputs = 8 * sizes["M_TILES"], 32 * sizes["N_TILES"]
            return f"gemm {rows_of_tile} x {outputs}{split}"
        return f"{choice.family}{split}"

    def check(self, name: str, y: Tensor, rows: int) -> None:
        """Refuse to time a wrong product."""
        some = [part[:64] for part in self.parts]
        some[0] = some[0].view(torch.uint32)
        dense = layout.dequantize(*some, **self.format.form, dtype=torch.float64)
        exact = self.x(rows).double() @ dense.mT
        error = (y[:, :64].double() - exact).norm() / exact.norm()
        # Ours round results once. MLX rounds weights, too, and sums up in the dtype of x
        # on a CPU; for an M5's matrices float32 is rounded to 11 bits.
        allowed = 2 * float(torch.finfo(self.format.dtype).eps)
        if name != "ours":
            allowed = 6e-2 if self.format.dtype == torch.bfloat16 else 1e-2
        if not error < allowed:
            raise AssertionError(f"{name}: relative error {error:.1e} at {rows} rows")

    # ---- contestants ------------------------------------------------------------

    def contestants(self) -> Iterator[tuple[str, Block]]:
        """Each that there is, with its product checked at a few rows."""
        for name, make in (
            ("ours", self._ours),
            ("mlx", self._mlx),
            ("hub", self._hub),
        ):
            made = make()
            if made is None:
                continue
            multiply, block = made
            for rows in (1, 5, 40):
                self.check(name, multiply(rows), rows)
            yield name, block

    def _there(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        device = machine.tensor_device(self.kind)
        packed, scales, biases = self.parts
        return [
            (
                packed.to(device, copy=True),
                scales.to(device, copy=True),
                biases.to(device, copy=True),
            )
            for _ in range(self.copies)
        ]

    def _ours(self) -> tuple[Callable[[int], Tensor], Block]:
        form = self.format.form
        there = self._there()
        weights = [AffineQuantizedTensor.from_packed(*parts, **form) for parts in there]
        return self._with_torch(
            [lambda x, weight=weight: F.linear(x, weight) for weight in weights]
        )

    def _hub(self) -> tuple[Callable[[int], Tensor], Block] | None:
        form = self.format.form
        there = self._there()
        x = self.x(1).to(there[0][0].device)
        if hub.quantized_matmul(x, *there[0], **form, transpose=True) is None:
            return None
        return self._with_torch(
            [
                lambda x, parts=parts: hub.quantized_matmul(
                    x, *parts, **form, transpose=True
                )
                for parts in there
            ]
        )

    def _with_torch(
        self, products: list[Callable[[Tensor], Any]]
    ) -> tuple[Callable[[int], Tensor], Block]:
        device = machine.tensor_device(self.kind)
        turns = itertools.cycle(products)
        inputs: dict[int, Tensor] = {}

        def block(rows: int, calls: int) -> Tensor:
            if rows not in inputs:
                inputs[rows] = self.x(rows).to(device)
            x = inputs[rows]
            with torch.inference_mode():
                for _ in range(calls):
                    y = next(turns)(x)
            machine.synchronize(self.kind)
            return y

        return lambda rows: block(rows, 1).cpu(), block

    def _mlx(self) -> tuple[Callable[[int], Tensor], Block] | None:
        """MLX may run products at once that do not need each other; ours wait in line."""
        try:
            import mlx.core as mx
        except ImportError:
            return None
        packed, scales, biases = self.parts

        def to_mlx(tensor: Tensor) -> Any:
            if tensor.dtype == torch.bfloat16:
                return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
            return mx.array(tensor.numpy())

        words = packed.view(torch.uint32)
        copies = [
            (to_mlx(words), to_mlx(scales), to_mlx(biases)) for _ in range(self.copies)
        ]
        mx.eval(copies)
        turns = itertools.cycle(copies)
        inputs: dict[int, Any] = {}

        def block(rows: int, calls: int) -> Any:
            if rows not in inputs:
                inputs[rows] = to_mlx(self.x(rows))
            x, made = inputs[rows], []
            for _ in range(calls):
                made.append(mx.quantized_matmul(x, *next(turns), **self.format.form))
            mx.eval(made)
            mx.synchronize()
            return made[-1]

        def multiply(rows: int) -> Tensor:
            y = block(rows, 1).astype(mx.float32)
            return torch.tensor(y.tolist())

        return multiply, block


def device_of_mlx() -> str:
    """Which device MLX uses and its version, or that it is not there."""
    try:
        import mlx.core as mx
    except ImportError:
        return "mlx is not installed"
    from importlib.metadata import version

    return f"mlx {version('mlx')} on its {mx.default_device().type.name}"


def our_settings(kind: str) -> str:
    """What our kernels are chosen by."""
    if kind != "mps":
        return f"ours: the reference, on {kind}"
    metal.reset()
    return f"ours: {machine.name_of(kind)}, {tuning.limits()}"
