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

from .declarations import (
    ADDRESS_SPACES,
    Names,
    argument_of,
    before_parameters,
    canonical,
    host_name,
    instantiated,
    integer,
    is_access,
    kind_of,
    parameter_list,
    signature,
    starts,
    template_names,
    without_qualifiers,
)
from .entries import Entry, Parameter, parameters_of
from .meetings import mark
from .rewrite import Body
from .tokens import Token, matching, render, text_of, tokenize

THREAD_LIMIT = "max_total_threads_per_threadgroup"
# Each declaration by its text without address spaces: its body's text, and its place.
Seen = dict[str, tuple[str, Token]]


@dataclasses.dataclass(frozen=True)
class Translation:
    """C++ text without entry points, and the entries that can be added to it."""

    text: str
    entries: tuple[Entry, ...]


def translate(preprocessed: str, *, cuda: bool = False) -> Translation:
    """Translate the output of a C preprocessor.

    Raises:
        SyntaxError: brackets that do not match, or a kernel whose parameters or
            instantiation cannot be understood, or a construct whose meaning would be
            lost; the message names file and line.
    """
    translator = Translator(cuda)
    body = translator.scope(tokenize(preprocessed), "", inside_class=False)
    body = Body(cuda).rewrite(mark(body))
    text = "namespace msl {\n" + render(body, unroll=cuda) + "}\n"
    return Translation(text, tuple(translator.entries()))


class Translator:
    """Walks over namespaces and classes, and takes the kernels out of them."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        # By name, then by namespace.
        self.kernels: dict[str, dict[str, Entry]] = {}
        self.instances: list[tuple[str, str, str, Token]] = []
        self.seen: dict[str, Seen] = {}

    def entries(self) -> list[Entry]:
        found = []
        for name, function, namespace, where in self.instances:
            wanted = function.split("<")[0].replace(" ", "")
            kernel = self.named(wanted, namespace)
            if kernel is None:
                raise SyntaxError(
                    f"{where.file}:{where.line}: '{name}' instantiates '{wanted}', "
                    "which is not a kernel of this source, or one of several"
                )
            found.append(
                dataclasses.replace(
                    kernel, name=name, function=function, namespace=namespace
                )
            )
        return found

    def named(self, name: str, namespace: str) -> Entry | None:
        """The kernel that `name` means in a namespace: the nearest, or the only one."""
        *qualifiers, base = name.removeprefix("::").split("::")
        known = self.kernels.get(base, {})
        around = namespace.split("::") if namespace else []
        for count in range(len(around), -1, -1):
            path = "::".join([*around[:count], *qualifiers])
            if path in known:
                return known[path]
        # A `using` may have brought it here.
        return next(iter(known.values())) if len(known) == 1 else None

    def scope(self, tokens: list[Token], path: str, inside_class: bool) -> list[Token]:
        """Translate the declarations of one namespace or class."""
        # A namespace may be opened many times, a class only once.
        seen: Seen = {} if inside_class else self.seen.setdefault(path, {})
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
                    start, end = stop + 1, stop
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
        seen: Seen,
    ) -> list[Token]:
        head = tokens[start:brace]
        names = template_names(head)
        key = "class " + canonical(head, names)
        if known(key, names, head, tokens[brace : stop + 1], seen):
            return []
        body = self.scope(tokens[brace + 1 : end], path, inside_class=True)
        return [*head, tokens[brace], *body, *tokens[end : stop + 1]]

    def declaration(
        self, head: list[Token], body: list[Token] | None, path: str, seen: Seen
    ) -> list[Token]:
        """Translate one declaration that is not a class or a namespace.

        `body` is a function's, braces included; without one, `head` ends in `;`.
        """
        words = {t.text for t in head if t.kind == "word"}
        original, head = head, without_qualifiers(head)
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
            end = head[-1]
            head = [*head[:-1], *(end.like(text, "mark") for text in ("=", "{", "}"))]
            head.append(end)
        return self.ordinary(original, head, body, seen)

    def ordinary(
        self,
        original: list[Token],
        head: list[Token],
        body: list[Token] | None,
        seen: Seen,
    ) -> list[Token]:
        """A declaration that stays: `head` is `original` without what C++ has not."""
        if body is not None:
            key, names = signature(head)
            # A constructor's initializers belong to what it does.
            texts = [t.text for t in head]
            start = texts.index(":") if ":" in texts else len(head)
            if known(key, names, original, [*head[start:], *body], seen):
                return []
        return [*head, *(body or [])]

    def kernel(self, head: list[Token], path: str) -> None:
        opening = parameter_list(head)
        name = head[before_parameters(head, opening)].text
        parameters = self.parameters(head, opening)
        attributes = [t.text for t in head if t.kind == "attribute"]
        limit = None
        for attribute in attributes:
            if text := argument_of(attribute, THREAD_LIMIT):
                limit = integer(text)
        entry = Entry(name, name, path, parameters, limit)
        self.kernels.setdefault(name, {})[path] = entry
        if head[0].text != "template":
            host = host_name(attributes) or name
            self.instances.append((host, name, path, head[0]))

    def parameters(self, head: list[Token], opening: int) -> tuple[Parameter, ...]:
        return parameters_of(head, opening)


def known(
    key: str, names: Names, head: list[Token], content: list[Token], seen: Seen
) -> bool:
    """Whether a declaration is there already but for its address spaces.

    Raises:
        SyntaxError: it is, and does something else.
    """
    text = canonical(content, names)
    if key not in seen or not any(t.text in ADDRESS_SPACES for t in head):
        seen[key] = (text, head[0])
        return False
    first, where = seen[key]
    if text != first:
        raise SyntaxError(
            f"{head[0].file}:{head[0].line}: '{text_of(head)}' differs from "
            f"{where.file}:{where.line} in address spaces, which C++ has not, and in "
            "its body: the two cannot be told apart"
        )
    return True
