"""How commands speak: text on a terminal, JSON for programs, errors in one line."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, for programs.")
]

DEBUG = "AFFINE_TENSOR_DEBUG"

# Lines of an error that lists many tensors.
_LINES = 12


def emit(value: dict[str, Any]) -> None:
    """Print the result of a command as one JSON object, with a newline."""
    print(json.dumps(value, indent=2, default=str))


@contextmanager
def failing() -> Iterator[None]:
    """Errors that tell what is wrong end in a line on stderr and exit code 1.

    Only the lists of a `CheckpointError` take more lines. With `AFFINE_TENSOR_DEBUG=1`
    errors come with their traceback. Programs that asked for `--json` get
    `{"error": ..., "kind": ...}` on stdout as well.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where a closed pipe is still heard of
    except (KeyboardInterrupt, EOFError):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader has seen enough, as `head` does; nothing is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        if "--json" in sys.argv[1:]:
            emit({"error": str(error), "kind": type(error).__name__})
            sys.stdout.flush()
        print(f"affine-tensor: {_told(error)}", file=sys.stderr)
        sys.exit(1)


# Whose texts say what to do. Any other error is a mistake of this program.
_TELLING = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def _told(error: Exception) -> str:
    """The text of an error, of which a long list is cut."""
    if not isinstance(error, _TELLING):
        return (
            f"unexpected {type(error).__name__}: {error}. Please report it, with what "
            f"{DEBUG}=1 prints"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if not isinstance(error, ValueError):  # of others, which have no lists
        return " ".join(filter(None, map(str.strip, lines)))
    if len(lines) > _LINES:
        more = len(lines) - _LINES
        lines = [*lines[:_LINES], f"… and {more} more lines ({DEBUG}=1 prints all)"]
    return "\n".join(lines)


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
    for name in ("torchao", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        no_bars()


def no_bars() -> None:
    """Have huggingface_hub show no bars, unless HF_HUB_DISABLE_PROGRESS_BARS is 0."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
    )

    asked = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if asked != "0" and not are_progress_bars_disabled():
        disable_progress_bars()


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

    On a terminal as a table of rich's, which folds long names; else as aligned text.
    """
    console = _console()
    if console is None:
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
