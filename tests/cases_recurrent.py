"""Cases of `architectures.py`: state-space, convolution and linear-attention layers."""

from __future__ import annotations

from typing import Any

from architectures import Case

MAMBA = {"state_size": 16, "conv_kernel": 4, "expand": 2, "use_conv_bias": True}
MAMBA2 = {**MAMBA, "num_heads": 8, "head_dim": 32, "state_size": 32, "chunk_size": 16}
RECURRENT_GEMMA: dict[str, Any] = {
    # The square root, which scales the embeddings, is exact in bfloat16.
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "attention_window_size": 16,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-5,  # mlx-lm has this one fixed
    "block_types": ["recurrent", "recurrent", "attention"],
}
NEMOTRON_H: dict[str, Any] = {
    "num_hidden_layers": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "hybrid_override_pattern": "M*-E",
}
LFM2: dict[str, Any] = {
    "num_hidden_layers": 3,
    "conv_L_cache": 3,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "layer_types": ["conv", "full_attention", "conv"],
}
OLMO_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN3_NEXT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
QWEN3_NEXT_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
}

CASES: list[Case] = [
    Case("mamba", {**MAMBA, "tie_word_embeddings": True}),
    Case("mamba", {**MAMBA, "use_bias": True, "tie_word_embeddings": False}, bits=5),
    Case("falcon_mamba", {**MAMBA, "tie_word_embeddings": False}, bits=8),
    # mlx-lm normalizes whole rows here, transformers each group.
    Case("mamba2", {**MAMBA2, "n_groups": 1, "tie_word_embeddings": True}, bits=6),
    Case("recurrent_gemma", RECURRENT_GEMMA, bits=3, group_size=32),
    Case("nemotron_h", NEMOTRON_H),
    Case("lfm2", LFM2),
    Case("olmo_hybrid", OLMO_HYBRID),
    Case("qwen3_next", {**QWEN3_NEXT, **QWEN3_NEXT_EXPERTS}),
    Case("apertus", {}),
]
