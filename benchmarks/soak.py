"""Whether memory grows: a small packed model generates and is trained, for long.

    python benchmarks/soak.py --minutes 30 [--json soak.json] [--device cuda]

In turns the model of examples/stdlib-6m-4bit continues prompts of several lengths, with
a dynamic and with a static cache, and its adapters (LoRA, AdamW) are trained a step at
several lengths. After every few rounds, and a garbage collection, a sample is taken: the
memory of the process (RSS), the tensors that Python holds and their bytes, open files,
and on a GPU what torch has allocated and reserved.

The first fifth of the time is warm-up. Of what is left the median over the first quarter
is compared with that over the last. It fails (exit status 1) if any grew by more than

    RSS                16 MiB or 4 %, whichever is more (a C allocator's pools fluctuate)
    reserved on a GPU  16 MiB or 4 %, alike
    allocated there    1 MiB (torch counts exactly)
    tensors            2, and their bytes 1 MiB
    open files         1
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cpu_machine
import cuda_machine
import psutil
import torch
from common import save
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import is_fake

import affine_tensor
from affine_tensor.quantize import format_table

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "stdlib-6m-4bit"
MIB = 1 << 20
# Of each figure: how much it may grow, and which part of itself. The larger counts.
ALLOWED: dict[str, tuple[int, float]] = {
    "rss": (16 * MIB, 0.04),
    "tensors": (2, 0.0),
    "tensor_bytes": (MIB, 0.0),
    "files": (1, 0.0),
    "cuda_allocated": (MIB, 0.0),
    "cuda_reserved": (16 * MIB, 0.04),
}
WARM_UP = 0.2  # of the time
FEWEST = 8  # samples after the warm-up
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Sample:
    """What the process holds after a round; bytes, and counts."""

    round: int
    seconds: float
    rss: int
    tensors: int
    tensor_bytes: int
    files: int
    cuda_allocated: int = 0
    cuda_reserved: int = 0


@dataclass(frozen=True)
class Growth:
    """Medians of a figure early and late, and what it may grow by."""

    early: float
    late: float
    allowed: float

    @property
    def fails(self) -> bool:
        return self.late - self.early > self.allowed


def main(
    arguments: Sequence[str] | None = None,
    planted: Callable[[], object] | None = None,
) -> None:
    """`planted` is called in every round: a test's leak."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _options(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here, or torch does not see it")
    if options.threads:
        torch.set_num_threads(options.threads)
    samples = soak(options, planted)
    found = growth(samples)
    print(table(found))
    last = samples[-1]
    print(f"{last.round} rounds in {last.seconds / 60:.1f} minutes")
    _write(options, given, samples, found)
    if bad := [name for name, one in found.items() if one.fails]:
        raise SystemExit(f"memory grows: {', '.join(bad)}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=30)
    add("--every", type=int, default=4, help="rounds from sample to sample")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="of torch on the CPU")
    add("--model", type=Path, default=CHECKPOINT, help="a packed checkpoint")
    add("--json", help="write all samples there")
    return parser.parse_args(arguments)


# ---- work ------------------------------------------------------------------------


def soak(
    options: argparse.Namespace, planted: Callable[[], object] | None = None
) -> list[Sample]:
    """Work until the time is over, and until there are samples enough to compare."""
    work = rounds(options.model, options.device)
    samples: list[Sample] = []
    start = time.perf_counter()
    seconds, shown = 60 * options.minutes, 0.0
    for count in itertools.count(1):
        next(work)
        if planted is not None:
            planted()
        if count % options.every:
            continue
        passed = time.perf_counter() - start
        samples.append(sample(count, passed, options.device))
        if passed - shown > 60:
            print(f"{passed:.0f} s: {samples[-1].rss / MIB:.0f} MiB", flush=True)
            shown = passed
        if passed >= seconds and len(_settled(samples)) >= FEWEST:
            return samples
    raise AssertionError("count ends never")


def rounds(checkpoint: Path, device: str) -> Iterator[None]:
    """One piece of work after the other, without end; the lengths repeat."""
    torch.manual_seed(0)
    base = affine_tensor.from_pretrained(checkpoint).to(device)
    affine_tensor.prepare_for_lora(base, gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary = base.config.vocab_size

    def ids(batch: int, length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (batch, length), device=device)

    kinds = itertools.cycle(["dynamic", "static"])
    lengths = itertools.cycle([5, 130, 17, 64, 33])
    for batch in itertools.cycle([1, 3, 2]):
        cache, length = next(kinds), next(lengths)
        _generate(model, ids(batch, length), cache)
        _train(model, optimizer, ids(batch, length))
        yield


def _generate(model: Any, prompt: torch.Tensor, cache: str) -> None:
    model.eval()
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=True,
        cache_implementation=cache,
    )
    assert made.shape == (prompt.shape[0], prompt.shape[1] + 12), made.shape


def _train(
    model: Any, optimizer: torch.optim.Optimizer, examples: torch.Tensor
) -> None:
    model.train()
    loss = model(examples, labels=examples, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert loss.isfinite(), loss


# ---- samples ---------------------------------------------------------------------


def sample(count: int, seconds: float, device: str) -> Sample:
    """What is held now, after garbage was collected."""
    gc.collect()
    process = psutil.Process()
    held = [one for one in gc.get_objects() if _holds(one)]
    sizes = [t.numel() * t.element_size() for t in held]
    cuda = device == "cuda"
    return Sample(
        count,
        seconds,
        process.memory_info().rss,
        len(held),
        sum(sizes),
        process.num_fds() if hasattr(process, "num_fds") else 0,
        torch.cuda.memory_allocated() if cuda else 0,
        torch.cuda.memory_reserved() if cuda else 0,
    )


def _holds(one: object) -> bool:
    """Whether it is a tensor with memory: those of compilers stand for shapes."""
    if not issubclass(type(one), torch.Tensor):
        return False
    assert isinstance(one, torch.Tensor)
    try:
        return type(one.numel()) is int and not is_fake(one)
    except (RuntimeError, ValueError):  # a lazy parameter
        return False


def _settled(samples: Sequence[Sample]) -> list[Sample]:
    """Those after the warm-up."""
    return [s for s in samples if s.seconds > WARM_UP * samples[-1].seconds]


def growth(samples: Sequence[Sample]) -> dict[str, Growth]:
    """Of each figure, its medians in the first and the last quarter after warm-up."""
    settled = _settled(samples)
    quarter = max(1, len(settled) // 4)

    def of(name: str) -> Growth:
        figures = [float(getattr(one, name)) for one in settled]
        early = statistics.median(figures[:quarter])
        late = statistics.median(figures[-quarter:])
        bytes_, part = ALLOWED[name]
        return Growth(early, late, max(bytes_, part * early))

    names = [one.name for one in fields(Sample) if one.name in ALLOWED]
    return {name: of(name) for name in names if any(getattr(s, name) for s in settled)}


def table(found: dict[str, Growth]) -> str:
    """Early, late, grown and allowed of each figure."""
    rows: list[tuple[str, ...]] = [("", "early", "late", "grown", "allowed", "")]
    for name, one in found.items():
        unit = 1 if name in ("tensors", "files") else MIB
        figures = (one.early, one.late, one.late - one.early, one.allowed)
        shown = [f"{f / unit:.0f}" if unit == 1 else f"{f / unit:.2f}" for f in figures]
        name += "" if unit == 1 else ", MiB"
        rows.append((name, *shown, "GROWS" if one.fails else "ok"))
    return format_table(rows)


def _write(
    options: argparse.Namespace,
    given: Sequence[str],
    samples: Sequence[Sample],
    found: dict[str, Growth],
) -> None:
    save(
        options.json,
        {
            "command": shlex.join(["python", "benchmarks/soak.py", *given]),
            "date": datetime.date.today().isoformat(),
            "device": cuda_machine.machine(options.device),
            "versions": {
                "affine-tensor": affine_tensor.__version__,
                **cpu_machine.versions(PACKAGES),
            },
            "minutes": samples[-1].seconds / 60,
            "rounds": samples[-1].round,
            "growth": {n: {**asdict(g), "fails": g.fails} for n, g in found.items()},
            "samples": [asdict(one) for one in samples],
        },
    )


if __name__ == "__main__":
    main()
