"""Whose request it is, how soon and with which adapter, over HTTP and in everybody's words."""

import threading

import httpx
import pytest
from adapters import adapter, saved, stored
from running import Running, wait

from fullarc.engine import Engine
from fullarc.model import load_model

IDS = list(range(1, 30))
PLAIN = ("generate", "completions", "tito", "chat", "messages")


@pytest.fixture
def running(talking, tmp_path):
    server = Running(talking[0])
    adapter(tmp_path / "a", stored(talking[0]))
    yield server
    server.stop()


@pytest.fixture
def client(running):
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as made:
        yield made


def ask(client, route, headers=None, **fields):
    few = {"max_tokens": 3, "seed": 1, "ignore_eos": True}
    messages = {"messages": [{"role": "user", "content": "hello"}]}
    path, body = {
        "generate": ("/generate", {"input_ids": IDS, "return_logprob": True,
                                   "sampling_params": {"max_new_tokens": 3, "sampling_seed": 1, "ignore_eos": True}}),
        "completions": ("/v1/completions", {"prompt": IDS, "return_token_ids": True, "logprobs": 0} | few),
        "tito": ("/inference/v1/generate", {"token_ids": IDS, "sampling_params": few | {"logprobs": 0}}),
        "chat": ("/v1/chat/completions", messages | few),
        "messages": ("/v1/messages", messages | {"max_tokens": 3}),
    }[route]  # fmt: skip
    return client.post(path, json=body | fields, headers=headers)


def logprobs(answer):
    assert answer.status_code == 200, answer.text
    told = answer.json()
    if "meta_info" in told:
        return [value for value, _, _ in told["meta_info"]["output_token_logprobs"]]
    choice = told["choices"][0]
    if "text" in choice:
        return choice["logprobs"]["token_logprobs"]
    return [entry["logprob"] for entry in choice["logprobs"]["content"]]


KEY, ID = {"X-SMG-Routing-Key": "mine"}, {"X-Session-ID": "yours"}
TABLE = [
    *((route, {}, None, (0, "", "", "")) for route in PLAIN),
    *((route, {}, KEY, (0, "mine", "", "")) for route in PLAIN),
    *((route, {}, KEY | ID, (0, "mine", "", "")) for route in PLAIN),
    *((route, {}, ID, (0, "yours", "", "")) for route in PLAIN),
    *((route, {"session_id": "body"}, KEY, (0, "body", "", "")) for route in ("completions", "tito", "chat")),
    *((route, {"priority": 3, "cache_salt": "s"}, None, (3, "", "s", "")) for route in ("completions", "tito", "chat")),
    *((route, {"model": "a"}, None, (0, "", "", "a")) for route in PLAIN[1:]),
    *((route, {"model": "talking:a"}, None, (0, "", "", "a")) for route in PLAIN[1:]),
    *((route, {"model": "talking"}, None, (0, "", "", "")) for route in PLAIN[1:]),
    ("chat", {"lora_path": "a"}, None, (0, "", "", "a")),
    ("generate", {"priority": 3}, None, (-3, "", "", "")),
    ("generate", {"routing_key": "body"}, KEY, (0, "body", "", "")),
    ("generate", {"extra_key": "x", "cache_salt": "s"}, None, (0, "", "sx", "")),
    ("generate", {"lora_path": "a"}, None, (0, "", "", "a")),
    ("generate", {"input_ids": [IDS], "lora_path": ["a"], "extra_key": ["x"]}, None, (0, "", "x", "a")),
]  # fmt: skip


def test_every_dialect_says_it_in_its_own_words(running, client, tmp_path, monkeypatch):
    scheduler, seen = running.engine.scheduler, []
    submit = scheduler.submit
    monkeypatch.setattr(scheduler, "submit", lambda request: (seen.append(request), submit(request)))
    load = {"lora_name": "a", "lora_path": str(tmp_path / "a")}
    assert client.post("/load_lora_adapter", json=load).status_code == 200
    for route, fields, headers, expected in TABLE:
        assert ask(client, route, headers, **fields).status_code == 200
        request = seen.pop()
        found = request.priority, request.session, request.salt, request.adapter
        assert found == expected, (route, fields, headers)


@pytest.mark.parametrize("route", ["completions", "tito", "chat"])
@pytest.mark.parametrize(
    "fields",
    [{"priority": "high"}, {"priority": 1.5}, {"session_id": 3}, {"cache_salt": ""}, {"lora_path": 3}],
)
def test_bad_values_are_refused(client, route, fields):
    assert ask(client, route, **fields).status_code == 400


def test_adapters_come_and_go(running, client, talking, tmp_path):
    folder = talking[0]
    merged = saved(load_model(folder), adapter(tmp_path / "a", stored(folder)), tmp_path / "merged")
    ours = Engine(merged, max_batch=1, max_len=64).generate([IDS], 3, seeds=[1], stop_ids=())[0].logprobs
    base = logprobs(ask(client, "generate"))
    assert logprobs(ask(client, "completions", model="anything")) == base, "before there are adapters"
    load = {"lora_name": "a", "lora_path": str(tmp_path / "a")}
    told = client.post("/load_lora_adapter", json=load)
    assert told.json() == {
        "success": True,
        "error_message": None,
        "loaded_adapters": {"a": str(tmp_path / "a")},
    }
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["talking", "a"]
    assert client.get("/v1/models/a").json()["parent"] == "talking"
    assert logprobs(ask(client, "generate", lora_path="a")) == ours != base
    assert logprobs(ask(client, "tito", model="a")) == ours
    assert logprobs(ask(client, "generate")) == base
    batch = ask(client, "generate", input_ids=[IDS, IDS], lora_path=["a", None]).json()
    assert [one["meta_info"]["output_token_logprobs"][0][0] for one in batch] == [ours[0], base[0]]

    again = client.post("/v1/load_lora_adapter", json=load)
    assert again.status_code == 400 and "loaded already" in again.text
    assert client.post("/v1/load_lora_adapter", json=load | {"load_inplace": True}).text.startswith("Success")
    assert client.post("/load_lora_adapter", json=load).status_code == 200
    assert logprobs(ask(client, "generate", lora_path="a")) == ours

    for path, body in (("/v1/embeddings", {"input": IDS}), ("/v1/score", {"query": IDS, "items": [[4]],
                                                                          "label_token_ids": [5]})):  # fmt: skip
        told = [client.post(path, json=body | {"model": name}) for name in ("talking", "a", "other")]
        assert [one.status_code for one in told] == [200, 200, 400]
        key = "data" if "data" in told[0].json() else "scores"
        assert told[0].json()[key] != told[1].json()[key]
    for route in PLAIN[1:]:
        assert ask(client, route, model="other").status_code == 400
    assert ask(client, "generate", lora_path="other").status_code == 400
    assert "'other'" in ask(client, "generate", lora_path="other").text
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).text.startswith("Success")
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 404
    gone = client.post("/unload_lora_adapter", json={"lora_name": "a"})
    assert gone.status_code == 400 and gone.json()["success"] is False
    assert ask(client, "completions", model="a").status_code == 400, "and not the base"


@pytest.mark.parametrize("path", ["/load_lora_adapter", "/v1/load_lora_adapter"])
@pytest.mark.parametrize(
    "fields", [{}, {"lora_path": "/nowhere"}, {"lora_path": "/etc"}, {"lora_name": "talking"}, {"lora_name": "a b"},
               {"lora_name": ""}, {"lora_name": "x:y"}, {"lora_name": 5}, {"lora_path": "\0"}],
)  # fmt: skip
def test_a_bad_load_is_a_400_in_one_sentence(client, tmp_path, path, fields):
    body = {"lora_name": "b", "lora_path": str(tmp_path / "a")} | fields
    told = client.post(path, json=body if fields else {})
    assert told.status_code == 400 and "Traceback" not in told.text
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["talking"]


@pytest.mark.slow
def test_an_update_carries_the_adapters_and_those_who_run(server, http, checkpoints, tmp_path):
    """A request with an adapter runs on over the update; afterwards the adapter is that of the new weights."""
    adapter(tmp_path / "a", stored(checkpoints["v0"]))
    http.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": str(tmp_path / "a")})
    server.slow_down(0.01)
    answers = []

    def long_one():
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as other:
            params = {"max_new_tokens": 200, "sampling_seed": 1, "ignore_eos": True}
            body = {"input_ids": IDS, "sampling_params": params, "lora_path": "a"}
            answers.append(other.post("/generate", json=body).json())

    thread = threading.Thread(target=long_one)
    thread.start()
    wait(lambda: server.engine.scheduler.running)
    told = http.post(
        "/update_weights_from_disk", json={"model_path": str(checkpoints["v1"]), "weight_version": "x"}
    )
    assert told.status_code == 200
    thread.join(60)
    assert len(answers[0]["output_ids"]) == 200
    assert [span[0] for span in answers[0]["meta_info"]["weight_versions"]] == ["0", "x"]
    other = adapter(tmp_path / "b", stored(checkpoints["v1"]))
    whole = Engine(saved(load_model(checkpoints["v1"]), other, tmp_path / "merged"), max_batch=1, max_len=64)
    expected = whole.generate([IDS], 3, seeds=[1], stop_ids=())[0].logprobs
    assert logprobs(ask(http, "generate", lora_path="a")) == expected
    version = http.post("/update_weight_version", json={"new_version": "y"})
    assert version.status_code == 200
    assert ask(http, "generate", lora_path="a").json()["meta_info"]["weight_version"] == "y"


def test_an_urgent_request_overtakes_over_http(talking):
    """One slot, a long request, and then one of SGLang's higher priority: it ends first."""
    server, order = Running(talking[0], max_batch=1), []
    server.slow_down()
    try:

        def one(name, priority, new):
            with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as made:
                body = {"input_ids": IDS, "priority": priority,
                        "sampling_params": {"max_new_tokens": new, "ignore_eos": True}}  # fmt: skip
                told = made.post("/generate", json=body).json()
                order.append((name, len(told["output_ids"])))

        slow = threading.Thread(target=one, args=("slow", 0, 220))
        slow.start()
        wait(lambda: server.engine.scheduler.running)
        quick = threading.Thread(target=one, args=("quick", 5, 2))
        quick.start()
        quick.join(60)
        slow.join(60)
        assert order == [("quick", 2), ("slow", 220)] and server.engine.scheduler.counters.preempted == 1
        with httpx.Client(base_url=server.url, trust_env=False) as made:
            assert "vllm:num_preemptions_total 1" in made.get("/metrics").text
    finally:
        server.stop()


def test_areal_brings_one_version_of_an_adapter_after_another(running, client, talking, tmp_path):
    other = adapter(tmp_path / "b", stored(talking[0]), seed=5)
    merged = saved(load_model(talking[0]), other, tmp_path / "merged")
    for version, name in ((1, "a"), (2, "b")):
        body = {
            "lora_model_path": str(tmp_path / name),
            "lora_name": f"demo-lora-v{version}",
            "base_model_name": "base",
        }
        assert client.post("/areal_update_weights_lora", json=body).json()["success"]
        assert list(running.engine.scheduler.adapters) == [f"demo-lora-v{version}"]
    expected = Engine(merged).generate([IDS], 3, seeds=[1], stop_ids=())[0].logprobs
    told = ask(client, "generate", lora_path="demo-lora-v2")
    assert logprobs(told) == pytest.approx(expected, abs=1e-6)
    answer = client.post("/areal_update_weights_lora", json=body | {"lora_model_path": "/nowhere"})
    assert answer.status_code == 400 and list(running.engine.scheduler.adapters) == ["demo-lora-v2"]
