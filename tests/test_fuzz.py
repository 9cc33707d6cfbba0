"""A few hundred cases of `fuzz_checkpoints.py`, and what it has found."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from fuzz_bases import DATA, ONE, Shard, peer_bases
from fuzz_checkpoints import FAILED, fuzz, told
from safetensors.torch import load_file, save_file
from torch import nn

from affine_tensor import (
    AffineConfig,
    CheckpointError,
    load_checkpoint_,
    quantize_,
    save_checkpoint,
)
from affine_tensor.checkpoint.files import read_header

SEED = 10


def test_harmed_checkpoints_come_out_right_or_are_refused() -> None:
    pytest.importorskip("mlx_lm", reason="mlx makes the checkpoints that are harmed")
    results = fuzz(SEED, 300, jobs=2)
    wrong = [told(SEED, one) for one in results if one["outcome"] == FAILED]
    assert not wrong, "\n".join(wrong)
    counts = Counter(one["outcome"] for one in results)
    assert counts["right"] + counts["refused"] == 300
    assert min(counts["right"], counts["refused"]) > 50


ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (f'{{"a":{ENTRY},"a":{ENTRY}}}', "'a' is in it twice"),
        (f'{{"a":{ENTRY[:-1]},"dtype":"I32"}}}}', "'dtype' is in it twice"),
        (f'{{"\\ud800":{ENTRY}}}', "surrogates not allowed"),
        (f'{{"a":{ENTRY[:-1]},"strides":[1]}}}}', "safetensors has no strides"),
        (f'{{"a":{ENTRY},"__metadata__":{{"a":NaN}}}}', "NaN is no number"),
    ],
)
def test_headers_that_readers_take_differently(
    header: str, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / ONE
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(CheckpointError, match=reason):
        read_header(file)


def test_a_gptq_module_with_a_dense_weight_too(tmp_path: Path) -> None:
    (base,) = (b for b in peer_bases() if b.name == "gptq_w3_g64_asym_desc")
    (name,) = base.modules
    source = DATA / "gptq" / base.name
    tensors = load_file(source / ONE)
    tensors[f"{name}.weight"] = torch.zeros(base.modules[name][1])
    save_file(tensors, tmp_path / ONE)
    (tmp_path / "config.json").write_text(json.dumps(base.config))
    with pytest.raises(CheckpointError, match="there are both"):
        load_checkpoint_(base.model(), tmp_path)


@pytest.mark.parametrize(
    ("case", "end"),
    [
        ("awqgm_gemm_w8_g64_asym", "scales"),
        ("ct_w8_chan_asym", "weight_scale"),
        ("gptq_w2_g32_asym", "scales"),
    ],
)
def test_scales_whose_biases_are_infinite(case: str, end: str, tmp_path: Path) -> None:
    (base,) = (b for b in peer_bases() if b.name == case)
    name = next(n for n, (kind, _) in base.modules.items() if kind == "plain")
    tensors = load_file(next(DATA.glob(f"*/{case}")) / ONE)
    scales = tensors[f"{name}.{end}"]
    tensors[f"{name}.{end}"] = torch.full_like(scales, 3e38, dtype=torch.float32)
    save_file(tensors, tmp_path / ONE)
    (tmp_path / "config.json").write_text(json.dumps(base.config))
    with pytest.raises(CheckpointError, match="float32 cannot express"):
        load_checkpoint_(base.model(), tmp_path)


def test_stacked_experts_do_not_tell_how_kernels_lie(tmp_path: Path) -> None:
    """Found by `test_properties.py`: the square kernel was loaded transposed."""
    tree = nn.Sequential(nn.Embedding(4, 32), nn.Conv1d(5, 3, 5))
    tree.experts = nn.Parameter(torch.randn(2, 3, 32))
    want = tree[1].weight.detach().clone()
    quantize_(tree, AffineConfig(bits=4, group_size=32))
    save_checkpoint(tree, tmp_path / "saved")
    with torch.no_grad():
        tree[1].weight.zero_()
    load_checkpoint_(tree, tmp_path / "saved")
    assert torch.equal(tree[1].weight, want)


def test_bases_are_what_they_were_cut_from() -> None:
    content = (DATA / "gptq" / "gptq_w2_g32_asym" / ONE).read_bytes()
    shard = Shard.parse(content)
    names = {name for name, _ in shard.entries if name != "__metadata__"}
    assert Shard.parse(shard.content()).entries == shard.entries
    assert shard.part(names).data == shard.data
