"""Long documents whose end asks for something said far before: RULER- and MRCR-like (spec 2), made offline.

    needle       one fact among filler                         "The number of the lamp is 47."
    multi_key    several facts, one is asked for               which lamp, which boat, … ?
    multi_value  one name has several numbers, all asked for   in the order of their appearance
    mrcr         the same question was answered several times; the n-th answer is asked for

Each case has an exact length in the model's own tokens (prompt + answer), is a pure function of (seed, sort, length,
number), and can be answered by copying: two-digit numbers and common words, so that a small model can learn it. The
same generators make mid-training documents and, from other seeds, evaluations.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fullarc.chat import Tokenizer
from fullarc.config.errors import FullarcError
from fullarc.config.seeds import derive

_NAMES = (
    "apple bag ball bank bed bell bird boat book bottle box bread bridge camera car card cat chair clock cloud coat "
    "coin cup desk dog door drum egg farm fish flag flower fox garden gate glass gold hat hill horse house island "
    "jacket key king knife lake lamp leaf letter lion map market milk mirror moon mountain mouse needle nest ocean "
    "orange paper park pen phone piano pocket queen rain ring river road rock roof rope rose sand school ship shoe "
    "silver snow song spoon star stone street sugar sun table tea tent tiger tower train tree truck wall watch water "
    "wheel wind window winter wolf wood"
)
NAMES = _NAMES.split()
ORDINALS = ("first", "second", "third", "fourth")
# how often a training document asks: with them a quarter to a third of it is filler
TOKENS_PER_FACT = 64
TOKENS_PER_QUOTE = 200
QUOTE_GIVEN = 4  # tokens of a sentence that has to be continued
QUOTE_ASKED = 20
SORTS = ("needle", "multi_key", "multi_value", "mrcr")


@dataclass(frozen=True)
class Case:
    """A document that ends in a question, and its only right answer. `length` = prompt + answer in tokens."""

    sort: str
    length: int
    prompt_ids: list[int]
    answer_ids: list[int]


class Filler:
    """Sentences to hide things among, as token ids.

    Args:
        texts: documents of prose; held-out ones for evaluations.
    """

    def __init__(self, tok: Tokenizer, texts: Iterable[str], limit: int = 4000) -> None:
        sentences = []
        for text in texts:
            for sentence in re.findall(r"[A-Z][^.\n]{30,200}\.(?=\s)", " ".join(text.split())):
                sentences.append(" " + sentence)
            if len(sentences) >= limit:
                break
        self.sentences = tok.encode_batch(sentences[:limit] or [" The day was long and the road was quiet."])

    def draw(self, rng: random.Random, tokens: int) -> list[list[int]]:
        """Sentences of `tokens` tokens in total; the last one is cut to fit."""
        drawn: list[list[int]] = []
        while tokens > 0:
            sentence = rng.choice(self.sentences)[:tokens]
            drawn.append(sentence)
            tokens -= len(sentence)
        return drawn


def case(tok: Tokenizer, filler: Filler, sort: str, length: int, seed: int, number: int) -> Case:
    """Case `number` of a sort at exactly `length` tokens.

    Raises:
        FullarcError: the sort does not exist, or `length` has no room for its facts and its question.
    """
    rng = random.Random(derive(seed, "longctx", sort, length, number))
    facts, question, answer = _script(rng, sort)
    fact_ids = [tok.encode(" " + fact) for fact in facts]
    end_ids, answer_ids = tok.encode(question), tok.encode(" " + answer)
    room = length - sum(map(len, fact_ids)) - len(end_ids) - len(answer_ids)
    if room < 0:
        raise FullarcError(
            f"A {sort} case does not fit into {length} tokens.", f"Use at least {length - room}."
        )
    sentences = filler.draw(rng, room)
    places = sorted(rng.choices(range(len(sentences) + 1), k=len(facts)))
    prompt: list[int] = []
    for place in range(len(sentences) + 1):
        for fact, at in zip(fact_ids, places, strict=True):
            prompt += fact if at == place else []
        prompt += sentences[place] if place < len(sentences) else []
    return Case(sort, length, prompt + end_ids, answer_ids)


def cases(
    tok: Tokenizer,
    filler: Filler,
    lengths: Sequence[int],
    per_length: int,
    seed: int,
    sorts: Sequence[str] = SORTS,
) -> list[Case]:
    """`per_length` cases of each length, the sorts in turn."""
    return [
        case(tok, filler, sorts[number % len(sorts)], length, seed, number)
        for length in lengths
        for number in range(per_length)
    ]


def document(
    tok: Tokenizer, filler: Filler, length: int, seed: int, number: int
) -> tuple[list[int], list[int]]:
    """A training document of exactly `length` tokens: facts among filler, then all of them asked for.

    Asking for everything gives many answers to learn from in one document; every fourth one is a single `case`.
    Returns ids, which end in <|endoftext|>, and loss flags: 1 on the answers, the only part that can be known.
    """
    eos = tok.id("<|endoftext|>")
    if number % 4 == 3 or length < 200:
        sort = SORTS[number // 4 % len(SORTS)]
        try:
            one = case(tok, filler, sort, length - 1, seed, number)
        except FullarcError:  # too long for this length and tokenizer; the needle is the shortest
            one = case(tok, filler, "needle", length - 1, seed, number)
        return [*one.prompt_ids, *one.answer_ids, eos], [0] * len(one.prompt_ids) + [1] * (
            length - len(one.prompt_ids)
        )
    rng = random.Random(derive(seed, "longctx", "document", length, number))
    room = length - 1
    told: list[list[list[int]]] = []
    asks: list[tuple[list[int], list[int]]] = []
    for facts_ids, question_ids, answer_ids in _material(tok, filler, rng, length):
        needed = sum(map(len, facts_ids)) + len(question_ids) + len(answer_ids)
        if needed <= room:
            told.append(facts_ids)
            asks.append((question_ids, answer_ids))
            room -= needed
    rng.shuffle(asks)
    sentences = filler.draw(rng, room)
    for facts_ids in told:  # from the last to the first, so that they stay in order
        places = sorted(rng.choices(range(len(sentences) + 1), k=len(facts_ids)))
        for place, fact_ids in zip(reversed(places), reversed(facts_ids), strict=True):
            sentences.insert(place, fact_ids)
    ids = [token for sentence in sentences for token in sentence]
    loss = [0] * len(ids)
    for question_ids, answer_ids in asks:
        ids += [*question_ids, *answer_ids]
        loss += [0] * len(question_ids) + [1] * len(answer_ids)
    return [*ids, eos], [*loss, 1]


def _material(
    tok: Tokenizer, filler: Filler, rng: random.Random, length: int
) -> Iterator[tuple[list[list[int]], list[int], list[int]]]:
    """What a training document tells and asks, as token ids: (facts in their order, question, answer).

    First sentences whose beginning is given and that have to be continued: every token of such an answer must be
    looked up, which is what lets recall form (docs/log.md). Then a name with several numbers, then names with one.
    """
    for sentence in rng.sample(filler.sentences, min(len(filler.sentences), length // TOKENS_PER_QUOTE)):
        given = sentence[:QUOTE_GIVEN]
        question = [*tok.encode("\n\nQuestion: How does this go on?"), *given, *tok.encode("\nAnswer:")]
        yield [sentence], question, sentence[QUOTE_GIVEN : QUOTE_GIVEN + QUOTE_ASKED]
    names = rng.sample(NAMES, min(len(NAMES), 1 + length // TOKENS_PER_FACT))
    facts, question_text, answer = _several(names[0], rng)
    yield [tok.encode(" " + fact) for fact in facts], tok.encode(question_text), tok.encode(" " + answer)
    for name in names[1:]:
        fact_ids = tok.encode(" " + _fact(name, _number(rng)))
        yield [fact_ids], tok.encode(f"\n\nQuestion: {_asked(name)}\nAnswer:"), fact_ids


def conversation(filler_text: Sequence[str], sentences: int, seed: int, number: int) -> dict[str, Any]:
    """A needle or multi-key question as a chat, for SFT: {"messages": […]} in OpenAI's form.

    Args:
        filler_text: sentences of prose.
        sentences: how many of them surround the facts.
    """
    rng = random.Random(derive(seed, "longctx", "conversation", sentences, number))
    names = rng.sample(NAMES, rng.randint(1, 4))
    facts = [_fact(name, _number(rng)) for name in names]
    lines = [rng.choice(filler_text).strip() for _ in range(sentences)]
    for fact in facts:
        lines.insert(rng.randint(0, len(lines)), fact)
    asked = rng.randrange(len(names))
    user = " ".join(lines) + f"\n\n{_asked(names[asked])}"
    return {
        "kind": "general",
        "family": "needle",
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": facts[asked]}],
        "tools": [],
    }


def _script(rng: random.Random, sort: str) -> tuple[list[str], str, str]:
    """Facts in the order they are told, the question up to the answer, the answer."""
    names = rng.sample(NAMES, 4)
    if sort in ("needle", "multi_key"):
        facts = {name: _number(rng) for name in names[: 1 if sort == "needle" else 4]}
        name = rng.choice(list(facts))
        begin = _fact(name, "")[:-2]
        told = [_fact(n, v) for n, v in facts.items()]
        return told, f"\n\nQuestion: {_asked(name)}\nAnswer: {begin}", f"{facts[name]}."
    if sort == "multi_value":
        facts_of_one, question, answer = _several(names[0], rng)
        begin, values = answer[: -len("00, 00, 00.") - 1], answer[-len("00, 00, 00.") :]
        return facts_of_one, f"{question} {begin}", values
    if sort == "mrcr":
        replies = [" ".join(rng.sample(NAMES, 3)) for _ in ORDINALS]
        topics = [names[0], names[1], names[0], names[1]]
        told = [f"User: Three words about the {t}. Reply: {r}." for t, r in zip(topics, replies, strict=True)]
        which = rng.randrange(4)
        asked = ORDINALS[which // 2]
        question = f"\n\nQuestion: What was the {asked} reply about the {topics[which]}?\nAnswer: Reply:"
        return told, question, f"{replies[which]}."
    raise FullarcError(f'There is no long-context test "{sort}".', f"There are {', '.join(SORTS)}.")


def _several(name: str, rng: random.Random) -> tuple[list[str], str, str]:
    """Three facts about one name, the question for all of them, and the answer in the order in which they are told."""
    values = rng.sample(range(10, 100), 3)
    facts = [_fact(name, str(value)) for value in values]
    question = f"\n\nQuestion: What are the numbers of the {name}?\nAnswer:"
    return facts, question, f"The numbers of the {name} are {values[0]}, {values[1]}, {values[2]}."


def _number(rng: random.Random) -> str:
    return str(rng.randint(10, 99))


def _fact(name: str, value: str) -> str:
    return f"The number of the {name} is {value}."


def _asked(name: str) -> str:
    return f"What is the number of the {name}?"
