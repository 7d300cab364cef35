"""`fullarc bench paper --table N`: the paper's ablations in miniature, beside the paper's own rows.

Trains every variant of a table from the same seeds on the same data, prints mean and spread, and says of each ordering
that the paper reports whether it reproduces at this size. A finished (variant, seed) is a file below `runs/bench/paper`
and is never trained again; Ctrl-C loses the training in progress and nothing else.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fullarc.config.errors import UsageError
from fullarc.evals import bench
from fullarc.evals.paper_tables import Metric, Table, judge, tables
from fullarc.evals.stats import spread

NUMBERS = (1, 2, 3, 4, 6)
SEEDS = (1, 2, 3)
RUNS = Path("runs/bench/paper")
WIDTH = 100


def run(
    numbers: Sequence[int], seeds: Sequence[int], lab: Any, only_finished: bool = False
) -> dict[str, Any]:
    """Train what is missing for the tables and judge them.

    Args:
        lab: a `paper_runs.Lab`.
        only_finished: train nothing, take the results that are there.

    Returns:
        {"scale", "seeds", "tables": {number: {"title", "variants", "claims"}}, "claims"}; each variant has its metrics
        by seed and what else its result says. The last has the claims of all tables as `fullarc bench` prints them.
    """
    known = tables(lab.scale.lengths)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    wanted = dict.fromkeys(variant for number in numbers for variant in known[number].variants)
    for seed in seeds:  # a seed at a time: an interrupted bench has whole comparisons
        for variant in wanted:
            if not only_finished or lab.path(variant, seed).exists():
                found.setdefault(variant, {})[seed] = lab.result(variant, seed)
    metrics = {v: {seed: one["metrics"] for seed, one in by_seed.items()} for v, by_seed in found.items()}
    measured: dict[str, dict[str, Any]] = {
        str(number): {
            "title": known[number].title,
            "variants": {v: found.get(v, {}) for v in known[number].variants},
            "claims": [judge(claim, metrics) for claim in known[number].claims],
        }
        for number in numbers
    }
    claims = [_line(number, one) for number, table in measured.items() for one in table["claims"]]
    return {"scale": lab.scale.plain(), "seeds": list(seeds), "tables": measured, "claims": claims}


def _line(number: str, judged: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict as a claim: not met only where the difference points the other way on the seeds taken together."""
    relation = "better than" if judged["kind"] == "above" else "level with"
    name = f"table {number}: {judged['first']} {relation} {judged['second']} in {judged['metric']}"
    ok = {"yes": True, "no": False}.get(judged["verdict"])
    told = bench.claim(name, judged.get("difference"), "difference", judged["paper"], ok, judged["verdict"])
    return told | {"seeds": judged["seeds"]}


def show(result: Mapping[str, Any]) -> str:
    """The tables for a terminal: the paper's rows, ours with their spread, and the verdicts."""
    known = tables(tuple(result["scale"]["lengths"]))
    parts = []
    for number, measured in result["tables"].items():
        table = known[int(number)]
        parts += [
            f"Table {number}: {table.title}",
            "",
            *_columns([table.paper_columns, *table.paper_rows]),
            "",
        ]
        parts += [*_columns(_ours(table, measured["variants"])), ""]
        parts += [table.note, ""] if table.note else []
        parts += [*_columns(_verdicts(table, measured["claims"])), "", ""]
    host = result["machine"]
    where = f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, torch {host['torch']}"
    return "\n".join([f"Seeds {', '.join(map(str, result['seeds']))}; on {where}", "", *parts]).rstrip()


def _ours(table: Table, variants: Mapping[str, Mapping[Any, Any]]) -> list[tuple[str, ...]]:
    rows = [("", *(metric.title for metric in table.metrics), "seeds")]
    for name, title in table.variants.items():
        by_seed = list(variants.get(name, {}).values())
        told = sorted({one["pattern"] for one in by_seed if "pattern" in one})
        cells = [_cell(metric, [one["metrics"][metric.key] for one in by_seed]) for metric in table.metrics]
        rows.append((title + (f" ({', '.join(told)})" if told else ""), *cells, str(len(by_seed))))
    return rows


def _cell(metric: Metric, values: Sequence[float]) -> str:
    if not values:
        return "not run"
    shown = spread([metric.factor * value for value in values])
    mean, low, high = (f"{shown[key]:.{metric.digits}f}" for key in ("mean", "min", "max"))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def _verdicts(table: Table, claims: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    yield "paper", "here", "in", "reproduces", "mean paired difference", "seeds one by one"
    titles = {metric.key: metric.title for metric in table.metrics}
    for claim in claims:
        first, second = (table.variants[claim[side]] for side in ("first", "second"))
        relation = "better than" if claim["kind"] == "above" else "level with"
        difference, each = "", ""
        if "difference" in claim:
            bounds = [claim["low"], claim["high"]]
            between = f" [{bounds[0]:+.4g}, {bounds[1]:+.4g}]" if None not in bounds else ""
            within = f", within {claim['tolerance']:.3g}" if claim["kind"] == "level" else ""
            difference = f"{claim['difference']:+.4g}{between}{within}"
            each = ", ".join(f"{one:+.3g}" for one in claim["per_seed"])
        here = f"{first} {relation} {second}"
        yield claim["paper"], here, titles[claim["metric"]], claim["verdict"], difference, each


def _columns(rows: Sequence[tuple[str, ...]] | Iterator[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def options(parser: argparse.ArgumentParser) -> None:
    """The area's own options."""
    every = ",".join(map(str, NUMBERS))
    parser.add_argument("--table", default=every, metavar="N", help=f"some of {every}; default all")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), metavar="1,2,3")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help=f"results; default {RUNS}")
    parser.add_argument("--finished", action="store_true", help="train nothing: the results that are there")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The area's result: `run` with its options."""
    numbers = _numbers("--table", arguments.table)
    if unknown := [number for number in numbers if number not in NUMBERS]:
        raise UsageError(f"There is no table {unknown[0]} here.", f"Tables: {', '.join(map(str, NUMBERS))}.")
    seeds = _numbers("--seeds", arguments.seeds)
    from fullarc.evals import paper_runs

    lab = paper_runs.Lab(arguments.runs, paper_runs.laptop(), _progress)
    result = run(numbers, seeds, lab, arguments.finished)
    _progress("")
    return result


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UsageError(f"{option} {text} is not a list of whole numbers.", f"Write {option} 1,2,3.")
    return found


def _progress(said: str) -> None:
    """One line of stderr that is written over; silent where nobody looks."""
    if sys.stderr.isatty():
        print(f"\r{said[:WIDTH]:<{WIDTH}}", end="" if said else "\r", file=sys.stderr, flush=True)
