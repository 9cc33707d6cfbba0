"""compressed-tensors' pack-quantized weights: the codes of the file, and exact weights.

The files of tests/data were written by llm-compressor; the others are written here, by a
packer of its own that follows the description of the format.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import wrapped
from expecttest import assert_expected_inline
from safetensors.torch import save_file
from torch import Tensor

from affine_tensor import AffineQuantizedTensor, CheckpointError, layout
from affine_tensor import tensor as tensor_module
from affine_tensor.checkpoint import compressed_tensors as ct
from affine_tensor.checkpoint.files import open_checkpoint

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "data" / "compressed_tensors"
Tensors = dict[str, Tensor]


# ---- writing, after the description ----------------------------------------------


def stream(codes: np.ndarray, bits: int, padded: bool) -> np.ndarray:
    """Rows of codes [n, k] as int32 words [n, w]; done with Python's integers."""
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        if padded:
            chunks = [row[i : i + per_word] for i in range(0, len(row), per_word)]
            words = [
                sum(c << bits * i for i, c in enumerate(chunk)) for chunk in chunks
            ]
        else:
            whole = sum(c << bits * i for i, c in enumerate(row))
            words = [
                whole >> 32 * i & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))
            ]
        rows.append(words)
    return np.array(rows, dtype=np.uint32).view(np.int32)


@dataclass
class Weight:
    """A quantized weight of random numbers, before it is packed."""

    rows: int = 24
    columns: int = 64
    bits: int = 4
    group: int = 32  # -1: a whole row
    symmetric: bool = True
    padded: bool = False
    dtype: torch.dtype = torch.float16
    order: bool = False
    seed: int = 0
    owners: np.ndarray = field(init=False)  # the group of each column

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        size = self.columns if self.group == -1 else self.group
        groups = -(-self.columns // size)
        half = 1 << (self.bits - 1)
        self.codes = random.integers(0, 2 * half, (self.rows, self.columns))
        scales = random.uniform(0.001, 0.1, (self.rows, groups))
        self.scales = torch.from_numpy(scales).to(self.dtype)
        self.zeros = random.integers(0, 2 * half, (self.rows, groups))
        if self.symmetric:
            self.zeros[:] = half
        self.owners = np.arange(self.columns) // size
        if self.order:
            random.shuffle(self.owners)

    @property
    def values(self) -> Tensor:
        """What it stands for, float64 [N, K]."""
        steps = self.codes - self.zeros[:, self.owners]
        return torch.from_numpy(steps) * self.scales.double()[:, self.owners]

    def tensors(self, name: str = "proj") -> Tensors:
        packed = stream(self.codes, self.bits, self.padded)
        parts = {
            "packed": torch.from_numpy(packed),
            "scale": self.scales,
            "shape": torch.tensor([self.rows, self.columns]),
        }
        if not self.symmetric:
            zeros = stream(self.zeros.T, self.bits, self.padded).T
            parts["zero_point"] = torch.from_numpy(zeros.copy())
        if self.order:
            parts["g_idx"] = torch.from_numpy(self.owners.astype(np.int32))
        return {f"{name}.weight_{part}": tensor for part, tensor in parts.items()}

    def scheme(self, **weights: Any) -> dict[str, Any]:
        """The config group that is written for it."""
        own = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group == -1 else "group",
            "group_size": None if self.group == -1 else self.group,
            "actorder": "group" if self.order else None,
        }
        return {
            "targets": ["Linear"],
            "weights": own | weights,
            "input_activations": None,
            "output_activations": None,
        }


def settings(*groups: dict[str, Any], **also: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "transform_config": {},
        **also,
    }


def write(folder: Path, tensors: Tensors, found: dict[str, Any] | None) -> Path:
    config = {} if found is None else {"quantization_config": found}
    return write_config(folder, tensors, config)


def write_config(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def only(folder: Path) -> ct.CompressedWeight:
    """The one weight of a checkpoint that has no more than it."""
    checkpoint = open_checkpoint(folder)
    assert ct.recognizes(checkpoint)
    assert ct.check_settings(checkpoint) == []
    weights, broken, parts = ct.stored_weights(checkpoint)
    assert broken == {}
    assert parts == set(checkpoint.tensors)
    ((name, weight),) = weights.items()
    assert weight.name == name
    return weight


def load(folder: Path, dtype: torch.dtype = torch.float32) -> AffineQuantizedTensor:
    weight = only(folder)
    tensor = weight.read(dtype, CPU)
    assert tuple(tensor.shape) == weight.shape
    assert (tensor.bits, tensor.group_size) == weight.format
    assert tensor.dtype == dtype
    assert tensor.scales.dtype == tensor.biases.dtype
    return tensor


def saved(folder: Path, weight: Weight, *, version: str | None = None) -> Path:
    also = {} if version is None else {"version": version}
    return write(folder, weight.tensors(), settings(weight.scheme(), **also))


def refusals(folder: Path, found: dict[str, Any], weight: Weight | None = None) -> str:
    tensors = (weight or Weight()).tensors()
    problems = ct.check_settings(open_checkpoint(write(folder, tensors, found)))
    return wrapped("\n".join(problems))


def broken(folder: Path) -> str:
    checkpoint = open_checkpoint(folder)
    assert ct.check_settings(checkpoint) == []
    weights, found, parts = ct.stored_weights(checkpoint)
    assert weights == {}
    assert parts >= {n for n in checkpoint.tensors if "weight_" in n}
    ((name, text),) = found.items()
    assert name == "proj.weight"
    return wrapped(text)


# ---- the values ------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(p.name for p in DATA.iterdir()))
def test_files_of_llm_compressor(case: str) -> None:
    checkpoint = open_checkpoint(DATA / case)
    assert ct.recognizes(checkpoint)
    assert ct.check_settings(checkpoint) == []
    weights, wrong, parts = ct.stored_weights(checkpoint)
    linears = json.loads((DATA / case / "meta.json").read_text())["linears"]
    assert wrong == {}
    assert weights.keys() == {f"{name}.weight" for name in linears}
    assert {n for n in checkpoint.tensors if n not in parts} == {
        "model.layers.0.input_layernorm.weight"
    }
    for name, facts in linears.items():
        dtype = getattr(torch, facts["scale_dtype"])
        tensor = weights[f"{name}.weight"].read(dtype, CPU)
        assert tensor.shape == (facts["N"], facts["K"])
        assert tensor.bits == facts["bits"]
        assert (tensor.permutation is not None) == facts["act_order_perm"]
        values = tensor.dequantize(dtype).contiguous().view(torch.uint8)
        digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
        assert digest == facts["sha256_dequant_in_scale_dtype"]


LAYOUTS = [(bits, False) for bits in range(1, 9)] + [(b, True) for b in (3, 5, 6, 7)]


@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize(("bits", "padded"), LAYOUTS)
def test_every_format_keeps_its_codes_and_values(
    bits: int,
    padded: bool,
    group: int,
    order: bool,
    symmetric: bool,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    """K == N: exchanged dimensions would pass all checks of shapes."""
    weight = Weight(192, 192, bits, group, symmetric, padded, dtype, order)
    version = "0.12.2" if padded else "0.19.0"
    tensor = load(saved(tmp_path, weight, version=version))
    assert tensor.bits == {7: 8}.get(bits, bits)
    codes = layout.unpack(tensor.packed, bits=tensor.bits)
    if tensor.permutation is not None:
        assert order
        assert group == 32
        codes = torch.empty_like(codes).index_copy_(1, tensor.permutation.long(), codes)
    assert codes.equal(torch.from_numpy(weight.codes).to(torch.uint8))
    rounded = weight.values.float()
    if dtype == torch.float32 and not symmetric:
        # The biases are products of 24 and 8 bits.
        assert torch.allclose(tensor.dequantize(), rounded, rtol=0, atol=2e-6)
    else:
        assert tensor.dequantize().equal(rounded)
    kept = dtype if symmetric else torch.float32
    assert tensor.scales.dtype == kept  # whatever the logical dtype is


def test_the_logical_dtype_does_not_touch_the_scales(tmp_path: Path) -> None:
    weight = Weight(bits=8, dtype=torch.float16)
    tensor = load(saved(tmp_path, weight), torch.bfloat16)
    assert tensor.scales.dtype == torch.float16
    assert tensor.dequantize(torch.float32).equal(weight.values.float())


def test_dense_words_are_taken_over_as_they_are(tmp_path: Path) -> None:
    for bits in (1, 2, 3, 4, 5, 6, 8):
        weight = Weight(bits=bits)
        tensor = load(saved(tmp_path / str(bits), weight))
        assert tensor._packed.equal(torch.from_numpy(stream(weight.codes, bits, False)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
def test_zero_points_are_packed_along_the_rows(bits: int, tmp_path: Path) -> None:
    """Rows that do not fill the last word, and every zero point that there is: that of 0
    stands for -(2 ** (bits - 1)), not for none."""
    weight = Weight(rows=13, bits=bits, symmetric=False)
    weight.zeros[:, 0] = np.arange(13) % (1 << bits)
    tensor = load(saved(tmp_path, weight))
    assert tensor.dequantize().equal(weight.values.float())


def test_zero_points_of_early_versions_are_not_packed(tmp_path: Path) -> None:
    """int8, signed: so it was until 0.9.3."""
    weight = Weight(symmetric=False)
    tensors = weight.tensors()
    signed = torch.from_numpy(weight.zeros - 8).to(torch.int8)
    tensors["proj.weight_zero_point"] = signed
    folder = write(tmp_path, tensors, settings(weight.scheme()))
    assert load(folder).dequantize().equal(weight.values.float())


def test_zero_points_in_the_middle_cost_no_float32(tmp_path: Path) -> None:
    weight = Weight(symmetric=False)
    weight.zeros[:] = 8
    tensor = load(saved(tmp_path, weight))
    assert tensor.scales.dtype == torch.float16
    assert tensor.dequantize().equal(weight.values.float())


def test_biases_that_float16_cannot_hold_are_float32(tmp_path: Path) -> None:
    weight = Weight(bits=8)
    weight.scales[0, 0] = 600.0  # times 128: beyond 65504
    tensor = load(saved(tmp_path, weight))
    assert tensor.scales.dtype == torch.float32
    assert tensor.dequantize().equal(weight.values.float())


def test_float32_scales_with_zero_points_are_noted(tmp_path: Path) -> None:
    noted = saved(tmp_path / "a", Weight(symmetric=False, dtype=torch.float32))
    assert only(noted).note == "float32 scales with zero points: biases kept to 2**-24"
    assert only(saved(tmp_path / "b", Weight(symmetric=False))).note is None
    assert only(saved(tmp_path / "c", Weight(dtype=torch.float32))).note is None


@pytest.mark.parametrize(
    ("columns", "group", "held"),
    [
        *((512, size, size) for size in layout.GROUP_SIZES),
        (1024, 512, 256),
        (1024, 1024, 256),
        (512, -1, 256),
        (320, -1, 64),
        (96, 48, 16),
        (96, 128, 32),  # one group, shorter than it should be
        (320, 128, 64),  # 128, 128 and 64
        (208, 128, 16),  # 128 and 80
    ],
)
@pytest.mark.parametrize("order", [False, True])
def test_groups_that_are_repeated(
    columns: int, group: int, held: int, order: bool, tmp_path: Path
) -> None:
    weight = Weight(8, columns, group=group, symmetric=False, order=order)
    tensor = load(saved(tmp_path, weight))
    assert tensor.group_size == held
    assert tensor.dequantize().equal(weight.values.float())


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_rows_that_are_not_whole_words_get_another_bit(
    bits: int, tmp_path: Path
) -> None:
    weight = Weight(columns=208, bits=bits, group=16)
    tensor = load(saved(tmp_path, weight, version="0.19.0"))
    assert tensor.bits == bits + 1
    assert tensor.dequantize().equal(weight.values.float())


def test_what_is_read_counts(tmp_path: Path) -> None:
    weight = only(saved(tmp_path, Weight(symmetric=False, order=True)))
    ends = ["packed", "scale", "zero_point", "g_idx"]
    assert [part.name for part in weight.parts] == [f"proj.weight_{e}" for e in ends]
    assert weight.nbytes == sum(part.nbytes for part in weight.parts)
    assert weight.place == weight.packed.place


def test_parts_may_lie_in_different_files(tmp_path: Path) -> None:
    weight = Weight(symmetric=False, order=True)
    folder = saved(tmp_path, weight)
    (folder / "model.safetensors").unlink()
    names = {}
    tensors = weight.tensors()
    for i, (name, tensor) in enumerate(tensors.items(), 1):
        file = f"model-{i:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor}, folder / file)
        names[name] = file
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(folder).dequantize().equal(weight.values.float())


def test_many_rows_are_worked_on_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ct, "_SLICE", 5 * 64)
    weight = Weight(rows=23, bits=7, order=True)
    tensor = load(saved(tmp_path, weight))
    assert tensor.dequantize().equal(weight.values.float())


# ---- act-order -------------------------------------------------------------------


def test_columns_are_sorted_by_group_and_keep_their_order_within(
    tmp_path: Path,
) -> None:
    weight = Weight(order=True)
    tensor = load(saved(tmp_path, weight))
    assert tensor.permutation is not None
    assert tensor.permutation.dtype == torch.int32
    want = np.argsort(weight.owners, kind="stable")
    assert tensor.permutation.tolist() == want.tolist()
    assert tensor.dequantize().equal(weight.values.float())


def test_the_numbers_say_whether_there_is_an_order(tmp_path: Path) -> None:
    """Whatever actorder is; -1 means that there is none, not the last group."""
    plain, ordered = Weight(), Weight(order=True)
    for actorder in (None, "weight", "static", "group", True, False):
        for name, owners in (("none", np.full(64, -1)), ("sorted", plain.owners)):
            tensors = plain.tensors()
            tensors["proj.weight_g_idx"] = torch.from_numpy(owners).to(torch.int32)
            found = settings(plain.scheme(actorder=actorder))
            tensor = load(write(tmp_path / f"{actorder}{name}", tensors, found))
            assert tensor.permutation is None
            assert tensor.dequantize().equal(plain.values.float())
        found = settings(ordered.scheme(actorder=actorder))
        tensor = load(write(tmp_path / f"{actorder}", ordered.tensors(), found))
        assert tensor.permutation is not None
        assert tensor.dequantize().equal(ordered.values.float())


def ragged(folder: Path, **changes: int) -> str:
    weight = Weight(order=True)
    for column, owner in changes.items():
        weight.owners[int(column[1:])] = owner
    stored = only(saved(folder, weight))
    with pytest.raises(CheckpointError) as caught:
        stored.read(torch.float32, CPU)
    return wrapped(str(caught.value))


def test_groups_of_unequal_size_are_refused(tmp_path: Path) -> None:
    owners = Weight(order=True).owners
    first = int(np.flatnonzero(owners == 0)[0])
    assert_expected_inline(
        ragged(tmp_path / "a", **{f"c{first}": 1}),
        """\
proj.weight_g_idx gives group 0 31 columns; it must have 32. Quantize the
  original model again with llm-compressor, with actorder 'weight'""",
    )
    assert_expected_inline(
        ragged(tmp_path / "b", c3=-1),
        """\
proj.weight_g_idx names group -1; groups are 0 to 1. Quantize the original
  model again with llm-compressor, with actorder 'weight'""",
    )
    assert_expected_inline(
        ragged(tmp_path / "c", c3=2),
        """\
proj.weight_g_idx names group 2; groups are 0 to 1. Quantize the original
  model again with llm-compressor, with actorder 'weight'""",
    )


def test_an_order_that_is_missing_is_not_passed_over(tmp_path: Path) -> None:
    weight = Weight(order=True)
    tensors = weight.tensors()
    del tensors["proj.weight_g_idx"]
    folder = write(tmp_path, tensors, settings(weight.scheme()))
    assert_expected_inline(
        broken(folder),
        """\
proj.weight_g_idx is missing; config.json says actorder 'group' for 4 bits,
  group size 32. Fetch the checkpoint again; if columns were never
  reordered, set actorder to null there""",
    )


# ---- which layout ----------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("version", [None, "0.12.2", "0.19.0"])
def test_the_width_tells_old_words_from_dense_ones(
    bits: int, padded: bool, version: str | None, tmp_path: Path
) -> None:
    """Where both have different widths the version does not count: it may be that of
    the tool that wrote the file anew."""
    weight = Weight(columns=256, bits=bits, padded=padded, symmetric=False)
    tensor = load(saved(tmp_path, weight, version=version))
    assert tensor.bits == bits
    assert tensor.dequantize().equal(weight.values.float())


@pytest.mark.parametrize("padded", [False, True])
def test_the_version_tells_where_the_width_does_not(
    padded: bool, tmp_path: Path
) -> None:
    weight = Weight(columns=80, bits=3, group=16, padded=padded)
    version = "0.17.1.a20260601" if padded else "0.18.0"
    tensor = load(saved(tmp_path / "a", weight, version=version))
    assert tensor.dequantize().equal(weight.values.float())


def test_the_layout_is_not_guessed(tmp_path: Path) -> None:
    weight = Weight(columns=80, bits=3, group=16)
    assert_expected_inline(
        broken(saved(tmp_path, weight)),
        """\
its shape [24, 80] could be read in several ways: 3 bits, group 16 or 3
  bits, whole codes in each word, group 16. Write the version of compressed-
  tensors that wrote it into quantization_config.version in config.json, and
  only the config_groups that there are""",
    )


def test_padded_words_of_7_bits_are_as_many_as_those_of_8(tmp_path: Path) -> None:
    seven, eight = Weight(bits=7, padded=True), Weight(bits=8, seed=1)
    both = {**seven.tensors("seven"), **eight.tensors("eight")}
    assert both["seven.weight_packed"].shape == both["eight.weight_packed"].shape
    found = settings(seven.scheme(), eight.scheme(), version="0.12.2")
    folder = write(tmp_path / "old", both, found)
    _, wrong, _ = ct.stored_weights(open_checkpoint(folder))
    assert wrong.keys() == {"seven.weight", "eight.weight"}
    assert_expected_inline(
        wrapped(wrong["seven.weight"]),
        """\
its shape [24, 64] could be read in several ways: 7 bits, whole codes in
  each word, group 32 or 8 bits, group 32. Write the version of compressed-
  tensors that wrote it into quantization_config.version in config.json, and
  only the config_groups that there are""",
    )
    # With one of them named, or in new files, there is no doubt.
    assert load(saved(tmp_path / "7", seven)).dequantize().equal(seven.values.float())
    assert load(saved(tmp_path / "8", eight)).dequantize().equal(eight.values.float())
    found["version"] = "0.19.0"
    folder = write(tmp_path / "new", eight.tensors(), found)
    assert load(folder).dequantize().equal(eight.values.float())


def test_each_module_has_the_bits_of_its_shape(tmp_path: Path) -> None:
    """Several config groups, under any names, and modules that are ignored."""
    own = {
        "model.a": Weight(bits=4, group=32),
        "model.b": Weight(bits=8, group=-1, symmetric=False, seed=1),
        "model.c": Weight(bits=3, group=16, seed=2),
    }
    tensors = {"lm_head.weight": torch.ones(2, 3, dtype=torch.float16)}
    for name, weight in own.items():
        tensors |= weight.tensors(name)
    schemes = [w.scheme() | {"format": "pack-quantized"} for w in own.values()]
    found = settings(format="mixed-precision", ignore=["model.a"])
    found["config_groups"] = dict(zip(["W4A16", "W8", "x"], schemes, strict=True))
    found["config_groups"]["UNQUANTIZED"] = {
        "targets": ["re:.*gate"],
        "format": "dense",
    }
    checkpoint = open_checkpoint(write(tmp_path, tensors, found))
    assert ct.check_settings(checkpoint) == []
    weights, wrong, parts = ct.stored_weights(checkpoint)
    assert wrong == {}
    assert parts == tensors.keys() - {"lm_head.weight"}
    assert weights.keys() == {f"{name}.weight" for name in own}
    for name, weight in own.items():
        tensor = weights[f"{name}.weight"].read(torch.float32, CPU)
        assert tensor.dequantize().equal(weight.values.float())


# ---- the configuration -----------------------------------------------------------


def test_where_the_settings_may_stand(tmp_path: Path) -> None:
    weight = Weight()
    found = settings(weight.scheme())
    rest = {
        k: v for k, v in found.items() if k not in ("quant_method", "sparsity_config")
    }
    method, sparse = {"quant_method": found["quant_method"]}, {"sparsity_config": {}}
    configs: list[dict[str, Any]] = [
        {"quantization_config": found},
        {"text_config": {"quantization_config": found}},
        {"quantization_config": {"quantization_config": rest, **sparse, **method}},
        {"compression_config": rest},
    ]
    for i, config in enumerate(configs):
        tensor = load(write_config(tmp_path / str(i), weight.tensors(), config))
        assert tensor.dequantize().equal(weight.values.float())


def test_other_checkpoints_are_not_recognized(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"bits": 4, "group_size": 32}},
        {"quantization": {"bits": 4, "group_size": 32}},
    ]
    for i, config in enumerate(others):
        folder = write_config(tmp_path / str(i), Weight().tensors(), config)
        assert not ct.recognizes(open_checkpoint(folder))
    dense = write_config(tmp_path / "dense", {"proj.weight": torch.ones(2, 2)}, {})
    assert not ct.recognizes(open_checkpoint(dense))


def test_tensors_without_settings_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, Weight().tensors(), None))
    assert ct.recognizes(checkpoint)
    assert_expected_inline(
        wrapped("\n".join(ct.check_settings(checkpoint))),
        """\
quant_method 'compressed-tensors': proj.weight_packed is there, and
  config.json has no quantization_config with config_groups, which say
  whether activations are quantized too. Take the config.json that
  compressed-tensors wrote""",
    )


def test_settings_that_change_nothing_are_taken(tmp_path: Path) -> None:
    weight = Weight()
    for i, also in enumerate(
        [
            {"sparsity_config": None, "transform_config": None},
            {"sparsity_config": {"format": "dense", "global_sparsity": 0.1}},
            {"transform_config": {"config_groups": {}}},
            {"quantization_status": "frozen", "unknown_key": 1},
        ]
    ):
        found = settings(weight.scheme(), **also)
        tensor = load(write(tmp_path / str(i), weight.tensors(), found))
        assert tensor.dequantize().equal(weight.values.float())


def test_a_quantized_cache_is_said_not_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_module, "_logged", set())
    weight = Weight()
    tensors = weight.tensors("model.layers.0.self_attn.k_proj")
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    tensors["model.layers.0.self_attn.v_proj.output_scale"] = torch.ones(1)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    found = settings(weight.scheme(), kv_cache_scheme=scheme)
    with caplog.at_level(logging.WARNING, "affine_tensor"):
        only(write(tmp_path, tensors, found))
    (message,) = caplog.messages
    assert message == (
        f"The kv_cache_scheme of {tmp_path} is not followed: keys and values are not "
        "quantized"
    )


ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def test_other_formats_are_refused(tmp_path: Path) -> None:
    texts = []
    for format in (
        "int-quantized",
        "naive-quantized",
        "float-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mxfp6-pack-quantized",
        "mxfp8-quantized",
        "marlin-24",
        "dense",
        "something-new",
        None,
    ):
        found = settings(Weight().scheme(), format=format)
        texts.append(refusals(tmp_path / str(format), found))
    assert_expected_inline(
        "\n".join(texts),
        """\
quant_method 'compressed-tensors': format is 'int-quantized' (int8 weights,
  made for int8 activations); allowed is 'pack-quantized'. Quantize the
  original model again with llm-compressor, to weights alone (W4A16 or
  W8A16), or load it with the compressed-tensors library
quant_method 'compressed-tensors': format is 'naive-quantized' (int8 or fp8
  weights, made for activations of the same kind); allowed is 'pack-
  quantized'. Quantize the original model again with llm-compressor, to
  weights alone (W4A16 or W8A16), or load it with the compressed-tensors
  library
quant_method 'compressed-tensors': format is 'float-quantized' (fp8 weights,
  which are not evenly spaced); allowed is 'pack-quantized'. Quantize the
  original model again with llm-compressor, to weights alone (W4A16 or
  W8A16), or load it with the compressed-tensors library
quant_method 'compressed-tensors': format is 'nvfp4-pack-quantized' (4-bit
  floats with fp8 scales); allowed is 'pack-quantized'. Quantize the
  original model again with llm-compressor, to weights alone (W4A16 or
  W8A16), or load it with the compressed-tensors library
quant_method 'compressed-tensors': format is 'mxfp4-pack-quantized' (4-bit
  floats with scales that are powers of two); allowed is 'pack-quantized'.
  Quantize the original model again with llm-compressor, to weights alone
  (W4A16 or W8A16), or load it with the compressed-tensors library
quant_method 'compressed-tensors': format is 'mxfp6-pack-quantized' (6-bit
  floats with scales that are powers of two); allowed is 'pack-quantized'.
  Quantize the original model again with llm-compressor, to weights alone
  (W4A16 or W8A16), or load it with the compressed-tensors library
quant_method 'compressed-tensors': format is 'mxfp8-quantized' (fp8 weights,
  which are not evenly spaced); allowed is 'pack-quantized'. Quantize the
  original model again with llm-compressor, to weights alone (W4A16 or
  W8A16), or load it with the compressed-tensors library
quant_method 'compressed-tensors': format is 'marlin-24' (2:4 sparse weights
  in the layout of a CUDA kernel); allowed is 'pack-quantized'. Quantize the
  original model again with llm-compressor, to weights alone (W4A16 or
  W8A16), or load it with the compressed-tensors library
quant_method 'compressed-tensors': format is 'dense' (weights that are not
  packed); allowed is 'pack-quantized'. Quantize the original model again
  with llm-compressor, to weights alone (W4A16 or W8A16), or load it with
  the compressed-tensors library
quant_method 'compressed-tensors': format is 'something-new'; allowed is
  'pack-quantized'. Quantize the original model again with llm-compressor,
  to weights alone (W4A16 or W8A16), or load it with the compressed-tensors
  library
quant_method 'compressed-tensors': format is None; allowed is 'pack-
  quantized'. Quantize the original model again with llm-compressor, to
  weights alone (W4A16 or W8A16), or load it with the compressed-tensors
  library""",
    )


def test_formats_of_single_groups_are_refused(tmp_path: Path) -> None:
    first = Weight().scheme() | {"format": "pack-quantized"}
    fp8 = Weight(bits=8, group=-1).scheme(type="float") | {"format": "float-quantized"}
    found = settings(first, fp8, format="mixed-precision")
    assert_expected_inline(
        refusals(tmp_path / "a", found),
        """\
quant_method 'compressed-tensors': config_groups.group_1.format is 'float-
  quantized' (fp8 weights, which are not evenly spaced); allowed is 'pack-
  quantized'. Quantize the original model again with llm-compressor, to
  weights alone (W4A16 or W8A16), or load it with the compressed-tensors
  library""",
    )
    found = settings(first, Weight().scheme(), format="mixed-precision")
    assert_expected_inline(
        refusals(tmp_path / "b", found),
        """\
quant_method 'compressed-tensors': format is 'mixed-precision'
  (config_groups.group_1.format says nothing); allowed is 'pack-quantized'.
  Quantize the original model again with llm-compressor, to weights alone
  (W4A16 or W8A16), or load it with the compressed-tensors library""",
    )
    found = settings(fp8)  # where the general one would do
    assert_expected_inline(
        refusals(tmp_path / "c", found),
        """\
quant_method 'compressed-tensors': config_groups.group_0.format is 'float-
  quantized' (fp8 weights, which are not evenly spaced); allowed is 'pack-
  quantized'. Quantize the original model again with llm-compressor, to
  weights alone (W4A16 or W8A16), or load it with the compressed-tensors
  library""",
    )


def test_quantized_activations_are_refused(tmp_path: Path) -> None:
    plain = Weight(bits=8, group=-1).scheme()
    w8a8 = plain | {"input_activations": ACTIVATIONS}
    found = settings(w8a8, format="int-quantized")
    assert_expected_inline(
        refusals(tmp_path / "w8a8", found),
        """\
quant_method 'compressed-tensors': format is 'int-quantized' (int8 weights,
  made for int8 activations); allowed is 'pack-quantized'. Quantize the
  original model again with llm-compressor, to weights alone (W4A16 or
  W8A16), or load it with the compressed-tensors library""",
    )
    w4a8 = Weight().scheme() | {"input_activations": ACTIVATIONS}
    assert_expected_inline(
        refusals(tmp_path / "w4a8", settings(w4a8)),
        """\
quant_method 'compressed-tensors': config_groups.group_0.input_activations
  is {'num_bits': 8, 'type': 'int', 'strategy': 'token', 'dyna...; allowed
  is null. The model was made for quantized activations, and would give
  other results without. Quantize the original model again with llm-
  compressor, to weights alone (W4A16 or W8A16)""",
    )
    output = Weight().scheme() | {"output_activations": ACTIVATIONS}
    assert_expected_inline(
        refusals(tmp_path / "output", settings(output)),
        """\
quant_method 'compressed-tensors': config_groups.group_0.output_activations
  is {'num_bits': 8, 'type': 'int', 'strategy': 'token', 'dyna...; allowed
  is null. The model was made for quantized activations, and would give
  other results without. Quantize the original model again with llm-
  compressor, to weights alone (W4A16 or W8A16)""",
    )
    attention = {"targets": ["LlamaAttention"], "input_activations": ACTIVATIONS}
    found = settings(Weight().scheme(), attention)
    assert_expected_inline(
        refusals(tmp_path / "attention", found),
        """\
quant_method 'compressed-tensors': config_groups.group_1.input_activations
  is {'num_bits': 8, 'type': 'int', 'strategy': 'token', 'dyna...; allowed
  is null. The model was made for quantized activations, and would give
  other results without. Quantize the original model again with llm-
  compressor, to weights alone (W4A16 or W8A16)""",
    )


def test_sparsity_and_transforms_are_refused(tmp_path: Path) -> None:
    sparse = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    transform = {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}
    found = settings(
        Weight().scheme(), sparsity_config=sparse, transform_config=transform
    )
    assert_expected_inline(
        refusals(tmp_path, found),
        """\
quant_method 'compressed-tensors': sparsity_config is {'format':
  'sparse-24-bitmask', 'sparsity_structure': '2:4'}; allowed are none and
  format 'dense'. Sparse weights are stored without their zeros. Quantize
  the model again without a sparsity modifier
quant_method 'compressed-tensors': transform_config is {'config_groups':
  {'R1': {'type': 'hadamard', 'apply': []}}}; allowed is none. It has
  activations rotated while the model runs, which its module here would not
  do. Quantize the model again without SpinQuant, QuIP or other transforms""",
    )


def test_weights_that_are_not_grouped_integers_are_refused(tmp_path: Path) -> None:
    texts = []
    changes: list[dict[str, Any]] = [
        {"type": "float"},
        {"num_bits": 16},
        {"strategy": "tensor"},
        {"strategy": "block", "block_structure": [128, 128]},
        {"strategy": "tensor_group"},
        {"strategy": None, "group_size": None},
        {"group_size": 0},
        {"group_size": None},
    ]
    for i, change in enumerate(changes):
        found = settings(Weight().scheme(**change))
        texts.append(refusals(tmp_path / str(i), found))
    found = settings()
    found["config_groups"] = {"W4A16": ["Linear"], "b": {"weights": 4}}
    texts.append(refusals(tmp_path / "list", found))
    assert_expected_inline(
        "\n".join(texts),
        """\
quant_method 'compressed-tensors': config_groups.group_0.weights.type is
  'float'; allowed is 'int'. Quantize the original model again with llm-
  compressor, to weights alone (W4A16 or W8A16)
quant_method 'compressed-tensors': config_groups.group_0.weights.num_bits is
  16; allowed are 1 to 8. Quantize the original model again with llm-
  compressor
quant_method 'compressed-tensors': config_groups.group_0.weights.strategy is
  'tensor'; allowed are 'group' and 'channel'. Quantize the original model
  again with llm-compressor, with one of these
quant_method 'compressed-tensors': config_groups.group_0.weights.strategy is
  'block'; allowed are 'group' and 'channel'. Quantize the original model
  again with llm-compressor, with one of these
quant_method 'compressed-tensors': config_groups.group_0.weights.strategy is
  'tensor_group'; allowed are 'group' and 'channel'. Quantize the original
  model again with llm-compressor, with one of these
quant_method 'compressed-tensors': config_groups.group_0.weights.strategy is
  'tensor'; allowed are 'group' and 'channel'. Quantize the original model
  again with llm-compressor, with one of these
quant_method 'compressed-tensors': config_groups.group_0.weights.group_size
  is 0; a positive number is needed. Correct it in config.json
quant_method 'compressed-tensors': config_groups.group_0.weights.group_size
  is None; a positive number is needed. Correct it in config.json
quant_method 'compressed-tensors': config_groups.W4A16 is ['Linear']; an
  object with weights is needed. Write out what the scheme stands for
quant_method 'compressed-tensors': config_groups.b.weights is 4; an object
  is needed. Quantize the original model again with llm-compressor""",
    )


def test_a_strategy_may_be_left_to_the_group_size(tmp_path: Path) -> None:
    for group in (-1, 32):
        weight = Weight(group=group)
        found = settings(weight.scheme(strategy=None, group_size=group))
        tensor = load(write(tmp_path / str(group), weight.tensors(), found))
        assert tensor.dequantize().equal(weight.values.float())


# ---- single weights --------------------------------------------------------------


def test_parts_that_are_missing(tmp_path: Path) -> None:
    texts = []
    for part in ("packed", "scale", "shape", "zero_point"):
        weight = Weight(symmetric=False)
        tensors = weight.tensors()
        del tensors[f"proj.weight_{part}"]
        folder = write(tmp_path / part, tensors, settings(weight.scheme()))
        texts.append(broken(folder))
    assert_expected_inline(
        "\n".join(texts),
        """\
proj.weight_packed is missing. Fetch the checkpoint again
proj.weight_scale is missing. Fetch the checkpoint again
proj.weight_shape is missing. Fetch the checkpoint again
proj.weight_zero_point is missing; config.json says symmetric false for 4
  bits, group size 32. Fetch the checkpoint again""",
    )


def test_parts_of_another_kind(tmp_path: Path) -> None:
    kinds: dict[str, Tensor] = {
        "proj.weight_packed": torch.zeros(24, 32, dtype=torch.uint8),
        "proj.weight_scale": torch.zeros(24, 2).to(torch.float8_e4m3fn),
        "proj.weight_shape": torch.zeros(3, dtype=torch.int64),
        "proj.weight_g_idx": torch.zeros(32, dtype=torch.int32),
        "proj.weight_global_scale": torch.ones(1),
        "proj.weight_codebook": torch.ones(16),
        "proj.weight": torch.zeros(24, 64).to(torch.float8_e4m3fn),
    }
    texts = []
    for name, other in kinds.items():
        tensors = Weight().tensors() | {name: other}
        folder = write(tmp_path / name, tensors, settings(Weight().scheme()))
        texts.append(broken(folder))
    assert_expected_inline(
        "\n".join(texts),
        """\
proj.weight_packed is uint8; I32 is needed. Quantize the original model
  again with llm-compressor, to weights alone (W4A16 or W8A16)
proj.weight_scale is float8_e4m3fn; allowed are F32, F16, BF16. Quantize the
  original model again with llm-compressor, to weights alone (W4A16 or
  W8A16)
proj.weight_shape is int64 [3]; two I64 are needed. Quantize the original
  model again with llm-compressor
proj.weight_g_idx is int32 [32]; I32 [64] is needed. Quantize the original
  model again with llm-compressor
proj.weight_global_scale is there, which pack-quantized does not have: it is
  of another format. Quantize the original model again with llm-compressor,
  to weights alone (W4A16 or W8A16)
proj.weight_codebook is there, which pack-quantized does not have: it is of
  another format. Quantize the original model again with llm-compressor, to
  weights alone (W4A16 or W8A16)
proj.weight is float8_e4m3fn and has proj.weight_packed; pack-quantized has
  proj.weight_packed instead. Quantize the original model again with llm-
  compressor, to weights alone (W4A16 or W8A16), and save it with
  save_compressed=True""",
    )


def test_scaled_weights_that_are_not_packed(tmp_path: Path) -> None:
    """fp8 and int8 weights must not be taken as they are, without their scales."""
    texts = []
    for dtype in (torch.float8_e4m3fn, torch.int8):
        tensors = {
            "proj.weight": torch.ones(24, 64).to(dtype),
            "proj.weight_scale": torch.ones(24, 1),
        }
        folder = write(tmp_path / str(dtype), tensors, settings(Weight().scheme()))
        texts.append(broken(folder))
    assert_expected_inline(
        "\n".join(texts),
        """\
proj.weight is float8_e4m3fn and has proj.weight_scale; pack-quantized has
  proj.weight_packed instead. Quantize the original model again with llm-
  compressor, to weights alone (W4A16 or W8A16), and save it with
  save_compressed=True
proj.weight is int8 and has proj.weight_scale; pack-quantized has
  proj.weight_packed instead. Quantize the original model again with llm-
  compressor, to weights alone (W4A16 or W8A16), and save it with
  save_compressed=True""",
    )


def test_shapes_that_contradict_each_other(tmp_path: Path) -> None:
    weight = Weight(symmetric=False)
    changes: dict[str, Tensor] = {
        "proj.weight_shape": torch.tensor([24, 72]),
        "proj.weight_scale": torch.ones(24, 3),
        "proj.weight_packed": torch.zeros(24, 9, dtype=torch.int32),
        "proj.weight_zero_point": torch.zeros(24, 1, dtype=torch.int32),
    }
    texts = []
    for name, other in changes.items():
        tensors = weight.tensors() | {name: other}
        texts.append(broken(write(tmp_path / name, tensors, settings(weight.scheme()))))
    tensors = weight.tensors() | {"proj.weight_shape": torch.tensor([48, 64])}
    texts.append(broken(write(tmp_path / "rows", tensors, settings(weight.scheme()))))
    assert_expected_inline(
        "\n".join(texts),
        """\
weight_packed is [24, 8], weight_scale is [24, 2], weight_zero_point is [3,
  2] for a weight of [24, 72] (weight_shape), which config.json does not
  explain: it names 4 bits, group size 32. Take the config.json that belongs
  to these files
weight_packed is [24, 8], weight_scale is [24, 3], weight_zero_point is [3,
  2] for a weight of [24, 64] (weight_shape), which config.json does not
  explain: it names 4 bits, group size 32. Take the config.json that belongs
  to these files
weight_packed is [24, 9], weight_scale is [24, 2], weight_zero_point is [3,
  2] for a weight of [24, 64] (weight_shape), which config.json does not
  explain: it names 4 bits, group size 32. Take the config.json that belongs
  to these files
weight_packed is [24, 8], weight_scale is [24, 2], weight_zero_point is [24,
  1] for a weight of [24, 64] (weight_shape), which config.json does not
  explain: it names 4 bits, group size 32. Take the config.json that belongs
  to these files
proj.weight_shape says [48, 64], but proj.weight_packed is [24, 8] and
  proj.weight_scale [24, 2]. Quantize the original model again with llm-
  compressor""",
    )


def test_shapes_that_the_settings_do_not_name(tmp_path: Path) -> None:
    """4 bits of 64 columns are as wide as 2 bits of 128; weight_shape says which."""
    weight = Weight(bits=4, group=32)
    found = settings(Weight(bits=2, group=32).scheme(), Weight(group=-1).scheme())
    assert_expected_inline(
        broken(write(tmp_path, weight.tensors(), found)),
        """\
weight_packed is [24, 8], weight_scale is [24, 2] for a weight of [24, 64]
  (weight_shape), which config.json does not explain: it names 2 bits, group
  size 32, or 4 bits, a group for each row. Take the config.json that
  belongs to these files""",
    )


def test_groups_that_cannot_be_held(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", Weight(columns=72, group=24))
    assert_expected_inline(
        broken(folder),
        """\
its 72 columns in groups of 24 cannot be held: a group size of 16 or 32 or
  64 or 128 or 256 must divide both. Quantize it again with such a
  group_size, or ignore this module""",
    )
    folder = saved(tmp_path / "b", Weight(columns=72, group=-1))
    assert_expected_inline(
        broken(folder),
        """\
its 72 columns in groups of 72 cannot be held: a group size of 16 or 32 or
  64 or 128 or 256 must divide both. Quantize it again with such a
  group_size, or ignore this module""",
    )


# ---- the peer --------------------------------------------------------------------


def peer() -> Any:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    return compressors.BaseCompressor.get_value_from_registry("pack-quantized")


def peer_scheme(weight: Weight) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = weight.scheme()
    return quantization.QuantizationScheme(**scheme, format="pack-quantized")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
def test_against_the_peer(
    bits: int, symmetric: bool, group: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """What its compressor writes is what is written here, and what its decompressor
    makes of that is what is read."""
    compressor = peer()
    weight = Weight(40, 96, bits, group, symmetric, dtype=dtype)
    scheme = peer_scheme(weight)
    half = 1 << (bits - 1)
    tensors = {n.removeprefix("proj."): t for n, t in weight.tensors().items()}
    state = {
        "weight": weight.values.float(),
        "weight_scale": weight.scales,
        "weight_zero_point": torch.from_numpy(weight.zeros - half).to(torch.int8),
    }
    written = compressor.compress(state, scheme)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].equal(tensor), name
    want = compressor.decompress(dict(tensors), scheme)["weight"]
    got = load(saved(tmp_path, weight), dtype).dequantize(dtype)
    if dtype == torch.float32 and not symmetric:
        assert torch.allclose(got, want, rtol=0, atol=2e-6)
    else:
        assert got.equal(want)
