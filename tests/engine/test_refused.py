"""What would change an answer and is not implemented is refused by its name; what means the default is accepted."""

import pytest
from bodies import HELLO, IDS
from running import Running

CHAT = {"messages": HELLO, "max_tokens": 1}
TEXT = {"prompt": "a", "max_tokens": 1}
SAMPLING = [
    ("stop_regex", "a+", [None, "", []]),
    ("stop_regex", ["a+"], []),
    ("custom_logit_processor", "x", [None]),
    ("logits_processors", ["x"], [None, []]),
    ("truncate_prompt_tokens", 4, [None]),
]
TEMPLATE = [
    ("chat_template", "{{ messages }}", [None]),
    ("documents", [{"text": "a"}], [None, []]),
    ("add_generation_prompt", False, [None, True]),
    ("echo", True, [None, False]),
]


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/chat/completions", CHAT, SAMPLING + TEMPLATE),
        ("/v1/completions", TEXT, SAMPLING),
        ("/v1/embeddings", {"input": [IDS]}, [("truncate_prompt_tokens", 4, [None])]),
    ],
)
def test_a_field_of_a_generating_route(http, path, body, fields):
    for name, bad, neutral in fields:
        refused = http.post(path, json=body | {name: bad})
        assert refused.status_code == 400 and name in refused.json()["error"]["message"], (name, refused.text)
        assert refused.json()["error"]["param"] == name
        for value in neutral:
            answer = http.post(path, json=body | {name: value})
            assert answer.status_code == 200, (name, value, answer.text)


@pytest.mark.parametrize(
    ("name", "bad", "neutral"),
    [
        ("load_format", "dummy", [None, "auto", "safetensors"]),
        ("is_async", True, [None, False]),
        ("keep_pause", True, [None, False]),
    ],
)
def test_a_field_of_an_update_from_disk(http, talking, name, bad, neutral):
    body = {"model_path": str(talking[0])}
    before = http.get("/weight_version").json()
    refused = http.post("/update_weights_from_disk", json=body | {name: bad})
    assert refused.status_code == 400 and name in refused.json()["error"]["message"]
    assert http.get("/weight_version").json() == before
    for value in neutral:
        answer = http.post("/update_weights_from_disk", json=body | {name: value})
        assert answer.status_code == 200 and answer.json()["success"] is True
