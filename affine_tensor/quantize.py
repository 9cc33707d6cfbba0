"""Whole models: `quantize_`, `dequantize_`, `footprint`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm

from . import layout
from .tensor import AffineQuantizedTensor, local_of, logger


@dataclass(frozen=True)
class AffineConfig:
    """How to quantize: code width in bits and weights per scale.

    `bits` is one of 1, 2, 3, 4, 5, 6, 8; `group_size` one of 16, 32, 64, 128, 256 (MLX
    itself reads 32, 64 and 128). Anything else raises ValueError.
    """

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        layout.check_format(self.bits, self.group_size)


Filter = Callable[[nn.Module, str], "bool | AffineConfig"]


@dataclass
class QuantizeReport:
    """What `quantize_` did: names of modules, and why others were left alone."""

    quantized: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{_modules(len(self.quantized))} quantized"]
        if self.skipped:
            lines[0] += f", {len(self.skipped)} left alone:"
            lines += [f"  {_shown(name)}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def _modules(count: int) -> str:
    return f"{count} module" if count == 1 else f"{count} modules"


def _shown(name: str) -> str:
    """A module's name for people: that of the model itself is empty."""
    return name or "(the model itself)"


@dataclass
class Slot:
    """One distinct parameter and all the places that hold it."""

    parameter: Tensor
    places: list[tuple[str, nn.Module, str]]  # module name, module, parameter name

    @property
    def name(self) -> str:
        module, _, own = self.places[0]
        return f"{module}.{own}" if module else own

    def put(self, parameter: nn.Parameter) -> None:
        for _, module, own in self.places:
            module._parameters[own] = parameter


def slots(model: nn.Module) -> dict[int, Slot]:
    """The parameters of a model by identity, so that ties are seen, in its order."""
    found: dict[int, Slot] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                slot = found.setdefault(id(parameter), Slot(parameter, []))
                slot.places.append((name, module, own))
    return found


def quantize_(
    model: nn.Module,
    config: AffineConfig | None = None,
    filter_fn: Filter | None = None,
    *,
    progress: bool = True,
) -> QuantizeReport:
    """Quantize the weights of a model's `nn.Linear` and `nn.Embedding`, in place.

    The modules stay what they are; their `weight` becomes an `AffineQuantizedTensor`
    parameter, frozen, on the device where it was, of the dtype that it had.

    `filter_fn(module, name)` is asked for each of these modules: False leaves it dense,
    True takes `config` (default: 4 bits, group size 64), and an `AffineConfig` of its
    own makes a mixed recipe. A weight that several modules share is quantized once and
    stays shared; it is left dense where one of its modules is filtered out. Weights that
    do not fit, because a row is not whole groups, say, are left alone. The report lists
    them, and so does the log, unless it was the filter that spoke.

    All weights are quantized before the first is exchanged, so a failure (ValueError
    that names the weight, for NaN or infinite values) leaves the model as it was; dense
    and packed weights exist together for a moment.
    """
    config = AffineConfig() if config is None else config
    if not isinstance(config, AffineConfig):
        raise TypeError(
            f"config is {config!r}; an AffineConfig is needed, such as "
            "AffineConfig(bits=4, group_size=64)"
        )
    report = QuantizeReport()
    chosen = list(_choose(model, config, filter_fn, report))
    packed = []
    for slot, own in tqdm(
        chosen, "quantizing", unit="weight", delay=2, leave=False, disable=not progress
    ):
        try:
            weight = AffineQuantizedTensor.from_dense(
                slot.parameter, own.bits, own.group_size
            )
        except ValueError as error:
            raise ValueError(
                f"{slot.name}: {error} (filter_fn leaves it dense by returning False)"
            ) from error
        packed.append(nn.Parameter(weight, requires_grad=False))
    for (slot, _), parameter in zip(chosen, packed, strict=True):
        slot.put(parameter)
        report.quantized += [name for name, _, _ in slot.places]
    tell_packed(model)
    unasked = {n: why for n, why in report.skipped.items() if why != _FILTERED}
    if unasked:
        logger.warning(
            "%s left as found: %s",
            _modules(len(unasked)),
            "; ".join(f"{_shown(name)} ({why})" for name, why in unasked.items()),
        )
    return report


# What is told of each model that has got packed weights. The package enters here what
# stands above this module.
ON_PACKED: list[Callable[[nn.Module], None]] = []


def tell_packed(model: nn.Module) -> None:
    for tell in ON_PACKED:
        tell(model)


_FILTERED = "left out by filter_fn"


def _choose(
    model: nn.Module,
    config: AffineConfig,
    filter_fn: Filter | None,
    report: QuantizeReport,
) -> Iterator[tuple[Slot, AffineConfig]]:
    """The weights to quantize; notes in the report why others are not."""
    known = slots(model)
    answers: dict[int, list[tuple[str, bool | AffineConfig]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        answer = True if filter_fn is None else filter_fn(module, name)
        if not isinstance(answer, (bool, AffineConfig)):
            raise TypeError(
                f"filter_fn returned {answer!r} for {_shown(name)}; a bool or an "
                "AffineConfig is needed"
            )
        weight = module._parameters.get("weight")
        if weight is None:
            computed = "its weight is computed, not a parameter"
            report.skipped[name] = computed if answer else _FILTERED
        else:
            answers.setdefault(id(weight), []).append((name, answer))
    for key, asked in answers.items():
        own = _agreed([answer for _, answer in asked], config, asked)
        reason = _FILTERED if own is None else _misfit(known[key], own)
        if reason is None and own is not None:
            yield known[key], own
            continue
        for name, answer in asked:
            tied = reason == _FILTERED and answer is not False
            report.skipped[name] = "tied to a module left out" if tied else str(reason)


def _agreed(
    answers: list[bool | AffineConfig],
    config: AffineConfig,
    asked: list[tuple[str, bool | AffineConfig]],
) -> AffineConfig | None:
    """The one configuration for a weight that several modules may share."""
    if not all(answers):
        return None
    configs = {config if answer is True else answer for answer in answers}
    if len(configs) > 1:
        given = ", ".join(
            f"{_shown(name)} {config if answer is True else answer}"
            for name, answer in asked
        )
        raise ValueError(
            "filter_fn gave different configurations to modules that share one weight: "
            f"{given}. Return the same for all of them, or untie them first"
        )
    (own,) = configs
    return own if isinstance(own, AffineConfig) else None


def _misfit(slot: Slot, config: AffineConfig) -> str | None:
    """Why this weight cannot be quantized, or None."""
    weight = slot.parameter
    if isinstance(weight, AffineQuantizedTensor):
        return "it is quantized already"
    if nn.parameter.is_lazy(weight):
        return "its shape is not known yet"
    if is_traceable_wrapper_subclass(weight):
        return f"it is a {type(weight).__name__}, not a plain tensor"
    for _, module, _ in slot.places:
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "an embedding with max_norm rewrites its weight"
    if weight.dtype not in layout.LOGICAL_DTYPES:
        return f"its dtype is {weight.dtype}"
    if weight.dim() < 2:
        return f"its shape is {list(weight.shape)}"
    return layout.why_not(
        weight.shape[-1], bits=config.bits, group_size=config.group_size
    )


def dequantize_(
    model: nn.Module, dtype: torch.dtype | None = None, *, progress: bool = True
) -> None:
    """Make every packed parameter of a model dense again, in place.

    They take `dtype`, or the dtype that each counted as; ties survive. They stay frozen:
    call ``model.requires_grad_(True)`` to train them.
    """
    for slot in tqdm(
        slots(model).values(),
        "dequantizing",
        unit="weight",
        delay=2,
        leave=False,
        disable=not progress,
    ):
        if isinstance(slot.parameter, AffineQuantizedTensor):
            dense = slot.parameter.dequantize(dtype).contiguous()
            slot.put(nn.Parameter(dense, requires_grad=False))
        elif hasattr(slot.parameter, "affine_parts"):
            del slot.parameter.affine_parts  # what it was made of when it was loaded


@dataclass(frozen=True)
class FootprintRow:
    """One distinct parameter (or all buffers of a model, by name)."""

    name: str
    kind: str  # class of the module that holds it
    shape: tuple[int, ...]
    bits: int  # of a code, or of a dense element
    group_size: int | None  # None where dense
    bytes: int
    tied: tuple[str, ...] = ()  # other names of the same parameter

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(1, self.elements)


@dataclass(frozen=True)
class Footprint:
    """What a model's parameters and buffers take, in real bytes. Prints as a table."""

    rows: tuple[FootprintRow, ...]

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Number of weights, as counted in the dense model; buffers are none."""
        return sum(row.elements for row in self.rows if row.kind != "buffer")

    @property
    def bits_per_weight(self) -> float:
        """All bytes, those of buffers too, over the number of weights."""
        return 8 * self.bytes / max(1, self.parameters)

    def __str__(self) -> str:
        table = [("module", "count", "shape", "bits", "group", "bytes", "bits/weight")]
        for rows in _rows_alike(self.rows):
            first = rows[0]
            name = " = ".join((first.name, *first.tied))
            table.append(
                (
                    name if len(rows) == 1 else _pattern(name),
                    str(len(rows)),
                    "x".join(map(str, first.shape)) or "1",
                    str(first.bits),
                    "-" if first.group_size is None else str(first.group_size),
                    f"{sum(row.bytes for row in rows):,}",
                    f"{first.bits_per_weight:.2f}",
                )
            )
        total = ("total", str(len(self.rows)), f"{self.parameters:,}", "", "")
        table.append((*total, f"{self.bytes:,}", f"{self.bits_per_weight:.2f}"))
        return format_table(table)


def footprint(model: nn.Module) -> Footprint:
    """Bits, group size, bytes and bits per weight of each parameter and buffer.

    A shared parameter counts once, and so does memory that several share: the first has
    it. Of a tensor that is sharded over processes, the shard that is here counts, and its
    shape. One of a lazy module, as yet without a shape, takes nothing. Printing it joins
    the layers that are alike.
    """
    rows, count = [], _Memory()
    for slot in slots(model).values():
        module, weight = slot.places[0][1], local_of(slot.parameter)
        bits, group_size = 8 * weight.dtype.itemsize, None
        lazy = torch.nn.parameter.is_lazy(weight)
        if isinstance(weight, AffineQuantizedTensor):
            bits, group_size = weight.bits, weight.group_size
        others = tuple(".".join(filter(None, (n, own))) for n, _, own in slot.places)
        rows.append(
            FootprintRow(
                name=slot.name,
                kind=type(module).__name__,
                shape=(0,) if lazy else tuple(weight.shape),
                bits=bits,
                group_size=group_size,
                bytes=0 if lazy else count(weight),
                tied=others[1:],
            )
        )
    for name, buffer in model.named_buffers():
        here = local_of(buffer)
        bits, shape = 8 * here.dtype.itemsize, tuple(here.shape)
        rows.append(FootprintRow(name, "buffer", shape, bits, None, count(here)))
    return Footprint(tuple(rows))


class _Memory:
    """Counts the bytes of tensors, and no byte twice."""

    def __init__(self) -> None:
        self._seen: set[tuple] = set()
        self._counted: dict[int, int] = {}  # bytes of each storage

    def __call__(self, tensor: Tensor) -> int:
        """The bytes of a tensor's parts that have not been counted yet."""
        if is_traceable_wrapper_subclass(tensor):
            names = tensor.__tensor_flatten__()[0]
            return sum(self(getattr(tensor, name)) for name in names)
        if tensor.layout != torch.strided:
            return tensor.nbytes
        storage = tensor.untyped_storage()
        where = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        view = (storage._cdata, tensor.dtype, *where)
        if view in self._seen:
            return 0
        self._seen.add(view)
        # Views may overlap; together they are no more than the memory behind them.
        before = self._counted.get(storage._cdata, 0)
        after = min(before + tensor.nbytes, storage.nbytes())
        self._counted[storage._cdata] = max(before, after)
        return max(before, after) - before


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^. ])\d+(?=\.)", "*", name)


def _rows_alike(rows: tuple[FootprintRow, ...]) -> Iterable[list[FootprintRow]]:
    groups: dict[tuple, list[FootprintRow]] = {}
    for row in rows:
        key = (_pattern(row.name), row.shape, row.bits, row.group_size, row.bytes)
        groups.setdefault(key, []).append(row)
    return groups.values()


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
