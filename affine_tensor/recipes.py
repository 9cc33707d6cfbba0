"""Recipes: which module gets how many bits.

A recipe is the name of one of mlx-lm's (`NAMES`), a JSON file, a mapping of modules to
configurations, or a function. `resolve` brings all of them into one form; `named` makes
one of mlx-lm's a filter for `quantize_`.

    quantize_(model, filter_fn=recipes.named("mixed_3_6", model))
    convert("org/dense", "mixed", recipe={"*.down_proj": AffineConfig(6)})
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from . import layout
from .checkpoint.names import Names, is_tower
from .quantize import AffineConfig, Filter, slots

# Of each of mlx-lm's recipes the low and the high width, in bits.
NAMES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6)}
NAMES |= {"mixed_4_6": (4, 6)}

Answer = bool | AffineConfig
Recipe = str | Path | Mapping[str, Any] | Callable[[str], Answer]

# Asked with the name of a parameter and the module of MLX that (a part of) it becomes.
Choose = Callable[[str, str], Answer]


def named(recipe: str, model: nn.Module, group_size: int = 64) -> Filter:
    """One of mlx-lm's recipes as `filter_fn` of `quantize_` for this model.

    `recipe` is one of `NAMES`; modules get the widths that mlx-lm gives to what it calls
    them, all in groups of `group_size`. Modules that see or hear stay dense: mlx-lm has
    none. Weights that are shared count by the first of their names. Raises ValueError
    for another name, and for a model without any `down_proj`, as mlx-lm does.
    """
    choose = _named(recipe, model, group_size)
    first = _first_names(model)
    paths = module_paths(model)

    def filter_fn(module: nn.Module, name: str) -> Answer:
        weight = first.get(f"{name}.weight" if name else "weight")
        if weight is None:
            return False
        return _highest([choose(weight, path) for path in paths.get(weight, [])])

    def _highest(answers: list[Answer]) -> Answer:
        configs = [a for a in answers if isinstance(a, AffineConfig)]
        return max(configs, key=lambda own: own.bits) if configs else False

    return filter_fn


def resolve(recipe: Recipe | None, model: nn.Module, default: AffineConfig) -> Choose:
    """The recipe as one function of names; without one everything takes `default`.

    True in an answer is `default`, False leaves dense. Names of a mapping are those of
    modules or parameters of the model, or MLX's; or patterns with `*`, of which the first
    that matches counts, after exact names. The mapping may be nested, as a file is:
    ``{"modules": {...}, "default": {"bits": 4, "group_size": 64}}``.

    Raises ValueError for an unknown recipe, for names that are none of the model's, and
    for configurations that are none; each tells the choices.
    """
    if recipe is None:
        return lambda name, path: True
    if isinstance(recipe, str) and recipe in NAMES:
        return _named(recipe, model, default.group_size)
    if isinstance(recipe, (str, Path)):
        return _mapped(read(recipe), model)
    if isinstance(recipe, Mapping):
        return _mapped(recipe, model)
    if callable(recipe):
        return _asked(recipe)
    raise TypeError(
        f"recipe is {recipe!r}; {_choices()}, a mapping of modules to AffineConfig or "
        "False, or a function of a module's name is needed"
    )


def default_of(mapping: Mapping[str, Any]) -> Answer:
    """What a mapping says of the modules that it does not name."""
    nested = isinstance(mapping.get("modules"), Mapping)
    given = mapping.get("default") if nested else None
    return True if given is None else _answer("default", given)


def _choices() -> str:
    return f"one of {', '.join(NAMES)}, a JSON file"


def read(path: str | Path) -> dict[str, Any]:
    """The recipe in a JSON file: ``{"modules": {name: {"bits", "group_size"} | false},
    "default": {...}}``, or the modules alone.

    Raises ValueError for a name that is neither a recipe nor such a file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"recipe is {str(path)!r}, and there is no such file; {_choices()} is needed"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} holds a {type(found).__name__}; an object with 'modules' is needed"
        )
    return found


# ---- mlx-lm's -------------------------------------------------------------------


def _named(recipe: str, model: nn.Module, group_size: int) -> Choose:
    if recipe not in NAMES:
        raise ValueError(f"recipe is {recipe!r}; there are {', '.join(NAMES)}")
    low, high = (AffineConfig(bits, group_size) for bits in NAMES[recipe])
    paths = [path for own in module_paths(model).values() for path in own]
    down = [path.split(".") for path in paths if "down_proj" in path]
    down = [parts for parts in down if not is_tower(".".join(parts))]
    if not down:
        raise ValueError(
            f"{recipe} is made for models with modules called down_proj, and "
            f"{type(model).__name__} has none in MLX. Give a mapping of modules, or a "
            "function"
        )
    place = next((i for i, part in enumerate(down[0]) if part.isdigit()), -1)
    count = 1 + max(_number(path, place) for path in paths if not is_tower(path))

    def choose(name: str, path: str) -> Answer:
        if is_tower(path):
            return False
        index, eighth = _number(path, place), count // 8
        more = index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2
        keys = ("v_proj", "v_a_proj", "v_b_proj", "down_proj")
        if "lm_head" in path or (more and any(key in path for key in keys)):
            return high
        return low

    return choose


def _number(path: str, place: int) -> int:
    """The number of the layer, which stands at one place in all paths; 0 outside."""
    parts = path.split(".")
    there = parts[place] if 0 <= place < len(parts) else ""
    return int(there) if there.isdigit() else 0


def module_paths(model: nn.Module) -> dict[str, list[str]]:
    """Of each distinct matrix or stack of them the modules that MLX has for it."""
    names = Names(model)
    first = _first_names(model)
    paths = {}
    for slot in slots(model).values():
        value = slot.parameter
        if slot.name != first[slot.name] or value.dim() < 2:
            continue
        if value.is_floating_point() and not names.is_absent(slot.name):
            form = next(names.forms(slot.name, value.shape))
            stored = form.names()
            paths[slot.name] = [name.removesuffix(".weight") for name in stored]
    return paths


def tied(model: nn.Module) -> dict[str, str]:
    """Of each other name of a shared parameter its first one."""
    return {name: own for name, own in _first_names(model).items() if name != own}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each name of each parameter, and the first one of the same parameter."""
    first = {}
    for slot in slots(model).values():
        for module, _, own in slot.places:
            first[f"{module}.{own}" if module else own] = slot.name
    # transformers ties some only after it has loaded them.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in tied.items():
        if name in first and source in first:
            first[name] = first[source]
    return first


# mlx-lm has these routers as Linear modules, which its recipes quantize, and transformers
# as parameters of a class of their own. Types of transformers, and what MLX calls it.
_ROUTERS = {
    **dict.fromkeys(
        (
            *("ernie4_5_moe", "kimi_linear", "lfm2_moe", "mellum", "minimax"),
            *("minimax_m2", "minimax_m3_vl_text", "mistral4", "mixtral", "olmoe"),
            *("phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text"),
            "qwen3_vl_moe_text",
        ),
        "gate",
    ),
    "afmoe": "router.gate",
    "gpt_oss": "router",
    "granitemoe": "router.layer",
    "granitemoehybrid": "router.layer",
    "jamba": "router",
    "laguna": "gate.proj",
    "llama4_text": "router",
}


def is_linear_router(model: nn.Module, path: str) -> bool:
    """Whether MLX has this module, a router, as one that mlx-lm's recipes quantize."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    own = _ROUTERS.get(getattr(config.get_text_config(), "model_type", ""))
    return own is not None and path.endswith(f".{own}")


# ---- a user's -------------------------------------------------------------------


def _asked(function: Callable[[str], Answer]) -> Choose:
    def choose(name: str, path: str) -> Answer:
        module = name.removesuffix(".weight")
        answer = function(module)
        if not isinstance(answer, (bool, AffineConfig)):
            raise TypeError(
                f"the recipe returned {answer!r} for {module}; a bool or an "
                "AffineConfig is needed"
            )
        return answer

    return choose


def _mapped(mapping: Mapping[str, Any], model: nn.Module) -> Choose:
    default = default_of(mapping)
    modules: Mapping[str, Any] = mapping
    if isinstance(mapping.get("modules"), Mapping):
        unknown = mapping.keys() - {"modules", "default"}
        # Others than these tell of how it was found.
        modules = mapping["modules"]
        clash = [key for key in unknown if isinstance(mapping[key], AffineConfig)]
        if clash:
            raise ValueError(f"recipe: {', '.join(clash)} must stand within 'modules'")
    answers = {name: _answer(name, value) for name, value in modules.items()}
    _check_names(answers, model)

    def choose(name: str, path: str) -> Answer:
        known = _names_of(name, path)
        for own in known:
            if own in answers:
                return answers[own]
        for pattern, answer in answers.items():
            if any(fnmatchcase(own, pattern) for own in known):
                return answer
        return default

    return choose


def _names_of(name: str, path: str) -> tuple[str, ...]:
    """What a user may call a parameter, the most special first."""
    return (name, name.removesuffix(".weight"), path, name.rpartition(".")[0])


def _check_names(answers: Mapping[str, Answer], model: nn.Module) -> None:
    pairs = [(n, path) for n, own in module_paths(model).items() for path in own]
    known = {own for name, path in pairs for own in _names_of(name, path)}
    lost = [
        pattern
        for pattern in answers
        if pattern not in known and not any(fnmatchcase(own, pattern) for own in known)
    ]
    if not lost:
        return
    for name, first in tied(model).items():
        alias, own = (n.removesuffix(".weight") for n in (name, first))
        if any(fnmatchcase(n, lost[0]) or n == lost[0] for n in (name, alias)):
            raise ValueError(
                f"the recipe names {lost[0]}, which has no weight of its own in this "
                f"{type(model).__name__}: it is tied to {own}. Name that"
            )
    modules = list(dict.fromkeys(name.removesuffix(".weight") for name, _ in pairs))
    near = difflib.get_close_matches(lost[0], modules, 5, 0.5) or modules[:8]
    raise ValueError(
        f"the recipe names {layout.join(lost[:5])}, and {type(model).__name__} has no "
        f"such weights. It has {', '.join(near)}, …; patterns such as "
        "'*.down_proj' or 'model.layers.0.*' are taken too"
    )


def _answer(name: str, value: Any) -> Answer:
    if isinstance(value, (bool, AffineConfig)):
        return value
    if isinstance(value, Mapping) and "bits" in value:
        unknown = value.keys() - {"bits", "group_size", "mode"}
        if not unknown and value.get("mode", "affine") == "affine":
            try:
                return AffineConfig(value["bits"], value.get("group_size", 64))
            except (ValueError, TypeError) as error:
                raise ValueError(f"recipe, {name}: {error}") from error
    raise ValueError(
        f"recipe, {name}: {value!r} is no configuration; false, an AffineConfig or "
        '{"bits": 4, "group_size": 64} is needed'
    )
