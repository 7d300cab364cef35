"""Recipes: layers and origins, sentences for mistakes, the released numbers."""

import tomllib
from pathlib import Path

import pytest

from fullarc.config.errors import FullarcError, UsageError
from fullarc.config.recipe import load_recipe, parse_override
from fullarc.config.show import describe_key, to_toml
from fullarc.config.sizes import SIZES
from fullarc.config.stages import STAGE_TYPES, Data, EngineSettings, EvalSettings, SandboxSettings

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_resolve_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    resolved = load_recipe(path)
    text = to_toml(resolved)
    assert load_recipe(write(tmp_path, text)).recipe == resolved.recipe
    assert list(resolved.recipe.stages) == resolved.recipe.arc == list(tomllib.loads(text)["stages"])


def test_the_layers_win_in_order_and_every_value_names_its_origin(tmp_path: Path) -> None:
    path = write(tmp_path, 'size = "2m"\n[stages.sft]\nsteps = 7\nlr = 0.5\n')
    resolved = load_recipe(path, ["stages.sft.lr=0.25", "seed=3", "stages.dsa.optimizer=adamw"])
    sft = resolved.recipe.stages["sft"]
    assert (sft.steps, sft.lr, resolved.recipe.seed) == (7, 0.25, 3)
    assert resolved.recipe.stages["dsa"].optimizer == "adamw"
    assert sft.seq_len == SIZES["2m"]["stages"]["sft"]["seq_len"]
    origins = resolved.origins
    assert origins["stages.sft.lr"] == "command line" and origins["stages.sft.steps"] == str(path)
    assert origins["stages.sft.seq_len"] == "size 2m" and origins["stages.sft.grad_clip"] == "default"
    assert "steps = 7" in to_toml(resolved) and f"# {path}" in to_toml(resolved)


@pytest.mark.parametrize("size", [name for name in SIZES if name != "glm5-744b"])
def test_every_size_of_the_dial_is_a_whole_arc(size: str) -> None:
    resolved = load_recipe(None, [f"size={size}"])
    assert list(resolved.recipe.stages) == list(STAGE_TYPES)
    given = {key for key, origin in resolved.origins.items() if origin == f"size {size}"}
    assert {f"stages.{name}.steps" for name in STAGE_TYPES} <= given
    assert {f"stages.{name}.lr" for name in STAGE_TYPES} <= given


def test_1m_has_a_million_parameters_and_is_trained_as_2m() -> None:
    small, usual = (load_recipe(None, [f"size={size}"]).recipe for size in ("1m", "2m"))
    assert small.model.parameter_count() == pytest.approx(1e6, rel=0.05)
    assert (small.stages, small.eval, small.tasks) == (usual.stages, usual.eval, usual.tasks)


def test_what_follows_from_the_row_length_follows(tmp_path: Path) -> None:
    longer = load_recipe(None, ["stages.pretrain.seq_len=300", "stages.midtrain.seq_len=4000"])
    assert longer.recipe.stages["pretrain"].batch_tokens % 300 == 0
    assert longer.origins["stages.pretrain.batch_tokens"] == "derived from seq_len"
    assert longer.recipe.model.max_position_embeddings == 4000
    assert longer.recipe.dense_model.index_topk == 4000 and longer.recipe.dense_model.dense_attention
    no_general = load_recipe(None, ["arc=['sft','reasoning_rl','distil']"])
    assert no_general.recipe.stages["distil"].teachers == {"reasoning": "reasoning_rl"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.sft.stpes=3"], ["command line", "stages.sft.stpes", "Did you mean stages.sft.steps?"]),
        (["sead=1"], ["sead", "Did you mean seed?"]),
        (["model.hiden_size=3"], ["Did you mean model.hidden_size?"]),
        (["evals.problems=3"], ["evals is not a setting", "Did you mean eval?"]),
        (["stages.sftt.steps=3"], ["stages.sftt", "Did you mean sft?"]),
        (["size=2n"], ["size '2n'", "command line", "Known: nano"]),
        (["arc=['sfft']"], ["'sfft'", "Did you mean sft?"]),
        (["arc=['sft','sft']"], ["twice"]),
        (["stages=3"], ["must be a table"]),
        (["stages.sft=3"], ["must be a table"]),
        (["stages.sft.steps=-1"], ["stages.sft.steps = -1", "command line", "greater than or equal to 0"]),
        (["stages.sft.lr=fast"], ["stages.sft.lr = 'fast'", "valid number"]),
        (["stages.sft.batch_tokens=100"], ["batch_tokens 100", "seq_len 1024"]),
        (["model.num_attention_heads=0"], ["model.num_attention_heads = 0"]),
        (["model.v_head_dim=64"], ["qk_nope_head_dim + qk_rope_head_dim = 32 + 16", "v_head_dim = 64"]),
        (["model.index_topk=4096"], ["model.index_topk = 4096", "max_position_embeddings = 2048 (size 2m)"]),
        (
            ["stages.midtrain.seq_len=4096", "model.max_position_embeddings=2048"],
            ["stages.midtrain.seq_len = 4096"],
        ),
        (["engine.max_len=99"], ["exceeds engine.max_len = 99"]),
        (["engine.dtype=fp16"], ["engine.dtype = 'fp16' (command line)", "'fp32', 'bf16' or 'fp8'"]),
        (
            ["engine.dtype=fp8", "engine.url=http://x"],
            ["engine.dtype = 'fp8' (command line)", "engine.url names another (command line)"],
        ),
        (
            ["stages.sft.qat_bits=4", "stages.sft.qat_group=48"],
            ["stages.sft.qat_group = 48 (command line)", "does not divide model.hidden_size = 128"],
        ),
        (
            ["stages.sft.parallel=pp", "stages.sft.processes=7"],
            ["stages.sft.processes = 7 (command line)", "model.num_hidden_layers = 4", "at most 6 stages"],
        ),
        (["stages.sft.parallel=cp", "stages.sft.processes=3"], ["seq_len 1024", "each of 3 processes"]),
        (
            ["stages.sft.parallel=cp", "stages.sft.processes=2", "model.gqa_kv_heads=2"],
            ["stages.sft.parallel = 'cp' (command line)", "model.gqa_kv_heads = 2"],
        ),
        (
            ["stages.sft.parallel=fsdp2+ep", "stages.sft.processes=3", "stages.sft.batch_tokens=6144"],
            ["stages.sft.processes = 3 (command line) does not divide model.n_routed_experts = 8"],
        ),
        (
            ["stages.sft.parallel=fsdp2", "stages.sft.processes=2", "stages.sft.batch_tokens=5120"],
            ["stages.sft", "5 rows in passes of 2", "1 of its passes over", "2 processes"],
        ),
        (
            [
                "stages.pretrain.parallel=fsdp2",
                "stages.pretrain.processes=4",
                "stages.pretrain.batch_warmup_steps=3",
                "stages.pretrain.batch_start_tokens=512",
            ],
            ["a batch of 2 rows in passes of 1 leaves 2"],
        ),
        (["stages.sft.parallel=cp+pp"], ["stages.sft.parallel = 'cp+pp' (command line)", "'zero1', 'fsdp2'"]),
        (["stages.agentic_rl.eta=20"], ["eta 20 > tau 16"]),
        (["stages.reasoning_rl.max_new_tokens=5000"], ["leaves no room"]),
        (["stages.distil.teachers.code=dsaa"], ["teachers.code = 'dsaa'", "not an earlier stage"]),
        (["name=../up"], ["name = '../up'"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(FullarcError) as error:
        load_recipe(None, overrides)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value) and error.value.exit_code == 3


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FullarcError, match=r"r\.toml: stages\.sft\.stepz"):
        load_recipe(write(tmp_path, "[stages.sft]\nstepz = 1\n"))
    with pytest.raises(FullarcError, match="not valid TOML"):
        load_recipe(write(tmp_path, "a = = 1"))
    with pytest.raises(FullarcError, match="cannot read recipe"):
        load_recipe(tmp_path / "absent.toml")


def test_overrides_are_toml_values_or_bare_words() -> None:
    assert parse_override("a.b=1e-3") == (["a", "b"], 1e-3)
    assert parse_override("a=[1, 2]") == (["a"], [1, 2])
    assert parse_override("a=true") == (["a"], True)
    assert parse_override("a-b=some/path.txt") == (["a_b"], "some/path.txt")
    for wrong in ("a", "=1", "a..b=1", "a=[1", "a={"):
        with pytest.raises(UsageError):
            parse_override(wrong)


def test_every_setting_says_what_it_means() -> None:
    for cls in (*STAGE_TYPES.values(), Data, EngineSettings, SandboxSettings, EvalSettings):
        for name, field in cls.model_fields.items():
            assert field.description or name == "type", f"{cls.__name__}.{name}"
    assert (
        describe_key("stages.sft.lr")
        and describe_key("engine.dtype")
        and describe_key("seed")
        and not describe_key("stages.sft.nope")
    )


def test_minimal_recipes_are_short() -> None:
    for path in RECIPES:
        if path.stem in ("smoke", "laptop"):
            assert len(path.read_text().splitlines()) <= 15


def test_the_744b_recipe_is_the_released_model_to_the_number() -> None:
    # transformers' defaults of glm_moe_dsa are the released configuration, written down by someone else
    config = pytest.importorskip("transformers").GlmMoeDsaConfig()
    recipe = load_recipe(next(p for p in RECIPES if p.stem == "glm5-744b")).recipe
    same = [key for key in type(recipe.model).model_fields if hasattr(config, key)]
    different = {key: (getattr(recipe.model, key), getattr(config, key)) for key in same}
    different = {key: pair for key, pair in different.items() if pair[0] != pair[1] and pair[1] is not None}
    assert set(different) <= {"eos_token_id", "pad_token_id", "indexer_types"} and len(same) > 20, different
    ours = ["full" if recipe.model.has_indexer(layer) else "shared" for layer in range(78)]
    assert ours == config.indexer_types
    assert 743e9 < recipe.model.parameter_count() < 745e9
