"""What is said when the Hub refuses, fails or is not there, and what to do about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import REVOKED_TOKEN, HubServer, only_loopback, use_hub
from huggingface_hub import constants, errors

from affine_tensor import from_pretrained
from affine_tensor.checkpoint.files import CheckpointError, fetch, probe

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "stdlib-6m-4bit"
WEIGHTS = "model.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    only_loopback(monkeypatch)
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    repos = dict.fromkeys(("org/model", "org/gated", "org/private"), source)
    options: dict[str, Any] = {"gated": ["org/gated"], "private": ["org/private"]}
    with HubServer(repos, token="hf_good", **options) as server:
        use_hub(monkeypatch, server)
        yield server


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the server answer everything, or what a path ends with, by a status or JSON."""
    stock = hub_server._Handler._reply

    def set_answer(
        status: int, code: str = "", path: str = "", body: Any = None
    ) -> None:
        def reply(self: Any, route: Any, query: Any) -> Any:
            if not self.path.partition("?")[0].endswith(path):
                return stock(self, route, query)
            if status == 200:
                return hub_server._json(body)
            return hub_server._refuse(status, code, "so the server says")

        monkeypatch.setattr(hub_server._Handler, "_reply", reply)

    return set_answer


def said(kind: type[BaseException], work: Callable[[], object]) -> str:
    """The last line of an error's text, which is ours."""
    with pytest.raises(kind) as caught:
        work()
    lines = str(caught.value).splitlines()
    assert len(lines) > 1  # huggingface_hub's own words stay
    return lines[-1]


@pytest.mark.parametrize("look", [fetch, probe, from_pretrained])
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(
    look: Callable[..., object], status: int, server: HubServer, answer: Any
) -> None:
    if status == 403:  # with a token of somebody who has not accepted
        answer(403, "GatedRepo", WEIGHTS if look is not probe else "config.json")
    token = "hf_good" if status == 403 else None
    text = said(errors.GatedRepoError, lambda: look("org/gated", token=token))
    assert f"accept its terms first: do so at {server.endpoint}/org/gated" in text
    assert "`hf auth login`" in text
    assert text.endswith("the token= given" if token else "No token was sent")


@pytest.mark.parametrize("repo", ["org/private", "org/nothing"])
@pytest.mark.parametrize("look", [fetch, probe])
def test_a_repository_that_is_not_there(
    repo: str, look: Callable[..., object], server: HubServer
) -> None:
    text = said(errors.RepositoryNotFoundError, lambda: look(repo))
    assert f"Look whether {server.endpoint}/{repo} exists" in text
    assert "hf auth login" in text


def test_the_token_of_the_environment_is_named(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    text = said(errors.RepositoryNotFoundError, lambda: fetch("org/private"))
    assert text.endswith("What was sent is the token of HF_TOKEN or of `hf auth login`")
    assert "hf_other" not in text
    assert fetch("org/private", token="hf_good")


@pytest.mark.parametrize("look", [fetch, probe])
def test_a_revision_that_is_not_there(
    look: Callable[..., object], server: HubServer, answer: Any
) -> None:
    text = said(errors.RevisionNotFoundError, lambda: look("org/model", revision="v9"))
    assert text == (
        "org/model has no revision 'v9'. Look at its branches and tags on the Hub"
    )
    one = {"ref": "refs/heads/main", "targetCommit": "0" * 40}
    refs = {
        "branches": [{"name": "main", **one}],
        "tags": [{"name": "v1", **one}],
        "converts": [],
    }
    answer(200, path="/refs", body=refs)
    text = said(errors.RevisionNotFoundError, lambda: look("org/model", revision="v9"))
    assert text.endswith("has no revision 'v9'. There are main, v1, and commits")


def test_a_token_that_is_not_valid(server: HubServer) -> None:
    text = said(errors.HfHubHTTPError, lambda: fetch("org/model", token=REVOKED_TOKEN))
    assert "The Hub does not know this token (any more): `hf auth login` anew" in text
    assert "token=False sends none" in text
    assert fetch("org/model", token=False)


STATUSES = {
    403: "org/model may not be read with this token: give it the permission at ",
    429: "The Hub answers nobody so often: wait some minutes",
    500: "The Hub itself failed (500): try again later. local_files_only=True",
    503: "The Hub itself failed (503): try again later. local_files_only=True",
}


@pytest.mark.parametrize("status", STATUSES)
def test_a_hub_that_fails(status: int, server: HubServer, answer: Any) -> None:
    answer(status)
    text = said(OSError, lambda: fetch("org/model"))
    assert text.startswith(STATUSES[status])
    cached = f"The cache {constants.HF_HUB_CACHE} has nothing of org/model"
    assert text.endswith(f"{cached}, and there is no folder of that name here")


def test_a_hub_that_fails_leaves_the_cache(server: HubServer, answer: Any) -> None:
    folder = fetch("org/model")
    answer(503)
    assert fetch("org/model") == folder
    text = said(OSError, lambda: fetch("org/model", revision="v1"))
    assert text.endswith(f"has of org/model: main, {folder.name}")


@pytest.mark.parametrize("how", ["offline", "asked", "down"])
def test_without_the_hub(
    how: str, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("org/model")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if how == "down":
        server.stop()
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries
    options = {"local_files_only": True} if how == "asked" else {}
    assert fetch("org/model", **options) == folder
    assert from_pretrained("org/model", **options)
    for look in (fetch, probe):
        work = lambda look=look: look("org/other", **options)  # noqa: E731
        text = said(errors.LocalEntryNotFoundError, work)
        assert {
            "offline": "HF_HUB_OFFLINE is set: unset it to download. ",
            "asked": "Leave local_files_only out to download. ",
            "down": f"look at the network, its proxy and HF_ENDPOINT ({server.endpoint})",
        }[how] in text
        nothing = "has nothing of org/other, and there is no folder of that name here"
        assert text.endswith(nothing)


# ---- downloads that break off ----------------------------------------------------


def test_a_download_that_breaks_off_once_goes_on(server: HubServer) -> None:
    server.cut(WEIGHTS, 100_000)
    folder = fetch("org/model")
    assert (folder / WEIGHTS).read_bytes() == (SOURCE / WEIGHTS).read_bytes()
    again = [r for r in server.requests if r.path.endswith(f"/{WEIGHTS}")]
    assert len([r for r in again if r.method == "GET"]) == 2


class _Always(dict[str, int]):
    def pop(self, name: str, default: Any = None) -> Any:  # type: ignore[override]
        return 1000 if name == WEIGHTS else default


def test_a_download_that_always_breaks_off(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries
    cuts, server._cuts = server._cuts, _Always()
    text = said(Exception, lambda: fetch("org/model"))
    assert text == (
        "The connection broke while org/model was fetched. Try again: the files that "
        "are whole stay in the cache"
    )
    # Half a file is no checkpoint, neither by its folder nor offline.
    place = next(Path(constants.HF_HUB_CACHE).glob("*/snapshots/*"))
    assert not (place / WEIGHTS).exists()
    with pytest.raises(CheckpointError, match=r"there is no model\*\.safetensors"):
        from_pretrained(place)
    with pytest.raises(OSError, match=WEIGHTS):
        fetch("org/model", local_files_only=True)
    server._cuts = cuts
    server.requests.clear()
    assert (fetch("org/model") / WEIGHTS).stat().st_size == (
        SOURCE / WEIGHTS
    ).stat().st_size
    assert json.loads((place / "config.json").read_text())
    assert server.downloads == [WEIGHTS]
