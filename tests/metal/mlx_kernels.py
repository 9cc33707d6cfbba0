"""MLX's Metal kernels for affine weights: their sources, and how they are launched.

The kernels come with the installed ``mlx`` wheel as headers. Nothing of them is copied
or changed: a source here includes them and names instantiations.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mlx_references import Weights
from torch import Tensor

KERNELS = "mlx/backend/metal/kernels"
TYPES = {
    "float": torch.float32,
    "float16_t": torch.float16,
    "bfloat16_t": torch.bfloat16,
}
GROUP_SIZES = (32, 64, 128)


class HeadersMissing(Exception):
    """MLX is not installed, or came without its Metal headers."""


@dataclass(frozen=True)
class Headers:
    """MLX's headers, and what differs between the versions of them."""

    folder: Path

    @cached_property
    def text(self) -> str:
        return (self.folder / KERNELS / "quantized.h").read_text(encoding="utf-8")

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of codes; the 1-bit ones came after the others."""
        return (1,) * ("bits == 1" in self.text) + (2, 3, 4, 5, 6, 8)

    @property
    def partial_rows(self) -> bool:
        """Whether qmv_fast can be asked for outputs that are no multiple of 8."""
        return "bool partial_rows" in self.text

    @property
    def reads_past_n(self) -> bool:
        """Whether qmm_t reads weights past N where N is not a multiple of 32.

        The loader of tiles compared a row with the width of its tile, not its height.
        """
        return "bi >= src_tile_dim.x" in self.text

    @property
    def dequantizes_in_type(self) -> bool:
        """Whether qmm_t rounds to T twice in scale * code + bias, not once."""
        return "float s = float(scale)" not in self.text

    def sums_in_type(self, bits: int) -> bool:
        """Whether qmv adds up neighbours of x in T before it widens them."""
        return bits == 1 or (bits != 8 and "U(x[i]) + U(x[i + 1])" not in self.text)


def installed_headers() -> Headers:
    """The headers in the installed wheel; raises HeadersMissing with the reason."""
    try:
        core = importlib.import_module("mlx.core")
    except ImportError as error:
        raise HeadersMissing(f"MLX is not installed: {error}") from error
    folder = Path(str(core.__file__)).parent / "include"
    if not (folder / KERNELS / "quantized.h").is_file():
        raise HeadersMissing(
            f"this MLX has no Metal headers in {folder.name}/{KERNELS}"
        )
    return Headers(folder)


@dataclass(frozen=True)
class Variant:
    """One instantiation of a kernel template of MLX."""

    kernel: str
    type: str
    group_size: int
    bits: int
    flags: tuple[bool, ...] = ()

    @property
    def name(self) -> str:
        flags = "".join(f"_{flag:d}" for flag in self.flags)
        return f"{self.kernel}_{self.type}_gs_{self.group_size}_b_{self.bits}{flags}"

    @property
    def instantiation(self) -> str:
        flags = "".join(f", {str(flag).lower()}" for flag in self.flags)
        function = f"{self.kernel}<{self.type}, {self.group_size}, {self.bits}{flags}>"
        return (
            f'template [[host_name("{self.name}")]] [[kernel]] '
            f"decltype({function}) {function};"
        )


def source(variants: Iterable[Variant]) -> str:
    """What MLX's own quantized.metal does, for the variants asked for."""
    names = ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
    lines = [f'#include "{KERNELS}/{name}"' for name in names]
    lines += [variant.instantiation for variant in variants]
    return "\n".join(lines) + "\n"


# Launches: the grids and groups of MLX's host code


def nan_filled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def _int32(*indices: int) -> dict[int, str]:
    return dict.fromkeys(indices, "int32")


def run_qmv(kernel: Any, weights: Weights, x: Tensor) -> Tensor:
    """y[M, N] of affine_qmv or affine_qmv_fast: 4 rows of weights a simdgroup."""
    (m, k), n = x.shape, weights.codes.shape[0]
    y = nan_filled((m, n), x.dtype)
    kernel(
        *(weights.packed, weights.scales, weights.biases, x, y, k, n),
        threads=(32 * m, 2 * -(-n // 8), 1),
        group_size=(32, 2, 1),
        arg_casts=_int32(5, 6),
    )
    return y


def run_batched_qmv(kernel: Any, weights: Weights, x: Tensor) -> Tensor:
    """y[A, B, M, N]: each of x[A, M, K] with each of weights[B, N, K].

    There are two batch dimensions, and each operand is broadcast over one of them.
    """
    (a, m, k), (b, n, _) = x.shape, weights.codes.shape
    y = nan_filled((a, b, m, n), x.dtype)
    words, groups = k * weights.bits // 32, weights.scales.shape[-1]
    per_group = [0, n * groups, groups, 1]
    kernel(
        *(weights.packed, weights.scales, weights.biases, x, y, k, n),
        *(2, [a, b, m, k], [m * k, 0, k, 1]),
        *(2, [a, b, n, words], [0, n * words, words, 1], per_group, per_group),
        threads=(32 * m, 2 * -(-n // 8), a * b),
        group_size=(32, 2, 1),
        arg_casts=_int32(5, 6, 7, 8, 10, 11),
    )
    return y


def run_qmm(kernel: Any, weights: Weights, x: Tensor, n: int | None = None) -> Tensor:
    """y[M, N] of affine_qmm_t: 32 by 32 values a threadgroup of four simdgroups."""
    m, k = x.shape
    n = weights.codes.shape[-2] if n is None else n
    y = nan_filled((m, n), x.dtype)
    kernel(
        *(weights.packed, weights.scales, weights.biases, x, y, k, n, m),
        threads=(32 * -(-n // 32), 2 * -(-m // 32), 2),
        group_size=(32, 2, 2),
        arg_casts=_int32(5, 6, 7),
    )
    return y


def run_quantize(
    kernel: Any,
    values: Tensor,
    codes: Tensor,
    group_size: int,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and biases of affine_quantize: a thread for a 32nd of a group.

    The codes' bytes are written to codes. With a width, the grid is of two dimensions.
    """
    threads = values.numel() * 32 // group_size
    scales = nan_filled(
        (*values.shape[:-1], values.shape[-1] // group_size), values.dtype
    )
    biases = nan_filled(scales.shape, values.dtype)
    kernel(values, codes, scales, biases, **_grid(threads, width))
    return scales, biases


def run_dequantize(kernel: Any, weights: Weights, width: int | None = None) -> Tensor:
    """The weights of affine_dequantize: a thread for the least whole bytes of codes."""
    values = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 8: 1}[weights.bits]
    dense = nan_filled(weights.codes.shape, weights.scales.dtype)
    operands = (weights.packed, weights.scales, weights.biases, dense)
    kernel(*operands, **_grid(dense.numel() // values, width))
    return dense


def _grid(threads: int, width: int | None) -> dict[str, tuple[int, ...]]:
    """One dimension, as MLX has it below 2^32 threads, or two."""
    if width is None:
        return {"threads": (threads,), "group_size": (min(threads, 1024),)}
    return {"threads": (width, threads // width), "group_size": (32, 2)}
