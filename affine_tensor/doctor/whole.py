"""Packed weights in use: gradients, compilers, views, a model that generates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout
from ..kernels import machine
from ..quantize import AffineConfig, dequantize_, quantize_
from ..tensor import AffineQuantizedTensor
from .cases import compare, error_bound, products
from .watch import Watch

_FORM: dict[str, Any] = {"bits": 4, "group_size": 64}


class Skipped(Exception):
    """Raised by a check that cannot run here, with the reason."""


@dataclass
class Outcome:
    name: str
    state: str  # "ok", "FAILED" or "skipped"
    text: str = ""


# A check takes the device for tensors, and returns what is to be added to "ok".
Check = Callable[[torch.device], str]


def check_whole(kind: str, watch: Watch, *, only: str = "") -> Iterator[Outcome]:
    """The outcome of each check, or of those whose name contains `only`."""
    checks: dict[str, Check] = {
        "gradient to the input": _gradient,
        "training an adapter (LoRA)": _adapter,
        "torch.compile(fullgraph=True)": _compiled,
        "views of inputs and weights": _views,
        "generation, transformers": _generation,
    }
    device = machine.tensor_device(kind)
    for name, check in checks.items():
        if only not in name:
            continue
        watch.clear()
        try:
            text = check(device)
            slow = watch.slow_path(kind)
            yield Outcome(name, "FAILED" if slow else "ok", slow or text)
        except Skipped as reason:
            yield Outcome(name, "skipped", str(reason))
        except Exception as error:  # whatever it is, it belongs into the table
            yield Outcome(name, "FAILED", f"{type(error).__name__}: {error}")


def _weight(
    rows: int, columns: int, device: torch.device
) -> tuple[AffineQuantizedTensor, Tensor]:
    """A packed weight of random numbers, and what it is in float64 on the CPU."""
    generator = torch.Generator().manual_seed(rows)
    dense = torch.randn(rows, columns, generator=generator)
    parts = layout.quantize(dense, **_FORM)
    exact = layout.dequantize(*parts, **_FORM, dtype=torch.float64)
    # There is hardly any uint32 on MPS.
    packed, *others = parts
    there = [part.to(device) for part in (packed.view(torch.int32), *others)]
    return AffineQuantizedTensor.from_packed(*there, **_FORM), exact


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _expect_product(what: str, y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise unless y is ``x @ weight``, as far as float32 sums can tell."""
    exact, sizes, _ = products(x.detach().cpu(), weight)
    y = y.detach().cpu()
    _, wrong = compare(y, exact, error_bound(y.dtype, exact, sizes))
    if wrong:
        raise AssertionError(f"{what}: {wrong}")


def _gradient(device: torch.device) -> str:
    weight, exact = _weight(96, 192, device)
    for rows in (1, 3, 40):
        x = _normal(rows, 192).to(device).requires_grad_()
        gradient = _normal(rows, 96, seed=1).to(device)
        y = F.linear(x, weight)
        y.backward(gradient)
        assert x.grad is not None
        _expect_product(f"{rows} rows", y, x, exact.mT)
        _expect_product(f"gradient of {rows} rows", x.grad, gradient, exact)
    return ""


def _adapter(device: torch.device) -> str:
    """y = x W^T + (x A^T) B^T, with gradients to x, A and B."""
    weight, exact = _weight(96, 192, device)
    made = [_normal(5, 192), _normal(8, 192, seed=1), _normal(96, 8, seed=2)]

    def gradients(weight: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        x, a, b = (tensor.requires_grad_() for tensor in tensors)
        y = F.linear(x, weight) + F.linear(F.linear(x, a), b)
        return torch.autograd.grad(y.square().sum(), (x, a, b))

    mine = gradients(weight, [tensor.to(device) for tensor in made])
    wanted = gradients(exact, [tensor.double() for tensor in made])
    for name, got, right in zip("xAB", mine, wanted, strict=True):
        error = float((got.cpu().double() - right).norm() / right.norm())
        if not error < 1e-5:
            raise AssertionError(f"gradient to {name}: relative error {error:.1e}")
    return ""


def _compiled(device: torch.device) -> str:
    """A small block through a compiler; where inductor does not work, eagerly."""
    weight, exact = _weight(64, 128, device)

    def block(x: Tensor) -> Tensor:
        return F.linear(x * 2, weight) + 1

    x = _normal(3, 128).to(device)
    reasons = ""
    # On the emulator inductor would only compile C++ for the CPU.
    backends = ("eager",) if machine.emulated() else ("inductor", "eager")
    for backend in backends:
        torch.compiler.reset()
        try:
            y = torch.compile(block, fullgraph=True, backend=backend)(x)
        except Exception as error:
            if backend == backends[-1]:
                raise
            line = next(iter(str(error).strip().splitlines()), "")
            reasons = f"; inductor: {type(error).__name__}: {line[:100]}"
            continue
        _expect_product(f"backend {backend}", y - 1, x * 2, exact.mT)
        return f"backend {backend}{reasons}"
    return ""


def _views(device: torch.device) -> str:
    weight, exact = _weight(96, 256, device)
    wide = _normal(9, 257, seed=3).to(device)
    inputs = {
        "rows from the second on": wide[1:, :256],
        "columns from the second on": wide[:, 1:],
        "every second row": wide[::2, :256],
        "transposed": _normal(256, 5, seed=4).to(device).t(),
        "one row, expanded": wide[:1, :256].expand(4, 256),
        "three dimensions": wide[:8, 1:].unflatten(0, (2, 4)),
    }
    for name, x in inputs.items():
        _expect_product(f"x, {name}", F.linear(x, weight), x, exact.mT)
    x = wide[:, :256]
    for start, end in ((3, 96), (1, 2), (64, 95)):
        y = F.linear(x, weight[start:end])
        _expect_product(f"weight[{start}:{end}]", y, x, exact[start:end].mT)
    y = F.linear(x[:, 64:192], weight[:, 64:192])
    _expect_product("weight[:, 64:192]", y, x[:, 64:192], exact[:, 64:192].mT)
    return f"{len(inputs)} of x, 4 of the weight"


def _generation(device: torch.device) -> str:
    """Greedy tokens of a small random Llama, against its dense twin on the CPU."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Skipped(f"transformers is not there: {error}") from None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # so that tokens lie well apart
        parameter.data.mul_(4)
    quantize_(model, AffineConfig(**_FORM), progress=False)
    twin = copy.deepcopy(model)
    dequantize_(twin)
    ids = torch.arange(1, 13).view(1, 12)
    kind = {"max_new_tokens": 12, "do_sample": False}
    mine = model.to(device).generate(ids.to(device), **kind).cpu()
    right = twin.generate(ids, **kind)
    if not torch.equal(mine, right):
        raise AssertionError(
            f"tokens {mine[0, 12:].tolist()}, on the CPU {right[0, 12:].tolist()}"
        )
    return f"{kind['max_new_tokens']} tokens"
