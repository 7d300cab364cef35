"""Which forward pass an engine has: the kernels in C (`engine.native`), or plain torch operators (`engine.core`).

Both compute the same network from the same fused weights, to 1e-5 of each other, and each is reproducible to the bit;
the kernels are several times faster and need a C compiler. Emulated FP8 exists in torch only.
"""

import functools
import sys
from collections.abc import Set
from typing import Any, Protocol

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.engine import native
from fullarc.engine import weights as plain
from fullarc.engine.cache import Latents
from fullarc.engine.core import Chunk, Core
from fullarc.engine.native import NativeCore, NativeWeights, Unavailable, pack
from fullarc.engine.native.library import library
from fullarc.engine.products import DTYPES
from fullarc.engine.trace import Trace
from fullarc.engine.weights import EngineWeights
from fullarc.model import GlmMoeDsa

KERNELS = ("auto", "native", "torch")
NATIVE_DTYPES = ("fp32", "bf16")
Weights = EngineWeights | NativeWeights


class ForwardPass(Protocol):
    """What the scheduler and the drafter need. Rows are in the order of `chunks`; padding may follow."""

    weights: Any  # Weights, of the kind that it was made for

    @property
    def cache(self) -> Latents:
        """What attention remembers."""
        ...

    def forward(self, chunks: list[Chunk], trace: Trace | None = None) -> Tensor:
        """Final hidden states [rows, D]; what the rows chose goes to `trace`."""
        ...

    def look_ahead(self, chunks: list[Chunk], states_ND: Tensor) -> Tensor:
        """The MTP layer's states [rows, D]."""
        ...

    def logits(self, hidden_ND: Tensor, rows: list[int]) -> Tensor:
        """Logits [len(rows), V] of chosen rows."""
        ...


def resolve(kernels: str, dtype: str) -> str:
    """ "native" or "torch". Raises FullarcError for names that do not exist and for what cannot be had."""
    if dtype not in DTYPES:
        raise FullarcError(
            f"The engine does not compute in '{dtype}'.", f"Choose one of: {', '.join(DTYPES)}."
        )
    if kernels not in KERNELS:
        raise FullarcError(f"There are no '{kernels}' kernels.", f"Choose one of: {', '.join(KERNELS)}.")
    if kernels == "torch":
        return "torch"
    if dtype not in NATIVE_DTYPES:
        if kernels == "native":
            raise FullarcError(f"The native kernels do not compute in {dtype}.", "Use kernels='torch'.")
        return "torch"
    try:
        library()
    except Unavailable as error:
        if kernels == "native":
            raise
        _warn(str(error))
        return "torch"
    return "native"


@functools.cache
def _warn(message: str) -> None:
    print(f"{message} Going on without them, several times slower.", file=sys.stderr, flush=True)


def prepare(model: GlmMoeDsa, version: str = "0", dtype: str = "fp32", kernels: str = "auto") -> Weights:
    """The fused weights of `model`, for computing in `dtype`, as the forward pass of `kernels` wants them."""
    make = pack if resolve(kernels, dtype) == "native" else plain.prepare
    return make(model, version, dtype)


def adapt(base: Weights, model: GlmMoeDsa, attention: Set[int], ffn: Set[int]) -> Weights:
    """`base`, but of the layers that are named (the MTP layer after the last) the attention and the FFN of `model`.

    All else is shared with `base`.
    """
    if isinstance(base, NativeWeights):
        return native.adapt(base, model, attention, ffn)
    return plain.adapt(base, model, attention, ffn)


def kernels_of(weights: Weights) -> str:
    """The `kernels` that weights were prepared for."""
    return "native" if isinstance(weights, NativeWeights) else "torch"


def forward_pass(
    weights: Weights, slots: int, max_len: int, mtp: bool = False, threads: int = 1
) -> ForwardPass:
    """The forward pass that `weights` were prepared for, with an empty cache."""
    if isinstance(weights, NativeWeights):
        return NativeCore(weights, slots, max_len, mtp, threads)
    torch.set_num_threads(threads)
    return Core(weights, slots, max_len, mtp)
