"""One load through transformers' own `from_pretrained`, with our reader below it.

`affine_tensor.from_pretrained` and, after `register()`, transformers' end here.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.hub import extract_commit_hash

from .. import layout
from ..checkpoint import formats, mlx
from ..checkpoint.files import CONFIG, Checkpoint, CheckpointError
from ..checkpoint.load import LoadReport
from ..checkpoint.names import is_tower
from ..tensor import logger
from . import attention
from .choices import telling
from .config import METHOD, AffineQuantizationConfig
from .quantizer import DenseTensor, Loading, current

attention.register()

# The stock one, whatever `register` puts in its place.
_stock_from_pretrained = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

# transformers changes what all threads share while it builds, the default dtype say.
_one_at_a_time = threading.RLock()


def load(
    model_class: Any,
    source: str | Path,
    checkpoint: Checkpoint,
    config: Any,
    *,
    quantization_config: AffineQuantizationConfig | None = None,
    chosen: bool = False,
    sink: Any = None,
    **kwargs: Any,
) -> Any:
    """The model of `model_class` and `config` from the checkpoint.

    A checkpoint in MLX format decides how it is quantized; a dense one is quantized as
    `quantization_config` says. `chosen` is whether an auto class chose `model_class`.
    `kwargs` are those of transformers' `from_pretrained`.
    """
    _refuse(kwargs)
    folder = checkpoint.folder
    config = copy.deepcopy(config)
    if type(config).model_type:  # not MLX's name of it, which is what the file may have
        config.model_type = type(config).model_type
    pre_quantized = formats.recognizes(checkpoint)
    if pre_quantized and sink is not None:
        raise ValueError(
            f"{folder} is in MLX format already. Load it with from_pretrained, and write "
            "it with save_checkpoint; with AffineQuantizationConfig(dequantize=True) it "
            "becomes dense first"
        )
    loading = Loading(checkpoint, LoadReport(str(source)), sink=sink)
    if pre_quantized:
        model_class, config = _without_towers(model_class, config, loading, chosen)
        _untie(config, checkpoint)
        _set_quantization(config, checkpoint, quantization_config)
    else:
        if quantization_config is not None and quantization_config.dequantize:
            raise ValueError(
                f"{folder} is dense: there is nothing to dequantize. Load it without a "
                "quantization_config"
            )
        tensors = checkpoint.tensors.items()
        loading.state = {name: DenseTensor(stored) for name, stored in tensors}
        _refuse_parallel(folder, kwargs)
        kwargs["quantization_config"] = quantization_config
    if getattr(config, "dtype", None) is None:
        config.dtype = _named_dtype(checkpoint.config) or _main_dtype(checkpoint)
    generation = kwargs.pop("generation_config", None)
    with_info = kwargs.pop("output_loading_info", False)
    token = current.set(loading)
    try:
        with _one_at_a_time, telling():
            model, info = _stock_from_pretrained(
                model_class,
                None,
                config=config,
                state_dict=loading.state,
                output_loading_info=True,
                **kwargs,
            )
    finally:
        current.reset(token)
    _check_loaded(folder, info)
    model.name_or_path = model.config.name_or_path = str(source)
    # Of a repository, the revision too: save_checkpoint takes the tokenizer from there.
    model.config._commit_hash = extract_commit_hash(str(folder / CONFIG), None)
    _set_generation(model, folder, generation)
    return (model, info) if with_info else model


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Raise CheckpointError for what transformers only prints, and makes up."""
    kinds = ("missing_keys", "mismatched_keys", "conversion_errors", "error_msgs")
    lines = [f"  {kind}: {info[kind]}" for kind in kinds if info.get(kind)]
    if lines:
        raise CheckpointError(
            f"{folder} does not fill the model:\n"
            + "\n".join(lines)
            + "\nFetch the files again if some are not there; in Python, pass the class of "
            "models that the checkpoint is of (model_class)"
        )


# The classes that AutoModelForCausalLM and AutoModelForImageTextToText may choose.
_GENERATORS = {
    name
    for names in (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    for one in names.values()
    for name in ([one] if isinstance(one, str) else one)
}

# What transformers takes, and would have no effect here, or a wrong one.
_REFUSED = {
    "key_mapping": "names are found by affine_tensor's own rules; rename the tensors in "
    "the files, or load them with load_checkpoint_ into a model that has these names",
}


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not taken with packed weights: {reason}")
    given = kwargs.get("distributed_config")
    for name in ("fsdp_size", "dp_replicate_size", "pp_size"):
        size = (
            given.get(name) if isinstance(given, dict) else getattr(given, name, None)
        )
        if (size or 1) > 1:
            raise ValueError(
                f"distributed_config has {name}={size}; packed weights are loaded in "
                "parallel by tp_size and ep_size only. Load the model, and call "
                "fully_shard on its layers for FSDP2"
            )


def _refuse_parallel(folder: Path, kwargs: dict[str, Any]) -> None:
    """A process that has a shard cannot quantize it as the whole would be."""
    for name in ("tp_plan", "tp_size", "distributed_config"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is not taken while a dense checkpoint is quantized, and {folder} "
                "is dense. Write it as an MLX checkpoint first (affine_tensor.convert), "
                "and load that"
            )


def _set_quantization(
    config: Any, checkpoint: Checkpoint, given: AffineQuantizationConfig | None
) -> None:
    """Replace what config.json says of the format by what transformers understands."""
    for own in (config, config.get_text_config()):
        for key in ("quantization", "quantization_config"):
            if hasattr(own, key):
                delattr(own, key)
    general = mlx.settings(checkpoint.config)[:1]
    bits, group = [
        general[0].get(k) if general else None for k in ("bits", "group_size")
    ]
    if bits not in layout.BITS or group not in layout.GROUP_SIZES:
        bits, group = 4, 64  # it says nothing general; only for show
    config.quantization_config = {
        "quant_method": METHOD,
        "bits": bits,
        "group_size": group,
        "dequantize": given is not None and given.dequantize,
    }


def _without_towers(
    model_class: Any, config: Any, loading: Loading, chosen: bool
) -> tuple[Any, Any]:
    """The text class, or a class without its towers, where the file has text alone.

    mlx-lm drops `vision_config` and the tower's weights; transformers would fill in a
    tower of its default size, of random weights. `chosen` is whether an auto class chose
    the class: it may then be that of the text.
    """
    sub_configs = getattr(config, "sub_configs", {})
    towers = [k for k in ("vision_config", "audio_config") if k in sub_configs]
    stored = loading.checkpoint
    if not towers or any(is_tower(name) for name in stored.tensors):
        return model_class, config
    text = config.get_text_config()
    text_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    # Not for an auto class of bodies, or of classifiers.
    chosen = chosen and model_class.__name__ in _GENERATORS
    if not chosen or text is config or text_class in (None, model_class):
        loading.seeing = False
        logger.warning(
            "%s has text alone: the parts of %s that see or hear are left out",
            stored.folder,
            model_class.__name__,
        )
        return model_class, config
    said = [
        part.get("tie_word_embeddings")
        for part in (stored.config, *_parts(stored.config))
    ]
    tied = [one for one in said if one is not None]
    text.tie_word_embeddings = tied[0] if tied else not _has_head(stored)
    if getattr(text, "dtype", None) is None:
        text.dtype = config.dtype
    return text_class, text


def _untie(config: Any, checkpoint: Checkpoint) -> None:
    """A head of its own counts where only a default of transformers ties it."""
    raw = checkpoint.config
    said = any("tie_word_embeddings" in part for part in (raw, *_parts(raw)))
    if not said and _has_head(checkpoint):
        for own in (config, config.get_text_config()):
            own.tie_word_embeddings = False


def _has_head(checkpoint: Checkpoint) -> bool:
    return any("lm_head." in name for name in checkpoint.tensors)


def _parts(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations within a config.json."""
    return [part for part in raw.values() if isinstance(part, dict)]


def _named_dtype(raw: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json names, of which its text part may say nothing."""
    for part in (raw, raw.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key) if isinstance(part, dict) else None
            found = getattr(torch, name, None) if isinstance(name, str) else None
            if isinstance(found, torch.dtype):
                return found
    return None


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The float dtype that most of its numbers have."""
    sizes: Counter[torch.dtype] = Counter()
    for stored in checkpoint.tensors.values():
        if stored.dtype in layout.WEIGHT_DTYPES:
            sizes[stored.dtype] += stored.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _set_generation(model: Any, folder: Path, given: Any) -> None:
    if not model.can_generate():
        return
    if given is not None:
        model.generation_config = given
    elif (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
