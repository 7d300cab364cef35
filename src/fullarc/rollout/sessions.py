"""What one agent session has said, as an append-only tree of token ids (TITO: token in, token out).

A node holds ids: a rendered prompt, the delta of new messages ("env"), or what the engine sampled ("model", with
log-probs and weight versions). A request comes as a message list; the tree finds the longest recorded conversation
that it extends, by identity of messages, and renders only the new ones after it. Recorded ids are never rendered
again: where a client edited history, changed the tools, or put words into the assistant's mouth, a fresh prompt is
rendered under an explicit fork with a reason.

Invariants: the ids served for a request start with the ids of the conversation it extends; every sampled token lies
in exactly one model node. Pure: no I/O, no clock, no randomness; rendering is injected.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fullarc.chat import Message
from fullarc.chat.messages import dumps
from fullarc.chat.render import Tools
from fullarc.rollout.engine_client import Completion
from fullarc.rollout.trajectory import Turn

Fork = Literal["", "history_edited", "tools_changed", "new_conversation"]


class Renderer(Protocol):
    """Messages to ids (fullarc.chat behind it)."""

    def full(self, messages: Sequence[Message], tools: Tools | None, thinking: bool) -> list[int]:
        """A whole conversation and the generation prompt."""
        ...

    def delta(self, messages: Sequence[Message], last_id: int, thinking: bool) -> list[int]:
        """New messages after a sampled turn whose last id is `last_id`, and the next generation prompt."""
        ...


@dataclass(frozen=True)
class Incoming:
    """A message of a request.

    `silent` is the content of an assistant message that came without a reasoning field: most clients do not know
    the field, so its absence means "as you recorded it" and not "I deleted it". None if the field was there.
    """

    message: Message
    silent: str | None = None


@dataclass(frozen=True)
class Node:
    """A segment of tokens. `messages`: what it renders (prompt, env) or the one message it was parsed to (model)."""

    parent: int
    kind: Literal["prompt", "env", "model"]
    ids: list[int]
    messages: list[Message]
    tools_key: str = ""
    thinking: bool = True
    fork: Fork = ""
    completion: Completion | None = None
    format_errors: list[str] = field(default_factory=list)
    finish: str = ""
    guided: bool = False


@dataclass(frozen=True)
class Plan:
    """How a request will be served: `prompt_ids` to the engine; `node` is a recorded prompt to reuse, or None."""

    prompt_ids: list[int]
    parent: int
    new_ids: list[int]
    new_messages: list[Message]
    fork: Fork
    tools_key: str
    thinking: bool
    node: int | None = None


class Session:
    """The tree of one session. `plan` (pure) → `open` (adds the prompt) → `record` (adds what was sampled)."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.nodes: list[Node] = []
        self.forks: Counter[str] = Counter()
        self.tools: Tools | None = None

    def plan(self, incoming: Sequence[Incoming], tools: Tools | None = None, thinking: bool = True) -> Plan:
        """Find what the request extends and render the rest; changes nothing.

        Raises ValueError if the last message is the assistant's: there is nothing to answer.
        """
        if not incoming or incoming[-1].message.role == "assistant":
            raise ValueError("the last message must come from the user, a tool or the system")
        key = dumps(tools) if tools else ""
        messages = [item.message for item in incoming]
        best, matched = -1, 0
        for index, position in self._matches(incoming, key):
            node = self.nodes[index]
            if node.kind != "model":
                if position == len(incoming) and node.thinking == thinking:
                    return Plan(self.path_ids(index), node.parent, [], [], "", key, thinking, index)
            elif position > matched and all(m.role != "assistant" for m in messages[position:]):
                best, matched = index, position
        if best < 0:
            ids = self._renderer.full(messages, tools, thinking)
            return Plan(ids, -1, ids, messages, self._fork_reason(incoming, key), key, thinking)
        head = self.path_ids(best)
        new = self._renderer.delta(messages[matched:], head[-1], thinking)
        return Plan(head + new, best, new, messages[matched:], "", key, thinking)

    def open(self, plan: Plan, tools: Tools | None = None) -> int:
        """Add the prompt of a plan and return its node."""
        if plan.node is not None:
            return plan.node
        if plan.fork:
            self.forks[plan.fork] += 1
        self.tools = tools or self.tools
        kind: Literal["prompt", "env"] = "prompt" if plan.parent < 0 else "env"
        self.nodes.append(
            Node(plan.parent, kind, plan.new_ids, plan.new_messages, plan.tools_key, plan.thinking, plan.fork)
        )
        return len(self.nodes) - 1

    def next_id(self) -> int:
        """The number that the next node will get."""
        return len(self.nodes)

    def record(
        self,
        prompt: int,
        completion: Completion,
        message: Message,
        finish: str,
        format_errors: Sequence[str] = (),
        guided: bool = False,
    ) -> int:
        """Add what the engine sampled after node `prompt`, with the message that the client is given for it.

        `guided`: whether a form narrowed what could be sampled.
        """
        assert self.nodes[prompt].kind != "model", "a completion follows a prompt"
        node = Node(
            prompt,
            "model",
            completion.token_ids,
            [message],
            completion=completion,
            format_errors=list(format_errors),
            finish=finish,
            guided=guided,
        )
        self.nodes.append(node)
        return len(self.nodes) - 1

    def path_ids(self, index: int) -> list[int]:
        """All ids from the root to the end of a node."""
        parts = []
        while index >= 0:
            parts.append(self.nodes[index].ids)
            index = self.nodes[index].parent
        return [token for part in reversed(parts) for token in part]

    def turns(self) -> list[Turn]:
        """The model nodes that sampled something, as turns of a trajectory, in the order of their recording."""
        number: dict[int, int] = {}
        turns: list[Turn] = []
        for index, node in enumerate(self.nodes):
            if node.completion is None or not node.ids:
                continue
            prompt = self.nodes[node.parent]
            number[index] = len(turns)
            turns.append(
                Turn(
                    parent=number.get(prompt.parent, -1),
                    new_messages=[m.to_openai() for m in prompt.messages],
                    message=node.messages[0].to_openai(),
                    prompt_ids=self.path_ids(node.parent),
                    completion_ids=list(node.ids),
                    logprobs=list(node.completion.logprobs),
                    versions=list(node.completion.versions),
                    finish=node.finish,
                    format_errors=list(node.format_errors),
                    fork=prompt.fork,
                    cached_tokens=node.completion.cached_tokens,
                    guided=node.guided,
                )
            )
        return turns

    def _matches(self, incoming: Sequence[Incoming], key: str) -> list[tuple[int, int]]:
        """(node, messages consumed) of every node whose conversation is a prefix of the request."""
        reached = {-1: (0, 0)}  # node -> messages consumed, replies whose call ids the client echoed
        for index, node in enumerate(self.nodes):
            if node.parent not in reached or (node.kind == "prompt" and node.tools_key != key):
                continue
            start, echoes = reached[node.parent]
            end = start + len(node.messages)
            window = incoming[start:end]
            if end <= len(incoming) and all(map(_same, node.messages, window)):
                echoed = node.kind == "model" and _call_ids(node.messages[0]) == _call_ids(window[0].message)
                reached[index] = (end, echoes + echoed)
        del reached[-1]
        # Two replies may read the same: the one whose call ids the client echoes is meant, else the latest (the
        # client asked again because it never saw the first). It comes first.
        hits = sorted(reached.items(), key=lambda hit: (-hit[1][1], -hit[0]))
        return [(index, position) for index, (position, _) in hits]

    def _fork_reason(self, incoming: Sequence[Incoming], key: str) -> Fork:
        roots = [node for node in self.nodes if node.parent < 0]
        if not roots:
            return ""
        if all(node.tools_key != key for node in roots):
            return "tools_changed"
        shared = any(node.messages and _same(node.messages[0], incoming[0]) for node in roots)
        return "history_edited" if shared else "new_conversation"


def _call_ids(message: Message) -> list[str]:
    return [call.id for call in message.tool_calls]


def _same(recorded: Message, item: Incoming) -> bool:
    """Whether a message of a request is the recorded one. Call ids do not matter: they are not in the tokens."""
    new = item.message
    said = recorded.content == new.content and recorded.reasoning == new.reasoning
    return (
        recorded.role == new.role
        and (said or recorded.content == item.silent)
        and [(c.name, dumps(c.arguments)) for c in recorded.tool_calls]
        == [(c.name, dumps(c.arguments)) for c in new.tool_calls]
    )
