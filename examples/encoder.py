"""A small vision transformer learns digits that this script draws, and is quantized.

    python examples/encoder.py

Prints how many unseen digits each width of codes reads right, what the weights take and
how far the answers are from the dense ones; then saves and loads one.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import affine_tensor
from affine_tensor import AffineConfig

SIZE = 24
# Five columns of seven rows for each digit.
DIGITS = """
.###. ..#.. .###. ####. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# ....# ..##. #.... #.... ....# #...# #...#
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. .###. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... ....# ...#. #...# #...# ..#.. #...# ....#
.###. .###. ##### ####. ...#. .###. .###. ..#.. .###. .###.
"""


def glyphs() -> Tensor:
    """The ten digits, ``[10, 1, 7, 5]``."""
    rows = [line.split() for line in DIGITS.split("\n") if line]
    drawn = [[[c == "#" for c in row[digit]] for row in rows] for digit in range(10)]
    return torch.tensor(drawn, dtype=torch.float32).unsqueeze(1)


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits turned, sheared, scaled and moved, in noise: ``[count, 1, 24, 24]``, labels.

    Each image also has a stroke across it that belongs to no digit.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    labels = torch.randint(10, (count,), generator=generator)
    turn, shear = uniform(-0.3, 0.3), uniform(-0.3, 0.3)
    width, height = uniform(1.2, 1.9), uniform(1.0, 1.4)
    cos, sin = turn.cos(), turn.sin()
    places = torch.stack(
        [
            torch.stack([width * cos, width * (shear - sin), uniform(-0.3, 0.3)], -1),
            torch.stack([height * sin, height * cos, uniform(-0.2, 0.2)], -1),
        ],
        1,
    )
    grid = F.affine_grid(places, [count, 1, SIZE, SIZE], align_corners=False)
    images = F.grid_sample(glyphs()[labels], grid, align_corners=False)
    axis = torch.linspace(-1, 1, SIZE)
    angle, shift = uniform(0, 3.14159), uniform(-0.7, 0.7)
    across = (
        angle.cos()[:, None, None] * axis[None, None, :]
        + angle.sin()[:, None, None] * axis[None, :, None]
        - shift[:, None, None]
    )
    stroke = (across.abs() < 0.05).float().unsqueeze(1)
    noise = 0.3 * torch.randn(images.shape, generator=generator)
    return torch.maximum(images, 0.8 * stroke) + noise, labels


def vision_transformer() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=SIZE,
        patch_size=6,
        num_channels=1,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def train(model: nn.Module, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        images, labels = draw(64, generator)
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"step {step:4}  loss {loss.item():.2f}  {seconds:.0f} s", flush=True)


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(pixel_values=part).logits for part in images.split(250)])


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """A copy at `bits`, whose answers, `classifier`, stay dense."""
    copied = copy.deepcopy(model)
    affine_tensor.quantize_(
        copied,
        AffineConfig(bits=bits, group_size=64),
        lambda module, name: name != "classifier",
        progress=False,
    )
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument(
        "--images", type=int, default=2000, help="to be read at the end"
    )
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = vision_transformer()
    train(model, options.steps, generator)
    model.eval()

    images, labels = draw(options.images, torch.Generator().manual_seed(1))
    dense = logits_of(model, images)
    print("\n         read right       MB   distance of the answers")

    def show(name: str, own: nn.Module) -> None:
        logits = logits_of(own, images)
        right = (logits.argmax(-1) == labels).float().mean().item()
        distance = ((logits - dense).norm() / dense.norm()).item()
        size = affine_tensor.footprint(own).bytes / 1e6
        print(f"{name:8} {right:9.1%} {size:9.2f}   {distance:.3f}")

    show("dense", model)
    for bits in (8, 6, 4, 3, 2):
        show(f"{bits} bits", quantized(model, bits))

    packed = quantized(model, 4)
    with tempfile.TemporaryDirectory() as folder:
        affine_tensor.save_checkpoint(packed, Path(folder) / "digits")
        again = affine_tensor.from_pretrained(Path(folder) / "digits")
    same = logits_of(again, images).equal(logits_of(packed, images))
    print(f"\nsaved and loaded: {type(again).__name__}, the same bits: {same}")


if __name__ == "__main__":
    main()
