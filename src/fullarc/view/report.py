"""One HTML file that tells a run: `write(run_dir)` → report.html and report.json.

Invariants: the page is a pure function of report.json; it needs no network and runs no script (its policy forbids
both), so hostile model output can neither load nor execute anything; every text in it went through `markup.escape`.
"""

import json
from pathlib import Path
from typing import Any

from fullarc.config.files import atomic_write
from fullarc.view.charts import Series, duration, line_chart, number, time_bar
from fullarc.view.collect import collect
from fullarc.view.markup import Child, Markup, join, tag
from fullarc.view.table import capability_chart, family_table, stage_table, tiles

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
CURVE_NAMES = {
    "loss": "Loss (nats per token)",
    "index_kl": "Indexer KL (nats)",
    "count": "Trained tokens per step",
    "expert_load": "Load of the fullest expert",
    "dead_experts": "Experts without a token",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "tokens_per_s": "Tokens per second",
    "reward": "Reward",
    "success": "Success",
    "advantage": "Advantage (nats)",
    "entropy": "Entropy (nats)",
    "length": "Tokens per episode",
    "mismatch_mean": "Sampler–trainer gap (nats)",
    "clip_rate": "Tokens clipped",
    "mask_rate": "Tokens masked",
} | {f"mtp_loss_{depth}": f"MTP loss, token +{depth + 1} (nats)" for depth in range(1, 9)}
SHARES = ("reward", "success", "part/", "reward/")
SOURCE_COLUMNS = (
    ("licence", "Licence"),
    ("documents", "Read"),
    ("kept", "Kept"),
    ("heldout", "Held out"),
    ("bytes", "Bytes kept"),
    ("unseen", "New"),
)
WHO = {"system": "system", "user": "task", "thinking": "thinks", "message": "says", "observation": "sees"}


def write(run_dir: Path) -> Path:
    """Write `run_dir`/report.json and report.html and return the latter's path; FullarcError if it is no run."""
    report = collect(run_dir)
    atomic_write(Path(run_dir) / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
    page = Path(run_dir) / "report.html"
    atomic_write(page, render(report).encode("utf-8", "replace"))
    return page


def render(report: dict[str, Any]) -> str:
    """The whole page for a report as `collect` makes it."""
    title = f"{report['run']['name']} · fullarc"
    css = Markup((Path(__file__).with_name("report.css")).read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("title", title),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="referrer", content="no-referrer"),
        tag("style", css),
    )
    main = tag(
        "main",
        _section("abilities", "What each stage added", *_abilities(report)),
        _section(
            "stages",
            "Stage by stage",
            [_stage(stage) for stage in report["stages"] if stage["type"] != "data"],
        ),
        _section("data", "What it read", *_data(report["data"])) if report["data"] else None,
        _section("episodes", "Three episodes to read", *_episodes(report["trajectories"])),
    )
    body = tag("body", _masthead(report), main, _footer(report))
    return f'<!doctype html>\n<html lang="en">{join(head, body)}</html>\n'


def _section(anchor: str, title: str, *children: Child) -> Markup:
    return tag(
        "section",
        tag("h2", title, id=f"{anchor}-title"),
        *children,
        id=anchor,
        aria_labelledby=f"{anchor}-title",
    )


def _facts(pairs: list[tuple[str, Any]]) -> Markup:
    return tag(
        "dl",
        [tag("div", tag("dt", k), tag("dd", v)) for k, v in pairs if v not in (None, "")],
        class_="facts",
    )


def _masthead(report: dict[str, Any]) -> Markup:
    run, machine, stages = report["run"], report["machine"], report["stages"]
    switch = [
        join(
            tag("input", type="radio", name="theme", id=f"theme-{name}", checked=name == "auto"),
            tag("label", name, for_=f"theme-{name}"),
        )
        for name in ("auto", "light", "dark")
    ]
    done = sum(stage["status"] == "done" for stage in stages)
    state = "complete" if run["complete"] else f"{done} of {len(stages)} stages done"
    memory = f"{machine['memory_gb']} GB" if machine.get("memory_gb") else None
    times = [(s["title"], s["seconds"], f"c-{s['phase']}") for s in stages if s["seconds"]]
    notes = report["warnings"]
    return tag(
        "div",
        tag(
            "div",
            tag("b", "fullarc"),
            tag("span", switch, class_="theme", role="group", aria_label="Theme"),
            class_="bar",
        ),
        tag("p", f"Run report · {state}", class_="kicker"),
        tag("h1", run["name"]),
        tag(
            "p",
            "From raw text to an agent: what each stage of the GLM-5 recipe did to one small model, "
            "what it cost, and what the model can do now.",
            class_="lede",
        ),
        tag("div", "Damaged or missing: ", tag("ul", [tag("li", note) for note in notes]), class_="warn")
        if notes
        else None,
        tiles(stages, report["columns"]),
        tag("div", time_bar(times), class_="scroll", tabindex=0, role="region", aria_label="Time per stage")
        if times
        else None,
        _facts(
            [
                ("Total", duration(run["seconds"]) if run["seconds"] else None),
                ("Recipe", run["recipe"]),
                ("Size", run["size"]),
                ("Seed", run["seed"]),
                ("CPU", machine.get("cpu")),
                ("Cores", machine.get("cores")),
                ("Memory", memory),
                ("torch", machine.get("torch")),
                ("Python", machine.get("python")),
                ("System", machine.get("system")),
            ]
        ),
        class_="masthead",
    )


def _abilities(report: dict[str, Any]) -> list[Child]:
    stages, columns = report["stages"], report["columns"]
    intro = (
        "Each checkpoint answers the same held-out questions with the same sampling seeds. Families called “new” were "
        "never trained on. Agents work in real sandboxes and are graded by hidden tests."
    )
    return [
        tag("p", intro),
        capability_chart(stages, columns),
        stage_table(stages, columns),
        family_table(stages),
    ]


def _stage(stage: dict[str, Any]) -> Markup:
    accept = stage["scores"].get("mtp_accept", {}).get("value")
    status = None if stage["status"] == "done" else stage["status"]
    meta = [
        duration(stage["seconds"]) if stage["seconds"] else None,
        f"accept length {accept:.2f}" if accept else None,
        status,
    ]
    chips = [tag("li", tag("span", f"{key} "), _setting(value)) for key, value in stage["settings"].items()]
    main = [_curve(key, c, stage) for key, c in stage["curves"].items() if c["main"]]
    others = {key: c for key, c in stage["curves"].items() if not c["main"]}
    rest = [_curve(key, c, stage) for key, c in others.items() if len(set(c["y"])) > 1]
    still = [
        tag("li", tag("span", f"{curve_name(key)} "), number(c["y"][-1]))
        for key, c in others.items()
        if len(set(c["y"])) == 1
    ]
    more = tag(
        "details",
        tag("summary", f"{len(others)} more metric{'s' * (len(others) > 1)}"),
        tag("div", rest, class_="plots"),
        tag("ul", still, class_="chips", aria_label="Metrics that did not change") if still else None,
    )
    return tag(
        "article",
        tag(
            "header",
            tag("span", class_="dot"),
            tag("h3", stage["title"]),
            tag("small", stage["paper"]),
            tag("span", " · ".join(part for part in meta if part), class_="meta"),
            class_=f"c-{stage['phase']}",
        ),
        tag(
            "div",
            tag(
                "div",
                tag("p", stage["sentence"]) if stage["sentence"] else None,
                tag("ul", chips, class_="chips", aria_label="Settings") if chips else None,
            ),
            tag("div", main, class_="plots") if main else None,
            class_="beside",
        ),
        more if others else None,
        class_="stage",
        id=f"stage-{stage['name']}",
    )


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_setting(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_setting(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def curve_name(key: str) -> str:
    """A metric's name for people."""
    plain = key.replace("_", " ").replace("/", ": ")
    return CURVE_NAMES.get(key, plain[:1].upper() + plain[1:])


def _curve(key: str, curve: dict[str, Any], stage: dict[str, Any]) -> Markup:
    name = curve_name(key)
    share = key.startswith(SHARES) or key.endswith("_rate")
    line = Series("", curve["x"], curve["y"], f"c-{stage['phase']}")
    inside = share and all(0 <= value <= 1 for value in curve["y"])
    return line_chart(name, [line], "step", y_range=(0.0, 1.0) if inside else None, percent=inside)


def _data(data: dict[str, Any]) -> list[Child]:
    """Sources with licences and counts, and what was dropped for which reason."""
    intro = "Every document that was left out is counted under its reason; held-out documents are never trained on."
    sources: Any = data.get("sources") or {}
    if isinstance(sources, list):
        sources = {str(source.get("name", "?")): source for source in sources if isinstance(source, dict)}
    rows = [(name, info if isinstance(info, dict) else {"documents": info}) for name, info in sources.items()]
    shown = [(key, title) for key, title in SOURCE_COLUMNS if any(key in info for _, info in rows)]
    head = tag("tr", tag("th", "Source", scope="col"), [tag("th", title, scope="col") for _, title in shown])
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            [tag("td", _count(info.get(key)), class_=key) for key, _ in shown],
        )
        for name, info in rows
    ]
    caption = tag("caption", "Sources; “new” ones are only evaluated on")
    source_table = tag("table", caption, tag("thead", head), tag("tbody", body), class_="sources")
    dropped: dict[str, Any] = data["dropped"] if isinstance(data.get("dropped"), dict) else {}
    counts = {
        name: count
        for name, count in {"kept": data.get("kept"), **dropped}.items()
        if isinstance(count, int) and not isinstance(count, bool)
    }
    most = max(counts.values(), default=1) or 1
    bars = [
        tag(
            "tr",
            tag("th", reason.replace("_", " "), scope="row"),
            tag("td", _count(count)),
            tag("td", tag("span", class_="meter", style=f"width:{max(1, round(300 * count / most))}px")),
        )
        for reason, count in counts.items()
    ]
    caption = tag("caption", "Documents kept, and left out by reason")
    return [
        tag("p", intro),
        tag("div", source_table, class_="scroll") if rows else None,
        tag("div", tag("table", caption, tag("tbody", bars), class_="bars"), class_="scroll")
        if bars
        else None,
    ]


def _count(value: Any) -> str:
    """A cell of the source table."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if value is None or isinstance(value, float) else str(value)


def _episodes(cards: list[dict[str, Any]]) -> list[Child]:
    if not cards:
        return [tag("p", "No episode has been recorded yet.")]
    scale = [
        tag("span", label, class_=f"y p{i}")
        for i, label in enumerate(("> 90 %", "> 60 %", "> 30 %", "> 10 %", "less"))
    ]
    intro = (
        "Exactly as sampled. In the token view, grey tokens were given to the model; coloured ones it "
        "sampled itself, and only they are trained on. The stronger the colour, the less likely the token was; "
        "hover for its id, probability and the version of the weights that sampled it."
    )
    return [
        tag("p", intro),
        tag(
            "p", tag("span", scale, class_="tokens scale", style="padding:0;background:none"), class_="small"
        ),
        [_card(card) for card in cards],
    ]


def _card(card: dict[str, Any]) -> Markup:
    good = card["reward"] is not None and card["reward"] > 0.5
    turns = [
        tag(
            "li",
            tag("span", WHO.get(turn["kind"], turn.get("name", turn["kind"])), class_="who"),
            tag("pre", turn["text"]),
            class_=turn["kind"],
        )
        for turn in card["turns"]
    ]
    return tag(
        "article",
        tag(
            "header",
            tag("h3", card["title"]),
            tag("span", f"reward {number(card['reward'])}", class_=f"pill {'good' if good else 'bad'}"),
            tag("span", join(card["task"], " · ", tag("code", card["file"])), class_="meta"),
        ),
        tag("ol", turns, class_="turns"),
        _tokens(card["tokens"]),
        class_="card",
    )


def _tokens(tokens: dict[str, Any]) -> Markup | None:
    if not tokens:
        return None
    spans = [
        _token(*row)
        for row in zip(*(tokens[k] for k in ("id", "text", "mask", "logprob", "version")), strict=True)
    ]
    cut = f" … {tokens['cut']} more tokens" if tokens["cut"] else None
    title = f"The {len(spans)} tokens as the trainer sees them"
    return tag("details", tag("summary", title), tag("div", spans, cut, class_="tokens", tabindex=0))


def _token(token_id: int, text: str, mask: int, logprob: float | None, version: int | None) -> Markup:
    if not mask:
        return tag("span", text, title=f"id {token_id} · given, not trained on")
    p = 0.0 if logprob is None else 2.718281828459045 ** min(logprob, 0.0)
    level = sum(p <= bound for bound in (0.9, 0.6, 0.3, 0.1))
    known = f"p {p:.3g} · log p {logprob:.3f}" if logprob is not None else "no log-prob"
    return tag(
        "span", text, class_=f"y p{level}", title=f"id {token_id} · {known} · weights version {version}"
    )


def _footer(report: dict[str, Any]) -> Markup:
    text = (
        f"Written {report['written']} by fullarc, an independent implementation of the recipe in the GLM-5 paper "
        "(arXiv 2602.15763). This page is one file: no scripts, nothing is loaded from anywhere. "
        "The same content as data: report.json. Shares near 0 or 100 % have Wilson standard errors; "
        "pass@1 and success are single samples."
    )
    return tag("footer", tag("p", text))
