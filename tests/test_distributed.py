"""FSDP2, DTensor and distributed checkpoints of packed weights, on two processes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import make
from torch import Tensor, distributed, nn
from torch.distributed._state_dict_utils import _broadcast_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    footprint,
    quantize_,
)

FULL = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    """Two projections, an adapter beside one of them, and a norm."""

    def __init__(self, width: int = 64, inner: int = 96) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.adapter_in = nn.Linear(width, 4, bias=False)
        self.adapter_out = nn.Linear(4, inner, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.up(h) + self.adapter_out(self.adapter_in(h))
        return x + self.down(F.silu(h))


class Model(nn.Module):
    """65 rows of the embedding and 101 of the head: no multiple of two."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(65, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 101, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.tensor([[1, 2, 64, 7], [5, 30, 9, 11]])


def build() -> Model:
    """Packed, in three formats; the adapters and norms are dense and trained."""
    torch.manual_seed(0)
    model = Model()

    def choose(module: nn.Module, name: str) -> bool | AffineConfig:
        if "adapter" in name:
            return False
        if name.endswith("down"):
            return AffineConfig(3, 32)
        return AffineConfig(8, 16) if name == "head" else AffineConfig(4, 64)

    quantize_(model, AffineConfig(4, 64), choose, progress=False)
    down = model.blocks[0].down.weight
    order = torch.randperm(96).to(torch.int32)
    model.blocks[0].down.weight = nn.Parameter(
        AffineQuantizedTensor.from_packed(
            down.packed,
            down.scales,
            down.biases,
            bits=down.bits,
            group_size=down.group_size,
            permutation=order,
        ),
        requires_grad=False,
    )
    return model


def shard(model: Model, **options: Any) -> Model:
    options = {"mesh": gloo.mesh()} | options
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def packed_locals(model: nn.Module) -> dict[str, AffineQuantizedTensor]:
    return {
        name: p._local_tensor
        for name, p in model.named_parameters()
        if isinstance(p, DTensor) and isinstance(p._local_tensor, AffineQuantizedTensor)
    }


NAMES = {"embed.weight", "head.weight"} | {
    f"blocks.{i}.{own}.weight" for i in range(2) for own in ("up", "down")
}


def same(got: Any, want: Any) -> None:
    """The same codes, scales and order, bit for bit."""
    assert isinstance(got, AffineQuantizedTensor), type(got)
    assert (got.bits, got.group_size) == (want.bits, want.group_size)
    for one, other in zip(got._parts(), want._parts(), strict=True):
        assert torch.equal(one, other)


# ---- FSDP2 ------------------------------------------------------------------------


def case_fsdp_forward(folder: Path) -> None:
    model = build()
    want = model(IDS)
    with gloo.Fallbacks():
        shard(model)
        assert packed_locals(model).keys() == NAMES
        for _ in range(2):  # the second time its memory is used again
            torch.testing.assert_close(model(IDS), want, rtol=0, atol=0)
            model.reshard()  # the root, which FSDP2 leaves whole after forward
    assert packed_locals(model).keys() == NAMES
    rows = [len(packed_locals(model)[name]) for name in ("embed.weight", "head.weight")]
    assert rows == ([33, 51] if gloo.rank() == 0 else [32, 50])


def case_fsdp_keeps_no_whole_weight(folder: Path) -> None:
    model = shard(build())
    model(IDS)
    for name, local in packed_locals(model).items():
        held = sum(part.untyped_storage().nbytes() for part in local._parts())
        assert held <= local.nbytes * 1.1, name


def case_fsdp_training_equals_one_process(folder: Path) -> None:
    """Each process has half of the batch; gradients are averaged."""
    alone, model = build(), shard(build())
    optimizers = [
        torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        for one in (alone, model)
    ]
    target = torch.randint(101, (2, 4))
    mine = slice(gloo.rank(), gloo.rank() + 1)
    with gloo.Fallbacks():
        for _ in range(3):
            for one, optimizer, part in zip(
                (alone, model), optimizers, (slice(None), mine), strict=True
            ):
                logits = one(IDS[part]).flatten(0, 1)
                F.cross_entropy(logits, target[part].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
    whole = get_model_state_dict(model, options=FULL)
    for name, value in alone.state_dict().items() if gloo.rank() == 0 else ():
        if name in NAMES:
            same(whole[name], value)
        else:
            torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-6)
    moved = build().blocks[0].adapter_in.weight
    assert not torch.equal(alone.blocks[0].adapter_in.weight, moved)


def case_fsdp_input_gradients(folder: Path) -> None:
    alone, block = build().blocks[0], build().blocks[0]
    fully_shard(block, mesh=gloo.mesh())
    grads = []
    with gloo.Fallbacks():
        for one in (alone, block):
            x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
            x.requires_grad_()
            one(x).square().sum().backward()
            grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def case_fsdp_state_dict_round_trip(folder: Path) -> None:
    want = build().state_dict()
    model = shard(build())
    whole = get_model_state_dict(model, options=FULL)
    assert whole.keys() == want.keys()
    for name in NAMES:
        same(whole[name], want[name])
    other = shard(emptied(build()))
    set_model_state_dict(other, whole, options=FULL)
    with gloo.Fallbacks():
        torch.testing.assert_close(other(IDS), build()(IDS), rtol=0, atol=0)


def case_broadcast_from_rank0_is_refused_by_all(folder: Path) -> None:
    """The others know shapes only, and would wait for what the first does not send."""
    sent = build().state_dict() if gloo.rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    models = [shard(build()), build()]
    with torch.device("meta"):
        models.append(shard(build_on_meta()))
    for model in models:
        with pytest.raises(NotImplementedError, match="broadcast_from_rank0"):
            set_model_state_dict(model, sent, options=options)
        distributed.barrier()
    torch.testing.assert_close(models[0](IDS), build()(IDS), rtol=0, atol=0)


def build_on_meta() -> Model:
    model = Model()
    quantize_(model, AffineConfig(4, 32), progress=False)
    return model


def case_broadcast_from_rank0_is_refused_in_a_group(folder: Path) -> None:
    """Of some of the processes, here of the first alone."""
    alone = distributed.new_group([0])
    if gloo.rank() == 0:
        with pytest.raises(NotImplementedError, match="broadcast_from_rank0"):
            _broadcast_state_dict(
                {"w": make(64, 128)}, {}, torch.device("cpu"), pg=alone
            )


def case_broadcast_from_rank0_of_dense_weights_quantizes(folder: Path) -> None:
    """Rows are quantized each for itself, so shards are as the whole would be."""
    torch.manual_seed(7)
    dense = Model()
    want = copy.deepcopy(dense)
    quantize_(want, AffineConfig(4, 32), progress=False)
    model = shard(emptied(copy.deepcopy(want)))
    sent = dense.state_dict() if gloo.rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, sent, options=options)
    assert packed_locals(model).keys() >= NAMES
    torch.testing.assert_close(model(IDS), want(IDS), rtol=0, atol=0)


def case_footprint_is_that_of_the_shards(folder: Path) -> None:
    model, alone = build(), footprint(build())
    shard(model)
    here = footprint(model)
    held = 0
    for parameter in model.parameters():
        local = parameter.to_local()
        parts = local._parts() if isinstance(local, AffineQuantizedTensor) else [local]
        held += sum(part.numel() * part.element_size() for part in parts)
    assert here.bytes == held
    assert 0.4 < here.bytes / alone.bytes < 0.6
    rows = {row.name: row for row in here.rows}
    assert rows["head.weight"].bits == 8
    assert rows["head.weight"].shape == (51 - gloo.rank(), 64)


def case_fsdp_own_state_dict_is_loaded(folder: Path) -> None:
    for assign in (False, True):
        model, other = shard(build()), shard(build())
        state = {k: v.clone() for k, v in model.state_dict().items()}
        other(IDS)
        other.load_state_dict(state, assign=assign)
        with gloo.Fallbacks():
            torch.testing.assert_close(other(IDS), build()(IDS), rtol=0, atol=0)


def case_fsdp_of_experts(folder: Path) -> None:
    """Three experts: one process has two of them."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(make(3, 32, 64), requires_grad=False)
            self.ordered = nn.Parameter(
                make(3, 32, 64, permuted=True), requires_grad=False
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight.mT) + torch.bmm(x, self.ordered.mT)

    x = torch.randn(3, 5, 64)
    experts = Experts()
    want = experts(x)
    with gloo.Fallbacks():
        fully_shard(experts, mesh=gloo.mesh())
        torch.testing.assert_close(experts(x), want, rtol=0, atol=0)
    experts.reshard()
    assert packed_locals(experts)["weight"].shape[0] == 2 - gloo.rank()


def case_fsdp_mixed_precision(folder: Path) -> None:
    alone = build()
    model = shard(build(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with gloo.Fallbacks():
        got = model(IDS)
    assert got.dtype == torch.bfloat16
    want = alone.to(torch.bfloat16)(IDS)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert all(w.dtype == torch.float32 for w in packed_locals(model).values())


def case_fsdp_cpu_offload(folder: Path) -> None:
    model = shard(build(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    with gloo.Fallbacks():
        torch.testing.assert_close(model(IDS), build()(IDS), rtol=0, atol=0)


def case_fsdp_refuses_other_dimensions(folder: Path) -> None:
    layer = nn.Linear(64, 64, bias=False)
    quantize_(layer, AffineConfig(4, 32), progress=False)
    with pytest.raises(NotImplementedError, match="along their first dimension only"):
        fully_shard(layer, mesh=gloo.mesh(), shard_placement_fn=lambda p: Shard(1))


def case_fsdp_refuses_transposed_weights(folder: Path) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(make(64, 64).t(), requires_grad=False)
    with pytest.raises(NotImplementedError, match="non-contiguous parameters"):
        fully_shard(module, mesh=gloo.mesh())


def case_fsdp_leaves_users_new_zeros_dense(folder: Path) -> None:
    weight = make(64, 64)
    assert type(weight.new_zeros(weight.shape)) is Tensor


# ---- DTensor ----------------------------------------------------------------------


PLACED = {
    "rows": (make(64, 128), 0),
    "rows, uneven": (make(65, 128), 0),
    "rows, act-order": (make(64, 128, permuted=True), 0),
    "rows, act-order, uneven": (make(65, 128, permuted=True), 0),
    "K": (make(64, 128), 1),
    "K, 3 bits": (make(64, 128, bits=3), 1),
    "K, 6 bits in groups of 16": (make(64, 128, bits=6, group_size=16), 1),
    "experts": (make(4, 64, 128), 0),
    "experts, uneven": (make(3, 64, 128), 0),
    "experts, act-order": (make(4, 64, 128, permuted=True), 0),
    "experts, their rows": (make(4, 64, 128), 1),
    "experts, their rows, act-order": (make(4, 64, 128, permuted=True), 1),
    "experts, their K": (make(4, 64, 128), 2),
    "transposed, K": (make(64, 128).t(), 0),
    "transposed, rows": (make(64, 128).t(), 1),
    "transposed experts": (make(4, 64, 128).mT, 0),
}


def case_dtensor_cuts_and_joins(folder: Path) -> None:
    mesh = gloo.mesh()
    for (name, (weight, dim)), source in itertools.product(PLACED.items(), (None, 0)):
        dense = weight.dequantize()
        try:
            with gloo.Fallbacks():
                placed = distribute_tensor(
                    weight, mesh, [Shard(dim)], src_data_rank=source
                )
                local = placed.to_local()
                whole = placed.full_tensor()
            assert isinstance(local, AffineQuantizedTensor), name
            assert isinstance(whole, AffineQuantizedTensor), name
            chunk = dense.chunk(gloo.WORLD, dim)[gloo.rank()]
            assert torch.equal(local.dequantize(), chunk), name
            assert torch.equal(whole.dequantize(), dense), name
        except NotImplementedError:
            assert name.startswith("transposed"), name
        except Exception as error:
            error.add_note(f"{name}, from {source}") if hasattr(
                error, "add_note"
            ) else 0
            raise


def case_dtensor_refuses_what_is_no_packed_shard(folder: Path) -> None:
    """Along K within a group, or of an act-order."""
    mesh = gloo.mesh()
    for weight in (make(64, 96), make(64, 128, permuted=True)):
        for source in (None, 0):
            with pytest.raises(
                (ValueError, NotImplementedError), match="input channels"
            ):
                distribute_tensor(weight, mesh, [Shard(1)], src_data_rank=source)


def case_dtensor_redistributes(folder: Path) -> None:
    mesh = gloo.mesh()
    weight = make(64, 128)
    dense = weight.dequantize()
    with gloo.Fallbacks():
        rows = distribute_tensor(weight, mesh, [Shard(0)])
        columns = rows.redistribute(placements=[Shard(1)])
        again = columns.redistribute(placements=[Replicate()]).to_local()
    assert isinstance(columns.to_local(), AffineQuantizedTensor)
    assert torch.equal(
        columns.to_local().dequantize(), dense.chunk(gloo.WORLD, 1)[gloo.rank()]
    )
    same(again, weight)


def case_dtensor_replicates_the_first_process(folder: Path) -> None:
    weight = make(64, 128, seed=gloo.rank())
    with gloo.Fallbacks():
        placed = distribute_tensor(weight, gloo.mesh(), [Replicate()])
    same(placed.to_local(), make(64, 128, seed=0))


def case_codes_are_never_summed(folder: Path) -> None:
    weight = make(64, 128)
    with pytest.raises(NotImplementedError, match="does not know packed weights"):
        distributed.all_reduce(weight)
    with pytest.raises(NotImplementedError, match="does not know packed weights"):
        DTensor.from_local(weight, gloo.mesh(), [Partial()]).full_tensor()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.up = nn.Linear(128, 192)
        self.down = nn.Linear(192, 128)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(F.silu(self.up(self.embed(ids))))


def parallel(source: int | None, embed: Any) -> tuple[Mlp, Mlp]:
    torch.manual_seed(0)
    alone = Mlp()
    quantize_(alone, AffineConfig(4, 32), progress=False)
    model = parallelize_module(
        copy.deepcopy(alone),
        gloo.mesh(),
        {"embed": embed, "up": ColwiseParallel(), "down": RowwiseParallel()},
        src_data_rank=source,
    )
    return alone, model


def case_parallelize_module(folder: Path) -> None:
    ids = torch.tensor([[3, 63, 0, 31]])
    for source in (0, None):
        for embed in (
            RowwiseParallel(input_layouts=Replicate()),
            ColwiseParallel(output_layouts=Replicate()),
        ):
            with gloo.Fallbacks():
                alone, model = parallel(source, embed)
                got = model(ids)
                assert packed_locals(model).keys() == {
                    "embed.weight",
                    "up.weight",
                    "down.weight",
                }
                torch.testing.assert_close(got, alone(ids), rtol=0, atol=1e-5)
                for one in (model, alone):
                    one(ids).square().sum().backward()
            bias = model.up.bias.grad.full_tensor()
            torch.testing.assert_close(bias, alone.up.bias.grad, rtol=1e-4, atol=1e-6)
            with torch.inference_mode():
                got = model(ids)
            torch.testing.assert_close(got, alone(ids), rtol=0, atol=1e-5)


def case_torchao_tensor_parallel(folder: Path) -> None:
    """TorchAOTensorParallelTestCase.test_tp, which asks for CUDA, and with its values."""
    mesh, whole = gloo.mesh(), Replicate()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        up, down = (
            nn.Linear(128, 256, bias=False, dtype=dtype),
            nn.Linear(256, 128, bias=False, dtype=dtype),
        )
        x = torch.randn(8, 128, dtype=dtype)
        for layer in (up, down):
            quantize_(layer, AffineConfig(8, 64), progress=False)
            distributed.broadcast(layer.weight.data, 0)
        distributed.broadcast(x, 0)
        want = down(up(x)).float()
        for layer, dim in ((up, 0), (down, 1)):
            size = layer.weight.shape[dim] // gloo.WORLD
            local = layer.weight.narrow(dim, gloo.rank() * size, size)
            placed = DTensor.from_local(local, mesh, [Shard(dim)])
            layer.weight = nn.Parameter(placed, requires_grad=False)
        placed = DTensor.from_local(x, mesh, [whole])
        with gloo.Fallbacks():
            for compiled in (False, True):
                if compiled:
                    up = torch.compile(up, backend="aot_eager")
                    down = torch.compile(down, backend="aot_eager")
                got = down(up(placed)).full_tensor().float()
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def case_parallelize_module_refuses_cuts_within_groups(folder: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(192, 64)))
    quantize_(model, AffineConfig(4, 64), progress=False)
    text = r"0\.0 has 192 input channels in groups of 64, on 2 processes"
    with pytest.raises(ValueError, match=text):
        parallelize_module(model, gloo.mesh(), {"0.0": RowwiseParallel()})


# ---- distributed checkpoints --------------------------------------------------------


def prepare(folder: Path) -> None:
    """A checkpoint that one process writes, for two to read."""
    dcp.save(
        {"model": build().state_dict()}, checkpoint_id=folder / "one", no_dist=True
    )


def emptied(model: Model) -> Model:
    for parameter in model.parameters():
        if isinstance(parameter, AffineQuantizedTensor):
            for part in (parameter._packed, parameter.scales, parameter.biases):
                part.zero_()
        else:
            parameter.data.zero_()
    return model


def case_dcp_of_one_process_is_read_by_two(folder: Path) -> None:
    with gloo.Fallbacks():
        model = shard(emptied(build()))
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=folder / "one")
        set_model_state_dict(model, state["model"])
        torch.testing.assert_close(model(IDS), build()(IDS), rtol=0, atol=0)


def case_dcp_of_two_processes(folder: Path) -> None:
    """Written by two, read by two, and by one; sharded along rows, and along K."""
    with gloo.Fallbacks():
        state = {"model": get_model_state_dict(shard(build()))}
        dcp.save(state, checkpoint_id=folder / "two")
        model = shard(emptied(build()))
        again = {"model": get_model_state_dict(model)}
        dcp.load(again, checkpoint_id=folder / "two")
        set_model_state_dict(model, again["model"])
        torch.testing.assert_close(model(IDS), build()(IDS), rtol=0, atol=0)
    alone = emptied(build())
    state = {"model": alone.state_dict()}
    dcp.load(state, checkpoint_id=folder / "two", no_dist=True)
    torch.testing.assert_close(alone(IDS), build()(IDS), rtol=0, atol=0)


def case_dcp_shards_along_k(folder: Path) -> None:
    weight, mesh = make(64, 128), gloo.mesh()
    with gloo.Fallbacks():
        columns = distribute_tensor(weight, mesh, [Shard(1)])
        dcp.save({"w": columns}, checkpoint_id=folder / "columns")
        rows = distribute_tensor(make(64, 128, seed=5), mesh, [Shard(0)])
        dcp.load({"w": rows}, checkpoint_id=folder / "columns")
        same(rows.full_tensor(), weight)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("distributed")
    prepare(folder)
    return gloo.run(request, folder)


@pytest.mark.parametrize("name", gloo.cases_of(__name__))
def test_on_two_processes(name: str, outcomes: dict[str, list[str]]) -> None:
    gloo.check(outcomes, name)
