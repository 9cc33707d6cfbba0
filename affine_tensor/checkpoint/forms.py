"""How a parameter of a transformers model lies in an MLX checkpoint, both ways.

A form is a small expression over names of stored tensors: `Rows("gate", "up")` is a
parameter that the file has in two pieces. `load` makes the parameter of what is stored,
`save` the stored tensors of the parameter; each undoes the other. On packed weights they
only move whole rows of codes, scales and biases, set the flag `transposed`, or scale the
scales, so that nothing is quantized again. What cannot be done so comes out dense.

Applied to a tensor on the meta device, `save` says which shapes a file must have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..tensor import AffineQuantizedTensor

Read = Callable[[str], Tensor]
Own = TypeVar("Own", bound="Form")


class Form:
    """The base: a form of the forms in `parts`."""

    # Whether numbers differ between the two sides, not only their places.
    changes_values = False

    def __init__(self, *parts: str | Form) -> None:
        self.parts = [Stored(p) if isinstance(p, str) else p for p in parts]

    def names(self) -> Iterator[str]:
        """The stored tensors, each once."""
        for part in self.parts:
            yield from part.names()

    def forms(self) -> Iterator[Form]:
        """This form and all within it."""
        yield self
        for part in self.parts:
            yield from part.forms()

    def renamed(self: Own, new: Callable[[str], str]) -> Own:
        """The same form of other names."""
        form = copy.copy(self)
        form.parts = [part.renamed(new) for part in self.parts]
        return form

    def load(self, read: Read) -> Tensor:
        """The parameter; `read` gives the stored tensor of a name."""
        raise NotImplementedError

    def save(self, value: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a parameter, by name."""
        raise NotImplementedError


class Stored(Form):
    """One stored tensor, as it is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def names(self) -> Iterator[str]:
        yield self.name

    def renamed(self, new: Callable[[str], str]) -> Stored:
        return Stored(new(self.name))

    def load(self, read: Read) -> Tensor:
        return read(self.name)

    def save(self, value: Tensor) -> dict[str, Tensor]:
        return {self.name: value}


class _One(Form):
    """A change of one other form, by `loaded` and `saved`."""

    def __init__(self, part: str | Form) -> None:
        super().__init__(part)

    def load(self, read: Read) -> Tensor:
        return self.loaded(self.parts[0].load(read))

    def save(self, value: Tensor) -> dict[str, Tensor]:
        return self.parts[0].save(self.saved(value))

    def loaded(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def saved(self, value: Tensor) -> Tensor:
        raise NotImplementedError


class Transposed(_One):
    """The last two dimensions exchanged: ``[E, in, out]`` of ``[E, out, in]``."""

    def loaded(self, value: Tensor) -> Tensor:
        packed = isinstance(value, AffineQuantizedTensor)
        return value.mT if packed else value.mT.contiguous()

    saved = loaded


class ChannelsLast(_One):
    """A convolution: MLX keeps ``[out, ..., in]``, torch ``[out, in, ...]``."""

    def loaded(self, value: Tensor) -> Tensor:
        return value.movedim(-1, 1).contiguous()

    def saved(self, value: Tensor) -> Tensor:
        return value.movedim(1, -1).contiguous()


class Reshaped(_One):
    """The same numbers, dense, in another shape: `stored` in the file, `own` here."""

    def __init__(
        self, part: str | Form, stored: Sequence[int], own: Sequence[int]
    ) -> None:
        super().__init__(part)
        self.stored, self.own = tuple(stored), tuple(own)

    def loaded(self, value: Tensor) -> Tensor:
        return dense(value).reshape(self.own)

    def saved(self, value: Tensor) -> Tensor:
        return dense(value).reshape(self.stored)


class PlusOne(_One):
    """MLX stores ``1 + w`` where transformers adds the one when it computes."""

    changes_values = True

    def loaded(self, value: Tensor) -> Tensor:
        return _wide(value) - 1

    def saved(self, value: Tensor) -> Tensor:
        return _wide(value) + 1


class Scaled(_One):
    """MLX stores ``w * factor``; `factor` is a number, or a list with one for each row.

    Of a packed weight the scales and biases are divided, in float32; its codes stay.
    """

    changes_values = True

    def __init__(self, part: str | Form, factor: float | Sequence[float]) -> None:
        super().__init__(part)
        self.factor = factor

    def loaded(self, value: Tensor) -> Tensor:
        return self._apply(value, torch.div)

    def saved(self, value: Tensor) -> Tensor:
        return self._apply(value, torch.mul)

    def _apply(self, value: Tensor, function: Callable[..., Tensor]) -> Tensor:
        def apply(part: Tensor) -> Tensor:
            factor = torch.tensor(self.factor, dtype=torch.float64, device=part.device)
            if factor.dim():
                factor = factor.view(-1, *[1] * (part.dim() - 1))
            return function(part.double(), factor).float()

        if isinstance(value, AffineQuantizedTensor):
            return _with_scales(value, apply)
        return apply(value)


class RowOrder(_One):
    """Rows in another order: row i of the parameter is stored row ``order(n)[i]``.

    `order` makes the indices for n rows. Rows are as in `Rows`.
    """

    def __init__(
        self,
        part: str | Form,
        order: Callable[[int], Tensor],
        axis: int | None = None,
    ) -> None:
        super().__init__(part)
        self.order, self.axis = order, axis

    def loaded(self, value: Tensor) -> Tensor:
        return self._taken(value, lambda order: order)

    def saved(self, value: Tensor) -> Tensor:
        return self._taken(value, torch.argsort)

    def _taken(self, value: Tensor, which: Callable[[Tensor], Tensor]) -> Tensor:
        axis = _row_axis(self) % value.dim()
        index = which(self.order(value.shape[axis]))
        return value.index_select(axis, index.to(value.device))


class Rows(Form):
    """Pieces one after the other along the rows: gate and up, or q, k and v.

    Rows are the dimension before the last of a weight, the last of a bias (a name that
    ends in "bias"), or `axis`. `sizes` are those of the pieces, where they differ.
    """

    def __init__(
        self,
        *parts: str | Form,
        sizes: Sequence[int] | None = None,
        axis: int | None = None,
    ) -> None:
        super().__init__(*parts)
        self.sizes, self.axis = sizes, axis

    def load(self, read: Read) -> Tensor:
        parts = [part.load(read) for part in self.parts]
        return torch.cat(alike(_same_order(parts)), _row_axis(self))

    def save(self, value: Tensor) -> dict[str, Tensor]:
        axis = _row_axis(self)
        sizes = self.sizes
        if sizes is None:
            each, rest = divmod(value.shape[axis], len(self.parts))
            if rest:
                raise ValueError(
                    f"{value.shape[axis]} rows are not {len(self.parts)} equal pieces"
                )
            sizes = [each] * len(self.parts)
        pieces = value.split(list(sizes), dim=axis)
        stored: dict[str, Tensor] = {}
        for part, piece in zip(self.parts, pieces, strict=True):
            stored |= part.save(piece)
        return stored


class Stack(Form):
    """Experts, which the file has one by one: ``[E, ...]`` of E tensors."""

    def load(self, read: Read) -> Tensor:
        return torch.stack(alike([part.load(read) for part in self.parts]))

    def save(self, value: Tensor) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for part, piece in zip(self.parts, value.unbind(0), strict=True):
            stored |= part.save(piece)
        return stored


class Part(_One):
    """Rows `start` to `stop` of a stored tensor of `rows`, which holds others too.

    Only for loading: alone it cannot be written.
    """

    def __init__(self, part: str | Form, start: int, stop: int, rows: int) -> None:
        super().__init__(part)
        self.start, self.stop, self.rows = start, stop, rows

    def loaded(self, value: Tensor) -> Tensor:
        axis = _row_axis(self) % value.dim()
        index = torch.arange(self.start, self.stop, device=value.device)
        return value.index_select(axis, index)

    def saved(self, value: Tensor) -> Tensor:
        if not value.is_meta:
            raise ValueError(f"{next(self.names())} is more than one parameter")
        shape = list(value.shape)
        shape[_row_axis(self)] = self.rows
        return torch.empty(shape, dtype=value.dtype, device="meta")


class ResidualGate(Form):
    """A gate g of Muse Spark, of which MLX stores what it gives to stream and branch:
    beta = sigmoid(g / temperature), and alpha = sqrt(1 - beta ** 2), floored."""

    changes_values = True
    floor = 1e-3  # of alpha ** 2

    def __init__(self, alpha: str | Form, beta: str | Form, temperature: float) -> None:
        super().__init__(alpha, beta)
        self.temperature = temperature

    def load(self, read: Read) -> Tensor:
        alpha, beta = (part.load(read).double() for part in self.parts)
        # Near one beta has lost what alpha still knows, unless that is the floor.
        square = alpha.square()
        lost = (beta > 0.9) & (square > 1.001 * self.floor)
        rest = torch.where(lost, square / (1 + beta), 1 - beta)
        beta, rest = beta.clamp_min(2.0**-149), rest.clamp_min(2.0**-25)
        gate = self.temperature * (beta.log() - rest.log())
        # A gate is published in bfloat16: it is that one, if as near.
        short = gate.bfloat16().double()
        unsure = self.temperature * 2.0**-23 / rest + 4e-6 * gate.abs()
        return torch.where((short - gate).abs() <= unsure, short, gate).float()

    def save(self, value: Tensor) -> dict[str, Tensor]:
        gate = _wide(value) / self.temperature
        beta = torch.sigmoid(gate)
        square = torch.sigmoid(-gate) * (1 + beta)
        alpha = square.clamp_min(self.floor).sqrt()
        return self.parts[0].save(alpha) | self.parts[1].save(beta)


class Padded(_One):
    """With zeros behind it, `count` along the first dimension, which MLX lacks."""

    def __init__(self, part: str | Form, count: int) -> None:
        super().__init__(part)
        self.count = count

    def loaded(self, value: Tensor) -> Tensor:
        if isinstance(value, AffineQuantizedTensor):
            zero: Tensor = _with_scales(value[:1], torch.zeros_like)  # type: ignore
        else:
            zero = torch.zeros_like(value[:1])
        return torch.cat([value, *[zero] * self.count])

    def saved(self, value: Tensor) -> Tensor:
        return value[: len(value) - self.count]


class AbsorbedKV(Form):
    """`kv_b_proj` of multi-head latent attention, ``[heads * (nope + v), rank]``.

    MLX has two weights of each head: `embed_q` ``[heads, rank, nope]``, the part of the
    keys transposed, and `unembed_out` ``[heads, v, rank]``. The groups of the first run
    along the other axis, so that the whole becomes dense.
    """

    def __init__(
        self, embed_q: str | Form, unembed_out: str | Form, *, heads: int, nope: int
    ) -> None:
        super().__init__(embed_q, unembed_out)
        self.heads, self.nope = heads, nope

    def load(self, read: Read) -> Tensor:
        keys, values = (dense(part.load(read)) for part in self.parts)
        whole = torch.cat(alike([keys.mT, values]), dim=1)  # [heads, nope + v, rank]
        return whole.reshape(-1, whole.shape[-1])

    def save(self, value: Tensor) -> dict[str, Tensor]:
        whole = value.view(self.heads, -1, value.shape[-1])
        keys, values = whole[:, : self.nope], whole[:, self.nope :]
        stored = self.parts[0].save(dense(keys).mT.contiguous())
        return stored | self.parts[1].save(values.contiguous())


def keeps_experts_apart(form: Form) -> bool:
    """Whether the experts a to b of a parameter are made of experts a to b of what is
    stored."""
    return all(
        isinstance(one, Stored | Transposed | Rows | RowOrder)
        and getattr(one, "axis", None) is None
        for one in form.forms()
    )


# ---- values ---------------------------------------------------------------------


def interleaved(rows: int) -> Tensor:
    """The order that takes two halves alternately: 0, n/2, 1, n/2 + 1, ..."""
    return torch.arange(rows).view(2, rows // 2).T.reshape(-1)


def neighbours(width: int) -> Callable[[int], Tensor]:
    """The order of the rows of heads of `width` that MLX rotates as neighbours, 2 i and
    2 i + 1, and transformers as halves, i and i + width / 2."""
    return lambda rows: torch.arange(rows).view(-1, width // 2, 2).mT.reshape(-1)


def dense(value: Tensor) -> Tensor:
    """A packed weight made dense, in float32 at least; others as they are."""
    if isinstance(value, AffineQuantizedTensor):
        return value.dequantize(torch.promote_types(value.dtype, torch.float32))
    return value


def alike(values: list[Tensor]) -> list[Tensor]:
    """The values in a form in which they can be joined.

    Packed ones of one width and group size stay packed, with scales of one dtype (the
    wider, which is exact); any others become dense, in the widest of their dtypes.
    """
    packed = [v for v in values if isinstance(v, AffineQuantizedTensor)]
    if any(v.permutation is not None for v in packed) and len(packed) == len(values):
        values = packed = [_with_order(v) for v in packed]  # type: ignore[assignment]
    formats = {(v.bits, v.group_size, v.transposed) for v in packed}
    if len(packed) == len(values) and len(formats) == 1:
        if len({v.scales.dtype for v in packed}) > 1:
            return [_with_scales(v, lambda scales: scales.float()) for v in packed]
        return values
    values = [dense(value) for value in values]
    dtype = values[0].dtype
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return [value.to(dtype) for value in values]


def _with_order(weight: AffineQuantizedTensor) -> AffineQuantizedTensor:
    """The same weight with a permutation, that of its columns as they are if it has
    none."""
    if weight.permutation is not None:
        return weight
    lead, columns = (
        weight._packed.shape[:-2],
        weight.scales.shape[-1] * weight.group_size,
    )
    order = torch.arange(columns, dtype=torch.int32, device=weight.device)
    return AffineQuantizedTensor.from_packed(
        weight._packed,
        weight.scales,
        weight.biases,
        bits=weight.bits,
        group_size=weight.group_size,
        dtype=weight._dtype,
        permutation=order.expand(*lead, columns).contiguous(),
        transposed=weight.transposed,
    )


def _same_order(values: list[Tensor]) -> list[Tensor]:
    """The values, dense where they are packed with different permutations: rows of one
    weight share theirs."""
    orders = [getattr(value, "permutation", None) for value in values]
    first, *rest = orders
    for order in rest:
        same = order is first or (
            order is not None and first is not None and torch.equal(order, first)
        )
        if not same:
            return [dense(value) for value in values]
    return values


def _with_scales(
    weight: AffineQuantizedTensor, change: Callable[[Tensor], Tensor]
) -> AffineQuantizedTensor:
    """The same codes with other scales and biases."""
    return AffineQuantizedTensor.from_packed(
        weight._packed,
        change(weight.scales),
        change(weight.biases),
        bits=weight.bits,
        group_size=weight.group_size,
        dtype=weight._dtype,
        permutation=weight.permutation,
        transposed=weight.transposed,
    )


def _row_axis(form: Form) -> int:
    axis: int | None = getattr(form, "axis", None)
    if axis is not None:
        return axis
    return -1 if next(form.names()).endswith("bias") else -2


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
