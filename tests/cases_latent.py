"""Cases of `architectures.py`: latent attention, and what is kin to it."""

from __future__ import annotations

from typing import Any

from architectures import Case

# Multi-head latent attention. mlx-lm splits `kv_b_proj` and quantizes the part of the
# keys along the other axis, which makes the whole dense here.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
ABSORBED = (r"\.kv_b_proj\.weight$",)
# One dense layer, then experts, two of four for each token.
EXPERTS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}

CASES: list[Case] = [
    Case(
        "deepseek_v2",
        {**LATENT, **EXPERTS, "topk_method": "greedy", "rope_scaling": YARN},
    ),
    Case("deepseek_v3", {**LATENT, **EXPERTS, "rope_scaling": YARN}, dense=ABSORBED),
    Case(
        "deepseek_v3",
        {**LATENT, **EXPERTS, "q_lora_rank": None, "attention_bias": True},
        bits=3,
        group_size=32,
        dense=ABSORBED,
        label="direct-q",
    ),
    Case(
        "deepseek_v32",
        {
            **LATENT,
            **EXPERTS,
            "rope_scaling": YARN,
            "index_topk": 8,
            "index_head_dim": 64,
            "index_n_heads": 2,
        },
        bits=5,
        dense=ABSORBED,
    ),
    Case(
        "glm4_moe_lite",
        {**LATENT, **EXPERTS, "attention_bias": True},
        bits=6,
        group_size=32,
        dense=ABSORBED,
    ),
    Case(
        "glm_moe_dsa",
        {
            **LATENT,
            **EXPERTS,
            "index_topk": 8,
            "index_head_dim": 64,
            "index_n_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        bits=8,
        dense=ABSORBED,
    ),
    Case(
        "kimi_linear",
        {
            **LATENT,
            "q_lora_rank": None,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_expert_group": 1,
            "topk_group": 1,
            "moe_renormalize": True,
            "moe_layer_freq": 1,
            "moe_router_activation_func": "sigmoid",
            "mla_use_nope": True,
            "model_max_length": 256,
            "routed_scaling_factor": 2.446,
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
                "num_heads": 4,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
            },
        },
        dense=ABSORBED,
    ),
    Case(
        "longcat_flash",
        {
            **LATENT,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 64,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "zero_expert_type": "identity",
            "moe_topk": 3,
            "attention_method": "MLA",
            "routed_scaling_factor": 6.0,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
        dense=ABSORBED,
    ),
    Case(
        "mistral4",
        {
            **LATENT,
            **EXPERTS,
            "rope_parameters": {
                **YARN,
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
            },
        },
        dense=ABSORBED,
    ),
    Case(
        "youtu",
        {**LATENT, "tie_word_embeddings": True},
    ),
    Case(
        "youtu",
        {**LATENT, "tie_word_embeddings": False},
    ),
]
