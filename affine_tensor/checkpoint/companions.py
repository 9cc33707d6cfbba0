"""What lies beside the weights of a checkpoint: tokenizer, generation, card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import nn

from .files import fetch, fetch_companions, is_repository

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
        source = fetch_companions(tokenizer)
        for pattern in _TOKENIZER_FILES:
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    card = huggingface_hub.ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation" if generation is not None else None,
        tags=["mlx", "affine-tensor"],
        base_model=_repository(model),
    )
    text = f"---\n{card.to_yaml()}\n---\n"
    huggingface_hub.ModelCard(text).save(folder / "README.md")
    return has_tokenizer(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES[:3])


def _repository(model: nn.Module) -> str | None:
    """The Hub repository that a transformers model came from, if any."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    return name if is_repository(name) and not Path(name).exists() else None
