"""Putting a checkpoint into a model: all is checked and read before anything changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..quantize import Slot, format_table, slots
from ..tensor import AffineQuantizedTensor
from . import mlx
from .files import Checkpoint, CheckpointError, StoredTensor, fetch, open_checkpoint

# How many names of a kind one error message lists.
_LISTED = 20


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
        rows = [("loaded", "count", "bits", "group")]
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
class _Plan:
    """What will go where."""

    packed: list[tuple[Slot, mlx.PackedWeight]]
    dense: list[tuple[Slot | _Buffer, StoredTensor]]
    repeated: list[tuple[Slot, StoredTensor | mlx.PackedWeight]]  # ties stored twice
    ignored: list[str]


@dataclass(frozen=True)
class _Buffer:
    """A persistent buffer, in the shape of a `Slot`."""

    parameter: Tensor
    name: str
    module: nn.Module
    own: str

    def put(self, value: Tensor) -> None:
        self.module._buffers[self.own] = value


def load_checkpoint_(
    model: nn.Module,
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> LoadReport:
    """Load an MLX checkpoint into a model with the same names, in place.

    `source` is a folder or the name of a Hub repository (the keywords are those of
    huggingface_hub). Each weight that the checkpoint has quantized becomes an
    `AffineQuantizedTensor` parameter of the module that it belongs to, on the device and
    with the dtype of the parameter that it replaces (from the meta device: on the CPU);
    its scales keep the dtype of the file. Other tensors are copied into the model's own
    and cast to their dtype. Tied weights may be stored once.

    The load is a transaction: everything is checked and read before the model changes.
    Raises `CheckpointError` (a ValueError), which lists every missing, unexpected,
    misshapen and wrongly typed tensor, and what `fetch` raises. The model is then as it
    was.
    """
    folder = fetch(
        source,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    checkpoint = open_checkpoint(folder)
    if not mlx.recognizes(checkpoint):
        raise CheckpointError(
            f"{folder} is not in MLX format: its config.json has no 'quantization' with "
            "bits and group_size, and no tensor is named *.scales. Load a dense model "
            "with its own library, and call quantize_ on it"
        )
    plan = _make_plan(model, checkpoint)
    report = LoadReport(str(source), ignored=plan.ignored)
    values = list(_read(plan, report, progress))
    for target, value in values:
        _put(target, value)
    return report


def _make_plan(model: nn.Module, checkpoint: Checkpoint) -> _Plan:
    """Match the checkpoint's names with the model's; raise if anything does not fit."""
    targets, others = _targets(model)
    columns = {
        name: target.parameter.shape[-1]
        for name, target in targets.items()
        if target.parameter.dim() > 1 and target.parameter.shape[-1]
    }
    problems = mlx.check_settings(checkpoint.config)
    if problems:
        raise _error(checkpoint, {"settings that are not understood": problems})
    weights, used, wrong = mlx.packed_weights(checkpoint, columns)
    bad_names = {line.split(":")[0] for line in wrong}
    misfits = wrong + [
        line for name, w in weights.items() if (line := _misfit(targets[name], w))
    ]
    plan = _Plan([], [], [], [])
    filled: dict[int, str] = {}
    unexpected = []
    for name, stored in checkpoint.tensors.items():
        target = targets.get(name)
        if name in used and name not in weights:
            if target is None and name.endswith(".weight"):
                unexpected.append(name)
            elif target is None and name.rsplit(".", 1)[0] + ".weight" not in targets:
                unexpected.append(name)
            continue
        if name not in used and target is None:
            (plan.ignored if name in others else unexpected).append(name)
            continue
        if target is None:
            continue
        if name not in weights and (line := _dense_misfit(target, stored)):
            misfits.append(line)
        value = weights.get(name, stored)
        if id(target.parameter) in filled and isinstance(target, Slot):
            plan.repeated.append((target, value))
        elif isinstance(value, mlx.PackedWeight):
            plan.packed.append((target, value))  # type: ignore[arg-type]
        else:
            plan.dense.append((target, value))
        filled[id(target.parameter)] = name
    missing = [
        name
        for name, target in targets.items()
        if id(target.parameter) not in filled and name not in bad_names
        if name == target.name
    ]
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape, format or dtype": misfits,
    }
    if any(found.values()):
        raise _error(checkpoint, found)
    return plan


def _targets(model: nn.Module) -> tuple[dict[str, Slot | _Buffer], set[str]]:
    """Parameters and persistent buffers by every name; names of other buffers."""
    targets: dict[str, Slot | _Buffer] = {}
    for slot in slots(model).values():
        for module, _, own in slot.places:
            targets[f"{module}.{own}" if module else own] = slot
    others = set()
    for prefix, module in model.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{prefix}.{own}" if prefix else own
            if own in module._non_persistent_buffers_set:
                others.add(name)
            else:
                targets[name] = _Buffer(buffer, name, module, own)
    return targets, others


def _misfit(target: Slot | _Buffer, weight: mlx.PackedWeight) -> str | None:
    expected = tuple(target.parameter.shape)
    shape = (*weight.packed.shape[:-1], weight.scales.shape[-1] * weight.group_size)
    if shape != expected:
        return f"{weight.name}: {list(shape)}; the model has {list(expected)}"
    if isinstance(target, _Buffer) or not target.parameter.is_floating_point():
        return f"{weight.name}: quantized; the model has {_says(target.parameter)}"
    for _, module, _ in target.places:
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return f"{weight.name}: quantized; the model's embedding has a max_norm"
    return None


def _dense_misfit(target: Slot | _Buffer, stored: StoredTensor) -> str | None:
    own = target.parameter
    # One element is one element: some writers drop its dimension.
    if stored.shape != tuple(own.shape) and not (
        stored.nbytes == stored.dtype.itemsize and own.numel() == 1
    ):
        return (
            f"{stored.name}: {_says(stored)} {list(stored.shape)}; "
            f"the model has {list(own.shape)}"
        )
    same_kind = stored.dtype.is_floating_point and own.is_floating_point()
    if not same_kind and stored.dtype != own.dtype:
        return f"{stored.name}: {_says(stored)}; the model has {_says(own)}"
    return None


def _says(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _error(checkpoint: Checkpoint, found: dict[str, list[str]]) -> CheckpointError:
    lines = [f"{checkpoint.folder} does not fit the model, which was left as it was."]
    for kind, names in found.items():
        if names:
            lines.append(f"{len(names)} {kind}:")
            lines += [f"  {name}" for name in names[:_LISTED]]
            if len(names) > _LISTED:
                lines.append(f"  … and {len(names) - _LISTED} more")
    lines.append(f"Files read: {', '.join(f.name for f in checkpoint.files)}")
    return CheckpointError("\n".join(lines))


def _read(
    plan: _Plan, report: LoadReport, progress: bool
) -> Iterator[tuple[Slot | _Buffer, Tensor]]:
    """Read all tensors, in the order in which they lie in the files."""
    work: list[tuple[Slot | _Buffer, mlx.PackedWeight | StoredTensor]] = [
        *plan.packed,
        *plan.dense,
    ]
    work.sort(key=lambda item: _place(item[1]))
    read: dict[int, Tensor] = {}
    for target, stored in tqdm(
        work, "loading", unit="tensor", delay=2, leave=False, disable=not progress
    ):
        value = _value(target, stored)
        read[id(target.parameter)] = value
        if isinstance(value, AffineQuantizedTensor):
            report.packed[target.name] = (value.bits, value.group_size)
            report.packed_bytes += value.nbytes
        else:
            report.dense.append(target.name)
            report.dense_bytes += value.nbytes
        yield target, value
    for target, stored in plan.repeated:
        if not torch.equal(_value(target, stored), read[id(target.parameter)]):
            names = [f"{m}.{own}" for m, _, own in target.places]
            raise CheckpointError(
                f"the model ties {' and '.join(names)}, and the checkpoint has different "
                "values for them. Untie them (config.tie_word_embeddings = False) first"
            )


def _place(stored: mlx.PackedWeight | StoredTensor) -> tuple[str, int]:
    first = stored.packed if isinstance(stored, mlx.PackedWeight) else stored
    return str(first.file), first.start


def _value(target: Slot | _Buffer, stored: mlx.PackedWeight | StoredTensor) -> Tensor:
    own = target.parameter
    device = torch.device("cpu") if own.is_meta else own.device
    if isinstance(stored, mlx.PackedWeight):
        return stored.read(own.dtype, device)
    return stored.read().view(own.shape).to(device, own.dtype)


def _put(target: Slot | _Buffer, value: Tensor) -> None:
    """Exchange a packed parameter, and what was on the meta device; copy the rest."""
    own = target.parameter
    if isinstance(target, _Buffer):
        if own.is_meta:
            target.put(value)
        else:
            own.copy_(value)
        return
    packed = isinstance(value, AffineQuantizedTensor)
    if packed or own.is_meta or isinstance(own, AffineQuantizedTensor):
        grad = own.requires_grad and not packed
        target.put(nn.Parameter(value, requires_grad=grad))
    else:
        with torch.no_grad():
            own.copy_(value)
