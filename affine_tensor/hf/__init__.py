"""Stock transformers models with packed weights."""

from .config import AffineQuantizationConfig
from .convert import convert
from .pretrained import from_pretrained
from .register import register
from .saving import install as _install_saving

_install_saving()

__all__ = ["AffineQuantizationConfig", "convert", "from_pretrained", "register"]
