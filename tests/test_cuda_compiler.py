"""Compiling for CUDA: needs NVRTC (pip install nvidia-cuda-nvrtc), no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from affine_tensor import layout
from affine_tensor.kernels import KernelError
from affine_tensor.kernels.cuda import compiler, plans
from affine_tensor.kernels.cuda.plans import Product

FORM = (("BITS", 4), ("X", 2))
HOPPER = (9, 0)


def missing() -> str | None:
    try:
        compiler.find()
    except KernelError as error:
        return str(error)
    return None


needs_nvrtc = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("AFFINE_TENSOR_CACHE", str(tmp_path))
    compiler._folder.cache_clear()
    yield tmp_path / "cuda"
    compiler._folder.cache_clear()


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled, from here on."""
    seen: list[str] = []
    compile_source = compiler._compile

    def count(nvrtc: Any, source: str, *others: Any) -> bytes:
        seen.append(source)
        return compile_source(nvrtc, source, *others)

    monkeypatch.setattr(compiler, "_compile", count)
    return seen


@needs_nvrtc
def test_a_source_is_compiled_once(folder: Path, compiles: list[str]) -> None:
    made = compiler.image("weights.cu", FORM, HOPPER)
    assert made.startswith(b"\x7fELF")
    assert compiler.image("weights.cu", FORM, HOPPER) == made
    assert compiles == ["weights.cu"]
    # For another format, another GPU.
    compiler.image("weights.cu", (("BITS", 3), ("X", 2)), HOPPER)
    compiler.image("weights.cu", FORM, (8, 0))
    assert len(compiles) == 3
    assert len(list(folder.iterdir())) == 3


@needs_nvrtc
@pytest.mark.parametrize("damage", ["empty", "short", "changed"])
def test_what_was_damaged_is_compiled_again(
    damage: str, folder: Path, compiles: list[str]
) -> None:
    made = compiler.image("weights.cu", FORM, HOPPER)
    (file,) = folder.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "changed":
        data[len(data) // 2] ^= 1
    file.write_bytes({"empty": b"", "short": data[:-9], "changed": data}[damage])
    assert compiler.image("weights.cu", FORM, HOPPER) == made
    assert compiler.image("weights.cu", FORM, HOPPER) == made
    assert len(compiles) == 2


@needs_nvrtc
def test_a_folder_that_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AFFINE_TENSOR_CACHE", str(tmp_path / "file"))
    compiler._folder.cache_clear()
    assert compiler.image("weights.cu", FORM, HOPPER)


@needs_nvrtc
def test_the_sources_decide(
    monkeypatch: pytest.MonkeyPatch, folder: Path, compiles: list[str]
) -> None:
    compiler.image("weights.cu", FORM, HOPPER)
    changed = {name: text + "\n// new" for name, text in compiler.sources().items()}
    monkeypatch.setattr(compiler, "sources", lambda: changed)
    compiler.image("weights.cu", FORM, HOPPER)
    assert len(compiles) == 2


@needs_nvrtc
def test_an_error_shows_what_the_compiler_says(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    broken = {**compiler.sources(), "weights.cu": "this is no C++"}
    monkeypatch.setattr(compiler, "sources", lambda: broken)
    with pytest.raises(KernelError, match=r"does not take weights\.cu(.|\n)*error"):
        compiler.image("weights.cu", FORM, HOPPER)
    assert not list(folder.iterdir())


@needs_nvrtc
def test_gpus_that_nvrtc_does_not_know() -> None:
    assert compiler.target((8, 0)) == "sm_80"
    assert compiler.target(HOPPER) == "sm_90a"
    newest = compiler.find().architectures[-1]
    assert compiler.target((99, 0)) == f"compute_{newest}"
    assert b".version" in compiler.image("weights.cu", FORM, (99, 0))
    with pytest.raises(KernelError, match="need sm_80 or later"):
        compiler.target((7, 5))


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libnvrtc.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv("AFFINE_TENSOR_NVRTC", str(broken))
    compiler._first.cache_clear()
    try:
        with pytest.raises(KernelError, match="pip install nvidia-cuda-nvrtc"):
            compiler.find()
    finally:
        compiler._first.cache_clear()


@needs_nvrtc
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
def test_all_that_is_planned_compiles(capability: tuple[int, int]) -> None:
    """A sample of formats, all dtypes; kept in the user's cache, as in use."""
    jobs: dict[compiler.Job, None] = {}
    for i, bits in enumerate(layout.BITS):
        group = layout.GROUP_SIZES[i % 5]
        dtype = layout.WEIGHT_DTYPES[i % 3]
        scales = layout.WEIGHT_DTYPES[(i + i // 3) % 3]
        for m, experts, grouping in (
            (1, 0, 0),
            (2, 0, 0),
            (9, 0, 0),
            (7, 4, 1),
            (40, 4, 2),
        ):
            product = Product(
                m=m,
                n=300,
                k=1280,
                bits=bits,
                group_size=group,
                dtype=dtype,
                scale_dtype=scales,
                experts=experts,
                grouping=grouping,
                capability=capability,
            )
            plan = plans.choose(product)
            if plan is not None:
                jobs[plan.source, plan.defines, capability] = None
    assert compiler.images(list(jobs), processes=1) == len(jobs) >= 20


@needs_nvrtc
def test_several_processes_compile_into_one_cache(folder: Path) -> None:
    script = (
        "from affine_tensor.kernels.cuda import compiler\n"
        "if __name__ == '__main__':\n"
        "    jobs = [('weights.cu', (('BITS', b), ('X', 1)), (8, 0)) for b in (2, 3)]\n"
        "    print(compiler.images(jobs, processes=2))\n"
    )
    file = folder.parent / "script.py"
    file.write_text(script)
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "2"
    assert len(list(folder.iterdir())) == 2


def test_torch_is_asked_for_nvrtc_of_its_version() -> None:
    names = list(compiler._names())
    major = (torch.version.cuda or "13").split(".")[0]
    assert names[0].endswith(f"libnvrtc.so.{major}") or len(names) == 1
