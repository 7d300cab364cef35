"""The scheduler: ends, queue, cancellation, slots, retraction, weight swaps between steps."""

import pytest

from fullarc.config.errors import FullarcError
from fullarc.engine import Engine, SamplingParams
from fullarc.engine.request import QueueFullError, Request, RequestError

LONG = list(range(1, 40))


@pytest.fixture
def engine(checkpoints):
    return Engine(checkpoints["v0"], max_batch=3, max_len=128, chunk_tokens=32, prefix_tokens=512)


def request(rid, prompt=(4, 5, 6), score_from=-1, **params):
    return Request(
        rid, list(prompt), SamplingParams(**({"max_new_tokens": 8, "seed": 1} | params)), score_from
    )


def drain(scheduler):
    while not scheduler.idle:
        scheduler.step()


def test_a_model_that_never_stops_ends_at_its_bound(engine):
    output = engine.generate([[1, 2, 3]], max_new_tokens=9, stop_ids=())[0]
    assert (len(output.token_ids), output.finish_reason) == (9, "length")
    at_the_end = engine.generate([[1] * 120], max_new_tokens=50, stop_ids=())[0]
    assert (len(at_the_end.token_ids), at_the_end.finish_reason) == (8, "length")


def test_a_stop_token_ends_the_completion_and_is_part_of_it(engine):
    free = engine.generate([[1, 2, 3]], max_new_tokens=20, seed=5, stop_ids=())[0]
    stop = free.token_ids[6]
    first = free.token_ids.index(stop)
    output = engine.generate([[1, 2, 3]], max_new_tokens=20, seed=5, stop_ids=[stop])[0]
    assert output.finish_reason == "stop" and output.token_ids == free.token_ids[: first + 1]
    assert output.logprobs == free.logprobs[: first + 1]


def test_a_seed_decides_everything(engine):
    same = engine.generate([[1, 2, 3]] * 2, max_new_tokens=12, seeds=[7, 7], stop_ids=())
    other = engine.generate([[1, 2, 3]], max_new_tokens=12, seeds=[8], stop_ids=())[0]
    assert same[0].token_ids == same[1].token_ids != other.token_ids


def test_an_interrupted_sequence_goes_on_as_if_it_had_not_been(engine):
    whole = engine.generate([[1, 2, 3]], max_new_tokens=12, seeds=[7], stop_ids=())[0].token_ids
    rest = engine.generate([[1, 2, 3, *whole[:5]]], max_new_tokens=7, seeds=[7], stop_ids=())[0].token_ids
    assert whole[5:] == rest


@pytest.mark.parametrize("prompt", [[], [96], [-1], [1] * 128])
def test_prompts_that_cannot_be_served_are_refused(engine, prompt):
    with pytest.raises(RequestError):
        engine.generate([prompt])


def test_a_full_queue_refuses_and_loses_nobody(engine):
    s = engine.scheduler
    s.max_queue = 5
    accepted = []
    for number in range(8):
        try:
            s.submit(r := request(str(number)))
            accepted.append(r)
        except QueueFullError:
            pass
    assert len(accepted) == 5
    drain(s)
    assert [r.finish for r in accepted] == ["length"] * 5


def test_abort_frees_the_slot_and_keeps_what_was_sampled(engine):
    s, ends = engine.scheduler, []
    requests = [request(str(n), prompt=[n + 1, 2, 3], max_new_tokens=50) for n in range(5)]
    for r in requests:
        r.on_finish = lambda done: ends.append((done.rid, done.finish))
        s.submit(r)
    for _ in range(4):
        s.step()
    assert not s.free and len(s.running) == 3
    assert s.abort("1") == 1 and len(s.free) == 1
    assert s.abort("4") == 1  # still waiting
    assert len(requests[1].logprobs) == len(requests[1].output) > 0 and requests[4].output == []
    drain(s)
    assert sorted(ends) == [("0", "length"), ("1", "abort"), ("2", "length"), ("3", "length"), ("4", "abort")]
    assert len(s.free) == 3 and not s.running


@pytest.mark.parametrize("start", [0, 1, 15, 16, 17, 32])
def test_input_logprobs_do_not_depend_on_what_is_cached(engine, start):
    told = []
    for number in range(2):
        engine.scheduler.submit(
            scored := request(str(number), prompt=LONG, score_from=start, max_new_tokens=1)
        )
        drain(engine.scheduler)
        told.append(scored.input_logprobs)
    assert told[0] == told[1] and len(told[0]) == len(LONG) - max(start, 1)


def test_weights_change_between_steps_and_every_token_knows_its_version(engine, checkpoints):
    s = engine.scheduler
    before = engine.generate([LONG], max_new_tokens=8, seeds=[1], stop_ids=())[0]
    running = request("a", prompt=LONG)
    s.submit(running)
    while len(running.logprobs) < 3:
        s.step()
    engine.update_weights(checkpoints["v1"], "1")
    drain(s)
    assert running.versions == [("0", 0, 3), ("1", 3, 8)] and running.weight_version == "1"
    assert running.output[:3] == before.token_ids[:3]
    assert len(s.prefix) == 0  # mixed latents are never published
    fresh = Engine(checkpoints["v1"], max_batch=1, max_len=128).generate([LONG], 8, seeds=[1], stop_ids=())[0]
    assert engine.generate([LONG], 8, seeds=[1], stop_ids=())[0].logprobs == fresh.logprobs != before.logprobs


def test_mixed_latents_are_not_published_even_if_the_version_keeps_its_name(engine, checkpoints):
    running = request("a", prompt=LONG)
    engine.scheduler.submit(running)
    while len(running.logprobs) < 3:
        engine.scheduler.step()
    engine.update_weights(checkpoints["v1"], "0")
    drain(engine.scheduler)
    assert len(engine.scheduler.prefix) == 0


def test_old_prefixes_are_not_used_with_new_weights(engine, checkpoints):
    prompt = list(range(1, 60))
    engine.generate([prompt], max_new_tokens=2)
    engine.update_weights(checkpoints["v1"], "1")
    output = engine.generate([prompt], max_new_tokens=6, seeds=[3], stop_ids=())[0]
    fresh = Engine(checkpoints["v1"], max_batch=1, max_len=128).generate([prompt], 6, seeds=[3], stop_ids=())[
        0
    ]
    assert output.cached_tokens == 0 and output.logprobs == fresh.logprobs


def test_retracted_requests_are_computed_anew_under_the_new_weights(engine, checkpoints):
    s = engine.scheduler
    running = request("a", prompt=list(range(1, 40)))
    s.submit(running)
    while len(running.logprobs) < 3:
        s.step()
    s.retract()
    assert len(s.free) == 3
    engine.update_weights(checkpoints["v1"], "1")
    drain(s)
    ids = running.prompt + running.output
    fresh = Engine(checkpoints["v1"], max_batch=1, max_len=128).score([ids])[0]
    assert running.logprobs[3:] == fresh[len(running.prompt) + 3 :]


def test_another_shape_or_a_damaged_file_leaves_the_engine_as_it_was(engine, checkpoints, tmp_path):
    before = engine.generate([[1, 2, 3]], max_new_tokens=4, seeds=[1])[0]
    with pytest.raises(FullarcError, match="vocab_size = 101"):
        engine.update_weights(checkpoints["other"], "9")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoints["v1"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    raw = bytearray((damaged / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (damaged / "model.safetensors").write_bytes(raw)
    with pytest.raises(FullarcError, match="damaged"):
        engine.update_weights(damaged, "9")
    assert engine.generate([[1, 2, 3]], max_new_tokens=4, seeds=[1])[0] == before
