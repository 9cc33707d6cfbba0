"""`affine-tensor convert`: an MLX checkpoint from whatever is there."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
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


def _bits(value: int | None) -> int | None:
    if value is not None:
        from ..layout import BITS

        _check_number(value, BITS)
    return value


def _group_size(value: int | None) -> int | None:
    if value is not None:
        from ..checkpoint.save import MLX_GROUP_SIZES

        _check_number(value, MLX_GROUP_SIZES)
    return value


def _check_number(value: int, allowed: Iterable[int]) -> None:
    if value not in allowed:
        known = ", ".join(map(str, allowed))
        raise typer.BadParameter(f"{value} is not one of {known}")


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
            callback=_bits,
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale: 32, 64 or 128 (default: 64).",
            callback=_group_size,
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
            help="Fit the codes to this text, in UTF-8; needs a dense IN, and memory for "
            "all of it.",
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
    _check_together(bits, group_size, recipe, dequantize, skip, calibrate, dtype)
    shows = sys.stderr.isatty() and not (quiet or as_json)
    logging.getLogger("affine_tensor").setLevel(logging.ERROR)  # it is told below
    common: dict[str, Any] = {
        "dtype": dtype or "auto",
        "unsupported": unsupported,
        "max_shard_bytes": _size(max_shard_size),
        "overwrite": overwrite,
        "progress": shows,
    }
    if revision is not None:
        common["revision"] = revision
    fitted = None
    with _as_options():
        if calibrate is not None:
            from ..hf.calibrated import convert_calibrated
            from ..hf.config import AffineQuantizationConfig

            config = AffineQuantizationConfig(
                4 if bits is None else bits,
                64 if group_size is None else group_size,
                skip or None,
                recipe=recipe,
            )
            report, fitted = convert_calibrated(
                source, folder, calibrate, config, **common
            )
        else:
            from ..hf.convert import convert

            report = convert(
                source,
                folder,
                bits=bits,
                group_size=group_size,
                recipe=recipe,
                dequantize=dequantize,
                modules_to_not_convert=skip or None,
                **common,
            )
    if as_json:
        emit(as_object(report) | ({"calibration": _gain(fitted)} if fitted else {}))
    elif not quiet:
        show(report, None if fitted is None else _gain(fitted))


# ---- what is wrong with the command line -------------------------------------------


def _check_together(
    bits: int | None,
    group_size: int | None,
    recipe: str | None,
    dequantize: bool,
    skip: list[str] | None,
    calibrate: str | None,
    dtype: str | None,
) -> None:
    """Raise a usage error for options that are wrong, alone or together."""
    given: dict[str, Any] = {
        "--bits": bits,
        "--group-size": group_size,
        "--recipe": recipe,
    }
    given |= {"--skip": skip or None, "--calibrate": calibrate}
    others = [name for name, value in given.items() if value is not None]
    if dequantize and others:
        raise typer.BadParameter(
            f"it makes every weight dense; it does not go together with {others[0]}",
            param_hint="--dequantize",
        )
    if calibrate is not None and dtype == "keep":
        raise typer.BadParameter(
            "keep is for a quantized IN; --calibrate takes a dense one",
            param_hint="--dtype",
        )
    if skip:
        from ..hf.choices import matcher

        with _value_of("--skip"):
            for pattern in skip:
                matcher(pattern)
    if recipe is not None:
        with _value_of("--recipe"):
            _check_recipe(recipe, bits, group_size)


def _check_recipe(recipe: str, bits: int | None, group_size: int | None) -> None:
    """Raise ValueError for a recipe that is none, or says otherwise than options do."""
    from .. import recipes

    if recipe in recipes.NAMES:
        if bits is not None:
            raise ValueError(
                f"{recipe} gives every module its bits; leave --bits {bits} out"
            )
        return
    found = recipes.default_of(recipes.read(recipe))
    for name, value in (("bits", bits), ("group_size", group_size)):
        own = getattr(found, name, value)
        if value is not None and own != value:
            option = f"--{name.replace('_', '-')} {value}"
            raise ValueError(
                f"the default in {recipe} has {name} {own}; leave {option} out, or take "
                "the default out of the file"
            )


def _size(text: str) -> int:
    """Bytes of --max-shard-size."""
    from ..hf.saving import _bytes

    try:
        size = _bytes(text)
    except ValueError:
        size = 0
    if size < 1:
        raise typer.BadParameter(
            f"{text!r} is no size of a file; write it as '5GB' or in bytes",
            param_hint="--max-shard-size",
        )
    return size


@contextmanager
def _value_of(option: str) -> Iterator[None]:
    """A ValueError is one about the value of this option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


# How the library's errors call what is an option here.
_SPELLED = {
    "pass overwrite=True": "pass --overwrite",
    "Pass unsupported='dense'": "Pass --unsupported dense",
    "pass unsupported='dense'": "pass --unsupported dense",
    "or 'requantize' to": "or --unsupported requantize to",
    "Give bits to": "Give --bits to",
    "dtype='keep'": "--dtype keep",
    "dtype=torch.bfloat16, torch.float32 or": "--dtype bfloat16, float32 or",
    ": dequantize is": ": --dequantize is",
    "modules_to_not_convert": "--skip",
    "filter_fn leaves it dense by returning False": "--skip leaves it dense",
    ', or pass uncovered="plain" to round such layers plainly': "",
}


# Of an error that lists weights.
_LINES = 8


@contextmanager
def _as_options() -> Iterator[None]:
    """Errors name the options of the command."""
    from ..checkpoint.files import CheckpointError

    try:
        yield
    except (ValueError, FileExistsError) as error:
        text = str(error)
        for name, option in _SPELLED.items():
            text = text.replace(name, option)
        lines = text.splitlines()
        if len(lines) > _LINES:  # the last says what to do
            more = f"  … and {len(lines) - _LINES} more"
            text = "\n".join([*lines[: _LINES - 1], more, lines[-1]])
        if text == str(error):
            raise
        kinds = (FileExistsError, CheckpointError, ValueError)
        raise next(k for k in kinds if isinstance(error, k))(text) from error


# ---- what was done -----------------------------------------------------------------


def _gain(fitted: Any) -> str:
    """What the calibration gained, in a line."""
    text = f"on {fitted.tokens:,} tokens"
    if fitted.errors:
        mean = sum(fitted.errors.values()) / len(fitted.errors)
        text += f": {mean:.0%} of plain rounding's squared error on average"
    return text


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


def show(report: SaveReport, gain: str | None = None) -> None:
    """Print what was written, and what it cost, or what calibrating gained."""
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
    if gain is not None:
        rows.append(("calibrated", gain))
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
