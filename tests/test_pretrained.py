"""from_pretrained: a stock transformers model, whole or an error.

Logits of all architectures are compared in test_architectures.py and test_save.py, texts
in test_generation.py.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, Case, _write_dense_checkpoint, write_mlx_checkpoint
from hub_server import HubServer, use_hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
)

from affine_tensor import (
    AffineQuantizationConfig,
    AffineQuantizedTensor,
    CheckpointError,
    from_pretrained,
    save_checkpoint,
)
from affine_tensor.checkpoint.files import StoredTensor
from affine_tensor.hf.quantizer import current

pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoints")

LLAMA = Case("llama", {"tie_word_embeddings": False})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mlx_checkpoint(LLAMA, tmp_path / "mlx")
    return tmp_path / "mlx"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


# ---- the model is the stock one --------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_but_the_packed_weights_is_as_transformers_makes_it(
    case: Case, tmp_path: Path
) -> None:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {case.model_type}")
    _write_dense_checkpoint(case, tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.bfloat16
    )
    write_mlx_checkpoint(case, tmp_path / "mlx", dtype="bfloat16")
    model = from_pretrained(tmp_path / "mlx", dtype=torch.bfloat16)

    assert type(model) is type(stock)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in stock.named_modules()
    ]
    assert not any(module.training for module in model.modules())
    # Rotary frequencies and the like are in no file: they are computed.
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(stock.named_buffers()).keys()
    for name, want in stock.named_buffers():
        assert buffers[name].dtype == want.dtype, name
        assert torch.equal(buffers[name], want), name
    parameters = dict(model.named_parameters())
    assert parameters.keys() == dict(stock.named_parameters()).keys()
    for name, want in stock.named_parameters():
        got = parameters[name]
        assert (got.dtype, got.shape, got.device) == (
            want.dtype,
            want.shape,
            want.device,
        )
        if not isinstance(got, AffineQuantizedTensor):
            assert torch.equal(got, want), name
            assert got.requires_grad == want.requires_grad, name


def test_the_configuration(folder: Path) -> None:
    model = from_pretrained(folder)
    assert model.config._name_or_path == model.name_or_path == str(folder)
    assert not hasattr(model.config, "quantization")
    assert isinstance(model.config.quantization_config, AffineQuantizationConfig)
    assert model.config.dtype == model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    changed = from_pretrained(folder, attn_implementation="eager", use_cache=False)
    assert changed.config._attn_implementation == "eager"
    assert changed.config.use_cache is False


def test_keywords_that_nothing_knows_are_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"atn_implementation.*LlamaConfig"):
        from_pretrained(folder, atn_implementation="eager")
    (folder / "part").mkdir()
    shutil.copy(folder / "config.json", folder / "part")
    with pytest.raises(TypeError, match=r"subfolder is not taken: .* one folder"):
        from_pretrained(folder, subfolder="part")
    for name in ("force_download", "proxies", "gguf_file"):
        with pytest.raises(TypeError, match=f"{name} is not taken: "):
            from_pretrained(folder, **{name: "x"})


def test_the_dtype(folder: Path) -> None:
    assert from_pretrained(folder).dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16"):
        model = from_pretrained(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.lm_head.weight.scales.dtype == torch.float32  # the file's
        assert model.config.dtype == torch.bfloat16
        assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    edit_json(folder / "config.json", dtype="float16", torch_dtype="float16")
    assert from_pretrained(folder).dtype == torch.float16
    assert from_pretrained(folder, dtype="auto").dtype == torch.float16
    assert from_pretrained(folder, dtype=None).dtype == torch.float16
    for dtype in (torch.float64, "float64", "torch.float64"):
        assert from_pretrained(folder, dtype=dtype).dtype == torch.float64


@pytest.mark.parametrize(
    ("dtype", "error"),
    [
        ("int7", ValueError),
        ("int8", ValueError),
        ("half", ValueError),
        ("", ValueError),
        (torch.int8, ValueError),
        (torch.float8_e5m2, ValueError),
        (16, TypeError),
        ({"": "float16"}, TypeError),
    ],
    ids=str,
)
def test_dtypes_that_are_refused(dtype: Any, error: type, folder: Path) -> None:
    with pytest.raises(error) as caught:
        from_pretrained(folder, dtype=dtype)
    assert str(caught.value) == (
        f"dtype is {dtype!r}; allowed are float32, float16, bfloat16, float64 and 'auto'"
    )


def test_the_generation_configuration(folder: Path) -> None:
    assert from_pretrained(folder).generation_config.eos_token_id == 2
    edit_json(folder / "generation_config.json", eos_token_id=[2, 9], top_k=7)
    generation = from_pretrained(folder).generation_config
    assert generation.eos_token_id == [2, 9]
    assert generation.top_k == 7


def test_classes_of_models(folder: Path) -> None:
    assert (
        type(from_pretrained(folder, model_class=LlamaForCausalLM)) is LlamaForCausalLM
    )
    body = from_pretrained(folder, model_class=AutoModel)  # whose names lack "model."
    want = load_file(folder / "model.safetensors")["model.embed_tokens.scales"]
    assert torch.equal(body.embed_tokens.weight.scales, want)
    with pytest.raises(
        ValueError, match="AutoModelForImageTextToText has no model for"
    ):
        from_pretrained(folder, model_class=AutoModelForImageTextToText)


def test_devices(folder: Path) -> None:
    for device in ("cpu", torch.device("cpu")):
        model = from_pretrained(folder, device_map=device)
        tensors = [*model.parameters(), *model.buffers()]
        assert {t.device.type for t in tensors} == {"cpu"}
    model = from_pretrained(folder, device_map="meta")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert isinstance(model.lm_head.weight, AffineQuantizedTensor)
    for whole in ("auto", "balanced", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        assert devices(from_pretrained(folder, device_map=whole)) == {"cpu"}


# ---- nothing is missing ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_missing_tensors_raise(kind: str, folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    stem = "model.layers.1."
    stem += "mlp.up_proj." if kind == "packed" else "input_layernorm."
    kept = {n: t for n, t in tensors.items() if not n.startswith(stem)}
    assert len(tensors) - len(kept) == (3 if kind == "packed" else 1)
    save_file(kept, file)
    with pytest.raises(CheckpointError, match=rf"1 missing:\n  {stem}weight\n"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 256},
        {"vocab_size": 257},
        {"num_hidden_layers": 3},
        {"head_dim": 64},
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_the_shapes(
    changes: dict[str, int], folder: Path
) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        from_pretrained(folder)


class BrokenClass(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        raise RuntimeError("no such model")


def test_a_failure_leaves_torch_as_it_was(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        from_pretrained(folder, model_class=BrokenClass, dtype="bfloat16")
    assert not nn.Linear(2, 2).weight.is_meta
    assert torch.get_default_dtype() == torch.float32
    assert current.get() is None


class WaitingClass(LlamaForCausalLM):
    """A Llama that stays in the build until it is told to go on."""

    inside = threading.Event()
    go_on = threading.Event()

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inside.set()
        assert self.go_on.wait(60)


def test_other_threads_make_real_parameters_meanwhile(folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(from_pretrained, folder, model_class=WaitingClass)
        try:
            assert WaitingClass.inside.wait(60)
            assert not nn.Linear(2, 2).weight.is_meta
            second = pool.submit(from_pretrained, folder, dtype="bfloat16")
            assert not wait([second], timeout=1).done  # its turn comes
        finally:
            WaitingClass.go_on.set()
        models = [first.result(60), second.result(60)]
    assert [model.dtype for model in models] == [torch.float32, torch.bfloat16]
    assert torch.get_default_dtype() == torch.float32


def test_threads_that_load_at_once(folder: Path) -> None:
    ids = torch.tensor([[1, 17, 42]])
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32] * 3
    with torch.no_grad():
        want = {d: from_pretrained(folder, dtype=d)(ids).logits for d in set(dtypes)}
        with ThreadPoolExecutor(4) as pool:
            models = list(pool.map(lambda d: from_pretrained(folder, dtype=d), dtypes))
        for dtype, model in zip(dtypes, models, strict=True):
            assert {p.dtype for p in model.parameters()} == {dtype}
            assert not any(p.is_meta for p in model.parameters())
            assert torch.equal(model(ids).logits, want[dtype])
    assert not nn.Linear(2, 2).weight.is_meta
    assert torch.get_default_dtype() == torch.float32


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
        from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="'nothing' is neither a folder"):
        from_pretrained("nothing")


# ---- text ------------------------------------------------------------------------


@pytest.mark.usefixtures("no_fallback")
def test_in_inference_mode(folder: Path) -> None:
    prompt = torch.tensor([[1, 17, 42]])
    want = from_pretrained(folder).generate(prompt, max_new_tokens=8, do_sample=False)
    with torch.inference_mode():
        inside = from_pretrained(folder)
        assert torch.equal(
            inside.generate(prompt, max_new_tokens=8, do_sample=False), want
        )
    # What was loaded inside works outside as well.
    with torch.no_grad():
        assert torch.equal(
            inside.generate(prompt, max_new_tokens=8, do_sample=False), want
        )


def test_the_log_says_what_was_loaded(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="affine_tensor"):
        from_pretrained(folder)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith(f"{folder}: ")
    assert "packed weights     16     4     64" in record.getMessage()


# ---- the Hub ---------------------------------------------------------------------


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    edit_json(folder / "generation_config.json", eos_token_id=[2, 9])
    (folder / "README.md").write_text("---\nlibrary_name: mlx\n---\n")
    repos = {"org/model": folder, "org/private": folder}
    with HubServer(repos, token="hf_good", private={"org/private"}) as server:
        use_hub(monkeypatch, server)
        yield server


def test_a_repository_of_the_hub(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_pretrained("org/model")
    assert model.config._name_or_path == model.name_or_path == "org/model"
    assert model.generation_config.eos_token_id == [2, 9]
    assert sorted(server.downloads) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        want = from_pretrained(folder)(ids).logits
        assert torch.equal(model(ids).logits, want)
    server.requests.clear()
    from_pretrained("org/model", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = from_pretrained("org/model")
    assert server.requests == []
    assert offline.config._name_or_path == "org/model"


def test_a_private_repository_by_revision_and_cache(
    server: HubServer, tmp_path: Path
) -> None:
    commit, _ = server.snapshot("org/private")
    model = from_pretrained(
        "org/private", token="hf_good", revision=commit, cache_dir=tmp_path / "cache"
    )
    assert model.config._name_or_path == "org/private"
    assert next((tmp_path / "cache").rglob("*.safetensors")).parent.name == commit
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_saved_model_takes_the_tokenizer_of_its_revision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    for name in (folder, older):
        (name / "tokenizer.json").write_text(json.dumps({"from": name.name}))
    with HubServer({"org/model": {"main": folder, "v1": older}}) as server:
        use_hub(monkeypatch, server)
        for revision, name in {"v1": "older", "main": "mlx"}.items():
            model = from_pretrained("org/model", revision=revision)
            report = save_checkpoint(model, tmp_path / revision)
            assert report.tokenizer
            tokenizer = (tmp_path / revision / "tokenizer.json").read_text()
            assert json.loads(tokenizer) == {"from": name}
        config = (tmp_path / "v1" / "config.json").read_text()
        assert server.snapshot("org/model", "v1")[0] not in config


# ---- devices ---------------------------------------------------------------------


def devices(model: nn.Module) -> set[str]:
    """Those of all parameters, their parts, and buffers."""
    found: list[Tensor] = [*model.buffers()]
    for value in model.parameters():
        found.append(value)
        if isinstance(value, AffineQuantizedTensor):
            found += [value.packed, value.scales, value.biases]
    return {tensor.device.type for tensor in found}


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_whole_on_the_cpu_on_the_way_to_a_device(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"tie_word_embeddings": tied, "num_hidden_layers": 6}
    write_mlx_checkpoint(Case("llama", changes), tmp_path)
    lock, read = threading.RLock(), StoredTensor.read
    alive: set[str] = set()
    seen: list[str] = []
    most = 0

    def counted(stored: StoredTensor) -> Tensor:
        """Into numpy's memory, which goes with the last view of the tensor."""
        nonlocal most
        memory = np.frombuffer(read(stored).view(-1).view(torch.uint8).numpy(), "u1")
        memory = memory.copy()

        def freed() -> None:
            with lock:
                alive.remove(stored.name)

        weakref.finalize(memory, freed)
        with lock:
            alive.add(stored.name)
            seen.append(stored.name)
            most = max(most, len(alive))
        return torch.from_numpy(memory).view(stored.dtype).view(stored.shape)

    monkeypatch.setattr(StoredTensor, "read", counted)
    model = from_pretrained(tmp_path, device_map="meta")
    tensors = load_file(tmp_path / "model.safetensors")
    assert sorted(seen) == sorted(tensors)
    assert not alive
    assert most <= 8 < len(tensors) / 10  # two for each of four threads
    assert devices(model) == {"meta"}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert dict(model.named_buffers())  # rotary frequencies, in no file


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_of_a_model_is_on_the_device(case: Case, tmp_path: Path) -> None:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {case.model_type}")
    write_mlx_checkpoint(case, tmp_path)
    model = from_pretrained(tmp_path, device_map="meta")
    assert devices(model) == {"meta"}
    assert any(isinstance(p, AffineQuantizedTensor) for p in model.parameters())


def test_a_head_that_only_a_default_ties(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "gemma"  # tied by default, and no key says otherwise
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    model = from_pretrained(folder)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    want = load_file(folder / "model.safetensors")["lm_head.scales"]
    assert torch.equal(model.lm_head.weight.scales, want)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="ties"):
        from_pretrained(folder)
