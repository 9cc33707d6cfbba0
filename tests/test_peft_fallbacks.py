"""Training beside packed weights makes none dense in passing: logs, memory, gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make as packed
from conftest import randn
from test_peft import (
    EXPERTS,
    IDS,
    WAYS,
    adapted,
    close,
    dense_twin,
    error,
    is_packed,
    logits,
    make,
    peft,
    train,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import affine_tensor.tensor
from affine_tensor import prepare_for_lora
from affine_tensor.low_rank import LowRankSum

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@pytest.fixture
def records(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[logging.LogRecord]]:
    """All that the library logs, what is said only once too."""
    monkeypatch.setattr(affine_tensor.tensor, "_logged", set())
    with caplog.at_level(logging.DEBUG, logger="affine_tensor"):
        yield caplog.records


def of_the_library(records: list[logging.LogRecord]) -> list[str]:
    return [r.getMessage() for r in records if r.name.startswith("affine_tensor")]


# ---- the log --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["checkpointing", "autocast", "both, bfloat16"])
@pytest.mark.parametrize("name", WAYS)
def test_a_step_logs_nothing(
    name: str, mode: str, records: list[logging.LogRecord]
) -> None:
    """Forward, backward and update, with each kind of adapter and of weights."""
    kind, settings = WAYS[name]
    dtype = torch.bfloat16 if "bfloat16" in mode else torch.float32
    losses = []
    for base in (make(kind, dtype), dense_twin(make(kind, dtype))):
        prepare_for_lora(base, gradient_checkpointing=mode != "autocast")
        model = adapted(base, settings)
        records.clear()
        affine_tensor.tensor._logged.clear()
        losses.append(train(model, 3, autocast=mode != "checkpointing"))
        assert of_the_library(records) == []
    close(losses[0], losses[1], 1e-4 if mode == "checkpointing" else 2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_by_each_implementation(
    implementation: str, records: list[logging.LogRecord]
) -> None:
    losses, models = [], []
    for base in (make("experts"), dense_twin(make("experts"))):
        base.set_experts_implementation(implementation)
        models.append(adapted(prepare_for_lora(base), EXPERTS | {"use_rslora": True}))
        affine_tensor.tensor._logged.clear()
        records.clear()
        losses.append(train(models[-1]))
        assert of_the_library(records) == []
    close(losses[0], losses[1], 1e-4)
    assert error(logits(models[0]), logits(models[1])) < 1e-4
    assert of_the_library(records) == []


def test_two_adapters_of_experts_are_dense_and_the_log_says_so(
    fallbacks: list[str],
) -> None:
    """PEFT itself makes their sum dense, which it need not for one."""
    found = []
    for base in (make("experts"), dense_twin(make("experts"))):
        model = adapted(base, EXPERTS)
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, init_lora_weights=False, **EXPERTS)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        found.append(logits(model.eval()))
    assert error(*found) < 1e-4
    assert [line.split()[0] for line in fallbacks] == ["aten.add.Tensor"]


def test_other_sums_are_logged(fallbacks: list[str]) -> None:
    weight = packed(8, 64)
    assert torch.equal(weight + 1, weight.dequantize() + 1)
    assert len(fallbacks) == 1
    for other in (randn(8, 64), randn(64), packed(8, 64, seed=3)):
        dense = other.dequantize() if is_packed(other) else other
        assert torch.equal(weight + other, weight.dequantize() + dense)
        assert torch.equal(other + weight, dense + weight.dequantize())


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_norm_of_dora(
    dtypes: tuple[torch.dtype, torch.dtype], turned: bool, no_fallback: None
) -> None:
    """PEFT's own function, of a packed weight and of the dense one."""
    layer = peft.tuners.lora.dora.DoraLinearLayer(fan_in_fan_out=turned)
    weight: Any = packed(8, 64, dtype=dtypes[0], permuted=True)
    weight = weight.t() if turned else weight
    change = randn(8, 64, dtype=dtypes[1])
    kept = weight.dequantize()
    got = layer.get_weight_norm(weight, change, scaling=0.5)
    want = layer.get_weight_norm(kept, change, scaling=0.5)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert torch.equal(weight.dequantize(), kept)


# ---- memory ---------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_stack_of_experts_is_dense(implementation: str) -> None:
    """Neither kept for the backward, nor as a gradient."""
    base = make("experts")
    base.set_experts_implementation(implementation)
    prepare_for_lora(base, gradient_checkpointing=False)
    model = adapted(base, EXPERTS).train()
    experts = base.model.layers[0].mlp.experts.base_layer.base_layer
    sizes = {experts.gate_up_proj.numel(), experts.down_proj.numel()}
    seen: list[Tensor] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            seen.extend(t for t in _tensors(result) if not is_packed(t))
            return result

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), Watch():
        model(IDS[:1, :5], labels=IDS[:1, :5], use_cache=False).loss.backward()
    dense = [t for t in seen if t.numel() in sizes and t.is_floating_point()]
    assert len(seen) > 100
    assert [tuple(t.shape) for t in dense if not is_packed(t)] == []


def _tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, (list, tuple)) else [result]
    return [t for t in found if isinstance(t, Tensor)]


# ---- the sum of a packed weight and two factors -----------------------------------

E, N, K, R = 3, 32, 64, 4
SPLIT = torch.tensor([2, 2, 7], dtype=torch.int32)  # the second expert has no rows


def by_groups(x: Tensor, weight: Any) -> Tensor:
    if weight.dtype != torch.float64:
        return F.grouped_mm(x, weight, offs=SPLIT)
    # torch has none in float64.
    rows = x.tensor_split(SPLIT[:-1].long())
    return torch.cat([own @ w for own, w in zip(rows, weight, strict=True)])


USES: dict[str, tuple[tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "linear": ((5, K), lambda w, x: F.linear(x, w[1])),
    "linear, bias": ((5, K), lambda w, x: F.linear(x, w[1], torch.ones(N).to(x))),
    "by a tensor": ((5, K), lambda w, x: F.linear(x, weight=w[torch.tensor(2)])),
    "matmul": ((2, 5, N), lambda w, x: x @ w[0]),
    "mm": ((5, N), lambda w, x: torch.mm(x, w[0])),
    "matmul on the left": ((K, 5), lambda w, x: w[0].matmul(x)),
    "vector": ((K,), lambda w, x: w[0] @ x),
    "transposed": ((5, K), lambda w, x: x @ w[0].mT),
    "bmm": ((E, 5, N), lambda w, x: torch.bmm(x, w)),
    "bmm on the left": ((E, K, 1), lambda w, x: torch.bmm(w, x)),
    "bmm, transposed": ((E, 5, K), lambda w, x: torch.bmm(x, w.transpose(1, 2))),
    "a weight for each row": (
        (4, K, 1),
        lambda w, x: torch.bmm(w[torch.tensor([2, 0, 0, 1])], x),
    ),
    "grouped": ((7, N), lambda w, x: by_groups(x, w)),
    "grouped, transposed": (
        (7, K),
        lambda w, x: by_groups(x, w.transpose(-2, -1)),
    ),
}
# What has no way around the dense sum.
DENSE_USES: dict[str, tuple[tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "sum": ((N, K), lambda w, x: w.sum(0) * x),
    "times": ((N, K), lambda w, x: x * w),
    "slice": ((2, N, K), lambda w, x: w[1:] * x),
    "mask": ((2, N, K), lambda w, x: w[torch.tensor([True, False, True])] * x),
    "einsum": ((5, K), lambda w, x: torch.einsum("bk,enk->ben", x, w)),
    "other dimensions": ((N, E, K), lambda w, x: w.transpose(0, 1) * x),
    "with itself": ((E, N, N), lambda w, x: torch.bmm(w, w.mT) * x),
    "keywords": ((5, N), lambda w, x: torch.mm(input=x, mat2=w[0])),
}


def operands(
    shape: tuple[int, ...], turned: bool, dtype: torch.dtype
) -> tuple[Any, list[Tensor]]:
    stored = (E, K, N) if turned else (E, N, K)
    weight: Any = packed(*stored, group_size=32, dtype=dtype, permuted=not turned)
    weight = weight.mT if turned else weight
    factors = [randn(E, N, R, dtype=dtype), randn(E, R, K, dtype=dtype, seed=2)]
    x = randn(*shape, dtype=dtype, seed=3)
    return weight, [t.requires_grad_(True) for t in (*factors, x)]


def compared(
    shape: tuple[int, ...], use: Any, turned: bool, dtype: torch.dtype
) -> list[float]:
    """Errors of the result and of all gradients, against float64."""
    weight, leaves = operands(shape, turned, dtype)
    total: Any = LowRankSum(weight, leaves[0], leaves[1], 0.5)
    got = use(total, leaves[2])
    wide = [t.detach().double().requires_grad_(True) for t in leaves]
    dense = weight.dequantize(torch.float64) + 0.5 * wide[0] @ wide[1]
    want = use(dense, wide[2])
    assert got.shape == want.shape
    assert got.dtype == dtype
    gradient = randn(*got.shape, dtype=dtype, seed=4)
    got.backward(gradient)
    want.backward(gradient.double())
    pairs = [(got.detach(), want.detach())]
    for leaf, own in zip(leaves, wide, strict=True):
        if own.grad is not None:
            assert leaf.grad is not None
            pairs.append((leaf.grad, own.grad))
    return [error(*pair) for pair in pairs]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", USES)
def test_products_and_gradients(name: str, turned: bool, no_fallback: None) -> None:
    shape, use = USES[name]
    errors = compared(shape, use, turned, torch.float32)
    assert len(errors) == 4
    assert max(errors) < 1e-5
    assert max(compared(shape, use, turned, torch.bfloat16)) < 0.02


@pytest.mark.parametrize("name", DENSE_USES)
def test_all_else_is_right_and_logged(name: str, fallbacks: list[str]) -> None:
    shape, use = DENSE_USES[name]
    errors = compared(shape, use, False, torch.float32)
    assert len(errors) == 4
    assert max(errors) < 1e-5
    assert "with an adapter of its own on each call" in fallbacks[0]


def test_what_the_sum_says_of_itself(no_fallback: None) -> None:
    weight, (left, right, _) = operands((1,), False, torch.bfloat16)
    total = LowRankSum(weight, left, right, 2.0)
    assert total.shape == (E, N, K)
    assert (total.dim(), total.ndim, len(total)) == (3, 3, E)
    assert total.dtype == torch.bfloat16
    assert total.requires_grad
    assert not LowRankSum(weight, left.detach(), right.detach(), 2.0).requires_grad
    assert total.to(torch.float32)[0].dtype == torch.float32
    assert "LowRankSum(AffineQuantizedTensor(shape=[3, 32, 64]" in repr(total)
    with pytest.raises(IndexError, match="3 is out of"):
        total[3]


def test_only_peft_gets_such_a_sum(fallbacks: list[str]) -> None:
    """Others may write to the factors before they use what they asked for."""
    weight, (left, right, _) = operands((1,), False, torch.float32)
    got = torch.baddbmm(weight, left, right, alpha=0.5)
    want = weight.dequantize() + 0.5 * left @ right
    assert type(got) is Tensor
    assert error(got.detach(), want.detach()) < 1e-6
    assert [line.split()[0] for line in fallbacks] == ["aten.baddbmm.default"]


def test_below_autograd_nothing_is_lost_in_silence() -> None:
    weight, (left, right, _) = operands((1,), False, torch.float32)
    total = LowRankSum(weight, left, right, 0.5)
    refused = pytest.raises(NotImplementedError, match="a packed weight and an adapter")
    with torch._C.DisableTorchFunctionSubclass(), refused:
        total.sum()
