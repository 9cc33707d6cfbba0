"""The check of each kernel of `values` on first use, and the grids they run on.

Each makes a small input on the CPU, runs the kernel on the device of the call, and
compares with the reference on the CPU, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .library import Kernel

_Size = tuple[int, ...]
_Parts = tuple[Tensor, Tensor, Tensor, "Tensor | None"]

_THREADS = 256  # of a threadgroup

# Simdgroups along the first axis of a grid, whose sizes have 32 bits.
_WIDEST = 1 << 20

_COLUMNS = 512  # whole groups and aligned rows in every format


def tile(chunks: int) -> tuple[int, int]:
    """A threadgroup for rows of so many chunks of 16 codes."""
    wide: int = min(64, 1 << (chunks - 1).bit_length())
    return wide, _THREADS // wide


def numbers(packed: Tensor, scales: Tensor, columns: int) -> list[int]:
    """`Shape` in affine.h. There is no x, and no linear bias."""
    experts = (1, 0, 0)
    if packed.dim() == 3:
        experts = (len(packed), packed.stride(0), scales.stride(0))
    strides = (packed.stride(-2), scales.stride(-2))
    return [0, packed.shape[-2], columns, 0, 0, *strides, 0, 0, *experts]


def grid_quantize(groups: int, group_size: int) -> tuple[_Size, _Size]:
    """Threads and threadgroups: a simdgroup for each group, or for two of 16."""
    simdgroups = -(-groups * min(group_size, 32) // 32)
    wide = min(simdgroups, _WIDEST)
    return (32 * wide, -(-simdgroups // wide)), (_THREADS, 1)


def _differences(what: str, got: Tensor, expected: Tensor) -> str | None:
    got = got.cpu()
    if got.is_floating_point():
        both = got.isnan() & expected.isnan()
        whole = torch.int32 if got.itemsize == 4 else torch.int16
        wrong = (got.view(whole) != expected.view(whole)) & ~both
    else:
        wrong = got != expected
    if not bool(wrong.any()):
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} {what} differ from the reference, the "
        f"first at {list(first)}: {got[first].item()!r} for {expected[first].item()!r}"
    )


def _example(
    form: dict[str, int], dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of a weight [2, 4, 512] on the CPU: random, and hard to round.

    The hard groups have weights that lie next to a tie of two 16-bit numbers, by less
    than float32 can tell.
    """
    generator = torch.Generator().manual_seed(0)
    words = _COLUMNS * form["bits"] // 32
    packed = torch.randint(
        -(1 << 31), 1 << 31, (2, 4, words), generator=generator, dtype=torch.int32
    )
    shape = (2, 4, _COLUMNS // form["group_size"])
    scales, biases = torch.randn(2, *shape, generator=generator)
    near = 2.0**-24
    tie = 3075 / 64 if dtype == torch.float16 else 387 / 64  # thrice a 16-bit number
    hard = [(tie / 3, near), (tie / 3, -near), (-tie / 3, near), (tie, near)]
    hard += [((tie + 1 / 32) / 3, 0.0), (-near, tie)]
    places = scales[0].numel()
    pairs = torch.tensor(hard).repeat(-(-places // len(hard)), 1)[:places]
    scales[0], biases[0] = pairs[:, 0].view(shape[1:]), pairs[:, 1].view(shape[1:])
    return packed, scales.to(scale_dtype), biases.to(scale_dtype)


def compare_dequantize(
    made: Kernel, form: dict[str, int], dtype: torch.dtype, like: _Parts
) -> str | None:
    device = like[0].device
    parts = _example(form, dtype, like[1].dtype)
    permutation = None
    if like[3] is not None:
        permutation = torch.rand(
            2, _COLUMNS, generator=torch.Generator().manual_seed(1)
        )
        permutation = permutation.argsort(-1).to(torch.int32)
    expected = ops.reference("dequantize")(*parts, permutation, **form, dtype=dtype)
    packed, scales, biases = (part.to(device) for part in parts)
    y = torch.full(expected.shape, float("nan"), dtype=dtype, device=device)
    made(
        packed,
        scales,
        biases,
        y,
        numbers(packed, scales, _COLUMNS),
        packed if permutation is None else permutation.to(device),
        threads=(_COLUMNS // 16, 4, 2),
        group_size=(*tile(_COLUMNS // 16), 1),
    )
    return _differences("weights", y, expected)


def compare_embedding(
    made: Kernel,
    form: dict[str, int],
    dtype: torch.dtype,
    like: _Parts,
    id_dtype: torch.dtype,
) -> str | None:
    device = like[0].device
    # Within more rows, so that memory beyond the ends holds weights, not NaN.
    more = [part.flatten(0, 1) for part in _example(form, dtype, like[1].dtype)]
    parts = [part[1:-1] for part in more]
    rows = len(parts[0])
    ids = torch.tensor([*range(rows), 2, rows, -1], dtype=id_dtype)
    expected = torch.full((len(ids), _COLUMNS), float("nan"), dtype=dtype)
    expected[:-2] = ops.reference("embedding")(ids[:-2], *parts, **form, dtype=dtype)
    packed, scales, biases = (part.to(device)[1:-1] for part in more)
    y = torch.zeros(expected.shape, dtype=dtype, device=device)
    made(
        packed,
        scales,
        biases,
        ids.to(device),
        y,
        numbers(packed, scales, _COLUMNS),
        threads=(_COLUMNS // 16, len(ids)),
        group_size=tile(_COLUMNS // 16),
    )
    return _differences("weights", y, expected)


def _example_weights(form: dict[str, int], dtype: torch.dtype) -> Tensor:
    """Rows [11, 512] that try each rule of `layout.quantize`; the last two it refuses."""
    rows = torch.randn(11, _COLUMNS, generator=torch.Generator().manual_seed(0))
    rows[1] = rows[1].abs().neg() - 1  # no zero within the range
    rows[2] = 0.25  # constant
    rows[3] = torch.tensor([-0.0, 0.0]).repeat(_COLUMNS // 2)
    rows[4] = -rows[3]
    rows[5] *= 1e-7  # below the smallest scale
    levels = (1 << form["bits"]) - 1
    rows[6] = (torch.arange(_COLUMNS) % (2 * levels + 1)) / 2  # codes halfway
    rows[7] = rows[7].clamp(min=0)  # its smallest is zero
    rows[7, ::2] *= -0.0
    rows[8] = rows[8] * 1000 + 500
    rows[9, :: form["group_size"]] = float("nan")
    rows[10, 3 :: form["group_size"]] = -float("inf")
    return rows.to(dtype)


def compare_quantize(made: Kernel, form: dict[str, int], like: Tensor) -> str | None:
    rows = _example_weights(form, like.dtype)
    wrong = _compare_rows(made, form, rows[:9], like.device)
    if wrong is None and form["group_size"] == 16 and form["bits"] % 2 == 0:
        # An odd number of groups; two make a run of 32.
        wrong = _compare_rows(made, form, rows[:1, :48], like.device)
    if wrong is not None:
        return wrong
    _, scales, biases = (part.cpu() for part in _run_quantize(made, form, rows[9:]))
    if bool((scales.isfinite() & biases.isfinite()).any()):
        return "NaN or infinity in a weight is not seen in its scale and bias"
    return None


def _run_quantize(made: Kernel, form: dict[str, int], w: Tensor) -> list[Tensor]:
    size = form["group_size"]
    packed = w.new_zeros((len(w), w.shape[1] * form["bits"] // 32), dtype=torch.int32)
    scales, biases = w.new_zeros(2, len(w), w.shape[1] // size)
    threads, group_size = grid_quantize(scales.numel(), size)
    parts = [packed, scales, biases]
    made(w, *parts, scales.numel(), threads=threads, group_size=group_size)
    return parts


def _compare_rows(
    made: Kernel, form: dict[str, int], rows: Tensor, device: torch.device
) -> str | None:
    expected = ops.reference("quantize")(rows, **form)
    got = _run_quantize(made, form, rows.to(device))
    for name, mine, right in zip(
        ("words", "scales", "biases"), got, expected, strict=True
    ):
        wrong = _differences(name, mine, right)
        if wrong is not None:
            return wrong
    return None
