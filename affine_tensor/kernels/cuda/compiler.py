"""NVRTC, called through ctypes: finds it, compiles sources, keeps what it made.

Sources in `shaders/cuda` need no headers of the toolkit, and NVRTC needs no GPU. A source
is compiled for one architecture when a format is first needed, in about a second, and kept
by content (all sources, definitions, architecture, version of NVRTC) in
``~/.cache/affine_tensor`` (or AFFINE_TENSOR_CACHE), so that it is made once.

AFFINE_TENSOR_NVRTC names a library.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from ...tensor import logger
from .. import KernelError, cache_folder, shaders

Defines = tuple[tuple[str, int], ...]
Job = tuple[str, Defines, tuple[int, int]]  # a source, its definitions, a capability

# bfloat16 in the tensor cores, and copies that pass by the registers.
_OLDEST = (8, 0)

_FLAGS = ("--std=c++17", "-default-device")
# Of the sources that owe others the same bits: what is not written as one operation is
# not made one.
_OWN_FLAGS = {"weights.cu": ("--fmad=false",)}

_DIGEST = 32  # bytes of SHA-256 before each file's contents
_SUCCESS = 0
_Text = ctypes.POINTER(ctypes.c_char_p)


@dataclass(frozen=True)
class Nvrtc:
    """A library, its version and the architectures that it knows (90 for sm_90)."""

    path: str
    library: ctypes.CDLL
    version: tuple[int, int]
    architectures: tuple[int, ...]


def find() -> Nvrtc:
    """The first NVRTC that works. Raises KernelError, saying what to install."""
    found = _first()
    if isinstance(found, str):
        raise KernelError(found)
    return found


@cache
def _first() -> Nvrtc | str:
    """The library, or why there is none: looked for once."""
    if torch.version.hip:
        return "there is no NVRTC for AMD's GPUs"
    reasons = []
    for name in dict.fromkeys(_names()):
        try:
            return _opened(name)
        except (OSError, AttributeError, KernelError) as error:
            reasons.append(str(error).splitlines()[0])
    seen = "".join(f"; {reason}" for reason in dict.fromkeys(reasons))
    major = (torch.version.cuda or "13").split(".")[0]
    package = "nvidia-cuda-nvrtc" + ("-cu12" if major == "12" else "")
    return (
        f"there is no NVRTC that works here{seen[:500]}. Install it (pip install "
        f"{package}), or name its library in AFFINE_TENSOR_NVRTC"
    )


def _names() -> Iterator[str]:
    """Where NVRTC may be: as torch has it, in wheels beside torch, in the system."""
    named = os.environ.get("AFFINE_TENSOR_NVRTC")
    if named:
        yield named
        return
    major = (torch.version.cuda or "13").split(".")[0]
    soname = f"libnvrtc.so.{major}"
    yield soname  # that which is loaded already, if one is
    torch_folder = Path(torch.__file__).parent
    wheels = torch_folder.parent / "nvidia"
    folders = [wheels / f"cu{major}" / "lib", wheels / "cuda_nvrtc" / "lib"]
    folders += [torch_folder / "lib"]
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            folders.append(Path(os.environ[name]) / "lib64")
    folders.append(Path("/usr/local/cuda/lib64"))
    for folder in folders:
        if (folder / soname).is_file():
            yield str(folder / soname)
        # Others have another major version, or a hash in their name.
        for path in sorted(folder.glob("libnvrtc[.-]*so*")):
            if "builtins" not in path.name and ".alt." not in path.name:
                yield str(path)
    found = ctypes.util.find_library("nvrtc")
    if found:
        yield found


def _opened(name: str) -> Nvrtc:
    library = ctypes.CDLL(name)
    # It opens this by name alone, which finds what is loaded.
    for path in sorted(_place(name).glob("libnvrtc-builtins*.so*")):
        if ".alt." not in path.name:
            ctypes.CDLL(str(path))
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(library, "nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    count = ctypes.c_int()
    _call(library, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _call(library, "nvrtcGetSupportedArchs", known)
    version = (major.value, minor.value)
    return Nvrtc(name, library, version, tuple(sorted(known)))


def _place(name: str) -> Path:
    """The folder of a library that is loaded."""
    path = Path(name)
    if path.parent == Path():
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            loaded = (line.split(maxsplit=5)[-1].strip() for line in lines)
            path = next((Path(p) for p in loaded if p.endswith(f"/{name}")), path)
    return path.parent


def _call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = getattr(library, name)(*arguments)
    if code != _SUCCESS:
        text = library.nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise KernelError(f"{name} fails: {text(code).decode()}")


def target(capability: tuple[int, int]) -> str:
    """What to compile for: ``sm_90a``, or ``compute_120`` where NVRTC is too old.

    The driver then compiles the rest. Raises KernelError for GPUs before sm_80.
    """
    if capability < _OLDEST:
        raise KernelError(
            f"this GPU is sm_{capability[0]}{capability[1]}; kernels need sm_80 or later"
        )
    wanted = capability[0] * 10 + capability[1]
    known = find().architectures
    if wanted not in known:
        older = [architecture for architecture in known if 80 <= architecture < wanted]
        if not older:
            raise KernelError(f"{find().path} does not know GPUs like sm_{wanted}")
        return f"compute_{older[-1]}"
    # Only so has Hopper its own instructions for matrices.
    return "sm_90a" if wanted == 90 else f"sm_{wanted}"


def image(source: str, defines: Defines, capability: tuple[int, int]) -> bytes:
    """A source of shaders/cuda with these definitions, as the driver loads it.

    It is compiled, or comes from the cache. Raises KernelError where there is no NVRTC or
    it fails.
    """
    architecture = target(capability)
    nvrtc = find()
    flags = [
        *(*_FLAGS, *_OWN_FLAGS.get(source, ())),
        f"--gpu-architecture={architecture}",
        *(f"-D{name}={value}" for name, value in defines),
    ]
    texts = sources()
    parts = [*(part for item in texts.items() for part in item), source, *flags]
    parts.append(str(nvrtc.version))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    file = _folder() / f"{Path(source).stem}-{architecture}-{key}"
    made = _kept(file)
    if made is None:
        made = _compile(nvrtc, source, texts, flags)
        _keep(file, made)
        logger.debug("compiled %s for %s: %s", source, architecture, defines)
    return made


def images(jobs: Sequence[Job], processes: int | None = None) -> int:
    """Compile several at once, each into the cache, and say how many there are.

    NVRTC compiles one at a time in a process; `processes` of them share the work (default:
    as many as there are cores). A script that calls this needs its main guard.
    """
    own = list(dict.fromkeys(jobs))
    workers = min(len(own), processes or os.cpu_count() or 1)
    if workers <= 1:
        for job in own:
            image(*job)
        return len(own)
    context = get_context("spawn")  # a fork would share the state of CUDA
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for _ in pool.map(_image, own, chunksize=max(1, len(own) // (4 * workers))):
            pass
    return len(own)


def _image(job: Job) -> None:
    image(*job)


@cache
def sources() -> dict[str, str]:
    """All of shaders/cuda by name; each may include each."""
    files = sorted((shaders() / "cuda").glob("*.cu*"))
    return {file.name: file.read_text("utf-8") for file in files}


def _compile(
    nvrtc: Nvrtc, source: str, texts: dict[str, str], flags: list[str]
) -> bytes:
    headers = [name for name in texts if name != source]
    program = ctypes.c_void_p()
    many = ctypes.c_char_p * len(headers)
    library = nvrtc.library
    _call(
        library,
        "nvrtcCreateProgram",
        ctypes.byref(program),
        texts[source].encode(),
        source.encode(),
        len(headers),
        many(*(texts[name].encode() for name in headers)),
        many(*(name.encode() for name in headers)),
    )
    try:
        options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        if library.nvrtcCompileProgram(program, len(flags), options) != _SUCCESS:
            log = _output(library, "ProgramLog", program).decode(errors="replace")
            raise KernelError(
                f"NVRTC {'.'.join(map(str, nvrtc.version))} does not take {source} "
                f"({' '.join(flags)}):\n{log.strip(chr(0)).strip()[-4000:]}"
            )
        real = any(flag.startswith("--gpu-architecture=sm_") for flag in flags)
        return _output(library, "CUBIN" if real else "PTX", program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _output(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _call(library, f"nvrtcGet{what}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _call(library, f"nvrtcGet{what}", program, text)
    return text.raw


def _kept(file: Path) -> bytes | None:
    """What a file holds, unless it was cut short or changed."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    digest, contents = data[:_DIGEST], data[_DIGEST:]
    whole = bool(contents) and hashlib.sha256(contents).digest() == digest
    return contents if whole else None


def _keep(file: Path, contents: bytes) -> None:
    """Into another file first: whoever looks sees all of it or nothing."""
    try:
        handle, name = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(hashlib.sha256(contents).digest() + contents)
            os.replace(name, file)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.debug("%s is not kept: %s", file, error)


@cache
def _folder() -> Path:
    """Where images are kept; nowhere, if it cannot be made."""
    folder = cache_folder() / "cuda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.debug("%s cannot be made: %s", folder, error)
    return folder
