"""How stale a trajectory may be.

GLM-5 drops a trajectory when w' − w₀ > τ, with w₀ the oldest weight version among its tokens (4.1). That is the hard
bound; the mean is bounded by the fixed lag η of the loop, which samples no batch earlier than η versions ahead.
"""

from collections.abc import Iterable


def staleness(versions: Iterable[int], current: int) -> int:
    """w' − w₀ of a trajectory; entries below 0 (tokens nobody sampled) do not count. 0 if nothing was sampled."""
    sampled = [version for version in versions if version >= 0]
    return current - min(sampled) if sampled else 0


def stale(versions: Iterable[int], current: int, tau: int) -> bool:
    """True when the trajectory must be dropped: its oldest token is more than `tau` versions old."""
    return staleness(versions, current) > tau
