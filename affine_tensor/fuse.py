"""`fuse_projections`: linears that read one input, multiplied together.

A decoder's q, k and v (or gate and up) are products with one input. Joined by rows they
are one product with a taller matrix, which saves a launch each, and on small matrices
most of their time. Nothing is replaced: the parameters stay where they are, as rows of
the joined weight, so that state dicts, saving and adapters see what they saw before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tensor import AffineQuantizedTensor, log_once

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def fuse_projections(
    model: nn.Module, groups: Sequence[Sequence[str]] = PROJECTIONS
) -> list[str]:
    """Multiply by sibling linears at once, where they read the same input.

    Args:
        model: with packed weights, on the device where it is to run. Moving it, or
            putting other weights in, undoes this, and the log says so.
        groups: names of children that read one input. Of a group, those are joined whose
            weights agree in bits, group size, dtypes and permutation, and that all have
            a bias or none.

    Returns:
        What was joined, such as ``"model.layers.0.mlp.gate_proj+up_proj"``.

    Results are what they were: each row of a product is computed from the same codes
    (bit for bit where a kernel's sums do not depend on the number of rows; on a CPU they
    do not), but columns of one: `.view` across the last dimension needs `.reshape`. Of
    siblings that turn out to read different inputs, as in cross-attention, each is
    multiplied alone again. `split_projections` undoes it. Until then, or until a forward
    has seen that the model was moved, the old weights take their memory. A linear must not
    be copied by `copy.copy` while it is joined: such a copy goes on with these weights.
    """
    joined = []
    for name, parent in model.named_modules():
        for group in groups:
            for own in _alike(parent, group):
                Joint([getattr(parent, child) for child in own])
                joined.append(f"{name}.{'+'.join(own)}".lstrip("."))
    return joined


def split_projections(model: nn.Module) -> None:
    """Undo `fuse_projections`. The weights go on sharing their memory."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Member):
            del module.forward


def _alike(parent: nn.Module, group: Sequence[str]) -> Iterator[list[str]]:
    """The children of a group that can be joined, by what they have in common."""
    found: dict[Any, list[str]] = {}
    for name in group:
        child = parent._modules.get(name)
        if type(child) is not nn.Linear:
            continue
        own = child.__dict__.get("forward")
        if isinstance(own, _Member) and own.joint.apart:
            del child.forward
        elif own is not None:  # of accelerate, say, or joined already
            continue
        weight, bias = child.weight, child.bias
        if not isinstance(weight, AffineQuantizedTensor) or weight.transposed:
            continue
        if weight.permutation is None:
            form = (weight.shape[1], weight.device, weight.scales.dtype, bias is None)
            found.setdefault((form, weight.__tensor_flatten__()[1]), []).append(name)
    return (own for own in found.values() if len(own) > 1)


# x, how it was multiplied, the product, and who has not asked for it yet (a bit each).
_Waiting = tuple[Tensor, tuple[Any, ...], Tensor, int]
_MOST_MISSED = 3


class Joint:
    """Linears whose weights are rows of one, and a product that waits to be asked for.

    The first that is called multiplies for all; the others, called with the same input,
    take their columns. Then nothing is kept.
    """

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.weight: Any = torch.cat([linear.weight.detach() for linear in linears])
        self.linears = linears
        self.members: list[_Member] = []
        self.apart = False
        self.waiting: _Waiting | None = None
        self.missed = 0  # products in a row that not all have asked for
        self.everybody = (1 << len(linears)) - 1
        start = 0
        for number, linear in enumerate(linears):
            rows = slice(start, start + linear.weight.shape[0])
            linear.weight.data = self.weight[rows]
            member = _Member(self, linear, 1 << number, rows)
            linear.forward = member  # type: ignore[method-assign]
            self.members.append(member)
            start = rows.stop

    def columns(self, x: Tensor, bit: int, rows: slice) -> Tensor | None:
        """``x @ W[rows].T``, or None if the linears are found to read different inputs."""
        waiting, mode = self.waiting, _mode(x)  # read once: threads share it
        if waiting is not None:
            of, in_mode, y, left = waiting
            if of is x and left & bit and in_mode == mode:
                left ^= bit
                self.waiting = (of, in_mode, y, left) if left else None
                if not left:
                    self.missed = 0
                return _own(y, rows)
            # Once it may be that somebody else's exception came between.
            self.missed += 1
            if self.missed >= _MOST_MISSED:
                self.part("linears that were joined read different inputs")
                return None
        # Joined at each call, being small: biases are trained, and set in other ways.
        biases: list[Tensor] = [
            own.bias for own in self.linears if own.bias is not None
        ]
        if len(biases) not in (0, len(self.linears)):
            self.part("only some of the linears that were joined have a bias now")
            return None
        y = F.linear(x, self.weight, torch.cat(biases) if biases else None)
        if not self.apart:
            self.waiting = (x, mode, y, self.everybody ^ bit)
        return _own(y, rows)

    def part(self, why: str) -> None:
        """Multiply apart from now on, and hold no weights."""
        self.apart, self.waiting = True, None
        self.weight, self.linears = None, []
        for member in self.members:
            member.forget()
        if not torch.compiler.is_compiling():
            log_once(f"fuse {why}", "fuse_projections is undone: %s", why)

    def __deepcopy__(self, memo: dict[int, Any]) -> Joint:
        return _apart()  # a copy's weights are no rows of one

    def __reduce__(self) -> tuple[Any, ...]:
        return _apart, ()


def _apart() -> Joint:
    joint = Joint.__new__(Joint)
    joint.apart, joint.waiting, joint.members = True, None, []
    return joint


def _own(y: Tensor, rows: slice) -> Tensor:
    # Gradients: siblings that were views of one would mark each other as changed.
    return y[..., rows].clone() if y.requires_grad else y[..., rows]


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What a product depends on beside x: with another it is made again."""
    kind = x.device.type
    autocast = (
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    )
    mode = (torch.is_grad_enabled(), autocast)
    if torch.compiler.is_compiling():  # which sees one mode, and nothing in between
        return mode
    # What changes if x is written to (inference tensors do not count), and the stream.
    version = None if x.is_inference() else x._version
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    return (*mode, torch.is_inference_mode_enabled(), version, stream)


class _Member:
    """Takes the place of the `forward` of one linear."""

    def __init__(self, joint: Joint, linear: nn.Linear, bit: int, rows: slice) -> None:
        self.joint = joint
        self.linear = linear
        self.bit = bit
        self.rows = rows
        # Whoever has others instead, from `.to` or a checkpoint, is not joined any more.
        self.weight: Any = linear.weight
        held: Any = linear.weight
        self.packed, self.scales, self.dtype = held._packed, held.scales, held._dtype

    def __call__(self, input: Tensor) -> Tensor:
        linear = self.linear
        if not self.joint.apart:
            if self._is_as_it_was():
                y = self.joint.columns(input, self.bit, self.rows)
                if y is not None:
                    return y
            else:
                self.joint.part(
                    "the model was moved or has other weights; call it again"
                )
        return F.linear(input, linear.weight, linear.bias)

    def _is_as_it_was(self) -> bool:
        weight: Any = self.linear.weight
        return (
            weight is self.weight
            and weight._packed is self.packed
            and weight.scales is self.scales
            and weight._dtype is self.dtype
        )

    def forget(self) -> None:
        """Hold no weight."""
        self.weight = self.packed = self.scales = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is apart, and has no use for them.
        return self.__dict__ | {"weight": None, "packed": None, "scales": None}
