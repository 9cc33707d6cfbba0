"""`affine-tensor inspect`: what a checkpoint is, by its headers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import (
    AsJson,
    emit,
    no_bars,
    print_facts,
    print_table,
    print_text,
    shortened,
)

if TYPE_CHECKING:
    from ..checkpoint.files import Checkpoint
    from ..checkpoint.inspection import Format, Outlook, Stock

EXAMPLES = """Examples:

affine-tensor inspect ./Qwen3-0.6B-4bit

affine-tensor inspect mlx-community/Qwen3-0.6B-4bit --json

affine-tensor inspect ./model --modules | grep lm_head"""


def paths(incomplete: str) -> list[str]:
    """Folders that begin so, for the shell."""
    import glob
    import os

    shell = os.environ.get("_AFFINE_TENSOR_COMPLETE", "")
    if shell.endswith(("bash", "zsh")):
        return []  # they then complete files themselves, into folders and with quotes
    found = glob.glob(f"{glob.escape(os.path.expanduser(incomplete))}*")
    return sorted(f"{path}/" for path in found if os.path.isdir(path))


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH|ID",
            help="A folder, or a repository of the Hub (organization/name).",
            autocompletion=paths,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of the repository.", show_default=False
        ),
    ] = None,
    modules: Annotated[
        bool,
        typer.Option("--modules", help="A row for each weight, not for each kind."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is and what loading would make of it.

    Only headers and JSON files are read, of a repository too: no weights are downloaded.
    The exit code is 1 where loading would refuse the checkpoint.
    """
    found = look_at(source, revision)
    if as_json:
        emit(as_object(found, modules))
    else:
        show(found, modules)
    if found.outlook.refused:
        raise typer.Exit(1)


class Found:
    """What is known of a checkpoint."""

    def __init__(
        self,
        source: str,
        checkpoint: Checkpoint,
        format: Format,
        outlook: Outlook,
        stock: Stock,
        model: Any,
        unknown: str,
        understood: bool,
    ) -> None:
        self.source, self.checkpoint, self.format = source, checkpoint, format
        self.outlook, self.stock = outlook, stock
        self.model_class = None if model is None else type(model).__name__
        self.unknown = unknown  # why there is no model
        self.understood = understood  # the sizes are those of weights, not of words


def look_at(source: str, revision: str | None = None) -> Found:
    """Read the headers, and plan a load into the model that transformers has for them.

    Raises CheckpointError for a checkpoint that is broken, and what `fetch` raises.
    """
    from ..checkpoint import inspection
    from ..checkpoint.files import CheckpointError
    from ..checkpoint.remote import open_headers

    no_bars()  # of a few small files
    checkpoint = open_headers(source, revision=revision)
    form = inspection.format_of(checkpoint)
    model, unknown = None, ""
    if form.readable:
        model, unknown = _model_of(checkpoint)
    outlook = inspection.outlook(checkpoint, model)
    understood = form.readable
    try:
        stock = inspection.take_stock(checkpoint, outlook.plan)
    except CheckpointError:  # which the outlook has told
        stock, understood = inspection.unread(checkpoint), False
    if stock.broken and outlook.plan is None:
        understood = False
    if adapter := _adapter_beside(checkpoint):
        outlook = replace(outlook, refused=adapter)
    return Found(source, checkpoint, form, outlook, stock, model, unknown, understood)


def _adapter_beside(checkpoint: Checkpoint) -> str:
    """Why an adapter of PEFT keeps the weights from being loaded; "" if there is none."""
    if not (checkpoint.folder / "adapter_config.json").exists():
        return ""
    from ..hf.pretrained import refuse_adapter

    try:
        refuse_adapter(checkpoint.folder)
    except ValueError as error:
        return str(error)
    return ""


def _model_of(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The model without weights; or None, and why there is none."""
    if not checkpoint.config.get("model_type"):
        return None, "config.json has no model_type"
    try:
        from ..hf.skeleton import skeleton

        return skeleton(checkpoint), ""
    except Exception as error:  # of all kinds: configurations are anybody's
        text = " ".join(str(error).split())
        known = checkpoint.config["model_type"]
        return None, f"transformers makes no model of model_type {known!r} ({text})"


# ---- as JSON ---------------------------------------------------------------------


def as_object(found: Found, modules: bool) -> dict[str, Any]:
    """The object that `--json` prints. Its keys stay as they are; new ones may come.

    ``source``, ``folder`` (of a repository its snapshot in the cache)
    ``format``: ``name`` (mlx, metal, gptq, awq, compressed-tensors, dense, or another
        quant_method), ``settings`` (the general ones), ``overrides`` (count), ``readable``
    ``model_type``, ``architectures``: as config.json says
    ``files``: a list of ``name``, ``bytes`` (of tensors), ``tensors`` (count)
    ``tensors``, ``bytes``, ``weights``: counts; ``bits_per_weight``: null where the
        format is not known
    ``kinds``: weights that are alike: ``name`` (with * for numbers), ``count``, ``shape``,
        ``bits``, ``group_size`` (null: dense), ``bytes``, ``bits_per_weight``
    ``modules``: with `--modules` each weight, with the same keys but ``count``
    ``loading``: ``model`` (class of transformers, null: names alone were judged),
        ``why_no_model``, ``packed`` and ``dense`` (counts), ``notes`` (names by reason),
        ``ignored`` (names), ``guessed`` (names whose bits no setting says)
    ``refused``: why a load would be refused, or null
    """
    sizes, outlook = found.stock.sizes, found.outlook
    config, plan = found.checkpoint.config, outlook.plan
    value: dict[str, Any] = {
        "source": found.source,
        "folder": str(found.checkpoint.folder),
        "format": vars(found.format),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "files": _files(found.checkpoint),
        "tensors": len(found.checkpoint.tensors),
        "bytes": found.checkpoint.nbytes,
        "weights": sizes.parameters,
        "bits_per_weight": _bits_per_weight(found),
        "kinds": [
            {"name": name, "count": len(rows), **_row(rows)}
            for name, rows in _kinds(sizes)
        ],
        "loading": {
            "model": found.model_class,
            "why_no_model": found.unknown or None,
            "packed": outlook.packed,
            "dense": outlook.dense,
            "notes": outlook.notes,
            "ignored": plan.ignored if plan else [],
            "guessed": found.stock.guessed,
        },
        "refused": outlook.refused or None,
    }
    if modules:
        value["modules"] = [{"name": r.name, **_row([r])} for r in sizes.rows]
    return value


def _row(rows: list[Any]) -> dict[str, Any]:
    first = rows[0]
    return {
        "shape": list(first.shape),
        "bits": first.bits,
        "group_size": first.group_size,
        "bytes": sum(row.bytes for row in rows),
        "bits_per_weight": first.bits_per_weight,
    }


def _kinds(sizes: Any) -> list[tuple[str, list[Any]]]:
    from ..quantize import _pattern, _rows_alike

    return [
        (_pattern(rows[0].name) if len(rows) > 1 else rows[0].name, rows)
        for rows in _rows_alike(sizes.rows)
    ]


def _files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    sizes: dict[str, list[int]] = {file.name: [] for file in checkpoint.files}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.file.name].append(tensor.nbytes)
    return [
        {"name": name, "bytes": sum(own), "tensors": len(own)}
        for name, own in sizes.items()
    ]


def _bits_per_weight(found: Found) -> float | None:
    weights = found.stock.sizes.parameters
    if not found.understood or not weights:
        return None
    return 8 * found.checkpoint.nbytes / weights


# ---- as text ---------------------------------------------------------------------


def show(found: Found, modules: bool) -> None:
    """Print it for people."""
    config, sizes = found.checkpoint.config, found.stock.sizes
    named = ", ".join(config.get("architectures") or []) or "none named"
    files, each = found.checkpoint.files, _bits_per_weight(found)
    more = f" to {files[-1].name}" if len(files) > 1 else ""
    facts = [
        ("checkpoint", found.source),
        ("format", str(found.format)),
        ("architecture", f"{named} (model_type {config.get('model_type')})"),
        ("files", f"{len(files)}: {files[0].name}{more}"),
        ("bytes", f"{found.checkpoint.nbytes:,} ({_size(found.checkpoint.nbytes)})"),
        ("weights", f"{sizes.parameters:,}"),
        (
            "bits/weight",
            "unknown: the format is not read" if each is None else f"{each:.3f}",
        ),
    ]
    print_facts(facts)
    print_text("")
    _show_table(found, modules)
    print_text("")
    for text, style in _loading(found):
        print_text(text, style)


def _show_table(found: Found, modules: bool) -> None:
    rows = [("module", "count", "shape", "bits", "group", "bytes", "bits/weight")]
    sizes = found.stock.sizes
    kinds = [(r.name, [r]) for r in sizes.rows] if modules else _kinds(sizes)
    for name, alike in kinds:
        first = alike[0]
        rows.append(
            (
                name,
                str(len(alike)),
                "x".join(map(str, first.shape)) or "1",
                str(first.bits),
                "-" if first.group_size is None else str(first.group_size),
                f"{sum(row.bytes for row in alike):,}",
                f"{first.bits_per_weight:.2f}",
            )
        )
    total, each = f"{sizes.parameters:,}", _bits_per_weight(found)
    last = "" if each is None else f"{each:.2f}"
    rows.append(
        ("total", str(len(sizes.rows)), total, "", "", f"{sizes.bytes:,}", last)
    )
    print_table(rows, total=True)


def _loading(found: Found) -> list[tuple[str, str]]:
    """What a load would do, as lines and their styles."""
    outlook = found.outlook
    if outlook.refused:
        why = "\n".join(shortened(outlook.refused.splitlines(), "--json has all"))
        return [(f"Loading would be refused: {why}", "red")]
    if found.format.name == "dense":
        text = "Dense: nothing is packed. affine-tensor convert quantizes it."
        notes = [(f"{_named(n)}: {why}", "red") for why, n in outlook.notes.items()]
        return [(text, "yellow"), *notes]
    into = f"into {found.model_class}" if found.model_class else "by names alone"
    lines = [
        (
            f"Loading {into}: {outlook.packed:,} stay packed, {outlook.dense:,} are dense.",
            "green",
        )
    ]
    if found.unknown:
        lines.append((f"Not checked against a model: {found.unknown}.", "yellow"))
    for text, names in outlook.notes.items():
        lines.append((f"{_named(names)}: {text}", ""))
    if outlook.plan and outlook.plan.ignored:
        lines.append((f"Not needed by the model: {_named(outlook.plan.ignored)}", ""))
    if found.stock.guessed:
        text = "config.json does not say their bits and group size; these are likely"
        lines.append((f"{_named(found.stock.guessed)}: {text}", "yellow"))
    return lines


def _named(names: list[str]) -> str:
    """Names of which those of all layers are one: as a footprint prints them."""
    from ..quantize import _pattern

    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(_pattern(name), []).append(name)
    short = [p if len(n) > 1 else n[0] for p, n in counts.items()]
    more = f" and {len(short) - 4} more" if len(short) > 4 else ""
    return f"{', '.join(short[:4])}{more}" + (
        f" ({len(names)})" if len(names) > len(short) else ""
    )


def _size(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.4g} {units[0]}"
