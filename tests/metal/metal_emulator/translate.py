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
from collections.abc import Sequence

from .tokens import (
    Token,
    matching,
    matching_angle,
    render,
    split,
    text_of,
    tokenize,
)

ADDRESS_SPACES = frozenset(
    ("device", "constant", "threadgroup", "thread", "ray_data", "object_data")
)
ASSIGNMENTS = frozenset(("=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^="))
NO_FUNCTIONS = frozenset(("alignas", "decltype", "__attribute__", "noexcept"))
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
HOST_NAME = re.compile(r"host_name\s*\((.*)\)")
THREAD_LIMIT = re.compile(r"max_total_threads_per_threadgroup\s*\(\s*(\d+)")
INDEXED = re.compile(r"(\w+)\s*\(\s*(\d+)\s*\)")

# Where the entry point finds each value that a kernel may ask for.
VECTORS = {
    "thread_position_in_grid": "ids.thread_position",
    "thread_position_in_threadgroup": "ids.position_in_group",
    "threadgroup_position_in_grid": "ids.group_position",
    "threads_per_grid": "ids.threads",
    "threads_per_threadgroup": "ids.group_size",
    "dispatch_threads_per_threadgroup": "ids.dispatched_group_size",
    "threadgroups_per_grid": "ids.groups",
}
SCALARS = {
    "thread_index_in_threadgroup": "ids.index_in_group",
    "simdgroup_index_in_threadgroup": "ids.simdgroup",
    "thread_index_in_simdgroup": "ids.lane",
    "simdgroups_per_threadgroup": "ids.simdgroups",
    "dispatch_simdgroups_per_threadgroup": "ids.dispatched_simdgroups",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "quadgroup_index_in_threadgroup": "ids.index_in_group / 4",
    "thread_index_in_quadgroup": "ids.index_in_group % 4",
    "quadgroups_per_threadgroup": "ids.simdgroups * 8",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What fills one parameter of a kernel: a buffer's index, or an attribute."""

    attribute: str
    buffer: int | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel that the host can launch.

    `name` is the host's name for it, `function` the C++ expression that names it
    inside `namespace` ("" or "a::b"), and `max_threads` its own limit, if it has one.
    """

    name: str
    function: str
    namespace: str
    parameters: tuple[Parameter, ...]
    max_threads: int | None = None

    @property
    def buffers(self) -> int:
        """How many buffer slots the kernel knows."""
        return max(
            [p.buffer + 1 for p in self.parameters if p.buffer is not None] + [0]
        )


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
    translator = _Translator(cuda)
    body = translator.scope(tokenize(preprocessed), "", inside_class=False)
    body = _Body(cuda).rewrite(body)
    text = "namespace msl {\n" + render(body) + "}\n"
    return Translation(text, tuple(translator.entries()))


class _Translator:
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
            elif token.text == ":" and _is_access(tokens[start:position]):
                out += tokens[start : position + 1]
                start = position = position + 1
            elif token.text == ";":
                position += 1
                out += self.declaration(tokens[start:position], None, path, seen)
                start = position
            elif token.text == "{":
                end = matching(tokens, position)
                following = tokens[end + 1].text if end + 1 < len(tokens) else ""
                kind = _kind_of(tokens[start:position], following)
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
        key = "class " + text_of(_erase_spaces(head))
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
        head = _without_qualifiers(head)
        attributes = [t.text for t in head if t.kind == "attribute"]
        plain = [t for t in head if t.kind != "attribute"]
        is_instance = _starts(plain, "template") and not _starts(plain[1:], "<")
        if body is None and is_instance and (name := _host_name(attributes)):
            self.instances.append((name, _instantiated(plain), path, plain[0]))
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
            key = _signature(head)
            if key in seen:
                return []
            seen.add(key)
        elif body is not None:
            seen.add(_signature(head))
        return [*head, *(body or [])]

    def kernel(self, head: list[Token], path: str) -> None:
        opening = _parameter_list(head)
        name = head[opening - 1].text
        parameters = _parameters(head, opening)
        attributes = [t.text for t in head if t.kind == "attribute"]
        limit = None
        for attribute in attributes:
            if match := THREAD_LIMIT.search(attribute):
                limit = int(match[1])
        self.kernels[name] = Entry(name, name, path, parameters, limit)
        if head[0].text != "template":
            host = _host_name(attributes) or name
            self.instances.append((host, name, path, head[0]))


def _is_access(head: Sequence[Token]) -> bool:
    return len(head) == 1 and head[0].text in ("public", "private", "protected")


def _starts(tokens: Sequence[Token], text: str) -> bool:
    return bool(tokens) and tokens[0].text == text


def _without_template(head: Sequence[Token]) -> list[Token]:
    """The declaration after its `template <...>` headers, attributes left out."""
    rest = [t for t in head if t.kind != "attribute"]
    while _starts(rest, "template") and _starts(rest[1:], "<"):
        rest = rest[matching_angle(rest, 1) + 1 :]
    return rest


def _outside_brackets(tokens: Sequence[Token]) -> list[str]:
    """Texts at depth 0, each bracketed part shown by its opening bracket alone."""
    out, position = [], 0
    while position < len(tokens):
        out.append(tokens[position].text)
        if tokens[position].kind == "mark" and tokens[position].text in ("(", "[", "{"):
            position = matching(tokens, position)
        position += 1
    return out


def _kind_of(head: Sequence[Token], following: str) -> str:
    """What the block after `head` is: namespace, class, function or other."""
    rest = _without_template(head)
    texts = _outside_brackets(rest)
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


def _host_name(attributes: Sequence[str]) -> str | None:
    for attribute in attributes:
        if match := HOST_NAME.search(attribute):
            return "".join(re.findall(r'"([^"]*)"', match[1]))
    return None


def _instantiated(tokens: Sequence[Token]) -> str:
    """The function named by `template [kernel] void f<T>(...);` or by `decltype`."""
    rest = [t for t in tokens[1:-1] if t.text != "kernel"]
    if _starts(rest, "decltype"):
        return text_of(rest[matching(rest, 1) + 1 :])
    if _starts(rest, "void"):
        end = 1
        while end < len(rest) and rest[end].text != "(":
            end = matching_angle(rest, end) if rest[end].text == "<" else end
            end += 1
        return text_of(rest[1:end])
    where = tokens[0]
    raise SyntaxError(
        f"{where.file}:{where.line}: cannot read this instantiation: {text_of(tokens)}"
    )


def _parameter_list(head: Sequence[Token]) -> int:
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


def _parameters(head: Sequence[Token], opening: int) -> tuple[Parameter, ...]:
    """What fills each parameter; buffers without a number are numbered in order."""
    found: list[Parameter] = []
    following = 0
    for part in split(head[opening + 1 : matching(head, opening)]):
        attributes = [t.text for t in part if t.kind == "attribute"]
        indexed = INDEXED.match(attributes[0]) if attributes else None
        if indexed and indexed[1] == "buffer":
            found.append(Parameter("buffer", int(indexed[2])))
            following = int(indexed[2]) + 1
        elif attributes and (attributes[0] in VECTORS or attributes[0] in SCALARS):
            found.append(Parameter(attributes[0]))
        elif not attributes and any(t.text in ("*", "&", "[") for t in part):
            found.append(Parameter("buffer", following))
            following += 1
        else:
            where = head[opening]
            raise SyntaxError(
                f"{where.file}:{where.line}: the kernel's parameter '{text_of(part)}' "
                "cannot be filled by torch.mps.compile_shader (a pointer or reference, "
                f"or one of {', '.join(sorted([*VECTORS, *SCALARS]))}, can)"
            )
    return tuple(found)


def _erase_spaces(tokens: Sequence[Token]) -> list[Token]:
    """Tokens as the C++ compiler will see them: without address spaces."""
    out: list[Token] = []
    for position, token in enumerate(tokens):
        if token.kind == "attribute":
            continue
        if token.kind == "word" and token.text in ADDRESS_SPACES:
            if token.text != "constant" or _has_const(tokens, position):
                continue
            token = token.like("const")
        out.append(token)
    return out


def _has_const(tokens: Sequence[Token], position: int) -> bool:
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


def _signature(head: Sequence[Token]) -> str:
    """A function's declaration without address spaces and parameter names."""
    opening = _parameter_list(head) if "(" in {t.text for t in head} else -1
    if opening < 0:
        return text_of(_erase_spaces(head))
    closing = matching(head, opening)
    parts = []
    for part in split(head[opening + 1 : closing]):
        erased = _erase_spaces(part)
        if "=" in [t.text for t in erased]:
            erased = erased[: [t.text for t in erased].index("=")]
        named = len(erased) > 1 and erased[-1].kind == "word"
        # `const uint` has no name; `const uint x` and `T* x` have.
        if named and (len(erased) > 2 or erased[-2].text not in ("const", "unsigned")):
            erased = erased[:-1]
        parts.append(text_of(erased))
    tail = []
    for token in _erase_spaces(head[closing + 1 :]):
        if token.text == ":":
            break
        tail.append(token)
    before = text_of(_erase_spaces(head[: opening + 1]))
    return f"{before}{' , '.join(parts)} ) {text_of(tail)}"


def _without_qualifiers(head: list[Token]) -> list[Token]:
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


class _Body:
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
                out.append(_number(token))
            elif token.text == "::" and not _is_scope_name(out):
                out += [token, token.like("msl"), token]
            elif token.kind != "word":
                out.append(token)
            elif token.text == "threadgroup" and before in ("{", "}", ";"):
                position = self.variable(tokens, position, out)
                continue
            elif token.text == "constant":
                if not _has_const(tokens, position):
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


def _is_scope_name(before: Sequence[Token]) -> bool:
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


def _number(token: Token) -> Token:
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


def entry_points(entries: Sequence[Entry], *, cuda: bool = False) -> str:
    """C++ text of entry points for these kernels, to stand after the translation."""
    out = ['#line 1 "entry points"\nnamespace msl {']
    for number, entry in enumerate(entries):
        call = _call(entry)
        body = (
            f"static void msl_entry_{number}(void* const* buffers, Ids const& ids) "
            f"{{ (void)buffers; (void)ids; {call} }}\n"
            f"static msl::Binding const msl_bindings_{number}[] = "
            f"{{ {_bindings(entry)} }};"
        )
        if cuda:
            body = (
                'extern "C" __global__ void '
                f"__launch_bounds__({entry.max_threads or 1024}) "
                f"{cuda_symbol(number, entry)}(msl::Launch const launch) {{ "
                "msl::Ids const ids = msl::enter(launch); (void)ids; "
                f"void* const* buffers = launch.buffers; (void)buffers; {call} }}"
            )
        spaces = entry.namespace.split("::") if entry.namespace else []
        opening = "".join(f"namespace {name} {{ " for name in spaces)
        out.append(opening + body + " }" * len(spaces))
    if not cuda:
        rows = [
            f'{{"{entry.name}", {_inside(entry)}msl_entry_{number}, '
            f"{_inside(entry)}msl_bindings_{number}, {entry.buffers}}},"
            for number, entry in enumerate(entries)
        ]
        visible = '__attribute__((visibility("default")))'
        out.append(f'extern "C" {visible} const msl::Kernel msl_kernels[] = {{')
        out += [*rows, "{nullptr, nullptr, nullptr, 0}};"]
    return "\n".join([*out, "}\n"])


def cuda_symbol(number: int, entry: Entry) -> str:
    """The name of a kernel's entry point; the host's name may be no identifier."""
    return f"msl_entry_{number}_" + re.sub(r"\W", "_", entry.name)


def _inside(entry: Entry) -> str:
    return f"{entry.namespace}::" if entry.namespace else ""


def _call(entry: Entry) -> str:
    arguments = []
    for place, parameter in enumerate(entry.parameters):
        type_ = f"msl::ParameterOf<F, {place}>"
        if parameter.buffer is not None:
            arguments.append(f"msl::bind<{type_}>(buffers[{parameter.buffer}])")
        elif parameter.attribute in VECTORS:
            arguments.append(f"msl::position<{type_}>({VECTORS[parameter.attribute]})")
        else:
            arguments.append(f"({type_})({SCALARS[parameter.attribute]})")
    function = entry.function
    return f"using F = decltype(&{function}); {function}({', '.join(arguments)});"


def _bindings(entry: Entry) -> str:
    rows = []
    for slot in range(entry.buffers):
        row = "{0, 0}"
        for place, parameter in enumerate(entry.parameters):
            if parameter.buffer == slot:
                type_ = f"msl::ParameterOf<decltype(&{entry.function}), {place}>"
                row = f"msl::binding_of<{type_}>()"
        rows.append(row)
    return ", ".join(rows or ["{0, 0}"])
