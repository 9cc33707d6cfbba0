"""A stand-in for `torch.mps.compile_shader` that runs Metal kernels on CPU tensors.

What torch does is kept to the letter: buffers by position, a tensor's storage offset
honoured and its strides not, a Python int sent as int64, `threads` as totals. What it
refuses is refused, and what Metal leaves undefined raises an `EmulationError`.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import math
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch

from . import compilers
from .entries import Entry, entry_points
from .errors import FAILURES, AlignmentError, EmulationError, OutOfBoundsError
from .translate import translate

MAX_BUFFERS = 31
MAX_BYTES = 4096  # of a value that is not a tensor: Metal's setBytes
MAX_THREADS = 1024
KERNELS_PER_UNIT = 12
ORDERS = ("forward", "backward", "random")
CASTS = {"int32": "i", "int16": "h", "int8": "b", "uint8": "B"}
HEADERS = (
    '#include "types.hpp"\n#include "math.hpp"\n#include "runtime.hpp"\n'
    '#include "simd.hpp"\n#include "intrinsics.hpp"\n'
)


# --------------------------------------------------------------------------- settings
@dataclasses.dataclass(frozen=True)
class Traffic:
    """How often a launch touched one buffer, counted by a traced run.

    Bytes are as issued: each thread's own accesses. Sectors are the distinct aligned
    32 bytes that one instruction of one simdgroup touches, summed over its steps.
    """

    loads: int
    load_bytes: int
    load_sectors: int
    stores: int
    store_bytes: int
    store_sectors: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: its kernel, total threads, group size and what was bound.

    `buffers` holds one text for each argument, such as `float32[4, 8]+16` (a tensor
    whose storage offset is 16 bytes) or `int64 5`. `traffic` is there for traced runs.
    """

    kernel: str
    threads: tuple[int, ...]
    group_size: tuple[int, ...]
    buffers: tuple[str, ...]
    traffic: tuple[Traffic, ...] = ()
    threadgroup_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kernel}({', '.join(self.buffers)}) "
            f"threads {self.threads} group {self.group_size}"
        )


@dataclasses.dataclass
class Run:
    """How kernels run within `with run(...)`, and the launches seen there."""

    order: str = "forward"
    seed: int = 0
    trace: bool = False
    partial_simdgroups: bool = False
    front: bool = False
    launches: list[Launch] = dataclasses.field(default_factory=list)


_current: contextvars.ContextVar[Run | None] = contextvars.ContextVar(
    "run", default=None
)


@contextlib.contextmanager
def run(
    order: Literal["forward", "backward", "random"] = "forward",
    *,
    seed: int = 0,
    trace: bool = False,
    partial_simdgroups: bool = False,
    front: bool = False,
) -> Iterator[Run]:
    """Set how kernels launched inside the block run, and log their launches.

    Args:
        order: in which order lanes take turns, and threadgroups follow each other.
        seed: of the random order.
        trace: look at every access: exact bounds, races, and traffic. About 20 times
            slower.
        partial_simdgroups: let some lanes of a simdgroup meet in a reduction while the
            others wait at a barrier or have returned. Legal in Metal; an error by
            default, since it is seldom meant.
        front: place tensors right behind a guard page, so that reads before their
            beginning are found, not those past their end.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it can be one of {', '.join(ORDERS)}")
    state = Run(order, seed, trace, partial_simdgroups, front)
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)


# ------------------------------------------------------- the runtime's own structures
class _Region(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("phase", ctypes.c_uint64),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("region", ctypes.c_int64),
        ("offset", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    )


class _Traffic(ctypes.Structure):
    _fields_ = tuple((f.name, ctypes.c_uint64) for f in dataclasses.fields(Traffic))


class _Binding(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint32), ("alignment", ctypes.c_uint32))


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("entry", ctypes.c_void_p),
        ("bindings", ctypes.POINTER(_Binding)),
        ("buffers", ctypes.c_uint32),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.POINTER(_Kernel)),
        ("threads", ctypes.c_uint32 * 3),
        ("group_size", ctypes.c_uint32 * 3),
        ("order", ctypes.c_int32),
        ("traced", ctypes.c_int32),
        ("partial", ctypes.c_int32),
        ("front", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.c_uint64),
        ("buffers", ctypes.c_uint64),
        ("region", ctypes.POINTER(_Region)),
        ("buffer", ctypes.POINTER(_Buffer)),
        ("traffic", ctypes.POINTER(_Traffic)),
        ("failure", ctypes.c_int32),
        ("threadgroup_bytes", ctypes.c_uint32),
        ("program_counter", ctypes.c_uint64),
        ("message", ctypes.c_char * 1024),
    )


# The runtime keeps one launch at a time in its globals.
_lock = threading.Lock()


# -------------------------------------------------------------------------- arguments
@dataclasses.dataclass
class _Argument:
    """One bound buffer: `bytes` readable from `address`; `keep` holds the memory."""

    address: int
    bytes: int
    phase: int
    storage: int
    text: str
    keep: object


def _tensor_argument(tensor: torch.Tensor, position: int, device: str) -> _Argument:
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
    return _Argument(
        tensor.data_ptr(), count * size, offset % 64, storage, text, tensor
    )


def _pack(value: Any, cast: str, position: int) -> tuple[bytes, str]:
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


def _value_argument(value: Any, cast: str, position: int) -> _Argument:
    data, text = _pack(value, cast, position)
    if len(data) > MAX_BYTES:
        raise RuntimeError(
            f"argument {position} has {len(data)} bytes; Metal's setBytes takes "
            f"{MAX_BYTES}: pass a tensor"
        )
    memory = ctypes.create_string_buffer(data, len(data))
    address = ctypes.addressof(memory)
    return _Argument(address, len(data), 0, address, text, memory)


def _sizes(value: int | Sequence[int], name: str) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    if not 1 <= len(sizes) <= 3 or any(size < 0 for size in sizes):
        raise RuntimeError(f"{name} is {value!r}; it can be one to three sizes >= 0")
    return sizes


# ---------------------------------------------------------------------------- kernels
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

        Raises:
            EmulationError: the kernel did something that Metal leaves undefined.
        """
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
        total = _sizes(threads, "threads")
        limit = self.max_threads_per_threadgroup
        if group_size is None:
            # As torch has it: whole rows of two- and three-dimensional grids.
            first_size = min(limit, total[0]) if len(total) == 1 else limit
            group = (first_size, *(1 for _ in total[1:]))
        else:
            group = _sizes(group_size, "group_size")
        if len(group) != len(total):
            raise RuntimeError(
                f"group_size {group} and threads {total} must have as many sizes"
            )
        if math.prod(group) > limit:
            raise ValueError(f"Threadgroup size exceeds {limit} limit: {group}")
        if math.prod(total) == 0:
            raise RuntimeError(
                f"{self.name}: threads is {total}: Metal has no empty launch, skip it"
            )
        self._launch(bound, total, group)

    def _argument(
        self, value: Any, position: int, casts: str | Mapping[int, str] | None
    ) -> _Argument:
        if isinstance(value, torch.Tensor):
            return _tensor_argument(value, position, self._device)
        cast = casts if isinstance(casts, str) else (casts or {}).get(position, "")
        return _value_argument(value, cast, position)

    def _launch(
        self, bound: list[_Argument], total: tuple[int, ...], group: tuple[int, ...]
    ) -> None:
        state = _current.get() or Run()
        unit = self._library._unit(self._entry, state.trace)
        kernel = unit.kernels[self.name]
        self._check(bound, kernel.contents)
        regions, buffers = _place(bound)
        request = _Request(kernel=kernel, seed=state.seed)
        request.threads = (*total, *(1,) * (3 - len(total)))
        request.group_size = (*group, *(1,) * (3 - len(group)))
        request.order = ORDERS.index(state.order)
        request.traced, request.partial = state.trace, state.partial_simdgroups
        request.front = state.front
        request.regions, request.buffers = len(regions), len(buffers)
        request.region = (_Region * max(1, len(regions)))(*regions)
        request.buffer = (_Buffer * max(1, len(buffers)))(*buffers)
        traffic = (_Traffic * max(1, len(buffers)))()
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

    def _check(self, bound: list[_Argument], kernel: _Kernel) -> None:
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

    def _fail(self, unit: _Unit, request: _Request) -> None:
        kind = FAILURES[request.failure] or EmulationError
        message = f"{self.name}: {request.message.decode(errors='replace')}"
        if request.program_counter:
            place = compilers.locate(request.program_counter - unit.base, unit.path)
            message += f"; {place}" if place else ""
        raise kind(message)


def _place(bound: list[_Argument]) -> tuple[list[_Region], list[_Buffer]]:
    """Regions of memory, one for all arguments that overlap, and where buffers lie."""
    merged: list[list[_Argument]] = []
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
    regions: list[_Region] = []
    where: dict[int, tuple[int, int]] = {}
    for group in merged:
        begin = group[0].address
        end = max(a.address + a.bytes for a in group)
        for argument in group:
            where[id(argument)] = (len(regions), argument.address - begin)
        regions.append(_Region(begin, end - begin, group[0].phase))
    return regions, [_Buffer(*where[id(a)], a.bytes) for a in bound]


# -------------------------------------------------------------------------- libraries
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
            kernel = ctypes.cast(first, ctypes.POINTER(_Kernel))
            if kernel.contents.name is None:
                break
            self.kernels[kernel.contents.name.decode()] = kernel
            first += ctypes.sizeof(_Kernel)

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
        if len(self._entries) < len(translation.entries):
            names = [entry.name for entry in translation.entries]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise SyntaxError(f"kernels that are defined twice: {', '.join(twice)}")
        self._units: dict[tuple[int, bool], Any] = {}

    def __dir__(self) -> list[str]:
        return list(self._entries)

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._entries:
            raise RuntimeError(f"Failed to create function state object for: {name}")
        return self._kernel(self, self._entries[name])

    def build(self, *, trace: bool = False, workers: int = 2) -> Library:
        """Compile all units now, several at a time."""
        first = list(self._entries.values())[::KERNELS_PER_UNIT]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda entry: self._unit(entry, trace), first))
        return self

    def _unit(self, entry: Entry, traced: bool) -> Any:
        entries = list(self._entries.values())
        number = entries.index(entry) // KERNELS_PER_UNIT
        if (number, traced) not in self._units:
            start = number * KERNELS_PER_UNIT
            chosen = entries[start : start + KERNELS_PER_UNIT]
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
    library = Library(_preprocessed(source, include_dirs, defines, language_version))
    library._compile_first()
    return library


def _preprocessed(
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
