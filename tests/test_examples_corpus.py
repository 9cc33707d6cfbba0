"""The model in examples/: what it was trained on, how it is judged, what ships."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from affine_tensor import layout

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DENSE, SHIPPED = EXAMPLES / "stdlib-6m", EXAMPLES / "stdlib-6m-4bit"


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def _write_library(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")


def test_held_out_modules_and_their_tests_are_not_learnt(tmp_path):
    corpus_of = importlib.import_module("stdlib_corpus")
    aside = corpus_of.HELD_OUT + corpus_of.VALIDATION
    _write_library(tmp_path, [f"{name}.py" for name in aside if name != "json"])
    _write_library(
        tmp_path,
        [
            "json/decoder.py",
            "test/test_json/test_dump.py",
            "test/test_heapq.py",
            "test/test_csv_more.py",
            "site-packages/thing.py",
            "pydoc_data/topics.py",
            "asyncio/queues.py",
            "test/test_asyncio/test_queues.py",
        ],
    )
    (tmp_path / "copy.py").write_text("# asyncio/queues.py\n")  # the same text again
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    corpus = corpus_of.load_corpus(tmp_path)
    learnt = [source.name for source in corpus.train]
    assert learnt == ["asyncio/queues.py", "test/test_asyncio/test_queues.py"]
    assert [s.name for s in corpus.validation] == sorted(
        f"{name}.py" for name in corpus_of.VALIDATION
    )
    assert len(corpus.held_out) == len(corpus_of.HELD_OUT)

    archive = tmp_path / "corpus.zip"
    archive.write_bytes(corpus_of.archive(corpus))
    assert corpus_of.load_corpus(archive) == corpus

    (tmp_path / "heapq.py").unlink()
    with pytest.raises(FileNotFoundError, match="heapq"):
        corpus_of.load_corpus(tmp_path)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", True),
        ("x = (1,\n", True),  # the end comes inside a bracket,
        ('def f():\n    """a\n', True),  # or a docstring,
        ("x = 1 + \\\n", True),  # or a statement
        ("x = 1\ny = 'a", True),  # the last line is unfinished
        ("x = 'a\ny = 1\n", False),
        ("x = (1]\ny\n", False),
        ("x = 1)\n", False),
        ("if x:\n        y\n    z\n", False),
        ("a $ b\n", False),
    ],
)
def test_what_counts_as_tokenizing(text, right):
    score = importlib.import_module("stdlib_score")
    assert score.tokenizes(text) is right


class _EvenOdds(nn.Module):
    """A language model that finds all of `vocab_size` tokens equally likely."""

    device = torch.device("cpu")

    def __init__(self, context, vocab_size):
        super().__init__()
        self.config = Qwen3Config(max_position_embeddings=context)
        self.vocab_size = vocab_size

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        return type("Output", (), {"logits": logits})


class _Bytes:
    eos_token_id = 256

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return list(text.encode())


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64])
def test_every_token_is_counted_once(length):
    score = importlib.import_module("stdlib_score")
    source = score.Source("a.py", "x" * length)
    bits = score.bits_per_byte(_EvenOdds(8, 512), _Bytes(), [source, source])
    assert bits == pytest.approx(9)  # log2(512) for each byte, none free, none twice


def test_training_rounds_weights_as_quantize_does():
    train = importlib.import_module("train_stdlib")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with train.rounded(model):
        for name, weight in model.named_parameters():
            expected = before[name]
            if weight.ndim == 2:
                parts = layout.quantize(expected, bits=4, group_size=64)
                expected = layout.dequantize(*parts, bits=4, group_size=64)
                assert not torch.equal(weight, before[name])
            torch.testing.assert_close(weight.data, expected, rtol=1e-6, atol=1e-7)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


def test_the_shipped_checkpoint_is_small_and_its_twin_at_4_bits():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    settings = json.loads((SHIPPED / "config.json").read_text())["quantization"]
    assert (settings["bits"], settings["group_size"]) == (4, 64)
    dense = load_file(DENSE / "model.safetensors")
    packed = load_file(SHIPPED / "model.safetensors")
    for name, weight in dense.items():
        if weight.ndim == 1:
            assert torch.equal(packed[name], weight)
            continue
        parts = layout.quantize(weight, bits=4, group_size=64)
        base = name.removesuffix("weight")
        for part, kind in zip(parts, ("weight", "scales", "biases"), strict=True):
            assert torch.equal(packed[base + kind], part), name


def test_the_tokenizer_gives_any_text_back():
    text = "\tdef f(é):\r\n\n\n        return '你好'  \n" + Path(__file__).read_text()
    for folder in (DENSE, SHIPPED):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        # No token of its own, and none across an indentation.
        assert tokenizer.encode("if x:\n    ") == tokenizer.encode("if x:\n    y")[:-1]
        assert tokenizer.eos_token_id == 0
        assert 0 not in ids


def test_the_table_goes_between_the_markers(tmp_path):
    evaluate = importlib.import_module("evaluate_stdlib")
    readme = tmp_path / "README.md"
    begin, end = evaluate.MARKERS
    readme.write_text(f"a\n{begin}\nold\n{end}\nb\n")
    evaluate.write_between_markers(readme, "new \\1")
    assert readme.read_text() == f"a\n{begin}\nnew \\1\n{end}\nb\n"
    readme.write_text("no markers\n")
    with pytest.raises(ValueError, match="markers"):
        evaluate.write_between_markers(readme, "new")
    assert readme.read_text() == "no markers\n"
