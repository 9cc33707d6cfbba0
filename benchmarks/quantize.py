"""Quantizing one weight: ours, MLX on a CPU, and transformers' Metal quantizer.

    python benchmarks/quantize.py [--rows 4096 --columns 4096 --bits 4 --group-size 64]

The first two give the same bits; that is checked before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import picture, report, save, side_by_side

from affine_tensor import layout


def contestants(
    weight: torch.Tensor, bits: int, group_size: int
) -> dict[str, Callable[[], Any]]:
    form = {"bits": bits, "group_size": group_size}
    quantize = torch.ops.affine_tensor.quantize
    found: dict[str, Callable[[], Any]] = {
        "affine_tensor": lambda: quantize(weight, **form)
    }
    try:
        import mlx.core as mx
        import numpy as np

        mx.set_default_device(mx.cpu)
        same = mx.array(weight.view(torch.int16).numpy()).view(mx.bfloat16)
        mx.eval(same)

        def quantize_with_mlx() -> Any:
            parts = mx.quantize(same, **form)
            mx.eval(parts)
            return parts

        found["mlx (cpu)"] = quantize_with_mlx
        ours = quantize(weight, **form)
        theirs = quantize_with_mlx()
        for mine, their in zip(ours, theirs, strict=True):
            bits_of = np.array(
                their.view(mx.uint16 if their.itemsize == 2 else mx.uint32)
            )
            mine_bits = mine.view(torch.uint16 if mine.itemsize == 2 else torch.uint32)
            assert np.array_equal(mine_bits.numpy(), bits_of), "the bits differ"
    except ImportError:
        print("mlx is not installed: left out")
    try:
        from transformers.integrations.metal_quantization import (
            _affine_quantize_tensor as theirs_of_transformers,
        )

        if bits in (2, 4, 8):
            found["transformers"] = lambda: theirs_of_transformers(
                weight, group_size, bits
            )
    except ImportError:
        print("transformers has no Metal quantizer: left out")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4, choices=layout.BITS)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--png", help="draw them there")
    options = parser.parse_args()

    torch.manual_seed(0)
    weight = torch.randn(options.rows, options.columns).to(torch.bfloat16)
    runs = contestants(weight, options.bits, options.group_size)
    form = {"bits": options.bits, "group_size": options.group_size}
    parts = torch.ops.affine_tensor.quantize(weight, **form)
    dequantize = torch.ops.affine_tensor.dequantize
    runs["affine_tensor dequantize"] = lambda: dequantize(
        *parts, **form, dtype=weight.dtype
    )
    seconds = side_by_side(runs, rounds=9)
    ours = seconds["affine_tensor"]
    title = (
        f"quantize {options.rows} x {options.columns} bfloat16, "
        f"{options.bits} bits, group {options.group_size}"
    )
    report(
        title,
        ("", "ms", "times ours"),
        [(n, f"{1e3 * s:.1f}", f"{s / ours:.2f}") for n, s in seconds.items()],
    )
    bars = {name: 1e3 * value for name, value in seconds.items()}
    picture(options.png, title, "milliseconds", bars)
    save(options.json, {"title": title, "seconds": seconds})


if __name__ == "__main__":
    main()
