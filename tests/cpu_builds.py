"""Builds and runs of tests/cpu: the CPU kernels in programs of their own, without torch."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from affine_tensor.kernels import KernelError, shaders
from affine_tensor.kernels.cpu import compiler

DRIVERS = Path(__file__).parent / "cpu"
BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128, 256)
FLAGS = [flag for flag in compiler._FLAGS if flag not in ("-shared", "-fPIC")]
ZIG = (sys.executable, "-m", "ziglang", "c++")


@dataclass(frozen=True)
class Build:
    """A driver for one format; `x` is the kind of the inputs (codes.h)."""

    driver: str
    isa: str
    bits: int
    group: int
    x: int = 1
    sanitizer: str = ""

    def __str__(self) -> str:
        kind = f"x{self.x}" if self.driver == "driver" else "weights"
        parts = [self.isa, f"{self.bits}bit", f"g{self.group}", kind, self.sanitizer]
        return "-".join(filter(None, parts))

    @property
    def sources(self) -> list[str]:
        values = {"BITS": self.bits, "GROUP": self.group}
        if self.driver == "driver":
            values["X"] = self.x
        definitions = [f"-D{name}={value}" for name, value in values.items()]
        include = ["-I", str(shaders() / "cpu")]
        return [*definitions, *include, str(DRIVERS / f"{self.driver}.cpp")]


@dataclass(frozen=True)
class Machine:
    """How to compile for an instruction set, and what runs it or why nothing does."""

    command: tuple[str, ...]
    flags: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    not_run: str = ""


@functools.cache
def host() -> compiler.Compiler | str:
    """The compiler that the kernels use here, or why there is none."""
    try:
        return compiler.find()
    except KernelError as error:
        return str(error)


def is_zig(command: Sequence[str]) -> bool:
    return tuple(command[-2:]) == ZIG[-2:]


def architecture(command: Sequence[str], name: str) -> str:
    """The flag that chooses an x86 CPU."""
    if is_zig(command):
        return "-mcpu=" + name.replace("x86-64", "x86_64").replace("-", "_")
    return f"-march={name}"


def run(command: Sequence[str]) -> str:
    """What it prints. Raises RuntimeError with all that it says if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = result.stdout[-3000:] + result.stderr[-6000:]
        raise RuntimeError(f"{' '.join(command)}: {result.returncode}\n{said}")
    return result.stdout


def compile_driver(build: Build, machine: Machine, folder: Path) -> Path:
    """The program, or its object file where nothing runs it."""
    program = folder / str(build)
    command = [*machine.command, *FLAGS, *machine.flags]
    if machine.not_run:
        run([*command, "-c", *build.sources, "-o", str(program)])
    elif is_zig(machine.command) and not build.sanitizer:
        # At first use zig compiles its libraries of C and C++, anew for each CPU: the
        # latter takes minutes, and products need none.
        bare = build.driver == "driver"
        own = ["-fno-exceptions", "-DNO_CXX_LIBRARY"] if bare else []
        run([*command, *own, "-c", *build.sources, "-o", f"{program}.o"])
        flags = [flag for flag in machine.flags if not flag.startswith("-mcpu")]
        link = [*machine.command, *flags, *(["-nostdlib++"] if bare else [])]
        run([*link, f"{program}.o", "-o", str(program)])
    else:
        run([*command, *build.sources, "-pthread", "-o", str(program)])
    return program


class Programs:
    """What the selected tests of a file want, compiled on all cores in their order."""

    def __init__(
        self,
        request: pytest.FixtureRequest,
        folder: Path,
        machine_of: Callable[[Build], Machine | str],
    ) -> None:
        self._machine_of = machine_of
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._programs: dict[Build, Future[Path]] = {}
        for item in request.session.items:
            parameters = getattr(item, "callspec", None)
            build = parameters and parameters.params.get("build")
            if item.path != request.path or not build or build in self._programs:
                continue
            machine = machine_of(build)
            if isinstance(machine, Machine):
                self._programs[build] = self._pool.submit(
                    compile_driver, build, machine, folder
                )

    def command(self, build: Build) -> list[str]:
        """What runs it; skips, with a reason, where nothing can compile or run it."""
        machine = self._machine_of(build)
        if isinstance(machine, str):
            pytest.skip(machine)
        program = self._programs[build].result()
        if machine.not_run:
            pytest.skip(f"compiled, but not run: {machine.not_run}")
        return [*machine.runner, str(program)]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def check(command: Sequence[str]) -> None:
    """Run a driver: every case must pass."""
    said = run(command)
    assert " 0 failures" in said, said


def planted(command: Sequence[str], what: str) -> str:
    """What a driver says of an error that it makes on purpose; it must fail."""
    result = subprocess.run([*command, what], capture_output=True, text=True)
    assert result.returncode != 0, f"'{what}' went unseen:\n{result.stdout}"
    return result.stdout + result.stderr
