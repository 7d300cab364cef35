"""The paper's tables in miniature: verdicts by hand, metrics against other ways to compute them, and a small bench."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fullarc.config.errors import UsageError
from fullarc.config.machine import machine
from fullarc.config.model import ATTENTIONS, preset
from fullarc.config.stages import DSA, Data, Midtrain, Pretrain
from fullarc.evals import bench, bench_paper, paper_runs
from fullarc.evals.paper_metrics import bits_per_byte, held_rows, largest_logit, questions, recall
from fullarc.evals.paper_tables import Claim, Metric, interval, judge, tables
from fullarc.model import GlmMoeDsa, load_model

LOSS = Metric("loss", "loss", "lower")
SHARE = Metric("share", "share", factor=100)


def results(metric: str, first: list[float], second: list[float]) -> dict:
    return {
        name: {seed: {metric: value} for seed, value in enumerate(values, start=1)}
        for name, values in (("a", first), ("b", second))
    }


# --- verdicts --------------------


def test_the_interval_is_students() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t of 2 degrees 2.920."""
    centre, low, high = interval([1.0, 2.0, 3.0])
    assert centre == 2 and high - 2 == pytest.approx(2 - low) == pytest.approx(2.920 / math.sqrt(3))
    assert interval([1.0]) == (1.0, -math.inf, math.inf)
    flat = [0.0, 1.0] * 10
    assert interval(flat)[2] - 0.5 == pytest.approx(1.645 * math.sqrt(20 * 0.25 / 19 / 20))


@pytest.mark.parametrize(
    "first, second, verdict",
    [
        ([1.0, 2.0, 3.0], [1.1, 2.1, 3.1], "yes"),  # seeds differ far more than the pairs
        ([1.1, 2.1, 3.1], [1.0, 2.0, 3.0], "no"),
        ([1.0, 2.0, 3.0], [1.1, 2.3, 3.0], "within the spread"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "within the spread"),
        ([1.0], [2.0], "within the spread"),
    ],
)
def test_lower_is_better_of_a_loss(first: list[float], second: list[float], verdict: str) -> None:
    assert judge(Claim("a", "b", LOSS, ""), results("loss", first, second))["verdict"] == verdict


@pytest.mark.parametrize(
    "first, tolerance, verdict",
    [
        ([0.52, 0.50, 0.51], 5, "yes"),
        ([0.52, 0.50, 0.51], 1, "within the spread"),
        ([0.62, 0.60, 0.61], 5, "no"),
        ([0.42, 0.40, 0.41], 5, "no"),
        ([0.62, 0.40, 0.51], 5, "within the spread"),
    ],
)
def test_level_is_judged_by_its_tolerance(first: list[float], tolerance: float, verdict: str) -> None:
    claim = Claim("a", "b", SHARE, "", "level", tolerance)
    found = judge(claim, results("share", first, [0.50, 0.50, 0.50]))
    assert found["verdict"] == verdict
    assert found["per_seed"] == pytest.approx([100 * (one - 0.5) for one in first])


def test_a_tolerance_may_be_a_share_of_the_second() -> None:
    claim = Claim("a", "b", LOSS, "", "level", 0.01, relative=True)
    found = judge(claim, results("loss", [2.01, 2.01], [2.0, 2.0]))
    assert found["tolerance"] == pytest.approx(0.02) and found["verdict"] == "yes"


def test_only_common_seeds_are_compared() -> None:
    told = results("share", [0.9, 0.9, 0.9], [0.1, 0.1, 0.1])
    del told["a"][2]
    found = judge(Claim("a", "b", SHARE, ""), told)
    assert found["seeds"] == [1, 3] and len(found["per_seed"]) == 2
    assert judge(Claim("a", "c", SHARE, ""), told)["verdict"] == "not run"


def test_every_table_speaks_of_variants_and_metrics_that_exist() -> None:
    known = tables((128, 1024))
    assert tuple(known) == bench_paper.NUMBERS
    for table in known.values():
        assert table.variants.keys() <= paper_runs.VARIANTS.keys()
        assert all(len(row) == len(table.paper_columns) for row in table.paper_rows)
        for claim in table.claims:
            assert {claim.first, claim.second} <= table.variants.keys() and claim.metric in table.metrics
    used = {variant for table in known.values() for variant in table.variants}
    assert used == paper_runs.VARIANTS.keys()


def test_the_papers_means_are_those_of_its_rows() -> None:
    for row in tables((128,))[1].paper_rows:
        figures = [float(cell) for cell in row[1:]]
        assert sum(figures[:-1]) / 7 == pytest.approx(figures[-1], abs=0.05)


# --- the bench at a size that takes seconds --------------------


def nano() -> paper_runs.Scale:
    few = {"steps": 2, "batch_tokens": 512, "lr": 5e-3, "lr_end": 1e-3, "warmup_steps": 0}
    return paper_runs.Scale(
        size="nano",
        data=Data(sources=["local"], max_mb=0.3, tokenizer_mb=0.1),
        short=Pretrain(seq_len=64, **few),
        base=Pretrain(seq_len=64, **few),
        long=Midtrain(seq_len=256, trajectory_share=0.0, synthetic_share=0.5, **few),
        dsa=DSA(seq_len=256, indexer_steps=2, **few),
        topk=32,
        window=16,
        lengths=(160, 256),
        cases=2,
        held_rows=2,
        prompts=2,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def lab(runs: Path) -> paper_runs.Lab:
    lab = paper_runs.Lab(runs, nano())
    lab.rows(lab.scale.long)
    return lab


@pytest.mark.slow
@pytest.mark.parametrize("number", bench_paper.NUMBERS)
def test_a_table_is_trained_printed_and_judged(number: int, lab: paper_runs.Lab) -> None:
    result = bench_paper.run([number], [1, 2], lab)
    table = tables(lab.scale.lengths)[number]
    measured = result["tables"][str(number)]
    for variant in table.variants:
        for seed in (1, 2):
            metrics = measured["variants"][variant][seed]["metrics"]
            assert all(math.isfinite(metrics[metric.key]) for metric in table.metrics), variant
    assert {claim["verdict"] for claim in measured["claims"]} <= {"yes", "no", "within the spread"}
    said = bench_paper.show({"machine": machine()} | json.loads(json.dumps(result)))
    for row in table.paper_rows:
        assert row[0] in said and row[1] in said
    assert all(title in said for title in table.variants.values()) and "not run" not in said


def test_a_half_done_table_trains_only_what_is_missing(
    lab: paper_runs.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its third training; then a fresh process's lab of the same folder."""
    trained: list[tuple[str, int]] = []

    def fake(name: str, stop_at: int) -> object:
        def train(lab: paper_runs.Lab, seed: int) -> dict:
            if len(trained) == stop_at:
                raise KeyboardInterrupt
            trained.append((name, seed))
            return {"metrics": {"accept": 1.0, "bpb": 1.0} | {f"draft_{i}": 0.5 for i in range(1, 5)}}

        return train

    names = list(tables((1,))[2].variants)
    other = replace(lab.scale, prompts=99)  # other settings: a folder of its own
    monkeypatch.setattr(paper_runs, "VARIANTS", {name: fake(name, 2) for name in names})
    with pytest.raises(KeyboardInterrupt):
        bench_paper.run([2], [1, 2], paper_runs.Lab(lab.folder.parent, other))
    assert trained == [(names[0], 1), (names[1], 1)]
    done = bench_paper.run([2], [1, 2], paper_runs.Lab(lab.folder.parent, other), only_finished=True)
    assert [list(by_seed) for by_seed in done["tables"]["2"]["variants"].values()] == [[1], [1], []]
    assert "not run" in bench_paper.show({"machine": machine()} | done)
    torn = paper_runs.Lab(lab.folder.parent, other).path(names[1], 1)
    torn.write_text(torn.read_text()[:20])
    monkeypatch.setattr(paper_runs, "VARIANTS", {name: fake(name, -1) for name in names})
    bench_paper.run([2], [1, 2], paper_runs.Lab(lab.folder.parent, other))
    assert trained[2:] == [(names[1], 1), (names[2], 1), *((name, 2) for name in names)]


@pytest.mark.slow
def test_a_result_is_a_function_of_variant_and_seed(lab: paper_runs.Lab, tmp_path: Path) -> None:
    first = lab.result("dsa", 3)
    again = paper_runs.Lab(tmp_path, nano()).result("dsa", 3)
    assert first["metrics"] == again["metrics"] != lab.result("dsa", 4)["metrics"]
    warm, base = load_model(lab.warmed_up(3)), load_model(lab.base(3))
    for name, value in base.state_dict().items():
        assert torch.equal(value, warm.state_dict()[name]) == (".indexer." not in name), name


@pytest.mark.slow
def test_the_search_takes_the_best_of_all_half_patterns(
    lab: paper_runs.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"SF": 1.0, "FS": 2.0}
    monkeypatch.setattr(
        paper_runs, "recall", lambda model, tok, asked: {"nats": costs[model.config.attention_pattern]}
    )
    assert lab.search(1) == "SF"
    costs["FS"] = 0.5
    assert lab.search(1) == "FS"


# --- metrics --------------------


def test_recall_is_what_greedy_decoding_writes(lab: paper_runs.Lab) -> None:
    model = GlmMoeDsa(preset("nano", index_topk=2048)).init_weights(0, induction=True)
    asked = questions(lab.tok, lab.held, 160, 4, 1)
    assert [one.sort for one in asked[:3]] == ["needle", "multi_key", "multi_value"]

    def written(prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    with torch.no_grad():
        # make half of the answers right by asking for what the model writes
        asked = [
            replace(one, answer_ids=written(one.prompt_ids, len(one.answer_ids))) if i % 2 else one
            for i, one in enumerate(asked)
            if one.sort != "multi_value"
        ]
        right = written(asked[0].prompt_ids, len(asked[0].answer_ids))
        asked[0] = replace(
            asked[0], answer_ids=[*right[:-1], (right[-1] + 1) % 512]
        )  # all but its last token
        assert len(right) > 1
        expected = {
            sort: [
                written(one.prompt_ids, len(one.answer_ids)) == one.answer_ids
                for one in asked
                if one.sort == sort
            ]
            for sort in ("needle", "multi_key")
        }
        costs = [
            -model(torch.tensor([[*one.prompt_ids, *one.answer_ids]]))
            .logits[0]
            .log_softmax(-1)[at - 1, token]
            for one in asked
            for at, token in enumerate(one.answer_ids, start=len(one.prompt_ids))
        ]
    found = recall(model, lab.tok, asked)
    for sort, hits in expected.items():
        assert found[sort] == sum(hits) / len(hits)
    assert 0 < sum(expected["needle"] + expected["multi_key"]) < len(asked)
    assert found["nats"] == pytest.approx(float(torch.stack(costs).mean()), rel=1e-4)


def test_each_of_several_values_counts(lab: paper_runs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three values, the second of two tokens, to a model that always writes token 0: one of the three is right."""
    (one,) = [case for case in questions(lab.tok, lab.held, 160, 1, 1) if case.sort == "multi_value"]
    words = {0: b" 47", 1: b",", 2: b" 8", 3: b"1", 4: b" 12", 5: b"."}
    monkeypatch.setattr(lab.tok, "token_bytes", words.__getitem__)
    model = GlmMoeDsa(preset("nano", index_topk=2048)).init_weights(0)
    with torch.no_grad():
        model.norm.weight.zero_()  # all logits equal: the lowest token id is the first choice
    answered = replace(one, answer_ids=[0, 1, 2, 3, 1, 4, 5])
    assert recall(model, lab.tok, [answered])["values"] == pytest.approx(1 / 3)
    half = replace(one, answer_ids=[4, 1, 0, 3, 1, 4, 5])
    assert recall(model, lab.tok, [half])["values"] == 0, "half a number is none"


def test_bits_per_byte_by_hand(lab: paper_runs.Lab) -> None:
    model = GlmMoeDsa(preset("nano", index_topk=2048)).init_weights(0)
    held = held_rows(lab.tok, ["The lamp is on the table, and the door is open."] * 20, 64, 2, skip=32)
    assert (held.ids_BT[:, 32:] == lab.tok.id("<|endoftext|>")).any()
    eos, bits, size = lab.tok.id("<|endoftext|>"), 0.0, 0
    with torch.no_grad():
        logp = model(held.ids_BT).logits.log_softmax(-1)
    for row in range(2):
        for at in range(32, 64):
            token = int(held.ids_BT[row, at])
            if token != eos:
                bits -= float(logp[row, at - 1, token]) / math.log(2)
                size += len(lab.tok.token_bytes(token))
    assert bits_per_byte(model, lab.tok, held) == pytest.approx(bits / size, rel=1e-5)


@pytest.mark.parametrize("shape", ["mla", "gqa"])
def test_the_largest_logit_is_that_of_the_attention_itself(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the queries and keys that reach torch's attention."""
    model = GlmMoeDsa(preset("nano", **ATTENTIONS[shape], index_topk=2048)).init_weights(0)
    seen: list[float] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, scale, **kwargs):  # type: ignore[no-untyped-def]
        scores = (q @ k.mT * scale).masked_fill(torch.ones(q.shape[-2:-1] * 2).triu(1).bool(), -torch.inf)
        seen.append(scores.max().item())
        return plain(q, k, v, *args, scale=scale, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    assert largest_logit(model, ids) == pytest.approx(max(seen), rel=1e-4) and len(seen) == 2
    seen.clear()
    model.trunk(ids)
    assert len(seen) == 2 and not any(module._forward_pre_hooks for module in model.modules())


# --- the command line --------------------


@pytest.mark.parametrize("argv", [["--table", "5"], ["--table", "x"], ["--seeds", ""], ["--seeds", "-1"]])
def test_bad_options_are_named(argv: list[str]) -> None:
    with pytest.raises(UsageError, match="table|--seeds"):
        bench.main(["paper", *argv])


def test_the_command_prints_and_saves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lab = paper_runs.Lab(tmp_path / "runs", paper_runs.laptop())
    for seed, (one, three) in enumerate([(2.0, 2.3), (2.1, 2.4), (2.0, 2.31)], start=1):
        for variant, accept in (("mtp-1", one), ("mtp-3", three)):
            metrics = {"accept": accept, "bpb": 2.0} | {f"draft_{i}": 0.5 for i in range(1, 5)}
            path = lab.path(variant, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"variant": variant, "seed": seed, "metrics": metrics}))
    assert (
        bench.main(["paper", "--table", "2", "--finished", "--save", "--runs", str(tmp_path / "runs")]) == 0
    )
    said = capsys.readouterr().out
    assert "2.337 (2.300 to 2.400)" in said and "2.76" in said and "not run" in said
    line = next(line for line in said.splitlines() if line.startswith("2.76 > 2.55"))
    assert "  yes  " in line and "+0.3033" in line
    kept = json.loads((tmp_path / "bench/baselines/paper.json").read_text())
    assert kept["tables"]["2"]["claims"][0]["verdict"] == "yes" and kept["seeds"] == [1, 2, 3]
