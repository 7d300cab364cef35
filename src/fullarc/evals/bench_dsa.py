"""`fullarc bench dsa`: from which length on is sparse attention faster than dense, and does its memory stay linear?

The same code for all sides: one decoder layer whose attention has GLM-5's proportions (eight multiplications of
attention for one of the indexer), at a size that two cores can run, with `index_topk` = TOPK or with all keys. Prefill
is a forward pass. A training step is a forward and a backward pass: with the indexer frozen, as in SFT and RL; with an
indexer that learns by its KL on the chosen keys, as in sparse adaptation; or, all keys being attended to, of the
indexer alone, as in its warm-up. Each measurement is a process of its own, so that its peak memory is its own; sides
are measured in turn; medians of REPEATS.

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
FROZEN, ADAPTATION, WARM_UP = "training step", "training step with the indexer's KL", "indexer's warm-up step"
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


@dataclass(frozen=True)
class Side:
    """What one process measures: a pass with all keys or the chosen ones, and what learns from it."""

    name: str
    sparse: bool
    model: bool = False
    indexer: bool = False


SIDES = {
    PREFILL: (Side("dense", False), Side(PREFILL, True)),
    TRAINING: (
        Side("dense", False, model=True),
        Side(FROZEN, True, model=True),
        Side(ADAPTATION, True, model=True, indexer=True),
        Side(WARM_UP, False, indexer=True),
    ),
}
"""Of each part; all others are held against the first."""


def one_pass(_: Ranks, length: int, topk: int, side: Side, threads: int) -> tuple[float, float]:
    """Seconds of one pass, and the peak memory of this process in MB."""
    torch.set_num_threads(threads)
    chosen = topk if side.sparse else length
    model = GlmMoeDsa(ModelConfig(**SHAPE, index_topk=chosen, max_position_embeddings=length)).init_weights(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(side.indexer if ".indexer." in name else side.model)
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    learns = ("sparse" if side.sparse else "dense") if side.indexer else "off"
    began = time.perf_counter()
    with torch.set_grad_enabled(side.model or side.indexer):
        out = model.trunk(ids, indexer_loss=learns)
        losses = [out.hidden_BTD.square().mean()] if side.model else []
        losses += [out.index_kl] if out.index_kl is not None else []
        if losses:
            torch.stack(losses).sum().backward()
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
        found: dict[Side, list[Measured]] = {side: [] for side in SIDES[part][1:]}
        for length in lengths:
            for side, one in _measured(length, topk, part, repeats).items():
                found[side].append(one)
                yield _faster(side, one, length == max(LENGTHS), topk)
        for side, along in found.items():
            yield _smaller(side, along)
            if tuple(lengths) == LENGTHS:
                yield from _along(side, along, topk)


@dataclass(frozen=True)
class Measured:
    """Medians of two sides at one length: seconds and peak memory in MB of dense attention, and of the other one."""

    length: int
    seconds: tuple[float, float]
    peak_mb: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Dense over the other's seconds."""
        return self.seconds[0] / self.seconds[1]


def _measured(length: int, topk: int, part: str, repeats: int) -> dict[Side, Measured]:
    """Each side of a part but the first."""
    threads, sides = machine()["cores"], SIDES[part]
    turns = [[launch(one_pass, 1, length, topk, side, threads)[0] for side in sides] for _ in range(repeats)]
    (dense_s, dense_mb), *others = (
        [statistics.median(figures) for figures in zip(*taken, strict=True)]
        for taken in zip(*turns, strict=True)
    )
    return {
        side: Measured(length, (dense_s, seconds), (dense_mb, mb))
        for side, (seconds, mb) in zip(sides[1:], others, strict=True)
    }


def _faster(side: Side, at: Measured, longest: bool, topk: int) -> dict[str, Any]:
    """The indexer's warm-up is no rival of dense attention: what it costs is told."""
    (dense, other), judged = at.seconds, longest and side.sparse
    against = "sparse against dense attention" if side.sparse else "against a dense training step"
    bound = "" if side.indexer else f"; by arithmetic {arithmetic(at.length, topk):.1f} x"
    return claim(
        f"{side.name} at {at.length:,}: {against}", at.ratio, "x", ">= 2" if judged else "",
        at.ratio >= 2 if judged else None, f"{dense:.2f} against {other:.2f} s{bound}",
    )  # fmt: skip


def _smaller(side: Side, found: Sequence[Measured]) -> dict[str, Any]:
    dense, other = found[-1].peak_mb
    return claim(
        f"{side.name} at {found[-1].length:,}: peak memory against dense attention's", other / dense, "x",
        "<= 1" if side.sparse else "", other <= dense if side.sparse else None,
        "; ".join("{:.0f} and {:.0f} MB".format(*at.peak_mb) for at in found), better="lower",
    )  # fmt: skip


def _along(side: Side, found: Sequence[Measured], topk: int) -> Iterator[dict[str, Any]]:
    """How memory grows with the length, and from which on sparse attention is faster."""
    before, last = found[-2:]
    growth, longer = last.peak_mb[1] / before.peak_mb[1], last.length / before.length
    yield claim(
        f"{side.name}: peak memory at the last length against the one before", growth, "x", f"<= {longer:g}",
        growth <= longer, f"{before.peak_mb[1]:.0f} and {last.peak_mb[1]:.0f} MB", better="lower",
    )  # fmt: skip
    if not side.sparse:
        return
    below = max((at.length for at in found if at.ratio < 1), default=0)
    yield claim(
        f"{side.name}: the longest row that dense attention is faster on", below, "tokens", f"< {last.length}",
        below < last.length, f"by arithmetic {crossover(topk):,}" * (not side.indexer), better="lower",
    )  # fmt: skip
