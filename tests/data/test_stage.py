"""The stage as the arc calls it: folders, rows of each kind, resumption and determinism."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from fullarc.chat import NoTrainableTokens, Tokenizer
from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir, is_complete
from fullarc.config.recipe import load_recipe
from fullarc.config.runfolder import CONVERSATIONS, LANGUAGE
from fullarc.data import longctx, read_documents, read_rows, stage
from fullarc.data.corpus import Document
from fullarc.data.stage import build_tokenizer, pack_conversations, run, sft_rows

CHAT = {
    "messages": [
        {"role": "user", "content": "Count the files."},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "List.",
            "tool_calls": [{"id": "1", "function": {"name": "shell", "arguments": {"command": "ls"}}}],
        },
        {"role": "tool", "content": "a b", "tool_call_id": "1"},
        {"role": "assistant", "content": "Two."},
    ],
    "tools": [{"type": "function", "function": {"name": "shell"}}],
}


def context(tmp_path, folder, name="data", run_name="run", more=()):
    overrides = ["size=nano", f'data.sources=["{folder}"]', f'runs_dir="{tmp_path}"', f"name={run_name}"]
    recipe = load_recipe(
        None, [*overrides, "stages.midtrain.seq_len=256", "model.vocab_size=512", *more]
    ).recipe
    stage = recipe.data if name == "data" else recipe.stages[name]
    out = recipe.run_dir / "stages" / name
    if name != "data":
        with atomic_dir((out / CONVERSATIONS).parent) as temp:
            lines = [json.dumps(CHAT | {"seed": i}) for i in range(20)]
            (temp / "conversations.jsonl").write_text("\n".join(lines) + "\n")
    return StageContext(recipe, stage, name, recipe.run_dir, out, None, recipe.seed)


def digest(folder):
    """One hash of every file below a folder."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return whole.hexdigest()


@pytest.fixture
def done(tmp_path, folder):
    ctx = context(tmp_path, folder)
    return ctx, run(ctx)


def test_folders_and_report(done):
    ctx, facts = done
    data = ctx.run_dir / "data"
    assert {p.name for p in data.iterdir()} == {"corpus", "heldout", "tokenizer", "rows"}
    packed, meta = read_rows(data / "rows" / "pretrain")
    assert facts["tokens"] == meta["n_tokens"] > 1000 and meta["packing"] == "concat" and not meta["isolate"]
    tok = Tokenizer.load(data / "tokenizer")
    assert tok.vocab_size == facts["vocab_size"] == ctx.recipe.model.vocab_size
    text = tok.decode(packed.ids[: 1 << 10].ravel())
    assert text.count("<|endoftext|>") >= facts["documents"] - 2
    trained = [d.text for d in read_documents(data / "corpus")]
    assert all(any(part.strip() in t for t in trained) for part in text.split("<|endoftext|>")[1:-1])


def test_same_bytes_again_and_after_losing_parts(tmp_path, folder, done):
    ctx, facts = done
    first = digest(ctx.run_dir / "data")
    shutil.rmtree(ctx.run_dir / "data" / "rows")
    shutil.rmtree(ctx.run_dir / "data" / "tokenizer")
    shutil.rmtree(ctx.run_dir / "data" / "heldout")  # as if killed between the folders
    run(ctx)
    assert digest(ctx.run_dir / "data") == first
    other = context(tmp_path, folder, run_name="other")
    run(other)
    assert digest(other.run_dir / "data") == first


def test_finished_parts_are_not_made_again(done):
    ctx, facts = done
    rows = ctx.run_dir / "data" / "rows" / "pretrain" / "ids.npy"
    before = rows.stat().st_mtime_ns
    assert run(ctx) == facts, "nor told differently"
    assert rows.stat().st_mtime_ns == before


def test_sft_rows(tmp_path, folder, done):
    ctx = context(tmp_path, folder, "sft")
    facts = pack_conversations(ctx)
    tok = Tokenizer.load(ctx.run_dir / "data" / "tokenizer")
    packed, meta = read_rows(ctx.run_dir / "data" / "rows" / "sft")
    assert meta["isolate"] and meta["conversations"] == 21 and meta["dropped_no_target"] == 0
    assert facts["rows_n_targets"] == packed.loss.sum() > 0
    for ids, loss, docs in zip(packed.ids, packed.loss, packed.docs, strict=True):
        for number in range(1, docs.max() + 1):
            own = docs == number
            assert ids[own][:2].tolist() == [tok.id("[gMASK]"), tok.id("<sop>")]
            assert ids[own][-1] in tok.stop_ids and loss[own][-1] == 1  # stops by itself
            if tok.id("<tool_response>") in ids[own]:
                trained = tok.decode(ids[own & (loss == 1)])
                assert trained == (
                    "List.</think><tool_call>shell<arg_key>command</arg_key><arg_value>ls</arg_value></tool_call>"
                    "<|observation|>Two.<|user|>"
                )


def test_sft_repeats_long_documents_and_text(tmp_path, tok):
    """Long documents that ask for something, and text, beside the conversations; without it only conversations."""
    lines = [
        f"{chr(65 + i)}{i} roads were long and {i} rivers wide and cold. " for i in range(26)
    ]  # begin unalike
    text = "".join(lines) * 2
    documents = [Document(str(number), "a", "a", "en", text) for number in range(20)]
    begin = [tok.id("[gMASK]"), tok.id("<sop>")]
    tokens = {}
    for share in (0.0, 0.4):
        sft_rows([CHAT] * 40, tok, tmp_path / f"rows{share}", 400, documents, share, 3)
        packed, _ = read_rows(tmp_path / f"rows{share}")
        replayed, asked, texts = 0, 0, 0
        for ids, loss, docs, parents in zip(
            packed.ids, packed.loss, packed.docs, packed.parents, strict=True
        ):
            for number in set(docs.tolist()) - {0}:
                own = docs == number
                if ids[own][:2].tolist() != begin and not parents[own].any():
                    replayed += own.sum()
                    asked += 0 < loss[own].sum() < own.sum() / 2
                    texts += loss[own].all() and tok.decode(ids[own][:40].tolist()) in text
        tokens[share] = replayed / packed.tokens
        assert (asked > 0) == (texts > 0) == (share > 0)
    assert tokens[0.0] == 0 and 0.35 < tokens[0.4] < 0.45
    again = tmp_path / "again"
    sft_rows([CHAT] * 40, tok, again, 400, documents, 0.4, 3)
    assert (again / "ids.npy").read_bytes() == (tmp_path / "rows0.4" / "ids.npy").read_bytes()


def test_the_stages_replay_arrives_in_its_rows(tmp_path, folder, done):
    sizes = []
    for share in (0.0, 0.4):
        ctx = context(tmp_path, folder, "sft", more=[f"stages.sft.replay={share}"])
        shutil.rmtree(ctx.run_dir / "data" / "rows" / "sft", ignore_errors=True)
        sizes.append(pack_conversations(ctx)["rows_n_tokens"])
    assert sizes[1] > 1.4 * sizes[0]


def test_long_conversations_are_cut_and_counted(tmp_path, tok):
    long = {"messages": [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "yes"}]}
    cut = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * 500}]}
    meta = sft_rows([long, cut, CHAT], tok, tmp_path / "rows", 400)
    assert (meta["truncated"], meta["dropped_no_target"], meta["conversations"]) == (2, 1, 3)
    mute = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(NoTrainableTokens, match="Conversation 1: .* no trainable token"):
        sft_rows([CHAT, mute], tok, tmp_path / "bad", 128)
    with pytest.raises(FullarcError, match="no conversation"):
        sft_rows([], tok, tmp_path / "bad", 128)
    assert not (tmp_path / "bad").exists()


def test_midtrain_rows(tmp_path, folder, done):
    ctx = context(tmp_path, folder, "midtrain")
    pack_conversations(ctx)
    packed, meta = read_rows(ctx.run_dir / "data" / "rows" / "midtrain")
    need = sum(ctx.recipe.stages[n].steps * ctx.recipe.stages[n].batch_tokens for n in ("midtrain", "dsa"))
    need += ctx.recipe.stages["dsa"].indexer_steps * ctx.recipe.stages["dsa"].batch_tokens
    mix = meta["mix_tokens"]
    assert sum(mix.values()) == meta["n_tokens"] == packed.tokens
    assert need * 0.95 <= packed.tokens <= need * 1.3
    assert mix["trajectories"] == pytest.approx(0.2 * need, rel=0.15)
    assert mix["synthetic"] == pytest.approx(0.2 * need, rel=0.15)
    assert meta["isolate"] and not packed.loss[packed.docs == 0].any()
    assert packed.tokens - packed.loss.sum() < mix["synthetic"], (
        "all is taught but the synthetic documents' prompts"
    )
    rows = ctx.run_dir / "data" / "rows" / "midtrain" / "ids.npy"
    before = rows.stat().st_mtime_ns
    pack_conversations(ctx)
    assert rows.stat().st_mtime_ns == before
    first = digest(ctx.run_dir / "data" / "rows")
    shutil.rmtree(ctx.run_dir / "data" / "rows" / "midtrain")
    pack_conversations(ctx)
    assert digest(ctx.run_dir / "data" / "rows") == first


def test_missing_conversations_are_an_error(tmp_path, folder, done):
    ctx = context(tmp_path, folder, "sft")
    shutil.rmtree((ctx.out / CONVERSATIONS).parent)
    with pytest.raises(FullarcError, match="never completely written"):
        pack_conversations(ctx)
    assert not is_complete(ctx.run_dir / "data" / "rows" / "sft")


def test_words_of_the_tools_block_are_single_tokens(done, tmp_path, folder):
    ctx, _ = done
    documents = read_documents(ctx.run_dir / "data" / "corpus")
    tok = build_tokenizer(documents, tmp_path / "tok", 1024, 0.2, 0)
    for word in ("function", " signatures", " arguments", "command", "properties", " following"):
        assert len(tok.encode(word)) == 1, word
    assert np.mean([len(tok.encode(d.text)) / len(d.text) for d in documents]) < 0.5


def test_the_tasks_language_enters_the_tokenizer_as_often_as_its_weight_says(tmp_path, folder):
    pieces = []
    for weight in (0, 1, 1000):
        ctx = context(tmp_path, folder, run_name=f"run{weight}", more=[f"data.language_weight={weight}"])
        ctx.out.mkdir(parents=True)
        (ctx.out / LANGUAGE).write_text('{"text": "rename zebraphone"}\n')
        run(ctx)
        pieces.append(len(Tokenizer.load(ctx.run_dir / "data" / "tokenizer").encode(" zebraphone")))
    assert pieces[0] >= pieces[1] > pieces[2] == 1, "every merge of the word, once it is frequent enough"


def test_every_sort_of_single_question_is_asked_at_every_length(monkeypatch, tok):
    made = set()

    def document(tok, filler, length, seed, number):
        if number % 4 == 3:
            made.add((longctx.SORTS[number // 4 % 4], length))
        return [1], [1]

    monkeypatch.setattr(stage, "document", document)
    stage._synthetic([], tok, [1024, 512, 256, 512], 100 * 1024, 0)
    assert made == {(sort, length) for sort in longctx.SORTS for length in (256, 512, 1024)}
