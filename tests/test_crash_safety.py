"""Saves that are killed, that meet others, and that find no room.

A helper process (`Zygote`) has a model ready and forks for every save; the fork is killed
(SIGKILL) at one of the steps that change files, or at some time, or is told there that the
disk is full. What a checkpoint is, is what `open_checkpoint` finds, byte by byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks a process that uses torch"
)
TESTS = Path(__file__).resolve().parent
SAVES = ("save_checkpoint", "two renames", "save_pretrained", "convert", "new folder")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- in the helper's forks -------------------------------------------------------


class Steps:
    """Counts what changes files below a folder, and does something at one of them."""

    def __init__(self, base: Path, at: int, do: Callable[[], None], kinds: str) -> None:
        self.base, self.at, self.do, self.kinds = str(base), at, do, kinds
        self.count, self.names = 0, list[str]()
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        first = str(arguments[0]) if arguments else ""
        if not first.startswith(self.base) or event not in self.kinds.split():
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        self.step(f"{event} {first}")

    def step(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.at:
            self.do()


CHANGES = "open os.rename os.remove os.rmdir os.mkdir"
TAKES_ROOM = "open os.rename os.mkdir"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    raise FULL


def watch(base: Path, at: int, do: Callable[[], None], kinds: str) -> Steps:
    """Steps of Python's own, of safetensors, and of the exchange."""
    from safetensors import SafetensorError

    import affine_tensor.checkpoint.save as save_module
    from affine_tensor.checkpoint import place

    steps = Steps(base, at, do, kinds)
    written, exchange = save_module.save_file, place._exchange

    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        steps.step(f"before {path}")
        written(tensors, path, **options)
        with path.open("rb+") as file:  # half of it
            whole = file.read()
            file.truncate(len(whole) // 2)
        try:
            steps.step(f"half {path}")
        except OSError as error:
            text = f"I/O error: No space left on device (os error {error.errno})"
            raise SafetensorError(text) from None
        path.write_bytes(whole)

    def exchanged(one: Path, other: Path) -> bool:
        done = exchange(one, other)
        steps.step(f"exchanged {other}")
        return done

    save_module.save_file = save_file
    if do is die:
        place._exchange = exchanged
    return steps


def models() -> dict[str, Any]:
    """An old and a new model that differ in everything, for each name."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from affine_tensor import AffineConfig, quantize_

    found: dict[str, Any] = {}
    for seed, (name, bits) in enumerate({"old": 4, "new": 8, "dense": 0}.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1 if name == "old" else 2,
            num_attention_heads=2,
        )
        found[name] = LlamaForCausalLM(config)
        if bits:
            quantize_(found[name], AffineConfig(bits=bits, group_size=64))
    return found


def save(kind: str, found: dict[str, Any], which: str, folder: Path) -> None:
    from affine_tensor import convert, save_checkpoint
    from affine_tensor.checkpoint import place

    shards = 60_000 if which == "new" else 5 << 30
    if kind == "two renames":
        place._exchange = lambda one, other: False  # as on a file system without
    if kind == "save_pretrained":
        found[which].save_pretrained(folder, max_shard_size=shards)
    elif kind == "convert" and which == "new":
        dense = found["folder"]
        convert(dense, folder, overwrite=True, max_shard_bytes=shards, progress=False)
    else:
        overwrite = kind != "new folder"
        options: dict[str, Any] = {"overwrite": overwrite, "progress": False}
        save_checkpoint(found[which], folder, max_shard_bytes=shards, **options)


def what_is_there(folder: Path) -> str:
    """A hash of a checkpoint as it is read; "nothing", or the error's name."""
    from affine_tensor.checkpoint.files import CheckpointError, fetch, open_checkpoint

    try:
        found = open_checkpoint(fetch(folder))
        state = hashlib.sha256(json.dumps(found.config, sort_keys=True).encode())
        for name, tensor in sorted(found.tensors.items()):
            state.update(name.encode())
            state.update(tensor.read().contiguous().numpy().tobytes())
    except FileNotFoundError:
        return "nothing"
    except CheckpointError as error:
        return f"CheckpointError: {error}"
    return state.hexdigest()[:12]


def forked(work: Callable[[], object], after: float | None = None) -> tuple[int, Any]:
    """The status of a fork (negative: a signal) and what its work gave, in JSON."""
    out = Path(tempfile.mkstemp()[1])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            out.write_text(json.dumps(work()))
            status = 0
        except BaseException as error:
            out.write_text(json.dumps([type(error).__name__, str(error)]))
            if not isinstance(error, OSError):
                traceback.print_exc()
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = out.read_text()
    out.unlink()
    return status, json.loads(text) if text else None


# ---- what the helper is asked for ------------------------------------------------


def killed(found: dict[str, Any], kind: str, base: str, times: int = 0) -> Any:
    """Kill saves at each step, or `times` of them at some time, and see what is there."""
    place = Path(base)
    seen: list[Any] = []
    whole = hashes(found, kind, place)
    start = time.monotonic()
    attempt(found, kind, place, lambda: None)
    took = time.monotonic() - start
    draw = random.Random(0)
    known = set[str]()
    for number in range(1, 1000):

        def work(at: int = number) -> None:
            if not times:
                watch(place, at, die, CHANGES)

        after = draw.uniform(0, took) if times else None
        status, _ = attempt(found, kind, place, work, after)
        left = sorted(path.name for path in place.iterdir())
        inner = [p.name for p in (place / "out").glob(".*")]
        there = what_is_there(place / "out")
        seen.append([status, left + inner, there])
        # And the next save; once for each kind of leftovers.
        kinds = f"{[name.rpartition('.')[2] for name in left + inner]} {there}"
        if kinds not in known:
            known.add(kinds)
            again = attempt(found, kind, place, lambda: None, fresh=False)
            rest = [*place.iterdir(), *(place / "out").glob(".*")]
            seen[-1] += [again, what_is_there(place / "out"), [p.name for p in rest]]
        if number == times or (not times and status == 0):
            break
    return [whole, seen]


def hashes(found: dict[str, Any], kind: str, base: Path) -> dict[str, str]:
    whole = {}
    for which in ("old", "new"):
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        forked(lambda: save(kind, found, which, base / "out"))  # noqa: B023
        whole[which] = what_is_there(base / "out")
        found[f"{kind} {which}"] = base.with_name(f"{base.name}-{which}")
        shutil.rmtree(found[f"{kind} {which}"], ignore_errors=True)
        shutil.copytree(base / "out", found[f"{kind} {which}"])
    if kind == "new folder":
        whole["old"] = "nothing"
    return whole


def attempt(
    found: dict[str, Any],
    kind: str,
    base: Path,
    before: Callable[[], Any],
    after: float | None = None,
    fresh: bool = True,
) -> tuple[int, Any]:
    """A save in a fork, over the old checkpoint, or with `fresh` off what is there."""
    if fresh:
        shutil.rmtree(base)
        base.mkdir()
        if kind != "new folder":
            shutil.copytree(found[f"{kind} old"], base / "out")
    elif kind == "new folder" and (base / "out").exists():
        shutil.rmtree(base / "out")

    def work() -> None:
        before()
        save(kind, found, "new", base / "out")

    return forked(work, after)


def full(found: dict[str, Any], kind: str, base: str) -> Any:
    """Say at each step that the disk is full."""
    place = Path(base)
    whole, seen = hashes(found, kind, place), []
    for at in range(1, 1000):

        def work(at: int = at) -> None:
            watch(place, at, no_room, TAKES_ROOM)

        status, said = attempt(found, kind, place, work)
        there = what_is_there(place / "out")
        left = sorted(p.name for p in [*place.iterdir(), *(place / "out").glob(".*")])
        seen.append([status, said, left, there])
        if status == 0:
            break
    return [whole, seen]


def limited(found: dict[str, Any], base: str) -> Any:
    """A save of which the files may have so many bytes (RLIMIT_FSIZE)."""
    place = Path(base)
    whole = hashes(found, "save_checkpoint", place)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    status, said = attempt(found, "save_checkpoint", place, work)
    left = sorted(path.name for path in place.iterdir())
    return [whole, status, said, left, what_is_there(place / "out")]


def into(found: dict[str, Any], kind: str, folder: str) -> Any:
    return forked(lambda: save(kind, found, "new", Path(folder)))


def side_by_side(found: dict[str, Any], kind: str, base: str, seconds: float) -> Any:
    """Two processes save into one folder, again and again, and two read it."""
    place = Path(base)
    whole = hashes(found, kind, place)
    end = time.monotonic() + seconds
    reports = [Path(tempfile.mkstemp()[1]) for _ in range(4)]
    children = []
    for number, report in enumerate(reports):
        if child := os.fork():
            children.append(child)
            continue
        seen: list[Any] = []
        try:
            while time.monotonic() < end:
                if number < 2:
                    save(kind, found, ("old", "new")[number], place / "out")
                    seen.append("saved")
                else:
                    seen.append(what_is_there(place / "out"))
        except BaseException as error:
            text = traceback.format_exc()
            seen.append(f"{type(error).__name__}: {error}\n{text}")
        finally:
            report.write_text(json.dumps(seen))
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    seen = [json.loads(report.read_text()) for report in reports]
    left = sorted(p.name for p in [*place.iterdir(), *(place / "out").glob(".*")])
    return [whole, seen, what_is_there(place / "out"), left]


def race(found: dict[str, Any], base: str) -> Any:
    """Both find no folder there, and neither may replace one."""
    from affine_tensor.checkpoint import place as place_module

    whole = hashes(found, "new folder", Path(base))
    shutil.rmtree(Path(base) / "out")
    met = Path(base) / "met"
    put = place_module._put

    def wait_and_put(new: Path, place: Path, overwrite: bool) -> None:
        with met.open("a") as file:
            file.write("x")
        while len(met.read_text()) < 2:
            time.sleep(0.01)
        put(new, place, overwrite)

    place_module._put = wait_and_put
    children = []
    out = [Path(base) / f"said{i}" for i in range(2)]
    for which, said in zip(("old", "new"), out, strict=True):
        if child := os.fork():
            children.append(child)
            continue
        try:
            save("new folder", found, which, Path(base) / "out")
            said.write_text("saved")
        except BaseException as error:
            said.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    place_module._put = put
    met.unlink()
    told = {w: o.read_text() for w, o in zip(("old", "new"), out, strict=True)}
    return [whole, told, what_is_there(Path(base) / "out")]


def compile_kernels(found: dict[str, Any], cache: str, processes: int) -> Any:
    """The same product in several processes that find an empty cache of kernels."""
    os.environ["AFFINE_TENSOR_CACHE"] = cache
    children, out = [], [Path(tempfile.mkstemp()[1]) for _ in range(processes)]
    for file in out:
        if child := os.fork():
            children.append(child)
            continue
        try:
            file.write_text(json.dumps(_product()))
        except BaseException as error:
            file.write_text(json.dumps([f"{type(error).__name__}: {error}"]))
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads(file.read_text()) for file in out]


def _product() -> list[str]:
    import torch

    from affine_tensor import AffineQuantizedTensor
    from affine_tensor.kernels import settings
    from affine_tensor.kernels.cpu import compiler

    compiler._folder.cache_clear()
    settings.strict = True
    torch.manual_seed(0)
    x, dense = torch.randn(1, 256), torch.randn(64, 256)
    weight = AffineQuantizedTensor.from_dense(dense, 3, 32)  # new here
    y = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(y, x @ weight.dequantize().T, rtol=1e-4, atol=1e-3)
    made = compiler._scratch()
    used = sorted(path.name for path in made.iterdir())
    shutil.rmtree(made)
    return ["right", *used]


def helper() -> None:
    import threading

    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    # Its own is shared with forks; one that is killed while it has it stops all others.
    tqdm.set_lock(threading.RLock())
    found = models()
    found["folder"] = Path(tempfile.mkdtemp()) / "dense"
    found["dense"].save_pretrained(found["folder"])
    import affine_tensor.hf.convert  # noqa: F401  so that no fork imports it

    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            result = globals()[name](found, *arguments)
        except BaseException:
            result = {"error": traceback.format_exc()}
        print(f"result {json.dumps(result)}", flush=True)
    shutil.rmtree(found["folder"].parent)


# ---- in pytest -------------------------------------------------------------------


class Zygote:
    def __init__(self) -> None:
        code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        code += "import test_crash_safety as t; t.helper()"
        # Kernels are compiled where a test says, and otherwise not needed.
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=TESTS.parent,
        )
        self._read("ready")

    def _read(self, word: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise AssertionError("the helper process died")

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([work.__name__, *arguments]) + "\n")
        self.process.stdin.flush()
        result = json.loads(self._read("result "))
        if isinstance(result, dict) and "error" in result:
            raise AssertionError(result["error"])
        return result


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    assert started.process.stdin
    started.process.stdin.close()
    started.process.wait()


def is_leftover(name: str) -> bool:
    return name.startswith((".out.", ".affine-tensor.")) and name.endswith(
        (".unfinished", ".replaced", ".moving")
    )


def check_killed(whole: dict[str, str], seen: list[Any]) -> None:
    for step, (_, left, there, *again) in enumerate(seen, 1):
        said = f"step {step}: {left}"
        assert there in whole.values(), (said, there)
        assert all(is_leftover(name) for name in left if name != "out"), said
        assert again in ([], [[0, None], whole["new"], ["out"]]), (said, again)


@pytest.mark.parametrize("kind", SAVES)
def test_a_save_killed_at_each_step(kind: str, zygote: Zygote, tmp_path: Path) -> None:
    whole, seen = zygote(killed, kind, str(tmp_path / "base"))
    check_killed(whole, seen)
    assert whole["old"] != whole["new"]
    assert [status for status, *_ in seen[:-1]] == [-signal.SIGKILL] * (len(seen) - 1)
    assert len(seen) > 20
    found = [there for _, _, there, *_ in seen]
    change = found.index(whole["new"])  # before it the old one, from it on the new one
    assert found == [whole["old"]] * change + [whole["new"]] * (len(found) - change)
    assert change > 10
    kinds = {name.rpartition(".")[2] for _, left, *_ in seen for name in left}
    assert "unfinished" in kinds


@pytest.mark.parametrize("kind", ["save_checkpoint", "save_pretrained", "convert"])
def test_a_save_killed_at_some_time(kind: str, zygote: Zygote, tmp_path: Path) -> None:
    whole, seen = zygote(killed, kind, str(tmp_path / "base"), 5)
    check_killed(whole, seen)


# ---- two processes ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["save_checkpoint", "two renames", "save_pretrained"])
def test_saves_and_loads_side_by_side(
    kind: str, zygote: Zygote, tmp_path: Path
) -> None:
    whole, seen, there, left = zygote(side_by_side, kind, str(tmp_path / "base"), 2)
    *savers, first, second = seen
    for saver in savers:
        assert saver, kind
        assert set(saver) == {"saved"}, saver[-1]
    loads = [*first, *second]
    refused = [load for load in loads if load not in whole.values()]
    for load in refused:
        assert load.startswith("CheckpointError: ") or load == "nothing", load
        assert kind == "two renames" or load != "nothing"
    assert len(refused) < len(loads)
    assert there in whole.values()
    assert left == ["out"]


def test_two_that_may_not_replace(zygote: Zygote, tmp_path: Path) -> None:
    whole, told, there = zygote(race, str(tmp_path / "base"))
    won = [which for which, said in told.items() if said == "saved"]
    assert len(won) == 1
    (lost,) = [said for said in told.values() if said != "saved"]
    assert lost.startswith("FileExistsError: ")
    assert "was written by somebody else meanwhile" in lost
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == [
        "out",
        "said0",
        "said1",
    ]
    if won == ["new"]:
        assert there == whole["new"]
    else:
        assert there not in ("nothing", whole["new"])


def needs_compiler() -> None:
    from affine_tensor.kernels import KernelError
    from affine_tensor.kernels.cpu import compiler

    try:
        compiler.find()
    except KernelError as error:
        pytest.skip(f"no compiler for the kernels: {error}")


def test_kernels_compiled_side_by_side(zygote: Zygote, tmp_path: Path) -> None:
    needs_compiler()
    assert zygote(compile_kernels, str(tmp_path / "cache"), 2) == [["right"]] * 2
    libraries = list((tmp_path / "cache" / "cpu").iterdir())
    assert libraries
    assert not [path.name for path in libraries if path.name.startswith("tmp")]


# ---- no room ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAVES)
def test_a_full_disk_at_each_step(kind: str, zygote: Zygote, tmp_path: Path) -> None:
    whole, seen = zygote(full, kind, str(tmp_path / "base"))
    assert len(seen) > 5
    for step, (status, said, left, there) in enumerate(seen[:-1], 1):
        assert status == 1, (step, said)
        assert there in whole.values(), (step, said, there)
        # The log of a move that has begun is ended by the look at what is there.
        assert left == (["out"] if there != "nothing" else []), (step, left)
    texts = [said[1] for _, said, *_ in seen[:-1]]
    place = str(tmp_path / "base" / "out")
    written = [text for text in texts if f"no room to write {place}" in text]
    assert len(written) > 5
    for text in written:
        assert "bytes are needed, and" in text
        assert "bytes are free on the disk of" in text
    assert seen[-1][0] == 0


def test_a_limit_on_the_size_of_files(zygote: Zygote, tmp_path: Path) -> None:
    whole, status, said, left, there = zygote(limited, str(tmp_path / "base"))
    assert status == 1
    name, text = said
    assert name == "NoRoom"
    assert f"no room to write {tmp_path / 'base' / 'out'} (File too large)" in text
    assert "a limit of this process or file system on the size of a file" in text
    assert left == ["out"]
    assert there == whole["old"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["save_checkpoint", "save_pretrained", "convert"])
def test_a_disk_that_is_full(kind: str, zygote: Zygote, small_disk: Path) -> None:
    status, (name, text) = zygote(into, kind, str(small_disk / "out"))
    assert status == 1
    assert name == "NoRoom"
    assert f"no room to write {small_disk / 'out'} (No space left on device)" in text
    needed, free = (
        int(t.split()[-1].replace(",", "")) for t in text.split(" bytes ")[:2]
    )
    assert free <= 48 << 10 < needed + (16 << 10)
    assert needed > free
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("kind", ["save_checkpoint", "save_pretrained", "convert"])
def test_a_disk_that_is_read_only(kind: str, zygote: Zygote, small_disk: Path) -> None:
    options = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(options, check=True, capture_output=True)
    status, (_, text) = zygote(into, kind, str(small_disk / "out"))
    assert status == 1
    place = small_disk / "out" if kind == "save_pretrained" else small_disk
    assert f"{place} cannot be written into (Read-only file system)" in text
    assert "choose a folder elsewhere" in text


def test_a_folder_where_a_disk_is_mounted(zygote: Zygote, small_disk: Path) -> None:
    status, (name, text) = zygote(into, "save_checkpoint", str(small_disk))
    assert (status, name) == (1, "FileExistsError")
    assert "is where a disk is mounted" in text
    assert "name a folder within it" in text


@pytest.mark.parametrize("why", ["full", "read only"])
def test_kernels_without_a_cache(why: str, zygote: Zygote, small_disk: Path) -> None:
    needs_compiler()
    if why == "full":
        with suppress(OSError), (small_disk / "filler").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
    else:
        options = ["mount", "-o", "remount,ro", str(small_disk)]
        subprocess.run(options, check=True, capture_output=True)
    ((right, *used),) = zygote(compile_kernels, str(small_disk / "cache"), 1)
    assert right == "right"
    assert used  # the libraries were made in a folder of the process
    assert not [p for p in small_disk.rglob("*") if p.suffix == ".so"]
