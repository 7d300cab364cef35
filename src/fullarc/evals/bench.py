"""`fullarc bench AREA`: measured claims with their baselines, targets, seeds and machine.

fullarc bench arc [--seeds 0,1,2] [--from-runs DIR… [--thorough]] [--recipe FILE] [--json] [--save]
fullarc bench train|dsa [--json] [--save]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fullarc.config.errors import UsageError
from fullarc.config.files import atomic_write

AREAS = {
    "arc": "the whole laptop recipe, raw text to agent",
    "train": "a training step against transformers, and where its time goes",
    "dsa": "sparse against dense attention, by length",
}
BASELINES = Path("bench/baselines")


def run(
    area: str,
    seeds: Sequence[int] = (),
    from_runs: Sequence[Path] = (),
    recipe: Path | None = None,
    runs_dir: Path = Path("runs/bench"),
    thorough: bool = False,
) -> dict[str, Any]:
    """Measure an area: {"machine", "claims": [{"name", "value", "unit", "baseline", "target", "seeds", "ok", …}]}.

    Args:
        seeds: one fresh run each; 0 alone if none is given.
        from_runs: finished run folders to read instead of running anything.
        thorough: ask their checkpoints more questions than their run did, as fresh runs always are.
    """
    if area not in AREAS:
        raise UsageError(f"There is no bench '{area}'.", f"Areas: {', '.join(AREAS)}.")
    if area != "arc":
        if seeds or from_runs or recipe or thorough:
            raise UsageError(
                f"bench {area} has no runs: it takes no seeds, runs or recipe.", "Leave them out."
            )
        from fullarc.config.machine import machine
        from fullarc.evals import bench_dsa, bench_train

        claims = bench_train.claims() if area == "train" else bench_dsa.claims()
        return {"area": area, "machine": machine(), "claims": claims}
    from fullarc.evals import bench_arc

    folders = list(from_runs) or [
        bench_arc.run_recipe(seed, runs_dir, recipe or bench_arc.RECIPE) for seed in seeds or (0,)
    ]
    if thorough or not from_runs:
        for folder in folders:
            bench_arc.examine(Path(folder))
    runs = [bench_arc.read_run(Path(folder)) for folder in folders]
    return {"area": area, "machine": runs[0].machine, "claims": bench_arc.judge(runs, _baseline(area))}


def save(result: dict[str, Any], folder: Path = BASELINES) -> Path:
    """Keep a result as the baseline of its area; returns the file."""
    path = folder / f"{result['area']}.json"
    atomic_write(path, json.dumps(result, indent=1) + "\n")
    return path


def _baseline(area: str) -> dict[str, Any] | None:
    try:
        found = json.loads((BASELINES / f"{area}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def table(result: dict[str, Any]) -> str:
    """The claims as text for a terminal."""
    rows = [("", "claim", "value", "baseline", "target", "spread", "seeds")]
    for claim in result["claims"]:
        mark = {True: "ok", False: "MISS", None: "?"}[claim["ok"]]
        told = claim["spread"]
        between = f"{told['min']:g} to {told['max']:g}" if told and told["n"] > 1 else "–"
        value = "not measured" if claim["value"] is None else f"{claim['value']:g} {claim['unit']}"
        baseline = "–" if claim["baseline"] is None else f"{claim['baseline']:g}"
        detail = f" ({', '.join(dict.fromkeys(claim['detail']))})" if claim.get("detail") else ""
        rows.append(
            (
                mark,
                claim["name"] + detail,
                value,
                baseline,
                claim["target"],
                between,
                str(len(claim["seeds"])),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    host = result["machine"]
    where = f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, torch {host['torch']}"
    return "\n".join([f"{result['area']}: {AREAS[result['area']]}", f"on {where}", "", *lines])


def main(argv: Sequence[str]) -> int:
    """The verb. Exit code 1 if a claim was measured and missed."""
    parser = argparse.ArgumentParser(
        prog="fullarc bench", description="Measure claims against their baselines."
    )
    parser.add_argument("area", nargs="?", default="", metavar="AREA", help=f"one of: {', '.join(AREAS)}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", default="", metavar="0,1,2", help="one run each; default 0")
    parser.add_argument(
        "--from-runs", nargs="+", type=Path, default=[], metavar="DIR", help="read these instead of running"
    )
    parser.add_argument("--thorough", action="store_true", help="ask their checkpoints more questions first")
    parser.add_argument("--recipe", type=Path, help="another recipe than recipes/laptop.toml")
    parser.add_argument("--save", action="store_true", help=f"keep the result in {BASELINES}/")
    arguments = parser.parse_args(argv)
    if not arguments.area:
        print(
            json.dumps(sorted(AREAS)) if arguments.json else "\n".join(f"{k}  {v}" for k, v in AREAS.items())
        )
        return 0
    try:
        seeds = [int(part) for part in arguments.seeds.split(",") if arguments.seeds]
    except ValueError:
        raise UsageError(
            f"--seeds {arguments.seeds} is not a list of whole numbers.", "Write --seeds 0,1,2."
        ) from None
    result = run(arguments.area, seeds, arguments.from_runs, arguments.recipe, thorough=arguments.thorough)
    print(json.dumps(result, indent=1) if arguments.json else table(result))
    if arguments.save:
        print(f"saved as {save(result)}", file=sys.stderr)
    return 1 if any(claim["ok"] is False for claim in result["claims"]) else 0
