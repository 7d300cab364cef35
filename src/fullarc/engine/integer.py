"""Products of integers: W8A8 and W4A8 as sums of 8-bit products, by operators that come with torch (oneDNN).

    q_x, s_x = 8 bits and a scale for each token           y[n, o] = s_x[n] (s_w[o] sum_i q_x[n, i] q_w[o, i])

A sum of integers is exact, so it does not depend on the order of its terms: a row's result is the same whatever else is
computed with it, whatever the kernel. That holds for fp32 too while no sum can pass 2^24, and small products are
quicker there. So there are two ways, and they give the same bits:
    packed   int8 weights and 32-bit sums, from `PAYS` weights on and wherever fp32 could not be exact
    floats   the same integers as fp32
4-bit weights lie in int8 as well: what they save is on disk, and from disk.

The operator wants unsigned inputs: for signed ones oneDNN has no vector code without AMX, and is a thousand times
slower. q_x + 128 with zero point 128 is the same sum. On a processor without VNNI such sums can saturate; `packs`
finds out, and sums then go through `torch._int_mm`.

Invariant: equal to the product in int64, scaled in fp32 (tests/engine/test_integer.py).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 2**24
PAYS = 2**19
"""Weights from which int8 beats fp32 for the engine's 32 rows a step (one core with AVX512-VNNI; docs/log.md)."""
_EPS = torch.finfo(torch.float32).eps


def round_tokens(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [N, I], as fp32, and scales [N, 1] of the rows: `model.quant.quantize` by token, in fewer steps."""
    s_N1 = torch.linalg.vector_norm(x_NI, torch.inf, -1, keepdim=True).div_(127.5)
    s_N1.masked_fill_(s_N1 == 0, _EPS)
    return (x_NI / s_N1).round_().clamp_(-128, 127), s_N1


class Integer:
    """A product with integer weights and inputs: [N, I] -> [N, O].

    Args:
        weight: [O, I] in fp32, scale times integers.
        scale: [O, 1].
        packed: which of the two ways; None: as measured.
    """

    def __init__(self, weight: Tensor, scale: Tensor, packed: bool | None = None) -> None:
        q_OI = (weight / scale).round()
        exact = weight.shape[1] * 128 * float(q_OI.abs().max()) <= EXACT
        assert exact or packed is not False
        self.packed = not exact or (weight.numel() >= PAYS if packed is None else packed)
        self.scale_O = scale.flatten().contiguous()
        self.q = _pack(q_OI.to(torch.int8)) if self.packed else q_OI.T.contiguous()

    def __call__(self, x_NI: Tensor) -> Tensor:
        q_NI, s_N1 = round_tokens(x_NI)
        if self.packed:
            return _sums(q_NI, self.q, self.scale_O).mul_(s_N1)
        return torch.mm(q_NI, self.q).mul_(self.scale_O).mul_(s_N1)


class IntegerExperts:
    """The same for stacked experts: rows [P, I], sorted by expert, and the runs' ends [E] -> [P, O]."""

    def __init__(self, weight: Tensor, scale: Tensor, packed: bool | None = None) -> None:
        q_EOI = (weight / scale).round()
        exact = weight.shape[2] * 128 * float(q_EOI.abs().max()) <= EXACT
        assert exact or packed is not False
        self.packed = not exact or (weight[0].numel() >= PAYS if packed is None else packed)
        self.scale_EO = scale.flatten(1).contiguous()
        self.q = [_pack(q_OI) for q_OI in q_EOI.to(torch.int8)] if self.packed else q_EOI.mT.contiguous()

    def __call__(self, x_PI: Tensor, ends_E: Tensor) -> Tensor:
        q_PI, s_P1 = round_tokens(x_PI)
        if isinstance(self.q, list):
            out_PO = x_PI.new_empty(len(x_PI), self.scale_EO.shape[1])
            start = 0
            for expert, end in enumerate(ends_E.tolist()):
                if end > start:
                    out_PO[start:end] = _sums(q_PI[start:end], self.q[expert], self.scale_EO[expert])
                start = end
            return out_PO.mul_(s_P1)
        counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        scale_PO = self.scale_EO.repeat_interleave(counts_E, dim=0, output_size=len(x_PI))
        return F.grouped_mm(q_PI, self.q, offs=ends_E).mul_(scale_PO).mul_(s_P1)


# --- oneDNN -------------------------------------------------------------------------------------------


@functools.cache
def packs() -> bool:
    """Whether oneDNN's sums are exact on this processor, tried with the largest that there can be."""
    q_OI = torch.full((16, 256), 127, dtype=torch.int8)
    q_OI[8:] = -128
    x_NI = torch.full((2, 256), 127.0)
    x_NI[1] = -128
    try:
        packed = torch.ops.onednn.qlinear_prepack(q_OI, None)
        return torch.equal(_onednn(x_NI, packed, torch.ones(16)), x_NI @ q_OI.T.float())
    except (RuntimeError, AttributeError):
        return False


def _pack(q_OI: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(q_OI, None) if packs() else q_OI.T.contiguous()


def _sums(q_NI: Tensor, weight: Tensor, scale_O: Tensor) -> Tensor:
    """s_w[o] sum_i q_x q_w in fp32, of inputs that are whole numbers."""
    if packs():
        return _onednn(q_NI, weight, scale_O)
    rows = F.pad(q_NI, (0, 0, 0, max(0, 32 - len(q_NI)))).to(torch.int8)
    return torch._int_mm(rows, weight)[: len(q_NI)].float().mul_(scale_O)


def _onednn(q_NI: Tensor, packed: Tensor, scale_O: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        (q_NI + 128).to(torch.uint8), 1.0, 128, packed, scale_O, _zeros(len(scale_O)), None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip


@functools.cache
def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)
