"""The fused weights as torch operators: what the plain forward pass (`engine.core`) reads.

Invariant: in fp32 results stay within 1e-5 of the trainer's forward.
Shape suffixes: as in model/ops.py; A = padded attention heads, W = C + R (width of an absorbed key).
"""

from collections.abc import Set
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from fullarc.config.model import ModelConfig
from fullarc.engine.fused import FusedAttention, FusedFFN, FusedLayer, FusedMoE, FusedMTP, Heads, Part, fuse
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
from fullarc.model.moe import Router
from fullarc.model.ops import rope_tables

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

    @property
    def has_mtp(self) -> bool:
        """Whether drafts can be made."""
        return self.mtp is not None


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


def _fuse(parts: list[Part], dtype: str) -> Product:
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


def _attention(w: FusedAttention, config: ModelConfig, dtype: str) -> AttentionWeights:
    return AttentionWeights(
        norm=w.norm,
        hidden=_fuse(w.hidden, dtype),
        q_norm=w.q_norm,
        kv_norm=w.kv_norm,
        index_norm=w.index_norm,
        q=_queries(w.queries, config, dtype, w.scale),
        index_q=None if w.index_q is None else Dense(w.index_q.flatten(0, 1)),
        out=_outputs(w.outputs, config, dtype),
    )


def _queries(heads: Heads, c: ModelConfig, dtype: str, scale: float) -> Product:
    if heads.up is not None:
        return AbsorbedQueries(_fuse([heads.part], dtype), heads.up, c, scale)
    query_HWQ = heads.part.weight.unflatten(0, (c.num_attention_heads, -1))
    padded_AWQ = F.pad(query_HWQ, (0, 0, 0, 0, 0, padded_heads(c) - len(query_HWQ)))
    return _fuse([Part(padded_AWQ.flatten(0, 1))], dtype)


def _outputs(heads: Heads, c: ModelConfig, dtype: str) -> Product:
    if heads.up is not None:
        return ExpandedValues(heads.up.mT.contiguous(), _fuse([heads.part], dtype))
    out_DHC = heads.part.weight.unflatten(1, (c.num_attention_heads, -1))
    padded_DAC = F.pad(out_DHC, (0, 0, 0, padded_heads(c) - out_DHC.shape[1]))
    return _fuse([Part(padded_DAC.flatten(1))], dtype)


def _ffn(w: FusedFFN, dtype: str) -> FFNWeights:
    return FFNWeights(_fuse([w.gate, w.up], dtype), _fuse([w.down], dtype))


def _experts(part: Part, dtype: str) -> Grouped:
    if part.scale is not None:
        return IntegerExperts(part.weight, part.scale)
    return FP8Experts(part.weight) if dtype == "fp8" else DenseExperts(part.weight.to(_torch(dtype)))


def _moe(w: FusedMoE, dtype: str) -> MoEWeights:
    shared = None if w.shared is None else _ffn(w.shared, dtype)
    return MoEWeights(w.router, _experts(w.gate_up, dtype), _experts(w.down, dtype), shared)


def _ffn_or_moe(w: FusedFFN | FusedMoE, dtype: str) -> FFNWeights | MoEWeights:
    return _moe(w, dtype) if isinstance(w, FusedMoE) else _ffn(w, dtype)


def _layer(w: FusedLayer, config: ModelConfig, dtype: str) -> LayerWeights:
    return LayerWeights(_attention(w.attention, config, dtype), w.ffn_norm, _ffn_or_moe(w.ffn, dtype))


def _mtp(w: FusedMTP, config: ModelConfig, dtype: str) -> MTPWeights:
    return MTPWeights(w.enorm, w.hnorm, _fuse([w.join], dtype), _layer(w.layer, config, dtype), w.norm)


@torch.no_grad()
def prepare(model: GlmMoeDsa, version: str = "0", dtype: str = "fp32") -> EngineWeights:
    """Fuse the weights of `model` (any dtype) for computing in `dtype`; matrices of integers stay so in all of them.

    The model itself is not kept. Raises FullarcError for one of the paper's comparison attentions.
    """
    model = model.float()
    config = model.config
    layers, mtp = fuse(model, dtype)
    cos, sin = rope_tables(
        torch.arange(config.max_position_embeddings), config.qk_rope_head_dim, config.rope_theta
    )
    outer = _torch(dtype)
    return EngineWeights(
        config,
        version,
        model.embed_tokens.weight.to(outer),
        tuple(_layer(layer, config, dtype) for layer in layers),
        model.norm.weight,
        Dense(model.lm_head.weight.to(outer)),
        cos,
        sin,
        dtype,
        None if mtp is None else _mtp(mtp, config, dtype),
    )


@torch.no_grad()
def adapt(base: EngineWeights, model: GlmMoeDsa, attention: Set[int], ffn: Set[int]) -> EngineWeights:
    """`base`, but of the layers that are named the attention and the FFN of `model`; all else is shared."""
    layers, mtp = fuse(model.float(), base.dtype)

    def chosen(number: int, old: LayerWeights, new: FusedLayer) -> LayerWeights:
        if number in attention:
            old = replace(old, attention=_attention(new.attention, base.config, base.dtype))
        return replace(old, ffn=_ffn_or_moe(new.ffn, base.dtype)) if number in ffn else old

    pairs = zip(base.layers, layers, strict=True)
    own = base.mtp
    if own and mtp:
        own = replace(own, layer=chosen(len(layers), own.layer, mtp.layer))
    return replace(base, layers=tuple(chosen(n, *pair) for n, pair in enumerate(pairs)), mtp=own)
