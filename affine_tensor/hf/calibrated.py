"""`convert --calibrate`: the codes are fitted to a text."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..checkpoint.files import CheckpointError, fetch, open_checkpoint
from ..checkpoint.formats import recognizes
from ..checkpoint.save import SaveReport, check_free, save_checkpoint
from ..quantize import AffineConfig
from .choices import Choices, check_skipped
from .config import AffineQuantizationConfig


def convert_calibrated(
    source: str | Path,
    folder: str | Path,
    text: str | Path,
    config: AffineQuantizationConfig,
    *,
    dtype: Any = "auto",
    revision: str | None = None,
    max_shard_bytes: int,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[SaveReport, Any]:
    """As `convert` of a dense checkpoint, with codes that `calibrate_` chose for a text.

    `text` is a file in UTF-8. The whole dense model is in memory. Returns what was
    written, and the report of the calibration. Raises as `convert` and `calibrate_` do,
    and ImportError if this version has no calibration.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        calibrate_ = importlib.import_module("affine_tensor.calibrate").calibrate_
    except ModuleNotFoundError as error:
        raise ImportError(
            "this version of affine_tensor has no calibration (affine_tensor.calibrate); "
            "convert without --calibrate"
        ) from error
    check_free(Path(folder).expanduser(), overwrite)
    words = Path(text).expanduser().read_text(encoding="utf-8")
    place = fetch(source, revision=revision)
    if recognizes(open_checkpoint(place)):
        raise CheckpointError(
            f"{source} is quantized already; a dense checkpoint is calibrated. Convert "
            "it with --dequantize first"
        )
    model = AutoModelForCausalLM.from_pretrained(
        place, dtype=dtype, trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    check_skipped(model, config.modules_to_not_convert or [])
    choices = Choices(model, config)
    first = {id(p): name for name, p in model.named_parameters()}

    def filter_fn(module: Any, name: str) -> bool | AffineConfig:
        own = first.get(id(module.weight))
        chosen = "" if own is None else choices.config_for(own, module.weight)
        return chosen if isinstance(chosen, AffineConfig) else False

    found = calibrate_(
        model,
        [words],
        choices.default,
        filter_fn,
        tokenizer=tokenizer,
        progress=progress,
    )
    report = save_checkpoint(
        model,
        folder,
        tokenizer=place,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )
    return report, found
