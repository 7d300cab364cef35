"""Large bodies are read, and large answers written, beside the event loop: others are answered meanwhile."""

import json
import threading
import time

import httpx
import pytest
from running import Running

from fullarc.engine.api import fields, sglang

TEXT = "the file holds a number so list it then print hello done " * 20_000  # 1 MB to tokenise
FILLER = "x" * (24 * 2**20)  # to parse only
MESSAGES = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    running.server.service._longest = (
        10**6
    )  # a server of sequences so long that the text is not refused unread
    yield running
    running.stop()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {"prompt": TEXT}, 200),
        ("/tokenize", {"messages": MESSAGES}, 200),
        ("/generate", {"text": TEXT}, 400),
        ("/v1/completions", {"prompt": TEXT}, 400),
        ("/v1/chat/completions", {"messages": MESSAGES}, 400),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1}, 400),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}, 200),
        ("/v1/score", {"query": TEXT, "items": ["a"], "label_token_ids": [1]}, 400),
        ("/v1/embeddings", {"input": TEXT}, 400),
    ],
)
def test_health_answers_while_a_large_body_is_tokenised(server, http, path, body, status):
    content = json.dumps(body | {"filler": FILLER}).encode()
    reply, took, longest = watched(server, http, path, content)
    assert reply.status_code == status, reply.text[:300]
    if status == 400:
        assert "tokens; the engine serves sequences of up to 256" in reply.text
    assert longest < took / 3, (took, longest)


def watched(server, http, path, content):
    """The reply, how long it took, and the longest time between two answers of /health meanwhile."""
    answers, waits = [], []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(
        server.url + path, content=content, timeout=600, trust_env=False)))  # fmt: skip
    begin = last = time.monotonic()
    asking.start()
    while asking.is_alive():
        assert http.get("/health").status_code == 200
        now = time.monotonic()  # this thread too stands still while another lets nobody run
        waits.append(now - last)
        last = now
    took = time.monotonic() - begin
    return answers[0], took, max(waits)


IDS = [3 + (i * i) % 400 for i in range(250)]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [IDS] * 8, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 128,
                       "return_text_in_logprobs": True, "sampling_params": {"max_new_tokens": 0}}),
        ("/generate", {"input_ids": IDS[:4], "return_logprob": True, "top_logprobs_num": 128, "stream": True,
                       "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}),
        ("/v1/completions", {"model": "m", "prompt": [IDS] * 8, "echo": True, "logprobs": 100, "max_tokens": 0}),
        ("/inference/v1/generate", {"token_ids": IDS, "sampling_params": {"max_tokens": 4, "prompt_logprobs": 100}}),
    ],
)  # fmt: skip
def test_health_answers_while_a_large_answer_is_written(server, http, path, body):
    reply, took, longest = watched(server, http, path, json.dumps(body).encode())
    assert reply.status_code == 200 and len(reply.content) > 500_000
    assert longest < 0.1, (took, longest)


def test_a_cumulative_stream_writes_every_row_once(http, monkeypatch):
    written, real = [], sglang.GrowingList.add
    monkeypatch.setattr(
        sglang.GrowingList, "add", lambda self, rows: (written.extend(rows), real(self, rows))
    )
    body = {"input_ids": IDS[:4], "return_logprob": True, "logprob_start_len": 1, "top_logprobs_num": 2, "stream": True,
            "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}}  # fmt: skip
    events = [
        line for line in http.post("/generate", json=body).text.split("\n\n") if line.startswith("data: {")
    ]
    last = json.loads(events[-1][6:])["meta_info"]
    assert len(events) > 5 and len(written) == 2 * (40 + 3)
    for kind, count in (("output", 40), ("input", 3)):
        assert len(last[f"{kind}_token_logprobs"]) == len(last[f"{kind}_top_logprobs"]) == count


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_many_stop_strings_are_prepared_beside_the_event_loop(server, http, path, monkeypatch):
    threads, real = [], fields.StopStrings
    monkeypatch.setattr(
        fields, "StopStrings", lambda given: (threads.append(threading.current_thread()), real(given))[1]
    )
    stops = [f"stop {n:04} here" for n in range(2000)]
    chat = {"model": "m", "messages": [{"role": "user", "content": "so"}], "max_tokens": 2}
    body = {
        "/generate": {"text": "so", "sampling_params": {"stop": stops, "max_new_tokens": 2}},
        "/v1/completions": {"model": "m", "prompt": "so", "stop": stops, "max_tokens": 2},
        "/v1/chat/completions": chat | {"stop": stops},
        "/v1/messages": chat | {"stop_sequences": stops},
    }[path]
    assert http.post(path, json=body).status_code == 200
    assert threads and server.thread not in threads
