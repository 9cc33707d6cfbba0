"""Which files are read, what their headers may say, and how tensors come out of them.

The oracle is the safetensors library's own reading of the same file.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from affine_tensor import CheckpointError
from affine_tensor.checkpoint.files import (
    CONFIG,
    DTYPES,
    INDEX,
    fetch,
    open_checkpoint,
    read_header,
    read_json,
    weight_files,
)


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header, without the padding that would align it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: object, shape: object, start: object, end: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def read_by_safetensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def assert_same(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert raw_bytes(got) == raw_bytes(want)


def assert_read_as_by_safetensors(file: Path) -> None:
    want = read_by_safetensors(file)
    got = {stored.name: stored.read() for stored in read_header(file)}
    assert got.keys() == want.keys()
    for name in want:
        assert_same(got[name], want[name])


# ---- reading ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_read_as_safetensors_reads_it(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def values(*shape: int) -> Tensor:
        top = 2 if dtype == torch.bool else 256
        generator = torch.Generator().manual_seed(len(shape))
        size = (int(torch.Size(shape).numel()) * dtype.itemsize,)
        data = torch.randint(top, size, dtype=torch.uint8, generator=generator)
        return data.view(dtype).view(shape)

    shapes = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0, 2)]
    tensors = {f"t{i}": values(*shape) for i, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_read_as_by_safetensors(tmp_path / "model.safetensors")
    got = {t.name: t.read() for t in read_header(tmp_path / "model.safetensors")}
    for name, tensor in tensors.items():
        assert_same(got[name], tensor)


@pytest.mark.parametrize("padding", range(8))
def test_data_at_any_address_comes_out_aligned(padding: int, tmp_path: Path) -> None:
    # The first tensor shifts the second to an odd place within the data, too.
    data = bytes(range(3)) + struct.pack("<4f", 1.5, -2.0, 3.25, 0.0)
    header = {"a": entry("U8", [3], 0, 3), "b": entry("F32", [2, 2], 3, 19)}
    text = json.dumps(header).encode() + b" " * padding
    file = write_raw(tmp_path / "model.safetensors", text, data)
    first, second = read_header(file)
    assert (second.start - padding - 8 - 3) == len(json.dumps(header))
    value = second.read()
    assert value.tolist() == [[1.5, -2.0], [3.25, 0.0]]
    for tensor in (first.read(), value):
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_files_that_mlx_writes(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    arrays = {
        name: mx.arange(6 * 7).reshape(6, 7).astype(getattr(mx, name))
        for name in ("float32", "float16", "bfloat16", "uint32", "uint8", "int64")
    }
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    assert_read_as_by_safetensors(file)
    assert all(stored.read().data_ptr() % 64 == 0 for stored in read_header(file))


class _ShortReads(io.BytesIO):
    """Gives at most three bytes at a time, as one read of Linux gives 2 GB at most."""

    def readinto(self, buffer: Any) -> int:
        part = self.read(min(3, len(buffer)))
        buffer[: len(part)] = part
        return len(part)


class _ShortPath(type(Path())):  # type: ignore[misc]
    def open(self, *args: Any, **kwargs: Any) -> Any:
        return _ShortReads(Path(self).read_bytes())


def test_a_read_that_gives_less_than_asked_is_repeated(tmp_path: Path) -> None:
    value = torch.randn(5, 7)
    save_file({"a": value}, tmp_path / "model.safetensors")
    (stored,) = read_header(tmp_path / "model.safetensors")
    short = dataclasses.replace(stored, file=_ShortPath(stored.file))
    assert_same(short.read(), value)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(4, 4)}, file)
    (stored,) = read_header(file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends inside a"):
        stored.read()


# ---- broken files ----------------------------------------------------------------

GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [4], 8, 12)}
DATA = bytes(12)

BROKEN: dict[str, tuple[object, bytes, list[str]]] = {
    "data truncated": (GOOD, DATA[:-1], ["truncated"]),
    "no data": (GOOD, b"", ["truncated"]),
    "trailing bytes": (GOOD, DATA + b"\0", ["too long"]),
    "not JSON": (b"{'a'", b"", ["not valid JSON"]),
    "not UTF-8": (b'{"\xff": 1}', b"", ["not valid JSON"]),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), DATA, ["not valid JSON"]),
    "empty header": (b"", b"", ["not valid JSON"]),
    "nested without end": (b"[" * 100_000, b"", ["not valid JSON"]),
    "a list": ([], b"", ["list", "not an object"]),
    "entry is a list": ({"a": ["F32", [2], [0, 8]]}, DATA[:8], ["a", "broken"]),
    "entry is null": ({"a": None}, b"", ["a", "broken"]),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 0]}}, b"", ["dtype"]),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 0]}}, b"", ["shape"]),
    "no offsets": ({"a": {"dtype": "U8", "shape": [0]}}, b"", ["data_offsets"]),
    "dtype is a list": ({"a": entry([], [], 0, 0)}, b"", ["a", "broken"]),
    "dtype unknown": (
        {"a": entry("F4", [2], 0, 1)},
        b"\0",
        ["a has dtype F4", "allowed are", "BF16"],
    ),
    "dtype in lower case": ({"a": entry("f32", [2], 0, 8)}, DATA[:8], ["f32"]),
    "shape is an object": ({"a": entry("U8", {}, 0, 1)}, b"\0", ["a", "broken"]),
    "shape is text": ({"a": entry("U8", "", 0, 1)}, b"\0", ["a", "broken"]),
    "size is negative": ({"a": entry("U8", [-1, -4], 0, 4)}, DATA[:4], ["whole"]),
    "size is true": ({"a": entry("U8", [True], 0, 1)}, b"\0", ["whole"]),
    "size is a float": ({"a": entry("U8", [4.0], 0, 4)}, DATA[:4], ["whole"]),
    "size is huge": ({"a": entry("U8", [1 << 64, 0], 0, 0)}, b"", ["whole"]),
    "offset is negative": ({"a": entry("U8", [4], -4, 0)}, b"", ["whole"]),
    "offset is true": ({"a": entry("U8", [1], False, True)}, b"\0", ["whole"]),
    "offset is a float": ({"a": entry("U8", [4], 0, 4.0)}, DATA[:4], ["whole"]),
    "offset is text": ({"a": entry("U8", [4], "0", "4")}, DATA[:4], ["whole"]),
    "one offset": (
        {"a": {"dtype": "U8", "shape": [], "data_offsets": [0]}},
        b"",
        ["a", "broken"],
    ),
    "end before start": ({"a": entry("U8", [4], 4, 0)}, DATA[:4], ["a takes -4"]),
    "shape and offsets differ": (
        {"a": entry("F32", [3], 0, 8)},
        DATA[:8],
        ["a takes 8 bytes", "shape [3] of F32 is 12"],
    ),
    "overlap": (
        {"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 4, 12)},
        DATA,
        ["b begins", "the header is broken"],
    ),
    "the same place": (
        {"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 0, 8)},
        DATA[:8],
        ["b begins", "the header is broken"],
    ),
    "gap": (
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 8, 12)},
        DATA,
        ["b begins", "the header is broken"],
    ),
    "gap at the start": ({"a": entry("U8", [4], 4, 8)}, DATA[:8], ["a begins"]),
    "offset beyond the end": ({"a": entry("U8", [4], 99, 103)}, DATA, ["a begins"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    header, data, said = BROKEN[case]
    file = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    for text in (str(file), *said):
        assert text in str(caught.value)


def test_an_offset_of_minus_zero_is_refused_as_by_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    text = b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [-0, 8]}}'
    file.write_bytes(struct.pack("<Q", len(text)) + text + DATA[:8])
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    with pytest.raises(CheckpointError, match="-0 is no number"):
        open_checkpoint(tmp_path)


def test_the_file_that_the_broken_ones_are_made_from_is_read(tmp_path: Path) -> None:
    assert_read_as_by_safetensors(write_raw(tmp_path / "m.safetensors", GOOD, DATA))


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_file_of_a_few_bytes(length: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(length))
    with pytest.raises(CheckpointError, match=rf"is {length} bytes long"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, "size - 7"])
def test_a_header_length_that_lies(length: int | str, tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", GOOD, DATA)
    content = file.read_bytes()
    claimed = len(content) - 7 if isinstance(length, str) else length
    file.write_bytes(struct.pack("<Q", claimed) + content[8:])
    with pytest.raises(CheckpointError, match=rf"{claimed} bytes long.*{len(content)}"):
        open_checkpoint(tmp_path)


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", GOOD, DATA)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)


def test_one_corrupt_byte_is_refused_or_read_as_safetensors_reads_it(
    tmp_path: Path,
) -> None:
    header = {
        "__metadata__": {"format": "mlx"},
        "x.weight": entry("U32", [2, 4], 0, 32),
        "x.scales": entry("BF16", [2, 10], 32, 72),
        "flag": entry("BOOL", [], 72, 73),
        "none": entry("I8", [0, 11], 73, 73),
    }
    data = bytes([1]) * 73
    file = write_raw(tmp_path / "model.safetensors", header, data)
    content = file.read_bytes()
    head = len(content) - len(data)
    dice = random.Random(20)
    read = refused = 0
    for _ in range(6000):
        place = dice.randrange(head)
        write_byte(file, place, dice.randrange(256))
        try:
            read_header(file)
        except CheckpointError:
            refused += 1
        else:
            read += 1
            assert_read_as_by_safetensors(file)  # which raises if it refuses this
        write_byte(file, place, content[place])
    assert file.read_bytes() == content
    # Names may change, and spaces stand for other spaces.
    assert read > 150
    assert refused > 1500


def write_byte(file: Path, place: int, value: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(bytes([value]))


# ---- which files -----------------------------------------------------------------


def put(folder: Path, *names: str, **tensors: Tensor) -> None:
    """Files with one small tensor each, called as the file unless given."""
    folder.mkdir(exist_ok=True)
    for name in names:
        save_file(tensors or {name: torch.ones(2)}, folder / name)


def put_index(folder: Path, *names: str) -> None:
    """An index of the files that `put` writes."""
    weight_map = {name: name for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def shard(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def read_names(folder: Path) -> list[str]:
    files = weight_files(folder)
    assert [file.parent for file in files] == [folder] * len(files)
    assert open_checkpoint(folder).files == tuple(files)
    return [file.name for file in files]


def test_one_file(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["model.safetensors"]
    assert checkpoint.nbytes == 8
    assert checkpoint.config == {}
    assert read_names(tmp_path) == ["model.safetensors"]


def test_shards_without_an_index(tmp_path: Path) -> None:
    names = [shard(i, 3) for i in (1, 2, 3)]
    put(tmp_path, *names)
    assert read_names(tmp_path) == names
    assert set(open_checkpoint(tmp_path).tensors) == set(names)


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    names = [shard(1, 2), shard(2, 2)]
    put(tmp_path, *names)
    put_index(tmp_path, *names, names[0])
    # Left behind by another conversion, with the same tensors once more.
    put(tmp_path, "model.safetensors", "model-old.safetensors", shard(1, 5))
    assert read_names(tmp_path) == names


@pytest.mark.parametrize(
    "real", [["model.safetensors"], [shard(1, 2), shard(2, 2)]], ids=["one", "shards"]
)
def test_a_stale_index_gives_way_to_the_files(real: list[str], tmp_path: Path) -> None:
    put(tmp_path, *real)
    put_index(tmp_path, *(shard(i, 5) for i in range(1, 6)))
    assert read_names(tmp_path) == real


@pytest.mark.parametrize("indexed", [False, True])
def test_a_missing_shard_is_named(indexed: bool, tmp_path: Path) -> None:
    put(tmp_path, shard(1, 4), shard(3, 4))
    if indexed:
        put_index(tmp_path, *(shard(i, 4) for i in (1, 2, 3, 4)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert f"lacks {shard(2, 4)}, {shard(4, 4)}; fetch it again" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_old_names_of_mlx(tmp_path: Path) -> None:
    put(tmp_path, "weights.00.safetensors", "weights.01.safetensors")
    assert read_names(tmp_path) == ["weights.00.safetensors", "weights.01.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        "model.safetensors/..",
        "..",
        ".",
        "",
    ],
)
def test_an_index_does_not_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    put(folder, "model.safetensors")
    put(tmp_path, "secret.safetensors")
    put(folder / "sub", "model.safetensors")
    put_index(folder, "model.safetensors", name)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert INDEX in str(caught.value)
    assert f"names {name!r}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.safetensors2"]
)
def test_an_index_names_safetensors_only(name: str, tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    (tmp_path / name).write_bytes(b"pickle")
    put_index(tmp_path, name)
    with pytest.raises(CheckpointError, match="only safetensors is read") as caught:
        open_checkpoint(tmp_path)
    assert repr(name) in str(caught.value)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    put(tmp_path, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "org/base"}'
    )
    with pytest.raises(CheckpointError, match="an adapter of PEFT") as caught:
        open_checkpoint(tmp_path)
    assert "org/base" in str(caught.value)
    assert f"PeftModel.from_pretrained(model, {str(tmp_path)!r})" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        '{"weight_map": ["model.safetensors"]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["model.safetensors"]}}',
        '{"weight_map": null}',
        '["model.safetensors"]',
        "{",
        "",
        "[" * 100_000,
    ],
    ids=["list", "number", "nested", "null", "no object", "broken", "empty", "deep"],
)
def test_a_broken_index_is_refused(content: str, tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / INDEX) in str(caught.value)


def test_an_index_without_files_is_none(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    put_index(tmp_path)
    assert read_names(tmp_path) == ["model.safetensors"]


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    put(tmp_path, shard(1, 2), a=torch.ones(1), b=torch.ones(1))
    put(tmp_path, shard(2, 2), c=torch.ones(1), b=torch.ones(1))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert f"b is in {shard(1, 2)} and in {shard(2, 2)}" in str(caught.value)


def test_links_are_followed_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1a2b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    value = torch.randn(3, 5)
    save_file({"a": value}, blobs / "77ff")
    (blobs / "0011").write_text('{"model_type": "llama"}')
    (blobs / "2233").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    for name, blob in {
        "model.safetensors": "77ff",
        CONFIG: "0011",
        INDEX: "2233",
    }.items():
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.config == {"model_type": "llama"}
    assert_same(checkpoint.tensors["a"].read(), value)


def test_a_dangling_link_is_a_missing_shard(tmp_path: Path) -> None:
    put(tmp_path, shard(1, 2))
    (tmp_path / shard(2, 2)).symlink_to(tmp_path / "gone")
    put_index(tmp_path, shard(1, 2), shard(2, 2))
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it holds no files") as caught:
        open_checkpoint(tmp_path)
    assert f"no model*.safetensors in {tmp_path}" in str(caught.value)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors.part"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="only safetensors is read") as caught:
        open_checkpoint(tmp_path)
    assert "holds model.pt, model.safetensors.part, pytorch_model.bin" in str(
        caught.value
    )


def test_an_index_whose_files_are_all_gone(tmp_path: Path) -> None:
    put_index(tmp_path, shard(1, 2), shard(2, 2))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert f"its index names {shard(1, 2)}, {shard(2, 2)}" in str(caught.value)


# ---- JSON and folders ------------------------------------------------------------


def test_json_files(tmp_path: Path) -> None:
    file = tmp_path / CONFIG
    assert read_json(file) == {}
    file.write_text('{"name": "ü", "scale": Infinity}', encoding="utf-8")
    assert read_json(file) == {"name": "ü", "scale": float("inf")}
    for content in (b"", b"{", b"\xff{}", b"[1]", b'"text"', b"null"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_json(file)


def test_a_folder_is_its_own_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(tmp_path / "org") == tmp_path / "org"
    # A folder that is there goes before a repository of the same name.
    assert fetch("org/model") == Path("org/model")
    assert fetch("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "/nothing/here",
        "./here/it/is",
        "../org/model",
        "org/model/tree/main",
        "https://host.example/org/model",
        "org/--model",
        "",
        "file.safetensors",
        "sub/file.safetensors",
    ],
)
def test_neither_a_folder_nor_a_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "file.safetensors")
    put(tmp_path / "sub", "file.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *args, **kwargs: pytest.fail(f"asked the Hub for {args}"),
    )
    why = "neither a folder nor the name|is a file. Name the folder that holds it"
    with pytest.raises(FileNotFoundError, match=why) as got:
        fetch(name)
    assert repr(name) in str(got.value)
