"""llama.cpp as a side of the engine's bench: a checkpoint in its format, in the variant that is fastest for the work.

Weights are rewritten by llama.cpp's own quantiser from one converted file of fp32, so all precisions come from the same
numbers. A variant that cannot run here (an instruction that the CPU lacks, a shape) ends its process and is left out.
"""

import math
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.evals.peers import Child, environments, llamacpp, to_gguf

PRECISIONS = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_0": 2}
"""llama_ftype of each kind of file."""
MICRO = 256  # tokens of a prompt computed at once: the fastest of 64 to 2048
SPARE = 256  # tokens that a sequence may grow by
TRIALS, TRIAL_ROWS = 2, 16  # runs of a trial, of which the best counts, and its sequences at most
TRIAL_TOKENS = {"decode": 2048, "prefill": 1024}  # of all of them


@dataclass(frozen=True)
class Variant:
    """Weights, whether they are repacked for the CPU, fused attention, and the type of cached keys."""

    weights: str
    repack: bool = False
    flash: bool = True
    cache: str = "f16"

    def __str__(self) -> str:
        words = [self.weights, "repacked" if self.repack else "", "fused attention" if self.flash else ""]
        return ", ".join(filter(None, [*words, f"{self.cache} cache"]))


EXACT = Variant("f32", flash=False, cache="f32")
VARIANTS = [
    Variant("f32"),
    *(Variant(name, repack) for name in ("bf16", "q8_0", "q4_0") for repack in (False, True)),
]


class Llama:
    """The process and its files; a context manager.

    Args:
        checkpoint: a folder with a tokenizer.
        root: where environments are; llama.cpp's is made there if need be.
        out: where the files go.
        steps: decoding steps a measurement.

    Raises FullarcError if llama.cpp cannot be made or does not take the checkpoint.
    """

    def __init__(self, checkpoint: Path, root: Path, out: Path, steps: int) -> None:
        self.steps = steps
        self._found: dict[tuple[str, int, int], Variant] = {}
        source, libraries = environments.llama_cpp(root)
        self._command = [sys.executable, str(Path(llamacpp.__file__)), str(libraries)]
        self._child = self._started()
        self._files = {name: out / f"{checkpoint.name}-{name}.gguf" for name in PRECISIONS}
        done = subprocess.run(
            [sys.executable, to_gguf.__file__, str(source), str(checkpoint), str(self._files["f32"]), "f32"],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]
            raise FullarcError(f"llama.cpp's converter does not take {checkpoint}: {said}")
        for name, kind in PRECISIONS.items():
            if name != "f32":
                self._child.ask(
                    "quantize", source=str(self._files["f32"]), out=str(self._files[name]), type=kind
                )

    def fastest(self, kind: str, batch: list[list[int]]) -> Variant:
        """The variant in which a kind of work ("decode" or "prefill") takes the least time, by a trial.

        First the weights and their layout, then the attention. Work that differs only beyond the size of a trial has
        the same one.
        """
        batch = batch[:TRIAL_ROWS]
        batch = [ids[: TRIAL_TOKENS[kind] // len(batch)] for ids in batch]
        key = kind, len(batch), len(batch[0])
        if key not in self._found:
            best = min(VARIANTS, key=lambda variant: self._tried(variant, kind, batch))
            self._found[key] = min(
                best, replace(best, flash=False), key=lambda v: self._tried(v, kind, batch)
            )
        return self._found[key]

    def _tried(self, variant: Variant, kind: str, batch: list[list[int]]) -> float:
        """Seconds; infinite where it does not run."""
        try:
            self.open(variant, len(batch), len(batch[0]))
            self.start(batch)
            return min(self.decode() if kind == "decode" else self.prefill(batch) for _ in range(TRIALS))
        except FullarcError:
            return math.inf

    def open(self, variant: Variant, sequences: int, context: int) -> None:
        """Load it with room for `context` tokens and some more in every sequence."""
        if not self._child.alive:
            self._child.close()
            self._child = self._started()
        options = asdict(variant) | {"micro": MICRO}
        file = str(self._files[options.pop("weights")])
        self._child.ask("open", file=file, sequences=sequences, tokens=context + SPARE, **options)

    def start(self, batch: list[list[int]]) -> None:
        """All sequences to their first token."""
        self._child.ask("start", prompts=batch)

    def decode(self) -> float:
        """Seconds of `steps` steps of all sequences."""
        return float(self._child.ask("decode", steps=self.steps)["seconds"])

    def prefill(self, batch: list[list[int]]) -> float:
        """Seconds of one prompt to its first token."""
        return float(self._child.ask("prefill", ids=batch[0])["seconds"])

    def logits(self, ids: list[int]) -> Tensor:
        """What follows a prompt [V], without rounding anything."""
        self.open(EXACT, 1, len(ids))
        return torch.tensor(self._child.ask("logits", ids=ids)["logits"])

    def greedy(self, batch: list[list[int]], count: int) -> list[list[int]]:
        """The next tokens of every sequence, without rounding anything."""
        self.open(EXACT, len(batch), len(batch[0]))
        self.start(batch)
        rows = self._child.ask("decode", steps=count)["ids"]
        return [list(column) for column in zip(*rows, strict=True)]

    def _started(self) -> Child:
        return Child("llama.cpp", self._command, {"GGML_NO_BACKTRACE": "1"})

    def __enter__(self) -> "Llama":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close()
