"""Launches on a device for tensors on the CPU; the emulator stands for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import metal_emulator as emulator
import on_device
import pytest
import torch
from torch import Tensor

SOURCE = """
#include <metal_stdlib>
using namespace metal;
kernel void copy(device const float* from, device float* to, constant long2& numbers,
                 uint i [[thread_position_in_grid]]) {
  to[i] = from[i * numbers.x] + float(numbers.y);
}
"""


class Spy:
    """The emulator's kernels, with the tensors that they were given."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def compile_shader(self, source: str) -> Any:
        library = emulator.compile_shader(source)
        spy = self

        class Watched:
            def __getattr__(self, name: str) -> Callable[..., None]:
                kernel = getattr(library, name)

                def launch(*args: Any, **sizes: Any) -> None:
                    spy.seen.append(list(args))
                    with emulator.run():  # not into the log of the test
                        kernel(*args, **sizes)

                return launch

        return Watched()


@pytest.fixture
def spy() -> Spy:
    return Spy()


@pytest.fixture
def copy(spy: Spy) -> Any:
    return on_device.compiler(spy.compile_shader, "cpu")(SOURCE).copy


def test_results_come_back_into_the_views(copy: Any, spy: Spy) -> None:
    base = torch.arange(40.0)
    out = torch.full((10,), -1.0)
    copy(base[3:], out[2:6], [2, 100], threads=(4,), group_size=(4,))
    assert out.tolist() == [-1, -1, 103, 105, 107, 109, -1, -1, -1, -1]
    assert base.equal(torch.arange(40.0))
    first, second, numbers = spy.seen[0]
    # All of the storage went over, the views as they were.
    assert first.untyped_storage().nbytes() == 160
    assert (first.storage_offset(), second.storage_offset()) == (3, 2)
    assert first.data_ptr() != base[3:].data_ptr()
    assert numbers == [2, 100]


def test_tensors_of_one_storage_stay_in_one(copy: Any, spy: Spy) -> None:
    base = torch.arange(8.0)
    copy(base[:4], base[4:], [1, 0], threads=(4,), group_size=(4,))
    assert base.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    first, second, _ = spy.seen[0]
    storages = [tensor.untyped_storage().data_ptr() for tensor in (first, second)]
    assert storages[0] == storages[1]


def test_nan_keeps_its_bits(copy: Any) -> None:
    words = torch.tensor([0x7FC12345, 0x3F800000], dtype=torch.int32)
    out = torch.zeros(1)
    copy(words.view(torch.float32)[1:], out, [1, 0], threads=(1,), group_size=(1,))
    assert out.item() == 1.0
    assert words[0] == 0x7FC12345


def test_launches_are_logged_as_the_emulator_logs_them(copy: Any) -> None:
    kernels: list[Callable[..., None]] = [copy, emulator.compile_shader(SOURCE).copy]
    texts = []
    for kernel in kernels:
        with emulator.run() as run:
            base = torch.arange(9.0)
            kernel(base[1:], torch.zeros(4), [2, 1], threads=(4,), group_size=(2,))
        assert len(run.launches) == 1
        texts.append(str(run.launches[0]))
    assert texts[0] == texts[1]
    assert texts[0].startswith("copy(float32[8]+4, float32[4], int64 [2, 1]) threads")


def test_whoever_needs_traffic_is_skipped(copy: Any) -> None:
    def traced(x: Tensor) -> Any:
        with emulator.run(trace=True) as run:
            copy(x, torch.zeros(4), [1, 0], threads=(4,), group_size=(4,))
        return run.launches[0].traffic

    traffic = traced(torch.arange(4.0))
    with pytest.raises(pytest.skip.Exception, match="traffic is counted"):
        traffic[0]
    with pytest.raises(pytest.skip.Exception, match="traffic is counted"):
        sum(one.load_bytes for one in traffic)
