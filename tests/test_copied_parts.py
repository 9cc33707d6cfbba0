"""Parts of packed weights that are dense copies: read like any, never written to."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make, randn, wrapped
from expecttest import assert_expected_inline
from torch import Tensor, nn

MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
X = randn(8, 128)
KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: make(8, 128),
    "3 bits": lambda: make(8, 128, bits=3),
    "act-order": lambda: make(8, 128, permuted=True),
}


def columns(w: Tensor) -> Tensor:
    return w[:, 3:7]


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "copy_ of floats": lambda w: w.narrow(1, 16, 64).copy_(X[:, :64]),
    "copy_ of packed": lambda w: w.narrow(1, 16, 64).copy_(make(8, 64)),
    "copy_ of a copy": lambda w: columns(w).copy_(columns(make(8, 128, seed=2))),
    "fill_": lambda w: columns(w).fill_(1),
    "add_": lambda w: columns(w).add_(1),
    "of a view": lambda w: columns(w)[0, 1:].fill_(1),
    "of a row": lambda w: w[0][3:7].fill_(1),
    "transposed": lambda w: w.t()[3:7].copy_(X[:, :4].t()),
    "split": lambda w: w.split([48, 80], 1)[0].zero_(),
    "unbind": lambda w: w.unbind(1)[5].zero_(),
    "diagonal": lambda w: w.diagonal().zero_(),
    "detach": lambda w: columns(w).detach().zero_(),
    "out=": lambda w: torch.add(X[:, :4], 1, out=columns(w)),
    "foreach": lambda w: torch._foreach_add_([torch.ones(2), columns(w)], 1.0),
    "[] = of it": lambda w: columns(w).__setitem__(0, 1.0),
    "masked_fill_": lambda w: columns(w).masked_fill_(X[:, :4] > 0, 0),
    "index_copy_": lambda w: columns(w).index_copy_(
        0, torch.tensor([1]), torch.ones(1, 4)
    ),
    "index_put_": lambda w: columns(w).index_put_(
        (torch.tensor([1]),), torch.ones(1, 4)
    ),
    "init": lambda w: nn.init.normal_(columns(w)),
    "init.zeros_": lambda w: nn.init.zeros_(columns(w)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITES)
def test_writing_raises_and_changes_nothing(name: str, kind: str, mode: str) -> None:
    weight = KINDS[kind]()
    before = weight.dequantize()
    with MODES[mode](), pytest.raises(NotImplementedError, match="a copy of a part"):
        WRITES[name](weight)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    "name", ["copy_ of floats", "fill_", "transposed", "split", "detach", "out="]
)
def test_writing_raises_in_a_graph(name: str, fullgraph: bool, backend: str) -> None:
    def call(w: Tensor) -> Tensor:
        WRITES[name](w)
        return w.dequantize() + 1  # type: ignore[operator]

    weight = make(8, 128)
    compiled = torch.compile(call, fullgraph=fullgraph, backend=backend)
    with pytest.raises(NotImplementedError, match="a copy of a part"):
        compiled(weight)
    assert torch.equal(weight, make(8, 128))


def test_data_cannot_be_assigned() -> None:
    part = columns(make(8, 128))
    with pytest.raises(NotImplementedError, match="a copy of a part"):
        part.data = X
    with pytest.raises(NotImplementedError, match="a copy of a part"):
        part.data.zero_()


def test_the_error_names_shapes_group_size_and_what_to_do() -> None:
    with pytest.raises(NotImplementedError) as error:
        make(8, 128, bits=3).narrow(1, 16, 64).copy_(X[:, :64])
    assert_expected_inline(
        wrapped(str(error.value)),
        """\
aten.copy_.default writes to a tensor of shape [8, 64] that is a copy of a
  part of a packed weight, AffineQuantizedTensor(shape=[8, 128],
  dtype=float32, bits=3, group_size=32, device='cpu'): the weight would not
  change. A part along the input channels can be written to, with copy_,
  where it starts and ends at multiples of 32 and they are in order (no
  permutation). Else dequantize() the weight, change that, and copy_ it
  back, which quantizes all of it anew; or clone() the part to go on with
  the copy""",
    )


def test_what_the_error_advises() -> None:
    weight, value = make(8, 128), randn(8, 64)
    weight.narrow(1, 32, 64).copy_(value)  # a multiple of what it says
    assert torch.equal(weight.dequantize()[:, 32:96], _quantized(value))
    weight, value = make(8, 128), randn(8, 4)
    dense = weight.dequantize()
    dense[:, 3:7] = value
    weight.copy_(dense)
    assert torch.equal(weight.dequantize(), _quantized(dense))
    part = columns(weight).clone()
    assert type(part) is Tensor
    assert torch.equal(part.fill_(1), torch.ones(8, 4))


def _quantized(dense: Tensor) -> Tensor:
    weight = make(*dense.shape)
    return weight.copy_(dense).dequantize()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_like_any_tensor(kind: str, mode: str) -> None:
    weight = KINDS[kind]()
    want = columns(weight.dequantize())
    with MODES[mode]():
        part = columns(weight)
        assert torch.equal(part, want)
        assert part.tolist() == want.tolist()
        assert (part.numpy() == want.numpy()).all()
        assert not part.numpy().flags.writeable
        assert part[0, 0].item() == want[0, 0].item()
        assert repr(part) == repr(want)
        assert torch.equal(torch.from_dlpack(part), want)
        assert (part.shape, part.stride()) == (want.shape, want.stride())
        assert torch.equal(X[:, :4] @ part.t(), X[:, :4] @ want.t())
        for made in (part + 1, part.clone(), part.contiguous(), part.reshape(-1)):
            assert type(made) is Tensor
        assert type(part.half()) is Tensor


def test_files_and_copies_hold_plain_tensors() -> None:
    part = columns(make(8, 128))
    file = io.BytesIO()
    torch.save(part, file)
    file.seek(0)
    for made in (
        torch.load(file),
        pickle.loads(pickle.dumps(part)),
        copy.deepcopy(part),
    ):
        assert type(made) is Tensor
        assert torch.equal(made, part)


def test_gradients_pass_through_what_is_computed_with_it() -> None:
    weight = make(8, 128)
    x, y = (randn(3, 4).requires_grad_() for _ in "xy")
    nn.functional.linear(x, columns(weight)).square().sum().backward()
    nn.functional.linear(y, columns(weight.dequantize())).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_it_passes_into_graphs_and_out_of_them(backend: str) -> None:
    def call(w: Tensor, part: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ part.t() + 1, columns(w)

    weight, x = make(8, 128), randn(3, 4)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    y, part = compiled(weight, columns(weight), x)
    want = columns(weight.dequantize())
    torch.testing.assert_close(y, x @ want.t() + 1)
    assert torch.equal(part, want)
    with pytest.raises(NotImplementedError, match="a copy of a part"):
        part.zero_()
