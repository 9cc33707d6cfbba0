"""What a benchmark ran on: the CPU, its instruction set, caches, and versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# What kernels choose by, as Linux spells it.
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx_vnni", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve"),
)
PACKAGES = (
    *("affine-tensor", "torch", "transformers", "torchao", "mlx", "mlx-lm"),
    "llama-cpp-python",
)
ABSENT = "not installed"


def machine() -> dict[str, Any]:
    known = _cpuinfo()
    flags = set(known.get("flags", known.get("Features", "")).split())
    model = known.get("model name", platform.processor() or platform.machine())
    family = [known[key] for key in ("cpu family", "model") if key in known]
    return {
        "cpu": model + (f" (family {', model '.join(family)})" if family else ""),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cache_bytes": last_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry, empty where there is no /proc."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def last_cache() -> int:
    """Bytes of all last-level caches together, 0 if the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    levels: dict[int, dict[str, int]] = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            size = (cache / "size").read_text().strip()
            level = int((cache / "level").read_text())
            # Processors that share a cache all list it.
            shared = (cache / "shared_cpu_list").read_text()
            levels.setdefault(level, {})[shared] = int(size[:-1]) * units[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return sum(levels[max(levels)].values()) if levels else 0


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of ours and of every peer."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ABSENT
    return found
