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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fullarc.config.machine import machine
from fullarc.config.model import ModelConfig
from fullarc.evals.bench import claim
from fullarc.model import GlmMoeDsa
from fullarc.train.parallel import Ranks, launch

LENGTHS = (4096, 8192, 16384, 32768)
PARTS = PREFILL, TRAINING = "prefill", "training step"
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


def options(parser: argparse.ArgumentParser) -> None:
    """The area's own options."""
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument(
        "--length", action="append", type=int, choices=LENGTHS, help="only this one; may be repeated"
    )


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The area's result, claim by claim."""
    lengths, parts = sorted(chosen.length or LENGTHS), chosen.part or PARTS
    return {"claims": claims(lengths, parts), "partial": bool(chosen.length or chosen.part)}


def claims(
    lengths: Sequence[int] = LENGTHS, parts: Sequence[str] = PARTS, topk: int = TOPK, repeats: int = REPEATS
) -> Iterator[dict[str, Any]]:
    """The claims of these lengths and passes; a ratio at any but the longest of all is told, not judged."""
    for part in parts:
        found = []
        for length in lengths:
            found.append(_measured(length, topk, part == TRAINING, repeats))
            yield _faster(part, found[-1], length == max(LENGTHS), topk)
        yield _smaller(part, found)
        if tuple(lengths) == LENGTHS:
            yield from _along(part, found, topk)


@dataclass(frozen=True)
class Measured:
    """Medians of both sides at one length: seconds and peak memory in MB of (dense, sparse) attention."""

    length: int
    seconds: tuple[float, float]
    peak_mb: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Dense over sparse seconds."""
        return self.seconds[0] / self.seconds[1]


def _measured(length: int, topk: int, training: bool, repeats: int) -> Measured:
    threads = machine()["cores"]
    turns = [
        [launch(one_pass, 1, length, k, training, threads)[0] for k in (length, topk)] for _ in range(repeats)
    ]
    seconds, peaks = (
        tuple(statistics.median(turn[side][what] for turn in turns) for side in (0, 1)) for what in (0, 1)
    )
    return Measured(length, seconds, peaks)


def _faster(part: str, at: Measured, judged: bool, topk: int) -> dict[str, Any]:
    dense, sparse = at.seconds
    return claim(
        f"{part} at {at.length:,}: sparse against dense attention", at.ratio, "x", ">= 2" if judged else "",
        at.ratio >= 2 if judged else None,
        f"{dense:.2f} against {sparse:.2f} s; by arithmetic {arithmetic(at.length, topk):.1f} x",
    )  # fmt: skip


def _smaller(part: str, found: Sequence[Measured]) -> dict[str, Any]:
    dense, sparse = found[-1].peak_mb
    return claim(
        f"{part} at {found[-1].length:,}: peak memory against dense attention's", sparse / dense, "x", "<= 1",
        sparse <= dense, "; ".join("{:.0f} and {:.0f} MB".format(*at.peak_mb) for at in found), better="lower",
    )  # fmt: skip


def _along(part: str, found: Sequence[Measured], topk: int) -> Iterator[dict[str, Any]]:
    """How memory grows with the length, and from which on sparse attention is faster."""
    before, last = found[-2:]
    growth, longer = last.peak_mb[1] / before.peak_mb[1], last.length / before.length
    yield claim(
        f"{part}: peak memory at the last length against the one before", growth, "x", f"<= {longer:g}",
        growth <= longer, f"{before.peak_mb[1]:.0f} and {last.peak_mb[1]:.0f} MB", better="lower",
    )  # fmt: skip
    below = max((at.length for at in found if at.ratio < 1), default=0)
    yield claim(
        f"{part}: the longest row that dense attention is faster on", below, "tokens", f"< {last.length}",
        below < last.length, f"by arithmetic {crossover(topk):,}", better="lower",
    )  # fmt: skip
