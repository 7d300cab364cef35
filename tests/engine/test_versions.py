"""Every answer that weights were used for says which: in a header, and where OpenAI's clients read it."""

import concurrent.futures
import json
from urllib.parse import unquote

import anthropic
import httpx
import openai
import pytest
from bodies import HELLO, IDS
from running import Running, wait

from fullarc.engine import sampler
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.serve import serving

NAMES = ("7", "späť\r\nx: 1")
COMPUTING = {
    "/generate": {"input_ids": IDS, "sampling_params": {"max_new_tokens": 2}},
    "/inference/v1/generate": {"token_ids": IDS, "sampling_params": {"max_tokens": 2}},
    "/v1/completions": {"prompt": "hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/v1/messages": {"messages": HELLO, "max_tokens": 2},
    "/v1/responses": {"input": "hello", "max_output_tokens": 2},
    "/v1/score": {"query": "a", "items": ["b"], "label_token_ids": [1]},
    "/v1/embeddings": {"input": "a"},
    "/encode": {"input_ids": IDS},
}


@pytest.fixture
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


@pytest.mark.parametrize("name", NAMES)
def test_every_computing_route_has_the_header_whole_and_streamed(server, http, name):
    http.post("/update_weight_version", json={"new_version": name}).raise_for_status()
    for path, body in COMPUTING.items():
        for stream in (False, True):
            answer = http.post(path, json=body | {"stream": stream})
            assert answer.status_code == 200, (path, answer.text)
            assert unquote(answer.headers["x-weight-version"]) == name, (path, stream)
            assert "x" not in answer.headers
    assert "x-weight-version" not in http.post("/tokenize", json={"prompt": "a"}).headers


SPANNED = {
    "/v1/completions": {"prompt": "hello", "ignore_eos": True, "return_token_ids": True},
    "/v1/messages": {"messages": HELLO, "seed": 1},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", SPANNED)
def test_every_token_has_its_version_when_weights_change_in_between(server, http, path, stream, monkeypatch):
    """AReaL's route to vLLM, and Anthropic's: the clients ignore the field, or read it as an extra one."""
    scheduler, real, moments = server.engine.scheduler, sampler.sample, []

    def sample(*rest):
        moments.append(
            scheduler.version
        )  # a version for each token, noted apart from the engine's own account
        tokens, logprobs = real(*rest)
        return [5] * len(tokens), logprobs

    monkeypatch.setattr(sampler, "sample", sample)
    server.slow_down(0.01)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(http.post, path, json=SPANNED[path] | {"max_tokens": 40, "stream": stream})
        for count, name in ((5, "1"), (15, "2")):
            wait(lambda count=count: len(moments) > count)
            http.post("/update_weight_version", json={"new_version": name}).raise_for_status()
        answer = answer.result(60)
    told = json.loads(answer.text) if not stream else {}
    for line in answer.text.split("\n") if stream else ():
        chunk = json.loads(line[6:]) if line.startswith("data: {") else {}
        ends = chunk.get("weight_versions") or any(c["finish_reason"] for c in chunk.get("choices", ()))
        told = chunk if ends else told
    [given] = [told, *told.get("choices", [])][-1:]
    spans = [s["version"] for s in given["weight_versions"] for _ in range(s["start"], s["end"])]
    assert spans == moments and len(spans) == 40 and list(dict.fromkeys(spans)) == ["0", "1", "2"]


def test_anthropics_client_reads_past_the_versions(server):
    claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    ask = dict(model="talking", messages=HELLO, max_tokens=3)
    assert claude.messages.create(**ask).weight_versions[0]["version"] == "0"
    with claude.messages.stream(**ask) as stream:
        assert stream.get_final_message().usage.output_tokens == 3


def test_a_stream_begins_with_the_old_version_and_its_chunks_tell_the_new_one(server, http):
    server.slow_down(0.02)
    body = {"messages": HELLO, "max_tokens": 40, "ignore_eos": True, "stream": True, "return_token_ids": True}
    told = []
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["x-weight-version"] == "0"
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                told.append(chunk["metadata"]["weight_version"])
                if len(told) == 3:
                    http.post("/update_weight_version", json={"new_version": "1"}).raise_for_status()
    assert told == sorted(told) and set(told) == {"0", "1"}
    gpt = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for reply in (
        gpt.chat.completions.create(model="m", messages=HELLO, max_tokens=2),
        gpt.completions.create(model="m", prompt="hello", max_tokens=2),
    ):
        assert reply.metadata["weight_version"] == "1"


def test_the_gateway_hands_it_on_and_says_it_of_recorded_sessions(server, http, talking):
    http.post("/update_weight_version", json={"new_version": "12"}).raise_for_status()
    app = Gateway(EngineClient(server.url), talking[1], max_len=256, passes="all").app
    with serving(app) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as web:
        for headers in ({}, {"X-Session-ID": "s"}):
            for path in ("/v1/chat/completions", "/v1/messages"):
                for stream in (False, True):
                    body = COMPUTING[path] | {"stream": stream}
                    answer = web.post(path, json=body, headers=headers)
                    assert answer.status_code == 200 and answer.headers["x-weight-version"] == "12", (
                        answer.text
                    )
