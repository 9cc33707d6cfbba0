"""torch.func on packed weights: what the dense weights give, or refused as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn
from test_compile import Block, needs_compiler
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from affine_tensor import AffineQuantizedTensor, dequantize_

pytestmark = [
    pytest.mark.usefixtures("no_fallback"),
    # Of torch itself, where it has no rule to batch an operator by.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

ENDS = torch.tensor([2, 5, 9], dtype=torch.int32)
IDS = torch.tensor([[1, 5, 47], [0, 0, 2]])


def double(*shape: int, seed: int = 1) -> Tensor:
    return randn(*shape, dtype=torch.float64, seed=seed)


def packed(*shape: int, permuted: bool = False) -> AffineQuantizedTensor:
    return make(*shape, permuted=permuted, dtype=torch.float64)


def assert_same(got: Any, want: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- experts, embeddings, and the weight itself ----------------------------------

# A function of a weight and an input, and their shapes.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (6, 64), (3, 64)),
    "scaled embedding": (lambda x, w: F.embedding(IDS, w) * x, (48, 64), (64,)),
    "grouped": (
        lambda x, w: F.grouped_mm(x, w.mT, offs=ENDS),
        (3, 64, 64),
        (9, 64),
    ),
    "grouped, other way": (
        lambda x, w: F.grouped_mm(x, w, offs=ENDS),
        (3, 64, 64),
        (9, 64),
    ),
    "bmm": (lambda x, w: torch.bmm(x, w.mT), (3, 6, 64), (3, 5, 64)),
    "rows": (lambda x, w: F.linear(x, w[2:5]), (6, 64), (3, 64)),
}


def operands(
    name: str, permuted: bool = False, batch: tuple[int, ...] = ()
) -> tuple[Callable[..., Tensor], AffineQuantizedTensor, Tensor, float]:
    """Also how far results may lie apart: torch groups no float64."""
    function, weight_shape, shape = FUNCTIONS[name]
    weight, x = packed(*weight_shape, permuted=permuted), double(*batch, *shape)
    if name.startswith("grouped"):
        return function, make(*weight_shape, permuted=permuted), x.float(), 1e-4
    return function, weight, x, 1e-11


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_inputs(name: str, permuted: bool) -> None:
    function, weight, x, tolerance = operands(name, permuted)
    dense = weight.dequantize()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return function(x, w).tanh().square().sum()

    for transform in (torch.func.grad(loss), torch.func.grad_and_value(loss)):
        assert_same(transform(x, weight), transform(x, dense), tolerance)
    y, pull = torch.func.vjp(lambda x: function(x, weight), x)
    want, pull_dense = torch.func.vjp(lambda x: function(x, dense), x)
    assert_same(y, want, tolerance)
    ones = torch.ones_like(y)
    assert_same(pull(ones), pull_dense(ones), tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_derivatives(name: str) -> None:
    function, weight, x, tolerance = operands(name)

    def derivative(w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda x: function(x, w), (x,), (x.flip(0),))

    if name.startswith("grouped"):  # for which torch has no formula
        for refused in (weight, weight.dequantize()):
            with pytest.raises(NotImplementedError, match="forward AD"):
                derivative(refused)
    else:
        assert_same(derivative(weight), derivative(weight.dequantize()), tolerance)


# torch repeats the weight of bmm for each input, as a dense one; that is logged.
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "bmm"])
def test_vmap_over_inputs(name: str) -> None:
    function, weight, xs, tolerance = operands(name, batch=(4,))
    got, want = (
        torch.vmap(function, (0, None))(xs, w) for w in (weight, weight.dequantize())
    )
    assert_same(got, want, tolerance)


def test_vmap_over_tables_of_embeddings() -> None:
    tables = packed(2, 48, 64)
    got, want = (torch.vmap(F.embedding)(IDS, t) for t in (tables, tables.dequantize()))
    assert_same(got, want)


def test_the_gradient_of_a_weight_is_dense() -> None:
    """Right, if asked for by name: nothing asks for it unless somebody does."""
    weight, x = packed(6, 64, permuted=True), double(3, 64)

    def loss(w: Tensor) -> Tensor:
        return F.linear(x, w).tanh().sum()

    got, want = (torch.func.grad(loss)(w) for w in (weight, weight.dequantize()))
    assert type(got) is Tensor
    assert_same(got, want)


# ---- modules ---------------------------------------------------------------------


def blocks(count: int) -> list[Block]:
    torch.manual_seed(0)
    return [Block(seed=2 * i).requires_grad_(False) for i in range(count)]


def test_gradients_of_the_trainable_part_of_a_module() -> None:
    # Gradients of some thousands that nearly cancel: float32 says little of them.
    (block,) = (one.double() for one in blocks(1))
    dense = blocks(1)[0].double()
    dequantize_(dense)

    def loss(trained: dict[str, Tensor], module: nn.Module, x: Tensor) -> Tensor:
        return functional_call(module, trained, (x,)).square().sum()

    trained, x = {"up.bias": double(96)}, double(3, 64)
    got, want = (torch.func.grad(loss)(trained, m, x) for m in (block, dense))
    assert_same(got, want)
    each = torch.vmap(torch.func.grad(loss), (None, None, 0))
    got, want = (each(trained, m, double(4, 3, 64)) for m in (block, dense))
    assert_same(got, want)


def test_an_ensemble_of_modules() -> None:
    ensemble = blocks(3)
    parameters, buffers = stack_module_state(ensemble)
    weight = parameters["up.weight"]
    assert isinstance(weight, AffineQuantizedTensor)
    assert weight.shape == (3, 96, 64)
    x = randn(5, 64)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(ensemble[0], (parameters, buffers), (x,))

    got = torch.vmap(call, (0, None))(parameters, x)
    want = torch.stack([block(x) for block in ensemble])
    torch.testing.assert_close(got, want)


# ---- compiled --------------------------------------------------------------------


def _tanh_of(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight).tanh()


def _summed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(_summed(f)),
    "hessian": lambda f: torch.func.hessian(_summed(f)),
    "jacfwd": torch.func.jacfwd,
    "jacrev": torch.func.jacrev,
    "vmap": lambda f: lambda x: torch.vmap(f)(x.view(4, 16).repeat(1, 4)),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.flip(0),)),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager") for name in TRANSFORMS),
        pytest.param("grad", "inductor", marks=needs_compiler),
    ],
)
def test_transforms_compile(name: str, backend: str) -> None:
    torch.compiler.reset()
    transformed, x = TRANSFORMS[name](_tanh_of(packed(6, 64))), double(64)
    compiled = torch.compile(transformed, fullgraph=True, backend=backend)
    assert_same(compiled(x), transformed(x))


def test_a_functional_call_compiles_with_weights_as_inputs() -> None:
    torch.compiler.reset()
    module, other = blocks(2)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = compiled(dict(other.named_parameters()), randn(3, 64))
    assert torch.equal(got, other(randn(3, 64)))
