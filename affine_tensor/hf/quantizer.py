"""The quantizer: what transformers' `from_pretrained` calls while it loads a model.

transformers builds the model on the meta device, asks for the tensors of a state dict
one after the other, and puts them into the modules. The state dict that it gets from
here is empty at first. When the model stands, the quantizer plans where each of its
parameters lies in the checkpoint (`checkpoint.load.make_plan`, which raises if anything
is missing, unexpected or of the wrong shape) and fills the state dict with the model's
own names; a tensor is read when transformers asks for it, on the device where it goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, build_glob_alternation
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.files import Checkpoint, StoredTensor, cast, move
from ..checkpoint.forms import Stored
from ..checkpoint.load import (
    LoadReport,
    Plan,
    Planned,
    as_parameter,
    check_repeated,
    make_plan,
)
from ..checkpoint.mlx import AffineWeight
from ..checkpoint.names import is_tower
from ..distributed import freeze_shards
from ..quantize import AffineConfig, dequantize_
from ..tensor import AffineQuantizedTensor, logger
from .choices import Choices
from .config import METHOD, AffineQuantizationConfig
from .lazy import Lazy, Whole


@dataclass
class Loading:
    """One load: the checkpoint, and what transformers is given of it."""

    checkpoint: Checkpoint
    report: LoadReport
    state: dict[str, Lazy] = field(default_factory=dict)
    plan: Plan | None = None
    seeing: bool = True  # False: the checkpoint has no tower though the class has
    sink: Any = None  # takes the quantized tensors instead of the model; see convert.py


# The load of this thread: transformers makes the quantizer itself.
current: ContextVar[Loading | None] = ContextVar("affine_tensor_loading", default=None)


class _PlannedTensor(Whole):
    def __init__(
        self, item: Planned, dtype: torch.dtype, dense: bool, report: LoadReport
    ) -> None:
        self.item, self.dtype, self.dense, self.report = item, dtype, dense, report
        self.name = item.target.name

    def get_shape(self) -> list[int]:
        return list(self.item.target.parameter.shape)

    def read(self, device: torch.device) -> Tensor:
        value = self.item.read(self.dtype, device)
        if self.dense and isinstance(value, AffineQuantizedTensor):
            value = value.dequantize(self.dtype).contiguous()
        elif self.dense and hasattr(value, "affine_parts"):
            del value.affine_parts
        return value

    def read_rows(self, start: int, stop: int) -> Tensor | None:
        leaves = list(self.item.leaves.values())
        if self.dense or not isinstance(self.item.form, Stored) or len(leaves) != 1:
            return None
        leaf = leaves[0]
        if type(leaf) is not AffineWeight or list(leaf.shape) != self.get_shape():
            return None
        return leaf.experts(start, stop).read(self.dtype, torch.device("cpu"))

    def finish(self, value: Tensor) -> Tensor:
        self.report.note(self.item, value)
        if isinstance(value, AffineQuantizedTensor):
            return nn.Parameter(value, requires_grad=False)
        if hasattr(value, "affine_parts"):
            return as_parameter(value, requires_grad=True)
        return value


class DenseTensor(Lazy):
    """A stored tensor of a dense checkpoint, read without a memory map."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self.dtype = stored.dtype

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        value = self.stored.read()
        if dtype is not None:
            value = cast(self.stored.name, value, dtype)
        return move(value, torch.device(device or "cpu"))


@register_quantizer(METHOD)
class AffineQuantizer(HfQuantizer):
    """Packed weights in stock modules; see the module's text."""

    requires_calibration = False
    quantization_config: AffineQuantizationConfig

    def __init__(
        self, quantization_config: AffineQuantizationConfig, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading = current.get()
        self._choices: Choices | None = None
        self._sizes: dict[str, float] = {}
        self.sink = None if self._loading is None else self._loading.sink

    # ---- what transformers asks before the weights come ---------------------------

    def validate_environment(
        self, *args: Any, device_map: Any = None, **_: Any
    ) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(str(place) == "disk" for place in places):
            raise ValueError(
                "device_map leaves a part of the model on disk, from where packed weights "
                "cannot be run. Give it more memory (max_memory), or map the modules "
                "to devices and 'cpu' only"
            )

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        self._dtype = dtype or model.dtype
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._plan(model)
        else:
            self._choices = Choices(model, self.quantization_config)
            if self.sink is not None:
                self._choices.check_for_mlx()

    def _plan(self, model: Any) -> None:
        loading = self._loading
        if loading is None:
            raise ValueError(
                "this checkpoint is read by affine_tensor: call affine_tensor.register() "
                "before transformers' from_pretrained, or use "
                "affine_tensor.from_pretrained"
            )
        if not loading.seeing:
            drop_towers(model)
        loading.plan = make_plan(model, loading.checkpoint)
        loading.report.ignored = loading.plan.ignored
        dtypes = _dtypes(model, self._dtype)
        dense = self.quantization_config.dequantize
        for item in loading.plan.items:
            name = item.target.name
            tensor = _PlannedTensor(item, dtypes[name], dense, loading.report)
            loading.state[name] = tensor
            packed = [
                v for v in item.leaves.values() if not isinstance(v, StoredTensor)
            ]
            if packed and not dense:
                self._sizes[name] = item.nbytes / max(1, item.target.parameter.numel())
        for module in model.modules():
            if isinstance(module, nn.Embedding) and not [
                *module.buffers(recurse=False)
            ]:
                # Some models would set the row of the padding to zero afterwards. What
                # has buffers (Gemma's scale) needs its values of them.
                module._is_hf_initialized = True  # type: ignore[assignment]

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        # transformers before 5.20 does not give the model.
        if self.pre_quantized:
            return []  # the state dict has the model's own names
        return super().update_weight_conversions(weight_conversions, *model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        return None  # each tensor is cast where it is read

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        own = self._sizes.get(param_name)
        if own is None and not self.pre_quantized:
            config = self._config_for(model, param_name, param)
            if config is not None:
                own = config.bits / 8 + 2 * param.element_size() / config.group_size
        return param.element_size() if own is None else own

    # ---- quantizing a dense checkpoint ----------------------------------------------

    def param_needs_quantization(
        self, model: Any, param_name: str, **kwargs: Any
    ) -> bool:
        if self.pre_quantized:
            return False
        if self.sink is not None:
            return True  # dense ones go there too
        param = model.get_parameter_or_buffer(param_name)
        return self._config_for(model, param_name, param) is not None

    def _config_for(
        self, model: Any, name: str, parameter: Tensor
    ) -> AffineConfig | None:
        """How this parameter is quantized, or None."""
        if self._choices is None:
            self._choices = Choices(model, self.quantization_config)
        config = self._choices.config_for(name, parameter)
        return config if isinstance(config, AffineConfig) else None

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def quantized(self, model: Any, name: str, value: Tensor) -> Tensor:
        """The parameter as MLX would have quantized it, packed where that can be."""
        assert self._choices is not None
        form, pieces, reasons = self._choices.pieces(name, value)
        if self.sink is not None:
            self.sink.add(pieces, reasons, value.dtype)
            return torch.empty_like(value, device="meta")
        for leaf, reason in reasons.items():
            logger.info("%s stays dense: %s", leaf, reason)
        if not any(isinstance(p, AffineQuantizedTensor) for p in pieces.values()):
            return value
        whole = form.load(pieces.__getitem__)
        if isinstance(whole, AffineQuantizedTensor):
            return nn.Parameter(whole, requires_grad=False)
        whole = whole.to(value.dtype)
        whole.affine_parts = [  # type: ignore[attr-defined]
            piece if isinstance(piece, AffineQuantizedTensor) else None
            for piece in map(pieces.__getitem__, form.names())
        ]
        return as_parameter(whole, requires_grad=True)

    # ---- afterwards -----------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        freeze_shards(model)
        loading, self._loading, self._choices = self._loading, None, None
        if loading is not None and loading.plan is not None:
            check_repeated(loading.plan)
            report = loading.report
            (logger.warning if report.notes else logger.info)("%s", report)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dequantize_(model, dtype)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        return None, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the packed weights

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """The last step of reading a tensor of a dense checkpoint."""

    def __init__(self, quantizer: AffineQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *_: Any, model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            values[name] = self.quantizer.quantized(model, name, tensor)
        return values


def drop_towers(model: nn.Module) -> None:
    """Take out what the checkpoint does not have: towers, still on the meta device."""
    for path in tower_modules(model):
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, None)


def tower_modules(model: nn.Module) -> Iterable[str]:
    """The outermost modules that see or hear."""
    found: list[str] = []
    for name, _ in model.named_modules():
        if is_tower(name) and not any(name.startswith(f"{f}.") for f in found):
            found.append(name)
    return found


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each parameter and buffer: the model's, that of the parameter where
    the model made it otherwise, float32 for those that it wants in float32."""
    plan = model._get_dtype_plan(dtype)
    pattern: re.Pattern[str] | None = None
    groups: dict[str, str] = {}
    if plan:
        pattern, groups, _ = build_glob_alternation(list(plan))
    dtypes = {}
    for name, value in model.state_dict(keep_vars=True).items():
        match = pattern.search(name) if pattern is not None else None
        dtypes[name] = value.dtype
        if match and match.lastgroup and value.is_floating_point():
            dtypes[name] = plan[groups[match.lastgroup]]
    return dtypes
