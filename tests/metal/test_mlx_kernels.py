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
import numpy as np
import pytest
import torch
from mlx_kernels import GROUP_SIZES, TYPES, Headers, Variant, Weights
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


def kernel(name: str, type_: str, group_size: int, bits: int, *flags: bool) -> Any:
    return getattr(library(type_), Variant(name, type_, group_size, bits, flags).name)


# Inputs


class Inputs:
    """Random inputs of a seed: normal ones, and whole ones with exact products."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def product(
        self, shape: tuple[int, int, int], group_size: int, bits: int, type_: str
    ) -> tuple[Weights, Tensor]:
        """Weights and x of normal numbers, scales of both signs."""
        (m, n, k), dtype = shape, TYPES[type_]
        codes = self.whole(0, 2**bits - 1, n, k)
        scales = self.normal(n, k // group_size) / 2**bits
        biases = self.normal(n, k // group_size)
        weights = Weights(codes, scales.to(dtype), biases.to(dtype), bits)
        return weights, self.normal(m, k).to(dtype)

    def whole_product(
        self, shape: tuple[int, int, int], group_size: int, bits: int, type_: str
    ) -> tuple[Weights, Tensor]:
        """Such that no operation in T or in float rounds, but the last one."""
        (m, n, k), dtype = shape, TYPES[type_]
        codes = self.whole(0, 2**bits - 1, n, k)
        scales = 0.5 ** self.whole(0, 2, n, k // group_size)
        scales *= self.whole(0, 1, n, k // group_size) * 2 - 1
        biases = -scales * self.whole(0, 2**bits - 1, n, k // group_size)
        weights = Weights(codes, scales.to(dtype), biases.to(dtype), bits)
        x = self.whole(-3, 3, m, k)
        # Sums are multiples of a quarter, of fewer than 24 bits: exact in any order.
        assert (x.double().abs() @ weights.magnitude.mT).max() * 4 < 2**24
        return weights, x.to(dtype)


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
    expected: Callable[[Headers, Weights, Tensor], tuple[Tensor, Tensor]],
    shape: tuple[int, int, int],
    variant: tuple[str, int, int],
) -> list[str]:
    """What is wrong with normal and with whole inputs; the index picks an order."""
    type_, bits, group_size = variant
    order, inputs = ORDERS[index % 3], Inputs(index)
    label = f"M, N, K = {shape}, group size {group_size}, {order}"
    with emulator.run(order=order, seed=index):
        weights, x = inputs.product(shape, group_size, bits, type_)
        lines = differences(label, run(weights, x), *expected(HEADERS, weights, x))
        weights, x = inputs.whole_product(shape, group_size, bits, type_)
        got = run(weights, x)
    exact = (x.double() @ weights.dense.mT).to(x.dtype).double()
    return lines + differences(f"{label}, whole", got, exact, torch.zeros_like(exact))


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
        function = kernel("affine_qmv_fast", type_, group_size, bits, False, *flags)
        run = functools.partial(kernels.run_qmv, function)
        variant = (type_, bits, group_size)
        wrong += check_product(index, run, kernels.expected_qmv, shape, variant)
    assert not wrong, "\n".join(wrong)


@combinations
def test_qmv(type_: str, bits: int, group_size: int) -> None:
    k = group_size
    shapes = [
        *((1, 1, k), (2, 3, 5 * k), (1, 7, 512 + k), (1, 8, 512)),
        *((3, 9, 3 * k), (2, 13, 512 + 2 * k), (1, 36, 1024), (2, 64, 7 * k)),
    ]
    function = kernel("affine_qmv", type_, group_size, bits, False)
    run = functools.partial(kernels.run_qmv, function)
    wrong = []
    for index, shape in enumerate(shapes, start=bits):
        variant = (type_, bits, group_size)
        wrong += check_product(index, run, kernels.expected_qmv, shape, variant)
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
    function = kernel("affine_qmm_t", type_, group_size, bits, aligned, False)
    run = functools.partial(run_qmm, function)
    wrong = []
    for index, shape in enumerate(shapes, start=bits):
        variant = (type_, bits, group_size)
        wrong += check_product(index, run, kernels.expected_qmm, shape, variant)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("type_", TYPES)
def test_batched_qmv(type_: str) -> None:
    bits, group_size = 4, 64
    variant = Variant("affine_qmv", type_, group_size, bits, (True,))
    function = getattr(library(type_), variant.name)
    inputs, (m, n, k) = Inputs(7), (2, 13, 512 + 64)
    flat, _ = inputs.product((m, 3 * n, k), group_size, bits, type_)
    parts = (part.view(3, n, -1) for part in (flat.codes, flat.scales, flat.biases))
    weights, x = Weights(*parts, bits), inputs.normal(2, m, k).to(TYPES[type_])
    with emulator.run(order="random", seed=7):
        got = kernels.run_batched_qmv(function, weights, x)
    expected = kernels.expected_qmv(HEADERS, weights, x.unsqueeze(1))
    assert differences(variant.name, got, *expected) == []


# Quantizing


def tied(bits: int, scale: float, negative: bool) -> Callable[..., Tensor]:
    """Groups of which all but the edges lie halfway between two codes."""

    def groups(inputs: Inputs, count: int, size: int) -> Tensor:
        # Eight bits: what a bfloat16 holds.
        values = inputs.whole(0, min(2**bits, 128) - 2, count, size) + 0.5
        values[:, 0], values[:, 1] = 0, 2**bits - 1
        return values * (-scale if negative else scale)

    return groups


def tied_edges(inputs: Inputs, count: int, size: int, bits: int) -> Tensor:
    """Groups of which the larger edge lies halfway between two multiples of the scale."""
    bins = 2**bits - 1
    edge = bins // 2 + 1.5
    values = inputs.whole(0, max(0, bins // 2 - 1), count, size).double()
    values[:, 1], values[:, 2] = edge, edge - bins
    values[::2] *= -1
    return values / 4


def quantize_inputs(inputs: Inputs, size: int, bits: int) -> Tensor:
    """Groups of values, two a row, random and adversarial."""
    one = torch.zeros(2, size)
    one[0, 5], one[1, size - 1] = 3.0, -3.0
    groups = [
        inputs.normal(12, size),
        inputs.normal(2, size) * 1000,
        inputs.normal(2, size) * 1e-7,
        inputs.whole(-16, 16, 8, size) / 8,
        tied(bits, 0.125, False)(inputs, 4, size),
        tied(bits, 0.25, True)(inputs, 4, size),
        tied_edges(inputs, 4, size, bits),
        1 + inputs.normal(4, size).abs(),
        -1 - inputs.normal(4, size).abs(),
        torch.tensor([[0.3], [-0.3], [1000.0], [-1e-6]]).expand(4, size),
        torch.zeros(2, size),
        one,
    ]
    return torch.cat(groups).view(-1, 2 * size)


@types_and_widths
def test_quantize(type_: str, bits: int) -> None:
    """Codes, scales and biases are those of the header's rule, bit by bit."""
    wrong = []
    for index, size in enumerate(GROUP_SIZES, start=bits):
        values = quantize_inputs(Inputs(index), size, bits).to(TYPES[type_])
        want = kernels.expected_quantize(values, bits, size)
        function = kernel("affine_quantize", type_, size, bits)
        for width in (None, 64):
            order = ORDERS[index % 3]
            codes = ~want.packed
            with emulator.run(order=order, seed=index):
                got = kernels.run_quantize(function, values, codes, size, width)
            label = f"group size {size}, grid of width {width}, {order}"
            wrong += unequal(f"{label}, codes", kernels.unpack(codes, bits), want.codes)
            wrong += unequal(f"{label}, scales", got[0], want.scales)
            wrong += unequal(f"{label}, biases", got[1], want.biases)
    assert not wrong, "\n".join(wrong)


@types_and_widths
def test_dequantize(type_: str, bits: int) -> None:
    """scale * code + bias in T: rounded twice, and not once."""
    wrong = []
    for index, size in enumerate(GROUP_SIZES, start=bits):
        weights, _ = Inputs(index).product((1, 24, 2 * size), size, bits, type_)
        function = kernel("affine_dequantize", type_, size, bits)
        for width in (None, 32):
            order = ORDERS[index % 3]
            with emulator.run(order=order, seed=index):
                got = kernels.run_dequantize(function, weights, width)
            label = f"group size {size}, grid of width {width}, {order}"
            wrong += unequal(label, got, kernels.expected_dequantize(weights))
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
    return Weights(kernels.unpack(octets, bits), scales, biases, bits)


@combinations
def test_rule_of_quantize(type_: str, bits: int, group_size: int) -> None:
    """With a CPU's rounding and maximum the rule is MLX's, without them it is not.

    So the bit-exact test of the kernel tells the two rules apart.
    """
    inputs, dtype = Inputs(bits), TYPES[type_]
    values = quantize_inputs(inputs, group_size, bits).to(dtype)
    ours = kernels.expected_quantize(values, bits, group_size, on_metal=False)
    theirs = quantized_by_mlx(values, bits, group_size)
    for part in ("codes", "scales", "biases"):
        assert unequal(part, getattr(ours, part), getattr(theirs, part)) == []
    for negative in (False, True):
        values = tied(bits, 0.125, negative)(inputs, 4, group_size).to(dtype)
        on_metal = kernels.expected_quantize(values, bits, group_size)
        theirs = quantized_by_mlx(values, bits, group_size)
        assert torch.equal(on_metal.scales, theirs.scales)
        assert (on_metal.codes != theirs.codes).sum() > 0
    below = -1 - inputs.normal(4, group_size).abs().to(dtype)
    on_metal = kernels.expected_quantize(below, bits, group_size)
    assert (on_metal.scales != quantized_by_mlx(below, bits, group_size).scales).all()


@pytest.mark.parametrize("bits", HEADERS.widths)
def test_stream_of_bits(bits: int) -> None:
    """The codes are packed as MLX packs them."""
    codes = Inputs(bits).whole(0, 2**bits - 1, 5, 96)
    packed = kernels.pack(codes, bits)
    assert torch.equal(kernels.unpack(packed, bits), codes)
    ones = mx.ones((5, 3))
    words = mx.array(packed.numpy().view(np.uint32))
    dense = mx.dequantize(words, ones, mx.zeros((5, 3)), group_size=32, bits=bits)
    assert torch.equal(from_mlx(dense, torch.int64), codes)


# Orders of lanes, races, and reads out of bounds


def every_kernel(
    lookup: Callable[..., Any], type_: str, bits: int, group_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Each kernel's results on small inputs that are ragged where they may be."""
    inputs, k = Inputs(5), 512 if bits == 1 else 256 * (1 + (bits not in (6, 8)))
    products = [
        ("affine_qmv_fast", (False,), kernels.run_qmv, (2, 24, k)),
        ("affine_qmv", (False,), kernels.run_qmv, (2, 13, 512 + group_size)),
        ("affine_qmm_t", (True, False), run_qmm, (33, 64, 2 * group_size)),
        ("affine_qmm_t", (False, False), run_qmm, (33, 40, 2 * group_size)),
    ]
    for name, flags, run, shape in products:
        function = lookup(name, type_, group_size, bits, *flags)
        yield name, run(function, *inputs.product(shape, group_size, bits, type_))
    values = inputs.normal(6, 2 * group_size).to(TYPES[type_])
    weights = kernels.expected_quantize(values, bits, group_size)
    codes = ~weights.packed
    function = lookup("affine_quantize", type_, group_size, bits)
    parts = kernels.run_quantize(function, values, codes, group_size)
    yield "affine_quantize", torch.cat([codes.double(), *map(Tensor.double, parts)], -1)
    function = lookup("affine_dequantize", type_, group_size, bits)
    yield "affine_dequantize", kernels.run_dequantize(function, weights)


def same(one: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]) -> list[str]:
    lines = []
    for (name, first), (_, second) in zip(one, other, strict=True):
        lines += unequal(name, second, first)
    return lines


@pytest.mark.parametrize(("type_", "bits", "group_size"), COMBINATIONS[1::5])
def test_orders_of_lanes_agree(type_: str, bits: int, group_size: int) -> None:
    """No kernel here has atomics, so an order changes no bit."""
    results = []
    for order, seed in [("forward", 0), ("backward", 0), ("random", 1), ("random", 2)]:
        with emulator.run(order=order, seed=seed):
            results.append(list(every_kernel(kernel, type_, bits, group_size)))
    wrong = [line for other in results[1:] for line in same(results[0], other)]
    assert not wrong, "\n".join(wrong)


def test_no_races() -> None:
    """The tracer finds nothing in kernels that are known to be right, and counts."""
    type_, bits, group_size = "float16_t", 4, 64
    common = (type_, group_size, bits)
    wanted = [
        Variant("affine_qmv_fast", *common, (False,)),
        Variant("affine_qmv", *common, (False,)),
        Variant("affine_qmm_t", *common, (True, False)),
        Variant("affine_qmm_t", *common, (False, False)),
        Variant("affine_quantize", *common),
        Variant("affine_dequantize", *common),
    ]
    small = compiled([HEADERS.folder], wanted)

    def lookup(*parts: Any) -> Any:
        name, type_, group_size, bits, *flags = parts
        return getattr(small, Variant(name, type_, group_size, bits, tuple(flags)).name)

    plain = list(every_kernel(lookup, type_, bits, group_size))
    with emulator.run(order="random", seed=3, trace=True) as run:
        traced = list(every_kernel(lookup, type_, bits, group_size))
    assert same(plain, traced) == []
    assert [launch.kernel for launch in run.launches] == [v.name for v in wanted]


def ragged(headers: Headers, folders: list[Path], *, reads_past_n: bool) -> list[str]:
    """Where the kernel reads past N, that is reported; and what it returns is right."""
    type_, group_size, bits = "float16_t", 64, 4
    variant = Variant("affine_qmm_t", type_, group_size, bits, (False, False))
    function = getattr(compiled(folders, [variant]), variant.name)
    message = rf"{variant.name}: out-of-bounds read: buffer [012]\b"
    wrong = []
    for n in (7, 33, 72):
        weights, x = Inputs(n).product((20, n, 128), group_size, bits, type_)
        if reads_past_n:
            with pytest.raises(emulator.OutOfBoundsError, match=message):
                kernels.run_qmm(function, weights, x)
            got = kernels.run_qmm(function, weights.padded(32), x, n)
        else:
            got = kernels.run_qmm(function, weights, x)
        expected = kernels.expected_qmm(headers, weights, x)
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
