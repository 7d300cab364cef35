"""`fullarc bench arc`: does the laptop recipe keep its promises, and on how many seeds?

Runs the recipe in a fresh folder per seed, watching time and memory from outside, then reads claims off the run
folders. A claim holds only if it holds for every seed; the printed value is the mean, with the spread beside it.
A run asks each of its checkpoints few questions, to be short; the bench asks them again with more (`examine`), outside
the time that is measured, because a claim of 3 points cannot be judged by 15 questions. Everything but memory can be
read again from a run folder later (`--from-runs`); memory is kept in its bench.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fullarc.config.errors import FullarcError, UsageError
from fullarc.config.files import MANIFEST, atomic_write, read_jsonl, sha256
from fullarc.config.runfolder import RESOLVED, digest
from fullarc.evals.scores import COLUMNS, NEEDLE, Scores, column
from fullarc.evals.stats import spread

RECIPE = Path("recipes/laptop.toml")
POLL_S = 0.25
THOROUGH = {"heldout_tokens": 16_384, "problems": 64, "instructions": 24, "episodes": 16, "needles": 20}
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Run:
    """A finished run folder, read once. `scores` and `kinds` are by stage name, in the order of the arc."""

    folder: Path
    seed: int
    scores: dict[str, Scores]
    kinds: dict[str, str]
    seconds: float | None
    first_curve_s: float | None
    peak_bytes: int | None
    machine: dict[str, Any]

    def of(self, kind: str) -> Scores | None:
        """Scores after the last stage of a type."""
        return next((s for name, s in reversed(self.scores.items()) if self.kinds.get(name) == kind), None)

    def before(self, kind: str) -> Scores | None:
        """Scores of the stage just before the first one of a type."""
        previous = None
        for name, scores in self.scores.items():
            if self.kinds.get(name) == kind:
                return previous
            previous = scores
        return None


@dataclass(frozen=True)
class Claim:
    """A promise: `measure(run)` gives (value, baseline), None where the run does not tell; `holds` judges them."""

    name: str
    unit: str
    target: str
    measure: Callable[[Run], tuple[float | None, float | None]]
    holds: Callable[[float, float | None], bool]
    note: str = field(default="")


def _score(scores: Scores | None, key: str, factor: float = 1.0) -> float | None:
    return scores.scores[key].value * factor if scores and key in scores.scores else None


def _longest(run: Run) -> str:
    keys = {key for scores in run.scores.values() for key in scores.scores if key.startswith(NEEDLE)}
    return max(keys, key=lambda key: int(key.removeprefix(NEEDLE)), default=f"{NEEDLE}0")


def _needle_gain(run: Run) -> tuple[float | None, float | None]:
    key = _longest(run)
    return _score(run.of("midtrain"), key, 100), _score(run.of("pretrain"), key, 100)


def _sparse_needle(run: Run) -> tuple[float | None, float | None]:
    key = _longest(run)
    return _score(run.of("dsa"), key, 100), _score(run.before("dsa"), key, 100)


def _bpb(run: Run) -> tuple[float | None, float | None]:
    after = run.of("pretrain")
    return _score(after, "bpb_seen"), after.references.get("bpb_uniform") if after else None


def _pair(
    kind: str, key: str, before: str = "", factor: float = 1.0
) -> Callable[[Run], tuple[float | None, float | None]]:
    """(score after a stage type, score after `before`, or after the stage before it)."""

    def measure(run: Run) -> tuple[float | None, float | None]:
        earlier = run.of(before) if before else run.before(kind)
        return _score(run.of(kind), key, factor), _score(earlier, key, factor)

    return measure


def shortfall(run: Run) -> tuple[float, str] | None:
    """How many points the distilled model is below the best earlier stage, on its worst column, and which one."""
    last = run.of("distil")
    if last is None or len(run.scores) < 2:
        return None
    gaps = []
    for key, score in last.scores.items():
        about = column(key)
        if about.unit == "share" and about.better != "none":
            sign = 1 if about.better == "higher" else -1
            best = max(sign * s.scores[key].value for s in run.scores.values() if key in s.scores)
            gaps.append((100 * (best - sign * score.value), key))
    return max(gaps) if gaps else None


def _shortfall(run: Run) -> tuple[float | None, float | None]:
    worst = shortfall(run)
    return (worst[0] if worst else None), 0.0


def _at_most(limit: float) -> Callable[[float, float | None], bool]:
    return lambda value, baseline: value <= limit


def _gains(points: float) -> Callable[[float, float | None], bool]:
    return lambda value, baseline: baseline is not None and value - baseline >= points


def _keeps(points: float) -> Callable[[float, float | None], bool]:
    """At most `points` below a baseline that is above 0: nothing is not kept by having nothing."""
    return lambda value, baseline: baseline is not None and baseline > 0 and value - baseline >= -points


CLAIMS = (
    Claim(
        "the demo's wall time",
        "min",
        "<= 15",
        lambda run: (run.seconds / 60 if run.seconds else None, None),
        _at_most(15),
    ),
    Claim(
        "peak memory of the process tree",
        "GB",
        "<= 6",
        lambda run: (run.peak_bytes / 1e9 if run.peak_bytes else None, None),
        _at_most(6),
    ),
    Claim("time until the first curve", "s", "<= 60", lambda run: (run.first_curve_s, None), _at_most(60)),
    Claim(
        "held-out text after pre-training",
        "bits/byte",
        "< 0.75 x baseline (uniform over the vocabulary)",
        _bpb,
        lambda value, baseline: baseline is not None and value < 0.75 * baseline,
    ),
    Claim(
        "needle recall at the new length after mid-training",
        "%",
        ">= baseline (pre-training) + 20",
        _needle_gain,
        _gains(20),
    ),
    Claim(
        "held-out text, sparse attention",
        "bits/byte",
        "<= 1.02 x baseline (dense)",
        _pair("dsa", "bpb_seen"),
        lambda value, baseline: baseline is not None and value <= 1.02 * baseline,
    ),
    Claim(
        "needle recall, sparse attention", "%", ">= baseline (dense, above 0) - 5", _sparse_needle, _keeps(5)
    ),
    Claim(
        "format errors after SFT",
        "%",
        "< 2",
        _pair("sft", "format_errors", factor=100),
        lambda value, baseline: value < 2,
    ),
    Claim(
        "reasoning pass@1 after reasoning RL",
        "%",
        ">= baseline (SFT) + 20",
        _pair("reasoning_rl", "reasoning_seen", "sft", 100),
        _gains(20),
    ),
    Claim(
        "agent success after agentic RL",
        "%",
        ">= baseline (the stage before) + 20",
        _pair("agentic_rl", "agent_seen", factor=100),
        _gains(20),
    ),
    Claim(
        "agent success after agentic RL, absolute",
        "%",
        ">= 60",
        _pair("agentic_rl", "agent_seen", factor=100),
        lambda value, baseline: value >= 60,
    ),
    Claim(
        "distilled model below the best stage, worst share column", "points", "<= 3", _shortfall, _at_most(3)
    ),
)


def judge(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The claims over all runs."""
    out = []
    for claim in CLAIMS:
        told = [(run.seed, *claim.measure(run)) for run in runs]
        known = [(seed, value, baseline) for seed, value, baseline in told if value is not None]
        values = [value for _, value, _ in known]
        own = [baseline for _, _, baseline in known if baseline is not None]
        entry: dict[str, Any] = {
            "name": claim.name,
            "unit": claim.unit,
            "target": claim.target,
            "value": round(statistics.fmean(values), 3) if values else None,
            "baseline": round(statistics.fmean(own), 3) if own else None,
            "seeds": [seed for seed, _, _ in known],
            "spread": {key: round(number, 3) for key, number in spread(values).items()} if values else None,
            "ok": all(claim.holds(value, baseline) for _, value, baseline in known) if known else None,
        }
        if claim.measure is _shortfall:
            worst = [shortfall(run) for run in runs]
            entry["detail"] = [column(found[1]).title for found in worst if found]
        out.append(entry)
    return out


def read_run(folder: Path) -> Run:
    """Read a run folder; FullarcError if it is not one."""
    from fullarc.view.collect import collect

    report = collect(folder)
    scores: dict[str, Scores] = {}
    for stage in report["stages"]:
        own = folder / "stages" / stage["name"] / "eval"
        asked = [place for place in (_thorough(folder, stage["name"]), own) if place]
        path = next((p for p in (place / "scores.json" for place in asked) if p.exists()), None)
        if path:
            scores[stage["name"]] = Scores.load(path)
    kinds = {stage["name"]: stage["type"] for stage in report["stages"]}
    events = read_jsonl(folder / "events.jsonl")
    starts = [event["time"] for event in events if event.get("kind") == "run_start"]
    ends = [event["time"] for event in events if event.get("kind") == "run_end"]
    curve = [
        row["time"] for row in read_jsonl(folder / "metrics.jsonl") if row.get("stage") not in (None, "data")
    ]
    resumed = any(event.get("kind") == "run_resume" for event in events)
    whole = ends[-1] - starts[0] if starts and ends and not resumed else None
    try:
        peak = int(json.loads((folder / "bench.json").read_text())["peak_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        peak = None
    return Run(
        folder,
        int(report["run"]["seed"] or 0),
        scores,
        kinds,
        whole,
        min(curve) - starts[0] if curve and starts else None,
        peak,
        report["machine"],
    )


def examine(folder: Path) -> None:
    """Ask every checkpoint of a finished run as many questions as THOROUGH says; see `_thorough` for where it is kept.

    What is there already is not asked again. The first questions are those of the run's own evaluation.
    """
    from fullarc.config.recipe import load_recipe
    from fullarc.evals.stage import evaluate, job_of

    recipe = load_recipe(folder / RESOLVED).recipe
    for name in recipe.stages:
        out = _thorough(folder, name)
        if out and not (out / "scores.json").exists():
            job = job_of(recipe, name, folder / "stages" / name / "checkpoint")
            evaluate(replace(job, settings=recipe.eval.model_copy(update=THOROUGH)), out)


def _thorough(folder: Path, stage: str) -> Path | None:
    """Where the thorough scores of a stage's present checkpoint are or belong; None when there is no checkpoint.

    The name holds what was asked of what, so that a stage that is run again is never judged by its former scores.
    """
    try:
        weights = sha256(folder / "stages" / stage / "checkpoint" / MANIFEST)
    except OSError:
        return None
    return folder / "bench" / f"{stage}-{digest(weights, THOROUGH)[:12]}"


def run_recipe(seed: int, runs_dir: Path, recipe: Path = RECIPE) -> Path:
    """Run the recipe with `seed` in a fresh folder below `runs_dir`, watching its memory; returns the run folder.

    Raises FullarcError when the run fails; its output is in <folder>.log.
    """
    name = f"arc-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, log = runs_dir / name, runs_dir / f"{name}.log"
    runs_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fullarc.cli", "run", str(recipe), "--name", name]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--set", f"seed={seed}", "--set", f"runs_dir={json.dumps(str(runs_dir))}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, tree_bytes(process.pid))
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise FullarcError(f"The run with seed {seed} ended with code {process.returncode}.", f"See {log}.")
    atomic_write(folder / "bench.json", json.dumps({"peak_bytes": peak, "poll_s": POLL_S}))
    return folder


def tree_bytes(root: int) -> int:
    """Resident memory of a process and all its descendants in bytes; pages they share count more than once."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            parents[int(entry.name)], resident[int(entry.name)] = int(fields[1]), int(fields[21]) * PAGE
    return sum(resident[pid] for pid in _descendants(root, parents) if pid in resident)


def _descendants(root: int, parents: dict[int, int]) -> Iterable[int]:
    family = {root}
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        grown = bool(more)
        family |= more
    return family


def options(parser: argparse.ArgumentParser) -> None:
    """The area's own options."""
    parser.add_argument("--seeds", default="", metavar="0,1,2", help="one run each; default 0")
    parser.add_argument(
        "--from-runs", nargs="+", type=Path, default=[], metavar="DIR", help="read these instead of running"
    )
    parser.add_argument("--thorough", action="store_true", help="ask their checkpoints more questions first")
    parser.add_argument("--recipe", type=Path, help="another recipe than recipes/laptop.toml")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/bench"), help="where fresh runs go")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the recipe, or read runs, and judge them."""
    try:
        seeds = [int(part) for part in arguments.seeds.split(",") if arguments.seeds]
    except ValueError:
        raise UsageError(
            f"--seeds {arguments.seeds} is not a list of whole numbers.", "Write --seeds 0,1,2."
        ) from None
    folders = list(arguments.from_runs) or [
        run_recipe(seed, arguments.runs_dir, arguments.recipe or RECIPE) for seed in seeds or (0,)
    ]
    if arguments.thorough or not arguments.from_runs:
        for folder in folders:
            examine(folder)
    runs = [read_run(folder) for folder in folders]
    return {"machine": runs[0].machine, "claims": judge(runs)}


__all__ = [
    "CLAIMS",
    "COLUMNS",
    "Claim",
    "Run",
    "examine",
    "judge",
    "read_run",
    "run_recipe",
    "shortfall",
    "tree_bytes",
]
