"""Which task instances a batch asks for: a pure function of seed, stage and batch.

Families are drawn by systematic sampling: n points at equal distance, with one random offset, on the line of
their cumulative weights, so that each family gets its share of every batch to within one prompt.
"""

import random
from collections.abc import Mapping, Sequence

from fullarc.config.errors import FullarcError
from fullarc.config.seeds import derive
from fullarc.tasks import Instance, families, get, instance_seed, kinds

NUMBERS = 10**9  # instances per family that RL draws from


def family_weights(
    mix: Mapping[str, float], default_kinds: Sequence[str], chosen: Mapping[str, Sequence[str]] | None = None
) -> dict[str, float]:
    """Weight of each family. A kind's weight is shared by its families; an empty mix means `default_kinds`.

    Args:
        chosen: the families of each kind that the run trains on; all that may be trained on by default.

    Raises FullarcError for an unknown or held-out family and for weights that are not positive.
    """
    weights: dict[str, float] = {}
    members_of = {kind: families(kind, "trained", chosen) for kind in kinds()}
    allowed = {family for members in members_of.values() for family in members}
    for name, weight in (mix or dict.fromkeys(default_kinds, 1.0)).items():
        members = members_of.get(name, [name])
        for family in members:
            if family not in allowed:
                raise FullarcError(
                    f'"{family}" in the mix is not a kind of task or a trained family.',
                    f"Kinds: {', '.join(kinds())}. Families: {', '.join(sorted(allowed))}.",
                )
            if not weight >= 0:
                raise FullarcError(
                    f'The weight of "{name}" in the mix is {weight}.', "Weights are at least 0."
                )
            weights[family] = weights.get(family, 0.0) + weight / len(members)
    weights = {family: weight for family, weight in weights.items() if weight > 0}
    if not weights:
        raise FullarcError("The mix of tasks is empty.", "Give at least one family a positive weight.")
    return weights


def prompts(weights: Mapping[str, float], n: int, seed: int, stage: str, batch: int) -> list[Instance]:
    """The `n` training instances of a batch, in a random order of families."""
    rng = random.Random(derive(seed, stage, "prompts", batch))
    total, names, offset = sum(weights.values()), list(weights), rng.random()
    points = [(i + offset) * total / n for i in range(n)]
    chosen, upto, at = [], weights[names[0]], 0
    for point in points:
        while point >= upto and at + 1 < len(names):
            at += 1
            upto += weights[names[at]]
        chosen.append(names[at])
    rng.shuffle(chosen)
    numbers = [derive(seed, stage, batch, i) % NUMBERS for i in range(n)]
    seeds = [instance_seed("train", family, number) for family, number in zip(chosen, numbers, strict=True)]
    return [get(family).sample(s) for family, s in zip(chosen, seeds, strict=True)]
