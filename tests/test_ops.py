"""The operators `torch.ops.affine_tensor.*`: schemas, fakes, reference, FLOPs, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn, wrapped
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import affine_tensor.tensor
from affine_tensor import AffineQuantizedTensor, layout, ops

affine = torch.ops.affine_tensor
NAMES = (
    "linear",
    "matmul",
    "grouped_linear",
    "grouped_matmul",
    "embedding",
    "dequantize",
    "quantize",
)


def parts(weight: AffineQuantizedTensor) -> tuple[Any, ...]:
    return weight._packed, weight.scales, weight.biases, weight.permutation


def form(weight: AffineQuantizedTensor) -> dict[str, Any]:
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "dtype": weight.dtype,
    }


def test_schemas_are_those_of_the_design() -> None:
    schemas = [str(getattr(affine, name).default._schema) for name in NAMES]
    assert_expected_inline(
        wrapped("\n".join(schemas)),
        """\
affine_tensor::linear(Tensor x, Tensor packed, Tensor scales, Tensor biases,
  Tensor? permutation=None, Tensor? bias=None, *, int bits, int group_size,
  ScalarType dtype) -> Tensor
affine_tensor::matmul(Tensor x, Tensor packed, Tensor scales, Tensor biases,
  Tensor? permutation=None, *, int bits, int group_size, ScalarType dtype)
  -> Tensor
affine_tensor::grouped_linear(Tensor x, Tensor packed, Tensor scales, Tensor
  biases, Tensor? permutation=None, Tensor? offsets=None, Tensor?
  indices=None, *, int bits, int group_size, ScalarType dtype) -> Tensor
affine_tensor::grouped_matmul(Tensor x, Tensor packed, Tensor scales, Tensor
  biases, Tensor? permutation=None, Tensor? offsets=None, Tensor?
  indices=None, *, int bits, int group_size, ScalarType dtype) -> Tensor
affine_tensor::embedding(Tensor ids, Tensor packed, Tensor scales, Tensor
  biases, *, int bits, int group_size, ScalarType dtype) -> Tensor
affine_tensor::dequantize(Tensor packed, Tensor scales, Tensor biases,
  Tensor? permutation=None, *, int bits, int group_size, ScalarType dtype)
  -> Tensor
affine_tensor::quantize(Tensor w, *, int bits, int group_size) -> (Tensor,
  Tensor, Tensor)""",
    )


# ---- the reference ---------------------------------------------------------------


@pytest.fixture(params=[1, 10**9], ids=["one row at a time", "all rows at once"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ops, "_BLOCK", request.param)
    return request.param


X = {
    "1-D": lambda k: randn(k),
    "2-D": lambda k: randn(5, k),
    "3-D": lambda k: randn(2, 3, k),
    "no rows": lambda k: randn(0, k),
    "strided": lambda k: randn(5, 2 * k)[:, ::2],
    "column-major": lambda k: randn(k, 5).t(),
    "expanded": lambda k: randn(1, k).expand(5, k),
}


@pytest.mark.parametrize("dtype", layout.LOGICAL_DTYPES)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", X)
def test_linear_and_matmul_against_float64(
    name: str, permuted: bool, dtype: torch.dtype, block: int
) -> None:
    weight = make(6, 64, bits=3, permuted=permuted).to(dtype)
    exact = weight.dequantize().double()
    unit = 2 * torch.finfo(dtype).eps
    x = X[name](64).to(dtype)
    for bias in (
        None,
        randn(6).to(dtype),
        randn(1).to(dtype),
        torch.ones((), dtype=dtype),
    ):
        got = affine.linear(x, *parts(weight), bias, **form(weight))
        want = x.double() @ exact.t() + (0 if bias is None else bias.double())
        assert (got.dtype, got.shape) == (dtype, want.shape)
        torch.testing.assert_close(got.double(), want, rtol=unit, atol=16 * unit)
    x = X[name](6).to(dtype)
    got = affine.matmul(x, *parts(weight), **form(weight))
    want = x.double() @ exact
    assert (got.dtype, got.shape) == (dtype, want.shape)
    torch.testing.assert_close(got.double(), want, rtol=unit, atol=16 * unit)


def test_a_bias_for_each_row_of_x_and_each_row_of_the_weight(block: int) -> None:
    weight, x, bias = make(5, 64), randn(5, 64), randn(5, 5)
    got = affine.linear(x, *parts(weight), bias, **form(weight))
    torch.testing.assert_close(got, F.linear(x, weight.dequantize(), bias))


def test_sums_over_blocks_of_rows_are_rounded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make(256, 64).bfloat16()
    x = randn(3, 256).bfloat16()
    want = x.double() @ weight.dequantize().double()
    monkeypatch.setattr(ops, "_BLOCK", 1)
    got = affine.matmul(x, *parts(weight), **form(weight))
    # Half a unit in the last place, of which 256 roundings would make many.
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


ORDER = torch.tensor([2, 0, 1, 1, 2, 0, 2, 2, 0])


@pytest.mark.parametrize("permuted", [False, True])
def test_grouped_products_take_offsets_or_indices(permuted: bool, block: int) -> None:
    weight = make(3, 6, 64, permuted=permuted)
    x = randn(9, 64)
    want = torch.stack(
        [row @ weight.dequantize()[e].t() for row, e in zip(x, ORDER, strict=True)]
    )
    got = affine.grouped_linear(x, *parts(weight), indices=ORDER, **form(weight))
    torch.testing.assert_close(got, want)
    by_expert = ORDER.argsort()
    ends = ORDER.bincount(minlength=3).cumsum(0).int()
    got = affine.grouped_linear(
        x[by_expert], *parts(weight), offsets=ends, **form(weight)
    )
    torch.testing.assert_close(got, want[by_expert])
    x = randn(9, 6)
    want = torch.stack(
        [row @ weight.dequantize()[e] for row, e in zip(x, ORDER, strict=True)]
    )
    got = affine.grouped_matmul(x, *parts(weight), indices=ORDER, **form(weight))
    torch.testing.assert_close(got, want)
    got = affine.grouped_matmul(
        x[by_expert], *parts(weight), offsets=ends, **form(weight)
    )
    torch.testing.assert_close(got, want[by_expert])


def test_grouped_linear_of_experts_without_rows() -> None:
    weight = make(3, 6, 64)
    x = randn(4, 64)
    got = affine.grouped_linear(
        x, *parts(weight), offsets=torch.tensor([0, 3, 3]), **form(weight)
    )
    want = torch.cat([x[:3] @ weight.dequantize()[1].t(), torch.zeros(1, 6)])
    torch.testing.assert_close(got, want)
    for where in (
        {"offsets": torch.zeros(3).int()},
        {"indices": torch.empty(0).long()},
    ):
        got = affine.grouped_linear(x[:0], *parts(weight), **where, **form(weight))
        assert got.shape == (0, 6)


@pytest.mark.parametrize("dtype", layout.LOGICAL_DTYPES)
def test_dequantize_and_quantize_are_those_of_the_layout(dtype: torch.dtype) -> None:
    weight = make(2, 6, 64, bits=6)
    got = affine.dequantize(*parts(weight), bits=6, group_size=32, dtype=dtype)
    want = layout.dequantize(
        weight.packed,
        weight.scales,
        weight.biases,
        bits=6,
        group_size=32,
        dtype=dtype,
    )
    assert torch.equal(got, want)
    if dtype != torch.float64:
        got = affine.quantize(randn(6, 64, dtype=dtype), bits=6, group_size=32)
        want = layout.quantize(randn(6, 64, dtype=dtype), bits=6, group_size=32)
        assert got[0].dtype == torch.int32
        assert torch.equal(got[0], want[0].view(torch.int32))
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[2], want[2])


# ---- refusals --------------------------------------------------------------------

W = make(6, 64)
E = make(3, 6, 64)

BAD: dict[str, Callable[[], Any]] = {
    "x of another dtype": lambda: affine.linear(
        randn(5, 64).half(), *parts(W), **form(W)
    ),
    "x of another width": lambda: affine.linear(randn(5, 32), *parts(W), **form(W)),
    "x of no dimension": lambda: affine.matmul(torch.ones(()), *parts(W), **form(W)),
    "matmul of another width": lambda: affine.matmul(
        randn(5, 64), *parts(W), **form(W)
    ),
    "a weight of three dimensions": lambda: affine.linear(
        randn(5, 64), *parts(E), **form(E)
    ),
    "matmul of experts": lambda: affine.matmul(randn(5, 6), *parts(E), **form(E)),
    "grouped without a group": lambda: affine.grouped_linear(
        randn(5, 64), *parts(E), **form(E)
    ),
    "grouped with both": lambda: affine.grouped_matmul(
        randn(9, 6), *parts(E), offsets=ORDER, indices=ORDER, **form(E)
    ),
    "an unknown expert": lambda: affine.grouped_linear(
        randn(1, 64), *parts(E), indices=torch.tensor([3]), **form(E)
    ),
    "embedding of experts": lambda: affine.embedding(
        torch.tensor([1]), *parts(E)[:3], **form(E)
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        BAD[name]()


def test_refusals_say_what_was_seen_and_what_to_do() -> None:
    messages = []
    for call in BAD.values():
        with pytest.raises((RuntimeError, ValueError, IndexError)) as error:
            call()
        messages.append(str(error.value))
    assert_expected_inline(
        wrapped("\n".join(messages)),
        """\
linear: the input is torch.float16 and the quantized weight counts as
  torch.float32; they must agree. Convert x.to(torch.float32) or
  weight.to(torch.float16), which keeps the packed data, or use autocast
linear: the input has shape [5, 32]; its last dimension must be 64
matmul: the input has shape []; its last dimension must be 6
matmul: the input has shape [5, 64]; its last dimension must be 6
linear takes a weight of two dimensions; its words are [3, 6, 8]
matmul takes a weight of two dimensions; its words are [3, 6, 8]
grouped_linear takes x of two dimensions, packed [E, N, W] and one of
  offsets, indices; x is [5, 64], packed [3, 6, 8]
grouped_matmul takes x of two dimensions, packed [E, N, W] and one of
  offsets, indices; x is [9, 6], packed [3, 6, 8]
expert 3 is out of range: there are 3
embedding takes a weight of two dimensions; its words are [3, 6, 8]""",
    )


# ---- what compilers and counters ask ---------------------------------------------

P = make(6, 64, permuted=True)
IDS = torch.tensor([[1, 2], [0, 5]])
SAMPLES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "linear": (affine.linear, (randn(5, 64), *parts(W)), form(W)),
    "linear, bias": (affine.linear, (randn(2, 5, 64), *parts(P), randn(6)), form(P)),
    "linear, vector": (affine.linear, (randn(64), *parts(W)), form(W)),
    "matmul": (affine.matmul, (randn(5, 6), *parts(W)), form(W)),
    "matmul, permuted": (affine.matmul, (randn(2, 5, 6), *parts(P)), form(P)),
    "grouped_linear, offsets": (
        affine.grouped_linear,
        (randn(9, 64), *parts(E), torch.tensor([2, 5, 9])),
        form(E),
    ),
    "grouped_linear, indices": (
        affine.grouped_linear,
        (randn(9, 64), *parts(E), None, ORDER),
        form(E),
    ),
    "grouped_matmul, offsets": (
        affine.grouped_matmul,
        (randn(9, 6), *parts(E), torch.tensor([2, 5, 9])),
        form(E),
    ),
    "grouped_matmul, indices": (
        affine.grouped_matmul,
        (randn(9, 6), *parts(E), None, ORDER),
        form(E),
    ),
    "embedding": (affine.embedding, (IDS, *parts(W)[:3]), form(W)),
    "embedding, bfloat16": (
        affine.embedding,
        (IDS, *parts(W)[:3]),
        form(W) | {"dtype": torch.bfloat16},
    ),
    "dequantize": (affine.dequantize, parts(E), form(E)),
    "dequantize, permuted": (affine.dequantize, parts(P), form(P)),
    "quantize": (affine.quantize, (randn(6, 64),), {"bits": 3, "group_size": 32}),
    "quantize, strided": (
        affine.quantize,
        (randn(64, 6).t(),),
        {"bits": 3, "group_size": 32},
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    op, args, kwargs = SAMPLES[name]
    torch.library.opcheck(op.default, args, kwargs)


@pytest.mark.parametrize("name", SAMPLES)
def test_fakes_and_meta_have_the_shape_dtype_and_strides_of_the_result(
    name: str,
) -> None:
    op, args, kwargs = SAMPLES[name]
    want = op(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        got = op(*fake, **kwargs)
    meta = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs)
    for results in (got, meta):
        pairs = (
            [(results, want)]
            if isinstance(want, Tensor)
            else zip(results, want, strict=True)
        )
        for one, other in pairs:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.stride() == other.stride()


def test_a_packed_weight_can_be_fake(no_fallback: None) -> None:
    weight = make(6, 64, permuted=True)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(weight)
        assert isinstance(fake, AffineQuantizedTensor)
        assert all(isinstance(part, FakeTensor) for part in fake._parts())
        x = torch.empty(5, 64)
        for mode_of_grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode_of_grad():
                assert F.linear(x, fake).shape == (5, 6)
                assert (x[:, :6] @ fake).shape == (5, 64)
        y = F.linear(x.requires_grad_(), fake)
        assert torch.autograd.grad(y.sum(), x)[0].shape == (5, 64)
        assert F.embedding(torch.empty(3).long(), fake).shape == (3, 64)


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_flops_are_those_of_the_dense_linear(
    bias: bool, shape: tuple[int, ...]
) -> None:
    def step(linear: nn.Linear, x: Tensor) -> Callable[[], None]:
        return lambda: linear(x).sum().backward()

    dense = nn.Linear(64, 6, bias=bias)
    packed = nn.Linear(64, 6, bias=bias)
    packed.weight = nn.Parameter(make(6, 64))
    dense.requires_grad_(False)
    packed.requires_grad_(False)
    x = randn(*shape)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert flops(lambda: packed(x)) == flops(lambda: dense(x)) > 0
    x.requires_grad_()
    assert flops(step(packed, x)) == flops(step(dense, x)) == 2 * 2 * x.numel() * 6


def test_flops_of_the_operators() -> None:
    counted = {
        name: flops(lambda s=s: s[0](*s[1], **s[2])) for name, s in SAMPLES.items()
    }
    assert counted["linear"] == 2 * 5 * 64 * 6
    assert counted["linear, bias"] == 2 * 10 * 64 * 6
    assert counted["matmul"] == 2 * 5 * 64 * 6
    assert counted["grouped_linear, indices"] == 2 * 9 * 64 * 6
    assert counted["grouped_matmul, offsets"] == 2 * 9 * 64 * 6
    assert counted["embedding"] == counted["dequantize"] == 0


# ---- kernels ---------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "device_of", lambda tensor: "pretended")
    yield
    for registered in ops._kernels.values():
        registered.pop("pretended", None)


def test_a_registered_kernel_serves_its_device(kernels: None) -> None:
    calls: list[tuple[Any, ...]] = []

    @ops.register_kernel("linear", "pretended")
    def linear(x: Tensor, *args: Any, **format: Any) -> Tensor:
        calls.append((x.shape, format["bits"]))
        return ops.reference("linear")(x, *args, **format) + 1

    x, weight = randn(5, 64), make(6, 64)
    got = F.linear(x, weight)
    torch.testing.assert_close(got, F.linear(x, weight.dequantize()) + 1)
    assert calls == [((5, 64), 4)]
    # The other operators have no kernel there: the reference serves them.
    torch.testing.assert_close(randn(5, 6) @ weight, randn(5, 6) @ weight.dequantize())


def test_an_unknown_operator_has_no_kernels() -> None:
    with pytest.raises(ValueError, match="there is no operator 'convolve'") as error:
        ops.register_kernel("convolve", "cpu")
    assert all(name in str(error.value) for name in NAMES)


def test_linear_itself_knows_autocast() -> None:
    x, bias = randn(5, 64), randn(6)
    want = F.linear(x.bfloat16(), P.dequantize(torch.bfloat16), bias.bfloat16()).float()
    with torch.autocast("cpu", torch.bfloat16):
        for got in (
            affine.linear(x, *parts(P), bias, **form(P)),
            affine.linear(x, *parts(P), bias=bias, **form(P)),
            affine.linear(x.half(), *parts(P), bias=bias, **form(P)),
            affine.linear(x, *parts(P), **form(P)) + bias.bfloat16(),
        ):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=2**-5)
        got = affine.linear(x, *parts(W)[:3], **form(W))  # all the defaults
        assert got.dtype == torch.bfloat16
        assert got.shape == (5, 6)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_kernel_is_called_without_the_operator_only_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel_calls, operator_calls = [], []
    operator = affine_tensor.tensor._linear_op

    def kernel(x: Tensor, *args: Any, **format: Any) -> Tensor:
        kernel_calls.append(x.shape)
        return ops.reference("linear")(x, *args, **format)

    def counted(*args: Any, **format: Any) -> Tensor:
        operator_calls.append(args[0].shape)
        return operator(*args, **format)

    monkeypatch.setitem(ops._kernels["linear"], "cpu", kernel)
    monkeypatch.setattr(affine_tensor.tensor, "_linear_op", counted)
    weight, x = make(16, 64), randn(2, 64)
    exact = F.linear(x, weight.dequantize())
    with torch.no_grad():
        torch.testing.assert_close(F.linear(x, weight), exact)
    torch.testing.assert_close(F.linear(x, weight), exact)
    assert (len(kernel_calls), len(operator_calls)) == (2, 0)

    with torch.no_grad(), _Watch() as watch:
        F.linear(x, weight)
    assert "affine_tensor.linear.default" in watch.seen
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        F.linear(x, weight)
    assert flops.get_total_flops() == 2 * 2 * 16 * 64
    with torch.no_grad(), torch.profiler.profile() as profile:
        F.linear(x, weight)
    assert "affine_tensor::linear" in {event.key for event in profile.key_averages()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight).dtype == torch.bfloat16
    with torch.no_grad():
        traced = torch.jit.trace(lambda t: F.linear(t, weight), (x,), check_trace=False)
    assert "affine_tensor::linear" in str(traced.graph)
    assert (len(kernel_calls), len(operator_calls)) == (7, 5)
