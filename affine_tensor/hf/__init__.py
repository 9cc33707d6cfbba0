"""Stock transformers models with packed weights."""

from .pretrained import from_pretrained

__all__ = ["from_pretrained"]
