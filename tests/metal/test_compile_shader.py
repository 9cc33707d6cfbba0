"""The stand-in behaves as `torch.mps.compile_shader` does, and says what it refuses."""

from __future__ import annotations

import metal_emulator as emulator
import pytest
import torch
from expecttest import TestCase

PRELUDE = "#include <metal_stdlib>\nusing namespace metal;\n"

FULL = """
kernel void full(device float* out, constant float& value,
                 uint i [[thread_position_in_grid]]) {
  out[i] = value;
}
kernel void copy(device const float* a, device float* out,
                 uint i [[thread_position_in_grid]]) {
  out[i] = a[i];
}
kernel void where(device uint* out, uint3 at [[thread_position_in_grid]],
                  uint3 group [[threadgroup_position_in_grid]],
                  uint3 inside [[thread_position_in_threadgroup]],
                  uint3 threads [[threads_per_grid]],
                  uint3 size [[threads_per_threadgroup]],
                  uint3 full [[dispatch_threads_per_threadgroup]],
                  uint3 groups [[threadgroups_per_grid]],
                  uint index [[thread_index_in_threadgroup]],
                  uint simdgroup [[simdgroup_index_in_threadgroup]],
                  uint lane [[thread_index_in_simdgroup]],
                  uint simdgroups [[simdgroups_per_threadgroup]]) {
  device uint* row = out + 12 * (at.x + threads.x * (at.y + threads.y * at.z));
  row[0] = group.x + 100 * group.y + 10000 * group.z;
  row[1] = inside.x + 100 * inside.y + 10000 * inside.z;
  row[2] = size.x + 100 * size.y + 10000 * size.z;
  row[3] = full.x + 100 * full.y + 10000 * full.z;
  row[4] = groups.x + 100 * groups.y + 10000 * groups.z;
  row[5] = index;
  row[6] = simdgroup;
  row[7] = lane;
  row[8] = simdgroups;
  row[9] = row[10] = row[11] = 7;
}
kernel void bytes(device uchar* out, constant uchar* value, constant int& count,
                  uint i [[thread_position_in_grid]]) {
  if (int(i) < count) out[i] = value[i];
}
"""


@pytest.fixture(scope="module")
def lib() -> emulator.Library:
    return emulator.compile_shader(PRELUDE + FULL)


def test_the_example_of_torch_s_documentation() -> None:
    source = """kernel void full(device float* out, constant float& val,
                     uint idx [[thread_position_in_grid]]) { out[idx] = val; }"""
    lib = emulator.compile_shader(source)
    x = torch.zeros(16)
    lib.full(x, 3.14)
    assert torch.equal(x, torch.full((16,), 3.14))


def test_kernels_are_attributes_and_unknown_ones_raise(lib: emulator.Library) -> None:
    assert sorted(dir(lib)) == ["bytes", "copy", "full", "where"]
    assert lib.full.max_threads_per_threadgroup == 1024
    assert lib.full.thread_execution_width == 32
    with pytest.raises(
        RuntimeError, match=r"Failed to create function state.*: nothing"
    ):
        _ = lib.nothing


def test_offsets_are_honoured_and_strides_are_not(lib: emulator.Library) -> None:
    base = torch.arange(24.0)
    out = torch.zeros(4)
    lib.copy(base[3:], out, threads=4)
    assert out.tolist() == [3.0, 4.0, 5.0, 6.0]
    lib.copy(base.reshape(6, 4).t()[1:], out, threads=4)
    assert out.tolist() == [1.0, 2.0, 3.0, 4.0]
    # What a strided view does not cover is still between its first and last element.
    lib.copy(base[::8], out, threads=4)
    assert out.tolist() == [0.0, 1.0, 2.0, 3.0]
    lib.copy(base[::8], torch.zeros(17), threads=17)
    with (
        emulator.run(trace=True),
        pytest.raises(
            emulator.OutOfBoundsError, match="buffer 0, byte offset 68 of 68"
        ),
    ):
        lib.copy(base[::8], torch.zeros(18), threads=18)


def test_views_of_one_storage_alias(lib: emulator.Library) -> None:
    base = torch.arange(8.0)
    lib.copy(base[0:4], base[2:6], threads=1)
    assert base.tolist() == [0.0, 1.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    whole = torch.arange(8.0)
    lib.copy(whole[:4], whole[4:], threads=4)
    assert whole.tolist() == [0.0, 1.0, 2.0, 3.0] * 2


@pytest.mark.parametrize(
    ("value", "cast", "expected"),
    [
        (5, None, torch.tensor([5], dtype=torch.int64)),
        (-1, None, torch.tensor([-1], dtype=torch.int64)),
        (True, None, torch.tensor([1], dtype=torch.int64)),
        (1.5, None, torch.tensor([1.5], dtype=torch.float32)),
        ([1, 2, 3], None, torch.tensor([1, 2, 3], dtype=torch.int64)),
        ((1.0, 2.0), None, torch.tensor([1.0, 2.0], dtype=torch.float32)),
        (5, "int32", torch.tensor([5], dtype=torch.int32)),
        ((5, -6), "int16", torch.tensor([5, -6], dtype=torch.int16)),
        (-5, "int8", torch.tensor([-5], dtype=torch.int8)),
        (200, "uint8", torch.tensor([200], dtype=torch.uint8)),
        (0.1, "fp16", torch.tensor([0.1], dtype=torch.float16)),
        (0.1, "bf16", torch.tensor([0.1], dtype=torch.bfloat16)),
        ([1, 2], "fp16", torch.tensor([1.0, 2.0], dtype=torch.float16)),
    ],
)
def test_values_are_sent_as_torch_sends_them(
    lib: emulator.Library, value: object, cast: str | None, expected: torch.Tensor
) -> None:
    wanted = expected.view(torch.uint8)
    out = torch.zeros(64, dtype=torch.uint8)
    count = wanted.numel()
    lib.bytes(out, value, count, arg_casts={1: cast} if cast else None)
    assert torch.equal(out[:count], wanted)
    # No byte more than that was sent.
    with pytest.raises(emulator.OutOfBoundsError), emulator.run(trace=True):
        lib.bytes(out, value, count + 1, arg_casts={1: cast} if cast else None)


def test_one_cast_serves_all_values(lib: emulator.Library) -> None:
    out = torch.zeros(64, dtype=torch.uint8)
    with emulator.run() as run:
        lib.bytes(out, (1, 2), 8, arg_casts="int32")
    assert run.launches[0].buffers == ("uint8[64]", "int32 (1, 2)", "int32 8")
    assert out[:8].tolist() == [1, 0, 0, 0, 2, 0, 0, 0]


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_positions_at_ragged_edges(lib: emulator.Library, order: str) -> None:
    """Threads are totals: the last groups of each dimension are smaller."""
    threads, group = (10, 6, 3), (8, 4, 2)
    out = torch.zeros(3, 6, 10, 12, dtype=torch.int32)
    with emulator.run(order=order, seed=5):
        lib.where(out, threads=threads, group_size=group)
    for z in range(3):
        for y in range(6):
            for x in range(10):
                at = (x, y, z)
                place = [a // g for a, g in zip(at, group, strict=True)]
                inside = [a % g for a, g in zip(at, group, strict=True)]
                size = [
                    min(g, t - p * g)
                    for g, t, p in zip(group, threads, place, strict=True)
                ]
                index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
                count = size[0] * size[1] * size[2]
                wanted = [
                    sum(v * 100**i for i, v in enumerate(three))
                    for three in (place, inside, size, group, (2, 2, 2))
                ]
                wanted += [index, index // 32, index % 32, (count + 31) // 32, 7, 7, 7]
                assert out[z, y, x].tolist() == wanted, at


def test_default_sizes(lib: emulator.Library) -> None:
    with emulator.run() as run:
        lib.full(torch.zeros(3, 5), 1.0)
        lib.full(torch.zeros(2000), 1.0)
        lib.where(torch.zeros(48, dtype=torch.int32), threads=(2, 2))
    sizes = [(launch.threads, launch.group_size) for launch in run.launches]
    assert sizes == [((15,), (15,)), ((2000,), (1024,)), ((2, 2), (1024, 1))]


def test_a_kernel_may_limit_its_threads() -> None:
    lib = emulator.compile_shader(
        PRELUDE
        + """
[[kernel, max_total_threads_per_threadgroup(96)]] void g(device float* out) {}
[[max_total_threads_per_threadgroup(64)]] kernel void f(device float* out,
    uint i [[thread_position_in_grid]]) { out[i] = 1.0f; }"""
    )
    assert lib.f.max_threads_per_threadgroup == 64
    assert lib.g.max_threads_per_threadgroup == 96
    with pytest.raises(ValueError, match="Threadgroup size exceeds 64 limit"):
        lib.f(torch.zeros(128), threads=128, group_size=128)


class TestMessages(TestCase):
    """What people read when a call is wrong."""

    def setUp(self) -> None:
        self.lib = emulator.compile_shader(PRELUDE + FULL)

    def said(self, *args: object, kernel: str = "full", **kwargs: object) -> str:
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            getattr(self.lib, kernel)(*args, **kwargs)
        return f"{caught.type.__name__}: {caught.value}"

    def test_arguments(self) -> None:
        x = torch.zeros(8)
        self.assertExpectedInline(
            self.said(x.double(), 1.0),
            """TypeError: argument 0 is torch.float64, which MPS does not have""",
        )
        self.assertExpectedInline(
            self.said(x, "1"),
            """RuntimeError: argument 1 is a str: Unsupported argument type (a tensor, int, float, or a list of ints or floats is)""",  # noqa: E501
        )
        self.assertExpectedInline(
            self.said(x, []),
            """RuntimeError: Empty list/tuple can not be an argument to metal kernel""",
        )
        self.assertExpectedInline(
            self.said(x, [1, 2.5]),
            """RuntimeError: argument 1 mixes types: [1, 2.5]""",
        )
        self.assertExpectedInline(
            self.said(x, 1, arg_casts={1: "uint32"}),
            """RuntimeError: Unsupported cast instruction uint32""",
        )
        self.assertExpectedInline(
            self.said(x, [0] * 513),
            """RuntimeError: argument 1 has 4104 bytes; Metal's setBytes takes 4096: pass a tensor""",  # noqa: E501
        )
        self.assertExpectedInline(
            self.said(*[x] * 32),
            """RuntimeError: 32 arguments; Metal binds up to 31""",
        )
        self.assertExpectedInline(
            self.said(x.to_sparse(), 1.0),
            """RuntimeError: argument 0 is a torch.sparse_coo tensor on cpu; here dense CPU tensors stand for those on MPS""",  # noqa: E501
        )
        self.assertExpectedInline(
            self.said(torch.zeros(8, device="meta"), 1.0),
            """RuntimeError: argument 0 is a torch.strided tensor on meta; here dense CPU tensors stand for those on MPS""",  # noqa: E501
        )

    def test_sizes(self) -> None:
        x = torch.zeros(8)
        self.assertExpectedInline(
            self.said(1.0, 1.0),
            """RuntimeError: threads is needed: no argument is a tensor""",
        )
        self.assertExpectedInline(
            self.said(x, 1.0, threads=0),
            """RuntimeError: full: threads is (0,): Metal has no empty launch, skip it""",
        )
        self.assertExpectedInline(
            self.said(x, 1.0, threads=(1, 1, 1, 1)),
            """RuntimeError: threads is (1, 1, 1, 1); it can be one to three sizes >= 0""",
        )
        self.assertExpectedInline(
            self.said(x, 1.0, threads=(4, 2), group_size=8),
            """RuntimeError: group_size (8,) and threads (4, 2) must have as many sizes""",
        )
        self.assertExpectedInline(
            self.said(x, 1.0, threads=8, group_size=0),
            """RuntimeError: full: threads (8,) and group_size (0,): sizes of groups are at least 1, and threads are counted in 32 bits""",  # noqa: E501
        )
        self.assertExpectedInline(
            self.said(x, 1.0, threads=2048, group_size=2048),
            """ValueError: Threadgroup size exceeds 1024 limit: (2048,)""",
        )

    def test_launches_are_logged(self) -> None:
        x = torch.zeros(4, 8)
        with emulator.run() as run:
            self.lib.full(x[1:], 2.5, threads=(8, 3), group_size=(8, 1))
            self.lib.copy(x.view(-1), torch.zeros(32))
        self.assertExpectedInline(
            "\n".join(map(str, run.launches)),
            """\
full(float32[3, 8]+32, float32 2.5) threads (8, 3) group (8, 1)
copy(float32[32], float32[32]) threads (32,) group (32,)""",
        )


def test_a_wrapper_without_storage_is_refused(lib: emulator.Library) -> None:
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls) -> Wrapper:
            return torch.Tensor._make_wrapper_subclass(cls, (8,))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    with pytest.raises(RuntimeError, match="argument 0 is a Wrapper without storage"):
        lib.full(Wrapper(), 1.0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("kernel void f(device float* a) { a[0] = b; }", "program_source:1:.*'?b'?"),
        ("kernel void f(device float* a) { a[0] = 1; ", "is never closed"),
        (
            "kernel void f(float a) {}",
            "program_source:1: the kernel's parameter 'float a'",
        ),
        (
            "kernel void f(device float* a [[threadgroup(0)]]) {}",
            "the kernel's parameter",
        ),
        (
            "// caf\u00e9\nkernel void f(device float* a) {}",
            "program_source:1: .*ASCII",
        ),
        ('#include "nothing_of_that_name.h"\n', "nothing_of_that_name.h"),
        ("#error no\n", "no"),
        (
            "template <typename T> kernel void f(device T* a) { a[0] = T(0); }\n"
            'template [[host_name("g")]] kernel void h<float>(device float* a);',
            "program_source:2: 'g' instantiates 'h', which is not a kernel",
        ),
        (
            "kernel void f(device float* a) {}\n"
            '[[host_name("f")]] kernel void g(device float* a) {}',
            "defined twice: f",
        ),
    ],
)
def test_a_broken_source_is_a_syntax_error(source: str, message: str) -> None:
    with pytest.raises(SyntaxError, match=message):
        emulator.compile_shader(source)


def test_hundreds_of_variants_compile_as_they_are_used() -> None:
    lines = [
        f'template [[host_name("add_{n}")]] kernel void add<{n}>(device int*, uint);'
        for n in range(300)
    ]
    lib = emulator.compile_shader(
        PRELUDE
        + "template <int N> kernel void add(device int* x,\n"
        + "  uint i [[thread_position_in_grid]]) { x[i] += N; }\n"
        + "\n".join(lines)
    )
    assert len(dir(lib)) == 300
    x = torch.zeros(3, dtype=torch.int32)
    lib.add_299(x)
    lib.add_0(x)
    lib.add_17(x)
    assert x.tolist() == [316] * 3
    assert len(lib._units) == 3


def test_torch_s_own_headers_are_embedded() -> None:
    """c10's reductions run as they stand; they let part of a simdgroup meet."""
    lib = emulator.compile_shader(
        """#include <c10/metal/utils.h>
#include <c10/metal/reduction_utils.h>
#include <metal_stdlib>
using namespace metal;
kernel void total(device const float* x, device float* out,
                  uint i [[thread_position_in_threadgroup]],
                  uint size [[threads_per_threadgroup]]) {
  threadgroup float shared[32];
  float sum = c10::metal::threadgroup_sum(shared, x[i], i, size);
  if (i == 0) out[0] = sum;
}"""
    )
    torch.manual_seed(0)
    x = torch.randn(256)
    for order in ("forward", "backward", "random"):
        for trace in (False, True):
            out = torch.full((1,), float("nan"))
            with emulator.run(order=order, trace=trace, partial_simdgroups=True):
                lib.total(x, out, threads=256, group_size=256)
            # 256 numbers of about 1, in any order: 8 levels of float32 additions.
            error = (out.double() - x.double().sum()).abs().item()
            assert error <= 8 * 2**-24 * x.abs().sum().item()


def test_it_takes_the_place_of_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "compile_shader", emulator.compile_shader)
    lib = torch.mps.compile_shader(PRELUDE + FULL)
    x = torch.zeros(4)
    lib.full(x, 2.0)
    assert x.tolist() == [2.0] * 4
