"""How a process starts on a machine: numpy itself says what it was told not to use."""

import os
import subprocess
import sys

import pytest

from fullarc import cli
from fullarc.config import machine


@pytest.mark.parametrize(
    "vendor, family, told", [("AuthenticAMD", "25", True), ("AuthenticAMD", "26", False), ("GenuineIntel", "6", False)]
)  # fmt: skip
def test_numpy_is_kept_off_avx512_where_its_compressing_store_is_slow(
    monkeypatch: pytest.MonkeyPatch, vendor: str, family: str, told: bool
) -> None:
    fields = {"vendor_id": vendor, "cpu family": family}
    monkeypatch.setattr(machine, "_field", lambda path, name: fields.get(name, ""))
    found = machine.environment()
    assert found["OMP_NUM_THREADS"] == "1" and ("NPY_DISABLE_CPU_FEATURES" in found) == told


def test_every_version_of_numpy_understands_it() -> None:
    """No name stops it, and what it has of AVX-512 is off."""
    code = "from numpy._core._multiarray_umath import __cpu_features__ as f; print([n for n in f if f[n]])"
    env = os.environ | {"NPY_DISABLE_CPU_FEATURES": machine.AVX512_OF_NUMPY}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "AVX512_SKX" not in out.stdout and "X86_V4" not in out.stdout and not out.stderr


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "environment", lambda: {"OMP_NUM_THREADS": "1", "FULLARC_TEST": "1"})
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("FULLARC_TEST", raising=False)
    cli.main(["explain", "seed"])
    assert os.environ["OMP_NUM_THREADS"] == "7" and os.environ.pop("FULLARC_TEST") == "1"
