"""What a request has had is freed at its end, not when the collector of cycles comes round."""

import gc
import weakref

import httpx
import pytest
from running import Running

from fullarc.engine.scheduler import Scheduler

STOP = [f"stop {number}" for number in range(50)]
TEXT = {"prompt": "hello", "max_tokens": 4, "stop": STOP}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stop": STOP}
TITO = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4, "stop": STOP}}
NATIVE = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "stop": STOP, "n": 2}}
CLAUDE = CHAT | {"stop_sequences": STOP}


@pytest.fixture
def kept(monkeypatch):
    """Weak references to what is submitted from now on: requests, automata, guides. Nothing but counting frees them."""
    found, check = [], Scheduler.check

    def checked(scheduler, request):
        parts = request, request.stops and request.stops._strings, request.guide
        found.extend(weakref.ref(part) for part in parts if part)
        check(scheduler, request)

    monkeypatch.setattr(Scheduler, "check", checked)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_and_their_automata_die_at_their_end(talking, kept, overlap):
    server = Running(talking[0], overlap=overlap)
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        for path, body, status in (
            ("/generate", NATIVE, 200),
            ("/v1/completions", TEXT, 200),
            ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 200),
            ("/inference/v1/generate", TITO, 200),
            ("/v1/messages", CLAUDE, 200),
            ("/generate", NATIVE | {"input_ids": [10**6]}, 400),
        ):
            for stream in (False, True):
                answer = http.post(path, json=body | {"stream": stream})
                assert answer.status_code == status, answer.text
        count = len(kept)
        assert http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1}).status_code == 200
        assert count == 30 and not [ref() for ref in kept[:count] if ref()]
    server.stop()
