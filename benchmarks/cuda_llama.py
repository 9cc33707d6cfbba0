"""A Llama of 8 billion random weights on the GPU, and who runs it.

It is made there and saved by `save_checkpoint`; all contestants load that one MLX
checkpoint. Each decodes by the same path: a static cache, and a CUDA graph of one step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_clock
import torch
from cpu_contestants import Missing, Weight
from cuda_contestants import tinygemm_operands, tinygemm_product
from peers_files import BITS, GROUP, Size, config_of
from torch import Tensor, nn

import affine_tensor
from affine_tensor import AffineConfig, AffineQuantizedTensor, quantize_

SIZES = {
    "8b": Size(32, 4096, 32, 8, 14336, 128256, prefills=(512, 4096)),
    # To see that it works.
    "tiny": Size(2, 128, 4, 2, 256, 512, prompt=8, new=4, prefills=(8, 16)),
}


def write(folder: Path, size: Size, kind: str) -> dict[str, float]:
    """Make the model on the device and save it there; seconds of each."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    times: dict[str, float] = {}
    with _timed(times, "made"), torch.device(kind):
        model = AutoModelForCausalLM.from_config(config_of(size), dtype=torch.bfloat16)
        cuda_clock.wait(kind)
    with _timed(times, "quantized"):
        quantize_(model, AffineConfig(BITS, GROUP), progress=False)
        cuda_clock.wait(kind)
    with _timed(times, "saved"):
        affine_tensor.save_checkpoint(model, folder, progress=False)
    return times


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    """The seconds of a block, put under a name."""
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start


# ---- contestants that are transformers models ------------------------------------


def ours(folder: Path, kind: str) -> Any:
    return affine_tensor.from_pretrained(folder, device_map=kind).eval()


def fused(folder: Path, kind: str) -> Any:
    if not hasattr(affine_tensor, "fuse_projections"):
        raise Missing("this affine_tensor has no fuse_projections")
    model = ours(folder, kind)
    affine_tensor.fuse_projections(model)
    return model


def dense(folder: Path, kind: str) -> Any:
    """Stock bfloat16, with the weights that the checkpoint stands for."""
    model = ours(folder, kind)
    affine_tensor.dequantize_(model, progress=False)
    return model


def tinygemm(folder: Path, kind: str) -> Any:
    """Every nn.Linear multiplies as torchao's tinygemm does, with the same codes."""
    model = ours(folder, kind)
    for name, module in _linears(model):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, TinyGemm(module))
    affine_tensor.dequantize_(model, progress=False)  # the embedding
    return model


class TinyGemm(nn.Module):
    """`_weight_int4pack_mm` in the place of a packed nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.words, self.scales = _operands(linear)
        self.group_size = GROUP
        self.product = tinygemm_product(self.words.device.type)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # it takes no others
        y = self.product(rows, self.words, self.group_size, self.scales)
        return y.view(*x.shape[:-1], -1)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    found = model.named_modules()
    return [(name, module) for name, module in found if isinstance(module, nn.Linear)]


def _operands(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Words and scales of tinygemm, of a packed nn.Linear."""
    weight = linear.weight
    if not isinstance(weight, AffineQuantizedTensor) or linear.bias is not None:
        raise Missing(f"{linear} is not packed, or has a bias")
    parts = (weight._packed, weight.scales, weight.biases)
    about = Weight(*weight.shape, weight.bits, weight.group_size, weight.dtype)
    return tinygemm_operands(about, parts)


def torchao(folder: Path, kind: str) -> Any:
    """Its `quantize_`, whose tensors then get the file's codes: all compute the same.

    Of its own it would have those of a weight that was quantized twice.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig
        from torchao.quantization import quantize_ as quantize
    except ImportError as error:
        raise Missing("not installed") from error
    if kind != "cuda":
        raise Missing("it has its tinygemm on NVIDIA GPUs only")
    model = ours(folder, kind)
    given = {name: _operands(linear) for name, linear in _linears(model)}
    affine_tensor.dequantize_(model, progress=False)
    packing = "tile_packed_to_4d"  # others need libraries that PyPI does not have
    quantize(model, Int4WeightOnlyConfig(GROUP, int4_packing_format=packing))
    for name, (words, scales) in given.items():
        own: Any = model.get_submodule(name).weight
        if own.qdata.shape != words.shape or own.scale_and_zero.shape != scales.shape:
            raise Missing(f"it pads {name}: {tuple(own.shape)}")
        own.qdata.copy_(words)
        own.scale_and_zero.copy_(scales)
    return model


LIMIT = 0.2  # relative L2 of logits; a wrong kernel is off by about 1.4


@dataclass(frozen=True)
class Entry:
    """Who takes part."""

    label: str
    load: Callable[[Path, str], Any]
    limit: float = LIMIT

    @property
    def ours(self) -> bool:
        return self.label.startswith("ours")


ENTRIES = {
    "ours": Entry("ours", ours),
    "ours-fused": Entry("ours, fused projections", fused),
    "transformers": Entry("transformers bf16", dense),
    "tinygemm": Entry("tinygemm", tinygemm),
    "torchao": Entry("torchao int4 (tinygemm)", torchao),
}


# ---- decoding -------------------------------------------------------------------


class Steps:
    """Greedy decoding of some sequences, one step of each in a CUDA graph.

    Everything is under `torch.inference_mode`; on a CPU steps are plain calls.
    """

    def __init__(self, model: Any, batch: int, longest: int, kind: str) -> None:
        from transformers import StaticCache

        self.model, self.kind = model, kind
        # Whole multiples of 64 are what kernels for attention like.
        self.cache = StaticCache(
            config=model.config, max_cache_len=-(-longest // 64) * 64
        )
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=kind)
        self.logits: Tensor | None = None  # [batch, vocabulary]
        self._block: cuda_clock.Block | None = None

    def read(self, ids: Tensor) -> None:
        """Take a prompt, ``[batch, length]``, in the place of all before."""
        self.cache.reset()
        self._take(ids)

    def step(self) -> None:
        """Take `ids`; they are then the next ones, and `logits` what these come from."""
        if self._block is None:
            self._warm_up()
            self._block = cuda_clock.block(self._once, 1, self.kind)
        self._block.replay()

    def _once(self) -> None:
        self._take(self.ids)

    def _take(self, ids: Tensor) -> None:
        made = self.model(
            ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        last = made.logits[:, -1]
        if self.logits is None:
            self.logits = torch.empty_like(last)
        self.logits.copy_(last)
        self.ids.copy_(last.argmax(-1, keepdim=True))

    def _warm_up(self) -> None:
        """One step outside the graph, which compiles what a step needs; then back."""
        kept = [self.ids.clone(), *(each.clone() for each in self._lengths())]
        self._once()
        for now, before in zip([self.ids, *self._lengths()], kept, strict=True):
            now.copy_(before)

    def _lengths(self) -> list[Tensor]:
        return [layer.cumulative_length for layer in self.cache.layers]


def prompt_of(size: Size, batch: int, length: int, kind: str) -> Tensor:
    """Another one for each second sequence, ``[batch, length]``."""
    own = [sequence(size, i % 2, length) for i in range(batch)]
    return torch.tensor(own, device=kind)


def sequence(size: Size, which: int, length: int) -> list[int]:
    return [(37 * i + 11 + 5 * which) % size.vocabulary for i in range(length)]


def shortened(size: Size, layers: int | None) -> Size:
    return size if layers is None else dataclasses.replace(size, layers=layers)


def checked_logits(
    steps: Steps, size: Size, batch: int, prompt: int, new: int
) -> Tensor:
    """Logits after a prompt, and after each of the tokens that follow: all are given.

    ``[batch, new, vocabulary]``, float32.
    """
    ids = prompt_of(size, batch, prompt + new, steps.kind)
    steps.read(ids[:, :prompt])
    found = [_copy(steps.logits)]
    for place in range(prompt, prompt + new - 1):
        steps.ids.copy_(ids[:, place : place + 1])
        steps.step()
        found.append(_copy(steps.logits))
    return torch.stack(found, 1)


def _copy(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits.float().clone()


def error_of(logits: Tensor, expected: Sequence[Tensor]) -> float:
    """The worst relative L2 of a position; sequences take turns in what is expected."""
    worst = []
    for i, own in enumerate(logits):
        exact = expected[i % len(expected)].to(own.device)
        distance = (own.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        worst.append(float(distance.max()))
    # Not a number counts as more than any.
    return max(worst, key=lambda error: (error != error, error))
