"""`fullarc bench AREA`: measured claims with their baselines, targets, seeds and machine.

fullarc bench arc [--seeds 0,1,2] [--from-runs DIR… [--thorough]] [--recipe FILE] [--json] [--save]
fullarc bench train|dsa|topk [--json] [--save]
fullarc bench engine [--part NAME…] [--size tiny|2m] [--checkpoint DIR] [--json] [--save]
fullarc bench paper [--table 1,2,3,4,6] [--seeds 1,2,3] [--json] [--save]

`--save` keeps a result in bench/baselines/AREA.json. From then on a claim that is a ratio of two sides measured in
turn fails when it is more than TOLERANCE worse than what was kept, whatever its target says. Seconds, bytes and scores
never fail for that: they depend on the machine and on what else it does. A new area is an entry of AREAS.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fullarc.config.errors import UsageError
from fullarc.config.files import atomic_write
from fullarc.config.machine import machine

BASELINES = Path("bench/baselines")
TOLERANCE = 0.1


AREAS = {
    "arc": "the whole laptop recipe, raw text to agent",
    "train": "a training step against transformers, and where its time goes",
    "dsa": "sparse against dense attention, by length",
    "topk": "a forward pass against decoding, with and without a rule for ties",
    "paper": "the paper's ablation tables in miniature",
    "engine": "the engine against transformers, and with itself",
}
"""Each is a module `bench_AREA` with `measure(options)`, from its options to {"claims": […]} with "machine" where that
is not this one, and where it needs them `options(parser)`, which adds its own, and `show(result)`, for a terminal."""


def _area(name: str) -> ModuleType:
    return importlib.import_module(f"fullarc.evals.bench_{name}")


def claim(
    name: str,
    value: float | None,
    unit: str,
    target: str,
    ok: bool | None,
    detail: str = "",
    *,
    better: str = "higher",
    gated: bool | None = None,
) -> dict[str, Any]:
    """One line of a result.

    Args:
        ok: whether the target is met; None where there is none, or nothing was measured.
        better: "higher" or "lower".
        gated: whether a regression against the stored baseline fails it; by default ratios do (unit "x").
    """
    return {
        "name": name, "value": None if value is None else round(value, 3), "unit": unit, "baseline": None,
        "target": target, "seeds": [0], "spread": None, "ok": ok, "detail": [detail] if detail else [],
        "better": better, "gated": unit == "x" if gated is None else gated,
    }  # fmt: skip


def run(area: str, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Measure an area with its options: {"area", "machine", "claims": [{"name", "value", "unit", "baseline", …}]}."""
    return _measure(_parser(area).parse_args([area, *argv]))


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    area = arguments.area
    result = {"area": area, "machine": machine()} | _area(area).measure(arguments)
    compare(result["claims"], stored(area))
    return result


def compare(claims: Sequence[dict[str, Any]], before: dict[str, Any] | None) -> None:
    """Give every claim without a baseline of its own the stored value, and say which gated ones are a regression.

    A regression is a value more than TOLERANCE worse than the stored one, or NaN; it fails the claim.
    """
    kept = {one["name"]: one["value"] for one in (before or {}).get("claims", ())}
    for one in claims:
        old, value = kept.get(one["name"]), one["value"]
        if one["baseline"] is None:
            one["baseline"] = old
        one["regression"] = False
        if one.get("gated") and old is not None and value is not None:
            lower = one.get("better") == "lower"
            holds = value <= old * (1 + TOLERANCE) if lower else value >= old * (1 - TOLERANCE)
            one["regression"] = not holds
            one["ok"] = one["ok"] if holds else False


def stored(area: str, folder: Path = BASELINES) -> dict[str, Any] | None:
    """The result that was kept as the area's baseline; None if there is none."""
    try:
        found = json.loads((folder / f"{area}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def save(result: dict[str, Any], folder: Path = BASELINES) -> Path:
    """Keep a result as the baseline of its area; returns the file."""
    path = folder / f"{result['area']}.json"
    atomic_write(path, json.dumps(result, indent=1) + "\n")
    return path


def table(result: dict[str, Any]) -> str:
    """The claims as text for a terminal."""
    rows = [("", "claim", "value", "baseline", "target", "spread", "seeds")]
    for one in result["claims"]:
        mark = "REGRESSION" if one.get("regression") else {True: "ok", False: "MISS", None: "?"}[one["ok"]]
        told = one["spread"]
        between = f"{told['min']:g} to {told['max']:g}" if told and told["n"] > 1 else "–"
        value = "not measured" if one["value"] is None else f"{one['value']:g} {one['unit']}"
        baseline = "–" if one["baseline"] is None else f"{one['baseline']:g}"
        detail = f" ({', '.join(dict.fromkeys(one['detail']))})" if one.get("detail") else ""
        seeds = str(len(one["seeds"]))
        rows.append((mark, one["name"] + detail, value, baseline, one["target"], between, seeds))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    host = result["machine"]
    where = f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, torch {host['torch']}"
    return "\n".join([f"{result['area']}: {AREAS[result['area']]}", f"on {where}", "", *lines])


def _parser(area: str) -> argparse.ArgumentParser:
    """The options of every area, and those of `area` ("" for none)."""
    if area and area not in AREAS:
        raise UsageError(f"There is no bench '{area}'.", f"Areas: {', '.join(AREAS)}.")
    parser = argparse.ArgumentParser(
        prog="fullarc bench", description="Measure claims against their baselines."
    )
    parser.add_argument("area", nargs="?", default="", metavar="AREA", help=f"one of: {', '.join(AREAS)}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true", help=f"keep the result in {BASELINES}/")
    if area:
        getattr(_area(area), "options", lambda _: None)(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """The verb. Exit code 1 if a claim was measured and missed, or is a regression."""
    area = next((word for word in argv if not word.startswith("-")), "")
    arguments = _parser(area).parse_args(argv)
    if not area:
        plain = "\n".join(f"{name}  {about}" for name, about in AREAS.items())
        print(json.dumps(sorted(AREAS)) if arguments.json else plain)
        return 0
    result = _measure(arguments)
    show = getattr(_area(area), "show", table)
    print(json.dumps(result, indent=1) if arguments.json else show(result))
    if arguments.save:
        print(f"saved as {save(result)}", file=sys.stderr)
    return 1 if any(one["ok"] is False for one in result["claims"]) else 0
