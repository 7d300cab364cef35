"""The sandbox against hostile commands: the host is fine, and the caller gets a result."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fullarc.config.errors import FullarcError
from fullarc.sandbox import InfraError, Limits, Sandbox, bubblewrap
from fullarc.sandbox.bubblewrap import Bubblewrap

OUTSIDE = os.geteuid() or 65534  # who a sandboxed process is for the host; never root
COUNT_PROCESSES = "set -- /proc/[0-9]*; echo $#"


@pytest.fixture
def sandbox():
    with Sandbox.create({"a.txt": "one\n", "box/b.sh": "echo two"}) as made:
        yield made


def processes_with(marker: str) -> list[int]:
    """Host pids whose command line contains `marker` (as an own argument)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if marker.encode() in arguments:
                found.append(int(folder.name))
    return found


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_command_has_output_exit_code_and_input(sandbox):
    result = sandbox.exec("cat; ./box/b.sh; echo bad >&2; exit 7", stdin=b"zero\n")
    assert (result.stdout, result.stderr, result.exit_code) == ("zero\ntwo\n", "bad\n", 7)
    assert not result.timed_out and not result.truncated
    assert sandbox.exec("kill -9 $$").exit_code == 137


def test_files_persist_between_commands_and_links_are_never_followed(sandbox):
    sandbox.exec("echo three > c; mkdir -p d/e; ln -s /usr/bin/env link; ln -s /usr dirlink; mkfifo pipe")
    assert sandbox.snapshot() == {"a.txt": b"one\n", "box/b.sh": b"echo two", "c": b"three\n", "d/e/": b""}
    assert sandbox.read("a.txt") == b"one\n" and sandbox.read("/work/box/b.sh") == b"echo two"
    assert sandbox.read("link") is None and sandbox.read("dirlink/bin/env") is None
    assert sandbox.read("none") is None
    with pytest.raises(FullarcError, match="could not store"):
        sandbox.write({"/usr/x": "no"})


def test_nothing_of_the_host_is_in_sight(sandbox, monkeypatch):
    visible = sandbox.exec("ls -A / /root /home /etc 2>/dev/null; env").stdout
    assert "main" not in visible and "OMP_NUM_THREADS" not in visible
    assert sorted(sandbox.exec("env").stdout.split()) == [
        "HOME=/work", "LC_ALL=C.UTF-8", "PATH=/usr/bin:/bin", "PWD=/work", "PYTHONDONTWRITEBYTECODE=1", "TZ=UTC",
    ]  # fmt: skip
    assert sandbox.exec(f"cat {__file__}").exit_code != 0
    assert sandbox.exec(COUNT_PROCESSES).stdout == "2\n"  # the server and the shell
    connect = "python3 -c 'import socket; socket.create_connection((\"1.1.1.1\", 80), 2)'"
    assert "unreachable" in sandbox.exec(connect).stderr


def test_it_is_nobody_without_powers(sandbox):
    assert sandbox.exec("id -u").stdout == "65534\n"
    assert (
        sandbox.exec("grep -E 'Cap(Eff|Prm|Amb)' /proc/self/status | grep -c 0000000000000000").stdout
        == "3\n"
    )
    for command in (
        "touch /usr/x",
        "touch /x",
        "touch /dev/x",
        "unshare -r id",
        "mount -t tmpfs x /tmp",
        "kill -9 1",
    ):
        sandbox.exec(command)
    assert sandbox.exec("unshare -r id").exit_code != 0
    assert sandbox.exec("ls /x /dev/x /usr/x 2>/dev/null").stdout == ""


def test_the_servers_capability_cannot_be_inherited(sandbox):
    assert (
        sandbox.exec("grep -c -E 'Cap(Inh|Eff|Prm|Amb):.0000000000000000$' /proc/self/status").stdout == "4\n"
    )


def test_nobody_is_root_outside(sandbox):
    """Started by root it is the user nobody, started by anyone else it is that user."""
    status = Path(f"/proc/{sandbox._process.pid}/status").read_text()
    assert "Uid:" + f"\t{OUTSIDE}" * 4 in status


def test_a_command_cannot_speak_for_the_server(sandbox):
    spoof = (
        'for fd in /proc/1/fd/*; do echo 0 > $fd; done; for i in 3 4 5 6 7 8 9; do eval "echo 0 >&$i"; done'
    )
    assert sandbox.exec(f"({spoof}) 2>/dev/null; exit 7").exit_code == 7
    for secret in ("/proc/1/mem", "/proc/1/environ", "/proc/1/maps"):
        assert "Permission denied" in sandbox.exec(f"cat {secret}").stderr
    assert "Permission denied" in sandbox.exec("ls -l /proc/1/fd").stderr


HOSTILE = {
    "fork bomb": "f() { f | f & }; f; sleep 0.2",
    "endless output": "yes",
    "endless errors": "yes >&2",
    "sleep forever": "sleep 1000000",
    "ignore signals": "trap '' TERM INT HUP; while :; do :; done",
    "kill everything": "kill -9 -1; python3 -c 'import os; os.kill(-1, 9)'",
    "stop the server": "kill -STOP 1; kill -9 1",
    "close everything": "exec 0<&- 1>&- 2>&-; sleep 1000000",
    "own session": "setsid sleep 1000000 & exit 0",
    "fill the disk": "for d in /work /tmp /dev/shm; do cat /dev/zero > $d/x; done",
    "fill the disk with names": 'python3 -c \'while 1: open(str(__import__("time").time_ns()), "w")\'',
    "eat memory": "python3 -c 'x = [bytes(1 << 26) for _ in range(10 ** 6)]'",
    "deep folders": 'python3 -c \'import os\nwhile 1: os.mkdir("d"); os.chdir("d")\'',
    "no permissions": "echo x > y; chmod 0 y .",
}


@pytest.mark.parametrize("command", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_command_yields_a_result_and_leaves_the_sandbox_usable(sandbox, command):
    begin = time.monotonic()
    result = sandbox.exec(command, timeout=0.5)
    assert time.monotonic() - begin < 8
    assert result.exit_code >= 0 and len(result.stdout) <= 1 << 20
    assert sandbox.exec("chmod 755 /work; echo ok").stdout == "ok\n"
    assert sandbox.exec(COUNT_PROCESSES).stdout == "2\n"  # nothing was left running
    assert isinstance(sandbox.snapshot(), dict)


def test_a_refilled_sandbox_is_as_if_it_were_new(sandbox):
    sandbox.exec(
        "ln -s / root; ln -s none dangling; mkfifo pipe; mkdir -p d/e; touch .hidden 'a\nb' \"$(printf '\\377')\""
    )
    sandbox.exec("echo x > locked; chmod 0 locked; mkdir -m 300 unreadable; rmdir unreadable")
    sandbox.exec("for d in /tmp /logs /tests /dev/shm; do mkdir -p $d/x/y; echo z > $d/x/y/z; done")
    sandbox.refill({"b/c": "new", "/tests/t": "t"})
    assert sandbox.snapshot() == {"b/c": b"new"} and sandbox.snapshot("/tests") == {"t": b"t"}
    assert sandbox.exec("find /work /tmp /logs /tests /dev/shm -mindepth 1 | wc -l").stdout == "3\n"
    assert sandbox.exec("ls -d /usr /bin /app/b").exit_code == 0


UNDELETABLE = {
    "locked": "mkdir d; touch d/x; chmod 500 d",
    "too deep": HOSTILE["deep folders"],
    "a locked folder of ours": "touch /logs/x; chmod 0 /logs",
}


@pytest.mark.parametrize("command", UNDELETABLE.values(), ids=UNDELETABLE)
def test_what_cannot_be_refilled_says_so(sandbox, command):
    sandbox.exec(command, timeout=0.5)
    with pytest.raises(InfraError, match="filled anew"):
        sandbox.refill({})


def test_a_refill_that_does_not_fit_says_so(sandbox):
    with pytest.raises(InfraError, match="filled anew"):
        sandbox.refill({"a": bytes(17 << 20)})
    with Sandbox.create(backend="unsafe-local") as local, pytest.raises(InfraError, match="filled anew"):
        local.refill({})


def test_endless_output_is_cut_and_a_timeout_is_said(sandbox):
    flood = sandbox.exec("yes")
    assert flood.truncated and len(flood.stdout) == 1 << 20 and not flood.timed_out
    late = sandbox.exec("echo early; sleep 1000", timeout=0.2)
    assert late.timed_out and late.stdout == "early\n" and late.exit_code == 137


def test_other_processes_of_the_same_user_survive(sandbox):
    canary = subprocess.Popen(["sleep", "60"], user=OUTSIDE if os.geteuid() == 0 else None)
    assert Path(f"/proc/{canary.pid}").stat().st_uid == OUTSIDE
    try:
        for command in ("kill -9 -1", "python3 -c 'import os; os.kill(-1, 9)'", f"kill -9 {canary.pid}"):
            sandbox.exec(command)
        sandbox.close()
        time.sleep(0.05)
        assert canary.poll() is None
    finally:
        canary.kill()
        canary.wait()


def test_limits_hold():
    with Sandbox.create(
        limits=Limits(processes=4, disk_mb=1, memory_mb=64, output_bytes=100, cpu_s=1)
    ) as small:
        assert "Cannot fork" in small.exec("for i in 1 2 3 4 5 6; do sleep 1 & done").stderr
        small.exec("cat /dev/zero > big")
        assert 0 < len(small.read("big")) <= 1 << 20
        small.exec("rm big; for i in 1 2 3; do head -c 900000 /dev/zero > $i; done")
        assert 0 < sum(map(len, small.snapshot().values())) <= 1 << 20
        assert small.exec("python3 -c 'bytes(1 << 28)' 2>&1 | tail -n 1").stdout == "MemoryError\n"
        assert small.exec("seq 1000").truncated
        assert not small.exec("while :; do :; done", timeout=9).timed_out


def test_closing_gives_every_descriptor_back():
    Sandbox.create().close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Sandbox.create({"a": "b"}) as made:
            made.exec("cat a")
            made.snapshot()
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_ends_the_whole_tree():
    made = Sandbox.create()
    thread = threading.Thread(target=lambda: pytest.raises(InfraError, made.exec, "sleep 76543.21"))
    thread.start()
    assert wait_until(lambda: processes_with("76543.21"))
    made.close()
    made.close()
    thread.join()
    assert wait_until(lambda: not processes_with("76543.21"))
    with pytest.raises(InfraError, match="closed"):
        made.exec("true")


def test_a_killed_host_leaves_nothing_behind():
    code = "from fullarc.sandbox import Sandbox; Sandbox.create().exec('sleep 87654.32', timeout=99)"
    host = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "src"})
    try:
        assert wait_until(lambda: processes_with("87654.32"), 20)
    finally:
        host.send_signal(signal.SIGKILL)
        host.wait()
    assert wait_until(lambda: not processes_with("87654.32"))


def test_a_sandbox_outlives_the_thread_that_made_it():
    made: list[Sandbox] = []
    maker = threading.Thread(target=lambda: made.append(Sandbox.create()))
    maker.start()
    maker.join()
    time.sleep(0.05)
    assert made[0].exec("echo alive").stdout == "alive\n"
    made[0].close()


def test_many_at_once_do_not_see_each_other():
    def work(i: int) -> str:
        with Sandbox.create({"me": str(i)}) as made:
            made.exec("echo $(cat me) >> /tmp/all")
            return made.exec("cat /tmp/all; ls /work").stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(16))) == [f"{i}\nme\n" for i in range(16)]


def test_a_dead_sandbox_is_an_infrastructure_failure(sandbox):
    threading.Timer(0.2, sandbox._process.kill).start()
    with pytest.raises(InfraError, match="died"):
        sandbox.exec("sleep 5")
    with pytest.raises(InfraError, match="died"):
        sandbox.exec("true")


def test_a_missing_program_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None if name == "bwrap" else "/bin/x")
    with pytest.raises(InfraError) as caught:
        Sandbox.create()
    assert "bwrap" in caught.value.message and "apt-get install bubblewrap" in caught.value.hint


def test_a_sandbox_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(
        bubblewrap, "_command_line", lambda limits: ["sh", "-c", "echo no namespaces >&2", "sh"]
    )
    with pytest.raises(InfraError, match="no namespaces"):
        Sandbox.create()


def test_a_python_that_cannot_compile_the_server_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho no modules >&2; exit 1")
    broken.chmod(0o755)
    monkeypatch.setattr(bubblewrap, "PYTHON", str(broken))
    with pytest.raises(InfraError, match="no modules"):
        Sandbox.create()


def test_unsafe_local_needs_its_name_and_keeps_below_its_folder():
    with Sandbox.create({"a": "b"}) as made:
        assert isinstance(made, Bubblewrap)
    with pytest.raises(FullarcError, match="no sandbox"):
        Sandbox.create(backend="local")
    with Sandbox.create({"x/a": "b"}, backend="unsafe-local") as made:
        assert made.exec("cat x/a; exit 3").exit_code == 3
        assert made.exec("sleep 9", timeout=0.1).timed_out
        assert made.snapshot() == {"x/a": b"b"} and made.read("x/a") == b"b"
        for path in ("/etc/x", "../x"):
            with pytest.raises(FullarcError, match="outside"):
                made.write({path: ""})


async def test_the_async_form_is_the_same():
    made = Sandbox.create()
    assert (await made.aexec("echo hi")).stdout == "hi\n"
    await made.aclose()


@pytest.mark.alone
def test_it_is_fast():
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        made = Sandbox.create({"a": "b"})
        started = time.perf_counter()
        for _ in range(5):
            made.exec("true")
        times.append((started - begin, (time.perf_counter() - started) / 5))
        made.close()
    start, command = (min(column) for column in zip(*times, strict=True))
    assert start < 0.15 and command < 0.05  # seconds; about 0.015 and 0.003 on a quiet machine
