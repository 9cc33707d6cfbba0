"""A checkpoint of the Hub by its headers: nothing of its weights is downloaded."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]
from torch import Tensor

from . import files
from .files import Checkpoint, CheckpointError, StoredTensor

# Of a repository: its configuration and what says how it is quantized. No tokenizer.
_JSON = (
    "config.json",
    "adapter_config.json",
    "*.index.json",
    "quant*_config.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class RemoteTensor(StoredTensor):
    """A tensor of which only the header is here; it counts as zeros.

    Unless it is one of those few numbers that say what shape a weight has.
    """

    data: bytes = b""

    def read(self) -> Tensor:
        if self.data:
            data = torch.frombuffer(bytearray(self.data), dtype=self.dtype)
            return data.view(self.shape)
        return torch.zeros(self.shape, dtype=self.dtype, device="cpu")


def open_headers(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Checkpoint:
    """The checkpoint of a folder or repository, of which headers alone are read.

    As `files.open_checkpoint`. Of a repository the configuration is downloaded, and of
    its shards the headers, by ranged requests, with the few numbers that
    compressed-tensors stores as the shapes of weights. Shards that are in the cache are
    read there, and without a network the cache serves. The place of a remote tensor is
    counted from where the data of its file begin. Raises what `files.fetch` does.
    """
    folder = files._own_folder(source)
    if folder is not None:
        return files.open_checkpoint(folder)
    repo, hub = str(source), {"token": token, "cache_dir": None}
    folder = files._snapshot(repo, _JSON, revision, False, hub)
    there = files._listing(repo, folder.name, token)
    if there is None:
        return files.open_checkpoint(folder)
    return _open_remote(folder, repo, there, hub)


def _open_remote(
    folder: Path, repo: str, there: set[str], hub: dict[str, Any]
) -> Checkpoint:
    known: dict[str, list[StoredTensor]] = {}

    def peek(name: str) -> None:
        known[name] = _header(folder, repo, name, hub)

    def names_of(wanted: Sequence[str]) -> Mapping[str, Collection[str]]:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(peek, [name for name in wanted if name not in known]))
        return {name: [t.name for t in known[name]] for name in wanted}

    where = f"the repository {repo} (commit {folder.name})"
    choice = files._choose(where, there, files._read_index(folder), names_of)
    if not choice.files:
        raise CheckpointError(
            f"there is no model*.safetensors in {where} (only safetensors is read). "
            "Name another repository, or convert its weights to safetensors first"
            + files._adapter_hint(folder, [path.name for path in folder.glob("*.json")])
        )
    names_of(choice.files)
    tensors: dict[str, StoredTensor] = {}
    for file in choice.files:
        for tensor in known[file]:
            if choice.index.get(tensor.name, file) == file:
                tensors.setdefault(tensor.name, tensor)
    _read_shapes(tensors, repo, folder.name, hub["token"])
    config = files._read_config(folder / files.CONFIG)
    return Checkpoint(folder, config, tensors, tuple(folder / n for n in choice.files))


def _header(
    folder: Path, repo: str, name: str, hub: dict[str, Any]
) -> list[StoredTensor]:
    """The tensors of one file, by its header."""
    path = folder / name
    if path.is_file():
        return files.read_header(path)
    api = HfApi(token=hub["token"])
    try:
        found = api.parse_safetensors_file_metadata(repo, name, revision=folder.name)
    except Exception as error:
        raise CheckpointError(
            f"the header of {name} in {repo} cannot be had ({error}). Try again, or "
            "download the repository and look at its folder"
        ) from error
    entries = {
        n: {"dtype": i.dtype, "shape": i.shape, "data_offsets": list(i.data_offsets)}
        for n, i in found.tensors.items()
    }
    end = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
    header = files._Header(path, end, 0, entries)
    return [RemoteTensor(**vars(one)) for one in files._tensors(header)]


def _read_shapes(
    tensors: dict[str, StoredTensor], repo: str, commit: str, token: str | bool | None
) -> None:
    """Read what compressed-tensors needs to know of each weight: a few bytes."""
    wanted = [
        tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, RemoteTensor)
        and name.endswith("weight_shape")
        and 0 < tensor.nbytes <= _FEW
    ]
    names = sorted({tensor.file.name for tensor in wanted})
    urls = {name: hf_hub_url(repo, name, revision=commit) for name in names}

    def data_begin(name: str) -> int:
        (length,) = struct.unpack("<Q", _part(urls[name], 0, 8, token))
        return 8 + int(length)

    with ThreadPoolExecutor(16) as pool:
        bases = dict(zip(names, pool.map(data_begin, names), strict=True))

        def read(tensor: RemoteTensor) -> RemoteTensor:
            start = bases[tensor.file.name] + tensor.start
            data = _part(urls[tensor.file.name], start, tensor.nbytes, token)
            return replace(tensor, data=data)

        for tensor in pool.map(read, wanted):
            tensors[tensor.name] = tensor


_FEW = 64  # bytes


def _part(url: str, start: int, count: int, token: str | bool | None) -> bytes:
    """Some bytes of a file of the Hub; CheckpointError where only all can be had."""
    wanted = {"range": f"bytes={start}-{start + count - 1}"}
    headers = {**build_hf_headers(token=token), **wanted}
    with get_session().stream("GET", url, headers=headers) as response:
        if response.status_code != 206:
            raise CheckpointError(
                f"{url} answered {response.status_code} to a request for {count} bytes "
                "of it (206 is needed). Download the repository and look at its folder"
            )
        return bytes(response.read())
