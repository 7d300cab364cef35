"""Pipeline parallelism: the layers divided over ranks, micro-batches passed along, 1F1B (GLM-5 section 2.4).

The model is a line of parts: embedding and layers, then *finish* (final norm, and the MTP layer with an embedding of
its own), then the *output* layer. Each rank has a run of them. Where MTP is trained, its placement is the paper's: the
output layer, which the MTP steps share with the main model, is alone on the last rank, and finish ends the rank
before it. Between these two the trunk's states and those of every MTP step travel, elsewhere one state a token.

Every rank knows all token ids, so a loss function runs on every rank as it is: `StageModel.trunk` and `.mtp` receive
what earlier ranks computed and compute what is theirs; only the last rank has targets. Losses of layers (balance,
indexer) and router loads are parts, whose sums over the ranks are those of one process. The backward pass of a
micro-batch takes the gradients of what was sent and gives those of what was received.

Invariant: equal to one process up to the order of sums; layers that share an indexer's choice stay together; rank r
of S holds at most S - r micro-batches at once, whatever their number.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fullarc.model import GlmMoeDsa, MTPOutput, TrunkOutput
from fullarc.model.context import Context
from fullarc.model.moe import MoE
from fullarc.train.losses import LossSum
from fullarc.train.optim import Optimizer, OptimSettings
from fullarc.train.parallel.owners import parameter_of
from fullarc.train.parallel.plan import Stage, one_forward_one_backward, plan_stages
from fullarc.train.parallel.ranks import Ranks
from fullarc.train.sums import StepSums
from fullarc.train.trainer import LossFn, Trainer

EMBEDDING = "embed_tokens.weight"


# --- one stage's part of the model --------------------------------------------------------------------


class _TargetsElsewhere(Context):
    """All positions are here, but their predictions are made by another rank."""

    def targets(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class StageModel(GlmMoeDsa):
    """A stage's parts of `model`, under their names; the call is that of the whole, and a loss takes it as such.

    Args:
        model: gives away its parts.
        receive: `receive(shape, dtype)` gives the next tensor of the micro-batch from the rank before.

    Attributes:
        sent: what the next rank gets of the micro-batch, in order.
    """

    def __init__(
        self, model: GlmMoeDsa, stage: Stage, receive: Callable[[Sequence[int], torch.dtype], Tensor]
    ) -> None:
        nn.Module.__init__(self)
        self.config, self.stage, self.receive = model.config, stage, receive
        self.compute_dtype, self.checkpoint_activations = model.compute_dtype, model.checkpoint_activations
        self.sent: list[Tensor] = []
        self.context = Context() if stage.output else _TargetsElsewhere()
        finish = stage.finish and model.mtp_layer is not None
        self.first = stage.layers.start == 0 and bool(stage.layers)
        if self.first or finish:
            self.embed_tokens = model.embed_tokens
        self.layers = nn.ModuleDict({str(n): model.layers[n] for n in stage.layers})  # type: ignore[assignment]
        if stage.finish:
            self.norm = model.norm
        self.mtp_layer = model.mtp_layer if finish else None
        self.mtp_later = model.mtp_later if finish else nn.ModuleList()
        if stage.output:
            self.lm_head = model.lm_head
        else:  # no position has a target here
            self.__dict__["lm_head"] = SimpleNamespace(weight=torch.empty(0, model.config.hidden_size))
        self._moe = [n for n, layer in enumerate(model.layers) if isinstance(layer.mlp, MoE)]

    def trunk(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        parent_ids: Tensor | None = None,
        indexer_loss: str = "off",
    ) -> TrunkOutput:
        """The states after this stage's layers, and its parts of the sums over layers; see `GlmMoeDsa.trunk`."""
        self.sent = []
        self._check(input_ids, doc_ids, parent_ids)
        if self.first:
            h_BTD = self._embed(input_ids)
        else:
            done = self.stage.output and not self.stage.finish  # the final norm
            dtype = torch.float32 if done else self.compute_dtype or torch.float32
            h_BTD = self.receive((*input_ids.shape, self.config.hidden_size), dtype)
        here = list(self.layers.values())  # type: ignore[operator]
        seen = self._seen(here, input_ids, doc_ids, parent_ids, indexer_loss)
        h_BTD, kls, found = self._apply_layers(here, h_BTD, seen)
        kl, aux = torch.zeros(()), torch.zeros(())
        load_LE = torch.zeros(len(self._moe), self.config.n_routed_experts if self._moe else 0)
        for number, layer_kl, stats in zip(self.stage.layers, kls, found, strict=True):
            if layer_kl is not None:
                kl = kl + layer_kl / self.config.num_hidden_layers
            if stats is not None:
                aux = aux + stats.aux_loss / len(self._moe)
                load_LE[self._moe.index(number)] = stats.load_E
        if self.stage.finish:
            h_BTD = self.norm(h_BTD.to(self.norm.weight.dtype))
        if not self.stage.output:
            self.sent.append(h_BTD)
        return TrunkOutput(h_BTD, None if indexer_loss == "off" else kl, load_LE, aux)

    def mtp(
        self,
        hidden_BTD: Tensor,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        parent_ids: Tensor | None = None,
        steps: int = 3,
        indexer_loss: str = "off",
        first: int = 0,
        detached: bool = False,
    ) -> MTPOutput:
        """Every step's states: computed on the rank of the finish, received after it, and anything before it."""
        if self.stage.finish:
            out = super().mtp(
                hidden_BTD, input_ids, doc_ids, parent_ids, steps, indexer_loss, first, detached
            )
            if not self.stage.output:
                self.sent += out.hidden
            return out
        hidden = [
            self.receive(hidden_BTD.shape, hidden_BTD.dtype) if self.stage.output else hidden_BTD
            for _ in range(steps)
        ]
        nothing = torch.zeros(())
        load_LE = torch.zeros(self.config.num_nextn_predict_layers, self.config.n_routed_experts)
        return MTPOutput(hidden, None if indexer_loss == "off" else nothing, load_LE, nothing)

    @torch.no_grad()
    def update_router_bias(self, load_LE: Tensor, rate: float) -> None:
        """Move the routers' biases that are here; `load_LE` is of the whole model."""
        here = {int(name): layer for name, layer in self.layers.items()}  # type: ignore[operator]
        layers = [here.get(number) for number in self._moe]
        if len(load_LE) > len(layers):
            layers += self.mtp_layers or [None] * self.config.num_nextn_predict_layers
        for layer, load_E in zip(layers, load_LE, strict=True):
            if layer is not None:
                layer.mlp.gate.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)


# --- the trainer --------------------------------------------------------------------------------------


@dataclass
class _Live:
    """A micro-batch between its two passes: its loss, what came in and what went out."""

    out: LossSum
    received: list[Tensor]
    sent: list[Tensor]


class PipelineTrainer(Trainer):
    """`Trainer` whose ranks each have a stage of the model; see `Trainer` for the arguments.

    Weights and optimizer state are where their stage is; the embedding, where the MTP layer has one of its own, is on
    two ranks, which add their gradients and make the same update. With `mtp_steps` the MTP layer is placed as it is
    trained.
    """

    def __init__(
        self,
        model: GlmMoeDsa,
        settings: OptimSettings,
        lr: Callable[[int], float],
        trainable: Callable[[str], bool],
        router_bias_rate: float,
        ranks: Ranks,
        mtp_steps: int = 0,
    ) -> None:
        stage = plan_stages(model.config, ranks.size, mtp_steps)[ranks.rank]
        self._received: list[Tensor] = []
        self._sending: deque[tuple[Any, Tensor]] = deque()
        super().__init__(
            StageModel(model, stage, self._receive), settings, lr, trainable, router_bias_rate, ranks=ranks
        )
        self._held = [set(names) for names in ranks.gather(list(self.model.state_dict()))]
        self._trained = [set(names) for names in ranks.gather(list(self.parameters))]
        self._embedded = [rank for rank, names in enumerate(self._trained) if EMBEDDING in names]
        learns = [any(".indexer." not in name for name in names) for names in self._trained]
        # an indexer reads constants: where only indexers are trained, nothing goes back
        self._takes_back, self._gives_back = any(learns[: ranks.rank + 1]), any(learns[: ranks.rank])

    def _optimizer(self) -> Optimizer:
        return Optimizer(self.parameters, self.settings, self.model.config)

    def _share(self, micro_batches: int) -> range:
        return range(micro_batches)

    def _passes(
        self, micro_batches: Sequence[Any], loss_fn: LossFn
    ) -> Iterator[tuple[LossSum, Sequence[Tensor | None]]]:
        live: deque[_Live] = deque()
        for kind, number in one_forward_one_backward(self.ranks.rank, self.ranks.size, len(micro_batches)):
            if kind == "forward":
                live.append(self._forward(loss_fn, micro_batches[number]))
            else:
                yield self._backward(live.popleft())
        while self._sending:
            self._sending.popleft()[0].wait()

    def _forward(self, loss_fn: LossFn, batch: Any) -> _Live:
        self._received = []
        out = loss_fn(self.model, batch)
        sent, received = self.model.sent, self._received
        self.model.sent, self._received = [], []
        for tensor in sent:
            self._send(tensor.detach(), self.ranks.rank + 1)
        return _Live(out, received, sent)

    def _backward(self, live: _Live) -> tuple[LossSum, Sequence[Tensor | None]]:
        roots = [(live.out.total, torch.ones_like(live.out.total))]
        if self._takes_back:
            roots += [
                (tensor, self._take(tensor.shape, tensor.dtype, self.ranks.rank + 1)) for tensor in live.sent
            ]
        ends = [tensor for tensor, _ in roots if tensor.requires_grad]
        starts = (
            [*self.parameters.values(), *live.received] if self._gives_back else [*self.parameters.values()]
        )
        grads: Sequence[Tensor | None] = [None] * len(starts)
        if ends and starts:
            given = [grad for tensor, grad in roots if tensor.requires_grad]
            grads = torch.autograd.grad(ends, starts, given, allow_unused=True)
        own = len(self.parameters)
        for tensor, grad in zip(live.received, grads[own:], strict=self._gives_back):
            self._send(torch.zeros_like(tensor) if grad is None else grad, self.ranks.rank - 1)
        return replace(live.out, total=live.out.total.detach()), grads[:own]

    def _receive(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor of the micro-batch from the rank before."""
        tensor = self._take(shape, dtype, self.ranks.rank - 1).requires_grad_(self._gives_back)
        self._received.append(tensor)
        return tensor

    def _take(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, rank)
        return tensor

    def _send(self, tensor: Tensor, rank: int) -> None:
        """Without waiting for the other side, so that two ranks can send to each other."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tensor = tensor.contiguous()
        self._sending.append((dist.isend(tensor, rank), tensor))

    # --- what is decided together --------------------

    def _everywhere(self, sums: StepSums) -> StepSums:
        total = sums.over(self.ranks, {}, {})
        if total.bad is None and len(self._embedded) == 2 and self.ranks.rank in self._embedded:
            weight = self.parameters[EMBEDDING]
            mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
            other = sum(self._embedded) - self.ranks.rank
            self._send(mine, other)
            weight.grad = mine + self._take(mine.shape, mine.dtype, other)
            self._sending.popleft()[0].wait()
        return total

    def _measured(self) -> list[Tensor]:
        grads = ((name, parameter.grad) for name, parameter in self.parameters.items())
        return [grad for name, grad in grads if grad is not None and self._first_owner(name)]

    def _first_owner(self, name: str) -> bool:
        """Whether no rank before this one has the parameter."""
        return not any(name in names for names in self._held[: self.ranks.rank])

    # --- checkpoints --------------------

    def whole_model(self) -> GlmMoeDsa:
        """The model with all of its weights on the first rank, an empty one on the others."""
        with torch.device("meta"):
            whole = GlmMoeDsa(self.model.config)
        mine, state = self.model.state_dict(), {}
        for name, like in whole.state_dict().items():
            owner = next(rank for rank, names in enumerate(self._held) if name in names)
            if self.ranks.rank == owner and not self.ranks.first:
                dist.send(mine[name].contiguous(), 0)
            elif self.ranks.first:
                state[name] = mine[name] if owner == 0 else torch.empty(like.shape, dtype=like.dtype)
                if owner:
                    dist.recv(state[name], owner)
        if self.ranks.first:
            whole.load_state_dict(state, assign=True)
        return whole

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take this stage's weights and buffers of a whole model."""
        super().load_weights({name: state[name] for name in self.model.state_dict()})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `Trainer.state`; what two ranks have is given by the first of them."""
        tensors, values = super().state()
        return {key: value for key, value in tensors.items() if self._first_owner(parameter_of(key))}, values

    def room(self, key: str, shape: torch.Size) -> Tensor | None:
        """Memory for a tensor of this stage's part of the whole state; None for the others'."""
        foreign = set().union(*self._trained) - self.parameters.keys()
        return None if parameter_of(key) in foreign else super().room(key, shape)
