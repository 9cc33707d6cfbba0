"""Each kind of bug is planted in a small kernel and found, and its clean twin passes.

A twin differs from the bug by the one thing that is wrong, `BUG` being defined or not.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import metal_emulator as emulator
import numpy as np
import pytest
import torch

PRELUDE = "#include <metal_stdlib>\nusing namespace metal;\n"


@dataclasses.dataclass(frozen=True)
class Plant:
    """A kernel named `f`, its launch, and how the bug is reported.

    `found_by` are the ways to run it that find the bug: "plain" is the ordinary run,
    "trace" the traced one, "front" the ordinary one with buffers behind a guard page.
    """

    source: str
    arguments: Callable[[], tuple]
    error: type[emulator.EmulationError]
    message: str
    threads: int = 64
    group_size: int = 64
    found_by: tuple[str, ...] = ("plain", "trace")


def floats(*counts: int) -> Callable[[], tuple]:
    return lambda: tuple(torch.zeros(count) for count in counts)


PLANTS = {
    "read past the end": Plant(
        """
kernel void f(device const float* a, device float* out, constant int& n,
              uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = a[i + 1];
#else
  out[i] = int(i) + 1 < n ? a[i + 1] : 0.0f;
#endif
}""",
        lambda: (torch.zeros(64), torch.zeros(64), 64),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds read: buffer 0, byte offset 256 of 256; thread \(63, 0, 0\), "
        r"threadgroup \(0, 0, 0\); program_source:7",
    ),
    "write past the end": Plant(
        """
kernel void f(device const float* a, device float* out, constant int& n,
              uint i [[thread_position_in_grid]]) {
#ifndef BUG
  if (int(i) < n)
#endif
    out[i] = a[0];
}""",
        lambda: (torch.zeros(1), torch.zeros(60), 60),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds write: buffer 1, byte offset 240 of 240; thread \(60, 0, 0\)",
    ),
    "read before the beginning": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = a[int(i) - 2];
#else
  out[i] = a[max(int(i) - 2, 0)];
#endif
}""",
        floats(64, 64),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds read: buffer 0, byte offset -8 of 256; thread \(0, 0, 0\)",
        found_by=("front", "trace"),
    ),
    "write into the bytes that alignment leaves before the guard page": Plant(
        """
kernel void f(device uchar* out, uint i [[thread_position_in_grid]]) {
#ifndef BUG
  if (i < 61)
#endif
    out[i] = 1;
}""",
        lambda: (torch.zeros(61, dtype=torch.uint8),),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds write: buffer 0, byte offset 61 of 61",
    ),
    "read of the bytes that alignment leaves before the guard page": Plant(
        """
kernel void f(device const uchar* a, device uchar* out,
              uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = a[i];
#else
  out[i] = a[min(i, 60u)];
#endif
}""",
        lambda: (torch.zeros(61).byte(), torch.zeros(64).byte()),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds read: buffer 0, byte offset 61 of 61",
        found_by=("trace",),
    ),
    "read of a buffer that is not bound": Plant(
        """
kernel void f(device float* out, device const float* a,
              uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = a[i];
#else
  out[i] = a ? 0.0f : 1.0f;
#endif
}""",
        floats(64),
        emulator.OutOfBoundsError,
        r"f: read of buffer 1, which was not passed",
    ),
    "index that wraps around": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = a[i - 1];
#else
  out[i] = a[max(i, 1u) - 1];
#endif
}""",
        floats(64, 64),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds read: buffer 0, byte offset 17179869180 of 256; thread \(0, 0",
    ),
    "read far beyond the end": Plant(
        """
kernel void f(device const float* a, device float* out, constant int& stride,
              uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = a[i * stride];
#else
  out[i] = a[i];
#endif
}""",
        lambda: (torch.zeros(64), torch.zeros(64), 1 << 24),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds read: buffer 0, byte offset 67108864 of 256; thread \(1, 0, 0\)",
    ),
    "write into the bytes that alignment leaves before a threadgroup variable": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
  threadgroup float shared[33];
  threadgroup float* mine = shared;
#ifdef BUG
  mine[int(i) - 1] = 1.0f;
#else
  mine[i] = 1.0f;
#endif
  out[i] = 0.0f;
}""",
        floats(32),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds write: threadgroup variable 'shared', byte offset -4 of 132",
        threads=32,
        group_size=32,
    ),
    "threadgroup variable's end": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  threadgroup float* mine = shared + i;
#ifdef BUG
  mine[1] = 1.0f;
#else
  mine[0] = 1.0f;
#endif
  out[i] = 0.0f;
}""",
        floats(64),
        emulator.OutOfBoundsError,
        r"f: out-of-bounds write: threadgroup variable 'shared', byte offset 256 of 256; "
        r"thread \(63, 0, 0\)",
    ),
    "array of a thread": Plant(
        """
kernel void f(device float* out, constant int& n, uint i [[thread_position_in_grid]]) {
  float mine[4] = {0.0f, 1.0f, 2.0f, 3.0f};
#ifdef BUG
  out[i] = mine[n];
#else
  out[i] = mine[n - 1];
#endif
}""",
        lambda: (torch.zeros(64), 4),
        emulator.OutOfBoundsError,
        r"f: an array's index is out of bounds.*program_source:7",
    ),
    "missing barrier": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  shared[i] = a[i];
#ifndef BUG
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  out[i] = shared[63 - i];
}""",
        floats(64, 64),
        emulator.RaceError,
        r"race: threadgroup variable 'shared'.*no barrier orders them.*program_source:\d+",
        found_by=("trace",),
    ),
    "missing barrier before the next write": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    shared[i] = a[i] + round;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += shared[63 - i];
#ifndef BUG
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  }
  out[i] = sum;
}""",
        floats(64, 64),
        emulator.RaceError,
        r"race: threadgroup variable 'shared', byte offset \d+: ",
        found_by=("trace",),
    ),
    "write of what another lane still reads": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
  threadgroup float shared[1];
  if (i == 0) shared[0] = a[0];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float sum = shared[0];
#ifndef BUG
  simdgroup_barrier(mem_flags::mem_threadgroup);
#endif
  if (i == 31) shared[0] = sum + 1.0f;
  out[i] = sum;
}""",
        floats(32, 32),
        emulator.RaceError,
        r"race: threadgroup variable 'shared', byte offset 0: writes what thread \d+ of "
        r"the threadgroup read",
        threads=32,
        group_size=32,
        found_by=("trace",),
    ),
    "barrier that orders other memory": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  shared[i] = a[i];
#ifdef BUG
  threadgroup_barrier(mem_flags::mem_device);
#else
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  out[i] = shared[63 - i];
}""",
        floats(64, 64),
        emulator.RaceError,
        r"race: threadgroup variable 'shared'",
        found_by=("trace",),
    ),
    "simdgroup's barrier for a threadgroup's": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  shared[i] = a[i];
#ifdef BUG
  simdgroup_barrier(mem_flags::mem_threadgroup);
#else
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  out[i] = shared[63 - i];
}""",
        floats(64, 64),
        emulator.RaceError,
        r"race: threadgroup variable 'shared'",
        found_by=("trace",),
    ),
    "simdgroup operation for a barrier": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
  threadgroup float shared[32];
  shared[i] = a[i];
#ifdef BUG
  float sum = simd_sum(a[i]);
#else
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0.0f;
#endif
  out[i] = shared[31 - i] + sum;
}""",
        floats(32, 32),
        emulator.RaceError,
        r"race: threadgroup variable 'shared'",
        threads=32,
        group_size=32,
        found_by=("trace",),
    ),
    "race between threadgroups": Plant(
        """
kernel void f(device float* out, device atomic_uint* counter,
              uint i [[thread_position_in_grid]],
              uint group [[threadgroup_position_in_grid]]) {
#ifdef BUG
  out[i % 32] = float(i);
#else
  out[i] = float(i);
#endif
  atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
}""",
        lambda: (torch.full((64,), -1.0), torch.zeros(1, dtype=torch.int32)),
        emulator.RaceError,
        r"race: buffer 0, byte offset 0: writes what thread 0 of another threadgroup wrote",
        group_size=32,
        found_by=("trace",),
    ),
    "atomic and plain access": Plant(
        """
kernel void f(device atomic_uint* counter, device uint* plain,
              uint i [[thread_position_in_grid]]) {
#ifdef BUG
  plain[0] = plain[0] + 1;
#else
  atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
#endif
}""",
        lambda: (torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)),
        emulator.RaceError,
        r"race: buffer 1",
        found_by=("trace",),
    ),
    "different operations of one simdgroup": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
  float x = float(i);
#ifdef BUG
  if (i % 32 < 16)
    x = simd_sum(x);
  else
    x = simd_max(x);
#else
  x = simd_sum(x) + simd_max(x);
#endif
  out[i] = x;
}""",
        floats(64),
        emulator.DivergenceError,
        r"lanes of simdgroup \d wait at different simdgroup operations \(lines 8 and 10\)",
    ),
    "part of a simdgroup": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
  float x = float(i);
#ifdef BUG
  if (i % 32 < 16)
#endif
    x = simd_sum(x);
  threadgroup_barrier(mem_flags::mem_none);
  out[i] = x;
}""",
        floats(64),
        emulator.DivergenceError,
        r"only part of simdgroup \d reached the simdgroup operation in line 9, the other "
        r"lanes wait at the barrier in line 10",
    ),
    "lanes that returned": Plant(
        """
kernel void f(device float* out, constant int& n, uint i [[thread_position_in_grid]]) {
#ifdef BUG
  if (int(i) >= n) return;
#endif
  float sum = simd_sum(1.0f);
  if (int(i) < n) out[i] = sum;
}""",
        lambda: (torch.zeros(40), 40),
        emulator.DivergenceError,
        r"only part of simdgroup 1 reached .* line 8, the other lanes have returned",
    ),
    "turns of a loop": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
  float sum = 0.0f;
  for (int k = 0; k < 4; ++k) {
#ifdef BUG
    if ((i + k) % 2 == 0) continue;
#endif
    sum += simd_sum(1.0f + k);
  }
  out[i] = sum;
}""",
        floats(32),
        emulator.DivergenceError,
        r"simdgroup operation in line 10 in different turns of a loop, or in different",
        threads=32,
        group_size=32,
    ),
    "branches that call the same function": Plant(
        """
float total(float x) { return simd_sum(x); }
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
  float sum;
#ifdef BUG
  if (i < 16) sum = total(1.0f); else sum = total(2.0f);
#else
  sum = total(i < 16 ? 1.0f : 2.0f);
#endif
  out[i] = sum;
}""",
        floats(32),
        emulator.DivergenceError,
        r"simdgroup operation in line 4 in different turns of a loop, or in different",
        threads=32,
        group_size=32,
    ),
    "branches that reach the same barrier": Plant(
        """
void meet() { threadgroup_barrier(mem_flags::mem_threadgroup); }
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
#ifdef BUG
  if (i < 32)
    meet();
  else
#endif
    meet();
  out[i] = 1.0f;
}""",
        floats(64),
        emulator.DivergenceError,
        r"wait at the barrier in line 4 in different turns of a loop, or in different",
    ),
    "matrix loaded by half a simdgroup": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
  simdgroup_float8x8 m;
#ifdef BUG
  if (i < 16)
#endif
    simdgroup_load(m, a);
  out[i] = i < 16 ? m.thread_elements()[0] : 0.0f;
}""",
        floats(64, 32),
        emulator.DivergenceError,
        r"only part of simdgroup 0 reached the simdgroup operation in line 10",
        threads=32,
        group_size=32,
    ),
    "shuffle from a lane that is not there": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = simd_shuffle_xor(float(i), 16);
#else
  out[i] = simd_shuffle_xor(float(i), 1);
#endif
}""",
        floats(16),
        emulator.DivergenceError,
        r"a shuffle reads from a lane that does not take part",
        threads=16,
        group_size=16,
    ),
    "matrix without all lanes": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
  simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_float8x8 c;
#ifdef BUG
  if (i < 16)
#endif
    simdgroup_multiply(c, a, a);
  out[i] = i < 16 ? c.thread_elements()[0] : 0.0f;
}""",
        floats(32),
        emulator.DivergenceError,
        r"simdgroup",
        threads=32,
        group_size=32,
    ),
    "barrier in a branch": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
#ifdef BUG
  if (i < 32)
    threadgroup_barrier(mem_flags::mem_threadgroup);
  else
    threadgroup_barrier(mem_flags::mem_threadgroup);
#else
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  out[i] = 1.0f;
}""",
        floats(64),
        emulator.DivergenceError,
        r"threads of a threadgroup wait at different barriers \(lines 7 and 9\)",
    ),
    "barrier after some returned": Plant(
        """
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
#ifdef BUG
  if (i >= 40) return;
#endif
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i < 40) out[i] = 1.0f;
}""",
        floats(40),
        emulator.DivergenceError,
        r"40 of 64 threads wait at the barrier in line 8, the others have returned",
    ),
    "too much threadgroup memory": Plant(
        """
#ifdef BUG
constant constexpr int SIZE = 2049;
#else
constant constexpr int SIZE = 2048;
#endif
kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
  threadgroup float4 a[1024];
  threadgroup float b[SIZE * 2];
  a[i] = float4(0.0f);
  b[i] = 0.0f;
  out[i] = a[i].x + b[i];
}""",
        floats(64),
        emulator.ThreadgroupMemoryError,
        r"threadgroup memory: 'b' \(line 11\) brings it to 32776 bytes, Metal allows 32768",
    ),
    "misaligned vector load": Plant(
        """
kernel void f(device const float* a, device float* out,
              uint i [[thread_position_in_grid]]) {
#ifdef BUG
  float4 v = *(device const float4*)(a + i);
#else
  float4 v = float4(a[i], a[i + 1], a[i + 2], a[i + 3]);
#endif
  out[i] = v.x + v.w;
}""",
        floats(67, 64),
        emulator.AlignmentError,
        r"misaligned access: the type asks for 16 bytes, the address is 4 past such a place"
        r".*program_source:7",
    ),
    "misaligned buffer": Plant(
        """
#ifdef BUG
kernel void f(device const float4* a, device float* out,
#else
kernel void f(device const packed_float4* a, device float* out,
#endif
              uint i [[thread_position_in_grid]]) {
  out[i] = a[0][0];
}""",
        lambda: (torch.zeros(66)[2:], torch.zeros(64)),
        emulator.AlignmentError,
        r"f: buffer 0 \(float32\[64\]\+8\) starts 8 bytes past a multiple of 16",
    ),
    "value smaller than its type": Plant(
        """
#ifdef BUG
kernel void f(device int* out, constant uint3& n, uint i [[thread_position_in_grid]]) {
#else
kernel void f(device int* out, constant packed_uint3& n,
              uint i [[thread_position_in_grid]]) {
#endif
  out[i] = int(n[2]);
}""",
        lambda: (
            torch.zeros(64, dtype=torch.int32),
            torch.arange(3, dtype=torch.int32),
        ),
        emulator.OutOfBoundsError,
        r"f: buffer 1 \(int32\[3\]\) has 12 bytes, the kernel's type has 16",
    ),
    "signed overflow": Plant(
        """
kernel void f(device int* out, constant int& rows, uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = rows * 65536;
#else
  out[i] = int(long(rows) * 65536 >> 16);
#endif
}""",
        lambda: (torch.zeros(64, dtype=torch.int32), 65536),
        emulator.UndefinedArithmeticError,
        r"f: a product overflows its signed type.*program_source:6",
    ),
    "shift by the width": Plant(
        """
kernel void f(device uint* out, constant int& by, uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = 1u << by;
#else
  out[i] = uint(ulong(1) << by);
#endif
}""",
        lambda: (torch.zeros(64, dtype=torch.int32), 32),
        emulator.UndefinedArithmeticError,
        r"f: a shift by its type's width or more.*program_source:6",
    ),
    "float out of an integer's range": Plant(
        """
kernel void f(device uchar* out, constant float& x, uint i [[thread_position_in_grid]]) {
#ifdef BUG
  out[i] = uchar(x);
#else
  out[i] = uchar(clamp(x, 0.0f, 255.0f));
#endif
}""",
        lambda: (torch.zeros(64, dtype=torch.uint8), 300.0),
        emulator.UndefinedArithmeticError,
        r"f: a float is out of range of its integer type.*program_source:6",
    ),
    "function that ends without a result": Plant(
        """
int pick(int x) {
#ifdef BUG
  if (x > 5) return 1;
#else
  return x > 5;
#endif
}
kernel void f(device int* out, uint i [[thread_position_in_grid]]) { out[i] = pick(i); }
""",
        lambda: (torch.zeros(64, dtype=torch.int32),),
        emulator.EmulationError,
        r"f: a function that has a result ends without `return`",
    ),
    "recursion without end": Plant(
        """
#ifdef BUG
float deep(float x) { return x < 0.0f ? x : sqrt(deep(x + 1.0f)) + x; }
#else
float deep(float x) { return x; }
#endif
kernel void f(device float* out, uint i [[thread_position_in_grid]]) { out[i] = deep(i); }
""",
        floats(1),
        emulator.EmulationError,
        r"f: a thread's stack of \d+ bytes overflowed",
        threads=1,
        group_size=1,
    ),
}
WAYS = {
    "plain": {"order": "forward"},
    "front": {"order": "forward", "front": True},
    "trace": {"order": "forward", "trace": True},
}


def library(plant: Plant, bug: bool) -> emulator.Library:
    return emulator.compile_shader(
        PRELUDE + plant.source, defines=["BUG"] if bug else []
    )


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_found_and_its_clean_twin_passes(name: str) -> None:
    plant = PLANTS[name]
    launch = {"threads": plant.threads, "group_size": plant.group_size}
    buggy, clean = library(plant, bug=True), library(plant, bug=False)
    for way in plant.found_by:
        with emulator.run(**WAYS[way]), pytest.raises(plant.error, match=plant.message):
            buggy.f(*plant.arguments(), **launch)
    for order in ("forward", "backward", "random"):
        for trace in (False, True):
            with emulator.run(order=order, seed=1, trace=trace):
                clean.f(*plant.arguments(), **launch)


def missing_barrier(bug: bool) -> list[torch.Tensor]:
    """Reversed input through threadgroup memory, in the three orders of lanes."""
    lib = library(PLANTS["missing barrier"], bug)
    results = []
    for order in ("forward", "backward", "random"):
        out = torch.zeros(64)
        with emulator.run(order=order, seed=3):
            lib.f(torch.arange(64.0), out, threads=64, group_size=64)
        results.append(out)
    return results


def test_missing_barrier_shows_without_tracing_too() -> None:
    """Threadgroup memory starts as NaN, and the order of lanes decides what is there."""
    right = torch.arange(64.0).flip(0)
    for result in missing_barrier(bug=False):
        assert torch.equal(result, right)
    forward, backward, random = missing_barrier(bug=True)
    for result in (forward, backward, random):
        assert result.isnan().any()
    assert not torch.equal(forward.isnan(), backward.isnan())
    assert not torch.equal(forward.isnan(), random.isnan())


def test_threadgroup_memory_is_undefined_again_in_each_threadgroup() -> None:
    lib = emulator.compile_shader(
        PRELUDE
        + """
kernel void f(device float* out, uint i [[thread_position_in_grid]],
              uint lane [[thread_index_in_threadgroup]]) {
  threadgroup float kept[32];
  out[i] = kept[lane];
  kept[lane] = 1.0f;
}"""
    )
    out = torch.zeros(96)
    lib.f(out, threads=96, group_size=32)
    assert out.isnan().all()


def test_a_variable_that_was_never_set_is_not_a_plausible_number() -> None:
    lib = emulator.compile_shader(
        PRELUDE
        + """
kernel void f(device float* out, constant int& n, uint i [[thread_position_in_grid]]) {
  float values[8];
  for (int k = 0; k < n; ++k) values[k] = 1.0f;
  float sum = 0.0f;
  for (int k = 0; k < 8; ++k) sum += values[k];
  out[i] = sum;
}"""
    )
    out = torch.zeros(32)
    lib.f(out, 8)
    assert torch.equal(out, torch.full((32,), 8.0))
    lib.f(out, 7)
    assert ((out - 8).abs() > 1e6).all() or out.isnan().all()


def test_a_write_that_changes_nothing_is_no_race() -> None:
    """Tiles that overlap at a ragged edge store the same values twice."""
    lib = emulator.compile_shader(
        PRELUDE
        + """
kernel void f(device float* out, constant float& value,
              uint i [[thread_position_in_grid]]) {
  out[i % 32] = value < 0.0f ? float(i) : value;
}"""
    )
    with emulator.run(trace=True):
        lib.f(torch.full((32,), 7.0), 7.0, threads=96, group_size=32)
        with pytest.raises(emulator.RaceError, match="buffer 0"):
            lib.f(torch.full((32,), 7.0), -1.0, threads=96, group_size=32)


def test_tensors_come_back_after_an_error_and_the_next_launch_is_clean() -> None:
    lib = library(PLANTS["write past the end"], bug=True)
    out = torch.zeros(60)
    with pytest.raises(emulator.OutOfBoundsError):
        lib.f(torch.ones(1), out, 60, threads=64, group_size=64)
    assert torch.equal(out, torch.ones(60))
    out = torch.zeros(64)
    lib.f(torch.ones(1), out, 64, threads=64, group_size=64)
    assert torch.equal(out, torch.ones(64))


def test_an_endless_launch_is_ended() -> None:
    lib = emulator.compile_shader(
        PRELUDE
        + """
kernel void f(device int* out, constant int& step, uint i [[thread_position_in_grid]]) {
  int k = 1;
  while (k != 0) k = (k + step) | 1;
  out[i] = k;
}"""
    )
    with (
        emulator.run(seconds=0.3),
        pytest.raises(emulator.EmulationError, match=r"took more than 0.3 seconds.*:6"),
    ):
        lib.f(torch.zeros(1, dtype=torch.int32), 0)
    clean = library(PLANTS["missing barrier"], bug=False)
    clean.f(torch.zeros(64), torch.zeros(64), threads=64, group_size=64)


def test_memory_that_cannot_be_written_may_be_read(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(np.arange(64, dtype=np.float32).tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is meant here
        mapped = torch.from_numpy(np.memmap(file, np.float32, mode="r"))
    out = torch.zeros(64)
    clean = library(PLANTS["missing barrier"], bug=False)
    clean.f(mapped, out, threads=64, group_size=64)
    assert torch.equal(out, torch.arange(64.0).flip(0))


def test_launches_of_other_threads_are_seen() -> None:
    buggy = library(PLANTS["missing barrier"], bug=True)
    arguments = (torch.zeros(64), torch.zeros(64))
    with emulator.run(trace=True), ThreadPoolExecutor(1) as pool:
        launch = pool.submit(buggy.f, *arguments, threads=64, group_size=64)
        with pytest.raises(emulator.RaceError):
            launch.result()


def test_partial_simdgroups_may_be_allowed() -> None:
    lib = library(PLANTS["part of a simdgroup"], bug=True)
    out = torch.zeros(64)
    with emulator.run(partial_simdgroups=True):
        lib.f(out, threads=64, group_size=64)
    half = torch.arange(64.0).reshape(2, 2, 16)
    half[:, 0] = half[:, 0].sum(-1, keepdim=True)
    assert torch.equal(out, half.reshape(64))
