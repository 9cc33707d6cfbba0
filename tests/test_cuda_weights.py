"""shaders/cuda/weights.cu on a CPU, thread by thread: the values of the reference.

Needs a C++ compiler, no GPU. Buffers end where no memory is: a read beyond them fails.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from affine_tensor import layout, ops
from affine_tensor.kernels import shaders
from affine_tensor.kernels.cuda import weights
from affine_tensor.kernels.cuda.library import TYPES

COMPILER = shutil.which("g++") or shutil.which("c++")
EMULATOR = Path(__file__).parent / "cuda_emulator"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

_DEQUANTIZE, _EMBEDDING, _QUANTIZE = range(3)


class Launch(ctypes.Structure):
    """`Launch` in emulator.h."""

    _fields_ = [
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("shared", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("order", ctypes.c_uint),
        ("late", ctypes.c_bool),
    ]


_POINTERS = ("ids", "packed", "scales", "biases", "permutation", "y", "w")
_LONGS = (
    *("packed_stride", "scale_stride", "permuted_rows"),
    *("rows", "weight_rows", "groups"),
)
_INTS = ("ids_are_64_bits", "scale_type", "group_shift", "columns")


class Arguments(ctypes.Structure):
    """`Arguments` in weights.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _LONGS),
        *((name, ctypes.c_int) for name in _INTS),
    ]


@cache
def library(bits: int, dtype: torch.dtype, folder: Path) -> ctypes.CDLL:
    file = folder / f"weights_{bits}_{TYPES[dtype]}.so"
    command = [
        *(str(COMPILER), "-std=c++17", "-O1", "-frounding-math", "-ffp-contract=off"),
        *("-fPIC", "-shared", "-w", f"-I{EMULATOR}", f"-I{shaders() / 'cuda'}"),
        *(f"-DBITS={bits}", f"-DX={TYPES[dtype]}"),
        *(str(EMULATOR / "weights.cpp"), "-o", str(file)),
    ]
    subprocess.run(command, check=True)
    made = ctypes.CDLL(str(file))
    made.run.restype = ctypes.c_char_p
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def run(
    made: ctypes.CDLL,
    entry: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    numbers: dict[str, int],
    **tensors: Tensor | None,
) -> None:
    """Run a kernel; what it writes comes back into the tensors."""
    arguments = Arguments()
    sizes = (ctypes.c_int64 * len(_POINTERS))()
    for place, name in enumerate(_POINTERS):
        tensor = tensors.get(name)
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
            # To the last element, gaps between rows included.
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * step for size, step in steps)
            sizes[place] = (last + 1) * tensor.itemsize
    for name, number in numbers.items():
        setattr(arguments, name, number)
    how = Launch((ctypes.c_int * 3)(*grid), block[0] * block[1], 0, 1, 0, False)
    fault = made.run(entry, ctypes.byref(how), block[0], ctypes.byref(arguments), sizes)
    assert fault is None, fault.decode()


def weight(
    rows: int, columns: int, bits: int, group_size: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random words, and scales and biases that are hard to round: many sums are ties."""
    generator = torch.Generator().manual_seed(rows * columns + bits)
    words = (rows, columns * bits // 32)
    packed = torch.randint(
        -(1 << 31), 1 << 31, words, generator=generator, dtype=torch.int32
    )
    groups = (rows, columns // group_size)
    scales, biases = torch.randn(2, *groups, generator=generator)
    kind = torch.randint(0, 5, groups, generator=generator)
    whole = torch.randint(-9, 9, groups, generator=generator).float()
    scales = torch.where(kind == 0, whole / 64, scales)
    biases = torch.where(kind <= 1, -8 * scales.to(scale_dtype).float(), biases)
    biases = torch.where(kind == 2, torch.tensor(3075 / 64), biases)  # half a step
    scales = torch.where(kind == 2, torch.tensor(2.0**-24), scales)
    scales = torch.where(kind == 3, torch.tensor(387 / 192), scales)
    biases = torch.where(kind == 3, torch.tensor(-(2.0**-24)), biases)
    return packed, scales.to(scale_dtype), biases.to(scale_dtype)


def form_of(parts: tuple[Tensor, Tensor, Tensor], group_size: int) -> dict[str, int]:
    packed, scales, _ = parts
    return {
        "packed_stride": packed.stride(0),
        "scale_stride": scales.stride(0),
        "scale_type": TYPES[scales.dtype],
        "group_shift": group_size.bit_length() - 1,
    }


CASES = [
    # scales' dtype, rows, columns, group size
    (torch.bfloat16, 1, 32, 16),
    (torch.float16, 5, 96, 32),
    (torch.float32, 9, 192, 64),
    (torch.bfloat16, 3, 2304, 256),
    (torch.float16, 67, 128, 128),
]


@pytest.mark.parametrize("dtype", layout.LOGICAL_DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_dense_weights(bits: int, dtype: torch.dtype, folder: Path) -> None:
    made = library(bits, dtype, folder)
    for scale_dtype, rows, columns, group_size in CASES:
        form: dict[str, Any] = {"bits": bits, "group_size": group_size}
        parts = weight(rows, columns, bits, group_size, scale_dtype)
        expected = ops.reference("dequantize")(*parts, **form, dtype=dtype)
        y = torch.full_like(expected, float("nan"))
        grid, block = weights._tiles(rows, columns, y.itemsize, weights._ROWS)
        numbers = {**form_of(parts, group_size), "rows": rows, "columns": columns}
        operands = dict(zip(("packed", "scales", "biases"), parts, strict=True))
        run(made, _DEQUANTIZE, grid, block, numbers, y=y, **operands)
        assert torch.equal(y, expected)


def test_rows_that_do_not_follow_each_other_and_few_blocks(folder: Path) -> None:
    parts = weight(37, 256, 4, 64, torch.bfloat16)
    some = tuple(part[::3] for part in parts)
    expected = ops.reference("dequantize")(
        *some, bits=4, group_size=64, dtype=torch.float16
    )
    y = torch.full_like(expected, float("nan"))
    numbers = {**form_of(some, 64), "rows": 13, "columns": 256}  # type: ignore[arg-type]
    operands = dict(zip(("packed", "scales", "biases"), some, strict=True))
    made = library(4, torch.float16, folder)
    run(made, _DEQUANTIZE, (1, 2, 1), (32, 1, 1), numbers, y=y, **operands)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", layout.LOGICAL_DTYPES, ids=str)
def test_permuted_columns(dtype: torch.dtype, folder: Path) -> None:
    experts, rows, columns = 2, 5, 96
    parts = weight(experts * rows, columns, 3, 32, torch.float16)
    stacked = [part.view(experts, rows, -1) for part in parts]
    permutation = torch.rand(experts, columns).argsort(-1).to(torch.int32)
    expected = ops.reference("dequantize")(
        *stacked, permutation, bits=3, group_size=32, dtype=dtype
    )
    y = torch.full_like(expected, float("nan"))
    grid, block = weights._tiles(experts * rows, columns, y.itemsize, weights._ROWS)
    numbers = {"rows": experts * rows, "columns": columns, "permuted_rows": rows}
    run(
        library(3, dtype, folder),
        _DEQUANTIZE,
        grid,
        block,
        {**form_of(parts, 32), **numbers},
        permutation=permutation,
        y=y,
        **dict(zip(("packed", "scales", "biases"), parts, strict=True)),
    )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", layout.LOGICAL_DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_by_number(
    dtype: torch.dtype, ids_dtype: torch.dtype, folder: Path
) -> None:
    for bits, (scale_dtype, rows, columns, group) in zip(
        (3, 4, 6, 8), CASES, strict=False
    ):
        parts = weight(rows, columns, bits, group, scale_dtype)
        dense = ops.reference("dequantize")(
            *parts, bits=bits, group_size=group, dtype=dtype
        )
        ids = torch.tensor([0, rows - 1, rows, 0, -1, rows // 2], dtype=ids_dtype)
        y = torch.zeros(len(ids), columns, dtype=dtype)
        grid, block = weights._tiles(len(ids), columns, y.itemsize, 1)
        numbers = {
            **form_of(parts, group),
            **{"rows": len(ids), "weight_rows": rows, "columns": columns},
            "ids_are_64_bits": ids_dtype == torch.int64,
        }
        operands = dict(zip(("packed", "scales", "biases"), parts, strict=True))
        made = library(bits, dtype, folder)
        run(made, _EMBEDDING, grid, block, numbers, ids=ids, y=y, **operands)
        bad = (ids < 0) | (ids >= rows)
        assert y[bad].isnan().all()
        assert torch.equal(y[~bad], dense[ids[~bad].long()])


def hard_to_quantize(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    w = torch.randn(rows, columns, generator=generator)
    w[0] = 0
    w[1] = 3
    w[2] = w[2].round()
    w[3] = w[3].abs()
    w[4] = 1e-9 * w[4]
    w[5, ::2] = 0.0
    w[5, 1::2] = -0.0
    w[6] = -w[6].abs()
    w[6, 1::3] = -0.0
    w[6, 2::3] = 0.0
    w[7] = w[7].relu() * torch.where(w[8] > 0, 1.0, -0.0)
    return w.to(dtype)


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_codes(bits: int, dtype: torch.dtype, folder: Path) -> None:
    made = library(bits, dtype, folder)
    for group_size, rows in itertools.product(layout.GROUP_SIZES, (11,)):
        columns = 3 * max(32, group_size)
        w = hard_to_quantize(rows, columns, dtype)
        expected = ops.reference("quantize")(w, bits=bits, group_size=group_size)
        words, scales, biases = (torch.zeros_like(part) for part in expected)
        groups = scales.numel()
        blocks = -(-w.numel() // (weights._EIGHT * weights._THREADS))
        numbers = {"groups": groups, "group_shift": group_size.bit_length() - 1}
        run(
            made,
            _QUANTIZE,
            (blocks, 1, 1),
            (weights._THREADS, 1, 1),
            numbers,
            **{"w": w, "y": words, "scales": scales, "biases": biases},
        )
        assert torch.equal(words, expected[0])
        for got, wanted in ((scales, expected[1]), (biases, expected[2])):
            assert torch.equal(got, wanted)
            assert torch.equal(got.signbit(), wanted.signbit())
