"""What PEFT's own tests ask of a quantization backend, asked of packed weights.

All methods of PEFT that stand on linear layers or embeddings, and what is done with
adapters: each is as on the dense twin, or an error names the module.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from affine_tensor import dequantize_, merge_to_dense, prepare_for_lora

peft = pytest.importorskip("peft", reason="peft makes the adapters")

from test_peft import IDS, dense_twin, error, is_packed, make  # noqa: E402

AT = {"target_modules": ["q_proj", "down_proj"]}
LM = {"task_type": "CAUSAL_LM"}
FIRST = "model.layers.0.self_attn.q_proj"
TASKS = {"task_ids": torch.zeros(2, dtype=torch.long)}

METHODS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: peft.AdaLoraConfig(total_step=9, tinit=1, tfinal=1, **AT),
    "adamss": lambda: peft.AdamssConfig(**AT),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, **LM
    ),
    "beft": lambda: peft.BeftConfig(target_modules=["v_proj"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **AT),
    "c3a": lambda: peft.C3AConfig(block_size=32, **AT),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=4, **LM),
    "cpt": lambda: peft.CPTConfig(
        cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **LM
    ),
    "deft": lambda: peft.DeftConfig(**AT),
    "delora": lambda: peft.DeloraConfig(**AT),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, **AT),
    "frod": lambda: peft.FrodConfig(**AT),
    "glora": lambda: peft.GloraConfig(**AT),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, **AT),
    "hira": lambda: peft.HiraConfig(r=4, **AT),
    "hira of embeddings": lambda: peft.HiraConfig(r=4, target_modules=["embed_tokens"]),
    "hra": lambda: peft.HRAConfig(r=4, **AT),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **AT),
    "lily": lambda: peft.LilyConfig(r=4, **AT),
    "ln tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "loha": lambda: peft.LoHaConfig(r=4, **AT),
    "lokr": lambda: peft.LoKrConfig(r=4, **AT),
    "miss": lambda: peft.MissConfig(r=2, **AT),
    "miss bat": lambda: peft.MissConfig(r=2, init_weights="bat", **AT),
    "miss mini": lambda: peft.MissConfig(r=2, init_weights="mini", mini_r=2, **AT),
    "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, **AT),
    "oft of embeddings": lambda: peft.OFTConfig(
        r=4, oft_block_size=0, target_modules=["embed_tokens"]
    ),
    "osf": lambda: peft.OSFConfig(**AT),
    "p tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=2, encoder_hidden_size=16, **LM
    ),
    "peanut": lambda: peft.PeanutConfig(**AT),
    "poly": lambda: peft.PolyConfig(r=4, n_tasks=1, n_skills=2, **AT, **LM),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, **LM),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, **LM),
    "prompt tuning, tasks": lambda: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=2, num_tasks=1, **LM
    ),
    "psoft": lambda: peft.PsoftConfig(r=4, **AT),
    "pvera": lambda: peft.PveraConfig(r=4, **AT),
    "randlora": lambda: peft.RandLoraConfig(r=4, **AT),
    "road": lambda: peft.RoadConfig(**AT),
    "shadow": lambda: peft.ShadowConfig(**LM),
    "supertuning": lambda: peft.SupertuningConfig(**AT),
    "tinylora": lambda: peft.TinyLoraConfig(**AT),
    "unilora": lambda: peft.UniLoraConfig(r=4, **AT),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=32, **AT),
    "vera": lambda: peft.VeraConfig(r=4, **AT),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=20, **AT),
}
# Those that are asked of the weight itself, to start from its norm or singular vectors
# or to multiply it: the log says so. All others run on packed weights alone.
DENSE = {"delora", "frod", "glora", "hira", "hira of embeddings", "miss bat", "osf"}
DENSE |= {"psoft", "supertuning", "tinylora", "mica"}
# What PEFT does not merge into dense weights either, and what it says.
UNMERGED = {
    "beft": "v_proj: Base layer has no bias",
    "lily": f"{FIRST}: This method is not supported for Lily",
    "poly": f"{FIRST}: Linear has no merge",
    "shadow": "model.layers.0: ShadowPEFT cannot be merged",
    "alora": f"{FIRST}: aLoRA does not support safe merging",
    "lora bias": f"{FIRST}: Impossible to merge LoRA",
}


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 4} | AT | LM | settings))


def of_lora(name: str, **settings: Any) -> Any:
    """A sub-configuration of LoRA's."""
    from peft.tuners.lora import config

    return getattr(config, name)(**settings)


def with_eva(base: Any) -> Any:
    model = built(base, lora(init_lora_weights="eva", eva_config=peft.EvaConfig()))
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    peft.initialize_lora_eva_weights(model, [batch] * 2, show_progress_bar=False)
    return model


def settings_of_lora() -> dict[str, Callable[[], Any]]:
    blocks = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down_proj"]}
    return {
        "dora": lambda: lora(use_dora=True),
        "rslora": lambda: lora(use_rslora=True, lora_alpha=3),
        "gaussian": lambda: lora(init_lora_weights="gaussian"),
        "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
        "mica": lambda: lora(init_lora_weights="mica"),
        "patterns": lambda: lora(
            rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}
        ),
        "dropout": lambda: lora(lora_dropout=0.3),
        "lora bias": lambda: lora(lora_bias=True),
        "replicated layers": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
        "alora": lambda: lora(alora_invocation_tokens=[3, 9]),
        "qalora": lambda: lora(use_qalora=True, qalora_group_size=16),
        "velora": lambda: lora(velora_config=of_lora("VeloraConfig", num_groups=16)),
        "monteclora": lambda: lora(monteclora_config=of_lora("MontecloraConfig")),
        "bdlora": lambda: lora(use_bdlora=of_lora("BdLoraConfig", nblocks=2, **blocks)),
    }


WAYS = METHODS | settings_of_lora() | {"eva": lambda: None}


def built(base: Any, config: Any, way: str = "") -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_eva(base) if way == "eva" else peft.get_peft_model(base, config)


def with_way(base: Any, way: str, *, random: bool = False) -> Any:
    if way == "adamss":
        pytest.importorskip("sklearn", reason="AdaMSS clusters with scikit-learn")
    model = built(base, WAYS[way](), way)
    return randomized(model) if random else model


def randomized(model: Any) -> Any:
    torch.manual_seed(4)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def inputs(way: str) -> dict[str, Tensor]:
    return TASKS if way in ("poly", "prompt tuning, tasks") else {}


@torch.no_grad()
def logits(model: Any, way: str = "", **more: Any) -> Tensor:
    torch.manual_seed(0)  # some methods draw, in evaluation too
    return model(input_ids=IDS, **inputs(way), **more).logits[:, -IDS.shape[1] :]


def train(model: Any, way: str = "", autocast: bool = False) -> list[float]:
    """Two steps, and the losses before each."""
    optimizer = torch.optim.SGD(
        (p for p in model.parameters() if p.requires_grad), 1e-2
    )
    labels = IDS[:, :1].expand_as(IDS)
    model.train()
    losses = []
    for seed in (3, 4):
        torch.manual_seed(seed)  # of dropout and of what methods draw
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(input_ids=IDS, use_cache=False, **inputs(way)).logits
            y = y[:, -IDS.shape[1] :].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(y.float(), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


class Kept:
    """The parts of packed weights as they were."""

    def __init__(self, model: Any) -> None:
        named = model.named_parameters(remove_duplicate=False)
        self.weights = {n: p for n, p in named if is_packed(p)}
        self.parts = {
            n: [x.clone() for x in p._parts()] for n, p in self.weights.items()
        }
        assert len(self.weights) > 8

    def check(self) -> None:
        for name, weight in self.weights.items():
            assert all(map(torch.equal, weight._parts(), self.parts[name])), name
            assert not weight.requires_grad
            assert weight.grad is None


# ---- every method ---------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_training_is_that_of_the_dense_twin(way: str, fallbacks: list[str]) -> None:
    base = make()
    before, kept = logits(base), Kept(base)
    twin = with_way(dense_twin(base), way)
    dense = {n: p.clone() for n, p in base.named_parameters() if not is_packed(p)}
    model = with_way(base, way)
    assert error(logits(model, way), logits(twin, way)) < 1e-5
    torch.testing.assert_close(train(model, way), train(twin, way), rtol=1e-5, atol=0)
    assert error(logits(model, way), logits(twin, way)) < 1e-5
    kept.check()
    after = logits(randomized(model), way)
    assert error(after, logits(randomized(twin), way)) < 1e-4
    assert error(after, before) > 1e-4
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained
    for name, parameter in base.named_parameters():
        if name in dense and id(parameter) not in trained:
            assert torch.equal(parameter, dense[name]), name
    if way not in DENSE:
        assert not fallbacks
    if way != "replicated layers":  # of them, the base has more layers than before
        with model.disable_adapter():
            assert torch.equal(logits(model), before)
    kept.check()


@pytest.mark.parametrize("way", WAYS)
def test_adapters_are_saved_and_loaded(way: str, tmp_path: Path) -> None:
    model = with_way(make(), way, random=True)
    want = logits(model, way)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        again = peft.PeftModel.from_pretrained(make(), tmp_path)
        twin = peft.PeftModel.from_pretrained(dense_twin(make()), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not [n for n in saved if "base_layer" in n or "scales" in n]
    assert error(logits(again, way), want) < 1e-6
    assert error(logits(twin, way), want) < 1e-4


# Permuted channels have no packed views, and so take other ways in these.
PERMUTED = ["supertuning", "frod", "hira", "oft", "miss bat", "glora", "ia3", "dora"]


@pytest.mark.parametrize(
    ("way", "kind"),
    [(way, "llama") for way in WAYS] + [(way, "act-order") for way in PERMUTED],
)
def test_merges_in_place_are_refused_and_lose_nothing(way: str, kind: str) -> None:
    if (way, kind) == ("frod", "act-order"):
        with pytest.raises(ValueError, match=r"different permutations.*dequantize"):
            with_way(make(kind), way)
        return
    base = make(kind)
    kept = Kept(base)
    model = with_way(base, way, random=True)
    logits(model, way)  # CPT projects its tokens in the first forward
    want = logits(model, way)
    for safe in (False, True):
        if way == "ln tuning":  # no packed weight is changed
            model.merge_adapter(safe_merge=safe)
            assert error(logits(model), want) < 1e-6
            model.unmerge_adapter()
        elif hasattr(model.base_model, "merge_adapter"):
            with pytest.raises(
                (NotImplementedError, RuntimeError, ValueError)
            ) as raised:
                model.merge_adapter(safe_merge=safe)
            if way not in UNMERGED:
                text = str(raised.value)
                assert "packed weight" in text or "AffineQuantizedTensor" in text
                assert "of 'model.model." in text
                assert "dequantize" in text
        assert torch.equal(logits(model, way), want)
        kept.check()
    if way in UNMERGED:
        with pytest.raises(ValueError, match=UNMERGED[way]):
            merge_to_dense(model)
        assert torch.equal(logits(model, way), want)
    elif not isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner):
        with pytest.raises(ValueError, match="has no weights that could be merged"):
            merge_to_dense(model)
    else:
        assert error(logits(merge_to_dense(model)), want) < 1e-4


LOW = ["ia3", "vera", "boft", "miss", "oft", "dora", "gralora", "prompt tuning"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", LOW)
def test_methods_in_bfloat16(way: str, autocast: bool, no_fallback: None) -> None:
    """The model in bfloat16; autocast of a model in float32."""
    dtype = torch.float32 if autocast else torch.bfloat16
    models = [make("llama", dtype), dense_twin(make("llama", dtype))]
    models = [with_way(base, way) for base in models]
    losses = [train(model, way, autocast) for model in models]
    torch.testing.assert_close(*losses, rtol=5e-3, atol=0)
    assert error(*(logits(randomized(model), way) for model in models)) < 3e-2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["ia3", "loha", "oft", "miss bat", "dora", "dropout"])
def test_methods_with_gradient_checkpointing(way: str, reentrant: bool) -> None:
    models = []
    for checkpointing in (False, True):
        base = prepare_for_lora(make(), gradient_checkpointing=checkpointing)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        models.append(with_way(base, way))
    torch.testing.assert_close(*(train(m, way) for m in models), rtol=1e-6, atol=0)
    assert error(*(logits(model) for model in models)) < 1e-6


# ---- with the backend added to PEFT ---------------------------------------------

# What PEFT's test file of quantization runs for each backend it knows.
KNOWN: dict[str, Callable[[], Any]] = {
    "boft": METHODS["boft"],
    "miss": METHODS["miss"],
    "miss bat": METHODS["miss bat"],
    "shira": lambda: peft.ShiraConfig(r=4, **AT),
    "vera": METHODS["vera"],
}


@pytest.fixture
def added_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT as it would be if it knew of packed weights."""
    from peft.utils import quantization_utils

    resolve = quantization_utils.resolve_quantization_backend

    class Backend(quantization_utils.QuantizationBackend):
        layer_type = "linear"
        backend_name = "affine"

        def get_base_weight(self, base_layer: Any) -> Tensor:
            weight = base_layer.weight
            return weight.dequantize() if is_packed(weight) else weight.data

        def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
            peft_layer.get_base_layer().weight.data = weight_data

    def find(base_layer: Any, **kwargs: Any) -> Any:
        if is_packed(getattr(base_layer, "weight", None)):
            return Backend()
        return resolve(base_layer, **kwargs)

    for module in [m for n, m in sys.modules.items() if n.startswith("peft.")]:
        if getattr(module, "resolve_quantization_backend", None) is resolve:
            monkeypatch.setattr(module, "resolve_quantization_backend", find)


@pytest.mark.parametrize("way", KNOWN)
def test_methods_that_know_the_backend(way: str, added_backend: None) -> None:
    base = make()
    before, kept = logits(base), Kept(base)
    if way == "miss bat":  # without the backend it works
        with pytest.raises(ValueError, match="backend affine does not support"):
            built(base, KNOWN[way]())(IDS)
        return
    model, twin = (built(b, KNOWN[way]()) for b in (base, dense_twin(base)))
    layers = [
        module
        for module in model.modules()
        if getattr(module, "quantization_backend", None) is not None
    ]
    assert len(layers) == 4
    assert all("quantization_backend='affine'" in repr(layer) for layer in layers)
    torch.testing.assert_close(train(model), train(twin), rtol=1e-5, atol=0)
    want = logits(randomized(model))
    assert error(want, logits(randomized(twin))) < 1e-5
    assert error(want, before) > 1e-3
    for safe in (False, True):
        with pytest.raises((NotImplementedError, RuntimeError), match=rf"of .*{FIRST}"):
            model.merge_adapter(safe_merge=safe)
        assert torch.equal(logits(model), want)
    kept.check()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert error(logits(merge_to_dense(model)), want) < 1e-5


def test_shira_adds_to_the_weight_itself() -> None:
    """Where PEFT does not know the backend."""
    model = built(make(), KNOWN["shira"]())
    with pytest.raises(NotImplementedError, match=f"of '.*{FIRST}'.*dequantize_"):
        model(IDS)


def test_trainable_tokens_copy_rows_of_the_weight() -> None:
    config = peft.TrainableTokensConfig(
        token_indices=[3, 5], target_modules=["embed_tokens"]
    )
    base = make()
    want = logits(base)
    with pytest.raises(RuntimeError, match=r"of '.*embed_tokens'.*dequantize_"):
        built(base, config)
    assert torch.equal(logits(base), want)
    dequantize_(base.model.embed_tokens, progress=False)
    assert error(logits(built(base, config)), want) < 1e-5


# ---- adapters that start from the weight ----------------------------------------


def with_corda(base: Any, method: str) -> Any:
    pytest.importorskip("attr", reason="CorDA's module imports attrs")
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        with torch.no_grad():
            for row in IDS:
                base(row[None])

    config = of_lora("CordaConfig", corda_method=method)
    settings = lora(init_lora_weights="corda", corda_config=config)
    preprocess_corda(base, settings, run_model=run)
    return built(base, settings)


def with_lora_ga(base: Any) -> Any:
    from peft.tuners.lora.loraga import preprocess_loraga

    settings = lora(init_lora_weights="lora_ga", lora_ga_config=of_lora("LoraGAConfig"))
    preprocess_loraga(
        base, settings, lambda: base(input_ids=IDS, labels=IDS).loss.backward()
    )
    return built(base, settings)


def with_loftq(base: Any) -> Any:
    """With a stand-in for what quantizes there, which needs CUDA."""
    pytest.importorskip("scipy", reason="LoftQ's configuration asks for it")

    def quantized(weight: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        left, rank = weight.new_ones(weight.shape[0], 4), weight.new_ones(4, 1)
        return (weight * 8).round() / 8, rank.expand(4, weight.shape[1]).clone(), left

    settings = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    with mock.patch("peft.tuners.lora.layer.loftq_init", quantized):
        return built(base, settings)


STARTS: dict[str, Callable[[Any], Any]] = {
    "pissa": lambda base: built(base, lora(init_lora_weights="pissa")),
    "olora": lambda base: built(base, lora(init_lora_weights="olora")),
    "kasa": lambda base: built(base, lora(kasa_config=of_lora("KasaConfig"))),
    "corda": lambda base: with_corda(base, "ipm"),
    "corda, of knowledge": lambda base: with_corda(base, "kpm"),
    "lora-ga": with_lora_ga,
    "loftq": with_loftq,
}


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_rewrite_the_weight_are_refused(start: str) -> None:
    base = make()
    want, kept = logits(base), Kept(base)
    with pytest.raises((NotImplementedError, RuntimeError)) as raised:
        STARTS[start](base)
    assert f"{FIRST}'" in str(raised.value)
    assert "dequantize_(" in str(raised.value)
    kept.check()
    assert torch.equal(logits(base), want)
    # Made dense as the error says, these modules start as those of the twin.
    base = make()
    for layer in base.model.layers:
        dequantize_(layer.self_attn.q_proj, progress=False)
        dequantize_(layer.mlp.down_proj, progress=False)
    twin = STARTS[start](dense_twin(base))
    model = STARTS[start](base)
    # Their singular vectors may come out with other signs.
    assert error(logits(model), logits(twin)) < 1e-4
    assert is_packed(base.model.layers[0].mlp.up_proj.weight)


# ---- several adapters -----------------------------------------------------------


def with_two(base: Any, **second: Any) -> Any:
    model = built(base, lora())
    torch.manual_seed(2)
    model.add_adapter(
        "second", lora(**({"r": 2, "target_modules": ["v_proj"]} | second))
    )
    for name in ("second", "default"):
        model.set_adapter(name)
        randomized(model)
    return model


def test_several_adapters(no_fallback: None) -> None:
    base = make()
    before, kept = logits(base), Kept(base)
    twin, model = with_two(dense_twin(base)), with_two(base)
    seen = [before]
    for name in ("default", "second"):
        model.set_adapter(name)
        twin.set_adapter(name)
        assert error(logits(model), logits(twin)) < 1e-5
        assert all(error(logits(model), other) > 1e-3 for other in seen)
        seen.append(logits(model))
    names = ["second", "__base__"]
    mixed = logits(model, adapter_names=names)
    assert error(mixed[0], seen[2][0]) < 1e-5
    assert error(mixed[1], before[1]) < 1e-5
    assert error(mixed, logits(twin, adapter_names=names)) < 1e-5
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), seen[1])
    kept.check()


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "dare_linear"])
def test_weighted_sums_of_adapters(how: str, no_fallback: None) -> None:
    results = []
    for base in (make(), dense_twin(make())):
        model = with_two(base, r=4, target_modules=AT["target_modules"])
        torch.manual_seed(5)
        model.add_weighted_adapter(
            ["default", "second"], [0.7, 0.3], "sum", combination_type=how, density=0.5
        )
        model.set_adapter("sum")
        results.append(logits(model))
    assert error(*results) < 1e-5


def test_loading_without_memory_and_swapping(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    model = with_two(make())
    want = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), want)
    again.load_adapter(tmp_path / "second", "other", low_cpu_mem_usage=True)
    again.set_adapter("other")
    assert torch.equal(logits(again), second)
    base = make()
    base.load_adapter(str(tmp_path))  # of transformers
    assert torch.equal(logits(base), want)
    model = built(make(), lora())
    hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model.eval()), want)


def test_methods_mixed_in_one_model() -> None:
    models = []
    for base in (make(), dense_twin(make())):
        torch.manual_seed(1)
        model = peft.PeftMixedModel(base, lora())
        model.add_adapter("loha", peft.LoHaConfig(r=4, target_modules=["q_proj"]))
        model.set_adapter(["default", "loha"])
        models.append(randomized(model))
    want = logits(models[1])
    assert error(logits(models[0]), want) < 1e-5
    with pytest.raises(NotImplementedError, match=f"of '.*{FIRST}"):
        models[0].merge_and_unload()
    assert error(logits(models[0]), want) < 1e-5


def test_a_mixture_of_adapters(tmp_path: Path) -> None:
    with_two(make()).save_pretrained(tmp_path)
    adapters = {"0": str(tmp_path), "1": str(tmp_path / "second")}
    results = []
    for base in (make(), dense_twin(make())):
        base.config.use_cache = False
        config = peft.XLoraConfig(hidden_size=128, adapters=adapters, **LM)
        results.append(logits(built(base, config).eval()))
    assert error(*results) < 1e-5
    assert error(results[0], logits(make())) > 1e-3


# ---- compiled -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.bfloat16, {}),
        ("act-order", torch.float32, {"use_dora": True}),
    ],
    ids=["lora", "lora in bfloat16", "dora, act-order"],
)
def test_one_graph_forward_and_backward(
    kind: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    base = make(kind, dtype)
    del base.model.layers[1]
    model = randomized(built(base, lora(**settings))).train()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for run in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = run(input_ids=IDS, labels=IDS, use_cache=False).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
    assert counter.frame_count == 1
    assert len(results[0]) > 4
    for got, want in zip(*results, strict=True):
        assert float(want.norm()) > 0
        assert error(got, want) < (1e-5 if dtype == torch.float32 else 2e-2)
