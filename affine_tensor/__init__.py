"""MLX-format quantized weights as tensors of PyTorch, in unmodified models."""

from . import dispatch as _dispatch  # fills the tensor's table of operators
from .tensor import AffineQuantizedTensor

__version__ = "0.1.0"

__all__ = ["AffineQuantizedTensor", "__version__"]
