"""Other programs beside ours: each in an environment and a process of its own, measured by what it says itself.

    environments     makes the environments, in a folder that the user names; never dependencies of fullarc
    llamacpp.c .py   llama.cpp through its C API       llama.py        that process and its files
    vllm_cpu.py      vLLM                              vllm_loads.py   its loader alone
    compressors.py   llm-compressor and auto-round     to_gguf.py      checkpoints in llama.cpp's format

The scripts are run by the interpreter of their environment and import nothing of fullarc. A process answers orders, one
JSON line each, and takes its own times, so that neither pipes nor our interpreter are in them.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from fullarc.config.errors import FullarcError

QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


class Child:
    """A process that answers orders. Use it as a context manager; it ends with the block.

    Args:
        name: how errors call it.
        command: what to run.
        environment: variables beside one thread and no network.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | QUIET | dict(environment or {}),
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it may be asked."""
        return self._process.poll() is None

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """The answer to an order.

        Raises FullarcError with what the process said last if it refuses the order or dies of it.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do} | order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise FullarcError(f"{self.name} ended with {code} at the order '{do}': {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FullarcError(f"{self.name} refuses the order '{do}': {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self.alive:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):  # of an order that nobody read
                if pipe is not None:
                    pipe.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        return said[-1] if said else "it said nothing."

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
