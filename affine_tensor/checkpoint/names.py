"""From the names of a transformers model to those of an MLX checkpoint.

Every parameter of the model is asked where it lies in the checkpoint. The answer is a
list of forms (`forms.py`), in the order of preference: loading takes the first one whose
tensors are all there, saving takes the first. They come about in three steps:

1. prefixes, in which packagings differ: `model.language_model.layers…` here is
   `language_model.model.layers…` or `model.layers…` there;
2. the renames of the model's family (`families.py`);
3. rules, those of the family first: experts that are stacked, gate and up apart, and so
   on. By the kind of its module a convolution is channels-last, a `Conv1D` transposed.

The same way serves loading and saving, so that no rule is written twice, and a model
that never was an MLX checkpoint is saved as one too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from .families import Rule, families_of, is_text_part
from .forms import (
    ChannelsLast,
    Form,
    RowOrder,
    Rows,
    Stack,
    Stored,
    Transposed,
    interleaved,
)

# Of the model's own prefix the ones that packagings of MLX have, the usual one first.
# mlx-lm writes text alone; mlx-vlm also towers, which it calls by other names.
_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "model.language_model.",
        ("language_model.model.", "model.language_model.", "language_model.", "model."),
    ),
    (
        "model.visual.",
        ("vision_tower.", "visual.", "model.visual.", "model.vision_tower."),
    ),
    (
        "model.vision_tower.",
        (
            "vision_tower.",
            "vision_tower.vision_model.",
            "model.vision_tower.",
            "model.vision_tower.vision_model.",
        ),
    ),
    ("model.vision_model.", ("vision_model.", "vision_tower.", "model.vision_model.")),
    (
        "model.text_model.",
        ("language_model.", "language_model.model.", "model.text_model.", "model."),
    ),
    (
        "model.",
        ("model.", "language_model.model.", "model.language_model.", "language_model."),
    ),
    (
        "lm_head.",
        ("lm_head.", "language_model.lm_head.", "model.language_model.lm_head."),
    ),
    ("", ("", "model.", "language_model.model.", "language_model.")),
)

# What a language model has at its top.
_OF_TEXT = ("model.", "lm_head.")

# Experts: where the module `experts` of transformers is in MLX, and its projections.
_EXPERTS = (r"\1.switch_mlp", r"\1.experts.switch_glu", r"\1.switch_glu", r"\1.experts")
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

# Stored tensors that no model has a place for: they can be computed, or belong to heads
# that only speculative decoding uses.
_IGNORED = (
    r".*rotary_emb\.inv_freq$",
    r".*\.rotary_emb\.(cos|sin)_cached$",
    r"(.*\.)?mtp\.",
    r"(.*\.)?mtp_layers\.",
)

# What belongs to the towers of a model that sees or hears: a text model leaves it.
_TOWERS = re.compile(
    r"(model\.)?(vision_tower|visual|vision_model|vision_encoder|vision_embedder|"
    r"vision_embed_tokens|vision_adapter|vision_projection|vision_resampler|"
    r"multi_modal_projector|mm_projector|projector|(layerwise|spatial)_projectors|"
    r"patch_merger|patch_merge_mlp|mlp1|embed_vision|embed_audio|audio_tower|"
    r"audio_model|connector|perceiver|aligner|image_newline)\b"
)


def is_tower(stored: str) -> bool:
    """Whether this is a tensor of a part that sees or hears."""
    return _TOWERS.match(stored) is not None


# The head of a language model, which a model of its body alone leaves.
_HEAD = re.compile(r"(language_model\.|model\.)*lm_head\.")


class Names:
    """Where each parameter and buffer of one model lies in MLX checkpoints.

    Without `mlx`: in those that quantize another library's layout, so that nothing of
    the families counts, and convolutions are torch's.
    """

    def __init__(self, model: nn.Module, mlx: bool = True) -> None:
        self._mlx = mlx
        self.model = model
        config = getattr(model, "config", None)
        found = families_of(config) if mlx else []
        self._renames = [pair for family in found for pair in family.renames]
        self._rules = [rule for family in found for rule in family.rules]
        self._experts = [family.experts for family in found if family.experts]
        self._told_by = [family.told_by for family in found if family.told_by]
        self.unread = {n: s for family in found for n, s in family.unread.items()}
        self._absent = [re.compile(p) for family in found for p in family.absent]
        ignored = [*_IGNORED, *(p for family in found for p in family.ignored)]
        self._ignored = [re.compile(pattern) for pattern in ignored]
        modules = dict(model.named_modules())
        self._sees = any(is_tower(name) for name in modules)
        kinds = ["prefixes"] if self._sees else ["alone", "prefixes"]
        self._prefixes = [p for kind in kinds for f in found for p in getattr(f, kind)]
        if is_text_part(config):
            self._prefixes += [(own, f"language_model.{own}") for own in _OF_TEXT]
        self._modules = modules
        self._headless = not any("lm_head" in n.split(".") for n in modules)
        # Where the text model lies; `root` is what a body alone lacks of its prefix.
        texts = ("language_model.layers.", "text_model.layers.")
        self._root = "model." if any(n.startswith(texts) for n in modules) else ""
        texts = ("model.language_model.", "model.text_model.")
        self._nested = any((self._root + n).startswith(texts) for n in modules)

    def forms(self, name: str, shape: Sequence[int]) -> Iterator[Form]:
        """The forms of a parameter or buffer of this name, the one to save first."""
        module = self._modules.get(name.rpartition(".")[0])
        for spelled in self._spelled(name):
            renamed = spelled
            for pattern, replacement in self._renames:
                renamed = re.sub(pattern, replacement, renamed)
            for rule in (*self._rules, *self._expert_rules(name, module)):
                match = re.fullmatch(rule.pattern, renamed)
                if match:
                    yield _expanded(rule.form, match, shape)
            told = any(re.search(pattern, renamed) for pattern in self._told_by)
            yield from _own_forms(name, renamed, module, self._mlx, told)

    def _expert_rules(self, name: str, module: nn.Module | None) -> Iterator[Rule]:
        return _expert_rules(name, module, (*self._experts, *_EXPERTS))

    def is_absent(self, name: str) -> bool:
        """Whether MLX has no tensor for this parameter, and zeros are right."""
        return any(pattern.search(name) for pattern in self._absent)

    def is_ignored(self, stored: str) -> bool:
        """Whether the model needs nothing that is stored under this name."""
        if not self._sees and _TOWERS.match(stored):
            return True
        if self._headless and _HEAD.match(stored):
            return True
        return any(pattern.match(stored) for pattern in self._ignored)

    def _spelled(self, name: str) -> Iterator[str]:
        """The name with each of the prefixes that it may have in MLX."""
        name = self._root + name
        for own, prefix in self._prefixes:
            if name.startswith(own):
                yield prefix + name[len(own) :]
                break
        for own, stored in _PREFIXES:
            if name.startswith(own):
                if own == "lm_head." and self._nested:  # beside the text model there
                    stored = (stored[1], stored[0], stored[2])
                if own == "model." and self._nested:  # a part beside the text model
                    stored = ("", *stored)
                for prefix in stored:
                    yield prefix + name[len(own) :]
                return


def _own_forms(
    name: str, stored: str, module: nn.Module | None, mlx: bool, told: bool
) -> Iterator[Form]:
    """Alone under its name, as the kind of its module has it; only MLX's way if `told`,
    and torch's without `mlx`."""
    if not mlx:
        yield Stored(stored)
        return
    own = name.rpartition(".")[2]
    if own == "weight" and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield ChannelsLast(stored)
        if told:
            return
    if own == "weight" and type(module).__name__ == "Conv1D":  # transformers' own
        yield Transposed(stored)
        return
    if own in ("in_proj_weight", "in_proj_bias"):  # of torch's own attention
        yield Stored(stored.removesuffix(own) + own.replace("proj_", "proj."))
    yield Stored(stored)


def _expert_rules(
    name: str, module: nn.Module | None, places: Sequence[str]
) -> Iterator[Rule]:
    """Where the experts of a layer may be: stacked, or one by one; gate and up apart.

    transformers has them in one parameter each, `gate_up_proj` ``[E, 2 * I, H]`` and
    `down_proj` ``[E, H, I]``; some transposed, some with the rows of gate and up in
    turn, which their module says.
    """
    own = name.rpartition(".")[2]
    kind, _, bias = own.partition("_proj")
    if kind not in ("gate_up", "down", "up", "gate") or bias not in ("", "_bias"):
        return
    end = "bias" if bias else "weight"

    def whole(form: Form) -> Form:
        if kind == "gate_up" and not getattr(module, "is_concatenated", True):
            form = RowOrder(form, interleaved)
        if end == "weight" and getattr(module, "is_transposed", False):
            form = Transposed(form)
        return form

    pattern = rf"(.*)\.experts\.{own}"
    for names in _NAMES:
        gate, up, down = names
        used = {"gate_up": (gate, up), "down": (down,), "up": (up,), "gate": (gate,)}
        for place in places:
            parts: list[Form] = [
                Stored(rf"{place}.{part}.{end}") for part in used[kind]
            ]
            yield Rule(pattern, whole(parts[0] if len(parts) == 1 else Rows(*parts)))
        lists: list[Form] = [
            Stack(rf"\1.experts.*.{part}.{end}") for part in used[kind]
        ]
        yield Rule(pattern, whole(lists[0] if len(lists) == 1 else Rows(*lists)))
    for place in places:
        yield Rule(pattern, whole(Stored(rf"{place}.{kind}_proj.{end}")))


def _expanded(form: Form, match: re.Match[str], shape: Sequence[int]) -> Form:
    """The form with the groups of the match filled in, and its experts counted."""
    return _counted(form.renamed(lambda name: match.expand(name)), shape)


def _counted(form: Form, shape: Sequence[int]) -> Form:
    if isinstance(form, Stack) and len(form.parts) == 1:
        (one,) = form.parts
        return Stack(*(one.renamed(_numbered(index)) for index in range(shape[0])))
    new = form.renamed(lambda name: name)
    if form.parts:
        new.parts = [_counted(part, shape) for part in form.parts]
    return new


def _numbered(index: int) -> Callable[[str], str]:
    return lambda name: name.replace(".*.", f".{index}.")
