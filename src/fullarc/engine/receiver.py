"""A process that joins a trainer's gloo group and receives what rank 0 broadcasts: the child of `transfer.Group`.

    python -m fullarc.engine.receiver      orders on stdin, one JSON object a line; an answer a line on stdout

It is a process of its own because gloo ends the process in which more bytes arrive than were announced. The first
order joins, every other one receives tensors into a safetensors file. Three ways to join, all on a TCP store that rank
0 hosts:
    named   what RL frameworks build beside their own default group (the store's keys begin with the group's name)
    plain   rank 0 called `torch.distributed.init_process_group("gloo", "tcp://HOST:PORT", …)`
    TRL's   this process is rank 0; the last rank broadcasts, with a barrier behind every tensor
and four forms in which tensors come: one broadcast each; one buffer of bytes for all (SGLang's "flattened_bucket");
buffers of bytes that are full when they pass a size (vLLM's "packed"); and prime-rl's, where names, types and shapes
come by broadcast too. What prime-rl pickles is JSON here, and nothing is unpickled.

Invariants: no wait is longer than the group's timeout; buffers begin as NaN, so that bytes which never came are found.
"""

import json
import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.engine.transfer import Spec, is_loopback, specs

LISTEN_POLL_S = 0.05
MAX_PARTS, MAX_DESCRIPTION = 100_000, 64 * 2**20
# torch's own key prefixes: of the default group, and of the one backend that it has
_PLAIN = ("default_pg", "0/", "cpu/")
_TRL = "client2server"


class Member:
    """This process's place in the group. Raises OSError or RuntimeError if the others do not come in time."""

    def __init__(
        self, host: str, port: int, rank: int, world_size: int, name: str | None, timeout_s: float
    ) -> None:
        end, wait = time.monotonic() + timeout_s, timedelta(seconds=timeout_s)
        self._hosts, self._root = rank == 0, world_size - 1 if rank == 0 else 0
        if self._hosts:
            store: Any = _host(host, port, world_size, wait)
        else:
            _await_listener(host, port, end)
            store = dist.TCPStore(host, port, world_size, False, wait, multi_tenant=True)
        store.set_timeout(wait)
        named = _PLAIN if name is None else (name, f"{name}/", "cpu/")
        for prefix in (_TRL,) if self._hosts else named:
            store = dist.PrefixStore(prefix, store)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = wait
        local = is_loopback(host)
        options._devices = [gloo.create_device(hostname=host) if local else gloo.create_default_device()]
        self._pg: Any = gloo(store, rank, world_size, options)

    def receive(self, form: str, found: Sequence[Spec], buffer_bytes: int, limit: int) -> dict[str, Tensor]:
        """The tensors `found`, or in prime-rl's form whatever is described, up to `limit` bytes."""
        if form == "described":
            return self._described(limit)
        if form == "each":
            return {spec.name: self._take(spec.dtype, prod(spec.shape)).view(spec.shape) for spec in found}
        tensors: dict[str, Tensor] = {}
        for bunch in bunches(found, buffer_bytes if form == "packed" else limit):
            sizes = [spec.bytes for spec in bunch]
            parts = self._take(torch.uint8, sum(sizes)).split(sizes)
            # a copy each: a view of another type must begin where such a type may
            tensors |= {
                s.name: p.clone().view(s.dtype).view(s.shape) for s, p in zip(bunch, parts, strict=True)
            }
        return tensors

    def _described(self, limit: int) -> dict[str, Tensor]:
        """How many parts; of each the length of a description, the description, and per type a buffer."""
        tensors: dict[str, Tensor] = {}
        for _ in range(self._count(MAX_PARTS)):
            text = self._take(torch.uint8, self._count(MAX_DESCRIPTION))
            for dtype, found in read_description(text.numpy().tobytes(), limit).items():
                limit -= sum(spec.bytes for spec in found)
                sizes = [prod(spec.shape) for spec in found]
                parts = self._take(dtype, sum(sizes)).split(sizes)
                tensors |= {s.name: p.view(s.shape).clone() for s, p in zip(found, parts, strict=True)}
        return tensors

    def _count(self, most: int) -> int:
        count = int(self._take(torch.long, 1))
        if not 0 <= count <= most:
            raise FullarcError(f"Rank 0 announced {count} where at most {most} can be.")
        return count

    def _take(self, dtype: torch.dtype, count: int) -> Tensor:
        """The next broadcast."""
        tensor = torch.full((count * dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype)
        options = dist.BroadcastOptions()
        options.rootRank = self._root
        self._pg.broadcast([tensor], options).wait()
        if self._hosts:
            self._pg.barrier(dist.BarrierOptions()).wait()
        return tensor


def bunches(found: Sequence[Spec], buffer_bytes: int) -> Iterator[list[Spec]]:
    """Runs of tensors; one ends with the tensor that makes it larger than `buffer_bytes`."""
    bunch, size = list[Spec](), 0
    for spec in found:
        bunch.append(spec)
        size += spec.bytes
        if size > buffer_bytes:
            yield bunch
            bunch, size = [], 0
    if bunch:
        yield bunch


def read_description(text: bytes, limit: int) -> dict[torch.dtype, list[Spec]]:
    """{type: [[name, shape, count], …]} as specs per type. Raises FullarcError, also for a pickle."""
    if text[:1] == b"\x80":
        raise FullarcError("The description is a pickle, and pickles are never read.", "Send it as JSON.")
    try:
        described = json.loads(text)
        rows = [
            specs([str(n) for n, *_ in items], [dtype] * len(items), [list(s) for _, s, *_ in items], limit)
            for dtype, items in described.items()
        ]
    except FullarcError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise FullarcError("The description is not {type: [[name, shape, count], …]}.") from None
    if sum(spec.bytes for found in rows for spec in found) > limit:
        raise FullarcError("More bytes are announced than this model has.", "Is it the same model?")
    return {found[0].dtype: found for found in rows if found}


def _host(host: str, port: int, world_size: int, wait: timedelta) -> Any:
    """The store that others come to, at this address and no other, as torch's own listener would be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    return dist.TCPStore(host, port, world_size, True, wait, master_listen_fd=listener.detach())


def _await_listener(host: str, port: int, end: float) -> None:
    """Wait until something listens there; torch would print a page of C++ frames when it is late."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.01)).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(LISTEN_POLL_S)


def _read_orders(orders: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Hand on what comes by stdin; end this process, whatever it waits for, when the parent is gone."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


def _sentence(error: BaseException) -> str:
    """The first sentence of an error, without the place in gloo's sources."""
    said = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).split("\n")[0].split(". ")[0]
    return said[:300] or type(error).__name__


def _answer(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def main() -> int:
    """Join, and receive until the parent is gone or something fails."""
    torch.set_num_threads(1)
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_orders, args=(orders,), daemon=True).start()
    try:
        member = Member(**orders.get())
        _answer(ok=True)
        while True:
            order = orders.get()
            found = [Spec(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in order["specs"]]
            tensors = member.receive(order["form"], found, order["buffer_bytes"], order["limit"])
            save_file(tensors, order["path"])
            _answer(ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        _answer(error=_sentence(error))
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # gloo's threads are not waited for
