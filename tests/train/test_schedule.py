"""Learning rates by table."""

from pathlib import Path

import pytest

from fullarc.config.errors import FullarcError
from fullarc.config.recipe import load_recipe
from fullarc.config.stages import Pretrain
from fullarc.train import learning_rate
from fullarc.train.schedule import batch_size

TABLE = [
    # shape, warmup, total, {step: lr}
    ("constant", 0, 10, {0: 1.0, 5: 1.0, 9: 1.0}),
    ("constant", 4, 10, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 1.0}),
    ("linear", 0, 5, {0: 1.0, 1: 0.8, 2: 0.6, 3: 0.4, 4: 0.2}),
    ("linear", 2, 6, {0: 0.5, 1: 1.0, 2: 0.8, 5: 0.2}),
    ("cosine", 0, 5, {0: 1.0, 2: 0.6, 4: 0.2}),
    ("cosine", 3, 7, {0: 1 / 3, 2: 1.0, 4: 0.6, 6: 0.2}),
    ("cosine", 0, 5, {9: 0.2}),
    ("cosine", 0, 1, {0: 1.0}),
]


@pytest.mark.parametrize("shape, warmup, total, points", TABLE)
def test_table(shape, warmup, total, points):
    for step, expected in points.items():
        lr = learning_rate(step, peak=1.0, final=0.2, warmup=warmup, total=total, shape=shape)
        assert lr == pytest.approx(expected, abs=1e-12)


def test_unknown_shape():
    with pytest.raises(ValueError, match="cosine"):
        learning_rate(0, peak=1, final=0, warmup=0, total=1, shape="wsd")


@pytest.mark.parametrize(
    "start, full, warmup, expected",
    [
        (2, 8, 6, [2, 2, 4, 4, 6, 6, 8, 8]),
        (1, 4, 3, [1, 2, 3, 4, 4, 4, 4, 4]),
        (3, 6, 4, [3, 3, 3, 3, 6, 6, 6, 6]),
        (4, 4, 5, [4] * 8),
        (0, 4, 0, [4] * 8),
    ],
)
def test_batches_grow_in_multiples_of_the_first(start, full, warmup, expected):
    assert [batch_size(step, start=start, full=full, warmup=warmup) for step in range(8)] == expected


def test_the_batch_of_the_released_model_grows_over_500_billion_tokens_of_27_trillion():
    stage = load_recipe(Path(__file__).parents[2] / "recipes/glm5-744b.toml").recipe.stages["pretrain"]
    first, warmup = stage.batch_start_tokens // stage.seq_len, stage.batch_warmup_steps
    rows = [
        batch_size(step, start=first, full=stage.batch_rows, warmup=warmup) for step in range(stage.steps)
    ]
    assert rows[0] * stage.seq_len == 2**24 and rows[-1] * stage.seq_len == 2**26
    assert sum(rows[:warmup]) * stage.seq_len == pytest.approx(500e9, rel=1e-3)
    assert sum(rows) * stage.seq_len == pytest.approx(27e12, rel=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["batch_start_tokens=32"], "batch_start_tokens and batch_warmup_steps need each other"),
        (["batch_warmup_steps=3"], "batch_start_tokens and batch_warmup_steps need each other"),
        (
            ["batch_start_tokens=48", "batch_warmup_steps=3"],
            "48 is not a multiple of seq_len 32 that divides .* 128",
        ),
        (
            ["batch_start_tokens=96", "batch_warmup_steps=3"],
            "96 is not a multiple of seq_len 32 that divides .* 128",
        ),
        (["batch_start_tokens=256", "batch_warmup_steps=3"], "256 is not a multiple"),
        (
            ["batch_start_tokens=32", "batch_warmup_steps=3", "micro_batch_rows=2"],
            "2 does not divide the 1 rows of",
        ),
    ],
)
def test_a_warm_up_that_cannot_be_is_named(settings, message):
    common = ["size=nano", "stages.pretrain.seq_len=32", "stages.pretrain.batch_tokens=128"]
    with pytest.raises(FullarcError, match=f"stages.pretrain.*{message}"):
        load_recipe(None, [*common, *(f"stages.pretrain.{setting}" for setting in settings)])


@pytest.mark.parametrize(
    "settings, passes",
    [
        ({}, 4),
        ({"processes": 4}, 2),
        ({"micro_batch_rows": 1}, 1),
        ({"batch_start_tokens": 512, "batch_warmup_steps": 5}, 1),
        ({"batch_start_tokens": 1024, "batch_warmup_steps": 5, "processes": 2}, 2),
        ({"parallel": "pp", "processes": 2}, 1),
        ({"parallel": "cp", "processes": 4}, 4),
    ],
)
def test_a_pass_is_a_share_of_the_smallest_batch(settings, passes):
    """Eight rows of 256 tokens."""
    assert Pretrain(batch_tokens=2048, **settings).micro_rows == passes
