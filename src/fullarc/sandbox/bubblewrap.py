"""One bubblewrap per sandbox, with a command server as its process 1 (envs.md 2.2).

What is covered: no network, no host process in sight, an empty environment, /usr read-only and nothing else of the
host, four size-limited file systems in memory, no capability, no further user namespace, uid nobody inside and,
when fullarc runs as root, outside as well, and limits per process. What is not: it is the same kernel, and total
memory is bounded only by `memory_mb` x `processes` (the sandbox is first in line for the out-of-memory killer).
"""

import os
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from fullarc.config.errors import FullarcError
from fullarc.sandbox.base import WORKDIR, ExecResult, InfraError, Limits, Sandbox
from fullarc.sandbox.wire import pack, unpack

NOBODY = "65534"
WRITABLE = (WORKDIR, "/tmp", "/logs", "/tests")
MEMORY = (*WRITABLE, "/dev/shm")
PYTHON = "/usr/bin/python3"
COMPILE = (
    "import marshal, sys; marshal.dump(compile(sys.stdin.buffer.read(), 'server', 'exec'), sys.stdout.buffer)"
)
SERVE = "import marshal; exec(marshal.load(open(0, 'rb')))"
GRACE_S = 10.0  # for the machinery itself: starting, and ending a command that was told to stop
MB = 1 << 20
_NEEDS = {
    "bwrap": "Install it with: sudo apt-get install bubblewrap",
    "setpriv": "Install it with: sudo apt-get install util-linux",
    PYTHON: "Install it with: sudo apt-get install python3",
}


@cache
def _server_code(_python: int) -> bytes:
    """The server as the sandbox's Python (known by its file's time) compiles it, which takes each start 1 ms of 20."""
    here = Path(__file__).parent
    source = (here / "wire.py").read_bytes() + (here / "server.py").read_bytes()
    done = subprocess.run([PYTHON, "-I", "-S", "-c", COMPILE], input=source, capture_output=True)
    if done.returncode:
        raise InfraError(f"{PYTHON} does not work: {done.stderr.decode(errors='replace').strip()}.")
    return done.stdout


@cache
def _host_mounts() -> tuple[str, ...]:
    """/usr read-only, and /bin, /lib… as the host has them: links into /usr, or folders of their own."""
    mounts = ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            mounts += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            mounts += ["--ro-bind", str(path), str(path)]
    return tuple(mounts)


def _command_line(limits: Limits) -> list[str]:
    as_nobody = (
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []
    )
    sandbox = [
        "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
    ]
    sandbox += ["--as-pid-1", "--cap-drop", "ALL", "--cap-add", "CAP_KILL", "--uid", NOBODY, "--gid", NOBODY]
    sandbox += ["--hostname", "sandbox", *_host_mounts(), "--proc", "/proc", "--dev", "/dev"]
    for path in MEMORY:
        sandbox += ["--size", str(limits.disk_mb * MB), "--tmpfs", path]
    sandbox += ["--symlink", "work", "/app"]  # where Harbor tasks usually live
    sandbox += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORKDIR, "--clearenv"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": WORKDIR, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in environment.items():
        sandbox += ["--setenv", name, value]
    return [*as_nobody, *sandbox, "--", PYTHON, "-I", "-S", "-c", SERVE]


@cache
def _spawner(_pid: int) -> ThreadPoolExecutor:
    """The one thread that starts sandboxes: --die-with-parent means the parent *thread*, so it must live on."""
    return ThreadPoolExecutor(1, thread_name_prefix="sandbox-spawner")


class Bubblewrap(Sandbox):
    """See `Sandbox`; made by `Sandbox.create`."""

    def __init__(self, limits: Limits) -> None:
        for program, hint in _NEEDS.items():
            if shutil.which(program) is None:
                raise InfraError(f"Sandboxes need {program}, which is not installed.", hint)
        self._limits = limits
        self._busy = threading.RLock()
        self._log = os.memfd_create("bwrap-stderr")
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs:
            self._process = _spawner(os.getpid()).submit(self._spawn, theirs).result()
        try:
            self._expect_ready()
        except BaseException:
            self.close()
            raise

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        source = os.memfd_create("server")
        try:
            os.write(source, _server_code(os.stat(PYTHON).st_mtime_ns))
            os.lseek(source, 0, os.SEEK_SET)
            return subprocess.Popen(
                [*_command_line(self._limits), str(theirs.fileno())],
                stdin=source, stdout=subprocess.DEVNULL, stderr=self._log, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        finally:
            os.close(source)

    def _expect_ready(self) -> None:
        self._socket.settimeout(GRACE_S)
        try:
            greeting = self._socket.recv(16)
        except OSError:
            greeting = b""
        if greeting != b"ready\n":
            reason = os.pread(self._log, 2000, 0).decode(errors="replace").strip() or "no reason given"
            raise InfraError(
                f"bubblewrap could not start a sandbox: {reason}.",
                "Allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1).",
            )

    def _request(self, fields: list[bytes], timeout: float, cap: int) -> tuple[int, bytes, bytes, bool, bool]:
        """Send a request; (exit code, stdout, stderr, timed out, stopped for its output)."""
        with self._busy:
            return self._exchange(fields, timeout, cap)

    def _exchange(
        self, fields: list[bytes], timeout: float, cap: int
    ) -> tuple[int, bytes, bytes, bool, bool]:
        if self._socket.fileno() < 0:
            raise InfraError("The sandbox is closed.")
        memory = os.memfd_create("request")
        out, theirs_out = os.pipe()
        err, theirs_err = os.pipe()
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(pack(fields))
            os.lseek(memory, 0, os.SEEK_SET)
            socket.send_fds(self._socket, [b"R"], [memory, theirs_out, theirs_err])
        except OSError as error:
            os.close(out)
            os.close(err)
            raise InfraError(f"The sandbox died ({error.strerror}).") from None
        finally:
            for fd in (memory, theirs_out, theirs_err):
                os.close(fd)
        try:
            return self._collect(out, err, time.monotonic() + timeout, cap)
        except OSError as error:
            raise InfraError(f"The sandbox died while a command ran ({error.strerror}).") from None
        finally:
            os.close(out)
            os.close(err)

    def _collect(self, out: int, err: int, deadline: float, cap: int) -> tuple[int, bytes, bytes, bool, bool]:
        """Read both pipes until they end and the exit code is here; tell the server to stop the command if need be."""
        channel = self._socket.fileno()
        buffers: dict[int, bytearray] = {out: bytearray(), err: bytearray(), channel: bytearray()}
        poll = select.poll()
        for fd in buffers:
            poll.register(fd, select.POLLIN)
        waiting, stopped, timed_out, truncated = set(buffers), False, False, False
        while waiting:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            timed_out |= not ready and not stopped
            for fd, _ in ready:
                chunk = os.read(fd, 1 << 16)
                room = cap - len(buffers[fd])
                buffers[fd] += chunk[: max(0, room)]
                truncated |= len(chunk) > room
                if not chunk and fd == channel:
                    raise InfraError("The sandbox died while a command ran.")
                if not chunk or (fd == channel and chunk.endswith(b"\n")):
                    poll.unregister(fd)
                    waiting.discard(fd)
            if not ready and stopped:
                self.close()
                raise InfraError("The sandbox did not stop a command that ran out of time.")
            if (timed_out or truncated) and not stopped:
                stopped, deadline = True, time.monotonic() + GRACE_S
                if channel in waiting:
                    self._socket.send(b"K")
        return int(buffers[channel]), bytes(buffers[out]), bytes(buffers[err]), timed_out, truncated

    def exec(self, command: str, timeout: float | None = None, stdin: bytes = b"") -> ExecResult:
        """See `Sandbox.exec`."""
        limits = self._limits
        numbers = (limits.cpu_s, limits.memory_mb * MB, limits.processes, limits.disk_mb * MB)
        fields = [
            b"run",
            " ".join(map(str, numbers)).encode(),
            command.encode(errors="surrogateescape"),
            stdin,
        ]
        if "\0" in command or len(fields[2]) > 100_000:
            return ExecResult("", "sh: the command is not valid", 126)
        wait = limits.wall_s if timeout is None else timeout
        code, out, err, timed_out, truncated = self._request(fields, wait, limits.output_bytes)
        return ExecResult(
            out.decode(errors="replace"), err.decode(errors="replace"), code, timed_out, truncated
        )

    def write(self, files: Mapping[str, bytes | str]) -> None:
        """See `Sandbox.write`."""
        if problem := self._put([b"put"], files):
            raise FullarcError(f"The sandbox could not store the files: {problem}.")

    def refill(self, files: Mapping[str, bytes | str]) -> None:
        """See `Sandbox.refill`."""
        if problem := self._put([b"refill", pack(map(os.fsencode, MEMORY))], files):
            raise InfraError(f"The sandbox could not be filled anew: {problem}.")

    def _put(self, fields: list[bytes], files: Mapping[str, bytes | str]) -> str:
        """Send a request that ends with `files`; what the server could not do."""
        for path, content in files.items():
            fields += [os.fsencode(path), content.encode() if isinstance(content, str) else content]
        code, _, err, _, _ = self._request(fields, GRACE_S, MB)
        return (err.decode(errors="replace") or f"exit code {code}") if code else ""

    def snapshot(self, root: str = WORKDIR) -> dict[str, bytes]:
        """See `Sandbox.snapshot`; at most twice `disk_mb` are read, whatever comes after that is left out."""
        code, out, err, timed_out, truncated = self._request(
            [b"get", os.fsencode(root)], GRACE_S, 2 * self._limits.disk_mb * MB
        )
        if code and not truncated and not timed_out:
            raise InfraError(f"The sandbox could not be read: {err.decode(errors='replace')}.")
        fields = unpack(out, partial=True)
        return dict(zip(map(os.fsdecode, fields[::2]), fields[1::2], strict=False))

    def close(self) -> None:
        """See `Sandbox.close`."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        with self._busy:  # a command that still ran in another thread ends now, with an InfraError
            self._socket.close()
            if self._log >= 0:
                os.close(self._log)
                self._log = -1
