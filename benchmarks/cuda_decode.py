"""What one token costs: the products of a whole model in one CUDA graph.

32 times q, k, v, o, gate, up and down, and the head, of a Llama of 8 billion weights,
each with words of its own. Fused: q, k and v as one matrix of their rows, so gate and up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import cuda_clock
import torch
from cpu_contestants import (
    Weight,
    allowed,
    difference,
    exact_product,
    one_rounding,
)
from cpu_products import WRONG
from cuda_contestants import (
    FAILURES,
    tinygemm_operands,
    tinygemm_product,
    told,
)
from cuda_products import Setting
from torch import Tensor
from torch.nn import functional as F

from affine_tensor import layout

BITS, GROUP, DTYPE = 4, 64, torch.bfloat16
FORM: dict[str, Any] = {"bits": BITS, "group_size": GROUP}
HOW = ("one by one", "fused")


@dataclass(frozen=True)
class Shapes:
    """Of the model's matrices."""

    layers: int
    hidden: int
    kv: int
    mlp: int
    vocabulary: int

    def matrices(self) -> Iterator[tuple[Weight, tuple[int, ...], range]]:
        """Each fused matrix, the rows of its members, and the layers that have one."""
        hidden, mlp, layers = self.hidden, self.mlp, range(self.layers)
        for rows, k, places in (
            ((hidden, self.kv, self.kv), hidden, layers),
            ((hidden,), hidden, layers),
            ((mlp, mlp), hidden, layers),
            ((hidden,), mlp, layers),
            ((self.vocabulary,), hidden, range(self.layers, self.layers + 1)),
        ):
            yield Weight(sum(rows), k, BITS, GROUP, DTYPE), rows, places


SHAPES = {
    "models": Shapes(32, 4096, 1024, 14336, 128256),
    "tiny": Shapes(2, 128, 64, 256, 512),
}

Product = Callable[[Tensor], Tensor]


@dataclass
class Member:
    """One product of the token."""

    product: Product
    x: Tensor  # [1, K]
    exact: Tensor  # [1, N], float64
    rounding: float


# ---- contestants: what multiplies with some rows of a matrix, and its bytes -------

Parts = tuple[Tensor, Tensor, Tensor]
Own = tuple[Product, tuple[Tensor, ...]]


def _ours(weight: Weight, parts: Parts) -> Own:
    linear = torch.ops.affine_tensor.linear.default
    return lambda x: linear(x, *parts, None, None, **FORM, dtype=DTYPE), parts


def _tinygemm(weight: Weight, parts: Parts) -> Own:
    words, scales = tinygemm_operands(weight, parts)
    multiply = tinygemm_product(words.device.type)
    return lambda x: multiply(x, words, GROUP, scales), (words, scales)


def _dense(weight: Weight, parts: Parts) -> Own:
    own = layout.dequantize(*parts, **FORM, dtype=DTYPE)
    return lambda x: F.linear(x, own), (own,)


CONTESTANTS: dict[str, Callable[[Weight, Parts], Own]] = {
    "ours": _ours,
    "tinygemm": _tinygemm,
    "dense": _dense,
}


# ---- measuring ------------------------------------------------------------------


@torch.inference_mode()
def measure(setting: Setting, shapes: Shapes, found: dict[str, Any]) -> None:
    """Fill in all figures."""
    found |= {
        "is_8b": shapes == SHAPES["models"],
        "shapes": vars(shapes),
        "rounds": setting.rounds,
        "missing": {},
        "results": [],
    }
    blocks: dict[tuple[str, str], cuda_clock.Block] = {}
    about: dict[tuple[str, str], dict[str, Any]] = {}
    for name in CONTESTANTS:
        if name not in setting.names:
            continue
        for how in HOW:
            try:
                members, size = _members(name, how, shapes, setting.kind)
                block, worst = _ready(name, members, setting.kind)
            except FAILURES as error:
                found["missing"][f"{name}, {how}"] = told(error)
                continue
            blocks[name, how] = block
            about[name, how] = {"linears": len(members), "bytes": size, "error": worst}
    times = cuda_clock.in_rounds(blocks, setting.rounds)
    for (name, how), taken in times.items():
        one = {
            "name": name,
            "how": how,
            "seconds": statistics.median(taken),
            "least": min(taken),
            "most": max(taken),
            **about[name, how],
        }
        if ("ours", how) in times:
            pairs = zip(taken, times["ours", how], strict=True)
            one["of_ours"] = statistics.median(a / b for a, b in pairs)
        found["results"].append(one)


def _members(
    name: str, how: str, shapes: Shapes, kind: str
) -> tuple[list[Member], int]:
    """The products in the order of a token, and the bytes of their weights."""
    layers: list[list[Member]] = [[] for _ in range(shapes.layers + 1)]
    size = 0
    for weight, rows, places in shapes.matrices():
        parts, x = weight.parts(kind), weight.x(1, kind)
        exact = exact_product(weight, parts, x)
        rounding = one_rounding(exact, DTYPE)
        for number in places:
            # Each layer's rows stand elsewhere: one that is taken for another is seen.
            own = [part.roll(number, 0) for part in parts]
            expected = exact.roll(number, 1)
            start = 0
            for each in rows if how == "one by one" else (sum(rows),):
                end = start + each
                words, scales, biases = (part[start:end] for part in own)
                member, held = CONTESTANTS[name](
                    replace(weight, n=each), (words, scales, biases)
                )
                size += sum(tensor.nbytes for tensor in held)
                layers[number].append(
                    Member(member, x, expected[:, start:end], rounding)
                )
                start = end
    return [member for layer in layers for member in layer], size


def _ready(
    name: str, members: list[Member], kind: str
) -> tuple[cuda_clock.Block, float]:
    """The graph of a token, and the worst error in it; raises if it is wrong."""

    def launch() -> list[Tensor]:
        return [member.product(member.x) for member in members]

    _worst(name, members, launch(), "")
    block = cuda_clock.block(launch, 1, kind)
    return block, _worst(name, members, block.poisoned(), " in a CUDA graph")


def _worst(name: str, members: list[Member], results: list[Tensor], how: str) -> float:
    errors = []
    for number, (member, y) in enumerate(zip(members, results, strict=True)):
        error = difference(y, member.exact)
        most = allowed(name, DTYPE, member.rounding)
        if not error <= most:
            raise RuntimeError(
                f"{WRONG}{how}: product {number}, {list(y.shape)}: relative error "
                f"{error:.1e}, allowed {most:.1e}"
            )
        errors.append(error)
    return max(errors)
