"""Weights, gradients and optimizer state divided over ranks by rows: FSDP2 (GLM-5 section 2.4).

Every decoder layer is a unit of `torch.distributed.fsdp.fully_shard`: gathered before it runs, freed after, its
gradients summed and scattered. Embedding, output layer, final norm and MTP layer are one more unit that stays
gathered for the length of a pass, because the chunked losses read `lm_head.weight` directly and the MTP layer runs
several times.

Muon needs whole matrices where FSDP keeps rows. Each matrix has one owner: the rows of its direction travel to the
owner only, in one all-to-all, and the rows of the update travel back in another. Momentum stays with the rows.
With expert parallelism the rows of the experts' weights are whole experts: they never travel, tokens do.

Invariant: equal to one process up to the order of sums. Micro-batches must divide evenly: a pass is collective.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from fullarc.config.errors import FullarcError
from fullarc.model import GlmMoeDsa
from fullarc.train.losses import LossSum
from fullarc.train.optim import HeadShape, Optimizer, OptimSettings, add_orthogonal_
from fullarc.train.parallel.exchange import Exchange, rows_of
from fullarc.train.parallel.experts import divide_experts, divided_experts
from fullarc.train.parallel.owners import owners_of, parameter_of
from fullarc.train.parallel.ranks import Ranks
from fullarc.train.sums import StepSums
from fullarc.train.trainer import LossFn, Trainer


def shard_model(model: GlmMoeDsa, ranks: Ranks) -> None:
    """Divide the model's weights over the ranks, in place; gradients will be sums over them, not means.

    Experts that are divided already (`divide_experts`) stay where they are.
    """
    mesh = init_device_mesh("cpu", (ranks.size,))
    names = divided_experts(model)
    experts = {parameter for name, parameter in model.named_parameters() if name in names}
    for unit in (*model.layers, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not model, ignored_params=experts)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    for method in ("trunk", "mtp"):
        register_fsdp_forward_method(model, method)


class FsdpOptimizer(Optimizer):
    """`Optimizer` over this rank's rows of every parameter.

    Args:
        parameters: the rows, named.
        shapes: whole shape of each.
        local: parameters whose rows are whole matrices (experts); they are orthogonalised where they are.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, tuple[int, ...]],
        settings: OptimSettings,
        heads: HeadShape,
        ranks: Ranks,
        local: Collection[str] = (),
    ) -> None:
        self.ranks, self.local, self.mesh = ranks, local, init_device_mesh("cpu", (ranks.size,))
        self.exchange = Exchange(ranks, shapes, owners_of(shapes, settings, heads, ranks.size))
        super().__init__(parameters, settings, heads)

    def _muon(self, lr: float) -> None:
        split, directions = self.settings.kind == "muon_split", self._directions()
        weights = {name: self.parameters[name].data for name in self._muon_names}
        torch._foreach_mul_(list(weights.values()), 1 - lr * self.settings.weight_decay)

        here = [name for name in self._muon_names if name in self.local]
        add_orthogonal_({name: weights[name] for name in here}, directions, self.heads, split, lr)
        apart = [name for name in self._muon_names if name not in self.local]
        whole = self.exchange.to_owners({name: directions[name] for name in apart})
        updates = {name: torch.zeros_like(direction) for name, direction in whole.items()}
        add_orthogonal_(updates, whole, self.heads, split, lr)
        rows = self.exchange.from_owners(updates, apart)
        torch._foreach_add_([weights[name] for name in apart], [rows[name] for name in apart])

    def tensors(self) -> dict[str, Tensor]:
        """The state, of which this rank has its rows."""
        shapes = self.exchange.shapes
        state = super().tensors().items()
        return {key: self._divided(x, shapes[parameter_of(key)]) if x.ndim else x for key, x in state}

    def room(self, key: str, shape: torch.Size) -> Tensor | None:
        """Memory for this rank's rows of a tensor of the whole state."""
        if not shape:
            return super().room(key, shape)
        rows = rows_of(self.ranks.rank, self.ranks.size, shape[0])
        return self._divided(torch.empty(rows.stop - rows.start, *shape[1:]), shape)

    def _divided(self, rows: Tensor, shape: Sequence[int]) -> DTensor:
        """A tensor of this whole shape, of which this rank has these rows."""
        whole = torch.empty(shape, device="meta")
        return DTensor.from_local(
            rows, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )


class FsdpTrainer(Trainer):
    """`Trainer` whose model is divided over the ranks by `shard_model`, one micro-batch at a time.

    `parameters` are this rank's rows as plain tensors that share memory with the model's; see `Trainer` for the
    arguments. With `expert_parallel` the experts are not gathered for a pass: tokens travel to them.
    """

    def __init__(
        self,
        model: GlmMoeDsa,
        settings: OptimSettings,
        lr: Callable[[int], float],
        trainable: Callable[[str], bool],
        router_bias_rate: float,
        ranks: Ranks,
        expert_parallel: bool = False,
    ) -> None:
        if expert_parallel:
            divide_experts(model, ranks)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable(name))
        self._experts = divided_experts(model)
        shard_model(model, ranks)
        super().__init__(model, settings, lr, trainable, router_bias_rate, ranks=ranks)

    def _optimizer(self) -> Optimizer:
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        for name in shapes.keys() & self._experts:
            shapes[name] = (shapes[name][0] * self.ranks.size, *shapes[name][1:])
        self._sharded = self.parameters
        self.parameters = {name: nn.Parameter(_rows(p)) for name, p in self._sharded.items()}
        heads = self.model.config
        return FsdpOptimizer(self.parameters, shapes, self.settings, heads, self.ranks, self._experts)

    def _passes(
        self, micro_batches: Sequence[Any], loss_fn: LossFn
    ) -> Iterator[tuple[LossSum, Sequence[Tensor | None]]]:
        shares = self.ranks.gather(len(micro_batches))
        if len(set(shares)) > 1:
            raise FullarcError(
                f"{sum(shares)} micro-batches do not divide evenly over {self.ranks.size} ranks.",
                "Choose micro_batch_rows so that every step has a multiple of the ranks.",
            )
        for parameter in self._sharded.values():
            parameter.grad = None
        yield from super()._passes(micro_batches, loss_fn)

    def _pass(self, loss_fn: LossFn, batch: Any) -> tuple[LossSum, Sequence[Tensor | None]]:
        out = loss_fn(self.model, batch)
        out.total.backward()  # whatever the loss is: the other ranks take part
        return out, [None] * len(self.parameters)

    def _everywhere(self, sums: StepSums) -> StepSums:
        for name, parameter in self._sharded.items():
            self.parameters[name].grad = None if parameter.grad is None else _rows(parameter.grad)
            parameter.grad = None
        return sums.over(self.ranks, {}, {})

    def _weights(self) -> Iterable[tuple[str, Tensor]]:
        return ((name, _rows(value)) for name, value in super()._weights())

    def whole_model(self) -> GlmMoeDsa:
        """The model with all of its weights on the first rank, an empty one on the others."""
        with torch.device("meta"):
            whole = GlmMoeDsa(self.model.config)
        state: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            full = self._full(name, value)
            if self.ranks.first:
                state[name] = full
        if self.ranks.first:
            whole.load_state_dict(state, assign=True)
        return whole

    def _full(self, name: str, value: Tensor) -> Tensor:
        if isinstance(value, DTensor):
            return value.full_tensor()
        if name not in self._experts:
            return value
        parts = [torch.empty_like(value) for _ in range(self.ranks.size)]
        dist.all_gather(parts, value)
        return torch.cat(parts)

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's rows of a whole model's weights, and its buffers."""
        for name, value in self.model.state_dict().items():
            if isinstance(value, DTensor) or name in self._experts:
                _rows(value).copy_(state[name][rows_of(self.ranks.rank, self.ranks.size, len(state[name]))])
            else:
                value.copy_(state[name])


def _rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that is divided; shares its memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
