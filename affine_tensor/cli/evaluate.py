"""`affine-tensor eval`: how well a model predicts texts, at several widths."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import models
from .many import Spread
from .models import DType, Model, Revision
from .output import AsJson, emit, no_bars, print_table, print_text, read_stdin

if TYPE_CHECKING:
    from ..evaluate import Score

CLASS = Spread

EXAMPLES = """Examples:

affine-tensor eval ./model-4bit --text book.txt

affine-tensor eval ./dense --text a.py b.py --bits 2 3 4 8 --picture widths.png

affine-tensor eval Qwen/Qwen3-0.6B --text book.txt --bits 4 --group-size 32 64 128
--perplexity --json"""


def command(
    source: Model,
    text: Annotated[
        list[str],
        typer.Option(
            metavar="FILE ...",
            help="Texts in UTF-8, each predicted on its own; - is stdin.",
            show_default=False,
        ),
    ],
    bits: Annotated[
        list[int] | None,
        typer.Option(
            "--bits",
            "--widths",
            metavar="N ...",
            help="Quantize a dense MODEL to each: 1, 2, 3, 4, 5, 6 or 8.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N ...",
            help="Weights that share a scale, with --bits: 16, 32, 64, 128 or 256 "
            "(default: 64).",
            show_default=False,
        ),
    ] = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Print the perplexity too.")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window (default: 2048, or the model's positions).",
            min=1,
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="How far windows move along (default: three quarters of the context).",
            min=1,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Windows at once, at most.", min=1)
    ] = 8,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw bits per byte over size there: .png, .svg or .pdf.",
            show_default=False,
        ),
    ] = None,
    device: models.Device = None,
    dtype: DType = "auto",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts texts: bits per byte, and perplexity.

    A dense MODEL is measured as it is and then at each width, quantized anew from the
    dense weights; a quantized one as it is. Every token of the texts is counted once,
    after as many of those before it as fit in a window of --context tokens, of which
    each begins --stride tokens after the one before.
    """
    forms = _forms(bits, group_size)
    if context is not None and stride is not None and stride > context:
        raise typer.BadParameter(
            f"--stride {stride}: it is at most --context, {context}, so that no token is "
            "left out"
        )
    if picture is not None:
        _check_picture(picture)
    texts = [read(name) for name in text]
    if forms:
        _check_dense(source, revision)
    if as_json:
        no_bars()
    # What did not fit is told below the table.
    logging.getLogger("affine_tensor").setLevel(logging.ERROR)
    loaded = models.load(source, device=device, dtype=dtype, revision=revision)
    settings = {
        "context": context,
        "stride": stride,
        "batch_size": batch_size,
        "progress": sys.stderr.isatty() and not as_json,
    }
    rows = []
    for row, score in measure(loaded, texts, forms, **settings):
        rows.append(row)
        if score.unknown and len(rows) == 1:
            models.note(
                f"{score.unknown} of {score.tokens} tokens stand for what the tokenizer "
                "does not know: the figures flatter the model"
            )
    if picture is not None:
        draw(rows, picture)
    if as_json:
        emit({"source": source, "texts": text, **_counts(score), "rows": rows})
    else:
        show(rows, score, perplexity)


def _forms(
    bits: Sequence[int] | None, group_sizes: Sequence[int] | None
) -> list[tuple[int, int]]:
    from .. import layout

    if group_sizes and not bits:
        raise typer.BadParameter("--group-size goes with --bits")
    forms = [(own, group) for own in bits or [] for group in group_sizes or [64]]
    for own, group in forms:
        try:
            layout.check_format(own, group)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return list(dict.fromkeys(forms))


def _check_picture(path: Path) -> None:
    """Before anything that takes long."""
    try:
        import matplotlib.backend_bases as backends
    except ImportError as error:
        raise ImportError(
            f"--picture needs matplotlib ({error}): pip install 'affine-tensor[bench]'"
        ) from error
    known = backends.FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"--picture {path}: its name must end in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--picture {path}: there is no folder {path.parent}; make it first"
        )


def _check_dense(source: str, revision: str | None) -> None:
    from ..checkpoint import formats

    checkpoint = models.open_model(source, revision)
    if formats.recognizes(checkpoint):
        raise ValueError(
            f"{source} is quantized already, and --bits would round it twice. Leave out "
            "--bits, or evaluate the dense original"
        )


def read(name: str) -> str:
    """A text in UTF-8, with its line ends as they are; - is stdin.

    Raises ValueError for other encodings, OSError for what cannot be read.
    """
    try:
        data = read_stdin().buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise OSError(
            f"--text {name}: {error.strerror}. Name a file that can be read, or - for stdin"
        ) from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 (byte {error.start}): convert it, as iconv does"
        ) from error


# ---- measuring -------------------------------------------------------------------


def measure(
    loaded: models.Loaded,
    texts: Sequence[str],
    forms: Sequence[tuple[int, int]],
    **settings: Any,
) -> Iterator[tuple[dict[str, Any], Score]]:
    """A row for the model as it is, and one for each of `forms` (bits, group size).

    Of a row: ``bits``, ``group_size`` (null: as loaded; then ``name`` says what that is),
    ``bits_per_byte``, ``perplexity``, ``bytes`` (of the weights), ``seconds`` (of the
    evaluation), ``dense_modules`` (names that did not fit and stayed dense).
    `settings` are those of `evaluate.score`. The model is as before afterwards.
    """
    from ..quantize import AffineConfig, quantize_, slots

    name = "as it is" if loaded.packed else "dense"
    yield _row(loaded, name, None, texts, settings)
    dense = list(slots(loaded.model).values()) if forms else []
    for bits, group in forms:
        try:
            report = quantize_(
                loaded.model,
                AffineConfig(bits=bits, group_size=group),
                progress=settings.get("progress", False),
            )
            row, score = _row(loaded, f"{bits} bits", (bits, group), texts, settings)
        finally:
            for slot in dense:
                slot.put(slot.parameter)  # type: ignore[arg-type]
        yield {**row, "dense_modules": sorted(report.skipped)}, score


def _row(
    loaded: models.Loaded,
    name: str,
    form: tuple[int, int] | None,
    texts: Sequence[str],
    settings: dict[str, Any],
) -> tuple[dict[str, Any], Score]:
    from ..evaluate import score
    from ..quantize import footprint

    start = time.perf_counter()
    found = score(loaded.model, loaded.tokenizer, texts, **settings)
    seconds = time.perf_counter() - start
    bits, group = form or (None, None)
    return {
        "name": name,
        "bits": bits,
        "group_size": group,
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity,
        "bytes": footprint(loaded.model).bytes,
        "seconds": seconds,
        "dense_modules": [],
    }, found


# ---- showing ---------------------------------------------------------------------


def _counts(score: Score) -> dict[str, int]:
    return {
        "text_bytes": score.bytes,
        "tokens": score.tokens,
        "unknown_tokens": score.unknown,
    }


def show(rows: Sequence[dict[str, Any]], score: Score, perplexity: bool) -> None:
    """Print the table for people."""
    header = ["width", "group", "bits/byte", "perplexity", "MB", "seconds"]
    lines = [header] + [
        [
            row["name"],
            str(row["group_size"] or "-"),
            f"{row['bits_per_byte']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    if not perplexity:
        for line in lines:
            del line[3]
    print_table([tuple(line) for line in lines])
    for row in rows:
        if row["dense_modules"]:
            names = row["dense_modules"]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            print_text(f"{row['name']}: dense stay {', '.join(names[:3])}{more}")
    print_text("")
    print_text(f"{score.bytes:,} bytes of text, {score.tokens:,} tokens")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits per byte over the size of the weights, a line for each group size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    groups = dict.fromkeys(row["group_size"] for row in rows)
    for group in groups:
        own = sorted(
            (row for row in rows if row["group_size"] == group),
            key=lambda row: row["bytes"],
        )
        sizes = [row["bytes"] / 1e6 for row in own]
        label = None if group is None else f"groups of {group}"
        axes.plot(sizes, [row["bits_per_byte"] for row in own], "o-", label=label)
        for size, row in zip(sizes, own, strict=True):
            place = (size, row["bits_per_byte"])
            axes.annotate(row["name"], place, xytext=(5, 5), textcoords="offset points")
    axes.set_xlabel("weights, MB")
    axes.set_ylabel("bits per byte")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    if any(groups):
        axes.legend()
    figure.savefig(path, dpi=150)
