"""One trainer for every stage, from pre-training to RL: micro-batches in, one exact update out.

    step gradient = sum over micro-batches of grad(total) / sum over micro-batches of count

Micro-batches are computed `workers` at a time, each on a thread of its own with one torch thread: at the sizes a
laptop trains, operations are too small to be split, but whole passes are not. Gradients are added in the order of
the micro-batches, so the result does not depend on `workers`. With several processes each computes every n-th
micro-batch; gradients, counts, metrics and router loads are summed over them before anything is decided.

Invariants: a step either happens completely or, when anything is not finite, not at all (weights and
optimizer state are untouched and the error says where); parameters outside `trainable` never change; the
state needed to continue bit for bit is the weights, `state()` and the position in the data.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig
from fullarc.train.losses import LossSum
from fullarc.train.optim import Optimizer, OptimSettings
from fullarc.train.parallel.owners import ShardedOptimizer
from fullarc.train.parallel.ranks import ALONE, Ranks
from fullarc.train.sums import StepSums

LossFn = Callable[[Any, Any], LossSum]


class NonFinite(FullarcError):
    """Training stopped: a weight, a buffer, the loss or a gradient is NaN or infinite."""

    exit_code = 1


def trained(*, indexer: bool, mtp: bool, trunk: bool = True) -> Callable[[str], bool]:
    """Which parameter names a stage trains.

    Dense stages and RL leave the indexer alone (GLM-5 3.2); the DSA warm-up trains nothing else; RL without
    an MTP loss leaves the MTP layer alone.
    """

    def chosen(name: str) -> bool:
        if name.startswith("mtp_") and not mtp:
            return False
        return indexer if ".indexer." in name else trunk

    return chosen


class Trainer:
    """Accumulates gradients, clips, updates, balances the router.

    Args:
        model: a module with `update_router_bias(load_LE, rate)` and a `config` giving the head shape.
        settings: the update rule.
        lr: learning rate of each step number.
        trainable: which parameter names are trained; the others are frozen (`requires_grad` is set
            accordingly).
        router_bias_rate: size of the loss-free balancing step; 0 = off.
        workers: micro-batches computed at once, and threads of the optimizer.
        ranks: the processes that train this model together; every one of them calls `step` with the same
            micro-batches, computes its share of them and makes the same update.
    """

    def __init__(
        self,
        model: Any,
        settings: OptimSettings,
        lr: Callable[[int], float],
        trainable: Callable[[str], bool],
        router_bias_rate: float = 0.0,
        workers: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.settings, self.lr = model, settings, lr
        self.router_bias_rate = router_bias_rate
        self.workers, self.ranks = workers, ranks
        self.step_number = 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable(name))
            parameter.grad = None
        self.parameters: dict[str, nn.Parameter] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        if not any(ranks.gather(bool(self.parameters))):
            raise ValueError("no parameter is trainable")
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Optimizer:
        if self.ranks.size == 1:
            return Optimizer(self.parameters, self.settings, self.model.config, self.workers)
        return ShardedOptimizer(self.parameters, self.settings, self.model.config, self.ranks, self.workers)

    def step(self, micro_batches: Sequence[Any], loss_fn: LossFn) -> dict[str, float]:
        """One update from all micro-batches; returns the step's metrics.

        Raises:
            FullarcError: the batch has no trainable token.
            NonFinite: something is NaN or infinite; nothing was changed.
        """
        started = time.perf_counter()
        for parameter in self.parameters.values():
            parameter.grad = None
        sums = StepSums()
        mine = self._share(len(micro_batches))
        passes = self._passes([micro_batches[index] for index in mine], loss_fn)
        for index, (out, grads) in zip(mine, passes, strict=True):
            if not torch.isfinite(out.total):
                sums.bad = index if sums.bad is None else sums.bad
                continue  # a pass may be collective: the other ranks count on the rest
            for parameter, grad in zip(self.parameters.values(), grads, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            sums.add(out)
        sums = self._everywhere(sums)
        if sums.bad is not None:
            raise self._non_finite(f"the loss of micro-batch {sums.bad}")
        if sums.count <= 0:
            raise FullarcError(
                f"Step {self.step_number}: no token of the batch is a training target (all masked).",
                "Look at loss.npy of the packed rows, or at the filters that made this batch.",
            )
        norm = self._normalise(sums.count)
        lr = self.lr(self.step_number)
        self.optimizer.step(lr)
        if sums.load_LE is not None and self.router_bias_rate:
            self.model.update_router_bias(sums.load_LE, self.router_bias_rate)
        self.step_number += 1
        metrics = sums.means()
        if sums.load_LE is not None:
            metrics |= load_statistics(sums.load_LE, self.model.config)
        seconds = time.perf_counter() - started
        return {**metrics, "lr": lr, "grad_norm": norm, "count": sums.count, "seconds": seconds}

    def _share(self, micro_batches: int) -> range:
        """Which of a step's micro-batches are computed here."""
        return range(micro_batches)[self.ranks.rank :: self.ranks.size]

    def _passes(
        self, micro_batches: Sequence[Any], loss_fn: LossFn
    ) -> Iterator[tuple[LossSum, Sequence[Tensor | None]]]:
        """The loss and the gradients of each micro-batch, in order."""
        one_pass = partial(self._pass, loss_fn)
        if self.workers == 1 or len(micro_batches) <= 1:
            yield from map(one_pass, micro_batches)
            return
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(one_pass, micro_batches)

    def _pass(self, loss_fn: LossFn, batch: Any) -> tuple[LossSum, Sequence[Tensor | None]]:
        parameters = list(self.parameters.values())
        out = loss_fn(self.model, batch)
        if out.count <= 0 or not torch.isfinite(out.total):
            return out, [None] * len(parameters)
        grads = torch.autograd.grad(out.total, parameters, allow_unused=True)
        return replace(out, total=out.total.detach()), grads

    def _everywhere(self, sums: StepSums) -> StepSums:
        """The step's sums over all ranks, and those of gradients at the rank whose optimizer uses them."""
        owners = self.optimizer.owners if isinstance(self.optimizer, ShardedOptimizer) else {}
        return sums.over(self.ranks, self.parameters, owners)

    def _normalise(self, count: float) -> float:
        """Divide the gradients by the step's count, clip, and return the norm before clipping.

        Each rank does so with those that its part of the optimizer uses, and none if a buffer anywhere is not finite.
        """
        grads = [p.grad for p in self.optimizer.parameters.values() if p.grad is not None]
        square = float(torch.nn.utils.get_total_norm(self._measured())) ** 2
        sound = all(bool(torch.isfinite(buffer).all()) for buffer in self.model.buffers())
        told = self.ranks.gather([square, sound])
        if not all(sound for _, sound in told):  # a router's bias shows in no loss
            raise self._non_finite("a buffer of the model")
        norm = sum(square for square, _ in told) ** 0.5 / count
        if not norm < float("inf"):
            raise self._non_finite("the gradient")
        clip = self.settings.clip
        shrink = clip / (norm + 1e-6) if clip and norm > clip else 1.0
        if grads:
            torch._foreach_mul_(grads, shrink / count)
        return norm

    def _measured(self) -> list[Tensor]:
        """The gradients whose norm this rank adds to that of all."""
        return [p.grad for p in self.optimizer.parameters.values() if p.grad is not None]

    def _non_finite(self, what: str) -> NonFinite:
        """The error that names the first bad weight of any rank, else the first bad gradient; drops all gradients."""
        where = list(dict.fromkeys(name for names in self.ranks.gather(self._not_finite()) for name in names))
        where.sort(key=lambda name: not name.startswith("weight "))
        for parameter in self.parameters.values():
            parameter.grad = None
        first = f"; first not finite: {where[0]} ({len(where)} in all)" if where else ""
        return NonFinite(
            f"Step {self.step_number}: {what} is NaN or infinite{first}. Nothing was updated.",
            "Resume from the last checkpoint with a lower learning rate, or look at this batch.",
        )

    def _not_finite(self) -> list[str]:
        """What of this rank has a value that is NaN or infinite, weights first."""
        grads = ((name, p.grad) for name, p in self.parameters.items() if p.grad is not None)
        return [f"weight {name}" for name, weight in self._weights() if not torch.isfinite(weight).all()] + [
            f"gradient of {name}" for name, grad in grads if not torch.isfinite(grad).all()
        ]

    def _weights(self) -> Iterable[tuple[str, Tensor]]:
        """All weights that are here, trained or not, and buffers."""
        return chain(self.model.named_parameters(), self.model.named_buffers())

    def whole_model(self) -> Any:
        """The model with all of its weights, on the first rank at least; every rank must ask."""
        return self.model

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights and buffers of a whole model."""
        with torch.no_grad():
            self.model.load_state_dict(state)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (of what this rank owns) and JSON values that, with the weights, continue training bit for bit."""
        return self.optimizer.tensors(), {"step": self.step_number, "optimizer": self.settings.kind}

    def room(self, key: str, shape: torch.Size) -> Tensor | None:
        """Memory for what this rank takes of a tensor of the whole state; None if it takes nothing of it."""
        return self.optimizer.room(key, shape)

    def load_state(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Take back `state()`, or what filled the `room` for it.

        Raises:
            FullarcError: the state is of another update rule or model.
        """
        if values["optimizer"] != self.settings.kind:
            raise FullarcError(
                f"The checkpoint was trained with {values['optimizer']}, not {self.settings.kind}.",
                "Resume with the same optimizer or start the stage again.",
            )
        self.optimizer.load_tensors(tensors)
        self.step_number = int(values["step"])


def load_statistics(load_LE: Tensor, config: ModelConfig) -> dict[str, float]:
    """How evenly a step's tokens went to the experts.

    Returns:
        `expert_load/layer_<number>` and `expert_load/mtp`: load of the fullest expert of each MoE layer over the mean,
        1 = perfectly balanced; `expert_load`: that of the worst layer; `dead_experts`: experts of all layers that got
        no token. Nothing where there are none.
    """
    if not load_LE.numel():
        return {}
    fullest = (load_LE.amax(-1) / load_LE.mean(-1).clamp_min(1e-9)).tolist()
    names = [f"layer_{number}" for number in range(config.first_k_dense_replace, config.num_hidden_layers)]
    layers = {f"expert_load/{name}": load for name, load in zip([*names, "mtp"], fullest, strict=False)}
    dead = float((load_LE == 0).sum())
    return {"expert_load": max(fullest), "dead_experts": dead, **layers}
