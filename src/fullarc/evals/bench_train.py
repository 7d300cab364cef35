"""`fullarc bench train`: is a training step faster than what one would write instead, and where does its time go?

The other side is a plain loop over transformers' implementation of the same network with AdamW, on the same weights'
shapes, batch and precision (fp32). Both are measured in turn in one process, each in the way that suits it on the
machine's cores: ours as passes side by side with one torch thread each, theirs as one pass with all threads. The step
is also shared by PROCESSES processes and held against one thread of one. Medians of REPEATS; the claims are ratios,
because seconds drift. What each product of a step takes when it is computed alone, out of the cache's way and with
nothing between, is the bound that a step is held against.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fullarc.config.errors import FullarcError
from fullarc.config.machine import machine
from fullarc.config.model import ModelConfig, preset
from fullarc.evals.bench import claim
from fullarc.model import GlmMoeDsa
from fullarc.train import Batch, LmLoss, OptimSettings, Trainer, trained
from fullarc.train.parallel import ALONE, Ranks, launch

SIZES = ("1m", "2m", "5m", "20m")
CLAIMED = ("1m", "5m", "20m")  # what is measured where no size is named
PARTS = ("peers", "products", "processes", "optimizer")
REPEATS = 5
ROWS, LENGTH = 8, 512
LARGE_BATCH = 16  # rows: 8k tokens
PROCESSES = 2
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("mm", "bmm", "baddbmm", "addmm", "addmm_", "_grouped_mm", _FLASH, f"{_FLASH}_backward")


def transformers_config(config: ModelConfig) -> Any:
    """The same network in transformers' words."""
    try:
        from transformers import GlmMoeDsaConfig
    except ImportError as error:
        raise FullarcError(
            f"The other side of this bench needs transformers ({error}).", "Install it with: make setup"
        ) from None
    ours_only = ("architectures", "latent_norm_eps", "dtype")
    return GlmMoeDsaConfig(**{key: value for key, value in config.to_hf().items() if key not in ours_only})


def batch(config: ModelConfig, rows: int, length: int) -> Batch:
    """Random tokens, every one a target."""
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    return Batch(ids, ones.bool(), ones, torch.zeros_like(ids), False)


@dataclass
class Ours:
    """A trainer and its batch; `step()` is one update."""

    config: ModelConfig
    rows: int
    workers: int
    length: int = field(default_factory=lambda: LENGTH)
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        model = GlmMoeDsa(self.config).init_weights(0)
        settings, chosen = OptimSettings(kind="muon_split"), trained(indexer=False, mtp=False)
        self.trainer = Trainer(model, settings, lambda _: 1e-4, chosen, 1e-3, self.workers, self.ranks)
        self.batch, self.loss = batch(self.config, self.rows, self.length), LmLoss(mtp_steps=0)

    def step(self) -> None:
        """One update."""
        torch.set_num_threads(1)
        micro = max(1, self.rows // max(2, self.workers, self.ranks.size))
        self.trainer.step(self.batch.split(micro), self.loss)


@dataclass
class Theirs:
    """The plain loop: transformers' model, its own loss, AdamW."""

    config: ModelConfig
    rows: int
    threads: int
    length: int = field(default_factory=lambda: LENGTH)

    def __post_init__(self) -> None:
        theirs = transformers_config(self.config)
        from transformers import GlmMoeDsaForCausalLM

        theirs.use_cache = False
        self.model = GlmMoeDsaForCausalLM(theirs).float().train()
        self.ids = batch(self.config, self.rows, self.length).ids_BT
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self) -> None:
        """One update."""
        torch.set_num_threads(self.threads)
        self.optimizer.zero_grad()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()


def in_turn(sides: Sequence[Callable[[], Any]], repeats: int, warm: bool = True) -> list[float]:
    """Median seconds of each side, measured in turn, with `warm` after one round that does not count.

    A side that returns a float has measured itself, in seconds.
    """
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + warm):
        for side, taken in zip(sides, times, strict=True):
            began = time.perf_counter()
            told = side()
            if turn >= warm:
                taken.append(told if isinstance(told, float) else time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]


class Products(TorchDispatchMode):
    """Counts the matrix products that run under it (attention is two), by operation and operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            named = tuple((name, _described(value)) for name, value in (kwargs or {}).items())
            self.seen[(func, tuple(map(_described, args)), named)] += 1
        return out

    def seconds_alone(self, repeats: int) -> float:
        """What all of them take, each measured by itself on operands of the same layout."""
        total = 0.0
        for (func, args, kwargs), count in self.seen.items():
            operands, options = [_made(one) for one in args], {name: _made(value) for name, value in kwargs}
            (median,) = in_turn([lambda f=func, a=operands, k=options: f(*a, **k)], repeats)  # type: ignore[misc]
            total += median * count
        return total


def _described(arg: Any) -> Any:
    """A tensor's layout (and the values of one that says where groups end); anything else as it is."""
    if not isinstance(arg, Tensor):
        return arg
    return Tensor, arg.shape, arg.stride(), arg.dtype, tuple(arg.tolist()) if arg.dtype == torch.int32 else ()


def _made(described: Any) -> Any:
    if not (isinstance(described, tuple) and described[:1] == (Tensor,)):
        return described
    _, shape, stride, dtype, values = described
    made = torch.empty_strided(shape, stride, dtype=dtype)
    if values:
        return made.copy_(torch.tensor(values, dtype=dtype))
    return made.normal_() if dtype.is_floating_point else made.fill_(1)


def options(parser: argparse.ArgumentParser) -> None:
    """The area's own options."""
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument("--size", action="append", choices=SIZES, help="only this one; may be repeated")


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The area's result, claim by claim."""
    sizes, parts = chosen.size or CLAIMED, chosen.part or PARTS
    return {"claims": claims(sizes, parts), "partial": bool(chosen.part) or set(sizes) != set(SIZES)}


def claims(
    sizes: Sequence[str] = CLAIMED, parts: Sequence[str] = PARTS, repeats: int = REPEATS
) -> Iterator[dict[str, Any]]:
    """The claims of these sizes and parts."""
    for size in sizes:
        config = preset(size)
        alone = Alone(config, repeats)
        if "peers" in parts:
            yield peers(config, size, alone, repeats)
        if "products" in parts:
            share = 100 * alone.products / alone.step
            yield claim(
                f"training step, {size}: share of the time that its products take alone", share, "%", ">= 60",
                share >= 60, f"{alone.counted} products, one thread", gated=True,
            )  # fmt: skip
        if "processes" in parts:
            shared = max(launch(_seconds_of_a_rank, PROCESSES, config, ROWS, LENGTH, repeats))
            yield claim(
                f"training step, {size}: {PROCESSES} processes against one", alone.step / shared, "x", ">= 1.6",
                alone.step / shared >= 1.6, f"{alone.step:.2f} against {shared:.2f} s, one thread each",
            )  # fmt: skip
        if "optimizer" in parts:
            yield optimizer(config, size, repeats)


class Alone:
    """A step in one thread of one process, measured when it is asked for."""

    def __init__(self, config: ModelConfig, repeats: int) -> None:
        self.config, self.repeats = config, repeats

    @cached_property
    def _measured(self) -> tuple[float, float, int]:
        side = Ours(self.config, ROWS, 1)
        with Products() as products:
            side.step()
        (step,) = in_turn([side.step], self.repeats)
        return step, products.seconds_alone(self.repeats), sum(products.seen.values())

    @property
    def step(self) -> float:
        """Seconds."""
        return self._measured[0]

    @property
    def products(self) -> float:
        """Seconds that its products take when each is computed by itself."""
        return self._measured[1]

    @property
    def counted(self) -> int:
        """How many products it has."""
        return self._measured[2]


def peers(config: ModelConfig, size: str, alone: Alone, repeats: int) -> dict[str, Any]:
    """The plain loop, and what the ratio would be if a step of ours were nothing but its products on all cores."""
    cores, tokens = machine()["cores"], ROWS * LENGTH
    ours, theirs = Ours(config, ROWS, cores), Theirs(config, ROWS, cores)
    mine, plain = in_turn([ours.step, theirs.step], repeats)
    del ours, theirs
    bound = plain / (alone.products / cores)
    return claim(
        f"training step, {size}: tokens/s against transformers + AdamW", plain / mine, "x", ">= 3", plain / mine >= 3,
        f"{tokens / mine:,.0f} against {tokens / plain:,.0f} tokens/s; {bound:.1f} x if it were products alone",
    )  # fmt: skip


def _seconds_of_a_rank(ranks: Ranks, config: ModelConfig, rows: int, length: int, repeats: int) -> float:
    """Median seconds of a step that the ranks share."""
    return in_turn([Ours(config, rows, 1, length, ranks).step], repeats)[0]


def optimizer(config: ModelConfig, size: str, repeats: int) -> dict[str, Any]:
    """Its share of a step of many tokens."""
    side = Ours(config, LARGE_BATCH, 1)
    whole, update = list[float](), list[float]()
    step = side.trainer.optimizer.step

    def timed(lr: float) -> None:
        began = time.perf_counter()
        step(lr)
        update.append(time.perf_counter() - began)

    side.trainer.optimizer.step = timed  # type: ignore[method-assign]
    for _ in range(repeats + 1):
        began = time.perf_counter()
        side.step()
        whole.append(time.perf_counter() - began)
    share = 100 * statistics.median(update[1:]) / statistics.median(whole[1:])
    tokens = LARGE_BATCH * side.length
    return claim(
        f"optimizer's share of a step of {tokens:,} tokens, {size}", share, "%", "< 15", share < 15, "one thread",
        better="lower",
    )  # fmt: skip
