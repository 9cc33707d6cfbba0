"""Which format a checkpoint is in: MLX's, or another that is affine too.

GPTQ, AWQ and compressed-tensors have the names of the Hub, and several tensors for each
weight. `opened` shows such a checkpoint as one of weights under their own names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from . import awq, compressed_tensors, gptq, mlx
from .files import Checkpoint, CheckpointError, StoredTensor

OTHERS: tuple[Any, ...] = (gptq, awq, compressed_tensors)


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is quantized in a format that is read here."""
    return mlx.recognizes(checkpoint) or other_format(checkpoint) is not None


def other_format(checkpoint: Checkpoint) -> Any:
    """The module of the format, if it is not MLX's; None if it is or none is known."""
    if mlx.recognizes(checkpoint):
        return None
    return next((one for one in OTHERS if one.recognizes(checkpoint)), None)


@dataclass(frozen=True)
class Opened:
    """A checkpoint with one tensor for each packed weight, of whatever parts it is."""

    checkpoint: Checkpoint
    packed: dict[str, Any]
    broken: dict[str, str]
    parts: set[str]


def opened(checkpoint: Checkpoint, other: Any) -> Opened:
    """The weights of a checkpoint in another format than MLX's.

    Raises CheckpointError for what the format refuses as a whole.
    """
    problems = other.check_settings(checkpoint)
    if problems:
        raise CheckpointError(
            "\n".join([f"{checkpoint.folder} is refused:", *problems])
        )
    packed, broken, parts = other.stored_weights(checkpoint)
    tensors = {n: t for n, t in checkpoint.tensors.items() if n not in parts}
    for name in (*packed, *broken):
        # Words of no shape: the weight itself says what it is.
        tensors[name] = StoredTensor(name, checkpoint.files[0], torch.int32, (0,), 0, 0)
    return Opened(replace(checkpoint, tensors=tensors), packed, broken, parts)
