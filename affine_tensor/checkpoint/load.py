"""Putting a checkpoint into a model: all is checked and read before it changes."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import layout
from ..quantize import Slot, format_table, slots, tell_packed
from ..tensor import AffineQuantizedTensor
from . import formats, mlx
from .files import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    cast,
    fetch,
    move,
    open_checkpoint,
)
from .forms import ChannelsLast, Form, Part, Stored, keeps_experts_apart
from .names import Names

_noting = threading.Lock()
_READERS = min(4, os.cpu_count() or 1)  # threads


@dataclass
class LoadReport:
    """What was loaded. Prints as a short table."""

    source: str
    packed: dict[str, tuple[int, int]] = field(default_factory=dict)  # bits, group size
    dense: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)  # what became of a weight
    packed_bytes: int = 0
    dense_bytes: int = 0

    def note(self, item: Planned, value: Tensor) -> None:
        """Enter what a parameter became; from several threads."""
        with _noting:
            self._note(item, value)

    def _note(self, item: Planned, value: Tensor) -> None:
        name = item.target.name
        if isinstance(value, AffineQuantizedTensor):
            self.packed[name] = (value.bits, value.group_size)
            self.packed_bytes += value.nbytes
        else:
            self.dense.append(name)
            self.dense_bytes += value.nbytes
        text = item.remark(value)
        if text:
            self.notes[name] = text

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
        by_text: dict[str, list[str]] = {}
        for name, text in self.notes.items():
            by_text.setdefault(text, []).append(name)
        for text, names in by_text.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{', '.join(names[:3])}{more}: {text}")
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
class Planned:
    """One parameter or buffer, and what its value is made of."""

    target: _Target
    form: Form | None  # None: zeros
    leaves: dict[str, _Stored]

    @property
    def place(self) -> tuple[str, int]:
        return min((leaf.place for leaf in self.leaves.values()), default=("", 0))

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Read it to `device`, as a parameter of `dtype`.

        Packed weights stay packed where their form can be had so. A vector that does not
        survive the way to `dtype` and back (1 + w, in bfloat16) is float32.
        """
        shape = self.target.parameter.shape
        if self.form is None:
            return torch.zeros(shape, dtype=dtype, device=device)
        parts: dict[str, AffineQuantizedTensor] = {}
        if len(self.leaves) == 1:
            value = self._load(self.form, self.leaves, dtype, device, parts)
        elif (joined := self._by_experts(self.form, dtype, device)) is not None:
            return joined
        else:
            with _joining:
                value = self._load(self.form, self.leaves, dtype, device, parts)
        if any(
            not isinstance(v, (StoredTensor, mlx.PackedWeight))
            for v in self.leaves.values()
        ):
            _release_memory()  # of the words in the file's own layout
        if isinstance(value, AffineQuantizedTensor):
            return value
        own = self._cast(value, dtype)
        own = own if own.shape == shape else own.view(shape)
        if parts:
            # For saving, which would have to quantize again what this is made of. In the
            # order of the form, since another packaging has other names.
            ordered = [parts.get(name) for name in self.form.names()]
            own.affine_parts = ordered  # type: ignore[attr-defined]
        return own

    def _load(
        self,
        form: Form,
        leaves: Mapping[str, _Stored],
        dtype: torch.dtype,
        device: torch.device,
        parts: dict[str, AffineQuantizedTensor],
    ) -> Tensor:
        """What the form makes of the leaves; `parts` receives the packed ones."""

        def stored(leaf_name: str) -> Tensor:
            leaf = leaves[leaf_name]
            if isinstance(leaf, StoredTensor):
                value = leaf.read()
                if isinstance(form, Stored):  # cast where it was read
                    value = cast(self.target.name, value, dtype)
                return move(value, device)
            value = leaf.read(dtype, device)
            if isinstance(value, AffineQuantizedTensor):
                parts[leaf_name] = value
            return value

        return form.load(stored)

    def _by_experts(
        self, form: Form, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Joined a few experts at a time, so that the memory of the pieces is not needed
        as well, and moved then; None if that cannot be done, or gives a dense tensor."""
        count = self.target.parameter.shape[:1].numel()
        packed = [v for v in self.leaves.values() if isinstance(v, mlx.PackedWeight)]
        stacks = [v for v in packed if len(v.shape) == 3 and v.shape[0] == count]
        if len(stacks) < len(self.leaves) or not keeps_experts_apart(form):
            return None
        whole: AffineQuantizedTensor | None = None
        step = max(1, _SLAB * count // self.nbytes)
        for start in range(0, count, step):
            leaves = {leaf.name: leaf.experts(start, start + step) for leaf in stacks}
            try:
                some = self._load(form, leaves, dtype, torch.device("cpu"), {})
            except CheckpointError:
                return None  # read as a whole, it says where
            if not isinstance(some, AffineQuantizedTensor):
                return None
            if whole is None:
                whole = some._map(lambda part: part.new_empty(count, *part.shape[1:]))
            for own, part in zip(whole._parts(), some._parts(), strict=True):
                own[start : start + step] = part
        return None if whole is None else whole._map(lambda part: move(part, device))

    def remark(self, value: Tensor) -> str | None:
        """What the report says of this value: what was not kept as it was stored."""
        leaves = [v for v in self.leaves.values() if not isinstance(v, StoredTensor)]
        notes = [leaf.note for leaf in leaves if getattr(leaf, "note", None)]
        if notes:
            return notes[0]
        if not leaves or isinstance(value, AffineQuantizedTensor):
            return None
        formats = sorted({leaf.format for leaf in leaves})
        if len(formats) > 1:
            pairs = " and ".join(f"{b} bits in groups of {g}" for b, g in formats)
            return f"dense, since its parts differ: {pairs}"
        if len(leaves) < len(self.leaves):
            return "dense, since only a part of it is quantized"
        return "dense, since its groups run along another axis here"

    def _cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        own = cast(self.target.name, value, dtype)
        forms = [] if self.form is None else list(self.form.forms())
        changes = any(form.changes_values for form in forms)
        # Matrices are multiplied with activations, which have the dtype of the model.
        if value.is_meta or value.dim() > 1 or not changes:
            return own
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        assert self.form is not None
        back, there = self.form.save(own), self.form.save(wide)
        exact = all(
            torch.equal(back[name].to(leaf.dtype), there[name].to(leaf.dtype))
            for name, leaf in self.leaves.items()
            if isinstance(leaf, StoredTensor)
        )
        return own if exact else wide


def _release_memory() -> None:
    """Give freed memory back to the system: glibc keeps blocks of megabytes, which add up
    to half a file. Elsewhere nothing is done."""
    if _trim is not None:
        _trim(0)


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

# Weights that are joined whole exist twice for a moment, so one at a time.
_joining = threading.Lock()

# Bytes of experts that are joined at once: of more, malloc would keep much for itself.
_SLAB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What will go where."""

    items: list[Planned] = field(default_factory=list)
    repeated: list[Planned] = field(default_factory=list)  # of a tied weight, again
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
    if not formats.recognizes(checkpoint):
        raise CheckpointError(
            f"{folder} is not in MLX format: {why_not_mlx(checkpoint)}"
        )
    plan = make_plan(model, checkpoint)
    report = LoadReport(str(source), ignored=plan.ignored)
    values = list(_read(plan, device, report, progress))
    for target, value in values:
        _put(target, value)
    tell_packed(model)
    return report


def why_not_mlx(checkpoint: Checkpoint) -> str:
    """What keeps a checkpoint from being one of MLX, for an error's text."""
    methods = [found.get("quant_method") for found in mlx.settings(checkpoint.config)]
    if any(methods):
        return f"its config.json says quant_method {next(filter(None, methods))!r}"
    return (
        "its config.json has no 'quantization' with bits and group_size, and no tensor "
        "is named *.scales. Load a dense model with its own library, and call "
        "quantize_ on it"
    )


def make_plan(model: nn.Module, checkpoint: Checkpoint) -> Plan:
    """Find out where each parameter lies; raise CheckpointError if anything is amiss."""
    other = formats.other_format(checkpoint)
    if other is not None:
        own = formats.opened(checkpoint, other)
        checkpoint = own.checkpoint
        names = _hub_names(model, checkpoint.tensors)
    else:
        problems = mlx.check_settings(checkpoint.config)
        if problems:
            raise _error(checkpoint, {"settings that are not understood": problems})
        names = Names(model)
        if mlx.in_other_layout(checkpoint.config):
            names = _hub_names(model, mlx.weight_names(checkpoint))
    targets, others = _targets(model)
    found, missing = _find(names, targets, checkpoint)
    if other is not None:
        packed, broken, parts = own.packed, own.broken, own.parts
    else:
        columns: dict[str, int] = {}
        for _, _, shapes in found.values():
            columns |= {n: shape[-1] for n, shape in shapes.items() if len(shape) > 1}
        packed, broken, parts = mlx.packed_weights(checkpoint, columns)

    plan, misfits = Plan(), {}
    used: set[str] = set(parts)
    filled: set[int] = set()
    # Packed ones first: of a tied weight that is stored in both ways they are kept.
    in_order = sorted(found.values(), key=lambda f: f[2].keys().isdisjoint(packed))
    for target, form, shapes in in_order:
        used |= shapes.keys()
        leaves: dict[str, _Stored] = {}
        for name, shape in shapes.items():
            value = packed.get(name) or checkpoint.tensors[name]
            reason = broken.get(name) or _misfit(checkpoint, target, shape, value)
            if reason:
                misfits[name] = reason
            leaves[name] = value
        if id(target.parameter) in filled:
            plan.repeated.append(Planned(target, form, leaves))
        else:
            plan.items.append(Planned(target, form, leaves))
            filled.add(id(target.parameter))
    for name, target in targets.items():
        if id(target.parameter) not in filled and names.is_absent(name):
            plan.items.append(Planned(target, None, {}))
            filled.add(id(target.parameter))
    unexpected: list[str] = []
    for name in checkpoint.tensors:
        if name not in used:
            ignored = name in others or names.is_ignored(name)
            if other is not None and not ignored and _is_added_bias(name, packed):
                if bool(checkpoint.tensors[name].read().any()):
                    misfits[name] = "not zero, and the model's module has no bias"
                    continue
                ignored = True
            (plan.ignored if ignored else unexpected).append(name)
    kinds = {
        "missing": [
            f"{name}{where}"
            for name, where in missing.items()
            if id(targets[name].parameter) not in filled and name == targets[name].name
        ],
        "unexpected": unexpected,
        "of another shape, format or dtype": [f"{n}: {w}" for n, w in misfits.items()],
    }
    if any(kinds.values()):
        raise _error(checkpoint, kinds)
    return plan


def _hub_names(model: nn.Module, stored: Iterable[str]) -> Names:
    from .hub_names import HubNames  # it imports what of transformers takes a second

    return HubNames(model, stored)


def _is_added_bias(name: str, packed: Mapping[str, object]) -> bool:
    """Whether it is the bias of a packed weight: some writers give one to each, of zeros
    where the module has none."""
    stem, _, own = name.rpartition(".")
    return own == "bias" and f"{stem}.weight" in packed


_Found = tuple["_Target", Form, dict[str, tuple[int, ...]]]


def _find(
    names: Names, targets: dict[str, _Target], checkpoint: Checkpoint
) -> tuple[dict[str, _Found], dict[str, str]]:
    """The form of each name whose stored tensors are there, with the shapes that they
    must have; and the names without one, with what was looked for."""
    found: dict[str, _Found] = {}
    missing: dict[str, str] = {}
    for name, target in targets.items():
        own = torch.empty(target.parameter.shape, device="meta")
        best: list[str] = []
        for form in names.forms(name, own.shape):
            stored = list(form.names())
            absent = [n for n in stored if n not in checkpoint.tensors]
            if absent:
                best = best or absent
                continue
            try:
                shapes = {n: tuple(t.shape) for n, t in form.save(own).items()}
            except (ValueError, RuntimeError, IndexError):
                continue  # a parameter of another kind
            found.setdefault(name, (target, form, shapes))
            if _fits(checkpoint, shapes):
                # Of several forms one with the right shape: as with convolutions.
                found[name] = (target, form, shapes)
                break
        if name not in found:
            looked = [n for n in best if n != name]
            missing[name] = f" ({', '.join(looked[:3])})" if looked else ""
    _settle_convolutions(names, found)
    for name in _taken_twice(found):
        missing[name] = " (what could be it is another parameter's)"
        del found[name]
    return found, missing


def _settle_convolutions(names: Names, found: dict[str, _Found]) -> None:
    """Where a kernel could be channels-last or not, by those of the file that tell.

    Both orders have one shape where a kernel is as wide as it has channels.
    """
    clear: set[bool] = set()
    open_: dict[str, Form] = {}
    for name, (target, form, shapes) in found.items():
        if not isinstance(form, ChannelsLast):
            # Stacked experts, for one, have three dimensions and tell nothing.
            forms = names.forms(name, target.parameter.shape)
            if isinstance(form, Stored) and any(
                isinstance(other, ChannelsLast) for other in forms
            ):
                clear.add(False)
        elif next(iter(shapes.values())) != tuple(target.parameter.shape):
            clear.add(True)
        else:
            forms = names.forms(name, target.parameter.shape)
            others = [other for other in forms if isinstance(other, Stored)]
            if others:
                open_[name] = others[0]
    if clear == {False}:
        for name, form in open_.items():
            target, _, shapes = found[name]
            found[name] = (target, form, shapes)


def _taken_twice(found: dict[str, _Found]) -> list[str]:
    """Parameters for which a whole tensor was found that is another's already: by its own
    name, or the first that asked."""
    owner: dict[str, str] = {}
    exact = [name for name, (_, _, shapes) in found.items() if name in shapes]
    lost = []
    for name in dict.fromkeys([*exact, *found]):
        target, form, shapes = found[name]
        if any(isinstance(one, Part) for one in form.forms()):
            continue
        others = {owner.setdefault(stored, name) for stored in shapes}
        if any(found[other][0].parameter is not target.parameter for other in others):
            lost.append(name)
    return lost


def _fits(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(
        tuple(checkpoint.tensors[name].shape) == shape
        or checkpoint.tensors[name].dtype in (torch.uint32, torch.int32)
        for name, shape in shapes.items()
    )


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
    # transformers ties some only after it has loaded them.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in tied.items():
        if name in targets and source in targets:
            targets[name] = targets[source]
    return targets, others


def _misfit(
    checkpoint: Checkpoint, target: _Target, shape: tuple[int, ...], stored: _Stored
) -> str | None:
    """Why this tensor cannot go there, or None; `shape` is the one that it must have."""
    own = target.parameter
    if not isinstance(stored, StoredTensor):
        if stored.shape != shape:
            return f"{list(stored.shape)}; the model has {list(shape)}"
        if isinstance(target, _Buffer) or not own.is_floating_point():
            return f"quantized; the model has {layout.name_of(own.dtype)}"
        for _, module, _ in target.places:
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                return "quantized; the model's embedding has a max_norm"
        return None
    if own.is_floating_point() and (lacks := mlx.lone_words(checkpoint, stored)):
        return lacks
    has, needs = layout.name_of(stored.dtype), layout.name_of(own.dtype)
    one = math.prod(stored.shape) == math.prod(shape) == 1  # some drop its dimension
    if stored.shape != shape and not one:
        return f"{has} {list(stored.shape)}; the model has {list(shape)}"
    both_float = stored.dtype.is_floating_point and own.is_floating_point()
    if not both_float and stored.dtype != own.dtype:
        return f"{has}; the model has {needs}"
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
    plan: Plan, device: torch.device, report: LoadReport, progress: bool
) -> Iterator[tuple[_Target, Tensor]]:
    """Read all tensors to where they belong, in the order of the files.

    By several threads: most of the time goes into the first touch of fresh memory.
    """
    work = sorted(plan.items, key=lambda item: item.place)

    def value_of(item: Planned) -> Tensor:
        own = item.target.parameter
        return item.read(own.dtype, device if own.is_meta else own.device)

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
        for item, value in bar:
            report.note(item, value)
            yield item.target, value
    finally:
        pool.shutdown(cancel_futures=True)
    check_repeated(plan)


def check_repeated(plan: Plan) -> None:
    """Raise CheckpointError unless what is stored twice for a tied weight is equal.

    Both are read again, so that they are compared on the CPU: other devices may round a
    packed one otherwise, and the meta device holds nothing.
    """
    first = {id(item.target.parameter): item for item in plan.items}
    cpu = torch.device("cpu")
    for again in plan.repeated:
        kept, dtype = first[id(again.target.parameter)], again.target.parameter.dtype
        if not torch.equal(again.read(dtype, cpu), kept.read(dtype, cpu)):
            names = [next(iter(item.leaves)) for item in (kept, again)]
            raise CheckpointError(
                f"the model ties {names[0]} and {names[1]}, and the checkpoint "
                "has different values for them. Untie them first: with "
                "tie_word_embeddings=False in the configuration (a keyword of "
                "from_pretrained), or in a module that has none with "
                f"model.{names[1]} = copy.deepcopy(model.{names[1]})"
            )


def _put(target: _Target, value: Tensor) -> None:
    """Exchange a packed parameter, and what was on the meta device; copy the rest."""
    own = target.parameter
    packed = isinstance(value, AffineQuantizedTensor)
    as_is = own.is_meta or value.dtype != own.dtype or hasattr(value, "affine_parts")
    if not (packed or as_is or isinstance(own, AffineQuantizedTensor)):
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
        target.put(as_parameter(value, grad))


def as_parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    """A parameter of this value, with the parts that it was made of."""
    parameter = nn.Parameter(value, requires_grad=requires_grad)
    if hasattr(value, "affine_parts"):
        parameter.affine_parts = value.affine_parts  # type: ignore[attr-defined]
    return parameter
