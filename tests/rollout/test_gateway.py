"""The gateway against a real OpenAI client over a socket, and against bad requests."""

import random
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replies import Say, random_reply, scripted

from fullarc.agent.tools import SHELL_TOOL
from fullarc.chat import Tokenizer
from fullarc.chat.turns import partial_text
from fullarc.rollout.engine_client import Completion, EngineClient
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.serve import serving
from fullarc.rollout.wire import read_completion

CALL = "<tool_call>shell<arg_key>command</arg_key><arg_value>cat a.txt</arg_value></tool_call>"
HELLO: dict[str, Any] = {"model": "fullarc", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def client(engine: FakeEngine, tok: Tokenizer) -> Iterator[openai.OpenAI]:
    """openai -> gateway -> engine, both hops through real sockets."""
    with serving(engine.app) as engine_url:
        gateway = Gateway(EngineClient(engine_url), tok, max_len=400, api_key="k")
        with serving(gateway.app) as url:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)


def test_openai_client_calls_a_tool_and_goes_on(
    client: openai.OpenAI, engine: FakeEngine, tok: Tokenizer, say: Say
) -> None:
    first, second = say("list it</think>" + CALL, "<|observation|>"), say("so</think>done 12")
    engine.script = scripted(first, second)
    session = {"X-Session-ID": "a"}
    messages: list[Any] = [{"role": "user", "content": "list it"}]
    reply = client.chat.completions.create(
        model="fullarc", messages=messages, tools=[SHELL_TOOL], extra_headers=session, logprobs=True,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls[0].function.arguments == '{"command": "cat a.txt"}'
    assert choice.message.reasoning_content == "list it"
    assert choice.token_ids == first and reply.prompt_token_ids == engine.prompts[0]
    assert [entry.logprob for entry in choice.logprobs.content] == [
        engine.logprob(engine.prompts[0], i, token) for i, token in enumerate(first)
    ]
    assert reply.usage.completion_tokens == len(first)
    messages += [choice.message.model_dump(exclude_none=True),
                 {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "12"}]  # fmt: skip
    reply = client.chat.completions.create(
        model="fullarc", messages=messages, tools=[SHELL_TOOL], extra_headers=session
    )
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("done 12", "stop")
    assert engine.prompts[1][: len(engine.prompts[0] + first)] == engine.prompts[0] + first


@pytest.mark.parametrize("text", [
    ("so</think>hello 12", "<|user|>"), ("list it</think>then" + CALL, "<|observation|>"),
    ("so</think>the <tool_call>cat", "<|user|>"), ("print print", ""), ("</think>\u00e9\u4f60 ok", "<|user|>"),
])  # fmt: skip
def test_streamed_deltas_add_up_to_the_reply(
    client: openai.OpenAI, engine: FakeEngine, say: Say, text: tuple[str, str]
) -> None:
    engine.script = lambda prompt, params: say(*text)
    whole = client.chat.completions.create(**HELLO, extra_body={"return_token_ids": True}).choices[0]
    chunks = list(client.chat.completions.create(
        **HELLO, stream=True, stream_options={"include_usage": True}, extra_body={"return_token_ids": True}
    ))  # fmt: skip
    choices = [c.choices[0] for c in chunks if c.choices]
    deltas = [choice.delta for choice in choices]
    assert "".join(d.content or "" for d in deltas) == (whole.message.content or "")
    assert "".join(getattr(d, "reasoning_content", "") or "" for d in deltas) == getattr(
        whole.message, "reasoning_content", ""
    )
    names = [call.function.name for d in deltas for call in d.tool_calls or []]
    assert names == [call.function.name for call in whole.message.tool_calls or []]
    assert [t for c in choices for t in getattr(c, "token_ids", None) or []] == whole.token_ids
    assert choices[-1].finish_reason == whole.finish_reason
    assert len(chunks) > 3 and chunks[-1].usage.completion_tokens == len(whole.token_ids)


def test_a_model_that_never_stops_ends_with_length(
    client: openai.OpenAI, engine: FakeEngine, say: Say
) -> None:
    engine.script = lambda prompt, params: say("print ", "") * 1000
    reply = client.chat.completions.create(**HELLO, max_tokens=7)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 7
    reply = client.chat.completions.create(**HELLO, max_tokens=10**6)  # the context is the last limit
    assert reply.choices[0].finish_reason == "length" and reply.usage.total_tokens == 400
    with pytest.raises(openai.BadRequestError, match="context holds 400") as caught:
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "12 " * 400}])
    assert caught.value.code == "context_length_exceeded"


def test_keys_models_and_sessions(client: openai.OpenAI, engine: FakeEngine, say: Say) -> None:
    engine.script = lambda prompt, params: say("</think>hello")
    assert [m.id for m in client.models.list()] == ["fullarc"]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    client.chat.completions.create(**HELLO, extra_headers={"X-Session-ID": "s"})
    root = str(client.base_url).removesuffix("/v1/")
    headers = {"Authorization": "Bearer k"}
    record = httpx.get(f"{root}/sessions/s/trajectory", headers=headers).json()
    assert record["schema_version"] == "ATIF-v1.8" and len(record["steps"]) == 2
    assert httpx.delete(f"{root}/sessions/s", headers=headers).status_code == 200
    assert httpx.get(f"{root}/sessions/s/trajectory", headers=headers).status_code == 404
    assert httpx.get(f"{root}/health", headers=headers).json() == {"status": "ok"}


async def test_malformed_call_is_content_with_an_error(
    http: httpx.AsyncClient, engine: FakeEngine, say: Say
) -> None:
    engine.script = lambda prompt, params: say(
        "so</think><tool_call>shell<arg_key>x</tool_call>", "<|observation|>"
    )
    choice = (await http.post("/v1/chat/completions", json=HELLO)).json()["choices"][0]
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "<tool_call>shell<arg_key>x</tool_call>"
    assert "malformed_tool_call" in choice["format_errors"]


async def test_n_replies_have_their_own_seeds(http: httpx.AsyncClient, engine: FakeEngine, say: Say) -> None:
    seeds = []

    def script(prompt: list[int], params: dict[str, Any]) -> list[int]:
        seeds.append(params["sampling_seed"])
        return say("</think>hello")

    engine.script = script
    reply = (await http.post("/v1/chat/completions", json=HELLO | {"n": 3, "seed": 5})).json()
    assert len(reply["choices"]) == 3 and len(set(seeds)) == 3 and seeds[0] == 5


async def test_only_loopback_without_a_key(gateway: Gateway) -> None:
    for client, status in ((("127.0.0.1", 1), 200), (("::1", 1), 200), (("10.0.0.7", 1), 401)):
        transport = httpx.ASGITransport(gateway.app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            assert (await http.get("/v1/models")).status_code == status


async def test_pages_of_other_sites_need_a_key(gateway: Gateway, tok: Tokenizer) -> None:
    keyed = Gateway(gateway.engine, tok, api_key="k")
    for evil in (
        {"origin": "http://evil.example"},
        {"host": "evil.example"},
        {"sec-fetch-site": "cross-site"},
    ):
        for app, status in ((gateway.app, 403), (keyed.app, 200)):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                answer = await http.get("/v1/models", headers=evil | {"x-api-key": "k"})
                assert answer.status_code == status


async def test_engine_failures_are_typed(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    for status, seen in ((400, 400), (500, 502)):
        engine.fail = [status]
        response = await http.post("/v1/chat/completions", json=HELLO)
        assert response.status_code == seen and response.json()["error"]["type"] == "engine_error"


def test_a_full_queue_is_429_to_both_clients_streamed_or_not(
    client: openai.OpenAI, engine: FakeEngine, say: Say
) -> None:
    engine.script = lambda prompt, params: say("</think>hello")
    claude = anthropic.Anthropic(base_url=str(client.base_url)[:-3], auth_token="k", max_retries=0)
    for stream in (False, True):
        headers = {"X-Session-ID": "s"}
        engine.fail = [429, 429]
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**HELLO, stream=stream, extra_headers=headers)
        assert caught.value.type == "rate_limit_error" and caught.value.code == "engine_busy"
        assert caught.value.response.headers["retry-after"] == "7"
        with pytest.raises(anthropic.RateLimitError) as refused:
            claude.messages.create(**HELLO, max_tokens=9, stream=stream, extra_headers=headers)
        assert refused.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
        assert refused.value.response.headers["retry-after"] == "7"
    # nothing of it is in the session
    again = client.chat.completions.create(**HELLO, extra_headers=headers)
    assert again.choices[0].message.content == "hello" and len(engine.prompts) == 1


async def test_too_many_sessions_is_429(engine: FakeEngine, tok: Tokenizer) -> None:
    async with EngineClient("http://engine", transport=httpx.ASGITransport(engine.app)) as client:
        gateway = Gateway(client, tok, max_sessions=1)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(gateway.app), base_url="http://localhost"
        ) as http:
            codes = [(await http.post("/v1/chat/completions", json=HELLO, headers={"X-Session-ID": s})).status_code
                     for s in "aab"]  # fmt: skip
    assert codes == [200, 200, 429]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "messages", "model", "tools", "tool_choice", "stream", "stream_options", "max_tokens", "temperature",
    "top_p", "seed", "n", "logprobs", "stop", "chat_template_kwargs", "return_token_ids",
    "max_completion_tokens", "response_format", "structural_tag", "structured_outputs", "guided_json", "regex",
]  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "x"])},
    optional={"content": JSON, "tool_calls": JSON | st.lists(st.fixed_dictionaries({"function": JSON})),
              "reasoning_content": JSON, "tool_call_id": JSON},
)  # fmt: skip
TOOL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": JSON, "parameters": JSON})})
BODY = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4).flatmap(
    lambda body: st.fixed_dictionaries(
        {k: st.just(v) for k, v in body.items() if k not in ("messages", "tools")}
        | {"messages": st.lists(MESSAGE, max_size=3) | JSON, "tools": st.lists(TOOL, max_size=2) | JSON}
    )
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODY | JSON)
async def test_no_request_makes_a_5xx(http: httpx.AsyncClient, body: Any) -> None:
    import json

    for content in (json.dumps(body).encode(), json.dumps(body).encode()[:-1]):
        response = await http.post("/v1/chat/completions", content=content, headers={"X-Session-ID": "f"})
        assert response.status_code < 500
        if response.status_code >= 400:
            assert response.json()["error"]["message"]


async def test_what_would_change_what_is_sampled_is_passed_on_or_refused(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    seen: list[Any] = []
    script = engine.script
    engine.script = lambda prompt, params: (seen.append(params), script(prompt, params))[1]
    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    for path in ("/v1/chat/completions", "/v1/messages"):
        body = ask | {"top_k": 5, "top_p": 0.9, "min_p": 0.1}
        assert (await http.post(path, json=body)).status_code == 200
        assert (seen[-1]["top_k"], seen[-1]["top_p"], seen[-1]["min_p"]) == (5, 0.9, 0.1)
        assert (await http.post(path, json=ask | {"top_k": -1, "min_p": 0})).status_code == 200
        assert "top_k" not in seen[-1] and "min_p" not in seen[-1]
    for name, value in (
        ("repetition_penalty", 1.2), ("min_tokens", 2), ("ignore_eos", True), ("stop_token_ids", [5]),
        ("lora_path", "a"), ("cache_salt", "a"), ("top_k", -2), ("min_p", 2), ("frequency_penalty", 0.5),
        ("logit_bias", {"5": 1}),
    ):  # fmt: skip
        for path in ("/v1/chat/completions", "/v1/messages"):
            reply = await http.post(path, json=ask | {name: value})
            assert reply.status_code == 400 and name in reply.json()["error"]["message"]
    neutral = {
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "ignore_eos": False,
        "stop_token_ids": [],
        "top_k": 0,
    }
    assert (await http.post("/v1/chat/completions", json=ask | neutral)).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'{"messages": []}'])
async def test_broken_bodies_are_400(http: httpx.AsyncClient, content: bytes) -> None:
    assert (await http.post("/v1/chat/completions", content=content)).status_code == 400
    assert (await http.get("/v1/chat/completions")).status_code == 405
    assert (await http.get("/nothing")).status_code == 404


@pytest.mark.parametrize(
    "tools",
    ["x", [1], [{}], [{"function": "x"}], [{"function": {"name": ""}}],
     [{"function": {"name": "x", "parameters": [1]}}],
     [{"function": {"name": "x", "parameters": {"properties": [1]}}}]],
)  # fmt: skip
async def test_bad_tools_are_400(http: httpx.AsyncClient, tools: Any) -> None:
    response = await http.post("/v1/chat/completions", json=HELLO | {"tools": tools})
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("tools")


async def test_text_without_a_utf8_form_survives(http: httpx.AsyncClient) -> None:
    odd = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert (
        await http.post("/v1/chat/completions", content=odd, headers={"X-Session-ID": "u"})
    ).status_code == 200
    record = (await http.get("/sessions/u/trajectory")).json()
    assert record["steps"][0]["message"] == "\ud800"


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), thinking=st.booleans())
def test_what_is_shown_of_an_unfinished_turn_is_a_prefix_of_the_finished_one(
    seed: int, thinking: bool, tok: Tokenizer, say: Say
) -> None:
    rng = random.Random(seed)
    ids = [token for _ in range(rng.randint(1, 3)) for token in random_reply(say, rng, tok)]
    final = read_completion(
        tok, Completion(ids, [0.0] * len(ids), [0] * len(ids), ""), thinking, None, "c"
    ).message
    shown = ("", "")
    for end in range(len(ids)):
        now = partial_text(tok, ids[:end], thinking)
        assert now[0].startswith(shown[0]) and now[1].startswith(shown[1])
        assert final.reasoning.startswith(now[0]) and final.content.startswith(now[1])
        shown = now
