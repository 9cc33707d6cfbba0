"""fuse_projections: the same results from fewer products, and nothing else changed."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import affine_tensor
from affine_tensor import (
    AffineQuantizedTensor,
    fuse_projections,
    ops,
    quantize_,
    split_projections,
    tensor,
)

ATTENTION = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three linears of one input, or of two."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 96, bias=bias)
        self.k_proj = nn.Linear(64, 32, bias=bias)
        self.v_proj = nn.Linear(64, 32, bias=bias)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        parts = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        return torch.cat(parts, -1)


@pytest.fixture
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    model = LlamaForCausalLM(config).eval()
    quantize_(model)
    return model


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of weights that are multiplied, as the operator sees them."""
    seen: list[torch.Size] = []
    device_of = ops.device_of
    inner = ops._kernels["linear"].get("cpu") or ops.reference("linear")

    def spy(x: Tensor, packed: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(packed.shape)
        return inner(x, packed, *args, **kwargs)

    monkeypatch.setattr(ops, "device_of", device_of)
    monkeypatch.setitem(ops._kernels["linear"], "cpu", spy)
    return seen


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(tensor, "_logged", set(), raising=False)
    caplog.set_level(logging.WARNING, "affine_tensor")


def _attention(bias: bool = False, **config: Any) -> Attention:
    torch.manual_seed(1)
    model = Attention(bias)
    quantize_(model, **config)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@torch.no_grad()
def test_results_are_the_same_with_one_product(
    bias: bool, rows: int, products: list[torch.Size]
) -> None:
    model = _attention(bias)
    x = torch.randn(2, rows, 64)
    expected = model(x)
    assert len(products) == 3
    assert fuse_projections(model) == ["+".join(ATTENTION)]
    products.clear()
    assert torch.equal(model(x), expected)
    assert [shape[0] for shape in products] == [160]
    assert model.q_proj.__dict__["forward"].joint.waiting is None


@torch.no_grad()
def test_a_whole_model_multiplies_less(llama: Any, products: list[torch.Size]) -> None:
    ids = torch.arange(7).reshape(1, 7)
    expected = llama(ids).logits
    before = len(products)
    assert len(fuse_projections(llama)) == 4
    products.clear()
    assert torch.equal(llama(ids).logits, expected)
    assert before - len(products) == 2 * (2 + 1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    fused = llama.generate(ids, **options)
    split_projections(llama)
    assert torch.equal(fused, llama.generate(ids, **options))


@torch.no_grad()
def test_compiles_to_one_graph_with_the_joined_products(
    llama: Any, products: list[torch.Size]
) -> None:
    ids = torch.arange(7).reshape(1, 7)
    expected = llama(ids).logits
    fuse_projections(llama)
    torch._dynamo.reset()
    compiled = torch.compile(llama, fullgraph=True)
    compiled(ids)
    products.clear()
    got = compiled(ids).logits
    assert len(products) == 2 * (1 + 1 + 1 + 1) + 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_inputs_are_the_same() -> None:
    model = _attention(bias=False)
    x = torch.randn(3, 64, requires_grad=True)
    out = torch.randn(3, 160)
    (expected,) = torch.autograd.grad(model(x), x, out)
    fuse_projections(model)
    (got,) = torch.autograd.grad(model(x), x, out)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_biases_are_still_trained() -> None:
    model = _attention(bias=True)
    fuse_projections(model)
    model(torch.randn(3, 64)).sum().backward()
    for name in ATTENTION:
        grad = getattr(model, name).bias.grad
        assert torch.equal(grad, torch.full_like(grad, 3.0))


@torch.no_grad()
def test_biases_may_be_set_in_any_way() -> None:
    model = _attention(bias=True)
    fuse_projections(model)
    x = torch.zeros(1, 64)
    model.k_proj.bias.data = torch.full((32,), 2.0)
    assert torch.equal(model(x)[:, 96:128], torch.full((1, 32), 2.0))
    model.k_proj.bias.fill_(3.0)
    assert torch.equal(model(x)[:, 96:128], torch.full((1, 32), 3.0))
    expected = model(x)
    model.k_proj.bias = None
    expected[:, 96:128] = 0
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_state_dict_and_parameters_are_unchanged() -> None:
    model = _attention(bias=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    fuse_projections(model)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(value, before[name])
        assert dict(model.named_parameters())[name] is parameters[name]


@torch.no_grad()
def test_memory_is_shared_not_doubled() -> None:
    model = _attention()
    fuse_projections(model)
    joint = model.q_proj.__dict__["forward"].joint
    assert model.k_proj.weight.data_ptr() == joint.weight[96:128].data_ptr()
    x = torch.randn(1, 64)
    other = AffineQuantizedTensor.from_dense(torch.randn(32, 64))
    model.k_proj.weight.copy_(other)
    assert torch.equal(model(x)[:, 96:128], nn.functional.linear(x, other))


@torch.no_grad()
def test_saving_writes_what_it_wrote(llama: Any, tmp_path: Path) -> None:
    affine_tensor.save_checkpoint(llama, tmp_path / "before")
    fuse_projections(llama)
    affine_tensor.save_checkpoint(llama, tmp_path / "after")
    llama.save_pretrained(tmp_path / "theirs")
    for name in ("before", "after"):
        assert (tmp_path / name / "model.safetensors").is_file()
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("before", "after")
    )
    assert first == second
    again = affine_tensor.from_pretrained(tmp_path / "theirs")
    ids = torch.arange(5).reshape(1, 5)
    assert torch.equal(again(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.no_grad()
def test_a_copy_computes_from_its_own_weights(how: str) -> None:
    model = _attention(bias=True)
    fuse_projections(model)
    x = torch.randn(2, 64)
    expected = model(x)
    copied = copy.deepcopy(model) if how == "deepcopy" else None
    copied = copied or pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), expected)
    other = AffineQuantizedTensor.from_dense(torch.randn(96, 64))
    copied.q_proj.weight.copy_(other)
    want = nn.functional.linear(x, other, copied.q_proj.bias)
    assert torch.equal(copied(x)[:, :96], want)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_other_weights_are_used_and_said(caplog: Any) -> None:
    model = _attention()
    fuse_projections(model)
    x = torch.randn(2, 64)
    model(x)
    model.to(torch.bfloat16)
    x = x.bfloat16()
    want = torch.cat(
        [nn.functional.linear(x, getattr(model, name).weight) for name in ATTENTION], -1
    )
    assert torch.equal(model(x), want)
    assert "call it again" in caplog.text
    assert model.q_proj.__dict__["forward"].joint.waiting is None
    member = model.q_proj.__dict__["forward"]
    assert member.joint.weight is member.weight is member.packed is None
    assert fuse_projections(model) == ["+".join(ATTENTION)]
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_one_weight_that_is_replaced(name: str) -> None:
    model = _attention()
    fuse_projections(model)
    x = torch.randn(2, 64)
    linear = getattr(model, name)
    new = AffineQuantizedTensor.from_dense(torch.randn(linear.out_features, 64))
    linear.weight = nn.Parameter(new, requires_grad=False)
    want = torch.cat(
        [nn.functional.linear(x, getattr(model, own).weight) for own in ATTENTION], -1
    )
    for _ in range(2):
        assert torch.equal(model(x), want)


@torch.no_grad()
def test_different_inputs_are_multiplied_apart(
    caplog: Any, products: list[torch.Size]
) -> None:
    model = _attention()
    x, other = torch.randn(2, 64), torch.randn(2, 64)
    expected = model(x, other)
    fuse_projections(model)
    for _ in range(3):
        assert torch.equal(model(x, other), expected)
    assert "different inputs" in caplog.text
    products.clear()
    assert torch.equal(model(x, other), expected)
    assert [shape[0] for shape in products] == [96, 32, 32]


@torch.no_grad()
def test_an_input_that_is_written_to_in_between() -> None:
    model = _attention()
    fuse_projections(model)
    x = torch.randn(2, 64)
    model.q_proj(x)
    x.mul_(2)
    got = model.k_proj(x)
    assert torch.equal(got, nn.functional.linear(x, model.k_proj.weight))


@torch.no_grad()
def test_only_what_agrees_is_joined() -> None:
    model = _attention()
    four = AffineQuantizedTensor.from_dense(torch.randn(32, 64), bits=8)
    model.v_proj.weight = nn.Parameter(four, requires_grad=False)
    assert fuse_projections(model) == ["q_proj+k_proj"]
    assert fuse_projections(model) == []  # once
    x = torch.randn(2, 64)
    assert torch.equal(model(x)[:, 128:], nn.functional.linear(x, four))


@torch.no_grad()
def test_dense_and_permuted_weights_are_left_alone() -> None:
    assert fuse_projections(Attention()) == []
    model = _attention()
    weight = model.k_proj.weight
    order = torch.randperm(64).int()
    permuted = AffineQuantizedTensor.from_packed(
        weight.packed,
        weight.scales,
        weight.biases,
        bits=weight.bits,
        group_size=weight.group_size,
        permutation=order,
    )
    model.k_proj.weight = nn.Parameter(permuted, requires_grad=False)
    assert fuse_projections(model) == ["q_proj+v_proj"]


@torch.no_grad()
def test_hooks_still_run() -> None:
    model = _attention()
    fuse_projections(model)
    seen: list[torch.Size] = []
    model.k_proj.register_forward_hook(lambda _, __, y: seen.append(y.shape))
    model(torch.randn(2, 64))
    assert seen == [torch.Size([2, 32])]


@torch.inference_mode()
def test_in_inference_mode() -> None:
    model = _attention()
    x = torch.randn(2, 64)
    expected = model(x)
    fuse_projections(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_names_may_be_given() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 64)})
    quantize_(model)
    assert fuse_projections(model) == []
    assert fuse_projections(model, [("a", "b")]) == ["a+b"]


def test_each_way_of_computing_has_a_product_of_its_own() -> None:
    model = _attention()
    fuse_projections(model)
    x = torch.randn(2, 64, requires_grad=True)
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad
    model.q_proj(x), model.v_proj(x)
    x = torch.randn(2, 64)
    with torch.inference_mode():
        model.q_proj(x)
    assert not model.k_proj(x).is_inference()
    model.q_proj(x), model.v_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        model.q_proj(x)
    assert model.k_proj(x).dtype == torch.float32


@torch.no_grad()
def test_weights_of_other_sizes_than_their_linears_say() -> None:
    model = _attention()
    new = AffineQuantizedTensor.from_dense(torch.randn(64, 64))
    model.q_proj.weight = nn.Parameter(new, requires_grad=False)
    x = torch.randn(2, 64)
    expected = [nn.functional.linear(x, getattr(model, n).weight) for n in ATTENTION]
    fuse_projections(model)
    for name, want in zip(ATTENTION, expected, strict=True):
        assert torch.equal(getattr(model, name)(x), want)


@torch.no_grad()
def test_an_exception_in_between_undoes_nothing() -> None:
    model = _attention()
    fuse_projections(model)
    x = torch.randn(2, 64)
    expected = model(x)
    for _ in range(5):
        model.q_proj(torch.randn(2, 64))  # and then something raises
        assert torch.equal(model(x), expected)
    assert not model.q_proj.__dict__["forward"].joint.apart


def test_siblings_may_be_changed_in_place_in_training() -> None:
    model = _attention()
    fuse_projections(model)
    x = torch.randn(2, 64, requires_grad=True)
    q, k = model.q_proj(x), model.k_proj(x)
    made = q.sin()
    k.mul_(2)
    (made.sum() + k.sum()).backward()
    assert x.grad is not None


@torch.no_grad()
def test_a_pickle_holds_no_joined_weights() -> None:
    model = _attention()
    alone = len(pickle.dumps(model))
    fuse_projections(model)
    held = model.q_proj.weight.nbytes
    split = len(pickle.dumps(copy.deepcopy(model)))
    assert split < alone + held


@torch.no_grad()
def test_different_inputs_compile() -> None:
    model = _attention()
    x, other = torch.randn(2, 64), torch.randn(2, 64)
    expected = model(x, other)
    fuse_projections(model)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    for _ in range(5):
        torch.testing.assert_close(compiled(x, other), expected, rtol=1e-5, atol=1e-5)
