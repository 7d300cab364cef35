"""Steering the engine: its health under load, pauses that drain, and sleep."""

import concurrent.futures
import time

import httpx
import pytest
from running import wait

LONG = {"input_ids": list(range(1, 40)), "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}


@pytest.fixture
def crowd(http, server):
    """Four requests run and twelve wait, step by slow step."""
    scheduler = server.engine.scheduler
    http.post("/slow_down", json={"forward_sleep_time": 0.25})
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(http.post, "/generate", json=LONG) for _ in range(16)]
        wait(lambda: len(scheduler.running) == 4 and len(scheduler.waiting) == 12, 30)
        yield scheduler
        http.post("/slow_down", json={})
        http.post("/abort_request", json={"abort_all": True})
        assert all(future.result(30).status_code == 200 for future in futures)


def test_health_is_told_by_the_steps_of_others_and_takes_nothing_from_them(http, crowd):
    crowd.max_queue = 12
    before = crowd.counters.requests, {*crowd.running}
    begin = time.monotonic()
    assert http.get("/health_generate", timeout=5).status_code == 200
    assert time.monotonic() - begin < 3
    assert (crowd.counters.requests, {*crowd.running}) == before and not crowd.counters.preempted


def test_an_idle_engine_computes_a_token_whatever_its_queue_takes(http, server):
    scheduler = server.engine.scheduler
    assert (
        http.post("/set_internal_state", json={"server_args": {"max_queued_requests": 0}}).status_code == 200
    )
    assert http.get("/health_generate").status_code == 200
    assert scheduler.counters.generated_tokens == 1 and not scheduler.running


def test_an_engine_is_not_healthy_when_a_step_has_failed_for_it(http, server):
    def fail(*_):
        raise RuntimeError("no")

    server.engine.scheduler.core.logits = fail
    assert http.get("/health_generate").status_code == 503
    assert http.get("/health").status_code == 503


def test_an_engine_that_steps_no_more_is_not_healthy(http, server, monkeypatch):
    monkeypatch.setattr("fullarc.engine.api.control.HEALTH_S", 0.3)
    scheduler, stuck = server.engine.scheduler, concurrent.futures.Future()
    scheduler.step = lambda: stuck.result(30)
    assert http.get("/health_generate").status_code == 503
    stuck.set_result(None)
    del scheduler.step
    wait(lambda: not scheduler.running and not scheduler.waiting)
    assert http.get("/health_generate").status_code == 200


@pytest.fixture
def running(http, server):
    """A request that runs, step by slow step, and one that waits."""
    scheduler = server.engine.scheduler
    scheduler.max_running = 1
    server.slow_down(0.01)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(http.post, "/generate", json=LONG) for _ in range(2)]
        wait(lambda: scheduler.running and scheduler.waiting)
        yield futures
        http.post("/resume")
        assert [future.result(60).json()["meta_info"]["completion_tokens"] for future in futures] == [200] * 2


def test_a_paused_engine_goes_on_until_what_runs_has_ended(http, server, running):
    """vLLM's mode wait after its mode keep."""
    scheduler = server.engine.scheduler
    http.post("/pause?mode=keep")
    assert len(scheduler.running) == 1
    assert http.post("/pause?mode=wait", timeout=30).status_code == 200
    assert scheduler.paused and not scheduler.running and len(scheduler.waiting) == 1


@pytest.mark.parametrize(
    "path, paused",
    [
        ("/resume", False),
        ("/continue_generation", False),
        ("/pause?mode=keep", True),
        ("/pause?mode=abort", True),
    ],
)
def test_another_call_ends_the_waiting_for_requests_to_end(http, server, path, paused):
    scheduler = server.engine.scheduler
    server.slow_down(0.03)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        request = pool.submit(http.post, "/generate", json=LONG)
        wait(lambda: scheduler.running)
        drain = pool.submit(http.post, "/pause?mode=wait")
        wait(lambda: not scheduler.admitting)
        http.post(path)
        told = drain.result(3)
        assert told.status_code == 400 and "Another call" in told.text
        assert scheduler.paused is paused and scheduler.admitting
        http.post("/abort_request", json={"abort_all": True})
        assert request.result(10).status_code == 200


@pytest.mark.parametrize("mode", ["", "keep"])
def test_a_client_that_waits_no_longer_leaves_the_engine_as_it_was(http, server, running, mode):
    scheduler = server.engine.scheduler
    if mode:
        http.post(f"/pause?mode={mode}")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/pause?mode=wait", timeout=0.3, trust_env=False)
    wait(lambda: scheduler.admitting)
    assert scheduler.paused is bool(mode) and scheduler.running


@pytest.mark.parametrize(
    "off, tags, steps",
    [
        ("/release_memory_occupation", None, [["weights"], ["kv_cache", "cuda_graph"]]),
        ("/release_memory_occupation", None, [["kv_cache"], ["cuda_graph"], ["weights"]]),
        ("/release_memory_occupation", None, [None]),
        ("/release_memory_occupation", ["kv_cache"], [["weights"], ["kv_cache"]]),
        ("/sleep?level=1", None, [["weights"], ["kv_cache"]]),
        ("/sleep?level=2", None, [[]]),
    ],
)
def test_it_wakes_up_when_all_that_was_released_is_resumed(http, server, off, tags, steps):
    """In the words of SGLang and of vLLM."""
    scheduler = server.engine.scheduler
    assert http.post(off, json={"tags": tags}).status_code == 200
    for number, step in enumerate(steps, 1):
        assert scheduler.paused and http.get("/is_sleeping").json() == {"is_sleeping": True}
        if "sleep" in off:
            assert http.post("/wake_up", params={"tags": step}).status_code == 200
        else:
            assert http.post("/resume_memory_occupation", json={"tags": step}).status_code == 200
        assert scheduler.paused is (number < len(steps))
    assert http.get("/is_sleeping").json() == {"is_sleeping": False}
