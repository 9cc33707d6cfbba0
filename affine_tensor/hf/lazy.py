"""What transformers takes for tensors of an open file, and reads when it needs them.

It writes ``tensor[...].to(device)`` to read one. Under tensor parallelism it asks for
the shape first and cuts as safetensors lets it, ``tensor[2:4, :]``; of a fused weight
(gate and up) it takes a piece of each half, and joins them with `torch.cat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..checkpoint.files import move
from ..distributed import cut
from ..tensor import AffineQuantizedTensor

Slices = tuple[slice, ...]


class Lazy:
    """A tensor of a state dict, which is read when transformers takes it to a device."""

    dtype: torch.dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Lazy:
        return self  # all of it: transformers writes tensor[...] to read

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        raise NotImplementedError


class Whole(Lazy):
    """One that can be cut."""

    name: str

    def get_shape(self) -> list[int]:
        raise NotImplementedError

    def read(self, device: torch.device) -> Tensor:
        raise NotImplementedError

    def read_rows(self, start: int, stop: int) -> Tensor | None:
        """These entries of the first dimension, on the CPU, if no more need be read."""
        return None

    def finish(self, value: Tensor) -> Tensor:
        """What transformers is given of what was read."""
        return value

    def __getitem__(self, index: Any) -> Lazy:
        return self if index is Ellipsis else Shard(self, [index])

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.finish(self.read(torch.device(device or "cpu")))


class Shard(Lazy):
    """What one process keeps of a tensor: pieces of it, joined along a dimension."""

    def __init__(self, whole: Whole, pieces: list[Slices], dim: int = 0) -> None:
        self.whole, self.pieces, self.dim = whole, pieces, dim
        self.dtype = whole.dtype

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        whole: list[Tensor] = []  # read once, and only if it must be
        kept = [self._read(piece, whole) for piece in self.pieces]
        if len(kept) == 1:  # memory of its own: the rest is not kept
            value = kept[0].clone(memory_format=torch.contiguous_format)
        else:
            value = torch.cat(kept, self.dim)
        return self.whole.finish(move(value, torch.device(device or "cpu")))

    def _read(self, piece: Slices, whole: list[Tensor]) -> Tensor:
        shape = self.whole.get_shape()
        bounds = [own.indices(size)[:2] for own, size in zip(piece, shape, strict=True)]
        value = None if whole else self.whole.read_rows(*bounds[0])
        if value is not None:
            bounds[0] = (0, value.shape[0])
        else:
            whole[:] = whole or [self.whole.read(torch.device("cpu"))]
            value = whole[0]
        for dim, (start, stop) in enumerate(bounds):
            if (start, stop) == (0, value.shape[dim]):
                continue
            if isinstance(value, AffineQuantizedTensor):
                value = cut(value, dim, start, stop, self.whole.name)
            else:
                value = value.narrow(dim, start, stop - start)
        return value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Shard:
        if func is not torch.cat:
            raise NotImplementedError(f"{func} of a tensor that is not read yet")
        shards = cast(Sequence[Shard], args[0])
        dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
        return Shard(shards[0].whole, [p for one in shards for p in one.pieces], dim)
