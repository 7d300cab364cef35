"""OpenAI's own client on /v1/responses: items in and out, events that add up, and what is refused."""

import openai
import pytest
from running import Running

from fullarc.chat import Message, render
from fullarc.chat.messages import ToolCall

TOOL = {"type": "function", "name": "shell", "description": "Run it.", "strict": None, "parameters": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}  # fmt: skip
CHAT_TOOL = {"type": "function", "function": {k: TOOL[k] for k in ("name", "description", "parameters")}}
CALL = "<tool_call>shell<arg_key>command</arg_key><arg_value>cat a.txt</arg_value></tool_call>"
SCRIPTS = {
    "a call": f"list it</think>so{CALL}<|observation|>",
    "calls only": f"</think>{CALL}{CALL}<|observation|>",
    "words": "a 我们 </think> print 30 done<|user|>",
    "nothing": "</think><|user|>",
    "thoughts only": "list it</think><|user|>",
    "cut off": "list it then print" + " hello" * 80,
}


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0], max_len=1024)
    yield running
    running.stop()


def test_a_call_is_made_answered_and_gone_on_from(gpt, says, talking):
    tok = talking[1]
    ask = dict(model="talking", instructions="print", tools=[TOOL])
    say = says(7, SCRIPTS["a call"])
    reply = gpt.responses.create(**ask, input="hello", store=True, extra_body={"seed": say})
    assert [item.type for item in reply.output] == ["reasoning", "message", "function_call"]
    thought, text, call = reply.output
    assert (thought.content[0].text, text.content[0].text, reply.output_text) == ("list it", "so", "so")
    assert (call.name, call.arguments) == ("shell", '{"command": "cat a.txt"}')
    assert (reply.status, reply.store, reply.previous_response_id) == ("completed", False, None)
    assert reply.metadata == {"weight_version": "0"}
    prompt = render(tok, [Message("system", "print"), Message("user", "hello")], [CHAT_TOOL],
                    add_generation_prompt=True).ids  # fmt: skip
    said = tok.encode_raw(SCRIPTS["a call"])
    usage = reply.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(prompt), len(said))
    assert usage.output_tokens_details.reasoning_tokens == len(tok.encode("list it"))
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "12"}
    items = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
             *[item.model_dump(exclude_none=True) for item in reply.output], output]  # fmt: skip
    again = gpt.responses.create(**ask, input=items, extra_body={"seed": says(8, SCRIPTS["words"])})
    assert again.output_text == "print 30 done"
    turn = Message("assistant", "so", "list it", [ToolCall("shell", {"command": "cat a.txt"})])
    whole = [
        Message("system", "print"),
        Message("user", "hello"),
        turn,
        Message("tool", "12", tool_call_id="c"),
    ]
    expected = render(tok, whole, [CHAT_TOOL], add_generation_prompt=True).ids
    assert again.usage.input_tokens == len(expected)
    assert again.usage.input_tokens_details.cached_tokens > len(prompt)


@pytest.mark.parametrize("name", SCRIPTS)
def test_events_add_up_to_the_response(gpt, says, name):
    ask = dict(model="talking", input="hello", tools=[TOOL], max_output_tokens=60, temperature=0.5, top_p=0.9)
    whole = gpt.responses.create(**ask, extra_body={"seed": says(7, SCRIPTS[name])})
    events = list(gpt.responses.create(**ask, stream=True, extra_body={"seed": says(7, SCRIPTS[name])}))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    cut = name == "cut off"
    assert events[-1].type == ("response.incomplete" if cut else "response.completed")
    assert whole.status == events[-1].type.removeprefix("response.")
    assert (whole.incomplete_details and whole.incomplete_details.reason) == (
        "max_output_tokens" if cut else None
    )
    plain = {"exclude": {"id", "call_id"}}
    final = [item.model_dump(**plain) for item in events[-1].response.output]
    assert final == [item.model_dump(**plain) for item in whole.output]
    done = [e for e in events if e.type == "response.output_item.done"]
    assert [e.output_index for e in done] == list(range(len(final)))
    assert [e.item.model_dump(**plain) for e in done] == final
    for kind, texts in (
        ("response.reasoning_text", [i.content[0].text for i in whole.output if i.type == "reasoning"]),
        ("response.output_text", [i.content[0].text for i in whole.output if i.type == "message"]),
    ):
        assert "".join(e.delta for e in events if e.type == f"{kind}.delta") == "".join(texts)
        assert [e.text for e in events if e.type == f"{kind}.done"] == texts
    calls = [i.arguments for i in whole.output if i.type == "function_call"]
    assert [e.delta for e in events if e.type == "response.function_call_arguments.delta"] == calls
    usage = events[-1].response.usage.model_dump(exclude={"input_tokens_details"})
    assert usage == whole.usage.model_dump(exclude={"input_tokens_details"})  # the second prompt is cached
    with gpt.responses.stream(**ask, extra_body={"seed": says(7, SCRIPTS[name])}) as stream:
        assert stream.get_final_response().output_text == whole.output_text if not cut else list(stream)


def test_a_function_is_forced_and_thoughts_are_left_out(gpt):
    number = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tool = TOOL | {"parameters": number}
    for choice in ("required", {"type": "function", "name": "shell"}):
        reply = gpt.responses.create(model="m", input="hello", tools=[tool], tool_choice=choice, max_output_tokens=400,
                                     reasoning={"effort": "none"}, extra_body={"seed": 5})  # fmt: skip
        assert [item.name for item in reply.output if item.type == "function_call"][0] == "shell"
        assert all(item.type != "reasoning" for item in reply.output)


@pytest.mark.parametrize(("fields", "says_what"), [
    ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"conversation": "c"}, "conversation"),
    ({"background": True}, "background"), ({"truncation": "auto"}, "truncation"),
    ({"tools": [{"type": "web_search"}]}, "only functions"), ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "?"}}}}, "text.format"),
    ({"input": []}, "input"), ({"input": [{"role": "assistant", "content": "a"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "only text"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "must be a message"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"), ({"temperature": -1}, "temperature"),
])  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(gpt, fields, says_what):
    with pytest.raises(openai.BadRequestError, match=says_what):
        gpt.responses.create(**{"model": "m", "input": "hello"} | fields)
