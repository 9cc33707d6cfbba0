"""What a checkpoint holds and what a load would make of it, by its headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import layout
from ..quantize import Footprint, FootprintRow
from ..tensor import AffineQuantizedTensor
from . import awq_settings, compressed_config, formats, gptq_settings, mlx
from .files import Checkpoint, CheckpointError, StoredTensor
from .forms import Stored
from .load import Plan, Planned, _find, _hub_names, _targets, make_plan, why_not_mlx
from .remote import RemoteTensor


@dataclass(frozen=True)
class Format:
    """How a checkpoint is quantized, as its configuration says."""

    name: str  # mlx, gptq, awq, compressed-tensors, dense, or another's quant_method
    settings: dict[str, Any] = field(default_factory=dict)  # the general ones
    overrides: int = 0  # modules that have their own
    readable: bool = True  # whether this library reads it

    def __str__(self) -> str:
        text = ", ".join(f"{key} {_short(v)}" for key, v in self.settings.items())
        text = f"{_TITLES.get(self.name, self.name)}{f': {text}' if text else ''}"
        if self.overrides:
            text += f" ({self.overrides} named modules have their own)"
        return text


_TITLES = {
    "mlx": "MLX",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "metal": "MLX, in transformers' own names (MetalConfig)",
}
_SHOWN = (
    *("bits", "w_bit", "group_size", "q_group_size", "mode", "sym", "desc_act"),
    *("version", "checkpoint_format", "packing_format", "zero_point", "format"),
)


def _short(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def format_of(checkpoint: Checkpoint) -> Format:
    """The format of a checkpoint, and its settings."""
    if mlx.recognizes(checkpoint):
        found = (mlx.settings(checkpoint.config) or [{}])[0]
        own = sum(isinstance(v, dict) for v in found.values())
        name = "metal" if mlx.in_other_layout(checkpoint.config) else "mlx"
        return Format(name, _general(found), own)
    other = formats.other_format(checkpoint)
    if other is None:
        said = [s.get("quant_method") for s in mlx.settings(checkpoint.config)]
        method = next(filter(None, said), None)
        return Format(str(method or "dense"), readable=method is None)
    name = other.__name__.rpartition(".")[2].replace("_", "-")
    if name == "gptq":
        found = gptq_settings.settings(checkpoint)[1]
    elif name == "awq":
        entry = awq_settings.settings(checkpoint)
        found = {} if entry is None else entry.values
    else:
        found = compressed_config.settings(checkpoint.config)
        groups = found.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                given = {"bits": weights.get("num_bits"), **weights}
                keys = ("bits", "group_size", "strategy", "symmetric")
                found = {**{k: given[k] for k in keys if given.get(k)}, **found}
    return Format(name, _general(found))


def _general(found: dict[str, Any]) -> dict[str, Any]:
    keys = (*_SHOWN, "strategy", "symmetric")
    return {k: found[k] for k in keys if isinstance(found.get(k), (int, str))}


@dataclass(frozen=True)
class Stock:
    """The tensors of a checkpoint as weights, and what is wrong with some."""

    sizes: Footprint  # bytes in the files, by stored names
    broken: dict[str, str]
    guessed: list[str]  # whose bits no configuration says


def take_stock(checkpoint: Checkpoint, plan: Plan | None) -> Stock:
    """All weights of a checkpoint, with those of `plan` as the model has them.

    Raises CheckpointError for what the format refuses as a whole.
    """
    packed: dict[str, Any] = {}
    broken: dict[str, str] = {}
    guessed: list[str] = []
    other = formats.other_format(checkpoint)
    if plan is not None:
        leaves = [v for p in (*plan.items, *plan.repeated) for v in p.leaves.values()]
        packed = {v.name: v for v in leaves if not isinstance(v, StoredTensor)}
    elif other is not None:
        opened = formats.opened(checkpoint, other)
        packed, broken = opened.packed, opened.broken
    elif mlx.recognizes(checkpoint):
        columns, guessed = _columns(checkpoint)
        packed, broken, _ = mlx.packed_weights(checkpoint, columns)
    owner = {part.name: name for name, v in packed.items() for part in v.parts}
    rows: dict[str, FootprintRow] = {}
    shapes: list[tuple[str, StoredTensor]] = []
    for tensor in checkpoint.tensors.values():
        name = owner.get(tensor.name, "")
        if not name and tensor.name.removesuffix("_shape") in packed:
            shapes.append((tensor.name.removesuffix("_shape"), tensor))
        elif not name:
            rows[tensor.name] = _dense_row(tensor)
        elif name not in rows:
            rows[name] = _packed_row(packed[name])
    for name, tensor in shapes:  # as numbers, which compressed-tensors stores
        rows[name] = replace(rows[name], bytes=rows[name].bytes + tensor.nbytes)
    return Stock(Footprint(tuple(rows.values())), broken, guessed)


def unread(checkpoint: Checkpoint) -> Stock:
    """The tensors of a checkpoint as they are, where its format is refused."""
    rows = map(_dense_row, checkpoint.tensors.values())
    return Stock(Footprint(tuple(rows)), {}, [])


def _packed_row(weight: Any) -> FootprintRow:
    group = next(
        getattr(weight, key)
        for key in ("source_group", "group", "group_size")
        if hasattr(weight, key)
    )
    shape = tuple(weight.shape)
    return FootprintRow(weight.name, "packed", shape, weight.bits, group, weight.nbytes)


def _dense_row(tensor: StoredTensor) -> FootprintRow:
    # Whole numbers are words of what could not be read, shapes or indices.
    kind = "dense" if tensor.dtype.is_floating_point else "buffer"
    bits = 8 * tensor.dtype.itemsize
    return FootprintRow(tensor.name, kind, tensor.shape, bits, None, tensor.nbytes)


def _columns(checkpoint: Checkpoint) -> tuple[dict[str, int], list[str]]:
    """How wide each packed weight in MLX format is, as the settings say; and those of
    which they say nothing that fits its shape."""
    found: dict[str, int] = {}
    guessed: list[str] = []
    entries = [mlx._formats(s) for s in mlx.settings(checkpoint.config)[:1]]
    every = [form for named in entries for forms in named.values() for form in forms]
    known = [(b, g) for b in layout.BITS for g in layout.GROUP_SIZES]
    known.sort(key=lambda pair: pair != (4, 64) and pair[1] != 64)
    for stem in mlx._stems(checkpoint):
        words = checkpoint.tensors[f"{stem}weight"].shape
        groups = checkpoint.tensors[f"{stem}scales"].shape
        if not (words and groups and groups[-1]):
            continue
        own = [f for n in entries for f in n.get(stem.removesuffix("."), n[""])]
        named = [(b, g) for _, b, g in (*sorted(own), *sorted(every))]
        fits = [
            pair
            for pair in (*named, *known)
            if pair[0] * pair[1] * groups[-1] == 32 * words[-1]
        ]
        bits, group = fits[0] if fits else (4, 64)
        found[f"{stem}weight"] = groups[-1] * group
        if (bits, group) not in named:
            guessed.append(f"{stem}weight")
    return found, guessed


# ---- what a load would do --------------------------------------------------------


@dataclass(frozen=True)
class Outlook:
    """What loading would make of a checkpoint."""

    plan: Plan | None = None
    packed: int = 0  # parameters
    dense: int = 0
    notes: dict[str, list[str]] = field(default_factory=dict)  # parameters, by reason
    refused: str = ""


def outlook(checkpoint: Checkpoint, model: nn.Module | None) -> Outlook:
    """Plan a load into `model`, on the meta device; without one, judge the names.

    Nothing is read. A refusal is an `Outlook` too.
    """
    if not formats.recognizes(checkpoint):
        said = any(s.get("quant_method") for s in mlx.settings(checkpoint.config))
        if said:
            return Outlook(refused=why_not_mlx(checkpoint))
        absent = [] if model is None else _not_stored(checkpoint, model)
        return Outlook(notes={_NOT_STORED: absent} if absent else {})
    try:
        if model is None:
            return _by_names(checkpoint)
        plan = make_plan(model, checkpoint)
    except CheckpointError as error:
        return Outlook(refused=str(error))
    notes: dict[str, list[str]] = {}
    packed = 0
    for item in plan.items:
        value = _loaded(item)
        packed += isinstance(value, AffineQuantizedTensor)
        text = item.remark(value)
        if text is None and item.form is None:
            text = "not stored: zeros"
        if text is None and _depends_on_order(item):
            text = "joined, and dense if act-order differs, which headers do not tell"
        if text:
            notes.setdefault(text, []).append(item.target.name)
    zeros = [n for n in plan.ignored if _is_taken_for_zeros(checkpoint, n)]
    if zeros:
        notes["the model has no such bias; a load checks that it is zero"] = zeros
    return Outlook(plan, packed, len(plan.items) - packed, notes)


_NOT_STORED = (
    "not in the files under the names that transformers has for them; a load refuses "
    "what is not there"
)


def _not_stored(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """What a model has and a dense checkpoint does not, by the names on the Hub."""
    names = _hub_names(model, checkpoint.tensors)
    targets, _ = _targets(model)
    found, missing = _find(names, targets, checkpoint)
    there = {id(target) for target, *_ in found.values()}
    return [name for name in missing if id(targets[name]) not in there]


def _is_taken_for_zeros(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".bias") and isinstance(
        checkpoint.tensors.get(name), RemoteTensor
    )


def _by_names(checkpoint: Checkpoint) -> Outlook:
    other = formats.other_format(checkpoint)
    problems = [] if other else mlx.check_settings(checkpoint.config)
    stock = take_stock(checkpoint, None)
    problems += [f"{name}: {why}" for name, why in stock.broken.items()]
    if problems:
        return Outlook(refused="\n".join(problems))
    packed = sum(row.kind == "packed" for row in stock.sizes.rows)
    return Outlook(packed=packed, dense=len(stock.sizes.rows) - packed)


def _depends_on_order(item: Planned) -> bool:
    orders = [
        leaf
        for leaf in item.leaves.values()
        if getattr(leaf, "g_idx", None) or getattr(leaf, "order", None)
    ]
    return len(item.leaves) > 1 and bool(orders)


def _loaded(item: Planned) -> Tensor:
    """What an item becomes, on the meta device."""
    dtype = item.target.parameter.dtype
    if item.form is None:
        return item.target.parameter
    leaves = {name: _meta(leaf, dtype) for name, leaf in item.leaves.items()}
    if isinstance(item.form, Stored):
        return leaves[item.form.name]
    return item.form.load(leaves.__getitem__)


def _meta(leaf: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(leaf, StoredTensor):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    if isinstance(leaf, mlx.FloatWeight) and leaf._why_dense:
        return torch.empty(leaf.shape, dtype=dtype, device="meta")
    bits, group = leaf.format
    *lead, columns = leaf.shape
    scales = leaf.scales.dtype
    if scales not in layout.WEIGHT_DTYPES:
        scales = torch.bfloat16
    words = torch.empty(*lead, columns * bits // 32, dtype=torch.int32, device="meta")
    parts = torch.empty(2, *lead, columns // group, dtype=scales, device="meta")
    return AffineQuantizedTensor.from_packed(
        words, parts[0], parts[1], bits=bits, group_size=group, dtype=dtype
    )
