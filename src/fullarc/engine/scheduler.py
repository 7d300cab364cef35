"""Which rows run in the next step, and what becomes of every request.

A request is a list of token ids of which the first `computed` have left their latents in a slot. Each step gives every
running sequence whose prompt is done one row, and one more for each of its drafts, and spends `chunk_tokens` on prompts
in order of arrival; when the last known token of a sequence has been computed, the next one is sampled.

Invariants: every submitted request ends exactly once, in "stop", "length" or "abort", with all its tokens and
log-probs; what a request gets never depends on the others; weights change only between steps, and each token records
the version that sampled it. A prompt whose prefix is being computed by another request waits for it, so samples of one
prompt share its prefill through the prefix cache.
"""

import heapq
import itertools
import time
from collections import deque
from dataclasses import dataclass, replace

import torch

from fullarc.engine.backend import ForwardPass, Weights
from fullarc.engine.cache import BLOCK, PrefixCache
from fullarc.engine.core import Chunk
from fullarc.engine.draft import Drafter, Progress
from fullarc.engine.guide import guided
from fullarc.engine.penalties import penalised
from fullarc.engine.request import Counters, QueueFullError, Request, RequestError
from fullarc.engine.sampling import chosen_logprobs, sample, supports, told_logprobs, top_logprobs
from fullarc.engine.trace import Trace

SCORE_ROWS = 256


@dataclass(frozen=True)
class _Part:
    """One request's share of a step: `chunk` holds `known` tokens and the drafts behind them, at `row` of the step."""

    request: Request
    chunk: Chunk
    known: int
    row: int

    @property
    def decodes(self) -> bool:
        """Whether this is the last known token of a sequence that has been sampled from before."""
        return self.known == 1 and self.chunk.start >= len(self.request.prompt)


@dataclass(frozen=True)
class _Choice:
    """A token, its log-prob, and of its place the likeliest tokens, those asked for, and those that could be drawn."""

    token: int
    logprob: float
    top: list[tuple[float, int]]
    told: list[tuple[float, int]]
    support: list[tuple[float, int]]


class Scheduler:
    """Owns the core, the slots and the prefix cache. Only one thread may call it.

    Args:
        core: the forward pass; its cache decides how many sequences run at once.
        max_queue: waiting requests beyond which `submit` raises QueueFullError.
        chunk_tokens: prompt rows per step at most.
        prefix_tokens: size of the prefix cache in tokens; 0 = none.
        drafter: makes drafts, if there is one.
    """

    def __init__(
        self, core: ForwardPass, max_queue: int = 4096, chunk_tokens: int = 512, prefix_tokens: int = 32768,
        drafter: Drafter | None = None,
    ) -> None:  # fmt: skip
        self.core, self.max_queue, self.chunk_tokens = core, max_queue, chunk_tokens
        self.prefix = PrefixCache(core.cache, prefix_tokens)
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}
        self.free = list(range(core.cache.slots))
        self.paused, self.admitting = False, True
        self.drafter = drafter
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
        start = request.choices.experts_from if request.choices else None
        if start is not None and not 0 <= start <= len(prompt):
            raise RequestError(f"routed_experts_start_len {start} lies outside the prompt.")
        if request.choices and request.choices.keys and self.core.weights.config.dense_attention:
            raise RequestError(
                "This model attends to all keys: it has no indexer whose choice could be told."
            )
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
            request.computed, request.hidden, request.spec.rows = 0, None, 1
            request.retractions += 1
            request.spec.drafts.clear()
            for told in (request.input_logprobs, request.input_top_logprobs, request.input_ids_logprobs):
                told.clear()
            self.waiting.appendleft(request)
            self.counters.retracted += 1

    def set_weights(self, weights: Weights) -> None:
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
        parts = self._plan()
        if not parts:
            return
        began = time.perf_counter()
        self.counters.steps += 1
        rows = parts[-1].row + len(parts[-1].chunk.ids)
        trace = Trace.of(self.core.weights.config, rows, [part.request.choices for part in parts])
        hidden = self.core.forward([part.chunk for part in parts], trace)
        last, prefilled, ends = list[_Part](), list[Request](), list[tuple[Request, str]]()
        for part in parts:
            request = part.request
            if trace and request.choices:
                request.choices.add(part.chunk.start, trace, slice(part.row, part.row + len(part.chunk.ids)))
            if request.score_from >= 0 and request.computed < len(request.prompt):
                self._score(request, hidden, part.row, part.known)
            if request.computed < len(request.prompt) <= request.computed + part.known:
                prefilled.append(request)
            request.computed += part.known
            if request.computed == len(request.ids):
                if request.wants_hidden and request.hidden is None:
                    request.hidden = hidden[part.row + part.known - 1].tolist()
                if request.params.max_new_tokens == 0:
                    ends.append((request, "length"))
                else:
                    last.append(part)
        before = self.counters.generated_tokens
        ends += self._sample(last, hidden) if last else []
        if self.drafter:
            self._draft(self.drafter, parts, hidden, dict(ends), before, began)
        for request in prefilled:
            self._publish(request)
        for request, finish in ends:
            self._end(request, finish)
        for part in last:
            if part.request.on_token and not part.request.finish:
                part.request.on_token(part.request)

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
                else min(max(request.score_from - 1, 0), len(request.ids) - 1)
            )
            if request.choices:  # what is told must be computed
                limit = min(limit, request.choices.first)
            blocks = self.prefix.match(request.ids[:limit])
            usable = min(limit // BLOCK, len(request.chain))
            if len(blocks) < usable and self.prefix.enabled and request.chain[len(blocks)] in computing:
                held.append(request)
                continue
            request.slot = heapq.heappop(self.free)
            self.prefix.restore(blocks, request.slot)
            request.computed = len(blocks) * BLOCK
            if self.drafter and blocks:
                request.spec.rows = request.computed
                request.computed -= 1  # once more: its state is what the MTP layer's next row joins
            request.cached_tokens = min(request.computed, len(request.prompt))
            request.cache_version = request.weight_version = self.version
            request.admitted = request.admitted or time.monotonic()
            self.running[request.rid] = request
            computing.update(request.chain)
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.cached_tokens += request.computed
        self.waiting.extendleft(reversed(held))

    def _plan(self) -> list[_Part]:
        """The shares of the requests that take part in the step."""
        parts, row, budget = list[_Part](), 0, self.chunk_tokens
        for request in self.running.values():
            known = len(request.ids) - request.computed
            if known > 1:
                known, budget = min(known, max(budget, 0)), budget - known
            if known:
                ids = request.ids[request.computed : request.computed + known] + request.spec.drafts
                parts.append(_Part(request, Chunk(request.slot, request.computed, ids), known, row))
                row += len(ids)
        return parts

    def _sample(self, parts: list[_Part], hidden: torch.Tensor) -> list[tuple[Request, str]]:
        """Sample behind the last known token of each part and behind its drafts; returns who ends, and how."""
        rows, owners, ids = list[int](), list[Request](), list[list[int]]()
        drafted, drafts, q = list[int](), list[int](), list[torch.Tensor]()
        for part in parts:
            request, first, guesses = part.request, part.row + part.known - 1, part.request.spec.drafts
            if request.params.temperature > 0 and request.spec.probabilities:
                drafted += range(len(rows), len(rows) + len(guesses))
                drafts += guesses
                q += request.spec.probabilities
            rows += range(first, first + 1 + len(guesses))
            owners += [request] * (1 + len(guesses))
            ids += [request.ids, *(request.ids + guesses[:n] for n in range(1, len(guesses) + 1))]
        logits, params = self.core.logits(hidden, rows), [request.params for request in owners]
        steered = penalised(logits, params, [request.prompt for request in owners], ids)
        steered = guided(steered, [request.guide for request in owners])
        known = (drafted, drafts, torch.stack(q)) if q else None
        sampled = zip(*sample(logits, params, [len(i) for i in ids], steered, known), strict=True)
        nothing: list[list[tuple[float, int]]] = [[]] * len(rows)
        tops = top_logprobs(logits, params) if any(p.top_logprobs for p in params) else nothing
        told = chosen_logprobs(logits, params) if any(p.logprob_ids for p in params) else nothing
        kept = supports(steered, params) if any(p.support for p in params) else nothing
        choices = iter(
            [_Choice(*choice, *more) for choice, *more in zip(sampled, tops, told, kept, strict=True)]
        )
        return [
            (part.request, finish)
            for part in parts
            if (
                finish := self._commit(
                    part.request, [next(choices) for _ in range(1 + len(part.request.spec.drafts))]
                )
            )
        ]

    def _commit(self, request: Request, choices: list[_Choice]) -> str:
        """Append the drafts that were right and the token behind them; how the request ends with that, or ""."""
        drafts, accepted, finish = request.spec.drafts, 0, ""
        while accepted < len(drafts) and choices[accepted].token == drafts[accepted]:
            accepted += 1
        if drafts:
            request.spec.count(len(drafts), accepted)
            self.counters.spec.count(len(drafts), accepted)
        request.first_token = request.first_token or time.monotonic()
        for choice in choices[: accepted + 1]:
            if finish := self._append(request, choice):
                break
        request.computed = len(request.ids) - 1
        return finish

    def _append(self, request: Request, choice: _Choice) -> str:
        """Append one sampled token; how the request ends with it, or ""."""
        token, version = choice.token, self.version
        request.ids.append(token)
        request.logprobs.append(choice.logprob)
        request.top_logprobs += [choice.top] if request.params.top_logprobs else []
        request.ids_logprobs += [choice.told] if request.params.logprob_ids else []
        request.supports += [choice.support] if request.params.support else []
        count = len(request.logprobs)
        self.counters.generated_tokens += 1
        if request.versions and request.versions[-1][0] == version:
            request.versions[-1] = (version, request.versions[-1][1], count)
        else:
            request.versions.append((version, count - 1, count))
        request.weight_version = version
        armed = count > request.params.min_new_tokens
        text = request.stops.feed(token, armed) if request.stops else None
        if request.guide:
            request.guide.feed(token)
        if armed and token in request.params.stop_ids:
            request.matched = token
            return "stop"
        if text is not None:
            request.matched = text
            return "stop"
        return "length" if count >= request.params.max_new_tokens or len(request.ids) >= self.max_len else ""

    def _draft(
        self, drafter: Drafter, parts: list[_Part], hidden: torch.Tensor, ends: dict[Request, str], before: int,
        began: float,
    ) -> None:  # fmt: skip
        """Let the MTP layer follow and draft for the next step; tell its pace what this one took."""
        decoding = len(parts) - len(ends)
        quiet = not self.waiting and all(r.computed == len(r.ids) - 1 for r in self.running.values())
        steps = drafter.steps_for(decoding, quiet)
        drafter.advance(
            [
                Progress(r.spec, r.params, r.slot, r.ids, r.computed, part.chunk.start, part.row,
                         0 if r in ends else self._room(r))
                for part in parts for r in (part.request,)
            ],
            hidden, steps,
        )  # fmt: skip
        used = max(len(part.chunk.ids) - part.known for part in parts)
        if drafter.pace and used == steps and all(part.decodes for part in parts):
            tokens = self.counters.generated_tokens - before
            drafter.pace.record(len(parts), steps, tokens, time.perf_counter() - began)

    def _room(self, request: Request) -> int:
        """Drafts that may follow a sequence's last known token; none before its first sampled one, nor with a guide."""
        if not request.logprobs or request.computed != len(request.ids) - 1 or request.guide:
            return 0
        left = request.params.max_new_tokens - len(request.logprobs)
        return min(left, self.max_len - len(request.ids)) - 1

    def _score(self, request: Request, hidden: torch.Tensor, row: int, count: int) -> None:
        """Append log-probs (temperature 1) of the prompt tokens that follow `count` rows from `row` on."""
        first = max(request.score_from - 1, request.computed)
        end = min(request.computed + count, len(request.prompt) - 1)
        for at in range(first, end, SCORE_ROWS):
            size = min(SCORE_ROWS, end - at)
            begin = row + at - request.computed
            logits = self.core.logits(hidden, list(range(begin, begin + size)))
            request.input_logprobs += told_logprobs(logits, request.prompt[at + 1 : at + 1 + size])
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
