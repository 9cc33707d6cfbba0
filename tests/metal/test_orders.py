"""Lanes and threadgroups take turns in the order asked for, and meet where they must."""

from __future__ import annotations

import metal_emulator as emulator
import pytest
import torch

SOURCE = """
#include <metal_stdlib>
using namespace metal;

// When each thread came by, as a shared counter tells it.
kernel void arrivals(device atomic_uint* counter, device uint* when,
                     uint i [[thread_position_in_grid]]) {
  when[i] = atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
}
// The same before and after a barrier, in one threadgroup.
kernel void rounds(device atomic_uint* counter, device uint* when,
                   uint i [[thread_position_in_grid]],
                   uint n [[threads_per_grid]]) {
  for (uint round = 0; round < 3; ++round) {
    when[round * n + i] = atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_none);
  }
}
// Meetings of one simdgroup do not make another wait.
kernel void alone(device atomic_uint* counter, device uint* when,
                  uint i [[thread_position_in_grid]]) {
  uint first = atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
  when[i] = simd_max(first);
}
// A tree of sums through threadgroup memory.
kernel void tree(device const float* x, device float* out,
                 uint i [[thread_position_in_threadgroup]],
                 uint group [[threadgroup_position_in_grid]],
                 uint n [[threads_per_threadgroup]]) {
  threadgroup float sums[256];
  sums[i] = x[group * n + i];
  for (uint half_way = n / 2; half_way > 0; half_way /= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i < half_way) sums[i] += sums[i + half_way];
  }
  if (i == 0) out[group] = sums[0];
}
"""


@pytest.fixture(scope="module")
def lib() -> emulator.Library:
    return emulator.compile_shader(SOURCE)


def arrivals(lib: emulator.Library, name: str, order: str, seed: int = 0) -> list[int]:
    counter = torch.zeros(1, dtype=torch.int32)
    when = torch.full((96,), -1, dtype=torch.int32)
    with emulator.run(order=order, seed=seed):
        getattr(lib, name)(
            counter, when, threads=96, group_size=96 if name == "alone" else 32
        )
    return when.tolist()


def test_forward_and_backward(lib: emulator.Library) -> None:
    assert arrivals(lib, "arrivals", "forward") == list(range(96))
    assert arrivals(lib, "arrivals", "backward") == list(range(95, -1, -1))


def test_random_is_seeded_and_mixes_lanes_and_groups(lib: emulator.Library) -> None:
    orders = [arrivals(lib, "arrivals", "random", seed) for seed in range(4)]
    again = [arrivals(lib, "arrivals", "random", seed) for seed in range(4)]
    assert orders == again
    assert all(sorted(order) == list(range(96)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    # Groups run one after another, in more than one order.
    groups = {
        tuple(min(order[g : g + 32]) // 32 for g in (0, 32, 64)) for order in orders
    }
    assert len(groups) > 1
    assert all(sorted(group) == [0, 1, 2] for group in groups)


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_nobody_passes_a_barrier_before_all_arrived(
    lib: emulator.Library, order: str
) -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    when = torch.full((3, 80), -1, dtype=torch.int32)
    with emulator.run(order=order, seed=9):
        lib.rounds(counter, when, threads=80, group_size=80)
    for number, row in enumerate(when):
        assert sorted(row.tolist()) == list(range(80 * number, 80 * (number + 1)))


def test_a_simdgroup_runs_ahead_of_the_others(lib: emulator.Library) -> None:
    assert arrivals(lib, "alone", "forward") == [31] * 32 + [63] * 32 + [95] * 32
    assert arrivals(lib, "alone", "backward") == [95] * 32 + [63] * 32 + [31] * 32
    mixed = arrivals(lib, "alone", "random", 1)
    assert max(mixed) == 95
    assert min(mixed) > 31


@pytest.mark.parametrize("size", [64, 256])
def test_a_right_kernel_gives_the_same_bits_in_every_order(
    lib: emulator.Library, size: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, size)
    wanted = x
    while wanted.shape[1] > 1:
        middle = wanted.shape[1] // 2
        wanted = wanted[:, :middle] + wanted[:, middle:]
    for order, seed in [
        ("forward", 0),
        ("backward", 0),
        *(("random", n) for n in range(5)),
    ]:
        for trace in (False, True):
            out = torch.full((5, 1), float("nan"))
            with emulator.run(order=order, seed=seed, trace=trace):
                lib.tree(x, out, threads=5 * size, group_size=size)
            assert torch.equal(out, wanted), (order, seed)


def test_an_unknown_order_is_refused() -> None:
    with (
        pytest.raises(
            ValueError, match="order is 'up'; it can be one of forward, backward"
        ),
        emulator.run(order="up"),  # type: ignore[arg-type]
    ):
        pass
