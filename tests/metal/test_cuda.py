"""The CUDA executor: what compiles without a GPU, and with one all of on_cuda.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cuda_cases
import cuda_sanitizer
import metal_emulator as emulator
import mlx_kernels
import on_cuda
import pytest
import test_bugs
import test_compile_shader
import test_orders
import test_traffic
import torch
from cuda_sanitizer import PLANTS, Report
from metal_emulator import cuda


def lacking_nvrtc() -> str:
    try:
        cuda.nvrtc_version()
    except RuntimeError as error:
        return str(error)
    return ""


def lacking_sanitizer() -> str:
    try:
        cuda_sanitizer.sanitizer()
    except RuntimeError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(lacking_nvrtc()), reason=lacking_nvrtc())
needs_gpu = pytest.mark.skipif(bool(on_cuda.missing()), reason=on_cuda.missing())
needs_sanitizer = pytest.mark.skipif(
    bool(lacking_sanitizer()), reason=lacking_sanitizer()
)


# ------------------------------------------------------------------------- launches
def entered(launch: Sequence[tuple[int, int, int]]) -> set[tuple[int, ...]]:
    """The positions that `enter` in lanes_cuda.hpp gives a launch's threads."""
    firsts, counts, sizes = zip(*launch, strict=True)
    blocks = itertools.product(*map(range, counts))
    threads = list(itertools.product(*map(range, sizes)))
    return {
        tuple((f + b, t) for f, b, t in zip(firsts, block, thread, strict=True))
        for block in blocks
        for thread in threads
    }


@pytest.mark.parametrize(
    ("total", "group"),
    [((64, 1, 1), (32, 1, 1)), ((10, 6, 3), (8, 4, 2)), ((5, 3, 1), (8, 1, 1))],
)
def test_launches_cover_every_thread_once(
    total: tuple[int, ...], group: tuple[int, ...]
) -> None:
    """Ragged edges are launches of their own, so that no thread idles at a barrier."""
    launches = list(itertools.product(*map(cuda._parts, total, group)))
    seen: list[tuple[int, ...]] = []
    for launch in launches:
        for position in entered(launch):
            at = zip(position, group, strict=True)
            seen.append(tuple(place * size + inside for (place, inside), size in at))
    assert sorted(seen) == list(itertools.product(*map(range, total)))


# ----------------------------------------------------------------------- compilation
C10 = """#include <c10/metal/reduction_utils.h>
using namespace metal;
kernel void total(device const float* x, device float* out,
                  uint i [[thread_position_in_threadgroup]],
                  uint size [[threads_per_threadgroup]]) {
  threadgroup float shared[32];
  float sum = c10::metal::threadgroup_sum(shared, x[i], i, size);
  if (i == 0) out[0] = sum;
}"""
# Every function of the mathematical ones; on the CPU test_language.py compares them.
FUNCTIONS = """#include <metal_stdlib>
using namespace metal;
template <typename T> T all_of(T x) {
  int e;
  T w;
  x += acos(x) + acosh(x) + asin(x) + asinh(x) + atan(x) + atanh(x) + cos(x) + cosh(x);
  x += cospi(x) + exp(x) + exp2(x) + exp10(x) + log(x) + log2(x) + log10(x) + sin(x);
  x += sinh(x) + sinpi(x) + tan(x) + tanh(x) + tanpi(x) + pow(x, x) + powr(x, x);
  x += atan2(x, x) + fdim(x, x) + frexp(x, e) + modf(x, w) + sincos(x, w) + T(ilogb(x));
  return x + precise::exp(x) + fast::log(x) + smoothstep(x, x, x) + sign(x) + step(x, x);
}
kernel void f(device float* x, device half* y, device bfloat* z, device float4* v) {
  x[0] = all_of(x[0]);
  y[0] = all_of(y[0]);
  z[0] = all_of(z[0]);
  v[0] = exp(v[0]) + fmod(v[0], v[1]);
}"""
SOURCES = {
    "functions": FUNCTIONS,
    "c10": C10,
    "stand-in": test_compile_shader.PRELUDE + test_compile_shader.FULL,
    "orders": test_orders.SOURCE,
    "traffic": test_traffic.SOURCE,
    **{
        name: test_bugs.PRELUDE + plant.source
        for name, plant in test_bugs.PLANTS.items()
    },
}


@needs_nvrtc
@pytest.mark.parametrize("name", SOURCES)
def test_what_compiles_for_the_cpu_compiles_for_cuda(name: str) -> None:
    emulator.compile_shader(SOURCES[name])
    cuda.compile_shader(SOURCES[name])


@needs_nvrtc
def test_the_cases_compile() -> None:
    for bug in (False, True):
        assert set(dir(cuda_sanitizer.plants_library(bug))) == set(PLANTS)
    cases, _ = cuda_cases.all_cases()
    for name in cuda_cases.libraries(cases):
        units = cuda_cases.gpu_library(name).build()._units.values()
        assert all(unit.cubin.startswith(b"\x7fELF") for unit in units)


@needs_nvrtc
def test_a_broken_source_is_a_syntax_error() -> None:
    with pytest.raises(SyntaxError, match=r"program_source\(2\): error.*\bb\b"):
        cuda.compile_shader("\nkernel void f(device float* a) { a[0] = b; }")


def test_without_nvrtc_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cuda.importlib, "import_module", absent)
    with pytest.raises(
        RuntimeError, match=r"cuda\.bindings\.driver cannot be imported"
    ):
        cuda._bindings("driver")


# ------------------------------------------------------------ the sanitizer's reports
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at msl_entry_0_out_of_bounds_write+0x90 in cuda_plants.metal:11
=========     by thread (60,0,0) in block (0,0,0)
=========     Access to 0x7f0 is out of bounds
=========
========= ERROR SUMMARY: 4 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at f+0x90 in cuda_plants.metal:26
=========     and Read access at f+0xa0 in cuda_plants.metal:30 [64 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_reports_are_read() -> None:
    report = Report(MEMCHECK, "", cuda_sanitizer.count_errors(MEMCHECK), 0)
    assert report.errors == 4
    assert report.messages == [
        "Invalid __global__ write of size 4 bytes [cuda_plants.metal:11]"
    ]
    places = cuda_sanitizer.lines_to_name("out_of_bounds_write")
    assert report.names(places) == places
    assert report.names({"cuda_plants.metal:1"}) == set()
    report = Report(RACECHECK, "", cuda_sanitizer.count_errors(RACECHECK), 0)
    assert report.errors == 1
    places = cuda_sanitizer.lines_to_name("missing_barrier")
    assert report.names(places) == places
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert cuda_sanitizer.count_errors(clean) == 0
    assert cuda_sanitizer.count_errors("========= COMPUTE-SANITIZER\n") is None


def test_the_emulator_finds_the_planted_bugs_too() -> None:
    """In the very lines that the sanitizer has to name."""
    source = cuda_cases.metal_source(cuda_sanitizer.PLANTS_FILE)
    clean = emulator.compile_shader(source)
    buggy = emulator.compile_shader(source, defines=["BUG"])
    launch = {"threads": 64, "group_size": 64, "arg_casts": "int32"}
    for name, plant in PLANTS.items():
        arguments = [a.clone() if torch.is_tensor(a) else a for a in plant.arguments]
        with emulator.run(trace=True):
            getattr(clean, name)(*arguments, **launch)
            with pytest.raises(emulator.EmulationError) as caught:
                getattr(buggy, name)(*arguments, **launch)
        if name != "divergent_barrier":  # here it is the race that comes of it
            places = cuda_sanitizer.lines_to_name(name)
            assert any(place in str(caught.value) for place in places)


# --------------------------------------------------------------------------- on a GPU
@needs_gpu
def test_the_gpu_computes_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    status = on_cuda.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert status == 0


@needs_gpu
@needs_sanitizer
def test_the_sanitizer_finds_the_plants_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = on_cuda.main(["--sanitize"])
    assert status == 0, capsys.readouterr().out


@needs_gpu
@pytest.mark.parametrize("guard", [False, True])
def test_offsets_and_overlaps_are_kept(guard: bool) -> None:
    source = test_compile_shader.PRELUDE + test_compile_shader.FULL
    lib = cuda.compile_shader(source, guard=guard)
    base = torch.arange(24.0, device="cuda")
    out = torch.zeros(4, device="cuda")
    lib.copy(base[3:], out, threads=4)
    assert out.tolist() == [3.0, 4.0, 5.0, 6.0]
    lib.copy(base[:12], base[12:], threads=12, group_size=8)
    assert base.tolist() == [float(i) for i in range(12)] * 2
    lib.full(out, 2.5)
    assert out.tolist() == [2.5] * 4
    with pytest.raises(RuntimeError, match="dense CUDA tensors stand for those on MPS"):
        lib.full(torch.zeros(4), 2.5)


def test_mlx_is_among_the_cases_where_it_is_installed() -> None:
    cases, lacking = cuda_cases.all_cases()
    count = sum(case.name.startswith("affine") for case in cases)
    if lacking:
        with pytest.raises(mlx_kernels.HeadersMissing):
            mlx_kernels.installed_headers()
    assert count == 0 if lacking else count > 200
