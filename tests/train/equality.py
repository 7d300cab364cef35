"""What "trains as one process does" means for metrics and weights, and what a checkpoint has of the optimizer."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors import safe_open


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


def moments(folder):
    """The optimizer state of a checkpoint, put together here from every rank's file; no part is there twice."""
    parts = defaultdict(dict)
    for file in folder.glob("trainer/optimizer/*.safetensors"):
        with safe_open(file, "pt") as handle:
            offsets = json.loads(handle.metadata()["DCP_SHARDING_INFO"])
            for name in offsets:
                row, part = (*offsets[name]["saved_offsets"], 0)[0], handle.get_tensor(name)
                if part.numel():
                    assert row not in parts[name], name
                    parts[name][row] = part
    return {
        name: torch.cat([part for _, part in sorted(found.items())]) if found[0].ndim else found[0]
        for name, found in parts.items()
    }
