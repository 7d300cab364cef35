"""Symmetric integer quantisation of weights: one kernel for training and for export (GLM-5 section 2.4).

A row of a weight is cut into groups of `group` inputs (0: the whole row, "per channel"), each with one scale s:

    s = max|w| / (2^(b-1) - 1/2)      q = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)      w' = s q

For b = 4 that is max|w| / 7.5 and -8 … 7; ties round to even; a group of zeros has s = eps. This is the rule of
compressed-tensors. All 2^b values are in use, and the only value that is clamped, w = max|w| at q = 7.5, errs by s / 2
as the worst rounding does: |w - w'| <= s / 2 everywhere. So the gradient passes straight through for all of them,
dw'/dw = 1 (Bengio et al. 2013).

A product may also round its inputs: the row of a token is then one group of 8 bits with a scale of its own, found as
it comes (`PER_TOKEN`), so that the product itself is one of integers (`engine.integer`).

Invariant: training uses w' exactly as export and loading make it, through the same integers, bit for bit.
Shapes: weights [..., O, I] outputs and inputs; G groups of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullarc.config.errors import FullarcError

WORD = 32
GRID = tuple(1 - step / 50 for step in range(26))
"""Scales that a search tries, as parts of the one that clamps nothing."""


@dataclass(frozen=True)
class QuantScheme:
    """How a weight is quantised: `bits` (4 or 8) and inputs per scale (`group`; 0 = one scale per row).

    `tokens`: the product rounds its inputs too, to 8 bits with one scale a token; this needs group 0.
    """

    bits: int = 4
    group: int = 32
    tokens: bool = False

    def __post_init__(self) -> None:
        if self.tokens and self.group:
            raise FullarcError(
                f"A group of {self.group} does not go with 8-bit inputs: sums of integers need one scale a row.",
                "Use group 0, or leave the inputs as they are.",
            )

    def groups(self, inputs: int) -> int:
        """Scales per row. Raises FullarcError if the group does not divide the row."""
        if self.group and inputs % self.group:
            raise FullarcError(
                f"A quantisation group of {self.group} does not divide a row of {inputs} weights.",
                "Choose one that does, or 0 for whole rows.",
            )
        return inputs // (self.group or inputs)


PER_TOKEN = QuantScheme(bits=8, group=0)
"""What 8-bit inputs are: rows [..., I] with one scale each."""


def quantize(weight: Tensor, scheme: QuantScheme, shrink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers [..., O, I] in int8 and scales [..., O, G] in fp32 of a weight [..., O, I].

    `shrink` [..., O, G] multiplies the scales: what lies beyond the smaller range is clamped.
    """
    w_OGg = weight.float().unflatten(-1, (scheme.groups(weight.shape[-1]), -1))
    half = 2 ** (scheme.bits - 1)
    s_OG = w_OGg.abs().amax(-1) / (half - 0.5)
    s_OG = s_OG if shrink is None else s_OG * shrink
    s_OG = torch.where(s_OG == 0, torch.finfo(torch.float32).eps, s_OG)
    q_OGg = (w_OGg / s_OG[..., None]).round().clamp(-half, half - 1)
    return q_OGg.flatten(-2).to(torch.int8), s_OG


def quantize_best(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """`quantize` with, for each scale, the one of GRID that leaves the least squared error."""
    best, shrink = None, None
    for factor in GRID:
        tried = torch.full((*weight.shape[:-1], scheme.groups(weight.shape[-1])), factor)
        error = (dequantize(*quantize(weight, scheme, tried)) - weight.float()).square()
        error_OG = error.unflatten(-1, (tried.shape[-1], -1)).sum(-1)
        if best is None or shrink is None:
            best, shrink = error_OG, tried
        shrink = torch.where(error_OG < best, tried, shrink)
        best = torch.minimum(best, error_OG)
    return quantize(weight, scheme, shrink)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The weight w' = s q in fp32; the group is what the shapes imply."""
    return (q.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    """w' forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: QuantScheme) -> Tensor:
        return dequantize(*quantize(weight, scheme)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def fake_quantize(weight: Tensor, scheme: QuantScheme | None) -> Tensor:
    """What a quantised model would compute with in place of `weight`, differentiable; None: the weight itself."""
    return weight if scheme is None else _StraightThrough.apply(weight, scheme)


class Linear(nn.Linear):
    """A product without bias, in the dtype of its input; the weight is stored as it is and used as `scheme` says.

    `scale` [O, 1] is set where a checkpoint's product is one of integers: the weight is then scale times integers, and
    inputs are rounded to 8 bits, token by token.
    """

    scheme: QuantScheme | None = None
    scale: Tensor | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def used(self) -> Tensor:
        """The weight that the product uses."""
        return fake_quantize(self.weight, self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded(x, self.scale), self.used().to(x.dtype))


def rounded(x: Tensor, scale: Tensor | None) -> Tensor:
    """The inputs [..., I] of a product as it uses them: 8 bits a token where the product has a `scale`."""
    return x if scale is None else fake_quantize(x, PER_TOKEN)


# --- words ------------------------------------------------------------------------------------------


def pack(q: Tensor, bits: int) -> Tensor:
    """Integers [..., I] as int32 words [..., ceil(I * bits / 32)], as compressed-tensors' pack-quantized has them.

    Each value is stored as q + 2^(bits-1); the first of a word lies in its lowest bits; the last word is filled
    with zero bits.
    """
    count = WORD // bits
    fields = q.to(torch.int32) + 2 ** (bits - 1)
    fields = F.pad(fields, (0, -fields.shape[-1] % count)).unflatten(-1, (-1, count))
    return (fields << _shifts(bits, q.device)).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The first `inputs` integers of each row of words, in int8: the inverse of `pack`."""
    fields = (words[..., None] >> _shifts(bits, words.device)) & (2**bits - 1)
    return (fields.flatten(-2)[..., :inputs] - 2 ** (bits - 1)).to(torch.int8)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, WORD, bits, dtype=torch.int32, device=device)
