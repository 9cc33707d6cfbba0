"""`affine-tensor generate`: text from a model, as it comes."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from . import models
from .models import DType, Model, Revision
from .output import AsJson, emit, no_bars, read_stdin, say

_SEEDS = 1 << 64  # of torch

EXAMPLES = """Examples:

affine-tensor generate mlx-community/Qwen3-0.6B-4bit "Why is the sky blue?"

affine-tensor generate ./model-gptq "def fib(n):" --no-chat-template --max-tokens 64

git diff | affine-tensor generate ./model - --system "Write a commit message." """


def command(
    source: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT|-]",
            help="The text to answer or to go on with; - (or none, in a pipe): stdin.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", "-n", help="To write, at most.", min=1),
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0: always the likeliest token.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this share.")
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of sampling (default: another each time).", min=0, max=_SEEDS - 1
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="A system message for the chat template.", show_default=False
        ),
    ] = None,
    no_chat_template: Annotated[
        bool,
        typer.Option(
            "--no-chat-template",
            help="Go on with PROMPT as it is, though the tokenizer has a chat template.",
        ),
    ] = False,
    device: models.Device = None,
    dtype: DType = "auto",
    revision: Revision = None,
    attention: models.Attention = None,
    fuse: models.Fuse = False,
    compile: models.Compile = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No statistics on stderr.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write text with a model: to stdout as it comes, statistics to stderr.

    The tokenizer's chat template is used where it has one. Sampling is as the options
    say, whatever generation_config.json has of it; other settings of that file count.
    """
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"--top-p {top_p}: allowed is above 0, to 1")
    if not temperature and (top_p < 1 or seed is not None):
        name = "--top-p" if top_p < 1 else "--seed"
        raise typer.BadParameter(f"{name} needs sampling: --temperature above 0")
    text = _read(prompt)
    _check_text("--system", system or "")
    if quiet or as_json:
        no_bars()
    loaded = models.load(
        source, device=device, dtype=dtype, revision=revision, attention=attention
    )
    ids = encode(loaded.tokenizer, text, system, chat=not no_chat_template)
    if fuse:
        models.fuse(loaded)
    count = _room(loaded, len(ids), max_tokens, quiet or as_json)
    found = write(
        loaded,
        ids,
        count,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        compile=compile,
        silent=as_json,
    )
    if as_json:
        emit({"prompt": text, **found})
    elif not quiet:
        show(found)


def _read(prompt: str | None) -> str:
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise typer.BadParameter("PROMPT is missing; - reads it from stdin")
    if prompt is not None and prompt != "-":
        return _check_text("PROMPT", prompt)
    try:
        text = str(read_stdin().read())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"stdin is not {error.encoding} (byte {error.start}): convert it, as iconv does"
        ) from error
    return _check_text("stdin", text)


def _check_text(name: str, text: str) -> str:
    """Raise ValueError for bytes that are no text, which Python keeps as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 (character {error.start}): convert it, as iconv does"
        ) from error
    return text


def encode(
    tokenizer: Any, text: str, system: str | None = None, *, chat: bool = True
) -> list[int]:
    """The tokens of a prompt, in the chat template if there is one and `chat`.

    Raises ValueError for a system message without a template, and for no tokens.
    """
    if chat and tokenizer.chat_template:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        return _in_template(tokenizer, messages)
    if system is not None:
        why = (
            "--no-chat-template leaves it out" if not chat else "the tokenizer has none"
        )
        raise ValueError(
            f"--system needs a chat template: {why}. Put its text before PROMPT"
        )
    ids = list(tokenizer(text)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    if not ids:
        raise ValueError(
            "the prompt is empty, and the tokenizer has no bos_token to begin with. Give "
            "a PROMPT"
        )
    return ids


def _in_template(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    from jinja2 import TemplateError

    try:
        made = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses the prompt: {error}. Leave out --system where it "
            "takes none, or the template (--no-chat-template)"
        ) from error
    return list(made["input_ids"])


def _room(loaded: models.Loaded, prompt: int, wanted: int, silent: bool) -> int:
    """How many tokens there is room for, up to those wanted."""
    positions = loaded.positions
    if positions is None:
        return wanted
    if prompt >= positions:
        raise ValueError(
            f"the prompt is {prompt} tokens long, and the model has {positions} positions "
            "(max_position_embeddings) for it and the answer. Shorten it"
        )
    if prompt + wanted > positions and not silent:
        models.note(
            f"at most {positions - prompt} tokens: the model has {positions} positions"
        )
    return min(wanted, positions - prompt)


# ---- writing ---------------------------------------------------------------------


def streamer(tokenizer: Any, silent: bool = False) -> Any:
    """transformers' `TextStreamer` onto stdout, which notes when each token came.

    `times` has the clock's seconds of each token, `text` what was written. A line break
    ends the text where it has none itself.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []
            self.text = ""

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            if not silent:
                ends = stream_end and not self.text.endswith("\n")
                print(text, end="\n" if ends else "", flush=True)

    return Streamer()


def write(
    loaded: models.Loaded,
    ids: list[int],
    count: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    compile: bool = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Write up to `count` tokens after `ids`, and return what `--json` prints of it.

    ``text``; ``finish``: "stop" (an end token) or "length"; ``seed``: null if greedy;
    ``prompt_tokens`` and ``tokens`` (counts, an end token included);
    ``seconds_to_first_token``; ``prompt_tokens_per_second``;
    ``tokens_per_second``: of decoding, after the first, or null; ``load_seconds``;
    ``peak_bytes``: see `models.peak_memory`; ``device``; ``compiled``:
    speeds then include the compiling.
    """
    import torch

    model = loaded.model
    stream = streamer(loaded.tokenizer, silent)
    seed = _seed(seed) if temperature else None
    more = models.compiled(model, len(ids) + count) if compile else {}
    prompt = torch.tensor([ids], device=model.device)
    start = time.perf_counter()
    try:
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            streamer=stream,
            **_sampling(temperature, top_p),
            **more,
        )
    except KeyboardInterrupt:
        if not silent and stream.text:
            print(flush=True)  # what comes next is not of the text
        raise
    tokens = made[0, len(ids) :].tolist()
    first, last = stream.times[0] - start, stream.times[-1] - stream.times[0]
    ends = model.generation_config.eos_token_id
    ended = tokens[-1] in (ends if isinstance(ends, list) else [ends])
    return {
        "text": stream.text,
        "finish": "stop" if ended else "length",
        "seed": seed,
        "prompt_tokens": len(ids),
        "tokens": len(tokens),
        "seconds_to_first_token": first,
        "prompt_tokens_per_second": len(ids) / first,
        "tokens_per_second": (len(tokens) - 1) / last if len(tokens) > 1 else None,
        "load_seconds": loaded.seconds,
        "peak_bytes": models.peak_memory(loaded.kind),
        "device": str(model.device),
        "compiled": compile,
    }


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    if not temperature:
        return {"do_sample": False, "num_beams": 1}
    # 0: no limit, which a generation_config.json may set.
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": 0,
    }


def _seed(seed: int | None) -> int:
    import secrets

    import torch

    if seed is None:  # torch begins with the same each time
        seed = secrets.randbelow(1 << 32)
    torch.manual_seed(seed)
    return seed


def show(found: dict[str, Any]) -> None:
    """Print the statistics on stderr."""
    speed, peak = found["tokens_per_second"], found["peak_bytes"]
    lines = [
        f"prompt: {found['prompt_tokens']} tokens, "
        f"{found['prompt_tokens_per_second']:.1f} tokens/s; first token after "
        f"{found['seconds_to_first_token']:.3f} s",
        f"decode: {found['tokens']} tokens"
        + ("" if speed is None else f", {speed:.1f} tokens/s")
        + (" (compiling included)" if found["compiled"] else ""),
        f"loaded in {found['load_seconds']:.2f} s"
        + ("" if peak is None else f"; peak memory {peak / 1e6:,.0f} MB"),
    ]
    if found["seed"] is not None:
        lines.append(f"seed: {found['seed']}")
    say("\n".join(lines))
