"""The calls that slime, AReaL and prime-rl make of an inference server, as they make them, before a real engine."""

import base64
import concurrent.futures
import json
import math
import time

import numpy as np
import pytest
import torch
from running import Running, wait

from fullarc.engine import Engine
from fullarc.model import load_model

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
    server.slow_down()
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
        s = server.engine.scheduler
        wait(lambda: len(s.waiting) == 2 and any(len(r.logprobs) > 3 for r in list(s.running.values())))
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
    spans = [(span["version"], span["start"], span["end"]) for span in choice["weight_versions"]]
    assert spans == [("0", 0, count), ("1", count, 240)] and choice["stop_reason"] is None
    old = Engine(talking[0], max_batch=1, max_len=256).generate([IDS], count, seeds=[4], stop_ids=())[0]
    assert choice["token_ids"][:count] == old.token_ids
    assert [entry["logprob"] for entry in content[:count]] == old.logprobs
    refused = http.post("/update_weights", json={"weight_dir": None})
    assert refused.status_code == 400 and "weight_dir" in refused.json()["error"]["message"]


def test_tito_scores_prompts_and_streams_what_is_new(http, server, talking):
    params = {"max_tokens": 9, "seed": 4, "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True}
    body = {"request_id": "mine", "token_ids": IDS, "sampling_params": params}
    whole = post(http, "/inference/v1/generate", body)
    scores = Engine(talking[0], max_batch=1, max_len=64).score([IDS])[0]
    rows = whole["prompt_logprobs"]
    assert rows[0] is None and whole["request_id"] == "mine"
    assert [row[str(token)]["logprob"] for row, token in zip(rows[1:], IDS[1:], strict=True)] == scores[1:]
    assert all(min(entry["rank"] or 2 for entry in row.values()) == 1 for row in rows[1:])
    for entry in whole["choices"][0]["logprobs"]["content"]:
        first, *others = entry["top_logprobs"]
        assert first["token_id"] == entry["token_id"] and first["logprob"] == entry["logprob"]
        ranks = [other["rank"] for other in others] + ([entry["rank"]] if entry["rank"] else [])
        assert sorted(ranks) == [1, 2], (
            "the sampled token first, then the likeliest in the order of their ranks"
        )
    server.slow_down(0.01)
    with http.stream("POST", "/inference/v1/generate", json=body | {"stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines[:-1]]
    assert [event.get("prompt_logprobs") for event in events] == [rows] + [None] * (len(events) - 1)
    parts = [event["choices"][0] for event in events]
    assert [t for part in parts for t in part["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def ints(text):
    return np.frombuffer(base64.b64decode(text), np.int32)


def test_slime_asks_for_what_top_p_left(http, talking):
    """`custom_params` as slime sends it whenever top_p is not 1; SGLang's and vLLM's own forms of the same."""
    params = {"temperature": 0.7, "top_p": 0.6, "top_k": 40, "max_new_tokens": 12, "sampling_seed": 3,
              "ignore_eos": True, "custom_params": {"return_top_p_token_ids": True}}  # fmt: skip
    ask = {"sampling_params": params, "return_logprob": True, "input_ids": IDS}
    meta = post(http, "/generate", ask)["meta_info"]
    output = [item[1] for item in meta["output_token_logprobs"]]
    ids, offsets = ints(meta["top_p_token_ids"]), ints(meta["top_p_token_offsets"])
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == len(output) + 1
    model = load_model(talking[0])
    with torch.no_grad():
        logits = model(torch.tensor([IDS + output])).logits[0, len(IDS) - 1 : -1]
    masked = post(http, "/generate", ask | {"return_sampling_mask": True})["meta_info"]
    assert masked["output_token_sampling_mask_length"] == len(output)
    for at, token in enumerate(output):  # top-k, then top-p, written out
        p, order = (logits[at] / 0.7).softmax(-1).sort(descending=True)
        p = p[:40] / p[:40].sum()
        kept = int((p.cumsum(0) - p < 0.6).sum())
        chosen = sorted(order[:kept].tolist())
        assert (
            ids[offsets[at] : offsets[at + 1]].tolist() == chosen == masked["output_token_sampling_mask"][at]
        )
        share = float(p[:kept][order[:kept].tolist().index(token)] / p[:kept].sum())
        assert masked["output_token_sampling_logprobs"][at] == pytest.approx(math.log(share), abs=1e-4)
    body = {"token_ids": IDS, "return_sampling_mask": True,
            "sampling_params": {"max_tokens": 12, "temperature": 0.7, "top_p": 0.6, "top_k": 40, "seed": 3,
                                "ignore_eos": True}}  # fmt: skip
    choice = post(http, "/inference/v1/generate", body)["choices"][0]
    assert choice["sampling_mask"] == masked["output_token_sampling_mask"]
    greedy = {"temperature": 0, "max_new_tokens": 2}
    told = post(
        http, "/generate", {"input_ids": IDS, "sampling_params": greedy, "return_sampling_mask": True}
    )
    assert [[token] for token in told["output_ids"]] == told["meta_info"]["output_token_sampling_mask"]
    wrong = {"input_ids": IDS, "sampling_params": {"custom_params": {"other": 1}}}
    assert http.post("/generate", json=wrong).status_code == 400


def test_slime_checks_that_an_update_reaches_every_tensor(http, other, talking):
    """snapshot, reset_tensors, update, compare; and the same with vLLM's checker."""
    post(http, "/weights_checker", {"action": "snapshot"})
    whole = post(http, "/weight_checker", {"action": "checksum"})["checksums"]
    post(http, "/weights_checker", {"action": "reset_tensors"})
    told = http.post("/weights_checker", json={"action": "compare"})
    assert told.status_code == 400 and "tensors differ" in told.json()["message"]
    assert post(http, "/generate", {"input_ids": IDS})["meta_info"]["weight_version"] == "0"
    post(http, "/update_weights_from_disk", {"model_path": str(talking[0]), "weight_version": "1"})
    assert post(http, "/weights_checker", {"action": "compare"})["success"] is True
    assert post(http, "/weight_checker", {"action": "compare", "baseline": whole}) == {
        "match": True,
        "mismatches": [],
    }
    post(http, "/update_weights_from_disk", {"model_path": str(other)})
    assert post(http, "/weight_checker", {"action": "compare", "baseline": whole})["match"] is False
    ranks = post(http, "/weights_checker")["ranks"]
    assert set(ranks[0]["checksums"]) == set(whole)
    assert post(http, "/post_process_weights", {"post_process_quantization": True})["success"] is True
    assert http.post("/weight_checker", json={"action": "compare"}).status_code == 400


def test_slime_finds_external_engines_by_their_server_info(http):
    info = http.get("/server_info").json()
    assert int(info["tp_size"]) * int(info["pp_size"]) == 1
    assert not info.get("encoder_only") and info["disaggregation_mode"] not in ("prefill", "decode")


@pytest.mark.slow
def test_memory_is_given_back_between_updates(http, server):
    """AReaL over SGLang and over vLLM, and slime: what ran ends, the engine waits, and goes on as it was."""
    s = server.engine.scheduler
    long = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 230, "ignore_eos": True}}
    server.slow_down()
    for off, on in (
        ("/release_memory_occupation", "/resume_memory_occupation"),
        ("/sleep?level=1", "/wake_up?tags=weights&tags=kv_cache"),
    ):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            future = pool.submit(post, http, "/generate", long)
            wait(lambda: s.running)
            assert http.post(off, json={}).status_code == 200
            assert future.result(30)["meta_info"]["finish_reason"]["type"] == "abort"
            assert http.get("/is_sleeping").json() == {"is_sleeping": True} and not len(s.prefix)
            later = pool.submit(post, http, "/generate", long)
            wait(lambda: s.waiting)
            assert http.post(on, json={}).status_code == 200
            assert later.result(30)["meta_info"]["completion_tokens"] == 230
        assert http.get("/is_sleeping").json() == {"is_sleeping": False}
    http.post("/pause_generation", json={})
    for call in (("/sleep?mode=keep"), "/sleep", "/wake_up"):
        http.post(call)
    assert s.paused, "paused before is paused afterwards"
    http.post("/continue_generation", json={})
    assert http.post("/resume_memory_occupation", json={"tags": ["nothing"]}).status_code == 400


def test_prime_rl_scores_a_prompt_and_lets_the_context_be_the_limit(http, talking):
    body = {"model": "m", "token_ids": IDS,
            "sampling_params": {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1}}  # fmt: skip
    rows = post(http, "/inference/v1/generate", body)["prompt_logprobs"]
    flat = [0.0 if not row else next(iter(row.values()))["logprob"] for row in rows]
    assert flat == Engine(talking[0], max_batch=1, max_len=64).score([IDS])[0]
    whole = post(http, "/inference/v1/generate", {"token_ids": IDS, "sampling_params": {"ignore_eos": True}})
    assert len(whole["choices"][0]["token_ids"]) == 256 - len(IDS)


def test_requests_are_aborted_by_name_or_all(http, server):
    body = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}
    server.slow_down()
    for names in ({"request_ids": ["mine"]}, {}):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            future = pool.submit(post, http, "/generate", body | {"rid": "mine"})
            wait(lambda: server.engine.scheduler.running)
            none = post(http, "/abort_requests", {"request_ids": []})
            assert none == {"status": "aborted", "aborted": 0} and server.engine.scheduler.running
            assert post(http, "/abort_requests", names) == {"status": "aborted", "aborted": 1}
            assert future.result(30)["meta_info"]["finish_reason"]["type"] == "abort"


def test_texts_are_read_as_the_format_says(http):
    """SGLang's parsers; `parameters` is JSON."""
    schema = {"type": "object", "properties": {"n": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    text = "so<tool_call>f<arg_key>n</arg_key><arg_value>5</arg_value></tool_call>"
    told = post(http, "/parse_function_call", {"text": text, "tools": tools, "tool_call_parser": "glm47"})
    assert told == {
        "normal_text": "so",
        "calls": [{"tool_index": 0, "name": "f", "parameters": '{"n": "5"}'}],
    }
    broken = "so<tool_call>f<arg_key>n</tool_call>"
    assert post(http, "/parse_function_call", {"text": broken}) == {"normal_text": broken, "calls": []}
    for text, thought, said in (("<think>a</think>b", "a", "b"), ("a</think>b", "a", "b"), ("b", "", "b")):
        told = post(
            http, "/separate_reasoning", {"text": text, "reasoning_parser": "glm45", "return_blocks": True}
        )
        assert (told["reasoning_text"], told["text"]) == (thought, said)
        assert [block["text"] for block in told["blocks"]] == [part for part in (thought, said) if part]
    assert http.post("/separate_reasoning", json={"text": "b", "reasoning_parser": "x"}).status_code == 400


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
