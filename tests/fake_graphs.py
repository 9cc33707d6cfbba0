"""CUDA graphs on a CPU: what benchmarks capture is recorded, and computed again.

As on a GPU, nothing that is captured has an effect before the first replay, results of a
replay stand where those of the capture stood, and nothing may ask for a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKING = (
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.nonzero, torch.nonzero),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.equal, torch.equal, Tensor.is_nonzero),
)
REFUSAL = "not permitted when a stream is capturing"


class Graph:
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class Event:
    """In the place of `torch.cuda.Event`: a millisecond between any two."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what is written to
        self.fresh: dict[int, Tensor] = {}  # what is made, by its storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # A tensor of numbers that the host has: a copy that must wait.
        if func is torch.ops.aten.lift_fresh.default and args[0].numel():
            raise RuntimeError(f"{func}: {REFUSAL}")
        kwargs = kwargs or {}
        for argument, given in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and id(given) not in self.before:
                self.before[id(given)] = (given, given.clone())
        results = func(*args, **kwargs)
        taken = {_storage(tensor) for tensor in _plain((args, kwargs))}
        for tensor in _plain(results):
            if _storage(tensor) not in taken:
                self.fresh.setdefault(_storage(tensor), tensor)
        self.graph.calls.append((func, args, kwargs, results))
        return results

    def forget(self) -> None:
        """As if nothing had been computed."""
        for tensor in self.fresh.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        for tensor, before in self.before.values():
            if _storage(tensor) not in self.fresh:
                tensor.copy_(before)


def _plain(values: Any) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [leaf for leaf in leaves if type(leaf) in (Tensor, nn.Parameter)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Refusing(TorchFunctionMode):
    """torch answers some questions on a CPU without asking its dispatcher."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in ASKING:
            raise RuntimeError(f"{func}: {REFUSAL}")
        return func(*args, **(kwargs or {}))


@contextmanager
def _graph(graph: Graph) -> Iterator[None]:
    recorder = _Recorder(graph)
    with _Refusing(), recorder:
        yield
    recorder.forget()


def install(monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
    """Let `block` of `cuda_clock` capture such graphs, whatever the device."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph", _graph)

    def block(launch: Any, calls: int, _: str) -> Any:
        return clock._graph(launch, calls)

    monkeypatch.setattr(clock, "block", block)
