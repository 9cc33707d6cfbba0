"""What `fuzz_checkpoints.py` does to a checkpoint: one function for each kind of harm.

Each takes a `Draft` and a random generator, changes the draft, and returns in a few words
what it did. The byte-level ones add a step that works on the written folder.
"""

from __future__ import annotations

import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_bases import CONFIG, INDEX, ONE, Draft, Shard

Random = random.Random
Mutation = Callable[[Draft, Random], str]

DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"]
DTYPES += ["I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "f32", ""]
NAMES = ["../up.weight", "/etc/passwd", "a/b.weight", "", ".", "weight", "scales"]
NAMES += ["\u00e9.weight", "\U0001f600", "\ud800", "a\x00b", "x" * 5000, "qweight"]
NAMES += ["__metadata__", ".weight", ".scales", "layers.0.up.weight", "lm_head.weight"]
NAMES += ["layers.0.up.scales", "mtp.x", "layers..weight", "weight_packed", "a\nb"]


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def wild(dice: Random) -> Any:
    """Any JSON value, rather not the one that is expected."""
    plain = [None, True, False, 0, -1, 1, 2, 3, 4, 5, 8, 16, 32, 64, 128, 4.0, 0.5]
    large = [2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1e308, -1e-308]
    odd = [math.nan, math.inf, -math.inf, {"__float__": "NaN"}, {"__float__": [1]}]
    texts = ["", "4", "affine", "mlx", "gptq", "awq", "gptq_v2", "mxfp4", "auto-round"]
    texts += ["../x", "/", "\ud800", "\x00", "a" * 1000, "gemv", "nvfp4", "int", "BF16"]
    holders = [[], [1], [[]], [4, 64], ["a"], {}, {"bits": 4}, {"": {}}, [None], [{}]]
    deep = [
        ("list", 50),
        ("dict", 50),
        ("dict", 400),
        ("dict", dice.randrange(800, 990)),
    ]
    deep.append(("list", dice.randrange(800, 990)))
    pools: list[list[Any]] = [plain, large, odd, texts, holders]
    if dice.random() < 0.05:
        kind, depth = dice.choice(deep)
        return nested(depth, kind)
    return dice.choice(dice.choice(pools))


def some_shard(draft: Draft, dice: Random) -> tuple[str, Shard]:
    name = dice.choice(sorted(draft.shards))
    return name, draft.shards[name]


# ---- bytes -----------------------------------------------------------------------


def edit(draft: Draft, name: str, change: Callable[[bytes], bytes]) -> None:
    def step(folder: Path) -> None:
        path = folder / name
        if path.is_file() and not path.is_symlink():
            path.write_bytes(change(path.read_bytes()))

    draft.late.append(step)


def header_length(draft: Draft, dice: Random) -> str:
    name, _ = some_shard(draft, dice)
    seed = dice.random()

    def change(content: bytes) -> bytes:
        if len(content) < 8:
            return content
        (old,) = struct.unpack("<Q", content[:8])
        rest = len(content) - 8
        own = Random(seed)
        far = [2**31, 2**32 - 1, 2**63, 2**64 - 1, 99_999_999, own.getrandbits(64)]
        new = own.choice(
            [
                0,
                1,
                2,
                old - 1,
                old + 1,
                old + own.randrange(-9, 9),
                rest,
                rest + 1,
                *far,
            ]
        )
        return struct.pack("<Q", new % 2**64) + content[8:]

    edit(draft, name, change)
    return f"header length of {name}"


def header_bytes(draft: Draft, dice: Random) -> str:
    """Bits flipped, bytes exchanged, left out or put in, with the length set right."""
    name, _ = some_shard(draft, dice)
    how = dice.choice(
        ["bit", "byte", "drop", "insert", "pad", "front", "utf8", "token"]
    )
    seed = dice.random()

    def change(content: bytes) -> bytes:
        if len(content) < 16:
            return content
        (old,) = struct.unpack("<Q", content[:8])
        text, own = bytearray(content[8 : 8 + old]), Random(seed)
        if not text:
            return content
        at = own.randrange(len(text))
        if how == "bit":
            text[at] ^= 1 << own.randrange(8)
        elif how == "byte":
            text[at] = own.randrange(256)
        elif how == "drop":
            del text[at : at + own.randrange(1, 9)]
        elif how == "insert":
            text[at:at] = own.choice([b"9" * 5000, b"[" * 100_000, b"0", b"-", b"\x00"])
        elif how == "pad":
            text += own.choice([b" " * 7, b"\n", b"\x00" * 4, b"}", b"garbage", b"{}"])
        elif how == "front":
            text[:0] = own.choice([b"\xef\xbb\xbf", b" ", b"\n", b"\x00", b"[", b"1"])
        elif how == "utf8":
            text[at:at] = own.choice([b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80"])
        else:
            digits = [i for i, c in enumerate(text) if chr(c).isdigit()]
            text[own.choice(digits or [at])] = ord(own.choice("0123456789-.eE"))
        return struct.pack("<Q", len(text)) + bytes(text) + content[8 + old :]

    edit(draft, name, change)
    return f"header of {name}: {how}"


def data_bytes(draft: Draft, dice: Random) -> str:
    name, shard = some_shard(draft, dice)
    how = dice.choice(["flip", "flip", "fill", "cut", "cut", "more", "empty"])
    if how == "flip":
        data = bytearray(shard.data)
        for _ in range(dice.choice([1, 5, 100])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        shard.data = bytes(data)
    elif how == "fill":
        # A whole tensor of one byte: NaN, infinity, the largest, zero.
        _, entry = shard.entries[dice.choice(shard.tensors())]
        start, end = entry["data_offsets"]
        count = (end - start) // 4
        value = dice.choice([b"\xff" * 4, b"\x7f" * 4, b"\x00" * 4])
        value = dice.choice([value, b"\xff\x7b\xff\x7b", b"\x7f\x7f\x7f\x7f"])
        shard.data = (
            shard.data[:start] + value * count + shard.data[start + 4 * count :]
        )
    else:
        amount = dice.choice([1, 2, 8, 1000, 10**6])

        def change(content: bytes) -> bytes:
            if how == "cut":
                return content[: max(0, len(content) - amount)]
            return b"" if how == "empty" else content + b"\x00" * min(amount, 5000)

        edit(draft, name, change)
    return f"data of {name}: {how}"


def json_bytes(draft: Draft, dice: Random) -> str:
    name = dice.choice(sorted(draft.jsons))
    how = dice.choice(
        ["bit", "cut", "bom", "utf8", "empty", "other", "insert", "twice"]
    )
    seed = dice.random()

    def change(content: bytes) -> bytes:
        text, own = bytearray(content), Random(seed)
        at = own.randrange(len(text) or 1)
        if how == "bit" and text:
            text[at] ^= 1 << own.randrange(8)
        elif how == "cut":
            del text[at:]
        elif how == "bom":
            text[:0] = own.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00"])
        elif how == "utf8":
            text[at:at] = own.choice([b"\xff", b"\xed\xa0\x80", b"\\ud800"])
        elif how == "empty":
            text.clear()
        elif how == "other":
            other = [b"null", b"[]", b"1", b'"x"', b"{}", b"NaN", b"[" * 200_000]
            text[:] = own.choice([*other, b'{"a":' * 100_000, b"{'a': 1}", b" "])
        elif how == "insert":
            text[at:at] = own.choice([b"9" * 5000, b"[" * 3000, b"1e999", b"\x00"])
        elif how == "twice":
            text += bytes(text)
        return bytes(text)

    edit(draft, name, change)
    return f"bytes of {name}: {how}"


# ---- headers ---------------------------------------------------------------------


def entry_dtype(draft: Draft, dice: Random) -> str:
    _, shard = some_shard(draft, dice)
    at = dice.choice(shard.tensors())
    key, entry = shard.entries[at]
    same = {"U32": ["I32", "F32"], "F16": ["BF16", "I16"], "BF16": ["F16", "U16"]}
    same |= {"F32": ["U32", "I32"], "I32": ["U32", "F32"], "U8": ["I8", "F8_E4M3"]}
    old = entry.get("dtype") if isinstance(entry, dict) else None
    near = same.get(old, DTYPES) if isinstance(old, str) else DTYPES
    new = dice.choice([dice.choice(near), dice.choice(DTYPES), wild(dice)])
    if isinstance(entry, dict):
        entry["dtype"] = new
    return f"dtype of {key}: {str(new)[:40]!r}"


def entry_shape(draft: Draft, dice: Random) -> str:
    _, shard = some_shard(draft, dice)
    key, entry = shard.entries[dice.choice(shard.tensors())]
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return "nothing"
    shape = list(entry["shape"])
    how = dice.randrange(7)
    if how == 0:
        shape.reverse()
    elif how == 1:
        shape.insert(dice.randrange(len(shape) + 1), 1)
    elif how == 2 and shape and type(shape[0]) is int:
        shape = [math.prod(s for s in shape if type(s) is int)]
    elif how == 3 and shape:
        at = dice.randrange(len(shape))
        if type(shape[at]) is int and shape[at] % 2 == 0:
            other = dice.randrange(len(shape))
            shape[at] //= 2
            shape[other] = shape[other] * 2 if type(shape[other]) is int else 2
    elif how == 4:
        shape = wild(dice)
    elif shape:
        new = [wild(dice), 0, -1, 2**62, 2**63, 10**30, True, 1.0, "4", None, [1]]
        shape[dice.randrange(len(shape))] = dice.choice(new)
    entry["shape"] = shape
    return f"shape of {key}: {str(shape)[:40]}"


def entry_offsets(draft: Draft, dice: Random) -> str:
    _, shard = some_shard(draft, dice)
    key, entry = shard.entries[dice.choice(shard.tensors())]
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        return "nothing"
    offsets = list(entry["data_offsets"])
    how = dice.randrange(6)
    if how == 0:
        offsets.reverse()
    elif how == 1:
        move = dice.choice([-4, 4, 8, -(2**40), 2**40, 2**62, 2**63, 2**64, 1])
        offsets = [o + move if type(o) is int else o for o in offsets]
    elif how == 2:
        other = shard.entries[dice.choice(shard.tensors())][1]
        if isinstance(other, dict):
            offsets = other.get("data_offsets", [0, 0])
    elif how == 3:
        offsets = wild(dice)
    elif how == 4:
        offsets = dice.choice([[], offsets[:1], [*offsets, 0], [0, 0], [True, 8]])
    elif offsets:
        offsets[dice.randrange(len(offsets))] = wild(dice)
    entry["data_offsets"] = offsets
    return f"offsets of {key}: {str(offsets)[:40]}"


def entry_other(draft: Draft, dice: Random) -> str:
    """An entry left out, doubled, renamed, replaced, or with other keys."""
    _, shard = some_shard(draft, dice)
    if len(shard.tensors()) < 2:
        return "nothing"
    at = dice.choice(shard.tensors())
    key, entry = shard.entries[at]
    how = dice.choice(["drop", "twice", "name", "value", "key", "key+", "swap", "meta"])
    if how == "drop":
        rest = {n for n, _ in shard.entries} - {key, "__metadata__"}
        try:
            whole = shard.part(rest) if dice.random() < 0.7 else None
        except (TypeError, KeyError, ValueError):
            whole = None
        if whole is not None:
            shard.entries, shard.data = whole.entries, whole.data
        else:
            del shard.entries[at]
    elif how == "twice":
        other = shard.entries[dice.choice(shard.tensors())][1]
        shard.entries.append((key, dice.choice([entry, other, wild(dice)])))
    elif how == "name":
        shard.entries[at] = (dice.choice([*NAMES, f"{key}2", f"model.{key}"]), entry)
    elif how == "value":
        shard.entries[at] = (key, wild(dice))
    elif how == "key" and isinstance(entry, dict) and entry:
        del entry[dice.choice(sorted(entry))]
    elif how == "key+" and isinstance(entry, dict):
        entry[dice.choice(["x", "Dtype", "strides", ""])] = wild(dice)
    elif how == "swap":
        second = dice.choice(shard.tensors())
        other, value = shard.entries[second]
        shard.entries[at], shard.entries[second] = (key, value), (other, entry)
    else:
        metadata = dice.choice([wild(dice), {"a": wild(dice)}, {"format": "pt"}])
        shard.entries.insert(0, ("__metadata__", metadata))
    return f"entry {key}: {how}"


def added_tensor(draft: Draft, dice: Random) -> str:
    """A tensor more, in the right form."""
    _, shard = some_shard(draft, dice)
    names = [n for n, _ in shard.entries if n != "__metadata__"]
    stem = dice.choice(names).rpartition(".")[0]
    ends = ["bias", "scales", "biases", "weight", "qbiases", "global_scale", "g_idx"]
    ends += ["weight_scale", "weight_zero_point", "weight_g_idx", "qweight", "qzeros"]
    ends += ["weight_shape", "weight_packed", "scaled_zeros", "act.scales", "B"]
    name = dice.choice([f"{stem}.{dice.choice(ends)}", *NAMES])
    dtype, size = dice.choice(
        [("F32", 4), ("I32", 4), ("U8", 1), ("F16", 2), ("I64", 8)]
    )
    shape = dice.choice([[], [1], [0], [128], [256], [2, 2], [0, 5], [1, 1, 1]])
    start = len(shard.data)
    shard.data += bytes(
        dice.choice([0, 1, 255]) for _ in range(size * math.prod(shape))
    )
    offsets = [start, len(shard.data)]
    shard.entries.append(
        (name, {"dtype": dtype, "shape": shape, "data_offsets": offsets})
    )
    return f"added {name[:40]!r} {dtype} {shape}"


# ---- configuration and index -----------------------------------------------------

KEYS = ["bits", "group_size", "mode", "quant_method", "sym", "desc_act", "format"]
KEYS += ["checkpoint_format", "version", "dynamic", "extra_config", "meta", "backend"]
KEYS += ["packing_format", "config_groups", "sparsity_config", "transform_config"]
KEYS += ["num_bits", "strategy", "symmetric", "actorder", "zero_point", "data_type"]
KEYS += [
    "act_bits",
    "layers.0.up",
    "embed",
    "provider",
    "quantization_config",
    "ignore",
]
KEYS += ["kv_cache_scheme", "rotation_config", "modules_to_not_convert", "w_bit"]
TOP = ["quantization", "quantization_config", "text_config", "compression_config"]
TOP += ["model_type", "dtype", "torch_dtype", "architectures", "tie_word_embeddings"]


def holders(value: Any) -> list[dict[str, Any]]:
    """All objects within a JSON value."""
    found = [value] if isinstance(value, dict) else []
    inner = value.values() if isinstance(value, dict) else ()
    return found + [one for part in inner for one in holders(part)]


def config_value(draft: Draft, dice: Random) -> str:
    config = draft.jsons[CONFIG]
    if not isinstance(config, dict):
        return "nothing"
    settings = [config[k] for k in TOP[:2] if isinstance(config.get(k), dict)]
    places = holders(dice.choice(settings)) if settings else [config]
    where = dice.choice(places)
    how = dice.choice(["set", "set", "drop", "add", "add", "top", "module"])
    key: str = ""
    if how == "set" and where:
        key = dice.choice(sorted(where))
        where[key] = wild(dice)
    elif how == "drop" and where:
        key = dice.choice(sorted(where))
        del where[key]
    elif how == "top":
        key = dice.choice(TOP)
        config[key] = dice.choice([wild(dice), {"quantization_config": wild(dice)}])
    elif how == "module" and settings:
        key = dice.choice(["layers.0.up", "embed", "x", ""])
        settings[0][key] = {dice.choice(KEYS): wild(dice), "bits": dice.choice([4, 2])}
    else:
        key = dice.choice(KEYS)
        where[key] = dice.choice([wild(dice), {"a": wild(dice)}, {"a": {"bits": 4}}])
    return f"config: {how} {key}"


def other_settings(draft: Draft, dice: Random) -> str:
    """A file of settings of their own, as old GPTQ and AWQ checkpoints have them."""
    files = ["quantize_config.json", "quant_config.json", "quantization_config.json"]
    name = dice.choice(files)
    value: Any = {dice.choice(KEYS): wild(dice) for _ in range(3)}
    draft.jsons[name] = dice.choice([value, wild(dice)])
    config = draft.jsons[CONFIG]
    if dice.random() < 0.5 and isinstance(config, dict):
        moved = config.pop("quantization_config", None)
        if dice.random() < 0.7:
            draft.jsons[name] = moved
    return f"settings in {name}"


def index(draft: Draft, dice: Random) -> str:
    found = draft.jsons.get(INDEX)
    if found is None:
        names = [n for s in draft.shards.values() for n, _ in s.entries]
        found = {"weight_map": dict.fromkeys(names, ONE)}
        found["weight_map"].pop("__metadata__", None)
        draft.jsons[INDEX] = found
    how = dice.choice(["value", "value", "drop", "swap", "map", "top", "more", "gone"])
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if how == "top" or not isinstance(weight_map, dict) or not weight_map:
        draft.jsons[INDEX] = dice.choice([wild(dice), {"weight_map": {}}, {}])
        return "index: other"
    name = dice.choice(sorted(weight_map))
    if how == "value":
        files = [
            "../outside/model.safetensors",
            "/OUTSIDE/model.safetensors",
            "..",
            ".",
        ]
        files += [
            "",
            "sub/model.safetensors",
            "model-9.safetensors",
            "model.bin",
            "a\0b",
        ]
        files += ["\ud800.safetensors", "MODEL.safetensors", "./model.safetensors"]
        files += ["config.json", "x" * 300 + ".safetensors", ".safetensors", "..\\x"]
        weight_map[name] = dice.choice([*files, wild(dice)])
    elif how == "drop":
        for key in dice.sample(sorted(weight_map), min(len(weight_map), 3)):
            del weight_map[key]
    elif how == "swap":
        weight_map[name] = dice.choice(sorted(draft.shards))
    elif how == "map":
        found["weight_map"] = wild(dice)
    elif how == "more":
        weight_map[dice.choice(NAMES)] = dice.choice(sorted(draft.shards))
    else:
        del draft.jsons[INDEX]
    return f"index: {how} of {name}"


# ---- the folder ------------------------------------------------------------------


def folder_things(draft: Draft, dice: Random) -> str:
    """Links, directories, pipes and strays in place of files or beside them."""
    how = dice.choice(
        ["link", "loop", "dangling", "directory", "pipe", "gone", "stray"]
    )
    target = dice.choice([*sorted(draft.shards), *sorted(draft.jsons), INDEX])
    stray = dice.choice(["model-x.safetensors", "weights.safetensors", ONE, "model-1"])

    def step(folder: Path) -> None:
        path = folder / target
        if how == "stray":
            source = sorted(draft.shards)[0]
            if (folder / source).is_file() and not (folder / stray).exists():
                (folder / stray).write_bytes((folder / source).read_bytes())
            return
        content = path.read_bytes() if path.is_file() else b"{}"
        if path.is_dir() and not path.is_symlink():  # another step made it
            path.rmdir()
        path.unlink(missing_ok=True)
        if how == "link":  # as in the Hub's cache, which is made of them
            blob = folder.parent / "blobs" / target
            blob.write_bytes(content)
            path.symlink_to(blob)
        elif how == "loop":
            path.symlink_to(path)
        elif how == "dangling":
            path.symlink_to(folder.parent / "nothing")
        elif how == "directory":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)

    draft.late.append(step)
    return f"{target}: {how}" if how != "stray" else f"stray {stray}"


MUTATIONS: list[Mutation] = [
    header_length,
    header_bytes,
    header_bytes,
    data_bytes,
    data_bytes,
    json_bytes,
    entry_dtype,
    entry_shape,
    entry_offsets,
    entry_other,
    entry_other,
    added_tensor,
    config_value,
    config_value,
    config_value,
    other_settings,
    index,
    index,
    folder_things,
]


def mutate(draft: Draft, dice: Random) -> list[str]:
    """Harm it once, twice or three times, sometimes not at all."""
    count = dice.choices([0, 1, 2, 3], [4, 70, 20, 6])[0]
    done = []
    for _ in range(count):
        mutation = dice.choice(MUTATIONS)
        try:
            done.append(mutation(draft, dice))
        except (TypeError, ValueError, KeyError, IndexError, AttributeError):
            done.append(f"{mutation.__name__}: not possible")  # after another one
    return done
