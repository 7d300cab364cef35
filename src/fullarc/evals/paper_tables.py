"""The paper's tables that are trained in miniature: their rows, which orderings they claim, and when one reproduces.

A claim compares two variants on the same seeds. Its differences are paired: what a seed does to both cancels. With n
seeds the interval of the mean difference is the one-sided 95 % one of Student's t (n - 1 degrees of freedom) each way:

    above   A is better than B      yes: the interval lies above 0      no: below 0
    level   A is as good as B       yes: within +- tolerance            no: outside of it

and everything else is "within the spread". Three seeds are few, so only large or very regular differences are a "yes".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fullarc.evals.stats import mean, standard_error

T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""95 % quantiles of Student's t for 1, 2, … degrees of freedom."""
NORMAL95 = 1.645

Results = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Variant -> seed -> metrics."""


@dataclass(frozen=True)
class Metric:
    """A column: key, title, factor of the stored value, which way is better, digits printed."""

    key: str
    title: str
    better: Literal["higher", "lower"] = "higher"
    factor: float = 1.0
    digits: int = 2


@dataclass(frozen=True)
class Claim:
    """What the paper says of two variants: `paper` in its own figures. `tolerance` as a share of B, or in the unit."""

    first: str
    second: str
    metric: Metric
    paper: str
    kind: Literal["above", "level"] = "above"
    tolerance: float = 0.0
    relative: bool = False


@dataclass(frozen=True)
class Table:
    """One table: the paper's rows (printed as they are), our variants by title, columns, claims."""

    number: int
    title: str
    paper_columns: tuple[str, ...]
    paper_rows: tuple[tuple[str, ...], ...]
    variants: Mapping[str, str]
    metrics: tuple[Metric, ...]
    claims: tuple[Claim, ...]
    note: str = ""


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean difference and its one-sided 95 % bounds each way; infinite for one difference."""
    centre = mean(differences)
    if len(differences) < 2:
        return centre, -math.inf, math.inf
    degrees = len(differences) - 1
    t = T95[degrees - 1] if degrees <= len(T95) else NORMAL95
    half = t * standard_error(differences)
    return centre, centre - half, centre + half


def judge(claim: Claim, results: Results) -> dict[str, Any]:
    """Whether a claim reproduces: verdict, mean difference A - B with its interval, and every seed's difference.

    Differences are in the metric's unit. The verdict is "not run" unless both variants were run on a common seed.
    """
    first, second = results.get(claim.first, {}), results.get(claim.second, {})
    seeds = sorted(first.keys() & second.keys())
    out: dict[str, Any] = {
        "first": claim.first, "second": claim.second, "metric": claim.metric.key, "kind": claim.kind,
        "paper": claim.paper, "seeds": seeds,
    }  # fmt: skip
    if not seeds:
        return out | {"verdict": "not run"}
    a, b = (
        [claim.metric.factor * side[seed][claim.metric.key] for seed in seeds] for side in (first, second)
    )
    differences = [x - y for x, y in zip(a, b, strict=True)]
    centre, low, high = interval(differences)
    tolerance = claim.tolerance * (abs(mean(b)) if claim.relative else 1.0)
    numbers = {"difference": centre, "low": low, "high": high, "tolerance": tolerance}
    rounded = {key: round(value, 5) if math.isfinite(value) else None for key, value in numbers.items()}
    per_seed = [round(one, 5) for one in differences]
    return out | rounded | {"per_seed": per_seed, "verdict": _verdict(claim, low, high, tolerance)}


def _verdict(claim: Claim, low: float, high: float, tolerance: float) -> str:
    if claim.kind == "level":
        if -tolerance <= low and high <= tolerance:
            return "yes"
        return "no" if low > tolerance or high < -tolerance else "within the spread"
    if claim.metric.better == "lower":
        low, high = -high, -low
    return "yes" if low > 0 else "no" if high < 0 else "within the spread"


# --- the tables --------------------

_BPB = Metric("bpb", "held-out bits/byte", "lower", digits=4)
_LOGIT = Metric("logit", "largest attention logit", "lower", digits=1)
_ACCEPT = Metric("accept", "accept length", digits=3)
_DRAFTS = tuple(Metric(f"draft_{i}", f"draft {i} kept, %", factor=100, digits=1) for i in range(1, 5))


def _at(length: int, key: str, title: str, **more: Any) -> Metric:
    percent: dict[str, Any] = {} if key in ("nats", "bpb") else {"factor": 100, "digits": 1}
    return Metric(f"{key}@{length}", f"{title} at {length:,}", **percent | more)


def tables(lengths: Sequence[int]) -> dict[int, Table]:
    """All tables by number, for questions about documents of these lengths, ascending."""
    longest = lengths[-1]
    recalls = tuple(_at(length, "recall", "recall, %") for length in lengths)
    recall = recalls[-1]
    nats = _at(longest, "nats", "nats of an answer's token", better="lower", digits=3)
    text = _at(longest, "bpb", "bits/byte of text", better="lower", digits=4)
    needle = _at(longest, "needle", "needle, %")
    keys, values = _at(longest, "multi_key", "multi-key, %"), _at(longest, "values", "multi-value, %")
    return {
        1: Table(
            1, "Attention variants and Muon Split",
            ("", "HellaSwag", "MMLU", "C-Eval", "RACE", "BBH", "GSM8K", "HumanEval", "mean"),
            (("GQA-8", "77.3", "61.2", "60.0", "79.6", "53.3", "47.6", "38.5", "59.6"),
             ("MLA", "77.3", "61.5", "59.7", "77.8", "48.9", "46.2", "33.5", "57.8"),
             ("MLA + Muon Split", "77.8", "62.5", "62.1", "79.9", "51.8", "45.0", "36.7", "59.4"),
             ("MLA-256 + Muon Split", "77.4", "62.0", "59.9", "79.6", "51.3", "47.5", "36.6", "59.2")),
            {"gqa": "GQA", "mla": "MLA", "mla-split": "MLA + Muon Split", "mla-256-split": "MLA-256 + Muon Split"},
            (_BPB, _LOGIT, Metric("logit_end", "logit at the end", "lower", digits=1)),
            (Claim("gqa", "mla", _BPB, "59.6 > 57.8: with Muon, MLA is below GQA"),
             Claim("mla-split", "mla", _BPB, "59.4 > 57.8: Muon Split recovers it"),
             Claim("mla-256-split", "mla", _BPB, "59.2 > 57.8"),
             Claim("mla-split", "gqa", _BPB, "59.4 ~ 59.6", "level", 0.01, True),
             Claim("mla-256-split", "mla-split", _BPB, "59.2 ~ 59.4", "level", 0.01, True),
             Claim("mla-split", "mla", _LOGIT, "with Muon Split logits stay stable without clipping")),
            "The mean of the seven benchmarks is ours.",
        ),
        2: Table(
            2, "Multi-token prediction with shared parameters",
            ("", "accept length, 4 draft steps"),
            (("DeepSeek-V3.2: one layer, trained for one step", "2.55"),
             ("GLM-5: one layer, trained for three steps", "2.76")),
            {"mtp-1": "one layer, one step", "mtp-3": "one layer, three steps",
             "mtp-3-separate": "three layers, three steps"},
            (_ACCEPT, *_DRAFTS, _BPB),
            (Claim("mtp-3", "mtp-1", _ACCEPT, "2.76 > 2.55"),
             Claim("mtp-3", "mtp-1", _DRAFTS[1], "training for one step hurts the second token")),
            "The paper compares two different models; three separate layers are an extra row.",
        ),
        3: Table(
            3, "Sparse against dense attention",
            ("128K", "MQ-NIAH", "MV-NIAH", "SQuAD", "HotpotQA"),
            (("MLA", "100.0", "95.5", "79.7", "66.3"), ("DSA", "100.0", "97.0", "86.0", "63.0"),
             ("from Table 5, RULER: full", "75.28", "", "", ""), ("sliding-window interleave", "44.93", "", "", "")),
            {"dense-on": "MLA, dense", "dsa": "DSA", "window-f-on": "windows, full first",
             "window-s-on": "windows, window first"},
            (needle, keys, values, recall, nats, text),
            (Claim("dsa", "dense-on", keys, "100.0 ~ 100.0", "level", 5),
             Claim("dsa", "dense-on", values, "97.0 > 95.5"),
             Claim("dsa", "dense-on", text, "losses tie (Figure 6)", "level", 0.01, True),
             *(Claim("dsa", f"window-{phase}-on", metric, "windows lose recall (Table 5: 75.28 > 44.93, trained)")
               for phase in "fs" for metric in (recall, nats))),
            "All four are the same dense model, trained on for the same rows.",
        ),
        4: Table(
            4, "Sliding windows in a trained model, no further training",
            ("RULER", "4K", "8K", "16K", "32K", "64K", "128K"),
            (("full attention", "95.19", "93.67", "92.01", "91.09", "85.35", "75.28"),
             ("interleave", "94.87", "54.02", "25.89", "12.61", "8.32", "6.51"),
             ("searched pattern", "95.78", "92.54", "88.92", "82.52", "70.23", "53.95")),
            {"dense": "full attention", "window-f": "interleave, full first", "window-s": "interleave, window first",
             "window-searched": "searched pattern"},
            (*recalls, nats, text),
            (Claim("dense", "window-f", recall, "75.28 > 6.51"),
             Claim("dense", "window-s", recall, "75.28 > 6.51"),
             Claim("window-searched", "window-f", recall, "53.95 > 6.51"),
             Claim("window-searched", "window-s", recall, "53.95 > 6.51"),
             Claim("dense", "window-searched", recall, "75.28 > 53.95"),
             Claim("dense", "window-f", recalls[0], "95.19 ~ 94.87, no longer than the window", "level", 5),
             Claim("dense", "window-s", recalls[0], "95.19 ~ 94.87, no longer than the window", "level", 5)),
            "Half of the layers have windows; the paper does not say which kind comes first.",
        ),
        6: Table(
            6, "The indexer's warm-up alone against full DSA",
            ("RULER", "4K", "8K", "16K", "32K", "64K", "128K"),
            (("base", "97.44", "96.72", "95.83", "92.96", "85.34", "79.21"),
             ("warm-up only", "97.51", "96.54", "95.40", "90.09", "84.05", "71.35"),
             ("full DSA", "96.77", "96.25", "96.69", "93.45", "87.06", "78.86")),
            {"dense": "base", "warm-up": "warm-up only", "dsa": "full DSA", "dense-on": "base, trained on densely"},
            (*recalls, nats, text),
            (Claim("dsa", "warm-up", recall, "78.86 > 71.35"),
             Claim("dsa", "warm-up", nats, "the same, of the answers' likelihood"),
             Claim("dense", "warm-up", recall, "79.21 > 71.35"),
             Claim("dsa", "dense", recall, "78.86 ~ 79.21", "level", 5)),
            "Full DSA is trained on for as many rows as the last row, which the paper does not have.",
        ),
    }  # fmt: skip
