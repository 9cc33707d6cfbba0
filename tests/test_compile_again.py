"""How often torch.compile compiles: shapes, formats, weights and settings that change.

One graph for each configuration of shapes and formats. What needs no new graph is run
where a second one is an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, randn
from test_compile import IDS, Block, needs_compiler, packed_linear
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from affine_tensor import AffineConfig, dequantize_, quantize_
from affine_tensor.kernels import settings

pytestmark = [
    pytest.mark.usefixtures("no_fallback", "fresh"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.fixture
def fresh() -> None:
    torch.compiler.reset()


@pytest.fixture
def only_once() -> Iterator[None]:
    """Compiling anything a second time is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


# ---- training --------------------------------------------------------------------


class Adapted(nn.Module):
    """Packed weights of all kinds, each beside something that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 64)
        self.embedding.weight = nn.Parameter(make(48, 64))
        self.linear = packed_linear(64, 64, permuted=True, seed=1)
        self.experts = nn.Parameter(make(3, 64, 64, seed=2))  # [E, out, in]
        scale = 0.1
        self.shift = nn.Parameter(randn(48, 64, seed=3) * scale)
        self.lora_a = nn.Parameter(randn(4, 64, seed=4) * scale)
        self.lora_b = nn.Parameter(randn(64, 4, seed=5) * scale)
        self.gate = nn.Parameter(randn(64, seed=6))

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        x = self.embedding(ids) + F.embedding(ids, self.shift)
        x = self.linear(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)
        x = F.grouped_mm(x.tanh() * self.gate, self.experts.mT, offs=ends)
        x = torch.bmm(x.tanh().view(3, -1, 64), self.experts)
        return F.linear(x, self.embedding.weight)


def batch(length: int) -> tuple[Tensor, Tensor]:
    """Tokens, and where those of each of three experts end."""
    ends = torch.tensor([length, 2 * length + 1, 3 * length], dtype=torch.int32)
    return torch.arange(3 * length), ends


def gradients(
    model: nn.Module, call: Callable[..., Tensor], length: int, mark: bool = False
) -> tuple[Tensor, ...]:
    ids, ends = batch(length)
    if mark:
        torch._dynamo.mark_dynamic(ids, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(call(ids, ends).tanh().mean(), trained)


@pytest.mark.parametrize("shapes", ["marked", "found"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_train_at_all_lengths(backend: str, shapes: str) -> None:
    model, counter = Adapted(), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (3, 5, 9):
        got = gradients(model, compiled, length, mark=shapes == "marked")
        want = gradients(model, model, length)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    # If nobody says that it varies, the first length is taken for the only one.
    assert counter.frame_count == {"marked": 1, "found": 2}[shapes]


def test_checkpointed_blocks_train() -> None:
    block = Block()

    def call(x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().mean()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = randn(3, 64).requires_grad_()
    inputs = [x, block.up.bias]
    got = torch.autograd.grad(compiled(x), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(call(x), inputs))


# ---- one graph for each configuration --------------------------------------------


def test_blocks_make_a_graph_for_each_format() -> None:
    kinds: list[dict[str, Any]] = [{}, {"bits": 8}, {"group_size": 16}]
    blocks = [Block(seed=2 * i, **kinds[i % 3]) for i in range(6)]
    counter = CompileCounter()
    x = want = randn(3, 64)
    with torch.no_grad():
        for block in blocks:
            want = block(want)
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
            x = block(x)
    assert torch.equal(x, want)
    assert counter.frame_count == len(kinds)


def test_layers_of_a_llama_share_a_graph() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    quantize_(model, AffineConfig(group_size=32))
    counter, counts = CompileCounter(), []
    with torch.no_grad():
        batches = [IDS, IDS.repeat(1, 2), IDS.repeat(1, 3)]
        wanted = [model(ids, use_cache=False).logits for ids in batches]
        for layer in model.model.layers:
            layer.compile(backend=counter, fullgraph=True)
        for ids, want in zip(batches, wanted, strict=True):
            torch.testing.assert_close(model(ids, use_cache=False).logits, want)
            counts.append(counter.frame_count)
    assert counts == [1, 2, 2]  # static, then dynamic: as with dense weights


# Calls of a weight that is an input, and so of any size.
OF_ANY_SIZE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "twice": lambda x, w: F.linear(x, w).tanh() @ w,
    "rows": lambda x, w: F.linear(x, w[2:]) + F.linear(x, w[1:-1]),
    "embedding": lambda x, w: F.embedding(torch.tensor([1, 5]), w),
    "dequantize": lambda x, w: w.dequantize() + 1,  # type: ignore[call-arg]
}


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_weights_of_all_sizes_make_two_graphs(name: str, permuted: bool) -> None:
    call, counter = OF_ANY_SIZE[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for rows in (6, 10, 34, 51):
        weight, x = make(rows, 64, permuted=permuted), randn(3, 64).requires_grad_()
        torch.testing.assert_close(compiled(x, weight), call(x, weight))
    assert counter.frame_count == 2
    for columns in (96, 128, 160):
        weight, x = make(6, columns, permuted=permuted), randn(3, columns)
        torch.testing.assert_close(compiled(x, weight), call(x, weight))
    assert counter.frame_count <= 4


def test_rows_up_to_a_length_make_two_graphs() -> None:
    """As a model takes those of its learned positions."""
    positions = nn.Parameter(make(40, 64))

    def call(x: Tensor) -> Tensor:
        return x + positions[: x.shape[1]].dequantize()  # type: ignore[operator]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (5, 7, 9, 40):
        x = randn(2, length, 64)
        assert torch.equal(compiled(x), call(x))
    assert counter.frame_count == 2


# ---- none for what is only another weight ----------------------------------------


CHANGES: dict[str, Callable[[Block], Any]] = {
    "a parameter": lambda b: setattr(
        b.up, "weight", nn.Parameter(make(96, 64, seed=7))
    ),
    "data": lambda b: setattr(b.up.weight, "data", make(96, 64, seed=7)),
    "packed, in place": lambda b: b.up.weight.copy_(make(96, 64, seed=7)),
    "dense, in place": lambda b: b.up.weight.copy_(randn(96, 64)),
    "a row": lambda b: b.up.weight[3].copy_(randn(64)),
    "a state dict": lambda b: b.load_state_dict(Block(seed=20).state_dict()),
    "an assigned state dict": lambda b: b.load_state_dict(
        Block(seed=20).state_dict(), assign=True
    ),
}


@pytest.mark.usefixtures("only_once")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_another_weight_is_seen_by_the_same_graph(change: str, mode: Any) -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with mode():
        x = randn(3, 64)
        before = compiled(x)
        CHANGES[change](block)
        assert torch.equal(compiled(x), block(x))
        assert not torch.equal(compiled(x), before)


def test_another_format_in_place_is_seen_by_another_graph() -> None:
    block = Block()
    counters.clear()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    compiled(randn(3, 64))
    block.up.weight.data = make(96, 64, bits=8)
    assert torch.equal(compiled(randn(3, 64)), block(randn(3, 64)))
    block.up.weight.data = make(96, 64, permuted=True)
    assert torch.equal(compiled(randn(3, 64)), block(randn(3, 64)))
    block.double()
    x = randn(3, 64, dtype=torch.float64)
    assert torch.equal(compiled(x), block(x))
    assert counters["stats"]["unique_graphs"] == 4


def test_quantizing_and_back_are_seen() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    counter, x = CompileCounterWithBackend("aot_eager"), randn(3, 64)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for change in (lambda m: None, quantize_, dequantize_):
        change(model)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 3


@pytest.mark.usefixtures("only_once")
def test_settings_hold_for_what_is_compiled_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        x = randn(40, 64)
        compiled(x)
        monkeypatch.setattr(settings, "batch_invariant", True)
        assert torch.equal(compiled(x), block(x))
        assert torch.equal(compiled(x)[7:9], block(x[7:9]))
        monkeypatch.setattr(settings, "cpu_backend", "reference")
        assert torch.equal(compiled(x), block(x))


# ---- what is written -------------------------------------------------------------


def _copy_dense(w: Tensor, dense: Tensor, packed: Tensor) -> None:
    w.copy_(dense)


def _copy_packed(w: Tensor, dense: Tensor, packed: Tensor) -> None:
    w.copy_(packed)


def _set_rows(w: Tensor, dense: Tensor, packed: Tensor) -> None:
    w[2:4] = dense[2:4]


@pytest.mark.parametrize("write", [_copy_dense, _copy_packed, _set_rows])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_writing_in_a_graph(backend: str, write: Callable[..., None]) -> None:
    def call(w: Tensor, *sources: Tensor) -> Tensor:
        write(w, *sources)
        return w.dequantize() + 1  # type: ignore[operator]

    weight, twin = make(6, 64), make(6, 64)
    sources = randn(6, 64), make(6, 64, seed=4)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    assert torch.equal(compiled(weight, *sources), call(twin, *sources))
    assert torch.equal(weight, twin)
    assert not torch.equal(weight, make(6, 64))


def _set_column(w: Tensor) -> None:
    w[:, 3] = 5.0


def _fill_diagonal(w: Tensor) -> None:
    w.fill_diagonal_(2.0)


def _multiply(w: Tensor) -> None:
    w.mul_(2)


@pytest.mark.parametrize("write", [_set_column, _fill_diagonal, _multiply])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_cannot_be_written_is_refused_in_a_graph(
    fullgraph: bool,
    backend: str,
    write: Callable[[Tensor], None],
    fallbacks: list[str],
) -> None:
    """Compiled, it would be written to a copy and lost without a word."""

    def call(w: Tensor) -> Tensor:
        write(w)
        return w.dequantize() + 1

    weight = make(6, 64)
    compiled = torch.compile(call, fullgraph=fullgraph, backend=backend)
    with pytest.raises(
        Unsupported if fullgraph else NotImplementedError, match="packed"
    ):
        compiled(weight)
    assert torch.equal(weight, make(6, 64))
    fallbacks.clear()  # the column was looked at


# ---- caches of compiled graphs ---------------------------------------------------

IN_A_PROCESS = """
import sys

sys.path.insert(0, "tests")
from conftest import make, randn
import torch
from torch._dynamo.utils import counters

torch._inductor.config.cpp.simdlen = 1
torch._inductor.config.cpp_cache_precompile_headers = False
call = torch.compile(lambda x, w: torch.relu(torch.nn.functional.linear(x, w)))
call(randn(3, 64), make(6, 64))
print(*(key for name in ("aot_autograd", "inductor") for key in counters[name]))
"""


@needs_compiler
def test_another_process_finds_the_compiled_graph(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", IN_A_PROCESS],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "_stable_hash_for_caching" not in done.stderr
        found.append([name for name in done.stdout.split() if "_cache_" in name])
    assert sorted(found[0]) == [
        "autograd_cache_miss",
        "autograd_cache_saved",
        "fxgraph_cache_miss",
    ]
    assert sorted(found[1]) == ["autograd_cache_hit", "fxgraph_cache_hit"]
