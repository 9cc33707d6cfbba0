"""The project's own kernels, as cases of on_cuda.py.

Each is what the host checks a kernel with on first use: a small, ragged product, or a few
rows of values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from affine_tensor.kernels.metal import check, plans
from affine_tensor.kernels.metal import values_check as metal_values_check
from affine_tensor.kernels.metal.library import TYPE_NAMES, Variant, source, variant
from affine_tensor.kernels.metal.plans import Choice, Product

PREFIX = "shader "

# Family, tile sizes, and what else is asked of the product.
CHOICES: tuple[tuple[str, dict[str, int], dict[str, Any]], ...] = (
    ("gemv", {"SPLIT": 1, "GROUPS": 2}, {}),
    ("gemv", {"SPLIT": 4, "GROUPS": 1}, {"permuted": True, "biased": True}),
    ("gemv", {"SPLIT": 1, "GROUPS": 2}, {"experts": 3, "grouping": 1}),
    ("gemv", {"SPLIT": 2, "GROUPS": 1}, {"experts": 3, "grouping": 2}),
    ("gemv_small", {"VECTORS": 2, "SPLIT": 1, "GROUPS": 2}, {"biased": True}),
    ("gemv_small", {"VECTORS": 5, "SPLIT": 2, "GROUPS": 1}, {"permuted": True}),
    ("gemv_small", {"VECTORS": 8, "SPLIT": 1, "GROUPS": 2}, {}),
    ("gemm", {"M_TILES": 1, "N_TILES": 1, "SPLIT": 4}, {"biased": True}),
    ("gemm", {"M_TILES": 3, "N_TILES": 1, "SPLIT": 2}, {"permuted": True}),
    ("gemm", {"M_TILES": 8, "N_TILES": 2, "SPLIT": 1}, {}),
    (
        "gemm",
        {"M_TILES": 2, "N_TILES": 1, "SPLIT": 1},
        {"experts": 3, "grouping": 2, "gathered": True, "expert_type": torch.int64},
    ),
    ("gemv_n", {"VECTORS": 1, "SIMDGROUPS": 8}, {"experts": 3, "grouping": 1}),
    ("gemv_n", {"VECTORS": 4, "SIMDGROUPS": 8}, {"permuted": True}),
    ("gemm_n", {"M_TILES": 4, "SPLIT": 1}, {"permuted": True}),
    ("gemm_n", {"M_TILES": 2, "SPLIT": 4}, {}),
    ("gemm_n", {"M_TILES": 1, "SPLIT": 1}, {"experts": 3, "grouping": 2}),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORMATS = ((4, 64), (3, 32), (8, 128), (6, 16), (1, 256), (5, 64), (2, 128))


def products() -> Iterator[tuple[Product, Choice]]:
    """Every choice at every width, groups, dtypes and alignment in turn."""
    turns = itertools.cycle(itertools.product(DTYPES, (True, False)))
    for (family, sizes, more), (bits, group_size) in itertools.product(
        CHOICES, FORMATS
    ):
        dtype, aligned = next(turns)
        product = Product(
            m=0,
            n=0,
            k=0,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            scale_dtype=dtype if aligned else torch.float32,
            transposed=family.endswith("_n"),
            aligned=aligned,
            x_vector=aligned and not family.endswith("_n"),
            **more,
        )
        yield product, Choice(family, tuple(sizes.items()))


def name_of(variant: Variant) -> str:
    return f"{PREFIX}{variant}"


def run(product: Product, choice: Choice, kernels: Any) -> list[Tensor]:
    """The product's result; raises where it is not that of float64."""
    case = check.Case(product, choice)
    y = case.run(getattr(kernels, choice.family), torch.device("cpu"))
    wrong = case.differences(y)
    assert wrong is None, wrong
    return [y]


def values() -> Iterator[Variant]:
    """Kernels that make or read values: every format, dtypes in turn."""
    turns = itertools.cycle(itertools.product(DTYPES, DTYPES))
    ids = itertools.cycle((torch.int32, torch.int64))
    for bits, group_size in (*FORMATS, (4, 16)):
        form = {"bits": bits, "group_size": group_size}
        dtype, scale_dtype = next(turns)
        types = {"X_TYPE": dtype, "SCALE_TYPE": scale_dtype, "ALIGNED": True}
        yield variant("dequantize", **form, **types, PERMUTED=bits % 2)
        yield variant("embedding", **form, **types, ID_TYPE=next(ids))
        yield variant("quantize", **form, X_TYPE=dtype, X_VECTOR=True)


def run_values(wanted: Variant, kernels: Any) -> list[Tensor]:
    """Raises where a kernel's values are not the reference's, in any bit."""
    made = getattr(kernels, wanted.family)
    form = {"bits": wanted["BITS"], "group_size": wanted["GROUP_SIZE"]}
    types = {name: dtype for dtype, name in TYPE_NAMES.items()}
    dtype, scale_dtype = types[wanted["X_TYPE"]], types[wanted["SCALE_TYPE"]]
    here = torch.zeros(1, dtype=dtype)
    scales = torch.zeros(1, dtype=scale_dtype)
    if wanted.family == "quantize":
        wrong = metal_values_check.compare_quantize(made, form, here)
    elif wanted.family == "dequantize":
        like = (here, scales, scales, here if wanted["PERMUTED"] else None)
        wrong = metal_values_check.compare_dequantize(made, form, dtype, like)
    else:
        like = (here, scales, scales, None)
        id_dtype = types[wanted["ID_TYPE"]]
        wrong = metal_values_check.compare_embedding(made, form, dtype, like, id_dtype)
    assert wrong is None, wrong
    return [torch.ones(1)]


def sources() -> dict[str, str]:
    """The source of each variant, by the name of its library."""
    variants = (*(plans.variant_of(*one) for one in products()), *values())
    return {name_of(variant): source(variant) for variant in variants}
