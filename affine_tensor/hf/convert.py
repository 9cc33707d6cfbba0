"""`convert`: a checkpoint becomes an MLX one, in the memory of a shard."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .. import layout
from ..checkpoint import formats
from ..checkpoint.files import (
    Checkpoint,
    CheckpointError,
    as_dtype,
    fetch,
    open_checkpoint,
)
from ..checkpoint.forms import Stored
from ..checkpoint.inspection import format_of
from ..checkpoint.load import make_plan
from ..checkpoint.save import (
    SaveReport,
    ShardWriter,
    Unsupported,
    Writing,
    check_free,
    save_into,
)
from ..recipes import Recipe
from ..tensor import AffineQuantizedTensor
from .choices import telling
from .config import AffineQuantizationConfig
from .pretrained import from_pretrained, refuse_adapter
from .register import has_adapter
from .rewrite import rewrite
from .skeleton import skeleton


class _Sink:
    """Writes the quantized pieces of a parameter, of which nothing else is kept."""

    def __init__(self, writing: Writing) -> None:
        self.writing = writing

    def add(
        self, pieces: dict[str, Tensor], reasons: dict[str, str], dtype: torch.dtype
    ) -> None:
        self.writing.report.dense |= reasons
        for name, piece in pieces.items():
            if isinstance(piece, AffineQuantizedTensor):
                self.writing.packed(name, piece)
            else:
                self.writing.dense(name, piece.to(dtype))


_HUB = ("revision", "cache_dir", "token", "local_files_only")


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    recipe: Recipe | None = None,
    dequantize: bool = False,
    unsupported: Unsupported = "error",
    dtype: torch.dtype | str | None = "auto",
    modules_to_not_convert: list[str] | None = None,
    model_class: Any = AutoModelForCausalLM,
    max_shard_bytes: int = ShardWriter.LIMIT,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> SaveReport:
    """Write an MLX checkpoint from a dense, GPTQ, AWQ, compressed-tensors or MLX one.

    `source` is a folder or Hub repository, `folder` where to write; what `mlx_lm.load`
    reads stands there afterwards.

    A dense checkpoint is quantized, by default to 4 bits in groups of 64. What is
    quantized has the codes, scales and biases of mlx-lm's own conversion; routers, of
    which it quantizes some to 8 bits, stay dense unless a `recipe` speaks of them.
    `recipe` gives modules bits of their own: see `AffineQuantizationConfig`.

    A quantized one keeps its codes. Act-order folds out of `down_proj`; elsewhere, and
    for groups that MLX has not, `unsupported` is as in `save_checkpoint`. With `bits`,
    `group_size` or `recipe` its weights are quantized again from their values, and the
    report's `lost` says what that costs, as relative L2 error of each. `dequantize`
    writes it dense.

    Weights are read, quantized and written one by one: at most a shard
    (`max_shard_bytes`) and one weight are in memory (with act-order, the three of an
    MLP). `dtype` is that of scales, biases and dense tensors ("auto": the source's;
    "keep": the scales of a quantized source as they are). Further options are those of
    `from_pretrained`; of a quantized source only those of the Hub (`revision`,
    `cache_dir`, `token`, `local_files_only`). Returns what was written.

    Raises FileExistsError as `save_checkpoint` does, ValueError for options that do not
    go together, modules to leave dense that leave none, weights that are NaN, and a
    `folder` that is `source` or around it, and what `from_pretrained` raises; then
    `folder` is as it was.
    """
    folder = Path(folder).expanduser()
    check_apart(source, folder)
    check_free(folder, overwrite)
    hub = {name: options[name] for name in _HUB if name in options}
    checkpoint = open_checkpoint(fetch(source, **hub))
    check_format(checkpoint)
    quantizes = not (bits is None and group_size is None and recipe is None)
    dense = not formats.recognizes(checkpoint)
    if dtype is None:
        dtype = "auto"
    if dtype not in ("auto", "keep"):
        dtype = as_dtype(dtype, layout.WEIGHT_DTYPES, "auto")
    _check_together(
        source,
        dense,
        quantizes,
        dequantize,
        keeps=dtype == "keep",
        skips=bool(modules_to_not_convert),
    )
    config = AffineQuantizationConfig(
        4 if bits is None else bits,
        64 if group_size is None else group_size,
        modules_to_not_convert,
        recipe=recipe,
    )
    # Under MLX's names, which transformers may not know.
    in_mlx = not dense or is_dense_of_mlx(checkpoint)

    def from_dense(writing: Writing) -> Any:
        return from_pretrained(
            source,
            dtype=dtype,
            model_class=model_class,
            quantization_config=config,
            sink=_Sink(writing),
            **options,
        )

    def from_mlx(writing: Writing) -> Any:
        _check_options(checkpoint, model_class, options)
        with _in_one_step(source) if dense else contextlib.nullcontext():
            return rewrite(
                source,
                checkpoint,
                writing,
                dtype=dtype,
                again=config if dense or quantizes else None,
                dequantize=dequantize,
                unsupported=unsupported,
                progress=progress,
            )

    make = from_mlx if in_mlx else from_dense

    def told(writing: Writing) -> Any:
        with telling():
            return make(writing)

    with _bars(progress):
        return save_into(
            folder,
            told,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )


def _check_together(
    source: str | Path,
    dense: bool,
    quantizes: bool,
    dequantize: bool,
    *,
    keeps: bool,
    skips: bool,
) -> None:
    """Raise ValueError for options that do not go together, or not with this source."""
    if dequantize and (quantizes or skips):
        raise ValueError(
            "dequantize makes every weight dense; it does not go together with bits, "
            "group_size, recipe and modules_to_not_convert"
        )
    if skips and not (dense or quantizes):
        raise ValueError(
            f"modules_to_not_convert is of no use for {source}: its weights keep their "
            "codes. Give bits to quantize them again"
        )
    if dense and (dequantize or keeps):
        given = "dequantize" if dequantize else "dtype='keep'"
        raise ValueError(f"{source} is dense: {given} is for quantized sources")


def check_apart(source: str | Path, folder: Path) -> None:
    """Raise ValueError where writing `folder` would destroy `source`."""
    own = Path(source).expanduser()
    if not (own.is_dir() and folder.is_dir()):
        return
    there, here = own.resolve(), folder.resolve()
    if os.path.samefile(own, folder):
        how = "is where it would be written to"
    elif here in there.parents:
        how = f"lies in {folder}, which would be replaced"
    else:
        return
    raise ValueError(
        f"{source} {how}: the original would be lost. Choose another folder"
    )


def check_format(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a checkpoint in a format that is not read."""
    form = format_of(checkpoint)
    if not form.readable:
        raise CheckpointError(
            f"{checkpoint.folder}: its config.json says quant_method {form.name!r}; MLX, "
            "GPTQ, AWQ, compressed-tensors and dense weights are read. Take the model in "
            "one of these formats, best the dense original"
        )


def is_dense_of_mlx(checkpoint: Checkpoint) -> bool:
    """Whether the tensors of a dense checkpoint have MLX's names and forms: their files
    say who wrote them, as mlx-lm's and this library's do."""
    if not checkpoint.files:
        return False
    for file in checkpoint.files:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("format") != "mlx":
                return False
    return True


def check_dense(source: str | Path, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for what transformers would not load as it is meant: another
    format, an adapter beside the weights, weights as MLX has them. Of the last it would
    read some without a word, such as norms with one added and rows in another order."""
    check_format(checkpoint)
    refuse_adapter(checkpoint.folder)
    if not is_dense_of_mlx(checkpoint):
        return
    for item in make_plan(skeleton(checkpoint), checkpoint).items:
        alike = isinstance(item.form, Stored) or not item.leaves
        if not alike or {*item.leaves} - {item.target.name}:
            raise CheckpointError(
                f"{source} is dense, and has MLX's names and forms: MLX stores "
                f"{item.target.name} with other values, or under another name. Quantize it "
                "plainly with affine-tensor convert, or take what it was made of"
            )


@contextlib.contextmanager
def _in_one_step(source: str | Path) -> Iterator[None]:
    """Say of a dense checkpoint of MLX that does not fill a model what it is."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} is dense, and has MLX's names and parts. Convert what it was made "
            f"of, in one step:\n{error}"
        ) from error


def _check_options(
    checkpoint: Checkpoint, model_class: Any, options: dict[str, Any]
) -> None:
    """Raise for what counts only while a dense checkpoint is read by transformers."""
    others = sorted(options.keys() - {*_HUB})
    if model_class is not AutoModelForCausalLM:
        others.append("model_class")
    if others:
        raise TypeError(
            f"{', '.join(others)}: not taken for {checkpoint.folder}, which is quantized "
            "or MLX's. Load it with from_pretrained, and write it with save_checkpoint"
        )
    if has_adapter(checkpoint.folder):
        raise ValueError(
            f"{checkpoint.folder} has an adapter beside the weights "
            "(adapter_config.json), which would be lost. Remove that file to convert the "
            "weights alone"
        )


@contextlib.contextmanager
def _bars(progress: bool) -> Iterator[None]:
    """Without `progress` transformers shows no bars of its own."""
    shown = logging.is_progress_bar_enabled()
    if not progress and shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if not progress and shown:
            logging.enable_progress_bar()
