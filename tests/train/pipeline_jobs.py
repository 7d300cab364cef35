"""What the ranks of the pipeline tests do; a module of its own, so that a new process can import it."""

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rank_jobs import Weights, arrays, batches

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig
from fullarc.model import GlmMoeDsa
from fullarc.train import LmLoss, NonFinite, OptimSettings, Trainer, run_phase, trained
from fullarc.train.losses import indexer_warmup_loss
from fullarc.train.parallel import Ranks
from fullarc.train.parallel.pipeline import PipelineTrainer

LOSSES = {
    "dense": (LmLoss(mtp_steps=2, mtp_rows=0.5, aux_weight=0.1), 2),
    "detached": (LmLoss(mtp_steps=2, aux_weight=0.1, mtp_detached=True), 2),
    "plain": (LmLoss(aux_weight=0.1), 0),
    "sparse": (LmLoss(mtp_steps=2, aux_weight=0.1, index_weight=1.0), 2),
    "warmup": (partial(indexer_warmup_loss, mtp_steps=2), 2),
}


def new_trainer(config: ModelConfig, ranks: Ranks, mode: str = "dense", dtype: str = "float32") -> Trainer:
    model = GlmMoeDsa(config).init_weights(1)
    model.compute_dtype, model.checkpoint_activations = getattr(torch, dtype), dtype != "float32"
    for (
        parameter
    ) in model.parameters():  # far from where all attention is uniform and an indexer's gradient is rounding
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    mtp_steps = LOSSES[mode][1]
    chosen = trained(indexer=mode in ("sparse", "warmup"), mtp=bool(mtp_steps), trunk=mode != "warmup")
    common = model, OptimSettings(clip=0.5), lambda _: 0.01, chosen, 1e-3
    return Trainer(*common) if ranks.size == 1 else PipelineTrainer(*common, ranks, mtp_steps)


def train(
    ranks: Ranks, config: ModelConfig, rows: Path, mode: str, dtype: str = "float32"
) -> tuple[list[dict[str, float]], Weights, int, list[str]]:
    """Three steps of six micro-batches, one of two unequal ones, one of one: metrics, the weights here, how many
    micro-batches this rank held at most between their two passes, and the state that it would save."""
    torch.set_num_threads(1)
    trainer = new_trainer(config, ranks, mode, dtype)
    alive: list[weakref.ref] = []
    most = 0

    def loss(model, batch):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive) + 1)
        out = LOSSES[mode][0](model, batch)
        alive.append(weakref.ref(out))
        return out

    found = batches(rows)
    steps = [*(batch.split(1) for batch in found), found[0].split(4), found[0].split(6)]
    metrics = [trainer.step(micro, loss) for micro in steps]
    return metrics, arrays(trainer.model.state_dict()), most, sorted(trainer.state()[0])


def bad_weight(ranks: Ranks, config: ModelConfig, rows: Path) -> str:
    """A weight of the second layer is NaN; what this rank is told, after which all go on together."""
    trainer = new_trainer(config, ranks)
    before = {name: value.clone() for name, value in trainer.parameters.items()}
    place = dict(trainer.model.named_parameters()).get("layers.1.self_attn.kv_b_proj.weight")
    if place is not None:
        place.data[0, 0] = torch.nan
    micro = batches(rows)[0].split(2)
    try:
        trainer.step(micro, LOSSES["dense"][0])
    except NonFinite as error:
        if place is not None:
            place.data[0, 0] = before["layers.1.self_attn.kv_b_proj.weight"][0, 0]
        assert all(torch.equal(value, before[name]) for name, value in trainer.parameters.items())
        trainer.step(micro, LOSSES["dense"][0])
        return error.message
    return "nothing"


def phase(ranks: Ranks, rows: Path, out: Path, stop_at: int = 0, parallel: str = "pp") -> dict[str, float]:
    """A phase with checkpoints every two steps; with `stop_at` the first rank gives up after that step."""
    from test_checkpoint import tiny, tiny_phase

    def log(step: int, **_: float) -> None:
        if step == stop_at:
            raise FullarcError("Enough.")

    settings = replace(tiny_phase(rows, steps=5), parallel=parallel, mtp_steps=2)
    return run_phase(settings, tiny, out, log=log, ranks=ranks)
