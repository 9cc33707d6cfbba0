"""The checkpoint of `distributed_70b.py`: a Llama of random 4-bit words, shard by shard."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from load import QUANTIZATION, _write_shards
from peers_files import BITS, GROUP, Size, config_of
from torch import Tensor

SIZES = {
    "70b": Size(80, 8192, 64, 8, 28672, 128256, prefills=(512, 2048)),
    # To see that it works.
    "tiny": Size(2, 256, 8, 4, 512, 512, prompt=8, new=4, prefills=(8, 16)),
}


def write(folder: Path, size: Size, kind: str) -> None:
    """Write the checkpoint, made on the device a shard at a time.

    Weights of nn.Linear have about the variance ``1 / in_features``, so that logits are of
    the order of 1. Raises SystemExit where the disk is too small.
    """
    need, free = bytes_of(size), shutil.disk_usage(folder.parent).free
    if free < 1.02 * need:
        raise SystemExit(
            f"the checkpoint takes {need / 1e9:.1f} GB, and {folder.parent} has "
            f"{free / 1e9:.1f}. Name another place with --folder, or pass --layers"
        )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    config = config_of(size)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(part)
    path = part / "config.json"
    both = {"quantization": QUANTIZATION, "quantization_config": QUANTIZATION}
    path.write_text(json.dumps(json.loads(path.read_text()) | both, indent=2))
    torch.manual_seed(0)
    _write_shards(part, _tensors(size, kind))
    part.rename(folder)


def bytes_of(size: Size) -> float:
    count = sum(n * k for _, n, k in _layer(size)) * size.layers
    count += 2 * size.vocabulary * size.hidden
    return count * (BITS + 32 / GROUP) / 8


def _layer(size: Size) -> list[tuple[str, int, int]]:
    """Names, output and input channels."""
    hidden, kv, mlp = size.hidden, size.kv_heads * size.head_dim, size.mlp
    return [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", mlp, hidden),
        ("mlp.up_proj", mlp, hidden),
        ("mlp.down_proj", hidden, mlp),
    ]


def _tensors(size: Size, kind: str) -> Iterator[dict[str, Tensor]]:
    hidden, vocabulary = size.hidden, size.vocabulary
    yield _packed("model.embed_tokens", vocabulary, hidden, 1.0, kind)
    for number in range(size.layers):
        own = f"model.layers.{number}."
        for name, n, k in _layer(size):
            yield _packed(own + name, n, k, k**-0.5, kind)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield {f"{own}{name}.weight": _norm(hidden)}
    yield {"model.norm.weight": _norm(hidden)}
    yield _packed("lm_head", vocabulary, hidden, hidden**-0.5, kind)


def _packed(
    stem: str, n: int, k: int, deviation: float, kind: str
) -> dict[str, Tensor]:
    shape, most = (n, k * BITS // 32), 2**31
    words = torch.randint(-most, most, shape, dtype=torch.int32, device=kind)
    # Of codes that are all as likely.
    each = deviation / math.sqrt((4**BITS - 1) / 12)
    scales = each * (0.5 + torch.rand(n, k // GROUP, device=kind))
    return {
        f"{stem}.weight": words.cpu().view(torch.uint32),
        f"{stem}.scales": scales.to(torch.bfloat16).cpu(),
        f"{stem}.biases": (scales * (1 - 2**BITS) / 2).to(torch.bfloat16).cpu(),
    }


def _norm(hidden: int) -> Tensor:
    return (0.75 + 0.5 * torch.rand(hidden)).to(torch.bfloat16)
