"""Cases of `architectures.py`: mixtures of experts.

transformers has the experts of a layer in two parameters, `gate_up_proj` and `down_proj`.
mlx-lm has gate and up apart, each stacked (dbrx: expert by expert); in its own quantized
files routers often have 8 bits, and some routers are not quantized at all.

Left out is transformers' `minimax` (MiniMax-Text-01, with linear attention), which mlx-lm
lacks: its `minimax` is MiniMax-M2, transformers' `minimax_m2`.
"""

from __future__ import annotations

from typing import Any

from architectures import SLIDING, Case

# Two of four experts; each as wide as one group of 64.
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
# DeepSeek's way: a dense layer first, an expert for all, experts chosen by groups.
ROUTED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "tie_word_embeddings": False,
}
GRANITE: dict[str, Any] = {
    **LOCAL,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.03125,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "attention_bias": False,
}
# Every second layer attends. mlx-lm bounds the time step where the config does not.
GRANITE_HYBRID: dict[str, Any] = {
    **GRANITE,
    "intermediate_size": 128,
    "layer_types": ["mamba", "attention"],
    "position_embedding_type": "nope",
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "time_step_limit": [0.001, 100.0],
}

CASES: list[Case] = [
    Case(
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 128,
            "norm_topk_prob": False,  # mlx-lm has no such setting
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
    ),
    Case(
        "qwen3_moe",
        {
            **EXPERTS,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
        bits=5,
    ),
    Case(
        "qwen3_moe",
        {
            **EXPERTS,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
            "tie_word_embeddings": True,
        },
        bits=3,
        group_size=32,
    ),
    # Recipes that measure each module give gate and up different widths.
    Case(
        "qwen3_moe",
        {
            **EXPERTS,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
        formats={
            r"0\.mlp\.switch_mlp\.up_proj": (6, 64),
            r"1\.mlp\.switch_mlp\.gate_proj": (4, 32),
            r"1\.mlp\.switch_mlp\.down_proj": (8, 32),
        },
        dense=(r"\.experts\.gate_up_proj$",),
        label="gate-unlike-up",
    ),
    Case(
        "mixtral", {**LOCAL, "tie_word_embeddings": False}, bits=3, recipe="mixed_3_6"
    ),
    Case("olmoe", {**EXPERTS, "tie_word_embeddings": False}, bits=6, group_size=128),
    Case("olmoe", {**EXPERTS, "attention_bias": True, "tie_word_embeddings": True}),
    # mlx-lm always has biases, untied words and, for longrope, the long factors.
    Case(
        "phimoe",
        {
            **LOCAL,
            "attention_bias": True,
            "lm_head_bias": True,
            "tie_word_embeddings": False,
            "rope_scaling": None,
        },
        bits=8,
        group_size=32,
    ),
    Case(
        "phimoe",
        {
            **LOCAL,
            "attention_bias": True,
            "lm_head_bias": True,
            "tie_word_embeddings": False,
            "intermediate_size": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + n / 8 for n in range(16)],
                "long_factor": [1.0 + n / 8 for n in range(16)],
                "short_mscale": 1.25,
                "long_mscale": 1.25,
                "original_max_position_embeddings": 64,
            },
        },
        label="longrope",
    ),
    Case("granitemoe", {**GRANITE, "tie_word_embeddings": True}, bits=2),
    Case(
        "granitemoe", {**GRANITE, "attention_bias": True, "tie_word_embeddings": False}
    ),
    Case(
        "granitemoehybrid",
        {
            **GRANITE_HYBRID,
            "shared_intermediate_size": 128,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "granitemoehybrid",
        {
            **GRANITE_HYBRID,
            "num_local_experts": 0,
            "intermediate_size": 256,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            "position_embedding_type": "rope",
            "tie_word_embeddings": False,
        },
        bits=5,
        label="dense",
    ),
    # As wide as an expert is, and with more of them than one digit counts: neither a
    # transposed weight nor one out of order has another shape.
    Case(
        "dbrx",
        {
            "vocab_size": 256,
            "d_model": 64,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 20000.0},
            "ffn_config": {
                "ffn_hidden_size": 64,
                "moe_num_experts": 12,
                "moe_top_k": 4,
                "moe_normalize_expert_weights": 1.0,
            },
            # Which transformers reads here only.
            "rope_theta": 20000.0,
            "tie_word_embeddings": False,
        },
        common=False,
    ),
    # mlx-lm normalizes the weights of the chosen experts, transformers does not: with
    # all of them chosen there is no difference.
    Case(
        "jamba",
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "intermediate_size": 64,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 64,
            "mamba_conv_bias": True,
            "mamba_proj_bias": True,
            "tie_word_embeddings": False,
        },
        bits=6,
    ),
    Case(
        "jamba",
        {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
            "tie_word_embeddings": True,
        },
        group_size=128,
        label="dense",
    ),
    *(
        Case(
            "ernie4_5_moe",
            {
                "num_hidden_layers": 3,
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": 64,
                "moe_num_shared_experts": shared,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": 2,
                "moe_layer_interval": 1,
                "use_bias": False,
                "tie_word_embeddings": tied,
            },
            bits=bits,
        )
        for shared, tied, bits in [(2, True, 4), (0, False, 8)]
    ),
    Case(
        "glm4_moe",
        {
            **ROUTED,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
            "rope_scaling": None,
        },
        recipe="mixed_4_6",
    ),
    Case("dots1", {**ROUTED, "layer_types": ["full_attention"] * 3}, bits=3),
    Case(
        "hunyuan_v1_moe",
        {
            "intermediate_size": 128,
            "num_experts": 4,
            # mlx-lm does not normalize the weights of the chosen, transformers does.
            "moe_topk": 4,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": False,
            "cla_share_factor": 2,
            "attention_bias": True,
            "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
            "tie_word_embeddings": True,  # mlx-lm knows nothing else
        },
        mlx_type="hunyuan",
    ),
    Case(
        "minimax_m2",
        {
            **LOCAL,
            "intermediate_size": 64,
            "shared_intermediate_size": 0,
            "rotary_dim": 16,
            "use_qk_norm": True,
            "tie_word_embeddings": False,
        },
        bits=5,
        group_size=32,
    ),
    Case(
        "solar_open",
        {
            **ROUTED,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 0,
            "partial_rotary_factor": 1.0,
        },
        bits=8,
    ),
    Case(
        "afmoe",
        {
            **SLIDING,
            **EXPERTS,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "route_scale": 2.5,
            "mup_enabled": True,
            "tie_word_embeddings": False,
        },
        bits=6,
    ),
    Case(
        "exaone_moe",
        {
            **SLIDING,
            **EXPERTS,
            "num_shared_experts": 1,
            "num_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "mlp_layer_types": ["dense", "sparse"],
            "is_moe_layer": [False, True],
            "tie_word_embeddings": False,
        },
        bits=2,
        group_size=32,
    ),
]
