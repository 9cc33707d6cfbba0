"""What aten operators do with packed weights, held against the dense weight."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn, wrapped
from expecttest import assert_expected_inline
from torch import Tensor, nn

from affine_tensor import AffineQuantizedTensor, layout
from affine_tensor.tensor import OPS

aten = torch.ops.aten

MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}

# One letter for each kind of weight; lower case where it is transposed.
WEIGHTS: dict[str, Callable[[], AffineQuantizedTensor]] = {
    "M": lambda: make(6, 128),
    "m": lambda: make(6, 128).t(),
    "P": lambda: make(6, 128, permuted=True),
    "p": lambda: make(6, 128, permuted=True).t(),
    "E": lambda: make(3, 6, 128),
    "e": lambda: make(3, 6, 128).transpose(1, 2),
    "Q": lambda: make(3, 6, 128, permuted=True),  # experts, each its own permutation
    "q": lambda: make(3, 6, 128, permuted=True).mT,
    "C": lambda: make(6, 256)[:, 64:192],  # a slice along K
    "V": lambda: make(128),
}
MATRICES, EXPERTS = "MmPpC", "EeQq"


def dense(value: Any) -> Any:
    if isinstance(value, AffineQuantizedTensor):
        return value.dequantize()
    if isinstance(value, (list, tuple)):
        return [dense(item) for item in value]
    return value


def is_packed(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(is_packed(item) for item in value)
    return isinstance(value, AffineQuantizedTensor)


def assert_same(got: Any, want: Any) -> None:
    """Equal bit for bit, in shape and in dtype."""
    if isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
        return
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.equal(dense(got), want)


class Case(NamedTuple):
    name: str
    call: Callable[[Any], Any]
    packed: str  # the kinds of weight whose result stays packed
    dense: str = ""  # those whose result is dense


def index(*values: Any) -> Tensor:
    return torch.tensor(*values)


MOVES = [
    Case("t", lambda w: w.t(), "MmPpCV"),
    Case("T", lambda w: w.T, "MmPpC"),
    Case("mT", lambda w: w.mT, "MmPpCEeQq"),
    Case("transpose", lambda w: w.transpose(-2, -1), "MmPpCEeQq"),
    Case("transpose twice", lambda w: w.mT.transpose(-1, -2), "MmPpCEeQq"),
    Case("transpose experts", lambda w: w.transpose(0, 1), "", EXPERTS),
    Case("swapaxes", lambda w: w.swapaxes(-1, -2), "MmPpCEeQq"),
    Case("permute", lambda w: w.permute(-1, 0), "MmPpC"),
    Case("permute experts", lambda w: w.permute(0, 2, 1), EXPERTS),
    Case("permute all", lambda w: w.permute(2, 0, 1), "", EXPERTS),
    Case("permute lead", lambda w: w[None].permute(1, 0, 2, 3), EXPERTS),
    Case("select first", lambda w: w[1], "MPCEeQq", "mpV"),
    Case("select last", lambda w: w[-1], "MPCEeQq", "mpV"),
    Case("select second", lambda w: w.select(1, 2), "mpE", "MPCeQq"),
    Case("select column", lambda w: w[..., 3], "mpe", "MPCEQqV"),
    Case("select expert and row", lambda w: w[1, 2], "EQ", "eq"),
    Case("slice", lambda w: w[1:5], "MPCEeQq", "mpV"),
    Case("slice with a step", lambda w: w[::2], "MPCEeQq", "mpV"),
    Case("slice from the end", lambda w: w[-2:], "MPCEeQq", "mpV"),
    Case("slice past the end", lambda w: w[1:99], "MPCEeQq", "mpV"),
    Case("slice of nothing", lambda w: w[2:2], "MPCEeQq", "mpV"),
    Case("slice of all", lambda w: aten.slice(w, -1, 0, 999), "MmPpCEeQqV"),
    Case("slice of rows of experts", lambda w: w[:, 1:4], "EQmp", "eqMPC"),
    Case("slice of the last", lambda w: w[..., 1:4], "mpeq", "MPCEQV"),
    Case("slice of groups", lambda w: w[..., 32:96], "MCEVmpeq", "PQ"),
    Case("split of groups", lambda w: w.split(64, -1), "MCEVmpeq", "PQ"),
    Case("chunk of groups", lambda w: w.chunk(2, -1), "MCEVmpeq", "PQ"),
    Case("narrow", lambda w: w.narrow(0, 1, 2), "MPCEeQq", "mpV"),
    Case("split", lambda w: w.split(2), "MPCEeQq", "mpV"),
    Case("split in sizes", lambda w: w.split([1, len(w) - 1]), "MPCEeQq", "mpV"),
    Case("chunk", lambda w: w.chunk(3), "MPCEeQq", "mpV"),
    Case("tensor_split", lambda w: w.tensor_split(3), "MPCEeQq", "mpV"),
    Case("unbind", lambda w: w.unbind(), "MPCEeQq", "mpV"),
    Case("unbind the last", lambda w: w.unbind(-1), "mpe", "MPCEQqV"),
    Case("iterate", lambda w: list(w), "MPCEeQq", "mpV"),
    Case("cat", lambda w: torch.cat([w, w[:2]]), "MPCEeQq", "mpV"),
    Case("cat rows of experts", lambda w: torch.cat([w, w], 1), "Eemp", "Pq"),
    Case("cat along the last", lambda w: torch.cat([w, w], -1), "MCEmepqV", "PQ"),
    Case("cat with a dense one", lambda w: torch.cat([w, dense(w)]), "", "MmPpCEeQqV"),
    Case("stack", lambda w: torch.stack([w, w]), "MmPpCEeQq", "V"),
    Case("stack at 1", lambda w: torch.stack([w, w], 1), EXPERTS, "MmPpCV"),
    Case("stack at the end", lambda w: torch.stack([w, w], -1), "", "MmPpCEeQqV"),
    Case("view as is", lambda w: w.view(w.shape), "MmPpCEeQqV"),
    Case("view a lead", lambda w: w.view(1, *w.shape), "MmPpCEeQqV"),
    Case("view groups", lambda w: w.view(*w.shape[:-1], 4, 32), "MCEV", "PQ"),
    Case("view as one row", lambda w: w.view(-1), "MEV", "PQ"),
    Case("reshape to rows", lambda w: w.reshape(-1, w.shape[-1]), "MmPpCEV", "eQq"),
    Case("flatten", lambda w: w.flatten(), "MCEV", "mPpeQq"),
    Case("flatten experts", lambda w: w.flatten(0, 1), "E", "eQq"),
    Case("unflatten rows", lambda w: w.unflatten(0, (2, 3)), "MC", "P"),
    Case("unflatten columns", lambda w: w.t().unflatten(0, (2, 64)), "MC", "P"),
    Case("unflatten columns twice", lambda w: w.unflatten(0, (2, 2, -1)), "m", "p"),
    Case("unflatten part groups", lambda w: w.unflatten(0, (8, 16)), "", "mp"),
    Case("unflatten experts", lambda w: w.unflatten(0, (3, 1)), EXPERTS),
    Case("unsqueeze", lambda w: w.unsqueeze(0), "MmPpCEeQqV"),
    Case("unsqueeze at 1", lambda w: w.unsqueeze(1), EXPERTS, "MmPpCV"),
    Case("unsqueeze at the end", lambda w: w.unsqueeze(-1), "", "MmPpCEeQqV"),
    Case("index with None", lambda w: w[None], "MmPpCEeQqV"),
    Case("squeeze", lambda w: w[:1].squeeze(0), EXPERTS, "MPC"),
    Case("squeeze back", lambda w: w.unsqueeze(0).squeeze(0), "MmPpCEeQq", "V"),
    Case("squeeze dims", lambda w: w[None].squeeze((0, 1)), "MmPpCEeQq", "V"),
    Case("squeeze all", lambda w: w[None].squeeze(), "MmPpCEeQq", "V"),
    Case("expand", lambda w: w.expand(4, *w.shape), "MmPpCEeQq", "V"),
    Case("expand as is", lambda w: w[None].expand(2, -1, -1), "MmPpC"),
    Case("as_strided as is", lambda w: w.as_strided(w.shape, w.stride()), "MmPpEeQqV"),
    Case("as_strided", lambda w: w.as_strided((2, 2), (4, 1)), "", "MPEQV"),
    Case(
        "index_select", lambda w: w.index_select(0, index([2, 0, 0])), "MPCEeQq", "mV"
    ),
    Case("index_select int32", lambda w: w.index_select(0, index([2, 0]).int()), "ME"),
    Case(
        "index_select at 1", lambda w: w.index_select(1, index([2, 0])), "mEQ", "MPCq"
    ),
    Case(
        "index_select at -1", lambda w: w.index_select(-1, index([1])), "mpeq", "MEQV"
    ),
    Case("index", lambda w: w[index([2, 0, 0])], "MPCEeQq", "mpV"),
    Case("index negative", lambda w: w[index([-1])], "MPCEeQq", "mpV"),
    Case("index with a list", lambda w: w[[0, 2]], "MPCEeQq", "mpV"),
    Case("index with nothing", lambda w: w[index([]).long()], "MPCEeQq", "mpV"),
    Case("index 2-D", lambda w: w[index([[2, 0], [1, 1]])], "MCEeQq", "mPpV"),
    Case("index bool", lambda w: w[torch.arange(len(w)) % 2 == 0], "MPCEeQq", "mpV"),
    Case("index with a mask", lambda w: w[dense(w) > 0], "", "MmPpCEeQqV"),
    Case("index columns", lambda w: w[:, index([1, 2])], "", "MmPpCEeQq"),
    Case("index pairs", lambda w: w[index([0, 1]), index([1, 2])], "", "MmPpCEeQq"),
    Case("detach", lambda w: w.detach(), "MmPpCEeQqV"),
    Case("alias", lambda w: aten.alias(w), "MmPpCEeQqV"),
    Case("clone", lambda w: w.clone(), "MmPpCEeQqV"),
    Case("contiguous", lambda w: w.contiguous(), "MPCEQV", "mpeq"),
    Case("to int8", lambda w: w.to(torch.int8), "", "MmPpCEeQqV"),
    Case("to the same", lambda w: w.to(torch.float32), "MmPpCEeQqV"),
    Case("to a copy", lambda w: w.to(torch.float32, copy=True), "MmPpCEeQqV"),
    Case("cpu", lambda w: w.cpu(), "MmPpCEeQqV"),
    # Operators that are not in the table.
    Case("flip", lambda w: w.flip(0), "", "MmPpCEeQqV"),
    Case("diagonal", lambda w: w.diagonal(), "", "MmPpCEeQq"),
    Case("gather", lambda w: w.gather(0, torch.zeros_like(w).long()), "", "MmPpCEeQqV"),
    Case("repeat", lambda w: w.repeat(2, *[1] * (w.dim() - 1)), "", "MmPpCEeQqV"),
    Case("add", lambda w: w + 1, "", "MmPpCEeQqV"),
    Case("zeros_like", lambda w: torch.zeros_like(w), "", "MmPpCEeQqV"),
    Case("view of another dtype", lambda w: w.view(torch.int32), "", "MmPpCEeQqV"),
]


def kinds(cases: list[Case]) -> list[Any]:
    return [
        pytest.param(case, kind, id=f"{case.name}-{kind}")
        for case in cases
        for kind in case.packed + case.dense
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "kind"), kinds(MOVES))
def test_moves_data_as_on_the_dense_weight(case: Case, kind: str, mode: str) -> None:
    weight = WEIGHTS[kind]()
    with MODES[mode]():
        got, want = case.call(weight), case.call(weight.dequantize())
    assert_same(got, want)
    assert is_packed(got) == (kind in case.packed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*WEIGHTS])
def test_a_weight_made_in_inference_mode_moves_data_too(kind: str, mode: str) -> None:
    with torch.inference_mode():
        weight = WEIGHTS[kind]()
    with MODES[mode]():
        for view in (weight.detach(), weight[1:2], weight[..., 1], weight.flatten()):
            assert torch.isfinite(view.to(torch.float16).dequantize()).all()
        assert_same(weight[..., 1], weight.dequantize()[..., 1])


VIEWS = {
    "t": lambda w: w.mT,
    "select": lambda w: w[1],
    "slice": lambda w: w[1:2],
    "split": lambda w: w.split(1)[1],
    "unbind": lambda w: w.unbind()[1],
    "view": lambda w: w.view(1, *w.shape),
    "unsqueeze": lambda w: w[None],
    "squeeze": lambda w: w[None].squeeze(0),
    "expand": lambda w: w.expand(2, *w.shape),
    "permute": lambda w: w[None].permute(1, 0, 2, 3),
    "slice along K": lambda w: w[..., 32:64],
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "to another float dtype": lambda w: w.to(torch.float16),
}
COPIES = {
    "clone": lambda w: w.clone(),
    "contiguous of a slice": lambda w: w[..., 32:64].contiguous(),
    "to a copy": lambda w: w.to(torch.float32, copy=True),
    "index": lambda w: w[[0, 1, 2]],
    "index_select": lambda w: w.index_select(0, index([0, 1])),
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, w]),
    "empty_like": lambda w: torch.empty_like(w),
}


def memory(weight: AffineQuantizedTensor) -> list[int]:
    return [part.untyped_storage().data_ptr() for part in weight._parts()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_shares_the_memory_of_its_weight(name: str, mode: str) -> None:
    weight = make(3, 6, 128)
    with MODES[mode]():
        assert memory(VIEWS[name](weight)) == memory(weight)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_shares_no_memory_with_its_weight(name: str) -> None:
    weight = make(3, 6, 128, permuted="slice" not in name)
    assert not set(memory(COPIES[name](weight))) & set(memory(weight))


@pytest.mark.parametrize("name", VIEWS)
def test_strides_are_those_of_the_dense_weight(name: str) -> None:
    weight = make(3, 6, 128)
    got, want = VIEWS[name](weight), VIEWS[name](weight.dequantize())
    assert got.stride() == want.stride()
    assert got.is_contiguous() == want.is_contiguous()


ALIGNMENTS = [
    (4, 32, 0, 32, True),
    (4, 32, 32, 96, True),
    (4, 32, 96, 128, True),
    (4, 32, 16, 64, False),  # not whole groups
    (4, 32, 32, 100, False),
    (3, 32, 32, 96, True),
    (6, 32, 64, 128, True),
    (3, 16, 32, 64, True),  # whole groups, and 3 words each
    (3, 16, 16, 64, False),  # starts within a word
    (5, 16, 64, 80, False),  # ends within a word
    (2, 16, 16, 48, True),  # a group of 16 is one word
    (1, 16, 16, 48, False),  # half a word
    (1, 16, 32, 64, True),
    (8, 16, 16, 32, True),
]


@pytest.mark.parametrize(("bits", "group", "start", "stop", "packed"), ALIGNMENTS)
def test_a_slice_along_k_stays_packed_where_it_is_whole_groups_and_words(
    bits: int, group: int, start: int, stop: int, packed: bool
) -> None:
    weight = make(4, 128, bits=bits, group_size=group)
    for got, want in (
        (weight[:, start:stop], weight.dequantize()[:, start:stop]),
        (weight.t()[start:stop], weight.dequantize().t()[start:stop]),
    ):
        assert_same(got, want)
        assert is_packed(got) == packed


RAISING = {
    "an axis out of range": (lambda w: w.transpose(0, 5), "mMPEV"),
    "a repeated axis": (lambda w: w.permute(*[0] * w.dim(), 1), "MmPE"),
    "an axis twice": (lambda w: w.permute(0, 0), "MmP"),
    "too few axes": (lambda w: w.permute(0), "MmPE"),
    "t of experts": (lambda w: w.t(), "Ee"),
    "a row out of range": (lambda w: w[999], "MmPEV"),
    "select out of range": (lambda w: w.select(5, 0), "MmPEV"),
    "a negative step": (lambda w: aten.slice(w, 0, 0, 3, -1), "MmPEV"),
    "a split that does not add up": (lambda w: w.split([1, 1]), "MmPEV"),
    "a split by zero": (lambda w: w.split(0), "MmPEV"),
    "a split below zero": (lambda w: w.split(-1), "MmPEV"),
    "cat out of range": (lambda w: torch.cat([w, w], 5), "MmPEV"),
    "cat of different rows": (lambda w: torch.cat([w, w[:, 32:]]), "M"),
    "stack of different rows": (lambda w: torch.stack([w, w[1:]]), "MPE"),
    "view of another size": (lambda w: w.view(7, -1), "MmPEV"),
    "view across a slice": (lambda w: w.view(-1), "C"),
    "expand of a row": (lambda w: w.expand(4, 7, -1), "MmPE"),
    "unsqueeze out of range": (lambda w: w.unsqueeze(7), "MmPEV"),
    "squeeze out of range": (lambda w: w.squeeze(9), "MmPEV"),
    "index out of range": (lambda w: w[index([99])], "MPEe"),
    "index_select 2-D": (lambda w: w.index_select(0, index([[1]])), "MmPE"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RAISING)
def test_raises_where_the_dense_weight_does(name: str, mode: str) -> None:
    call, kinds = RAISING[name]
    for kind in kinds:
        weight = WEIGHTS[kind]()
        like = weight.dequantize()
        if kind == "C":  # as a slice, it is not contiguous; its dense copy is
            like = torch.empty(6, 256)[:, 64:192]
        with MODES[mode]():
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                call(like)
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                call(weight)


def test_weights_with_different_permutations_are_not_joined_along_rows() -> None:
    one, other = make(6, 128, permuted=True), make(6, 128, permuted=True, seed=5)
    with pytest.raises(ValueError, match="permutations") as error:
        torch.cat([one, other])
    assert_expected_inline(
        wrapped(str(error.value)),
        """\
weights with different permutations cannot be joined along their rows;
  dequantize() them first""",
    )
    assert_same(torch.stack([one, other]), torch.stack([dense(one), dense(other)]))


# ---- products --------------------------------------------------------------------


def times_rows(w: Any, *lead: int) -> Tensor:
    """An input whose last dimension is the weight's last."""
    return randn(*lead, w.shape[-1])


def times_columns(w: Any, *lead: int) -> Tensor:
    return randn(*lead, w.shape[-2])


def biased(w: Any) -> Tensor:
    return randn(w.shape[0], seed=9)


OFFSETS = index([2, 5, 9]).int()

PRODUCTS = [
    Case("linear", lambda w: F.linear(times_rows(w, 5), w), MATRICES, "V"),
    Case("linear 1-D", lambda w: F.linear(times_rows(w), w), MATRICES, "V"),
    Case("linear 3-D", lambda w: F.linear(times_rows(w, 2, 5), w), MATRICES, "V"),
    Case("linear 4-D", lambda w: F.linear(times_rows(w, 2, 1, 3), w), MATRICES),
    Case("linear of nothing", lambda w: F.linear(times_rows(w, 0), w), MATRICES),
    Case("linear of no batch", lambda w: F.linear(times_rows(w, 2, 0), w), MATRICES),
    Case("linear, bias", lambda w: F.linear(times_rows(w, 5), w, biased(w)), MATRICES),
    Case(
        "linear 3-D, bias",
        lambda w: F.linear(times_rows(w, 2, 3), w, bias=biased(w)),
        MATRICES,
    ),
    Case(
        "linear, a scalar bias",
        lambda w: F.linear(times_rows(w, 5), w, torch.tensor(2.0)),
        MATRICES,
    ),
    Case(
        "linear, keywords",
        lambda w: F.linear(input=times_rows(w, 5), weight=w, bias=biased(w)),
        MATRICES,
    ),
    Case("linear strided", lambda w: F.linear(times_rows(w, 9)[::2], w), MATRICES),
    Case(
        "linear strided along K",
        lambda w: F.linear(randn(5, 2 * w.shape[-1])[:, ::2], w),
        MATRICES,
    ),
    Case(
        "linear column-major",
        lambda w: F.linear(randn(w.shape[-1], 5).t(), w),
        MATRICES,
    ),
    Case(
        "linear expanded", lambda w: F.linear(times_rows(w).expand(4, -1), w), MATRICES
    ),
    Case("mm", lambda w: torch.mm(times_columns(w, 5), w), MATRICES),
    Case("mm of nothing", lambda w: torch.mm(times_columns(w, 0), w), MATRICES),
    Case("mm on the left", lambda w: torch.mm(w, randn(w.shape[1], 5)), MATRICES),
    Case("mm with itself", lambda w: torch.mm(w, w.t()), "", MATRICES),
    Case("mv", lambda w: torch.mv(w, randn(w.shape[1])), MATRICES),
    Case("mv with a row", lambda w: torch.mv(randn(4, 128), w[1]), "", "MPC"),
    Case("matmul", lambda w: times_columns(w, 5) @ w, MATRICES),
    Case("matmul 1-D", lambda w: times_columns(w) @ w, MATRICES),
    Case("matmul 3-D", lambda w: times_columns(w, 2, 5) @ w, MATRICES),
    Case("matmul on the left", lambda w: w @ randn(w.shape[-1], 5), MATRICES),
    Case("matmul on the left, 1-D", lambda w: w @ randn(w.shape[-1]), MATRICES),
    Case("matmul on the left, 3-D", lambda w: w @ randn(2, w.shape[-1], 5), MATRICES),
    Case("matmul of experts", lambda w: times_columns(w, 3, 5) @ w, EXPERTS),
    Case("matmul of experts, T", lambda w: times_rows(w, 3, 5) @ w.mT, EXPERTS),
    Case("matmul of experts, left", lambda w: w @ randn(3, w.shape[-1], 5), EXPERTS),
    Case("matmul, one x for all experts", lambda w: times_columns(w, 5) @ w, EXPERTS),
    Case(
        "addmm",
        lambda w: torch.addmm(randn(w.shape[1]), times_columns(w, 5), w),
        MATRICES,
    ),
    Case(
        "addmm, beta, alpha",
        lambda w: torch.addmm(
            randn(5, w.shape[1]), times_columns(w, 5), w, beta=0.5, alpha=2
        ),
        MATRICES,
    ),
    Case(
        "addmm, beta 0 ignores NaN",
        lambda w: torch.addmm(
            torch.full((w.shape[1],), torch.nan), times_columns(w, 5), w, beta=0
        ),
        MATRICES,
    ),
    Case(
        "addmm with the transpose",
        lambda w: torch.addmm(biased(w), times_rows(w, 5), w.t(), beta=2),
        MATRICES,
    ),
    Case(
        "addmm on the left",
        lambda w: torch.addmm(randn(5), w, randn(w.shape[1], 5), beta=2, alpha=0.3),
        MATRICES,
    ),
    Case("bmm", lambda w: torch.bmm(times_columns(w, 3, 5), w), EXPERTS),
    Case("bmm of nothing", lambda w: torch.bmm(times_columns(w, 3, 0), w), EXPERTS),
    Case("bmm on the left", lambda w: torch.bmm(w, randn(3, w.shape[2], 5)), EXPERTS),
    Case("addmv", lambda w: torch.addmv(biased(w), w, randn(w.shape[1])), "", MATRICES),
    Case(
        "baddbmm",
        lambda w: torch.baddbmm(torch.ones(()), times_columns(w, 3, 5), w),
        "",
        EXPERTS,
    ),
    Case("einsum", lambda w: torch.einsum("bk,nk->bn", times_rows(w, 5), w), "", "MmP"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "kind"), kinds(PRODUCTS))
def test_products_equal_those_of_the_dense_weight(
    case: Case, kind: str, mode: str, fallbacks: list[str]
) -> None:
    weight = WEIGHTS[kind]()
    with MODES[mode]():
        got, want = case.call(weight), case.call(weight.dequantize().double().float())
    assert got.shape == want.shape
    # Sums of 128 products: an error of 1e-5 is some units in the last place.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if kind in case.packed:
        assert not fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32])
def test_products_take_scales_of_another_dtype(
    dtype: torch.dtype, scales: torch.dtype, no_fallback: None
) -> None:
    weight = make(6, 128, dtype=scales).to(dtype)
    x = times_rows(weight, 5).to(dtype)
    want = x.double() @ weight.dequantize().double().t()
    got = F.linear(x, weight)
    assert got.dtype == dtype
    assert weight.scales.dtype == scales
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=unit, atol=16 * unit)
    want = x[:, :6].double() @ weight.dequantize().double()
    got = x[:, :6] @ weight
    torch.testing.assert_close(got.double(), want, rtol=unit, atol=16 * unit)


BAD_PRODUCTS = {
    "x of another dtype": lambda w: F.linear(times_rows(w, 5).double(), w),
    "x of another width": lambda w: F.linear(randn(5, 7), w),
    "a bias of another width": lambda w: F.linear(times_rows(w, 5), w, randn(9)),
    "a bias of another dtype": lambda w: F.linear(
        times_rows(w, 5), w, biased(w).double()
    ),
    "mm with a vector": lambda w: torch.mm(times_columns(w), w),
    "mm with three dimensions": lambda w: torch.mm(times_columns(w, 2, 5), w),
    "mm with a vector on the right": lambda w: torch.mm(w, randn(w.shape[1])),
    "mm of another width": lambda w: torch.mm(randn(5, 7), w),
    "mv with a matrix": lambda w: torch.mv(w, randn(w.shape[1], 2)),
    "mv from a vector": lambda w: torch.mv(times_columns(w, 5), w),
    "addmm of too much": lambda w: torch.addmm(
        randn(2, 5, w.shape[1]), times_columns(w, 5), w
    ),
    "addmm of another dtype": lambda w: torch.addmm(
        biased(w).double(), times_rows(w, 5), w.t()
    ),
    "bmm with a matrix": lambda w: torch.bmm(randn(3, 5, w.shape[0]), w),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BAD_PRODUCTS)
def test_products_raise_where_the_dense_weight_does(name: str, mode: str) -> None:
    for kind in MATRICES:
        weight = WEIGHTS[kind]()
        with MODES[mode](), pytest.raises((RuntimeError, ValueError)):
            BAD_PRODUCTS[name](weight.dequantize())
        with MODES[mode](), pytest.raises((RuntimeError, ValueError)):
            BAD_PRODUCTS[name](weight)


@pytest.mark.parametrize("kind", EXPERTS)
def test_bmm_refuses_another_number_of_experts(kind: str) -> None:
    weight = WEIGHTS[kind]()
    with pytest.raises(RuntimeError, match="do not fit together"):
        torch.bmm(times_columns(weight, 2, 5), weight)


@pytest.mark.parametrize("ends", [(2, 5, 9), (2, 2, 9), (0, 0, 0), (9, 9, 9)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("permuted", [False, True])
def test_grouped_mm_equals_that_of_the_dense_experts(
    permuted: bool, mode: str, ends: tuple[int, ...], no_fallback: None
) -> None:
    weight = make(3, 8, 64, permuted=permuted)  # [E, out, in]
    offsets = index(ends).int()
    with MODES[mode]():
        for shown in (weight.mT, weight):
            x = randn(ends[-1], shown.shape[1])
            got = F.grouped_mm(x, shown, offs=offsets)
            want = F.grouped_mm(x, shown.dequantize(), offs=offsets)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_grouped_mm_has_the_gradient_of_the_dense_experts(no_fallback: None) -> None:
    weight = make(3, 8, 64)
    x = randn(9, 64).requires_grad_()
    y = F.grouped_mm(x, weight.mT, offs=OFFSETS)
    (got,) = torch.autograd.grad(y, x, randn(9, 8, seed=3))
    y = F.grouped_mm(x, weight.dequantize().mT, offs=OFFSETS)
    (want,) = torch.autograd.grad(y, x, randn(9, 8, seed=3))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- embedding -------------------------------------------------------------------

IDS = {
    "1-D": index([5, 0, 0]),
    "2-D": index([[1, 2], [0, 5]]),
    "int32": index([3]).int(),
    "one": index(4),
    "none": index([]).long(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", ["M", "P", "C"])
def test_embedding_equals_that_of_the_dense_table(
    kind: str, ids: str, mode: str, no_fallback: None
) -> None:
    weight = WEIGHTS[kind]()
    with MODES[mode]():
        got = F.embedding(IDS[ids], weight)
        assert not is_packed(got)
        assert_same(got, F.embedding(IDS[ids], weight.dequantize()))
        got = F.embedding(IDS[ids], weight, padding_idx=0)
        assert_same(got, F.embedding(IDS[ids], weight.dequantize()))


@pytest.mark.parametrize("ids", [index([-1]), index([6]), index([1.0])])
def test_embedding_refuses_ids_that_are_no_rows(ids: Tensor) -> None:
    for kind in ("M", "P"):
        with pytest.raises((IndexError, RuntimeError)):
            F.embedding(ids, WEIGHTS[kind]())


def test_embedding_dequantizes_only_the_rows_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    dequantize = layout.dequantize

    def count(packed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(packed.shape[0])
        return dequantize(packed, *args, **kwargs)

    monkeypatch.setattr(layout, "dequantize", count)
    for permuted in (False, True):
        F.embedding(index([[7, 7], [0, 3]]), make(4096, 64, permuted=permuted))
    assert rows == [4, 4]


@pytest.mark.parametrize("mode", MODES)
def test_embedding_refuses_max_norm(mode: str) -> None:
    weight = make(6, 128)
    before = weight.dequantize()
    embedding = nn.Embedding(6, 128, max_norm=1.0)
    embedding.weight = nn.Parameter(weight)
    with MODES[mode](), pytest.raises(NotImplementedError) as error:
        embedding(index([1]))
    assert_expected_inline(
        wrapped(str(error.value)),
        """\
an embedding with max_norm rewrites its weight on each call, which a packed
  weight cannot do. Set max_norm to None, or leave this embedding dense""",
    )
    assert torch.equal(weight.dequantize(), before)


# ---- copies ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*WEIGHTS])
@pytest.mark.parametrize("mode", MODES)
def test_another_float_dtype_is_a_new_name_for_the_same_parts(
    kind: str, mode: str
) -> None:
    weight = WEIGHTS[kind]()
    with MODES[mode]():
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            new = weight.to(dtype)
            assert is_packed(new)
            assert new.dtype == dtype
            assert new.scales.dtype == torch.float32
            assert memory(new) == memory(weight)
            assert_same(new.to(torch.float32), weight.dequantize())
            # One rounding, from exact sums: not that of the rounded float32 weight.
            assert torch.equal(new.dequantize(), weight.dequantize(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*WEIGHTS])
def test_meta_keeps_the_format_and_no_data(kind: str, mode: str) -> None:
    weight = WEIGHTS[kind]()
    with MODES[mode]():
        new = weight.to("meta")
    assert is_packed(new)
    assert new.shape == weight.shape
    assert new.device.type == "meta"
    assert {part.device.type for part in new._parts()} == {"meta"}
    assert repr(new) == repr(weight).replace("'cpu'", "'meta'")


@pytest.mark.parametrize("kind", [*WEIGHTS])
def test_empty_like_has_the_format_of_its_weight(kind: str) -> None:
    weight = WEIGHTS[kind]()
    new = torch.empty_like(weight)
    assert repr(new) == repr(weight)
    assert [p.shape for p in new._parts()] == [p.shape for p in weight._parts()]
    assert repr(torch.empty_like(weight, dtype=torch.float16)) == repr(weight.half())
    assert torch.empty_like(weight, device="meta").device.type == "meta"
    assert not is_packed(torch.empty_like(weight, dtype=torch.int8))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*WEIGHTS])
def test_copy_of_a_packed_weight_copies_its_parts(kind: str, mode: str) -> None:
    weight = WEIGHTS[kind]()
    target = torch.empty_like(weight)
    with MODES[mode]():
        assert target.copy_(weight) is target
    assert torch.equal(target, weight)
    assert all(
        a.equal(b) for a, b in zip(target._parts(), weight._parts(), strict=True)
    )
    assert not set(memory(target)) & set(memory(weight))


def requantized(weight: AffineQuantizedTensor, source: Tensor) -> Tensor:
    """What quantizing `source` in the weight's format leaves of it, by the layout."""
    rows = (source.mT if weight.transposed else source).to(weight.scales.dtype)
    order = torch.arange(rows.shape[-1]).expand(rows.shape)
    if weight.permutation is not None:
        order = weight.permutation.long().unsqueeze(-2).expand(rows.shape)
    kind = {"bits": weight.bits, "group_size": weight.group_size}
    parts = layout.quantize(rows.take_along_dim(order, -1), **kind)
    rows = layout.dequantize(*parts, **kind).take_along_dim(order.argsort(-1), -1)
    return rows.mT if weight.transposed else rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*WEIGHTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copy_of_a_float_tensor_quantizes_it(
    dtype: torch.dtype, kind: str, mode: str
) -> None:
    weight = WEIGHTS[kind]()
    source = randn(*weight.shape, dtype=dtype, seed=8)
    with MODES[mode]():
        weight.copy_(source)
    assert_same(weight, requantized(weight, source))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*WEIGHTS])
def test_copy_into_a_float_tensor_dequantizes(kind: str, mode: str) -> None:
    weight = WEIGHTS[kind]()
    with MODES[mode]():
        target = torch.zeros(weight.shape, dtype=torch.float16)
        target.copy_(weight)
        assert torch.equal(target, weight.dequantize().half())
        table = torch.zeros(2, *weight.shape)
        table[1] = weight
        assert torch.equal(table[1], weight.dequantize())
        assert not table[0].any()


def test_copy_into_a_view_writes_to_the_weight() -> None:
    weight, other = make(6, 256), make(2, 256, seed=4)
    before = weight.dequantize()
    weight[2:4].copy_(other)
    want = torch.cat([before[:2], other.dequantize(), before[4:]])
    assert torch.equal(weight.dequantize(), want)
    weight[:, 64:128].copy_(make(6, 64, seed=7))
    want[:, 64:128] = make(6, 64, seed=7).dequantize()
    assert torch.equal(weight.dequantize(), want)
    weight.t()[:32].copy_(make(6, 32, seed=8).t())
    want[:, :32] = make(6, 32, seed=8).dequantize()
    assert torch.equal(weight.dequantize(), want)
    weight[5] = other[0]
    want[5] = other.dequantize()[0]
    assert torch.equal(weight.dequantize(), want)


MISFITS = {
    "bits": make(6, 128, bits=8),
    "group_size": make(6, 128, group_size=64),
    "scales": make(6, 128, dtype=torch.bfloat16).float(),
    "permutation": make(6, 128, permuted=True),
    "shape": make(6, 64),
    "rows": make(5, 128),
    "float shape": torch.ones(5, 128),
    "integers": torch.ones(6, 128, dtype=torch.int64),
    "NaN": torch.full((6, 128), torch.nan),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MISFITS)
def test_copy_refuses_what_does_not_fit_and_changes_nothing(
    name: str, mode: str
) -> None:
    weight = make(6, 128)
    before = weight.dequantize()
    with MODES[mode](), pytest.raises((RuntimeError, TypeError, ValueError)):
        weight.copy_(MISFITS[name])
    assert torch.equal(weight.dequantize(), before)


def test_copy_names_what_must_agree() -> None:
    with pytest.raises(RuntimeError) as error:
        make(6, 128).copy_(make(6, 128, bits=8))
    assert_expected_inline(
        wrapped(str(error.value)),
        """\
copy_ of AffineQuantizedTensor(shape=[6, 128], dtype=float32, bits=8,
  group_size=32, device='cpu') into AffineQuantizedTensor(shape=[6, 128],
  dtype=float32, bits=4, group_size=32, device='cpu'): bits, group_size,
  shape, dtype of the scales, transposition and permutation must agree.
  Replace the parameter instead, with load_state_dict(..., assign=True) for
  example""",
    )


@pytest.mark.parametrize("mode", MODES)
def test_copy_into_rows_keeps_the_permutation_of_the_other_rows(mode: str) -> None:
    weight = make(6, 128, permuted=True)
    other = make(6, 128, permuted=True, seed=5)
    before = weight.dequantize()
    with MODES[mode]():
        with pytest.raises(RuntimeError, match="other rows of that weight"):
            weight[:2].copy_(other[:2])
        assert torch.equal(weight.dequantize(), before)
        weight[:2].copy_(weight[2:4].clone())
    assert torch.equal(weight.dequantize()[:2], before[2:4])
    weight.copy_(other)  # the whole takes the other permutation
    assert torch.equal(weight.dequantize(), other.dequantize())


@pytest.mark.parametrize("kind", [*WEIGHTS])
def test_equal_compares_values(kind: str) -> None:
    weight = WEIGHTS[kind]()
    assert torch.equal(weight, weight.clone())
    assert torch.equal(weight, weight.dequantize())
    assert torch.equal(weight.dequantize(), weight)
    other = weight.clone()
    other._packed.view(-1)[-1] ^= 1
    assert not torch.equal(weight, other)
    assert not torch.equal(weight, other.dequantize())
    assert not torch.equal(weight, weight[:1])


def test_equal_finds_the_same_values_in_other_formats() -> None:
    half = torch.arange(6 * 128).view(6, 128).remainder(3.0)
    one = AffineQuantizedTensor.from_dense(half, bits=4, group_size=32)
    other = AffineQuantizedTensor.from_dense(half, bits=8, group_size=64)
    assert torch.equal(one, other) == torch.equal(dense(one), dense(other))
    codes = make(6, 128)
    order = torch.arange(128).int()
    same = AffineQuantizedTensor.from_packed(
        codes.packed,
        codes.scales,
        codes.biases,
        bits=4,
        group_size=32,
        permutation=order,
    )
    assert torch.equal(codes, same)
    assert not torch.equal(codes, make(6, 128, permuted=True))


needs_accelerator = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="there is no accelerator"
)


@needs_accelerator
def test_pinning_pins_every_part() -> None:
    weight = make(6, 128, permuted=True)
    assert not weight.is_pinned()
    pinned = weight.pin_memory()
    assert is_packed(pinned)
    assert pinned.is_pinned()
    assert all(part.is_pinned() for part in pinned._parts())
    assert torch.equal(pinned, weight)


@needs_accelerator
@pytest.mark.parametrize("kind", [*WEIGHTS])
def test_a_weight_goes_to_the_accelerator_and_back(kind: str) -> None:
    device = torch.accelerator.current_accelerator()
    weight = WEIGHTS[kind]()
    moved = weight.to(device, non_blocking=True)
    assert is_packed(moved)
    assert {part.device.type for part in moved._parts()} == {device.type}
    assert moved.to(device) is moved
    moved.record_stream(torch.accelerator.current_stream())
    as_half = weight.to(device, torch.float16)
    assert (as_half.dtype, as_half.scales.dtype) == (torch.float16, torch.float32)
    for back in (moved.cpu(), torch.empty_like(weight).copy_(moved), as_half.cpu()):
        assert torch.equal(back.float(), weight)
    assert torch.equal(moved.dequantize().cpu(), weight.dequantize())


def test_pinning_asks_and_pins_every_part() -> None:
    """Without a device: the handlers, with a stand-in for the operator."""
    weight = make(6, 128, permuted=True)
    new = OPS[aten._pin_memory.default](torch.clone, (weight,), {})
    assert torch.equal(new, weight)
    assert not set(memory(new)) & set(memory(weight))
    ours = {part.data_ptr() for part in new._parts()}
    is_pinned = OPS[aten.is_pinned.default]
    assert is_pinned(lambda part: part.data_ptr() in ours, (new,), {})
    assert not is_pinned(lambda part: part.data_ptr() in ours, (weight,), {})
    for own in new._parts():
        assert not is_pinned(lambda part, own=own: part is not own, (new,), {})


# ---- writing ---------------------------------------------------------------------

WRITES = {
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "sub_": lambda w: w.sub_(1),
    "mul_": lambda w: w.mul_(2),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(1),
    "clamp_": lambda w: w.clamp_(0),
    "random_": lambda w: w.random_(),
    "zero_ of a row": lambda w: w[0].zero_(),
    "zero_ of a slice": lambda w: w[:, 32:64].zero_(),
    "zero_ of .data": lambda w: w.data[0].zero_(),
    "[row] = number": lambda w: w.__setitem__(0, 0),
    "[column] = number": lambda w: w.__setitem__((slice(None), 3), 0),
    "[columns] = tensor": lambda w: w.__setitem__(
        (slice(None), slice(3, 5)), torch.ones(6, 2)
    ),
    "[mask] = number": lambda w: w.__setitem__(dense(w) > 0, 0),
    "[index] = tensor": lambda w: w.__setitem__(index([1]), torch.ones(128)),
    "index_fill_": lambda w: w.index_fill_(0, index([0]), 1),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(6, 128).bool(), 0),
    "index_copy_": lambda w: w.index_copy_(0, index([0]), torch.ones(1, 128)),
    "out=": lambda w: torch.add(torch.ones(6, 128), 1, out=w),
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.ones(3)),
    "t_": lambda w: w.t_(),
    "foreach": lambda w: torch._foreach_add_([torch.ones(2), w], 1.0),
    "apply_": lambda w: w.apply_(lambda value: 0),
    "map2_": lambda w: w.map2_(w, w, lambda a, b, c: 0),
    "init.normal_": nn.init.normal_,
    "init.trunc_normal_": nn.init.trunc_normal_,
    "init.zeros_": nn.init.zeros_,
    "init.constant_": lambda w: nn.init.constant_(w, 1.0),
    "init.eye_": nn.init.eye_,
    "init.kaiming_uniform_": nn.init.kaiming_uniform_,
    "init.xavier_normal_": nn.init.xavier_normal_,
    "init.sparse_": lambda w: nn.init.sparse_(w, 0.5),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRITES)
def test_writing_into_a_packed_weight_raises_and_changes_nothing(
    name: str, mode: str
) -> None:
    weight = make(6, 128)
    before = weight.dequantize()
    with MODES[mode](), pytest.raises(NotImplementedError, match="packed weight"):
        WRITES[name](weight)
    assert weight.shape == (6, 128)
    assert torch.equal(weight.dequantize(), before)


def test_writing_names_what_to_call_instead() -> None:
    with pytest.raises(NotImplementedError) as error:
        make(6, 128).add_(1)
    assert_expected_inline(
        wrapped(str(error.value)),
        """\
aten.add_.Tensor on a packed weight: A packed weight cannot be trained or
  changed in place. Train adapters beside it, which merge_to_dense(model)
  merges, or make it dense with dequantize_(model)""",
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_weight_is_read_by_operators_that_write_elsewhere(mode: str) -> None:
    weight = make(6, 128)
    with MODES[mode]():
        x = torch.ones(6, 128)
        assert x.add_(weight) is x
        assert torch.equal(x, torch.ones(6, 128) + weight.dequantize())
        out = torch.empty(6, 128)
        assert torch.mul(weight, 2, out=out) is out
        assert torch.equal(out, weight.dequantize() * 2)
        out = torch.empty(5, 6)
        x = randn(5, 128)
        assert torch.mm(x, weight.t(), out=out) is out
        torch.testing.assert_close(out, x @ weight.dequantize().t())


# ---- the fallback ----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_operator_is_logged_once(mode: str, fallbacks: list[str]) -> None:
    weight = make(6, 128)
    with MODES[mode]():
        first, second = weight.norm(dim=0), weight.norm(dim=0)
        assert torch.equal(first, weight.dequantize().norm(dim=0))
        assert torch.equal(first, second)
        assert len(fallbacks) == 1
        weight.cumsum(0)
        weight.cumsum(0)
    assert_expected_inline(
        wrapped("\n".join(fallbacks)),
        """\
aten.linalg_vector_norm.default dequantizes a packed weight on each call: it
  has no kernel for one
aten.cumsum.default dequantizes a packed weight on each call: it has no
  kernel for one""",
    )


def test_the_log_is_a_warning_of_the_package(
    fallbacks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    make(6, 128).abs()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("affine_tensor", logging.WARNING)


def test_results_of_the_fallback_in_inference_mode_are_inference_tensors() -> None:
    weight = make(6, 128)
    with torch.inference_mode():
        assert (weight + 1).is_inference()
        assert not weight[:, 3].is_inference()  # a view, as of a dense weight
        assert not weight.dequantize()[:, 3].requires_grad


def test_operators_of_others_raise() -> None:
    library = torch.library.Library("affine_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    with pytest.raises(NotImplementedError) as error:
        torch.ops.affine_test.twice(make(6, 128))
    assert_expected_inline(
        wrapped(str(error.value)),
        """\
affine_test.twice.default does not know packed weights. Give it
  weight.dequantize()""",
    )


@pytest.mark.parametrize("read", [torch.from_dlpack, lambda w: w.__dlpack__()])
def test_memory_that_is_not_there_is_not_lent(read: Callable[[Any], Any]) -> None:
    with pytest.raises(BufferError, match="no dense memory"):
        read(make(6, 128))
    for method in ("numpy", "tolist"):
        with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
            getattr(make(6, 128), method)()


# ---- what is written stays where it belongs --------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "gather",
    [
        lambda w: w[torch.tensor([0, 1, 2, 3, 4, 5])],
        lambda w: w.index_select(0, torch.arange(6)),
        lambda w: torch.cat([w[:3], w[3:]]),
    ],
    ids=["index", "index_select", "cat"],
)
def test_gathered_rows_have_a_permutation_of_their_own(
    gather: Callable[[Tensor], Tensor], mode: str
) -> None:
    weight, other = (make(6, 128, permuted=True, seed=seed) for seed in (0, 1))
    before = weight.dequantize()
    with MODES[mode]():
        rows = gather(weight)
        rows.copy_(other)
        assert torch.equal(rows.dequantize(), other.dequantize())
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("mode", MODES)
def test_some_rows_cannot_take_another_permutation(mode: str) -> None:
    weight, other = (make(6, 128, permuted=True, seed=seed) for seed in (0, 1))
    before = weight.dequantize()
    with MODES[mode](), pytest.raises(RuntimeError, match="their permutations differ"):
        weight[0:2].copy_(other[0:2])
    assert torch.equal(weight.dequantize(), before)


def test_an_empty_weight_has_a_permutation_that_stays_within_its_rows() -> None:
    for weight in (make(6, 128, permuted=True), make(3, 6, 128, permuted=True)):
        empty = torch.empty_like(weight)
        assert empty.permutation is not None
        order = torch.arange(128, dtype=torch.int32).expand_as(empty.permutation)
        assert torch.equal(empty.permutation, order)
        dense = randn(*weight.shape)
        empty.copy_(dense)
        expected = AffineQuantizedTensor.from_dense(dense, 4, 32)
        assert torch.equal(empty.dequantize(), expected.dequantize())


@pytest.mark.parametrize("mode", MODES)
def test_fill_diagonal_is_refused(mode: str) -> None:
    weight = make(6, 128)
    before = weight.dequantize()
    with MODES[mode](), pytest.raises(NotImplementedError, match="fill_diagonal_"):
        weight.fill_diagonal_(0)
    assert torch.equal(weight.dequantize(), before)


def test_the_log_says_that_a_dense_view_is_a_copy(fallbacks: list[str]) -> None:
    make(6, 128)[:, 3]
    (line,) = fallbacks
    assert line.startswith("aten.select.int dequantizes a packed weight")
    assert line.endswith("What it gives is a copy, which cannot be written to")


# ---- edges -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", "EeM")
@pytest.mark.parametrize("dim", [4, 9, -5, -7])
def test_new_dimensions_out_of_range_are_refused_as_by_torch(
    kind: str, dim: int
) -> None:
    weight = WEIGHTS[kind]()
    for call in (lambda w: w.unsqueeze(dim), lambda w: torch.stack([w, w], dim)):
        with pytest.raises(IndexError):
            call(weight.dequantize())
        with pytest.raises(IndexError):
            call(weight)


def test_bmm_of_no_experts() -> None:
    weight = make(3, 6, 128)[:0]
    x = randn(0, 5, 128)
    assert_same(torch.bmm(x, weight.mT), torch.bmm(x, weight.dequantize().mT))
    y = randn(0, 128, 4)
    assert_same(torch.bmm(weight, y), torch.bmm(weight.dequantize(), y))


def test_addmm_with_alpha_zero_ignores_the_product() -> None:
    weight, x = make(6, 128), torch.full((5, 128), torch.inf)
    for added in (randn(6), randn(5, 6)):
        got = torch.addmm(added, x, weight.t(), alpha=0, beta=2)
        assert_same(
            got, torch.addmm(added, x, weight.dequantize().t(), alpha=0, beta=2)
        )


def test_grouped_products_need_an_end_for_each_expert() -> None:
    weight = make(3, 6, 128)
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="one end for each of the 3 experts"):
        torch._grouped_mm(randn(4, 128), weight.mT, offs=offsets)
    with pytest.raises(ValueError, match="one expert for each of the 4 rows"):
        torch.ops.affine_tensor.grouped_linear(
            randn(4, 128),
            weight._packed,
            weight.scales,
            weight.biases,
            indices=torch.tensor([0, 1]),
            bits=4,
            group_size=32,
            dtype=torch.float32,
        )


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("mode", MODES)
def test_new_tensors_are_made_without_dequantizing(
    kind: str, mode: str, no_fallback: None
) -> None:
    weight = WEIGHTS[kind]()
    like = weight.dequantize()
    with MODES[mode]():
        for call in (
            torch.zeros_like,
            lambda w: torch.ones_like(w, dtype=torch.int32),
            lambda w: torch.full_like(w, 3.5),
            lambda w: w.new_zeros(2, 3),
            lambda w: w.new_ones(4, dtype=torch.bfloat16),
            lambda w: w.new_full((2,), 7),
        ):
            got, want = call(weight), call(like)
            assert_same(got, want)
            assert not is_packed(got)
        torch.manual_seed(3)
        drawn = torch.randn_like(weight)
        torch.manual_seed(3)
        assert_same(drawn, torch.randn_like(like))
        assert weight.new_empty(5).shape == (5,)
