"""Determinism: what a request gets is the same to the last bit whatever else happens (design: rules of the numbers)."""

import random

import pytest
import torch

from fullarc.config.errors import FullarcError
from fullarc.engine import Engine, determinism
from fullarc.engine.backend import forward_pass, prepare
from fullarc.engine.core import Chunk

LONG = [3 + (i * i) % 80 for i in range(150)]


def run(folder, prompts, kernels, **kwargs):
    options = dict(max_batch=8, max_len=320, chunk_tokens=512, prefix_tokens=2048) | kwargs
    engine = Engine(folder, kernels=kernels, **options)
    return engine.generate(
        prompts, max_new_tokens=12, seeds=[hash(tuple(p)) & 0xFFFF for p in prompts], stop_ids=()
    )


@pytest.fixture
def alone(shaped, kernels):
    """The reference: one request in an engine of its own, without a prefix cache."""
    return run(shaped[1], [LONG], kernels, max_batch=1, prefix_tokens=0)[0]


def same(ours, theirs):
    return ours.token_ids == theirs.token_ids and ours.logprobs == theirs.logprobs


def test_other_requests_do_not_matter(shaped, kernels, alone):
    rng = random.Random(0)
    for count in (2, 9):
        others = [[rng.randrange(1, 96) for _ in range(rng.randrange(1, 200))] for _ in range(count)]
        place = rng.randrange(count + 1)
        outputs = run(shaped[1], [*others[:place], LONG, *others[place:]], kernels)
        assert same(outputs[place], alone)


def test_chunking_does_not_matter(shaped, kernels, alone):
    for chunk in (7, 48, 149):
        assert same(run(shaped[1], [LONG, LONG[:40]], kernels, chunk_tokens=chunk)[0], alone)


def test_a_prefix_cache_hit_does_not_matter(shaped, kernels, alone):
    seeds = [hash(tuple(LONG)) & 0xFFFF]
    for prefix in (17, 100, 150):
        engine = Engine(shaped[1], kernels=kernels, max_batch=4, max_len=320)
        engine.generate([LONG[:prefix]], max_new_tokens=3, stop_ids=())
        output = engine.generate([LONG], max_new_tokens=12, seeds=seeds, stop_ids=())[0]
        assert output.cached_tokens == min(prefix // 16, 149 // 16) * 16 and same(output, alone)


def test_the_next_turn_reuses_the_finished_one(shaped, kernels):
    engine = Engine(shaped[1], kernels=kernels, max_batch=2, max_len=320)
    first = engine.generate([LONG], max_new_tokens=40, seed=4, stop_ids=())[0]
    turn = LONG + first.token_ids + [9, 8, 7]
    second = engine.generate([turn], max_new_tokens=12, seed=4, stop_ids=())[0]
    fresh = Engine(shaped[1], kernels=kernels, max_batch=1, max_len=320, prefix_tokens=0)
    assert second.cached_tokens == (150 + 39) // 16 * 16
    assert same(second, fresh.generate([turn], max_new_tokens=12, seed=4, stop_ids=())[0])


def test_samples_of_one_prompt_share_its_prefill(shaped, kernels):
    engine = Engine(shaped[1], kernels=kernels, max_batch=8, max_len=320)
    outputs = engine.generate([LONG] * 6, max_new_tokens=5, seed=1, stop_ids=())
    assert sorted(o.cached_tokens for o in outputs) == [0] + [144] * 5
    assert len({tuple(o.token_ids) for o in outputs}) > 1


def test_scores_equal_sampled_logprobs_and_ignore_the_cache(shaped, kernels, alone):
    engine = Engine(shaped[1], kernels=kernels, max_batch=2, max_len=320)
    ids = LONG + alone.token_ids
    for _ in range(2):  # the second time all of it is in the prefix cache
        assert engine.score([ids])[0][len(LONG) :] == alone.logprobs


def test_rows_keep_their_bits_in_any_slot_and_row(shaped, kernels):
    """The core itself: one sequence, prefilled at once, against pieces next to a changing crowd."""
    rng = random.Random(1)
    core = forward_pass(prepare(shaped[0], kernels=kernels), 40, 256)
    whole = core.logits(core.forward([Chunk(0, 0, LONG)]), list(range(len(LONG))))
    done = 0
    while done < len(LONG):
        size = min(rng.choice([1, 1, 2, 3, 17, 40]), len(LONG) - done)
        crowd = [
            Chunk(s, rng.randrange(100), [rng.randrange(90)])
            for s in rng.sample(range(20), rng.randrange(20))
        ]
        long_ones = [
            Chunk(s, 0, LONG[: rng.randrange(2, 30)]) for s in rng.sample(range(20, 39), rng.randrange(3))
        ]
        mine = Chunk(39, done, LONG[done : done + size])
        chunks = [*crowd, mine, *long_ones] if size == 1 else [*crowd, *long_ones, mine]
        first = sum(len(c.ids) for c in chunks[: chunks.index(mine)])
        logits = core.logits(core.forward(chunks), list(range(first, first + size)))
        assert torch.equal(logits, whole[done : done + size])
        done += size


def test_a_small_prefix_cache_evicts_and_stays_right(shaped, kernels):
    engine = Engine(shaped[1], kernels=kernels, max_batch=4, max_len=320, prefix_tokens=96)
    rng = random.Random(2)
    prompts = [LONG[: rng.randrange(1, 150)] + [rng.randrange(1, 90) for _ in range(20)] for _ in range(12)]
    outputs = engine.generate(prompts, max_new_tokens=6, seed=7, stop_ids=())
    assert len(engine.scheduler.prefix) <= 96
    again = engine.generate(prompts, max_new_tokens=6, seed=7, stop_ids=())
    for ours, theirs in zip(outputs, again, strict=True):
        assert same(ours, theirs)


def test_runs_that_are_computed_together_keep_their_bits(shaped, kernels):
    """Pieces of prompts of all lengths and pasts in one step, in grids with padding, against one prefill alone."""
    core = forward_pass(prepare(shaped[0], kernels=kernels), 16, 256)
    whole = core.logits(core.forward([Chunk(0, 0, LONG)]), list(range(len(LONG))))
    starts = [3, 0, 16, 27, 31, 32, 40, 60, 90, 0, 5, 16, 33, 61, 120]
    pasts = [Chunk(slot, 0, LONG[:start]) for slot, start in enumerate(starts) if start]
    core.forward(pasts)
    pieces = [Chunk(slot, start, LONG[start : start + 2 + slot * 5 % 9]) for slot, start in enumerate(starts)]
    if kernels == "torch":
        _, batch = core._batch(pieces)
        assert len(batch.grids) < len(pieces)
    ends = [position for piece in pieces for position in range(piece.start, piece.start + len(piece.ids))]
    assert torch.equal(core.logits(core.forward(pieces), list(range(len(ends)))), whole[ends])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_determinism_is_shown_where_it_is_insisted_on(shaped, kernels, dtype):
    engine = Engine(shaped[1], max_batch=4, max_len=256, kernels=kernels, dtype=dtype, deterministic=True)
    fresh = Engine(shaped[1], max_batch=4, max_len=256, kernels=kernels, dtype=dtype)
    assert engine.deterministic > 0 and fresh.deterministic is None
    assert same(engine.generate([LONG], 5, stop_ids=())[0], fresh.generate([LONG], 5, stop_ids=())[0])


@pytest.mark.parametrize("fault", ["by batch", "by length"])
def test_what_depends_on_the_batch_is_found_at_the_start(shaped, kernels, monkeypatch, fault):
    core = forward_pass(prepare(shaped[0], kernels=kernels), 4, 256)
    forward = core.forward

    def faulty(chunks, trace=None):
        states = forward(chunks, trace)
        odd = len(chunks) % 2 == 0 if fault == "by batch" else len(chunks[0].ids) == 1
        return states * (1 + 2e-7) if odd else states

    monkeypatch.setattr(core, "forward", faulty)
    with pytest.raises(FullarcError, match="differ from those of one prefill"):
        determinism.check(core)
