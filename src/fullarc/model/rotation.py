"""Rotations that spread outliers before quantisation and cost nothing while running (QuaRot, arXiv 2404.00456).

A product's rounding step is set by the largest of its inputs. Turning the inputs by an orthogonal R and the weights
against it, (x R) (R^T W), changes nothing but spreads what was large in one place over all. R is a Hadamard matrix with
random signs (in blocks, where the size is not a power of two), and three of GLM-5's seams take it into the weights:

    q-latent    q_a_proj, its norm, q_b_proj and the indexer's wq_b    RMSNorm(R^T z) = R^T RMSNorm(z): its scale first
    kv-latent   kv_a_proj_with_mqa, its norm, kv_b_proj                moves into the products that read it
    values      kv_b_proj and o_proj, head by head                     attention is linear in them

The residual stream is a fourth in other networks, but trunk and MTP layer share one output layer behind two norms, and
that layer cannot take in both scales. What SwiGLU hands to down_proj could only be turned while running.

Invariant: the network computes the same function, up to rounding (tests/model/test_rotation.py).
"""

import torch
from torch import Tensor

from fullarc.config.model import ModelConfig
from fullarc.config.seeds import derive


def hadamard(size: int, seed: int) -> Tensor:
    """An orthogonal matrix [size, size] in fp64: Hadamard blocks of the largest power of two, rows' signs drawn."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1))) / 2**0.5
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.block_diag(*[block] * (size // len(block))) * signs


def rotate(tensors: dict[str, Tensor], config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose latents and values are turned, layer by layer; each keeps its dtype."""
    out = dict(tensors)
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        name = f"model.layers.{layer}.self_attn"
        part = {
            tail: out[f"{name}.{tail}.weight"].double() for tail in _TAILS if f"{name}.{tail}.weight" in out
        }
        _rotate_layer(part, config, derive(seed, "rotation", layer) % 2**62)
        out |= {
            f"{name}.{tail}.weight": value.to(out[f"{name}.{tail}.weight"].dtype)
            for tail, value in part.items()
        }
    return out


_TAILS = (
    "q_a_proj", "q_a_layernorm", "q_b_proj", "indexer.wq_b", "kv_a_proj_with_mqa", "kv_a_layernorm",
    "kv_b_proj", "o_proj",
)  # fmt: skip


def _rotate_layer(w: dict[str, Tensor], c: ModelConfig, seed: int) -> None:
    """One layer's attention in place, in fp64."""
    turn_Q, turn_C = hadamard(c.q_lora_rank, seed), hadamard(c.kv_lora_rank, seed + 1)
    turn_V = hadamard(c.v_head_dim, seed + 2)

    w["q_a_proj"] = turn_Q.T @ w["q_a_proj"]
    for reader in {"q_b_proj", "indexer.wq_b"} & w.keys():
        w[reader] = w[reader] * w["q_a_layernorm"] @ turn_Q
    w["q_a_layernorm"] = torch.ones_like(w["q_a_layernorm"])

    latent, rope = w["kv_a_proj_with_mqa"].split((c.kv_lora_rank, c.qk_rope_head_dim))
    w["kv_a_proj_with_mqa"] = torch.cat((turn_C.T @ latent, rope))
    up = w["kv_b_proj"] * w["kv_a_layernorm"] @ turn_C
    w["kv_a_layernorm"] = torch.ones_like(w["kv_a_layernorm"])

    up_k, up_v = up.unflatten(0, (c.num_attention_heads, -1)).split((c.qk_nope_head_dim, c.v_head_dim), 1)
    w["kv_b_proj"] = torch.cat((up_k, turn_V.T @ up_v), 1).flatten(0, 1)
    w["o_proj"] = (w["o_proj"].unflatten(1, (c.num_attention_heads, -1)) @ turn_V).flatten(1)
