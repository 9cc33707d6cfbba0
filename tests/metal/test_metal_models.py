"""Whole models on emulated Metal: through the public API, with a log of the launches."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import metal_emulator as emulator
import pytest
import torch
import transformers
from emulated import EmulatedMetal
from expecttest import assert_expected_inline
from torch import Tensor, nn

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    dequantize_,
    from_pretrained,
    ops,
    quantize_,
    save_checkpoint,
)
from affine_tensor.kernels import metal
from affine_tensor.kernels.metal import library as metal_library
from affine_tensor.kernels.metal import values as metal_values

FOUR = AffineConfig(bits=4, group_size=32)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    # Wide enough that greedy tokens differ from one another, and from a near tie.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


# ---- models ---------------------------------------------------------------------


def dense_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def llama(dtype: torch.dtype = torch.float32) -> Any:
    model = dense_model(dtype)
    assert len(quantize_(model, FOUR).quantized) == 16
    return model


def experts(implementation: str) -> Any:
    """Qwen3-MoE: the experts of a layer are parameters of three dimensions."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation=implementation
    ).eval()
    assert model.config._experts_implementation == implementation
    assert len(quantize_(model, FOUR).quantized) == 10
    pack_experts(model, 4)
    return model


def transposed_experts(implementation: str) -> Any:
    """GPT-OSS: the experts' parameters are [in, out], and have biases."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, layer_types=kinds
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation=implementation
    ).eval()
    quantize_(model, FOUR)
    pack_experts(model, 4)
    return model


def pack_experts(model: nn.Module, count: int) -> None:
    """Quantize the parameters of three dimensions, of which there are so many."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3:
                packed = AffineQuantizedTensor.from_dense(
                    parameter, FOUR.bits, FOUR.group_size
                )
                setattr(module, name, nn.Parameter(packed, requires_grad=False))
                count -= 1
    assert count == 0


def prompt(rows: int, columns: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # Without 0, which `generate` would take for padding.
    return torch.randint(1, SIZES["vocab_size"], (rows, columns), generator=generator)


def double_twin(model: nn.Module) -> Any:
    """A copy in float64 that is dense, its weights exactly what the codes say."""
    twin = copy.deepcopy(model)
    dequantize_(twin, torch.float64)
    config = getattr(twin, "config", None)  # nn.Sequential has none
    if getattr(config, "_experts_implementation", None) == "grouped_mm":
        twin.set_experts_implementation("eager")  # torch's grouped_mm has no float64
    return twin.double()


# ---- the device and its log -----------------------------------------------------


@pytest.fixture
def device(
    emulated_metal: EmulatedMetal, monkeypatch: pytest.MonkeyPatch, no_fallback: None
) -> Iterator[None]:
    """Emulated Metal, on which every operator must find its kernel."""
    monkeypatch.setattr(metal_values, "_plans", {})
    yield
    assert all(metal_library.compiled().values())
    plans = [*metal._plans.values(), *metal_values._plans.values()]
    assert plans
    assert all(plan.kernel is not None for plan in plans)  # None: the reference


@contextmanager
def reference() -> Iterator[None]:
    """Off the emulated device, for what it is compared with."""
    with pytest.MonkeyPatch.context() as patch, emulator.run() as run:
        patch.setattr(ops, "device_of", lambda tensor: "cpu")
        yield
        assert not run.launches


def logged(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, and its launches: how many of each kernel and shape.

    The first run compiles kernels and checks them, which launches too.
    """
    call()
    with emulator.run() as run:
        result = call()
    counts = Counter(described(launch) for launch in run.launches)
    return result, "\n".join(f"{count:2} {text}" for text, count in counts.items())


def described(launch: emulator.Launch) -> str:
    """`gemv 1x64x128`: the kernel, then M, N, K; of experts their number before."""
    texts = [text for text in launch.buffers if text.startswith("int64 ")]
    sizes = ast.literal_eval(texts[0].removeprefix("int64 "))
    if launch.kernel == "quantize":
        return f"quantize {sizes} groups"
    m, n, k = sizes[:3]
    if launch.kernel == "embedding":
        m = launch.threads[1]
    shape = f"{n}x{k}" if launch.kernel == "dequantize" else f"{m}x{n}x{k}"
    count = sizes[9]
    return f"{launch.kernel} {shape}" + (f", {count} experts" if count > 1 else "")


def relative_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("op", sorted(ops._SCHEMAS))
def test_the_operator_is_there_on_metal(op: str) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"affine_tensor::{op}", "MPS")
    assert has_kernel(f"affine_tensor::{op}", "AutocastMPS") == (op == "linear")
    assert ops._kernels[op]["mps"] is not ops.reference(op)


# ---- generation -----------------------------------------------------------------


def generated(model: Any, ids: Tensor) -> tuple[Tensor, str]:
    """Greedy tokens and launches, the tokens the same as without Metal."""
    tokens, log = logged(lambda: model.generate(ids, **GREEDY))
    assert len(set(tokens[0, ids.shape[1] :].tolist())) > 2  # not one word forever
    with reference():
        assert torch.equal(tokens, model.generate(ids, **GREEDY))
        assert torch.equal(tokens, double_twin(model).generate(ids, **GREEDY))
    return tokens, log


def test_llama_generates(device: None) -> None:
    with reference():
        model = llama()
    _, log = generated(model, prompt(1))
    assert_expected_inline(
        log,
        """\
 1 embedding 5x96x64
 4 gemv_small 5x64x64
 4 gemv_small 5x32x64
 4 gemv_small 5x128x64
 2 gemv_small 5x64x128
 6 gemv 1x96x64
 5 embedding 1x96x64
20 gemv 1x64x64
20 gemv 1x32x64
20 gemv 1x128x64
10 gemv 1x64x128""",
    )


def test_llama_generates_for_two(device: None) -> None:
    with reference():
        model = llama()
    _, log = generated(model, prompt(2))
    assert_expected_inline(
        log,
        """\
 1 embedding 10x96x64
 4 gemm 10x64x64
 4 gemm 10x32x64
 4 gemm 10x128x64
 2 gemm 10x64x128
 6 gemv_small 2x96x64
 5 embedding 2x96x64
20 gemv_small 2x64x64
20 gemv_small 2x32x64
20 gemv_small 2x128x64
10 gemv_small 2x64x128""",
    )


def test_experts_generate_eagerly(device: None) -> None:
    with reference():
        model = experts("eager")
    _, log = generated(model, prompt(1))
    assert_expected_inline(
        log,
        """\
 1 embedding 5x96x64
 6 gemv_small 5x64x64
 4 gemv_small 5x32x64
 2 gemv_small 4x64x64
 2 gemv_small 4x64x32
 2 gemv_small 5x64x32
42 gemv 1x64x64
22 gemv 1x64x32
 6 gemv 1x96x64
 5 embedding 1x96x64
20 gemv 1x32x64""",
    )


def test_experts_generate_by_grouped_products(device: None) -> None:
    with reference():
        model = experts("grouped_mm")
    _, log = generated(model, prompt(1))
    assert_expected_inline(
        log,
        """\
 1 embedding 5x96x64
 4 gemv_small 5x64x64
 4 gemv_small 5x32x64
 2 gemm 10x64x64, 4 experts
 2 gemm 10x64x32, 4 experts
 6 gemv 1x96x64
 5 embedding 1x96x64
20 gemv 1x64x64
20 gemv 1x32x64
10 gemv 2x64x64, 4 experts
10 gemv 2x64x32, 4 experts""",
    )


def test_experts_generate_by_batched_products(device: None) -> None:
    """What transformers decodes with on a GPU, unless told to be eager."""
    with reference():
        model = experts("batched_mm")
    _, log = generated(model, prompt(1))
    assert_expected_inline(
        log,
        """\
 1 embedding 5x96x64
 4 gemv_small 5x64x64
 4 gemv_small 5x32x64
 2 gemv 10x64x64, 10 experts
 2 gemv 10x64x32, 10 experts
 6 gemv 1x96x64
 5 embedding 1x96x64
20 gemv 1x64x64
20 gemv 1x32x64
10 gemv 2x64x64, 2 experts
10 gemv 2x64x32, 2 experts""",
    )


TRANSPOSED = {
    "eager": "gemv_n 1x64x256",
    "grouped_mm": "gemv_n 2x64x256, 4 experts",
    "batched_mm": "gemv_n 2x64x256, 2 experts",
}


@pytest.mark.parametrize("implementation", TRANSPOSED)
def test_transposed_experts_generate(implementation: str, device: None) -> None:
    with reference():
        model = transposed_experts(implementation)
    _, log = generated(model, prompt(1))
    assert TRANSPOSED[implementation] in log


@pytest.mark.parametrize("rows", [1, 2])
def test_llama_in_bfloat16_is_as_exact_as_dense_weights(
    rows: int, device: None
) -> None:
    with reference(), torch.no_grad():
        model, ids = llama(torch.bfloat16), prompt(rows)
        dense = copy.deepcopy(model)
        dequantize_(dense)
        exact = double_twin(model)(ids).logits
        rounding = relative_l2(dense(ids).logits, exact)
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert relative_l2(logits, exact) < 1.5 * rounding < 0.1


def test_llama_generates_in_bfloat16(device: None) -> None:
    """Tokens may differ by rounding; the kernels and shapes are those of float32."""
    with reference():
        model = llama(torch.bfloat16)
    tokens, log = logged(lambda: model.generate(prompt(1), **GREEDY))
    assert tokens.shape == (1, 11)
    assert_expected_inline(
        log,
        """\
 1 embedding 5x96x64
 4 gemv_small 5x64x64
 4 gemv_small 5x32x64
 4 gemv_small 5x128x64
 2 gemv_small 5x64x128
 6 gemv 1x96x64
 5 embedding 1x96x64
20 gemv 1x64x64
20 gemv 1x32x64
20 gemv 1x128x64
10 gemv 1x64x128""",
    )


# ---- training -------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen Linear and a low-rank one beside it, both of whose factors matter."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def add_lora(model: Any) -> None:
    model.requires_grad_(False)
    torch.manual_seed(2)
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "v_proj", "o_proj"):
            setattr(attention, name, Lora(getattr(attention, name)))


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """One step of SGD on a copy: the loss, all gradients, and the loss thereafter."""
    model = copy.deepcopy(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 12
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in trained.items()}
    optimizer.step()
    with torch.no_grad():
        found["loss after"] = model(ids, labels=ids).loss
    return found


def trained(model: Any) -> str:
    """Launches of a LoRA step, its results those of the reference and of float64."""
    with reference():
        add_lora(model)
        ids = prompt(2, 12)
        own, exact = step(model, ids), step(double_twin(model), ids)
    assert exact["loss after"] < exact["loss"] - 0.05
    found, log = logged(lambda: step(model, ids))
    for name, want in exact.items():
        assert want.norm() > 0
        assert relative_l2(found[name], want) < 1e-5, name
        assert relative_l2(found[name], own[name]) < 1e-5, name
    return log


def test_llama_trains(device: None) -> None:
    with reference():
        model = llama()
    assert_expected_inline(
        trained(model),
        """\
 2 embedding 24x96x64
 8 gemm 24x64x64
 8 gemm 24x32x64
 8 gemm 24x128x64
 4 gemm 24x64x128
 2 gemm 24x96x64
 1 gemm_n 24x96x64
 2 gemm_n 24x64x128
 4 gemm_n 24x128x64
 3 gemm_n 24x64x64
 2 gemm_n 24x32x64""",
    )


def test_experts_train_eagerly(device: None) -> None:
    with reference():
        model = experts("eager")
    assert_expected_inline(
        trained(model),
        """\
 2 embedding 24x96x64
 8 gemm 24x64x64
 8 gemm 24x32x64
 4 gemm 10x64x64
 4 gemm 10x64x32
 2 gemm 19x64x64
 2 gemm 19x64x32
 1 gemm 9x64x64
 1 gemm 9x64x32
 2 gemv_small 8x64x64
 2 gemv_small 8x64x32
 2 gemm 18x64x64
 2 gemm 18x64x32
 1 gemm 15x64x64
 1 gemm 15x64x32
 1 gemv_small 7x64x64
 1 gemv_small 7x64x32
 2 gemm 24x96x64
 1 gemm_n 24x96x64
 1 gemm_n 7x64x32
 1 gemm_n 7x64x64
 1 gemm_n 15x64x32
 1 gemm_n 15x64x64
 1 gemm_n 18x64x32
 1 gemm_n 18x64x64
 1 gemm_n 8x64x32
 1 gemm_n 8x64x64
 3 gemm_n 24x64x64
 2 gemm_n 24x32x64
 1 gemm_n 9x64x32
 1 gemm_n 9x64x64
 1 gemm_n 19x64x32
 1 gemm_n 19x64x64
 2 gemm_n 10x64x32
 2 gemm_n 10x64x64
 1 gemm 11x64x64
 1 gemm 11x64x32
 1 gemm 14x64x64
 1 gemm 14x64x32
 1 gemv_small 6x64x64
 1 gemv_small 6x64x32""",
    )


def test_experts_train_by_grouped_products(device: None) -> None:
    with reference():
        model = experts("grouped_mm")
    assert_expected_inline(
        trained(model),
        """\
 2 embedding 24x96x64
 8 gemm 24x64x64
 8 gemm 24x32x64
 4 gemm 48x64x64, 4 experts
 4 gemm 48x64x32, 4 experts
 2 gemm 24x96x64
 1 gemm_n 24x96x64
 2 gemm_n 48x64x32, 4 experts
 2 gemm_n 48x64x64, 4 experts
 3 gemm_n 24x64x64
 2 gemm_n 24x32x64""",
    )


def test_experts_train_by_batched_products(device: None) -> None:
    with reference():
        model = experts("batched_mm")
    assert_expected_inline(
        trained(model),
        """\
 2 embedding 24x96x64
 8 gemm 24x64x64
 8 gemm 24x32x64
 4 gemv 48x64x64, 48 experts
 4 gemv 48x64x32, 48 experts
 2 gemm 24x96x64
 1 gemm_n 24x96x64
 2 gemv_n 48x64x32, 48 experts
 2 gemv_n 48x64x64, 48 experts
 3 gemm_n 24x64x64
 2 gemm_n 24x32x64""",
    )


# ---- before and after -----------------------------------------------------------


def test_quantize_and_dequantize_give_the_same_bits(device: None) -> None:
    with reference():
        model = dense_model()
        want = copy.deepcopy(model)
        quantize_(want, FOUR)

    def quantized() -> Any:
        found = copy.deepcopy(model)
        quantize_(found, FOUR)
        return found

    found, log = logged(quantized)
    assert_same_parameters(found, want)
    assert_expected_inline(
        log,
        """\
 2 quantize 192 groups
 4 quantize 128 groups
 4 quantize 64 groups
 6 quantize 256 groups""",
    )

    def dequantized() -> Any:
        found = copy.deepcopy(want)
        dequantize_(found)
        return found

    found, log = logged(dequantized)
    with reference():
        dequantize_(want)
    assert_same_parameters(found, want)
    assert_expected_inline(
        log,
        """\
 2 dequantize 96x64
 4 dequantize 64x64
 4 dequantize 32x64
 4 dequantize 128x64
 2 dequantize 64x128""",
    )


def assert_same_parameters(found: nn.Module, want: nn.Module) -> None:
    pairs = zip(found.named_parameters(), want.named_parameters(), strict=True)
    for (name, a), (other, b) in pairs:
        assert name == other
        assert type(a) is type(b)
        parts = [p._parts() if hasattr(p, "_parts") else [p] for p in (a, b)]
        assert all(torch.equal(x, y) for x, y in zip(*parts, strict=True)), name


def test_a_saved_model_generates_the_same(device: None, tmp_path: Path) -> None:
    with reference():
        model = llama()
        want = model.generate(prompt(1), **GREEDY)
    save_checkpoint(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head.weight, AffineQuantizedTensor)
    with emulator.run() as run:
        assert torch.equal(loaded.generate(prompt(1), **GREEDY), want)
    assert {"embedding", "gemv", "gemv_small"} <= {one.kernel for one in run.launches}


# ---- compilers and autocast -----------------------------------------------------


def packed_linear() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    quantize_(model, FOUR)
    return model


def product(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of the sum of its squares."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_linear(backend: str, device: None) -> None:
    with reference():
        model, x = packed_linear(), torch.randn(3, 64)
        exact = product(double_twin(model), x.double())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found, log = logged(lambda: (*product(compiled, x), inferred(compiled, x)))
    want, own_log = logged(lambda: (*product(model, x), inferred(model, x)))
    for a, b, c in zip(found, want, (*exact, exact[0]), strict=True):
        assert torch.equal(a, b)
        assert relative_l2(a, c) < 1e-6
    assert log == own_log
    assert_expected_inline(
        log,
        """\
 2 gemv_small 3x96x64
 1 gemv_n 3x96x64""",
    )


def inferred(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_compiled_experts(implementation: str, device: None) -> None:
    """In float32 transformers compiles grouped_mm as an operator of its own."""
    with reference():
        whole, x = experts(implementation), torch.randn(1, 7, 64)
        model = whole.model.layers[0].mlp
        exact = product(double_twin(whole).model.layers[0].mlp, x.double())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, log = logged(lambda: product(compiled, x))
    want, own_log = logged(lambda: product(model, x))
    for a, b, c in zip(found, want, exact, strict=True):
        assert relative_l2(a, b) < 1e-6
        assert relative_l2(a, c) < 1e-6
    assert log == own_log
    assert "experts" in log


@pytest.mark.parametrize("rows", [1, 3])
def test_a_linear_under_autocast(rows: int, device: None) -> None:
    with reference():
        model, x = packed_linear(), torch.randn(rows, 64)
        rounded = double_twin(model)
        rounded[0].bias.data = rounded[0].bias.to(torch.bfloat16).double()
        exact = product(rounded, x.to(torch.bfloat16).double())

    def call() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return product(model, x)

    (y, gradient), log = logged(call)
    assert (y.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    # Weights are not rounded to bfloat16, only x, the bias and the results are.
    assert ((y - exact[0]).abs() <= 2.0**-8 * exact[0].abs() + 1e-6).all()
    assert relative_l2(gradient, exact[1]) < 2.0**-8
    assert log.split() == f"1 {FEW[rows]} {rows}x96x64 1 gemv_n {rows}x96x64".split()


FEW = {1: "gemv", 3: "gemv_small"}
