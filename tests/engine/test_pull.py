"""Published weights are copied whole or not at all, and nothing of the user's is replaced; profiles are written."""

import json
import pstats

import httpx
import pytest
from running import Running, wait

from fullarc.config.errors import FullarcError
from fullarc.config.files import verify_manifest
from fullarc.engine import Engine
from fullarc.engine.api.pull import pull
from fullarc.model import GlmMoeDsa, load_config, save_model

IDS = [3, 1, 4, 1, 5]


@pytest.fixture
def http(talking):
    running = Running(talking[0])
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as made:
        yield made
    running.stop()


@pytest.fixture
def published(talking, tmp_path):
    """Versions 1 and 2 as slime's trainer lays them down."""
    for version in (1, 2):
        model = GlmMoeDsa(load_config(talking[0])).init_weights(version)
        save_model(model, tmp_path / "source" / f"weight_v{version:06d}", tokenizer_dir=talking[0])
    return tmp_path / "source"


def test_slime_pulls_and_then_updates_from_disk(http, published, tmp_path):
    local = tmp_path / "local" / "model"
    for version in (1, 2, 2):
        body = {
            "local_checkpoint_dir": str(local),
            "source_dir": str(published),
            "target_version": version,
        }
        assert http.post("/pull_weights", json=body).json()["success"]
        body = {"model_path": str(local), "weight_version": str(version)}
        assert http.post("/update_weights_from_disk", json=body).json()["success"]
        ask = {
            "input_ids": IDS,
            "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
        }
        told = http.post("/generate", json=ask).json()
        fresh = Engine(published / f"weight_v{version:06d}").generate([IDS], 4, temperature=0.0, stop_ids=())[
            0
        ]
        assert told["output_ids"] == fresh.token_ids and told["meta_info"]["weight_version"] == str(version)
    assert [path.name for path in local.parent.iterdir()] == ["model"], "no other folder is left"
    body = {"local_checkpoint_dir": str(local), "source_dir": str(published), "target_version": 3}
    answer = http.post("/pull_weights", json=body)
    assert answer.status_code == 400 and "weight_v000003" in answer.json()["message"]
    verify_manifest(local)


def test_only_what_was_pulled_is_replaced(published, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("keep")
    with pytest.raises(FullarcError, match="was not pulled"):
        pull(published, mine, 1)
    assert [path.name for path in mine.iterdir()] == ["notes"]


@pytest.mark.parametrize("how", ["torn", "no weights", "disk"])
def test_a_version_that_cannot_be_copied_leaves_the_one_before(published, tmp_path, monkeypatch, how):
    local = tmp_path / "local"
    pull(published, local, 1)
    before = {path.name: path.read_bytes() for path in local.iterdir()}
    bad = published / "weight_v000002"
    if how == "torn":
        weights = next(bad.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "no weights":
        for path in bad.glob("*.safetensors"):
            path.unlink()
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fullarc.engine.api.pull.shutil.copyfile", full)
    with pytest.raises(FullarcError):
        pull(published, local, 2)
    assert {path.name: path.read_bytes() for path in local.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "source"]
    assert json.loads(before["pulled.json"])["version"] == 1


def test_profiles_are_of_the_engines_thread(http, tmp_path):
    ask = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 12, "ignore_eos": True}}
    assert http.post("/stop_profile", json={}).status_code == 400
    for number, steps in enumerate((None, 3), 1):
        body = {"output_dir": str(tmp_path), "num_steps": steps}
        assert http.post("/start_profile", json=body).status_code == 200
        assert http.post("/start_profile", json=body).status_code == 400, "one at a time"
        assert http.post("/generate", json=ask).status_code == 200
        if steps is None:
            assert http.post("/stop_profile", json={}).status_code == 200
        wait(lambda n=number: len(list(tmp_path.glob("*.pstats"))) == n)
    assert http.post("/start_profile", json={"output_dir": "relative"}).status_code == 400
    counts = []
    for path in sorted(tmp_path.glob("*.pstats")):
        calls = pstats.Stats(str(path)).stats.items()
        counts.append(sum(n for (file, _, name), (n, *_) in calls if name == "step" and "scheduler" in file))
    assert counts[0] >= 12 and counts[1] >= 3
