"""Whatever a model chooses among the allowed tokens, the parser finds calls that the schema asks for."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullarc.chat import Tokenizer, parse_assistant
from fullarc.chat.forced import CallGuide
from fullarc.chat.special import END_THINK

KINDS = {
    "text": {"type": "string"},
    "whole": {"type": "integer"},
    "real": {"type": "number"},
    "flag": {"type": "boolean"},
    "nothing": {"type": "null"},
    "colour": {"type": "string", "enum": ["red", "reddish", "", "blue ish"]},
    "level": {"enum": [1, 2.5, None, "high", {"a": [1]}]},
    "fixed": {"const": "yes"},
    "list": {"type": "array"},
    "either": {"type": ["string", "null"]},
}
HOLDS = {
    "text": lambda v: isinstance(v, str),
    "whole": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "real": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "flag": lambda v: isinstance(v, bool),
    "nothing": lambda v: v is None,
    "colour": lambda v: v in KINDS["colour"]["enum"],
    "level": lambda v: v in KINDS["level"]["enum"],
    "fixed": lambda v: v == "yes",
}
NAMES = ["cat", "cat_file", "catalogue", "a.b:c", "我们", "x y"]


def tool(name, properties, required):
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def walk(tok, guide, rng, most=400):
    """Tokens chosen at random among the allowed ones, closing soon where text is free; ends at a stop token."""
    ids = []
    while len(ids) < most:
        allowed = sorted(guide.allowed())
        assert allowed
        special = [t for t in allowed if t in tok.special_ids]
        pool = special if special and (len(allowed) == len(special) or rng.random() < 0.3) else allowed
        token = rng.choice(pool)
        guide.feed(token)
        ids.append(token)
        if token in tok.stop_ids:
            return ids
    return None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_walk_is_a_good_call(tok: Tokenizer, data):
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    tools = []
    for name in names:
        keys = data.draw(st.lists(st.sampled_from(list(KINDS)), unique=True))
        required = data.draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
        tools.append(tool(name, {key: KINDS[key] for key in keys}, required))
    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    thinking, several = data.draw(st.booleans()), data.draw(st.booleans())
    ids = walk(
        tok, CallGuide(tok, tools, wanted, thinking, several), random.Random(data.draw(st.integers(0, 10**9)))
    )
    if ids is None:
        return  # numbers and calls may go on for ever
    parsed = parse_assistant(tok, ids, thinking, tools)
    assert parsed.errors == [] and parsed.stop == "observation" and parsed.content == ""
    assert parsed.tool_calls and (several or len(parsed.tool_calls) == 1)
    for call in parsed.tool_calls:
        schema = next(t["function"]["parameters"] for t in tools if t["function"]["name"] == call.name)
        assert call.name in wanted and set(schema["required"]) <= set(call.arguments) <= set(
            schema["properties"]
        )
        for key, value in call.arguments.items():
            assert HOLDS.get(key, lambda v: True)(value), (key, value)


def test_numbers_are_jsons(tok):
    """Every text that is allowed step by step is a number, and every number can be said."""
    import json

    for kind, good in (
        ("integer", ["0", "-7", "120"]),
        ("number", ["0", "-0.50", "12e3", "3.25E-10", "9e+1"]),
    ):
        tools = [tool("f", {"n": {"type": kind}}, ["n"])]
        for text in [
            *good,
            "01",
            "1.",
            "-",
            "+1",
            ".5",
            "1e",
            "--1",
            "",
            "1e5" if kind == "integer" else "1ee",
        ]:
            guide = CallGuide(tok, tools, ["f"], thinking=False, several=False)
            head = "<tool_call>f<arg_key>n</arg_key><arg_value>"
            ids = tok.encode_raw(head) + [tok.encode(char)[0] for char in text] + [tok.id("</arg_value>")]
            for token in ids:
                possible = token in guide.allowed()
                if not possible:
                    break
                guide.feed(token)
            assert possible is (text in good), (kind, text)
            if possible:
                json.loads(text)


def test_required_arguments_that_are_no_properties_can_be_given(tok):
    schema = {"type": "object", "required": ["q", 3, " "]}
    guide = CallGuide(tok, [{"function": {"name": "f", "parameters": schema}}], ["f"], False, False)
    said = "<tool_call>f<arg_key>q</arg_key><arg_value>anything</arg_value></tool_call><|observation|>"
    for token in tok.encode_raw(said):
        assert token in guide.allowed()
        guide.feed(token)


@pytest.mark.parametrize("thinking", [False, True])
def test_without_a_forced_call_the_turn_is_free_but_for_a_second_one(tok, thinking):
    guide = CallGuide(tok, [], None, thinking, several=False)
    for text in (
        "any <tool_call> thing" if not thinking else "any </tool_call> thing",
        "</think>" * thinking,
    ):
        for token in tok.encode_raw(text):
            assert token in guide.allowed()
            guide.feed(token)
    for token in tok.encode_raw("so<tool_call>f</tool_call>"):
        guide.feed(token)
    assert guide.allowed() == {tok.id("<|observation|>")}


def test_thoughts_end_only_by_themselves(tok):
    guide = CallGuide(tok, [tool("f", {}, [])], ["f"], thinking=True, several=True)
    assert guide.allowed() & tok.special_ids == {tok.id(END_THINK)}
