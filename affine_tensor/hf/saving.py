"""`model.save_pretrained` and `push_to_hub` of models with packed weights write MLX."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint.companions import has_tokenizer, origin_of
from ..checkpoint.save import Unsupported, merge_checkpoint
from ..distributed import check_unsharded
from ..tensor import AffineQuantizedTensor, local_of
from .config import METHOD

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def install() -> None:
    """Let `save_pretrained` of all models pass by here; others than ours go on as ever."""
    stock: Any = PreTrainedModel.save_pretrained
    if getattr(stock, "_affine_tensor", False):
        return

    @functools.wraps(stock)
    def save_pretrained(
        self: Any, save_directory: Any, *args: Any, **kwargs: Any
    ) -> Any:
        parameters = [local_of(parameter) for parameter in self.parameters()]
        if getattr(self, "_hf_peft_config_loaded", False):
            return stock(self, save_directory, *args, **kwargs)  # the adapter alone
        if not any(isinstance(p, AffineQuantizedTensor) for p in parameters):
            _forget_quantization(self)
            return stock(self, save_directory, *args, **kwargs)
        if args:
            raise TypeError("save_pretrained takes keywords only for a packed model")
        return _save_packed(self, Path(save_directory).expanduser(), **kwargs)

    save_pretrained._affine_tensor = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _forget_quantization(model: Any) -> None:
    """Of a model that was made dense, what would have its file read as a packed one."""
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(
        getattr(quantizer, "quantization_config", None), "quant_method", ""
    )
    if quantizer is not None and method == METHOD:
        quantizer.remove_quantization_config(model)


def _save_packed(
    model: Any,
    folder: Path,
    *,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    token: Any = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    dtype: Any = None,
    tokenizer: Any = None,
    unsupported: Unsupported = "error",
    **kwargs: Any,
) -> None:
    """The arguments are those of transformers, and `dtype`, `tokenizer` and `unsupported`
    of `save_checkpoint`; the folder may hold other files."""
    refused = {"state_dict": state_dict, "variant": variant}
    refused["distributed_checkpoint"] = distributed_checkpoint or None
    refused["save_original_format"] = None if save_original_format else False
    if not push_to_hub:
        refused |= kwargs
    for name, value in refused.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is not taken for a model with packed weights: an MLX "
                "checkpoint is written from the model itself"
            )
    _check_whole(model)
    if not is_main_process:
        return
    created, before = None, {}
    if push_to_hub:
        created = _create_repo(model, folder, token, kwargs)
        if folder.exists():
            before = model._get_files_timestamps(os.fspath(folder))
    own = folder if folder.is_dir() and has_tokenizer(folder) else None
    merge_checkpoint(
        model,
        folder,
        dtype=dtype,
        unsupported=unsupported,
        tokenizer=tokenizer or own or origin_of(model),
        max_shard_bytes=_bytes(max_shard_size),
    )
    if created is not None:
        model._upload_modified_files(
            os.fspath(folder), files_timestamps=before, token=token, **created
        )


def _check_whole(model: Any) -> None:
    """Raise ValueError for a model that is not all here, or not it alone."""
    check_unsharded(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is offloaded (on the meta device); load the model with "
                "device_map='cpu' to save it"
            )
        if ".base_layer." in name:
            raise ValueError(
                f"{name} has an adapter beside it. Save the adapter through the PEFT "
                "model, or take it out first (unload), to save the base"
            )


def _create_repo(model: Any, folder: Path, token: Any, kwargs: dict[str, Any]) -> Any:
    from huggingface_hub import HfApi

    message = kwargs.pop("commit_message", None)
    pull_request = kwargs.pop("create_pr", False)
    name = kwargs.pop("repo_id", folder.name)
    repo = HfApi(token=token).create_repo(name, exist_ok=True, **kwargs)
    return {
        "repo_id": repo.repo_id,
        "commit_message": message,
        "create_pr": pull_request,
    }


def _bytes(size: int | str) -> int:
    """Bytes of a size such as "5GB", as transformers spells them."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?I?B?)\s*", size.upper())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"max_shard_size is {size!r}; write it as '5GB' or in bytes")
    return int(float(match[1]) * _UNITS[match[2]])
