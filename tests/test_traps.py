"""One test for each way in which other tensor subclasses were seen to go wrong unseen.

Most are tested at length elsewhere, next to what they belong to. Here each has a name.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make, randn
from torch import Tensor, distributed, nn

from affine_tensor import AffineConfig, AffineQuantizedTensor, quantize_

FOUR = AffineConfig(4, 32)
X = randn(3, 128)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.up = nn.Linear(128, 128)
        self.head = nn.Linear(128, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.up(self.embed(ids)))


def packed(module: nn.Module) -> Any:
    quantize_(module, FOUR, progress=False)
    return module


# ---- the seven ----------------------------------------------------------------------


def test_1_assigning_data_exchanges_the_codes_too() -> None:
    """Of a wrapper torch exchanges the shell: the old weight goes on being used."""
    layer, other = packed(nn.Linear(128, 64, bias=False)), make(64, 128, bits=3, seed=9)
    layer.weight.data = other
    want = X @ other.dequantize().t()
    torch.testing.assert_close(layer(X), want, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="cannot assign"):
        layer.weight.data = randn(64, 128)
    torch.testing.assert_close(layer(X), want, rtol=0, atol=1e-4)


def test_2_tied_weights_do_not_take_the_place_of_all_others() -> None:
    """accelerate takes two tensors with the same data_ptr, such as 0, for one."""
    accelerate = pytest.importorskip("accelerate")
    model = packed(Tied())
    ids = torch.tensor([[1, 63, 5]])
    want = model(ids)
    everywhere = {"embed": "cpu", "up": "cpu", "head": "cpu"}
    model = accelerate.dispatch_model(
        model, everywhere, main_device="cpu", force_hooks=True
    )
    assert torch.equal(model(ids), want)
    pointers = {p.data_ptr() for p in (model.embed.weight, model.up.weight)}
    assert len(pointers) == 2
    assert 0 not in pointers


def test_3_merging_adapters_does_not_lose_them() -> None:
    """Written to the dense copy that an operator was given, a merge does nothing."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["up"], init_lora_weights=False
    )
    model = peft.get_peft_model(packed(Tied()), config)
    ids = torch.tensor([[1, 63, 5]])
    want = model(ids)
    with model.disable_adapter():
        assert (model(ids) - want).abs().max() > 0.1
    with pytest.raises(NotImplementedError, match="packed weight"):
        model.merge_adapter()
    assert torch.equal(model(ids), want)


VIEWS = {
    "row": lambda w: w[3],
    "rows": lambda w: w[2:4],
    "groups": lambda w: w[:, 32:96],
    "columns": lambda w: w[:, 3:7],
    "t": lambda w: w.t(),
    "view": lambda w: w.view(-1),
    "chunk": lambda w: w.chunk(2)[1],
    "unsqueeze": lambda w: w[None],
}


@pytest.mark.parametrize("name", VIEWS)
def test_4_views_work_in_inference_mode(name: str) -> None:
    """ "Cannot set version_counter for inference tensor" (pytorch#170419)."""
    weight = make(8, 128)
    want = VIEWS[name](weight.dequantize())
    with torch.inference_mode():
        got = VIEWS[name](weight)
        dense = got.dequantize() if isinstance(got, AffineQuantizedTensor) else got
        assert torch.equal(dense, want)
    assert not got.is_inference()  # it can go on to be used outside


def test_5_sharing_memory_does_not_end_the_process() -> None:
    code = """
    import torch, affine_tensor
    layer = torch.nn.Linear(128, 64)
    affine_tensor.quantize_(layer, progress=False)
    layer.share_memory()
    assert layer.weight.is_shared()
    assert all(part.is_shared() for part in layer.weight._parts())
    part = layer.weight.detach()[:, 3:7]
    assert part.share_memory_().is_shared()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_6_collectives_write_to_the_weight(alone: None) -> None:
    """scatter_ does not say in its schema that it writes; a dense copy gets it."""
    weight, sent = make(8, 128), make(8, 128, seed=5)
    distributed.scatter(weight, [sent])
    assert torch.equal(weight.dequantize(), sent.dequantize())
    with pytest.raises(NotImplementedError, match="does not know packed weights"):
        distributed.all_reduce(weight)
    dense = sent.dequantize()[:, 3:7].contiguous()
    with pytest.raises(NotImplementedError, match="a copy of a part"):
        distributed.scatter(weight[:, 3:7], [dense])
    with pytest.raises(NotImplementedError, match="a copy of a part"):
        distributed.broadcast(weight[:, 3:7], 0)


def test_7_a_part_along_the_input_channels_says_that_it_has_gaps() -> None:
    """If it does not, .contiguous() leaves them in, and wrong bytes are sent."""
    part = make(8, 128)[:, 32:96]
    assert not part.is_contiguous()
    whole = part.contiguous()
    assert all(own.is_contiguous() for own in whole._parts())
    assert torch.equal(whole.dequantize(), make(8, 128).dequantize()[:, 32:96])


# ---- others -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_cut_within_a_group_is_not_moved_to_its_edge(bits: int) -> None:
    """By ratios, rounded down: torchao's Int4Tensor."""
    weight = make(8, 128, bits=bits)
    for start, stop in ((3, 7), (16, 96), (32, 65), (127, 128)):
        want = weight.dequantize()[:, start:stop]
        assert torch.equal(weight[:, start:stop].to(torch.float32), want)


def test_fsdp_gets_packed_views_where_nothing_changes() -> None:
    """as_strided by its own shape and strides: a dense one made all shards dense."""
    weight = make(8, 128)
    same = weight.as_strided(weight.shape, weight.stride())
    assert isinstance(same, AffineQuantizedTensor)
    assert same.data_ptr() == weight.data_ptr()


def test_a_dtype_is_not_a_label() -> None:
    """What a model computes in is what its weights say after .to(dtype)."""
    layer = packed(nn.Linear(128, 64)).to(torch.bfloat16)
    assert layer.weight.dtype == layer.weight.dequantize().dtype == torch.bfloat16
    assert layer(X.bfloat16()).dtype == torch.bfloat16


def test_an_embedding_and_a_head_differ_in_the_order_of_arguments() -> None:
    weight, ids = make(64, 128), torch.tensor([5, 0])
    want = weight.dequantize()[ids]
    assert torch.equal(nn.functional.embedding(ids, weight), want)
    assert torch.equal(torch.ops.aten.embedding(weight, ids), want)


def test_backward_sees_that_a_weight_was_changed_in_between() -> None:
    weight, x = make(64, 128), X.clone().requires_grad_()
    y = nn.functional.linear(x, weight)
    weight.copy_(make(64, 128, seed=3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_hold_every_part() -> None:
    model = packed(Tied())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.head.weight is twin.embed.weight
        assert torch.equal(twin.up(X), model.up(X))
        assert twin.up.weight.data_ptr() != model.up.weight.data_ptr()


def test_sizes_are_those_that_are_stored() -> None:
    """By numel and element size a packed model is as large as a dense one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from affine_tensor import footprint

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = packed(LlamaForCausalLM(config).to(torch.bfloat16))
    stored = 0
    for parameter in model.parameters():  # tied ones come once
        own = getattr(parameter, "_parts", lambda one=parameter: [one])()
        stored += sum(part.numel() * part.element_size() for part in own)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == stored + buffers
    assert model.get_memory_footprint(return_buffers=False) == stored
    assert footprint(model).bytes == stored + buffers
    weight = model.lm_head.weight
    assert weight.nelement() * weight.element_size() == 128 * 64 * 2  # for all others
    double = model.to(torch.float64)  # scales stay bfloat16
    norms = sum(p.nbytes for p in double.parameters() if p.dim() == 1)
    assert double.get_memory_footprint(return_buffers=False) == stored + norms * 3 // 4


def test_memory_that_weights_share_is_counted_once() -> None:
    from affine_tensor import footprint

    model, weight = nn.Module(), make(64, 128)
    whole = weight.nbytes

    def put(name: str, value: Tensor) -> int:
        setattr(model, name, nn.Parameter(value, requires_grad=False))
        return footprint(model).bytes

    assert put("a", weight[:32]) == whole // 2
    assert put("b", weight[32:]) == whole
    assert put("c", weight.detach()) == whole  # not the same object: no tie
    assert put("d", weight.to(torch.float16)) == whole
    assert put("e", weight.t()[32:64]) == whole
    rows = {row.name: row.bytes for row in footprint(model).rows}
    assert rows == {"a": whole // 2, "b": whole // 2, "c": 0, "d": 0, "e": 0}
    dense = torch.zeros(4, 8)
    assert put("f", dense) == put("g", dense[1:3]) == whole + dense.nbytes
    assert put("h", torch.zeros(1, 8).expand(4, 8)) == whole + dense.nbytes + 32
    ordered = make(2, 8, 128, permuted=True)
    assert put("i", ordered) == whole + dense.nbytes + 32 + ordered.nbytes
    assert footprint(model.to("meta")).bytes > 0
