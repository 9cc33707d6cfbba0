"""Small valid checkpoints that `fuzz_checkpoints.py` mutates, and modules to load them.

MLX's own quantizer makes those in MLX's formats; those of GPTQ, AWQ and
compressed-tensors are the files in `data`, which the tools of these formats wrote.
"""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

DATA = Path(__file__).parent / "data"
CONFIG, INDEX, ONE = "config.json", "model.safetensors.index.json", "model.safetensors"


@dataclass
class Shard:
    """A safetensors file: the entries of its header in order, and its data."""

    entries: list[tuple[str, Any]]
    data: bytes

    @classmethod
    def parse(cls, content: bytes) -> Shard:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        return cls(list(header.items()), content[8 + length :])

    def content(self) -> bytes:
        # By hand, since a mutated header may have a name twice.
        pairs = (f"{json.dumps(n)}:{json.dumps(e)}" for n, e in self.entries)
        text = ("{" + ",".join(pairs) + "}").encode()
        return struct.pack("<Q", len(text)) + text + self.data

    def tensors(self) -> list[int]:
        """Where the entries of tensors are."""
        return [i for i, (n, _) in enumerate(self.entries) if n != "__metadata__"]

    def part(self, names: set[str]) -> Shard:
        """These tensors alone, one behind the other."""
        entries, data = [], b""
        for name, entry in self.entries:
            if name in names:
                start, end = entry["data_offsets"]
                offsets = [len(data), len(data) + end - start]
                entries.append((name, {**entry, "data_offsets": offsets}))
                data += self.data[start:end]
        return Shard(entries, data)


@dataclass
class Base:
    """A checkpoint, and what it is loaded into: `modules` has kind and shape of each."""

    name: str
    shard: Shard
    config: dict[str, Any]
    modules: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    kind: str = "mlx"  # mlx, gptq, awq, compressed_tensors, or llama

    def model(self) -> nn.Module:
        """A module of the same names, all its numbers 0.5."""
        root = nn.Module()
        for name, (kind, shape) in self.modules.items():
            *path, own = name.split(".")
            place = root
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part]  # type: ignore[assignment]
            place.add_module(own, _module(kind, shape))
        with torch.no_grad():
            for parameter in root.parameters():
                parameter.fill_(0.5)
        return root


def _module(kind: str, shape: tuple[int, ...]) -> nn.Module:
    if kind in ("linear", "plain"):
        return nn.Linear(shape[1], shape[0], bias=kind == "linear")
    if kind == "embedding":
        return nn.Embedding(*shape)
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(shape))
    if kind == "counter":
        del module.weight
        module.register_buffer("steps", torch.zeros(shape, dtype=torch.int32))
    return module


_TREE = {
    "embed": ("embedding", (24, 128)),
    "layers.0.up": ("linear", (16, 128)),
    "layers.0.norm": ("norm", (128,)),
    "layers.1.experts": ("stack", (2, 8, 128)),
    "counter": ("counter", (3,)),
}


def mlx_base(
    name: str,
    settings: dict[str, Any],
    formats: dict[str, dict[str, Any]],
    dtype: str = "float32",
) -> Base:
    """A tree whose modules in `formats` mx.quantize has quantized so."""
    import mlx.core as mx

    draw = torch.Generator().manual_seed(len(name))
    arrays = {}
    for module, (kind, shape) in _TREE.items():
        if kind == "counter":
            arrays[f"{module}.steps"] = mx.array([3, 1, 4], dtype=mx.int32)
            continue
        weight = torch.randn(shape, generator=draw) / 8
        array = mx.array(weight.numpy()).astype(getattr(mx, dtype))
        if kind == "linear":
            arrays[f"{module}.bias"] = array[:, 0]
        if module not in formats:
            arrays[f"{module}.weight"] = array
            continue
        packed, *scales = mx.quantize(array, **formats[module])
        arrays[f"{module}.weight"] = packed
        arrays |= zip([f"{module}.scales", f"{module}.biases"], scales, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ONE
        mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
        shard = Shard.parse(file.read_bytes())
    config: dict[str, Any] = {"model_type": "tree"}
    if settings:
        config |= {"quantization": settings, "quantization_config": settings}
    return Base(name, shard, config, dict(_TREE))


def _quantized() -> list[str]:
    return [n for n, (kind, _) in _TREE.items() if kind not in ("norm", "counter")]


def mlx_bases() -> list[Base]:
    bases = []
    formats = [
        (2, 32, "float32"),
        (3, 64, "float16"),
        (4, 64, "bfloat16"),
        (4, 128, "float16"),
        (5, 32, "float32"),
        (6, 64, "bfloat16"),
        (8, 128, "float32"),
    ]
    for bits, group, dtype in formats:
        form = {"bits": bits, "group_size": group, "mode": "affine"}
        own = dict.fromkeys(_quantized(), form)
        bases.append(mlx_base(f"affine{bits}-g{group}", form, own, dtype))
    form = {"bits": 4, "group_size": 64}
    mixed = {"embed": {"bits": 6, "group_size": 32}, "layers.0.up": form}
    bases.append(mlx_base("mixed", {**form, "embed": mixed["embed"]}, mixed))
    bases.append(mlx_base("silent", {}, dict.fromkeys(_quantized(), form)))
    bases.append(mlx_base("dense", form, {}))
    for mode, bits, group in (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)):
        form = {"mode": mode, "bits": bits, "group_size": group}
        bases.append(mlx_base(mode, form, dict.fromkeys(_quantized(), form)))
    return bases


def peer_bases() -> list[Base]:
    """The files in `data`: one or two modules each, and sometimes a norm."""
    bases = []
    for folder in sorted(DATA.glob("*/*")):
        linears = json.loads((folder / "meta.json").read_text())["linears"]
        shard = Shard.parse((folder / ONE).read_bytes())
        modules = {n: ("plain", (m["N"], m["K"])) for n, m in linears.items()}
        for name, entry in shard.entries:
            if name.endswith("norm.weight"):
                norm = ("norm", tuple(entry["shape"]))
                modules[name.removesuffix(".weight")] = norm
        config = json.loads((folder / CONFIG).read_text())
        kind = folder.parent.name
        bases.append(Base(folder.name, shard, config, modules, kind))
    return bases


def llama_base() -> Base:
    """One for `from_pretrained`: a Llama that mlx-lm quantized."""
    from architectures import Case, write_mlx_checkpoint

    small = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "mlx"
        write_mlx_checkpoint(Case("llama", small), folder)
        shard = Shard.parse((folder / ONE).read_bytes())
        config = json.loads((folder / CONFIG).read_text())
    return Base("llama", shard, config, kind="llama")


def all_bases() -> list[Base]:
    return [*mlx_bases(), *peer_bases(), llama_base()]


@dataclass
class Draft:
    """A checkpoint on its way to a folder."""

    base: Base
    shards: dict[str, Shard]
    jsons: dict[str, Any]
    late: list[Any] = field(default_factory=list)  # what is done to the folder, last

    @classmethod
    def of(cls, base: Base, pieces: int) -> Draft:
        """The checkpoint in one file, or in several with an index."""
        whole = copy.deepcopy(base.shard)
        jsons: dict[str, Any] = {CONFIG: copy.deepcopy(base.config)}
        if pieces == 1:
            return cls(base, {ONE: whole}, jsons)
        names = [whole.entries[i][0] for i in whole.tensors()]
        shards, weight_map = {}, {}
        for i in range(pieces):
            own = set(names[i::pieces])
            file = f"model-{i + 1:05d}-of-{pieces:05d}.safetensors"
            shards[file] = whole.part(own)
            weight_map |= dict.fromkeys(sorted(own), file)
        jsons[INDEX] = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        return cls(base, shards, jsons)

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for name, shard in self.shards.items():
            (folder / name).write_bytes(shard.content())
        for name, value in self.jsons.items():
            (folder / name).write_text(json.dumps(value))
        for step in self.late:
            step(folder)
