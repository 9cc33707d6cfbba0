"""What a benchmark ran on: the GPU, its driver, and versions."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import cpu_machine
import torch

import affine_tensor

PACKAGES = (
    *("torch", "triton", "transformers", "torchao", "gemlite", "bitsandbytes"),
    *("mlx", "mlx-lm"),
)


def machine(kind: str) -> dict[str, Any]:
    own = cpu_machine.machine()
    found = {
        "gpu": "none: on a CPU, to see that it works; times mean nothing",
        "host": own["cpu"],
        "system": own["system"],
        "python": platform.python_version(),
    }
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cache_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split()
    return lines[0] if lines else "unknown"


def versions() -> dict[str, str]:
    """Of ours, of torch and of every peer."""
    return {
        "affine-tensor": affine_tensor.__version__,
        **cpu_machine.versions(PACKAGES),
    }


def headline(figures: dict[str, Any]) -> str:
    """Machine, versions, command and date, of a benchmark's figures."""
    found, known = figures["machine"], figures["versions"]
    absent = [name for name, v in known.items() if v == cpu_machine.ABSENT]
    there = [f"{name} {v}" for name, v in known.items() if name not in absent]
    text = found["gpu"]
    if "driver" in found:
        text += (
            f" ({found['multiprocessors']} multiprocessors, "
            f"{found['memory_bytes'] / 1e9:.0f} GB, {found['cache_bytes'] >> 20} MiB "
            f"of L2), driver {found['driver']}, CUDA {found['cuda']}"
        )
    text += f"; host {found['host']}, {found['system']}; {', '.join(there)}"
    text += f"; not installed: {', '.join(absent)}" if absent else ""
    return f"{text}. {figures['date']}: `{figures['command']}`"
