"""torch.compile on modules with packed weights: graphs, results, gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from affine_tensor import AffineQuantizedTensor

pytestmark = [
    pytest.mark.usefixtures("no_fallback", "fresh"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

MODES: dict[str, Any] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def has_compiler() -> bool:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="inductor needs a C++ compiler; there is none"
)


@pytest.fixture
def fresh() -> None:
    torch.compiler.reset()


def packed_linear(rows: int, columns: int, bias: bool = True, **kind: Any) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=bias)
    linear.weight = nn.Parameter(make(rows, columns, **kind))
    return linear


class Block(nn.Module):
    def __init__(self, seed: int = 0, **kind: Any) -> None:
        super().__init__()
        self.up = packed_linear(96, 64, seed=seed, **kind)
        self.down = packed_linear(64, 96, bias=False, seed=seed + 1, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Embedding, blocks, and a head that is tied to the embedding."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 64)
        self.embedding.weight = nn.Parameter(make(48, 64))
        self.blocks = nn.ModuleList(Block(seed=2 * i) for i in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embedding.weight)


IDS = torch.tensor([[1, 2, 47], [0, 5, 5]])


def recording(graphs: list[Counter[str]]) -> Callable[..., Any]:
    """A backend that keeps how often each operator is in each graph, and runs it."""

    def record(module: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = (n for n in module.graph.nodes if n.op == "call_function")
        graphs.append(Counter(str(node.target) for node in calls))
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=record, bw_compiler=record)


def ours(graph: Counter[str]) -> dict[str, int]:
    prefix = "affine_tensor."
    return {k.removeprefix(prefix): n for k, n in graph.items() if k.startswith(prefix)}


def products(graph: Counter[str]) -> set[str]:
    """Dense products, which would mean that a weight was dequantized."""
    dense = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}
    return {name for name in graph if name in dense}


# ---- torch.compile ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        *((backend, mode) for backend in ("eager", "aot_eager") for mode in MODES),
        pytest.param("inductor", "no_grad", marks=needs_compiler),
        pytest.param("inductor", "inference", marks=needs_compiler),
    ],
)
def test_a_model_compiles_as_one_graph(backend: str, mode: str) -> None:
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with MODES[mode]():
        torch.testing.assert_close(compiled(IDS), model(IDS))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)]
)
def test_gradients_of_a_compiled_block_are_those_of_the_block(backend: str) -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x, out = randn(3, 64).requires_grad_(), randn(3, 64, seed=2)
    inputs = [x, block.up.bias]
    got = torch.autograd.grad(compiled(x), inputs, out)
    want = torch.autograd.grad(block(x), inputs, out)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_holds_our_operators_and_no_dense_weight(mode: str) -> None:
    graphs: list[Counter[str]] = []
    model = Model(blocks=3)
    with MODES[mode]():
        torch.compile(model, fullgraph=True, backend=recording(graphs))(IDS)
    (graph,) = graphs
    assert ours(graph) == {"embedding.default": 1, "linear.default": 7}
    assert not products(graph)


def test_the_graph_of_the_gradient_holds_our_operators() -> None:
    graphs: list[Counter[str]] = []
    block = Block()
    x = randn(3, 64).requires_grad_()
    torch.compile(block, fullgraph=True, backend=recording(graphs))(x).sum().backward()
    forward, backward = graphs
    assert ours(forward) == {"linear.default": 2}
    assert ours(backward) == {"matmul.default": 2}
    assert not products(forward + backward)


def test_training_around_experts_compiles() -> None:
    weight = nn.Parameter(make(3, 16, 64))  # [E, out, in]
    offsets = torch.tensor([2, 5, 9]).int()

    def experts(x: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(x, w.mT, offs=offsets).tanh()

    graphs: list[Counter[str]] = []
    compiled = torch.compile(experts, fullgraph=True, backend=recording(graphs))
    x = randn(9, 64).requires_grad_()
    got = torch.autograd.grad(compiled(x, weight).sum(), x)
    want = torch.autograd.grad(experts(x, weight.dequantize()).sum(), x)
    torch.testing.assert_close(got, want)
    forward, backward = graphs
    assert ours(forward) == {"grouped_linear.default": 1}
    assert ours(backward) == {"grouped_matmul.default": 1}


OTHER_CALLS: dict[str, Callable[[Tensor, AffineQuantizedTensor], Tensor]] = {
    "matmul": lambda x, w: x[:, :6] @ w,
    "on the left": lambda x, w: w @ x.t(),
    "addmm": lambda x, w: torch.addmm(torch.ones(6), x, w.t(), beta=0.5),
    "rows": lambda x, w: F.linear(x, w[2:5]),
    "columns": lambda x, w: F.linear(x[:, :32], w[:, 32:]),
    "joined": lambda x, w: F.linear(x, torch.cat([w, w])),
    "chunks": lambda x, w: sum(F.linear(x, part) for part in w.chunk(2)),
    "another dtype": lambda x, w: F.linear(x.bfloat16(), w.to(torch.bfloat16)),
    "dequantize": lambda x, w: w.dequantize() + 1,
    "gather": lambda x, w: w[torch.tensor([1, 5])].dequantize(),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_other_calls_compile(name: str) -> None:
    call, x = OTHER_CALLS[name], randn(3, 64)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    weights = [make(6, 64)]
    if name != "columns":  # dense, where columns are not stored side by side
        weights.append(make(6, 64, permuted=True))
    for weight in weights:
        torch.testing.assert_close(compiled(x, weight), call(x, weight))


def test_a_packed_weight_comes_out_of_a_graph() -> None:
    def convert(w: Tensor) -> Tensor:
        return torch.cat([w[2:], w[:2]]).to(torch.bfloat16)

    weight = make(6, 64)
    got = torch.compile(convert, fullgraph=True, backend="aot_eager")(weight)
    assert isinstance(got, AffineQuantizedTensor)
    assert repr(got) == repr(convert(weight))
    assert torch.equal(got, convert(weight))


def test_quantizing_compiles() -> None:
    def convert(dense: Tensor) -> AffineQuantizedTensor:
        return AffineQuantizedTensor.from_dense(dense, bits=3, group_size=32)

    got = torch.compile(convert, fullgraph=True, backend="aot_eager")(randn(6, 64))
    assert torch.equal(got, convert(randn(6, 64)))


def test_autocast_compiles() -> None:
    block = Block()

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(randn(3, 64))
    torch.testing.assert_close(got, call(randn(3, 64)))


# ---- how often -------------------------------------------------------------------


def test_blocks_compiled_one_by_one_share_a_graph() -> None:
    model, counter = Model(blocks=6), CompileCounter()
    with torch.no_grad():
        want = model(IDS)
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        assert torch.equal(model(IDS), want)
    assert counter.frame_count == 1


def test_another_parameter_of_the_same_format_needs_no_new_graph() -> None:
    block, counter = Block(), CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    x = randn(3, 64)
    before = compiled(x)
    block.up.weight = nn.Parameter(make(96, 64, seed=7))
    after = compiled(x)
    assert torch.equal(after, block(x))
    assert not torch.equal(after, before)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "kind",
    [{"group_size": 64}, {"bits": 8}, {"permuted": True}, {"dtype": torch.float16}],
)
def test_another_format_makes_a_new_graph(kind: dict[str, Any]) -> None:
    block, counter = Block(), CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    x = randn(3, 64)
    compiled(x)
    block.up.weight = nn.Parameter(make(96, 64, **kind).float())
    assert torch.equal(compiled(x), block(x))
    assert counter.frame_count == 2


def test_lengths_of_the_input_make_two_graphs() -> None:
    block, counter = Block(), CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for length in (4, 7, 9, 33):
        assert torch.equal(compiled(randn(length, 64)), block(randn(length, 64)))
    assert counter.frame_count == 2  # static, then dynamic: as with a dense weight


def test_a_weight_that_is_written_to_is_seen() -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = randn(3, 64)
    before = compiled(x)
    block.up.weight.copy_(make(96, 64, seed=5))
    assert torch.equal(compiled(x), block(x))
    assert not torch.equal(compiled(x), before)
    block.up.weight.data = make(96, 64, seed=6)
    assert torch.equal(compiled(x), block(x))


# ---- transformers ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["grad", "inference"])
def test_a_whole_llama_compiles_as_one_graph(mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for module in model.model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            packed = AffineQuantizedTensor.from_dense(module.weight, 4, 32)
            module.weight = nn.Parameter(packed)
    model.tie_weights()
    graphs: list[Counter[str]] = []
    compiled = torch.compile(model, fullgraph=True, backend=recording(graphs))
    with MODES[mode]():
        got = compiled(IDS, use_cache=False).logits
        torch.testing.assert_close(got, model(IDS, use_cache=False).logits)
    (graph,) = graphs
    assert ours(graph) == {"embedding.default": 1, "linear.default": 2 * 7 + 1}
