"""The lint's rules on a kernel's signature."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..entries import INDEXED, SCALARS, VECTORS
from ..tokens import Token
from .declared import POINTERS, Declaration, Found

ID_TYPES = ("ushort", "uint", "uint16_t", "uint32_t")
WRONG_ID = re.compile(
    r"(bool|char|uchar|short|int|long|ulong|half|bfloat|float|size_t|int16_t|int32_t)[234]?"
    r"|(uint|ushort)4"
)
WRONG_SCALAR_ID = re.compile(WRONG_ID.pattern + r"|(uint|ushort)[23]")
MAX_BUFFER = 30


def kernel(one: Declaration, threadgroup_arguments: bool) -> Found:
    """What is wrong with a kernel's result and parameters.

    `threadgroup_arguments`: whether the host can give them a size.
    """
    words = [t.text for t in one.result if t.text not in ("kernel", "static", "inline")]
    if words != ["void"]:
        yield one.where, f"a kernel returns void, not `{' '.join(words)}`"
    taken: dict[int, Token] = {}
    sizes: dict[str, Token] = {}
    for parameter in one.parameters:
        yield from _parameter(parameter, taken, sizes, threadgroup_arguments)
    if len(sizes) > 1:
        yield (
            one.where,
            "the kernel's positions are of 2 and of 3 components: all its position "
            "vectors must have as many",
        )


def _parameter(
    parameter: Sequence[Token],
    taken: dict[int, Token],
    sizes: dict[str, Token],
    threadgroup_arguments: bool,
) -> Found:
    plain = [t for t in parameter if t.kind != "attribute"]
    attributes = [t.text for t in parameter if t.kind == "attribute"]
    words = [t.text for t in plain if t.kind == "word"]
    name = plain[-1]
    points = any(t.text in POINTERS or t.text == "[" for t in plain)
    if points and "thread" in words:
        yield name, "a kernel's argument cannot be in `thread`"
    sized = any(a.startswith("threadgroup (") for a in attributes)
    if ("threadgroup" in words or sized) and not threadgroup_arguments:
        yield (
            name,
            "threadgroup memory as an argument: torch.mps.compile_shader cannot give it "
            "a size; declare an array in the kernel",
        )
    if not attributes and not points:
        yield (
            name,
            f"the kernel's parameter `{name.text}` is neither a buffer nor has it an "
            "attribute such as [[thread_position_in_grid]]",
        )
    for attribute in (part for a in attributes for part in re.split(r"\s*,\s*", a)):
        indexed = INDEXED.match(attribute)
        if indexed and indexed[1] == "buffer":
            index = int(indexed[2])
            if index > MAX_BUFFER:
                yield name, f"[[buffer({index})]]: Metal has buffers 0 to {MAX_BUFFER}"
            if index in taken:
                yield name, f"[[buffer({index})]] is taken by `{taken[index].text}`"
            taken.setdefault(index, name)
        yield from _identifier(attribute, plain, sizes)


def _identifier(
    attribute: str, plain: Sequence[Token], sizes: dict[str, Token]
) -> Found:
    """The type of a position, an index or a size that Metal fills in."""
    if attribute not in VECTORS and attribute not in SCALARS:
        return
    types = [t.text for t in plain[:-1] if t.text not in ("const", "thread")]
    wrong = WRONG_ID if attribute in VECTORS else WRONG_SCALAR_ID
    if len(types) == 1 and wrong.fullmatch(types[0]):
        wanted = "uint or ushort" + (", or a vector of 2 or 3" * (attribute in VECTORS))
        yield plain[-1], f"[[{attribute}]] is {wanted}, not `{types[0]}`"
    elif len(types) == 1 and attribute in VECTORS and types[0][:-1] in ID_TYPES:
        sizes.setdefault(types[0][-1], plain[-1])
