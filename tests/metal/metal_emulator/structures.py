"""The structures of `include/runtime.hpp` and `runtime/runtime.hpp`, for ctypes."""

from __future__ import annotations

import ctypes
import dataclasses

from .launches import Traffic


class Region(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("phase", ctypes.c_uint64),
    )


class Buffer(ctypes.Structure):
    _fields_ = (
        ("region", ctypes.c_int64),
        ("offset", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    )


class TrafficCount(ctypes.Structure):
    _fields_ = tuple((f.name, ctypes.c_uint64) for f in dataclasses.fields(Traffic))


class Binding(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint32), ("alignment", ctypes.c_uint32))


class KernelRow(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("entry", ctypes.c_void_p),
        ("bindings", ctypes.POINTER(Binding)),
        ("buffers", ctypes.c_uint32),
    )


class Request(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.POINTER(KernelRow)),
        ("threads", ctypes.c_uint32 * 3),
        ("group_size", ctypes.c_uint32 * 3),
        ("order", ctypes.c_int32),
        ("traced", ctypes.c_int32),
        ("partial", ctypes.c_int32),
        ("front", ctypes.c_int32),
        ("seconds", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.c_uint64),
        ("buffers", ctypes.c_uint64),
        ("region", ctypes.POINTER(Region)),
        ("buffer", ctypes.POINTER(Buffer)),
        ("traffic", ctypes.POINTER(TrafficCount)),
        ("failure", ctypes.c_int32),
        ("threadgroup_bytes", ctypes.c_uint32),
        ("program_counter", ctypes.c_uint64),
        ("message", ctypes.c_char * 1024),
    )
