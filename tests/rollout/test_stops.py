"""Stop strings in recorded sessions: the client is told the text before one, the record has what was sampled."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from replies import Say

from fullarc.chat import Tokenizer
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.serve import EngineProcess, serving
from fullarc.rollout.trajectory import Trajectory

HELLO: Any = [{"role": "user", "content": "hello"}]


class Stopping(FakeEngine):
    """Ends where one of the strings is complete, as SGLang does."""

    tok: Tokenizer

    def sample(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        answer = super().sample(prompt, params)
        ids = answer["output_ids"]
        for end in range(1, len(ids) + 1):
            text = self.tok.decode(ids[:end])
            found = next((stop for stop in params.get("stop", ()) if stop in text), None)
            if found:
                answer = self.answer(prompt, ids[:end], "stop")
                answer["meta_info"]["finish_reason"]["matched"] = found
                break
        return answer


@pytest.fixture
def engine(tok: Tokenizer) -> Stopping:
    made = Stopping(lambda prompt, params: [], tok.stop_ids)
    made.tok = tok
    return made


@pytest.fixture
def url(engine: Stopping, tok: Tokenizer) -> Iterator[str]:
    with serving(engine.app) as engine_url, serving(Gateway(EngineClient(engine_url), tok).app) as url:
        yield url


def record_of(url: str, session: str = "s") -> Trajectory:
    return Trajectory.from_atif(httpx.get(f"{url}/sessions/{session}/trajectory", trust_env=False).json())


def gpt_says(url: str, stream: bool, messages: Any = HELLO, **fields: Any) -> tuple[str, str, str]:
    """(reasoning, content, finish reason) of OpenAI's client in session "s"."""
    gpt = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    made = gpt.chat.completions.create(
        model="m", messages=messages, stream=stream, extra_headers={"X-Session-ID": "s"}, **fields
    )
    reasoning, content, finish = "", "", ""
    for chunk in made if stream else [made]:
        for choice in chunk.choices:
            said = choice.delta if stream else choice.message
            reasoning += getattr(said, "reasoning_content", None) or ""
            content += said.content or ""
            finish = choice.finish_reason or finish
    return reasoning, content, finish


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "stop", "told"),
    [
        ("so</think>the file holds a number", ["holds a", "zz"], ("so", "the file", "stop")),
        ("so</think>the file holds a number", "le h", ("so", "the fi", "stop")),
        ("the file holds</think>so", ["file"], ("the", "", "stop")),
        ("so</think>the file", ["number"], ("so", "the file", "stop")),
        ("so</think>the the file", ["the f"], ("so", "the", "stop")),
        ("so</think>the", "", ("so", "the", "stop")),
        ("so</think>the file\nholds", ["file\n"], ("so", "the", "stop")),
        ("so</think>\nthe file", ["\nthe"], ("so", "", "stop")),
    ],
)  # fmt: skip
def test_openais_client_is_told_the_text_before_it(
    url: str, engine: Stopping, say: Say, tok: Tokenizer, stream: bool, said: str, stop: Any, told: Any
) -> None:
    ids = say(said)
    engine.script = lambda prompt, params: ids
    assert gpt_says(url, stream, stop=stop) == told
    [turn] = record_of(url).turns
    assert turn.completion_ids == ids[: len(turn.completion_ids)] and turn.finish == "stop"
    strings = [stop] if isinstance(stop, str) else stop
    ended = any(string and string in tok.decode(turn.completion_ids) for string in strings)
    assert ended or turn.completion_ids == ids
    [row] = record_of(url).samples()
    assert sum(row.loss_mask) == len(turn.completion_ids), "what was sampled is trained"
    # the conversation goes on behind these tokens
    messages = [*HELLO, turn.message, {"role": "user", "content": "then"}]
    gpt_says(url, stream, messages)
    turns = record_of(url).turns
    whole = turn.prompt_ids + turn.completion_ids
    assert turns[1].parent == 0 and turns[1].prompt_ids[: len(whole)] == whole and not turns[1].fork


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_is_told_which(url: str, engine: Stopping, say: Say, stream: bool) -> None:
    claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    engine.script = lambda prompt, params: say("so</think>the file holds a number")
    ask: Any = dict(model="m", max_tokens=30, messages=HELLO, extra_headers={"X-Session-ID": "s"})
    for stops, end in ((["holds"], ("the file", "stop_sequence", "holds")),
                       (["zz"], ("the file holds a number", "end_turn", None))):  # fmt: skip
        if stream:
            with claude.messages.stream(**ask, stop_sequences=stops) as events:
                reply: Any = events.get_final_message()
        else:
            reply = claude.messages.create(**ask, stop_sequences=stops)
        assert (reply.content[-1].text, reply.stop_reason, reply.stop_sequence) == end


def test_an_aborted_reply_begins_anew(url: str, engine: Stopping, say: Say) -> None:
    """An engine would not find a string that began before it was aborted."""
    engine.script, engine.aborts = lambda prompt, params: say("so</think>the file holds"), 1
    assert gpt_says(url, False, stop=["file"])[1] == "the" and engine.prompts == [engine.prompts[0]] * 2


@pytest.mark.parametrize("stop", [5, [5], {}, ["\ud800"], "\ud800"])
def test_what_is_no_string_is_refused(url: str, stop: Any) -> None:
    body = json.dumps({"messages": HELLO, "stop": stop}).encode()
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, trust_env=False)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stop"


@pytest.mark.slow
def test_a_real_engine_ends_where_the_string_is_complete(
    tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against what the same seed says without one."""
    pytest.importorskip("torch")
    from test_real_engine import save

    quiet = {"chat_template_kwargs": {"enable_thinking": False}, "return_token_ids": True}
    model = save(tmp_path_factory.mktemp("stops"), tok, 0)
    with (
        EngineProcess(model, 512) as engine_url,
        serving(Gateway(EngineClient(engine_url), tok, max_len=512).app) as url,
    ):
        ended = 0
        for seed in range(8):
            body = {"messages": HELLO, "seed": seed, "max_tokens": 60} | quiet
            replies = [
                httpx.post(f"{url}/v1/chat/completions", json=body | more, timeout=60, trust_env=False).json()
                for more in ({}, {"stop": ["e", "th"]})
            ]
            free, cut = (reply["choices"][0] for reply in replies)
            ids = cut["token_ids"]
            found = [s for s in ("e", "th") if s in b"".join(map(tok.token_bytes, ids)).decode("latin-1")]
            before = b"".join(map(tok.token_bytes, ids[:-1]))
            assert free["token_ids"][: len(ids)] == ids
            assert b"e" not in before and b"th" not in before
            if found and not set(ids) & tok.special_ids:
                content = cut["message"]["content"] or ""
                assert cut["finish_reason"] == "stop" and not any(text in content for text in found)
                ended += 1
        assert ended > 2
