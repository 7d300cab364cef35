"""The measurement of the HTTP path, on a model that is too small to mean anything."""

import pytest

from fullarc.config.model import preset
from fullarc.evals.bench_engine_http import claims, measure, overlap, update
from fullarc.model import GlmMoeDsa, save_model


def small(folder, positions=256):
    size = preset(
        "nano", vocab_size=300, eos_token_id=(0,), pad_token_id=0, max_position_embeddings=positions
    )
    save_model(GlmMoeDsa(size).init_weights(0).eval(), folder)
    return folder


@pytest.mark.slow
def test_every_number_is_measured(tmp_path, monkeypatch):
    found = measure(small(tmp_path / "m"), streams=4, queued=20, repeats=1)
    assert found.answered == 20 and found.in_process > 0 and found.ratio == found.over_http / found.in_process
    assert 0 < found.between_median_s <= found.between_p99_s
    monkeypatch.setattr("fullarc.evals.bench_engine_http.measure", lambda folder: found)
    told = {claim["name"]: claim for claim in claims(tmp_path / "m")}
    assert told["queued requests answered"]["ok"] is True
    assert {claim["target"] for claim in told.values()} == {">= 0.85", "< 3", "20"}


@pytest.mark.slow
def test_both_ways_of_finishing_a_step_are_measured_both_ways(tmp_path):
    told = overlap(small(tmp_path / "m"), streams=3, repeats=1)
    assert [claim["name"].split(":")[0] for claim in told] == ["3 streams in process", "3 streams over HTTP"]
    assert all(claim["value"] > 0 and claim["ok"] == (claim["value"] > 1) for claim in told)


@pytest.mark.slow
def test_streams_are_watched_while_weights_are_updated(tmp_path):
    longest, through = update(small(tmp_path / "m", 4096), streams=3, new=3000, updates=2)
    assert longest["value"] > 0 and longest["ok"] == (longest["value"] < 100)
    assert (through["value"], through["ok"]) == (3, True)
