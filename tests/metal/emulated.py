"""The device seam, patched: kernels for MPS run on the emulator.

The fixture `emulated_metal` in `tests/conftest.py` makes an `EmulatedMetal`.
"""

from __future__ import annotations

import metal_emulator as emulator
import pytest
import torch
from torch import Tensor

from affine_tensor import ops
from affine_tensor.kernels import metal, settings
from affine_tensor.kernels.metal import library as metal_library
from affine_tensor.kernels.metal import tuning

# Compiled for the emulator: kept apart from what a real device compiles in this process.
_kernels: dict[metal_library.Variant, metal_library.Kernel | None] = {}


def device_of(tensor: Tensor) -> str:
    kind = tensor.device.type
    return "mps" if kind == "cpu" else kind


class EmulatedMetal:
    """Until the patch is undone, CPU tensors count as MPS tensors.

    A kernel that cannot be used raises. The chip is a new one of ten cores. Compiled
    kernels last as long as the process, plans as long as the patch.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        patch.setattr(torch.mps, "compile_shader", emulator.compile_shader)
        patch.setattr(ops, "device_of", device_of)
        patch.setattr(settings, "strict", True)
        patch.setattr(settings, "metal_backend", "own")
        patch.setattr(settings, "batch_invariant", False)
        patch.setattr(metal_library, "_kernels", _kernels)
        patch.setattr(metal, "_plans", {})
        chip = tuning.Chip("emulated", 17, 10)
        patch.setattr(tuning, "chip", lambda: chip)
        self.limits()

    def limits(self, **changes: int) -> None:
        """Choose kernels by the default limits but for these."""
        found = tuning.Limits(**changes)
        self._patch.setattr(tuning, "limits", lambda: found)
        metal.reset()

    def forget(self) -> None:
        """Forget the compiled kernels, up to the end of the patch."""
        self._patch.setattr(metal_library, "_kernels", {})
        metal.reset()
