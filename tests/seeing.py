"""Checkpoints of models that see, as mlx-vlm writes them, and their dense twins.

A twin is a transformers model whose weights lie on a grid: what MLX quantizes of them
loses nothing, so that the twin says what the checkpoint's model must say, without any
knowledge of names. The checkpoint is written by mlx-vlm where it is installed, and
otherwise after a table of its names, which is tested against mlx-vlm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from architectures import completed, leave_out_
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Seeing:
    """A model type, what it is shown, and what mlx-vlm calls its tensors.

    `inputs` makes what the model is called with. `stored` are pairs of `re.sub` from
    transformers' names to those of mlx-vlm; the first that matches is applied.
    `plus_one` matches norms that are stored as 1 + w. `published` are pairs from the
    names that transformers writes to those of published checkpoints, which mlx-vlm
    reads, and `published_transposed` what is transposed there; `settings` are those of
    a published config.json that transformers has not (None: that it has), and `mlx_type`
    the model type there.

    The text has `bits` and `group_size`; the tower has `tower_bits`, or is dense, and
    `dense` matches what else mlx-vlm leaves so, unless `everything` is quantized. With
    `head_twice` a tied head is stored too. `without` are modules that are left out.
    `writer` is "mlx_lm" or "mlx_vlm" where a table of names does not say it all.
    `unreadable` is why mlx-vlm does not read what was saved.
    """

    model_type: str
    config: Mapping[str, Any]
    inputs: Callable[[], Inputs]
    stored: Pairs = ()
    plus_one: str = ""
    published: Pairs = ()
    published_transposed: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    mlx_type: str = ""
    model_class: str = "AutoModelForImageTextToText"
    bits: int = 4
    group_size: int = 64
    tower_bits: int | None = None
    dense: str = ""
    everything: bool = False
    head_twice: bool = False
    without: tuple[str, ...] = ()
    writer: str = ""
    unreadable: str = ""
    label: str = ""

    def __str__(self) -> str:
        tower = f"-tower{self.tower_bits}" if self.tower_bits else ""
        label = f"-{self.label}" if self.label else ""
        return f"{self.model_type}{label}-{self.bits}bit-g{self.group_size}{tower}"


TOWERS = re.compile(
    r"vision|visual|projector|connector|image_newline|audio|perceive|patch_merge"
)


def bits_of(case: Seeing, name: str) -> int | None:
    """How many bits a weight of this name has, in either library."""
    if case.dense and re.search(case.dense, name):
        return None
    return case.tower_bits if TOWERS.search(name) else case.bits


def stock_model(case: Seeing) -> Any:
    """A transformers model of the case, with any weights."""
    import transformers
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[case.model_type].from_dict(
        {**case.config, "model_type": case.model_type}
    )
    auto = getattr(transformers, case.model_class)
    build = getattr(auto, "from_config", None) or auto._from_config
    model = build(config, dtype=torch.float32, attn_implementation="eager")
    leave_out_(model, case.without)
    return model.float().eval()


def dense_twin(case: Seeing) -> Any:
    """A model of weights that MLX quantizes without loss; all is off its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = stock_model(case)
        for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if case.plus_one and re.search(case.plus_one, name):
                    weight.copy_((weight * 64).round() / 64)  # exact in bfloat16
            for name, weight, axis in _quantizable(model):
                bits = bits_of(case, name)
                if bits and weight.shape[axis] % case.group_size == 0:
                    weight.copy_(_on_grid(weight, bits, case.group_size, axis))
    return model


def _quantizable(model: nn.Module) -> list[tuple[str, Tensor, int]]:
    """What MLX may quantize, with the axis along which its groups run."""
    found = []
    for prefix, module in model.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}"
            if isinstance(module, (nn.Linear, nn.Embedding)) and own == "weight":
                found.append((name, weight, -1))
            elif prefix.endswith(".experts") and weight.dim() == 3:
                transposed = type(module).__name__ == "Llama4TextExperts"
                found.append((name, weight, -2 if transposed else -1))
            elif own in ("in_proj_weight", "weight") and weight.dim() == 2:
                found.append((name, weight, -1))
    return found


def _on_grid(weight: Tensor, bits: int, group_size: int, axis: int) -> Tensor:
    top = (1 << bits) - 1
    moved = weight.movedim(axis, -1)
    codes = torch.randint(top + 1, moved.shape)
    groups = codes.unflatten(-1, (-1, group_size))
    ends = torch.rand(groups.shape).argsort(-1)[
        ..., :2
    ]  # each group uses all its range
    groups.scatter_(-1, ends, torch.tensor([0, top]).expand(ends.shape))
    values = (groups.flatten(-2) - (1 << bits - 1)) * 2.0 ** -(bits + 2)
    return values.movedim(-1, axis)


# ---- by hand ---------------------------------------------------------------------


def write_by_hand(case: Seeing, twin: Any, folder: Path) -> None:
    """The checkpoint after the table of names in the case."""
    from safetensors.torch import save_file

    quantizable = {name for name, *_ in _quantizable(twin)}
    modules = dict(twin.named_modules())
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in twin.state_dict().items():
        if tensor.data_ptr() in seen and not case.head_twice:
            continue  # tied
        seen.add(tensor.data_ptr())
        module = modules[name.rpartition(".")[0]]
        if case.plus_one and re.search(case.plus_one, name):
            tensor = tensor + 1
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and tensor.dim() > 2:
            tensor = tensor.movedim(1, -1)
        bits = bits_of(case, name) if name in quantizable else None
        for place, piece in _pieces(
            _renamed(name, case.stored), tensor, module
        ).items():
            stored |= _quantized(place, piece, bits, case.group_size)
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()},
        folder / "model.safetensors",
        metadata={"format": "mlx"},
    )
    twin.config.save_pretrained(folder)
    path = folder / "config.json"
    config = published_config(case, path)
    quantization: dict[str, Any] = {"bits": case.bits, "group_size": case.group_size}
    if case.tower_bits:
        own = {"bits": case.tower_bits, "group_size": case.group_size}
        packed = [n.removesuffix(".scales") for n in stored if n.endswith(".scales")]
        quantization |= {name: own for name in packed if TOWERS.search(name)}
    path.write_text(json.dumps({**config, "quantization": quantization}))


def _pieces(name: str, tensor: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The tensors that one of transformers is in MLX: experts have gate and up apart."""
    if "in_proj_" in name and isinstance(module, nn.MultiheadAttention):
        return {name.replace("in_proj_", "in_proj."): tensor}
    place, _, own = name.rpartition(".experts.")
    if not place or own not in ("gate_up_proj", "down_proj"):
        return {name: tensor}
    if type(module).__name__ == "Llama4TextExperts":
        tensor, place = tensor.mT, f"{place}.experts"
    else:
        place = f"{place}.switch_mlp"
    names = ("gate_proj", "up_proj") if own == "gate_up_proj" else ("down_proj",)
    parts = tensor.chunk(len(names), dim=1)
    return {f"{place}.{n}.weight": p for n, p in zip(names, parts, strict=True)}


def _quantized(
    name: str, tensor: Tensor, bits: int | None, group_size: int
) -> dict[str, Tensor]:
    import mlx.core as mx
    import numpy as np

    if not bits or tensor.shape[-1] % group_size:
        return {name: tensor}
    array = mx.array(tensor.contiguous().numpy())
    parts = mx.quantize(array, group_size=group_size, bits=bits)
    assert mx.array_equal(
        mx.dequantize(*parts, group_size=group_size, bits=bits), array
    )
    stem = name.removesuffix("weight")
    names = (f"{stem}weight", f"{stem}scales", f"{stem}biases")
    return {n: torch.from_numpy(np.array(p)) for n, p in zip(names, parts, strict=True)}


# ---- by mlx-vlm ------------------------------------------------------------------


def write_with_mlx_vlm(case: Seeing, twin: Any, folder: Path) -> None:
    """Lets mlx-vlm read the twin, quantize it, and write it into `folder`."""
    import mlx.core as mx

    if case.writer == "mlx_lm":
        from mlx_lm.utils import load_model as load
        from mlx_lm.utils import quantize_model, save_config
        from mlx_lm.utils import save_model as save
    else:
        from mlx_vlm.quant_utils import quantize_model
        from mlx_vlm.utils import load_model as load
        from mlx_vlm.utils import save_config
        from mlx_vlm.utils import save_weights as save

    dense = folder / "dense"
    write_published(case, twin, dense)
    model = load(dense)[0] if case.writer == "mlx_lm" else load(dense)
    model.set_dtype(mx.float32)
    config = json.loads((dense / "config.json").read_text())
    own = getattr(model, "quant_predicate", None)
    if own is None or case.everything:
        own = _all

    def predicate(path: str, module: Any) -> Any:
        bits = bits_of(case, path)
        if not bits or own(path, module) is False:
            return False
        return (
            {"bits": bits, "group_size": case.group_size}
            if TOWERS.search(path)
            else True
        )

    model, config = quantize_model(
        model, config, case.group_size, case.bits, quant_predicate=predicate
    )
    save(folder, model)
    vision = config.get("vision_config")
    save_config(config, folder / "config.json")
    if vision and case.writer == "mlx_lm":  # it drops this
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "vision_config": vision})
        )
    for file in dense.iterdir():
        file.unlink()
    dense.rmdir()


def _all(path: str, module: Any) -> bool:
    return True


def write_published(case: Seeing, twin: Any, folder: Path) -> None:
    """The twin as published checkpoints have it."""
    from safetensors.torch import load_file, save_file

    twin.save_pretrained(folder)
    file, path = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if case.published_transposed and re.search(case.published_transposed, name):
            tensors[name] = tensor.mT.contiguous()
    renamed = {_renamed(name, case.published): t for name, t in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    path.write_text(json.dumps(published_config(case, path)))


def published_config(case: Seeing, path: Path) -> dict[str, Any]:
    """The configuration that transformers wrote, with what a published one has."""
    config = completed(case.config, json.loads(path.read_text()))
    config = _deep(config, case.settings)
    return {**config, "model_type": case.mlx_type or case.model_type}


def _deep(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: _deep(config[key], value)
        for key, value in more.items()
        if isinstance(value, dict) and isinstance(config.get(key), dict)
    }
    merged = {**config, **more, **nested}
    return {k: v for k, v in merged.items() if v is not None or k not in more}


def _renamed(name: str, pairs: Pairs) -> str:
    for pattern, replacement in pairs:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
