"""A training step of LoRA: packed weights beside dense ones and bitsandbytes' nf4.

    python benchmarks/lora.py [--json lora.json --markdown lora.md]
    python benchmarks/lora.py --layers 4 --batches 1 --time-limit 120
    python benchmarks/lora.py --device cpu --tiny

A Llama of random weights (the shapes of 8B, 8 layers) is made and saved once, in
bfloat16; each contestant loads that, gets the same adapters (rank 16 on all linear layers
but the head, AdamW) and is freed before the next comes. A step is forward, backward and
update under bfloat16 autocast. Memory is torch's own count: what is held before the steps,
and the most during one.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import shlex
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cpu_machine
import cuda_machine
import torch
from common import save
from cpu_contestants import Missing
from cpu_report import markdown
from cuda_clock import wait
from cuda_contestants import reason_of
from peers_files import BITS, GROUP, Size, config_of
from torch import nn

import affine_tensor

SIZES = {
    "8b": Size(8, 4096, 32, 8, 14336, 128256),
    # To see that it works.
    "tiny": Size(2, 128, 4, 2, 256, 512),
}
RANK = 16
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _options(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here, or torch does not see it")
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/lora.py", *given]),
        "date": datetime.date.today().isoformat(),
        "machine": cuda_machine.machine(options.device),
        "versions": {
            "affine-tensor": affine_tensor.__version__,
            **cpu_machine.versions(PACKAGES),
        },
    }
    measure(options, figures)
    print(report(figures))
    if "ours" in figures["missing"]:
        raise SystemExit(f"ours: {figures['missing']['ours']}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, help="of the model (default: 8)")
    add("--hidden", type=int, help="its width, with an MLP of 3.5 times that")
    add("--tiny", action="store_true", help="a model to see that it works")
    add("--only", nargs="+", choices=list(ENTRIES), help="these contestants")
    add("--batches", type=int, nargs="+", default=[1, 4])
    add("--length", type=int, help="tokens of a sequence (default: 512; tiny: 32)")
    add("--rounds", type=int, default=5, help="steps timed, after two that are not")
    add("--time-limit", type=float, metavar="S", help="seconds; the rest is left out")
    add("--json", help="write the figures there")
    add("--markdown", help="write the tables there")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    for path in filter(None, (options.json, options.markdown)):
        if not Path(path).resolve().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    numbers = [options.rounds, *options.batches]
    numbers += [n for n in (options.layers, options.hidden, options.length) if n]
    if min(numbers) < 1:
        parser.error("layers, hidden, length, batches and rounds are positive")
    if options.hidden and options.hidden % 128:
        parser.error("hidden is whole heads of 128")
    options.length = options.length or (32 if options.tiny else 512)
    return options


def _size(options: argparse.Namespace) -> Size:
    size = SIZES["tiny" if options.tiny else "8b"]
    if options.hidden:
        heads = options.hidden // 128
        shared = max(n for n in (1, 2, 4) if heads % n == 0)  # heads to a key
        wide = options.hidden * 7 // 2 // 64 * 64
        size = replace(size, hidden=options.hidden, heads=heads, mlp=wide)
        size = replace(size, kv_heads=heads // shared)
    return replace(size, layers=options.layers) if options.layers else size


# ---- contestants ----------------------------------------------------------------


def _load(folder: Path, kind: str, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=kind, **how
    )


def ours(folder: Path, kind: str) -> Any:
    affine_tensor.register()
    config = affine_tensor.AffineQuantizationConfig(bits=BITS, group_size=GROUP)
    return _load(folder, kind, quantization_config=config)


def _nf4(folder: Path, kind: str) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise Missing("not installed") from error
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return _load(folder, kind, quantization_config=config)


def _as_peft(model: Any, checkpointing: bool) -> Any:
    """PEFT's own preparation, which casts what is not packed to float32."""
    from peft import prepare_model_for_kbit_training

    settings = {"use_reentrant": False}
    return prepare_model_for_kbit_training(model, checkpointing, settings)


def _as_ours(model: Any, checkpointing: bool) -> Any:
    return affine_tensor.prepare_for_lora(model, gradient_checkpointing=checkpointing)


@dataclass(frozen=True)
class Entry:
    """Who takes part."""

    label: str
    load: Callable[[Path, str], Any]
    prepare: Callable[[Any, bool], Any] = _as_ours


ENTRIES = {
    "ours": Entry("ours, 4 bits, group 64", ours),
    "dense": Entry("dense bfloat16", _load),
    "nf4": Entry("bitsandbytes nf4", _nf4),
    "nf4-peft": Entry(
        "bitsandbytes nf4, prepare_model_for_kbit_training", _nf4, _as_peft
    ),
}


# ---- measuring ------------------------------------------------------------------


def measure(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Fill in all figures, and write them after each contestant."""
    size = _size(options)
    figures |= {
        "model": str(size),
        "settings": {
            "rank": RANK,
            "length": options.length,
            "batches": options.batches,
            "rounds": options.rounds,
        },
        "results": [],
        "missing": {},
    }
    deadline = time.monotonic() + (options.time_limit or math.inf)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _say("making the checkpoint")
        _write_dense(folder, size, options.device)
        _forget()
        for name in options.only or ENTRIES:
            _say(name)
            try:
                result = _contestant(name, folder, options, deadline)
                figures["results"].append(result)
            except Missing as error:
                figures["missing"][name] = str(error)
            except Exception as error:  # peers raise all kinds
                traceback.print_exc()
                figures["missing"][name] = reason_of(error)
            _forget()
            save(options.json, figures)
            if options.markdown:
                Path(options.markdown).write_text(report(figures), encoding="utf-8")


def _write_dense(folder: Path, size: Size, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(kind):
        model = AutoModelForCausalLM.from_config(config_of(size), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _contestant(
    name: str, folder: Path, options: argparse.Namespace, deadline: float
) -> dict[str, Any]:
    entry = ENTRIES[name]
    result: dict[str, Any] = {
        "name": name,
        "label": entry.label,
        "steps": {},
        "notes": [],
    }
    for checkpointing in (False, True):
        if time.monotonic() > deadline:
            result["notes"].append("the time limit was reached")
            break
        # Loaded anew, since preparing a model changes it.
        model = _adapted(entry, folder, options.device, checkpointing)
        result.setdefault("held", _allocated(options.device))
        result.setdefault("trained", _count(model))
        for batch in options.batches:
            if time.monotonic() > deadline:
                result["notes"].append("the time limit was reached")
                break
            what = f"{batch} x {options.length}"
            what += ", checkpointing" if checkpointing else ""
            try:
                result["steps"][what] = _steps(model, batch, options)
            except torch.OutOfMemoryError as error:
                result["notes"].append(f"{what}: {reason_of(error)}")
            _forget()
        del model
        _forget()
    return result


def _adapted(entry: Entry, folder: Path, kind: str, checkpointing: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = entry.prepare(entry.load(folder, kind), checkpointing)
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    found: nn.Module = get_peft_model(model, config)
    return found.train()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _steps(model: nn.Module, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, its peak memory, and the losses on the way."""
    kind = options.device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    torch.manual_seed(2)
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(vocabulary, (batch, options.length)).to(kind)  # type: ignore

    def step() -> float:
        with torch.autocast(kind, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(kind)
        return float(loss.detach())

    seconds, losses = [], []
    for i in range(2 + options.rounds):
        if i == 2 and kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(kind)
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if kind == "cuda" else None
    busy, longest = _profile(step) if kind == "cuda" else (None, {})
    _say(f"  {batch}: {statistics.median(seconds[2:]):.3f} s, losses {losses}")
    return {
        "seconds": seconds[2:],
        "peak": peak,
        "losses": losses,
        "busy": busy,
        "longest": longest,
    }


def _profile(step: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Seconds of all kernels of a step together, and those that take longest."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        times[event.key[:80]] = event.self_device_time_total / 1e6
    longest = sorted(times.items(), key=lambda item: -item[1])[:12]
    return sum(times.values()), dict(longest)


def _allocated(kind: str) -> int | None:
    _forget()
    return torch.cuda.memory_allocated() if kind == "cuda" else None


def _forget() -> None:
    """Give back what the last model took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


# ---- report ---------------------------------------------------------------------


def report(figures: dict[str, Any]) -> str:
    settings = figures["settings"]
    text = (
        f"# A training step of LoRA\n\n{cuda_machine.headline(figures)}\n\n"
        f"{figures['model']}; adapters of rank {settings['rank']} on all linear layers "
        "but the head, AdamW, bfloat16 autocast, one checkpoint for all. Seconds: median "
        f"of {settings['rounds']} steps. Peak: the most that torch had allocated during "
        "them; held: before them, adapters included. Of kernels: the sum of their times in "
        "one more step, under the profiler; the rest of a step waits for the host.\n\n"
    )
    kinds = list(dict.fromkeys(w for one in figures["results"] for w in one["steps"]))
    head = ["", "held GB"]
    for what in kinds:
        head += [f"{what}: peak GB", "s", "of kernels"]
    lines = [[*head, "first loss"]]
    for one in figures["results"]:
        line = [one["label"], _gigabytes(one.get("held"))]
        for what in kinds:
            step = one["steps"].get(what)
            median = f"{statistics.median(step['seconds']):.3f}" if step else ""
            busy = f"{step['busy']:.3f}" if step and step.get("busy") else ""
            line += [_gigabytes(step["peak"]) if step else "", median, busy]
        first = next(iter(one["steps"].values()), None)
        lines.append([*line, f"{first['losses'][0]:.3f}" if first else ""])
    for name, why in figures["missing"].items():
        lines.append([ENTRIES[name].label, why, *[""] * (3 * len(kinds) + 1)])
    notes = [
        f"- {one['label']}: {n}" for one in figures["results"] for n in one["notes"]
    ]
    return text + markdown(lines) + "\n" + "\n".join(["", *notes] if notes else [])


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
