"""Cases of `seeing.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architectures import GEMMA4_ROPE, SLIDING
from cases_seeing import (
    GEMMA4,
    LLAMA4,
    MROPE,
    MUSE_VISION,
    PIXTRAL,
    QWEN3_MROPE,
    QWEN3_VISION,
    QWEN_VISION,
    SIGLIP,
    text,
)
from seeing import Inputs, Seeing

TOKEN = 250  # of an image
TOKENS = {
    "image_token_id": TOKEN,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
UNTIED = {"tie_word_embeddings": False}

# Prefixes of mlx-vlm, for the usual tree of transformers.
PERCEIVE = "vision_tower.perceive."
TEXT = [
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
]
VISUAL = [(r"^model\.visual\.", "vision_tower."), *TEXT]
PLAIN = [*TEXT, (r"^model\.", "")]
NESTED = [(r"^model\.vision_tower\.", "vision_tower.vision_model."), *PLAIN]
PUBLISHED_NESTED = [
    (r"^(model\.)?vision_tower\.(?!vision_model)", r"\1vision_tower.vision_model.")
]


def shown(images: int, **more: Any) -> Callable[[], Inputs]:
    """Text around `images` tokens of an image; `more` are shapes of random tensors, or
    lists of integers."""

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(1)
        before, after = torch.randint(3, 240, (2, 1, 5), generator=generator)
        image = torch.full((1, images), TOKEN)
        ids = torch.cat([before, image, after], dim=1)
        made: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, value in more.items():
            if isinstance(value, tuple):
                made[name] = torch.rand(value, generator=generator)
            elif value == "types":
                made[name] = (ids == TOKEN).long()
            else:
                made[name] = torch.tensor(value)
        return made

    return make


def patches(count: int, width: int, merged: int = 4) -> Callable[[], Inputs]:
    """One image of square patches, as the Qwens take it."""
    side = int(count**0.5)
    return shown(
        count // merged,
        pixel_values=(count, width),
        image_grid_thw=[[1, side, side]],
        mm_token_type_ids="types",
    )


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the text at the top level too, as the Qwens 2 have them."""
    text = {**config["text_config"], "rms_norm_eps": 1e-6}
    model_type = text["model_type"].removesuffix("_text")
    return {**text, "text_config": None, "vision_config": {"model_type": model_type}}


CLIP = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 64}
QWEN2 = {
    "text_config": text("qwen2_vl_text", rope_scaling=MROPE, **UNTIED),
    "vision_config": {**QWEN_VISION, "embed_dim": 64, "hidden_size": 128},
    **UNTIED,
    **TOKENS,
}
QWEN25 = {
    "text_config": text("qwen2_5_vl_text", rope_scaling=MROPE, **UNTIED),
    "vision_config": {
        **QWEN_VISION,
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "out_hidden_size": 128,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    **UNTIED,
    **TOKENS,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
QWEN35_TEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
    **UNTIED,
}
QWEN35_VISION = {k: v for k, v in QWEN3_VISION.items() if k[:4] != "deep"}
LLAVA = {"text_config": text("llama", **UNTIED), "image_token_index": TOKEN, **UNTIED}
GLM_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_size": 64,
    "out_hidden_size": 128,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
GLM_TOKENS = {
    "image_token_id": TOKEN,
    "video_token_id": 251,
    "image_start_token_id": 252,
    "image_end_token_id": 253,
    "video_start_token_id": 254,
    "video_end_token_id": 255,
    **UNTIED,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GLM_OCR_UNKNOWN = (
    "bos_token_id",
    "dtype",
    "partial_rotary_factor",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
)
MROPE_SECTION = {"mrope_section": [4, 6, 6]}
GLM_TEXT = {
    "rope_scaling": {"rope_type": "default", **MROPE_SECTION},
    "partial_rotary_factor": 1.0,
    **UNTIED,
}
PADDLE = {
    # mlx-vlm has the width of the text fixed.
    "text_config": text(
        "paddleocr_vl_text",
        hidden_size=1024,
        num_hidden_layers=1,
        use_bias=False,
        rope_scaling={"rope_type": "default", "type": "default", **MROPE_SECTION},
        **UNTIED,
    ),
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    **TOKENS,
    **UNTIED,
}
MUSE_SPARK: dict[str, Any] = {
    "text_config": text(
        "muse_spark_text",
        num_hidden_layers=4,
        sliding_window=16,
        moe_hidden_size=64,
        moe_intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        **UNTIED,
    ),
    "vision_config": MUSE_VISION,
    "audio_config": {
        "patch_sizes": [4, 4],
        "hidden_sizes": [64, 64],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "mlp_ratio": 1.0,
        "conv_kernel_size": 3,
        "out_hidden_size": 128,
    },
    "out_hidden_size": 256,
    "projector_hidden_size": 128,
    "image_token_id": TOKEN,
    "video_token_id": 251,
    "audio_token_id": 252,
}
MUSE_SPARK_NORMS = r"(input|feedforward)_layernorm\.weight|expert_norm|gate\.gate"

CASES: list[Seeing] = [
    Seeing("qwen2_vl", QWEN2, patches(16, 1176), VISUAL, settings=flat(QWEN2)),
    Seeing(
        "qwen2_5_vl",
        QWEN25,
        patches(16, 1176),
        VISUAL,
        settings=flat(QWEN25),
        bits=5,
        group_size=32,
        tower_bits=8,
    ),
    Seeing(
        "qwen3_vl",
        {
            "text_config": text("qwen3_vl_text", rope_scaling=QWEN3_MROPE, **UNTIED),
            "vision_config": QWEN3_VISION,
            **UNTIED,
            **TOKENS,
        },
        patches(16, 1176),
        VISUAL,
        settings={"vision_config": {"model_type": "qwen3_vl"}},
        tower_bits=6,
    ),
    Seeing(
        "qwen3_vl_moe",
        {
            "text_config": text(
                "qwen3_vl_moe_text",
                rope_scaling=QWEN3_MROPE,
                decoder_sparse_step=1,
                mlp_only_layers=[],
                norm_topk_prob=True,
                **EXPERTS,
                **UNTIED,
            ),
            "vision_config": QWEN3_VISION,
            **UNTIED,
            **TOKENS,
        },
        patches(16, 1176),
        VISUAL,
        published_transposed=r"\.experts\.",
        settings={"vision_config": {"model_type": "qwen3_vl_moe"}},
    ),
    Seeing(
        "qwen3_5",
        {
            "text_config": text("qwen3_5_text", **QWEN35_TEXT),
            "vision_config": QWEN35_VISION,
            **UNTIED,
            **TOKENS,
        },
        patches(16, 1176),
        VISUAL,
        plus_one=r"layernorm\.weight|[qk]_norm\.weight|language_model\.norm\.weight",
        tower_bits=8,
    ),
    Seeing(
        "qwen3_5_moe",
        {
            "text_config": text(
                "qwen3_5_moe_text",
                shared_expert_intermediate_size=64,
                **EXPERTS,
                **QWEN35_TEXT,
            ),
            "vision_config": QWEN35_VISION,
            **UNTIED,
            **TOKENS,
        },
        patches(16, 1176),
        VISUAL,
        plus_one=r"layernorm\.weight|[qk]_norm\.weight|language_model\.norm\.weight",
        bits=3,
    ),
    Seeing(
        "gemma3",
        {
            "text_config": text(
                "gemma3_text",
                **SLIDING,
                rope_theta=1000000.0,
                rope_local_base_freq=10000.0,
                query_pre_attn_scalar=32,
                sliding_window_pattern=2,
            ),
            "vision_config": {**SIGLIP, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": TOKEN,
        },
        shown(4, pixel_values=(1, 3, 28, 28), token_type_ids="types"),
        NESTED,
        published=PUBLISHED_NESTED,
        settings={"text_config": {"mm_tokens_per_image": 4}},
        head_twice=True,
        unreadable="mlx-vlm wants the tied head to be stored too",
        tower_bits=4,
    ),
    Seeing(
        "gemma4",
        {
            "text_config": text(
                "gemma4_text",
                **SLIDING,
                global_head_dim=64,
                vocab_size_per_layer_input=256,
                hidden_size_per_layer_input=64,
                num_kv_shared_layers=0,
                rope_parameters=GEMMA4_ROPE,
            ),
            **GEMMA4,
            "image_token_id": TOKEN,
            "video_token_id": 251,
            "audio_token_id": 252,
        },
        shown(
            4,
            pixel_values=(1, 36, 768),
            image_position_ids=[[[x, y] for y in range(6) for x in range(6)]],
            mm_token_type_ids="types",
        ),
        PLAIN,
    ),
    Seeing(
        "gemma4_unified",
        {
            "text_config": text(
                "gemma4_unified_text",
                **SLIDING,
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
            "image_token_id": TOKEN,
            "video_token_id": 251,
            "audio_token_id": 252,
        },
        shown(
            4,
            pixel_values=(1, 4, 6912),
            image_position_ids=[[[x, y] for y in range(2) for x in range(2)]],
            mm_token_type_ids="types",
        ),
        [
            (
                r"^model\.embed_vision\.multimodal_embedder\.",
                "embed_vision.",
            ),
            (r"^model\.embed_vision\.", "vision_embedder."),
            *PLAIN,
        ],
    ),
    Seeing(
        "mistral3",
        {
            "text_config": text("mistral", **UNTIED),
            "vision_config": {**PIXTRAL, "image_size": 56},
            "image_token_index": TOKEN,
            "spatial_merge_size": 2,
            **UNTIED,
        },
        shown(4, pixel_values=(1, 3, 56, 56), image_sizes=[[56, 56]]),
        NESTED,
        dense="lm_head",
        tower_bits=8,
    ),
    Seeing(
        "llava",
        {
            **LLAVA,
            "text_config": text("mistral", **UNTIED),
            "vision_config": PIXTRAL,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
        shown(4, pixel_values=(1, 3, 28, 28), image_sizes=[[28, 28]]),
        NESTED,
        mlx_type="pixtral",
        unreadable="mlx-vlm knows this tower only under a model type that to "
        "transformers is the tower's",
        label="pixtral",
        bits=8,
    ),
    Seeing(
        "llava",
        {**LLAVA, "vision_config": {**CLIP, "num_hidden_layers": 2}},
        shown(4, pixel_values=(1, 3, 28, 28)),
        NESTED,
        published=PUBLISHED_NESTED,
    ),
    Seeing(
        "llava_next",
        {
            **LLAVA,
            "vision_config": {**CLIP, "num_hidden_layers": 2},
            "image_grid_pinpoints": [[28, 28], [28, 56]],
        },
        shown(10, pixel_values=(1, 2, 3, 28, 28), image_sizes=[[28, 28]]),
        NESTED,
        published=PUBLISHED_NESTED,
        tower_bits=6,
    ),
    Seeing(
        "llava_onevision",
        {
            **LLAVA,
            "text_config": text("qwen2", **UNTIED),
            "vision_config": SIGLIP,
            "image_grid_pinpoints": [[28, 28], [28, 56]],
        },
        shown(10, pixel_values=(1, 2, 3, 28, 28), image_sizes=[[28, 28]]),
        NESTED,
        published=PUBLISHED_NESTED,
    ),
    Seeing(
        "idefics2",
        {
            "text_config": text("mistral", **UNTIED),
            "vision_config": {**SIGLIP, "model_type": "idefics2_vision"},
            "perceiver_config": {
                "model_type": "idefics2_perceiver",
                "hidden_size": 128,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 32,
                "num_key_value_heads": 1,
            },
            "image_token_id": TOKEN,
            **UNTIED,
        },
        shown(4, pixel_values=(1, 1, 3, 28, 28)),
        [(r"^model\.text_model\.", "language_model."), *PLAIN],
    ),
    Seeing(
        "idefics3",
        {
            "text_config": text("llama", **UNTIED),
            "vision_config": {**SIGLIP, "model_type": "idefics3_vision"},
            "image_token_id": TOKEN,
            "scale_factor": 2,
            **UNTIED,
        },
        shown(1, pixel_values=(1, 1, 3, 28, 28)),
        [(r"^model\.text_model\.", "language_model."), *PLAIN],
        tower_bits=5,
    ),
    Seeing(
        "smolvlm",
        {
            "text_config": text("llama", **UNTIED),
            "vision_config": {**SIGLIP, "model_type": "smolvlm_vision"},
            "image_token_id": TOKEN,
            "scale_factor": 2,
            **UNTIED,
        },
        shown(1, pixel_values=(1, 1, 3, 28, 28)),
        [(r"^model\.text_model\.", "language_model."), *PLAIN],
        bits=6,
    ),
    Seeing(
        "paligemma",
        {
            "text_config": text("gemma2", hidden_activation="gelu_pytorch_tanh"),
            "vision_config": {**SIGLIP, "vision_use_head": False},
            "projection_dim": 128,
            "image_token_index": TOKEN,
        },
        shown(4, pixel_values=(1, 3, 28, 28)),
        NESTED,
        published=PUBLISHED_NESTED,
    ),
    Seeing(
        "internvl",
        {
            "text_config": text("qwen3", **UNTIED),
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": [28, 28],
                "patch_size": [14, 14],
                "use_qk_norm": False,
            },
            "image_token_id": TOKEN,
            "downsample_ratio": 0.5,
            **UNTIED,
        },
        shown(1, pixel_values=(1, 3, 28, 28)),
        PLAIN,
    ),
    Seeing(
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
            "image_token_index": TOKEN,
        },
        shown(1, pixel_values=(1, 3, 28, 28)),
        settings={"vision_config": {"rope_theta": 10000.0, "vision_feature_layer": -1}},
    ),
    Seeing(
        "aya_vision",
        {
            "text_config": text("cohere2", **SLIDING, tie_word_embeddings=True),
            "vision_config": {**SIGLIP, "vision_use_head": False},
            "image_token_index": TOKEN,
            "downsample_factor": 2,
            "alignment_intermediate_size": 128,
        },
        shown(1, pixel_values=(1, 3, 28, 28)),
        NESTED,
        published=PUBLISHED_NESTED,
    ),
    Seeing(
        "cohere2_vision",
        {
            "text_config": text("cohere2", **SLIDING, tie_word_embeddings=True),
            "vision_config": {**SIGLIP, "vision_use_head": False},
            "image_token_id": TOKEN,
            "downsample_factor": 2,
            "alignment_intermediate_size": 128,
        },
        shown(1, pixel_values=(1, 3, 28, 28)),
        NESTED,
        published=PUBLISHED_NESTED,
    ),
    Seeing(
        "glm4v",
        {
            "text_config": text("glm4v_text", **GLM_TEXT),
            "vision_config": {**GLM_VISION, "model_type": "glm4v_vision"},
            **GLM_TOKENS,
        },
        patches(16, 1176),
        VISUAL,
        tower_bits=8,
    ),
    Seeing(
        "glm4v_moe",
        {
            "text_config": text(
                "glm4v_moe_text",
                n_routed_experts=4,
                n_shared_experts=1,
                num_experts_per_tok=2,
                moe_intermediate_size=64,
                first_k_dense_replace=1,
                n_group=1,
                topk_group=1,
                norm_topk_prob=True,
                routed_scaling_factor=1.0,
                use_qk_norm=True,
                **GLM_TEXT,
            ),
            "vision_config": {**GLM_VISION, "model_type": "glm4v_moe_vision"},
            **GLM_TOKENS,
        },
        patches(16, 1176),
        VISUAL,
        settings={"text_config": {"use_qk_norm": True}},
        dense=r"\.gate\.weight",
    ),
    Seeing(
        "glm_ocr",
        {
            "text_config": text("glm_ocr_text", **GLM_TEXT),
            "vision_config": {**GLM_VISION, "model_type": "glm_ocr_vision"},
            **GLM_TOKENS,
        },
        patches(16, 1176),
        VISUAL,
        settings={
            "text_config": dict.fromkeys(GLM_OCR_UNKNOWN),
            "vision_config": dict.fromkeys(GLM_OCR_UNKNOWN),
        },
        unreadable="mlx-vlm refuses settings that it does not know",
    ),
    Seeing(
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
                "vision_use_head": False,
            },
            "image_token_id": TOKEN,
            "projector_hidden_size": 64,
            "downsample_factor": 2,
        },
        shown(
            4,
            pixel_values=(1, 16, 588),
            spatial_shapes=[[4, 4]],
            pixel_attention_mask=[[1] * 16],
        ),
        PLAIN,
    ),
    Seeing(
        "mllama",
        {
            "text_config": text(
                "mllama_text_model",
                num_hidden_layers=3,
                cross_attention_layers=[1],
                **UNTIED,
            ),
            "vision_config": {
                "model_type": "mllama_vision_model",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 128,
                "max_num_tiles": 4,
            },
            "image_token_index": TOKEN,
            **UNTIED,
        },
        shown(
            1,
            pixel_values=(1, 1, 4, 3, 28, 28),
            aspect_ratio_ids=[[4]],
            aspect_ratio_mask=[[[1, 1, 1, 1]]],
        ),
        [(r"^model\.vision_model\.", "vision_tower."), *PLAIN],
        settings={"vision_config": {"num_attention_heads": 2}},
    ),
    Seeing(
        "muse_glimmer",
        {
            "text_config": text(
                "muse_glimmer_text",
                num_hidden_layers=4,
                sliding_window=16,
                **UNTIED,
            ),
            "vision_config": MUSE_VISION,
            "out_hidden_size": 256,
            "projector_hidden_size": 128,
            "image_token_id": TOKEN,
            "video_token_id": 251,
        },
        patches(16, 1176),
        PLAIN,
        tower_bits=4,
    ),
    Seeing(
        "muse_spark",
        MUSE_SPARK,
        patches(16, 1176),
        writer="mlx_vlm",
        plus_one=MUSE_SPARK_NORMS,
        settings={"text_config": {"rope_parameters": ROPE}},
        tower_bits=4,
    ),
    Seeing(
        "muse_spark",
        MUSE_SPARK,
        patches(16, 1176),
        plus_one=MUSE_SPARK_NORMS,
        settings={"text_config": {"rope_parameters": ROPE}},
        writer="mlx_lm",
        without=("model.audio_tower",),
        everything=True,
        bits=6,
        label="mlx-lm",
    ),
    Seeing(
        "paddleocr_vl",
        PADDLE,
        shown(
            4,
            pixel_values=(16, 3, 14, 14),
            image_grid_thw=[[1, 4, 4]],
            mm_token_type_ids="types",
        ),
        settings=flat(PADDLE),
        writer="mlx_vlm",
        unreadable="it is saved as transformers has it",
    ),
    Seeing(
        "kimi_k25",
        {
            "text_config": text(
                "deepseek_v3",
                num_key_value_heads=4,
                q_lora_rank=64,
                kv_lora_rank=64,
                qk_nope_head_dim=64,
                qk_rope_head_dim=32,
                v_head_dim=64,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_shared_experts=1,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                moe_intermediate_size=64,
                norm_topk_prob=True,
                routed_scaling_factor=1.0,
                **UNTIED,
            ),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 14,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
            "projection_hidden_size": 64,
            **TOKENS,
            **UNTIED,
        },
        shown(4, pixel_values=(16, 3, 14, 14), image_grid_thw=[[1, 4, 4]]),
        published=[
            (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
            (r"^model\.mm_projector\.", "mm_projector."),
        ],
        settings={
            "vision_config": {
                "model_type": "moonvit",
                "depth": 1,
                "embed_dim": 64,
                "num_heads": 2,
                "init_pos_emb_height": 4,
                "init_pos_emb_width": 4,
            }
        },
        # Its groups run along another axis in MLX, so that a grid here is none there.
        dense=r"kv_b_proj|embed_q|unembed_out",
        tower_bits=8,
        writer="mlx_vlm",
        unreadable="it is saved as transformers has it",
    ),
    Seeing(
        "hunyuan_vl",
        {
            "text_config": text(
                "hunyuan_vl_text",
                rope_scaling={
                    "rope_type": "xdrope",
                    "type": "xdrope",
                    "xdrope_section": [4, 4, 4, 4],
                    "alpha": 1000.0,
                    "factor": 1.0,
                },
                tie_word_embeddings=True,
            ),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "patch_size": 16,
                "out_hidden_size": 128,
                "text_hidden_size": 128,
                "max_image_size": 64,
                "img_max_token_num": 16,
            },
            "image_token_id": TOKEN,
            "im_start_id": 251,
            "im_end_id": 252,
            "im_newline_id": 253,
            "tie_word_embeddings": True,
        },
        shown(
            8,
            pixel_values=(16, 768),
            image_grid_thw=[[1, 4, 4]],
            mm_token_type_ids="types",
        ),
        [
            (r"^model\.(vision_tower\..*)\.layer_norm1\.", r"\1.input_layernorm."),
            (
                r"^model\.(vision_tower\..*)\.layer_norm2\.",
                r"\1.post_attention_layernorm.",
            ),
            (r"^model\.(vision_tower\..*\.mlp)\.fc1\.", r"\1.dense_h_to_4h."),
            (r"^model\.(vision_tower\..*\.mlp)\.fc2\.", r"\1.dense_4h_to_h."),
            (r"^model\.vision_tower\.patch_merger\.proj_conv", f"{PERCEIVE}proj.0"),
            (r"^model\.vision_tower\.patch_merger\.proj_out", f"{PERCEIVE}proj.2"),
            (r"^model\.vision_tower\.patch_merger\.", PERCEIVE),
            *PLAIN,
        ],
        settings={"vision_config": {"model_type": "hunyuan_vl"}},
        tower_bits=8,
    ),
    Seeing(
        "granite4_vision",
        {
            "text_config": text("granite4_vision_text", **UNTIED),
            "vision_config": {**SIGLIP, "num_hidden_layers": 2},
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 3072,
                "encoder_hidden_size": 64,
            },
            "image_token_index": TOKEN,
            "image_grid_pinpoints": [[28, 28], [28, 56]],
            "vision_feature_select_strategy": "full",
            "deepstack_layer_map": [[0, 0]],
            "spatial_target_layers": [1],
            "downsample_rate": "1/2",
            **UNTIED,
        },
        shown(3, pixel_values=(1, 2, 3, 28, 28), image_sizes=[[28, 28]]),
        NESTED,
        published=PUBLISHED_NESTED,
    ),
    Seeing(
        "minimax_m3_vl",
        {
            "text_config": text(
                "minimax_m3_vl_text",
                num_experts_per_tok=2,
                num_local_experts=4,
                dense_intermediate_size=128,
                shared_intermediate_size=64,
                rotary_dim=16,
                mlp_layer_types=["dense", "sparse"],
                layer_types=["full_attention", "full_attention"],
                **UNTIED,
            ),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            "projector_hidden_size": 128,
            "image_token_index": TOKEN,
            "video_token_index": 251,
            **UNTIED,
        },
        shown(4, pixel_values=(16, 1176), image_grid_thw=[[1, 4, 4]]),
        writer="mlx_vlm",
        tower_bits=8,
    ),
]
