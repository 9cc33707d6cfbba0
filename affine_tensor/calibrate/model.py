"""A model as it is worked on, and as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..quantize import slots


@contextmanager
def working_copy(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """The model in `dtype`, evaluating, without gradients; as it was afterwards."""
    known = list(slots(model).values())
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        if dtype is not None:
            for slot in known:
                if slot.parameter.is_floating_point():
                    cast = slot.parameter.detach().to(dtype)
                    slot.put(nn.Parameter(cast, requires_grad=False))
            for module, name, buffer in buffers:
                # Those in float32 are so for a reason, and stay.
                if buffer.is_floating_point() and buffer.itemsize < dtype.itemsize:
                    module._buffers[name] = buffer.to(dtype)
        with torch.no_grad():
            yield
    finally:
        for slot in known:
            slot.put(slot.parameter)  # type: ignore[arg-type]
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module in training:
            module.training = True
