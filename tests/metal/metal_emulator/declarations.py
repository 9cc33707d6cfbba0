"""What a declaration of Metal source is, told from its brackets and a few words."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence

from .tokens import Token, matching, matching_angle, split, text_of

ADDRESS_SPACES = frozenset(
    ("device", "constant", "threadgroup", "thread", "ray_data", "object_data")
)
NO_FUNCTIONS = frozenset(("alignas", "decltype", "__attribute__", "noexcept"))
TYPE_WORD = re.compile(
    "const|volatile|(un)?signed|void|bool|char|short|int|long|half|float|auto"
)
OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
# A parameter's name, and its place as text.
Names = dict[str, str]
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


def argument_of(attribute: str, name: str) -> str | None:
    """What stands in the brackets of `name(...)` in an attribute's text."""
    found = re.search(rf"\b{name}\s*\(", attribute)
    if found is None:
        return None
    depth = 1
    for end in range(found.end(), len(attribute)):
        depth += (attribute[end] == "(") - (attribute[end] == ")")
        if depth == 0:
            return attribute[found.end() : end]
    return None


def integer(text: str) -> int | None:
    """The value of sums and products of integer literals; None for all else."""
    plain = re.sub(r"\b(0[xX][\da-fA-F]+|\d+)[uUlL]*\b", r"\1", text.replace("'", ""))
    try:
        return _value(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(ast.dump(node))


def host_name(attributes: Sequence[str]) -> str | None:
    for attribute in attributes:
        if match := HOST_NAME.search(attribute):
            return "".join(re.findall(r'"([^"]*)"', match[1]))
    return None


def instantiated(tokens: Sequence[Token]) -> str:
    """The function named by `template [kernel] void f<T>(...);`.

    A type without parameters may stand for `void`: `decltype(f<T>) f<T>;`.
    """
    rest = [t for t in tokens[1:-1] if t.text not in ("kernel", "inline", "static")]
    start = _end_of_name(rest, 0)
    end = _end_of_name(rest, start)
    if 0 < start < end and (end == len(rest) or rest[end].text == "("):
        return text_of(rest[start:end])
    where = tokens[0]
    raise SyntaxError(
        f"{where.file}:{where.line}: cannot read this instantiation: {text_of(tokens)}"
    )


def _end_of_name(tokens: Sequence[Token], start: int) -> int:
    """Where `a::b<c>` or `decltype(...)` that begins at `start` ends."""
    position = start
    while position < len(tokens):
        text = tokens[position].text
        after_scope = position == start or tokens[position - 1].text == "::"
        if text == "decltype" and position == start:
            position = matching(tokens, position + 1)
        elif text == "<" and position > start:
            position = matching_angle(tokens, position)
        elif text != "::" and not (tokens[position].kind == "word" and after_scope):
            break
        position += 1
    return position


def before_parameters(head: Sequence[Token], opening: int) -> int:
    """The index of the last token before a function's `(` that is no attribute."""
    place = opening - 1
    while place > 0 and head[place].kind == "attribute":
        place -= 1
    return place


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
        token = head[position]
        before = head[before_parameters(head, position)]
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


def signature(head: Sequence[Token]) -> tuple[str, Names]:
    """A declaration without address spaces, and the names it gives its parameters.

    Two declarations that C++ takes for the same have the same text; the names' places
    tell how the body of one reads with the names of the other.
    """
    names = template_names(head)
    opening = parameter_list(head) if "(" in {t.text for t in head} else -1
    if opening < 0:
        return canonical(head, names), names
    closing = matching(head, opening)
    parts = []
    for number, part in enumerate(split(head[opening + 1 : closing])):
        texts = [t.text for t in part]
        part = part[: texts.index("=")] if "=" in texts else part
        part = [t for t in part if t.kind != "attribute"]
        place = name_of_parameter(part)
        if place is not None:
            names[part[place].text] = f"parameter {number}"
            part = [*part[:place], *part[place + 1 :]]
        parts.append(part)
    tail = []
    for token in head[closing + 1 :]:
        if token.text == ":":
            break
        tail.append(token)
    before = canonical(head[: opening + 1], names)
    inside = " , ".join(canonical(part, names) for part in parts)
    return f"{before} {inside} ) {canonical(tail, names)}".rstrip(), names


def template_names(head: Sequence[Token]) -> Names:
    """Template parameters by name: which list, and which place in it."""
    names: Names = {}
    rest = [t for t in head if t.kind != "attribute"]
    while starts(rest, "template") and starts(rest[1:], "<"):
        end = matching_angle(rest, 1)
        for part in split(rest[2:end]):
            texts = [t.text for t in part]
            part = part[: texts.index("=")] if "=" in texts else part
            if len(part) > 1 and part[-1].kind == "word" and part[-2].text != "::":
                names[part[-1].text] = f"template parameter {len(names)}"
        rest = rest[end + 1 :]
    return names


def name_of_parameter(part: Sequence[Token]) -> int | None:
    """Where the name stands in a parameter without its default; None for no name."""
    texts = [t.text for t in part]
    last, depth = len(part) - 1, 0
    while last > 0 and (texts[last] == "]" or depth):
        depth += (texts[last] == "]") - (texts[last] == "[")
        last -= 1
    if last > 0 and texts[last] == ")":
        # `T (&name)[4]`
        last -= 1
    if last < 1 or part[last].kind != "word" or TYPE_WORD.fullmatch(texts[last]):
        return None
    unnamed = ("::", "const", "volatile", "unsigned", "signed", "typename")
    return None if texts[last - 1] in (*unnamed, *ADDRESS_SPACES) else last


def canonical(tokens: Sequence[Token], names: Names) -> str:
    """Text without address spaces, in which parameters go by their places."""
    out: list[str] = []
    for token in erase_spaces(tokens):
        is_member = bool(out) and out[-1] in (".", "->", "::")
        out.append(token.text if is_member else names.get(token.text, token.text))
    return " ".join(out)


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
