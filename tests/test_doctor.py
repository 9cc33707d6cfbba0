"""The doctor on emulated Metal: what it prints, and that it finds what is broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from affine_tensor import doctor, ops
from affine_tensor.doctor import cases, operators
from affine_tensor.kernels import KernelError, machine, settings
from affine_tensor.kernels.cpu import compiler as cpu_compiler
from affine_tensor.kernels.cuda import compiler
from affine_tensor.kernels.cuda import library as cuda_library
from affine_tensor.kernels.metal import library as metal_library
from affine_tensor.kernels.metal import tune, tuning
from affine_tensor.tensor import OPS

ROOT = Path(__file__).resolve().parent.parent


def emulate(*arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code and output of a program on the emulator."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/metal/emulate.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def shape(text: str) -> str:
    """A text with its numbers replaced, so that it can be pinned."""
    text = re.sub(r"torch .*|Linux, not macOS|macOS .*", "...", text)
    text = re.sub(r"\d+\.\d+", "0.0", text)
    return "\n".join(line.rstrip() for line in text.splitlines())


@pytest.fixture
def metal(emulated_metal: Any) -> Any:
    return emulated_metal


# ---- what it prints -------------------------------------------------------------


def test_quick_check(tmp_path: Path) -> None:
    # No limits that somebody has kept for the emulator.
    cache = str(tmp_path)
    code, text = emulate("affine_tensor.doctor", "--quick", AFFINE_TENSOR_CACHE=cache)
    assert_expected_inline(
        shape(text),
        """\
EMULATED on a CPU: nothing here ran on a GPU, times mean nothing
device    mps (emulated, 10 cores)
versions  affine_tensor 0.0.0, ...
system    ...
limits    small 8, skinny 64, vectors 4, rows_per_expert 2, simdgroups 24
          built in for generation 17, not timed here
settings  default

operator                                kernels  cases  error / bound
linear, 1 row                              gemv      2           0.0  ok
linear, 2 to 8 rows                  gemv_small      2           0.0  ok
linear, 9 to 48 rows                       gemm      2           0.0  ok
linear, more rows                          gemm      2           0.0  ok
matmul, 1 to 4 rows                      gemv_n      2           0.0  ok
matmul, more rows                        gemm_n      2           0.0  ok
grouped_linear, sorted, few rows           gemv      2           0.0  ok
grouped_linear, sorted, many rows          gemm      2           0.0  ok
grouped_linear, unsorted, few rows         gemv      2           0.0  ok
grouped_linear, unsorted, many rows        gemm      2           0.0  ok
grouped_matmul, sorted, few rows         gemv_n      2           0.0  ok
grouped_matmul, sorted, many rows        gemm_n      2           0.0  ok
grouped_matmul, unsorted, few rows       gemv_n      2           0.0  ok
grouped_matmul, unsorted, many rows      gemm_n      2           0.0  ok
embedding, int32                      embedding      2           0.0  ok
embedding, int64                      embedding      2           0.0  ok
dequantize                           dequantize      2           0.0  ok
quantize                               quantize      2           0.0  ok

gradient to the input          ok
training an adapter (LoRA)     ok
torch.compile(fullgraph=True)  ok (backend eager)
views of inputs and weights    ok (6 of x, 4 of the weight)
generation, transformers       ok (12 tokens)

All is well.""",
    )
    assert code == 0


def test_everything_is_in_the_full_check() -> None:
    names = [name for name, _ in operators._kinds()]
    assert len(set(names)) == len(names)
    formats = operators.formats()
    assert len(set(formats)) == 7 * 5 * 3
    sample = operators.sample(2 * len(names))
    for field in ("bits", "group_size", "dtype"):
        used = {getattr(one, field) for one in sample}
        assert used == {getattr(one, field) for one in formats}


def test_without_kernels_the_reference_is_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main(["--quick", "--device", "cpu", "--only", "linear"]) == 0
    text = capsys.readouterr().out
    assert "kernels   none of our own for cpu: what is checked is the reference" in text
    assert machine.EMULATED not in text
    assert re.search(r"linear, 1 row +reference +2 +0\.\d\d  ok", text)


def test_kernels_of_the_cpu_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    if not ops.has_kernels("cpu"):
        pytest.skip("there is no C++ compiler here, or no vectors")
    assert doctor.main(["--quick", "--device", "cpu", "--only", "1 row"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"kernels   (AVX-512|AVX2|NEON)[^,]*, compiled by ", text)
    assert re.search(r"linear, 1 row +linear +2 +0\.\d\d  ok", text)
    assert "reference" not in text.split("operator", 1)[1]


def test_without_a_compiler_the_reference_is_checked_and_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AFFINE_TENSOR_CXX", "/no-such-compiler")
    cpu_compiler._first.cache_clear()
    try:
        assert doctor.main(["--quick", "--device", "cpu", "--only", "linear"]) == 0
        assert settings.cpu_backend == "own"  # as before
    finally:
        monkeypatch.undo()
        cpu_compiler._first.cache_clear()
    text = capsys.readouterr().out
    none = "none of our own for cpu: what is checked is the reference (there is no C++"
    assert f"kernels   {none}" in text
    assert "or name it in AFFINE_TENSOR_CXX)" in text
    rows = re.findall(r"^(?:grouped_)?linear,.*", text, re.MULTILINE)
    assert len(rows) == 8
    for row in rows:
        assert re.search(r" reference +2 +0\.\d\d  ok$", row)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--device", "mps"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("affine-tensor: there is no mps device here; torch has ")


def test_no_such_check(metal: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--quick", "--only", "nonsense"]) == 1
    err = capsys.readouterr().err
    assert err == (
        "affine-tensor: no check has 'nonsense' in its name. Leave out --only\n"
    )


@pytest.mark.parametrize("options", [["--store"], ["--sizes", "small"]])
def test_options_of_tuning_alone(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(options)
    assert caught.value.code == 2
    assert "--sizes and --store go with --tune" in capsys.readouterr().err


# ---- what it finds --------------------------------------------------------------


def break_source(
    monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str
) -> None:
    """Have a kernel compiled from another text."""
    text = metal_library._text

    def broken(name: str) -> str:
        found = text(name)
        if name == file:
            assert old in found
            return found.replace(old, new)
        return found

    monkeypatch.setattr(metal_library, "_text", broken)


def test_a_broken_kernel_is_named(
    metal: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_source(monkeypatch, "embedding.metal", "ids[position.y]", "ids[0]")
    assert doctor.main(["--quick", "--only", "embedding, int64"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"embedding, int64 +none +2 +0.00 +2 WRONG", text)
    assert "KernelError: the Metal kernel embedding (" in text


def test_a_kernel_that_only_fails_beyond_its_own_check(
    metal: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_source(monkeypatch, "embedding.metal", "ids[position.y]", "ids[0]")
    compiled = metal_library._checked
    monkeypatch.setattr(
        metal_library, "_checked", lambda variant, _: compiled(variant, lambda *_: None)
    )
    assert doctor.main(["--quick", "--only", "embedding, int64"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"embedding, int64 +embedding +2 +\S+ +2 WRONG", text)
    assert re.search(r"embedding of \[3, 5\], .*: \d+ of \d+ elements are wrong", text)


def test_a_source_that_does_not_compile(
    metal: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_source(monkeypatch, "quantize.metal", "kernel void", "kernel nonsense")
    assert doctor.main(["--quick", "--only", "quantize"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^quantize +none +2 +0.00 +2 WRONG$", text, re.MULTILINE)
    assert re.search(r"^dequantize +dequantize +2 .* ok$", text, re.MULTILINE)
    assert "SyntaxError" in text


def test_the_reference_in_place_of_a_kernel_is_not_well(
    metal: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(ops._kernels["embedding"], "mps")
    assert doctor.main(["--quick", "--only", "embedding, int32"]) == 1
    text = capsys.readouterr().out
    assert "of 2 calls of operators only 0 launched a kernel; the reference" in text


def test_the_reference_in_use_is_not_well(
    metal: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(ops._kernels["matmul"], "mps")
    assert doctor.main(["--quick", "--only", "gradient"]) == 1
    assert "gradient to the input          FAILED (of " in capsys.readouterr().out


def test_a_slow_path_in_use_is_not_well(
    metal: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(OPS, torch.ops.aten.slice.Tensor)
    assert doctor.main(["--quick", "--only", "views"]) == 1
    assert "dequantizes a packed weight" in capsys.readouterr().out


def test_the_bound() -> None:
    exact = torch.tensor([1.0, 100.0], dtype=torch.float64)
    sizes = torch.tensor([4.0, 400.0], dtype=torch.float64)
    bound = cases.error_bound(torch.float16, exact, sizes)
    assert bound.tolist() == [
        2.0**-11 + 128 * 2.0**-24,
        100 * 2.0**-11 + 12800 * 2.0**-24,
    ]
    good = exact + 0.99 * bound
    worst, wrong = cases.compare(good, exact, bound)
    assert (worst, wrong) == (pytest.approx(0.99), "")
    for bad in (exact + 1.01 * bound, exact * float("nan"), exact.expand(2, 2)):
        assert cases.compare(bad, exact, bound)[1]


# ---- tuning ---------------------------------------------------------------------


def test_tune_prints_and_keeps_nothing_on_the_emulator(tmp_path: Path) -> None:
    arguments = ("affine_tensor.doctor", "--tune", "--sizes", "small")
    code, text = emulate(*arguments, AFFINE_TENSOR_CACHE=str(tmp_path))
    assert code == 0
    head, _, rest = text.partition("limit ")
    assert head.startswith(f"{machine.EMULATED}\ndevice    mps (emulated, 10 cores)\n")
    body = re.sub(r" +", " ", shape(f"limit {rest}"))
    body = re.sub(r"(?<= )\d+$", "N", body, flags=re.MULTILINE)
    assert_expected_inline(
        body,
        """\
limit product rows microseconds by value of the limit
small 64 x 512 float16 2 1: 0.0, 8: 0.0
small 64 x 512 float16 8 1: 0.0, 8: 0.0
skinny 64 x 512 float16 64 8: 0.0, 64: 0.0
vectors 64 x 512 float16 4 1: 0.0, 4: 0.0
rows_per_expert 4 x 32 x 128 float16 4 1: 0.0, 64: 0.0
rows_per_expert 4 x 32 x 128 float16 16 1: 0.0, 64: 0.0

limit built in before found
small 8 8 N
skinny 64 64 N
vectors 4 4 N
rows_per_expert 2 2 N
simdgroups 24 24 N

Not kept: not timed on a GPU with weights of real size (--store)""",
    )
    assert list(tmp_path.iterdir()) == []


def test_tune_keeps_limits_when_asked(
    metal: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AFFINE_TENSOR_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning.limits, "cache_clear", lambda: None, raising=False)
    found = tune.Tuned(tuning.Limits(small=5, simdgroups=48))
    monkeypatch.setattr(tune, "tune", lambda plan: found)
    assert doctor.main(["--tune", "--sizes", "small"]) == 0
    assert not tuning.tuned_file().exists()
    assert "Not kept" in capsys.readouterr().out
    assert doctor.main(["--tune", "--sizes", "small", "--store"]) == 0
    tuning.tuned_file().unlink()
    monkeypatch.setattr(machine, "emulated", lambda: False)
    monkeypatch.setattr(machine, "is_available", lambda kind: True)
    assert doctor.main(["--device", "mps", "--tune"]) == 0
    assert "Kept for emulated in" in capsys.readouterr().out
    stored = json.loads(tuning.tuned_file().read_text())
    assert stored["emulated"]["small"] == 5
    assert "timed on this machine" in doctor.describe("mps")


def test_there_is_nothing_to_tune_without_metal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main(["--tune", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing to tune on cpu" in err


def test_a_limit_lies_where_times_cross() -> None:
    timed = [(rows, 1.0 + rows, 6.5) for rows in range(2, 9)]
    costs = tune.costs_of_thresholds(timed, 1)
    assert set(costs) == set(range(1, 9))
    assert tune.pick(costs, default=8) == 5
    # Hardly worse: stays.
    costs = tune.costs_of_thresholds([(2, 1.0, 1.01), (3, 1.01, 1.0)], 1)
    assert [tune.pick(costs, default) for default in (1, 2, 3)] == [1, 2, 3]
    assert tune.pick({1: 0.0, 2: -1.0}, default=7) == 2


def test_each_candidate_is_timed_with_its_own_kernel(metal: Any) -> None:
    found = tune.tune(tune.PLANS["small"])
    limits = {timing.limit for timing in found.timings}
    assert limits == {"small", "skinny", "vectors", "rows_per_expert"}
    for timing in found.timings:
        assert all(seconds > 0 for seconds in timing.seconds.values())
    # What was compiled for them, and nothing fell back to the reference.
    compiled = metal_library.compiled()
    assert all(compiled.values())
    families = {variant.family for variant in compiled}
    assert {"gemv_small", "gemm", "gemv_n", "gemm_n", "gemv"} <= families
    assert tuning.limits() == tuning.Limits()  # as before


def test_it_says_what_compiles_for_an_nvidia_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_library, "capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda device: 132)
    found: Any = compiler.Nvrtc("/lib/libnvrtc.so.13", None, (13, 0), (80, 90))  # type: ignore[arg-type]
    monkeypatch.setattr(compiler, "find", lambda: found)
    assert doctor._describe_cuda() == [
        ("kernels", "for sm_90a, by NVRTC 13.0 (/lib/libnvrtc.so.13)"),
        ("GPU", "sm_90, 132 multiprocessors"),
    ]

    def none() -> Any:
        raise KernelError("there is no NVRTC that works here")

    monkeypatch.setattr(compiler, "find", none)
    monkeypatch.setattr(settings, "cuda_backend", "reference")
    assert doctor._describe_cuda() == [
        ("kernels", "none of our own: there is no NVRTC that works here"),
        ("GPU", "sm_90, 132 multiprocessors"),
        ("settings", "backend reference"),
    ]
