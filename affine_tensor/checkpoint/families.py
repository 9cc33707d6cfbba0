"""What is special about each architecture's MLX checkpoints.

A model type that is not here needs nothing but the general rules of `names.py`. Read
each entry as: transformers' name, and what MLX calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .forms import Form, PlusOne, Rows, Scaled, Stored, Transposed  # noqa: F401
from .names import Family, model_types


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


# ---- families -------------------------------------------------------------------

_GPT_NEOX = Family(
    renames=[(r"^gpt_neox\.layers\.", "model.h."), (r"^gpt_neox\.", "model.")]
)

FAMILIES: dict[str, Family | Callable[[Any], Family]] = {
    "gpt_neox": _GPT_NEOX,
}
