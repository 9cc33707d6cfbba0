"""Legal source in usual and unusual spellings compiles, and computes what it says."""

from __future__ import annotations

import metal_emulator as emulator
import pytest
import torch
from metal_emulator import lint

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
# Every lane writes its value to shared memory `s` and reads another lane's from there.
EXCHANGE = """\
        s[i] = i + 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[i] = s[31 - i];"""
REVERSED = torch.arange(32, 0, -1).float()
VARIABLES = {
    "alignas_before": "alignas(16) threadgroup uchar s[64];",
    "alignas_after": "threadgroup alignas(16) uchar s[64];",
    "attribute": "threadgroup uchar s[64] __attribute__((aligned(16)));",
    "volatile_before": "volatile threadgroup float s[64];",
    "volatile_after": "threadgroup volatile float s[64];",
    "space_after_type": "float threadgroup s[64];",
    "vector_type": "vec<float, 2> threadgroup t[16]; "
    "threadgroup float* s = (threadgroup float*)t;",
    "ternary_size": "threadgroup float t[(SIZE > 2 ? 64 : 32)], s[SIZE < 2 ? 8 : 32];",
}
SOURCE = (
    HEAD
    + "constant constexpr int SIZE = 4;\n"
    + "\n".join(
        f"kernel void {name}(device float* o, uint i [[thread_position_in_grid]]) "
        f"{{\n{line}\n{EXCHANGE}\n}}"
        for name, line in VARIABLES.items()
    )
    + """
kernel void case_label(device float* o, uint i [[thread_position_in_grid]]) {
    switch (SIZE) {
        case 4:
            threadgroup float s[32];
"""
    + EXCHANGE
    + """
    }
}

threadgroup float* at(threadgroup float* p, uint k);
inline threadgroup float* at(threadgroup float* p, uint k) { return p + k; }
struct View {
    threadgroup float* p;
    int unused;
    threadgroup float& at(uint k) const { return p[k]; }
};
kernel void results(device float* o, uint i [[thread_position_in_grid]]) {
    threadgroup float s[32];
    View view{s, 0};
    *at(s, i) = i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    view.at(i) += 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[i] = *at(view.p, 31 - i);
}

template <int bits, enable_if_t<bits < 8, bool> = true>
float small(device float* p) { return bits; }
template <int bits, enable_if_t<(bits >= 8), bool> = true>
float small(device float* p) { return -bits; }
kernel void conditions(device float* o, uint i [[thread_position_in_grid]]) {
    o[i] = small<4>(o) * 100 + small<8>(o);
}

template <typename T> T same(const device T* p, uint i) { return p[i]; }
template <typename U> U same(const threadgroup U* q, uint j) { return q[j]; }
float which(float) { return 1; }
float which(half) { return 2; }
kernel void small_things [[max_total_threads_per_threadgroup(2 * 32)]] (
    [[maybe_unused]] device float* o [[buffer(SLOT + 0)]],
    [[maybe_unused]] constant int& n, uint i [[thread_position_in_grid]]) {
    threadgroup float s[32];
    s[i] = 0.5;
    float4 v(1, 2, 3, 4);
    thread float4* p = &v;
    p->xy = p->zw;
    o[i] = 1'000 + p->yzw.x + same(s, i) + which(0x1.8p1) * 0x1p4;
    o[i] = same(o, i);
}

namespace a {
template <int N> kernel void twice(device float* o, uint i [[thread_position_in_grid]]) {
    o[i] = N;
}
}
namespace b {
template <int N> kernel void twice(device float* p, device float* o,
                                   uint i [[thread_position_in_grid]]) {
    o[i] = p[i] = -N;
}
typedef decltype(twice<2>) type;
template [[host_name("second")]] kernel type twice<2>;
}
template [[host_name("first")]] kernel decltype(a::twice<1>) a::twice<1>;
"""
)


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    return emulator.compile_shader(SOURCE, defines=["SLOT=0"]).build()


def launched(library: emulator.Library, name: str, *more: object) -> torch.Tensor:
    out = torch.zeros(32)
    kernel = getattr(library, name)
    kernel(out, *more, threads=32, group_size=32)
    return out


@pytest.mark.parametrize("name", [*VARIABLES, "case_label", "results"])
def test_threadgroup_memory_is_shared(library: emulator.Library, name: str) -> None:
    for order in ("forward", "backward"):
        with emulator.run(order=order):
            assert torch.equal(launched(library, name), REVERSED)


def test_comparisons_in_template_parameters(library: emulator.Library) -> None:
    assert torch.equal(launched(library, "conditions"), torch.full((32,), 392.0))


def test_small_things(library: emulator.Library) -> None:
    # 1000, the former w, half a unit from shared memory, and 16 of a float literal.
    expected = torch.full((32,), 1000 + 4 + 0.5 + 16)
    assert torch.equal(launched(library, "small_things", 7), expected)
    assert library.small_things.max_threads_per_threadgroup == 64


def test_kernels_of_one_name(library: emulator.Library) -> None:
    out = torch.zeros(32)
    assert torch.equal(launched(library, "first"), torch.full((32,), 1.0))
    assert torch.equal(launched(library, "second", out), torch.full((32,), -2.0))
    assert torch.equal(out, torch.full((32,), -2.0))


def test_the_lint_reads_it_too() -> None:
    assert lint.lint(SOURCE, defines=["SLOT=0"], compiler=False) == []
