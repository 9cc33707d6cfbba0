"""Cases of `architectures.py`."""

from __future__ import annotations

from architectures import Case

CASES: list[Case] = []
