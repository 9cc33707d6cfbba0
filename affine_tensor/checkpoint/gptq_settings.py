"""What the settings of a GPTQ checkpoint say, and which of them are refused.

They stand in config.json under ``quantization_config``, in old files in
``quantize_config.json``. AutoGPTQ and GPTQModel call the layout ``checkpoint_format`` or
``format``, AutoRound ``packing_format``, in its first files ``backend``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import layout
from .files import Checkpoint, read_json

BITS = (2, 3, 4, 5, 6, 7, 8)
_GPTQ = "gptq"
_AUTO_ROUND = ("auto-round", "intel/auto-round", "auto_round", "autoround")
# Other methods with tensors of the same kind, or whose files call themselves GPTQ.
_OTHERS = ("marlin", "gptq_marlin", "bitblas", "qqq", "exl3", "paroquant", "vptq")

# What the labels say: whether zeros are stored less one.
_FORMATS = {"gptq": True, "gptq_v2": False, "gptq_p": False}
_PACKINGS = {
    "auto": True,
    "gptq": True,
    "auto_gptq": True,
    "gptq_zp+-1": True,
    "auto_gptq_zp+-1": True,
    "auto_round": False,
    "gptqmodel": False,
    "exllamav2": False,
    "tritonv2": False,
    "triton": False,
}


def stems_of(checkpoint: Checkpoint) -> list[str]:
    """What stands before "qweight": "model.head.", say."""
    names = (n for n in checkpoint.tensors if n == "qweight" or n.endswith(".qweight"))
    return [name.removesuffix("qweight") for name in names]


def settings(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """Where the quantization settings stand, and what they are; {} if nowhere."""
    config = checkpoint.config
    text = config.get("text_config")
    for where, found in (("", config), ("text_config.", text)):
        if isinstance(found, dict) and isinstance(found.get(_KEY), dict):
            return f"{where}{_KEY}", found[_KEY]
    for name in ("quantize_config.json", "quant_config.json"):
        found = read_json(checkpoint.folder / name)
        # Those of old AWQ files have no method either.
        if found and not {"w_bit", "q_group_size", "zero_point"} & found.keys():
            return name, found
    return "config.json", {}


_KEY = "quantization_config"


def _method(entry: dict[str, Any]) -> str | None:
    method = entry.get("quant_method", entry.get("method"))
    return None if method is None else str(method).lower()  # of a number, too


def _packing(entry: dict[str, Any]) -> str:
    """AutoRound's name of the packing, without what says which kernel runs it."""
    for key in _LAYOUTS:
        value = entry.get(key)
        if isinstance(value, str) and value != "auto":
            value = value.lower().replace("autoround", "auto_round")
            value = value.replace("auto-round", "auto_round")
            return (value.removeprefix("auto_round:") or "auto").split(":")[0]
    return "auto"


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint says that it is GPTQ or of its kin, or has its tensors."""
    _, entry = settings(checkpoint)
    stems = stems_of(checkpoint)
    if isinstance(checkpoint.config.get("quantization"), dict) and not stems:
        return False  # MLX's, and the rest left over from its source
    method = _method(entry)
    if method in _AUTO_ROUND:
        return "awq" not in _packing(entry)
    if method is not None:
        return method == _GPTQ or method in _OTHERS
    return any(_is_gptq(checkpoint, stem) for stem in stems)


def _is_gptq(checkpoint: Checkpoint, stem: str) -> bool:
    """Whether a module has GPTQ's shapes: AWQ's has its words along N."""
    words, scales = (checkpoint.tensors.get(stem + n) for n in ("qweight", "scales"))
    return (
        words is not None and scales is not None and words.shape[1:] == scales.shape[1:]
    )


def check_settings(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with the quantization settings, if anything."""
    where, entry = settings(checkpoint)
    if not entry:
        return [
            "there are tensors named *.qweight, but no quantization_config in config.json "
            "and no quantize_config.json: they say how zeros are stored. Fetch them from "
            "where the model comes from"
        ]
    method = _method(entry) or _GPTQ
    here = f"{where} (quant_method {method!r})"
    if method in _OTHERS:
        return [f"{here}: allowed are gptq and auto-round. {_ORIGINAL}"]
    problems: list[str] = []
    seen = {str(entry[key]).lower() for key in _LABELS if entry.get(key)}
    if method in _AUTO_ROUND:
        if _packing(entry) not in _PACKINGS:
            key = next(key for key in _LAYOUTS if entry.get(key) not in (None, "auto"))
            problems.append(f"{key} is {entry[key]!r}; {_ROUND_ALLOWED}. {_ORIGINAL}")
    elif seen - _FORMATS.keys():
        problems += [
            f"{key} is {entry[key]!r}; allowed are {', '.join(_FORMATS)}. {_ORIGINAL}"
            for key in _LABELS
            if entry.get(key) and str(entry[key]).lower() not in _FORMATS
        ]
    elif len(seen) > 1:
        either = " and ".join(f"{key} is {entry[key]!r}" for key in _LABELS)
        problems.append(f"{either}; both must be the same. Correct the wrong one")
    if entry.get("is_marlin_format"):
        problems.append(f"is_marlin_format is true; allowed is false. {_ORIGINAL}")
    if any(name == "B" or name.endswith(".B") for name in checkpoint.tensors):
        problems.append(f"there are tensors *.B, words of marlin kernels. {_ORIGINAL}")
    for key, because in _CHANGES.items():
        if entry.get(key):
            problems.append(f"{key} is {entry[key]!r}; allowed is null: {because}")
    own = next(iter(seen), _GPTQ)
    for name, rule in [("", entry), *_rules(entry)]:
        problems += _check_rule(f" of {name!r}" if name else "", {**entry, **rule})
        for key in _LABELS:
            if name and str(rule.get(key, own)).lower() != own:
                problems.append(
                    f"{key} of {name!r} is {rule[key]!r}; allowed is that of the whole "
                    f"model, {own!r}. Quantize the model again"
                )
    return [f"{here}: {problem}" for problem in problems]


def _check_rule(of: str, rule: dict[str, Any]) -> list[str]:
    """What is wrong with the settings for all modules, or for one."""
    bits, kind, act_bits = (rule.get(k) for k in ("bits", "data_type", "act_bits"))
    problems: list[str] = []
    if isinstance(bits, int) and bits >= 16:
        return problems  # left dense
    if bits not in BITS:
        problems.append(
            f"bits{of} is {bits!r}; allowed are {layout.join(BITS)}. Quantize the model "
            "again"
        )
    if kind not in (None, "int"):
        problems.append(
            f"data_type{of} is {kind!r}; allowed is int. Quantize the model again"
        )
    if isinstance(act_bits, int) and act_bits < 16:
        problems.append(
            f"act_bits{of} is {act_bits}; allowed is 16: {_CHANGES['activation']}"
        )
    return problems


_LABELS = ("format", "checkpoint_format")
_LAYOUTS = ("packing_format", "backend")  # the latter in files of 2024
_ROUND_ALLOWED = "allowed are auto_round:auto_gptq and auto_round:gptqmodel"
_ORIGINAL = (
    "It is another layout or method. Load the GPTQ file that it was made from, or "
    "quantize the model again with GPTQModel, format gptq"
)
_CHANGES = {
    "rotation": "down_proj needs a Hadamard transform of its input. Quantize the model "
    "again without",
    "activation": "activations are not quantized here. Take a weight-only model",
}


def _rules(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rules for single modules: GPTQModel's and AutoRound's."""
    found = (entry.get(key) for key in ("dynamic", "extra_config"))
    return [
        (name, rule)
        for rules in found
        if isinstance(rules, dict)
        for name, rule in rules.items()
        if isinstance(rule, dict) and not name.startswith("-")
    ]


class Declared:
    """What the settings say about all modules, or about any."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.where, entry = settings(checkpoint)
        rules = [entry, *(rule for _, rule in _rules(entry))]
        self.bits = _numbers(rules, "bits")
        self.groups = _numbers(rules, "group_size")
        self.method = _method(entry) or _GPTQ
        self.auto_round = self.method in _AUTO_ROUND
        label = next((entry[k] for k in _LABELS if entry.get(k) is not None), _GPTQ)
        self.label = str(label).lower()
        labels, own = _FORMATS, self.label
        if self.auto_round:
            labels, own = _PACKINGS, _packing(entry)
        self.less_one = labels.get(own, True)
        says = {rule["sym"] for rule in rules if isinstance(rule.get("sym"), bool)}
        self.symmetric = entry.get("sym") if len(says) == 1 else None
        meta = entry.get("meta")
        quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
        self.by_gptqmodel = "gptqmodel" in str(quantizer).lower()

    def group(self, columns: int, groups: int) -> int | None:
        """The size of the stored groups, of which the last may be shorter."""
        exact = columns // groups if columns % groups == 0 else None
        if exact and (not self.groups or exact in self.groups):
            return exact
        if groups == 1 and min(self.groups) <= 0:
            return columns
        fits = (g for g in self.groups if g > 0 and -(-columns // g) == groups)
        return min(next(fits, 0), columns) or None


def _numbers(rules: Iterable[dict[str, Any]], key: str) -> list[int]:
    """All values of a key, each once, the general one first."""
    values = (rule.get(key) for rule in rules)
    return list(dict.fromkeys(v for v in values if type(v) is int))
