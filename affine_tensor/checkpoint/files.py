"""Which files make up a checkpoint, what their headers say, and reading one tensor.

A checkpoint is a local folder or a repository of the Hugging Face Hub, of which only
safetensors and JSON files are read.
"""

from __future__ import annotations

import json
import math
import re
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor

from .. import layout

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

# What a checkpoint needs from a repository: weights, configuration, tokenizer.
PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
)

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


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file, as its header says."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes from the start of the file
    nbytes: int

    @property
    def place(self) -> tuple[str, int]:
        """What to sort by to read files from front to back."""
        return str(self.file), self.start

    def read(self) -> Tensor:
        """Read it into memory of its own.

        Not by memory map: writers leave the data at odd addresses, which wide loads do
        not take, and mapped pages count twice while parts are joined.
        """
        data = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            view, done = memoryview(data.numpy().data), 0
            while done < self.nbytes:  # one read gives 2 GB at most on Linux
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.file.name} ends inside {self.name}: it is truncated, "
                        "or changed while it was read. Fetch it again"
                    )
                done += count
        return data.view(self.dtype).view(self.shape)


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
    """The local folder of `source`: itself, or what `snapshot_download` fetches.

    The keywords are those of `huggingface_hub.snapshot_download`, whose environment
    variables (HF_HUB_OFFLINE, HF_TOKEN, HF_HOME, ...) count too. Raises
    FileNotFoundError if `source` is neither a folder nor the name of a repository, and
    what huggingface_hub raises.
    """
    folder = Path(source).expanduser()
    if source != "" and folder.is_dir():  # Path("") is the working directory
        return folder
    if not is_repository(str(source)) or folder.is_file():
        raise FileNotFoundError(
            f"{str(source)!r} is neither a folder nor the name of a Hub repository "
            "(organization/name)"
        )
    return Path(
        snapshot_download(
            str(source),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(PATTERNS),
            ignore_patterns=["*/*.safetensors"],  # a checkpoint is one folder
        )
    )


def is_repository(name: str) -> bool:
    """Whether the Hub could have a repository ``organization/name`` of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration and all headers of a local checkpoint.

    No weight is read yet. Raises CheckpointError on a missing shard, a truncated file,
    a broken header, an index that leads out of the folder, or a tensor that two files
    have.
    """
    files = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{tensor.name} is in {other.file.name} and in {file.name}; remove "
                    f"the one that does not belong to {folder}"
                )
    return Checkpoint(folder, read_json(folder / CONFIG), tensors, tuple(files))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.is_file():
        return {}
    return _object(path.read_bytes(), str(path))


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # the latter: nested without end
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a {type(value).__name__}, not an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in a folder.

    Those that the index names, if all of them exist; else ``model*.safetensors``, since
    converters have left stale indices behind. A numbered set must be complete.
    """
    indexed = _indexed_files(folder)
    absent = [file.name for file in indexed if not file.is_file()]
    if indexed and not absent:
        return indexed
    # A link of the Hub's cache whose file was deleted is no file.
    there = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    found = [file for file in there if file.name.startswith("model")] or [
        file for file in there if file.name.startswith("weight")
    ]
    if not found:
        others = sorted(p.name for p in folder.iterdir() if p.is_file())
        raise CheckpointError(
            f"there is no model*.safetensors in {folder} (only safetensors is read); "
            f"it holds {', '.join(others) or 'no files'}"
            + (f", and its index names {', '.join(absent)}" if absent else "")
        )
    missing = _missing_numbers(found)
    if missing:
        raise CheckpointError(
            f"the checkpoint in {folder} lacks {', '.join(missing)}; fetch it again"
        )
    return found


def _indexed_files(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX)
    names = index.get("weight_map", {})
    if not isinstance(names, dict) or not all(
        isinstance(name, str) for name in names.values()
    ):
        raise CheckpointError(
            f"{folder / INDEX}: weight_map does not map to file names"
        )
    for name in sorted(set(names.values())):
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
    return [folder / name for name in sorted(set(names.values()))]


def _missing_numbers(files: Iterable[Path]) -> list[str]:
    """Names that ``…-00001-of-00003.safetensors`` promise and that are not there."""
    names = {file.name for file in files}
    promised = set()
    for name in names:
        match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", name)
        if match:
            start, number, middle, total, end = match.groups()
            width = len(number)
            promised |= {
                f"{start}{i:0{width}d}{middle}{total}{end}"
                for i in range(1, min(int(total), 10_000) + 1)
            }
    return sorted(promised - names)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, checked against each other and its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
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
    header = _object(text, f"the header of {file}")
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = [_entry(file, base, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(
                f"{file}: {tensor.name} begins at byte {tensor.start}, where the "
                f"tensor before it ends at {end}; the header is broken"
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{file} has {size} bytes and its header describes {end}: it is "
            f"{'truncated' if end > size else 'too long'}. Fetch it again"
        )
    return tensors


def _entry(file: Path, base: int, name: str, entry: Any) -> StoredTensor:
    try:
        kind, shape = entry["dtype"], entry["shape"]
        start, end = entry["data_offsets"]
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
    return StoredTensor(name, file, dtype, tuple(shape), base + start, nbytes)


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense tensor in `dtype`; raises CheckpointError where a number becomes inf."""
    new = value.to(dtype)
    # 8-bit floats lack isfinite, and fit everywhere.
    if value.is_floating_point() and dtype != value.dtype and value.element_size() > 1:
        lost = new.isinf() & value.isfinite()
        if bool(lost.any()):
            worst = float(value[lost].abs().max())
            raise CheckpointError(
                f"{name} holds {worst:.6g}, which {layout.name_of(dtype)} "
                "cannot express; take bfloat16 or float32"
            )
    return new


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
