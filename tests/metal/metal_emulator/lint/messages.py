"""What clang's messages mean to the author of a Metal kernel, and which of them count.

Only those on address spaces do, and on C++ newer than Metal's: all else is said by the
real compilation, or comes from the lint's translation being an approximate one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

# Newer than C++14, but Apple's compiler only warns of it: kernels that MLX ships use it.
ACCEPTED = ("constexpr if ", "'static_assert' with no message", "inline variables ")


@dataclasses.dataclass
class Diagnostic:
    """One message of clang and the notes below it."""

    file: str
    line: int
    kind: str
    text: str
    notes: list[Diagnostic] = dataclasses.field(default_factory=list)


LINE = re.compile(r"(?P<file>.*?):(?P<line>\d+):\d+: (?P<kind>[a-z ]+): (?P<text>.*)")
NAMES = {"0": "thread", "1": "device", "2": "constant", "3": "threadgroup"}
SPACE = re.compile(r"address space '(\d)'")
ATTRIBUTE = re.compile(r"__attribute__\(\(address_space\((\d)\)\)\)")
PASSES = re.compile(
    r"cannot (?P<what>pass pointer to|bind reference in) (?P<found>.*?) "
    r"(?:as a pointer to|to object in) (?P<wanted>.*?) in (?P<place>\w+) argument"
)
DEDUCED = re.compile(
    r"deduced type '(?P<wanted>[^']*)'(?: \(aka .*?\))? of (?P<place>\w+) parameter does "
    r"not match adjusted type '(?P<found>[^']*)'"
)


def parse(messages: str) -> Iterator[Diagnostic]:
    """clang's messages, each with its notes."""
    current: Diagnostic | None = None
    for row in messages.splitlines():
        match = LINE.match(row)
        if match is None:
            continue
        one = Diagnostic(
            match["file"], int(match["line"]), match["kind"], match["text"]
        )
        if one.kind != "note":
            if current:
                yield current
            current = one
        elif current:
            current.notes.append(one)
    if current:
        yield current


def meaning(diagnostic: Diagnostic) -> str | None:
    """What a message means to the author of a kernel; None if it does not count."""
    text = diagnostic.text
    if diagnostic.kind == "warning":
        return _newer(text)
    if "fatal" in diagnostic.kind:
        return _plain(text)
    if "object parameter of type" in text:
        return None  # a method's `this`, which this translation leaves to the thread
    if re.match(
        r"no matching (member )?function for call to '(simdgroup|atomic)_", text
    ):
        return _plain(text) + (_why(diagnostic) or _conflict(diagnostic))
    if "msl_cast" in text:
        return "casts a pointer into another address space"
    if re.match(r"no (matching|viable)|call to|invalid operands", text):
        why = _why(diagnostic)
        return _plain(text) + why if why else None
    if "address space" in text:
        return _plain(text)
    types = [t for t in re.findall(r"'([^']*)'", text) if t.endswith(("*", "&", "]"))]
    return _plain(text) if len({tuple(_spaces(t)) for t in types}) > 1 else None


def _newer(text: str) -> str | None:
    text = re.sub(r" \[-W.*\]$", "", text)
    if text.startswith((*ACCEPTED, "use of function template name")):
        return None  # the latter follows a name that this translation does not know
    text = text.split("; ")[0]
    what = re.sub(r" (is|are) (incompatible with C\+\+|a C\+\+).*", "", text)
    return f"{what}: newer than C++14, which Metal is before version 4"


def _spaces(type_: str) -> list[str]:
    return re.findall(
        r"\b(device|constant|threadgroup)\b", ATTRIBUTE.sub(_named, type_)
    )


def _named(match: re.Match[str]) -> str:
    return NAMES.get(match[1], match[0])


def _plain(text: str) -> str:
    text = SPACE.sub(lambda m: f"address space `{NAMES.get(m[1], m[1])}`", text)
    text = text.replace("generic address space", "address space `thread`")
    for native, name in (("_Float16", "half"), ("__bf16", "bfloat")):
        text = text.replace(f"'{name}' (aka '{native}')", f"'{name}'").replace(
            native, name
        )
    return ATTRIBUTE.sub(_named, text)


def _why(diagnostic: Diagnostic) -> str:
    """The address spaces that keep a candidate from being called, in plain words."""
    reasons = []
    for note in diagnostic.notes:
        if "(the implicit " in note.text or "'this' object" in note.text:
            continue
        if "no known conversion" in note.text:
            return ""  # a copy, or types that the real compilation will judge
        if match := PASSES.search(note.text):
            # "cannot bind reference in" is followed by the space of what was passed.
            found, wanted = _space_in(match["found"]), _space_in(match["wanted"])
            kind = "pointer" if "pointer" in match["what"] else "reference"
        elif match := DEDUCED.search(note.text):
            found, wanted = (_first_space(match[name]) for name in ("found", "wanted"))
            kind = "pointer" if match["wanted"].endswith("*") else "reference"
        else:
            continue
        if found != wanted:
            what = "pointer" if kind == "pointer" else "value"
            reasons.append(
                f"passes a `{found}` {what} where a `{wanted}` {kind} is asked for "
                f"({match['place']} argument)"
            )
    return f": {'; or '.join(dict.fromkeys(reasons))}" if reasons else ""


def _conflict(diagnostic: Diagnostic) -> str:
    """Types of two arguments that should be one, if that is why no candidate fits."""
    for note in diagnostic.notes:
        if match := re.search(r"conflicting types for parameter .*", note.text):
            return f": {_plain(match[0])}"
    return ""


def _space_in(text: str) -> str:
    match = re.search(r"'(\d)'", text)
    return NAMES.get(match[1], text) if match else "thread"


def _first_space(type_: str) -> str:
    return next(iter(_spaces(type_)), "thread")
