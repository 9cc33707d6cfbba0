"""What is special about each architecture's MLX checkpoints.

A model type that is not here needs nothing but the general rules of `names.py`. Read
each entry as: transformers' name, and what MLX calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .forms import Form, PlusOne, Rows, Scaled, Stored, Transposed  # noqa: F401


@dataclass(frozen=True)
class Rule:
    """A parameter whose renamed name matches `pattern` as a whole has this form.

    Names in the form may refer to groups of the pattern (``\\1``); a name with ``.*.``
    stands for one tensor for each expert.
    """

    pattern: str
    form: Form


@dataclass(frozen=True)
class Family:
    """What is special about the model types of one architecture.

    renames: pairs (pattern, replacement) of `re.sub`, applied one after the other to
        the name of each parameter or buffer, with MLX's prefix.
    rules: tried before the general ones, on the renamed name.
    absent: patterns (`re.search`) of the model's own names that MLX has no tensor for;
        zeros are right for them. They are not saved.
    ignored: patterns (`re.match`) of stored names that the model has no place for.
    """

    renames: Sequence[tuple[str, str]] = ()
    rules: Sequence[Rule] = ()
    absent: Sequence[str] = ()
    ignored: Sequence[str] = ()


def families_of(config: Any) -> list[Family]:
    """The families of a model with this configuration, most special first."""
    found = []
    for model_type in model_types(config):
        entry = FAMILIES.get(model_type)
        if entry is None:
            continue
        text = config.get_text_config()
        found.append(entry(text) if callable(entry) else entry)
    return found


def model_types(config: Any) -> list[str]:
    """The model type of a configuration and of its text part."""
    if config is None:
        return []
    types = [getattr(config, "model_type", None)]
    if hasattr(config, "get_text_config"):
        types.append(getattr(config.get_text_config(), "model_type", None))
    return [t for t in dict.fromkeys(types) if t]


# ---- families -------------------------------------------------------------------

_GPT_NEOX = Family(
    renames=[(r"^gpt_neox\.layers\.", "model.h."), (r"^gpt_neox\.", "model.")]
)

FAMILIES: dict[str, Family | Callable[[Any], Family]] = {
    "gpt_neox": _GPT_NEOX,
}
