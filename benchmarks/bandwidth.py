"""How fast this machine reads memory: what a product with one row is limited by.

    python benchmarks/bandwidth.py

The reader is C (bandwidth.c), compiled when needed with the host's compiler, threads of
its own; torch's sum where there is no compiler. Of several ways to read the fastest is
taken.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import side_by_side

SOURCE = Path(__file__).resolve().parent / "bandwidth.c"
STREAMS = (1, 2, 4, 8)
AHEAD = (0, 512, 1024, 2048)  # bytes


@dataclass(frozen=True)
class Reader:
    """Reads an array once at each call."""

    how: str
    bytes: int
    read: Callable[[], Any]


def best_reader(total: int, threads: int, rounds: int = 5) -> Reader:
    """The fastest reader of `total` bytes with so many threads."""
    array = torch.ones(max(total // 8, 1024 * threads), dtype=torch.int64)
    library = _library()
    if library is None:
        how = "torch's sum of int64, as there is no C compiler"
        return Reader(how, array.nbytes, array.sum)
    readers = {}
    for streams, ahead in itertools.product(STREAMS, AHEAD):
        given = (array.data_ptr(), array.nbytes, threads, streams, ahead)

        def read(given: tuple[int, ...] = given, _keep: Any = array) -> int:
            return library.read_memory(*given)

        how = f"C, {threads} threads of {streams} streams, {ahead} bytes ahead"
        # All are ones: what was read is what was summed up.
        readers[how] = Reader(how, 8 * read(), read)
    seconds = side_by_side({h: r.read for h, r in readers.items()}, rounds=rounds)
    return max(readers.values(), key=lambda r: r.bytes / seconds[r.how])


def _library() -> ctypes.CDLL | None:
    """The compiled reader, or None where nothing compiles it."""
    named = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    compilers = [found for name in named if (found := shutil.which(name))]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bandwidth.so"
        for compiler, host in itertools.product(compilers, (["-march=native"], [])):
            flags = ["-O3", *host, "-shared", "-fPIC", "-pthread"]
            done = subprocess.run(
                [compiler, *flags, "-o", target, SOURCE], capture_output=True, text=True
            )
            if done.returncode == 0:
                library = ctypes.CDLL(str(target))
                size, number = ctypes.c_size_t, ctypes.c_int
                kinds = [ctypes.c_void_p, size, number, number, size]
                library.read_memory.argtypes = kinds
                library.read_memory.restype = ctypes.c_uint64
                return library
            print(f"{compiler}: {done.stderr.strip()}", file=sys.stderr)
    return None


if __name__ == "__main__":
    reader = best_reader(256 << 20, torch.get_num_threads(), 9)
    taken = side_by_side({"read": reader.read})["read"]
    print(f"{reader.bytes / taken / 1e9:.1f} GB/s ({reader.how})")
