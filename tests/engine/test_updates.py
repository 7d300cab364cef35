"""Weights while running: from folders, tensors and shared memory; whole or in parts; what becomes of those who run."""

import asyncio
import base64
import concurrent.futures
import hashlib
import os
import pickle
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from running import Running, wait
from safetensors.torch import save

from fullarc.config.errors import FullarcError
from fullarc.engine import Engine
from fullarc.engine.api.updates import UpdateBody, Updates
from fullarc.model import load_model
from fullarc.model.checkpoint import state_to_disk

IDS = list(range(1, 40))


@pytest.fixture(scope="module")
def tensors(checkpoints):
    return state_to_disk(load_model(checkpoints["v1"]))


def generate(http, count=6, **body):
    params = {"max_new_tokens": count, "sampling_seed": 1, "ignore_eos": True}
    answer = http.post(
        "/generate", json={"input_ids": IDS, "sampling_params": params, "return_logprob": True} | body
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def logprobs(answer):
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def fresh(folder, count=6):
    return Engine(folder, max_batch=1, max_len=128).generate([IDS], count, seeds=[1], stop_ids=())[0].logprobs


def encode(tensors):
    return base64.b64encode(save({name: value.contiguous() for name, value in tensors.items()})).decode()


def test_all_tensors_at_once_make_a_fresh_engines_answers(http, tensors, checkpoints):
    assert logprobs(generate(http)) == fresh(checkpoints["v0"])
    body = {"serialized_named_tensors": [encode(tensors)], "load_format": None, "flush_cache": False,
            "weight_version": "seven"}  # fmt: skip
    told = http.post("/update_weights_from_tensor", json=body)
    assert told.status_code == 200 and told.json()["success"] is True
    after = generate(http)
    assert logprobs(after) == fresh(checkpoints["v1"]) and after["meta_info"]["weight_version"] == "seven"
    assert after["meta_info"]["cached_tokens"] == 0
    name = "model.norm.weight"
    values = http.post("/get_weights_by_name", json={"name": name, "truncate_size": 4}).json()
    assert values == tensors[name][:4].tolist()


def test_parts_are_one_update_between_begin_and_end(http, tensors, checkpoints):
    names = sorted(tensors)
    http.post("/begin_weight_update")
    for third in (names[::3], names[1::3], names[2::3]):
        part = encode({name: tensors[name] for name in third})
        told = http.post("/update_weights_from_tensor", json={"serialized_named_tensors": [part]})
        assert told.json()["success"] is True
        assert logprobs(generate(http)) == fresh(checkpoints["v0"]), "nothing changes before the end"
    assert http.post("/end_weight_update", json={"weight_version": "4"}).json()["weight_version"] == "4"
    assert logprobs(generate(http)) == fresh(checkpoints["v1"])
    assert http.post("/end_weight_update", json={}).status_code == 400


def test_a_part_that_is_still_coming_belongs_to_the_update_and_a_later_one_is_refused():
    """The engine's loop is not needed: `install` is replaced by what it would load."""
    loaded, ready = [], threading.Event()

    async def main():
        updates = Updates.__new__(Updates)
        updates.lock, updates._open = asyncio.Lock(), None
        updates.service = SimpleNamespace(collecting=set())
        updates.staging = SimpleNamespace(
            from_tensors=lambda parts, _version: loaded.append(sorted(parts)), check=lambda _parts: None
        )

        async def install(load, _version, _policy):
            async with updates.lock:
                await asyncio.to_thread(load, "1")
            return {}

        def slow():
            ready.wait(10)
            return {"late": torch.zeros(1)}

        def cut_off():
            raise FullarcError("The trainer is gone.")

        updates.install = install
        keep = UpdateBody()
        updates.open()
        await updates.parts(lambda: {"early": torch.zeros(1)}, keep)
        coming = asyncio.create_task(updates.parts(slow, keep))
        await asyncio.sleep(0)
        end = asyncio.create_task(updates.finish(keep))
        await asyncio.sleep(0)
        with pytest.raises(FullarcError, match="No weight update is open"):
            await updates.finish(keep)
        ready.set()
        await asyncio.gather(coming, end)
        assert loaded == [["early", "late"]] and not updates.service.collecting

        updates.open()
        failing = asyncio.create_task(updates.parts(cut_off, keep))
        await asyncio.sleep(0)
        with pytest.raises(FullarcError, match="A part of this update failed"):
            await updates.finish(keep)
        with pytest.raises(FullarcError, match="The trainer is gone"):
            await failing

        updates.open()
        first = updates._open
        updates.open()
        with pytest.raises(FullarcError, match="ended before"):
            first.add({})
        assert loaded == [["early", "late"]]

    asyncio.run(main())


def test_a_part_alone_changes_only_itself_and_later_parts_build_on_it(http, tensors, checkpoints, tmp_path):
    first, second = ["model.embed_tokens.weight"], [n for n in tensors if n != "model.embed_tokens.weight"]
    for part in (first, second):
        body = {"serialized_named_tensors": [encode({name: tensors[name] for name in part})]}
        assert http.post("/update_weights_from_tensor", json=body).json()["success"] is True
        if part is first:
            mixed = logprobs(generate(http))
            assert mixed != fresh(checkpoints["v0"]) and mixed != fresh(checkpoints["v1"])
    assert logprobs(generate(http)) == fresh(checkpoints["v1"])


def updates_of(server):
    return next(e.handler.__self__ for e in server.server.endpoints if e.path == "/begin_weight_update")


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("model.nothing", torch.zeros(2**20), "no tensor model.nothing"),
        ("model.norm.weight", torch.zeros(2**20), "model.norm.weight has shape (1048576,)"),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int64), "model.norm.weight is torch.int64"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_when_it_comes_and_nothing_is_kept(
    http, server, tensors, checkpoints, name, value, says
):
    http.post("/begin_weight_update")
    for part, status, told in (
        ({n: t for n, t in tensors.items() if n != name}, 200, "Kept"),
        ({name: value}, 400, says),
        ({"model.norm.weight": tensors["model.norm.weight"]}, 400, "A part of this update failed"),
    ):
        body = {"serialized_named_tensors": [encode(part)]}
        answer = http.post("/update_weights_from_tensor", json=body)
        assert answer.status_code == status and told in answer.json()["message"]
        assert bool(updates_of(server)._open._parts) is (status == 200)
    assert says in http.post("/end_weight_update", json={}).json()["message"]
    after = generate(http)
    assert logprobs(after) == fresh(checkpoints["v0"]) and after["meta_info"]["weight_version"] == "0"


def test_an_update_without_tensors_is_none(http):
    body = {"serialized_named_tensors": [encode({})]}
    assert "no tensors" in http.post("/update_weights_from_tensor", json=body).json()["message"]
    http.post("/begin_weight_update")
    assert http.post("/update_weights_from_tensor", json=body).status_code == 200
    assert http.post("/end_weight_update", json={}).status_code == 400
    assert http.get("/model_info").json()["weight_version"] == "0"


@pytest.fixture
def own(request, checkpoints, tmp_path):
    """A server of a copy of "v0", perhaps without files of some name."""
    ignore = shutil.ignore_patterns(request.param)
    shutil.copytree(checkpoints["v0"], tmp_path / "own", ignore=ignore)
    running = Running(tmp_path / "own")
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as client:
        yield running, client, tmp_path / "own", ignore
    running.stop()


@pytest.mark.parametrize("own", ["", "manifest.json"], indirect=True)
@pytest.mark.parametrize("gone", [False, True])
def test_parts_are_not_completed_from_a_folder_that_holds_something_else_by_now(
    own, tensors, checkpoints, gone
):
    """It is replaced, or deleted: what needs it is refused, and all tensors do not need it."""
    running, http, folder, ignore = own
    shutil.rmtree(folder)
    if not gone:
        shutil.copytree(checkpoints["v1"], folder, ignore=ignore)
    one = {"model.norm.weight": tensors["model.norm.weight"]}
    says = f"{folder} holds no longer what the engine loaded"
    norm = {"name": "model.norm.weight", "truncate_size": 32}

    def update(parts, status):
        answer = http.post("/update_weights_from_tensor", json={"serialized_named_tensors": [encode(parts)]})
        assert answer.status_code == status, answer.text
        return answer.json()["message"]

    assert says in update(one, 400)
    assert says in http.post("/weights_checker", json={"action": "checksum"}).text
    assert says in http.post("/get_weights_by_name", json=norm).text
    with pytest.raises(FullarcError, match="holds no longer"):
        running.engine.origin.tensors("adapters")
    assert logprobs(generate(http)) == fresh(checkpoints["v0"])
    update(tensors, 200)
    assert logprobs(generate(http)) == fresh(checkpoints["v1"])
    assert http.post("/get_weights_by_name", json=norm).json() == one["model.norm.weight"].tolist()
    update({"model.norm.weight": one["model.norm.weight"] * 2}, 200)
    assert http.post("/get_weights_by_name", json=norm).json() == (one["model.norm.weight"] * 2).tolist()


@pytest.mark.parametrize("own", ["manifest.json"], indirect=True)
def test_a_folder_without_a_manifest_completes_parts_as_long_as_it_is_untouched(own, tensors):
    _, http, folder, _ = own
    body = {"serialized_named_tensors": [encode({"model.norm.weight": tensors["model.norm.weight"]})]}
    assert http.post("/update_weights_from_tensor", json=body).status_code == 200
    assert http.post("/update_weights_from_disk", json={"model_path": str(folder)}).status_code == 200
    os.utime(folder / "model.safetensors")
    assert http.post("/update_weights_from_tensor", json=body).status_code == 400
    assert http.post("/update_weights_from_disk", json={"model_path": str(folder)}).status_code == 200
    assert http.post("/update_weights_from_tensor", json=body).status_code == 200


BOMB = Path(tempfile.mkdtemp()) / "bomb"


class Bomb:
    def __reduce__(self):
        return (Path.touch, (BOMB,))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda t: base64.b64encode(pickle.dumps(Bomb())).decode(), "pickles are never read"),
        (lambda t: "not base64!", "base64"),
        (lambda t: base64.b64encode(b"12345678901234").decode(), "not safetensors"),
        (lambda t: encode({"model.norm.weight": torch.ones(5)}), "shape"),
        (lambda t: encode({"model.nothing": torch.ones(5)}), "no tensor"),
        (lambda t: encode({"model.norm.weight": torch.full((32,), torch.nan)}), "NaN"),
    ],
)
def test_refused_tensors_change_nothing(http, tensors, checkpoints, spoil, says):
    answer = http.post("/update_weights_from_tensor", json={"serialized_named_tensors": [spoil(tensors)]})
    assert answer.status_code == 400 and says in answer.json()["message"]
    assert not BOMB.exists()
    after = generate(http)
    assert logprobs(after) == fresh(checkpoints["v0"]) and after["meta_info"]["weight_version"] == "0"


def test_slimes_bucket_format_is_refused_with_what_to_send(http):
    body = {"serialized_named_tensors": ["gASV"], "load_format": "flattened_bucket", "flush_cache": False}
    answer = http.post("/update_weights_from_tensor", json=body)
    assert answer.status_code == 400 and "safetensors" in answer.json()["message"]


def test_weights_from_shared_memory(http, tensors, checkpoints):
    data = save({name: value.contiguous() for name, value in tensors.items()})
    path = Path("/dev/shm/fullarc-test-weights")
    path.write_bytes(data)
    try:
        wrong = {"shared_memory": path.name, "sha256": "0" * 64}
        answer = http.post("/update_weights_from_ipc", json=wrong)
        assert answer.status_code == 400 and "SHA-256" in answer.json()["message"]
        right = {"shared_memory": path.name, "sha256": hashlib.sha256(data).hexdigest()}
        assert http.post("/update_weights_from_ipc", json=right).json()["success"] is True
    finally:
        path.unlink()
    assert logprobs(generate(http)) == fresh(checkpoints["v1"])
    for name in ("../etc/passwd", "..", "gone"):
        assert http.post("/update_weights_from_ipc", json={"shared_memory": name}).status_code == 400


def test_the_manifest_can_be_named(http, checkpoints):
    right = hashlib.sha256((checkpoints["v1"] / "manifest.json").read_bytes()).hexdigest()
    body = {"model_path": str(checkpoints["v1"]), "manifest_sha256": "0" * 64}
    answer = http.post("/update_weights_from_disk", json=body)
    assert answer.status_code == 400 and right in answer.json()["message"]
    assert (
        http.post("/update_weights_from_disk", json=body | {"manifest_sha256": right}).json()["success"]
        is True
    )
    for folder in ("9" * 400, "a\0b", "", "/proc/self/mem/x"):
        for more in ({}, {"manifest_sha256": right}):
            answer = http.post("/update_weights_from_disk", json={"model_path": folder} | more)
            assert answer.status_code == 400 and answer.json()["message"], folder
    renamed = http.post("/update_weight_version", json={"new_version": "mine"})
    assert renamed.status_code == 200 and http.get("/model_info").json()["weight_version"] == "mine"


@pytest.mark.parametrize("policy", ["keep", "recompute", "drop"])
def test_what_becomes_of_a_running_request(http, server, checkpoints, policy):
    server.slow_down()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(generate, http, 150)
        s = server.engine.scheduler
        wait(lambda: any(len(r.logprobs) > 3 for r in list(s.running.values())))
        body = {"model_path": str(checkpoints["v1"]), "kv_policy": policy}
        assert http.post("/update_weights_from_disk", json=body).json()["success"] is True
        answer = future.result(60)
    meta = answer["meta_info"]
    (_, _, cut), *rest = meta["weight_versions"]
    old = Engine(checkpoints["v0"], max_batch=1, max_len=256)
    assert logprobs(answer)[:cut] == old.generate([IDS], cut, seeds=[1], stop_ids=())[0].logprobs
    if policy == "drop":
        assert meta["finish_reason"]["type"] == "abort" and not rest and len(answer["output_ids"]) == cut
        return
    assert meta["completion_tokens"] == 150 and [span[0] for span in rest] == ["1"]
    new = Engine(checkpoints["v1"], max_batch=1, max_len=256).score([IDS + answer["output_ids"]])[0][
        len(IDS) + cut :
    ]
    assert (logprobs(answer)[cut:] == new) is (policy == "recompute")


def test_service_goes_on_during_an_update(http, server, checkpoints):
    """Weights change three times under four requests: all of these end, and what follows is a fresh engine's."""
    server.slow_down()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        load = [pool.submit(generate, http, 200) for _ in range(4)]
        wait(lambda: server.engine.scheduler.counters.generated_tokens > 40)
        for name in ("v1", "v0", "v1"):
            http.post("/update_weights_from_disk", json={"model_path": str(checkpoints[name])})
        answers = [future.result(60) for future in load]
    assert all(answer["meta_info"]["completion_tokens"] == 200 for answer in answers)
    assert any(len(answer["meta_info"]["weight_versions"]) > 1 for answer in answers)
    assert logprobs(generate(http)) == fresh(checkpoints["v1"])


def test_embeddings_are_the_last_hidden_state(http, checkpoints):
    model = load_model(checkpoints["v0"])
    with torch.no_grad():
        expected = model.trunk(torch.tensor([IDS])).hidden_BTD[0, -1]
    told = http.post("/v1/embeddings", json={"input": [IDS, [1, 2]]}).json()
    torch.testing.assert_close(torch.tensor(told["data"][0]["embedding"]), expected, atol=1e-5, rtol=1e-5)
    assert told["usage"]["prompt_tokens"] == len(IDS) + 2
    packed = http.post("/v1/embeddings", json={"input": IDS, "encoding_format": "base64"}).json()
    floats = torch.frombuffer(
        bytearray(base64.b64decode(packed["data"][0]["embedding"])), dtype=torch.float32
    )
    assert floats.tolist() == told["data"][0]["embedding"], "also where the prefix was cached"
    native = http.post("/encode", json={"input_ids": IDS}).json()
    assert (
        native["embedding"] == told["data"][0]["embedding"] and native["meta_info"]["weight_version"] == "0"
    )
