"""`benchmarks/metal.py` on the emulator, with tiny weights."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import wrapped
from expecttest import assert_expected_inline

from affine_tensor.kernels import machine
from affine_tensor.kernels.metal.tuning import Chip

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/metal.py`, as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(
        "benchmark_metal", BENCHMARKS / "metal.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm, the peer, is not installed")
    markdown, figures = tmp_path / "metal.md", tmp_path / "metal.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tests/metal/emulate.py", BENCHMARKS / "metal.py"),
            *("--sizes", "tiny", "--markdown", markdown, "--json", figures),
        ],
        env={**os.environ, "AFFINE_TENSOR_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    text = markdown.read_text()
    assert text in done.stdout
    text = re.sub(r"torch \d.*", "torch ...", re.sub(r"mlx \d.*", "mlx ...", text))
    assert_expected_inline(
        wrapped(re.sub(r"\d+\.\d+", "0.0", text)),
        """\
EMULATED on a CPU: nothing here ran on a GPU, times mean nothing
Products with packed weights, 4 bits, group 64, bfloat16.
- ours: emulated, 10 cores, Limits(small=8, skinny=64, vectors=4,
  rows_per_expert=2, simdgroups=24); torch ...
- mlx ...
- the Hub kernel is not available here; the log says why

| weight | rows | our kernel, from here on | ours ms | ours GB/s | mlx ms |
  mlx GB/s | mlx / ours |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 64 x 256 | 1 | gemv | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |
|  | 2 | gemv_small | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |
|  | 9 | gemm 16 x 32, K in 2 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |
| 96 x 512 | 1 | gemv | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |
|  | 2 | gemv_small | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |
|  | 9 | gemm 16 x 32, K in 4 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |

| decoding, a small random Llama | tokens/s |
| --- | ---: |
| ours, transformers' generate | 0.0 |
| mlx-lm | 0.0 |""",
    )
    products = json.loads(figures.read_text())["products"]
    # 64 x 256 at 4 bits with two bfloat16 numbers to each 64.
    assert products[0]["bytes"] == 64 * 256 // 2 + 64 * 4 * 2 * 2
    assert all(s > 0 for one in products for s in one["seconds"].values())


def test_bandwidth_is_known_by_name_and_cores(benchmark: ModuleType) -> None:
    known = benchmark.bandwidth_of
    assert known(Chip("Apple M1", 13, 8)) == 68
    assert known(Chip("Apple M3 Max", 15, 40)) == 400
    assert known(Chip("Apple M3 Max", 15, 17)) is None  # no such chip
    assert known(Chip("emulated", 17, 10)) is None


def test_share_and_ratio(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {
        "weight": "1000 x 1000",
        "bytes": 1_000_000,
        "rows": 1,
        "kernel": "gemv",
        "seconds": {"ours": 1e-4, "mlx": 2e-4},
    }
    later = {**result, "rows": 2}
    monkeypatch.setattr(benchmark.tuning, "chip", lambda: Chip("Apple M4", 16, 10))
    # 10 GB/s of 120.
    assert benchmark.table([result, later], "mps").splitlines()[2:] == [
        "| 1000 x 1000 | 1 | gemv | 0.100 | 10.0 | 8% | 0.200 | 5.0 | 4% | 2.00 |",
        "|  | 2 |  | 0.100 | 10.0 | 8% | 0.200 | 5.0 | 4% | 2.00 |",
    ]


def test_a_wrong_product_is_not_timed(benchmark: ModuleType) -> None:
    weights = benchmark.Weights(
        benchmark.Size("", 64, 256), benchmark.Format(4, 64, torch.float16), "cpu", 0
    )
    multiply, _ = weights._ours()
    y = multiply(3)
    weights.check("ours", y, 3)
    with pytest.raises(AssertionError, match="ours: relative error"):
        weights.check("ours", y * 1.01, 3)


def test_copies_are_larger_than_caches(benchmark: ModuleType) -> None:
    size, format = benchmark.Size("", 64, 256), benchmark.Format(4, 64, torch.float16)
    assert benchmark.Weights(size, format, "cpu", 0).copies == 2
    assert benchmark.Weights(size, format, "cpu", 100_000).copies == 11
    weights = benchmark.Weights(size, format, "cpu", 0)
    there = weights._there()
    assert len({parts[0].data_ptr() for parts in there}) == 2


def test_picture(benchmark: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is missing")
    results = [
        {"weight": "w", "bytes": 10, "rows": m, "seconds": {"ours": 1.0, "mlx": 2.0}}
        for m in (1, 2)
    ]
    benchmark.draw(str(tmp_path / "a.png"), machine.EMULATED, results)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
