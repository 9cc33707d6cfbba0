"""transformers' tensor parallelism, through `from_pretrained`, on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
from conftest import make
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import affine_tensor
from affine_tensor import (
    AffineConfig,
    AffineQuantizationConfig,
    AffineQuantizedTensor,
    from_pretrained,
    quantize_,
    register,
    save_checkpoint,
)
from affine_tensor.hf.lazy import Whole

IDS = torch.tensor([[5, 17, 200, 3, 9, 44, 81, 7]])

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": torch.float32,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

LLAMA4 = {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "attention_chunk_size": 64,
}


def draw(model_type: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def write(folder: Path) -> None:
    """The checkpoints that the cases read, and the logits of one process."""
    plain = draw("llama", tie_word_embeddings=False)
    quantize_(plain, AffineConfig(4, 64), _mixed, progress=False)
    save_checkpoint(plain, folder / "llama")
    tied = draw("qwen2", tie_word_embeddings=True)
    quantize_(tied, AffineConfig(3, 32), progress=False)
    save_checkpoint(tied, folder / "qwen2-tied")
    narrow = draw("llama", intermediate_size=192)
    quantize_(narrow, AffineConfig(4, 64), progress=False)
    save_checkpoint(narrow, folder / "llama-192")
    draw("qwen3_moe", **EXPERTS).save_pretrained(folder / "dense")
    affine_tensor.convert(folder / "dense", folder / "qwen3_moe", bits=4, group_size=32)
    draw("llama4_text", **LLAMA4).save_pretrained(folder / "dense-llama4")
    affine_tensor.convert(
        folder / "dense-llama4", folder / "llama4_text", bits=4, group_size=32
    )
    for name in ("llama", "qwen2-tied", "qwen3_moe", "llama4_text"):
        torch.save(logits(from_pretrained(folder / name)), folder / f"{name}.pt")


def _mixed(module: torch.nn.Module, name: str) -> AffineConfig:
    return AffineConfig(8, 32) if "q_proj" in name else AffineConfig(4, 64)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def packed_shards(model: Any) -> dict[str, list[int]]:
    """The shapes that this process has of packed DTensor parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "_local_tensor", None)
        if isinstance(local, AffineQuantizedTensor):
            assert not parameter.requires_grad
            found[name] = list(local.shape)
    return found


def case_llama(folder: Path) -> None:
    with gloo.Fallbacks():
        model = from_pretrained(folder / "llama", tp_plan="auto")
        got = logits(model)
    torch.testing.assert_close(got, torch.load(folder / "llama.pt"), rtol=0, atol=1e-5)
    shapes = packed_shards(model)
    layer = "model.layers.0"
    assert shapes[f"{layer}.self_attn.q_proj.weight"] == [64, 128]
    assert shapes[f"{layer}.self_attn.o_proj.weight"] == [128, 64]
    assert shapes[f"{layer}.mlp.down_proj.weight"] == [128, 128]
    # Older versions of transformers leave the embedding whole.
    assert shapes.get("model.embed_tokens.weight", [128, 128]) == [128, 128]
    assert shapes["lm_head.weight"] == [128, 128]


def case_tied(folder: Path) -> None:
    with gloo.Fallbacks():
        model = from_pretrained(folder / "qwen2-tied", tp_plan="auto")
        got = logits(model)
    torch.testing.assert_close(
        got, torch.load(folder / "qwen2-tied.pt"), rtol=0, atol=1e-5
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert packed_shards(model)["model.embed_tokens.weight"] == [128, 128]


def case_experts(folder: Path) -> None:
    """Each process has its half of gate and its half of up."""
    want = torch.load(folder / "qwen3_moe.pt")
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        with gloo.Fallbacks():
            model = from_pretrained(
                folder / "qwen3_moe",
                tp_plan="auto",
                experts_implementation=implementation,
            )
            got = logits(model)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    shapes = packed_shards(model)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == [4, 64, 128]
    assert shapes["model.layers.0.mlp.experts.down_proj"] == [4, 128, 32]
    whole = from_pretrained(folder / "qwen3_moe").model.layers[0].mlp.experts
    own = model.model.layers[0].mlp.experts.gate_up_proj._local_tensor.dequantize()
    halves = whole.gate_up_proj.dequantize().view(4, 2, 2, 32, 128)[:, :, gloo.rank()]
    assert torch.equal(own, halves.reshape(4, 64, 128))


def case_experts_each_on_one_process(folder: Path) -> None:
    if not hasattr(DistributedConfig(), "ep_size"):
        pytest.skip("this version of transformers has no ep_size")
    config = {"tp_size": 2, "ep_size": 2}
    with gloo.Fallbacks():
        model = from_pretrained(folder / "qwen3_moe", distributed_config=config)
        got = logits(model)
    torch.testing.assert_close(
        got, torch.load(folder / "qwen3_moe.pt"), rtol=0, atol=1e-5
    )
    shapes = packed_shards(model)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == [2, 128, 128]


def case_transposed_experts(folder: Path) -> None:
    """Of Llama 4: its input channels are the rows that one sees."""
    with gloo.Fallbacks():
        model = from_pretrained(folder / "llama4_text", tp_plan="auto")
        got = logits(model)
    torch.testing.assert_close(
        got, torch.load(folder / "llama4_text.pt"), rtol=0, atol=1e-5
    )
    experts = model.model.layers[0].feed_forward.experts
    assert experts.gate_up_proj._local_tensor.transposed
    shapes = packed_shards(model)
    assert shapes["model.layers.0.feed_forward.experts.gate_up_proj"] == [4, 128, 128]
    assert shapes["model.layers.0.feed_forward.experts.down_proj"] == [4, 64, 128]


def case_stock_from_pretrained(folder: Path) -> None:
    register()
    for options in ({"tp_plan": "auto"}, {"distributed_config": {"tp_size": 2}}):
        model = AutoModelForCausalLM.from_pretrained(folder / "llama", **options)
        torch.testing.assert_close(
            logits(model), torch.load(folder / "llama.pt"), rtol=0, atol=1e-5
        )
    assert packed_shards(model)


def case_generates(folder: Path) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    want = from_pretrained(folder / "llama").generate(IDS, **options)
    got = from_pretrained(folder / "llama", tp_plan="auto").generate(IDS, **options)
    assert torch.equal(got, want)


def case_gradients(folder: Path) -> None:
    """Those of the inputs, and of what is dense."""
    torch.manual_seed(1)
    inputs = torch.randn(1, 8, 128)
    grads = []
    for options in ({}, {"tp_plan": "auto"}):
        for name in ("llama", "qwen3_moe"):
            x = inputs.clone().requires_grad_()
            with gloo.Fallbacks():
                model = from_pretrained(folder / name, **options)
                model(inputs_embeds=x, labels=IDS).loss.backward()
            norm = model.model.norm.weight.grad
            grads.append([x.grad, getattr(norm, "_local_tensor", norm)])
    for got, want in zip(grads[2:], grads[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def case_what_cannot_be_cut_is_refused(folder: Path) -> None:
    text = (
        r"model\.layers\.0\.mlp\.down_proj\.weight has 192 input channels in groups of "
        r"64, on 2 processes: a shard from (0 to 96|96 to 192) is not whole groups"
    )
    with pytest.raises(ValueError, match=text):
        from_pretrained(folder / "llama-192", tp_plan="auto")


def case_act_order_is_cut_along_rows_only(folder: Path) -> None:
    for dim in (0, 1):
        weight = make(64, 128, permuted=True)
        shard = Shard(weight)
        piece = (slice(0, 32), slice(None)) if dim == 0 else (slice(None), slice(0, 64))
        if dim == 0:
            got = shard[piece].to("cpu")
            assert torch.equal(got.dequantize(), weight.dequantize()[:32])
            continue
        with pytest.raises(ValueError, match="act-order"):
            shard[piece].to("cpu")


class Shard(Whole):
    """A weight in memory, as transformers cuts those of a file."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.dtype, self.name = weight, weight.dtype, "a.weight"

    def get_shape(self) -> list[int]:
        return list(self.weight.shape)

    def read(self, device: torch.device) -> Tensor:
        return self.weight


def case_dense_checkpoints_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="tp_plan is not taken while a dense"):
        from_pretrained(
            folder / "dense",
            tp_plan="auto",
            quantization_config=AffineQuantizationConfig(),
        )
    with pytest.raises(ValueError, match="distributed_config has fsdp_size=2"):
        from_pretrained(folder / "llama", distributed_config={"fsdp_size": 2})


def case_shards_are_not_saved_as_the_model(folder: Path) -> None:
    model = from_pretrained(folder / "llama", tp_plan="auto")
    with pytest.raises(ValueError, match="shard"):
        save_checkpoint(model, folder / "again")
    with pytest.raises(ValueError, match="shard"):
        model.save_pretrained(folder / "again")


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("tp")
    write(folder)
    return gloo.run(request, folder)


@pytest.mark.parametrize("name", gloo.cases_of(__name__))
def test_on_two_processes(name: str, outcomes: dict[str, list[str]]) -> None:
    gloo.check(outcomes, name)
