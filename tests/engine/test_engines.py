"""Two real engines behind one gateway: both work, a session stays, and what changes an engine reaches both."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from adapters import adapter, stored
from running import Running, wait

from fullarc.config.errors import FullarcError
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.replicas import Replicas
from fullarc.rollout.serve import serving

SLOW_S = 300.0


@pytest.fixture
def two(talking):
    with contextlib.ExitStack() as stack:
        running = [Running(talking[0]) for _ in range(2)]
        for one in running:
            stack.callback(one.stop)
        yield running


@pytest.fixture
def web(two, talking):
    app = Gateway(Replicas([one.url for one in two]), talking[1], max_len=256, passes="all").app
    with serving(app) as url, httpx.Client(base_url=url, timeout=SLOW_S, trust_env=False) as client:
        yield client


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def served(two):
    return [one.engine.scheduler.counters.requests for one in two]


def generate(web, seed, session=""):
    params = {"max_new_tokens": 20, "sampling_seed": seed, "ignore_eos": True}
    ask = {"input_ids": [*range(3, 100)], "sampling_params": params}
    answer = web.post("/generate", json=ask, headers={"X-SMG-Routing-Key": session} if session else {})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_both_work_and_a_session_stays(web, two, pool):
    for one in two:
        one.slow_down(0.02)
    answers = list(pool.map(lambda seed: generate(web, seed), range(8)))
    assert served(two) == [4, 4], "the least busy one is asked"
    assert generate(web, 5)["output_ids"] == answers[5]["output_ids"], "whoever answers"
    chosen = set()
    for name in ("a", "b", "c", "d"):
        before = served(two)
        list(pool.map(lambda seed, name=name: generate(web, seed, name), range(3)))
        for path in ("/v1/chat/completions", "/v1/completions"):  # recorded, and handed on
            body = {"messages": [{"role": "user", "content": "hi"}], "prompt": [1], "max_tokens": 2}
            web.post(path, json=body, headers={"X-Session-ID": name}).raise_for_status()
        grown = [b - a for a, b in zip(before, served(two), strict=True)]
        assert sorted(grown) == [0, 5]
        chosen.add(grown.index(5))
    assert chosen == {0, 1}


def test_what_changes_an_engine_reaches_both(web, two, pool, talking):
    def versions():
        return [one.engine.scheduler.version for one in two]

    list(pool.map(lambda seed: generate(web, seed), range(4)))
    assert all(len(one.engine.scheduler.prefix) for one in two)
    assert web.get("/flush_cache").status_code == 200
    assert not any(len(one.engine.scheduler.prefix) for one in two)
    update = {"model_path": str(talking[0]), "weight_version": "5"}
    told = web.post("/update_weights_from_disk", json=update)
    assert told.json()["success"] is True and versions() == ["5", "5"]
    two[1].server.service.worker.call(lambda s: s.rename("6")).result(SLOW_S)
    bad = web.post("/update_weights_from_disk", json=update | {"model_path": "/nowhere"})
    assert bad.status_code == 400 and "/nowhere" in bad.json()["message"] and versions() == ["5", "6"]
    web.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    waiting = [pool.submit(generate, web, seed) for seed in range(4)]
    wait(lambda: [w["load"] for w in web.get("/workers").json()["workers"]] == [2, 2], SLOW_S)
    assert web.get("/flush_cache").status_code == 400
    assert web.post("/abort_request", json={"abort_all": True}).status_code == 200
    assert {w.result()["meta_info"]["finish_reason"]["type"] for w in waiting} == {"abort"}
    assert web.post("/continue_generation").status_code == 200
    assert generate(web, 0)["meta_info"]["completion_tokens"] == 20


@pytest.mark.parametrize("has", [0, 1])
def test_the_answer_is_that_of_one_that_refused(web, two, has):
    adapters = two[has].engine.scheduler.adapters
    adapters["x"] = object()
    assert web.post("/unload_lora_adapter", json={"lora_name": "x"}).status_code == 400, "the other has none"
    assert "x" not in adapters


def refuse_weights(running, monkeypatch):
    """From now on this engine takes no checkpoint."""
    endpoints = running.server.endpoints
    updates = next(e.handler.__self__ for e in endpoints if e.path == "/update_weights_from_disk")

    def refused(*_args):
        raise FullarcError("This one takes none.")

    monkeypatch.setattr(updates.staging, "from_folder", refused)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_that_has_not_the_weights_of_the_others_is_taken_out(web, two, talking, monkeypatch, bad):
    with monkeypatch.context() as patch:
        refuse_weights(two[bad], patch)
        update = {"model_path": str(talking[0]), "weight_version": "5"}
        told = web.post("/update_weights_from_disk", json=update).json()
        assert told["success"] is True and told["weight_version"] == "5"
        (gone,) = told["taken_out"]
        assert (
            gone["url"] == two[bad].url and "takes none" in gone["said"] and two[bad].url in told["message"]
        )
    assert [w["url"] for w in web.get("/workers").json()["workers"]] == [two[1 - bad].url]
    assert {generate(web, seed)["meta_info"]["weight_version"] for seed in range(4)} == {"5"}
    assert served(two)[bad] == 0
    back = web.post("/workers", json={"url": two[bad].url})
    assert back.status_code == 400 and "weight_version 0, the others 5" in back.json()["error"]["message"]
    with httpx.Client(base_url=two[bad].url, trust_env=False, timeout=SLOW_S) as alone:
        alone.post("/update_weights_from_disk", json=update).raise_for_status()
    assert web.post("/workers", json={"url": two[bad].url}).status_code == 202
    for one in two:
        one.slow_down(0.02)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: generate(web, seed), range(8)))
    assert served(two)[bad] > 0, "it works again"


def test_what_all_refuse_takes_nobody_out_and_what_is_gone_is(web, two, talking, monkeypatch):
    with monkeypatch.context() as patch:
        for one in two:
            refuse_weights(one, patch)
        update = {"model_path": str(talking[0]), "weight_version": "5"}
        assert web.post("/update_weights_from_disk", json=update).status_code == 400
        assert web.get("/workers").json()["total"] == 2
    two[0].stop()
    assert web.post("/pause_generation").status_code == 503, "a pause is not an update"
    told = web.post("/update_weights_from_disk", json=update).json()
    assert told["success"] is True and told["taken_out"][0]["url"] == two[0].url
    web.post("/continue_generation").raise_for_status()
    assert web.get("/health").status_code == 200 and generate(web, 1)["meta_info"]["weight_version"] == "5"


def test_what_engines_tell_of_themselves_is_put_together(web, two, pool):
    list(pool.map(lambda seed: generate(web, seed), range(6)))
    web.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    waiting = [pool.submit(generate, web, seed) for seed in range(4)]
    try:
        wait(lambda: web.get("/load").json() == {"server_load": 4}, SLOW_S)
        assert [(row["dp_rank"], row["num_reqs"]) for row in web.get("/get_load").json()] == [(0, 2), (1, 2)]
        loads = web.get("/v1/loads?include=core").json()
        assert loads["num_waiting_reqs"] == loads["aggregate"]["num_waiting_reqs"] == 4
        assert [(one["dp_rank"], one["num_waiting_reqs"]) for one in loads["loads"]] == [(0, 2), (1, 2)]
        for path in ("/server_info", "/get_server_info"):
            info = web.get(path).json()
            assert info["dp_size"] == len(info["internal_states"]) == 2 and info["max_running_requests"] == 8
            assert info["weight_version"] == "0"
        for path in ("/metrics", "/engine_metrics"):
            answer = web.get(path)
            assert answer.headers["content-type"].startswith("text/plain")
            lines, name = answer.text.splitlines(), "sglang:num_requests_total"
            heads = [line for line in lines if line.startswith("#")]
            assert len(set(heads)) == len(heads), "a family in one place"
            at = lines.index(f"# TYPE {name} counter")
            assert lines[at + 1 : at + 3] == [
                f'{name}{{worker_addr="{one.url}"}} {n}' for one, n in zip(two, served(two), strict=True)
            ]
            assert 'sglang:queue_time_seconds_bucket{le="+Inf",worker_addr="' in answer.text
    finally:
        web.post("/abort_request", json={"abort_all": True})
    [one.result() for one in waiting]
    two[0].stop()
    assert two[0].url not in web.get("/engine_metrics").text and two[1].url in web.get("/engine_metrics").text


def test_a_session_of_sglang_is_one_engines(web):
    opened = web.post("/open_session", json={"capacity_of_str_len": 1000})
    assert opened.status_code == 400 and "X-SMG-Routing-Key" in opened.json()["error"]["message"]
    for name in ("a", "b", "c", "d"):
        key = {"X-SMG-Routing-Key": name}
        session = web.post("/open_session", json={"capacity_of_str_len": 1000}, headers=key).json()
        for _ in range(2):
            body = {
                "input_ids": [1, 2],
                "session_params": {"id": session},
                "sampling_params": {"max_new_tokens": 2},
            }
            assert web.post("/generate", json=body, headers=key).status_code == 200
        assert web.post("/close_session", json={"session_id": session}, headers=key).status_code == 200


def test_the_engines_are_listed_as_workers(web, two):
    workers = web.get("/workers").json()
    assert [(w["id"], w["url"], w["is_healthy"], w["load"]) for w in workers["workers"]] == [
        (str(n), one.url, True, 0) for n, one in enumerate(two)
    ]
    assert workers["total"] == 2 and web.get("/list_workers").json() == {"urls": [one.url for one in two]}
    assert web.get("/workers/1").json() == workers["workers"][1]
    group = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}
    told = web.post("/init_weights_update_group", json=group)
    assert told.status_code == 400 and "these are 2" in told.json()["error"]["message"]
    two[1].stop()
    assert [w["is_healthy"] for w in web.get("/workers").json()["workers"]] == [True, False]
    assert web.get("/health").status_code == 503


def test_workers_come_and_go_and_sessions_stay(web, two, pool, talking):
    """As slime's engines enter and leave SGLang's router."""
    third = Running(talking[0])
    try:
        before = {name: where(web, two, name) for name in "abcdefgh"}
        added = web.post("/workers", json={"url": third.url, "worker_type": "regular"})
        added.raise_for_status()
        assert added.json()["worker_id"] == "2" and added.headers["location"] == "/workers/2"
        after = {name: where(web, [*two, third], name) for name in before}
        assert set(after.values()) == {0, 1, 2}
        assert all(after[name] in (before[name], 2) for name in before), "only to the new one"
        for worker in web.get("/workers").json()["workers"]:
            if worker["url"] == two[0].url:
                web.delete(f"/workers/{worker['id']}").raise_for_status()
        gone = served(two)[0]
        rest = {name: where(web, [*two, third], name) for name in before}
        assert all(rest[name] == after[name] for name in before if after[name]) and served(two)[0] == gone
        web.post("/remove_worker", params={"url": third.url}).raise_for_status()
        web.post("/add_worker", params={"url": two[0].url}).raise_for_status()
        assert web.get("/list_workers").json() == {"urls": [two[1].url, two[0].url]}
    finally:
        third.stop()


def test_a_worker_has_the_adapters_of_the_others_and_none_comes_within_an_update(web, two, talking, tmp_path):
    """Parts that came before it are nowhere else, and a part of an update would be one of its own for it."""
    adapter(tmp_path / "a", stored(talking[0]))
    third = Running(talking[0])
    try:
        load = {"lora_name": "a", "lora_path": str(tmp_path / "a")}
        web.post("/load_lora_adapter", json=load).raise_for_status()
        base, card = web.get("/v1/models").json()["data"]
        assert (card["id"], card["parent"], base["id"]) == ("a", base["id"], card["parent"])
        ask = {"messages": [{"role": "user", "content": "so"}], "max_tokens": 2}
        for model, status in (
            ("a", 400),
            (f"{base['id']}:a", 400),
            ("gpt", 200),
            (base["id"], 200),
            ("", 200),
        ):
            for path in ("/v1/chat/completions", "/v1/messages"):
                said = web.post(
                    path, json=ask | {"model": model}, headers={"X-Session-ID": f"{model}{len(path)}"}
                )
                assert said.status_code == status, said.text

        def join():
            return web.post("/workers", json={"url": third.url})

        refused = join()
        assert refused.status_code == 400 and "loaded_adapters {}" in refused.json()["error"]["message"]
        with httpx.Client(base_url=third.url, trust_env=False, timeout=SLOW_S) as alone:
            alone.post("/load_lora_adapter", json=load).raise_for_status()
            web.post("/begin_weight_update").raise_for_status()
            refused = join()
            assert refused.status_code == 400 and "update is open at the others" in refused.text
            empty = web.post("/end_weight_update", json={"weight_version": "1"})
            assert empty.status_code == 400
            web.post("/update_weight_version", json={"new_version": "1"}).raise_for_status()
            assert "weight_version 0, the others 1" in join().text
            alone.post("/update_weight_version", json={"new_version": "1"}).raise_for_status()
        join().raise_for_status()
        assert web.get("/workers").json()["total"] == 3
    finally:
        third.stop()


def where(web, running, session):
    """Which engine serves it."""
    before = served(running)
    generate(web, 1, session)
    return next(n for n, (a, b) in enumerate(zip(before, served(running), strict=True)) if a != b)


def test_workers_that_cannot_be_are_refused(web, two):
    for method, path, body, status, says in (
        ("GET", "/workers/2", None, 404, "'2'"), ("DELETE", "/workers/x", None, 404, "'x'"),
        ("PUT", "/workers/0", {"priority": 1}, 400, "changed"), ("POST", "/workers", {}, 400, "url must"),
        ("POST", "/workers", [], 400, "object"), ("POST", "/workers", {"url": two[0].url}, 400, "already"),
        ("POST", "/workers", {"url": "http://1.1.1.1:80"}, 400, "on this machine"),
        ("POST", "/workers", {"url": "file:///etc/passwd"}, 400, "url must"),
        ("POST", "/workers", {"url": "http://127.0.0.1:1/x"}, 400, "url must"),
        ("POST", "/workers", {"url": "http://127.0.0.1:99999999"}, 400, "url must"),
        ("POST", "/workers", {"url": "http://127.0.0.1:9"}, 400, "not added"),
        ("POST", "/workers", {"url": "http://127.0.0.1:9", "worker_type": "prefill"}, 400, "regular"),
        ("POST", "/remove_worker", None, 404, "no worker"),
    ):  # fmt: skip
        told = web.request(method, path, json=body)
        assert told.status_code == status and says in told.json()["error"]["message"], (path, body, told.text)
    assert web.post("/workers", content=b"{").status_code == 400
    web.delete("/workers/0").raise_for_status()
    last = web.delete("/workers/1")
    assert last.status_code == 400 and "last worker" in last.json()["error"]["message"]
