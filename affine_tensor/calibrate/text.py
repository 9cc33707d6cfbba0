"""Calibration text as batches of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
Data = Sequence[str] | Sequence[Tensor] | Sequence[Mapping[str, Any]]

_LONGEST = 2048


def make_batches(
    model: nn.Module,
    data: Data,
    tokenizer: Any = None,
    *,
    length: int | None = None,
    batch_size: int = 4,
) -> list[Batch]:
    """What the model is called with, on its device.

    Texts are joined, the tokenizer's end of text before each, and cut into windows of
    `length` tokens (default: 2048, or the longest that the model takes); a rest is left
    out, unless there is nothing else. Tensors of ids ``[B, T]`` count as
    ``input_ids``; mappings are the model's own arguments.
    """
    if isinstance(data, (str, Tensor, Mapping)) or not isinstance(data, Sequence):
        raise TypeError(
            f"the calibration data is a {type(data).__name__}; a list of texts, of "
            "token tensors or of mappings is needed: put it into a list"
        )
    if not data:
        raise ValueError("there is no calibration data: the list is empty")
    batches: list[Batch]
    if all(isinstance(text, str) for text in data):
        batches = _of_texts(model, list(data), tokenizer, length, batch_size)
    elif all(isinstance(item, Tensor) for item in data):
        batches = [{"input_ids": item} for item in data]
    elif all(isinstance(item, Mapping) for item in data):
        batches = [dict(item) for item in data if isinstance(item, Mapping)]
    else:
        kinds = sorted({type(item).__name__ for item in data})
        raise TypeError(
            f"the calibration data mixes {', '.join(kinds)}; give texts, or token "
            "tensors, or mappings"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return [
        {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        for batch in batches
    ]


def _of_texts(
    model: nn.Module,
    texts: list[Any],
    tokenizer: Any,
    length: int | None,
    batch_size: int,
) -> list[Batch]:
    if tokenizer is None:
        raise ValueError("texts need a tokenizer: pass tokenizer=, or tokens")
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for text in texts:
        own = list(tokenizer(text)["input_ids"])
        ids += own if end is None else [end, *own]
    if length is None:
        config = getattr(model, "config", None)
        longest = getattr(config, "max_position_embeddings", None) or _LONGEST
        length = min(_LONGEST, longest)
    if length < 2:
        raise ValueError(f"length is {length}; windows of 2 tokens or more are needed")
    length = min(length, len(ids))
    count = len(ids) // length if length else 0
    if not count:
        raise ValueError("the calibration texts have no tokens; give more text")
    windows = torch.tensor(ids[: count * length]).view(count, length)
    return [{"input_ids": part} for part in windows.split(batch_size)]


def count_tokens(batches: Sequence[Batch]) -> int:
    """Tokens in all batches: those of the mask where one is given."""
    total = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            total += int(mask.sum())
            continue
        first = next((v for v in batch.values() if isinstance(v, Tensor)), None)
        if first is not None:
            whole = first.shape[:-1] if first.is_floating_point() else first.shape
            total += int(torch.Size(whole).numel())
    return total
