"""Through a model block by block, with the inputs of its linear layers.

The model itself runs, so that it makes masks and positions as it always does. Blocks
that are done are not run again: they hand out what the last of them gave before, and
the run ends after the block in question. That holds only for a chain of blocks. Whether
a model is one is found out in a trial run; others run whole each time.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .text import Batch


class _Stop(Exception):
    """Ends a run of the model early."""


@dataclass
class Group:
    """Linear layers that have the same input, and the block that they stand in."""

    names: list[str]
    block: int | None


class Walk:
    """A model, its calibration batches, and how far the walk has come."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], linears: dict[str, nn.Module]
    ) -> None:
        self.model, self.batches, self.linears = model, batches, linears
        self.blocks = _blocks(model, linears)
        self.done = 0  # blocks whose outputs are kept
        self.outputs: list[Any] = []  # of block done - 1, one for each batch
        self.groups, self.is_chain = self._trial()

    def sums_of_squares(
        self, modules: Sequence[nn.Module], block: int | None
    ) -> Tensor | None:
        """``X^T X`` over the inputs of these layers, float64 (float32 on MPS).

        `block` None runs the model to its end. None where no input came.
        """
        gram = _Gram()
        with ExitStack() as stack:
            for module in modules:
                hook = module.register_forward_pre_hook(gram, with_kwargs=True)
                stack.callback(hook.remove)
            for index, batch in enumerate(self.batches):
                gram.begin(batch)
                self._run_one(index, batch, block)
        return gram.total

    def finish(self, block: int) -> None:
        """Keep the outputs of blocks up to this one, which are settled now."""
        while self.is_chain and self.done <= block:
            self.outputs = self._run(self.done)
            self.done += 1

    def _run(self, block: int) -> list[Any]:
        """What a block gives for each batch."""
        return [self._run_one(i, own, block) for i, own in enumerate(self.batches)]

    def _run_one(self, index: int, batch: Batch, block: int | None) -> Any:
        """One batch, up to a block and its output, or to the end."""
        result: list[Any] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            result.append(output)
            raise _Stop

        with ExitStack() as stack:
            if self.done:
                output = self.outputs[index]
                for _, module in self.blocks[: self.done]:
                    stack.enter_context(_handing_out(module, output))
            if block is not None:
                hook = self.blocks[block][1].register_forward_hook(stop)
                stack.callback(hook.remove)
            with suppress(_Stop):
                call(self.model, batch)
        return result[0] if result else None

    def _trial(self) -> tuple[list[Group], bool]:
        """Run one batch to see the order of calls, and whether the blocks are a chain."""
        seen = _Seen(self.linears, self.blocks)
        seen.run(self.model, self.batches[0])
        if seen.called != list(range(len(self.blocks))):
            self.blocks = []  # called twice, or not in order
        groups = seen.groups(self.blocks)
        last = len(self.blocks) - 1
        if last < 1 or not seen.is_chain or seen.between:
            return groups, False
        # Some models hand more than hidden states from block to block.
        whole = self._run_one(0, self.batches[0], last)
        batches, self.batches = self.batches, self.batches[:1]
        try:
            self.outputs = self._run(last - 1)
            self.done = last
            again = self._run_one(0, self.batches[0], last)
        except Exception:
            return groups, False
        finally:
            self.batches, self.done, self.outputs = batches, 0, []
        return groups, torch.equal(_first(whole), _first(again))


class _Gram:
    """Sums up ``x^T x`` of what goes into a layer, leaving out masked tokens."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.mask: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        self.mask = (
            mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        )

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask]
        x = x.reshape(-1, x.shape[-1]).float()
        if self.total is None:
            wide = torch.float32 if x.device.type == "mps" else torch.float64
            self.total = torch.zeros(
                x.shape[1], x.shape[1], dtype=wide, device=x.device
            )
        self.total += x.T @ x


class _Seen:
    """What one run shows: who shares an input, which blocks follow each other."""

    def __init__(
        self, linears: dict[str, nn.Module], blocks: list[tuple[str, nn.Module]]
    ) -> None:
        self.linears, self.blocks = linears, blocks
        self.called: list[int] = []
        self.is_chain = True
        self.between = False  # whether a layer outside is called between blocks
        self._order: list[list[str]] = []
        self._input: Any = lambda: None
        self._output: Any = None
        self._outside_after = 0

    def run(self, model: nn.Module, batch: Batch) -> None:
        with ExitStack() as stack:
            for name, module in self.linears.items():
                hook = module.register_forward_pre_hook(
                    self._at_linear(name), with_kwargs=True
                )
                stack.callback(hook.remove)
            for index, (_, module) in enumerate(self.blocks):
                before = module.register_forward_pre_hook(
                    self._at_block(index), with_kwargs=True
                )
                after = module.register_forward_hook(self._after_block)
                stack.callback(before.remove)
                stack.callback(after.remove)
            call(model, batch)
        self._output = None

    def groups(self, blocks: list[tuple[str, nn.Module]]) -> list[Group]:
        """In order of calls; those that were not called stand last in their block."""
        called = {name for names in self._order for name in names}
        found = [Group(names, _block_of(names[0], blocks)) for names in self._order]
        for name in self.linears:
            if name in called:
                continue
            block = _block_of(name, blocks)
            ends = [i for i, group in enumerate(found) if group.block == block]
            found.insert(ends[-1] + 1 if ends else len(found), Group([name], block))
        return found

    def _at_linear(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if any(name in names for names in self._order):
                return
            x = args[0] if args else kwargs["input"]
            block = _block_of(name, self.blocks)
            if block is None and self.called:
                self._outside_after = len(self.called)
            if self._order and self._input() is x:
                same = _block_of(self._order[-1][0], self.blocks)
                if same == block:
                    self._order[-1].append(name)
                    return
            self._order.append([name])
            self._input = weakref.ref(x)

        return hook

    def _at_block(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.called and _first((args, kwargs)) is not _first(self._output):
                self.is_chain = False
            if self._outside_after:
                self.between = True
            self.called.append(index)

        return hook

    def _after_block(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = output


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's forward; transformers' without a cache."""
    signature = inspect.signature(model.forward).parameters
    if "use_cache" in signature:
        batch = {"use_cache": False, **batch}
    if len(batch) == 1 and not _takes(signature, next(iter(batch))):
        return model(*batch.values())  # a plain module: its only input
    return model(**batch)


def _takes(signature: Any, name: str) -> bool:
    kinds = {parameter.kind for parameter in signature.values()}
    return name in signature or inspect.Parameter.VAR_KEYWORD in kinds


def _blocks(
    model: nn.Module, linears: dict[str, nn.Module]
) -> list[tuple[str, nn.Module]]:
    """The members of the outermost ModuleLists that hold any of these layers."""
    found: list[tuple[str, nn.Module]] = []
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        lists.append(name)
        for own, child in module.named_children():
            full = f"{name}.{own}" if name else own
            if any(_is_in(linear, full) for linear in linears):
                found.append((full, child))
    return found


def _is_in(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _block_of(name: str, blocks: list[tuple[str, nn.Module]]) -> int | None:
    for index, (block, _) in enumerate(blocks):
        if _is_in(name, block):
            return index
    return None


def _first(value: Any) -> Any:
    """The first tensor in arguments or an output."""
    return next(_tensors(value), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


@contextmanager
def _handing_out(module: nn.Module, output: Any) -> Iterator[None]:
    """Have a module return this, whatever it is given."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
