"""The host's C++ compiler: which there is, what it knows of this CPU, and what it made.

Sources in `shaders/cpu` are compiled for the CPU at hand when a format is first needed, in
about a second, into a library that needs nothing else: no headers of torch or Python, no
OpenMP. It is kept by content (sources, compiler, flags and the CPU's features) in
``~/.cache/affine_tensor`` (or AFFINE_TENSOR_CACHE), so that it is made once.

AFFINE_TENSOR_CXX names a compiler, AFFINE_TENSOR_CPU_ARCH another architecture than this
CPU's, such as x86-64-v3.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import KernelError, cache_folder, shaders

# With -ffp-contract=off what is not written as one operation is not made one: results
# are the same whichever compiler there is.
_FLAGS = (
    "-std=c++17",
    "-O2",
    # Loops are unrolled by hand, and ordered: these passes only take time to compile, or
    # make products of many rows slower.
    "-fno-tree-vectorize",
    "-fno-schedule-insns2",
    "-fno-tree-vrp",
    "-fno-gcse",
    "-fno-ipa-cp",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-w",
    "-fPIC",
    "-shared",
)
_OF_C = re.compile(r"(.*-)?(cc|gcc|clang)(-[\d.]+)?")
_SECONDS = 300  # after which a compiler counts as hanging


@dataclass(frozen=True)
class Compiler:
    """A command, the flags that choose the CPU, and what it defines for them."""

    command: tuple[str, ...]
    target: tuple[str, ...]
    version: str
    macros: frozenset[str]

    @property
    def vectors(self) -> str | None:
        """The instruction set that the kernels use, None where they know none."""
        has = self.macros.__contains__
        if all(map(has, ("__AVX512F__", "__AVX512BW__", "__AVX512VL__"))):
            return "AVX-512"
        if all(map(has, ("__AVX2__", "__FMA__", "__F16C__"))):
            return "AVX2"
        return "NEON" if has("__aarch64__") else None

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether the CPU has dot products of bfloat16."""
        names = {
            "AVX-512": "__AVX512BF16__",
            "NEON": "__ARM_FEATURE_BF16_VECTOR_ARITHMETIC",
        }
        return names.get(self.vectors or "") in self.macros


def find() -> Compiler:
    """The first compiler that works. Raises KernelError, saying what to install."""
    found = _first()
    if isinstance(found, str):
        raise KernelError(found)
    return found


@cache
def _first() -> Compiler | str:
    """The compiler, or why there is none: looked for once."""
    reasons = []
    for command in _commands():
        try:
            return _asked(command)
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            reasons.append(f"{' '.join(command)}: {output.strip().splitlines()[-1]}")
    return (
        "there is no C++ compiler that works here"
        + "".join(f"; {reason}" for reason in reasons)
        + ". Install one (apt install g++, xcode-select --install, or pip install "
        "ziglang), or name it in AFFINE_TENSOR_CXX"
    )


def _commands() -> list[tuple[str, ...]]:
    named = os.environ.get("AFFINE_TENSOR_CXX")
    if named:
        return [tuple(named.split())]
    # A driver of C in CXX (PEFT's BOFT sets gcc) would leave out the library of C++.
    own = os.environ.get("CXX", "")
    own = "" if _OF_C.fullmatch(Path(own).name) else own
    names = (own, "c++", "g++", "clang++")
    found: list[tuple[str, ...]] = [
        (path,) for name in names if name and (path := shutil.which(name))
    ]
    if importlib.util.find_spec("ziglang"):
        found.append((sys.executable, "-m", "ziglang", "c++"))
    return list(dict.fromkeys(found))


def _asked(command: tuple[str, ...]) -> Compiler:
    """What a compiler says of itself and of this CPU."""
    chosen = os.environ.get("AFFINE_TENSOR_CPU_ARCH", "native")
    if command[-2:] == ("ziglang", "c++"):
        target = "-mcpu=" + chosen.replace("x86-64-v", "x86_64_v")
    elif platform.machine().lower() in ("x86_64", "amd64"):
        target = f"-march={chosen}"
    else:
        target = f"-mcpu={chosen}"
    text = _run([*command, target, "-dM", "-E", "-x", "c++", os.devnull])
    defined = (line.split(maxsplit=2) for line in text.splitlines())
    macros = {words[1]: words[-1] for words in defined if len(words) > 1}
    # All that the choice of a CPU changes is among them.
    version = hashlib.sha256("\n".join(sorted(text.splitlines())).encode()).hexdigest()
    return Compiler(command, (target,), version, frozenset(macros))


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_SECONDS
    ).stdout


@cache
def _sources() -> str:
    """All of shaders/cpu, as one text that stands for them."""
    files = sorted((shaders() / "cpu").glob("*.[hc]*"))
    return "\n".join(f"{file.name}\n{file.read_text('utf-8')}" for file in files)


def library(source: str, **defines: int) -> ctypes.CDLL:
    """A source of shaders/cpu, compiled with these definitions, or from the cache.

    Raises KernelError where there is no compiler or it fails.
    """
    compiler = find()
    flags = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    command = [*compiler.command, *compiler.target, *_FLAGS, *flags]
    parts = (_sources(), compiler.version, *command)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    stem = "-".join([Path(source).stem, *map(str, defines.values()), key])
    name = f"{stem}{'.dylib' if sys.platform == 'darwin' else '.so'}"
    whole = [*command, str(shaders() / "cpu" / source)]
    try:
        return _kept(whole, _folder() / name)
    except (OSError, KernelError):  # a full disk, say
        return _kept(whole, _scratch() / name)


def _kept(command: list[str], file: Path) -> ctypes.CDLL:
    if not file.exists():
        _compile(command, file)
    try:
        return ctypes.CDLL(str(file))
    except OSError:  # cut short
        file.unlink(missing_ok=True)
        _compile(command, file)
        return ctypes.CDLL(str(file))


def _compile(command: list[str], file: Path) -> None:
    """Into another file first: whoever looks sees all of it or nothing."""
    handle, name = tempfile.mkstemp(suffix=file.suffix, dir=file.parent)
    os.close(handle)
    try:
        _run([*command, "-o", name])
        os.replace(name, file)
    except subprocess.CalledProcessError as error:
        raise KernelError(
            f"the compiler does not take {command[-1]}:\n{error.stderr.strip()[-2000:]}"
        ) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{command[0]} fails: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


@cache
def _folder() -> Path:
    """Where libraries are kept: a folder of one's own, of this process where none is."""
    folder = cache_folder() / "cpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return _scratch()


@cache
def _scratch() -> Path:
    """A folder of this process, which goes with it."""
    folder = tempfile.mkdtemp(prefix="affine_tensor_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
