"""Priorities: who is let in first, who has to leave a slot, and that it costs nobody a bit."""

import random

import pytest

from fullarc.engine import Engine, SamplingParams
from fullarc.engine.request import Request
from fullarc.engine.trace import Choices

LONG = [3 + (i * i) % 80 for i in range(90)]


def request(rid, prompt=(4, 5, 6), priority=0, score_from=-1, new=8, **params):
    params = SamplingParams(**({"max_new_tokens": new, "seed": 1} | params))
    return Request(rid, list(prompt), params, score_from, priority=priority)


def engine(folder, slots=2, **kwargs):
    made = Engine(folder, **(dict(max_batch=slots, max_len=192, chunk_tokens=32, prefix_tokens=512) | kwargs))
    if made.scheduler.drafter:
        made.scheduler.drafter.always()
    return made


def drain(scheduler):
    while not scheduler.idle:
        scheduler.step()


def test_samples_of_a_prompt_do_not_wait_for_prefixes_that_cannot_be_kept(checkpoints):
    """Running requests hold the whole prefix cache."""
    scheduler = engine(checkpoints["v0"], slots=4, prefix_tokens=16).scheduler
    scheduler.submit(request("holder", LONG[:20], new=60))
    for _ in range(3):
        scheduler.step()
    assert len(scheduler.prefix) == 16 and not scheduler.prefix.takes_more
    samples = [request(f"sample{n}", LONG[30:80]) for n in range(3)]
    for one in samples:
        scheduler.submit(one)
    scheduler.step()
    assert all(one.slot >= 0 for one in samples)


def test_what_is_computed_again_is_told_once(checkpoints):
    scheduler = engine(checkpoints["v0"], slots=1).scheduler
    low = request("low", LONG[:40], priority=1, new=30)
    low.choices = Choices(0)
    scheduler.submit(low)
    for turn in range(3):
        for _ in range(6):
            scheduler.step()
        scheduler.submit(request(f"high{turn}", new=2))
        scheduler.step()
        assert low.slot < 0 and not low.choices._parts
        while low.slot < 0:
            scheduler.step()
    drain(scheduler)
    told = sum(len(part.experts_NLK) for _, part in low.choices._parts)
    assert scheduler.counters.preempted == 3 and told == len(low.ids) - 1


def test_lower_values_first_and_equal_ones_in_order(checkpoints):
    scheduler, ends = engine(checkpoints["v0"], slots=1).scheduler, []
    for number, priority in enumerate([0, 2, -5, 2, 0]):
        one = request(str(number), priority=priority, new=2)
        one.on_finish = lambda done: ends.append(done.rid)
        scheduler.submit(one)
    drain(scheduler)
    assert ends == ["2", "0", "4", "1", "3"] and scheduler.counters.preempted == 0


def test_the_lowest_that_came_last_leaves_and_only_for_a_higher_one(checkpoints):
    scheduler = engine(checkpoints["v0"], slots=3).scheduler
    low = [request(f"low{n}", priority=p, new=40) for n, p in enumerate((1, 2, 2))]
    for one in low:
        scheduler.submit(one)
    for _ in range(4):
        scheduler.step()
    scheduler.submit(equal := request("equal", priority=2))
    scheduler.step()
    assert equal.slot < 0 and scheduler.counters.preempted == 0
    scheduler.submit(high := request("high", priority=-1))
    scheduler.step()
    assert [one.slot < 0 for one in low] == [False, False, True] and high.slot >= 0
    assert len(low[2].output) == len(low[2].logprobs) == 5, "it keeps what it has"
    scheduler.submit(request("higher", priority=-1))
    scheduler.step()
    assert [one.slot < 0 for one in low] == [False, True, True]
    drain(scheduler)
    assert scheduler.counters.preempted == 2 and len(scheduler.free) == 3
    assert low[1].ended < equal.ended, "before those who came after it"


def told(request):
    return (
        request.ids, request.logprobs, request.top_logprobs, request.ids_logprobs, request.input_logprobs,
        request.input_top_logprobs, request.input_ids_logprobs, request.versions, request.finish, request.hidden,
        request.weight_version, request.spec.histogram, request.supports, _chosen(request),
    )  # fmt: skip


def _chosen(request):
    """Experts and keys of every position, as lists."""
    trace = request.choices.read(len(request.ids) - 1) if request.choices else None
    return trace and (trace.experts_NLK.tolist(), trace.keys_NLS.tolist())


class Pairs:
    """A guide: every token is followed by one of the two behind it."""

    def __init__(self):
        self.last = 0

    def allowed(self):
        return frozenset({(self.last + 1) % 90, (self.last + 2) % 90})

    def feed(self, token):
        assert token in self.allowed()
        self.last = token


def subjects():
    yield request("scored", LONG, 5, score_from=20, new=20, top_logprobs=2, logprob_ids=(4, 9))
    yield request("greedy", LONG[::-1], 5, new=45, temperature=0.0)
    yield request("sampled", LONG[5:80], 5, new=40, top_logprobs=3, top_p=0.9, frequency_penalty=0.5)
    yield request("short", [5, 5, 5], 6, new=50, seed=3)
    traced = request("traced", LONG[20:], 6, new=20, support=True, top_k=5)
    traced.choices = Choices(0, keys=True)
    yield traced
    params = SamplingParams(max_new_tokens=25, seed=4)
    yield Request("guided", LONG[30:], params, priority=6, guide=Pairs())
    embedded = request("embedded", LONG[10:], 7, new=0)
    embedded.wants_hidden = True
    yield embedded


KINDS = {
    "plain": dict(draft_steps=0),
    "no prefix cache": dict(prefix_tokens=0),
    "torch": dict(kernels="torch"),
    "drafts": dict(draft_steps=3),
    "rejection": dict(draft_steps=3, rejection=True),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_request_gets_what_it_would_have_got(likely, kind, seed):
    """Pushed out at random steps, while its prompt is computed, scored, or while it decodes: equal to the bit."""
    rng = random.Random(seed)
    undisturbed = engine(likely, slots=5, **KINDS[kind])
    expected = list(subjects())
    for one in expected:
        undisturbed.scheduler.submit(one)
        drain(undisturbed.scheduler)
    made = engine(likely, **KINDS[kind])
    scheduler, ours, phases = made.scheduler, list(subjects()), set()
    preempt = scheduler._preempt

    def pushed_out(victim):
        phases.add("prompt" if victim.computed < len(victim.prompt) else "decoding")
        preempt(victim)

    scheduler._preempt = pushed_out
    for one in ours:
        scheduler.submit(one)
    number = 0
    while not all(one.finish for one in ours):
        scheduler.step()
        if rng.random() < 0.4 and number < 60:
            number += 1
            scheduler.submit(request(f"urgent{number}", [8, number % 90 + 1], -1, new=rng.randrange(1, 4)))
    drain(scheduler)
    assert scheduler.counters.preempted > 5 and phases == {"prompt", "decoding"}
    if made.scheduler.drafter:
        assert scheduler.counters.spec.accepted > 20
    for one, other in zip(ours, expected, strict=True):
        assert told(one) == told(other), one.rid


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_prompt_that_is_being_scored_is_scored_once(checkpoints, steps):
    scored = [
        request(f"{n}", LONG, 1, score_from=20, new=3, top_logprobs=2, logprob_ids=(4,)) for n in range(2)
    ]
    alone = engine(checkpoints["v0"], slots=1).scheduler
    alone.submit(scored[0])
    drain(alone)
    scheduler = engine(checkpoints["v0"], slots=1).scheduler
    scheduler.submit(scored[1])
    for _ in range(steps):
        scheduler.step()
    scheduler.submit(request("urgent", new=2))
    drain(scheduler)
    assert scheduler.counters.preempted == 1 and told(scored[1]) == told(scored[0])


def test_what_was_cached_is_counted_once(checkpoints):
    scheduler = engine(checkpoints["v0"], slots=1).scheduler
    for rid in ("first", "second"):
        scheduler.submit(one := request(rid, LONG, 1, new=20))
        while len(one.output) < 8:
            scheduler.step()
        scheduler.submit(request(f"{rid} urgent", priority=0, new=2))
        drain(scheduler)
        assert one.cached_tokens == (0 if rid == "first" else 80)
    assert scheduler.counters.preempted == 2
    assert (scheduler.counters.prompt_tokens, scheduler.counters.cached_tokens) == (2 * (90 + 3), 80)


def test_a_prefix_is_waited_for_if_it_comes_no_later_than_oneself(checkpoints):
    """An equal one's prefix is waited for; a lower one's may take for ever, so it is computed again."""
    for priority, waits in ((5, True), (6, True), (4, False)):
        scheduler = engine(checkpoints["v0"]).scheduler
        scheduler.submit(request("first", LONG, 5))
        scheduler.step()
        scheduler.submit(other := request("other", LONG, priority))
        scheduler.step()
        assert (other.slot < 0) == waits
        drain(scheduler)
        assert (other.cached_tokens > 32) == waits
