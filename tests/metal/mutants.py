"""Break the kernels one line at a time, and show that the tests of this folder see it.

    python tests/metal/mutants.py                 # all, as a table; some ten minutes
    python tests/metal/mutants.py gemm.metal      # of some sources

A mutant in a product runs on what CI runs on it, until one complains: `tile_shapes()`
under all `SCHEDULES`, then `LONG_SUMS`, then the traffic of a few rows. One in a kernel
for values runs pytest's own files on those. All this with the check on first use switched
off; the last column says whether that check alone would have caught it, on the same
operands.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import emulated
import metal_emulator as emulator
import pytest
import torch
from emulated import EmulatedMetal
from mutant_texts import AFFINE, GEMM, GEMM_N, GEMV, GEMV_N, GEMV_SMALL, Mutant
from mutant_values import DEQUANTIZE, EMBEDDING, QUANTIZE, ROUNDING
from product_cases import LONG_SUMS, tile_shapes
from products import Case, complaint, complaint_of_any_schedule, launch, make
from traffic_table import Counts, case_of, ours

from affine_tensor import layout
from affine_tensor.kernels import metal
from affine_tensor.kernels.metal import library, values_check

HERE = Path(__file__).resolve().parent
MUTANTS = [
    *(*GEMV, *GEMV_SMALL, *GEMM, *GEMV_N, *GEMM_N, *AFFINE),
    *(*DEQUANTIZE, *EMBEDDING, *QUANTIZE, *ROUNDING),
]
VALUES = ("quantize", "dequantize", "embedding")
TESTS_OF_VALUES = ("test_metal_values.py", "test_metal_quantize.py")

_text = library._text


@dataclass(frozen=True)
class Result:
    tests: str  # what saw it, "" for nothing
    check: str


def mutated(mutant: Mutant) -> Callable[[str], str]:
    """What reads a source, with the mutant's line changed."""

    def read(name: str) -> str:
        text = _text(name)
        return mutant.applied(text) if name == mutant.source else text

    return read


@contextlib.contextmanager
def broken(mutant: Mutant, checked: bool) -> Iterator[EmulatedMetal]:
    """The emulated device with the mutant in its sources and nothing compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_text", mutated(mutant))
        patch.setattr(emulated, "_kernels", {})
        if not checked:
            patch.setattr(metal.check, "compare", no_check)
            for op in VALUES:
                patch.setattr(values_check, f"compare_{op}", no_check)
        device = EmulatedMetal(patch)
        yield device


def no_check(*_: Any) -> None:
    return None


# ---- products -------------------------------------------------------------------


@cache
def cases_of(source: str) -> tuple[Case, ...]:
    """The cases whose kernel has the source; those with other kernels say nothing."""
    family = source.removesuffix(".metal")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        device = EmulatedMetal(patch)
        for case in tile_shapes():
            device.limits(**dict(case.limits))
            if family in ("affine.h", launch(make(case))[1]):
                found.append(case)
    return tuple(found)


def of_products(mutant: Mutant) -> Result:
    cases = cases_of(mutant.source)
    with broken(mutant, checked=True) as device:
        check = first(complaint_of_check(case, device) for case in cases)
    with broken(mutant, checked=False) as device:
        tests = first(
            guarded(complaint_of_any_schedule, case, device) for case in cases
        )
        if not tests:
            tests = first(guarded(of_long_sums, case, device) for case in LONG_SUMS)
        if not tests:
            tests = guarded(of_traffic, Case(), device) or ""
    return Result(tests, check)


def first(complaints: Iterator[str | None]) -> str:
    return next((text for text in complaints if text), "")


def complaint_of_check(case: Case, device: EmulatedMetal) -> str | None:
    device.limits(**dict(case.limits))
    try:
        make(case)()
    except library.KernelError as error:
        return kind_of(str(error))
    except emulator.EmulationError:
        return None  # too late: the check has passed
    return None


def guarded(run: Callable[..., str | None], case: Case, device: Any) -> str | None:
    """What a run complains of; the emulator's errors are complaints, too."""
    device.limits(**dict(case.limits))
    inputs = make(case)
    try:
        found = run(inputs if run is not of_traffic else device)
    except (emulator.EmulationError, library.KernelError) as error:
        return kind_of(f"{type(error).__name__}: {error}")
    return found and kind_of(found)


def of_long_sums(inputs: Any) -> str | None:
    y, kernel = launch(inputs)
    return complaint(inputs, y, kernel)


def of_traffic(device: EmulatedMetal) -> str | None:
    once = Counts(1.0, 1.0)
    for m, group in ((1, 16), (1, 64), (3, 128), (8, 32)):
        row = ours(case_of(m, 4, group), device)
        if row.packed.issued != 1.0 or not row.scales == row.biases == once:
            return "traffic: loaded more than once"
    return None


def kind_of(text: str) -> str:
    """A complaint in two or three words."""
    for words, kind in (
        ("RaceError", "race"),
        ("OutOfBoundsError", "out of bounds"),
        ("out-of-bounds", "out of bounds"),
        ("DivergenceError", "divergence"),
        ("UndefinedArithmeticError", "undefined arithmetic"),
        ("AlignmentError", "alignment"),
        ("SyntaxError", "does not compile"),
        ("depends on the order", "order of lanes"),
        ("wrong result", "wrong result"),
        ("are wrong", "wrong result"),
        ("differ", "wrong result"),
        ("traffic", "traffic"),
    ):
        if words in text:
            return kind
    return text.splitlines()[0][:60]


# ---- values ---------------------------------------------------------------------


def of_values(mutant: Mutant) -> Result:
    with broken(mutant, checked=True):
        check = first(check_of_values(*form) for form in FORMS)
    with broken(mutant, checked=False):
        output = io.StringIO()
        files = [str(HERE / name) for name in TESTS_OF_VALUES]
        with contextlib.redirect_stdout(output):
            failed = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])
    lines = output.getvalue().splitlines()
    tests = next((line for line in lines if line.startswith("FAILED")), "")
    tests = tests.split("::")[-1].split("[")[0].split(" - ")[0]
    return Result(tests if failed else "", check)


FORMS = [
    (bits, group, dtype)
    for i, bits in enumerate(layout.BITS)
    for group, dtype in zip(
        layout.GROUP_SIZES, (*layout.WEIGHT_DTYPES, *layout.WEIGHT_DTYPES), strict=False
    )
    if (i + group) % 3 != 0
]


def check_of_values(bits: int, group: int, dtype: torch.dtype) -> str | None:
    """One call of each operator, for the check on first use."""
    form = {"bits": bits, "group_size": group}
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    run = torch.ops.affine_tensor
    try:
        parts = run.quantize(weight.to(dtype), **form)
        run.dequantize(*parts, **form, dtype=dtype)
        order = torch.arange(512, dtype=torch.int32)
        run.dequantize(*parts, order, **form, dtype=dtype)
        run.embedding(torch.tensor([0, 2]), *parts, **form, dtype=dtype)
    except library.KernelError as error:
        return kind_of(str(error))
    except (emulator.EmulationError, ValueError):
        return None
    return None


# ---- the table ------------------------------------------------------------------


def outcome(mutant: Mutant) -> Result:
    values = mutant.values or mutant.source.removesuffix(".metal") in VALUES
    return of_values(mutant) if values else of_products(mutant)


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    chosen = [m for m in MUTANTS if not wanted or m.source in wanted]
    alive = []
    print("| source | mutant | seen by the tests as | by the check on first use |")
    print("|---|---|---|---|")
    for mutant in chosen:
        found = outcome(mutant)
        seen = found.tests or f"not: {mutant.equivalent or 'ALIVE'}"
        if not found.tests and not mutant.equivalent:
            alive.append(mutant)
        cells = (mutant.source, mutant.what, seen, found.check or "no")
        print(f"| {' | '.join(cells)} |", flush=True)
    equal = sum(bool(mutant.equivalent) for mutant in chosen)
    seen = len(chosen) - equal - len(alive)
    print(
        f"\n{len(chosen)} mutants: {seen} seen, {equal} equivalent, {len(alive)} alive"
    )
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
