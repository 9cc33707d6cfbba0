"""Run Metal compute kernels on a CPU, and find what is wrong with them.

See README.md in the folder above for what this proves and what it cannot.
"""

from .errors import (
    AlignmentError,
    DivergenceError,
    EmulationError,
    OutOfBoundsError,
    RaceError,
    ThreadgroupMemoryError,
    UndefinedArithmeticError,
)
from .launches import Launch, Run, Traffic, run
from .shader import Kernel, Library, compile_shader

__all__ = [
    "AlignmentError",
    "DivergenceError",
    "EmulationError",
    "Kernel",
    "Launch",
    "Library",
    "OutOfBoundsError",
    "RaceError",
    "Run",
    "ThreadgroupMemoryError",
    "Traffic",
    "UndefinedArithmeticError",
    "compile_shader",
    "run",
]
