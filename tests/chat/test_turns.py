"""Where a stop string begins in what was sampled, and what is left before it, by hand on bytes."""

import pytest

from fullarc.chat import Tokenizer
from fullarc.chat.turns import before, begins


def test_a_stop_begins_where_the_last_token_completed_it(tok: Tokenizer) -> None:
    ids = tok.encode_raw("so list it then list")
    assert begins(tok, ids, "list") == len("so list it then "), "an earlier one was not what ended it"
    assert begins(tok, ids, "nothing") == begins(tok, ids, "so") == len("so list it then list"), (
        "none was completed"
    )
    assert begins(tok, [], "a") == 0


@pytest.mark.parametrize("text", ["so list it 我们 then", "a\n b"])
def test_what_is_left_before_a_byte_is_those_bytes(tok: Tokenizer, text: str) -> None:
    ids, data = tok.encode_raw(text), text.encode()
    for size in range(len(data) + 1):
        assert b"".join(map(tok.token_bytes, before(tok, ids, size))) == data[:size]
    assert before(tok, ids, len(data)) == ids
