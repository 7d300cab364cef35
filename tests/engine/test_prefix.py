"""The prefix cache against a plain record of what was published; held blocks; the spill file and its failures."""

import os
import random
import resource
import signal
import subprocess
import sys
import zlib

import pytest
import torch
from kept import whole

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig
from fullarc.engine import Engine
from fullarc.engine.cache import Cache
from fullarc.engine.native.core import NativeCache
from fullarc.engine.prefix import BLOCK, PrefixCache, block_bytes
from fullarc.engine.spill import SpillFile

ROOM = 8
SHAPE = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, intermediate_size=48, num_attention_heads=4, q_lora_rank=16,
    kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=14, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, index_n_heads=8, index_head_dim=18, index_topk=24, max_position_embeddings=512,
    eos_token_id=(0,), pad_token_id=0,
)  # fmt: skip


@pytest.fixture(params=[Cache, NativeCache])
def cache(request):
    return request.param(SHAPE, slots=3, max_len=128)


def spilling(cache, folder, pages):
    page = block_bytes(cache)
    return SpillFile(folder, pages * page, page)


def latents(cache, space, ids):
    """What `ids` leave behind in `space` [L, P, W + I]: a function of all that comes before, as attention's is."""
    layers, _, width = cache.read(0, 0, 1).shape
    rows, seed = [], zlib.crc32(repr(space).encode())
    for token in ids:
        seed = zlib.crc32(f"{token}".encode(), seed)
        rows.append(torch.rand(layers, width, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows, 1)


def publish(prefixes, cache, space, ids, slot=0):
    cache.write(slot, 0, latents(cache, space, ids))
    return prefixes.publish(space, ids, slot)


def restored(prefixes, cache, space, ids, slot=1):
    """How many tokens are restored, all of them right; nothing is held afterwards."""
    cache.write(slot, 0, torch.full_like(cache.read(slot, 0, cache.max_len), -1))
    chain = prefixes.restore(prefixes.match(space, ids), slot)
    count = len(chain) * BLOCK
    now = cache.read(slot, 0, cache.max_len)
    assert torch.equal(now[:, :count], latents(cache, space, ids)[:, :count]) and (now[:, count:] == -1).all()
    prefixes.release(chain)
    return count


@pytest.mark.parametrize("pages", [0, 4, 40])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_found_is_what_was_published_in_that_space(cache, tmp_path, seed, pages):
    rng = random.Random(seed)
    prefixes = PrefixCache(cache, ROOM, spilling(cache, tmp_path, pages) if pages else None)
    published, holds, found = {0: [], 1: []}, [], 0
    for _ in range(250):
        space = rng.randrange(2)
        ids = [rng.randrange(2) for _ in range(rng.randrange(1, 6))]
        ids = [token for token in ids for _ in range(BLOCK)] + [7] * rng.randrange(BLOCK)
        chance = rng.random()
        if chance < 0.5:
            holds.append(publish(prefixes, cache, space, ids))
            published[space].append(ids[: len(ids) // BLOCK * BLOCK])
        elif chance < 0.95:
            count = restored(prefixes, cache, space, ids)
            known = max((_common(ids, other) for other in published[space]), default=0)
            assert count <= known
            found += count > 0
        else:
            prefixes.clear()
            published = {0: [], 1: []}
        if len(holds) > 2 or chance > 0.8:
            prefixes.release(holds.pop(rng.randrange(len(holds)))) if holds else None
    for chain in holds:
        prefixes.release(chain)
    whole(prefixes)
    assert found > 20
    assert pages == 0 or (prefixes.spilled > 10 and prefixes.returned > 0)


def _common(a, b):
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count // BLOCK * BLOCK


def tokens(number, blocks):
    return [number] * (blocks * BLOCK)


def test_the_least_recently_used_goes_first_and_from_its_end(cache):
    prefixes = PrefixCache(cache, ROOM)
    for number in (1, 2):
        prefixes.release(publish(prefixes, cache, 0, tokens(number, 4)))
    assert restored(prefixes, cache, 0, tokens(1, 4)) == 4 * BLOCK
    prefixes.release(publish(prefixes, cache, 0, tokens(3, 3)))
    assert [len(prefixes.match(0, tokens(n, 4))) for n in (1, 2, 3)] == [4, 1, 3]
    assert len(prefixes) == ROOM * BLOCK
    assert len(prefixes.match(0, tokens(1, 4))) == 4, "looking is using"
    prefixes.release(publish(prefixes, cache, 0, tokens(4, 6)))
    assert [len(prefixes.match(0, tokens(n, 6))) for n in (1, 2, 3, 4)] == [2, 0, 0, 6]


def test_a_block_that_is_held_is_never_dropped(cache):
    prefixes = PrefixCache(cache, ROOM)
    held = publish(prefixes, cache, 0, tokens(1, 5))
    for number in range(2, 9):
        prefixes.release(publish(prefixes, cache, 0, tokens(number, 4)))
    assert restored(prefixes, cache, 0, tokens(1, 5)) == 5 * BLOCK
    assert len(prefixes.match(0, tokens(8, 4))) == 3, "what is left is for the others"
    rest = publish(prefixes, cache, 0, tokens(9, 3))
    assert publish(prefixes, cache, 0, tokens(10, 2)) == [], (
        "all is held: nothing is kept, and nothing breaks"
    )
    prefixes.release(held)
    assert len(publish(prefixes, cache, 0, tokens(11, 4))) == 4
    assert len(prefixes.match(0, tokens(9, 3))) == len(rest)


def test_spaces_are_apart(cache):
    prefixes = PrefixCache(cache, ROOM)
    for space in ((0, 0, ""), (0, 0, "salt"), (0, 3, ""), (1, 0, "")):
        assert prefixes.match(space, tokens(1, 2)) == []
        prefixes.release(publish(prefixes, cache, space, tokens(1, 2)))
    assert restored(prefixes, cache, (0, 0, "salt"), tokens(1, 2)) == 2 * BLOCK


def test_what_was_held_when_all_was_forgotten_stays_forgotten(cache):
    prefixes = PrefixCache(cache, ROOM)
    held = publish(prefixes, cache, 0, tokens(1, 3))
    prefixes.clear()
    again = publish(prefixes, cache, 0, tokens(1, 2))
    prefixes.release(held)
    assert restored(prefixes, cache, 0, tokens(1, 3)) == 2 * BLOCK
    prefixes.release(again)
    whole(prefixes)


def test_the_bytes_of_a_block_are_those_that_it_takes(cache):
    prefixes = PrefixCache(cache, ROOM)
    assert prefixes._kept.nbytes == ROOM * block_bytes(cache)


def test_a_budget_in_bytes(checkpoints):
    block = block_bytes(Engine(checkpoints["v0"], max_batch=1, max_len=64).scheduler.core.cache)
    for blocks in (0, 3):
        engine = Engine(checkpoints["v0"], max_batch=1, max_len=64, prefix_mb=(blocks + 0.5) * block / 2**20)
        engine.generate([list(range(1, 60))], 1)
        assert len(engine.scheduler.prefix) == blocks * BLOCK
        assert engine.scheduler.prefix.takes_more == (blocks > 0)


# --- the spill file -------------------------------------------------------------------------------------------------


def crowded(cache, spill, numbers=range(1, 6)):
    """More prefixes than there is memory for."""
    prefixes = PrefixCache(cache, ROOM, spill)
    for number in numbers:
        prefixes.release(publish(prefixes, cache, 0, tokens(number, 4)))
    return prefixes


def test_what_has_no_memory_comes_back_from_disk(cache, tmp_path):
    prefixes = crowded(cache, spilling(cache, tmp_path, 20))
    assert (len(prefixes), prefixes.on_disk) == (ROOM * BLOCK, 12 * BLOCK)
    assert [restored(prefixes, cache, 0, tokens(n, 4)) for n in range(1, 6)] == [4 * BLOCK] * 5
    prefixes.release(publish(prefixes, cache, 0, tokens(1, 5)))
    assert restored(prefixes, cache, 0, tokens(1, 5)) == 5 * BLOCK
    whole(prefixes)
    assert os.listdir(tmp_path) == [], "the file has no name"


def test_a_small_file_keeps_what_was_used_last(cache, tmp_path):
    prefixes = crowded(cache, spilling(cache, tmp_path, 4))
    assert [len(prefixes.match(0, tokens(n, 4))) for n in range(1, 6)] == [0, 0, 4, 4, 4]
    whole(prefixes)


def test_a_block_whose_own_page_makes_room_is_a_miss(cache, tmp_path):
    prefixes = crowded(cache, spilling(cache, tmp_path, 1), (1, 2))
    prefixes.release(publish(prefixes, cache, 0, tokens(3, 1)))
    assert prefixes.on_disk == BLOCK and restored(prefixes, cache, 0, tokens(1, 4)) == 3 * BLOCK
    whole(prefixes)


def failing(spill, kind):
    """Do to the open file what a disk can do."""
    if kind == "full":
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, spill._file.fileno())
        os.close(full)
    elif kind == "truncated":
        os.ftruncate(spill._file.fileno(), spill.page // 2)
    elif kind == "damaged":
        for page in range(spill.pages):
            os.pwrite(spill._file.fileno(), b"\xff\x00\xff", page * spill.page + 100)


@pytest.mark.parametrize("kind", ["truncated", "damaged", "full"])
def test_a_page_that_cannot_be_read_is_a_miss_and_ends_the_spilling(cache, tmp_path, kind):
    prefixes = crowded(cache, spilling(cache, tmp_path, 20))
    failing(prefixes.spill, kind)
    assert restored(prefixes, cache, 0, tokens(1, 4)) == 0
    assert prefixes.spill.stopped and prefixes.on_disk == 0
    assert restored(prefixes, cache, 0, tokens(5, 4)) == 4 * BLOCK, "memory goes on"
    prefixes.release(publish(prefixes, cache, 0, tokens(9, 8)))
    assert restored(prefixes, cache, 0, tokens(9, 8)) == 8 * BLOCK
    whole(prefixes)


def test_a_full_disk_while_running_ends_the_spilling(cache, tmp_path):
    prefixes = crowded(cache, spilling(cache, tmp_path, 20), range(1, 4))
    failing(prefixes.spill, "full")
    prefixes.release(publish(prefixes, cache, 0, tokens(7, 4)))
    assert "No space left" in prefixes.spill.stopped and prefixes.on_disk == 0
    assert [restored(prefixes, cache, 0, tokens(n, 4)) for n in (1, 3, 7)] == [0, 4 * BLOCK, 4 * BLOCK]
    whole(prefixes)


@pytest.mark.parametrize(
    "folder, size, message",
    [
        ("missing", 1, "No such file"),
        ("file", 1, "Not a directory"),
        ("here", 9e8, "MB are free"),
        ("/proc", 1, "cannot hold"),
        ("here", 1e-6, "less than one block"),
    ],
)
def test_a_folder_that_cannot_hold_it_is_said_at_the_start(checkpoints, tmp_path, folder, size, message):
    (tmp_path / "file").write_text("mine")
    place = tmp_path if folder == "here" else tmp_path / folder
    with pytest.raises(FullarcError, match=message) as caught:
        Engine(checkpoints["v0"], max_batch=1, max_len=64, prefix_spill=place, prefix_spill_mb=size)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prefix_mb=-1.0), "--prefix-mb -1 is no size"),
        (dict(prefix_mb=float("nan")), "--prefix-mb nan is no size"),
        (dict(prefix_mb=9e8), "no memory for"),
        (dict(prefix_spill="/tmp", prefix_spill_mb=float("inf")), "--prefix-spill-mb inf is no size"),
    ],
)
def test_sizes_that_are_none_are_said_at_the_start(checkpoints, options, message):
    with pytest.raises(FullarcError, match=message):
        Engine(checkpoints["v0"], max_batch=1, max_len=64, **options)


def test_a_bound_on_file_sizes_is_said_at_the_start(tmp_path):
    """The reservation itself fails, after there seemed to be room (here by the process's own limit)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, old[1]))
    try:
        with pytest.raises(FullarcError, match="File too large"):
            SpillFile(tmp_path, 2**20, 2**14)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == []


def test_a_killed_process_leaves_no_file(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from fullarc.engine.spill import SpillFile\n"
        f"spill = SpillFile(Path({str(tmp_path)!r}), 2**20, 2**14); spill.write(3, memoryview(bytes(2**14)))\n"
        "print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=_env()) as process:
        assert process.stdout.readline() == b"open\n"
        assert os.listdir(tmp_path) == []
        process.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == []


def _env():
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_an_engine_that_spills_answers_as_one_that_remembers(shaped, tmp_path):
    rng = random.Random(3)
    stems = [[rng.randrange(1, 90) for _ in range(90)] for _ in range(3)]
    rounds = [[stem + [number] * 9 for stem in stems] for number in range(4)]
    plain = Engine(shaped[1], max_batch=2, max_len=256)
    small = Engine(shaped[1], max_batch=2, max_len=256, prefix_tokens=13 * BLOCK, prefix_spill=tmp_path,
                   prefix_spill_mb=8)  # fmt: skip
    tiny = Engine(shaped[1], max_batch=2, max_len=256, prefix_tokens=13 * BLOCK)
    cached = {"small": 0, "tiny": 0}
    for number, prompts in enumerate(rounds):
        wanted = dict(max_new_tokens=5, seed=number, stop_ids=())
        expected = plain.generate(prompts, **wanted)
        for name, engine in (("small", small), ("tiny", tiny)):
            for ours, theirs in zip(engine.generate(prompts, **wanted), expected, strict=True):
                assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)
                cached[name] += ours.cached_tokens
    assert small.scheduler.prefix.returned > 0
    assert cached["small"] >= 3 * 3 * 5 * BLOCK > cached["tiny"], (
        "every stem is found again in every later round"
    )
