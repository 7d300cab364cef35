"""What a checkpoint knows without chatting: bits per byte, needles in long documents, MTP accept length."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from fullarc.chat import Tokenizer
from fullarc.data.longctx import Case
from fullarc.engine import Engine, mtp_accept_length
from fullarc.evals import stats
from fullarc.evals.scores import Score
from fullarc.model import load_model

WINDOW = 256
DOCUMENT_TOKENS = 1024
DRAFT_STEPS = 4
MTP_PROMPTS, MTP_PROMPT_TOKENS, MTP_NEW_TOKENS = 6, 48, 16


def bits_per_byte(
    engine: Engine, tok: Tokenizer, texts: Iterable[str], max_tokens: int
) -> tuple[Score, float]:
    """Cross-entropy of documents in bits per byte of their UTF-8 text, and what guessing uniformly would cost.

    Documents are cut into windows of at most WINDOW tokens that know nothing of each other; each window is preceded
    by the token before it (<|endoftext|> at the start of a document), so that every token is predicted once. The
    standard error takes documents as the independent units; of a long one only the first DOCUMENT_TOKENS count, so
    that there are many. Stops after `max_tokens`.
    """
    eos = tok.id("<|endoftext|>")
    windows: list[list[int]] = []
    owners: list[int] = []
    sizes: list[float] = []
    left = max_tokens
    for text in texts:
        ids = tok.encode(text)[: min(left, DOCUMENT_TOKENS)]
        left -= len(ids)
        if ids:
            sizes.append(float(sum(len(tok.token_bytes(i)) for i in ids)))
            row = [eos, *ids]
            for start in range(0, len(ids), WINDOW):
                windows.append(row[start : start + WINDOW + 1])
                owners.append(len(sizes) - 1)
        if not left:
            break
    if not sizes:
        return Score(math.nan, math.nan, 0), math.nan
    bits = [0.0] * len(sizes)
    for owner, logprobs in zip(owners, engine.score(windows), strict=True):
        bits[owner] -= math.fsum(logprobs[1:]) / math.log(2)
    total = math.fsum(sizes)
    uniform = (max_tokens - left) * math.log2(tok.vocab_size) / total
    return Score(math.fsum(bits) / total, stats.ratio_error(bits, sizes), len(sizes)), uniform


def find_needles(engine: Engine, cases: Sequence[Case]) -> list[float]:
    """1.0 per case that greedy decoding answers to the last token, else 0.0, in order."""
    if not cases:
        return []
    longest = max(len(case.answer_ids) for case in cases)
    outputs = engine.generate([case.prompt_ids for case in cases], longest, temperature=0.0, stop_ids=())
    return [
        float(output.token_ids[: len(case.answer_ids)] == case.answer_ids)
        for case, output in zip(cases, outputs, strict=True)
    ]


def accept_length(model_dir: Path, prompts: Sequence[Sequence[int]]) -> Score | None:
    """Mean tokens committed per verify step when the MTP layer drafts four (GLM-5, Table 2); units are prompts.

    Greedy decoding after the first MTP_PROMPT_TOKENS tokens of each prompt. None without an MTP layer or a prompt.
    """
    prompts = [prompt[:MTP_PROMPT_TOKENS] for prompt in prompts if len(prompt) >= MTP_PROMPT_TOKENS][
        :MTP_PROMPTS
    ]
    model = load_model(model_dir)
    if model.mtp_layer is None or not prompts:
        return None
    result = mtp_accept_length(model, prompts, DRAFT_STEPS, MTP_NEW_TOKENS)
    steps, tokens = [float(n) for n in result.steps], [float(n) for n in result.tokens]
    return Score(math.fsum(tokens) / math.fsum(steps), stats.ratio_error(tokens, steps), len(steps))
