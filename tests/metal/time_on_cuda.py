"""Time the kernels for few rows beside MLX's own, both translated for an NVIDIA GPU.

    python tests/metal/time_on_cuda.py [--bits 4] [--sweep]

A stand-in for a Mac: both are compiled from their Metal sources by NVRTC with the same
flags, so it compares loads, arithmetic and reductions on another GPU's terms. Launches
are captured in one graph, each with a weight of its own, of more bytes together than any
cache holds. MLX: for one row qmv_fast, for more the faster of qmv_fast (which reads the
weights for each row) and qmv_wide (for up to five at once), as its own choice differs by
chip.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx_kernels
import torch
from metal_emulator import cuda
from on_cuda import missing
from torch import Tensor

from affine_tensor import layout
from affine_tensor.kernels.metal import plans
from affine_tensor.kernels.metal.library import source
from affine_tensor.kernels.metal.plans import Choice, Product
from affine_tensor.kernels.metal.tuning import Limits

SIZES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))  # N, K
GROUP = 64
WORKING_SET = 512 << 20  # bytes, several times the largest cache
FLAGS = ("--fmad=true",)
MLX_TYPES = {torch.float16: "float16_t", torch.bfloat16: "bfloat16_t"}
Launch = Callable[[], None]


class Weights:
    """Copies of one packed weight, to be used in turn."""

    def __init__(self, n: int, k: int, bits: int, dtype: torch.dtype) -> None:
        self.n, self.k, self.bits, self.dtype = n, k, bits, dtype
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(n, k, generator=generator).to(dtype).cuda()
        parts = layout.quantize(dense, bits=bits, group_size=GROUP)
        self.dense = layout.dequantize(*parts, bits=bits, group_size=GROUP).float()
        words = (parts[0].view(torch.int32), *parts[1:])
        self.bytes = sum(part.nbytes for part in words)
        count = max(2, -(-WORKING_SET // self.bytes))
        self.copies = [tuple(part.clone() for part in words) for _ in range(count)]


def milliseconds(launches: Sequence[Launch]) -> float:
    """The median time of one launch, over replays of a graph of all of them."""
    for launch in launches[:3]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(launches))
    return statistics.median(times[2:])


def check(y: Tensor, x: Tensor, weights: Weights, what: str) -> None:
    exact = x.float() @ weights.dense.T
    error = float((y.float() - exact).norm() / exact.norm())
    if not error < 4 * torch.finfo(y.dtype).eps:
        raise AssertionError(f"{what}: relative error {error:.2g}")


def numbers(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cuda")


_compiled: dict[str, Any] = {}


def ours(x: Tensor, weights: Weights, choice: Choice) -> tuple[list[Launch], Tensor]:
    """Launches of one of our kernels, one for each copy of the weight."""
    m, n, k = len(x), weights.n, weights.k
    product = Product(
        m=m,
        n=n,
        k=k,
        bits=weights.bits,
        group_size=GROUP,
        dtype=x.dtype,
        scale_dtype=x.dtype,
        aligned=True,
        x_vector=True,
    )
    text = source(plans.variant_of(product, choice))
    if text not in _compiled:
        _compiled[text] = cuda.compile_shader(text, flags=FLAGS)
    kernel = getattr(_compiled[text], choice.family)
    threads, group_size = plans.grid(product, choice)
    words, groups = k * weights.bits // 32, k // GROUP
    shape = numbers(m, n, k, k, 1, words, groups, 0, 1, 1, 0, 0, dtype=torch.int64)
    y = torch.empty(m, n, dtype=x.dtype, device="cuda")

    def launch(parts: tuple[Tensor, ...]) -> None:
        operands = (*parts, x, y, shape, parts[0], x)
        kernel(*operands, threads=threads, group_size=group_size)

    return [lambda parts=parts: launch(parts) for parts in weights.copies], y


def mlx_library(weights: Weights) -> Any:
    """qmv_fast and qmv_wide for 2 to 5 vectors, at this width and dtype."""
    name = MLX_TYPES[weights.dtype]
    form = f"{name}, {GROUP}, {weights.bits}"
    lines = [mlx_kernels.source([])]
    fast = f"affine_qmv_fast<{form}, false>"
    wide = {f"wide{v}": f"affine_qmv_wide<{form}, {v}, 8, false>" for v in range(2, 6)}
    for host_name, function in {"fast": fast, **wide}.items():
        lines.append(
            f'template [[host_name("{host_name}")]] [[kernel]] '
            f"decltype({function}) {function};"
        )
    text = "\n".join(lines)
    if text not in _compiled:
        folder = mlx_kernels.installed_headers().folder
        _compiled[text] = cuda.compile_shader(text, include_dirs=[folder], flags=FLAGS)
    return _compiled[text]


def mlx(x: Tensor, weights: Weights, wide: bool) -> tuple[list[Launch], Tensor]:
    """Launches of MLX's kernel, with the grids of its host code."""
    m, n, k = len(x), weights.n, weights.k
    library = mlx_library(weights)
    y = torch.empty(m, n, dtype=x.dtype, device="cuda")
    sizes = [numbers(k), numbers(n)]
    tiles = m
    kernel = library.fast
    if wide:
        tiles = -(-m // 5)
        kernel = getattr(library, f"wide{-(-m // tiles)}")
        sizes.append(numbers(m))
    threads, group_size = (32 * tiles, 2 * -(-n // 8), 1), (32, 2, 1)

    def launch(parts: tuple[Tensor, ...]) -> None:
        kernel(*parts, x, y, *sizes, threads=threads, group_size=group_size)

    return [lambda parts=parts: launch(parts) for parts in weights.copies], y


def timed(
    made: tuple[list[Launch], Tensor], x: Tensor, weights: Weights, what: str
) -> float:
    launches, y = made
    y.fill_(float("nan"))
    launches[0]()
    check(y, x, weights, what)
    return milliseconds(launches)


def compare(weights: Weights, rows: Sequence[int], sweep: bool) -> None:
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    for m in rows:
        x = torch.randn(m, weights.k, device="cuda").to(weights.dtype)
        theirs = {"fast": timed(mlx(x, weights, False), x, weights, "qmv_fast")}
        if m > 1:
            theirs["wide"] = timed(mlx(x, weights, True), x, weights, "qmv_wide")
        product = Product(
            m, weights.n, weights.k, weights.bits, GROUP, x.dtype, x.dtype
        )
        choice = plans.choose(product, Limits(), cores, False)
        own = timed(ours(x, weights, choice), x, weights, str(choice))
        best = min(theirs, key=lambda name: theirs[name])
        rate = weights.bytes / own / 1e6
        print(
            f"| {weights.bits} | {layout.name_of(x.dtype)} | {weights.n} x {weights.k} "
            f"| {m} | {1000 * own:.1f} | {rate:.0f} | {1000 * theirs[best]:.1f} "
            f"({best}) | {theirs[best] / own:.2f} |",
            flush=True,
        )
        if sweep:
            for other in candidates(choice):
                took = timed(ours(x, weights, other), x, weights, str(other))
                print(f"    {dict(other.sizes)}: {1000 * took:.1f}", flush=True)


def candidates(choice: Choice) -> list[Choice]:
    """The same kernel with K divided in other ways."""
    sizes = dict(choice.sizes)
    found = []
    for split, groups in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (8, 1)):
        own = sizes | {"SPLIT": split, "GROUPS": groups}
        if own != sizes:
            found.append(Choice(choice.family, tuple(own.items())))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--sweep", action="store_true", help="other splits of K too")
    chosen = parser.parse_args(arguments)
    if reason := missing():
        print(f"nothing can run: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"STAND-IN for a Mac: {torch.cuda.get_device_name()}, Metal through NVRTC")
    print("| bits | dtype | N x K | M | ours, us | GB/s | MLX, us | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for bits in chosen.bits:
        for dtype in MLX_TYPES:
            for n, k in SIZES:
                compare(Weights(n, k, bits, dtype), chosen.rows, chosen.sweep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
