"""Which rows run in the next step, and what becomes of every request.

A request is a list of token ids of which the first `computed` have left their latents in a slot. Each step gives every
running sequence whose prompt is done one row, and spends the rest of `chunk_tokens` on prompts in order of arrival;
when the last known token of a sequence has been computed, the next one is sampled.

Invariants: every submitted request ends exactly once, in "stop", "length" or "abort", with all its tokens and
log-probs; what a request gets never depends on the others; weights change only between steps, and each token records
the version that sampled it. A prompt whose prefix is being computed by another request waits for it, so samples of one
prompt share its prefill through the prefix cache.
"""

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from fullarc.config.errors import FullarcError
from fullarc.engine.cache import BLOCK, PrefixCache
from fullarc.engine.core import Chunk, Core
from fullarc.engine.penalties import penalised
from fullarc.engine.sampling import SamplingParams, chosen_logprobs, sample, top_logprobs
from fullarc.engine.stops import StopWatch
from fullarc.engine.weights import EngineWeights

SCORE_ROWS = 256


class RequestError(FullarcError):
    """The request itself cannot be served (HTTP 400)."""


class QueueFullError(FullarcError):
    """Too many requests wait already (HTTP 429)."""


@dataclass(eq=False)
class Request:
    """One sequence from arrival to end. `on_token` and `on_finish` are called by the thread that steps.

    Attributes:
        score_from: first prompt position whose token gets an input log-prob; -1 = none.
        stops: what looks for stop strings, if there are any.
        top_logprobs, ids_logprobs: the likeliest tokens, and those asked for, at each output token.
        input_top_logprobs, input_ids_logprobs: the same at each scored prompt token.
        wants_hidden: whether the last hidden state of the prompt is kept, as `hidden` [hidden_size].
        versions: [version, start, end] spans over the output tokens.
        finish: "" while it runs; then "stop" | "length" | "abort".
    """

    rid: str
    prompt: list[int]
    params: SamplingParams
    score_from: int = -1
    on_token: Callable[["Request"], None] | None = None
    on_finish: Callable[["Request"], None] | None = None
    stops: StopWatch | None = None
    wants_hidden: bool = False
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    ids_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    input_logprobs: list[float] = field(default_factory=list)
    input_top_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    input_ids_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    hidden: list[float] | None = None
    versions: list[tuple[str, int, int]] = field(default_factory=list)
    finish: str = ""
    matched: int | str | None = None
    cached_tokens: int = 0
    weight_version: str = ""
    arrived: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    # the scheduler's own
    slot: int = -1
    computed: int = 0
    cache_version: str = ""
    chain: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @property
    def output(self) -> list[int]:
        """The completion so far."""
        return self.ids[len(self.prompt) :]


@dataclass
class Counters:
    """Totals since the start, for /metrics."""

    requests: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    weight_updates: int = 0
    retracted: int = 0


class Scheduler:
    """Owns the core, the slots and the prefix cache. Only one thread may call it.

    Args:
        core: the forward pass; its cache decides how many sequences run at once.
        max_queue: waiting requests beyond which `submit` raises QueueFullError.
        chunk_tokens: prompt rows per step at most.
        prefix_tokens: size of the prefix cache in tokens; 0 = none.
    """

    def __init__(
        self, core: Core, max_queue: int = 4096, chunk_tokens: int = 512, prefix_tokens: int = 32768
    ) -> None:
        self.core, self.max_queue, self.chunk_tokens = core, max_queue, chunk_tokens
        self.prefix = PrefixCache(core.cache, prefix_tokens)
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}
        self.free = list(range(core.cache.slots))
        self.paused, self.admitting = False, True
        self.counters = Counters()

    @property
    def version(self) -> str:
        """Version of the weights that sample the next token."""
        return self.core.weights.version

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that can be served."""
        return min(self.core.cache.max_len, self.core.weights.config.max_position_embeddings)

    # --- requests ---------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise RequestError if `request` can never be served."""
        prompt, vocab = request.prompt, self.core.weights.config.vocab_size
        if not prompt:
            raise RequestError("input_ids is empty.", "Send at least one token.")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise RequestError(
                f"input_ids contain a token outside 0..{vocab - 1}.", "Is it the model's tokenizer?"
            )
        if len(prompt) + min(request.params.max_new_tokens, 1) > self.max_len:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens; the engine serves sequences of up to {self.max_len}.",
                "Shorten it, or start the engine with a larger --max-len.",
            )
        named = (
            *request.params.forbidden,
            *request.params.logprob_ids,
            *(t for t, _ in request.params.logit_bias),
        )
        if any(not 0 <= token < vocab for token in named):
            raise RequestError(
                f"A token named in logit_bias or token_ids_logprob lies outside 0..{vocab - 1}.",
                "Is it the model's tokenizer?",
            )
        if len(request.params.forbidden) >= vocab:
            raise RequestError("All tokens are forbidden.", "Leave at least one.")
        if not -1 <= request.score_from <= len(prompt):
            raise RequestError(f"logprob_start_len {request.score_from} lies outside the prompt.")

    def submit(self, request: Request) -> None:
        """Queue a checked request. Raises QueueFullError."""
        if len(self.waiting) >= self.max_queue:
            raise QueueFullError(f"{len(self.waiting)} requests wait already.", "Try again later.")
        request.arrived = time.monotonic()
        request.chain = list(
            itertools.accumulate(
                (
                    hash(tuple(request.prompt[a : a + BLOCK]))
                    for a in range(0, len(request.prompt) - BLOCK + 1, BLOCK)
                ),
                lambda parent, block: hash((parent, block)),
            )
        )
        self.counters.requests += 1
        self.waiting.append(request)

    def abort(self, rid: str | None) -> int:
        """End the request `rid` and its samples `rid_…` (None: all) with what they have; returns how many."""
        chosen = [
            r
            for r in (*self.running.values(), *self.waiting)
            if rid is None or r.rid == rid or r.rid.startswith(f"{rid}_")
        ]
        for request in chosen:
            self.cancel(request)
        return len(chosen)

    def cancel(self, request: Request) -> None:
        """End one submitted request with what it has; nothing happens if it has ended."""
        if request.finish:
            return
        if request.slot < 0:
            self.waiting.remove(request)
        self.counters.aborted += 1
        self._end(request, "abort")

    def retract(self) -> None:
        """Send all running requests back to the queue's front; their latents are computed anew (after an update)."""
        for request in reversed(list(self.running.values())):
            self._release(request)
            request.computed, request.hidden = 0, None
            for told in (request.input_logprobs, request.input_top_logprobs, request.input_ids_logprobs):
                told.clear()
            self.waiting.appendleft(request)
            self.counters.retracted += 1

    def set_weights(self, weights: EngineWeights) -> None:
        """Use other weights from the next step on. Running sequences keep the latents they have."""
        self.core.weights = weights
        self.prefix.clear()
        for request in self.running.values():
            request.cache_version = ""
        self.counters.weight_updates += 1

    # --- one step ---------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """True when a step would do nothing."""
        return self.paused or not (self.running or (self.waiting and self.admitting))

    def step(self) -> None:
        """Admit, compute one batch, sample, and end what is done."""
        self._admit()
        requests, chunks = self._plan()
        if not chunks:
            return
        self.counters.steps += 1
        hidden = self.core.forward(chunks)
        last, row = list[tuple[Request, int]](), 0
        for request, chunk in zip(requests, chunks, strict=True):
            if request.score_from >= 0 and request.computed < len(request.prompt):
                self._score(request, hidden, row, len(chunk.ids))
            row += len(chunk.ids)
            prefilling = request.computed < len(request.prompt)
            request.computed += len(chunk.ids)
            if prefilling and request.computed >= len(request.prompt):
                self._publish(request)
            if request.computed == len(request.ids):
                last.append((request, row - 1))
                if request.wants_hidden and request.hidden is None:
                    request.hidden = hidden[row - 1].tolist()
        for request in [r for r, _ in last if r.params.max_new_tokens == 0]:
            self._end(request, "length")
        if wanted := [(r, at) for r, at in last if not r.finish]:
            self._sample([r for r, _ in wanted], self.core.logits(hidden, [at for _, at in wanted]))

    def _admit(self) -> None:
        """Move waiting requests into free slots, each with the longest prefix the cache has."""
        if not (self.free and self.waiting and self.admitting):
            return
        computing = {h for r in self.running.values() if r.computed < len(r.prompt) for h in r.chain}
        held: list[Request] = []
        while self.free and self.waiting:
            request = self.waiting.popleft()
            limit = (
                len(request.ids) - 1
                if request.score_from < 0
                else min(request.score_from, len(request.ids) - 1)
            )
            blocks = self.prefix.match(request.ids[:limit])
            usable = min(limit // BLOCK, len(request.chain))
            if len(blocks) < usable and self.prefix.enabled and request.chain[len(blocks)] in computing:
                held.append(request)
                continue
            request.slot = heapq.heappop(self.free)
            self.prefix.restore(blocks, request.slot)
            request.computed = len(blocks) * BLOCK
            request.cached_tokens = min(request.computed, len(request.prompt))
            request.cache_version = request.weight_version = self.version
            self.running[request.rid] = request
            computing.update(request.chain)
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.cached_tokens += request.computed
        self.waiting.extendleft(reversed(held))

    def _plan(self) -> tuple[list[Request], list[Chunk]]:
        """The step's requests and chunks, single rows first."""
        single, several, budget = list[Request](), list[tuple[Request, int]](), self.chunk_tokens
        for request in self.running.values():
            todo = len(request.ids) - request.computed
            if todo == 1:
                single.append(request)
            elif budget > 0:
                several.append((request, min(todo, budget)))
                budget -= todo
        # a chunk that the budget cut down to one token counts as a single row
        several.sort(key=lambda entry: entry[1] > 1)
        requests = single + [request for request, _ in several]
        counts = [1] * len(single) + [count for _, count in several]
        chunks = [
            Chunk(r.slot, r.computed, r.ids[r.computed : r.computed + count])
            for r, count in zip(requests, counts, strict=True)
        ]
        return requests, chunks

    def _sample(self, requests: list[Request], logits: torch.Tensor) -> None:
        params = [r.params for r in requests]
        steered = penalised(logits, params, [r.prompt for r in requests], [r.ids for r in requests])
        tokens, logprobs = sample(logits, params, [len(r.ids) for r in requests], steered)
        if any(p.logprob_ids for p in params):
            for request, told in zip(requests, chosen_logprobs(logits, params), strict=True):
                request.ids_logprobs += [told] if request.params.logprob_ids else []
        if any(r.params.top_logprobs for r in requests):
            for request, best in zip(
                requests, top_logprobs(logits, [r.params for r in requests]), strict=True
            ):
                request.top_logprobs += [best] if request.params.top_logprobs else []
        now, version = time.monotonic(), self.version
        self.counters.generated_tokens += len(tokens)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.ids.append(token)
            request.logprobs.append(logprob)
            count = len(request.logprobs)
            if request.versions and request.versions[-1][0] == version:
                request.versions[-1] = (version, request.versions[-1][1], count)
            else:
                request.versions.append((version, count - 1, count))
            request.weight_version = version
            request.first_token = request.first_token or now
            armed = count > request.params.min_new_tokens
            text = request.stops.feed(token, armed) if request.stops else None
            if armed and token in request.params.stop_ids:
                request.matched = token
                self._end(request, "stop")
            elif text is not None:
                request.matched = text
                self._end(request, "stop")
            elif count >= request.params.max_new_tokens or len(request.ids) >= self.max_len:
                self._end(request, "length")
            elif request.on_token:
                request.on_token(request)

    def _score(self, request: Request, hidden: torch.Tensor, row: int, count: int) -> None:
        """Append log-probs (temperature 1) of the prompt tokens that follow `count` rows from `row` on."""
        first = max(request.score_from - 1, request.computed)
        end = min(request.computed + count, len(request.prompt) - 1)
        for at in range(first, end, SCORE_ROWS):
            size = min(SCORE_ROWS, end - at)
            begin = row + at - request.computed
            logits = self.core.logits(hidden, list(range(begin, begin + size)))
            targets = torch.tensor(request.prompt[at + 1 : at + 1 + size])
            request.input_logprobs += logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
            params = [replace(request.params, temperature=1.0)] * size
            if request.params.top_logprobs:
                request.input_top_logprobs += top_logprobs(logits, params)
            if request.params.logprob_ids:
                request.input_ids_logprobs += chosen_logprobs(logits, params)

    # --- ends -------------------------------------------------------------------------------------------------

    def _publish(self, request: Request) -> None:
        if request.cache_version == self.version:
            self.prefix.publish(request.ids[: request.computed], request.slot)

    def _release(self, request: Request) -> None:
        del self.running[request.rid]
        heapq.heappush(self.free, request.slot)
        request.slot = -1

    def _end(self, request: Request, finish: str) -> None:
        if request.slot >= 0:
            if request.computed >= len(request.prompt):
                self._publish(request)
            self._release(request)
        request.finish, request.ended = finish, time.monotonic()
        request.weight_version = request.weight_version or self.version
        if request.on_finish:
            request.on_finish(request)
