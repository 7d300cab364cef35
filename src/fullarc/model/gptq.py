"""Integers that make up for each other's errors: GPTQ (Frantar et al., arXiv 2210.17323).

Rounding each weight to its nearest integer minimises |W - Q|², but what counts is what the outputs lose, over inputs X
that the model really sees: |(W - Q) X|² = tr((W - Q) H (W - Q)ᵀ), H = X Xᵀ. Columns are rounded one after the other,
those of the largest inputs first, and those that follow take over what a column's error does to the outputs:

    q_i = round(w_i / s),   e = (w_i - s q_i) / U_ii,   w_j -= e U_ij for j > i

with U the upper Cholesky factor of (H + λI)⁻¹, λ a hundredth of H's mean diagonal. Scales are those that are given.

Invariant: where H is a multiple of the identity (inputs that know nothing of each other) it is rounding to nearest.
Shape suffixes: O outputs, I inputs, G groups of inputs that share a scale; D hidden, M tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullarc.model.glm import GlmMoeDsa
from fullarc.model.moe import MoE
from fullarc.model.quant import Linear, QuantScheme

DAMPING = 0.01

Grams = dict[str, Tensor]
"""H [I, I] in fp64, by the name on disk of the module that reads X."""


def compensated(weight: Tensor, scale_OG: Tensor, scheme: QuantScheme, gram_II: Tensor) -> Tensor:
    """Integers [O, I] in int8 for a weight [O, I], its scales, and the Gram matrix of its inputs."""
    half, inputs = 2 ** (scheme.bits - 1), weight.shape[-1]
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    damping = DAMPING * gram_II.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped_II = gram_II[order_I][:, order_I] + damping * torch.eye(inputs, dtype=torch.float64)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    w_OI = weight.double()[:, order_I]
    scale_OI = scale_OG.repeat_interleave(inputs // scale_OG.shape[-1], -1)[:, order_I]
    q_OI = torch.empty_like(w_OI)
    for i in range(inputs):
        steps_O = w_OI[:, i].float() / scale_OI[:, i]  # in fp32, as `quantize` has it
        q_OI[:, i] = steps_O.round().clamp(-half, half - 1)
        error_O = (w_OI[:, i] - scale_OI[:, i] * q_OI[:, i]) / upper_II[i, i]
        w_OI[:, i + 1 :] -= error_O[:, None] * upper_II[i, i + 1 :]
    return torch.empty_like(q_OI).index_copy_(1, order_I, q_OI).to(torch.int8)


@torch.no_grad()
def grams_of(model: GlmMoeDsa, rows: Sequence[Sequence[int]]) -> Grams:
    """Gram matrices of what every matrix of the decoder layers reads while the model reads `rows` of token ids.

    An expert's are of the tokens that are sent to it. A matrix that reads nothing has none.
    """
    grams: Grams = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def add(name: str, x: Tensor) -> None:
        x_MI = x.flatten(0, -2).double()
        grams[name] = grams[name] + x_MI.T @ x_MI

    def linear(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        add(name, given[0])

    def experts(name: str, moe: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(moe, MoE)
        x_MD = given[0].flatten(0, -2)
        _, chosen_MK, _ = moe.gate(x_MD)
        for number, gate_up in enumerate(moe.experts.gate_up_proj):
            x_mD = x_MD[(chosen_MK == number).any(-1)]
            if not len(x_mD):
                continue
            gate, up = F.linear(x_mD, gate_up).chunk(2, -1)
            for part in ("gate_proj", "up_proj"):
                add(f"{name}.experts.{number}.{part}", x_mD)
            add(f"{name}.experts.{number}.down_proj", F.silu(gate) * up)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            hooks.append(module.register_forward_pre_hook(partial(experts, f"model.{name}")))
        elif isinstance(module, Linear):
            hooks.append(module.register_forward_pre_hook(partial(linear, f"model.{name}")))
    try:
        for row in rows:
            model(torch.tensor([row]))
    finally:
        for hook in hooks:
            hook.remove()
    return dict(grams)
