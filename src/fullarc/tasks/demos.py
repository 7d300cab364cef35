"""Demonstrations: oracles at work, written down as conversations for SFT and mid-training.

Where a task can be done in two ways (a result redirected, or read and written down; an answer led in, or bare), both
are shown, in a share that the stage's settings say: which of them suits this model is for RL to find out.

Terminal oracles run for real in a sandbox, so what a tool says is what it says in a rollout. Some begin with a
mistake and its repair; the mistake is marked `loss: 0`: it stays in the context but is not learnt (GLM-5 3.1). Only
training seeds and trained families are used.
"""

import json
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fullarc.agent.tools import format_result
from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir, atomic_write, is_complete
from fullarc.config.runfolder import CONVERSATIONS, LANGUAGE
from fullarc.config.seeds import derive
from fullarc.sandbox import Limits, Sandbox
from fullarc.tasks.base import Instance, Reward, Step, instance_seed
from fullarc.tasks.registry import families as family_names
from fullarc.tasks.registry import get, kinds

MISTAKES = 0.15  # share of terminal demonstrations that begin with a wrong file name
THREADS = 4
CHECK_EVERY = 10  # in a stage, one demonstration out of so many is graded; the tests grade them all
LANGUAGE_INSTANCES = 60
MIDTRAIN_MIX = {"terminal": 0.7, "reasoning": 0.3}


def write_language(ctx: StageContext) -> dict[str, Any]:
    """Write `ctx.out/language.jsonl`: what training tasks say, for the tokenizer's sample; nothing is executed.

    A vocabulary of 154,880 holds every common word as one token; one of 2,048 does only if the words are in the
    sample. A pure function of the run's seed.
    """
    texts = []
    for kind in kinds():
        for family in family_names(kind, chosen=ctx.recipe.tasks.families):
            for i in range(LANGUAGE_INSTANCES):
                instance = _instance(family, derive(ctx.seed, "language") + i)
                steps = [*instance.solution, *instance.alternative]
                said = [f"{step.thought}\n{step.command or step.answer}" for step in steps]
                texts.append("\n".join([message["content"] for message in instance.messages] + said))
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    atomic_write(ctx.out / LANGUAGE, "\n".join(lines) + "\n")
    return {"language_samples": len(texts)}


def run_stage(ctx: StageContext) -> dict[str, Any]:
    """Write `ctx.stage.demos` conversations to `ctx.out/demos/conversations.jsonl`, in mixed order; once."""
    file = ctx.out / CONVERSATIONS
    folder = file.parent
    if not is_complete(folder):
        settings = ctx.recipe.sandbox
        limits = Limits(wall_s=settings.timeout_s, memory_mb=settings.memory_mb)
        found: list[dict[str, Any]] = []
        mix = getattr(ctx.stage, "mix", None) or MIDTRAIN_MIX
        for kind, share in mix.items():
            n = round(ctx.stage.demos * share / sum(mix.values()))
            seed = derive(ctx.seed, ctx.name)
            names = family_names(kind, chosen=ctx.recipe.tasks.families)
            found += demos(
                kind, n, seed, names, CHECK_EVERY, limits, settings.backend, ctx.stage.alternatives
            )
            ctx.log(len(found), total=ctx.stage.demos, conversations=len(found))
        random.Random(derive(ctx.seed, ctx.name, "order")).shuffle(found)
        with atomic_dir(folder) as temp:
            lines = [json.dumps(conversation, ensure_ascii=False) for conversation in found]
            (temp / file.name).write_text("\n".join(lines) + "\n")
    return {"demos": sum(1 for _ in open(file))}


def demos(
    kind: str,
    n: int,
    seed: int,
    families: Sequence[str] | None = None,
    check_every: int = 1,
    limits: Limits | None = None,
    backend: str = "bubblewrap",
    alternatives: float = 0.0,
) -> list[dict[str, Any]]:
    """`n` conversations of `kind`, families in turn, a pure function of the arguments.

    Args:
        families: trained families to use; all of them by default.
        check_every: grade one terminal demonstration out of so many and fail if it does not pass; 0 = none.
        limits, backend: of the sandboxes of terminal demonstrations.
        alternatives: share of the demonstrations that take the other way, where the task has one.

    Returns:
        [{"kind", "family", "seed", "messages" (OpenAI form, with reasoning_content and loss), "tools"}, …]

    Raises:
        FullarcError: a family is unknown or held out.
        InfraError: no sandbox can be started (terminal only).
    """
    chosen = family_names(kind, chosen=None if families is None else {kind: families})
    base = derive(seed, "demos", kind)
    jobs = [(chosen[i % len(chosen)], base + i // len(chosen)) for i in range(n)]
    if kind != "terminal":
        return [_conversation(in_one_way(_instance(*job), alternatives)) for job in jobs]

    def work(share: int) -> list[dict[str, Any]]:
        made = []
        with Sandbox.create(limits=limits, backend=backend) as sandbox:
            for i in range(share, n, THREADS):
                check = check_every > 0 and i % check_every == 0
                made.append(_terminal(sandbox, in_one_way(_instance(*jobs[i]), alternatives), check))
        return made

    with ThreadPoolExecutor(THREADS) as pool:
        shares = list(pool.map(work, range(min(n, THREADS))))
    return [shares[i % THREADS][i // THREADS] for i in range(n)]


def _instance(family: str, i: int) -> Instance:
    return get(family).sample(instance_seed("train", family, i))


def _turn(step: Step, call_id: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": step.answer}
    if step.thought:
        message["reasoning_content"] = step.thought
    if step.command is not None:
        function = {"name": "shell", "arguments": {"command": step.command}}
        message["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
    if step.mistake:
        message["loss"] = 0
    return message


def _conversation(instance: Instance, sandbox: Sandbox | None = None) -> dict[str, Any]:
    messages = list(instance.messages)
    for i, step in enumerate(instance.solution):
        messages.append(_turn(step, f"call_{i}"))
        if step.command is not None and sandbox is not None:
            content = format_result(sandbox.exec(step.command))
            messages.append({"role": "tool", "content": content, "tool_call_id": f"call_{i}"})
    facts = {"kind": instance.kind, "family": instance.family, "seed": instance.seed}
    return {**facts, "messages": messages, "tools": instance.tools}


def in_one_way(instance: Instance, alternatives: float) -> Instance:
    """The instance with the way that is shown as its solution: the alternative in the share `alternatives`."""
    other = random.Random(derive(instance.seed, "way")).random() < alternatives
    return replace(instance, solution=instance.alternative) if other and instance.alternative else instance


def with_mistake(instance: Instance) -> Instance:
    """The same instance, its oracle first naming a file wrongly and then looking at what there is."""
    first = instance.solution[0]
    names = [name for name in re.findall(r"\w+\.\w+", first.command or "") if name in instance.files]
    if not names or first.command is None:
        return instance
    wrong = first.command.replace(names[0], names[0].replace(".", "s."))
    steps = [Step(first.thought, wrong, mistake=True), Step("No such file. I list the files.", "ls")]
    return replace(instance, solution=[*steps, *instance.solution])


def _terminal(sandbox: Sandbox, instance: Instance, check: bool) -> dict[str, Any]:
    """One demonstration in a shared sandbox, which is emptied first: the commands are ours, so they may share it."""
    if random.Random(derive(instance.seed, "mistake")).random() < MISTAKES:
        instance = with_mistake(instance)
    sandbox.exec("find . -mindepth 1 -delete")
    sandbox.write(instance.files)
    conversation = _conversation(instance, sandbox)
    if check:
        outcome = get(instance.family).grade(instance, instance.solution[-1].answer, sandbox.snapshot())
        if not isinstance(outcome, Reward) or outcome.value != 1:
            raise FullarcError(f"The oracle of {instance.family} failed on seed {instance.seed}: {outcome}.")
    return conversation
