"""Which kernel runs for which product, when it is compiled, and what if it cannot be."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import metal_emulator as emulator
import pytest
import torch
from conftest import wrapped
from emulated import EmulatedMetal
from expecttest import assert_expected_inline
from metal_emulator import lint
from product_cases import tile_shapes
from products import Case, Inputs, complaint, launch, make, same_bits
from torch import Tensor

from affine_tensor import ops
from affine_tensor.kernels import metal, settings
from affine_tensor.kernels.metal import library as metal_library

SIZES = ("VECTORS", "M_TILES", "N_TILES", "SPLIT", "GROUPS", "SIMDGROUPS", "GATHERED")


def launched(case: Case) -> str:
    """What a product launches: kernel, threads by threadgroup, tile sizes."""
    metal_library.reset()
    inputs = make(case)
    with emulator.run() as run:
        y = inputs()
    made = run.launches[-1]
    assert complaint(inputs, y, made.kernel) is None
    (variant,) = metal_library.compiled()
    sizes = [f"{k} {v}" for k, v in variant.defines if k in SIZES and v]
    total, group = ("x".join(map(str, t)) for t in (made.threads, made.group_size))
    return f"{made.kernel} {total} by {group}: {', '.join(sizes)}"


def log(cases: list[Case]) -> str:
    lines = []
    for case in cases:
        experts = f" E{case.experts} {case.rows}" if case.experts else ""
        at = f"{case.op} M{case.m} N{case.n} K{case.k}{experts}"
        lines.append(f"{at}: {launched(case)}")
    return wrapped("\n".join(lines))


def test_kernels_by_size(emulated_metal: EmulatedMetal) -> None:
    emulated_metal.forget()
    cases = [Case(m=m, n=100, k=256) for m in (1, 2, 8, 9, 33, 48, 49, 64, 65, 130)]
    cases += [Case(m=1, n=7, k=k) for k in (1024, 2048, 4096, 8192)]
    cases += [Case(m=1, n=1000, k=2048), Case(m=16, n=9, k=1024)]
    cases += [Case(op="matmul", m=m, n=33, k=192) for m in (1, 4, 5, 16, 17, 33)]
    assert_expected_inline(
        log(cases),
        """\
linear M1 N100 K256: gemv 32x26x1 by 32x2x1: SPLIT 1, GROUPS 2
linear M2 N100 K256: gemv_small 32x26x1 by 32x2x1: VECTORS 2, SPLIT 1,
  GROUPS 2
linear M8 N100 K256: gemv_small 32x26x1 by 32x2x1: VECTORS 8, SPLIT 1,
  GROUPS 2
linear M9 N100 K256: gemm 896x1x1 by 128x1x1: M_TILES 2, N_TILES 1, SPLIT 2
linear M33 N100 K256: gemm 896x1x1 by 128x1x1: M_TILES 5, N_TILES 1, SPLIT 2
linear M48 N100 K256: gemm 896x1x1 by 128x1x1: M_TILES 6, N_TILES 1, SPLIT 2
linear M49 N100 K256: gemm 896x1x1 by 128x1x1: M_TILES 7, N_TILES 1, SPLIT 2
linear M64 N100 K256: gemm 896x1x1 by 128x1x1: M_TILES 8, N_TILES 1, SPLIT 2
linear M65 N100 K256: gemm 896x2x1 by 128x1x1: M_TILES 5, N_TILES 1, SPLIT 2
linear M130 N100 K256: gemm 896x3x1 by 128x1x1: M_TILES 6, N_TILES 1, SPLIT
  2
linear M1 N7 K1024: gemv 32x2x1 by 32x2x1: SPLIT 1, GROUPS 2
linear M1 N7 K2048: gemv 32x4x1 by 32x2x1: SPLIT 2, GROUPS 1
linear M1 N7 K4096: gemv 32x8x1 by 32x4x1: SPLIT 4, GROUPS 1
linear M1 N7 K8192: gemv 32x16x1 by 32x8x1: SPLIT 8, GROUPS 1
linear M1 N1000 K2048: gemv 32x250x1 by 32x2x1: SPLIT 1, GROUPS 2
linear M16 N9 K1024: gemm 256x1x1 by 128x1x1: M_TILES 2, N_TILES 1, SPLIT 4
matmul M1 N33 K192: gemv_n 32x16x1 by 32x8x1: VECTORS 1, SIMDGROUPS 8
matmul M4 N33 K192: gemv_n 32x16x1 by 32x8x1: VECTORS 4, SIMDGROUPS 8
matmul M5 N33 K192: gemm_n 384x1x1 by 128x1x1: M_TILES 1, SPLIT 4
matmul M16 N33 K192: gemm_n 384x1x1 by 128x1x1: M_TILES 2, SPLIT 4
matmul M17 N33 K192: gemm_n 128x1x1 by 128x1x1: M_TILES 4, SPLIT 1
matmul M33 N33 K192: gemm_n 128x2x1 by 128x1x1: M_TILES 4, SPLIT 1""",
    )


def test_kernels_of_experts(emulated_metal: EmulatedMetal) -> None:
    emulated_metal.forget()
    cases = [
        Case(op=op, m=m, n=33, k=128, experts=4, rows=rows)
        for op in ("grouped_linear", "grouped_matmul")
        for rows in ("ends int32", "indices int64")
        for m in (1, 7, 8, 80)
    ]
    assert_expected_inline(
        log(cases),
        """\
grouped_linear M1 N33 K128 E4 ends int32: gemv 32x10x1 by 32x2x1: SPLIT 1,
  GROUPS 2
grouped_linear M7 N33 K128 E4 ends int32: gemv 32x10x7 by 32x2x1: SPLIT 1,
  GROUPS 2
grouped_linear M8 N33 K128 E4 ends int32: gemm 256x5x1 by 128x1x1: M_TILES
  1, N_TILES 1, SPLIT 1
grouped_linear M80 N33 K128 E4 ends int32: gemm 256x8x1 by 128x1x1: M_TILES
  3, N_TILES 1, SPLIT 1
grouped_linear M1 N33 K128 E4 indices int64: gemv 32x10x1 by 32x2x1: SPLIT
  1, GROUPS 2
grouped_linear M7 N33 K128 E4 indices int64: gemv 32x10x7 by 32x2x1: SPLIT
  1, GROUPS 2
grouped_linear M8 N33 K128 E4 indices int64: gemm 256x5x1 by 128x1x1:
  GATHERED 1, M_TILES 1, N_TILES 1, SPLIT 1
grouped_linear M80 N33 K128 E4 indices int64: gemm 256x8x1 by 128x1x1:
  GATHERED 1, M_TILES 3, N_TILES 1, SPLIT 1
grouped_matmul M1 N33 K128 E4 ends int32: gemv_n 32x8x1 by 32x8x1: VECTORS
  1, SIMDGROUPS 8
grouped_matmul M7 N33 K128 E4 ends int32: gemv_n 32x8x7 by 32x8x1: VECTORS
  1, SIMDGROUPS 8
grouped_matmul M8 N33 K128 E4 ends int32: gemm_n 256x5x1 by 128x1x1: M_TILES
  1, SPLIT 4
grouped_matmul M80 N33 K128 E4 ends int32: gemm_n 128x7x1 by 128x1x1:
  M_TILES 4, SPLIT 1
grouped_matmul M1 N33 K128 E4 indices int64: gemv_n 32x8x1 by 32x8x1:
  VECTORS 1, SIMDGROUPS 8
grouped_matmul M7 N33 K128 E4 indices int64: gemv_n 32x8x7 by 32x8x1:
  VECTORS 1, SIMDGROUPS 8
grouped_matmul M8 N33 K128 E4 indices int64: gemm_n 256x5x1 by 128x1x1:
  GATHERED 1, M_TILES 1, SPLIT 4
grouped_matmul M80 N33 K128 E4 indices int64: gemm_n 128x7x1 by 128x1x1:
  GATHERED 1, M_TILES 4, SPLIT 1""",
    )


def test_limits_move_the_kernels(emulated_metal: EmulatedMetal) -> None:
    emulated_metal.forget()
    found = []
    for limits, case in (
        ({}, Case(m=5, k=256)),
        ({"small": 4}, Case(m=5, k=256)),
        ({"small": 1}, Case(m=2, k=256)),
        ({"simdgroups": 1}, Case(m=40, n=200, k=256)),
        ({"simdgroups": 1, "skinny": 8}, Case(m=40, n=200, k=256)),
        ({"skinny": 64}, Case(m=60, k=256)),
        ({"simdgroups": 1}, Case(m=60, n=200, k=256)),
        ({"simdgroups": 1}, Case(m=1, n=40, k=4096)),
        ({"vectors": 1}, Case(op="matmul", m=2, k=256)),
        (
            {"rows_per_expert": 1},
            Case(op="grouped_linear", m=6, experts=4, rows="ends int32"),
        ),
        (
            {"rows_per_expert": 1},
            Case(op="grouped_linear", m=3, experts=2, rows="ends int32"),
        ),
        (
            {"rows_per_expert": 64},
            Case(op="grouped_linear", m=70, experts=2, rows="ends int32"),
        ),
    ):
        emulated_metal.limits(**limits)
        text = ", ".join(f"{name} {value}" for name, value in limits.items())
        found.append(f"{text or 'default'}\n{log([case])}")
    assert_expected_inline(
        "\n".join(found),
        """\
default
linear M5 N33 K256: gemv_small 32x10x1 by 32x2x1: VECTORS 5, SPLIT 1, GROUPS
  2
small 4
linear M5 N33 K256: gemm 384x1x1 by 128x1x1: M_TILES 1, N_TILES 1, SPLIT 2
small 1
linear M2 N33 K256: gemm 384x1x1 by 128x1x1: M_TILES 1, N_TILES 1, SPLIT 2
simdgroups 1
linear M40 N200 K256: gemm 512x1x1 by 128x1x1: M_TILES 5, N_TILES 2, SPLIT 1
simdgroups 1, skinny 8
linear M40 N200 K256: gemm 256x2x1 by 128x1x1: M_TILES 3, N_TILES 4, SPLIT 1
skinny 64
linear M60 N33 K256: gemm 384x1x1 by 128x1x1: M_TILES 8, N_TILES 1, SPLIT 2
simdgroups 1
linear M60 N200 K256: gemm 512x1x1 by 128x1x1: M_TILES 8, N_TILES 2, SPLIT 1
simdgroups 1
linear M1 N40 K4096: gemv 32x10x1 by 32x2x1: SPLIT 1, GROUPS 2
vectors 1
matmul M2 N33 K256: gemm_n 512x1x1 by 128x1x1: M_TILES 1, SPLIT 4
rows_per_expert 1
grouped_linear M6 N33 K512 E4 ends int32: gemm 640x5x1 by 128x1x1: M_TILES
  1, N_TILES 1, SPLIT 4
rows_per_expert 1
grouped_linear M3 N33 K512 E2 ends int32: gemm 640x3x1 by 128x1x1: M_TILES
  1, N_TILES 1, SPLIT 4
rows_per_expert 64
grouped_linear M70 N33 K512 E2 ends int32: gemv 32x10x70 by 32x2x1: SPLIT 1,
  GROUPS 2""",
    )


# ---- the same whatever the batch ------------------------------------------------

BATCHES = (1, 2, 8, 9, 49, 70)


def rows_differ(case: Case, batches: tuple[int, ...] = BATCHES) -> list[int]:
    """Batch sizes at which rows of x have another result than among all, in some bit."""
    inputs = make(case)
    whole = inputs()
    differ = []
    for m in batches:
        turned = torch.arange(m).flip(0) + (case.m - m) // 2
        part = replace(inputs, x=inputs.x[turned])
        if case.experts:
            kind = "indices" if "indices" in inputs.extra else "offsets"
            part.extra = {kind: _groups_of(inputs, turned)[kind]}
            if kind == "offsets":
                turned = turned.flip(0)  # sorted by expert
                part.x = inputs.x[turned]
        if not same_bits(part(), whole[turned]):
            differ.append(m)
    return differ


def _groups_of(inputs: Inputs, rows: Tensor) -> dict[str, Tensor]:
    if "indices" in inputs.extra:
        return {"indices": inputs.extra["indices"][rows]}
    ends = inputs.extra["offsets"]
    first = int(rows.min())
    return {"offsets": (ends - first).clamp(0, len(rows)).to(ends.dtype)}


INVARIANT = [
    Case(m=130, n=40, k=1024, type="float"),
    Case(m=130, n=9, k=4096, bits=3, group=32, bias="row", permuted=True),
    Case(op="matmul", m=130, n=200, k=192, bits=5, type="float"),
    Case(op="matmul", m=130, n=40, k=1024, type="bfloat", scales="float"),
    Case(
        op="grouped_linear",
        m=130,
        n=40,
        k=1024,
        experts=3,
        rows="indices int64",
        type="float",
    ),
    Case(op="grouped_linear", m=130, n=9, k=1024, experts=3, rows="ends int32", bits=6),
    Case(
        op="grouped_matmul",
        m=130,
        n=100,
        k=192,
        experts=3,
        rows="indices int32",
        type="float",
    ),
]


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_rows_do_not_depend_on_others(
    case: Case, emulated_metal: EmulatedMetal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "batch_invariant", True)
    assert rows_differ(case) == []
    monkeypatch.setattr(settings, "batch_invariant", False)
    if case.type == "float":  # half seldom shows it
        assert rows_differ(case, (1,)) == [1]


# ---- compiling ------------------------------------------------------------------


def test_threads_compile_once(
    emulated_metal: EmulatedMetal, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated_metal.forget()
    compiled: Counter[str] = Counter()

    def compile_shader(source: str) -> emulator.Library:
        compiled[source] += 1
        return emulator.compile_shader(source)

    monkeypatch.setattr(torch.mps, "compile_shader", compile_shader)
    cases = [Case(m=1, n=9, k=64), Case(m=3, n=9, k=64), Case(op="matmul", n=9, k=64)]
    inputs = [make(case) for case in cases]
    together = threading.Barrier(8)

    def work(i: int) -> list[Tensor]:
        together.wait()
        return [inputs[(i + j) % 3]() for j in range(3)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert sorted(compiled.values()) == [1, 1, 1]
    for i, ys in enumerate(results):
        for j, y in enumerate(ys):
            assert complaint(inputs[(i + j) % 3], y, "gemv") is None


def refuses(source: str) -> Any:
    raise SyntaxError("program_source:1: unknown type name 'Scale'")


def breaks(source: str) -> Any:
    """A kernel that compiles and is wrong."""
    scales = "rows.scales = scales + n * shape.scales_row;"
    assert scales in source
    return emulator.compile_shader(
        source.replace(scales, "rows.scales = scales + n * shape.scales_row * 0;")
    )


def reads_beyond(source: str) -> Any:
    """A kernel whose launch fails, as an emulated one can."""
    return emulator.compile_shader(
        source.replace("load_words<BITS>(from,", "load_words<BITS>(from + 4096,")
    )


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        (refuses, "SyntaxError: program_source:1: unknown type name 'Scale'"),
        (breaks, "elements of a small product"),
        (reads_beyond, "OutOfBoundsError: gemv: out-of-bounds read"),
    ],
)
def test_kernels_that_cannot_be_used(
    compiler: Any,
    why: str,
    emulated_metal: EmulatedMetal,
    fallbacks: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says so once, and the reference does it; strict raises."""
    emulated_metal.forget()
    monkeypatch.setattr(torch.mps, "compile_shader", compiler)
    inputs = make(Case(m=1, n=9, k=96, bits=3, group=32))
    monkeypatch.setattr(settings, "strict", False)
    form = {"bits": 3, "group_size": 32, "dtype": torch.half}
    expected = ops.reference("linear")(inputs.x, *inputs.parts, **form)
    with caplog.at_level(logging.WARNING, "affine_tensor"):
        for _ in range(3):
            assert torch.equal(inputs(), expected)
        metal.reset()
        assert torch.equal(inputs(), expected)
    (message,) = [record.getMessage() for record in caplog.records]
    assert why in message
    assert "gemv (3 bits, group 32" in message
    assert list(metal_library.compiled().values()) == [False]
    emulated_metal.forget()
    monkeypatch.setattr(settings, "strict", True)
    with pytest.raises(metal_library.KernelError, match=why):
        inputs()


@pytest.mark.parametrize(
    ("x", "bias"), [("3d", "matrix"), ("3d", "3d"), ("4d", "row"), ("plain", "column")]
)
def test_biases_without_a_kernel(
    x: str, bias: str, emulated_metal: EmulatedMetal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference takes what the kernels take."""
    emulated_metal.forget()
    monkeypatch.setattr(torch.mps, "compile_shader", refuses)
    monkeypatch.setattr(settings, "strict", False)
    inputs = make(Case(m=6, n=9, k=64, type="float", x=x, bias=bias))
    y, kernel = launch(inputs)
    assert not kernel
    torch.testing.assert_close(y, inputs.exact.float(), rtol=1e-5, atol=1e-4)


# ---- what Apple's compiler refuses ----------------------------------------------


def test_lint(emulated_metal: EmulatedMetal, request: pytest.FixtureRequest) -> None:
    emulated_metal.forget()
    full = request.config.getoption("--full")
    for case in tile_shapes(full)[:: 1 if full else 3]:
        emulated_metal.limits(**dict(case.limits))
        launch(make(case))
    families = set()
    for variant in metal_library.compiled():
        assert lint.lint(metal_library.source(variant)) == [], variant
        families.add(variant.family)
    assert families == {"gemv", "gemv_small", "gemm", "gemv_n", "gemm_n"}
