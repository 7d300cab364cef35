"""Anthropic's own client in a session of the gateway: what is recorded is what was sampled, whatever the client sends
back."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replies import Say, scripted

from fullarc.chat import Message, Tokenizer, render
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.serve import serving

CALL = "<tool_call>shell<arg_key>command</arg_key><arg_value>cat a.txt</arg_value></tool_call>"
SHELL = {"name": "shell", "description": "Run it.", "input_schema": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}  # fmt: skip
SESSION = {"X-Session-ID": "a"}


@pytest.fixture
def gate(engine: FakeEngine, tok: Tokenizer) -> Iterator[Gateway]:
    with serving(engine.app) as engine_url:
        yield Gateway(EngineClient(engine_url), tok, max_len=900, api_key="k")


@pytest.fixture
def claude(gate: Gateway) -> Iterator[anthropic.Anthropic]:
    """anthropic -> gateway -> engine, both hops through real sockets; the key comes as x-api-key."""
    with serving(gate.app) as url:
        yield anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)


def ask(**more: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "max_tokens": 60,
        "system": "print",
        "tools": [SHELL],
        "extra_headers": SESSION,
    } | more


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_session_is_recorded_token_by_token(
    claude: anthropic.Anthropic,
    gate: Gateway,
    engine: FakeEngine,
    tok: Tokenizer,
    say: Say,
    streamed: bool,
    keeps: bool,
) -> None:
    """With a client that sends thinking blocks back, and one that drops them."""
    first, second = say("list it</think>so" + CALL, "<|observation|>"), say("then</think>done 12")
    engine.script = scripted(first, second)

    def turn(messages: list[Any]) -> anthropic.types.Message:
        if not streamed:
            return claude.messages.create(**ask(messages=messages))
        with claude.messages.stream(**ask(messages=messages)) as stream:
            assert "message_start" in {event.type for event in stream}
            return stream.get_final_message()

    messages: list[Any] = [{"role": "user", "content": "list it"}]
    reply = turn(messages)
    assert [block.type for block in reply.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = reply.content
    assert (thinking.thinking, text.text, call.input) == ("list it", "so", {"command": "cat a.txt"})
    assert reply.stop_reason == "tool_use" and reply.usage.output_tokens == len(first)
    back = [block.model_dump() for block in reply.content if keeps or block.type != "thinking"]
    messages += [
        {"role": "assistant", "content": back},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "12"}]},
    ]
    count = claude.messages.count_tokens(
        model="m", messages=messages, system="print", tools=[SHELL], extra_headers=SESSION
    )
    reply = turn(messages)
    assert reply.content[-1].text == "done 12" and reply.stop_reason == "end_turn"
    tools = [{"type": "function", "function": {"name": "shell", "description": "Run it.",
                                               "parameters": SHELL["input_schema"]}}]  # fmt: skip
    opening = [Message("system", "print"), Message("user", "list it")]
    assert engine.prompts[0] == render(tok, opening, tools, add_generation_prompt=True).ids
    assert engine.prompts[1][: len(engine.prompts[0] + first)] == engine.prompts[0] + first
    assert count.input_tokens == len(engine.prompts[1])
    turns = gate.trajectory("a").turns
    assert [turn.completion_ids for turn in turns] == [first, second] and not turns[1].fork
    assert turns[1].logprobs == [engine.logprob(engine.prompts[1], i, t) for i, t in enumerate(second)]


def test_both_dialects_go_on_in_one_session(
    claude: anthropic.Anthropic, gate: Gateway, engine: FakeEngine, say: Say
) -> None:
    import openai

    engine.script = scripted(say("so</think>hello"), say("then</think>done 12"))
    gpt = openai.OpenAI(base_url=f"{str(claude.base_url).rstrip('/')}/v1", api_key="k", max_retries=0)
    hello: list[Any] = [{"role": "user", "content": "hello"}]
    reply = gpt.chat.completions.create(model="m", messages=hello, extra_headers=SESSION).choices[0].message
    more = [*hello, {"role": "assistant", "content": reply.content}, {"role": "user", "content": "then"}]
    claude.messages.create(model="m", max_tokens=9, messages=more, extra_headers=SESSION)
    assert engine.prompts[1][: len(engine.prompts[0])] == engine.prompts[0] and not gate.sessions["a"].forks


def test_what_a_session_cannot_do_is_refused_in_anthropics_form(
    claude: anthropic.Anthropic, engine: FakeEngine
) -> None:
    hello = [{"role": "user", "content": "hello"}]
    for change, says in (
        ({"messages": []}, "messages is empty"), ({"tool_choice": {"type": "any"}}, "auto or none"),
        ({"tool_choice": {"type": "tool", "name": "shell"}}, "auto or none"),
        ({"stop_sequences": [5]}, "stop_sequences"), ({"thinking": {"type": "maybe"}}, "thinking"),
        ({"extra_body": {"top_k": -5}}, "top_k"), ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 5}}}, "output_config"),
        ({"messages": [{"role": "user", "content": "12 " * 900}]}, "900"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "text blocks"),
    ):  # fmt: skip
        with pytest.raises(anthropic.BadRequestError, match=says) as caught:
            claude.messages.create(**ask(messages=hello) | change)  # type: ignore[arg-type]
        assert caught.value.body["type"] == "error"  # type: ignore[index]
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="no").messages.create(**ask(messages=hello))
    engine.fail = [500]
    with pytest.raises(anthropic.APIStatusError) as failed:
        claude.messages.create(**ask(messages=hello))
    assert failed.value.body["error"]["type"] == "engine_error"  # type: ignore[index]
    off = claude.messages.create(
        **ask(messages=hello, thinking={"type": "disabled"}, tool_choice={"type": "none"})
    )
    assert all(block.type == "text" for block in off.content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["messages", "system", "tools", "tool_choice", "thinking", "max_tokens", "temperature", "top_p", "top_k",
          "stream", "stop_sequences", "seed", "model", "output_config"]  # fmt: skip
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image"])},
    optional={
        "text": JSON,
        "thinking": JSON,
        "name": JSON,
        "input": JSON,
        "content": JSON,
        "tool_use_id": JSON,
    },
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "x"]), "content": JSON | st.lists(BLOCK, max_size=3)}
)
BODY = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3).flatmap(
    lambda body: st.fixed_dictionaries(
        {"max_tokens": st.just(5), "messages": st.lists(MESSAGE, max_size=3) | JSON}
        | {k: st.just(v) for k, v in body.items() if k != "messages"}
    )
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODY | JSON)
async def test_no_request_makes_a_5xx(http: httpx.AsyncClient, body: Any) -> None:
    import json

    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        for content in (json.dumps(body).encode(), json.dumps(body).encode()[:-1]):
            response = await http.post(path, content=content, headers={"X-Session-ID": "f"})
            assert response.status_code < 500
            if response.status_code >= 400:
                assert response.json()["type"] == "error" and response.json()["error"]["message"]
