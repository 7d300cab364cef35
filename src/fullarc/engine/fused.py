"""A checkpoint's weights in the shape that decoding wants: few, large, fused matrices. Both forward passes use them.

    one product per layer for everything read from the hidden state:  [q_a | kv_a | index key | index head weights]
    one for everything read from the q-latent:                        absorbed query heads; index queries
    one for the output:                                               W_uv and o_proj folded over heads
Absorption (DeepSeek-V2, section 2.1.2): q_nope . (W_uk c) = (W_uk^T q_nope) . c, so attention runs on the latents and
no key or value head is ever expanded. RoPE pairs are stored as halves, as `apply_rope` leaves them.

Integer and FP8 matrices cannot be folded, as their products round their inputs: there query heads are absorbed and
the outputs expanded by products of their own (`up`). Router, norms, indexer and output layer are fp32 in every
precision but bf16, where only the output layer is not.

There is one definition of the network: everything is derived from the trainer's own module.
Shape suffixes: as in model/ops.py; W = C + R (width of an absorbed key).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig
from fullarc.model import GlmMoeDsa
from fullarc.model.glm import DecoderLayer, MTPLayer
from fullarc.model.mla import MLA
from fullarc.model.moe import FFN, MoE, Router
from fullarc.model.quant import Linear


@dataclass(frozen=True)
class Part:
    """Rows [O, I] of a product. `scale` [O, 1]: of integers; `exact`: fp32 whatever the others are."""

    weight: Tensor
    scale: Tensor | None = None
    exact: bool = False

    @classmethod
    def of(cls, linear: Linear) -> "Part":
        """A linear layer's, as its product uses it."""
        return cls(linear.used(), linear.scale)

    def at(self, order: Tensor | slice) -> "Part":
        """Some rows, or all in another order."""
        return Part(self.weight[order], None if self.scale is None else self.scale[order], self.exact)

    def kind(self, dtype: str) -> str:
        """What it is computed in where the engine computes in `dtype`: a dtype, or "integer"."""
        if self.scale is not None:
            return "integer"
        return "fp32" if self.exact else dtype


@dataclass(frozen=True)
class Heads:
    """A product to or from attention heads, and where it cannot be folded what lies between it and the latents.

    Attributes:
        part: of queries [H * d, Q], of outputs [D, H * d].
        up: W_uk [H, N, C] of queries, W_uv [H, V, C] of outputs; None where it is folded in (then d = W or C).
    """

    part: Part
    up: Tensor | None


@dataclass(frozen=True)
class FusedAttention:
    """One layer's attention. A layer that shares an earlier one's choice has no index_*.

    Attributes:
        hidden: q_a, kv_a (latent, then RoPE), index key, head weights, each a part of its own.
        index_q: [J, I, Q].
        scale: of the scores; folded queries have it already.
    """

    norm: Tensor
    q_norm: Tensor
    kv_norm: Tensor
    index_norm: tuple[Tensor, Tensor] | None
    hidden: list[Part]
    index_q: Tensor | None
    queries: Heads
    outputs: Heads
    scale: float


@dataclass(frozen=True)
class FusedFFN:
    """SwiGLU: gate and up D -> F, down F -> D."""

    gate: Part
    up: Part
    down: Part


@dataclass(frozen=True)
class FusedMoE:
    """Router, stacked experts (gate_up [E, 2F, D], gate first; down [E, D, F]), and the shared expert."""

    router: Router
    gate_up: Part
    down: Part
    shared: FusedFFN | None


@dataclass(frozen=True)
class FusedLayer:
    """One decoder layer."""

    attention: FusedAttention
    ffn_norm: Tensor
    ffn: FusedFFN | FusedMoE


@dataclass(frozen=True)
class FusedMTP:
    """The MTP layer: `join` 2D -> D of [embedding; state], one decoder layer, and the norm of what it carries on."""

    enorm: Tensor
    hnorm: Tensor
    join: Part
    layer: FusedLayer
    norm: Tensor


def _halved(size: int, start: int) -> Tensor:
    """Order of `size` rows whose RoPE pairs from `start` on are interleaved, with their halves one after the other."""
    rope = torch.arange(start, size)
    return torch.cat((torch.arange(start), rope[0::2], rope[1::2]))


def _attention(norm: Tensor, mla: MLA, c: ModelConfig, dtype: str) -> FusedAttention:
    index = mla.indexer
    kv = Part.of(mla.kv_a_proj_with_mqa).at(_halved(c.kv_lora_rank + c.qk_rope_head_dim, c.kv_lora_rank))
    hidden = [Part.of(mla.q_a_proj), kv]
    index_norm, index_q = None, None
    if index is not None:
        rope = c.qk_rope_head_dim
        # the index key passes a LayerNorm before RoPE: re-order its rows and the norm's parameters alike
        order = torch.cat((_halved(rope, 0), torch.arange(rope, index.dim)))
        head_weights = index.weights_proj.weight * (index.heads * index.dim) ** -0.5
        hidden += [Part(index.wk.weight[order], exact=True), Part(head_weights, exact=True)]
        index_norm = index.k_norm.weight[order], index.k_norm.bias[order]
        index_q = index.wq_b.weight.unflatten(0, (index.heads, index.dim))[:, order]
    return FusedAttention(
        norm=norm,
        q_norm=mla.q_a_layernorm.weight,
        kv_norm=mla.kv_a_layernorm.weight,
        index_norm=index_norm,
        hidden=hidden,
        index_q=index_q,
        queries=_queries(mla, c, dtype),
        outputs=_outputs(mla, c, dtype),
        scale=mla.scale,
    )


def _queries(mla: MLA, c: ModelConfig, dtype: str) -> Heads:
    """q_b_proj and W_uk, folded over heads where no rounding lies between them."""
    heads, rows = c.num_attention_heads, _halved(c.qk_head_dim, c.qk_nope_head_dim)
    part = Part.of(mla.q_b_proj).at((torch.arange(heads)[:, None] * c.qk_head_dim + rows).flatten())
    up_HNC = mla.up_projections()[0]
    if part.kind(dtype) in ("integer", "fp8"):
        return Heads(part, up_HNC)
    q_HdQ = part.weight.double().unflatten(0, (heads, c.qk_head_dim))
    latent_HCQ = torch.einsum("hnc,hnq->hcq", up_HNC.double(), q_HdQ[:, : c.qk_nope_head_dim])
    folded_HWQ = torch.cat((latent_HCQ, q_HdQ[:, c.qk_nope_head_dim :]), 1) * mla.scale
    return Heads(Part(folded_HWQ.flatten(0, 1).float()), None)


def _outputs(mla: MLA, c: ModelConfig, dtype: str) -> Heads:
    """W_uv and o_proj, folded over heads where no rounding lies between them."""
    heads, part, up_HVC = c.num_attention_heads, Part.of(mla.o_proj), mla.up_projections()[1]
    if part.kind(dtype) in ("integer", "fp8"):
        return Heads(part, up_HVC)
    out_DHV = part.weight.double().unflatten(1, (heads, c.v_head_dim))
    folded_DHC = torch.einsum("hvc,dhv->dhc", up_HVC.double(), out_DHV)
    return Heads(Part(folded_DHC.flatten(1).float()), None)


def _ffn(ffn: FFN) -> FusedFFN:
    return FusedFFN(Part.of(ffn.gate_proj), Part.of(ffn.up_proj), Part.of(ffn.down_proj))


def _moe(moe: MoE) -> FusedMoE:
    gate_up, down = (
        Part(weight, scale) for weight, scale in zip(moe.experts.used(), moe.experts.scales, strict=True)
    )
    return FusedMoE(moe.gate, gate_up, down, None if moe.shared_experts is None else _ffn(moe.shared_experts))


def _layer(layer: nn.Module, config: ModelConfig, dtype: str) -> FusedLayer:
    assert isinstance(layer, DecoderLayer) and isinstance(layer.self_attn, MLA)
    return FusedLayer(
        _attention(layer.input_layernorm.weight, layer.self_attn, config, dtype),
        layer.post_attention_layernorm.weight,
        _moe(layer.mlp) if isinstance(layer.mlp, MoE) else _ffn(layer.mlp),
    )


def _mtp(mtp: MTPLayer, config: ModelConfig, dtype: str) -> FusedMTP:
    join = Part(mtp.eh_proj.weight)
    return FusedMTP(mtp.enorm.weight, mtp.hnorm.weight, join, _layer(mtp, config, dtype), mtp.norm.weight)


def fuse(model: GlmMoeDsa, dtype: str) -> tuple[list[FusedLayer], FusedMTP | None]:
    """The decoder layers of `model` (in fp32) for computing in `dtype`, and the MTP layer if it can draft.

    Raises FullarcError for one of the paper's comparison attentions.
    """
    if model.config.variant:
        raise FullarcError(
            f"The engine serves GLM-5's attention, not {model.config.variant}.",
            "Such a model is for comparisons: score it with its own forward pass.",
        )
    layers = [_layer(layer, model.config, dtype) for layer in model.layers]
    # separate layers for each step are for comparisons: nothing is drafted with them
    mtp = _mtp(model.mtp_layers[0], model.config, dtype) if len(model.mtp_layers) == 1 else None
    return layers, mtp
