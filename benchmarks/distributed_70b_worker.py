"""What each process of `distributed_70b.py` does: load, compare logits, and only then time.

A process that fails ends, and torchrun ends the others, which may wait for it; what was
measured until then is in its file.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_clock
import cuda_machine
import distributed_70b_file
import torch
from cuda_contestants import reason_of
from cuda_llama import Steps, prompt_of
from peers_files import Size
from torch import Tensor, distributed
from workers import _forget_peak, _memory

import affine_tensor
from affine_tensor import AffineQuantizedTensor

LIMIT = 1e-4  # of both relative differences between float32 logits
GIVEN = (32, 8)  # tokens read at once, and then one by one
WAIT = datetime.timedelta(minutes=10)  # of a process for another one


class Wrong(RuntimeError):
    """It computes something else than one device, and is not timed."""


@dataclass(frozen=True)
class Job:
    """What the processes of a way are told."""

    way: str  # "write", "one", "auto", or "tp2" and so on
    kind: str
    folder: Path
    scratch: Path
    size: Size
    rounds: int
    graph: bool
    reference: str | None = None  # the way whose logits to expect

    @property
    def parallel(self) -> bool:
        return self.way.startswith("tp")

    def save(self) -> Path:
        path = self.scratch / f"{self.way}-job.json"
        path.write_text(json.dumps(dataclasses.asdict(self), default=str))
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        told = json.loads(path.read_text())
        own = told.pop("size")
        own["prefills"] = tuple(own["prefills"])
        told |= {key: Path(told[key]) for key in ("folder", "scratch")}
        return cls(size=Size(**own), **told)


def work(job: Job) -> None:
    """Measure a way as one of its processes, and write each figure when it is there."""
    if job.way == "write":
        _make(job)
        return
    rank = _join(job)
    found: dict[str, Any] = {"loads": {}, "differences": {}, "speeds": {}}
    path = job.scratch / f"{job.way}-{rank}.json"

    def keep() -> None:
        path.write_text(json.dumps(found))

    try:
        with torch.no_grad():
            _compare(job, rank, found)
            keep()
            check(found["differences"])
            _forget()
            model = load(job, torch.bfloat16, found)
            keep()
            _time(job, model, found)
            found["complete"] = True
            keep()
            if job.graph:
                _time_graph(job, model, found)
    except Exception as error:
        # torchrun ends the others, which may wait for this one.
        found["failed"] = f"{job.way}, process {rank}: {reason_of(error)}"
        raise
    finally:
        keep()
    if job.parallel:
        distributed.destroy_process_group()


def _make(job: Job) -> None:
    start = time.perf_counter()
    if not (job.folder / "config.json").exists():
        distributed_70b_file.write(job.folder, job.size, job.kind)
    found: dict[str, Any] = {
        "made_seconds": time.perf_counter() - start,
        "file_bytes": sum(p.stat().st_size for p in job.folder.glob("*.safetensors")),
        "machine": cuda_machine.machine(job.kind),
    }
    if job.kind == "cuda":
        found["gpus"] = torch.cuda.device_count()
        found["versions"] = {"NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    (job.scratch / "write.json").write_text(json.dumps(found))


def _join(job: Job) -> int:
    """Become a process of the group; returns which one."""
    # TF32 has 10 bits of mantissa.
    torch.set_float32_matmul_precision("highest")
    if not job.parallel:
        return 0
    bound: dict[str, Any] = {}
    if job.kind == "cuda":
        # Before anything else is on a GPU; NCCL makes its communicators there at once.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        bound["device_id"] = device
    backend = "nccl" if job.kind == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=WAIT, **bound)
    return distributed.get_rank()


def _together(job: Job) -> None:
    """Until all processes and their devices have come here."""
    if job.kind == "cuda":
        for device in _devices(job):
            torch.cuda.synchronize(device)
    if job.parallel:
        own = [torch.cuda.current_device()] if job.kind == "cuda" else None
        distributed.barrier(device_ids=own)


def _devices(job: Job) -> list[int]:
    """The GPUs of this process."""
    if job.kind != "cuda":
        return []
    count = torch.cuda.device_count()
    return [*range(count)] if job.way == "auto" else [torch.cuda.current_device()]


def _compare(job: Job, rank: int, found: dict[str, Any]) -> None:
    """Logits in float32: kept by the first process, compared by all."""
    model = load(job, torch.float32, found)
    logits = {
        "at once": _read_at_once(job, model),
        "one by one": _given(Eager(model, 1, sum(GIVEN), job.kind), job),
    }
    if rank == 0:
        torch.save(logits, job.scratch / f"{job.way}.pt")
    if job.reference is not None:
        expected = torch.load(job.scratch / f"{job.reference}.pt")
        for what, own in logits.items():
            found["differences"][what] = difference(own, expected[what])


def load(job: Job, dtype: torch.dtype, found: dict[str, Any]) -> Any:
    """The model as this way has it; how it was loaded is noted."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    affine_tensor.register()
    how = {"one": {"device_map": job.kind}, "auto": {"device_map": "auto"}}
    _reset_peaks(job)
    before, from_files = _memory("VmRSS"), _bytes_read()
    _together(job)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=dtype, **how.get(job.way, {"tp_plan": "auto"})
    )
    _together(job)
    seconds = time.perf_counter() - start
    own: dict[str, Any] = {"seconds": seconds, **_memories(job)}
    after = _bytes_read()
    if from_files is not None and after is not None:
        own["bytes_read"] = after - from_files
    if before is not None:
        own["resident_before"] = before
    found["loads"][str(dtype).removeprefix("torch.")] = own
    own["devices"] = _placed(job, model)
    return model.eval()


def _placed(job: Job, model: Any) -> dict[str, int]:
    """Parameters on each device; raises Wrong if the way is not what it is called."""
    places: dict[str, int] = {}
    shards = 0
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "_local_tensor", parameter)
        shards += local is not parameter and local.numel() < parameter.numel()
        places[str(local.device)] = places.get(str(local.device), 0) + local.numel()
        if local.dim() > 1 and not isinstance(local, AffineQuantizedTensor):
            raise Wrong(f"wrong: {name} is not packed, but a {type(local).__name__}")
    least = 7 * job.size.layers + 1  # the embedding is whole in older transformers
    if job.parallel and shards < least:
        raise Wrong(
            f"wrong: {shards} parameters are shards, at least {least} should be"
        )
    return places


# ---- logits -----------------------------------------------------------------------


def tokens(size: Size, length: int) -> Tensor:
    """Ids from all of the vocabulary, so that every process has some: ``[1, length]``."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(size.vocabulary, (1, length), generator=generator)


def _read_at_once(job: Job, model: Any) -> Tensor:
    ids = tokens(job.size, sum(GIVEN)).to(job.kind)
    logits: Tensor = model(ids, use_cache=False).logits
    return logits.float().cpu()


def _given(steps: Steps, job: Job) -> Tensor:
    """Logits after a prompt, and after each of the given tokens that follow."""
    prompt, new = GIVEN
    ids = tokens(job.size, prompt + new).to(job.kind)
    steps.read(ids[:, :prompt])
    found = []
    for place in range(prompt, prompt + new):
        assert steps.logits is not None
        found.append(steps.logits.float().cpu())
        steps.ids.copy_(ids[:, place : place + 1])
        steps.step()
    return torch.stack(found, 1)


def difference(logits: Tensor, expected: Tensor) -> dict[str, float]:
    """Relative, of the largest one and of the norm."""
    apart, exact = logits.double() - expected.double(), expected.double()
    return {
        "max": float(apart.abs().max() / exact.abs().max()),
        "norm": float(apart.norm() / exact.norm()),
    }


def check(differences: dict[str, dict[str, float]], limit: float = LIMIT) -> None:
    """Raise Wrong for one above the limit, or that is no number."""
    for what, own in differences.items():
        for how, value in own.items():
            if not value <= limit:
                raise Wrong(
                    f"wrong: logits, tokens read {what}, differ by {value:.2g} "
                    f"({how}; {limit:.2g} is allowed)"
                )


# ---- speed ------------------------------------------------------------------------


class Eager(Steps):
    """Greedy decoding without a graph."""

    def step(self) -> None:
        self._once()


class Graph(Steps):
    """A CUDA graph of one step, collectives included."""

    def step(self) -> None:
        if self._block is None:
            self._warm_up()
            graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog asks for events in a thread of its own meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._once()
            self._block = cuda_clock.Block(1, graph.replay, lambda: math.nan)
        self._block.replay()


def _time(job: Job, model: Any, found: dict[str, Any]) -> None:
    _reset_peaks(job)
    steps = Eager(model, 1, job.size.prompt + job.size.new, job.kind)
    found["speeds"]["decode"] = _decode(job, steps)
    for length in job.size.prefills:
        found["speeds"][f"prefill {length}"] = _prefill(job, model, length)
    found["work"] = _memories(job)


def _decode(job: Job, steps: Steps) -> list[float]:
    size = job.size
    prompt = prompt_of(size, 1, size.prompt, job.kind)

    def steps_of_a_text() -> None:
        for _ in range(size.new - 1):
            steps.step()

    def once() -> float:
        steps.read(prompt)
        return _seconds(job, steps_of_a_text)

    once()
    # Always as many: all processes take part in each.
    return [(size.new - 1) / once() for _ in range(job.rounds)]


def _prefill(job: Job, model: Any, length: int) -> list[float]:
    ids = prompt_of(job.size, 1, length, job.kind)

    def read() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    read()
    return [length / _seconds(job, read) for _ in range(job.rounds)]


def _seconds(job: Job, run: Callable[[], None]) -> float:
    _together(job)
    start = time.perf_counter()
    run()
    _together(job)
    return time.perf_counter() - start


def _time_graph(job: Job, model: Any, found: dict[str, Any]) -> None:
    """Last of all, since a graph that fails may take the process with it."""
    longest = max(job.size.prompt + job.size.new, sum(GIVEN))
    expected = _given(Eager(model, 1, longest, job.kind), job)
    steps = Graph(model, 1, longest, job.kind)
    own = difference(_given(steps, job), expected)
    found["differences of the graph"] = own
    check({"one by one in a graph (bfloat16)": own}, 1e-2)
    found["speeds"]["decode, graph"] = _decode(job, steps)


# ---- memory -----------------------------------------------------------------------


def _forget() -> None:
    """Give back what the last model took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_peaks(job: Job) -> None:
    _forget_peak()
    for device in _devices(job):
        torch.cuda.reset_peak_memory_stats(device)


def _memories(job: Job) -> dict[str, Any]:
    """Bytes of this process now and at the most since they were reset, and of its GPUs."""
    cuda, devices = torch.cuda, _devices(job)
    free = [cuda.mem_get_info(device) for device in devices]
    return {
        "resident": _memory("VmRSS"),
        "resident_peak": _memory("VmHWM"),
        "held": [cuda.memory_allocated(device) for device in devices],
        "peak": [cuda.max_memory_allocated(device) for device in devices],
        # All processes' and libraries', NCCL's among them.
        "used": [total - left for left, total in free],
    }


def _bytes_read() -> int | None:
    """By this process from files and pipes, whether cached or not; None if unknown."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))
