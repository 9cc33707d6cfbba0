"""`convert`: a dense checkpoint becomes an MLX one, in the memory of a shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..checkpoint.save import SaveReport, ShardWriter, Writing, save_into
from ..tensor import AffineQuantizedTensor
from .config import AffineQuantizationConfig
from .pretrained import from_pretrained


class _Sink:
    """Writes the quantized pieces of a parameter, of which nothing else is kept."""

    def __init__(self, writing: Writing) -> None:
        self.writing = writing

    def add(self, pieces: dict[str, Tensor], dtype: torch.dtype) -> None:
        for name, piece in pieces.items():
            if isinstance(piece, AffineQuantizedTensor):
                self.writing.packed(name, piece)
            else:
                self.writing.dense(name, piece.to(dtype))


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    dtype: torch.dtype | str | None = "auto",
    modules_to_not_convert: list[str] | None = None,
    model_class: Any = AutoModelForCausalLM,
    max_shard_bytes: int = ShardWriter.LIMIT,
    overwrite: bool = False,
    **options: Any,
) -> SaveReport:
    """Quantize a dense checkpoint of transformers into an MLX checkpoint.

    `source` is a folder or Hub repository, `folder` where to write; what `mlx_lm.load`
    reads stands there afterwards. What is quantized has the codes, scales and biases of
    mlx-lm's own conversion; routers, of which it quantizes some to 8 bits, stay dense.
    Weights are read, quantized and written one by one: at most a shard
    (`max_shard_bytes`) and one weight are in memory. `dtype` is that of scales, biases
    and dense tensors ("auto": the source's). Further options are those of
    `from_pretrained`. Returns what was written.

    Raises FileExistsError as `save_checkpoint` does, and what `from_pretrained` raises;
    then nothing is left behind.
    """
    config = AffineQuantizationConfig(bits, group_size, modules_to_not_convert)

    def model(writing: Writing) -> Any:
        return from_pretrained(
            source,
            dtype=dtype,
            model_class=model_class,
            quantization_config=config,
            sink=_Sink(writing),
            **options,
        )

    return save_into(
        folder, model, max_shard_bytes=max_shard_bytes, overwrite=overwrite
    )
