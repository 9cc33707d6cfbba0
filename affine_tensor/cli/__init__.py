"""The command line, `affine-tensor`: one file per command.

A command parses its arguments, calls the library, and prints through `Console`. Modules
of commands import torch and transformers inside of functions, so that `--help` is quick.

Exit codes: 0 all is well; 1 it could not be done, or something is wrong with what was
looked at; 2 the command line is not right; 130 interrupted.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from . import bench, convert, doctor, evaluate, generate, inspect
from .output import calm, failing, interrupted, ready_streams

app = typer.Typer(
    name="affine-tensor",
    help="Quantized checkpoints in MLX format: look at them, make them, run them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    # Boxes and colours are for terminals. A closed stdout is None.
    rich_markup_mode="rich" if sys.stdout and sys.stdout.isatty() else None,
)


def _with_library(command: Callable[..., None]) -> Callable[..., None]:
    """The command, before which the library is imported, with torch."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        first = "torch" not in sys.modules
        importlib.import_module("affine_tensor._public")
        if first:
            calm()  # once more: torch has set the levels of its loggers
        command(*args, **kwargs)

    return run


# Each has a `command`, and may have `EXAMPLES`, a text of paragraphs below its help, and
# `CLASS`, of how its command line is read.
_COMMANDS = {
    "inspect": inspect,
    "convert": convert,
    "generate": generate,
    "eval": evaluate,
    "bench": bench,
    "doctor": doctor,
}
for _name, _module in _COMMANDS.items():
    app.command(
        _name,
        cls=getattr(_module, "CLASS", None),
        epilog=getattr(_module, "EXAMPLES", None),
    )(_with_library(_module.command))


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"affine-tensor {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """What the script `affine-tensor` runs: the application, with errors as one line."""
    ready_streams()
    with failing():
        calm()
        # Not standalone: errors come up to here, and the exit code comes back.
        code = app(prog_name="affine-tensor", standalone_mode=False)
        if code == _INTERRUPTED:
            interrupted()
        sys.exit(code or 0)


_INTERRUPTED = 130  # as typer says it
