"""Make the README's table about the model in examples/: how well at how many bits.

    python examples/evaluate_stdlib.py            # print it
    python examples/evaluate_stdlib.py --write    # put it into the README

Bits per byte are those of all held-out files (see stdlib_corpus.py), every token
counted (see `bits_per_byte`). Completions: 100 beginnings of code from the same files,
each continued by 200 tokens sampled at temperature 0.7 (see `prompts`, `complete`,
`tokenizes`; the seed is fixed). Everything is computed in float32 from the weights in
bfloat16, which `quantize_` rounds and `dequantize_` gives back, so that the figures
are those of the format and a CPU takes minutes.
"""

import argparse
import lzma
import platform
import re
import time
from pathlib import Path

import torch
from stdlib_corpus import Corpus, load_corpus
from stdlib_score import bits_per_byte, complete, prompts, tokenizes
from transformers import AutoModelForCausalLM, AutoTokenizer

from affine_tensor import AffineConfig, dequantize_, footprint, quantize_

HERE = Path(__file__).resolve().parent
MARKERS = "<!-- stdlib-table:begin -->", "<!-- stdlib-table:end -->"
WIDTHS = (None, 8, 6, 4, 3, 2)  # None: dense
GROUP_SIZE = 64


def xz_rows(corpus: Corpus) -> list[tuple[str, str, str, str]]:
    """`xz -9` over the held-out files as one stream, alone and after all the training
    files (whose own bytes are not counted)."""
    held_out = b"".join(source.text.encode() for source in corpus.held_out)
    train = b"".join(source.text.encode() for source in corpus.train)
    alone = len(lzma.compress(held_out, preset=9))
    primed = len(lzma.compress(train + held_out, preset=9)) - len(
        lzma.compress(train, preset=9)
    )
    return [
        ("`xz -9`", f"{8 * alone / len(held_out):.3f}", "", ""),
        ("`xz -9`, primed", f"{8 * primed / len(held_out):.3f}", "", ""),
    ]


def model_row(
    folder: Path, bits: int | None, corpus: Corpus, beginnings: list[str]
) -> tuple[str, str, str, str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.requires_grad_(False)
    if bits is not None:
        quantize_(model, AffineConfig(bits=bits, group_size=GROUP_SIZE))
    size = footprint(model).bytes
    dequantize_(model, torch.float32)
    model.float()
    score = bits_per_byte(model, tokenizer, corpus.held_out)
    texts = complete(model, tokenizer, beginnings, tokens=200, temperature=0.7)
    right = sum(map(tokenizes, texts))
    return (
        "dense (bfloat16)" if bits is None else f"{bits} bits",
        f"{score:.3f}",
        f"{right} of {len(texts)}",
        f"{size / 1e6:.2f}",
    )


def caption(corpus: Corpus, count: int) -> str:
    size = sum(len(source.text.encode()) for source in corpus.held_out)
    return (
        f"{len(corpus.held_out)} held-out files of Python {platform.python_version()}, "
        f"{size:,} bytes, which `xz` codes as one stream (primed: after the training "
        f"files, not counting their bytes); {count} completions of 200 tokens."
    )


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def write_between_markers(path: Path, text: str) -> None:
    begin, end = MARKERS
    content = path.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    changed, count = pattern.subn(lambda _: f"{begin}\n{text}\n{end}", content)
    if count != 1:
        raise ValueError(
            f"{path} has the markers {begin} ... {end} {count} times; put them where "
            "the table belongs, once"
        )
    path.write_text(changed, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=HERE / "stdlib-6m", help="dense checkpoint")
    add("--stdlib", type=Path, help="folder or archive; default: this Python's own")
    add("--prompts", type=int, default=100)
    add("--readme", type=Path, default=HERE.parent / "README.md")
    add("--write", action="store_true", help="put the table into the README")
    options = parser.parse_args()
    corpus = load_corpus(options.stdlib)
    beginnings = prompts(corpus.held_out, options.prompts, seed=0)
    rows = [("", "bits per byte", "completions that tokenize", "weights, MB")]
    rows += xz_rows(corpus)
    for bits in WIDTHS:
        start = time.perf_counter()
        rows.append(model_row(options.model, bits, corpus, beginnings))
        print(*rows[-1], f"({time.perf_counter() - start:.0f} s)", flush=True)
    table = f"{as_markdown(rows)}\n\n{caption(corpus, len(beginnings))}"
    print(f"\n{table}")
    if options.write:
        write_between_markers(options.readme, table)


if __name__ == "__main__":
    main()
