"""`benchmarks/cpu.py` with tiny weights."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from affine_tensor import layout

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("cpu", monkeypatch)


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


# ---- the command ------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="mlx, the peer, is not installed")
    markdown, figures = tmp_path / "cpu.md", tmp_path / "cpu.json"
    done = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "cpu.py", "--sizes", "tiny"),
            # float32, since without a compiler ours is the reference.
            *("--only", "products", "quantize", "--dtype", "float32", "--threads", "1"),
            *("--markdown", markdown, "--json", figures),
        ],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    found = json.loads(figures.read_text())
    assert found["machine"]["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith("python benchmarks/cpu.py --sizes tiny --only")
    weights = found["products"]["weights"]
    assert [one["bits"] for one in weights] == [*layout.BITS, *layout.BITS]
    for one in weights:
        rows = [1, 2, 9, 64] if one["bits"] == 4 else [1]
        assert list(map(int, one["roundings"])) == rows
        assert one["read"] > 0
        names = {result["name"] for result in one["results"]}
        assert names | set(one["missing"]) == {"ours", "int4pack", "dense", "mlx"}
        assert ("int4pack" in names) == (one["bits"] == 4 and one["n"] % 16 == 0)
        for result in one["results"]:
            assert result["seconds"] > 0
            assert result["error"] <= (1e-6 if result["name"] == "ours" else 1e-4)
    text = markdown.read_text()
    assert "expect N to be dividable by 16 (33 x 192, 4 bits" in text
    assert set(found["quantize"]["figures"]["seconds"]) >= {"affine_tensor"}


@pytest.mark.parametrize(
    ("n", "k", "bits", "group"), [(33, 352, 3, 32), (47, 384, 5, 128), (5, 96, 6, 32)]
)
def test_awkward_shapes(
    n: int, k: int, bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = module("cpu_products", monkeypatch)
    weight = products.Weight(n, k, bits, group, torch.float32)
    race = products.Race(weight, (1, 7, 24), "tiny")
    race.gather(0)
    assert {key for key in race.errors if key[0] == "ours"} == {
        ("ours", 1),
        ("ours", 7),
        ("ours", 24),
    }


def test_plan(benchmark: ModuleType) -> None:
    def plan(*arguments: str) -> list[tuple[str, tuple[int, ...]]]:
        options = benchmark._options(arguments)
        found = benchmark.cpu_products.plan(options)
        return [(str(weight), rows) for weight, rows in found]

    default = plan("--shape", "8", "64", "--rows", "2", "1")
    assert [rows for _, rows in default] == [(1,)] * 3 + [(1, 2)] + [(1,)] * 3
    assert plan(
        *("--shape", "8", "64", "--bits", "3", "--rows", "7"),
        *("--group-size", "32", "16", "--dtype", "float16"),
    ) == [
        ("8 x 64, 3 bits, group 32, float16", (7,)),
        ("8 x 64, 3 bits, group 16, float16", (7,)),
    ]
    assert len(plan()) == 2 * len(layout.BITS)


def test_arguments_are_refused_before_anything_is_timed(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda _: None)
    for arguments, message in (
        (["--json", "/nowhere/cpu.json"], "there is no such folder"),
        (["--png", "cpu.png"], "needs matplotlib"),
        (["--rows", "0"], "are positive"),
    ):
        with pytest.raises(SystemExit):
            benchmark._options(arguments)
        assert message in capsys.readouterr().err


def test_a_section_that_fails_is_named(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: argparse.Namespace) -> dict[str, Any]:
        raise RuntimeError("no disk")

    figures = {"title": "...", "seconds": {"affine_tensor": 1.0}}
    good = {"figures": figures, "notes": []}
    monkeypatch.setitem(benchmark.SECTIONS, "load", fail)
    monkeypatch.setitem(benchmark.SECTIONS, "quantize", lambda _: good)
    path = tmp_path / "cpu.json"
    with pytest.raises(SystemExit, match="load: RuntimeError: no disk"):
        benchmark.main(["--only", "load", "quantize", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["load"] == {"failed": "RuntimeError: no disk"}
    assert found["quantize"] == good


# ---- contestants ------------------------------------------------------------------


def test_a_wrong_product_is_not_timed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = module("cpu_contestants", monkeypatch)
    dense = peers.dense

    def wrong(*arguments: Any) -> Any:
        made = dense(*arguments)
        multiply = made.multiply
        made.multiply = lambda x, own: multiply(x, own) * (1 + 1e-5)
        return made

    monkeypatch.setitem(peers.MAKERS, "ours", wrong)
    options = ["--sizes", "tiny", "--bits", "4", "--dtype", "float32"]
    found = benchmark.cpu_products.measure(benchmark._options(options), say=str)
    for one in found["weights"]:
        assert "WRONG with 1 rows: relative error 1.0e-05" in one["missing"]["ours"]
        assert "ours" not in {result["name"] for result in one["results"]}
    assert len(benchmark.problems({"products": found})) == 2


def test_ours_may_differ_by_one_rounding_and_a_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = module("cpu_contestants", monkeypatch).allowed
    assert allowed("ours", torch.float16, 1e-4) == pytest.approx(1.5e-4)
    assert allowed("ours", torch.float32, 1e-8) == 1e-6


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES)
def test_peers_have_the_same_matrix(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = module("cpu_contestants", monkeypatch)
    weight = peers.Weight(64, 512, 4, 64, dtype)
    parts, x = weight.parts(), weight.x(5)
    exact = peers.exact_product(weight, parts, x)
    values = layout.dequantize(*parts, **weight.form, dtype=torch.float64)
    assert torch.equal(exact, x.double() @ values.mT)
    rounding = peers.one_rounding(exact, dtype)
    errors = {}
    for name in ("int4pack", "dense"):
        made = peers.MAKERS[name](weight, parts, 0)
        y = made.give(made.multiply(made.take(x), made.copies[1]))
        errors[name] = peers.difference(y, exact)
    assert errors["int4pack"] < (1e-6 if dtype == torch.float32 else 1.1 * rounding)
    if dtype == torch.bfloat16:
        # The weights do not fit the dtype: to round them is seen.
        assert errors["dense"] > 1.2 * rounding


def test_copies_are_larger_than_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = module("cpu_contestants", monkeypatch)
    weight = peers.Weight(64, 256, 4, 64, torch.float16)
    parts = weight.parts()
    size = 64 * 256 // 2 + 64 * 4 * 2 * 2
    for total, count in ((0, 2), (10 * size, 10), (10 * size + 1, 11)):
        copies = peers.copies_of(parts, total)
        assert len({own[0].data_ptr() for own in copies}) == count
        made = peers.ours(weight, parts, total)
        assert len(made.copies) == count


def test_a_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = module("cpu_contestants", monkeypatch)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    weight = peers.Weight(48, 256, 8, 64, torch.bfloat16)
    found = dict(peers.made(weight, weight.parts(), 0))
    assert found["mlx"] == "not installed"
    assert found["int4pack"] == "it has 4 bits only"
    assert not isinstance(found["ours"], str)


def test_ratios_are_those_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    products = module("cpu_products", monkeypatch)
    # The machine is three times slower in the last two rounds.
    ours, theirs = [1.0, 3.0, 3.0], [2.0, 6.0, 6.0]
    seconds = {("ours", 4): ours, ("mlx", 4): theirs, ("mlx", 1): ours}
    assert products._ratios(seconds, ("mlx", 4)) == {"of_ours": 2, "of_one_row": 2}
    assert products._ratios(seconds, ("ours", 4)) == {"of_ours": 1}


def test_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    bandwidth = module("bandwidth", monkeypatch)
    total = (1 << 20) + 4096
    if any(map(shutil.which, ("cc", "gcc", "clang"))):
        reader = bandwidth.best_reader(total, 2, rounds=1)
        assert reader.how.startswith("C, 2 threads")
        # Each thread may leave out less than a line for each of its streams.
        assert total - 2 * 9 * 64 < reader.bytes <= total
    monkeypatch.setattr(bandwidth.shutil, "which", lambda _: None)
    reader = bandwidth.best_reader(total, 2, rounds=1)
    assert reader.how == "torch's sum of int64, as there is no C compiler"
    assert (reader.bytes, 8 * int(reader.read())) == (total, total)
