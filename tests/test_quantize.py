"""Whole models: what is quantized, what is left, and that the modules do not notice.

The oracle for outputs is the same model with the dequantized weights, dense.
"""

from __future__ import annotations

import copy
import logging
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
import tqdm.std
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    dequantize_,
    footprint,
    layout,
    quantize_,
)

FOUR = AffineConfig(4, 32)
EIGHT = AffineConfig(8, 64)

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed(*parameters: Tensor) -> bool:
    return all(isinstance(p, AffineQuantizedTensor) for p in parameters)


def dense(*parameters: Tensor) -> bool:
    return all(type(p) is nn.Parameter for p in parameters)


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy whose packed parameters are dense, ties kept. Not by `dequantize_`."""
    twin = copy.deepcopy(model)
    made: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if isinstance(old, AffineQuantizedTensor):
                new = nn.Parameter(old.dequantize(), requires_grad=False)
                setattr(module, name, made.setdefault(id(old), new))
    return twin


def assert_same(ours: Any, expected: Any) -> None:
    """Equal bit for bit."""
    pairs = list(zip(tree_leaves(ours), tree_leaves(expected), strict=True))
    assert any(isinstance(a, Tensor) for a, _ in pairs)
    for a, b in pairs:
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


class Unchanged:
    """A model must leave the block as it entered: the same objects, the same values."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.objects = parameters(self.model)
        self.values = {n: [p.clone() for p in held(o)] for n, o in self.objects.items()}
        self.modules = dict(self.model.named_modules())

    def __exit__(self, *_: object) -> None:
        assert dict(self.model.named_modules()) == self.modules
        after = parameters(self.model)
        assert after.keys() == self.objects.keys()
        for name, parameter in after.items():
            assert parameter is self.objects[name]
            assert_same(held(parameter), self.values[name])


def held(parameter: Tensor) -> list[Tensor]:
    """What a parameter keeps in memory."""
    if isinstance(parameter, AffineQuantizedTensor):
        return parameter._parts()
    return [parameter.detach()]


class Tied(nn.Module):
    """An embedding and a head that share their weight, and one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(ids)))


# ---- what quantize_ makes -------------------------------------------------------


@pytest.mark.parametrize("dtype", layout.LOGICAL_DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_modules_stay_and_parameters_change(bits: int, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(40, 128), nn.Linear(128, 64), nn.LayerNorm(64))
    model = model.to(dtype).eval()
    before = {name: (m, type(m)) for name, m in model.named_modules()}
    weights = [layer.weight.detach().clone() for layer in model[:2]]
    model[1].register_forward_hook(lambda module, args, output: output * 2)

    report = quantize_(model, AffineConfig(bits, 32))

    assert report.quantized == ["0", "1"]
    assert report.skipped == {}
    after = {name: (m, type(m)) for name, m in model.named_modules()}
    assert after == before
    assert not model.training
    for layer, weight in zip(model[:2], weights, strict=True):
        new = layer.weight
        assert packed(new)
        assert isinstance(new, nn.Parameter)
        assert not new.requires_grad
        assert (new.dtype, new.device, new.shape) == (
            dtype,
            weight.device,
            weight.shape,
        )
        assert (new.bits, new.group_size) == (bits, 32)
        source = weight.float() if dtype == torch.float64 else weight
        parts = layout.quantize(source, bits=bits, group_size=32)
        assert_same([new.packed, new.scales, new.biases], list(parts))
    assert dense(model[1].bias, model[2].weight)
    assert model[1].bias.requires_grad
    assert list(model.state_dict()) == ["0.weight", "1.weight", "1.bias", *_norm("2")]
    ids = torch.randint(0, 40, (2, 5))
    assert_same(model(ids), dense_twin(model)(ids))


def _norm(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def test_defaults() -> None:
    model = nn.Linear(64, 8)
    assert quantize_(model).quantized == [""]
    assert (model.weight.bits, model.weight.group_size) == (4, 64)


def test_the_model_may_be_one_module() -> None:
    model = nn.Linear(64, 8)
    assert quantize_(model, FOUR).quantized == [""]
    x = torch.randn(3, 64)
    assert_same(model(x), dense_twin(model)(x))
    dequantize_(model)
    assert dense(model.weight)
    assert quantize_(nn.Linear(60, 8), FOUR).skipped.keys() == {""}


def test_meta() -> None:
    model = nn.Linear(64, 8, device="meta")
    quantize_(model, FOUR)
    assert packed(model.weight)
    assert model.weight.is_meta
    assert model.weight.shape == (8, 64)


# ---- filters and recipes --------------------------------------------------------


def test_filter_by_bool() -> None:
    model = Tied()
    asked: list[tuple[type, str]] = []

    def only_layer(module: nn.Module, name: str) -> bool:
        asked.append((type(module), name))
        return name == "layer"

    report = quantize_(model, FOUR, only_layer)
    assert asked == [(nn.Embedding, "embed"), (nn.Linear, "layer"), (nn.Linear, "head")]
    assert report.quantized == ["layer"]
    assert report.skipped.keys() == {"embed", "head"}
    assert packed(model.layer.weight)
    assert dense(model.embed.weight)


def test_mixed_recipe() -> None:
    model = nn.ModuleDict({name: nn.Linear(128, 8) for name in ("a", "b", "c", "d")})
    recipe = {"a": True, "b": False, "c": EIGHT, "d": AffineConfig(2, 128)}
    quantize_(model, FOUR, lambda module, name: recipe[name])
    assert dense(model["b"].weight)
    formats = [(model[k].weight.bits, model[k].weight.group_size) for k in "acd"]
    assert formats == [(4, 32), (8, 64), (2, 128)]
    x = torch.randn(3, 128)
    twin = dense_twin(model)
    assert_same([m(x) for m in model.values()], [m(x) for m in twin.values()])


@pytest.mark.parametrize("answer", [1, None, "yes", {"bits": 4}, torch.tensor(True)])
def test_filter_returns_something_else(answer: Any) -> None:
    model = Tied()
    with Unchanged(model), pytest.raises(TypeError, match=r"filter_fn returned .* for"):
        quantize_(model, FOUR, lambda m, n: answer if n == "head" else True)
    assert dense(model.layer.weight)


@pytest.mark.parametrize("config", [4, {"bits": 4}, "4", (4, 64)])
def test_config_of_another_type(config: Any) -> None:
    model = Tied()
    with Unchanged(model), pytest.raises(TypeError, match="an AffineConfig is needed"):
        quantize_(model, config)


def test_a_filter_that_raises_changes_nothing() -> None:
    model = Tied()
    with Unchanged(model), pytest.raises(KeyError):
        quantize_(model, FOUR, lambda m, n: {"embed": True}[n])


# ---- ties -----------------------------------------------------------------------


def test_ties_survive() -> None:
    model = Tied()
    report = quantize_(model, FOUR)
    assert report.quantized == ["embed", "head", "layer"]
    assert packed(model.embed.weight)
    assert model.head.weight is model.embed.weight
    ids = torch.randint(0, 96, (2, 5))
    assert_same(model(ids), dense_twin(model)(ids))
    dequantize_(model)
    assert dense(model.embed.weight)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(("left", "other"), [("embed", "head"), ("head", "embed")])
def test_a_filtered_tie_stays_dense_everywhere(left: str, other: str) -> None:
    model = Tied()
    report = quantize_(model, FOUR, lambda module, name: name != left)
    assert dense(model.embed.weight)
    assert model.head.weight is model.embed.weight
    assert report.quantized == ["layer"]
    assert report.skipped == {
        left: "left out by filter_fn",
        other: "tied to a module left out",
    }


def test_ties_to_parameters_of_other_modules() -> None:
    class Scorer(nn.Module):
        def __init__(self, table: nn.Parameter) -> None:
            super().__init__()
            self.table = table

    model = Tied()
    model.scorer = Scorer(model.embed.weight)
    quantize_(model, FOUR)
    assert packed(model.scorer.table)
    assert model.scorer.table is model.embed.weight
    dequantize_(model)
    assert model.scorer.table is model.embed.weight is model.head.weight


def test_a_tie_under_one_configuration_of_its_own() -> None:
    model = Tied()
    quantize_(model, FOUR, lambda m, n: True if n == "layer" else AffineConfig(8, 64))
    assert (model.head.weight.bits, model.layer.weight.bits) == (8, 4)
    # The same configuration, once as the default.
    model = Tied()
    quantize_(model, FOUR, lambda m, n: True if n == "head" else AffineConfig(4, 32))
    assert model.head.weight is model.embed.weight


def test_one_module_under_two_names() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleList([nn.ModuleList([shared, nn.Linear(64, 64)]), shared])
    names: list[str] = []
    report = quantize_(model, FOUR, lambda m, name: names.append(name) or True)
    assert names == report.quantized == ["0.0", "0.1"]
    assert model[0][0] is model[1] is shared
    assert packed(shared.weight, model[0][1].weight)
    assert len(footprint(model).rows) == 4
    dequantize_(model)
    assert model[1] is shared
    assert dense(shared.weight)


def test_a_block_twice_in_a_list() -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = nn.Sequential(*[block, block])
    quantize_(model, FOUR)
    x = torch.randn(2, 64)
    assert_same(model(x), dense_twin(model)(x))
    assert footprint(model).bytes == footprint(block).bytes


# ---- left alone, and listed -----------------------------------------------------


def _lazy() -> nn.Module:
    return nn.LazyLinear(64)


def _integers() -> nn.Module:
    linear = nn.Linear(64, 64)
    integers = torch.ones(64, 64, dtype=torch.int8)
    linear.weight = nn.Parameter(integers, requires_grad=False)
    return linear


def _quantized() -> nn.Module:
    linear = nn.Linear(64, 64)
    quantize_(linear, AffineConfig(3, 32))
    return linear


def _parametrized() -> nn.Module:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).T

    linear = nn.Linear(64, 64)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(nn.Linear(64, 64))


def _foreign() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(64, 64)
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
    return linear


LEFT = {
    "columns": (lambda: nn.Linear(60, 8), "60 columns are not a multiple of the group"),
    "no columns": (lambda: nn.Linear(0, 8), "its rows are empty"),
    "quantized": (_quantized, "it is quantized already"),
    "max_norm": (lambda: nn.Embedding(9, 64, max_norm=1.0), "max_norm"),
    "parametrized": (_parametrized, "computed, not a parameter"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(64, 64)),
        "computed, not a parameter",
    ),
    "weight_norm, old": (_old_weight_norm, "computed, not a parameter"),
    "lazy": (_lazy, "its shape is not known yet"),
    "integers": (_integers, "its dtype is torch.int8"),
    "complex": (
        lambda: nn.Linear(64, 8, dtype=torch.complex64),
        "its dtype is torch.complex64",
    ),
    "foreign": (_foreign, "it is a Int8Tensor, not a plain tensor"),
}


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_left_alone_and_listed(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = LEFT[case]
    odd = make()
    model = nn.Sequential(odd, nn.Linear(64, 64))
    before, kind = parameters(odd), type(odd)
    with caplog.at_level(logging.WARNING, logger="affine_tensor"):
        report = quantize_(model, FOUR)
    assert report.quantized == ["1"]
    assert report.skipped.keys() == {"0"}
    assert reason in report.skipped["0"]
    logged = [r for r in caplog.records if r.name == "affine_tensor"]
    (message,) = [record.getMessage() for record in logged]
    assert message == f"1 module left as found: 0 ({report.skipped['0']})"
    assert type(odd) is kind
    after = parameters(odd)
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert packed(model[1].weight)


def test_max_norm_and_shape_hold_for_all_who_share() -> None:
    model = Tied()
    model.embed.max_norm = 1.0
    report = quantize_(model, FOUR)
    assert report.quantized == ["layer"]
    assert report.skipped.keys() == {"embed", "head"}
    assert dense(model.embed.weight)


def test_what_the_filter_left_out_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="affine_tensor"):
        quantize_(Tied(), FOUR, lambda m, n: n == "layer")
        # What does not fit, and was not wanted.
        model = nn.Sequential(nn.Linear(60, 8), _lazy(), _parametrized())
        report = quantize_(model, FOUR, lambda m, n: False)
    assert set(report.skipped.values()) == {"left out by filter_fn"}
    assert report.skipped.keys() == {"0", "1", "2"}
    assert not [r for r in caplog.records if r.name == "affine_tensor"]


def test_a_lazy_module_works_on() -> None:
    model = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64))
    quantize_(model, FOUR)
    assert model(torch.randn(2, 32)).shape == (2, 64)
    assert quantize_(model, FOUR).quantized == ["0"]
    assert packed(model[0].weight, model[1].weight)


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")]
)
def test_a_failure_leaves_the_model_as_it_was(value: float, word: str) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
    with torch.no_grad():
        model[1].weight[3, 5] = value
    where = rf"^1\.weight: the weight at \[3, 5\] is {word}"
    with Unchanged(model), pytest.raises(ValueError, match=where):
        quantize_(model, FOUR)
    assert dense(*model.parameters())
    report = quantize_(model, FOUR, lambda m, n: n != "1")  # what the message proposes
    assert report.quantized == ["0", "2"]


# ---- modules that read their weight themselves ----------------------------------


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_attention(
    training: bool, batch_first: bool, need_weights: bool, grad: bool
) -> None:
    model = nn.MultiheadAttention(64, 4, batch_first=batch_first).train(training)
    assert quantize_(model, FOUR).quantized == ["out_proj"]
    twin, x = dense_twin(model), torch.randn(2, 5, 64)
    with torch.set_grad_enabled(grad), no_native_attention():
        ours, expected = (m(x, x, x, need_weights=need_weights) for m in (model, twin))
    assert_same(ours, expected)
    with torch.set_grad_enabled(grad):  # the native kernel sums in another order
        assert_close(model(x, x, x)[0], twin(x, x, x)[0])


class no_native_attention:
    """torch's fused kernels take plain weights only, so the dense twin alone."""

    def __enter__(self) -> None:
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode]
)
def test_transformer_layers(training: bool, mode: Callable[[], Any]) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0, batch_first=True)
    decoder = nn.TransformerDecoderLayer(64, 4, 128, dropout=0, batch_first=True)
    model = nn.ModuleList([layer, decoder]).train(training)
    assert len(quantize_(model, FOUR).quantized) == 3 + 4
    twin, x = dense_twin(model), torch.randn(2, 5, 64)
    with mode(), no_native_attention():
        assert_same(model[0](x), twin[0](x))
        assert_same(model[1](x, x), twin[1](x, x))
    with mode():
        assert_close(model[0](x), twin[0](x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.usefixtures("no_fallback")
def test_transformer_encoder_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    quantize_(model, FOUR)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        ours = model(x, src_key_padding_mask=padding)
        expected = dense_twin(model)(x, src_key_padding_mask=padding)
    # The dense twin takes a nested tensor and leaves zeros where there is padding.
    assert_close(ours[~padding], expected[~padding])


class Reads(nn.Module):
    """A module that uses the weights of its parts in its own way."""

    def __init__(self, use: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.lin, self.emb, self.use = nn.Linear(64, 64), nn.Embedding(40, 64), use

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        return self.use(self, x, ids)


READS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "linear": lambda m, x, ids: F.linear(x, m.lin.weight),
    "linear with bias": lambda m, x, ids: F.linear(x, m.lin.weight, bias=m.lin.bias),
    "x @ W.T": lambda m, x, ids: x @ m.lin.weight.T,
    "x @ W.mT": lambda m, x, ids: x @ m.lin.weight.mT,
    "x @ W": lambda m, x, ids: x @ m.lin.weight,
    "matmul with t()": lambda m, x, ids: torch.matmul(x, m.lin.weight.t()),
    "addmm": lambda m, x, ids: torch.addmm(m.lin.bias, x[0], m.lin.weight.T),
    "data": lambda m, x, ids: F.linear(x, m.lin.weight.data),
    "embedding": lambda m, x, ids: F.embedding(ids, m.emb.weight),
    "W[ids]": lambda m, x, ids: m.emb.weight[ids],
    "W[row]": lambda m, x, ids: m.emb.weight[ids[0, 0]],
    "rows": lambda m, x, ids: F.linear(x, m.emb.weight[3:17]),
    "scores": lambda m, x, ids: x @ m.emb.weight.T,
    "blocks": lambda m, x, ids: [F.linear(x, w) for w in m.lin.weight.chunk(4)],
}


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_modules_that_read_their_weight(how: str, dtype: torch.dtype) -> None:
    model = Reads(READS[how]).to(dtype)
    quantize_(model, FOUR)
    x, ids = torch.randn(2, 5, 64).to(dtype), torch.randint(0, 40, (2, 5))
    ours, expected = model(x, ids), dense_twin(model)(x, ids)
    if packed(*tree_leaves(ours)):
        ours = ours.dequantize()
    assert_same(ours, expected)


def test_other_uses_dequantize_and_are_right(fallbacks: list[str]) -> None:
    def use(m: Any, x: Tensor, ids: Tensor) -> Any:
        normal = F.normalize(m.emb.weight, dim=-1)
        products = torch.einsum("bk,ok->bo", x, m.lin.weight)
        return m.lin.weight.sum(), m.emb.weight * 2, normal, products

    model = Reads(use)
    quantize_(model, FOUR)
    x = torch.randn(3, 64)
    assert_same(model(x, x), dense_twin(model)(x, x))
    assert fallbacks


# ---- models of transformers -----------------------------------------------------


def llama(*, tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=96,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS = {"llama": llama, "llama, tied": lambda: llama(tied=True), "gpt2": gpt2}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    model = MODELS[request.param]()
    report = quantize_(model, FOUR)
    assert len(report.quantized) == (3 if request.param == "gpt2" else 16)
    tied = request.param != "llama"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    return model


@pytest.mark.usefixtures("no_fallback")
def test_logits_and_generate(model: Any) -> None:
    twin, ids = dense_twin(model), torch.randint(0, 96, (2, 7))
    assert_same(model(ids).logits, twin(ids).logits)
    kind = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours, expected = (m.generate(ids, **kind) for m in (model, twin))
    assert ours.shape == (2, 15)
    assert_same(ours, expected)


@pytest.mark.parametrize("size", [90, 100, 128])
@pytest.mark.parametrize("mean", [True, False])
def test_resizing_is_refused(model: Any, size: int, mean: bool) -> None:
    ids = torch.randint(0, 90, (2, 7))
    before = model(ids).logits
    with Unchanged(model), pytest.raises(RuntimeError, match="dequantize_") as error:
        model.resize_token_embeddings(size, mean_resizing=mean)
    assert "[96, 64]" in str(error.value)
    assert model.config.vocab_size == 96
    assert model.get_input_embeddings().num_embeddings == 96
    assert_same(model(ids).logits, before)

    # As the message proposes: the part, or the model.
    dequantize_(model.get_input_embeddings())
    model.resize_token_embeddings(size, mean_resizing=mean)
    assert model(ids).logits.shape == (2, 7, size)
    assert_same(model(ids).logits[..., :90], before[..., :90])
    quantize_(model, FOUR)
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == (
        model.config.tie_word_embeddings
    )
    assert packed(head.weight)


@pytest.mark.parametrize("size", [90, 100])
def test_resizing_where_the_embedding_is_dense(size: int) -> None:
    model = llama()
    quantize_(model, FOUR, lambda m, name: "embed" not in name)
    ids = torch.randint(0, 90, (2, 7))
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape
    assert model(ids).logits.shape == (2, 7, size)
    assert_same(model(ids).logits[..., :90], before[..., :90])


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")
@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model: Any, reentrant: bool) -> None:
    """Gradients of what stayed dense, through packed layers computed twice."""
    twin, ids = dense_twin(model), torch.randint(0, 96, (2, 7))
    kind = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    assert model.is_gradient_checkpointing
    assert not twin.is_gradient_checkpointing
    for one in (model, twin):
        one.enable_input_require_grads()
        one.config.use_cache = False
        # Dropout would draw anew.
        for module in one.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        one(ids, labels=ids).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = dict(twin.named_parameters())
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-7)


# ---- dequantize_ ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dequantize(model: Any, dtype: torch.dtype | None) -> None:
    values = {
        name: p.dequantize(dtype) if packed(p) else p.detach().clone()
        for name, p in parameters(model).items()
    }
    kept = {id(p) for p in model.parameters() if not packed(p)}
    ties = [
        [id(p) for p in parameters(model).values()].index(id(p))
        for p in parameters(model).values()
    ]
    dequantize_(model, dtype)
    after = parameters(model)
    assert dense(*after.values())
    assert_same(after, values)
    assert {id(p) for p in after.values()} >= kept
    objects = [id(p) for p in after.values()]
    assert [objects.index(i) for i in objects] == ties
    assert not any(p.requires_grad for p in after.values() if id(p) not in kept)


def test_dequantized_models_train(model: Any) -> None:
    dequantize_(model)
    model.requires_grad_(True)
    ids = torch.randint(0, 96, (4, 16))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    losses = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_dequantize_refuses_other_dtypes() -> None:
    model = Tied()
    quantize_(model, FOUR)
    with (
        Unchanged(model),
        pytest.raises(TypeError, match=r"dtype is torch\.int8; allowed"),
    ):
        dequantize_(model, torch.int8)


def test_dequantize_leaves_dense_models_alone() -> None:
    model = Tied()
    with Unchanged(model):
        dequantize_(model)


# ---- footprint ------------------------------------------------------------------


def quantized_bytes(rows: int, columns: int, config: AffineConfig, scale: int) -> int:
    words = rows * columns * config.bits // 8
    return words + 2 * rows * (columns // config.group_size) * scale


def small_model() -> nn.Module:
    model = Tied()
    model.blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32)) for _ in "abc"
    )
    model.register_buffer("mask", torch.zeros(5, 5, dtype=torch.bool))
    model.scale = nn.Parameter(torch.tensor(1.0))
    quantize_(model, FOUR, lambda m, n: EIGHT if n == "blocks.1.0" else n != "layer")
    return model


def test_footprint_by_hand() -> None:
    model = small_model()
    print_ = footprint(model)
    blocks = 2 * quantized_bytes(32, 64, FOUR, 4) + quantized_bytes(32, 64, EIGHT, 4)
    embedding = quantized_bytes(96, 64, FOUR, 4)
    norms = 3 * (4 * 32 * 4 + 8)  # weight, bias, mean, variance; a count of int64
    layer = 4 * (64 * 64 + 64)
    assert print_.bytes == blocks + embedding + norms + layer + 25 + 4
    counted = sum(p.numel() for p in dense_twin(model).parameters())
    assert print_.parameters == counted
    assert print_.bits_per_weight == 8 * print_.bytes / counted
    assert {row.name: row.tied for row in print_.rows if row.tied} == {
        "embed.weight": ("head.weight",)
    }
    rows = {row.name: row for row in print_.rows}
    assert len(rows) == len(print_.rows)
    first = rows["blocks.0.0.weight"]
    assert (first.bits, first.group_size, first.shape) == (4, 32, (32, 64))
    assert first.bits_per_weight == 4 + 2 * 32 / 32
    assert (rows["mask"].bytes, rows["mask"].kind) == (25, "buffer")


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(1, 16), (3, 64), (8, 256)])
def test_footprint_in_all_formats(bits: int, group: int, dtype: torch.dtype) -> None:
    model, config = nn.Linear(512, 8, dtype=dtype), AffineConfig(bits, group)
    quantize_(model, config)
    expected = quantized_bytes(8, 512, config, dtype.itemsize) + 8 * dtype.itemsize
    assert footprint(model).bytes == expected
    storages = [part.untyped_storage() for part in held(model.weight)]
    assert sum(s.nbytes() for s in storages) + model.bias.nbytes == expected
    model.double()  # counts as float64, and holds the same
    assert footprint(model).rows[0].bytes == expected - 8 * dtype.itemsize


def test_footprint_of_dense_and_empty_models() -> None:
    model = nn.Linear(64, 8)
    assert footprint(model).bytes == 4 * (64 * 8 + 8)
    assert footprint(model).bits_per_weight == 32
    assert footprint(nn.ReLU()).bits_per_weight == footprint(nn.ReLU()).bytes == 0
    assert "0" in str(footprint(nn.Sequential(nn.LazyLinear(3))))


# ---- texts ----------------------------------------------------------------------


class TestTexts(expecttest.TestCase):
    def expect_error(self, function: Callable[[], Any], text: str) -> None:
        with pytest.raises((ValueError, TypeError)) as caught:
            function()
        message = f"{caught.type.__name__}: {caught.value}"
        self.assertExpectedInline(textwrap.fill(message, 72), text, skip=1)

    def test_footprint(self) -> None:
        self.assertExpectedInline(
            str(footprint(small_model())),
            """\
module                          count   shape  bits  group   bytes  bits/weight
scale                               1       1    32      -       4        32.00
embed.weight = head.weight          1   96x64     4     32   4,608         6.00
layer.weight                        1   64x64    32      -  16,384        32.00
layer.bias                          1      64    32      -     256        32.00
blocks.*.*.weight                   2   32x64     4     32   3,072         6.00
blocks.*.*.weight                   3      32    32      -     384        32.00
blocks.*.*.bias                     3      32    32      -     384        32.00
blocks.1.0.weight                   1   32x64     8     64   2,304         9.00
mask                                1     5x5     8      -      25         8.00
blocks.*.*.running_mean             3      32    32      -     384        32.00
blocks.*.*.running_var              3      32    32      -     384        32.00
blocks.*.*.num_batches_tracked      3       1    64      -      24        64.00
total                              23  16,641               28,213        13.56""",
        )
        self.assertExpectedInline(
            str(footprint(nn.ReLU())),
            """\
module  count  shape  bits  group  bytes  bits/weight
total       0      0                   0         0.00""",
        )

    def test_footprint_of_a_lazy_model(self) -> None:
        model = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64))
        quantize_(model, FOUR)
        self.assertExpectedInline(
            str(footprint(model)),
            """\
module    count  shape  bits  group  bytes  bits/weight
0.weight      1      0    32      -      0         0.00
0.bias        1      0    32      -      0         0.00
1.weight      1  64x64     4     32  3,072         6.00
1.bias        1     64    32      -    256        32.00
total         4  4,160               3,328         6.40""",
        )

    def test_report(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(60, 64), Tied(), _lazy())
        report = quantize_(model, FOUR, lambda m, n: n != "2.head")
        self.assertExpectedInline(
            str(report),
            """\
2 modules quantized, 4 left alone:
  1: 60 columns are not a multiple of the group size 32
  2.embed: tied to a module left out
  2.head: left out by filter_fn
  3: its shape is not known yet""",
        )
        self.assertExpectedInline(
            str(quantize_(nn.Linear(60, 8))),
            """\
0 modules quantized, 1 left alone:
  (the model itself): 60 columns are not a multiple of the group size 64""",
        )
        self.assertExpectedInline(
            str(quantize_(Tied(), FOUR)), """3 modules quantized"""
        )
        self.assertExpectedInline(
            str(quantize_(nn.Linear(64, 8))), """1 module quantized"""
        )

    def test_config(self) -> None:
        self.expect_error(
            lambda: AffineConfig(bits=7),
            """\
ValueError: bits is 7; allowed are 1, 2, 3, 4, 5, 6, 8. Choose one of
these integers""",
        )
        self.expect_error(
            lambda: AffineConfig(group_size=48),
            """\
ValueError: group_size is 48; allowed are 16, 32, 64, 128, 256. Choose
one of these integers""",
        )
        self.expect_error(
            lambda: AffineConfig("4"),
            """\
ValueError: bits is '4'; allowed are 1, 2, 3, 4, 5, 6, 8. Choose one of
these integers""",
        )
        self.assertExpectedInline(
            str(AffineConfig()), """AffineConfig(bits=4, group_size=64)"""
        )
        assert len({AffineConfig(), AffineConfig(4, 64), AffineConfig(4, 32)}) == 2

    def test_errors(self) -> None:
        model = Tied()
        one = lambda m, n: EIGHT if n == "head" else True  # noqa: E731
        self.expect_error(
            lambda: quantize_(model, FOUR, one),
            """\
ValueError: filter_fn gave different configurations to modules that
share one weight: embed AffineConfig(bits=4, group_size=32), head
AffineConfig(bits=8, group_size=64). Return the same for all of them, or
untie them first""",
        )
        assert dense(*model.parameters())
        self.expect_error(
            lambda: quantize_(model, 4),
            """\
TypeError: config is 4; an AffineConfig is needed, such as
AffineConfig(bits=4, group_size=64)""",
        )
        self.expect_error(
            lambda: quantize_(model, FOUR, lambda m, n: 4),
            """\
TypeError: filter_fn returned 4 for embed; a bool or an AffineConfig is
needed""",
        )
        root = nn.Linear(64, 8)
        self.expect_error(
            lambda: quantize_(root, FOUR, lambda m, n: None),
            """\
TypeError: filter_fn returned None for (the model itself); a bool or an
AffineConfig is needed""",
        )
        root.weight.data[2, 3] = float("nan")
        self.expect_error(
            lambda: quantize_(root, FOUR),
            """\
ValueError: weight: the weight at [2, 3] is NaN; only finite weights can
be quantized. Leave this weight dense, or mend the checkpoint (filter_fn
leaves it dense by returning False)""",
        )


# ---- the progress bar -----------------------------------------------------------


class Clock:
    """Three seconds pass whenever someone looks."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 3.0
        return self.now


def test_the_bar_stays_away_from_short_work(capfd: pytest.CaptureFixture[str]) -> None:
    quantize_(nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)]), FOUR)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_on_long_work(
    progress: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tqdm.std, "time", Clock())
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
    quantize_(model, FOUR, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    if progress:
        assert "quantizing" in err
        assert "weight" in err
        assert "/5" in err
    else:
        assert err == ""
