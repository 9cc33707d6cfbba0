"""Which weights of a transformers model are quantized, and their quantized pieces."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
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

# The error of the first weight that could not be quantized, within `telling`.
_failures: ContextVar[list[Exception] | None] = ContextVar(
    "affine_tensor_failures", default=None
)


@contextmanager
def telling() -> Iterator[None]:
    """Of a load of transformers', which goes on after an error in one weight and says
    only that there was one: raise that error, and quantize nothing more after it."""
    failed: list[Exception] = []
    token = _failures.set(failed)
    try:
        yield
    except Exception as error:
        if failed:
            raise failed[0] from error
        raise
    finally:
        _failures.reset(token)


class Choices:
    """What a configuration means for one model."""

    def __init__(self, model: Any, config: AffineQuantizationConfig) -> None:
        self.model, self.names = model, Names(model)
        self.default = AffineConfig(config.bits, config.group_size)
        self._left_out = list(config.modules_to_not_convert or [])
        self._skipped = [matcher(pattern) for pattern in self._left_out]
        self._kept = [
            *(getattr(model, "_keep_in_fp32_modules", None) or []),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or []),
        ]
        tensors = model.state_dict(keep_vars=True).items()
        self._shapes = {name: value.shape for name, value in tensors}
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
        if any(matches(name) for matches in self._skipped):
            return "left out by modules_to_not_convert"
        if not should_convert_module(name.rpartition(".")[0], self._kept):
            return f"{type(self.model).__name__} keeps it in float32"
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
        them, by their names; and why matrices among them stay dense. Raises ValueError,
        which names it, for NaN and infinite values, and for another shape than the
        model's, which transformers does not look at here."""
        failed = _failures.get()
        if failed:
            raise failed[0]
        try:
            shape = self._shapes.get(name, value.shape)
            if value.shape != shape:
                raise ValueError(
                    f"its shape is {list(value.shape)}, and the model's {list(shape)}. "
                    "config.json and the weights are not of one model"
                )
            return self._pieces(name, value)
        except ValueError as error:
            named = ValueError(f"{name}: {error}")
            if failed is not None:
                failed.append(named)
            raise named from error

    def _pieces(
        self, name: str, value: Tensor
    ) -> tuple[Form, dict[str, Tensor], dict[str, str]]:
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


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a module to leave dense means the parameter of a name.

    It is the beginning or end of the name of the module, or of one around it, as
    transformers has it, which takes regular expressions too; or a pattern with `*` for
    one of these names, as in recipes. Raises ValueError for what can be neither.
    """
    if not pattern:
        raise ValueError("the name of a module that is to stay dense is empty")
    glob = re.search(r"[*?[]", pattern) and not re.search(r"^\.|[\\()|^$+{]", pattern)
    if not glob:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is to stay dense, and is no pattern: {error}. Give the "
                "beginning or end of a module's name, or one with '*'"
            ) from error

    def matches(name: str) -> bool:
        first, *around = _levels(name.removesuffix(".weight"))
        if glob:
            return any(fnmatchcase(own, pattern) for own in (first, *around))
        # The end of the name of its own may be a part of a word: "_proj".
        return not should_convert_module(first, [pattern]) or any(
            own.endswith(f".{pattern}") or own == pattern for own in around
        )

    return matches


def _levels(name: str) -> list[str]:
    """The name, and those of the modules around it, from within."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def check_skipped(model: nn.Module, skip: Iterable[str]) -> None:
    """Raise ValueError for a name of modules to leave out that leaves none out."""
    values = {slot.name: slot.parameter for slot in slots(model).values()}
    quantized = [
        name
        for name, paths in recipes.module_paths(model).items()
        if is_quantizable(model, name, values[name])
        or any(recipes.is_linear_router(model, path) for path in paths)
    ]
    for pattern in skip:
        matches = matcher(pattern)
        if not any(map(matches, quantized)):
            raise ValueError(
                f"{pattern!r} is to stay dense, and {_why_none(model, matches)}"
            )


def _why_none(model: nn.Module, matches: Callable[[str], bool]) -> str:
    """Why no weight that is quantized has a name that matches."""
    for name, first in recipes.tied(model).items():
        if matches(name):
            alias, own = (n.removesuffix(".weight") for n in (name, first))
            return (
                f"{alias} has no weight of its own: it is tied to {own}. Name {own} to "
                "leave both dense"
            )
    modules = [name for name, _ in model.named_modules() if name]
    if any(matches(name) for name in modules):
        return (
            f"no weight of {type(model).__name__} that is quantized has such a name: what "
            "has it is dense anyway. Leave it out"
        )
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in modules)
    names = [name for name in kinds if not name.isdigit()]
    return (
        f"{type(model).__name__} has no such module. Its modules are called "
        f"{', '.join(names)}"
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
