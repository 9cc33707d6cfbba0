"""What changes inside a declaration: address spaces, literals, swizzles, variables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NoReturn

from .declarations import (
    ADDRESS_SPACES,
    argument_of,
    has_const,
    integer,
    is_access,
    kind_of,
)
from .tokens import (
    CLOSING,
    Token,
    closing_angle,
    matching,
    matching_angle,
    split,
    text_of,
)

ASSIGNMENTS = frozenset(("=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^="))
BEFORE_TYPES = frozenset(
    [
        "using",
        "typename",
        "typedef",
        "const",
        "constexpr",
        "volatile",
        "static",
        "inline",
        "explicit",
        "friend",
        "return",
        "case",
        "else",
        "do",
        "sizeof",
        "alignof",
        "operator",
        "public",
        "private",
        "protected",
    ]
)
POINTERS = ("*", "&", "&&")
NOT_VARIABLES = frozenset(("typedef", "using", "friend", "operator", "template"))
SWIZZLE = re.compile(r"[xyzw]{2,4}")
LITERAL = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(h|H|bf|BF)?")
HEX = ("0x", "0X")
HEXADECIMAL = re.compile(r"(0[xX][\da-fA-F]*\.?[\da-fA-F]*[pP][+-]?\d+)(h|H|bf|BF)?")


@dataclasses.dataclass
class Frame:
    """An open bracket: what it holds, and where the statement in it began.

    `start` counts the tokens read, `written` those written.
    """

    mark: str
    start: int = 0
    written: int = 0
    # "function" for all braces in a function's body, else what `kind_of` says.
    kind: str = ""


class Body:
    """Rewrites what stands anywhere: address spaces, literals, swizzles, variables."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def rewrite(self, tokens: list[Token]) -> list[Token]:
        tokens = [t for t in tokens if t.kind != "attribute"]
        out: list[Token] = []
        frames = [Frame("{")]
        position = 0
        while position < len(tokens):
            token = tokens[position]
            if token.kind == "word" and token.text == "threadgroup":
                end = self.variables(tokens, position, out, frames[-1])
                if end is not None:
                    position = end
                    frames[-1].start, frames[-1].written = end, len(out)
                    continue
            position = self.one(tokens, position, out)
            if token.kind == "mark":
                follow(frames, tokens, position, len(out))
        return out

    def one(self, tokens: list[Token], position: int, out: list[Token]) -> int:
        """Rewrite what needs no context; returns where to go on."""
        token = tokens[position]
        before = out[-1].text if out else ";"
        if token.kind == "number":
            out.append(literal(token))
        elif token.text == "::" and not is_scope_name(out):
            out += [token, token.like("msl"), token]
        elif token.kind != "word":
            out.append(token)
        elif token.text == "constant":
            if not has_const(tokens, position):
                out.append(token.like("const"))
        elif token.text in ADDRESS_SPACES:
            pass
        elif token.text == "coherent" and tokens[position + 1].text == "(":
            return matching(tokens, position + 1) + 1
        elif before in (".", "->") and SWIZZLE.fullmatch(token.text):
            out += _swizzle(token, tokens[position + 1].text)
        else:
            out.append(token)
        return position + 1

    def variables(
        self, tokens: list[Token], at: int, out: list[Token], frame: Frame
    ) -> int | None:
        """Translate the variables that the `threadgroup` at `at` declares.

        Returns where to go on, or None where it belongs to a pointer's, a reference's
        or a function's type: the word can then go.
        """
        if frame.mark != "{" or _in_angle(tokens, frame.start, at):
            return None
        stop = _end_of_type(tokens, at)
        text = tokens[stop].text if stop < len(tokens) else ""
        where = tokens[at]
        if text in POINTERS or (text == "(" and tokens[stop + 1].text in POINTERS):
            # A pointer into threadgroup memory is a variable of the thread.
            if frame.kind == "function" and _has_others(tokens, stop):
                _refuse(where, "declares a pointer and a variable in one: part them")
            return None
        if frame.kind != "function" and text == "(":
            return None
        end = stop
        while end < len(tokens) and tokens[end].text != ";":
            is_open = tokens[end].text in ("(", "{", "[")
            end = matching(tokens, end) + 1 if is_open else end + 1
        statement = tokens[frame.start : end]
        if text not in ("[", ";", ",", "__attribute__") or NOT_VARIABLES & {
            t.text for t in statement
        }:
            _refuse(where, f"is not understood in `{text_of(statement)}`")
        if frame.kind != "function":
            _refuse(where, "declares a variable outside functions")
        del statement[at - frame.start]
        del out[frame.written :]
        self.translated(*_without_alignment(statement), out)
        return end + 1

    def translated(
        self, statement: list[Token], alignment: int | None, out: list[Token]
    ) -> None:
        """Add `T a[n], b` to the output, each variable for itself."""
        parts = split(statement)
        first = parts[0]
        stop = next((i for i, t in enumerate(first) if t.text == "["), len(first))
        kind = [t for t in first[: stop - 1] if t.text != "static"]
        texts = [t.text for t in kind if t.text not in ("const", "volatile")]
        if not texts or texts[-1] in POINTERS:
            _refuse(first[0], f"is not understood in `{text_of(first)}`")
        for part in [first[stop - 1 :], *parts[1:]]:
            name, sizes = part[0], self.rewrite(part[1:])
            if name.kind != "word" or (sizes and sizes[0].text != "["):
                _refuse(name, f"is not understood in `{text_of(part)}`")
            out += self.allocate(name, [*self.rewrite(kind), *sizes], alignment)

    def allocate(
        self, name: Token, type_: list[Token], alignment: int | None
    ) -> list[Token]:
        alias = f"msl_type_of_{name.text}"
        site = f"msl_site_of_{name.text}"
        if self.cuda:
            aligned = "" if alignment is None else f"alignas({alignment}) "
            variable = f"__shared__ {aligned}{alias} {name.text}"
        else:
            variable = (
                f"static const char {site} = 0; {alias}& {name.text} = "
                f'*({alias}*)msl_threadgroup_memory(&{site}, "{name.text}", '
                f"sizeof({alias}), alignof({alias}), __builtin_LINE())"
            )
        end = name.like(";", "mark")
        return [name.like(f"using {alias} ="), *type_, end, name.like(variable), end]


def follow(
    frames: list[Frame], tokens: Sequence[Token], position: int, written: int
) -> None:
    """Keep track of brackets and statements after the mark before `position`."""
    text, top = tokens[position - 1].text, frames[-1]
    if text == "{":
        head = tokens[top.start : position - 1]
        end = matching(tokens, position - 1)
        following = tokens[end + 1].text if end + 1 < len(tokens) else ""
        inside = any(frame.kind == "function" for frame in frames)
        kind = "function" if inside else kind_of(head, following)
        frames.append(Frame("{", position, written, kind))
    elif text in ("(", "["):
        frames.append(Frame(text, position, written))
    elif text in (")", "]", "}") and len(frames) > 1:
        closed = frames.pop()
        # Braces of an initializer end no declaration.
        if text == "}" and closed.kind != "other":
            frames[-1].start, frames[-1].written = position, written
    elif text.endswith(";") or (
        text == ":"
        and (top.kind == "function" or is_access(tokens[top.start : position - 1]))
    ):
        top.start, top.written = position, written


def _refuse(where: Token, what: str) -> NoReturn:
    raise SyntaxError(f"{where.file}:{where.line}: `threadgroup` {what}")


def _in_angle(tokens: Sequence[Token], start: int, at: int) -> bool:
    """Whether `at` stands between template brackets of the statement at `start`."""
    position = start
    while position < at:
        end: int | None = position
        if tokens[position].text in CLOSING:
            end = matching(tokens, position)
        elif tokens[position].text == "<":
            end = closing_angle(tokens, position)
        position = (position if end is None else end) + 1
    return position > at


def _end_of_type(tokens: Sequence[Token], start: int) -> int:
    """The first token that is of no type or name: `[`, `*`, `;`, `(` or the like."""
    position = start
    while position < len(tokens):
        token = tokens[position]
        if token.text in ("alignas", "decltype"):
            position = matching(tokens, position + 1)
        elif token.text == "<":
            position = matching_angle(tokens, position)
        elif (token.kind != "word" and token.text != "::") or (
            token.text == "__attribute__"
        ):
            break
        position += 1
    return position


def _has_others(tokens: Sequence[Token], start: int) -> bool:
    """Whether a variable that is no pointer follows in this declaration of one."""
    end = start
    while end < len(tokens) and tokens[end].text not in (";", "{"):
        end = matching(tokens, end) if tokens[end].text in ("(", "[") else end
        end += 1
    parts = split(tokens[start:end])[1:]
    return any(part and part[0].text not in (*POINTERS, "(") for part in parts)


def _without_alignment(statement: list[Token]) -> tuple[list[Token], int | None]:
    """A declaration without alignas(...) and attributes, and the alignment asked for."""
    out: list[Token] = []
    asked: int | None = None
    position = 0
    while position < len(statement):
        token = statement[position]
        if token.text not in ("alignas", "__attribute__"):
            out.append(token)
            position += 1
            continue
        end = matching(statement, position + 1)
        inside = text_of(statement[position + 2 : end])
        text = inside if token.text == "alignas" else argument_of(inside, "aligned")
        if text is not None:
            value = integer(text)
            if value is None or value > 16:
                _refuse(token, f"memory has an alignment of 16 bytes, not of `{text}`")
            asked = max(asked or 0, value)
        position = end + 1
    return out, asked


def is_scope_name(before: Sequence[Token]) -> bool:
    """Whether the `::` that follows these tokens belongs to a name before it."""
    if not before:
        return False
    last = before[-1]
    if last.text == ")":
        opening, depth = len(before) - 1, 0
        while opening >= 0:
            depth += (before[opening].text == ")") - (before[opening].text == "(")
            if depth == 0:
                break
            opening -= 1
        return opening > 0 and before[opening - 1].text == "decltype"
    if last.kind == "word":
        return last.text not in BEFORE_TYPES
    return last.text in (">", ">>")


def literal(token: Token) -> Token:
    text = token.text.replace("'", "")
    match = LITERAL.fullmatch(text) or HEXADECIMAL.fullmatch(text)
    if match is None:
        return token
    digits, suffix = match.groups()
    is_float = any(c in digits for c in (".pP" if digits[:2] in HEX else ".eE"))
    if suffix is None:
        return token.like(digits + "f", "number") if is_float else token
    kind = "half" if suffix.lower() == "h" else "bfloat"
    return token.like(f"{kind}({digits}{'f' if is_float else '.0f'})")


def _swizzle(token: Token, following: str) -> list[Token]:
    name = "swizzled" if following in ASSIGNMENTS else "swizzle"
    indices = ", ".join(str("xyzw".index(letter)) for letter in token.text)
    return [token.like(f"template {name}<{indices}>()")]
