"""Tokens a second: a checkpoint in the stock transformers model, and in mlx-lm."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from metal_contestants import Format

from affine_tensor import (
    AffineConfig,
    from_pretrained,
    quantize_,
    save_checkpoint,
    warmup,
)
from affine_tensor.kernels import machine

PROMPT = 16


def decode(
    model: str | None, kind: str, format: Format, *, tiny: bool
) -> dict[str, float]:
    """Tokens a second of each, greedily, one sequence, without the prompt."""
    tokens, rounds = (4, 1) if tiny else (64, 3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(model) if model else Path(scratch)
        if model is None:
            write_llama(folder, format, tiny)
        makers = {"ours, transformers' generate": _ours, "mlx-lm": _mlx_lm}
        runs = {name: make(folder, kind) for name, make in makers.items()}
        times: dict[str, list[float]] = {name: [] for name, run in runs.items() if run}
        for i in range(rounds + 1):
            for name in times:
                run = runs[name]
                assert run is not None
                # The prompt takes as long in both.
                taken = _seconds(run, 2 * tokens) - _seconds(run, tokens)
                if i:
                    times[name].append(tokens / max(taken, 1e-9))
    return {name: statistics.median(speeds) for name, speeds in times.items()}


def write_llama(folder: Path, format: Format, tiny: bool) -> None:
    """A random Llama as an MLX checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = (64, 1) if tiny else (2048, 8)
    # What MLX reads: its groups are 32, 64 or 128.
    group_size = format.group_size if format.group_size in (32, 64, 128) else 64
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64 if tiny else 32000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32 if tiny else width // 64,
        num_key_value_heads=2 if tiny else 8,
        dtype=format.dtype,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(format.dtype)
    quantize_(model, AffineConfig(format.bits, group_size), progress=False)
    save_checkpoint(model, folder, progress=False)


Run = Callable[[int], Any]


def _seconds(run: Run, tokens: int) -> float:
    start = time.perf_counter()
    run(tokens)
    return time.perf_counter() - start


def _ours(folder: Path, kind: str) -> Run:
    device = machine.tensor_device(kind)
    model = from_pretrained(folder, device_map=device)
    warmup(model, rows=(1, PROMPT))
    ids = torch.arange(1, PROMPT + 1, device=device).view(1, PROMPT)

    def run(tokens: int) -> None:
        model.generate(
            ids,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        machine.synchronize(kind)

    return run


def _mlx_lm(folder: Path, _: str) -> Run | None:
    try:
        import mlx.core as mx
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model
    except ImportError:
        return None
    model, _config = load_model(folder)
    prompt = mx.arange(1, PROMPT + 1)

    def run(tokens: int) -> None:
        for token, _ in generate_step(prompt, model, max_tokens=tokens):
            assert isinstance(token, int | mx.array)

    return run
