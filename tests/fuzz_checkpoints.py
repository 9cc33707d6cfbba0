"""Fuzzes the reading of checkpoints: ``python tests/fuzz_checkpoints.py --seed 1``.

Each case is a small valid checkpoint (`fuzz_bases.py`) that is harmed (`fuzz_mutations.py`)
and loaded. It must come out right, which an independent reading decides
(`fuzz_oracle.py`), or be refused by an error of the library's own, with the model as it
was. A crash, another exception, a hang, memory without end, a wrong value and a file that
is opened outside of the folder, or written, are failures. ``--only CASE`` repeats one.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

WATCHDOG = 40  # seconds a case may take on a busy machine
MEMORY = 3 << 30  # bytes of address space above what the process has at the start
CHECKPOINT = "right"
REFUSED = "refused"
FAILED = "FAILED"


# ---- the watch on files ----------------------------------------------------------


class Watch:
    """Notes what is opened, written, moved or run while a case loads."""

    WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
    WRITES += ("os.truncate", "os.chmod", "shutil.move", "shutil.rmtree", "os.system")
    WRITES += ("subprocess.Popen", "socket.connect", "os.exec", "os.posix_spawn")

    def __init__(self) -> None:
        self.folder: str | None = None
        self.root = ""
        self.seen: list[str] = []
        sys.addaudithook(self._event)

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in self.WRITES:
            self.seen.append(f"{event} {args}"[:200])
        elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(args[0]))
            flags = args[2] if isinstance(args[2], int) else 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            inside = path.startswith(self.folder + os.sep)
            if writes and path != os.devnull:
                self.seen.append(f"writes {path}")
            elif path.startswith(self.root + os.sep) and not inside:
                self.seen.append(f"opens {path}")


# ---- one case --------------------------------------------------------------------


class Fuzzer:
    """Runs cases in this process, which may die of them."""

    def __init__(self, seed: int, root: Path) -> None:
        import fuzz_bases

        os.environ["HF_HUB_OFFLINE"] = "1"
        self.seed, self.root = seed, root
        self.bases = fuzz_bases.all_bases()
        self.watch = Watch()
        self.watch.root = str(root)
        outside = root / "outside"
        outside.mkdir()
        (root / "blobs").mkdir()
        (outside / "model.safetensors").write_bytes(self.bases[0].shard.content())

    def run(self, case: int) -> dict[str, Any]:
        """Make, load and judge one; what it was, and what became of it."""
        from fuzz_bases import INDEX, Draft
        from fuzz_mutations import mutate

        dice = random.Random(f"{self.seed}:{case}")
        # Loading a whole Llama takes longer than the others.
        base = self.bases[-1] if dice.random() < 0.03 else dice.choice(self.bases[:-1])
        draft = Draft.of(base, dice.choice([1, 1, 2, 3]))
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(10 * limit)  # what is nested deep is nested deeper
        said = mutate(draft, dice)
        text = json.dumps(draft.jsons.get(INDEX))
        if "/OUTSIDE/" in text:
            text = text.replace("/OUTSIDE/", f"{self.root}/outside/")
            draft.jsons[INDEX] = json.loads(text)
        folder = self.root / f"case{case}"
        draft.write(folder)
        sys.setrecursionlimit(limit)
        found = {"case": case, "base": base.name, "mutations": said}
        try:
            outcome, detail = self._judge(base, folder, bool(said))
        finally:
            self.watch.folder = None
            shutil.rmtree(folder, ignore_errors=True)
        if self.watch.seen:
            outcome, detail = FAILED, f"files: {self.watch.seen[:3]}"
            self.watch.seen = []
        return found | {"outcome": outcome, "detail": detail}

    def _judge(self, base: Any, folder: Path, harmed: bool) -> tuple[str, str]:
        from affine_tensor import from_pretrained, load_checkpoint_
        from affine_tensor.checkpoint.files import open_checkpoint

        model = None if base.kind == "llama" else base.model()
        before = None if model is None else snapshot(model)
        self.watch.folder = str(folder)
        try:
            try:
                opened = open_checkpoint(folder)
            finally:
                self.watch.folder = None
            wrong = compare_tensors(opened, folder)
            if wrong:
                return FAILED, wrong
            self.watch.folder = str(folder)
            if model is None:
                loaded = from_pretrained(folder, dtype="float32")
            else:
                loaded = model
                print(load_checkpoint_(model, folder, progress=False), file=sys.stderr)
        except BaseException as error:
            self.watch.folder = None
            if model is not None and snapshot(model) != before:
                return FAILED, f"the model changed: {error!r}"[:500]
            reason = why_not_own(error)
            if reason:
                return FAILED, f"{reason}\n{traceback.format_exc()[-2500:]}"
            if not harmed:
                return FAILED, f"a good checkpoint is refused: {error!r}"[:500]
            return REFUSED, type(error).__name__
        self.watch.folder = None
        wrong = compare_model(base, loaded, folder, opened.config)
        return (FAILED, wrong) if wrong else (CHECKPOINT, "")


def why_not_own(error: BaseException) -> str:
    """Why this is no refusal; "" if it is one."""
    from affine_tensor import CheckpointError

    frames = [f.filename for f in traceback.extract_tb(error.__traceback__)]
    if not isinstance(error, Exception) or isinstance(error, MemoryError):
        return f"{type(error).__name__}"
    try:
        str(error).encode()
    except UnicodeEncodeError:
        return "the error's text cannot be printed"
    if isinstance(error, CheckpointError):
        return ""
    ours = [f for f in frames if "affine_tensor/" in f and "site-packages" not in f]
    theirs = [f for f in frames if "/transformers/" in f or "/huggingface_hub/" in f]
    if theirs and frames.index(theirs[-1]) > frames.index(ours[-1]):
        return ""  # transformers' own, of its own configuration
    if type(error) in (ValueError, FileNotFoundError) and frames[-1] == ours[-1]:
        return ""
    return f"{type(error).__name__} instead of CheckpointError: {error}"[:300]


def snapshot(model: Any) -> list[Any]:
    from itertools import chain

    values = chain(model.named_parameters(), model.named_buffers())
    return [
        (n, id(v), type(v), v.dtype, v.requires_grad, v.detach().numpy().tobytes())
        for n, v in values
    ]


def raw(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def compare_tensors(opened: Any, folder: Path) -> str:
    """Each tensor against safetensors' own reading of the file; "" if all are right."""
    from fuzz_oracle import read_folder

    files = read_folder(folder)
    for name, stored in opened.tensors.items():
        own = files.get(stored.file.name)
        if own is None:
            return f"{stored.file.name} is read, which safetensors refuses"
        if name not in own:
            return f"{name!r} is not in {stored.file.name}"
        got, want = stored.read(), own[name]
        if (got.dtype, got.shape) != (want.dtype, want.shape) or raw(got) != raw(want):
            return f"{name!r} is {got.dtype} {got.shape}, not {want.dtype} {want.shape}"
    return ""


def compare_model(base: Any, model: Any, folder: Path, config: Any) -> str:
    """Each parameter and buffer against the oracle; "" if all are right."""
    import fuzz_oracle

    problems: list[str] = []
    said = fuzz_oracle.settings_of(config, folder)
    for tensors in fuzz_oracle.views(folder):
        problems.append(_compare(base, model, tensors, said))
        if not problems[-1]:
            return ""
    return problems[0]


def _compare(base: Any, model: Any, tensors: dict[str, Any], said: Any) -> str:
    import numpy as np
    import torch
    from fuzz_oracle import weights

    from affine_tensor import AffineQuantizedTensor

    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if base.kind == "llama" and "inv_freq" in name:
            continue
        packed = isinstance(value, AffineQuantizedTensor)
        own = value.dequantize(torch.float64) if packed else value.detach().double()
        got, shape = own.numpy(), tuple(value.shape)
        tries = []
        try:
            for want, spread in weights(tensors, base.kind, name, shape, said):
                if not packed and value.is_floating_point():
                    if want.size == got.size == 1:
                        want, spread = want.reshape(shape), spread.reshape(shape)
                    with np.errstate(all="ignore"):
                        want = want.astype(np.float32).astype(np.float64)
                if want.shape != got.shape:
                    tries.append(f"{want.shape} instead of {got.shape}")
                    continue
                with np.errstate(all="ignore"):
                    near = abs(got - want) <= spread
                same = near | (got == want) | (np.isnan(got) & np.isnan(want))
                if same.all():
                    break
                at = tuple(int(i) for i in np.argwhere(~same)[0])
                tries.append(f"{got[at]} at {at} instead of {want[at]}")
            else:
                return f"{name}: {'; or '.join(tries)}"
        except Exception as error:
            return f"{name} was loaded; the oracle: {error!r}"
    return ""


# ---- processes -------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """A worker: a line "start CASE" before each case, and its result as JSON after."""
    out = os.fdopen(os.dup(1), "w")
    if not args.only:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)  # what is loaded is reported there
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    import logging

    import torch

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        fuzzer = Fuzzer(args.seed, Path(place).resolve())
        limit_memory()
        for case in args.only or range(args.worker, args.count, args.jobs):
            faulthandler.dump_traceback_later(WATCHDOG, exit=True, file=sys.__stderr__)
            print("start", case, file=out, flush=True)
            try:
                result = fuzzer.run(case)
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
                raise
            print(json.dumps(result), file=out, flush=True)
        faulthandler.cancel_dump_traceback_later()


def limit_memory() -> None:
    try:
        import resource
        from importlib import import_module

        import_module("affine_tensor.hf")  # and what it maps
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return  # not on Linux
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def attend(
    args: argparse.Namespace, worker: int, results: list[dict[str, Any]]
) -> None:
    """Run a worker to its end, and another one from the next case if it dies."""
    first = worker
    while first < args.count:
        command = [sys.executable, __file__, "--seed", str(args.seed)]
        command += ["--count", str(args.count), "--jobs", str(args.jobs)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [*command, "--worker", str(first)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            running = None
            for line in process.stdout:
                if line.startswith("start "):
                    running = int(line.split()[1])
                else:
                    results.append(json.loads(line))
                    running = None
            code = process.wait()
            errors.seek(0)
            said = errors.read()[-1500:]
        if running is None and code:
            raise SystemExit(f"a worker ended with {code} outside of a case:\n{said}")
        if running is None:
            return
        dead = f"the process died or hung (exit {code})\n{said}"
        results.append({"case": running, "outcome": FAILED, "detail": dead})
        first = running + args.jobs


def fuzz(seed: int, count: int, jobs: int) -> list[dict[str, Any]]:
    """The results of the cases 0 to `count` - 1, in order."""
    args = argparse.Namespace(seed=seed, count=count, jobs=jobs)
    results: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=attend, args=(args, worker, results))
        for worker in range(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results, key=lambda result: result["case"])


def told(seed: int, result: dict[str, Any]) -> str:
    return (
        f"seed {seed} case {result['case']}: {result.get('base')} "
        f"{result.get('mutations')}\n  {result['detail']}\n  again: python "
        f"tests/fuzz_checkpoints.py --seed {seed} --only {result['case']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--only", type=int, nargs="+", help="these cases, in this process"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None or args.only:
        work(args)
        return 0
    start = time.monotonic()
    results = fuzz(args.seed, args.count, args.jobs)
    failures = [r for r in results if r["outcome"] == FAILED]
    for result in failures:
        print(told(args.seed, result))
    counts = Counter(r["outcome"] for r in results)
    shares = ", ".join(f"{n} {k}" for k, n in sorted(counts.items()))
    seconds = math.ceil(time.monotonic() - start)
    print(f"seed {args.seed}: {len(results)} cases, {shares}; {seconds} s")
    return 1 if failures or len(results) != args.count else 0


if __name__ == "__main__":
    sys.exit(main())
