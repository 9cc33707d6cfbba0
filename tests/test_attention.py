"""`attn_implementation="sdpa_float32"` against float64 and transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from affine_tensor.hf import attention

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    attention.register()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_one_query_against_float64(masked: str | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 8, 1, 16), (2, 2, 37, 16), (2, 2, 37, 16))
    q, k, v = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    seen = torch.rand(2, 1, 1, 37, generator=generator) < 0.7
    mask = None if masked is None else seen
    if masked == "float":
        mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    y, _ = attention.attention(module, q, k, v, mask, scaling=0.3, dropout=0.0)
    wide_k, wide_v = (part.double().repeat_interleave(4, 1) for part in (k, v))
    scores = q.double() @ wide_k.mT * 0.3
    if masked is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    exact = (scores.softmax(-1) @ wide_v).transpose(1, 2)
    assert (y.dtype, y.shape) == (dtype, exact.shape)
    error = float((y.double() - exact).norm() / exact.norm())
    assert error <= torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_model_generates_as_with_sdpa(cache: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).eval()
    ids = torch.randint(1, 99, (2, 7))
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    settings |= {"cache_implementation": cache, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "attention_mask": padding}
    found = {}
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        found[name] = model.generate(ids, **settings)
    ours, theirs = found[attention.NAME], found["sdpa"]
    first, second = (torch.stack(one.logits[:2]).double() for one in (ours, theirs))
    assert float((first - second).norm() / second.norm()) < 2e-2  # both in bfloat16


def test_models_that_sdpa_would_get_wrong_are_refused() -> None:
    """gpt-oss has sinks, which torch's attention does not know."""
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    config._attn_implementation = attention.NAME
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        GptOssForCausalLM(config)


def test_what_it_does_not_know_goes_to_transformers() -> None:
    module, part = torch.nn.Module(), torch.randn(1, 2, 1, 16).bfloat16()
    with pytest.raises(ValueError, match="softcap"):
        attention.attention(module, part, part, part, None, softcap=30.0)


def test_it_is_known_by_name() -> None:
    assert AttentionInterface()[attention.NAME] is attention.attention
