"""A start with induction heads: the first two layers begin by finding what followed the same tokens before.

An induction head (Olsson et al. 2022) answers "A B … A" with "B". Everything an agent does with names rests on it, and
from random weights it forms abruptly, after more tokens than a laptop's arc has (docs/log.md holds the ablation). So
the small sizes begin with one, in the spirit of mimetic initialisation (Trockman and Kolter 2023). Only the start is
set: every weight is trained afterwards, and the architecture is GLM-5's.

    layer 0, head b = 0, 1    attends to position i - 1 - b and writes a few coordinates of that token's embedding
    layer 1, head 0           at i looks for positions j whose previous token, as written by layer 0, equals token i
    layer 1, head 1           the same one token further apart: token j - 2 equals token i - 1
    both                      write coordinates of token j, and the output layer begins by reading them

Shapes: D hidden, H heads, C kv-latent, Q q-latent, R rope, P pairs (R / 2), n coordinates that are compared.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig

if TYPE_CHECKING:
    from fullarc.model.glm import DecoderLayer, GlmMoeDsa
    from fullarc.model.mla import MLA

CONSTANT_SHARE = 1 / 16  # share of an embedding's coordinates that hold CONSTANT in every token
CONSTANT = 2.0
POSITION_GAP = 8.0  # by how much the score of the position looked at exceeds its neighbours'
MATCH = 14.0  # score of an equal token; others' scores have mean 0
READOUT = 0.05  # weight with which the output layer begins to read what was copied


@torch.no_grad()
def start_with_induction(model: "GlmMoeDsa", generator: torch.Generator) -> None:
    """Overwrite parts of a freshly drawn model. Raises FullarcError if it has no room for the heads."""
    config = model.config
    d, latent, value = config.hidden_size, config.kv_lora_rank, config.v_head_dim
    constants = max(1, round(d * CONSTANT_SHARE))
    n = min(config.qk_nope_head_dim, value, config.q_lora_rank // 2, latent // 3, (d - constants) // 4)
    copied = min(value, latent - 2 * n, d - constants - 2 * n)
    if config.gqa_kv_heads:
        raise FullarcError(
            "A start with induction heads is made for latent attention, not for grouped queries.",
            "Set stages.pretrain.induction = false.",
        )
    if config.num_hidden_layers < 2 or config.num_attention_heads < 2 or n < 1:
        raise FullarcError(
            "A start with induction heads needs two layers, two heads and a kv_lora_rank of at least 3.",
            "Set stages.pretrain.induction = false.",
        )
    first, second = (cast("MLA", cast("DecoderLayer", layer).self_attn) for layer in model.layers[:2])

    def directions(count: int) -> Tensor:
        """`count` orthonormal columns [D, count], clear of the constant coordinates."""
        basis = torch.linalg.qr(torch.randn(d - constants, count, generator=generator)).Q
        return torch.cat((torch.zeros(constants, count), basis))

    model.embed_tokens.weight[:, :constants] = CONSTANT
    _look_back(first, config, constants)
    previous_Dn, before_Dn, output_DK = directions(2 * n + copied).split((n, n, copied), 1)
    compared_Dn, content_DK = directions(n), directions(copied)

    first.kv_a_proj_with_mqa.weight[:n] = compared_Dn.T
    for head, target_Dn in enumerate((previous_Dn, before_Dn)):
        _copy_latents(first, head, slice(0, n), target_Dn)

    second.kv_a_proj_with_mqa.weight[: 2 * n] = torch.cat((previous_Dn, before_Dn), 1).T
    second.kv_a_proj_with_mqa.weight[2 * n : 2 * n + copied] = content_DK.T
    second.q_a_proj.weight[: 2 * n] = torch.cat((compared_Dn, previous_Dn), 1).T
    q_b_HdQ = second.q_b_proj.weight.view(config.num_attention_heads, -1, config.q_lora_rank)
    for head in range(2):
        part = slice(head * n, (head + 1) * n)
        _copy_latents(second, head, slice(2 * n, 2 * n + copied), output_DK)
        q_b_HdQ[head] = 0.0
        q_b_HdQ[head, :n, part] = MATCH / (n * second.scale) * torch.eye(n)
        second.up_projections()[0][head, :n, part] = torch.eye(n)
    model.lm_head.weight += READOUT * model.embed_tokens.weight @ content_DK @ output_DK.T


def _look_back(attention: "MLA", config: ModelConfig, constants: int) -> None:
    """Point head b = 0, 1 at position i - 1 - b, given that `constants` coordinates are the same in all tokens.

    A score by position alone needs a part of q and k that all tokens share, and MLA has no biases: the constant
    coordinates stand in for them. The rotated parts are then k = (1, 0) in every pair and q = k turned back, whose
    product sum_f w_f cos(theta_f (i - 1 - b - j)) is largest where wanted. w_f = theta_f^(1/4): slow pairs hardly tell
    neighbours apart, and amplify that the norms of tokens differ.
    """
    d, rope, nope, rank = (
        config.hidden_size, config.qk_rope_head_dim, config.qk_nope_head_dim, config.q_lora_rank,
    )  # fmt: skip
    direction_D = torch.zeros(d)
    direction_D[:constants] = constants**-0.5
    theta_P = config.rope_theta ** (-torch.arange(0, rope, 2, dtype=torch.float32) / rope)
    weight_P = theta_P**0.25
    key_R = torch.tensor([1.0, 0.0]).repeat(rope // 2)
    # the size of k along direction_D, after the layer's norm, and of the first q-latent, after its norm
    key = CONSTANT * constants**0.5 / ((constants * CONSTANT**2 + d - constants) / d) ** 0.5
    others = config.initializer_range**2 * d * (rank - 1)
    query = key / ((key**2 + others) / rank) ** 0.5
    slope = POSITION_GAP / (weight_P * (1 - theta_P.cos())).sum() / (attention.scale * key * query)
    attention.kv_a_proj_with_mqa.weight[config.kv_lora_rank :] = torch.outer(key_R, direction_D)
    attention.q_a_proj.weight[0] = direction_D
    q_b_HdQ = attention.q_b_proj.weight.view(attention.heads, -1, rank)
    for head in range(2):
        turn_P = theta_P * (head + 1)
        query_R = torch.stack((turn_P.cos(), -turn_P.sin()), -1) * weight_P[:, None]
        q_b_HdQ[head, :nope] *= 0.1
        q_b_HdQ[head, nope:] = 0.0
        q_b_HdQ[head, nope:, 0] = slope * query_R.flatten()


def _copy_latents(attention: "MLA", head: int, part: slice, target_DK: Tensor) -> None:
    """Let a head write the `part` of the attended latents along the columns of `target_DK`, and nothing else."""
    width = target_DK.shape[1]
    up_VC = attention.up_projections()[1][head]
    up_VC.zero_()
    up_VC[:width, part] = torch.eye(width)
    out_DV = attention.o_proj.weight.view(-1, attention.heads, attention.value)[:, head]
    out_DV.zero_()
    out_DV[:, :width] = target_DK
