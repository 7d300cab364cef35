"""Messages to token ids and back: the only room, beside the gateway's dialects, where text exists.

messages.py   what is said, by whom, what of it is trained on
tokenizer.py  byte-level BPE; text can not forge special ids
render.py     messages -> ids and loss mask, in GLM-5's wire format
parse.py      sampled ids -> reasoning, content, tool calls, format errors
template.py   the same format as a Jinja template, for other people's servers
forced.py     turns that must call a tool; grammar.py: turns that must follow a form; tags.py: tags in free text
forms.py      the forms of a request in everybody's names
"""

from fullarc.chat.messages import LossSpan, Message, ToolCall
from fullarc.chat.parse import Parsed, parse_assistant
from fullarc.chat.render import (
    NoTrainableTokens,
    Rendered,
    render,
    render_delta,
    render_example,
    render_text,
    show_mask,
)
from fullarc.chat.special import SPECIAL_TOKENS, STOP_TOKENS
from fullarc.chat.template import CHAT_TEMPLATE
from fullarc.chat.tokenizer import Tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "SPECIAL_TOKENS",
    "STOP_TOKENS",
    "LossSpan",
    "Message",
    "NoTrainableTokens",
    "Parsed",
    "Rendered",
    "Tokenizer",
    "ToolCall",
    "parse_assistant",
    "render",
    "render_delta",
    "render_example",
    "render_text",
    "show_mask",
]
