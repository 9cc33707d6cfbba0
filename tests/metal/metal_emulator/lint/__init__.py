"""What Apple's Metal compiler refuses, and the translation to C++ would let pass.

Two layers look for it:

- rules on tokens (`rules.py`, `kernels.py`): pointers and references without
  an address space, words that Metal does not have, recursion, lambdas before Metal 3.2,
  variables in places that their address space forbids, kernels' signatures, and what
  torch.mps.compile_shader cannot serve (function constants, threadgroup arguments);
- clang (`spaces.py`), over a translation that keeps address spaces: mismatches
  between them, casts from one to another, and C++ newer than C++14.

What is wrong is said with confidence or not at all. Not checked, since clang has no way
to say it of plain C++:

- the address space of a method's `this`, and with it the overloads of methods that only
  this tells apart;
- copies of a user's structures from one address space to another, which Metal allows
  and clang refuses;
- pointers in parts of an expression that this translation cannot give a type;
- templates that no kernel instantiates, as far as types depend on their parameters;
- recursion through overloads, class templates, and templates with `if constexpr`, where
  tokens do not tell which function is meant;
- the second address space of a pointer to a pointer: MLX's kernels leave it out.

Allowed though newer than C++14, since Apple's compiler only warns of them and kernels
that MLX ships use them: `if constexpr`, inline variables, static_assert without a text.
Types, names and the rest of C++ are the real compilation's to check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..compilers import preprocess
from . import messages, spaces
from .rules import Options, Problem, problems

__all__ = ["Problem", "lint"]

NAME = "program_source"


def lint(
    source: str,
    include_dirs: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
    *,
    language_version: int = 310,
    compiler: bool = True,
    function_constants: bool = False,
    threadgroup_arguments: bool = False,
) -> list[Problem]:
    """Look for what Apple's compiler, or torch's host, would refuse in a Metal source.

    Problems are reported in the source itself and in headers found through
    `include_dirs`, but not in torch's own headers, unless these are found there too.

    Args:
        source: as for `compile_shader`.
        include_dirs: searched for headers.
        defines: macros, such as "NAME=1".
        language_version: Metal's; 310 is macOS 14's.
        compiler: whether clang is asked about address spaces and newer C++.
        function_constants: allow them, for a host that can set them.
        threadgroup_arguments: allow them, for a host that can give them a size.

    Returns:
        The problems by file and line; none for a clean source.

    Raises:
        SyntaxError: the source cannot be preprocessed, or its brackets do not match.
        RuntimeError: there is no clang; the message says how to get one.
    """
    found = {
        Problem(NAME, number, f"torch hands sources over as ASCII: {line.strip()!r}")
        for number, line in enumerate(source.split("\n"), 1)
        if not line.isascii()
    }
    preprocessed = preprocess(
        source,
        include_dirs=[*include_dirs, Path(torch.__file__).parent / "include"],
        defines=defines,
        language_version=language_version,
        name=NAME,
    )
    reported = _reported(include_dirs)
    options = Options(language_version, function_constants, threadgroup_arguments)
    found |= {p for p in problems(preprocessed, options) if reported(p.file)}
    if compiler:
        found |= _compiler_problems(preprocessed, reported)
    return sorted(found)


def _reported(include_dirs: Sequence[str | Path]) -> Callable[[str], bool]:
    folders = [Path(folder).resolve() for folder in include_dirs]

    def reported(file: str) -> bool:
        if file == NAME:
            return True
        path = Path(file).resolve()
        return any(path.is_relative_to(folder) for folder in folders)

    return reported


def _compiler_problems(
    preprocessed: str, reported: Callable[[str], bool]
) -> set[Problem]:
    found = set()
    for diagnostic in spaces.check(preprocessed):
        message = messages.meaning(diagnostic)
        if message is None:
            continue
        # A message inside a header belongs to the line that led there.
        for place in (diagnostic, *diagnostic.notes):
            if place is not diagnostic and "requested here" not in place.text:
                continue
            if reported(place.file):
                found.add(Problem(place.file, place.line, message))
                break
    return found
