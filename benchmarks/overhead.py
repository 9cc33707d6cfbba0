"""What the tensor costs on top of its operator, for one `F.linear` call.

    python benchmarks/overhead.py

Compares an `nn.Linear` whose weight is packed with a module that holds the parts as
buffers and calls the same operator directly. The kernel is replaced by an empty one, so
that only the way to it is timed, in CPU time of the thread. A plain `nn.Linear`, which
does multiply, stands beside them for scale.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from common import picture, report, save, side_by_side
from torch import Tensor, nn

from affine_tensor import AffineConfig, AffineQuantizedTensor, ops, quantize_


class Direct(nn.Module):
    """The operator, called on buffers."""

    def __init__(self, weight: AffineQuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("packed", weight._packed)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("biases", weight.biases)
        self.bias = bias
        self.bits, self.group_size, self.dtype = (
            weight.bits,
            weight.group_size,
            weight.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.affine_tensor.linear.default(
            x,
            self.packed,
            self.scales,
            self.biases,
            None,
            self.bias,
            bits=self.bits,
            group_size=self.group_size,
            dtype=self.dtype,
        )


def empty_kernel(x: Tensor, packed: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--png", help="draw them there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ops.register_kernel("linear", "cpu")(empty_kernel)

    plain = nn.Linear(64, 64)
    packed = nn.Linear(64, 64)
    quantize_(packed, AffineConfig(4, 64))
    assert isinstance(packed.weight, AffineQuantizedTensor)
    direct = Direct(packed.weight, packed.bias)
    x = torch.randn(1, 64)
    modes: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    rows, results = [], {}
    for mode, context in modes.items():
        with context():
            seconds = side_by_side(
                {
                    "plain nn.Linear": lambda: plain(x),
                    "operator on buffers": lambda: direct(x),
                    "nn.Linear, packed": lambda: packed(x),
                },
                rounds=101,
                calls=500,
                clock=time.thread_time,
            )
        results[mode] = seconds
        added = seconds["nn.Linear, packed"] - seconds["operator on buffers"]
        figures = [f"{1e6 * value:.2f}" for value in seconds.values()]
        rows.append((mode, *figures, f"{1e6 * added:+.2f}"))
    header = ("µs per call", *results["no_grad"], "added")
    report("overhead of the tensor", header, rows)
    bars = {n: 1e6 * s for n, s in results["inference_mode"].items()}
    picture(options.png, "one call, empty kernel, inference mode", "µs", bars)
    save(options.json, results)


if __name__ == "__main__":
    main()
