"""Properties that hold for any shape, stride, width, group and dtype, by hypothesis.

In CI the examples are always the same; elsewhere each run has a seed of its own, which a
failure shows. ``--hypothesis-seed N`` repeats it, HYPOTHESIS_EXAMPLES=500 tries more.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make
from hypothesis import HealthCheck, assume, core, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    layout,
    load_checkpoint_,
    quantize_,
    save_checkpoint,
)

affine = torch.ops.affine_tensor
IN_CI = bool(os.environ.get("CI")) and core.global_force_seed is None
if core.global_force_seed is None and not IN_CI:
    core.global_force_seed = random.randrange(1 << 32)

PROFILE = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "20")),
    deadline=None,
    derandomize=IN_CI,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def seed() -> None:
    print(f"--hypothesis-seed={core.global_force_seed}")  # a failure shows it


# ---- strategies ------------------------------------------------------------------

BITS = st.sampled_from(layout.BITS)
DTYPES = st.sampled_from(layout.WEIGHT_DTYPES)
LEADS = st.lists(st.integers(0, 3), max_size=3)
SEEDS = st.integers(0, 1 << 16)


@st.composite
def formats(draw: Any, bits: Any = BITS) -> tuple[int, int, int]:
    """Bits, group size and columns that go together."""
    width, group = draw(bits), draw(st.sampled_from(layout.GROUP_SIZES))
    columns = group * draw(st.integers(1, 3))
    assume(layout.why_not(columns, bits=width, group_size=group) is None)
    return width, group, columns


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** int(torch.randint(-3, 3, (), generator=generator))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * spread
    return values.to(dtype)


def strided(tensor: Tensor, how: int) -> Tensor:
    """The same numbers with other strides."""
    if how == 1:
        return tensor.repeat_interleave(3, -1)[..., ::3]
    if how == 2 and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if how == 3 and tensor.dim() > 0:
        return torch.cat([tensor, tensor])[: len(tensor)]
    if how == 4:
        wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 5)
        wide[..., 1:-4] = tensor  # rows at odd addresses
        return wide[..., 1:-4]
    return tensor


STRIDES = st.integers(0, 4)


def parts(weight: AffineQuantizedTensor) -> tuple[Any, ...]:
    return weight._packed, weight.scales, weight.biases, weight.permutation


def form(weight: AffineQuantizedTensor) -> dict[str, Any]:
    bits, group = weight.bits, weight.group_size
    return {"bits": bits, "group_size": group, "dtype": weight.dtype}


def assert_near(got: Tensor, want: Tensor, size: Tensor) -> None:
    """Within one rounding of a sum whose terms add up to `size`."""
    assert got.shape == want.shape
    info = torch.finfo(got.dtype)
    least = info.tiny * info.eps  # the distance of numbers below the normal ones
    near = (got.double() - want).abs() <= 2 * info.eps * size + least
    assert bool(near.all())


# ---- quantize, pack, unpack, dequantize ------------------------------------------


@PROFILE
@given(formats(), LEADS, SEEDS, STRIDES)
def test_unpack_undoes_pack(
    form: tuple[int, int, int], lead: list[int], seed: int, how: int
) -> None:
    bits, _, columns = form
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (*lead, columns), generator=generator)
    packed = layout.pack(strided(codes, how), bits=bits)
    assert packed.shape == (*lead, columns * bits // 32)
    assert layout.unpack(packed, bits=bits).equal(codes.to(torch.uint8))


@PROFILE
@given(
    formats(st.sampled_from([2, 3, 4, 5, 6, 8])),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    DTYPES,
    SEEDS,
    STRIDES,
)
def test_quantize_and_dequantize_are_those_of_mlx(
    form: tuple[int, int, int], lead: list[int], dtype: Any, seed: int, how: int
) -> None:
    mx = pytest.importorskip("mlx.core")
    bits, group, columns = form
    assume(group in (32, 64, 128))
    dense = numbers(seed, *lead, columns, dtype=dtype)
    name = layout.name_of(dtype)
    array = mx.array(dense.float().numpy()).astype(getattr(mx, name))
    want = mx.quantize(array, bits=bits, group_size=group, stream=mx.cpu)
    weight = AffineQuantizedTensor.from_dense(strided(dense, how), bits, group)
    assert weight.packed.tolist() == want[0].tolist()
    assert weight.scales.tolist() == want[1].astype(mx.float32).tolist()
    assert weight.biases.tolist() == want[2].astype(mx.float32).tolist()
    wide = [want[0], *(part.astype(mx.float32) for part in want[1:])]
    back = mx.dequantize(*wide, bits=bits, group_size=group, stream=mx.cpu)
    exact = torch.tensor(back.tolist(), dtype=torch.float64)
    got = weight.dequantize(torch.float64)
    assert_near(got.float(), exact, weight.biases.abs().max().double() * 4)


@PROFILE
@given(formats(), LEADS, DTYPES, st.sampled_from(layout.LOGICAL_DTYPES), SEEDS)
def test_dequantize_is_the_exact_value_rounded_once(
    form: tuple[int, int, int], lead: list[int], dtype: Any, target: Any, seed: int
) -> None:
    bits, group, columns = form
    weight = AffineQuantizedTensor.from_dense(
        numbers(seed, *lead, columns, dtype=dtype), bits, group
    )
    codes = layout.unpack(weight.packed, bits=bits).double()
    scales, biases = (
        part.double().repeat_interleave(group, -1)
        for part in (weight.scales, weight.biases)
    )
    exact = codes * scales + biases
    got = weight.dequantize(target)
    assert got.dtype == target
    half = torch.finfo(target).eps / 2 * (1 + 1e-6)
    least = torch.finfo(target).smallest_normal * torch.finfo(target).eps
    assert bool(((got.double() - exact).abs() <= half * exact.abs() + least).all())


# ---- products --------------------------------------------------------------------


@PROFILE
@given(
    formats(),
    st.integers(0, 9),
    LEADS,
    st.sampled_from(layout.LOGICAL_DTYPES),
    SEEDS,
    STRIDES,
    st.booleans(),
    st.booleans(),
)
def test_linear_and_matmul_are_near_float64(
    shape: tuple[int, int, int],
    rows: int,
    lead: list[int],
    dtype: Any,
    seed: int,
    how: int,
    permuted: bool,
    with_bias: bool,
) -> None:
    bits, group, columns = shape
    weight = make(rows, columns, bits=bits, group_size=group, permuted=permuted)
    weight = weight.to(dtype)
    exact = weight.dequantize().double()
    x = strided(numbers(seed, *lead, columns, dtype=dtype), how)
    bias = numbers(seed, rows, dtype=dtype) if with_bias else None
    added = torch.zeros(rows).double() if bias is None else bias.double()
    want = x.double() @ exact.T + added
    size = x.double().abs() @ exact.T.abs() + added.abs()
    assert_near(affine.linear(x, *parts(weight), bias, **form(weight)), want, size)
    assert_near(F.linear(x, weight, bias), want, size)
    g = strided(numbers(seed, *lead, rows, dtype=dtype), how)
    got = affine.matmul(g, *parts(weight), **form(weight))
    assert_near(got, g.double() @ exact, g.double().abs() @ exact.abs())


@PROFILE
@given(formats(), st.integers(1, 9), LEADS, SEEDS)
def test_embedding_takes_rows(
    shape: tuple[int, int, int], rows: int, lead: list[int], seed: int
) -> None:
    bits, group, columns = shape
    weight = make(rows, columns, bits=bits, group_size=group)
    ids = torch.randint(rows, lead, generator=torch.Generator().manual_seed(seed))
    assert F.embedding(ids, weight).equal(F.embedding(ids, weight.dequantize()))


@PROFILE
@given(
    formats(),
    st.integers(1, 4),
    st.lists(st.integers(0, 3), max_size=9),
    st.sampled_from(layout.LOGICAL_DTYPES),
    SEEDS,
    STRIDES,
    st.booleans(),
)
def test_experts_are_near_float64(
    shape: tuple[int, int, int],
    experts: int,
    ids: list[int],
    dtype: Any,
    seed: int,
    how: int,
    sorted_: bool,
) -> None:
    bits, group, columns = shape
    weight = make(experts, 5, columns, bits=bits, group_size=group).to(dtype)
    exact = weight.dequantize().double()
    of_row = torch.tensor([i % experts for i in ids], dtype=torch.int32)
    offsets = indices = None
    if sorted_:
        of_row = of_row.sort()[0]
        offsets = of_row.bincount(minlength=experts).cumsum(0).int()
    else:
        indices = of_row
    where = (offsets, indices)
    for op, wide, turned in (
        (affine.grouped_linear, columns, exact.mT),
        (affine.grouped_matmul, 5, exact),
    ):
        x = strided(numbers(seed, len(ids), wide, dtype=dtype), how)
        each = turned[of_row.long()]
        want = torch.einsum("tk,tkn->tn", x.double(), each)
        size = torch.einsum("tk,tkn->tn", x.double().abs(), each.abs())
        assert_near(op(x, *parts(weight), *where, **form(weight)), want, size)


# ---- views and copies ------------------------------------------------------------

View = Callable[[Any], Any]


@st.composite
def views(draw: Any) -> tuple[str, View]:
    """What is done to a tensor of 1 to 4 dimensions; it may be refused."""
    dim, start, stop = (draw(st.integers(-4, 4)) for _ in range(3))
    step, other = draw(st.integers(1, 3)), draw(st.integers(-3, 3))
    unit = draw(st.sampled_from([1, 32, 64]))
    cut = slice(start * unit, stop * unit, step)
    known: dict[str, View] = {
        f"transpose {dim} {other}": lambda t: t.transpose(dim, other),
        "mT": lambda t: t.mT,
        f"[{cut}]": lambda t: t[cut],
        f"[..., {cut}]": lambda t: t[..., cut],
        f"[..., {cut}, :]": lambda t: t[..., cut, :],
        f"select {dim} {other}": lambda t: t.select(dim, other),
        f"unsqueeze {dim}": lambda t: t.unsqueeze(dim),
        f"squeeze {dim}": lambda t: t.squeeze(dim),
        f"cat {dim}": lambda t: torch.cat([t, t], dim),
        f"stack {dim}": lambda t: torch.stack([t, t], dim),
        f"chunk {dim}": lambda t: t.chunk(2, dim)[-1],
        f"split {dim}": lambda t: t.split(unit, dim)[0],
        f"unbind {dim}": lambda t: t.unbind(dim)[0],
        f"flatten {dim}": lambda t: t.flatten(0, dim),
        f"unflatten {dim}": lambda t: t.unflatten(dim, (-1, unit)),
        f"index_select {dim}": lambda t: t.index_select(dim, torch.tensor([0, 0])),
        "[[0, -1]]": lambda t: t[[0, -1]],
        "reshape": lambda t: t.reshape(-1, t.shape[-1]),
        "view": lambda t: t.view(1, *t.shape),
        "contiguous": lambda t: t.contiguous(),
        "clone": lambda t: t.clone(),
        f"expand {step}": lambda t: t.expand(step, *t.shape),
        "movedim": lambda t: t.movedim(dim, other),
        "flip": lambda t: t.flip(dim),
        "narrow": lambda t: t.narrow(dim, 0, unit),
    }
    return draw(st.sampled_from(sorted(known.items())))


@PROFILE
@given(
    formats(), st.lists(st.integers(1, 3), max_size=3), st.lists(views(), max_size=4)
)
def test_views_are_those_of_the_dense_twin(
    shape: tuple[int, int, int], lead: list[int], steps: list[tuple[str, View]]
) -> None:
    bits, group, columns = shape
    packed: Any = make(*lead, columns, bits=bits, group_size=group)
    dense = packed.dequantize()
    for _, step in steps:
        try:
            want = step(dense)
        except (RuntimeError, IndexError, ValueError):
            with pytest.raises((RuntimeError, IndexError, ValueError, TypeError)):
                step(packed)
            return
        try:
            packed = step(packed)
        except (RuntimeError, NotImplementedError):
            return  # refused
        dense = want
        assert packed.shape == dense.shape
        own = packed
        if isinstance(packed, AffineQuantizedTensor):
            own = packed.dequantize()
        assert torch.equal(torch.as_tensor(own), dense)


@PROFILE
@given(formats(), st.integers(1, 4), SEEDS, st.booleans())
def test_copy_takes_the_parts(
    shape: tuple[int, int, int], rows: int, seed: int, of_slices: bool
) -> None:
    bits, group, columns = shape
    into = make(rows, columns, bits=bits, group_size=group, seed=1)
    source = make(rows, columns, bits=bits, group_size=group, seed=seed + 2)
    want = into.dequantize()
    if of_slices:
        into[:1].copy_(source[-1:])
        want[:1].copy_(source.dequantize()[-1:])
    else:
        into.copy_(source)
        want.copy_(source.dequantize())
    assert into.dequantize().equal(want)


# ---- files -----------------------------------------------------------------------


@st.composite
def trees(draw: Any, depth: int = 0) -> nn.Module:
    """Modules within modules, some of them tied, with buffers."""
    kinds = ["linear", "embedding", "norm", "buffer", "conv", "expert"]
    tree = nn.Module()
    for i in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([*kinds, "tree"] if depth < 2 else kinds))
        columns = draw(st.sampled_from([32, 64, 96, 128]))
        rows = draw(st.integers(1, 8))
        name = draw(st.sampled_from(["up", "h", "layers", "\u00e9", "x1"])) + str(i)
        if kind == "tree":
            tree.add_module(name, draw(trees(depth + 1)))
        elif kind == "linear":
            tree.add_module(name, nn.Linear(columns, rows, bias=draw(st.booleans())))
        elif kind == "embedding":
            tree.add_module(name, nn.Embedding(rows, columns))
        elif kind == "norm":
            tree.add_module(name, nn.LayerNorm(columns))
        elif kind == "conv":
            tree.add_module(name, nn.Conv1d(rows, 3, 5))
        elif kind == "buffer":
            tree.register_buffer(name, torch.randn(rows))
        else:
            tree.register_parameter(name, nn.Parameter(torch.randn(2, rows, columns)))
    return tree


@PROFILE
@given(trees(), st.sampled_from([2, 4, 5, 8]), DTYPES, st.sampled_from([300, 1 << 20]))
def test_a_saved_tree_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    tree: nn.Module,
    bits: int,
    dtype: Any,
    limit: int,
) -> None:
    tree.to(dtype)
    blank = [torch.zeros_like(v) for v in tree.state_dict().values()]
    other = copy.deepcopy(tree)
    other.load_state_dict(dict(zip(tree.state_dict(), blank, strict=True)))
    quantize_(tree, AffineConfig(bits=bits, group_size=32))
    assume(any(isinstance(p, AffineQuantizedTensor) for p in tree.parameters()))
    folder: Path = tmp_path_factory.mktemp("tree") / "saved"
    save_checkpoint(tree, folder, max_shard_bytes=limit)
    load_checkpoint_(other, folder, progress=False)
    want, got = tree.state_dict(), other.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert type(got[name]) is type(value), name
        assert got[name].dtype == value.dtype
        if isinstance(value, AffineQuantizedTensor):
            assert all(map(torch.equal, got[name]._parts(), value._parts())), name
        else:
            assert torch.equal(got[name], value), name
