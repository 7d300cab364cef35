"""What "trains as one process does" means for a rank's metrics and weights."""

import numpy as np
import pytest


def assert_as_one(metrics, weights, expected_metrics, expected, rel: float, atol: float) -> None:
    """Metrics and weights to the rounding of sums in another order; counts and router biases exactly."""
    for step, expected_step in zip(metrics, expected_metrics, strict=True):
        assert step["count"] == expected_step["count"] and step.keys() == expected_step.keys()
        for name in step.keys() - {"seconds"}:
            assert step[name] == pytest.approx(expected_step[name], rel=rel, abs=1e-7), name
    for name, value in weights.items():
        assert np.allclose(value, expected[name], atol=atol), name
        if name.endswith("e_score_correction_bias"):
            assert np.array_equal(value, expected[name]), name
