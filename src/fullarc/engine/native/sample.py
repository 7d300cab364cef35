"""Tokens from logits in one call; `sample.h` does it row by row, so a row's token depends on nothing else."""

import ctypes
import itertools
from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fullarc.engine.native.library import library
from fullarc.engine.native.weights import LANES, whole


def draw(
    logits_NV: Tensor, temperatures: Sequence[float], seeds: Sequence[int], positions: Sequence[int],
    chosen_NV: Tensor | None = None,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """Tokens and log-probs of rows, each at its temperature (0: argmax), by the number of its seed and position.

    Drawn from `chosen_NV`, where that differs from the logits that log-probs tell of.
    """
    rows, vocab = logits_NV.shape
    filled = _filled(logits_NV)
    chosen = filled if chosen_NV is None else _filled(chosen_NV)
    room, at_N, words = _room(vocab), (ctypes.c_float * rows)(*temperatures), ctypes.c_uint64 * rows
    token_N, logprob_N = (ctypes.c_int32 * rows)(), (ctypes.c_float * rows)()
    library().fullarc_sample(
        filled.data_ptr(), filled.stride(0), chosen.data_ptr(), chosen.stride(0), rows, vocab, at_N, words(*seeds),
        words(*positions), room.data_ptr(), token_N, logprob_N,
    )  # fmt: skip
    return list(token_N), list(logprob_N)


def truncated(
    logits_NV: Tensor, temperatures: Sequence[float], top_k: Sequence[int], top_p: Sequence[float],
    min_p: Sequence[float],
) -> Tensor:  # fmt: skip
    """The rows with -inf for what each one's truncation cuts off (0, 1 and 0: nothing), in memory of their own."""
    rows, vocab = logits_NV.shape
    out_NV, room, floats = torch.empty(rows, whole(vocab)), _room(vocab), ctypes.c_float * rows
    out_NV[:, :vocab] = logits_NV
    library().fullarc_truncate(
        out_NV.data_ptr(), out_NV.stride(0), rows, vocab, floats(*temperatures), (ctypes.c_int32 * rows)(*top_k),
        (ctypes.c_double * rows)(*top_p), floats(*min_p), room.data_ptr(),
    )  # fmt: skip
    return out_NV[:, :vocab]


def penalise(
    logits_NV: Tensor, rows: Sequence[int], ids: Sequence[list[int]], prompts: Sequence[int],
    penalties: Sequence[tuple[float, float, float]],
) -> None:  # fmt: skip
    """Steer rows, in place, by their ids so far, of which so many are the prompt's: repetition, frequency, presence."""
    count, ints = len(rows), ctypes.c_int32 * len(rows)
    flat = array("i", itertools.chain.from_iterable(ids))
    counts = torch.zeros(logits_NV.shape[1], dtype=torch.int32)
    library().fullarc_penalise(
        logits_NV.data_ptr(), logits_NV.stride(0), count, ints(*rows), flat.buffer_info()[0], ints(*map(len, ids)),
        ints(*prompts), (ctypes.c_float * (3 * count))(*itertools.chain.from_iterable(penalties)), counts.data_ptr(),
    )  # fmt: skip


def likeliest(
    logits_NV: Tensor, temperatures: Sequence[float], counts: Sequence[int]
) -> list[list[tuple[float, int]]]:
    """The likeliest tokens of each row as (log-prob, id), best first, the lower id first among equals."""
    rows, vocab = logits_NV.shape
    filled, room, most = _filled(logits_NV), _room(vocab), max(counts)
    token_N, logprob_N = (ctypes.c_int32 * (rows * most))(), (ctypes.c_float * (rows * most))()
    library().fullarc_likeliest(
        filled.data_ptr(), filled.stride(0), rows, vocab, (ctypes.c_float * rows)(*temperatures),
        (ctypes.c_int32 * rows)(*counts), most, room.data_ptr(), token_N, logprob_N,
    )  # fmt: skip
    pairs = list(zip(logprob_N, token_N, strict=True))
    return [pairs[row * most : row * most + count] for row, count in enumerate(counts)]


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


def _room(vocab: int) -> Tensor:
    return torch.empty(2 * whole(vocab))


def _filled(logits_NV: Tensor) -> Tensor:
    """The rows with room behind each up to a whole vector."""
    vocab = logits_NV.shape[1]
    if logits_NV.stride(1) == 1 and logits_NV.stride(0) % LANES == 0 and logits_NV.stride(0) >= vocab:
        return logits_NV
    return F.pad(logits_NV, (0, -vocab % LANES)).contiguous()
