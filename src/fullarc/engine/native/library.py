"""The C sources of this folder, compiled for this machine's processor on first use, and their entry points.

Nothing is installed: `cc` makes a shared library in the user's cache folder, under a name that says what it was made
of (sources, flags, compiler, processor), so another processor or version never finds the wrong one. It is written
beside its place and renamed, so that processes which start together may all compile, and all find a whole one.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fullarc.config.errors import FullarcError

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")
PROCESSOR = "native"
THREADS = "-fopenmp"
LIMIT_S = 300


class Unavailable(FullarcError):
    """The kernels cannot be had on this machine; the message says why and what to install."""


@functools.cache
def library(processor: str = PROCESSOR) -> ctypes.CDLL:
    """The kernels, compiled for this processor (or for `processor`, in gcc's words). Raises Unavailable."""
    built = ctypes.CDLL(str(_build(processor)))
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    built.fullarc_room.restype = int64
    built.fullarc_room.argtypes = [pointer, int32, int64, int32]
    built.fullarc_forward.restype = None
    built.fullarc_forward.argtypes = [pointer, pointer, int32, *[pointer] * 4, int32, *[pointer] * 4]
    built.fullarc_product.restype = None
    built.fullarc_product.argtypes = [pointer, pointer, int64, int32, int32, pointer, pointer]
    built.fullarc_choose.restype = None
    built.fullarc_choose.argtypes = [pointer, int32, int32, pointer, pointer]
    built.fullarc_logprobs.restype = None
    built.fullarc_logprobs.argtypes = [pointer, int64, int32, int32, *[pointer] * 3]
    built.fullarc_draft.restype = None
    built.fullarc_draft.argtypes = [
        pointer,
        pointer,
        int32,
        int32,
        *[pointer] * 6,
        int32,
        ctypes.c_float,
        int32,
        *[pointer] * 3,
    ]
    built.fullarc_sample.restype = None
    built.fullarc_sample.argtypes = [pointer, int64, pointer, int64, int32, int32, *[pointer] * 6]
    built.fullarc_truncate.restype = None
    built.fullarc_truncate.argtypes = [pointer, int64, int32, int32, *[pointer] * 5]
    built.fullarc_likeliest.restype = None
    built.fullarc_likeliest.argtypes = [pointer, int64, int32, int32, pointer, pointer, int32, *[pointer] * 3]
    built.fullarc_penalise.restype = None
    built.fullarc_penalise.argtypes = [pointer, int64, int32, *[pointer] * 6]
    built.fullarc_uniform.restype = None
    built.fullarc_uniform.argtypes = [int32, pointer, pointer, pointer]
    return built


def available() -> bool:
    """Whether the kernels can be used here; compiles them if that has not been done."""
    try:
        library()
    except Unavailable:
        return False
    return True


def _build(processor: str) -> Path:
    compiler, flags = _compiler(), (*FLAGS, f"-march={processor}")
    sources = sorted(SOURCES.glob("*.[ch]"))
    made_of = [path.read_bytes() for path in sources]
    made_of += [" ".join((*flags, THREADS)).encode(), _version(compiler), _processor()]
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
    folder = _folder()
    target = folder / f"engine-{name}.so"
    if target.is_file():
        return target
    handle, beside = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        errors = ""
        for more in ((THREADS,), ()):  # not every clang has OpenMP
            command = [compiler, *flags, *more, "-o", beside, str(SOURCES / "core.c"), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            if result.returncode == 0:
                os.replace(beside, target)
                return target
            errors = errors or result.stderr
        raise Unavailable(
            f"{compiler} cannot compile the engine's kernels: {' '.join(errors.split())[:300]}.",
            "Install a recent gcc or clang, or start the engine with kernels='torch'.",
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{compiler} took more than {LIMIT_S} s.", "Try again.") from None
    finally:
        Path(beside).unlink(missing_ok=True)


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        if found := shutil.which(name):
            return found
    raise Unavailable(
        "There is no C compiler, and the engine compiles its kernels on first use.",
        "Type 'sudo apt-get install gcc', or start the engine with kernels='torch'.",
    )


def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=False).stdout


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted))).encode()


def _folder() -> Path:
    """Where libraries are kept: the user's cache, or a private folder for this process where that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "fullarc" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="fullarc-native-"))
