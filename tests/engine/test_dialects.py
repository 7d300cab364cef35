"""OpenAI's and Anthropic's own clients before the engine: tools, reasoning, streams, stops, log-probs, errors."""

import time
from types import SimpleNamespace

import anthropic
import openai
import pytest
from running import Running

from fullarc.chat import Message, Tokenizer, render
from fullarc.engine import Engine, SamplingParams
from fullarc.engine.api.chat import Growing
from fullarc.engine.api.fields import SamplingBody
from fullarc.engine.api.text import GrowingText
from fullarc.engine.request import Request
from fullarc.engine.stops import StopStrings, StopWatch

TOOL = {"type": "function", "function": {"name": "shell", "description": "Run it.", "parameters": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}}  # fmt: skip
CALL = "<tool_call>shell<arg_key>command</arg_key><arg_value>cat a.txt</arg_value></tool_call>"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0], max_len=1024)
    yield running
    running.stop()


@pytest.fixture
def slowly(server, monkeypatch):
    """Every step takes so long that a stream has an event for each token."""
    step = server.engine.scheduler.step
    monkeypatch.setattr(server.engine.scheduler, "step", lambda: (time.sleep(0.01), step()))


def test_openai_client_calls_a_tool_and_goes_on(gpt, says, talking):
    tok: Tokenizer = talking[1]
    says(7, f"list it</think>{CALL}<|observation|>")
    reply = gpt.chat.completions.create(
        model="talking", messages=HELLO, tools=[TOOL], seed=7, extra_body={"return_token_ids": True}
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls[0].function.arguments == '{"command": "cat a.txt"}'
    assert choice.message.reasoning_content == "list it"
    assert reply.usage.completion_tokens_details.reasoning_tokens == len(talking[1].encode("list it"))
    assert (
        reply.prompt_token_ids
        == render(tok, [Message("user", "hello")], [TOOL], add_generation_prompt=True).ids
    )
    assert tok.decode(choice.token_ids) == f"list it</think>{CALL}<|observation|>"
    assert reply.usage.total_tokens == len(reply.prompt_token_ids) + len(choice.token_ids)
    messages = [*HELLO, choice.message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "12"}]  # fmt: skip
    says(8, "so</think>done 12<|user|>")
    again = gpt.chat.completions.create(
        model="talking", messages=messages, tools=[TOOL], seed=8, extra_body={"return_token_ids": True}
    )
    assert (again.choices[0].message.content, again.choices[0].finish_reason) == ("done 12", "stop")
    before = reply.prompt_token_ids + choice.token_ids
    assert (
        again.prompt_token_ids[: len(before)] == before
        and again.usage.prompt_tokens_details.cached_tokens > 0
    )


def test_verifiers_sends_the_prompt_as_tokens(gpt, talking):
    """Its client of prime-rl's server: the messages go along, the ids are what counts."""
    ids = talking[1].encode("so list it")
    body = dict(model="talking", messages=HELLO, tools=[TOOL], tokens=ids, max_completion_tokens=9, seed=4,
                logprobs=True, return_token_ids=True, ignore_eos=True)  # fmt: skip
    reply = gpt.post("/chat/completions/tokens", body=body, cast_to=openai.types.chat.ChatCompletion)
    expected = Engine(talking[0], max_batch=1, max_len=64).generate([ids], 9, seeds=[4], stop_ids=())[0]
    assert reply.prompt_token_ids == ids and reply.choices[0].token_ids == expected.token_ids
    assert [entry.logprob for entry in reply.choices[0].logprobs.content] == expected.logprobs
    for wrong in ({"tokens": []}, {"tokens": ["a"]}, {"tokens": [10**6]}, {"tokens": None}):
        with pytest.raises(openai.BadRequestError):
            gpt.post("/chat/completions/tokens", body=body | wrong, cast_to=openai.types.chat.ChatCompletion)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("extra", [{}, {"separate_reasoning": False}, {"stream_reasoning": False},
                                   {"chat_template_kwargs": {"enable_thinking": False}}])  # fmt: skip
def test_streamed_deltas_add_up_to_the_reply(gpt, says, seed, extra):
    scripts = [
        f"list it</think>so list{CALL}<|observation|>",
        "a 我们 </think> print 30 done hello it <|user|>",
    ]
    if seed < 2:
        says(seed, scripts[seed])
    ask = dict(model="talking", messages=HELLO, seed=seed, max_tokens=25, n=2, tools=[TOOL], logprobs=True,
               stop=["done h", "zzz"], extra_body=extra | {"return_token_ids": True})  # fmt: skip
    whole = gpt.chat.completions.create(**ask)
    if seed < 2:
        says(seed, scripts[seed])
    told = {
        n: {"content": "", "reasoning_content": "", "tools": [], "ids": [], "logprobs": []} for n in range(2)
    }
    usage = None
    for chunk in gpt.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            mine, delta = told[choice.index], choice.delta
            mine["content"] += delta.content or ""
            mine["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            mine["tools"] += [call.function.arguments for call in delta.tool_calls or []]
            mine["ids"] += getattr(choice, "token_ids", None) or []
            mine["logprobs"] += choice.logprobs.content if choice.logprobs else []
            mine["finish"] = choice.finish_reason
    for choice in whole.choices:
        mine = told[choice.index]
        assert mine["content"] == (choice.message.content or "")
        assert mine["reasoning_content"] == (getattr(choice.message, "reasoning_content", None) or "")
        assert mine["tools"] == [call.function.arguments for call in choice.message.tool_calls or []]
        assert mine["ids"] == choice.token_ids and mine["finish"] == choice.finish_reason
        assert [entry.logprob for entry in mine["logprobs"]] == [e.logprob for e in choice.logprobs.content]
    usage.prompt_tokens_details.cached_tokens = (
        whole.usage.prompt_tokens_details.cached_tokens
    )  # the first asks anew
    assert usage == whole.usage
    if seed == 1:
        assert whole.choices[0].finish_reason == "stop" and whole.choices[0].stop_reason == "done h"


# what is sampled, the stop, and the reasoning and content before it; `stop_token_ids` are named by their text
STOPS = {
    "white space behind": ("</think>a list done\n so", "done\n", "", "a list"),
    "white space before": ("</think>\nlist it", "\nlist", "", ""),
    "before any text": ("</think>\n\na list", "\n", "", ""),
    "thoughts": ("so list\n it</think>done", "list\n", "so", ""),
    "the second of two": ("</think>a list it list\n it", "list\n", "", "a list it"),
    "inside a token": ("</think>a list hello it", "llo", "", "a list he"),
    "inside a token of halves": ("</think>我们 模型从文本 it", "文", "", "我们 模型从"),
    "inside a special token": ("so list</think>done it", "nk>", "so list", ""),
    "a special token": ("so list</think>done it", "</think>", "so list", ""),
    "behind a call": (f"</think>so{CALL}\nlist it", "\nlist", "", "so"),
    "inside a call": (f"</think>so\n{CALL}", "cat", "", "so\n<tool_call>shell<arg_key>command</arg_key><arg_value>"),
    "a token": ("</think>a list done it", [" done"], "", "a list"),
}  # fmt: skip


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("case", STOPS)
def test_a_turn_ends_where_its_stop_begins(gpt, claude, says, talking, case):
    script, stop, thought, said = STOPS[case]
    ask = {"stop": stop} if isinstance(stop, str) else {"stop_token_ids": talking[1].encode(stop[0])}
    body = dict(
        model="talking", messages=HELLO, max_tokens=60, seed=says(7, script), tools=[TOOL], extra_body=ask
    )
    [choice] = gpt.chat.completions.create(**body).choices
    assert getattr(choice.message, "reasoning_content", None) == (thought or None)
    assert (choice.message.content or "") == said
    assert choice.finish_reason == ("tool_calls" if case == "behind a call" else "stop")
    says(7, script)
    deltas = [chunk.choices[0].delta for chunk in gpt.chat.completions.create(**body, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == said
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == thought
    if isinstance(stop, str):
        tools = [{"name": "shell", "input_schema": TOOL["function"]["parameters"]}]
        body = dict(model="talking", messages=HELLO, max_tokens=60, stop_sequences=[stop], tools=tools)
        blocks = {"thinking": thought, "text": said}
        says(7, script)
        whole = claude.messages.create(**body, extra_body={"seed": 7})
        says(7, script)
        with claude.messages.stream(**body, extra_body={"seed": 7}) as stream:
            streamed = stream.get_final_message()
        for reply in (whole, streamed):
            told = {block.type: getattr(block, block.type, None) for block in reply.content}
            told.pop("tool_use", None)
            assert told == {kind: text for kind, text in blocks.items() if text}
            assert reply.stop_sequence == stop


def test_a_stop_that_is_wanted_stays(gpt, says, talking):
    for stop in ({"stop": "done\n"}, {"stop_token_ids": talking[1].encode(" done")}):
        ask = dict(model="talking", messages=HELLO, seed=says(7, "</think>a list done\n so"),
                   extra_body=stop | {"include_stop_str_in_output": True})  # fmt: skip
        assert gpt.chat.completions.create(**ask).choices[0].message.content == "a list done"
        says(7, "</think>a list done\n so")
        chunks = gpt.chat.completions.create(**ask, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a list done"


@pytest.mark.parametrize("stops", [[], ["never"]])
def test_a_stop_token_is_held_back_until_more_comes(talking, stops):
    """Who reads a stream may look between a token and the end that it brings."""
    tok: Tokenizer = talking[1]
    request = Request("r", [1], SamplingParams(stop_ids=frozenset(tok.encode(" done"))))
    request.stops = StopWatch(StopStrings(stops), tok.token_bytes) if stops else None
    turn = Growing(SimpleNamespace(requests=[request], tok=tok, thinking=False, wire=SamplingBody()), 0)
    text, told = GrowingText(tok, request, SamplingBody()), []
    for token in tok.encode("a list done it"):
        request.ids.append(token)
        if request.stops:
            request.stops.feed(token)
        request.logprobs.append(0.0)
        told.append((turn.news()[1], text.read()))
    assert told == [("a", "a"), (" list", " list"), ("", ""), (" done it", " done it")]


def test_who_named_a_stop_is_told_it(gpt, says, talking):
    """vLLM's stop_reason: the string or id that the client named, whole and streamed; null for the model's own end."""
    [token] = talking[1].encode(" done")
    for script, stop, expected in (
        ("a list done it", {"stop_token_ids": [token]}, token), ("a list done it", {"stop": "ne"}, "ne"),
        ("a list<|user|>", {"stop_token_ids": [token]}, None), ("a list<|user|>", {}, None),
        ("a list done it", {"max_tokens": 2}, None),
    ):  # fmt: skip
        asks = (
            (gpt.chat.completions.create, {"messages": HELLO}), (gpt.completions.create, {"prompt": "hello"}),
        )  # fmt: skip
        for create, ask in asks:
            body = dict(model="talking", seed=7, extra_body=stop, **ask)
            says(7, script)
            assert create(**body).choices[0].stop_reason == expected
            says(7, script)
            *_, last = create(**body, stream=True)
            assert last.choices[0].stop_reason == expected


def test_completions_continue_score_and_stream(gpt, talking):
    tok: Tokenizer = talking[1]
    ask = dict(
        model="talking", seed=3, max_tokens=12, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    both = gpt.completions.create(prompt=["hello", "so list"], n=2, **ask)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[2].text == tok.decode(both.choices[2].token_ids, skip_special=True)
    alone = gpt.completions.create(prompt=tok.encode("so list"), **ask)
    assert alone.choices[0].text == both.choices[2].text
    streamed = {n: "" for n in range(4)}
    for chunk in gpt.completions.create(prompt=["hello", "so list"], n=2, stream=True, **ask):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == {choice.index: choice.text for choice in both.choices}
    scored = gpt.completions.create(
        model="talking", prompt="so list it then", max_tokens=0, echo=True, logprobs=2
    )
    told = scored.choices[0].logprobs
    expected = Engine(talking[0], max_batch=1, max_len=64).score([tok.encode("so list it then")])[0]
    assert told.token_logprobs == [None, *expected[1:]] and "".join(told.tokens) == "so list it then"
    assert all(len(row) == 2 for row in told.top_logprobs[1:]) and scored.choices[0].text == "so list it then"


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("echo", [False, True])
def test_offsets_of_a_stream_go_on(gpt, says, echo):
    """text_offset is where a token begins in the whole text, whichever event tells it."""
    ask = dict(model="talking", prompt="so list", max_tokens=6, logprobs=0, echo=echo, seed=7)
    text = "so list it done hello a" if echo else " it done hello a"
    offsets = []
    says(7, " it done hello a<|user|>")
    for chunk in gpt.completions.create(**ask, stream=True):
        for name, offset in zip(
            chunk.choices[0].logprobs.tokens, chunk.choices[0].logprobs.text_offset, strict=True
        ):
            assert f"{text}<|user|>"[offset:].startswith(name)
            offsets.append(offset)
    says(7, " it done hello a<|user|>")
    assert offsets == gpt.completions.create(**ask).choices[0].logprobs.text_offset and len(offsets) > 4


def test_models_and_errors_are_openais(gpt):
    assert [model.id for model in gpt.models.list()] == ["talking"]
    assert gpt.models.retrieve("talking").max_model_len == 1024
    with pytest.raises(openai.NotFoundError):
        gpt.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="messages") as caught:
        gpt.chat.completions.create(model="talking", messages=[])
    assert caught.value.type == "invalid_request_error" and caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        gpt.chat.completions.create(model="m", messages=HELLO, response_format={"type": "grammar"})
    with pytest.raises(openai.BadRequestError, match="serves sequences of up to 1024"):
        gpt.completions.create(model="m", prompt="hello " * 1100)


def test_anthropic_client_thinks_calls_a_tool_and_goes_on(claude, says):
    tools = [{"name": "shell", "description": "Run it.", "input_schema": TOOL["function"]["parameters"]}]
    says(7, f"list it</think>so{CALL}<|observation|>")
    ask = dict(model="talking", max_tokens=60, system="print", messages=HELLO, tools=tools)
    reply = claude.messages.create(**ask, extra_body={"seed": 7})
    assert [block.type for block in reply.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = reply.content
    assert (thinking.thinking, text.text, call.input) == ("list it", "so", {"command": "cat a.txt"})
    assert reply.stop_reason == "tool_use"
    says(7, f"list it</think>so{CALL}<|observation|>")
    with claude.messages.stream(**ask, extra_body={"seed": 7}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert [b.model_dump(exclude={"id"}) for b in final.content] == [
        b.model_dump(exclude={"id"}) for b in reply.content
    ]
    assert final.stop_reason == "tool_use" and final.usage.output_tokens == reply.usage.output_tokens
    assert {"message_start", "content_block_start", "content_block_delta", "message_stop"} <= kinds
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "12"}]}
    messages = [*HELLO, {"role": "assistant", "content": [b.model_dump() for b in reply.content]},
                {"role": "user", "content": [result]}]  # fmt: skip
    counted = claude.messages.count_tokens(model="talking", system="print", messages=messages, tools=tools)
    says(8, "</think>done 12 then<|user|>")
    again = claude.messages.create(
        **ask | {"messages": messages}, stop_sequences=["12"], extra_body={"seed": 8}
    )
    assert (again.content[0].text, again.stop_reason, again.stop_sequence) == ("done", "stop_sequence", "12")
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == counted.input_tokens
    assert again.usage.cache_read_input_tokens > 0


def test_anthropic_errors_are_anthropics(claude):
    with pytest.raises(anthropic.BadRequestError, match="messages is empty") as caught:
        claude.messages.create(model="m", max_tokens=5, messages=[])
    assert (
        caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "invalid_request_error"
    )
    with pytest.raises(anthropic.BadRequestError, match="text blocks"):
        claude.messages.create(
            model="m", max_tokens=5, messages=[{"role": "user", "content": [{"type": "image"}]}]
        )
    with pytest.raises(anthropic.BadRequestError, match="output_config"):
        formed = {"format": {"type": "json_schema", "schema": {"type": "?"}}}
        claude.messages.create(model="m", max_tokens=5, messages=HELLO, output_config=formed)
    off = claude.messages.create(model="m", max_tokens=5, messages=HELLO, thinking={"type": "disabled"})
    assert all(block.type != "thinking" for block in off.content)


def test_either_header_carries_the_key(talking):
    running = Running(talking[0], api_key="secret")
    try:
        claude = anthropic.Anthropic(base_url=running.url, api_key="secret", max_retries=0)
        assert claude.messages.create(model="m", max_tokens=2, messages=HELLO).usage.output_tokens == 2
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=running.url, api_key="no", max_retries=0).messages.create(
                model="m", max_tokens=2, messages=HELLO
            )
        gpt = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)
        assert len(gpt.models.list().data) == 1
    finally:
        running.stop()
