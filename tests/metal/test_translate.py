"""What the translation makes of each construct that C++ does not have."""

from __future__ import annotations

import re

import pytest
from expecttest import TestCase
from metal_emulator.entries import entry_points
from metal_emulator.translate import translate


def lines(source: str, **options: bool) -> str:
    """The translated text without its frame, line markers and blank lines."""
    text = translate(f'# 1 "f.metal"\n{source}\n', **options).text
    kept = [line.strip() for line in text.split("\n")[1:-2]]
    return "\n".join(line for line in kept if line and not line.startswith("#line"))


class TestTranslate(TestCase):
    def test_address_spaces(self) -> None:
        self.assertExpectedInline(
            lines(
                """
void f(const device float* a, constant int& n, threadgroup half (&t)[4]);
constant constexpr float PI = 3.14;
float g(thread float& x) { device float* p = (device float*)h(x); return p[0]; }"""
            ),
            """\
void f ( const float * a , const int & n , half ( & t ) [ 4 ] ) ;
const constexpr float PI = 3.14f ;
float g ( float & x ) { float * p = ( float * ) h ( x ) ; return p [ 0 ] ; }""",
        )

    def test_overloads_that_only_address_spaces_tell_apart(self) -> None:
        self.assertExpectedInline(
            lines(
                """
float first(const device float* a) { return a[0]; }
float first(const threadgroup float* b) { return b[0]; }
float first(const device half* a) { return a[0]; }
struct S { float get() const thread { return v; } float get() const device { return v; }
  float v; };
template <typename T> struct name { };
template <typename T> struct name<device T*> { };
template <typename T> struct name<thread T*> { };"""
            ),
            """\
float first ( const float * a ) { return a [ 0 ] ; }
float first ( const half * a ) { return a [ 0 ] ; }
struct S { float get ( ) const { return v ; }
float v ; } ;
template < typename T > struct name { } ;
template < typename T > struct name < T * > { } ;""",
        )

    def test_threadgroup_variables(self) -> None:
        source = """
kernel void f(device float* x) {
  threadgroup vec<half, (2 * 2)> a[4 * 8][2], b;
  threadgroup float* p = x;
  threadgroup float (&r)[4] = *q;
}"""
        self.assertExpectedInline(
            re.sub(r"static const char \w+ = 0; ", "", lines(source)),
            """\
void f ( float * x ) {
using msl_type_of_a = vec < half , ( 2 * 2 ) > [ 4 * 8 ] [ 2 ] ; msl_type_of_a& a = *(msl_type_of_a*)msl_threadgroup_memory(&msl_site_of_a, "a", sizeof(msl_type_of_a), alignof(msl_type_of_a), __builtin_LINE()) ; using msl_type_of_b = vec < half , ( 2 * 2 ) > ; msl_type_of_b& b = *(msl_type_of_b*)msl_threadgroup_memory(&msl_site_of_b, "b", sizeof(msl_type_of_b), alignof(msl_type_of_b), __builtin_LINE()) ;
float * p = x ;
float ( & r ) [ 4 ] = * q ;
}""",  # noqa: E501
        )
        self.assertExpectedInline(
            lines(source, cuda=True).split("\n")[1],
            """using msl_type_of_a = vec < half , ( 2 * 2 ) > [ 4 * 8 ] [ 2 ] ; __shared__ msl_type_of_a a ; using msl_type_of_b = vec < half , ( 2 * 2 ) > ; __shared__ msl_type_of_b b ;""",  # noqa: E501
        )

    def test_threadgroup_variables_in_every_spelling(self) -> None:
        for declaration in (
            "alignas(16) threadgroup uchar s[64];",
            "threadgroup alignas(8 + 8) uchar s[64];",
            "threadgroup uchar s[64] __attribute__((aligned(16)));",
            "static threadgroup uchar s[64];",
            "uchar threadgroup s[64];",
            "[[maybe_unused]] threadgroup uchar s[64];",
            "switch (0) { case 0: threadgroup uchar s[64]; }",
            "for (;;) { x[0] = a < b; threadgroup uchar s[64]; }",
            "g([] { threadgroup uchar s[64]; });",
            "struct L { threadgroup int* at(int k) { return p; } }; "
            "threadgroup uchar s[64];",
        ):
            text = lines(f"struct S {{ S() : a{{1}} {{ {declaration} }} int a; }};")
            assert "using msl_type_of_s = uchar [ 64 ] ;" in text, declaration
            assert text.count("msl_threadgroup_memory(&msl_site_of_s") == 1
            assert "alignas" not in text
            assert "aligned" not in text
        text = lines("void f() { volatile threadgroup float s[B < 2 ? 4 : 8], t; }")
        assert "using msl_type_of_s = volatile float [ B < 2 ? 4 : 8 ] ;" in text
        assert "using msl_type_of_t = volatile float ;" in text
        text = lines("void f() { alignas(16) threadgroup uchar s[4]; }", cuda=True)
        assert "__shared__ alignas(16) msl_type_of_s s" in text

    def test_threadgroup_in_types_of_functions_and_pointers(self) -> None:
        self.assertExpectedInline(
            lines(
                """
threadgroup float* at(threadgroup float* p, uint k) { return p + k; }
struct V { int n; threadgroup T& at() const; threadgroup V* p; };
template <typename T> threadgroup T* of(T x);
using P = threadgroup float*;
void f() { x = a < 3 && *reinterpret_cast<threadgroup int*>(p) > 1; }"""
            ),
            """\
float * at ( float * p , uint k ) { return p + k ; }
struct V { int n ; T & at ( ) const ; V * p ; } ;
template < typename T > T * of ( T x ) ;
using P = float * ;
void f ( ) { x = a < 3 && * reinterpret_cast < int * > ( p ) > 1 ; }""",
        )

    def test_what_would_lose_its_meaning_is_refused(self) -> None:
        messages = []
        for source in (
            "void f() { typedef threadgroup float tgf; tgf s[64]; }",
            "using tgf = threadgroup float;",
            "void f() { threadgroup float* p, s[64]; }",
            "void f() { threadgroup float s[64], *p; }",
            "void f() { device float* threadgroup p; }",
            "void f() { threadgroup float s = 1; }",
            "void f() { alignas(32) threadgroup float s[4]; }",
            "void f() { alignas(N) threadgroup float s[4]; }",
            "threadgroup float s[64];",
            "int g(device int* p) { return 1; }\nint g(threadgroup int* p) { return 2; }",
            "template <typename T> struct W { };\n"
            "template <typename T> struct W<device T*> { int a; };\n"
            "template <typename T> struct W<threadgroup T*> { int b; };",
            "kernel void k(device int* a [[buffer(0)]], device int* b [[buffer(0)]]) {}",
            "kernel void k(device int* a [[buffer(31)]]) {}",
            "kernel void k(device int* a [[buffer(N)]]) {}",
            "kernel void k(device int* a [[buffer(2)]], constant int (&b)[4]) {}",
            'template [[host_name("x")]] kernel void k<1>(device int* a);',
        ):
            with pytest.raises(SyntaxError) as caught:
                lines(source)
            messages.append(str(caught.value).split(" cannot be filled")[0])
        self.assertExpectedInline(
            "\n".join(messages),
            """\
f.metal:1: `threadgroup` is not understood in `typedef threadgroup float tgf`
f.metal:1: `threadgroup` is not understood in `using tgf = threadgroup float`
f.metal:1: `threadgroup` declares a pointer and a variable in one: part them
f.metal:1: `threadgroup` is not understood in `* p`
f.metal:1: `threadgroup` is not understood in `device float * p`
f.metal:1: `threadgroup` is not understood in `threadgroup float s = 1`
f.metal:1: `threadgroup` memory has an alignment of 16 bytes, not of `32`
f.metal:1: `threadgroup` memory has an alignment of 16 bytes, not of `N`
f.metal:1: `threadgroup` declares a variable outside functions
f.metal:2: 'int g ( threadgroup int * p )' differs from f.metal:1 in address spaces, which C++ has not, and in its body: the two cannot be told apart
f.metal:3: 'template < typename T > struct W < threadgroup T * >' differs from f.metal:2 in address spaces, which C++ has not, and in its body: the two cannot be told apart
f.metal:1: 'b' has [[buffer(0)]], as 'a' has
f.metal:1: 'a' has [[buffer(31)]]; Metal has buffers 0 to 30
f.metal:1: the kernel's parameter 'device int * a buffer ( N )'
f.metal:1: 'b' has no [[buffer(...)]], others have: it might be buffer 0 or 3, say which
f.metal:1: 'x' instantiates 'k', which is not a kernel of this source, or one of several""",  # noqa: E501
        )

    def test_overloads_that_differ_in_names_only(self) -> None:
        self.assertExpectedInline(
            lines(
                """
template <typename T> T get(const device T* p, uint i) { return T(p[i].x); }
template <typename U> U get(const threadgroup U* q, uint j) { return U(q[j].x); }
template <typename T, int N> void set(device T (&s)[N], T v) { s[0] = v; }
template <typename T, int M> void set(thread T (&t)[M], T w) { t[0] = w; }
int three(device int*) { return 3; }
int three(threadgroup int* p) { return 3; }"""
            ),
            """\
template < typename T > T get ( const T * p , uint i ) { return T ( p [ i ] . x ) ; }
template < typename T , int N > void set ( T ( & s ) [ N ] , T v ) { s [ 0 ] = v ; }
int three ( int * ) { return 3 ; }""",
        )

    def test_limits_of_threads(self) -> None:
        for text, limit in (
            ("2 * 32", 64),
            ("(1 + 3) * 0x20u", 128),
            ("1'0 - 2", 8),
            ("BM * 2", None),
        ):
            attribute = f"[[kernel, max_total_threads_per_threadgroup({text})]]"
            found = translate(f"{attribute} void k(device int* a) {{}}").entries
            assert [entry.max_threads for entry in found] == [limit]

    def test_kernels_of_one_name_in_two_namespaces(self) -> None:
        source = """
namespace a { template <int N> kernel void k(device int* x) {} }
namespace b { template <int N> kernel void k(device int* x, device int* y) {}
namespace c {
template [[host_name("inner")]] kernel void k<1>(device int*, device int*);
} }
template [[host_name("outer")]] kernel void a::k<1>(device int* x);
"""
        found = {e.name: e.buffers for e in translate(source).entries}
        assert found == {"inner": 2, "outer": 1}

    def test_swizzles_and_literals(self) -> None:
        self.assertExpectedInline(
            lines("void f() { v.xy = a.zw + b.x * 1.5h - 2bf + 1e-3 + 0x1e5 + 3.0f; }"),
            """void f ( ) { v . template swizzled<0, 1>() = a . template swizzle<2, 3>() + b . x * half(1.5f) - bfloat(2.0f) + 1e-3f + 0x1e5 + 3.0f ; }""",  # noqa: E501
        )
        self.assertExpectedInline(
            lines("auto g = p->xy + 1'000 + 1'0.5 + 0x1.8p-1 + 0x1p2f + 0x1p1h + 0xE;"),
            """auto g = p -> template swizzle<0, 1>() + 1'000 + 10.5f + 0x1.8p-1f + 0x1p2f + half(0x1p1f) + 0xE ;""",  # noqa: E501
        )

    def test_global_names_stay_inside(self) -> None:
        self.assertExpectedInline(
            lines("using ::metal::min; int a = ::b::c + d::e<f>::g + decltype(h)::i;"),
            """using :: msl :: metal :: min ; int a = :: msl :: b :: c + d :: e < f > :: g + decltype ( h ) :: i ;""",  # noqa: E501
        )

    def test_entries(self) -> None:
        translation = translate(
            """# 1 "f.metal"
namespace inner {
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(64)]] void f(
    device T* x [[buffer(1)]], constant int& n, device T* y [[buffer(0)]],
    uint2 at [[thread_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]);
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(64)]] void f(
    device T* x [[buffer(1)]], constant int& n, device T* y [[buffer(0)]],
    uint2 at [[thread_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {}
template [[host_name("f_" "float")]] [[kernel]]
decltype(f<float, (1 > 0)>) f<float, (1 > 0)>;
}
[[host_name("renamed")]] kernel void plain(device float* x) {}
"""
        )
        self.assertExpectedInline(
            "\n".join(
                f"{e.name}: {e.namespace or '-'} {e.function}, {e.buffers} buffers, "
                f"{e.max_threads} threads: "
                + ", ".join(
                    p.attribute + (f" {p.buffer}" if p.buffer is not None else "")
                    for p in e.parameters
                )
                for e in translation.entries
            ),
            """\
f_float: inner f < float , ( 1 > 0 ) >, 3 buffers, 64 threads: buffer 1, buffer 2, buffer 0, thread_position_in_grid, thread_index_in_simdgroup
renamed: - plain, 1 buffers, None threads: buffer 0""",  # noqa: E501
        )
        text = entry_points(translation.entries)
        assert "namespace inner { static void msl_entry_0(" in text
        assert '{"renamed", msl_entry_1, msl_bindings_1, 1},' in text

    def test_lines_are_those_of_the_source(self) -> None:
        text = translate('# 7 "f.metal"\nint a;\n\n\n\n\n\nint b;\n').text
        self.assertExpectedInline(
            "\n".join(line.rstrip() for line in text.splitlines()),
            """\
namespace msl {

#line 7 "f.metal"
int a ;
#line 13 "f.metal"
int b ;
}""",
        )
