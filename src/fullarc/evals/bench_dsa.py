"""`fullarc bench dsa`: from which length on is sparse attention faster than dense, and does its memory stay linear?

The same code twice: one decoder layer whose attention has GLM-5's proportions (eight multiplications of attention for
one of the indexer), at a size that two cores can run, once with `index_topk` = TOPK and once with all keys. Prefill is
a forward pass; a training step is a forward and a backward pass with the indexer frozen, as in SFT and RL. Each
measurement is a process of its own, so that its peak memory is its own; sides are measured in turn; medians of
REPEATS.

What arithmetic says of a row of T tokens, in multiplications per query: dense attention T / 2 * H (d_qk + d_v), half of
the keys being the future's; the indexer T / 2 * J d_I; and, whatever T is, TOPK * H (2 C + R) in the absorbed form.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from fullarc.config.machine import machine
from fullarc.config.model import ModelConfig
from fullarc.evals.bench import claim
from fullarc.model import GlmMoeDsa
from fullarc.train.parallel import Ranks, launch

LENGTHS = (4096, 8192, 16384, 32768)
TOPK = 512
REPEATS = 3
SHAPE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=512, num_hidden_layers=1, first_k_dense_replace=1, intermediate_size=512,
    num_attention_heads=16, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, index_n_heads=8, index_head_dim=32,
    num_nextn_predict_layers=0, eos_token_id=(0,), pad_token_id=0,
)  # fmt: skip


def arithmetic(length: int, topk: int) -> float:
    """Multiplications of dense attention over those of sparse attention with its indexer, for a row of `length`."""
    c = ModelConfig(**SHAPE)
    pairs = length / 2
    dense = pairs * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    chosen = min(topk, pairs) * c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return dense / (pairs * c.index_n_heads * c.index_head_dim + chosen)


def crossover(topk: int) -> int:
    """The length of a row from which on sparse attention has fewer multiplications."""
    return next(length for length in range(2 * topk, 2**30, 64) if arithmetic(length, topk) >= 1)


def one_pass(_: Ranks, length: int, topk: int, training: bool, threads: int) -> tuple[float, float]:
    """Seconds of one pass, and the peak memory of this process in MB."""
    torch.set_num_threads(threads)
    model = GlmMoeDsa(ModelConfig(**SHAPE, index_topk=topk, max_position_embeddings=length)).init_weights(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(training and ".indexer." not in name)
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    with torch.set_grad_enabled(training):
        hidden = model.trunk(ids).hidden_BTD
        if training:
            hidden.square().mean().backward()
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(_: argparse.Namespace) -> dict[str, Any]:
    """The area's result."""
    return {"claims": claims()}


def claims(
    lengths: Sequence[int] = LENGTHS, topk: int = TOPK, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """All claims, in the form that `fullarc bench` prints; lengths below the last are told, not judged."""
    threads, out = machine()["cores"], []
    for training in (False, True):
        name, ratios, peaks = ("training step" if training else "prefill"), [], []
        for length in lengths:
            sides = [
                [launch(one_pass, 1, length, k, training, threads)[0] for k in (length, topk)]
                for _ in range(repeats)
            ]
            dense, sparse = (statistics.median(turn[side][0] for turn in sides) for side in (0, 1))
            peaks.append([statistics.median(turn[side][1] for turn in sides) for side in (0, 1)])
            ratio, last = dense / sparse, length == lengths[-1]
            ratios.append(ratio)
            detail = f"{dense:.2f} against {sparse:.2f} s; by arithmetic {arithmetic(length, topk):.1f} x"
            out.append(
                claim(f"{name} at {length:,}: sparse against dense attention", ratio, "x", ">= 2" if last else "",
                      ratio >= 2 if last else None, detail)
            )  # fmt: skip
        out.append(
            claim(f"{name} at {lengths[-1]:,}: peak memory against dense attention's", peaks[-1][1] / peaks[-1][0], "x",
                  "<= 1", peaks[-1][1] <= peaks[-1][0], "; ".join(f"{d:.0f} and {s:.0f} MB" for d, s in peaks),
                  better="lower")
        )  # fmt: skip
        if len(lengths) > 1:
            growth, longer = peaks[-1][1] / peaks[-2][1], lengths[-1] / lengths[-2]
            out.append(
                claim(f"{name}: peak memory at the last length against the one before", growth, "x", f"<= {longer:g}",
                      growth <= longer, f"{peaks[-2][1]:.0f} and {peaks[-1][1]:.0f} MB", better="lower")
            )  # fmt: skip
            slower = [length for length, ratio in zip(lengths, ratios, strict=True) if ratio < 1]
            below = max(slower, default=0)
            out.append(
                claim(f"{name}: the longest row that dense attention is faster on", below, "tokens",
                      f"< {lengths[-1]}", below < lengths[-1], f"by arithmetic {crossover(topk):,}", better="lower")
            )  # fmt: skip
    return out
