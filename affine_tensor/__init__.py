"""MLX-format quantized weights as tensors of PyTorch, in unmodified models."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# The script `affine-tensor` answers `--help` and a shell's completion in a moment: there
# what imports torch waits for a command. Everybody else gets operators, and all that is
# registered with torch, by the import alone.
_IS_SCRIPT = os.path.basename((getattr(sys, "argv", None) or [""])[0]) in (
    "affine-tensor",
    "affine-tensor.exe",
)

if TYPE_CHECKING or not _IS_SCRIPT:
    from ._public import (
        AffineConfig,
        AffineQuantizedTensor,
        CalibrationReport,
        CheckpointError,
        LoadReport,
        MergeReport,
        SaveReport,
        calibrate_,
        choose_bits,
        dequantize_,
        fold_permutations_,
        footprint,
        fuse_projections,
        load_checkpoint_,
        merge_to_dense,
        prepare_for_lora,
        quantize_,
        save_checkpoint,
        split_projections,
        warmup,
    )
    from ._public import _rebuild as _rebuild  # by this name pickles find it

if TYPE_CHECKING:
    from .hf.config import AffineQuantizationConfig
    from .hf.convert import convert
    from .hf.pretrained import from_pretrained
    from .hf.register import register

__version__ = "0.1.0"

__all__ = [
    "AffineConfig",
    "AffineQuantizationConfig",
    "AffineQuantizedTensor",
    "CalibrationReport",
    "CheckpointError",
    "LoadReport",
    "MergeReport",
    "SaveReport",
    "__version__",
    "calibrate_",
    "choose_bits",
    "convert",
    "dequantize_",
    "fold_permutations_",
    "footprint",
    "from_pretrained",
    "fuse_projections",
    "load_checkpoint_",
    "merge_to_dense",
    "prepare_for_lora",
    "quantize_",
    "register",
    "save_checkpoint",
    "split_projections",
    "warmup",
]

_OF_TRANSFORMERS = (
    "AffineQuantizationConfig",
    "convert",
    "from_pretrained",
    "register",
)


def __getattr__(name: str) -> Any:
    # Only when asked for: transformers' quantizers import every other library's, which
    # takes seconds and prints.
    if name in _OF_TRANSFORMERS:
        return getattr(importlib.import_module(".hf", __name__), name)
    if name in __all__ or name == "_rebuild":  # in the script
        return getattr(importlib.import_module("._public", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
