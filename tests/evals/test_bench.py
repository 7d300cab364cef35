"""What all benches share: areas with their own options, and the gate against what was kept, on results made by hand."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest

from fullarc.config.errors import UsageError
from fullarc.evals import bench
from fullarc.evals.bench import claim

SPEED, MEMORY, SHARE = "side against side", "memory at the longest length", "share of the bound"
SECONDS, SCORE = "a step", "pass@1"
KEPT = {SPEED: 3.0, MEMORY: 2.0, SHARE: 80.0, SECONDS: 1.0, SCORE: 60.0}


def measured(values):
    """A result as an area gives it, with targets that all of these values meet."""
    return {
        "claims": [
            claim(SPEED, values[SPEED], "x", ">= 1", True, "with details"),
            claim(MEMORY, values[MEMORY], "x", "", None, better="lower"),
            claim(SHARE, values[SHARE], "%", ">= 10", True, gated=True),
            claim(SECONDS, values[SECONDS], "s", "", None, better="lower"),
            claim(SCORE, values[SCORE], "%", ">= 0", True),
        ]
    }


def by_hand(monkeypatch, **module):
    """An area more."""
    known = bench._area
    monkeypatch.setitem(bench.AREAS, "hand", "figures made by hand")
    monkeypatch.setattr(
        bench, "_area", lambda name: SimpleNamespace(**module) if name == "hand" else known(name)
    )


@pytest.fixture
def rerun(monkeypatch, tmp_path):
    """rerun(*options, name=value…): `fullarc bench hand`, whose figures are KEPT but for the given ones."""
    monkeypatch.chdir(tmp_path)
    values = dict(KEPT)
    by_hand(monkeypatch, measure=lambda options: measured(values))

    def start(*options, **changes):
        values.update(KEPT, **{globals()[name]: value for name, value in changes.items()})
        return bench.main(["hand", *options])

    return start


def claims_of(capsys):
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)["claims"]}


def test_without_a_stored_result_nothing_is_compared(rerun, capsys):
    assert rerun("--json", SPEED=1.0) == 0
    assert all(one["baseline"] is None and not one["regression"] for one in claims_of(capsys).values())


@pytest.mark.parametrize(
    "name, better, worse",
    [("SPEED", 2.71, 2.69), ("MEMORY", 2.19, 2.21), ("SHARE", 72.1, 71.9), ("SPEED", 9.0, float("nan"))],
)
def test_a_ratio_more_than_a_tenth_worse_fails_although_it_meets_its_target(
    rerun, capsys, name, better, worse
):
    assert rerun("--save") == 0
    capsys.readouterr()
    assert rerun("--json", **{name: better}) == 0
    found = claims_of(capsys)[globals()[name]]
    assert found["baseline"] == KEPT[globals()[name]] and not found["regression"] and found["ok"] is not False
    assert rerun("--json", **{name: worse}) == 1
    claims = claims_of(capsys)
    assert claims[globals()[name]]["regression"] and claims[globals()[name]]["ok"] is False
    assert sum(one["regression"] for one in claims.values()) == 1
    assert rerun(**{name: worse}) == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("REGRESSION")]
    assert len(marked) == 1 and globals()[name] in marked[0]


def test_seconds_and_scores_are_never_a_regression(rerun, capsys):
    rerun("--save")
    capsys.readouterr()
    assert rerun("--json", SECONDS=100.0, SCORE=1.0) == 0
    claims = claims_of(capsys)
    assert claims[SECONDS]["baseline"] == 1.0 and claims[SECONDS]["ok"] is None


@pytest.mark.parametrize("name, value", [("cpu", "another"), ("cores", 99)])
def test_a_baseline_of_another_machine_is_told_and_fails_nothing(rerun, capsys, monkeypatch, name, value):
    rerun("--save")
    path = bench.BASELINES / "hand.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"machine": kept["machine"] | {name: value}}))
    capsys.readouterr()
    assert rerun("--json", SPEED=0.5) == 0
    told = capsys.readouterr()
    found = {one["name"]: one for one in json.loads(told.out)["claims"]}[SPEED]
    assert (found["baseline"], found["regression"], found["ok"]) == (3.0, False, True)
    assert str(value) in told.err and str(value) in json.loads(told.out)["baseline_machine"]
    assert rerun(SPEED=0.5) == 0
    assert "another machine" in capsys.readouterr().out
    told_one_by_one(monkeypatch, [claim(SPEED, 0.5, "x", "", True)])
    assert bench.main(["hand", "--save"]) == 0
    assert (
        "baseline_machine" not in bench.stored("hand") and not bench.stored("hand")["claims"][0]["regression"]
    )
    path.write_text(json.dumps(kept | {"machine": kept["machine"] | {"memory_gb": 1, "torch": "0"}}))
    assert rerun(SPEED=0.5) == 1, "other memory or torch compares"


def test_a_missed_target_stays_missed_and_a_new_claim_is_not_compared():
    missed = [claim(SPEED, 3.0, "x", ">= 4", False), claim("new", 0.1, "x", "", None)]
    bench.compare(missed, measured(KEPT))
    assert [one["ok"] for one in missed] == [False, None]
    assert [one["regression"] for one in missed] == [False, False]


def test_a_claim_keeps_its_own_baseline_but_is_held_against_what_was_stored():
    own = claim(SPEED, 2.0, "x", "", True) | {"baseline": 7.0}
    bench.compare([own], measured(KEPT))
    assert own["baseline"] == 7.0 and own["regression"]


def test_a_stored_file_that_is_no_result_compares_nothing(rerun, capsys):
    rerun("--save")
    path = bench.BASELINES / "hand.json"
    for content in ("{", "[]", ""):
        path.write_text(content)
        assert rerun(SPEED=0.1) == 0


def test_an_area_has_its_own_options(monkeypatch, capsys):
    seen: list[Namespace] = []

    def measure(options):
        seen.append(options)
        return {"claims": []}

    def options(parser):
        parser.add_argument("--table", type=int)

    by_hand(monkeypatch, measure=measure, options=options)
    assert bench.main(["--json", "hand", "--table", "3"]) == 0
    assert bench.run("hand", ["--table", "4"])["area"] == "hand"
    assert [one.table for one in seen] == [3, 4]
    for words in (["train", "--table", "3"], ["train", "--seeds", "1,2"], ["--table"]):
        with pytest.raises(SystemExit):
            bench.main(words)
        assert "unrecognized arguments" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no bench 'nothing'"):
        bench.main(["nothing"])


# --- areas that tell their claims as they come ---------------------------------------------------------------------


def told_one_by_one(monkeypatch, claims, partial=True):
    """An area whose measurement is interrupted where a claim is None."""

    def one_by_one():
        for one in claims:
            if one is None:
                raise KeyboardInterrupt
            yield one

    by_hand(monkeypatch, measure=lambda options: {"claims": one_by_one(), "partial": partial})


def kept():
    return {one["name"]: one["value"] for one in bench.stored("hand")["claims"]}


def test_an_interrupted_run_keeps_what_it_measured_and_what_was_there(rerun, monkeypatch, capsys):
    rerun("--save")
    told_one_by_one(monkeypatch, [claim(SPEED, 4.0, "x", "", True), claim("new", 1.0, "x", "", True), None])
    with pytest.raises(KeyboardInterrupt):
        bench.main(["hand", "--save"])
    assert kept() == KEPT | {SPEED: 4.0, "new": 1.0}
    assert [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()[-2:]] == [SPEED, "new"]


def test_a_part_replaces_only_what_it_measured(rerun, monkeypatch, capsys):
    rerun("--save")
    part = [claim(SPEED, None, "x", "", None), claim(SHARE, 73.0, "%", "", True, gated=True)]
    told_one_by_one(monkeypatch, part + [claim("never", None, "x", "", None)])
    capsys.readouterr()
    assert bench.main(["hand", "--save", "--json"]) == 0
    assert kept() == KEPT | {SHARE: 73.0, "never": None}
    claims = claims_of(capsys)
    assert list(claims) == [SPEED, SHARE, "never"] and claims[SHARE]["baseline"] == 80.0


def test_a_regression_is_one_although_the_run_saves_as_it_goes(rerun, monkeypatch):
    rerun("--save")
    told_one_by_one(
        monkeypatch, [claim(SPEED, 4.0, "x", "", True), claim(MEMORY, 9.0, "x", "", True, better="lower")]
    )
    assert bench.main(["hand", "--save"]) == 1
    assert kept()[MEMORY] == KEPT[MEMORY], "the older figure stays, so that the next run is one as well"
    assert kept()[SPEED] == 4.0
    assert bench.main(["hand", "--save", "--accept"]) == 1
    assert kept()[MEMORY] == 9.0 and bench.stored("hand")["claims"][1]["regression"]
    bench.main(["hand", "--save"])
    assert not bench.stored("hand")["claims"][1]["regression"], (
        "accepted, it is what others are compared with"
    )


def test_a_whole_run_keeps_the_older_figure_of_a_regression_too(rerun):
    rerun("--save")
    assert rerun("--save", MEMORY=9.0, SECONDS=1.0) == 1
    assert kept() == KEPT | {SECONDS: 1.0}


def test_a_whole_run_or_another_machine_replaces_everything(rerun, monkeypatch):
    rerun("--save")
    told_one_by_one(monkeypatch, [claim(SPEED, 4.0, "x", "", True)], partial=False)
    bench.main(["hand", "--save"])
    assert kept() == {SPEED: 4.0}
    path = bench.BASELINES / "hand.json"
    path.write_text(path.read_text().replace(bench.machine()["cpu"], "another"))
    told_one_by_one(monkeypatch, [claim("new", 1.0, "x", "", True)])
    bench.main(["hand", "--save"])
    assert kept() == {"new": 1.0}
