"""Gradients through packed weights: autograd, torch.func, forward AD, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from affine_tensor import AffineQuantizedTensor

pytestmark = pytest.mark.usefixtures("no_fallback")

WEIGHTS: dict[str, Callable[..., AffineQuantizedTensor]] = {
    "matrix": lambda **kw: make(6, 64, **kw),
    "permuted": lambda **kw: make(6, 64, permuted=True, **kw),
    "slice": lambda **kw: make(6, 128, **kw)[:, 32:96],
    "transposed": lambda **kw: make(64, 64, **kw)[:6].t().t(),
}


@pytest.fixture(params=[*WEIGHTS])
def weight(request: pytest.FixtureRequest) -> AffineQuantizedTensor:
    return WEIGHTS[request.param](dtype=torch.float64)


def double(*shape: int, seed: int = 1) -> Tensor:
    return randn(*shape, dtype=torch.float64, seed=seed).requires_grad_()


# A call with the weight, and the shapes of its inputs.
CALLS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear 1-D": (lambda w, x: F.linear(x, w), [(64,)]),
    "linear 2-D": (lambda w, x: F.linear(x, w), [(3, 64)]),
    "linear, bias": (lambda w, x, b: F.linear(x, w, b), [(3, 64), (6,)]),
    "linear 3-D, bias": (lambda w, x, b: F.linear(x, w, b), [(2, 3, 64), (6,)]),
    "linear column-major": (lambda w, x: F.linear(x.t(), w), [(64, 3)]),
    "linear of nothing": (lambda w, x: F.linear(x, w), [(0, 64)]),
    "matmul": (lambda w, x: x @ w, [(3, 6)]),
    "matmul 3-D": (lambda w, x: x @ w, [(2, 3, 6)]),
    "matmul on the left": (lambda w, x: w @ x, [(64, 3)]),
    "mv": (lambda w, x: w @ x, [(64,)]),
    "addmm": (
        lambda w, b, x: torch.addmm(b, x, w.t(), beta=0.5, alpha=2),
        [(6,), (3, 64)],
    ),
    "addmm on the left": (
        lambda w, b, x: torch.addmm(b, w, x, beta=0.5, alpha=2),
        [(6, 3), (64, 3)],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_the_dense_weight(
    name: str, weight: AffineQuantizedTensor
) -> None:
    call, shapes = CALLS[name]
    inputs = [double(*shape, seed=i) for i, shape in enumerate(shapes)]
    y = call(weight, *inputs)
    out = randn(*y.shape, dtype=torch.float64, seed=9)
    got = torch.autograd.grad(y, inputs, out)
    want = torch.autograd.grad(call(weight.dequantize(), *inputs), inputs, out)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str) -> None:
    weight = make(6, 64, permuted=True, dtype=torch.float64)
    call, shapes = CALLS[name]
    inputs = [double(*shape, seed=i) for i, shape in enumerate(shapes)]

    def bound(*inputs: Tensor) -> Tensor:
        return call(weight, *inputs)

    every = {"check_forward_ad": True, "check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(bound, inputs, **every)
    assert torch.autograd.gradgradcheck(bound, inputs, fast_mode=True)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", ["bmm", "bmm transposed", "bmm on the left"])
def test_gradcheck_of_experts(name: str, permuted: bool) -> None:
    weight = make(2, 6, 64, permuted=permuted, dtype=torch.float64)
    call, shape = {
        "bmm": (lambda x: torch.bmm(x, weight), (2, 3, 6)),
        "bmm transposed": (lambda x: torch.bmm(x, weight.mT), (2, 3, 64)),
        "bmm on the left": (lambda x: torch.bmm(weight, x), (2, 64, 3)),
    }[name]
    x = double(*shape)
    every = {"check_forward_ad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(call, x, **every)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


def test_a_model_trains_around_its_packed_weights() -> None:
    def grads(weight: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6)).double()
        model[2].weight = nn.Parameter(weight, requires_grad=False)
        model(randn(3, 64, dtype=torch.float64)).square().sum().backward()
        assert model[2].weight.grad is None
        return [p.grad for p in (model[0].weight, model[0].bias, model[2].bias)]

    weight = make(6, 64, dtype=torch.float64)
    torch.testing.assert_close(grads(weight), grads(weight.dequantize()))


def test_no_dense_copy_of_the_weight_is_saved_for_backward(
    weight: AffineQuantizedTensor,
) -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, bias = double(3, 64), double(6)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.linear(x, weight, bias)
    assert [type(tensor) for tensor in saved] == [AffineQuantizedTensor]
    assert saved[0].data_ptr() == weight.data_ptr()


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    weight, x = make(6, 64), randn(3, 64).requires_grad_()
    y = F.linear(x, weight)
    weight.copy_(make(6, 64, seed=3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(make(64, 64))
    x = randn(3, 64).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return linear(linear(x).tanh())

    want = torch.autograd.grad(block(x).sum(), [linear.bias, x])
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close((linear.bias.grad, x.grad), want)


# ---- torch.func and forward AD ---------------------------------------------------


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ["linear", "matmul"])
def test_jvp_equals_that_of_the_dense_weight(
    name: str, grad: Any, weight: AffineQuantizedTensor
) -> None:
    x, tangent, bias = (double(*s).detach() for s in ((3, 64), (3, 64), (6,)))

    def f(w: Tensor) -> Callable[[Tensor], Tensor]:
        return (
            (lambda x: F.linear(x, w, bias))
            if name == "linear"
            else (lambda x: x @ w.t())
        )

    with grad():
        got, want = (
            torch.func.jvp(f(w), (x,), (tangent,))
            for w in (weight, weight.dequantize())
        )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert want[1].any()


def test_vjp_grad_and_jacrev(weight: AffineQuantizedTensor) -> None:
    x = double(64).detach()
    dense = weight.dequantize()

    def f(w: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x, w).tanh()

    got, want = (torch.func.jacrev(f(w))(x) for w in (weight, dense))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got, want = (torch.func.jacfwd(f(w))(x) for w in (weight, dense))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got, want = (
        torch.func.grad(lambda x, w=w: f(w)(x).square().sum())(x)
        for w in (weight, dense)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got, want = (
        torch.func.vjp(f(w), x)[1](torch.ones(6, dtype=torch.float64))
        for w in (weight, dense)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_hessian_through_two_layers(weight: AffineQuantizedTensor) -> None:
    x = double(6).detach()

    def f(w: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear((x @ w).tanh(), w).square().sum()

    got, want = (torch.func.hessian(f(w))(x) for w in (weight, weight.dequantize()))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


VMAPS: dict[str, tuple[Callable[..., Tensor], int, tuple[int, ...]]] = {
    "linear, vectors": (lambda x, w: F.linear(x, w), 0, (4, 64)),
    "linear, matrices": (lambda x, w: F.linear(x, w), 0, (4, 3, 64)),
    "linear, batches": (lambda x, w: F.linear(x, w), 0, (4, 2, 3, 64)),
    "linear along 1": (lambda x, w: F.linear(x, w), 1, (4, 3, 64)),
    "linear, batches along 1": (lambda x, w: F.linear(x, w), 1, (4, 2, 3, 64)),
    "matmul, vectors": (lambda x, w: x @ w, 0, (4, 6)),
    "matmul, matrices": (lambda x, w: x @ w, 0, (4, 3, 6)),
    "matmul, batches": (lambda x, w: x @ w, 0, (4, 2, 3, 6)),
    "on the left, vectors": (lambda x, w: w @ x, 0, (4, 64)),
    "on the left, matrices": (lambda x, w: w @ x, 0, (4, 64, 3)),
}


@pytest.mark.parametrize("name", VMAPS)
def test_vmap_over_inputs(name: str, weight: AffineQuantizedTensor) -> None:
    call, dim, shape = VMAPS[name]
    x = double(*shape).detach()
    got, want = (
        torch.vmap(call, (dim, None))(x, w) for w in (weight, weight.dequantize())
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (5,)])
def test_vmap_over_experts(lead: tuple[int, ...], bias: bool, permuted: bool) -> None:
    experts = make(3, 6, 64, permuted=permuted)
    x = randn(3, *lead, 64)
    extra = (randn(3, 6),) if bias else ()
    got, want = (
        torch.vmap(F.linear)(x, w, *extra) for w in (experts, experts.dequantize())
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got, want = (
        torch.vmap(F.linear, (None, 0))(x[0], w)
        for w in (experts, experts.dequantize())
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_vmap_of_grad_over_experts() -> None:
    experts = make(3, 6, 64)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w).square().sum()

    x = randn(3, 5, 64)
    got, want = (
        torch.vmap(torch.func.grad(loss))(x, w) for w in (experts, experts.dequantize())
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_forward_ad_level_without_a_dual_input() -> None:
    weight, x = make(6, 64), randn(3, 64)
    with forward_ad.dual_level():
        bias = forward_ad.make_dual(randn(6), torch.ones(6))
        y = forward_ad.unpack_dual(F.linear(x, weight, bias))
    assert y.tangent is not None
    torch.testing.assert_close(y.tangent, torch.ones(3, 6))
    torch.testing.assert_close(y.primal, F.linear(x, weight.dequantize(), randn(6)))


# ---- autocast --------------------------------------------------------------------


@pytest.mark.parametrize(
    "grad", [torch.enable_grad, torch.no_grad, torch.inference_mode]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype, grad: Any) -> None:
    weight, x, bias = make(6, 64, dtype=dtype), randn(3, 64), randn(6)
    with grad(), torch.autocast("cpu", torch.bfloat16):
        results = [
            F.linear(x, weight, bias),
            F.linear(x.bfloat16(), weight),
            x @ weight.t(),
            torch.addmm(bias, x, weight.t()),
            x[:, :6] @ weight,
        ]
    w = weight.dequantize(torch.bfloat16).double()
    low = x.bfloat16().double()
    wanted = [
        low @ w.t() + bias.bfloat16().double(),
        low @ w.t(),
        low @ w.t(),
        low @ w.t() + bias.bfloat16().double(),
        low[:, :6] @ w,
    ]
    for got, want in zip(results, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-5)
    assert weight.dtype == dtype


def test_autocast_gradients_come_in_the_dtype_of_their_inputs() -> None:
    weight, x, bias = make(6, 64), randn(3, 64), randn(6)
    x.requires_grad_()
    bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, weight, bias)
    y.sum().backward()
    want = weight.dequantize(torch.bfloat16).double().sum(0).expand(3, -1)
    assert x.grad is not None
    assert x.grad.dtype == bias.grad.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(x.grad.double(), want, rtol=2**-7, atol=2**-5)


def test_autocast_leaves_float64_alone() -> None:
    weight = make(6, 64, dtype=torch.float64)
    x = double(3, 64).detach()
    want = F.linear(x, weight.dequantize())
    for requires_grad in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            got = F.linear(x.requires_grad_(requires_grad), weight)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_autocast_does_not_touch_embeddings() -> None:
    weight = make(6, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = F.embedding(torch.tensor([1, 5]), weight)
    assert torch.equal(got, weight.dequantize()[[1, 5]])
