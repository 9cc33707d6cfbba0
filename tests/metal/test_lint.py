"""The lint reports each thing that Metal refuses, on its line, and nothing else.

Every case is a source whose planted line ends in `// !`, and a twin without the plant.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import mlx_kernels
import pytest
import torch
from metal_emulator import compilers, lint
from metal_emulator.lint import messages, spaces
from mlx_kernels import Variant

KERNEL = "kernel void k(device float* x, uint i [[thread_position_in_grid]])"
TORCH = Path(torch.__file__).parent / "include"


@dataclasses.dataclass
class Case:
    """A planted source, what is said of it, and its clean twin."""

    name: str
    planted: str
    says: str
    clean: str


def in_kernel(name: str, planted: str, says: str, clean: str) -> Case:
    """A case whose lines stand in a kernel's body."""
    return Case(name, f"{KERNEL} {{\n{planted}\n}}", says, f"{KERNEL} {{\n{clean}\n}}")


def call(name: str, function: str, planted: str, says: str, clean: str) -> Case:
    """A case of one function, and the kernel's body that calls it."""
    texts = (f"{function}\n{KERNEL} {{\n{body}\n}}" for body in (planted, clean))
    return Case(name, next(texts), says, next(texts))


BARE = "without an address space"
TOKENS = [
    Case("parameter", "float f(float* p) { return *p; } // !", BARE,
         "float f(device float* p) { return *p; }"),
    Case("reference", "float f(const float& p) { return p; } // !", BARE,
         "float f(const thread float& p) { return p; }"),
    Case("array reference", "float f(float (&p)[2]) { return p[0]; } // !", BARE,
         "float f(thread float (&p)[2]) { return p[0]; }"),
    Case("forwarding", "template <class T> float f(T&& p) { return p; } // !", BARE,
         "template <class T> float f(thread T& p) { return p; }"),
    Case("unnamed parameter", "float f(float*); // !", BARE, "float f(device float*);"),
    Case("result", "float* f(device float* p); // !", BARE,
         "device float* f(device float* p);"),
    Case("method", "struct S {\n float f(int* p) { return *p; } // !\n};", BARE,
         "struct S {\n float f(constant int* p) { return *p; }\n};"),
    Case("constructor", "struct S {\n int a;\n S(const S& s) : a(s.a) {} // !\n};", BARE,
         "struct S {\n int a;\n S(const thread S& s) : a(s.a) {}\n};"),
    Case("member", "struct S {\n const float* p; // !\n};", BARE,
         "struct S {\n const device float* p;\n};"),
    Case("alias", "using P = float*; // !", BARE, "using P = device float*;"),
    Case("typedef", "typedef float* P; // !", BARE, "typedef device float* P;"),
    Case("template argument",
         "template <class T> struct S {};\ntemplate <> struct S<int*> {}; // !", BARE,
         "template <class T> struct S {};\ntemplate <> struct S<device int*> {};"),
    in_kernel("local", "float* p = &x[0]; // !", BARE, "device float* p = &x[0];"),
    in_kernel("local auto", "auto& p = x[0]; // !", BARE, "device auto& p = x[0];"),
    in_kernel("loop", "float a[2] = {};\nfor (float& p : a) p = 1; // !", BARE,
              "float a[2] = {};\nfor (thread float& p : a) p = 1;"),
    in_kernel("cast", "x[0] = *(float*)x; // !", BARE, "x[0] = *(device float*)x;"),
    in_kernel("static_cast", "x[0] = *static_cast<const float*>(x); // !", BARE,
              "x[0] = *static_cast<const device float*>(x);"),
    in_kernel("products are no pointers", "float* y; // !", BARE,
              "int a = 2, b = 3; a = a * b; int c[] = {a * b, a & b}; x[a * b] = c[b];\n"
              "for (int j = 0; j < a * b; ++j) { x[j] = (a > b) ? a * b : a & b; }"),
    in_kernel("double", "double d = 1; // !", "double", "float d = 1.0;"),
    in_kernel("long double", "x[0] = 1.0L; // !", "long double", "x[0] = 1.0 + 1L;"),
    in_kernel("std", "x[0] = std::min(x[0], x[1]); // !", "std::",
              "x[0] = metal::min(x[0], x[1]);"),
    in_kernel("new", "device int* p = new int[2]; // !", "new", "int p[2];"),
    in_kernel("goto", "goto end; // !\nend: x[0] = 1;", "goto", "x[0] = 1;"),
    in_kernel("malloc", "auto p = malloc(4); // !", "malloc", "auto p = x;"),
    in_kernel("printf", 'printf("%f", x[0]); // !', "printf", "(void)x[0];"),
    in_kernel("asm", 'asm("nop"); // !', "asm", ";"),
    in_kernel("thread_local", "thread_local int a; // !", "thread_local", "int a;"),
    Case("virtual", "struct S {\n virtual int f() { return 1; } // !\n};", "virtual",
         "struct S {\n int f() { return 1; }\n S(int) = delete;\n};"),
    Case("recursion",
         "int f(int n) { return n < 2 ? 1 : n * f(n - 1); } // !", "f -> f",
         "int f(int n, int a) { return n + a; }\nint f(int n) { return f(n, 1); }"),
    Case("mutual recursion",
         "int g(int n);\nint f(int n) { return g(n); } // !\nint g(int n) { return f(n); }",
         "f -> g -> f",
         "template <int N> int f() { return f<N - 1>(); }\n"
         "template <> int f<0>() { return 0; }\n"
         "namespace a { inline int h(int n) { return n; } }\n"
         "struct S { int h(int n) { return a::h(n); } };\n"
         "inline float exp(int n) { return exp(float(n)); }"),
    in_kernel("lambda", "auto f = [x](int j) { return x[j]; }; // !", "lambda",
              "int a[2] = {1, 2}; int b = a[0]; x[a[b]] = 1;"),
    Case("threadgroup elsewhere",
         "void f() {\n threadgroup float a[4]; // !\n a[0] = 1;\n}", "not in a kernel",
         "void f(threadgroup float* a) {\n threadgroup float* b = a; b[0] = 1;\n}"),
    in_kernel("initialised", "threadgroup int a[2] = {1, 2}; // !", "is initialised",
              "threadgroup int a[2 * 3], b; a[0] = b = 1;"),
    in_kernel("device local", "device float y; // !", "cannot be in `device`",
              "device float* y = x;"),
    in_kernel("static", "static int n = 1; // !", "must be in `constant`",
              "static constant int n = 1; (void)n;"),
    Case("by value", "float f(device float x) { return x; } // !", "by value",
         "float f(thread float x, constant int y[2]) { return x + y[0]; }"),
    Case("global", "const int n = 1; // !", "must be in `constant`",
         "constant int n = 1;\nconstexpr constant int m[2] = {n, 2};\nint f(int a);"),
    Case("static member", "struct S {\n static constexpr int n = 1; // !\n};",
         "must be in `constant`",
         "struct S {\n static constexpr constant int n = 1;\n int m = 1;\n};"),
    Case("result of a kernel", "kernel int k(device int* x) { return 1; } // !",
         "returns void", "[[kernel]] void k(device int* x) {}"),
    Case("thread argument", "kernel void k(thread int* x) {} // !", "in `thread`",
         "kernel void k(constant int* x) {}"),
    Case("threadgroup argument",
         "kernel void k(threadgroup int* x [[threadgroup(0)]]) {} // !", "cannot give it",
         "kernel void k(device int* x [[buffer(3)]], constant int& n) {}"),
    Case("no attribute", "kernel void k(device int* x, uint i) {} // !",
         "nor has it an attribute",
         "kernel void k(device int* x, uint i [[thread_index_in_simdgroup]]) {}"),
    Case("buffer twice",
         "kernel void k(device int* x [[buffer(1)]], device int* y [[buffer(1)]]) {} // !",
         "taken by `x`",
         "kernel void k(device int* x [[buffer(1)]], device int* y [[buffer(0)]]) {}"),
    Case("buffer 31", "kernel void k(device int* x [[buffer(31)]]) {} // !", "0 to 30",
         "kernel void k(device int* x [[buffer(30)]]) {}"),
    Case("signed position",
         "kernel void k(device int* x, int i [[thread_position_in_grid]]) {} // !",
         "not `int`",
         "kernel void k(device int* x, ushort2 i [[thread_position_in_grid]],\n"
         " uint2 j [[threadgroup_position_in_grid]], uint l "
         "[[thread_index_in_threadgroup]]) {}"),
    Case("positions of two sizes",
         "kernel void k(device int* x, uint3 i [[thread_position_in_grid]], // !\n"
         " uint2 j [[threadgroup_position_in_grid]]) {}", "of 2 and of 3",
         "kernel void k(device int* x, uint3 i [[thread_position_in_grid]],\n"
         " uint3 j [[threadgroup_position_in_grid]]) {}"),
    Case("function constant", "constant bool c [[function_constant(0)]]; // !",
         "cannot set it", "constant bool c = true;"),
    in_kernel("wide vector", "half8 h; // !", "2 to 4", "half4 h; uint8_t a; (void)a;"),
    in_kernel("wide vec", "vec<float, 8> h; // !", "2 to 4", "vec<float, 4> h;"),
    in_kernel("not ASCII", "x[0] = 1; // \u00e9 // !", "ASCII", "x[0] = 1; // e"),
]  # fmt: skip
GROUP = "inline float f(threadgroup float* p) { return p[0]; }"
ANY = "template <class T> inline T f(threadgroup const T* p, T a) { return p[0] + a; }"
OWN = "inline void f(thread float& p) { p = 1; }"
LOADER = """\
template <class T> struct Loader {
    const device T* from; threadgroup T* to;
    Loader(const device T* a, threadgroup T* b) : from(a), to(b) {}
    void go() { to[0] = from[0]; }
};"""
SIZES = "struct Sizes { int n; float4 v; };"
SPACES = [
    call("pointer", GROUP, "x[0] = f(x); // !",
         "passes a `device` pointer where a `threadgroup` pointer is asked for",
         "threadgroup float t[4]; x[0] = f(t);"),
    call("template's pointer", ANY, "x[0] = f(x, 1.0f); // !",
         "passes a `device` pointer where a `threadgroup` pointer is asked for",
         "threadgroup float t[4]; x[0] = f(t, 1.0f);"),
    call("value", OWN, "f(x[0]); // !",
         "passes a `device` value where a `thread` reference is asked for",
         "float y; f(y); x[0] = y;"),
    call("in a class template", LOADER, "Loader<float> l(x, x); l.go(); // !",
         "passes a `device` pointer where a `threadgroup` pointer is asked for",
         "threadgroup float t[4]; Loader<float> l(x, t); l.go();"),
    in_kernel("initialisation", "threadgroup float* t = x; // !", "'threadgroup float *'",
              "device float* t = x;"),
    in_kernel("assignment", "threadgroup float t[4];\nx = t; // !", "'device float *'",
              "threadgroup float t[4];\nt[0] = x[0]; x[1] = t[1];"),
    in_kernel("binding", "thread float& y = x[0]; // !", "changes address space",
              "device float& y = x[0];"),
    in_kernel("choice", "threadgroup float t[4];\nx[0] = *(i ? x : t); // !",
              "incompatible operand types", "x[0] = *(i ? x : x + 1);"),
    in_kernel("C cast", "x[0] = *(threadgroup float*)&x[1]; // !", "casts a pointer",
              "x[0] = *(device uchar*)&x[1] + *(thread half*)&i;"),
    in_kernel("reinterpret_cast", "x[0] = *reinterpret_cast<constant float*>(x); // !",
              "is not allowed", "x[0] = *reinterpret_cast<device int*>(x);"),
    in_kernel("simdgroup_load", "float a[64];\nsimdgroup_float8x8 m;\n"
              "simdgroup_load(m, a); // !", "simdgroup_load",
              "threadgroup float a[64];\nsimdgroup_float8x8 m;\nsimdgroup_load(m, a, 8);\n"
              "simdgroup_load(m, x, 8, ulong2(0, 1), true); simdgroup_store(m, x);"),
    in_kernel("matrix of another type", "simdgroup_half8x8 m;\nsimdgroup_load(m, x); // !",
              "('half' vs. 'float')", "simdgroup_float8x8 m;\nsimdgroup_load(m, x);"),
    in_kernel("atomic", "atomic_int a;\n"
              "atomic_fetch_add_explicit(&a, 1, memory_order_relaxed); // !",
              "atomic_fetch_add_explicit",
              "threadgroup atomic_int a;\n"
              "atomic_store_explicit(&a, 0, memory_order_relaxed);\n"
              "device atomic_uint* b = (device atomic_uint*)x;\n"
              "atomic_fetch_add_explicit(b + 1, 1u, memory_order_relaxed);"),
    Case("only when instantiated",
         "template <class T> kernel void k(device T* x) {\n"
         " threadgroup T* p = x + sizeof(T); // !\n}\n"
         'template [[host_name("k_half")]] kernel void k<half>(device half* x);',
         "threadgroup half *",
         "template <class T> [[kernel]] void k(device T* x) {\n"
         " device T* p = x + sizeof(T); p[0] = T(1);\n}\n"
         'template [[host_name("k_half")]] [[kernel]] decltype(k<half>) k<half>;'),
    Case("global constant",
         "constant float table[2] = {1, 2};\n"
         "kernel void k(device float* x) {\n const device float* p = table; // !\n}",
         "'device float const *'",
         "constant float table[2] = {1, 2};\n"
         "kernel void k(device float* x) {\n constant float* p = table; x[0] = p[1];\n}"),
    call("structures are copied", SIZES, "constant Sizes* s = (constant Sizes*)x; // !",
         "casts a pointer",
         "device Sizes* s = (device Sizes*)x; threadgroup Sizes t[2];\n"
         "Sizes own = s[0]; t[0] = own; own = t[1]; s[1] = own;\n"
         "s[2].v.xy = float2(own.n, 1) + float4(own.v.xy, 1, 2).zw; own.v[i] = 2;"),
    in_kernel("structured binding", "int2 a[1];\nauto [b] = a; // !", "newer than C++14",
              "int2 a[1];\nauto b = a[0]; if constexpr (sizeof(b) == 8) x[0] = b.y;"),
    Case("fold", "template <class... A> int f(A... a) { return (a + ...); } // !",
         "newer than C++14", "template <class... A> int f(A...) { return sizeof...(A); }"),
]  # fmt: skip


def marked(source: str) -> list[int]:
    lines = source.split("\n")
    return [n for n, line in enumerate(lines, 1) if line.endswith("// !")]


def with_library(source: str) -> str:
    return "#include <metal_stdlib>\nusing namespace metal;\n" + source


def found(source: str, **options: bool) -> list[tuple[int, str]]:
    problems = lint.lint(source, **options)
    assert {p.file for p in problems} <= {"program_source"}
    return [(p.line, p.message) for p in problems]


needs_clang = pytest.mark.skipif(
    spaces.find_clang() is None, reason="there is no clang 17 or newer"
)


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case.name)
def test_rule(case: Case) -> None:
    planted = with_library(case.planted)
    problems = found(planted, compiler=False)
    assert [line for line, _ in problems] == marked(planted), problems
    assert all(case.says in message for _, message in problems)


@needs_clang
@pytest.mark.parametrize("case", SPACES, ids=lambda case: case.name)
def test_compiler(case: Case) -> None:
    planted = with_library(case.planted)
    problems = found(planted)
    assert [line for line, _ in problems] == marked(planted), problems
    assert all(case.says in message for _, message in problems)
    assert found(planted, compiler=False) == []


@needs_clang
@pytest.mark.parametrize("case", [*TOKENS, *SPACES], ids=lambda case: case.name)
def test_clean_twin(case: Case) -> None:
    assert found(with_library(case.clean)) == []


def test_allowed() -> None:
    """What torch's host cannot do, and later versions of Metal can."""
    constant = "constant bool c [[function_constant(0)]];"
    assert found(constant, compiler=False, function_constants=True) == []
    argument = "kernel void k(threadgroup int* x [[threadgroup(0)]]) {}"
    assert found(argument, compiler=False, threadgroup_arguments=True) == []
    closure = "void f() { auto g = [](int a) { return a; }; }"
    assert lint.lint(closure, compiler=False, language_version=320) == []
    assert len(lint.lint(closure, compiler=False)) == 1


def test_headers(tmp_path: Path) -> None:
    """Problems are told from headers of include_dirs, with their own lines."""
    header = tmp_path / "own.h"
    header.write_text("#pragma once\n\ninline float f(float* p) { return *p; }\n")
    (problem,) = lint.lint('#include "own.h"\n', [tmp_path], compiler=False)
    assert (Path(problem.file), problem.line) == (header, 3)
    assert str(problem).startswith(f"{header}:3: ")


def test_without_clang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "find_clang", lambda: None)
    with pytest.raises(RuntimeError, match="pip install ziglang"):
        lint.lint("kernel void k(device int* x) {}")
    assert lint.lint("kernel void k(device int* x) {}", compiler=False) == []


# ------------------------------------------------------------- kernels that Apple takes
def test_torch_headers() -> None:
    names = sorted(path.name for path in (TORCH / "c10/metal").glob("*.h"))
    assert {"utils.h", "reduction_utils.h"} <= set(names)
    source = "".join(f"#include <c10/metal/{name}>\n" for name in names)
    source += """
        using namespace metal;
        kernel void sum(device float* x, constant half* y,
                        uint tid [[thread_position_in_threadgroup]],
                        uint size [[threads_per_threadgroup]]) {
            threadgroup float shared[32];
            float total = c10::metal::threadgroup_sum(shared, float(y[tid]), tid, size);
            x[tid] = c10::metal::max(total, x[tid]);
        }
    """
    compiler = spaces.find_clang() is not None
    assert lint.lint(source, [TORCH], compiler=compiler) == []


VARIANTS = [
    variant
    for type_, size, bits in [("float", 64, 4), ("half", 32, 3), ("bfloat16_t", 128, 6)]
    for variant in (
        Variant("affine_qmv_fast", type_, size, bits, (False,)),
        Variant("affine_qmv", type_, size, bits, (True,)),
        Variant("affine_qvm", type_, size, bits, (False,)),
        Variant("affine_qmm_t", type_, size, bits, (True, False)),
        Variant("affine_qmm_t", type_, size, bits, (False, False)),
        Variant("affine_qmm_n", type_, size, bits, (False,)),
        Variant("affine_quantize", type_, size, bits),
        Variant("affine_dequantize", type_, size, bits),
    )
]  # fmt: skip
# What clang says of MLX's kernels that is about the translation, not about them.
APPROXIMATE = (
    # Methods that only the address space of `this` tells apart.
    r"constructor cannot be redeclared",
    r"class member cannot be redeclared",
    r"multiple overloads of 'operator .*' instantiate to the same signature",
    # Copies of structures between address spaces.
    r"no viable overloaded '='",
    # `complex_t<half>{...}`, whose constructors are among the above.
    r"static assertion expression is not an integral constant expression",
    r"no matching constructor for initialization of '.*complex",
)


def mlx_folder() -> Path:
    try:
        return mlx_kernels.installed_headers().folder
    except mlx_kernels.HeadersMissing as missing:
        pytest.skip(str(missing))


def test_mlx_rules() -> None:
    folder = mlx_folder()
    source = mlx_kernels.source(VARIANTS)
    problems = lint.lint(source, [folder], compiler=False)
    assert {re.sub(":.*", "", p.message) for p in problems} <= {"a function constant"}
    assert lint.lint(source, [folder], compiler=False, function_constants=True) == []


@needs_clang
def test_mlx_compiler() -> None:
    """Clean, and not because clang understood too little to complain."""
    folder = mlx_folder()
    source = mlx_kernels.source(VARIANTS)
    assert lint.lint(source, [folder], function_constants=True) == []
    preprocessed = compilers.preprocess(source, include_dirs=[folder])
    ignored = {d.text for d in spaces.check(preprocessed) if d.kind == "error"}
    pattern = re.compile("|".join(APPROXIMATE))
    assert [text for text in ignored if not pattern.match(text)] == []


@needs_clang
def test_mlx_planted(tmp_path: Path) -> None:
    """A mismatch deep in MLX's templates is found, where it is."""
    folder = mlx_folder()
    text = (folder / mlx_kernels.KERNELS / "quantized.h").read_text(encoding="utf-8")
    wrong = text.replace("mma_op.mma(Xs, Ws);", "mma_op.mma(Xs, y);", 1)
    assert wrong != text
    copy = tmp_path / mlx_kernels.KERNELS / "quantized.h"
    copy.parent.mkdir(parents=True)
    copy.write_text(wrong, encoding="utf-8")
    line = wrong[: wrong.index("mma_op.mma(Xs, y);")].count("\n") + 1
    source = mlx_kernels.source(VARIANTS[3:5])
    problems = lint.lint(source, [tmp_path, folder], function_constants=True)
    assert {(Path(p.file), p.line) for p in problems} == {(copy, line)}
    assert "of type 'threadgroup float const *'" in problems[0].message


@needs_clang
def test_nothing_ignored() -> None:
    """In a kernel as ours will be written clang has nothing to say at all."""
    source = with_library("""
        template <typename T, int size>
        inline float part(const device uint* w, const thread float* x, T scale) {
            float sum = 0;
            #pragma clang loop unroll(full)
            for (int j = 0; j < size; j++) {
                sum = fma(x[j], float(w[j / 8] >> (4 * (j % 8)) & 15u), sum);
            }
            return sum * float(scale);
        }
        template <typename T, int size>
        kernel void gemv(device const uint* w, device const T* scales, device const T* x,
                         device T* y, constant int4& sizes,
                         uint3 group [[threadgroup_position_in_grid]],
                         uint simd [[simdgroup_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
            threadgroup float partial[4];
            float own[size];
            const device vec<T, 4>* rows = (const device vec<T, 4>*)(x + group.y);
            for (int j = 0; j < size; j += 4) {
                vec<T, 4> v = rows[lane + j / 4];
                float4 wide = float4(v) * float4(1, 0.5, float2(2, 1.0h));
                own[j] = wide.x; own[j + 1] = wide.y;
                own[j + 2] = dot(wide, float4(1)); own[j + 3] = select(wide.w, 0.0f, j > 3);
            }
            float sum = simd_sum(part<T, size>(w, own, scales[group.x]));
            if (lane == 0) { partial[simd] = sum; }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (simd == 0 && lane < 4 && int(lane) < sizes.x) {
                y[group.x] = T(quad_sum(partial[lane]) + as_type<float>(sizes.y));
            }
        }
        template [[host_name("gemv_half")]] kernel void gemv<half, 8>(
            device const uint*, device const half*, device const half*, device half*,
            constant int4&, uint3, uint, uint);
        template [[host_name("gemv_bfloat")]] [[kernel]]
        decltype(gemv<bfloat, 16>) gemv<bfloat, 16>;
    """)
    assert lint.lint(source) == []
    said = spaces.check(compilers.preprocess(source))
    assert [f"{d.line}: {d.text}" for d in said] == []


@pytest.mark.skipif(spaces.zig_clang() is None, reason="ziglang is not installed")
def test_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clang of ziglang says what any other says."""
    monkeypatch.setattr(spaces, "find_clang", spaces.zig_clang)
    for case in SPACES:
        planted = with_library(case.planted)
        assert [line for line, _ in found(planted)] == marked(planted), case.name
        assert found(with_library(case.clean)) == [], case.name


def test_messages() -> None:
    """clang's messages are read with their notes; those that do not count are dropped."""
    text = (
        "a.metal:3:5: error: no matching function for call to 'f'\n"
        "a.metal:1:7: note: candidate function not viable: cannot pass pointer to address "
        "space '1' as a pointer to address space '3' in 2nd argument\n"
        "a.metal:9:5: error: use of undeclared identifier 'y'\n"
    )
    first, second = messages.parse(text)
    assert (first.file, first.line, len(first.notes)) == ("a.metal", 3, 1)
    assert messages.meaning(first) == (
        "no matching function for call to 'f': passes a `device` pointer where a "
        "`threadgroup` pointer is asked for (2nd argument)"
    )
    assert messages.meaning(second) is None
