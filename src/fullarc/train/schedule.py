"""Learning rates as pure functions of the step number, so that resuming needs no schedule state.

GLM-5: linear warm-up then cosine in pre-training, linear in mid-training, 5e-3 -> 2e-4 for the indexer's
warm-up, constant in sparse adaptation (Appendix A); the batch grows over the first tokens of pre-training, as GLM-4.5's
(16M to 64M tokens over 500B).
"""

import math
from collections.abc import Callable


def learning_rate(step: int, *, peak: float, final: float, warmup: int, total: int, shape: str) -> float:
    """Learning rate of step `step` (0-based) out of `total`.

    Rises linearly over the first `warmup` steps (step 0 already moves: peak / warmup), reaches `peak` at the
    last of them, then goes to `final`, which the last step (total - 1) uses exactly.

    Args:
        shape: "constant" (stays at `peak`), "linear" or "cosine".
    """
    if shape not in ("constant", "linear", "cosine"):
        raise ValueError(f'shape must be "constant", "linear" or "cosine", got {shape!r}')
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    start = max(warmup - 1, 0)
    done = min((step - start) / max(total - 1 - start, 1), 1.0)
    weight = 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return final + (peak - final) * weight


def batch_size(step: int, *, start: int, full: int, warmup: int) -> int:
    """Rows in the batch of step `step` (0-based): from `start` up to `full` over the first `warmup` steps.

    Grows linearly, rounded down to a multiple of `start`, so that whatever divides the first batch (passes of one
    shape, processes with equal shares) divides all; from step `warmup` on it is `full`.
    """
    if step >= warmup:
        return full
    return (start + (full - start) * step // warmup) // start * start


def schedule(
    *, peak: float, final: float = 0.0, warmup: int = 0, total: int, shape: str
) -> Callable[[int], float]:
    """`learning_rate` with everything but the step filled in."""
    return lambda step: learning_rate(step, peak=peak, final=final, warmup=warmup, total=total, shape=shape)
