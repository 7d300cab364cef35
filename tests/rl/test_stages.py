"""One real RL step with real processes: what the engine computes in."""

from types import SimpleNamespace

import pytest
from rl_support import NANO, GlmMoeDsa, save_model, settings, tokenizer

from fullarc.config.context import StageContext
from fullarc.config.stages import EngineSettings, SandboxSettings, TaskSettings
from fullarc.rl.stages import engine_command, run_reasoning


@pytest.mark.slow
def test_the_engine_samples_in_the_precision_that_is_asked_for(tmp_path):
    """The trainer, which computes in fp32, sees it at the first batch."""
    config = NANO.model_copy(update={"vocab_size": tokenizer().vocab_size, "max_position_embeddings": 512})
    config = config.model_copy(update={"eos_token_id": tuple(tokenizer().stop_ids)})
    tokenizer().save(tmp_path / "tokenizer")
    model = GlmMoeDsa(config).init_weights(1)
    model.lm_head.weight.data *= 8  # as sure of itself as a trained one
    save_model(model, tmp_path / "start", tmp_path / "tokenizer")
    stage = settings(steps=1, prompts=2, group_size=2, max_new_tokens=16, max_len=400, mix={"compare": 1.0})
    logged, told = {}, {}
    for dtype in ("fp32", "fp8"):
        recipe = SimpleNamespace(
            engine=EngineSettings(dtype=dtype), sandbox=SandboxSettings(), tasks=TaskSettings(), threads=1
        )
        run = tmp_path / dtype
        ctx = StageContext(recipe, stage, "rl", run, run / "stages" / "rl", tmp_path / "start", 0)
        ctx.log = lambda _step, dtype=dtype, **metrics: logged.update({dtype: metrics})
        ctx.event = lambda kind, dtype=dtype, **_: told.setdefault(dtype, []).append(kind)
        assert engine_command(ctx)[-2:] == ["--dtype", dtype]
        run_reasoning(ctx)
    assert logged["fp32"]["parity_max"] < 1e-4 < 1e-3 < logged["fp8"]["parity_max"] < 1.0
    assert logged["fp32"]["parity_mean"] < 1e-5 < 1e-4 < logged["fp8"]["parity_mean"]
    assert "parity_broken" not in told["fp32"] and "parity_broken" in told["fp8"]
