"""`fullarc bench quantize CHECKPOINT`: what a quantised model loses, and how other programs do with the same bits.

    KL              mean over tokens of sum_v p(v) (log p(v) - log q(v)), p the fp32 model's next-token distribution
    perplexity      of the held-out text of the checkpoint's run, against the fp32 model's
    first choice    share of tokens at which both find the same token likeliest
    success         (`--success`) the share of agent tasks, problems and instructions that are done, greedily
    bytes, speed    of W4A8 against bf16: of the checkpoint's matrices; of decoding at batch 1, context 512, with random
                    weights of several sizes, one thread

All are computed by our engine, so what differs is only the integers and scales, or what the engine computes in (bf16,
emulated FP8). W4A16 is 4 bits for experts, one scale for 32 weights, inputs as they are. W4A8 is 4 bits for experts, 8
for attention and dense layers, 8-bit inputs by token, one scale a row. The others (`--peers FOLDER`, their environment)
get exactly this last scheme: llm-compressor's rounding to nearest and GPTQ, and auto-round; what they are calibrated on
are rows that the model was trained on. What auto-round leaves alone (the first, dense layer) is rounded to nearest.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fullarc.chat import Tokenizer
from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir
from fullarc.config.recipe import load_recipe
from fullarc.config.runfolder import RESOLVED
from fullarc.engine import Engine
from fullarc.engine.core import Chunk
from fullarc.evals import stage, stats
from fullarc.evals.bench import claim
from fullarc.evals.bench_engine_peers import STEPS, Ours, Precision, prompts, saved
from fullarc.evals.bench_train import in_turn
from fullarc.evals.peers import QUIET, compressors, environments
from fullarc.model import QuantScheme, load_config, quantize_checkpoint
from fullarc.model.compressed import KINDS, Plan, compress, kind_of, quantization_config
from fullarc.model.quant import quantize, quantize_best

SPEED, PAYS = ("2m", "5m", "20m"), ("20m",)  # sizes that decode, and those of them where integers should pay
BYTES = {"experts": 0.28, "all other quantised layers": 0.52}  # of bf16's, at most
CONTEXT, REPEATS = 512, 9
TOKENS, WINDOW = 16_384, 256  # held-out text, in windows that know nothing of each other
ROWS, ROW = 128, 256  # what the others are calibrated on


@dataclass(frozen=True)
class How:
    """A model of ours.

    Attributes:
        plan: what is quantised; None: nothing.
        search: for scales of least squared error.
        turn: rotate outliers away first.
        calibrated: let integers make up for each other's errors on rows that the model was trained on.
        dtype: what the engine computes in.
    """

    plan: Plan | None = None
    search: bool = False
    turn: bool = False
    calibrated: bool = False
    dtype: str = "fp32"

    def of(self, checkpoint: Path, out: Path) -> Path:
        """The checkpoint so, written as `out` if need be."""
        if self.plan is None:
            return checkpoint
        rows = stage.trained_rows(checkpoint, ROWS, ROW) if self.calibrated else []
        quantizer = quantize_best if self.search else quantize
        quantize_checkpoint(checkpoint, out, self.plan, True, quantizer, self.turn, rows)
        return out


def plan_of(bits: int) -> Plan:
    """The scheme with so many bits for experts, and 8 for everything else that is multiplied."""
    return {kind: QuantScheme(bits if kind == "experts" else 8, 0, True) for kind in KINDS}


OURS = {
    "bf16": How(dtype="bf16"),
    "FP8, emulated": How(dtype="fp8"),
    "W8A8": How(plan_of(8)),
    "W8A8, rotated": How(plan_of(8), turn=True),
    "W4A16": How({"experts": QuantScheme(4, 32)}),
    "W4A16, searched": How({"experts": QuantScheme(4, 32)}, search=True),
    "W4A8": How(plan_of(4)),
    "W4A8, searched": How(plan_of(4), search=True),
    "W4A8, rotated": How(plan_of(4), turn=True),
    "W4A8, searched and rotated": How(plan_of(4), search=True, turn=True),
    "W4A8, calibrated": How(plan_of(4), calibrated=True),
    "W4A8, searched, rotated and calibrated": How(plan_of(4), search=True, turn=True, calibrated=True),
}
THEIRS = {
    "W4A8 by llm-compressor, to nearest": "rtn",
    "W4A8 by llm-compressor, GPTQ": "gptq",
    "W4A8 by auto-round": "auto-round",
}
ASKED = {"problems": 64, "episodes": 16, "instructions": 24, "needles": 1, "heldout_tokens": 256}
"""Questions a family, for success; what is not asked about is kept short."""
SUCCESS = {"agent_seen": "agent", "reasoning_seen": "reasoning", "general": "general"}


def options(parser: argparse.ArgumentParser) -> None:
    """The area's own options."""
    parser.add_argument("checkpoint", type=Path, help="a trained one, in its run's folder")
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="where environments of other programs are, or are made"
    )
    parser.add_argument("--success", action="store_true", help="ask each model to do its tasks, too")


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """All claims, as they are measured."""
    torch.set_num_threads(1)
    return {"claims": _claims(chosen), "partial": not (chosen.peers and chosen.success)}


def _claims(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    checkpoint: Path = chosen.checkpoint
    windows = held_out(checkpoint)
    reference = [logprobs(engine, ids) for engine in [_engine(checkpoint, "fp32")] for ids in windows]
    asked = _success(checkpoint, checkpoint, "fp32") if chosen.success else {}
    yield from (_share(f"fp32: {name}", score, score) for name, score in asked.items())
    kl = dict[str, float]()
    with tempfile.TemporaryDirectory(prefix="fullarc-bench-") as root:
        for name in [*OURS, *(THEIRS if chosen.peers else ())]:
            folder, how = Path(root) / name.replace(" ", "-"), OURS.get(name, How())
            if name in THEIRS:
                by_others(checkpoint, folder, THEIRS[name], chosen.peers)
            else:
                folder = how.of(checkpoint, folder)
            lost = compared(_engine(folder, how.dtype), windows, reference)
            kl[name] = lost.kl
            yield from _told(name, lost)
            if chosen.success:
                now = _success(folder, checkpoint, how.dtype)
                yield from (_share(f"{name}: {key}", score, asked[key]) for key, score in now.items())
        yield from _bytes(checkpoint, Path(root))
        yield from _speed(Path(root))
    ours = min(value for name, value in kl.items() if name.startswith("W4A8") and name not in THEIRS)
    best = "W4A8: smallest KL of ours against the smallest of the others"
    if not chosen.peers:
        yield claim(best, None, "x", "<= 1", None, "needs --peers", better="lower")
        return
    theirs = min(kl[name] for name in THEIRS)
    yield claim(best, ours / theirs, "x", "<= 1", ours <= theirs, better="lower")


# --- what is lost -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lost:
    """What a model loses to the one it was made of, each with its standard error over windows of text."""

    kl: float
    kl_se: float
    perplexity: float  # relative change
    perplexity_se: float
    same: float  # share of tokens
    same_se: float


def held_out(checkpoint: Path) -> list[list[int]]:
    """Windows of the held-out text of the checkpoint's run, each after a token that begins a document.

    Raises FullarcError if the run has none.
    """
    folder = stage.heldout_of(checkpoint)
    if folder is None:
        raise FullarcError(
            f"{checkpoint} belongs to no run with held-out text.", "Give a run's stages/STAGE/checkpoint."
        )
    tok, left, windows = Tokenizer.load(checkpoint), TOKENS, list[list[int]]()
    for text in stage.heldout_texts(folder)["seen"]:
        ids = tok.encode(text)[: min(left, 4 * WINDOW)]
        left -= len(ids)
        windows += [[tok.id("<|endoftext|>"), *ids[at : at + WINDOW]] for at in range(0, len(ids), WINDOW)]
        if not left:
            break
    return windows


def _engine(folder: Path, dtype: str) -> Engine:
    return Engine(folder, 1, WINDOW + 1, prefix_tokens=0, dtype=dtype)


def logprobs(engine: Engine, ids: Sequence[int]) -> Tensor:
    """Log-probs [tokens - 1, V] of what follows each token of a sequence but its last."""
    core = engine.scheduler.core
    hidden = core.forward([Chunk(0, 0, list(ids[:-1]))])
    return core.logits(hidden, list(range(len(ids) - 1))).float().log_softmax(-1)


def compared(engine: Engine, windows: Sequence[Sequence[int]], reference: Sequence[Tensor]) -> Lost:
    """What the model of `engine` loses against the reference's log-probs of the same windows."""
    sums = np.zeros((len(windows), 3))
    for number, (ids, p) in enumerate(zip(windows, reference, strict=True)):
        q, next_ids = logprobs(engine, ids), torch.tensor(ids[1:])[:, None]
        sums[number] = (
            float((p.double().exp() * (p.double() - q.double())).sum()),
            float((p.gather(1, next_ids) - q.gather(1, next_ids)).double().sum()),
            float((p.argmax(1) == q.argmax(1)).sum()),
        )
    counts = [float(len(ids) - 1) for ids in windows]
    kl, nll, same = (float(sums[:, at].sum()) / sum(counts) for at in range(3))
    kl_se, nll_se, same_se = (stats.ratio_error(sums[:, at].tolist(), counts) for at in range(3))
    return Lost(kl, kl_se, math.expm1(nll), math.exp(nll) * nll_se, same, same_se)


def _told(name: str, lost: Lost) -> Iterator[dict[str, Any]]:
    percent, within = 100 * lost.perplexity, name.startswith("W4A8") and name not in THEIRS
    yield claim(f"{name}: KL from fp32", 1000 * lost.kl, "1e-3 nats", "", None, f"± {1000 * lost.kl_se:.2f}",
                better="lower")  # fmt: skip
    yield claim(f"{name}: perplexity", percent, "%", "<= 1" if within else "", percent <= 1 if within else None,
                f"± {100 * lost.perplexity_se:.2f}", better="lower")  # fmt: skip
    yield claim(f"{name}: same first choice", 100 * lost.same, "%", "", None, f"± {100 * lost.same_se:.1f}")


# --- what it is for ---------------------------------------------------------------------------------------------


def _bytes(checkpoint: Path, root: Path) -> Iterator[dict[str, Any]]:
    reports = quantize_checkpoint(checkpoint, root / "packed", plan_of(4))
    for name, most in BYTES.items():
        parts = [report for report in reports if (report.kind == "experts") == (name == "experts")]
        share = sum(r.bytes_after for r in parts) / sum(r.bytes_after / r.ratio for r in parts)
        yield claim(
            f"W4A8: bytes of {name} against bf16", share, "x", f"<= {most}", share <= most, better="lower"
        )


def _speed(root: Path) -> Iterator[dict[str, Any]]:
    for size in SPEED:
        folder = saved(size, root)
        sides = [
            Ours(folder, 1, CONTEXT, precision) for precision in (Precision("bf16"), Precision(experts=4))
        ]
        for side in sides:
            side.start(prompts(1, CONTEXT, load_config(folder).vocab_size))
        bf16, integers = in_turn([side.decode for side in sides], REPEATS)
        ratio, target = bf16 / integers, size in PAYS
        yield claim(f"W4A8: decoding of {size} at batch 1 against bf16", ratio, "x", ">= 1" if target else "",
                    ratio >= 1 if target else None, f"{1000 * integers / STEPS:.2f} ms a token")  # fmt: skip


# --- what is still done -----------------------------------------------------------------------------------------


def _success(folder: Path, checkpoint: Path, dtype: str) -> dict[str, Any]:
    """Scores of the tasks of the run that `checkpoint` belongs to, by a model made of it, computed in `dtype`."""
    recipe = load_recipe(stage.run_of(checkpoint) / RESOLVED, []).recipe
    settings = recipe.eval.model_copy(update=ASKED | {"needle_lengths": [], "dtype": dtype})
    job = stage.Job(
        folder.name,
        folder,
        settings,
        recipe.sandbox,
        stage.heldout_of(checkpoint),
        True,
        recipe.tasks.families,
    )
    with tempfile.TemporaryDirectory(prefix="fullarc-bench-") as out:
        scores = stage.evaluate(job, Path(out)).scores
    return {name: scores[key] for key, name in SUCCESS.items() if key in scores}


def _share(name: str, score: Any, before: Any) -> dict[str, Any]:
    told = claim(name, 100 * score.value, "%", "", None, f"± {100 * score.se:.1f}, n = {score.n}")
    return told | {"baseline": round(100 * before.value, 3)}


# --- other programs ---------------------------------------------------------------------------------------------


def by_others(checkpoint: Path, out: Path, method: str, peers: Path) -> None:
    """The checkpoint quantised by another program, as a checkpoint of ours; its MTP layer is left out.

    Raises FullarcError if the program fails.
    """
    python, plan = environments.python_of("compressors", peers), plan_of(4)
    with tempfile.TemporaryDirectory(prefix="fullarc-bench-") as temporary:
        made, scheme, rows = (Path(temporary) / name for name in ("made", "scheme.json", "rows.json"))
        scheme.write_text(json.dumps(quantization_config(plan)))
        rows.write_text(json.dumps(stage.trained_rows(checkpoint, ROWS, ROW)))
        command = [python, compressors.__file__, checkpoint, made, method, scheme, rows]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace",
                              env=os.environ | QUIET, check=False)  # fmt: skip
        if done.returncode:
            raise FullarcError(f"{method} failed: {done.stderr.strip().rpartition(chr(10))[2]}")
        adopt(made, checkpoint, out, plan)


def adopt(made: Path, checkpoint: Path, out: Path, plan: Plan) -> None:
    """What another program made of `checkpoint` by `plan`, written as the checkpoint `out` without an MTP layer.

    Matrices of the plan that it left alone are rounded to nearest; all else is the original's, so that only integers
    and scales are theirs.
    """
    theirs, original = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (made, checkpoint)
    )
    config = json.loads((checkpoint / "config.json").read_text())
    trunk = {name for name in original if not name.startswith(f"model.layers.{config['num_hidden_layers']}.")}
    tensors = {
        name: tensor for name, tensor in theirs.items() if name not in original or tensor.dtype == torch.int8
    }
    left = {name: original[name] for name in trunk - tensors.keys() if f"{name}_packed" not in tensors}
    kinds = {kind for name in left if (kind := kind_of(name))}
    left, _ = compress(left, {kind: plan[kind] for kind in kinds}, wide=True)
    with atomic_dir(out) as temporary:
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != "manifest.json" and ".safetensors" not in file.name:
                shutil.copyfile(file, temporary / file.name)
        content = config | {
            "num_nextn_predict_layers": 0,
            "quantization_config": quantization_config(plan, wide=True),
        }
        (temporary / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        save_file(tensors | left, temporary / "model.safetensors", metadata={"format": "pt"})
