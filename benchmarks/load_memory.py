"""Peak memory and time of loading a checkpoint of 2 GB, beside mlx-lm.

    python benchmarks/load_memory.py [--gigabytes 2]

Writes a Llama of random 4-bit words into a temporary folder and loads it, each loader
in a process of its own. Peak is the resident set's high-water mark above what the
process held before the load, as a multiple of the file plus what ends up dense. Linux
only (it reads /proc).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, save
from safetensors.torch import save_file

from affine_tensor.quantize import format_table

WIDTH = 2048
LAYER = (4 * WIDTH * WIDTH + 3 * WIDTH * 4 * WIDTH) * 4.5 / 8  # bytes at 4 bits, g64


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """A stock Llama in two shards; returns its bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": max(1, round(gigabytes * 1e9 / LAYER)),
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization": {"bits": 4, "group_size": 64, "mode": "affine"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, value) in enumerate(model.named_parameters()):
        tensors = shards[number % 2]
        if value.dim() == 1:
            tensors[name] = torch.ones(value.shape, dtype=torch.bfloat16)
            continue
        rows, columns = value.shape
        stem = name.removesuffix("weight")
        words = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32)
        tensors[name] = words.view(torch.uint32)
        scales = 0.002 * torch.randn(rows, columns // 64)
        tensors[f"{stem}scales"] = scales.to(torch.bfloat16)
        tensors[f"{stem}biases"] = (-7.5 * scales).to(torch.bfloat16)
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(tensors, folder / name, metadata={"format": "mlx"})
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
LOADERS = {
    "affine_tensor": """
import affine_tensor
from transformers import LlamaForCausalLM  # importing is not loading
measure(lambda: affine_tensor.from_pretrained(folder))
""",
    # What the host holds while all goes to a device: here one without memory of its own.
    "affine_tensor (meta)": """
import affine_tensor
from transformers import LlamaForCausalLM
measure(lambda: affine_tensor.from_pretrained(folder, device_map="meta"))
""",
    "mlx-lm (cpu)": """
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lm.models import llama
from mlx_lm.utils import load_model
measure(lambda: load_model(Path(folder)))
""",
}


def measure(name: str, folder: str) -> dict[str, float] | None:
    """Load in a process of its own; None if that fails."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + LOADERS[name], folder],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), options.gigabytes)
        for file in Path(folder).glob("*.safetensors"):
            file.read_bytes()  # into the page cache, so that the first is no worse off
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
        for _ in range(options.rounds):
            for name in LOADERS:
                if (result := measure(name, folder)) is not None:
                    runs[name].append(result)
    results = {
        name: {key: statistics.median(r[key] for r in taken) for key in taken[0]}
        for name, taken in runs.items()
        if taken
    }
    print(f"loading {size / 1e9:.2f} GB of 4-bit weights ({machine()})")
    rows = [("", "peak GB", "peak / file", "after / file", "seconds")]
    for name, r in results.items():
        figures = (r["peak"] / 1e9, r["peak"] / size, r["after"] / size, r["seconds"])
        rows.append((name, *(f"{figure:.2f}" for figure in figures)))
    print(format_table(rows))
    save(options.json, {"file_bytes": size, "loaders": results})


if __name__ == "__main__":
    main()
