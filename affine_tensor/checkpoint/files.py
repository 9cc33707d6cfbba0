"""Which files make up a checkpoint, what their headers say, and reading one tensor.

A checkpoint is a local folder or a repository of the Hugging Face Hub, of which only
safetensors and JSON files are read. Which files those are, the same rule decides for
both (`_choose`); of a repository it does so before any weights are downloaded.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub  # its parts when they are used: they take a while to import
import torch
from torch import Tensor

from .. import layout
from ..tensor import log_once
from . import place
from .advice import advised

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

# What a checkpoint needs from a repository: configuration, tokenizer, and weights.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
PATTERNS = ("*.safetensors", *_SMALL)

# safetensors' names of dtypes; a file that has others is refused.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own

# How transformers and mlx-lm write what JSON has no number for: {"__float__": "NaN"}.
_FLOAT_TAG = "__float__"
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


# Size and time of a file. Not its inode, which some network file systems make up anew.
_Stamp = tuple[int, int]


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file, as its header says."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes from the start of the file
    nbytes: int
    stamp: _Stamp | None = None  # of the file whose header this is

    @property
    def place(self) -> tuple[str, int]:
        """What to sort by to read files from front to back."""
        return str(self.file), self.start

    def items(self, start: int, stop: int) -> StoredTensor:
        """Those of its first dimension from `start` to before `stop`, or to its end."""
        count = min(stop, self.shape[0]) - start
        each = self.nbytes // self.shape[0]
        shape, begin = (count, *self.shape[1:]), self.start + start * each
        return replace(self, shape=shape, start=begin, nbytes=count * each)

    def read(self) -> Tensor:
        """Read it into memory of its own.

        Not by memory map: writers leave the data at odd addresses, which wide loads do
        not take, and mapped pages count twice while parts are joined.
        """
        data = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        try:
            self._read_into(memoryview(data.numpy().data))
            changed = self.stamp not in (None, _stamp(self.file.stat()))
        except FileNotFoundError:
            changed = True
        if changed:
            raise CheckpointError(
                f"{self.file}: it is truncated, or changed while {self.name} was read "
                "(another process saves into this folder?). Load it again"
            )
        return data.view(self.dtype).view(self.shape)

    def _read_into(self, view: memoryview) -> None:
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.nbytes:  # one read gives 2 GB at most on Linux
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.file.name} ends inside {self.name}: it is truncated, "
                        "or changed while it was read. Fetch it again"
                    )
                done += count


# One thread at a time: torch's MPS backend does not take several.
_moving = threading.Lock()


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor that was just read, on `device`; the caller drops the one it gave."""
    with _moving:
        return tensor.to(device)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, its config.json ({} if none) and its tensors by name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def fetch(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of `source`: itself, or the cached snapshot of a repository.

    Of a repository the small files come first. They, the list of its files and, only
    where these leave a doubt, the headers of its shards say which shards make up the
    checkpoint; no others are downloaded. Without a network the cached snapshot serves.

    The keywords are those of `huggingface_hub.snapshot_download`, whose environment
    variables (HF_HUB_OFFLINE, HF_TOKEN, HF_HOME, ...) count too. Raises
    FileNotFoundError if `source` is neither a folder nor the name of a repository,
    CheckpointError if the repository lacks a shard or has several sets of weights of
    which none is certain, and what huggingface_hub raises.
    """
    folder = _own_folder(source)
    if folder is not None:
        return folder
    hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token}
    return _fetch_repository(str(source), revision, local_files_only, hub)


def fetch_companions(source: str | Path) -> Path:
    """As `fetch`, without the weights: configuration and tokenizer."""
    folder = _own_folder(source)
    if folder is not None:
        return folder
    return _snapshot(str(source), _SMALL, None, False, {})


def probe(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """The config.json of a folder or repository, as `Checkpoint.config` has it.

    {} if there is none. Nothing else is downloaded, and without a network the cache
    serves. Keywords and errors are those of `fetch`.
    """
    folder = _own_folder(source)
    if folder is not None:
        return _read_config(folder / CONFIG)
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo = str(source)
    hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token}
    try:
        with advised(repo, revision, cache_dir, token):
            path: Any = huggingface_hub.hf_hub_download(
                repo,
                CONFIG,
                revision=revision,
                local_files_only=local_files_only,
                **hub,
            )
    except LocalEntryNotFoundError:
        # No network, and no such file in the cache. A snapshot that is there may well
        # be of a repository without one; huggingface_hub raises if it knows better.
        with suppress(LocalEntryNotFoundError):
            return _read_config(_snapshot(repo, [CONFIG], revision, True, hub) / CONFIG)
        raise
    except EntryNotFoundError:
        return {}
    return _read_config(Path(path))


def _own_folder(source: str | Path) -> Path | None:
    """The folder that `source` is; None if it is the name of a repository."""
    folder = Path(source).expanduser()
    if source != "":
        _settle(folder)
    if source != "" and folder.is_dir():  # Path("") is the working directory
        return folder
    if folder.is_file():
        raise FileNotFoundError(
            f"{str(source)!r} is a file. Name the folder that holds it: "
            f"{str(folder.parent)!r}"
        )
    if not is_repository(str(source)):
        raise FileNotFoundError(
            f"{str(source)!r} is neither a folder nor the name of a Hub repository "
            "(organization/name)"
        )
    return None


def _settle(folder: Path) -> None:
    """End what a save that was killed has begun to do with a folder."""
    try:
        place.settle(folder)
    except OSError as error:
        raise CheckpointError(
            f"a save into {folder} was interrupted while its files were moved up, or is "
            f"at it now: what is there is old and new ({error}). Save again, or move the "
            f"files of {folder / place.MOVING} up into it, config.json last"
        ) from error


def is_repository(name: str) -> bool:
    """Whether the Hub could have a repository ``organization/name`` of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


# ---- the Hub ---------------------------------------------------------------------


def _fetch_repository(
    repo: str, revision: str | None, local_files_only: bool, hub: dict[str, Any]
) -> Path:
    folder = _snapshot(repo, _SMALL, revision, local_files_only, hub)
    commit = folder.name  # of which all is taken, whatever is pushed meanwhile
    there = None if local_files_only else _listing(repo, commit, hub["token"])
    if there is None:
        try:
            weight_files(folder)
        except CheckpointError:  # huggingface_hub knows more: what was interrupted
            return _snapshot(repo, PATTERNS, revision, local_files_only, hub)
        return folder
    index = _read_index(folder)
    indexed = set(index.values())
    if set(_candidates(there)) <= indexed <= there:
        files = sorted(indexed)  # all there are: no header would change that
    else:
        known: dict[str, Collection[str]] = {}

        def peek(name: str) -> None:
            known[name] = _peek(folder, repo, name, hub)

        def names_of(files: Sequence[str]) -> Mapping[str, Collection[str]]:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(peek, [name for name in files if name not in known]))
            return known

        where = f"the repository {repo} (commit {commit})"
        files = _choose(where, there, index, names_of).files
    if files:
        exact = [glob.escape(name) for name in files]
        _snapshot(repo, exact, commit, False, hub)
    return folder


def _snapshot(
    repo: str,
    patterns: Iterable[str],
    revision: str | None,
    local_files_only: bool,
    hub: dict[str, Any],
) -> Path:
    with advised(repo, revision, hub.get("cache_dir"), hub.get("token")):
        path: Any = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*.safetensors"],  # a checkpoint is one folder
            **hub,
        )
    return Path(path)


def _listing(repo: str, commit: str, token: str | bool | None) -> set[str] | None:
    """The safetensors files at the top of a repository; None if it cannot be asked."""
    try:
        # Not list_repo_tree, which tries again for 20 seconds if nobody answers.
        api = huggingface_hub.HfApi(token=token)
        info = api.model_info(repo, revision=commit, timeout=10)
    except Exception:
        # No network, Hub down, no access: for all of them snapshot_download has taken
        # the cache, or will raise what it is.
        return None
    names = {sibling.rfilename for sibling in info.siblings or []}
    return {n for n in names if n.endswith(".safetensors") and "/" not in n}


def _peek(folder: Path, repo: str, name: str, hub: dict[str, Any]) -> Collection[str]:
    """The names of the tensors in a file of a repository, by its header alone."""
    if not (folder / name).is_file():
        api, commit = huggingface_hub.HfApi(token=hub["token"]), folder.name
        try:
            found = api.parse_safetensors_file_metadata(repo, name, revision=commit)
            return found.tensors.keys()
        except Exception:
            # A server that refuses ranges, or a file that is broken: the whole file
            # tells, and if even that cannot be had, this raises why.
            huggingface_hub.hf_hub_download(repo, name, revision=commit, **hub)
    return _open_header(folder / name).entries.keys()


# ---- which files -----------------------------------------------------------------


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration and all headers of a local checkpoint.

    No weight is read yet. Raises CheckpointError on a missing shard, a truncated file,
    a broken header, an index that leads out of the folder, or a tensor that two files
    have while no index says which of them counts. Where another process saves into the
    folder, it is the old checkpoint or the new one.
    """
    for _ in range(_TRIES):
        _settle(folder)
        before = _state(folder)
        try:
            found = _open(folder)
        except (OSError, CheckpointError):
            if _state(folder) == before and before[place.MOVING] is None:
                raise
            continue
        if _state(folder) == before and before[place.MOVING] is None:
            return found
    raise CheckpointError(
        f"{folder} changed each of {_TRIES} times that it was read: another process "
        "saves into it. Load it again when that has ended"
    )


_TRIES = 10


def _state(folder: Path) -> dict[str, _Stamp | None]:
    """What changes with each save into a folder."""
    names = [CONFIG, INDEX, place.MOVING]
    with suppress(OSError):
        names += [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    found: dict[str, _Stamp | None] = {}
    for name in names:
        try:
            found[name] = _stamp((folder / name).stat())
        except OSError:
            found[name] = None
    return found


def _open(folder: Path) -> Checkpoint:
    headers: dict[str, _Header] = {}
    choice = _choose_in(folder, headers)
    files = [folder / name for name in choice.files]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _tensors(headers.get(file.name) or _open_header(file)):
            if choice.index.get(tensor.name, file.name) != file.name:
                continue
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{tensor.name} is in {other.file.name} and in {file.name}; remove "
                    f"the one that does not belong to {folder}"
                )
    return Checkpoint(folder, _read_config(folder / CONFIG), tensors, tuple(files))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in a folder.

    Those that the index names, if they are there and hold what it says; else
    ``model*.safetensors``, since converters have left stale indices behind. Of several
    sets of these, numbered ones and others, it is the one that has ``.scales``. A
    numbered set must be complete.
    """
    return [folder / name for name in _choose_in(folder, {}).files]


@dataclass(frozen=True)
class _Choice:
    """The files that make up a checkpoint, and what the index has to say about them."""

    files: list[str]
    index: dict[str, str]  # {} if it does not count
    stale: str = ""  # why not


def _choose_in(folder: Path, headers: dict[str, _Header]) -> _Choice:
    """Choose the files of a folder; `headers` receives those that had to be read."""
    # A link of the Hub's cache whose file was deleted is no file.
    there = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    index = _read_index(folder)

    def names_of(files: Sequence[str]) -> dict[str, Collection[str]]:
        for name in files:
            if name not in headers:
                headers[name] = _open_header(folder / name)
        return {name: headers[name].entries.keys() for name in files}

    choice = _choose(f"the checkpoint in {folder}", there, index, names_of)
    if not choice.files:
        others = []
        if folder.is_dir():  # huggingface_hub makes no folder for no files
            others = sorted(p.name for p in folder.iterdir() if p.is_file())
        gone = f", and its index names {', '.join(sorted(set(index.values())))}"
        raise CheckpointError(
            f"there is no model*.safetensors in {folder} (only safetensors is read); "
            f"it holds {', '.join(others) or 'no files'}{gone if index else ''}"
            + _adapter_hint(folder, others)
        )
    if choice.stale:
        log_once(
            f"stale index in {folder}",
            "%s is stale and not followed: %s. What is read is %s",
            folder / INDEX,
            choice.stale,
            _listed(choice.files),
        )
    return choice


def _choose(
    where: str,
    there: Collection[str],
    index: dict[str, str],
    names_of: Callable[[Sequence[str]], Mapping[str, Collection[str]]],
) -> _Choice:
    """Choose among the safetensors files that are there, in a folder or repository.

    `names_of` reads headers, which may need the network: it gives the names of the
    tensors in each of the files that it is asked for, at least. No files are chosen if
    none could be weights.
    """
    candidates = _candidates(there)
    indexed = sorted(set(index.values()))
    absent = [name for name in indexed if name not in there]
    strays = [name for name in candidates if name not in indexed]
    stale = ""
    if absent:
        stale = f"it names {_listed(absent)}, and there is no such file"
    elif indexed:
        stale = _contradiction(index, names_of(indexed))
        if not stale and strays and not _quantized(index):
            # The index of the dense original, beside the shards that it belongs to.
            named = names_of(strays)
            better = [name for name in strays if _quantized(named[name])]
            if better:
                stale = f"it names no .scales, and there are some in {_listed(better)}"
        if not stale:
            return _Choice(indexed, index)
        if not strays:
            return _Choice(indexed, {}, stale)
    sets = _sets(candidates)
    if len(sets) > 1:
        named = names_of(candidates)
        quantized = [s for s in sets if any(_quantized(named[name]) for name in s)]
        if len(quantized) != 1:
            raise CheckpointError(
                f"{where} holds {len(sets)} sets of weights: "
                f"{'; '.join(_listed(s) for s in sets)}. Of several the one is read that "
                "has tensors named *.scales, as MLX's quantized weights do; here "
                f"{len(quantized) or 'none'} of them have. Put the files that belong "
                "together into a folder of their own, with the config.json, and load "
                "that"
            )
        sets = quantized
    files = sets[0] if sets else []
    missing = _missing_numbers(files)
    if missing:
        raise CheckpointError(
            f"{where} lacks {', '.join(missing)}; fetch it again, or another revision "
            "of it"
        )
    return _Choice(files, {}, stale)


def _candidates(there: Iterable[str]) -> list[str]:
    """The files that are weights by their names: mlx-lm's, or else its former ones."""
    names = sorted(name for name in there if name.endswith(".safetensors"))
    return [name for name in names if name.startswith("model")] or [
        name for name in names if name.startswith("weight")
    ]


def _contradiction(index: dict[str, str], named: Mapping[str, Collection[str]]) -> str:
    """How the index and the headers of the files that it names contradict each other.

    Only .scales must be in it: an index without them is that of a dense original. Other
    tensors are read wherever they are.
    """
    for name, file in sorted(index.items()):
        if name not in named[file]:
            return f"it says that {name} is in {file}, which lacks it"
    for file in sorted(set(index.values())):
        for name in sorted(named[file]):
            if name.endswith(".scales") and name not in index:
                return f"it lacks {name}, which {file} has"
    return ""


def _quantized(names: Iterable[str]) -> bool:
    return any(name.endswith(".scales") for name in names)


_NUMBERED = re.compile(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)")


def _sets(names: Iterable[str]) -> list[list[str]]:
    """Files that may belong together: each numbered series, and all without numbers."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        key = (match[1], int(match[4])) if match else ("", 0)
        sets.setdefault(key, []).append(name)
    return list(sets.values())


def _listed(names: Sequence[str]) -> str:
    """The names for a message: of many the first and the last."""
    if len(names) > 4:
        return f"{names[0]} to {names[-1]} ({len(names)} files)"
    return ", ".join(names)


# ---- JSON and headers ------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.is_file():
        return {}
    return _object(path.read_bytes(), str(path))


def _read_config(path: Path) -> dict[str, Any]:
    """A configuration, with the floats that JSON cannot express; {} if there is none."""
    if not path.is_file():
        return {}
    return _object(path.read_bytes(), str(path), object_hook=_tagged_float)


def _tagged_float(value: dict[str, Any]) -> Any:
    tag = value.get(_FLOAT_TAG) if len(value) == 1 else None
    return _FLOATS.get(tag, value) if isinstance(tag, str) else value


def _object(text: bytes, where: str, **hooks: Any) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), **hooks)
    except (ValueError, RecursionError) as error:  # the latter: nested without end
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a {type(value).__name__}, not an object")
    return value


def _strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header. Raises ValueError for a name that is there twice, of which
    readers take different ones, and for half a surrogate pair, which no text may have."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in it twice")
    for pair in pairs:
        for text in pair:
            if isinstance(text, str) and not text.isascii():
                text.encode()
    return found


def _whole(text: str) -> int:
    """A number of a header. Raises ValueError for -0, which safetensors refuses."""
    if text == "-0":
        _no_number(text)
    return int(text)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _adapter_hint(folder: Path, names: Collection[str]) -> str:
    """What to do with an adapter of PEFT, which is no model."""
    if "adapter_config.json" not in names:
        return ""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return (
        f". That is an adapter of PEFT: load its model ({base or 'which it does not name'})"
        f" and put it on with peft.PeftModel.from_pretrained(model, {str(folder)!r})"
    )


def _read_index(folder: Path) -> dict[str, str]:
    """Which file has which tensor, as the index says; {} if there is none."""
    weight_map = read_json(folder / INDEX).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(
            f"{folder / INDEX}: weight_map does not map to file names"
        )
    for name in sorted(set(weight_map.values())):
        # Links are followed on purpose: the Hub's cache is made of them. A name is not.
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{folder / INDEX} names {name!r}, which is not a file of the folder "
                "itself; such an index is not followed"
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX} names {name!r}; only safetensors is read"
            )
    return weight_map


def _missing_numbers(files: Iterable[str]) -> list[str]:
    """Names that ``…-00001-of-00003.safetensors`` promise and that are not there."""
    names, promised = set(files), set()
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        start, number, middle, total, end = match.groups()
        width = len(number)
        promised |= {
            f"{start}{i:0{width}d}{middle}{total}{end}"
            for i in range(1, min(int(total), 10_000) + 1)
        }
    return sorted(promised - names)


@dataclass(frozen=True)
class _Header:
    """The header of a safetensors file, not checked yet."""

    file: Path
    size: int  # of the file
    base: int  # where its data begin
    entries: dict[str, Any]
    stamp: _Stamp | None = None


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, checked against each other and its size."""
    return _tensors(_open_header(file))


def _open_header(file: Path) -> _Header:
    with file.open("rb") as stream:
        stamp = _stamp(os.fstat(stream.fileno()))
        size = stamp[0]
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file} is {size} bytes long: not safetensors")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(
                f"{file}: its header would be {length} bytes long and the file has "
                f"{size}. It is truncated or not safetensors; fetch it again"
            )
        text = stream.read(length)
    where = f"the header of {file}"
    entries = _object(
        text,
        where,
        object_pairs_hook=_strict,
        parse_constant=_no_number,
        parse_int=_whole,
    )
    entries.pop("__metadata__", None)
    return _Header(file, size, 8 + length, entries, stamp)


def _tensors(header: _Header) -> list[StoredTensor]:
    file, base = header.file, header.base
    tensors = [_entry(header, *named) for named in header.entries.items()]
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(
                f"{file}: {tensor.name} begins at byte {tensor.start}, where the "
                f"tensor before it ends at {end}; the header is broken"
            )
        end += tensor.nbytes
    if end != header.size:
        raise CheckpointError(
            f"{file} has {header.size} bytes and its header describes {end}: it is "
            f"{'truncated' if end > header.size else 'too long'}. Fetch it again"
        )
    return tensors


def _entry(header: _Header, name: str, entry: Any) -> StoredTensor:
    file, base = header.file, header.base
    try:
        kind, shape = entry["dtype"], entry["shape"]
        start, end = entry["data_offsets"]
        if len(entry) > 3:
            others = sorted(entry.keys() - {"dtype", "shape", "data_offsets"})
            raise ValueError(f"safetensors has no {', '.join(others)}")
        if not (isinstance(kind, str) and isinstance(shape, list)):
            raise ValueError("the dtype is not a name or the shape not a list")
        whole = [*shape, start, end]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in whole):
            raise ValueError("a size or an offset is not a whole number")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: the header's entry for {name} is broken ({error!r})"
        ) from error
    if kind not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} has dtype {kind}; allowed are {', '.join(DTYPES)}"
        )
    dtype = DTYPES[kind]
    nbytes = math.prod(shape) * dtype.itemsize
    if end - start != nbytes:
        raise CheckpointError(
            f"{file}: {name} takes {end - start} bytes, but shape {shape} of {kind} "
            f"is {nbytes}"
        )
    begin = base + start
    return StoredTensor(name, file, dtype, tuple(shape), begin, nbytes, header.stamp)


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense tensor in `dtype`; raises CheckpointError where a number becomes inf."""
    new = value.to(dtype)
    # 8-bit floats lack isfinite, and fit everywhere.
    if value.is_floating_point() and dtype != value.dtype and value.element_size() > 1:
        lost = new.isinf()
        if bool(lost.any()) and bool(lost.logical_and_(value.isfinite()).any()):
            worst = float(value[lost].abs().max())
            raise CheckpointError(
                f"{name} holds {worst:.6g}, which {layout.name_of(dtype)} "
                "cannot express; take bfloat16 or float32"
            )
    return new


def check_biases(scales: StoredTensor, values: Tensor, biases: Tensor) -> None:
    """Raise CheckpointError where a bias, ``-scale * zero``, has become infinite."""
    lost = biases.isinf().logical_and_(values.isfinite())
    if bool(lost.any()):
        worst = float(values[lost].abs().max())
        raise CheckpointError(
            f"{scales.name} holds {worst:.6g}, whose product with its zero float32 cannot "
            "express. Fetch the file again, or quantize the original model again"
        )


def as_dtype(
    value: object, allowed: Iterable[torch.dtype], *others: str
) -> torch.dtype:
    """A dtype given as itself or by its name, "float16" or "torch.float16".

    Raises ValueError for one that is not allowed and TypeError for what is no dtype;
    both name `others` too, the words that the caller takes instead of a dtype.
    """
    names = {layout.name_of(dtype): dtype for dtype in allowed}
    if isinstance(value, (str, torch.dtype)):
        dtype = names.get(str(value).removeprefix("torch."))
        if dtype is not None:
            return dtype
    also = "".join(f" and {word!r}" for word in others)
    raise (ValueError if isinstance(value, (str, torch.dtype)) else TypeError)(
        f"dtype is {value!r}; allowed are {', '.join(names)}{also}"
    )
