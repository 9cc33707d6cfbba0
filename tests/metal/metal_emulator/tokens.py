"""Preprocessed Metal source as a list of tokens, and back to text.

White space is not kept: each token knows its file and line instead, and `render`
writes `#line` where needed, so that every message of a compiler, a sanitizer or this
emulator names the line of the `.metal` file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

PATTERN = re.compile(
    r"""
    (?P<space>[ \t\f\v\r]+)
  | (?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
  | (?P<number>\.?\d(?:[eEpP][+-]|'(?=\w)|[\w.])*)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<mark>\[\[|::|->\*?|<<=|>>=|<=|>=|==|!=|&&|\|\||\+\+|--|<<|>>|\.\.\.
      |[-+*/%&|^]=|.)
    """,
    re.VERBOSE,
)
LINE_MARKER = re.compile(r'\s*#\s*(?:line\s+)?(\d+)\s+"((?:\\.|[^"\\])*)"')
UNROLL = re.compile(r"\s*#\s*pragma\s+(clang\s+loop\s+unroll\(full\)|unroll)\s*$")
CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclasses.dataclass(slots=True)
class Token:
    """One token.

    `kind` is "word", "number", "text" (a literal in quotes), "mark" (punctuation) or
    "attribute"; the `text` of an attribute is what stood between `[[` and `]]`. A loop
    that a pragma asks to unroll is `unrolled`.
    """

    kind: str
    text: str
    file: str = ""
    line: int = 0
    unrolled: bool = False

    def like(self, text: str, kind: str = "word") -> Token:
        """Another token in the same place."""
        return Token(kind, text, self.file, self.line)


def tokenize(preprocessed: str) -> list[Token]:
    """Tokens of a preprocessor's output; pragmas are dropped, attributes folded."""
    tokens: list[Token] = []
    file, line, unrolled = "", 1, False
    for row in preprocessed.split("\n"):
        if row.lstrip().startswith("#"):
            if marker := LINE_MARKER.match(row):
                line, file = int(marker[1]), marker[2]
            else:
                line += 1
                unrolled = unrolled or UNROLL.match(row) is not None
            continue
        for match in PATTERN.finditer(row):
            kind = match.lastgroup or ""
            if kind != "space":
                word = match.group()
                loop = unrolled and word == "for"
                tokens.append(Token(kind, word, file, line, loop))
                unrolled = False
        line += 1
    return list(_fold_attributes(tokens))


def _fold_attributes(tokens: Sequence[Token]) -> Iterator[Token]:
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token.text != "[[" or token.kind != "mark":
            yield token
            position += 1
            continue
        end = position + 1
        depth = 0
        while depth or [t.text for t in tokens[end : end + 2]] != ["]", "]"]:
            if end + 2 > len(tokens):
                raise SyntaxError(f"{token.file}:{token.line}: '[[' is never closed")
            depth += tokens[end].text in ("(", "[")
            depth -= tokens[end].text in (")", "]")
            end += 1
        inner = " ".join(t.text for t in tokens[position + 1 : end])
        yield token.like(inner, "attribute")
        position = end + 2


def matching(tokens: Sequence[Token], start: int) -> int:
    """The index of the bracket that closes the `(`, `[` or `{` at `start`."""
    opening = tokens[start].text
    closing, depth = CLOSING[opening], 0
    for position in range(start, len(tokens)):
        if tokens[position].kind == "mark":
            depth += tokens[position].text == opening
            depth -= tokens[position].text == closing
            if depth == 0:
                return position
    where = tokens[start]
    raise SyntaxError(f"{where.file}:{where.line}: '{opening}' is never closed")


def matching_angle(tokens: Sequence[Token], start: int) -> int:
    """The index of the token whose `>` closes the `<` at `start`."""
    end = closing_angle(tokens, start)
    if end is None:
        where = tokens[start]
        raise SyntaxError(f"{where.file}:{where.line}: '<' is never closed")
    return end


def closing_angle(tokens: Sequence[Token], start: int) -> int | None:
    """As `matching_angle`; None where the `<` at `start` can only be a comparison.

    Brackets inside are skipped, so that a `>` which compares must stand in parentheses,
    as C++ itself asks of template arguments. A `<` inside opens arguments of its own if
    all of them can then be closed, and else compares: `enable_if_t<bits < 8, bool>`.
    """
    failed: set[tuple[int, int]] = set()

    def close(position: int, depth: int) -> int | None:
        first = (position, depth)
        while position < len(tokens) and first not in failed:
            token = tokens[position]
            text = token.text if token.kind == "mark" else ""
            if text in (";", ")", "]", "}"):
                break
            if text in CLOSING:
                position = matching(tokens, position)
            elif text == "<" and not _compares(tokens, position):
                end = close(position + 1, depth + 1)
                if end is not None:
                    return end
            elif text in (">", ">>"):
                depth -= len(text)
                if depth <= 0:
                    return position
            position += 1
        failed.add(first)
        return None

    return close(start + 1, 1)


def _compares(tokens: Sequence[Token], position: int) -> bool:
    """Whether this `<` stands after a value, as in `sizeof(T) < 8`."""
    before = tokens[position - 1] if position else None
    return before is not None and (before.kind == "number" or before.text == ")")


def split(tokens: Sequence[Token], separator: str = ",") -> list[list[Token]]:
    """The parts between separators that stand outside all brackets, `<>` included.

    For parameter lists and declarators, where `<` opens template arguments.
    """
    parts: list[list[Token]] = [[]]
    position = 0
    while position < len(tokens):
        token, end = tokens[position], None
        if token.kind == "mark":
            if token.text == separator:
                parts.append([])
                position += 1
                continue
            if token.text in CLOSING:
                end = matching(tokens, position)
            elif token.text == "<" and not _compares(tokens, position):
                end = closing_angle(tokens, position)
        end = position if end is None else end
        parts[-1] += tokens[position : end + 1]
        position = end + 1
    return parts if parts != [[]] else []


def text_of(tokens: Sequence[Token]) -> str:
    """Tokens on one line, for messages and keys."""
    return " ".join(token.text for token in tokens)


def render(tokens: Sequence[Token], *, unroll: bool = False) -> str:
    """C++ text whose line numbers are those of the tokens.

    With `unroll` loops are unrolled where Metal's source asks for it. On a GPU arrays
    stay in registers only so; on a CPU it would only take the compiler longer.
    """
    out: list[str] = []
    file, line = "", 0
    for token in tokens:
        if token.file and (token.file, token.line) != (file, line):
            if token.file == file and 0 < token.line - line <= 4:
                out.append("\n" * (token.line - line))
            else:
                out.append(f'\n#line {token.line} "{token.file}"\n')
            file, line = token.file, token.line
        if unroll and token.unrolled:
            out.append('_Pragma("unroll") ')
        out.append(token.text + " ")
    return "".join(out) + "\n"
