"""What torch binds for a Python argument: bytes, where they lie, and what is refused."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

import torch

from .structures import Buffer, Region

MAX_BYTES = 4096  # of a value that is not a tensor: Metal's setBytes
CASTS = {"int32": "i", "int16": "h", "int8": "b", "uint8": "B"}


@dataclasses.dataclass
class Argument:
    """One bound buffer: `bytes` readable from `address`; `keep` holds the memory."""

    address: int
    bytes: int
    phase: int
    storage: int
    text: str
    keep: object


def tensor_argument(tensor: torch.Tensor, position: int, device: str) -> Argument:
    if tensor.dtype in (torch.float64, torch.complex128):
        raise TypeError(
            f"argument {position} is {tensor.dtype}, which MPS does not have"
        )
    if tensor.layout != torch.strided or tensor.device.type != device:
        raise RuntimeError(
            f"argument {position} is a {tensor.layout} tensor on {tensor.device}; here "
            f"dense {device.upper()} tensors stand for those on MPS"
        )
    if tensor.numel() and not tensor.data_ptr():
        raise RuntimeError(
            f"argument {position} is a {type(tensor).__name__} without storage of its "
            "own: pass the tensors inside"
        )
    count = 0
    if tensor.numel():
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((int(n) - 1) * int(step) for n, step in sizes)
    size = tensor.element_size()
    offset = int(tensor.storage_offset()) * size
    name = str(tensor.dtype).removeprefix("torch.")
    text = f"{name}{list(tensor.shape)}" + (f"+{offset}" if offset else "")
    storage = tensor.untyped_storage().data_ptr()
    return Argument(tensor.data_ptr(), count * size, offset % 64, storage, text, tensor)


def pack(value: Any, cast: str, position: int) -> tuple[bytes, str]:
    """The bytes that torch sends for a Python value, and a text for the log."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
    kind = int if isinstance(values[0], int) else float
    if not isinstance(values[0], (int, float)):
        raise RuntimeError(
            f"argument {position} is a {type(values[0]).__name__}: Unsupported argument "
            "type (a tensor, int, float, or a list of ints or floats is)"
        )
    if not all(isinstance(v, (int, float) if kind is float else int) for v in values):
        raise RuntimeError(f"argument {position} mixes types: {values!r}")
    shown = value if len(values) > 1 else values[0]
    if cast == "":
        code = "q" if kind is int else "f"
        name = "int64" if kind is int else "float32"
        return struct.pack(f"<{len(values)}{code}", *values), f"{name} {shown}"
    if cast in ("fp16", "bf16"):
        dtype = torch.float16 if cast == "fp16" else torch.bfloat16
        bits = torch.tensor(values, dtype=dtype).view(torch.int16).tolist()
        return struct.pack(f"<{len(bits)}h", *bits), f"{cast} {shown}"
    if cast in CASTS:
        whole = [int(v) for v in values]
        return struct.pack(f"<{len(whole)}{CASTS[cast]}", *whole), f"{cast} {shown}"
    raise RuntimeError(f"Unsupported cast instruction {cast}")


def value_argument(value: Any, cast: str, position: int) -> Argument:
    data, text = pack(value, cast, position)
    if len(data) > MAX_BYTES:
        raise RuntimeError(
            f"argument {position} has {len(data)} bytes; Metal's setBytes takes "
            f"{MAX_BYTES}: pass a tensor"
        )
    memory = ctypes.create_string_buffer(data, len(data))
    address = ctypes.addressof(memory)
    return Argument(address, len(data), 0, address, text, memory)


def sizes_of(value: int | Sequence[int], name: str) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    if not 1 <= len(sizes) <= 3 or any(size < 0 for size in sizes):
        raise RuntimeError(f"{name} is {value!r}; it can be one to three sizes >= 0")
    return sizes


def place(bound: list[Argument]) -> tuple[list[Region], list[Buffer]]:
    """Regions of memory, one for all arguments that overlap, and where buffers lie."""
    merged: list[list[Argument]] = []
    for argument in sorted(bound, key=lambda a: (a.storage, a.address)):
        end = max(a.address + a.bytes for a in merged[-1]) if merged else 0
        if (
            merged
            and merged[-1][0].storage == argument.storage
            and argument.address < end
        ):
            merged[-1].append(argument)
        else:
            merged.append([argument])
    regions: list[Region] = []
    where: dict[int, tuple[int, int]] = {}
    for group in merged:
        begin = group[0].address
        end = max(a.address + a.bytes for a in group)
        for argument in group:
            where[id(argument)] = (len(regions), argument.address - begin)
        regions.append(Region(begin, end - begin, group[0].phase))
    return regions, [Buffer(*where[id(a)], a.bytes) for a in bound]
