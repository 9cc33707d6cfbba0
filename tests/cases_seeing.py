"""Cases of `architectures.py`: text in models that see. mlx-lm keeps the text alone."""

from __future__ import annotations

from typing import Any

from architectures import COMMON, GEMMA4_ROPE, SLIDING, YARN_ROPE, Case

SEEING = "AutoModelForImageTextToText"

# Beyond the vocabulary, so that no random token is one of an image.
IMAGE_TOKENS = {
    "image_token_id": 1000,
    "video_token_id": 1001,
    "vision_start_token_id": 1002,
    "vision_end_token_id": 1003,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN3_VISION = {
    **QWEN_VISION,
    "hidden_size": 64,
    "intermediate_size": 64,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
MUSE_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "max_position_embeddings": 16,
}
GEMMA4 = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "audio_config": None,
    "vocab_size": 256,
    "image_token_id": 1000,
    "video_token_id": 1001,
    "audio_token_id": 1002,
}
# Every fourth layer is without rotation.
LLAMA4 = {
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "intermediate_size_mlp": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_bias": False,
    "attention_chunk_size": 16,
    "rope_scaling": None,
    "use_qk_norm": True,
}
MROPE = {"type": "mrope", "mrope_section": [4, 6, 6]}
QWEN3_MROPE = {
    "rope_type": "default",
    "mrope_interleaved": True,
    "mrope_section": [6, 5, 5],
}


def text(model_type: str, **settings: Any) -> dict[str, Any]:
    """The text part of a composite configuration."""
    return {**COMMON, "model_type": model_type, **settings}


CASES: list[Case] = [
    # sqrt(256) is exact in bfloat16, in which mlx-lm keeps the scale of embeddings.
    Case(
        "gemma3",
        {
            "text_config": text(
                "gemma3_text",
                **SLIDING,
                hidden_size=256,
                rope_theta=1000000.0,
                rope_local_base_freq=10000.0,
                query_pre_attn_scalar=32,
                sliding_window_pattern=2,
            ),
            "vision_config": SIGLIP,
            "vocab_size": 256,
            "mm_tokens_per_image": 4,
            "image_token_index": 1000,
        },
        model_class=SEEING,
        towers=("model.vision_tower", "model.multi_modal_projector"),
        common=False,
    ),
    Case(
        "mistral3",
        {
            "text_config": text("mistral", tie_word_embeddings=False),
            "vision_config": PIXTRAL,
            "image_token_index": 1000,
            "tie_word_embeddings": False,
        },
        bits=6,
        group_size=32,
        model_class=SEEING,
        towers=("model.vision_tower", "model.multi_modal_projector"),
        common=False,
    ),
    Case(
        "mistral3",
        {
            "text_config": text(
                "ministral3", rope_parameters=YARN_ROPE, tie_word_embeddings=True
            ),
            "vision_config": PIXTRAL,
            "image_token_index": 1000,
            "tie_word_embeddings": True,
        },
        bits=3,
        label="ministral",
        model_class=SEEING,
        towers=("model.vision_tower", "model.multi_modal_projector"),
        common=False,
    ),
    Case(
        "llava",
        {
            "text_config": text("llama", tie_word_embeddings=False),
            "vision_config": PIXTRAL,
            "image_token_index": 1000,
        },
        bits=8,
        model_class=SEEING,
        towers=("model.vision_tower", "model.multi_modal_projector"),
        common=False,
    ),
    # MLX's name for Pixtral 12B, which is a Llava to transformers.
    Case(
        "llava",
        {
            "text_config": text("mistral", tie_word_embeddings=False),
            "vision_config": PIXTRAL,
            "image_token_index": 1000,
            "tie_word_embeddings": False,
        },
        mlx_type="pixtral",
        label="pixtral",
        model_class=SEEING,
        towers=("model.vision_tower", "model.multi_modal_projector"),
        common=False,
    ),
    Case(
        "qwen2_vl",
        {
            "text_config": text(
                "qwen2_vl_text", rope_scaling=MROPE, tie_word_embeddings=True
            ),
            "vision_config": {**QWEN_VISION, "embed_dim": 64, "hidden_size": 128},
            "tie_word_embeddings": True,
            **IMAGE_TOKENS,
        },
        model_class=SEEING,
        towers=("model.visual",),
        common=False,
    ),
    Case(
        "qwen2_5_vl",
        {
            "text_config": text(
                "qwen2_5_vl_text", rope_scaling=MROPE, tie_word_embeddings=False
            ),
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 64,
                "intermediate_size": 64,
                "out_hidden_size": 128,
            },
            "tie_word_embeddings": False,
            **IMAGE_TOKENS,
        },
        bits=5,
        group_size=32,
        model_class=SEEING,
        towers=("model.visual",),
        common=False,
    ),
    Case(
        "qwen3_vl",
        {
            "text_config": text(
                "qwen3_vl_text", rope_scaling=QWEN3_MROPE, tie_word_embeddings=True
            ),
            "vision_config": QWEN3_VISION,
            "tie_word_embeddings": True,
            **IMAGE_TOKENS,
        },
        group_size=128,
        model_class=SEEING,
        towers=("model.visual",),
        common=False,
    ),
    Case(
        "qwen3_vl",
        {
            "text_config": text(
                "qwen3_vl_text", rope_scaling=QWEN3_MROPE, tie_word_embeddings=False
            ),
            "vision_config": QWEN3_VISION,
            "tie_word_embeddings": False,
            **IMAGE_TOKENS,
        },
        recipe="mixed_4_6",
        model_class=SEEING,
        towers=("model.visual",),
        common=False,
    ),
    Case(
        "qwen3_vl_moe",
        {
            "text_config": text(
                "qwen3_vl_moe_text",
                rope_scaling=QWEN3_MROPE,
                tie_word_embeddings=False,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=64,
                decoder_sparse_step=1,
                mlp_only_layers=[1],
                norm_topk_prob=True,
            ),
            "vision_config": QWEN3_VISION,
            "tie_word_embeddings": False,
            **IMAGE_TOKENS,
        },
        bits=2,
        # Published with the experts transposed, as transformers does not write them.
        drawn_by_mlx=True,
        model_class=SEEING,
        towers=("model.visual",),
        common=False,
    ),
    Case(
        "gemma4",
        {
            "text_config": text(
                "gemma4_text",
                **SLIDING,
                hidden_size=256,
                global_head_dim=64,
                vocab_size_per_layer_input=256,
                hidden_size_per_layer_input=64,
                num_kv_shared_layers=0,
                rope_parameters=GEMMA4_ROPE,
            ),
            **GEMMA4,
        },
        model_class=SEEING,
        towers=("model.vision_tower", "model.embed_vision"),
        common=False,
    ),
    # The last layers use keys and values of earlier ones.
    Case(
        "gemma4",
        {
            "text_config": text(
                "gemma4_text",
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"] * 2,
                num_hidden_layers=4,
                hidden_size=256,
                global_head_dim=64,
                vocab_size_per_layer_input=256,
                hidden_size_per_layer_input=64,
                num_kv_shared_layers=2,
                use_double_wide_mlp=True,
                rope_parameters=GEMMA4_ROPE,
            ),
            **GEMMA4,
        },
        bits=5,
        label="shared",
        model_class=SEEING,
        towers=("model.vision_tower", "model.embed_vision"),
        common=False,
    ),
    # Experts beside the dense part; values that are the keys.
    Case(
        "gemma4",
        {
            "text_config": text(
                "gemma4_text",
                **SLIDING,
                hidden_size=256,
                global_head_dim=64,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
                enable_moe_block=True,
                num_experts=4,
                top_k_experts=2,
                moe_intermediate_size=64,
                rope_parameters=GEMMA4_ROPE,
            ),
            **GEMMA4,
        },
        bits=5,
        label="experts",
        model_class=SEEING,
        towers=("model.vision_tower", "model.embed_vision"),
        common=False,
    ),
    Case(
        "gemma4_unified",
        {
            "text_config": text(
                "gemma4_unified_text",
                **SLIDING,
                hidden_size=256,
                global_head_dim=64,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
                rope_parameters=GEMMA4_ROPE,
            ),
            "vision_config": {
                "mm_embed_dim": 64,
                "output_proj_dims": 64,
                "mm_posemb_size": 8,
            },
            "audio_config": None,
            "vocab_size": 256,
            "image_token_id": 1000,
            "video_token_id": 1001,
            "audio_token_id": 1002,
        },
        bits=6,
        model_class=SEEING,
        towers=("model.vision_embedder", "model.embed_vision"),
        common=False,
    ),
    Case(
        "llama4",
        {
            "text_config": text("llama4_text", **LLAMA4),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "vision_output_dim": 64,
            },
            "image_token_index": 1000,
        },
        model_class=SEEING,
        towers=("vision_model", "multi_modal_projector"),
        common=False,
    ),
    # mlx-lm has no chunks here, and normalizes in layers without rotation too.
    Case(
        "llama4_text",
        {
            **LLAMA4,
            "attention_chunk_size": 256,
            "num_hidden_layers": 3,
            "interleave_moe_layer_step": 8,
            "no_rope_layers": [1, 1, 1],
            "num_local_experts": 0,
            "tie_word_embeddings": False,
        },
        bits=3,
        drawn_by_mlx=True,  # calls the head otherwise
    ),
    Case(
        "muse_glimmer",
        {
            "text_config": text(
                "muse_glimmer_text",
                num_hidden_layers=4,
                sliding_window=16,
                tie_word_embeddings=False,
            ),
            "vision_config": MUSE_VISION,
            "out_hidden_size": 256,
            "projector_hidden_size": 128,
            "image_token_id": 1000,
            "video_token_id": 1001,
        },
        model_class=SEEING,
        towers=(
            "model.vision_tower",
            "model.vision_adapter",
            "model.vision_projection",
        ),
        common=False,
    ),
    Case(
        "lfm2_vl",
        {
            "text_config": text(
                "lfm2",
                layer_types=["conv", "full_attention"],
                conv_L_cache=3,
                conv_bias=False,
                block_dim=128,
                block_ff_dim=256,
                block_multiple_of=64,
                block_ffn_dim_multiplier=1.0,
                block_auto_adjust_ff_dim=False,
                norm_eps=1e-5,
                tie_word_embeddings=True,
            ),
            "vision_config": {
                **SIGLIP,
                "model_type": "siglip2_vision_model",
                "num_patches": 16,
            },
            "image_token_id": 1000,
            "projector_hidden_size": 64,
        },
        mlx_type="lfm2-vl",
        drawn_by_mlx=True,  # reads names of an older transformers
        model_class=SEEING,
        towers=("model.vision_tower", "model.multi_modal_projector"),
        common=False,
    ),
]
