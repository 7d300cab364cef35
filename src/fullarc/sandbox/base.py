"""The sandbox interface: five methods, one result, one error (envs.md 2.4).

Invariants that every backend but `unsafe-local` keeps:
- a file or process of the host is never visible, touched or signalled;
- `exec` always returns within its timeout plus a bounded grace, or raises `InfraError`;
- no process outlives the command that started it, so a snapshot is never raced.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from fullarc.config.errors import FullarcError

WORKDIR = "/work"


class InfraError(FullarcError):
    """The sandbox failed, not the command in it: retry the episode, never score it."""


@dataclass(frozen=True)
class Limits:
    """What one command may use.

    Attributes:
        wall_s: seconds of wall clock, unless `exec` is given its own timeout.
        cpu_s: seconds of processor time of each process.
        memory_mb: address space of each process.
        processes: live processes in the sandbox.
        disk_mb: size of each writable file system (/work, /tmp, /logs, /tests), held in memory.
        output_bytes: standard output and error each; a command that writes more is stopped.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mb: int = 512
    processes: int = 32
    disk_mb: int = 16
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class ExecResult:
    """What a command did. `exit_code` is 128 + n after signal n; `truncated` means it was stopped for its output."""

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool = False
    truncated: bool = False


class Sandbox(ABC):
    """A private machine with /work as its working directory. Commands run one at a time."""

    @staticmethod
    def create(
        files: Mapping[str, bytes | str] | None = None,
        limits: Limits | None = None,
        backend: str = "bubblewrap",
    ) -> "Sandbox":
        """Start a sandbox holding `files` (path -> content; relative paths are below /work).

        Args:
            backend: "bubblewrap", or "unsafe-local", which isolates nothing and is for trusted commands only.

        Raises:
            InfraError: the sandbox cannot be started here; the hint says what to install.
        """
        if backend == "bubblewrap":
            from fullarc.sandbox.bubblewrap import Bubblewrap

            sandbox: Sandbox = Bubblewrap(limits or Limits())
        elif backend == "unsafe-local":
            from fullarc.sandbox.local import UnsafeLocal

            sandbox = UnsafeLocal(limits or Limits())
        else:
            raise FullarcError(f'There is no sandbox "{backend}".', 'Use "bubblewrap" (or "unsafe-local").')
        try:
            if files:
                sandbox.write(files)
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    @abstractmethod
    def exec(self, command: str, timeout: float | None = None, stdin: bytes = b"") -> ExecResult:
        """Run `sh -c command` in /work with a clean environment; `timeout` in seconds."""

    @abstractmethod
    def write(self, files: Mapping[str, bytes | str]) -> None:
        """Write files, making their folders. FullarcError if the sandbox refuses one (full, a folder in the way)."""

    def refill(self, files: Mapping[str, bytes | str]) -> None:
        """Delete all that was ever stored in the sandbox, then write `files`: as if it were new. Not every backend can.

        Raises:
            InfraError: not all could be deleted, or not all be written; it must not be used any more.
        """
        raise InfraError("This sandbox cannot be filled anew.")

    @abstractmethod
    def snapshot(self, root: str = WORKDIR) -> dict[str, bytes]:
        """All regular files below `root` by relative path, and empty folders as "name/": b"".

        Symbolic links, devices and unreadable files are left out; nothing is followed.
        """

    @abstractmethod
    def close(self) -> None:
        """End every process of the sandbox and drop its files. Safe to call twice."""

    def read(self, path: str) -> bytes | None:
        """Content of one regular file (relative to /work), or None if there is no such file."""
        folder, _, name = path.rpartition("/")
        root = folder if path.startswith("/") else f"{WORKDIR}/{folder}".rstrip("/")
        return self.snapshot(root or "/").get(name)

    async def aexec(self, command: str, timeout: float | None = None, stdin: bytes = b"") -> ExecResult:
        """`exec` for asyncio callers; runs in a thread."""
        return await asyncio.to_thread(self.exec, command, timeout, stdin)

    async def aclose(self) -> None:
        """`close` for asyncio callers."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
