"""The quantization config that transformers sees."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import layout
from ..recipes import NAMES, Recipe

METHOD = "affine"


@register_quantization_config(METHOD)
class AffineQuantizationConfig(QuantizationConfigMixin):
    """How transformers' `from_pretrained` quantizes a dense model, or reads an MLX one.

    Given for a dense checkpoint, its weights are quantized one by one while they are
    read: `nn.Linear`, `nn.Embedding` and stacks of experts. An MLX checkpoint decides
    `bits` and `group_size` itself; then only `dequantize` counts.

    Args:
        bits: as in `AffineConfig`.
        group_size: the same.
        modules_to_not_convert: modules that stay dense with what is in them, by the
            beginnings or ends of their names, as transformers' other configs take them,
            or by patterns such as ``"*.mlp.*"``; default none.
        dequantize: make every weight dense after reading.
        recipe: modules of other bits, as `affine_tensor.recipes` has it: the name of
            one of mlx-lm's ("mixed_3_6"), a JSON file, a mapping of modules to
            `AffineConfig` or False, or a function of a module's name that returns one
            of these, or True.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 64,
        modules_to_not_convert: list[str] | None = None,
        dequantize: bool = False,
        recipe: Recipe | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.keys() - {"quant_method"}:
            unknown = ", ".join(sorted(kwargs.keys() - {"quant_method"}))
            raise TypeError(
                f"{unknown}: no option of AffineQuantizationConfig; it has bits, "
                "group_size, modules_to_not_convert, dequantize and recipe"
            )
        layout.check_format(bits, group_size)
        self.quant_method: Any = METHOD
        self.bits = bits
        self.group_size = group_size
        self.modules_to_not_convert = modules_to_not_convert
        self.dequantize = dequantize
        self.recipe = recipe

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "quant_method": self.quant_method,
            "bits": self.bits,
            "group_size": self.group_size,
            "modules_to_not_convert": self.modules_to_not_convert,
        }
        if isinstance(self.recipe, str) and self.recipe in NAMES:
            values["recipe"] = self.recipe  # of others the packed weights tell
        return values
