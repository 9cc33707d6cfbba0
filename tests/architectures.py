"""Model types that transformers and mlx-lm both have, and checkpoints of them.

Each `Case` is a model of about 0.4 million random parameters. transformers only draws
the weights. mlx-lm reads them, quantizes them, writes the checkpoint, reads that back,
and says what the logits are.

Configs are spelled as published checkpoints spell them (`rope_theta` and the like at
the top level), because both libraries read that spelling. Where one library has a
fixed activation, or a scale that it rounds to bfloat16, the config is chosen such that
both compute the same function; so one tolerance holds for all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 1e-5  # relative L2 of the float32 logits

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
BIASES = {"attention_bias": True, "mlp_bias": True}
# The window is shorter than the 24 tokens of the test, so that it has an effect.
SLIDING = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 16,
}
GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
    },
}


@dataclass(frozen=True)
class Case:
    """A model type: what its config adds to `COMMON`, and how mlx-lm quantizes it.

    With a `recipe` (one of mlx-lm's `QUANT_RECIPES`) some modules get more bits than
    others, and the config names each; `bits` is then what the config gives as default.

    `model_class` is the auto class of transformers, or the class of the text model alone
    of a composite configuration. `towers` are modules of it that mlx-lm leaves out: what
    sees, hears and leads to the text. `dense` are patterns of parameters of the
    transformers model that become dense though mlx-lm has them quantized (see
    `checkpoint/forms.py` for the reasons). `common` are the settings of `COMMON` that
    the config gets ("all", or none for composite ones). `tokens` is how many the
    comparison runs over. `tolerance` may be wider where the two libraries differ by as
    much on the dense model; the reason stands beside it. `formats` gives the modules of
    mlx-lm whose names match a pattern other bits and group sizes. `mlx_type` is mlx-lm's
    name of the model type where it is not that of transformers. `drawn_by_mlx` is for
    types whose weights mlx-lm cannot read as transformers writes them: its own model is
    then what draws them.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    bits: int = 4
    group_size: int = 64
    recipe: str | None = None
    model_class: str = "AutoModelForCausalLM"
    towers: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    common: bool = True
    tokens: int = 24
    tolerance: float = TOLERANCE
    label: str = ""
    formats: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    mlx_type: str = ""
    drawn_by_mlx: bool = False

    def __str__(self) -> str:
        tied = "-tied" if self.config.get("tie_word_embeddings") else ""
        width = self.recipe or f"{self.bits}bit"
        label = f"-{self.label}" if self.label else ""
        return f"{self.model_type}{label}{tied}-{width}-g{self.group_size}"


CASES = [
    # Llama's tree: with biases, tied and untied, and with mixed widths.
    Case("llama", {**BIASES, "rope_scaling": LLAMA3_ROPE}),
    Case("llama", {"tie_word_embeddings": True}, bits=2, group_size=32),
    Case("llama", {"tie_word_embeddings": False}, bits=3, recipe="mixed_3_6"),
    Case("mistral", {"tie_word_embeddings": False}, bits=8),
    Case("ministral3", {"rope_parameters": YARN_ROPE}, group_size=128),
    Case("internlm3", {**BIASES, "bias": True, "qkv_bias": True}, bits=6),
    Case("iquestcoder", BIASES),
    Case("qwen2", {"tie_word_embeddings": True}),
    Case("qwen2", {"tie_word_embeddings": False}, bits=5, group_size=32),
    Case("qwen3", {"tie_word_embeddings": True}, bits=3, group_size=128),
    Case("qwen3", {"tie_word_embeddings": False}),
    Case("phi", {"partial_rotary_factor": 0.5}),
    Case("phi3", {"partial_rotary_factor": 0.5}, bits=6, group_size=32),
    # transformers takes "gelu" for the tanh form in this family; mlx-lm has the exact.
    Case("gemma", {"hidden_act": "gelu_python"}),
    Case("gemma2", {"query_pre_attn_scalar": 32}, bits=8, group_size=128),
    # sqrt(256) is exact in bfloat16, in which mlx-lm keeps the scale of embeddings.
    Case(
        "gemma3_text",
        {
            **SLIDING,
            "hidden_size": 256,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 32,
            "sliding_window_pattern": 2,
        },
    ),
    Case(
        "gemma4_text",
        {
            **SLIDING,
            "global_head_dim": 64,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
            "rope_parameters": GEMMA4_ROPE,
        },
    ),
    Case("cohere", {"attention_bias": True, "use_qk_norm": True}),
    Case("cohere2", {**SLIDING, "attention_bias": True, "sliding_window_pattern": 2}),
    # mlx-lm rotates whole heads here.
    Case("glm", {"partial_rotary_factor": 1.0}, bits=5),
    Case("glm4", {"partial_rotary_factor": 0.5}),
    Case(
        "granite",
        {
            **BIASES,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.03125,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        bits=8,
        group_size=32,
    ),
    Case("helium", BIASES),
    Case(
        "hunyuan_v1_dense",
        {
            "attention_bias": True,
            "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        },
    ),
    Case("nemotron", {**BIASES, "partial_rotary_factor": 0.5}, bits=6, group_size=128),
    Case("olmo2", {"attention_bias": True}),
    # transformers passes rope_theta to the full layers only; 500000 is its default.
    Case("olmo3", {**SLIDING, "attention_bias": True, "rope_theta": 500000.0}),
    Case("seed_oss", {"attention_out_bias": True, "mlp_bias": True}, bits=5),
    Case("smollm3", {**BIASES, "no_rope_layers": [1, 0]}),
    Case(
        "stablelm",
        {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "qk_layernorm": True},
    ),
    # The published activation is the tanh form of GELU; mlx-lm has the exact.
    Case("starcoder2", {"hidden_act": "gelu"}, bits=3, group_size=32),
    Case(
        "gpt_bigcode",
        {
            "n_embd": 128,
            "n_layer": 2,
            "n_inner": 256,
            "n_head": 4,
            "n_positions": 256,
            "activation_function": "gelu",
        },
    ),
    Case("ernie4_5", {"use_bias": True}),
    Case(
        "exaone4",
        {**SLIDING, "sliding_window_pattern": "LG", "rope_scaling": LLAMA3_ROPE},
    ),
    Case(
        "minicpm3",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "dim_model_base": 64,
            "tie_word_embeddings": False,
            "rope_scaling": {
                "type": "longrope",
                "factor": 1.0,
                "long_factor": [1.0] * 16,
                "short_factor": [1.0] * 16,
                "original_max_position_embeddings": 256,
            },
        },
        # The low-rank projections have fewer columns than a group: they stay dense.
        group_size=128,
    ),
]


def write_mlx_checkpoint(
    case: Case,
    folder: Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str = "float32",
) -> None:
    """Lets mlx-lm write the case's checkpoint into `folder`, which holds nothing yet.

    `bits` and `group_size` are those of the case unless given. `dtype` names the dtype
    of the weights before quantization, hence of scales, biases and dense tensors. Only
    in float32 does mlx-lm also compute in float32.
    """
    import mlx.core as mx
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    bits, group_size = bits or case.bits, group_size or case.group_size
    dense = folder / "dense"
    _write_dense_checkpoint(case, dense)
    model, config = drawn_by_mlx(dense) if case.drawn_by_mlx else load_model(dense)
    model.set_dtype(getattr(mx, dtype))
    predicate = None
    if case.recipe:
        predicate = mixed_quant_predicate_builder(case.recipe, model, group_size)
    elif case.formats:
        predicate = _formats_predicate(case, model)
    with redirect_stdout(StringIO()):  # it prints the bits per weight
        model, config = quantize_model(
            model, config, group_size, bits, quant_predicate=predicate
        )
    save_model(folder, model)
    save_config(config | {"torch_dtype": dtype}, folder / "config.json")
    for file in dense.iterdir():
        file.unlink()
    dense.rmdir()


def _formats_predicate(case: Case, model: Any) -> Any:
    """The model's own choices, but for what the case says."""
    own = getattr(model, "quant_predicate", lambda path, module: True)

    def predicate(path: str, module: Any) -> Any:
        for pattern, (bits, group_size) in case.formats.items():
            if re.search(pattern, path):
                return {"bits": bits, "group_size": group_size}
        return own(path, module)

    return predicate


def mlx_logits(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits, float32, that mlx-lm computes from the checkpoint in `folder`.

    Scales and dense tensors of 16 bits are cast to float32 first, which is exact, so
    that the computation is in float32 whatever the file holds.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model, config = load_model(folder)
    model.set_dtype(mx.float32)
    # Only with a cache do Gemma 3n's last layers share the keys and values of others.
    cache = model.make_cache() if config["model_type"] == "gemma3n" else None
    logits = model(mx.array(input_ids.numpy()), cache=cache)
    return torch.from_numpy(np.array(logits.astype(mx.float32)))


def mlx_quantized_modules(folder: Path) -> dict[str, tuple[int, int]]:
    """Bits and group size of each module that mlx-lm loads as quantized."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return {
        name: (module.bits, module.group_size)
        for name, module in model.named_modules()
        if "scales" in module
    }


def transformers_model(case: Case, config: Any, **options: Any) -> Any:
    """A model with random weights, all in float32."""
    import transformers

    cls = getattr(transformers, case.model_class)
    if hasattr(cls, "from_config"):
        model = cls.from_config(config, dtype=torch.float32, **options)
    else:
        config = config.get_text_config()
        model = cls._from_config(config, dtype=torch.float32, **options)
    return model.float()  # Apertus has a few in bfloat16 whatever was asked


def _write_dense_checkpoint(case: Case, folder: Path) -> None:
    model = drawn_by_transformers(case, folder)
    path = folder / "config.json"
    published = json.loads(path.read_text())
    model.save_pretrained(folder)
    # What the table does not name comes from transformers' defaults. Its own spelling
    # of the rotary settings gives way to the published one.
    written = completed(published, json.loads(path.read_text()))
    mlx_type = case.mlx_type or case.model_type
    path.write_text(json.dumps({**written, "model_type": mlx_type}))


def drawn_by_transformers(case: Case, folder: Path, **options: Any) -> Any:
    """The case's model with random weights. The folder, a new one, gets the published
    config.json."""
    from transformers import AutoConfig

    folder.mkdir(parents=True)
    common = COMMON if case.common else {}
    published = {"model_type": case.model_type, **common, **case.config}
    (folder / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers_model(case, config, **options)
        _perturb_(model)
    leave_out_(model, case.towers)
    return model


def leave_out_(model: Any, names: Iterable[str]) -> None:
    """Takes modules out of a model."""
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, None)


def completed(config: Mapping[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and parts of it, with what else transformers wrote."""
    parts = {
        key: completed(value, written[key])
        for key, value in config.items()
        if key.endswith("_config") and isinstance(written.get(key), dict)
    }
    written = {k: v for k, v in written.items() if k != "rope_parameters"}
    return {**written, **config, **parts}


def drawn_by_mlx(folder: Path) -> Any:
    """mlx-lm's model of a config.json, as `load_model` gives it, with random weights."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import _get_classes, load_config

    config = load_config(folder)
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    model.update(
        tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters())
    )
    return model, config


def _perturb_(model: torch.nn.Module) -> None:
    """Moves all that is saved off its initial value: a norm left at one or a bias left
    at zero would hide that it was not loaded."""
    storages = {t.data_ptr(): t for t in model.state_dict().values()}
    for tensor in storages.values():
        tensor.add_(torch.randn_like(tensor), alpha=0.1)
