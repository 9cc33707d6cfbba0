"""`affine_tensor.warmup`: after it, a model meets no kernel that is not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make
from torch import Tensor, nn

import affine_tensor
from affine_tensor import AffineConfig, ops, quantize_
from affine_tensor.kernels import metal
from affine_tensor.kernels.metal import library as metal_library
from affine_tensor.kernels.metal import values as metal_values


class Model(nn.Module):
    """An embedding that is tied to the head, biases or none, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=i > 0) for i in range(3))
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.embed.weight
        quantize_(self, AffineConfig(4, 32), progress=False)
        self.experts = nn.Parameter(make(3, 64, 64), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        flat = x.view(-1, 64)
        ends = torch.full((3,), len(flat), dtype=torch.int32)
        flat = torch._grouped_mm(flat, self.experts.transpose(-2, -1), offs=ends)
        return self.head(flat)


def test_what_is_warm_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = Model()
    expected = {rows: model(torch.arange(rows).view(1, rows)) for rows in (1, 8)}
    emulated: Any = request.getfixturevalue("emulated_metal")
    emulated.forget()
    monkeypatch.setattr(metal_values, "_plans", {})
    # embedding, head, Linear without and with a bias, experts: at two numbers of rows.
    assert affine_tensor.warmup(model, rows=(1, 8)) == 10
    compiled = set(metal_library.compiled())
    kinds = {variant.family for variant in compiled}
    assert kinds == {"embedding", "gemv", "gemv_small", "gemm"}
    for rows, wanted in expected.items():
        with torch.no_grad():
            y = model(torch.arange(rows).view(1, rows))
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert set(metal_library.compiled()) == compiled
    assert metal._plans
    # All is there: nothing more is compiled, and equal weights are run once.
    affine_tensor.warmup(model, rows=(8,))
    assert set(metal_library.compiled()) == compiled


def test_without_kernels_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(op: str) -> Any:
        raise AssertionError(f"{op} ran")

    model = Model()
    monkeypatch.setattr(ops, "overload", refuse)
    assert affine_tensor.warmup(model) == 0
    assert affine_tensor.warmup(nn.Linear(4, 4)) == 0


@pytest.mark.parametrize("rows", [(0,), (1, -3), (2.0,)])
def test_rows_are_numbers_from_one_on(rows: Any) -> None:
    with pytest.raises(ValueError, match="numbers from 1 on are allowed"):
        affine_tensor.warmup(nn.Linear(4, 4), rows=rows)


def test_gradients_and_mode_are_left_alone() -> None:
    model = Model().train()
    affine_tensor.warmup(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
