"""A trainer in a process of its own, rank 0 of gloo groups: opens them and broadcasts tensors, as orders on stdin say.

Groups come from torch's own functions, as frameworks call them, not from what is tested here. Orders are JSON lines;
each is answered by a line when it is done.
"""

import json
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d

WAIT = timedelta(seconds=20)
GROUPS = {}


def open_named(name, port, world_size):
    """slime's, AReaL's and OpenRLHF's way: a group beside the default one."""
    store, rank, size = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 0, world_size, timeout=WAIT))
    store.set_timeout(WAIT)
    store = dist.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(
        size, rank, [], c10d.Backend("gloo"), store, group_name=name, timeout=WAIT
    )
    c10d._world.pg_group_ranks[group] = {number: number for number in range(size)}
    GROUPS[name] = group


def open_plain(name, port, world_size):
    """The documented way."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=world_size, timeout=WAIT)
    GROUPS[name] = dist.group.WORLD


def open_trl(name, port, world_size):
    """The client of `trl vllm-serve` as it does it with XCCL: the server is rank 0, the client the last one."""
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False, timeout=WAIT)
    GROUPS[name] = c10d.ProcessGroupGloo(
        dist.PrefixStore("client2server", store), world_size - 1, world_size, WAIT
    )


def send_trl(tensor, group):
    options = c10d.BroadcastOptions()
    options.rootRank = GROUPS[group].rank()
    GROUPS[group].broadcast([tensor.contiguous()], options).wait()
    GROUPS[group].barrier().wait()


def send(tensor, group):
    dist.broadcast(tensor.contiguous(), src=0, group=GROUPS[group])


def flat(tensors):
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def send_packed(tensors, buffer, group):
    """vLLM's: a chunk is sent as soon as it is longer than the buffer."""
    chunk, size = [], 0
    for tensor in tensors:
        chunk.append(tensor)
        size += tensor.nbytes
        if size > buffer:
            send(flat(chunk), group)
            chunk, size = [], 0
    if chunk:
        send(flat(chunk), group)


def send_described(parts, group, spoil=None):
    """prime-rl's, with JSON in the place of the pickle."""
    send(torch.tensor([len(parts)]), group)
    for part in parts:
        kinds = {}
        for name, tensor in part.items():
            kinds.setdefault(str(tensor.dtype).removeprefix("torch."), []).append((name, tensor))
        described = {k: [[n, list(t.shape), t.numel()] for n, t in pairs] for k, pairs in kinds.items()}
        text = spoil or json.dumps(described).encode()
        send(torch.tensor([len(text)]), group)
        send(torch.frombuffer(bytearray(text), dtype=torch.uint8), group)
        if spoil:
            return
        for pairs in kinds.values():
            send(torch.cat([tensor.flatten() for _, tensor in pairs]), group)


def main():
    tensors = load_file(sys.argv[1])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        group, names = order.get("group"), order.get("names", sorted(tensors))
        kind = getattr(torch, order.get("dtype", "float32"))
        chosen = {name: tensors[name].to(kind) for name in names}
        match order["do"]:
            case "open":
                opens = {"plain": open_plain, "trl": open_trl}.get(order.get("way"), open_named)
                opens(group, order["port"], order.get("world_size", 2))
            case "send":
                for tensor in chosen.values():
                    send(tensor, group)
            case "trl":
                for tensor in chosen.values():
                    send_trl(tensor, group)
            case "bucket":
                send(flat(chosen.values()), group)
            case "resized":
                data = flat(chosen.values())
                send(torch.cat((data, data))[: len(data) + order["more"]], group)
            case "packed":
                send_packed(chosen.values(), order["buffer"], group)
            case "described":
                half = len(names) // 2
                parts = [{n: chosen[n] for n in some} for some in (names[:half], names[half:])]
                send_described(parts, group, bytes.fromhex(order.get("spoil", "")))
            case "die" | "stop":  # in the middle of an update
                send(next(iter(chosen.values())), group)
                os.kill(os.getpid(), signal.SIGKILL if order["do"] == "die" else signal.SIGSTOP)
            case "close":
                dist.destroy_process_group(GROUPS.pop(group))
        print(json.dumps("done"), flush=True)


if __name__ == "__main__":
    main()
