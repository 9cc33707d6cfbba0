"""The same on an accelerator: codes, products, gradients, a whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    dequantize_,
    layout,
    quantize_,
)
from affine_tensor.kernels import machine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every accelerator, or the device that was asked for with --device."""
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--device")
        kinds = [chosen] if chosen in ("cpu", "cuda", "mps") else ["cuda", "mps"]
        metafunc.parametrize("device", kinds, indirect=True)


@pytest.fixture
def operators_of_the_device() -> None:
    """Tensors lie on the device here: nothing is to be put in its place."""


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    kind = request.param
    if not machine.is_available(kind):
        text = f"there is no {kind} device on this machine"
        if request.config.getoption("--device") == kind:
            pytest.fail(f"--device {kind}: {text}")
        pytest.skip(text)
    return kind


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
def test_quantize_gives_the_bits_of_the_cpu(
    device: str, bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(512, 1024).to(dtype)
    weight[0] = 0
    weight[1] = 3
    weight[2] = weight[2].round()
    for group_size in layout.GROUP_SIZES:
        form = {"bits": bits, "group_size": group_size}
        for ours, cpu in zip(
            layout.quantize(weight.to(device), **form),
            layout.quantize(weight, **form),
            strict=True,
        ):
            assert torch.equal(ours.cpu(), cpu)


@pytest.mark.parametrize("bits", layout.BITS)
def test_dequantize_gives_the_bits_of_the_cpu(device: str, bits: int) -> None:
    if device == "mps":
        pytest.skip("there is no float64 on mps: sums are float32, rounded twice")
    form = {"bits": bits, "group_size": 64}
    parts = layout.quantize(torch.randn(256, 1024).to(torch.bfloat16), **form)
    moved = [part.to(device) for part in parts]
    for dtype in layout.WEIGHT_DTYPES:
        ours = layout.dequantize(*moved, **form, dtype=dtype)
        assert torch.equal(ours.cpu(), layout.dequantize(*parts, **form, dtype=dtype))


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_and_gradients_are_those_of_float64(
    device: str, bits: int, rows: int
) -> None:
    torch.manual_seed(0)
    weight = AffineQuantizedTensor.from_dense(torch.randn(192, 256), bits, 64)
    x = torch.randn(rows, 256)
    gradient = torch.randn(rows, 192)
    exact = weight.dequantize(torch.float64)
    there = x.to(device).requires_grad_()
    y = F.linear(there, weight.to(device))
    y.backward(gradient.to(device))
    assert there.grad is not None
    torch.testing.assert_close(
        y.cpu().double(), x.double() @ exact.T, rtol=0, atol=2e-4
    )
    torch.testing.assert_close(
        there.grad.cpu().double(), gradient.double() @ exact, rtol=0, atol=2e-4
    )


def test_a_model_moves_and_agrees_with_its_dense_twin(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64), nn.Linear(64, 8))
    quantize_(model, AffineConfig(4, 32))
    ids = torch.arange(64)
    with torch.no_grad():
        here = model(ids)
        there = model.to(device)(ids.to(device))
        assert isinstance(model[1].weight, AffineQuantizedTensor)
        assert model[1].weight._packed.device.type == device
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)
        dequantize_(model)
        torch.testing.assert_close(
            model(ids.to(device)).cpu(), here, rtol=1e-4, atol=1e-5
        )


def test_pinned_memory_and_non_blocking_moves(device: str) -> None:
    if device != "cuda":
        pytest.skip("pinned memory is CUDA's")
    weight = AffineQuantizedTensor.from_dense(torch.randn(64, 128), 4, 64)
    pinned = weight.pin_memory()
    assert pinned.is_pinned()
    assert not weight.is_pinned()
    moved = pinned.to(device, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(moved.dequantize().cpu(), weight.dequantize())


def test_autocast_of_the_device(device: str) -> None:
    weight = AffineQuantizedTensor.from_dense(torch.randn(64, 128), 4, 64).to(device)
    x = torch.randn(3, 128, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        y = F.linear(x, weight)
    assert y.dtype == torch.bfloat16
    dense = weight.dequantize(torch.bfloat16)
    torch.testing.assert_close(y, F.linear(x.bfloat16(), dense), rtol=2e-2, atol=2e-2)
