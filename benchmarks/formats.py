"""Bringing one layer of GPTQ, AWQ or compressed-tensors into MLX's layout.

    python benchmarks/formats.py [--rows 4096 --columns 4096 --json formats.json]

Each row reads a layer of 4 bits, group 128, from a file in the page cache and makes an
`AffineQuantizedTensor` of it. "plain read" only reads the same bytes. Where
compressed-tensors is installed, its own unpacking is timed beside, which leaves codes of
a byte each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import report, save, side_by_side
from safetensors.torch import load_file, save_file
from torch import Tensor

from affine_tensor.checkpoint import formats
from affine_tensor.checkpoint.files import open_checkpoint

GROUP = 128
CPU = torch.device("cpu")


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape).to(torch.int32)


def gptq(rows: int, columns: int, act_order: bool) -> dict[str, Tensor]:
    groups = columns // GROUP
    order = torch.randperm(columns) if act_order else torch.arange(columns)
    return {
        "layer.qweight": random_words(columns // 8, rows),
        "layer.qzeros": random_words(groups, rows // 8) & 0x66666666,
        "layer.scales": torch.rand(groups, rows).half() + 0.01,
        "layer.g_idx": (torch.arange(columns) // GROUP)[order].to(torch.int32),
    }


def awq(rows: int, columns: int) -> dict[str, Tensor]:
    groups = columns // GROUP
    return {
        "layer.qweight": random_words(columns, rows // 8),
        "layer.qzeros": random_words(groups, rows // 8),
        "layer.scales": torch.rand(groups, rows).half() + 0.01,
    }


def compressed(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "layer.weight_packed": random_words(rows, columns // 8),
        "layer.weight_scale": torch.rand(rows, columns // GROUP).half() + 0.01,
        "layer.weight_shape": torch.tensor([rows, columns]),
    }


GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "sym": False,
    "checkpoint_format": "gptq",
    "meta": {"quantizer": ["gptqmodel:7.7.0"]},
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "version": "gemm",
    "zero_point": True,
}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {**WEIGHTS, "strategy": "group", "actorder": None},
        }
    },
}


def reader(folder: Path, tensors: dict[str, Tensor], config: Any) -> Callable[[], Any]:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps({"quantization_config": config})
    (folder / "config.json").write_text(text)
    checkpoint = open_checkpoint(folder)
    opened = formats.opened(checkpoint, formats.other_format(checkpoint))
    assert not opened.broken, opened.broken
    weight = opened.packed["layer.weight"]
    return lambda: weight.read(torch.float16, CPU)


def peers(folder: Path, rows: int, columns: int) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    try:
        from compressed_tensors.compressors.pack_quantized import helpers as theirs

        words = load_file(folder / "ct" / "model.safetensors")["layer.weight_packed"]
        shape = torch.Size([rows, columns])
        found["compressed-tensors, unpacking"] = lambda: theirs.unpack_from_int32(
            words, 4, shape
        )
    except ImportError:
        print("compressed-tensors is not installed: left out")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    size = options.rows, options.columns
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        contestants = {
            "GPTQ": reader(folder / "gptq", gptq(*size, False), GPTQ),
            "GPTQ, act-order": reader(folder / "act", gptq(*size, True), GPTQ),
            "AWQ gemm": reader(folder / "awq", awq(*size), AWQ),
            "compressed-tensors": reader(folder / "ct", compressed(*size), CT),
        }
        stored = open_checkpoint(folder / "ct").tensors["layer.weight_packed"]
        contestants["plain read"] = stored.read
        contestants |= peers(folder, *size)
        times = side_by_side(contestants, rounds=options.rounds)
    rows = [(name, f"{1e3 * taken:.1f}") for name, taken in times.items()]
    report(f"one layer of {size[0]} x {size[1]}, 4 bits", ("from", "ms"), rows)
    save(options.json, {"milliseconds": {n: 1e3 * t for n, t in times.items()}})


if __name__ == "__main__":
    main()
