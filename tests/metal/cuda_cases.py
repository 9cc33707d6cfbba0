"""What on_cuda.py runs on the CPU emulator and on an NVIDIA GPU: kernels and inputs.

A case is a function of a library: it calls kernels with CPU tensors and returns what
they wrote. On a GPU, the kernels it is given move the tensors there and back.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import metal_emulator as emulator
import mlx_kernels
import shader_cases
import torch
from metal_emulator import cuda
from mlx_kernels import GROUP_SIZES, TYPES, Headers, Variant
from mlx_references import Inputs, expected_quantize
from torch import Tensor

HERE = Path(__file__).parent
SCALARS = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "int": torch.int32,
    "uint": torch.uint32,
    "char": torch.int8,
    "uchar": torch.uint8,
    "ushort": torch.uint16,
    "long": torch.int64,
}
WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: which library it needs, and what it runs there."""

    name: str
    library: str  # "own", a variant of a shader, or a type of MLX's kernels
    run: Callable[[Any], list[Tensor]]


def on_gpu(tensor: Tensor) -> Tensor:
    """A copy with the same strides, which `cuda()` alone gives dense tensors only."""
    if tensor.is_contiguous():
        return tensor.cuda()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((last + 1,), (1,)).cuda()
    return memory.as_strided(tensor.shape, tensor.stride())


class OnGpu:
    """A GPU library whose kernels take CPU tensors."""

    def __init__(self, library: cuda.Library) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(self._library, name)

        def call(*args: Any, **settings: Any) -> None:
            moved = [on_gpu(a) if isinstance(a, Tensor) else a for a in args]
            kernel(*moved, **settings)
            for before, after in zip(args, moved, strict=True):
                if isinstance(before, Tensor):
                    before.copy_(after)

        return call


def metal_source(name: str) -> str:
    """A file beside this one, such that messages name it."""
    return f'#line 1 "{name}"\n' + (HERE / name).read_text(encoding="utf-8")


def library_source(name: str) -> tuple[str, list[Path]]:
    """The source of a case's library, and where its headers are."""
    if name.startswith(shader_cases.PREFIX):
        return shader_sources()[name], []
    if name == "own":
        return metal_source("cuda_cases.metal"), []
    return mlx_kernels.source(variants(name)), [mlx_kernels.installed_headers().folder]


@functools.cache
def shader_sources() -> dict[str, str]:
    return shader_cases.sources()


def cpu_library(name: str) -> emulator.Library:
    source, folders = library_source(name)
    return emulator.compile_shader(source, include_dirs=folders)


def gpu_library(name: str, *, guard: bool = False) -> cuda.Library:
    source, folders = library_source(name)
    return cuda.compile_shader(source, include_dirs=folders, guard=guard)


# --------------------------------------------------------------------------- own kernels
def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return Inputs(seed).normal(*shape).to(dtype)


def whole_bits(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all, as a type."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize * count
    octets = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    return octets.view(dtype)


def numbers(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small numbers of a type, whole ones for integers."""
    if dtype.is_floating_point:
        return normal(count, seed=seed, dtype=dtype)
    return Inputs(seed).whole(-100, 100, count).to(dtype)


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What no kernel writes: NaN, or 77."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77).to(dtype)


def positions(threads: tuple[int, ...], group: tuple[int, ...], kernels: Any) -> list:
    out = filled(*reversed(threads), 12, dtype=torch.int32)
    kernels.positions(out, threads=threads, group_size=group)
    return [out]


def arguments(kernels: Any) -> list[Tensor]:
    out = filled(8)
    values = (-(2**40), 0.1, [3, -5], (7, -9), 0.1, 0.1, 200)
    casts = {3: "int32", 4: "int16", 5: "fp16", 6: "bf16", 7: "uint8"}
    kernels.arguments(out, *values, threads=8, group_size=8, arg_casts=casts)
    return [out]


def scaled(kernels: Any) -> list[Tensor]:
    """Names of the host that are no identifiers of C."""
    out = []
    for name, dtype in (("half, 3", torch.float16), ("float, 4", torch.float32)):
        y = filled(1000, dtype=dtype)
        getattr(kernels, f"scaled<{name}>")(normal(1000, dtype=dtype), y, threads=1000)
        out.append(y)
    return out


def transposed(rows: int, columns: int, kernels: Any) -> list[Tensor]:
    out = filled(columns, rows)
    threads = (-(-columns // 16) * 16, -(-rows // 16) * 16)
    launch = {"threads": threads, "group_size": (16, 16), "arg_casts": "int32"}
    kernels.transposed(normal(rows, columns), out, (columns, rows), **launch)
    return [out]


def sums(name: str, threads: int, group: int, kernels: Any) -> list[Tensor]:
    out = filled(-(-threads // group))
    getattr(kernels, name)(normal(threads), out, threads=threads, group_size=group)
    return [out]


def product(type_: str, m: int, n: int, k: int, kernels: Any) -> list[Tensor]:
    dtype = SCALARS[type_]
    a, b, out = (
        normal(m, k, dtype=dtype),
        normal(k, n, seed=1, dtype=dtype),
        filled(m, n),
    )
    out = out.to(dtype)
    getattr(kernels, f"product_{type_}")(
        *(a, b, out, (m, n, k, 0)),
        threads=(-(-n // 8) * 8, -(-m // 8) * 8),
        group_size=(8, 8),
        arg_casts="int32",
    )
    return [out]


def lanes(
    name: str, dtype: torch.dtype, rows: int, n: int, group: int, kernels: Any
) -> list[Tensor]:
    """Kernels that write a row for each function, a column for each thread."""
    x = numbers(n, dtype, seed=n) if dtype != torch.uint32 else whole_bits(n, dtype, n)
    out = filled(rows, n, dtype=dtype)
    getattr(kernels, name)(x, out, threads=n, group_size=group)
    return [out]


def shuffles(type_: str, kernels: Any) -> list[Tensor]:
    if type_ == "float3":
        x, out = normal(96, 4), filled(13, 96, 4).zero_()
    else:
        x, out = numbers(96, SCALARS[type_], 5), filled(13, 96, dtype=SCALARS[type_])
    launch = {"threads": 96, "group_size": 96}
    getattr(kernels, f"shuffles_{type_}")(x, out, **launch)
    # The fourth component of a float3 is padding, which a kernel may leave as it was.
    return [out[..., :3].contiguous() if type_ == "float3" else out]


def matrices(type_: str, blocks: int, kernels: Any) -> list[Tensor]:
    dtype, size = SCALARS[type_], 8 * blocks
    a, b = (normal(size, size, seed=seed, dtype=dtype) for seed in (1, 2))
    out = filled(size, size, dtype=torch.float32 if type_ == "bfloat" else dtype)
    launch = {"threads": (32 * blocks, blocks), "group_size": (32, 1)}
    function = getattr(kernels, f"matrices_{type_}")
    function(a, b, out, blocks, arg_casts="int32", **launch)
    return [out]


def arithmetic(type_: str, kernels: Any) -> list[Tensor]:
    """Any bits; for 16-bit types all values, each beside any other."""
    dtype, count = SCALARS[type_], 2**16
    a, b = whole_bits(count, dtype, 3), whole_bits(count, dtype, 4)
    if dtype.itemsize == 2:
        a = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    b[::3] = normal(len(b[::3]), seed=5, dtype=dtype)
    out, wide = filled(19, count, dtype=dtype), filled(3, count)
    function = getattr(kernels, f"arithmetic_{type_}")
    function(a, b, out, wide, threads=count, group_size=256)
    return [out, wide]


def conversions(kernels: Any) -> list[Tensor]:
    x, count = whole_bits(2**16, torch.float32, 6), 2**16
    x[::2] = normal(count // 2) * 1000
    x[1::4] = normal(count // 4).to(torch.float16) * (1 + 2**-11)
    halves, brains = filled(count, dtype=torch.float16), filled(count).bfloat16()
    out = (halves, brains, filled(count, dtype=torch.int32))
    kernels.conversions(x, *out, threads=count, group_size=256)
    return list(out)


def integers(type_: str, kernels: Any) -> list[Tensor]:
    dtype, count = SCALARS[type_], 2**14
    a, b = whole_bits(count, dtype, 7), whole_bits(count, dtype, 8)
    out = filled(12, count, dtype=dtype)
    function = getattr(kernels, f"integers_{type_}")
    function(a, b, out, threads=count, group_size=128)
    return [out]


def vectors(kernels: Any) -> list[Tensor]:
    out = filled(7, 1000, 4)
    a, b = normal(1000, 3), normal(1000, 4, seed=1)
    kernels.vectors(a, b, out, threads=1000, group_size=64)
    return [out]


def atomics(kernels: Any) -> list[Tensor]:
    x = whole_bits(5000, torch.int32, 9)
    counts, range_ = (
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    )
    total, flags = torch.zeros(1), torch.tensor([0, 0, -1, 1], dtype=torch.int32)
    kernels.atomics(x, counts, range_, total, flags, threads=5000, group_size=256)
    return [counts, range_, total, flags]


def gemv(rows: int, words: int, kernels: Any) -> list[Tensor]:
    packed, scales = whole_bits(rows * words, torch.int32, 1), normal(rows, words)
    scales = scales[:, : (words + 7) // 8].half().contiguous()
    x, y = normal(8 * words), filled(rows)
    launch = {"threads": 128 * -(-rows // 4), "group_size": 128}
    kernels.gemv(packed, scales, x, y, (rows, words), arg_casts="int32", **launch)
    return [y]


def own_cases() -> Iterator[Case]:
    """Kernels of cuda_cases.metal."""

    def case(function: Callable[..., list[Tensor]], *settings: Any) -> Case:
        label = " ".join([function.__name__, *map(str, settings)])
        return Case(label, "own", functools.partial(function, *settings))

    for threads, group in [
        ((1000,), (256,)),
        ((33, 7), (32, 4)),
        ((10, 6, 3), (8, 4, 2)),
        ((100000, 3), (96, 2)),
    ]:
        yield case(positions, threads, group)
    yield case(arguments)
    yield case(scaled)
    for rows, columns in [(16, 16), (64, 48), (37, 53), (5, 200)]:
        yield case(transposed, rows, columns)
    for threads, limit in [(1024, 1024), (512, 64), (1000, 96), (37, 37)]:
        yield case(sums, "tree", threads, limit)
        yield case(sums, "group_sum", threads, limit)
    for type_ in ("float", "half", "bfloat"):
        yield case(product, type_, 24, 16, 32)
        yield case(product, type_, 29, 19, 45)
        yield case(arithmetic, type_)
        yield case(matrices, type_, 1)
        yield case(matrices, type_, 3)
    for type_ in ("float", "half", "bfloat", "int"):
        for n, limit in [(128, 64), (100, 100), (45, 32)]:
            yield case(lanes, f"reductions_{type_}", SCALARS[type_], 9, n, limit)
    for n, limit in [(128, 128), (77, 64)]:
        yield case(lanes, "bits", torch.uint32, 7, n, limit)
    for type_ in ("float", "half", "uchar", "long", "float3"):
        yield case(shuffles, type_)
    for type_ in ("char", "ushort", "int", "uint", "long"):
        yield case(integers, type_)
    yield from map(case, (conversions, vectors, atomics))
    yield case(gemv, 16, 256)
    yield case(gemv, 13, 77)


# ------------------------------------------------------------------------- MLX's kernels
def combinations(type_: str) -> Iterator[tuple[int, int]]:
    """(bits, group size): over all types every size meets every width."""
    shift = list(TYPES).index(type_)
    for index, bits in enumerate(WIDTHS):
        yield bits, GROUP_SIZES[(index + shift) % len(GROUP_SIZES)]


def variants(type_: str) -> Iterator[Variant]:
    for bits, size in combinations(type_):
        yield Variant("affine_qmv_fast", type_, size, bits, (False,))
        yield Variant("affine_qmv", type_, size, bits, (False,))
        yield Variant("affine_qmm_t", type_, size, bits, (True, False))
        yield Variant("affine_qmm_t", type_, size, bits, (False, False))
        yield Variant("affine_quantize", type_, size, bits)
        yield Variant("affine_dequantize", type_, size, bits)


def shapes(variant: Variant) -> list[tuple[int, int, int]]:
    """M, N and K of products; rows, nothing and K of the others."""
    size, block = variant.group_size, 256 if variant.bits in (6, 8) else 512
    if variant.kernel == "affine_qmv_fast":
        return [(1, 8, block), (3, 40, 2 * block)]
    if variant.kernel == "affine_qmv":
        return [(1, 7, 512 + size), (2, 3, 5 * size), (3, 36, 1024)]
    if variant.kernel == "affine_qmm_t":
        aligned = variant.flags[0]
        if aligned:
            return [(32, 32, size), (40, 64, 2 * size)]
        return [(1, 33, size), (40, 72, 2 * size), (20, 7, 3 * size)]
    return [(24, 0, 2 * size)]


def run_mlx(
    variant: Variant, shape: tuple[int, int, int], headers: Headers, kernels: Any
) -> list[Tensor]:
    function, size = getattr(kernels, variant.name), variant.group_size
    inputs, dtype = Inputs(variant.bits), TYPES[variant.type]
    m, n, k = shape
    if variant.kernel == "affine_quantize":
        values = inputs.to_quantize(size, variant.bits).to(dtype)
        codes = ~expected_quantize(values, variant.bits, size).packed
        return [*mlx_kernels.run_quantize(function, values, codes, size), codes]
    if variant.kernel == "affine_dequantize":
        weights, _ = inputs.product((1, m, k), size, variant.bits, dtype)
        return [mlx_kernels.run_dequantize(function, weights)]
    weights, x = inputs.product(shape, size, variant.bits, dtype)
    if variant.kernel == "affine_qmm_t":
        if headers.reads_past_n and not variant.flags[0]:
            weights = weights.padded(32)
        return [mlx_kernels.run_qmm(function, weights, x, n)]
    return [mlx_kernels.run_qmv(function, weights, x)]


def mlx_cases() -> Iterator[Case]:
    """MLX's own kernels; raises HeadersMissing where they are not installed."""
    headers = mlx_kernels.installed_headers()
    for type_ in TYPES:
        for variant in variants(type_):
            for shape in shapes(variant):
                run = functools.partial(run_mlx, variant, shape, headers)
                yield Case(f"{variant.name} {shape}", type_, run)


def shader_products() -> Iterator[Case]:
    """The project's own kernels."""
    for product, choice in shader_cases.products():
        library = shader_cases.name_of(shader_cases.plans.variant_of(product, choice))
        run = functools.partial(shader_cases.run, product, choice)
        yield Case(library, library, run)
    for variant in shader_cases.values():
        library = shader_cases.name_of(variant)
        run = functools.partial(shader_cases.run_values, variant)
        yield Case(library, library, run)


def all_cases() -> tuple[list[Case], str]:
    """Every case that can run here, and what is missing, if anything is."""
    cases = [*own_cases(), *shader_products()]
    try:
        return [*cases, *mlx_cases()], ""
    except mlx_kernels.HeadersMissing as missing:
        return cases, str(missing)


def libraries(cases: list[Case]) -> list[str]:
    """The libraries that cases need, each once."""
    return [name for name, _ in itertools.groupby(case.library for case in cases)]
