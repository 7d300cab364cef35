"""What the ranks of the context-parallel tests do; a module of its own, so that a new process can import it."""

from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rank_jobs import LOSS, Weights, arrays, batches
from torch.autograd.graph import saved_tensors_hooks

from fullarc.config.model import ModelConfig
from fullarc.model import GlmMoeDsa, mla, visibility
from fullarc.train import Batch, LmLoss, NonFinite, OptimSettings, Rows, Trainer, trained
from fullarc.train.losses import indexer_warmup_loss
from fullarc.train.parallel import Ranks
from fullarc.train.parallel.context import ContextTrainer, DividedContext

SPARSE = LmLoss(mtp_steps=2, mtp_rows=0.5, aux_weight=0.1, index_weight=1.0)
LOSSES = {
    "dense": LmLoss(mtp_steps=3, aux_weight=0.1),
    "warmup": partial(indexer_warmup_loss, mtp_steps=2),
    "sparse": SPARSE,
}
ROWS = 3
Choices = dict[tuple[int, int, int], set[int]]


def new_trainer(config: ModelConfig, ranks: Ranks) -> Trainer:
    model = GlmMoeDsa(config).init_weights(1)
    common = model, OptimSettings(), lambda _: 0.01, trained(indexer=False, mtp=True), 1e-3
    return Trainer(*common) if ranks.size == 1 else ContextTrainer(*common, ranks)


def three_rows(rows: Path) -> Batch:
    """Rows whose second document stands alone or, in every other row, continues the first."""
    batch = Rows(rows, ROWS, 0).next()
    batch.parents_BT[::2] = (batch.docs_BT[::2] == 2).long()
    return batch


def one_pass(
    ranks: Ranks, config: ModelConfig, rows: Path, mode: str, checkpoint: bool = False, dtype: str = "float32"
) -> tuple[float, Weights, np.ndarray | None, dict[str, tuple[float, float]], float, int, Choices]:
    """Loss, gradients, loads, metrics and count of this rank, how many of its queries gathered their keys (in all
    layers and rows), and the keys (layer, row, query) -> chosen.

    Blocks of keys are small, so that rows have several, and some begin where a rank's run does not.
    """
    torch.set_num_threads(1)
    visibility.BLOCK = visibility.LONG_BLOCK = 5 if ranks.size == 1 else 3
    model = GlmMoeDsa(config).init_weights(1)
    model.compute_dtype, model.checkpoint_activations = getattr(torch, dtype), checkpoint
    for parameter in model.parameters():  # so far from the start that nothing is small
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(mode != "warmup" or ".indexer." in name)
    if ranks.size > 1:
        model.context = DividedContext(ranks)
    choices, gathered = record_choices(model)
    out = LOSSES[mode](model, three_rows(rows))
    out.total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    load = None if out.router_load_LE is None else out.router_load_LE.numpy()
    return (
        float(out.total.detach()),
        arrays(grads),
        load,
        dict(out.metrics),
        out.count,
        len(gathered),
        choices,
    )


def record_choices(model: GlmMoeDsa) -> tuple[Choices, set[tuple[int, int, int]]]:
    """Both fill: with what every query takes, as positions in the row, and with those that gather it."""
    numbers = {layer.self_attn: number for number, layer in enumerate([*model.layers, *model.mtp_layers])}
    found: Choices = {}
    gathered: set[tuple[int, int, int]] = set()
    steps: dict[tuple[int, int], int] = defaultdict(int)
    choose, gather = mla.MLA._choose, mla.MLA._gathered

    def note(attention, chunk, taken_Bt):
        # the MTP layer is applied several times with other states: only its first time is noted
        if attention in numbers and steps[numbers[attention], chunk.first] == 0:
            for b, rows in enumerate(taken_Bt):
                for i, keys in enumerate(rows):
                    found[numbers[attention], b, chunk.first + i] = set(keys)
        steps[numbers[attention], chunk.first] += 1

    def choosing(self, index, chunk):
        scores, mask = choose(self, index, chunk)
        mask_BtS = mask if index is None else mask.expand(len(index.queries), -1, -1)
        note(self, chunk, [[chunk.keys[row].tolist() for row in rows] for rows in mask_BtS])
        return scores, mask

    def gathering(self, q_nope, q_rope, stored, index, run, seen):
        out = gather(self, q_nope, q_rope, stored, index, run, seen)
        start, positions = run[0].part.start, index.choose(run)
        for chunk in run:
            mine = positions[:, chunk.part.start - start : chunk.part.stop - start]
            note(self, chunk, [[keys[keys >= 0].tolist() for keys in rows] for rows in mine])
            places = range(chunk.first, chunk.first + mine.shape[1])
            gathered.update((numbers[self], b, place) for b in range(len(mine)) for place in places)
        return out

    mla.MLA._choose, mla.MLA._gathered = choosing, gathering
    return found, gathered


def train(ranks: Ranks, config: ModelConfig, rows: Path) -> tuple[list[dict[str, float]], Weights]:
    """Three steps of three micro-batches each; metrics and weights."""
    torch.set_num_threads(1)
    trainer = new_trainer(config, ranks)
    metrics = [trainer.step(batch.split(2), LOSS) for batch in batches(rows)]
    return metrics, arrays(trainer.model.state_dict())


def kept(ranks: Ranks, config: ModelConfig, rows: Path) -> int:
    """Bytes that the forward pass of the whole loss keeps for the backward pass, weights not counted."""
    torch.set_num_threads(1)
    model = GlmMoeDsa(config).init_weights(1)
    if ranks.size > 1:
        model.context = DividedContext(ranks)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = SPARSE(model, Rows(rows, 2, 0).next())
    total = sum(size for place, size in held.items() if place not in weights)
    out.total.backward()
    return total


def bad_weight(ranks: Ranks, config: ModelConfig, rows: Path) -> str:
    """A weight is NaN; what this rank is told."""
    trainer = new_trainer(config, ranks)
    trainer.parameters["layers.1.self_attn.kv_b_proj.weight"].data[0, 0] = torch.nan
    try:
        trainer.step(batches(rows)[0].split(2), LOSS)
    except NonFinite as error:
        return error.message
    return "nothing"


def phase(ranks: Ranks, rows: Path, out: Path, stop_at: int = 0) -> dict[str, float]:
    """A phase with checkpoints every two steps; with `stop_at` the first rank gives up after that step."""
    from dataclasses import replace

    from test_checkpoint import tiny, tiny_phase

    from fullarc.config.errors import FullarcError
    from fullarc.train import run_phase

    def log(step: int, **_: float) -> None:
        if step == stop_at:
            raise FullarcError("Enough.")

    return run_phase(replace(tiny_phase(rows, steps=5), parallel="cp"), tiny, out, log=log, ranks=ranks)
