"""GPTQ, AWQ and compressed-tensors through from_pretrained: the exact weights in stock
models, experts and models that see too, adapters, and saving them for MLX.

What each format's bits mean is tested in test_gptq.py, test_awq.py and
test_compressed_tensors.py, on files that the formats' own tools wrote. Here they are packed
by hand, plainly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases_experts
import cases_vision
import pytest
import seeing
import torch
from architectures import Case, _write_dense_checkpoint, mlx_logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from affine_tensor import (
    AffineQuantizationConfig,
    AffineQuantizedTensor,
    CheckpointError,
    fold_permutations_,
    from_pretrained,
    load_checkpoint_,
    save_checkpoint,
)

LLAMA = Case("llama", {"tie_word_embeddings": False})
EXPERTS = [c for c in cases_experts.CASES if c.model_type in ("qwen3_moe", "mixtral")]
IDS = torch.tensor([[5, 17, 200, 3, 9, 44, 81, 7]])
GROUP = 32


def words_along(codes: Tensor, dim: int) -> Tensor:
    """Codes of four bits as int32 words, eight along a dimension, the first lowest."""
    eight = codes.movedim(dim, -1).unflatten(-1, (-1, 8)).long()
    words = (eight << (4 * torch.arange(8))).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).movedim(-1, dim).contiguous()


def quantized(weight: Tensor, g_idx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], scales float16 [N, G], zeros [N, G] and the exact weight [N, K]."""
    groups = int(g_idx.max()) + 1
    low = torch.stack([weight[:, g_idx == g].amin(1) for g in range(groups)], 1)
    high = torch.stack([weight[:, g_idx == g].amax(1) for g in range(groups)], 1)
    scales = ((high - low) / 15).half().clamp_min(1e-4)
    zeros = (-low / scales.float()).round().clamp(1, 15)
    each, zero = scales.float()[:, g_idx], zeros[:, g_idx]
    codes = (weight / each + zero).round().clamp(0, 15)
    exact = (each.double() * (codes - zero).double()).float()
    return codes, scales, zeros, exact


def gptq(weight: Tensor, g_idx: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, zeros, exact = quantized(weight, g_idx)
    tensors = {
        "qweight": words_along(codes.T, 0),
        "qzeros": words_along(zeros.T - 1, 1),
        "scales": scales.T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }
    return tensors, exact


def awq(weight: Tensor, g_idx: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, zeros, exact = quantized(weight, g_idx)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def interleaved(matrix: Tensor) -> Tensor:
        return matrix.unflatten(-1, (-1, 8))[..., order].flatten(-2)

    tensors = {
        "qweight": words_along(interleaved(codes.T), 1),
        "qzeros": words_along(interleaved(zeros.T), 1),
        "scales": scales.T.contiguous(),
    }
    return tensors, exact


def compressed(weight: Tensor, g_idx: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, zeros, exact = quantized(weight, g_idx)
    tensors = {
        "weight_packed": words_along(codes, 1),
        "weight_scale": scales,
        "weight_zero_point": words_along(zeros, 0),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, exact


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": GROUP,
                    "actorder": None,
                },
            }
        },
    },
}
WRITERS = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed}


def ordinary(columns: int) -> Tensor:
    return torch.arange(columns) // GROUP


def act_order(columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return ordinary(columns)[torch.randperm(columns, generator=generator)]


def write(
    case: Case, folder: Path, method: str, order: Any = None, dense: Any = ()
) -> nn.Module:
    """A checkpoint of the case in that format, and the transformers model with the exact
    weights. `order(name, columns)` gives the group of each column."""
    _write_dense_checkpoint(case, folder)
    return quantize_files(folder, method, AutoModelForCausalLM, order, dense)


def quantize_files(
    folder: Path, method: str, auto_class: Any, order: Any = None, dense: Any = ()
) -> nn.Module:
    """Quantize a dense checkpoint of transformers, and read the exact weights as one."""
    tensors = load_file(folder / "model.safetensors")
    exact: dict[str, Tensor] = {}
    for name in list(tensors):
        linear = name.endswith("proj.weight") or ".experts." in name
        if not linear or any(part in name for part in dense):
            continue
        weight = tensors.pop(name)
        columns = weight.shape[-1]
        g_idx = ordinary(columns) if order is None else order(name, columns)
        parts, exact[name] = WRITERS[method](weight, g_idx)
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}{part}": tensor for part, tensor in parts.items()}
    # The twin reads the exact weights under the names of the Hub, by transformers' rules.
    twin_folder = folder.parent / f"{folder.name}-twin"
    twin_folder.mkdir()
    ends = ("qweight", "qzeros", "scales", "g_idx")
    ends = (*ends, "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    whole = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in ends}
    save_file(
        whole | exact, twin_folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (twin_folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = CONFIGS[method]
    (folder / "config.json").write_text(json.dumps(config))
    return auto_class.from_pretrained(twin_folder).eval()


def packed(model: nn.Module) -> dict[str, AffineQuantizedTensor]:
    parameters = model.named_parameters()
    return {n: p for n, p in parameters if isinstance(p, AffineQuantizedTensor)}


def assert_equal_to(model: nn.Module, twin: nn.Module) -> None:
    """Every weight bit for bit, and the logits."""
    wanted = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        value = parameter
        if isinstance(value, AffineQuantizedTensor):
            value = value.dequantize(torch.float32)
        assert torch.equal(value, wanted[name]), name
    with torch.no_grad():
        got, want = model(IDS).logits.double(), twin(IDS).logits.double()
    assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("method", list(CONFIGS))
def test_exact_weights_in_the_stock_model(method: str, tmp_path: Path) -> None:
    twin = write(LLAMA, tmp_path / "q", method)
    model = from_pretrained(tmp_path / "q")
    assert len(packed(model)) == 14
    assert_equal_to(model, twin)
    other = AutoModelForCausalLM.from_config(twin.config).eval()
    report = load_checkpoint_(other, tmp_path / "q")
    assert len(report.packed) == 14
    assert_equal_to(other, twin)
    config = AffineQuantizationConfig(dequantize=True)
    made_dense = from_pretrained(tmp_path / "q", quantization_config=config)
    assert not packed(made_dense)
    assert_equal_to(made_dense, twin)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("case", EXPERTS[:1] + EXPERTS[-1:], ids=str)
def test_experts(case: Case, method: str, tmp_path: Path) -> None:
    twin = write(case, tmp_path / "q", method)
    model = from_pretrained(tmp_path / "q")
    stacked = [n for n, w in packed(model).items() if w.dim() == 3]
    assert len(stacked) >= 2
    assert_equal_to(model, twin)


def test_experts_with_an_order_each(tmp_path: Path) -> None:
    """gate and up of an expert share theirs; the experts differ."""
    case = EXPERTS[0]

    def order(name: str, columns: int) -> Tensor:
        place = name.rpartition(".experts.")[2].split(".")[0]
        return act_order(columns, int(place) if place.isdigit() else 99)

    twin = write(case, tmp_path / "q", "gptq", order)
    model = from_pretrained(tmp_path / "q")
    orders = {n: w.permutation for n, w in packed(model).items() if w.dim() == 3}
    assert orders
    assert all(order is not None and order.dim() == 2 for order in orders.values())
    assert_equal_to(model, twin)


def test_gate_and_up_with_different_orders_become_dense_by_name(tmp_path: Path) -> None:
    def order(name: str, columns: int) -> Tensor:
        return act_order(columns, len(name.rpartition(".experts.")[2]))

    twin = write(EXPERTS[0], tmp_path / "q", "gptq", order)
    model = AutoModelForCausalLM.from_config(twin.config).eval()
    report = load_checkpoint_(model, tmp_path / "q")
    fused = [n for n in dict(model.named_parameters()) if n.endswith("gate_up_proj")]
    assert fused
    assert not packed(model).keys() & set(fused)
    assert set(fused) <= report.notes.keys()
    assert_equal_to(model, twin)


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3", "mistral3", "qwen3_vl"])
def test_models_that_see(model_type: str, method: str, tmp_path: Path) -> None:
    """The text is packed, the tower left dense."""
    case = next(case for case in cases_vision.CASES if case.model_type == model_type)
    seeing.dense_twin(case).save_pretrained(tmp_path / "q")
    towers = ("vision", "visual", "projector")
    auto_class = AutoModelForImageTextToText
    twin = quantize_files(tmp_path / "q", method, auto_class, dense=towers)
    model = from_pretrained(tmp_path / "q", model_class=auto_class)
    names = packed(model)
    assert len(names) == 14
    assert not [name for name in names if any(part in name for part in towers)]
    inputs = case.inputs()
    with torch.no_grad():
        got, want = model(**inputs).logits.double(), twin(**inputs).logits.double()
    assert (got - want).norm() / want.norm() < 1e-5


def test_one_dense_module_among_packed_ones(tmp_path: Path) -> None:
    twin = write(LLAMA, tmp_path / "q", "gptq", dense=["k_proj"])
    model = from_pretrained(tmp_path / "q")
    assert len(packed(model)) == 12
    assert_equal_to(model, twin)


def test_biases_of_modules_that_have_none(tmp_path: Path) -> None:
    twin = write(LLAMA, tmp_path / "q", "gptq")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.bias"
    save_file(tensors | {name: torch.zeros(256)}, file)
    assert_equal_to(from_pretrained(tmp_path / "q"), twin)
    save_file(tensors | {name: torch.ones(256)}, file)
    with pytest.raises(CheckpointError, match=f"{name}: not zero, and the model"):
        from_pretrained(tmp_path / "q")


def test_a_weight_that_is_missing(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "q", "awq")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    stem = "model.layers.1.self_attn.q_proj"
    save_file({n: t for n, t in tensors.items() if not n.startswith(stem)}, file)
    with pytest.raises(CheckpointError, match=rf"1 missing:\n  {stem}\.weight"):
        from_pretrained(tmp_path / "q")


def test_an_adapter_on_an_act_order_base(tmp_path: Path) -> None:
    """Gradients are those of the dense twin, and the loss falls."""
    twin = write(LLAMA, tmp_path / "q", "gptq", lambda name, k: act_order(k, 3))
    model = from_pretrained(tmp_path / "q")
    adapters = []
    for one in (model, twin):
        one.requires_grad_(False)
        torch.manual_seed(0)
        for layer in one.model.layers:
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
            layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
        adapters.append([p for p in one.parameters() if p.requires_grad])
        one(IDS, labels=IDS).loss.backward()
    for got, want in zip(*adapters, strict=True):
        assert want.grad.norm() > 0
        error = (got.grad.double() - want.grad.double()).norm() / want.grad.norm()
        assert error < 1e-4
    optimizer = torch.optim.Adam(adapters[0], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


class Adapted(nn.Module):
    """A linear with an adapter of rank 4 beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("method", list(CONFIGS))
def test_saving_for_mlx(method: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm reads what is saved")
    write(LLAMA, tmp_path / "q", method)
    model = from_pretrained(tmp_path / "q")
    save_checkpoint(model, tmp_path / "mlx")
    with torch.no_grad():
        got = model(IDS).logits.double()
    want = mlx_logits(tmp_path / "mlx", IDS).double()
    assert (got - want).norm() / want.norm() < 1e-5


def test_saving_act_order_is_refused_with_a_way_out(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "q", "gptq", lambda name, k: act_order(k, 3))
    model = from_pretrained(tmp_path / "q")
    with pytest.raises(
        ValueError, match=r"permuted \(act-order\)[^$]*fold_permutations_"
    ):
        save_checkpoint(model, tmp_path / "mlx")
    report = save_checkpoint(model, tmp_path / "mlx", unsupported="requantize")
    assert len(report.changed) == 14
    with torch.no_grad():
        want = model(IDS).logits.double()
    assert fold_permutations_(model) == [
        f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1)
    ]
    assert fold_permutations_(model) == []
    with torch.no_grad():
        got = model(IDS).logits.double()
    assert (got - want).norm() / want.norm() < 1e-5
    report = save_checkpoint(
        model, tmp_path / "mlx", unsupported="requantize", overwrite=True
    )
    assert len(report.changed) == 12
    assert not [name for name in report.changed if "down_proj" in name]


def test_folding_the_order_of_experts(tmp_path: Path) -> None:
    def order(name: str, columns: int) -> Tensor:
        place = name.rpartition(".experts.")[2].split(".")[0]
        return act_order(columns, int(place) if place.isdigit() else 99)

    write(EXPERTS[0], tmp_path / "q", "gptq", order)
    model = from_pretrained(tmp_path / "q")
    with torch.no_grad():
        want = model(IDS).logits.double()
    folded = fold_permutations_(model)
    assert [name for name in folded if name.endswith("experts.down_proj")]
    for name in folded:
        assert model.get_parameter(name).permutation is None
    with torch.no_grad():
        got = model(IDS).logits.double()
    assert (got - want).norm() / want.norm() < 1e-5
