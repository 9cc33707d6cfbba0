"""The words of AWQ's layouts, as those of this library: transposed and put in order."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout

# Words worked on at a time. Measured on 2 cores: they stay in the cache, and so few do
# not wake torch's threads, which cost more than they save (readers are threads already).
_SLICE = 1 << 15

# Codes unpacked at a time, as in `layout`: the working memory is a few MB.
_CODES = 1 << 19


def held_bits(bits: int) -> int:
    """The width in which this library holds codes of `bits` bits: 7 of them in 8."""
    return bits if bits in layout.BITS else 8


def transpose_nibbles(words: Tensor) -> Tensor:
    """gemm's int32 ``[K, N / 8]`` of 4 bits to int32 ``[N, K / 8]``.

    Eight words below each other are a square of 64 codes. It is transposed by three
    exchanges between pairs of words: of their halves, quarters and eighths.
    """
    columns, across = words.shape
    packed = words.new_empty(across * 8, columns // 8)
    # The nibble at 4 * h + i of a word is its row 2 * i + h.
    rows = packed.view(across, 4, 2, columns // 8)
    step = max(1, _SLICE // columns)
    for start in range(0, across, step):
        part = slice(start, start + step)
        square = words[:, part].unflatten(0, (-1, 8)).transpose(0, 1).contiguous()
        _exchange(square, ((4, 4, 0x0000FFFF), (2, 4, 0x00FF00FF), (1, 4, 0x0F0F0F0F)))
        rows[part] = square.unflatten(0, (2, 4)).permute(3, 1, 0, 2)
    return packed


def transpose_stream(words: Tensor, rows: int, bits: int, shuffled: bool) -> Tensor:
    """gemm's int32 ``[K, ceil(N * bits / 32)]`` to int32 ``[N, K * held / 32]``."""
    columns, held = len(words), held_bits(bits)
    packed = words.new_empty(rows, columns * held // 32)
    step = 32 * max(1, _CODES // (32 * columns))  # 32 codes end with a word
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = words[:, start * bits // 32 : math.ceil(stop * bits / 32)]
        codes = unpack(part, bits)[:, : stop - start]
        codes = unshuffle(codes) if shuffled else codes
        own = codes.t().contiguous()
        own = own if held == 8 else layout.pack(own, bits=held)
        packed[start:stop] = own.view(torch.int32)
    return packed


def unpack(words: Tensor, bits: int) -> Tensor:
    """A stream of codes, int32 ``[..., W]`` to uint8 ``[..., W * 32 / bits]``; if that
    is not whole, up to ``bits`` codes more."""
    words = F.pad(words, (0, -words.shape[-1] % bits))
    if bits in layout.BITS:
        return layout.unpack(words, bits=bits)
    # 7 bits: seven bytes are eight codes.
    eights = F.pad(words.view(torch.uint8).unflatten(-1, (-1, bits)), (0, 8 - bits))
    shifts = torch.arange(0, 8 * bits, bits)
    codes = eights.view(torch.int64) >> shifts
    return codes.bitwise_and_((1 << bits) - 1).to(torch.uint8).flatten(-2)


def unshuffle(codes: Tensor) -> Tensor:
    """Codes ``[..., N]`` in the order of gemm, in their own."""
    return codes.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).flatten(-3)


def from_gemv_fast(words: Tensor) -> Tensor:
    """gemv_fast's int16 ``[N / 4, K]`` to int32 ``[N, K / 8]``.

    Of every 64 columns the words of four rows stand one row after the other. Of every
    32 columns, column ``8 * a + 2 * b + c`` is the nibble ``4 * c + a`` of word ``b``.
    """
    fours, columns = words.shape
    packed = torch.empty(4 * fours, columns // 8, dtype=torch.int32)
    rows = packed.view(fours, 4, columns // 64, 2, 4)
    step = max(1, 2 * _SLICE // columns)
    for start in range(0, fours, step):
        part = slice(start, start + step)
        own = words[part].view(torch.int32).view(-1, columns // 64, 4, 2, 4)
        own = own.permute(4, 0, 2, 1, 3).contiguous()  # [b, N / 4, row, K / 64, K / 32]
        # Nibbles 0 to 7 to 0 4 1 5 2 6 3 7, so that byte a of word b has those of a and b.
        for apart, mask in ((8, 0x0000FF00), (4, 0x00F000F0)):
            swap = (own >> apart).bitwise_xor_(own).bitwise_and_(mask)
            own.bitwise_xor_(swap)
            own.bitwise_xor_(swap.bitwise_left_shift_(apart))
        _exchange(own, ((2, 8, 0x0000FFFF), (1, 8, 0x00FF00FF)))
        rows[part] = own.permute(1, 2, 3, 4, 0)
    return packed


def _exchange(words: Tensor, steps: Iterable[tuple[int, int, int]]) -> None:
    """Transpose squares of bits that lie in the words along the first dimension, by
    steps: how many words apart a pair is, the width of an element, and the mask of what
    the lower word gives for what the upper has shifted up."""
    for apart, width, mask in steps:
        pairs = words.view(-1, 2, apart, words[0].numel())
        above, below = pairs[:, 0], pairs[:, 1]
        # The shift copies the sign bit, and the mask drops the copies.
        swap = (above >> apart * width).bitwise_xor_(below).bitwise_and_(mask)
        below.bitwise_xor_(swap)
        above.bitwise_xor_(swap.bitwise_left_shift_(apart * width))
