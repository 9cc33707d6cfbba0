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
TEXT = [
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
]
VISUAL = [(r"^model\.visual\.", "vision_tower."), *TEXT]
PLAIN = [*TEXT, (r"^model\.", "")]
NESTED = [(r"^model\.vision_tower\.", "vision_tower.vision_model."), *PLAIN]
PUBLISHED_NESTED = [(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.")]


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


CASES: list[Seeing] = [
    Seeing(
        "qwen2_vl",
        {
            "text_config": text("qwen2_vl_text", rope_scaling=MROPE, **UNTIED),
            "vision_config": {**QWEN_VISION, "embed_dim": 64, "hidden_size": 128},
            **UNTIED,
            **TOKENS,
        },
        patches(16, 3 * 2 * 14 * 14),
        VISUAL,
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
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": TOKEN,
        },
        shown(4, pixel_values=(1, 3, 28, 28), token_type_ids="types"),
        PLAIN,
        settings={"text_config": {"mm_tokens_per_image": 4}},
    ),
]
