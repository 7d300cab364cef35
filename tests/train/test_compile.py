"""Compiled layers are the plain ones up to rounding, go on to the same bits, and need a compiler."""

import shutil
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_checkpoint import kill_after, same_bits, tiny, tiny_phase
from test_compute import CHECKPOINTED, LOSS, batch, gradients, sparse_model
from torch import _inductor as inductor
from torch._dynamo.utils import counters

from fullarc.config.errors import FullarcError
from fullarc.config.stages import Compute
from fullarc.model import load_model
from fullarc.train import LmLoss, prepare, run_phase
from fullarc.train.compile import compile_layers
from fullarc.train.parallel import launch

HEADER = Path(sysconfig.get_paths()["include"]) / "Python.h"
COMPILES = pytest.mark.skipif(
    shutil.which("g++") is None or not HEADER.is_file(), reason="needs g++ and Python's header"
)


@COMPILES
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_loss_and_gradients_are_those_of_the_plain_layers():
    """Packed and plain rows, chosen keys gathered and not, an indexer that learns, layers computed again."""
    for how, isolate, topk, loss in (
        (Compute(), True, 8, LOSS),
        (Compute(), False, 192, LmLoss(mtp_steps=2)),
        (CHECKPOINTED, False, 8, LOSS),
    ):
        plain, compiled = (prepare(sparse_model(length=192, index_topk=topk), how) for _ in range(2))
        names = list(compiled.state_dict())
        compile_layers(compiled)
        assert list(compiled.state_dict()) == names
        counters.clear()
        part = batch(length=192, isolate=isolate)
        (expected, grads), (out, mine) = gradients(plain, part, loss), gradients(compiled, part, loss)
        assert counters["stats"]["unique_graphs"] >= 6, "of dense, MoE and MTP layers, around their attention"
        assert torch.allclose(out.total, expected.total, rtol=1e-6)
        assert torch.equal(out.router_load_LE, expected.router_load_LE)
        for name, grad in grads.items():
            assert mine[name] is grad is None or (mine[name] - grad).norm() <= 1e-4 * grad.norm(), name


@COMPILES
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_phase_goes_on_to_the_same_bits(make_rows, tmp_path):
    """The last passes of a step have another shape, and the one that goes on sees shapes in another order."""
    rows = make_rows(n=10)
    phase = replace(tiny_phase(rows), compile=True, batch_rows=5)
    run_phase(phase, tiny, tmp_path / "straight")
    kill_after(5, rows, tmp_path / "killed", "compile=True, batch_rows=5")
    run_phase(phase, tiny, tmp_path / "killed")
    assert same_bits(tmp_path / "straight", tmp_path / "killed")
    run_phase(replace(phase, compile=False), tiny, tmp_path / "plain")
    ours, plain = (load_model(tmp_path / name).state_dict() for name in ("straight", "plain"))
    assert all(torch.allclose(value, plain[name], atol=1e-5) for name, value in ours.items())


@COMPILES
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", ["fsdp2", "cp"])
def test_two_processes_train_as_one(make_rows, tmp_path, parallel):
    import rank_jobs

    rows = make_rows()
    rank_jobs.phase(rank_jobs.ALONE, rows, tmp_path / "one")
    launch(partial(rank_jobs.phase, parallel=parallel, compile=True), 2, rows, tmp_path / "two")
    one, two = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(two[name], value, atol=2e-5) for name, value in one.items())


@pytest.mark.parametrize("missing", ["compiler", "header"])
def test_without_a_compiler_it_is_refused_before_anything_is_written(
    make_rows, tmp_path, monkeypatch, missing
):
    says, compiler = "needs a C\\+\\+ compiler, and there is none here. Install g\\+\\+", "no-such-compiler"
    if missing == "header":
        says, compiler = f"needs Python's header, and {tmp_path}/Python.h is not there", "g++"
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    phase = replace(tiny_phase(make_rows()), compile=True)
    with inductor.config.patch({"cpp.cxx": (compiler,)}), pytest.raises(FullarcError, match=says):
        run_phase(phase, tiny, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
