"""Muon Split: each attention head's matrix is orthogonalised on its own (GLM-5 section 2.1).

A matrix parameter is cut into blocks (heads of the query up-projection, heads of the key and of the value
part of the key-value up-projection, gate/up/down of every expert, otherwise the whole matrix). With Nesterov
momentum m over the gradient g, every block W of shape [A, B] moves by

    W <- W (1 - lr * decay) - lr * 0.2 * sqrt(max(A, B)) * NS5(mix of g and m)     (RMS 0.2, as AdamW)

where NS5 is five quintic Newton-Schulz steps towards the polar factor. Blocks of equal shape, whatever layer
they come from, go through one batched call. Embeddings, head, norms, biases and the router use AdamW.

Invariant: the update of a block depends on that block's gradients only, so cutting equals training each head
alone.

Shapes: N blocks, A rows, B columns, H heads, E experts, I expert width.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fullarc.config.errors import FullarcError

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
_ADAMW_NAMES = ("embed_tokens", "lm_head", "mlp.gate.", "norm")


class HeadShape(Protocol):
    """The fields of the model's config that say where one head ends."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def qk_nope_head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """What the update is made of; the learning rate comes with every step.

    Attributes:
        kind: "muon_split" (per head), "muon" (whole up-projections) or "adamw" for everything.
        adamw_scale: learning rate of the AdamW group relative to the schedule's.
        weight_decay: decoupled, on parameters of two or more dimensions.
        clip: largest norm of the whole gradient; 0 = never clipped.
    """

    kind: Literal["muon_split", "muon", "adamw"] = "muon_split"
    momentum: float = 0.95
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    adamw_scale: float = 1.0
    clip: float = 1.0


def newton_schulz(blocks_NAB: Tensor) -> Tensor:
    """Approximate polar factor U V^T of every [A, B] block: singular values end in about [0.7, 1.2]."""
    a, b, c = NS_COEFFICIENTS
    tall = blocks_NAB.shape[-2] > blocks_NAB.shape[-1]
    x_NAB = blocks_NAB.mT if tall else blocks_NAB
    x_NAB = x_NAB / x_NAB.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(NS_STEPS):
        gram_NAA = x_NAB @ x_NAB.mT
        poly_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, poly_NAA, x_NAB, beta=a)
    return x_NAB.mT if tall else x_NAB


def cut(
    name: str, tensor: Tensor, heads: HeadShape, split: bool
) -> Iterator[tuple[Tensor, tuple[int, int, int]]]:
    """Views of a parameter (or of anything shaped like it) and the [N, A, B] blocks that each one holds.

    A view may be strided; `view.reshape(shape)` gives the blocks, `blocks.view(view.shape)` goes back.
    """
    n_heads, nope = heads.num_attention_heads, heads.qk_nope_head_dim
    if tensor.ndim == 3:
        halves = tensor.chunk(2, dim=1) if "gate_up" in name else (tensor,)
        for half in halves:
            yield half, (half.shape[0], half.shape[1], half.shape[2])
        return
    columns = tensor.shape[1]
    if name.endswith("q_b_proj.weight"):
        views = [tensor.view(n_heads, -1, columns)]
    elif name.endswith("kv_b_proj.weight"):
        per_head = tensor.view(n_heads, nope + heads.v_head_dim, columns)
        views = [per_head[:, :nope], per_head[:, nope:]]
    else:
        views = [tensor.view(1, *tensor.shape)]
    for view in views:
        n, rows = view.shape[:2]
        yield view, ((n, rows, columns) if split else (1, n * rows, columns))


def add_orthogonal_(
    weights: Mapping[str, Tensor], directions: Mapping[str, Tensor], heads: HeadShape, split: bool, lr: float
) -> None:
    """Move every block of every weight by -lr * 0.2 * sqrt(max(A, B)) * NS5(its part of the direction)."""
    groups: dict[tuple[int, int], list[tuple[Tensor, Tensor, bool]]] = defaultdict(list)
    for name, weight in weights.items():
        pieces = zip(cut(name, weight, heads, split), cut(name, directions[name], heads, split), strict=True)
        for (target, _), (source, shape) in pieces:
            blocks_NAB, tall = source.reshape(shape), shape[1] > shape[2]
            key = (min(shape[1:]), max(shape[1:]))
            groups[key].append((target, blocks_NAB.mT if tall else blocks_NAB, tall))
    for (_, longest), members in groups.items():
        moved = newton_schulz(torch.cat([blocks for _, blocks, _ in members]))
        parts = moved.split([len(blocks) for _, blocks, _ in members])
        updates = [
            (part.mT if tall else part).reshape(target.shape)
            for part, (target, _, tall) in zip(parts, members, strict=True)
        ]
        torch._foreach_add_([target for target, _, _ in members], updates, alpha=-lr * 0.2 * longest**0.5)


def uses_adamw(name: str, parameter: Tensor) -> bool:
    """Embeddings, head, norms, biases and the router are not matrices to orthogonalise."""
    return parameter.ndim < 2 or any(part in name for part in _ADAMW_NAMES)


def require_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise FullarcError naming the first parameter without a gradient."""
    for name, parameter in parameters.items():
        if parameter.grad is None:
            raise FullarcError(
                f"{name} is set to be trained but has no gradient.", "Freeze it for this stage."
            )


class Optimizer:
    """Muon for matrices, AdamW for the rest, over named parameters.

    Raises:
        FullarcError: on `step`, when a parameter that should move has no gradient.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: OptimSettings, heads: HeadShape
    ) -> None:
        self.settings, self.heads = settings, heads
        self.parameters = dict(parameters)
        all_adamw = settings.kind == "adamw"
        self._adamw_names = [n for n, p in self.parameters.items() if all_adamw or uses_adamw(n, p)]
        self._muon_names = sorted(self.parameters.keys() - set(self._adamw_names))
        self.reset()

    def reset(self) -> None:
        """Forget all moments, as if no step had been made (agentic RL does so after every weight push)."""
        s = self.settings
        self._momentum = {name: torch.zeros_like(self.parameters[name]) for name in self._muon_names}
        named = [(name, self.parameters[name]) for name in self._adamw_names]
        groups = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": s.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = (
            torch.optim.AdamW(groups, lr=0.0, betas=s.betas, eps=s.eps, fused=True) if groups else None
        )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients in `.grad`."""
        require_gradients(self.parameters)
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr * self.settings.adamw_scale
            self._adamw.step()
        if self._muon_names:
            self._muon(lr)

    def _muon(self, lr: float) -> None:
        weights = {name: self.parameters[name].data for name in self._muon_names}
        directions = self._directions()
        torch._foreach_mul_(list(weights.values()), 1 - lr * self.settings.weight_decay)
        add_orthogonal_(weights, directions, self.heads, self.settings.kind == "muon_split", lr)

    def _directions(self) -> dict[str, Tensor]:
        """Move the momentum and mix it with the gradient (Nesterov)."""
        momentum = self.settings.momentum
        grads = [g for name in self._muon_names if (g := self.parameters[name].grad) is not None]
        buffers = [self._momentum[name] for name in self._muon_names]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        return dict(zip(self._muon_names, torch._foreach_lerp(grads, buffers, momentum), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Complete state as flat named tensors (not copies)."""
        out = {f"momentum.{name}": buffer for name, buffer in self._momentum.items()}
        for name in self._adamw_names:
            state = self._adamw.state[self.parameters[name]] if self._adamw is not None else {}
            out.update({f"adamw.{key}.{name}": value for key, value in state.items()})
        return out

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors()` gave.

        Raises:
            FullarcError: names or shapes are not those of this optimizer.
        """
        self.reset()
        left = dict(tensors)
        for name, buffer in self._momentum.items():
            saved = left.pop(f"momentum.{name}", None)
            if saved is None or saved.shape != buffer.shape:
                raise FullarcError(
                    f"The optimizer state has no momentum of shape {tuple(buffer.shape)} for {name}."
                )
            buffer.copy_(saved)
        for name in self._adamw_names:
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {key: left.pop(f"adamw.{key}.{name}") for key in keys if f"adamw.{key}.{name}" in left}
            if found and self._adamw is not None:
                self._adamw.state[self.parameters[name]] = {k: v.clone() for k, v in found.items()}
        if left:
            raise FullarcError(
                f"The optimizer state has {len(left)} tensors too many, first {sorted(left)[0]}."
            )
