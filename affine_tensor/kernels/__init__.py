"""Faster implementations of the operators: one file per device.

Each file registers its kernels with `affine_tensor.ops.register_kernel`. Their sources
lie in `shaders/`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


class KernelError(RuntimeError):
    """A kernel that does not compile, or computes something else."""


@dataclass
class Settings:
    """What holds for the kernels of all devices. Changed by assignment, at any time.

    batch_invariant: a row's product is the same, bit for bit, whatever other rows there
        are with it. Costs speed at small batches. (AFFINE_TENSOR_BATCH_INVARIANT=1)
    strict: a kernel that does not compile or fails its check raises, rather than being
        replaced by the slow path and logged. (AFFINE_TENSOR_STRICT=1)
    cpu_backend: "own", or "reference" to dequantize a block of rows at a time and let
        torch multiply. (AFFINE_TENSOR_CPU_BACKEND=reference)
    cuda_backend: "own", or "reference" as for the CPU.
        (AFFINE_TENSOR_CUDA_BACKEND=reference)
    metal_backend: "own", or "hub" for the kernels of `kernels.hub` where they pass their
        check. (AFFINE_TENSOR_METAL_BACKEND=hub)
    """

    batch_invariant: bool = False
    strict: bool = False
    cpu_backend: str = "own"
    cuda_backend: str = "own"
    metal_backend: str = "own"


settings = Settings(
    batch_invariant=_flag("AFFINE_TENSOR_BATCH_INVARIANT"),
    strict=_flag("AFFINE_TENSOR_STRICT"),
    cpu_backend=os.environ.get("AFFINE_TENSOR_CPU_BACKEND", "own"),
    cuda_backend=os.environ.get("AFFINE_TENSOR_CUDA_BACKEND", "own"),
    metal_backend=os.environ.get("AFFINE_TENSOR_METAL_BACKEND", "own"),
)


def cache_folder() -> Path:
    """Where what was compiled and tuned is kept. AFFINE_TENSOR_CACHE names another."""
    folder = os.environ.get("AFFINE_TENSOR_CACHE")
    if folder:
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "affine_tensor"


def shaders() -> Path:
    """The folder of kernel sources: beside the package, else inside it (in a wheel)."""
    package = Path(__file__).resolve().parent.parent
    places = (package.parent / "shaders", package / "shaders")
    for place in places:
        # A stranger's folder of that name beside site-packages must not win.
        if (place / "README.md").is_file() and (
            place.parent == package or (package.parent / "pyproject.toml").is_file()
        ):
            return place
    raise FileNotFoundError(
        f"the kernel sources are in neither {places[0]} nor {places[1]}; install "
        "affine-tensor again"
    )
