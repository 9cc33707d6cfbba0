"""Dense copies of parts of packed weights: read like any tensor, never written to.

A view that is not whole groups of a packed weight, ``weight[:, 3:7]`` say, is a copy.
Of a dense weight it would be a view, through which one writes to the weight. What is
written here would be lost, so it is refused, in eager mode as well as in graphs.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .tensor import of_module


class CopiedPart(torch.Tensor):
    """A dense copy of a part of a packed weight, which refuses to be written to.

    It is what views give that have no packed form. What is computed from it is a plain
    tensor, and so is its `clone()`; views of it are copied parts themselves.
    """

    _dense: Tensor
    _origin: str  # the packed weight, in words
    _unit: int  # channels: parts of whole units are packed views

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, dense: Tensor, origin: str, unit: int) -> CopiedPart:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            dense.shape,
            strides=dense.stride(),
            storage_offset=dense.storage_offset(),
            dtype=dense.dtype,
            device=dense.device,
        )

    def __init__(self, dense: Tensor, origin: str, unit: int) -> None:
        self._dense = dense
        self._origin = origin
        self._unit = unit

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, int]]:
        return ["_dense"], (self._origin, self._unit)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor],
        meta: tuple[str, int],
        outer_size: object = None,
        outer_stride: object = None,
    ) -> CopiedPart:
        return CopiedPart(parts["_dense"], *meta)

    def _stable_hash_for_caching(self) -> str:
        dense = self._dense
        key = (dense.dtype, tuple(dense.shape), dense.stride(), dense.device)
        return hashlib.sha256(
            repr((self.__tensor_flatten__(), key)).encode()
        ).hexdigest()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():
            # Composite operators arrive whole in inference mode: views some of the time.
            return func.decompose(*args, **kwargs)
        for target in written(func, args, kwargs):
            if isinstance(target, cls):
                raise NotImplementedError(target._why_not(func))
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
        args, kwargs = tree_map_only(cls, lambda part: part._dense, (args, kwargs))
        if not func.is_view:
            return func(*args, **kwargs)
        # As in `dispatch._as_view`, which the copy was made in.
        inference = torch.is_inference_mode_enabled() and first._dense.is_inference()
        with torch.inference_mode(inference):
            result = func(*args, **kwargs)
            if isinstance(result, (list, tuple)):
                return [cls(one, first._origin, first._unit) for one in result]
            return cls(result, first._origin, first._unit)

    def _why_not(self, func: Any) -> str:
        return (
            f"{func} writes to a tensor of shape {list(self.shape)} that is a copy of a "
            f"part of a packed weight{of_module()}, {self._origin}: the weight would not "
            "change. A part along the input channels can be written to, with copy_, "
            f"where it starts and ends at multiples of {self._unit} and they are in "
            "order (no permutation). Else dequantize() the weight, change that, and "
            "copy_ it back, which quantizes all of it anew; or clone() the part to go on "
            "with the copy"
        )

    # ---- what reads memory: that of the copy ------------------------------------

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise NotImplementedError(self._why_not(".data ="))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._dense)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self._dense.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._dense.__reduce_ex__(protocol)

    def data_ptr(self) -> int:
        return self._dense.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        array = self._dense.numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._dense.__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self._dense.tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._dense.clone().__dlpack__(*args, **kwargs)

    def share_memory_(self) -> Tensor:  # torch's own ends the process
        self._dense.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self._dense.is_shared()


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to.

    The schemas of collectives do not say all of it; of those, sending alone only reads.
    """
    if func.namespace == "c10d" and str(func) != "c10d.send.default":
        return tree_leaves((args, kwargs))
    written: list[Any] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            there = position < len(args)
            value = args[position] if there else kwargs.get(argument.name)
            written += value if isinstance(value, (list, tuple)) else [value]
    return written
