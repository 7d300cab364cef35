"""What tests and controllers set while an engine runs: slowness and bounds (SGLang), and methods by name (vLLM)."""

import concurrent.futures
import time

import pytest
from running import Running, wait

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


def generate(http, room=4):
    body = {
        "input_ids": IDS,
        "sampling_params": {"max_new_tokens": room, "temperature": 0, "ignore_eos": True},
    }
    answer = http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(http, path, body):
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(http, path, body, says):
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def state(http):
    return http.get("/server_info").json()["internal_states"][0]


def test_a_slow_engine_is_slow_and_still_listens(http, server):
    """As SGLang's disaggregation benches use it: fill the batch while it sleeps, then wake it."""
    expected = generate(http)["output_ids"]
    assert post(http, "/slow_down", {"forward_sleep_time": 0.2}) is None
    begin = time.monotonic()
    assert generate(http)["output_ids"] == expected
    assert time.monotonic() - begin > 3 * 0.2, "a step for each token, and a sleep between two"
    post(http, "/slow_down", {"forward_sleep_time": 90.0})
    assert state(http)["forward_sleep_time"] == 90.0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asleep = pool.submit(generate, http)
        wait(lambda: len(server.engine.scheduler.running) + len(server.engine.scheduler.waiting))
        assert http.get("/health").status_code == 200 and not asleep.done()
        post(http, "/slow_down", {"forward_sleep_time": None})
        assert asleep.result(20)["output_ids"] == expected
    assert state(http)["forward_sleep_time"] is None
    post(http, "/slow_down", {"forward_sleep_time": -1.0})
    assert state(http)["forward_sleep_time"] is None
    for bad in ("x", 1e9, []):
        refused(http, "/slow_down", {"forward_sleep_time": bad}, "forward_sleep_time")


def test_bounds_change_while_it_runs(http, server):
    scheduler, most = server.engine.scheduler, []
    step = scheduler.step

    def counted():
        most.append(len(scheduler.running))
        time.sleep(0.002)  # so that the next ones come before the first one has ended
        step()

    scheduler.step = counted
    for name, bound in (
        ("pp_max_micro_batch_size", 2),
        ("max_running_requests", 1),
        ("max_running_requests", 4),
    ):
        assert post(http, "/set_internal_state", {"server_args": {name: bound}}) == [True]
        assert http.get("/server_info").json()["max_running_requests"] == bound
        most.clear()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: generate(http, 30), range(8)))
        assert max(most) == bound
    assert http.put("/set_internal_state", json={"server_args": {"max_queued_requests": 0}}).json() == [True]
    full = http.post("/generate", json={"input_ids": IDS})
    assert full.status_code == 429 and state(http)["max_queued_requests"] == 0
    for bad, says in (
        ({"max_running_requests": 5}, "--max-batch 4"), ({"max_running_requests": 0}, "max_running_requests"),
        ({"max_queued_requests": -1}, "max_queued_requests"), ({"schedule_policy": "lpm"}, "schedule_policy"),
    ):  # fmt: skip
        refused(http, "/set_internal_state", {"server_args": bad}, says)
    refused(http, "/set_internal_state", {}, "server_args")


def test_known_methods_are_called_by_name_and_others_are_not(http, server, talking, tmp_path):
    """As clients of vLLM's development server call workers: prime-rl's updates, and waking up in steps."""
    s = server.engine.scheduler
    generate(http, 20)
    assert len(s.prefix)
    assert post(http, "/collective_rpc", {"method": "reset_prefix_cache"}) == {"results": [None]}
    assert not len(s.prefix)
    folder = str(talking[0])
    update = {"method": "update_weights_from_path", "timeout": 720.0, "args": [folder], "kwargs": {}}
    post(http, "/collective_rpc", update)
    assert s.version == "1"
    post(http, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
    assert s.version == "2"
    post(http, "/collective_rpc", {"method": "sleep", "args": [2]})
    assert http.get("/is_sleeping").json() == {"is_sleeping": True}
    http.post("/wake_up", params={"tags": "weights"})
    updates = s.counters.weight_updates
    post(http, "/collective_rpc", {"method": "reload_weights"})
    assert s.version == "2" and s.counters.weight_updates == updates + 1
    post(http, "/collective_rpc", {"method": "wake_up", "kwargs": {"tags": ["kv_cache"]}})
    assert http.get("/is_sleeping").json() == {"is_sleeping": False}
    assert generate(http)["meta_info"]["weight_version"] == "2"
    for method in ("execute_model", "__init__", "service.worker.stop", "methods", ""):
        refused(http, "/collective_rpc", {"method": method}, "known are reset_prefix_cache, reload_weights")
    for body, says in (
        ({"method": "sleep", "args": [1, 2]}, "sleep takes level"), ({"method": "sleep", "args": [3]}, "sleep(level)"),
        ({"method": "sleep", "args": [1], "kwargs": {"level": 1}}, "once"),
        ({"method": "wake_up", "kwargs": {"tags": ["x"]}}, "memory"), ({"method": "wake_up", "args": ["x"]}, "list"),
        ({"method": "reset_prefix_cache", "args": [1]}, "no arguments"),
        ({"method": "update_weights_from_path"}, "string"),
        ({"method": "update_weights_from_path", "args": [str(tmp_path)]}, str(tmp_path)), ({}, "method"),
    ):  # fmt: skip
        refused(http, "/collective_rpc", body, says)


def test_there_is_no_head_to_classify_with(http):
    """verl's and SGLang's call of a reward model."""
    refused(
        http, "/classify", {"model": "talking", "input_ids": [IDS], "text": None}, "no classification head"
    )
