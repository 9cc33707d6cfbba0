"""The emulator's Metal types and functions, against torch, numpy, float64 and integers."""

from __future__ import annotations

from collections.abc import Callable

import metal_emulator as emulator
import numpy as np
import pytest
import torch
from torch import Tensor

LANES = 32
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def each(name: str, source: str, result: str, expression: str) -> str:
    """A kernel that sets o[i] to an expression in a[i] and b[i]."""
    return f"""
kernel void {name}(device const {source}* a, device const {source}* b,
                   device {result}* o, constant int& n,
                   uint lane [[thread_position_in_grid]]) {{
    for (int i = lane; i < n; i += {LANES}) {{
        {source} x = a[i];
        {source} y = b[i];
        o[i] = {expression};
    }}
}}
"""


def launch(kernel: emulator.Kernel, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    kernel(a, b, out, len(out), threads=LANES, group_size=LANES, arg_casts={3: "int32"})
    return out


def patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, with any NaN for a NaN."""
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    finite = ~got.isnan()
    assert torch.equal(got[finite].view(bits), expected[finite].view(bits))


SIXTEEN = {"half": torch.float16, "bfloat": torch.bfloat16}


@pytest.fixture(scope="module")
def sixteen() -> emulator.Library:
    text = HEAD
    for name in SIXTEEN:
        text += each(f"{name}_widen", name, "float", "x")
        text += each(f"{name}_round", "float", name, f"{name}(x)")
        for label, sign in (("add", "+"), ("sub", "-"), ("mul", "*"), ("div", "/")):
            text += each(f"{name}_{label}", name, name, f"x {sign} y")
        text += each(f"{name}_chain", name, name, "x * y + x")
        text += each(f"{name}_less", name, "uchar", "uchar((x < y) + 2 * (x == y))")
    text += each("half_next", "half", "half", "nextafter(x, y)")
    return emulator.compile_shader(text)


@pytest.mark.parametrize("name", SIXTEEN)
def test_16_bit_conversions(sixteen: emulator.Library, name: str) -> None:
    dtype = SIXTEEN[name]
    all_values = patterns(dtype)
    wide = launch(
        getattr(sixteen, f"{name}_widen"), all_values, all_values, torch.zeros(2**16)
    )
    assert_same(wide, all_values.float())

    # Every midpoint between neighbours, and floats right beside it, decide the rounding.
    values = np.sort(wide[wide.isfinite()].numpy())
    middle = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32)
    floats = torch.from_numpy(
        np.concatenate(
            [
                middle,
                np.nextafter(middle, np.float32(np.inf)),
                np.nextafter(middle, np.float32(-np.inf)),
                random.view(np.float32),
                np.float32(
                    [65519.9, 65520, 65536, 3e38, np.inf, -np.inf, np.nan, 1e-45]
                ),
            ]
        )
    )
    got = launch(
        getattr(sixteen, f"{name}_round"),
        floats,
        floats,
        floats.to(dtype).clone().zero_(),
    )
    assert_same(got, floats.to(dtype))


@pytest.mark.parametrize("name", SIXTEEN)
def test_16_bit_arithmetic_rounds_every_operation(
    sixteen: emulator.Library, name: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    dtype = SIXTEEN[name]
    bits = torch.randint(-(2**15), 2**15, (2, 50_000), generator=generator)
    a, b = bits.to(torch.int16).view(dtype)
    expected = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b}
    expected["chain"] = a * b + a
    for label, value in expected.items():
        got = launch(getattr(sixteen, f"{name}_{label}"), a, b, torch.zeros_like(a))
        assert_same(got, value)
    less = launch(
        getattr(sixteen, f"{name}_less"), a, b, torch.zeros(len(a), dtype=torch.uint8)
    )
    assert torch.equal(less, (a < b).to(torch.uint8) + 2 * (a == b).to(torch.uint8))


def test_nextafter_steps_in_the_format_of_its_arguments(
    sixteen: emulator.Library,
) -> None:
    x = patterns(torch.float16)
    x = x[x.isfinite() & (x != 0)]
    for towards in (float("inf"), -float("inf"), 0.0):
        y = torch.full_like(x, towards)
        got = launch(sixteen.half_next, x, y, torch.zeros_like(x))
        with np.errstate(over="ignore"):
            expected = np.nextafter(x.numpy(), y.numpy())
        assert_same(got, torch.from_numpy(expected))


def sine_of_half_turns(x: np.ndarray) -> np.ndarray:
    turn = x - 2 * np.rint(x / 2)
    size = np.abs(turn)
    return np.copysign(np.sin(np.pi * np.where(size > 0.5, 1 - size, size)), turn)


def cosine_of_half_turns(x: np.ndarray) -> np.ndarray:
    return np.sin(np.pi * (0.5 - np.abs(x - 2 * np.rint(x / 2))))


def away_from_zero(x: np.ndarray) -> np.ndarray:
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


# In units of the last place: what Metal promises for precise functions, or 0 for exact
# ones.  https://developer.apple.com/metal/Metal-Shading-Language-Specification.pdf
FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "acos": (np.arccos, 4),
    "acosh": (np.arccosh, 4),
    "asin": (np.arcsin, 4),
    "asinh": (np.arcsinh, 4),
    "atan": (np.arctan, 5),
    "atanh": (np.arctanh, 5),
    "ceil": (np.ceil, 0),
    "cos": (np.cos, 4),
    "cosh": (np.cosh, 4),
    "cospi": (cosine_of_half_turns, 4),
    "exp": (np.exp, 4),
    "exp2": (np.exp2, 4),
    "exp10": (lambda x: np.power(10.0, x), 4),
    "fabs": (np.abs, 0),
    "floor": (np.floor, 0),
    "log": (np.log, 4),
    "log2": (np.log2, 4),
    "log10": (np.log10, 4),
    "rint": (np.rint, 0),
    "round": (away_from_zero, 0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2),
    "saturate": (lambda x: np.clip(x, 0, 1), 0),
    "sign": (np.sign, 0),
    "sin": (np.sin, 4),
    "sinh": (np.sinh, 4),
    "sinpi": (sine_of_half_turns, 4),
    "sqrt": (np.sqrt, 0.5),
    "tan": (np.tan, 6),
    "tanh": (np.tanh, 5),
    "trunc": (np.trunc, 0),
}


@pytest.fixture(scope="module")
def functions() -> emulator.Library:
    text = HEAD
    for name in FUNCTIONS:
        text += each(f"{name}_float", "float", "float", f"precise::{name}(x)")
        text += each(f"{name}_half", "half", "half", f"{name}(x)")
    return emulator.compile_shader(text)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(functions: emulator.Library, name: str) -> None:
    reference, limit = FUNCTIONS[name]
    generator = np.random.default_rng(2)
    x = np.concatenate(
        [
            generator.uniform(-10, 10, 3000),
            generator.uniform(-1, 1, 3000),
            np.arange(-6, 6.25, 0.25),
        ]
    ).astype(np.float32)
    tensor = torch.from_numpy(x)
    got = launch(
        getattr(functions, f"{name}_float"), tensor, tensor, torch.zeros(len(x))
    ).numpy()
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
        rounded = exact.astype(np.float32)
        assert np.array_equal(np.isnan(got), np.isnan(rounded))
        assert np.array_equal(np.isinf(got), np.isinf(rounded))
        finite = np.isfinite(rounded)
        unit = np.spacing(np.maximum(np.abs(rounded[finite]), np.float32(2**-126)))
        error = np.abs(got[finite].astype(np.float64) - exact[finite]) / unit
    assert error.max() <= limit

    # A half is computed in float and rounded once: at most the neighbour of the nearest.
    short = tensor.half()
    got16 = launch(getattr(functions, f"{name}_half"), short, short, short.clone())
    with np.errstate(all="ignore"):
        nearest = reference(short.double().numpy()).astype(np.float16)
    steps = got16.numpy().view(np.int16).astype(int) - nearest.view(np.int16).astype(
        int
    )
    same = (got16.numpy() == nearest) | np.isnan(nearest)
    assert np.array_equal(np.isnan(got16.numpy()), np.isnan(nearest))
    assert np.abs(steps[~same]).max(initial=0) <= 1


INTEGERS = {
    "char": torch.int8,
    "uchar": torch.uint8,
    "short": torch.int16,
    "ushort": torch.uint16,
    "int": torch.int32,
    "uint": torch.uint32,
    "long": torch.int64,
    "ulong": torch.uint64,
}
CALLS = {
    "abs": "abs(x)",
    "absdiff": "absdiff(x, y)",
    "addsat": "addsat(x, y)",
    "clz": "clz(x)",
    "ctz": "ctz(x)",
    "extract_bits": "extract_bits(x, 3, 4)",
    "hadd": "hadd(x, y)",
    "insert_bits": "insert_bits(x, y, 3, 4)",
    "madsat": "madsat(x, y, x)",
    "max": "max(x, y)",
    "min": "min(x, y)",
    "mulhi": "mulhi(x, y)",
    "popcount": "popcount(x)",
    "reverse_bits": "reverse_bits(x)",
    "rhadd": "rhadd(x, y)",
    "rotate": "rotate(x, y)",
    "subsat": "subsat(x, y)",
}


def integer_result(call: str, x: int, y: int, bits: int, low: int) -> int:
    """What a call returns before it wraps around, in Python's unbounded integers."""
    high = low + 2**bits - 1
    mask = 2**bits - 1
    pattern = x & mask
    turn = y % bits

    def saturated(value: int) -> int:
        return min(max(value, low), high)

    field = pattern >> 3 & 15
    results = {
        "abs": abs(x),
        "absdiff": abs(x - y),
        "addsat": saturated(x + y),
        "clz": bits - pattern.bit_length(),
        "ctz": (pattern & -pattern).bit_length() - 1 if pattern else bits,
        "extract_bits": field - 16 if low and field >= 8 else field,
        "hadd": (x + y) >> 1,
        "insert_bits": (x & ~(15 << 3)) | (y & 15) << 3,
        "madsat": saturated(x * y + x),
        "max": max(x, y),
        "min": min(x, y),
        "mulhi": (x * y) >> bits,
        "popcount": pattern.bit_count(),
        "reverse_bits": int(f"{pattern:0{bits}b}"[::-1], 2),
        "rhadd": (x + y + 1) >> 1,
        "rotate": pattern << turn | pattern >> (bits - turn),
        "subsat": saturated(x - y),
    }
    return results[call]


@pytest.fixture(scope="module")
def integers() -> emulator.Library:
    """A kernel for each type, which writes a row for each call."""
    text = HEAD
    for name in INTEGERS:
        rows = "".join(
            f"o[{row} * n + i] = {name}({expression});\n"
            for row, expression in enumerate(CALLS.values())
        )
        text += f"""
kernel void {name}_calls(device const {name}* a, device const {name}* b,
                         device {name}* o, constant int& n,
                         uint lane [[thread_position_in_grid]]) {{
    for (int i = lane; i < n; i += {LANES}) {{
        {name} x = a[i];
        {name} y = b[i];
        {rows}
    }}
}}
"""
    return emulator.compile_shader(text)


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_functions(integers: emulator.Library, name: str) -> None:
    info = torch.iinfo(INTEGERS[name])
    generator = np.random.default_rng(3)
    dtype = np.dtype(str(INTEGERS[name]).removeprefix("torch."))
    edges = np.array([info.min, info.min + 1, 0, 1, 5, info.max - 1, info.max], dtype)
    random = generator.integers(info.min, info.max, (2, 150), dtype, endpoint=True)
    x = np.concatenate([np.repeat(edges, len(edges)), random[0]])
    y = np.concatenate([np.tile(edges, len(edges)), random[1]])
    out = torch.zeros(len(CALLS), len(x), dtype=INTEGERS[name])
    getattr(integers, f"{name}_calls")(
        torch.from_numpy(x),
        torch.from_numpy(y),
        out,
        len(x),
        threads=LANES,
        group_size=LANES,
        arg_casts={3: "int32"},
    )
    for call, got in zip(CALLS, out.tolist(), strict=True):
        expected = [
            integer_result(call, a, b, info.bits, info.min)
            for a, b in zip(x.tolist(), y.tolist(), strict=True)
        ]
        wrapped = [(value - info.min) % 2**info.bits + info.min for value in expected]
        assert got == wrapped, call


# What a kernel may assume at compile time; a false claim does not compile.
CLAIMS = """
static_assert(is_same_v<decltype(half(1) + half(1)), half>);
static_assert(is_same_v<decltype(half(1) + 1), half>);
static_assert(is_same_v<decltype(1.0f * half(1)), float>);
static_assert(is_same_v<decltype(bfloat(1) - 2u), bfloat>);
static_assert(is_same_v<decltype(bfloat(1) / 2.0f), float>);
static_assert(is_same_v<decltype(max(half(1), half(2))), half>);
static_assert(is_same_v<decltype(exp(bfloat(1))), bfloat>);
static_assert(is_same_v<decltype(pow(2.0f, 2)), float>);
static_assert(is_same_v<decltype(float4(1) < 2), bool4>);
static_assert(is_same_v<decltype(absdiff(int3(1), int3(2))), uint3>);
static_assert(is_convertible_v<float, half> && is_convertible_v<half, int>);
static_assert(is_convertible_v<bfloat, float> && !is_convertible_v<float, bfloat>);
static_assert(!is_convertible_v<bfloat, half> && !is_convertible_v<half, bfloat>);
static_assert(sizeof(float3) == 16 && alignof(float3) == 16 && sizeof(half2) == 4);
static_assert(sizeof(packed_float3) == 12 && alignof(packed_float3) == 4);
static_assert(half(65519.0f) == HALF_MAX && half(65520.0f) == half(INFINITY));
static_assert(half(0x1p-25f) == 0 && half(0x1.8p-24f) == half(0x1p-23f));
static_assert(numeric_limits<half>::max() == 65504);
static_assert(numeric_limits<bfloat>::epsilon() == bfloat(0.0078125f));
static_assert(numeric_limits<float>::lowest() == -FLT_MAX);
static_assert(numeric_limits<int>::min() == INT_MIN && LONG_MAX > UINT_MAX);
static_assert(numeric_limits<float>::infinity() == INFINITY && NAN != NAN);
static_assert(is_signed_v<char> && !is_signed_v<uint> && is_floating_point_v<bfloat>);
static_assert(as_type<uint>(1.0f) == 0x3f800000 && as_type<half>(ushort(0x3c00)) == 1);
"""

VECTORS = """
kernel void vectors(device float* o, device float4* wide, device packed_float3* packed) {
    float4 v = float4(float2(1, 2), 3, 4);
    v.xz = v.wy * 10;          // 40 2 20 4
    v.yw += 1;                 // 40 3 20 5
    wide[0] = v;
    wide[1] = float4(v.zyx, dot(v, v));
    wide[1].zw = v.xx;
    wide[2] = select(v, float4(0), v > 4.5f);
    wide[3] = clamp(v, 4, 30.0f);
    packed[1] = packed[0] * 2 + float3(1, 2, 3);
    uint2 halves = as_type<uint2>(0x100000002ul);
    int k = 3;
    o[0] = v[k] + v.z;
    o[1] = halves.x * 10 + halves.y;
    o[2] = length(float3(2, 3, 6)) + cross(float3(1, 0, 0), float3(0, 1, 0)).z;
    o[3] = all(v > 2) + 2 * any(v > 100) + 4 * any(isnan(float2(NAN, 1)));
    float whole;
    int exponent;
    o[4] = modf(-2.75f, whole) * 100 + whole;
    o[5] = frexp(48.0f, exponent) * 100 + exponent;
    o[6] = float(half(2049) + half(1)) + ldexp(0.5f, 3);
    o[7] = mix(1.0f, 3.0f, 0.25f) + smoothstep(0.0f, 2.0f, 1.0f) + step(2.0f, 1.0f);
}
"""


def test_types_traits_and_limits() -> None:
    emulator.compile_shader(HEAD + CLAIMS + "kernel void nothing(device int* o) {}")


@pytest.mark.parametrize("trace", [False, True])
def test_vectors(trace: bool) -> None:
    library = emulator.compile_shader(HEAD + VECTORS)
    out = torch.zeros(8)
    wide = torch.zeros(4, 4)
    packed = torch.tensor([[1.0, 2, 3], [0, 0, 0]])
    with emulator.run(trace=trace):
        library.vectors(out, wide, packed, threads=1, group_size=1)
    assert wide.tolist() == [
        [40, 3, 20, 5],
        [20, 3, 40, 40],
        [0, 3, 0, 0],
        [30, 4, 20, 5],
    ]
    assert packed[1].tolist() == [3, 6, 9]
    # 2049 is no half: it becomes 2048, and 2048 + 1 is a tie that stays there.
    assert out.tolist() == [25, 21, 8, 5, -77, 81, 2052, 2]


@pytest.mark.parametrize(
    ("refused", "accepted"),
    [
        ("o[0] = max(1.0f, 2);", "o[0] = max(1.0f, 2.0f);"),
        ("o[0] = min(1u, 2);", "o[0] = min(1u, 2u);"),
        ("o[0] = sqrt(2);", "o[0] = sqrt(2.0f);"),
        ("o[0] = fma(1.0h, 1.0h, 1.0f);", "o[0] = fma(1.0h, 1.0h, 1.0h);"),
        ("o[0] = 3.0f % 2.0f;", "o[0] = 3 % 2;"),
        ("o[0] = 3.0h % 2.0h;", "o[0] = fmod(3.0h, 2.0h);"),
        ("o[0] = dot(float3(1), float4(1));", "o[0] = dot(float3(1), float3(1));"),
        ("float4 v = float3(1) + float4(1);", "float4 v = float4(1) + float4(1);"),
        ("float2 v = float2(1) + int2(1);", "float2 v = float2(1) + float2(int2(1));"),
        ("bfloat x = o[0];", "bfloat x = bfloat(o[0]);"),
        ("half x = bfloat(1);", "half x = half(bfloat(1));"),
        ("float3 v = float3(1, 2);", "float3 v = float3(1, float2(2));"),
        ("float x = float2(1).z;", "float x = float2(1).y;"),
    ],
)
def test_what_metal_refuses_does_not_compile(refused: str, accepted: str) -> None:
    text = HEAD + "kernel void f(device float* o) {{ {} }}"
    emulator.compile_shader(text.format(accepted))
    with pytest.raises(SyntaxError):
        emulator.compile_shader(text.format(refused))
