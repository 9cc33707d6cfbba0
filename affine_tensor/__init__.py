"""MLX-format quantized weights as tensors of PyTorch, in unmodified models."""

from . import dispatch as _dispatch  # noqa: F401  (fills the table of operators)
from .checkpoint.files import CheckpointError
from .checkpoint.load import LoadReport, load_checkpoint_
from .checkpoint.save import SaveReport, save_checkpoint
from .fold import fold_permutations_
from .hf import AffineQuantizationConfig, convert, from_pretrained, register
from .kernels import metal as _metal  # noqa: F401  (registers its kernels)
from .kernels.warmup import warmup
from .quantize import AffineConfig, dequantize_, footprint, quantize_
from .tensor import AffineQuantizedTensor
from .tensor import _rebuild as _rebuild  # by this name pickles find it

__version__ = "0.1.0"

__all__ = [
    "AffineConfig",
    "AffineQuantizationConfig",
    "AffineQuantizedTensor",
    "CheckpointError",
    "LoadReport",
    "SaveReport",
    "__version__",
    "convert",
    "dequantize_",
    "fold_permutations_",
    "footprint",
    "from_pretrained",
    "load_checkpoint_",
    "quantize_",
    "register",
    "save_checkpoint",
    "warmup",
]
