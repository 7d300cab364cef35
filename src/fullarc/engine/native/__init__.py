"""The forward pass in C: one call a step, no result of a row depends on any other row (matrix.h says why)."""

from fullarc.engine.native.core import NativeCore
from fullarc.engine.native.library import Unavailable, available
from fullarc.engine.native.weights import NativeWeights, adapt, pack

__all__ = ["NativeCore", "NativeWeights", "Unavailable", "adapt", "available", "pack"]
