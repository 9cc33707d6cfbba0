"""What `cuda_models.py` measures of a loaded model, each after it was found right.

All take what the contestants have in common, the contestant's figures so far, its model
and a number (of sequences, or of tokens); they give tokens a second, in each round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cuda_clock
import cuda_llama
import torch
from cuda_clock import host_seconds, wait
from cuda_llama import ENTRIES, LIMIT, Steps
from peers_files import Size, reference, weights
from torch import Tensor

TRIAL = (16, 4)  # tokens of a prompt, and positions that are compared from its last on
SLOW = 2.0  # seconds, above which a measurement is not repeated


@dataclass
class Run:
    """What all contestants have in common."""

    options: argparse.Namespace
    size: Size
    folder: Path
    deadline: float

    @property
    def kind(self) -> str:
        return str(self.options.device)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


class Wrong(RuntimeError):
    """Of a contestant that computes something else: it is not timed at all."""


def repeated(once: Callable[[], float], rounds: int) -> list[float]:
    """Seconds of each; of what is slow, of one."""
    taken = [once()]
    while len(taken) < rounds and taken[0] < SLOW:
        taken.append(once())
    return taken


@torch.inference_mode()
def decode(run: Run, result: dict[str, Any], model: Any, batch: int) -> list[float]:
    size, kind = run.size, run.kind
    longest = max(size.prompt + size.new, sum(TRIAL))
    steps = Steps(model, batch, longest, kind)
    _check(run, result, steps, batch)
    prompt = cuda_llama.prompt_of(size, batch, size.prompt, kind)

    def once() -> float:
        steps.read(prompt)
        wait(kind)

        def go() -> None:
            for _ in range(size.new - 1):
                steps.step()
            wait(kind)

        return host_seconds(go)

    once()
    taken = repeated(once, run.options.rounds)
    return [batch * (size.new - 1) / seconds for seconds in taken]


def _check(run: Run, result: dict[str, Any], steps: Steps, batch: int) -> None:
    """Compare the logits of each sequence with float64; raises Wrong."""
    logits = cuda_llama.checked_logits(steps, run.size, batch, *TRIAL)
    accept(result, f"batch {batch}", logits, [given_logits(run, i) for i in range(2)])


def accept(
    result: dict[str, Any], what: str, logits: Tensor, expected: Sequence[Tensor]
) -> None:
    """Keep the error of logits; raises Wrong where it is too large."""
    error = cuda_llama.error_of(logits, expected)
    result["errors"][what] = error
    entry = ENTRIES.get(result["name"])
    if not error < (LIMIT if entry is None else entry.limit):
        raise Wrong(f"wrong, {what}: relative error {error:.2g} against float64")


def given_logits(run: Run, which: int) -> Tensor:
    """What to expect of the sequence that is given."""
    ids = cuda_llama.sequence(run.size, which, sum(TRIAL) - 1)
    return _expected(run.folder, run.size, tuple(ids), run.kind)


@cache  # contestants are given the same
def _expected(folder: Path, size: Size, ids: tuple[int, ...], kind: str) -> Tensor:
    """The last logits ``[new, vocabulary]`` in float64, weights as the file has them."""
    stored = weights(folder, size, "mlx", kind)
    with torch.device(kind):
        return reference(stored, size, list(ids), TRIAL[1]).cpu()


@torch.inference_mode()
def prefill(run: Run, result: dict[str, Any], model: Any, length: int) -> list[float]:
    """As `generate` reads a prompt: no graph, a cache that grows."""
    ids = cuda_llama.prompt_of(run.size, 1, length, run.kind)

    def once() -> float:
        def read() -> None:
            model(ids, use_cache=True, logits_to_keep=1)
            wait(run.kind)

        wait(run.kind)
        return host_seconds(read)

    once()
    return [length / seconds for seconds in repeated(once, run.options.rounds)]


@torch.inference_mode()
def prefill_graph(
    run: Run, result: dict[str, Any], model: Any, length: int
) -> list[float]:
    """The same without the host's time."""
    from transformers import DynamicCache

    ids = cuda_llama.prompt_of(run.size, 1, length, run.kind)

    def read() -> Tensor:
        own = DynamicCache(config=model.config)
        made = model(ids, past_key_values=own, use_cache=True, logits_to_keep=1)
        return made.logits

    expected = read().float().clone()
    graph = cuda_clock.block(read, 1, run.kind)
    found = graph.poisoned().float()
    distance = float((found - expected).norm() / expected.norm())
    if not distance < ENTRIES[result["name"]].limit:
        raise Wrong(f"wrong: a graph of a prompt of {length} is off by {distance:.2g}")
    taken = repeated(graph.seconds, run.options.rounds)
    return [length / seconds for seconds in taken]


@torch.no_grad()
def compiled(run: Run, result: dict[str, Any], model: Any, batch: int) -> list[float]:
    """transformers' own loop and torch.compile; the time from the first token on."""
    from peers_torch import _Clock
    from transformers import CompileConfig, StaticCache

    size, kind = run.size, run.kind
    ids = cuda_llama.prompt_of(size, batch, size.prompt, kind)
    config = CompileConfig(mode="reduce-overhead", dynamic=False)
    config._compile_all_devices = True
    # One for all runs: graphs are recorded again where its memory changes.
    longest = max(size.prompt + size.new, sum(TRIAL))
    own = StaticCache(config=model.config, max_cache_len=longest)

    def generate(ids: Tensor, new: int, **more: Any) -> Any:
        own.reset()
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            past_key_values=own,
            compile_config=config,
            **more,
        )

    def check() -> None:
        prompt, new = TRIAL
        given = cuda_llama.prompt_of(size, 1, prompt, kind)
        logged = {"output_logits": True, "return_dict_in_generate": True}
        made = generate(given, new, **logged)
        tokens = tuple(made.sequences[0, :-1].tolist())
        expected = _expected(run.folder, size, tokens, kind)
        accept(result, "compiled", torch.stack(made.logits, 1), [expected])

    def once() -> float:
        clock = _Clock()
        generate(ids, size.new, streamer=clock)
        return clock.times[-1] - clock.times[1]  # the first is the prompt's

    try:
        check()
        once()
        taken = repeated(once, run.options.rounds)
    finally:
        torch._dynamo.reset()
        # transformers keeps what it compiled.
        vars(model).pop("_compiled_call", None)
    return [batch * (size.new - 1) / seconds for seconds in taken]
