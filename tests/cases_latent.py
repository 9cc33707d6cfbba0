"""Cases of `architectures.py`: latent attention, and what is kin to it."""

from __future__ import annotations

from typing import Any

from architectures import COMMON, Case

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

MISTRAL4_ROPE = {
    **YARN,
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 16,
}
LAYER_ROPE = {
    "full_attention": {
        "rope_type": "default",
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.5,
    },
    "sliding_attention": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TOWERS = ("model.vision_tower", "model.multi_modal_projector")

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
        "deepseek_v3",
        {**LATENT, **EXPERTS, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        recipe="mixed_3_6",
        dense=ABSORBED,
        mlx_type="kimi_k2",
        label="kimi_k2",
    ),
    Case(
        "deepseek_v3",
        {**LATENT, **EXPERTS},
        bits=2,
        dense=ABSORBED,
        mlx_type="joyai_llm_flash",
        label="joyai_llm_flash",
    ),
    Case(
        "deepseek_v32",
        {
            **LATENT,
            **EXPERTS,
            "rope_scaling": YARN,
            "index_topk": 8,
            "index_head_dim": 32,
            "index_n_heads": 8,
        },
        bits=5,
        dense=ABSORBED,
    ),
    Case(
        "glm4_moe_lite",
        {
            **LATENT,
            **EXPERTS,
            "attention_bias": True,
            # No multiple of the group: only the values are quantized.
            "qk_nope_head_dim": 96,
            # transformers has this in the norms of the latent vectors in any case.
            "rms_norm_eps": 1e-6,
        },
        bits=6,
        dense=ABSORBED,
    ),
    Case(
        "glm_moe_dsa",
        {
            **LATENT,
            **EXPERTS,
            "index_topk": 8,
            "index_head_dim": 32,
            "index_n_heads": 8,
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
            "rms_norm_eps": 1e-6,  # transformers has this in the norm of latents
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
                "num_heads": 4,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
            },
        },
        bits=6,
        group_size=32,
        dense=ABSORBED,
        # transformers writes its dense layer as block_sparse_moe, which nobody reads.
        drawn_by_mlx=True,
    ),
    Case(
        "longcat_flash",
        {
            **LATENT,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 128,
            "intermediate_size": 128,
            "expert_ffn_hidden_size": 64,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "zero_expert_type": "identity",
            "moe_topk": 3,
            "attention_method": "MLA",
            "routed_scaling_factor": 6.0,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "attention_bias": True,
        },
        dense=ABSORBED,
        # The norms of the latent vectors have an eps of 1e-5 in mlx-lm and of 1e-6 in
        # transformers, whatever the config says: 7e-6 between the two.
        # transformers writes weights for the experts that are the identity.
        drawn_by_mlx=True,
    ),
    Case(
        "mistral4",
        {
            **LATENT,
            **EXPERTS,
            "head_dim": 96,  # both parts
            "rope_parameters": MISTRAL4_ROPE,
        },
        bits=5,
        dense=ABSORBED,
        model_class="Mistral4ForCausalLM",
    ),
    Case(
        "mistral3",
        {
            "text_config": {
                "model_type": "mistral4",
                **COMMON,
                **LATENT,
                **EXPERTS,
                "head_dim": 96,
                "rope_parameters": MISTRAL4_ROPE,
            },
            "vision_config": {"model_type": "pixtral", "image_size": 32, **VISION},
            "tie_word_embeddings": False,
        },
        bits=3,
        group_size=32,
        common=False,
        dense=ABSORBED,
        model_class="AutoModelForImageTextToText",
        towers=TOWERS,
        label="mistral4",
    ),
    Case(
        "mimo_v2_flash",
        {
            **EXPERTS,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "v_head_dim": 64,
            "n_shared_experts": None,
            "first_k_dense_replace": 1,
            "moe_layer_freq": [0, 1, 1],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "hybrid_layer_pattern": [0, 1, 0],
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            # Of 32 tokens there, of 33 in transformers: more than there are.
            "sliding_window_size": 32,
            "layernorm_epsilon": 1e-5,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5000000.0,
            "swa_rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "default",
                    "rope_theta": 5000000.0,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                },
            },
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 32,
            "swa_v_head_dim": 64,
            "attention_value_scale": 0.707,
        },
        bits=3,
    ),
    Case(
        "bailing_hybrid",
        {
            "architectures": ["BailingMoeV3ForCausalLM"],
            **LATENT,
            "q_lora_rank": None,
            "head_dim": 64,  # of linear attention
            "num_hidden_layers": 4,
            "layer_group_size": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "short_conv_kernel_size": 4,
            "kda_lower_bound": -5.0,
            "kda_safe_gate": True,
            "no_kda_lora": True,
            "rope_interleave": True,
        },
        group_size=32,
        # transformers writes what only some layers call `dense` for all of them.
        drawn_by_mlx=True,
    ),
    Case(
        "minimax_m3_vl",
        {
            "text_config": {
                "model_type": "minimax_m3_vl_text",
                **COMMON,
                "num_hidden_layers": 2,
                "intermediate_size": 64,
                "dense_intermediate_size": 256,
                "shared_intermediate_size": 64,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "rotary_dim": 16,
                "partial_rotary_factor": 0.5,
                "moe_layer_freq": [0, 1],
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "minimax_m3_sparse"],
                "index_n_heads": 2,
                "index_head_dim": 32,
                "index_block_size": 4,
                "index_topk_blocks": 3,
                "index_local_blocks": 1,
            },
            "vision_config": VISION,
            "projector_hidden_size": 64,
        },
        bits=6,
        common=False,
        model_class="AutoModelForImageTextToText",
        towers=TOWERS,
    ),
    Case(
        "kimi_k25",
        {
            "text_config": {
                "model_type": "kimi_k2",
                **COMMON,
                **LATENT,
                **EXPERTS,
                "rope_scaling": YARN,
            },
            "vision_config": VISION,
            "projection_hidden_size": 64,
            "tie_word_embeddings": False,
        },
        bits=2,
        group_size=32,
        common=False,
        dense=ABSORBED,
        # transformers writes its layers as the blocks of the vision tower.
        drawn_by_mlx=True,
        model_class="AutoModelForImageTextToText",
        towers=("model.vision_tower", "model.mm_projector"),
    ),
    Case("youtu", {**LATENT, "tie_word_embeddings": True}, mlx_type="youtu_llm"),
    Case(
        "youtu",
        {**LATENT, "q_lora_rank": None, "tie_word_embeddings": False},
        bits=8,
        group_size=128,
        mlx_type="youtu_llm",
    ),
    Case(
        "laguna",
        {
            "num_hidden_layers": 3,
            "num_attention_heads_per_layer": [4, 8, 4],
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "moe_routed_scaling_factor": 2.5,
            "moe_router_logit_softcapping": 5.0,
            "attention_bias": True,
            "qkv_bias": True,
            "rope_parameters": LAYER_ROPE,
        },
        bits=5,
        group_size=32,
    ),
    Case(
        "mellum",
        {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "tie_word_embeddings": True,
        },
        bits=3,
        group_size=64,
    ),
]
