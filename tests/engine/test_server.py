"""The HTTP face: SGLang's shapes, errors, streaming, cancellation, updates under load, and life with its parent."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys

import httpx
import pytest
from running import Running, wait

from fullarc.config.errors import FullarcError
from fullarc.engine import Engine
from fullarc.engine.api.service import Service
from fullarc.rollout.engine_client import EngineClient, EngineError, Sampling

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def generate(http, **body):
    params = {"max_new_tokens": 6, "sampling_seed": 1, "ignore_eos": True} | body.pop("sampling_params", {})
    return http.post("/generate", json={"input_ids": PROMPT, "sampling_params": params} | body)


def test_one_sequence_in_sglangs_shape(http, checkpoints):
    answer = generate(http, return_logprob=True, rid="mine").json()
    meta = answer["meta_info"]
    local = Engine(checkpoints["v0"], max_batch=1, max_len=64).generate([PROMPT], 6, seeds=[1], stop_ids=())[
        0
    ]
    assert meta["output_token_logprobs"] == [
        [lp, t, None] for lp, t in zip(local.logprobs, local.token_ids, strict=True)
    ]
    assert answer["output_ids"] == local.token_ids
    assert meta["id"] == "mine" and meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (8, 6, 0)
    assert meta["weight_version"] == "0" and meta["weight_versions"] == [["0", 0, 6]]


def test_an_answer_wakes_the_event_loop_once_however_many_samples_it_has(http, monkeypatch):
    wakes, original = [], Service._wake
    monkeypatch.setattr(Service, "_wake", lambda self, noted: (wakes.append(noted), original(self, noted)))
    assert len(generate(http, sampling_params={"n": 7}).json()) == 7
    assert len(wakes) == 1


def test_stop_reports_what_matched(http):
    ids = generate(http).json()["output_ids"]
    meta = generate(http, sampling_params={"stop_token_ids": [ids[2]]}).json()["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": ids[2]}


def test_batches_and_samples(http):
    both = generate(http, input_ids=[PROMPT, [7]], sampling_params={"n": 3}).json()
    assert [a["meta_info"]["prompt_tokens"] for a in both] == [8, 8, 8, 1, 1, 1]
    assert len({tuple(a["output_ids"]) for a in both[:3]}) == 3
    assert both[0]["output_ids"] == generate(http).json()["output_ids"]


def test_likeliest_tokens_and_tokens_that_must_not_come(http, checkpoints):
    ask = {"sampling_params": {"temperature": 0.0}, "return_logprob": True, "top_logprobs_num": 3}
    meta = generate(http, **ask).json()["meta_info"]
    chosen = [token for _, token, _ in meta["output_token_logprobs"]]
    assert [len(row) for row in meta["output_top_logprobs"]] == [3] * 6
    for (value, token, _), row in zip(
        meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True
    ):
        assert row[0] == [value, token, None], "greedy takes the likeliest"
        assert [entry[0] for entry in row] == sorted((entry[0] for entry in row), reverse=True)
    bias = {str(token): -100 for token in chosen}
    other = generate(http, sampling_params={"temperature": 0.0, "logit_bias": bias}).json()["output_ids"]
    assert not set(other) & set(chosen)
    local = Engine(checkpoints["v0"], max_batch=1, max_len=64)
    out = local.generate([PROMPT], 6, temperature=0.0, stop_ids=(), forbidden_ids=chosen, top_logprobs=2)[0]
    assert out.token_ids == other and [len(row) for row in out.top_logprobs] == [2] * 6


def test_scoring(http, server):
    answer = generate(
        http, return_logprob=True, logprob_start_len=0, sampling_params={"max_new_tokens": 0}
    ).json()
    rows = answer["meta_info"]["input_token_logprobs"]
    assert [row[1] for row in rows] == PROMPT and rows[0][0] is None and answer["output_ids"] == []
    tail = generate(http, return_logprob=True, logprob_start_len=5).json()["meta_info"]
    assert tail["input_token_logprobs"] == rows[5:]


def test_streaming_is_cumulative_and_ends_with_done(http):
    body = {"input_ids": PROMPT, "stream": True, "return_logprob": True,
            "sampling_params": {"max_new_tokens": 20, "sampling_seed": 1, "ignore_eos": True}}  # fmt: skip
    with http.stream("POST", "/generate", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    whole = generate(http, sampling_params={"max_new_tokens": 20}).json()["output_ids"]
    for event in events:
        assert event["output_ids"] == whole[: len(event["output_ids"])]
    assert [bool(e["meta_info"]["finish_reason"]) for e in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["output_ids"] == whole


def test_a_crowd_of_streams_gets_every_token_and_is_told_less_often(checkpoints, monkeypatch):
    running = Running(checkpoints["v0"], max_batch=24)
    wakes, original = [], Service._wake
    monkeypatch.setattr(
        Service, "_wake", lambda self, noted: (wakes.append(len(noted)), original(self, noted))
    )
    body = {
        "input_ids": [PROMPT] * 24,
        "stream": True,
        "sampling_params": {"max_new_tokens": 90, "ignore_eos": True},
    }
    try:
        with httpx.stream(
            "POST", running.url + "/generate", json=body, timeout=60, trust_env=False
        ) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        last = {event["index"]: event for event in map(json.loads, lines[:-1])}
        assert [len(last[n]["output_ids"]) for n in range(24)] == [90] * 24 and lines[-1] == "[DONE]"
        assert len(wakes) < running.engine.scheduler.counters.steps
    finally:
        running.stop()


@pytest.mark.parametrize(
    "body, says",
    [
        ({"input_ids": []}, "empty"),
        ({"input_ids": [1, 96]}, "0..95"),
        ({"input_ids": [-1]}, "0..95"),
        ({"input_ids": [1] * 256}, "256"),
        ({"input_ids": "text"}, "input_ids"),
        ({"input_ids": [1.5]}, "input_ids"),
        ({}, "input_ids"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": -5}}, "max_new_tokens"),
        ({"input_ids": [1], "sampling_params": {"n": 0}}, "n"),
        ({"input_ids": [1], "sampling_params": {"stop": ["x"]}}, "stop"),
        ({"input_ids": [1], "sampling_params": {"frequency_penalty": 2.5}}, "frequency_penalty"),
        ({"input_ids": [1], "sampling_params": {"temprature": 1.0}}, "temprature"),
        ({"input_ids": [1], "sampling_params": {"logit_bias": {"1": 200.0}}}, "logit_bias"),
        ({"input_ids": [1], "sampling_params": {"logit_bias": {"96": -100}}}, "0..95"),
        ({"input_ids": [1], "top_logprobs_num": 1000}, "top_logprobs_num"),
        ({"input_ids": [1], "text": "one"}, "either"),
        ({"text": "words"}, "tokenizer"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "sampling_params"),
        ({"input_ids": [1], "return_logprob": True, "logprob_start_len": 7}, "logprob_start_len"),
    ],
)
def test_bad_requests_get_a_sentence_and_harm_nobody(http, body, says):
    answer = http.post("/generate", json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    assert http.get("/health").status_code == 200


def test_broken_json_is_a_400(http):
    assert http.post("/generate", content=b'{"input_ids": [1').status_code == 400
    assert http.get("/nowhere").status_code == 404


def test_a_closed_queue_is_a_429_and_what_it_never_holds_a_400(http, server):
    server.engine.scheduler.max_queue = 3
    never = generate(http, sampling_params={"n": 8})
    assert never.status_code == 400 and "8 sequences at once are more than the 3 that may wait" in never.text
    assert generate(http, sampling_params={"n": 3}).status_code == 200
    server.engine.scheduler.max_queue = 0
    assert generate(http).status_code == 429


def test_a_client_that_hangs_up_frees_its_slot(server, http):
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}
    http.post("/pause_generation", json={"mode": "in_place"})  # so that it cannot end by itself
    s = server.engine.scheduler
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/generate", json=body, timeout=0.3, trust_env=False)
    wait(lambda: s.counters.aborted == 1)
    http.post("/continue_generation")
    with http.stream("POST", "/generate", json=body | {"stream": True}) as response:
        next(response.iter_lines())
        http.post("/pause_generation", json={"mode": "in_place"})
    wait(lambda: s.counters.aborted == 2)
    http.post("/continue_generation")
    wait(lambda: not s.running and not s.waiting)
    assert len(s.free) == 4 and generate(http).status_code == 200


def test_pause_abort_continue(server, http):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        http.post("/pause_generation", json={"mode": "in_place"})
        one = pool.submit(generate, http, rid="one")
        two = pool.submit(generate, http, rid="two")
        wait(lambda: len(server.engine.scheduler.waiting) == 2)
        assert http.post("/flush_cache").status_code == 400
        assert http.post("/abort_request", json={"rid": "one"}).json() == {"aborted": 1}
        assert one.result(10).json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert http.get("/health_generate").status_code == 503
        http.post("/continue_generation")
        assert two.result(10).json()["meta_info"]["finish_reason"]["type"] == "length"
    assert http.get("/flush_cache").status_code == 200
    assert http.get("/health_generate").status_code == 200


def test_weights_change_under_load_and_no_request_is_lost(server, http, checkpoints):
    params = {"max_new_tokens": 120}
    server.slow_down()
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        load = [pool.submit(generate, http, return_logprob=True, sampling_params=params) for _ in range(12)]
        wait(lambda: server.engine.scheduler.counters.generated_tokens > 40)
        for version, name in ((1, "v1"), (2, "v0"), (3, "v1")):
            body = {"model_path": str(checkpoints[name]), "weight_version": str(version)}
            assert http.post("/update_weights_from_disk", json=body).json()["success"] is True
        metas = [future.result(30).json()["meta_info"] for future in load]
    seen = set()
    for meta in metas:
        assert meta["completion_tokens"] == 120 == len(meta["output_token_logprobs"])
        spans = meta["weight_versions"]
        assert spans[0][1] == 0 and spans[-1][2] == 120
        assert all(a[2] == b[1] and a[0] < b[0] for a, b in zip(spans, spans[1:], strict=False))
        seen |= {span[0] for span in spans}
    assert "0" in seen and "3" in seen  # the load really spanned the updates
    assert http.get("/model_info").json()["weight_version"] == "3"


def test_refused_weights_leave_the_server_serving(http, checkpoints):
    before = generate(http).json()["output_ids"]
    for path in (checkpoints["other"], "/nowhere"):
        answer = http.post("/update_weights_from_disk", json={"model_path": str(path)})
        assert answer.status_code == 400 and answer.json()["success"] is False and answer.json()["message"]
    assert generate(http).json()["output_ids"] == before


def test_the_time_in_the_queue_is_told(server, http):
    """One slot: of two requests the second waits about as long as the first runs."""
    server.slow_down(0.01)
    s = server.engine.scheduler
    s.free[:] = s.free[:1]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: generate(http, sampling_params={"max_new_tokens": 30}), range(2)))
    lines = dict(
        line.rsplit(" ", 1)
        for line in http.get("/metrics").text.splitlines()
        if "queue_time_seconds_" in line
    )
    assert lines["sglang:queue_time_seconds_count"] == lines["vllm:request_queue_time_seconds_count"] == "2"
    assert 0.25 < float(lines["sglang:queue_time_seconds_sum"]) < 5


def test_information_and_metrics(http, server):
    generate(http)
    assert http.get("/server_info").json()["max_running_requests"] == 4
    text = http.get("/metrics").text
    assert "sglang:generation_tokens_total 6" in text and "sglang:e2e_request_latency_seconds_count 1" in text
    for line in text.splitlines():
        assert line.startswith("# TYPE ") or float(line.rsplit(" ", 1)[1]) >= 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total",
                 "prefix_cache_hits_total", "prefix_cache_queries_total", "cache_config_info"):  # fmt: skip
        assert f"\nvllm:{name}" in text, "read by prime-rl's controller"
    assert 'vllm:request_success_total{finished_reason="length"} 1' in text
    assert "sglang:inter_token_latency_seconds_count 1" in text


def test_a_key_is_needed_when_one_is_set(checkpoints):
    running = Running(checkpoints["v0"], api_key="secret")
    try:
        assert httpx.get(running.url + "/model_info", trust_env=False).status_code == 401
        good = {"Authorization": "Bearer secret"}
        assert httpx.get(running.url + "/model_info", headers=good, trust_env=False).status_code == 200
        assert httpx.get(running.url + "/health", trust_env=False).status_code == 200
    finally:
        running.stop()


async def test_the_rollout_client_understands_it(server, checkpoints):
    async with EngineClient(server.url) as client:
        sampling = Sampling(max_new_tokens=9, seed=3)
        one = (await client.generate(PROMPT, sampling))[0]
        assert (await client.generate_batch([PROMPT], [sampling]))[0].token_ids == one.token_ids
        streamed = [c async for c in client.stream(PROMPT, sampling)]
        assert streamed[-1].token_ids == one.token_ids and streamed[-1].logprobs == one.logprobs
        scores = (await client.score([PROMPT + one.token_ids]))[0]
        assert scores[len(PROMPT) :] == one.logprobs and scores[0] == 0.0
        await client.update_weights(str(checkpoints["v1"]), 5)
        assert set((await client.generate(PROMPT, sampling))[0].versions) == {5}
        with pytest.raises(EngineError) as refused:
            await client.generate([], sampling)
        assert refused.value.kind == "rejected"


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "fullarc.engine.server", "--model", sys.argv[1], "--port", "0",
                          "--deterministic"],
                         stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), flush=True)
"""


@pytest.mark.slow
def test_the_process_announces_itself_and_dies_with_its_parent(checkpoints):
    """The parent prints the server's announcement and exits at once, leaving an orphan behind."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.run(
        [sys.executable, "-c", PARENT, str(checkpoints["v0"])],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
    )
    told = json.loads(parent.stdout)
    assert told["url"] == f"http://127.0.0.1:{told['port']}"
    assert re.search(r"checked in \d+\.\d\d s\. It costs nothing else", told["deterministic"])

    def gone():
        try:
            os.kill(told["pid"], 0)
        except ProcessLookupError:
            return True
        return open(f"/proc/{told['pid']}/stat").read().split()[2] == "Z"

    wait(gone, 15)


def test_fullarc_serve_hands_on_every_option_of_the_engines_server():
    from fullarc.engine.server import _parser
    from fullarc.rollout.serve import ENGINE_OPTIONS

    engines = {
        name for action in _parser()._actions for name in action.option_strings if name.startswith("--")
    }
    own = {"--help", "--model", "--host", "--port", "--api-key", "--max-len", "--detach"}
    assert engines - own == {name for name, _, _ in ENGINE_OPTIONS}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [("--host 0.0.0.0", "--api-key"), ("--model /nowhere", "/nowhere"), ("--max-batch 0", "--max-batch is 0"),
     ("--max-batch 100000000", "100000000 sequences"), ("--max-batch 100000000 --kernels torch", "100000000 sequences"),
     (f"--max-batch {10**21}", "--max-batch"), ("--max-len -5", "--max-len is -5"), ("--threads 0", "--threads is 0"),
     ("--max-queue -1", "--max-queue is -1"), ("--port 99999", "127.0.0.1:99999")],
)  # fmt: skip
def test_a_wrong_start_is_one_sentence(checkpoints, arguments, says, capsys, monkeypatch):
    from fullarc.engine import server

    monkeypatch.setattr(server.uvicorn, "Config", lambda *_, **__: pytest.fail("it started"))
    assert server.main(["--model", str(checkpoints["v0"]), "--port", "0", *arguments.split()]) == 3
    [line] = capsys.readouterr().err.strip().splitlines()
    assert says in line


def test_fullarc_serve_says_what_is_wrong_with_a_size(talking, capsys, monkeypatch):
    from fullarc.rollout import serve

    monkeypatch.setattr(serve.uvicorn, "Server", lambda *_: pytest.fail("it started"))
    for arguments, says in (
        ("--engine http://x --max-len -5", "--max-len is -5"),
        ("--max-batch 0", "--max-batch is 0"),
        ("--engine http://x --port 99999", "127.0.0.1:99999"),
    ):
        with pytest.raises(FullarcError, match=says):
            serve.main([str(talking[0]), "--port", "0", *arguments.split()])
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    assert f"at most {serve.MAX_LEN}" in " ".join(capsys.readouterr().out.split())
