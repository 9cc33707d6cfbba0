"""Train a small language model on the source of Python's standard library.

    python examples/train_stdlib.py --out examples/stdlib-6m

A byte-level BPE tokenizer and a stock Qwen3 model of 6.3 million parameters, small
enough that its 4-bit checkpoint stays under 4 MB. The last part of the training sees
the weights as 4 bits will round them, so that rounding costs little afterwards.
Takes minutes on a GPU; on a CPU use it with small numbers, to see that it runs.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from stdlib_corpus import Source, load_corpus
from stdlib_score import bits_per_byte
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

DOCUMENT_START = "<|endoftext|>"

# A line break and a line's indentation are tokens of their own, never joined with what
# follows, so that a prompt may end after either. Then words (with the one sign or space
# before them), numbers, signs, and what space is left.
PIECES = r"\n|(?<![^\n]) +|[^\w\n]?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+| +(?= )|\s"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. It adds no tokens of its own and gives any text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_START,
        eos_token=DOCUMENT_START,
        pad_token=DOCUMENT_START,
        clean_up_tokenization_spaces=False,
    )


def build_model(options: argparse.Namespace, vocab_size: int) -> Qwen3ForCausalLM:
    """Every weight's last dimension is a multiple of 256, so all group sizes fit."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=max(1, options.hidden_size // 128),
        head_dim=64,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def round_groups(groups: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """[n, group_size] values as affine quantization gives them back, by MLX's rule:
    the scale spans minimum to maximum; zero and the end further from it stay exact."""
    levels = 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    low_is_edge = low.abs() > high.abs()
    edge = torch.where(low_is_edge, low, high)
    scale = ((high - low) / levels).clamp(min=1e-7)
    scale = torch.where(low_is_edge, scale, -scale)
    steps = torch.round(edge / scale)  # from zero to the edge
    scale = torch.where(steps == 0, scale, edge / steps)
    edge = torch.where(steps == 0, 0.0, edge)
    codes = torch.round((groups - edge) / scale).clamp(0, levels)
    return codes * scale + edge


@contextmanager
def rounded(model: nn.Module, group_size: int = 64) -> Iterator[None]:
    """Within, each matrix is what 4 bits leave of it; afterwards, what it was before.

    A step that takes its gradients within and moves the weights afterwards learns
    weights that round well (the straight-through estimator).
    """
    matrices = [p.data for p in model.parameters() if p.ndim == 2]
    kept = [matrix.clone() for matrix in matrices]
    groups = torch.cat([matrix.view(-1, group_size) for matrix in matrices])
    sizes = [matrix.numel() // group_size for matrix in matrices]
    for matrix, part in zip(matrices, round_groups(groups).split(sizes), strict=True):
        matrix.copy_(part.view_as(matrix))
    try:
        yield
    finally:
        for matrix, before in zip(matrices, kept, strict=True):
            matrix.copy_(before)


def add_dropout(model: nn.Module, rate: float) -> None:
    """Dropout on what each layer adds to the residual stream; stock Qwen3 has none."""

    def drop(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(drop)


class Batches:
    """Windows of the documents, in a new order each epoch, on one device."""

    def __init__(self, documents: list[torch.Tensor], options: argparse.Namespace):
        self.documents = documents
        self.options = options
        self.generator = torch.Generator().manual_seed(options.seed)
        self.windows = torch.empty(0, 0)
        self.next = 0

    def __next__(self) -> torch.Tensor:
        """[batch, context + 1] token ids."""
        batch = self.options.batch
        if self.next + batch > len(self.windows):
            self._shuffle()
        self.next += batch
        return self.windows[self.next - batch : self.next]

    def _shuffle(self) -> None:
        order = torch.randperm(len(self.documents), generator=self.generator)
        stream = torch.cat([self.documents[i] for i in order])
        length = self.options.context
        first = int(torch.randint(length, (), generator=self.generator))
        windows = stream[first:].unfold(0, length + 1, length)
        shuffled = torch.randperm(len(windows), generator=self.generator)
        self.windows = windows[shuffled].to(self.options.device)
        self.next = 0


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """A short rise, then half a cosine down to nothing, as a fraction of the peak."""
    warmup = min(200, options.steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, options.steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(
    model: nn.Module, options: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    embedding = [p for name, p in named if p.ndim == 2 and "embed" in name]
    norms = [p for _, p in named if p.ndim < 2]
    lr, decay = options.learning_rate, options.weight_decay
    return [
        torch.optim.Muon(
            matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": embedding, "weight_decay": decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=lr,
            betas=(0.9, 0.95),
        ),
    ]


def train(
    model: Qwen3ForCausalLM,
    batches: Batches,
    options: argparse.Namespace,
    validate: Callable[[], float],
) -> None:
    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    on_gpu = options.device == "cuda"
    step_loss = torch.compile(loss_of) if on_gpu else loss_of
    optimizers = make_optimizers(model, options)
    rounded_from = round(options.steps * (1 - options.rounded))
    start = time.perf_counter()
    for step in range(options.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * learning_rate(step, options)
        ids = next(batches)
        with rounded(model) if step >= rounded_from else nullcontext():
            loss = step_loss(ids)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % options.report == 0 or step == options.steps - 1:
            print(
                f"step {step}  loss {loss.item():.4f}  validation "
                f"{validate():.4f} bits/byte  {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the dense checkpoint")
    add("--stdlib", type=Path, help="folder or archive; default: this Python's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--vocab-size", type=int, default=3072)
    add("--hidden-size", type=int, default=256)
    add("--layers", type=int, default=7)
    add("--context", type=int, default=2048)
    add("--epochs", type=float, default=18)
    add("--steps", type=int, help="instead of --epochs")
    add("--batch", type=int, default=16, help="windows of --context tokens in a step")
    add("--learning-rate", type=float, default=3e-3)
    add("--weight-decay", type=float, default=1.0)
    add("--dropout", type=float, default=0.1)
    add("--rounded", type=float, default=0.15, help="share of steps seen at 4 bits")
    add("--report", type=int, default=500, help="steps between reports")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    corpus = load_corpus(options.stdlib)
    tokenizer = train_tokenizer([s.text for s in corpus.train], options.vocab_size)

    def encode(source: Source) -> torch.Tensor:
        ids = tokenizer.encode(source.text)
        return torch.tensor([tokenizer.eos_token_id, *ids])

    documents = [encode(source) for source in corpus.train]
    tokens = sum(len(document) for document in documents)
    if options.steps is None:
        options.steps = int(options.epochs * tokens / options.batch / options.context)
    model = build_model(options, len(tokenizer)).to(options.device)
    print(f"{model.num_parameters()} parameters, {tokens} tokens, {options}")
    add_dropout(model, options.dropout)

    def validate() -> float:
        model.eval()
        with torch.autocast(options.device, torch.bfloat16):
            score = bits_per_byte(model, tokenizer, corpus.validation)
        model.train()
        return score

    train(model, Batches(documents, options), options, validate)
    with rounded(model):
        print(f"at 4 bits: validation {validate():.4f} bits/byte")
    print(f"dense: validation {validate():.4f} bits/byte")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
