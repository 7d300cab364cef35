"""`fullarc bench topk`: why the indexer needs a rule for ties (docs/topk.md).

One network, one text, one function: `logits` computes a block of positions at a time over everything before them.
All positions in one block are a trainer's forward pass, blocks of one position an engine's decoding. Exactly computed,
the two are equal, and in fp32 they differ by rounding as long as both take the same keys. Ties decide that: ReLU sets
many index scores to exactly zero, and which of equal ones `torch.topk` takes depends on the length of the row.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fullarc.config.model import ModelConfig
from fullarc.evals.bench import claim
from fullarc.model import GlmMoeDsa
from fullarc.model.glm import DecoderLayer
from fullarc.model.indexer import select
from fullarc.model.mla import MLA
from fullarc.model.moe import MoE
from fullarc.model.ops import rope_tables

LENGTH = 256
CLOSE = 1e-4
SHAPE: dict[str, Any] = dict(
    vocab_size=512, hidden_size=128, num_hidden_layers=4, first_k_dense_replace=1, intermediate_size=256,
    num_attention_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, index_n_heads=4, index_head_dim=32,
    index_topk=64, max_position_embeddings=2048, rope_theta=10_000.0, num_nextn_predict_layers=0,
    initializer_range=0.1, eos_token_id=(0,), pad_token_id=0,
)  # fmt: skip

Choice = Callable[[Tensor, Tensor, int], Tensor]
"""Scores [..., S], the allowed keys and k to the keys that are taken, both boolean [..., S]."""


def by_torch(scores: Tensor, allowed: Tensor, k: int) -> Tensor:
    """What `torch.topk` takes, ties and all."""
    if k >= scores.shape[-1]:
        return allowed
    best = scores.masked_fill(~allowed, -torch.inf).topk(k, dim=-1).indices
    return torch.zeros_like(allowed).scatter_(-1, best, True) & allowed


@torch.no_grad()
def logits(model: GlmMoeDsa, ids_T: Tensor, block: int, choose: Choice) -> Tensor:
    """Logits [T, V], `block` positions at a time, with keys chosen by `choose`."""
    c, rows = model.config, []
    cos, sin = rope_tables(torch.arange(len(ids_T)), c.qk_rope_head_dim, c.rope_theta)
    kept: list[tuple[Tensor, ...]] = [() for _ in model.layers]
    for start in range(0, len(ids_T), block):
        part = slice(start, min(start + block, len(ids_T)))
        h_BD = model.embed_tokens(ids_T[part])
        allowed_BS = torch.arange(part.stop) <= torch.arange(part.start, part.stop)[:, None]
        for number, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer) and isinstance(layer.self_attn, MLA)
            mla, indexer, normed = layer.self_attn, layer.self_attn.indexer, layer.input_layernorm(h_BD)
            assert indexer is not None
            q_latent, q_nope, q_rope = mla.queries(normed, cos[part], sin[part])
            new = (*mla.latents(normed, cos[part], sin[part]), indexer.keys(normed, cos[part], sin[part]))
            kept[number] = tuple(map(torch.cat, zip(kept[number], new, strict=True))) if start else new
            latents, k_ropes, k_index = kept[number]
            q_index = indexer.queries(q_latent, cos[part], sin[part])
            scores_BS = indexer.scores(q_index[None], k_index[None], indexer.head_weights(normed)[None])[0]
            taken_BS = choose(scores_BS, allowed_BS, c.index_topk)
            latents, k_ropes = (kept_SX.expand(len(h_BD), -1, -1) for kept_SX in (latents, k_ropes))
            out = mla.absorbed(q_nope, q_rope, latents, k_ropes, taken_BS)
            h_BD = h_BD + mla.o_proj(out)
            normed = layer.post_attention_layernorm(h_BD)
            mlp = layer.mlp
            h_BD = h_BD + (mlp(normed[None], None)[0][0] if isinstance(mlp, MoE) else mlp(normed))
        rows.append(model.lm_head(model.norm(h_BD)))
    return torch.cat(rows)


def compare(model: GlmMoeDsa, ids_T: Tensor, choose: Choice) -> tuple[float, float]:
    """Largest difference of logits between one block and blocks of one; share of positions past the top-k CLOSE."""
    whole, steps = (logits(model, ids_T, block, choose) for block in (len(ids_T), 1))
    apart_T = (whole - steps).abs().amax(-1)
    return float(apart_T.max()), float((apart_T[model.config.index_topk :] <= CLOSE).float().mean())


def example(seed: int = 0) -> tuple[GlmMoeDsa, Tensor]:
    """A random network and a random text, several times as long as what a query may take."""
    generator = torch.Generator().manual_seed(seed)
    model = GlmMoeDsa(ModelConfig(**SHAPE)).init_weights(seed).eval()
    return model, torch.randint(1, SHAPE["vocab_size"], (LENGTH,), generator=generator)


def measure(_: argparse.Namespace) -> dict[str, Any]:
    """The area's result."""
    return {"claims": claims()}


def claims() -> list[dict[str, Any]]:
    """The claims, in the form that `fullarc bench` prints; those of torch.topk are told, not judged."""
    model, ids_T = example()
    out, text = [], f"{LENGTH} tokens, {model.config.index_topk} keys a query"
    for name, choose in (("stable top-k", select), ("torch.topk", by_torch)):
        apart, agree = compare(model, ids_T, choose)
        ours = choose is select
        out += [
            claim(f"{name}: largest difference of logits between forward and decoding", apart, "",
                  f"<= {CLOSE:g}" if ours else "", apart <= CLOSE if ours else None,
                  f"{apart:.1e}; {text}"),
            claim(f"{name}: positions past the top-k within {CLOSE:g}", 100 * agree, "%", "100" if ours else "",
                  agree == 1 if ours else None, text),
        ]  # fmt: skip
    return out
