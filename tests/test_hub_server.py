"""The stand-in for the Hub, seen through huggingface_hub and transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import REVOKED_TOKEN, HubServer, only_loopback, use_hub
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    (folder / "extra").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text("# A model")
    (folder / "extra" / "a b.txt").write_text("nested")
    return folder


@pytest.fixture
def server(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    older = tmp_path / "older"
    older.mkdir()
    (older / "config.json").write_text('{"model_type": "gpt2"}')
    repos: dict[str, Path | dict[str, Path]] = {
        "org/model": {"main": folder, "refs/pr/1": older},
        "single": folder,
        "org/private": folder,
        "org/gated": folder,
    }
    only_loopback(monkeypatch)
    with HubServer(
        repos, token="hf_good", private={"org/private"}, gated={"org/gated"}
    ) as server:
        use_hub(monkeypatch, server)
        yield server


def names(folder: str | Path) -> set[str]:
    paths = (p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix() for p in paths}


def test_snapshot_has_every_file_unchanged(server: HubServer, folder: Path) -> None:
    path = snapshot_download("org/model")
    assert names(path) == names(folder)
    assert all(
        (Path(path) / n).read_bytes() == (folder / n).read_bytes()
        for n in names(folder)
    )
    assert Path(path).is_relative_to(server.home)
    assert not any(r.token for r in server.requests)
    assert all("org/model" in r.path for r in server.requests)


def test_snapshot_fetches_exactly_the_allowed_patterns(server: HubServer) -> None:
    path = snapshot_download("org/model", allow_patterns=["*.json", "*.txt"])
    assert names(path) == {"config.json", "extra/a b.txt"}
    assert sorted(server.downloads) == ["config.json", "extra/a b.txt"]


def test_second_snapshot_comes_from_the_cache(server: HubServer) -> None:
    first = snapshot_download("org/model")
    assert len(server.downloads) == 4
    server.requests.clear()
    assert snapshot_download("org/model") == first
    assert server.requests
    assert server.downloads == []


def test_changed_file_is_a_new_commit(server: HubServer, folder: Path) -> None:
    before = snapshot_download("org/model")
    server.requests.clear()
    (folder / "config.json").write_text("{}")
    after = snapshot_download("org/model")
    assert after != before
    assert (Path(after) / "config.json").read_text() == "{}"
    assert server.downloads == ["config.json"]


def test_revision_selects_by_name_and_by_commit(server: HubServer) -> None:
    commit, files = server.snapshot("org/model", "refs/pr/1")
    by_name = snapshot_download("org/model", revision="refs/pr/1")
    assert Path(by_name).name == commit
    assert names(by_name) == set(files)
    assert snapshot_download("org/model", revision=commit) == by_name
    config = hf_hub_download("org/model", "config.json", revision=commit)
    assert json.loads(Path(config).read_text()) == {"model_type": "gpt2"}
    with pytest.raises(hub_errors.RevisionNotFoundError):
        snapshot_download("org/model", revision="v9")
    with pytest.raises(hub_errors.RevisionNotFoundError):
        hf_hub_download("org/model", "config.json", revision="v9")


def test_missing_file_is_remembered(server: HubServer) -> None:
    with pytest.raises(hub_errors.EntryNotFoundError):
        hf_hub_download("org/model", "nothing.json")
    found = huggingface_hub.try_to_load_from_cache("org/model", "nothing.json")
    assert found is huggingface_hub._CACHED_NO_EXIST


def test_missing_repo(server: HubServer) -> None:
    for download in (
        lambda: snapshot_download("org/none"),
        lambda: hf_hub_download("org/none", "config.json"),
        lambda: huggingface_hub.model_info("org/none"),
    ):
        with pytest.raises(hub_errors.RepositoryNotFoundError):
            download()
    assert {r.status for r in server.requests} == {404}


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_private_repo_is_hidden_without_its_token(
    server: HubServer, token: str | bool
) -> None:
    with pytest.raises(hub_errors.RepositoryNotFoundError) as caught:
        snapshot_download("org/private", token=token)
    assert not isinstance(caught.value, hub_errors.GatedRepoError)
    assert [r.status for r in server.requests] == [401]
    assert server.requests[0].token is bool(token)
    assert names(snapshot_download("org/private", token="hf_good"))


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_gated_repo_lists_but_keeps_its_files(
    server: HubServer, token: str | bool
) -> None:
    assert "config.json" in HfApi(token=token).list_repo_files("org/gated")
    with pytest.raises(hub_errors.GatedRepoError):
        snapshot_download("org/gated", token=token)
    with pytest.raises(hub_errors.GatedRepoError):
        hf_hub_download("org/gated", "config.json", token=token)
    assert server.downloads == []
    assert hf_hub_download("org/gated", "config.json", token="hf_good")


def test_revoked_token_is_refused_on_public_repos(server: HubServer) -> None:
    with pytest.raises(
        hub_errors.HfHubHTTPError, match="Invalid credentials"
    ) as caught:
        hf_hub_download("org/model", "config.json", token=REVOKED_TOKEN)
    assert not isinstance(caught.value, hub_errors.RepositoryNotFoundError)


def test_token_of_the_environment_is_sent(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert hf_hub_download("org/private", "config.json")
    assert all(r.token for r in server.requests)


def test_offline_after_download_makes_no_request(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = snapshot_download("org/model")
    server.requests.clear()
    assert snapshot_download("org/model", local_files_only=True) == path
    config = hf_hub_download("org/model", "config.json", local_files_only=True)
    with pytest.raises(hub_errors.LocalEntryNotFoundError):
        snapshot_download("single", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert snapshot_download("org/model") == path
    assert hf_hub_download("org/model", "config.json") == config
    with pytest.raises(hub_errors.LocalEntryNotFoundError):
        hf_hub_download("single", "config.json")
    assert server.requests == []


def test_stopped_server_leaves_the_cache(server: HubServer) -> None:
    path = snapshot_download("org/model")
    server.requests.clear()
    server.stop()
    assert snapshot_download("org/model") == path
    with pytest.raises(hub_errors.LocalEntryNotFoundError):
        snapshot_download("single")
    assert server.requests == []


def test_cache_dir_and_local_dir(server: HubServer, tmp_path: Path) -> None:
    cached = snapshot_download("org/model", cache_dir=tmp_path / "cache")
    assert Path(cached).is_relative_to(tmp_path / "cache")
    server.requests.clear()
    local = tmp_path / "local"
    for _ in range(2):
        path = hf_hub_download("org/model", "extra/a b.txt", local_dir=local)
        assert path == str(local / "extra" / "a b.txt")
    assert server.downloads == ["extra/a b.txt"]


def test_interrupted_download_resumes(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only whole chunks are kept, and one is 10 MB; a retry waits a second.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.cut("model.safetensors", after=1024)
    try:
        path = hf_hub_download("org/model", "model.safetensors")
    except Exception as error:  # huggingface_hub 1.0 leaves the retry to its caller
        if "peer closed connection" not in str(error):
            raise
        path = hf_hub_download("org/model", "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    gets = [(r.status, r.range) for r in server.requests if r.method == "GET"]
    assert gets == [(200, None), (206, "bytes=1024-")]


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [
        ("bytes=0-9", 206, WEIGHTS[:10]),
        ("bytes=10-99999", 206, WEIGHTS[10:]),
        (f"bytes={len(WEIGHTS)}-", 416, b""),
    ],
    ids=["within", "to the end", "beyond"],
)
def test_ranges(server: HubServer, wanted: str, status: int, part: bytes) -> None:
    url = huggingface_hub.hf_hub_url("org/model", "model.safetensors")
    answer = huggingface_hub.get_session().get(url, headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (status, part)


@pytest.mark.parametrize(("ranges", "status"), [("ignored", 200), ("refused", 501)])
def test_a_server_without_ranges(server: HubServer, ranges: str, status: int) -> None:
    server.ranges = ranges
    url = huggingface_hub.hf_hub_url("org/model", "model.safetensors")
    answer = huggingface_hub.get_session().get(url, headers={"Range": "bytes=0-9"})
    content = WEIGHTS if status == 200 else b""
    assert (answer.status_code, answer.content) == (status, content)
    assert hf_hub_download("org/model", "model.safetensors")  # asks for the whole


def test_a_header_is_a_peek_and_a_file_is_a_download(
    server: HubServer, folder: Path
) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(9)
    (folder / "model.safetensors").write_bytes(content)
    api = HfApi()
    found = api.parse_safetensors_file_metadata("org/model", "model.safetensors")
    assert set(found.tensors) == {"a"}
    assert (server.peeks, server.downloads) == (["model.safetensors"], [])
    hf_hub_download("org/model", "model.safetensors")
    assert (server.peeks, server.downloads) == (["model.safetensors"],) * 2


@pytest.mark.parametrize("repo", ["org/model", "single"])
def test_info_and_listings(server: HubServer, folder: Path, repo: str) -> None:
    info = huggingface_hub.model_info(repo)
    assert info.id == repo
    assert info.sha == server.snapshot(repo)[0]
    assert {s.rfilename for s in info.siblings or []} == names(folder)
    assert HfApi().repo_info(repo, revision=info.sha).sha == info.sha
    assert set(huggingface_hub.list_repo_files(repo)) == names(folder)
    top = {entry.path for entry in HfApi().list_repo_tree(repo)}
    assert top == {"README.md", "config.json", "extra", "model.safetensors"}
    below = [entry.path for entry in HfApi().list_repo_tree(repo, "extra")]
    assert below == ["extra/a b.txt"]
    with pytest.raises(hub_errors.EntryNotFoundError):
        list(HfApi().list_repo_tree(repo, "nowhere"))
    assert huggingface_hub.file_exists(repo, "config.json")
    assert not huggingface_hub.file_exists(repo, "config.yaml")


def test_what_is_pushed_can_be_fetched(server: HubServer, folder: Path) -> None:
    api = HfApi(token="hf_good")
    url = api.create_repo("org/new")
    assert url.repo_id == "org/new"
    assert api.list_repo_files("org/new") == []
    with pytest.raises(hub_errors.HfHubHTTPError, match="409"):
        api.create_repo("org/new")
    api.create_repo("org/new", exist_ok=True)
    assert api.create_repo("mine").repo_id == "somebody/mine"
    first = api.upload_folder(repo_id="org/new", folder_path=folder)
    path = snapshot_download("org/new")
    assert Path(path).name == first.oid == server.snapshot("org/new")[0]
    assert names(path) == names(folder)
    assert (Path(path) / "model.safetensors").read_bytes() == WEIGHTS
    # Again, with one file changed and one deleted.
    (folder / "config.json").write_text("{}")
    api.upload_folder(
        repo_id="org/new", folder_path=folder, delete_patterns="extra/*.txt"
    )
    api.delete_file("README.md", "org/new")
    path = snapshot_download("org/new")
    assert names(path) == names(folder) - {"README.md"}
    assert (Path(path) / "config.json").read_text() == "{}"
    assert server.uploads == {}


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_pushing_needs_the_token(
    server: HubServer, folder: Path, token: str | bool
) -> None:
    api = HfApi(token=token)
    with pytest.raises(hub_errors.HfHubHTTPError, match="401"):
        api.create_repo("org/new")
    with pytest.raises(hub_errors.HfHubHTTPError, match="401"):
        api.upload_folder(repo_id="org/model", folder_path=folder)
    assert "org/new" not in server.repos
    with pytest.raises(hub_errors.RevisionNotFoundError):
        HfApi(token="hf_good").upload_folder(
            repo_id="org/model", folder_path=folder, revision="v9"
        )


@pytest.mark.parametrize("turn", ["first", "second"])  # second: no copy of the first
def test_transformers_loads_config_and_tokenizer(
    server: HubServer, folder: Path, turn: str
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for expected in ({"config.json", "tokenizer.json", "tokenizer_config.json"}, set()):
        server.requests.clear()
        config = transformers.AutoConfig.from_pretrained("org/model")
        tokenizer = transformers.AutoTokenizer.from_pretrained("org/model")
        assert config.model_type == "llama"
        assert config._name_or_path == "org/model"
        assert tokenizer("hello")["input_ids"] == [1]
        assert server.requests
        assert set(server.downloads) == expected


def test_proxies_do_not_catch_the_stand_in(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    huggingface_hub.close_session()
    with pytest.raises(Exception, match="refused"):
        huggingface_hub.get_session().get(server.endpoint)
    use_hub(monkeypatch, server)
    assert huggingface_hub.get_session().get(server.endpoint).status_code == 404
    assert hf_hub_download("org/model", "config.json")
    huggingface_hub.close_session()


def test_child_process_goes_to_the_stand_in(server: HubServer) -> None:
    code = "import huggingface_hub as h; print(h.snapshot_download('org/model'))"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    path = child.stdout.strip().splitlines()[-1]
    assert os.path.dirname(path).startswith(str(server.home))
    assert len(server.downloads) == 4


def test_nothing_of_the_stand_in_is_left(tmp_path: Path) -> None:
    hf_api = huggingface_hub.hf_api.api

    def state() -> object:
        values = {n: v for n, v in vars(constants).items() if n.isupper()}
        return values, hf_api.endpoint, dict(os.environ)

    before = state()
    with pytest.MonkeyPatch.context() as patch, HubServer({"a/b": tmp_path}) as server:
        use_hub(patch, server)
        assert constants.ENDPOINT == hf_api.endpoint == server.endpoint
    assert state() == before
    assert not server.home.exists()
