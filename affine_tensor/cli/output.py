"""How commands speak: text on a terminal, JSON for programs, errors in one line."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any, TextIO

import typer

DEBUG = "AFFINE_TENSOR_DEBUG"

# Whether --json was given, once the command line has been read that far.
_programs: bool | None = None


def _note_json(asked: bool | None) -> bool | None:
    global _programs
    _programs = asked
    return asked


# Eager, so that what is wrong with other options is told as asked, too.
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object, for programs.",
        is_eager=True,
        callback=_note_json,
    ),
]

# Lines of an error that lists many tensors.
_LINES = 12


def emit(value: dict[str, Any]) -> None:
    """Print the result of a command as one JSON object, with a newline."""
    print(json.dumps(value, indent=2, default=str))


def ready_streams() -> None:
    """What is printed to a closed stdout or stderr is lost, and is no error.

    A character that the encoding of a stream lacks is printed as its number.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line on stderr; where that is full, there is nobody to tell."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def read_stdin() -> Any:
    """stdin, a stream of text. Raises ValueError where it is closed."""
    if sys.stdin is None:
        raise ValueError("stdin is closed, and - reads it. Send it a text, or name one")
    return sys.stdin


@contextmanager
def failing() -> Iterator[None]:
    """Errors that tell what is wrong end in a line on stderr and exit code 1, or 2.

    Only the lists of a `CheckpointError` take more lines. With `AFFINE_TENSOR_DEBUG=1`
    errors come with their traceback. Programs that asked for `--json` get
    `{"error": ..., "kind": ...}` on stdout as well.
    """
    _note_json(None)
    try:
        try:
            yield
        finally:
            _flush()  # here, where a closed pipe is still heard of
    except (KeyboardInterrupt, EOFError, typer.Abort):
        interrupted()
    except BrokenPipeError:
        _drop(sys.stdout)  # the reader has seen enough, as `head` does
        sys.exit(1)
    except Exception as error:
        usage = is_usage(error)
        if os.environ.get(DEBUG) and not usage:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # whose text is the help
            error.show()  # type: ignore[attr-defined]
        else:
            _tell(error)
        sys.exit(2 if usage else 1)


def interrupted() -> None:
    """How a command ends that was interrupted."""
    say("interrupted")
    sys.exit(130)


def is_usage(error: Exception) -> bool:
    """Whether the command line is not right."""
    return isinstance(error, typer.BadParameter.__mro__[1])  # which has no public name


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk
        _drop(sys.stdout)
        raise OSError(error.errno, error.strerror, "stdout") from error


def _drop(stream: TextIO) -> None:
    """Have nothing left to flush at the end, which would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(error: Exception) -> None:
    """Print an error, for programs too where they asked for it."""
    usage = is_usage(error)
    text = _usage(error) if usage else _told(error)
    with suppress(OSError):  # of a reader that left
        if _for_programs():
            whole = text if usage else _text(error)
            emit({"error": whole, "kind": type(error).__name__})
        _flush()
    say(f"affine-tensor: {text}")


def _for_programs() -> bool:
    if _programs is not None:
        return _programs
    words = sys.argv[1:]  # what could not be read
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def _usage(error: Any) -> str:
    """What is wrong with the command line, in a line, with the value that was seen."""
    message = error.message.removeprefix("Value error, ")
    cause = error.__cause__
    if hasattr(cause, "errors"):  # pydantic's, whose messages leave it out
        seen = repr(cause.errors()[0]["input"])
        if seen not in message:
            message = f"{seen}: {message[:1].lower()}{message[1:]}"
    text = error.format_message().removeprefix("Invalid value: ")
    text = text.replace(error.message, message) if error.message else text
    context = getattr(error, "ctx", None)
    path = "affine-tensor" if context is None else context.command_path
    return f"{' '.join(text.split()).removesuffix('.')} ({path} --help)"


# Whose texts say what to do. Any other error is a mistake of this program.
_TELLING = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def shortened(lines: list[str], hint: str) -> list[str]:
    """The first of many lines, and how the others are had."""
    if len(lines) <= _LINES:
        return lines
    return [*lines[:_LINES], f"… and {len(lines) - _LINES} more lines ({hint})"]


def _told(error: Exception) -> str:
    """The text of an error in a line; of a checkpoint's with its list, which is cut."""
    lines = _text(error).splitlines() or [type(error).__name__]
    lines = shortened(lines, f"{DEBUG}=1 prints all")
    if not (len(lines) > 1 and _of_checkpoint(error)):
        lines = [_joined(lines)]
    if not isinstance(error, _TELLING):
        return (
            f"unexpected {type(error).__name__}: {lines[0]}. Please report it, with what "
            f"{DEBUG}=1 prints"
        )
    return "\n".join(lines)


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # without the number of it
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error).strip()


def in_a_line(error: Exception) -> str:
    """The text of an error for a sentence: without line breaks and a dot at the end."""
    return _joined(str(error).splitlines()).removesuffix(".") or type(error).__name__


def _joined(lines: Sequence[str]) -> str:
    return " ".join(filter(None, map(str.strip, lines)))


def _of_checkpoint(error: Exception) -> bool:
    from ..checkpoint.files import CheckpointError

    return isinstance(error, CheckpointError)


def calm() -> None:
    """Keep what other libraries have to say of themselves off a user's terminal.

    Warnings that somebody asked for (`python -W`, PYTHONWARNINGS) and everything under
    `AFFINE_TENSOR_DEBUG=1` stay. Bars of progress are for terminals.
    """
    if os.environ.get(DEBUG):
        return
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch sets levels when it is imported, which may be later: errors alone.
    os.environ.setdefault("TORCH_LOGS", "-all")
    for name in ("torchao", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        no_bars()


def no_bars() -> None:
    """Have no bars of others shown, unless HF_HUB_DISABLE_PROGRESS_BARS is 0."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
    )

    asked = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if asked != "0" and not are_progress_bars_disabled():
        disable_progress_bars()  # transformers asks for it when it is imported
        if "transformers" in sys.modules:
            from transformers.utils import logging as of_transformers

            of_transformers.disable_progress_bar()


def print_facts(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and their values, one to a line."""
    width = max(len(name) for name, _ in rows) + 2
    console = _console()
    for name, text in rows:
        if console is None:
            print(f"{name:<{width}}{text}".rstrip())
        else:
            from rich.text import Text

            console.print(Text(f"{name:<{width}}", "bold").append(text, "not bold"))


def print_table(rows: Sequence[tuple[str, ...]], *, total: bool = False) -> None:
    """Print rows below their header, which is the first; `total`: the last is a sum.

    On a terminal as a table of rich's, which folds long names; else, and on one that is
    too narrow for the numbers, as aligned text.
    """
    console = _console()
    if console is None or console.width < _least_width(rows):
        from ..quantize import format_table

        print(format_table(rows))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    header, *rest = rows
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        if index:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    for index, row in enumerate(rest):
        last = total and index == len(rest) - 1
        table.add_row(*map(Text, row), style="bold" if last else None)
    console.print(table)


_FOLDED = 12  # columns that names have at least, where they are folded


def _least_width(rows: Sequence[tuple[str, ...]]) -> int:
    """Columns that the table of rich's takes, with names as narrow as they may be."""
    first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
    return min(first, _FOLDED) + sum(rest) + 2 * len(rest) + 2


def print_text(text: str, style: str = "") -> None:
    """Print a text, on a terminal in this style of rich's."""
    console = _console()
    if console is None:
        print(text)
    else:
        console.print(text, style=style, markup=False, highlight=False)


def _console() -> Any:
    """rich's console where stdout is a terminal, else None. NO_COLOR is rich's matter."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console(highlight=False)
