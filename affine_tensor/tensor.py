"""AffineQuantizedTensor: what it holds, how it is copied, moved and printed.

It owns the table of aten operators; `dispatch.py` fills it.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import layout, ops

logger = logging.getLogger("affine_tensor")

Handler = Callable[[Any, Sequence[Any], dict[str, Any]], Any]

# The aten operators that know packed weights, by overload; `FALLBACK` serves the rest.
OPS: dict[Any, Handler] = {}
FALLBACK = "fallback"

FROZEN = (
    "A packed weight cannot be trained or changed in place. Train adapters beside it, "
    "which merge_to_dense(model) merges, or make it dense with dequantize_(model)"
)

NOT_ON_DISK = (
    "accelerate writes weights that are left on disk as arrays: map the modules to devices "
    "and 'cpu' only"
)


def implements(*ops: Any) -> Callable[[Handler], Handler]:
    """Enter the decorated handler into the table for each of the operators."""

    def register(handler: Handler) -> Handler:
        OPS.update(dict.fromkeys(ops, handler))
        return handler

    return register


class AffineQuantizedTensor(torch.Tensor):
    """A weight ``[..., N, K]`` kept as packed codes: ``w = code * scale + bias``.

    It stands in for a float tensor of shape ``[..., N, K]`` and dtype `dtype`, frozen.
    ``.to(dtype)`` shares the parts, as ``detach()`` does: `copy_` into one writes to both.
    Make one with `from_dense` or `from_packed`.

    Attributes:
        packed: uint32 ``[..., N, K * bits / 32]``, see `affine_tensor.layout`.
        scales: float32, float16 or bfloat16, ``[..., N, K / group_size]``. They
            keep the dtype that they came with, whatever `dtype` becomes.
        biases: like the scales.
        permutation: int32 ``[..., K]`` or None: the input channel that each stored
            column belongs to (GPTQ's act-order).
        bits: see `layout.BITS`.
        group_size: see `layout.GROUP_SIZES`.
        transposed: whether the last two dimensions are shown exchanged.
    """

    _packed: Tensor  # int32: uint32 lacks shifts, pickling and collectives
    scales: Tensor
    biases: Tensor
    permutation: Tensor | None
    bits: int
    group_size: int
    transposed: bool
    _dtype: torch.dtype  # reading .dtype costs 1 µs on a subclass, this 0.04

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        scales: Tensor,
        biases: Tensor,
        permutation: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> AffineQuantizedTensor:
        # From the scales, since a row of them is whole groups at every width. A slice
        # along K is non-contiguous, as it must be for .contiguous() to copy it.
        shape = [*scales.shape[:-1], scales.shape[-1] * group_size]
        strides = [stride * group_size for stride in scales.stride()[:-1]] + [1]
        if transposed:
            shape[-2:] = shape[:-3:-1]
            strides[-2:] = strides[:-3:-1]
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=packed.device
        )

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        biases: Tensor,
        permutation: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        # Unchecked: the public ways in are from_dense and from_packed.
        self._packed = packed
        self.scales = scales
        self.biases = biases
        self.permutation = permutation
        self.bits = bits
        self.group_size = group_size
        self.transposed = transposed
        self._dtype = dtype

    @classmethod
    def from_dense(
        cls, weight: Tensor, bits: int = 4, group_size: int = 64
    ) -> AffineQuantizedTensor:
        """Quantize a dense weight ``[..., N, K]`` with the codes of `layout.quantize`.

        float64 weights are quantized through float32 and keep float64 as their dtype.
        Raises ValueError or TypeError as `layout.quantize` does.
        """
        source = weight.detach()
        if source.dtype == torch.float64:
            source = source.float()
        layout.check_weight(source, bits=bits, group_size=group_size)
        parts = torch.ops.affine_tensor.quantize(
            source, bits=bits, group_size=group_size
        )
        return cls(*parts, bits=bits, group_size=group_size, dtype=weight.dtype)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        scales: Tensor,
        biases: Tensor,
        *,
        bits: int,
        group_size: int,
        dtype: torch.dtype | None = None,
        permutation: Tensor | None = None,
        transposed: bool = False,
    ) -> AffineQuantizedTensor:
        """Take packed parts over, without copying them.

        Shapes as in the class; `packed` is uint32 or int32; `dtype` (default: that of
        the scales) is what the tensor counts as. Raises ValueError or TypeError where
        the parts do not fit together.
        """
        layout.check_parts(packed, scales, biases, bits=bits, group_size=group_size)
        dtype = scales.dtype if dtype is None else dtype
        if dtype not in layout.LOGICAL_DTYPES:
            raise TypeError(
                f"dtype is {dtype}; allowed are {layout.join(layout.LOGICAL_DTYPES)}"
            )
        devices = {str(part.device) for part in (packed, scales, biases)}
        if len(devices) > 1:
            raise ValueError(
                f"the parts lie on several devices, {' and '.join(sorted(devices))}; "
                "move them to one"
            )
        if transposed and packed.dim() < 2:
            raise ValueError("a tensor of one dimension cannot be transposed")
        if permutation is not None:
            permutation = _checked_permutation(permutation, scales, group_size)
        return cls(
            packed.view(torch.int32),
            scales,
            biases,
            permutation,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            transposed=transposed,
        )

    @property
    def packed(self) -> Tensor:
        """The words, uint32 ``[..., N, K * bits / 32]``: a view of what is held."""
        return self._packed.view(torch.uint32)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that the parts take, not those of the dense tensor."""
        return sum(part.nbytes for part in self._parts())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in `dtype` or the tensor's own, rounded once."""
        weight = torch.ops.affine_tensor.dequantize(
            self._packed,
            self.scales,
            self.biases,
            self.permutation,
            bits=self.bits,
            group_size=self.group_size,
            dtype=dtype or self._dtype,
        )
        return weight.transpose(-1, -2) if self.transposed else weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        fields: dict[str, object] = {
            "shape": list(self.shape),
            "dtype": layout.name_of(self._dtype),
            "bits": self.bits,
            "group_size": self.group_size,
            "device": f"'{self.device}'",
        }
        if self.scales.dtype != self._dtype:
            fields["scales"] = layout.name_of(self.scales.dtype)
        if self.transposed:
            fields["transposed"] = True
        if self.permutation is not None:
            fields["permutation"] = True
        text = ", ".join(f"{name}={value}" for name, value in fields.items())
        return f"AffineQuantizedTensor({text})"

    # ---- the protocol of traceable subclasses -----------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = ["_packed", "scales", "biases"]
        if self.permutation is not None:
            names.append("permutation")
        return names, (self.bits, self.group_size, self._dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor],
        meta: tuple[Any, ...],
        outer_size: object = None,
        outer_stride: object = None,
    ) -> AffineQuantizedTensor:
        bits, group_size, dtype, transposed = meta
        return AffineQuantizedTensor(
            parts["_packed"],
            parts["scales"],
            parts["biases"],
            parts.get("permutation"),
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            transposed=transposed,
        )

    def _parts(self) -> list[Tensor]:
        parts = [self._packed, self.scales, self.biases]
        return parts if self.permutation is None else [*parts, self.permutation]

    def _map(
        self,
        part: Callable[[Tensor], Tensor],
        permutation: Callable[[Tensor], Tensor] | None = None,
        **changes: Any,
    ) -> AffineQuantizedTensor:
        """The same function on each part; the permutation's may differ."""
        kept = self.permutation
        if kept is not None:
            kept = (permutation or part)(kept)
        fields: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "dtype": self._dtype,
            "transposed": self.transposed,
        }
        return AffineQuantizedTensor(
            part(self._packed),
            part(self.scales),
            part(self.biases),
            kept,
            **(fields | changes),
        )

    def _stable_hash_for_caching(self) -> str:
        """The key of AOTAutograd's cache: all that a compiled graph depends on."""
        parts = [(p.dtype, tuple(p.shape), p.stride(), p.device) for p in self._parts()]
        key = repr((self.__tensor_flatten__(), parts))
        return hashlib.sha256(key.encode()).hexdigest()

    # ---- dispatch ---------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _F_linear:
            y = _linear_fast(*args, **kwargs) if kwargs else _linear_fast(*args)
            if y is not None:
                return y
        elif func in FUNCTIONS:
            return FUNCTIONS[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = OPS.get(func) or OPS[FALLBACK]
        return handler(func, args, kwargs or {})

    # ---- copies, files, memory --------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> AffineQuantizedTensor:
        if id(self) not in memo:
            new = self._map(torch.clone)
            memo[id(self)] = _with_attributes(new, copy.deepcopy(_extra(self), memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = {name: getattr(self, name) for name in self.__tensor_flatten__()[0]}
        return _rebuild, (parts, self.__tensor_flatten__()[1], _extra(self))

    def data_ptr(self) -> int:
        # Wrapper subclasses have none, and host code takes two tensors with the same
        # address for one: accelerate would tie every quantized weight to the first.
        return self._packed.data_ptr()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        # Inherited, it would hand out memory that is not there.
        raise BufferError(f"{self!r} has no dense memory to share; use dequantize()")

    def numpy(self, *, force: bool = False) -> Any:
        raise RuntimeError(
            f".numpy() is not supported for tensor subclasses: {self!r} has no dense "
            f"memory; use dequantize(). {NOT_ON_DISK}"
        )

    def storage(self) -> Any:
        # safetensors asks for it last, and so does what saves with it: diffusers' and
        # accelerate's own functions.
        raise RuntimeError(
            f"{self!r} has no dense storage to write to a file. Save the model with "
            "affine_tensor.save_checkpoint(model, folder), which load_checkpoint_ reads, "
            "or its state_dict with torch.save (save_pretrained of diffusers: "
            "safe_serialization=False)"
        )

    def numel(self) -> int:
        """The number of weights.

        accelerate takes the size of a model to be that, times the bytes of the dtype; it
        gets the number of elements of that dtype which fit into the bytes of the parts.
        """
        if not _is_compiling():
            caller = sys._getframe(1)
            if (
                caller.f_code.co_name == "compute_module_sizes"
                and caller.f_globals.get("__name__") == "accelerate.utils.modeling"
            ):
                unit = self._dtype.itemsize
                if caller.f_locals.get("dtype") is not None:
                    unit = min(unit, caller.f_locals["dtype_size"])
                return -int(-self.nbytes // unit)
        return super().numel()

    # get_memory_footprint of transformers and diffusers multiplies these two.
    def nelement(self) -> int:
        """The number of weights; of bytes, where a memory footprint is taken."""
        return self.nbytes if _is_footprint() else super().nelement()

    def element_size(self) -> int:
        """Bytes of the dtype; 1 where a memory footprint is taken."""
        return 1 if _is_footprint() else super().element_size()

    def size(self, dim: Any = None) -> Any:
        """The shape, or the length of one dimension."""
        if dim is None and not _is_compiling():
            caller = sys._getframe(1)
            if (
                caller.f_code.co_name == "_broadcast_state_dict"
                and caller.f_globals.get("__name__")
                == "torch.distributed._state_dict_utils"
            ):
                from .distributed import refuse_broadcast

                refuse_broadcast(caller.f_locals.get("pg"))
        return super().size(dim)

    def share_memory_(self) -> AffineQuantizedTensor:
        for part in self._parts():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(part.is_shared() for part in self._parts())

    # FSDP2 calls them; the number of arguments tells it what to pass.
    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        from .distributed import pre_all_gather

        return pre_all_gather(self)

    def fsdp_post_all_gather(
        self, gathered: Any, kept: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        from .distributed import post_all_gather

        return post_all_gather(self, gathered, kept, dtype, out)

    def requires_grad_(self, requires_grad: bool = True) -> AffineQuantizedTensor:
        """Raises if `requires_grad`: packed weights are frozen.

        torch.nn asks all the parameters of a module alike (`Module.requires_grad_`,
        `Parameter(t)`, `load_state_dict(assign=True)`); there a packed weight stays
        frozen, and the log says so once, so that none is left half done.
        """
        if requires_grad:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("torch.nn."):
                asked = f"requires_grad_(True) on {self!r}{of_module()}"
                raise RuntimeError(f"{asked}: {FROZEN}")
            log_once("requires_grad", "Packed weights stay frozen: %s", FROZEN)
        return self


def of_module() -> str:
    """`` of 'a.b'`` for an error, where that module of a model makes the call.

    A tensor knows no name. Who changes a weight, merging adapters say, is a method of a
    module (or of a wrapper around it) that another one further up the stack holds.
    """
    inner: set[int] = set()
    name = ""
    frame = sys._getframe(1).f_back
    while frame is not None:
        module = frame.f_locals.get("self")
        frame = frame.f_back
        if not isinstance(module, nn.Module) or "_modules" not in vars(module):
            continue
        if not inner:
            wrapped = [module._modules.get(own) for own in _WRAPPED]
            inner = {id(m) for m in (module, *wrapped) if m is not None}
        name = next(
            (n for n, m in module.named_modules() if n and id(m) in inner), name
        )
    return f" of {name!r}" if name else ""


_WRAPPED = ("base_layer", "original_module")  # what PEFT's layers call it


def _is_footprint() -> bool:
    """Whether the caller's caller adds up a model's bytes in `get_memory_footprint`."""
    if _is_compiling():
        return False
    frame = sys._getframe(2)
    if frame.f_code.co_name in ("<genexpr>", "<listcomp>") and frame.f_back:
        frame = frame.f_back
    return (
        frame.f_code.co_name == "get_memory_footprint"
        and str(frame.f_globals.get("__name__")).partition(".")[0] in _COUNTING
    )


_COUNTING = ("transformers", "diffusers")


def local_of(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: the shard of a DTensor, else all of it."""
    local = getattr(tensor, "_local_tensor", None)
    return tensor if local is None else local


_logged: set[str] = set()


def log_once(key: str, message: str, *args: object) -> None:
    if key not in _logged:
        _logged.add(key)
        logger.warning(message, *args)


# Bound once, since each look-up along a dotted name costs as much as a test below. The
# overload's own __call__ only adds a Python frame around its _op.
_F_linear = F.linear
_linear_op = ops.overload("linear")._op
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_is_autocast_on = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_trace = torch._C._get_tracing_state
_is_profiling = torch._C._autograd._profiler_enabled


def _linear_fast(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """`F.linear` straight to the operator where nothing above it has a say, else None.

    Saves 1 µs in inference mode and 7 under no_grad over the way through aten.
    Autograd, functorch, forward AD and compilers need the aten operators; autocast does
    not, since the operator itself knows it. Where nobody watches the operator either,
    the device's kernel is called without it, which saves as much again as all else costs.
    """
    if (
        type(input) is not Tensor
        or type(weight) is not AffineQuantizedTensor
        or weight.transposed
        or weight._packed.dim() != 2
        or _is_compiling()
        or forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or (
            bias is not None
            and type(bias) is not nn.Parameter
            and type(bias) is not Tensor
        )
        or (
            _is_grad_enabled()
            and (input.requires_grad or (bias is not None and bias.requires_grad))
        )
    ):
        return None
    run = _linear_op
    if not (
        _dispatch_modes()
        or _is_autocast_on()
        or _is_profiling()
        or _jit_trace()
        # The sign that torch keeps aside is laid on by the operator's fallback.
        or input.is_neg()
        or (bias is not None and bias.is_neg())
    ):
        run = ops.kernel("linear", input) or run
    return run(
        input,
        weight._packed,
        weight.scales,
        weight.biases,
        weight.permutation,
        bias,
        bits=weight.bits,
        group_size=weight.group_size,
        dtype=weight._dtype,
    )


def _set_data(tensor: AffineQuantizedTensor, value: Tensor) -> None:
    """``weight.data = value``: torch alone would exchange the shell and keep the parts.

    Only another packed weight can be put in. (Into a plain tensor torch puts a packed
    weight unasked, and so loses it: it is the tensor written to that has a say.)
    """
    if not isinstance(value, AffineQuantizedTensor):
        raise RuntimeError(
            f"cannot assign {_describe(value)} to the .data of {_describe(tensor)}"
            f"{of_module()}: their storage differs in kind. Replace the parameter "
            "itself, or use copy_(), which quantizes; dequantize_(module) makes a module "
            "dense again, to resize its embedding for example, or to start adapters from "
            "its weight; merge_to_dense(model) merges adapters"
        )
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
    names = [*value.__tensor_flatten__()[0], "bits", "group_size", "transposed"]
    tensor.permutation = None
    for name in [*names, "_dtype"]:
        setattr(tensor, name, getattr(value, name))


def _set_requires_grad(tensor: Tensor, value: bool) -> None:
    if value:
        asked = f"requires_grad = True on {_describe(tensor)}{_of_holder(tensor)}"
        raise RuntimeError(f"{asked}: {FROZEN}")


def _of_holder(tensor: Tensor) -> str:
    """`` of 'a.b'``, where a function that goes through a `model` asks it of a weight."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        model = frame.f_locals.get("model")
        frame = frame.f_back
        if isinstance(model, nn.Module) and "_modules" in vars(model):
            for name, module in model.named_modules():
                if any(own is tensor for own in module._parameters.values()):
                    return f" of {name!r}"
    return ""


def _set_item(tensor: Tensor, index: Any, value: Any) -> None:
    """``tensor[index] = value``: what is no packed view would be written to a copy."""
    if isinstance(tensor, AffineQuantizedTensor):
        part = tensor[index]
        if not isinstance(part, AffineQuantizedTensor):
            raise NotImplementedError(f"[{index}] = on {_describe(tensor)}: {FROZEN}")
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.__setitem__(tensor, index, value)


def _refuse(tensor: Tensor, *others: Any) -> None:
    """Methods that write to the memory behind a tensor, or to a view of their own."""
    raise NotImplementedError(
        f"apply_, map2_ or fill_diagonal_ on {_describe(tensor)}: {FROZEN}"
    )


# What is caught above autograd; low_rank.py adds to it.
# Each access of a descriptor's method makes a new object; they hash and compare equal.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.apply_: _refuse,
    torch.Tensor.map2_: _refuse,
    torch.Tensor.fill_diagonal_: _refuse,
}


def _checked_permutation(
    permutation: Tensor, scales: Tensor, group_size: int
) -> Tensor:
    columns = scales.shape[-1] * group_size
    expected = (*scales.shape[:-2], columns)
    if tuple(permutation.shape) != expected:
        raise ValueError(
            f"the permutation has shape {list(permutation.shape)}; "
            f"{list(expected)} is needed, one entry for each column"
        )
    if permutation.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"the permutation is {permutation.dtype}; int32 is needed")
    if not permutation.is_meta:
        columns_seen = permutation.sort(dim=-1).values
        if not bool((columns_seen == torch.arange(columns).to(columns_seen)).all()):
            raise ValueError(
                f"the permutation does not hold each of 0 to {columns - 1} once"
            )
    return permutation.to(device=scales.device, dtype=torch.int32)


def _extra(tensor: AffineQuantizedTensor) -> dict[str, Any]:
    """Attributes that others put on the tensor, `_is_param` among them."""
    own = {"_packed", "scales", "biases", "permutation", "bits", "group_size"}
    own |= {"transposed", "_dtype"}
    return {k: v for k, v in tensor.__dict__.items() if k not in own}


def _with_attributes(
    tensor: AffineQuantizedTensor, attributes: dict[str, Any]
) -> AffineQuantizedTensor:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def _rebuild(
    parts: dict[str, Tensor], meta: tuple[Any, ...], extra: dict[str, Any]
) -> AffineQuantizedTensor:
    """What pickles call. Its name and arguments are a file format."""
    tensor = AffineQuantizedTensor.__tensor_unflatten__(parts, meta)
    return _with_attributes(tensor, extra)


def _describe(tensor: object) -> str:
    if isinstance(tensor, AffineQuantizedTensor):
        return repr(tensor)
    if isinstance(tensor, Tensor):
        return f"a {layout.name_of(tensor.dtype)} tensor of shape {list(tensor.shape)}"
    return repr(tensor)


# Pickles name both by the package, so that files outlive a move of this module.
AffineQuantizedTensor.__module__ = _rebuild.__module__ = "affine_tensor"
torch.serialization.add_safe_globals([AffineQuantizedTensor, _rebuild])
