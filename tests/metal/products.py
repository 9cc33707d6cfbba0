"""Products on the emulated device: cases, their operands, and what their results must be.

A `Case` is hashable and says all: `make` builds the same operands of it each time, laid
out among NaN, with the exact product in float64.
"""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass, fields
from typing import Any

import metal_emulator as emulator
import torch
from torch import Tensor

from affine_tensor import layout, ops

TYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
INDEX_TYPES = {"int32": torch.int32, "int64": torch.int64}


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    values: "normal", "shifted" (away from zero), "outliers" (one large weight in each
        group: most others are near zero, between large scales and biases), "zeros"
        (codes near the one that stands for zero, where code * scale and bias cancel).
    x, weight, bias: their layouts, see `_x_views`, `_lay_out` and `_make_bias`.
    rows: how rows find their expert, "ends" or "indices" and a dtype.
    limits: what differs from the default `Limits`.
    """

    op: str = "linear"
    m: int = 5
    n: int = 33
    k: int = 512
    bits: int = 4
    group: int = 64
    type: str = "half"
    scales: str = "half"
    values: str = "normal"
    x: str = "plain"
    weight: str = "plain"
    permuted: bool = False
    bias: str = "none"
    experts: int = 0
    rows: str = ""
    limits: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        parts = [
            self.op,
            f"M{self.m}",
            f"N{self.n}",
            f"K{self.k}",
            f"{self.bits}bit",
            f"g{self.group}",
            self.type,
            f"scales-{self.scales}",
        ]
        for field in fields(self)[8:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}-{_text(value)}")
        return "-".join(parts).replace(" ", "_")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(f"{name}{number}" for name, number in value)
    return "" if value is True else str(value)


def smallest_row(bits: int, group: int) -> int:
    """The shortest row of whole groups and whole words."""
    return group if group * bits % 32 == 0 else 2 * group


@dataclass
class Inputs:
    """Operands of a case, the exact product and the sum of its terms' magnitudes."""

    case: Case
    x: Tensor
    parts: tuple[Tensor, Tensor, Tensor, Tensor | None]
    extra: dict[str, Tensor]
    exact: Tensor
    size: Tensor

    def __call__(self) -> Tensor:
        """What the operator makes of them, where `ops.device_of` says it runs."""
        operator = getattr(torch.ops.affine_tensor, self.case.op)
        form = {"bits": self.case.bits, "group_size": self.case.group}
        return operator(self.x, *self.parts, **self.extra, **form, dtype=self.x.dtype)


def make(case: Case) -> Inputs:
    """The operands of a case."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    dtype = TYPES[case.type]
    parts, dense = _make_weight(case, generator)
    transposed = case.op.endswith("matmul")
    columns = case.n if transposed else case.k
    values = torch.randn(case.m, columns, generator=generator, dtype=torch.float64)
    if case.values == "shifted":
        values += 1.0
    x = _x_view(values.to(dtype), case.x)
    rows = x.double().reshape(case.m, columns)
    extra: dict[str, Tensor] = {}
    owners: list[int] | None = None
    if case.experts:
        owners = _assign(case, generator, extra)
    exact, size = _multiply(rows, dense if transposed else dense.mT, owners)
    if case.bias != "none":
        extra["bias"] = _make_bias(case, x, generator)
        wide = extra["bias"].double().expand(*x.shape[:-1], case.n)
        exact += wide.reshape(exact.shape)
    shape = (*x.shape[:-1], exact.shape[-1])
    return Inputs(case, x, parts, extra, exact.view(shape), size.view(shape))


def _multiply(
    x: Tensor, dense: Tensor, owners: list[int] | None
) -> tuple[Tensor, Tensor]:
    """x ``[M, A]`` times dense ``[A, B]``, or for each row that of its expert."""
    if owners is None:
        return x @ dense, x.abs() @ dense.abs()
    exact = x.new_zeros(len(x), dense.shape[-1])
    size = torch.zeros_like(exact)
    for row, owner in enumerate(owners):
        if 0 <= owner < len(dense):
            exact[row] = x[row] @ dense[owner]
            size[row] = x[row].abs() @ dense[owner].abs()
        elif owner == -1:
            exact[row] = float("nan")
    return exact, size


# ---- the weight -----------------------------------------------------------------


def _make_weight(
    case: Case, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """The parts in their layout, and the dense weight in float64."""
    lead = (case.experts, case.n) if case.experts else (case.n,)
    dense = torch.randn(*lead, case.k, generator=generator, dtype=torch.float64)
    if case.values == "shifted":
        dense += 2.0
    elif case.values == "outliers":
        dense[..., :: case.group] *= 40.0
    form = {"bits": case.bits, "group_size": case.group}
    words, scales, biases = layout.quantize(dense.to(TYPES[case.scales]), **form)
    if case.values == "zeros":
        zero = 1 << (case.bits - 1)
        near = torch.randint(-1, 2, dense.shape, generator=generator)
        near[..., : case.k // 2] = 0
        codes = (zero + near).clamp(0, 2**case.bits - 1)
        words = layout.pack(codes.to(torch.uint8), bits=case.bits)
        biases = -zero * scales  # exact
    packed = words.view(torch.int32)
    permutation = None
    if case.permuted:
        order = torch.rand(*lead[:-1], case.k, generator=generator)
        permutation = order.argsort(-1).int()
    # Not through the operator: that may run on the emulator.
    dense = ops.reference("dequantize")(
        packed, scales, biases, permutation, **form, dtype=torch.float64
    )
    kinds = (case.weight,) * 3
    if case.weight == "apart":
        kinds = ("plain", "columns first", "plain")
    laid = [
        _lay_out(part, kind)
        for part, kind in zip((packed, scales, biases), kinds, strict=True)
    ]
    return (laid[0], laid[1], laid[2], permutation), dense


def _lay_out(part: Tensor, kind: str) -> Tensor:
    """The same elements as a view of a larger tensor of NaN, or of nonsense."""
    *lead, rows, columns = part.shape

    def base(*shape: int) -> Tensor:
        if part.dtype == torch.int32:
            return part.new_full(shape, 0x5A5A5A5A)
        return part.new_full(shape, float("nan"))

    if kind == "plain":
        view = base(*part.shape)
    elif kind == "rows":  # of experts: a chunk of each
        view = base(*lead, rows + 2, columns)[..., 1:-1, :]
    elif kind == "columns":
        view = base(*lead, rows, columns + 2)[..., 1:-1]
    elif kind == "aligned columns":
        view = base(*lead, rows, columns + 8)[..., 4:-4]
    elif kind == "every other row":
        view = base(*lead, 2 * rows, columns)[..., ::2, :]
    elif kind == "offset":
        view = base(part.numel() + 1)[1:].view(part.shape)
    elif kind == "columns first":
        view = base(*lead, columns, rows).mT
    elif kind == "every other expert":
        view = base(2 * lead[0], rows, columns)[::2]
    elif kind == "rows first":
        view = base(rows, lead[0], columns).transpose(0, 1)
    else:
        raise ValueError(kind)
    return view.copy_(part)


WEIGHT_LAYOUTS = (
    *("plain", "rows", "columns", "aligned columns", "every other row"),
    *("offset", "apart"),
)
EXPERT_LAYOUTS = ("plain", "rows", "offset", "every other expert", "rows first")


# ---- x, bias and experts --------------------------------------------------------


def _split(m: int) -> tuple[int, int]:
    """Two factors of m, the first as small as may be, but no one."""
    first = next((i for i in range(2, m) if m % i == 0), 1)
    return first, m // first


def _x_views(m: int, columns: int) -> dict[str, tuple[int, tuple[int, ...], Any]]:
    """By layout: elements before x, the shape of what it is a view of, and the view."""
    a, b = _split(m)
    return {
        "plain": (0, (m, columns), lambda t: t),
        "offset1": (1, (m, columns), lambda t: t),
        "offset2": (2, (m, columns), lambda t: t),
        "offset3": (3, (m, columns), lambda t: t),
        "offset4": (4, (m, columns), lambda t: t),
        "wide": (0, (m, columns + 8), lambda t: t[:, :-8]),
        "wide odd": (0, (m, columns + 3), lambda t: t[:, 2:-1]),
        "every other": (0, (m, 2 * columns), lambda t: t[:, ::2]),
        "transposed": (0, (columns, m), lambda t: t.t()),
        "expanded": (0, (1, columns), lambda t: t.expand(m, columns)),
        "constant": (0, (m, 1), lambda t: t.expand(m, columns)),
        "3d": (0, (a, b, columns), lambda t: t),
        "3d wide": (0, (a, b, columns + 4), lambda t: t[..., :-4]),
        "3d swapped": (0, (b, a, columns), lambda t: t.transpose(0, 1)),
        "3d expanded": (0, (a, 1, columns), lambda t: t.expand(a, b, columns)),
        "4d": (0, (a, 1, b, columns), lambda t: t),
        "1d": (0, (columns,), lambda t: t),
    }


X_LAYOUTS = tuple(_x_views(1, 16))


def _x_view(values: Tensor, kind: str) -> Tensor:
    """A view among NaN that holds the values, as far as it has room for them."""
    m, columns = values.shape
    before, shape, view = _x_views(m, columns)[kind]
    count = int(torch.Size(shape).numel())
    base = values.new_full((before + count + 4,), float("nan"))
    x = view(base[before : before + count].view(shape))
    if 0 not in x.stride():
        return x.copy_(values.view(x.shape))
    base[before : before + count] = values.reshape(-1)[:count]
    return x


def _make_bias(case: Case, x: Tensor, generator: torch.Generator) -> Tensor:
    a, b = _split(case.m)
    shapes: dict[str, tuple[int, ...]] = {
        "scalar": (),
        "one": (1,),
        "row": (case.n,),
        "strided row": (case.n, 2),
        "matrix": (b if x.dim() > 2 else case.m, case.n),
        "column": (b if x.dim() > 2 else case.m, 1),
        "3d": (a, 1, case.n),
    }
    shape = shapes[case.bias]
    values = 30 * torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = values.to(x.dtype)
    return bias[:, 1] if case.bias == "strided row" else bias


BIASES = ("none", "scalar", "one", "row", "strided row", "matrix", "column", "3d")


def _assign(
    case: Case, generator: torch.Generator, extra: dict[str, Tensor]
) -> list[int]:
    """Each row's expert: some have none of the rows, -1 is no expert, E past the end."""
    kind, index_type = case.rows.split()
    experts, m = case.experts, case.m
    owners = torch.randint(0, experts, (m,), generator=generator)
    owners -= (owners % 3 == 1).long()  # experts 1, 4, 7 ... have none
    if kind == "indices":
        if m > 3:
            owners[m // 2], owners[m - 1] = -1, experts
        extra["indices"] = owners.to(INDEX_TYPES[index_type])
        return [-1 if owner == experts else owner for owner in owners.tolist()]
    owners = owners.sort().values
    if m > 3 and m % 2 == 0:
        owners[-2:] = experts
    numbers = torch.arange(experts)
    ends = (owners <= numbers.unsqueeze(1)).sum(1)  # [E]
    if m % 3 == 0 and int(ends[-1]) == m:
        ends[-1] += 5  # more than there are
    extra["offsets"] = ends.to(INDEX_TYPES[index_type])
    return owners.tolist()


# ---- the judge ------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the exact one.

    ratio: its L2 error to that of rounding the exact result once.
    worst: the largest error to what the bound allows the element.
    drift: its L2 error to 2^-24 of what is added up, as magnitudes, and the result.
    """

    ratio: float
    worst: float
    drift: float


NOTHING_LIKE_IT = Verdict(float("inf"), float("inf"), float("inf"))


def judge(inputs: Inputs, y: Tensor) -> Verdict:
    """Compare a result with the exact product; NaN where rows have no expert."""
    exact, dtype = inputs.exact, inputs.x.dtype
    if y.shape != exact.shape or y.dtype != dtype:
        return NOTHING_LIKE_IT
    if not torch.equal(y.isnan(), exact.isnan()):
        return NOTHING_LIKE_IT
    kept = exact.isnan().logical_not()
    exact, size, found = exact[kept], inputs.size[kept], y.double()[kept]
    if exact.numel() == 0:
        return Verdict(0.0, 0.0, 0.0)
    error = (found - exact).abs()
    # No result is nearer than half the distance of the smallest numbers.
    smallest = torch.finfo(dtype).smallest_normal * UNITS[dtype]
    bound = UNITS[dtype] * exact.abs() + 32 * 2.0**-24 * size + smallest
    rounding = float((exact.to(dtype).double() - exact).norm())
    total = float(error.norm())
    ratio = total / rounding if rounding else 0.0 if total == 0.0 else float("inf")
    drift = total / (2.0**-24 * float((size + exact.abs()).norm()))
    return Verdict(ratio, float((error / bound).max()), drift)


# ---- runs -----------------------------------------------------------------------

# Every access is looked at, for races and to the byte; and reads before the beginning.
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"order": "forward", "trace": True},
    {"order": "backward", "trace": True},
    {"order": "random", "trace": True, "seed": 3},
    {"order": "forward", "front": True},
)


def launch(inputs: Inputs, **how: Any) -> tuple[Tensor, str]:
    """The result, and the kernel that made it ("" for the reference)."""
    with emulator.run(**how) as run:
        y = inputs()
    return y, run.launches[-1].kernel if run.launches else ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


# Of float32: the drift, in place of the first condition, which sums in float32 cannot
# meet. A little above the largest of a full run: 1.39, 1.74, 2.01, 0.93, 1.14.
FLOAT_LIMITS = {
    "gemv": 1.5,
    "gemv_small": 2.0,
    "gemm": 2.5,
    "gemv_n": 1.0,
    "gemm_n": 2.0,
}

# The largest found so far, and how many there were, by kernel and dtype.
LARGEST: dict[tuple[str, str], tuple[int, Verdict]] = {}


def _note(kernel: str, case: Case, found: Verdict) -> None:
    count, old = LARGEST.get((kernel, case.type), (0, Verdict(0.0, 0.0, 0.0)))
    largest = (max(a, b) for a, b in zip(astuple(old), astuple(found), strict=True))
    LARGEST[kernel, case.type] = count + 1, Verdict(*largest)


def complaint(inputs: Inputs, y: Tensor, kernel: str) -> str | None:
    """What is wrong with a result, or None."""
    found = judge(inputs, y)
    fine = found.ratio <= 1.5
    if inputs.x.dtype == torch.float32:
        fine = found.drift <= FLOAT_LIMITS[kernel]
    _note(kernel, inputs.case, found)
    if fine and found.worst <= 1.0:
        return None
    return f"{kernel}: wrong result, {found}"


def complaint_of_any_schedule(inputs: Inputs) -> str | None:
    """The same of a result under all schedules, which must agree in every bit."""
    first: Tensor | None = None
    for how in SCHEDULES:
        y, kernel = launch(inputs, **how)
        wrong = complaint(inputs, y, kernel)
        if wrong:
            return wrong
        if first is not None and not same_bits(first, y):
            return f"{kernel}: the result depends on the order of lanes ({how})"
        first = y
    return None
