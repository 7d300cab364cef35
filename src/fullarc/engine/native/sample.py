"""Tokens from logits in one call; `sample.h` does it row by row, so a row's token depends on nothing else."""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fullarc.engine.native.library import library
from fullarc.engine.native.weights import LANES, whole


def draw(
    logits_NV: Tensor, temperatures: Sequence[float], seeds: Sequence[int], positions: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Tokens and log-probs of rows, each at its temperature (0: argmax), by the number of its seed and position."""
    rows, vocab = logits_NV.shape
    filled = _filled(logits_NV)
    room = torch.empty(2 * (vocab + LANES))
    at_N, words = (ctypes.c_float * rows)(*temperatures), ctypes.c_uint64 * rows
    token_N, logprob_N = (ctypes.c_int32 * rows)(), (ctypes.c_float * rows)()
    library().fullarc_sample(
        filled.data_ptr(), filled.stride(0), rows, vocab, at_N, words(*seeds), words(*positions), room.data_ptr(),
        token_N, logprob_N,
    )  # fmt: skip
    return list(token_N), list(logprob_N)


def logprobs(logits_NV: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Log-probs [N, V] at each row's temperature (1 where that is 0): those that `draw` tells, to the bit."""
    rows, vocab = logits_NV.shape
    filled = _filled(logits_NV)
    out_NV, room = torch.empty(rows, whole(vocab)), torch.empty(whole(vocab))
    at_N = (ctypes.c_float * rows)(*temperatures)
    library().fullarc_logprobs(
        filled.data_ptr(), filled.stride(0), rows, vocab, at_N, room.data_ptr(), out_NV.data_ptr()
    )
    return out_NV[:, :vocab]


def _filled(logits_NV: Tensor) -> Tensor:
    """The rows with room behind each up to a whole vector."""
    vocab = logits_NV.shape[1]
    if logits_NV.stride(1) == 1 and logits_NV.stride(0) % LANES == 0 and logits_NV.stride(0) >= vocab:
        return logits_NV
    return F.pad(logits_NV, (0, -vocab % LANES)).contiguous()
