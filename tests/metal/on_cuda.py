"""Compare the Metal emulator with an NVIDIA GPU, for a person who has one.

    python tests/metal/on_cuda.py              every case on both, all output bits compared
    python tests/metal/on_cuda.py --sanitize   planted bugs and clean kernels under
                                               compute-sanitizer's three tools
    python tests/metal/on_cuda.py --plant NAME one planted bug, to be run under
                                               compute-sanitizer (without it, it may hang)

Needed are a C++ compiler (or `pip install ziglang`), `pip install cuda-bindings
nvidia-cuda-nvrtc` (torch for CUDA may have brought them), MLX for its kernels, and the
CUDA toolkit's compute-sanitizer. Only operations that IEEE 754 or integers define
exactly are compared: functions such as exp, log and sin differ in their last bits.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cuda_sanitizer
import metal_emulator as emulator
import torch
from cuda_cases import Case, OnGpu, all_cases, cpu_library, gpu_library, libraries
from metal_emulator import cuda
from torch import Tensor

ORDERS = ("forward", "backward", "random")


def missing() -> str:
    """Why no kernel can run on a GPU here, or nothing."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        cuda.nvrtc_version()
    except RuntimeError as error:
        return str(error)
    return ""


def differing_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    """Where two results first differ in any bit, or nothing."""
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        one, two = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
        wrong = (one != two).view(-1, a.element_size()).any(1)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            values = (
                f"{a.reshape(-1)[first].item()!r} for {b.reshape(-1)[first].item()!r}"
            )
            count = f"{int(wrong.sum())} of {wrong.numel()} differ"
            return f"output {index}: {count}, the first at {first}: {values}"
    return ""


def unwritten(results: Sequence[Tensor]) -> str:
    """NaN is what outputs hold before a kernel writes them; no case computes one."""
    count = sum(int(r.isnan().sum()) for r in results if r.is_floating_point())
    return f"the CPU left {count} elements NaN" if count else ""


def compare(case: Case, number: int, cpu: Any, gpu: Any) -> str:
    """What is wrong with one case, or nothing."""
    try:
        with emulator.run(order=ORDERS[number % 3], seed=number):
            want = case.run(cpu)
        return unwritten(want) or differing_bits(case.run(gpu), want)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def build(names: Sequence[str], *, guard: bool, both: bool = True) -> dict[str, Any]:
    """Libraries by name, each for the CPU and the GPU, all kernels compiled."""
    workers = os.cpu_count() or 1
    jobs: list[tuple[str, Any]] = []
    for name in names:
        jobs.append((f"gpu {name}", lambda name=name: gpu_library(name, guard=guard)))
        if both:
            jobs.append((f"cpu {name}", lambda name=name: cpu_library(name)))
    built: dict[str, Any] = {}
    started = time.time()
    with ThreadPoolExecutor(workers) as pool:
        made = pool.map(lambda job: job[1]().build(workers=workers), jobs)
        for (label, _), library in zip(jobs, made, strict=True):
            kind, name = label.split(maxsplit=1)
            built[label] = OnGpu(library) if kind == "gpu" else library
    print(
        f"compiled {len(jobs)} libraries in {time.time() - started:.1f} s", flush=True
    )
    return built


def describe() -> None:
    name = torch.cuda.get_device_name()
    version = ".".join(map(str, cuda.nvrtc_version()))
    compiler = emulator.compilers.find_compiler()
    print(f"{name} ({cuda.architecture()}), NVRTC {version}, torch {torch.__version__}")
    print(f"CPU: {platform.machine()}, {compiler.version}", flush=True)


def compare_all(pattern: str) -> int:
    """Every case whose name has the pattern in it; returns the exit code."""
    describe()
    cases, lacking = all_cases()
    cases = [case for case in cases if pattern in case.name]
    if lacking:
        print(f"without MLX's kernels: {lacking}")
    built = build(libraries(cases), guard=False)
    equal, started = 0, time.time()
    for number, case in enumerate(cases):
        libs = built[f"cpu {case.library}"], built[f"gpu {case.library}"]
        wrong = compare(case, number, *libs)
        equal += not wrong
        print(
            f"{'FAIL' if wrong else 'ok  '} {case.name}  {wrong}".rstrip(), flush=True
        )
    took = time.time() - started
    print(f"{equal} of {len(cases)} bit-equal, in {took:.1f} s", flush=True)
    return 0 if cases and equal == len(cases) else 1


# ------------------------------------------------------------------ under the sanitizer
def run_plant(name: str, *, bug: bool) -> None:
    results = cuda_sanitizer.PLANTS[name].run(name, bug=bug)
    print(f"{name}: {results[-1][:4].tolist()} ...", flush=True)


def run_clean_twins() -> int:
    for name in cuda_sanitizer.PLANTS:
        run_plant(name, bug=False)
    print(f"ran {len(cuda_sanitizer.PLANTS)} on the GPU", flush=True)
    return 0


def run_clean_cases() -> int:
    """On the GPU alone, in buffers whose ends the sanitizer knows."""
    cases, lacking = all_cases()
    wanted = [
        pattern
        for pattern in cuda_sanitizer.CLEAN
        if not (lacking and pattern.startswith("affine"))
    ]
    chosen = [case for case in cases if any(p in case.name for p in wanted)]
    found = [p for p in wanted if any(p in case.name for case in chosen)]
    assert found == wanted, f"no such cases: {set(wanted) - set(found)}"
    libs = {name: OnGpu(gpu_library(name, guard=True)) for name in libraries(chosen)}
    for case in chosen:
        case.run(libs[case.library])
        print(case.name, flush=True)
    print(f"ran {len(chosen)} on the GPU", flush=True)
    return 0


def sanitize(verbose: bool) -> int:
    describe()
    print(f"{cuda_sanitizer.sanitizer()}", flush=True)
    # Compiled here once, what runs under the sanitizer finds it in the cache.
    for bug in (False, True):
        cuda_sanitizer.plants_library(bug)
    run_clean_cases()
    started = time.time()
    checks = cuda_sanitizer.all_checks()
    for check in checks:
        print(check)
        if verbose or not check.passed:
            for message in check.report.messages[:8]:
                print(f"       {message}")
        if not check.passed:
            print(f"     exit code {check.report.exit_code}, its output:")
            print("\n".join(check.report.output.splitlines()[-12:]))
            print("\n".join(check.report.text.splitlines()[:60]))
    passed = sum(check.passed for check in checks)
    print(f"{passed} of {len(checks)} as expected, in {time.time() - started:.1f} s")
    return 0 if passed == len(checks) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases with this name"
    )
    parser.add_argument("--sanitize", action="store_true", help="use compute-sanitizer")
    parser.add_argument("--verbose", action="store_true", help="show its messages too")
    parser.add_argument(
        "--plant", choices=cuda_sanitizer.PLANTS, help="one planted bug"
    )
    parser.add_argument("--clean", action="store_true", help="its clean twin instead")
    parser.add_argument("--clean-twins", action="store_true", help="all clean twins")
    parser.add_argument(
        "--clean-cases", action="store_true", help="some cases, GPU only"
    )
    chosen = parser.parse_args(arguments)
    if reason := missing():
        print(f"nothing can run: {reason}", file=sys.stderr)
        return 2
    if chosen.plant:
        run_plant(chosen.plant, bug=not chosen.clean)
        return 0
    if chosen.clean_twins:
        return run_clean_twins()
    if chosen.clean_cases:
        return run_clean_cases()
    return sanitize(chosen.verbose) if chosen.sanitize else compare_all(chosen.only)


if __name__ == "__main__":
    sys.exit(main())
