"""What loading takes of memory: little more than the file, joined experts too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import Case, write_mlx_checkpoint
from cases_experts import CASES as EXPERTS
from cases_other import CASES as OTHER
from cases_seeing import CASES as SEEING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from affine_tensor import AffineQuantizedTensor, CheckpointError, from_pretrained
from affine_tensor.checkpoint import load as loading

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LIMIT = 1.1  # peak above what the process held before, as a multiple of the file


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/load.py`, as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import load

    return load


# Importing takes longest. Each load has a process of its own all the same, which first
# loads a tiny model: 25 MB of libraries' code come into memory when first run, and those
# are an eighth of these small files.
LOAD = """
import os
import affine_tensor
from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM

for folder, tiny in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if not child:
        affine_tensor.from_pretrained(tiny)
        measure(lambda: affine_tensor.from_pretrained(folder))
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="/proc tells how much memory is used"
)
def test_the_peak_is_little_more_than_the_file(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    small = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    models = {
        "llama": ({**small, "intermediate_size": 8192}, 30e6),
        # Gate and up of a layer are a sixth of the file.
        "qwen3_moe": (
            {**small, "num_experts": 64, "moe_intermediate_size": 512},
            105e6,
        ),
    }
    tiny = {
        **{"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 256},
        **{"num_experts": 4, "num_experts_per_tok": 2},
    }
    sizes: dict[str, int] = {}
    for name, (changes, layer) in models.items():
        config = {**benchmark.MODELS[name].config, **changes}
        least = benchmark.Model({**config, **tiny}, int(1e6))
        benchmark.write_checkpoint(tmp_path / f"tiny-{name}", least, 1e6)
        own = benchmark.Model(config, int(layer))
        sizes[name] = benchmark.write_checkpoint(tmp_path / name, own, 170e6)
        assert 180e6 < sizes[name] < 250e6
    done = subprocess.run(
        [
            *(sys.executable, "-c", benchmark.MEASURE + LOAD),
            *(
                str(tmp_path / f"{way}{name}")
                for name in models
                for way in ("", "tiny-")
            ),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, line in zip(models, done.stdout.splitlines(), strict=True):
        ratio = json.loads(line)["peak"] / sizes[name]
        assert 0.9 < ratio < LIMIT, f"{name}: {ratio:.3f} times the file"


# ---- experts, a few at a time ----------------------------------------------------


def case_of(cases: list[Case], model_type: str) -> Case:
    return next(case for case in cases if case.model_type == model_type)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{number}": part
        for name, value in model.named_parameters()
        for number, part in enumerate(
            value._parts() if isinstance(value, AffineQuantizedTensor) else [value]
        )
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "case",
    [
        case_of(EXPERTS, "qwen3_moe"),
        case_of(OTHER, "gpt_oss"),  # rows in turn, transposed
        case_of(SEEING, "llama4"),  # transposed
    ],
    ids=str,
)
def test_experts_come_out_the_same_however_many_are_joined_at_once(
    case: Case, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoints")
    write_mlx_checkpoint(case, tmp_path)
    options: dict[str, Any] = {"device_map": device}
    monkeypatch.setattr(loading.Planned, "_by_experts", lambda *args: None)
    whole = from_pretrained(tmp_path, **options)
    monkeypatch.undo()
    joined: list[bool] = []
    by_experts = loading.Planned._by_experts

    def counted(*args: Any) -> Tensor | None:
        value = by_experts(*args)
        joined.append(value is not None)
        return value

    monkeypatch.setattr(loading.Planned, "_by_experts", counted)
    for slab in (1, 40_000, 1 << 30):  # one, some, all
        joined.clear()
        monkeypatch.setattr(loading, "_SLAB", slab)
        model = from_pretrained(tmp_path, **options)
        assert any(joined)
        assert [(n, type(p)) for n, p in model.named_parameters()] == [
            (n, type(p)) for n, p in whole.named_parameters()
        ]
        for name, want in parameters(whole).items():
            got = parameters(model)[name]
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert device == "meta" or torch.equal(got, want), name


def write_nvfp4_experts(folder: Path) -> dict[str, Tensor]:
    """Experts in nvfp4, each with a global scale; returns all tensors of the file."""
    write_mlx_checkpoint(case_of(EXPERTS, "qwen3_moe"), folder)
    file, path = folder / "model.safetensors", folder / "config.json"
    tensors, config = load_file(file), json.loads(path.read_text())
    generator = torch.Generator().manual_seed(0)
    weights = [n for n in tensors if "switch_mlp" in n and n.endswith("weight")]
    for stem in [name.removesuffix("weight") for name in weights]:
        groups = tensors.pop(f"{stem}scales").shape
        columns = groups[-1] * 64
        shape = (*groups[:-1], columns // 8)
        tensors.pop(f"{stem}biases", None)
        words = torch.randint(-(2**31), 2**31, shape, generator=generator)
        tensors[f"{stem}weight"] = words.to(torch.int32).view(torch.uint32)
        shape = (*groups[:-1], columns // 16)
        scales = torch.randint(120, shape, generator=generator)
        tensors[f"{stem}scales"] = scales.to(torch.uint8)
        tensors[f"{stem}global_scale"] = torch.rand(shape[0], generator=generator)
        settings = {"mode": "nvfp4", "bits": 4, "group_size": 16}
        config["quantization"][stem.removesuffix(".")] = settings
    config["quantization_config"] = config["quantization"]
    path.write_text(json.dumps(config))
    save_file(tensors, file)
    (folder / "model.safetensors.index.json").unlink()
    return tensors


def test_experts_with_global_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoints")
    tensors = write_nvfp4_experts(tmp_path)
    whole = parameters(from_pretrained(tmp_path))
    monkeypatch.setattr(loading, "_SLAB", 1)
    one_by_one = parameters(from_pretrained(tmp_path))
    assert one_by_one.keys() == whole.keys()
    assert all(torch.equal(one_by_one[name], want) for name, want in whole.items())
    # What is wrong with an expert is said as of the whole.
    name = next(name for name in tensors if name.endswith("switch_mlp.up_proj.scales"))
    tensors[name][2, 1, 3] = 127
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is 127 at \[2, 1, 3\]"):
        from_pretrained(tmp_path)
