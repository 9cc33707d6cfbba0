"""mlx-lm on the CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy
from workers import Run

mx.set_default_device(mx.cpu)  # before mlx_lm picks a stream

from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models import llama  # noqa: E402, F401  (importing is not loading)
from mlx_lm.utils import load_model  # noqa: E402


class MlxLm:
    """The MLX checkpoint; how many threads MLX takes is its own affair."""

    packages = ("mlx-lm", "mlx")

    def __init__(self, threads: int, longest: int) -> None:
        pass

    def load(self, path: Path) -> None:
        self.model, _config = load_model(path)

    def run(self, ids: list[int], new: int, *, keep_logits: bool = False) -> Run:
        made, rows = Run([], []), []

        def keep(_: Any, logits: mx.array) -> mx.array:
            rows.append(logits)
            return logits

        steps = generate_step(
            mx.array(ids),
            self.model,
            max_tokens=new,
            logits_processors=[keep] if keep_logits else None,
        )
        for token, _ in steps:
            made.times.append(time.perf_counter())
            made.tokens.append(int(token))
        mx.synchronize()  # it has begun one token more
        if keep_logits:
            made.logits = numpy.array(mx.concatenate(rows[:new]).astype(mx.float32))
        return made
