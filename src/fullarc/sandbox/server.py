# ruff: noqa
# mypy: ignore-errors
"""Process 1 of a sandbox: runs one request at a time for the host. Sent in as source behind `wire.py`, not imported.

A request is one byte over the socket (its fd is the argument) with three descriptors: a memory file holding the packed request, and
the write ends of the host's stdout and stderr pipes. The reply is the exit code in decimal. So what a command
prints never meets the protocol, and being process 1 of its own pid namespace makes the server immune to signals
from inside; the one capability it keeps (CAP_KILL) makes it unreadable for commands, which keep none.

Only `_socket`, `_ctypes` and builtin modules: importing more would double the start-up time.
"""

import os
import resource
import select
import stat
import sys

import _ctypes
import _socket

if os.getpid() != 1:
    raise SystemExit(
        "the sandbox server must be process 1 of its own namespace"
    )  # or kill(-1) would hit the host

CAPABILITY_VERSION, CAP_KILL = 0x20080522, 5
MAX_DEPTH = 32


def keep_capabilities_from_commands():
    """Empty the inheritable set, and with it the ambient one: then whatever is executed has no capability."""
    header = CAPABILITY_VERSION.to_bytes(4, sys.byteorder) + bytes(4)
    kill = (1 << CAP_KILL).to_bytes(4, sys.byteorder)
    sets = kill + kill + bytes(16)  # effective, permitted, inheritable; then the same for higher capabilities
    capset = _ctypes.dlsym(_ctypes.dlopen(None, 0), "capset")
    if _ctypes.call_function(capset, (header, sets)) != 0:
        raise SystemExit("the sandbox server could not keep its capability to itself")


def read_all(fd):
    chunks = []
    while chunk := os.read(fd, 1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def run(out, err, limits, command, stdin):
    cpu, memory, processes, disk = (int(x) for x in limits.split())
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    source = os.memfd_create("stdin")
    write_all(source, stdin)
    os.lseek(source, 0, os.SEEK_SET)
    os.setsid()
    for target, fd in ((0, source), (1, out), (2, err)):
        os.dup2(fd, target)
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    os.execv("/bin/sh", ["/bin/sh", "-c", command])


def put(out, err, *fields):
    for path, content in zip(fields[::2], fields[1::2]):
        folder = os.path.dirname(path.rstrip(b"/")) if not path.endswith(b"/") else path
        if folder:
            os.makedirs(folder, exist_ok=True)
        if not path.endswith(b"/"):
            fd = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755 if path.endswith(b".sh") else 0o644
            )
            write_all(fd, content)
            os.close(fd)


def empty(folder):
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            empty(entry.path)
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)


def refill(out, err, roots, *fields):
    for root in unpack(roots):
        empty(root)
    put(out, err, *fields)


def get(out, err, root):
    """Files in the order of their paths; folders deeper than MAX_DEPTH are left out."""
    pending = [(root, b"", 0)]
    while pending:
        folder, prefix, depth = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        if not entries and prefix:
            write_all(out, pack([prefix, b""]))
        for entry in entries:
            name, mode = prefix + entry.name, entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and depth < MAX_DEPTH:
                pending.append((entry.path, name + b"/", depth + 1))
            elif stat.S_ISREG(mode) and mode & stat.S_IRUSR:
                fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                write_all(out, pack([name, read_all(fd)]))
                os.close(fd)


def child(request, out, err):
    try:
        os.chmod(b"/work", 0o755)  # an earlier command may have locked itself out
        os.chdir(b"/work")
        op, *fields = unpack(read_all(request))
        {b"run": run, b"put": put, b"get": get, b"refill": refill}[op](out, err, *fields)
        os._exit(0)
    except BaseException as error:
        os.write(err, f"{type(error).__name__}: {error}".encode())
        os._exit(126)


def end_all(pid):
    """Kill and reap every other process of the namespace; the exit code of `pid` (128 + n after signal n)."""
    code = 137
    while True:
        try:
            os.kill(-1, 9)
        except ProcessLookupError:
            pass
        try:
            done, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if done == pid:
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def serve(sock):
    while True:
        data, ancillary, _, _ = sock.recvmsg(1, _socket.CMSG_SPACE(12), _socket.MSG_CMSG_CLOEXEC)
        if not data:
            return  # the host is gone; leaving ends the namespace
        if data != b"R":
            continue  # a late stop for a command that had already ended
        raw = ancillary[0][2]
        request, out, err = (int.from_bytes(raw[i : i + 4], "little") for i in (0, 4, 8))
        pid = os.fork()
        if pid == 0:
            child(request, out, err)
        for fd in (request, out, err):
            os.close(fd)
        ended = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(sock.fileno(), select.POLLIN)
        poll.poll()
        code = end_all(pid)
        os.close(ended)
        sock.send(b"%d\n" % code)


keep_capabilities_from_commands()
socket_fd = int(sys.argv[1])
os.set_inheritable(socket_fd, False)
channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, socket_fd)
channel.send(b"ready\n")
serve(channel)
