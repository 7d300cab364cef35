"""Which rows run in the next step, and what becomes of every request.

A request is a list of token ids of which the first `computed` have left their latents in a slot. Each step gives every
running sequence whose prompt is done one row, and one more for each of its drafts, and spends `chunk_tokens` on
prompts; when the last known token of a sequence has been computed, the next one is sampled. Slots go to waiting
requests by priority and fairly between sessions (`waiting`), prompt tokens to running ones likewise. A waiting request
takes the slot of a running one of lower priority: that one waits again, keeps its tokens, and its latents come back
from the prefix cache or are computed once more. A step computes the requests of one adapter, of each in turn.

Invariants: every submitted request ends exactly once, in "stop", "length" or "abort", with all its tokens and
log-probs; what a request gets never depends on the others; weights change only between steps, and each token records
the version that sampled it. A prompt whose prefix is being computed by another request waits for it, so samples of one
prompt share its prefill through the prefix cache.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from fullarc.config.errors import FullarcError
from fullarc.engine.backend import ForwardPass, Weights
from fullarc.engine.behind import Behind
from fullarc.engine.core import Chunk
from fullarc.engine.draft import Drafter
from fullarc.engine.fairness import Shares
from fullarc.engine.lora import Adapter
from fullarc.engine.prefix import BLOCK, Block, PrefixCache
from fullarc.engine.request import Counters, QueueFullError, Request, RequestError, check
from fullarc.engine.sampler import Part, Sampler
from fullarc.engine.trace import Trace
from fullarc.engine.waiting import Waiting


class Scheduler:
    """Owns the core, the slots and the prefix cache. Only one thread may call it.

    Args:
        core: the forward pass; its cache decides how many sequences run at once.
        prefix: what is kept for later requests; None: nothing.
        max_queue: waiting requests beyond which `submit` raises QueueFullError.
        chunk_tokens: prompt rows per step at most.
        drafter: makes drafts, if there is one.
        overlap: do what a step leaves behind the next forward pass (see `behind`).

    Attributes:
        max_running: sequences that run at once at most, of as many as there are slots.
    """

    def __init__(
        self, core: ForwardPass, prefix: PrefixCache | None = None, max_queue: int = 4096, chunk_tokens: int = 512,
        drafter: Drafter | None = None, overlap: bool = False,
    ) -> None:  # fmt: skip
        self.core, self.max_queue, self.chunk_tokens = core, max_queue, chunk_tokens
        self.prefix = PrefixCache(core.cache, 0) if prefix is None else prefix
        self.weights, self.generation = core.weights, 0
        self.adapters: dict[str, Adapter] = {}
        self.waiting = Waiting(self.max_len)
        self.running: dict[str, Request] = {}
        self.free, self.max_running = list(range(core.cache.slots)), core.cache.slots
        self.paused, self.admitting = False, True
        self.drafter = drafter
        self.counters = Counters()
        self.behind = Behind(overlap)
        # accepted drafts are many tokens: a stop string among them must be found at once
        self.sampler = Sampler(core, self.max_len, self.counters, self.behind, overlap and drafter is None)
        self._prompts, self._turn = Shares(), 0

    @property
    def version(self) -> str:
        """Version of the weights that sample the next token."""
        return self.weights.version

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that can be served."""
        return min(self.core.cache.max_len, self.core.weights.config.max_position_embeddings)

    # --- requests ---------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise RequestError if `request` can never be served."""
        check(request, self.weights.config, self.max_len)
        if request.adapter and request.adapter not in self.adapters:
            raise RequestError(f"No adapter {request.adapter[:200]!r} is loaded.", "Load it first.")

    def submit(self, request: Request, bounded: bool = True) -> None:
        """Queue a checked request. Raises QueueFullError where the queue is `bounded` and full."""
        if bounded and len(self.waiting) >= self.max_queue:
            raise QueueFullError(f"{len(self.waiting)} requests wait already.", "Try again later.")
        request.arrived = time.monotonic()
        request.lora = self.adapters[request.adapter] if request.adapter else None
        blocks = range(0, len(request.prompt) - BLOCK + 1, BLOCK)
        hashes = itertools.accumulate(
            (hash(tuple(request.prompt[start : start + BLOCK])) for start in blocks),
            lambda parent, block: hash((parent, block)), initial=hash(self._space(request)[1:]),
        )  # fmt: skip
        request.chain = list(hashes)[1:]
        self.counters.requests += 1
        self.waiting.add(request)

    def abort(self, rid: str | None) -> int:
        """End the request `rid` and its samples `rid_…` (None: all) with what they have; returns how many."""
        self.settle()
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
        self.settle()
        if request.finish:
            return
        if request.slot < 0:
            self.waiting.remove(request)
        self.counters.aborted += 1
        self._end(request, "abort")
        self.settle()

    def fail(self) -> None:
        """A step has failed, so the next thing may fail too: end all requests, and leave nothing to others."""
        with suppress(Exception):
            self.behind.settle()
        self.sampler.stopped.clear()
        for request in (*self.running.values(), *self.waiting):
            with suppress(Exception):
                if request.slot < 0:
                    self.waiting.remove(request)
                self.counters.aborted += 1
                self._end(request, "abort", publish=False)
                self.behind.settle()

    def retract(self) -> None:
        """Send all running requests back to the queue's front; their latents are computed anew (after an update)."""
        self.settle()
        for request in reversed(list(self.running.values())):
            self._send_back(request, forget=True)
            self.counters.retracted += 1

    # --- weights ----------------------------------------------------------------------------------------------

    @property
    def adapters_in_use(self) -> set[Adapter]:
        """Those that are loaded, and those that are not any more but that requests have been submitted for."""
        requests = (*self.running.values(), *self.waiting)
        return {*self.adapters.values(), *(request.lora for request in requests if request.lora)}

    def set_weights(self, weights: Weights, adapted: Mapping[Adapter, Weights] | None = None) -> None:
        """Use other weights from the next step on. Running sequences keep the latents they have.

        `adapted`: the same weights for every adapter in use. Raises FullarcError if one is missing, or the MTP layer of
        an engine that drafts.
        """
        self.settle()
        if self.drafter and not weights.has_mtp:
            raise FullarcError(
                "The new weights have no MTP layer, and this engine drafts.", "Load them for drafts."
            )
        missing = self.adapters_in_use.difference(adapted or {})
        if missing:
            raise FullarcError(
                f"The update says nothing of the adapter {next(iter(missing)).name[:200]!r}.",
                "Unload it first.",
            )
        for adapter, own in (adapted or {}).items():
            adapter.weights = own
        self.weights = self.core.weights = weights
        self.generation += 1
        self.prefix.clear()
        self.counters.weight_updates += 1

    def rename(self, version: str) -> None:
        """The same weights under another version; what is cached stays valid."""
        self.settle()
        self.weights = self.core.weights = replace(self.weights, version=version)
        for adapter in self.adapters_in_use:
            adapter.weights = replace(adapter.weights, version=version)

    def _space(self, request: Request) -> tuple[int, int, str]:
        """Where its prefixes lie now."""
        return self.generation, request.lora.number if request.lora else 0, request.salt

    # --- one step ---------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """True when a step would do nothing."""
        return self.paused or not (self.running or (self.waiting and self.admitting))

    def settle(self) -> None:
        """Do what steps have left to be done; then all is as if they had done it themselves."""
        self.behind.settle()
        if self.sampler.stopped:
            self._end_stopped()
            self.behind.settle()

    def step(self) -> None:
        """Admit, compute one batch, sample, and end what is done."""
        self._admit()
        parts = self._plan()
        if parts:
            lora = parts[0].request.lora
            self.core.weights = lora.weights if lora else self.weights
            try:
                self._compute(parts)
            finally:
                self.core.weights = self.weights
        if self.idle:
            self.settle()

    def _compute(self, parts: list[Part]) -> None:
        began = time.perf_counter()
        rows = parts[-1].row + len(parts[-1].chunk.ids)
        trace = Trace.of(self.weights.config, rows, [part.request.choices for part in parts])
        hidden = self.behind.during(partial(self.core.forward, [part.chunk for part in parts], trace))
        self._end_stopped()
        parts = [part for part in parts if not part.request.finish]
        if not parts:
            return
        self.counters.steps += 1
        last, prefilled, ends = list[Part](), list[Request](), list[tuple[Request, str]]()
        for part in parts:
            request = part.request
            if trace and request.choices:
                request.choices.add(part.chunk.start, trace, slice(part.row, part.row + len(part.chunk.ids)))
            if request.unscored and request.computed < len(request.prompt):
                self.sampler.score(request, hidden, part.row, part.known)
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
        ends += self.sampler.sample(last, hidden) if last else []
        if self.drafter:
            quiet = not self.waiting and all(r.computed == len(r.ids) - 1 for r in self.running.values())
            sampled = self.counters.generated_tokens - before
            self.sampler.draft(self.drafter, parts, hidden, dict(ends), quiet, sampled, began)
        for request in prefilled:
            self.behind.later(self._publishing(request))
        for request, finish in ends:
            self._end(request, finish)
        self.behind.later(partial(_tell, [part.request for part in last]))

    @property
    def _room(self) -> bool:
        """Whether one more may run."""
        return bool(self.free) and len(self.running) < self.max_running

    def _admit(self) -> None:
        """Give slots to waiting requests, each with the longest prefix the cache has."""
        if self.waiting and self.sampler.looking:
            self.settle()  # a stop string may free a slot
        if not (self.waiting and self.admitting and (self._room or self._victim(self.waiting.priority))):
            return
        self.settle()
        computing: dict[int, int] = {}  # prefixes, and the priority that they are computed with
        for other in sorted(self.running.values(), key=lambda r: -r.priority):
            if other.computed < len(other.prompt) and other.space == self._space(other):
                computing |= dict.fromkeys(other.chain, other.priority)
        kept: list[Request] = []
        try:
            while self.waiting:
                request = self.waiting.take()
                kept.append(request)
                limit = len(request.ids) - 1
                if request.unscored:
                    limit = min(max(request.score_from - 1, 0), limit)
                if request.choices:  # what is told must be computed
                    limit = min(limit, request.choices.first)
                found = self.prefix.match(self._space(request), request.ids[:limit])
                missing = request.chain[len(found) : limit // BLOCK][:1] if self.prefix.takes_more else []
                if any(computing.get(part, request.priority + 1) <= request.priority for part in missing):
                    continue
                if not self._room:
                    victim = self._victim(request.priority)
                    if victim is None:
                        break
                    self._preempt(victim)
                    found = self.prefix.match(self._space(request), request.ids[:limit])
                self._start(kept.pop(), found)
                computing |= dict.fromkeys(request.chain, request.priority)
        finally:
            for request in reversed(kept):
                self.waiting.put_back(request)
            self.waiting.tidy()

    def _victim(self, priority: int) -> Request | None:
        """The running request to push out for one of `priority`: of the lowest, that which was let in last."""
        worst = max(reversed(self.running.values()), key=lambda request: request.priority, default=None)
        return worst if worst and worst.priority > priority else None

    def _preempt(self, request: Request) -> None:
        self._publishing(request)()
        self._send_back(request, forget=request.unscored)
        self.counters.preempted += 1

    def _start(self, request: Request, found: list[Block]) -> None:
        """Give a slot to a request that was taken from the queue."""
        self.waiting.charge(request)
        request.slot = heapq.heappop(self.free)
        self.running[request.rid] = request
        request.space = self._space(request)
        request.held = self.prefix.restore(found, request.slot)
        request.computed = len(request.held) * BLOCK
        if self.drafter and request.held:
            request.spec.rows = request.computed
            request.computed -= 1  # once more: its state is what the MTP layer's next row joins
        if not request.weight_version:  # the first time
            request.cached_tokens = min(request.computed, len(request.prompt))
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.cached_tokens += request.cached_tokens
        request.weight_version = self.version
        request.admitted = request.admitted or time.monotonic()

    def _plan(self) -> list[Part]:
        """The shares of the requests that take part in the step: those of one adapter."""
        counts, budget = {request: self._unknown(request) for request in self._group()}, self.chunk_tokens
        prompts = [request for request, count in counts.items() if count > 1]
        self._prompts.among([r.claim for r in self.running.values() if len(r.ids) - r.computed > 1])
        while prompts:
            request = min(prompts, key=lambda r: self._prompts.order(r.claim, min(counts[r], budget)))
            prompts.remove(request)
            counts[request] = min(counts[request], budget)
            budget -= counts[request]
            self._prompts.charge(request.claim, counts[request])
        parts, row = list[Part](), 0
        for request, known in counts.items():
            if known:
                ids = request.ids[request.computed : request.computed + known] + request.spec.drafts
                parts.append(Part(request, Chunk(request.slot, request.computed, ids), known, row))
                row += len(ids)
        return parts

    def _group(self) -> list[Request]:
        """The running requests of one adapter, or of none, of each in turn."""
        groups: dict[int, list[Request]] = {}
        for request in self.running.values():
            groups.setdefault(request.lora.number if request.lora else 0, []).append(request)
        self._turn = min(groups, key=lambda number: (number <= self._turn, number), default=0)
        return groups.get(self._turn, [])

    def _unknown(self, request: Request) -> int:
        """Known tokens that are to be computed next."""
        count = len(request.ids) - request.computed
        # a sequence that goes on does so as it would have, with drafts behind its last token
        return count - 1 if self.drafter and request.logprobs and count > 1 else count

    # --- ends -------------------------------------------------------------------------------------------------

    def _publishing(self, request: Request) -> Callable[[], None]:
        """What leaves a request's present prefix to others, if it is all of one space."""
        ids, slot, space = request.ids[: request.computed], request.slot, request.space

        def publish() -> None:
            if space == self._space(request):
                chain = self.prefix.publish(space, ids, slot)
                self.prefix.release(request.held)
                request.held = chain

        return publish

    def _letting_go(self, request: Request) -> Callable[[], None]:
        def let_go() -> None:
            self.prefix.release(request.held)
            request.held = ()

        return let_go

    def _release(self, request: Request) -> None:
        del self.running[request.rid]
        heapq.heappush(self.free, request.slot)
        request.slot = -1
        if not self.running:
            self._prompts.among(())

    def _send_back(self, request: Request, forget: bool) -> None:
        """Let a running request wait again; `forget` the prompt's log-probs, which are to be computed anew."""
        self._letting_go(request)()
        self._release(request)
        request.computed, request.spec.rows = 0, 1
        if request.choices:
            request.choices.clear()
        request.retractions += 1
        request.spec.late.clear()
        request.spec.forget()
        if forget:
            request.hidden = None
            for told in (request.input_logprobs, request.input_top_logprobs, request.input_ids_logprobs):
                told.clear()
        self.waiting.put_back(request)
        self.waiting.refund(request, again=True)

    def _end_stopped(self) -> None:
        """End the requests of which a stop string was found behind the step."""
        for request in self.sampler.stopped:
            self._end(request, "stop")
        self.sampler.stopped.clear()

    def _end(self, request: Request, finish: str, publish: bool = True) -> None:
        if request.slot >= 0:
            if publish and request.computed >= len(request.prompt):
                self.behind.later(self._publishing(request))
            self.behind.later(self._letting_go(request))
            self.waiting.refund(request, again=False)
            self._release(request)
        request.finish, request.ended = finish, time.monotonic()
        request.weight_version = request.weight_version or self.version
        tell = request.on_finish
        request.on_finish = request.on_token = None  # whom they belong to has it
        if tell:
            self.behind.later(partial(tell, request))


def _tell(requests: list[Request]) -> None:
    """That they have grown; an end, found by a stop string or already told, is news of its own."""
    for request in requests:
        if request.on_token and request.matched is None and not request.finish:
            request.on_token(request)
