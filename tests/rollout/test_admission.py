"""Staleness counts from the oldest sampled token."""

from fullarc.rollout.admission import stale, staleness


def test_staleness_is_that_of_the_oldest_sampled_token() -> None:
    assert staleness([-1, -1, 3, 5, 4], 6) == 3
    assert staleness([-1, -1], 6) == 0
    assert not stale([-1, 2, 6], 6, 4)
    assert stale([-1, 1, 6], 6, 4)
