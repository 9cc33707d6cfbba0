"""Contestants that are transformers models: ours, torchao's and the dense one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peers_files import GROUP
from transformers import CompileConfig, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer
from workers import Run


class _Clock(BaseStreamer):
    """Notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Dense:
    """Stock `generate`, greedy: with its own dynamic cache, or compiled.

    Compiled, decoding runs the graph that `generate` itself makes of `forward` where the
    cache is static. On a CPU it does so only if told to, by an attribute that
    transformers keeps to itself. Prompts are not compiled there. Once a length has been
    run, torch is told that its guards hold (`torch.compiler.set_stance`).
    """

    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, threads: int, longest: int, compiled: bool = False) -> None:
        torch.set_num_threads(threads)
        self.compile = None
        self.lengths: set[int] = set()  # of caches that there are graphs for
        if compiled:
            self.compile = CompileConfig(mode="default", dynamic=False)
            self.compile._compile_all_devices = True

    def load(self, path: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.model = model.eval()

    def run(self, ids: list[int], new: int, *, keep_logits: bool = False) -> Run:
        prompt, clock = torch.tensor([ids]), _Clock()
        options: dict[str, Any] = {}
        if self.compile is not None:
            # What cache_implementation="static" makes, but never longer than this run
            # needs: that one grows with the longest run and is compiled again.
            cache = StaticCache(config=self.model.config, max_cache_len=len(ids) + new)
            options = {"past_key_values": cache, "compile_config": self.compile}
        known = len(ids) + new in self.lengths
        self.lengths.add(len(ids) + new)
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=known):
            made = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new,
                do_sample=False,
                streamer=clock,
                return_dict_in_generate=True,
                output_logits=keep_logits,
                **options,
            )
        tokens = made.sequences[0, len(ids) :].tolist()
        logits = torch.cat(made.logits).float().numpy() if keep_logits else None
        return Run(tokens, clock.times[1:], logits)  # the first is the prompt's


class Ours(Dense):
    """The MLX checkpoint, packed."""

    def __init__(self, threads: int, longest: int, compiled: bool = False) -> None:
        super().__init__(threads, longest, compiled)
        import affine_tensor

        self.from_pretrained = affine_tensor.from_pretrained
        self.packages = ("affine-tensor", *self.packages)

    def load(self, path: Path) -> None:
        # torch's own is slow for one query in bfloat16: see hf.attention
        attention = "sdpa_float32"
        model = self.from_pretrained(path, attn_implementation=attention)
        self.model = model.eval()


class TorchAO(Dense):
    """int4 weights in the layout of torch's own CPU kernel, quantized when loaded.

    torchao's `Int4WeightOnlyConfig` has no packing for a CPU; this prototype has. Its
    other kernel, with int8 activations, is not in the published packages.
    """

    packages = ("torchao", *Dense.packages)

    def __init__(self, threads: int, longest: int, compiled: bool = False) -> None:
        super().__init__(threads, longest, compiled)
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        self.config = PrototypeInt4WeightOnlyConfig(group_size=GROUP)
        self.quantize = quantize_

    def load(self, path: Path) -> None:
        super().load(path)
        self.quantize(self.model, self.config)
