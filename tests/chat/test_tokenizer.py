"""The byte-level BPE: lossless, unforgeable, readable by Hugging Face."""

import subprocess
import sys

import pytest
from chat_strategies import text
from hypothesis import given, settings
from hypothesis import strategies as st

from fullarc.chat import SPECIAL_TOKENS, Tokenizer
from fullarc.config.errors import FullarcError


@settings(deadline=None)
@given(text)
def test_round_trip_and_no_forged_specials(tok, s):
    ids = tok.encode(s)
    assert tok.decode(ids) == s
    assert not tok.special_ids & set(ids)
    assert tok.encode_batch([s, s]) == [ids, ids]


@settings(deadline=None)
@given(st.lists(st.integers(-3, 1000)))
def test_decode_never_raises(tok, ids):
    tok.decode(ids).encode()


def test_lone_surrogates_are_replaced(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.decode(tok.encode("\ud83d\ude00")) == "😀"


def test_numbers_are_cut_after_three_digits_and_han_after_four(tok):
    few = Tokenizer.train(["12345 is 12345. " * 50, "other words"], 600)
    _, offsets = few.encode_with_offsets("12345")
    assert [end for _, end in offsets][-2:] == [3, 5], "123 and 45 may be tokens, 1234 never"
    text = "我们的模型从文本学习语言"
    _, offsets = tok.encode_with_offsets(text)
    assert all(start // 4 == (end - 1) // 4 for start, end in offsets)


def test_specials_take_the_last_ids_in_the_released_order(tok):
    first = tok.vocab_size - len(SPECIAL_TOKENS)
    assert [tok.id(name) for name in SPECIAL_TOKENS] == list(range(first, tok.vocab_size))
    # offsets of the released tokenizer: endoftext 154820, user 154827, observation 154829
    assert [i - tok.id("<|endoftext|>") for i in tok.stop_ids] == [0, 7, 9]


def test_huggingface_reads_the_folder(tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for s in ["def f(x):\n        return x + 12", "我们的模型 hello", "naïve – “quoted” 😀 \t\n\n  x"]:
        assert theirs(s)["input_ids"] == tok.encode(s)
        assert theirs.decode(tok.encode(s)) == s
    assert theirs.convert_tokens_to_ids("<|observation|>") == tok.id("<|observation|>")
    assert theirs.eos_token_id == tok.stop_ids[0]


def test_save_load(tok, tmp_path):
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode("the lazy dog 12") == tok.encode("the lazy dog 12")
    assert again.vocab_size == tok.vocab_size and again.stop_ids == tok.stop_ids


def test_training_is_deterministic_across_processes(tmp_path):
    code = (
        "import sys; from fullarc.chat import Tokenizer\n"
        "texts = [('the cat sat on mat %d ' % (i % 7)) * 3 + chr(97 + i % 26) * 3 for i in range(300)]\n"
        "Tokenizer.train(texts, 420).save(sys.argv[1])"
    )
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_errors_are_for_people(tmp_path):
    with pytest.raises(FullarcError, match="vocab_size = 100 is too small"):
        Tokenizer.train(["x"], 100)
    with pytest.raises(FullarcError, match="does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FullarcError, match="not a byte-level tokenizer"):
        Tokenizer.load(tmp_path)
