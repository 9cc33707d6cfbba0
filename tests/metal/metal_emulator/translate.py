"""Metal Shading Language to C++: preprocessed tokens in, one C++ text out.

Types are never parsed. Declarations are found by their brackets, kernels by their
attributes, and the C++ compiler does the rest (`decltype(&kernel<...>)` gives the types
of a kernel's parameters). What has to change on the way:

- address spaces go; overloads and specialisations that only they tell apart collapse;
- kernels and their `[[host_name]]` instantiations become entry points;
- `threadgroup` variables come out of an arena that the runtime guards and poisons;
- swizzles become calls, `1.0h` a constructor, and `1.0` a float, as Metal reads it.
"""

from __future__ import annotations

import dataclasses
import re

from .declarations import (
    ADDRESS_SPACES,
    erase_spaces,
    host_name,
    instantiated,
    is_access,
    kind_of,
    parameter_list,
    signature,
    starts,
    without_qualifiers,
)
from .entries import Entry, parameters_of
from .meetings import mark
from .rewrite import Body
from .tokens import Token, matching, render, text_of, tokenize

THREAD_LIMIT = re.compile(r"max_total_threads_per_threadgroup\s*\(\s*(\d+)")


@dataclasses.dataclass(frozen=True)
class Translation:
    """C++ text without entry points, and the entries that can be added to it."""

    text: str
    entries: tuple[Entry, ...]


def translate(preprocessed: str, *, cuda: bool = False) -> Translation:
    """Translate the output of a C preprocessor.

    Raises:
        SyntaxError: brackets that do not match, or a kernel whose parameters or
            instantiation cannot be understood; the message names file and line.
    """
    translator = Translator(cuda)
    body = translator.scope(tokenize(preprocessed), "", inside_class=False)
    body = Body(cuda).rewrite(mark(body))
    text = "namespace msl {\n" + render(body) + "}\n"
    return Translation(text, tuple(translator.entries()))


class Translator:
    """Walks over namespaces and classes, and takes the kernels out of them."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.kernels: dict[str, Entry] = {}
        self.instances: list[tuple[str, str, str, Token]] = []
        self.seen: dict[str, set[str]] = {}

    def entries(self) -> list[Entry]:
        found = []
        for name, function, namespace, where in self.instances:
            base = function.split("<")[0].split("::")[-1].strip()
            if base not in self.kernels:
                raise SyntaxError(
                    f"{where.file}:{where.line}: '{name}' instantiates '{base}', which "
                    "is not a kernel of this source"
                )
            found.append(
                dataclasses.replace(
                    self.kernels[base],
                    name=name,
                    function=function,
                    namespace=namespace,
                )
            )
        return found

    def scope(self, tokens: list[Token], path: str, inside_class: bool) -> list[Token]:
        """Translate the declarations of one namespace or class."""
        # A namespace may be opened many times, a class only once.
        seen: set[str] = set() if inside_class else self.seen.setdefault(path, set())
        out: list[Token] = []
        start = position = 0
        while position < len(tokens):
            token = tokens[position]
            if token.kind != "mark":
                position += 1
            elif token.text in ("(", "["):
                position = matching(tokens, position) + 1
            elif token.text == ":" and is_access(tokens[start:position]):
                out += tokens[start : position + 1]
                start = position = position + 1
            elif token.text == ";":
                position += 1
                out += self.declaration(tokens[start:position], None, path, seen)
                start = position
            elif token.text == "{":
                end = matching(tokens, position)
                following = tokens[end + 1].text if end + 1 < len(tokens) else ""
                kind = kind_of(tokens[start:position], following)
                if kind == "namespace":
                    out += self.block(tokens, start, position, end, path)
                    start = end + 1
                elif kind == "class":
                    stop = end
                    while tokens[stop].text != ";":
                        stop += 1
                    out += self.class_(tokens, start, position, end, stop, path, seen)
                    start = end = stop
                    start += 1
                elif kind == "function":
                    head, body = tokens[start:position], tokens[position : end + 1]
                    out += self.declaration(head, body, path, seen)
                    start = end + 1
                position = end + 1
            else:
                position += 1
        return out + tokens[start:]

    def block(
        self, tokens: list[Token], start: int, brace: int, end: int, path: str
    ) -> list[Token]:
        head = tokens[start:brace]
        names = [t.text for t in head if t.kind == "word"]
        if "extern" in names:
            inner = path
        else:
            names = [name for name in names if name not in ("inline", "namespace")]
            inner = "::".join(filter(None, [path, *names]))
        body = self.scope(tokens[brace + 1 : end], inner, inside_class=False)
        return [*head, tokens[brace], *body, tokens[end]]

    def class_(
        self,
        tokens: list[Token],
        start: int,
        brace: int,
        end: int,
        stop: int,
        path: str,
        seen: set[str],
    ) -> list[Token]:
        head = tokens[start:brace]
        key = "class " + text_of(erase_spaces(head))
        if key in seen and any(t.text in ADDRESS_SPACES for t in head):
            return []
        seen.add(key)
        body = self.scope(tokens[brace + 1 : end], path, inside_class=True)
        return [*head, tokens[brace], *body, *tokens[end : stop + 1]]

    def declaration(
        self, head: list[Token], body: list[Token] | None, path: str, seen: set[str]
    ) -> list[Token]:
        """Translate one declaration that is not a class or a namespace.

        `body` is a function's, braces included; without one, `head` ends in `;`.
        """
        words = {t.text for t in head if t.kind == "word"}
        head = without_qualifiers(head)
        attributes = [t.text for t in head if t.kind == "attribute"]
        plain = [t for t in head if t.kind != "attribute"]
        is_instance = starts(plain, "template") and not starts(plain[1:], "<")
        if body is None and is_instance and (name := host_name(attributes)):
            self.instances.append((name, instantiated(plain), path, plain[0]))
            return []
        is_kernel = "kernel" in words or any(
            a.split(",")[0].strip() == "kernel" for a in attributes
        )
        if is_kernel and body is not None:
            self.kernel(head, path)
        head = [t for t in head if t.text != "kernel" or t.kind == "attribute"]
        if body is None and any(a.startswith("function_constant") for a in attributes):
            # The host cannot set function constants, so none is ever defined.
            return [
                *head[:-1],
                *(head[-1].like(t, "mark") for t in ("=", "{", "}", ";")),
            ]
        if body is not None and words & ADDRESS_SPACES:
            key = signature(head)
            if key in seen:
                return []
            seen.add(key)
        elif body is not None:
            seen.add(signature(head))
        return [*head, *(body or [])]

    def kernel(self, head: list[Token], path: str) -> None:
        opening = parameter_list(head)
        name = head[opening - 1].text
        parameters = parameters_of(head, opening)
        attributes = [t.text for t in head if t.kind == "attribute"]
        limit = None
        for attribute in attributes:
            if match := THREAD_LIMIT.search(attribute):
                limit = int(match[1])
        self.kernels[name] = Entry(name, name, path, parameters, limit)
        if head[0].text != "template":
            host = host_name(attributes) or name
            self.instances.append((host, name, path, head[0]))
