"""calibrate_ and choose_bits: less loss in the same format."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    calibrate_,
    choose_bits,
    dequantize_,
    footprint,
    layout,
    quantize_,
    save_checkpoint,
)
from affine_tensor.calibrate import Recipe
from affine_tensor.calibrate.sensitivity import solve
from affine_tensor.calibrate.solve import round_weight
from affine_tensor.calibrate.walk import Walk

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def inputs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated, of unlike size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator)
    return x @ mix * torch.rand(columns, generator=generator)


def output_error(w: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> float:
    """The oracle: what the outputs change by, squared, in float64."""
    return float((x.double() @ (w.double() - v.double()).T).square().sum())


def dense_of(rounded: Any, bits: int, group_size: int) -> torch.Tensor:
    packed = layout.pack(rounded.codes, bits=bits)
    return layout.dequantize(
        packed,
        rounded.scales,
        rounded.biases,
        bits=bits,
        group_size=group_size,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_outputs_change_less_than_with_plain_rounding(
    bits: int, dtype: torch.dtype
) -> None:
    x = inputs(1000, 128)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    rounded = round_weight(weight, x.T.double() @ x.double(), bits=bits, group_size=32)
    assert rounded.scales.dtype == rounded.biases.dtype == dtype
    parts = layout.quantize(weight, bits=bits, group_size=32)
    plain = layout.dequantize(*parts, bits=bits, group_size=32, dtype=torch.float32)
    ours = output_error(weight, dense_of(rounded, bits, 32), x)
    theirs = output_error(weight, plain, x)
    assert ours < 0.6 * theirs
    # What it says of itself is the truth, with the damping: that many more inputs.
    more = 0.01 * x.double().square().sum(0).mean()
    x = torch.cat([x, more.sqrt() * torch.eye(128)])
    ours = output_error(weight, dense_of(rounded, bits, 32), x)
    told = rounded.error / rounded.plain_error
    assert told == pytest.approx(ours / output_error(weight, plain, x), rel=1e-3)


def test_sweeps_never_raise_the_error() -> None:
    x = inputs(500, 64)
    hessian = x.T @ x
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    errors = [
        round_weight(weight, hessian, bits=3, group_size=32, sweeps=n).error
        for n in range(5)
    ]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_weights_that_the_format_holds_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 8, (8, 64), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = 0, 7  # every group uses its whole range
    weight = codes * 0.25 - 0.75
    x = inputs(200, 64)
    rounded = round_weight(weight, x.T @ x, bits=3, group_size=32)
    assert torch.equal(dense_of(rounded, 3, 32), weight)


def test_without_a_hessian_the_squared_error_falls() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(4))
    rounded = round_weight(weight, None, bits=3, group_size=64)
    eye = torch.eye(128)
    parts = layout.quantize(weight, bits=3, group_size=64)
    plain = layout.dequantize(*parts, bits=3, group_size=64)
    assert output_error(weight, dense_of(rounded, 3, 64), eye) < 0.9 * output_error(
        weight, plain, eye
    )


def test_a_hessian_of_zeros_and_one_of_low_rank() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    for x in (torch.zeros(4, 64), inputs(3, 64)):
        rounded = round_weight(weight, x.T @ x, bits=4, group_size=32)
        assert rounded.error <= rounded.plain_error
        assert bool(rounded.scales.isfinite().all())


def tiny(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval().to(dtype)
    with torch.no_grad():  # as initialised, attention is flat and logits are near zero
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def tokens(count: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 96, (2, 32), generator=generator) for _ in range(count)]


def divergence(model: nn.Module, dense: nn.Module) -> float:
    """From the dense model's predictions, on tokens that were not calibrated on."""
    with torch.no_grad():
        (ids,) = tokens(1, seed=9)
        own = model(ids).logits.double().log_softmax(-1)
        target = dense(ids).logits.double().log_softmax(-1)
    return float((target.exp() * (target - own)).sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_loses_less(tied: bool) -> None:
    dense, config = tiny(tied), AffineConfig(3, 32)
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    quantize_(plain, config, progress=False)
    report = calibrate_(model, tokens(), config, progress=False)
    assert report.tokens == 6 * 64
    assert divergence(model, dense) < 0.8 * divergence(plain, dense)
    assert footprint(model).bytes == footprint(plain).bytes
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tied
    assert sorted(report.errors) == sorted(report.quantized)
    assert all(part < 1 for part in report.errors.values())
    assert "calibrated on 384 tokens" in str(report)


def test_tuning_scales_wins_more_and_leaves_the_codes() -> None:
    dense, config = tiny(), AffineConfig(2, 32)
    model, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrate_(model, tokens(), config, progress=False)
    report = calibrate_(
        tuned, tokens(), config, tune_steps=30, learning_rate=1e-2, progress=False
    )
    assert report.divergence is not None
    before, after = report.divergence
    assert after < 0.95 * before
    assert divergence(tuned, dense) < divergence(model, dense)
    for one, other in zip(model.parameters(), tuned.parameters(), strict=True):
        if isinstance(one, AffineQuantizedTensor):
            assert isinstance(other, AffineQuantizedTensor)
            assert torch.equal(one.packed, other.packed)


def test_the_same_data_gives_the_same_weights() -> None:
    models = [tiny(), tiny()]
    for model in models:
        calibrate_(model, tokens(), AffineConfig(3, 32), progress=False)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        if isinstance(one, AffineQuantizedTensor):
            assert isinstance(other, AffineQuantizedTensor)
            assert torch.equal(one.packed, other.packed)
            assert torch.equal(one.scales, other.scales)
            assert torch.equal(one.biases, other.biases)


def test_blocks_that_are_done_are_not_run_again() -> None:
    model = tiny()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    batches = [{"input_ids": ids} for ids in tokens(2)]
    with torch.no_grad():
        walk = Walk(model, batches, linears)
        assert walk.is_chain
        assert [len(group.names) for group in walk.groups] == [3, 1, 2, 1] * 3 + [1]
        name = walk.groups[8].names[0]  # of the last block
        whole = walk.sums_of_squares([linears[name]], 2)
        walk.finish(1)
        ran = []
        inner = model.model.layers[0].mlp.down_proj
        hook = inner.register_forward_hook(lambda *a: ran.append(a))
        short = walk.sums_of_squares([linears[name]], 2)
        hook.remove()
    assert whole is not None
    assert short is not None
    assert torch.equal(whole, short)
    assert not ran
    assert not any("forward" in m.__dict__ for m in model.modules())


class Crossing(nn.Module):
    """Blocks that are no chain: the second sees the input of the first too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.unused = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x).relu() + x)


def test_other_models_run_whole_and_report_what_was_not_reached() -> None:
    model, x = Crossing(), inputs(256, 64)
    dense = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"unused\.weight: no token"):
        calibrate_(model, [x], AffineConfig(3, 32), progress=False)
    assert type(model.layers[0].weight) is nn.Parameter
    report = calibrate_(
        model, [x], AffineConfig(3, 32), uncovered="plain", progress=False
    )
    assert list(report.plain) == ["unused"]
    plain = copy.deepcopy(dense)
    quantize_(plain, AffineConfig(3, 32), progress=False)
    wanted = dense(x)
    error = (model(x) - wanted).square().sum()
    assert error < 0.7 * (plain(x) - wanted).square().sum()


def test_a_mask_leaves_padding_out() -> None:
    (ids,) = tokens(1)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    cut = {"input_ids": ids[:, :20], "attention_mask": mask[:, :20]}
    sums = []
    for batch in (padded, cut):
        model = tiny()
        names = {"model.layers.1.mlp.up_proj": model.model.layers[1].mlp.up_proj}
        with torch.no_grad():
            walk = Walk(model, [batch], names)
            sums.append(walk.sums_of_squares(list(names.values()), None))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "options", "error", "text"),
    [
        ([], {}, ValueError, "the list is empty"),
        ("text", {}, TypeError, "put it into a list"),
        (["text"], {}, ValueError, "need a tokenizer"),
        ([torch.zeros(1, 20, dtype=torch.long)], {}, ValueError, "only 20 tokens"),
        ([{"input_ids": torch.zeros(1, 64)}, "a"], {}, TypeError, "mixes dict, str"),
        (tokens(), {"uncovered": "skip"}, ValueError, "uncovered is 'skip'"),
        (tokens(), {"config": 4}, TypeError, "config is 4"),
    ],
)
def test_what_is_not_right_is_refused(
    data: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = tiny()
    with pytest.raises(error, match=text):
        calibrate_(model, data, progress=False, **options)
    assert not any(isinstance(p, AffineQuantizedTensor) for p in model.parameters())


@pytest.mark.parametrize("place", ["weight", "activation"])
def test_nan_is_refused_and_the_model_stays_as_it_was(place: str) -> None:
    model = tiny().train()
    layer = model.model.layers[2]
    with torch.no_grad():
        if place == "weight":
            layer.mlp.up_proj.weight[3, 5] = float("nan")
        else:
            layer.input_layernorm.weight[0] = float("inf")
    before = {name: id(p) for name, p in model.named_parameters()}
    which = r"layers\.2\.mlp\.up_proj" if place == "weight" else r"layers\.2\.self_attn"
    with pytest.raises(ValueError, match=which):
        calibrate_(
            model,
            tokens(),
            AffineConfig(3, 32),
            compute_dtype=torch.float64,
            progress=False,
        )
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())


def test_a_filter_makes_a_mixed_recipe() -> None:
    model = tiny()

    def choose(module: nn.Module, name: str) -> bool | AffineConfig:
        return AffineConfig(4, 64) if "down" in name else "lm_head" not in name

    calibrate_(model, tokens(), AffineConfig(2, 32), choose, progress=False)
    layer = model.model.layers[0].mlp
    assert (layer.down_proj.weight.bits, layer.down_proj.weight.group_size) == (4, 64)
    assert (layer.up_proj.weight.bits, layer.up_proj.weight.group_size) == (2, 32)
    assert type(model.lm_head.weight) is nn.Parameter


@pytest.mark.parametrize("tied", [False, True])
def test_mlx_lm_gives_the_same_logits(tied: bool, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    import mlx.core as mx

    model, (ids,) = tiny(tied), tokens(1, seed=9)
    recipe = choose_bits(
        model, tokens(2), bits_per_weight=4.5, group_size=32, progress=False
    )
    calibrate_(model, tokens(), filter_fn=recipe, progress=False)
    save_checkpoint(model, tmp_path / "out", progress=False)
    with mx.stream(mx.cpu):
        theirs, _ = mlx_lm.load_model(tmp_path / "out")
        logits = torch.tensor(theirs(mx.array(ids.numpy())).tolist())
    dequantize_(model, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_bits_are_chosen_by_loss_under_the_budget(tmp_path: Path) -> None:
    model = tiny(tied=True)
    with torch.no_grad():  # an MLP that does nothing deserves the fewest bits
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    before = {name: id(p) for name, p in model.named_parameters()}
    recipe = choose_bits(
        model, tokens(2), bits_per_weight=5.0, group_size=32, progress=False
    )
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert 4.5 < recipe.bits_per_weight <= 5.0
    for own in ("gate_proj", "up_proj", "down_proj"):
        assert recipe.modules[f"model.layers.1.mlp.{own}"] == AffineConfig(2, 32)
    assert recipe.modules["lm_head"] == recipe.modules["model.embed_tokens"]
    recipe.save(tmp_path / "recipe.json")
    again = Recipe.load(tmp_path / "recipe.json")
    assert again.modules == recipe.modules
    quantize_(model, filter_fn=again, progress=False)
    packed = {
        id(p): p.nbytes
        for p in model.parameters()
        if isinstance(p, AffineQuantizedTensor)
    }
    assert sum(packed.values()) == recipe.bytes


def test_the_budget_is_spent_where_a_byte_saves_most() -> None:
    losses = [[1.0, 0.2, 0.1], [0.5, 0.4, 0.0], [0.1, 0.3, 0.2]]
    sizes = [[2, 3, 4]] * 3
    assert solve(losses, sizes, 6) == [0, 0, 0]
    assert solve(losses, sizes, 7) == [1, 0, 0]
    assert solve(losses, sizes, 9) == [1, 2, 0]  # over a step that gains little
    assert solve(losses, sizes, 99) == [2, 2, 0]  # and none for what gains nothing


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give one budget"),
        ({"bits_per_weight": 3.0, "budget_bytes": 5}, "give one budget"),
        ({"bits_per_weight": 2.0}, "narrowest width takes"),
        ({"bits_per_weight": 4.0, "widths": ()}, "widths is empty"),
        ({"bits_per_weight": 4.0, "widths": (7,)}, "bits is 7"),
    ],
)
def test_budgets_that_cannot_be_met(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        choose_bits(tiny(), tokens(1), progress=False, **options)


@pytest.mark.parametrize(
    "content",
    ["[", "[]", '{"modules": {"a": 4}}', '{"modules": {"a": {"bits": 7}}}'],
)
def test_files_that_are_no_recipe(content: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.json"):
        Recipe.load(path)


def test_a_recipe_by_hand_leaves_modules_dense(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    form = {"bits": 8, "group_size": 32}
    path.write_text(json.dumps({"modules": {"lm_head": False}, "default": form}))
    model = tiny()
    quantize_(model, filter_fn=Recipe.load(path), progress=False)
    assert type(model.lm_head.weight) is nn.Parameter
    assert model.model.embed_tokens.weight.bits == 8


def test_the_shipped_model_wins_back_a_third_at_three_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from stdlib_corpus import Source, load_corpus
    from stdlib_score import bits_per_byte

    corpus = load_corpus()
    train = [source.text for source in corpus.train if not source.is_test][::20]
    texts = [text[:1500] for text in train][:30]
    assert sum(map(len, texts)) > 20_000
    judged = [Source(s.name, s.text[:2500]) for s in corpus.held_out if not s.is_test]
    folder = EXAMPLES / "stdlib-6m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for how in ("dense", "plain", "calibrated"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        config = AffineConfig(3, 64)
        if how == "plain":
            quantize_(model, config, progress=False)
        if how == "calibrated":
            calibrate_(
                model,
                texts,
                config,
                tokenizer=tokenizer,
                length=256,
                compute_dtype=torch.float32,
                progress=False,
            )
        dequantize_(model, torch.float32, progress=False)
        scores.append(bits_per_byte(model.float(), tokenizer, judged))
    dense, plain, calibrated = scores
    assert plain - dense > 0.02  # there is something to win
    assert (plain - calibrated) / (plain - dense) > 1 / 3, scores
