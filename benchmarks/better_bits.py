"""Bits per byte of the model in examples/ by size: plain, calibrated, mixed.

    python benchmarks/better_bits.py            # all held-out files: an hour of CPU
    python benchmarks/better_bits.py --held-out-bytes 60000 --bits 3

Rows at one width have the same size but for mlx-lm's recipes, which have their own.
Calibration and the choice of bits see the training files only, as `stdlib_corpus.py`
splits them; the figures are of held-out files (all, or the first bytes of each). All is
computed in float32 from the packed weights, as in examples/evaluate_stdlib.py. Results
are written after each row.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import machine
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from affine_tensor import (
    AffineConfig,
    calibrate_,
    choose_bits,
    dequantize_,
    footprint,
    quantize_,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from stdlib_corpus import Corpus, Source, load_corpus  # noqa: E402
from stdlib_score import bits_per_byte  # noqa: E402

MODEL = ROOT / "examples" / "stdlib-6m"
RESULTS = ROOT / "benchmarks" / "results" / "better_bits"
GROUP_SIZE = 64
MLX_RECIPES = {2: ("mixed_2_6",), 3: ("mixed_3_4", "mixed_3_6"), 4: ("mixed_4_6",)}


@dataclass
class Row:
    name: str
    bits: int | None
    megabytes: float
    bits_per_byte: float
    won_back: float | None  # of plain rounding's loss at this width
    seconds: float  # for quantizing


def training_texts(corpus: Corpus, size: int, seed: int = 0) -> list[str]:
    """Beginnings of training files drawn at random, tests left out, `size` characters."""
    sources = [source.text for source in corpus.train if not source.is_test]
    random.Random(seed).shuffle(sources)
    texts: list[str] = []
    for text in sources:
        if size <= 0:
            break
        texts.append(text[: min(20_000, size)])
        size -= len(texts[-1])
    return texts


def held_out(corpus: Corpus, size: int | None) -> list[Source]:
    """The held-out files, or the beginning of each, `size` bytes in all."""
    if size is None:
        return corpus.held_out
    share = size // len(corpus.held_out)
    return [replace(source, text=source.text[:share]) for source in corpus.held_out]


def mlx_recipe(model: Any, name: str) -> Callable[[nn.Module, str], AffineConfig]:
    """mlx-lm's own choice, by its own code."""
    from mlx_lm.convert import mixed_quant_predicate_builder

    seen = SimpleNamespace(named_modules=model.named_modules, layers=model.model.layers)
    choose = mixed_quant_predicate_builder(name, seen, GROUP_SIZE)

    def answer(module: nn.Module, name: str) -> AffineConfig:
        # A tied head is no module of mlx-lm's: the embedding's choice counts.
        name = "model.embed_tokens" if name == "lm_head" else name
        found = choose(name, module)
        return AffineConfig(found["bits"], found["group_size"])

    return answer


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        corpus = load_corpus()
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.texts = training_texts(corpus, options.text)
        self.sources = held_out(corpus, options.held_out_bytes)
        self.rows: list[Row] = []
        self.calibration = {
            "tokenizer": self.tokenizer,
            "length": options.length,
            "compute_dtype": torch.float32,
            "progress": False,
        }

    def row(
        self, name: str, bits: int | None, how: Callable[[Any], Any] | None
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
        model.requires_grad_(False)
        start = time.perf_counter()
        if how:
            how(model)
        seconds = time.perf_counter() - start
        size = footprint(model).bytes / 1e6
        dequantize_(model, torch.float32)
        score = bits_per_byte(model.float(), self.tokenizer, self.sources)
        self.rows.append(
            Row(name, bits, size, score, self._won_back(bits, score), seconds)
        )
        self.write()
        print(as_markdown([self.rows[-1]]).splitlines()[-1], flush=True)

    def _won_back(self, bits: int | None, score: float) -> float | None:
        plain = [row for row in self.rows if row.bits == bits and row.name == "plain"]
        if bits is None or not plain:
            return None
        lost = plain[0].bits_per_byte - self.rows[0].bits_per_byte
        return (plain[0].bits_per_byte - score) / lost if lost > 0 else None

    def at(self, bits: int) -> None:
        options, config = self.options, AffineConfig(bits, GROUP_SIZE)

        def calibrate(steps: int = 0, recipe: Any = None) -> Callable[[Any], Any]:
            return lambda model: calibrate_(
                model,
                self.texts,
                config,
                recipe,
                tune_steps=steps,
                learning_rate=options.learning_rate,
                **self.calibration,
            )

        self.row("plain", bits, lambda model: quantize_(model, config, progress=False))
        self.row("calibrated", bits, calibrate())
        if options.tune:
            self.row("calibrated and tuned", bits, calibrate(options.tune))
        recipe = choose_bits(
            AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16),
            self.texts,
            bits_per_weight=bits + 0.5,
            group_size=GROUP_SIZE,
            widths=options.widths,
            batches=1,
            **self.calibration,
        )
        print(recipe)
        self.row(
            "mixed by sensitivity", bits, lambda model: quantize_(model, None, recipe)
        )
        self.row("mixed and calibrated", bits, calibrate(0, recipe))
        if options.tune:
            self.row("mixed, calibrated, tuned", bits, calibrate(options.tune, recipe))
        for name in MLX_RECIPES.get(bits, ()):
            self.row(
                f"mlx-lm {name}",
                bits,
                lambda model, name=name: quantize_(
                    model, None, mlx_recipe(model, name)
                ),
            )

    def write(self) -> None:
        size = sum(len(source.text.encode()) for source in self.sources)
        settings = {k: v for k, v in vars(self.options).items() if k != "out"}
        found = {
            "machine": machine(),
            "settings": settings,
            "held_out_bytes": size,
            "rows": [asdict(row) for row in self.rows],
        }
        self.options.out.parent.mkdir(exist_ok=True)
        self.options.out.with_suffix(".json").write_text(
            json.dumps(found, indent=2) + "\n"
        )
        note = (
            f"{size:,} bytes of {len(self.sources)} held-out files; calibrated on "
            f"{sum(map(len, self.texts)):,} characters of training files, "
            f"{self.options.tune} steps of tuning; {machine()}."
        )
        text = f"{as_markdown(self.rows)}\n\n{note}\n"
        self.options.out.with_suffix(".md").write_text(text)


def as_markdown(rows: list[Row]) -> str:
    lines = [
        "| bits | how | bits per byte | of the loss won back | weights, MB | seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        won = (
            "" if row.won_back is None or row.name == "plain" else f"{row.won_back:.0%}"
        )
        bits = "16" if row.bits is None else str(row.bits)
        lines.append(
            f"| {bits} | {row.name} | {row.bits_per_byte:.3f} | {won} | "
            f"{row.megabytes:.2f} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--bits", type=int, nargs="+", default=[3, 2, 4])
    add("--widths", type=int, nargs="+", default=[2, 3, 4, 6])
    add("--text", type=int, default=200_000, help="characters to calibrate on")
    add("--length", type=int, default=1024, help="tokens in a window")
    add("--tune", type=int, default=0, help="steps; 0 leaves it out")
    add("--learning-rate", type=float, default=1e-2)
    add("--held-out-bytes", type=int, help="judge on so many only")
    add("--out", type=Path, default=RESULTS, help="without suffix")
    bench = Bench(parser.parse_args())
    bench.row("dense", None, None)
    for bits in bench.options.bits:
        bench.at(bits)


if __name__ == "__main__":
    main()
