"""The models that `generate`, `eval` and `bench` run: loading, memory, devices."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .inspect import paths
from .output import in_a_line, say

if TYPE_CHECKING:
    from ..checkpoint.files import Checkpoint

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, or a repository of the Hub: MLX, GPTQ, AWQ, "
        "compressed-tensors or dense.",
        autocompletion=paths,
    ),
]


def _a_device(name: str | None) -> str | None:
    """A callback: what is no name of a device is known without looking for it."""
    if name is not None:
        from ..kernels import machine

        if not re.fullmatch(rf"({'|'.join(machine.KINDS)})(:\d+)?", name):
            kinds = ", ".join(machine.KINDS)
            raise typer.BadParameter(
                f"{name!r}: allowed are {kinds}, and one of several, as in cuda:1"
            )
    return name


Device = Annotated[
    str | None,
    typer.Option(
        callback=_a_device,
        help="Such as cpu, cuda, cuda:1 or mps (default: the accelerator that there "
        "is, else cpu).",
        show_default=False,
    ),
]
DType = Annotated[
    Literal["auto", "float16", "bfloat16", "float32"],
    typer.Option(help="What the model computes in; auto: as config.json says."),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the repository.", show_default=False),
]
Attention = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="As transformers calls it, such as sdpa or eager; sdpa_float32 decodes "
        "faster on a CPU in 16 bits.",
        show_default=False,
    ),
]
Fuse = Annotated[
    bool, typer.Option("--fuse", help="Multiply by sibling projections at once.")
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Decode through torch.compile, which takes time."),
]


def note(text: str) -> None:
    """Tell the user something on stderr that is no error."""
    say(f"affine-tensor: {text}")


# ---- loading ---------------------------------------------------------------------


@dataclass
class Loaded:
    """A model and what came with it. `packed`: it has quantized weights of ours."""

    model: Any
    tokenizer: Any
    packed: bool
    seconds: float  # for reading the weights, without imports and downloads
    kind: str  # cpu, cuda or mps

    @property
    def positions(self) -> int | None:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


def open_model(source: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint, on this machine, with its headers read.

    Raises FileNotFoundError or CheckpointError where there is none, or no model.
    """
    from ..checkpoint.files import CheckpointError, fetch, open_checkpoint

    checkpoint = open_checkpoint(fetch(source, revision=revision))
    if not checkpoint.config.get("model_type"):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} has no model_type, by which transformers "
            "knows the architecture. Take config.json from the original model"
        )
    return checkpoint


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights. Raises FileNotFoundError if there is none."""
    from ..checkpoint.companions import has_tokenizer

    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json). Copy tokenizer.json and "
            "tokenizer_config.json from the original model into it"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except ImportError:  # which says what is missing
        raise
    except Exception as error:  # of all kinds, few of which name a file
        raise _broken_tokenizer(folder, error) from error


def _broken_tokenizer(folder: Path, error: Exception) -> Exception:
    from ..checkpoint.companions import _TOKENIZER_FILES
    from ..checkpoint.files import CheckpointError, read_json

    advice = "Copy it from the original model again"
    for name in _TOKENIZER_FILES:
        if name.endswith(".json"):
            try:
                read_json(folder / name)
            except CheckpointError as broken:
                return CheckpointError(f"{broken}. {advice}")
    return CheckpointError(
        f"the tokenizer in {folder} cannot be loaded: {in_a_line(error)}. {advice}"
    )


def _check_config(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, with its file, for what transformers does not take."""
    from transformers import CONFIG_MAPPING, __version__

    from ..checkpoint.families import TRANSFORMERS_TYPES
    from ..checkpoint.files import CheckpointError
    from ..hf.pretrained import _read_config

    path, kind = checkpoint.folder / "config.json", checkpoint.config["model_type"]
    if not any(one in CONFIG_MAPPING for one in (kind, TRANSFORMERS_TYPES.get(kind))):
        raise CheckpointError(
            f"{path} has model_type {kind!r}, which transformers {__version__} does not "
            "know. A later one may: pip install --upgrade transformers"
        )
    try:
        _read_config(checkpoint, {})
    except Exception as error:  # of all kinds: configurations are anybody's
        raise CheckpointError(
            f"{path}: {in_a_line(error)}. Correct it, or take config.json from the "
            "original model"
        ) from error


def _check_attention(name: str | None) -> None:
    """Raise for a name that nothing has; kernels of the Hub have a / in theirs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _import_transformers()  # and our own, with its name
    names = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    names = [own for own in names if "|" not in own]  # of servers
    if name is not None and name not in names and "/" not in name:
        raise typer.BadParameter(
            f"--attention {name}: allowed are {', '.join(names)}, as far as the model "
            "has them"
        )


def load(
    source: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    attention: str | None = None,
    tokenizer: bool = True,
    dense: bool = False,
) -> Loaded:
    """Load a checkpoint of any format that is read, onto a device.

    `attention`: the implementation, as transformers calls it. `dense`: with all weights
    dense, of a quantized checkpoint too. Raises what `open_model`, `load_tokenizer` and
    `from_pretrained` raise.
    """
    from ..checkpoint import formats
    from ..kernels import machine

    place = _device(device)
    checkpoint = open_model(source, revision)
    _check_attention(attention)
    _check_config(checkpoint)
    # Before the weights, which take longer.
    own = load_tokenizer(checkpoint.folder) if tokenizer else None
    packed = formats.recognizes(checkpoint)
    _import_transformers()
    options: dict[str, Any] = {"dtype": dtype, "device_map": place}
    if attention is not None:
        options["attn_implementation"] = attention
    start = time.perf_counter()
    model = (
        _load_packed(checkpoint, dense, options)
        if packed
        else _load_dense(checkpoint, options)
    )
    machine.synchronize(place.type)
    seconds = time.perf_counter() - start
    return Loaded(model, own, packed and not dense, seconds, place.type)


def _device(name: str | None) -> Any:
    import torch

    from ..kernels import machine

    if name is None:
        return machine.tensor_device(machine.default_kind())
    device = torch.device(name)
    if not machine.is_available(device.type) or _beyond(device):
        raise ValueError(
            f"--device {name}: there is none here; torch has {torch.__version__}. Leave "
            "it out, or take cpu"
        )
    return device


def _beyond(device: Any) -> bool:
    import torch

    count = torch.cuda.device_count() if device.type == "cuda" else 1
    return device.index is not None and device.index >= count


def _import_transformers() -> None:
    """What the load would import, so that the time of loading is that of the weights."""
    from ..hf import pretrained  # noqa: F401


def _load_packed(checkpoint: Checkpoint, dense: bool, options: dict[str, Any]) -> Any:
    from ..hf import AffineQuantizationConfig, from_pretrained

    config = AffineQuantizationConfig(dequantize=True) if dense else None
    return from_pretrained(checkpoint.folder, quantization_config=config, **options)


def _load_dense(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """By transformers itself, which would make up what is not there, and say so."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..hf.convert import check_dense
    from ..hf.loading import _check_loaded
    from ..hf.pretrained import _class_of

    check_dense(checkpoint.folder, checkpoint)
    config = AutoConfig.from_pretrained(checkpoint.folder)
    own_class, config = _class_of(AutoModelForCausalLM, config)
    model, info = own_class.from_pretrained(
        checkpoint.folder, config=config, output_loading_info=True, **options
    )
    _check_loaded(checkpoint.folder, info)
    return model.eval()


def fuse(loaded: Loaded) -> None:
    """`--fuse`: joins projections, or says why there was nothing to join."""
    from ..fuse import fuse_projections

    if not fuse_projections(loaded.model):
        why = "none of its projections agree" if loaded.packed else "it is dense"
        note(f"--fuse joined nothing: {why}")


# ---- running ---------------------------------------------------------------------


def compiled(model: Any, length: int) -> dict[str, Any]:
    """What `generate` takes to decode through a compiled graph.

    `length` is that of prompt and answer: the cache is made for it, and never longer.
    """
    from transformers import CompileConfig, StaticCache

    config: Any = CompileConfig(mode="default", dynamic=False)
    # On a CPU transformers compiles only if told so by this, which it keeps to itself.
    config._compile_all_devices = True
    cache = StaticCache(config=model.config, max_cache_len=length)
    return {"past_key_values": cache, "compile_config": config}


def peak_memory(kind: str) -> int | None:
    """Bytes at most in use so far: of the GPU, or of this process where it is the CPU.

    torch keeps no peak for mps: there it is what its driver holds now. None where the
    system does not say.
    """
    import torch

    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    if kind == "mps":
        return torch.mps.driver_allocated_memory() or None
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10
