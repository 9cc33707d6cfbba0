"""Which files make up a checkpoint whose index, or whose folder, has something wrong.

Each layout is one that a converter or a careless upload leaves behind. It is read from
a folder and from a repository of the stand-in for the Hub, where no shard that does
not count may be asked for.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import wrapped
from expecttest import assert_expected_inline
from hub_server import REVOKED_TOKEN, HubServer, only_loopback, use_hub
from huggingface_hub import constants, hf_hub_download
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from test_files import raw_bytes, shard, write_raw

from affine_tensor import CheckpointError
from affine_tensor.checkpoint import files
from affine_tensor.checkpoint.files import (
    CONFIG,
    INDEX,
    fetch,
    open_checkpoint,
    probe,
    read_json,
    weight_files,
)

ONE = "model.safetensors"
A, B = shard(1, 2), shard(2, 2)
DENSE_5 = [shard(i, 5) for i in range(1, 6)]

# Names of tensors in shards, and how an index spells them.
Shards = dict[str, list[str]]


def module(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "scales", "biases")]


def index_of(shards: Shards) -> dict[str, str]:
    return {name: file for file, names in shards.items() for name in names}


QUANTIZED: Shards = {A: [*module("x"), "norm.weight"], B: module("y")}
DENSE: Shards = {A: ["x.weight"], B: ["norm.weight", "y.weight"]}
SPLIT: Shards = {A: ["x.weight"], B: ["x.scales", "x.biases", "norm.weight"]}
WHOLE: Shards = {ONE: [name for names in QUANTIZED.values() for name in names]}
DENSE_WHOLE: Shards = {ONE: ["x.weight", "norm.weight", "y.weight"]}
SOURCE: Shards = {file: [f"layer.{i}"] for i, file in enumerate(DENSE_5)}


@dataclass
class Layout:
    """What is there; what is read, or why nothing is; whose headers a Hub is asked."""

    there: Shards
    index: dict[str, str] | None = None
    read: list[str] = field(default_factory=list)
    stale: str = ""
    refused: str = ""
    peeked: set[str] = field(default_factory=set)


LAYOUTS: dict[str, Layout] = {
    "good index": Layout(QUANTIZED, index_of(QUANTIZED), [A, B]),
    "good index, one module in two shards": Layout(SPLIT, index_of(SPLIT), [A, B]),
    # mlx-vlm #1464
    "good index, dense strays": Layout(
        QUANTIZED | SOURCE, index_of(QUANTIZED), [A, B], peeked={A, B}
    ),
    "good index, the same once more": Layout(
        QUANTIZED | WHOLE, index_of(QUANTIZED), [A, B], peeked={A, B}
    ),
    "good index of one file, stray shards": Layout(
        QUANTIZED | WHOLE, index_of(WHOLE), [ONE], peeked={ONE}
    ),
    "good index, part of a numbered series": Layout(
        {A: module("x"), "model-extra.safetensors": ["z"]},
        index_of({A: module("x")}),
        [A],
        peeked={A},
    ),
    "dense checkpoint with a good index, dense strays": Layout(
        DENSE | DENSE_WHOLE, index_of(DENSE), [A, B], peeked={A, B, ONE}
    ),
    # mlx-vlm 0.1.1 wrote the index of the source over its own.
    "index of the source, one file": Layout(
        WHOLE, index_of(SOURCE), [ONE], f"it names {shard(1, 5)} to {shard(5, 5)} (5"
    ),
    "index of the source, shards": Layout(
        QUANTIZED, index_of(SOURCE), [A, B], f"it names {shard(1, 5)} to"
    ),
    "index of the source, shards of its names": Layout(
        QUANTIZED,
        index_of(DENSE),
        [A, B],
        f"it says that norm.weight is in {B}, which lacks it",
    ),
    "index of the source that agrees but for the scales": Layout(
        QUANTIZED,
        {"x.weight": A, "norm.weight": A, "y.weight": B},
        [A, B],
        f"it lacks x.scales, which {A} has",
    ),
    "index of the source, and some of its shards": Layout(
        WHOLE | {shard(2, 5): ["layer.1"]},
        index_of(SOURCE),
        [ONE],
        f"it names {shard(1, 5)}, {shard(3, 5)}, {shard(4, 5)}, {shard(5, 5)}, and",
        peeked={ONE, shard(2, 5)},
    ),
    "index of the source, and all its shards": Layout(
        DENSE | WHOLE,
        index_of(DENSE),
        [ONE],
        f"it names no .scales, and there are some in {ONE}",
        peeked={A, B, ONE},
    ),
    "index of another source, and dense shards of its names": Layout(
        DENSE | WHOLE,
        index_of({A: ["other"], B: ["norm.weight"]}),
        [ONE],
        f"it says that other is in {A}, which lacks it",
        peeked={A, B, ONE},
    ),
    "index with a name that is nowhere, strays": Layout(
        QUANTIZED | DENSE_WHOLE,
        index_of(QUANTIZED) | {"head.weight": B},
        [A, B],
        f"it says that head.weight is in {B}, which lacks it",
        peeked={A, B, ONE},
    ),
    "index with a name that is nowhere, files of other names": Layout(
        {"model.safetensors": module("x"), "vision.safetensors": ["v"]},
        index_of({"model.safetensors": module("x"), "vision.safetensors": ["v", "w"]}),
        ["model.safetensors", "vision.safetensors"],
        "it says that w is in vision.safetensors, which lacks it",
    ),
    "no index": Layout(QUANTIZED, None, [A, B]),
    "no index, dense shards": Layout(
        WHOLE | SOURCE, None, [ONE], peeked={ONE, *SOURCE}
    ),
    "no index, a dense file": Layout(
        SPLIT | DENSE_WHOLE, None, [A, B], peeked={A, B, ONE}
    ),
    "no index, some dense shards": Layout(
        WHOLE | {shard(2, 5): ["a"]}, None, [ONE], peeked={ONE, shard(2, 5)}
    ),
    "no index, two quantized": Layout(
        QUANTIZED | WHOLE,
        refused=f"holds 2 sets of weights: {A}, {B}; {ONE}. Of several the one is read",
        peeked={A, B, ONE},
    ),
    "no index, two dense": Layout(
        SOURCE | DENSE_WHOLE,
        refused=f"sets of weights: {DENSE_5[0]} to {DENSE_5[-1]} (5 files); {ONE}.",
        peeked={*SOURCE, ONE},
    ),
    "stale index, two quantized": Layout(
        {shard(1, 1): module("x"), ONE: module("x")},
        index_of(SOURCE),
        refused="here 2 of them have",
        peeked={shard(1, 1), ONE},
    ),
    # The dense file must not stand in for what an interrupted upload lacks.
    "quantized shards, one missing, and a dense file": Layout(
        {A: QUANTIZED[A]} | DENSE_WHOLE,
        index_of(QUANTIZED),
        refused=f"lacks {B}; fetch it again",
        peeked={A, ONE},
    ),
    "a shard missing": Layout(
        {A: QUANTIZED[A]}, index_of(QUANTIZED), refused=f"lacks {B}; fetch it again"
    ),
}


def write(folder: Path, layout: Layout) -> Path:
    """Write a layout; each tensor says which file it comes from."""
    folder.mkdir(exist_ok=True)
    for number, (file, names) in enumerate(layout.there.items()):
        save_file({n: torch.full((3,), float(number)) for n in names}, folder / file)
    if layout.index is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": layout.index}))
    (folder / CONFIG).write_text('{"model_type": "llama"}')
    return folder


def assert_reads(folder: Path, source: Path, layout: Layout) -> None:
    """The checkpoint in `folder` has all tensors of the right files of `source`."""
    checkpoint = open_checkpoint(folder)
    assert [file.name for file in checkpoint.files] == layout.read
    assert weight_files(folder) == list(checkpoint.files)
    want = {n: v for f in layout.read for n, v in load_file(source / f).items()}
    assert checkpoint.tensors.keys() == want.keys()
    for name, value in want.items():
        assert raw_bytes(checkpoint.tensors[name].read()) == raw_bytes(value)


# ---- folders ---------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_a_folder_holds(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = LAYOUTS[case]
    write(tmp_path, layout)
    with caplog.at_level(logging.WARNING, "affine_tensor"):
        if layout.refused:
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(tmp_path)
            assert layout.refused in str(caught.value)
            assert str(tmp_path) in str(caught.value)
        else:
            assert_reads(tmp_path, tmp_path, layout)  # which opens it twice
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(layout.stale)
    for line in lines:
        assert line.startswith(f"{tmp_path / INDEX} is stale and not followed: ")
        assert layout.stale in line
        assert line.endswith(f"What is read is {', '.join(layout.read)}")


def test_what_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(text: str) -> str:
        return wrapped(text.replace(str(tmp_path), "FOLDER"))

    two = write(tmp_path / "two", LAYOUTS["no index, two dense"])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(two)
    assert_expected_inline(
        said(str(caught.value)),
        """\
the checkpoint in FOLDER/two holds 2 sets of weights:
  model-00001-of-00005.safetensors to model-00005-of-00005.safetensors (5
  files); model.safetensors. Of several the one is read that has tensors
  named *.scales, as MLX's quantized weights do; here none of them have. Put
  the files that belong together into a folder of their own, with the
  config.json, and load that""",
    )
    open_checkpoint(write(tmp_path / "stale", LAYOUTS["index of the source, one file"]))
    assert_expected_inline(
        said(caplog.messages[0]),
        """\
FOLDER/stale/model.safetensors.index.json is stale and not followed: it
  names model-00001-of-00005.safetensors to model-00005-of-00005.safetensors
  (5 files), and there is no such file. What is read is model.safetensors""",
    )


def test_strays_beside_a_good_index_are_not_opened(tmp_path: Path) -> None:
    write(tmp_path, Layout(QUANTIZED, index_of(QUANTIZED)))
    for name in (ONE, "model-old.safetensors"):
        (tmp_path / name).write_bytes(b"version https://git-lfs")
    assert [file.name for file in open_checkpoint(tmp_path).files] == [A, B]


def test_a_stray_of_a_dtype_that_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, Layout(QUANTIZED))
    entry = {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}
    write_raw(tmp_path / ONE, {"x.weight": entry}, bytes(2))
    assert [file.name for file in open_checkpoint(tmp_path).files] == [A, B]


def test_a_good_index_decides_which_of_two_tensors_counts(tmp_path: Path) -> None:
    there = {A: [*module("x"), "shared"], B: [*module("y"), "shared"]}
    for number, file in enumerate((A, B)):
        write(tmp_path, Layout(there, index_of(there) | {"shared": file}))
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.tensors["shared"].file.name == file
        assert checkpoint.tensors["shared"].read().tolist() == [number] * 3
        assert len(checkpoint.tensors) == 7


@pytest.mark.parametrize("why", ["stale", "silent", "absent"])
def test_otherwise_a_tensor_in_two_files_is_refused(why: str, tmp_path: Path) -> None:
    there = {A: [*module("x"), "shared"], B: [*module("y"), "shared"]}
    index = {
        "stale": index_of(there) | {"nowhere": A},
        "silent": {n: f for n, f in index_of(there).items() if n != "shared"},
        "absent": None,
    }[why]
    write(tmp_path, Layout(there, index))
    with pytest.raises(CheckpointError, match=f"shared is in {A} and in {B}"):
        open_checkpoint(tmp_path)


def test_a_broken_shard_is_not_a_stale_index(tmp_path: Path) -> None:
    write(tmp_path, Layout(QUANTIZED | WHOLE, index_of(QUANTIZED)))
    (tmp_path / B).write_bytes((tmp_path / B).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{B} has \d+ bytes .* truncated"):
        open_checkpoint(tmp_path)


def test_the_files_of_mlx_lm_with_the_index_of_their_source(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    utils = pytest.importorskip("mlx_lm.utils")

    class Model(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 64, bias=False)

    model = Model()
    utils.save_model(tmp_path / "source", model)
    nn.quantize(model, group_size=32, bits=4)
    utils.save_model(tmp_path / "mlx", model)
    want = {
        name: mx.array(value)
        for name, value in mx.load(str(tmp_path / "mlx" / ONE)).items()
    }
    assert open_checkpoint(tmp_path / "mlx").tensors.keys() == want.keys()
    shutil.copy(tmp_path / "source" / INDEX, tmp_path / "mlx" / INDEX)
    checkpoint = open_checkpoint(tmp_path / "mlx")
    assert checkpoint.tensors.keys() == want.keys()
    for name, stored in checkpoint.tensors.items():
        assert stored.read().tolist() == want[name].tolist()


# ---- numbers that JSON lacks -----------------------------------------------------

TAGGED = (
    '{"a": {"__float__": "Infinity"}, "b": [{"__float__": "-Infinity"}, '
    '{"c": {"__float__": "NaN"}}], "d": Infinity, "e": [-Infinity, NaN], '
    '"f": {"__float__": "1.5"}, "g": {"__float__": []}, "h": {"__float__": null}, '
    '"i": {"__float__": "NaN", "more": 1}, "j": {"float": "NaN"}, "k": {}}'
)


def test_floats_of_the_configuration_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(tmp_path, Layout(WHOLE))
    (tmp_path / CONFIG).write_text(TAGGED)
    config = open_checkpoint(tmp_path).config
    want = transformers.PreTrainedConfig._dict_from_json_file(tmp_path / CONFIG)
    assert repr(config) == repr(want) == repr(probe(tmp_path))  # nan is not nan
    assert config["a"] == config["d"] == math.inf
    assert config["b"][0] == config["e"][0] == -math.inf
    assert math.isnan(config["b"][1]["c"])
    assert config["f"] == {"__float__": "1.5"}
    # As it is written, so that it can be written again.
    assert read_json(tmp_path / CONFIG)["a"] == {"__float__": "Infinity"}


def test_floats_of_the_configuration_are_those_of_mlx_lm(tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    decode = getattr(utils, "_decode_tagged_floats", None)
    if decode is None:
        pytest.skip("this mlx-lm does not decode them")
    text = TAGGED.replace('"g": {"__float__": []}, ', "")  # which mlx-lm cannot hash
    (tmp_path / CONFIG).write_text(text)
    assert repr(probe(tmp_path)) == repr(decode(json.loads(text)))


def test_a_configuration_that_is_a_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"__float__": "NaN"}')
    with pytest.raises(CheckpointError, match="holds a float, not an object"):
        probe(tmp_path)


# ---- the Hub ---------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serve a layout as org/model and org/private, and return the server."""
    only_loopback(monkeypatch)
    with ExitStack() as stack:

        def serve(layout: Layout, **options: Any) -> HubServer:
            source = write(tmp_path / "source", layout)
            (source / "tokenizer.json").write_text("{}")
            repos = {"org/model": source, "org/private": source}
            server = HubServer(
                repos, token="hf_good", private={"org/private"}, **options
            )
            use_hub(monkeypatch, stack.enter_context(server))
            return server

        yield serve


def weights(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors"))


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_a_repository_holds(case: str, hub: Any, tmp_path: Path) -> None:
    layout = LAYOUTS[case]
    server = hub(layout)
    commit, _ = server.snapshot("org/model")
    if layout.refused:
        with pytest.raises(CheckpointError) as caught:
            fetch("org/model")
        assert layout.refused in str(caught.value)
        assert f"the repository org/model (commit {commit})" in str(caught.value)
    else:
        assert_reads(fetch("org/model"), tmp_path / "source", layout)
    assert weights(server.downloads) == layout.read
    small = {CONFIG, "tokenizer.json"} | (
        {INDEX} if layout.index is not None else set()
    )
    assert {n for n in server.downloads if not n.endswith(".safetensors")} == small
    # Headers only where they decide, each once, and before any weights.
    assert sorted(server.peeks) == sorted(layout.peeked)
    sent = [(r.is_peek, r.path) for r in server.requests if r.path.endswith("tensors")]
    assert sent == sorted(sent, key=lambda request: not request[0])
    # Nothing was asked for that is not there, and all of it from one commit.
    assert {r.status for r in server.requests} <= {200, 206}
    first, *others = [r.path for r in server.requests]
    assert first.endswith("/revision/main")
    assert all(f"/{commit}" in path for path in others)


def test_a_second_fetch_asks_for_no_file(hub: Any) -> None:
    server = hub(LAYOUTS["index of the source, and all its shards"])
    folder = fetch("org/model")
    server.requests.clear()
    assert fetch("org/model") == folder
    assert server.downloads == []
    # The header of what is here is read here; the two strays are asked again.
    assert sorted(server.peeks) == [A, B]


@pytest.mark.parametrize("ranges", ["ignored", "refused"])
@pytest.mark.parametrize(
    "case", ["no index, dense shards", "good index, dense strays", "a shard missing"]
)
def test_a_server_without_ranges_serves_too(
    case: str, ranges: str, hub: Any, tmp_path: Path
) -> None:
    layout = LAYOUTS[case]
    server = hub(layout, ranges=ranges)
    if layout.refused:
        with pytest.raises(CheckpointError, match=layout.refused):
            fetch("org/model")
    else:
        folder = fetch("org/model", cache_dir=tmp_path / "cache")
        assert_reads(folder, tmp_path / "source", layout)
        assert not Path(constants.HF_HUB_CACHE).exists()
    # Where ranges are refused, the files that decide are downloaded whole.
    whole = layout.peeked if ranges == "refused" else set()
    assert set(weights(server.downloads)) == whole | set(layout.read)


def test_a_header_longer_than_the_first_request(hub: Any, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.weight" for i in range(2000)]
    there = {ONE: [*names, *module("x")], A: [*names, "x.weight"], B: ["y"]}
    server = hub(layout := Layout(there, None, [ONE]))
    assert_reads(fetch("org/model"), tmp_path / "source", layout)
    assert sorted(server.peeks) == sorted([ONE, ONE, A, A, B])


def test_a_stray_that_is_no_safetensors_is_named(hub: Any, tmp_path: Path) -> None:
    server = hub(Layout(QUANTIZED))
    (tmp_path / "source" / ONE).write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match=rf"{ONE}: its header would be"):
        fetch("org/model")
    assert weights(server.downloads) == [ONE]


def test_names_are_not_taken_for_patterns(hub: Any, tmp_path: Path) -> None:
    odd = "model[1]*.safetensors"
    there = {odd: module("x"), "model1.safetensors": ["x.weight"]}
    layout = Layout(there, index_of({odd: there[odd]}), [odd], peeked={odd})
    server = hub(layout)
    assert_reads(fetch("org/model"), tmp_path / "source", layout)
    assert weights(server.downloads) == [odd]


def test_only_weights_of_the_folder_itself_are_listed(hub: Any, tmp_path: Path) -> None:
    server = hub(layout := LAYOUTS["index of the source, shards"])
    below = tmp_path / "source" / "model-original"
    shutil.copytree(write(tmp_path / "other", Layout(WHOLE)), below)
    (below / CONFIG).unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "source" / "consolidated.safetensors")
    assert_reads(fetch("org/model"), tmp_path / "source", layout)
    assert weights(server.downloads) == [A, B]
    assert server.peeks == []


def test_a_repository_without_weights(hub: Any) -> None:
    hub(Layout({}))
    folder = fetch("org/model")  # a tokenizer is taken from such a one
    assert (folder / "tokenizer.json").is_file()
    with pytest.raises(
        CheckpointError, match=r"it holds config\.json, tokenizer\.json"
    ):
        open_checkpoint(folder)


def test_an_empty_repository(hub: Any, tmp_path: Path) -> None:
    hub(Layout({}))
    for file in (tmp_path / "source").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="it holds no files"):
        open_checkpoint(fetch("org/model"))


def test_an_index_of_a_repository_does_not_lead_out(hub: Any) -> None:
    server = hub(Layout(WHOLE, {"x.weight": "../../secret.safetensors"}))
    with pytest.raises(CheckpointError, match=r"names '\.\./\.\./secret\.safetensors'"):
        fetch("org/model")
    assert weights(server.downloads) == []


def test_token_cache_and_revision_count(hub: Any, tmp_path: Path) -> None:
    layout = LAYOUTS["good index, dense strays"]
    server = hub(layout)
    with pytest.raises(hub_errors.RepositoryNotFoundError):
        fetch("org/private", token=False)
    server.requests.clear()
    commit, _ = server.snapshot("org/private")
    folder = fetch(
        "org/private", token="hf_good", revision=commit, cache_dir=tmp_path / "cache"
    )
    assert_reads(folder, tmp_path / "source", layout)
    assert folder.is_relative_to(tmp_path / "cache")
    assert not Path(constants.HF_HUB_CACHE, "models--org--private").exists()
    assert sorted(server.peeks) == [A, B]
    assert all(r.token and f"/{commit}" in r.path for r in server.requests)
    with pytest.raises(hub_errors.RevisionNotFoundError):
        fetch("org/model", revision="v9")


WAYS = ["environment", "argument", "down"]


def cut_off(way: str, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Take the network away; returns local_files_only."""
    if way == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if way == "down":
        server.stop()
        # huggingface_hub asks five times for what is not in the cache.
        monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.requests.clear()
    return way == "argument"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [c for c in LAYOUTS if not LAYOUTS[c].refused])
def test_without_a_network_the_cache_serves(
    case: str, way: str, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hub(layout := LAYOUTS[case])
    folder = fetch("org/model")
    local = cut_off(way, server, monkeypatch)
    assert fetch("org/model", local_files_only=local) == folder
    assert fetch("org/model", revision=folder.name, local_files_only=local) == folder
    assert_reads(folder, tmp_path / "source", layout)
    assert server.requests == []


@pytest.mark.parametrize("way", WAYS)
def test_without_a_network_what_was_never_fetched_is_missing(
    way: str, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hub(LAYOUTS["good index"])
    local = cut_off(way, server, monkeypatch)
    for ask in (fetch, probe):
        with pytest.raises(hub_errors.LocalEntryNotFoundError):
            ask("org/model", local_files_only=local)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_download_is_not_whole_without_a_network(
    way: str, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hub(LAYOUTS["good index"])
    (fetch("org/model") / B).unlink()
    local = cut_off(way, server, monkeypatch)
    # Newer versions of huggingface_hub remember what belongs to a snapshot.
    with pytest.raises((hub_errors.LocalEntryNotFoundError, CheckpointError)) as caught:
        open_checkpoint(fetch("org/model", local_files_only=local))
    assert B in str(caught.value)


def test_an_interrupted_download_is_continued(hub: Any, tmp_path: Path) -> None:
    server = hub(layout := LAYOUTS["good index"])
    (fetch("org/model") / B).unlink()
    server.requests.clear()
    assert_reads(fetch("org/model"), tmp_path / "source", layout)
    assert weights(server.downloads) in ([], [B])  # its blob may still be there


def test_a_hub_that_does_not_list_leaves_what_snapshot_download_does(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hub(layout := LAYOUTS["good index, dense strays"])
    monkeypatch.setattr(files, "_listing", lambda *args: None)
    assert_reads(fetch("org/model"), tmp_path / "source", layout)
    assert weights(server.downloads) == sorted(layout.there)


# ---- probe -----------------------------------------------------------------------


def test_a_probe_of_a_repository_fetches_one_file(hub: Any, tmp_path: Path) -> None:
    server = hub(LAYOUTS["good index"])
    (tmp_path / "source" / CONFIG).write_text('{"limit": {"__float__": "Infinity"}}')
    for downloads in ([CONFIG], []):
        server.requests.clear()
        assert probe("org/model") == {"limit": math.inf}
        assert server.downloads == downloads
        assert len(server.requests) <= 2
    server.requests.clear()
    assert probe("org/model", local_files_only=True) == {"limit": math.inf}
    assert server.requests == []
    server.stop()
    assert probe("org/model") == {"limit": math.inf}


def test_a_probe_of_a_folder_reads_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, LAYOUTS["no index, two dense"])  # which cannot be opened
    for owner, name in (
        (huggingface_hub, "snapshot_download"),
        (huggingface_hub, "hf_hub_download"),
        (files, "_open_header"),
    ):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("asked"))
    assert probe(tmp_path) == probe(str(tmp_path)) == {"model_type": "llama"}
    (tmp_path / CONFIG).unlink()
    assert probe(tmp_path) == {}
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        probe(tmp_path)


@pytest.mark.parametrize("way", [None, *WAYS])
def test_a_probe_where_there_is_no_configuration(
    way: str | None, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hub(LAYOUTS["good index"])
    (tmp_path / "source" / CONFIG).unlink()
    local = False
    if way:
        fetch("org/model")
        local = cut_off(way, server, monkeypatch)
    assert probe("org/model", local_files_only=local) == {}
    assert server.downloads == []


def test_a_probe_of_a_cache_that_others_filled(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hub(LAYOUTS["good index"])
    hf_hub_download("org/model", CONFIG)
    cut_off("environment", server, monkeypatch)
    assert probe("org/model") == {"model_type": "llama"}


def test_a_probe_raises_what_a_fetch_raises(hub: Any, tmp_path: Path) -> None:
    hub(LAYOUTS["good index"])
    cases: list[tuple[str, dict[str, Any], type[Exception]]] = [
        ("org/none", {}, hub_errors.RepositoryNotFoundError),
        ("org/private", {"token": False}, hub_errors.RepositoryNotFoundError),
        ("org/model", {"revision": "v9"}, hub_errors.RevisionNotFoundError),
        ("org/model", {"token": REVOKED_TOKEN}, hub_errors.HfHubHTTPError),
        ("no such folder", {}, FileNotFoundError),
        ("", {}, FileNotFoundError),
        (str(tmp_path / "source" / CONFIG), {}, FileNotFoundError),
    ]
    for source, keywords, error in cases:
        for ask in (fetch, probe):
            with pytest.raises(error):
                ask(source, **keywords)
    commit = probe("org/private", token="hf_good", cache_dir=tmp_path / "cache")
    assert commit == {"model_type": "llama"}
    assert list((tmp_path / "cache").rglob(CONFIG))
