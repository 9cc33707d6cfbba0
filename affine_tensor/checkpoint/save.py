"""Writing a model as an MLX checkpoint that `mlx_lm.load` reads."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import layout
from ..distributed import check_unsharded
from ..quantize import slots
from ..tensor import AffineQuantizedTensor, logger
from . import place
from .companions import origin_of, write_companions, write_json
from .files import CONFIG, INDEX, as_dtype, cast
from .forms import Form, dense
from .mlx_config import mlx_config
from .names import Names

Unsupported = Literal["error", "dense", "requantize"]

MLX_GROUP_SIZES = (32, 64, 128)


@dataclass
class SaveReport:
    """What was written, and what it cost in exactness."""

    folder: Path
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    packed: dict[str, tuple[int, int]] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)  # made dense or requantized
    cast: dict[str, float] = field(default_factory=dict)  # largest error, in steps
    tokenizer: bool = False
    dense: dict[str, str] = field(default_factory=dict)  # matrices, and why
    lost: dict[str, float] = field(default_factory=dict)  # relative L2, quantized again
    parameters: int = 0  # weights of the model, shared ones once

    @property
    def bits_per_weight(self) -> float:
        """All bytes of the tensors over the number of weights."""
        return 8 * self.bytes / max(1, self.parameters)

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.bytes:,} bytes in {len(self.files)} files, "
            f"{len(self.packed)} packed weights"
        ]
        if self.cast:
            worst = max(self.cast, key=lambda name: self.cast[name])
            lines.append(
                f"casting scales and biases changed {len(self.cast)} weights, at most "
                f"by {self.cast[worst]:.2g} quantization steps ({worst}); dtype='keep' "
                "writes them as they are, and mlx-lm then computes in float32"
            )
        lines += [f"{name}: {what}" for name, what in self.changed.items()]
        if not self.tokenizer:
            lines.append("no tokenizer was written: pass tokenizer=")
        return "\n".join(lines)

    def warn(self) -> None:
        """Log it, if there is anything that the user may not expect."""
        if self.cast or self.changed or not self.tokenizer:
            logger.warning("%s", self)


@dataclass(frozen=True)
class _Entry:
    """A parameter or buffer as it will be stored: its tensors are made when written."""

    name: str
    make: Callable[[], dict[str, Tensor]]


def save_checkpoint(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    unsupported: Unsupported = "error",
    tokenizer: Any = None,
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
    progress: bool = True,
) -> SaveReport:
    """Write a model with packed weights as an MLX checkpoint.

    MLX holds scales and biases in one float dtype for the whole model: `dtype`, float32,
    float16 or bfloat16 or its name, by default the one that the packed weights count
    as. "keep" writes each as it is, which makes mlx-lm compute in float32 where they
    differ. Where the cast changes values the report says by how much.

    MLX has neither group size 16 nor permutations (act-order), nor transposed weights:
    such weights are refused, or with `unsupported` written "dense", or "requantize"d at
    the nearest format. A group of 256 is written as two of 128, without loss.

    The configuration, generation configuration and a model card go along, and the
    tokenizer: `tokenizer` is one of transformers, or a folder or repository to copy its
    files from (default: where the model came from). All is written beside `folder` and
    moved into place; an existing folder that is not empty raises FileExistsError,
    unless `overwrite`, which replaces it as a whole. Whenever the process or the machine
    stops, the old checkpoint is there or the new one; a half-written folder beside it,
    called ``.NAME.*.unfinished``, goes with the next save to `folder`. Raises ValueError,
    which lists them, for weights that MLX cannot hold, and OSError, which says how many
    bytes are missing, where a disk is full; what was there stays.
    """
    folder = Path(folder).expanduser()
    check_free(folder, overwrite)

    def write(folder: Path, report: SaveReport) -> None:
        _write(
            model,
            folder,
            report,
            dtype=dtype,
            unsupported=unsupported,
            tokenizer=tokenizer,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )

    report = SaveReport(folder)
    check = partial(_check_free, folder, overwrite)
    with place.beside(folder, check, overwrite) as beside:
        write(beside, report)
    report.warn()
    return report


def merge_checkpoint(model: nn.Module, folder: Path, **options: Any) -> SaveReport:
    """As `save_checkpoint`, into a folder that may hold other files, which stay.

    Of an older checkpoint there the weights go, when the new ones stand. The files are
    written within the folder, which may be another disk than the one above it, and moved
    up; a process killed in between leaves the rest to whoever reads or saves there next
    (see `place`).
    """
    report = SaveReport(folder)
    with place.inside(folder) as inside:
        _write(model, inside, report, **options)
    report.warn()
    return report


def _write(
    model: nn.Module,
    folder: Path,
    report: SaveReport,
    *,
    dtype: torch.dtype | str | None = None,
    unsupported: Unsupported = "error",
    tokenizer: Any = None,
    max_shard_bytes: int,
    progress: bool = True,
) -> None:
    """Write all of a checkpoint into an empty folder."""
    check_unsharded(model)
    scales = _scale_dtype(model, dtype)
    entries = _entries(model, scales, unsupported, report)
    counts_as = (_packed(model) and scales) or _model_dtype(model)
    writer = ShardWriter(folder, max_shard_bytes)
    _write_entries(writer, entries, progress)
    _finish(model, folder, writer, report, counts_as, tokenizer)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless a checkpoint may be put there.

    What saves that were killed have left there is removed before.
    """
    place.clean(folder.resolve())
    _check_free(folder, overwrite)


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; a folder is written")
    above = next(path for path in (*folder.parents, Path()) if path.exists())
    if not above.is_dir():
        raise FileExistsError(
            f"{folder} cannot be made, since {above} is a file. Choose another folder"
        )
    names = place.names_in(folder)
    if not names:
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty; pass overwrite=True to replace it"
        )
    if CONFIG not in names and not any(n.endswith(".safetensors") for n in names):
        raise FileExistsError(
            f"{folder} holds files and no checkpoint; it is not replaced. Choose "
            "another folder or empty this one"
        )


# ---- what is written ------------------------------------------------------------


def _packed(model: nn.Module) -> list[AffineQuantizedTensor]:
    values = [slot.parameter for slot in slots(model).values()]
    return [value for value in values if isinstance(value, AffineQuantizedTensor)]


def _scale_dtype(
    model: nn.Module, dtype: torch.dtype | str | None
) -> torch.dtype | None:
    """The one dtype of all scales; None to keep each."""
    if dtype == "keep":
        return None
    if dtype is not None:
        return as_dtype(dtype, layout.WEIGHT_DTYPES, "keep")
    counted = Counter(weight._dtype for weight in _packed(model)).most_common(1)
    return _storable(counted[0][0]) if counted else None


def _model_dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in, as far as it can be stored."""
    own = getattr(model, "dtype", None)
    if not isinstance(own, torch.dtype):
        floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
        own = Counter(floats or [torch.float32]).most_common(1)[0][0]
    return _storable(own)


def _storable(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def _entries(
    model: nn.Module,
    scales: torch.dtype | None,
    unsupported: Unsupported,
    report: SaveReport,
) -> list[_Entry]:
    """Everything to store, each tie once; raises if MLX cannot hold something."""
    if unsupported not in ("error", "dense", "requantize"):
        raise ValueError(
            f"unsupported is {unsupported!r}; allowed are 'error', 'dense' and "
            "'requantize'"
        )
    main = Counter(weight._dtype for weight in _packed(model)).most_common(1)
    names = Names(model)
    entries: list[_Entry] = []
    problems: list[str] = []
    for name, value in _values(model):
        if names.is_absent(name):
            if bool(value.count_nonzero()):
                if unsupported == "error":
                    problems.append(f"  {name}: left out, since MLX takes it for zeros")
                else:
                    report.changed[name] = "left out (MLX takes it for zeros)"
            continue
        # Buffers stay as the model made them.
        counted = main[0][0] if main and isinstance(value, nn.Parameter) else None
        entries += _entries_of(
            names, name, value, scales, counted, unsupported, report, problems
        )
    check_problems(problems, _FOLD)
    return entries


def _entries_of(
    names: Names,
    name: str,
    value: Tensor,
    scales: torch.dtype | None,
    counted: torch.dtype | None,
    unsupported: Unsupported,
    report: SaveReport,
    problems: list[str],
) -> Iterator[_Entry]:
    """What a parameter becomes. Dense ones of the dtype `counted` get that of the scales;
    what MLX cannot hold is noted in the report, or in `problems` if it is an error."""
    form = next(names.forms(name, value.shape))
    counts = counted is not None and counts_as(value, form, counted)
    dtype = (scales or counted) if counts else None
    for piece in _pieces(form, value):
        reason = _misfit(piece, value)
        if reason and unsupported == "error":
            problems.append(f"  {piece.name}: {reason}")
        elif reason and (unsupported == "dense" or not _is_weight(piece.name)):
            report.changed[piece.name] = f"written dense ({reason})"
            yield _dense_entry(piece, scales, report)
        elif reason or isinstance(piece.like, AffineQuantizedTensor):
            if reason:
                report.changed[piece.name] = f"requantized ({reason})"
            origin = value if isinstance(value, AffineQuantizedTensor) else None
            yield _packed_entry(piece, scales, reason, origin, report)
        else:
            yield _dense_entry(piece, dtype, report)


def check_problems(problems: list[str], hint: str = "") -> None:
    """Raise ValueError for weights that MLX cannot hold; `hint` is for act-order."""
    if problems:
        raise ValueError(
            "MLX has no form for these weights:\n"
            + "\n".join(problems)
            + "\nPass unsupported='dense' to write them dense, or 'requantize' to "
            "quantize them anew (which loses accuracy)"
            + (hint if any("act-order" in problem for problem in problems) else "")
        )


_FOLD = (
    ". Before that, affine_tensor.fold_permutations_(model) takes the act-order of "
    "down_proj into the rows of other weights, without loss"
)


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each distinct parameter, then each persistent buffer, by its (first) name."""
    for slot in slots(model).values():
        yield slot.name, slot.parameter
    for prefix, module in model.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{own}" if prefix else own), buffer


def counts_as(value: Tensor, form: Form, dtype: torch.dtype) -> bool:
    """Whether a dense parameter is stored in the dtype of the scales: those of the
    model's dtype, and those that are wider only while they are loaded."""
    changes = any(part.changes_values for part in form.forms())
    return value.dtype == dtype or changes


@dataclass(frozen=True)
class _Piece:
    """A tensor of the file: like what it is, on the meta device, and how to make it."""

    name: str
    like: Tensor
    make: Callable[[], Tensor]


def _pieces(form: Form, value: Tensor) -> Iterator[_Piece]:
    """What a parameter is in the file."""
    value = value.detach() if not hasattr(value, "affine_parts") else value
    kept = _parts_of(form, value)

    def piece(name: str) -> Tensor:
        return form.save(value.detach())[name]

    for name, like in form.save(_on_meta(value)).items():
        if name in kept:
            part = kept[name]
            yield _Piece(name, _on_meta(part), partial(_itself, part))
        else:
            yield _Piece(name, like, partial(piece, name))


def _itself(value: Tensor) -> Tensor:
    return value


def _on_meta(value: Tensor) -> Tensor:
    """Shape, dtype and format without the numbers."""
    if isinstance(value, AffineQuantizedTensor):
        return value.detach()._map(lambda part: part.to("meta"))  # type: ignore
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _parts_of(form: Form, value: Tensor) -> dict[str, AffineQuantizedTensor]:
    """The packed parts that a dense parameter was made of when it was loaded, if it
    still is what they make; they are then written as they were read."""
    names, ordered = list(form.names()), getattr(value, "affine_parts", [])
    if len(ordered) != len(names):
        return {}
    found = dict(zip(names, ordered, strict=True))
    parts = {n: part.to(value.device) for n, part in found.items() if part is not None}
    others = form.save(value.detach())
    if any(part.shape != others[name].shape for name, part in parts.items()):
        return {}
    whole = form.load(lambda name: parts.get(name, others[name]))
    counted = next(iter(parts.values()))._dtype
    same = torch.equal(whole.to(counted).to(value.dtype).view(value.shape), value)
    return parts if same else {}


def _is_weight(name: str) -> bool:
    return name == "weight" or name.endswith(".weight")


def _misfit(piece: _Piece, value: Tensor) -> str | None:
    """Why MLX cannot hold this weight as it is, or None."""
    weight = piece.like
    if not isinstance(weight, AffineQuantizedTensor):
        if isinstance(value, AffineQuantizedTensor):
            return "MLX keeps it in another form, with groups along another axis"
        return None
    if not _is_weight(piece.name):
        return "MLX keeps scales and biases beside a parameter called weight"
    if weight.permutation is not None:
        return "its columns are permuted (act-order)"
    if weight.transposed or weight.dim() < 2:
        return f"it is a transposed or one-dimensional view, shape {list(weight.shape)}"
    if weight.group_size not in (*MLX_GROUP_SIZES, 256):
        return f"MLX has no group size {weight.group_size}"
    return None


def _dense_entry(
    piece: _Piece, dtype: torch.dtype | None, report: SaveReport
) -> _Entry:
    name = piece.name
    if dtype is None:
        dtype = _storable(piece.like.dtype)
    if piece.like.dtype == torch.float64:
        report.changed.setdefault(
            name, f"written as {layout.name_of(dtype)}, from float64"
        )

    def make() -> dict[str, Tensor]:
        dense = piece.make()
        if isinstance(dense, AffineQuantizedTensor):
            once = dense.dequantize(dtype)  # rounded once
            if not bool(once.isinf().any()):
                return {name: _own(once)}
            dense = dense.dequantize(torch.float32)
        return {name: _own(cast(name, dense, dtype))}

    return _Entry(name, make)


def _packed_entry(
    piece: _Piece,
    dtype: torch.dtype | None,
    requantize: str | None,
    origin: AffineQuantizedTensor | None,
    report: SaveReport,
) -> _Entry:
    """A packed weight; to `requantize` it, the format is about that of `origin`."""
    name, like = piece.name, piece.like
    stem = name.removesuffix("weight")
    form = like if isinstance(like, AffineQuantizedTensor) else origin
    assert form is not None
    bits, group = form.bits, min(form.group_size, 128)
    if requantize:
        sizes = [g for g in MLX_GROUP_SIZES if like.shape[-1] % g == 0]
        if not sizes:
            raise ValueError(
                f"{name}: {like.shape[-1]} columns are no multiple of any of MLX's "
                f"group sizes ({layout.join(MLX_GROUP_SIZES)}); pass "
                "unsupported='dense'"
            )
        group = min(sizes, key=lambda g: abs(g - form.group_size))
    report.packed[name] = (bits, group)

    def make() -> dict[str, Tensor]:
        weight = piece.make()
        if requantize:
            whole = dense(weight).float().contiguous()
            weight = AffineQuantizedTensor.from_dense(whole, bits, group)
        assert isinstance(weight, AffineQuantizedTensor)
        repeats = weight.group_size // group
        scales, biases = _cast(name, weight, dtype, report)
        return {
            name: _own(weight.packed),
            f"{stem}scales": _own(scales.repeat_interleave(repeats, -1)),
            f"{stem}biases": _own(biases.repeat_interleave(repeats, -1)),
        }

    return _Entry(name, make)


def _cast(
    name: str,
    weight: AffineQuantizedTensor,
    dtype: torch.dtype | None,
    report: SaveReport,
) -> tuple[Tensor, Tensor]:
    """Scales and biases in `dtype`; the report gets the largest change of a weight."""
    old = [weight.scales, weight.biases]
    if dtype is None or dtype == weight.scales.dtype:
        return weight.scales, weight.biases
    new = [part.to(dtype) for part in old]
    if not all(bool(torch.isfinite(part).all()) for part in new):
        raise ValueError(
            f"{name}: its scales or biases are too large for {layout.name_of(dtype)}; "
            "pass dtype=torch.bfloat16, torch.float32 or 'keep'"
        )
    scale, bias = (a.double() - b.double() for a, b in zip(new, old, strict=True))
    # The change is linear in the code, so it is largest at one of its two ends.
    top = (bias + scale * ((1 << weight.bits) - 1)).abs()
    steps = torch.maximum(bias.abs(), top) / old[0].double().abs().clamp_min(1e-45)
    if steps.numel() and float(steps.max()) > 0:
        report.cast[name] = float(steps.max())
    return new[0], new[1]


def _own(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor, the whole of its storage."""
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    return tensor


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies where two share their memory, which safetensors does not write."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        address = tensor.data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return tensors


# ---- writing --------------------------------------------------------------------


class ShardWriter:
    """Writes tensors into shards of at most `limit` bytes, or of one tensor."""

    LIMIT = 5 << 30  # bytes; mlx-lm's own size

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.total = 0
        self.failed: Exception | None = None  # after which nothing more is written
        self._files: list[list[str]] = []  # the names of the tensors in each
        self._shard: dict[str, Tensor] = {}
        self._size = 0
        self._names: set[str] = set()

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add the tensors of one weight, which stay together."""
        if self.failed is not None:
            raise self.failed
        twice = self._names & tensors.keys()
        if twice:
            raise ValueError(
                f"two parameters of the model would be stored as {', '.join(sorted(twice))}"
                ": MLX has one name for both. Rename one of their modules"
            )
        self._names |= tensors.keys()
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._shard and self._size + size > self.limit:
            self._flush()
        self._shard |= tensors
        self._size += size

    def _flush(self) -> None:
        path = self.folder / f"{len(self._files) + 1:05d}.safetensors"
        try:
            save_file(_unshared(self._shard), path, metadata={"format": "mlx"})
        except SafetensorError as error:
            self.failed = _as_oserror(error, self._size)
            raise self.failed from error
        self._files.append(list(self._shard))
        self.total += self._size
        self._shard, self._size = {}, 0

    def close(self) -> None:
        """Write the rest and the index, and give the shards their names."""
        if self._shard or not self._files:
            self._flush()
        weight_map: dict[str, str] = {}
        count = len(self._files)
        for number, names in enumerate(self._files, 1):
            shard = f"model-{number:05d}-of-{count:05d}.safetensors"
            name = "model.safetensors" if count == 1 else shard
            (self.folder / f"{number:05d}.safetensors").rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        index = {
            "metadata": {"total_size": self.total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(self.folder / INDEX, index)
        for name in set(weight_map.values()):  # safetensors makes them private
            shutil.copymode(self.folder / INDEX, self.folder / name)


def _as_oserror(error: SafetensorError, size: int) -> Exception:
    """What the system said, which safetensors has as text, of a file of so many bytes."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if not found:
        return error
    failed = place.NoRoom(int(found[1]), str(error))
    failed.needed = size
    return failed


def _write_entries(writer: ShardWriter, entries: list[_Entry], progress: bool) -> None:
    for entry in tqdm(
        entries, "saving", unit="tensor", delay=2, leave=False, disable=not progress
    ):
        writer.add(entry.make())


@dataclass
class Writing:
    """A checkpoint while it is written weight by weight."""

    writer: ShardWriter
    report: SaveReport
    problems: list[str] = field(default_factory=list)  # after which nothing is written

    def packed(self, name: str, weight: AffineQuantizedTensor) -> None:
        """Write a packed weight with the scales that it has."""
        piece = _Piece(name, _on_meta(weight), partial(_itself, weight))
        reason = _misfit(piece, weight)
        if reason:
            raise ValueError(
                f"{name}: {reason}; MLX has {layout.join(MLX_GROUP_SIZES)}"
            )
        entry = _packed_entry(piece, None, None, None, self.report)
        self.writer.add(entry.make())

    def dense(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write a dense tensor, in `dtype` if given."""
        own = value if dtype is None else cast(name, value, dtype)
        self.writer.add({name: _own(own)})

    def parameter(
        self,
        names: Names,
        name: str,
        value: Tensor,
        *,
        dtype: torch.dtype | None,
        counted: torch.dtype | None,
        unsupported: Unsupported,
    ) -> None:
        """Write a parameter as it is, as `save_checkpoint` would; or a buffer, of which
        `counted` is None. What MLX cannot hold is kept for `check`."""
        for entry in _entries_of(
            names, name, value, dtype, counted, unsupported, self.report, self.problems
        ):
            if not self.problems:
                self.writer.add(entry.make())

    def check(self) -> None:
        """Raise ValueError for the parameters that MLX cannot hold."""
        check_problems(self.problems)


def save_into(
    folder: str | Path,
    make: Callable[[Writing], nn.Module],
    *,
    max_shard_bytes: int,
    overwrite: bool,
) -> SaveReport:
    """Write a checkpoint of the model that `make` gives.

    `make` has written weights before; those of the model are then on the meta device.
    """
    folder = Path(folder).expanduser()
    check_free(folder, overwrite)
    report = SaveReport(folder)
    check = partial(_check_free, folder, overwrite)
    with place.beside(folder, check, overwrite) as beside:
        writer = ShardWriter(beside, max_shard_bytes)
        try:
            model = make(Writing(writer, report))
        except Exception as error:
            if writer.failed is None:
                raise
            raise writer.failed from error  # transformers goes on, and says it was it
        names, dtype = Names(model), _storable(_model_dtype(model))
        for name, value in _values(model):
            if names.is_absent(name):
                report.changed[name] = "left out: MLX has no place for it"
            elif not value.is_meta:
                form = next(names.forms(name, value.shape))
                own = dtype if isinstance(value, nn.Parameter) else None
                if own and not counts_as(value, form, own):
                    own = None
                for piece in _pieces(form, value):
                    writer.add(_dense_entry(piece, own, report).make())
        _finish(model, beside, writer, report, _model_dtype(model), None)
    report.warn()
    return report


def _finish(
    model: nn.Module,
    folder: Path,
    writer: ShardWriter,
    report: SaveReport,
    dtype: torch.dtype,
    tokenizer: Any,
) -> None:
    """Write the index, the configuration and what else goes along."""
    for name, shape in Names(model).unread.items():
        writer.add({name: torch.zeros(*shape, dtype=dtype)})
    writer.close()
    report.bytes = writer.total
    report.parameters = sum(slot.parameter.numel() for slot in slots(model).values())
    origin = origin_of(model)
    formats = {n.removesuffix(".weight"): form for n, form in report.packed.items()}
    write_json(folder / CONFIG, mlx_config(model, formats, dtype, origin))
    report.tokenizer = write_companions(model, folder, tokenizer or origin)
    report.files = sorted(path.name for path in folder.iterdir())
