"""The engine's matrix products in floating point, one class per precision; those of integers are in `engine.integer`.

    fp32    weights and inputs as they are
    bf16    both rounded to bf16, sums in fp32, results rounded to bf16: half the memory
    fp8     what an FP8 rollout computes, emulated: e4m3 with one scale for 128 x 128 weights and for 128 inputs of a
            token (as DeepSeek-V3 and GLM-5 serve); the products themselves are fp32

A product maps rows [N, I] to [N, O]; of stacked experts, rows sorted by expert and the runs' ends [E] to [P, O].
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = ("fp32", "bf16", "fp8")
Product = Callable[[Tensor], Tensor]
Grouped = Callable[[Tensor, Tensor], Tensor]

FP8_BLOCK = 128
_FP8 = torch.float8_e4m3fn


class Dense:
    """x W in the dtype of `weight` [O, I], stored [I, O]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.T.contiguous()

    def __call__(self, x_NI: Tensor) -> Tensor:
        return torch.mm(x_NI.to(self.weight.dtype), self.weight).float()


class DenseExperts:
    """The same for stacked experts `weight` [E, O, I]; sizes are padded to whole 16 bytes, as the operator asks."""

    def __init__(self, weight: Tensor) -> None:
        unit = 16 // weight.itemsize
        self.outputs, self.padding = weight.shape[1], -weight.shape[2] % unit
        self.weight = F.pad(weight.mT, (0, -self.outputs % unit, 0, self.padding)).contiguous()

    def __call__(self, x_PI: Tensor, ends_E: Tensor) -> Tensor:
        x_PI = x_PI.to(self.weight.dtype)
        if self.padding:
            x_PI = F.pad(x_PI, (0, self.padding))
        return F.grouped_mm(x_PI, self.weight, offs=ends_E)[:, : self.outputs].float()


class FP8(Dense):
    """A product with e4m3 weights and inputs, emulated."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(round_fp8(weight, FP8_BLOCK, FP8_BLOCK))

    def __call__(self, x_NI: Tensor) -> Tensor:
        return super().__call__(round_fp8(x_NI, 1, FP8_BLOCK))


class FP8Experts(DenseExperts):
    """The same for stacked experts."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.stack([round_fp8(expert, FP8_BLOCK, FP8_BLOCK) for expert in weight]))

    def __call__(self, x_PI: Tensor, ends_E: Tensor) -> Tensor:
        return super().__call__(round_fp8(x_PI, 1, FP8_BLOCK), ends_E)


class Joined:
    """Several products of the same rows, side by side."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products

    def __call__(self, x_NI: Tensor) -> Tensor:
        return torch.cat([product(x_NI) for product in self.products], -1)


def round_fp8(x: Tensor, rows: int, columns: int) -> Tensor:
    """fp32 values [N, I] after e4m3 with one scale, max|x| / 448, for each block of `rows` x `columns`."""
    (n, i), top = x.shape, torch.finfo(_FP8).max
    blocks = (
        F.pad(x.float(), (0, -i % columns, 0, -n % rows)).unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    )
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / top
    return ((blocks / scale).to(_FP8).float() * scale).flatten(2, 3).flatten(0, 1)[:n, :i]
