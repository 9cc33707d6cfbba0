"""CUDA's driver, called through ctypes: loads kernels and launches them.

A `Launch` holds everything of a launch that does not change, as the driver reads it; a
call fills in the stream and the addresses. That costs the host little more than the
driver itself. Kernels belong to the primary context of their device, which is torch's.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from .. import KernelError

Size = tuple[int, int, int]

_LIBRARY = "libcuda.so.1"

_SUCCESS = 0
_INVALID_CONTEXT = 201  # this thread has none
_RELAXED = ctypes.c_int(2)  # what a capture otherwise forbids is allowed
_SHARED_BYTES = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_MOST_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PLAIN_SHARED = 48 << 10  # bytes that a block may have without asking

# CUlaunchAttribute: a number, and a union of 64 bytes.
_CLUSTER, _PROGRAMMATIC = 4, 6
_ATTRIBUTE = 72

_P = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_P, ctypes.c_int),
    "cuDeviceGetAttribute": (_P, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_P, ctypes.c_int),
    "cuCtxSetCurrent": (_P,),
    "cuCtxPushCurrent_v2": (_P,),
    "cuCtxPopCurrent_v2": (_P,),
    "cuModuleLoadData": (_P, ctypes.c_char_p),
    "cuModuleGetFunction": (_P, _P, ctypes.c_char_p),
    "cuFuncSetAttribute": (_P, ctypes.c_int, ctypes.c_int),
    "cuFuncLoad": (_P,),
    "cuLaunchKernelEx": (_P, _P, _P, _P),
    "cuThreadExchangeStreamCaptureMode": (_P,),
    "cuGetErrorName": (ctypes.c_int, _P),
    "cuGetErrorString": (ctypes.c_int, _P),
}
_OPTIONAL = ("cuFuncLoad",)  # since CUDA 12.4


class Driver:
    """libcuda's functions. One that fails raises KernelError, but for the launch."""

    cuLaunchKernelEx: Any

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                if name not in _OPTIONAL:
                    raise KernelError(
                        f"the driver has no {name}: it is too old"
                    ) from None
                continue
            function.argtypes, function.restype = arguments, ctypes.c_int
            setattr(self, name, function)
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self, name)(*arguments)
        if code != _SUCCESS:
            raise KernelError(f"{name} fails: {self.describe(code)}")

    def describe(self, code: int) -> str:
        """An error's name and what it means."""
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            getattr(self, name)(code, ctypes.byref(text))
            texts.append((text.value or b"?").decode())
        return f"{texts[0]} ({texts[1]})"


@cache
def driver() -> Driver:
    """Raises KernelError where there is no driver."""
    try:
        return Driver(ctypes.CDLL(_LIBRARY))
    except OSError as error:
        raise KernelError(f"there is no CUDA driver: {error}") from error


@cache
def _context(device: int) -> int:
    """The primary context of a device, numbered as torch does."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    driver().call("cuDeviceGet", ctypes.byref(handle), device)
    driver().call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context.value or 0


def shared_bytes(device: int) -> int:
    """How much shared memory a block on a device may ask for."""
    handle, count = ctypes.c_int(), ctypes.c_int()
    driver().call("cuDeviceGet", ctypes.byref(handle), device)
    driver().call("cuDeviceGetAttribute", ctypes.byref(count), _SHARED_BYTES, handle)
    return count.value


@contextmanager
def _within(device: int) -> Iterator[None]:
    """In a device's context, and free to load even while a stream is captured."""
    own = driver()
    mode = ctypes.c_int(_RELAXED.value)
    own.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        own.call("cuCtxPushCurrent_v2", _context(device))
        try:
            yield
        finally:
            own.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        own.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


# Handles are never given back: launches that hold them may be in graphs.
_lock = threading.Lock()
_modules: dict[tuple[bytes, int], int] = {}
_allowed: dict[int, int] = {}  # shared bytes of functions


def function(image: bytes, entry: str, device: int, shared: int = 0) -> int:
    """A kernel of an image (cubin or PTX) on a device, allowed so many shared bytes.

    Raises KernelError where the driver does not take it.
    """
    own = driver()
    made = ctypes.c_void_p()
    with _lock, _within(device):
        key = (image, device)
        if key not in _modules:
            module = ctypes.c_void_p()
            own.call("cuModuleLoadData", ctypes.byref(module), image)
            _modules[key] = module.value or 0
        own.call(
            "cuModuleGetFunction", ctypes.byref(made), _modules[key], entry.encode()
        )
        handle = made.value or 0
        if shared > _allowed.get(handle, _PLAIN_SHARED):
            own.call("cuFuncSetAttribute", made, _MOST_SHARED_BYTES, shared)
            _allowed[handle] = shared
        if hasattr(own, "cuFuncLoad"):
            own.call("cuFuncLoad", made)  # now, not at the first launch
    return handle


# CUlaunchConfig: sizes of grid and block, shared bytes; then what each call writes.
_CONFIG = struct.Struct("=7I")
_CALLED = 32  # bytes before the stream, the attributes and how many there are
_POINTERS = 56  # bytes before the addresses that kernels are given

# One launch, as the driver reads it: (memory, configuration, parameters, attributes).
_Block = tuple[Any, int, int, int]


class Launch:
    """A kernel with its grid and all arguments but the pointers.

    arguments: those of the kernel in their order; a letter of `struct` and a value
        (``("i", 3)`` an int, ``("q", 3)`` a long long), or None for a pointer, which each
        call gives.
    cluster: blocks that share their memory; (1, 1, 1) for none.
    overlap: the kernel may start before the one before it in the stream has ended
        (programmatic stream serialization).
    """

    __slots__ = (
        "_attributes",
        "_blocks",
        "_count",
        "_device",
        "_function",
        "_made",
        "_pack",
    )

    def __init__(
        self,
        function: int,
        device: int,
        grid: Size,
        block: Size,
        arguments: Sequence[tuple[str, int] | None],
        shared: int = 0,
        cluster: Size = (1, 1, 1),
        overlap: bool = False,
    ) -> None:
        self._function = function
        self._device = device
        self._attributes = []
        if cluster != (1, 1, 1):
            self._attributes.append(struct.pack("=I4x3I52x", _CLUSTER, *cluster))
        if overlap:
            self._attributes.append(struct.pack("=I4xi60x", _PROGRAMMATIC, 1))
        self._count = len(self._attributes)
        pointers = sum(argument is None for argument in arguments)
        self._pack = struct.Struct(f"=QQI4x{pointers}Q").pack_into
        self._made = (_CONFIG.pack(*grid, *block, shared), tuple(arguments))
        self._blocks = [self._block()]

    def _block(self) -> _Block:
        """Memory of a call. Threads that launch at once have one each."""
        config, arguments = self._made
        values = bytearray(sum(argument is None for argument in arguments) * 8)
        places, taken = [], 0
        for argument in arguments:
            if argument is None:
                places.append(taken)
                taken += 8
            else:
                places.append(len(values))
                values += struct.pack(f"={argument[0]}", argument[1]).ljust(8, b"\0")
        attributes = b"".join(self._attributes)
        own = _POINTERS + len(values)
        size = own + len(attributes) + 8 * len(places)
        memory = ctypes.create_string_buffer(size)
        start = ctypes.addressof(memory)
        struct.pack_into(f"={len(config)}s", memory, 0, config)
        struct.pack_into(f"={len(values)}s", memory, _POINTERS, bytes(values))
        struct.pack_into(f"={len(attributes)}s", memory, own, attributes)
        parameters = own + len(attributes)
        addresses = [start + _POINTERS + place for place in places]
        struct.pack_into(f"={len(places)}Q", memory, parameters, *addresses)
        return memory, start, start + parameters, start + own

    def __call__(self, stream: int, *pointers: int) -> None:
        """Launch on a stream of the device, which is the current one."""
        try:
            block = self._blocks.pop()
        except IndexError:
            block = self._block()
        memory, config, parameters, attributes = block
        self._pack(memory, _CALLED, stream, attributes, self._count, *pointers)
        code = _launch(config, self._function, parameters, None)
        if code:
            if code == _INVALID_CONTEXT:  # the first of this thread
                driver().call("cuCtxSetCurrent", _context(self._device))
                code = _launch(config, self._function, parameters, None)
            if code:
                raise RuntimeError(
                    f"a kernel cannot be launched: {driver().describe(code)}"
                )
        self._blocks.append(block)


def _first_launch(*arguments: Any) -> int:
    """Looks the driver's function up, and takes itself out of the way."""
    global _launch
    _launch = driver().cuLaunchKernelEx
    return int(_launch(*arguments))


_launch: Any = _first_launch
