"""What changes inside a declaration: address spaces, literals, swizzles, variables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .declarations import ADDRESS_SPACES, has_const
from .tokens import Token, matching, split

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
SWIZZLE = re.compile(r"[xyzw]{2,4}")
LITERAL = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(h|H|bf|BF)?")


class Body:
    """Rewrites what stands anywhere: address spaces, literals, swizzles, variables."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def rewrite(self, tokens: list[Token]) -> list[Token]:
        tokens = [t for t in tokens if t.kind != "attribute"]
        out: list[Token] = []
        position = 0
        while position < len(tokens):
            token = tokens[position]
            before = out[-1].text if out else ";"
            if token.kind == "number":
                out.append(literal(token))
            elif token.text == "::" and not is_scope_name(out):
                out += [token, token.like("msl"), token]
            elif token.kind != "word":
                out.append(token)
            elif token.text == "threadgroup" and before in ("{", "}", ";"):
                position = self.variable(tokens, position, out)
                continue
            elif token.text == "constant":
                if not has_const(tokens, position):
                    out.append(token.like("const"))
            elif token.text in ADDRESS_SPACES:
                pass
            elif token.text == "coherent" and tokens[position + 1].text == "(":
                position = matching(tokens, position + 1)
            elif before == "." and SWIZZLE.fullmatch(token.text):
                out += _swizzle(token, tokens[position + 1].text)
            else:
                out.append(token)
            position += 1
        return out

    def variable(self, tokens: list[Token], start: int, out: list[Token]) -> int:
        """Translate `threadgroup T a[n], b;` at `start`; returns where to go on."""
        end = start
        while tokens[end].text != ";":
            end = matching(tokens, end) if tokens[end].text in ("(", "{", "[") else end
            end += 1
        parts = split(tokens[start + 1 : end])
        first = parts[0]
        stop = next(
            (i for i, t in enumerate(first) if t.text in ("[", "=")), len(first)
        )
        kind = first[: stop - 1]
        last = [t.text for t in kind if t.text != "const"][-1:]
        if last in (["*"], ["&"]) or first[stop - 1].text == ")":
            # A pointer into threadgroup memory is a variable of the thread.
            return start + 1
        for part in [first[stop - 1 :], *parts[1:]]:
            name, sizes = part[0], self.rewrite(part[1:])
            out += self.allocate(name, [*self.rewrite(kind), *sizes])
        return end + 1

    def allocate(self, name: Token, type_: list[Token]) -> list[Token]:
        alias = f"msl_type_of_{name.text}"
        site = f"msl_site_of_{name.text}"
        if self.cuda:
            variable = f"__shared__ {alias} {name.text}"
        else:
            variable = (
                f"static const char {site} = 0; {alias}& {name.text} = "
                f'*({alias}*)msl_threadgroup_memory(&{site}, "{name.text}", '
                f"sizeof({alias}), alignof({alias}), __builtin_LINE())"
            )
        end = name.like(";", "mark")
        return [name.like(f"using {alias} ="), *type_, end, name.like(variable), end]


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
    match = LITERAL.fullmatch(token.text)
    if match is None:
        return token
    digits, suffix = match.groups()
    is_float = any(c in digits for c in ".eE")
    if suffix is None:
        return token.like(digits + "f", "number") if is_float else token
    kind = "half" if suffix.lower() == "h" else "bfloat"
    return token.like(f"{kind}({digits}{'f' if is_float else '.0f'})")


def _swizzle(token: Token, following: str) -> list[Token]:
    name = "swizzled" if following in ASSIGNMENTS else "swizzle"
    indices = ", ".join(str("xyzw".index(letter)) for letter in token.text)
    return [token.like(f"template {name}<{indices}>()")]
