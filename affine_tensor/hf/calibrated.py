"""`convert --calibrate`: the codes are fitted to a text."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from .. import layout
from ..checkpoint.companions import has_tokenizer
from ..checkpoint.files import Checkpoint, CheckpointError, fetch, open_checkpoint
from ..checkpoint.formats import recognizes
from ..checkpoint.save import SaveReport, Unsupported, check_free, save_checkpoint
from ..quantize import AffineConfig, slots
from ..recipes import module_paths
from .choices import Choices
from .config import AffineQuantizationConfig
from .convert import _bars, check_apart, check_dense
from .loading import _check_loaded


def convert_calibrated(
    source: str | Path,
    folder: str | Path,
    text: str | Path,
    config: AffineQuantizationConfig,
    *,
    dtype: Any = "auto",
    unsupported: Unsupported = "error",
    revision: str | None = None,
    max_shard_bytes: int,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[SaveReport, Any]:
    """As `convert` of a dense checkpoint, with codes that `calibrate_` chose for a text.

    `text` is a file in UTF-8. The whole dense model is in memory. Returns what was
    written, and the report of the calibration. Raises as `convert` and `calibrate_` do,
    and ImportError if this version has no calibration; what can be known before the
    model is read is raised before.
    """
    calibrate_ = _calibration()
    folder = Path(folder).expanduser()
    check_apart(source, folder)
    check_free(folder, overwrite)
    words = _read(Path(text).expanduser())
    place = fetch(source, revision=revision)
    checkpoint = open_checkpoint(place)
    _check_source(source, checkpoint)
    with _bars(progress):
        model, tokenizer = _load(place, dtype)
    choices = Choices(model, config)
    choices.check_for_mlx()
    dense = _reasons(choices)
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
        unsupported=unsupported,
        tokenizer=place,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )
    report.dense |= {n: why for n, why in dense.items() if n not in report.packed}
    return report, found


def _calibration() -> Any:
    try:
        return importlib.import_module("affine_tensor.calibrate").calibrate_
    except ModuleNotFoundError as error:
        raise ImportError(
            "this version of affine_tensor has no calibration (affine_tensor.calibrate); "
            "convert without --calibrate"
        ) from error


def _read(file: Path) -> str:
    if file.is_dir() or not file.exists():  # a pipe will do
        what = "it is a folder" if file.is_dir() else "there is no such file"
        raise FileNotFoundError(
            f"the calibration text is {file}, and {what}. Give a file of plain text"
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the calibration text {file} is not UTF-8 (byte {error.start}): convert it, "
            "as iconv does"
        ) from error


def _check_source(source: str | Path, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, or FileNotFoundError, for what cannot be calibrated."""
    if recognizes(checkpoint):
        raise CheckpointError(
            f"{source} is quantized already; a dense checkpoint is calibrated. Take the "
            "original"
        )
    check_dense(source, checkpoint)
    if not has_tokenizer(checkpoint.folder):
        raise FileNotFoundError(
            f"{source} has no tokenizer (tokenizer.json), which cuts the calibration text "
            "into tokens. Copy tokenizer.json and tokenizer_config.json from the original "
            "into it"
        )


def _load(place: Path, dtype: Any) -> tuple[Any, Any]:
    """The dense model, of which nothing is missing, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        place,
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told with what is missing
    )
    model, info = loaded
    _check_loaded(place, info)
    return model.eval(), tokenizer


def _reasons(choices: Choices) -> dict[str, str]:
    """Why matrices stay dense, by what MLX calls them."""
    values = {slot.name: slot.parameter for slot in slots(choices.model).values()}
    reasons: dict[str, str] = {}
    for name in module_paths(choices.model):
        value = values[name]
        for leaf in next(choices.names.forms(name, value.shape)).names():
            config = choices.config_for(name, value, leaf.removesuffix(".weight"))
            why: str | None = "calibration leaves stacks of experts as they are"
            if isinstance(config, str):
                why = config
            elif value.dim() == 2:
                why = layout.why_not(
                    value.shape[-1], bits=config.bits, group_size=config.group_size
                )
            if why is not None and leaf.endswith("weight"):
                reasons[leaf] = why
    return reasons
