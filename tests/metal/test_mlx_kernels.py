"""MLX's own Metal kernels, unmodified, through the emulator: does it compute as Metal?

The oracles are products in float64 with bounds that follow from the arithmetic, exact
products of whole numbers, MLX on a CPU, and the rules that the kernels' header states.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import metal_emulator as emulator
import mlx_kernels as kernels
import mlx_references as references
import numpy as np
import pytest
import torch
from mlx_kernels import GROUP_SIZES, TYPES, Headers, Variant
from mlx_references import Inputs, Weights
from torch import Tensor

try:
    HEADERS = kernels.installed_headers()
except kernels.HeadersMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)
mx = pytest.importorskip("mlx.core")

ORDERS = ("forward", "backward", "random")
types_and_widths = pytest.mark.parametrize(
    ("type_", "bits"), list(itertools.product(TYPES, HEADERS.widths))
)
# For the products one group size with each: over all, every group size meets every
# width and every type.
COMBINATIONS = [
    pytest.param(type_, bits, GROUP_SIZES[(i + j) % 3], id=f"{type_}-{bits}bit")
    for (i, type_), (j, bits) in itertools.product(
        enumerate(TYPES), enumerate(HEADERS.widths)
    )
]
combinations = pytest.mark.parametrize(("type_", "bits", "group_size"), COMBINATIONS)


def variants(type_: str) -> Iterator[Variant]:
    """Everything that is tested of one type, for one source."""
    for _, bits, group_size in (p.values for p in COMBINATIONS if p.values[0] == type_):
        common = (type_, group_size, bits)
        yield Variant("affine_qmv_fast", *common, (False,))
        if HEADERS.partial_rows:
            yield Variant("affine_qmv_fast", *common, (False, True))
        yield Variant("affine_qmv", *common, (False,))
        yield Variant("affine_qmm_t", *common, (True, False))
        yield Variant("affine_qmm_t", *common, (False, False))
        for size in GROUP_SIZES:
            yield Variant("affine_quantize", type_, size, bits)
            yield Variant("affine_dequantize", type_, size, bits)
    yield Variant("affine_qmv", type_, 64, 4, (True,))


def compiled(headers: list[Path], wanted: Iterator[Variant] | list[Variant]) -> Any:
    return emulator.compile_shader(kernels.source(wanted), include_dirs=headers)


@functools.cache
def library(type_: str) -> Any:
    return compiled([HEADERS.folder], variants(type_))


def kernel(variant: Variant) -> Any:
    return getattr(library(variant.type), variant.name)


def differences(label: str, got: Tensor, want: Tensor, bound: Tensor) -> list[str]:
    """A line if some element is off by more than its bound, or is not a number."""
    wrong = ~((got.double() - want).abs() <= bound)
    if not wrong.any():
        return []
    first = tuple(wrong.nonzero()[0].tolist())
    return [
        f"{label}: {int(wrong.sum())} of {wrong.numel()} are off, the first at {first}: "
        f"{got[first]:.9g} for {want[first]:.9g} +- {bound[first]:.3g}"
    ]


def unequal(label: str, got: Tensor, want: Tensor) -> list[str]:
    """A line if some element is not the one wanted."""
    wrong = got != want
    if not wrong.any():
        return []
    first = tuple(wrong.nonzero()[0].tolist())
    count = f"{int(wrong.sum())} of {wrong.numel()} differ"
    return [f"{label}: {count}, the first at {first}: {got[first]} for {want[first]}"]


def check_product(
    index: int,
    run: Callable[[Weights, Tensor], Tensor],
    expected: Callable[[Weights, Tensor], tuple[Tensor, Tensor]],
    shape: tuple[int, int, int],
    variant: Variant,
) -> list[str]:
    """What is wrong with normal and with whole inputs; the index picks an order."""
    order, inputs = ORDERS[index % 3], Inputs(index)
    label = f"{variant.name} with M, N, K = {shape}, {order}"
    like = (shape, variant.group_size, variant.bits, TYPES[variant.type])
    with emulator.run(order=order, seed=index):
        weights, x = inputs.product(*like)
        lines = differences(label, run(weights, x), *expected(weights, x))
        weights, x = inputs.whole_product(*like)
        got = run(weights, x)
    exact = (x.double() @ weights.dense.mT).to(x.dtype).double()
    return lines + differences(f"{label}, whole", got, exact, torch.zeros_like(exact))


def expected_qmv(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    in_type = HEADERS.sums_in_type(weights.bits)
    return references.expected_qmv(weights, x, sums_in_type=in_type)


def expected_qmm(
    weights: Weights, x: Tensor, headers: Headers = HEADERS
) -> tuple[Tensor, Tensor]:
    in_type = headers.dequantizes_in_type
    return references.expected_qmm(weights, x, dequantizes_in_type=in_type)


# Products


@combinations
def test_qmv_fast(type_: str, bits: int, group_size: int) -> None:
    # A block of K is 512, or 256 for 6 and 8 bits; for 1 bit it is 1024 and K may end
    # within it.
    k = 256 if bits in (6, 8) else 512
    cases = [((1, 8, k), ()), ((3, 40, 2 * k), ()), ((2, 16, 3 * k), ())]
    if HEADERS.partial_rows:
        cases += [((m, n, k), (True,)) for m, n in ((1, 3), (2, 13), (1, 68), (3, 16))]
    wrong = []
    for index, (shape, flags) in enumerate(cases, start=bits):
        variant = Variant("affine_qmv_fast", type_, group_size, bits, (False, *flags))
        run = functools.partial(kernels.run_qmv, kernel(variant))
        wrong += check_product(index, run, expected_qmv, shape, variant)
    assert not wrong, "\n".join(wrong)


@combinations
def test_qmv(type_: str, bits: int, group_size: int) -> None:
    k = group_size
    shapes = [
        *((1, 1, k), (2, 3, 5 * k), (1, 7, 512 + k), (1, 8, 512)),
        *((3, 9, 3 * k), (2, 13, 512 + 2 * k), (1, 36, 1024), (2, 64, 7 * k)),
    ]
    variant = Variant("affine_qmv", type_, group_size, bits, (False,))
    run = functools.partial(kernels.run_qmv, kernel(variant))
    wrong = []
    for index, shape in enumerate(shapes, start=bits):
        wrong += check_product(index, run, expected_qmv, shape, variant)
    assert not wrong, "\n".join(wrong)


def run_qmm(function: Any, weights: Weights, x: Tensor) -> Tensor:
    """With rows to spare behind N where the header reads them."""
    if HEADERS.reads_past_n:
        return kernels.run_qmm(function, weights.padded(32), x, weights.codes.shape[0])
    return kernels.run_qmm(function, weights, x)


@combinations
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "ragged"])
def test_qmm_t(type_: str, bits: int, group_size: int, aligned: bool) -> None:
    k = group_size
    if aligned:
        shapes = [(32, 32, k), (40, 64, 2 * k), (5, 96, 3 * k)]
    else:
        shapes = [(1, 33, k), (40, 136, 2 * k), (32, 7, 3 * k), (20, 64, k)]
    variant = Variant("affine_qmm_t", type_, group_size, bits, (aligned, False))
    run = functools.partial(run_qmm, kernel(variant))
    wrong = []
    for index, shape in enumerate(shapes, start=bits):
        wrong += check_product(index, run, expected_qmm, shape, variant)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("type_", TYPES)
def test_batched_qmv(type_: str) -> None:
    bits, group_size = 4, 64
    variant = Variant("affine_qmv", type_, group_size, bits, (True,))
    inputs, (m, n, k) = Inputs(7), (2, 13, 512 + 64)
    flat, _ = inputs.product((m, 3 * n, k), group_size, bits, TYPES[type_])
    parts = (part.view(3, n, -1) for part in (flat.codes, flat.scales, flat.biases))
    weights, x = Weights(*parts, bits), inputs.normal(2, m, k).to(TYPES[type_])
    with emulator.run(order="random", seed=7):
        got = kernels.run_batched_qmv(kernel(variant), weights, x)
    expected = expected_qmv(weights, x.unsqueeze(1))
    assert differences(variant.name, got, *expected) == []


# Quantizing


@types_and_widths
def test_quantize(type_: str, bits: int) -> None:
    """Codes, scales and biases are those of the header's rule, bit by bit."""
    wrong = []
    for index, size in enumerate(GROUP_SIZES, start=bits):
        values = Inputs(index).to_quantize(size, bits).to(TYPES[type_])
        want = references.expected_quantize(values, bits, size)
        function = kernel(Variant("affine_quantize", type_, size, bits))
        for width in (None, 64):
            order, octets = ORDERS[index % 3], ~want.packed
            with emulator.run(order=order, seed=index):
                got = kernels.run_quantize(function, values, octets, size, width)
            label = f"group size {size}, grid of width {width}, {order}"
            codes = references.unpack(octets, bits)
            wrong += unequal(f"{label}, codes", codes, want.codes)
            wrong += unequal(f"{label}, scales", got[0], want.scales)
            wrong += unequal(f"{label}, biases", got[1], want.biases)
    assert not wrong, "\n".join(wrong)


@types_and_widths
def test_dequantize(type_: str, bits: int) -> None:
    """scale * code + bias in T: rounded twice, and not once."""
    wrong = []
    for index, size in enumerate(GROUP_SIZES, start=bits):
        weights, _ = Inputs(index).product((1, 24, 2 * size), size, bits, TYPES[type_])
        function = kernel(Variant("affine_dequantize", type_, size, bits))
        for width in (None, 32):
            order = ORDERS[index % 3]
            with emulator.run(order=order, seed=index):
                got = kernels.run_dequantize(function, weights, width)
            label = f"group size {size}, grid of width {width}, {order}"
            wrong += unequal(label, got, references.expected_dequantize(weights))
    assert not wrong, "\n".join(wrong)


# MLX on a CPU, as an oracle of the oracles


def to_mlx(tensor: Tensor) -> Any:
    array = mx.array(tensor.float().numpy())
    return array.astype(getattr(mx, str(tensor.dtype).removeprefix("torch.")))


def from_mlx(array: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def quantized_by_mlx(values: Tensor, bits: int, group_size: int) -> Weights:
    packed, scales, biases = mx.quantize(
        to_mlx(values), group_size=group_size, bits=bits, stream=mx.cpu
    )
    octets = torch.from_numpy(np.array(packed).view(np.uint8))
    scales, biases = (from_mlx(part, values.dtype) for part in (scales, biases))
    return Weights(references.unpack(octets, bits), scales, biases, bits)


@combinations
def test_rule_of_quantize(type_: str, bits: int, group_size: int) -> None:
    """With a CPU's rounding and maximum the rule is MLX's, without them it is not.

    So the bit-exact test of the kernel tells the two rules apart.
    """
    inputs, dtype = Inputs(bits), TYPES[type_]
    values = inputs.to_quantize(group_size, bits).to(dtype)
    ours = references.expected_quantize(values, bits, group_size, on_metal=False)
    theirs = quantized_by_mlx(values, bits, group_size)
    for part in ("codes", "scales", "biases"):
        assert unequal(part, getattr(ours, part), getattr(theirs, part)) == []
    for scale in (0.125, -0.25):
        values = inputs.tied(4, group_size, bits, scale).to(dtype)
        on_metal = references.expected_quantize(values, bits, group_size)
        theirs = quantized_by_mlx(values, bits, group_size)
        assert torch.equal(on_metal.scales, theirs.scales)
        assert (on_metal.codes != theirs.codes).sum() > 0
    below = inputs.negative(4, group_size).to(dtype)
    on_metal = references.expected_quantize(below, bits, group_size)
    assert (on_metal.scales != quantized_by_mlx(below, bits, group_size).scales).all()


@pytest.mark.parametrize("bits", HEADERS.widths)
def test_stream_of_bits(bits: int) -> None:
    """The codes are packed as MLX packs them."""
    codes = Inputs(bits).whole(0, 2**bits - 1, 5, 96)
    packed = references.pack(codes, bits)
    assert torch.equal(references.unpack(packed, bits), codes)
    ones = mx.ones((5, 3))
    words = mx.array(packed.numpy().view(np.uint32))
    dense = mx.dequantize(words, ones, mx.zeros((5, 3)), group_size=32, bits=bits)
    assert torch.equal(from_mlx(dense, torch.int64), codes)


# Orders of lanes, races, and reads out of bounds


def every_kernel(type_: str, bits: int, group_size: int) -> list[Variant]:
    common = (type_, group_size, bits)
    return [
        Variant("affine_qmv_fast", *common, (False,)),
        Variant("affine_qmv", *common, (False,)),
        Variant("affine_qmm_t", *common, (True, False)),
        Variant("affine_qmm_t", *common, (False, False)),
        Variant("affine_quantize", *common),
        Variant("affine_dequantize", *common),
    ]


def results(lookup: Callable[[Variant], Any], wanted: list[Variant]) -> list[Tensor]:
    """What every kernel returns on small inputs, ragged ones where they may be."""
    inputs, size, dtype = Inputs(5), wanted[0].group_size, TYPES[wanted[0].type]
    fast, qmv, aligned, ragged, quantize, dequantize = wanted
    products = [
        (fast, kernels.run_qmv, (2, 24, 512)),
        (qmv, kernels.run_qmv, (2, 13, 512 + size)),
        (aligned, run_qmm, (33, 64, 2 * size)),
        (ragged, run_qmm, (33, 40, 2 * size)),
    ]
    got = []
    for variant, run, shape in products:
        operands = inputs.product(shape, size, variant.bits, dtype)
        got.append(run(lookup(variant), *operands))
    values = inputs.normal(6, 2 * size).to(dtype)
    weights = references.expected_quantize(values, quantize.bits, size)
    codes = ~weights.packed
    got += [*kernels.run_quantize(lookup(quantize), values, codes, size), codes]
    return [*got, kernels.run_dequantize(lookup(dequantize), weights)]


@pytest.mark.parametrize(("type_", "bits", "group_size"), COMBINATIONS[1::5])
def test_orders_of_lanes_agree(type_: str, bits: int, group_size: int) -> None:
    """No kernel here has atomics, so an order changes no bit."""
    wanted, got = every_kernel(type_, bits, group_size), []
    for order, seed in [("forward", 0), ("backward", 0), ("random", 1), ("random", 2)]:
        with emulator.run(order=order, seed=seed):
            got.append(results(kernel, wanted))
    for other in got[1:]:
        assert all(map(torch.equal, got[0], other))


def test_no_races() -> None:
    """The tracer finds nothing in kernels that are known to be right."""
    wanted = every_kernel("float16_t", 4, 64)
    small = compiled([HEADERS.folder], wanted)
    plain = results(lambda variant: getattr(small, variant.name), wanted)
    with emulator.run(order="random", seed=3, trace=True) as run:
        traced = results(lambda variant: getattr(small, variant.name), wanted)
    assert all(map(torch.equal, plain, traced))
    assert [launch.kernel for launch in run.launches] == [v.name for v in wanted]


def ragged(headers: Headers, folders: list[Path], *, reads_past_n: bool) -> list[str]:
    """Where the kernel reads past N, that is reported; and what it returns is right."""
    type_, group_size, bits = "float16_t", 64, 4
    variant = Variant("affine_qmm_t", type_, group_size, bits, (False, False))
    function = getattr(compiled(folders, [variant]), variant.name)
    message = rf"{variant.name}: out-of-bounds read: buffer [012]\b"
    wrong = []
    for n in (7, 33, 72):
        weights, x = Inputs(n).product((20, n, 128), group_size, bits, torch.float16)
        if reads_past_n:
            with pytest.raises(emulator.OutOfBoundsError, match=message):
                kernels.run_qmm(function, weights, x)
            got = kernels.run_qmm(function, weights.padded(32), x, n)
        else:
            got = kernels.run_qmm(function, weights, x)
        expected = expected_qmm(weights, x, headers)
        wrong += differences(f"N = {n}", got, *expected)
    return wrong


def test_ragged_qmm_t_in_exact_buffers() -> None:
    folders, reads_past_n = [HEADERS.folder], HEADERS.reads_past_n
    assert ragged(HEADERS, folders, reads_past_n=reads_past_n) == []


@pytest.mark.skipif(HEADERS.reads_past_n, reason="the header itself reads past N")
def test_a_read_past_n_is_found(tmp_path: Path) -> None:
    """The fault that MLX's loader had, put back in a copy of that one header."""
    text = HEADERS.text.replace("bi >= src_tile_dim.y", "bi >= src_tile_dim.x")
    assert text != HEADERS.text
    copy = tmp_path / kernels.KERNELS / "quantized.h"
    copy.parent.mkdir(parents=True)
    copy.write_text(text, encoding="utf-8")
    headers = Headers(tmp_path)
    assert headers.reads_past_n
    assert ragged(headers, [tmp_path, HEADERS.folder], reads_past_n=True) == []
