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
from cases_latent import CASES as LATENT
from cases_other import CASES as OTHER
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
ALL_CASES = [*EXPERTS, *LATENT, *RECURRENT, *SEEING, *OTHER]
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


def test_settings_within_those_of_the_text(load: Load, tmp_path: Path) -> None:
    write_mlx_checkpoint(text_case("gemma3"), tmp_path)
    want = from_pretrained(tmp_path)

    def change(config: dict[str, Any]) -> None:
        config["text_config"]["quantization_config"] = config.pop("quantization")
        del config["quantization_config"]

    change_config(tmp_path, change)
    model = load(tmp_path)
    assert_same(model, want)
    assert model.config.quantization_config.quant_method == "affine"


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
            settings = [own.pop(name) for name in list(own) if "switch_mlp" in name]
            own[spelling] = settings[0]

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


def write_float_checkpoint(case: Case, folder: Path, mode: str) -> None:
    """Lets mlx-lm quantize in a float format; experts in nvfp4 have global scales."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    dense = folder.with_name("dense")
    _write_dense_checkpoint(case, dense)
    model, config = load_model(dense)
    model.set_dtype(mx.float32)
    bits, group_size = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    model, config = quantize_model(
        model, config, group_size, bits, mode=mode, global_scale=mode == "nvfp4"
    )
    save_model(folder, model)
    save_config(config, folder / CONFIG)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_float_formats(
    mode: str,
    model_type: str,
    load: Load,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cases = [Case("llama", {"tie_word_embeddings": False}), *EXPERTS]
    case = next(case for case in cases if case.model_type == model_type)
    folder = tmp_path / "mlx"
    write_float_checkpoint(case, folder, mode)
    whole = any("global_scale" in name for name in load_file(folder / ONE))
    assert whole == (mode == "nvfp4" and model_type == "qwen3_moe")
    with caplog.at_level(logging.INFO, "affine_tensor"):
        model = load(folder)
    said = "\n".join(caplog.messages)
    weights = packed(model)
    for name in [name for name in weights if "mlp.gate." in name]:
        assert weights.pop(name).bits == 8  # routers are affine all the same
    if mode == "mxfp8":
        assert not weights
        assert "mxfp8 is not affine: made dense" in said
    else:
        assert {weight.bits for weight in weights.values()} == {5}
        assert "lm_head.weight" in weights
        assert f"{mode}: kept exactly" in said
        assert ("nvfp4 with a global scale: kept to 2**-21" in said) == whole
    if not whole:  # with one, mlx-lm has experts only on a GPU
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
    asked = [r for r in server.requests if r.path.endswith(".safetensors")]
    assert {r.path.rpartition("/")[2] for r in asked} == set(weights)
    assert {r.status for r in asked} <= {200, 206, 302}
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
        # All of it: nothing went to the usual place. (Where peft is installed
        # transformers' Auto classes ask for an adapter without naming the cache; that
        # there is none is noted there.)
        found = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*.json")}
        assert found <= {"adapter_config.json"}


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


# ---- text of models that see -----------------------------------------------------


class _Counted(TorchDispatchMode):
    """Counts the numbers in the largest tensor that is made on a device."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            self.largest = max(self.largest, result.numel())
        return result


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def text_case(model_type: str) -> Case:
    cases = [*SEEING, *RECURRENT]
    return next(case for case in cases if case.model_type == model_type)


# The class that each loads as: that of the text, where there is one.
TEXT = {
    "gemma3": "Gemma3ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForCausalLM",
}


def load_seeing(load: Load, folder: Path) -> Any:
    """transformers' AutoModelForCausalLM does not have all of them."""
    if load is from_pretrained:
        return load(folder)
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return AutoModelForImageTextToText.from_pretrained(folder)
    return load(folder)


@pytest.mark.parametrize("model_type", TEXT)
def test_a_model_that_sees_without_its_tower(
    model_type: str, load: Load, tmp_path: Path
) -> None:
    case = text_case(model_type)
    write_mlx_checkpoint(case, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert "vision_config" not in config
    assert config["model_type"] == model_type
    with _Counted() as counted:
        model = load_seeing(load, tmp_path)
    assert type(model).__name__ == TEXT[model_type]
    assert not list(tower_modules(model))
    # Not even for a moment: the default towers have some hundred million.
    assert parameter_count(model) < 2_000_000
    assert counted.largest < 2_000_000
    assert_speaks(model, tmp_path, case.tolerance)


@pytest.mark.parametrize("model_type", TEXT)
def test_the_class_that_sees_on_request(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = text_case(model_type)
    write_mlx_checkpoint(case, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    seeing = AutoModelForImageTextToText._model_mapping[type(config)]
    with _Counted() as counted:
        model = from_pretrained(tmp_path, model_class=seeing)
    assert type(model) is seeing
    assert not list(tower_modules(model))
    assert parameter_count(model) < 2_000_000
    assert counted.largest < 2_000_000
    assert f"of {seeing.__name__} that see or hear are left out" in caplog.text
    assert_speaks(model, tmp_path, case.tolerance)


def test_a_tower_of_which_nothing_is_there(load: Load, tmp_path: Path) -> None:
    """Former versions of mlx-lm left its configuration."""
    case = text_case("gemma3")
    write_mlx_checkpoint(case, tmp_path)
    edit_json(tmp_path / CONFIG, vision_config=case.config["vision_config"])
    assert_speaks(load(tmp_path), tmp_path)


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen3_vl"])
def test_a_tower_of_which_something_is_missing(
    model_type: str, load: Load, tmp_path: Path
) -> None:
    case = text_case(model_type)
    write_mlx_checkpoint(case, tmp_path)
    edit_json(tmp_path / CONFIG, vision_config=case.config["vision_config"])
    tensors = load_file(tmp_path / ONE)
    save_file({**tensors, "vision_tower.x": torch.ones(2)}, tmp_path / ONE)
    (tmp_path / INDEX).unlink()
    with pytest.raises(
        CheckpointError, match=r"\d+ missing:\n  model\.(vision_tower|visual)"
    ):
        load_seeing(load, tmp_path)


# ---- parts in float32 ------------------------------------------------------------

FLOAT32 = {
    "bfloat16": ["deepseek_v3", "ernie4_5_moe", "glm4_moe", "nemotron_h"],
    "float16": ["gpt_oss", "glm4_moe", "longcat_flash", "afmoe"],
}


@pytest.mark.parametrize(
    ("dtype", "model_type"),
    [(dtype, name) for dtype, names in FLOAT32.items() for name in names],
)
def test_what_a_model_keeps_in_float32(
    dtype: str, model_type: str, load: Load, tmp_path: Path
) -> None:
    case = next(case for case in ALL_CASES if case.model_type == model_type)
    _write_dense_checkpoint(case, tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    want = {name: tensor.dtype for name, tensor in stock.state_dict().items()}
    assert set(want.values()) >= {torch.float32, getattr(torch, dtype)}
    write_mlx_checkpoint(case, tmp_path / "mlx")
    model = load(tmp_path / "mlx", dtype=dtype)
    got = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert got == want
    with torch.no_grad():
        assert bool(model(IDS, use_cache=False).logits.isfinite().all())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_list_of_modules_that_are_kept_in_float32(
    dtype: torch.dtype,
    strict: bool,
    load: Load,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "_keep_in_fp32_modules_strict" if strict else "_keep_in_fp32_modules"
    monkeypatch.setattr(LlamaForCausalLM, key, ["norm", "q_proj"])
    # Without "strict" it is for float16 only.
    kept = torch.float32 if strict or dtype == torch.float16 else dtype
    model = load(folder, dtype=dtype)
    for name, parameter in model.named_parameters():
        named = "norm" in name or "q_proj" in name
        assert parameter.dtype == (kept if named else dtype), name
    query = model.model.layers[0].self_attn.q_proj.weight
    assert isinstance(query, AffineQuantizedTensor)
    stored = load_file(folder / ONE)
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(model.get_parameter(name), stored[name].to(kept))


# ---- a load is a transaction -----------------------------------------------------


def truncate(folder: Path) -> None:
    (folder / ONE).write_bytes((folder / ONE).read_bytes()[:-100])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / ONE)
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / ONE)
    no_index_of_one(folder)


def overflow(folder: Path) -> None:
    tensors = load_file(folder / ONE)
    tensors["model.norm.weight"][3] = 1e38  # which float16 does not have
    save_file(tensors, folder / ONE)


def lose_a_shard(folder: Path) -> None:
    write_index(folder, write_shards(folder, 3))
    (folder / shard(3, 3)).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "it is truncated"),
        (lose_a_tensor, r"model\.layers\.1\.mlp\.up_proj\.scales is missing"),
        (overflow, r"model\.norm\.weight holds 1e\+38, which float16 cannot express"),
        (lose_a_shard, r"lacks model-00003-of-00003\.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failed_load_changes_nothing(
    damage: Callable[[Path], None], message: str, folder: Path
) -> None:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: id(value) for name, value in model.named_parameters()}
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint_(model, folder)
    assert {name: id(value) for name, value in model.named_parameters()} == places
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_file_that_shrinks_while_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_plan = loading.make_plan

    def then_truncate(*args: Any) -> Any:
        plan = make_plan(*args)
        truncate(folder)
        return plan

    monkeypatch.setattr(loading, "make_plan", then_truncate)
    with pytest.raises(CheckpointError, match="it is truncated, or changed while"):
        load_checkpoint_(model, folder)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("damage", [truncate, lose_a_tensor, overflow, lose_a_shard])
def test_a_failed_load_says_why_through_transformers(
    damage: Callable[[Path], None], load: Load, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError):
        load(folder, dtype=torch.float16)
    assert torch.get_default_dtype() == torch.float32
