"""What the ranks of the parallel tests do; a module of its own, so that a new process can import it."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig
from fullarc.model import GlmMoeDsa, QuantScheme, load_model
from fullarc.train import (
    Batch,
    LmLoss,
    NonFinite,
    Optimizer,
    OptimSettings,
    Rows,
    Trainer,
    checkpoint,
    load_checkpoint,
    run_phase,
    save_checkpoint,
    stages,
    trained,
)
from fullarc.train.parallel import ALONE, Ranks, ShardedOptimizer
from fullarc.train.parallel.exchange import Exchange
from fullarc.train.parallel.experts import ParallelExperts, divide_experts, divided_experts
from fullarc.train.parallel.fsdp import FsdpTrainer
from fullarc.train.parallel.shared import SharedRows

Weights = dict[str, np.ndarray]
LOSS = LmLoss(mtp_steps=2, aux_weight=0.01)
STEPS, ROWS = 3, 6


def arrays(tensors) -> Weights:
    """Copies, which can travel between processes."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def new_trainer(config: ModelConfig, ranks: Ranks = ALONE, kind: str = "muon_split") -> Trainer:
    model = GlmMoeDsa(config).init_weights(1)
    chosen = trained(indexer=False, mtp=True)
    return Trainer(model, OptimSettings(kind=kind), lambda _: 0.01, chosen, 1e-3, ranks=ranks)


def new_fsdp_trainer(config: ModelConfig, ranks: Ranks, seed: int = 1, experts: bool = False) -> FsdpTrainer:
    model = GlmMoeDsa(config).init_weights(seed)
    chosen = trained(indexer=False, mtp=True)
    return FsdpTrainer(model, OptimSettings(), lambda _: 0.01, chosen, 1e-3, ranks, experts)


def batches(rows: Path) -> list[Batch]:
    """Batches whose micro-batches have very different numbers of targets, one of them none."""
    stream = Rows(rows, ROWS, 0)
    found = [stream.next() for _ in range(STEPS)]
    for batch in found:
        batch.loss_BT[1] = False
        batch.loss_BT[2] &= torch.arange(batch.loss_BT.shape[1]) < 6
    return found


def train(ranks: Ranks, config: ModelConfig, rows: Path) -> tuple[list[dict[str, float]], Weights]:
    """Steps of six micro-batches, then one of a single micro-batch; metrics and weights."""
    torch.set_num_threads(1)
    trainer = new_trainer(config, ranks)
    steps = [batch.split(1) for batch in batches(rows)]
    metrics = [trainer.step(micro, LOSS) for micro in (*steps, steps[0][:1])]
    return metrics, arrays(trainer.model.state_dict())


def bad_loss(ranks: Ranks, config: ModelConfig, rows: Path, fsdp: bool) -> str:
    """Micro-batch 3 has an infinite loss, which only one rank computes; what this rank was told."""
    trainer = new_fsdp_trainer(config, ranks) if fsdp else new_trainer(config, ranks)
    micro = batches(rows)[0].split(1)

    def loss(model, batch):
        out = LOSS(model, batch)
        return type(out)(out.total * torch.inf, out.count) if batch is micro[3] else out

    before = {name: value.clone() for name, value in trainer.parameters.items()}
    try:
        trainer.step(micro, loss)
    except NonFinite as error:
        assert all(torch.equal(value, before[name]) for name, value in trainer.parameters.items())
        trainer.step(micro, LOSS)  # all ranks can go on together
        return error.message
    return "nothing"


def not_finite(ranks: Ranks, config: ModelConfig, rows: Path, experts: bool, name: str) -> tuple[str, str]:
    """NaN in the last row of a weight, which the last rank has; then in its gradient: what this rank is told."""
    trainer = new_fsdp_trainer(config, ranks, experts=experts)
    mine, micro, told = trainer.parameters[name], batches(rows)[0].split(1), []
    before = {key: value.clone() for key, value in trainer.parameters.items()}
    everywhere = trainer._everywhere

    def spoilt(out):
        sums = everywhere(out)
        if ranks.rank == ranks.size - 1:
            mine.grad[-1] = torch.nan
        return sums

    if ranks.rank == ranks.size - 1:
        mine.data[-1] = torch.nan
    for _ in range(2):
        try:
            trainer.step(micro, LOSS)
        except NonFinite as error:
            told.append(error.message)
        mine.data.copy_(before[name])
        trainer._everywhere = spoilt
    assert all(torch.equal(value, before[key]) for key, value in trainer.parameters.items())
    del trainer._everywhere
    assert trainer.step(micro, LOSS)["count"] > 0  # all ranks go on together
    return tuple(told)


def bad_bias(ranks: Ranks, config: ModelConfig, rows: Path, parallel: str, folder: Path) -> tuple[str, str]:
    """A router's bias is NaN on the last rank, then on all that have it: what this rank is told by a step and by a
    checkpoint, of which nothing is left; after which all go on together."""
    from test_checkpoint import tiny_phase

    phase = replace(tiny_phase(rows), parallel=parallel, mtp_steps=2)
    trainer = stages._trainer(phase, GlmMoeDsa(config).init_weights(1), ranks)
    micro, told = batches(rows)[0].split(1), []
    bias = trainer.model.state_dict().get("mtp_layer.mlp.gate.e_score_correction_bias", torch.zeros(4))
    before = {name: value.clone() for name, value in trainer.parameters.items()}
    everyone = parallel == "pp"  # of the ranks one has it
    if everyone or ranks.rank == ranks.size - 1:
        bias[0] = torch.nan
    for act in (lambda: trainer.step(micro, LOSS), lambda: save_checkpoint(folder, trainer, {})):
        try:
            act()
        except FullarcError as error:
            told.append(error.message)
        bias[0] = torch.nan
    assert all(torch.equal(value, before[name]) for name, value in trainer.parameters.items())
    bias[0] = 0.0
    assert trainer.step(micro, LOSS)["count"] > 0
    return tuple(told)


def sums(ranks: Ranks, blind: bool) -> tuple[bool, bool, list[tuple[Weights, Weights, Weights]]]:
    """Whether memory is shared for fp32 and for other numbers; sums, copies and sums at owners of lists that grow and
    shrink.

    `blind`: the last rank finds another file where the first one's should be.
    """
    if blind and ranks.rank == ranks.size - 1:
        os.readlink = lambda path: "/memfd:another (deleted)"
    memory = SharedRows(ranks.rank, ranks.size, ranks.gather)
    shared = memory.sum_([torch.ones(2)]), memory.sum_([torch.ones(2, dtype=torch.float64)])
    results = []
    for shapes in ([(3,)], [(0,), (5, 2)], [(1000,), (7, 3), (2,)], [(1,)]):
        summed, spread, reduced = (random(ranks.rank, shapes) for _ in range(3))
        owners = [i % ranks.size for i in range(len(shapes))]
        ranks.sum_(summed)
        ranks.spread_(spread, owners)
        ranks.reduce_(reduced, owners)
        results.append(tuple(arrays(dict(enumerate(found))) for found in (summed, spread, reduced)))
    return *shared, results


def random(rank: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Numbers of very different size, others on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return [10 ** (6 * torch.rand(shape, generator=generator)) for shape in shapes]


def unsendable(_: Ranks) -> object:
    """A function that has no name elsewhere."""
    return lambda: None


def fail(ranks: Ranks, how: str) -> None:
    """The last rank goes down while the others wait for it."""
    if ranks.rank == ranks.size - 1:
        if how == "refused":
            raise FullarcError("The rows are of another model.", "Pack them again.")
        if how == "crashed":
            raise KeyError("lost")
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def wait_for_ever(ranks: Ranks, folder: Path) -> None:
    """Rank 0 never comes to the barrier that the others are in."""
    (folder / f"{os.getpid()}.pid").touch()
    if ranks.rank == 0:
        time.sleep(1000)
    ranks.barrier()


def fsdp(
    ranks: Ranks, config: ModelConfig, rows: Path, folder: Path, experts: bool = False
) -> tuple[list[dict[str, float]], Weights, dict[str, int]]:
    """Steps of twelve micro-batches on a sharded model, then a checkpoint: metrics, weights, bytes held."""
    torch.set_num_threads(1)
    trainer = new_trainer(config) if ranks.size == 1 else new_fsdp_trainer(config, ranks, experts=experts)
    assert bool(divided_experts(trainer.model)) == experts
    steps = [2 * batch.split(1) for batch in batches(rows)]
    metrics = [trainer.step(micro, LOSS) for micro in steps]
    save_checkpoint(folder, trainer, {"place": 7})
    held = {
        "weights": sum(p.nbytes for p in trainer.parameters.values()),
        "moments": sum(value.nbytes for value in Optimizer.tensors(trainer.optimizer).values()),
    }
    return metrics, arrays(load_model(folder).state_dict()), held


def fsdp_load(ranks: Ranks, config: ModelConfig, folder: Path, again: Path, experts: bool) -> None:
    """Read a checkpoint into a sharded model of other weights and write it again."""
    trainer = new_fsdp_trainer(config, ranks, seed=2, experts=experts)
    save_checkpoint(again, trainer, load_checkpoint(folder, trainer))


def divide_by_torch(ranks: Ranks, folder: Path, again: Path) -> dict[str, Weights]:
    """Torch's own loader reads weights and optimizer state of a checkpoint by rows; what it has read, put together.

    It writes the optimizer state, divided as it is, to `again`.
    """
    mesh, found = init_device_mesh("cpu", (ranks.size,)), {}
    for kind, path in (("weights", folder), ("optimizer", folder / "trainer" / "optimizer")):
        reader = HuggingFaceStorageReader(str(path))
        about = {name: one.size for name, one in reader.read_metadata().state_dict_metadata.items()}
        state = {n: zeros(s, device_mesh=mesh, placements=[Shard(0)]) for n, s in about.items() if s}
        state |= {name: torch.zeros(()) for name, size in about.items() if not size}
        dcp.load(state, storage_reader=reader)
        found[kind] = arrays({n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in state.items()})
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(again), save_distributed=True))
    return found


def gradients(model: GlmMoeDsa, step: int) -> None:
    """The same random gradients on every rank."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def optimize(ranks: Ranks, config: ModelConfig, kind: str) -> tuple[Weights, Weights]:
    """Three updates by equal gradients; weights and the optimizer's state on this rank."""
    torch.set_num_threads(1)
    model = GlmMoeDsa(config).init_weights(1)
    parameters, settings = dict(model.named_parameters()), OptimSettings(kind=kind)
    if ranks.size == 1:
        optimizer = Optimizer(parameters, settings, config)
    else:
        optimizer = ShardedOptimizer(parameters, settings, config, ranks)
    for step in range(3):
        gradients(model, step)
        optimizer.step(0.01)
    return arrays(parameters), arrays(optimizer.tensors())


def save(ranks: Ranks, config: ModelConfig, rows: Path, folder: Path) -> tuple[Weights, Weights]:
    """Train a step, write a checkpoint, the last rank late; weights and this rank's optimizer state."""
    trainer = new_trainer(config, ranks)

    class Late(checkpoint.HuggingFaceStorageWriter):
        def write_data(self, *arguments):
            time.sleep(0.5)
            return super().write_data(*arguments)

    if ranks.rank == ranks.size - 1:
        checkpoint.HuggingFaceStorageWriter = Late
    trainer.step(batches(rows)[0].split(1), LOSS)
    save_checkpoint(folder, trainer, {"place": 7})
    return arrays(trainer.model.state_dict()), arrays(trainer.optimizer.tensors())


def load(ranks: Ranks, config: ModelConfig, folder: Path) -> tuple[Weights, Weights]:
    """Read the checkpoint back; weights and this rank's optimizer state."""
    trainer = new_trainer(config, ranks)
    assert load_checkpoint(folder, trainer) == {"place": 7} and trainer.step_number == 1
    return arrays(trainer.model.state_dict()), arrays(trainer.optimizer.tensors())


def phase(ranks: Ranks, rows: Path, out: Path, stop_at: int = 0, **changes: object) -> dict[str, float]:
    """A whole phase with checkpoints every two steps; with `stop_at` the first rank gives up after that step."""
    from test_checkpoint import tiny, tiny_phase

    def log(step: int, **_: float) -> None:
        if step == stop_at:
            raise FullarcError("Enough.")

    return run_phase(replace(tiny_phase(rows, steps=5), **changes), tiny, out, log=log, ranks=ranks)


def inputs(config: ModelConfig, rank: int) -> tuple[Tensor, Tensor]:
    """Hidden states of a rank and the gradient that comes back, more of both on higher ranks."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2, 8 * (rank + 1), config.hidden_size)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def moe_layer(
    ranks: Ranks, config: ModelConfig, favourite: int, bits: int = 0
) -> tuple[np.ndarray, np.ndarray, Weights]:
    """Output, input gradient and weight gradients of one layer; `favourite` is an expert that all tokens choose."""
    torch.set_num_threads(1)
    moe = GlmMoeDsa(config).init_weights(1).layers[-1].mlp
    if favourite >= 0:
        moe.gate.e_score_correction_bias[favourite] = 10.0
        moe.gate.e_score_correction_bias[: config.num_experts_per_tok - 1] = 10.0
    if bits:
        moe.quantize_experts(QuantScheme(bits, 16))
    if ranks.size > 1:
        moe.experts = ParallelExperts(moe.experts, ranks)
    x_BTD, grad_BTD = inputs(config, ranks.rank)
    x_BTD.requires_grad_()
    y_BTD, _ = moe(x_BTD, None)
    y_BTD.backward(grad_BTD)
    grads = {name: parameter.grad for name, parameter in moe.named_parameters()}
    return y_BTD.detach().numpy(), x_BTD.grad.numpy(), arrays(grads)


def expert_parallel(ranks: Ranks, config: ModelConfig, rows: Path) -> tuple[float, Weights]:
    """Loss of the whole model on this rank's share of four rows, and gradients: experts' as they are, others summed."""
    torch.set_num_threads(1)
    model = GlmMoeDsa(config).init_weights(1)
    if ranks.size > 1:
        divide_experts(model, ranks)
    batch, run = batches(rows)[0], 4 // ranks.size
    out = LmLoss(mtp_steps=2)(model, batch.rows(ranks.rank * run, (ranks.rank + 1) * run))
    out.total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ranks.sum_([grad for name, grad in grads.items() if ".experts." not in name])
    return float(out.total.detach()), arrays(grads)


def exchange(ranks: Ranks) -> bool:
    """Rows to owners and back, where ranks have unequal numbers of rows or none and own several tensors or none."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 3), "b": (2, 4), "c": (9,), "d": (1, 2, 2)}
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    moves = Exchange(ranks, shapes, {"a": 1, "b": 0, "c": 1, "d": 1})
    rows = {name: list(value.chunk(ranks.size)) for name, value in whole.items()}
    empty = {name: value[:0] for name, value in whole.items()}
    mine = {name: rows[name][ranks.rank] if ranks.rank < len(rows[name]) else empty[name] for name in whole}
    owned = moves.to_owners(mine)
    assert owned.keys() == {0: {"b"}, 1: {"a", "c", "d"}}.get(ranks.rank, set())
    assert all(torch.equal(value, whole[name]) for name, value in owned.items())
    back = moves.from_owners(owned, list(shapes))
    return back.keys() == mine.keys() and all(torch.equal(back[name], mine[name]) for name in mine)
