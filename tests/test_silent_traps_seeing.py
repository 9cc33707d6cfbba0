"""What loads without complaint and speaks wrongly unless it is handled: models that see.

Each test takes one piece of the handling away and finds the difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cases_latent
import cases_recurrent
import cases_seeing
import cases_vision
import pytest
import torch
from architectures import (
    Case,
    mlx_logits,
    mlx_quantized_modules,
    write_mlx_checkpoint,
)
from safetensors.torch import load_file, save_file
from seeing import Seeing, dense_twin
from seeing import stock_model as seeing_model
from test_architectures import relative_l2, stock_model
from test_seeing import logits, write
from torch import Tensor, nn

from affine_tensor import AffineQuantizedTensor, from_pretrained, load_checkpoint_
from affine_tensor.checkpoint import families, forms
from affine_tensor.checkpoint.families import FAMILIES, Family, Rule
from affine_tensor.checkpoint.forms import ResidualGate, Stored

mx = pytest.importorskip("mlx.core", reason="MLX is missing")
pytest.importorskip("mlx_lm", reason="mlx-lm, which writes the checkpoints, is missing")

IDS = torch.arange(1, 25)[None]


def seeing_case(model_type: str, writer: str = "") -> Seeing:
    found = [c for c in cases_vision.CASES if c.model_type == model_type]
    return next(c for c in found if not writer or c.writer == writer)


def test_experts_of_llama_4_are_transposed_where_that_does_not_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`down_proj` is square here."""
    case = next(c for c in cases_seeing.CASES if c.model_type == "llama4")
    write_mlx_checkpoint(case, tmp_path)
    want = mlx_logits(tmp_path, IDS)

    def error() -> float:
        model = stock_model(tmp_path, case)
        load_checkpoint_(model, tmp_path)
        with torch.no_grad():
            return relative_l2(model(IDS).logits, want)

    assert error() < case.tolerance
    down = Rule(r"(.*\.experts)\.down_proj", Stored(r"\1.down_proj.weight"))
    family = FAMILIES["llama4_text"]
    assert isinstance(family, Family)
    monkeypatch.setitem(FAMILIES, "llama4_text", Family(rules=[down, *family.rules]))
    assert error() > 1e-2


def same(self: forms.Form, value: Tensor) -> Tensor:
    return value


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        # Rows of queries and keys are in another order, of the text and of the tower.
        (families, "neighbours", lambda width: torch.arange),
        # Five norms of a layer are stored as 1 + w.
        (forms.PlusOne, "loaded", same),
        # Gates are stored as what they give.
        (ResidualGate, "load", lambda self, read: self.parts[1].load(read)),
    ],
    ids=["rows", "norms", "gates"],
)
def test_muse_spark(
    where: object,
    name: str,
    value: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    case = seeing_case("muse_spark", "mlx_lm")
    twin = dense_twin(case)
    write(case, twin, tmp_path)

    def error() -> float:
        model = seeing_model(case)
        load_checkpoint_(model, tmp_path)
        return relative_l2(logits(model, case), logits(twin, case))

    assert error() < 1e-5
    monkeypatch.setattr(where, name, value)
    assert error() > 1e-2


def test_rows_of_towers_that_mlx_vlm_joins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = seeing_case("kimi_k25")
    twin = dense_twin(case)
    write(case, twin, tmp_path)

    def error() -> float:
        model = seeing_model(case)
        load_checkpoint_(model, tmp_path)
        return relative_l2(logits(model, case), logits(twin, case))

    assert error() < 1e-5
    monkeypatch.setattr(families, "neighbours", lambda width: torch.arange)
    assert error() > 1e-3


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_whose_shape_does_not_tell(
    dimensions: int, tmp_path: Path
) -> None:
    """As many channels as the kernel is wide: both layouts have one shape."""
    name = f"Conv{dimensions}d"
    theirs = getattr(pytest.importorskip("mlx.nn"), name)(3, 8, 3)
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), dict(theirs.parameters().items())
    )
    quantization = {"quantization": {"bits": 4, "group_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(quantization))
    model = getattr(nn, name)(3, 8, 3)

    load_checkpoint_(model, tmp_path)

    x = torch.randn(2, 3, *[5] * dimensions)
    want = theirs(mx.array(x.movedim(1, -1).numpy()))
    with torch.no_grad():
        got = model(x).movedim(1, -1)
    torch.testing.assert_close(got, torch.tensor(want.tolist()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", [0.0, -0.75, 1.5, 2.5, -9.0, 1e-3, 0.3333])
def test_a_gate_comes_back_from_what_it_gives(gate: float) -> None:
    form = ResidualGate("alpha", "beta", 0.3)
    value = torch.tensor([gate])
    stored = form.save(value)

    back = form.load(stored.__getitem__)

    if torch.equal(value.bfloat16().float(), value):
        assert torch.equal(back, value)
    torch.testing.assert_close(back, value, rtol=1e-4, atol=1e-6)
    for name, part in form.save(back).items():
        torch.testing.assert_close(part, stored[name], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("gate", [-40.0, 40.0])
def test_a_gate_that_is_shut_or_open_stays_so(gate: float) -> None:
    form = ResidualGate("alpha", "beta", 0.3)
    stored = form.save(torch.tensor([gate]))
    back = form.load(stored.__getitem__)
    assert bool(back.isfinite().all())
    for name, part in form.save(back).items():
        torch.testing.assert_close(part, stored[name], rtol=1e-6, atol=1e-30)


def test_gemma_3n_has_another_prefix_in_mlx_vlm(tmp_path: Path) -> None:
    case = next(c for c in cases_recurrent.CASES if c.model_type == "gemma3n")
    write_mlx_checkpoint(case, tmp_path)
    model = stock_model(tmp_path, case)
    load_checkpoint_(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        name.replace("model.language_model.", "language_model.model."): tensor
        for name, tensor in load_file(file).items()
    }
    tower = {"vision_tower.timm_model.conv_stem.conv.weight": torch.ones(4)}
    save_file(tensors | tower, file, metadata={"format": "mlx"})
    again = stock_model(tmp_path, case)

    report = load_checkpoint_(again, tmp_path)

    assert set(tower) <= set(report.ignored)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


# ---- the text alone -----------------------------------------------------------------

TEXT_ALONE = [
    case
    for case in (*cases_seeing.CASES, *cases_recurrent.CASES, *cases_latent.CASES)
    if "text_config" in case.config
]


@pytest.mark.parametrize("case", TEXT_ALONE, ids=str)
def test_the_text_of_a_model_that_sees_is_saved_as_mlx_lm_reads_it(
    case: Case, tmp_path: Path
) -> None:
    """What `from_pretrained` makes of it is the text's own class, with its own names and
    configuration; mlx-lm may have it only as a part of the other."""
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first)
    model = from_pretrained(first)

    model.save_pretrained(again)

    assert torch.equal(mlx_logits(again, IDS), mlx_logits(first, IDS))
    read = from_pretrained(again)
    assert type(read) is type(model)
    own, other = dict(model.named_parameters()), dict(read.named_parameters())
    assert own.keys() == other.keys()
    for name, value in own.items():
        if isinstance(value, AffineQuantizedTensor):
            value, other[name] = value.dequantize(), other[name].dequantize()
        assert torch.equal(value, other[name]), name


def test_parts_that_differ_are_saved_as_they_were_under_other_names(
    tmp_path: Path,
) -> None:
    """The whole has `language_model.model.`, the text alone `model.`."""
    case = next(c for c in cases_seeing.CASES if c.label == "experts")
    case = replace(case, formats={r"switch_glu\.up_proj": (3, 64)})
    first, again = tmp_path / "first", tmp_path / "again"
    write_mlx_checkpoint(case, first, dtype="bfloat16")
    formats = mlx_quantized_modules(first)
    model = from_pretrained(first)
    experts = model.model.layers[0].experts
    assert not isinstance(experts.gate_up_proj, AffineQuantizedTensor)

    model.save_pretrained(again)

    shorter = {n.replace("language_model.", ""): f for n, f in formats.items()}
    assert {
        n.replace("language_model.", ""): f
        for n, f in mlx_quantized_modules(again).items()
    } == shorter
    assert torch.equal(mlx_logits(again, IDS), mlx_logits(first, IDS))


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe", "gemma3", "mistral3"])
def test_other_prefixes_of_the_text(
    model_type: str, prefix: str, tmp_path: Path
) -> None:
    case = next(c for c in TEXT_ALONE if c.model_type == model_type)
    write_mlx_checkpoint(case, tmp_path)
    want = mlx_logits(tmp_path, IDS)
    path = tmp_path / "model.safetensors"
    tensors = {
        name.replace("language_model.model.", prefix).replace(
            "language_model.lm_head.", "lm_head."
        ): tensor
        for name, tensor in load_file(path).items()
    }
    assert any(name.startswith(f"{prefix}layers.") for name in tensors)
    save_file(tensors, path, metadata={"format": "mlx"})
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)

    model = from_pretrained(tmp_path)

    with torch.no_grad():
        assert relative_l2(model(IDS, use_cache=False).logits, want) < case.tolerance


def test_the_dtype_of_the_whole_is_that_of_its_text(tmp_path: Path) -> None:
    case = next(c for c in TEXT_ALONE if c.model_type == "qwen3_5")
    write_mlx_checkpoint(case, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key in ("dtype", "torch_dtype"):
        config["text_config"].pop(key, None)
    path.write_text(json.dumps({**config, "dtype": "bfloat16"}))

    assert from_pretrained(tmp_path).dtype == torch.bfloat16
