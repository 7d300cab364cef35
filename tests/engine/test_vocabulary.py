"""A model may have more ids than its tokenizer has tokens, as published ones do: they have no text, and do no harm."""

import httpx
import pytest
from running import Running

from fullarc.config.model import preset
from fullarc.model import GlmMoeDsa, save_model

BEYOND = 700
STEERED = {"logit_bias": {str(BEYOND): 100.0}, "temperature": 0.0}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(talking, tmp_path_factory):
    folder, tok = tmp_path_factory.mktemp("wide"), talking[1]
    assert tok.vocab_size <= 600
    size = preset(
        "nano", vocab_size=720, eos_token_id=tok.stop_ids, pad_token_id=0, max_position_embeddings=1024
    )
    save_model(GlmMoeDsa(size).init_weights(3).eval(), folder / "m", tokenizer_dir=talking[0])
    running = Running(folder / "m", max_len=1024)
    yield running
    running.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path,body",
    [
        ("/generate", {"text": "hello", "return_logprob": True, "return_text_in_logprobs": True, "sampling_params": {
            **STEERED, "max_new_tokens": 4, "stop": ["x"]}}),
        ("/v1/completions", {"model": "m", "prompt": "hello", "max_tokens": 4, "logprobs": 2, "stop": ["x"],
                             **STEERED}),
        ("/v1/chat/completions", {"model": "m", "messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2,
                                  "stop": ["x"], **STEERED}),
        ("/inference/v1/generate", {"token_ids": [5, 6], "sampling_params": {
            **STEERED, "max_tokens": 4, "logprobs": 1}}),
    ],
)  # fmt: skip
def test_ids_without_a_token_are_told_and_have_no_text(http: httpx.Client, path, body, stream):
    reply = http.post(path, json=body | {"stream": stream})
    assert reply.status_code == 200 and (not stream or reply.text.rstrip().endswith("[DONE]"))
    if not stream:
        choice = reply.json() if path == "/generate" else reply.json()["choices"][0]
        ids = choice.get("output_ids") or choice.get("token_ids")
        assert ids in (None, [BEYOND] * 4)
        text = choice.get("text") or (choice.get("message") or {}).get("content")
        assert not text
    assert http.get("/health").status_code == 200
    plain = http.post(
        "/generate", json={"text": "hello", "sampling_params": {"max_new_tokens": 2, "stop": ["x"]}}
    )
    assert plain.status_code == 200
