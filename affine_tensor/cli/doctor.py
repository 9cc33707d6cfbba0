"""`affine-tensor doctor`: every kernel of this machine against the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .output import AsJson, emit

if TYPE_CHECKING:
    from ..doctor.operators import Row

EXAMPLES = """Examples:

affine-tensor doctor --quick

affine-tensor doctor --device cpu --only linear --json"""


def command(
    quick: Annotated[
        bool, typer.Option("--quick", help="A sample of formats, in seconds.")
    ] = False,
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Checks with this text in their name.")
    ] = "",
    device: Annotated[
        Literal["cpu", "cuda", "mps"] | None,
        typer.Option(help="Default: the accelerator that there is, else cpu."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Time the kernels instead, and keep the best limits."
        ),
    ] = False,
    sizes: Annotated[
        Literal["model", "small"] | None,
        typer.Option(
            help="Of weights for --tune (default: model); small ones only show that it "
            "works.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Keep limits found on the emulator, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every kernel of this machine against the reference.

    The exit code is 1 where anything is wrong.
    """
    if not tune and (store or sizes):
        raise typer.BadParameter("--sizes and --store go with --tune")
    if tune and as_json:
        raise typer.BadParameter("--tune prints text only; leave out --json")
    from ..doctor import main

    if as_json:
        raise typer.Exit(_as_json(device, quick, only))
    arguments = [*(["--quick"] if quick else []), *(["--tune"] if tune else [])]
    arguments += [f"--only={only}"]
    arguments += [f"--sizes={sizes}"] if sizes else []
    arguments += [f"--device={device}"] if device else []
    arguments += ["--store"] if store else []
    raise typer.Exit(main(arguments))


def _as_json(device: str | None, quick: bool, only: str) -> int:
    """Print what `doctor.check` finds as an object; 1 if anything is wrong.

    ``device``, ``name``, ``versions``; ``ok``; ``rows`` of operators: ``operator``,
    ``kernels`` ("reference" where a case took none), ``cases``, ``error_over_bound``,
    ``failures``; ``in_use``: ``name``, ``state`` (ok, skipped, FAILED), ``text``.
    """
    import torch

    from .. import __version__
    from ..doctor.operators import check_operators
    from ..doctor.watch import watched
    from ..doctor.whole import check_whole
    from ..kernels import machine

    kind = device or machine.default_kind()
    if not machine.is_available(kind):
        raise RuntimeError(
            f"there is no {kind} device here; torch has {torch.__version__}. Name "
            "another (--device)"
        )
    with watched() as watch:
        rows = check_operators(kind, watch, quick=quick, only=only)
        outcomes = list(check_whole(kind, watch, only=only))
    if not rows and not outcomes:
        raise ValueError(f"no check has {only!r} in its name. Leave out --only")
    failed = any(row.failures() for row in rows)
    failed |= any(one.state == "FAILED" for one in outcomes)
    value: dict[str, Any] = {
        "device": kind,
        "name": machine.name_of(kind),
        "versions": {"affine_tensor": __version__, "torch": torch.__version__},
        "ok": not failed,
        "rows": [_row(row) for row in rows],
        "in_use": [
            {"name": one.name, "state": one.state, "text": one.text} for one in outcomes
        ],
    }
    emit(value)
    return int(failed)


def _row(row: Row) -> dict[str, Any]:
    return {
        "operator": row.name,
        "kernels": list(row.kernels),
        "cases": row.cases,
        "error_over_bound": row.worst,
        "failures": row.failures(),
    }
