"""The tables and the picture of `benchmarks/cpu.py`, and what the README says."""

from __future__ import annotations

import importlib
import json
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import wrapped
from expecttest import assert_expected_inline

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


def product(name: str, rows: int, seconds: float, **more: float) -> dict[str, Any]:
    return {"name": name, "rows": rows, "seconds": seconds, "error": 2e-3, **more}


def speed(median: float, ratio: float) -> dict[str, Any]:
    return {
        "median": median,
        "least": median,
        "most": median,
        "values": [median],
        "once": False,
        "ours_over_it": ratio,
    }


WEIGHT = {"n": 1000, "k": 500, "group_size": 64, "dtype": "bfloat16", "read": 4e10}
SINGLE = {**WEIGHT, "bytes": 1_000_000, "roundings": {"1": 1e-3}, "missing": {}}
FIGURES: dict[str, Any] = {
    "command": "python benchmarks/cpu.py --json cpu.json",
    "date": "2026-01-02",
    "machine": {
        "cpu": "Some CPU",
        "cores": 2,
        "threads": 2,
        "flags": ["avx2", "fma"],
        "cache_bytes": 32 << 20,
        "memory_bytes": 8 << 30,
        "system": "Linux 6",
        "python": "3.11",
    },
    "versions": {"torch": "2.13", "mlx": "0.32", "llama-cpp-python": "not installed"},
    "products": {
        "ours": "kernels",
        "reader": "C",
        "copies_bytes": 256 << 20,
        "rounds": 15,
        "limits": {"mlx": 0.5},
        "weights": [
            {
                **SINGLE,
                "bits": 2,
                "results": [product("ours", 1, 1e-4, of_ours=1.0, share=0.25)],
                "missing": {"int4pack": "it has 4 bits only", "mlx": "not installed"},
            },
            {
                **SINGLE,
                "bits": 4,
                "bytes": 2_000_000,
                "roundings": {"1": 1e-3, "64": 2e-3},
                "results": [
                    product("ours", 1, 1e-4, of_ours=1.0, of_one_row=1.0, share=0.5),
                    product("ours", 64, 1e-3, of_ours=1.0, of_one_row=10.0, share=0.1),
                    product("dense", 1, 3e-4, of_ours=3.0, of_one_row=1.0),
                    product("dense", 64, 8e-4, of_ours=0.8, of_one_row=2.7),
                ],
                "missing": {"int4pack": "it wants N / 16", "mlx": "not installed"},
            },
            {**WEIGHT, "bits": 3, "group_size": 128, "impossible": "500 columns ..."},
        ],
    },
    "models": {
        "model": "a Llama",
        "settings": {"new": 64, "prompt": 128},
        "reference": "ours",
        "results": [
            {
                "name": "ours",
                "label": "ours",
                "versions": {"torch": "2.13"},
                "decode": speed(50.0, 1.0),
                "prefill 128": speed(300.0, 1.0),
            },
            {
                "name": "llama-q4_0",
                "label": "llama.cpp Q4_0",
                "versions": {"llama_cpp_python": "0.4"},
                "decode": speed(40.0, 1.25),
                "prefill 128": speed(200.0, 1.5),
            },
        ],
        "missing": {"torchao": "No module named 'torchao'"},
    },
    "load": {
        "figures": {
            "loading llama": {
                "file_bytes": 2_000_000_000,
                "results": {
                    "from_pretrained": {"peak": 2.2e9, "after": 2e9, "seconds": 1.5},
                    "mlx-lm": {"peak": 2e9, "after": 2e9, "seconds": 1.0},
                },
            }
        },
        "notes": ["mlx-lm: no memory: left out"],
    },
    "quantize": {
        "figures": {
            "title": "quantize 8 x 64",
            "seconds": {"affine_tensor": 0.01, "mlx (cpu)": 0.02},
        },
        "notes": [],
    },
    "overhead": {
        "figures": {
            mode: {
                "plain nn.Linear": 9e-6,
                "operator on buffers": 13e-6,
                "nn.Linear, packed": 8e-6,
            }
            for mode in ("no_grad", "inference_mode")
        },
        "notes": [],
    },
}


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    report = module("cpu_report", monkeypatch)
    figures = deepcopy(FIGURES)
    figures["models"] = {"failed": "RuntimeError: no memory"}
    assert_expected_inline(
        wrapped(report.report(figures)).replace("µ", "u"),
        """\
# On a CPU

Some CPU, 2 cores, 2 threads, 32 MiB of cache (avx2 fma), Linux 6; torch
  2.13, mlx 0.32; not installed: llama-cpp-python. 2026-01-02: `python
  benchmarks/cpu.py --json cpu.json`

## Products

Milliseconds, medians of 15 rounds in turn; ratios are medians of each
  round's own.
- ours: `torch.ops.affine_tensor.linear` on the MLX words
- int4pack: torch's `_weight_int4pack_mm_for_cpu` on its repacked words
- dense: `F.linear` with the weight made dense in the same dtype
- mlx: `mx.quantized_matmul` on the CPU
- ours here: kernels
- weights from memory: copies in turn, 256 MiB together for each; read
  bandwidth in the same rounds: C

One row: group 64, bfloat16

| N x K | bits | MB | ours ms | GB/s | read GB/s | share | dense ms | / ours
  |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 1000 x 500 | 2 | 1 | 0.100 | 10.0 | 40.0 | 25% |  |  |
| 1000 x 500 | 4 | 2 | 0.100 | 20.0 | 40.0 | 50% | 0.300 | 3.00 |

4 bits, group 64, bfloat16

| N x K | rows | ours ms | / one row | of dense's rate | dense ms | / ours |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| 1000 x 500 | 1 | 0.100 | 1.00 |  | 0.300 | 3.00 |
| 1000 x 500 | 64 | 1.000 | 10.00 | 80% | 0.800 | 0.80 |

Relative L2 error, in roundings

| N x K | format | rows | one rounding | ours | dense |
| --- | ---: | ---: | ---: | ---: | ---: |
| 1000 x 500 | 2 bits, group 64, bfloat16 | 1 | 1.0e-03 | 2.00 |  |
| 1000 x 500 | 4 bits, group 64, bfloat16 | 1 | 1.0e-03 | 2.00 | 2.00 |
| 1000 x 500 | 4 bits, group 64, bfloat16 | 64 | 2.0e-03 | 1.00 | 1.00 |

Not timed:
- int4pack: it has 4 bits only (1000 x 500, 2 bits, group 64, bfloat16)
- mlx: not installed (1000 x 500, 2 bits, group 64, bfloat16; 1000 x 500, 4
  bits, group 64, bfloat16)
- int4pack: it wants N / 16 (1000 x 500, 4 bits, group 64, bfloat16)
- all: 500 columns ... (1000 x 500, 3 bits, group 128, bfloat16)

## Whole models

Failed: RuntimeError: no memory

## Loading and converting

| loading llama, 2.00 GB | peak GB | peak / file | after / file | s |
| --- | ---: | ---: | ---: | ---: |
| from_pretrained | 2.20 | 1.10 | 1.00 | 1.50 |
| mlx-lm | 2.00 | 1.00 | 1.00 | 1.00 |

- mlx-lm: no memory: left out

## Quantizing

| quantize 8 x 64 | ms | / ours |
| --- | ---: | ---: |
| affine_tensor | 10.0 | 1.00 |
| mlx (cpu) | 20.0 | 2.00 |

## Overhead of a call

| us per call, empty kernel | plain nn.Linear | operator on buffers |
  nn.Linear, packed | added |
| --- | ---: | ---: | ---: | ---: |
| no_grad | 9.00 | 13.00 | 8.00 | -5.00 |
| inference_mode | 9.00 | 13.00 | 8.00 | -5.00 |""",
    )


def test_text_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = module("readme", monkeypatch)
    assert_expected_inline(
        wrapped(readme.text_of(FIGURES)).replace("µ", "u"),
        """\
| 4 bits, group 64, bfloat16: rows of x | 1000 x 500, ms | dense / ours |
| --- | ---: | ---: |
| 1 | 0.1 | 3.00 |
| 64 | 1 | 0.80 |

| One row, group 64, bfloat16: bits | 1000 x 500, ms | of the read bandwidth
  | dense / ours |
| --- | ---: | ---: | ---: |
| 2 | 0.1 | 25% |  |
| 4 | 0.1 | 50% | 3.00 |

int4pack: torch's `_weight_int4pack_mm_for_cpu` on its repacked words;
  dense: `F.linear` with the dense weight; more than 1 is where ours is
  faster. Weights come from memory, which was read at 40.0 to 40.0 GB/s
  meanwhile. Our largest relative L2 error against float64 is 2.00 times
  that of rounding the exact result once. Not timed: int4pack (it has 4 bits
  only). Not timed: int4pack (it wants N / 16). Not timed: mlx (not
  installed).

| a Llama: tokens/s | decode | ours / it | prefill 128 | ours / it |
| --- | ---: | ---: | ---: | ---: |
| ours | 50 | 1.00 | 300 | 1.00 |
| llama.cpp Q4_0 | 40 | 1.25 | 200 | 1.50 |

Decoding: 64 tokens after a prompt of 128. ours / it: "ours" over it. Not
  measured: torchao (No module named 'torchao').

|  | ours | peers | script |
| --- | ---: | ---: | ---: |
| quantize 8 x 64 (the same bits as MLX) | 10 ms | mlx (cpu) 20 ms |
  `benchmarks/quantize.py` |
| call of an `nn.Linear` with a packed weight, above calling the operator on
  plain buffers, the kernel being empty | -5.0 us | (that call: 13 us; a
  plain `nn.Linear`, with its product: 9 us) | `benchmarks/overhead.py` |
| loading llama, 2.00 GB: peak memory | 1.10 x the file | mlx-lm 1.00 x the
  file | `benchmarks/load.py` |
| loading llama: time | 1.50 s | mlx-lm 1.00 s | `benchmarks/load.py` |

Some CPU, 2 cores, 2 threads, 32 MiB of cache (avx2 fma), Linux 6; torch
  2.13, mlx 0.32, llama-cpp-python 0.4. 2026-01-02: `python
  benchmarks/cpu.py --json cpu.json`""",
    )


def test_sections_that_are_not_there_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readme = module("readme", monkeypatch)
    report = module("cpu_report", monkeypatch)
    common = {key: FIGURES[key] for key in ("command", "date", "machine", "versions")}
    assert readme.text_of(common) == report.head(common)
    failed = {**common, "products": {"failed": "x"}, "load": {"failed": "x"}}
    assert readme.text_of(failed) == report.head(common)


def test_readme_is_compared_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    readme = module("readme", monkeypatch)
    figures, page = tmp_path / "cpu.json", tmp_path / "README.md"
    figures.write_text(json.dumps(FIGURES))
    arguments = ["--json", str(figures), "--readme", str(page)]
    begin, end = readme.MARKERS
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    with pytest.raises(SystemExit, match=r"(?s)-old.*use --write"):
        readme.main(arguments)
    assert "old" in page.read_text()
    readme.main([*arguments, "--write"])
    readme.main(arguments)
    text = readme.text_of(FIGURES)
    assert page.read_text() == f"above\n{begin}\n{text}\n{end}\nbelow\n"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="0 times; put them where"):
        readme.main(arguments)


def test_readme_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (BENCHMARKS / "results" / "cpu.json").exists():
        pytest.skip("benchmarks/results/cpu.json, the full run, is not there yet")
    module("readme", monkeypatch).main([])


@pytest.mark.parametrize("left_out", [(), ("products",), ("models",)])
def test_picture(
    left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is missing")
    figures = {k: v for k, v in FIGURES.items() if k not in left_out}
    path = tmp_path / "cpu.png"
    module("cpu_picture", monkeypatch).draw(str(path), figures)
    assert path.read_bytes().startswith(b"\x89PNG")
