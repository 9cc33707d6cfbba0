"""Which Metal kernel for which size: one table by generation of chip, or what was timed.

`python -m affine_tensor.doctor --tune` times the candidates on the machine and stores
what it found; the file is read when the first plan is made.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch

from ...tensor import logger
from .. import cache_folder


@dataclass(frozen=True)
class Limits:
    """Where one kernel takes over from another, in rows of x.

    small: up to here `gemv_small` (2 to 8).
    skinny: up to here one tile takes all rows, so that weights are read once (at most 64).
    vectors: up to here `gemv_n` (1 to 4).
    rows_per_expert: from here on, on average, experts work on tiles.
    simdgroups: for each core; with fewer, K is divided among simdgroups.
    """

    small: int = 8
    skinny: int = 64
    vectors: int = 4
    rows_per_expert: int = 2
    simdgroups: int = 24

    def __post_init__(self) -> None:
        for name, low, high in (
            ("small", 1, 8),
            ("skinny", 8, 64),
            ("vectors", 1, 4),
            ("rows_per_expert", 1, 64),
            ("simdgroups", 1, 256),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; {low} to {high} is allowed")


# By the generation that Apple's GPU names have: 13 is M1, 17 is M5. Starting points from
# where MLX changes kernels on these chips, not measured: the older ones convert integers
# to floats more slowly, which favours matrices.
BY_GENERATION = {
    13: Limits(small=6),
    14: Limits(small=6),
    15: Limits(),
    16: Limits(),
    17: Limits(),
}


@dataclass(frozen=True)
class Chip:
    name: str
    generation: int
    cores: int


@cache
def chip() -> Chip:
    """The GPU of this machine. AFFINE_TENSOR_CHIP, such as "Apple M3 Max", overrides."""
    name, cores = os.environ.get("AFFINE_TENSOR_CHIP", ""), 10
    if torch.backends.mps.is_available():
        # Newer than torch 2.11 in part, so asked for with care.
        own_name = getattr(torch.backends.mps, "get_name", lambda: "")
        name = name or str(own_name())
        count = getattr(torch.backends.mps, "get_core_count", lambda: 0)
        cores = int(count()) or cores
    return Chip(name or "unknown", generation_of(name), cores)


def generation_of(name: str) -> int:
    """13 for an M1, and so on; of an unknown name the newest in the table."""
    found = re.search(r"\bM(\d+)\b", name)
    newest = max(BY_GENERATION)
    return min(12 + int(found[1]), newest) if found and int(found[1]) else newest


def tuned_file() -> Path:
    """Where tuned limits are kept, by chip. AFFINE_TENSOR_CACHE names another folder."""
    return cache_folder() / "metal.json"


@cache
def limits() -> Limits:
    """The tuned limits of this chip, or those of its generation."""
    own = BY_GENERATION[chip().generation]
    stored = _stored().get(chip().name)
    if stored is None:
        return own
    try:
        known = {field.name for field in fields(Limits)}
        return Limits(**{k: v for k, v in stored.items() if k in known})
    except (TypeError, ValueError, AttributeError) as error:
        logger.warning(
            "%s is not usable (%s); the built-in limits are used. Remove it, or run "
            "`python -m affine_tensor.doctor --tune` again",
            tuned_file(),
            error,
        )
        return own


def store(found: Limits) -> Path:
    """Keep limits for this chip; they hold from now on."""
    from . import reset  # which imports this module

    everything = _stored() | {chip().name: asdict(found)}
    file = tuned_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    limits.cache_clear()
    reset()
    return file


def _stored() -> dict[str, dict[str, int]]:
    try:
        found = json.loads(tuned_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is ignored: %s", tuned_file(), error)
        return {}
    return found if isinstance(found, dict) else {}
