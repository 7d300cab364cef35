"""From the states of a step to what requests get of them: log-probs of prompts, tokens and their end, and drafts.

A token and its own bookkeeping are done at once: the next forward pass begins with them. What else could have been
drawn may be told, and stop strings looked for, behind that pass (`behind`). If one is found, the row that the pass has
computed in vain is not sampled from, so a request gets the same either way. It ends when all that it asked for is
there; until then its readers go by `Request.told`.
"""

from collections.abc import Container, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic, perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from fullarc.engine.backend import ForwardPass
from fullarc.engine.behind import Behind
from fullarc.engine.core import Chunk
from fullarc.engine.draft import Drafter, Progress
from fullarc.engine.guide import guided
from fullarc.engine.penalties import penalised
from fullarc.engine.request import Counters, Request
from fullarc.engine.sampling import chosen_logprobs, sample, supports, told_logprobs, top_logprobs

SCORE_ROWS = 256


class Part(NamedTuple):
    """One request's share of a step: `chunk` holds `known` tokens and the drafts behind them, at `row` of the step."""

    request: Request
    chunk: Chunk
    known: int
    row: int

    @property
    def decodes(self) -> bool:
        """Whether this is the last known token of a sequence that has been sampled from before."""
        return self.known == 1 and self.chunk.start >= len(self.request.prompt)


class _Choice(NamedTuple):
    token: int
    logprob: float


class Sampler:
    """Appends to requests.

    Args:
        bound: tokens of the longest sequence.
        patient: whether stop strings may be looked for behind the step.

    Attributes:
        looking: how many tokens stop strings have not been looked for at yet.
        stopped: requests of which a stop string was found later.
    """

    def __init__(
        self, core: ForwardPass, bound: int, counters: Counters, behind: Behind, patient: bool
    ) -> None:
        self.core, self.bound, self.counters, self.behind = core, bound, counters, behind
        self.patient, self.looking = patient, 0
        self.stopped: list[Request] = []

    def sample(self, parts: list[Part], hidden: Tensor) -> list[tuple[Request, str]]:
        """Sample behind the last known token of each part and behind its drafts; returns who ends, and how."""
        rows, owners, ids = list[int](), list[Request](), list[list[int]]()
        drafted, drafts, q = list[int](), list[int](), list[Tensor]()
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
        choices = list(map(_Choice, *sample(logits, params, [len(i) for i in ids], steered, known)))
        ends, kept, at, now = list[tuple[Request, str]](), list[int](), 0, monotonic()
        for part in parts:
            request, count, before = (
                part.request,
                1 + len(part.request.spec.drafts),
                len(part.request.logprobs),
            )
            request.first_token = request.first_token or now
            if finish := self._commit(request, choices[at : at + count]):
                ends.append((request, finish))
            if request.params.alternatives:
                kept += range(at, at + len(request.logprobs) - before)
            at += count
        if kept:
            tell = partial(_tell_alternatives, logits[kept], steered[kept], [owners[row] for row in kept])
            if ends:  # some of them may end
                tell()
            else:
                self.behind.later(tell)
        return ends

    def draft(
        self, drafter: Drafter, parts: list[Part], hidden: Tensor, ended: Container[Request], quiet: bool, sampled: int,
        began: float,
    ) -> None:  # fmt: skip
        """Let the MTP layer follow and draft for the next step; tell its pace what this one took and brought.

        `quiet`: the next step has no prompts.
        """
        steps = drafter.steps_for(sum(part.request not in ended for part in parts), quiet)
        followed = list[Progress]()
        for part in parts:
            r = part.request
            if r.computed - part.chunk.start == 1 and (steps == 0 or r.spec.resting()):
                r.spec.postpone(hidden[part.row])
            else:
                room = 0 if r in ended else self._room(r)
                followed.append(
                    Progress(
                        r.spec,
                        r.params,
                        r.slot,
                        r.prompt,
                        r.ids,
                        r.computed,
                        part.chunk.start,
                        part.row,
                        room,
                    )
                )
        if followed:
            drafter.advance(followed, hidden, steps)
        alike, drafter.before = drafter.before == steps, steps
        if drafter.pace and alike and all(part.decodes for part in parts):
            drafter.pace.record(len(parts), steps > 0, sampled, perf_counter() - began)

    def _room(self, request: Request) -> int:
        """Drafts that may follow a sequence's last known token; none before its first sampled one, nor with a guide."""
        if not request.logprobs or request.computed != len(request.ids) - 1 or request.guide:
            return 0
        left = request.params.max_new_tokens - len(request.logprobs)
        return min(left, self.bound - len(request.ids)) - 1

    def score(self, request: Request, hidden: Tensor, row: int, count: int) -> None:
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

    def _commit(self, request: Request, choices: Sequence[_Choice]) -> str:
        """Append the drafts that were right and the token behind them; how the request ends with that, or ""."""
        drafts, accepted, finish = request.spec.drafts, 0, ""
        if drafts:
            while accepted < len(drafts) and choices[accepted].token == drafts[accepted]:
                accepted += 1
        before = len(request.logprobs)
        for choice in choices[: accepted + 1]:
            if finish := self._append(request, choice):
                break
        if drafts:  # what comes behind an end is not counted
            accepted = len(request.logprobs) - before - 1
            request.spec.count(len(drafts), accepted)
            self.counters.spec.count(len(drafts), accepted)
        request.computed = len(request.ids) - 1
        return finish

    def _append(self, request: Request, choice: _Choice) -> str:
        """Append one sampled token; how the request ends with it, or ""."""
        token, version, params = choice.token, self.core.weights.version, request.params
        request.ids.append(token)
        request.logprobs.append(choice.logprob)  # last: who reads from another thread counts these
        if request.guide:
            request.guide.feed(token)
        count = len(request.logprobs)
        self.counters.generated_tokens += 1
        if request.versions and request.versions[-1][0] == version:
            request.versions[-1] = (version, request.versions[-1][1], count)
        else:
            request.versions.append((version, count - 1, count))
        request.weight_version = version
        armed = count > params.min_new_tokens
        full = count >= params.max_new_tokens or len(request.ids) >= self.bound
        if armed and token in params.stop_ids:
            self._look(request, token, armed)
            request.matched = token
            return "stop"
        if request.stops and self.patient and not full:
            self.looking += 1
            self.behind.later(partial(self._look_later, request, token, armed))
        elif self._look(request, token, armed):
            return "stop"
        if full or not request.guide or request.guide.allowed():
            return "length" if full else ""
        self.counters.aborted += 1
        request.lost = True
        return "abort"

    def _look(self, request: Request, token: int, armed: bool) -> bool:
        """Whether a stop string ends with `token`."""
        text = request.stops.feed(token, armed) if request.stops else None
        if text is not None:
            request.matched = text
        return text is not None

    def _look_later(self, request: Request, token: int, armed: bool) -> None:
        self.looking -= 1
        if self._look(request, token, armed):
            self.stopped.append(request)


def _tell_alternatives(logits_NV: Tensor, steered_NV: Tensor, owners: Sequence[Request]) -> None:
    """Append to each row's request what could have been drawn there: the likeliest, those asked for, the support."""
    params = [request.params for request in owners]
    if any(p.top_logprobs for p in params):
        for request, top in zip(owners, top_logprobs(logits_NV, params), strict=True):
            request.top_logprobs += [top] if request.params.top_logprobs else []
    if any(p.logprob_ids for p in params):
        for request, told in zip(owners, chosen_logprobs(logits_NV, params), strict=True):
            request.ids_logprobs += [told] if request.params.logprob_ids else []
    if any(p.support for p in params):
        for request, support in zip(owners, supports(steered_NV, params), strict=True):
            request.supports += [support] if request.params.support else []
