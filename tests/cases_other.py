"""Cases of `architectures.py`: the older trees, and what fits no other group."""

from __future__ import annotations

from typing import Any

from architectures import Case

# GPT-2 has other names for the common settings.
GPT: dict[str, Any] = {
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_ctx": 256,
    "n_inner": 512,
    "layer_norm_epsilon": 1e-5,
}
NEOX: dict[str, Any] = {
    "intermediate_size": 512,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "layer_norm_eps": 1e-5,
    # The published activation is the exact GELU; mlx-lm has the tanh form.
    "hidden_act": "gelu_new",
}
GPT_OSS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 128,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_bias": True,
    # The published one has "truncate": false besides, which mlx-lm does not heed.
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 64,
    },
    "rope_theta": 150000.0,
}

CASES: list[Case] = [
    # mlx-lm wants the names of the body alone, as the published file has them.
    Case("gpt2", GPT, drawn_by_mlx=True),
    Case(
        "gpt2",
        GPT,
        bits=3,
        group_size=32,
        drawn_by_mlx=True,
        formats={r"\.w[tp]e$": (6, 32), r"\.h\.1\.": (4, 64)},
        label="mixed",
    ),
    Case("gptj", {**GPT, "rotary_dim": 16}, bits=5, group_size=32),
    Case("gpt_neox", NEOX, bits=6),
    Case("gpt_neox", {**NEOX, "use_parallel_residual": False}, label="serial"),
    # mlx-lm reads the layout of OpenAI's MXFP4 files only.
    Case("gpt_oss", GPT_OSS, group_size=32, drawn_by_mlx=True),
    Case("gpt_oss", GPT_OSS, bits=8, drawn_by_mlx=True),
    Case(
        "gpt_oss",
        GPT_OSS,
        drawn_by_mlx=True,
        formats={r"\.experts\.gate_proj$": (6, 64)},
        dense=(r"\.experts\.gate_up_proj$",),
        label="gate-unlike-up",
    ),
    # mlx-lm reads the names of the original code only.
    Case("nanochat", {"rms_norm_eps": 1e-5}, bits=8, drawn_by_mlx=True),
]
