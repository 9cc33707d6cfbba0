"""`from_pretrained`: a stock transformers model from an MLX checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import layout
from ..checkpoint import formats
from ..checkpoint.families import TRANSFORMERS_TYPES
from ..checkpoint.files import (
    Checkpoint,
    CheckpointError,
    as_dtype,
    fetch,
    open_checkpoint,
)
from ..checkpoint.load import why_not_mlx
from . import loading
from .register import as_affine, has_adapter


def from_pretrained(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = "auto",
    device_map: Any = None,
    model_class: Any = AutoModelForCausalLM,
    quantization_config: QuantizationConfigMixin | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> Any:
    """Load an MLX checkpoint into the stock transformers model of its architecture.

    `source` is a folder or a Hub repository. The model is `model_class` (an auto class
    or a class of models), in evaluation mode; its Linear and Embedding modules are
    torch's own, with packed weights. `dtype` is what it computes in: float32, float16,
    bfloat16 or float64, or its name; "auto" or None: the one that config.json names.
    `device_map` is transformers' own: a device, "auto", or a dict of modules; nothing
    can be left on disk. Where the checkpoint has text alone (mlx-lm drops the towers of
    models that see), it is the text class.

    With a `quantization_config` (`AffineQuantizationConfig`) a dense checkpoint is
    quantized weight by weight while it is read; its `dequantize` makes an MLX checkpoint
    dense. Further keywords are those of transformers' `from_pretrained`, or change the
    configuration, as they do there.

    Raises `CheckpointError` where the checkpoint's tensors do not fit the model,
    missing ones included, ValueError for another dtype or a map to disk, TypeError for
    keywords that nothing knows, and what huggingface_hub and transformers raise.
    """
    if dtype is None:
        dtype = "auto"
    if dtype != "auto":
        dtype = as_dtype(dtype, layout.LOGICAL_DTYPES, "auto")
    _refuse(options)
    given = as_affine(quantization_config)
    folder = fetch(
        source,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    checkpoint = open_checkpoint(folder)
    if given is None and not formats.recognizes(checkpoint):
        raise CheckpointError(
            f"{folder} is not in MLX format: {why_not_mlx(checkpoint)}"
        )
    passed = {name: options.pop(name) for name in _PASSED if name in options}
    config, unknown = _read_config(checkpoint, options)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: neither an argument of from_pretrained nor a setting "
            f"of {type(config).__name__}"
        )
    refuse_adapter(folder)
    own_class, config = _class_of(model_class, config)
    return loading.load(
        own_class,
        source,
        checkpoint,
        config,
        quantization_config=given,
        chosen=own_class is not model_class,
        dtype=dtype,
        device_map=device_map,
        **passed,
    )


# What is not a setting of the configuration, and goes to transformers' from_pretrained.
_PASSED = (
    "distributed_config",
    "experts_implementation",
    "generation_config",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "output_loading_info",
    "sink",
    "tp_plan",
    "tp_size",
    "trust_remote_code",
    "use_kernels",
)


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError if there is an adapter beside the weights."""
    if has_adapter(folder):
        raise CheckpointError(
            f"{folder} has an adapter beside the weights (adapter_config.json). Call "
            "affine_tensor.register() and transformers' from_pretrained, which loads both, "
            "or remove that file"
        )


def _read_config(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[Any, Any]:
    """The configuration, and the options that are no settings of it."""
    model_type = str(checkpoint.config.get("model_type"))
    own = TRANSFORMERS_TYPES.get(model_type)
    known = model_type in CONFIG_MAPPING
    if known and "text_config" in checkpoint.config:  # a tower of that name does not do
        known = "text_config" in CONFIG_MAPPING[model_type].sub_configs
    if own is None or known or own not in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(
            checkpoint.folder, return_unused_kwargs=True, **options
        )
    cls: Any = CONFIG_MAPPING[own]
    settings, options = cls.get_config_dict(checkpoint.folder, **options)
    settings["model_type"] = own
    config, unknown = cls.from_dict(settings, return_unused_kwargs=True, **options)
    return config, unknown


def _class_of(model_class: Any, config: Any) -> tuple[Any, Any]:
    """The class of models that an auto class gives for a configuration, and the
    configuration that it takes: that of the text alone for some."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class, config
    if model_class is AutoModelForCausalLM:
        own = _other_than_text(config)
        if own is not None:
            return own, config
    if model_class is AutoModelForCausalLM and type(config) not in mapping:
        model_class = AutoModelForImageTextToText  # generates text too
        mapping = model_class._model_mapping
    if type(config) not in mapping:
        raise ValueError(
            f"{model_class.__name__} has no model for {type(config).__name__}. Pass the "
            "class of models, or another auto class, as model_class"
        )
    found = mapping[type(config)]
    if isinstance(found, (list, tuple)):
        architectures = getattr(config, "architectures", None) or [None]
        by_name = {one.__name__: one for one in found}
        found = by_name.get(architectures[0], found[0])
    text = getattr(config, "sub_configs", {}).get("text_config")
    if text is not None and getattr(found, "config_class", None) is text:
        config = config.get_text_config()
    return found, config


def _other_than_text(config: Any) -> Any:
    """The class that config.json names, of a model that does not continue a text or has
    an encoder: nobody asked for another, and auto classes know its decoder at the most."""
    known = (
        AutoModelForCausalLM._model_mapping,
        AutoModelForImageTextToText._model_mapping,
    )
    continues = any(type(config) in mapping for mapping in known)
    if continues and not getattr(config, "is_encoder_decoder", False):
        return None
    name = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, name, None) if name else None
    return found if getattr(found, "config_class", None) is type(config) else None


def _refuse(keywords: dict[str, Any]) -> None:
    """Raise TypeError for what transformers' loaders take, and would be lost here."""
    for name in _LOST.keys() & keywords:
        raise TypeError(f"{name} is not taken: {_LOST[name]}")


# AutoConfig takes them as its own, so that they would seem to have an effect.
_FETCH_FIRST = (
    "fetch the files with huggingface_hub.snapshot_download, and pass the folder that "
    "it returns"
)
_LOST = {
    "subfolder": "a checkpoint is one folder. Fetch the repository with "
    "huggingface_hub.snapshot_download, and pass the path of the folder in it",
    "force_download": _FETCH_FIRST,
    "proxies": _FETCH_FIRST,
    "gguf_file": "only safetensors is read",
}
