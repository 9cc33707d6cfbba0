"""config.json of a model as MLX reads it: both spellings, and what mlx-lm wants beside.

Most settings carry over by rule: what transformers 5 renamed is written in both ways, and
so are the other names that a configuration knows a setting by. `_settings_of_mlx` has what
no rule gives.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import layout
from .families import MLX_TYPES, is_text_part
from .files import CONFIG, read_json
from .names import is_tower


def mlx_config(
    model: nn.Module,
    formats: dict[str, tuple[int, int]],
    dtype: torch.dtype,
    origin: Path | None,
) -> dict[str, Any]:
    """config.json: the model's own, in both spellings, with the quantization.

    `formats` gives bits and group size of each quantized module, `dtype` is what the
    model that is written computes in.
    """
    own: Any = getattr(model, "config", None)
    config: dict[str, Any] = {}
    if hasattr(own, "to_json_string"):
        # Not to_dict: this way also infinite values come out as valid JSON.
        config = json.loads(own.to_json_string(use_diff=False))
        # transformers drops keys that it has no use for and mlx-lm reads.
        source = _part_of(own, read_json(origin / CONFIG)) if origin else {}
        kept = {k: v for k, v in source.items() if k not in _RESPELLED}
        config = {**kept, **config}
        _add_aliases(own, config)
        config["architectures"] = [type(model).__name__]
        # The model may have been cast, tied or untied since its configuration was made.
        name = layout.name_of(dtype)
        for part in (config, *_nested(config)):
            part["dtype"] = part["torch_dtype"] = name
        tied = _ties_words(model)
        if tied is not None:
            config["tie_word_embeddings"] = tied
            text = config.get("text_config") or {}
            if "tie_word_embeddings" in text:
                text["tie_word_embeddings"] = tied
    elif (to_json := getattr(model, "to_json_string", None)) is not None:
        config = json.loads(to_json())  # diffusers' models say it themselves
    for key in ("_name_or_path", "quantization", "quantization_config"):
        config.pop(key, None)
    _spell_as_version_4(config)
    if own is not None and is_text_part(own):
        config = _within_composite(config)
    for part in (config, *_nested(config)):
        part |= _settings_of_mlx(part)
    sees = any(is_tower(name) for name, _ in model.named_modules())
    if sees and hasattr(own, "model_type"):
        config["model_type"] = own.model_type  # mlx-vlm has transformers' types
    if formats:
        quantization = _quantization(formats)
        config["quantization"] = config["quantization_config"] = quantization
    return dict(sorted(config.items()))


def _part_of(own: Any, source: dict[str, Any]) -> dict[str, Any]:
    """What of a config.json is about the model of this configuration: the text part of
    a composite one, where the model is the text's."""
    text = source.get("text_config")
    return text if isinstance(text, dict) and own.get_text_config() is own else source


def _add_aliases(own: Any, config: dict[str, Any]) -> None:
    """Add the names that transformers reads a setting by and writes another for."""
    for alias, name in getattr(own, "attribute_map", {}).items():
        if name in config:
            config.setdefault(alias, config[name])
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            _add_aliases(getattr(own, key, None), value)


def _within_composite(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of which this one is the text part."""
    above = ("dtype", "torch_dtype", "tie_word_embeddings", "transformers_version")
    return {
        "model_type": config["model_type"].removesuffix("_text"),
        "text_config": config,
        **{key: config[key] for key in above if key in config},
    }


# As published, and as mlx-vlm wants them.
_VISION_TYPES = {
    "hunyuan_vl_vision": "hunyuan_vl",
    "paddleocr_vl_vision": "paddleocr_vl",
    "qwen2_vl_vision": "qwen2_vl",
    "qwen2_5_vl_vision": "qwen2_5_vl",
    "qwen3_vl_vision": "qwen3_vl",
    "qwen3_vl_moe_vision": "qwen3_vl_moe",
}


def _settings_of_mlx(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm spells in a way of its own, and what it must be told of a model that
    transformers knows in one form only."""
    model_type = config.get("model_type")
    if model_type == "apertus":
        return {"mlp_bias": False, "post_norm": False, "qk_norm": True}
    if model_type == "dbrx":
        rope_theta = config["rope_theta"]
        return {"attn_config": config["attn_config"] | {"rope_theta": rope_theta}}
    if model_type in ("exaone4", "glm4_moe", "llama4_text"):  # it has to be there
        return {"rope_scaling": config.get("rope_scaling")}
    if model_type == "exaone_moe":
        sparse = [kind == "sparse" for kind in config["mlp_layer_types"]]
        return {"is_moe_layer": sparse}
    if model_type == "falcon_h1":
        each = config["hidden_size"] // config["num_attention_heads"]
        return {"head_dim": config.get("head_dim") or each}
    if model_type in ("gemma3", "gemma4", "gemma4_unified"):  # not that of the text
        if model_type == "gemma3":
            tokens = config["mm_tokens_per_image"]
            config["text_config"]["mm_tokens_per_image"] = tokens
        return {"vocab_size": config["text_config"]["vocab_size"]}
    if model_type in ("gemma4_text", "gemma4_unified_text"):
        others = list((config.get("per_layer_config") or {}).values())[:1]
        names = {
            "head_dim": "global_head_dim",
            "num_key_value_heads": "num_global_key_value_heads",
        }
        return {names[k]: v for own in others for k, v in own.items() if k in names}
    if model_type == "granitemoehybrid":
        spelled = {"linear_attention": "mamba", "full_attention": "attention"}
        new = {"layer_types": [spelled[kind] for kind in config["layer_types"]]}
        if not config["num_local_experts"]:
            new["intermediate_size"] = config["shared_intermediate_size"]
        return new
    if model_type == "hunyuan_v1_moe":
        return {
            "model_type": MLX_TYPES[model_type],
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": False,
            "cla_share_factor": 1,
        }
    if model_type == "lfm2":
        return {"block_dim": config["hidden_size"]}
    if model_type == "llama4_vision_model":
        return {"vision_feature_layer": -1}
    if model_type == "mamba2":
        return {"intermediate_size": config["expand"] * config["hidden_size"]}
    if model_type == "minimax_m2":
        part = config.get("partial_rotary_factor", 1.0)
        return {
            "rotary_dim": int(config["head_dim"] * part),
            "shared_intermediate_size": 0,
        }
    if model_type in ("qwen2_vl", "qwen2_5_vl"):  # mlx-vlm has the text beside vision
        return {**config["text_config"], **config}
    if model_type in _VISION_TYPES:
        return {"model_type": _VISION_TYPES[model_type]}
    if model_type in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
        layers = [*config["layer_types"], "full_attention"]
        return {"full_attention_interval": layers.index("full_attention") + 1}
    if model_type == "solar_open":
        dense = config.get("intermediate_size", config["moe_intermediate_size"])
        part = config.get("partial_rotary_factor", 1.0)
        return {
            "first_k_dense_replace": 0,
            "intermediate_size": dense,
            "partial_rotary_factor": part,
        }
    if model_type in _LATENT:
        return _LATENT[model_type](config)
    return {"model_type": MLX_TYPES[model_type]} if model_type in MLX_TYPES else {}


def _leading_dense(config: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm knows only how many layers before the first one with experts."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return {}
    dense = [*kinds, "sparse"].index("sparse")
    return {"first_k_dense_replace": dense, "moe_layer_freq": 1}


def _glm_moe_dsa(config: dict[str, Any]) -> dict[str, Any]:
    routing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return _leading_dense(config) | routing


def _bailing(config: dict[str, Any]) -> dict[str, Any]:
    kinds = [*config["layer_types"], "full_attention"]
    return _leading_dense(config) | {
        # By this mlx-lm knows it from an older model of the same type.
        "architectures": ["BailingMoeV3ForCausalLM"],
        # That of linear attention; transformers writes the rotated part of the other.
        "head_dim": config["linear_head_dim"],
        "layer_group_size": kinds.index("full_attention") + 1,
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"],
        "no_kda_lora": True,
        "q_lora_rank": None,
        "rope_interleave": True,
    }


def _kimi_linear(config: dict[str, Any]) -> dict[str, Any]:
    kinds = list(enumerate(config["layer_types"], 1))
    linear = {
        "full_attn_layers": [n for n, kind in kinds if kind == "full_attention"],
        "kda_layers": [n for n, kind in kinds if kind == "linear_attention"],
        "num_heads": config["linear_num_heads"],
        "head_dim": config["linear_head_dim"],
        "short_conv_kernel_size": config["linear_conv_kernel_dim"],
    }
    # It has no rotary positions, but mlx-lm wants their base.
    fixed = {"mla_use_nope": True, "rope_theta": config.get("rope_theta", 10000.0)}
    return _leading_dense(config) | fixed | {"linear_attn_config": linear}


def _longcat(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_method": "MLA",
        "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True,
        "zero_expert_type": "identity",
    }


def _mimo_v2(config: dict[str, Any]) -> dict[str, Any]:
    sliding = config["rope_parameters"]["sliding_attention"]
    return {
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "hybrid_layer_pattern": [
            int(kind == "sliding_attention") for kind in config["layer_types"]
        ],
        "layernorm_epsilon": config["rms_norm_eps"],
        "moe_layer_freq": [int(kind == "sparse") for kind in config["mlp_layer_types"]],
        "n_shared_experts": None,
        "scoring_func": "sigmoid",
        # transformers adds one to this when it reads it.
        "sliding_window_size": config["sliding_window"] - 1,
        "swa_head_dim": config["head_dim"],
        "swa_num_attention_heads": config["num_attention_heads"],
        "swa_num_key_value_heads": 2 * config["num_key_value_heads"],
        "swa_rope_theta": sliding["rope_theta"],
        "swa_v_head_dim": config["v_head_dim"],
        "topk_method": "noaux_tc",
    }


# What mlx-lm wants to be told of models with latent attention, and of their kin.
_LATENT: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bailing_hybrid": _bailing,
    "deepseek_v32": _leading_dense,
    "glm4_moe_lite": _leading_dense,
    "glm_moe_dsa": _glm_moe_dsa,
    "kimi_linear": _kimi_linear,
    "laguna": lambda config: {"qkv_bias": config["attention_bias"]},
    "longcat_flash": _longcat,
    "mimo_v2_flash": _mimo_v2,
}


# Later kinds have no old spelling, and transformers does not take one for them.
_ROPE_TYPES_OF_VERSION_4 = ("linear", "dynamic", "yarn", "longrope", "llama3")

# Types that never had the usual names.
_ROPE_OTHERWISE = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
}

# Keys of transformers 4 that the current configuration spells in another way.
_RESPELLED = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "torch_dtype",
    "auto_map",
)


def _quantization(formats: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """mlx-lm's object: the most common format, and the modules that differ from it."""

    def spelled(form: tuple[int, int]) -> dict[str, Any]:
        return {"bits": form[0], "group_size": form[1], "mode": "affine"}

    common = Counter(formats.values()).most_common(1)[0][0]
    others = {n: spelled(form) for n, form in formats.items() if form != common}
    return {**spelled(common), **others}


def _ties_words(model: Any) -> bool | None:
    """Whether the head has the weight of the input embedding; None without both."""
    try:
        weights = [
            getattr(module, "weight", None)
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
    except (AttributeError, NotImplementedError):  # not every model has them
        return None
    if any(weight is None for weight in weights):
        return None
    return weights[0] is weights[1]


def _nested(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations within a configuration: text_config, for one."""
    values = [value for value in config.values() if isinstance(value, dict)]
    return [value for value in values if "model_type" in value]


def _spell_as_version_4(config: dict[str, Any]) -> None:
    """Add the keys that transformers 5 renamed and mlx-lm reads by their old name.

    mlx-lm's Llama takes a missing ``rope_theta`` for 10000 without a word.
    """
    for nested in _nested(config):
        _spell_as_version_4(nested)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if isinstance(rope.get("sliding_attention"), dict):
        local = rope["sliding_attention"].get("rope_theta")
        if local is not None:
            config.setdefault("rope_local_base_freq", local)
    if isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config.setdefault(key, rope[key])
            if config.get("model_type") in _ROPE_OTHERWISE:
                config.setdefault(_ROPE_OTHERWISE[config["model_type"]][key], rope[key])
    kind = rope.get("rope_type")
    if kind in _ROPE_TYPES_OF_VERSION_4:
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        config.setdefault("rope_scaling", {**scaling, "type": kind})
