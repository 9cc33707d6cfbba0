"""The models of commands: what transformers would make up is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from affine_tensor import CheckpointError
from affine_tensor.checkpoint.forms import PlusOne, RowOrder
from affine_tensor.checkpoint.names import Names
from affine_tensor.cli import models

DENSE = Path(__file__).resolve().parent.parent / "examples" / "stdlib-6m"
GATE = "model.layers.3.mlp.gate_proj.weight"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense checkpoint that a test may change."""
    return Path(shutil.copytree(DENSE, tmp_path / "dense"))


def load(folder: Path) -> models.Loaded:
    return models.load(str(folder), device="cpu")


def test_a_dense_model(dense: Path) -> None:
    assert not load(dense).packed


def test_a_tensor_that_is_not_there(dense: Path) -> None:
    (file,) = dense.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[GATE]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="does not fill the model") as caught:
        load(dense)
    assert GATE in str(caught.value)
    assert "Fetch the files again" in str(caught.value)


def test_a_tensor_of_another_shape(dense: Path) -> None:
    (file,) = dense.glob("*.safetensors")
    tensors = load_file(file)
    tensors[GATE] = tensors[GATE][1:].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises((CheckpointError, RuntimeError), match=r"gate_proj|mismatch"):
        load(dense)


def test_a_format_that_is_not_read(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "martian"}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quant_method 'martian'"):
        load(dense)


def reversed_rows(name: str) -> RowOrder:
    return RowOrder(name, lambda count: torch.arange(count - 1, -1, -1))


@pytest.mark.parametrize("writer", ["mlx", "pt"])
@pytest.mark.parametrize(
    ("ending", "form"),
    [("norm.weight", PlusOne), ("q_proj.weight", reversed_rows)],
    ids=["values", "rows"],
)
def test_values_that_mlx_stores_otherwise(
    writer: str, ending: str, form: Any, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in for an architecture that has them, under transformers' names.
    (file,) = dense.glob("*.safetensors")
    save_file(load_file(file), file, {"format": writer})
    assert not load(dense).packed
    forms = Names.forms

    def with_those_of_mlx(names: Names, name: str, shape: Any) -> Any:
        return [form(name)] if name.endswith(ending) else forms(names, name, shape)

    monkeypatch.setattr(Names, "forms", with_those_of_mlx)
    if writer == "pt":
        load(dense)
        return
    message = rf"MLX stores .*{re.escape(ending)} with other"
    with pytest.raises(CheckpointError, match=message):
        load(dense)


def test_an_adapter_beside_the_weights(dense: Path) -> None:
    (dense / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="has an adapter beside the weights"):
        load(dense)
