"""Address spaces, checked by clang: Metal to C++ that keeps them, and what clang says.

Address spaces stay in the text as macros for clang's attribute, over native types
(`include/lint_types.hpp`); `messages.py` says which of clang's messages count.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from .. import compilers
from ..declarations import (
    ADDRESS_SPACES,
    parameter_list,
)
from ..entries import Parameter
from ..rewrite import is_scope_name, literal
from ..tokens import Token, matching, matching_angle, render, split, tokenize
from ..translate import Seen, Translator
from .messages import Diagnostic, parse

OLDEST_CLANG = 17
VERSION = re.compile(r"clang version (\d+)")
FLAGS = (
    "-fsyntax-only",
    "-x",
    "c++",
    "-std=c++17",
    "-nostdinc",
    "-fsigned-char",
    "-fno-exceptions",
    "-ferror-limit=0",
    "-ftemplate-backtrace-limit=0",
    "-fno-caret-diagnostics",
    "-fno-color-diagnostics",
    "-fdiagnostics-show-option",
)
# Metal before version 4 is C++14. clang says what of C++17 is used.
NEWER = ("-Wno-everything", "-Wpre-c++17-compat", "-Wc++20-extensions")
HEADER = '#include "lint_functions.hpp"\n'
SCALARS = "bool|u?char|u?short|u?int|u?long|half|bfloat|float"
VECTOR = re.compile(rf"(packed_)?({SCALARS})[234]")
CASTS_FOLLOW = frozenset(("return", "case", "else"))


@functools.cache
def find_clang() -> tuple[str, ...] | None:
    """The command of a clang that knows enough of address spaces, if there is one."""
    named = os.environ.get("METAL_EMULATOR_CXX", "clang++").split()
    versioned = [[f"clang++-{number}"] for number in range(22, OLDEST_CLANG - 1, -1)]
    for command in (named, ["clang++"], *versioned):
        if shutil.which(command[0]) is None:
            continue
        result = subprocess.run([*command, "--version"], capture_output=True, text=True)
        version = VERSION.search(result.stdout)
        if version and "ziglang" not in command and int(version[1]) >= OLDEST_CLANG:
            return tuple(command)
    return zig_clang()


def zig_clang() -> tuple[str, ...] | None:
    """The clang in the `ziglang` package; `zig c++` itself has no -fsyntax-only."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return (sys.executable, "-m", "ziglang", "clang")


# ------------------------------------------------------------------------ translation
class _Spaces(Translator):
    """Finds the kernels as the real translation does, and keeps the address spaces."""

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
        body = self.scope(tokens[brace + 1 : end], path, inside_class=True)
        return [*tokens[start : brace + 1], *body, *tokens[end : stop + 1]]

    def ordinary(
        self,
        original: list[Token],
        head: list[Token],
        body: list[Token] | None,
        seen: Seen,
    ) -> list[Token]:
        plain = [t for t in head if t.kind != "attribute"]
        words = {t.text for t in plain}
        if body is None and "constant" in words and not words & {"const", "constexpr"}:
            plain = _with_const(plain)
        return [*_decayed(plain), *(body or [])]

    def parameters(self, head: list[Token], opening: int) -> tuple[Parameter, ...]:
        """None: nothing is launched here, and `kernels.py` says what is wrong."""
        return ()


def _with_const(declaration: list[Token]) -> list[Token]:
    """`constant T x = ...;` with the const that `constant` implies for a variable."""
    first = declaration[0]
    if first.text in ("using", "typedef", "template", "friend") or any(
        t.text in ("*", "&", "(") for t in declaration
    ):
        return declaration
    return [first.like("const"), *declaration]


def _decayed(head: list[Token]) -> list[Token]:
    """`f(constant int sizes[3])` with a pointer, as clang has no such parameters."""
    try:
        opening = parameter_list(head)
    except SyntaxError:
        return head
    closing = matching(head, opening)
    parts: list[Token] = []
    for part in split(head[opening + 1 : closing]):
        texts = [t.text for t in part]
        if parts:
            parts.append(head[opening].like(",", "mark"))
        if "[" in texts and ADDRESS_SPACES & set(texts) and not {"*", "&"} & set(texts):
            name = texts.index("[") - 1
            end = matching(part, name + 1) + 1
            part = [*part[:name], part[0].like("*", "mark"), part[name], *part[end:]]
        parts += part
    return [*head[: opening + 1], *parts, *head[closing:]]


def translate(preprocessed: str) -> str:
    """The C++ text in which every kernel is instantiated and no address space lost."""
    translator = _Spaces(cuda=False)
    body = translator.scope(tokenize(preprocessed), "", inside_class=False)
    out = [HEADER, "namespace msl {\n", render(_rewrite(body)), "}\n"]
    out.append('#line 1 "instantiations"\n')
    for number, entry in enumerate(translator.entries()):
        spaces = "".join(f"namespace {n} {{ " for n in entry.namespace.split("::") if n)
        end = " }" * spaces.count("{")
        function = f"auto const msl_used_{number} = &{entry.function};"
        out.append(f"namespace msl {{ {spaces}{function}{end} }}\n")
    return "".join(out)


def _rewrite(tokens: Sequence[Token]) -> list[Token]:
    """What stands anywhere: literals, casts, vectors, threadgroup variables."""
    tokens = [t for t in tokens if t.kind != "attribute"]
    out: list[Token] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        before = tokens[position - 1].text if position else ""
        if token.kind == "number":
            out.append(literal(token))
        elif token.text == "::" and not is_scope_name(out):
            out += [token, token.like("msl"), token]
        elif token.text == "threadgroup" and before in ("{", "}", ";"):
            found, position = _variable(tokens, position)
            out += found
            continue
        elif token.text == "coherent" and tokens[position + 1].text == "(":
            position = matching(tokens, position + 1)
        elif token.text in ADDRESS_SPACES - {"device", "constant", "threadgroup"}:
            pass
        elif end := _end_of_cast(tokens, position):
            stop = _end_of_operand(tokens, end + 1)
            type_ = tokens[position + 1 : end]
            out += [token.like("msl_cast"), token.like("<", "mark"), *_rewrite(type_)]
            out += [token.like(">", "mark"), token.like("(", "mark")]
            out += [*_rewrite(tokens[end + 1 : stop]), token.like(")", "mark")]
            position = stop
            continue
        elif end := _end_of_vector(tokens, position):
            out += [token.like("msl_make"), token.like("<", "mark")]
            out += [*tokens[position:end], token.like(">", "mark")]
            position = end
            continue
        else:
            out.append(token)
        position += 1
    return out


def _variable(tokens: Sequence[Token], start: int) -> tuple[list[Token], int]:
    """`threadgroup T a[n], b;` as references into that space, and where it ends.

    clang has no local variables in an address space.
    """
    end = start
    while tokens[end].text != ";":
        end = matching(tokens, end) if tokens[end].text in ("(", "{", "[") else end
        end += 1
    parts = split(tokens[start + 1 : end])
    ends = (i for i, t in enumerate(parts[0]) if t.text in ("[", "="))
    stop = next(ends, len(parts[0]))
    if any(t.text in ("*", "&") for t in parts[0][:stop]):
        return [tokens[start]], start + 1
    out: list[Token] = []
    for part in [parts[0][stop - 1 :], *parts[1:]]:
        name = part[0]
        sizes = part[1:]
        if "=" in [t.text for t in sizes]:
            sizes = sizes[: [t.text for t in sizes].index("=")]
        alias = f"msl_type_of_{name.text}"
        out += [name.like(f"using {alias} ="), *_rewrite(parts[0][: stop - 1])]
        out += [*_rewrite(sizes), name.like(";", "mark")]
        pointer = f"(threadgroup {alias}*)0"
        out.append(name.like(f"threadgroup {alias}& {name.text} = *{pointer};", "mark"))
    return out, end + 1


def _end_of_cast(tokens: Sequence[Token], start: int) -> int | None:
    """The `)` of a cast to a pointer with an address space, if one starts here."""
    if tokens[start].text != "(" or start == 0:
        return None
    before = tokens[start - 1]
    if before.kind in ("word", "number") and before.text not in CASTS_FOLLOW:
        return None
    if before.text in (")", "]", ">", "}"):
        return None
    end = matching(tokens, start)
    inner = tokens[start + 1 : end]
    spaces = any(t.text in ADDRESS_SPACES for t in inner)
    if not spaces or inner[-1].text != "*" or end + 1 >= len(tokens):
        return None
    following = tokens[end + 1]
    is_operand = following.kind in ("word", "number") or following.text in "(&*"
    return end if is_operand else None


def _end_of_operand(tokens: Sequence[Token], start: int) -> int:
    """Where the operand of a cast ends: prefix operators, a name, what follows it."""
    position = start
    while tokens[position].kind == "mark" and tokens[position].text in "&*-~!::":
        position += 1
    if end := _end_of_cast(tokens, position):
        return _end_of_operand(tokens, end + 1)
    if tokens[position].text == "(":
        position = matching(tokens, position)
    position += 1
    while position < len(tokens):
        text = tokens[position].text
        if text in ("(", "["):
            position = matching(tokens, position) + 1
        elif text in (".", "->", "::"):
            position += 2
        elif text == "<" and (end := _end_of_arguments(tokens, position)):
            position = end + 1
        elif text in ("++", "--"):
            position += 1
        else:
            break
    return position


def _end_of_arguments(tokens: Sequence[Token], start: int) -> int | None:
    """The `>` of template arguments that a call or a scope follows."""
    try:
        end = matching_angle(tokens, start)
    except SyntaxError:
        return None
    return end if tokens[end + 1].text in ("(", "::") else None


def _end_of_vector(tokens: Sequence[Token], start: int) -> int | None:
    """Where the type of `float4(a, b)` or `vec<T, 4>(a)` ends, if one starts here."""
    token, end = tokens[start], start + 1
    if token.kind != "word" or end >= len(tokens):
        return None
    if token.text in ("vec", "packed_vec") and tokens[end].text == "<":
        end = matching_angle(tokens, end) + 1
    elif not VECTOR.fullmatch(token.text):
        return None
    if end >= len(tokens) or tokens[end].text != "(":
        return None
    if start and tokens[start - 1].text == "operator":
        return None
    return end


# ------------------------------------------------------------------------------ check
def check(preprocessed: str) -> list[Diagnostic]:
    """What clang says about address spaces and newer C++ in this source.

    Raises:
        RuntimeError: no clang was found, or it failed without a message.
    """
    command = find_clang()
    if command is None:
        raise RuntimeError(
            f"the lint needs clang {OLDEST_CLANG} or newer: `pip install ziglang` brings "
            "one; compiler=False does without it, and without address spaces"
        )
    arguments = [*FLAGS, *NEWER, "-isystem", str(compilers.INCLUDE), "-"]
    result = subprocess.run(
        [*command, *arguments],
        input=translate(preprocessed),
        capture_output=True,
        text=True,
    )
    found = list(parse(result.stderr))
    if result.returncode and not found:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return found
