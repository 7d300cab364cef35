"""Several processes on this machine that run one function together over gloo.

Invariant: a launch ends with all of its processes gone. The first failure of any rank becomes the launch's one
error and ends the others; a rank whose parent died ends itself, even inside a collective; no collective waits
longer than `timeout_s`. A rank that has ended waits to be killed with the others: nobody hangs up while another
still talks, and gloo, whose threads may still hold the last tensors, is not taken apart.

Ranks find each other through a file and talk over the loopback interface only. They are forked from a server that
has imported torch once, so the second launch of a process starts at once; a script that launches needs the
`if __name__ == "__main__"` that all of multiprocessing asks for.
"""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fullarc.config.errors import FullarcError
from fullarc.train.parallel.ranks import Ranks

TIMEOUT_S = 600.0


class RankFailed(FullarcError):
    """A process of the group crashed or was killed."""

    exit_code = 1


def launch(
    job: Callable[..., Any],
    size: int,
    *arguments: Any,
    hear: Callable[..., None] = lambda *_, **__: None,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """Call `job(ranks, *arguments)` in `size` new processes; returns what each returned, by rank.

    Args:
        job: a function of a module, so that a new process can import it; arguments and results are copied, and a
            result must not hold tensors (numpy arrays can).
        hear: called here with what any rank hands to `ranks.tell`.
        timeout_s: bound of every collective.

    Raises:
        FullarcError: the one that the first failing rank raised.
        RankFailed: the first failing rank crashed (its traceback is on stderr) or was killed.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["fullarc.train"])
    with tempfile.TemporaryDirectory(prefix="fullarc-ranks-") as folder:
        processes, pipes = [], []
        try:
            for rank in range(size):
                ours, theirs = context.Pipe(duplex=False)
                entry = partial(_rank, theirs, job, rank, size, Path(folder) / "store", timeout_s)
                process = context.Process(target=entry, args=arguments, name=f"rank-{rank}", daemon=True)
                process.start()
                theirs.close()  # or the end of the process would not end the pipe
                processes.append(process)
                pipes.append(ours)
            return _results(pipes, hear)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _results(pipes: Sequence[Connection], hear: Callable[..., None]) -> list[Any]:
    """One result of each rank, or the earliest error of any; passes on what they tell until then."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results])
        failures: list[tuple[float, FullarcError]] = []
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                kind, *content = pipe.recv()
            except EOFError:  # the others fail only because of it, whenever that was
                kind, content = "failed", [0.0, RankFailed(f"Rank {rank} of {len(pipes)} was killed.")]
            if kind == "told":
                values, named = content
                hear(*values, **named)
            elif kind == "failed":
                failures.append((content[0], content[1]))
            else:
                results[rank] = content[0]
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    job: Callable[..., Any],
    rank: int,
    size: int,
    store: Path,
    timeout_s: float,
    *arguments: Any,
) -> None:
    """The life of one process: join the group, do the job, say how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told to stop, and stops its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    torch.set_num_threads(1)
    ranks = Ranks(rank, size, lambda *values, **named: pipe.send(("told", values, named)))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
        end: tuple[object, ...] = ("done", job(ranks, *arguments))
    except FullarcError as raised:
        end = ("failed", time.monotonic(), raised)
    except Exception as raised:  # noqa: BLE001  (becomes the launch's error)
        traceback.print_exc(file=sys.stderr)
        error = RankFailed(f"Rank {rank} of {size} failed: {type(raised).__name__}: {raised}.")
        end = ("failed", time.monotonic(), error)
    sys.stdout.flush()
    try:
        pipe.send(end)
    except Exception as raised:  # noqa: BLE001  (what it would send cannot travel)
        said = f"Rank {rank} of {size} ended with what cannot be sent: {raised}. {end[-1]}"
        pipe.send(("failed", time.monotonic(), RankFailed(said)))
    threading.Event().wait()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
