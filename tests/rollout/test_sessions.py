"""Token-exactness over random agents: what was served and trained against an independent log of the engine."""

import random
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fullarc.agent.tools import SHELL_TOOL
from fullarc.chat import Message, Tokenizer, render
from fullarc.rollout.engine_client import Completion, EngineClient
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.gateway import ChatRenderer, Gateway
from fullarc.rollout.sessions import Incoming, Session
from fullarc.rollout.trajectory import Trajectory


class LoggingEngine(FakeEngine):
    """Writes down, apart from everything under test, each token it sampled: (context, token, log-prob, version)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log: Counter[tuple[Any, ...]] = Counter()

    def sample(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        answer = super().sample(prompt, params)
        ids = list(prompt)
        for logprob, token, _ in answer["meta_info"]["output_token_logprobs"]:
            self.log[(tuple(ids), token, logprob, self.version)] += 1
            ids.append(token)
        return answer


def trained(trajectory: Trajectory) -> Counter[tuple[Any, ...]]:
    """The same four facts read from the training view."""
    return Counter(
        (tuple(sample.ids[:t]), sample.ids[t], sample.logprobs[t], sample.versions[t])
        for sample in trajectory.samples()
        for t in range(len(sample.ids))
        if sample.loss_mask[t]
    )


def reads_as(messages: list[dict[str, Any]]) -> str:
    """A history as a client sees it: text and calls, without reasoning and call ids."""
    return str([
        (m["role"], m["content"] or "", [c["function"] for c in m.get("tool_calls") or []]) for m in messages
    ])  # fmt: skip


async def drive(rng: random.Random, tok: Tokenizer, engine: LoggingEngine, http: httpx.AsyncClient) -> int:
    """A random client with parallel branches that edits history now and then; returns its continuations."""
    branches: list[list[dict[str, Any]]] = [[{"role": "user", "content": "list it"}]]
    recorded: dict[str, list[list[int]]] = {}
    continued = 0
    for _ in range(rng.randint(1, 10)):
        number = rng.randrange(len(branches))
        if rng.random() < 0.15:
            branches.append(list(branches[number]))  # a parallel branch: a sub-agent, or a second try
            number = len(branches) - 1
        messages = branches[number]
        if rng.random() < 0.15 and len(messages) > 1:
            at = rng.randrange(len(messages))
            messages[at] = dict(messages[at], content=f"edited {rng.random()}")
        engine.version += rng.random() < 0.2
        engine.aborts += rng.random() < 0.2
        body = {"messages": messages, "tools": [SHELL_TOOL], "max_tokens": rng.choice([2, 5, 50]),
                "seed": rng.randrange(3), "return_token_ids": True}  # fmt: skip
        response = await http.post("/v1/chat/completions", json=body, headers={"X-Session-ID": "s"})
        assert response.status_code == 200, response.text
        reply = response.json()
        prompt, choice = reply["prompt_token_ids"], reply["choices"][0]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        heads = recorded.get(reads_as(messages[: last + 1]), [])
        if heads:
            continued += 1
            assert any(prompt[: len(head)] == head for head in heads), "served ids must extend recorded ids"
        message = choice["message"]
        if rng.random() < 0.3:
            message.pop("reasoning_content", None)  # most clients do not know the field
        messages.append(message)
        recorded.setdefault(reads_as(messages), []).append(prompt + choice["token_ids"])
        calls = message.get("tool_calls") or []
        messages += [{"role": "tool", "tool_call_id": c["id"], "content": "12"} for c in calls]
        if not calls or rng.random() < 0.2:
            messages.append({"role": "user", "content": rng.choice(["then", "done <|user|> </think>"])})
    return continued


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
async def test_served_extends_recorded_and_trained_is_what_was_sampled(
    seed: int, tok: Tokenizer, engine: FakeEngine
) -> None:
    logging = LoggingEngine(engine.script, tok.stop_ids)
    rng = random.Random(seed)
    async with (
        EngineClient("http://engine", transport=httpx.ASGITransport(logging.app)) as client,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(Gateway(client, tok, max_len=10**6).app),
            base_url="http://localhost",
        ) as http,
    ):
        await drive(rng, tok, logging, http)
        record = (await http.get("/sessions/s/trajectory")).json()
    trajectory = Trajectory.from_atif(record)
    assert trained(trajectory) == logging.log
    assert sum(sum(s.loss_mask) for s in trajectory.samples()) == trajectory.sampled_tokens


def _incoming(*messages: Message) -> list[Incoming]:
    return [Incoming(m) for m in messages]


def _session(tok: Tokenizer) -> tuple[Session, Message, Message]:
    """A session with one exchange; returns (session, question, answer)."""
    session = Session(ChatRenderer(tok))
    question, answer = Message("user", "list it"), Message("assistant", "done", "so")
    node = session.open(session.plan(_incoming(question)))
    ids = tok.encode("so") + [tok.id("</think>")] + tok.encode("done") + [tok.id("<|user|>")]
    session.record(node, Completion(ids, [-1.0] * len(ids), [0] * len(ids), "stop"), answer, "stop")
    return session, question, answer


def test_a_clean_continuation_equals_the_rendered_conversation(tok: Tokenizer) -> None:
    session, question, answer = _session(tok)
    more = Message("user", "then")
    plan = session.plan(_incoming(question, answer, more))
    assert plan.fork == "" and plan.new_messages == [more]
    assert plan.prompt_ids == render(tok, [question, answer, more], add_generation_prompt=True).ids


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, a: ([q, Message("assistant", "edited", "so")], None), "history_edited"),
        (lambda q, a: ([q, Message("assistant", "done", "")], None), "history_edited"),
        (lambda q, a: ([q, a], [SHELL_TOOL]), "tools_changed"),
        (lambda q, a: ([Message("user", "other"), a], None), "new_conversation"),
        (
            lambda q, a: ([q, a, Message("user", "x"), Message("assistant", "injected")], None),
            "history_edited",
        ),
    ],
)
def test_a_broken_history_is_a_fork_with_its_reason(tok: Tokenizer, change: Any, reason: str) -> None:
    session, question, answer = _session(tok)
    messages, tools = change(question, answer)
    messages = [*messages, Message("user", "then")]
    plan = session.plan(_incoming(*messages), tools)
    assert (plan.fork, plan.parent) == (reason, -1)
    assert plan.prompt_ids == render(tok, messages, tools, add_generation_prompt=True).ids
    session.open(plan, tools)
    assert session.forks == {reason: 1}


def test_asking_twice_reuses_the_prompt_and_a_length_cut_gets_its_marker(tok: Tokenizer) -> None:
    session, question, answer = _session(tok)
    assert session.plan(_incoming(question)).node == 0
    assert session.plan(_incoming(question), thinking=False).node is None
    cut = Message("assistant", "", "so")
    ids = tok.encode("so")
    session.record(0, Completion(ids, [-1.0] * len(ids), [0] * len(ids), "length"), cut, "length")
    plan = session.plan(_incoming(question, cut, Message("user", "then")))
    head = session.path_ids(0) + ids
    assert plan.prompt_ids[: len(head) + 1] == [*head, tok.id("<|user|>")]


def test_replies_that_read_the_same_are_told_apart_by_their_call_ids(tok: Tokenizer) -> None:
    session = Session(ChatRenderer(tok))
    question = Message("user", "list it")
    node = session.open(session.plan(_incoming(question)))
    replies = []
    for filler in ("", " "):  # different tokens, same message
        ids = tok.encode("so" + filler) + [tok.id("</think>"), tok.id("<|observation|>")]
        reply = Message.from_openai(
            {"role": "assistant", "reasoning_content": "so",
             "tool_calls": [{"id": f"call_{len(replies)}", "function": {"name": "shell", "arguments": "{}"}}]}
        )  # fmt: skip
        replies.append(
            session.record(node, Completion(ids, [-1.0] * len(ids), [0] * len(ids), "stop"), reply, "stop")
        )
        result = Message("tool", "12", tool_call_id=f"call_{len(replies) - 1}")
        plan = session.plan(_incoming(question, reply, result))
        assert plan.parent == replies[-1]
