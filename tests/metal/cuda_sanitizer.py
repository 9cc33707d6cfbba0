"""Planted bugs under NVIDIA's compute-sanitizer: what it must find, and what it must not.

The sanitizer runs on_cuda.py as a program of its own; its log tells what it saw.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cuda_cases import HERE, metal_source
from metal_emulator import cuda
from torch import Tensor

TOOLS = ("memcheck", "racecheck", "synccheck")
PROGRAM = HERE / "on_cuda.py"
PLANTS_FILE = "cuda_plants.metal"
TIMEOUT = 150  # seconds; a divergent barrier may hang
# Cases without planted bugs that must show none: (part of) their names.
CLEAN = (
    "positions (10, 6, 3)",
    "transposed 37 53",
    "tree 1000",
    "group_sum 1000",
    "product half 29",
    "matrices float 3",
    "lanes reductions_float torch.float32 9 45",
    "lanes bits torch.uint32 7 77",
    "shuffles half",
    "vectors",
    "atomics",
    "gemv 13",
    "affine_qmv_float16_t_gs_32_b_4_0 (2, 3,",
    "affine_qmm_t_float16_t_gs_32_b_4_0_0 (40, 72,",
    "affine_qmm_t_float16_t_gs_32_b_4_1_0 (40, 64,",
    "affine_quantize_float16_t_gs_32_b_4",
    "shader gemv (4 bits",
    "shader gemv_small (3 bits",
    "shader gemm (4 bits",
    "shader gemm (5 bits",
    "shader gemv_n (6 bits",
    "shader gemm_n (4 bits",
    "shader dequantize (3 bits",
    "shader embedding (4 bits",
    "shader quantize (5 bits",
)
OPTIONS = {
    "--target-processes": ["application-only"],
    "--launch-timeout": ["120"],
    "--show-backtrace": ["device"],
    # What a library asks the driver in vain is no fault of a kernel.
    "--report-api-errors": ["no"],
    # Room between allocations, so that no access lands in the next one.
    "--padding": ["4096"],
}
ONLY_MEMCHECK = ("--report-api-errors", "--padding")


@dataclasses.dataclass(frozen=True)
class Plant:
    """A kernel of cuda_plants.metal, the tool that finds its bug, and what that says."""

    tool: str
    message: str
    arguments: tuple[int | Tensor, ...]

    def run(self, name: str, *, bug: bool) -> list[Tensor]:
        """Launch it on the GPU, on buffers that end where the tensors end."""
        kernel = getattr(plants_library(bug), name)
        moved = [a.cuda() if isinstance(a, Tensor) else a for a in self.arguments]
        kernel(*moved, threads=64, group_size=64, arg_casts="int32")
        torch.cuda.synchronize()
        return [a.cpu() for a in moved if isinstance(a, Tensor)]


X, ZEROS = torch.arange(64.0), torch.zeros(64)
PLANTS = {
    "out_of_bounds_write": Plant(
        "memcheck", "Invalid __global__ write of size 4", (X, torch.zeros(60), 60)
    ),
    "out_of_bounds_read": Plant(
        "memcheck", "Invalid __global__ read of size 4", (X, ZEROS, 64)
    ),
    "missing_barrier": Plant("racecheck", "Race reported between", (X, ZEROS)),
    "missing_barrier_in_loop": Plant(
        "racecheck", "Race reported between", (X, ZEROS, 3)
    ),
    "divergent_barrier": Plant("synccheck", "Barrier error detected", (X, ZEROS)),
}


@functools.cache
def plants_library(bug: bool) -> cuda.Library:
    defines = ["BUG"] if bug else []
    return cuda.compile_shader(metal_source(PLANTS_FILE), defines=defines, guard=True)


def lines_to_name(plant: str) -> set[str]:
    """The places, as `file:line`, of which a report on this plant names one."""
    rows = (HERE / PLANTS_FILE).read_text(encoding="utf-8").splitlines()
    marked = (n for n, row in enumerate(rows, 1) if row.endswith(f"// FOUND: {plant}"))
    return {f"{PLANTS_FILE}:{number}" for number in marked}


# ------------------------------------------------------------------------------- reports
@dataclasses.dataclass(frozen=True)
class Report:
    """What one run under the sanitizer said; no count where it ended without one."""

    text: str
    output: str
    errors: int | None
    exit_code: int | None  # None: it did not end in time

    @property
    def messages(self) -> list[str]:
        """First lines of the errors, the places they name put behind them."""
        found = []
        for block in re.split(r"^=========\s*$", self.text, flags=re.MULTILINE):
            rows = [row.removeprefix("=========").strip() for row in block.splitlines()]
            rows = [row for row in rows if row and "SUMMARY" not in row]
            places = re.findall(r"[\w.]+\.(?:metal|h|hpp):\d+", block)
            rows = [row for row in rows if row != "COMPUTE-SANITIZER"]
            if rows:
                found.append(f"{rows[0]} [{', '.join(dict.fromkeys(places))}]")
        return found

    def names(self, places: set[str]) -> set[str]:
        return {place for place in places if re.search(rf"\b{place}\b", self.text)}


def count_errors(text: str) -> int | None:
    """The errors and hazards of a sanitizer's log, warnings included."""
    if found := re.search(r"RACECHECK SUMMARY: (\d+) hazards?", text):
        return int(found[1])
    if found := re.search(r"ERROR SUMMARY: (\d+) errors?", text):
        return int(found[1])
    return None


@functools.cache
def sanitizer() -> str:
    """compute-sanitizer's path; raises RuntimeError where there is none."""
    path = shutil.which("compute-sanitizer")
    if path is None:
        for folder in ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"):
            path = path or shutil.which("compute-sanitizer", path=folder)
    if path is None:
        raise RuntimeError("compute-sanitizer is not on the PATH; CUDA brings it")
    return path


@functools.cache
def known_options() -> str:
    command = [sanitizer(), "--help"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def _run(command: list[str]) -> tuple[str, int | None]:
    """A program's output and exit code, or none if it had to be ended."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            return process.communicate(timeout=TIMEOUT)[0], process.returncode
        except subprocess.TimeoutExpired:
            # The sanitizer and what it runs: that would keep the GPU busy.
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0], None


def sanitized(tool: str, *arguments: str) -> Report:
    """Run on_cuda.py with these arguments under one tool of the sanitizer."""
    command = [sanitizer(), "--tool", tool]
    for option, values in OPTIONS.items():
        fits = tool == "memcheck" or option not in ONLY_MEMCHECK
        if fits and option in known_options():
            command += [option, *values]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        command += ["--log-file", str(log), sys.executable, str(PROGRAM), *arguments]
        output, code = _run(command)
        text = log.read_text(errors="replace") if log.exists() else ""
    return Report(text, output, count_errors(text), code)


# -------------------------------------------------------------------------------- checks
@dataclasses.dataclass(frozen=True)
class Check:
    """One run under the sanitizer, what was expected of it, and what came."""

    tool: str
    name: str
    expected: str
    seen: str
    passed: bool
    report: Report

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return f"{verdict} {self.tool:<9} {self.name:<34} {self.expected}: {self.seen}"


def check_plant(name: str) -> Check:
    plant = PLANTS[name]
    report = sanitized(plant.tool, "--plant", name)
    places = lines_to_name(name)
    named = report.names(places)
    found = plant.message in report.text
    seen = f"{report.errors} errors, names {', '.join(sorted(named)) or 'none of them'}"
    expected = f"'{plant.message}' in {' or '.join(sorted(places))}"
    passed = found and bool(named) and report.errors != 0
    return Check(plant.tool, name, expected, seen, passed, report)


def check_clean(tool: str, what: str) -> Check:
    arguments = ["--clean-twins"] if what == "clean twins" else ["--clean-cases"]
    report = sanitized(tool, *arguments)
    ran = re.search(r"^ran (\d+) on the GPU", report.output, flags=re.MULTILINE)
    seen = f"{report.errors} errors in {ran[1] if ran else 'no'} kernels"
    passed = report.errors == 0 and report.exit_code == 0 and ran is not None
    return Check(tool, what, "0 errors", seen, passed, report)


def all_checks(workers: int = 4) -> list[Check]:
    """Every plant under its tool, all clean twins and clean cases under all tools."""
    runs = [functools.partial(check_plant, name) for name in PLANTS]
    for tool in TOOLS:
        for what in ("clean twins", "clean cases"):
            runs.append(functools.partial(check_clean, tool, what))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda run: run(), runs))
