"""What an AWQ checkpoint says about itself, in config.json or in files of their own.

AutoAWQ, llm-awq, gptqmodel and AutoRound have different keys for the same settings.
Which modules are quantized is not taken from here (``modules_to_not_convert``): it is
those that have a ``qweight``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import layout
from .files import Checkpoint, read_json

GEMM, GEMV, GEMV_FAST = "gemm", "gemv", "gemv_fast"
VERSIONS = {
    GEMM: GEMM,
    GEMV: GEMV,
    GEMV_FAST: GEMV_FAST,
    "llm-awq": GEMV_FAST,
    "llm_awq": GEMV_FAST,
}
_ALLOWED = "gemm, gemv, gemv_fast and llm-awq"

BITS = (2, 3, 4, 5, 6, 7, 8)

# AutoAWQ before 0.1.8, gptqmodel and AutoRound write their settings there (too).
_FILES = ("quant_config.json", "quantize_config.json", "quantization_config.json")

_VERSION_KEYS = ("version", "format", "checkpoint_format")
_BITS_KEYS = ("bits", "w_bit")
_GROUP_KEYS = ("group_size", "q_group_size")


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says about its quantization, and where."""

    file: str
    values: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.values.get("quant_method") or "awq")

    @property
    def is_awq(self) -> bool:
        if "quant_method" not in self.values:
            return "w_bit" in self.values
        method = self.method.lower()
        if method != "inc" and not _is_auto_round(method):
            return method == "awq"
        packing = (self.values.get(key) for key in ("packing_format", "backend"))
        return any("awq" in str(name).lower() for name in packing)

    @property
    def writer(self) -> str | None:
        """Who packed it, if it is AutoRound or gptqmodel."""
        provider = str(self.values.get("provider"))
        is_own = self.method.lower() == "inc" or "autoround_version" in self.values
        if is_own or _is_auto_round(self.method) or _is_auto_round(provider):
            return "auto-round"
        meta = self.values.get("meta")
        quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
        return "gptqmodel" if "gptqmodel" in str(quantizer) else None

    @property
    def version(self) -> str | None:
        """What it calls its layout; None if it does not say."""
        if self.values.get("backend") == "llm-awq":
            return None  # that project has had all three under one name
        if self.method.lower() != "awq":
            return GEMM  # all that AutoRound writes
        value = self._first(_VERSION_KEYS, None)[1]
        return None if value is None else str(value).lower()

    @property
    def bits(self) -> set[int]:
        """All widths that it names, for all modules or for some."""
        return self._named(_BITS_KEYS, 4)

    @property
    def groups(self) -> set[int]:
        """All group sizes that it names, for all modules or for some; -1: whole rows."""
        return self._named(_GROUP_KEYS, 128)

    def _named(self, keys: tuple[str, ...], default: int) -> set[int]:
        general = self._first(keys, default)[1]
        found = [general, *_all(self.values, keys)]
        return {value for value in found if type(value) is int}

    def _first(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        """The first of the keys that is set, and its value."""
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        return keys[0], default

    def problems(self) -> list[str]:
        """What keeps the whole checkpoint from being read, if anything."""
        found = [*self._check_version(), *self._check_numbers(), *self._check_others()]
        return [f"{self.file}: quant_method {self.method!r}: {text}" for text in found]

    def _check_version(self) -> Iterator[str]:
        for key in _VERSION_KEYS:
            value = self.values.get(key)
            if str(value).lower() in ("marlin", "bitblas"):
                yield (
                    f"{key} is {value!r}, the layout of a CUDA kernel; allowed are "
                    f"{_ALLOWED}. Load the checkpoint that it was made from, or quantize "
                    "the original model again with one of these"
                )
                return
        if self.version is not None and self.version not in VERSIONS:
            key, value = self._first(_VERSION_KEYS, None)
            yield (
                f"{key} is {value!r}; allowed are {_ALLOWED}. Quantize the original "
                "model again with one of these"
            )

    def _check_numbers(self) -> Iterator[str]:
        key, bits = self._first(_BITS_KEYS, 4)
        if type(bits) is not int or bits not in BITS:
            yield (
                f"{key} is {bits!r}; allowed are {layout.join(BITS)}. Quantize the "
                "original model again with one of these"
            )
        key, size = self._first(_GROUP_KEYS, 128)
        if type(size) is not int or (size < 1 and size != -1):
            yield (
                f"{key} is {size!r}; allowed are multiples of 16, and -1 for whole rows. "
                "Correct it, or quantize the original model again"
            )

    def _check_others(self) -> Iterator[str]:
        """What AutoRound may do besides."""
        for kind in dict.fromkeys(_all(self.values, ("data_type",))):
            if isinstance(kind, str) and not kind.startswith("int"):
                yield (
                    f"data_type is {kind!r}; allowed are integers (int). Quantize the "
                    "original model again with those"
                )
        for bits in dict.fromkeys(_all(self.values, ("act_bits",))):
            if isinstance(bits, int) and bits < 16:
                yield (
                    f"act_bits is {bits}: activations are quantized too; allowed is 16, "
                    "weights alone. Quantize the original model again so"
                )
        for key in ("rotation_config", "spinquant_config"):
            if self.values.get(key):
                yield (
                    f"{key} is {self.values[key]!r}: activations are rotated while the "
                    "model runs; allowed is none. Quantize the original model again "
                    "without it"
                )


def _is_auto_round(name: str) -> bool:
    return "auto-round" in name.lower().replace("_", "-")


def _all(value: Any, keys: tuple[str, ...]) -> Iterator[Any]:
    """The values of these keys, plain ones, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in keys and isinstance(item, (str, int)):
                yield item
            yield from _all(item, keys)


def settings(checkpoint: Checkpoint) -> Settings | None:
    """The settings in config.json, else those in a file of their own."""
    config = checkpoint.config
    for one in (config, config.get("text_config")):
        values = one.get("quantization_config") if isinstance(one, dict) else None
        if isinstance(values, dict) and values:
            return Settings("config.json", values)
    if any(stems(checkpoint)):  # else they are left over from another checkpoint
        for file in _FILES:
            found = Settings(file, read_json(checkpoint.folder / file))
            if found.is_awq:
                return found
    return None


def stems(checkpoint: Checkpoint) -> list[str]:
    """What stands before "qweight": "model.layers.0.mlp.up_proj.", say."""
    ends = (n for n in checkpoint.tensors if n == "qweight" or n.endswith(".qweight"))
    return [name.removesuffix("qweight") for name in ends]


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint says that it is AWQ, or has its tensors."""
    found = settings(checkpoint)
    if found is not None:
        return found.is_awq
    return any(_looks_like_awq(checkpoint, stem) for stem in stems(checkpoint))


def _looks_like_awq(checkpoint: Checkpoint, stem: str) -> bool:
    """Whether this is not GPTQ, whose words are as many in a row as its scales."""
    qweight = checkpoint.tensors[f"{stem}qweight"]
    scales = checkpoint.tensors.get(f"{stem}scales")
    if scales is None or f"{stem}g_idx" in checkpoint.tensors:
        return False
    return qweight.dtype == torch.int16 or qweight.shape[-1:] != scales.shape[-1:]


def check_settings(checkpoint: Checkpoint) -> list[str]:
    """What keeps the whole checkpoint from being read, if anything."""
    found = settings(checkpoint)
    if found is None:
        return [
            "its tensors named *.qweight look like AWQ's, but nothing says so: "
            "config.json has no quantization_config, and there is none of "
            f"{layout.join(_FILES)}. Fetch the one that belongs to them, or add to "
            'config.json "quantization_config": {"quant_method": "awq", "version": '
            '"gemm", "bits": 4, "group_size": 128, "zero_point": true}, with the values '
            "that are true"
        ]
    problems = found.problems()
    # AutoAWQ's ScaledActivation, behind the GELU of bloom, falcon, mpt, starcoder2, ...
    scaled = [name for name in checkpoint.tensors if name.endswith(".act.scales")]
    if scaled:
        problems.append(
            f"quant_method {found.method!r}: {len(scaled)} activations are divided by "
            f"scales of their own, {scaled[0]} for example; allowed are scales of "
            "weights. Quantize the original model again with another method, GPTQ for "
            "example"
        )
    return problems
