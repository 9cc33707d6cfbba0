"""`model.save_pretrained` and `push_to_hub` of models with packed weights write MLX."""

from __future__ import annotations

import functools
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint.companions import has_tokenizer
from ..checkpoint.save import Unsupported, save_checkpoint
from ..tensor import AffineQuantizedTensor

_stock_save_pretrained = PreTrainedModel.save_pretrained
_WEIGHTS = re.compile(r"model.*\.(safetensors|safetensors\.index\.json)")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def install() -> None:
    """Let `save_pretrained` of all models pass by here; others than ours go on as ever."""
    if PreTrainedModel.save_pretrained is not _save_pretrained:
        PreTrainedModel.save_pretrained = _save_pretrained  # type: ignore[method-assign]


@functools.wraps(_stock_save_pretrained)
def _save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    packed = any(isinstance(p, AffineQuantizedTensor) for p in self.parameters())
    if not packed or getattr(self, "_hf_peft_config_loaded", False):
        return _stock_save_pretrained(self, save_directory, *args, **kwargs)
    if args:
        raise TypeError("save_pretrained takes keywords only for a packed model")
    return _save_packed(self, Path(save_directory).expanduser(), **kwargs)


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
    unsupported: Unsupported = "error",
    **kwargs: Any,
) -> None:
    """The arguments are those of transformers, and `unsupported` of `save_checkpoint`;
    the folder may hold other files."""
    for name, value in (("state_dict", state_dict), ("variant", variant)):
        if value is not None:
            raise ValueError(
                f"{name} is not taken for a model with packed weights: an MLX "
                "checkpoint is written from the model itself"
            )
    if distributed_checkpoint:
        raise ValueError(
            "a model with packed weights is not saved as a distributed one"
        )
    if not is_main_process:
        return
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; a folder is written")
    created, before = None, {}
    if push_to_hub:
        created = _create_repo(model, folder, token, kwargs)
        if folder.exists():
            before = model._get_files_timestamps(os.fspath(folder))
    place = folder.resolve()
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        own = folder if folder.is_dir() and has_tokenizer(folder) else None
        limit = _bytes(max_shard_size)
        save_checkpoint(
            model,
            beside,
            tokenizer=own,
            max_shard_bytes=limit,
            unsupported=unsupported,
        )
        _merge(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if created is not None:
        model._upload_modified_files(
            os.fspath(place), files_timestamps=before, token=token, **created
        )


def _merge(new: Path, folder: Path) -> None:
    """Move the new files over; weights and index of an older save go."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {path.name for path in new.iterdir()}
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in files:
            path.unlink()
    for path in sorted(new.iterdir()):
        if path.name == "README.md" and (folder / path.name).exists():
            continue  # somebody's own words
        os.replace(path, folder / path.name)


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
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?B?)\s*", size.upper())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"max_shard_size is {size!r}; write it as '5GB' or in bytes")
    return int(float(match[1]) * _UNITS[match[2]])
