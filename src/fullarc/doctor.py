"""What this machine has, what is missing, and how to get it: one sentence each."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fullarc.config.machine import machine

MEMORY_GB, DISK_GB = 6, 2


def examine() -> list[dict[str, Any]]:
    """Checks as {name, ok, required, found, fix}; `fix` is a sentence that says what to type."""
    return [_python(), _torch(), _threads(), _memory(), _disk(), _bubblewrap(), _compiler(), _chromium()]


def _check(name: str, ok: bool, found: str, fix: str, required: bool = True) -> dict[str, Any]:
    return {"name": name, "ok": ok, "required": required, "found": found, "fix": "" if ok else fix}


def _python() -> dict[str, Any]:
    found = ".".join(map(str, sys.version_info[:3]))
    return _check("python", sys.version_info >= (3, 11), f"Python {found}.", "Install Python 3.11 or newer.")


def _torch() -> dict[str, Any]:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return _check("torch", False, "torch is not installed.", "Type 'make setup'.")
    new_enough = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= (2, 13)
    return _check("torch", new_enough, f"torch {version}.", "Type 'make setup' to get torch 2.13 or newer.")


def _threads() -> dict[str, Any]:
    cores, threads = machine()["cores"], os.environ.get("OMP_NUM_THREADS", "")
    found = f"{cores} usable cores, OMP_NUM_THREADS={threads or 'not set'}."
    fix = "The trainer and the engine run side by side: expect about twice the time."
    return _check("threads", cores >= 2, found, fix, required=False)


def _memory() -> dict[str, Any]:
    memory = machine()["memory_gb"]
    if memory is None:
        return _check("memory", True, "unknown.", "", required=False)
    fix = f"recipes/laptop.toml wants {MEMORY_GB} GB; lower engine.max_batch and stages.*.micro_batch_rows."
    return _check("memory", memory >= MEMORY_GB * 0.9, f"{memory:.1f} GB.", fix, required=False)


def _disk() -> dict[str, Any]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    fix = f"A laptop run wants {DISK_GB} GB: free some, or set runs_dir to another disk."
    return _check("disk", free >= DISK_GB, f"{free:.1f} GB free here.", fix)


def _bubblewrap() -> dict[str, Any]:
    if not shutil.which("bwrap"):
        return _check(
            "bubblewrap", False, "bwrap is not installed.", "Type 'sudo apt-get install bubblewrap'."
        )
    command = ["bwrap", "--ro-bind", "/", "/", "--unshare-all", "--dev", "/dev", "--die-with-parent", "true"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        problem = result.stderr.strip() if result.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    fix = (
        "Allow unprivileged user namespaces: type 'sudo sysctl kernel.unprivileged_userns_clone=1 "
        "kernel.apparmor_restrict_unprivileged_userns=0' (in a container: run it with --privileged)."
    )
    return _check("bubblewrap", not problem, f"bwrap fails: {problem}." if problem else "bwrap works.", fix)


def _compiler() -> dict[str, Any]:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), "")
    fix = "The engine computes in torch then, several times slower: type 'sudo apt-get install gcc'."
    return _check("compiler", bool(found), f"{found}." if found else "no C compiler.", fix, required=False)


def _chromium() -> dict[str, Any]:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
        "",
    )
    fix = "Only the check of a report's looks needs it: type 'sudo apt-get install chromium'."
    return _check("chromium", bool(found), f"{found}." if found else "no Chromium.", fix, required=False)
