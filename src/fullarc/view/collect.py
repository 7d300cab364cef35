"""A run folder → report.json: everything the report shows, and nothing else.

Invariant: `collect` only reads, works on a run that is unfinished, and says in `warnings` what was damaged or missing
instead of failing; the HTML is a pure function of its result.
"""

import json
import math
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fullarc.config.errors import FullarcError
from fullarc.config.files import read_jsonl
from fullarc.config.machine import machine
from fullarc.config.runfolder import RESOLVED
from fullarc.view.arc import describe
from fullarc.view.charts import thin
from fullarc.view.trajectories import pick

FORMAT = 1
MOST_POINTS = 400
NOT_CURVES = {"step", "total", "time", "t", "ts", "seconds", "elapsed", "stage", "attempt", "epoch", "seed"}


def collect(run_dir: Path) -> dict[str, Any]:
    """The report of a run folder as plain JSON data (keys are stable: run, machine, stages, columns, data, …).

    Raises:
        FullarcError: `run_dir` is not a run folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FullarcError(f"{run_dir} is not a folder.", "Give the folder of a run, such as runs/laptop.")
    warnings: list[str] = []
    recipe = _recipe(run_dir, warnings)
    events = _lines(run_dir / "events.jsonl", warnings)
    metrics = _lines(run_dir / "metrics.jsonl", warnings)
    if not recipe and not metrics and not (run_dir / "stages").is_dir():
        raise FullarcError(
            f"{run_dir} holds no recipe, no metrics and no stages.", "Is it the folder of a run?"
        )
    tables = _tables(run_dir, warnings)
    stages = _stages(run_dir, recipe, events, metrics, tables)
    columns: dict[str, dict[str, Any]] = {}
    for table in tables.values():
        columns |= {
            column["key"]: column for column in table.get("columns", []) if column["key"] not in columns
        }
    return _plain({
        "format": FORMAT,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run": {
            "name": recipe.get("name") or run_dir.resolve().name,
            "recipe": _recipe_name(events),
            "size": recipe.get("size"),
            "seed": recipe.get("seed"),
            "complete": bool(stages) and all(stage["status"] == "done" for stage in stages),
            "seconds": sum((stage["seconds"] or 0.0) + stage["eval_seconds"] for stage in stages),
        },
        "machine": next((e["machine"] for e in events if isinstance(e.get("machine"), dict)), None) or machine(),
        "model": recipe.get("model", {}),
        "stages": stages,
        "columns": list(columns.values()),
        "data": _data(run_dir, warnings),
        "trajectories": pick(run_dir, warnings),
        "warnings": warnings,
    })  # fmt: skip


def _plain(node: Any) -> Any:
    """JSON without nan: a reader in any language can parse it."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def _lines(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    records = read_jsonl(path)
    if path.exists():
        lost = sum(1 for line in path.read_bytes().split(b"\n") if line.strip()) - len(records)
        if lost:
            warnings.append(f"{path.name}: {lost} damaged line{'s' * (lost > 1)} left out")
    return records


def read_object(path: Path, warnings: list[str]) -> dict[str, Any]:
    """A JSON object, or {} with a warning when the file exists but is not one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if isinstance(value, dict):
        return value
    warnings.append(f"{path.parent.name}/{path.name} is damaged and was left out")
    return {}


def _recipe(run_dir: Path, warnings: list[str]) -> dict[str, Any]:
    path = run_dir / RESOLVED
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        warnings.append("recipe.resolved.toml is missing")
    except (OSError, ValueError):
        warnings.append("recipe.resolved.toml is damaged")
    return {}


def _recipe_name(events: list[dict[str, Any]]) -> str | None:
    named = next((event["recipe"] for event in events if isinstance(event.get("recipe"), str)), None)
    return Path(named).name if named else None


def _tables(run_dir: Path, warnings: list[str]) -> dict[str, dict[str, Any]]:
    """stage → content of its scores.json."""
    tables = {}
    for path in sorted((run_dir / "stages").glob("*/**/scores.json")):
        table = read_object(path, warnings)
        if not table:
            continue
        try:
            scores = {
                key: {"value": s["value"], "se": s["se"], "n": s["n"]} for key, s in table["scores"].items()
            }
            tables[str(table["stage"])] = {**table, "scores": scores}
        except (KeyError, TypeError, AttributeError):
            warnings.append(f"{path.relative_to(run_dir)} is not a table of scores and was left out")
    return tables


def _stages(
    run_dir: Path,
    recipe: dict[str, Any],
    events: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    tables: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    settings = recipe.get("stages", {})
    names = ["data", *recipe.get("arc", settings)] if recipe else []
    folders = sorted(path.name for path in (run_dir / "stages").glob("*") if path.is_dir())
    seen = [str(record["stage"]) for record in (*events, *metrics) if record.get("stage")]
    names += [name for name in dict.fromkeys([*seen, *folders, *tables]) if name not in names]
    out = []
    for name in names:
        own = [event for event in events if event.get("stage") == name]
        known = settings.get(name) or (recipe.get("data", {}) if name == "data" else {})
        kind = str(known.get("type", name))
        text = describe(kind)
        rows = [record for record in metrics if record.get("stage") == name]
        table = tables.get(name, {})
        touched = own or rows or table or name in folders
        finished = any(event.get("kind") == "stage_end" for event in own)
        out.append({
            "name": name, "type": kind, "title": text.title if text.title != "Stage" else name, "phase": text.phase,
            "paper": text.paper, "sentence": text.sentence,
            "status": "done" if finished else "unfinished" if touched else "not started",
            "settings": {key: known[key] for key in text.settings if key in known},
            "seconds": _seconds(own, rows), "eval_seconds": sum((table.get("seconds") or {}).values()),
            "curves": _curves(rows, text.curves),
            **{key: table.get(key, {}) for key in ("scores", "families", "skipped")},
        })  # fmt: skip
    return out


def _seconds(events: list[dict[str, Any]], rows: list[dict[str, Any]]) -> float | None:
    """Wall time of the attempt that finished a stage; of an unfinished one, its metrics' first to last time."""
    told = [
        event["seconds"]
        for event in events
        if event.get("kind") == "stage_end" and _is_number(event.get("seconds"))
    ]
    if told:
        return float(told[-1])
    times = [row["time"] for row in rows if _is_number(row.get("time"))]
    return float(times[-1] - times[0]) if len(times) > 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(rows: list[dict[str, Any]], first: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """metric → {x, y, main}; a step that was repeated after a resume counts once, the later value."""
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        if not _is_number(row.get("step")):
            continue
        for key, value in row.items():
            if key not in NOT_CURVES and _is_number(value):
                points.setdefault(key, {})[row["step"]] = value
    order = [key for key in first if key in points] + sorted(key for key in points if key not in first)
    curves = {}
    for key in order:
        steps = sorted(points[key])
        x, y = thin(steps, [points[key][step] for step in steps], MOST_POINTS)
        curves[key] = {"x": x, "y": [float(f"{value:.6g}") for value in y], "main": key in first}
    if curves and not any(curve["main"] for curve in curves.values()):
        next(iter(curves.values()))["main"] = True
    return curves


def _data(run_dir: Path, warnings: list[str]) -> dict[str, Any]:
    """The corpus' own report: counts, sources and licences."""
    return read_object(run_dir / "data" / "corpus" / "report.json", warnings)
