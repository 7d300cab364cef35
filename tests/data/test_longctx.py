"""Long-context cases: exact lengths, one right answer that the text gives, different bodies."""

import re

import pytest

from fullarc.config.errors import FullarcError
from fullarc.data.longctx import SORTS, Filler, case, cases, conversation, document


@pytest.fixture(scope="module")
def filler(tok, make_prose):
    return Filler(tok, [make_prose(i) for i in range(5)])


def oracle(text):
    """Answers a prompt from its text alone."""
    if "Answer: The numbers of the" in text:
        name = re.search(r"numbers of the (\w+) are$", text)[1]
        return ", ".join(re.findall(rf"The number of the {name} is (\d\d)\.", text))
    if text.endswith("Answer: Reply:"):
        which, name = re.search(r"the (\w+) reply about the (\w+)\?", text).groups()
        replies = re.findall(rf"about the {name}\. Reply: ([\w ]+)\.", text)
        return replies[("first", "second").index(which)]
    name = re.search(r"number of the (\w+) is$", text)[1]
    return re.search(rf"The number of the {name} is (\d\d)\.", text)[1]


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("length", [256, 517])
def test_exact_length_and_answerable(tok, filler, sort, length):
    seen = set()
    for number in range(6):
        one = case(tok, filler, sort, length, 3, number)
        assert len(one.prompt_ids) + len(one.answer_ids) == one.length == length
        text = tok.decode(one.prompt_ids)
        assert tok.decode(one.answer_ids) == f" {oracle(text)}."
        assert not tok.special_ids & {*one.prompt_ids, *one.answer_ids}
        assert one == case(tok, filler, sort, length, 3, number)
        seen.add(text)
    assert len(seen) == 6  # bodies differ


def test_facts_lie_at_all_depths(tok, filler):
    depths = []
    for number in range(40):
        text = tok.decode(case(tok, filler, "needle", 600, 0, number).prompt_ids)
        depths.append(text.index("The number of the") / len(text))
    assert min(depths) < 0.15 and max(depths) > 0.75


def test_cases_cycle_through_the_sorts(tok, filler):
    found = cases(tok, filler, [256, 300], 5, 0)
    assert [c.sort for c in found] == [*SORTS, SORTS[0]] * 2
    assert [c.length for c in found] == [256] * 5 + [300] * 5


@pytest.mark.parametrize("length", [128, 256, 1024])
def test_training_documents(tok, filler, length):
    for number in range(6):
        ids, loss = document(tok, filler, length, 1, number)
        assert len(ids) == len(loss) == length and ids[-1] == tok.id("<|endoftext|>")
        taught = tok.decode([token for token, one in zip(ids, loss, strict=True) if one])
        assert "Question" not in taught and 0 < sum(loss) < length / 2, "only the answers are taught"
        text = tok.decode(ids)
        for name, value in re.findall(r"Answer: The number of the (\w+) is (\d\d)\.", text):
            assert text.count(f"The number of the {name} is {value}.") == 2
        for name, values in re.findall(r"Answer: The numbers of the (\w+) are ([\d, ]+)\.", text):
            told = re.findall(rf"The number of the {name} is (\d\d)\.", text)
            assert len(told) == 3 and values == ", ".join(told), (
                "all of them, in the order in which they are told"
            )


@pytest.mark.parametrize("length", [256, 1024])
def test_training_documents_ask_how_their_sentences_go_on(tok, filler, length):
    asked = 0
    for number in (0, 1, 2, 4, 5, 6):
        body, *questions = tok.decode(document(tok, filler, length, 1, number)[0]).split("\n\nQuestion: ")
        for given, answer in re.findall(r"How does this go on\?(.+)\nAnswer:(.+)", "\n".join(questions)):
            assert given + answer.removesuffix("<|endoftext|>") in body
            asked += 1
        assert any("What are the numbers" in question for question in questions)
    assert asked == 6 * (length // 200)


def test_a_question_that_does_not_fit_becomes_a_needle(tok, filler):
    """The sorts differ in length and the tokenizers in how long they make them; a document always comes out."""
    with pytest.raises(FullarcError, match="mrcr case does not fit"):
        case(tok, filler, "mrcr", 99, 1, 15)
    ids, loss = document(tok, filler, 100, 1, 15)
    assert len(ids) == len(loss) == 100
    assert "What is the number of the" in tok.decode(ids)


def test_too_short_is_a_sentence(tok, filler):
    with pytest.raises(FullarcError, match="does not fit into 20 tokens"):
        case(tok, filler, "multi_key", 20, 0, 0)
    with pytest.raises(FullarcError, match="no long-context test"):
        case(tok, filler, "haystack", 200, 0, 0)


def test_filler_without_sentences(tok):
    assert len(Filler(tok, ["x y z"]).sentences) == 1


def test_conversation():
    one = conversation(["A line of text."], 6, 0, 1)
    user, answer = one["messages"]
    name = re.search(r"What is the number of the (\w+)\?$", user["content"])[1]
    assert answer["content"] in user["content"] and f" the {name} is " in answer["content"]
