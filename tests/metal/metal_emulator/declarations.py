"""What a declaration of Metal source is, told from its brackets and a few words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .tokens import Token, matching, matching_angle, split, text_of

ADDRESS_SPACES = frozenset(
    ("device", "constant", "threadgroup", "thread", "ray_data", "object_data")
)
NO_FUNCTIONS = frozenset(("alignas", "decltype", "__attribute__", "noexcept"))
HOST_NAME = re.compile(r"host_name\s*\((.*)\)")


def is_access(head: Sequence[Token]) -> bool:
    return len(head) == 1 and head[0].text in ("public", "private", "protected")


def starts(tokens: Sequence[Token], text: str) -> bool:
    return bool(tokens) and tokens[0].text == text


def without_template(head: Sequence[Token]) -> list[Token]:
    """The declaration after its `template <...>` headers, attributes left out."""
    rest = [t for t in head if t.kind != "attribute"]
    while starts(rest, "template") and starts(rest[1:], "<"):
        rest = rest[matching_angle(rest, 1) + 1 :]
    return rest


def outside_brackets(tokens: Sequence[Token]) -> list[str]:
    """Texts at depth 0, each bracketed part shown by its opening bracket alone."""
    out, position = [], 0
    while position < len(tokens):
        out.append(tokens[position].text)
        if tokens[position].kind == "mark" and tokens[position].text in ("(", "[", "{"):
            position = matching(tokens, position)
        position += 1
    return out


def kind_of(head: Sequence[Token], following: str) -> str:
    """What the block after `head` is: namespace, class, function or other."""
    rest = without_template(head)
    texts = outside_brackets(rest)
    if "namespace" in texts[:2] or (texts[:1] == ["extern"] and '"' in texts[1]):
        return "namespace"
    if "enum" in texts:
        return "other"
    if texts[:1] and texts[0] in ("class", "struct", "union", "typedef"):
        return "class"
    if "=" in texts and "operator" not in texts:
        return "other"
    if "(" not in texts:
        return "other"
    # In `X() : a{1}, b{2} { ... }` the first braces belong to an initializer.
    if ":" in texts and following in (",", "{"):
        return "other"
    return "function"


def host_name(attributes: Sequence[str]) -> str | None:
    for attribute in attributes:
        if match := HOST_NAME.search(attribute):
            return "".join(re.findall(r'"([^"]*)"', match[1]))
    return None


def instantiated(tokens: Sequence[Token]) -> str:
    """The function named by `template [kernel] void f<T>(...);` or by `decltype`."""
    rest = [t for t in tokens[1:-1] if t.text != "kernel"]
    if starts(rest, "decltype"):
        return text_of(rest[matching(rest, 1) + 1 :])
    if starts(rest, "void"):
        end = 1
        while end < len(rest) and rest[end].text != "(":
            end = matching_angle(rest, end) if rest[end].text == "<" else end
            end += 1
        return text_of(rest[1:end])
    where = tokens[0]
    raise SyntaxError(
        f"{where.file}:{where.line}: cannot read this instantiation: {text_of(tokens)}"
    )


def parameter_list(head: Sequence[Token]) -> int:
    """The index of the `(` that opens a function's parameters."""
    position = 0
    named = next((i for i, t in enumerate(head) if t.text == "operator"), None)
    if named is not None:
        # `operator()(...)`, `operator+(...)` or a conversion, `operator vec<T, 2>()`.
        position = named + (3 if head[named + 1].text == "(" else 1)
        while head[position].text != "(":
            position += 1
        return position
    while position < len(head):
        token, before = head[position], head[position - 1]
        if token.kind == "mark" and token.text == "<" and before.text == "template":
            position = matching_angle(head, position)
        elif token.kind == "mark" and token.text == "(":
            is_name = before.kind == "word" and before.text not in NO_FUNCTIONS
            if is_name or before.text in (">", ">>"):
                return position
            position = matching(head, position)
        position += 1
    where = head[0]
    raise SyntaxError(
        f"{where.file}:{where.line}: no parameters found in {text_of(head)}"
    )


def erase_spaces(tokens: Sequence[Token]) -> list[Token]:
    """Tokens as the C++ compiler will see them: without address spaces."""
    out: list[Token] = []
    for position, token in enumerate(tokens):
        if token.kind == "attribute":
            continue
        if token.kind == "word" and token.text in ADDRESS_SPACES:
            if token.text != "constant" or has_const(tokens, position):
                continue
            token = token.like("const")
        out.append(token)
    return out


def has_const(tokens: Sequence[Token], position: int) -> bool:
    """Whether the type around `constant` says `const` already."""
    for step in (-1, 1):
        place = position + step
        while 0 <= place < len(tokens):
            token = tokens[place]
            if token.text == "const":
                return True
            if token.kind == "mark" and token.text not in ("::", "<", ">"):
                break
            if step > 0 and token.text in (">", "<"):
                break
            place += step
    return False


def signature(head: Sequence[Token]) -> str:
    """A function's declaration without address spaces and parameter names."""
    opening = parameter_list(head) if "(" in {t.text for t in head} else -1
    if opening < 0:
        return text_of(erase_spaces(head))
    closing = matching(head, opening)
    parts = []
    for part in split(head[opening + 1 : closing]):
        erased = erase_spaces(part)
        if "=" in [t.text for t in erased]:
            erased = erased[: [t.text for t in erased].index("=")]
        named = len(erased) > 1 and erased[-1].kind == "word"
        # `const uint` has no name; `const uint x` and `T* x` have.
        if named and (len(erased) > 2 or erased[-2].text not in ("const", "unsigned")):
            erased = erased[:-1]
        parts.append(text_of(erased))
    tail = []
    for token in erase_spaces(head[closing + 1 :]):
        if token.text == ":":
            break
        tail.append(token)
    before = text_of(erase_spaces(head[: opening + 1]))
    return f"{before}{' , '.join(parts)} ) {text_of(tail)}"


def without_qualifiers(head: list[Token]) -> list[Token]:
    """Drop the address space of a method's `this`, which stands after its parameters."""
    out: list[Token] = []
    for token in head:
        before = out[-1].text if out else ""
        after_list = before == ")" or (
            before in ("const", "noexcept") and len(out) > 1 and out[-2].text == ")"
        )
        if after_list and token.kind == "word" and token.text in ADDRESS_SPACES:
            continue
        out.append(token)
    return out
