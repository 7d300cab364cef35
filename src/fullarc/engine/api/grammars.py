"""The forms of `chat.forms`, held to.

In every dialect a prompt that ends inside a thought thinks freely first, as SGLang and vLLM let chats do that have a
reasoning parser.
"""

from collections.abc import Callable, Sequence

from fullarc.chat.forced import CallGuide
from fullarc.chat.grammar import Grammar, opens_thought
from fullarc.chat.openai import BadRequest
from fullarc.engine.api.service import Service
from fullarc.engine.guide import Guide


def guiding(
    service: Service, grammar: Grammar | None, prompt: Sequence[int],
    instead: Callable[[], CallGuide | None] = lambda: None,
) -> Callable[[], Guide | None]:  # fmt: skip
    """Makes what holds each sample of a prompt to the form. `instead`: what holds if a tool is called instead."""
    if grammar is None:
        return lambda: None
    if service.grammars is None or service.tok is None:
        raise BadRequest(
            f"{grammar.name} is about text, and this model's folder has no tokenizer.json.", grammar.name
        )
    grammars, thinking = service.grammars, opens_thought(service.tok, prompt)
    ends = service.scheduler.weights.config.eos_token_id
    return lambda: grammars.guide(grammar, ends, thinking, instead())
