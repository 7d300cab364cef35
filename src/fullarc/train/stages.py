"""The language-model stages: pre-training, mid-training, sparse attention, SFT. One loop, four settings.

A `Phase` says everything that is trained and how; `run_phase` takes a model to a finished checkpoint and can
be killed at any moment: started again with the same arguments it ends with the same bits. The `run_*`
functions only translate a stage's settings into phases (GLM-5 sections 2.1-2.3 and 3.1).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fullarc.chat import Tokenizer
from fullarc.config.context import StageContext, silent
from fullarc.config.errors import FullarcError
from fullarc.config.files import is_complete
from fullarc.config.seeds import derive
from fullarc.config.stages import DSA, Compute, LMStage, Parallel
from fullarc.model import GlmMoeDsa, QuantScheme, load_config, load_model
from fullarc.train.checkpoint import Steps, load_checkpoint, save_checkpoint, saved_data_state
from fullarc.train.compute import prepare
from fullarc.train.losses import evaluate
from fullarc.train.method import Method, method_of, warm_up_of
from fullarc.train.parallel.ranks import ALONE, Ranks
from fullarc.train.parallel.stage import in_processes
from fullarc.train.rows import Rows
from fullarc.train.schedule import batch_size
from fullarc.train.trainer import Trainer

HELD_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Phase(Method):
    """A method, its data, and how its work is divided and kept.

    Attributes:
        rows: packed rows folder; `held` of its rows are never trained on.
        batch_rows, micro_rows: rows per step and per forward pass.
        batch_start, batch_warmup: rows of the first step, and in how many steps it grows to `batch_rows`.
        save_every, log_every: in steps.
        workers: forward passes computed at once.
        parallel: what several processes divide, as in `LMStage`.
        mtp_steps: how often the loss applies the MTP layer; a pipeline places it accordingly.
        compute: in which precision, and what is kept for the backward pass.
        compile: whether layers run as compiled C++.
        seed: seed of the order of the rows.
    """

    rows: Path
    batch_rows: int
    micro_rows: int
    batch_start: int = 0
    batch_warmup: int = 0
    save_every: int = 50
    log_every: int = 10
    seed: int = 0
    held: int = 0
    workers: int = 1
    parallel: Parallel = "zero1"
    mtp_steps: int = 0
    compute: Compute = Compute()
    compile: bool = False


def run_phase(
    phase: Phase,
    begin: Callable[[], GlmMoeDsa],
    out: Path,
    *,
    tokenizer_dir: Path | None = None,
    log: Callable[..., None] = lambda *_, **__: None,
    event: Callable[..., None] = lambda *_, **__: None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train the model that `begin()` gives and leave it as the checkpoint `out`; returns the last logged
    metrics.

    Continues from the newest complete checkpoint under `<out>.steps`; does nothing when `out` is complete.

    Args:
        log: called as `log(step, **metrics)` every `log_every` steps with the means since the last call.
        event: called as `event(kind, **fields)` on resume and on damaged checkpoints.
        ranks: the processes that all call this with the same arguments and train together. Checkpoints do not
            depend on their number, which may change at every start; only the first of them reports.
    """
    if not ranks.first:
        log = event = silent
    saved = Steps(out.with_name(f"{out.name}.steps"), event)
    if is_complete(out):
        if ranks.first:
            saved.clear()
        return dict(saved_data_state(out)["metrics"])
    model = prepare(begin(), phase.compute)
    if phase.compile:
        from fullarc.train.compile import compile_layers

        compile_layers(model)
    trainer = _trainer(phase, model, ranks)
    config = trainer.model.config
    rows = Rows(phase.rows, phase.batch_rows, phase.seed, config.vocab_size, phase.held)
    if rows.length > config.max_position_embeddings:
        raise FullarcError(
            f"{phase.rows}: rows of {rows.length} tokens exceed the model's max_position_embeddings "
            f"{config.max_position_embeddings}.",
            "Pack shorter rows, or start from a model with more positions.",
        )
    metrics: dict[str, float] = {}
    newest = saved.latest()
    if newest is not None:
        data_state = load_checkpoint(newest, trainer)
        rows.load_state(data_state["rows"])
        metrics = data_state["metrics"]
        event("resumed", step=trainer.step_number, path=str(newest))
    start, full, warmup = phase.batch_start, phase.batch_rows, phase.batch_warmup
    window = Window()
    while trainer.step_number < phase.steps:
        batch = rows.next(batch_size(trainer.step_number, start=start, full=full, warmup=warmup))
        window.add(trainer.step(batch.split(phase.micro_rows), phase.loss), batch.ids_BT.numel())
        done = trainer.step_number
        if done % phase.log_every == 0 or done in (1, phase.steps):
            metrics = window.means()
            log(done, **metrics)
        if done % phase.save_every == 0 and done < phase.steps:
            saved.save(trainer, {"rows": rows.state(), "metrics": metrics}, tokenizer_dir)
    save_checkpoint(out, trainer, {"rows": rows.state(), "metrics": metrics}, tokenizer_dir)
    if ranks.first:
        saved.clear()
    return metrics


def _trainer(phase: Phase, model: GlmMoeDsa, ranks: Ranks) -> Trainer:
    common = model, phase.optim, phase.lr, phase.trainable, phase.router_bias_rate
    if ranks.size == 1 or phase.parallel == "zero1":
        return Trainer(*common, phase.workers, ranks)
    if phase.parallel == "cp":
        from fullarc.train.parallel.context import ContextTrainer

        return ContextTrainer(*common, ranks)
    if phase.parallel == "pp":
        from fullarc.train.parallel.pipeline import PipelineTrainer

        return PipelineTrainer(*common, ranks, phase.mtp_steps)
    from fullarc.train.parallel.fsdp import FsdpTrainer

    return FsdpTrainer(*common, ranks, expert_parallel=phase.parallel == "fsdp2+ep")


class Window:
    """Means of step metrics since the last look, and tokens per second."""

    def __init__(self) -> None:
        self.tokens = 0
        self._steps: list[dict[str, float]] = []

    def add(self, metrics: dict[str, float], tokens: int) -> None:
        """Take in one step and how many tokens it read."""
        self._steps.append(metrics)
        self.tokens += tokens

    def means(self) -> dict[str, float]:
        """Means over the steps added since the last call; `lr` is the newest."""
        sums: dict[str, list[float]] = defaultdict(list)
        for step in self._steps:
            for name, value in step.items():
                sums[name].append(value)
        out = {name: sum(values) / len(values) for name, values in sums.items() if name != "seconds"}
        out["tokens_per_s"] = self.tokens / max(sum(sums["seconds"]), 1e-9)
        out["lr"] = self._steps[-1]["lr"]
        self._steps, self.tokens = [], 0
        return out


# --- stages ------------------------------------------------------------------------------------------


@in_processes
def run_pretrain(ctx: StageContext, ranks: Ranks) -> dict[str, float]:
    """A new model on concatenated short rows, dense attention."""
    tokenizer = Tokenizer.load(_tokenizer_dir(ctx))
    ids = {"eos_token_id": tuple(tokenizer.stop_ids), "pad_token_id": tokenizer.id("<|endoftext|>")}
    config = ctx.recipe.dense_model.model_copy(update=ids)
    if tokenizer.vocab_size > config.vocab_size:
        raise FullarcError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}.",
            "Raise model.vocab_size or train the tokenizer again.",
        )
    induction = ctx.stage.induction
    return _run_stage(ctx, ranks, lambda: GlmMoeDsa(config).init_weights(derive(ctx.seed, "init"), induction))


@in_processes
def run_midtrain(ctx: StageContext, ranks: Ranks) -> dict[str, float]:
    """The same model on longer, isolated rows; `rope_theta` may grow with the length."""
    theta = getattr(ctx.stage, "rope_theta", 0.0)
    if not theta:
        return _run_stage(ctx, ranks, lambda: load_model(_model_in(ctx)))
    return _run_stage(ctx, ranks, lambda: load_model(_model_in(ctx), rope_theta=theta))


@in_processes
def run_sft(ctx: StageContext, ranks: Ranks) -> dict[str, float]:
    """Conversations; the loss mask in the rows says which tokens are the assistant's.

    With `qat_bits` the experts compute as they will once they are quantised (2.4).
    """
    stage = ctx.stage
    scheme = QuantScheme(stage.qat_bits, stage.qat_group) if stage.qat_bits else None

    def start() -> GlmMoeDsa:
        return load_model(_model_in(ctx)).quantize_experts(scheme, stage.qat_shared)

    return _run_stage(ctx, ranks, start)


@in_processes
def run_dsa(ctx: StageContext, ranks: Ranks) -> dict[str, float]:
    """From dense to sparse attention: warm-up of the indexer alone, then adaptation of everything (2.1.1).

    `out/warmup` keeps the warmed-up model, which is the paper's "warm-up only" variant. The returned loss_*
    and index_kl_* compare dense and sparse attention on rows that were not trained on.
    """
    stage, model_in, topk = ctx.stage, _model_in(ctx), ctx.recipe.model.index_topk
    settings = _phase(ctx, model_in)
    warm = replace(
        settings,
        **vars(warm_up_of(stage)),
        batch_warmup=0,
        seed=derive(ctx.seed, ctx.name, "warmup"),
    )
    total, folder = stage.indexer_steps + stage.steps, ctx.out / "warmup"
    result = _dense_against_sparse(ctx, settings, load_model(model_in, index_topk=topk), "start")
    ctx.event("phase", stage=ctx.name, phase="warmup", steps=warm.steps)
    run_phase(
        warm,
        lambda: load_model(model_in, index_topk=topk),
        folder,
        log=lambda step, **metrics: ctx.log(step, total=total, **metrics),
        tokenizer_dir=_tokenizer_dir(ctx),
        event=ctx.event,
        ranks=ranks,
    )
    result |= _dense_against_sparse(ctx, settings, load_model(folder), "warmup")
    ctx.event("phase", stage=ctx.name, phase="sparse", steps=settings.steps)
    run_phase(
        settings,
        lambda: load_model(folder),
        ctx.checkpoint,
        log=lambda step, **metrics: ctx.log(step + warm.steps, total=total, **metrics),
        tokenizer_dir=_tokenizer_dir(ctx),
        event=ctx.event,
        ranks=ranks,
    )
    return result | _dense_against_sparse(ctx, settings, load_model(ctx.checkpoint), "end")


def _dense_against_sparse(ctx: StageContext, phase: Phase, model: GlmMoeDsa, when: str) -> dict[str, float]:
    """Loss with dense and with sparse attention, and the indexer's KL, on the held-out rows."""
    rows = Rows(phase.rows, phase.batch_rows, phase.seed, held=phase.held)
    held = rows.held_rows().split(1)
    dense, sparse = evaluate(model, held, "dense"), evaluate(model, held, "sparse")
    result = {
        f"loss_dense_{when}": dense["loss"],
        f"loss_sparse_{when}": sparse["loss"],
        f"index_kl_{when}": dense["index_kl"],
        f"index_kl_selected_{when}": sparse["index_kl"],
    }
    ctx.event("dense_against_sparse", stage=ctx.name, **result)
    return result


def _run_stage(ctx: StageContext, ranks: Ranks, start: Callable[[], GlmMoeDsa]) -> dict[str, float]:
    phase = _phase(ctx, ctx.model_in)
    return run_phase(
        phase,
        start,
        ctx.checkpoint,
        tokenizer_dir=_tokenizer_dir(ctx),
        log=lambda step, **metrics: ctx.log(step, total=phase.steps, **metrics),
        event=ctx.event,
        ranks=ranks,
    )


def _phase(ctx: StageContext, model_in: Path | None) -> Phase:
    """The stage's settings as a phase; also sets torch's threads and checks the row length."""
    stage: LMStage = ctx.stage
    torch.set_num_threads(1)
    rows = _rows_dir(ctx)
    length = Rows(rows, 1, 0).length
    if length != stage.seq_len:
        raise FullarcError(
            f"{rows} was packed to {length} tokens a row, stages.{ctx.name}.seq_len is {stage.seq_len}.",
            "Run the data stage again.",
        )
    depths = stage.mtp_steps
    if depths and not (load_config(model_in) if model_in else ctx.recipe.model).num_nextn_predict_layers:
        raise FullarcError(
            f"stages.{ctx.name}.mtp_steps is {depths} but the model has no MTP layer.",
            "Set mtp_steps = 0 or model.num_nextn_predict_layers = 1.",
        )
    return Phase(
        **vars(method_of(stage)),
        rows=rows,
        batch_rows=stage.batch_rows,
        micro_rows=stage.micro_rows,
        batch_start=stage.first_rows,
        batch_warmup=stage.batch_warmup_steps,
        save_every=stage.save_every,
        log_every=stage.log_every,
        seed=derive(ctx.seed, ctx.name),
        held=HELD_ROWS if isinstance(stage, DSA) else 0,
        workers=stage.threads or ctx.recipe.threads,
        parallel=stage.parallel,
        mtp_steps=depths,
        compute=stage,
        compile=stage.compile,
    )


def _rows_dir(ctx: StageContext) -> Path:
    """The stage's packed rows; sparse adaptation goes on with the mid-training data (2.1.1).

    A folder of its own comes first.
    """
    own = ctx.run_dir / "data" / "rows" / ctx.name
    return own.with_name("midtrain") if isinstance(ctx.stage, DSA) and not own.exists() else own


def _tokenizer_dir(ctx: StageContext) -> Path:
    return ctx.run_dir / "data" / "tokenizer"


def _model_in(ctx: StageContext) -> Path:
    if ctx.model_in is None:
        raise FullarcError(f"Stage {ctx.name} needs a model to start from.", "Put pretrain before it in arc.")
    return ctx.model_in
