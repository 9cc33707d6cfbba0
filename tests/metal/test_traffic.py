"""Bytes and sectors of traced launches, against counts made by hand."""

from __future__ import annotations

import metal_emulator as emulator
import pytest
import torch

SOURCE = """
#include <metal_stdlib>
using namespace metal;

// Each lane its own float: 32 lanes, 128 bytes, 4 sectors a step.
kernel void contiguous(device const float* a, device float* out,
                       uint i [[thread_position_in_grid]]) {
  out[i] = a[i] + 1.0f;
}
// A stride of 32 bytes: a sector for each lane.
kernel void strided(device const float* a, device float* out,
                    uint i [[thread_position_in_grid]]) {
  out[i] = a[8 * i];
}
// All lanes the same element: one sector a step, 4 bytes for each lane.
kernel void same(device const float* a, device float* out, constant int& n,
                 uint i [[thread_position_in_grid]]) {
  float sum = 0.0f;
  for (int k = 0; k < n; ++k) sum += a[k];
  out[i] = sum;
}
// 16 bytes a lane in one access, whatever is done with the parts.
kernel void wide(device const uint4* a, device uint* out,
                 uint i [[thread_position_in_grid]]) {
  uint4 v = a[i];
  out[i] = v.x + v.y * 3 + v.z * 5 + v.w * 7;
}
// Four accesses of 4 bytes to the same place: four steps.
kernel void narrow(device const uint* a, device uint* out,
                   uint i [[thread_position_in_grid]]) {
  out[i] = a[4 * i] + a[4 * i + 1] * 3 + a[4 * i + 2] * 5 + a[4 * i + 3] * 7;
}
kernel void through_half4(device const half* a, device half* out,
                          uint i [[thread_position_in_grid]]) {
  half4 v = *(device const half4*)(a + 4 * i);
  *(device half4*)(out + 4 * i) = v * 2.0h;
}
kernel void reads_what_it_writes(device float* a, uint i [[thread_position_in_grid]]) {
  a[i] *= 2.0f;
}
kernel void ragged(device const uchar* a, device uchar* out, constant int& n,
                   uint i [[thread_position_in_grid]]) {
  if (int(i) < n) out[i] = a[i];
}
kernel void counts(device atomic_uint* counter, uint i [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(counter + i % 2, 1u, memory_order_relaxed);
}
// The rows of a 4-bit matrix, as a product with a vector reads them.
kernel void gemv(device const uint* packed, device const half* scales,
                 device const float* x, device float* y, constant int& words,
                 uint lane [[thread_index_in_simdgroup]],
                 uint row [[threadgroup_position_in_grid]]) {
  float sum = 0.0f;
  for (int k = lane; k < words; k += 32) {
    uint word = packed[row * words + k];
    float part = 0.0f;
    for (int j = 0; j < 8; ++j) part += float(word >> (4 * j) & 15u) * x[8 * k + j];
    sum += part * float(scales[row * (words / 8) + k / 8]);
  }
  sum = simd_sum(sum);
  if (lane == 0) y[row] = sum;
}
"""


@pytest.fixture(scope="module")
def lib() -> emulator.Library:
    return emulator.compile_shader(SOURCE)


def counted(
    kernel: emulator.Kernel, *args: object, **kwargs: object
) -> list[tuple[int, ...]]:
    """(load bytes, load sectors, store bytes, store sectors) of each buffer."""
    with emulator.run(order="random", seed=2, trace=True) as run:
        kernel(*args, **kwargs)
    return [
        (t.load_bytes, t.load_sectors, t.store_bytes, t.store_sectors)
        for t in run.launches[0].traffic
    ]


def words(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


def test_contiguous_and_strided(lib: emulator.Library) -> None:
    loads, stores = counted(lib.contiguous, torch.zeros(128), torch.zeros(128))
    assert loads == (512, 16, 0, 0)
    assert stores == (0, 0, 512, 16)
    loads, stores = counted(
        lib.strided, torch.zeros(1024), torch.zeros(128), threads=128
    )
    assert loads == (512, 128, 0, 0)
    assert stores == (0, 0, 512, 16)


def test_an_offset_costs_a_sector(lib: emulator.Library) -> None:
    base = torch.zeros(33)
    loads, _ = counted(lib.contiguous, base[1:], torch.zeros(32), threads=32)
    assert loads == (128, 5, 0, 0)


def test_broadcast(lib: emulator.Library) -> None:
    loads, _, _ = counted(lib.same, torch.zeros(10), torch.zeros(64), 10, threads=64)
    assert loads == (64 * 40, 2 * 10, 0, 0)


def test_a_vector_load_is_one_access(lib: emulator.Library) -> None:
    out = words(64)
    loads, _ = counted(lib.wide, words(256), out, threads=64)
    assert loads == (1024, 32, 0, 0)
    expected = words(256).reshape(64, 4) * torch.tensor([1, 3, 5, 7])
    assert torch.equal(out, expected.sum(1, dtype=torch.int32))
    loads, _ = counted(lib.narrow, words(256), words(64), threads=64)
    assert loads == (1024, 4 * 32, 0, 0)


def test_vectors_of_half(lib: emulator.Library) -> None:
    a, out = torch.arange(128).half(), torch.zeros(128).half()
    loads, stores = counted(lib.through_half4, a, out, threads=32)
    assert loads == (256, 8, 0, 0)
    assert stores == (0, 0, 256, 8)
    assert torch.equal(out, a * 2)


def test_update_in_place(lib: emulator.Library) -> None:
    (both,) = counted(lib.reads_what_it_writes, torch.zeros(64))
    assert both == (256, 8, 256, 8)


def test_ragged_end(lib: emulator.Library) -> None:
    loads, stores, _ = counted(
        lib.ragged, torch.zeros(70).byte(), torch.zeros(70).byte(), 70, threads=96
    )
    assert loads == (70, 3, 0, 0)
    assert stores == (0, 0, 70, 3)


def test_atomics(lib: emulator.Library) -> None:
    counter = torch.zeros(2, dtype=torch.int32)
    (both,) = counted(lib.counts, counter, threads=64)
    assert both == (256, 2, 256, 2)
    assert counter.tolist() == [32, 32]


def test_rows_of_packed_weights_are_read_once(lib: emulator.Library) -> None:
    rows, columns = 6, 1024
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns))
    packed = (codes.reshape(rows, -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed > 2**31 - 1, packed - 2**32, packed).int()
    scales = torch.rand(rows, columns // 64).half()
    x, y = torch.randn(columns), torch.full((rows,), float("nan"))
    launch = {"threads": 32 * rows, "group_size": 32}
    counts = counted(lib.gemv, packed, scales, x, y, columns // 8, **launch)
    assert counts[0] == (rows * columns // 2, rows * columns // 2 // 32, 0, 0)
    # Each of the 4 steps of a row reads 32 scales of 4 groups.
    assert counts[1] == (rows * 128 * 2, rows * 4, 0, 0)
    # x is read for every row, 4 bytes for each product, 8 steps of a stride of 32 bytes.
    assert counts[2] == (rows * columns * 4, rows * columns, 0, 0)
    assert counts[3] == (0, 0, rows * 4, rows)
    weight = codes.double() * scales.double().repeat_interleave(64, dim=1)
    error = (y.double() - weight @ x.double()).abs().max()
    bound = 2**-24 * 64 * (weight.abs() @ x.double().abs()).max()
    assert error <= bound


def test_untraced_launches_count_nothing(lib: emulator.Library) -> None:
    with emulator.run() as run:
        lib.contiguous(torch.zeros(8), torch.zeros(8))
    assert run.launches[0].traffic == ()
