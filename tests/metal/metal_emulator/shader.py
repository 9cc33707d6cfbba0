"""A stand-in for `torch.mps.compile_shader` that runs Metal kernels on CPU tensors.

What torch does is kept to the letter: buffers by position, a tensor's storage offset
honoured and its strides not, a Python int sent as int64, `threads` as totals. What it
refuses is refused, and what Metal leaves undefined raises an `EmulationError`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import compilers
from .arguments import Argument, place, sizes_of, tensor_argument, value_argument
from .entries import Entry, entry_points
from .errors import FAILURES, AlignmentError, EmulationError, OutOfBoundsError
from .launches import ORDERS, Launch, Run, Traffic, present_run
from .structures import Buffer, KernelRow, Region, Request, TrafficCount
from .translate import translate

MAX_BUFFERS = 31
MAX_THREADS = 1024
KERNELS_PER_UNIT = 12
HEADERS = (
    '#include "types.hpp"\n#include "math.hpp"\n#include "runtime.hpp"\n'
    '#include "simd.hpp"\n#include "intrinsics.hpp"\n'
)
# The runtime keeps one launch at a time in its globals.
_lock = threading.Lock()


class Kernel:
    """One kernel of a library, called as torch's is."""

    thread_execution_width = 32
    _device = "cpu"

    def __init__(self, library: Library, entry: Entry) -> None:
        self._library, self._entry = library, entry
        self.static_thread_group_memory_length = 0

    @property
    def name(self) -> str:
        return self._entry.name

    @property
    def max_threads_per_threadgroup(self) -> int:
        return min(MAX_THREADS, self._entry.max_threads or MAX_THREADS)

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | Mapping[int, str] | None = None,
        error_buf_idx: int | None = None,
    ) -> None:
        """Run the kernel, and return when it is done.

        Args:
            args: buffers 0, 1, ...: tensors, ints (sent as int64), floats (float32), or
                lists of these.
            threads: total threads, up to three sizes; by default the elements of the
                first tensor.
            group_size: threads of a threadgroup, as many sizes as `threads`.
            arg_casts: one of fp16, bf16, int32, int16, int8, uint8 for every argument
                that is not a tensor, or by position.
            error_buf_idx: where torch binds its buffer of error messages; not emulated.

        Raises:
            EmulationError: the kernel did something that Metal leaves undefined.
        """
        if error_buf_idx is not None:
            raise NotImplementedError("error_buf_idx is not emulated")
        if len(args) > MAX_BUFFERS:
            raise RuntimeError(
                f"{len(args)} arguments; Metal binds up to {MAX_BUFFERS}"
            )
        bound = [self._argument(value, i, arg_casts) for i, value in enumerate(args)]
        if threads is None:
            first = next((a for a in args if isinstance(a, torch.Tensor)), None)
            if first is None:
                raise RuntimeError("threads is needed: no argument is a tensor")
            threads = first.numel()
        total = sizes_of(threads, "threads")
        if math.prod(total) == 0:
            raise RuntimeError(
                f"{self.name}: threads is {total}: Metal has no empty launch, skip it"
            )
        limit = self.max_threads_per_threadgroup
        if group_size is None:
            # As torch has it: whole rows of two- and three-dimensional grids.
            first_size = min(limit, total[0]) if len(total) == 1 else limit
            group = (first_size, *(1 for _ in total[1:]))
        else:
            group = sizes_of(group_size, "group_size")
        if len(group) != len(total):
            raise RuntimeError(
                f"group_size {group} and threads {total} must have as many sizes"
            )
        if 0 in group or max(total) >= 2**32:
            raise RuntimeError(
                f"{self.name}: threads {total} and group_size {group}: sizes of groups "
                "are at least 1, and threads are counted in 32 bits"
            )
        if math.prod(group) > limit:
            raise ValueError(f"Threadgroup size exceeds {limit} limit: {group}")
        self._launch(bound, total, group)

    def _argument(
        self, value: Any, position: int, casts: str | Mapping[int, str] | None
    ) -> Argument:
        if isinstance(value, torch.Tensor):
            return tensor_argument(value, position, self._device)
        cast = casts if isinstance(casts, str) else (casts or {}).get(position, "")
        return value_argument(value, cast, position)

    def _launch(
        self, bound: list[Argument], total: tuple[int, ...], group: tuple[int, ...]
    ) -> None:
        state = present_run() or Run()
        unit = self._library._unit(self._entry, state.trace)
        kernel = unit.kernels[self.name]
        self._check(bound, kernel.contents)
        regions, buffers = place(bound)
        request = Request(kernel=kernel, seed=state.seed)
        request.threads = (*total, *(1,) * (3 - len(total)))
        request.group_size = (*group, *(1,) * (3 - len(group)))
        request.order = ORDERS.index(state.order)
        request.traced, request.partial = state.trace, state.partial_simdgroups
        request.front, request.seconds = state.front, state.seconds
        request.regions, request.buffers = len(regions), len(buffers)
        request.region = (Region * max(1, len(regions)))(*regions)
        request.buffer = (Buffer * max(1, len(buffers)))(*buffers)
        traffic = (TrafficCount * max(1, len(buffers)))()
        request.traffic = traffic
        with _lock:
            unit.launch(ctypes.byref(request))
        texts = tuple(argument.text for argument in bound)
        if request.failure:
            self._fail(unit, request)
        self.static_thread_group_memory_length = request.threadgroup_bytes
        counted = traffic[: len(buffers)] if state.trace else []
        names = [field.name for field in dataclasses.fields(Traffic)]
        measured = tuple(Traffic(*(getattr(t, n) for n in names)) for t in counted)
        state.launches.append(
            Launch(self.name, total, group, texts, measured, request.threadgroup_bytes)
        )

    def _check(self, bound: list[Argument], kernel: KernelRow) -> None:
        """What Metal's validation layer says before a launch."""
        for position, argument in enumerate(bound[: kernel.buffers]):
            wanted = kernel.bindings[position]
            if wanted.bytes > argument.bytes:
                raise OutOfBoundsError(
                    f"{self.name}: buffer {position} ({argument.text}) has "
                    f"{argument.bytes} bytes, the kernel's type has {wanted.bytes}"
                )
            if wanted.alignment and argument.phase % wanted.alignment:
                raise AlignmentError(
                    f"{self.name}: buffer {position} ({argument.text}) starts "
                    f"{argument.phase % wanted.alignment} bytes past a multiple of "
                    f"{wanted.alignment}, which the kernel's type asks for"
                )

    def _fail(self, unit: _Unit, request: Request) -> None:
        kind = FAILURES[request.failure] or EmulationError
        message = f"{self.name}: {request.message.decode(errors='replace')}"
        if request.program_counter:
            place = compilers.locate(request.program_counter - unit.base, unit.path)
            message += f"; {place}" if place else ""
        raise kind(message)


class _Unit:
    """One shared object and the kernels in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runtime = ctypes.CDLL(str(compilers.runtime()))
        self._library = ctypes.CDLL(str(path))
        self.launch = self._runtime.msl_launch
        self.launch.restype = None
        first = ctypes.addressof(ctypes.c_char.in_dll(self._library, "msl_kernels"))
        self.kernels: dict[str, Any] = {}
        while True:
            kernel = ctypes.cast(first, ctypes.POINTER(KernelRow))
            if kernel.contents.name is None:
                break
            self.kernels[kernel.contents.name.decode()] = kernel
            first += ctypes.sizeof(KernelRow)

    @property
    def base(self) -> int:
        """Where the object is loaded."""

        class Info(ctypes.Structure):
            _fields_ = (
                ("file", ctypes.c_char_p),
                ("base", ctypes.c_void_p),
                ("symbol", ctypes.c_char_p),
                ("address", ctypes.c_void_p),
            )

        info = Info()
        address = ctypes.addressof(ctypes.c_char.in_dll(self._library, "msl_kernels"))
        ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info))
        return info.base or 0


class Library:
    """The kernels of one source; each is an attribute under its host name.

    Kernels are compiled in units of a dozen when one of them is first used: a source
    with hundreds of instantiations costs what a test uses of it.
    """

    _cuda = False
    _headers = HEADERS
    _kernel: type[Kernel] = Kernel

    def __init__(self, preprocessed: str) -> None:
        translation = translate(preprocessed, cuda=self._cuda)
        self._text = self._headers + translation.text
        self._entries = {entry.name: entry for entry in translation.entries}
        self._order = {name: number for number, name in enumerate(self._entries)}
        if len(self._entries) < len(translation.entries):
            names = [entry.name for entry in translation.entries]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise SyntaxError(f"kernels that are defined twice: {', '.join(twice)}")
        self._kernels: dict[str, Kernel] = {}
        self._units: dict[tuple[int, bool], Any] = {}

    def __dir__(self) -> list[str]:
        return list(self._entries)

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._entries:
            raise RuntimeError(f"Failed to create function state object for: {name}")
        if name not in self._kernels:
            self._kernels[name] = self._kernel(self, self._entries[name])
        return self._kernels[name]

    def build(self, *, trace: bool = False, workers: int = 2) -> Library:
        """Compile all units now, several at a time."""
        first = list(self._entries.values())[::KERNELS_PER_UNIT]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda entry: self._unit(entry, trace), first))
        return self

    def _unit(self, entry: Entry, traced: bool) -> Any:
        number = self._order[entry.name] // KERNELS_PER_UNIT
        if (number, traced) not in self._units:
            start = number * KERNELS_PER_UNIT
            chosen = list(self._entries.values())[start : start + KERNELS_PER_UNIT]
            self._units[number, traced] = self._compile(chosen, traced)
        return self._units[number, traced]

    def _compile(self, entries: Sequence[Entry], traced: bool) -> Any:
        text = self._text + entry_points(entries)
        return _Unit(compilers.build(text, traced=traced))

    def _compile_first(self) -> None:
        """Compile something now, so that a broken source is known at once."""
        if self._entries:
            self._unit(next(iter(self._entries.values())), False)
        else:
            self._compile([], False)


def compile_shader(
    source: str,
    *,
    include_dirs: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
    language_version: int = 310,
) -> Library:
    """Compile Metal source as `torch.mps.compile_shader` does, for CPU tensors.

    torch's own headers (`#include <c10/metal/...>`) are found, as torch finds them.

    Args:
        source: ASCII text.
        include_dirs: searched for other headers; torch has no such thing.
        defines: macros, such as "NAME=1".
        language_version: Metal's, as in `__METAL_VERSION__`; 310 is macOS 14's.

    Raises:
        SyntaxError: the source does not compile; the text is the compiler's.
    """
    library = Library(
        preprocessed_source(source, include_dirs, defines, language_version)
    )
    library._compile_first()
    return library


def preprocessed_source(
    source: str,
    include_dirs: Sequence[str | Path],
    defines: Sequence[str],
    language_version: int,
) -> str:
    """The source with torch's headers inlined, its includes and macros expanded."""
    for number, line in enumerate(source.split("\n"), 1):
        if not line.isascii():
            raise SyntaxError(
                f"program_source:{number}: torch hands sources over as ASCII, and this "
                f"line is not: {line.strip()!r}"
            )
    return compilers.preprocess(
        source,
        # torch inlines its headers into the source; included, lines stay the source's.
        include_dirs=[*include_dirs, Path(torch.__file__).parent / "include"],
        defines=defines,
        language_version=language_version,
    )
