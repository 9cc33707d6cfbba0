"""Products with one packed weight on an NVIDIA GPU: ours and the peers', same numbers.

The weight, its random parts and the exact product are those of `cpu_contestants`.
"""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cpu_contestants import (
    Contestant,
    Missing,
    Weight,
    copies_of,
    dense,
    ours,
)
from torch import Tensor

from affine_tensor import layout

Parts = tuple[Tensor, Tensor, Tensor]
Maker = Callable[[Weight, Parts, int], Contestant]
INNER_TILES = 8  # of tinygemm, as torchao has it


# What a contestant that cannot take part raises: peers raise all kinds.
FAILURES = (Exception,)


def reason_of(error: BaseException) -> str:
    """In a line that fits a table."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0] if lines else repr(error), 160)


def told(error: BaseException) -> str:
    """The same, and all of it on stderr where it is more than a peer not being there."""
    if not isinstance(error, Missing):
        traceback.print_exception(error)
    return reason_of(error)


@dataclass
class Lazy(Contestant):
    """One that computes on a stream of its own, when results are asked for."""

    finish: Callable[[list[Any]], Any] = list


@dataclass
class Own(Contestant):
    """One that has another matrix, for its format holds no affine one."""

    dense: Tensor | None = None  # which, [N, K]


# ---- tinygemm -------------------------------------------------------------------


def tinygemm_operands(weight: Weight, parts: Parts) -> tuple[Tensor, Tensor]:
    """The words that tinygemm reads, and scales with zeros ``[K / g, N, 2]``.

    It computes (code - 8) * scale + zero. On a CPU they are those of what torch has
    there in its place.
    """
    if weight.bits != 4:
        raise Missing("it has 4 bits only")
    if weight.dtype != torch.bfloat16:
        raise Missing("it has bfloat16 only")
    packed, scales, biases = parts
    zeros = biases.double() + 8 * scales.double()
    codes = layout.unpack(packed.view(torch.uint32), bits=4)
    if packed.is_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        words = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
    else:
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    own = torch.stack([scales, zeros.to(weight.dtype)], -1)
    return words, own.transpose(0, 1).contiguous()


def tinygemm_product(kind: str) -> Callable[[Tensor, Tensor, int, Tensor], Tensor]:
    """x ``[M, K]`` with words, group size, and scales with zeros."""
    aten = torch.ops.aten
    if kind == "cuda":
        return aten._weight_int4pack_mm.default
    return aten._weight_int4pack_mm_for_cpu.default


def tinygemm(weight: Weight, parts: Parts, total: int) -> Contestant:
    own = tinygemm_operands(weight, parts)
    multiply = tinygemm_product(parts[0].device.type)
    return Contestant(
        copies_of(own, total),
        lambda x, own: multiply(x, own[0], weight.group_size, own[1]),
    )


# ---- libraries that may not be there --------------------------------------------


def gemlite(weight: Weight, parts: Parts, total: int) -> Contestant:
    try:
        from gemlite import DType, GemLiteLinear
    except ImportError as error:
        raise Missing("not installed") from error
    names = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16}
    if weight.dtype not in names or weight.bits not in (1, 2, 4, 8):
        raise Missing("it has 1, 2, 4 and 8 bits in bfloat16 and float16")
    packed, scales, biases = parts
    _gemlite_as_on_h100(packed.device)
    codes = layout.unpack(packed.view(torch.uint32), bits=weight.bits)
    zeros = (-biases.float() / scales.float()).to(weight.dtype)
    size = sum(part.nbytes for part in parts)
    copies = []
    for _ in range(max(2, -(-total // size))):
        layer = GemLiteLinear(
            weight.bits,
            group_size=weight.group_size,
            in_features=weight.k,
            out_features=weight.n,
            input_dtype=names[weight.dtype],
            output_dtype=names[weight.dtype],
        )
        layer.pack(codes, scales, zeros, None)  # (code - zero) * scale
        copies.append(layer)
    return Contestant(copies, lambda x, layer: layer(x))


@cache
def _gemlite_as_on_h100(device: torch.device) -> None:
    """It knows an H100's choices, but not that an H200 is the same chip."""
    import gemlite

    if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device):
        known = Path(gemlite.__file__).parent / "configs" / "h100.json"
        if known.exists():
            gemlite.load_config(str(known))


def bitsandbytes(weight: Weight, parts: Parts, total: int) -> Contestant:
    """NF4, which is not affine: of the same matrix, quantized again, with its blocks."""
    try:
        import bitsandbytes as bnb
        from bitsandbytes import functional
    except ImportError as error:
        raise Missing("not installed") from error
    if weight.bits != 4:
        raise Missing("it has 4 bits only")
    values = layout.dequantize(*parts, **weight.form, dtype=weight.dtype)
    words, state = functional.quantize_4bit(
        values, blocksize=weight.group_size, quant_type="nf4"
    )
    count = max(2, -(-total // words.nbytes))
    return Own(
        [words.clone() for _ in range(count)],
        lambda x, own: bnb.matmul_4bit(x, own.t(), quant_state=state),
        dense=functional.dequantize_4bit(words, state),
    )


def mlx(weight: Weight, parts: Parts, total: int) -> Contestant:
    """Its results are asked for together, so that its kernels may overlap."""
    try:
        import mlx.core as mx
    except ImportError as error:
        raise Missing("not installed") from error
    on_gpu = parts[0].device.type == "cuda"
    if on_gpu and mx.default_device() == mx.Device(mx.cpu):
        raise Missing("the MLX that is installed knows no GPU")
    mx.set_default_device(mx.gpu if on_gpu else mx.cpu)

    def to_mlx(tensor: Tensor) -> Any:
        if tensor.dtype == torch.bfloat16:
            return mx.array(tensor.cpu().view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.cpu().numpy())

    words, scales, biases = parts
    copies = [
        tuple(map(to_mlx, (own[0].view(torch.uint32), *own[1:])))
        for own in copies_of((words, scales, biases), total)
    ]
    mx.eval(copies)
    device = parts[0].device
    return Lazy(
        copies,
        lambda x, own: mx.quantized_matmul(x, *own, **weight.form),
        to_mlx,
        lambda y: torch.tensor(y.astype(mx.float32).tolist(), device=device),
        finish=mx.eval,
    )


MAKERS: dict[str, Maker] = {
    "ours": ours,
    "dense": dense,
    "tinygemm": tinygemm,
    "gemlite": gemlite,
    "bitsandbytes": bitsandbytes,
    "mlx": mlx,
}
PEERS = tuple(name for name in MAKERS if name != "ours")
WHAT = {
    "ours": "`torch.ops.affine_tensor.linear` on the MLX words",
    "dense": "`F.linear` (cuBLAS) with the weight made dense in the same dtype",
    "tinygemm": "torch's `_weight_int4pack_mm` on its repacked words",
    "gemlite": "`GemLiteLinear`, Triton kernels on its repacked words (on an H200 as it "
    "chose them for the H100)",
    "bitsandbytes": "`matmul_4bit`, NF4, which is another matrix of about as many bytes",
    "mlx": "`mx.quantized_matmul`, many results asked for together (no CUDA graph)",
}


def made(
    weight: Weight, parts: Parts, total: int, names: Sequence[str]
) -> Iterator[tuple[str, Contestant | str]]:
    """Each contestant, or the reason why it is not there.

    The copies of each take `total` bytes or more.
    """
    for name in names:
        try:
            yield name, MAKERS[name](weight, parts, total)
        except FAILURES as error:
            yield name, told(error)
