"""mxfp4, nvfp4 and mxfp8: what real MLX makes of the same arrays, exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import save_file
from torch import Tensor, nn

from affine_tensor import AffineQuantizedTensor, CheckpointError, load_checkpoint_
from affine_tensor.checkpoint import mlx, mlx_float
from affine_tensor.checkpoint.files import open_checkpoint

mx = pytest.importorskip("mlx.core")

CPU = torch.device("cpu")
MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
FOURS = ["mxfp4", "nvfp4"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
Tensors = dict[str, Tensor]


def of_mlx(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def to_mlx(tensor: Tensor) -> Any:
    return mx.array(tensor.numpy())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(name: str, weight: Tensor, mode: str) -> Tensors:
    """The tensors that MLX stores for a module in this mode."""
    words, scales = mx.quantize(to_mlx(weight), mode=mode)
    return {f"{name}.weight": of_mlx(words), f"{name}.scales": of_mlx(scales)}


def every_code(mode: str) -> Tensors:
    """A row for each code of a scale, with all codes of weights in it."""
    bits, group_size = MODES[mode]
    codes = np.tile(np.arange(1 << bits, dtype=np.uint8), (256, 256 >> bits))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 256 // group_size, 1)
    words = torch.from_numpy(np.ascontiguousarray(codes)).view(torch.int32)
    return {"0.weight": words.view(torch.uint32), "0.scales": torch.from_numpy(scales)}


def dequantized(tensors: Tensors, mode: str, name: str = "0", **also: Any) -> Tensor:
    """What MLX makes of them, float32."""
    arrays = (to_mlx(tensors[f"{name}.{part}"]) for part in ("weight", "scales"))
    bits, group_size = MODES[mode]
    return of_mlx(
        mx.dequantize(
            *arrays,
            group_size=group_size,
            bits=bits,
            mode=mode,
            dtype=mx.float32,
            **also,
        )
    )


def write(
    folder: Path, tensors: Tensors, mode: str, config: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    bits, group_size = MODES.get(mode, (4, 64))
    quantization = {"bits": bits, "group_size": group_size, "mode": mode}
    config = {"quantization": quantization} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def only(folder: Path, columns: int) -> mlx.PackedWeight:
    """The one packed weight of a checkpoint, "0.weight"."""
    checkpoint = open_checkpoint(folder)
    weights, broken, parts = mlx.packed_weights(checkpoint, {"0.weight": columns})
    assert broken == {}
    assert parts == set(checkpoint.tensors)
    return weights["0.weight"]


def refusal(folder: Path, columns: int) -> str:
    checkpoint = open_checkpoint(folder)
    weights, broken, parts = mlx.packed_weights(checkpoint, {"0.weight": columns})
    assert weights == {}
    assert parts == set(checkpoint.tensors)
    return broken["0.weight"]


def dense(value: Tensor) -> Tensor:
    if isinstance(value, AffineQuantizedTensor):
        return value.dequantize(torch.float32)
    return value


# ---- the values ------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_code_with_every_scale(mode: str, tmp_path: Path) -> None:
    tensors = every_code(mode)
    want = dequantized(tensors, mode)
    # What may be loaded: the largest weight of a group is a float32. For mxfp8 the rows
    # have every code, so two of them are NaN.
    if mode == "mxfp8":
        words = tensors["0.weight"].view(torch.uint8)
        words[words & 0x7F == 0x7F] = 0
        want = dequantized(tensors, mode)
    good = want.isfinite().all(dim=1)
    assert int(good.sum()) == {"mxfp4": 253, "nvfp4": 254, "mxfp8": 247}[mode]
    kept = {name: tensor[good] for name, tensor in tensors.items()}
    weight = only(write(tmp_path, kept, mode), 256)
    assert dense(weight.read(torch.float32, CPU)).equal(want[good])

    for code in good.logical_not().nonzero().flatten().tolist():
        one = {name: tensor[code : code + 1] for name, tensor in tensors.items()}
        folder = write(tmp_path / str(code), one, mode)
        with pytest.raises(CheckpointError, match=r"^0\.(weight|scales) is "):
            only(folder, 256).read(torch.float32, CPU)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(6, 96), (3, 6, 96), (2, 3, 6, 96)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_what_mlx_has_quantized(
    mode: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = quantized("0", random(*shape), mode)
    weight = only(write(tmp_path, tensors, mode), 96)
    assert weight.shape == shape
    assert weight.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    value = weight.read(dtype, CPU)
    assert value.dtype == dtype
    assert tuple(value.shape) == shape
    want = dequantized(tensors, mode)
    if mode == "mxfp8":
        assert type(value) is Tensor
        assert value.equal(want.to(dtype))
        return
    assert isinstance(value, AffineQuantizedTensor)
    assert (value.bits, value.group_size) == weight.format == (5, MODES[mode][1])
    assert value.scales.dtype == value.biases.dtype == torch.bfloat16
    assert value.dequantize(torch.float32).equal(want)
    assert value.dequantize().equal(want.to(dtype))


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_larger_than_what_is_worked_on_at_once(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = quantized("0", random(2, 37, 96), mode)
    monkeypatch.setattr(mlx_float, "_SLICE", 5 * 96)  # does not divide 74 rows
    value = only(write(tmp_path, tensors, mode), 96).read(torch.float32, CPU)
    assert dense(value).equal(dequantized(tensors, mode))


@pytest.mark.parametrize("mode", FOURS)
def test_the_parts_are_half_steps(mode: str, tmp_path: Path) -> None:
    tensors = every_code(mode)
    tensors = {name: tensor[64:126] for name, tensor in tensors.items()}
    value = only(write(tmp_path, tensors, mode), 256).read(torch.bfloat16, CPU)
    assert isinstance(value, AffineQuantizedTensor)
    words = value.packed.view(torch.int32).numpy().astype(np.uint32)
    # A row is one little-endian stream of 5-bit numbers, whatever the word.
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = bits.reshape(62, 256, 5) @ (1 << np.arange(5))
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    half_steps = np.concatenate([e2m1, -e2m1]) * 2
    assert (codes == np.tile(12 + half_steps, 16)).all()
    assert value.biases.equal(value.scales * -12)


@pytest.mark.parametrize("columns", [16, 48, 80])
def test_rows_that_5_bits_do_not_fill_become_dense(
    columns: int, tmp_path: Path
) -> None:
    tensors = quantized("0", random(8, columns), "nvfp4")
    weight = only(write(tmp_path, tensors, "nvfp4"), columns)
    assert weight.note == (
        f"nvfp4: made dense, since {columns} columns of 5 bits do not fill whole 32-bit "
        "words"
    )
    value = weight.read(torch.bfloat16, CPU)
    assert type(value) is Tensor
    assert value.equal(dequantized(tensors, "nvfp4").bfloat16())
    assert weight.format == (4, 16)


# ---- nvfp4 with a global scale ---------------------------------------------------


def with_global_scales(weight: Tensor) -> Tensors:
    """As mlx-lm's `_quantize_experts` does it: each expert has its own."""
    largest = weight.abs().amax(dim=(-2, -1))
    parts = [
        mx.quantize(to_mlx(w), mode="nvfp4", global_scale=mx.array(float(g)))
        for w, g in zip(weight, largest, strict=True)
    ]
    return {
        "0.weight": torch.stack([of_mlx(words) for words, _ in parts]),
        "0.scales": torch.stack([of_mlx(scales) for _, scales in parts]),
        "0.global_scale": largest,
    }


@pytest.mark.parametrize("columns", [96, 48])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (3, 1, 1)], ids=str)
def test_a_global_scale(shape: tuple[int, ...], columns: int, tmp_path: Path) -> None:
    tensors = with_global_scales(random(3, 8, columns) * torch.tensor(7e-3))
    if len(shape) == 0 or shape[0] == 1:  # of one weight
        tensors = {name: tensor[1] for name, tensor in tensors.items()}
    tensors["0.global_scale"] = tensors["0.global_scale"].reshape(shape)
    weight = only(write(tmp_path, tensors, "nvfp4"), columns)
    assert weight.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    got = dense(weight.read(torch.float32, CPU))

    each = tensors["0.global_scale"].flatten()
    ones = torch.ones(len(each), 1, 1)
    batch = {
        n: t.reshape(len(each), 8, -1) for n, t in tensors.items() if "glo" not in n
    }
    want = torch.stack(
        [
            dequantized(
                {name: tensor[i] for name, tensor in batch.items()},
                "nvfp4",
                global_scale=mx.array(float(each[i])),
            )
            for i in range(len(each))
        ]
    ).view(got.shape)
    assert (want == 0).any()
    assert ((got == 0) == (want == 0)).all()
    exact = dequantized(batch, "nvfp4").double() * (ones * each.view(-1, 1, 1)) / 2688
    error = (got.double() - exact.view(got.shape)).abs()
    if columns == 96:
        # Half a place of 22 bits, and float32's rounding of two products.
        limit = 2.0**-22 + 2.0**-23
        assert bool((error <= exact.view(got.shape).abs() * limit).all())
        torch.testing.assert_close(got, want, rtol=2.0**-21, atol=0)
    else:  # dense: MLX's own arithmetic
        assert got.equal(want)


def test_multiples_of_a_scale_with_a_global_scale_are_exact(tmp_path: Path) -> None:
    tensors = with_global_scales(random(3, 64, 64))
    weight = only(write(tmp_path, tensors, "nvfp4"), 64)
    value = weight.read(torch.bfloat16, CPU)
    assert isinstance(value, AffineQuantizedTensor)
    assert value.scales.dtype == value.biases.dtype == torch.float32
    assert value.biases.double().equal(value.scales.double() * -12)
    # Each is the number of 22 bits nearest to MLX's own, which is a float32.
    codes = tensors["0.scales"].view(torch.float8_e4m3fn).float()
    own = (codes * (tensors["0.global_scale"].view(3, 1, 1) / 2688)).double()
    last_place = 2.0 ** (torch.frexp(own).exponent - 22).double()
    error = (value.scales.double() * 2 - own).abs() / last_place
    assert float(error.max()) == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.int(),
            "0.global_scale is int32; allowed are F32, F16, BF16",
        ),
        (
            lambda t: t[:2],
            "0.global_scale is [2]; it must be one number, or [3] of them. Convert the "
            "model again",
        ),
        (
            lambda t: t.repeat(2, 1).mT,
            "0.global_scale is [3, 2]; it must be one number, or [3] of them. Convert "
            "the model again",
        ),
    ],
)
def test_a_global_scale_that_does_not_fit(
    change: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    tensors = with_global_scales(random(3, 8, 64))
    tensors["0.global_scale"] = change(tensors["0.global_scale"])
    assert refusal(write(tmp_path, tensors, "nvfp4"), 64) == said


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_other_modes_have_no_global_scale(mode: str, tmp_path: Path) -> None:
    tensors = quantized("0", random(8, 64), mode)
    tensors["0.global_scale"] = torch.tensor(1.0)
    assert refusal(write(tmp_path, tensors, mode), 64) == (
        f"it is {mode} and has 0.global_scale; only nvfp4 has a global scale. Convert "
        "the model again"
    )


# ---- what the report says --------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [False, True])
def test_notes(mode: str, whole: bool, tmp_path: Path) -> None:
    tensors = quantized("0", random(8, 64), mode)
    if whole and mode != "nvfp4":
        return
    if whole:
        tensors["0.global_scale"] = torch.tensor(3.0)
    weight = only(write(tmp_path, tensors, mode), 64)
    note = {
        ("mxfp4", False): "mxfp4: kept exactly as 5-bit affine, 6.0 bits per weight",
        ("nvfp4", False): "nvfp4: kept exactly as 5-bit affine, 7.0 bits per weight",
        ("nvfp4", True): "nvfp4 with a global scale: kept to 2**-21 as 5-bit affine, "
        "9.0 bits per weight",
        ("mxfp8", False): "mxfp8 is not affine: made dense",
    }[mode, whole]
    assert weight.note == note
    value = weight.read(torch.bfloat16, CPU)
    if said := re.search(r"(\S+) bits per weight", note):
        assert isinstance(value, AffineQuantizedTensor)
        assert value.nbytes * 8 / value.numel() == float(said[1])


def test_an_affine_weight_has_no_note(tmp_path: Path) -> None:
    own = AffineQuantizedTensor.from_dense(random(8, 64), 4, 64)
    names = ("weight", "scales", "biases")
    parts = (own.packed, own.scales, own.biases)
    tensors = {f"0.{name}": part for name, part in zip(names, parts, strict=True)}
    weight = only(write(tmp_path, tensors, "affine"), 64)
    assert weight.note is None
    assert weight.nbytes == own.nbytes


# ---- whole models ----------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.up = nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.zeros(3, 8, 64))
        self.head = nn.Linear(64, 24, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(ids))))


def mixed() -> tuple[Tensors, dict[str, Any]]:
    """A checkpoint with all modes, whose settings are spelled in several ways."""
    words, scales, biases = mx.quantize(to_mlx(random(24, 64, seed=4)), 64, 8)
    tensors = {
        **quantized("embed", random(24, 64, seed=1), "mxfp8"),
        **quantized("up", random(96, 64, seed=2), "mxfp4"),
        **quantized("down", random(64, 96, seed=3), "nvfp4"),
        **quantized("experts", random(3, 8, 64, seed=5), "mxfp4"),
        "down.bias": random(64, seed=6),
        "head.weight": of_mlx(words),
        "head.scales": of_mlx(scales),
        "head.biases": of_mlx(biases),
    }
    config = {
        "quantization": {
            "bits": 4,
            "group_size": 32,
            "mode": "mxfp4",
            "model.embed_tokens": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
            "language_model.model.down": {"mode": "nvfp4", "quantize_input": False},
            "head": {"bits": 8, "group_size": 64},
            "norm": False,
        }
    }
    return tensors, config


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_several_modes_in_one_file(place: str, tmp_path: Path) -> None:
    tensors, config = mixed()
    with torch.device(place):
        model = Net()
    load_checkpoint_(model, write(tmp_path, tensors, "", config))
    modes = {"embed": "mxfp8", "up": "mxfp4", "down": "nvfp4", "experts": "mxfp4"}
    want = {name: dequantized(tensors, mode, name) for name, mode in modes.items()}
    for name, value in want.items():
        weight = model.get_submodule(name).weight
        packed = isinstance(weight, AffineQuantizedTensor)
        assert packed == (modes[name] != "mxfp8")
        assert weight.requires_grad != packed
        assert dense(weight).equal(value)
    assert (model.head.weight.bits, model.head.weight.group_size) == (8, 64)

    ids = torch.arange(24)
    x = want["embed"][ids].double() @ want["up"].double().T
    x = x @ want["down"].double().T + tensors["down.bias"].double()
    x = x @ model.head.weight.dequantize(torch.float64).T
    with torch.no_grad():
        torch.testing.assert_close(model(ids).double(), x, rtol=1e-4, atol=1e-4)


def test_an_overflow_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    tensors, config = mixed()
    tensors["embed.scales"][3, 1] = 150
    model = Net().half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_(model, write(tmp_path, tensors, "", config))
    assert re.fullmatch(
        r"embed\.weight holds \S+, which float16 cannot express; take bfloat16 or "
        "float32",
        str(caught.value),
    )
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    load_checkpoint_(Net().bfloat16(), tmp_path)


# ---- what is refused -------------------------------------------------------------


def read_error(tensors: Tensors, mode: str, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        only(write(folder, tensors, mode), 64).read(torch.float32, CPU)
    return str(caught.value)


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    said = []
    for mode, code in [
        ("mxfp4", 255),
        ("mxfp4", 253),
        ("mxfp8", 255),
        ("nvfp4", 127),
        ("nvfp4", 255),
    ]:
        tensors = quantized("0", random(2, 4, 64), mode)
        tensors["0.scales"][1, 2, 1] = code
        said.append(read_error(tensors, mode, tmp_path))
    assert_expected_inline(
        "\n".join(said),
        """\
0.scales is 255 at [1, 2, 1], a scale of nan; mxfp4 codes may be 0 to 252 (2**-127 to 2**125, whose weights float32 can express). Fetch the file again, or convert the model again
0.scales is 253 at [1, 2, 1], a scale of 8.50706e+37; mxfp4 codes may be 0 to 252 (2**-127 to 2**125, whose weights float32 can express). Fetch the file again, or convert the model again
0.scales is 255 at [1, 2, 1], a scale of nan; mxfp8 codes may be 0 to 254 (2**-127 to 2**127). Fetch the file again, or convert the model again
0.scales is 127 at [1, 2, 1], a scale of nan; nvfp4 codes may be all but 127 and 255 (NaN). Fetch the file again, or convert the model again
0.scales is 255 at [1, 2, 1], a scale of nan; nvfp4 codes may be all but 127 and 255 (NaN). Fetch the file again, or convert the model again""",  # noqa: E501
    )


def test_weights_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_float, "_SLICE", 3 * 64)  # the row is not in the first
    said = []
    for code in (0x7F, 0xFF):
        tensors = quantized("0", random(2, 4, 64), "mxfp8")
        tensors["0.weight"].view(torch.uint8)[1, 2, 33] = code
        said.append(read_error(tensors, "mxfp8", tmp_path))
    tensors["0.weight"].view(torch.uint8)[1, 2, 33] = 0x7E
    tensors["0.scales"][1, 2, 1] = 247
    said.append(read_error(tensors, "mxfp8", tmp_path))
    tensors = with_global_scales(random(2, 4, 64))
    tensors["0.global_scale"][1] = float("inf")
    said.append(read_error(tensors, "nvfp4", tmp_path))
    assert_expected_inline(
        "\n".join(said),
        """\
0.weight is nan at [1, 2, 33] (code 127, scale 0.0078125); only finite weights are loaded. Fetch the file again, or convert the model again
0.weight is nan at [1, 2, 33] (code 255, scale 0.0078125); only finite weights are loaded. Fetch the file again, or convert the model again
0.weight is inf at [1, 2, 33] (code 126, scale 1.32923e+36); only finite weights are loaded. Fetch the file again, or convert the model again
0.global_scale holds inf; only finite numbers are allowed. Fetch the file again, or convert the model again""",  # noqa: E501
    )


def test_shapes_and_dtypes(tmp_path: Path) -> None:
    words, scales = quantized("0", random(8, 64), "mxfp4").values()
    cases = {
        "biases": {"0.biases": torch.zeros(8, 2)},
        "qbiases": {"0.qbiases": torch.zeros(8, 2)},
        "words": {"0.weight": words.view(torch.uint8)},
        "rows": {"0.scales": scales[:7]},
        "groups": {"0.scales": scales[:, :1]},
        "bits": {"0.weight": words[:, :4]},
        "columns": {"0.weight": words[:, :7]},
    }
    said = [
        f"{case}: "
        + refusal(
            write(
                tmp_path / case, {"0.weight": words, "0.scales": scales} | new, "mxfp4"
            ),
            64,
        )
        for case, new in cases.items()
    ]
    assert_expected_inline(
        "\n".join(said),
        """\
biases: it has uint8 scales and 0.biases; float formats (mxfp4, nvfp4, mxfp8) have no biases, affine ones no uint8 scales. Convert the model again
qbiases: it has uint8 scales and 0.qbiases; float formats (mxfp4, nvfp4, mxfp8) have no biases, affine ones no uint8 scales. Convert the model again
words: its words are uint8; U32 is needed
rows: weight [8, 8] and scales [7, 2] do not have the same rows and groups
groups: it has uint8 scales and no biases: a float format (mxfp4, nvfp4, mxfp8). Its shape says 4 bits, group size 64; allowed are 4 and 32 (mxfp4), 4 and 16 (nvfp4), 8 and 32 (mxfp8). Convert the model again
bits: it has uint8 scales and no biases: a float format (mxfp4, nvfp4, mxfp8). Its shape says 2 bits, group size 32; allowed are 4 and 32 (mxfp4), 4 and 16 (nvfp4), 8 and 32 (mxfp8). Convert the model again
columns: 7 words and 2 groups a row do not make 64 columns of 1, 2, 3, 4, 5, 6, 8 bits""",  # noqa: E501
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_the_config_does_not_name(mode: str, tmp_path: Path) -> None:
    tensors = quantized("0", random(8, 64), mode)
    other = "mxfp8" if mode == "nvfp4" else "nvfp4"
    bits, group_size = MODES[mode]
    own = {"bits": bits, "group_size": group_size}
    for config in ({**own, "mode": other}, {"bits": 4, "group_size": 64, "0": own}):
        said = refusal(write(tmp_path, tensors, "", {"quantization": config}), 64)
        assert said.startswith(
            "it has uint8 scales and no biases: a float format (mxfp4, nvfp4, mxfp8). "
            f"Its shape says {bits} bits, group size {group_size}: {mode}, which "
            "config.json does not name (it has "
        )
        assert said.endswith(
            f'). If the file is right, add "mode": "{mode}" to the module\'s settings '
            "there"
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_file_without_settings(mode: str, tmp_path: Path) -> None:
    tensors = quantized("0", random(8, 64), mode)
    weight = only(write(tmp_path, tensors, "", {}), 64)
    assert dense(weight.read(torch.float32, CPU)).equal(dequantized(tensors, mode))
