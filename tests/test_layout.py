"""The bit format against MLX itself, scalar code, bit streams and float64."""

from __future__ import annotations

import math
import textwrap
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import expecttest
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from affine_tensor import layout
from affine_tensor.layout import BITS, GROUP_SIZES, WEIGHT_DTYPES

MLX_GROUP_SIZES = (32, 64, 128)
FORMATS = [(bits, group) for bits in BITS for group in GROUP_SIZES]
MLX_FORMATS = [form for form in FORMATS if form[1] in MLX_GROUP_SIZES]
OTHER_FORMATS = [form for form in FORMATS if form[1] not in MLX_GROUP_SIZES]
MAX = {dtype: torch.finfo(dtype).max for dtype in WEIGHT_DTYPES}

dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(ours: Any, oracle: Any, rows: Sequence[str] = ()) -> None:
    """`rows` names the rows, for the message."""
    ours, oracle = [[x] if isinstance(x, Tensor) else x for x in (ours, oracle)]
    for a, b in zip(ours, oracle, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        wrong = bytes_of(a) != bytes_of(b)
        if wrong.any():
            where = {rows[i] for i in wrong.nonzero()[:, 0]} if rows else "them"
            pytest.fail(f"{wrong.sum()} bytes of {a.nbytes} differ, in {where}")


# ---- oracles --------------------------------------------------------------------


@pytest.fixture(scope="module")
def mx() -> Any:
    return pytest.importorskip("mlx.core")


def to_mlx(mx: Any, tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def from_mlx(mx: Any, array: Any) -> Tensor:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        return torch.from_numpy(np.array(array)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def mlx_quantize(mx: Any, weight: Tensor, bits: int, group: int) -> list[Tensor]:
    # MLX on a GPU rounds otherwise.
    array = to_mlx(mx, weight.contiguous())
    parts = mx.quantize(array, bits=bits, group_size=group, stream=mx.cpu)
    return [from_mlx(mx, part) for part in parts]


def scalar_group(group: list[Any], bits: int) -> tuple[list[int], Any, Any]:
    """MLX's rule for one group, a number at a time: codes, scale, bias."""
    f = np.float32
    low, high, levels = min(group), max(group), f(2**bits - 1)
    scale = max((high - low) / levels, f(1e-7))
    if bits == 1:
        bias = low
    else:
        from_low = abs(low) > abs(high)
        edge = low if from_low else high
        scale = scale if from_low else -scale
        steps = np.rint(edge / scale)
        if steps == 0:
            bias = f(0)
        else:
            scale, bias = edge / steps, edge
    codes = [min(max(np.rint((w - bias) / scale), f(0)), levels) for w in group]
    return [int(code) for code in codes], scale, bias


def scalar_quantize(weight: Tensor, bits: int, group: int) -> list[Tensor]:
    """`scalar_group` over a weight [N, K]."""
    rows = weight.float().numpy()
    words, scales, biases = [], [], []
    for row in rows:
        codes = []
        for start in range(0, len(row), group):
            found = scalar_group(list(row[start : start + group]), bits)
            codes += found[0]
            scales.append(found[1])
            biases.append(found[2])
        words.append(stream(codes, bits))
    shape = (len(rows), rows.shape[1] // group)
    pairs = [torch.tensor(np.array(x)).view(shape) for x in (scales, biases)]
    packed = torch.from_numpy(np.stack(words))
    return [packed, *(pair.to(weight.dtype) for pair in pairs)]


def stream(codes: list[int], bits: int) -> Any:
    """Codes as one big little-endian number, its words."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    raw = number.to_bytes(len(codes) * bits // 8, "little")
    return np.frombuffer(raw, dtype="<u4").copy()


def round_once(values: Any, dtype: torch.dtype) -> Tensor:
    """float64 to `dtype`, half to even, with no dtype in between.

    torch goes to float16 and bfloat16 through float32. numpy knows no bfloat16: there
    the value is counted in units of its last place.
    """
    if dtype != torch.bfloat16:
        kind = str(dtype).removeprefix("torch.")
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.asarray(values).astype(kind))
    unit = last_place(values, dtype)
    rounded = np.rint(values / unit) * unit
    with np.errstate(over="ignore"):
        exact = rounded.astype(np.float32)  # beyond the range: infinite
    return torch.from_numpy((exact.view(np.uint32) >> 16).astype(np.uint16)).view(dtype)


def last_place(values: Any, dtype: torch.dtype) -> Any:
    """The unit in the last place of float64 values in `dtype`, subnormals included."""
    info = torch.finfo(dtype)
    digits = 1 - round(math.log2(info.eps))
    smallest = round(math.log2(info.tiny)) + 1
    exponent = np.maximum(np.frexp(values)[1], smallest)
    return np.ldexp(1.0, exponent - digits)


def float64_values(codes: Tensor, scales: Tensor, biases: Tensor, group: int) -> Any:
    """``code * scale + bias`` [..., K] in numpy's float64."""
    codes = codes.unflatten(-1, (-1, group)).numpy().astype(np.float64)
    scale, bias = (x.double().unsqueeze(-1).numpy() for x in (scales, biases))
    values = codes * scale + bias
    return values.reshape(*values.shape[:-2], -1)


# ---- quantize -------------------------------------------------------------------


def adversarial(bits: int, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of two groups that have made quantizers go wrong."""
    width, levels = 2 * group, 2**bits - 1
    normal = torch.randn(4, width, generator=generator(), dtype=torch.float64)
    counts = torch.randint(0, levels + 1, (4, width), generator=generator())
    tied, one, outlier = normal.clamp(-1, 1), torch.zeros(4, width), normal.clone()
    tied[:, ::group], tied[:, 1::group] = 1, -1
    one[0, 3], one[1, 5], one[2, group], one[3, -1] = 1, -1, 1e-6, -1e4
    outlier[:, 7::group] = torch.tensor([[3e4], [-3e4], [1e4], [-6e4]])
    half_way = (counts + 0.5).clamp(max=levels)  # in steps of a power of two
    half_way[:, ::group], half_way[:, 1::group] = 0, levels
    signs = torch.tensor([1.0, -1.0]).repeat(4, group)
    top = 0.99 * MAX[dtype] * torch.rand(4, width, generator=generator()).double()
    cases = {
        "equal": torch.tensor([[1.5], [-0.3], [6e-5], [-3e4]]).expand(4, width),
        "zero": torch.zeros(4, width),
        "minus zero": -torch.zeros(4, width),
        "mixed zeros": torch.zeros(4, width) * signs,
        "negative": -normal.abs() - 0.1,
        "positive": normal.abs() + 0.1,
        "far from zero": 100 + normal / 50,
        "tied extremes": tied,
        "outlier": outlier,
        "one non-zero": one,
        "half-way": half_way / 8,
        "half-way, below zero": -half_way / 8,
        "half-way, around zero": (half_way - (levels + 1) // 2) / 8,
        "alternating": signs,
        "alternating, unequal": signs * torch.linspace(0.5, 2, width),
        "at the smallest scale": normal * 1e-7 * levels,
        "tiny": normal * 3 * torch.finfo(dtype).tiny,
        "subnormal": normal * 20 * torch.finfo(dtype).smallest_normal / 64,
        "near the maximum": top,
        "near the minimum": -top,
    }
    if dtype == torch.float16 and bits > 1:
        cases["from minimum to maximum"] = signs * MAX[dtype]
    return {name: case.to(dtype) for name, case in cases.items()}


def many_groups(group: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[512, 2 * group]: every group of its own size and offset, half on a coarse grid."""
    kind, shape = {"generator": generator(seed), "dtype": torch.float64}, (512, 2)
    spread = 10 ** (4 * torch.rand(*shape, 1, **kind) - 3)
    offset = torch.randn(*shape, 1, **kind) * spread * torch.rand(*shape, 1, **kind)
    weight = torch.randn(*shape, group, **kind) * spread + offset
    grid = 2.0 ** torch.randint(-6, 1, (512, 2, 1), generator=generator(seed))
    weight[::2] = (weight / grid).round()[::2] * grid[::2]
    return weight.view(512, -1).to(dtype)


def hard_rows(
    bits: int, group: int, dtype: torch.dtype, seeds: int = 0
) -> tuple[Tensor, list[str]]:
    """All of that as one weight [N, 2 * group], and the case of each row."""
    cases = adversarial(bits, group, dtype)
    cases["many groups"] = many_groups(group, dtype, 100)[:48]
    for seed in range(seeds):
        cases[f"many groups {seed}"] = many_groups(group, dtype, seed)
    names = [name for name, rows in cases.items() for _ in range(len(rows))]
    return torch.cat(list(cases.values())), names


@dtypes
@pytest.mark.parametrize(("bits", "group"), MLX_FORMATS)
def test_quantize_is_mlx(mx: Any, bits: int, group: int, dtype: torch.dtype) -> None:
    form = {"bits": bits, "group_size": group}
    weight, names = hard_rows(bits, group, dtype, seeds=4)
    theirs = mlx_quantize(mx, weight, bits, group)
    assert_same_bits(layout.quantize(weight, **form), theirs, names)
    weight = torch.randn(512, 1024, generator=generator(bits * group)).to(dtype)
    theirs = mlx_quantize(mx, weight, bits, group)
    assert_same_bits(layout.quantize(weight, **form), theirs)
    experts = weight[:24].view(3, 8, 1024)
    theirs = mlx_quantize(mx, experts, bits, group)
    assert_same_bits(layout.quantize(experts, **form), theirs)


@dtypes
@pytest.mark.parametrize(("bits", "group"), OTHER_FORMATS)
def test_quantize_follows_the_rule_where_mlx_has_no_such_groups(
    bits: int, group: int, dtype: torch.dtype
) -> None:
    weight, names = hard_rows(bits, group, dtype)
    ours = layout.quantize(weight, bits=bits, group_size=group)
    assert_same_bits(ours, scalar_quantize(weight, bits, group), names)


@dtypes
@pytest.mark.parametrize("bits", BITS)
def test_the_scalar_rule_is_that_of_mlx(mx: Any, bits: int, dtype: torch.dtype) -> None:
    weight, names = hard_rows(bits, 64, dtype)
    theirs = mlx_quantize(mx, weight, bits, 64)
    assert_same_bits(scalar_quantize(weight, bits, 64), theirs, names)


@pytest.mark.parametrize("bits", BITS)
def test_quantize_takes_any_strides(bits: int) -> None:
    base = torch.randn(128, 6, 192, generator=generator())
    views = {
        "transposed": base[:, 0, :64].t(),
        "experts transposed": base[..., :64].permute(1, 2, 0),
        "every other row": base[::2, 1],
        "every third column": base[:, 0, ::3],
        "columns": base[:, 2, 64:128],
        "expanded": base[0, :1, :64].expand(5, 64),
        "from an odd address": base.view(-1)[1:-191].view(-1, 64)[:10],
    }
    for name, view in views.items():
        form = {"bits": bits, "group_size": 64}
        ours = layout.quantize(view, **form)
        assert all(part.is_contiguous() for part in ours), name
        assert_same_bits(ours, layout.quantize(view.contiguous().clone(), **form))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes(bits: int, group: int, shape: tuple[int, ...], device: str) -> None:
    weight = torch.ones(*shape, 512, dtype=torch.bfloat16, device=device)
    form = {"bits": bits, "group_size": group}
    packed, scales, biases = layout.quantize(weight, **form)
    assert (packed.shape, packed.dtype) == ((*shape, 16 * bits), torch.uint32)
    for part in (scales, biases):
        assert (part.shape, part.dtype) == ((*shape, 512 // group), torch.bfloat16)
    codes = layout.unpack(packed, bits=bits)
    assert (codes.shape, codes.dtype) == ((*shape, 512), torch.uint8)
    again = layout.pack(codes, bits=bits)
    assert (again.shape, again.dtype) == (packed.shape, torch.uint32)
    for dtype in (None, *layout.LOGICAL_DTYPES):
        dense = layout.dequantize(packed, scales, biases, dtype=dtype, **form)
        assert (dense.shape, dense.dtype) == (weight.shape, dtype or torch.bfloat16)
        assert {dense.device.type, again.device.type, packed.device.type} == {device}
    if device == "cpu":
        assert bool((dense == 1).all())


def test_quantize_keeps_no_graph() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 64))
    for part in layout.quantize(weight, bits=4, group_size=64):
        assert not part.requires_grad


# ---- dequantize -----------------------------------------------------------------


def random_parts(
    bits: int, group: int, dtype: torch.dtype, how: str, shape: tuple[int, ...] = (40,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Random words, with scales and biases of a kind. 1024 columns."""
    columns, g = 1024, generator(bits * group)
    words = torch.randint(-(2**31), 2**31, (*shape, columns * bits // 32), generator=g)
    sizes = (*shape, columns // group)
    if how == "any bits":  # every exponent, subnormals, zeros, both signs
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        span = 2 ** (8 * dtype.itemsize - 1)
        pair = torch.randint(-span, span, (2, *sizes), generator=g).to(integer)
        pair = pair.view(dtype)
        pair[:, ..., 1] = torch.tensor([[0.0], [-0.0]]).view(2, *[1] * len(shape))
        scales, biases = pair.where(pair.isfinite(), torch.ones((), dtype=dtype))
    else:
        scales = torch.randn(sizes, generator=g, dtype=torch.float64) / 50
        if how == "cancelling":  # some code lies at, or next to, zero
            biases = -scales * torch.randint(0, 2**bits, sizes, generator=g)
        elif how == "ordinary":
            biases = -scales * 2 ** (bits - 1)
        elif how == "far":
            biases = torch.randn(sizes, generator=g).sign() * 4096.0
        else:
            assert how == "near"
            biases = scales * 2.0**-13 * torch.randn(sizes, generator=g)
        scales, biases = scales.to(dtype), biases.to(dtype)
    return words.to(torch.int32).view(torch.uint32), scales, biases


HOW = ("ordinary", "cancelling", "far", "near", "any bits")


@dtypes
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_dequantize_is_float64_rounded_once(
    bits: int, group: int, dtype: torch.dtype
) -> None:
    for how in HOW:
        packed, scales, biases = random_parts(bits, group, dtype, how)
        codes = layout.unpack(packed, bits=bits)  # itself held to `stream`
        values = float64_values(codes, scales, biases, group)
        for target in layout.LOGICAL_DTYPES:
            ours = layout.dequantize(
                packed, scales, biases, bits=bits, group_size=group, dtype=target
            )
            expected = round_once(values, target)
            assert_same_bits(ours, expected, [f"{how}, {target}"] * len(ours))


@dtypes
@pytest.mark.parametrize("target", layout.LOGICAL_DTYPES, ids=str)
def test_dequantize_in_slices(dtype: torch.dtype, target: torch.dtype) -> None:
    """Large enough for several slices; one of them has a group out of the ordinary."""
    packed, scales, biases = random_parts(4, 64, dtype, "ordinary", (3, 500))
    biases[1, 100] = 1e4
    form = {"bits": 4, "group_size": 64}
    codes = layout.unpack(packed, bits=4)
    expected = round_once(float64_values(codes, scales, biases, 64), target)
    parts = [packed, scales, biases]
    assert_same_bits(layout.dequantize(*parts, dtype=target, **form), expected)
    strided = [torch.stack([part, part], -1)[..., 0] for part in parts]
    assert_same_bits(layout.dequantize(*strided, dtype=target, **form), expected)
    signed = [packed.view(torch.int32), scales, biases]
    assert_same_bits(layout.dequantize(*signed, dtype=target, **form), expected)


@dtypes
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_dequantize_at_all_distances_of_scale_and_bias(
    bits: int, dtype: torch.dtype
) -> None:
    """Where shorter arithmetic is tempting: one distance, one size in a weight."""
    kind, g = {"bits": bits, "group_size": 64}, generator(bits)
    ends = {torch.float16: (-23, 15), torch.float32: (-145, 127)}
    smallest, largest = ends.get(dtype, (-132, 127))
    steps = [(0, apart) for apart in range(-30, 31)]
    steps += [(size, 1) for size in (*range(smallest, smallest + 9), largest - 8)]
    for size, apart in [*steps, (largest - 1, -1), (largest, 0)]:
        packed, scales, biases = random_parts(bits, 64, dtype, "ordinary")
        pair = torch.rand(2, *scales.shape, generator=g, dtype=torch.float64) + 1
        pair *= torch.randint(0, 2, pair.shape, generator=g) * 2 - 1
        pair *= torch.tensor([2.0**size, 2.0 ** (size + apart)]).double().view(2, 1, 1)
        scales, biases = pair.clamp(-MAX[dtype], MAX[dtype]).to(dtype)
        codes = layout.unpack(packed, bits=bits)
        values = float64_values(codes, scales, biases, 64)
        for target in (torch.float16, torch.bfloat16, torch.float32):
            ours = layout.dequantize(packed, scales, biases, dtype=target, **kind)
            names = [f"2^{size}, 2^{apart}, {target}"] * len(ours)
            assert_same_bits(ours, round_once(values, target), names)


def test_the_rounding_oracle() -> None:
    """bfloat16 against torch where float32 is exact, and on ties that it is not."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator())
    values = bits.to(torch.int32).view(torch.float32)
    values = values[values.isfinite()]
    expected = values.bfloat16()
    assert_same_bits(round_once(values.double().numpy(), torch.bfloat16), expected)
    just_above_a_tie = np.array([1 + 2**-8 + 2**-40, 2**-134 + 2**-170])
    rounded = round_once(just_above_a_tie, torch.bfloat16).tolist()
    assert rounded == [1 + 2**-7, 2**-133]


@dtypes
@pytest.mark.parametrize(("bits", "group"), MLX_FORMATS)
def test_mlx_dequantizes_to_the_same_up_to_its_second_rounding(
    mx: Any, bits: int, group: int, dtype: torch.dtype
) -> None:
    """MLX rounds the product too, so its unit counts: that of the larger of both."""
    for how in HOW:
        packed, scales, biases = random_parts(bits, group, dtype, how)
        form = {"bits": bits, "group_size": group}
        ours = layout.dequantize(packed, scales, biases, **form)
        arrays = [to_mlx(mx, part) for part in (packed, scales, biases)]
        theirs = from_mlx(mx, mx.dequantize(*arrays, **form, stream=mx.cpu))
        codes = layout.unpack(packed, bits=bits)
        product = float64_values(codes, scales, torch.zeros_like(biases), group)
        # Where the product overflows, so does MLX.
        inside = (abs(product) < MAX[dtype] / 2) & ours.isfinite().numpy()
        assert inside.mean() > (0.5 if how == "any bits" else 0.99)
        ours, theirs = (x.double().numpy()[inside] for x in (ours, theirs))
        unit = last_place(np.maximum(abs(product[inside]), abs(ours)), dtype)
        assert (abs(ours - theirs) <= unit).all(), how


# ---- pack and unpack ------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_pack_is_one_little_endian_stream(bits: int) -> None:
    g = generator(bits)
    for columns in (32, 96, 160, 512):
        codes = torch.randint(0, 2**bits, (5, columns), generator=g)
        codes[0], codes[1] = 0, 2**bits - 1
        packed = layout.pack(codes, bits=bits)
        expected = np.stack([stream(row, bits) for row in codes.tolist()])
        assert_same_bits(packed, torch.from_numpy(expected))
        for words in (packed, packed.view(torch.int32)):
            assert_same_bits(layout.unpack(words, bits=bits), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 2, 2), (0, 2)], ids=str)
def test_pack_and_unpack_of_any_shape(bits: int, lead: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, (*lead, 64), generator=generator(bits))
    packed = layout.pack(codes, bits=bits)
    assert (packed.shape, packed.dtype) == ((*lead, 2 * bits), torch.uint32)
    assert_same_bits(layout.unpack(packed, bits=bits), codes.to(torch.uint8))
    rows = layout.pack(codes.reshape(-1, 64), bits=bits)
    assert_same_bits(packed, rows.view(*lead, 2 * bits))


@pytest.mark.parametrize("bits", BITS)
def test_pack_takes_any_integers_and_strides(bits: int) -> None:
    codes = torch.randint(0, min(2**bits, 128), (4, 65), generator=generator())
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        own = codes.to(dtype)
        expected = layout.pack(codes[:, 1:].clone(), bits=bits)
        assert_same_bits(layout.pack(own[:, 1:], bits=bits), expected)
        assert_same_bits(layout.pack(own[0, 1:], bits=bits), expected[0])
        columns = own[:, 1:].t().contiguous().t()
        assert_same_bits(layout.pack(columns, bits=bits), expected)
    words = layout.pack(codes[:, 1:], bits=bits)
    spread = torch.stack([words, words], -1)[..., 1]
    assert_same_bits(layout.unpack(spread, bits=bits), codes[:, 1:].to(torch.uint8))


# ---- memory ---------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(
            tensor.untyped_storage() for tensor in known
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


def peak_beyond(outputs: Callable[[], Any], *known: Tensor) -> int:
    """What `outputs()` held at its peak beyond the tensors that it returned."""
    with LiveBytes(*known) as count:
        kept = outputs()
    kept = [kept] if isinstance(kept, Tensor) else kept
    return count.peak - sum(part.nbytes for part in kept)


def test_the_count_of_live_bytes() -> None:
    x = torch.zeros(1000)
    assert peak_beyond(lambda: x + 1, x) == 0
    assert peak_beyond(lambda: (x + 1 + 1).view(10, 100) + 1, x) == 4000
    assert peak_beyond(lambda: x.view(10, 100)[1:] * 2, x) == 0


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "target"),
    [
        (1, 16, torch.float32, torch.bfloat16),
        (3, 64, torch.float16, torch.float64),
        (4, 32, torch.bfloat16, torch.bfloat16),
        (8, 256, torch.bfloat16, torch.float32),
    ],
)
def test_memory(bits: int, group: int, dtype: torch.dtype, target: torch.dtype) -> None:
    """One slice at a time: a float32 copy of this weight would be 32 MiB."""
    weight = torch.randn(1024, 8192, generator=generator()).to(dtype)
    form = {"bits": bits, "group_size": group}
    limit = 16 * 2**20
    for view in (weight, weight.t()):
        assert peak_beyond(lambda w=view: layout.quantize(w, **form), weight) < limit
    parts = layout.quantize(weight, **form)
    kind = form | {"dtype": target}
    assert peak_beyond(lambda: layout.dequantize(*parts, **kind), *parts) < limit


# ---- errors ---------------------------------------------------------------------


class TestErrors(expecttest.TestCase):
    """Each names what was seen, what is allowed and what to do."""

    def expect(self, function: Callable[[], Any], text: str) -> None:
        with pytest.raises((ValueError, TypeError)) as caught:
            function()
        error = caught.value
        message = textwrap.fill(f"{type(error).__name__}: {error}", 72)
        self.assertExpectedInline(message, text, skip=1)

    def test_format(self) -> None:
        for function in (layout.quantize, layout.dequantize):
            tensors = [torch.zeros(4, 64)] * (1 if function is layout.quantize else 3)
            for bits in (7, 0, -4, 16, 4.0, True, "4", None):
                with pytest.raises(ValueError, match=r"bits is .*; allowed are 1, "):
                    function(*tensors, bits=bits, group_size=64)
            for group in (8, 512, 0, 48, 64.0):
                with pytest.raises(ValueError, match=r"group_size is .*; allowed are"):
                    function(*tensors, bits=4, group_size=group)
        self.expect(
            lambda: layout.check_format(7, 64),
            """\
ValueError: bits is 7; allowed are 1, 2, 3, 4, 5, 6, 8. Choose one of
these integers""",
        )
        self.expect(
            lambda: layout.check_format(4, 512),
            """\
ValueError: group_size is 512; allowed are 16, 32, 64, 128, 256. Choose
one of these integers""",
        )
        self.expect(
            lambda: layout.check_format(4.0, 64),
            """\
ValueError: bits is 4.0; allowed are 1, 2, 3, 4, 5, 6, 8. Choose one of
these integers""",
        )

    def quantize(self, weight: Tensor, bits: int = 4, group: int = 64) -> Any:
        return layout.quantize(weight, bits=bits, group_size=group)

    def test_shape(self) -> None:
        q = self.quantize
        self.expect(
            lambda: q(torch.zeros(4, 96)),
            """\
ValueError: a weight of shape [4, 96] cannot be quantized: 96 columns
are not a multiple of the group size 64. Choose group_size 16 or 32, or
leave this weight dense""",
        )
        self.expect(
            lambda: q(torch.zeros(2, 3, 100)),
            """\
ValueError: a weight of shape [2, 3, 100] cannot be quantized: 100
columns are not a multiple of the group size 64. Leave this weight dense""",
        )
        self.expect(
            lambda: q(torch.zeros(4, 80), 3, 16),
            """\
ValueError: a weight of shape [4, 80] cannot be quantized: 80 columns of
3 bits do not fill whole 32-bit words. Leave this weight dense""",
        )
        self.expect(
            lambda: q(torch.zeros(4, 0)),
            """\
ValueError: a weight of shape [4, 0] cannot be quantized: its rows are
empty. Leave this weight dense""",
        )
        self.expect(
            lambda: q(torch.tensor(1.0)),
            """\
ValueError: the weight: a tensor of shape [] was given; rows [..., K]
are needed. Add a dimension, with unsqueeze(0) for example""",
        )

    def test_dtype(self) -> None:
        q = self.quantize
        self.expect(
            lambda: q(torch.zeros(4, 64, dtype=torch.float64)),
            """\
TypeError: the weight is torch.float64; allowed are float32, float16,
bfloat16. Convert it first, with weight.float() for example""",
        )
        self.expect(
            lambda: q(torch.zeros(4, 64, dtype=torch.int8)),
            """\
TypeError: the weight is torch.int8; allowed are float32, float16,
bfloat16. Convert it first, with weight.float() for example""",
        )
        for dtype in (torch.complex64, torch.bool, torch.float8_e4m3fn):
            with pytest.raises(TypeError):
                q(torch.zeros(4, 64).to(dtype))

    def test_not_finite(self) -> None:
        weight = torch.randn(3, 5, 256, generator=generator())
        for value in (math.nan, math.inf, -math.inf):
            for dtype in WEIGHT_DTYPES:
                for bits in BITS:
                    bad = weight.to(dtype, copy=True)
                    bad[1, 2, 200] = value
                    with pytest.raises(ValueError, match=r"\[1, 2, 200\] is "):
                        self.quantize(bad, bits)
        q, bad = self.quantize, weight.clone()
        bad[2, 4, 255] = math.nan
        self.expect(
            lambda: q(bad),
            """\
ValueError: the weight at [2, 4, 255] is NaN; only finite weights can be
quantized. Leave this weight dense, or mend the checkpoint""",
        )
        bad[2, 0, 64:128] = -math.inf
        self.expect(
            lambda: q(bad),
            """\
ValueError: the weight at [2, 0, 64] is infinite (-inf); only finite
weights can be quantized. Leave this weight dense, or mend the
checkpoint""",
        )
        bad[0, 0, 0] = math.inf
        self.expect(
            lambda: q(bad),
            """\
ValueError: the weight at [0, 0, 0] is infinite (inf); only finite
weights can be quantized. Leave this weight dense, or mend the
checkpoint""",
        )
        self.expect(
            lambda: q(bad[0, 0]),
            """\
ValueError: the weight at [0] is infinite (inf); only finite weights can
be quantized. Leave this weight dense, or mend the checkpoint""",
        )

    def test_not_finite_in_a_later_slice(self) -> None:
        weight = torch.zeros(3000, 512, dtype=torch.bfloat16)
        weight[2900, 70] = math.nan
        self.expect(
            lambda: self.quantize(weight),
            """\
ValueError: the weight at [2900, 70] is NaN; only finite weights can be
quantized. Leave this weight dense, or mend the checkpoint""",
        )
        with pytest.raises(ValueError, match=r"\[70, 2900\] is NaN"):
            self.quantize(weight[:2944].t())

    def test_a_scale_that_overflows(self) -> None:
        for dtype, bits in (
            (torch.float16, 1),
            (torch.bfloat16, 4),
            (torch.float32, 8),
        ):
            weight = torch.zeros(2, 128, dtype=dtype)
            weight[1, 64], weight[1, 65] = -MAX[dtype], MAX[dtype]
            with pytest.raises(ValueError, match=r"the weights at \[1, 64:128\]"):
                self.quantize(weight, bits)
        weight = torch.zeros(2, 128, dtype=torch.float16)
        weight[1, 64], weight[1, 65] = 3e4, -4e4
        self.expect(
            lambda: self.quantize(weight, 1),
            """\
ValueError: the weights at [1, 64:128] lie between -40000 and 30000, too
far apart for a scale in float16 (65504 at most). Use more bits, convert
it to float32, or leave this weight dense""",
        )
        parts = self.quantize(weight.float(), 1)  # as the message proposes
        dense = layout.dequantize(*parts, bits=1, group_size=64)
        assert dense[1, 64:66].tolist() == [3e4, -4e4]
        weight = torch.tensor([-3e38, 3e38]).repeat(32)
        self.expect(
            lambda: self.quantize(weight),
            """\
ValueError: the weights at [0:64] lie between -3e+38 and 3e+38, too far
apart for a scale in float32 (3.40282e+38 at most). Scale it down or
leave this weight dense""",
        )

    def test_pack(self) -> None:
        pack, unpack = layout.pack, layout.unpack
        codes = torch.arange(64)
        self.expect(
            lambda: pack(codes, bits=4),
            """\
ValueError: a code is 63; 4 bits hold 0 to 15. Use more bits or mend the
codes""",
        )
        self.expect(
            lambda: pack(codes - 1, bits=6),
            """\
ValueError: a code is -1; 6 bits hold 0 to 63. Use more bits or mend the
codes""",
        )
        self.expect(
            lambda: pack(codes[:12], bits=6),
            """\
ValueError: a row of 12 codes of 6 bits is not whole 32-bit words. Pad
it to a multiple of 16 codes""",
        )
        self.expect(
            lambda: pack(codes[0], bits=6),
            """\
ValueError: codes: a tensor of shape [] was given; rows [..., K] are
needed. Add a dimension, with unsqueeze(0) for example""",
        )
        self.expect(
            lambda: pack(codes.float(), bits=6),
            """\
TypeError: codes are torch.float32; an integer dtype is needed. Convert
them first, with codes.to(torch.uint8) for example""",
        )
        self.expect(
            lambda: unpack(codes, bits=6),
            """\
TypeError: packed words are torch.int64; uint32 or int32 is needed. If
these are the same bytes of another width, packed.view(torch.uint32)
reads them so""",
        )
        self.expect(
            lambda: unpack(codes[:4].int(), bits=6),
            """\
ValueError: a row of 4 words does not hold whole codes of 6 bits; a
multiple of 3 words does. Check bits""",
        )
        self.expect(
            lambda: unpack(codes[0].int(), bits=6),
            """\
ValueError: packed words: a tensor of shape [] was given; rows [..., K]
are needed. Add a dimension, with unsqueeze(0) for example""",
        )
        for bits in (0, 7, 9, 4.0):
            for function in (pack, unpack):
                with pytest.raises(ValueError, match=r"bits is .*; allowed are"):
                    function(codes.int(), bits=bits)

    def dequantize(self, *parts: Tensor, **changes: Any) -> Any:
        return layout.dequantize(*parts, **({"bits": 4, "group_size": 64} | changes))

    def test_dequantize(self) -> None:
        d, (packed, scales, biases) = self.dequantize, self.quantize(torch.ones(4, 128))
        self.expect(
            lambda: d(packed.float(), scales, biases),
            """\
TypeError: packed words are torch.float32; uint32 or int32 is needed. If
these are the same bytes of another width, packed.view(torch.uint32)
reads them so""",
        )
        self.expect(
            lambda: d(packed, scales.double(), biases.double()),
            """\
TypeError: the scales are torch.float64; allowed are float32, float16,
bfloat16. Convert scales and biases first, with scales.float() for
example""",
        )
        self.expect(
            lambda: d(packed, scales, biases[:2]),
            """\
ValueError: scales are torch.float32 [4, 2] but biases are torch.float32
[2, 2]; both must agree""",
        )
        self.expect(
            lambda: d(packed, scales, biases.half()),
            """\
ValueError: scales are torch.float32 [4, 2] but biases are torch.float16
[4, 2]; both must agree""",
        )
        self.expect(
            lambda: d(packed, scales, biases, bits=8),
            """\
ValueError: packed [4, 16] and scales [4, 2] do not fit together at 8
bits and group size 64: 2 groups are 128 columns, or 32 words a row.
Check bits, group_size and that the arrays belong to one weight""",
        )
        self.expect(
            lambda: d(packed[:2], scales, biases),
            """\
ValueError: packed [2, 16] and scales [4, 2] do not fit together at 4
bits and group size 64: 2 groups are 128 columns, or 16 words a row.
Check bits, group_size and that the arrays belong to one weight""",
        )
        self.expect(
            lambda: d(packed[0, 0], scales[0, 0], biases[0, 0]),
            """\
ValueError: packed words: a tensor of shape [] was given; rows [..., K]
are needed. Add a dimension, with unsqueeze(0) for example""",
        )
        self.expect(
            lambda: d(packed, scales, biases, dtype=torch.int8),
            """\
TypeError: dtype is torch.int8; allowed are float32, float16, bfloat16,
float64. Choose one of these""",
        )
