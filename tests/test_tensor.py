"""AffineQuantizedTensor: how it is made, shown, copied, saved, loaded and guarded."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn, wrapped
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.autograd import forward_ad

import affine_tensor.tensor
from affine_tensor import AffineQuantizedTensor, layout


def parts_of(weight: Tensor) -> list[Tensor]:
    assert isinstance(weight, AffineQuantizedTensor)
    return weight._parts()


def assert_equal_parts(got: Tensor, want: Tensor) -> None:
    assert repr(got) == repr(want)
    pairs = zip(parts_of(got), parts_of(want), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def share_memory(one: Tensor, other: Tensor) -> bool:
    mine, others = ({p.data_ptr() for p in parts_of(w)} for w in (one, other))
    assert mine == others or not mine & others  # all of the parts or none
    return mine == others


KINDS: dict[str, Callable[[], AffineQuantizedTensor]] = {
    "matrix": lambda: make(6, 128),
    "transposed": lambda: make(6, 128).t(),
    "experts": lambda: make(3, 6, 128, bits=3),
    "permuted": lambda: make(6, 128, permuted=True),
    "as bfloat16": lambda: make(6, 128).bfloat16(),
}


@pytest.fixture(params=[*KINDS])
def weight(request: pytest.FixtureRequest) -> AffineQuantizedTensor:
    return KINDS[request.param]()


# ---- making ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", layout.LOGICAL_DTYPES)
def test_from_dense_stands_for_the_quantized_weight(dtype: torch.dtype) -> None:
    dense = randn(2, 6, 128, dtype=dtype)
    weight = AffineQuantizedTensor.from_dense(dense, bits=5, group_size=64)
    assert (weight.shape, weight.dtype, weight.stride()) == (
        dense.shape,
        dtype,
        dense.stride(),
    )
    stored = torch.float32 if dtype == torch.float64 else dtype
    packed, scales, biases = layout.quantize(dense.to(stored), bits=5, group_size=64)
    assert torch.equal(weight.packed.view(torch.int32), packed.view(torch.int32))
    assert torch.equal(weight.scales, scales)
    assert torch.equal(weight.biases, biases)
    want = layout.dequantize(packed, scales, biases, bits=5, group_size=64, dtype=dtype)
    assert torch.equal(weight.dequantize(), want)
    assert weight.dequantize(torch.float16).dtype == torch.float16


def test_from_dense_takes_a_transposed_weight_and_a_parameter() -> None:
    dense = randn(128, 6)
    weight = AffineQuantizedTensor.from_dense(nn.Parameter(dense).t())
    assert_equal_parts(weight, AffineQuantizedTensor.from_dense(dense.t().contiguous()))
    assert not weight.requires_grad


def test_from_packed_takes_the_parts_over() -> None:
    packed, scales, biases = layout.quantize(randn(6, 128), bits=4, group_size=32)
    weight = AffineQuantizedTensor.from_packed(
        packed, scales, biases, bits=4, group_size=32
    )
    assert weight.packed.dtype == torch.uint32
    assert weight.packed.data_ptr() == packed.data_ptr()
    assert weight.scales is scales
    assert weight.biases is biases
    assert weight.nbytes == 6 * (16 + 4 + 4) * 4
    as_int = AffineQuantizedTensor.from_packed(
        packed.view(torch.int32), scales, biases, bits=4, group_size=32
    )
    assert_equal_parts(as_int, weight)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_permutation_names_the_input_channel_of_each_stored_column(
    lead: tuple[int, ...],
) -> None:
    permuted = make(*lead, 3, 64, permuted=True)
    assert permuted.permutation is not None
    stored = layout.dequantize(
        permuted.packed, permuted.scales, permuted.biases, bits=4, group_size=32
    )
    dense, order = permuted.dequantize(), permuted.permutation
    for expert in range(len(dense)) if lead else [...]:
        for column, channel in enumerate(order[expert].tolist()):
            got, want = dense[expert][:, channel], stored[expert][:, column]
            assert torch.equal(got, want)


PARTS = layout.quantize(randn(6, 128), bits=4, group_size=32)
UNFIT: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "an integer dtype": (lambda: packed_with(dtype=torch.int32), TypeError),
    "float words": (
        lambda: AffineQuantizedTensor.from_packed(
            PARTS[0].float(), *PARTS[1:], bits=4, group_size=32
        ),
        TypeError,
    ),
    "other bits": (
        lambda: AffineQuantizedTensor.from_packed(*PARTS, bits=8, group_size=32),
        ValueError,
    ),
    "unknown bits": (
        lambda: AffineQuantizedTensor.from_packed(*PARTS, bits=7, group_size=32),
        ValueError,
    ),
    "several devices": (
        lambda: AffineQuantizedTensor.from_packed(
            PARTS[0].to("meta"), *PARTS[1:], bits=4, group_size=32
        ),
        ValueError,
    ),
    "a transposed row": (
        lambda: AffineQuantizedTensor.from_packed(
            *(part[0] for part in PARTS), bits=4, group_size=32, transposed=True
        ),
        ValueError,
    ),
    "a short permutation": (
        lambda: packed_with(permutation=torch.arange(127)),
        ValueError,
    ),
    "a float permutation": (
        lambda: packed_with(permutation=torch.arange(128.0)),
        TypeError,
    ),
    "a repeated channel": (
        lambda: packed_with(permutation=torch.arange(128).clamp(max=126)),
        ValueError,
    ),
    "a dense weight of 100 columns": (
        lambda: AffineQuantizedTensor.from_dense(randn(6, 100)),
        ValueError,
    ),
    "integers": (
        lambda: AffineQuantizedTensor.from_dense(torch.ones(6, 128).int()),
        TypeError,
    ),
}


def packed_with(**fields: Any) -> AffineQuantizedTensor:
    return AffineQuantizedTensor.from_packed(*PARTS, bits=4, group_size=32, **fields)


@pytest.mark.parametrize("name", UNFIT)
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    make_it, error = UNFIT[name]
    with pytest.raises(error):
        make_it()


def test_refusals_say_what_was_seen_and_what_is_allowed() -> None:
    messages = []
    own = ("dtype", "devices", "row", "permutation", "channel")  # others: the layout's
    for make_it, error in (UNFIT[name] for name in UNFIT if name.endswith(own)):
        with pytest.raises(error) as raised:
            make_it()
        messages.append(str(raised.value))
    assert_expected_inline(
        wrapped("\n".join(messages)),
        """\
dtype is torch.int32; allowed are float32, float16, bfloat16, float64
the parts lie on several devices, cpu and meta; move them to one
a tensor of one dimension cannot be transposed
the permutation has shape [127]; [128] is needed, one entry for each column
the permutation is torch.float32; int32 is needed
the permutation does not hold each of 0 to 127 once""",
    )


@pytest.mark.parametrize("shape", [(0, 64), (0, 4, 64), (3, 0, 64)])
def test_a_weight_without_rows(shape: tuple[int, ...]) -> None:
    weight = AffineQuantizedTensor.from_dense(torch.empty(shape))
    assert weight.shape == shape
    assert weight.dequantize().shape == shape
    if len(shape) == 2:
        assert F.linear(randn(5, 64), weight).shape == (5, 0)
        assert torch.equal(torch.empty(5, 0) @ weight, torch.zeros(5, 64))


def test_repr_names_the_format_and_no_data() -> None:
    weights = [
        make(6, 128),
        nn.Parameter(make(6, 128, bits=3, dtype=torch.bfloat16)),
        make(2, 6, 128).mT,
        make(6, 128, permuted=True).half(),
        make(6, 128).to("meta"),
        make(128),
    ]
    assert_expected_inline(
        wrapped("\n".join(repr(weight) for weight in weights)),
        """\
AffineQuantizedTensor(shape=[6, 128], dtype=float32, bits=4, group_size=32,
  device='cpu')
AffineQuantizedTensor(shape=[6, 128], dtype=bfloat16, bits=3, group_size=32,
  device='cpu')
AffineQuantizedTensor(shape=[2, 128, 6], dtype=float32, bits=4,
  group_size=32, device='cpu', transposed=True)
AffineQuantizedTensor(shape=[6, 128], dtype=float16, bits=4, group_size=32,
  device='cpu', scales=float32, permutation=True)
AffineQuantizedTensor(shape=[6, 128], dtype=float32, bits=4, group_size=32,
  device='meta')
AffineQuantizedTensor(shape=[128], dtype=float32, bits=4, group_size=32,
  device='cpu')""",
    )
    assert str(weights[0]) == f"{weights[0]}" == repr(weights[0])


# ---- copies ----------------------------------------------------------------------


def test_deepcopy_copies_every_part_once(weight: AffineQuantizedTensor) -> None:
    weight.note = ["mine"]  # type: ignore[attr-defined]
    new = copy.deepcopy(weight)
    assert_equal_parts(new, weight)
    assert not share_memory(new, weight)
    assert new.note == ["mine"]  # type: ignore[attr-defined]
    assert new.note is not weight.note  # type: ignore[attr-defined]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 128)
        self.head = nn.Linear(128, 6, bias=False)
        self.embedding.weight = self.head.weight = nn.Parameter(make(6, 128))


KEEP_TIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
    "to a dtype": lambda model: model.to(torch.bfloat16),
    "to meta": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to("meta").to_empty(device="cpu"),
    "to the same": lambda model: model.cpu().float(),
    "share_memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("name", KEEP_TIES)
def test_a_module_keeps_its_ties(name: str) -> None:
    model = KEEP_TIES[name](Tied())
    assert model.embedding.weight is model.head.weight
    assert isinstance(model.head.weight, nn.Parameter)
    assert isinstance(model.head.weight, AffineQuantizedTensor)
    assert len(list(model.parameters())) == 1


def test_deepcopy_of_a_module_shares_no_memory_with_it() -> None:
    model = Tied()
    assert not share_memory(copy.deepcopy(model).head.weight, model.head.weight)


def test_copy_shares_the_parts(weight: AffineQuantizedTensor) -> None:
    new = copy.copy(weight)
    assert new is not weight
    assert_equal_parts(new, weight)
    assert share_memory(new, weight)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_everything(protocol: int, weight: AffineQuantizedTensor) -> None:
    assert_equal_parts(pickle.loads(pickle.dumps(weight, protocol)), weight)
    parameter = pickle.loads(pickle.dumps(nn.Parameter(weight), protocol))
    assert isinstance(parameter, nn.Parameter)
    assert not parameter.requires_grad


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_torch_load_reads_weights_only(weight: AffineQuantizedTensor) -> None:
    assert_equal_parts(torch.load(saved(weight), weights_only=True), weight)
    state = {"a": nn.Parameter(weight), "b": weight}
    loaded = torch.load(saved(state), weights_only=True)
    assert isinstance(loaded["a"], nn.Parameter)
    assert share_memory(loaded["a"], loaded["b"])  # storages stay shared
    assert_equal_parts(loaded["b"], weight)


def test_torch_load_maps_to_another_device(weight: AffineQuantizedTensor) -> None:
    loaded = torch.load(saved(weight), weights_only=True, map_location="meta")
    assert loaded.device.type == "meta"
    assert repr(loaded) == repr(weight.to("meta"))


def test_torch_load_maps_memory(weight: AffineQuantizedTensor, tmp_path: Path) -> None:
    torch.save(weight, tmp_path / "weight.pt")
    loaded = torch.load(tmp_path / "weight.pt", weights_only=True, mmap=True)
    assert_equal_parts(loaded, weight)


def test_an_old_file_can_still_be_read() -> None:
    """What a pickle calls, with which arguments, is a file format."""
    weight = make(6, 128, permuted=True).t().half()
    function, arguments = weight.__reduce_ex__(2)
    parts, meta, extra = arguments
    assert_expected_inline(
        wrapped(f"{function.__name__} {list(parts)} {meta} {extra}"),
        """\
_rebuild ['_packed', 'scales', 'biases', 'permutation'] (4, 32,
  torch.float16, True) {}""",
    )


def test_a_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = packed_model()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    other = packed_model(seed=5)
    other.load_state_dict(state)
    x = randn(3, 64)
    assert torch.equal(other(x), model(x))
    whole = torch.load(saved(model), weights_only=False)
    assert torch.equal(whole(x), model(x))


# ---- processes -------------------------------------------------------------------


def _child(queue: Any, answers: Any) -> None:
    weight = queue.get()
    was_shared = weight.is_shared()
    weight.copy_(torch.ones(6, 128))
    module = nn.Linear(128, 6)
    module.weight = nn.Parameter(make(6, 128))
    module.share_memory()  # a wrapper subclass without its own crashes here
    answers.put((was_shared, module.weight.is_shared(), make(6, 128)))
    queue.get()  # the memory of what was put must outlive the reader


def test_a_weight_is_shared_with_another_process() -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.Queue()
    weight = make(6, 128)
    assert not weight.is_shared()
    assert weight.share_memory_() is weight
    assert weight.is_shared()
    child = context.Process(target=_child, args=(queue, answers))
    child.start()
    queue.put(weight)
    was_shared, module_shared, answer = answers.get(timeout=120)
    assert was_shared
    assert module_shared
    assert_equal_parts(answer, make(6, 128))
    assert torch.equal(weight.dequantize(), torch.ones(6, 128))  # the child wrote it
    queue.put(None)
    child.join(timeout=60)
    assert child.exitcode == 0


# ---- modules ---------------------------------------------------------------------


def packed_model(seed: int = 0, **format: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 2))
    model[0].weight = nn.Parameter(make(6, 64, seed=seed, **format))
    return model


def dense_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 2))


def test_a_packed_weight_is_a_parameter_of_a_stock_module() -> None:
    weight = make(6, 64)
    parameter = nn.Parameter(weight)
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(parameter, AffineQuantizedTensor)
    assert not parameter.requires_grad
    assert share_memory(parameter, weight)
    model = packed_model()
    assert dict(model.named_parameters())["0.weight"] is model[0].weight
    assert isinstance(model.state_dict()["0.weight"], AffineQuantizedTensor)
    assert share_memory(model.state_dict()["0.weight"], model[0].weight)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_of_packed_into_packed(assign: bool) -> None:
    model, other = packed_model(), packed_model(seed=5)
    before = model[0].weight
    model.load_state_dict(other.state_dict(), assign=assign)
    assert (model[0].weight is before) == (not assign)
    assert share_memory(model[0].weight, other[0].weight) == assign
    assert_equal_parts(model[0].weight, other[0].weight)
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model(randn(3, 64)), other(randn(3, 64)))


def test_load_state_dict_of_floats_into_packed_quantizes() -> None:
    model, dense = packed_model(), dense_model(seed=5)
    model.load_state_dict(dense.state_dict())
    want = AffineQuantizedTensor.from_dense(dense[0].weight, bits=4, group_size=32)
    assert_equal_parts(model[0].weight, want)


def test_load_state_dict_assigns_floats_in_place_of_packed() -> None:
    model, dense = packed_model(), dense_model(seed=5)
    model.load_state_dict(dense.state_dict(), assign=True)
    assert type(model[0].weight) is nn.Parameter
    assert torch.equal(model[0].weight, dense[0].weight)


def test_load_state_dict_of_packed_into_plain_dequantizes() -> None:
    model, packed = dense_model(), packed_model(seed=5)
    model.load_state_dict(packed.state_dict())
    assert type(model[0].weight) is nn.Parameter
    assert model[0].weight.requires_grad
    assert torch.equal(model[0].weight, packed[0].weight.dequantize())


def test_load_state_dict_assigns_packed_in_place_of_plain() -> None:
    model, packed = dense_model(), packed_model(seed=5)
    model.load_state_dict(packed.state_dict(), assign=True)
    assert_equal_parts(model[0].weight, packed[0].weight)
    assert not model[0].weight.requires_grad
    assert torch.equal(model(randn(3, 64)), packed(randn(3, 64)))


@pytest.mark.parametrize(
    "format", [{"bits": 8}, {"group_size": 64}, {"permuted": True}]
)
def test_load_state_dict_refuses_another_format(format: dict[str, Any]) -> None:
    model, other = packed_model(), packed_model(**format)
    before = copy.deepcopy(model[0].weight)
    with pytest.raises(RuntimeError, match=r"0\.weight.*bits=.*must agree"):
        model.load_state_dict(other.state_dict())
    assert_equal_parts(model[0].weight, before)
    model.load_state_dict(other.state_dict(), assign=True)  # the way out that it names
    assert_equal_parts(model[0].weight, other[0].weight)


def test_a_module_goes_to_meta_and_is_filled_again() -> None:
    model, other = packed_model(), packed_model()
    model.to("meta")
    assert model[0].weight.device.type == "meta"
    assert model(torch.empty(3, 64, device="meta")).shape == (3, 2)
    model.to_empty(device="cpu")
    assert isinstance(model[0].weight, AffineQuantizedTensor)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(randn(3, 64)), other(randn(3, 64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_takes_another_dtype_and_keeps_its_packed_data(
    dtype: torch.dtype,
) -> None:
    model = packed_model()
    before = model[0].weight.detach()
    x, want = randn(3, 64), model.double()(randn(3, 64).double())
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert model[0].weight.scales.dtype == torch.float32
    assert share_memory(model[0].weight, before)
    unit = torch.finfo(dtype).eps
    got = model(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=8 * unit, atol=8 * unit)


def test_functional_call_takes_other_packed_weights() -> None:
    model, other = dense_model(), packed_model(seed=5)
    got = torch.func.functional_call(model, other.state_dict(), (randn(3, 64),))
    assert torch.equal(got, other(randn(3, 64)))


# ---- .data, data_ptr, requires_grad ----------------------------------------------


def test_data_takes_another_packed_weight() -> None:
    model = packed_model()
    parameter, other = model[0].weight, make(6, 64, bits=8, permuted=True, seed=3)
    parameter.data = other
    assert model[0].weight is parameter
    assert_equal_parts(parameter, other)
    assert share_memory(parameter, other)
    want = randn(3, 64) @ other.dequantize().t() + model[0].bias
    torch.testing.assert_close(model[0](randn(3, 64)), want)
    parameter.data = make(4, 32).half()  # another shape, no permutation
    assert_equal_parts(parameter, make(4, 32).half())
    assert (parameter.shape, parameter.dtype) == ((4, 32), torch.float16)


@pytest.mark.parametrize("value", [torch.zeros(6, 64), torch.empty(0)])
def test_data_refuses_a_dense_tensor(value: Tensor) -> None:
    weight = make(6, 64)
    with pytest.raises(RuntimeError, match="cannot assign") as error:
        weight.data = value
    assert_equal_parts(weight, make(6, 64))
    assert weight.shape == (6, 64)
    assert torch.equal(F.linear(torch.eye(64), weight).t(), weight.dequantize())
    if value.numel():
        assert_expected_inline(
            wrapped(str(error.value)),
            """\
cannot assign a float32 tensor of shape [6, 64] to the .data of
  AffineQuantizedTensor(shape=[6, 64], dtype=float32, bits=4, group_size=32,
  device='cpu'): their storage differs in kind. Replace the parameter
  itself, or use copy_(), which quantizes; dequantize_(module) makes a
  module dense again, to resize its embedding for example, or to start
  adapters from its weight; merge_to_dense(model) merges adapters""",
        )


def test_data_ptr_tells_weights_apart() -> None:
    one, other = make(6, 64), make(6, 64)
    assert one.data_ptr() != 0
    assert one.data_ptr() != other.data_ptr()
    assert one.data_ptr() == one.detach().data_ptr() == nn.Parameter(one).data_ptr()
    assert one[1:].data_ptr() != one.data_ptr()


def test_one_packed_weight_refuses_to_require_grad() -> None:
    weight = nn.Parameter(make(6, 64))
    messages = []
    with pytest.raises(RuntimeError) as error:
        weight.requires_grad_(True)
    messages.append(str(error.value))
    with pytest.raises(RuntimeError) as error:
        weight.requires_grad = True
    messages.append(str(error.value))
    assert not weight.requires_grad
    assert_expected_inline(
        wrapped("\n".join(messages)),
        """\
requires_grad_(True) on AffineQuantizedTensor(shape=[6, 64], dtype=float32,
  bits=4, group_size=32, device='cpu'): A packed weight cannot be trained or
  changed in place. Train adapters beside it, which merge_to_dense(model)
  merges, or make it dense with dequantize_(model)
requires_grad = True on AffineQuantizedTensor(shape=[6, 64], dtype=float32,
  bits=4, group_size=32, device='cpu'): A packed weight cannot be trained or
  changed in place. Train adapters beside it, which merge_to_dense(model)
  merges, or make it dense with dequantize_(model)""",
    )
    assert weight.requires_grad_(False) is weight
    weight.requires_grad = False


def test_a_model_freezes_and_unfreezes_what_is_dense(
    caplog: pytest.LogCaptureFixture, fallbacks: list[str]
) -> None:
    model = packed_model()
    weight, *dense = model.parameters()
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for _ in range(2):
        model.requires_grad_(True)
        assert all(parameter.requires_grad for parameter in dense)
        assert not weight.requires_grad
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert_expected_inline(
        wrapped(record.getMessage()),
        """\
Packed weights stay frozen: A packed weight cannot be trained or changed in
  place. Train adapters beside it, which merge_to_dense(model) merges, or
  make it dense with dequantize_(model)""",
    )


# ---- the way of F.linear ---------------------------------------------------------


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The aten operators that reach the tensor."""
    seen: list[str] = []
    dispatch = AffineQuantizedTensor.__torch_dispatch__

    def record(
        cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        seen.append(func.overloadpacket.__name__)
        return dispatch(func, types, args, kwargs)

    monkeypatch.setattr(
        AffineQuantizedTensor, "__torch_dispatch__", classmethod(record)
    )
    return seen


LINEARS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "positional": lambda x, w, b: F.linear(x, w),
    "positional, bias": lambda x, w, b: F.linear(x, w, b),
    "bias by keyword": lambda x, w, b: F.linear(x, w, bias=b),
    "weight by keyword": lambda x, w, b: F.linear(x, bias=b, weight=w),
    "all by keyword": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "bias None": lambda x, w, b: F.linear(x, w, None),
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad]
)
def test_linear_goes_straight_to_the_operator_without_gradients(
    name: str, mode: Any, dispatched: list[str]
) -> None:
    weight, x, bias = nn.Parameter(make(6, 64)), randn(3, 64), randn(6)
    dispatched.clear()  # of what making a parameter takes
    with mode():
        got = LINEARS[name](x, weight, bias)
        want = LINEARS[name](x, weight.dequantize(), bias)
    torch.testing.assert_close(got, want)
    assert dispatched == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_linear_goes_straight_to_the_operator_whatever_requires_grad(
    mode: Any, dispatched: list[str]
) -> None:
    with mode():
        F.linear(randn(3, 64).requires_grad_(), make(6, 64), nn.Parameter(randn(6)))
    assert dispatched == []


def test_linear_goes_straight_to_the_operator_under_autocast(
    dispatched: list[str],
) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(randn(3, 64), make(6, 64)).dtype == torch.bfloat16
    assert dispatched == []


def dual(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = F.linear(forward_ad.make_dual(x, x), weight, bias)
        tangent = forward_ad.unpack_dual(y).tangent
        assert tangent is not None
        return tangent


AROUND: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "x requires grad": lambda x, w, b: F.linear(x.requires_grad_(), w, b),
    "the bias requires grad": lambda x, w, b: F.linear(x, w, b.requires_grad_()),
    "vmap": lambda x, w, b: torch.vmap(F.linear, (0, None, None))(x, w, b),
    "grad": lambda x, w, b: torch.func.grad(lambda x: F.linear(x, w, b).sum())(x),
    "jvp": lambda x, w, b: torch.func.jvp(lambda x: F.linear(x, w, b), (x,), (x,)),
    "jvp under no_grad": lambda x, w, b: torch.no_grad()(
        lambda: torch.func.jvp(lambda x: F.linear(x, w, b), (x,), (x,))
    )(),
    "forward AD": dual,
    "a transposed weight": lambda x, w, b: F.linear(x[:, :6], w.t()),
    "compile": lambda x, w, b: torch.compile(F.linear, backend="eager")(x, w, b),
}


@pytest.mark.parametrize("name", AROUND)
def test_linear_goes_through_aten_where_something_above_has_a_say(
    name: str, dispatched: list[str]
) -> None:
    torch.compiler.reset()
    AROUND[name](randn(3, 64), make(6, 64), randn(6))
    assert dispatched


def test_linear_of_other_inputs_goes_through_aten(dispatched: list[str]) -> None:
    weight = make(6, 64)
    F.linear(nn.Parameter(randn(3, 64), requires_grad=False), weight)
    assert dispatched


# ---- the protocol of traceable subclasses ----------------------------------------


def test_flattening_loses_nothing(weight: AffineQuantizedTensor) -> None:
    names, meta = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    assert len(parts) == len(weight._parts())
    new = AffineQuantizedTensor.__tensor_unflatten__(parts, meta)
    assert_equal_parts(new, weight)
    assert share_memory(new, weight)
    assert (new.shape, new.stride()) == (weight.shape, weight.stride())
    assert hash(meta) == hash(new.__tensor_flatten__()[1])


def test_the_key_for_caches_tells_formats_apart_and_not_values() -> None:
    keys = [
        weight._stable_hash_for_caching()
        for weight in (
            make(6, 64),
            make(6, 64, bits=8),
            make(6, 64, group_size=64),
            make(6, 64, permuted=True),
            make(6, 64).half(),
            make(6, 64, dtype=torch.float16).float(),
            make(7, 64),
            make(6, 64).t(),
            make(6, 128)[:, :64],
        )
    ]
    assert len(set(keys)) == len(keys)
    assert make(6, 64, seed=3)._stable_hash_for_caching() == keys[0]


def test_log_once_logs_each_key_once(
    caplog: pytest.LogCaptureFixture, fallbacks: list[str]
) -> None:
    for key in ("one", "one", "two"):
        affine_tensor.tensor.log_once(key, "said %s", key)
    assert [r.getMessage() for r in caplog.records] == ["said one", "said two"]
