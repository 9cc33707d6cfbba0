"""Host time of a call: `F.linear` on an `nn.Linear` with a packed weight, one row.

Calls are handed over one after the other, many before the next wait, on a matrix so small
that the GPU is done sooner than the host. Beside them torch's own calls on dense weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from cuda_clock import wait
from cuda_products import Setting
from overhead import Direct
from torch import nn
from torch.nn import functional as F

from affine_tensor import AffineConfig, AffineQuantizedTensor, quantize_

SIDE = 256  # of the matrix
CALLS = {"models": 1000, "tiny": 10}
ROUNDS = {"models": 21, "tiny": 2}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def measure(setting: Setting, found: dict[str, Any]) -> None:
    """Fill in the seconds of a call, for each mode and contestant."""
    calls, rounds = CALLS[setting.sizes], ROUNDS[setting.sizes]
    found |= {"side": SIDE, "calls": calls, "rounds": rounds, "modes": {}}
    for mode, context in MODES.items():
        with context():
            runs = _contestants(setting.kind)
            taken: dict[str, list[float]] = {name: [] for name in runs}
            for run in runs.values():
                _host(run, calls, setting.kind)
            for _ in range(rounds):
                for name, run in runs.items():
                    taken[name].append(_host(run, calls, setting.kind))
        found["modes"][mode] = {n: statistics.median(t) for n, t in taken.items()}


def _contestants(kind: str) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": kind, "dtype": torch.bfloat16}
    plain = nn.Linear(SIDE, SIDE, bias=False, **where)
    packed = nn.Linear(SIDE, SIDE, bias=False, **where)
    quantize_(packed, AffineConfig(4, 64), progress=False)
    weight = packed.weight
    assert isinstance(weight, AffineQuantizedTensor)
    direct = Direct(weight, None)
    x = torch.randn(1, SIDE, **where)
    turned = plain.weight.detach().t()
    return {
        "torch.mm": lambda: torch.mm(x, turned),
        "nn.Linear, dense": lambda: plain(x),
        "nn.Linear, packed": lambda: packed(x),
        "F.linear, packed": lambda: F.linear(x, weight),
        "operator on buffers": lambda: direct(x),
    }


def _host(run: Callable[[], Any], calls: int, kind: str) -> float:
    """Seconds of a call until it has been handed over."""
    wait(kind)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    taken = time.perf_counter() - start
    wait(kind)
    return taken / calls
