"""The lint's rules on tokens: what Apple's compiler, or torch's host, refuses."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from ..declarations import ADDRESS_SPACES
from ..tokens import Token, matching, split, text_of, tokenize
from .declared import (
    POINTERS,
    Declaration,
    Found,
    declarations,
    end_of_angle,
    recursion,
)
from .kernels import kernel

WORDS = {
    "double": "`double` does not exist in Metal",
    "throw": "`throw`: Metal has no exceptions",
    "try": "`try`: Metal has no exceptions",
    "catch": "`catch`: Metal has no exceptions",
    "virtual": "`virtual`: Metal has no virtual functions",
    "goto": "`goto` does not exist in Metal",
    "dynamic_cast": "`dynamic_cast` does not exist in Metal",
    "typeid": "`typeid` does not exist in Metal",
    "thread_local": "`thread_local` does not exist in Metal",
    "new": "`new`: Metal has no dynamic memory",
    "delete": "`delete`: Metal has no dynamic memory",
    "asm": "`asm` does not exist in Metal",
    "__asm__": "`asm` does not exist in Metal",
    "co_await": "Metal has no coroutines",
    "co_yield": "Metal has no coroutines",
    "co_return": "Metal has no coroutines",
}
LIBC = frozenset(
    ("printf", "puts", "malloc", "calloc", "realloc", "free", "abort", "exit")
)
WIDE = re.compile(r"(bool|half|bfloat|float|u?char|u?short|u?int|u?long)(8|16)")
LONG_DOUBLE = re.compile(r"(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?[lL]")
NOT_TYPES = frozenset(
    re.findall(
        r"\w+", "return case else do goto delete throw if for while switch break"
    )
)
NO_VARIABLES = frozenset(
    re.findall(
        r"\w+", "using typedef template friend enum struct class union namespace"
    )
)
LAMBDAS = 320


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """Something that would be refused, and where it stands."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the rules take for granted."""

    language_version: int = 310
    function_constants: bool = False
    threadgroup_arguments: bool = False


def problems(preprocessed: str, options: Options) -> set[Problem]:
    """All that the rules find, in every file."""
    tokens = tokenize(preprocessed)
    found = [*_tokens(tokens, options)]
    every = list(declarations(tokens))
    for declaration in every:
        found += _declaration(declaration, options)
    for function, way in recursion(every):
        found.append((function.where, f"recursion, which Metal does not have: {way}"))
    return {Problem(token.file, token.line, message) for token, message in found}


# ------------------------------------------------------------------- single tokens
def _tokens(tokens: Sequence[Token], options: Options) -> Found:
    declared = {
        after.text
        for before, after in itertools.pairwise(tokens)
        if before.text in ("using", "struct", "class", "enum", "typename")
    }
    declared |= {
        name.text
        for name, after in itertools.pairwise(tokens)
        if after.text == ";" and name.kind == "word"
    }
    for position, token in enumerate(tokens):
        before = tokens[position - 1] if position else token.like(";", "mark")
        after = tokens[position + 1] if position + 1 < len(tokens) else before
        if not token.text.isascii():
            yield token, f"not ASCII: {token.text}"
        elif token.kind == "number":
            if LONG_DOUBLE.fullmatch(token.text) and re.search(r"[.eE]", token.text):
                yield token, f"`{token.text}`: Metal has no long double"
        elif token.kind == "word":
            yield from _word(tokens, position, declared)
        elif token.kind == "mark" and token.text in POINTERS:
            if after.text in (")", ">", ">>", ",") and _is_bare(tokens, position):
                yield token, _bare(token)
        elif token.text == "[" and options.language_version < LAMBDAS:
            is_start = before.text in ("return", "else") or (
                before.kind == "mark" and before.text not in (")", "]", ">", "}")
            )
            end = matching(tokens, position)
            if (
                is_start
                and end + 1 < len(tokens)
                and tokens[end + 1].text in ("(", "{")
            ):
                yield token, "a lambda: Metal has them from version 3.2, macOS 15"


def _word(tokens: Sequence[Token], position: int, declared: set[str]) -> Found:
    token = tokens[position]
    before = tokens[position - 1].text if position else ""
    after = tokens[position + 1].text if position + 1 < len(tokens) else ""
    if token.text in WORDS:
        if before != "operator" and (token.text, before) != ("delete", "="):
            yield token, WORDS[token.text]
    elif token.text == "std" and after == "::":
        yield token, "`std::`: Metal's library is in `metal::`"
    elif token.text in LIBC and after == "(":
        if before not in (".", "->", "::") and not _is_declarator(tokens, position):
            yield token, f"`{token.text}` does not exist in Metal"
    elif WIDE.fullmatch(token.text) and token.text not in declared:
        yield token, f"`{token.text}`: Metal's vectors have 2 to 4 components"
    elif token.text in ("vec", "packed_vec") and after == "<":
        parts = split(tokens[position + 2 : end_of_angle(tokens, position + 1)])
        size = text_of(parts[-1]) if len(parts) == 2 else ""
        if size.isdigit() and not 2 <= int(size) <= 4:
            yield token, f"a vector of {size}: Metal's vectors have 2 to 4 components"


def _is_declarator(tokens: Sequence[Token], position: int) -> bool:
    """Whether a name before `(` is being declared, a type standing before it."""
    before = tokens[position - 1]
    return before.kind == "word" and before.text not in ("return", "else", "case")


def _bare(mark: Token) -> str:
    kind = "pointer" if mark.text == "*" else "reference"
    return (
        f"a {kind} without an address space (device, constant, threadgroup or thread)"
    )


def _is_bare(tokens: Sequence[Token], mark: int) -> bool:
    """Whether the type before the `*` or `&` of an unnamed declarator lacks a space."""
    position = mark - 1
    previous = tokens[position]
    if previous.text == "operator":
        return False
    if previous.kind != "word" and previous.text not in (">", ">>", "*"):
        return False
    while position >= 0:
        token = tokens[position]
        if token.kind == "word":
            if token.text in ADDRESS_SPACES:
                return False
            if token.text in NOT_TYPES:
                return True
        elif token.text in (">", ">>"):
            depth = 0
            while position >= 0:
                text = tokens[position].text
                depth += text.count(">") if text in (">", ">>") else 0
                depth -= text == "<"
                if depth <= 0:
                    break
                position -= 1
        elif token.text != "::":
            return True
        position -= 1
    return True


def bare_pointer(tokens: Sequence[Token]) -> Token | None:
    """The first `*` or `&` of a declarator, if no address space stands before it.

    A reference or pointer to a pointer may leave its own out, as MLX's kernels do.
    """
    has_space = False
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token.kind == "word":
            has_space |= token.text in ADDRESS_SPACES
        elif token.kind == "mark":
            if token.text == "=":
                return None
            if token.text == "<" and position:
                end = end_of_angle(tokens, position)
                if end is None:
                    return None
                position = end
            elif token.text in ("(", "["):
                end = matching(tokens, position)
                inner = tokens[position + 1]
                is_array = end + 1 < len(tokens) and tokens[end + 1].text == "["
                if inner.text in POINTERS and is_array and not has_space:
                    return inner
                position = end
            elif token.text in POINTERS:
                return None if has_space else token
        position += 1
    return None


# -------------------------------------------------------------------- declarations
def _declaration(one: Declaration, options: Options) -> Found:
    words = [t.text for t in one.plain if t.kind == "word"]
    if not words or words[0] == "static_assert":
        return
    constant = any(a.startswith("function_constant") for a in one.attributes)
    if constant and not options.function_constants:
        yield one.where, "a function constant: torch.mps.compile_shader cannot set it"
    if one.opening is not None and "using" not in words[:1]:
        yield from _function(one, options)
    elif words[0] in ("using", "typedef"):
        texts = [t.text for t in one.plain]
        type_ = one.plain[texts.index("=") + 1 :] if "=" in texts else one.plain
        if words[1:2] != ["namespace"] and (mark := bare_pointer(type_)):
            yield mark, _bare(mark)
    elif one.body is None and words[0] not in NO_VARIABLES and len(words) > 1:
        yield from _global_or_member(one, words)


def _global_or_member(one: Declaration, words: Sequence[str]) -> Found:
    if mark := bare_pointer(one.plain):
        yield mark, _bare(mark)
    shared = not one.owner or "static" in words
    if shared and "constant" not in words and "operator" not in words:
        what = "a static member" if one.owner else "a variable outside of functions"
        yield one.where, f"{what} must be in `constant`"


def _function(one: Declaration, options: Options) -> Found:
    assert one.opening is not None
    if mark := bare_pointer(one.result):
        yield mark, _bare(mark)
    for parameter in one.parameters:
        plain = [t for t in parameter if t.kind != "attribute"]
        if mark := bare_pointer(plain):
            yield mark, _bare(mark)
        yield from _by_value(plain)
    if one.body is not None:
        if one.is_kernel:
            yield from kernel(one, options.threadgroup_arguments)
        yield from _body(one.body, one.is_kernel)


def _by_value(parameter: Sequence[Token]) -> Found:
    spaces = [t for t in parameter if t.text in ADDRESS_SPACES - {"thread"}]
    texts = {t.text for t in parameter}
    if spaces and not texts & {"*", "&", "&&", "[", "(", "<"}:
        yield spaces[0], f"a parameter by value cannot be in `{spaces[0].text}`"


# -------------------------------------------------------------------------- bodies
def _body(body: Sequence[Token], is_kernel: bool) -> Found:
    """Declarations that begin statements."""
    for position, token in enumerate(body):
        before = body[position - 1].text if position else ";"
        opener = body[position - 2].text if position > 1 else ""
        if token.kind != "word" or token.text in NOT_TYPES:
            continue
        if before in (";", "{", "}") or (
            before == "(" and opener in ("for", "if", "while", "switch")
        ):
            yield from _statement(body, position, before, is_kernel)


def _statement(
    body: Sequence[Token], start: int, before: str, is_kernel: bool
) -> Found:
    if body[start].text in ("using", "typedef"):
        end = _until(body, start, ";")
        texts = [t.text for t in body[start:end]]
        skip = texts.index("=") + 1 if "=" in texts else 1
        if mark := bare_pointer(body[start + skip : end]):
            yield mark, _bare(mark)
        return
    name = _declarator(body, start)
    if name is None or name + 1 >= len(body):
        return
    after = body[name + 1].text
    type_ = body[start:name]
    marks = [t for t in type_ if t.text in POINTERS]
    # `{ a * b, c }` are values, `a * b = c` can but be a declaration.
    endings = ("=", ";") if before == "{" else ("=", ";", ",", "[", ":", "{")
    if after in endings and (mark := bare_pointer(type_)):
        yield mark, _bare(mark)
    words = {t.text for t in type_ if t.kind == "word"}
    if marks or after not in ("=", ";", ",", "[", "{"):
        return
    if "threadgroup" in words and not is_kernel:
        yield (
            body[name],
            f"the threadgroup variable `{body[name].text}` is not in a kernel",
        )
    if "threadgroup" in words and _is_initialised(body, name + 1):
        yield body[name], f"the threadgroup variable `{body[name].text}` is initialised"
    if "device" in words:
        yield (
            body[name],
            f"the local variable `{body[name].text}` cannot be in `device`",
        )
    if "static" in words and not words & {"constant", "threadgroup"}:
        yield (
            body[name],
            f"the static variable `{body[name].text}` must be in `constant`",
        )


def _declarator(body: Sequence[Token], start: int) -> int | None:
    """The index of the name that a statement declares, if it declares one."""
    position, words, name = start, 0, None
    while position < len(body):
        token = body[position]
        if token.kind == "word":
            if token.text in NOT_TYPES:
                return None
            words += 1
            name = position
        elif token.text == "<" and words:
            end = end_of_angle(body, position)
            if end is None:
                return None
            position, name = end, None
        elif token.text == "(" and body[position - 1].text == "decltype":
            position, name = matching(body, position), None
        elif token.text == "::" or (token.text in POINTERS and words):
            name = None
        else:
            break
        position += 1
    is_declaration = name is not None and name == position - 1 and name > start
    return name if is_declaration else None


def _is_initialised(body: Sequence[Token], position: int) -> bool:
    while body[position].text == "[":
        position = matching(body, position) + 1
    return body[position].text in ("=", "{")


def _until(tokens: Sequence[Token], start: int, text: str) -> int:
    while start < len(tokens) and tokens[start].text != text:
        start += 1
    return start
