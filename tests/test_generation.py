"""Text from packed weights: greedy tokens are those of mlx-lm, and all that transformers
has around `generate` works as with dense weights. No weight is dequantized meanwhile.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases_experts
import cases_latent
import cases_other
import cases_recurrent
import pytest
import torch
from architectures import CASES, TOLERANCE, Case, write_mlx_checkpoint
from safetensors.torch import load_file, save_file
from test_compile import needs_compiler
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
    trainer_utils,
)

from affine_tensor import AffineQuantizedTensor, dequantize_, from_pretrained, register

pytest.importorskip("mlx_lm", reason="mlx-lm writes the checkpoints")

pytestmark = pytest.mark.usefixtures("no_fallback")


def case_of(model_type: str, cases: list[Case]) -> Case:
    return next(case for case in cases if case.model_type == model_type)


LLAMA = Case("llama", {"tie_word_embeddings": False})
SMALLER = Case("llama", {"tie_word_embeddings": False, "num_hidden_layers": 1}, bits=8)
GEMMA3 = case_of("gemma3_text", CASES)  # with a window of 16 tokens
QWEN3_MOE = case_of("qwen3_moe", cases_experts.CASES)
GPT_OSS = case_of("gpt_oss", cases_other.CASES)
MAMBA2 = case_of("mamba2", cases_recurrent.CASES)
# What these keep of the tokens before is of other kinds than in the dense decoders.
OTHER_CACHES = [
    QWEN3_MOE,
    GPT_OSS,
    MAMBA2,
    case_of("deepseek_v3", cases_latent.CASES),
    case_of("qwen3_next", cases_recurrent.CASES),
]

# Random models of these say one token over and over, unless their embeddings matter less
# (or more) beside what the layers add.
EMBEDDINGS = {
    "gemma": 0.125,
    "gemma2": 0.0625,
    "gemma3_text": 0.0625,
    "gemma4_text": 0.125,
    "gpt_bigcode": 0.125,
    "olmo2": 16.0,
    "olmo3": 16.0,
}

PROMPT = [1, 17, 42, 5, 99]


def write(case: Case, folder: Path) -> Path:
    """The checkpoint of mlx-lm, a talkative one."""
    write_mlx_checkpoint(case, folder)
    factor = EMBEDDINGS.get(case.model_type)
    if factor is not None:
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            own = "embed" in name or "wte" in name
            if own and name.endswith((".scales", ".biases")):
                tensor *= factor  # a power of two: exact
        save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def load(folder: Path, **options: Any) -> Any:
    """A model that speaks on, whatever it says."""
    model = from_pretrained(folder, **options)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def made(case: Case, folder: Path, **options: Any) -> Any:
    return load(write(case, folder), **options)


def greedy(model: Any, ids: Any = PROMPT, count: int = 24, **options: Any) -> list[int]:
    """The new tokens of one prompt."""
    ids = torch.tensor([ids])
    options = {"max_new_tokens": count, "do_sample": False, **options}
    found: list[int] = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    return found


def by_mlx_lm(folder: Path, count: int) -> tuple[list[int], Tensor]:
    """Its greedy tokens and their log probabilities."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    steps = list(generate_step(mx.array(PROMPT), model, max_tokens=count))
    logs = [np.array(log.astype(mx.float32)) for _, log in steps]
    return [int(token) for token, _ in steps], torch.from_numpy(np.stack(logs))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def registered() -> Iterator[None]:
    before = PreTrainedModel.__dict__["from_pretrained"]
    register()
    yield
    PreTrainedModel.from_pretrained = before


# ---- greedy ----------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *OTHER_CACHES], ids=str)
def test_greedy_text_is_that_of_mlx_lm(case: Case, tmp_path: Path) -> None:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {case.model_type}")
    # transformers' other attention soft-caps Gemma 2's logits in its later versions only.
    eager = {"attn_implementation": "eager"} if case.model_type == "gemma2" else {}
    model = made(case, tmp_path, **eager)
    want, want_logs = by_mlx_lm(tmp_path, 64)
    out = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=64,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences[0].tolist() == PROMPT + want
    assert len(want) == 64
    assert len(set(want)) > 8  # not one token over and over
    logs = torch.cat(out.logits).double().log_softmax(-1)
    errors = (logs - want_logs).norm(dim=-1) / want_logs.norm(dim=-1)
    assert errors.max() < TOLERANCE


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_greedy_text_in_other_dtypes(name: str, llama: Any, tmp_path: Path) -> None:
    """Each token is the likeliest, up to the rounding of the dtype."""
    dtype = getattr(torch, name)
    out = made(LLAMA, tmp_path, dtype=dtype).generate(
        torch.tensor([PROMPT]),
        max_new_tokens=24,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits)
    with torch.no_grad():
        exact = llama(out.sequences).logits[0, len(PROMPT) - 1 : -1]
    error = (logits - exact).norm() / exact.norm()
    assert error < 8 * max(torch.finfo(dtype).eps, 1e-6)
    if dtype == torch.float64:
        assert out.sequences[0, len(PROMPT) :].tolist() == greedy(llama)


# ---- caches and batches ----------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, GEMMA3, QWEN3_MOE], ids=str)
def test_a_static_cache(case: Case, tmp_path: Path) -> None:
    model = made(case, tmp_path)
    want = greedy(model)
    assert greedy(model, cache_implementation="static") == want
    assert greedy(model, use_cache=False) == want


def test_a_prompt_in_chunks(llama: Any) -> None:
    prompt = PROMPT * 5
    assert greedy(llama, prompt, prefill_chunk_size=4) == greedy(llama, prompt)


def test_a_conversation_goes_on_with_its_cache(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    first = PROMPT + greedy(llama, past_key_values=cache)
    assert cache.get_seq_length() == len(first) - 1
    second = [*first, 7, 8, 9]
    assert greedy(llama, second, past_key_values=cache) == greedy(llama, second)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", [LLAMA, GEMMA3, QWEN3_MOE, MAMBA2], ids=str)
def test_a_padded_batch_says_what_each_says_alone(
    case: Case, cache: str, tmp_path: Path
) -> None:
    if (case, cache) == (MAMBA2, "static"):
        pytest.skip("it has no keys and values")
    model = made(case, tmp_path)
    prompts = [PROMPT, [7, 8], [3, 1, 4, 1, 5, 9, 2, 6, 53, 58, 97]]
    alone = [greedy(model, prompt) for prompt in prompts]
    stop = alone[0][5]
    alone = [[*row[: row.index(stop)], stop] if stop in row else row for row in alone]
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    rows = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=stop,
        cache_implementation=cache,
    )
    for row, want in zip(rows[:, longest:].tolist(), alone, strict=True):
        assert row == want + [0] * (len(row) - len(want))
    assert len({len(want) for want in alone}) > 1


def test_continuous_batching(llama: Any) -> None:
    prompts = [PROMPT, [7, 8], [3, 1, 4, 1, 5, 9, 2, 6, 53, 58, 97]]
    options = GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # By itself it takes nine tenths of the memory.
    sizes = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    rows = copy.deepcopy(llama).generate_batch(
        prompts, generation_config=options, continuous_batching_config=sizes
    )
    found = {tuple(row.prompt_ids): row.generated_tokens for row in rows.values()}
    assert found == {tuple(p): greedy(llama, p, count=8) for p in prompts}


# ---- torch.compile ---------------------------------------------------------------


def counting(backend: str, graphs: list[Any]) -> Callable[..., Any]:
    """A backend that also says what it was given."""
    inner = lookup_backend(backend)

    def compiled(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return inner(graph, inputs)

    return compiled


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (LLAMA, "aot_eager"),
        (QWEN3_MOE, "aot_eager"),
        pytest.param(SMALLER, "inductor", marks=needs_compiler),
    ],
    ids=str,
)
def test_generate_compiles_its_steps(case: Case, backend: str, tmp_path: Path) -> None:
    """As it does by itself on a GPU, with a static cache."""
    model = made(case, tmp_path)
    want = greedy(model)
    assert model.hf_quantizer.is_compileable
    graphs: list[Any] = []
    own = counting(backend, graphs)
    config = CompileConfig(fullgraph=True, backend=own, mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    # Without vectors inductor's C++ compiles in half the time.
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        found = greedy(model, cache_implementation="static", compile_config=config)
    assert found == want
    assert len(graphs) == 1


def test_a_compiled_forward(tmp_path: Path) -> None:
    model = made(LLAMA, tmp_path)
    want = greedy(model)
    graphs: list[Any] = []
    torch.compiler.reset()
    model.forward = torch.compile(
        model.forward, fullgraph=True, backend=counting("aot_eager", graphs)
    )
    assert greedy(model, cache_implementation="static") == want
    assert len(graphs) == 2  # one for the prompt, one for all other tokens


# ---- drafts ----------------------------------------------------------------------


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the model gets from now on."""
    calls: list[int] = []
    forward = model.forward

    def call(input_ids: Tensor, **options: Any) -> Any:
        calls.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", call)
    return calls


def test_an_assistant_drafts(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = greedy(llama)
    assert greedy(llama, assistant_model=made(SMALLER, tmp_path)) == want
    twin = copy.deepcopy(llama)  # whose drafts are all right
    twin.generation_config.assistant_confidence_threshold = 0.0
    calls = counted(llama, monkeypatch)
    assert greedy(llama, assistant_model=twin) == want
    assert len(calls) < 6


def test_the_prompt_drafts(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = greedy(llama)
    prompt = [*PROMPT, *want[:12], *PROMPT]
    again = greedy(llama, prompt)
    calls = counted(llama, monkeypatch)
    assert greedy(llama, prompt, prompt_lookup_num_tokens=3) == again
    assert max(calls[1:]) > 1


# ---- other ways to choose --------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled": {"do_sample": True, "top_k": 50, "top_p": 0.95, "temperature": 0.8},
    "sampled-thrice": {"do_sample": True, "min_p": 0.01, "num_return_sequences": 3},
    "sampled-beams": {"do_sample": True, "num_beams": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "guided": {"guidance_scale": 1.5},
    "static": {"do_sample": True, "cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_are_those_of_dense_weights(way: str, llama: Any) -> None:
    dense = copy.deepcopy(llama)
    dequantize_(dense)
    options = {"max_new_tokens": 16, "do_sample": False, **WAYS[way]}
    ids = torch.tensor([PROMPT, [3, 1, 4, 1, 59]])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = llama.generate(ids, **options)
        torch.manual_seed(3)
        want = dense.generate(ids, **options)
    assert torch.equal(found, want)
    assert len(set(found[0].tolist())) > 8


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=str)
def test_experts_of_all_implementations(case: Case, tmp_path: Path) -> None:
    want, _ = by_mlx_lm(write(case, tmp_path), 24)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = load(tmp_path, experts_implementation=implementation)
        assert model.config._experts_implementation == implementation
        assert greedy(model) == want, implementation


# ---- text ------------------------------------------------------------------------

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "<s> {% for message in messages %}<|{{ message.role }}|> {{ message.content }} "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "w100 w101"},
    {"role": "user", "content": "w20 w30 w40 w50"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer, whose words are w7 to w255, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(SPECIAL)}
    words |= {f"w{i}": i for i in range(len(words), 256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    write(LLAMA, tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def said_by_mlx_lm(folder: Path, prompt: Any, count: int) -> str:
    from mlx_lm import generate
    from mlx_lm import load as mlx_load

    model, tokenizer = mlx_load(str(folder))
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    return generate(model, tokenizer, prompt, max_tokens=count)


def test_the_pipeline_completes_text(folder: Path, registered: None) -> None:
    speak = pipeline("text-generation", model=str(folder))
    assert isinstance(speak.model.lm_head.weight, AffineQuantizedTensor)
    texts = ["w17 w42 w9 w99", "w200 w7"]
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    found = [speak(text, **options)[0]["generated_text"] for text in texts]
    want = [said_by_mlx_lm(folder, text, 12) for text in texts]
    assert [text.strip() for text in found] == [text.strip() for text in want]
    batch = speak(texts, batch_size=2, **options)
    assert [one[0]["generated_text"] for one in batch] == found
    (whole,) = speak(texts[0], max_new_tokens=12, do_sample=False)
    assert whole["generated_text"] == texts[0] + found[0]


def test_the_pipeline_chats(folder: Path, registered: None) -> None:
    speak = pipeline("text-generation", model=str(folder), device_map="auto")
    (found,) = speak(CHAT, max_new_tokens=12, do_sample=False)
    *before, answer = found["generated_text"]
    assert before == CHAT
    assert answer["role"] == "assistant"
    want = said_by_mlx_lm(folder, CHAT, 12)
    assert answer["content"].strip() == want.strip()
    assert len(want.split()) > 8


def test_a_pipeline_with_an_assistant(
    folder: Path, tmp_path: Path, registered: None
) -> None:
    write(SMALLER, tmp_path / "smaller")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "smaller" / file.name).write_bytes(file.read_bytes())
    options = {"max_new_tokens": 12, "do_sample": False}
    alone = pipeline("text-generation", model=str(folder))
    two = pipeline(
        "text-generation", model=str(folder), assistant_model=str(tmp_path / "smaller")
    )
    assert isinstance(two.assistant_model.lm_head.weight, AffineQuantizedTensor)
    assert two("w17 w42 w9", **options) == alone("w17 w42 w9", **options)


def test_words_come_one_by_one(folder: Path) -> None:
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert inputs.input_ids[0, [0, 1, 4, -1]].tolist() == [1, 4, 5, 6]
    options = {**inputs, "max_new_tokens": 12, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={**options, "streamer": streamer}
    )
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join(60)
    tokens = model.generate(**options)[0, inputs.input_ids.shape[1] :]
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert len(pieces) > 8


# ---- devices and training --------------------------------------------------------


def test_a_model_with_hooks_on_its_modules(llama: Any) -> None:
    """Those of a device map with several devices."""
    accelerate = pytest.importorskip("accelerate")
    want = greedy(llama)
    places = {"model": "cpu", "lm_head": "cpu"}
    model = copy.deepcopy(llama)
    accelerate.dispatch_model(model, places, force_hooks=True)
    assert greedy(model) == want
    # Weights wait on the CPU, and are fetched by each module for its call.
    model = accelerate.cpu_offload(copy.deepcopy(llama), torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    assert greedy(model) == want


def test_gradients_reach_the_inputs(llama: Any) -> None:
    dense = copy.deepcopy(llama)
    dequantize_(dense)
    gradients = []
    for model in (llama, dense):
        with torch.no_grad():
            x = model.get_input_embeddings()(torch.tensor([PROMPT]))
        x.requires_grad_()
        loss = model(inputs_embeds=x, labels=torch.tensor([PROMPT])).loss
        gradients += torch.autograd.grad(loss, x)
    assert gradients[1].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_guard_of_the_trainer(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = getattr(trainer_utils, "validate_quantization_for_training", None)
    if guard is None:
        pytest.skip("this transformers has it elsewhere")
    assert llama.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="attach trainable adapters"):
        guard(llama)
    monkeypatch.setattr(llama, "_hf_peft_config_loaded", True, raising=False)
    guard(llama)


@pytest.mark.parametrize("way", ["wrapped", "added"])
def test_the_trainer_trains_adapters(way: str, llama: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft makes the adapters")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0
    )
    model, ids = copy.deepcopy(llama), torch.tensor([PROMPT])
    if way == "wrapped":
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        learning_rate=1e-2,
        use_cpu=True,
        gradient_checkpointing=way == "added",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"input_ids": ids[0], "labels": ids[0]}] * 8
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 4
    model.eval()
    model.save_pretrained(tmp_path / "adapter")

    again = copy.deepcopy(llama)  # training has changed no weight of the model itself
    if way == "wrapped":
        again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    else:
        again.load_adapter(str(tmp_path / "adapter"))
    again.eval()
    assert greedy(again) == greedy(model) != greedy(llama)
