"""What lies beside the weights of a checkpoint: config, tokenizer, generation, card."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from .. import layout
from .files import CONFIG, fetch, is_repository, read_json

# What goes along from the folder that a model came from.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.tiktoken",
)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as JSON, readable for people."""
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")


def origin_of(model: nn.Module) -> Path | None:
    """The folder that a transformers model came from, if it is on this machine."""
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None)
    if not name:
        return None
    revision = getattr(config, "_commit_hash", None)
    try:
        return fetch(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None


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
        source = read_json(origin / CONFIG) if origin else {}
        kept = {k: v for k, v in source.items() if k not in _RESPELLED}
        config = {**kept, **config}
        for alias, name in getattr(own, "attribute_map", {}).items():
            if name in config:
                config.setdefault(alias, config[name])
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
    for key in ("_name_or_path", "quantization", "quantization_config"):
        config.pop(key, None)
    _spell_as_version_4(config)
    if formats:
        quantization = _quantization(formats)
        config["quantization"] = config["quantization_config"] = quantization
    return dict(sorted(config.items()))


# Later kinds have no old spelling, and transformers does not take one for them.
_ROPE_TYPES_OF_VERSION_4 = ("linear", "dynamic", "yarn", "longrope", "llama3")

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
    kind = rope.get("rope_type")
    if kind in _ROPE_TYPES_OF_VERSION_4:
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        config.setdefault("rope_scaling", {**scaling, "type": kind})


def write_companions(model: nn.Module, folder: Path, tokenizer: Any) -> bool:
    """Write generation configuration, tokenizer and model card.

    `tokenizer` is one of transformers, a folder or repository that has one, or None.
    Returns whether there is a tokenizer now.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Not save_pretrained, which refuses settings that contradict each other, as those
        # of many published models do.
        generation.to_json_file(folder / "generation_config.json")
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif tokenizer:
        source = fetch(tokenizer)
        for pattern in _TOKENIZER_FILES:
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    card = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation" if generation is not None else None,
        tags=["mlx", "affine-tensor"],
        base_model=_repository(model),
    )
    ModelCard(f"---\n{card.to_yaml()}\n---\n").save(folder / "README.md")
    return any((folder / name).exists() for name in _TOKENIZER_FILES[:3])


def _repository(model: nn.Module) -> str | None:
    """The Hub repository that a transformers model came from, if any."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    return name if is_repository(name) and not Path(name).exists() else None
