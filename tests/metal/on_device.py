"""Kernels of a real device for tensors on the CPU.

Tests that patch the device seam keep their operands on the CPU. Here these are copied to
the device around each launch, with all of their storage, so that strides, offsets and
what lies between the elements are as they were. So the same tests run on the emulator and
on a Mac's GPU. Launches are logged in `metal_emulator.run` as the emulator's are; what
only the emulator counts skips the test that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from metal_emulator.arguments import sizes_of, tensor_argument, value_argument
from metal_emulator.launches import Launch, present_run
from torch import Tensor

Compile = Callable[[str], Any]


def compiler(compile_shader: Compile, device: str | torch.device) -> Compile:
    """A `compile_shader` whose kernels take tensors on the CPU."""

    def compile_for_cpu(source: str) -> Library:
        return Library(compile_shader(source), torch.device(device))

    return compile_for_cpu


class Library:
    def __init__(self, library: Any, device: torch.device) -> None:
        self._library, self._device = library, device

    def __getattr__(self, name: str) -> Kernel:
        return Kernel(getattr(self._library, name), name, self._device)


class Kernel:
    def __init__(self, kernel: Any, name: str, device: torch.device) -> None:
        self._kernel, self._name, self._device = kernel, name, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __call__(self, *args: Any, **launch: Any) -> None:
        moved: dict[Any, tuple[Tensor, Tensor]] = {}
        there = [self._move(arg, moved) for arg in args]
        self._kernel(*there, **launch)
        for here, copy in moved.values():
            here.copy_(copy)
        run = present_run()
        if run is not None:
            run.launches.append(self._launch(args, **launch))

    def _move(self, arg: Any, moved: dict[Any, tuple[Tensor, Tensor]]) -> Any:
        """The argument on the device; tensors of one storage stay in one."""
        if not isinstance(arg, Tensor):
            return arg
        storage = arg.untyped_storage()
        key = storage.data_ptr(), arg.dtype
        if key not in moved:
            size = storage.nbytes() // arg.itemsize
            flat = torch.empty(0, dtype=arg.dtype).set_(storage, 0, (size,))
            moved[key] = flat, flat.to(self._device, copy=True)
        return moved[key][1].as_strided(arg.size(), arg.stride(), arg.storage_offset())

    def _launch(self, args: Any, threads: Any, group_size: Any) -> Launch:
        texts = [
            (
                tensor_argument(arg, i, "cpu")
                if isinstance(arg, Tensor)
                else value_argument(arg, "", i)
            ).text
            for i, arg in enumerate(args)
        ]
        total, group = sizes_of(threads, "threads"), sizes_of(group_size, "group_size")
        return Launch(self._name, total, group, tuple(texts), Uncounted())


class Uncounted(tuple):
    """In place of the traffic of a launch. Whoever looks at it skips the test."""

    def _skip(self, *_: Any) -> NoReturn:
        pytest.skip("traffic is counted by the emulator, not by a device")

    __getitem__ = __iter__ = __len__ = _skip
