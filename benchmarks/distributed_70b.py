"""A Llama of 70B shapes on one device, tensor parallel on several, and spread over them.

    python benchmarks/distributed_70b.py                            # 2 and 4 GPUs
    python benchmarks/distributed_70b.py --layers 8 --folder /data  # a smaller file, kept
    python benchmarks/distributed_70b.py --device cpu --tiny --processes 2

An MLX checkpoint of random weights (4 bits, group 64, 40 GB) is written shard by shard.
transformers' `from_pretrained` loads it on one device, with `tp_plan="auto"` under torchrun
(NCCL; gloo on a CPU) and with `device_map="auto"` over all devices, each in processes of
its own. First in float32: logits of given tokens, read at once and one by one with a static
cache, must be those of one device. Only then, in bfloat16: prompts and greedy decoding.
What was measured before something failed is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_machine
import distributed_70b_report
import torch
from common import save
from distributed_70b_file import SIZES
from distributed_70b_worker import GIVEN, LIMIT, Job, work
from peers_files import Size

RESULTS = Path(__file__).parent / "results" / "distributed_70b"


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["--worker"]:
        work(Job.read(Path(given[1])))
        return
    options = _options(given)
    if options.device == "cuda" and not torch.cuda.device_count():
        raise SystemExit("there is no NVIDIA GPU here, or torch does not see it")
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/distributed_70b.py", *given]),
        "date": datetime.date.today().isoformat(),
        "versions": {
            name: version
            for name, version in cuda_machine.versions().items()
            if name in ("affine-tensor", "torch", "transformers")
        },
    }
    measure(options, figures)
    print(distributed_70b_report.report(figures))
    failed = [one["failed"] for one in figures["results"] if not one["complete"]]
    if failed:
        raise SystemExit("\n".join(failed))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--processes", type=int, nargs="*", default=[2, 4], help="default: 2 4")
    add("--layers", type=int, help="of the model (default: 80)")
    add("--tiny", action="store_true", help="a model to see that it works")
    add("--skip", nargs="+", choices=("one", "auto"), default=[])
    add("--no-graph", action="store_true", help="decode eagerly alone")
    add("--rounds", type=int, default=3)
    add("--folder", help="keep the checkpoint there, or take the one that is there")
    add("--time-limit", type=float, metavar="S", help="seconds; the rest is left out")
    add("--json", help=f"default: {RESULTS}.json for all of 70B on 2 GPUs or more")
    add("--markdown", help="the same, with .md")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    for path in filter(None, (options.json, options.markdown)):
        if not Path(path).resolve().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    if min(options.rounds, 1 if options.layers is None else options.layers) < 1:
        parser.error("layers and rounds are positive")
    size = size_of(options)
    for number in options.processes:
        if number < 2 or size.kv_heads % number:
            parser.error(
                f"{number} processes: the {size.kv_heads} heads of keys and values are "
                "to be shared evenly by 2 or more"
            )
    return options


def size_of(options: argparse.Namespace) -> Size:
    size = SIZES["tiny" if options.tiny else "70b"]
    return dataclasses.replace(size, layers=options.layers or size.layers)


def measure(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Fill in all figures, and write them after each way."""
    size, kind = size_of(options), options.device
    several = max(options.processes, default=1)
    devices = torch.cuda.device_count() if kind == "cuda" else several
    ways, missing = plan(options, devices)
    figures |= {"model": str(size), "rounds": options.rounds, "prompt": size.prompt}
    figures |= {"new": size.new, "given": list(GIVEN), "limit": LIMIT}
    figures |= {"reference": None, "results": [], "missing": missing}
    for reason in missing.values():
        _say(reason)
    deadline = time.monotonic() + (options.time_limit or math.inf)
    with tempfile.TemporaryDirectory() as scratch:
        name = f"{'tiny' if options.tiny else '70b'}-{size.layers}-layers"
        folder = Path(options.folder or scratch) / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        job = Job("write", kind, folder, Path(scratch), size, options.rounds, False)
        _say("making the checkpoint")
        _make_first(job, figures, deadline)
        for way in ways:
            if time.monotonic() > deadline:
                missing[way] = f"{way}: the time limit was reached"
                continue
            _say(way)
            # Of several devices in one process there is no such graph.
            graph = kind == "cuda" and way != "auto" and not options.no_graph
            told = dataclasses.replace(
                job, way=way, graph=graph, reference=figures["reference"]
            )
            figures["results"].append(_run(told, deadline))
            if figures["reference"] is None and (told.scratch / f"{way}.pt").exists():
                figures["reference"] = way
            _write(options, figures)


def plan(options: argparse.Namespace, devices: int) -> tuple[list[str], dict[str, str]]:
    """The ways to run on so many devices, and why not the others."""
    ways, missing = ["one"], {}
    for number in options.processes:
        if number > devices:
            missing[f"tp{number}"] = (
                f"tp{number}: {number} GPUs were asked for, and there are {devices}"
            )
        else:
            ways.append(f"tp{number}")
    ways.append("auto")
    if options.device == "cuda" and devices < 2:
        ways.remove("auto")
        missing["auto"] = "auto: there is one GPU, which is as one device is"
    return [way for way in ways if way not in options.skip], missing


def _make_first(job: Job, figures: dict[str, Any], deadline: float) -> None:
    if job.kind == "cpu":
        work(job)
    elif _spawn(job, deadline):  # a process that ends leaves nothing on a GPU
        raise SystemExit("the checkpoint was not made; see above")
    made = json.loads((job.scratch / "write.json").read_text())
    figures["versions"] |= made.pop("versions", {})
    figures |= made


def _run(job: Job, deadline: float) -> dict[str, Any]:
    """A way's figures: those of each process, and what of them goes into the table."""
    code = _spawn(job, deadline)
    paths = [job.scratch / f"{job.way}-{rank}.json" for rank in range(_count(job))]
    ranks = [json.loads(path.read_text()) for path in paths if path.exists()]
    told = [rank["failed"] for rank in ranks if "failed" in rank]
    failed = "\n".join(told) or (f"{job.way}: exit code {code}" if code else None)
    complete = len(ranks) == _count(job) and all("complete" in rank for rank in ranks)
    return {"name": job.way, "complete": complete, "failed": failed, "processes": ranks}


def _count(job: Job) -> int:
    return int(job.way.removeprefix("tp")) if job.parallel else 1


def _spawn(job: Job, deadline: float) -> int:
    """Run a way to its end, or to the deadline; its exit code."""
    process = _start(job)
    left = None if math.isinf(deadline) else max(1.0, deadline - time.monotonic())
    try:
        return process.wait(left)
    except subprocess.TimeoutExpired:
        _say(f"{job.way}: the time limit was reached")
        return 124
    finally:
        _end(process)


def _start(job: Job) -> subprocess.Popen[bytes]:
    count, launcher = _count(job), []
    environment = dict(os.environ)
    if job.parallel:
        launcher = ["-m", "torch.distributed.run", "--nnodes", "1"]
        launcher += ["--nproc-per-node", str(count), "--master-addr", "127.0.0.1"]
        launcher += ["--master-port", str(_free_port())]
        threads = max(1, (os.cpu_count() or 1) // count)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    if job.kind == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # transformers would take the GPUs
    command = [sys.executable, *launcher, __file__, "--worker", str(job.save())]
    return subprocess.Popen(
        command, env=environment, stdout=sys.stderr, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it if it still runs: torchrun is asked first, which ends its processes."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    several = [r for r in figures["results"] if r["name"] != "one" and r["complete"]]
    real = options.device == "cuda" and not (options.tiny or options.layers)
    own = real and bool(several)
    save(options.json or (f"{RESULTS}.json" if own else None), figures)
    path = options.markdown or (f"{RESULTS}.md" if own else None)
    if path:
        text = distributed_70b_report.report(figures)
        Path(path).write_text(text, encoding="utf-8")


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
