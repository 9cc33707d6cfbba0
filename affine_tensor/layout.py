"""What the bits mean: pack, unpack, quantize and dequantize in plain torch.

A weight of shape ``[..., N, K]`` is held as three arrays:

* ``packed``  uint32 ``[..., N, K * bits / 32]``: each row is one little-endian
  stream of ``bits``-wide codes, whatever the width;
* ``scales``, ``biases``  ``[..., N, K / group_size]``: one pair for each run of
  ``group_size`` neighbours along K, so that ``w = code * scale + bias``.

This is the layout of MLX. Everything here runs on any device that has the dtypes and is
the reference that the kernels are held to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOGICAL_DTYPES = (*WEIGHT_DTYPES, torch.float64)

# Elements worked on at a time. Measured on 2 cores: smaller slices leave the threads
# idle, larger ones leave the cache; the working memory is a few MB.
_SLICE = 1 << 19
_SLICE_ACCELERATOR = 1 << 24

# MLX's smallest scale: it keeps a constant group from dividing by zero.
_SMALLEST_SCALE = 1e-7

# The integer type that holds eight codes of a width, or a divisor of it: what is
# copied between the padded and the dense stream.
_UNIT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_format(bits: int, group_size: int) -> None:
    """Raise ValueError unless `bits` and `group_size` are a pair this library has."""
    for name, value, allowed in (
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
    ):
        # 4.0 and True equal allowed values, and fail or mislead further on.
        if type(value) is not int or value not in allowed:
            raise ValueError(
                f"{name} is {value!r}; allowed are {join(allowed)}. Choose one of these "
                "integers"
            )


def why_not(columns: int, *, bits: int, group_size: int) -> str | None:
    """Why a row of `columns` weights cannot be held in this format, or None."""
    if columns == 0:
        return "its rows are empty"
    if columns % group_size:
        return f"{columns} columns are not a multiple of the group size {group_size}"
    if columns * bits % 32:
        return f"{columns} columns of {bits} bits do not fill whole 32-bit words"
    return None


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Pack integer codes into words.

    `codes`: integers in ``[0, 2 ** bits)``, shape ``[..., K]`` with K * bits a multiple
    of 32. Returns uint32 ``[..., K * bits / 32]``. Codes out of range raise ValueError.
    """
    check_format(bits, GROUP_SIZES[0])
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(
            f"codes are {codes.dtype}; an integer dtype is needed. Convert them first, "
            "with codes.to(torch.uint8) for example"
        )
    _check_rows(codes, "codes")
    columns = codes.shape[-1]
    if columns * bits % 32:
        raise ValueError(
            f"a row of {columns} codes of {bits} bits is not whole 32-bit words. Pad it "
            f"to a multiple of {32 // math.gcd(32, bits)} codes"
        )
    if codes.numel() == 0 or codes.is_meta:
        return codes.new_empty(
            (*codes.shape[:-1], columns * bits // 32), dtype=torch.uint32
        )
    _check_range(codes, bits)
    # Copied even if uint8 already: eight bytes are read at once, from aligned memory.
    aligned = codes.to(torch.uint8, memory_format=torch.contiguous_format, copy=True)
    return _fold(aligned, bits).view(torch.uint32)


def unpack(packed: Tensor, *, bits: int) -> Tensor:
    """Unpack words into codes.

    `packed`: uint32 or int32 ``[..., W]``. Returns uint8 ``[..., W * 32 / bits]``.
    """
    check_format(bits, GROUP_SIZES[0])
    _check_packed(packed)
    _check_rows(packed, "packed words")
    if packed.shape[-1] * 32 % bits:
        raise ValueError(
            f"a row of {packed.shape[-1]} words does not hold whole codes of {bits} "
            f"bits; a multiple of {bits // math.gcd(32, bits)} words does. Check bits"
        )
    return _unfold(packed.contiguous().view(torch.int32), bits)


def quantize(
    weight: Tensor, *, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight: the codes, scales and biases of `mx.quantize` on a CPU.

    `weight`: float32, float16 or bfloat16, ``[..., N, K]``, K a multiple of
    `group_size`. Returns ``packed`` uint32 ``[..., N, K * bits / 32]`` and ``scales``,
    ``biases`` ``[..., N, K / group_size]`` in the weight's dtype.

    The end of the range with the larger magnitude is met exactly (it becomes the bias),
    the scale is then stretched so that zero is met too, and may be negative. One bit is
    the exception: its two codes are the smallest and the largest weight. The arithmetic
    is float32, rounding is half to even, as in MLX.

    Raises ValueError if the shape does not fit, if a weight is NaN or infinite, or if a
    group spans more than its dtype can express.
    """
    check_weight(weight, bits=bits, group_size=group_size)
    columns = weight.shape[-1]
    lead = weight.shape[:-1]
    groups = columns // group_size
    packed = weight.new_empty((*lead, columns * bits // 32), dtype=torch.int32)
    scales = weight.new_empty((*lead, groups))
    biases = weight.new_empty((*lead, groups))
    if weight.is_meta:
        return packed.view(torch.uint32), scales, biases

    rows = weight.detach().reshape(-1, columns)  # [N, K]
    outputs = [
        part.view(len(rows), part.shape[-1]) for part in (packed, scales, biases)
    ]
    for part in _slices(rows):
        codes, scale, bias = _quantize_rows(rows[part], bits, group_size)
        for output, value in zip(
            outputs, (_fold(codes, bits), scale, bias), strict=True
        ):
            output[part].copy_(value)
    check_finite(rows, outputs[1], outputs[2], lead)
    return packed.view(torch.uint32), scales, biases


def dequantize(
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``code * scale + bias``, rounded once to `dtype` (default: that of the scales).

    `packed`: uint32 or int32 ``[..., N, W]``; `scales`, `biases`: any float dtype,
    ``[..., N, K / group_size]``. Returns ``[..., N, K]``. The values are those of
    float64 arithmetic, on devices that lack it those of float32.
    """
    check_parts(packed, scales, biases, bits=bits, group_size=group_size)
    dtype = scales.dtype if dtype is None else dtype
    if dtype not in LOGICAL_DTYPES:
        raise TypeError(
            f"dtype is {dtype}; allowed are {join(LOGICAL_DTYPES)}. Choose one of these"
        )
    columns = scales.shape[-1] * group_size
    weight = scales.new_empty((*scales.shape[:-1], columns), dtype=dtype)
    if weight.is_meta or weight.numel() == 0:
        return weight
    words = packed.view(torch.int32).reshape(-1, packed.shape[-1])  # [N, W]
    scale = scales.reshape(-1, scales.shape[-1])  # [N, K // group_size]
    bias = biases.reshape(-1, biases.shape[-1])
    output = weight.view(-1, columns)
    for part in _slices(output):
        values = _dequantize_rows(words[part], scale[part], bias[part], bits, dtype)
        output[part].copy_(values)
    return weight


def check_weight(weight: Tensor, *, bits: int, group_size: int) -> None:
    """Raise ValueError or TypeError unless this weight's shape and dtype fit."""
    check_format(bits, group_size)
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"the weight is {weight.dtype}; allowed are {join(WEIGHT_DTYPES)}. "
            "Convert it first, with weight.float() for example"
        )
    _check_rows(weight, "the weight")
    columns = weight.shape[-1]
    reason = why_not(columns, bits=bits, group_size=group_size)
    if reason:
        fits = [g for g in GROUP_SIZES if not why_not(columns, bits=bits, group_size=g)]
        choose = (
            f"Choose group_size {join(fits, ' or ')}, or leave" if fits else "Leave"
        )
        raise ValueError(
            f"a weight of shape {list(weight.shape)} cannot be quantized: {reason}. "
            f"{choose} this weight dense"
        )


def check_parts(
    packed: Tensor, scales: Tensor, biases: Tensor, *, bits: int, group_size: int
) -> None:
    """Raise ValueError or TypeError unless the three arrays fit together."""
    check_format(bits, group_size)
    _check_packed(packed)
    if scales.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"the scales are {scales.dtype}; allowed are {join(WEIGHT_DTYPES)}. Convert "
            "scales and biases first, with scales.float() for example"
        )
    if scales.dtype != biases.dtype or scales.shape != biases.shape:
        raise ValueError(
            f"scales are {scales.dtype} {list(scales.shape)} but biases are "
            f"{biases.dtype} {list(biases.shape)}; both must agree"
        )
    _check_rows(packed, "packed words")
    _check_rows(scales, "the scales")
    columns = scales.shape[-1] * group_size
    expected = (*packed.shape[:-1], scales.shape[-1])
    words = columns * bits / 32
    if tuple(scales.shape) != expected or packed.shape[-1] != words:
        raise ValueError(
            f"packed {list(packed.shape)} and scales {list(scales.shape)} do not fit "
            f"together at {bits} bits and group size {group_size}: {scales.shape[-1]} "
            f"groups are {columns} columns, or {words:g} words a row. Check bits, "
            "group_size and that the arrays belong to one weight"
        )


def _quantize_rows(
    rows: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [n, K] and float32 scales and biases [n, K // group_size]."""
    weight = rows.float().unflatten(-1, (-1, group_size))  # [n, K // group_size, group]
    # Two passes: torch.aminmax along the last axis is not vectorized, 10 times slower.
    low, high = weight.amin(dim=-1), weight.amax(dim=-1)
    levels = (1 << bits) - 1
    # Dividing by a tensor, not a number: torch turns a division by a Python number into
    # a product with its reciprocal on some devices, which rounds differently.
    scale = (high - low).div_(torch.full_like(high, levels)).clamp_(min=_SMALLEST_SCALE)
    if bits == 1:
        bias = low
        if bool((low == 0).any()):  # of zeros with both signs, MLX takes the first
            first = weight.argmin(dim=-1, keepdim=True)
            bias = weight.gather(-1, first).squeeze(-1)
    else:
        from_low = low.abs() > high.abs()
        scale = torch.where(from_low, scale, -scale)
        edge = torch.where(from_low, low, high)
        steps = torch.round(edge / scale)
        at_zero = steps == 0
        scale = torch.where(at_zero, scale, edge / steps)
        bias = torch.where(at_zero, torch.zeros_like(edge), edge)
    # `rows` may already be float32, so the first step must not be in place.
    codes = weight - bias.unsqueeze(-1)
    codes.div_(scale.unsqueeze(-1)).round_().clamp_(0, levels)
    codes = codes.flatten(-2).to(torch.uint8, memory_format=torch.contiguous_format)
    return codes, scale, bias


def _dequantize_rows(
    words: Tensor, scale: Tensor, bias: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """``code * scale + bias`` [n, K], such that casting it to `dtype` rounds once."""
    codes = _unfold(words.contiguous(), bits).unflatten(-1, (scale.shape[-1], -1))
    device = words.device.type
    # float32 is faster. On an accelerator the question would wait for the device, on
    # small slices it costs more than it saves.
    in_float32 = device == "mps" or (
        device == "cpu"
        and scale.dtype != torch.float32
        and dtype != torch.float64
        and codes.numel() > 1 << 15
        and _exact_in_float32(scale, bias, bits)
    )
    work = torch.float32 if in_float32 else torch.float64
    values = codes.to(work)  # [n, K // group_size, group]
    values *= scale.to(work).unsqueeze(-1)
    values += bias.to(work).unsqueeze(-1)
    values = values.flatten(-2)
    if work == torch.float64 and dtype.itemsize == 2:
        _round_to_odd_(values)
    return values


def _exact_in_float32(scale: Tensor, bias: Tensor, bits: int) -> bool:
    """Whether float32 holds each ``code * scale + bias`` as it is, for 16-bit parts.

    So it is for groups as `quantize` makes them: the sum is a multiple of the last place
    of scale or bias, whichever is smaller, and has at most 24 bits.
    """
    levels = (1 << bits) - 1
    # The last place of x is more than x * eps / 2; another factor of 2 covers the
    # rounding of the ratio.
    longest = 2**24 * torch.finfo(scale.dtype).eps / 4
    # A bias of zero is exact with any scale, and common: rows of padding have it.
    low, high = (bias / scale).abs_().masked_fill_(bias == 0, 1.0).aminmax()
    near = float(low) > levels / longest and float(high) < longest - levels
    return near and float(scale.abs().amax()) < 2.0**100  # far from overflow


def _round_to_odd_(values: Tensor) -> None:
    """Cut float64 to 13 significant bits, the last one set where any was cut off.

    Casts from float64 to float16 and bfloat16 go through float32 and so round twice,
    which errs where the first rounding makes a tie. After this they are as if from
    float64: two bits more than the target's are enough to tell on which side it lies.
    """
    words = values.view(torch.int64)
    cut = (1 << 40) - 1  # of 53 bits
    sticky = (words & cut).add_(cut).bitwise_and_(cut + 1)
    words.bitwise_and_(~cut).bitwise_or_(sticky)


def _fold(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] to int32 words [..., K * bits // 32].

    Eight codes are read as one 64-bit number and moved together in three halving steps,
    which leaves 8 * bits bits at its low end: their bytes are the stream.
    """
    if bits == 8:
        return codes.view(torch.int32)
    stream = codes.view(torch.int64)
    for lane in (8, 16, 32):
        width = bits * lane // 8  # bits in use at the low end of each lane
        low = _lanes(2 * lane, width)
        moved = (stream >> (lane - width)).bitwise_and_(low << width)
        stream = moved.bitwise_or_(stream & low)
    return _narrow(stream, bits).view(torch.int32)


def _unfold(words: Tensor, bits: int) -> Tensor:
    """int32 words [..., W] to uint8 codes [..., W * 32 // bits]; undoes `_fold`."""
    if bits == 8:
        return words.view(torch.uint8)
    stream = _widen(words, bits)
    for lane in (32, 16, 8):
        width = bits * lane // 8
        low = _lanes(2 * lane, width)
        moved = (stream << (lane - width)).bitwise_and_(_signed(low << lane))
        stream = moved.bitwise_or_(stream & low)
    return stream.view(torch.uint8)


def _lanes(lane: int, width: int) -> int:
    """A 64-bit mask with the low `width` bits of every `lane` bits set."""
    return sum(((1 << width) - 1) << shift for shift in range(0, 64, lane))


def _signed(mask: int) -> int:
    """The int64 that has these 64 bits."""
    mask &= (1 << 64) - 1
    return mask - (1 << 64) if mask >> 63 else mask


def _narrow(stream: Tensor, bits: int) -> Tensor:
    """Drop the empty high bytes of each 64-bit number: `bits` of 8 bytes are in use."""
    if bits in _UNIT:
        return stream.to(_UNIT[bits])  # keeps the low bits
    unit = 2 if bits % 2 == 0 else 1  # bytes
    parts = stream.view(_UNIT[unit]).unflatten(-1, (-1, 8 // unit))
    return parts[..., : bits // unit].flatten(-2)


def _widen(words: Tensor, bits: int) -> Tensor:
    """int32 words to one 64-bit number for each 8 codes; undoes `_narrow`."""
    if bits == 4:
        return words.to(torch.int64)
    unit = bits & -bits  # the largest power of two that divides it, in bytes
    parts = words.view(_UNIT[unit]).unflatten(-1, (-1, bits // unit))
    stream = parts.new_zeros((*parts.shape[:-1], 8 // unit))
    stream[..., : bits // unit] = parts
    return stream.view(torch.int64).flatten(-2)


def _slices(rows: Tensor) -> list[slice]:
    size = _SLICE if rows.device.type == "cpu" else _SLICE_ACCELERATOR
    step = max(1, size // rows.shape[-1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _check_rows(tensor: Tensor, what: str) -> None:
    if tensor.dim() == 0:
        raise ValueError(
            f"{what}: a tensor of shape [] was given; rows [..., K] are needed. Add a "
            "dimension, with unsqueeze(0) for example"
        )


def _check_packed(packed: Tensor) -> None:
    if packed.dtype not in (torch.uint32, torch.int32):
        raise TypeError(
            f"packed words are {packed.dtype}; uint32 or int32 is needed. If these are "
            "the same bytes of another width, packed.view(torch.uint32) reads them so"
        )


def _check_range(codes: Tensor, bits: int) -> None:
    low, high = (int(v) for v in torch.aminmax(codes.to(torch.int64)))
    if low < 0 or high >= 1 << bits:
        seen = low if low < 0 else high
        raise ValueError(
            f"a code is {seen}; {bits} bits hold 0 to {(1 << bits) - 1}. Use more bits or "
            "mend the codes"
        )


def check_finite(
    rows: Tensor, scales: Tensor, biases: Tensor, lead: torch.Size
) -> None:
    """Scales and biases show every NaN and infinity; find out which it was.

    All three are two-dimensional; `lead` are the dimensions that were there before K.
    """
    for part in _slices(rows):
        wrong = scales[part].isfinite().logical_and_(biases[part].isfinite())
        wrong.logical_not_()
        if not bool(wrong.any()):
            continue
        row, group = (int(i) for i in wrong.nonzero()[0])
        row += part.start
        size = rows.shape[-1] // scales.shape[-1]
        columns = slice(group * size, (group + 1) * size)
        place = [int(i) for i in torch.unravel_index(torch.tensor(row), lead)]
        _refuse_group(rows[row, columns], place, columns)


def _refuse_group(group: Tensor, place: list[int], columns: slice) -> None:
    """Say what is wrong with a group whose scale or bias is not finite."""
    bad = group.isfinite().logical_not_().nonzero()
    if len(bad):
        value = float(group[bad[0]])
        name = "NaN" if value != value else f"infinite ({value})"
        raise ValueError(
            f"the weight at {[*place, columns.start + int(bad[0])]} is {name}; only "
            "finite weights can be quantized. Leave this weight dense, or mend the "
            "checkpoint"
        )
    rows = "".join(f"{i}, " for i in place)
    cures = "Scale it down or leave this weight dense"
    if group.dtype == torch.float16:
        cures = "Use more bits, convert it to float32, or leave this weight dense"
    raise ValueError(
        f"the weights at [{rows}{columns.start}:{columns.stop}] lie between "
        f"{float(group.min()):g} and {float(group.max()):g}, too far apart for a scale "
        f"in {join([group.dtype])} ({torch.finfo(group.dtype).max:g} at most). {cures}"
    )


def name_of(dtype: torch.dtype) -> str:
    """A dtype as people write it: ``float16``."""
    return str(dtype).removeprefix("torch.")


def join(values: Iterable[object], separator: str = ", ") -> str:
    """Values as a list in an error message."""
    return separator.join(str(value).removeprefix("torch.") for value in values)
