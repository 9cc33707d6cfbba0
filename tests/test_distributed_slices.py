"""Loaders that cut a weight for tensor parallelism themselves, as vLLM's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make, randn
from torch import Tensor, nn

from affine_tensor import AffineQuantizedTensor, layout

MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
WORLD = 2


def parameter(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(make(*shape, seed=1, **options), requires_grad=False)


def same(got: Any, want: Any) -> None:
    assert isinstance(got, AffineQuantizedTensor)
    for one, other in zip(got._parts(), want._parts(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Any:
    with MODES[request.param]():
        yield


def test_a_shard_of_rows_is_loaded(mode: Any, no_fallback: None) -> None:
    """ColumnParallelLinear: its rows out of those of the file."""
    loaded = make(64, 128, seed=2)
    for rank in range(WORLD):
        own = parameter(32, 128)
        own.data.copy_(loaded.narrow(0, rank * 32, 32))
        same(own, loaded[rank * 32 : rank * 32 + 32])


@pytest.mark.parametrize("bits", layout.BITS)
def test_a_shard_of_input_channels_is_loaded(
    bits: int, mode: Any, no_fallback: None
) -> None:
    """RowParallelLinear."""
    loaded = make(64, 128, bits=bits, seed=2)
    for rank in range(WORLD):
        own = parameter(64, 64, bits=bits)
        own.data.copy_(loaded.narrow(1, rank * 64, 64))
        dense = loaded.dequantize()[:, rank * 64 : rank * 64 + 64]
        assert torch.equal(own.dequantize(), dense)


def test_fused_projections_are_filled_one_by_one(mode: Any, no_fallback: None) -> None:
    """QKVParallelLinear and MergedColumnParallelLinear."""
    fused = parameter(64 + 32 + 32, 128)
    pieces = [make(rows, 128, seed=rows + 2) for rows in (64, 32, 31)]
    pieces[2] = make(32, 128, seed=9)
    start = 0
    for piece in pieces:
        fused.data.narrow(0, start, len(piece)).copy_(piece)
        start += len(piece)
    same(fused, torch.cat(pieces))


def test_experts_are_filled_one_by_one(mode: Any, no_fallback: None) -> None:
    """FusedMoE: gate (w1) and up (w3) into w13, and w2 along its input channels."""
    w13, w2 = parameter(3, 64, 128), parameter(3, 128, 64)
    for rank in range(WORLD):
        for expert in range(3):
            gate, up = (make(64, 128, seed=10 * expert + n) for n in (1, 2))
            down = make(128, 128, seed=10 * expert + 3)
            mine = slice(rank * 32, rank * 32 + 32)
            data = w13.data[expert]
            data.narrow(0, 0, 32).copy_(gate.narrow(0, rank * 32, 32))
            data.narrow(0, 32, 32).copy_(up.narrow(0, rank * 32, 32))
            w2.data[expert].copy_(down.narrow(1, rank * 64, 64))
            same(w13[expert], torch.cat([gate[mine], up[mine]]))
            columns = down.dequantize()[:, rank * 64 : rank * 64 + 64]
            assert torch.equal(w2[expert].dequantize(), columns)


def test_into_a_part_along_the_input_channels(mode: Any, no_fallback: None) -> None:
    whole, loaded = parameter(64, 128), make(64, 64, seed=2)
    kept = whole.dequantize()[:, :64]
    whole.data.narrow(1, 64, 64).copy_(loaded)
    assert torch.equal(whole.dequantize()[:, 64:], loaded.dequantize())
    assert torch.equal(whole.dequantize()[:, :64], kept)


def test_floats_are_quantized_where_they_are_put(mode: Any, no_fallback: None) -> None:
    whole, loaded = parameter(64, 128), randn(32, 64)
    whole.data.narrow(0, 32, 32).narrow(1, 64, 64).copy_(loaded)
    want = AffineQuantizedTensor.from_dense(loaded, bits=4, group_size=32)
    assert torch.equal(whole.dequantize()[32:, 64:], want.dequantize())


def test_a_shard_shares_the_memory_of_its_weight() -> None:
    weight = parameter(64, 128)
    for dim in (0, 1):
        shard = weight.data.narrow(dim, 32, 32)
        for part, whole in zip(shard._parts(), weight._parts(), strict=True):
            assert (
                part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            )


def misfits() -> dict[str, tuple[Tensor, tuple[int, int, int]]]:
    return {
        "within a group": (parameter(64, 128), (1, 16, 64)),
        "of act-order": (parameter(64, 128, permuted=True), (1, 32, 64)),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", misfits())
def test_what_is_no_packed_shard_is_not_written_into_a_copy(
    name: str, packed: bool, mode: Any
) -> None:
    weight, (dim, start, length) = misfits()[name]
    before = weight.dequantize()
    loaded = make(64, length, seed=2) if packed else randn(64, length)
    with pytest.raises(NotImplementedError, match="is a copy of a part of a packed"):
        weight.data.narrow(dim, start, length).copy_(loaded)
    piece = weight.data.split([48, 32, 48], dim)[1]
    with pytest.raises(NotImplementedError, match="is a copy of a part of a packed"):
        piece.copy_(loaded[:, :32])
    assert torch.equal(weight.dequantize(), before)


def test_shards_of_another_format_are_refused() -> None:
    weight = parameter(64, 128)
    for options in ({"bits": 8}, {"group_size": 64}, {"permuted": True}):
        loaded = make(64, 128, seed=2, **options)
        with pytest.raises(RuntimeError, match="must agree"):
            weight.data.narrow(0, 0, 32).copy_(loaded.narrow(0, 0, 32))


def test_a_shard_read_where_it_is_not_packed_is_that_of_the_dense_weight() -> None:
    for weight, (dim, start, length) in misfits().values():
        got = weight.narrow(dim, start, length)
        assert torch.equal(got, weight.dequantize().narrow(dim, start, length))
