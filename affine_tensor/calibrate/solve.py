"""One weight into codes, scales and biases with the least error of its outputs.

For inputs X of a linear layer, rounding W to V changes the outputs by ``X (W - V)^T``,
whose squares sum up to ``tr(R H R^T)`` with ``R = W - V`` and the Hessian
``H = X^T X``. `round_weight` looks for a V in the affine format with a small such sum:

* as GPTQ does (arXiv 2210.17323): columns are rounded in turn, and what each loses is
  made up for by those not rounded yet. A group's scale and bias are settled when its
  turn comes, from its weights as the groups before have left them;
* then codes, and scale and bias of each group, are improved in turns, every step the
  best one for its own variable while the others stay. No step raises the sum.

Rows are independent, and each is compared with plain rounding, which it replaces only
where it is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import layout

# How far a range may shrink before its weights are rounded; beyond, clipping costs more.
_SHRINK = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5)
_REFITS = 2


@dataclass(frozen=True)
class Rounded:
    """A weight ``[N, K]`` in the format, and what it costs.

    `codes` uint8 ``[N, K]``; `scales`, `biases` ``[N, K / group_size]``. `error` and
    `plain_error` are ``tr(R H R^T)``, here and for plain rounding, in units of H.
    """

    codes: Tensor
    scales: Tensor
    biases: Tensor
    error: float
    plain_error: float


def round_weight(
    weight: Tensor,
    hessian: Tensor | None,
    *,
    bits: int,
    group_size: int,
    damping: float = 0.01,
    sweeps: int = 4,
) -> Rounded:
    """Codes, scales and biases for `weight` ``[N, K]`` under `hessian` ``[K, K]``.

    `hessian` is symmetric, without negative eigenvalues; None counts every column
    alike. `damping` is added to its diagonal, in parts of the mean of that. `sweeps`
    are the turns after the first rounding. Scales and biases have the weight's dtype;
    what they lose by it is known to the search.

    Raises ValueError and TypeError as `layout.quantize` does, and ValueError where the
    Hessian is not finite.
    """
    packed, scales, biases = layout.quantize(weight, bits=bits, group_size=group_size)
    plain = layout.unpack(packed, bits=bits), scales, biases
    device = _device_of(weight)
    wanted = weight.detach().to(device, torch.float32)
    h = _damped(hessian, weight.shape[-1], damping).to(device)
    problem = _Problem(wanted, h.float(), bits, group_size, weight.dtype)
    state = _error_feedback(problem, h)
    _improve_(problem, state, sweeps)
    rounded = state.codes.to(torch.uint8), state.scales, state.biases
    before = problem.errors(*(part.to(device) for part in plain))
    after = problem.errors(*rounded)
    better = (after < before)[:, None]
    codes, scales, biases = (
        torch.where(better, new.to(old.dtype), old.to(device)).to(old.device)
        for new, old in zip(rounded, plain, strict=True)
    )
    error = torch.where(better[:, 0], after, before).sum()
    return Rounded(codes, scales, biases, float(error), float(before.sum()))


def round_plainly(weight: Tensor, *, bits: int, group_size: int) -> Rounded:
    """The same of `layout.quantize`, without errors."""
    packed, scales, biases = layout.quantize(weight, bits=bits, group_size=group_size)
    return Rounded(layout.unpack(packed, bits=bits), scales, biases, 0.0, 0.0)


@dataclass(frozen=True)
class _Problem:
    weight: Tensor  # [N, K] float32
    hessian: Tensor  # [K, K] float32, damped
    bits: int
    group_size: int
    dtype: torch.dtype  # of scales and biases

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    def columns(self, group: int) -> slice:
        return slice(group * self.group_size, (group + 1) * self.group_size)

    def errors(self, codes: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
        """``r H r^T`` of each row, float64 ``[N]`` (float32 on a device without)."""
        values = codes.float().unflatten(-1, (-1, self.group_size))
        values = values * scales.float()[..., None] + biases.float()[..., None]
        rest = self.weight - values.flatten(-2)
        return (rest @ self.hessian).mul_(rest).sum(-1).clamp_(min=0)

    def held(self, values: Tensor) -> Tensor:
        """As scales and biases will hold them."""
        return values.to(self.dtype).float()


@dataclass
class _State:
    codes: Tensor  # [N, K] float32, whole numbers
    scales: Tensor  # [N, groups] float32, as they will be held
    biases: Tensor


def _device_of(weight: Tensor) -> torch.device:
    # Cholesky needs float64, which Apple's GPUs lack.
    return torch.device("cpu") if weight.device.type == "mps" else weight.device


def _damped(hessian: Tensor | None, columns: int, damping: float) -> Tensor:
    """float64 [K, K], its mean diagonal 1, positive definite."""
    if hessian is None:
        return torch.eye(columns, dtype=torch.float64)
    h = hessian.detach()
    h = (h.cpu() if h.device.type == "mps" else h).double()
    mean = float(h.diagonal().mean())
    if not math.isfinite(mean) or not bool(h.isfinite().all()):
        raise ValueError(
            "the sums of squares of its inputs are not finite: the calibration text "
            "made NaN or infinite values. Calibrate in float32, or leave it dense"
        )
    if mean == 0:  # only zeros went in: every rounding is as good
        return torch.eye(columns, dtype=torch.float64, device=h.device)
    h = h / mean
    h.diagonal().add_(damping)
    return h


def _inverse_factor(h: Tensor) -> Tensor:
    """Upper triangular U with ``U^T U = H^-1``, float32."""
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    for more in (0.0, 1e-3, 1e-2, 1e-1, 1.0):
        low, failed = torch.linalg.cholesky_ex(h + more * eye)
        if not bool(failed):
            inverse = torch.cholesky_inverse(low)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed):
                return upper.float()
    raise ValueError("the Hessian has negative eigenvalues; give X^T X")


def _error_feedback(problem: _Problem, hessian: Tensor) -> _State:
    """GPTQ: groups with large inputs first, and so the columns of each."""
    size = problem.group_size
    diagonal = hessian.diagonal().unflatten(0, (-1, size))
    groups = diagonal.sum(-1).argsort(stable=True, descending=True)
    within = diagonal.argsort(dim=-1, descending=True, stable=True)
    order = (within[groups] + size * groups[:, None]).flatten()
    upper = _inverse_factor(hessian[order][:, order])
    weight = problem.weight[:, order]
    codes = torch.empty_like(weight)
    scales = weight.new_empty(len(weight), len(groups))
    biases = torch.empty_like(scales)
    for turn, group in enumerate(groups.tolist()):
        here = problem.columns(turn)
        own, factor = weight[:, here], upper[here, here]
        precision = factor.diagonal().square().reciprocal()
        scale, bias = fit_range(problem, own, precision)
        codes[:, here], lost = _round_columns(problem, own, factor, scale, bias)
        weight[:, here.stop :] -= lost @ upper[here, here.stop :]
        scales[:, group], biases[:, group] = scale, bias
    back = torch.empty_like(codes)
    back[:, order] = codes
    return _State(back, scales, biases)


def _round_columns(
    problem: _Problem, weight: Tensor, upper: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The codes of a group ``[N, group]``, and what each column lost, in its units."""
    weight = weight.clone()
    codes, lost = torch.empty_like(weight), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        column = weight[:, j]
        code = _nearest(problem, column, scale, bias)
        codes[:, j] = code
        lost[:, j] = (column - (code * scale + bias)) / upper[j, j]
        weight[:, j + 1 :] -= lost[:, j, None] * upper[j, None, j + 1 :]
    return codes, lost


def _nearest(problem: _Problem, values: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return ((values - bias) / scale).round_().clamp_(0, problem.levels)


def fit_range(
    problem: _Problem, weight: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and bias ``[N]`` for a group ``[N, group]``: the smallest sum of squares.

    `precision` ``[group]`` weighs the columns. Ranges shrink towards their middle and
    from either end; each is then fitted to the codes that it gives.
    """
    low, high = weight.amin(-1), weight.amax(-1)
    span = (high - low).clamp_(min=1e-7)
    best = torch.full_like(low, math.inf)
    found = (span.clone(), low.clone())
    trials = [(low + (1 - s) / 2 * span, s) for s in _SHRINK]
    trials += [(low, s) for s in _SHRINK[1:-2]]
    trials += [(low + (1 - s) * span, s) for s in _SHRINK[1:-2]]
    for start, shrink in trials:
        scale, bias = problem.held(span * shrink / problem.levels), problem.held(start)
        for turn in range(_REFITS + 1):
            scale = _nonzero(scale, problem.dtype)
            code = _nearest(problem, weight, scale[:, None], bias[:, None])
            rest = weight - (code * scale[:, None] + bias[:, None])
            error = rest.square().mul_(precision).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            found = (
                torch.where(better, scale, found[0]),
                torch.where(better, bias, found[1]),
            )
            if turn < _REFITS:
                scale, bias = _line(problem, weight, code, precision, scale)
    return found


def _line(
    problem: _Problem, weight: Tensor, code: Tensor, precision: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The line through (code, weight) by weighted least squares, as it will be held."""
    share = precision / precision.sum()
    mean_code, mean = (code * share).sum(-1), (weight * share).sum(-1)
    away = code - mean_code[:, None]
    variance = (away.square() * share).sum(-1)
    slope = (away * weight * share).sum(-1) / variance
    slope = problem.held(torch.where(variance > 0, slope, scale))
    return slope, problem.held(mean - slope * mean_code)


def _nonzero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    tiny = max(1e-7, torch.finfo(dtype).tiny)
    return torch.where(scale.abs() < tiny, torch.full_like(scale, tiny), scale)


def _improve_(problem: _Problem, state: _State, sweeps: int) -> None:
    """Turns of coordinate descent over all groups."""
    for _ in range(sweeps):
        # Made anew each time, so that float32's rounding does not add up.
        values = state.codes.unflatten(-1, (-1, problem.group_size))
        values = values * state.scales[..., None] + state.biases[..., None]
        slope = (problem.weight - values.flatten(-2)) @ problem.hessian  # [N, K]
        for group in range(state.scales.shape[1]):
            here = problem.columns(group)
            change = _improve_group_(problem, state, group, slope[:, here].clone())
            slope -= change @ problem.hessian[here]


def _improve_group_(
    problem: _Problem, state: _State, group: int, slope: Tensor
) -> Tensor:
    """Better codes, scale and bias of one group; returns how its weights changed.

    `slope` ``[N, group]`` is ``R H`` at its columns: half of minus the gradient.
    """
    here = problem.columns(group)
    hessian = problem.hessian[here, here]
    scale, bias = state.scales[:, group].clone(), state.biases[:, group].clone()
    code = state.codes[:, here]
    before = code * scale[:, None] + bias[:, None]
    for j in range(problem.group_size):
        old = code[:, j] * scale + bias
        wanted = old + slope[:, j] / hessian[j, j]
        code[:, j] = _nearest(problem, wanted, scale, bias)
        slope -= (code[:, j] * scale + bias - old)[:, None] * hessian[j]
    new = _line_under(problem, code, slope, hessian, scale, bias)
    moved = code * (new[0] - scale)[:, None] + (new[1] - bias)[:, None]
    gain = (moved * (2 * slope - moved @ hessian)).sum(-1)
    scale = torch.where(gain > 0, new[0], scale)
    bias = torch.where(gain > 0, new[1], bias)
    state.scales[:, group], state.biases[:, group] = scale, bias
    return code * scale[:, None] + bias[:, None] - before


def _line_under(
    problem: _Problem,
    code: Tensor,
    slope: Tensor,
    hessian: Tensor,
    scale: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best scale and bias for given codes under the group's Hessian."""
    times = code @ hessian
    a, b, c = (times * code).sum(-1), times.sum(-1), hessian.sum()
    right = (code * slope).sum(-1), slope.sum(-1)
    determinant = a * c - b * b
    safe = determinant > 1e-6 * a * c
    by_scale = torch.where(safe, (c * right[0] - b * right[1]) / determinant, 0.0)
    new_scale = _nonzero(problem.held(scale + by_scale), problem.dtype)
    # The bias makes up for what rounding did to the scale.
    new_bias = bias + (right[1] - b * (new_scale - scale)) / c
    return new_scale, problem.held(new_bias)
