"""Attention for decoding on a CPU: torch's own, in float32.

torch 2.13 takes four to six times as long for one query in bfloat16 or float16 as for the
same in float32 (270 against 50 microseconds for 32 heads, 8 of keys, and 160 places). One
query is what each token of decoding is, so there the operands are converted; the result is
rounded once, and is closer to exact. Prompts go the usual way.

It is chosen by name, as transformers has it: ``attn_implementation="sdpa_float32"``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_float32"


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """As transformers calls it: query ``[batch, heads, queries, head_dim]``."""
    dtype = query.dtype
    special = any(kwargs.get(name) is not None for name in ("position_bias", "cache"))
    if (
        query.shape[2] > 1
        or query.device.type != "cpu"
        or dtype.itemsize != 2
        or special
        or kwargs.get("dropout")
        or kwargs.get("softcap") is not None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    y = F.scaled_dot_product_attention(
        query.float(),
        key.float(),
        value.float(),
        attention_mask,
        scale=kwargs.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return y.transpose(1, 2).to(dtype).contiguous(), None


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
