"""What may be sampled next, decided by what was sampled: requests whose output must follow a form.

Like penalties, a guide steers the choice only: reported log-probs are those of the model.
Shape suffixes: N rows, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


class Guide(Protocol):
    """The state of one request's form. While what is allowed is fed, something is allowed."""

    def allowed(self) -> frozenset[int]:
        """The tokens that may come next."""
        ...

    def feed(self, token: int) -> None:
        """Take the next token."""
        ...


@torch.inference_mode()
def guided(logits_NV: Tensor, guides: Sequence[Guide | None]) -> Tensor:
    """Logits to choose from: -inf where a row's guide forbids; `logits_NV` itself where there are no guides."""
    if not any(guides):
        return logits_NV
    size = logits_NV.shape[-1]
    rows = [
        logits_V + _mask(g.allowed(), size) if g else logits_V
        for logits_V, g in zip(logits_NV, guides, strict=True)
    ]
    return torch.stack(rows)


@lru_cache(maxsize=256)
def _mask(allowed: frozenset[int], size: int) -> Tensor:
    """0 for allowed tokens, -inf for the others [V]."""
    mask_V = torch.full((size,), -torch.inf)
    mask_V[torch.tensor(sorted(token for token in allowed if token < size))] = 0.0
    return mask_V
