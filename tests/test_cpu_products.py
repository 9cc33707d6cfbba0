"""The CPU's kernels through the operators: values against float64, and how they behave."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make, randn
from torch import Tensor, nn

from affine_tensor import AffineConfig, AffineQuantizedTensor, layout, ops, quantize_
from affine_tensor.kernels import KernelError, cpu, settings
from affine_tensor.kernels.cpu import compiler, library
from affine_tensor.tensor import _logged

FORMATS = list(itertools.product(layout.BITS, layout.GROUP_SIZES))
SOME = [(bits, group) for bits, group in FORMATS if (bits + group // 16) % 3 == 0]


@pytest.fixture(scope="module", autouse=True)
def _a_compiler() -> None:
    try:
        if compiler.find().vectors is None:
            pytest.skip("this CPU has none of AVX-512, AVX2 and NEON")
    except KernelError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that cannot be used fails the test."""
    monkeypatch.setattr(settings, "strict", True)


@pytest.fixture(autouse=True)
def _only_kernels(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The reference is not called, but where a test says that it is."""
    if "reference" in request.fixturenames:
        return

    def refuse(op: str) -> Any:
        raise AssertionError(f"{op} went to the reference")

    monkeypatch.setattr(ops, "reference", refuse)


@pytest.fixture
def reference() -> Any:
    """Marks tests of what kernels hand on."""
    return ops.reference


def form(weight: AffineQuantizedTensor) -> dict[str, Any]:
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "dtype": weight.dtype,
    }


def parts(weight: AffineQuantizedTensor) -> tuple[Any, ...]:
    return weight._packed, weight.scales, weight.biases, weight.permutation


def dense(weight: AffineQuantizedTensor) -> Tensor:
    """In float64, by the reference."""
    exact = layout.dequantize(
        weight._packed,
        weight.scales,
        weight.biases,
        bits=weight.bits,
        group_size=weight.group_size,
        dtype=torch.float64,
    )
    if weight.permutation is None:
        return exact
    columns = weight.permutation.long().unsqueeze(-2).expand_as(exact)
    return torch.empty_like(exact).scatter_(-1, columns, exact)


def assert_near(y: Tensor, exact: Tensor) -> None:
    """At most 1.5 times the error of one rounding; float32: 1e-6."""
    error = float((y.double() - exact).norm() / exact.norm())
    rounded = float((exact.to(y.dtype).double() - exact).norm() / exact.norm())
    assert error <= (1e-6 if y.dtype == torch.float32 else 1.5 * rounded), error


def columns(bits: int, group: int) -> int:
    """Not a multiple of a chunk, as few as may be."""
    return 5 * max(group, 32)


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=layout.name_of)
@pytest.mark.parametrize(("bits", "group"), SOME)
def test_linear(bits: int, group: int, dtype: torch.dtype) -> None:
    k = columns(bits, group)
    weight = make(37, k, bits=bits, group_size=group, dtype=dtype)
    permuted = make(37, k, bits=bits, group_size=group, dtype=dtype, permuted=True)
    for rows in (1, 2, 3, 7, 8, 9, 24):
        x, bias = randn(rows, k, dtype=dtype), randn(37, dtype=dtype)
        y = ops.overload("linear")(x, *parts(weight), bias, **form(weight))
        assert_near(y, x.double() @ dense(weight).T + bias.double())
        y = ops.overload("linear")(x, *parts(permuted), None, **form(weight))
        assert_near(y, x.double() @ dense(permuted).T)


@pytest.mark.parametrize("scales", layout.WEIGHT_DTYPES, ids=layout.name_of)
@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=layout.name_of)
def test_scales_of_any_dtype(dtype: torch.dtype, scales: torch.dtype) -> None:
    weight = make(50, 352, dtype=scales).to(dtype)
    for rows in (1, 5):
        x = randn(rows, 352, dtype=dtype)
        y = ops.overload("linear")(x, *parts(weight), None, **form(weight))
        assert y.dtype == dtype
        assert_near(y, x.double() @ dense(weight).T)


@pytest.mark.parametrize("rows", [1, 2, 7, 24, 200])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_large_products(bits: int, rows: int) -> None:
    for dtype in layout.WEIGHT_DTYPES:
        weight = make(515, 2080, bits=bits, group_size=32, dtype=dtype)
        x = randn(rows, 2080, dtype=dtype)
        y = ops.overload("linear")(x, *parts(weight), None, **form(weight))
        assert_near(y, x.double() @ dense(weight).T)


def test_more_rows_than_a_job_has() -> None:
    weight, x = make(33, 64), randn(2060, 64)
    y = ops.overload("linear")(x, *parts(weight), None, **form(weight))
    assert_near(y, x.double() @ dense(weight).T)


def test_inputs_of_any_strides_and_shapes() -> None:
    weight = make(21, 96)
    exact = dense(weight)
    wide = randn(4, 3, 192)
    for x in (
        randn(96),
        randn(2, 1, 96),
        wide[:, :, 96:],
        wide[..., ::2],
        wide.transpose(0, 1)[..., :96],
        randn(96, 5).t(),
        randn(1, 96).expand(6, 96),
    ):
        y = ops.overload("linear")(x, *parts(weight), None, **form(weight))
        assert y.shape == (*x.shape[:-1], 21)
        assert_near(y, x.double() @ exact.T)


def test_weights_of_any_strides() -> None:
    weight = make(40, 256)
    for view in (weight[3:30], weight[::2], weight[:, 64:192]):
        x = randn(3, view.shape[1])
        y = ops.overload("linear")(x, *parts(view), None, **form(view))
        assert_near(y, x.double() @ dense(view).T)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=layout.name_of)
def test_experts(dtype: torch.dtype, permuted: bool) -> None:
    weight = make(5, 34, 160, dtype=dtype, permuted=permuted)
    exact = dense(weight)
    for rows in (1, 6, 70):
        x = randn(rows, 160, dtype=dtype)
        owners = torch.randint(
            5, (rows,), generator=torch.Generator().manual_seed(rows)
        )
        owners[owners == 2] = 3  # one has none
        wanted = torch.stack(
            [
                row.double() @ exact[e].T
                for row, e in zip(x, owners.tolist(), strict=True)
            ]
        )
        op = ops.overload("grouped_linear")
        y = op(x, *parts(weight), None, owners, **form(weight))
        assert_near(y, wanted)
        owners, order = owners.sort()
        ends = torch.bincount(owners, minlength=5).cumsum(0).to(torch.int32)
        padded = torch.cat([x[order], x[:2]])  # rows past the last end: zeros
        y = op(padded, *parts(weight), ends, None, **form(weight))
        assert_near(y[:rows], wanted[order])
        assert not y[rows:].any()


def test_an_owner_that_is_no_expert_raises(reference: Any) -> None:
    weight = make(2, 8, 64)
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=f"expert {wrong} is out of range"):
            ops.overload("grouped_linear")(
                randn(1, 64),
                *parts(weight),
                None,
                torch.tensor([wrong]),
                **form(weight),
            )


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=layout.name_of)
def test_products_with_the_weight_itself(dtype: torch.dtype) -> None:
    for rows, permuted in itertools.product((1, 5, 8, 40), (False, True)):
        weight = make(70, 352, bits=3, dtype=dtype, permuted=permuted)
        x = randn(rows, 70, dtype=dtype)
        y = ops.overload("matmul")(x, *parts(weight), **form(weight))
        assert_near(y, x.double() @ dense(weight))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 2.0**101, 2.0**-110])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=layout.name_of)
def test_inputs_that_kernels_do_not_take(
    dtype: torch.dtype, value: float, reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weight = make(9, 64, dtype=dtype)
    for rows in (1, 4):
        x = randn(rows, 64, dtype=dtype)
        x[-1] = x[-1] * value if value < 1 else x[-1]
        x[-1, 5] = value
        _logged.discard("cpu inputs")
        with caplog.at_level(logging.WARNING, "affine_tensor"):
            y = ops.overload("linear")(x, *parts(weight), None, **form(weight))
        wanted = reference("linear")(x, *parts(weight), None, **form(weight))
        assert torch.equal(y.nan_to_num(), wanted.nan_to_num())
        assert "dequantizes a packed weight: inputs are infinite" in caplog.text


def test_a_permutation_that_names_no_column_stays_in_memory(reference: Any) -> None:
    weight = make(9, 64, permuted=True)
    weight.permutation[3] = 64  # type: ignore[index]
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        ops.overload("linear")(randn(1, 64), *parts(weight), None, **form(weight))


def test_parts_that_do_not_fit_are_refused(reference: Any) -> None:
    packed, scales, biases, _ = parts(make(9, 64))
    with pytest.raises(ValueError, match="do not fit"):
        ops.overload("linear")(
            randn(1, 64),
            packed[:, :-1],
            scales,
            biases,
            bits=4,
            group_size=32,
            dtype=torch.float32,
        )


@pytest.mark.parametrize("power", [-100, -95, -61, -60, -40, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=layout.name_of)
def test_small_and_large_rows(dtype: torch.dtype, power: int, reference: Any) -> None:
    """Of any size, by kernels or by the reference; groups far smaller than others too."""
    weight = make(40, 128, dtype=dtype)
    unit = 1e-6 if dtype == torch.float32 else 2.0**-8
    for rows in (1, 4):
        x = randn(rows, 128).double().clamp(-1, 1)
        x[:, 64:] *= 2.0**-25
        x = (x * 2.0**power).to(dtype)
        y = ops.overload("linear")(x, *parts(weight), None, **form(weight))
        exact = x.double() @ dense(weight).T
        assert float((y.double() - exact).norm()) <= unit * float(exact.norm())


def test_operands_are_read_as_what_they_are(reference: Any) -> None:
    """The kernels get addresses: other dtypes and devices must not be taken for theirs."""
    weight = make(9, 64, permuted=True)
    packed, scales, biases, permutation = parts(weight)
    linear, dequantize = ops.overload("linear"), ops.overload("dequantize")
    x, own = randn(3, 64), form(weight)
    y = linear(x, packed, scales, biases, permutation, None, **own)
    wide = permutation.long()
    torch.testing.assert_close(linear(x, packed, scales, biases, wide, None, **own), y)
    same = dequantize(packed, scales, biases, wide, **own)
    assert torch.equal(same, dequantize(packed, scales, biases, permutation, **own))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, packed, scales, biases, permutation[:32].clone(), None, **own)
    with pytest.raises(TypeError, match=r"the scales are torch\.float64"):
        linear(x, packed, scales.double(), biases.double(), None, None, **own)
    with pytest.raises(TypeError, match=r"packed words are torch\.int64"):
        linear(x, packed.long(), scales, biases, None, None, **own)
    wrong = permutation.clone()
    wrong[3] = 64
    with pytest.raises(RuntimeError, match="out of bounds"):
        dequantize(packed, scales, biases, wrong, **own)


@pytest.mark.parametrize("op", ["grouped_linear", "dequantize"])
def test_one_order_for_all_experts(op: str, reference: Any) -> None:
    weight = make(3, 8, 64)
    order = torch.randperm(64, dtype=torch.int32)
    if op == "dequantize":
        args: tuple[Any, ...] = (*parts(weight)[:3], order)
    else:
        orders = order.long().expand(3, 64)
        args = (randn(3, 64), *parts(weight)[:3], orders, None, torch.tensor([2, 0, 1]))
    y = ops.overload(op)(*args, **form(weight))
    torch.testing.assert_close(y, reference(op)(*args, **form(weight)))


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=layout.name_of)
def test_a_row_is_the_same_whatever_others_there_are(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "batch_invariant", True)
    weight = make(45, 320, dtype=dtype)
    x = randn(40, 320, dtype=dtype)
    run = ops.overload("linear")
    whole = run(x, *parts(weight), None, **form(weight))
    for start, end in ((0, 1), (5, 7), (8, 11), (3, 12)):
        some = run(x[start:end], *parts(weight), None, **form(weight))
        assert torch.equal(some, whole[start:end])


def test_results_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    try:
        for rows in (1, 2, 6, 30):
            weight, x = make(600, 1024), randn(rows, 1024)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                y = ops.overload("linear")(x, *parts(weight), None, **form(weight))
                results.append(y)
            assert all(torch.equal(y, results[0]) for y in results)
    finally:
        torch.set_num_threads(before)


def test_many_python_threads_at_once() -> None:
    weight = make(300, 1024, dtype=torch.bfloat16)
    xs = [randn(rows, 1024, dtype=torch.bfloat16, seed=rows) for rows in (1, 2, 5, 20)]
    exact = [x.double() @ dense(weight).T for x in xs]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            for x, wanted in zip(xs, exact, strict=True):
                y = ops.overload("linear")(x, *parts(weight), None, **form(weight))
                try:
                    assert_near(y, wanted)
                except AssertionError as error:
                    wrong.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PRODUCT = """
    import logging
    logging.basicConfig(level="DEBUG")
    import torch
    torch.set_num_threads(2)
    from affine_tensor import AffineConfig, quantize_
    model = torch.nn.Linear(1024, 2048, bias=False)
    quantize_(model, AffineConfig(4, 64))
    x = torch.randn(3, 1024)
    with torch.no_grad():
        y = model(x)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_multiplies_too() -> None:
    code = (
        PRODUCT
        + """
    import os
    torch.randn(512, 512) @ torch.randn(512, 512)  # torch's threads are there
    if (child := os.fork()) == 0:
        os._exit(0 if torch.equal(model(x), y) else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
    """
    )
    run_python(code)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_torchs_openmp_runtime_is_the_only_one() -> None:
    code = (
        PRODUCT
        + """
    files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
    import re
    print(sorted({f for f in files if re.search("lib(gomp|omp|iomp5)[.-]", f)}))
    """
    )
    assert len(eval(run_python(code).splitlines()[-1])) == 1


def test_a_library_is_compiled_once(tmp_path: Path) -> None:
    code = (
        PRODUCT
        + """
    import affine_tensor.kernels.cpu.compiler as compiler
    made = []
    compile = compiler._compile
    def watched(command, file):
        made.append(file)
        compile(command, file)
    compiler._compile = watched
    from affine_tensor.kernels.cpu import library
    library._functions.clear()
    import affine_tensor.kernels.cpu as cpu
    cpu._linear_functions.clear()
    with torch.no_grad():
        model(x)
    print(len(made))
    """
    )
    # A first process compiles while it starts; then it is there for it and others.
    for _ in range(2):
        out = run_python(code, AFFINE_TENSOR_CACHE=str(tmp_path))
        assert out.splitlines()[-1] == "0"
    libraries = list((tmp_path / "cpu").iterdir())
    assert {file.suffix for file in libraries} <= {".so", ".dylib"}
    # What was cut short is made again.
    for file in libraries:
        file.write_bytes(b"")
    run_python(PRODUCT, AFFINE_TENSOR_CACHE=str(tmp_path))
    assert all(file.stat().st_size for file in libraries)


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
def test_without_a_compiler_the_reference_is_used_and_said_once(
    dtype: torch.dtype,
) -> None:
    code = """
    import logging, os, torch
    dtype = getattr(torch, os.environ["DTYPE"])
    lines = []
    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())
    logging.getLogger("affine_tensor").addHandler(Lines())
    from affine_tensor import AffineConfig, quantize_, kernels
    model = torch.nn.Linear(64, 32)
    quantize_(model.to(dtype), AffineConfig(4, 32))
    x = torch.randn(3, 64, dtype=dtype)
    with torch.no_grad():
        for _ in range(2):
            y = model(x)
    want = torch.nn.functional.linear(x, model.weight.dequantize(), model.bias)
    torch.testing.assert_close(y, want)
    print("|".join(line for line in lines if "compiler" in line))
    kernels.settings.strict = True
    try:
        model(x)
    except kernels.KernelError as error:
        print(error)
    """
    environment = {
        "AFFINE_TENSOR_CXX": "no-such-compiler",
        "AFFINE_TENSOR_STRICT": "0",
        "DTYPE": layout.name_of(dtype),
    }
    said, raised = run_python(code, **environment).splitlines()
    assert "no-such-compiler" in said
    assert "|" not in said
    assert said.startswith("the CPU's kernels are not used, weights are dequantized")
    assert "AFFINE_TENSOR_CXX" in raised


def test_a_driver_of_c_in_cxx_is_passed_over(tmp_path: Path) -> None:
    # PEFT's BOFT leaves gcc there; it links no library of C++.
    code = (
        "from affine_tensor.kernels.cpu import compiler; print(compiler.find().command)"
    )
    for name in ("gcc", "/usr/bin/cc", "x86_64-linux-gnu-gcc-12", "clang-18"):
        assert run_python(code, CXX=name) == run_python(code, CXX="")


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = library.function

    def broken(
        source: str, name: str, arguments: Any, check: Any, **defines: int
    ) -> Any:
        real = made(source, name, arguments, lambda _: None, **defines)
        assert real is not None
        wrong = check(lambda *args: 0)  # writes nothing
        assert wrong
        raise KernelError(wrong)

    monkeypatch.setattr(library, "function", broken)
    cpu._linear_functions.clear()
    with pytest.raises(KernelError, match="relative error"):
        cpu._function(4, 64, torch.float32)
    cpu._linear_functions.clear()


def test_greedy_tokens_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, no_fallback: None, reference: Any
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    model = LlamaForCausalLM(config).eval()
    quantize_(model, AffineConfig(4, 32))
    ids = torch.randint(300, (2, 11))
    settle = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(ids, **settle)
    monkeypatch.setattr(settings, "cpu_backend", "reference")
    assert torch.equal(ours, model.generate(ids, **settle))


def test_modules_use_the_kernels() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.Linear(96, 32))
    quantize_(model, AffineConfig(4, 32))
    x = torch.randint(50, (2, 3))
    with torch.no_grad():
        model(x)
    model(x).sum().backward()  # through the weights, to biases
    assert model[1].bias.grad is not None
