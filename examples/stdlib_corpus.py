"""The source of Python's standard library as a corpus: what is learnt, what is not.

Every machine with Python has it, so nothing is downloaded. `load_corpus` reads the
`.py` files of the running interpreter (or of a folder) and splits them by *name*, so
that the same modules are held out under every Python version:

- `held_out`: the modules of `HELD_OUT`. All figures in the README are about these.
- `validation`: the modules of `VALIDATION`. Settings were chosen on these.
- `train`: everything else, tests included.

The tests of a held-out or validation module are in no part: they quote it.

    python examples/stdlib_corpus.py            # what is in each part
    python examples/stdlib_corpus.py --zip F    # the same files as one archive
"""

import argparse
import hashlib
import io
import sysconfig
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# A spread of kinds: a command line, text, dates, numbers, formats, servers, files,
# threads, algorithms. Names that Python 3.10 to 3.14 all have.
HELD_OUT = (
    "argparse",
    "calendar",
    "csv",
    "fractions",
    "graphlib",
    "heapq",
    "json",
    "queue",
    "shlex",
    "socketserver",
    "tempfile",
    "textwrap",
)
VALIDATION = (
    "bisect",
    "netrc",
    "pprint",
    "sched",
    "selectors",
    "timeit",
    "wave",
    "zipapp",
)

# Not the library's, made by a program, written in other encodings, or not Python.
SKIPPED_FOLDERS = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "cjkencodings",
    "encoded_modules",
    "lib2to3/tests/data",
)
SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "bad", "nonascii")


@dataclass(frozen=True)
class Source:
    """One file: its path below the library's folder, and its text."""

    name: str
    text: str

    @property
    def is_test(self) -> bool:
        parts = PurePosixPath(self.name).parts
        return any(p.startswith(("test", "idle_test")) or p == "tests" for p in parts)


@dataclass(frozen=True)
class Corpus:
    train: list[Source]
    validation: list[Source]
    held_out: list[Source]


def load_corpus(root: str | Path | None = None) -> Corpus:
    """Read and split the library below `root`, a folder or an archive made by `--zip`.

    Without `root`: the library of the running interpreter. Files come sorted by name;
    a text that came before under another name is left out.

    Raises FileNotFoundError if a held-out module is missing.
    """
    path = Path(root or sysconfig.get_paths()["stdlib"])
    files = _read_zip(path) if path.is_file() else _read_folder(path)
    corpus = Corpus([], [], [])
    seen: set[str] = set()
    for name, data in sorted(files):
        text = _decode(data)
        digest = hashlib.sha256(data).hexdigest()
        if not text or digest in seen or _is_skipped(name):
            continue
        seen.add(digest)
        part = _part_of(corpus, name)
        if part is not None:
            part.append(Source(name, text))
    _check_complete(corpus, path)
    return corpus


def _read_folder(root: Path) -> Iterable[tuple[str, bytes]]:
    # A filter by name first: site-packages may be far larger than the library.
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not _is_skipped(name):
            yield name, path.read_bytes()


def _read_zip(path: Path) -> Iterable[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            yield name, archive.read(name)


def _decode(data: bytes) -> str:
    """The text with plain newlines, or "" if it is not UTF-8 text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    text = text.replace("\r\n", "\n")
    return "" if "\0" in text or "\r" in text or not text.strip() else text


def _is_skipped(name: str) -> bool:
    path = PurePosixPath(name)
    folders = f"/{path.parent}/"
    return any(f"/{folder}/" in folders for folder in SKIPPED_FOLDERS) or any(
        part.startswith(SKIPPED_PREFIXES) for part in path.parts
    )


def _part_of(corpus: Corpus, name: str) -> list[Source] | None:
    """The part that a file belongs to; None for the tests of modules set aside."""
    path = PurePosixPath(name)
    module = path.with_suffix("").parts[0]
    if module in HELD_OUT:
        return corpus.held_out
    if module in VALIDATION:
        return corpus.validation
    for aside in HELD_OUT + VALIDATION:
        for part in path.with_suffix("").parts:
            if part == f"test_{aside}" or part.startswith(f"test_{aside}_"):
                return None
    return corpus.train


def _check_complete(corpus: Corpus, path: Path) -> None:
    found = {
        PurePosixPath(source.name).with_suffix("").parts[0]
        for source in corpus.held_out + corpus.validation
    }
    missing = sorted(set(HELD_OUT + VALIDATION) - found)
    if missing:
        raise FileNotFoundError(
            f"{path} lacks the modules {', '.join(missing)}; give the folder that "
            "holds the sources of Python's standard library"
        )


def archive(corpus: Corpus) -> bytes:
    """The corpus as a zip archive that `load_corpus` reads back the same."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as file:
        for source in corpus.train + corpus.validation + corpus.held_out:
            # Entries without a date, so that the same files give the same bytes.
            file.writestr(
                zipfile.ZipInfo(source.name),
                source.text,
                compress_type=zipfile.ZIP_LZMA,
            )
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="The standard library as a corpus.")
    parser.add_argument("--stdlib", type=Path, help="default: this interpreter's")
    parser.add_argument("--zip", type=Path, help="write the corpus to this archive")
    options = parser.parse_args()
    corpus = load_corpus(options.stdlib)
    for part in ("train", "validation", "held_out"):
        sources: list[Source] = getattr(corpus, part)
        size = sum(len(source.text.encode()) for source in sources)
        tests = sum(len(source.text.encode()) for source in sources if source.is_test)
        print(f"{part:10}  {len(sources):5} files  {size:9} bytes  {tests:9} in tests")
    if options.zip:
        options.zip.write_bytes(archive(corpus))


if __name__ == "__main__":
    main()
