"""What config.json says of weights in compressed-tensors' formats: which can be loaded.

``quantization_config.config_groups`` names kinds of modules and, of each kind, what is
done to weights and activations, and the format that the weights are stored in.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"

# What other formats hold, for the refusal.
_OTHERS = {
    "int-quantized": "int8 weights, made for int8 activations",
    "naive-quantized": "int8 or fp8 weights, made for activations of the same kind",
    "float-quantized": "fp8 weights, which are not evenly spaced",
    "nvfp4-pack-quantized": "4-bit floats with fp8 scales",
    "mxfp4-pack-quantized": "4-bit floats with scales that are powers of two",
    "mxfp6-pack-quantized": "6-bit floats with scales that are powers of two",
    "mxfp8-quantized": "fp8 weights, which are not evenly spaced",
    "marlin-24": "2:4 sparse weights in the layout of a CUDA kernel",
    "dense": "weights that are not packed",
    "fakequant": "weights that are not packed",
}
AGAIN = "Quantize the original model again with llm-compressor"
WEIGHTS_ONLY = f"{AGAIN}, to weights alone (W4A16 or W8A16)"

_ACTIVATIONS = ("input_activations", "output_activations")


class Scheme(NamedTuple):
    """What one config group says of its weights."""

    bits: int
    group: int  # -1: a whole row
    symmetric: bool
    by_group: bool  # actorder "group": there must be a weight_g_idx

    def __str__(self) -> str:
        where = (
            "a group for each row" if self.group == -1 else f"group size {self.group}"
        )
        return f"{self.bits} bits, {where}"


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The quantization settings of a config.json; {} if they are another method's."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if not isinstance(found, dict):
                continue
            # Files of 2024 have the latter name, or the settings one level deeper.
            only_ours = key == "compression_config"
            method = found.get("quant_method", METHOD if only_ours else None)
            inner = found.get("quantization_config")
            if isinstance(inner, dict):
                found = {**found, **inner}
            return found if method == METHOD else {}
    return {}


def check(found: dict[str, Any], packed: list[str]) -> list[str]:
    """Why a checkpoint with these settings cannot be loaded as a whole, if there are
    reasons. `packed`: names of its packed tensors."""
    problems = []
    if packed and not _groups(found):
        problems.append(
            f"{packed[0]} is there, and config.json has no "
            "quantization_config with config_groups, which say whether activations are "
            f"quantized too. Take the config.json that {METHOD} wrote"
        )
    for key, group in _groups(found).items():
        problem = _check_group(f"config_groups.{key}", group, found.get("format"))
        if problem:
            problems.append(problem)
    sparsity = found.get("sparsity_config")
    if sparsity and not (
        isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    ):
        problems.append(
            f"sparsity_config is {_short(sparsity)}; allowed are none and format 'dense'. "
            "Sparse weights are stored without their zeros. Quantize the model again "
            "without a sparsity modifier"
        )
    transforms = found.get("transform_config")
    if transforms and transforms != {"config_groups": {}}:
        problems.append(
            f"transform_config is {_short(transforms)}; allowed is none. It has "
            "activations rotated while the model runs, which its module here would not "
            "do. Quantize the model again without SpinQuant, QuIP or other transforms"
        )
    return [f"quant_method {METHOD!r}: {problem}" for problem in problems]


def _groups(found: dict[str, Any]) -> dict[str, Any]:
    groups = found.get("config_groups")
    return groups if isinstance(groups, dict) else {}


def _check_group(where: str, group: Any, general: Any) -> str | None:
    """The first reason that one config group gives, if any."""
    if not isinstance(group, dict):
        return (
            f"{where} is {_short(group)}; an object with weights is needed. Write out "
            "what the scheme stands for"
        )
    for key in _ACTIVATIONS:
        if group.get(key) and (group.get("format") or general) in (FORMAT, None):
            return (
                f"{where}.{key} is {_short(group[key])}; allowed is null. The model was "
                "made for quantized activations, and would give other results without. "
                f"{WEIGHTS_ONLY}"
            )
    weights = group.get("weights")
    if weights is None and not any(map(group.get, _ACTIVATIONS)):
        return None  # modules left as they are
    own = group.get("format")
    format = own or general
    if format != FORMAT:
        says = f"{where}.format" if own else "format"
        what = _OTHERS.get(format, "") if isinstance(format, str) else ""
        if format == "mixed-precision":
            what, says = f"{where}.format says nothing", "format"
        return (
            f"{says} is {_short(format)}{what and f' ({what})'}; allowed is {FORMAT!r}. "
            f"{WEIGHTS_ONLY}, or load it with the {METHOD} library"
        )
    if not isinstance(weights, dict):
        return f"{where}.weights is {_short(weights)}; an object is needed. {AGAIN}"
    return _check_weights(f"{where}.weights", weights)


def _check_weights(where: str, weights: dict[str, Any]) -> str | None:
    kind = weights.get("type", "int")
    if str(kind).lower() != "int":
        return f"{where}.type is {_short(kind)}; allowed is 'int'. {WEIGHTS_ONLY}"
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or not 1 <= bits <= 8:
        return f"{where}.num_bits is {_short(bits)}; allowed are 1 to 8. {AGAIN}"
    strategy, size = _strategy(weights), weights.get("group_size")
    if strategy not in ("group", "channel"):
        return (
            f"{where}.strategy is {_short(strategy)}; allowed are 'group' and 'channel'. "
            f"{AGAIN}, with one of these"
        )
    if strategy == "group" and (type(size) is not int or size < 1):
        return (
            f"{where}.group_size is {_short(size)}; a positive number is needed. Correct "
            "it in config.json"
        )
    return None


def _strategy(weights: dict[str, Any]) -> Any:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None and isinstance(size, int):  # inferred as the library does
        return "channel" if size == -1 else "group"
    if strategy is None:
        return "tensor"
    return strategy.lower() if isinstance(strategy, str) else strategy


def schemes(found: dict[str, Any]) -> set[Scheme]:
    """What the config groups that can be loaded say of their weights."""
    named = set()
    for key, group in _groups(found).items():
        if _check_group(key, group, found.get("format")) or not group.get("weights"):
            continue
        weights = group["weights"]
        size = weights["group_size"] if _strategy(weights) == "group" else -1
        actorder = str(weights.get("actorder")).lower()
        named.add(
            Scheme(
                weights.get("num_bits", 8),
                size,
                bool(weights.get("symmetric", True)),
                actorder in ("group", "dynamic", "true"),
            )
        )
    return named


def is_old(found: dict[str, Any]) -> bool | None:
    """Whether a version wrote it that had no codes reach over words, if it says."""
    version = re.match(r"(\d+)\.(\d+)", str(found.get("version")))
    return (int(version[1]), int(version[2])) < (0, 18) if version else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
