"""The RL stages of the arc: each translates its settings into a learner, a rollout side and the one loop.

reasoning_rl   Eq. 1, on-policy                          agentic_rl   Eqs 3-5, one batch ahead, in
sandboxes general_rl     Eq. 1 on rule rewards, some reasoning     distil       Eq. 2, earlier stages
teach by kind of task
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError
from fullarc.config.files import is_complete
from fullarc.model import load_config, load_model
from fullarc.rl.learner import Learner
from fullarc.rl.loop import run_loop
from fullarc.rl.prompts import family_weights
from fullarc.rl.rollouts import ProcessRollouts
from fullarc.rl.worker import WorkerJob
from fullarc.tasks import get


def run_reasoning(ctx: StageContext) -> dict[str, float]:
    """GRPO with pop() on problems with a verifier (GLM-5 section 3.2, Eq. 1)."""
    return _run(ctx, ["reasoning"])


def run_agentic(ctx: StageContext) -> dict[str, float]:
    """Terminal tasks in real sandboxes, sampled one batch ahead of training (sections 3.3 and 4.1, Eqs 3-5)."""
    return _run(ctx, ["terminal"])


def run_general(ctx: StageContext) -> dict[str, float]:
    """Rule rewards on format, length and language (section 3.4); the mix keeps some reasoning in."""
    return _run(ctx, ["general"])


def run_distil(ctx: StageContext) -> dict[str, float]:
    """The student samples, the stage that was best at the prompt's kind of task grades each token (Eq. 2)."""
    teachers = {}
    for kind, stage in ctx.stage.teachers.items():
        folder = ctx.run_dir / "stages" / stage / "checkpoint"
        if not is_complete(folder):
            raise FullarcError(
                f"Stage {ctx.name}: the teacher of {kind}, stage {stage}, has no complete checkpoint at {folder}.",
                f"Run {stage} first, or change stages.{ctx.name}.teachers.",
            )
        teachers[kind] = load_model(folder).requires_grad_(False)
    return _run(ctx, list(teachers), teachers)


def _run(ctx: StageContext, kinds: Sequence[str], teachers: dict[str, Any] | None = None) -> dict[str, float]:
    if ctx.model_in is None:
        raise FullarcError(f"Stage {ctx.name} needs a model to start from.", "Put pretrain before it in arc.")
    torch.set_num_threads(1)
    positions = load_config(ctx.model_in).max_position_embeddings
    if ctx.stage.max_len > positions:
        raise FullarcError(
            f"stages.{ctx.name}.max_len is {ctx.stage.max_len}, the model has {positions} positions.",
            "Lower max_len.",
        )
    weights = family_weights(ctx.stage.mix, kinds, ctx.recipe.tasks.families)
    untaught = [family for family in weights if teachers and get(family).kind not in teachers]
    if untaught:
        raise FullarcError(
            f"Stage {ctx.name}: no teacher for {untaught[0]}, a {get(untaught[0]).kind} task.",
            f"Add one to stages.{ctx.name}.teachers or take it out of the mix.",
        )
    workers = 1 if ctx.stage.eta else ctx.recipe.threads  # with a lag the other core is sampling meanwhile
    learner = Learner(load_model(ctx.model_in), ctx.stage, teachers, workers)
    with ProcessRollouts(
        worker_job(ctx, weights).message(),
        trajectories=ctx.out / "trajectories",
        logs=ctx.out / "logs",
        engine=[] if ctx.recipe.engine.url else engine_command(ctx),
        engine_url=ctx.recipe.engine.url,
        engines=ctx.stage.engines,
        max_restarts=ctx.stage.max_restarts,
        stall_s=ctx.stage.stall_s,
        event=ctx.event,
    ) as rollouts:
        return run_loop(ctx, learner, rollouts)


def worker_job(ctx: StageContext, families: dict[str, float]) -> WorkerJob:
    """The worker's half of the settings."""
    s = ctx.stage
    return WorkerJob(
        stage=ctx.name,
        seed=ctx.seed,
        families=families,
        prompts=s.prompts,
        group_size=s.group_size,
        temperature=s.temperature,
        max_new_tokens=s.max_new_tokens,
        max_len=s.max_len,
        max_turns=s.max_turns,
        concurrency=s.concurrency,
        stall_s=s.stall_s,
        tokenizer=str(Path(ctx.model_in or "").absolute()),
        ledger=str((ctx.run_dir / "ledger.sqlite").absolute()),
        sandbox=ctx.recipe.sandbox.model_dump(),
    )


def engine_command(ctx: StageContext) -> list[str]:
    """Our own engine server: the stage's first weights, a free port, bounds, a precision."""
    e = ctx.recipe.engine
    return [
        sys.executable, "-m", "fullarc.engine.server",
        "--model", str(Path(ctx.model_in or "").absolute()), "--port", "0",
        "--max-batch", str(e.max_batch), "--max-len", str(ctx.stage.max_len), "--threads", str(e.threads),
        "--dtype", e.dtype,
    ]  # fmt: skip
