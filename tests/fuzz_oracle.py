"""An independent reading of a checkpoint, for `fuzz_checkpoints.py`.

Tensors come from safetensors' own reader, weights are made of them in float64 by numpy,
after the descriptions of the formats. Nothing of the library is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}

Numbers = np.ndarray[Any, Any]
Weight = tuple[Numbers, Numbers]  # float64, and how far one may be from it


class Unreadable(Exception):
    """What no reading of the format gives a meaning."""


def read_file(path: Path) -> dict[str, Tensor] | None:
    """All tensors as safetensors reads them; None if it refuses the file.

    What it has against metadata alone does not count, since it is not read here.
    """
    try:
        with safe_open(path, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError):
        pass
    try:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        pairs = json.loads(content[8 : 8 + length], object_pairs_hook=list)
        kept = [(n, dict(e)) for n, e in pairs if n != "__metadata__"]
        if len(kept) == len(pairs) or len({n for n, _ in kept}) < len(kept):
            return None
        text = json.dumps(dict(kept)).encode()
        head = struct.pack("<Q", len(text)) + text
        return load_bytes(head + content[8 + length :])
    except Exception:
        return None


def read_folder(folder: Path) -> dict[str, dict[str, Tensor] | None]:
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    return {file.name: read_file(file) for file in files}


def views(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors by name, where several files have one in each of the ways."""
    files = read_folder(folder)
    path = folder / "model.safetensors.index.json"
    try:
        index = json.loads(path.read_bytes() if path.is_file() else b"{}")
        weight_map = dict(index["weight_map"])
    except Exception:
        weight_map = {}
    whole: dict[str, Tensor] = {}
    for tensors in files.values():
        whole |= tensors or {}
    by_index = {
        name: (files.get(file) or {}).get(name)
        for name, file in weight_map.items()
        if isinstance(file, str)
    }
    yield whole | {n: t for n, t in by_index.items() if t is not None}
    for tensors in files.values():
        yield whole | (tensors or {})
    # Files that the index does not name do not count.
    named: dict[str, Tensor] = {}
    for file in sorted({file for file in weight_map.values() if isinstance(file, str)}):
        named |= files.get(file) or {}
    yield named


# ---- codes -----------------------------------------------------------------------


def words_of(tensor: Tensor) -> Numbers:
    if tensor.dtype not in (torch.int32, torch.uint32):
        raise Unreadable(f"words of {tensor.dtype}")
    return tensor.contiguous().view(torch.int32).numpy().view(np.uint32)


def numbers(tensor: Tensor) -> Numbers:
    return tensor.double().numpy()


def stream(words: Numbers, bits: int, count: int) -> Numbers:
    """The first `count` codes of each row ``[..., W]``, a little-endian stream."""
    data = np.ascontiguousarray(words).view(np.uint8)
    flat = np.unpackbits(data, axis=-1, bitorder="little")
    if flat.shape[-1] < count * bits:
        raise Unreadable("too few words")
    each = flat[..., : count * bits].reshape(*flat.shape[:-1], count, bits)
    return (each.astype(np.int64) << np.arange(bits)).sum(-1)


def planar(words: Numbers, bits: int, count: int) -> Numbers:
    """As `stream`, of blocks of 32 codes whose low and high bits have own words."""
    if bits not in PLANES:
        return stream(words, bits, count)
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    codes, start = np.zeros((*blocks.shape[:-1], 32), np.int64), 0
    for width in PLANES[bits]:
        codes |= stream(blocks[..., start : start + width], width, 32) << start
        start += width
    return codes.reshape(*words.shape[:-1], -1)[..., :count]


def affine(codes: Numbers, scales: Numbers, biases: Numbers, owners: Numbers) -> Weight:
    """``code * scale + bias`` with the group of each column."""
    with np.errstate(all="ignore"):
        products, added = codes * scales[..., owners], biases[..., owners]
        return products + added, 2.0**-45 * (abs(products) + abs(added))


def shifted(codes: Numbers, scales: Numbers, zeros: Any, owners: Numbers) -> Weight:
    """``(code - zero) * scale``; the product of zero and scale may be float32."""
    zeros = np.broadcast_to(zeros, scales.shape)
    with np.errstate(all="ignore"):
        value = (codes - zeros[..., owners]) * scales[..., owners]
        return value, 2.0**-22 * abs(scales[..., owners]) * (zeros[..., owners] + 1)


def even(groups: int, columns: int) -> Numbers:
    if not groups or columns % groups:
        raise Unreadable(f"{groups} groups of {columns} columns")
    return np.arange(columns) // (columns // groups)


# ---- formats ---------------------------------------------------------------------


def weights(
    tensors: dict[str, Tensor], kind: str, name: str, shape: tuple[int, ...], said: Any
) -> Iterator[Weight]:
    """What a weight may be: mostly one, more where the format leaves it to the data.

    `said`: the quantization settings.
    """
    stem, own = own_tensors(tensors, name)
    if stem == name:
        whole = numbers(own[""])
        yield whole, np.zeros_like(whole)
        return
    if "scales" in own and "weight" in own:
        yield mlx_weight(own, shape)
    elif "weight_packed" in own:
        yield compressed(own, shape)
    elif "qweight" in own and kind == "gptq":
        yield from gptq(own, shape, said)
    elif "qweight" in own:
        yield awq(own, shape, said)
    else:
        dense = numbers(own["weight"])
        yield dense, np.zeros_like(dense)


def own_tensors(tensors: dict[str, Tensor], name: str) -> tuple[str, dict[str, Tensor]]:
    """What stands before "weight", and the tensors there, without it. In packagings of
    MLX names may have prefixes."""
    stem = name.removesuffix("weight")
    for prefix in ("", "model.", "language_model.model.", "language_model."):
        start = prefix + stem
        own = {
            k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)
        }
        # A bias alone may be under another prefix than its weight.
        if (stem == name and "" in own) or (stem != name and own.keys() - {"bias"}):
            return stem, own
    raise Unreadable("no such tensor")


def mlx_weight(own: dict[str, Tensor], shape: tuple[int, ...]) -> Weight:
    words, scales = words_of(own["weight"]), own["scales"]
    columns, groups = shape[-1], scales.shape[-1]
    if words.shape[:-1] != shape[:-1] or tuple(scales.shape[:-1]) != shape[:-1]:
        raise Unreadable("other rows")
    bits, rest = divmod(32 * words.shape[-1], columns)
    if rest:
        raise Unreadable("no whole bits")
    codes, owners = stream(words, bits, columns), even(groups, columns)
    biases = own.get("biases", own.get("qbiases"))
    if scales.dtype != torch.uint8:
        assert biases is not None
        return affine(codes, numbers(scales), numbers(biases), owners)
    form = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}
    mode = form.get((bits, columns // groups))
    if mode is None or biases is not None:
        raise Unreadable("no float format")
    values = E2M1[codes] if bits == 4 else e4m3(codes)
    steps = e4m3(scales.numpy()) if mode == "nvfp4" else e8m0(scales.numpy())
    spread = 2.0**-45
    if "global_scale" in own:
        steps, spread = steps * (numbers(own["global_scale"]) / 2688), 2.0**-19
    weight = values * steps[..., owners]
    return weight, spread * abs(weight) + 2.0**-149


def e4m3(codes: Numbers) -> Numbers:
    data = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)
    return data.float().double().numpy()


def e8m0(codes: Numbers) -> Numbers:
    return np.where(codes == 255, np.nan, 2.0 ** (codes.astype(np.float64) - 127))


def settings_of(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The quantization settings of config.json, else those of old files."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(found, dict) and found:
            return found
    for name in ("quantize_config", "quant_config", "quantization_config"):
        path = folder / f"{name}.json"
        try:
            found = json.loads(path.read_bytes()) if path.is_file() else None
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and found:
            return found
    return {}


def gptq(own: dict[str, Tensor], shape: tuple[int, ...], said: Any) -> Iterator[Weight]:
    rows, columns = shape
    label = said.get("format") or said.get("checkpoint_format") or "gptq"
    method = str(said.get("quant_method", said.get("method", "gptq"))).lower()
    label = str(label).lower() if method == "gptq" else "auto"
    words, scales = words_of(own["qweight"]), numbers(own["scales"]).T
    bits, rest = divmod(32 * words.shape[0], columns)
    if rest or words.shape[1] != rows or scales.shape[0] != rows:
        raise Unreadable("no whole bits")
    groups, unpack = scales.shape[1], planar if label == "gptq_p" else stream
    codes = unpack(np.ascontiguousarray(words.T), bits, columns)
    owners = even(groups, columns)
    if "g_idx" in own:
        owners = own["g_idx"].long().numpy()
        if owners.min() < 0 or owners.max() >= groups:
            raise Unreadable("no such group")
    middle, top = 1 << bits - 1, (1 << bits) - 1
    stored: Any = np.full_like(scales, middle, dtype=np.int64)
    if "qzeros" in own:
        lines = words_of(own["qzeros"])
        stored = unpack(lines, bits, rows).T
        constant = stored.min() == stored.max() and stored.min() in (middle - 1, middle)
        more = (stored + 1) & top
        if bits in (2, 4, 8) and label == "gptq":  # added to whole words
            more = stream(lines + np.uint32(0xFFFFFFFF // top), bits, rows).T
        if constant and said.get("sym") is not False:
            yield shifted(codes, scales, middle, owners)
            return
        if label in ("gptq", "auto"):
            yield shifted(codes, scales, more, owners)
        if label == "gptq":
            return
    yield shifted(codes, scales, stored, owners)


def awq(own: dict[str, Tensor], shape: tuple[int, ...], said: Any) -> Weight:
    rows, columns = shape
    scales, words = numbers(own["scales"]), words_of(own["qweight"])
    zeros: Any = None
    if words.shape[0] == rows and scales.shape[0] == rows:  # gemv
        size = said.get("group_size") or said.get("q_group_size") or 128
        groups = columns // (columns if size == -1 else size)
        codes = stream(words, 4, columns)
        if "qzeros" in own:
            zeros = stream(words_of(own["qzeros"]), 4, groups)
        bits, scales = 4, scales[:, :groups]
    else:
        bits, rest = divmod(32 * words.shape[1], rows)
        if rest or words.shape[0] != columns or scales.shape[1] != rows:
            raise Unreadable("no whole bits")
        order = np.argsort(AWQ_ORDER) if bits == 4 else np.arange(8)

        def in_order(lines: Numbers) -> Numbers:
            each = stream(lines, bits, rows)
            return (
                each.reshape(len(lines), -1, 8)[..., order].reshape(len(lines), rows).T
            )

        codes, scales = in_order(words), scales.T
        if "qzeros" in own:
            zeros = in_order(words_of(own["qzeros"]))
    zeros = 1 << bits - 1 if zeros is None else zeros
    return shifted(codes, scales, zeros, even(scales.shape[1], columns))


def compressed(own: dict[str, Tensor], shape: tuple[int, ...]) -> Weight:
    rows, columns = shape
    words, scales = words_of(own["weight_packed"]), numbers(own["weight_scale"])
    bits, rest = divmod(32 * words.shape[1], columns)
    if rest or tuple(own["weight_shape"].tolist()) != shape:
        raise Unreadable("no whole bits")
    codes, owners = stream(words, bits, columns), even(scales.shape[1], columns)
    if "weight_g_idx" in own:
        said = own["weight_g_idx"].long().numpy()
        owners = owners if (said == -1).all() else said
    zeros: Any = 1 << bits - 1
    if "weight_zero_point" in own:
        stored = own["weight_zero_point"]
        if stored.dtype == torch.int8:
            zeros = stored.numpy().astype(np.int64) + zeros
        else:
            lines = np.ascontiguousarray(words_of(stored).T)
            zeros = stream(lines, bits, rows).T
    return shifted(codes, scales, zeros, owners)
