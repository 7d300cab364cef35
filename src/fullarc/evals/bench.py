"""`fullarc bench AREA`: measured claims with their baselines, targets, seeds and machine.

fullarc bench arc [--seeds 0,1,2] [--from-runs DIR… [--thorough]] [--recipe FILE] [--json] [--save]
fullarc bench train [--part NAME…] [--size 1m|2m|5m|20m…] [--json] [--save]
fullarc bench dsa [--part NAME…] [--length TOKENS…] [--json] [--save]
fullarc bench topk [--json] [--save]
fullarc bench engine [--part NAME…] [--size tiny|2m] [--checkpoint DIR] [--peers FOLDER] [--json] [--save]
fullarc bench quantize CHECKPOINT [--peers FOLDER] [--json] [--save]
fullarc bench paper [--table 1,2,3,4,6] [--seeds 1,2,3] [--json] [--save]

`--save` keeps a result in bench/baselines/AREA.json, but for regressions, of which the older figure stays until
`--accept` is given as well. From then on a claim that is a ratio of two sides measured in
turn fails when it is more than TOLERANCE worse than what was kept, whatever its target says. Seconds, bytes and scores
never fail for that: they depend on the machine and on what else it does. Nor does anything where what was kept is of
another machine (CPU model, cores): it is told, no more. An area that yields its claims tells each on
stderr as it comes and saves it at once; a part of an area replaces its own claims in the file. A new area is an entry
of AREAS.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
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
    "engine": "the engine against transformers and llama.cpp, and with itself",
    "quantize": "what quantisation costs, beside llm-compressor and auto-round at the same bits",
}
"""Each is a module `bench_AREA` with `measure(options)`, from its options to {"claims": […]} with "machine" where that
is not this one and "partial" where these are not all that it has, and where it needs them `options(parser)`, which adds
its own, and `show(result)`, for a terminal."""


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
    before, found = stored(area), _area(area).measure(arguments)
    whole = {"area": area, "machine": machine()} | found
    if elsewhere := _elsewhere(before, whole["machine"]):
        whole["baseline_machine"] = elsewhere
        print(_told_elsewhere(elsewhere), file=sys.stderr, flush=True)
    if not isinstance(found["claims"], Iterator):
        compare(found["claims"], before, not elsewhere)
        return whole
    result = whole | {"claims": []}
    for one in found["claims"]:
        compare([one], before, not elsewhere)
        result["claims"].append(one)
        print(f"{_mark(one)}  {_named(one)}  {_value(one)}  {one['target']}", file=sys.stderr, flush=True)
        if arguments.save:
            save(result | {"partial": True}, arguments.accept)
    return result


def _elsewhere(before: dict[str, Any] | None, here: dict[str, Any]) -> str:
    """The machine of a stored result, if its figures do not compare with those of `here`; "" if they do."""
    there = (before or {}).get("machine") or here
    same = all(there.get(name) == here[name] for name in ("cpu", "cores"))
    return "" if same else f"{there.get('cpu')}, {there.get('cores')} cores"


def _told_elsewhere(where: str) -> str:
    return f"Baselines are of another machine ({where}): told, but nothing fails for being worse."


def compare(claims: Sequence[dict[str, Any]], before: dict[str, Any] | None, comparable: bool = True) -> None:
    """Give every claim without a baseline of its own the stored value, and say which gated ones are a regression.

    A regression is a value more than TOLERANCE worse than the stored one, or NaN; it fails the claim. Where what was
    stored is not `comparable` there is none.
    """
    kept = {one["name"]: one["value"] for one in (before or {}).get("claims", ())}
    for one in claims:
        old, value = kept.get(one["name"]), one["value"]
        if one["baseline"] is None:
            one["baseline"] = old
        one["regression"] = False
        if comparable and one.get("gated") and old is not None and value is not None:
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


def save(result: dict[str, Any], accept: bool = False, folder: Path = BASELINES) -> Path:
    """Keep a result as the baseline of its area; returns the file.

    A partial one replaces the claims that it measured, if the others come from the same machine. What is a regression
    replaces nothing, unless it is to be `accept`ed.
    """
    path, before = folder / f"{result['area']}.json", stored(result["area"], folder)
    kept = {key: value for key, value in result.items() if key not in ("partial", "baseline_machine")}
    old = {one["name"]: one for one in before["claims"]} if before else {}
    if not accept:
        kept["claims"] = [old[c["name"]] if c.get("regression") else c for c in kept["claims"]]
    if result.get("partial") and before and before["machine"] == kept["machine"]:
        new = {
            one["name"]: one for one in kept["claims"] if one["value"] is not None or one["name"] not in old
        }
        kept["claims"] = list((old | new).values())
    atomic_write(path, json.dumps(kept, indent=1) + "\n")
    return path


def _mark(one: dict[str, Any]) -> str:
    return "REGRESSION" if one.get("regression") else {True: "ok", False: "MISS", None: "?"}[one["ok"]]


def _named(one: dict[str, Any]) -> str:
    return one["name"] + (f" ({', '.join(dict.fromkeys(one['detail']))})" if one.get("detail") else "")


def _value(one: dict[str, Any]) -> str:
    return "not measured" if one["value"] is None else f"{one['value']:g} {one['unit']}"


def table(result: dict[str, Any]) -> str:
    """The claims as text for a terminal."""
    rows = [("", "claim", "value", "baseline", "target", "spread", "seeds")]
    for one in result["claims"]:
        mark = _mark(one)
        told = one["spread"]
        between = f"{told['min']:g} to {told['max']:g}" if told and told["n"] > 1 else "–"
        value = _value(one)
        baseline = "–" if one["baseline"] is None else f"{one['baseline']:g}"
        seeds = str(len(one["seeds"]))
        rows.append((mark, _named(one), value, baseline, one["target"], between, seeds))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    host = result["machine"]
    where = f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, torch {host['torch']}"
    about = [f"{result['area']}: {AREAS[result['area']]}", f"on {where}"]
    if "baseline_machine" in result:
        about.append(_told_elsewhere(result["baseline_machine"]))
    return "\n".join([*about, "", *lines])


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
    parser.add_argument("--accept", action="store_true", help="with --save: regressions too")
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
        print(f"saved as {save(result, arguments.accept)}", file=sys.stderr)
    return 1 if any(one["ok"] is False for one in result["claims"]) else 0
