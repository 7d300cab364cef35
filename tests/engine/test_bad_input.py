"""Whatever clients send: a 4xx in one sentence, nobody else harmed, nothing kept."""

import concurrent.futures
import json
import random
import socket
import time

import httpx
import pytest
from bodies import ALL, GENERATE, HELLO, IDS, NATIVE, REFUSED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import Running, wait

from fullarc.engine import Engine

DEEP = "[" * 300 + "]" * 300


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    running.engine.scheduler.max_queue = 64
    yield running
    running.stop()


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def idle(server):
    s = server.engine.scheduler
    wait(lambda: not s.running and not s.waiting)
    assert len(s.free) == 4 and server.server.service.worker.healthy


NASTY = st.sampled_from(
    [None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e308, 1e-308, float("nan"),
     float("inf"), float("-inf"), "", "x", "\x00", "9" * 400, "é" * 3000, [], {}, [[]], [{}], [None], {"": None}, [""],
     [-1], [10**30], ["x"] * 5000, list(range(300)), {"a": {"b": {"c": []}}}, {str(n): 1 for n in range(2000)}]
)  # fmt: skip


def places(value, path=()):
    """All places in a JSON value."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


def put(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new) if path[1:] else new
    return copy


@pytest.fixture(scope="module")
def fuzzed(talking):
    """A server whose weights, versions and pauses are anybody's."""
    running = Running(talking[0])
    yield running
    running.stop()


def wake(server):
    """What a request before may have left: a pause, slowness, bounds, an open update, names that are taken."""
    worker = server.server.service.worker

    def act(s):
        s.paused, s.max_queue, s.max_running, worker.sleep_s = False, 64, 4, 0.0
        s.abort(None)

    worker.call(act).result(30)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_request_makes_a_5xx(fuzzed, data):
    """Any value at one or two places of a good body, or in any other field of its schema."""
    path, body = data.draw(st.sampled_from(ALL))
    [schema] = [e.body for e in fuzzed.server.endpoints if e.path == path]
    for _ in range(data.draw(st.integers(1, 2))):
        spots = [*places(body), *((name,) for name in schema.model_fields if isinstance(body, dict))]
        body = put(body, data.draw(st.sampled_from(spots)), data.draw(NASTY))
    with httpx.Client(base_url=fuzzed.url, timeout=60, trust_env=False) as http:
        kind = {"content-type": "application/json"}
        answer = http.post(path, content=json.dumps(body).encode(), headers=kind)
        wake(fuzzed)
        assert answer.status_code < 500, (path, body, answer.text)
        if answer.status_code >= 400:
            told = answer.json()
            assert told.get("message") or told.get("error_message") or told["error"]["message"]
        assert http.get("/health").status_code == 200


def test_every_route_with_a_body_is_fuzzed(fuzzed):
    assert {path for path, _ in ALL} == {e.path for e in fuzzed.server.endpoints if e.body}


def test_good_bodies_are_good_and_leave_nothing_behind(fuzzed):
    with httpx.Client(base_url=fuzzed.url, timeout=60, trust_env=False) as http:
        for path, body in ALL:
            expected = (400, 404) if (path, body) in REFUSED else (200,)
            answer = http.post(path, json=body)
            assert answer.status_code in expected, (path, answer.text)
            wake(fuzzed)
    idle(fuzzed)


@pytest.mark.parametrize("path", sorted({path for path, _ in ALL}))
@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", DEEP.encode(), b'{"input_ids": ' + DEEP.encode() + b"}", b"[]", b"null", b'"\\ud800"',
     b"1" * 9999, b"[" * 100_000],
    ids=["broken", "bytes", "deep", "deeper", "list", "null", "surrogate", "digits", "unclosed"],
)  # fmt: skip
def test_what_is_not_a_body_is_a_400(http, path, content):
    answer = http.post(path, content=content)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_absurd_amounts_are_refused_at_once(server, http):
    many = {"sampling_params": {"stop": ["x"] * 1_000_000}, "input_ids": IDS}
    long = {"sampling_params": {"stop": ["x" * 100_000]}, "input_ids": IDS}
    crowd = {"input_ids": [IDS] * 65}
    samples = {"input_ids": [IDS] * 60, "sampling_params": {"n": 1024}}
    for body, status in (
        (many, 400),
        (long, 400),
        (crowd, 400),
        (samples, 400),
        ({"text": "a" * 20_000_000}, 400),
    ):
        begin = time.monotonic()
        assert http.post("/generate", json=body).status_code == status
        assert time.monotonic() - begin < 20
    assert http.post("/generate", content=b" " * (65 * 2**20)).status_code == 413
    idle(server)


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 10**30},
        {"max_new_tokens": 10**30},
        {"min_new_tokens": 10**30, "max_new_tokens": 10**30},
    ],
)
def test_values_larger_than_any_integer_of_the_engine_are_served(server, http, sampling):
    body = {"input_ids": [IDS] * 2, "sampling_params": sampling}
    answer = http.post("/generate", json=body)
    assert answer.status_code == 200 and all(
        a["meta_info"]["finish_reason"]["type"] != "abort" for a in answer.json()
    )
    idle(server)


CHAT, TEXT, TITO = {"messages": HELLO}, {"prompt": "a"}, {"token_ids": IDS}
TOO_MANY = "65 sequences at once are more than the 64 that may wait. Send fewer at a time"
BOUNDS = [
    ("/detokenize", {"tokens": [5, 99999]}, "no token 99999"),
    ("/detokenize", {"tokens": [[5], [-1]]}, "no token -1"),
    ("/generate", {"input_ids": IDS, "sampling_params": {"stop_token_ids": [5, 10**9, -5]}}, "no token 1000000000"),
    ("/v1/chat/completions", CHAT | {"stop_token_ids": [-(10**30)]}, "stop_token_ids"),
    ("/generate", {"input_ids": IDS, "sampling_params": {"max_new_tokens": 5, "min_new_tokens": 7}},
     "min_new_tokens must be in [0, max_new_tokens(5)], got 7."),
    ("/v1/completions", TEXT | {"max_tokens": 5, "min_tokens": 7}, "min_new_tokens must be in"),
    ("/generate", {"input_ids": IDS, "sampling_params": {"temperature": 0.005}}, "temperature must be 0 or in 0.01"),
    ("/generate", {"input_ids": IDS, "sampling_params": {"temperature": -1e-9}}, "temperature must be 0 or in 0.01"),
    ("/generate", {"input_ids": IDS, "sampling_params": {"stop": ["x"] * 4097}},
     "stop has 4097 strings, at most 4096 are served"),
    ("/v1/chat/completions", CHAT | {"stop": ["x"] * 4097}, "stop has 4097 strings, at most 4096 are served"),
    ("/generate", {"input_ids": [IDS] * 65}, TOO_MANY),
    ("/generate", {"input_ids": IDS, "sampling_params": {"n": 65}}, TOO_MANY),
    ("/inference/v1/generate", TITO | {"sampling_params": {"n": 65}}, TOO_MANY),
    ("/v1/completions", {"prompt": ["a"] * 13, "n": 5}, TOO_MANY), ("/v1/chat/completions", CHAT | {"n": 65}, TOO_MANY),
    ("/generate/", {"prompts": ["a"] * 65}, TOO_MANY), ("/v1/embeddings", {"input": ["a"] * 65}, TOO_MANY),
    ("/v1/score", {"query": "a", "items": ["b"] * 65, "label_token_ids": [1]}, TOO_MANY),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "says"), BOUNDS)
def test_what_no_retry_would_mend_is_a_400_that_names_the_bound(server, http, path, body, says):
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
    idle(server)


def test_the_largest_of_each_is_served(server, http):
    last = server.engine.scheduler.weights.config.vocab_size - 1
    assert http.post("/detokenize", json={"tokens": [0, last]}).json()["prompt"]
    sampling = {"max_new_tokens": 4, "min_new_tokens": 4, "stop_token_ids": [0, last], "stop": ["x"] * 4096}
    body = {"input_ids": [IDS] * 64, "sampling_params": sampling}
    assert [a["meta_info"]["completion_tokens"] for a in http.post("/generate", json=body).json()] == [4] * 64
    idle(server)


def test_the_smallest_temperatures_are_none(http):
    """Below 1e-6 the likeliest token is taken, as in SGLang, whatever the seed; log-probs are those of greedy."""
    told = []
    for temperature, seed in ((0, 1), (1e-7, 2), (9.9e-7, 3)):
        sampling = {
            "temperature": temperature,
            "sampling_seed": seed,
            "max_new_tokens": 9,
            "ignore_eos": True,
        }
        body = {"input_ids": IDS, "sampling_params": sampling, "return_logprob": True}
        told.append(http.post("/generate", json=body).json()["meta_info"]["output_token_logprobs"])
    assert told[0] == told[1] == told[2] and len(told[0]) == 9


def test_a_full_queue_is_a_429_in_every_dialect(server, http):
    http.post("/pause_generation", json={"mode": "in_place"})
    s = server.engine.scheduler
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(
                http.post, "/generate", json={"input_ids": [IDS] * 64, "sampling_params": NATIVE | {"n": 1}}
            )
            wait(lambda: len(s.waiting) == 64)
            for path, body in GENERATE:
                answer = http.post(path, json=body)
                assert answer.status_code == 429, path
                assert answer.json()["error"]["type"] == "rate_limit_error"
            http.post("/continue_generation")
            assert waiting.result(60).status_code == 200
    finally:
        http.post("/continue_generation")
    idle(server)


def raw_request(server, body):
    data = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    return client, head + data


def test_clients_that_leave_at_any_moment_free_their_slots_and_change_nobody(server, http, talking):
    alone = Engine(talking[0], max_batch=1, max_len=256).generate([IDS], 200, seeds=[7], stop_ids=())[0]
    stay = {"input_ids": IDS, "return_logprob": True,
            "sampling_params": {"max_new_tokens": 200, "sampling_seed": 7, "ignore_eos": True}}  # fmt: skip
    rng = random.Random(0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        kept = [pool.submit(http.post, "/generate", json=stay) for _ in range(2)]
        for number in range(40):
            prompt = [rng.randrange(300) for _ in range(rng.choice([1, 150]))]
            body = {
                "input_ids": prompt,
                "stream": number % 2 == 0,
                "sampling_params": {"max_new_tokens": 100},
            }
            client, data = raw_request(server, body)
            client.sendall(data[: rng.choice([20, len(data) - 1, len(data), len(data), len(data)])])
            time.sleep(rng.uniform(0, 0.03))
            client.close()
        metas = [future.result(60).json()["meta_info"] for future in kept]
    for meta in metas:
        assert [entry[0] for entry in meta["output_token_logprobs"]] == alone.logprobs
    idle(server)
    assert not server.server.service._noted


PHASES = {
    "waiting": lambda s, r: r in s.waiting,
    "prefilling": lambda s, r: r.slot >= 0 and 0 < r.computed < len(r.prompt),
    "decoding": lambda s, r: len(r.logprobs) > 3,
    "drafting": lambda s, r: bool(r.spec.drafts),
    "paused": lambda s, r: s.paused and len(r.logprobs) > 3,
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["hang up", "abort"])
def test_a_request_can_end_at_every_phase(talking, phase, how):
    """By its client's leaving or by its name; what ran beside it is what it is alone, and the slot is free."""
    alone = Engine(talking[0], max_batch=1, max_len=256).generate([IDS], 100, seeds=[7], stop_ids=())[0]
    running = Running(talking[0], max_batch=1 if phase == "waiting" else 2, draft_steps=3)
    s = running.engine.scheduler
    s.chunk_tokens = 1  # a prompt takes as many steps as it has tokens
    running.slow_down()
    if phase == "drafting":
        s.drafter.always()  # drafts whether they pay or not
    try:
        with (
            httpx.Client(base_url=running.url, timeout=60, trust_env=False) as http,
            concurrent.futures.ThreadPoolExecutor() as pool,
        ):
            stay = {"input_ids": IDS, "return_logprob": True,
                    "sampling_params": {"max_new_tokens": 100, "sampling_seed": 7, "ignore_eos": True}}  # fmt: skip
            kept = pool.submit(http.post, "/generate", json=stay)
            wait(lambda: s.running)
            client, data = raw_request(running, {
                "rid": "mine", "input_ids": [n % 90 for n in range(60)], "stream": how == "hang up",
                "return_routed_experts": True, "sampling_params": {"max_new_tokens": 100, "ignore_eos": True},
            })  # fmt: skip
            client.sendall(data)
            wait(lambda: [r for r in (*s.running.values(), *s.waiting) if r.rid == "mine"])
            [mine] = [r for r in (*s.running.values(), *s.waiting) if r.rid == "mine"]
            if phase == "paused":
                wait(lambda: len(mine.logprobs) > 3)
                http.post("/pause_generation", json={"mode": "in_place"})
            wait(lambda: PHASES[phase](s, mine))
            if how == "abort":
                assert http.post("/abort_request", json={"rid": "mine"}).json() == {"aborted": 1}
            client.close()
            wait(lambda: mine.finish == "abort" and mine.slot < 0)
            http.post("/continue_generation", json={})
            meta = kept.result(60).json()["meta_info"]
        assert [entry[0] for entry in meta["output_token_logprobs"]] == alone.logprobs
        wait(lambda: not s.running and not s.waiting)
        assert len(s.free) == s.core.cache.slots and running.server.service.worker.healthy
    finally:
        running.stop()


def test_a_client_that_stops_reading_holds_no_slot(server, monkeypatch):
    monkeypatch.setattr("fullarc.engine.api.service.STALL_S", 0.5)
    body = {"input_ids": IDS, "stream": True, "return_logprob": True, "top_logprobs_num": 64,
            "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}  # fmt: skip
    client, data = raw_request(server, body)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sendall(data)
    idle_since = time.monotonic()
    wait(lambda: server.engine.scheduler.running, 5)
    idle(server)
    assert time.monotonic() - idle_since < 30
    client.close()


def test_weights_of_another_shape_change_nobody(server, http, talking, checkpoints):
    alone = Engine(talking[0], max_batch=1, max_len=256).generate([IDS], 150, seeds=[7], stop_ids=())[0]
    stay = {
        "input_ids": IDS,
        "sampling_params": {"max_new_tokens": 150, "sampling_seed": 7, "ignore_eos": True},
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        kept = [pool.submit(http.post, "/generate", json=stay) for _ in range(3)]
        wait(lambda: server.engine.scheduler.running)
        for path in ("/update_weights_from_disk", "/areal_update_weights"):
            answer = http.post(path, json={"model_path": str(checkpoints["other"])})
            assert answer.status_code == 400 and "vocab_size" in answer.json()["message"]
        for future in kept:
            answer = future.result(60).json()
            assert answer["output_ids"] == alone.token_ids and answer["meta_info"]["weight_version"] == "0"
