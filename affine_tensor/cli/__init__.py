"""The command line, `affine-tensor`: one file per command.

A command parses its arguments, calls the library, and prints through `Console`. Modules
of commands import torch and transformers inside of functions, so that `--help` is quick.

Exit codes: 0 all is well; 1 it could not be done, or something is wrong with what was
looked at; 2 the command line is not right; 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import bench, convert, doctor, evaluate, generate, inspect
from .output import calm, failing

app = typer.Typer(
    name="affine-tensor",
    help="Quantized checkpoints in MLX format: look at them, make them, run them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    # Boxes and colours are for terminals.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)

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
    )(_module.command)


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
    calm()
    with failing():
        app(prog_name="affine-tensor")
    sys.exit(0)
