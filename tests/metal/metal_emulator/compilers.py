"""Finding a C++ compiler, and building with it, cached by content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from elftools.dwarf.lineprogram import LineProgram
from elftools.elf.elffile import ELFFile

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"
STUBS = INCLUDE / "stubs"
RUNTIME = HERE / "runtime"

NATIVE = {
    "x86_64": ["-mf16c", "-mavx2", "-mfma"],
    "AMD64": ["-mf16c", "-mavx2", "-mfma"],
}.get(platform.machine(), [])
LANGUAGE = [
    "-std=c++17",
    "-fPIC",
    "-w",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-fsigned-char",
    "-fvisibility=hidden",
    *NATIVE,
]
KERNEL = [
    "-O1",
    # Line numbers, for the message of a fault.
    "-g1",
    "-gdwarf-4",
    # Every operation rounds; Apple's compiler may contract, tests allow for that.
    "-ffp-contract=off",
    "-fno-math-errno",
    # Kernels read packed weights through pointers of several types.
    "-fno-strict-aliasing",
    # A variable that was never set holds nonsense in every run.
    "-ftrivial-auto-var-init=pattern",
    # An endless loop is one, and a large frame does not jump over a guard page.
    "-fno-finite-loops",
    *(["-fstack-clash-protection"] if sys.platform == "linux" else []),
    "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero",
    "-fsanitize=signed-integer-overflow,float-cast-overflow,return",
]
TRACED = ["-fsanitize=thread", "-DMSL_TRACE"]
DAYS_KEPT = 30  # an unused build
INSTALL = (
    "no C++ compiler that serves was found: install clang >= 14 or g++ >= 12, or `pip "
    "install ziglang` (clang in a wheel), or name one in METAL_EMULATOR_CXX"
)


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, its kind and its version text."""

    command: tuple[str, ...]
    kind: str  # "clang", "gcc" or "zig"
    version: str

    def run(self, arguments: Sequence[str], text: str | None = None) -> str:
        """Its standard output; a non-zero exit raises SyntaxError with its messages."""
        result = subprocess.run(
            [*self.command, *arguments], input=text, capture_output=True, text=True
        )
        if result.returncode:
            raise SyntaxError(_brief(result.stderr or result.stdout))
        return result.stdout

    @property
    def traced(self) -> list[str]:
        """The flags that put a call before every load and store."""
        if self.kind == "gcc":
            return [*TRACED, "--param=tsan-instrument-func-entry-exit=0"]
        skip = [
            # A load that a store follows is an access like any other.
            "-tsan-instrument-read-before-write=1",
            "-tsan-instrument-func-entry-exit=0",
        ]
        return [*TRACED, *(word for option in skip for word in ("-mllvm", option))]

    @property
    def flags(self) -> list[str]:
        return [] if self.kind == "gcc" else ["-fno-sanitize-trap=all"]

    @property
    def link(self) -> list[str]:
        """Shared objects without a C++ library; kernels find the runtime by its path."""
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        library = [] if self.kind == "gcc" else ["-nostdlib++"]
        if self.kind == "zig":
            # Else it adds checks' functions of its own, which end the process.
            library.append("-fno-sanitize=undefined")
        return ["-shared", *undefined, *library]


def _brief(messages: str, limit: int = 6000) -> str:
    return messages if len(messages) <= limit else messages[:limit] + "\n..."


def _probe(command: Sequence[str]) -> Compiler | None:
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run([*command, "--version"], capture_output=True, text=True)
    if result.returncode:
        return None
    version = result.stdout.splitlines()[0]
    kind = "zig" if "ziglang" in command else "clang" if "clang" in version else "gcc"
    found = Compiler(tuple(command), kind, version)
    flags = [*LANGUAGE, *KERNEL, *found.flags, *found.traced]
    # An old compiler does not know every flag: the next one may. (zig takes
    # -fsyntax-only for a program to link, and builds a whole C++ library for it.)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "empty.cpp")
        source.write_text("int f();\n")
        try:
            found.run([*flags, "-c", str(source), "-o", f"{scratch}/empty.o"])
        except SyntaxError:
            return None
    return found


@functools.cache
def zig() -> Compiler | None:
    """clang as the `ziglang` package brings it, if that is installed."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return _probe([sys.executable, "-m", "ziglang", "c++"])


@functools.cache
def find_compiler() -> Compiler:
    """METAL_EMULATOR_CXX, else clang++, g++ or ziglang, in this order.

    clang sees more indices beyond arrays than g++; g++ compiles twice as fast.

    Raises:
        RuntimeError: there is none.
    """
    named = os.environ.get("METAL_EMULATOR_CXX")
    for command in [named.split()] if named else [["clang++"], ["g++"]]:
        if found := _probe(command):
            return found
    if not named and (found := zig()):
        return found
    raise RuntimeError(INSTALL if not named else f"'{named}' does not run. {INSTALL}")


@functools.cache
def cache() -> Path:
    """Where builds are kept: METAL_EMULATOR_CACHE, or in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = Path(os.environ.get("METAL_EMULATOR_CACHE", default / "metal_emulator"))
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob("*.so"):
        if time.time() - old.stat().st_mtime > DAYS_KEPT * 86400:
            old.unlink(missing_ok=True)
    return path


@functools.cache
def _own_sources() -> str:
    """All that is compiled into a kernel or beside it, for the cache's keys."""
    files = sorted(p for folder in (INCLUDE, RUNTIME) for p in folder.rglob("*"))
    return "".join(p.read_text() for p in files if p.is_file())


def _key(compiler: Compiler, arguments: Sequence[str], text: str) -> str:
    parts = [*compiler.command, compiler.version, *arguments, _own_sources(), text]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def preprocess(
    source: str,
    *,
    include_dirs: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
    language_version: int = 310,
    name: str = "program_source",
) -> str:
    """Expand includes and macros as Metal's preprocessor would.

    Apple's own headers are empty here but for their macros; `include_dirs` are searched
    for all others. Raises SyntaxError.
    """
    compiler = find_compiler()
    arguments = ["-E", "-x", "c++", "-std=c++17", "-nostdinc", "-w"]
    macros = {
        "__METAL__": 1,
        "__METAL_VERSION__": language_version,
        "__METAL_MACOS__": 1,
        "__HAVE_BFLOAT__": 1,
    }
    arguments += [f"-D{macro}={value}" for macro, value in macros.items()]
    arguments += [f"-D{define}" for define in defines]
    for folder in (STUBS, *include_dirs):
        arguments += ["-I", str(folder)]
    return compiler.run([*arguments, "-"], f'#line 1 "{name}"\n{source}\n')


def build(text: str, *, traced: bool = False) -> Path:
    """Compile one unit of translated kernels to a shared object; raises SyntaxError."""
    compiler = find_compiler()
    flags = [*LANGUAGE, *KERNEL, *compiler.flags, *(compiler.traced if traced else [])]
    flags += ["-nostdinc", "-I", str(INCLUDE)]
    library = runtime()
    link = [*compiler.link, str(library)]
    path = cache() / f"{_key(compiler, [*flags, *link], text)}.so"
    if path.exists():
        path.touch()
        return path
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        source, middle = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.o")
        source.write_text(text)
        compiler.run([*flags, "-c", str(source), "-o", str(middle)])
        compiler.run([str(middle), *link, "-lm", "-o", f"{scratch}/kernels.so"])
        os.replace(f"{scratch}/kernels.so", path)
    return path


@functools.cache
def runtime() -> Path:
    """Compile the runtime that all kernels share."""
    compiler = find_compiler()
    visible = [flag for flag in LANGUAGE if not flag.startswith("-fvisibility")]
    flags = [*visible, "-O2", "-U_FORTIFY_SOURCE", *compiler.link]
    sources = sorted(str(path) for path in RUNTIME.glob("*.cpp"))
    path = cache() / f"runtime-{_key(compiler, flags, '')}.so"
    if path.exists():
        path.touch()
    else:
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            compiler.run([*flags, *sources, "-o", f"{scratch}/runtime.so"])
            os.replace(f"{scratch}/runtime.so", path)
    return path


def locate(offset: int, library: Path) -> str | None:
    """The source's `file:line` of the instruction at `offset` in a unit.

    The last line before it that is not one of our headers, which are inlined. None
    where the debug information is not in the file itself (macOS).
    """
    with library.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        dwarf = ELFFile(file).get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            found, address = None, 0
            for state in (entry.state for entry in program.get_entries()):
                if state is None:
                    continue
                if found and address <= offset < state.address:
                    return found
                name = _file_name(program, state.file)
                address = state.address
                if state.end_sequence:
                    found = None
                elif state.line and Path(name).parent.resolve() != INCLUDE:
                    found = f"{os.path.basename(name)}:{state.line}"
    return None


def _file_name(program: LineProgram, index: int) -> str:
    entry = program["file_entry"][index - 1]
    folder = b""
    if entry.dir_index:
        folder = program["include_directory"][entry.dir_index - 1]
    return os.path.join(folder, entry.name).decode()
