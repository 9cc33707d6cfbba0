"""One random Llama in the files of every contestant, and what it should answer.

Dense bfloat16 safetensors, an MLX checkpoint (4 bits, group 64, by our `convert`), and
GGUF files in Q4_0 and Q4_1, quantized by the `gguf` package from the same weights. There
every matrix is in the file's own format, `output.weight` too, as `llama-quantize --pure`
writes them; without `--pure` that one would be Q6_K, which is larger and slower.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

BITS, GROUP = 4, 64
THETA, EPSILON = 10000.0, 1e-5


@dataclass(frozen=True)
class Size:
    """Of the Llama, and of what is asked of it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    prompt: int = 128  # before the tokens of which decoding is timed
    new: int = 64
    prefills: tuple[int, ...] = (128, 512)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def longest(self) -> int:
        return max(self.prompt + self.new, *(n + 1 for n in self.prefills))

    def __str__(self) -> str:
        return (
            f"A Llama of {self.layers} layers, hidden {self.hidden}, {self.heads} heads "
            f"({self.kv_heads} of keys and values), MLP {self.mlp}, "
            f"vocabulary {self.vocabulary}, random weights"
        )


SIZES = {
    "llama": Size(16, 2048, 32, 8, 8192, 32768),
    # To see that it works.
    "tiny": Size(2, 128, 4, 2, 256, 512, prompt=8, new=4, prefills=(8, 16)),
}

# ---- writing ---------------------------------------------------------------------


def write(folder: Path, size: Size, kind: str) -> Path:
    """The file or folder of that kind ("dense", "mlx", "q4_0", "q4_1"), made if missing."""
    path = folder / (kind if kind in _FOLDERS else f"{kind}.gguf")
    if not path.exists():
        beside = path.with_name(path.name + ".part")
        shutil.rmtree(beside, ignore_errors=True)
        if kind in _FOLDERS:
            _FOLDERS[kind](folder, beside, size)
        else:
            _write_gguf(write(folder, size, "dense"), beside, size, kind)
        beside.rename(path)
    return path


def config_of(size: Size) -> Any:
    """The configuration that transformers has for it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=4096,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,  # nothing ends a text
    )


def _write_dense(_: Path, path: Path, size: Size) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(size), dtype=torch.bfloat16)
    model.save_pretrained(path)


def _write_mlx(folder: Path, path: Path, size: Size) -> None:
    from affine_tensor import convert

    dense = write(folder, size, "dense")
    convert(dense, path, bits=BITS, group_size=GROUP)


_FOLDERS: dict[str, Callable[[Path, Path, Size], None]] = {
    "dense": _write_dense,
    "mlx": _write_mlx,
}


def _write_gguf(dense: Path, path: Path, size: Size, kind: str) -> None:
    import gguf

    quantized = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_context_length(4096)
    writer.add_embedding_length(size.hidden)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.mlp)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_rope_dimension_count(size.head_dim)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(size.vocabulary)
    writer.add_tokenizer_model("no_vocab")  # ids are all that we need
    stored = _Safetensors(dense)
    for name in stored.files:
        values = _interleaved(name, stored(name).float(), size).numpy()
        kept = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else quantized
        data = gguf.quants.quantize(values, kept)
        writer.add_tensor(_gguf_name(name, size), data, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str, size: Size) -> str:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, size.layers)
    found = names.get_name(name, try_suffixes=(".weight",))
    assert found is not None, name
    return found


def _interleaved(
    name: str, weight: Tensor, size: Size, *, back: bool = False
) -> Tensor:
    """Rows of q and k as llama.cpp rotates them: pairs stand together, not in halves."""
    parts = name.split(".")
    if parts[-2] not in ("q_proj", "k_proj"):
        return weight
    inner = (size.head_dim // 2, 2) if back else (2, size.head_dim // 2)
    rows = weight.reshape(-1, *inner, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


# ---- reading back ----------------------------------------------------------------

Weights = Callable[[str], Tensor]  # by the name that transformers has for it


class _Safetensors:
    """The tensors of a folder by name, read when asked for."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt", device=device)
            self.files |= dict.fromkeys(file.keys(), file)

    def __call__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)


def weights(path: Path, size: Size, kind: str, device: str = "cpu") -> Weights:
    """What the weights of a format are, dequantized by its own library where there is one.

    `kind` is that of `write`, or "torchao": the dense file, quantized as torchao does.
    Those of GGUF files are on the CPU, others on `device`.
    """
    if kind.startswith("q4"):
        return _weights_of_gguf(path, size)
    stored = _Safetensors(path, device)
    return {"mlx": _of_mlx, "torchao": _of_torchao}.get(kind, lambda s: s)(stored)


def _weights_of_gguf(path: Path, size: Size) -> Weights:
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def weight(name: str) -> Tensor:
        tensor = tensors[_gguf_name(name, size)]
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = torch.tensor(stored)  # a copy: what is mapped cannot be written to
        return _interleaved(name, values, size, back=True)

    return weight


def _of_mlx(stored: _Safetensors) -> Weights:
    # From what the bits mean, and not by our own code.
    def weight(name: str) -> Tensor:
        stem = name.removesuffix("weight")
        if stem + "scales" not in stored.files:
            return stored(name)
        pairs = stored(name).view(torch.uint8)
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1)
        scales = stored(stem + "scales").double()[..., None]
        biases = stored(stem + "biases").double()[..., None]
        groups = codes.view(*scales.shape[:-1], GROUP)
        return (groups * scales + biases).flatten(1)

    return weight


def _of_torchao(stored: _Safetensors) -> Weights:
    from torchao.quantization import quant_primitives as torchao
    from torchao.quantization.quant_primitives import MappingType

    def weight(name: str) -> Tensor:
        dense = stored(name)
        if dense.dim() == 1 or "embed_tokens" in name:
            return dense
        block = (1, GROUP)
        scale, zero = torchao._choose_qparams_affine_tinygemm(
            dense, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6,
            None, dense.dtype,
        )  # fmt: skip
        codes = torchao._quantize_affine_tinygemm(
            dense, block, scale, zero, torch.int32, 0, 15
        )
        groups = codes.view(*scale.shape, GROUP) - 8
        scale, zero = scale.double()[..., None], zero.double()[..., None]
        return (groups * scale + zero).flatten(1)

    return weight


# ---- what it should answer -------------------------------------------------------


def reference(weight: Weights, size: Size, ids: list[int], last: int) -> Tensor:
    """Logits of the last so many positions, in float64, layer by layer."""

    def project(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weight(name + ".weight").double())

    def norm(x: Tensor, name: str) -> Tensor:
        shape = (size.hidden,)
        return F.rms_norm(x, shape, weight(name + ".weight").double(), EPSILON)

    x = weight("model.embed_tokens.weight")[torch.tensor(ids)].double()
    turn = _rotation(len(ids), size.head_dim)
    for number in range(size.layers):
        own = f"model.layers.{number}."
        h = norm(x, own + "input_layernorm")
        q, k, v = (
            project(h, f"{own}self_attn.{part}_proj")
            .view(len(ids), -1, size.head_dim)
            .transpose(0, 1)
            for part in "qkv"
        )
        attended = F.scaled_dot_product_attention(
            turn(q)[None], turn(k)[None], v[None], is_causal=True, enable_gqa=True
        )
        attended = attended[0].transpose(0, 1).reshape(len(ids), -1)
        x = x + project(attended, own + "self_attn.o_proj")
        h = norm(x, own + "post_attention_layernorm")
        gated = F.silu(project(h, own + "mlp.gate_proj"))
        x = x + project(gated * project(h, own + "mlp.up_proj"), own + "mlp.down_proj")
    return project(norm(x[-last:], "model.norm"), "lm_head")


def _rotation(length: int, head_dim: int) -> Callable[[Tensor], Tensor]:
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float64), THETA**-steps)
    cos, sin = angles.cos(), angles.sin()

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            (first * cos - second * sin, second * cos + first * sin), dim=-1
        )

    return turn
