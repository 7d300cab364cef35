"""Sessions share slots and prompt tokens: the formula on paper, at random, and in the engine."""

import itertools
import random

import pytest

from fullarc.engine import Engine, SamplingParams
from fullarc.engine.fairness import Shares
from fullarc.engine.request import Request
from fullarc.engine.waiting import Waiting

A, B, C = (0, "a"), (0, "b"), (0, "c")
URGENT = (-1, "a")


def serve(shares, costs, turns):
    """Who is next `turns` times, if everybody always wants something of the same cost."""
    served = []
    for _ in range(turns):
        claim = min(costs, key=lambda c: shares.order(c, costs[c]))
        shares.charge(claim, costs[claim])
        served.append(claim[1])
    return "".join(served)


def waiting(*claims):
    shares = Shares()
    for claim in claims:
        shares.begin(claim)
    return shares


@pytest.mark.parametrize(
    "costs, expected",
    [
        ({A: 10}, "aaaa"),
        ({A: 10, B: 10}, "abababab"),
        ({A: 10, B: 30}, "aaabaaab"),  # at 10, 20 and 30 (a began first), 30; 40, 50, 60, 60
        ({A: 7, B: 10, C: 5}, "cabcacbc"),  # 5 7 10 10 14 15 20 20
        ({URGENT: 100, B: 1}, "aaaa"),
    ],
)
def test_the_formula_by_hand(costs, expected):
    assert serve(waiting(*costs), costs, len(expected)) == expected


def test_who_comes_late_begins_where_the_clock_stands():
    shares = waiting(A)
    assert serve(shares, {A: 10}, 3) == "aaa"  # V = 30
    shares.begin(B)
    # a at 40, b at 40: a began first; then b 40, a 50, b 50
    assert serve(shares, {A: 10, B: 10}, 4) == "abab"
    shares.end(B)
    serve(shares, {A: 10}, 5)  # D = V = 100: b has missed five turns, and is owed none
    shares.begin(B)
    assert serve(shares, {A: 10, B: 10}, 4) == "abab"


def test_what_is_given_back_may_be_had_again():
    shares = waiting(A, B)
    assert serve(shares, {A: 10, B: 10}, 2) == "ab"
    shares.refund(B, 6)  # at 4 instead of 10: 14 before a's 20, then 24 behind it
    assert serve(shares, {A: 10, B: 10}, 3) == "bab"


def test_nothing_is_kept_of_those_who_do_not_wait():
    shares = waiting(A, B, URGENT)
    serve(shares, {A: 10, B: 10}, 3)
    shares.refund(C, 5)
    shares.among([B])
    assert len(shares) == 1
    shares.among([])
    assert len(shares) == 0 and not shares._clock


@pytest.mark.parametrize("seed", range(5))
def test_the_bounds_hold_at_random(seed):
    """Costs change at every turn. Over all spans in which two wait, what they got differs by C_a + C_b at most."""
    rng, most = random.Random(seed), {A: 40, B: 9, C: 25}
    shares = waiting(*most)
    heads = {claim: rng.randint(1, most[claim]) for claim in most}
    got = [dict.fromkeys(most, 0)]
    for _ in range(400):
        claim = min(heads, key=lambda c: shares.order(c, heads[c]))
        shares.charge(claim, heads[claim])
        got.append(got[-1] | {claim: got[-1][claim] + heads[claim]})
        heads[claim] = rng.randint(1, most[claim])
    for a, b in itertools.combinations(most, 2):
        ahead = [now[a] - now[b] for now in got]
        assert max(ahead) - min(ahead) <= most[a] + most[b]
        assert max(ahead) - min(ahead) > max(most[a], most[b]) / 2, "the bound is not idle"


def test_a_stream_of_newcomers_starves_nobody():
    """While `a` waits for something of cost 10, all that come after it get 10 together."""
    shares, before = waiting(A), 0
    serve(shares, {A: 10}, 4)
    for number in range(100):
        newcomer = (0, f"new {number}")
        shares.begin(newcomer)
        if serve(shares, {A: 10, newcomer: 3}, 1) == "a":
            break
        shares.end(newcomer)
        before += 3
    assert before <= 10


# --- in the queue and in the engine -----------------------------------------------------------------------------------


def request(rid, session="", priority=0, prompt=(4, 5, 6), new=8):
    params = SamplingParams(max_new_tokens=new, seed=1)
    return Request(rid, list(prompt), params, session=session, priority=priority)


def taken(queue):
    order = []
    while queue:
        queue.charge(one := queue.take())
        order.append(one.rid)
    queue.tidy()
    return order


def test_the_queue_is_first_come_first_served_within_a_session():
    queue = Waiting(100)
    for number in range(5):
        queue.add(request(f"a{number}", "a"))
    queue.add(request("b0", "b"))
    queue.add(request("u0", "a", priority=-3))
    queue.remove(third := next(r for r in queue if r.rid == "a2"))
    assert third not in list(queue) and len(queue) == 6
    assert taken(queue) == ["u0", "a0", "b0", "a1", "a3", "a4"]
    assert not queue and len(queue.shares) == 0


def test_what_was_charged_before_a_session_had_been_away_is_forgotten():
    """Else what its old request did not need would let 30 of its new ones in before anybody else."""
    queue = Waiting(2000)
    queue.add(old := request("old", "a", new=1900))
    queue.charge(queue.take())
    queue.tidy()
    for number in range(30):
        queue.add(request(f"a{number}", "a", new=50))
    queue.add(request("b0", "b", new=50))
    queue.refund(old, again=False)
    assert taken(queue).index("b0") <= 1


def test_what_is_not_needed_is_had_again_by_those_who_have_waited_on():
    queue = Waiting(2000)
    for rid, session in (("a0", "a"), ("b0", "b"), ("a1", "a"), ("b1", "b"), ("a2", "a")):
        queue.add(request(rid, session, new=60 if rid in ("a1", "a2") else 100))
    queue.charge(first := queue.take())
    queue.charge(queue.take())
    queue.refund(first, again=False)  # a has 3, b 103: 66, 129, 206; else 166, 206, 229
    assert taken(queue) == ["a1", "a2", "b1"]


def test_others_may_look_at_the_queue_while_it_changes():
    queue = Waiting(100)
    for number in range(4):
        queue.add(request(f"a{number}", "a"))
    seen = []
    for one in queue:
        seen.append(one.rid)
        queue.add(request(f"b{len(seen)}", f"b{len(seen)}"))
        if one.rid == "a0":
            queue.remove(one)
    assert seen == ["a0", "a1", "a2", "a3"]


def test_a_request_that_must_wait_on_keeps_its_place():
    queue = Waiting(100)
    for rid in ("a0", "a1"):
        queue.add(request(rid, "a"))
    queue.add(request("b0", "b"))
    for _ in range(3):
        first, second = queue.take(), queue.take()
        assert (first.rid, second.rid) == ("a0", "a1"), "nobody is charged for having been looked at"
        for one in (second, first):
            queue.put_back(one)
    assert taken(queue) == ["a0", "b0", "a1"]


@pytest.mark.parametrize("seed", range(4))
def test_the_next_one_is_the_least_of_all_lines(seed):
    """Random traffic of the queue, against looking at every line each time."""
    rng, queue, running, mine = random.Random(seed), Waiting(100), [], []

    def least():
        heads = {}
        for one in mine:
            heads.setdefault(one.claim, one)
        return min(
            heads.values(),
            key=lambda r: (*queue.shares.order(r.claim, 3 + r.params.max_new_tokens), began[r.claim]),
        )

    began, number = {}, itertools.count()
    for step in range(600):
        chance = rng.random()
        if chance < 0.5 or not mine:
            one = request(str(step), rng.choice("abcdefgh"), rng.randrange(2), new=rng.randrange(1, 30))
            if one.claim not in {r.claim for r in mine}:
                began[one.claim] = next(number)
            mine.append(one)
            queue.add(one)
        elif chance < 0.6:
            mine.remove(one := rng.choice(mine))
            queue.remove(one)
        elif chance < 0.9:
            expected = least()
            assert queue.priority == expected.priority and queue.take() is expected
            if rng.random() < 0.2:
                queue.put_back(expected)
            else:
                queue.charge(expected)
                mine.remove(expected)
                running.append(expected)
            queue.tidy()
        elif running:
            queue.refund(running.pop(rng.randrange(len(running))), again=False)
        assert len(queue) == len(mine) and len(queue._heap) < 64 + 5 * 16
    for one in list(queue):
        queue.remove(one)
    assert not queue._heap and not queue._lines and len(queue.shares) == 0


@pytest.fixture
def engine(checkpoints):
    return Engine(checkpoints["v0"], max_batch=4, max_len=128, chunk_tokens=32, prefix_tokens=0)


def test_a_thousand_queued_requests_starve_no_other_session(engine):
    """Costs are equal, so the bound C_a + C_b is one turn: from b's first on, they are let in by turns."""
    scheduler, order = engine.scheduler, []
    start = scheduler._start

    def starting(request, found):
        order.append(request.rid)
        start(request, found)

    scheduler._start = starting
    for number in range(1000):
        scheduler.submit(request(f"a{number}", "a", new=3))
    for _ in range(5):
        scheduler.step()
    before = len(order)
    for number in range(20):
        scheduler.submit(request(f"b{number}", "b", new=3))
    while len(order) < before + 40:
        scheduler.step()
    came = [rid[0] for rid in order[before : before + 40]]
    assert came.index("b") <= 1
    for first, last in itertools.combinations(range(41), 2):
        span = came[first:last]
        if "b" in came[last - 1 :]:
            assert abs(span.count("a") - span.count("b")) <= 2  # (C_a + C_b) / C
    assert scheduler.abort(None) > 900 and len(scheduler.free) == 4 and not scheduler.waiting


def test_what_a_request_did_not_use_is_given_back(checkpoints):
    """a asks for a hundred tokens and stops after one, b asks for one. Cost: 103 and 4 tokens, and then both 4."""
    scheduler, order = Engine(checkpoints["v0"], max_batch=1, max_len=128, prefix_tokens=0).scheduler, []
    for number in range(60):
        for session, new in (("a", 100), ("b", 1)):
            params = SamplingParams(max_new_tokens=new, seed=1, stop_ids=frozenset(range(96)))
            one = Request(f"{session}{number}", [4, 5, 6], params, session=session)
            one.on_finish = lambda r: order.append(r.session)
            scheduler.submit(one)
    while len(order) < 50:
        scheduler.step()
    assert order.index("a") == 25, "4 * 25 < 103 < 4 * 26"
    assert order[25:50].count("a") == 13, "by turns from then on"


@pytest.mark.parametrize("length, steps", [(20, 2), (60, 4), (90, 6)])
def test_a_prompt_is_computed_by_turns_with_another_sessions_long_ones(engine, length, steps):
    """Three prompts of 120 tokens take twelve steps of 32; one of n turns is served within 2 n, however they queue."""
    scheduler = engine.scheduler
    long_ones = [request(f"a{n}", "a", prompt=[n + 1] * 120, new=1) for n in range(3)]
    for one in long_ones:
        scheduler.submit(one)
    scheduler.step()
    scheduler.submit(other := request("b", "b", prompt=[9] * length, new=1))
    for _ in range(steps):
        scheduler.step()
    assert other.finish == "length"
    while not scheduler.idle:
        scheduler.step()
    assert all(one.finish == "length" for one in long_ones) and len(scheduler._prompts) == 0
