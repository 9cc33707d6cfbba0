"""The operators on CUDA, from the call to what the kernels write, without a GPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn
from emulated_cuda import EmulatedCuda, emulated_cuda, needs_compiler
from torch import Tensor

from affine_tensor import AffineQuantizedTensor, layout, ops
from affine_tensor.doctor.watch import watched
from affine_tensor.kernels import KernelError, cuda, settings
from affine_tensor.kernels.cuda import experts, launch, library, products

__all__ = ["emulated_cuda"]  # a fixture

pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated_cuda")]

BOUND = {torch.float32: 1e-6, torch.float16: 3.7e-4, torch.bfloat16: 2.9e-3}


@pytest.fixture(autouse=True)
def operators_of_the_device() -> None:
    """They are those of CUDA here."""


def parts_of(weight: AffineQuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight._packed, weight.scales, weight.biases


def form_of(weight: AffineQuantizedTensor) -> dict[str, Any]:
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "dtype": weight.dtype,
    }


def dense_of(weight: AffineQuantizedTensor) -> Tensor:
    own = {"bits": weight.bits, "group_size": weight.group_size}
    return ops.reference("dequantize")(
        *parts_of(weight), weight.permutation, **own, dtype=torch.float64
    )


def close(y: Tensor, wanted: Tensor) -> None:
    error = float((y.double() - wanted).norm() / wanted.norm())
    assert error < BOUND[y.dtype]


# ---- one matrix -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 150])
def test_products(rows: int, dtype: torch.dtype, emulated_cuda: EmulatedCuda) -> None:
    weight = make(37, 192, bits=4, group_size=32, dtype=dtype)
    x, bias = randn(rows, 192, dtype=dtype), randn(37, dtype=dtype, seed=2)
    for own in (None, bias):
        before = emulated_cuda.launches
        y = F.linear(x, weight, own)
        assert emulated_cuda.launches > before
        wanted = x.double() @ dense_of(weight).T
        close(y, wanted if own is None else wanted + own)
        # Once more, by what was prepared.
        before = emulated_cuda.launches
        assert torch.equal(F.linear(x, weight, own), y)
        assert emulated_cuda.launches == before + 1


def test_a_product_that_is_prepared_looks_nothing_else_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, x = make(32, 128), randn(1, 1, 128)
    y = F.linear(x, weight)
    assert y.shape == (1, 1, 32)
    for module, name in ((products, "launch_of"), (cuda, "_make_linear")):
        monkeypatch.setattr(module, name, None)
    assert torch.equal(F.linear(x, weight), y)
    # Another weight of the same form, and a part of one at the same alignment.
    other = make(64, 128, seed=4)
    some = AffineQuantizedTensor.from_packed(
        *(part[16:48] for part in (other.packed, other.scales, other.biases)),
        bits=4,
        group_size=32,
    )
    close(F.linear(x, some), x.double() @ dense_of(other)[16:48].T)


def test_inputs_and_weights_that_do_not_lie_side_by_side() -> None:
    weight = make(48, 128, dtype=torch.float16)
    dense = dense_of(weight)
    wide = randn(4, 3, 300, dtype=torch.float16)
    inputs = [
        wide[..., :128],  # rows at one distance
        wide[:, 1:2, 5:133],  # at an odd address
        wide[:2, :2, :128],  # at no one distance
        randn(128, 6, dtype=torch.float16).t(),
        wide[0, 0, :128],
        randn(1, 128, dtype=torch.float16).expand(3, 128),
    ]
    for x in inputs:
        y = F.linear(x, weight)
        assert y.shape == (*x.shape[:-1], 48)
        close(y, x.double() @ dense.T)
    x = inputs[0]
    packed, scales, biases = parts_of(weight)
    odd = (packed[1::3], scales.t().contiguous().t()[1::3], biases[1::3])
    y = torch.ops.affine_tensor.linear(x, *odd, **form_of(weight))
    close(y, x.double() @ dense[1::3].T)


def test_biases_of_all_shapes() -> None:
    weight, x = make(40, 64), randn(2, 3, 64)
    wanted = x.double() @ dense_of(weight).T
    biases = [
        randn(1),
        randn(80)[::2],
        randn(1, 1, 40),
        randn(3, 40),
        randn(2, 3, 1),
        randn(2, 3, 40),
    ]
    op = torch.ops.affine_tensor.linear
    for bias in biases:
        y = op(x, *parts_of(weight), None, bias, **form_of(weight))
        close(y, wanted + bias)
    with pytest.raises(RuntimeError, match="does not broadcast"):
        op(x, *parts_of(weight), None, randn(39), **form_of(weight))
    with pytest.raises(RuntimeError, match="must agree"):
        op(x, *parts_of(weight), None, randn(40).half(), **form_of(weight))


def test_permuted_columns() -> None:
    weight = make(24, 128, dtype=torch.bfloat16, permuted=True)
    for rows in (1, 5):
        x = randn(rows, 128, dtype=torch.bfloat16)
        close(F.linear(x, weight), x.double() @ dense_of(weight).T)
        x = randn(rows, 24, dtype=torch.bfloat16)
        close(x @ weight, x.double() @ dense_of(weight))
    assert torch.equal(weight.dequantize(torch.float64), dense_of(weight))


@pytest.mark.parametrize("biased", [False, True])
def test_dense_weights_a_part_at_a_time(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make(600, 512, dtype=torch.bfloat16)
    dense = dense_of(weight)
    bias = randn(600, dtype=torch.bfloat16) if biased else None
    x, back = (
        randn(130, 512, dtype=torch.bfloat16),
        randn(70, 600, dtype=torch.bfloat16),
    )
    for scratch in (1 << 30, 1):
        monkeypatch.setattr(cuda, "_SCRATCH", scratch)
        wanted = x.double() @ dense.T
        close(F.linear(x, weight, bias), wanted + (0 if bias is None else bias))
        close(back @ weight, back.double() @ dense)


def test_float64_and_empty_operands(emulated_cuda: EmulatedCuda) -> None:
    weight = make(8, 64).to(torch.float64)
    x = randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, weight), x @ dense_of(weight).T)
    assert F.linear(x[:0], weight).shape == (0, 8)
    assert F.linear(x, weight[:0]).shape == (3, 0)


def test_arguments_that_do_not_fit_are_refused() -> None:
    weight = make(8, 64)
    with pytest.raises(RuntimeError, match="last dimension must be 64"):
        F.linear(randn(2, 63), weight)
    with pytest.raises(RuntimeError, match="they must agree"):
        F.linear(randn(2, 64).half(), weight)
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.affine_tensor.linear(
            randn(2, 64), *parts_of(weight), **{**form_of(weight), "bits": 5}
        )


def test_rows_are_the_same_whatever_others_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "batch_invariant", True)
    for dtype in (torch.bfloat16, torch.float32):
        weight = make(33, 192, dtype=dtype)
        x = randn(20, 192, dtype=dtype)
        whole = F.linear(x, weight)
        for rows in (1, 2, 7):
            assert torch.equal(F.linear(x[:rows], weight), whole[:rows])


def test_gradients(emulated_cuda: EmulatedCuda) -> None:
    weight = make(24, 64)
    x = randn(5, 64).requires_grad_()
    gradient = randn(5, 24, seed=3)
    F.linear(x, weight).backward(gradient)
    assert x.grad is not None
    close(x.grad, gradient.double() @ dense_of(weight))


# ---- experts --------------------------------------------------------------------

OWNERS = [2, 0, 2, 2, 1, 0, 2]


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("sorting", [False, True])
def test_experts_by_index(
    dtype: torch.dtype, permuted: bool, sorting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_SORTING", 0 if sorting else 1 << 60)
    weight = make(4, 40, 64, dtype=dtype, permuted=permuted)
    dense = dense_of(weight)
    x = randn(len(OWNERS) + 2, 64, dtype=dtype)
    owners = torch.tensor([*OWNERS, 4, -1])
    for index_dtype in (torch.int64, torch.int32):
        y = torch.ops.affine_tensor.grouped_linear(
            x,
            *parts_of(weight),
            weight.permutation,
            indices=owners.to(index_dtype),
            **form_of(weight),
        )
        wanted = torch.stack(
            [a.double() @ dense[e].T for a, e in zip(x, OWNERS, strict=False)]
        )
        close(y[:-2], wanted)
        assert y[-2:].isnan().all()


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("ends", [[2, 2, 5, 7], [0, 70, 70, 73]])
def test_experts_by_offsets(
    ends: list[int], dtype: torch.dtype, permuted: bool
) -> None:
    weight = make(4, 40, 64, dtype=dtype, permuted=permuted)
    dense = dense_of(weight)
    x = randn(ends[-1] + 2, 64, dtype=dtype)
    y = torch.ops.affine_tensor.grouped_linear(
        x,
        *parts_of(weight),
        weight.permutation,
        offsets=torch.tensor(ends, dtype=torch.int32),
        **form_of(weight),
    )
    wanted = torch.zeros(len(x), 40, dtype=torch.float64)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        wanted[start:end] = x[start:end].double() @ dense[expert].T
    close(y, wanted)
    assert (y[-2:] == 0).all()


def test_experts_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make(4, 40, 64, dtype=torch.bfloat16)
    x = randn(9, 64, dtype=torch.bfloat16)
    owners, ends = torch.arange(9) % 4, torch.tensor([1, 4, 4, 9])
    op, gradient = torch.ops.affine_tensor, randn(9, 40, dtype=torch.bfloat16)
    operands, form = parts_of(weight), form_of(weight)

    def run() -> None:
        for own in ({"indices": owners}, {"offsets": ends}):
            op.grouped_linear(x, *operands, **own, **form)
            op.grouped_matmul(gradient, *operands, **own, **form)

    run()
    for name in ("item", "tolist", "nonzero", "unique", "__bool__"):
        monkeypatch.setattr(Tensor, name, None)
    for sorting in (0, 1 << 60):
        monkeypatch.setattr(experts, "_SORTING", sorting)
        run()


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_gradients_of_experts(
    permuted: bool, dtype: torch.dtype, emulated_cuda: EmulatedCuda
) -> None:
    op = torch.ops.affine_tensor.grouped_matmul
    weight = make(3, 16, 64, dtype=dtype)
    form, parts = form_of(weight), parts_of(weight)
    x = randn(6, 16, dtype=dtype)
    owners = torch.tensor([2, 0, 1, 2, 2, 0])
    dense, permutation = dense_of(weight), None
    if permuted:
        permutation = torch.rand(3, 64).argsort(-1).to(torch.int32)
        places = permutation.long().unsqueeze(1).expand_as(dense)
        dense = torch.empty_like(dense).scatter_(-1, places, dense)
    wanted = torch.einsum("tn,tnk->tk", x.double(), dense[owners])
    before = emulated_cuda.launches
    y = op(x, *parts, permutation, indices=owners, **form)
    assert emulated_cuda.launches > before
    close(y, wanted)
    order, ends = owners.argsort(stable=True), torch.tensor([2, 3, 5])
    y = op(x[order], *parts, permutation, offsets=ends, **form)
    close(y[:5], wanted[order][:5])
    assert (y[5:] == 0).all()
    y = op(x, *parts, permutation, indices=torch.tensor([2, 3, 1, -1, 2, 0]), **form)
    assert y[[1, 3]].isnan().all()
    close(y[[0, 2, 4, 5]], wanted[[0, 2, 4, 5]])


def test_more_rows_than_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_MOST_ROWS", 4)
    test_experts_by_index(torch.float32, False, False, monkeypatch)


# ---- weights --------------------------------------------------------------------


def test_embedding_and_quantize(emulated_cuda: EmulatedCuda) -> None:
    dense = randn(50, 128, dtype=torch.bfloat16)
    before = emulated_cuda.launches
    packed, scales, biases = torch.ops.affine_tensor.quantize(
        dense, bits=3, group_size=32
    )
    assert emulated_cuda.launches > before
    expected = ops.reference("quantize")(dense, bits=3, group_size=32)
    assert all(map(torch.equal, (packed, scales, biases), expected))
    weight = AffineQuantizedTensor.from_packed(
        packed, scales, biases, bits=3, group_size=32
    )
    ids = torch.tensor([[3, 49, 0], [7, 7, 1]])
    y = F.embedding(ids, weight)
    assert torch.equal(y, weight.dequantize()[ids])
    bad = torch.ops.affine_tensor.embedding(
        torch.tensor([50, -1, 2]), *parts_of(weight), **form_of(weight)
    )
    assert bad[:2].isnan().all()
    assert not bad[2].isnan().any()


def test_weights_that_are_not_finite_are_refused() -> None:
    dense = randn(4, 64)
    dense[2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"the weight at \[2, 5\] is NaN"):
        torch.ops.affine_tensor.quantize(dense, bits=4, group_size=32)


# ---- loading and launching ------------------------------------------------------


def test_a_kernel_that_is_wrong_raises_or_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight, x = make(16, 64, bits=5), randn(2, 64)
    wanted = x.double() @ dense_of(weight).T
    monkeypatch.setattr("affine_tensor.kernels.cuda.check._difference", lambda *_: "no")
    with pytest.raises(
        KernelError, match=r"affine_gemv .* computes something else: no"
    ):
        F.linear(x, weight)
    monkeypatch.setattr(settings, "strict", False)
    close(F.linear(x, weight), wanted)
    assert "weights are dequantized instead" in caplog.text


def test_what_is_met_in_a_capture_is_checked_later(
    monkeypatch: pytest.MonkeyPatch, emulated_cuda: EmulatedCuda
) -> None:
    weight, x = make(16, 64, bits=6), randn(2, 64)
    checks = []
    monkeypatch.setattr(
        "affine_tensor.kernels.cuda.check.compare", lambda *_: checks.append(1)
    )
    monkeypatch.setattr(library, "capturing", lambda: True)
    close(F.linear(x, weight), x.double() @ dense_of(weight).T)
    assert not checks
    assert not products.calls
    monkeypatch.setattr(library, "capturing", lambda: False)
    F.linear(x, weight)
    F.linear(x, weight)
    assert len(checks) == 1
    assert emulated_cuda.library.capture_mode() == 0  # as it was found


def test_a_thread_without_a_context_and_many_at_once() -> None:
    weight = make(16, 64)
    inputs = [randn(1, 64, seed=i) for i in range(8)]
    wanted = [F.linear(x, weight) for x in inputs]
    wrong = []

    def work(x: Tensor, y: Tensor) -> None:
        for _ in range(20):
            if not torch.equal(F.linear(x, weight), y):
                wrong.append(x)

    own = [
        threading.Thread(target=work, args=pair)
        for pair in zip(inputs, wanted, strict=True)
    ]
    for thread in own:
        thread.start()
    for thread in own:
        thread.join()
    assert not wrong


def test_blocks_of_a_launch_are_not_shared() -> None:
    made = launch.Launch(1, 0, (1, 1, 1), (32, 1, 1), (None, ("i", 3), ("q", -1), None))
    first, second = made._blocks.pop(), made._block()
    assert first[1] != second[1]
    assert len(first[0]) == len(second[0])


def test_what_the_driver_is_given(emulated_cuda: EmulatedCuda) -> None:
    weight = make(4096, 1024, dtype=torch.bfloat16)
    F.linear(randn(50, 1024, dtype=torch.bfloat16)[:40], weight[:64])
    seen = emulated_cuda.seen
    assert seen.stream == 7
    assert seen.cluster[1] in (1, 2)
    assert seen.grid[0] >= 1
    assert seen.shared > 48 << 10  # more than a block may have unasked


def test_an_error_of_the_driver_is_told(emulated_cuda: EmulatedCuda) -> None:
    made = launch.Launch(1, 0, (0, 1, 1), (32, 1, 1), ())
    with pytest.raises(RuntimeError, match="cannot be launched: error 1"):
        made(0)
    with pytest.raises(KernelError, match="cuModuleLoadData fails"):
        launch.function(b"/nowhere\0", "affine_gemv", 0)


def test_the_doctor_sees_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(3, 192), make(37, 192)
    F.linear(x, weight)  # is prepared
    with watched() as watch:
        F.linear(x, weight)
        assert (watch.launches, watch.calls) == (["own"], 1)
        watch.clear()
        monkeypatch.setattr(settings, "cuda_backend", "reference")
        F.linear(x, weight)
        assert watch.launches == []
    monkeypatch.setattr(settings, "cuda_backend", "own")
    F.linear(x, weight)
    assert watch.launches == []
