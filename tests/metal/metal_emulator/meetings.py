"""Marks where lanes may part, around the operations in which they must meet.

A barrier or simdgroup operation knows its line only. Two lanes in different turns of a
loop, or in two branches that call the same function, stand at the same line and still do
not meet on a GPU. So each loop and each branch around such an operation gets a mark, and
at a meeting the marks of all lanes must agree. Loops and branches without one stay as they
are, and so do `constexpr` functions, which nothing may write from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from .declarations import ADDRESS_SPACES
from .tokens import Token, matching

PREFIXES = ("simd_", "quad_", "simdgroup_", "threadgroup_barrier", "__metal_simd_")
CONTROL = frozenset(("if", "for", "while", "switch", "catch"))
QUALIFIERS = ADDRESS_SPACES | {"const", "noexcept"}


def mark(tokens: list[Token]) -> list[Token]:
    """The tokens with marks in every function body that needs them."""
    bodies = list(_bodies(tokens))
    meeting = _meeting_names(tokens, bodies)
    marker = _Marker(tokens, meeting)
    out: list[Token] = []
    position = 0
    for _, start, end, is_constexpr in bodies:
        if start < position or is_constexpr or not marker.meets(start, end):
            continue
        out += tokens[position:start]
        out += marker.statement(start)[0]
        position = end + 1
    return out + tokens[position:]


def _bodies(tokens: Sequence[Token]) -> Iterator[tuple[str, int, int, bool]]:
    """(name, opening, closing, is constexpr) of what looks like a function's body."""
    openings: dict[int, int] = {}
    stack: list[int] = []
    for position, token in enumerate(tokens):
        if token.kind != "mark":
            continue
        if token.text == "(":
            stack.append(position)
        elif token.text == ")" and stack:
            openings[position] = stack.pop()
        elif token.text == "{":
            before = position - 1
            while before > 0 and tokens[before].text in QUALIFIERS:
                before -= 1
            name = openings.get(before, 0) - 1
            if name < 0 or tokens[name].text in CONTROL | {"constexpr"}:
                continue
            head = name
            while head > 0 and tokens[head].text not in (";", "{", "}"):
                head -= 1
            is_constexpr = any(t.text == "constexpr" for t in tokens[head:name])
            yield tokens[name].text, position, matching(tokens, position), is_constexpr


def _meeting_names(
    tokens: Sequence[Token], bodies: Sequence[tuple[str, int, int, bool]]
) -> set[str]:
    """Functions in which lanes meet, themselves or through others, by their names."""
    words = [
        (name, {t.text for t in tokens[start:end] if t.kind == "word"})
        for name, start, end, _ in bodies
    ]
    found = {name for name, used in words if any(map(_is_meeting, used))}
    while more := {name for name, used in words if used & found} - found:
        found |= more
    return found


def _is_meeting(word: str) -> bool:
    return word.startswith(PREFIXES)


class _Marker:
    def __init__(self, tokens: Sequence[Token], meeting: set[str]) -> None:
        self.tokens, self.meeting = tokens, meeting
        self.numbers = itertools.count(1)

    def meets(self, start: int, end: int) -> bool:
        return any(
            t.kind == "word" and (t.text in self.meeting or _is_meeting(t.text))
            for t in self.tokens[start:end]
        )

    def statement(self, start: int) -> tuple[list[Token], int]:
        """One statement with its marks, and the index behind it."""
        token = self.tokens[start]
        if token.text == "{" and token.kind == "mark":
            return self.block(start)
        if token.kind == "word" and token.text in ("for", "while", "do"):
            return self.loop(start)
        if token.kind == "word" and token.text == "if":
            return self.branch(start)
        if token.kind == "word" and token.text == "switch":
            end = matching(self.tokens, start + 1) + 1
            body, after = self.statement(end)
            return [*self.tokens[start:end], *body], after
        if token.text in ("case", "default"):
            end = start
            while self.tokens[end].text != ":":
                end += 1
            return list(self.tokens[start : end + 1]), end + 1
        end = start
        while self.tokens[end].text != ";":
            opens = self.tokens[end].kind == "mark" and self.tokens[end].text in "([{"
            end = matching(self.tokens, end) + 1 if opens else end + 1
        return list(self.tokens[start : end + 1]), end + 1

    def block(self, start: int) -> tuple[list[Token], int]:
        end = matching(self.tokens, start)
        out, position = [self.tokens[start]], start + 1
        while position < end:
            inner, position = self.statement(position)
            out += inner
        return [*out, self.tokens[end]], end + 1

    def loop(self, start: int) -> tuple[list[Token], int]:
        """`for`, `while` or `do`, its turns counted if lanes meet in it."""
        tokens = self.tokens
        if tokens[start].text == "do":
            body, middle = self.statement(start + 1)
            end = matching(tokens, middle + 1) + 2  # while ( ... ) ;
            head, tail = [tokens[start]], list(tokens[middle:end])
        else:
            middle = matching(tokens, start + 1) + 1
            body, end = self.statement(middle)
            head, tail = list(tokens[start:middle]), []
        if not self.meets(start, end):
            return [*head, *body, *tail], end
        return [
            *self.made(start, "{", f"msl_loop_mark msl_loop({next(self.numbers)});"),
            *head,
            *self.made(start, "{", "msl_loop.turn();"),
            *body,
            *self.made(start, "}"),
            *tail,
            *self.made(start, "}"),
        ], end

    def branch(self, start: int) -> tuple[list[Token], int]:
        """`if` with its arms, of which those in which lanes meet are marked."""
        tokens = self.tokens
        opening = start + (2 if tokens[start + 1].text == "constexpr" else 1)
        middle = matching(tokens, opening) + 1
        then, end = self.arm(middle)
        out = [*tokens[start:middle], *then]
        if end < len(tokens) and tokens[end].text == "else":
            other, after = self.arm(end + 1)
            return [*out, tokens[end], *other], after
        return out, end

    def arm(self, start: int) -> tuple[list[Token], int]:
        body, end = self.statement(start)
        if not self.meets(start, end):
            return body, end
        made = self.made(start, "{", f"msl_arm_mark msl_arm({next(self.numbers)});")
        return [*made, *body, *self.made(start, "}")], end

    def made(self, place: int, *texts: str) -> list[Token]:
        return [self.tokens[place].like(text, "mark") for text in texts]
