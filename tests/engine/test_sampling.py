"""Sampling against exact distributions; seeds; truncation; bad values."""

import math

import numpy as np
import pytest
import torch

from fullarc.engine.sampling import SamplingParams, argmax, sample, top_logprobs, uniforms

LOGITS = torch.tensor([1.5, 0.0, -1.0, 2.0, 0.5, -3.0])
# 99.9 % quantiles of chi-square with 1..5 degrees of freedom
QUANTILE = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5}


def draw(count=6000, **kwargs):
    params = [SamplingParams(seed=seed, **kwargs) for seed in range(count)]
    return sample(LOGITS.expand(count, -1), params, [seed % 7 for seed in range(count)])


def check_distribution(tokens, expected):
    support = [i for i, p in enumerate(expected) if p > 0]
    assert set(tokens) <= set(support)
    counts = [tokens.count(i) for i in support]
    chi = sum(
        (n - len(tokens) * expected[i]) ** 2 / (len(tokens) * expected[i])
        for i, n in zip(support, counts, strict=True)
    )
    assert chi < QUANTILE[len(support) - 1]


@pytest.fixture(params=["native", "torch"])
def either(request, monkeypatch):
    """By the kernels in C, and without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr("fullarc.engine.sampling.available", lambda: False)
    return request.param


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature, either):
    tokens, logprobs = draw(temperature=temperature)
    expected = (LOGITS.double() / temperature).softmax(-1).tolist()
    check_distribution(tokens, expected)
    assert logprobs == pytest.approx([math.log(expected[t]) for t in tokens], abs=1e-5)


@pytest.mark.parametrize(
    "cut, kept",
    [
        (dict(top_k=2), {0, 3}),
        (dict(top_p=0.45), {3}),
        (dict(top_p=0.75), {0, 3}),
        (dict(min_p=0.2), {0, 3, 4}),
    ],
)
def test_truncation_keeps_the_head_and_logprobs_of_the_whole(cut, kept, either):
    tokens, logprobs = draw(**cut)
    p = LOGITS.double().softmax(-1)
    mass = sum(p[i] for i in kept)
    if len(kept) > 1:
        check_distribution(tokens, [float(p[i] / mass) if i in kept else 0.0 for i in range(6)])
    assert set(tokens) == kept
    assert logprobs == pytest.approx([math.log(p[t]) for t in tokens], abs=1e-5)


def test_the_smallest_uniform_never_picks_a_token_without_mass(monkeypatch):
    monkeypatch.setattr("fullarc.engine.sampling.available", lambda: False)
    monkeypatch.setattr("fullarc.engine.sampling.uniforms", lambda seeds, positions: np.zeros(len(seeds)))
    assert sample(LOGITS[None], [SamplingParams(top_k=1)], [0])[0] == [3]


def test_one_row_does_not_change_another(either):
    mixed = [SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.3), SamplingParams(temperature=0.0)]
    tokens, logprobs = sample(LOGITS.expand(3, -1), mixed, [4, 5, 6])
    for i, params in enumerate(mixed):
        alone = sample(LOGITS[None], [params], [4 + i])
        assert alone == ([tokens[i]], [logprobs[i]])


def test_greedy_takes_the_lowest_id_on_ties_and_scores_at_temperature_one(either):
    tied = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    assert argmax(tied).tolist() == [1]
    tokens, logprobs = sample(tied, [SamplingParams(temperature=0.0)], [0])
    assert tokens == [1] and logprobs == pytest.approx([float(tied.log_softmax(-1)[0, 1])])


def test_uniforms_are_uniform_and_a_pure_function():
    values = uniforms(list(range(2000)), [3] * 2000)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.03
    along = uniforms([9] * 2000, list(range(2000)))
    assert abs(along.mean() - 0.5) < 0.03 and len(set(along)) == 2000
    assert uniforms([2**64 - 1, 5], [1, 2])[1] == uniforms([5], [2])[0]


@pytest.mark.parametrize(
    "bad",
    [dict(temperature=-1.0), dict(temperature=float("nan")), dict(temperature=1e-9), dict(top_p=0.0), dict(top_p=1.5),
     dict(top_k=-2), dict(min_p=2.0), dict(max_new_tokens=-1), dict(seed=-1), dict(seed=2**64)],
)  # fmt: skip
def test_absurd_values_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
        SamplingParams(**bad)


@pytest.mark.parametrize("cut, kept", [({}, {1, 2, 4, 5}), (dict(top_k=2), {1, 4}), (dict(top_p=0.5), {4})])
def test_forbidden_tokens_are_never_chosen_and_the_rest_keeps_its_proportions(cut, kept, either):
    tokens, logprobs = draw(forbidden=frozenset({0, 3}), **cut)
    p = LOGITS.double().softmax(-1)
    mass = sum(p[i] for i in kept)
    if len(kept) > 1:
        check_distribution(tokens, [float(p[i] / mass) if i in kept else 0.0 for i in range(6)])
    assert set(tokens) == kept
    assert logprobs == pytest.approx([math.log(p[t]) for t in tokens], abs=1e-5), "of the whole softmax"
    greedy = SamplingParams(temperature=0.0, forbidden=frozenset({3}))
    assert sample(LOGITS[None], [greedy], [0])[0] == [0]


def test_what_one_request_forbids_changes_nothing_for_its_neighbour(either):
    params = [SamplingParams(seed=1, forbidden=frozenset({0, 3})), SamplingParams(seed=2)]
    together = sample(LOGITS.expand(2, -1), params, [5, 6])
    alone = sample(LOGITS[None], params[1:], [6])
    assert (together[0][1], together[1][1]) == (alone[0][0], alone[1][0])


def test_the_likeliest_tokens_come_best_first_with_the_lower_id_on_ties(either):
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 5.0]])
    params = [SamplingParams(top_logprobs=3, temperature=2.0), SamplingParams(top_logprobs=1)]
    first, second = top_logprobs(logits, params)
    expected = (logits[0].double() / 2).log_softmax(-1)
    assert [token for _, token in first] == [1, 2, 0]
    assert [value for value, _ in first] == pytest.approx([float(expected[t]) for t in (1, 2, 0)], abs=1e-6)
    assert [token for _, token in second] == [3]
    with pytest.raises(ValueError, match="top_logprobs"):
        SamplingParams(top_logprobs=1000)
