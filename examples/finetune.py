"""Teach the small packed model a house style: docstrings in capital letters.

    python examples/finetune.py [--out folder] [--steps 40]

LoRA through PEFT beside 4-bit weights, on one CPU core in a minute and a half. The
examples to learn from are functions of the Python that runs this, their docstrings in
capitals; completions before and after are of modules that the model never saw. The
adapter is saved, merged at 8 bits, saved as an MLX checkpoint, and that is loaded again.
"""

import argparse
import ast
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from stdlib_corpus import Source, load_corpus
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from affine_tensor import (
    AffineConfig,
    footprint,
    from_pretrained,
    merge_to_dense,
    prepare_for_lora,
    save_checkpoint,
)

CHECKPOINT = Path(__file__).resolve().parent / "stdlib-6m-4bit"
TOKENS = 160  # of an example
BATCH = 8
QUOTES = '"""'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the adapter and the model there")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=12, help="to complete each time")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    corpus = load_corpus()
    asked = prompts(corpus.held_out, options.prompts)

    base = from_pretrained(CHECKPOINT)
    print(f"before: {capitals(base, tokenizer, asked):.0%} of the letters are capital")
    print(complete(base, tokenizer, asked[:1])[0], "\n")

    prepare_for_lora(base, gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = footprint(base.model).bits_per_weight
    print(f"{trained:,} weights are trained, beside others of {packed:.1f} bits")
    train(model, examples(corpus.train, tokenizer), options.steps)

    print(
        f"\nafter: {capitals(model, tokenizer, asked):.0%} of the letters are capital"
    )
    print(complete(model, tokenizer, asked[:1])[0], "\n")
    with tempfile.TemporaryDirectory() as scratch:
        save(model, tokenizer, asked, options.out or Path(scratch))


# ---- what to learn, and from what ------------------------------------------------


def functions(sources: Sequence[Source]) -> Iterator[tuple[str, str, str]]:
    """Functions with a docstring in triple quotes: what is before it, it, what follows."""
    for source in sources:
        try:
            tree = ast.parse(source.text)
        except SyntaxError:  # some tests hold what is no Python
            continue
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            code = ast.get_source_segment(source.text, node) or ""
            before, _, rest = code.partition(QUOTES)
            docstring, end, after = rest.partition(QUOTES)
            if end and before.rstrip().endswith(":") and docstring.isascii():
                yield before, docstring, after


def examples(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of functions with their docstrings in capitals."""
    found = []
    for before, docstring, after in functions(sources):
        text = before + QUOTES + docstring.upper() + QUOTES + after
        ids = tokenizer.encode(text)
        if len(ids) >= TOKENS // 2:
            found.append(ids[:TOKENS])
    return found


def prompts(sources: Sequence[Source], count: int) -> list[str]:
    """Functions up to the quotes that open their docstring, of modules never seen."""
    found = [before + QUOTES for before, _, _ in functions(sources) if len(before) < 80]
    return random.Random(1).sample(found, min(count, len(found)))


# ---- learning --------------------------------------------------------------------


def train(model: PeftModel, data: list[list[int]], steps: int) -> None:
    """A plain loop. A shorter example is filled up, with labels that do not count."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    draw = random.Random(0)
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batch = draw.sample(data, BATCH)
        ids, labels = (
            torch.zeros(BATCH, TOKENS).long(),
            torch.full((BATCH, TOKENS), -100),
        )
        for i, own in enumerate(batch):
            ids[i, : len(own)] = labels[i, : len(own)] = torch.tensor(own)
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == 1 or step % 10 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step:3}  loss {loss:.2f}  {seconds:.0f} s", flush=True)
    model.eval()


# ---- completions -----------------------------------------------------------------


def complete(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> list[str]:
    """The texts with 60 more tokens, greedily."""
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        found.append(tokenizer.decode(made[0]))
    return found


def capitals(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> float:
    """The part of capitals among the letters of the docstrings that are written."""
    made = complete(model, tokenizer, texts)
    letters = [
        letter
        for text, whole in zip(texts, made, strict=True)
        for letter in whole[len(text) :].partition(QUOTES)[0]
        if letter.isalpha()
    ]
    return sum(map(str.isupper, letters)) / max(1, len(letters))


# ---- files -----------------------------------------------------------------------


def save(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[str],
    folder: Path,
) -> None:
    """The adapter, as PEFT saves it, and the merged model, as mlx-lm reads it."""
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(from_pretrained(CHECKPOINT), folder / "adapter")
    adapted = capitals(again, tokenizer, asked)
    merged, _ = merge_to_dense(model, requantize=AffineConfig(bits=8))  # logs the loss
    save_checkpoint(merged, folder / "mlx", tokenizer=tokenizer, overwrite=True)
    again = from_pretrained(folder / "mlx")
    whole = capitals(again, tokenizer, asked)
    print(f"loaded again: {adapted:.0%} with the adapter, {whole:.0%} merged at 8 bits")
    for own in ("adapter", "mlx"):
        size = sum(path.stat().st_size for path in (folder / own).iterdir())
        print(f"  {own}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
