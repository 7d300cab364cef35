"""A checkpoint's weights in the shape that decoding wants: few, large, fused matrices.

Prepared once per weight update from the trainer's own module, so there is one definition of the network:
    one product per layer for everything read from the hidden state:  [q_a | kv_a | index key | index head weights]
    one for everything read from the q-latent:                        [absorbed query heads | index queries]
    one for the output:                                               W_uv and o_proj folded over heads
Absorption (DeepSeek-V2, section 2.1.2): q_nope . (W_uk c) = (W_uk^T q_nope) . c, so attention runs on the latents and
no key or value head is ever expanded. RoPE pairs are stored as halves, as `apply_rope` leaves them.

Invariant: all matrices are fp32 and stored [in, out]; results stay within 1e-5 of the trainer's forward.
Shape suffixes: as in model/ops.py; A = padded attention heads, W = C + R (width of an absorbed key).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullarc.config.model import ModelConfig
from fullarc.model import GlmMoeDsa
from fullarc.model.glm import DecoderLayer
from fullarc.model.mla import MLA
from fullarc.model.moe import FFN, MoE, Router
from fullarc.model.ops import rope_tables

HEAD_BLOCK = 4


def padded_heads(config: ModelConfig) -> int:
    """Attention heads rounded up to a multiple of 4: a product of fewer rows would take another kernel."""
    return -(-config.num_attention_heads // HEAD_BLOCK) * HEAD_BLOCK


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention; see the module's docstring. A layer that shares an earlier one's choice has no index_*."""

    norm: Tensor
    hidden: Tensor
    q_norm: Tensor
    kv_norm: Tensor
    index_norm: tuple[Tensor, Tensor] | None
    q: Tensor
    index_q: Tensor | None
    out: Tensor


@dataclass(frozen=True)
class FFNWeights:
    """SwiGLU: `gate_up` [D, 2F] (gate first) and `down` [F, D]."""

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class MoEWeights:
    """Router and stacked experts [E, D, 2F], [E, F, D]; the shared expert sees every token."""

    router: Router
    gate_up: Tensor
    down: Tensor
    shared: FFNWeights | None


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    attention: AttentionWeights
    ffn_norm: Tensor
    ffn: FFNWeights | MoEWeights


@dataclass(frozen=True)
class EngineWeights:
    """Everything a forward pass reads; `version` names it in replies and keys the prefix cache."""

    config: ModelConfig
    version: str
    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor


def _halves(weight: Tensor) -> Tensor:
    """Rows (out) of a projection whose RoPE pairs are interleaved, re-ordered to first members then second ones."""
    return torch.cat((weight[..., 0::2, :], weight[..., 1::2, :]), dim=-2)


def _attention(norm: Tensor, mla: MLA, config: ModelConfig) -> AttentionWeights:
    c, heads = config, config.num_attention_heads
    width = c.kv_lora_rank + c.qk_rope_head_dim
    up_k_HNC, up_v_HVC = (up.double() for up in mla.up_projections())
    q_HdQ = mla.q_b_proj.weight.double().unflatten(0, (heads, c.qk_head_dim))
    absorbed_HCQ = torch.einsum("hnc,hnq->hcq", up_k_HNC, q_HdQ[:, : c.qk_nope_head_dim])
    query_AWQ = q_HdQ.new_zeros(padded_heads(c), width, c.q_lora_rank)
    query_AWQ[:heads, : c.kv_lora_rank] = absorbed_HCQ
    query_AWQ[:heads, c.kv_lora_rank :] = _halves(q_HdQ[:, c.qk_nope_head_dim :])
    query_AWQ *= mla.scale

    out_DHV = mla.o_proj.weight.double().unflatten(1, (heads, c.v_head_dim))
    out_ACD = q_HdQ.new_zeros(padded_heads(c), c.kv_lora_rank, c.hidden_size)
    out_ACD[:heads] = torch.einsum("hvc,dhv->hcd", up_v_HVC, out_DHV)

    kv, index = mla.kv_a_proj_with_mqa.weight, mla.indexer
    hidden = [mla.q_a_proj.weight, kv[: c.kv_lora_rank], _halves(kv[c.kv_lora_rank :])]
    index_norm, index_q = None, None
    if index is not None:
        rope = c.qk_rope_head_dim
        # the index key passes a LayerNorm before RoPE: re-order its rows and the norm's parameters alike
        order = torch.cat((torch.arange(0, rope, 2), torch.arange(1, rope, 2), torch.arange(rope, index.dim)))
        hidden += [
            index.wk.weight[order],
            index.weights_proj.weight * (index.heads * index.dim) ** -0.5,
        ]
        index_norm = index.k_norm.weight[order], index.k_norm.bias[order]
        wq_JdQ = index.wq_b.weight.unflatten(0, (index.heads, index.dim))
        wq_JdQ = torch.cat((_halves(wq_JdQ[:, :rope]), wq_JdQ[:, rope:]), 1)
        index_q = wq_JdQ.flatten(0, 1).T.contiguous()
    return AttentionWeights(
        norm=norm,
        hidden=torch.cat(hidden).T.contiguous(),
        q_norm=mla.q_a_layernorm.weight,
        kv_norm=mla.kv_a_layernorm.weight,
        index_norm=index_norm,
        q=query_AWQ.flatten(0, 1).float().T.contiguous(),
        index_q=index_q,
        out=out_ACD.flatten(0, 1).float(),
    )


def _ffn(ffn: FFN) -> FFNWeights:
    gate_up = torch.cat((ffn.gate_proj.used(), ffn.up_proj.used()))
    return FFNWeights(gate_up.T.contiguous(), ffn.down_proj.used().T.contiguous())


def _moe(moe: MoE) -> MoEWeights:
    shared = None if moe.shared_experts is None else _ffn(moe.shared_experts)
    gate_up, down = moe.experts.used()
    return MoEWeights(moe.gate, gate_up.mT.contiguous(), down.mT.contiguous(), shared)


def _layer(layer: nn.Module, config: ModelConfig) -> LayerWeights:
    assert isinstance(layer, DecoderLayer)
    return LayerWeights(
        _attention(layer.input_layernorm.weight, layer.self_attn, config),
        layer.post_attention_layernorm.weight,
        _moe(layer.mlp) if isinstance(layer.mlp, MoE) else _ffn(layer.mlp),
    )


@torch.no_grad()
def prepare(model: GlmMoeDsa, version: str = "0") -> EngineWeights:
    """Fuse the weights of `model` (any dtype; the engine computes in fp32). The model itself is not kept."""
    model = model.float()
    config = model.config
    layers = tuple(_layer(layer, config) for layer in model.layers)
    positions = torch.arange(config.max_position_embeddings)
    cos, sin = rope_tables(positions, config.qk_rope_head_dim, config.rope_theta)
    head = model.lm_head.weight.T.contiguous()
    return EngineWeights(
        config, version, model.embed_tokens.weight, layers, model.norm.weight, head, cos, sin
    )
