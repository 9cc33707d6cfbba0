"""Checkpoints of any size that take no room: real headers, then a hole in the file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_BYTES = {"U32": 4, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1}

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name


def write_sparse(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    shards: int = 1,
    values: Mapping[str, bytes] | None = None,
) -> None:
    """Write config.json, an index and `shards` files whose data are a hole (zeros).

    But for `values`: the bytes of some tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        own = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        if shards == 1:
            file = "model.safetensors"
        weight_map.update(dict.fromkeys(own, file))
        header: dict[str, Any] = {}
        end = 0
        for name in own:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * _BYTES[dtype]
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
            for name, data in (values or {}).items():
                if name in header:
                    stream.seek(8 + len(text) + header[name]["data_offsets"][0])
                    stream.write(data)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mlx_linear(
    name: str, *shape: int, bits: int = 4, group: int = 64, biases: bool = True
) -> Tensors:
    """The tensors of a quantized module, whose dense weight has this shape."""
    *lead, columns = shape
    scales = (*lead, columns // group)
    parts: Tensors = {f"{name}.weight": ("U32", (*lead, columns * bits // 32))}
    if biases:
        parts[f"{name}.scales"] = parts[f"{name}.biases"] = ("BF16", scales)
    else:
        parts[f"{name}.scales"] = ("U8", scales)
    return parts


def norms(*names: str, size: int) -> Tensors:
    return {f"{name}.weight": ("BF16", (size,)) for name in names}


MLX_4 = {"bits": 4, "group_size": 64, "mode": "affine"}

QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization": MLX_4,
    "quantization_config": MLX_4,
}


def qwen3_moe(config: Mapping[str, Any] = QWEN3_MOE) -> Tensors:
    """The tensors of mlx-lm's Qwen3-MoE of this configuration, all linears in 4 bits."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    experts, width = config["num_experts"], config["head_dim"]
    queries = config["num_attention_heads"] * width
    keys = config["num_key_value_heads"] * width
    found = mlx_linear("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for own, rows in (("q", queries), ("k", keys), ("v", keys)):
            found |= mlx_linear(f"{at}.self_attn.{own}_proj", rows, hidden)
        found |= mlx_linear(f"{at}.self_attn.o_proj", hidden, queries)
        for own in ("gate", "up"):
            place = f"{at}.mlp.switch_mlp.{own}_proj"
            found |= mlx_linear(place, experts, inner, hidden)
        found |= mlx_linear(f"{at}.mlp.switch_mlp.down_proj", experts, hidden, inner)
        found |= mlx_linear(f"{at}.mlp.gate", experts, hidden, bits=8)
        found |= norms(f"{at}.self_attn.q_norm", f"{at}.self_attn.k_norm", size=width)
        both = (f"{at}.input_layernorm", f"{at}.post_attention_layernorm")
        found |= norms(*both, size=hidden)
    found |= norms("model.norm", size=hidden)
    return found | mlx_linear("lm_head", config["vocab_size"], hidden)


def with_routers_of_8_bits(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as mlx-lm writes it where routers have 8 bits."""
    routers: Iterable[str] = (
        f"model.layers.{n}.mlp.gate" for n in range(config["num_hidden_layers"])
    )
    general = {**MLX_4, **{name: {**MLX_4, "bits": 8} for name in routers}}
    return {**config, "quantization": general, "quantization_config": general}
