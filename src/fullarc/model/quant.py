"""Symmetric integer quantisation of weights: one kernel for training and for export (GLM-5 section 2.4).

A row of a weight is cut into groups of `group` inputs (0: the whole row, "per channel"), each with one scale s:

    s = max|w| / (2^(b-1) - 1/2)      q = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)      w' = s q

For b = 4 that is max|w| / 7.5 and -8 … 7; ties round to even; a group of zeros has s = eps. This is the rule of
compressed-tensors. All 2^b values are in use, and the only value that is clamped, w = max|w| at q = 7.5, errs by s / 2
as the worst rounding does: |w - w'| <= s / 2 everywhere. So the gradient passes straight through for all of them,
dw'/dw = 1 (Bengio et al. 2013).

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


@dataclass(frozen=True)
class QuantScheme:
    """How a weight is quantised: `bits` (4 or 8) and inputs per scale (`group`; 0 = one scale per row)."""

    bits: int = 4
    group: int = 32

    def groups(self, inputs: int) -> int:
        """Scales per row. Raises FullarcError if the group does not divide the row."""
        if self.group and inputs % self.group:
            raise FullarcError(
                f"A quantisation group of {self.group} does not divide a row of {inputs} weights.",
                "Choose one that does, or 0 for whole rows.",
            )
        return inputs // (self.group or inputs)


def quantize(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Integers [..., O, I] in int8 and scales [..., O, G] in fp32 of a weight [..., O, I]."""
    w_OGg = weight.float().unflatten(-1, (scheme.groups(weight.shape[-1]), -1))
    half = 2 ** (scheme.bits - 1)
    s_OG = w_OGg.abs().amax(-1) / (half - 0.5)
    s_OG = torch.where(s_OG == 0, torch.finfo(torch.float32).eps, s_OG)
    q_OGg = (w_OGg / s_OG[..., None]).round().clamp(-half, half - 1)
    return q_OGg.flatten(-2).to(torch.int8), s_OG


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
    """A product without bias whose weight is stored as it is and used as `scheme` says."""

    scheme: QuantScheme | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def used(self) -> Tensor:
        """The weight that the product uses."""
        return fake_quantize(self.weight, self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.used())


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
