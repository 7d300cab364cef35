"""A checkpoint's weights in the shape that decoding wants: few, large, fused matrices.

Prepared once per weight update from the trainer's own module, so there is one definition of the network:
    one product per layer for everything read from the hidden state:  [q_a | kv_a | index key | index head weights]
    one for everything read from the q-latent:                        [absorbed query heads | index queries]
    one for the output:                                               W_uv and o_proj folded over heads
Absorption (DeepSeek-V2, section 2.1.2): q_nope . (W_uk c) = (W_uk^T q_nope) . c, so attention runs on the latents and
no key or value head is ever expanded. RoPE pairs are stored as halves, as `apply_rope` leaves them.

Integer and FP8 matrices cannot be folded, as their products round their inputs: there the query heads are absorbed and
the outputs expanded by products of their own (`AbsorbedQueries`, `ExpandedValues`). Router, norms, indexer and output
layer are fp32 in every precision but bf16, where only the output layer is not.

Invariant: in fp32 results stay within 1e-5 of the trainer's forward.
Shape suffixes: as in model/ops.py; A = padded attention heads, W = C + R (width of an absorbed key).
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig
from fullarc.engine.integer import Integer, IntegerExperts
from fullarc.engine.products import (
    FP8,
    Dense,
    DenseExperts,
    FP8Experts,
    Grouped,
    Joined,
    Product,
)
from fullarc.model import GlmMoeDsa
from fullarc.model.glm import DecoderLayer, MTPLayer
from fullarc.model.mla import MLA
from fullarc.model.moe import FFN, MoE, Router
from fullarc.model.ops import rope_tables
from fullarc.model.quant import Linear

HEAD_BLOCK = 4


def padded_heads(config: ModelConfig) -> int:
    """Attention heads rounded up to a multiple of 4: a product of fewer rows would take another kernel."""
    return -(-config.num_attention_heads // HEAD_BLOCK) * HEAD_BLOCK


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention; see the module's docstring. A layer that shares an earlier one's choice has no index_*."""

    norm: Tensor
    hidden: Product
    q_norm: Tensor
    kv_norm: Tensor
    index_norm: tuple[Tensor, Tensor] | None
    q: Product
    index_q: Product | None
    out: Product


@dataclass(frozen=True)
class FFNWeights:
    """SwiGLU: `gate_up` D -> 2F (gate first) and `down` F -> D."""

    gate_up: Product
    down: Product


@dataclass(frozen=True)
class MoEWeights:
    """Router and stacked experts D -> 2F, F -> D; the shared expert sees every token."""

    router: Router
    gate_up: Grouped
    down: Grouped
    shared: FFNWeights | None


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    attention: AttentionWeights
    ffn_norm: Tensor
    ffn: FFNWeights | MoEWeights


@dataclass(frozen=True)
class MTPWeights:
    """The MTP layer: `join` 2D -> D of [embedding; state], one decoder layer, and the norm of what it carries on."""

    enorm: Tensor
    hnorm: Tensor
    join: Product
    layer: LayerWeights
    norm: Tensor


@dataclass(frozen=True)
class EngineWeights:
    """Everything a forward pass reads; `version` names it in replies and keys the prefix cache."""

    config: ModelConfig
    version: str
    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Product
    cos: Tensor
    sin: Tensor
    dtype: str = "fp32"
    mtp: MTPWeights | None = None


class AbsorbedQueries:
    """q-latents [N, Q] to absorbed query heads [N, A * W], where q_b_proj is a product of its own.

    Args:
        q: the product, RoPE pairs as halves.
        up_HNC: W_uk.
    """

    def __init__(self, q: Product, up_HNC: Tensor, config: ModelConfig, scale: float) -> None:
        self.q, self.up_HNC, self.scale, self.heads = q, up_HNC * scale, scale, padded_heads(config)

    def __call__(self, latent_NQ: Tensor) -> Tensor:
        heads, nope, dim = self.up_HNC.shape
        q_NHd = self.q(latent_NQ).unflatten(-1, (heads, -1))
        rope = q_NHd.shape[-1] - nope
        out_NAW = q_NHd.new_zeros(len(q_NHd), self.heads, dim + rope)
        out_NAW[:, :heads, :dim] = torch.bmm(q_NHd[..., :nope].transpose(0, 1), self.up_HNC).transpose(0, 1)
        out_NAW[:, :heads, dim:] = q_NHd[..., nope:] * self.scale
        return out_NAW.flatten(1)


class ExpandedValues:
    """Attended latents [N, A * C] to outputs [N, D], where o_proj is a product of its own; `up_HCV` is W_uv."""

    def __init__(self, up_HCV: Tensor, out: Product) -> None:
        self.up_HCV, self.out = up_HCV, out

    def __call__(self, latents_NA: Tensor) -> Tensor:
        heads, dim, _ = self.up_HCV.shape
        latents_HNC = latents_NA.unflatten(-1, (-1, dim))[:, :heads].transpose(0, 1)
        return self.out(torch.bmm(latents_HNC, self.up_HCV).transpose(0, 1).flatten(1))


@dataclass(frozen=True)
class _Part:
    """Rows [O, I] of a fused product. `scale` [O, 1]: of integers; `exact`: fp32 whatever the others are."""

    weight: Tensor
    scale: Tensor | None = None
    exact: bool = False

    def at(self, order: Tensor) -> "_Part":
        """The rows in another order."""
        return _Part(self.weight[order], None if self.scale is None else self.scale[order], self.exact)

    def kind(self, dtype: str) -> str:
        if self.scale is not None:
            return "integer"
        return "fp32" if self.exact else dtype


def _fuse(parts: list[_Part], dtype: str) -> Product:
    """One product for all parts; where neighbours differ in kind, one for each kind, joined."""
    products: list[Product] = []
    for kind, group in groupby(parts, lambda part: part.kind(dtype)):
        alike = list(group)
        weight = torch.cat([part.weight for part in alike])
        if kind == "integer":
            products.append(
                Integer(weight, torch.cat([part.scale for part in alike if part.scale is not None]))
            )
        else:
            products.append(FP8(weight) if kind == "fp8" else Dense(weight.to(_torch(kind))))
    return products[0] if len(products) == 1 else Joined(products)


def _torch(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def _part(linear: Linear) -> _Part:
    return _Part(linear.used(), linear.scale)


def _halved(size: int, start: int) -> Tensor:
    """Order of `size` rows whose RoPE pairs from `start` on are interleaved, with their halves one after the other."""
    rope = torch.arange(start, size)
    return torch.cat((torch.arange(start), rope[0::2], rope[1::2]))


def _attention(norm: Tensor, mla: MLA, config: ModelConfig, dtype: str) -> AttentionWeights:
    c, index = config, mla.indexer
    kv = _part(mla.kv_a_proj_with_mqa).at(_halved(c.kv_lora_rank + c.qk_rope_head_dim, c.kv_lora_rank))
    hidden = [_part(mla.q_a_proj), kv]
    index_norm, index_q = None, None
    if index is not None:
        rope = c.qk_rope_head_dim
        # the index key passes a LayerNorm before RoPE: re-order its rows and the norm's parameters alike
        order = torch.cat((_halved(rope, 0), torch.arange(rope, index.dim)))
        head_weights = index.weights_proj.weight * (index.heads * index.dim) ** -0.5
        hidden += [_Part(index.wk.weight[order], exact=True), _Part(head_weights, exact=True)]
        index_norm = index.k_norm.weight[order], index.k_norm.bias[order]
        wq_JdQ = index.wq_b.weight.unflatten(0, (index.heads, index.dim))
        index_q = Dense(wq_JdQ[:, order].flatten(0, 1))
    return AttentionWeights(
        norm=norm,
        hidden=_fuse(hidden, dtype),
        q_norm=mla.q_a_layernorm.weight,
        kv_norm=mla.kv_a_layernorm.weight,
        index_norm=index_norm,
        q=_queries(mla, config, dtype),
        index_q=index_q,
        out=_outputs(mla, config, dtype),
    )


def _queries(mla: MLA, c: ModelConfig, dtype: str) -> Product:
    """q_b_proj and W_uk, folded over heads where no rounding lies between them."""
    heads, rows = c.num_attention_heads, _halved(c.qk_head_dim, c.qk_nope_head_dim)
    part = _part(mla.q_b_proj).at((torch.arange(heads)[:, None] * c.qk_head_dim + rows).flatten())
    up_HNC = mla.up_projections()[0]
    if part.kind(dtype) in ("integer", "fp8"):
        return AbsorbedQueries(_fuse([part], dtype), up_HNC, c, mla.scale)
    q_HdQ = part.weight.double().unflatten(0, (heads, c.qk_head_dim))
    query_AWQ = q_HdQ.new_zeros(padded_heads(c), c.kv_lora_rank + c.qk_rope_head_dim, c.q_lora_rank)
    query_AWQ[:heads, : c.kv_lora_rank] = torch.einsum(
        "hnc,hnq->hcq", up_HNC.double(), q_HdQ[:, : c.qk_nope_head_dim]
    )
    query_AWQ[:heads, c.kv_lora_rank :] = q_HdQ[:, c.qk_nope_head_dim :]
    query_AWQ *= mla.scale
    return _fuse([_Part(query_AWQ.flatten(0, 1).float())], dtype)


def _outputs(mla: MLA, c: ModelConfig, dtype: str) -> Product:
    """W_uv and o_proj, folded over heads where no rounding lies between them."""
    heads, part, up_HVC = c.num_attention_heads, _part(mla.o_proj), mla.up_projections()[1]
    if part.kind(dtype) in ("integer", "fp8"):
        return ExpandedValues(up_HVC.mT.contiguous(), _fuse([part], dtype))
    out_DHV = part.weight.double().unflatten(1, (heads, c.v_head_dim))
    out_ACD = out_DHV.new_zeros(padded_heads(c), c.kv_lora_rank, c.hidden_size)
    out_ACD[:heads] = torch.einsum("hvc,dhv->hcd", up_HVC.double(), out_DHV)
    return _fuse([_Part(out_ACD.flatten(0, 1).float().T)], dtype)


def _ffn(ffn: FFN, dtype: str) -> FFNWeights:
    return FFNWeights(
        _fuse([_part(ffn.gate_proj), _part(ffn.up_proj)], dtype), _fuse([_part(ffn.down_proj)], dtype)
    )


def _experts(weight: Tensor, scale: Tensor | None, dtype: str) -> Grouped:
    if scale is not None:
        return IntegerExperts(weight, scale)
    return FP8Experts(weight) if dtype == "fp8" else DenseExperts(weight.to(_torch(dtype)))


def _moe(moe: MoE, dtype: str) -> MoEWeights:
    shared = None if moe.shared_experts is None else _ffn(moe.shared_experts, dtype)
    gate_up, down = (
        _experts(weight, scale, dtype)
        for weight, scale in zip(moe.experts.used(), moe.experts.scales, strict=True)
    )
    return MoEWeights(moe.gate, gate_up, down, shared)


def _layer(layer: nn.Module, config: ModelConfig, dtype: str) -> LayerWeights:
    assert isinstance(layer, DecoderLayer) and isinstance(layer.self_attn, MLA)
    return LayerWeights(
        _attention(layer.input_layernorm.weight, layer.self_attn, config, dtype),
        layer.post_attention_layernorm.weight,
        _moe(layer.mlp, dtype) if isinstance(layer.mlp, MoE) else _ffn(layer.mlp, dtype),
    )


def _mtp(mtp: MTPLayer, config: ModelConfig, dtype: str) -> MTPWeights:
    join = _fuse([_Part(mtp.eh_proj.weight)], dtype)
    return MTPWeights(mtp.enorm.weight, mtp.hnorm.weight, join, _layer(mtp, config, dtype), mtp.norm.weight)


@torch.no_grad()
def prepare(model: GlmMoeDsa, version: str = "0", dtype: str = "fp32") -> EngineWeights:
    """Fuse the weights of `model` (any dtype) for computing in `dtype`; matrices of integers stay so in all of them.

    The model itself is not kept. Raises FullarcError for one of the paper's comparison attentions.
    """
    if model.config.variant:
        raise FullarcError(
            f"The engine serves GLM-5's attention, not {model.config.variant}.",
            "Such a model is for comparisons: score it with its own forward pass.",
        )
    model = model.float()
    config = model.config
    layers = tuple(_layer(layer, config, dtype) for layer in model.layers)
    positions = torch.arange(config.max_position_embeddings)
    cos, sin = rope_tables(positions, config.qk_rope_head_dim, config.rope_theta)
    outer = _torch(dtype)
    head = Dense(model.lm_head.weight.to(outer))
    embed = model.embed_tokens.weight.to(outer)
    # separate layers for each step are for comparisons: nothing is drafted with them
    mtp = _mtp(model.mtp_layers[0], config, dtype) if len(model.mtp_layers) == 1 else None
    return EngineWeights(config, version, embed, layers, model.norm.weight, head, cos, sin, dtype, mtp)
