"""Mixed traffic: nothing depends on what is done behind a step, nobody is harmed by others, and nothing is kept."""

import gc
import json
import random
import time
import weakref
from collections import Counter
from dataclasses import asdict, replace

import httpx
import pytest
from adapters import adapter, stored
from kept import whole
from running import Running

from fullarc.engine import Engine, SamplingParams, sampler
from fullarc.engine.behind import Behind
from fullarc.engine.engine import load_weights
from fullarc.engine.prefix import BLOCK
from fullarc.engine.request import Request
from fullarc.engine.stops import StopStrings, StopWatch
from fullarc.engine.worker import Worker

STEMS = [[3 + (i * i + n) % 80 for i in range(70)] for n in range(3)]
SETTINGS = {"plain": {}, "drafts": dict(draft_steps=3), "spill": dict(prefix_tokens=8 * BLOCK)}


def letters(token):
    """A vocabulary of two letters, so that every stop string soon occurs."""
    return b"ab"[token % 2 :][:1] * (1 + token % 3)


def wish(rng, adapters=("",)):
    """What a request asks for; equal wishes have equal answers."""
    stem, cut = rng.randrange(3), rng.choice([3, 20, 40, 70])
    return dict(
        prompt=STEMS[stem][:cut] + [rng.randrange(1, 90)] * rng.randrange(4),
        new=rng.choice([0, 1, 5, 20, 60]),
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(3),
        score_from=rng.choice([-1, -1, -1, 2]),
        stop=rng.choice(["", "", "aba", "bbbab"]),
        stop_ids=frozenset(rng.choice([(), (4, 9, 33)])),
        salt=rng.choice(["", "", "salt"]),
        adapter=rng.choice(adapters),
    )


def request(rid, wanted, session="", priority=0):
    params = SamplingParams(
        max_new_tokens=wanted["new"], temperature=wanted["temperature"], seed=wanted["seed"],
        stop_ids=wanted["stop_ids"], top_logprobs=wanted["seed"],
    )  # fmt: skip
    made = Request(rid, list(wanted["prompt"]), params, wanted["score_from"], session=session, priority=priority,
                   salt=wanted["salt"], adapter=wanted["adapter"])  # fmt: skip
    if wanted["stop"]:
        made.stops = StopWatch(StopStrings([wanted["stop"]]), letters)
    return made


def answer(r):
    return (r.ids, r.logprobs, r.top_logprobs, r.input_logprobs, r.input_top_logprobs, r.finish, r.matched,
            r.stops and (r.stops.certain, r.stops.start))  # fmt: skip


def engine(folder, tmp_path, overlap=False, **kwargs):
    spill = dict(prefix_spill=tmp_path, prefix_spill_mb=0.3) if kwargs.get("prefix_tokens") else {}
    made = Engine(
        folder, **(dict(max_batch=3, max_len=160, chunk_tokens=32) | spill | kwargs), overlap=overlap
    )
    if made.scheduler.drafter:
        made.scheduler.drafter.always()
    return made


# --- behind a step ----------------------------------------------------------------------------------------------------


class Side:
    """One of two engines that are told to do the same."""

    def __init__(self, made, weights):
        self.scheduler, self.weights, self.requests, self.events = made.scheduler, weights, [], []

    def submit(self, wanted, priority):
        one = request(str(len(self.requests)), wanted, priority=priority)
        one.on_token = lambda r: self.events.append((r.rid, len(r.output)))
        one.on_finish = lambda r: self.events.append((r.rid, r.finish))
        self.requests.append(one)
        self.scheduler.submit(one)

    def act(self, what, number):
        """What comes from outside, between two steps."""
        if what == "cancel":
            self.scheduler.cancel(self.requests[number % len(self.requests)])
        elif what == "update":
            self.scheduler.set_weights(self.weights[number % 2])
        elif what == "retract":
            self.scheduler.retract()
        elif what == "clear":
            self.scheduler.settle()
            self.scheduler.prefix.clear()

    def state(self):
        s = self.scheduler
        s.settle()
        prefixes = [_path(block) for block in s.prefix._known.values()]
        told = [
            answer(r) + (r.cached_tokens, r.versions, r.weight_version, r.spec.histogram)
            for r in self.requests
        ]
        return (
            told,
            sorted(s.running),
            [r.rid for r in s.waiting],
            sorted(s.free),
            asdict(s.counters),
            prefixes,
        )


def _path(block):
    parent, tokens = block.key
    return (*_path(parent), tokens) if hasattr(parent, "key") else (parent, tokens)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_done_behind_a_step_changes_nothing(checkpoints, tmp_path, setting, seed):
    """Two engines in step, with arrivals, cancels, updates and retractions: equal whenever somebody looks."""
    rng, sides = random.Random(seed), []
    for overlap in (False, True):
        made = engine(checkpoints["v0"], tmp_path, overlap, **SETTINGS[setting])
        weights = [load_weights(checkpoints[v]) for v in ("v0", "v1")]
        sides.append(Side(made, weights))
    ours, looks = sides[1].scheduler, 0
    for _ in range(220):
        chance = rng.random()
        if chance < 0.22:
            wanted, priority = wish(rng), rng.choice([0, 0, 1, -1])
            for side in sides:
                side.submit(wanted, priority)
        elif chance < 0.26 and sides[0].requests:
            what, number = rng.choice(["cancel", "cancel", "update", "retract", "clear"]), rng.randrange(100)
            for side in sides:
                side.act(what, number)
        for side in sides:
            if not side.scheduler.idle:
                side.scheduler.step()
        if rng.random() < 0.1:
            looks += 1
            assert sides[1].state() == sides[0].state()
    while not all(side.scheduler.idle for side in sides):
        for side in sides:
            if not side.scheduler.idle:
                side.scheduler.step()
    assert sides[1].state() == sides[0].state() and looks > 10
    by_rid = [[e for e in side.events if e[0] == r.rid] for side in sides for r in side.requests]
    assert by_rid[: len(sides[0].requests)] == by_rid[len(sides[0].requests) :], "each in its order"
    assert any(isinstance(r.matched, str) for r in sides[1].requests)
    assert not ours.behind._tasks


STOPPED = dict(prompt=[5, 6, 7], new=60, temperature=1.0, seed=1, score_from=-1, stop="bbbab", stop_ids=frozenset(),
               salt="", adapter="")  # fmt: skip


def counted(made):
    """The rows of every pass, as they come."""
    forward, rows = made.scheduler.core.forward, []

    def counting(chunks, *more):
        rows.append(sum(len(chunk.ids) for chunk in chunks))
        return forward(chunks, *more)

    made.scheduler.core.forward = counting
    return rows


def test_a_stop_string_is_found_while_the_next_pass_runs(checkpoints, tmp_path):
    """The row that was computed in vain is seen, and nothing of it is told."""
    seen = []
    for overlap in (False, True):
        made = engine(checkpoints["v0"], tmp_path, overlap)
        rows = counted(made)
        made.scheduler.submit(stopped := request("stopped", STOPPED))
        made.scheduler.submit(other := request("other", STOPPED | dict(stop="", new=59)))
        while not other.finish:
            made.scheduler.step()
        seen.append((sum(rows), answer(stopped), answer(other), made.scheduler.counters.steps))
    assert seen[0][1][5:7] == ("stop", "bbbab")
    assert seen[1] == (seen[0][0] + 1, *seen[0][1:])


ASKED = [dict(top_logprobs=2), dict(logprob_ids=(4, 9)), dict(support=True, top_p=0.9)]
ASKED.append({name: value for asked in ASKED for name, value in asked.items()})


@pytest.mark.parametrize("steps", [0, 3])
def test_what_else_could_be_drawn_is_told_while_the_next_pass_runs(checkpoints, tmp_path, steps):
    """Another thread that goes by `told` finds all there, whenever it looks; nobody ends before."""
    answers = []
    for overlap in (False, True):
        made, behind = engine(checkpoints["v0"], tmp_path, overlap, draft_steps=steps, max_batch=5), []
        asking = [request(str(n), STOPPED | dict(stop="", new=9, seed=0)) for n in range(5)]
        for one, asked in zip(asking[1:], ASKED, strict=True):  # the first one asks for nothing
            one.params = replace(one.params, **asked)
            one.on_finish = lambda r, behind=behind: behind.append(len(r.logprobs) - r.told)
        forward = made.scheduler.core.forward

        def slow(*given, asking=asking, behind=behind, forward=forward):
            behind.append(sum(len(one.logprobs) - one.told for one in asking))
            time.sleep(0.02)
            result = forward(*given)
            behind.append(sum(len(one.logprobs) - one.told for one in asking))
            return result

        made.scheduler.core.forward = slow
        for one in asking:
            made.scheduler.submit(one)
        while not made.scheduler.idle:
            made.scheduler.step()
            for one in asking[1:]:
                assert one.told == len(one.logprobs) if one.finish or not overlap else True
        if steps == 0:
            assert behind == [0, 0] + [4 * overlap, 0] * 8 + [0] * 4
        answers.append([(answer(one), one.ids_logprobs, one.supports) for one in asking])
        assert all(one.told == 9 for one in asking)
        lengths = [tuple(map(len, (one.top_logprobs, one.ids_logprobs, one.supports))) for one in asking]
        assert lengths == [(0, 0, 0), (9, 0, 0), (0, 9, 0), (0, 0, 9), (9, 9, 9)]
    assert answers[0] == answers[1]


def lines(client, path, body):
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def test_streams_in_every_dialect_wait_for_what_is_told_late(talking, monkeypatch):
    """Events hold all that was asked of their tokens, however late it is told; together they are the whole reply."""
    real = sampler._tell_alternatives
    monkeypatch.setattr(sampler, "_tell_alternatives", lambda *given: (time.sleep(0.01), real(*given)))
    running, ids = Running(talking[0], overlap=True), talking[1].encode("so list it then")
    cases = [
        ("/generate", dict(input_ids=ids, return_logprob=True, top_logprobs_num=2, token_ids_logprob=[4],
                           sampling_params={"max_new_tokens": 12, "sampling_seed": 3, "ignore_eos": True})),
        ("/v1/completions", dict(model="m", prompt=ids, logprobs=2, max_tokens=12, seed=3, ignore_eos=True)),
        ("/v1/chat/completions", dict(model="m", messages=[{"role": "user", "content": "so"}], logprobs=True,
                                      top_logprobs=2, max_tokens=12, seed=3, ignore_eos=True)),
        ("/inference/v1/generate", dict(token_ids=ids, sampling_params={
            "max_tokens": 12, "seed": 3, "logprobs": 2, "ignore_eos": True})),
    ]  # fmt: skip
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as client:
        for path, body in cases:
            whole, events = client.post(path, json=body).json(), list(lines(client, path, body))
            assert len(events) > 3, path
            if path == "/generate":
                for meta in (event["meta_info"] for event in events):
                    count = meta["completion_tokens"]
                    assert len(meta["output_top_logprobs"]) == len(meta["output_token_ids_logprobs"]) == count
                for name in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
                    assert events[-1]["meta_info"][name] == whole["meta_info"][name]
                continue
            told = [event["choices"][0].get("logprobs") for event in events if event["choices"]]
            expected = whole["choices"][0]["logprobs"]
            for name in ("content", "tokens", "token_logprobs", "top_logprobs"):
                if name in expected:
                    assert [x for part in told if part for x in part[name]] == expected[name], (path, name)
                    assert len(expected[name]) == 12
    running.stop()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_slot_that_a_stop_string_frees_is_given_away_in_the_next_step(checkpoints, tmp_path, overlap):
    """Also to a request that came when the string was not found yet."""
    made = engine(checkpoints["v0"], tmp_path, max_batch=1)
    made.scheduler.submit(first := request("first", STOPPED))
    while not first.finish:
        made.scheduler.step()
    made = engine(checkpoints["v0"], tmp_path, overlap, max_batch=1)
    made.scheduler.submit(again := request("again", STOPPED))
    for _ in first.output:
        made.scheduler.step()
    assert len(again.output) == len(first.output) and bool(again.finish) == (not overlap)
    made.scheduler.submit(late := request("late", STOPPED))
    made.scheduler.step()
    assert again.finish == "stop" and late.slot == 0


def test_tasks_run_in_order_beside_the_pass_and_what_they_raise_is_raised():
    behind, done = Behind(overlap=True), []
    behind.later(lambda: (time.sleep(0.05), done.append(1)))
    behind.later(lambda: done.append(2))
    assert done == [] and behind.during(lambda: list(done)) == [] and done == [1, 2]

    def fails():
        raise ValueError("broken")

    for work in (behind.settle, lambda: behind.during(lambda: None)):
        behind.later(fails)
        behind.later(lambda: done.append(3))
        with pytest.raises(ValueError, match="broken"):
            work()
    assert done == [1, 2, 3, 3], "the others' ends are told all the same"
    behind.settle()
    at_once = Behind(overlap=False)
    at_once.later(lambda: done.append(4))
    assert done[-1] == 4


@pytest.mark.parametrize("overlap", [False, True])
def test_a_worker_tells_each_step_while_or_before_the_next_one_runs(checkpoints, tmp_path, overlap):
    made, seen = engine(checkpoints["v0"], tmp_path, overlap), []
    one = request("a", wish(random.Random(0)) | dict(new=9, stop="", stop_ids=frozenset(), score_from=-1))
    news = []
    one.on_token = lambda r: news.append(len(r.output))
    one.on_finish = lambda r: news.append(r.finish)
    worker = Worker(made.scheduler, lambda: seen.append(news[-1] if news else None))
    worker.start()
    worker.call(lambda s: s.submit(one)).result(10)
    deadline = time.monotonic() + 10
    while (not seen or seen[-1] != "length") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.call(lambda s: (s.idle, len(s.behind._tasks))).result(10) == (True, 0)
    worker.stop()
    assert [n for n in dict.fromkeys(seen) if n] == [1, 2, 3, 4, 5, 6, 7, 8, "length"]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fails", ["forward", "restore", "publish"])
def test_a_failing_step_ends_all_and_leaves_nobody_waiting(checkpoints, tmp_path, overlap, fails):
    """Whatever fails: a pass, or memory for what is copied from the prefix cache or to it, then for good."""
    made, ends = engine(checkpoints["v0"], tmp_path, overlap), []
    for number in range(5):
        one = request(str(number), wish(random.Random(number)) | dict(new=50, stop="", stop_ids=frozenset()))
        one.on_finish = lambda r: ends.append(r.rid)
        made.scheduler.submit(one)
    owner = made.scheduler.core if fails == "forward" else made.scheduler.prefix
    real, calls = getattr(owner, fails), iter(range(100))

    def failing(*arguments):
        if next(calls) >= (6 if fails == "forward" else 1):
            raise RuntimeError("broken")
        return real(*arguments)

    setattr(owner, fails, failing)
    worker = Worker(made.scheduler)
    worker.start()
    deadline = time.monotonic() + 10
    while len(ends) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.stop()
    assert sorted(ends) == ["0", "1", "2", "3", "4"] and isinstance(worker.error, RuntimeError)
    assert len(made.scheduler.free) == 3


# --- nothing is kept --------------------------------------------------------------------------------------------------


def phase(scheduler, one, preempted):
    if one.slot < 0:
        return "preempted" if one.rid in preempted else "waiting"
    if one.computed < len(one.prompt):
        return "prefilling"
    return "drafting" if one.spec.drafts else "decoding"


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_nobody_is_harmed_and_nothing_is_kept(checkpoints, tmp_path, setting, overlap):
    """Sessions, priorities, salts, adapters, cancels in every phase: all others get what they get alone."""
    rng, folder = random.Random(7), checkpoints["v0"]
    for name in ("one", "two"):
        adapter(tmp_path / name, stored(folder), seed=len(name))
    made = engine(folder, tmp_path, overlap, **SETTINGS[setting])
    scheduler, ends, preempted, cancelled = made.scheduler, Counter(), set(), Counter()
    preempt = scheduler._preempt
    scheduler._preempt = lambda victim: (preempted.add(victim.rid), preempt(victim))
    for name in ("one", "two"):
        made.load_adapter(name, tmp_path / name)
    wishes, requests = {}, []
    for number in range(300):
        if number < 200 and rng.random() < 0.45:
            wanted, rid = wish(rng, ("", "", "one", "two")), str(len(requests))
            one = request(rid, wanted, rng.choice("abc"), rng.choice([0, 0, 1, 2]))
            one.on_finish = lambda r: ends.update([r.rid])
            scheduler.check(one)
            scheduler.submit(one)
            wishes[rid] = wanted
            requests.append(one)
        if rng.random() < 0.12 and (alive := [r for r in requests if not r.finish]):
            victim = rng.choice(alive)
            for rare in ("preempted", "prefilling"):
                if not cancelled[rare]:
                    victim = next((r for r in alive if phase(scheduler, r, preempted) == rare), victim)
            scheduler.settle()
            if not victim.finish:
                cancelled[phase(scheduler, victim, preempted)] += 1
                scheduler.cancel(victim)
        if not scheduler.idle:
            scheduler.step()
    while not scheduler.idle:
        scheduler.step()
    assert ends == Counter(r.rid for r in requests), "every request ends once"
    wanted_phases = {"waiting", "preempted", "prefilling", "drafting" if setting == "drafts" else "decoding"}
    assert wanted_phases <= set(cancelled), cancelled
    assert scheduler.counters.aborted == sum(cancelled.values())
    if setting == "spill":
        assert scheduler.prefix.spilled > 20 and scheduler.prefix.returned > 5

    assert sorted(scheduler.free) == [0, 1, 2] and not scheduler.running
    assert len(scheduler.waiting) == 0 and not scheduler.waiting._lines
    assert len(scheduler.waiting.shares) == len(scheduler._prompts) == 0
    assert not scheduler.behind._tasks and not scheduler.sampler.stopped
    assert all(r.held == () and not r.spec.probabilities for r in requests)
    whole(scheduler.prefix)
    weights = [weakref.ref(scheduler.adapters[name].weights) for name in ("one", "two")]
    alone = engine(folder, tmp_path, prefix_tokens=0)
    for name in ("one", "two"):
        alone.load_adapter(name, tmp_path / name)
        made.unload_adapter(name)
    for one in requests:
        if one.finish != "abort":
            other = request(one.rid, wishes[one.rid])
            alone.scheduler.submit(other)
            while not other.finish:
                alone.scheduler.step()
            assert answer(one) == answer(other), one.rid
    requests.clear()
    del one, other, victim, alive
    gc.collect()
    assert [ref() for ref in weights] == [None, None]
