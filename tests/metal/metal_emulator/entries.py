"""Kernels that the host can launch: what fills their parameters, and how C++ calls them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from .declarations import argument_of, integer, name_of_parameter
from .tokens import Token, matching, split, text_of

MAX_BUFFER = 30
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


def parameters_of(head: Sequence[Token], opening: int) -> tuple[Parameter, ...]:
    """What fills each parameter; buffers without a number are numbered in order."""
    parts = split(head[opening + 1 : matching(head, opening)])
    if len(parts) == 1 and text_of(parts[0]) == "void":
        return ()
    found = [_parameter(part) for part in parts]
    where = f"{head[opening].file}:{head[opening].line}"
    taken: dict[int, str] = {}
    for part, parameter in zip(parts, found, strict=True):
        if parameter.buffer is None:
            continue
        name, index = _name(part), parameter.buffer
        if index > MAX_BUFFER:
            raise SyntaxError(
                f"{where}: '{name}' has [[buffer({index})]]; Metal has buffers 0 to "
                f"{MAX_BUFFER}"
            )
        if index in taken:
            raise SyntaxError(
                f"{where}: '{name}' has [[buffer({index})]], as '{taken[index]}' has"
            )
        taken[index] = name
    return _numbered(parts, found, where)


def _parameter(part: Sequence[Token]) -> Parameter:
    """What fills one parameter; a buffer without a number has none yet."""
    attributes = [t for t in part if t.kind == "attribute"]
    names = [name.strip() for t in attributes for name in t.text.split(",")]
    numbers = [argument_of(t.text, "buffer") for t in attributes]
    index = next((text for text in numbers if text is not None), None)
    value = next((n for n in names if n in VECTORS or n in SCALARS), None)
    if index is not None and (number := integer(index)) is not None and number >= 0:
        return Parameter("buffer", number)
    if index is None and value is not None:
        return Parameter(value)
    points = any(t.text in ("*", "&", "[") for t in part)
    if index is None and points and set(names) <= {"maybe_unused"}:
        return Parameter("buffer")
    where = part[0]
    raise SyntaxError(
        f"{where.file}:{where.line}: the kernel's parameter '{text_of(part)}' cannot be "
        "filled by torch.mps.compile_shader (a pointer or reference, with or without a "
        f"[[buffer(number)]], or one of {', '.join(sorted([*VECTORS, *SCALARS]))}, can)"
    )


def _numbered(
    parts: Sequence[Sequence[Token]], found: Sequence[Parameter], where: str
) -> tuple[Parameter, ...]:
    """Numbers for the buffers that have none.

    What Apple's compiler does where others have numbers could not be tried: either it
    goes on from the buffer before, or it takes the first number that is free. MLX's
    kernels mix the two so that both mean the same; what they tell apart is refused.
    """
    taken = {p.buffer for p in found if p.buffer is not None}
    out: list[Parameter] = []
    following = 0
    for part, parameter in zip(parts, found, strict=True):
        if parameter.attribute == "buffer" and parameter.buffer is None:
            free = next(i for i in range(len(taken) + 1) if i not in taken)
            if free != following:
                raise SyntaxError(
                    f"{where}: '{_name(part)}' has no [[buffer(...)]], others have: it "
                    f"might be buffer {free} or {following}, say which"
                )
            if free > MAX_BUFFER:
                raise SyntaxError(
                    f"{where}: '{_name(part)}' is buffer {free}; Metal has buffers 0 to "
                    f"{MAX_BUFFER}"
                )
            parameter = Parameter("buffer", free)
            taken.add(free)
        if parameter.buffer is not None:
            following = parameter.buffer + 1
        out.append(parameter)
    return tuple(out)


def _name(part: Sequence[Token]) -> str:
    place = name_of_parameter([t for t in part if t.kind != "attribute"])
    plain = [t.text for t in part if t.kind != "attribute"]
    return " ".join(plain) if place is None else plain[place]


def entry_points(entries: Sequence[Entry], *, cuda: bool = False) -> str:
    """C++ text of entry points for these kernels, to stand after the translation."""
    out = ['#line 1 "entry points"\nnamespace msl {']
    for number, entry in enumerate(entries):
        call = _call(entry)
        body = (
            f"static void msl_entry_{number}(void* const* buffers, host::Ids const& ids) "
            f"{{ (void)buffers; (void)ids; {call} }}\n"
            f"static host::Binding const msl_bindings_{number}[] = "
            f"{{ {_bindings(entry)} }};"
        )
        if cuda:
            body = (
                'extern "C" __global__ void '
                f"__launch_bounds__({entry.max_threads or 1024}) "
                f"{cuda_symbol(number, entry)}(host::Launch const launch) {{ "
                "host::Ids const ids = host::enter(launch); (void)ids; "
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
        out.append(f'extern "C" {visible} const host::Kernel msl_kernels[] = {{')
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
        type_ = f"host::ParameterOf<F, {place}>"
        if parameter.buffer is not None:
            arguments.append(f"host::bind<{type_}>(buffers[{parameter.buffer}])")
        elif parameter.attribute in VECTORS:
            arguments.append(f"host::position<{type_}>({VECTORS[parameter.attribute]})")
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
                type_ = f"host::ParameterOf<decltype(&{entry.function}), {place}>"
                row = f"host::binding_of<{type_}>()"
        rows.append(row)
    return ", ".join(rows or ["{0, 0}"])
