"""What is special about each architecture's MLX checkpoints.

A model type that is not here needs nothing but the general rules of `names.py`. Read
each entry as: transformers' name, and what MLX calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .forms import (
    AbsorbedKV,
    ChannelsLast,
    Form,
    Padded,
    Part,
    PlusOne,
    Reshaped,
    ResidualGate,
    RowOrder,
    Rows,
    Scaled,
    Stored,
    Transposed,
    neighbours,
)


@dataclass(frozen=True)
class Rule:
    """A parameter whose renamed name matches `pattern` as a whole has this form.

    Names in the form may refer to groups of the pattern (``\\1``); a name with ``.*.``
    stands for one tensor for each expert.
    """

    pattern: str
    form: Form


@dataclass(frozen=True)
class Family:
    """What is special about the model types of one architecture.

    renames: pairs (pattern, replacement) of `re.sub`, applied one after the other to
        the name of each parameter or buffer, with MLX's prefix.
    rules: tried before the general ones, on the renamed name.
    absent: patterns (`re.search`) of the model's own names that MLX has no tensor for;
        zeros are right for them. They are not saved.
    ignored: patterns (`re.match`) of stored names that the model has no place for.
    unread: tensors that mlx-lm's model has and does not use, with their shapes; they are
        saved as zeros.
    told_by: pattern (`re.search`) of convolutions by whose layout mlx-lm tells whether
        the values of a file are MLX's own. A file in torch's layout is refused.
    prefixes: pairs of the model's own prefix and MLX's, tried before the general ones;
        the first that matches counts.
    alone: the same of a text model alone, which mlx-lm writes, where it has other ones
        than mlx-vlm beside the tower.
    experts: where MLX has ``(.*).experts`` if not in ``\\1.switch_mlp``.
    """

    renames: Sequence[tuple[str, str]] = ()
    rules: Sequence[Rule] = ()
    absent: Sequence[str] = ()
    ignored: Sequence[str] = ()
    unread: Mapping[str, Sequence[int]] = field(default_factory=dict)
    told_by: str = ""
    prefixes: Sequence[tuple[str, str]] = ()
    alone: Sequence[tuple[str, str]] = ()
    experts: str = ""


def families_of(config: Any) -> list[Family]:
    """The families of a model with this configuration, most special first.

    None for a configuration that is not one of transformers.
    """
    if not hasattr(config, "get_text_config"):
        return []
    found: dict[str, Family] = {}
    for part in (config, _text_part(config)):
        model_type = _model_type(part)
        entry = FAMILIES.get(model_type)
        if entry is not None and model_type not in found:
            found[model_type] = entry(part) if callable(entry) else entry
    return list(found.values())


def _text_part(config: Any) -> Any:
    """The configuration of the text, or the whole one where there is none, or several."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def _model_type(config: Any) -> str:
    """That of its class: a configuration that was read has what stood in the file, which
    may be MLX's name."""
    own = getattr(type(config), "model_type", None)
    return own or getattr(config, "model_type", None) or ""


def is_text_part(config: Any) -> bool:
    """Whether mlx-lm has the model of this configuration only as the text of another,
    in which it lies in `language_model`."""
    model_type = _model_type(config)
    if model_type == "llama4_text":  # as a type of its own it has no experts
        return bool(config.moe_layers)
    own = ("gemma3_text", "gemma4_text")
    return model_type.endswith("_text") and model_type not in own


# ---- families -------------------------------------------------------------------

# ---- other

_GPT = Family(renames=[(r"^transformer\.", "model.")])

_GPT_NEOX = Family(
    renames=[
        (r"^gpt_neox\.layers\.", "model.h."),
        (r"^gpt_neox\.", "model."),
        (r"^(embed_out|lm_head)\.", "model.embed_out."),
    ]
)

_NANOCHAT = Family(
    renames=[
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.", "transformer.h."),
        (r"\.self_attn\.([qkv])_proj\.", r".attn.c_\1."),
        (r"\.self_attn\.o_proj\.", ".attn.c_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ]
)

# ---- experts

_MIXTRAL = Family(renames=[(r"\.mlp\.", ".block_sparse_moe.")])

_PHIMOE = Family(renames=[(r"\.mlp\.router\.", ".mlp.gate."), *_MIXTRAL.renames])

_GRANITE_MOE = Family(
    renames=[(r"\.block_sparse_moe\.router\.", ".block_sparse_moe.router.layer.")]
)


def _granite_hybrid(config: Any) -> Family:
    if config.num_local_experts:
        return _GRANITE_MOE
    # Without experts mlx-lm has the shared ones as an ordinary MLP.
    gate, up = (rf"\1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    return Family(
        renames=[(r"\.shared_mlp\.output_linear\.", ".mlp.down_proj.")],
        rules=[Rule(r"(.*)\.shared_mlp\.input_linear\.weight", Rows(gate, up))],
    )


# mlx-lm has no such bias: it drops it where the original has one. It skips the heads
# that predict more tokens.
_ERNIE_MOE = Family(
    absent=[r"\.moe_statics\.e_score_correction_bias$"],
    ignored=[r"(.*\.)?mtp_(block|linear_proj|hidden_norm|emb_norm)\."],
)


def _glm4_moe(config: Any) -> Family:
    """The layer after the last is a head that predicts one more token."""
    return Family(ignored=[rf"model\.layers\.{config.num_hidden_layers}\."])


def _dbrx(config: Any) -> Family:
    """One matrix for all experts here, expert under expert; `w2` is transposed."""

    def experts(name: str) -> list[str]:
        count = config.ffn_config.moe_num_experts
        return [rf"\1.experts.{number}.{name}.weight" for number in range(count)]

    pattern = r"(.*)\.experts\.mlp\."
    return Family(
        rules=[
            Rule(rf"{pattern}w1", Rows(*experts("w1"))),
            Rule(rf"{pattern}v1", Rows(*experts("v1"))),
            Rule(rf"{pattern}w2", Rows(*map(Transposed, experts("w2")))),
        ]
    )


# ---- recurrent

_NEMOTRON_H = Family(
    renames=[(r"^model\.", "backbone.")],
    rules=[
        Rule(r"(.*)\.experts\.up_proj", Stored(r"\1.switch_mlp.fc1.weight")),
        Rule(r"(.*)\.experts\.down_proj", Stored(r"\1.switch_mlp.fc2.weight")),
    ],
)

_LFM2_MOE = Family(
    renames=[
        (r"\.feed_forward\.w1\.", ".feed_forward.gate_proj."),
        (r"\.feed_forward\.w2\.", ".feed_forward.down_proj."),
        (r"\.feed_forward\.w3\.", ".feed_forward.up_proj."),
    ]
)

_APERTUS = Family(
    rules=[Rule(r"(.*\.act_fn\.alpha_[pn])", Reshaped(r"\1", stored=(), own=(1,)))]
)

# All norms but the gated one of linear attention.
_QWEN3_NEXT = Family(
    rules=[
        Rule(
            r"(.*\.(?:input_layernorm|post_attention_layernorm|[qk]_norm)\.weight"
            r"|(?:.*model\.)?norm\.weight)",
            PlusOne(r"\1"),
        )
    ],
    told_by=r"\.conv1d\.weight$",
)


def _olmo_hybrid(config: Any) -> Family:
    """One convolution here for queries, keys and values."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    parts = [ChannelsLast(rf"\1.{name}_conv1d.weight") for name in "qkv"]
    form = Rows(*parts, sizes=[keys, keys, values], axis=0)
    return Family(rules=[Rule(r"(.*)\.conv1d\.weight", form)])


def _falcon_h1(config: Any) -> Family:
    """MLX has the multipliers in the weights.

    Not `key_multiplier`: mlx-lm asks for "key_proj", which no weight is called, and its
    own keys are wrong where it is not one. Not biases either.
    """
    inner = config.mamba_d_ssm or config.mamba_expand * config.hidden_size
    state = config.mamba_n_groups * config.mamba_d_state
    sizes = (inner, inner, state, state, config.mamba_n_heads)
    rows = [
        config.ssm_in_multiplier * multiplier
        for multiplier, size in zip(config.ssm_multipliers, sizes, strict=True)
        for _ in range(size)
    ]
    gate, down = config.mlp_multipliers
    factors = {
        "embed_tokens": config.embedding_multiplier,
        "lm_head": config.lm_head_multiplier,
        "[qk]_proj": config.attention_in_multiplier,
        "o_proj": config.attention_out_multiplier,
        "in_proj": rows,
        "out_proj": config.ssm_out_multiplier,
        "gate_proj": gate,
        "down_proj": down,
    }
    return Family(
        rules=[
            Rule(rf"((?:.*\.)?{module}\.weight)", Scaled(r"\1", factor))
            for module, factor in factors.items()
            if factor != 1
        ],
        told_by=r"\.conv1d\.weight$",
    )


def _gemma3n(config: Any) -> Family:
    """The last layers use keys and values of others, and MLX has their own as well."""
    count, heads = config.num_hidden_layers, config.num_key_value_heads
    first = count - config.num_kv_shared_layers
    unread: dict[str, Sequence[int]] = {}
    for number in range(first, count):
        attention = f"model.language_model.layers.{number}.self_attn."
        for name in ("k_proj", "v_proj"):
            shape = (heads * config.head_dim, config.hidden_size)
            unread[f"{attention}{name}.weight"] = shape
        unread[f"{attention}k_norm.weight"] = (config.head_dim,)
    shared = "|".join(map(str, range(first, count))) or "none"
    own = "model.language_model."
    return Family(
        alone=[(own, own), ("model.", own)],
        ignored=[rf".*\.layers\.({shared})\.self_attn\.[kv]_(proj|norm)\."],
        unread=unread,
    )


# ---- seeing

# mlx-vlm has the tower one level deeper.
_NESTED_TOWER = Family(prefixes=[("model.vision_tower.", "vision_tower.vision_model.")])

_GEMMA4 = Family(experts=r"\1.experts.switch_glu")

_GEMMA4_UNIFIED = Family(
    prefixes=[
        ("model.embed_vision.multimodal_embedder.", "embed_vision."),
        ("model.embed_vision.", "vision_embedder."),
    ]
)

_MUSE_GLIMMER = Family(
    alone=[("model.language_model.", "model."), ("lm_head.", "lm_head.")]
)


def _fused(
    place: str, module: str, parts: Sequence[tuple[str, int, int]], end: str
) -> list[Rule]:
    """Projections of the module that `place` matches, which MLX may have in one.

    Each part has rows, and heads of a width if it is rotated: those are in another
    order in MLX. They are saved apart, as mlx-lm reads them too. `end` is "weight" or
    "bias".
    """
    rules, start, rows = [], 0, sum(rows for _, rows, _ in parts)
    for name, count, width in parts:
        form: Form = Part(rf"\1.{module}.{end}", start, start + count, rows)
        if width:
            form = RowOrder(form, neighbours(width))
        pattern = rf"({place})\.{name}\.{end}"
        rules += [Rule(pattern, Stored(rf"\1.{name}.{end}")), Rule(pattern, form)]
        start += count
    return rules


def _muse_spark_text(config: Any) -> Family:
    width, temperature = config.head_dim, config.residual_gate_temperature
    queries = config.num_attention_heads * width
    keys = config.num_key_value_heads * width
    parts = [
        ("q_proj", queries, width),
        ("k_proj", keys, width),
        ("v_proj", keys, 0),
        ("gate_proj", queries, 0),
    ]
    gates = {"attention": "add_attn", "feedforward": "add_ffn"}
    norms = "|".join(
        (
            "input_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "pre_expert_norm",
            "post_expert_norm",
        )
    )
    return Family(
        experts=r"\1.experts",
        rules=[
            *_fused(r".*\.self_attn", "qkvg_proj", parts, "weight"),
            *(
                Rule(
                    rf"(.*)\.post_{name}_residual_gate\.gate",
                    ResidualGate(rf"\1.{mlx}_alpha", rf"\1.{mlx}_beta", temperature),
                )
                for name, mlx in gates.items()
            ),
            Rule(rf"(.*\.(?:{norms})\.weight)", PlusOne(r"\1")),
        ],
    )


def _fused_tower(
    config: Any, place: str, module: str, rotated: bool = True
) -> list[Rule]:
    """Queries, keys and values of a tower in one `module`; with biases."""
    width = config.hidden_size
    head = width // config.num_attention_heads if rotated else 0
    parts = [("q_proj", width, head), ("k_proj", width, head), ("v_proj", width, 0)]
    weights, biases = (_fused(place, module, parts, e) for e in ("weight", "bias"))
    return weights + biases


def _muse_spark(config: Any) -> Family:
    place = r"(?:model\.)?vision_tower\..*\.attn"
    return Family(
        # mlx-lm has transformers' own prefixes.
        prefixes=[("model.", "model."), ("lm_head.", "lm_head.")],
        rules=_fused_tower(config.vision_config, place, "qkv_proj"),
    )


def _kimi_k25(config: Any) -> Family:
    block = r"^(vision_tower\.blocks\.\d+\."
    return Family(
        prefixes=[
            ("model.mm_projector.in_proj.", "mm_projector.proj.0."),
            ("model.mm_projector.out_proj.", "mm_projector.proj.2."),
        ],
        renames=[
            (r"^vision_tower\.layers\.", "vision_tower.blocks."),
            (rf"{block}norm)1\.", r"\g<1>0."),
            (rf"{block}norm)2\.", r"\g<1>1."),
            (rf"{block}mlp\.fc)1\.", r"\g<1>0."),
            (rf"{block}mlp\.fc)2\.", r"\g<1>1."),
            (rf"{block}attn\.)proj\.", r"\1wo."),
            (r"\.pos_emb\.position_embeddings$", ".pos_emb.weight"),
        ],
        rules=_fused_tower(config.vision_config, r"vision_tower\..*\.attn", "wqkv"),
    )


def _paddleocr_vl(config: Any) -> Family:
    place = r"visual\..*\.self_attn"
    return Family(
        prefixes=[
            ("model.visual.vision_model.encoder.", "visual."),
            ("model.visual.vision_model.", "visual."),
            ("model.projector.", "visual.projector."),
        ],
        rules=_fused_tower(config.vision_config, place, "qkv", rotated=False),
    )


_HUNYUAN_VL = Family(
    renames=[
        (r"^(vision_tower\..*)\.layer_norm1\.", r"\1.input_layernorm."),
        (r"^(vision_tower\..*)\.layer_norm2\.", r"\1.post_attention_layernorm."),
        (r"^(vision_tower\..*\.mlp)\.fc1\.", r"\1.dense_h_to_4h."),
        (r"^(vision_tower\..*\.mlp)\.fc2\.", r"\1.dense_4h_to_h."),
        (r"\.patch_merger\.proj_conv\.", ".perceive.proj.0."),
        (r"\.patch_merger\.proj_out\.", ".perceive.proj.2."),
        (r"\.patch_merger\.", ".perceive."),
    ]
)

_MINIMAX_M3_VL = Family(
    prefixes=[
        (
            "model.vision_tower.embeddings.proj.",
            "vision_tower.vision_model.embeddings.patch_embedding.",
        ),
        ("model.vision_tower.layers.", "vision_tower.vision_model.encoder.layers."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.merge_", "patch_merge_mlp."),
    ],
    # Of mlx-vlm's convolutions the only one that is as torch has it.
    rules=[Rule(r"(.*\.embeddings\.patch_embedding\.weight)", Stored(r"\1"))],
)


_LLAMA4 = Family(
    rules=[
        Rule(
            r"(.*\.experts)\.gate_up_proj",
            Transposed(Rows(r"\1.gate_proj.weight", r"\1.up_proj.weight")),
        ),
        Rule(r"(.*\.experts)\.down_proj", Transposed(r"\1.down_proj.weight")),
        # Of the text model alone, without the prefix of the one that sees.
        Rule(r"lm_head\.weight", Stored("output.weight")),
    ]
)


# ---- latent

_MTP = "num_nextn_predict_layers"


def _latent(config: Any) -> Family:
    """Multi-head latent attention with `kv_b_proj` in two, as mlx-lm has it."""
    form = AbsorbedKV(
        r"\1.embed_q.weight",
        r"\1.unembed_out.weight",
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
    )
    # Further layers are heads that predict more tokens; mlx-lm skips them.
    first, count = config.num_hidden_layers, getattr(config, _MTP, 0) or 0
    layers = "|".join(map(str, range(first, first + count))) or "none"
    return Family(
        rules=[Rule(r"(.*)\.kv_b_proj\.weight", form)],
        ignored=[rf"(.*\.)?layers\.({layers})\."],
    )


def _convolutions(q: str, k: str, v: str) -> Rule:
    """One convolution here for queries, keys and values."""
    return Rule(r"(.*)\.conv1d\.weight", ChannelsLast(Rows(q, k, v, axis=0)))


def _kimi_linear(config: Any) -> Family:
    return Family(
        renames=[
            (r"\.self_attn\.forget_gate\.", ".self_attn."),
            (r"\.gate\.e_score_correction_bias$", ".e_score_correction_bias"),
        ],
        rules=[
            *_latent(config).rules,
            _convolutions(*(rf"\1.{part}_conv.conv.weight" for part in "qkv")),
        ],
    )


def _bailing(config: Any) -> Family:
    """mlx-lm's bailing_moe_v3. Only its full attention calls the last layer `dense`."""
    full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
    layers = "|".join(map(str, full))
    return Family(
        renames=[
            (r"\.embed_tokens\.", ".word_embeddings."),
            (r"\.self_attn\.(forget_gate\.)?", ".attention."),
            (rf"\.({layers})\.attention\.o_proj\.", r".\1.attention.dense."),
            (r"\.gate\.e_score_correction_bias$", ".gate.expert_bias"),
        ],
        rules=[
            *_latent(config).rules,
            _convolutions(*(rf"\1.{part}_conv1d.weight" for part in "qkv")),
        ],
        ignored=_latent(config).ignored,
    )


def _longcat(config: Any) -> Family:
    """The experts that are the identity have weights here, and nothing uses them."""
    gate, up = (rf"\1.switch_mlp.{name}_proj.weight" for name in ("gate", "up"))
    form = Padded(Rows(gate, up), config.zero_expert_num or 0)
    return Family(
        rules=[*_latent(config).rules, Rule(r"(.*)\.experts\.gate_up_proj", form)]
    )


_LAGUNA = Family(
    renames=[
        (r"\.mlp\.gate\.weight$", ".mlp.gate.proj.weight"),
        (r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
    ]
)

_MIMO_V2 = Family(renames=[(r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias")])

_MINIMAX_M3 = Family(
    renames=[
        (r"\.mlp\.(experts|gate|shared_experts)\.", r".block_sparse_moe.\1."),
        (r"\.gate\.e_score_correction_bias$", ".e_score_correction_bias"),
        (r"\.self_attn\.indexer\.([qk])_", r".self_attn.index_\1_"),
    ],
    rules=[
        Rule(
            r"(.*\.(?:mlp|shared_experts))\.gate_up_proj\.weight",
            Rows(r"\1.gate_proj.weight", r"\1.up_proj.weight"),
        )
    ],
)


# mlx-lm's names of the model types that transformers calls otherwise.
MLX_TYPES = {
    "hunyuan_v1_moe": "hunyuan",
    "lfm2_vl": "lfm2-vl",
    "youtu": "youtu_llm",
}

# The other way: types that transformers knows by another name, if at all.
TRANSFORMERS_TYPES = {mlx: own for own, mlx in MLX_TYPES.items()} | {
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "pixtral": "llava",
}

FAMILIES: dict[str, Family | Callable[[Any], Family]] = {
    # ---- latent
    "bailing_hybrid": _bailing,
    "deepseek_v3": _latent,
    "deepseek_v32": _latent,
    "glm4_moe_lite": _latent,
    "glm_moe_dsa": _latent,
    "kimi_linear": _kimi_linear,
    "laguna": _LAGUNA,
    "longcat_flash": _longcat,
    "mimo_v2_flash": _MIMO_V2,
    "minimax_m3_vl_text": _MINIMAX_M3,
    "mistral4": _latent,
    # ---- seeing
    "gemma4_text": _GEMMA4,
    "gemma4_unified": _GEMMA4_UNIFIED,
    "llama4_text": _LLAMA4,
    "hunyuan_vl": _HUNYUAN_VL,
    "kimi_k25": _kimi_k25,
    "minimax_m3_vl": _MINIMAX_M3_VL,
    "paddleocr_vl": _paddleocr_vl,
    "mllama": Family(prefixes=[("model.vision_model.", "vision_tower.")]),
    "muse_glimmer": _MUSE_GLIMMER,
    "muse_spark": _muse_spark,
    "muse_spark_text": _muse_spark_text,
    **dict.fromkeys(
        (
            "aya_vision",
            "cohere2_vision",
            "gemma3",
            "granite4_vision",
            "llava",
            "llava_next",
            "llava_onevision",
            "mistral3",
            "paligemma",
        ),
        _NESTED_TOWER,
    ),
    # ---- recurrent
    "apertus": _APERTUS,
    "falcon_h1": _falcon_h1,
    "gemma3n_text": _gemma3n,
    "lfm2_moe": _LFM2_MOE,
    "nemotron_h": _NEMOTRON_H,
    "olmo_hybrid": _olmo_hybrid,
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_next": _QWEN3_NEXT,
    # ---- experts
    "afmoe": Family(experts=r"\1.experts"),
    "dbrx": _dbrx,
    "dots1": Family(experts=r"\1.experts"),
    "ernie4_5_moe": _ERNIE_MOE,
    "glm4_moe": _glm4_moe,
    "granitemoe": _GRANITE_MOE,
    "granitemoehybrid": _granite_hybrid,
    "minimax_m2": _MIXTRAL,
    "mixtral": _MIXTRAL,
    "phimoe": _PHIMOE,
    # ---- other
    "gpt2": _GPT,
    "gpt_neox": _GPT_NEOX,
    "gpt_oss": Family(experts=r"\1.experts"),
    "gptj": _GPT,
    "nanochat": _NANOCHAT,
}
