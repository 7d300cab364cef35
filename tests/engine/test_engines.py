"""Two real engines behind one gateway: both work, a session stays, and what changes an engine reaches both."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from running import Running, wait

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


def test_the_engines_are_listed_as_workers_and_stay(web, two):
    workers = web.get("/workers").json()
    assert [(w["id"], w["url"], w["is_healthy"], w["load"]) for w in workers["workers"]] == [
        (str(n), one.url, True, 0) for n, one in enumerate(two)
    ]
    assert workers["total"] == 2 and web.get("/list_workers").json() == {"urls": [one.url for one in two]}
    assert web.get("/workers/1").json() == workers["workers"][1]
    group = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}
    for method, path, status, says in (
        ("POST", "/init_weights_update_group", 400, "these are 2"), ("GET", "/workers/2", 404, "'2'"),
        ("POST", "/workers", 400, "--engines"), ("DELETE", "/workers/1", 400, "--engines"),
    ):  # fmt: skip
        told = web.request(method, path, json=group)
        assert told.status_code == status and says in told.json()["error"]["message"]
    two[1].stop()
    assert [w["is_healthy"] for w in web.get("/workers").json()["workers"]] == [True, False]
    assert web.get("/health").status_code == 503
