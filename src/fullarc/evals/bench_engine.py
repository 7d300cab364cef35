"""`fullarc bench engine`: is the engine the one to choose for this model on a CPU?

The other side is transformers' own forward pass with its cache, which is what `generate` calls for every token, with
the same weights and prompts in the same process. Sides are measured in turn, one thread, medians of REPEATS after one
warm-up; the claims are ratios, because seconds drift. Sizes: the small GLM-5 that all peers have been measured with
(`TINY`) and the laptop's.

What needs a model that has learnt something (drafts) takes `--checkpoint`; its prompts are the held-out texts of the
run that the checkpoint belongs to. llama.cpp is not a side of this bench.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fullarc.chat import Tokenizer
from fullarc.config.model import ModelConfig, preset
from fullarc.engine import Engine, SamplingParams, mtp_accept_length
from fullarc.engine.core import Chunk, Core
from fullarc.engine.engine import load_weights
from fullarc.engine.request import Request
from fullarc.engine.weights import prepare
from fullarc.evals import bench_engine_http
from fullarc.evals.bench import claim
from fullarc.evals.bench_train import in_turn, transformers_config
from fullarc.model import GlmMoeDsa, load_model, save_model
from fullarc.train.parallel import Ranks, launch

REPEATS = 5
STEPS = 8  # decoding steps a measurement
TINY = ModelConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=8, first_k_dense_replace=1, intermediate_size=512,
    num_attention_heads=4, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
    n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=128, index_n_heads=4,
    index_head_dim=64, index_topk=256, max_position_embeddings=66_560, eos_token_id=(0,), pad_token_id=0,
)  # fmt: skip
DECODE = ((1, 512, 5.0), (1, 8192, 10.0), (16, 512, 6.0), (64, 512, 6.0))
PREFILL = ((512, 2.0), (2048, 5.0), (8192, 20.0))
PARTS = ("peers", "long", "drafts", "turns", "processes", "http", "update")
LONG, LONGER, DENSE_AT = 4096, 65_536, 32_768
DRAFTS = 4
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 64, 64
TURNS, TURN_TOKENS, ANSWER_TOKENS = 8, 64, 32


def options(parser: argparse.ArgumentParser) -> None:
    """The area's own options."""
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument(
        "--size", action="append", choices=("tiny", "2m"), help="of the peers; may be repeated"
    )
    parser.add_argument("--checkpoint", type=Path, help="a trained one, for what drafts bring")


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """All claims, or those of the chosen parts."""
    torch.set_num_threads(1)
    out: list[dict[str, Any]] = []
    parts, sizes = chosen.part or PARTS, chosen.size or ("tiny", "2m")
    with tempfile.TemporaryDirectory(prefix="fullarc-bench-") as root:
        folders = {size: _saved(size, Path(root)) for size in ("tiny", "2m")}
        for part in parts:
            if part == "peers":
                for size in sizes:
                    out += against_transformers(size, folders[size])
            elif part == "long":
                out += long_contexts(folders["tiny"])
            elif part == "drafts":
                out += drafts(chosen.checkpoint)
            elif part == "turns":
                out += turns(folders["tiny"])
            elif part == "processes":
                out += processes(folders["2m"])
            elif part == "http":
                out += bench_engine_http.claims(chosen.checkpoint or folders["2m"])
            else:
                out += update(chosen.checkpoint or folders["2m"])
    return {"claims": out}


def _saved(size: str, root: Path) -> Path:
    """A folder with random weights; in "2m" the shape has room for the longest measurement."""
    config = TINY if size == "tiny" else preset("2m").model_copy(update={"max_position_embeddings": 66_560})
    save_model(GlmMoeDsa(config).init_weights(0), root / size)
    return root / size


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Random prompts, the same for all sides."""
    ids = torch.randint(1, vocab, (count, length), generator=torch.Generator().manual_seed(length))
    return ids.tolist()


# --- sides ------------------------------------------------------------------------------------------------------


class Ours:
    """An engine without a prefix cache."""

    def __init__(self, folder: Path, batch: int, length: int) -> None:
        self.engine = Engine(folder, batch, length + 1024, prefix_tokens=0)

    def prefill(self, batch: list[list[int]]) -> None:
        """Prompts to their first token."""
        self.engine.generate(batch, 1, temperature=0.0, stop_ids=())

    def start(self, batch: list[list[int]]) -> None:
        """Bring all sequences to their first token and leave them running."""
        scheduler = self.engine.scheduler
        params = SamplingParams(max_new_tokens=1 << 20, temperature=0.0)
        self.requests = [Request(str(n), prompt, params) for n, prompt in enumerate(batch)]
        for request in self.requests:
            scheduler.submit(request)
        while not all(request.logprobs for request in self.requests):
            scheduler.step()

    def decode(self) -> None:
        """STEPS more tokens for every sequence."""
        for _ in range(STEPS):
            self.engine.scheduler.step()


class Theirs:
    """transformers' model of the same weights, and its cache."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        config = transformers_config(load_model(folder).config)
        self.model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, batch: list[list[int]]) -> None:
        """Prompts to their first token."""
        out = self.model(torch.tensor(batch), use_cache=True, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)

    start = prefill

    @torch.inference_mode()
    def decode(self) -> None:
        """STEPS more tokens for every sequence."""
        for _ in range(STEPS):
            out = self.model(self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.next = out.logits[:, -1:].argmax(-1)


def against_transformers(size: str, folder: Path) -> list[dict[str, Any]]:
    """Decoding and prefill, side by side."""
    theirs, out = Theirs(folder), []
    vocab = theirs.model.config.vocab_size
    for batch, context, target in DECODE:
        ids, ours = prompts(batch, context, vocab), Ours(folder, batch, context)
        ours.start(ids)
        theirs.start(ids)
        mine, plain = in_turn([ours.decode, theirs.decode], REPEATS)
        out.append(
            _ratio(f"{size}: decode, batch {batch}, context {context:,}: against transformers", mine, plain, target,
                   batch * STEPS)
        )  # fmt: skip
    for length, target in PREFILL:
        ids, ours = prompts(1, length, vocab), Ours(folder, 1, length)
        mine, plain = in_turn([_with(ours.prefill, ids), _with(theirs.prefill, ids)], REPEATS)
        out.append(_ratio(f"{size}: prefill {length:,}: against transformers", mine, plain, target, length))
    return out


def _with(call: Callable[[list[list[int]]], None], ids: list[list[int]]) -> Callable[[], None]:
    return lambda: call(ids)


def _ratio(name: str, mine: float, plain: float, target: float, tokens: int) -> dict[str, Any]:
    detail = f"{tokens / mine:,.0f} against {tokens / plain:,.0f} tokens/s"
    return claim(name, plain / mine, "x", f">= {target:g}", plain / mine >= target, detail)


# --- long contexts ----------------------------------------------------------------------------------------------


def long_contexts(folder: Path) -> list[dict[str, Any]]:
    """How decoding grows with the context, and what sparse attention saves; the caches hold random numbers."""
    weights = prepare(load_model(folder))
    config = weights.config
    core = Core(weights, 1, LONGER + 32)
    core.cache.keys.normal_(generator=torch.Generator().manual_seed(0))
    core.cache.values.normal_(generator=torch.Generator().manual_seed(1))
    dense = Core(replace(weights, config=config.model_copy(update={"index_topk": LONGER * 2})), 1, 1)
    dense.cache = core.cache
    query = torch.randn(config.index_n_heads, config.index_head_dim)

    def at(core: Core, length: int) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(STEPS):
                core.logits(core.forward([Chunk(0, length - 1, [1])]), [0])

        return steps

    def scan(length: int) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(STEPS):
                for layer in core.cache.keys:
                    torch.mm(query, layer[0, -config.index_head_dim :, :length])

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


# --- drafts -----------------------------------------------------------------------------------------------------


def drafts(checkpoint: Path | None) -> list[dict[str, Any]]:
    """What the MTP layer of a trained model brings on texts that it was not trained on, one sequence at a time."""
    length, speed = f"accept length at {DRAFTS} drafts", "drafts against none, batch 1"
    if checkpoint is None:
        why = "needs --checkpoint"
        return [
            claim(length, None, "tokens", ">= 2.76", None, why),
            claim(speed, None, "x", "> 1", None, why),
        ]
    texts = checkpoint.resolve().parents[2] / "data" / "heldout" / "heldout.jsonl"
    tok = Tokenizer.load(checkpoint)
    ids = [tok.encode(json.loads(line)["text"])[:PROMPT_TOKENS] for line in texts.read_text().splitlines()]
    chosen = [prompt for prompt in ids if len(prompt) == PROMPT_TOKENS][:PROMPTS]
    accepted = mtp_accept_length(checkpoint, chosen, DRAFTS, NEW_TOKENS)
    engines = [
        Engine(checkpoint, 1, PROMPT_TOKENS + NEW_TOKENS, prefix_tokens=0, draft_steps=n) for n in (0, DRAFTS)
    ]

    def side(engine: Engine) -> Callable[[], None]:
        def decode() -> None:
            engine.generate(chosen, NEW_TOKENS, temperature=0.0, stop_ids=())

        return decode

    plain, mine = in_turn([side(engine) for engine in engines], REPEATS)
    counted = engines[1].scheduler.counters.spec
    told = ", ".join(f"{100 * share:.0f} %" for share in accepted.per_position)
    return [
        claim(length, accepted.mean, "tokens", ">= 2.76", accepted.mean >= 2.76, f"{len(chosen)} prompts; {told}"),
        claim(speed, plain / mine, "x", "> 1", plain / mine > 1,
              f"{PROMPTS * NEW_TOKENS / mine:,.0f} against {PROMPTS * NEW_TOKENS / plain:,.0f} tokens/s; "
              f"{counted.proposed / max(counted.verified, 1):.1f} drafts a step chosen"),
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


# --- weights while running --------------------------------------------------------------------------------------


def update(folder: Path) -> list[dict[str, Any]]:
    """How long no step ends while new weights are read beside 16 running sequences and swapped in."""
    ours = Ours(folder, 16, 256)
    ours.start(prompts(16, 256, 2000))
    scheduler, gaps, usual = ours.engine.scheduler, list[float](), list[float]()
    with ThreadPoolExecutor(1) as pool:
        for number in range(REPEATS):
            loading = pool.submit(load_weights, folder, str(number))
            times = [time.perf_counter()]
            while not loading.done():
                scheduler.step()
                times.append(time.perf_counter())
            scheduler.set_weights(loading.result())
            for _ in range(STEPS):
                scheduler.step()
                times.append(time.perf_counter())
            between = [b - a for a, b in pairwise(times)]
            gaps.append(max(between))
            usual.append(statistics.median(between))
    longest, step = (1000 * statistics.median(seconds) for seconds in (gaps, usual))
    return [
        claim("longest time between two steps during a weight update", longest, "ms", "< 100", longest < 100,
              f"a step takes {step:.0f} ms; largest {1000 * max(gaps):.0f} ms", better="lower")
    ]  # fmt: skip
