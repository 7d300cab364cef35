"""A large body is read and tokenised beside the event loop: others are answered meanwhile."""

import json
import threading
import time

import httpx
import pytest
from running import Running

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
    assert answers[0].status_code == status, answers[0].text[:300]
    if status == 400:
        assert "tokens; the engine serves sequences of up to 256" in answers[0].text
    assert max(waits) < took / 3, (took, sorted(waits)[-3:])
