"""What products load and store, counted by the emulator, beside MLX's own kernels.

    python tests/metal/traffic_table.py            # a few formats
    python tests/metal/traffic_table.py 1 2 3 4    # these widths, in all group sizes

Each pair is to the size of the buffer: issued bytes, and the distinct sectors of 32 bytes
that an instruction of a simdgroup touches, summed over the steps. What a cache keeps
between steps is not counted, so x is loaded by every simdgroup that needs it. MLX's
sources name a word again for each code in it: a compiler that merges these loads, as this
one does not, divides its first column at M = 1 to 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import metal_emulator as emulator
import pytest
import torch
from emulated import EmulatedMetal
from metal_emulator import Launch
from mlx_kernels import (
    GROUP_SIZES,
    Headers,
    HeadersMissing,
    Variant,
    installed_headers,
    run_qmv,
    source,
)
from mlx_references import Weights
from products import Case, make
from torch import Tensor

from affine_tensor import layout

# Rows of scales are whole sectors with every group size.
N, K = 16, 4096


@dataclass(frozen=True)
class Counts:
    """Of one buffer, to its size: issued bytes and sectors."""

    issued: float
    sectors: float

    def __str__(self) -> str:
        return f"{self.issued:.3g}/{self.sectors:.3g}"


@dataclass(frozen=True)
class Row:
    kernel: str
    m: int
    bits: int
    group: int
    packed: Counts
    scales: Counts
    biases: Counts
    x: Counts
    y: Counts

    def __str__(self) -> str:
        buffers = (self.packed, self.scales, self.biases, self.x, self.y)
        cells = (self.kernel, self.m, self.bits, self.group, *buffers)
        return f"| {' | '.join(map(str, cells))} |"


HEAD = """\
| kernel | M | bits | group | packed | scales | biases | x | y |
|---|---|---|---|---|---|---|---|---|"""


def row(name: str, launch: Launch, case: Case, operands: tuple[Tensor, ...]) -> Row:
    """Counts of packed, scales, biases, x and y."""
    counts = []
    for tensor, traffic in zip(operands, launch.traffic, strict=False):
        issued = traffic.load_bytes + traffic.store_bytes
        sectors = 32 * (traffic.load_sectors + traffic.store_sectors)
        counts.append(Counts(issued / tensor.nbytes, sectors / tensor.nbytes))
    return Row(name, case.m, case.bits, case.group, *counts)


def ours(case: Case, device: EmulatedMetal) -> Row:
    """Of the kernel that the host takes."""
    inputs = make(case)
    device.limits(**dict(case.limits))
    inputs()  # compiled and checked
    with emulator.run(trace=True) as run:
        y = inputs()
    (launch,) = run.launches
    operands = (*inputs.parts[:3], inputs.x, y)
    return row(launch.kernel, launch, case, operands)


def mlx(kernel: str, case: Case, headers: Headers) -> Row:
    """Of MLX's own kernel; more rows of x are more rows of its grid."""
    flags = (False, False) if headers.partial_rows and kernel.endswith("fast") else ()
    variant = Variant(kernel, "float16_t", case.group, case.bits, flags or (False,))
    library = emulator.compile_shader(source([variant]), include_dirs=[headers.folder])
    inputs = make(case)
    packed, scales, biases, _ = inputs.parts
    weights = Weights(
        layout.unpack(packed, bits=case.bits).long(), scales, biases, case.bits
    )
    with emulator.run(trace=True) as run:
        y = run_qmv(getattr(library, variant.name), weights, inputs.x)
    operands = (packed, scales, biases, inputs.x, y)
    return row(kernel.replace("affine_", "MLX "), run.launches[0], case, operands)


def case_of(m: int, bits: int, group: int, **other: Any) -> Case:
    return Case(m=m, n=N, k=K, bits=bits, group=group, **other)


def rows(
    forms: list[tuple[int, int]], many: tuple[int, ...], device: EmulatedMetal
) -> Iterator[Row]:
    try:
        headers = installed_headers()
    except HeadersMissing:
        headers = None
    for bits, group in forms:
        for m in many:
            case = case_of(m, bits, group)
            yield ours(case, device)
            if headers and group in GROUP_SIZES and bits in headers.widths and m <= 8:
                for kernel in ("affine_qmv_fast", "affine_qmv"):
                    yield mlx(kernel, case, headers)


def main() -> None:
    torch.set_num_threads(1)
    widths = [int(word) for word in sys.argv[1:]]
    forms = [(bits, group) for bits in widths for group in layout.GROUP_SIZES]
    print(HEAD)
    with pytest.MonkeyPatch.context() as patch:
        device = EmulatedMetal(patch)
        for found in rows(forms or [(4, 64), (3, 32)], (1, 2, 4, 8, 9, 16, 48), device):
            print(found, flush=True)


if __name__ == "__main__":
    main()
