"""A quantized checkpoint written as one of MLX, weight by weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils.hub import extract_commit_hash

from ..checkpoint import formats
from ..checkpoint.files import CONFIG, Checkpoint
from ..checkpoint.load import Planned, check_repeated, make_plan
from ..checkpoint.names import Names
from ..checkpoint.save import Unsupported, Writing, counts_as
from ..fold import fold_permutations_
from ..quantize import Slot, slots
from ..tensor import AffineQuantizedTensor
from .choices import Choices, relative_loss
from .config import AffineQuantizationConfig
from .loading import _main_dtype, _named_dtype, _set_generation
from .pretrained import _read_config
from .quantizer import _dtypes
from .skeleton import skeleton


def rewrite(
    source: str | Path,
    checkpoint: Checkpoint,
    writing: Writing,
    *,
    dtype: torch.dtype | str | None,
    again: AffineQuantizationConfig | None,
    dequantize: bool,
    unsupported: Unsupported,
    progress: bool,
) -> Any:
    """Write all weights; return the model that they are of, which has none.

    `again` is how to quantize them again; without it they keep their codes, or become
    dense with `dequantize`. `dtype` is that of scales, biases and dense tensors, "keep"
    for the scales of the file.
    """
    own = dtype if isinstance(dtype, torch.dtype) else _own_dtype(checkpoint)
    model = _empty(source, checkpoint, own)
    plan = make_plan(model, checkpoint)
    choices = Choices(model, again) if again else None
    if choices is not None:
        choices.check_for_mlx()
    dtypes, names = _dtypes(model, own), Names(model)
    folds = formats.other_format(checkpoint) is not None and not (again or dequantize)
    bar = tqdm(
        total=len(plan.items),
        desc="converting",
        unit="tensor",
        leave=False,
        disable=not progress,
    )
    with bar:
        for owner, items in _together(model, plan.items, folds):
            values = [
                item.read(dtypes[item.target.name], torch.device("cpu"))
                for item in items
            ]
            if owner is not None:
                values = _folded(owner, items, values)
            while values:
                item, value = items.pop(0), values.pop(0)
                name = item.target.name
                # Of buffers None: they stay as the model made them.
                counted = own if isinstance(item.target, Slot) else None
                if choices is not None:
                    _quantize_again(choices, writing, name, value, counted)
                else:
                    writing.parameter(
                        names,
                        name,
                        _dense(value, dtypes[name]) if dequantize else value,
                        dtype=None if dtype == "keep" else own,
                        counted=counted,
                        unsupported=unsupported,
                    )
                del value
                bar.update()
    writing.check()
    check_repeated(plan)
    return model


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What from_pretrained would take."""
    config, _ = _read_config(checkpoint, {"trust_remote_code": False})
    own = getattr(config, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    return _named_dtype(checkpoint.config) or _main_dtype(checkpoint)


def _empty(source: str | Path, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model without weights, which knows where it is from."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = skeleton(checkpoint)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    model.name_or_path = model.config.name_or_path = str(source)
    commit = extract_commit_hash(str(checkpoint.folder / CONFIG), None)
    model.config._commit_hash = commit
    _set_generation(model, checkpoint.folder, None)
    return model


def _dense(value: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, AffineQuantizedTensor):
        return value.dequantize(dtype).contiguous()
    if hasattr(value, "affine_parts"):
        del value.affine_parts
    return value


def _quantize_again(
    choices: Choices,
    writing: Writing,
    name: str,
    value: Tensor,
    counted: torch.dtype | None,
) -> None:
    """Write a parameter in the bits and groups that were chosen for it. `counted` is the
    dtype of the model, which what was wider only while it was loaded gets back."""
    form, pieces, reasons = choices.pieces(name, value)
    dtype = counted if counted and counts_as(value, form, counted) else None
    writing.report.dense |= reasons
    packed = isinstance(value, AffineQuantizedTensor) or hasattr(value, "affine_parts")
    before = form.save(value.detach()) if packed else {}
    for leaf, piece in pieces.items():
        if isinstance(piece, AffineQuantizedTensor):
            if leaf in reasons:  # it was packed, and is to be dense
                writing.dense(leaf, piece.dequantize(value.dtype))
                continue
            if leaf in before:
                writing.report.lost[leaf] = relative_loss(piece, before[leaf])
            writing.packed(leaf, piece)
        else:
            writing.dense(leaf, piece, dtype)


# ---- act-order --------------------------------------------------------------------


def _together(
    model: nn.Module, items: list[Planned], folds: bool
) -> Iterator[tuple[nn.Module | None, list[Planned]]]:
    """The parameters in the order of the files; with `folds` those of an MLP together,
    and the module that they are of."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules() if folds else ():
        children = [getattr(module, f"{own}_proj", None) for own in _MLP]
        if all(type(child) is nn.Linear for child in children):
            for child in children:
                assert isinstance(child, nn.Module)
                owners |= {id(p): module for p in child._parameters.values()}
        elif "gate_up_proj" in module._parameters:
            owners |= {id(p): module for p in module._parameters.values()}
    in_order = sorted(items, key=lambda item: item.place)
    groups: dict[int, list[Planned]] = {}
    for item in in_order:
        owner = owners.get(id(item.target.parameter))
        groups.setdefault(id(item if owner is None else owner), []).append(item)
    for group in groups.values():
        yield owners.get(id(group[0].target.parameter)), group


_MLP = ("gate", "up", "down")


def _folded(
    owner: nn.Module, items: list[Planned], values: list[Tensor]
) -> list[Tensor]:
    """The values with the act-order of `down_proj` in the rows of the others, which costs
    nothing; the module is without them afterwards."""
    if not any(getattr(value, "permutation", None) is not None for value in values):
        return values
    found = {id(slot.parameter): slot for slot in slots(owner).values()}
    places = [found[id(item.target.parameter)] for item in items]
    empty = [slot.parameter for slot in places]
    for slot, value in zip(places, values, strict=True):
        slot.put(nn.Parameter(value, requires_grad=False))
    fold_permutations_(owner)
    folded = []
    for slot, parameter in zip(places, empty, strict=True):
        _, module, own = slot.places[0]
        new = module._parameters[own]
        assert new is not None
        folded.append(new.detach())
        slot.put(parameter)  # type: ignore[arg-type]
    return folded
