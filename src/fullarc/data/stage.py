"""The data stage, and the rows of every language-model stage.

    data/corpus     documents.jsonl, report.json      build_corpus
    data/heldout    heldout.jsonl                     never trained on; evaluations read it
    data/tokenizer  tokenizer.json, …                 build_tokenizer
    data/rows/NAME  ids, loss, docs, meta.json        one folder per language-model stage

`run` makes all that raw text suffices for; `pack_conversations` is the second part of mid-training and SFT, after the
tasks have written their demonstrations. Invariant: each folder is whole or absent and a whole one is not made again,
so a killed stage goes on; the same settings and files give the same bytes.
"""

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fullarc.chat import Message, NoTrainableTokens, Tokenizer, render_example, render_text
from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir, is_complete, read_jsonl, verify_manifest
from fullarc.config.runfolder import CONVERSATIONS, LANGUAGE
from fullarc.config.seeds import derive
from fullarc.config.stages import DSA, Midtrain, Pretrain
from fullarc.data.corpus import Document, build_corpus, read_documents
from fullarc.data.longctx import Filler, conversation, document
from fullarc.data.pack import Doc, own_tokens, pack_concat, pack_sharing, write_rows

SHORTEST_SYNTHETIC = 128  # tokens of a synthetic long document

_CHAT_SAMPLE = (
    300  # times that the tools block is shown to the tokenizer, so that its words become single tokens
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "shell",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string", "description": "command"}},
            "required": ["command"],
        },
    },
}


def run(ctx: StageContext) -> dict[str, Any]:
    """Corpus, tokenizer, and the rows of the pre-training stages; under `ctx.run_dir`/data."""
    settings, folder = ctx.recipe.data, ctx.run_dir / "data"
    if not (is_complete(folder / "corpus") and is_complete(folder / "heldout")):
        build_corpus(
            settings, folder / "corpus", folder / "heldout", ctx.event, lambda n: ctx.log(n, documents=n)
        )
    report = json.loads((folder / "corpus" / "report.json").read_text(encoding="utf-8"))
    documents = read_documents(folder / "corpus")
    if not is_complete(folder / "tokenizer"):
        language = [record["text"] for record in read_jsonl(ctx.out / LANGUAGE)] * settings.language_weight
        size, megabytes = ctx.recipe.model.vocab_size, settings.tokenizer_mb
        build_tokenizer(documents, folder / "tokenizer", size, megabytes, ctx.seed, language)
    tok = Tokenizer.load(folder / "tokenizer")
    tokens = 0
    for name, stage in ctx.recipe.stages.items():
        rows = folder / "rows" / name
        if isinstance(stage, Pretrain):
            if not is_complete(rows):
                pretrain_rows(documents, tok, rows, stage.seq_len, derive(ctx.seed, name, "rows"))
            tokens = json.loads((rows / "meta.json").read_text())["n_tokens"]
    ctx.event("data_ready", documents=report["train_documents"], bytes=report["train_bytes"], tokens=tokens)
    return {
        "documents": report["train_documents"],
        "bytes": report["train_bytes"],
        "tokens": tokens,
        "vocab_size": tok.vocab_size,
    }


def pack_conversations(ctx: StageContext) -> dict[str, Any]:
    """Rows of a mid-training or SFT stage from the conversations in `ctx.out`/demos/conversations.jsonl."""
    folder = ctx.run_dir / "data"
    rows = folder / "rows" / ctx.name
    if not is_complete(rows):
        tok = Tokenizer.load(folder / "tokenizer")
        verify_manifest((ctx.out / CONVERSATIONS).parent)
        conversations = read_jsonl(ctx.out / CONVERSATIONS)
        seed = derive(ctx.seed, ctx.name, "rows")
        documents = read_documents(folder / "corpus")
        if isinstance(ctx.stage, Midtrain):
            midtrain_rows(documents, conversations, tok, rows, ctx.stage, _tokens(ctx), seed)
        else:
            needles = needle_conversations(documents, math.ceil(len(conversations) / 40), seed)
            chats = [*conversations, *needles]
            sft_rows(chats, tok, rows, ctx.stage.seq_len, documents, replay=ctx.stage.replay, seed=seed)
    meta = json.loads((rows / "meta.json").read_text())
    return {f"rows_{key}": meta[key] for key in ("n_tokens", "n_targets", "fill")}


def build_tokenizer(
    documents: Sequence[Document],
    out: Path,
    vocab_size: int,
    megabytes: float,
    seed: int,
    extra: Iterable[str] = (),
) -> Tokenizer:
    """Train a tokenizer on a sample of the documents plus the chat format, and save it atomically."""
    order = list(documents)
    random.Random(derive(seed, "tokenizer")).shuffle(order)
    sample, left = [], megabytes * 1e6
    for one in order:
        if left <= 0:
            break
        sample.append(one.text[: int(left) + 1])
        left -= len(one.text.encode())
    tok = Tokenizer.train([*sample, *[render_text([], [_TOOL])] * _CHAT_SAMPLE, *extra], vocab_size)
    with atomic_dir(out) as temp:
        tok.save(temp)
    return tok


def tokenize(documents: Sequence[Document], tok: Tokenizer) -> list[list[int]]:
    """Token ids of each document, with the <|endoftext|> that ends it."""
    eos = tok.id("<|endoftext|>")
    return [[*ids, eos] for ids in tok.encode_batch([one.text for one in documents])]


def pretrain_rows(
    documents: Sequence[Document], tok: Tokenizer, out: Path, length: int, seed: int
) -> dict[str, Any]:
    """Rows of shuffled documents, plainly concatenated; returns meta.json's content."""
    ids = tokenize(documents, tok)
    random.Random(seed).shuffle(ids)
    packed = pack_concat([(doc, [1] * len(doc)) for doc in ids], length)
    return write_rows(out, packed, tok.vocab_size, {"documents": len(ids)})


def midtrain_rows(
    documents: Sequence[Document],
    conversations: Sequence[Mapping[str, Any]],
    tok: Tokenizer,
    out: Path,
    settings: Midtrain,
    tokens: int,
    seed: int,
) -> dict[str, Any]:
    """About `tokens` tokens in rows of `settings.seq_len`: long documents first, synthesis, trajectories repeated.

    Trajectories teach whole (every token is a target), as documents do. Returns meta.json's content.
    """
    length = settings.seq_len
    short = min(length, SHORTEST_SYNTHETIC)
    # near facts are found first, far ones later
    lengths = [length, max(length // 2, short), max(length // 4, short), max(length // 2, short)]
    trajectories = [render_whole(tok, one) for one in conversations]
    share = settings.trajectory_share if trajectories else 0.0
    synthetic = tokens * settings.synthetic_share
    docs: dict[str, list[Doc]] = {
        "trajectories": list(_repeat(trajectories, own_tokens(trajectories, length), tokens * share, seed)),
        "synthetic": _synthetic(documents, tok, lengths, synthetic, seed),
    }
    natural = tokens * (1 - share) - synthetic
    long_first = sorted(documents, key=lambda one: len(one.text) < 4 * length)
    docs["natural"] = [(ids, [1] * len(ids)) for ids in _until(tokenize(long_first, tok), natural)]
    mix = {name: sum(len(ids) for ids, _ in part) for name, part in docs.items()}
    packed = pack_sharing([doc for part in docs.values() for doc in part], length)
    return write_rows(out, packed, tok.vocab_size, {"mix_tokens": mix})


def sft_rows(
    conversations: Sequence[Mapping[str, Any]],
    tok: Tokenizer,
    out: Path,
    length: int,
    documents: Sequence[Document] = (),
    replay: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows of conversations, isolated from each other, with loss on what the assistant says.

    A conversation longer than a row keeps its beginning and is counted; one whose targets are all gone with the
    rest is left out and counted. A share `replay` of the tokens is of the kinds that mid-training reads, so that
    they are not forgotten: synthetic documents as long as a row, and for a sixth beginnings of `documents`.

    Raises:
        FullarcError: there is no conversation.
        NoTrainableTokens: one has nothing to learn from, whatever its length.
    """
    if not conversations:
        raise FullarcError(
            f"There is no conversation to train on ({CONVERSATIONS}).", "Run the stage's tasks first."
        )
    docs: list[Doc] = []
    counts = {"conversations": len(conversations), "truncated": 0, "dropped_no_target": 0}
    for number, one in enumerate(conversations):
        messages = [Message.from_openai(message) for message in one["messages"]]
        try:
            rendered = render_example(
                tok, messages, one.get("tools") or None, bool(one.get("clear_thinking"))
            )
        except NoTrainableTokens as error:
            raise NoTrainableTokens(f"Conversation {number}: {error.message}", error.hint) from None
        counts["truncated"] += len(rendered.ids) > length
        if any(rendered.loss_mask[1:length]):
            docs.append((rendered.ids[:length], rendered.loss_mask[:length]))
        else:
            counts["dropped_no_target"] += 1
    if replay:
        again = sum(own_tokens(docs, length)) * replay / (1 - replay)
        docs += _synthetic(documents, tok, [length], again * 5 / 6, derive(seed, "replay"))
        order = list(documents)
        random.Random(derive(seed, "replay", "text")).shuffle(order)
        parts = (tokenize([one], tok)[0][:length] for one in order)
        docs += [(ids, [1] * len(ids)) for ids in _until(parts, again / 6)]
    return write_rows(out, pack_sharing(docs, length), tok.vocab_size, counts)


def _synthetic(
    documents: Sequence[Document], tok: Tokenizer, lengths: Sequence[int], tokens: float, seed: int
) -> list[Doc]:
    """About `tokens` tokens of `longctx.document`, `lengths` in turn."""
    filler = Filler(tok, (one.text for one in documents if one.kind == "en"))
    count = round(len(lengths) * tokens / sum(lengths))
    # every fourth is a single question, of a sort that changes each time: shifted so that all meet all lengths
    sizes = [lengths[(number + number // 4 + number // 16) % len(lengths)] for number in range(count)]
    return [document(tok, filler, size, seed, number) for number, size in enumerate(sizes)]


def render_whole(tok: Tokenizer, one: Mapping[str, Any]) -> Doc:
    """A conversation as a document: every token is a target."""
    messages = [Message.from_openai(message) for message in one["messages"]]
    ids = render_example(tok, messages, one.get("tools") or None).ids
    return ids, [1] * len(ids)


def needle_conversations(
    documents: Sequence[Document], count: int, seed: int, sentences: int = 6
) -> list[dict[str, Any]]:
    """Chats that ask for a fact in their own beginning, for SFT."""
    texts = [line.strip() for one in documents if one.kind == "en" for line in one.text.split(". ")[:20]]
    prose = [line for line in texts if 30 < len(line) < 120 and "\n" not in line] or ["The day was long"]
    return [conversation([line + "." for line in prose], sentences, seed, number) for number in range(count)]


def _repeat(docs: Sequence[Doc], sizes: Sequence[int], tokens: float, seed: int) -> Iterator[Doc]:
    """Shuffled passes over `docs` until they have given `tokens` tokens."""
    epoch = 0
    while docs and tokens > 0:
        order = list(range(len(docs)))
        random.Random(derive(seed, "repeat", epoch)).shuffle(order)
        for number in order:
            if tokens <= 0:
                return
            yield docs[number]
            tokens -= sizes[number]
        epoch += 1


def _until(docs: Iterable[list[int]], tokens: float) -> Iterator[list[int]]:
    for ids in docs:
        if tokens <= 0:
            return
        yield ids
        tokens -= len(ids)


def _tokens(ctx: StageContext) -> int:
    """What the stage will read, and the sparse-attention stages after it, which go on with its rows."""
    total = 0
    names = list(ctx.recipe.stages)
    for name in names[names.index(ctx.name) :]:
        stage = ctx.recipe.stages[name]
        if name == ctx.name:
            total += stage.steps * stage.batch_tokens
        elif isinstance(stage, DSA):
            total += (stage.steps + stage.indexer_steps) * stage.batch_tokens
        else:
            break
    return max(total, ctx.stage.seq_len)
