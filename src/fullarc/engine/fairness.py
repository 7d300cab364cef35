"""Who is next when several sessions wait for the same thing: self-clocked fair queueing (Golestani, 1994).

    a claim     (priority, session); lower priorities first, and below, all claims of one priority
    D           what a claim has been charged, in tokens
    next        the waiting claim with the least D + C, C being what it would be charged now; of equal ones, the one
                that began to wait first
    V           D of the claim that was served last: a claim that begins to wait starts at D = V, so having been away
                earns nothing and costs nothing

Bounds. A waiting claim has V - C <= D <= V. So over any time in which both a and b wait, what they are given differs by
at most C_a + C_b; and while a waits for one thing, any other claim is given at most C_a + C_b, and all that come after
it at most C_a together, however many there are and however much they want. (What b gives back meanwhile, because it
did not need it, it may be given again.)
"""

from collections.abc import Collection

Claim = tuple[int, str]


class Shares:
    """D of every claim that waits. Nothing is kept of others."""

    def __init__(self) -> None:
        self._charged: dict[Claim, int] = {}
        self._clock: dict[int, int] = {}  # V of each priority

    def __len__(self) -> int:
        return len(self._charged)

    def begin(self, claim: Claim) -> None:
        """`claim` waits from now on."""
        self._charged[claim] = self._clock.setdefault(claim[0], 0)

    def end(self, claim: Claim) -> None:
        """`claim` no longer waits."""
        del self._charged[claim]
        if not any(priority == claim[0] for priority, _ in self._charged):
            del self._clock[claim[0]]

    def among(self, claims: Collection[Claim]) -> None:
        """Exactly `claims` wait; those that begin to, in their order."""
        for claim in claims:
            if claim not in self._charged:
                self.begin(claim)
        for claim in [claim for claim in self._charged if claim not in claims]:
            self.end(claim)

    def order(self, claim: Claim, cost: int) -> tuple[int, int]:
        """The waiting claim with the least one is next."""
        return claim[0], self._charged[claim] + cost

    def charge(self, claim: Claim, cost: int) -> None:
        """`claim` has been next."""
        self._charged[claim] += cost
        self._clock[claim[0]] = max(self._clock[claim[0]], self._charged[claim])

    def refund(self, claim: Claim, tokens: int) -> None:
        """Part of a charge was not needed."""
        if claim in self._charged:
            self._charged[claim] -= tokens
