"""MLX checkpoints as they are found in the wild, through both entry points.

Each test varies a checkpoint that mlx-lm wrote in a way that published ones have.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    COMMON,
    LLAMA3_ROPE,
    Case,
    _write_dense_checkpoint,
    mlx_logits,
    write_mlx_checkpoint,
)
from cases_experts import CASES as EXPERTS
from cases_recurrent import CASES as RECURRENT
from cases_seeing import CASES as SEEING
from hub_server import HubServer, only_loopback, use_hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_architectures import relative_l2
from test_pretrained import edit_json
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    PreTrainedModel,
)

from affine_tensor import (
    AffineQuantizedTensor,
    CheckpointError,
    from_pretrained,
    load_checkpoint_,
    register,
)
from affine_tensor.checkpoint import load as loading
from affine_tensor.checkpoint.files import CONFIG, INDEX
from affine_tensor.hf.quantizer import tower_modules

pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoints")

Load = Callable[..., Any]
ONE = "model.safetensors"
IDS = torch.tensor([[5, 17, 200, 3, 9, 44, 81, 7]])


@pytest.fixture(params=["from_pretrained", "transformers"])
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """`affine_tensor.from_pretrained`, and transformers' own after `register()`."""
    if request.param == "from_pretrained":
        yield from_pretrained
        return
    before = PreTrainedModel.__dict__["from_pretrained"]
    register()
    yield AutoModelForCausalLM.from_pretrained
    PreTrainedModel.from_pretrained = before


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 and 6 bits, whose config.json names modules."""
    folder = tmp_path_factory.mktemp("written") / "mlx"
    write_mlx_checkpoint(
        Case("llama", {"tie_word_embeddings": False}, bits=3, recipe="mixed_3_6"),
        folder,
    )
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(written, tmp_path / "mlx"))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, packed ones in parts."""
    found: dict[str, Tensor] = dict(model.named_buffers())
    for name, value in model.named_parameters():
        packed = isinstance(value, AffineQuantizedTensor)
        parts = value._parts() if packed else [value]
        found |= {f"{name}.{number}": part for number, part in enumerate(parts)}
    return found


def assert_same(model: nn.Module, want: nn.Module) -> None:
    assert type(model) is type(want)
    got, expected = tensors_of(model), tensors_of(want)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def assert_speaks(model: Any, folder: Path, tolerance: float = 1e-5) -> None:
    """Its logits are those of mlx-lm."""
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits.float()
    assert relative_l2(logits, mlx_logits(folder, IDS)) < tolerance


def packed(model: nn.Module) -> dict[str, AffineQuantizedTensor]:
    found = model.named_parameters()
    return {n: p for n, p in found if isinstance(p, AffineQuantizedTensor)}


# ---- files -----------------------------------------------------------------------


def write_index(folder: Path, shards: dict[str, list[str]]) -> None:
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_shards(folder: Path, count: int) -> dict[str, list[str]]:
    """Deals the tensors of the one file out to shards, so that modules are torn apart;
    returns what is where."""
    tensors = load_file(folder / ONE)
    (folder / ONE).unlink()
    (folder / INDEX).unlink()
    shards: dict[str, list[str]] = {}
    for number in range(count):
        names = list(tensors)[number::count]
        file = shard(number + 1, count)
        save_file({n: tensors[n] for n in names}, folder / file, {"format": "mlx"})
        shards[file] = names
    return shards


def stale_index_of_one(folder: Path) -> None:
    """mlx-vlm copied the index of the source over its own."""
    write_index(folder, {shard(n, 5): [f"layer.{n}"] for n in range(1, 6)})


def stale_index_of_shards(folder: Path) -> None:
    write_shards(folder, 2)
    stale_index_of_one(folder)


def stale_index_of_the_same_names(folder: Path) -> None:
    """Shards are called as those of the source, whose index does not know .scales."""
    shards = write_shards(folder, 2)
    dense = {f: [n for n in names if "scales" not in n] for f, names in shards.items()}
    write_index(folder, dense)


def missing_index(folder: Path) -> None:
    write_shards(folder, 3)


def no_index_of_one(folder: Path) -> None:
    (folder / INDEX).unlink()


def torn_modules(folder: Path) -> None:
    shards = write_shards(folder, 3)
    write_index(folder, shards)
    stem = "model.layers.0.self_attn.q_proj."
    places = {
        f for f, names in shards.items() if any(n.startswith(stem) for n in names)
    }
    assert len(places) == 3


def stray_shards(folder: Path) -> None:
    """The source's weights are still there."""
    write_index(folder, write_shards(folder, 2))
    dense = {"model.embed_tokens.weight": torch.ones(256, 128)}
    for number in (1, 2, 3):
        save_file(
            dense if number == 1 else {"other": torch.ones(2)},
            folder / shard(number, 3),
        )


def stray_shards_without_an_index(folder: Path) -> None:
    stray_shards(folder)
    (folder / INDEX).unlink()


FILES = [
    stale_index_of_one,
    stale_index_of_shards,
    stale_index_of_the_same_names,
    missing_index,
    no_index_of_one,
    torn_modules,
    stray_shards,
    stray_shards_without_an_index,
]


@pytest.mark.parametrize("change", FILES, ids=lambda change: change.__name__)
def test_files(change: Callable[[Path], None], load: Load, folder: Path) -> None:
    want = from_pretrained(folder)
    change(folder)
    assert_same(load(folder), want)


# ---- what config.json says of the quantization -----------------------------------


def only_quantization(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def only_quantization_config(config: dict[str, Any]) -> None:
    del config["quantization"]


def both(config: dict[str, Any]) -> None:
    assert config["quantization"] == config["quantization_config"]


def neither(config: dict[str, Any]) -> None:
    del config["quantization"], config["quantization_config"]


def without_mode(config: dict[str, Any]) -> None:
    """As before MLX had other modes than affine."""
    for settings in quantization_of(config):
        settings.pop("mode", None)


def of_another_method_besides(config: dict[str, Any]) -> None:
    """Left over from what was converted."""
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}


def within_the_text(config: dict[str, Any]) -> None:
    config["text_config"] = {"quantization": config.pop("quantization")}
    del config["quantization_config"]


def quantization_of(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The general settings and those of modules."""
    for key in ("quantization", "quantization_config"):
        if key in config:
            yield config[key]
            yield from (v for v in config[key].values() if isinstance(v, dict))


def respelled(config: dict[str, Any], new: Callable[[str], str]) -> None:
    for key in ("quantization", "quantization_config"):
        config[key] = {
            (new(k) if isinstance(v, dict) else k): v for k, v in config[key].items()
        }


def wrapped(config: dict[str, Any]) -> None:
    respelled(config, lambda name: f"language_model.{name}")


def wrapped_otherwise(config: dict[str, Any]) -> None:
    respelled(config, lambda name: name.replace("model.", "model.language_model.", 1))


def with_parameters(config: dict[str, Any]) -> None:
    respelled(config, lambda name: f"{name}.weight")


def with_false(config: dict[str, Any]) -> None:
    """What stays dense, as mlx-lm's AWQ says it; also of what is not there."""
    for key in ("quantization", "quantization_config"):
        config[key]["model.norm"] = config[key]["model.layers.7.mlp"] = False


SETTINGS = [
    only_quantization,
    only_quantization_config,
    both,
    neither,
    without_mode,
    of_another_method_besides,
    wrapped,
    wrapped_otherwise,
    with_parameters,
    with_false,
]


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("change", SETTINGS, ids=lambda change: change.__name__)
def test_settings(
    change: Callable[[dict[str, Any]], None], load: Load, folder: Path
) -> None:
    want = from_pretrained(folder)
    assert {p.bits for p in packed(want).values()} == {3, 6}
    change_config(folder, change)
    assert_same(load(folder), want)


def test_a_module_that_false_says_is_dense(load: Load, folder: Path) -> None:
    tensors = load_file(folder / ONE)
    head = from_pretrained(folder).lm_head.weight.dequantize()
    for end in ("scales", "biases"):
        del tensors[f"lm_head.{end}"]
    tensors["lm_head.weight"] = head
    save_file(tensors, folder / ONE, {"format": "mlx"})
    no_index_of_one(folder)
    for key in ("quantization", "quantization_config"):
        change_config(folder, lambda config, key=key: config[key].update(lm_head=False))
    model = load(folder)
    assert torch.equal(model.lm_head.weight, head)
    assert_speaks(model, folder)


@pytest.mark.parametrize(
    "spelling",
    ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts"],
)
def test_experts_in_the_spelling_of_transformers(
    spelling: str, load: Load, tmp_path: Path
) -> None:
    case = next(case for case in EXPERTS if case.model_type == "qwen3_moe")
    case = Case(case.model_type, case.config, formats={"switch_mlp": (8, 32)})
    write_mlx_checkpoint(case, tmp_path)
    want = from_pretrained(tmp_path)
    assert {p.bits for n, p in packed(want).items() if "experts" in n} == {8}

    def change(config: dict[str, Any]) -> None:
        for key in ("quantization", "quantization_config"):
            own = config[key]
            of_experts = [name for name in own if "switch_mlp" in name]
            own |= {spelling: [own.pop(name) for name in of_experts][0]}

    change_config(tmp_path, change)
    assert_same(load(tmp_path), want)


# ---- the rest of config.json -----------------------------------------------------


def as_version_4(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters", None) or dict(config["rope_scaling"])
    config["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta"))
    config["rope_scaling"] = rope
    config["torch_dtype"] = "bfloat16"
    config.pop("dtype", None)


def as_version_5(config: dict[str, Any]) -> None:
    rope = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    config["rope_parameters"] = rope
    config["dtype"] = "bfloat16"
    config.pop("torch_dtype", None)


def as_version_5_with_type(config: dict[str, Any]) -> None:
    """mlx-lm changes the object that it then saves."""
    as_version_5(config)
    rope = config["rope_parameters"]
    rope["type"] = rope.pop("rope_type")


@pytest.mark.parametrize(
    "change",
    [as_version_4, as_version_5, as_version_5_with_type],
    ids=lambda change: change.__name__,
)
def test_spellings_of_the_configuration(
    change: Callable[[dict[str, Any]], None], load: Load, tmp_path: Path
) -> None:
    rope = {"rope_scaling": LLAMA3_ROPE, "rope_theta": 20000.0}
    case = Case("llama", {**rope, "tie_word_embeddings": True})
    write_mlx_checkpoint(case, tmp_path, dtype="bfloat16")
    change_config(tmp_path, as_version_4)
    logits = mlx_logits(tmp_path, IDS)
    change_config(tmp_path, change)
    model = load(tmp_path)
    assert model.dtype == torch.bfloat16
    found = model.config.rope_parameters
    assert found["rope_theta"] == 20000.0
    assert found["rope_type"] == "llama3"
    assert found["factor"] == 8.0
    model = load(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert relative_l2(model(IDS).logits, logits) < 1e-5


def test_infinity_in_the_configuration(load: Load, tmp_path: Path) -> None:
    case = next(case for case in RECURRENT if case.model_type == "mamba2")
    write_mlx_checkpoint(case, tmp_path)
    edit_json(tmp_path / CONFIG, time_step_limit=[0.0, {"__float__": "Infinity"}])
    model = load(tmp_path)
    assert list(model.config.time_step_limit) == [0.0, float("inf")]
    assert_speaks(model, tmp_path)


def test_without_a_generation_config(load: Load, folder: Path) -> None:
    assert not (folder / "generation_config.json").exists()
    model = load(folder)
    assert model.generation_config.eos_token_id == COMMON["eos_token_id"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert model.generate(IDS, **options).shape[1] <= 12
    edit_json(folder / "generation_config.json", eos_token_id=[2, 9], top_k=7)
    assert load(folder).generation_config.eos_token_id == [2, 9]


# ---- float formats ---------------------------------------------------------------


def write_float_checkpoint(folder: Path, mode: str, global_scale: bool = False) -> None:
    """Lets mlx-lm quantize in a float format."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    dense = folder.with_name("dense")
    _write_dense_checkpoint(Case("llama", {"tie_word_embeddings": False}), dense)
    model, config = load_model(dense)
    model.set_dtype(mx.float32)
    bits, group_size = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    model, config = quantize_model(
        model, config, group_size, bits, mode=mode, global_scale=global_scale
    )
    save_model(folder, model)
    save_config(config, folder / CONFIG)


@pytest.mark.parametrize("whole", [False, True], ids=["", "global"])
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_float_formats(
    mode: str,
    whole: bool,
    load: Load,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if whole and mode != "nvfp4":
        pytest.skip("only nvfp4 has a global scale")
    folder = tmp_path / "mlx"
    write_float_checkpoint(folder, mode, whole)
    assert whole == any("global_scale" in name for name in load_file(folder / ONE))
    with caplog.at_level(logging.INFO, "affine_tensor"):
        model = load(folder)
    said = "\n".join(caplog.messages)
    if mode == "mxfp8":
        assert not packed(model)
        assert "mxfp8 is not affine: made dense" in said
    else:
        assert {p.bits for p in packed(model).values()} == {5}
        assert len(packed(model)) == 16
        assert (
            f"{mode} with a global scale" if whole else f"{mode}: kept exactly" in said
        )
    assert_speaks(model, folder)


# ---- the Hub ---------------------------------------------------------------------


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """org/model has shards and a stale index; its revision v1 has one file."""
    older = Path(shutil.copytree(folder, folder.with_name("older")))
    stale_index_of_shards(folder)
    edit_json(older / CONFIG, rope_theta=500.0)
    edit_json(older / "generation_config.json", eos_token_id=9)
    only_loopback(monkeypatch)
    repos = {"org/model": {"main": folder, "v1": older}}
    with HubServer(repos, token="hf_good") as server:
        use_hub(monkeypatch, server)
        yield server


def test_a_repository_with_a_stale_index(
    server: HubServer, load: Load, folder: Path
) -> None:
    want = from_pretrained(folder)
    model = load("org/model")
    assert_same(model, want)
    assert model.config._name_or_path == model.name_or_path == "org/model"
    weights = [n for n in server.downloads if n.endswith(".safetensors")]
    assert sorted(weights) == [shard(1, 2), shard(2, 2)]
    asked = [r.path for r in server.requests if "-of-00005" in r.path]
    assert asked == []
    server.requests.clear()
    model = load("org/model", local_files_only=True)
    assert_same(model, want)
    assert server.requests == []


def test_a_revision_in_a_cache(server: HubServer, load: Load, tmp_path: Path) -> None:
    commit, _ = server.snapshot("org/model", "v1")
    for revision in ("v1", commit):
        cache = tmp_path / f"cache-{revision}"
        model = load("org/model", revision=revision, cache_dir=cache)
        assert model.config.rope_parameters["rope_theta"] == 500.0
        assert model.generation_config.eos_token_id == 9
        assert model.config._name_or_path == "org/model"
        assert next(cache.rglob(ONE)).parent.name == commit
        # All of it: nothing went to the usual place.
        assert not list(Path(constants.HF_HUB_CACHE).rglob("*.json"))


def test_pushing_and_loading_back(server: HubServer, load: Load) -> None:
    model = load("org/model")
    server.requests.clear()
    model.push_to_hub("org/pushed", token="hf_good", commit_message="First")
    _, files = server.snapshot("org/pushed")
    assert {"config.json", ONE, INDEX, "README.md"} <= files.keys()
    assert_same(load("org/pushed"), model)
    config = json.loads(files["config.json"])
    assert config["quantization"]["bits"] == 3
    assert "quant_method" not in config["quantization"]
    # Again, in shards.
    model.push_to_hub("org/pushed", token="hf_good", max_shard_size="100KB")
    assert_same(load("org/pushed"), model)


def test_saving_pushes_what_it_writes(
    server: HubServer, load: Load, tmp_path: Path
) -> None:
    model = load("org/model")
    place = tmp_path / "saved"
    model.save_pretrained(place, push_to_hub=True, repo_id="org/saved", token="hf_good")
    _, files = server.snapshot("org/saved")
    assert files.keys() == {path.name for path in place.iterdir()}
    assert b"library_name: mlx" in files["README.md"]
    assert_same(load("org/saved"), model)


def test_disk_offload_is_refused(load: Load, folder: Path, tmp_path: Path) -> None:
    off = {"offload_folder": tmp_path / "off"}
    for options in (
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": 100_000}},
    ):
        with pytest.raises(ValueError, match="leaves a part of the model on disk"):
            load(folder, **options, **off)
