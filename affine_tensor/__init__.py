"""MLX-format quantized weights as tensors of PyTorch, in unmodified models."""

import importlib
from typing import TYPE_CHECKING, Any

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
from .tensor import AffineQuantizedTensor
from .tensor import _rebuild as _rebuild  # by this name pickles find it

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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _let_transformers_save(model: Any) -> None:
    """Have `save_pretrained` of a transformers model know packed weights."""
    if hasattr(model, "save_pretrained"):
        importlib.import_module(".hf.saving", __name__).install()


_ON_PACKED.append(_let_transformers_save)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_TRANSFORMERS})
