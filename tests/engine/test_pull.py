"""Published weights are copied whole or not at all, and nothing of the user's is replaced; profiles are written."""

import hashlib
import json
import pstats
import re
import shutil
import sys
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pyarrow
import pytest
import torch
from running import Running, wait
from safetensors.numpy import save_file
from safetensors.torch import load_file

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


def test_what_was_not_pulled_leaves_no_folder(published, tmp_path):
    with pytest.raises(FullarcError):
        pull(published, tmp_path / "a" / "b" / "local", 77)
    assert not (tmp_path / "a").exists()


def test_engines_of_one_host_pull_into_one_folder(published, tmp_path, monkeypatch):
    """As `fullarc serve --engines N` lets them: one copies, and the others wait for it."""
    copied, copy = [], shutil.copyfile

    def slowly(source, target):
        copied.append(source.name)
        time.sleep(0.05)
        return copy(source, target)

    monkeypatch.setattr("fullarc.engine.api.pull.shutil.copyfile", slowly)
    for version in (1, 2):
        copied.clear()
        with ThreadPoolExecutor() as pool:
            pulls = [pool.submit(pull, published, tmp_path / "local", version) for _ in range(3)]
            assert [one.result() for one in pulls] == [None] * 3
        assert len(copied) == len(set(copied)) > 1
        verify_manifest(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "source"]


def weights(folder):
    """The bytes of every tensor."""
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().copy()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def publish(source, number, old, new, encoding="xor", **other):
    """A difference, written as slime's `update_weight_from_disk_delta` and `disk_delta` write it."""
    folder = source / f"weight_v{number:06d}"
    folder.mkdir()
    told = {"version": f"{number:06d}", "base_version": f"{number - 1:06d}", "delta_encoding": encoding,
            "compression_format": "zstd", "checksum_format": "adler32"} | other  # fmt: skip
    packed, sums = {}, {}
    for name, values in new.items():
        if (changed := np.flatnonzero(values != old[name])).size:
            if encoding == "xor":
                data = (values ^ old[name]).tobytes()
            else:
                data = (
                    np.uint32(len(changed)).tobytes()
                    + changed.astype("<u4").tobytes()
                    + values[changed].tobytes()
                )
            packed[name] = np.frombuffer(pyarrow.compress(data, "zstd", asbytes=True), np.uint8)
            sums[name] = f"{zlib.adler32(values):08x}"
    save_file(packed, folder / "model-00001.safetensors", metadata=sums)
    index = {"metadata": told, "weight_map": dict.fromkeys(packed, "model-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def states(talking, tmp_path):
    """The weights of versions 0 to 4: 0 the engine's own, of the others every next one changes some tensors."""
    found = [weights(talking[0])]
    for seed in range(1, 5):
        save_model(GlmMoeDsa(load_config(talking[0])).init_weights(seed), tmp_path / "states" / str(seed))
        other, names = weights(tmp_path / "states" / str(seed)), sorted(found[-1])
        found.append(found[-1] | {name: other[name] ^ seed for name in names[seed::5]})
    return found


def same(folder, state):
    found = weights(folder)
    return found.keys() == state.keys() and all((found[name] == state[name]).all() for name in state)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"\xff" * len(data)]
)
@pytest.mark.parametrize("whole", [0, 1])
def test_a_damaged_checkpoint_that_nobody_has_sums_of_is_named(http, published, tmp_path, damage, whole):
    """Whether it is what a difference was made from or the whole of a version; the engine goes on."""
    bad, local = published / "weight_v000001", tmp_path / "here" / "local"
    (bad / "manifest.json").unlink()
    shutil.rmtree(published / "weight_v000002")
    old = weights(bad)
    publish(published, 2, old, {name: tensor ^ 1 for name, tensor in old.items()})
    file = next(bad.glob("*.safetensors"))
    good = file.read_bytes()
    file.write_bytes(damage(good))
    body = {"local_checkpoint_dir": str(local), "source_dir": str(published), "target_version": 2 - whole}
    told = http.post("/pull_weights", json=body)
    assert told.status_code == 400 and f"{file} cannot be read" in told.json()["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "no folder was made"
    ask = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
    assert http.post("/generate", json=ask).json()["meta_info"]["weight_version"] == "0"
    file.write_bytes(good)
    assert http.post("/pull_weights", json=body).json()["success"]


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_slime_publishes_what_has_changed(http, talking, tmp_path, states, encoding):
    """Version 0 is the engine's own checkpoint; a host that comes late has all of it at once."""
    source, local, late = tmp_path / "source", tmp_path / "local", tmp_path / "late"
    source.mkdir()
    for version in range(5):
        if version:
            publish(source, version, states[version - 1], states[version], encoding)
        body = {"local_checkpoint_dir": str(local), "source_dir": str(source), "target_version": version}
        told = http.post("/pull_weights", json=body)
        assert told.json()["success"], told.text
        assert same(local, states[version])
        update = {"model_path": str(local), "weight_version": str(version)}
        assert http.post("/update_weights_from_disk", json=update).json()["success"]
    pull(source, late, 4, talking[0])
    assert same(late, states[4]) and (late / "tokenizer.json").is_file()
    verify_manifest(late)
    before = (local / "config.json").stat().st_ino
    http.post("/pull_weights", json=body)
    assert (local / "config.json").stat().st_ino == before, "it is that version already"


def test_a_whole_version_makes_those_before_it_unneeded(published, talking, tmp_path):
    source, local = published, tmp_path / "local"
    shutil.rmtree(source / "weight_v000001")
    state = weights(source / "weight_v000002")
    publish(source, 3, state, state | {"model.norm.weight": state["model.norm.weight"] ^ 1})
    pull(source, local, 3, talking[0])
    assert same(
        local, weights(source / "weight_v000002") | {"model.norm.weight": state["model.norm.weight"] ^ 1}
    )


def test_a_difference_that_does_not_fit_changes_nothing(talking, tmp_path, states, monkeypatch):
    source, local = tmp_path / "source", tmp_path / "local"
    source.mkdir()
    publish(source, 1, states[0], states[1])
    pull(source, local, 1, talking[0])
    few = {"model.norm.weight": states[1]["model.norm.weight"]}
    other = {"model.norm.weight": few["model.norm.weight"] ^ 1}
    for old, new, how, says in (
        (states[0] | other, states[2] | other, {}, "has the checksum"),
        (few, other, {"base_version": "3"}, "is not the"),
        (few, other, {"compression_format": "lz4"}, "'lz4'"), (few, other, {"checksum_format": "md5"}, "'md5'"),
        (few, other, {"checksum_format": "blake3"}, "needs the package blake3"),
        (few, other, {"delta_encoding": "add"}, "'add'"), (few, {"model.norm.weight": few["model.norm.weight"]},
                                                           {"version": "x"}, "version: Input should be"),
        ({"model.other": np.zeros(4, np.uint8)}, {"model.other": np.ones(4, np.uint8)}, {}, "model.other"),
    ):  # fmt: skip
        folder = publish(source, 2, old, new, **how)
        with pytest.raises(FullarcError, match=re.escape(says)):
            pull(source, local, 2, talking[0])
        shutil.rmtree(folder)
        assert same(local, states[1]), "what was pulled before is still there"
    with pytest.raises(FullarcError, match="weight_v000002"):
        pull(source, local, 2, talking[0])
    module = types.ModuleType("xxhash")
    module.xxh3_128 = hashlib.md5
    monkeypatch.setitem(sys.modules, "xxhash", module)
    folder = publish(source, 2, few, other, checksum_format="xxh3-128")
    with pytest.raises(
        FullarcError, match="has the checksum " + hashlib.md5(other["model.norm.weight"]).hexdigest()
    ):
        pull(source, local, 2, talking[0])


@pytest.mark.parametrize(
    ("told", "says"),
    [("[]", "index"), ("{", "JSON"), ("[" * 100_000, "JSON"), ("\udcff", "JSON"), ("null", "index"),
     ({"metadata": "delta_encoding"}, "metadata"), ({"metadata": ["delta_encoding"]}, "metadata"),
     ({"metadata": {"delta_encoding": "xor"}}, "version"), ({"base_version": None}, "base_version"),
     ({"base_version": []}, "base_version"), ({"checksum_format": []}, "checksum_format"),
     ({"compression_format": {}}, "compression_format"), ({"delta_encoding": None}, "delta_encoding")],
)  # fmt: skip
def test_an_index_that_is_none_is_refused_in_a_sentence(http, talking, tmp_path, told, says):
    source, folder = tmp_path, tmp_path / "weight_v000001"
    if isinstance(told, dict) and "metadata" not in told:
        publish(source, 1, {}, {}, **told)
    else:
        folder.mkdir()
        text = told if isinstance(told, str) else json.dumps(told)
        (folder / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    body = {"local_checkpoint_dir": str(tmp_path / "local"), "source_dir": str(source), "target_version": 1}
    refused = http.post("/pull_weights", json=body)
    assert refused.status_code == 400 and says in refused.json()["message"], refused.text
    assert "\n" not in refused.json()["message"] and not (tmp_path / "local").exists()


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
