"""Which weights of a transformers model are quantized, and their quantized pieces."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from .. import layout, recipes
from ..checkpoint.forms import Form, dense
from ..checkpoint.names import Names
from ..quantize import AffineConfig, slots
from ..tensor import AffineQuantizedTensor
from .config import AffineQuantizationConfig

_SIXTEEN = "group_size is 16, which MLX does not read; it has 32, 64 and 128"


class Choices:
    """What a configuration means for one model."""

    def __init__(self, model: Any, config: AffineQuantizationConfig) -> None:
        self.model, self.names = model, Names(model)
        self.default = AffineConfig(config.bits, config.group_size)
        self._left_out = list(config.modules_to_not_convert or [])
        self.skip = [
            *self._left_out,
            *(getattr(model, "_keep_in_fp32_modules", None) or []),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or []),
        ]
        self.recipe = config.recipe
        self._choose = recipes.resolve(config.recipe, model, self.default)

    def config_for(
        self, name: str, value: Tensor, path: str | None = None
    ) -> AffineConfig | str:
        """How a parameter is quantized, or why not. `path` is the module of MLX that it,
        or a part of it, becomes; by default the first."""
        if path is None:
            form = next(self.names.forms(name, value.shape))
            path = next(form.names()).removesuffix(".weight")
        if not is_quantizable(self.model, name, value):
            router = self.recipe is not None and recipes.is_linear_router(
                self.model, path
            )
            if not (router and name.endswith(".weight")):
                return "no Linear, Embedding or stack of experts"
        module = name.rpartition(".")[0]
        if self.skip and not should_convert_module(module, self.skip):
            return "left out by modules_to_not_convert"
        answer = self._choose(name, path)
        if answer is False:
            return "left out by the recipe"
        return self.default if answer is True else answer

    def check_for_mlx(self) -> None:
        """Raise before anything is read for what MLX has not, and modules to leave out
        that are none of the model's."""
        if self.default.group_size == 16:
            raise ValueError(_SIXTEEN)
        check_skipped(self.model, self._left_out)
        values = {slot.name: slot.parameter for slot in slots(self.model).values()}
        for name, paths in recipes.module_paths(self.model).items():
            for path in paths:
                config = self.config_for(name, values[name], path)
                if isinstance(config, AffineConfig) and config.group_size == 16:
                    raise ValueError(f"{name}: {_SIXTEEN}")

    def pieces(
        self, name: str, value: Tensor
    ) -> tuple[Form, dict[str, Tensor], dict[str, str]]:
        """How the parameter lies in MLX; its pieces there, quantized as MLX would have
        them, by their names; and why matrices among them stay dense."""
        pieces: dict[str, Tensor] = {}
        reasons: dict[str, str] = {}
        form = next(self.names.forms(name, value.shape))
        for leaf, piece in form.save(value.detach()).items():
            path = leaf.removesuffix(".weight")
            config = self.config_for(name, value, path)
            fits = leaf.endswith("weight") and piece.dim() > 1
            reason: str | None = None if isinstance(config, AffineConfig) else config
            if fits and isinstance(config, AffineConfig):
                reason = layout.why_not(
                    piece.shape[-1], bits=config.bits, group_size=config.group_size
                )
                if reason is None:
                    if isinstance(piece, AffineQuantizedTensor):
                        piece = piece.dequantize(value.dtype)  # rounded once
                    piece = AffineQuantizedTensor.from_dense(
                        piece.to(value.dtype).contiguous(),
                        config.bits,
                        config.group_size,
                    )
            if fits and reason is not None:
                reasons[leaf] = reason
            pieces[leaf] = piece
        return form, pieces, reasons


def check_skipped(model: nn.Module, skip: Iterable[str]) -> None:
    """Raise ValueError for a name of modules to leave out that is none of the model's."""
    modules = [name for name, _ in model.named_modules() if name]
    for pattern in skip:
        if all(should_convert_module(name, [pattern]) for name in modules):
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in modules)
            names = [name for name in kinds if not name.isdigit()]
            raise ValueError(
                f"{pattern!r} is to stay dense, and {type(model).__name__} has no such "
                f"module. Its modules are called {', '.join(names)}"
            )


def is_quantizable(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether it is a weight of a kind that MLX quantizes: that of an `nn.Linear`, an
    `nn.Embedding` or a `Conv1D`, or a stack of experts."""
    path, _, own = name.rpartition(".")
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return False
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return own == "weight" and module.max_norm is None
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return own == "weight"
    return parameter.dim() == 3 and own.endswith("proj") and "expert" in path


def relative_loss(new: AffineQuantizedTensor, old: Tensor) -> float:
    """The L2 norm of the change of a weight, over that of the weight.

    Some rows, or experts, at a time: a weight has few copies in memory.
    """
    change, norm = 0.0, 0.0
    step = max(1, _BLOCK * len(old) // max(1, old.numel()))
    for start in range(0, len(old), step):
        before = dense(old[start : start + step]).double()
        norm += before.square().sum().item()
        after: Any = new[start : start + step]
        before -= after.dequantize(torch.float64)
        change += before.square().sum().item()
    return math.sqrt(change / norm) if norm else 0.0


_BLOCK = 1 << 20  # weights
