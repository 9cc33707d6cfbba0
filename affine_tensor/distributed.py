"""Packed weights on several processes: shards of them, and what collectives do.

FSDP2, DTensor (tensor parallel) and torch.distributed.checkpoint cut weights with the
operators of `dispatch.py`. What is here: cutting with a reason where it cannot be done,
the collectives, which take the parts one after the other, and how FSDP2 gathers them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .dispatch import _sliced, _stored, implement_foreign, is_called_from
from .tensor import AffineQuantizedTensor, local_of


def cut(
    weight: AffineQuantizedTensor, dim: int, start: int, stop: int, name: str = ""
) -> AffineQuantizedTensor:
    """The entries from `start` to before `stop` along `dim`, a packed view.

    Rows can be cut anywhere; along the input channels at whole groups and words, and not
    at all where a permutation leads them. Raises ValueError with the reason, in which
    `name` is that of the weight.
    """
    piece = _sliced(weight, _stored(weight, dim), start, stop)
    if piece is None:
        raise ValueError(why_not_cut(weight, start, stop, name))
    return piece


def why_not_cut(
    weight: AffineQuantizedTensor, start: int, stop: int, name: str = ""
) -> str:
    """Why the input channels from `start` to before `stop` are no packed weight."""
    columns = weight.scales.shape[-1] * weight.group_size
    text = (
        f"{name or _plan_entry() or 'a packed weight'} has {columns} input channels in "
        f"groups of {weight.group_size}"
    )
    if distributed.is_available() and distributed.is_initialized():
        text += f", on {distributed.get_world_size()} processes"
    if weight.permutation is not None:
        return (
            f"{text}: they are in another order (GPTQ's act-order), so no process can "
            "have a part of them. Cut the output channels (colwise) instead, or take a "
            "checkpoint without act-order"
        )
    return (
        f"{text}: a shard from {start} to {stop} is not whole groups of whole 32-bit "
        f"words ({weight.bits} bits). Take fewer processes, or leave this weight whole "
        "in the plan"
    )


def _plan_entry() -> str:
    """The module that parallelize_module is at; a weight knows no name."""
    name = ""
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code.co_name == "parallelize_module":
            name = str(frame.f_locals.get("module_path", name))
        frame = frame.f_back
    return name


def freeze_shards(model: nn.Module) -> None:
    """Freeze the DTensor parameters whose shards are packed; others stay as they are."""
    for parameter in model.parameters():
        if isinstance(local_of(parameter), AffineQuantizedTensor):
            parameter.requires_grad_(False)


def check_unsharded(model: nn.Module) -> None:
    """Raise ValueError for a model of which this process has shards alone."""
    for name, parameter in model.named_parameters():
        if local_of(parameter) is not parameter:
            raise ValueError(
                f"{name} is sharded over several processes, and an MLX checkpoint is "
                "written by one that has the whole model. Gather it (get_model_state_dict "
                "with full_state_dict=True) into a model that is not sharded, or save the "
                "shards with torch.distributed.checkpoint"
            )


# ---- state dicts that one process sends ---------------------------------------------

NO_BROADCAST = (
    "broadcast_from_rank0 sends a state dict to processes that only know shapes, and "
    "make dense tensors to receive packed weights. Give every process the whole state "
    "dict (full_state_dict=True alone), or use torch.distributed.checkpoint"
)


class _Refusal:
    """Raises NO_BROADCAST in each process that unpickles it."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise NotImplementedError(NO_BROADCAST)


def refuse_broadcast(group: Any) -> None:
    """Raise NotImplementedError in every process of `group`.

    To be called by the one that has the weights, while the others wait for what torch
    would send first: an object that says which shapes will come. They get the refusal
    in its place; else they would wait, for ever or until their time is up, for tensors
    that the first, having raised, does not send.
    """
    distributed.broadcast_object_list([_Refusal()], src=0, group=group)
    _refuse()


# ---- collectives ----------------------------------------------------------------


def _in_parts(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A collective that writes, on each part in turn.

    Each is waited for before the next, but for the last: the caller gets one Work.
    """
    weights = [w for w in tree_leaves(args) if isinstance(w, AffineQuantizedTensor)]
    _check_alike(func, weights)
    if is_called_from("torch.distributed._state_dict_utils"):
        raise NotImplementedError(NO_BROADCAST)
    result: Any = None
    for number in range(len(weights[0]._parts())):
        _wait(result)
        own = tree_map_only(AffineQuantizedTensor, _part(number), (list(args), kwargs))
        result = func(*own[0], **own[1])
    if isinstance(result, tuple):  # the tensors that were written to come first
        return (args[0], *result[1:])
    return result


def _part(number: int) -> Callable[[AffineQuantizedTensor], Tensor]:
    return lambda weight: weight._parts()[number]


def _wait(result: Any) -> None:
    work = result[-1] if isinstance(result, tuple) else result
    if work is not None:
        distributed.distributed_c10d.Work.unbox(work).wait()


def _check_alike(func: Any, weights: list[AffineQuantizedTensor]) -> None:
    """Processes exchange words, which mean the same in the same format only."""
    formats = {
        (w.bits, w.group_size, w.scales.dtype, w.transposed, w.permutation is None)
        for w in weights
    }
    if len(formats) > 1 or any(w.dim() < 2 for w in weights):
        seen = ", ".join(map(repr, weights))
        raise NotImplementedError(
            f"{func} of packed weights of several formats: {seen}"
        )


def _functional(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A collective that returns what it moved along the first dimension."""
    weight = args[0]
    moves_rows = weight.dim() == 2
    if moves_rows and weight.transposed:
        raise NotImplementedError(
            f"{func} on {weight!r}: the first dimension is that of its input channels. "
            "Shard the other one"
        )

    def move(part: Tensor) -> Tensor:
        return func(part, *args[1:], **kwargs)

    # Rows share one permutation, which every process has.
    return weight._map(move, torch.clone if moves_rows else None)


def _on_each(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0]._map(lambda part: func(part, *args[1:], **kwargs))


def _wait_now(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Torch would wrap each part to wait for it at its first use, which kernels that
    take its address never get to."""
    return args[0]._map(torch.ops._c10d_functional.wait_tensor.default)


implement_foreign(
    _in_parts,
    "c10d.scatter_.default",
    "c10d.broadcast_.default",
    "c10d.gather_.default",
    "c10d.allgather_.default",
    "c10d.alltoall_.default",
    "c10d.send.default",
    "c10d.recv_.default",
)
implement_foreign(
    _functional,
    "_c10d_functional.all_gather_into_tensor.default",
    "_c10d_functional.all_to_all_single.default",
)
implement_foreign(
    _on_each,
    "_c10d_functional.broadcast.default",
    "_c10d_functional.wait_tensor.default",
)
implement_foreign(_wait_now, "_c10d_functional._wrap_tensor_autograd.default")


# ---- FSDP2 ----------------------------------------------------------------------


def pre_all_gather(
    weight: AffineQuantizedTensor,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The parts that FSDP2 is to gather, and what it is to keep for afterwards.

    A process whose shard has fewer rows than the others' pads it. torch only takes
    padding of the logical shape from a tensor that is told the whole size, so this one is
    not told (see the number of its hook's arguments), and asks the caller.
    """
    caller = sys._getframe(2).f_locals.get("self")
    padded = getattr(caller, "padded_sharded_param_size", None)
    size = getattr(caller, "_orig_size", None)
    if padded is None or size is None:
        raise RuntimeError("this version of torch's FSDP2 is not known here")
    parts = [weight._packed, weight.scales, weight.biases]
    own = weight.permutation is not None and weight.dim() > 2
    if own:
        parts = weight._parts()
    shared = None if own else weight.permutation
    rows = padded[0]
    return tuple(_padded(part, rows) for part in parts), (size[0], shared)


def _padded(part: Tensor, rows: int) -> Tensor:
    if part.shape[0] == rows:
        return part.contiguous()
    longer = part.new_zeros(rows, *part.shape[1:])
    longer[: part.shape[0]] = part
    return longer


def post_all_gather(
    weight: AffineQuantizedTensor,
    gathered: tuple[Tensor, ...],
    kept: tuple[Any, ...],
    dtype: torch.dtype,
    out: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The whole weight of the gathered parts, whose memory it shares."""
    if out is not None:
        return None  # made of the same memory the first time
    rows, permutation = kept
    packed, scales, biases, *own = (part[:rows] for part in gathered)
    whole = AffineQuantizedTensor(
        packed,
        scales,
        biases,
        own[0] if own else permutation,
        bits=weight.bits,
        group_size=weight.group_size,
        dtype=dtype,
    )
    return whole, ()
