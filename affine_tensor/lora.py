"""Adapters beside packed weights (PEFT): `prepare_for_lora`, `merge_to_dense`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from . import layout
from .quantize import AffineConfig, slots
from .tensor import AffineQuantizedTensor, logger

Model = TypeVar("Model", bound=nn.Module)


def prepare_for_lora(model: Model, *, gradient_checkpointing: bool = True) -> Model:
    """Make a model ready for adapters, in place, and return it.

    What PEFT's `prepare_model_for_kbit_training` is for, and no more: all parameters are
    frozen; with `gradient_checkpointing` that is on (the non-reentrant kind; it acts in
    training mode), and the embeddings' output asks for a gradient, which the reentrant
    kind would need. No parameter is cast: dense ones, norms as a rule, stay frozen in
    the dtype that they have, and PEFT itself makes the adapters float32.

    Training makes no packed weight dense, but for the norms of DoRA, one weight at a
    time, and experts with several active adapters, which the log then says.

    Call it before ``get_peft_model`` or ``add_adapter``: it would freeze adapters, so it
    raises ValueError where there are some; also where `gradient_checkpointing` is asked
    of a model that has none.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model has adapters, which prepare_for_lora would freeze. Call it before "
            "get_peft_model or add_adapter"
        )
    if gradient_checkpointing and not _has_checkpointing(model):
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing; pass "
            "gradient_checkpointing=False"
        )
    for parameter in model.parameters():
        parameter.requires_grad = False
    if gradient_checkpointing:
        _checkpoint(model)
    return model


def _has_checkpointing(model: Any) -> bool:
    return hasattr(model, "gradient_checkpointing_enable") and getattr(
        model, "supports_gradient_checkpointing", True
    )


def _checkpoint(model: Any) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # what it will be called
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


# ---- merging --------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What quantizing a merged weight cost it, as relative L2."""

    weight: float  # of the merged weight
    change: float  # of what the adapters changed: at 1 nothing is left of it

    def __str__(self) -> str:
        return f"{self.weight:.2%} of the weight, {self.change:.0%} of the change"


@dataclass
class MergeReport:
    """What `merge_to_dense` lost by requantizing, by the name of the parameter."""

    losses: dict[str, Loss] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.losses:
            return "no merged weight was requantized"
        name, worst = max(self.losses.items(), key=lambda item: item[1].change)
        changes = [loss.change for loss in self.losses.values()]
        mean = sum(changes) / len(changes)
        count = len(self.losses)
        return (
            f"{count} merged {'weight was' if count == 1 else 'weights were'} "
            f"requantized, which costs {mean:.0%} of what the adapters changed in the "
            f"mean (relative L2); the worst is {name}: {worst}"
        )


@overload
def merge_to_dense(
    model: nn.Module,
    *,
    requantize: None = None,
    adapter_names: Sequence[str] | None = None,
) -> Any: ...


@overload
def merge_to_dense(
    model: nn.Module,
    *,
    requantize: AffineConfig,
    adapter_names: Sequence[str] | None = None,
) -> tuple[Any, MergeReport]: ...


def merge_to_dense(
    model: nn.Module,
    *,
    requantize: AffineConfig | None = None,
    adapter_names: Sequence[str] | None = None,
) -> Any:
    """Merge PEFT's adapters into dense weights, and return the base model without them.

    `model` is a PEFT model, or a transformers model with `add_adapter`; it is used up.
    Weights under the active adapters (or `adapter_names`) become dense, of the dtype
    that they counted as: added in float32, rounded once. Other packed weights stay as
    they are; `dequantize_` makes them dense too. Trained copies (`modules_to_save`) take
    the place of their modules.

    With `requantize`, weights that were packed are quantized again, and the result is
    ``(model, report)``: what that lost, also in the log. At 4 bits most of a small
    adapter is lost; 8 bits keep it.

    Raises ValueError, with nothing changed, for adapters that have no merge (prompts),
    for weights that do not fit `requantize`, and where the sum is NaN or infinite.
    """
    base, groups = _base(model), _groups(model)
    names = None if adapter_names is None else list(adapter_names)
    _check(groups, names, requantize)
    report = MergeReport()
    new = [_merged(group, names, requantize, report) for group in groups]
    ties = [[place[1:] for place in slot.places] for slot in slots(base).values()]
    for group, parameters in zip(groups, new, strict=True):
        group.base._parameters.update(parameters)
    for places in ties:
        _retie(places)
    _unload(base, names)
    _note_untied(base)
    if requantize is None:
        return base
    logger.warning("%s", report)
    return base, report


def _tuners() -> Any:
    return importlib.import_module("peft.tuners.tuners_utils")


def _base(model: Any) -> Any:
    """The model whose layers the adapters stand beside."""
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError("merge_to_dense needs peft: pip install peft") from error
    if not isinstance(model, peft.PeftModel):
        if next(_layers(model), None) is None:
            raise ValueError(f"{type(model).__name__} has no adapters of PEFT to merge")
        return model
    if not isinstance(model.base_model, _tuners().BaseTuner):
        raise ValueError(
            f"{model.peft_type} has no weights that could be merged into the model's"
        )
    return model.base_model.model


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers beside those of the model, by name."""
    kind = _tuners().BaseTunerLayer
    for name, module in model.named_modules():
        if isinstance(module, kind):
            yield name, module


@dataclass
class _Group:
    """A module of the base model and the layers of PEFT around it, outermost first."""

    name: str
    base: nn.Module
    layers: list[Any]

    def touched(self, names: list[str] | None) -> dict[str, nn.Parameter]:
        """The parameters that merging would change."""
        found = {}
        for layer in self.layers:
            wanted = layer.active_adapters if names is None else names
            if set(wanted) & set(layer._get_available_adapters()):
                # One among several, experts say; else all of the module's.
                only = getattr(layer, "parameter_name", None)
                for own, parameter in self.base._parameters.items():
                    if parameter is not None and only in (None, own):
                        found[own] = parameter
        return found


# Steps on the way to a module that PEFT adds, and the base model lacks.
_OF_PEFT = re.compile(
    r"^base_model\.model\.|\.(base_layer|original_module|token_adapter"
    r"|modules_to_save\.[^.]+)(?=\.|$)"
)


def _groups(model: nn.Module) -> list[_Group]:
    groups: dict[int, _Group] = {}
    for name, layer in _layers(model):
        base = layer.get_base_layer()
        group = _Group(_OF_PEFT.sub("", name), base, [])
        groups.setdefault(id(base), group).layers.append(layer)
    return list(groups.values())


def _check(
    groups: list[_Group], names: list[str] | None, config: AffineConfig | None
) -> None:
    """Raise ValueError for what could not be done, before anything is."""
    known = {
        n for g in groups for layer in g.layers for n in layer._get_available_adapters()
    }
    if names is not None and not known.issuperset(names):
        raise ValueError(
            f"adapter_names is {names}; there are {', '.join(sorted(known))}"
        )
    for group in groups:
        for own, parameter in group.touched(names).items():
            name = f"{group.name}.{own}"
            if parameter.is_meta:
                raise ValueError(
                    f"{name} is offloaded (on the meta device); load the model with "
                    "device_map='cpu' to merge adapters"
                )
            if config is None or not isinstance(parameter, AffineQuantizedTensor):
                continue
            columns = parameter.shape[-2 if parameter.transposed else -1]
            reason = layout.why_not(
                columns, bits=config.bits, group_size=config.group_size
            )
            if reason is not None:
                raise ValueError(f"{name} cannot be requantized: {reason}")
        if type(group.base) is nn.MultiheadAttention:
            raise ValueError(
                f"{group.name} is an nn.MultiheadAttention, whose adapters are not merged "
                "here; dequantize_ the model and use PEFT's merge_and_unload"
            )


def _merged(
    group: _Group,
    names: list[str] | None,
    config: AffineConfig | None,
    report: MergeReport,
) -> dict[str, nn.Parameter]:
    """New parameters: PEFT merges into wide copies, which stand in for a moment."""
    before = group.touched(names)
    copies = {own: _wide_copy(parameter) for own, parameter in before.items()}
    new = {}
    with torch.no_grad(), _instead(group.base, copies):
        for layer in group.layers:
            _merge(group.name, layer, names)
        for own, old in before.items():
            value = group.base._parameters[own]
            assert value is not None
            tensor: Tensor = value.detach().to(old.dtype)
            if config is not None and isinstance(old, AffineQuantizedTensor):
                tensor = _requantized(tensor, old, config)
                report.losses[f"{group.name}.{own}"] = _loss(old, value, tensor)
            new[own] = nn.Parameter(tensor, requires_grad=False)
    return new


def _merge(name: str, layer: Any, names: list[str] | None) -> None:
    """PEFT's merge of one layer; what it notes about that is taken back."""
    kept = list(layer.merged_adapters)
    try:
        layer.merge(safe_merge=True, adapter_names=names)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        reason = str(error) or f"{type(layer).__name__} has no merge"
        raise ValueError(f"{name}: {reason}") from error
    finally:
        layer.merged_adapters[:] = kept


def _wide_copy(parameter: Tensor) -> nn.Parameter:
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    if isinstance(parameter, AffineQuantizedTensor):
        dense = parameter.dequantize(wide).contiguous()
    else:
        dense = parameter.detach().to(wide, copy=True)
    return nn.Parameter(dense, requires_grad=False)


@contextmanager
def _instead(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    kept = {own: module._parameters[own] for own in parameters}
    module._parameters.update(parameters)
    try:
        yield
    finally:
        module._parameters.update(kept)


def _requantized(
    value: Tensor, old: AffineQuantizedTensor, config: AffineConfig
) -> AffineQuantizedTensor:
    """Packed along the axis along which the old one was."""
    rows = value.transpose(-1, -2).contiguous() if old.transposed else value
    new = AffineQuantizedTensor.from_dense(rows, config.bits, config.group_size)
    return new._map(lambda part: part, transposed=True) if old.transposed else new


def _loss(
    old: AffineQuantizedTensor, value: Tensor, new: AffineQuantizedTensor
) -> Loss:
    wide = value.dtype
    lost = float((new.dequantize(wide) - value).norm())
    change = float((value - old.dequantize(wide)).norm())
    norm = float(value.norm())
    return Loss(lost / norm if norm else 0.0, lost / change if change else 0.0)


def _retie(places: list[tuple[nn.Module, str]]) -> None:
    """One parameter again for all places that shared one, if all came out equal."""
    first, *others = [module._parameters[own] for module, own in places]
    if first is not None and all(
        other is first
        or (other is not None and type(other) is type(first) and other.equal(first))
        for other in others
    ):
        for module, own in places:
            module._parameters[own] = first


def _unload(base: Any, names: list[str] | None) -> None:
    """Take PEFT's modules out of the model."""
    wrappers = importlib.import_module("peft.utils.other")
    gone: list[str] = []
    for name, module in list(base.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in gone):
            continue
        if isinstance(module, wrappers.ModulesToSaveWrapper):
            own = _trained(module, names)
        elif isinstance(module, wrappers.TrainableTokensWrapper):
            own = module.token_adapter.get_base_layer()
        elif isinstance(module, _tuners().BaseTunerLayer):
            own = module.get_base_layer()
        else:
            continue
        gone.append(name)
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, own)
    base.__dict__.pop("peft_config", None)
    if getattr(base, "_hf_peft_config_loaded", False):
        base._hf_peft_config_loaded = False


def _trained(wrapper: Any, names: list[str] | None) -> nn.Module:
    """The copy of a module that was trained, or the module where none is asked for."""
    wanted = wrapper.active_adapters if names is None else names
    copies = [
        wrapper.modules_to_save[n] for n in wanted if n in wrapper.modules_to_save
    ]
    module: Any = copies[0] if copies else wrapper.original_module
    module = module.get_base_layer() if hasattr(module, "base_layer") else module
    return module.requires_grad_(False)


def _note_untied(base: Any) -> None:
    """Have the configuration say that embeddings and head are no longer one weight."""
    config: Any = getattr(base, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    try:
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return
    first, last = (getattr(end, "weight", None) for end in ends)
    if first is None or last is None or first is last:
        return
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    logger.warning(
        "embeddings and head shared a weight, of which the adapter changed one: they are "
        "two weights now, and config.tie_word_embeddings is False"
    )
