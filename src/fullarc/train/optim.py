"""Muon Split: each attention head's matrix is orthogonalised on its own (GLM-5 section 2.1).

A matrix parameter is cut into blocks (heads of the query up-projection, heads of the key and of the value
part of the key-value up-projection, gate/up/down of every expert, otherwise the whole matrix). With Nesterov
momentum m over the gradient g, every block W of shape [A, B] moves by

    W <- W (1 - lr * decay) - lr * 0.2 * sqrt(max(A, B)) * NS5(mix of g and m)     (RMS 0.2, as AdamW)

where NS5 is five quintic Newton-Schulz steps towards the polar factor. Blocks of equal shape, whatever layer
they come from, go through batched calls of as many as stay in a core's cache, on `workers` threads. Embeddings,
head, norms, biases and the router use AdamW.

Invariant: the update of a block depends on that block's gradients only, so cutting equals training each head
alone, and neither batching nor threads change a bit.

Shapes: N blocks, A rows, B columns, H heads, E experts, I expert width.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fullarc.config.errors import FullarcError

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
CACHED = 2**18  # elements of the blocks of one batched call: with what is made of them they stay in the cache
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
    tall = blocks_NAB.shape[-2] > blocks_NAB.shape[-1]
    x_NAB = blocks_NAB.mT if tall else blocks_NAB
    x_NAB = x_NAB / x_NAB.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for steps in _runs(*x_NAB.shape[1:]):
        x_NAB = _several_steps(x_NAB, steps)
    return x_NAB.mT if tall else x_NAB


def newton_schulz_cost(rows: int, columns: int) -> int:
    """Multiplications of one block's update."""
    a, b = min(rows, columns), max(rows, columns)
    return sum(2 * a * a * b + (4 * steps - 3) * a**3 for steps in _runs(a, b))


def _runs(a: int, b: int) -> tuple[int, ...]:
    """Newton-Schulz steps between two multiplications by X: several where X is long enough to be worth sparing.

    Not all five: the product of their polynomials would lose small singular values to rounding, ten times more.
    """
    return (2, NS_STEPS - 2) if 2 * b > 3 * a else (1,) * NS_STEPS


def _several_steps(x_NAB: Tensor, steps: int) -> Tensor:
    """X <- p(X X^T) X, `steps` times: polynomials of the Gram matrix commute, so X is needed at the ends only."""
    a, b, c = NS_COEFFICIENTS
    gram_NAA = x_NAB @ x_NAB.mT
    product_NAA = gram_NAA
    for step in range(steps):
        poly_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        poly_NAA.diagonal(dim1=-2, dim2=-1).add_(a)
        product_NAA = poly_NAA @ product_NAA if step else poly_NAA
        if step < steps - 1:
            gram_NAA = poly_NAA @ (poly_NAA @ gram_NAA)
    return product_NAA @ x_NAB


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
    weights: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    heads: HeadShape,
    split: bool,
    lr: float,
    workers: int = 1,
) -> None:
    """Move every block of every weight by -lr * 0.2 * sqrt(max(A, B)) * NS5(its part of the direction)."""
    groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for name, weight in weights.items():
        pieces = zip(cut(name, weight, heads, split), cut(name, directions[name], heads, split), strict=True)
        for (target, (n, rows, columns)), (source, _) in pieces:
            key = (min(rows, columns), max(rows, columns))
            groups[key].extend(zip(target.chunk(n), source.chunk(n), strict=True))
    batches = []
    for (a, b), blocks in sorted(groups.items(), reverse=True):
        size = max(1, CACHED // (a * b))
        batches += [(a, b, blocks[at : at + size]) for at in range(0, len(blocks), size)]

    def move(batch: tuple[int, int, Sequence[tuple[Tensor, Tensor]]]) -> None:
        a, b, blocks = batch
        flat = [source.reshape(-1, source.shape[-1]) for _, source in blocks]
        moved = newton_schulz(torch.stack([one if len(one) == a else one.mT for one in flat]))
        updates = [
            (update if len(one) == a else update.mT).reshape(target.shape)
            for (target, _), one, update in zip(blocks, flat, moved, strict=True)
        ]
        torch._foreach_add_([target for target, _ in blocks], updates, alpha=-lr * 0.2 * b**0.5)

    if workers == 1:
        for batch in batches:
            move(batch)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(move, batches))


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

    Args:
        workers: threads that orthogonalise.

    Raises:
        FullarcError: on `step`, when a parameter that should move has no gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimSettings,
        heads: HeadShape,
        workers: int = 1,
    ) -> None:
        self.settings, self.heads, self.workers = settings, heads, workers
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
        split = self.settings.kind == "muon_split"
        add_orthogonal_(weights, directions, self.heads, split, lr, self.workers)

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

    def room(self, key: str, shape: torch.Size) -> Tensor | None:
        """Memory for a tensor of the state, of this whole shape, that is to be loaded; None for what is not of here."""
        return torch.empty(shape)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors()` gave, all of it or nothing.

        Raises:
            FullarcError: names or shapes are not those of this optimizer, whose state is as it was.
        """
        left = dict(tensors)

        def take(key: str, shape: torch.Size) -> Tensor:
            saved = left.pop(key, None)
            if saved is None or saved.shape != shape:
                has = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
                raise FullarcError(
                    f"The optimizer state does not fit: {key} {has}, expected {tuple(shape)}.",
                    "Resume with the model and the optimizer that it was saved with.",
                )
            return saved.clone()

        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        momentum = {name: take(f"momentum.{name}", shapes[name]) for name in self._muon_names}
        moments: dict[str, dict[str, Tensor]] = {}
        for name in self._adamw_names:
            if any(f"adamw.{key}.{name}" in left for key in ("step", "exp_avg", "exp_avg_sq")):
                moments[name] = {"step": take(f"adamw.step.{name}", torch.Size())}
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[name][key] = take(f"adamw.{key}.{name}", shapes[name])
        if left:
            raise FullarcError(
                f"The optimizer state has {len(left)} tensors too many, first {sorted(left)[0]}."
            )
        self.reset()
        self._momentum = momentum
        for name, state in moments.items():
            assert self._adamw is not None
            self._adamw.state[self.parameters[name]] = state
