"""GPTQ files: packed here by hand, by numpy, and a few that GPTQModel wrote."""

from __future__ import annotations

import hashlib
import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import save_file
from torch import Tensor

import affine_tensor.tensor
from affine_tensor import AffineQuantizedTensor, CheckpointError
from affine_tensor.checkpoint import gptq, gptq_words
from affine_tensor.checkpoint.files import open_checkpoint

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "data" / "gptq"
BITS = [2, 3, 4, 5, 6, 7, 8]
PLAIN = [2, 3, 4, 8]
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
Tensors = dict[str, Tensor]


# ---- an independent packer -------------------------------------------------------


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each column of ``[n, m]`` as a little-endian stream of bits, uint32 words."""
    each = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1  # [n, bits, m]
    flat = each.reshape(-1, codes.shape[1])
    flat = np.pad(flat, ((0, -len(flat) % 32), (0, 0)))
    places = 1 << np.arange(32, dtype=np.uint64)
    words = flat.reshape(-1, 32, codes.shape[1]) * places[:, None]
    return words.sum(1, dtype=np.uint64).astype(np.uint32)


def planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """GPTQModel's gptq_p: 32 codes at a time, low bits and high bits in own words."""
    words = []
    for start in range(0, len(codes), 32):
        block, shift = codes[start : start + 32], 0
        for width in PLANES.get(bits, (bits,)):
            words.append(stream(block >> shift & (1 << width) - 1, width))
            shift += width
    return np.concatenate(words)


def int32(words: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32).copy())


class Module:
    """A quantized module: the codes, zeros and scales that it is made of."""

    def __init__(
        self,
        bits: int,
        *,
        columns: int = 256,
        rows: int = 64,
        group: int = 64,
        sym: bool = True,
        act_order: bool = False,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        draw = np.random.default_rng(bits + columns)
        self.bits, self.group = bits, group if group > 0 else columns
        groups = -(-columns // self.group)
        self.codes = draw.integers(0, 1 << bits, (columns, rows))
        self.zeros = np.full((groups, rows), 1 << bits - 1)
        if not sym:
            self.zeros = draw.integers(0, 1 << bits, (groups, rows))
            self.zeros[:, ::3] = 0  # which v1 cannot hold without a borrow
            self.zeros[:, 1::5] = (1 << bits) - 1
        scales = draw.uniform(0.001, 0.02, (groups, rows))
        self.scales = torch.from_numpy(scales).to(dtype)
        self.g_idx = np.arange(columns) // self.group
        if act_order:
            draw.shuffle(self.g_idx)

    @property
    def weight(self) -> Tensor:
        """float64 ``[rows, columns]``: no rounding in it."""
        s = self.scales.double()[self.g_idx]
        return (s * torch.from_numpy(self.codes - self.zeros[self.g_idx])).T

    def tensors(
        self, name: str = "0", *, zeros: str = "v1", planar: bool = False
    ) -> Tensors:
        """What is stored; `zeros`: as they are ("v2"), less one in their own fields
        ("fields"), or less one as GPTQModel does it ("v1")."""
        pack = planes if planar else stream
        whole_words = zeros == "v1" and self.bits in (2, 4, 8)
        less = 0 if whole_words or zeros == "v2" else 1
        fields = (self.zeros - less) & (1 << self.bits) - 1
        qzeros = pack(fields.T, self.bits).T
        if whole_words:
            qzeros = qzeros - np.uint32(0xFFFFFFFF // ((1 << self.bits) - 1))
        return {
            f"{name}.qweight": int32(pack(self.codes, self.bits)),
            f"{name}.qzeros": int32(qzeros),
            f"{name}.scales": self.scales,
            f"{name}.g_idx": torch.from_numpy(self.g_idx).int(),
        }


def wrapped(*texts: str) -> str:
    return "\n".join(textwrap.fill(text, 84) for text in texts)


def settings(bits: int = 4, group: int = 64, **more: Any) -> dict[str, Any]:
    own = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True}
    return {**own, "meta": {"quantizer": ["gptqmodel:7.7.0"]}, **more}


def write(folder: Path, tensors: Tensors, quantization: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    config = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors")
    return folder


def read(folder: Path) -> dict[str, AffineQuantizedTensor]:
    checkpoint = open_checkpoint(folder)
    assert gptq.recognizes(checkpoint)
    assert gptq.check_settings(checkpoint) == []
    weights, broken, parts = gptq.stored_weights(checkpoint)
    assert broken == {}
    of_weights = (".qweight", ".qzeros", ".scales", ".g_idx")
    assert parts == {n for n in checkpoint.tensors if n.endswith(of_weights)}
    values = {}
    for name, weight in weights.items():
        value = weight.read(torch.float32, CPU)
        assert value.shape == weight.shape
        assert (value.bits, value.group_size) == weight.format
        assert value.dtype == torch.float32
        assert weight.name == name
        values[name] = value
    return values


def only(folder: Path) -> AffineQuantizedTensor:
    (value,) = read(folder).values()
    return value


def check(value: AffineQuantizedTensor, module: Module) -> None:
    """The same codes, scales and zeros: float64 has all products exactly."""
    assert torch.equal(value.dequantize(torch.float64), module.weight)
    sorted_already = (np.diff(module.g_idx) >= 0).all()
    order = np.argsort(module.g_idx, kind="stable")
    codes = affine_tensor.layout.unpack(value.packed, bits=value.bits)
    if sorted_already:
        assert value.permutation is None
    else:
        assert value.permutation is not None
        assert value.permutation.tolist() == order.tolist()
    assert (codes.numpy() == module.codes[order].T).all()


# ---- the values ------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", PLAIN)
def test_v1(bits: int, sym: bool, act_order: bool, tmp_path: Path) -> None:
    module = Module(bits, sym=sym, act_order=act_order)
    # desc_act says nothing: true for GPTQModel's static groups, which are sorted, too.
    said = settings(bits, sym=sym, desc_act=not act_order, checkpoint_format="gptq")
    value = only(write(tmp_path, module.tensors(), said))
    check(value, module)
    kept = torch.float16 if sym else torch.float32
    assert value.scales.dtype == value.biases.dtype == kept


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("label", ["gptq_v2", "gptq_p", "auto-round"])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_as_they_are(
    bits: int, label: str, act_order: bool, tmp_path: Path
) -> None:
    said = settings(bits, sym=False, checkpoint_format=label)
    if label == "auto-round":
        said = {**said, "quant_method": label, "packing_format": "auto_round:gptqmodel"}
        del said["checkpoint_format"]
    elif label == "gptq_v2" and bits in (5, 6, 7):
        pytest.skip("only planar ones exist")
    module = Module(bits, sym=False, act_order=act_order)
    stored = module.tensors(zeros="v2", planar=label == "gptq_p")
    value = only(write(tmp_path, stored, said))
    check(value, module)
    assert value.bits == (8 if bits == 7 else bits)


@pytest.mark.parametrize(
    ("key", "value", "zeros"),
    [
        ("packing_format", "auto_round:auto_gptq", "v1"),
        ("packing_format", "auto_gptq", "v1"),
        ("packing_format", "auto_round:gptq_zp+-1", "v1"),
        ("packing_format", "auto", "v1"),
        ("packing_format", None, "v1"),
        ("packing_format", "auto_round", "v2"),
        ("backend", "autoround:exllamav2", "v2"),
        ("backend", "auto_round:gptq:exllamav2", "v1"),
    ],
)
def test_auto_round(key: str, value: str | None, zeros: str, tmp_path: Path) -> None:
    module = Module(4, sym=False)
    said = settings(4, sym=False, data_type="int", quant_method="intel/auto-round")
    stored = module.tensors(zeros=zeros)
    check(only(write(tmp_path, stored, {**said, key: value})), module)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_zeros_less_one_in_fields_that_straddle_words(
    bits: int, tmp_path: Path
) -> None:
    module = Module(bits, sym=False)
    said = settings(bits, sym=False, quant_method="auto-round", packing_format="auto")
    check(only(write(tmp_path, module.tensors(zeros="fields"), said)), module)


@pytest.mark.parametrize(
    ("group", "columns", "kept"),
    [
        (16, 256, 16),
        (32, 256, 32),
        (128, 256, 128),
        (256, 256, 256),
        (-1, 256, 256),
        (-1, 96, 32),
        (512, 1024, 256),
        (1024, 1024, 256),
        (48, 96, 16),
        (128, 64, 64),
        (128, 320, 64),  # a short last group
        (256, 288, 32),
    ],
)
@pytest.mark.parametrize("act_order", [False, True])
def test_group_sizes(
    group: int, columns: int, kept: int, act_order: bool, tmp_path: Path
) -> None:
    module = Module(4, columns=columns, group=group, sym=False, act_order=act_order)
    value = only(write(tmp_path, module.tensors(), settings(4, group, sym=False)))
    assert value.group_size == kept
    check(value, module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sym", [True, False])
def test_scales_keep_their_values(
    dtype: torch.dtype, sym: bool, tmp_path: Path
) -> None:
    module = Module(8, sym=sym, dtype=dtype)
    value = only(write(tmp_path, module.tensors(), settings(8, sym=sym)))
    assert value.scales.dtype == (dtype if sym else torch.float32)
    if sym or dtype == torch.bfloat16:
        check(value, module)
    else:
        # Half of the last place of the largest bias, 5.1.
        off = (value.dequantize(torch.float64) - module.weight).abs().max()
        assert 0 < off <= 2**-22
        (found,) = gptq.stored_weights(open_checkpoint(tmp_path))[0].values()
        assert found.note == "GPTQ with float32 scales: biases rounded to float32"


def test_a_bias_that_overflows_float16_is_float32(tmp_path: Path) -> None:
    module = Module(8)
    module.scales = torch.full_like(module.scales, 1000.0)
    value = only(write(tmp_path, module.tensors(), settings(8)))
    assert value.biases.dtype == torch.float32
    check(value, module)


def test_rows_that_do_not_fill_the_words_of_zeros(tmp_path: Path) -> None:
    for bits in (3, 4):
        module = Module(bits, rows=44, sym=False)
        stored, said = module.tensors(zeros="v2"), settings(bits, sym=False)
        said["checkpoint_format"] = "gptq_v2"
        check(only(write(tmp_path / str(bits), stored, said)), module)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_many_columns_are_worked_on_in_parts(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Module(bits, rows=300)
    words = int32(stream(module.codes, bits))
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gptq_words, "_SLICE", 1)
    packed = gptq_words.repack(words, order, bits=bits, planar=False)
    assert torch.equal(packed.T, int32(stream(module.codes[order.numpy()], bits)))


@pytest.mark.parametrize("case", sorted(path.name for path in DATA.iterdir()))
def test_files_that_gptqmodel_wrote(case: str) -> None:
    meta = json.loads((DATA / case / "meta.json").read_text())["linears"]
    values = read(DATA / case)
    assert values.keys() == {f"{name}.weight" for name in meta}
    for name, said in meta.items():
        value = values[f"{name}.weight"]
        weight = value.dequantize(getattr(torch, said["scale_dtype"]))
        digest = hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
        assert digest == said["sha256_dequant_in_scale_dtype"]
        assert (value.permutation is not None) == said["act_order_perm"]


@pytest.mark.parametrize("bits", BITS)
def test_gptqmodels_own_planes(bits: int) -> None:
    peer = pytest.importorskip("gptqmodel.utils.planar_packing")
    codes = torch.from_numpy(Module(bits).codes)
    words = peer.planar_pack_rows(codes, bits)
    assert torch.equal(words, int32(planes(codes.numpy(), bits)))
    assert torch.equal(gptq_words.unpack(words, bits=bits, planar=True).long(), codes)


# ---- what must not be taken for something else -----------------------------------


@pytest.mark.parametrize("bits", PLAIN)
@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("sym", [True, None])
def test_of_symmetric_zeros_the_data_say_how_they_are_stored(
    bits: int, label: str | None, sym: bool | None, tmp_path: Path
) -> None:
    module = Module(bits, act_order=True)
    said = settings(bits, checkpoint_format=label, sym=sym)
    for zeros in ("v1", "v2"):
        folder = write(tmp_path / zeros, module.tensors(zeros=zeros), said)
        check(only(folder), module)


def test_only_the_label_tells_planar_3_bit_from_the_other(tmp_path: Path) -> None:
    module = Module(3)
    for planar, label in ((True, "gptq_p"), (False, "gptq_v2")):
        stored = module.tensors(zeros="v2", planar=planar)
        said = settings(3, checkpoint_format=label, format=label)
        check(only(write(tmp_path / label, stored, said)), module)


def test_square_modules_are_not_transposed(tmp_path: Path) -> None:
    module = Module(4, columns=128, rows=128, act_order=True, sym=False)
    check(only(write(tmp_path, module.tensors(), settings(sym=False))), module)


def test_a_missing_g_idx_means_neighbours(tmp_path: Path) -> None:
    module = Module(4, sym=False)
    stored = module.tensors()
    del stored["0.g_idx"]
    check(only(write(tmp_path, stored, settings(sym=False, desc_act=True))), module)


def test_without_qzeros_a_symmetric_module_has_the_middle(tmp_path: Path) -> None:
    module = Module(4)
    stored = module.tensors()
    del stored["0.qzeros"]
    check(only(write(tmp_path, stored, settings())), module)


def test_settings_of_old_files(tmp_path: Path) -> None:
    module = Module(3, sym=False)
    folder = write(tmp_path, module.tensors(), None)
    old = {"bits": 3, "group_size": 64, "desc_act": False, "sym": False}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    check(only(folder), module)


def test_settings_in_the_text_config(tmp_path: Path) -> None:
    module = Module(4, sym=False)
    folder = write(tmp_path, module.tensors(), None)
    config = {"text_config": {"quantization_config": settings(sym=False)}}
    (folder / "config.json").write_text(json.dumps(config))
    check(only(folder), module)


def test_modules_of_their_own_bits_groups_and_symmetry(tmp_path: Path) -> None:
    """Whatever the names in the rules: files and models spell them differently."""
    modules = {
        "model.layers.0.q_proj": Module(4, sym=False),
        "model.layers.0.down_proj": Module(8, group=32, columns=128, sym=False),
        "model.layers.1.q_proj": Module(4, act_order=True),
        "lm_head": Module(8, group=32),
    }
    dynamic = {
        "-:.*k_proj": {},
        "+:.*(down|lm)": {"bits": 8, "group_size": 32, "sym": False},
    }
    stored = {"model.layers.0.k_proj.weight": torch.ones(2, 2)}
    for name, module in modules.items():
        stored |= module.tensors(name)
        stored[f"{name}.bias"] = torch.zeros(64)
    said = settings(sym=True, dynamic=dynamic)
    values = read(write(tmp_path, stored, said))
    assert values.keys() == {f"{name}.weight" for name in modules}
    for name, module in modules.items():
        check(values[f"{name}.weight"], module)


def test_a_module_in_two_shards(tmp_path: Path) -> None:
    module = Module(4, act_order=True, sym=False)
    stored = module.tensors()
    write(tmp_path, {}, settings(sym=False))
    (tmp_path / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = [("0.qweight", "0.g_idx"), ("0.scales", "0.qzeros")]
    index = {}
    for file, keys in zip(names, shards, strict=True):
        save_file({key: stored[key] for key in keys}, tmp_path / file)
        index |= dict.fromkeys(keys, file)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    check(only(tmp_path), module)


def test_zeros_that_others_than_gptqmodel_spoil_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Module(4, sym=False)
    said = settings(sym=False)
    with caplog.at_level(logging.WARNING, "affine_tensor"):
        only(write(tmp_path / "a", module.tensors(), said))
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING, "affine_tensor"):
        only(write(tmp_path / "b", module.tensors(), {**said, "meta": None}))
    assert_expected_inline(
        wrapped(*caplog.messages),
        """\
0.qzeros: a zero of 0 in v1 format (checkpoint_format gptq, sym false) that
GPTQModel did not write. AutoGPTQ spoilt the zeros beside it. If the model answers
badly, quantize it again as gptq_v2""",
    )


def test_seven_bits_are_noted(tmp_path: Path) -> None:
    said = settings(7, checkpoint_format="gptq_p")
    write(tmp_path, Module(7).tensors(zeros="v2", planar=True), said)
    (found,) = gptq.stored_weights(open_checkpoint(tmp_path))[0].values()
    assert found.note == "7-bit GPTQ: kept exactly, in 8 bits"
    assert found.format == (8, 64)
    assert found.nbytes == sum(part.nbytes for part in found.parts)


# ---- whose it is -----------------------------------------------------------------


def test_what_is_recognized(tmp_path: Path) -> None:
    stored = Module(4).tensors()
    awq = {
        "0.qweight": torch.zeros(256, 8, dtype=torch.int32),
        "0.qzeros": torch.zeros(4, 8, dtype=torch.int32),
        "0.scales": torch.zeros(4, 64, dtype=torch.float16),
    }
    dense = {"0.weight": torch.zeros(2, 2)}
    legacy = {"bits": 4, "group_size": 64, "sym": True}
    old_awq = {"w_bit": 4, "q_group_size": 64, "zero_point": True}
    round_awq = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}
    cases: list[tuple[Tensors, Any, dict[str, Any], bool]] = [
        (stored, settings(), {}, True),
        (stored, None, {}, True),
        (stored, {"bits": 4, "group_size": 64}, {}, True),
        (stored, None, {"quantize_config.json": legacy}, True),
        (dense, {"quant_method": "auto-round", "bits": 4}, {}, True),
        (dense, {"quant_method": "VPTQ"}, {}, True),
        (dense, {"quant_method": "compressed-tensors"}, {}, False),
        (dense, None, {}, False),
        (stored, settings(quant_method=1e308), {}, False),
        (stored, settings(quant_method=False), {}, False),
        (awq, {"quant_method": "awq"}, {}, False),
        (awq, round_awq, {}, False),
        (awq, None, {"quant_config.json": old_awq}, False),
        (awq, None, {"quantize_config.json": {"quant_method": "awq"}}, False),
    ]
    for i, (tensors, said, files, own) in enumerate(cases):
        folder = write(tmp_path / str(i), tensors, said)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        assert gptq.recognizes(open_checkpoint(folder)) == own, i


def test_mlx_files_made_from_gptq_are_not_gptq(tmp_path: Path) -> None:
    folder = write(tmp_path, {"0.weight": torch.zeros(2, 2)}, None)
    config = {"quantization": {"bits": 4}, "quantization_config": settings()}
    (folder / "config.json").write_text(json.dumps(config))
    assert not gptq.recognizes(open_checkpoint(folder))


# ---- refusals --------------------------------------------------------------------


def test_settings_that_are_refused(tmp_path: Path) -> None:
    rotated = {"rotation": "hadamard", "activation": {"mode": "w4afp8"}}
    cases: list[Any] = [
        None,
        *[settings(quant_method=m) for m in ("marlin", "bitblas", "qqq", "exl3")],
        *[settings(quant_method=m) for m in ("paroquant", "vptq")],
        settings(checkpoint_format="marlin"),
        settings(format="bitblas"),
        settings(is_marlin_format=True),
        settings(format="gptq_v2", checkpoint_format="gptq"),
        settings(**rotated),
        settings(16.5),
        settings(None),  # type: ignore[arg-type]
        settings(dynamic={"+:.*down": {"bits": 1, "format": "gptq_v2"}}),
        settings(quant_method="auto-round", packing_format="auto_round:fp8"),
        settings(quant_method="auto-round", backend="itrex"),
        settings(quant_method="auto-round", data_type="mx_fp", act_bits=8),
        settings(quant_method="auto-round", extra_config={"a": {"bits": 16}}),
    ]
    said = []
    for i, one in enumerate(cases):
        checkpoint = open_checkpoint(write(tmp_path / str(i), Module(4).tensors(), one))
        assert gptq.recognizes(checkpoint)
        said += gptq.check_settings(checkpoint)
    assert_expected_inline(
        wrapped(*said),
        """\
there are tensors named *.qweight, but no quantization_config in config.json and no
quantize_config.json: they say how zeros are stored. Fetch them from where the model
comes from
quantization_config (quant_method 'marlin'): allowed are gptq and auto-round. It is
another layout or method. Load the GPTQ file that it was made from, or quantize the
model again with GPTQModel, format gptq
quantization_config (quant_method 'bitblas'): allowed are gptq and auto-round. It is
another layout or method. Load the GPTQ file that it was made from, or quantize the
model again with GPTQModel, format gptq
quantization_config (quant_method 'qqq'): allowed are gptq and auto-round. It is
another layout or method. Load the GPTQ file that it was made from, or quantize the
model again with GPTQModel, format gptq
quantization_config (quant_method 'exl3'): allowed are gptq and auto-round. It is
another layout or method. Load the GPTQ file that it was made from, or quantize the
model again with GPTQModel, format gptq
quantization_config (quant_method 'paroquant'): allowed are gptq and auto-round. It
is another layout or method. Load the GPTQ file that it was made from, or quantize
the model again with GPTQModel, format gptq
quantization_config (quant_method 'vptq'): allowed are gptq and auto-round. It is
another layout or method. Load the GPTQ file that it was made from, or quantize the
model again with GPTQModel, format gptq
quantization_config (quant_method 'gptq'): checkpoint_format is 'marlin'; allowed
are gptq, gptq_v2, gptq_p. It is another layout or method. Load the GPTQ file that
it was made from, or quantize the model again with GPTQModel, format gptq
quantization_config (quant_method 'gptq'): format is 'bitblas'; allowed are gptq,
gptq_v2, gptq_p. It is another layout or method. Load the GPTQ file that it was made
from, or quantize the model again with GPTQModel, format gptq
quantization_config (quant_method 'gptq'): is_marlin_format is true; allowed is
false. It is another layout or method. Load the GPTQ file that it was made from, or
quantize the model again with GPTQModel, format gptq
quantization_config (quant_method 'gptq'): format is 'gptq_v2' and checkpoint_format
is 'gptq'; both must be the same. Correct the wrong one
quantization_config (quant_method 'gptq'): rotation is 'hadamard'; allowed is null:
down_proj needs a Hadamard transform of its input. Quantize the model again without
quantization_config (quant_method 'gptq'): activation is {'mode': 'w4afp8'}; allowed
is null: activations are not quantized here. Take a weight-only model
quantization_config (quant_method 'gptq'): bits is 16.5; allowed are 2, 3, 4, 5, 6,
7, 8. Quantize the model again
quantization_config (quant_method 'gptq'): bits is None; allowed are 2, 3, 4, 5, 6,
7, 8. Quantize the model again
quantization_config (quant_method 'gptq'): bits of '+:.*down' is 1; allowed are 2,
3, 4, 5, 6, 7, 8. Quantize the model again
quantization_config (quant_method 'gptq'): format of '+:.*down' is 'gptq_v2';
allowed is that of the whole model, 'gptq'. Quantize the model again
quantization_config (quant_method 'auto-round'): packing_format is 'auto_round:fp8';
allowed are auto_round:auto_gptq and auto_round:gptqmodel. It is another layout or
method. Load the GPTQ file that it was made from, or quantize the model again with
GPTQModel, format gptq
quantization_config (quant_method 'auto-round'): backend is 'itrex'; allowed are
auto_round:auto_gptq and auto_round:gptqmodel. It is another layout or method. Load
the GPTQ file that it was made from, or quantize the model again with GPTQModel,
format gptq
quantization_config (quant_method 'auto-round'): data_type is 'mx_fp'; allowed is
int. Quantize the model again
quantization_config (quant_method 'auto-round'): act_bits is 8; allowed is 16:
activations are not quantized here. Take a weight-only model""",
    )


def test_words_of_marlin_kernels_are_refused(tmp_path: Path) -> None:
    words = {"0.B": torch.zeros(2, 2, dtype=torch.int32), "0.s": torch.zeros(2, 2)}
    checkpoint = open_checkpoint(write(tmp_path, words, settings()))
    (said,) = gptq.check_settings(checkpoint)
    assert_expected_inline(
        wrapped(said),
        """\
quantization_config (quant_method 'gptq'): there are tensors *.B, words of marlin
kernels. It is another layout or method. Load the GPTQ file that it was made from,
or quantize the model again with GPTQModel, format gptq""",
    )


def changed(**parts: Tensor | None) -> Tensors:
    stored = {**Module(4).tensors()}
    for part, value in parts.items():
        if value is None:
            del stored[f"0.{part}"]
        else:
            stored[f"0.{part}"] = value
    return stored


def test_modules_that_are_refused(tmp_path: Path) -> None:
    zeros = torch.zeros
    cases: list[tuple[Tensors, dict[str, Any]]] = [
        (changed(scales=None), settings()),
        (changed(qzeros=None), settings(sym=False)),
        (changed(qweight=zeros(64, 64, dtype=torch.int16)), settings()),
        (changed(scales=zeros(4, 64, dtype=torch.float64)), settings()),
        (changed(g_idx=zeros(256)), settings()),
        (changed(qweight=zeros(2, 32, 64, dtype=torch.int32)), settings()),
        (changed(scales=zeros(4, 48).half()), settings()),
        (changed(qzeros=zeros(2, 8, dtype=torch.int32)), settings()),
        (changed(g_idx=zeros(255, dtype=torch.int32)), settings()),
        (Module(8).tensors(), settings(4)),
        (Module(4).tensors(), settings(4, 128)),
        (Module(4, group=24, columns=96).tensors(), settings(4, 24)),
        (Module(5).tensors(zeros="v2", planar=True), settings(5)),
        (
            Module(3, rows=48).tensors(zeros="v2"),
            settings(3, checkpoint_format="gptq_p"),
        ),
    ]
    said = []
    for i, (tensors, one) in enumerate(cases):
        checkpoint = open_checkpoint(write(tmp_path / str(i), tensors, one))
        weights, broken, parts = gptq.stored_weights(checkpoint)
        assert weights == {}
        assert parts == set(checkpoint.tensors)
        said.append(broken["0.weight"])
    assert_expected_inline(
        wrapped(*said),
        """\
0.scales is missing. Fetch the checkpoint again
0.qzeros is missing, and quantization_config does not say that sym is true for all
modules. Fetch the checkpoint again
0.qweight is int16; allowed are int32, uint32. Quantize the model again
0.scales is float64; allowed are float32, float16, bfloat16. Quantize the model
again
0.g_idx is float32; allowed are int32, int64. Quantize the model again
0.qweight has shape [2, 32, 64]; 2 dimensions are needed, none of them 0. Quantize
the model again
0.qweight [32, 64], 0.scales [4, 48], 0.qzeros [4, 8] do not have the same rows and
groups. Fetch the checkpoint again
0.qweight [32, 64], 0.scales [4, 64], 0.qzeros [2, 8] do not have the same rows and
groups. Fetch the checkpoint again
0.qweight [32, 64], 0.qzeros [4, 8], 0.g_idx [255] means no number of bits, of which
quantization_config (quant_method 'gptq') names none: bits is 4. Correct the one
that is wrong
0.qweight [64, 64], 0.qzeros [4, 16], 0.g_idx [256] means 8 bits, of which
quantization_config (quant_method 'gptq') names none: bits is 4. Correct the one
that is wrong
0.scales has 4 groups for 256 columns, which quantization_config (quant_method
'gptq') does not name (group_size 128). Correct the one that is wrong
0.scales has groups of 24 for 96 columns; both must be multiples of 16. Leave this
module dense, or quantize with group_size 128
0.qweight is 5 bits wide; with checkpoint_format 'gptq' allowed are 2, 3, 4 and 8.
If GPTQModel wrote it, set "checkpoint_format" and "format" to "gptq_p" in
config.json
0.qweight has 256 columns and 48 rows; gptq_p packs multiples of 32. Quantize the
model again""",
    )


def test_groups_and_zeros_that_are_refused_when_read(tmp_path: Path) -> None:
    columns = torch.arange(256, dtype=torch.int32)
    ragged = (columns // 64).clamp(max=2)
    mixed = Module(4)
    mixed.zeros[1, 3] = 5
    cases: list[tuple[Tensors, dict[str, Any]]] = [
        (changed(g_idx=ragged), settings()),
        (changed(g_idx=columns.mul(0)), settings()),
        (changed(g_idx=columns // 64 - 1), settings()),
        (changed(g_idx=columns // 32), settings()),
        (mixed.tensors(), settings()),
    ]
    said = []
    for i, (tensors, one) in enumerate(cases):
        checkpoint = open_checkpoint(write(tmp_path / str(i), tensors, one))
        (weight,) = gptq.stored_weights(checkpoint)[0].values()
        with pytest.raises(CheckpointError) as error:
            weight.read(torch.float16, CPU)
        said.append(str(error.value))
    assert_expected_inline(
        wrapped(*said),
        """\
0.g_idx gives group 2 128 columns; 64 are needed (ragged act-order groups cannot be
packed). Quantize the model again, with desc_act false
0.g_idx gives group 0 256 columns; 64 are needed (ragged act-order groups cannot be
packed). Quantize the model again, with desc_act false
0.g_idx has groups -1 to 2; the module has 0 to 3. Quantize the model again
0.g_idx has groups 0 to 7; the module has 0 to 3. Quantize the model again
0.qzeros holds 4 to 7 though the settings say sym is true; allowed is 7 everywhere
(v1) or 8 (v2). If the model is asymmetric, set "sym": false in config.json""",
    )
