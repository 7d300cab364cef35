"""Forms of the output in recorded sessions: what the engine is asked for, what it says, and what of it is trained."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import jsonschema_rs
import openai
import pytest
from replies import Say, scripted

from fullarc.chat import Tokenizer
from fullarc.chat.grammar import json_grammar, tags_grammar
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.serve import EngineProcess, serving
from fullarc.rollout.trajectory import Trajectory

FILE = {"type": "object", "required": ["path", "size"], "additionalProperties": False,
        "properties": {"path": {"type": "string", "maxLength": 6},
                       "size": {"type": "integer", "maximum": 99}}}  # fmt: skip
VALID = jsonschema_rs.validator_for(FILE)
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "file", "schema": FILE}}
TAGS: Any = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": FILE, "end": "</f>"}],
    "triggers": ["<"],
}
HELLO: Any = [{"role": "user", "content": "hello"}]
BODY: Any = {"messages": HELLO, "seed": 1}
TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
SESSION = {"X-Session-ID": "s"}
SCHEMA = json_grammar(FILE, "").text


# --- before an engine that says what it is told ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": FORMAT}, "json_schema", SCHEMA),
        ({"response_format": {"type": "json_object"}}, "json_schema", json_grammar({"type": "object"}, "").text),
        ({"response_format": TAGS}, "structural_tag", tags_grammar(TAGS, "").text),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "regex", "a|b"),
        ({"guided_json": FILE}, "json_schema", SCHEMA),
        ({"json_schema": json.dumps(FILE)}, "json_schema", SCHEMA),
        ({"regex": "a+"}, "regex", "a+"),
        ({"ebnf": 'root ::= "a"', "tools": [TOOL]}, "ebnf", 'root ::= "a"'),
        ({"structural_tag": json.dumps(TAGS), "tools": [TOOL]}, "structural_tag", tags_grammar(TAGS, "").text),
        ({"response_format": {"type": "text"}}, "", ""),
    ],
)  # fmt: skip
async def test_the_engine_is_asked_in_sglangs_names(
    http: httpx.AsyncClient, engine: FakeEngine, say: Say, fields: Any, kind: str, text: str
) -> None:
    asked = []

    def script(prompt: list[int], params: dict[str, Any]) -> list[int]:
        asked.append(params)
        return say("</think>done")

    engine.script = script
    for more in ({}, {"n": 2}, {"stream": True}):
        answer = await http.post("/v1/chat/completions", json=BODY | fields | more, headers=SESSION)
        assert answer.status_code == 200, answer.text
    assert len(asked) == 4
    for params in asked:
        forms = {
            name: params[name]
            for name in ("json_schema", "regex", "ebnf", "structural_tag")
            if name in params
        }
        assert forms == ({kind: text} if kind else {})
        assert params.get("tool_call_instead", False) is (kind == "ebnf")
    # a canonical structural tag is one
    assert kind != "structural_tag" or tags_grammar(text, "").text == text
    record = Trajectory.from_atif((await http.get("/sessions/s/trajectory")).json())
    assert [turn.guided for turn in record.turns] == [bool(kind)] * 4


async def test_anthropics_output_config_travels_too(
    http: httpx.AsyncClient, engine: FakeEngine, say: Say
) -> None:
    asked = []

    def script(prompt: list[int], params: dict[str, Any]) -> list[int]:
        asked.append(params)
        return say("</think>done")

    engine.script = script
    form = {"output_config": {"format": {"type": "json_schema", "schema": FILE}}}
    for more in ({}, {"stream": True}):
        body = {"max_tokens": 9, "messages": HELLO} | form | more
        assert (await http.post("/v1/messages", json=body, headers=SESSION)).status_code == 200
    assert [params["json_schema"] for params in asked] == [SCHEMA] * 2
    tokens = await http.post("/v1/messages/count_tokens", json={"messages": HELLO} | form)
    assert tokens.json()["input_tokens"] == len(engine.prompts[0])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"response_format": 7}, "response_format"), ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.triggers"), ({"regex": 5}, "regex"),
        ({"guided_json": "["}, "guided_json is not JSON"), ({"regex": "a", "ebnf": "b"}, "contradict"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml"),
        ({"regex": "\ud800"}, "regex: Input"), ({"guided_grammar": "\udfff"}, "guided_grammar: Input"),
    ],
)  # fmt: skip
async def test_what_is_no_form_is_a_400_before_anything_is_sampled(
    http: httpx.AsyncClient, engine: FakeEngine, fields: Any, says: str
) -> None:
    content = json.dumps(BODY | fields).encode()
    answer = await http.post("/v1/chat/completions", content=content, headers=SESSION)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
    body = {"max_tokens": 9, "messages": HELLO, "output_config": {"format": {"type": "xml"}}}
    answer = await http.post("/v1/messages", json=body, headers=SESSION)
    assert answer.status_code == 400 and answer.json()["type"] == "error"
    assert "output_config.format.type" in answer.json()["error"]["message"] and not engine.prompts


async def test_guided_turns_are_recorded_and_not_trained(
    http: httpx.AsyncClient, engine: FakeEngine, say: Say
) -> None:
    said = [say("so</think>hello"), say('then</think>{"a": 12}'), say("</think>done")]
    engine.script = scripted(*said)
    messages = list(HELLO)
    for more in ({}, {"response_format": {"type": "json_object"}}, {}):
        answer = await http.post("/v1/chat/completions", json={"messages": messages} | more, headers=SESSION)
        messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "then"}]
    record = Trajectory.from_atif((await http.get("/sessions/s/trajectory")).json())
    assert [turn.guided for turn in record.turns] == [False, True, False]
    assert [turn.completion_ids for turn in record.turns] == said
    [row] = record.samples()
    trained = [token for token, mask in zip(row.ids, row.loss_mask, strict=True) if mask]
    assert trained == said[0] + said[2]
    middle = len(record.turns[1].prompt_ids)
    assert row.ids[middle : middle + len(said[1])] == said[1], "it is what the next turn was told"
    assert {*row.logprobs[middle : middle + len(said[1])]} == {0.0} and row.versions[middle] == -1
    assert [p for p, mask in zip(row.logprobs, row.loss_mask, strict=True) if mask] == [
        *record.turns[0].logprobs, *record.turns[2].logprobs
    ]  # fmt: skip
    assert replace(record, turns=[replace(turn, guided=True) for turn in record.turns]).samples() == []
    old = record.to_atif()
    for step in old["steps"]:
        step.get("extra", {}).pop("guided", None)
    assert not any(turn.guided for turn in Trajectory.from_atif(old).turns), "records of before are read"


async def test_an_aborted_form_begins_anew(http: httpx.AsyncClient, engine: FakeEngine, say: Say) -> None:
    whole = say('</think>{"a": 12}')
    engine.script, engine.aborts = lambda prompt, params: whole, 1
    form = {"response_format": {"type": "json_object"}}
    answer = await http.post("/v1/chat/completions", json=BODY | form, headers=SESSION)
    assert answer.json()["choices"][0]["message"]["content"] == '{"a": 12}'
    assert engine.prompts == [engine.prompts[0]] * 2, "the form is never asked for behind half of it"
    record = Trajectory.from_atif((await http.get("/sessions/s/trajectory")).json())
    assert [turn.completion_ids for turn in record.turns] == [whole]
    engine.aborts = 99
    assert (await http.post("/v1/chat/completions", json=BODY | form)).status_code == 502
    assert len(engine.prompts) < 9
    engine.aborts = 1
    answer = await http.post("/v1/chat/completions", json=BODY | form | {"stream": True})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "ask again" in events[-1]["error"]["message"], "what was streamed cannot be taken back"


# --- before a real one ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway before an engine whose model says anything."""
    pytest.importorskip("torch")
    from test_real_engine import save

    model = save(tmp_path_factory.mktemp("forms"), tok, 0)
    with EngineProcess(model, 512) as engine_url:
        gateway = Gateway(EngineClient(engine_url), tok, max_len=512, default_max_tokens=400)
        with serving(gateway.app) as url:
            yield url


def record_of(url: str, session: str) -> Trajectory:
    return Trajectory.from_atif(httpx.get(f"{url}/sessions/{session}/trajectory", trust_env=False).json())


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_gets_its_schema_in_a_session(url: str, tok: Tokenizer, stream: bool) -> None:
    """Thoughts come first, then JSON; the record holds these very tokens."""
    gpt = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    ended = 0
    for seed in range(6):
        name = f"gpt{stream}{seed}"
        quiet = {"chat_template_kwargs": {"enable_thinking": seed % 2 == 0}, "return_token_ids": True}
        made = gpt.chat.completions.create(
            model="m", messages=HELLO, seed=seed, response_format=FORMAT, extra_body=quiet, stream=stream,
            extra_headers={"X-Session-ID": name},
        )  # fmt: skip
        content, ids, finish = "", list[int](), None
        for chunk in made if stream else [made]:
            for choice in chunk.choices:
                content += (choice.delta if stream else choice.message).content or ""
                ids += getattr(choice, "token_ids", None) or []
                finish = choice.finish_reason or finish
        [turn] = record_of(url, name).turns
        assert turn.guided and turn.completion_ids == ids and (turn.message.get("content") or "") == content
        if seed % 2 == 0:
            thought = ids[: ids.index(tok.id("</think>"))] if tok.id("</think>") in ids else ids
            assert not set(thought) & tok.special_ids
        if finish == "stop":
            VALID.validate(json.loads(content))
            ended += 1
    assert ended


@pytest.mark.slow
def test_anthropics_client_gets_its_schema_in_a_session(url: str) -> None:
    claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    texts = []
    for seed in range(4):
        reply = claude.messages.create(
            model="m", max_tokens=400, messages=HELLO, thinking={"type": "disabled"}, extra_body={"seed": seed},
            output_config={"format": {"type": "json_schema", "schema": FILE}},
            extra_headers={"X-Session-ID": f"claude{seed}"},
        )  # fmt: skip
        [turn] = record_of(url, f"claude{seed}").turns
        assert turn.guided and turn.message["content"] == reply.content[0].text
        texts += [reply.content[0].text] if reply.stop_reason == "end_turn" else []
    assert texts and all(VALID.is_valid(json.loads(text)) for text in texts)


@pytest.mark.slow
def test_what_the_engine_refuses_is_a_400_in_the_clients_own_words(url: str) -> None:
    gpt = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    bad = {"if": {}, "then": {}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": bad}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="response_format: Unimplemented") as caught:
            gpt.chat.completions.create(
                model="m", messages=HELLO, response_format=form, extra_headers=SESSION, stream=stream
            )
        assert caught.value.param == "response_format"
        with pytest.raises(anthropic.BadRequestError, match="output_config.format: Unimplemented"):
            claude.messages.create(
                model="m", max_tokens=9, messages=HELLO, extra_headers=SESSION, stream=stream,
                output_config={"format": {"type": "json_schema", "schema": bad}},
            )  # fmt: skip
    assert record_of(url, "s").turns == []


@pytest.mark.slow
def test_with_tools_a_call_may_come_instead(url: str, tok: Tokenizer) -> None:
    """Among many first tokens; the model says anything."""
    gpt = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    first = set()
    for tools in ([TOOL], openai.NOT_GIVEN):
        made = gpt.chat.completions.create(
            model="m", messages=HELLO, seed=1, n=64, max_tokens=1, tools=tools,
            extra_body={"regex": "[ab]", "chat_template_kwargs": {"enable_thinking": False}, "return_token_ids": True},
        )  # fmt: skip
        first.add(frozenset(choice.token_ids[0] for choice in made.choices))
    letters = {tok.encode("a")[0], tok.encode("b")[0]}
    assert first == {frozenset(letters), frozenset({*letters, tok.id("<tool_call>")})}
