"""`from_pretrained`: a stock transformers model from an MLX checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.hub import extract_commit_hash

from .. import layout
from ..checkpoint.files import CONFIG, as_dtype, fetch
from ..checkpoint.load import load_checkpoint_
from ..tensor import logger


def from_pretrained(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = "auto",
    device_map: str | torch.device | None = None,
    model_class: Any = AutoModelForCausalLM,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **config_changes: Any,
) -> Any:
    """Load an MLX checkpoint into the stock transformers model of its architecture.

    `source` is a folder or a Hub repository. The model is `model_class` (an auto class
    or a class of models), in evaluation mode; its Linear and Embedding modules are
    torch's own, with packed weights. `dtype` is what it computes in: float32, float16,
    bfloat16 or float64, or its name; "auto" or None: the one that config.json names.
    `device_map` is one device here; tensors go there one by one as they are read, never
    through a whole copy on the CPU. Further keywords change the configuration, as they
    do in transformers.

    Raises `CheckpointError` where the checkpoint's tensors do not fit the model,
    missing ones included, ValueError for another dtype or several devices, TypeError
    for keywords that nothing knows, and what huggingface_hub and transformers raise.
    """
    device = _one_device(device_map)
    options = {}
    if dtype not in (None, "auto"):
        options["dtype"] = as_dtype(dtype, layout.LOGICAL_DTYPES, "auto")
    _refuse(config_changes)
    hub: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
    }
    folder = fetch(source, **hub)
    config, unknown = AutoConfig.from_pretrained(
        folder, return_unused_kwargs=True, **config_changes
    )
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: neither an argument of from_pretrained nor a setting "
            f"of {type(config).__name__}"
        )
    for own in (config, config.get_text_config()):
        for key in ("quantization", "quantization_config"):
            # The packed parameters say it themselves; transformers would look for a
            # quantizer of its own here.
            if hasattr(own, key):
                delattr(own, key)
    config.name_or_path = str(source)
    # Of a repository, the revision too: save_checkpoint takes the tokenizer from there.
    config._commit_hash = extract_commit_hash(str(folder / CONFIG), None)
    with _parameters_on_meta():
        build = getattr(model_class, "from_config", None) or model_class._from_config
        model = build(config, **options)
    if device is not None:
        _move_buffers(model, device)
    report = load_checkpoint_(model, folder, device=device or "cpu")
    logger.info("%s", report)
    if device is not None:
        model.to(device)  # nothing, unless a module made parameters in a way of its own
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


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


def _one_device(device_map: str | torch.device | None) -> torch.device | None:
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map is {device_map!r}; one device ('cpu', 'mps', 'cuda:0') is "
            "allowed here"
        ) from error


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move buffers only, those of several modules once: parameters are still on meta."""
    moved: dict[Tensor, Tensor] = {}  # tensors hash by identity
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if buffer not in moved:
                    moved[buffer] = buffer.to(device)
                module._buffers[name] = moved[buffer]


# The build changes what all threads share: below, and transformers the default dtype.
_building = threading.RLock()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that this thread makes inside have parameters without memory, and real
    buffers. One thread is inside at a time; the others make modules as ever.

    A model made on the meta device as a whole would lose the values of its
    non-persistent buffers, such as the frequencies of rotary embeddings, which no
    checkpoint holds.
    """
    with _building:
        register = nn.Module.register_parameter
        inside = threading.get_ident()

        def register_on_meta(
            module: nn.Module, name: str, parameter: nn.Parameter | None
        ) -> None:
            mine = threading.get_ident() == inside
            if mine and parameter is not None and not parameter.is_meta:
                parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            register(module, name, parameter)

        nn.Module.register_parameter = register_on_meta  # type: ignore
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore
