"""Options that take several values after their name: `--bits 2 3 4`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand


class Spread(TyperCommand):
    """A command whose repeatable options also take values one after the other.

    Once the arguments of the command are there, all values up to the next option are
    its own; before, only numbers are, since what follows may be an argument.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(self.params, args))


def spread(params: Sequence[Any], args: Sequence[str]) -> list[str]:
    """The command line with the name of an option before each of its values."""
    options = {
        name: param
        for param in params
        if param.param_type_name == "option"
        for name in param.opts
    }
    needed = sum(p.param_type_name == "argument" and p.required for p in params)
    done: list[str] = []
    left = list(args)
    while left:
        word = left.pop(0)
        done.append(word)
        if word == "--":
            return done + left
        param = options.get(word)
        if param is None:
            needed -= _is_value(word)
        elif not param.is_flag and left:
            done.append(left.pop(0))
            while param.multiple and left and _is_value(left[0]):
                if needed > 0 and not left[0].isdecimal():
                    break
                done += [word, left.pop(0)]
    return done


def _is_value(word: str) -> bool:
    return word == "-" or not word.startswith("-")
