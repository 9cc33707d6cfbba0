"""What the translation makes of each construct that C++ does not have."""

from __future__ import annotations

import re

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

    def test_swizzles_and_literals(self) -> None:
        self.assertExpectedInline(
            lines("void f() { v.xy = a.zw + b.x * 1.5h - 2bf + 1e-3 + 0x1e5 + 3.0f; }"),
            """void f ( ) { v . template swizzled<0, 1>() = a . template swizzle<2, 3>() + b . x * half(1.5f) - bfloat(2.0f) + 1e-3f + 0x1e5 + 3.0f ; }""",  # noqa: E501
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
