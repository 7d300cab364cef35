"""The machine: what a figure was measured on, and how a process should start on it; nothing here imports torch."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

ZEN_4 = ("AuthenticAMD", "25")  # Zen 3 as well, which has none of it
AVX512_OF_NUMPY = "X86_V4 AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
"""All names that its versions have for it; those that one does not know it passes over."""


def machine() -> dict[str, Any]:
    """CPU model, usable cores, memory in GB, operating system, Python and torch versions."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
    }


def environment() -> dict[str, str]:
    """Variables that a process of ours should start with, before torch and numpy are imported.

    One thread a process: processes, not threads, are what runs in parallel. On Zen 4 numpy partitions without AVX-512,
    whose compressing store is microcode there: in a fifth of the time.
    """
    found = {"OMP_NUM_THREADS": "1"}
    if (_field("/proc/cpuinfo", "vendor_id"), _field("/proc/cpuinfo", "cpu family")) == ZEN_4:
        found["NPY_DISABLE_CPU_FEATURES"] = AVX512_OF_NUMPY
    return found


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _memory_gb() -> float | None:
    """Physical memory, or the container's limit where that is smaller."""
    kilobytes = _field("/proc/meminfo", "MemTotal").split(" ")[0]
    amounts = [int(kilobytes) * 1024] if kilobytes.isdigit() else []
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    if limit.isdigit():
        amounts.append(int(limit))
    return round(min(amounts) / 1e9, 1) if amounts else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
