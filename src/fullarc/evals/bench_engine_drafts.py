"""What the MTP layer of a trained model brings: accept length, and time at batch 1, on questions it never saw.

The questions are those of the evaluation, of every family that the checkpoint's run was trained on, of each kind
(reasoning, terminal, general) as many; an agent's is its first turn. Answers are greedy and end where the model ends
them. Only decoding is timed: from the first token of an answer to its last, the prompt's forward pass is not in it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fullarc.chat import Message, Tokenizer, render
from fullarc.config.recipe import load_recipe
from fullarc.config.runfolder import RESOLVED
from fullarc.engine import Engine, SamplingParams
from fullarc.engine.request import Request
from fullarc.evals.bench import claim
from fullarc.evals.bench_engine_peers import REPEATS
from fullarc.evals.bench_train import in_turn
from fullarc.evals.stage import run_of
from fullarc.tasks import families, get, instance_seed

DRAFTS, TARGET = 4, 2.76
QUESTIONS, NEW_TOKENS = 36, 64
KINDS = ("reasoning", "terminal", "general")
Prompt = list[int]


class Side:
    """An engine with one slot that drafts up to `drafts` tokens; as many each time if `always`."""

    def __init__(self, checkpoint: Path, drafts: int, always: bool = False) -> None:
        self.engine = Engine(checkpoint, 1, prefix_tokens=0, draft_steps=drafts)
        drafter = self.engine.scheduler.drafter
        if drafter and always:
            drafter.always()
        self.stop_ids = frozenset(Tokenizer.load(checkpoint).stop_ids)
        self.answers: list[list[int]] = []

    def decode(self, prompts: list[Prompt]) -> float:
        """Seconds from first to last tokens, summed over the answers."""
        scheduler, seconds, self.answers = self.engine.scheduler, 0.0, []
        for number, ids in enumerate(prompts):
            params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, stop_ids=self.stop_ids)
            request = Request(str(number), list(ids), params)
            scheduler.submit(request)
            while not (request.logprobs or request.finish):
                scheduler.step()
            began = time.perf_counter()
            while not request.finish:
                scheduler.step()
            seconds += time.perf_counter() - began
            self.answers.append(request.output)
        return seconds

    def timed(self, prompts: list[Prompt]) -> Callable[[], float]:
        """`decode`, to be called."""
        return lambda: self.decode(prompts)

    def accept_length(self, prompts: list[Prompt]) -> tuple[float, list[float]]:
        """Tokens a step, and how often the first, second, … draft was right."""
        spec = self.engine.scheduler.counters.spec
        before, right = (spec.verified, spec.accepted), spec.per_position(DRAFTS)
        self.decode(prompts)
        steps = max(spec.verified - before[0], 1)
        shares = [(now - old) / steps for now, old in zip(spec.per_position(DRAFTS), right, strict=True)]
        return 1 + (spec.accepted - before[1]) / steps, shares


def claims(checkpoint: Path | None) -> Iterator[dict[str, Any]]:
    """Accept length, and decoding with drafts against decoding without."""
    length, speed = f"accept length at {DRAFTS} drafts", "drafts against none, batch 1"
    if checkpoint is None:
        why = "needs --checkpoint"
        yield claim(length, None, "tokens", f">= {TARGET}", None, why)
        yield claim(speed, None, "x", "> 1", None, why)
        return
    asked = questions(checkpoint)
    prompts = [ids for kind in asked.values() for ids in kind]
    plain, chosen = Side(checkpoint, 0), Side(checkpoint, DRAFTS)
    always = Side(checkpoint, DRAFTS, always=True)
    told = {kind: always.accept_length(ids)[0] for kind, ids in asked.items()}
    mean, shares = always.accept_length(prompts)
    yield claim(
        length, mean, "tokens", f">= {TARGET}", mean >= TARGET,
        "; ".join(f"{kind} {value:.2f}" for kind, value in told.items())
        + "; drafts that were right: " + ", ".join(f"{100 * share:.0f} %" for share in shares),
        gated=True,
    )  # fmt: skip
    gains, detail, alike = list[float](), list[str](), True
    for kind, ids in asked.items():
        seconds = in_turn([side.timed(ids) for side in (plain, always, chosen)], REPEATS)
        alike &= plain.answers == always.answers == chosen.answers
        gains.append(seconds[0] / seconds[2])
        detail.append(f"{kind} {gains[-1]:.2f}, {seconds[0] / seconds[1]:.2f} with {DRAFTS} always")
    gain = statistics.geometric_mean(gains)
    detail.append("the same tokens" if alike else "OTHER TOKENS")
    yield claim(speed, gain, "x", "> 1", gain > 1 and alike, "; ".join(detail))


def questions(checkpoint: Path) -> dict[str, list[Prompt]]:
    """About QUESTIONS prompts of each kind that the run of `checkpoint` was trained on."""
    recipe = load_recipe(run_of(checkpoint) / RESOLVED).recipe
    tok, asked = Tokenizer.load(checkpoint), dict[str, list[Prompt]]()
    for kind in KINDS:
        names = families(kind, "trained", recipe.tasks.families)
        for family in names:
            for index in range(-(-QUESTIONS // len(names))):
                one = get(family).sample(instance_seed("eval", family, index))
                messages = [Message.from_openai(message) for message in one.messages]
                ids = render(tok, messages, tools=one.tools or None, add_generation_prompt=True).ids
                asked.setdefault(kind, []).append(list(ids))
    return asked
