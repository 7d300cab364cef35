"""OpenAI dictionaries in and out."""

import pytest
from chat_strategies import assistant, other
from hypothesis import given, settings

from fullarc.chat import Message, ToolCall
from fullarc.config.errors import FullarcError


@settings(deadline=None)
@given(assistant)
def test_openai_round_trip(message):
    message.content = message.content.replace("</think>", "")
    assert Message.from_openai(message.to_openai()) == message


@settings(deadline=None)
@given(other)
def test_openai_round_trip_of_others(message):
    assert Message.from_openai(message.to_openai()) == message


def test_clients_differ():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}
    assert Message.from_openai(parts) == Message("user", "ab")
    assert Message.from_openai({"role": "developer", "content": None}) == Message("system", "")
    inline = {"role": "assistant", "content": "<think>why</think>so"}
    assert Message.from_openai(inline) == Message("assistant", "so", "why")
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "7", "function": {"name": "f", "arguments": ""}}],
    }
    assert Message.from_openai(call).tool_calls == [ToolCall("f", {}, "7")]


@pytest.mark.parametrize(
    "bad",
    [
        {"role": "robot", "content": "x"},
        {"content": "x"},
        {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": ["f"]},
        {"role": "assistant", "tool_calls": [{"function": None}]},
        {"role": "assistant", "tool_calls": [{"function": ["f"]}]},
        {"role": "user", "content": "x", "loss": 1},
    ],
)
def test_bad_messages_are_one_sentence(bad):
    with pytest.raises(FullarcError):
        Message.from_openai(bad)
