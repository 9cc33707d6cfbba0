"""PEFT on packed weights: adapters train as beside dense ones, and nothing is lost.

Each is compared with its dense twin, a model whose weights are the packed ones' values.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wrapped
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    dequantize_,
    fold_permutations_,
    from_pretrained,
    merge_to_dense,
    prepare_for_lora,
    quantize_,
    save_checkpoint,
)

peft = pytest.importorskip("peft", reason="peft makes the adapters")

IDS = torch.tensor([[5, 17, 200, 3, 9, 44, 81, 7], [1, 2, 3, 5, 8, 13, 21, 34]])
GROUP = 32
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@functools.cache
def _made(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "conv1d":
        sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
        ids = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2}
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **ids, **off))
        for module in model.modules():
            if type(module).__name__ == "Conv1D":
                rows = module.weight.detach().t().contiguous()
                packed = AffineQuantizedTensor.from_dense(rows, 4, GROUP).t()
                module.weight = nn.Parameter(packed, requires_grad=False)
    elif kind == "experts":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
        for layer in model.model.layers:
            for own, weight in list(layer.mlp.experts._parameters.items()):
                packed = AffineQuantizedTensor.from_dense(weight, 4, GROUP)
                layer.mlp.experts._parameters[own] = nn.Parameter(packed, False)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(**SIZES, tie_word_embeddings="tied" in kind)
        )
    quantize_(model, AffineConfig(4, GROUP), progress=False)
    if kind == "act-order":
        for i, module in enumerate(model.model.layers.modules()):
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(_permuted(module.weight, i), False)
    return model.eval()


def _permuted(weight: Any, seed: int) -> AffineQuantizedTensor:
    order = torch.randperm(
        weight.shape[1], generator=torch.Generator().manual_seed(seed)
    )
    return AffineQuantizedTensor.from_packed(
        *(weight.packed, weight.scales, weight.biases),
        bits=weight.bits,
        group_size=weight.group_size,
        permutation=order,
    )


def make(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A packed model: llama, tied, act-order, conv1d or experts."""
    return copy.deepcopy(_made(kind)).to(dtype)


def dense_twin(model: Any) -> Any:
    twin = copy.deepcopy(model)
    dequantize_(twin, progress=False)
    return twin


def is_packed(value: object) -> bool:
    return isinstance(value, AffineQuantizedTensor)


def lora(**settings: Any) -> Any:
    settings.setdefault("target_modules", "all-linear")
    return peft.LoraConfig(**({"r": 4, "task_type": "CAUSAL_LM"} | settings))


EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
# Kinds of models, and of adapters beside them.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "rslora with biases": ("llama", {"use_rslora": True, "bias": "all"}),
    "act-order": ("act-order", {}),
    "embeddings and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied embeddings": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("conv1d", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora": ("llama", {"use_dora": True}),
    "dora, act-order": ("act-order", {"use_dora": True}),
    "dora, dropout": ("llama", {"use_dora": True, "lora_dropout": 0.2}),
    "dora of embeddings": (
        "llama",
        {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    ),
    "dora of conv1d": (
        "conv1d",
        {"use_dora": True, "target_modules": ["c_fc"], "fan_in_fan_out": True},
    ),
    "experts": ("experts", EXPERTS),
}


def adapted(model: Any, settings: dict[str, Any], *, random: bool = False) -> Any:
    """With adapters, always the same; `random` ones change the output."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings
        model = peft.get_peft_model(model, lora(**settings))
    if random:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.eval()
    return model


def train(model: Any, steps: int = 5, autocast: bool = False) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    losses = []
    torch.manual_seed(3)  # of dropout
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def close(got: list[float], want: list[float], tolerance: float) -> None:
    assert got[-1] < 0.95 * got[0]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)


# ---- training -------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_losses_are_those_of_the_dense_twin(name: str, no_fallback: None) -> None:
    kind, settings = WAYS[name]
    base = make(kind)
    before = {n: p for n, p in base.named_parameters() if is_packed(p)}
    kept = {n: [part.clone() for part in p._parts()] for n, p in before.items()}
    twin = adapted(dense_twin(base), settings)
    model = adapted(prepare_for_lora(base, gradient_checkpointing=False), settings)
    close(train(model), train(twin), 1e-4)
    assert error(logits(model), logits(twin)) < 1e-3
    for n, p in before.items():
        assert all(map(torch.equal, p._parts(), kept[n]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_losses_under_autocast_and_checkpointing(
    checkpointing: bool | None, dtype: torch.dtype, no_fallback: None
) -> None:
    """`checkpointing` says whether it is the reentrant kind."""
    losses = []
    for base in (make("llama", dtype), dense_twin(make("llama", dtype))):
        prepare_for_lora(base, gradient_checkpointing=checkpointing is not None)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": True})
        model = adapted(base, {})
        assert model.is_gradient_checkpointing == (checkpointing is not None)
        losses.append(train(model, autocast=True))
    close(*losses, 2e-2)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_float16_base(checkpointing: bool | None, no_fallback: None) -> None:
    """Without autocast: PEFT casts between it and its float32 adapters."""
    losses = []
    for base in (
        make("llama", torch.float16),
        dense_twin(make("llama", torch.float16)),
    ):
        prepare_for_lora(base, gradient_checkpointing=checkpointing is not None)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": True})
        losses.append(train(adapted(base, {})))
    close(*losses, 1e-2)


def test_dense_results_are_plain_tensors() -> None:
    """Not the class of packed weights again, without parts."""
    model = adapted(make(), {})
    weight = model.base_model.model.lm_head.weight
    x = torch.ones(2, weight.shape[1], requires_grad=True)
    y = nn.functional.linear(x, weight)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    results = [
        y,
        gradient,
        x @ weight.t(),
        weight * 2,
        weight.sum(),
        weight.dequantize(),
    ]
    results += [model(IDS).logits, torch.zeros_like(weight), weight.float() + 1]
    assert [type(result) for result in results] == [Tensor] * len(results)
    assert all("AffineQuantized" not in repr(result) for result in results)


@pytest.mark.parametrize("dora", [False, True])
def test_no_dense_weight_is_kept_for_the_backward(dora: bool) -> None:
    """Neither by layers nor by their adapters: what is saved are packed weights."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    settings = {"target_modules": ["embed_tokens", "lm_head", "q_proj", "down_proj"]}
    settings["use_dora"] = dora  # type: ignore[assignment]
    model = adapted(prepare_for_lora(make(), gradient_checkpointing=False), settings)
    dense = [p.dequantize() for p in model.parameters() if is_packed(p)]
    dense += [weight.t() for weight in dense]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(IDS, labels=IDS).loss
    packed = [tensor for tensor in saved if is_packed(tensor)]
    assert len(packed) >= 10
    for tensor in saved:
        alike = [w for w in dense if w.shape == tensor.shape]
        assert is_packed(tensor) or all(error(tensor, w) > 0.5 for w in alike)
    loss.backward()


def test_a_model_with_add_adapter(no_fallback: None) -> None:
    base = make()
    twin = dense_twin(base)
    for model in (base, twin):
        torch.manual_seed(1)
        prepare_for_lora(model).add_adapter(lora())
    close(train(base), train(twin), 1e-4)
    want = logits(base)
    merged = merge_to_dense(base)
    assert error(logits(merged), want) < 1e-5
    assert not merged._hf_peft_config_loaded
    assert not hasattr(merged, "peft_config")


def test_the_trainer_with_checkpointing_and_bf16(
    tmp_path: Path, no_fallback: None
) -> None:
    model = adapted(prepare_for_lora(make("tied", torch.bfloat16)), {})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_an_act_order_base_from_a_gptq_file(tmp_path: Path, no_fallback: None) -> None:
    from test_other_formats import LLAMA, act_order, write

    twin = write(LLAMA, tmp_path / "q", "gptq", lambda name, k: act_order(k, 3))
    losses, models = [], []
    for base in (from_pretrained(tmp_path / "q"), twin):
        models.append(adapted(prepare_for_lora(base), {}))
        losses.append(train(models[-1]))
    close(*losses, 1e-4)
    want = logits(models[0])
    assert error(logits(models[1]), want) < 1e-3
    merged, _ = merge_to_dense(models[0], requantize=AffineConfig(8, GROUP))
    assert error(logits(merged), want) < 0.05
    save_checkpoint(merged, tmp_path / "mlx", progress=False)  # nothing is permuted now
    assert error(logits(from_pretrained(tmp_path / "mlx")), logits(merged)) < 1e-5


@pytest.mark.parametrize("method", ["loha", "lokr", "ia3", "oft", "vera", "adalora"])
def test_other_methods_than_lora(method: str, no_fallback: None) -> None:
    config = {
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["o_proj"]),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
        "adalora": lambda: peft.AdaLoraConfig(
            target_modules=["q_proj"], total_step=50, tinit=2, tfinal=2
        ),
    }[method]()
    losses, models = [], []
    for base in (make(), dense_twin(make())):
        torch.manual_seed(1)
        models.append(peft.get_peft_model(base, config))
        losses.append(train(models[-1], 3))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    want = logits(models[0])
    assert error(logits(make()), want) > 1e-4
    assert error(logits(merge_to_dense(models[0])), want) < 1e-4


# ---- prepare_for_lora -----------------------------------------------------------


def test_preparing_freezes_and_casts_nothing() -> None:
    model = make("llama", torch.bfloat16)
    norm = model.model.norm.weight
    norm.requires_grad_(True)
    assert prepare_for_lora(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.norm.weight is norm
    assert model.is_gradient_checkpointing
    settings = model.model.layers[0]._gradient_checkpointing_func.keywords
    assert settings == {"use_reentrant": False}
    assert model.model.embed_tokens(IDS).requires_grad


def test_preparing_without_checkpointing() -> None:
    model = prepare_for_lora(make(), gradient_checkpointing=False)
    assert not model.is_gradient_checkpointing
    assert not model.model.embed_tokens(IDS).requires_grad
    plain = nn.Sequential(nn.Linear(64, 64))
    assert prepare_for_lora(plain, gradient_checkpointing=False) is plain
    with pytest.raises(ValueError, match="gradient_checkpointing=False"):
        prepare_for_lora(plain)


def test_preparing_is_refused_once_there_are_adapters() -> None:
    with pytest.raises(ValueError, match="before get_peft_model or add_adapter"):
        prepare_for_lora(adapted(make(), {}))


def test_preparation_of_peft_keeps_weights_packed() -> None:
    """It takes a packed weight for a 16-bit one and "casts" it to float32."""
    model = make("llama", torch.bfloat16)
    want, size = logits(make()), model.lm_head.weight.nbytes
    peft.prepare_model_for_kbit_training(model)
    weights = [p for p in model.parameters() if is_packed(p)]
    assert len(weights) == 16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight.nbytes == size
    assert error(logits(model), want) < 1e-2


# ---- what changes weights in place is refused -----------------------------------


def test_layers_are_those_of_dense_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.get_peft_model(make(), lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is peft.tuners.lora.Linear


MERGES: dict[str, Callable[[Any], Any]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe_merge": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter, safe": lambda model: model.merge_adapter(safe_merge=True),
}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("merge", MERGES)
def test_merging_in_place_is_refused_and_loses_nothing(
    merge: str, settings: dict[str, Any]
) -> None:
    model = adapted(make(), settings, random=True)
    want = logits(model)
    with pytest.raises((NotImplementedError, RuntimeError)) as raised:
        MERGES[merge](model)
    assert "of 'model.model.layers.0.self_attn.q_proj'" in str(raised.value)
    assert "merge_to_dense(model)" in str(raised.value)
    assert torch.equal(logits(model), want)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    assert error(logits(merge_to_dense(model)), want) < 1e-5


def test_a_merge_that_begins_with_dense_layers_loses_nothing() -> None:
    """PEFT merges layer by layer, and the first packed one stops it."""
    for merge in MERGES.values():
        base = make()
        dequantize_(base.model.layers[0].self_attn.q_proj, progress=False)
        model = adapted(base, {}, random=True)
        want = logits(model)
        with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn\.k_proj"):
            merge(model)
        assert error(logits(model), want) < 1e-5
        assert error(logits(merge_to_dense(model)), want) < 1e-5


def test_folding_leaves_layers_with_adapters_alone() -> None:
    model = make("experts")
    for layer in model.model.layers:
        weight = layer.mlp.experts.down_proj
        order = torch.stack([torch.randperm(weight.shape[-1]) for _ in weight])
        weight.permutation = order.to(torch.int32)
    plain, settings = copy.deepcopy(model), WAYS["experts"][1]
    model = adapted(model, settings, random=True)
    want = logits(model)
    assert fold_permutations_(model) == []
    assert torch.equal(logits(model), want)
    assert len(fold_permutations_(plain)) == 2


def test_the_refusal_of_a_merge() -> None:
    model = adapted(make(), {}, random=True)
    with pytest.raises(NotImplementedError) as raised:
        model.merge_and_unload()
    assert_expected_inline(
        wrapped(str(raised.value)),
        """\
aten.add_.Tensor on a packed weight of
  'model.model.layers.0.self_attn.q_proj': A packed weight cannot be trained
  or changed in place. Train adapters beside it, which merge_to_dense(model)
  merges, or make it dense with dequantize_(model)""",
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_start_from_the_weight(init: str) -> None:
    """They take what they start from out of the base; on dense modules they are right."""
    model = make()
    want = logits(model)
    settings = {"target_modules": ["v_proj"], "init_lora_weights": init}
    with pytest.raises((NotImplementedError, RuntimeError)) as raised:
        adapted(model, settings)
    assert "of 'model.model.layers.0.self_attn.v_proj'" in str(raised.value)
    assert "dequantize_(" in str(raised.value)
    assert torch.equal(logits(model), want)
    for layer in model.model.layers:
        dequantize_(layer.self_attn.v_proj, progress=False)
    model = adapted(model, settings)
    assert error(logits(model), want) < 1e-5
    assert error(logits(merge_to_dense(model)), want) < 1e-5


def test_modules_that_are_to_be_trained_and_saved() -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = make()
    with pytest.raises(
        RuntimeError, match=r"of 'model\.lm_head'.*dequantize_\(model\)"
    ):
        adapted(model, settings)
    model = make()
    dequantize_(model.lm_head, progress=False)
    head = model.lm_head.weight
    model = adapted(model, settings)
    assert train(model)[-1] < 5
    want = logits(model)
    merged = merge_to_dense(model)
    assert error(logits(merged), want) < 1e-5
    assert not torch.equal(merged.lm_head.weight, head)
    assert type(merged.lm_head) is nn.Linear
    assert not any(p.requires_grad for p in merged.parameters())


def test_tokens_that_are_to_be_trained() -> None:
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    with pytest.raises(
        RuntimeError, match=r"of 'model\.model\.embed_tokens'.*dequantize_"
    ):
        adapted(make(), settings)
    model = make()
    dequantize_(model.model.embed_tokens, progress=False)
    model = adapted(model, settings)
    train(model)
    want = logits(model)
    merged = merge_to_dense(model)
    assert error(logits(merged), want) < 1e-5
    assert type(merged.model.embed_tokens) is nn.Embedding


def test_training_the_weights_themselves_is_refused() -> None:
    model = make()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.lm_head.weight.requires_grad = True
    model.requires_grad_(True)  # as torch.nn asks it of all alike
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad


# ---- merge_to_dense -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WAYS)
def test_a_merged_model_computes_the_same(name: str, dtype: torch.dtype) -> None:
    kind, settings = WAYS[name]
    base = make(kind, dtype)
    packed = base.named_parameters(remove_duplicate=False)
    untouched = {n: p for n, p in packed if is_packed(p)}
    before = logits(base)
    model = adapted(base, settings, random=True)
    want = logits(model)
    assert error(before, want) > 0.05
    merged = merge_to_dense(model)
    assert merged is base
    assert error(logits(merged), want) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert not any("peft" in type(m).__module__ for m in merged.modules())
    assert not any(p.requires_grad for p in merged.parameters())
    assert {p.dtype for p in merged.parameters()} == {dtype}
    now = dict(merged.named_parameters())
    left = {n for n, p in now.items() if is_packed(p)}
    assert left < untouched.keys()
    assert all(now[n] is untouched[n] for n in left)


def test_merged_weights_are_rounded_once() -> None:
    base = make("act-order", torch.bfloat16)
    weight = base.model.layers[0].self_attn.q_proj.weight
    model = adapted(base, {}, random=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    delta = layer.get_delta_weight("default").detach()
    merged = merge_to_dense(model)
    want = (weight.dequantize(torch.float32) + delta).bfloat16()
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, want)


def test_merging_some_of_several_adapters() -> None:
    model = adapted(make(), {"target_modules": ["q_proj"]}, random=True)
    torch.manual_seed(2)
    model.add_adapter(
        "second", lora(target_modules=["v_proj"], init_lora_weights=False)
    )
    model.set_adapter("second")
    want = logits(model)
    with pytest.raises(ValueError, match=r"'third'.*; there are default, second"):
        merge_to_dense(model, adapter_names=["third"])
    other = copy.deepcopy(model)
    merged = merge_to_dense(other, adapter_names=["second"])
    assert error(logits(merged), want) < 1e-5
    attention = merged.model.layers[1].self_attn
    assert is_packed(attention.q_proj.weight)
    assert not is_packed(attention.v_proj.weight)
    model.base_model.set_adapter(["default", "second"])
    want = logits(model)
    assert error(logits(merge_to_dense(model)), want) < 1e-5


def test_a_tie_that_an_adapter_breaks(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(make("tied"), {"target_modules": ["lm_head"]}, random=True)
    want = logits(model)
    merged = merge_to_dense(model)
    assert error(logits(merged), want) < 1e-5
    assert is_packed(merged.model.embed_tokens.weight)
    assert not is_packed(merged.lm_head.weight)
    assert merged.config.tie_word_embeddings is False
    assert "they are two weights now" in caplog.text
    merged = merge_to_dense(adapted(make("tied"), {}, random=True))
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_merging_is_refused_with_nothing_changed() -> None:
    with pytest.raises(ValueError, match="has no adapters of PEFT to merge"):
        merge_to_dense(make())
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING has no weights"):
        merge_to_dense(peft.get_peft_model(make(), prompt))
    model = adapted(make(), {}, random=True)
    want = logits(model)
    with pytest.raises(ValueError, match=r"down_proj\.weight cannot be requantized"):
        merge_to_dense(model, requantize=AffineConfig(4, 128))
    assert torch.equal(logits(model), want)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    kept = layer.lora_B["default"].weight.detach().clone()
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: NaNs"):
        merge_to_dense(model)
    layer.lora_B["default"].weight.data.copy_(kept)
    assert torch.equal(logits(model), want)


# ---- files ----------------------------------------------------------------------


def test_requantizing_reports_what_it_loses(caplog: pytest.LogCaptureFixture) -> None:
    losses = {}
    for bits in (4, 8):
        model = adapted(make(), {})
        train(model)
        want = logits(model)
        merged, report = merge_to_dense(model, requantize=AffineConfig(bits, GROUP))
        assert str(report) in caplog.text
        assert len(report.losses) == 14
        weight = merged.model.layers[0].mlp.up_proj.weight
        assert (weight.bits, weight.group_size) == (bits, GROUP)
        loss = report.losses["model.layers.0.mlp.up_proj.weight"]
        losses[bits] = loss.change, error(logits(merged), want)
    # An eighth of a step at four bits; sixteen times finer at eight.
    assert 8 < losses[4][0] / losses[8][0] < 32
    assert losses[8][1] < 0.01 < losses[4][1]


def test_the_report_in_words() -> None:
    model = adapted(make(), {"target_modules": ["q_proj"]}, random=True)
    _, report = merge_to_dense(model, requantize=AffineConfig(8, GROUP))
    loss = report.losses["model.layers.1.self_attn.q_proj.weight"]
    assert 0 < loss.weight < loss.change < 0.2
    lines = str(report).split(";")
    assert lines[0].startswith("2 merged weights were requantized, which costs ")
    assert " of the change" in lines[1]


@pytest.mark.parametrize("name", ["act-order", "tied embeddings", "experts", "conv1d"])
def test_requantized_weights_of_all_kinds(name: str) -> None:
    kind, settings = WAYS[name]
    model = adapted(make(kind), settings, random=True)
    want = logits(model)
    merged, report = merge_to_dense(model, requantize=AffineConfig(8, GROUP))
    assert error(logits(merged), want) < 0.03
    for own in report.losses:
        assert is_packed(merged.get_parameter(own))


def test_a_merged_model_is_an_mlx_checkpoint(tmp_path: Path) -> None:
    from architectures import mlx_logits

    model = adapted(make("tied"), {}, random=True)
    merged, _ = merge_to_dense(model, requantize=AffineConfig(8, GROUP))
    want = logits(merged)
    save_checkpoint(merged, tmp_path / "one", progress=False)
    merged.save_pretrained(tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "two"):
        again = from_pretrained(folder)
        assert error(logits(again), want) < 1e-5
        assert is_packed(again.model.layers[0].mlp.up_proj.weight)
    assert error(mlx_logits(tmp_path / "one", IDS), want) < 1e-5
    # Partly dense, as without requantizing.
    merged = merge_to_dense(adapted(make("tied"), {}, random=True))
    want = logits(merged)
    save_checkpoint(merged, tmp_path / "three", progress=False)
    assert error(logits(from_pretrained(tmp_path / "three")), want) < 1e-5
    assert error(mlx_logits(tmp_path / "three", IDS), want) < 1e-5


def test_a_merged_model_is_a_stock_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(make("tied"), tmp_path / "packed", progress=False)
    model = adapted(from_pretrained(tmp_path / "packed"), {}, random=True)
    want = logits(model)
    merged = merge_to_dense(model)
    dequantize_(merged, progress=False)  # the embedding had no adapter
    merged.save_pretrained(tmp_path / "dense")
    assert "quantization" not in (tmp_path / "dense" / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert error(logits(again), want) < 1e-5


@pytest.mark.parametrize("name", ["lora", "embeddings and head", "dora", "experts"])
def test_an_adapter_is_saved_as_peft_saves_it(name: str, tmp_path: Path) -> None:
    kind, settings = WAYS[name]
    model = adapted(make(kind), settings, random=True)
    want = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    again = peft.PeftModel.from_pretrained(make(kind), tmp_path)
    assert error(logits(again), want) < 1e-6
    twin = peft.PeftModel.from_pretrained(dense_twin(make(kind)), tmp_path)
    assert error(logits(twin), want) < 1e-4
