"""How well a language model predicts texts: `bits_per_byte`, `perplexity`.

Both come from the same sum, minus the logarithm of the probability of each token of the
texts given those before it (see `score`). Bits per byte does not depend on how a
tokenizer cuts a text, so that it compares models with different ones; perplexity does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

# Longer windows are asked for by name: attention over all positions takes long.
CONTEXT = 2048
# Logits of a batch, at most; a window of its own is never split.
_LOGITS = 1 << 28


@dataclass(frozen=True)
class Score:
    """What `score` has counted over all texts.

    nats: minus the natural logarithm of the probability of all tokens together
    tokens: how many were counted: all of the texts', each once
    bytes: of the texts in UTF-8
    unknown: tokens that stand for what the tokenizer has no token for. Where there are
        any, the model was not asked for all of the text, and the figures flatter it.
    """

    nats: float
    tokens: int
    bytes: int
    unknown: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); infinite where that is above the largest float."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf


@torch.inference_mode()
def score(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Score:
    """Have a causal language model of transformers' predict texts.

    Each text is coded on its own: a document start (the tokenizer's `bos_token_id`, else
    its `eos_token_id`), then its tokens, without special ones that a tokenizer adds.
    Windows of `context` inputs move along by `stride`; each token of the text is counted
    once, in the first window that predicts it, the first token (after the document start)
    included. From the second window on, a counted token has at least
    ``context - stride + 1`` tokens before it.

    Args:
        model: called with ``input_ids`` ``[B, T]`` alone, on its device and in its
            dtype, in evaluation mode. Its logits are taken in float32, and the
            logarithms summed in float64.
        tokenizer: of the model.
        texts: nothing is done to them.
        context: inputs of a window: by default 2048, or the model's
            `max_position_embeddings` where that is less.
        stride: from 1 to `context`, by default three quarters of it. A smaller one gives
            tokens more of the text before them, and takes longer.
        batch_size: windows at once, at most: fewer where logits would be more than 2**28.
        progress: show a bar on stderr, if it takes a while.

    Raises ValueError for texts that are empty, settings out of range, tokens that the
    model does not have, and logits that are not finite; TypeError for a single string.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a list of strings: put a single one into a list")
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context, stride = _settings(config, context, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    windows: list[tuple[list[int], int]] = []
    tokens = size = unknown = 0
    for text in texts:
        ids = [_start(tokenizer), *tokenizer.encode(text, add_special_tokens=False)]
        windows += _windows(ids, context, stride)
        tokens += len(ids) - 1
        size += len(text.encode())
        unknown += _unknown(tokenizer, ids[1:])
    if not tokens:
        raise ValueError("there is nothing to predict: the texts are empty")
    vocabulary = getattr(config, "vocab_size", None)
    _check_ids(windows, vocabulary)
    windows.sort(key=lambda window: len(window[0]))  # like lengths share a batch
    nats = 0.0
    with (
        _evaluating(model),
        tqdm(
            total=len(windows),
            unit="window",
            delay=2,
            leave=False,
            disable=not progress,
        ) as bar,
    ):
        while windows:
            longest = len(windows[-1][0])  # the longest first: it shows what fits
            count = min(batch_size, max(1, _LOGITS // (longest * (vocabulary or 1))))
            batch = windows[-count:]
            del windows[-count:]
            nats += _nats(model, batch)
            bar.update(len(batch))
    return Score(nats, tokens, size, unknown)


def bits_per_byte(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], **settings: Any
) -> float:
    """Bits that a model needs for texts, over their bytes in UTF-8.

    All tokens count, and the bytes of all texts; see `score`, whose keywords it takes.
    """
    return score(model, tokenizer, texts, **settings).bits_per_byte


def perplexity(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], **settings: Any
) -> float:
    """The exponential of the mean loss of a token of the texts, in nats.

    The same tokens in the same windows as for `bits_per_byte`; see `score`, whose
    keywords it takes. Figures from other windows, or without the first token of a text,
    differ.
    """
    return score(model, tokenizer, texts, **settings).perplexity


def _settings(config: Any, context: int | None, stride: int | None) -> tuple[int, int]:
    longest = getattr(config, "max_position_embeddings", None)
    if context is None:
        context = min(CONTEXT, longest or CONTEXT)
    elif context < 1 or (longest and context > longest):
        upper = f" to {longest}, the positions that the model has" if longest else " on"
        raise ValueError(f"context is {context}; allowed is 1{upper}")
    if stride is None:
        stride = max(1, 3 * context // 4)
    elif not 1 <= stride <= context:
        raise ValueError(
            f"stride is {stride}; allowed is 1 to {context}, the context: with more, "
            "tokens would be left out"
        )
    return context, stride


def _start(tokenizer: Any) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise ValueError(
        "the tokenizer has neither a bos_token nor an eos_token, which would stand before "
        "a text. Set one that the model knows: tokenizer.bos_token = ..., or bos_token in "
        "tokenizer_config.json"
    )


def _unknown(tokenizer: Any, ids: list[int]) -> int:
    own = getattr(tokenizer, "unk_token_id", None)
    # Some tokenizers name their end of text so, and have a token for everything.
    ends = (
        getattr(tokenizer, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    return 0 if own is None or own in ends else ids.count(own)


def _check_ids(windows: list[tuple[list[int], int]], vocabulary: int | None) -> None:
    most = max(max(ids) for ids, _ in windows)
    if vocabulary is not None and most >= vocabulary:
        raise ValueError(
            f"the texts have token {most}, and the model's vocabulary ends at "
            f"{vocabulary - 1}: the tokenizer is another model's"
        )


def _windows(
    ids: list[int], context: int, stride: int
) -> Iterator[tuple[list[int], int]]:
    """Pieces of at most context + 1 ids (inputs and the last target), each with the
    number of its leading targets that an earlier piece has counted."""
    done = 0  # the last id that is a counted target
    for start in range(0, len(ids) - 1, stride):
        end = min(start + context, len(ids) - 1)
        yield ids[start : end + 1], done - start
        done = end
        if end == len(ids) - 1:
            return


def _nats(model: nn.Module, windows: list[tuple[list[int], int]]) -> float:
    length = max(len(ids) for ids, _ in windows) - 1
    inputs = torch.zeros(len(windows), length, dtype=torch.long)
    targets = torch.full_like(inputs, -100)
    for row, (ids, skipped) in enumerate(windows):
        # Padding stands on the right, where no counted token sees it.
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, skipped : len(ids) - 1] = torch.tensor(ids[skipped + 1 :])
    device: Any = model.device
    logits = model(input_ids=inputs.to(device), use_cache=False).logits
    total = sum(
        _sum(own, wanted.to(own.device))
        for own, wanted in zip(logits, targets, strict=True)
    )
    if not math.isfinite(total):
        raise ValueError(
            f"the loss of {len(windows)} windows is {total}: the model's logits are not "
            "finite. Look for broken weights, or compute in another dtype: float16 "
            "overflows in some models"
        )
    return total


def _sum(logits: Tensor, targets: Tensor) -> float:
    """Of a row at a time: all in float32 would double the memory."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return float(losses.cpu().double().sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each module's own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
