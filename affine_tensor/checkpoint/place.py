"""Putting what was written into its place, so that a crash leaves the old or the new.

A checkpoint is written into a folder of its own, beside the one that it replaces
(`beside`) or inside the one that it is added to (`inside`), and reaches the disk (fsync)
before anything is moved. While it is written its folder is called ``*.unfinished`` and
locked; the lock of a process that was killed is gone, and so the next save into the same
place removes what that process left. What lies there is never taken for a checkpoint:

    .NAME.0123abcd.unfinished            beside NAME: half written, or half deleted
    .NAME.0123abcd.replaced              beside NAME: the old one (see `_replace`)
    NAME/.affine-tensor.0123abcd.unfinished    half written
    NAME/.affine-tensor.moving           whole, and being moved up into NAME

The last is a log: whoever reads or writes NAME afterwards ends the move (`settle`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..tensor import logger

try:
    import fcntl
except ImportError:  # Windows, where leftovers are told about and stay
    fcntl = None  # type: ignore[assignment]

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
MOVING = ".affine-tensor.moving"
_NAMES = ".names"  # in the folder being moved: the files that it had
_CONFIG = "config.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# What transformers and mlx-lm call shards.
_WEIGHTS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)


class NoRoom(OSError):
    """A full disk, or a limit on files; `needed` are the bytes that found no room."""

    needed = 0


# ---- locks -----------------------------------------------------------------------


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which goes with the process.

    Raises BlockingIOError if another one holds it (unless `wait`), OSError where there
    are no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has no locks on folders")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, "it was moved away", str(folder))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _made(stem: Path) -> Iterator[Path]:
    """A new folder of that name and some letters, locked where that can be done; deleted
    if what is done within fails."""
    above = [path for path in stem.parents if not path.exists()]
    with ExitStack() as held:
        while True:
            new = _new_name(stem)
            with _allowed(stem.parent):
                new.mkdir(parents=True)
            try:
                held.enter_context(_locked(new))
            except (BlockingIOError, FileNotFoundError):
                continue  # somebody took it for a leftover in this moment
            except OSError:
                pass  # a file system without locks
            break
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            with suppress(OSError):
                for path in above:
                    path.rmdir()
            raise


def _new_name(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}")


@contextmanager
def _allowed(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FORBIDDEN:
            raise
        raise OSError(
            error.errno,
            f"{parent} cannot be written into ({error.strerror}); choose a folder "
            "elsewhere, or make this one writable",
        ) from error


# ---- disks -----------------------------------------------------------------------


@contextmanager
def _roomy(folder: Path, new: Path) -> Iterator[None]:
    """Say of a full disk which it is, and how much is missing there."""
    try:
        yield
    except Exception as raised:  # transformers wraps what a sink raises
        error = _full(raised)
        if error is None:
            raise
        sizes = [path.stat().st_size for path in new.iterdir() if path.is_file()]
        had = shutil.disk_usage(new).free + sum(sizes)
        needed = sum(sizes) + getattr(error, "needed", 0)
        free = f"{had:,} bytes are free on the disk of {new.parent}"
        if error.errno == errno.EFBIG:
            free = "a limit of this process or file system on the size of a file is met"
        raise NoRoom(
            error.errno,
            f"no room to write {folder} ({os.strerror(error.errno or 0)}): at least "
            f"{max(needed, had + 1) if error.errno != errno.EFBIG else needed:,} bytes "
            f"are needed, and {free}. What was there before is as it was",
        ) from raised


def _full(error: BaseException | None) -> OSError | None:
    """The error that says that a disk is full, among those that led to this one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def _sync(folder: Path) -> None:
    """Wait until all files of a folder are on the disk.

    A full disk behind a network may come to light only here.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where a system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- a folder as a whole ---------------------------------------------------------


@contextmanager
def beside(folder: Path, check: Callable[[], None], overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all went well.

    Call `clean` before. `check` raises where `folder` must not be replaced; it is asked at
    the end. Without `overwrite` nothing but an empty folder is replaced, whatever came
    meanwhile.
    """
    place = folder.resolve()  # behind a link, and with a name where it is "."
    if os.path.ismount(place):
        raise FileExistsError(
            f"{folder} is where a disk is mounted, and cannot be replaced as a whole; "
            "name a folder within it"
        )
    with _made(place.with_name(f".{place.name}")) as new:
        with _roomy(folder, new):
            yield new
            _sync(new)
        check()
        _put(new, place, overwrite)
        _sync_names(place.parent)


def _put(new: Path, place: Path, overwrite: bool) -> None:
    with suppress(FileNotFoundError):  # another save may be between its two steps
        shutil.copymode(place, new)
    if overwrite and names_in(place):
        _replace(new, place)
        return
    if os.name == "nt" and place.exists():
        place.rmdir()
    try:
        new.rename(place)  # also over an empty one
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if overwrite and place.is_dir():  # it was there again, after a moment without
            _replace(new, place)
            return
        raise FileExistsError(
            f"{place} was written by somebody else meanwhile, and is not replaced; "
            "pass overwrite=True, or choose another folder"
        ) from error


def _replace(new: Path, place: Path) -> None:
    """Exchange two folders at once, and delete the old one.

    Where a system cannot exchange them the old one is called ``*.replaced`` for a moment
    in which there is none; `settle` gives it back if this process dies in it.
    """
    replaced = [new]
    if not _exchange(new, place):
        replaced = []
        while True:  # another save may come between the two steps
            old = _new_name(place.with_name(f".{place.name}")).with_suffix(_REPLACED)
            replaced.append(old)
            if _step_aside(new, place, old):
                break
    _sync_names(place.parent)
    for old in replaced:
        dying = old.with_suffix(_UNFINISHED)  # nothing that `settle` could give back
        try:
            old.rename(dying)
            shutil.rmtree(dying)
        except FileNotFoundError:
            pass  # `settle` of another process gave it back, and it was replaced again
        except OSError as error:
            logger.warning("%s is written; delete %s yourself: %s", place, old, error)


def _step_aside(new: Path, place: Path, old: Path) -> bool:
    """Exchange two folders in two steps; False if another one stood there again."""
    with ExitStack() as held:
        with suppress(OSError):
            held.enter_context(_locked(place, wait=True))
        with suppress(FileNotFoundError):  # another save is between its steps
            place.rename(old)
        try:
            new.rename(place)
        except BaseException as error:  # KeyboardInterrupt, too
            if getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            with suppress(OSError):
                old.rename(place)
            raise
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange what two names stand for, in one step; False where that cannot be."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            return bool(libc.renamex_np(*names, 2) == 0)
        here = -100  # names are those of the working directory
        return bool(libc.renameat2(here, names[0], here, names[1], 2) == 0)
    except (OSError, AttributeError, TypeError):  # another system, an older libc
        return False


def names_in(folder: Path) -> list[str]:
    """What a folder holds; nothing where there is none, or a file.

    Never what is left of one that another save has put aside and deletes.
    """
    while True:
        try:
            before = os.stat(folder)
            names = sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        with suppress(FileNotFoundError):
            if os.path.samestat(before, os.stat(folder)):
                return names


def clean(place: Path) -> None:
    """Before a save: end or remove what killed ones have left in and beside a folder."""
    settle(place)
    pattern = rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}({_UNFINISHED}|{_REPLACED})"
    own = rf"\.affine-tensor\.[0-9a-f]{{8}}{_UNFINISHED}"
    for folder, names in ((place.parent, pattern), (place, own)):
        for name in names_in(folder):
            if re.fullmatch(names, name):
                _remove(folder / name)


def _remove(leftover: Path) -> None:
    try:
        with _locked(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
            logger.info("%s, left by a save that was interrupted, is deleted", leftover)
    except (BlockingIOError, FileNotFoundError):
        pass  # another process writes it right now, or has deleted it
    except OSError:
        logger.warning("%s may be left by a save that was interrupted", leftover)


# ---- files among others ----------------------------------------------------------


@contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """A folder to write into, of which the files go up into `folder` when all went well.

    Others of `folder` stay, but for the weights of an older save: what is called as
    transformers and mlx-lm call shards. It may be another disk than the one above it.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a folder is written")
    clean(folder)
    with _made(folder / ".affine-tensor") as new:
        with _roomy(folder, new):
            yield new
            names = sorted(path.name for path in new.iterdir())
            (new / _NAMES).write_text("\n".join(names), encoding="utf-8")
            _sync(new)
        while True:
            try:
                new.rename(folder / MOVING)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            settle(folder)  # another process is at it
        _move_up(folder)


def settle(folder: Path) -> None:
    """Before a read: end what killed processes have begun to do with a folder.

    Waits for one that is at it. Raises OSError if it cannot be ended, or not be told
    whether another process is still at it.
    """
    moving = folder / MOVING
    if moving.is_dir():
        with suppress(FileNotFoundError), _locked(moving, wait=True):
            _move_up(folder)
            logger.warning("%s: a save that was interrupted is ended", folder)
    elif not folder.exists() and folder.parent.is_dir():
        place = folder.resolve()
        for old in place.parent.glob(f".{_escaped(place.name)}.*{_REPLACED}"):
            with suppress(FileNotFoundError), _locked(old, wait=True):
                try:
                    old.rename(place)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        return  # another save has put its own there
                    raise
                logger.warning("%s is back, after an interrupted save", folder)
                return


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _move_up(folder: Path) -> None:
    """Move all files of the log up; begun again it ends as if it had not been stopped.

    In between there is no configuration, so that no reader takes a mixture.
    """
    moving = folder / MOVING
    listed = moving / _NAMES
    if listed.exists():
        names = listed.read_text(encoding="utf-8").split("\n")
        if (moving / _CONFIG).exists():
            (folder / _CONFIG).unlink(missing_ok=True)
        for path in folder.iterdir():
            if _WEIGHTS.fullmatch(path.name) and path.name not in names:
                path.unlink()
        for name in sorted(names, key=lambda name: name == _CONFIG):
            if not (moving / name).exists():
                continue
            if name == "README.md" and (folder / name).exists():
                (moving / name).unlink()  # somebody's own words stand there
            else:
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                os.replace(moving / name, folder / name)
        _sync_names(folder)
    # Never empty under its name, where another process could put its own over it.
    done = _new_name(folder / ".affine-tensor")
    moving.rename(done)
    shutil.rmtree(done, ignore_errors=True)
    _sync_names(folder)
