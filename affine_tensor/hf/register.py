"""`register()`: transformers' own `from_pretrained` reads MLX checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import MetalConfig

from ..checkpoint import mlx
from ..checkpoint.families import TRANSFORMERS_TYPES
from ..checkpoint.files import fetch, open_checkpoint, probe, read_json
from ..tensor import logger
from . import loading
from .config import AffineQuantizationConfig

_HUB = ("revision", "cache_dir", "token", "local_files_only")


def register() -> None:
    """Let ``AutoModelForCausalLM.from_pretrained("mlx-community/…-4bit")`` just work.

    From then on, in this process, `from_pretrained` of every model of transformers
    looks at config.json first: MLX checkpoints, those that its `MetalConfig` wrote, and
    dense ones with an `AffineQuantizationConfig` or `MetalConfig` are loaded by
    this library; everything else goes on as ever. `save_pretrained` of a model
    with packed weights writes an MLX checkpoint. Calling it again changes nothing. If
    transformers itself reads MLX's format one day, its own way is left in place.
    """
    if getattr(PreTrainedModel.from_pretrained, "_affine_tensor", False):
        return
    stock: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    for model_type, own in TRANSFORMERS_TYPES.items():
        if model_type not in CONFIG_MAPPING and own in CONFIG_MAPPING:
            CONFIG_MAPPING.register(model_type, CONFIG_MAPPING[own])

    @functools.wraps(stock)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        source = pretrained_model_name_or_path
        if args or not _is_ours(source, kwargs):
            return stock(cls, source, *args, **kwargs)
        return _load(cls, source, kwargs)

    from_pretrained._affine_tensor = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore


def _is_ours(source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this load is for us; what cannot be told is transformers'."""
    given = kwargs.get("quantization_config")
    others = ("state_dict", "gguf_file", "subfolder", "variant", "from_tf")
    if source is None or any(kwargs.get(name) for name in others):
        return False
    if isinstance(given, AffineQuantizationConfig | MetalConfig):
        return True
    if given is not None:
        return False
    try:
        config = probe(source, **_hub(kwargs))
        if config and not mlx.settings(config) and Path(source).is_dir():
            return mlx.recognizes(open_checkpoint(Path(source)))  # by its tensors
    except Exception:  # transformers says it better
        return False
    return mlx.recognizes_config(config) and not _known_to_transformers(config)


def _known_to_transformers(config: dict[str, Any]) -> bool:
    """Whether transformers would read this checkpoint itself, and not as MetalConfig."""
    for settings in mlx.settings(config)[:1]:
        if settings.get("quant_method") in ("metal", "affine"):
            return False
        try:
            known = AutoHfQuantizer.supports_quant_method(settings)
        except ValueError:  # it has no quant_method, which is MLX's way
            return False
        if known:
            logger.info("transformers reads this format itself; its way is taken")
        return bool(known)
    return False


def _hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}


def _load(model_class: Any, source: Any, kwargs: dict[str, Any]) -> Any:
    hub = _hub(kwargs)
    given = as_affine(kwargs.pop("quantization_config", None))
    config = kwargs.pop("config", None)
    kwargs.pop("_from_auto", None)  # which auto classes pass on only sometimes
    chosen = "adapter_kwargs" in kwargs  # and this always
    adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
    adapter_name = kwargs.pop("adapter_name", "default")
    for name, refused in _REFUSED.items():
        if kwargs.get(name):
            raise ValueError(f"{name} is not taken with packed weights: {refused}")
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False: only safetensors is read")
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    rest = {k: v for k, v in kwargs.items() if k not in (*_HUB, *_DROPPED)}
    checkpoint = open_checkpoint(fetch(source, **hub))
    if config is None or isinstance(config, (str, Path)):
        config, rest = model_class.config_class.from_pretrained(
            config or checkpoint.folder, return_unused_kwargs=True, **rest
        )
    result = loading.load(
        model_class,
        source,
        checkpoint,
        config,
        quantization_config=given,
        chosen=chosen,
        dtype=dtype,
        **rest,
    )
    # The repository was an adapter's, and this its base; or it has one beside.
    path = adapter.pop("_adapter_model_path", None)
    if path is None and has_adapter(checkpoint.folder):
        path = str(checkpoint.folder)
    if path is not None:
        model = result[0] if isinstance(result, tuple) else result
        model.load_adapter(path, adapter_name=adapter_name, adapter_kwargs=adapter)
    return result


# What auto classes pass on, and has no meaning once the files are here.
_DROPPED = (
    "_from_pipeline",
    "code_revision",
    "force_download",
    "proxies",
    "state_dict",
    "torch_dtype",
    "use_safetensors",
)
_FETCH_FIRST = (
    "fetch the files with huggingface_hub.snapshot_download, and pass the folder"
)
_REFUSED = {"force_download": _FETCH_FIRST, "proxies": _FETCH_FIRST}


def has_adapter(folder: Path) -> bool:
    """Whether an adapter of PEFT lies beside the model's own weights."""
    return "peft_type" in read_json(folder / "adapter_config.json")


def as_affine(given: Any) -> AffineQuantizationConfig | None:
    """Our configuration, from ours or from transformers' `MetalConfig`."""
    if given is None or isinstance(given, AffineQuantizationConfig):
        return given
    if isinstance(given, MetalConfig):
        return AffineQuantizationConfig(
            given.bits, given.group_size, given.modules_to_not_convert, given.dequantize
        )
    raise TypeError(
        f"quantization_config is a {type(given).__name__}; an "
        "AffineQuantizationConfig is needed for this checkpoint"
    )
