"""What would load without a word and compute something else, of `cases_experts.py`.

Most tests take one piece of the handling away and see the logits change, or a refusal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import (
    TOLERANCE,
    Case,
    drawn_by_transformers,
    mlx_logits,
    mlx_quantized_modules,
    write_mlx_checkpoint,
)
from cases_experts import CASES
from safetensors.torch import load_file, save_file
from test_architectures import relative_l2, stock_model
from torch import Tensor, nn

from affine_tensor import (
    AffineConfig,
    AffineQuantizedTensor,
    CheckpointError,
    load_checkpoint_,
    quantize_,
    save_checkpoint,
)
from affine_tensor.checkpoint import families, names
from affine_tensor.checkpoint.families import Family, Rule
from affine_tensor.checkpoint.forms import Rows, Transposed

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))


def case_of(model_type: str, label: str = "") -> Case:
    found = (c for c in CASES if (c.model_type, c.label) == (model_type, label))
    return next(found)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(IDS, use_cache=False).logits
    return values


def error(case: Case, folder: Path) -> float:
    model = stock_model(folder, case)
    load_checkpoint_(model, folder)
    return relative_l2(logits(model), mlx_logits(folder, IDS))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of a checkpoint, which then has no index."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


# ---- gate and up ----------------------------------------------------------------


def test_gate_comes_before_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("qwen2_moe")
    write_mlx_checkpoint(case, tmp_path)
    assert error(case, tmp_path) < case.tolerance

    monkeypatch.setattr(names, "_NAMES", [("up_proj", "gate_proj", "down_proj")])

    assert error(case, tmp_path) > 0.01


def test_gate_comes_before_up_in_granite_without_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("granitemoehybrid", "dense")
    write_mlx_checkpoint(case, tmp_path)
    (rule,) = families._granite_hybrid(stock_model(tmp_path, case).config).rules
    swapped = Rule(rule.pattern, Rows(*reversed(rule.form.parts)))
    renames = [(r"\.shared_mlp\.output_linear\.", ".mlp.down_proj.")]
    family = Family(renames=renames, rules=[swapped])

    monkeypatch.setitem(families.FAMILIES, "granitemoehybrid", family)

    assert error(case, tmp_path) > 0.01


def test_gate_and_up_of_other_widths_are_dense_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    case = case_of("qwen3_moe", "gate-unlike-up")
    write_mlx_checkpoint(case, tmp_path / "first")
    formats = mlx_quantized_modules(tmp_path / "first")
    assert formats["model.layers.0.mlp.switch_mlp.up_proj"] == (6, 64)
    model = stock_model(tmp_path / "first", case)

    report = load_checkpoint_(model, tmp_path / "first")

    begin, end = "dense, since its parts differ: 4 bits in groups of", "in groups of 64"
    assert report.notes == {
        "model.layers.0.mlp.experts.gate_up_proj": f"{begin} 64 and 6 bits {end}",
        "model.layers.1.mlp.experts.gate_up_proj": f"{begin} 32 and 4 bits {end}",
    }
    for layer in model.model.layers:
        assert not isinstance(layer.mlp.experts.gate_up_proj, AffineQuantizedTensor)
        assert isinstance(layer.mlp.experts.down_proj, AffineQuantizedTensor)
    assert all(name in str(report) for name in report.notes)
    # Each goes back as it was.
    save_checkpoint(model, tmp_path / "again")
    assert mlx_quantized_modules(tmp_path / "again") == formats


# ---- experts one by one ---------------------------------------------------------


def unstacked(projections: dict[str, str]) -> Callable[[dict[str, Tensor]], None]:
    """Takes stacks of experts apart, and gives each the name of its projection."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "_mlp." in n or ".experts." in n]:
            place, own, part = name.rsplit(".", 2)
            if own not in projections:
                continue
            block = place.rpartition(".")[0]
            for number, one in enumerate(tensors.pop(name).unbind()):
                new = f"{block}.experts.{number}.{projections[own]}.{part}"
                tensors[new] = one.clone()

    return change


PLAIN = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
SHORT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.mark.parametrize("scattered", [False, True], ids=["packed", "one unlike"])
@pytest.mark.parametrize(
    ("model_type", "count", "projections"),
    [
        # More than ten: their order is that of numbers.
        ("qwen2_moe", {"num_experts": 12}, PLAIN),
        ("qwen3_moe", {"num_experts": 12}, PLAIN),
        ("mixtral", {"num_local_experts": 12, "intermediate_size": 64}, SHORT),
        ("afmoe", {"num_experts": 12}, PLAIN),
        ("minimax_m2", {"num_local_experts": 12}, SHORT),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_experts_stored_one_by_one(
    model_type: str,
    count: dict[str, int],
    projections: dict[str, str],
    scattered: bool,
    tmp_path: Path,
) -> None:
    case = case_of(model_type)
    case = replace(case, config={**case.config, **count})
    write_mlx_checkpoint(case, tmp_path)
    stacked = stock_model(tmp_path, case)
    load_checkpoint_(stacked, tmp_path)
    rewrite(tmp_path, unstacked(projections))
    if scattered:
        rewrite(tmp_path, one_dense)
    model = stock_model(tmp_path, case)

    report = load_checkpoint_(model, tmp_path)

    if scattered:
        assert relative_l2(logits(model), logits(stacked)) < TOLERANCE
        (name,) = report.notes
        assert report.notes[name] == "dense, since only a part of it is quantized"
        return
    assert report.notes == {}
    for name, parameter in stacked.named_parameters():
        other = model.get_parameter(name)
        assert type(other) is type(parameter)
        assert torch.equal(other, parameter)


def one_dense(tensors: dict[str, Tensor]) -> None:
    """Makes one projection of one expert dense."""
    down = ("down_proj.scales", "w2.scales")
    name = next(n for n in sorted(tensors) if ".11." in n and n.endswith(down))
    stem = name.removesuffix("scales")
    packed, scales, biases = (
        tensors.pop(f"{stem}{part}") for part in ("weight", "scales", "biases")
    )
    columns = 64  # the width of an expert in these cases
    weight = AffineQuantizedTensor.from_packed(
        packed,
        scales,
        biases,
        bits=32 * packed.shape[-1] // columns,
        group_size=columns // scales.shape[-1],
    )
    tensors[f"{stem}weight"] = weight.dequantize()


# ---- dbrx -----------------------------------------------------------------------


def test_square_experts_of_dbrx_are_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("dbrx")
    write_mlx_checkpoint(case, tmp_path)
    assert error(case, tmp_path) < case.tolerance

    monkeypatch.setattr(Transposed, "loaded", lambda self, value: value)

    assert error(case, tmp_path) > 0.01


def test_experts_of_dbrx_are_in_the_order_of_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("dbrx")
    write_mlx_checkpoint(case, tmp_path)
    rules = families._dbrx(stock_model(tmp_path, case).config).rules
    by_name = [
        Rule(rule.pattern, Rows(*sorted(rule.form.parts, key=lambda p: [*p.names()])))
        for rule in rules
    ]

    monkeypatch.setitem(families.FAMILIES, "dbrx", Family(rules=by_name))

    assert error(case, tmp_path) > 0.01


@pytest.mark.usefixtures("no_fallback")
def test_experts_of_dbrx_are_never_dequantized_together(tmp_path: Path) -> None:
    case = case_of("dbrx")
    write_mlx_checkpoint(case, tmp_path)
    assert error(case, tmp_path) < case.tolerance


# ---- what the file lacks, and what it has more ----------------------------------


def test_a_correction_that_mlx_drops_is_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("ernie4_5_moe")
    write_mlx_checkpoint(case, tmp_path)
    model = stock_model(tmp_path, case)
    biases = [b for n, b in model.named_parameters() if n.endswith("correction_bias")]
    assert len(biases) == 2
    with torch.no_grad():
        for number, bias in enumerate(biases):
            bias.copy_(torch.arange(4.0)[None] * (-1) ** number)

    load_checkpoint_(model, tmp_path)

    assert relative_l2(logits(model), mlx_logits(tmp_path, IDS)) < case.tolerance

    monkeypatch.delitem(families.FAMILIES, "ernie4_5_moe")
    with pytest.raises(CheckpointError, match=r"2 missing:\n.*correction_bias"):
        load_checkpoint_(stock_model(tmp_path, case), tmp_path)


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("glm4_moe", "model.layers.3.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.input_layernorm.weight"),
        ("exaone_moe", "mtp.norm.weight"),
    ],
)
def test_heads_that_predict_more_tokens_are_left(
    model_type: str, extra: str, tmp_path: Path
) -> None:
    case = case_of(model_type)
    write_mlx_checkpoint(case, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({extra: torch.ones(128)}))

    report = load_checkpoint_(stock_model(tmp_path, case), tmp_path)

    assert report.ignored == [extra]
    rewrite(tmp_path, lambda tensors: tensors.update({"more.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected:\n  more\.weight"):
        load_checkpoint_(stock_model(tmp_path, case), tmp_path)


def test_minimax_text_is_not_minimax_m2(tmp_path: Path) -> None:
    # mlx-lm's `minimax` is transformers' `minimax_m2`.
    case = case_of("minimax_m2")
    write_mlx_checkpoint(case, tmp_path)
    other = replace(case, model_type="minimax", mlx_type="minimax")
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint_(stock_model(tmp_path, other), tmp_path)


# ---- what computes with experts -------------------------------------------------


WITH_EXPERTS = [case for case in CASES if case.label != "dense"]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("case", WITH_EXPERTS, ids=str)
def test_all_ways_to_compute_experts_agree(case: Case, tmp_path: Path) -> None:
    write_mlx_checkpoint(case, tmp_path)
    model = stock_model(tmp_path, case)
    load_checkpoint_(model, tmp_path)
    if not model._can_set_experts_implementation():
        assert case.model_type == "dbrx"
        return
    want = mlx_logits(tmp_path, IDS)
    for way in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(way)
        assert model.config._experts_implementation == way
        assert relative_l2(logits(model), want) < case.tolerance


# ---- saving ---------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantized_here_mlx_lm_says_the_same(case: Case, tmp_path: Path) -> None:
    model = drawn_by_transformers(case, tmp_path / "config").eval()
    model.config._name_or_path = ""
    # What mlx-lm must be told, transformers has no use for.
    for key in MORE.get(case.model_type, ()):
        delattr(model.config, key)
    for name, parameter in model.named_parameters():
        if name.endswith("moe_statics.e_score_correction_bias"):
            nn.init.zeros_(parameter)  # mlx-lm has none
    quantize_(model, AffineConfig(case.bits, case.group_size))
    packed = [p for p in model.parameters() if isinstance(p, AffineQuantizedTensor)]

    save_checkpoint(model, tmp_path / "saved")

    assert len(mlx_quantized_modules(tmp_path / "saved")) >= len(packed) >= 8
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == (case.mlx_type or case.model_type)
    want = logits(model)
    assert relative_l2(mlx_logits(tmp_path / "saved", IDS), want) < case.tolerance


MORE = {
    "exaone_moe": ("is_moe_layer",),
    "hunyuan_v1_moe": (
        "num_shared_expert",
        "use_mixed_mlp_moe",
        "use_qk_norm",
        "use_cla",
        "cla_share_factor",
    ),
    "minimax_m2": ("rotary_dim", "shared_intermediate_size"),
    "solar_open": ("first_k_dense_replace", "intermediate_size"),
}
