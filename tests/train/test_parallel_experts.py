"""Experts on several processes are the layer that one process has."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fullarc.config.errors import FullarcError
from fullarc.train.parallel import ALONE, Ranks, launch
from fullarc.train.parallel.experts import ParallelExperts

sys.path.insert(0, str(Path(__file__).parent))  # new processes look here too
import rank_jobs as jobs

SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("favourite", [-1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", SIZES)
def test_the_layer_is_the_local_one(config, size, favourite):
    """Outputs and input gradients to the bit, weight gradients to rounding; also when ranks get no token at all."""
    results = launch(jobs.moe_layer, size, config, favourite)
    local = [jobs.moe_layer(Ranks(rank, 1), config, favourite) for rank in range(size)]
    for (y, dx, grads), (expected_y, expected_dx, expected_grads) in zip(results, local, strict=True):
        assert np.array_equal(y, expected_y)
        assert np.array_equal(dx, expected_dx)
        assert np.array_equal(grads["gate.weight"], expected_grads["gate.weight"])
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        divided = np.concatenate([grads[name] for _, _, grads in results])
        whole = sum(grads[name] for _, _, grads in local)
        assert np.allclose(divided, whole, rtol=1e-5, atol=1e-6), name
        assert np.abs(whole).max() > 1e-3
    if favourite >= 0 and size == 4:  # two ranks have no token, or this shows nothing
        assert sum(not grads["experts.down_proj"].any() for _, _, grads in results) == 2


@pytest.mark.slow
def test_quantised_experts_stay_quantised_when_they_are_divided(config):
    plain, local = (jobs.moe_layer(ALONE, config, -1, bits)[0] for bits in (0, 4))
    divided = launch(jobs.moe_layer, 2, config, -1, 4)[0][0]
    assert np.array_equal(divided, local) and not np.array_equal(divided, plain)


@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_of_the_whole_model_equal_one_process(config, make_rows, size):
    rows = make_rows()
    loss, expected = jobs.expert_parallel(ALONE, config, rows)
    results = launch(jobs.expert_parallel, size, config, rows)
    assert sum(part for part, _ in results) == pytest.approx(loss, rel=1e-5)
    for name, value in expected.items():
        parts = [grads[name] for _, grads in results]
        found = np.concatenate(parts) if ".experts." in name else parts[0]
        assert np.allclose(found, value, rtol=1e-4, atol=1e-5), name


def test_experts_that_cannot_be_divided_are_refused(model):
    with pytest.raises(FullarcError, match="4 experts cannot be divided evenly over 3 ranks"):
        ParallelExperts(model.layers[-1].mlp.experts, Ranks(0, 3))
