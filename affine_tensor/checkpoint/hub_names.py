"""From the names of the Hub to those of a transformers model, by transformers' own mapping.

GPTQ, AWQ and compressed-tensors repositories have the names of the original model. What
transformers does with these while it loads (it renames, stacks experts, joins gate and up)
is turned into forms here, so that packed weights go the same way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .forms import Form, Part, Read, Rows, Stack, Stored, Transposed, dense
from .names import Names


class HubNames(Names):
    """Where each parameter and buffer of one model lies among stored names of the Hub."""

    def __init__(self, model: nn.Module, stored: Iterable[str]) -> None:
        super().__init__(model, mlx=False)
        self._found: dict[str, Form] = {}
        self._own = model.state_dict(keep_vars=True)
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored += [re.compile(f".*(?:{pattern})") for pattern in patterns]
        if hasattr(model, "base_model_prefix"):  # one of transformers
            self._through_mapping(sorted(stored, key=dot_natural_key))

    def forms(self, name: str, shape: Sequence[int]) -> Iterator[Form]:
        if name in self._found:
            yield self._found[name]
        yield from super().forms(name, shape)

    def _through_mapping(self, names: Sequence[str]) -> None:
        model: Any = self.model
        mapping = get_model_conversion_mapping(model)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        of_pattern = {p: one for one in converters for p in one.source_patterns}
        groups: dict[str, dict[str, list[str]]] = {}
        for name in names:
            target, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, self._own
            )
            if target not in self._own and name in self._own:
                target, pattern = name, None
            if pattern is None:
                self._found.setdefault(target, Stored(name))
            else:
                group = groups.setdefault(target, defaultdict(list))
                group[pattern].append(name)
        for target, group in groups.items():
            converter = of_pattern[next(iter(group))]
            self._found |= self._converted(target, converter, group)

    def _converted(
        self, target: str, converter: Any, group: dict[str, list[str]]
    ) -> dict[str, Form]:
        """The forms of what a converter makes of a group of stored tensors."""
        if len(converter.target_patterns) > 1:
            return self._split(target, converter, group)
        lists = {
            pattern: [Stored(name) for name in group[pattern]]
            for pattern in converter.source_patterns
            if pattern in group
        }
        parts: list[Form] = []
        for operation in converter.operations:
            if isinstance(operation, MergeModulelist) and operation.dim == 0:
                lists = {p: [Stack(*forms)] for p, forms in lists.items()}  # type: ignore
            elif isinstance(operation, Concatenate):
                parts = [form for forms in lists.values() for form in forms]
                lists = {"": [Rows(*parts, axis=operation.dim)]}  # type: ignore
            elif isinstance(operation, Transpose):
                ((pattern, (one,)),) = lists.items()
                shape = self._own[target].shape
                lists = {pattern: [_Turned(one, operation, shape)]}  # type: ignore
            else:
                return {target: _Through(converter, group, target, self.model)}
        (forms,) = lists.values()
        return {target: forms[0]} if len(forms) == 1 else {}

    def _split(
        self, target: str, converter: Any, group: dict[str, list[str]]
    ) -> dict[str, Form]:
        """One stored tensor that is several parameters: rows of it each."""
        (operation, *more), ((_, (name, *others)),) = (
            converter.operations,
            group.items(),
        )
        if more or others or not isinstance(operation, (Chunk, Split)):
            return {}
        first = converter.target_patterns[0]
        targets = [target.replace(first, one) for one in converter.target_patterns]
        sizes = [self._own[one].shape[operation.dim] for one in targets]
        found: dict[str, Form] = {}
        start = 0
        for one, size in zip(targets, sizes, strict=True):
            found[one] = Part(name, start, start + size, sum(sizes))
            start += size
        return found


class _Turned(Transposed):
    """Transposed, or as it is where the shape says that it need not be."""

    def __init__(self, part: Form, operation: Any, shape: Sequence[int]) -> None:
        super().__init__(part)
        self.operation, self.shape = operation, tuple(shape)

    def loaded(self, value: Tensor) -> Tensor:
        if self.operation.check_dims and tuple(value.shape) == self.shape:
            return value
        return super().loaded(value)


class _Through(Form):
    """Any other conversion: transformers' own, on dense tensors."""

    def __init__(
        self, converter: Any, group: dict[str, list[str]], target: str, model: nn.Module
    ) -> None:
        super().__init__(*(name for names in group.values() for name in names))
        self.converter, self.group = converter, group
        self.target, self.model = target, model

    def load(self, read: Read) -> Tensor:
        values: Any = {p: [dense(read(n)) for n in ns] for p, ns in self.group.items()}
        for operation in self.converter.operations:
            values = operation.convert(
                values,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.target,
                model=self.model,
                config=getattr(self.model, "config", None),
                missing_keys=None,
            )
        value = next(iter(values.values()))
        return value[0] if isinstance(value, list) else value

    def save(self, value: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError
