"""The calls that slime, AReaL and prime-rl make of an inference server, as they make them, before a real engine."""

import concurrent.futures
import time

import pytest
from running import Running, wait

from fullarc.engine import Engine

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


@pytest.fixture(scope="module")
def other(talking, tmp_path_factory):
    """The same shape with other weights."""
    from fullarc.model import GlmMoeDsa, load_config, save_model

    folder = tmp_path_factory.mktemp("other") / "other"
    save_model(GlmMoeDsa(load_config(talking[0])).init_weights(9).eval(), folder, tokenizer_dir=talking[0])
    return folder


def post(http, path, body=None, **more):
    answer = http.post(path, json=body or {}, **more)
    assert answer.status_code == 200, answer.text
    return answer.json() if answer.content else None


def test_slime_rolls_out_partially_and_goes_on(http, server):
    assert http.get("/health_generate").status_code == 200 and http.get("/flush_cache").status_code == 200
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 200, "stop": None,
              "stop_token_ids": [401], "skip_special_tokens": False, "no_stop_trim": True,
              "spaces_between_special_tokens": False, "sampling_seed": 5, "ignore_eos": True}  # fmt: skip

    def sample(ids, room):
        payload = {
            "sampling_params": params | {"max_new_tokens": room},
            "return_logprob": True,
            "input_ids": ids,
        }
        return post(http, "/generate", payload, headers={"X-SMG-Routing-Key": "session-1"})

    whole = sample(IDS, 200)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(sample, IDS, 200)
        wait(lambda: any(len(r.logprobs) > 3 for r in list(server.engine.scheduler.running.values())))
        post(http, "/abort_request", {"abort_all": True})
        part = future.result(30)
    assert part["meta_info"]["finish_reason"]["type"] == "abort"
    load = http.get("/v1/loads?include=core,disagg,queues").json()["loads"][0]
    assert load["num_running_reqs"] + load["num_waiting_reqs"] == 0
    done = [item[1] for item in part["meta_info"]["output_token_logprobs"]]
    rest = sample(IDS + done, 200 - len(done))
    both = done + [item[1] for item in rest["meta_info"]["output_token_logprobs"]]
    assert both == whole["output_ids"], "a seed goes on where the abort cut"
    assert http.get("/get_weight_version").json()["weight_version"] == "0"
    assert http.get("/get_server_info").json()["context_length"] == 256


def test_areal_over_sglang_pauses_updates_and_resumes(http, server, other):
    params = {"top_p": 1.0, "top_k": 100000000, "max_new_tokens": 200, "temperature": 1.0, "stop_token_ids": [401],
              "frequency_penalty": 0.0}  # fmt: skip
    payload = {"input_ids": IDS, "image_data": None, "sampling_params": params, "return_logprob": True,
               "stream": False}  # fmt: skip
    server.slow_down()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = [pool.submit(post, http, "/generate", payload) for _ in range(6)]  # 4 run, 2 wait
        wait(lambda: any(len(r.logprobs) > 3 for r in list(server.engine.scheduler.running.values())))
        assert http.post("/pause_generation").status_code == 200
        answers = [future.result(30) for future in futures]
    reasons = [answer["meta_info"]["finish_reason"] for answer in answers]
    aborted = [reason for reason in reasons if reason["type"] == "abort"]
    assert aborted and all(
        len(a["meta_info"]["output_token_logprobs"]) == len(a["output_ids"]) for a in answers
    )
    for answer, reason in zip(answers, reasons, strict=True):
        if reason["type"] == "abort" and not answer["output_ids"]:
            assert reason["message"] == "Abort before prefill"
    told = post(http, "/update_weights_from_disk", {"model_path": str(other), "abort_all_request": True})
    assert told["success"] is True
    assert http.post("/continue_generation").status_code == 200
    again = post(http, "/generate", payload)
    assert again["meta_info"]["weight_version"] == "1"


def test_areal_over_vllm(http, other):
    assert http.request("GET", "/health", json={}).status_code == 200
    payload = {"top_p": 1.0, "top_k": -1, "max_tokens": 7, "temperature": 1.0, "stop_token_ids": [401],
               "return_tokens_as_token_ids": True, "logprobs": 0, "stream": False, "use_beam_search": False,
               "prompt": IDS}  # fmt: skip
    choice = post(http, "/v1/completions", payload)["choices"][0]
    tokens = [int(name.split(":")[1]) for name in choice["logprobs"]["tokens"]]
    assert (
        len(tokens) == len(choice["logprobs"]["token_logprobs"]) == 7 and choice["finish_reason"] == "length"
    )
    post(http, "/areal_pause_generation")
    post(http, "/areal_update_weights", {"model_path": str(other)})
    post(http, "/areal_continue_generation")
    after = Engine(other, max_batch=1, max_len=64)
    greedy = post(http, "/v1/completions", payload | {"temperature": 0.0})["choices"][0]
    expected = after.generate([IDS], 7, temperature=0.0, stop_ids=[401])[0]
    assert greedy["logprobs"]["token_logprobs"] == expected.logprobs


def test_prime_rl_samples_tokens_and_updates_in_flight(http, server, other, talking):
    assert http.get("/liveness").status_code == http.get("/health").status_code == 200
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 256
    body = {"model": "talking", "token_ids": IDS, "cache_salt": "0", "priority": 0,
            "sampling_params": {"max_tokens": 60, "temperature": 1.0, "top_p": 1.0, "logprobs": 1, "seed": 4,
                                "skip_special_tokens": False, "ignore_eos": True}}  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body["sampling_params"]["max_tokens"] = 240
        future = pool.submit(post, http, "/inference/v1/generate", body)
        wait(lambda: any(len(r.logprobs) > 3 for r in list(server.engine.scheduler.running.values())))
        post(http, "/pause", params={"mode": "keep", "clear_cache": "false"})
        assert http.get("/is_paused").json() == {"is_paused": True}
        count = len(next(iter(server.engine.scheduler.running.values())).logprobs)
        time.sleep(0.1)
        assert len(next(iter(server.engine.scheduler.running.values())).logprobs) == count, "paused is paused"
        post(http, "/update_weights", {"weight_dir": str(other)})
        post(http, "/resume")
        choice = future.result(30)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(choice["token_ids"]) == len(content) == 240 and choice["finish_reason"] == "length"
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert choice["weight_versions"] == [["0", 0, count], ["1", count, 240]]
    old = Engine(talking[0], max_batch=1, max_len=256).generate([IDS], count, seeds=[4], stop_ids=())[0]
    assert choice["token_ids"][:count] == old.token_ids
    assert [entry["logprob"] for entry in content[:count]] == old.logprobs
    refused = http.post("/update_weights", json={"weight_dir": None})
    assert refused.status_code == 400 and "weight_dir" in refused.json()["error"]["message"]


def test_tito_scores_prompts_and_streams_what_is_new(http, talking):
    params = {"max_tokens": 9, "seed": 4, "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True}
    body = {"request_id": "mine", "token_ids": IDS, "sampling_params": params}
    whole = post(http, "/inference/v1/generate", body)
    scores = Engine(talking[0], max_batch=1, max_len=64).score([IDS])[0]
    rows = whole["prompt_logprobs"]
    assert rows[0] is None and whole["request_id"] == "mine"
    assert [row[str(token)]["logprob"] for row, token in zip(rows[1:], IDS[1:], strict=True)] == scores[1:]
    assert all(min(entry["rank"] or 2 for entry in row.values()) == 1 for row in rows[1:])
    assert all(len(entry["top_logprobs"]) == 2 for entry in whole["choices"][0]["logprobs"]["content"])
    import json

    with http.stream("POST", "/inference/v1/generate", json=body | {"stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    parts = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert [t for part in parts for t in part["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_pause_wait_lets_running_requests_finish_and_waiting_ones_wait(http, server):
    body = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 150, "ignore_eos": True}}
    s = server.engine.scheduler
    server.slow_down()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = [pool.submit(post, http, "/generate", body) for _ in range(6)]
        wait(lambda: len(s.running) == 4 and len(s.waiting) == 2)
        post(http, "/pause?mode=wait")
        assert s.paused and not s.running and len(s.waiting) == 2
        assert sum(future.done() for future in futures) <= 4
        post(http, "/resume")
        assert [future.result(30)["meta_info"]["completion_tokens"] for future in futures] == [150] * 6
    assert http.post("/pause?mode=sometimes").status_code == 400


def test_the_tokenizer_is_served(http, talking):
    tok = talking[1]
    told = post(http, "/tokenize", {"prompt": "<|user|>hello", "return_token_strs": True})
    assert told["tokens"] == [tok.id("<|user|>"), *tok.encode("hello")] and told["count"] == len(
        told["tokens"]
    )
    assert "".join(told["token_strs"]) == "<|user|>hello"
    chat = post(http, "/tokenize", {"messages": [{"role": "user", "content": "hello"}]})
    assert tok.decode(chat["tokens"]) == "[gMASK]<sop><|user|>hello<|assistant|><think>"
    assert post(http, "/detokenize", {"tokens": told["tokens"]})["prompt"] == "<|user|>hello"
    assert http.get("/version").json()["version"] and http.get("/load").json() == {"server_load": 0}
    assert http.post("/reset_prefix_cache").status_code == 200
