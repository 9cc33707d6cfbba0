"""AWQ's layouts, against a packer of their descriptions and files that peers wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import wrapped
from expecttest import assert_expected_inline
from safetensors.torch import load_file, save_file
from torch import Tensor

from affine_tensor import AffineQuantizedTensor, CheckpointError, layout
from affine_tensor.checkpoint import awq, awq_words
from affine_tensor.checkpoint.awq import AwqWeight
from affine_tensor.checkpoint.files import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "data" / "awq"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
AUTO_ROUND = {"provider": "auto-round", "autoround_version": "0.16.1"}

Tensors = dict[str, Tensor]
Numbers = np.ndarray[Any, Any]


# ---- an independent packer -------------------------------------------------------


def stream(codes: Numbers, bits: int) -> Tensor:
    """Rows of codes as little-endian streams, filled up to whole int32 words."""
    each = (codes[..., None] >> np.arange(bits)) & 1
    flat = each.reshape(len(codes), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    packed = np.packbits(flat.astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed).view(torch.int32)


def interleave(codes: Numbers) -> Numbers:
    """Every eight of a row in AWQ's order."""
    return codes.reshape(len(codes), -1, 8)[..., ORDER].reshape(codes.shape)


def int16_words(codes: Numbers) -> Tensor:
    """gemv_fast: each code, one by one, to its row of words, its word and nibble."""
    rows, columns = codes.shape
    words = np.zeros((rows // 4, columns), dtype=np.int64)
    thirty_two = np.arange(32).reshape(4, 4, 2).transpose(1, 0, 2).reshape(4, 8)
    at = np.argsort(thirty_two[:, ORDER].reshape(32))  # where a column of 32 goes
    for row in range(rows):
        for column in range(columns):
            block, within = divmod(column, 64)
            nibble = 64 * (row % 4) + 32 * (within // 32) + int(at[within % 32])
            code = int(codes[row, column]) << 4 * (nibble % 4)
            words[row // 4, 64 * block + nibble // 4] |= code
    return torch.from_numpy(words.astype(np.uint16)).view(torch.int16)


class Weight:
    """Random codes, scales and zeros, and what each version makes of them."""

    def __init__(
        self,
        rows: int,
        columns: int,
        group: int,
        bits: int = 4,
        dtype: torch.dtype = torch.float16,
        symmetric: bool = False,
    ) -> None:
        random = np.random.default_rng(rows + columns + bits)
        self.bits, self.group = bits, group
        groups = columns // group
        self.codes = random.integers(0, 1 << bits, (rows, columns))
        self.zeros = random.integers(0, 1 << bits, (rows, groups))
        if symmetric:
            self.zeros[:] = 1 << (bits - 1)
        scales = random.uniform(0.001, 0.1, (rows, groups))
        self.scales = torch.from_numpy(scales).to(dtype)

    def gemm(self, interleaved: bool | None = None) -> Tensors:
        interleaved = self.bits == 4 if interleaved is None else interleaved
        order = interleave if interleaved else np.asarray
        return {
            "qweight": stream(order(self.codes.T.copy()), self.bits),
            "qzeros": stream(order(self.zeros.T.copy()), self.bits),
            "scales": self.scales.t().contiguous(),
        }

    def gemv(self, padded: int) -> Tensors:
        more = (0, padded - self.scales.shape[1])
        return {
            "qweight": stream(self.codes, 4),
            "qzeros": stream(np.pad(self.zeros, ((0, 0), more)), 4),
            "scales": torch.nn.functional.pad(self.scales, more),
        }

    def gemv_fast(self, padded: int, name: str = "scaled_zeros") -> Tensors:
        more = (0, padded - self.scales.shape[1])
        return {
            "qweight": int16_words(self.codes),
            name: torch.nn.functional.pad(self.stored_biases(), more).t().contiguous(),
            "scales": torch.nn.functional.pad(self.scales, more).t().contiguous(),
        }

    def stored_biases(self) -> Tensor:
        """What gemv_fast keeps, rounded to the dtype of the scales."""
        return self.biases().to(self.scales.dtype)

    def biases(self) -> Tensor:
        return -(self.scales.double() * torch.from_numpy(self.zeros))

    def dense(self) -> Tensor:
        """``(code - zero) * scale``, exact."""
        apart = torch.from_numpy(self.codes).unflatten(-1, (-1, self.group))
        apart = apart - torch.from_numpy(self.zeros).unsqueeze(-1)
        return (apart * self.scales.double().unsqueeze(-1)).flatten(-2)


def settings(version: str | None = "gemm", **also: Any) -> dict[str, Any]:
    own = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    return own | ({"version": version} if version else {}) | also


def write(
    folder: Path,
    tensors: Tensors,
    quantization: dict[str, Any] | None = None,
    stem: str = "a.",
    **files: dict[str, Any],
) -> Checkpoint:
    """A checkpoint with this module; `files` are other JSON files."""
    folder.mkdir(exist_ok=True, parents=True)
    own = {} if quantization is None else {"quantization_config": quantization}
    for name, values in {"config": own, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    save_file(
        {f"{stem}{k}": v.contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
    )
    return open_checkpoint(folder)


def only(checkpoint: Checkpoint) -> AwqWeight:
    """The one weight of a checkpoint that is in order."""
    assert awq.recognizes(checkpoint)
    assert awq.check_settings(checkpoint) == []
    weights, broken, parts = awq.stored_weights(checkpoint)
    assert broken == {}
    assert parts == checkpoint.tensors.keys()
    (weight,) = weights.values()
    return weight


def read(checkpoint: Checkpoint) -> AffineQuantizedTensor:
    weight = only(checkpoint)
    value = weight.read(torch.float32, CPU)
    assert tuple(value.shape) == weight.shape
    assert (value.bits, value.group_size) == weight.format
    assert value.dtype == torch.float32
    assert value.permutation is None
    return value


def problem(checkpoint: Checkpoint) -> str:
    """What is wrong with the one weight of a checkpoint."""
    assert awq.recognizes(checkpoint)
    assert awq.check_settings(checkpoint) == []
    weights, broken, parts = awq.stored_weights(checkpoint)
    assert weights == {}
    assert f"{next(iter(broken)).removesuffix('weight')}qweight" in parts
    return wrapped("\n".join(f"{name}: {text}" for name, text in broken.items()))


def flat(text: str) -> str:
    return text.replace("\n  ", " ")


def refusal(checkpoint: Checkpoint) -> str:
    assert awq.recognizes(checkpoint)
    return wrapped("\n".join(awq.check_settings(checkpoint)))


def check(value: AffineQuantizedTensor, weight: Weight) -> None:
    """Codes, scales and dense values are exactly those of the weight."""
    codes = layout.unpack(value.packed, bits=value.bits)
    assert torch.equal(codes.long(), torch.from_numpy(weight.codes))
    times = weight.group // value.group_size
    assert torch.equal(
        value.scales.double(), weight.scales.double().repeat_interleave(times, -1)
    )
    assert torch.equal(value.dequantize(torch.float64), weight.dense())


# ---- gemm ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_gemm(tmp_path: Path, group: int, dtype: torch.dtype) -> None:
    weight = Weight(40, 512, group, dtype=dtype)
    value = read(write(tmp_path, weight.gemm(), settings(group_size=group)))
    assert (value.bits, value.group_size) == (4, group)
    assert value.scales.dtype == value.biases.dtype == torch.float32
    assert torch.equal(value.biases.double(), weight.biases())
    check(value, weight)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_gemm_of_other_widths_is_not_interleaved(tmp_path: Path, bits: int) -> None:
    weight = Weight(64, 96, 32, bits, torch.bfloat16)
    found = only(write(tmp_path, weight.gemm(), settings(bits=bits, **GPTQMODEL)))
    assert found.bits == bits
    assert found.format == (8 if bits == 7 else bits, 32)
    assert found.note == ("7 bits, kept exactly in 8" if bits == 7 else None)
    check(found.read(torch.float32, CPU), weight)


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
@pytest.mark.parametrize(
    "said",
    [
        {"provider": "auto-round"},
        {"autoround_version": "0.16.1"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        {"quant_method": "intel/auto-round", "backend": "auto_round:awq"},
        {
            "quant_method": "inc",
            "packing_format": "auto_round:auto_awq",
            "format": "auto_round:auto_awq",
        },
    ],
    ids=str,
)
def test_auto_round_interleaves_other_widths(
    tmp_path: Path, bits: int, said: dict[str, str]
) -> None:
    weight = Weight(64, 96, 32, bits)
    tensors = weight.gemm(interleaved=True)
    own = settings("gemm", **{"bits": bits, "data_type": "int", "act_bits": 16} | said)
    if "quant_method" in said:
        del own["version"]
    check(read(write(tmp_path, tensors, own)), weight)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gemm_with_rows_that_do_not_fill_words(tmp_path: Path, bits: int) -> None:
    weight = Weight(42, 64, 32, bits)
    own = settings(bits=bits, **GPTQMODEL)
    check(read(write(tmp_path, weight.gemm(), own)), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_slice_after_the_other(
    tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awq_words, "_WORDS", 256)
    monkeypatch.setattr(awq_words, "_CODES", 4096)
    weight = Weight(104, 128, 32, bits)
    own = settings(bits=bits, **GPTQMODEL)
    check(read(write(tmp_path, weight.gemm(), own)), weight)


@pytest.mark.parametrize("columns", [64, 128, 320, 512, 2048])
def test_whole_rows_are_groups(tmp_path: Path, columns: int) -> None:
    """-1, of which nothing can be computed."""
    weight = Weight(32, columns, columns)
    found = only(write(tmp_path, weight.gemm(), settings(group_size=-1)))
    held = {64: 64, 128: 128, 320: 64, 512: 256, 2048: 256}[columns]
    assert found.format == (4, held)
    kept = f"groups of {columns} columns, kept exactly as {columns // held} of {held}"
    assert found.note == (None if held == columns else kept)
    check(found.read(torch.float32, CPU), weight)


@pytest.mark.parametrize("group", [48, 512, 1024])
def test_groups_that_are_not_held_are_repeated(tmp_path: Path, group: int) -> None:
    weight = Weight(32, 2 * group, group)
    found = only(write(tmp_path, weight.gemm(), settings(group_size=group)))
    assert found.format == (4, 16 if group == 48 else 256)
    check(found.read(torch.float32, CPU), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_scales_keep_their_dtype(
    tmp_path: Path, bits: int, dtype: torch.dtype
) -> None:
    weight = Weight(32, 64, 32, bits, dtype, symmetric=True)
    own = settings(bits=bits, zero_point=False, **GPTQMODEL)
    value = read(write(tmp_path, weight.gemm(), own))
    assert value.scales.dtype == value.biases.dtype == dtype
    assert torch.equal(value.biases.double(), weight.biases())
    check(value, weight)


def test_biases_that_float16_cannot_express_are_float32(tmp_path: Path) -> None:
    weight = Weight(32, 64, 32, symmetric=True)
    weight.scales[0, 0] = 60000.0
    value = read(write(tmp_path, weight.gemm(), settings()))
    assert value.scales.dtype == value.biases.dtype == torch.float32
    check(value, weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("said", [False, None])
def test_missing_zeros_are_half_of_the_codes(
    tmp_path: Path, bits: int, said: bool | None
) -> None:
    weight = Weight(32, 64, 32, bits, symmetric=True)
    tensors = weight.gemm()
    del tensors["qzeros"]
    value = read(
        write(tmp_path, tensors, settings(bits=bits, zero_point=said, **GPTQMODEL))
    )
    assert value.scales.dtype == torch.float16
    check(value, weight)


def test_the_logical_dtype_is_not_that_of_the_scales(tmp_path: Path) -> None:
    weight = Weight(32, 64, 32, symmetric=True)
    found = only(write(tmp_path, weight.gemm(), settings()))
    value = found.read(torch.bfloat16, CPU)
    assert (value.dtype, value.scales.dtype) == (torch.bfloat16, torch.float16)


def test_float32_scales_are_kept(tmp_path: Path) -> None:
    weight = Weight(32, 64, 32, dtype=torch.float32)
    value = read(write(tmp_path, weight.gemm(), settings()))
    assert torch.equal(value.scales, weight.scales)
    assert torch.equal(value.biases, weight.biases().float())


# ---- gemv and gemv_fast ----------------------------------------------------------

# As AutoAWQ pads the groups of a row: columns, group size, groups stored.
PADDED = [
    (256, 128, 8),
    (256, 64, 16),
    (256, 32, 32),
    (256, 16, 64),
    (1024, 128, 8),
    (1152, 128, 16),
    (1152, 64, 32),
    (512, 512, 8),
    (256, 64, 4),
]


@pytest.mark.parametrize(("columns", "group", "padded"), PADDED)
def test_gemv(tmp_path: Path, columns: int, group: int, padded: int) -> None:
    weight = Weight(32, columns, group)
    own = settings("gemv", group_size=-1 if group == columns else group)
    check(read(write(tmp_path, weight.gemv(padded), own)), weight)


@pytest.mark.parametrize("name", ["scaled_zeros", "qzeros"])
@pytest.mark.parametrize("version", ["gemv_fast", "llm-awq", "llm_awq"])
@pytest.mark.parametrize(("columns", "group", "padded"), PADDED[::2])
def test_gemv_fast(
    tmp_path: Path, columns: int, group: int, padded: int, version: str, name: str
) -> None:
    weight = Weight(12, columns, group)
    own = settings(version, group_size=-1 if group == columns else group)
    value = read(write(tmp_path, weight.gemv_fast(padded, name), own))
    codes = layout.unpack(value.packed, bits=4)
    assert torch.equal(codes.long(), torch.from_numpy(weight.codes))
    times = group // value.group_size
    stored = [weight.scales, weight.stored_biases()]
    scales, biases = (part.repeat_interleave(times, -1) for part in stored)
    assert value.scales.dtype == torch.float16
    assert torch.equal(value.scales, scales)
    assert torch.equal(value.biases, biases)  # as stored, not the exact ones


def test_gemv_fast_a_slice_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awq_words, "_WORDS", 300)
    weight = Weight(28, 192, 64, symmetric=True)
    own = settings("gemv_fast", group_size=64)
    check(read(write(tmp_path, weight.gemv_fast(16), own)), weight)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_missing_zeros_of_gemv(tmp_path: Path, version: str) -> None:
    weight = Weight(32, 64, 32, symmetric=True)
    tensors = weight.gemv(32) if version == "gemv" else weight.gemv_fast(32)
    kept = {name: tensors[name] for name in ("qweight", "scales")}
    value = read(write(tmp_path, kept, settings(version, zero_point=False)))
    assert value.scales.dtype == torch.float16
    check(value, weight)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_padding_that_is_not_empty(tmp_path: Path, version: str) -> None:
    """The settings say 256, the file has 128, and the number stored is the same."""
    weight = Weight(32, 1024, 128)
    tensors = weight.gemv(8) if version == "gemv" else weight.gemv_fast(8)
    found = only(write(tmp_path, tensors, settings(version, group_size=256)))
    with pytest.raises(CheckpointError) as caught:
        found.read(torch.float32, CPU)
    assert_expected_inline(
        wrapped(str(caught.value)),
        """\
a.scales has more than the 4 groups that make up 1024 columns at group size
  256: what follows them is not zero. Correct group_size in the settings""",
    )


# ---- what is in a checkpoint -----------------------------------------------------


def square(version: str) -> Tensors:
    weight = Weight(256, 256, 128)
    return weight.gemm() if version == "gemm" else weight.gemv(8)


@pytest.mark.parametrize("said", ["gemm", "gemv", None])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_square_weights_are_not_mistaken(
    tmp_path: Path, version: str, said: str | None
) -> None:
    tensors = square(version)
    assert tensors["qweight"].shape == (256, 32)
    checkpoint = write(tmp_path, tensors, settings(said, group_size=128))
    if said in (version, None):
        check(read(checkpoint), Weight(256, 256, 128))
    else:
        assert f"config.json says {said!r}" in flat(problem(checkpoint))


@pytest.mark.parametrize("key", ["version", "format", "checkpoint_format"])
def test_the_keys_of_a_version(tmp_path: Path, key: str) -> None:
    own = settings(None, group_size=128)
    check(
        read(write(tmp_path, square("gemv"), own | {key: "GEMV"})),
        Weight(256, 256, 128),
    )
    wrong = write(tmp_path, square("gemv"), own | {key: "gemm"})
    assert "config.json says 'gemm'" in flat(problem(wrong))


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
def test_the_backend_llm_awq_has_all_layouts(tmp_path: Path, version: str) -> None:
    weight = Weight(32, 64, 32, symmetric=True)
    of = {"gemm": weight.gemm, "gemv": lambda: weight.gemv(32)}
    tensors = of.get(version, lambda: weight.gemv_fast(32))()
    check(read(write(tmp_path, tensors, settings(backend="llm-awq"))), weight)


def test_what_is_quantized_is_what_has_codes(tmp_path: Path) -> None:
    """modules_to_not_convert may name part of a name, or be null."""
    weight = Weight(32, 64, 32)
    tensors = {f"a.{k}": v for k, v in weight.gemm().items()}
    tensors["b.weight"] = torch.zeros(32, 64)
    tensors["a.bias"] = torch.zeros(32)
    own = settings(modules_to_not_convert=["a"])
    checkpoint = write(tmp_path, tensors, own, stem="")
    weights, broken, parts = awq.stored_weights(checkpoint)
    assert broken == {}
    assert parts == {"a.qweight", "a.qzeros", "a.scales"}
    check(weights["a.weight"].read(torch.float32, CPU), weight)


def test_the_model_itself_may_be_the_module(tmp_path: Path) -> None:
    weight = Weight(32, 64, 32)
    checkpoint = write(tmp_path, weight.gemm(), settings(), stem="")
    assert list(awq.stored_weights(checkpoint)[0]) == ["weight"]
    check(read(checkpoint), weight)


def test_parts_in_several_shards(tmp_path: Path) -> None:
    weight = Weight(32, 64, 32)
    write(tmp_path, weight.gemm(), settings())
    (tmp_path / "model.safetensors").unlink()
    for number, (name, tensor) in enumerate(weight.gemm().items(), 1):
        file = tmp_path / f"model-0000{number}-of-00003.safetensors"
        save_file({f"a.{name}": tensor}, file)
    found = only(open_checkpoint(tmp_path))
    assert len({part.file for part in found.parts}) == 3
    assert found.nbytes == sum(t.nbytes for t in weight.gemm().values())
    assert found.place == found.qweight.place
    check(found.read(torch.float32, CPU), weight)


@pytest.mark.parametrize(
    "own",
    [
        {"dynamic": {"+:.*a": {"bits": 8, "group_size": 16}}},
        {"dynamic": {"lm_head": {"bits": 8, "group_size": -1}}, "group_size": 16},
    ],
    ids=str,
)
def test_modules_may_have_settings_of_their_own(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    weight = Weight(32, 64, 16, bits=8)
    check(read(write(tmp_path, weight.gemm(), settings(**own, **GPTQMODEL))), weight)


def test_settings_of_a_text_model(tmp_path: Path) -> None:
    weight = Weight(32, 64, 32)
    config = {"text_config": {"quantization_config": settings()}}
    check(read(write(tmp_path, weight.gemm(), config=config)), weight)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (
            "quant_config",
            {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True},
        ),
        ("quantize_config", settings(None, format="gemm")),
        (
            "quantization_config",
            settings(None, quant_method="auto-round", packing_format="auto_round:awq"),
        ),
    ],
)
def test_settings_in_files_of_their_own(
    tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    weight = Weight(32, 64, 32)
    check(read(write(tmp_path / "a", weight.gemm(), **{file: values})), weight)
    wrong = values | {"q_group_size": 64, "group_size": 64}
    wrong = {key: wrong[key] for key in values}
    text = problem(write(tmp_path / "b", weight.gemm(), **{file: wrong}))
    assert f"{file}.json names 64" in flat(text)


def test_what_is_not_awq(tmp_path: Path) -> None:
    weight = Weight(32, 64, 32)
    tensors = weight.gemm()
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    rounds = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    legacy = {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    for number, own in enumerate([gptq, rounds, {"bits": 4, "group_size": 32}]):
        folder = tmp_path / str(number)
        assert not awq.recognizes(write(folder, tensors, own, quant_config=legacy))
    # GPTQ's tensors without settings, with and without g_idx, and a left-over file.
    columns = {"qweight": torch.zeros(8, 32, dtype=torch.int32)}
    columns |= {"scales": torch.zeros(2, 32), "qzeros": torch.zeros(2, 4)}
    assert not awq.recognizes(write(tmp_path / "a", columns))
    columns["g_idx"] = torch.zeros(64, dtype=torch.int32)
    assert not awq.recognizes(write(tmp_path / "b", columns))
    columns["qweight"] = torch.zeros(4, 64, dtype=torch.int32)  # GPTQ's marlin
    assert not awq.recognizes(write(tmp_path / "d", columns))
    dense = {"weight": torch.zeros(2, 2)}
    assert not awq.recognizes(write(tmp_path / "c", dense, quant_config=legacy))


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
def test_tensors_without_settings(tmp_path: Path, version: str) -> None:
    weight = Weight(32, 64, 32)
    of = {"gemm": weight.gemm, "gemv": lambda: weight.gemv(32)}
    tensors = of.get(version, lambda: weight.gemv_fast(32))()
    assert_expected_inline(
        refusal(write(tmp_path, tensors)),
        """\
its tensors named *.qweight look like AWQ's, but nothing says so:
  config.json has no quantization_config, and there is none of
  quant_config.json, quantize_config.json, quantization_config.json. Fetch
  the one that belongs to them, or add to config.json "quantization_config":
  {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128,
  "zero_point": true}, with the values that are true""",
    )


# ---- refusals of whole checkpoints -----------------------------------------------


@pytest.mark.parametrize("key", ["version", "format", "checkpoint_format"])
@pytest.mark.parametrize("value", ["marlin", "bitblas"])
def test_layouts_of_kernels(tmp_path: Path, key: str, value: str) -> None:
    own = settings() | {key: value}
    text = refusal(write(tmp_path, Weight(32, 64, 32).gemm(), own))
    assert f"{key} is {value!r}" in text
    if (key, value) == ("version", "marlin"):
        assert_expected_inline(
            text,
            """\
config.json: quant_method 'awq': version is 'marlin', the layout of a CUDA
  kernel; allowed are gemm, gemv, gemv_fast and llm-awq. Load the checkpoint
  that it was made from, or quantize the original model again with one of
  these""",
        )


def refused(tmp_path: Path, own: dict[str, Any], **more: Tensor) -> str:
    tensors: Tensors = {**Weight(32, 64, 32).gemm(), **more}
    return refusal(write(tmp_path, tensors, own))


def test_a_version_that_is_not_known(tmp_path: Path) -> None:
    assert_expected_inline(
        refused(tmp_path, settings("exl2")),
        """\
config.json: quant_method 'awq': version is 'exl2'; allowed are gemm, gemv,
  gemv_fast and llm-awq. Quantize the original model again with one of these""",
    )


def test_bits_and_groups_that_are_none(tmp_path: Path) -> None:
    own = settings(bits=9, group_size=0)
    assert_expected_inline(
        refused(tmp_path, own),
        """\
config.json: quant_method 'awq': bits is 9; allowed are 2, 3, 4, 5, 6, 7, 8.
  Quantize the original model again with one of these
config.json: quant_method 'awq': group_size is 0; allowed are multiples of
  16, and -1 for whole rows. Correct it, or quantize the original model
  again""",
    )
    legacy = {"w_bit": "4", "q_group_size": None, "version": "GEMM"}
    text = refusal(
        write(tmp_path / "a", Weight(32, 64, 32).gemm(), quant_config=legacy)
    )
    assert_expected_inline(
        text,
        """\
quant_config.json: quant_method 'awq': w_bit is '4'; allowed are 2, 3, 4, 5,
  6, 7, 8. Quantize the original model again with one of these""",
    )


def test_what_auto_round_may_do_besides(tmp_path: Path) -> None:
    own = settings(
        quant_method="auto-round",
        packing_format="auto_round:auto_awq",
        data_type="mx_fp",
        act_bits=8,
        rotation_config={"type": "hadamard"},
    )
    assert_expected_inline(
        refused(tmp_path, own),
        """\
config.json: quant_method 'auto-round': data_type is 'mx_fp'; allowed are
  integers (int). Quantize the original model again with those
config.json: quant_method 'auto-round': act_bits is 8: activations are
  quantized too; allowed is 16, weights alone. Quantize the original model
  again so
config.json: quant_method 'auto-round': rotation_config is {'type':
  'hadamard'}: activations are rotated while the model runs; allowed is
  none. Quantize the original model again without it""",
    )


def test_activations_with_scales(tmp_path: Path) -> None:
    tensors = {f"m.fc.{k}": v for k, v in Weight(32, 64, 32).gemm().items()}
    tensors["m.act.scales"] = torch.ones(32)
    checkpoint = write(tmp_path, tensors, settings(), stem="")
    assert_expected_inline(
        refusal(checkpoint),
        """\
quant_method 'awq': 1 activations are divided by scales of their own,
  m.act.scales for example; allowed are scales of weights. Quantize the
  original model again with another method, GPTQ for example""",
    )


# ---- refusals of modules ---------------------------------------------------------


def test_scales_that_are_missing(tmp_path: Path) -> None:
    tensors = Weight(32, 64, 32).gemm()
    del tensors["scales"]
    assert_expected_inline(
        problem(write(tmp_path, tensors, settings())),
        """\
a.weight: quant_method 'awq': its scales are missing: a.scales. Fetch the
  checkpoint again""",
    )


def test_zeros_that_are_missing(tmp_path: Path) -> None:
    """Only where all zeros are alike they may be."""
    tensors = Weight(32, 64, 32).gemm()
    del tensors["qzeros"]
    assert_expected_inline(
        problem(write(tmp_path, tensors, settings())),
        """\
a.weight: quant_method 'awq': its zeros are missing: a.qzeros, and
  zero_point is true in config.json; only with false they may be. Fetch the
  checkpoint again""",
    )


def test_codes_and_a_dense_weight(tmp_path: Path) -> None:
    tensors = {**Weight(32, 64, 32).gemm(), "weight": torch.zeros(32, 64)}
    assert_expected_inline(
        problem(write(tmp_path, tensors, settings())),
        """\
a.weight: quant_method 'awq': there are both a.qweight and a.weight; remove
  the one that does not belong to the checkpoint""",
    )


def test_a_layout_that_the_settings_do_not_say(tmp_path: Path) -> None:
    own = settings("gemv", group_size=128)
    text = problem(write(tmp_path, square("gemm"), own))
    assert_expected_inline(
        text,
        """\
a.weight: quant_method 'awq': a.qweight (int32 [256, 32]) and a.scales
  (float16 [2, 256]) are of version 'gemm', and config.json says 'gemv'. If
  the tensors are right, correct that there""",
    )


def test_bits_that_the_settings_do_not_name(tmp_path: Path) -> None:
    text = problem(write(tmp_path, Weight(32, 64, 32, bits=8).gemm(), settings()))
    assert_expected_inline(
        text,
        """\
a.weight: quant_method 'awq': a.qweight (int32 [64, 8]) and a.scales
  (float16 [2, 32]) make 8 bits, and config.json names 4. If the tensors are
  right, correct that there""",
    )


def test_bits_that_few_rows_leave_open(tmp_path: Path) -> None:
    own = settings(bits=2, dynamic={"b": {"bits": 3}})
    text = problem(write(tmp_path, Weight(8, 64, 32, bits=3).gemm(), own))
    assert_expected_inline(
        text,
        """\
a.weight: quant_method 'awq': a.qweight (int32 [64, 1]) and a.scales
  (float16 [2, 8]) make 2 or 3 or 4 bits, and config.json names 2 or 3. If
  the tensors are right, correct that there""",
    )
    closed = settings(bits=3, **GPTQMODEL)
    weight = Weight(8, 64, 32, bits=3)
    check(read(write(tmp_path / "a", weight.gemm(), closed)), weight)


def test_groups_that_the_settings_do_not_name(tmp_path: Path) -> None:
    own = settings(group_size=64)
    text = problem(write(tmp_path, Weight(32, 128, 32).gemm(), own))
    assert_expected_inline(
        text,
        """\
a.weight: quant_method 'awq': a.qweight (int32 [128, 4]) and a.scales
  (float16 [4, 32]) make groups of 32 columns, and config.json names 64. If
  the tensors are right, correct that there""",
    )
    # -1 is one group, not any number of them.
    own = settings(group_size=-1)
    assert "names -1" in problem(write(tmp_path, Weight(32, 128, 32).gemm(), own))


def test_groups_that_cannot_be_held(tmp_path: Path) -> None:
    own = settings(group_size=24)
    text = problem(write(tmp_path, Weight(32, 96, 24).gemm(), own))
    assert_expected_inline(
        text,
        """\
a.weight: quant_method 'awq': its groups are 24 columns wide; allowed are
  multiples of 16. Quantize the original model again with 128, or without
  this module""",
    )


def test_rows_that_are_not_whole_words(tmp_path: Path) -> None:
    own = settings(bits=5, group_size=16, **GPTQMODEL)
    text = problem(write(tmp_path, Weight(32, 48, 16, bits=5).gemm(), own))
    assert_expected_inline(
        text,
        """\
a.weight: quant_method 'awq': 48 columns of 5 bits do not fill whole 32-bit
  words. Quantize the original model again, without this module""",
    )


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_an_order_that_nobody_says(tmp_path: Path, bits: int) -> None:
    own = settings(bits=bits)
    text = problem(write(tmp_path, Weight(32, 64, 32, bits).gemm(), own))
    if bits == 5:
        assert_expected_inline(
            text,
            """\
a.weight: quant_method 'awq': it has 5 bits, which AutoRound and gptqmodel
  pack in two orders, and config.json does not say which of them wrote it.
  Add there "provider": "auto-round", or "meta": {"quantizer":
  ["gptqmodel"]}""",
        )


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_widths_that_auto_round_does_not_write(tmp_path: Path, bits: int) -> None:
    own = settings(bits=bits, **AUTO_ROUND)
    text = problem(write(tmp_path, Weight(32, 64, 32, bits).gemm(), own))
    if bits == 8:
        assert_expected_inline(
            text,
            """\
a.weight: quant_method 'awq': it has 8 bits, and AutoRound packs 4 to 7 bits
  like this. Quantize the original model again, in its auto_gptq format""",
        )


def test_rows_that_cannot_be_in_order(tmp_path: Path) -> None:
    weight = Weight(40, 64, 32)
    tensors = weight.gemm()
    tensors["scales"] = tensors["scales"][:, :36]
    assert_expected_inline(
        problem(write(tmp_path, tensors, settings())),
        """\
a.weight: quant_method 'awq': a.qweight (int32 [64, 5]) and a.scales
  (float16 [2, 36]): its 36 rows are not a multiple of 8, which AWQ's order
  needs. Fetch the checkpoint again""",
    )


def test_shapes_and_dtypes_that_do_not_fit(tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[Tensor], Tensor]) -> str:
        tensors = Weight(32, 64, 32).gemm()
        tensors[name] = change(tensors[name])
        own = settings(zero_point=False)
        return problem(write(tmp_path, tensors, own))

    texts = [
        changed("qweight", lambda t: t.long()),
        changed("scales", lambda t: t.double()),
        changed("scales", lambda t: t[0]),
        changed("scales", lambda t: t[:0]),
        changed("scales", lambda t: t[:, :20]),
        changed("qweight", lambda t: t[:63]),
        changed("qzeros", lambda t: t[:, :3]),
        changed("qzeros", lambda t: t.float()),
    ]
    assert_expected_inline(
        "\n".join(texts),
        """\
a.weight: quant_method 'awq': a.qweight (int64 [64, 4]) and a.scales
  (float16 [2, 32]): words must be I32, or I16 in gemv_fast. Quantize the
  original model again so
a.weight: quant_method 'awq': a.qweight (int32 [64, 4]) and a.scales
  (float64 [2, 32]): scales must be F32, F16 or BF16. Quantize the original
  model again so
a.weight: quant_method 'awq': a.qweight (int32 [64, 4]) and a.scales
  (float16 [32]): both must be matrices. Fetch the checkpoint again
a.weight: quant_method 'awq': a.qweight (int32 [64, 4]) and a.scales
  (float16 [0, 32]): none of these may be zero. Fetch the checkpoint again
a.weight: quant_method 'awq': a.qweight (int32 [64, 4]) and a.scales
  (float16 [2, 20]) make 5 or 6 bits, and config.json names 4. If the
  tensors are right, correct that there
a.weight: quant_method 'awq': a.qweight (int32 [63, 4]) and a.scales
  (float16 [2, 32]) do not fit together: 4 words must hold 32 codes of 2 to
  8 bits, and 2 groups make up 63 columns. Fetch the checkpoint again
a.weight: quant_method 'awq': a.qzeros (int32 [2, 3]) must be I32 [2, 4].
  Fetch the checkpoint again
a.weight: quant_method 'awq': a.qzeros (float32 [2, 4]) must be I32 [2, 4].
  Fetch the checkpoint again""",
    )


def test_gemv_that_does_not_fit(tmp_path: Path) -> None:
    def of(version: str, tensors: Tensors, **own: Any) -> str:
        return problem(write(tmp_path, tensors, settings(version, **own)))

    weight = Weight(32, 1024, 128)
    texts = [
        of("gemv", weight.gemv(8), bits=8),
        of("gemv", weight.gemv(8), group_size=64),
        of("gemv", weight.gemv(8), group_size=128, dynamic={"b": {"group_size": 256}}),
        of(
            "gemv",
            weight.gemv(8) | {"qzeros": torch.zeros(32, 2).int()},
            group_size=128,
        ),
        of("gemv_fast", weight.gemv_fast(8), group_size=64),
        of("gemv_fast", weight.gemv_fast(8) | {"qweight": torch.zeros(8, 96).short()}),
        of(
            "gemv_fast",
            weight.gemv_fast(8) | {"scaled_zeros": torch.zeros(8, 32).int()},
            group_size=128,
        ),
    ]
    assert_expected_inline(
        "\n".join(texts),
        """\
a.weight: quant_method 'awq': its layout has 4 bits, and config.json names
  8. Correct that there
a.weight: quant_method 'awq': a.scales (float16 [32, 8]) belong to 1024
  columns, and config.json names groups of 64: none of these fit, where one
  must. Correct that there
a.weight: quant_method 'awq': a.scales (float16 [32, 8]) belong to 1024
  columns, and config.json names groups of 128 or 256: 2 of these fit, where
  one must. Correct that there
a.weight: quant_method 'awq': a.qzeros (int32 [32, 2]) must be I32 [32, 1].
  Fetch the checkpoint again
a.weight: quant_method 'awq': a.scales (float16 [8, 32]) belong to 1024
  columns, and config.json names groups of 64: none of these fit, where one
  must. Correct that there
a.weight: quant_method 'awq': a.qweight (int16 [8, 96]) and a.scales
  (float16 [8, 32]) do not fit together: in gemv_fast they are [N / 4, K]
  and [groups, N], with K a multiple of 64. Fetch the checkpoint again
a.weight: quant_method 'awq': a.scaled_zeros (int32 [8, 32]) must be F32,
  F16 or BF16 [8, 32]. Fetch the checkpoint again""",
    )


# ---- files and functions of peers ------------------------------------------------


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()


def check_files_of_a_peer(folder: Path, case: str) -> None:
    """All weights dequantize to what the peer's own code made of them."""
    checkpoint = open_checkpoint(folder)
    assert awq.recognizes(checkpoint)
    assert awq.check_settings(checkpoint) == []
    weights, broken, parts = awq.stored_weights(checkpoint)
    linears = json.loads((DATA / case / "meta.json").read_text())["linears"]
    assert broken == {}
    assert parts == checkpoint.tensors.keys()
    assert weights.keys() == {f"{name}.weight" for name in linears}
    for name, linear in linears.items():
        dtype = getattr(torch, linear["scale_dtype"])
        value = weights[f"{name}.weight"].read(dtype, CPU)
        assert tuple(value.shape) == (linear["N"], linear["K"])
        assert value.group_size == linear["src_group"]
        dense = value.dequantize(dtype)
        assert digest(dense) == linear["sha256_dequant_in_scale_dtype"]


# AutoAWQ 0.2.9 wrote the first two, gptqmodel 7.7 the third, with bfloat16 scales. Of
# the first two there is a square weight as well.
CASES = ["awq_gemm_g64", "awq_gemv_g128", "awqgm_gemm_w8_g64_asym"]


@pytest.mark.parametrize("case", CASES)
def test_files_of_peers(case: str) -> None:
    check_files_of_a_peer(DATA / case, case)


def test_a_file_of_a_peer_with_settings_of_old(tmp_path: Path) -> None:
    case = "awq_gemm_g64"
    shutil.copy(DATA / case / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "quant_config.json").write_text(
        '{"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}'
    )
    check_files_of_a_peer(tmp_path, case)


def test_the_packer_of_gemv_fast_is_autoawqs() -> None:
    peer = pytest.importorskip("awq.modules.linear.gemv_fast", exc_type=ImportError)
    codes = Weight(16, 192, 64).codes
    words = peer.pack_intweight(torch.from_numpy(codes).int(), interleave=4, kstride=64)
    assert torch.equal(words, int16_words(codes))


@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_reads_the_same(case: str) -> None:
    peer = pytest.importorskip(
        "gptqmodel.quantization.awq.utils.packing_utils", exc_type=ImportError
    )
    stored = load_file(DATA / case / "model.safetensors")
    for name, found in awq.stored_weights(open_checkpoint(DATA / case))[0].items():
        if found.version != "gemm":
            continue
        stem = name.removesuffix("weight")
        parts = (stored[f"{stem}{part}"] for part in ("qweight", "qzeros", "scales"))
        theirs = peer.dequantize_gemm(*parts, found.bits, found.group_size).t()
        assert torch.equal(found.read(theirs.dtype, CPU).dequantize(), theirs)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_packer_of_gemm_is_gptqmodels(bits: int) -> None:
    peer = pytest.importorskip(
        "gptqmodel.quantization.awq.utils.packing_utils", exc_type=ImportError
    )
    weight = Weight(40, 64, 32, bits)
    codes, zeros = (
        torch.from_numpy(part.T.copy()) for part in (weight.codes, weight.zeros)
    )
    qweight, qzeros = peer.pack_awq(codes, zeros, bits)
    assert torch.equal(qweight, weight.gemm()["qweight"])
    assert torch.equal(qzeros, weight.gemm()["qzeros"])


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_the_order_of_other_widths_is_auto_rounds(bits: int) -> None:
    peer = pytest.importorskip("auto_round.utils.bit_packing", exc_type=ImportError)
    weight = Weight(64, 32, 32, bits)
    words = peer.pack_awq_bitstream(
        torch.from_numpy(weight.codes.T.copy()), bits, dim=1
    )
    assert torch.equal(words, weight.gemm(interleaved=True)["qweight"])
