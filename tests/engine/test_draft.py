"""Speculative decoding changes when tokens come, and nothing else."""

import json
import math
import random
from collections import Counter, defaultdict

import httpx
import pytest
import torch
from running import Running

from fullarc.config.errors import FullarcError
from fullarc.engine import Engine, SamplingParams
from fullarc.engine.draft import KEPT_STATES, Pace
from fullarc.engine.request import Request
from fullarc.engine.sampling import draft, sample
from fullarc.model import load_model, save_model

PROMPTS = [[5, 9, 13, 2] * 20, list(range(1, 60)), [7], [3 + (i * i) % 80 for i in range(150)]]


class Steady:
    """A pace that drafts in a given rhythm instead of by a clock."""

    def __init__(self, *rhythm):
        self.rhythm, self.step = rhythm, 0

    def choose(self, batch, quiet):
        self.step += 1
        return self.rhythm[self.step % len(self.rhythm)]

    def record(self, *_):
        pass


def engine(folder, steps=0, pace=None, **kwargs):
    made = Engine(folder, **(dict(max_batch=4, max_len=256, chunk_tokens=48) | kwargs), draft_steps=steps)
    if steps:
        made.scheduler.drafter.always()
        made.scheduler.drafter.pace = pace
    return made


def spec(made):
    return made.scheduler.counters.spec


def same(ours, theirs):
    return [(o.token_ids, o.logprobs, o.top_logprobs, o.finish_reason) for o in ours] == [
        (o.token_ids, o.logprobs, o.top_logprobs, o.finish_reason) for o in theirs
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_output_is_that_of_plain_decoding_to_the_bit(shaped, steps, temperature):
    wanted = dict(max_new_tokens=40, temperature=temperature, top_p=0.9, stop_ids=(), top_logprobs=3, seed=4)
    plain = engine(shaped[1]).generate(PROMPTS, **wanted)
    made = engine(shaped[1], steps)
    assert same(made.generate(PROMPTS, **wanted), plain)
    assert spec(made).proposed > 0
    assert same(made.generate(PROMPTS, **wanted), plain), "from the prefix cache"


def test_accepted_drafts_save_steps(likely):
    wanted = dict(max_new_tokens=60, temperature=0.0, stop_ids=(), forbidden_ids=[4, 5])
    plain, made = engine(likely), engine(likely, 4)
    assert same(made.generate(PROMPTS, **wanted), plain.generate(PROMPTS, **wanted))
    counted = spec(made)
    assert 1.5 < counted.accept_length <= 5
    assert made.scheduler.counters.steps < 0.8 * plain.scheduler.counters.steps
    assert sum(counted.histogram) == counted.verified
    assert sum(n * times for n, times in enumerate(counted.histogram)) == counted.accepted
    assert counted.accept_length == pytest.approx(1 + sum(counted.per_position(4)) / counted.verified)


def test_a_stop_token_among_accepted_drafts_ends_the_completion_there(likely):
    free = engine(likely).generate(PROMPTS, 40, temperature=0.0, stop_ids=())
    ends = [sorted(set(output.token_ids))[len(set(output.token_ids)) // 2] for output in free]
    for stop in ends:
        wanted = dict(max_new_tokens=40, temperature=0.0, stop_ids=[stop])
        assert same(engine(likely, 4).generate(PROMPTS, **wanted), engine(likely).generate(PROMPTS, **wanted))


@pytest.mark.parametrize("rhythm", [(0, 1), (0, 0, 0, 1, 1), (1, 0, 0, 1, 1), (*(0,) * (KEPT_STATES + 9), 1)])
def test_drafting_may_pause_at_any_time(likely, rhythm):
    wanted = dict(max_new_tokens=100, temperature=0.7, stop_ids=(), seed=2)
    made = engine(likely, 4, Steady(*rhythm))
    assert same(made.generate(PROMPTS, **wanted), engine(likely).generate(PROMPTS, **wanted))
    assert spec(made).accepted > 0


def test_pauses_and_prefix_hits_leave_no_hole_in_the_mtp_layers_rows(checkpoints):
    rows = []
    for pace, again in ((None, False), (Steady(*(0,) * 17, 1), False), (None, True)):
        made = engine(checkpoints["v0"], 4, pace, max_batch=1, prefix_tokens=512 * again)
        made.generate([PROMPTS[1]], 30, temperature=0.0, stop_ids=())
        if again:
            cache = made.scheduler.core.cache
            cache.write(0, 0, torch.zeros_like(cache.read(0, 0, cache.max_len)))
            output = made.generate([PROMPTS[1]], 30, temperature=0.0, stop_ids=())[0]
            assert output.cached_tokens == 47  # the last of three blocks' tokens is computed once more
        rows.append(made.scheduler.core.cache.read(0, 1, 69)[-1].clone())
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_drafts_are_those_of_the_training_layer(shaped):
    """The first draft is what the trainer's MTP layer predicts behind the last known token."""
    model, folder = shaped
    made = engine(folder, 1, chunk_tokens=512)
    for prompt in PROMPTS[:2]:
        request = Request(f"{len(prompt)}", prompt, SamplingParams(max_new_tokens=9, temperature=0.0))
        made.scheduler.submit(request)
        made.scheduler.step()
        seen = exact = 0
        while not request.finish and request.spec.drafts:
            with torch.no_grad():
                full = torch.tensor([request.ids])
                state = model.mtp(model.trunk(full).hidden_BTD, full, steps=1).hidden[0][0, -2]
                logits = model.lm_head(state)
                exact += request.spec.drafts == [int(logits.argmax())]
                # the native kernels draft with 8 bits of the output layer
                assert logits[request.spec.drafts[0]] > logits.max() - 0.02 * (logits.max() - logits.min())
            seen += 1
            made.scheduler.step()
        assert seen > 3 and exact >= 0.8 * seen
        while not made.scheduler.idle:
            made.scheduler.step()


def test_weights_may_change_and_requests_may_go_while_drafts_are_pending(likely, checkpoints):
    wanted = SamplingParams(max_new_tokens=30, temperature=0.0)
    outcomes = []
    for steps in (0, 3):
        made = engine(checkpoints["v0"], steps)
        requests = [Request(str(n), list(p), wanted) for n, p in enumerate(PROMPTS)]
        for request in requests:
            made.scheduler.submit(request)
        while len(requests[0].logprobs) < 6:
            made.scheduler.step()
        assert made.scheduler.abort("1") == 1
        made.scheduler.retract()
        while not made.scheduler.idle:
            made.scheduler.step()
        assert len(made.scheduler.free) == 4
        outcomes.append([r.ids for r in requests if r.rid != "1"])
        # swapped in the middle, drafts pending: tokens after the swap come from the new weights
        late = Request("late", PROMPTS[0], wanted)
        made.scheduler.submit(late)
        while len(late.logprobs) < 8:
            made.scheduler.step()
        made.update_weights(checkpoints["v1"], "1")
        while not made.scheduler.idle:
            made.scheduler.step()
        assert [v for v, _, _ in late.versions] == ["0", "1"] and late.versions[-1][2] == 30
    assert outcomes[0] == outcomes[1]


def test_drafts_stop_where_room_ends(likely):
    for length, new in ((250, 50), (20, 1), (20, 2), (253, 3)):
        prompt = [[1 + i % 90 for i in range(length)]]
        plain = engine(likely).generate(prompt, new, temperature=0.0, stop_ids=())
        assert same(engine(likely, 4).generate(prompt, new, temperature=0.0, stop_ids=()), plain)


def test_what_cannot_draft_is_refused(checkpoints, tmp_path, build):
    with pytest.raises(FullarcError, match="1 to 4"):
        Engine(checkpoints["v0"], draft_steps=5)
    model = build()
    model.config = model.config.model_copy(update={"num_nextn_predict_layers": 0})
    model.mtp_layer = None
    save_model(model, tmp_path)
    with pytest.raises(FullarcError, match="no MTP layer"):
        Engine(tmp_path, draft_steps=2)


# --- penalties and statistics ---------------------------------------------------------------------------------------


def test_drafts_see_the_requests_own_penalties(likely):
    """A bias that decides every token decides every draft; a penalty that forbids repeating forbids drafting it."""
    for steered in (dict(logit_bias=((7, 50.0),)), dict(frequency_penalty=2.0, presence_penalty=2.0)):
        outcomes = []
        for steps in (0, 4):
            made = engine(likely, steps)
            wanted = SamplingParams(max_new_tokens=30, temperature=0.0, **steered)
            requests = [Request(str(n), list(prompt), wanted) for n, prompt in enumerate(PROMPTS)]
            for request in requests:
                made.scheduler.submit(request)
            while not made.scheduler.idle:
                made.scheduler.step()
            outcomes.append([(r.ids, r.logprobs) for r in requests])
        assert outcomes[0] == outcomes[1]
        if "logit_bias" in steered:
            assert {token for r in requests for token in r.output} == {7} and spec(made).accept_rate == 1.0
        else:
            assert spec(made).accept_rate > 0.25


def test_every_draft_is_drawn_by_the_number_that_will_draw_its_token(likely):
    """So later drafts are accepted too; drawn by other numbers none of them was."""
    made = engine(likely, 4)
    made.generate(PROMPTS, 60, temperature=1.0, stop_ids=(), seed=1)
    first, second, third, _ = spec(made).per_position(4)
    assert second > first / 4 and third > second / 4


def test_the_statistics_are_those_of_what_is_seen(likely):
    """Counted again from outside: the drafts before a step, and the tokens that it brought."""
    made = engine(likely, 3)
    requests = [Request(str(n), p, SamplingParams(max_new_tokens=40, temperature=0.7, seed=n)) for n, p in
                enumerate(PROMPTS)]  # fmt: skip
    for request in requests:
        made.scheduler.submit(request)
    seen = {request.rid: [0, 0, [0] * 5] for request in requests}
    while not made.scheduler.idle:
        before = [
            (r, list(r.spec.drafts), len(r.output)) for r in made.scheduler.running.values() if r.spec.drafts
        ]
        made.scheduler.step()
        for r, drafts, start in before:
            new = r.output[start:]
            right = next(
                (i for i, (d, t) in enumerate(zip(drafts, new, strict=False)) if d != t), len(drafts)
            )
            seen[r.rid][0] += len(drafts)
            seen[r.rid][1] += right
            seen[r.rid][2][right] += 1
            assert len(new) == right + 1
    for r in requests:
        proposed, accepted, histogram = seen[r.rid]
        steps = sum(histogram)
        assert (r.spec.proposed, r.spec.accepted, r.spec.histogram, r.spec.verified) == (
            proposed, accepted, histogram, steps,
        )  # fmt: skip
        told = r.spec.told(40)
        assert told["spec_accept_length"] == 40 / steps and told["spec_accept_rate"] == accepted / proposed
        assert (told["spec_verify_ct"], told["spec_num_correct_drafts"], told["spec_num_proposed_drafts"]) == (
            steps, accepted, proposed,
        )  # fmt: skip
        assert (told["spec_accept_token_num"], told["spec_draft_token_num"]) == (accepted, proposed)
        assert told["spec_correct_drafts_histogram"] == histogram
    total = spec(made)
    assert (total.proposed, total.accepted) == tuple(sum(s[n] for s in seen.values()) for n in (0, 1))
    assert total.per_position(3) == [sum(sum(s[2][n:]) for s in seen.values()) for n in (1, 2, 3)]
    assert total.accept_length == 1 + total.accepted / total.verified > 1.5


def test_the_statistics_over_http_are_those_of_what_is_seen(likely):
    """`meta_info` of /generate, streamed and not, and /metrics, against drafts and tokens counted at each step."""
    running = Running(likely, draft_steps=3)
    scheduler, seen = running.engine.scheduler, defaultdict[str, list[tuple[int, int]]](list)
    scheduler.drafter.always()
    step = scheduler.step

    def watched():
        before = [(r, len(r.spec.drafts), len(r.output)) for r in scheduler.running.values() if r.spec.drafts]
        step()
        for r, drafts, start in before:
            seen[r.rid].append((drafts, len(r.output) - start - 1))

    scheduler.step = watched
    try:
        with httpx.Client(base_url=running.url, timeout=300, trust_env=False) as http:
            params = {"max_new_tokens": 40, "temperature": 0.7, "sampling_seed": 3, "ignore_eos": True}
            ask = {"sampling_params": params, "return_logprob": True}
            metas = [
                http.post("/generate", json=ask | {"input_ids": PROMPTS[0], "rid": "a"}).json()["meta_info"]
            ]
            with http.stream(
                "POST", "/generate", json=ask | {"input_ids": PROMPTS[1], "stream": True}
            ) as answer:
                events = [line for line in answer.iter_lines() if line.startswith("data: {")]
            metas.append(json.loads(events[-1][6:])["meta_info"])
            lines = dict(
                line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#"
            )
    finally:
        running.stop()
    for meta in metas:
        runs = seen[meta["id"]]
        proposed, accepted = (sum(column) for column in zip(*runs, strict=True))
        assert meta["spec_verify_ct"] == len(runs) and meta["spec_accept_length"] == 40 / len(runs)
        assert (meta["spec_draft_token_num"], meta["spec_accept_token_num"]) == (proposed, accepted)
        assert (meta["spec_num_proposed_drafts"], meta["spec_num_correct_drafts"]) == (proposed, accepted)
        assert meta["spec_accept_rate"] == accepted / proposed > 0.2
        counts = Counter(right for _, right in runs)
        assert meta["spec_correct_drafts_histogram"] == [counts[n] for n in range(5)]
    runs = [run for meta in metas for run in seen[meta["id"]]]
    proposed, accepted = (sum(column) for column in zip(*runs, strict=True))
    assert int(lines["vllm:spec_decode_num_drafts_total"]) == len(runs)
    assert int(lines["vllm:spec_decode_num_draft_tokens_total"]) == proposed
    assert int(lines["vllm:spec_decode_num_accepted_tokens_total"]) == accepted
    for place in range(4):
        name = f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{place}"}}'
        assert int(lines[name]) == sum(right > place for _, right in runs)
    assert float(lines["sglang:spec_accept_rate"]) == accepted / proposed
    assert float(lines["sglang:spec_accept_length"]) == 1 + accepted / len(runs)


def test_the_pace_is_told_of_decoding_steps_alone(likely):
    """And of these whether they drafted, if the step before did alike, and what they brought."""

    class Notes(Steady):
        notes: list = []

        def record(self, batch, drafted, tokens, seconds):
            self.notes.append((batch, drafted, tokens, seconds > 0))

    made = engine(likely, 4, Notes(True, True, False, False, True, True, True))
    made.generate([PROMPTS[1]], 1, stop_ids=())
    assert not made.scheduler.drafter.pace.notes, "a prompt is no decoding"
    requests = [
        Request(f"{n}", p, SamplingParams(max_new_tokens=40, temperature=0.0)) for n, p in enumerate(PROMPTS)
    ]
    for request in requests:
        made.scheduler.submit(request)
    expected = []
    while not made.scheduler.idle:
        running = [r for r in requests if r.slot >= 0 and not r.finish]
        decoding = len(running) == 4 and all(r.logprobs for r in running)
        drafts, before = (
            max((len(r.spec.drafts) for r in running), default=0),
            sum(len(r.output) for r in requests),
        )
        known, count = made.scheduler.drafter.pace.step, len(made.scheduler.drafter.pace.notes)
        made.scheduler.step()
        if decoding and len(made.scheduler.drafter.pace.notes) > count:
            chosen = made.scheduler.drafter.pace.rhythm[(known + 1) % 7]
            brought = sum(len(r.output) for r in requests) - before
            assert drafts == 4 * chosen, "only a step that checked as many as it made"
            expected.append((4, chosen, brought, True))
    notes = [note for note in made.scheduler.drafter.pace.notes if note[0] == 4]
    assert notes == expected and {drafted for _, drafted, _, _ in notes} == {False, True}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_end_where_the_mtp_layer_is_not_sure(likely, kernels, temperature):
    """They begin as without a limit, the first is there if the trainer's MTP layer is sure, and tokens are the same."""
    model, wanted = load_model(likely), dict(max_new_tokens=30, temperature=temperature, stop_ids=(), seed=3)
    made, seen = engine(likely, 4, kernels=kernels), dict[float, dict[tuple[int, ...], list[int]]]()
    drafter, outputs = made.scheduler.drafter, []
    draft_all = drafter._draft
    for least in (0.0, 0.0005, 0.03):
        seen[least] = {}

        def noting(wanted, hidden, steps, now=seen[least]):
            draft_all(wanted, hidden, steps)
            now |= {tuple(s.ids): list(s.spec.drafts) for s, _ in wanted if s.room >= 4}

        drafter._draft, drafter.least = noting, least
        outputs.append(made.generate(PROMPTS[:2], **wanted))
    assert same(outputs[0], outputs[1]) and same(outputs[0], outputs[2])
    assert {len(drafts) for drafts in seen[0.0].values()} == {4}
    for least in (0.0005, 0.03):
        both = seen[0.0].keys() & seen[least].keys()
        assert len(both) > 3 and all(
            seen[least][ids] == seen[0.0][ids][: len(seen[least][ids])] for ids in both
        )
        for ids, drafts in list(seen[least].items())[::3]:
            with torch.no_grad():
                full = torch.tensor([ids])
                state = model.mtp(model.trunk(full).hidden_BTD, full, steps=1).hidden[0][0, -2]
                sure = float((model.lm_head(state) / (temperature or 1.0)).softmax(-1).max())
            assert abs(sure - least) < 1e-4 or bool(drafts) == (sure >= least)
    lengths = {len(drafts) for least in (0.0005, 0.03) for drafts in seen[least].values()}
    assert {0, 1} < lengths


# --- rejection sampling ---------------------------------------------------------------------------------------------

TARGET = torch.tensor([1.5, 0.0, -1.0, 2.0, 0.5, -3.0])
OTHER = torch.tensor([0.0, 1.0, -0.5, 2.5, -4.0, 1.0])
QUANTILE = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5}
CUTS = [
    ({}, {0, 1, 2, 3, 4, 5}),
    (dict(temperature=2.0), {0, 1, 2, 3, 4, 5}),
    (dict(top_k=3), {0, 3, 4}),
    (dict(top_p=0.75), {0, 3}),
    (dict(min_p=0.1), {0, 1, 3, 4}),
    (dict(forbidden=frozenset({3})), {0, 1, 2, 4, 5}),
]


@pytest.mark.parametrize("cut, support", CUTS)
def test_rejection_keeps_the_distribution_whatever_the_drafts(cut, support):
    count = 8000
    params = [SamplingParams(seed=seed, **cut) for seed in range(count)]
    places = [seed % 5 for seed in range(count)]
    drafts, q = draft(OTHER.expand(count, -1), params, places, independent=True)
    tokens, logprobs = sample(TARGET.expand(count, -1), params, places, drafted=(range(count), drafts, q))
    kept = TARGET.double() / cut.get("temperature", 1.0)
    kept = (
        kept.masked_fill(torch.tensor([v not in support for v in range(6)]), -math.inf).softmax(-1).tolist()
    )
    assert set(tokens) <= support
    chi = sum((tokens.count(v) - count * kept[v]) ** 2 / (count * kept[v]) for v in support)
    assert chi < QUANTILE[len(support) - 1]
    accepted = sum(a == b for a, b in zip(tokens, drafts, strict=True)) / count
    assert accepted == pytest.approx(float(torch.minimum(torch.tensor(kept), q[0]).sum()), abs=0.02)
    whole = (TARGET.double() / cut.get("temperature", 1.0)).log_softmax(-1)
    assert logprobs == pytest.approx([float(whole[t]) for t in tokens], abs=1e-5)


def test_pairs_of_tokens_keep_their_distribution_end_to_end(likely):
    """First two tokens of one prompt over many seeds, with and without drafts: a chi-square test of homogeneity."""
    seeds, prompt = range(1500), PROMPTS[0][:20]
    wanted = dict(max_new_tokens=3, temperature=1.5, top_k=3, stop_ids=(), forbidden_ids=[4])
    made = Engine(likely, max_batch=64, max_len=64, draft_steps=2, rejection=True)
    drafted = made.generate([prompt] * len(seeds), seeds=seeds, **wanted)
    plain = engine(likely, max_batch=64).generate(
        [prompt] * len(seeds), seeds=[s + 10**6 for s in seeds], **wanted
    )
    assert spec(made).accepted > 200 and spec(made).accepted < spec(made).proposed
    tables = [{}, {}]
    for table, outputs in zip(tables, (drafted, plain), strict=True):
        for output in outputs:
            key = tuple(output.token_ids)
            table[key] = table.get(key, 0) + 1
    common = [key for key in {*tables[0], *tables[1]} if sum(t.get(key, 0) for t in tables) >= 10]
    chi = sum(
        (tables[0].get(k, 0) - tables[1].get(k, 0)) ** 2 / sum(t.get(k, 0) for t in tables) for k in common
    )
    freedom = len(common) - 1
    assert freedom >= 5
    assert chi < freedom + 3.1 * math.sqrt(2 * freedom) + 6, (
        "99.9 % quantile, Wilson and Hilferty's bound rounded up"
    )


def test_with_rejection_a_seed_decides_everything(likely):
    made = Engine(likely, max_batch=4, max_len=128, draft_steps=3, rejection=True)
    wanted = dict(max_new_tokens=20, temperature=1.0, stop_ids=())
    alone = [made.generate([p], seeds=[n], **wanted)[0] for n, p in enumerate(PROMPTS[:3])]
    together = made.generate(PROMPTS[:3], seeds=[0, 1, 2], **wanted)
    assert same(alone, together)
    scores = made.score([p + o.token_ids for p, o in zip(PROMPTS, together, strict=False)])
    for prompt, output, row in zip(PROMPTS, together, scores, strict=False):
        assert row[len(prompt) :] == output.logprobs


# --- pace -------------------------------------------------------------------------------------------------------------


def follow(pace, batch, with_drafts, steps=600):
    """A step without drafts brings one token in one second, one with them 2.2 in `with_drafts`."""
    chosen = []
    for _ in range(steps):
        drafts = pace.choose(batch, quiet=True)
        chosen.append(drafts)
        pace.record(batch, drafts, 2.2 if drafts else 1, with_drafts if drafts else 1.0)
    return chosen


def test_the_pace_finds_what_is_faster_and_follows_changes():
    pace = Pace()
    assert not pace.choose(1, quiet=False), "nothing is drafted before it has been measured"
    assert sum(follow(pace, 1, 1.4)[-300:]) > 280 and pace.choose(1, quiet=False)
    assert sum(follow(pace, 40, 3.0)[-300:]) < 20, "another size of batch, another choice"
    assert sum(follow(pace, 1, 3.0)[-300:]) < 20 and not pace.choose(1, quiet=False)
    assert sum(follow(pace, 40, 1.4, 5000)[-300:]) > 280


def test_looking_at_the_slower_way_costs_little_and_is_not_fooled_by_one_step():
    pace, rng, looks = Pace(), random.Random(0), list[bool]()
    for _ in range(4000):  # drafts are 10 % slower, in steps that bring 1 or 5 tokens
        drafts = pace.choose(1, quiet=True)
        looks.append(drafts)
        pace.record(1, drafts, rng.choice((1, 5)) if drafts else 1, 3.3 if drafts else 1.0)
    assert sum(looks[:16]) == 8 and sum(looks[1000:]) < 300
