"""The CPU kernels on every instruction set that runs here, beside float64.

tests/cpu holds the programs. What they read and write ends, or begins, with a page beside
which others must not be touched. On other machines NEON runs in an emulator (apt install
qemu-user-static g++-aarch64-linux-gnu), and is only compiled where there is none.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu_builds import (
    BITS,
    FLAGS,
    GROUPS,
    ZIG,
    Build,
    Machine,
    Programs,
    architecture,
    check,
    host,
    planted,
    run,
)

from affine_tensor.kernels import shaders

# "avx512-plain" has none of the instructions that came later (VNNI, VBMI, bfloat16).
X86 = {
    "avx512-plain": ("skylake-avx512", ["__AVX512F__", "__AVX512BW__", "__AVX512VL__"]),
    "avx2": ("x86-64-v3", ["__AVX2__", "__FMA__", "__F16C__"]),
}
# Of aarch64: g++'s name for a CPU, and zig's.
ARM = {"neon": ("armv8-a", "generic"), "neon-bf16": ("armv8.2-a+bf16", "neoverse_v1")}
ISAS = ("native", *X86, *ARM)


def machine(build: Build) -> Machine | str:
    if build.isa in ARM:
        return arm(*ARM[build.isa], build.driver)
    found = host()
    if isinstance(found, str):
        return found
    if build.isa == "native":
        return Machine(found.command, found.target)
    name, needed = X86[build.isa]
    if not found.macros.issuperset(needed):
        return f"this CPU has no {build.isa}"
    return Machine(found.command, (architecture(found.command, name),))


@functools.cache
def arm(gcc_name: str, zig_name: str, driver: str) -> Machine | str:
    if platform.machine() in ("aarch64", "arm64"):
        return "this CPU has NEON: see native"
    names = ("qemu-aarch64-static", "qemu-aarch64")
    emulator = next(filter(None, map(shutil.which, names)), None)
    runner = (emulator, "-cpu", "max") if emulator else ()
    not_run = "" if emulator else "apt install qemu-user-static"
    if gcc := shutil.which("aarch64-linux-gnu-g++"):
        return Machine((gcc,), (f"-march={gcc_name}", "-static"), runner, not_run)
    if importlib.util.find_spec("ziglang") is None:
        return "no compiler for aarch64: apt install g++-aarch64-linux-gnu"
    if driver == "driver_weights":
        not_run = "apt install g++-aarch64-linux-gnu, for its C++ library"
    flags = ("-target", "aarch64-linux-musl", f"-mcpu={zig_name}", "-fno-sanitize=all")
    return Machine(ZIG, flags, runner, not_run)


def kinds(isa: str, bits: int) -> list[int]:
    """Kinds of inputs; 8 bits and a bfloat16's are too many for products of bfloat16."""
    found = host()
    has = isa == "neon-bf16" or (
        isa == "native" and not isinstance(found, str) and found.multiplies_bfloat16
    )
    return [0, 1, 2] if has and bits < 8 else [1, 2]


def builds(full: bool) -> list[Build]:
    """All formats, or each width once with another group and kind for each set."""
    if full:
        return [
            Build(driver, isa, bits, group, x)
            for isa in ISAS
            for bits in BITS
            for group in GROUPS
            for driver in ("driver", "driver_weights")
            for x in (kinds(isa, bits) if driver == "driver" else [1])
        ]
    chosen = []
    for shift, isa in enumerate(ISAS):
        for i, bits in enumerate(BITS):
            if isa == "avx512-plain" and bits not in (3, 5, 6):
                continue
            group, own = GROUPS[(i + shift) % 5], kinds(isa, bits)
            if isa == "neon-bf16" and (bits % 2 == 0 or bits > 5):
                continue
            x = 0 if isa == "neon-bf16" else own[(i + shift) % len(own)]
            chosen.append(Build("driver", isa, bits, group, x))
            if i % 2 == 0 and isa in ("native", "avx2", "neon"):
                chosen.append(Build("driver_weights", isa, bits, group))
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_products_and_weights:
        metafunc.parametrize(
            "build", builds(metafunc.config.getoption("--full")), ids=str
        )


@pytest.fixture(scope="module")
def programs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    folder = tmp_path_factory.mktemp("programs")
    found = Programs(request, folder, machine)
    yield found
    found.close()


def test_products_and_weights(
    programs: Programs, build: Build, request: pytest.FixtureRequest
) -> None:
    full = ["full"] if request.config.getoption("--full") else []
    check([*programs.command(build), *full])


@pytest.mark.parametrize(
    "build",
    [Build("driver", isa, 3, 64) for isa in ("native", "avx2", "neon")],
    ids=str,
)
def test_errors_are_seen(programs: Programs, build: Build) -> None:
    """A wrong result, and a read of one byte past the end of the words."""
    command = programs.command(build)
    assert "FAILED: wrong" in planted(command, "wrong")
    assert "FAILED" not in planted(command, "short")


@pytest.mark.parametrize("cpu", ["apple_m1", "apple_m2"])
@pytest.mark.parametrize("source", ["product.cpp", "weights.cpp"])
def test_a_mac_compiles_them(source: str, cpu: str, tmp_path: Path) -> None:
    """By its clang, as it is in zig; the M2 has products of bfloat16."""
    pytest.importorskip("ziglang")
    definitions = ["-DBITS=5", "-DGROUP=64", f"-DX={0 if cpu == 'apple_m2' else 1}"]
    flags = ["-target", "aarch64-macos", f"-mcpu={cpu}", "-Werror", "-c"]
    source = str(shaders() / "cpu" / source)
    run([*ZIG, *FLAGS, *flags, *definitions, source, "-o", str(tmp_path / "kernels.o")])
