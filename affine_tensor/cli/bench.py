"""`affine-tensor bench`: how fast a model reads and writes, and beside what."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from . import models
from .many import Spread
from .models import DType, Model, Revision
from .output import AsJson, emit, no_bars, print_facts, print_table, print_text

CLASS = Spread

EXAMPLES = """Examples:

affine-tensor bench ./model-4bit

affine-tensor bench ./model-4bit --prompt-tokens 128 512 2048 --decode 128 --compile

affine-tensor bench ./model-4bit --peer mlx-lm dense --json"""

OURS = "affine-tensor"
PEERS = ("mlx-lm", "dense")


def _known(names: list[str] | None) -> list[str] | None:
    for name in names or []:
        if name not in PEERS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(PEERS)}")
    return names


def command(
    source: Model,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N ...",
            help="To read, of each sequence (default: 128 512).",
            min=1,
            show_default=False,
        ),
    ] = None,
    decode: Annotated[
        int, typer.Option(help="Tokens to write after the first.", min=1)
    ] = 64,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="That count, after one.", min=1)] = 3,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME ...",
            help="Measure it too: mlx-lm (the same files), dense (the same weights, "
            "dequantized).",
            callback=_known,
            show_default=False,
        ),
    ] = None,
    device: models.Device = None,
    dtype: DType = "auto",
    revision: Revision = None,
    attention: models.Attention = None,
    fuse: models.Fuse = False,
    compile: models.Compile = False,
    as_json: AsJson = False,
) -> None:
    """Time prompts and decoding: medians over rounds, with the least and the most.

    Each round reads a prompt up to the first token, and writes greedily, with
    transformers' `generate`; end tokens end nothing. Nothing else should run meanwhile.
    With --peer each runs in a process of its own, one after the other.
    """
    job: dict[str, Any] = {
        "source": source,
        "prompt_tokens": list(dict.fromkeys(prompt_tokens or [128, 512])),
        "decode": decode,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "attention": attention,
        "fuse": fuse,
        "compile": compile,
    }
    if as_json:
        no_bars()
    names = list(dict.fromkeys(peer or []))
    if names:
        results, missing = _one_by_one(job, [OURS, *names])
    else:
        results, missing = [run({**job, "name": OURS})], {}
    if as_json:
        emit({**job, "results": results, "missing": missing})
    else:
        show(job, results, missing)


def _one_by_one(
    job: dict[str, Any], names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What each contestant's process found, and why others found nothing."""
    results: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    code = "from affine_tensor.cli.bench import serve; serve()"
    for name in names:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps({**job, "name": name}),
            capture_output=True,
            text=True,
        )
        # The last line, as libraries print too.
        answer = (done.stdout.strip().splitlines() or [""])[-1]
        try:
            found = json.loads(answer)
        except ValueError:
            last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            found = {"error": f"its process ended with {done.returncode}: {last}"}
        if name == OURS and "error" not in found:
            sys.stderr.write(done.stderr)  # notes
        if "error" not in found:
            results.append(found)
        elif found.get("usage"):
            raise typer.BadParameter(found["error"])
        elif name == OURS:
            raise RuntimeError(found["error"])
        else:
            missing[name] = found["error"]
    return results, missing


def serve() -> None:
    """One contestant's process: a job from stdin, and what it found, or why not."""
    from .output import calm, in_a_line, is_usage

    calm()
    job = json.load(sys.stdin)
    try:
        found = run(job)
    except Exception as error:  # of any library
        found = {"error": in_a_line(error), "usage": is_usage(error)}
    print(f"\n{json.dumps(found)}")


# ---- measuring -------------------------------------------------------------------


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one contestant.

    ``name``; ``device``; ``load_seconds``; ``peak_bytes`` (see `models.peak_memory`;
    of all of the run); ``rows``: for each number of ``prompt_tokens`` ``prefill`` and
    ``decode``, in tokens per second of all sequences together, with ``median``,
    ``least``, ``most`` and ``values``.
    """
    made_by = MlxLm if job["name"] == "mlx-lm" else Transformers
    contestant = made_by(job)
    rows = []
    for count in job["prompt_tokens"]:
        prefill, decode = [], []
        for number in range(job["rounds"] + 1):
            first, rest = contestant.time(count)
            if number:  # the first compiles kernels, and fills caches
                prefill.append(job["batch"] * count / first)
                decode.append(job["batch"] * job["decode"] / rest)
        rows.append(
            {
                "prompt_tokens": count,
                "prefill": _summary(prefill),
                "decode": _summary(decode),
            }
        )
    return {
        "name": job["name"],
        "device": contestant.device,
        "load_seconds": contestant.load_seconds,
        "peak_bytes": contestant.peak_bytes(),
        "rows": rows,
    }


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "values": values,
    }


def _ids(count: int, vocabulary: int, row: int = 0) -> list[int]:
    return [(37 * i + 11 * (row + 1)) % vocabulary for i in range(count)]


class Transformers:
    """Ours, or the dense twin, with stock `generate`."""

    def __init__(self, job: dict[str, Any]) -> None:
        from transformers import GenerationConfig

        self.job = job
        if job["name"] == "dense" and not _is_packed(job):
            raise ValueError("MODEL is dense itself")
        self.loaded = models.load(
            job["source"],
            device=job["device"],
            dtype=job["dtype"],
            revision=job["revision"],
            attention=job["attention"],
            tokenizer=False,
            dense=job["name"] == "dense",
        )
        self.load_seconds = self.loaded.seconds
        model, positions = self.loaded.model, self.loaded.positions
        longest = max(job["prompt_tokens"]) + job["decode"] + 1
        if positions is not None and longest > positions:
            raise ValueError(
                f"{longest} tokens (--prompt-tokens and --decode) are more than the "
                f"{positions} positions that the model has (max_position_embeddings)"
            )
        if job["fuse"]:
            models.fuse(self.loaded)
        # No end token: all rounds write as many tokens.
        model.generation_config = GenerationConfig(pad_token_id=0)
        self.device = str(model.device)
        self.vocabulary = model.config.get_text_config().vocab_size

    def time(self, count: int) -> tuple[float, float]:
        """Seconds to the first token, and from there to the last."""
        import torch

        model, batch, new = (
            self.loaded.model,
            self.job["batch"],
            self.job["decode"] + 1,
        )
        rows = [_ids(count, self.vocabulary, row) for row in range(batch)]
        prompt = torch.tensor(rows, device=model.device)
        compiles = self.job["compile"]
        more = models.compiled(model, count + new) if compiles else {}
        clock = _clock()
        start = time.perf_counter()
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            streamer=clock,
            **more,
        )
        if made.shape[1] != count + new:
            raise RuntimeError(
                f"generate wrote {made.shape[1] - count} tokens where {new} were asked for"
            )
        # The streamer's first is the prompt itself.
        return clock.times[1] - start, clock.times[-1] - clock.times[1]

    def peak_bytes(self) -> int | None:
        return models.peak_memory(self.loaded.kind)


def _is_packed(job: dict[str, Any]) -> bool:
    from ..checkpoint import formats

    return formats.recognizes(models.open_model(job["source"], job["revision"]))


def _clock() -> Any:
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when tokens are there; they are on the CPU then."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    return Clock()


class MlxLm:
    """mlx-lm with the same files, on the same kind of device."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        if job["batch"] != 1:
            raise ValueError("mlx-lm is measured with one sequence: --batch 1")
        try:
            import mlx.core as mx
        except ImportError as error:
            raise ImportError(
                f"mlx-lm is not here ({error}): pip install mlx-lm"
            ) from error
        if job["device"] == "cpu" or (job["device"] is None and not _has_gpu(mx)):
            mx.set_default_device(mx.cpu)  # before mlx_lm picks a stream
        try:
            from mlx_lm.utils import load_model
        except ImportError as error:
            raise ImportError(
                f"mlx-lm is not here ({error}): pip install mlx-lm"
            ) from error
        folder = models.open_model(job["source"], job["revision"]).folder
        start = time.perf_counter()
        self.model, config = load_model(folder)
        self.load_seconds = time.perf_counter() - start
        self.device = "gpu" if mx.default_device() == mx.gpu else "cpu"
        text = config.get("text_config") or config
        self.vocabulary = int(text["vocab_size"])

    def time(self, count: int) -> tuple[float, float]:
        """Seconds to the first token, and from there to the last."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        ids, times = mx.array(_ids(count, self.vocabulary)), []
        new = self.job["decode"] + 1
        start = time.perf_counter()
        for _token, _ in generate_step(ids, self.model, max_tokens=new):
            times.append(time.perf_counter())
        mx.synchronize()  # it has begun one token more
        return times[0] - start, times[-1] - times[0]

    def peak_bytes(self) -> int | None:
        import mlx.core as mx

        if mx.default_device() == mx.gpu:
            return int(mx.get_peak_memory())
        return models.peak_memory("cpu")


def _has_gpu(mx: Any) -> bool:
    return bool(mx.metal.is_available() or mx.cuda.is_available())


# ---- showing ---------------------------------------------------------------------


def show(
    job: dict[str, Any], results: Sequence[dict[str, Any]], missing: dict[str, str]
) -> None:
    """Print the table for people."""
    facts = [("model", job["source"])]
    for found in results:
        peak = found["peak_bytes"]
        memory = "" if peak is None else f", peak memory {peak / 1e6:,.0f} MB"
        where = f"{found['device']}, loaded in {found['load_seconds']:.2f} s{memory}"
        facts.append((found["name"], where))
    print_facts(facts)
    print_text("")
    rows = [("", "prompt", "prefill, tokens/s", "decode, tokens/s")]
    rows += [
        (
            found["name"],
            str(row["prompt_tokens"]),
            _spread(row["prefill"]),
            _spread(row["decode"]),
        )
        for found in results
        for row in found["rows"]
    ]
    print_table(rows)
    for name, why in missing.items():
        print_text(f"{name}: not measured: {why}", "yellow")
    print_text("")
    sequences = "1 sequence" if job["batch"] == 1 else f"{job['batch']} sequences"
    rounds = "1 round" if job["rounds"] == 1 else f"{job['rounds']} rounds"
    print_text(
        f"{sequences}, {job['decode']} tokens decoded; medians of {rounds} "
        "(least to most)"
    )


def _spread(summary: dict[str, Any]) -> str:
    return f"{summary['median']:.1f} ({summary['least']:.1f} to {summary['most']:.1f})"
