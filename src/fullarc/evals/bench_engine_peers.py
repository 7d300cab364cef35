"""The engine beside what people would use instead: decoding and prefill, with the same weights, prompts and one thread.

    transformers   its own forward pass with its cache, which is what `generate` calls for every token
    llama.cpp      compiled for this machine, called through its C API; needs a folder for its environment (`--peers`)

Sides are measured in turn in one run, medians of REPEATS; the claims are ratios, because seconds drift. Before it is
timed each side has to give the log-probs that ours gives (AGREE), on prompts that sparse attention sees all of; one
that does not is not timed, and its claims are missed.

Against transformers both compute in fp32. Against llama.cpp each side has the precision that is the fastest for each
kind of work, by a trial on this machine: ours fp32, bf16, or the same weights in 8 bits (with 8-bit inputs, as
llama.cpp's q8_0) or with experts in 4; llama.cpp's its own, their layout and the attention. It has no indexer of less
than 64 dimensions (its rotation of index keys starts there), so the laptop's model has index heads of 64 on both sides
where it is a side: four instead of eight.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fullarc.chat import Tokenizer
from fullarc.config.model import ModelConfig, preset
from fullarc.engine import Engine, SamplingParams
from fullarc.engine.request import Request
from fullarc.evals.bench import claim
from fullarc.evals.bench_train import in_turn, transformers_config
from fullarc.evals.peers.llama import Llama
from fullarc.model import GlmMoeDsa, QuantScheme, load_config, load_model, quantize_checkpoint, save_model

REPEATS = 5
STEPS = 8  # decoding steps a measurement
TINY = ModelConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=8, first_k_dense_replace=1, intermediate_size=512,
    num_attention_heads=4, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
    n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=128, index_n_heads=4,
    index_head_dim=64, index_topk=256, max_position_embeddings=66_560, eos_token_id=(0,), pad_token_id=0,
)  # fmt: skip
SIZES = ("tiny", "2m")
TRANSFORMERS, LLAMA = "transformers", "llama.cpp"
WARM = 256  # tokens of the prompt that warms up
AGREE = 1e-4  # largest difference of a log-prob of the five likeliest tokens
TRIALS, TRIAL_TOKENS = 7, 512  # a median of so many, with prompts of up to so many tokens
ALIKE, ALIKE_TOKENS = 4, 200  # prompts on which all sides must agree


@dataclass(frozen=True)
class Case:
    """A batch at a context, and by how much ours should be the faster one, against each other side."""

    batch: int
    context: int
    decode: dict[str, float] | None
    prefill: dict[str, float] | None


CASES = (
    Case(1, 512, {TRANSFORMERS: 5, LLAMA: 1.2}, {TRANSFORMERS: 2, LLAMA: 4}),
    Case(1, 2048, None, {TRANSFORMERS: 5, LLAMA: 8}),
    Case(1, 8192, {TRANSFORMERS: 10, LLAMA: 1.5}, {TRANSFORMERS: 20, LLAMA: 15}),
    Case(16, 512, {TRANSFORMERS: 6, LLAMA: 3}, None),
    Case(64, 512, {TRANSFORMERS: 6, LLAMA: 3}, None),
)


def saved(size: str, root: Path, index_head_dim: int = 0) -> Path:
    """A folder with random weights and room for the longest measurement; its tokenizer is there for converters."""
    config = TINY if size == "tiny" else preset(size).model_copy(update={"max_position_embeddings": 66_560})
    folder = root / size
    if index_head_dim:
        heads = config.index_n_heads * config.index_head_dim // index_head_dim
        config = config.model_copy(update={"index_n_heads": heads, "index_head_dim": index_head_dim})
        folder = root / f"{size}-{index_head_dim}"
    save_model(GlmMoeDsa(config).init_weights(0), folder)
    Tokenizer.train(["one two one two"], 320).save(folder)
    return folder


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Random prompts, the same for all sides."""
    ids = torch.randint(1, vocab, (count, length), generator=torch.Generator().manual_seed(length))
    return ids.tolist()


# --- sides ------------------------------------------------------------------------------------------------------


class Side(Protocol):
    """One that is measured. Calls that return seconds have measured themselves."""

    def start(self, batch: list[list[int]]) -> None:
        """Bring all sequences to their first token and leave them there."""

    def decode(self) -> float | None:
        """STEPS more tokens for every sequence."""

    def prefill(self, batch: list[list[int]]) -> float | None:
        """Prompts to their first token, from an empty cache."""


class Witness(Protocol):
    """A side that tells what it computes, in fp32."""

    def logits(self, ids: list[int]) -> Tensor:
        """What follows a prompt [V]."""

    def greedy(self, batch: list[list[int]], count: int) -> list[list[int]]:
        """The next tokens of every sequence."""


@dataclass(frozen=True)
class Precision:
    """Of our side: the engine's dtype, and the bits of experts and of the other matrices where they are integers."""

    dtype: str = "fp32"
    experts: int = 0
    rest: int = 8

    def __str__(self) -> str:
        return f"W{self.experts}A8" if self.experts else self.dtype

    def of(self, folder: Path) -> Path:
        """The checkpoint in it, written beside `folder` if need be."""
        out = folder.with_name(f"{folder.name}-{self}".lower())
        if not self.experts:
            return folder
        if not out.is_dir():
            kinds = dict.fromkeys(("attention", "dense", "shared"), self.rest) | {"experts": self.experts}
            quantize_checkpoint(
                folder, out, {kind: QuantScheme(bits, 0, tokens=True) for kind, bits in kinds.items()}
            )
        return out


PRECISIONS = Precision(), Precision("bf16"), Precision(experts=8), Precision(experts=4)


class Ours:
    """An engine without a prefix cache."""

    def __init__(self, folder: Path, batch: int, length: int, precision: Precision = PRECISIONS[0]) -> None:
        self.engine = Engine(
            precision.of(folder), batch, length + 1024, prefix_tokens=0, dtype=precision.dtype
        )

    def start(self, batch: list[list[int]]) -> None:
        """See Side."""
        scheduler = self.engine.scheduler
        params = SamplingParams(max_new_tokens=1 << 20, temperature=0.0)
        self.requests = [Request(str(n), prompt, params) for n, prompt in enumerate(batch)]
        for request in self.requests:
            scheduler.submit(request)
        while not all(request.logprobs for request in self.requests):
            scheduler.step()

    def decode(self) -> None:
        """See Side."""
        for _ in range(STEPS):
            self.engine.scheduler.step()

    def prefill(self, batch: list[list[int]]) -> None:
        """See Side."""
        self.engine.generate(batch, 1, temperature=0.0, stop_ids=())


def fastest(folder: Path, kind: str, case: Case, batch: list[list[int]]) -> Precision:
    """The precision in which ours takes the least time for a kind of work, by a trial of its first tokens."""
    tokens, works = [ids[:TRIAL_TOKENS] for ids in batch], list[Callable[[], None]]()
    for precision in PRECISIONS:
        ours = Ours(folder, case.batch, case.context, precision)
        ours.start(tokens)
        works.append(ours.decode if kind == "decode" else functools.partial(ours.prefill, tokens[:1]))
    taken = in_turn(works, TRIALS)
    return PRECISIONS[taken.index(min(taken))]


class Theirs:
    """transformers' model of the same weights, and its cache."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # it reports the MTP layer, which it has none for
        logging.disable_progress_bar()
        config = transformers_config(load_model(folder).config)
        self.model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, batch: list[list[int]]) -> None:
        """See Side."""
        out = self.model(torch.tensor(batch), use_cache=True, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)

    start = prefill

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """See Witness."""
        return self.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]

    def greedy(self, batch: list[list[int]], count: int) -> list[list[int]]:
        """See Witness."""
        ids = torch.tensor(batch)
        out = self.model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out[:, ids.shape[1] :].tolist()

    @torch.inference_mode()
    def decode(self) -> None:
        """See Side."""
        for _ in range(STEPS):
            out = self.model(self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.next = out.logits[:, -1:].argmax(-1)


# --- what is measured -------------------------------------------------------------------------------------------


def against(size: str, folder: Path, peers: Path | None) -> Iterator[dict[str, Any]]:
    """The claims of one size, as they are measured; `folder` is a `saved` model, beside which files may be put."""
    ours, beside = {TRANSFORMERS: folder}, dict[str, Theirs | Llama]({TRANSFORMERS: Theirs(folder)})
    theirs, absent = dict[str, Side](), dict[str, tuple[bool | None, str]]({LLAMA: (None, "needs --peers")})
    with ExitStack() as stack:
        if peers is not None:
            ours[LLAMA] = folder if size == "tiny" else saved(size, folder.parent, index_head_dim=64)
            beside[LLAMA] = stack.enter_context(Llama(ours[LLAMA], peers, folder.parent, STEPS))
        for name, side in beside.items():
            yield (agreed := _agreement(size, name, ours[name], side))
            if agreed["ok"]:
                theirs[name] = side
            else:
                absent[name] = False, "not timed: it does not compute what ours does"
        for case in CASES:
            for kind, targets in (("decode", case.decode), ("prefill", case.prefill)):
                if targets is not None:
                    yield from _beside(size, case, kind, targets, ours, theirs, absent)


def _beside(
    size: str,
    case: Case,
    kind: str,
    targets: dict[str, float],
    ours: dict[str, Path],
    theirs: dict[str, Side],
    absent: dict[str, tuple[bool | None, str]],
) -> Iterator[dict[str, Any]]:
    """One kind of work of one case on all sides, in turn. `absent`: `ok` and the reason of those that are not timed."""
    batch = prompts(case.batch, case.context, load_config(ours[TRANSFORMERS]).vocab_size)
    told, chosen = dict.fromkeys(theirs, ""), dict.fromkeys(theirs, PRECISIONS[0])
    if isinstance(llama := theirs.get(LLAMA), Llama):
        variant = llama.fastest(kind, batch)
        llama.open(variant, case.batch, case.context)
        chosen[LLAMA] = fastest(ours[LLAMA], kind, case, batch)
        told[LLAMA] = f"; {chosen[LLAMA]} against {variant}"
        told[LLAMA] += "" if ours[LLAMA] == ours[TRANSFORMERS] else "; index heads of 64"
    mine = {name: Ours(ours[name], case.batch, case.context, chosen[name]) for name in theirs}
    sides: list[Side] = [*mine.values(), *theirs.values()]
    if kind == "decode":
        for side in sides:
            side.start(batch)
        taken = in_turn([side.decode for side in sides], REPEATS)
    else:
        for side in sides:  # a whole round to warm up would be a sixth of the time
            side.prefill([batch[0][:WARM]])
        taken = in_turn([functools.partial(side.prefill, batch) for side in sides], REPEATS, warm=False)
    fast, slow = dict(zip(mine, taken, strict=False)), dict(zip(theirs, taken[len(mine) :], strict=True))
    work = f"decode, batch {case.batch}, context" if kind == "decode" else "prefill"
    tokens = case.batch * STEPS if kind == "decode" else case.context
    for name, target in targets.items():
        about = f"{size}: {work} {case.context:,}: against {name}"
        if name not in theirs:
            ok, why = absent[name]
            yield claim(about, None, "x", f">= {target:g}", ok, why)
            continue
        one, other = fast[name], slow[name]
        yield claim(about, other / one, "x", f">= {target:g}", other / one >= target,
                    f"{tokens / one:,.0f} against {tokens / other:,.0f} tokens/s{told[name]}")  # fmt: skip


def _agreement(size: str, name: str, folder: Path, side: "Witness") -> dict[str, Any]:
    """Whether another side computes what ours does: likeliest tokens and their log-probs, then a batch's next tokens.

    The prompts are short enough for sparse attention to see all of them: beyond, equal scores may be chosen otherwise.
    """
    engine = Engine(folder, ALIKE, ALIKE_TOKENS + STEPS, prefix_tokens=0)
    batch = prompts(ALIKE, ALIKE_TOKENS, load_config(folder).vocab_size)
    outputs = engine.generate(batch, STEPS, temperature=0.0, stop_ids=(), top_logprobs=5)
    worst = 0.0
    for ids, output in zip(batch, outputs, strict=True):
        other = side.logits(ids).double().log_softmax(-1)
        worst = max(worst, *(abs(float(other[token]) - logprob) for logprob, token in output.top_logprobs[0]))
    pairs = zip(outputs, side.greedy(batch, STEPS), strict=True)
    alike = sum(a == b for output, ids in pairs for a, b in zip(output.token_ids, ids, strict=True))
    ok = worst <= AGREE and alike == ALIKE * STEPS
    return claim(f"{size}: log-probs of the five likeliest tokens, largest difference from {name}", 1e6 * worst,
                 "1e-6", f"<= {1e6 * AGREE:g}", ok, f"{alike} of {ALIKE * STEPS} next tokens alike; fp32",
                 better="lower")  # fmt: skip
