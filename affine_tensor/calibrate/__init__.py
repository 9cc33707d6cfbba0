"""Better bits for the same size: `calibrate_` and `choose_bits`."""

from .api import CalibrationReport, calibrate_
from .sensitivity import Recipe, choose_bits

__all__ = ["CalibrationReport", "Recipe", "calibrate_", "choose_bits"]
