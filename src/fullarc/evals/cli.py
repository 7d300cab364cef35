"""`fullarc eval MODEL`: score one checkpoint on every bench."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fullarc.config.recipe import load_recipe
from fullarc.config.runfolder import RESOLVED
from fullarc.evals.scores import column, order


def main(argv: Sequence[str]) -> int:
    """The verb."""
    parser = argparse.ArgumentParser(prog="fullarc eval", description="Score a checkpoint on every bench.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="e.g. eval.problems=64 eval.temperature=1.0"
    )
    parser.add_argument(
        "--recipe", type=Path, help="take the families and the settings from this file; default: its run's"
    )
    parser.add_argument(
        "--heldout", type=Path, metavar="DIR", help="held-out documents; default: those of its run"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep scores.json and trajectories.jsonl here"
    )
    parser.add_argument("--base", action="store_true", help="the model has not learnt to chat: ask it less")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    from fullarc.evals.stage import Job, evaluate, heldout_of, run_of

    own = run_of(arguments.model) / RESOLVED
    source = arguments.recipe or (own if own.is_file() else None)
    recipe = load_recipe(source, arguments.overrides).recipe
    heldout = arguments.heldout or heldout_of(arguments.model)
    job = Job(
        arguments.model.name, arguments.model, recipe.eval, recipe.sandbox, heldout, not arguments.base,
        recipe.tasks.families,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        scores = evaluate(job, arguments.out or Path(temporary))
    if arguments.json:
        print(json.dumps(scores.to_json(), indent=1))
        return 0
    for key in sorted(scores.scores, key=order):
        about, score = column(key), scores.scores[key]
        factor, unit = (100, "%") if about.unit == "share" else (1, about.unit)
        print(
            f"{about.title:16} {factor * score.value:9.3f} ± {factor * score.se:.3f} {unit} (n = {score.n})"
        )
    for bench, reason in scores.skipped.items():
        print(f"{bench:16} skipped: {reason}")
    return 0
