"""`fullarc bench engine`: is the engine the one to choose for this model on a CPU?

Against others: `bench_engine_peers` (transformers, llama.cpp) and, where it is asked for, `bench_engine_vllm`. Against
itself: what a long context, drafts (`bench_engine_drafts`), truncation and alternatives, a conversation, a second
process, HTTP (`bench_engine_http`) and new weights cost.
One thread, sides in turn, medians of REPEATS; the claims are ratios, because seconds drift. Sizes: the small GLM-5 that
all peers have been measured with (`TINY`) and the laptop's.

What needs a model that has learnt something (drafts) takes `--checkpoint`, of a run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fullarc.engine import Engine
from fullarc.engine.backend import ForwardPass, forward_pass, prepare
from fullarc.engine.core import Chunk
from fullarc.evals import bench_engine_drafts, bench_engine_http, bench_engine_vllm
from fullarc.evals.bench import claim
from fullarc.evals.bench_engine_peers import REPEATS, SIZES, STEPS, Ours, against, prompts, saved
from fullarc.evals.bench_train import in_turn
from fullarc.model import load_model
from fullarc.train.parallel import Ranks, launch

PARTS = ("peers", "long", "drafts", "sampling", "turns", "processes", "http", "update")
ASKED = ("vllm", "overlap")
"""Parts that are measured only when they are named."""
LONG, LONGER, DENSE_AT = 4096, 65_536, 32_768
TURNS, TURN_TOKENS, ANSWER_TOKENS = 8, 64, 32


def options(parser: argparse.ArgumentParser) -> None:
    """The area's own options."""
    parser.add_argument(
        "--part", action="append", choices=(*PARTS, *ASKED), help="only this one; may be repeated"
    )
    parser.add_argument("--size", action="append", choices=SIZES, help="of the peers; may be repeated")
    parser.add_argument("--checkpoint", type=Path, help="a trained one, for what drafts bring")
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="where environments of other programs are, or are made"
    )


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """All claims, or those of the chosen parts, as they are measured."""
    torch.set_num_threads(1)
    whole = chosen.peers and chosen.checkpoint and not chosen.part and not chosen.size
    return {"claims": _claims(chosen), "partial": not whole}


def _claims(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="fullarc-bench-") as root:
        folders = {size: saved(size, Path(root)) for size in SIZES}
        trained = chosen.checkpoint or folders["2m"]
        for part in chosen.part or PARTS:
            if part == "peers":
                for size in chosen.size or SIZES:
                    yield from against(size, folders[size], chosen.peers)
            elif part == "long":
                yield from long_contexts(folders["tiny"])
            elif part == "drafts":
                yield from bench_engine_drafts.claims(chosen.checkpoint)
            elif part == "sampling":
                yield from sampling(folders["2m"])
            elif part == "turns":
                yield from turns(folders["tiny"])
            elif part == "processes":
                yield from processes(folders["2m"])
            elif part == "http":
                yield from bench_engine_http.claims(trained)
            elif part == "update":
                yield from bench_engine_http.update(trained)
            elif part == "overlap":
                yield from bench_engine_http.overlap(trained)
            else:
                yield from bench_engine_vllm.claims(chosen.peers, Path(root))


# --- long contexts ----------------------------------------------------------------------------------------------


def long_contexts(folder: Path) -> list[dict[str, Any]]:
    """How decoding grows with the context, and what sparse attention saves; the caches hold random numbers."""
    model = load_model(folder)
    config = model.config
    core = forward_pass(prepare(model), 1, LONGER + 32)
    model.config = config.model_copy(update={"index_topk": LONGER * 2})
    dense = forward_pass(prepare(model), 1, LONGER + 32)
    generator = torch.Generator().manual_seed(0)
    width = config.kv_lora_rank + config.qk_rope_head_dim + config.index_head_dim
    for start in range(0, LONGER, LONG):
        kept = torch.randn(config.num_hidden_layers, LONG, width, generator=generator)
        for one in (core, dense):
            one.cache.write(0, start, kept)
    query = torch.randn(config.index_head_dim)  # of one head: the least that a scan can be
    keys = torch.randn(config.num_hidden_layers, LONGER, config.index_head_dim, generator=generator)

    def at(core: ForwardPass, length: int) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(STEPS):
                core.logits(core.forward([Chunk(0, length - 1, [1])]), [0])

        return steps

    def scan(length: int) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(STEPS):
                for layer in keys:
                    torch.mv(layer[:length], query)

        return steps

    short, long, short_scan, long_scan, sparse, whole = in_turn(
        [at(core, LONG), at(core, LONGER), scan(LONG), scan(LONGER), at(core, DENSE_AT), at(dense, DENSE_AT)], REPEATS
    )  # fmt: skip
    growth, saved = long / (short + long_scan - short_scan), whole / sparse
    unit = 1000 / STEPS
    return [
        claim(f"decode at {LONGER:,} against {LONG:,} and a bare product with the index keys between", growth, "x",
              "<= 1.3", growth <= 1.3, f"{long * unit:.2f} and {short * unit:.2f} ms; products {long_scan * unit:.2f} "
              f"and {short_scan * unit:.2f} ms", better="lower"),
        claim(f"decode at {DENSE_AT:,}: sparse against dense absorbed attention", saved, "x", ">= 3", saved >= 3,
              f"{sparse * unit:.2f} against {whole * unit:.2f} ms"),
    ]  # fmt: skip


# --- more than a plain draw -------------------------------------------------------------------------------------


def sampling(folder: Path, streams: int = 64, new: int = 128) -> list[dict[str, Any]]:
    """What it costs to cut distributions, and to tell more than the token, at once or behind the next pass."""
    at_once, behind = (Engine(folder, streams, 2 * (32 + new), overlap=overlap) for overlap in (False, True))
    asked = prompts(streams, 32, 1000)
    cut: dict[str, Any] = {"top_p": 0.95}
    more: dict[str, Any] = {"top_logprobs": 5}
    ways = [(at_once, {}), (at_once, cut), (at_once, more), (behind, more)]
    plain, truncated, told, later = in_turn(
        [partial(engine.generate, asked, new, stop_ids=(), **way) for engine, way in ways], REPEATS
    )
    rate = streams * new
    return [
        claim(f"{streams} streams with top-p 0.95, of those without", plain / truncated, "x", ">= 0.75",
              plain / truncated >= 0.75, f"{rate / truncated:,.0f} and {rate / plain:,.0f} tokens/s"),
        claim(f"{streams} streams with five alternatives told behind the next pass, of those without",
              plain / later, "x", ">= 0.75", plain / later >= 0.75, f"{rate / later:,.0f} tokens/s"),
        claim("alternatives told behind the next pass against at once", told / later, "x", "> 1", told / later > 1,
              f"{rate / later:,.0f} and {rate / told:,.0f} tokens/s"),
    ]  # fmt: skip


# --- conversations and processes --------------------------------------------------------------------------------


def turns(folder: Path) -> list[dict[str, Any]]:
    """An agent's conversation, each turn the whole past and something new."""
    shares, firsts, engine = [], [], Engine(folder, 1, 4096)
    for repeat in range(REPEATS + 1):
        ids, seconds, reused, reusable = prompts(1, 256 + repeat, 4000)[0], list[float](), 0, 0
        for turn in range(TURNS):
            known = len(ids) - TURN_TOKENS if turn else 0
            began = time.perf_counter()
            first = engine.generate([ids], 1, temperature=0.0, stop_ids=())[0]
            seconds.append(time.perf_counter() - began)
            reused, reusable = reused + first.cached_tokens, reusable + known
            answer = engine.generate([ids], ANSWER_TOKENS, temperature=0.0, stop_ids=())[0].token_ids
            ids = ids + answer + prompts(1, TURN_TOKENS, 4000)[0]
        shares.append(reused / reusable)
        firsts.append(seconds[-1] / seconds[0])
    share, ratio = statistics.median(shares[1:]), statistics.median(firsts[1:])
    return [
        claim(f"{TURNS} turns: reusable tokens that come from the prefix cache", 100 * share, "%", ">= 95",
              share >= 0.95, gated=True),
        claim(f"time to the first token, turn {TURNS} against turn 1", ratio, "x", "<= 2", ratio <= 2, better="lower"),
    ]  # fmt: skip


def _throughput(ranks: Ranks, folder: Path) -> float:
    """Tokens per second of an engine in a process of its own."""
    torch.set_num_threads(1)
    del ranks  # they do not talk
    ours = Ours(folder, 16, 256)
    ours.start(prompts(16, 256, 2000))
    ours.decode()
    began = time.perf_counter()
    for _ in range(REPEATS):
        ours.decode()
    return 16 * STEPS * REPEATS / (time.perf_counter() - began)


def processes(folder: Path) -> list[dict[str, Any]]:
    """Two engines on two cores."""
    one = statistics.median(launch(_throughput, 1, folder)[0] for _ in range(3))
    two = statistics.median(sum(launch(_throughput, 2, folder)) for _ in range(3))
    return [
        claim("two engine processes against one", two / one, "x", ">= 1.7", two / one >= 1.7,
              f"{two:,.0f} against {one:,.0f} tokens/s")
    ]  # fmt: skip
