"""MLX's float formats, as what this library has: 5-bit affine groups, or dense.

mxfp4 and nvfp4 codes are floats of 4 bits (e2m1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
negatives, times the scale of their group. All are whole numbers of half steps from -12
to 12, so a group is exactly one of 5-bit affine codes 0 to 24, whose scale is half the
group's and whose bias is -6 times the group's. mxfp8 codes (e4m3) are not evenly spaced.

The scales are uint8: of the mx formats powers of two (e8m0), of nvfp4 floats (e4m3).
nvfp4 may have a global scale besides, float32, which is the largest weight: its groups'
scales are then parts of ``global_scale / 2688``, with 2688 the largest e4m3 (448) times
the largest e2m1 (6).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import layout
from .files import CheckpointError, cast

# Bits and group size: each mode has one pair.
MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}

AFFINE_BITS = 5  # of an e2m1 code in half steps

_LARGEST = 448 * 6
_HALF_STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # by e2m1 code

# Elements worked on at a time, as in `layout`: the working memory is a few MB.
_SLICE = 1 << 19


def why_dense(mode: str, columns: int) -> str | None:
    """Why a weight of this mode cannot be held in affine groups, or None."""
    if mode == "mxfp8":
        return "it is not affine"
    return layout.why_not(columns, bits=AFFINE_BITS, group_size=MODES[mode][1])


def as_affine(
    words: Tensor, codes: Tensor, global_scale: Tensor | None, *, mode: str, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """An mxfp4 or nvfp4 weight as 5-bit affine parts, which have the same values.

    `words`: int32 ``[..., N, K / 8]``; `codes` of the scales: uint8 ``[..., N, K / g]``;
    `global_scale`: one number, or one for each matrix of the leading dimensions. Returns
    packed int32 ``[..., N, K * 5 / 32]`` and scales and biases ``[..., N, K / g]``. They
    are bfloat16, which holds both exactly; with a global scale they are float32, and the
    scale is rounded to 22 bits, so that its multiples are exact and zeros stay zeros.

    Raises CheckpointError, which names the tensor at `name` ("….weight"), for scales
    that are not finite or too large.
    """
    scales = _group_scales(codes, global_scale, mode, name)
    dtype = torch.bfloat16
    if global_scale is not None:
        dtype = torch.float32
        _round_to_22_bits_(scales)
    biases = scales * -6  # 3 times the scale's 22 bits: exact
    _check(codes, biases, mode, name)
    return _to_five_bits(words), scales.mul_(0.5).to(dtype), biases.to(dtype)


def as_dense(
    words: Tensor,
    codes: Tensor,
    global_scale: Tensor | None,
    *,
    mode: str,
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight ``[..., N, K]`` of any mode, float32 rounded once to `dtype`.

    The parts are those of `as_affine`; the words of mxfp8 are ``[..., N, K / 4]``.
    Raises CheckpointError where a weight is NaN or becomes infinite.
    """
    scales = _group_scales(codes, global_scale, mode, name)
    _check(codes, scales, mode, name)
    bits, group_size = MODES[mode]
    columns = codes.shape[-1] * group_size
    weight = torch.empty((*codes.shape[:-1], columns), dtype=dtype, device="cpu")
    rows = weight.view(-1, columns)
    words = words.reshape(-1, words.shape[-1])
    scales = scales.view(-1, scales.shape[-1], 1)
    for part in _slices(len(rows), columns):
        own = layout.unpack(words[part], bits=bits)
        value = _look_up(_e4m3() if bits == 8 else _e2m1(), own)
        value.unflatten(-1, (-1, group_size)).mul_(scales[part])
        largest = max(abs(float(end)) for end in value.aminmax())  # one pass; NaN shows
        if not math.isfinite(largest):
            row, column = _first(value.isfinite())
            at = [*_place(row + part.start, weight.shape[:-1]), column]
            scale = float(scales[part][row, column // group_size])
            raise CheckpointError(
                f"{name} is {float(value[row, column])} at {at} (code "
                f"{int(own[row, column])}, scale {scale:g}); only finite weights are "
                "loaded. Fetch the file again, or convert the model again"
            )
        fits = largest <= torch.finfo(dtype).max
        rows[part] = value if fits else cast(name, value, dtype)
    return weight


def _group_scales(
    codes: Tensor, global_scale: Tensor | None, mode: str, name: str
) -> Tensor:
    """The scales of the groups, float32 ``[..., N, K / g]``."""
    scales = _look_up(_e4m3() if mode == "nvfp4" else _e8m0(), codes)
    if global_scale is None:
        return scales
    if not bool(global_scale.isfinite().all()):
        bad = float(global_scale[global_scale.isfinite().logical_not()][0])
        raise CheckpointError(
            f"{_beside(name, 'global_scale')} holds {bad}; only finite numbers are "
            "allowed. Fetch the file again, or convert the model again"
        )
    shape = () if global_scale.numel() == 1 else (*codes.shape[:-2], 1, 1)
    # In this order MLX multiplies, and rounds.
    return scales.mul_(global_scale.float().view(shape).div(_LARGEST))


def _check(codes: Tensor, values: Tensor, mode: str, name: str) -> None:
    """Raise CheckpointError where a scale, or a multiple of it, is not finite."""
    if bool(values.isfinite().all()):
        return
    at = _first(values.isfinite())
    code = int(codes[tuple(at)])
    table = _e4m3() if mode == "nvfp4" else _e8m0()
    allowed = {
        "mxfp4": "0 to 252 (2**-127 to 2**125, whose weights float32 can express)",
        "nvfp4": "all but 127 and 255 (NaN)",
        "mxfp8": "0 to 254 (2**-127 to 2**127)",
    }
    raise CheckpointError(
        f"{_beside(name, 'scales')} is {code} at {at}, a scale of "
        f"{float(table[code]):g}; {mode} codes may be {allowed[mode]}. Fetch the file "
        "again, or convert the model again"
    )


def _to_five_bits(words: Tensor) -> Tensor:
    """e2m1 words, int32 ``[..., W]``, to words of 5-bit codes, ``[..., W * 5 / 4]``.

    Four codes are looked up at once: 16 bits become 20. Two such make 40 bits, five
    bytes of the stream. Several times faster than code by code.
    """
    width = words.shape[-1]
    packed = torch.empty(
        (*words.shape[:-1], width * 5 // 4), dtype=torch.int32, device="cpu"
    )
    rows, output = words.reshape(-1, width), packed.view(-1, width * 5 // 4)
    for part in _slices(len(rows), 8 * width):
        fours = rows[part].view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
        stream = _look_up(_five_bits(), fours).view(torch.int64)
        low = stream & 0xFFFFF  # the high half begins at bit 32, and goes to bit 20
        stream.bitwise_right_shift_(12).bitwise_and_(0xFFFFF << 20).bitwise_or_(low)
        whole = stream.view(torch.uint8).unflatten(-1, (-1, 8))
        output[part].view(torch.uint8).unflatten(-1, (-1, 5)).copy_(whole[..., :5])
    return packed


def _round_to_22_bits_(scales: Tensor) -> None:
    """Round float32 to 22 significant bits, so that its triple has no more than 24."""
    scales.view(torch.int32).add_(2).bitwise_and_(-4)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # The fastest way on a CPU; indexing would go through int64.
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


@functools.cache
def _five_bits() -> Tensor:
    """The 20 bits of four 5-bit codes, by the 16 bits of four e2m1 codes."""
    half_steps = torch.tensor(_HALF_STEPS, dtype=torch.int32, device="cpu") + 12
    fours = torch.arange(1 << 16, dtype=torch.int32, device="cpu")
    codes = [half_steps[(fours >> 4 * i) & 15] << 5 * i for i in range(4)]
    return codes[0] | codes[1] | codes[2] | codes[3]


@functools.cache
def _e2m1() -> Tensor:
    return torch.tensor(_HALF_STEPS, dtype=torch.float32, device="cpu") / 2


@functools.cache
def _e4m3() -> Tensor:
    codes = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
    return codes.view(torch.float8_e4m3fn).float()


@functools.cache
def _e8m0() -> Tensor:
    values = [2.0 ** (code - 127) for code in range(255)]
    return torch.tensor([*values, math.nan], dtype=torch.float32, device="cpu")


def _slices(count: int, columns: int) -> list[slice]:
    step = max(1, _SLICE // columns)
    return [slice(start, start + step) for start in range(0, count, step)]


def _first(good: Tensor) -> list[int]:
    """Where the first is that is not good."""
    return [int(i) for i in good.logical_not().nonzero()[0]]


def _place(row: int, lead: torch.Size) -> list[int]:
    """The index in dimensions `lead` of a row that was counted through."""
    place: list[int] = []
    for size in reversed(lead):
        row, index = divmod(row, size)
        place.insert(0, index)
    return place


def _beside(name: str, part: str) -> str:
    return f"{name.removesuffix('weight')}{part}"
