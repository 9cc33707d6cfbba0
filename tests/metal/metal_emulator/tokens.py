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
  | (?P<newline>\n)
  | (?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
  | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<mark>\[\[|::|->\*?|<<=|>>=|<=|>=|==|!=|&&|\|\||\+\+|--|<<|>>|\.\.\.
      |[-+*/%&|^]=|.)
    """,
    re.VERBOSE,
)
LINE_MARKER = re.compile(r'\s*#\s*(?:line\s+)?(\d+)\s+"((?:\\.|[^"\\])*)"')
CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclasses.dataclass(slots=True)
class Token:
    """One token.

    `kind` is "word", "number", "text" (a literal in quotes), "mark" (punctuation) or
    "attribute"; the `text` of an attribute is what stood between `[[` and `]]`.
    """

    kind: str
    text: str
    file: str = ""
    line: int = 0

    def like(self, text: str, kind: str = "word") -> Token:
        """Another token in the same place."""
        return Token(kind, text, self.file, self.line)


def tokenize(preprocessed: str) -> list[Token]:
    """Tokens of a preprocessor's output; pragmas are dropped, attributes folded."""
    tokens: list[Token] = []
    file, line = "", 1
    for row in preprocessed.split("\n"):
        if row.lstrip().startswith("#"):
            if marker := LINE_MARKER.match(row):
                line, file = int(marker[1]), marker[2]
            else:
                line += 1
            continue
        for match in PATTERN.finditer(row):
            kind = match.lastgroup or ""
            if kind != "space":
                tokens.append(Token(kind, match.group(), file, line))
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
    """The index of the token whose `>` closes the `<` at `start`.

    Brackets inside are skipped, so that a `>` which compares must stand in parentheses,
    as C++ itself asks of template arguments.
    """
    depth, position = 0, start
    while position < len(tokens):
        token = tokens[position]
        if token.kind == "mark":
            if token.text in ("(", "[", "{"):
                position = matching(tokens, position)
            elif token.text == "<":
                depth += not _compares(tokens, position)
            elif token.text in (">", ">>"):
                depth -= len(token.text)
                if depth <= 0:
                    return position
        position += 1
    where = tokens[start]
    raise SyntaxError(f"{where.file}:{where.line}: '<' is never closed")


def _compares(tokens: Sequence[Token], position: int) -> bool:
    """Whether this `<` stands after a value, as in `sizeof(T) < 8`."""
    before = tokens[position - 1] if position else None
    return before is not None and (before.kind == "number" or before.text == ")")


def split(tokens: Sequence[Token], separator: str = ",") -> list[list[Token]]:
    """The parts between separators that stand outside all brackets, `<>` included.

    For parameter lists and declarators, where `<` opens template arguments.
    """
    parts: list[list[Token]] = [[]]
    depth = 0
    for position, token in enumerate(tokens):
        if token.kind == "mark":
            depth += token.text in ("(", "[", "{")
            depth += token.text == "<" and not _compares(tokens, position)
            depth -= token.text in (")", "]", "}", ">")
            depth -= 2 * (token.text == ">>")
            if depth == 0 and token.text == separator:
                parts.append([])
                continue
        parts[-1].append(token)
    return parts if parts != [[]] else []


def text_of(tokens: Sequence[Token]) -> str:
    """Tokens on one line, for messages and keys."""
    return " ".join(token.text for token in tokens)


def render(tokens: Sequence[Token]) -> str:
    """C++ text whose line numbers are those of the tokens."""
    out: list[str] = []
    file, line = "", 0
    for token in tokens:
        if token.file and (token.file, token.line) != (file, line):
            if token.file == file and 0 < token.line - line <= 4:
                out.append("\n" * (token.line - line))
            else:
                out.append(f'\n#line {token.line} "{token.file}"\n')
            file, line = token.file, token.line
        out.append(token.text + " ")
    return "".join(out) + "\n"
