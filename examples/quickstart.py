"""An MLX checkpoint speaks in a stock PyTorch model; a dense one is quantized alike.

    python examples/quickstart.py

Uses the small model of the Python standard library that lies beside this file, once as
mlx-lm's own converter wrote it at 4 bits, once dense.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import affine_tensor
from affine_tensor import AffineConfig, AffineQuantizedTensor

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "stdlib-6m-4bit"
DENSE = HERE / "stdlib-6m"
PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """'


def main() -> None:
    torch.manual_seed(0)
    model = affine_tensor.from_pretrained(CHECKPOINT)
    layer = model.model.layers[0].mlp.up_proj
    print(f"{type(model).__name__}, whose {type(layer).__name__} layers hold")
    print(f"{layer.weight}\n")
    print(affine_tensor.footprint(model), "\n")

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    model.generate(
        **prompt,
        streamer=TextStreamer(tokenizer),
        max_new_tokens=80,
        do_sample=True,
        temperature=0.7,
    )

    twin = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.bfloat16).eval()
    affine_tensor.quantize_(twin, AffineConfig(bits=4, group_size=64))
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    packed = [pair for pair in pairs if isinstance(pair[0], AffineQuantizedTensor)]
    same = sum(bool(torch.equal(theirs, ours)) for theirs, ours in packed)
    with torch.no_grad():
        difference = (model(**prompt).logits - twin(**prompt).logits).abs().max()
    print(
        f"\n\nquantize_ on the dense twin: {same} of {len(packed)} packed weights have "
        f"the codes, scales and biases that mlx-lm wrote; the logits differ by at most "
        f"{float(difference):g}"
    )
    if same != len(packed) or difference != 0:
        raise SystemExit("they should agree")


if __name__ == "__main__":
    main()
