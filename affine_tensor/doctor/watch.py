"""Seeing which kernels run, so that no slow path passes for one of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .. import tensor as tensor_module
from ..kernels import cpu, metal, settings
from ..kernels.cpu import library as cpu_library
from ..kernels.cuda.launch import Launch
from ..kernels.metal import library, values
from ..kernels.metal.library import Kernel, Variant

Check = Callable[[Variant, Kernel], "str | None"]


class Watch(logging.Handler):
    """What happened since `clear`: launches of kernels, calls of operators, warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.checking = False  # a new kernel, which does not count as a launch
        self.clear()

    def clear(self) -> None:
        self.launches: list[str] = []
        self.calls = 0
        self.warnings: list[str] = []
        tensor_module._logged.clear()

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())

    def slow_path(self, kind: str) -> str | None:
        """How something else than our kernels did the work, or None."""
        if self.warnings:
            return self.warnings[0]
        if kind == "mps" and len(self.launches) < self.calls:
            return (
                f"of {self.calls} calls of operators only {len(self.launches)} launched "
                "a kernel; the reference took the others"
            )
        return None


class _Library:
    """A compiled library whose kernels note their launches."""

    def __init__(self, library: Any, watch: Watch) -> None:
        self._library, self._watch = library, watch

    def __getattr__(self, name: str) -> Any:
        return _Kernel(getattr(self._library, name), name, self._watch)


class _Kernel:
    def __init__(self, kernel: Any, name: str, watch: Watch) -> None:
        self._kernel, self._name, self._watch = kernel, name, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._watch.checking:
            self._watch.launches.append(self._name)
        return self._kernel(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def _noting(function: Any, name: str, watch: Watch) -> Any:
    """A function of the CPU's library that notes when it did its work."""

    @functools.wraps(function)
    def call(*arguments: Any) -> int:
        code: int = function(*arguments)
        if code == cpu_library.DONE:  # else the reference does it
            watch.launches.append(name.removeprefix("affine_"))
        return code

    return call


def forget() -> None:
    """Drop all compiled kernels and plans."""
    library.reset()
    metal.reset()
    values.reset()
    cpu.reset()


@contextmanager
def watched() -> Iterator[Watch]:
    """Within, kernels are compiled anew and watched, and one that is wrong raises.

    A CPU for which nothing can be compiled has the reference, which is not wrong.
    """
    watch, served = Watch(), ops.has_kernels("cpu")
    compile_shader, device_of = torch.mps.compile_shader, ops.device_of
    checked, of_cpu, launch = library._checked, cpu_library.function, Launch.__call__
    before = settings.strict, settings.metal_backend, settings.cpu_backend

    @functools.wraps(compile_shader)
    def compile_and_watch(source: str) -> Any:
        return _Library(compile_shader(source), watch)

    def check_unseen(wanted: Variant, check: Check) -> Kernel | None:
        watch.checking = True
        try:
            return checked(wanted, check)
        finally:
            watch.checking = False

    def function(source: str, name: str, *more: Any, **defines: Any) -> Any:
        found = of_cpu(source, name, *more, **defines)
        return None if found is None else _noting(found, name, watch)

    def launch_and_note(self: Launch, stream: int, *pointers: int) -> None:
        launch(self, stream, *pointers)
        watch.launches.append("own")  # a launch of CUDA's does not know its name

    # Every operator asks once where it runs.
    def count(tensor: Tensor) -> str:
        watch.calls += 1
        return device_of(tensor)

    forget()
    torch.mps.compile_shader, ops.device_of = compile_and_watch, count
    library._checked = check_unseen
    cpu_library.function = function
    Launch.__call__ = launch_and_note  # type: ignore[method-assign]
    settings.strict, settings.metal_backend = True, "own"
    if not served:
        settings.cpu_backend = "reference"
    logger = logging.getLogger("affine_tensor")
    logger.addHandler(watch)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield watch
    finally:
        logger.removeHandler(watch)
        logger.propagate = propagate
        torch.mps.compile_shader, ops.device_of = compile_shader, device_of
        library._checked, cpu_library.function = checked, of_cpu
        Launch.__call__ = launch  # type: ignore[method-assign]
        settings.strict, settings.metal_backend, settings.cpu_backend = before
        forget()
