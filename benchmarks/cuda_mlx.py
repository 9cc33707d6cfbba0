"""mlx-lm with the checkpoint of `cuda_models.py`, on a GPU where MLX knows one."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import cuda_llama
import torch
from cpu_contestants import Missing
from cuda_runs import TRIAL
from peers_files import Size


def measure(
    folder: Path, size: Size, kind: str, options: argparse.Namespace
) -> dict[str, Any]:
    """As the other contestants are measured, with its own loop; "logits" to check."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError as error:
        raise Missing("not installed") from error
    if kind == "cuda" and mx.default_device() == mx.Device(mx.cpu):
        raise Missing("the MLX that is installed knows no GPU")
    device = mx.Device(mx.gpu if kind == "cuda" else mx.cpu)
    mx.set_default_device(device)
    start = time.perf_counter()
    model, _config = load_model(folder)
    mx.eval(model.parameters())
    taken = time.perf_counter() - start
    prompt, new = TRIAL
    ids = cuda_llama.sequence(size, 0, prompt + new - 1)
    logits = model(mx.array([ids]))[:, -new:].astype(mx.float32)
    speeds, peaks = {}, {}
    for what, length, count in _measurements(size, options):
        mx.reset_peak_memory()
        times = [_times(model, size, length, count) for _ in range(options.rounds + 1)]
        own = [
            length / first if count == 1 else (count - 1) / rest
            for first, rest in times[1:]  # the first is to warm up
        ]
        peaks[what] = mx.get_peak_memory()
        speeds[what] = {
            "median": statistics.median(own),
            "least": min(own),
            "most": max(own),
            "values": own,
        }
    return {
        "name": "mlx-lm",
        "label": "mlx-lm",
        "logits": torch.tensor(logits.tolist()),
        "load_seconds": taken,
        "load_peak_bytes": None,
        "held_bytes": mx.get_active_memory(),
        "speeds": speeds,
        "peaks": peaks,
        "notes": [],
    }


def _measurements(
    size: Size, options: argparse.Namespace
) -> list[tuple[str, int, int]]:
    """What is measured, tokens to read, and how many to make."""
    prefills = size.prefills if options.prefills is None else options.prefills
    found = [(f"prefill {length}", length, 1) for length in prefills]
    if 1 in options.batches:
        found.insert(0, ("decode, batch 1", size.prompt, size.new))
    return found


def _times(model: Any, size: Size, length: int, count: int) -> tuple[float, float]:
    """Seconds until the first token, and from there to the last."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    ids = mx.array(cuda_llama.sequence(size, 0, length))
    start, times = time.perf_counter(), []
    for token, _ in generate_step(ids, model, max_tokens=count):
        int(token)
        times.append(time.perf_counter())
    mx.synchronize()
    return times[0] - start, times[-1] - times[0]
