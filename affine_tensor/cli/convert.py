"""`affine-tensor convert`: an MLX checkpoint from whatever is there."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inspect import paths
from .output import AsJson, emit, print_facts, print_text

if TYPE_CHECKING:
    from ..checkpoint.save import SaveReport

EXAMPLES = """Examples:

affine-tensor convert Qwen/Qwen3-0.6B ./qwen-4bit

affine-tensor convert ./dense ./mixed --recipe mixed_3_6

affine-tensor convert ./dense ./out --bits 6 --group-size 32 --skip embed_tokens

affine-tensor convert ./model-gptq ./model-mlx   (the same codes)

affine-tensor convert ./model-4bit ./model-dense --dequantize

Quantizing again a checkpoint that is quantized (--bits, --group-size, --recipe) loses
accuracy twice: convert the dense original where you can."""

_UNSUPPORTED = ("error", "dense", "requantize")
_DTYPES = ("float16", "bfloat16", "float32", "keep")


def _among(choices: tuple[str, ...]) -> Any:
    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return check


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A folder, or a repository of the Hub: dense, GPTQ, AWQ, "
            "compressed-tensors or MLX.",
            autocompletion=paths,
        ),
    ],
    folder: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="The folder to write.", autocompletion=paths
        ),
    ],
    bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of a code: 1, 2, 3, 4, 5, 6 or 8. By default 4 for a dense IN; "
            "one that is quantized keeps its codes, and with this it is quantized "
            "again, with loss.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale: 32, 64 or 128 (default: 64).",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Bits by module: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6, as "
            "mlx-lm has them, or a JSON file: "
            '{"modules": {name: {"bits": 4, "group_size": 64} or false}}.',
            show_default=False,
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write every weight dense.")
    ] = False,
    unsupported: Annotated[
        str,
        typer.Option(
            help="What MLX has no form for, act-order for one: error, dense, or "
            "requantize (with loss).",
            callback=_among(_UNSUPPORTED),
        ),
    ] = "error",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of scales, biases and dense tensors: float16, bfloat16 or float32 "
            "(default: that of IN); keep: scales as they are in a quantized IN.",
            callback=_among(_DTYPES),
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="Leave it, and what is in it, dense: the beginning or end of a name, "
            "or a pattern such as '*.mlp.*'. Repeatable.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Fit the codes to this text; needs the memory of the dense model.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUT, once the new one is complete."),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of the repository.", show_default=False
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Of a file of weights, such as 500MB.")
    ] = "5GB",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write an MLX checkpoint that mlx-lm loads.

    Weights are read, converted and written one by one: at most one file of weights
    (--max-shard-size) is in memory. OUT appears when it is complete; after an error or
    an interruption everything is as it was. No code of a checkpoint's own is run.
    """
    from ..hf.saving import _bytes

    shows = sys.stderr.isatty() and not (quiet or as_json)
    logging.getLogger("affine_tensor").setLevel(logging.ERROR)  # it is told below
    common: dict[str, Any] = {
        "dtype": dtype or "auto",
        "max_shard_bytes": _bytes(max_shard_size),
        "overwrite": overwrite,
        "progress": shows,
    }
    if revision is not None:
        common["revision"] = revision
    if calibrate is not None:
        if dequantize or dtype == "keep":
            raise ValueError("--calibrate is for a dense IN that is quantized")
        from ..hf.calibrated import convert_calibrated
        from ..hf.config import AffineQuantizationConfig

        config = AffineQuantizationConfig(
            bits or 4, group_size or 64, skip or None, recipe=recipe
        )
        report, fitted = convert_calibrated(source, folder, calibrate, config, **common)
    else:
        from ..hf.convert import convert

        fitted = None
        with _as_options():
            report = convert(
                source,
                folder,
                bits=bits,
                group_size=group_size,
                recipe=recipe,
                dequantize=dequantize,
                unsupported=unsupported,  # type: ignore[arg-type]
                modules_to_not_convert=skip or None,
                **common,
            )
    if as_json:
        emit(as_object(report) | ({"calibration": str(fitted)} if fitted else {}))
    elif not quiet:
        show(report)
        if fitted is not None:
            print_text(str(fitted))


# How the library's errors call what is an option here.
_SPELLED = {
    "pass overwrite=True": "pass --overwrite",
    "Pass unsupported='dense'": "Pass --unsupported dense",
    "pass unsupported='dense'": "pass --unsupported dense",
    "dtype='keep'": "--dtype keep",
    "dtype=torch.bfloat16, torch.float32 or": "--dtype bfloat16, float32 or",
    ": dequantize is": ": --dequantize is",
    "modules_to_not_convert": "--skip",
}


@contextmanager
def _as_options() -> Iterator[None]:
    """Errors name the options of the command."""
    try:
        yield
    except (ValueError, FileExistsError) as error:
        text = str(error)
        for name, option in _SPELLED.items():
            text = text.replace(name, option)
        if text == str(error):
            raise
        kind = FileExistsError if isinstance(error, FileExistsError) else ValueError
        raise kind(text) from error


def as_object(report: SaveReport) -> dict[str, Any]:
    """The report for programs."""
    return {
        "folder": str(report.folder),
        "files": report.files,
        "bytes": report.bytes,
        "bits_per_weight": report.bits_per_weight,
        "packed": {
            name: {"bits": bits, "group_size": group}
            for name, (bits, group) in report.packed.items()
        },
        "dense": report.dense,
        "changed": report.changed,
        "relative_loss": report.lost,
        "cast_in_steps": report.cast,
        "tokenizer": report.tokenizer,
    }


def show(report: SaveReport) -> None:
    """Print what was written, and what it cost."""
    formats = Counter(report.packed.values())
    packed = ", ".join(
        f"{count} of {bits} bits in groups of {group}"
        for (bits, group), count in sorted(formats.items())
    )
    rows = [
        ("written", f"{report.folder}, {len(report.files)} files"),
        ("weights", f"{report.bytes:,} bytes"),
        ("bits per weight", f"{report.bits_per_weight:.2f}"),
        ("packed", packed or "none"),
    ]
    if report.lost:
        worst = max(report.lost, key=lambda name: report.lost[name])
        mean = sum(report.lost.values()) / len(report.lost)
        rows.append(
            (
                "loss",
                f"{len(report.lost)} weights were quantized again: relative error "
                f"{mean:.2g} on average, {report.lost[worst]:.2g} at most ({worst})",
            )
        )
    if report.cast:
        worst = max(report.cast, key=lambda name: report.cast[name])
        rows.append(
            (
                "scales",
                f"cast, which moves {len(report.cast)} weights by at most "
                f"{report.cast[worst]:.2g} quantization steps ({worst}); --dtype keep "
                "writes them as they are",
            )
        )
    print_facts(rows)
    for title, found in (("dense", report.dense), ("changed", report.changed)):
        for why, names in _by_reason(found).items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            why = why.replace("modules_to_not_convert", "--skip")
            print_text(f"{title}: {', '.join(names[:3])}{more}: {why}")
    if not report.tokenizer:
        print_text("no tokenizer was found in IN, so that OUT has none")


def _by_reason(found: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in found.items():
        reasons.setdefault(why, []).append(name)
    return reasons
