"""Which sizes of the CUDA products are fastest on this GPU, for kernels/cuda/plans.

    python benchmarks/cuda_sweep.py --m 1 2 8 --shapes 4096x4096 14336x4096 --bits 4
    python benchmarks/cuda_sweep.py --m 64 --family mma --time-limit 240

Each candidate is compared with float64, its results poisoned with NaN beforehand, then
timed in CUDA graphs over copies of the weight that do not fit into the second-level cache
together: first all of them briefly, then the best ones again. Shapes are NxK. With $OUT,
sweep.json goes there. What is left when the time is up is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affine_tensor import layout
from affine_tensor.kernels.cuda import compiler, launch, plans, products
from affine_tensor.kernels.cuda.plans import Plan, Product

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of each dtype: 1.5 roundings, relative, in the 2-norm; of float32 what sums may lose.
LIMITS = {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4, torch.float32: 1e-6}
ROTATED = 400 << 20  # bytes of weights that are read before the first one again
GRAPH_US = 1500  # of launches in a graph


def gemv_candidates(product: Product) -> Iterator[Plan | None]:
    most = 4 if product.dtype == torch.float32 or product.m <= 8 else 0
    tokens = min(most, 1 << (product.m - 1).bit_length()) if product.m else 0
    for units, warps, blocks in itertools.product(
        (1, 2, 4, 8), (4, 5, 7, 8, 10, 12, 14, 16), (1, 2, 3, 4)
    ):
        chunks = -(-product.k // (128 * units))
        in_turn = -(-chunks // warps)
        held = warps * blocks
        if not tokens or units * product.bits > 32 or not 8 <= held <= 32:
            continue
        # Few warps may be without a chunk in the last turn.
        if warps > chunks or in_turn * warps > 1.15 * chunks:
            continue
        sizes = {"units": units, "warps": warps, "blocks": blocks, "tokens": tokens}
        yield plans.gemv_plan(product, **sizes)


def mma_candidates(product: Product) -> Iterator[Plan | None]:
    nt = plans.token_tiles(product)
    few = nt == 1
    shapes = [(2, 1, 4), (2, 2, 4), (2, 4, 2), (4, 2, 2), (4, 4, 1)]
    shapes += [(1, 2, 4), (1, 4, 2)] if few else [(2, 2, 2), (2, 4, 1)]
    for (mt, wn, wk), ck, ks, stages, blocks in itertools.product(
        shapes, (1, 2), (256, 512) if few else (128, 256), (2, 3, 4), (1, 2, 3)
    ):
        threads = 32 * wn * wk * blocks
        if ks % (64 * wk) or threads > 768 or threads < 128:
            continue
        if not few and (stages == 4 or blocks == 3 or (ks == 128 and nt < 8)):
            continue
        if mt * nt >= 32 and threads > 256:  # registers
            continue
        sizes = {"mt": mt, "wn": wn, "wk": wk, "ck": ck, "ks": ks, "stages": stages}
        # Codes multiplied as they are cost less for few tokens, and are exact.
        for sums in (1,) if few else (1, 0) if mt * nt <= 8 else (0,):
            plan = plans.mma_plan(product, nt=nt, sums=sums, blocks=blocks, **sizes)
            if plan is not None and plan.shared * blocks <= product.shared:
                yield plan


def wgmma_candidates(product: Product) -> Iterator[Plan | None]:
    if product.m <= 8 or not product.aligned:
        return
    for tokens, (warpgroups, turns), split, (stages, depth) in itertools.product(
        (32, 64, 128, 192, 256),
        ((2, 1), (2, 2), (1, 2), (1, 4), (1, 1)),
        (1, 2, 4),
        ((8, 4), (7, 4), (6, 3), (5, 3), (4, 4), (3, 2)),
    ):
        if tokens > 2 * product.m and tokens > 32:
            continue
        if tokens * warpgroups * turns > (256 if tokens < 192 else 512):  # registers
            continue
        sizes = {"warpgroups": warpgroups, "turns": turns, "split": split}
        sizes |= {"stages": stages, "depth": depth}
        yield plans.wgmma_plan(product, tokens=tokens, **sizes)


FAMILIES = {
    "gemv": gemv_candidates,
    "mma": mma_candidates,
    "wgmma": wgmma_candidates,
}


@dataclass
class Case:
    """A product, and the plans that could make it."""

    product: Product
    plans: list[Plan]


@dataclass
class Result:
    plan: Plan
    error: float
    us: float


def cases(arguments: argparse.Namespace) -> list[Case]:
    found = []
    device = torch.cuda.get_device_properties(0)
    for dtype, bits, group, shape, m in itertools.product(
        arguments.dtypes,
        arguments.bits,
        arguments.groups,
        arguments.shapes,
        arguments.m,
    ):
        n, k = (int(size) for size in shape.split("x"))
        product = Product(
            m=m,
            n=n,
            k=k,
            bits=bits,
            group_size=group,
            dtype=DTYPES[dtype],
            scale_dtype=DTYPES[arguments.scales or dtype],
            capability=(device.major, device.minor),
            multiprocessors=device.multi_processor_count,
        )
        own: dict[Plan, None] = {}
        for family in arguments.family:
            if family != "gemv" and (m < 2 or product.dtype == torch.float32):
                continue
            for plan in FAMILIES[family](product):
                if plan is not None:
                    own.update(dict.fromkeys(_with_overlap(plan, arguments.pdl)))
        taken = plans.choose(product)
        if taken is not None:
            own = {taken: None, **own}
        found.append(Case(product, list(own)[: arguments.most]))
    return found


def _with_overlap(plan: Plan, wanted: str) -> list[Plan]:
    """The plan alone in the stream, and overlapping the kernel before it."""
    both = []
    for pdl, trigger in {"off": [(0, 1)], "end": [(1, 1)]}.get(
        wanted, [(0, 1), (1, 1), (1, 0)]
    ):
        own = {"PDL": pdl, "TRIGGER": trigger}
        defines = tuple((name, own.get(name, value)) for name, value in plan.defines)
        both.append(replace(plan, defines=defines, pdl=bool(pdl)))
    return both


class Bench:
    """Copies of one weight, and what they are multiplied with."""

    def __init__(self, product: Product) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.product = product
        n, k, bits = product.n, product.k, product.bits
        groups = (n, k // product.group_size)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        words = torch.randint(
            -(1 << 31),
            1 << 31,
            (n, k * bits // 32),
            generator=generator,
            device="cuda",
            dtype=torch.int64,
        )
        packed = words.to(torch.int32)
        scales = (random(*groups).abs_() / 4 + 0.5) / (1 << bits)
        biases = random(*groups) / 8 - 0.5
        parts = (packed, scales.to(product.scale_dtype), biases.to(product.scale_dtype))
        size = sum(part.numel() * part.element_size() for part in parts)
        count = max(2, -(-ROTATED // size))
        self.copies = [tuple(part.clone() for part in parts) for _ in range(count)]
        self.x = random(product.m, k).to(product.dtype)
        self.y = self.x.new_empty(product.m, n)
        self.wanted = self._reference(parts)
        self.moved = size + self.x.nbytes + self.y.nbytes

    def _reference(self, parts: tuple[Tensor, ...]) -> Tensor:
        wanted = []
        for rows in torch.arange(self.product.n).split(8192):
            own = slice(int(rows[0]), int(rows[-1]) + 1)
            packed, scales, biases = (part[own] for part in parts)
            dense = layout.dequantize(
                packed.view(torch.uint32),
                scales,
                biases,
                bits=self.product.bits,
                group_size=self.product.group_size,
                dtype=torch.float64,
            )
            wanted.append(self.x.double() @ dense.T)
        return torch.cat(wanted, -1)

    def launch(self, plan: Plan) -> Any:
        image = compiler.image(plan.source, plan.defines, self.product.capability)
        made = launch.function(image, plan.entry, 0, plan.shared)
        packed, scales, _ = self.copies[0]
        return products.launch(plan, self.product, self.x, packed, scales, made, 0)

    def run(self, call: Any, copy: int) -> None:
        packed, scales, biases = self.copies[copy % len(self.copies)]
        call(
            torch.cuda.current_stream().cuda_stream,
            self.x.data_ptr(),
            packed.data_ptr(),
            scales.data_ptr(),
            biases.data_ptr(),
            0,
            self.y.data_ptr(),
            0,
        )

    def error(self, call: Any) -> float:
        worst = 0.0
        for _ in range(2):
            self.y.fill_(float("nan"))
            self.run(call, 0)
            error = (self.y.double() - self.wanted).norm() / self.wanted.norm()
            worst = max(worst, float(error)) if error == error else float("inf")
        return worst

    def time(self, call: Any, replays: int, about: float) -> float:
        """Microseconds of a launch: the median of some replays of a graph."""
        count = max(len(self.copies), int(GRAPH_US / about))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(count):
                self.run(call, copy)
        taken = []
        for turn in range(replays + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                taken.append(start.elapsed_time(end) * 1000 / count)
        return statistics.median(taken)


def sweep(case: Case, best: int, until: float) -> list[Result]:
    """The candidates that are right, the fastest first."""
    bench = Bench(case.product)
    about = max(3.0, bench.moved / 3e6)
    found = []
    for plan in case.plans:
        if time.monotonic() > until:
            break
        try:
            call = bench.launch(plan)
            error = bench.error(call)
            if not error < LIMITS[case.product.dtype]:
                print(f"WRONG {error:.1e}: {_sizes(plan)}", flush=True)
                continue
            found.append(Result(plan, error, bench.time(call, 3, about)))
        except Exception as problem:
            print(f"FAILED {problem}: {_sizes(plan)}", flush=True)
            if "illegal" in str(problem) or "misaligned" in str(problem):
                raise
    found.sort(key=lambda result: result.us)
    for result in found[:best]:
        result.us = bench.time(bench.launch(result.plan), 9, about)
    found[:best] = sorted(found[:best], key=lambda result: result.us)
    return found


def _sizes(plan: Plan) -> str:
    fixed = "BITS GROUP X S ALIGNED X_ALIGNED SCALE_BYTES TAIL EDGE GROUPED TOKENS NT"
    own = [f"{k}{v}" for k, v in plan.defines if k not in fixed.split()]
    return f"{plan.entry[7:]} {' '.join(own)} grid {plan.grid}"


def report(case: Case, found: list[Result], best: int) -> dict[str, Any]:
    product = case.product
    moved = product.n * (
        product.k * product.bits // 8
        + 2 * product.k // product.group_size * product.scale_dtype.itemsize
    )
    name = (
        f"{product.n}x{product.k} M{product.m} {product.bits} bits g{product.group_size} "
        f"{str(product.dtype)[6:]}"
    )
    taken = plans.choose(product)
    own = next((result.us for result in found if result.plan == taken), None)
    print(f"{name}: {len(found)} right; taken now: {own}", flush=True)
    for result in found[:best]:
        print(
            f"  {result.us:8.2f} us {moved / result.us / 1e6:6.2f} TB/s "
            f"{result.error:.1e} {_sizes(result.plan)}",
            flush=True,
        )
    return {
        "case": name,
        "own": own,
        "results": [
            {"us": r.us, "error": r.error, "grid": r.plan.grid, **dict(r.plan.defines)}
            for r in found
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, nargs="+", default=[1])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--groups", type=int, nargs="+", default=[64])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--scales", choices=DTYPES, help="default: as x")
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--pdl", default="off", choices=["off", "end", "all"])
    parser.add_argument("--best", type=int, default=3, help="timed again, and shown")
    parser.add_argument("--most", type=int, default=1000, help="candidates of a case")
    parser.add_argument("--time-limit", type=float, default=240, help="seconds in all")
    parser.add_argument("--list", action="store_true", help="only count candidates")
    arguments = parser.parse_args()
    start = time.monotonic()
    until = start + arguments.time_limit

    todo = cases(arguments)
    jobs = [
        (plan.source, plan.defines, case.product.capability)
        for case in todo
        for plan in case.plans
    ]
    print(
        f"{torch.cuda.get_device_name()}: {len(todo)} cases, {len(set(jobs))} kernels"
    )
    if arguments.list:
        return
    compiler.images(jobs)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    made = []
    for case in todo:
        if time.monotonic() > until:
            print("time is up", flush=True)
            break
        made.append(report(case, sweep(case, arguments.best, until), arguments.best))
        torch.cuda.empty_cache()
        if os.environ.get("OUT"):
            Path(os.environ["OUT"], "sweep.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
