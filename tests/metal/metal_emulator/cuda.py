"""The same kernels on an NVIDIA GPU: a second executor, with real concurrency.

The translation is compiled by NVRTC and launched through the CUDA driver, both called by
NVIDIA's `cuda-bindings`. A threadgroup is a block, a simdgroup a warp. What Metal leaves
undefined is not looked for here: that is the work of the CPU emulator, and of
compute-sanitizer (see `guard`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import itertools
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import arguments, compilers, launches, shader
from .entries import Entry, cuda_symbol, entry_points

DEFAULT_ARCHITECTURE = "sm_90"  # to compile for where there is no GPU
HEADERS = shader.HEADERS + '#include "barriers_cuda.hpp"\n'
OPTIONS = (
    "-default-device",
    # Every operation rounds, as on the CPU.
    "--fmad=false",
    "-std=c++17",
    # Line numbers, for compute-sanitizer.
    "-lineinfo",
    "--disable-warnings",
)


def _bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise RuntimeError(
            f"cuda.bindings.{name} cannot be imported ({error}): pip install "
            "cuda-bindings nvidia-cuda-nvrtc, in versions that the driver supports"
        ) from error


def _driver(name: str, *arguments: Any) -> Any:
    """Call the CUDA driver; raises RuntimeError with its message."""
    driver = _bindings("driver")
    status, *results = getattr(driver, name)(*arguments)
    if int(status):
        _, text = driver.cuGetErrorString(status)
        said = text.decode() if isinstance(text, bytes) else str(status)
        raise RuntimeError(f"{name}: {said}")
    return results[0] if results else None


# ------------------------------------------------------------------------ compilation
@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version; raises RuntimeError where there is none."""
    status, major, minor = _bindings("nvrtc").nvrtcVersion()
    if int(status):
        raise RuntimeError(f"nvrtcVersion: {status}")
    return major, minor


@functools.cache
def architecture() -> str:
    """The present GPU's, or sm_90 where there is none."""
    if not torch.cuda.is_available():
        return DEFAULT_ARCHITECTURE
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def compile_cubin(text: str, flags: Sequence[str] = ()) -> bytes:
    """Machine code for a translation with entry points, cached by content.

    Raises:
        SyntaxError: it does not compile; the text is NVRTC's.
    """
    options = [f"--gpu-architecture={architecture()}", *OPTIONS, *flags]
    version = ".".join(map(str, nvrtc_version()))
    parts = [version, *options, compilers._own_sources(), text]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = compilers.cache() / f"{key}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin = _compile(text, [*options, f"--include-path={compilers.INCLUDE}"])
    with tempfile.TemporaryDirectory(dir=compilers.cache()) as scratch:
        middle = Path(scratch, "cubin")
        middle.write_bytes(cubin)
        os.replace(middle, path)
    return cubin


def _compile(text: str, options: Sequence[str]) -> bytes:
    nvrtc = _bindings("nvrtc")

    def call(name: str, *arguments: Any) -> Any:
        status, *results = getattr(nvrtc, name)(*arguments)
        if int(status):
            raise RuntimeError(f"{name}: {status}")
        return results[0] if results else None

    program = call("nvrtcCreateProgram", text.encode(), b"kernels.cu", 0, [], [])
    try:
        words = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
        if int(status):
            log = b" " * call("nvrtcGetProgramLogSize", program)
            call("nvrtcGetProgramLog", program, log)
            said = log.decode(errors="replace").rstrip("\0 \n")
            raise SyntaxError(compilers._brief(f"{status.name}\n{said}"))
        cubin = b" " * call("nvrtcGetCUBINSize", program)
        call("nvrtcGetCUBIN", program, cubin)
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


# --------------------------------------------------------------------------- launches
class _Launch(ctypes.Structure):
    """`Launch` in include/lanes_cuda.hpp."""

    _fields_ = (
        ("threads", ctypes.c_uint32 * 3),
        ("group_size", ctypes.c_uint32 * 3),
        ("first", ctypes.c_uint32 * 3),
        ("count", ctypes.c_uint32 * 3),
        ("buffers", ctypes.c_uint64 * shader.MAX_BUFFERS),
    )


class _Unit:
    """One cubin; it is loaded on a device when that first runs one of its kernels."""

    def __init__(self, cubin: bytes, symbols: dict[str, str]) -> None:
        self.cubin, self.symbols = cubin, symbols
        self._modules: dict[int, Any] = {}

    def function(self, name: str, device: int) -> Any:
        if device not in self._modules:
            self._modules[device] = _driver("cuModuleLoadData", self.cubin)
        symbol = self.symbols[name].encode()
        return _driver("cuModuleGetFunction", self._modules[device], symbol)


def _parts(total: int, group: int) -> list[tuple[int, int, int]]:
    """(first, count, size) of a dimension's whole threadgroups and of its last one."""
    whole, rest = divmod(total, group)
    parts = [(0, whole, group)] if whole else []
    return [*parts, (whole, 1, rest)] if rest else parts


class _Guarded:
    """Copies of the arguments in allocations of just their bytes.

    Of these compute-sanitizer knows the ends, while torch's allocator hands out parts of
    large blocks. Arguments that overlap share a copy, as they share memory.
    """

    def __init__(self, bound: list[arguments.Argument], stream: Any) -> None:
        self.stream = stream
        self.regions, self.buffers = arguments.place(bound)
        self.copies: list[int] = []

    def __enter__(self) -> list[int]:
        for region in self.regions:
            # An alignment that the tensor lacks is kept away from its copy too.
            size = region.phase + region.bytes
            copy = int(_driver("cuMemAlloc", size)) if region.bytes else 0
            self.copies.append(copy and copy + region.phase)
            if copy:
                self._move(self.copies[-1], region.data, region.bytes)
        return [self.copies[b.region] + b.offset for b in self.buffers]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for region, copy in zip(self.regions, self.copies, strict=True):
            if copy and error is None:
                self._move(region.data, copy, region.bytes)
        if error is None:
            _driver("cuStreamSynchronize", self.stream)
        for region, copy in zip(self.regions, self.copies, strict=True):
            if copy and error is None:
                _driver("cuMemFree", copy - region.phase)

    def _move(self, to: int, source: int, size: int) -> None:
        _driver("cuMemcpyDtoDAsync", to, source, size, self.stream)
        _driver("cuStreamSynchronize", self.stream)


class Kernel(shader.Kernel):
    """One kernel of a library, called as torch's is, with tensors on a CUDA device."""

    _device = "cuda"

    def _launch(
        self,
        bound: list[arguments.Argument],
        total: tuple[int, ...],
        group: tuple[int, ...],
    ) -> None:
        devices = {a.keep.device for a in bound if isinstance(a.keep, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{self.name}: tensors on several devices: {devices}")
        device = devices.pop() if devices else torch.device("cuda", 0)
        with torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            # Any call makes torch's context this thread's; this one may be captured.
            torch.cuda.is_current_stream_capturing()
            bound = [_on_device(argument, device) for argument in bound]
            stream = _bindings("driver").CUstream(current.cuda_stream)
            if self._guard:
                with _Guarded(bound, stream) as addresses:
                    self._run(addresses, total, group, device, stream)
                    _driver("cuStreamSynchronize", stream)
            else:
                addresses = [argument.address for argument in bound]
                self._run(addresses, total, group, device, stream)
        texts = tuple(argument.text for argument in bound)
        if state := launches.present_run():
            state.launches.append(launches.Launch(self.name, total, group, texts))

    @property
    def _guard(self) -> bool:
        return isinstance(self._library, Library) and self._library._guard

    def _run(
        self,
        addresses: list[int],
        total: tuple[int, ...],
        group: tuple[int, ...],
        device: torch.device,
        stream: Any,
    ) -> None:
        unit = self._library._unit(self._entry, False)
        function = unit.function(self.name, device.index or 0)
        launch = _Launch()
        launch.buffers[: len(addresses)] = addresses
        launch.threads = (*total, *(1,) * (3 - len(total)))
        launch.group_size = (*group, *(1,) * (3 - len(group)))
        sides = [*map(_parts, launch.threads, launch.group_size)]
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(launch))
        for parts in itertools.product(*sides):
            firsts, counts, sizes = zip(*parts, strict=True)
            launch.first, launch.count = firsts, counts
            blocks, threads = math.prod(counts), math.prod(sizes)
            shape = (blocks, 1, 1, threads, 1, 1, 0, stream)
            where = ctypes.addressof(parameters)
            _driver("cuLaunchKernel", function, *shape, where, 0)


def _on_device(
    argument: arguments.Argument, device: torch.device
) -> arguments.Argument:
    """The same argument, a value moved to the device."""
    if isinstance(argument.keep, torch.Tensor):
        return argument
    data = bytearray(ctypes.string_at(argument.address, argument.bytes))
    memory = torch.frombuffer(data, dtype=torch.uint8).to(device)
    address = memory.data_ptr()
    return arguments.Argument(
        address, argument.bytes, 0, address, argument.text, memory
    )


# -------------------------------------------------------------------------- libraries
class Library(shader.Library):
    """The kernels of one source, compiled as those for a CPU are: as they are used."""

    _cuda = True
    _headers = HEADERS
    _kernel = Kernel

    def __init__(self, preprocessed: str, flags: Sequence[str], guard: bool) -> None:
        super().__init__(preprocessed)
        self._flags, self._guard = tuple(flags), guard

    def _compile(self, entries: Sequence[Entry], traced: bool) -> Any:
        text = self._text + entry_points(entries, cuda=True)
        symbols = {e.name: cuda_symbol(number, e) for number, e in enumerate(entries)}
        return _Unit(compile_cubin(text, self._flags), symbols)


def compile_shader(
    source: str,
    *,
    include_dirs: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
    language_version: int = 310,
    flags: Sequence[str] = (),
    guard: bool = False,
) -> Library:
    """Compile Metal source for CUDA tensors; see `metal_emulator.compile_shader`.

    Launches are put on torch's current stream and not waited for. No GPU is needed to
    compile, and a C++ compiler only for its preprocessor.

    Args:
        source: ASCII text.
        include_dirs: searched for headers that are not Apple's or torch's.
        defines: macros, such as "NAME=1".
        language_version: Metal's, as in `__METAL_VERSION__`.
        flags: further options of NVRTC.
        guard: run every launch on copies of its arguments in allocations of their own,
            so that compute-sanitizer's memcheck finds any access past an end.

    Raises:
        SyntaxError: the source does not compile; the text is the compiler's.
        RuntimeError: `cuda-bindings` or NVRTC is missing.
    """
    nvrtc_version()
    preprocessed = shader.preprocessed_source(
        source, include_dirs, defines, language_version
    )
    library = Library(preprocessed, flags, guard)
    library._compile_first()
    return library
