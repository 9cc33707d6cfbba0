"""mlx-lm with the checkpoint of `cuda_models.py`, on a GPU where MLX knows one.

Its own loops are timed: `generate_step` of one sequence, `BatchGenerator` of several.
"""

from __future__ import annotations

import time
from typing import Any

import cuda_llama
import cuda_runs
import torch
from cpu_contestants import Missing
from cuda_runs import TRIAL, Run
from torch import Tensor


def load(run: Run) -> Any:
    """Its model, with all weights on the device."""
    try:
        import mlx.core as mx
    except ImportError as error:
        raise Missing("not installed") from error
    if run.kind == "cuda" and mx.default_device() == mx.Device(mx.cpu):
        raise Missing("the MLX that is installed knows no GPU")
    # Before mlx-lm picks a stream.
    mx.set_default_device(mx.Device(mx.gpu if run.kind == "cuda" else mx.cpu))
    try:
        from mlx_lm.utils import load_model
    except ImportError as error:
        raise Missing("mlx-lm is not installed") from error
    model, _config = load_model(run.folder)
    mx.eval(model.parameters())
    return model


def decode(run: Run, result: dict[str, Any], model: Any, batch: int) -> list[float]:
    """Tokens a second of all sequences, in each round."""
    _check(run, result, model, batch)
    size = run.size
    ids = [cuda_llama.sequence(size, i % 2, size.prompt) for i in range(batch)]

    def once() -> float:
        if batch == 1:
            times = _one(model, ids[0], size.new)
        else:
            times = _several(model, ids, size.new)
        return times[-1] - times[1]  # the first is the start

    once()
    taken = cuda_runs.repeated(once, run.options.rounds)
    return [batch * (size.new - 1) / seconds for seconds in taken]


def prefill(run: Run, result: dict[str, Any], model: Any, length: int) -> list[float]:
    """Tokens a second until the first new one, in each round."""
    ids = cuda_llama.sequence(run.size, 0, length)

    def once() -> float:
        start, first = _one(model, ids, 1)
        return first - start

    once()
    return [length / each for each in cuda_runs.repeated(once, run.options.rounds)]


def _check(run: Run, result: dict[str, Any], model: Any, batch: int) -> None:
    """Compare logits of a prompt and of tokens that follow with float64."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    prompt, new = TRIAL
    ids = mx.array(
        [cuda_llama.sequence(run.size, i % 2, sum(TRIAL)) for i in range(batch)]
    )
    cache = make_prompt_cache(model)
    rows = [model(ids[:, :prompt], cache=cache)[:, -1]]
    for place in range(prompt, prompt + new - 1):
        rows.append(model(ids[:, place : place + 1], cache=cache)[:, -1])
    logits = _tensor(mx.stack(rows, 1).astype(mx.float32))
    expected = [cuda_runs.given_logits(run, i) for i in range(2)]
    cuda_runs.accept(result, f"batch {batch}", logits, expected)


def _tensor(array: Any) -> Tensor:
    return torch.frombuffer(bytearray(memoryview(array)), dtype=torch.float32).view(
        *array.shape
    )


def _one(model: Any, ids: list[int], new: int) -> list[float]:
    """When it started, and when each token was there."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    given = mx.array(ids)
    mx.eval(given)
    times = [time.perf_counter()]
    for token, _ in generate_step(given, model, max_tokens=new):
        int(token)
        times.append(time.perf_counter())
    mx.synchronize()  # it has begun one token more
    return times


def _several(model: Any, ids: list[list[int]], new: int) -> list[float]:
    """The same of sequences together: when each had its token."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    count = len(ids)
    own = BatchGenerator(
        model,
        max_tokens=new,
        completion_batch_size=count,
        prefill_batch_size=count,
    )
    times = [time.perf_counter()]
    own.insert(ids)
    while made := own.next_generated():
        if len(made) != count:
            raise RuntimeError(f"{len(made)} of {count} sequences in a step")
        times.append(time.perf_counter())
    own.close()
    mx.synchronize()
    return times


# ---- memory ----------------------------------------------------------------------


def reset_peak() -> None:
    """Count from here, without what MLX keeps to take again."""
    import mlx.core as mx

    mx.clear_cache()
    mx.reset_peak_memory()


def peak() -> int:
    """Bytes that were in use, at the most since it was reset."""
    import mlx.core as mx

    return int(mx.get_peak_memory())


def held() -> int:
    import mlx.core as mx

    return int(mx.get_active_memory())
