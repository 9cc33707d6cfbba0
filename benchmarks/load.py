"""Memory and time of loading and converting checkpoints of 2 GB, beside mlx-lm.

    python benchmarks/load.py [--gigabytes 2] [--markdown load.md --json load.json]

Writes a Llama and a Qwen3-MoE of random 4-bit words into a temporary folder, and a dense
Llama, and lets each loader read the same file in a process of its own, in turn. Peak is
the resident set's high-water mark above what the process held before the load. Most
architectures' experts lie apart in MLX and joined in transformers, which is what costs
memory. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, save
from safetensors.torch import save_file
from torch import Tensor

from affine_tensor import __version__
from affine_tensor.checkpoint.names import Names

SHARD = 500 << 20  # bytes


@dataclass(frozen=True)
class Model:
    """A kind of model, whose layers are as many as make the file so large."""

    config: dict[str, Any]
    layer: int  # weights in each


_COMMON = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MODELS = {
    "llama": Model(
        {
            **_COMMON,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "intermediate_size": 8192,
        },
        4 * 2048 * 2048 + 3 * 2048 * 8192,
    ),
    # As Qwen3-30B-A3B, with fewer layers: joined experts are a tenth of the file.
    "qwen3_moe": Model(
        {
            **_COMMON,
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
        4 * 2048 * 2048 + 128 * 3 * 2048 * 768,
    ),
}
QUANTIZATION = {"bits": 4, "group_size": 64, "mode": "affine"}
BYTES = 4.5 / 8  # of a weight in that format, with its part of scales and biases


def write_checkpoint(folder: Path, own: Model, size: float, kind: str = "mlx") -> int:
    """A checkpoint of about `size` bytes, of random numbers; returns its bytes.

    `kind`: "mlx" as mlx-lm writes it, "metal" as transformers' MetalConfig does, or
    "dense" in transformers' own names.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = max(1, round(size / (2 if kind == "dense" else BYTES) / own.layer))
    config = {**own.config, "num_hidden_layers": layers}
    if kind == "mlx":
        config |= {"quantization": QUANTIZATION, "quantization_config": QUANTIZATION}
    if kind == "metal":
        config["quantization_config"] = {
            "quant_method": "metal",
            "bits": 4,
            "group_size": 64,
            "modules_to_not_convert": ["lm_head"],
        }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    _write_shards(folder, _tensors(model, kind))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tensors(model: Any, kind: str) -> Iterator[dict[str, Tensor]]:
    """What is stored for each parameter of a model on the meta device."""
    names = Names(model)
    for name, parameter in model.named_parameters():
        if kind == "dense":
            yield from _published(name, parameter.shape)
            continue
        stored: dict[str, Tensor] = {}
        form = next(names.forms(name, parameter.shape))
        for leaf, like in form.save(parameter).items():
            stays = kind == "metal" and ("lm_head" in name or "embed" in name)
            if like.dim() == 1 or leaf.endswith("mlp.gate.weight") or stays:
                stored[leaf] = _random(like.shape)
            else:
                biases = "qbiases" if kind == "metal" else "biases"
                stored |= _packed(leaf.removesuffix("weight"), like.shape, biases)
        yield stored


def _published(name: str, shape: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """A dense parameter, experts one by one."""
    stem, joined, kind = name.partition(".experts.")
    if not joined:
        yield {name: _random(shape)}
        return
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    own = (shape[1] // len(parts), shape[2])
    for number in range(shape[0]):
        for part in parts:
            yield {f"{stem}.experts.{number}.{part}.weight": _random(own)}


def _random(shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05)


def _packed(stem: str, shape: Sequence[int], biases: str) -> dict[str, Tensor]:
    words = torch.randint(
        -(2**31), 2**31, (*shape[:-1], shape[-1] // 8), dtype=torch.int32
    )
    scales = 0.002 * torch.randn(*shape[:-1], shape[-1] // 64)
    return {
        f"{stem}weight": words.view(torch.uint32),
        f"{stem}scales": scales.to(torch.bfloat16),
        f"{stem}{biases}": (-7.5 * scales).to(torch.bfloat16),
    }


def _write_shards(folder: Path, tensors: Iterator[dict[str, Tensor]]) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        shards.append(list(shard))
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "mlx"})
        shard.clear()

    for stored in tensors:
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
        shard |= stored
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- measuring -------------------------------------------------------------------

MEASURE = """
import json, sys, time
from pathlib import Path

def memory(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024

def measure(load):
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    before, start = memory("VmRSS"), time.perf_counter()
    kept = load()
    taken = time.perf_counter() - start
    print(json.dumps({"peak": memory("VmHWM") - before, "after": memory("VmRSS") - before,
                      "seconds": taken}))

folder = sys.argv[1]
"""
# Importing is not loading, and registering neither.
_TRANSFORMERS = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers import Qwen3MoeForCausalLM
"""
LOADERS = {
    "from_pretrained": f"""
import affine_tensor{_TRANSFORMERS}
measure(lambda: affine_tensor.from_pretrained(folder))
""",
    "transformers, after register()": f"""
import affine_tensor{_TRANSFORMERS}
affine_tensor.register()
measure(lambda: AutoModelForCausalLM.from_pretrained(folder))
""",
    "load_checkpoint_": f"""
import affine_tensor, torch{_TRANSFORMERS}
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
measure(lambda: affine_tensor.load_checkpoint_(model, folder))
""",
    # What the host holds while all goes to a device: here one without memory of its own.
    "from_pretrained, to another device": f"""
import affine_tensor{_TRANSFORMERS}
measure(lambda: affine_tensor.from_pretrained(folder, device_map="meta"))
""",
    "mlx-lm": """
import mlx.core as mx
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
measure(lambda: load_model(Path(folder)))
""",
}
# All that transformers itself can do on a CPU: read its own kind of MLX checkpoint (no
# experts, no embeddings, other names) and make it dense.
METAL = {
    "transformers, MetalConfig, dequantized": f"""
import logging
from transformers import MetalConfig{_TRANSFORMERS}
given = MetalConfig(bits=4, group_size=64, dequantize=True)
measure(lambda: AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=given, device_map="cpu"))
""",
    "from_pretrained of the same file": LOADERS["from_pretrained"],
}
CONVERTERS = {
    "convert": f"""
import affine_tensor{_TRANSFORMERS}
measure(lambda: affine_tensor.convert(
    folder, sys.argv[2], max_shard_bytes=int(sys.argv[3])))
""",
    "mlx-lm": """
import mlx.core as mx
from mlx_lm import utils
from mlx_lm.models import llama, qwen3_moe
mx.set_default_device(mx.cpu)
utils.MAX_FILE_SIZE_GB = int(sys.argv[3]) / (1 << 30)

def convert():
    model, config = utils.load_model(Path(folder), lazy=True)
    model, config = utils.quantize_model(model, config, 64, 4)
    utils.save_model(sys.argv[2], model, donate_model=True)

measure(convert)
""",
}


def run(name: str, code: str, *arguments: Any) -> dict[str, float] | None:
    """Run it in a process of its own; None if that fails."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1]
        print(f"{name}: {why}: left out", file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_turn(
    contestants: dict[str, str], folder: Path, rounds: int, *, shard: int | None = None
) -> dict[str, dict[str, float]]:
    """Medians of each; with a `shard` size they write into a folder of their own."""
    for file in folder.glob("*.safetensors"):
        file.read_bytes()  # into the page cache, so that the first is no worse off
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, code in contestants.items():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                more = () if shard is None else (Path(scratch) / "new", shard)
                result = run(name, code, folder, *more)
            if result is not None:
                taken[name].append(result)
    return {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for name, results in taken.items()
        if results
    }


# ---- what is written -------------------------------------------------------------


def table(title: str, size: int, results: dict[str, dict[str, float]]) -> str:
    """A markdown table."""
    lines = [
        f"| {title}, {size / 1e9:.2f} GB | peak GB | peak / file | after / file | s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, r in results.items():
        figures = (r["peak"] / 1e9, r["peak"] / size, r["after"] / size, r["seconds"])
        lines.append(f"| {name} | " + " | ".join(f"{f:.2f}" for f in figures) + " |")
    return "\n".join(lines)


def versions() -> str:
    import transformers

    try:
        from mlx_lm import __version__ as theirs
    except ImportError:
        theirs = "is not installed"
    return (
        f"affine_tensor {__version__}, transformers {transformers.__version__}, "
        f"mlx-lm {theirs}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shard", type=int, default=256 << 20, help="of conversions")
    parser.add_argument("--threads", type=int, help="of torch, where others work too")
    parser.add_argument("--loading-only", action="store_true")
    parser.add_argument("--markdown", help="write the tables there")
    parser.add_argument("--json", help="write the figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    size = options.gigabytes * 1e9
    runs: list[tuple[str, str, str, dict[str, str]]] = []
    for name in options.models:
        runs.append((f"loading {name}", name, "mlx", LOADERS))
    if not options.loading_only:
        runs.append(("loading llama as MetalConfig writes it", "llama", "metal", METAL))
        for name in options.models:
            runs.append((f"converting dense {name}", name, "dense", CONVERTERS))
    figures: dict[str, Any] = {}
    tables = []
    for title, name, kind, contestants in runs:
        shard = options.shard if kind == "dense" else None
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            # Made dense it is four times the file, and takes minutes.
            own = size / 4 if kind == "metal" else size
            taken = write_checkpoint(folder, MODELS[name], own, kind)
            results = in_turn(contestants, folder, options.rounds, shard=shard)
        figures[title] = {"file_bytes": taken, "results": results}
        tables.append(table(title, taken, results))
        print(f"{tables[-1]}\n", flush=True)
    head = (
        f"Each in a process of its own, medians of {options.rounds} ({machine()}; "
        f"{versions()}). Shards of conversions: {options.shard >> 20} MiB."
    )
    if options.markdown:
        text = "\n\n".join([head, *tables]) + "\n"
        Path(options.markdown).write_text(text, encoding="utf-8")
    print(head)
    save(options.json, figures)


if __name__ == "__main__":
    main()
