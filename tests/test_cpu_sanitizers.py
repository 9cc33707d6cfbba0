"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Their threads are those of a stand-in for OpenMP that sanitizers understand (tests/cpu).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu_builds import (
    Build,
    Machine,
    Programs,
    architecture,
    check,
    host,
    is_zig,
    planted,
    run,
)

# g++ writes each check of addresses in place otherwise, and compiles ten times as long.
CALLS = "--param=asan-instrumentation-with-call-threshold=0"
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
SANE = "#include <cstdlib>\nint main() { return 0; }\n"


@functools.cache
def machine(isa: str, sanitizer: str) -> Machine | str:
    """The first compiler whose programs run with a sanitizer, or what each one said."""
    found = host()
    if isinstance(found, str):
        return found
    if isa == "avx2" and "__AVX2__" not in found.macros:
        return "this CPU has no AVX2"
    # zig has no AddressSanitizer, and compiles the others' runtimes for minutes.
    commands: list[tuple[str, ...]] = [
        *([] if is_zig(found.command) else [found.command]),
        ("g++",),
        ("clang++",),
    ]
    reasons = []
    for command in dict.fromkeys(commands):
        if shutil.which(command[0]) is None:
            reasons.append(f"there is no {command[0]}")
            continue
        chosen = (architecture(command, "x86-64-v3" if isa == "avx2" else "native"),)
        if isa == "native" and command == found.command:
            chosen = found.target
        flags = ("-O1", "-g1", *chosen, *SANITIZERS[sanitizer])
        if sanitizer == "address" and is_gcc(command):
            flags += (CALLS,)
        # Where the system places memory too freely for them, it can be told not to.
        for runner in ((), ("setarch", "-R") if shutil.which("setarch") else ()):
            reason = trial(command, flags, runner)
            if reason is None:
                return Machine(command, flags, runner)
        reasons.append(f"{' '.join(command[-2:])}: {reason}")
    return f"no compiler with -fsanitize={sanitizer}: {'; '.join(reasons)}"


def is_gcc(command: tuple[str, ...]) -> bool:
    return "Free Software Foundation" in run([*command, "--version"])


def trial(
    command: tuple[str, ...], flags: tuple[str, ...], runner: tuple[str, ...]
) -> str | None:
    """Why an empty program does not compile or run, None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "sane.cpp"), Path(folder, "sane")
        source.write_text(SANE)
        build = [*command, *flags, str(source), "-pthread", "-o", str(program)]
        for step in (build, [*runner, str(program)]):
            result = subprocess.run(step, capture_output=True, text=True)
            if result.returncode:
                lines = result.stderr.strip().splitlines()
                return lines[-1] if lines else f"exit {result.returncode}"
    return None


# Each way in which codes lie in words, and each kind of inputs that both sets have.
FORMATS = [
    *(("native", *format_) for format_ in ((3, 64, 1), (5, 32, 2))),
    *(
        ("avx2", *format_)
        for format_ in ((1, 16, 1), (3, 64, 2), (5, 128, 1), (8, 256, 1))
    ),
]
ADDRESS = [
    *(Build("driver", *format_, "address") for format_ in FORMATS),
    Build("driver_weights", "native", 3, 32, 1, "address"),
    Build("driver_weights", "avx2", 5, 64, 1, "address"),
]
THREAD = [
    *(Build("driver", isa, 4, 64, 1, "thread") for isa in ("native", "avx2")),
    Build("driver_weights", "native", 6, 32, 1, "thread"),
]


@pytest.fixture(scope="module")
def programs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    folder = tmp_path_factory.mktemp("programs")
    found = Programs(request, folder, lambda build: machine(build.isa, build.sanitizer))
    yield found
    found.close()


@pytest.mark.parametrize("build", ADDRESS, ids=str)
def test_addresses_and_undefined_behaviour(programs: Programs, build: Build) -> None:
    check(programs.command(build))


@pytest.mark.parametrize("build", THREAD, ids=str)
def test_threads(programs: Programs, build: Build) -> None:
    check([*programs.command(build), "threads"])


@pytest.mark.parametrize("build", ADDRESS[:1], ids=str)
def test_a_read_past_the_end_is_seen(programs: Programs, build: Build) -> None:
    said = planted(programs.command(build), "short")
    assert "AddressSanitizer: heap-buffer-overflow" in said


@pytest.mark.parametrize("build", THREAD[:1], ids=str)
def test_a_race_is_seen(programs: Programs, build: Build) -> None:
    said = planted(programs.command(build), "race")
    assert "ThreadSanitizer: data race" in said
