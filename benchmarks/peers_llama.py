"""llama.cpp, through the C functions of llama-cpp-python."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import llama_cpp
import numpy
from llama_cpp import _ggml
from workers import Run


class LlamaCpp:
    """A GGUF file; only the last token's logits are asked for, flash attention is auto."""

    packages = ("llama-cpp-python",)

    def __init__(self, threads: int, longest: int) -> None:
        llama_cpp.llama_backend_init()
        built = llama_cpp.llama_print_system_info().decode()
        self.notes = "llama.cpp built with " + ", ".join(
            part.split()[-3]
            for part in built.split("|")
            if part.strip().endswith("= 1")
        )
        self.versions = {"llama.cpp": _version()}
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = -(-longest // 256) * 256
        context.n_threads = context.n_threads_batch = threads
        self.parameters = context

    def load(self, path: Path) -> None:
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        self.context = llama_cpp.llama_init_from_model(model, self.parameters)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def run(self, ids: list[int], new: int, *, keep_logits: bool = False) -> Run:
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        made, rows = Run([], []), []
        for _ in range(new):
            logits = self._logits(ids)
            ids = [int(logits.argmax())]
            made.times.append(time.perf_counter())
            made.tokens += ids
            if keep_logits:
                rows.append(logits.copy())
        if keep_logits:
            made.logits = numpy.stack(rows)
        return made

    def _logits(self, ids: list[int]) -> numpy.ndarray:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        failed = llama_cpp.llama_decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return numpy.ctypeslib.as_array(pointer, shape=(self.size,))


def _version() -> str:
    """Its own, and the commit that it was built from, where they can be asked for."""
    try:
        commit = _ggml.libggml.ggml_commit
        commit.restype = ctypes.c_char_p
        return f"{llama_cpp.llama_version().decode()} ({commit().decode()})"
    except AttributeError:
        return "unknown"
