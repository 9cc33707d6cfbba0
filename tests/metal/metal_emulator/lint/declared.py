"""Metal source as declarations and calls, without parsing types: what the lint reads."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

from ..compilers import INCLUDE
from ..declarations import (
    before_parameters,
    is_access,
    kind_of,
    parameter_list,
    without_template,
)
from ..tokens import Token, matching, matching_angle, split, text_of

Found = Iterator[tuple[Token, str]]
POINTERS = frozenset(("*", "&", "&&"))
CLASS_KEYS = frozenset(("struct", "class", "union"))
NOT_CALLS = frozenset(("if", "for", "while", "switch", "return", "sizeof", "decltype"))


def _after_template(head: Sequence[Token]) -> list[Token]:
    """A part of a head without attributes and `template <...>`."""
    rest = [t for t in head if t.kind != "attribute"]
    while len(rest) > 1 and rest[0].text == "template" and rest[1].text == "<":
        rest = rest[matching_angle(rest, 1) + 1 :]
    return rest


@dataclasses.dataclass
class Declaration:
    """One declaration that is no class and no namespace.

    `head` is what stands before a function's `{` or the `;`; `body` what is in the
    braces; `owner` the class around it, if any, `in_template` whether that is a template,
    and `path` the namespace.
    """

    head: list[Token]
    body: list[Token] | None
    path: str
    owner: str
    in_template: bool = False

    @functools.cached_property
    def plain(self) -> list[Token]:
        """The head without attributes and `template <...>`."""
        return without_template(self.head)

    @functools.cached_property
    def attributes(self) -> list[str]:
        """The attributes of the declaration itself, not those of its parameters."""
        end = self.opening if self.opening is not None else len(self.head)
        inside = matching(self.head, end) if end < len(self.head) else end
        outer = [*self.head[:end], *self.head[inside:]]
        return [t.text for t in outer if t.kind == "attribute"]

    @functools.cached_property
    def opening(self) -> int | None:
        """Where in the head the parameters begin; None for what is no function."""
        try:
            opening = parameter_list(self.head)
        except (SyntaxError, IndexError):
            return None
        before = [t.text for t in _after_template(self.head[:opening])]
        is_value = "operator" not in before and {"=", "["} & set(before)
        return None if is_value else opening

    @functools.cached_property
    def place(self) -> int:
        """Where in the head a function's name stands."""
        texts = [t.text for t in self.head]
        if "operator" in texts or not self.opening:
            return texts.index("operator") if "operator" in texts else 0
        place, depth = before_parameters(self.head, self.opening), 0
        while texts[place] in (">", ">>") or depth:  # f<int>(...) is a specialisation
            depth += texts[place].count(">") if texts[place] in (">", ">>") else 0
            depth -= texts[place] == "<"
            place -= 1
        return place

    @property
    def name(self) -> str:
        return self.head[self.place].text if self.opening else ""

    @functools.cached_property
    def parameters(self) -> list[list[Token]]:
        """The parameters of a function, attributes included."""
        if self.opening is None:
            return []
        inside = self.head[self.opening + 1 : matching(self.head, self.opening)]
        return [] if text_of(inside) == "void" else split(inside)

    @functools.cached_property
    def result(self) -> list[Token]:
        """What stands before a function's name: its type, `static` and the like."""
        return _after_template(self.head[: self.place])

    @property
    def is_template(self) -> bool:
        return self.head[0].text == "template"

    @property
    def is_kernel(self) -> bool:
        words = {t.text for t in self.plain}
        named = (a.split(",")[0].strip() for a in self.attributes)
        return "kernel" in words or "kernel" in named

    @property
    def where(self) -> Token:
        return self.head[self.place]


def declarations(
    tokens: Sequence[Token],
    path: str = "",
    owner: str = "",
    in_template: bool = False,
) -> Iterator[Declaration]:
    """All declarations of a source, those inside namespaces and classes too."""
    start = position = 0
    while position < len(tokens):
        token = tokens[position]
        text = token.text if token.kind == "mark" else ""
        if text in ("(", "["):
            position = matching(tokens, position)
        elif text == ":" and is_access(tokens[start:position]):
            start = position + 1
        elif text == ";":
            if position > start:
                head = list(tokens[start:position])
                yield Declaration(head, None, path, owner, in_template)
            start = position + 1
        elif text == "{":
            end = matching(tokens, position)
            head, inner = list(tokens[start:position]), list(tokens[position + 1 : end])
            following = tokens[end + 1].text if end + 1 < len(tokens) else ""
            kind = kind_of(head, following)
            if kind == "namespace":
                names = [t.text for t in head if t.kind == "word"]
                yield from declarations(inner, f"{path}::{names[-1]}")
                start = end + 1
            elif kind == "class":
                template = in_template or head[0].text == "template"
                yield from declarations(inner, path, _class_name(head), template)
                start = end + 1  # a variable of the class may follow
            elif kind == "function":
                yield Declaration(head, inner, path, owner, in_template)
                start = end + 1
            position = end
        position += 1


def _class_name(head: Sequence[Token]) -> str:
    """`X<int>` as text, so that each specialisation is a class of its own."""
    rest = without_template(head)
    keys = [i for i, t in enumerate(rest) if t.text in CLASS_KEYS]
    name = rest[keys[0] + 1 :] if keys else rest
    texts = [t.text for t in name]
    return text_of(name[: texts.index(":")] if ":" in texts else name) or "unnamed"


def end_of_angle(tokens: Sequence[Token], start: int) -> int | None:
    """The `>` of template arguments; None where `<` is more likely "less than"."""
    depth, position = 0, start
    while position < len(tokens):
        token = tokens[position]
        if token.kind == "mark":
            if token.text in (";", "{", "}", "&&", "||", ")", "]"):
                return None
            if token.text in ("(", "["):
                position = matching(tokens, position)
            elif token.text == "<":
                depth += 1
            elif token.text in (">", ">>"):
                depth -= len(token.text)
                if depth <= 0:
                    return position
        position += 1
    return None


# ------------------------------------------------------------------------- recursion
@functools.cache
def library_names() -> frozenset[str]:
    """Names of Metal's functions: a call of one may mean the library's."""
    text = (INCLUDE / "lint_functions.hpp").read_text(encoding="utf-8")
    found = re.finditer(r"MSL_[A-Z0-9]+\((\w+)\)|(\w+)\(", text)
    return frozenset(match[1] or match[2] for match in found)


def recursion(found: Sequence[Declaration]) -> list[tuple[Declaration, str]]:
    """Functions that call themselves, each with the names on the way round.

    A call counts only where a single function of this name and number of arguments is
    there to be meant; calls through template arguments other than the caller's own, of
    methods of other objects, in templates with `if constexpr`, and in class templates
    (MLX ships a method of one that calls itself) are left out.
    """
    functions = [d for d in found if d.body is not None and d.opening and d.name]
    by_name: dict[str, list[int]] = {}
    for index, function in enumerate(functions):
        by_name.setdefault(function.name, []).append(index)
    calls = [list(_calls(f, functions, by_name)) for f in functions]
    out, seen = [], set()
    for start in range(len(functions)):
        way = _way_back(start, calls)
        if way and frozenset(way) not in seen:
            seen.add(frozenset(way))
            names = [functions[i].name for i in (*way, start)]
            out.append((functions[start], " -> ".join(names)))
    return out


def _way_back(start: int, calls: Sequence[Sequence[int]]) -> list[int] | None:
    ways, known = [[start]], set()
    while ways:
        way = ways.pop(0)
        for target in calls[way[-1]]:
            if target == start:
                return way
            if target not in known:
                known.add(target)
                ways.append([*way, target])
    return None


def _calls(
    caller: Declaration,
    functions: Sequence[Declaration],
    by_name: dict[str, list[int]],
) -> Iterator[int]:
    """The functions that a body calls for certain."""
    body = caller.body or []
    if caller.in_template or (
        caller.is_template and any(t.text == "constexpr" for t in body)
    ):
        return
    for position, token in enumerate(body):
        if token.text not in by_name or token.kind != "word":
            continue
        if token.text in NOT_CALLS or token.text == caller.owner:
            continue
        opening = position + 1
        if opening < len(body) and body[opening].text == "<":
            end = end_of_angle(body, opening)
            if end is None or not _own_arguments(caller, body[opening + 1 : end]):
                continue
            opening = end + 1
        if opening >= len(body) or body[opening].text != "(":
            continue
        count = _arguments(body[opening + 1 : matching(body, opening)])
        owners = _owners(caller, body, position)
        if count is None or not owners or _is_value(caller, token.text):
            continue
        for owner in owners:
            fitting = [i for i in by_name[token.text] if functions[i].owner == owner]
            fitting = [i for i in fitting if _takes(functions[i], count)]
            if fitting:
                if len(fitting) == 1:
                    yield fitting[0]
                break


def _own_arguments(caller: Declaration, arguments: Sequence[Token]) -> bool:
    """Whether explicit template arguments are the caller's own parameters."""
    if not caller.is_template:
        return False
    end = end_of_angle(caller.head, 1)
    parts = split(caller.head[2:end])
    names = [p[-1].text for p in parts if p and "=" not in {t.text for t in p}]
    return [text_of(part) for part in split(arguments)] == names


def _arguments(inside: Sequence[Token]) -> int | None:
    """How many arguments a call has; None where that cannot be told."""
    count, position, angles = 1, 0, False
    while position < len(inside):
        text = inside[position].text
        if inside[position].kind == "mark":
            if text in ("(", "[", "{"):
                position = matching(inside, position)
            angles |= text == "<"
            count += text == ","
            if text == "..." or (angles and count > 1):
                return None
        position += 1
    return count if inside else 0


def _owners(
    caller: Declaration, body: Sequence[Token], position: int
) -> tuple[str, ...]:
    """In which classes ("" for none) a call may find its function, nearest first."""
    before = body[position - 1] if position else None
    if before is None or before.text in ("return", "else", "do"):
        pass
    elif before.text == "->" and position > 1 and body[position - 2].text == "this":
        return (caller.owner,)
    elif before.text in (".", "->") or before.kind == "word" or before.text == ">":
        return ()
    elif before.text == "::":
        qualifier = body[position - 2].text if position > 1 else ""
        return ("",) if re.fullmatch(r"\w+", qualifier) and qualifier != "metal" else ()
    if body[position].text in library_names():
        return (caller.owner,) if caller.owner else ()
    return (caller.owner, "") if caller.owner else ("",)


def _is_value(caller: Declaration, name: str) -> bool:
    """Whether the caller has a variable or parameter of this name."""
    tokens = [*caller.head, *(caller.body or [])]
    after = {
        tokens[i + 1].text
        for i, token in enumerate(tokens[:-1])
        if token.text == name and token.kind == "word"
    }
    return bool(after & {"=", ";", ",", ")", "{", "["})


def _takes(function: Declaration, count: int) -> bool:
    parts = function.parameters
    if any(t.text == "..." for part in parts for t in part):
        return False
    optional = sum("=" in {t.text for t in part} for part in parts)
    return len(parts) - optional <= count <= len(parts)
