"""Cases of `architectures.py`: state-space, convolution and linear-attention layers."""

from __future__ import annotations

from typing import Any

from architectures import COMMON, LLAMA3_ROPE, Case

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
    # transformers clips at time_step_min, 0.001, and mlx-lm at this.
    "time_step_limit": [0.001, 1000000.0],
}
LFM2: dict[str, Any] = {
    "num_hidden_layers": 3,
    "conv_L_cache": 3,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "layer_types": ["conv", "full_attention", "conv"],
    "block_dim": 128,
    "block_ff_dim": 384,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "conv_bias": False,
}
LFM2_MOE: dict[str, Any] = {
    **LFM2,
    "moe_intermediate_size": 64,
    "num_dense_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 2.0,
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

APERTUS: dict[str, Any] = {
    "mlp_bias": False,
    "post_norm": False,
    "qk_norm": True,
    "rope_scaling": LLAMA3_ROPE,
}
FALCON_H1: dict[str, Any] = {
    "mamba_d_ssm": 256,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_chunk_size": 16,
    "mamba_norm_before_gate": False,
    "attention_out_multiplier": 0.5,
    "embedding_multiplier": 4.0,
    "lm_head_multiplier": 0.125,
    "mlp_multipliers": [2.0, 0.25],
    "ssm_in_multiplier": 0.5,
    "ssm_multipliers": [0.5, 0.25, 2.0, 4.0, 0.125],
    "ssm_out_multiplier": 0.5,
}
GEMMA3N_TEXT: dict[str, Any] = {
    "model_type": "gemma3n_text",
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 32,
    "intermediate_size": [128, 128, 128, 64],
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 32,
}
QWEN3_5: dict[str, Any] = {
    **{k: v for k, v in QWEN3_NEXT.items() if k != "partial_rotary_factor"},
    **{k: v for k, v in COMMON.items() if k not in ("rope_theta", "torch_dtype")},
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
QWEN3_5_MOE = QWEN3_5 | QWEN3_NEXT_EXPERTS
# The tokens of images are none of the vocabulary, and so of none of the test.
SEEING: dict[str, Any] = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "image_token_id": 1000,
    "video_token_id": 1001,
    "vision_start_token_id": 1002,
    "vision_end_token_id": 1003,
}


def composite(model_type: str, **text: Any) -> dict[str, Any]:
    text = {**text, "model_type": f"{model_type}_text"}
    return {"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}


CASES: list[Case] = [
    Case("mamba", {**MAMBA, "tie_word_embeddings": True}),
    Case("mamba", {**MAMBA, "use_bias": True, "tie_word_embeddings": False}, bits=5),
    Case("falcon_mamba", {**MAMBA, "tie_word_embeddings": False}, bits=8),
    # mlx-lm normalizes whole rows here, transformers each group.
    Case("mamba2", {**MAMBA2, "n_groups": 1, "tie_word_embeddings": True}, bits=6),
    Case(
        "mamba2",
        {**MAMBA2, "n_groups": 1, "use_bias": True, "tie_word_embeddings": False},
        bits=3,
        formats={"in_proj": (6, 32)},
    ),
    Case("recurrent_gemma", RECURRENT_GEMMA, bits=3, group_size=32),
    # mlx-lm has no multiplier of the keys, and that before the attention for two of
    # three matrices: both are one here. It has no groups in the norm.
    Case(
        "falcon_h1",
        {**FALCON_H1, "mamba_rms_norm": True, "tie_word_embeddings": False},
    ),
    Case(
        "falcon_h1",
        {**FALCON_H1, "mamba_n_groups": 2, "tie_word_embeddings": True},
        bits=2,
        group_size=32,
    ),
    Case("nemotron_h", NEMOTRON_H),
    Case(
        "nemotron_h",
        {
            **NEMOTRON_H,
            "use_bias": True,  # transformers' name
            "mamba_proj_bias": True,  # mlx-lm's
            "mlp_bias": True,
            "moe_latent_size": 64,
        },
        bits=6,
        group_size=32,
        label="latent",
    ),
    Case("lfm2", LFM2),
    Case("lfm2", {**LFM2, "conv_bias": True}, bits=8, group_size=32),
    Case("lfm2_moe", LFM2_MOE, bits=5),
    # mlx-lm calls a norm otherwise than transformers writes it.
    Case("olmo_hybrid", OLMO_HYBRID, group_size=128, drawn_by_mlx=True),
    Case("qwen3_next", {**QWEN3_NEXT, **QWEN3_NEXT_EXPERTS}),
    Case(
        "qwen3_next",
        {
            **QWEN3_NEXT,
            **QWEN3_NEXT_EXPERTS,
            "attention_bias": True,
            "mlp_only_layers": [1],
        },
        bits=3,
        group_size=32,
        label="dense",
    ),
    Case(
        "qwen3_5",
        composite("qwen3_5", **QWEN3_5, tie_word_embeddings=True),
        common=False,
        recipe="mixed_4_6",
    ),
    Case(
        "qwen3_5",
        composite("qwen3_5", **QWEN3_5, tie_word_embeddings=False) | SEEING,
        common=False,
        model_class="AutoModelForImageTextToText",
        towers=("model.visual",),
        group_size=32,
        label="seeing",
    ),
    # transformers writes experts one by one, and mlx-lm reads them stacked.
    Case(
        "qwen3_5_moe",
        composite("qwen3_5_moe", **QWEN3_5_MOE, tie_word_embeddings=False),
        common=False,
        drawn_by_mlx=True,
    ),
    Case(
        "qwen3_5_moe",
        composite("qwen3_5_moe", **QWEN3_5_MOE, tie_word_embeddings=False) | SEEING,
        common=False,
        model_class="AutoModelForImageTextToText",
        towers=("model.visual",),
        drawn_by_mlx=True,
        bits=8,
        label="seeing",
    ),
    Case("apertus", APERTUS, bits=8, group_size=128),
    Case(
        "gemma3n",
        {"text_config": GEMMA3N_TEXT},
        group_size=32,
        model_class="Gemma3nForCausalLM",
        common=False,
        drawn_by_mlx=True,
    ),
]
