"""What can go wrong when an emulated kernel runs."""

from __future__ import annotations


class EmulationError(RuntimeError):
    """A kernel did what Metal leaves undefined, or what the emulator does not know."""


class OutOfBoundsError(EmulationError):
    """A read or write outside a buffer, a threadgroup variable or an array."""


class RaceError(EmulationError):
    """Two threads touch the same bytes, one writes, and no barrier orders them."""


class DivergenceError(EmulationError):
    """Threads that should meet at a barrier or simdgroup operation do not."""


class AlignmentError(EmulationError):
    """An access, or a buffer's offset, that its type's alignment forbids."""


class ThreadgroupMemoryError(EmulationError):
    """Threadgroup variables of more than 32 KB."""


class UndefinedArithmeticError(EmulationError):
    """Signed overflow, a shift by the type's width or more, a division by zero."""


# In the order of `Failure` in include/runtime.hpp.
FAILURES = (
    None,
    OutOfBoundsError,
    RaceError,
    DivergenceError,
    AlignmentError,
    ThreadgroupMemoryError,
    UndefinedArithmeticError,
    EmulationError,
)
