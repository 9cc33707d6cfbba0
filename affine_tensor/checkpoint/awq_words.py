"""The words of AWQ's layouts, as those of this library: transposed and put in order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout

# Words worked on at a time. Measured on 2 cores: they stay in the cache, and so few do
# not wake torch's threads, which cost more than they save (readers are threads already).
_WORDS = 1 << 15

# Codes unpacked at a time where they are not: the working memory is a few MB.
_CODES = 1 << 20


def held_bits(bits: int) -> int:
    """The width in which this library holds codes of `bits` bits: 7 of them in 8."""
    return bits if bits in layout.BITS else 8


def from_gemm(words: Tensor, rows: int, *, bits: int, shuffled: bool) -> Tensor:
    """gemm's words, int32 ``[K, ceil(N * bits / 32)]``, as int32 ``[N, K * held / 32]``.

    `rows` is N; `shuffled`: whether every eight codes lie in AWQ's order.
    """
    if 32 % bits == 0 and (bits == 4 or not shuffled):
        packed = _transpose(words, bits, shuffled)
        return packed if len(packed) == rows else packed[:rows].contiguous()
    columns, held = len(words), held_bits(bits)
    packed = words.new_empty(rows, columns * held // 32)
    step = 32 * max(1, _CODES // (32 * columns))  # 32 codes end with a word
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = words[:, start * bits // 32 : math.ceil(stop * bits / 32)]
        codes = by_rows(unpack(part, bits)[:, : stop - start], shuffled)
        own = codes if held == 8 else layout.pack(codes, bits=held)
        packed[start:stop] = own.view(torch.int32)
    return packed


def _transpose(words: Tensor, bits: int, shuffled: bool) -> Tensor:
    """int32 ``[K, W]`` to int32 ``[W * 32 / bits, K * bits / 32]``, for codes that do
    not cross words; if `shuffled`, of 4 bits."""
    columns, across = words.shape
    each = 32 // bits  # codes in a word; as many words below each other are a square
    packed = words.new_empty(across * each, columns // each)
    step = max(1, _WORDS // columns)
    for start in range(0, across, step):
        part = slice(start, start + step)
        square = words[:, part].unflatten(0, (-1, each)).transpose(0, 1).contiguous()
        _exchange(square, bits, each)
        if shuffled:  # word 4 * h + i of the square is row 2 * i + h
            square = square.view(2, 4, *square.shape[1:]).transpose(0, 1).flatten(0, 1)
        rows = packed.view(across, each, columns // each)[part]
        rows.copy_(square.permute(2, 0, 1))
    return packed


def from_gemv_fast(words: Tensor) -> Tensor:
    """gemv_fast's int16 ``[N / 4, K]`` as int32 ``[N, K / 8]``.

    Of every 64 columns the words of four rows stand one row after the other. Of every
    32 columns, column ``8 * a + 2 * b + c`` is the nibble ``4 * c + a`` of word ``b``.
    """
    fours, columns = words.shape
    packed = torch.empty(4 * fours, columns // 8, dtype=torch.int32)
    rows = packed.view(fours, 4, columns // 64, 2, 4)
    step = max(1, 2 * _WORDS // columns)
    for start in range(0, fours, step):
        part = slice(start, start + step)
        own = words[part].view(torch.int32).view(-1, columns // 64, 4, 2, 4)
        own = own.permute(4, 0, 2, 1, 3).contiguous()  # b, N / 4, row, K / 64, K / 32
        # Nibbles 0 to 7 to 0 4 1 5 2 6 3 7, so that byte a of word b has those of a and b.
        for apart, mask in ((8, 0x0000FF00), (4, 0x00F000F0)):
            swap = (own >> apart).bitwise_xor_(own).bitwise_and_(mask)
            own.bitwise_xor_(swap)
            own.bitwise_xor_(swap.bitwise_left_shift_(apart))
        _exchange(own, 8, 4)
        rows[part] = own.permute(1, 2, 3, 4, 0)
    return packed


def _exchange(words: Tensor, bits: int, count: int) -> None:
    """Transpose the square of codes in the `count` words along the first dimension.

    By exchanges between pairs of words, of their halves, quarters and so on: the upper
    end of a pair's first word for the lower end of its second.
    """
    apart = count // 2
    while apart:
        shift = apart * bits
        mask = sum(((1 << shift) - 1) << at for at in range(0, 32, 2 * shift))
        pairs = words.view(-1, 2, apart, words[0].numel())
        first, second = pairs[:, 0], pairs[:, 1]
        # The shift copies the sign bit, and the mask drops the copies.
        swap = (first >> shift).bitwise_xor_(second).bitwise_and_(mask)
        second.bitwise_xor_(swap)
        first.bitwise_xor_(swap.bitwise_left_shift_(shift))
        apart //= 2


def unpack(words: Tensor, bits: int) -> Tensor:
    """A stream of codes, int32 ``[..., W]`` to uint8 ``[..., W * 32 / bits]``; if that
    is not whole, up to ``32`` codes more."""
    words = F.pad(words, (0, -words.shape[-1] % bits))
    if bits in layout.BITS:
        return layout.unpack(words, bits=bits)
    # 7 bits: seven bytes are eight codes.
    eights = F.pad(words.view(torch.uint8).unflatten(-1, (-1, bits)), (0, 8 - bits))
    codes = eights.view(torch.int64) >> torch.arange(0, 8 * bits, bits)
    return codes.bitwise_and_((1 << bits) - 1).to(torch.uint8).flatten(-2)


def by_rows(codes: Tensor, shuffled: bool) -> Tensor:
    """Codes along N, uint8 ``[K, N]``, as ``[N, K]``; `shuffled` as in `from_gemm`."""
    if shuffled:
        return codes.unflatten(-1, (-1, 2, 4)).permute(1, 3, 2, 0).flatten(0, 2)
    return codes.t().contiguous()
