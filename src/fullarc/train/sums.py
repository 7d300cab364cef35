"""What the micro-batches of one step add up to, on this rank and then on all.

Shapes: L MoE layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fullarc.train.losses import LossSum
from fullarc.train.parallel.ranks import Ranks


@dataclass
class StepSums:
    """Sums over micro-batches; gradients are summed in the parameters' `.grad`.

    Attributes:
        count: weight of the step, by which its gradients are divided.
        metrics: sum and count of each metric.
        load_LE: tokens per MoE layer and expert.
        bad: number of the first micro-batch whose loss is NaN or infinite.
    """

    count: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    load_LE: Tensor | None = None
    bad: int | None = None

    def add(self, out: LossSum) -> None:
        """Take in one micro-batch."""
        self.count += out.count
        self._add_metrics(out.metrics)
        if out.router_load_LE is not None:
            self.load_LE = out.router_load_LE if self.load_LE is None else self.load_LE + out.router_load_LE

    def over(
        self, ranks: Ranks, parameters: Mapping[str, nn.Parameter], owners: Mapping[str, int]
    ) -> "StepSums":
        """The sums over all ranks, and each gradient's at its owner; after a bad loss gradients are left alone.

        A rank that had no micro-batch, or no gradient of a parameter that another rank has one of, adds zeros.
        """
        if ranks.size == 1:
            return self
        told = ranks.gather(
            {
                "count": self.count,
                "metrics": self.metrics,
                "bad": self.bad,
                "load": None if self.load_LE is None else list(self.load_LE.shape),
                "has_grad": [parameter.grad is not None for parameter in parameters.values()],
            }
        )
        total = StepSums(sum(one["count"] for one in told))
        for one in told:
            total._add_metrics(one["metrics"])
        total.bad = min((one["bad"] for one in told if one["bad"] is not None), default=None)
        if total.bad is not None:
            return total
        grads: list[Tensor] = []
        takers: list[int] = []
        has_grad = zip(*(one["has_grad"] for one in told), strict=True)
        for (name, parameter), somewhere in zip(parameters.items(), has_grad, strict=True):
            if any(somewhere):
                grad = parameter.grad
                parameter.grad = torch.zeros_like(parameter) if grad is None else grad.contiguous()
                grads.append(parameter.grad)
                takers.append(owners[name])
        ranks.reduce_(grads, takers)
        shape = next((one["load"] for one in told if one["load"] is not None), None)
        if shape is not None:
            total.load_LE = torch.zeros(shape) if self.load_LE is None else self.load_LE.clone()
            ranks.sum_([total.load_LE])
        return total

    def means(self) -> dict[str, float]:
        """Every metric as the ratio of its sums."""
        return {name: total / max(n, 1e-30) for name, (total, n) in self.metrics.items()}

    def _add_metrics(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        for name, (total, n) in metrics.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (before[0] + total, before[1] + n)
