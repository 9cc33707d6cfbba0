"""All that `import affine_tensor` gives at once, and what it registers with torch."""

from __future__ import annotations

import importlib
from typing import Any

from . import dispatch as _dispatch  # noqa: F401  (fills the table of operators)
from . import distributed as _distributed  # noqa: F401  (adds the collectives)
from . import low_rank as _low_rank  # noqa: F401  (adds PEFT's sums)
from .calibrate import CalibrationReport, calibrate_, choose_bits
from .checkpoint.files import CheckpointError
from .checkpoint.load import LoadReport, load_checkpoint_
from .checkpoint.save import SaveReport, save_checkpoint
from .fold import fold_permutations_
from .fuse import fuse_projections, split_projections
from .kernels import cpu as _cpu  # noqa: F401  (registers its kernels)
from .kernels import cuda as _cuda  # noqa: F401
from .kernels import metal as _metal  # noqa: F401
from .kernels.warmup import warmup
from .lora import MergeReport, merge_to_dense, prepare_for_lora
from .quantize import ON_PACKED as _ON_PACKED
from .quantize import AffineConfig, dequantize_, footprint, quantize_
from .tensor import AffineQuantizedTensor, _rebuild

__all__ = [
    "AffineConfig",
    "AffineQuantizedTensor",
    "CalibrationReport",
    "CheckpointError",
    "LoadReport",
    "MergeReport",
    "SaveReport",
    "_rebuild",
    "calibrate_",
    "choose_bits",
    "dequantize_",
    "fold_permutations_",
    "footprint",
    "fuse_projections",
    "load_checkpoint_",
    "merge_to_dense",
    "prepare_for_lora",
    "quantize_",
    "save_checkpoint",
    "split_projections",
    "warmup",
]


def _let_transformers_save(model: Any) -> None:
    """Have `save_pretrained` of a transformers model know packed weights."""
    if hasattr(model, "save_pretrained"):
        importlib.import_module(".hf.saving", __package__).install()


_ON_PACKED.append(_let_transformers_save)
