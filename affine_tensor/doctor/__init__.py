"""Checks every kernel of the machine it runs on against the reference.

python -m affine_tensor.doctor            all formats
python -m affine_tensor.doctor --quick    a sample, in seconds
python -m affine_tensor.doctor --tune     times the kernels, and keeps what is best
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from .. import ops
from ..kernels import machine, settings
from ..quantize import format_table
from .operators import check_operators
from .watch import watched
from .whole import check_whole

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 if anything is wrong, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.tune and (options.store or options.sizes):
        parser.error("--sizes and --store go with --tune")
    kind = options.device or machine.default_kind()
    if not machine.is_available(kind):
        return _failed(
            f"there is no {kind} device here; torch has {torch.__version__}. Name "
            "another (--device)"
        )
    if options.tune and kind != "mps":
        return _failed(
            f"there is nothing to tune on {kind}: limits are those of Metal kernels. "
            "Leave out --tune"
        )
    print(machine.banner() + describe(kind))
    if options.tune:
        return tune(sizes=options.sizes or "model", store=options.store)
    return check(kind, quick=options.quick, only=options.only)


def _failed(why: str) -> int:
    """Say what could not be done, on stderr."""
    print(f"affine-tensor: {why}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m affine_tensor.doctor",
        description="Check every kernel of this machine against the reference.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a sample of formats, in seconds"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="checks with this text in their name"
    )
    parser.add_argument(
        "--device",
        choices=machine.KINDS,
        help="default: the accelerator that there is, else cpu",
    )
    tuning = parser.add_argument_group("tuning (mps)")
    tuning.add_argument(
        "--tune",
        action="store_true",
        help="time the kernels instead, and keep the limits that are best here",
    )
    tuning.add_argument(
        "--sizes",
        choices=("model", "small"),
        help="of the weights (default: model); small ones only show that it works",
    )
    tuning.add_argument(
        "--store", action="store_true", help="keep limits found on the emulator, too"
    )
    return parser


def describe(kind: str) -> str:
    """The device, versions and limits, one to a line."""
    from .. import __version__

    rows = [
        ("device", f"{kind} ({machine.name_of(kind)})"),
        ("versions", f"affine_tensor {__version__}, torch {torch.__version__}"),
        ("system", machine.system()),
    ]
    if kind == "mps":
        rows += _describe_metal()
    elif kind == "cuda":
        rows += _describe_cuda()
    elif not ops.has_kernels(kind):
        text = f"none of our own for {kind}: what is checked is the reference"
        rows.append(("kernels", text + _why_none(kind)))
    elif kind == "cpu":
        rows.append(("kernels", _describe_cpu()))
    return "\n".join(f"{name:<10}{text}" for name, text in rows)


def _why_none(kind: str) -> str:
    """What to do for kernels of the CPU, where they are wanted."""
    from ..kernels import KernelError
    from ..kernels.cpu import compiler

    if kind != "cpu" or settings.cpu_backend != "own":
        return ""
    try:
        compiler.find()
    except KernelError as error:
        return f" ({error})"
    return " (this CPU has none of AVX-512, AVX2 and NEON)"


def _describe_cpu() -> str:
    from ..kernels.cpu import compiler

    found = compiler.find()
    products = " with products of bfloat16" if found.multiplies_bfloat16 else ""
    return f"{found.vectors}{products}, compiled by {' '.join(found.command)}"


def _describe_cuda() -> list[tuple[str, str]]:
    """Which NVRTC compiles kernels here, for which GPU; or why none does."""
    from ..kernels import KernelError
    from ..kernels.cuda import compiler, library

    major, minor = library.capability(torch.cuda.current_device())
    try:
        found = compiler.find()
        architecture = compiler.target((major, minor))
        version = ".".join(map(str, found.version))
        compiled = f"for {architecture}, by NVRTC {version} ({found.path})"
    except KernelError as error:
        compiled = f"none of our own: {error}"
    rows = [
        ("kernels", compiled),
        ("GPU", f"sm_{major}{minor}, {library.multiprocessors(0)} multiprocessors"),
    ]
    if settings.cuda_backend != "own":
        rows.append(("settings", f"backend {settings.cuda_backend}"))
    return rows


def _describe_metal() -> list[tuple[str, str]]:
    from ..kernels.metal import tuning

    limits = ", ".join(f"{k} {v}" for k, v in asdict(tuning.limits()).items())
    if tuning.chip().name in tuning._stored():
        origin = f"timed on this machine ({tuning.tuned_file()})"
    else:
        origin = f"built in for generation {tuning.chip().generation}, not timed here"
    changed = [
        name for name in ("batch_invariant", "strict") if getattr(settings, name)
    ]
    if settings.metal_backend != "own":
        changed.append(f"backend {settings.metal_backend} (here our own are checked)")
    return [
        ("limits", limits),
        ("", origin),
        ("settings", ", ".join(changed) or "default"),
    ]


def check(kind: str, *, quick: bool = False, only: str = "") -> int:
    """Print what was found about every operator and in use; 1 if anything is wrong."""
    with watched() as watch:
        rows = check_operators(kind, watch, quick=quick, only=only)
        if rows:
            header = ("operator", "kernels", "cases", "error / bound", "")
            print(f"\n{format_table([header, *(row.cells() for row in rows)])}")
        outcomes = list(check_whole(kind, watch, only=only))
    if outcomes:
        print()
    for one in outcomes:
        print(f"{one.name:<31}{one.state}{f' ({one.text})' if one.text else ''}")
    problems = [line for row in rows for line in row.failures()]
    problems += [f"{o.name}: {o.text}" for o in outcomes if o.state == "FAILED"]
    if problems:
        print("\nWhat is wrong:")
        print("\n".join(problems))
        return 1
    if not rows and not outcomes:
        return _failed(f"no check has {only!r} in its name. Leave out --only")
    skipped = sum(one.state == "skipped" for one in outcomes)
    print(f"\nAll is well{f', {skipped} skipped' if skipped else ''}.")
    return 0


def tune(*, sizes: str = "model", store: bool = False) -> int:
    """Time the kernels of Metal, print what was found, and keep it."""
    from ..kernels.metal import tuning
    from ..kernels.metal.tune import PLANS
    from ..kernels.metal.tune import tune as find

    before = tuning.limits()
    found = find(PLANS[sizes])
    print(f"\n{format_table(found.rows())}\n")
    built_in = tuning.BY_GENERATION[tuning.chip().generation]
    columns = [asdict(limits) for limits in (built_in, before, found.limits)]
    rows = [(name, *(str(one[name]) for one in columns)) for name in columns[0]]
    print(format_table([("limit", "built in", "before", "found"), *rows]))
    if (sizes == "model" and not machine.emulated()) or store:
        print(f"\nKept for {tuning.chip().name} in {tuning.store(found.limits)}")
    else:
        print("\nNot kept: not timed on a GPU with weights of real size (--store)")
    return 0
