"""The kernels for values: their launches, their sources, and their check on first use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import metal_emulator as emulator
import pytest
import torch
from metal_emulator import lint
from test_layout import assert_same_bits, random_parts
from torch import Tensor
from value_cases import generator, op, replace_in_source, spread, words_of

from affine_tensor import layout, ops, tensor
from affine_tensor.kernels import settings
from affine_tensor.kernels.metal import library as metal_library
from affine_tensor.kernels.metal import values as metal_values
from affine_tensor.layout import WEIGHT_DTYPES


@pytest.fixture(autouse=True)
def metal(emulated_metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those on MPS, the emulator for Metal."""
    monkeypatch.setattr(metal_values, "_plans", {})


@pytest.fixture
def fresh(metal: None, emulated_metal: Any) -> None:
    """Nothing is compiled yet."""
    emulated_metal.forget()


# ---- launches -------------------------------------------------------------------


def test_a_call_is_one_launch_and_kernels_are_compiled_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def compile_shader(source: str) -> Any:
        made.append(source)
        return emulator.compile_shader(source)

    monkeypatch.setattr(torch.mps, "compile_shader", compile_shader)
    weight = torch.randn(4, 128, generator=generator())
    form = {"bits": 4, "group_size": 32}
    ids = torch.tensor([1, 2])
    for turn in range(3):
        with emulator.run() as run:
            parts = op.quantize(weight, **form)
            op.dequantize(*parts, **form, dtype=torch.half)
            op.embedding(ids[:turn], *parts, **form, dtype=torch.half)
        if turn:
            names = [one.kernel for one in run.launches]
            assert names == ["quantize", "dequantize", "embedding"]
    assert len(made) == 3
    assert len(metal_library.compiled()) == 3


@pytest.mark.parametrize("bits", [3, 4])
def test_each_word_is_read_once_and_nothing_beyond(bits: int) -> None:
    parts = words_of(random_parts(bits, 64, torch.float16, "ordinary", (7,)))
    form: dict[str, Any] = {"bits": bits, "group_size": 64}
    kind = {**form, "dtype": torch.bfloat16}
    permutation = torch.rand(1024, generator=generator()).argsort().int()
    ids = torch.tensor([6, 1, 3])
    calls: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: op.dequantize(*parts, **kind), 3),
        (lambda: op.dequantize(*map(spread, parts), **kind), 3),
        (lambda: op.dequantize(*parts, permutation, **kind), 3),
        (lambda: op.embedding(ids, *parts, **kind), 4),
    ]
    for call, place in calls:
        call()  # checked by now
        for front in (False, True):
            with emulator.run(order="random", seed=1, trace=True, front=front) as run:
                y = call()
            (launch,) = run.launches
            words, scales, biases, *_ = launch.traffic
            rows = y.numel() // 1024
            assert words.load_bytes == rows * parts[0].shape[1] * 4
            # One of each for 16 codes, four times the same sector.
            assert scales.load_bytes == biases.load_bytes == y.numel() // 16 * 2
            assert launch.traffic[place].store_bytes == y.nbytes
            assert launch.traffic[place].loads == 0


def test_full_sectors() -> None:
    parts = words_of(random_parts(4, 64, torch.float16, "ordinary", (8,)))
    kind = {"bits": 4, "group_size": 64, "dtype": torch.float32}
    weight = op.dequantize(*parts, **kind)
    with emulator.run(trace=True) as run:
        op.dequantize(*parts, **kind)
        op.quantize(weight, bits=4, group_size=64)
    dequantized, quantized = run.launches[0], run.launches[-1]
    assert dequantized.traffic[0].load_sectors == parts[0].nbytes // 32
    assert quantized.traffic[0].load_sectors == weight.nbytes // 32


def test_threads(fresh: None) -> None:
    """Plans are made by several threads at once."""
    weights = [torch.randn(3 + i % 4, 64 * (1 + i % 3)) for i in range(24)]
    form = {"bits": 6, "group_size": 32}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda w: op.quantize(w, **form), weights))
    for weight, parts in zip(weights, results, strict=True):
        assert_same_bits(parts, words_of(layout.quantize(weight, **form)))


# ---- sources --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dequantize", "embedding", "quantize"])
@pytest.mark.parametrize(("bits", "group_size"), [(1, 16), (3, 256), (4, 64), (8, 128)])
def test_lint(family: str, bits: int, group_size: int) -> None:
    i = layout.BITS.index(bits)
    dtypes = (*WEIGHT_DTYPES, *WEIGHT_DTYPES)
    defines: dict[str, Any] = {"X_TYPE": dtypes[i % 3], "SCALE_TYPE": dtypes[i % 4]}
    if family == "embedding":
        defines["ID_TYPE"] = (torch.int32, torch.int64)[i % 2]
    flags = {"ALIGNED": i % 2, "X_VECTOR": i % 2, "PERMUTED": i // 2 % 2}
    wanted = metal_library.variant(
        family, bits=bits, group_size=group_size, **defines, **flags
    )
    assert not lint.lint(metal_library.source(wanted))


BROKEN = {
    "dequantize": [
        ("made_odd(nearest, rest)", "nearest"),
        ("bits + 1 : bits - 1", "bits - 1 : bits + 1"),
        ("code_at(words, i + 2)", "code_at(words, i + 1)"),
        ("chunk / (GROUP_SIZE / 16)", "chunk / (GROUP_SIZE / 8)"),
        ("expert * shape.scales_expert +", "0 +"),
        ("position.z", "0"),
    ],
    "embedding": [
        ("n >= shape.n", "n > shape.n"),
        ("n < 0 ||", "n < 1 ||"),
        ("n * shape.packed_row", "0 * shape.packed_row"),
        ("X(NAN)", "X(0.0f)"),
    ],
    "quantize": [
        ("rint((value", "round((value"),
        ("rint(edge", "floor(edge"),
        ("abs(low) > abs(high)", "abs(low) >= abs(high)"),
        ("1e-7f", "1e-6f"),
        ("finite ? values[i] : INFINITY", "values[i]"),
        ("float high = -INFINITY", "float high = 0.0f"),  # as MLX's kernel has it
        ("min(code, float(MASK))", "code"),
        ("step > 0", "step > 1"),
        ("i < OWNERS", "i < OWNERS - 1"),
    ],
}
BROKEN_CASES = [(f, *change) for f, changes in BROKEN.items() for change in changes]


@pytest.mark.parametrize(("family", "text", "wrong"), BROKEN_CASES)
def test_a_broken_kernel_is_found_on_first_use(
    family: str,
    text: str,
    wrong: str,
    fresh: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    replace_in_source(monkeypatch, text, wrong)
    bits, group_size = 3, 64
    weight = torch.randn(4, 256, generator=generator()).half()
    parts = words_of(layout.quantize(weight, bits=bits, group_size=group_size))
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    ids = torch.tensor([1, 3])
    arguments = {
        "dequantize": (parts, {"dtype": torch.float16}),
        "embedding": ((ids, *parts), {"dtype": torch.float16}),
        "quantize": ((weight,), {}),
    }
    own, more = arguments[family]
    with pytest.raises(metal_library.KernelError, match=f"{family} \\(3 bits"):
        getattr(op, family)(*own, **form, **more)
    monkeypatch.setattr(settings, "strict", False)
    monkeypatch.setattr(tensor, "_logged", set())
    expected = ops.reference(family)(*own, **form, **more)
    with caplog.at_level(logging.WARNING, logger="affine_tensor"):
        for _ in range(2):
            assert_same_bits(getattr(op, family)(*own, **form, **more), expected)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "cannot be used on this machine" in line
    assert list(metal_library.compiled().values()) == [False]
