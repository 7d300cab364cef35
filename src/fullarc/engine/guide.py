"""What may be sampled next, decided by what was sampled: requests whose output must follow a form.

Like penalties, a guide steers the choice only: reported log-probs are those of the model.
Shape suffixes: N rows, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Guide(Protocol):
    """The state of one request's form. While what is allowed is fed, something is allowed, or the form is lost."""

    def allowed(self) -> frozenset[int] | bytes:
        """The tokens that may come next, as ids, or as a bit for each id, the lowest first. Empty: it is lost."""
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
        logits_V.masked_fill(_forbidden(g.allowed(), size), -torch.inf) if g else logits_V
        for logits_V, g in zip(logits_NV, guides, strict=True)
    ]
    return torch.stack(rows)


def _forbidden(allowed: frozenset[int] | bytes, size: int) -> Tensor:
    """True for the tokens that are not allowed [V]."""
    if isinstance(allowed, frozenset):
        return _without(allowed, size)
    bits = np.frombuffer(allowed.ljust(-(-size // 8), b"\0"), np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=size, bitorder="little") == 0)


@lru_cache(maxsize=256)
def _without(allowed: frozenset[int], size: int) -> Tensor:
    mask_V = torch.ones(size, dtype=torch.bool)
    mask_V[torch.tensor(sorted(token for token in allowed if token < size))] = False
    return mask_V
