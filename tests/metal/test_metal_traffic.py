"""For few rows of x each weight is loaded once, and scales are in whole sectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulated import EmulatedMetal
from expecttest import assert_expected_inline
from product_cases import BITS, GROUPS
from products import Case, make
from traffic_table import HEAD, Counts, N, case_of, ours, rows

ONCE = Counts(1.0, 1.0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each width and each group size, twice; with --full all pairs."""
    full = metafunc.config.getoption("--full")
    if "form" in metafunc.fixturenames:
        forms = [
            (bits, group)
            for i, bits in enumerate(BITS)
            for j, group in enumerate(GROUPS)
            if full or (i + j) % 5 < 2
        ]
        metafunc.parametrize("form", forms, ids=str)


@pytest.mark.parametrize("few", [False, True])
def test_few_rows(
    form: tuple[int, int], few: bool, emulated_metal: EmulatedMetal
) -> None:
    m = (2, 3, 5, 8)[sum(form) % 4] if few else 1
    row = ours(case_of(m, *form), emulated_metal)
    assert row.kernel == ("gemv_small" if few else "gemv")
    assert row.packed.issued == 1.0
    assert row.scales == row.biases == ONCE
    assert row.y.issued == 1.0


def test_one_tile(form: tuple[int, int], emulated_metal: EmulatedMetal) -> None:
    """From 9 to 48 rows, packed is loaded once, too; scales by each 16 codes."""
    bits, group = form
    m = (9, 16, 33, 48)[sum(form) % 4]
    row = ours(case_of(m, bits, group), emulated_metal)
    assert row.kernel == "gemm"
    assert row.packed.issued == 1.0
    assert row.scales.issued == row.biases.issued == group / 16
    assert row.y.issued == 1.0


@pytest.mark.parametrize(
    "case",
    [
        Case(m=1, n=N, k=4096, limits=(("simdgroups", 1),)),  # K is not divided
        Case(m=8, n=N, k=4096, group=32, limits=(("simdgroups", 1),)),
        Case(m=1, n=13, k=4096, scales="float"),
        Case(m=3, n=N, k=4096, type="float", scales="float", bits=5),
        Case(m=1, n=N, k=6144, x="every other", weight="rows", bits=8, group=128),
        Case(m=5, n=N, k=8192, permuted=True, bits=2, group=256),
    ],
    ids=str,
)
def test_other_shapes(case: Case, emulated_metal: EmulatedMetal) -> None:
    row = ours(case, emulated_metal)
    assert row.packed.issued == 1.0
    assert row.scales == row.biases == ONCE


def test_ragged_rows(emulated_metal: EmulatedMetal) -> None:
    """Rows of scales that are no whole sectors: loads of 32 bytes touch two."""
    row = ours(Case(m=1, n=13, k=4096 + 3 * 64), emulated_metal)
    assert row.packed.issued == row.scales.issued == 1.0
    assert row.scales.sectors < 2.0


@pytest.mark.parametrize("m", [1, 4, 8])
def test_gradients(m: int, emulated_metal: EmulatedMetal) -> None:
    """x @ W loads packed once, too."""
    for bits in (3, 4):
        case = Case(op="matmul", m=m, n=64, k=1024, bits=bits)
        assert ours(case, emulated_metal).packed.issued == 1.0


def test_experts_load_their_own(emulated_metal: EmulatedMetal) -> None:
    """Decoding: each row loads its expert once, and no other."""
    case = Case("grouped_linear", m=6, n=N, k=2048, experts=40, rows="indices int32")
    case = replace(case, limits=(("rows_per_expert", 64),))
    inputs = make(case)
    row = ours(case, emulated_metal)
    owners = inputs.extra["indices"]
    served = int(((owners >= 0) & (owners < 40)).sum())
    assert row.packed.issued == served / 40
    assert row.scales == Counts(served / 40, served / 40)


def test_table(emulated_metal: EmulatedMetal) -> None:
    """MLX loads the weights again for each row of x; how often else, compilers decide."""
    found = list(rows([(4, 64), (3, 32)], (1, 4, 8, 16), emulated_metal))
    theirs = [row for row in found if row.kernel.startswith("MLX")]
    for row in theirs:
        assert row.packed.issued >= row.m
        assert row.scales.sectors >= row.m
    own = [str(row) for row in found if row not in theirs]
    assert_expected_inline(
        "\n".join([HEAD, *own]),
        """\
| kernel | M | bits | group | packed | scales | biases | x | y |
|---|---|---|---|---|---|---|---|---|
| gemv | 1 | 4 | 64 | 1/1 | 1/1 | 1/1 | 4/8 | 1/16 |
| gemv_small | 4 | 4 | 64 | 1/1 | 1/1 | 1/1 | 4/8 | 1/4 |
| gemv_small | 8 | 4 | 64 | 1/1 | 1/1 | 1/1 | 4/8 | 1/4 |
| gemm | 16 | 4 | 64 | 1/1 | 4/16 | 4/16 | 2/2 | 1/2 |
| gemv | 1 | 3 | 32 | 1/3 | 1/1 | 1/1 | 4/8 | 1/16 |
| gemv_small | 4 | 3 | 32 | 1/3 | 1/1 | 1/1 | 4/8 | 1/4 |
| gemv_small | 8 | 3 | 32 | 1/3 | 1/1 | 1/1 | 4/8 | 1/4 |
| gemm | 16 | 3 | 32 | 1/6 | 2/8 | 2/8 | 2/2 | 1/2 |""",
    )
