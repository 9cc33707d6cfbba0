"""What to do about an error of the Hub, said in the error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub


@contextmanager
def advised(
    repo: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
) -> Iterator[None]:
    """Add to errors of huggingface_hub what to do; their classes stay what they are."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        caused = [str(error), *map(repr, (error.__cause__, error.__context__))]
        text = _of_status(_status(error.__cause__), repo, token)
        _add(error, f"{text or _not_here(caused)}. {_cached(repo, cache_dir)}")
        raise
    except Exception as error:
        text = _of_error(error, repo, revision, token)
        if text:
            _add(error, text)
        raise


def _add(error: BaseException, text: str) -> None:
    said = str(error.args[0]) if error.args else ""
    if text not in said:
        error.args = (f"{said}\n{text}", *error.args[1:])


def _of_error(
    error: Exception, repo: str, revision: str | None, token: str | bool | None
) -> str:
    from huggingface_hub import errors

    place = f"{huggingface_hub.constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} asks everyone to accept its terms first: do so at {place}, then "
            "`hf auth login` here with that account (or HF_TOKEN, or token=). "
            f"{_sent(token)}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"Look whether {place} exists. A private repository is there only for those "
            "who may read it: `hf auth login` (or HF_TOKEN, or token=). "
            f"{_sent(token)}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}. {_revisions(repo, token)}"
    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(_status(error), repo, token)
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests"):
        return (
            f"The connection broke while {repo} was fetched. Try again: the files that "
            "are whole stay in the cache"
        )
    return ""


def _status(error: BaseException | None) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _of_status(status: int, repo: str, token: str | bool | None) -> str:
    if status == 401:
        return (
            "The Hub does not know this token (any more): `hf auth login` anew, or set "
            "HF_TOKEN or token= to another; token=False sends none, which will do for "
            f"public repositories. {_sent(token)}"
        )
    if status == 403:
        return (
            f"{repo} may not be read with this token: give it the permission at "
            f"{huggingface_hub.constants.ENDPOINT}/settings/tokens. {_sent(token)}"
        )
    if status == 429:
        return (
            "The Hub answers nobody so often: wait some minutes; `hf auth login` helps"
        )
    if status >= 500:
        return (
            f"The Hub itself failed ({status}): try again later. "
            "local_files_only=True takes what is in the cache"
        )
    return ""


def _not_here(caused: list[str]) -> str:
    offline = huggingface_hub.constants.is_offline_mode()
    if offline:
        return "HF_HUB_OFFLINE is set: unset it to download"
    if any("outgoing traffic has been disabled" in text for text in caused):
        return "Leave local_files_only out to download"
    return (
        "The Hub does not answer: look at the network, its proxy and HF_ENDPOINT "
        f"({huggingface_hub.constants.ENDPOINT})"
    )


def _cached(repo: str, cache_dir: str | Path | None) -> str:
    """Which revisions the cache has."""
    cache = Path(cache_dir or huggingface_hub.constants.HF_HUB_CACHE)
    folder = cache / f"models--{repo.replace('/', '--')}"
    names = [
        path.relative_to(folder / "refs").as_posix()
        for path in sorted((folder / "refs").rglob("*"))
        if path.is_file()
    ]
    commits = [path.name for path in sorted((folder / "snapshots").glob("*"))]
    if not commits:
        return (
            f"The cache {cache} has nothing of {repo}, and there is no folder of that "
            "name here"
        )
    return f"The cache {cache} has of {repo}: {', '.join([*names, *commits])}"


def _revisions(repo: str, token: str | bool | None) -> str:
    try:
        refs = huggingface_hub.HfApi(token=token).list_repo_refs(repo)
    except Exception:
        return "Look at its branches and tags on the Hub"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"There are {shown}, and commits"


def _sent(token: str | bool | None) -> str:
    if isinstance(token, str):
        return "What was sent is the token= given"
    if token is False or not huggingface_hub.get_token():
        return "No token was sent"
    return "What was sent is the token of HF_TOKEN or of `hf auth login`"
