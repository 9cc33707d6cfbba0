"""The quantization config that transformers sees."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import layout

METHOD = "affine"


@register_quantization_config(METHOD)
class AffineQuantizationConfig(QuantizationConfigMixin):
    """How transformers' `from_pretrained` quantizes a dense model, or reads an MLX one.

    Given for a dense checkpoint, its weights are quantized one by one while they are
    read: `nn.Linear`, `nn.Embedding` and stacks of experts. An MLX checkpoint decides
    `bits` and `group_size` itself; then only `dequantize` counts.

    bits, group_size: as in `AffineConfig`.
    modules_to_not_convert: modules that stay dense, by the beginnings or ends of their
        names, as transformers' other configs take them; default none.
    dequantize: make every weight dense after reading.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 64,
        modules_to_not_convert: list[str] | None = None,
        dequantize: bool = False,
        **kwargs: Any,
    ) -> None:
        if kwargs.keys() - {"quant_method"}:
            unknown = ", ".join(sorted(kwargs.keys() - {"quant_method"}))
            raise TypeError(
                f"{unknown}: no option of AffineQuantizationConfig; it has bits, "
                "group_size, modules_to_not_convert and dequantize"
            )
        layout.check_format(bits, group_size)
        self.quant_method: Any = METHOD
        self.bits = bits
        self.group_size = group_size
        self.modules_to_not_convert = modules_to_not_convert
        self.dequantize = dequantize

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "bits": self.bits,
            "group_size": self.group_size,
            "modules_to_not_convert": self.modules_to_not_convert,
        }
