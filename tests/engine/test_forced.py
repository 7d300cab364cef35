"""Forced tool calls by OpenAI's and Anthropic's own clients, from a model that says anything."""

import json

import anthropic
import openai
import pytest
from running import Running

HELLO = [{"role": "user", "content": "hello"}]
HOW = {"type": "string", "enum": ["slow", "fast"]}
FLAGS = {"type": "object", "required": ["deep", "count"],
         "properties": {"deep": {"type": "boolean"}, "count": {"type": "integer"}, "how": HOW}}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "description": name, "parameters": FLAGS}}
         for name in ("list_files", "list_files_again", "print")]  # fmt: skip
NAMES = [tool["function"]["name"] for tool in TOOLS]


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0], max_len=1024)
    yield running
    running.stop()


def check(name, arguments):
    assert {"deep", "count"} <= set(arguments) <= {"deep", "count", "how"}
    assert isinstance(arguments["deep"], bool) and type(arguments["count"]) is int
    assert arguments.get("how", "slow") in ("slow", "fast") and name in NAMES


def ask(gpt, seed, **more):
    body = {"chat_template_kwargs": {"enable_thinking": False}} | more.pop("extra", {})
    return gpt.chat.completions.create(
        model="m", messages=HELLO, tools=TOOLS, seed=seed, max_tokens=200, extra_body=body, **more
    )


def test_required_calls_some_tool_by_its_schema(gpt):
    names = set()
    for seed in range(12):
        choice = ask(gpt, seed, tool_choice="required", parallel_tool_calls=False).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        [call] = choice.message.tool_calls
        check(call.function.name, json.loads(call.function.arguments))
        names.add(call.function.name)
    assert len(names) > 1, "which one is the model's choice"


def test_a_named_function_is_the_one_that_is_called(gpt):
    for name in NAMES:
        wanted = {"type": "function", "function": {"name": name}}
        choice = ask(gpt, 1, tool_choice=wanted, extra={"return_token_ids": True, "logprobs": True}).choices[
            0
        ]
        [call] = choice.message.tool_calls
        assert call.function.name == name
        check(name, json.loads(call.function.arguments))
    plain = ask(gpt, 1, temperature=0).choices[0]
    assert not plain.message.tool_calls, "the model itself would not"
    chunks = list(ask(gpt, 1, tool_choice=wanted, stream=True))
    streamed = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in streamed] == [name] and chunks[-1].choices[
        0
    ].finish_reason == "tool_calls"


def test_thoughts_come_first_and_logprobs_are_the_models_own(gpt, talking):
    tok = talking[1]
    for seed in range(20):
        reply = gpt.chat.completions.create(
            model="m", messages=HELLO, tools=TOOLS, seed=seed, tool_choice="required", parallel_tool_calls=False,
            extra_body={"return_token_ids": True}, logprobs=True,
        )  # fmt: skip
        ids = reply.choices[0].token_ids
        thoughts = ids[: ids.index(tok.id("</think>"))] if tok.id("</think>") in ids else ids
        assert thoughts and not set(thoughts) & tok.special_ids
        if len(thoughts) < len(ids) and reply.choices[0].finish_reason == "tool_calls":
            break
    assert ids[len(thoughts) + 1] == tok.id("<tool_call>") and reply.choices[0].message.reasoning_content
    from fullarc.engine import Engine

    known = Engine(talking[0], max_batch=1, max_len=1024).score([reply.prompt_token_ids + ids])[0]
    told = [entry.logprob for entry in reply.choices[0].logprobs.content]
    assert told == pytest.approx(known[-len(ids) :], abs=1e-4)


def test_anthropics_any_and_tool(claude):
    tools = [{"name": name, "input_schema": FLAGS} for name in NAMES]
    base = {
        "model": "m",
        "max_tokens": 200,
        "messages": HELLO,
        "tools": tools,
        "thinking": {"type": "disabled"},
    }
    one = claude.messages.create(
        **base, tool_choice={"type": "tool", "name": "print"}, extra_body={"seed": 3}
    )
    assert one.stop_reason == "tool_use" and [b.type for b in one.content] == ["tool_use"]
    assert one.content[0].name == "print"
    check("print", one.content[0].input)
    only = {"type": "any", "disable_parallel_tool_use": True}
    some = claude.messages.create(**base, tool_choice=only, extra_body={"seed": 4})
    check(some.content[0].name, some.content[0].input)
    with pytest.raises(anthropic.BadRequestError, match="does not have"):
        claude.messages.create(**base, tool_choice={"type": "tool", "name": "nothing"})


def test_what_cannot_be_forced_is_refused(gpt):
    for choice, more, says in (
        ("required", {"tools": []}, "does not have"),
        ({"type": "function", "function": {"name": "nothing"}}, {}, "does not have"),
        ({"type": "function"}, {}, "tool_choice"),
        ("sometimes", {}, "tool_choice"),
        ("required", {"logit_bias": {"5": 1}}, "contradict"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            gpt.chat.completions.create(
                model="m", messages=HELLO, max_tokens=5, **({"tools": TOOLS, "tool_choice": choice} | more)
            )


@pytest.mark.parametrize("steps", [0, 3])
def test_other_requests_are_untouched_and_drafts_wait(talking, steps):
    """A guided request beside a free one, with and without drafts: both are what they are alone."""
    from fullarc.chat.forced import CallGuide
    from fullarc.engine import Engine
    from fullarc.engine.request import Request
    from fullarc.engine.sampling import SamplingParams

    folder, tok = talking
    prompt = [tok.id("<|user|>"), *tok.encode("hello"), tok.id("<|assistant|>"), tok.id("</think>")]

    def run(*guided):
        engine = Engine(folder, max_batch=2, max_len=256, draft_steps=steps)
        requests = []
        for number, forced in enumerate(guided):
            guide = CallGuide(tok, TOOLS, NAMES, False, False) if forced else None
            params = SamplingParams(max_new_tokens=60, seed=7, stop_ids=frozenset(tok.stop_ids))
            requests.append(Request(str(number), prompt, params, guide=guide))
            engine.scheduler.submit(requests[-1])
        while not engine.scheduler.idle:
            engine.scheduler.step()
        assert all(not request.spec.proposed for request in requests if request.guide)
        return [(request.output, request.logprobs) for request in requests]

    both = run(True, False)
    assert both == run(True) + run(False)
    assert both[0][0][0] == tok.id("<tool_call>") and both[0][0][-1] == tok.id("<|observation|>")
