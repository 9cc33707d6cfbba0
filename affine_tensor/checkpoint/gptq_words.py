"""GPTQ's packing: codes that lie along the rows of a matrix of words.

Each column of the matrix is one little-endian stream of codes, so a plain transpose
turns it into MLX's words. Two things need the codes themselves: GPTQModel's planar
layout (``gptq_p``), in which the low and the high bits of 32 codes stand in words of
their own, and act-order, which sorts the codes of a column.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# The widths of the planes, from low bits to high. Other widths have one plane, which
# is the plain stream.
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}

# Codes worked on at a time. Measured for 4096 rows of 4 bits: with fewer the operations
# themselves cost more than their work, with more they leave the L2 cache.
_SLICE = 1 << 20

# Where bits of a code lie: word of the block, lowest bit there, how many, lowest bit in
# the code.
_Piece = tuple[int, int, int, int]


def stored_bits(bits: int) -> int:
    """The width that codes of `bits` bits are kept in: MLX's layout has no 7."""
    return 8 if bits == 7 else bits


def repack(words: Tensor, order: Tensor | None, *, bits: int, planar: bool) -> Tensor:
    """MLX's words of GPTQ's.

    `words`: int32 ``[K * bits / 32, N]``; `order`: int64 ``[K]``, which code comes to
    stand at each place, or None. Returns int32 ``[N, K * stored_bits(bits) / 32]``.
    """
    planar = planar and bits in _PLANES
    if order is None and not planar and bits != 7:
        return words.t().contiguous()
    columns = words.shape[0] * 32 // bits
    own = stored_bits(bits)
    packed = words.new_empty(words.shape[1], columns * own // 32)
    step = max(128, _SLICE // columns)
    for start in range(0, words.shape[1], step):
        codes = unpack(words[:, start : start + step], bits=bits, planar=planar)
        if order is not None:
            codes = codes.index_select(0, order)
        packed[start : start + step] = _pack(codes, own).t()
    return packed


def unpack(words: Tensor, *, bits: int, planar: bool) -> Tensor:
    """The codes of words ``[W, n]``: uint8 ``[W * 32 / bits, n]``.

    The words are int32 and make whole blocks, of `block_words` each.
    """
    block = _pieces(bits, planar)
    words = words.unflatten(0, (-1, len(block) * bits // 32))
    codes = torch.empty((len(words), len(block), words.shape[2]), dtype=torch.uint8)
    for i, pieces in enumerate(block):
        parts = []
        for word, shift, width, place in pieces:
            part = words[:, word] >> shift  # arithmetic: the sign's copies are masked
            if len(pieces) > 1:
                part.bitwise_and_((1 << width) - 1).bitwise_left_shift_(place)
            parts.append(part)
        for part in parts[1:]:
            parts[0].bitwise_or_(part)
        codes[:, i] = parts[0]  # its low 8 bits
    return codes.flatten(0, 1).bitwise_and_((1 << bits) - 1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[K, n]`` as plain streams, int32 ``[K * bits / 32, n]``."""
    while bits in (2, 4):  # as bytes, which are four times as fast as words
        codes = (codes[1::2] << bits).bitwise_or_(codes[::2])
        bits *= 2
    block = _pieces(bits, False)
    codes = codes.unflatten(0, (-1, len(block)))
    shape = len(codes), len(block) * bits // 32, codes.shape[2]
    words = torch.empty(shape, dtype=torch.int32)
    begun: set[int] = set()
    for i, pieces in enumerate(block):
        code = codes[:, i].to(torch.int32)
        for word, shift, _, place in pieces:
            part = code >> place if place else code
            part = part << shift if shift else part  # high bits fall off the word
            if word in begun:
                words[:, word].bitwise_or_(part)
            else:
                words[:, word] = part
                begun.add(word)
    return words.flatten(0, 1)


def block_words(bits: int, planar: bool) -> int:
    """Words of the smallest block that holds whole codes."""
    return len(_pieces(bits, planar)) * bits // 32


@cache
def _pieces(bits: int, planar: bool) -> list[list[_Piece]]:
    """For each code of a block, the pieces that it lies in, from its low bits."""
    planes = _PLANES.get(bits, (bits,)) if planar else (bits,)
    count = 32 if planar else 32 // math.gcd(32, bits)
    pieces: list[list[_Piece]] = [[] for _ in range(count)]
    start = place = 0  # of the plane, in bits of the block and of the code
    for width in planes:
        for i, of_code in enumerate(pieces):
            word, shift = divmod(start + i * width, 32)
            low = min(width, 32 - shift)
            of_code.append((word, shift, low, place))
            if low < width:
                of_code.append((word + 1, 0, width - low, place + low))
        start += count * width
        place += width
    return pieces
