"""Weights by broadcast: what a trainer announces, and the group in which the engine receives it (see `receiver`).

Invariants: every wait ends after the group's timeout; nothing larger than the model is received; a group in which
something failed is closed, and this process goes on whatever arrives.
"""

import contextlib
import ipaddress
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.engine.staging import SHARED_MEMORY, read_safetensors

WAIT_S, START_S, STOP_S = 300.0, 60.0, 5.0
Form = Literal["each", "bucket", "packed", "described"]
DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32,
                 torch.int64)
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A tensor that is to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


def specs(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], limit: int
) -> list[Spec]:
    """The tensors that a trainer announces. Raises FullarcError for what cannot be, or is more than `limit` bytes."""
    if not len(names) == len(dtypes) == len(shapes):
        raise FullarcError(
            f"{len(names)} names, {len(dtypes)} types and {len(shapes)} shapes do not fit together."
        )
    if len(set(names)) < len(names):
        raise FullarcError("A tensor is named twice.")
    found = []
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        kind = DTYPES.get(dtype.removeprefix("torch."))
        if kind is None or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise FullarcError(
                f"{name[:200]}: {dtype[:50]} {list(shape)[:8]} is no tensor that is received here.",
                f"Types are {', '.join(DTYPES)}.",
            )
        found.append(Spec(name, kind, tuple(shape)))
    if (total := sum(spec.bytes for spec in found)) > limit:
        raise FullarcError(f"{total} bytes are announced, more than this model has.", "Is it the same model?")
    return found


def is_loopback(host: str) -> bool:
    """Whether `host` means this machine and no other."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Group:
    """The engine's place in a trainer's group. `name` None: rank 0 opened a plain one. One thread at a time.

    `hosts`: the engine is rank 0 and hosts the store, and the last rank sends (TRL's way). `begun` gets the group
    before the others are waited for, and may close it.

    Raises FullarcError if the others do not come within `timeout_s`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        name: str | None = None,
        timeout_s: float = WAIT_S,
        *,
        hosts: bool = False,
        begun: Callable[["Group"], None] = lambda _: None,
    ) -> None:
        host = host.strip("[]")
        if not ((rank == 0 if hosts else rank > 0) and rank < world_size <= 2**16 and 0 < port < 2**16):
            raise FullarcError(
                f"Rank {rank} of {world_size} at port {port} is no place in a group.",
                "Rank 0 is the trainer's; engines have 1 and more.",
            )
        self.where, self.timeout_s, self._closed = f"{host}:{port}", timeout_s, False
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "fullarc.engine.receiver"], env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        begun(self)
        order = {"host": host, "port": port, "rank": rank, "world_size": world_size, "name": name}
        self._ask(
            order | {"timeout_s": timeout_s}, START_S + timeout_s,
            f"The group at {self.where} did not come together within {timeout_s:g} s",
            "All ranks must come." if hosts else "Rank 0 must host its store there, and all ranks must come.",
        )  # fmt: skip

    def receive(
        self, form: Form, found: Sequence[Spec] = (), buffer_bytes: int = 0, limit: int = 0
    ) -> dict[str, Tensor]:
        """The tensors `found` in one of the forms of `receiver`, or up to `limit` bytes of what is described there."""
        where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        file, path = tempfile.mkstemp(prefix="fullarc-transfer-", dir=where)
        os.close(file)
        try:
            named = [(spec.name, str(spec.dtype).removeprefix("torch."), spec.shape) for spec in found]
            self._ask(
                {"form": form, "specs": named, "buffer_bytes": buffer_bytes, "limit": limit, "path": path},
                self.timeout_s,
                f"The trainer at {self.where} did not send what it announced",
                "The old weights stay; open the group again.",
            )
            return read_safetensors(Path(path).read_bytes())
        finally:
            Path(path).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the group; any thread may call it, and a waiting one is told."""
        self._closed = True  # the child may take a while to die
        self._child.kill()
        threading.Thread(target=self._child.wait, daemon=True).start()  # no zombie, and nobody waits

    def _ask(self, order: dict[str, Any], timeout_s: float, failed: str, hint: str) -> None:
        """Give an order and wait for its end; what fails closes the group."""
        if self._closed or self._child.poll() is not None:
            raise FullarcError(f"The group at {self.where} is closed.", "Open it again.")
        assert self._child.stdin and self._child.stdout
        why = f"nothing came within {timeout_s:g} s"
        with contextlib.suppress(OSError):  # it has just died
            self._child.stdin.write(json.dumps(order).encode() + b"\n")
            self._child.stdin.flush()
        ready = select.poll()
        ready.register(self._child.stdout, select.POLLIN)
        end, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n") and (left := end - time.monotonic()) > 0:
            if ready.poll(left * 1000):
                part = os.read(self._child.stdout.fileno(), 2**16)
                if not part:
                    why = "another number of bytes came, or the receiver was killed"
                    break
                line += part
        if line.endswith(b"\n"):
            told = json.loads(line)
            if "error" not in told:
                return
            why = told["error"]
        self.close()
        raise FullarcError(f"{failed}: {why.rstrip('.')}.", hint)
