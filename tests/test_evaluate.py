"""`score`: against float64 sums of one's own, and against mlx-lm's perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from affine_tensor import evaluate

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DENSE = EXAMPLES / "stdlib-6m"
TEXTS = [
    (EXAMPLES / "quickstart.py").read_text()[:700],
    "import heapq\n",
    "# é, ü and 語\nx = 1\n",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DENSE)


def losses(model: Any, ids: list[int]) -> list[float]:
    """In nats, of each id after the first, from logits that become float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    chosen = torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]
    return [-value for value in chosen.tolist()]


def one_by_one(model: Any, ids: list[int], context: int, stride: int) -> float:
    """Each token by itself, from the beginning of the window that it belongs to."""
    total = 0.0
    for place in range(1, len(ids)):
        start = 0
        while place > start + context:
            start += stride
        total += losses(model, ids[start : place + 1])[-1]
    return total


@pytest.mark.parametrize(("context", "stride"), [(16, 5), (16, 16), (7, 1), (64, None)])
def test_each_token_once_in_its_first_window(
    model: Any, tokenizer: Any, context: int, stride: int | None
) -> None:
    texts = [TEXTS[0][:120], *TEXTS[1:]]
    settings = {"context": context, "stride": stride, "batch_size": 3}
    found = evaluate.score(model, tokenizer, texts, **settings)
    ids = [[tokenizer.eos_token_id, *tokenizer.encode(text)] for text in texts]
    nats = sum(one_by_one(model, own, context, stride or 48) for own in ids)
    count, size = sum(map(len, ids)) - len(ids), len("".join(texts).encode())
    assert (found.tokens, found.bytes, found.unknown) == (count, size, 0)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    same = (evaluate.bits_per_byte, evaluate.perplexity)
    assert [f(model, tokenizer, texts, **settings) for f in same] == [
        found.bits_per_byte,
        found.perplexity,
    ]


def test_by_default_a_text_that_fits_is_one_window(model: Any, tokenizer: Any) -> None:
    ids = [tokenizer.eos_token_id, *tokenizer.encode(TEXTS[0])]
    found = evaluate.score(model, tokenizer, TEXTS[:1])
    assert found.nats == pytest.approx(math.fsum(losses(model, ids)), rel=1e-5)


def test_mlx_lm_finds_the_same_perplexity(
    model: Any, tokenizer: Any, capsys: pytest.CaptureFixture
) -> None:
    reason = "mlx-lm is the oracle"
    mx = pytest.importorskip("mlx.core", reason=reason)
    theirs = pytest.importorskip("mlx_lm.perplexity", reason=reason)
    from mlx_lm.utils import load_model

    context, text = 64, TEXTS[0]
    # Windows of mlx-lm's are all of one length.
    while len(tokenizer.encode(text)) % context:
        text = text[:-1]
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
    assert len(ids) > 2 * context
    rows = [ids[i : i + context + 1] for i in range(0, len(ids) - 1, context)]
    other, _ = load_model(DENSE)
    other.set_dtype(mx.float32)
    expected, _ = theirs.eval_ppl(other, mx.array(rows), batch_size=2)
    capsys.readouterr()
    ours = evaluate.perplexity(
        model, tokenizer, [text], context=context, stride=context
    )
    assert ours == pytest.approx(expected, rel=1e-3)


def test_special_tokens_that_a_tokenizer_adds_do_not_count(tokenizer: Any) -> None:
    class Adding:
        bos_token_id, eos_token_id, unk_token_id = 7, 0, 9

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            ids = [9 if c == "?" else 5 for c in text]
            return [7, *ids] if add_special_tokens else ids

    seen: list[list[int]] = []
    even = Even(10, seen)
    found = evaluate.score(even, Adding(), ["a?c"])
    assert (found.tokens, found.bytes, found.unknown) == (3, 3, 1)
    assert seen == [[7, 5, 9]]
    assert found.perplexity == pytest.approx(10)


class Even(nn.Module):
    """All of its tokens are equally likely; notes what it is asked."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int, seen: list[list[int]], value: float = 0.0):
        super().__init__()
        self.config = Qwen3Config(vocab_size=vocabulary)
        self.seen, self.value = seen, value

    def forward(self, input_ids: Any, use_cache: bool) -> Any:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.seen += input_ids.tolist()
        logits = torch.full((*input_ids.shape, self.config.vocab_size), self.value)
        return type("Output", (), {"logits": logits})


def test_the_model_is_left_in_its_mode(tokenizer: Any) -> None:
    even = Even(3072, []).train()
    evaluate.score(even, tokenizer, ["x = 1\n"])
    assert even.training


def test_batches_stay_small_where_the_vocabulary_is_large(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Sized(Even):
        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            sizes.append(len(input_ids))
            return super().forward(input_ids, use_cache)

    monkeypatch.setattr(evaluate, "_LOGITS", 3072 * 9 * 2)
    text = "x = 1\n" * 40
    evaluate.score(Sized(3072, []), tokenizer, [text], context=8)
    assert max(sizes) == 2
    sizes.clear()
    monkeypatch.setattr(evaluate, "_LOGITS", 1)
    evaluate.score(Sized(3072, []), tokenizer, [text], context=8)
    assert max(sizes) == 1


def test_what_is_refused(model: Any, tokenizer: Any) -> None:
    def refused(*texts: Any, **settings: Any) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            evaluate.score(model, tokenizer, list(texts), **settings)
        return str(caught.value)

    assert "the texts are empty" in refused("", "")
    assert "the texts are empty" in refused()
    assert "context is 4096; allowed is 1 to 2048" in refused("x", context=4096)
    assert "context is 0" in refused("x", context=0)
    assert "stride is 9; allowed is 1 to 8" in refused("x", context=8, stride=9)
    assert "stride is 0" in refused("x", stride=0)
    assert "batch_size is 0" in refused("x", batch_size=0)
    with pytest.raises(TypeError, match="put a single one into a list"):
        evaluate.score(model, tokenizer, "x")
    with pytest.raises(ValueError, match="the tokenizer is another model's"):
        evaluate.score(Even(4, []), tokenizer, ["x = 1"])
    with pytest.raises(ValueError, match="logits are not finite"):
        evaluate.score(Even(3072, [], math.nan), tokenizer, ["x = 1"])

    class Bare:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1]

    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        evaluate.score(model, Bare(), ["x"])
