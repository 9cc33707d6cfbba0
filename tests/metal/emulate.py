"""Run a program with the kernels of MPS on the emulator.

    python tests/metal/emulate.py affine_tensor.doctor --quick
    python tests/metal/emulate.py benchmarks/metal.py --sizes tiny

A module or a script, then its arguments. Tensors on the CPU count as tensors on MPS in
it, and `torch.mps.compile_shader` is the emulator's. `affine_tensor.kernels.machine` sees
that and says so at the head of every table.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def emulate() -> None:
    """Put the emulator in the place of MPS, for the rest of the process."""
    for folder in (HERE, HERE.parent.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import metal_emulator
    import torch

    from affine_tensor import ops
    from affine_tensor.kernels.metal import tuning

    torch.set_num_threads(1)  # the shapes are small
    torch.mps.compile_shader = metal_emulator.compile_shader
    ops.device_of = device_of
    chip = tuning.Chip("emulated", 17, 10)
    tuning.chip = lambda: chip


def device_of(tensor: Any) -> str:
    kind = tensor.device.type
    return "mps" if kind == "cpu" else kind


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    program, *arguments = sys.argv[1:]
    emulate()
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        # As if run itself: its neighbours can be imported.
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
