"""Putting a checkpoint into a model: all is checked and read before it changes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import layout
from ..quantize import Slot, format_table, slots
from ..tensor import AffineQuantizedTensor
from . import mlx
from .files import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    cast,
    fetch,
    move,
    open_checkpoint,
)

_READERS = min(4, os.cpu_count() or 1)  # threads


@dataclass
class LoadReport:
    """What was loaded. Prints as a short table."""

    source: str
    packed: dict[str, tuple[int, int]] = field(default_factory=dict)  # bits, group size
    dense: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    packed_bytes: int = 0
    dense_bytes: int = 0

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("loaded", "count", "bits", "group")]
        for (bits, group), count in sorted(Counter(self.packed.values()).items()):
            rows.append(("packed weights", str(count), str(bits), str(group)))
        rows.append(("dense tensors", str(len(self.dense)), "-", "-"))
        lines = [
            f"{self.source}: {self.packed_bytes:,} bytes packed, "
            f"{self.dense_bytes:,} dense",
            format_table(rows),
        ]
        if self.ignored:
            lines.append(f"not needed by the model: {', '.join(self.ignored)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Buffer:
    """One distinct persistent buffer and its places, in the shape of a `Slot`."""

    parameter: Tensor
    name: str
    places: list[tuple[nn.Module, str]]

    def put(self, value: Tensor) -> None:
        for module, own in self.places:
            module._buffers[own] = value


_Target = Slot | _Buffer
_Stored = mlx.PackedWeight | StoredTensor


@dataclass(frozen=True)
class _Plan:
    """What will go where."""

    items: list[tuple[_Target, _Stored]] = field(default_factory=list)
    repeated: list[tuple[_Target, _Stored]] = field(default_factory=list)  # tied, twice
    ignored: list[str] = field(default_factory=list)


def load_checkpoint_(
    model: nn.Module,
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> LoadReport:
    """Load an MLX checkpoint into a model with the same names, in place.

    `source` is a folder or the name of a Hub repository (the keywords are those of
    huggingface_hub). Each weight that the checkpoint has quantized becomes an
    `AffineQuantizedTensor` parameter of the module that it belongs to, on the device
    and with the dtype of the parameter that it replaces; its scales keep the dtype of
    the file. Other tensors are copied into the model's own and cast to their dtype. Tied
    weights may be stored once.

    `device` is where parameters and persistent buffers go that are on the meta device.
    Each tensor is moved as soon as it is read: the CPU holds a few of them at a time.

    The load is a transaction: everything is checked and read before the model changes.
    Raises `CheckpointError` (a ValueError), which lists every missing, unexpected,
    misshapen and wrongly typed tensor, and what `fetch` raises. The model is then as it
    was.
    """
    device = torch.device(device)
    folder = fetch(
        source,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    checkpoint = open_checkpoint(folder)
    if not mlx.recognizes(checkpoint):
        raise CheckpointError(f"{folder} is not in MLX format: {_why_not(checkpoint)}")
    plan = _make_plan(model, checkpoint)
    report = LoadReport(str(source), ignored=plan.ignored)
    values = list(_read(plan, device, report, progress))
    for target, value in values:
        _put(target, value)
    return report


def _why_not(checkpoint: Checkpoint) -> str:
    methods = [found.get("quant_method") for found in mlx.settings(checkpoint.config)]
    if any(methods):
        return f"its config.json says quant_method {next(filter(None, methods))!r}"
    return (
        "its config.json has no 'quantization' with bits and group_size, and no tensor "
        "is named *.scales. Load a dense model with its own library, and call "
        "quantize_ on it"
    )


def _make_plan(model: nn.Module, checkpoint: Checkpoint) -> _Plan:
    """Match the checkpoint's names with the model's; raise if anything does not fit."""
    problems = mlx.check_settings(checkpoint.config)
    if problems:
        raise _error(checkpoint, {"settings that are not understood": problems})
    targets, others = _targets(model)
    columns = {
        name: target.parameter.shape[-1]
        for name, target in targets.items()
        if target.parameter.dim() > 1 and target.parameter.shape[-1]
    }
    packed, broken, parts = mlx.packed_weights(checkpoint, columns)
    # Packed ones first: of a tied weight that is stored in both ways they are kept.
    stored: dict[str, _Stored] = dict(packed)
    stored |= {n: t for n, t in checkpoint.tensors.items() if n not in parts}

    plan, misfits = _Plan(), dict(broken)
    unexpected: list[str] = []
    filled: set[int] = set()
    for name, value in stored.items():
        target = targets.get(name)
        if target is None:
            (plan.ignored if name in others else unexpected).append(name)
        elif reason := _misfit(target, value):
            misfits[name] = _lacks(checkpoint, target, value) or reason
        elif id(target.parameter) in filled:
            plan.repeated.append((target, value))
        else:
            plan.items.append((target, value))
            filled.add(id(target.parameter))
    accounted = filled | {id(targets[name].parameter) for name in misfits}
    missing = [
        name
        for name, target in targets.items()
        if id(target.parameter) not in accounted and name == target.name
    ]
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape, format or dtype": [f"{n}: {w}" for n, w in misfits.items()],
    }
    if any(found.values()):
        raise _error(checkpoint, found)
    return plan


def _targets(model: nn.Module) -> tuple[dict[str, _Target], set[str]]:
    """Parameters and persistent buffers by every name; names of other buffers."""
    targets: dict[str, _Target] = {}
    for slot in slots(model).values():
        for module, _, own in slot.places:
            targets[f"{module}.{own}" if module else own] = slot
    others = set()
    buffers: dict[int, _Buffer] = {}
    for prefix, module in model.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{prefix}.{own}" if prefix else own
            if own in module._non_persistent_buffers_set:
                others.add(name)
            else:
                shared = buffers.setdefault(id(buffer), _Buffer(buffer, name, []))
                shared.places.append((module, own))
                targets[name] = shared
    return targets, others


def _misfit(target: _Target, stored: _Stored) -> str | None:
    """Why this tensor cannot go there, or None."""
    own = target.parameter
    if isinstance(stored, mlx.PackedWeight):
        if stored.shape != tuple(own.shape):
            return f"{list(stored.shape)}; the model has {list(own.shape)}"
        if isinstance(target, _Buffer) or not own.is_floating_point():
            return f"quantized; the model has {layout.name_of(own.dtype)}"
        for _, module, _ in target.places:
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                return "quantized; the model's embedding has a max_norm"
        return None
    has, needs = layout.name_of(stored.dtype), layout.name_of(own.dtype)
    one = math.prod(stored.shape) == own.numel() == 1  # some writers drop its dimension
    if stored.shape != tuple(own.shape) and not one:
        return f"{has} {list(stored.shape)}; the model has {list(own.shape)}"
    both_float = stored.dtype.is_floating_point and own.is_floating_point()
    if not both_float and stored.dtype != own.dtype:
        return f"{has}; the model has {needs}"
    return None


def _lacks(checkpoint: Checkpoint, target: _Target, stored: _Stored) -> str | None:
    """What the file would need beside this tensor to be a packed weight, or None."""
    if isinstance(stored, StoredTensor) and target.parameter.is_floating_point():
        return mlx.lone_words(checkpoint, stored)
    return None


def _error(checkpoint: Checkpoint, found: dict[str, list[str]]) -> CheckpointError:
    lines = [f"{checkpoint.folder} does not fit the model, which was left as it was."]
    for kind, names in found.items():
        if names:
            lines.append(f"{len(names)} {kind}:")
            lines += [f"  {name}" for name in names]
    lines.append(f"Files read: {', '.join(f.name for f in checkpoint.files)}")
    return CheckpointError("\n".join(lines))


def _read(
    plan: _Plan, device: torch.device, report: LoadReport, progress: bool
) -> Iterator[tuple[_Target, Tensor]]:
    """Read all tensors to where they belong, in the order of the files.

    By several threads: most of the time goes into the first touch of fresh memory.
    """
    work = sorted(plan.items, key=lambda item: item[1].place)

    def value_of(item: tuple[_Target, _Stored]) -> Tensor:
        own = item[0].parameter
        return _value(*item, device if own.is_meta else own.device)

    pool = ThreadPoolExecutor(_READERS)
    try:
        values = pool.map(value_of, work)
        bar = tqdm(
            zip(work, values, strict=True),
            "loading",
            unit="tensor",
            total=len(work),
            delay=2,
            leave=False,
            disable=not progress,
        )
        for (target, _), value in bar:
            _note(report, target.name, value)
            yield target, value
    finally:
        pool.shutdown(cancel_futures=True)
    _check_repeated(plan)


def _check_repeated(plan: _Plan) -> None:
    """Raise CheckpointError unless what is stored twice for a tied weight is equal.

    Both are read again, so that they are compared on the CPU: other devices may round a
    packed one otherwise, and the meta device holds nothing.
    """
    first = {id(target.parameter): stored for target, stored in plan.items}
    for target, stored in plan.repeated:
        kept = first[id(target.parameter)]
        cpu = torch.device("cpu")
        if not torch.equal(_value(target, stored, cpu), _value(target, kept, cpu)):
            raise CheckpointError(
                f"the model ties {kept.name} and {stored.name}, and the checkpoint "
                "has different values for them. Untie them first: with "
                "tie_word_embeddings=False in the configuration (a keyword of "
                "from_pretrained), or in a module that has none with "
                f"model.{stored.name} = copy.deepcopy(model.{stored.name})"
            )


def _note(report: LoadReport, name: str, value: Tensor) -> None:
    if isinstance(value, AffineQuantizedTensor):
        report.packed[name] = (value.bits, value.group_size)
        report.packed_bytes += value.nbytes
    else:
        report.dense.append(name)
        report.dense_bytes += value.nbytes


def _value(target: _Target, stored: _Stored, device: torch.device) -> Tensor:
    own = target.parameter
    if isinstance(stored, mlx.PackedWeight):
        return stored.read(own.dtype, device)
    value = stored.read().view(own.shape)
    return move(cast(target.name, value, own.dtype), device)


def _put(target: _Target, value: Tensor) -> None:
    """Exchange a packed parameter, and what was on the meta device; copy the rest."""
    own = target.parameter
    packed = isinstance(value, AffineQuantizedTensor)
    if not (packed or own.is_meta or isinstance(own, AffineQuantizedTensor)):
        try:
            with torch.no_grad():
                own.copy_(value)
            return
        except RuntimeError:
            pass  # not to be written to: expanded, or made in inference mode
    if isinstance(target, _Buffer):
        target.put(value)
    else:
        grad = own.requires_grad and not packed
        target.put(nn.Parameter(value, requires_grad=grad))
