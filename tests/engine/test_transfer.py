"""Weights by collectives from a trainer in another process, as each framework's client asks for them."""

import concurrent.futures
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from running import Running, wait
from safetensors.torch import save_file

from fullarc.config.errors import FullarcError
from fullarc.engine import Engine, receiver, transfer
from fullarc.model import load_model
from fullarc.model.checkpoint import state_to_disk

IDS = list(range(1, 40))


class Trainer:
    """The child; `tell` gives an order and waits for its end, `begin` does not wait."""

    def __init__(self, tensors: Path) -> None:
        command = [sys.executable, str(Path(__file__).parent / "trainer.py"), str(tensors)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.read() == "ready"

    def begin(self, do: str, **order: object) -> None:
        self.process.stdin.write(json.dumps({"do": do} | order) + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        return json.loads(self.process.stdout.readline())

    def tell(self, do: str, **order: object) -> None:
        self.begin(do, **order)
        assert self.read() == "done"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def tensors(checkpoints):
    return {n: t.contiguous() for n, t in state_to_disk(load_model(checkpoints["v1"])).items()}


@pytest.fixture(scope="module")
def stored(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("trainer") / "new.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def trainer(stored):
    child = Trainer(stored)
    yield child
    child.stop()


@pytest.fixture
def doomed(stored):
    child = Trainer(stored)
    yield child
    child.stop()


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        yield executor


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def post(http, path, body=None, status=200):
    answer = http.post(path, json=body or {})
    assert answer.status_code == status, answer.text
    return answer.json()


def generate(http, count=6):
    params = {"max_new_tokens": count, "sampling_seed": 1, "ignore_eos": True}
    answer = post(http, "/generate", {"input_ids": IDS, "sampling_params": params, "return_logprob": True})
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]], answer["meta_info"][
        "weight_version"
    ]


def fresh(folder, count=6):
    return Engine(folder, max_batch=1, max_len=256).generate([IDS], count, seeds=[1], stop_ids=())[0].logprobs


def announced(tensors, names=None, dtype="float32", key="dtypes"):
    names = sorted(tensors) if names is None else names
    return {
        "names": names,
        key: [dtype] * len(names),
        "shapes": [list(tensors[name].shape) for name in names],
    }


def opened(http, pool, trainer, name="slime-pp_0", path="/init_weights_update_group", port=None, **more):
    """SGLang's handshake: both sides come together."""
    port = port or free_port()
    body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2,
            "group_name": name, "backend": "gloo"} | more  # fmt: skip
    future = pool.submit(post, http, path, body)
    trainer.tell("open", group=name, port=port)
    assert future.result(20)["success"] is True


def test_slime_broadcasts_buckets_between_pause_and_continue(http, pool, trainer, tensors, checkpoints):
    opened(http, pool, trainer)
    assert generate(http) == (fresh(checkpoints["v0"]), "0")
    names = sorted(tensors)
    post(http, "/pause_generation")
    assert http.get("/flush_cache").status_code == 200
    for bucket in (names[::2], names[1::2]):
        body = announced(tensors, bucket) | {
            "group_name": "slime-pp_0",
            "flush_cache": False,
            "weight_version": "1",
        }
        future = pool.submit(post, http, "/update_weights_from_distributed", body)
        trainer.tell("send", group="slime-pp_0", names=bucket)
        assert future.result(20)["success"] is True
    post(http, "/continue_generation")
    assert generate(http) == (fresh(checkpoints["v1"]), "1")
    future = pool.submit(post, http, "/destroy_weights_update_group", {"group_name": "slime-pp_0"})
    trainer.tell("close", group="slime-pp_0")
    assert future.result(20)["success"] is True
    told = post(http, "/destroy_weights_update_group", {"group_name": "slime-pp_0"}, 400)
    assert told["success"] is False and "no group" in told["message"]


@pytest.mark.slow
def test_one_flat_bucket_in_bf16(http, pool, trainer, tensors, checkpoints):
    opened(http, pool, trainer, "buckets")
    body = announced(tensors, dtype="bfloat16") | {
        "group_name": "buckets",
        "load_format": "flattened_bucket",
    }
    future = pool.submit(post, http, "/update_weights_from_distributed", body)
    trainer.tell("bucket", group="buckets", dtype="bfloat16")
    assert future.result(20)["success"] is True
    name = "model.embed_tokens.weight"
    values = post(http, "/get_weights_by_name", {"name": name, "truncate_size": 50})
    assert values == tensors[name].bfloat16().float().flatten()[:50].tolist()


@pytest.mark.slow
def test_areal_announces_and_receives_in_two_calls(http, server, pool, trainer, tensors, checkpoints):
    opened(http, pool, trainer, "update_weight_group_0", "/areal_init_weights_update_group",
           master_port=str(port := free_port()), port=port)  # fmt: skip
    post(http, "/areal_update_weights_xccl", status=400)
    server.slow_down()
    with_running = pool.submit(generate, http, 400)
    wait(lambda: server.engine.scheduler.running)
    post(http, "/areal_pause_generation")
    assert len(with_running.result(20)[0]) < 400
    post(http, "/areal_set_update_weight_meta", announced(tensors) | {"group_name": "update_weight_group_0"})
    future = pool.submit(post, http, "/areal_update_weights_xccl")
    trainer.tell("send", group="update_weight_group_0")
    assert future.result(20)["success"] is True
    post(http, "/areal_continue_generation")
    assert generate(http) == (fresh(checkpoints["v1"]), "1")


@pytest.mark.slow
@pytest.mark.parametrize("buffer", [None, 3000, 2**30])
def test_vllms_engine_collects_until_it_is_finished(http, pool, trainer, tensors, checkpoints, buffer):
    port, names = free_port(), sorted(tensors)
    info = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    info |= {"packed": True, "packed_buffer_size_bytes": buffer} if buffer else {}
    future = pool.submit(post, http, "/init_weight_transfer_engine", {"init_info": info})
    trainer.tell("open", group="plain", port=port, way="plain")
    assert future.result(20) == {"message": "Weight transfer initialized"}
    post(http, "/start_weight_update")
    for half in (names[::2], names[1::2]):
        update = {"update_info": announced(tensors, half, key="dtype_names")}
        future = pool.submit(post, http, "/update_weights", update)
        if buffer:
            trainer.tell("packed", group="plain", names=half, buffer=buffer)
        else:
            trainer.tell("send", group="plain", names=half)
        assert future.result(20)["message"] == "Weights updated"
        assert generate(http) == (fresh(checkpoints["v0"]), "0"), "nothing changes before the end"
    post(http, "/finish_weight_update", {"weight_version": "step-7"})
    assert generate(http) == (fresh(checkpoints["v1"]), "step-7")
    post(http, "/shutdown_weight_transfer_engine")
    trainer.tell("close", group="plain")
    assert "Open it first" in post(http, "/update_weights", update, 400)["error"]["message"]


@pytest.mark.slow
def test_prime_rls_broadcaster_describes_what_it_sends(http, pool, trainer, tensors, checkpoints, tmp_path):
    port = free_port()
    body = {"host": "127.0.0.1", "port": port, "rank_offset": 0, "inference_world_size": 1, "timeout": 20,
            "quantize_in_weight_transfer": False}  # fmt: skip
    future = pool.submit(post, http, "/init_broadcaster", body)
    trainer.tell("open", group="plain", port=port, way="plain")
    assert future.result(20) == {"status": "ok"}
    http.post("/pause", params={"mode": "keep", "clear_cache": "false"})
    (tmp_path / "NCCL_READY").touch()
    future = pool.submit(post, http, "/update_weights", {"weight_dir": str(tmp_path)})
    trainer.tell("described", group="plain")
    assert future.result(20)["status"] == "ok"
    post(http, "/resume")
    assert generate(http) == (fresh(checkpoints["v1"]), "1")
    future = pool.submit(post, http, "/update_weights", {"weight_dir": None}, 400)
    trainer.tell("described", group="plain", spoil=b"\x80\x04N.".hex())
    assert "pickles are never read" in future.result(20)["error"]["message"]
    assert generate(http) == (fresh(checkpoints["v1"]), "1")
    trainer.tell("close", group="plain")
    refused = post(http, "/init_broadcaster", body | {"quantize_in_weight_transfer": True}, 400)
    assert "quantise" in refused["error"]["message"]


def trl_sends(http, trainer, tensors, names):
    """`VLLMClient.update_named_param`: the request is answered first, then the tensor is broadcast."""
    for name in names:
        body = {"name": name, "dtype": "torch.float32", "shape": list(tensors[name].shape)}
        assert "Request received" in post(http, "/update_named_param/", body)["message"]
        trainer.tell("trl", group="trl", names=[name])


def trl_opens(http, trainer):
    """`VLLMClient.init_communicator`."""
    world, port = http.get("/get_world_size/").json()["world_size"] + 1, free_port()
    body = {"host": "0.0.0.0", "port": port, "world_size": world, "client_device_uuid": "42"}
    assert "Request received" in post(http, "/init_communicator/", body)["message"]
    time.sleep(0.1)
    trainer.tell("open", group="trl", port=port, way="trl")


def update_open(http):
    """Then no other engine may come to share the requests."""
    return http.get("/model_info").json()["weight_update_open"]


def test_trls_client_sends_parameters_one_by_one(http, server, trainer, tensors, checkpoints):
    """They become one update at the end; whoever asks for tokens before it gets those of the old weights."""
    names = sorted(tensors)
    assert "No communicator" in post(http, "/update_named_param/", {"name": "a", "dtype": "torch.float32", "shape": []},
                                     400)["error"]["message"]  # fmt: skip
    trl_opens(http, trainer)
    trl_sends(http, trainer, tensors, names[:-1])
    assert generate(http) == (fresh(checkpoints["v0"]), "0"), "other routes know nothing of it yet"
    assert update_open(http)
    trl_sends(http, trainer, tensors, names[-1:])
    assert "True" in post(http, "/reset_prefix_cache/")["message"]
    assert generate(http) == (fresh(checkpoints["v1"]), "1") and not update_open(http)
    assert server.engine.scheduler.counters.weight_updates == 1
    post(http, "/reset_prefix_cache/")
    assert server.engine.scheduler.counters.weight_updates == 1
    trl_sends(http, trainer, tensors, names[:1])
    params = {"prompts": [IDS], "max_tokens": 1, "temperature": 0.0}
    scores = {"sequences": [IDS], "prompt_lengths": [1], "top_logprobs": 1}
    for path, body in (("/generate/", params), ("/get_sequence_logprobs/", scores)):
        post(http, path, body)
        assert server.engine.scheduler.version == "1", "an update that has only begun"
    post(http, "/reset_prefix_cache/")
    assert server.engine.scheduler.version == "2"
    wrong = {"name": "model.other", "dtype": "torch.float32", "shape": [32]}
    post(http, "/update_named_param/", wrong)
    trainer.tell("trl", group="trl", names=["model.norm.weight"])
    assert "no tensor model.other" in post(http, "/reset_prefix_cache/", status=400)["error"]["message"]
    for field, value in (("dtype", "torch.complex64"), ("shape", [-1]), ("shape", [2**39])):
        post(http, "/update_named_param/", wrong | {field: value}, 400)
    assert "closing" in post(http, "/close_communicator/")["message"]
    post(http, "/close_communicator/")
    assert generate(http) == (fresh(checkpoints["v1"]), "2")


@pytest.mark.parametrize("end", ["die", "close"])
def test_a_trl_client_that_breaks_off_leaves_the_old_weights(
    http, server, pool, doomed, tensors, checkpoints, end
):
    trl_opens(http, doomed)
    names = sorted(tensors)
    trl_sends(http, doomed, tensors, names[:2])
    body = {"name": names[2], "dtype": "torch.float32", "shape": list(tensors[names[2]].shape)}
    post(http, "/update_named_param/", body)
    if end == "die":
        doomed.stop()
        told = post(http, "/reset_prefix_cache/", status=400)["error"]["message"]
        assert "did not send what it announced" in told
    else:
        waits = pool.submit(post, http, "/reset_prefix_cache/", status=400)
        with pytest.raises(concurrent.futures.TimeoutError):
            waits.result(0.5)
        post(http, "/close_communicator/")
        assert "closed meanwhile" in waits.result(20)["error"]["message"]
    assert not update_open(http)
    assert "No communicator" in post(http, "/update_named_param/", body, 400)["error"]["message"]
    post(http, "/generate/", {"prompts": [IDS], "max_tokens": 1})
    assert generate(http) == (fresh(checkpoints["v0"]), "0") and server.server.service.worker.healthy


def test_what_comes_while_an_update_is_installed_belongs_to_the_next_one(
    http, server, pool, trainer, tensors, monkeypatch
):
    trl = next(e.handler.__self__ for e in server.server.endpoints if e.path == "/close_communicator/")
    staging, installing, go_on, installed = trl.updates.staging, threading.Event(), threading.Event(), []
    from_tensors = staging.from_tensors

    def held(parts, version):
        installing.set()
        assert go_on.wait(60)
        installed.append(list(parts))
        return from_tensors(parts, version)

    monkeypatch.setattr(staging, "from_tensors", held)
    trl_opens(http, trainer)
    first, second = sorted(tensors)[:2]
    for name in (first, second):
        body = {"name": name, "dtype": "torch.float32", "shape": list(tensors[name].shape)}
        post(http, "/update_named_param/", body)
        if name == first:
            ends = pool.submit(post, http, "/reset_prefix_cache/")
            wait(trl._settling.locked)
    trainer.tell("trl", group="trl", names=[first, second])
    assert installing.wait(60)
    wait(lambda: trl._work.done(), 60)
    go_on.set()
    ends.result(60)
    post(http, "/close_communicator/")
    assert installed == [[first], [second]]


@pytest.mark.parametrize("path", ["/reset_prefix_cache/", "/close_communicator/"])
def test_a_communicator_that_fails_in_any_way_can_be_opened_again(
    http, trainer, tensors, checkpoints, monkeypatch, path
):
    def full(*_):
        raise OSError(28, "No space left on device")

    name = "model.norm.weight"
    body = {"name": name, "dtype": "torch.float32", "shape": list(tensors[name].shape)}
    with monkeypatch.context() as patch:
        patch.setattr(transfer.Group, "receive", full)
        trl_opens(http, trainer)
        post(http, "/update_named_param/", body)
        time.sleep(0.5)
        assert "No space left" in post(http, path, status=400)["error"]["message"]
        post(http, path)
        assert "No communicator" in post(http, "/update_named_param/", body, 400)["error"]["message"]
    assert generate(http) == (fresh(checkpoints["v0"]), "0")
    trl_opens(http, trainer)
    trl_sends(http, trainer, tensors, sorted(tensors))
    post(http, "/reset_prefix_cache/")
    assert generate(http)[0] == fresh(checkpoints["v1"])
    post(http, "/close_communicator/")


def receivers():
    """The processes that this one has started to receive."""
    pids = {p for path in Path("/proc/self/task").glob("*/children") for p in path.read_text().split()}
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just gone
            if b"fullarc.engine.receiver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def test_communicators_that_cannot_be_are_refused(http):
    good = {"host": "0.0.0.0", "port": free_port(), "world_size": 2, "client_device_uuid": "42"}
    for change, says in (({"world_size": 3}, "not 2"), ({"host": "10.255.255.1"}, "on this machine")):
        assert says in post(http, "/init_communicator/", good | change, 400)["error"]["message"]
    before = receivers()
    for _ in range(3):  # nobody comes, and the next one does not wait for that
        post(http, "/init_communicator/", good | {"port": free_port()})
    wait(lambda: len(receivers() - before) == 1, 60)
    post(http, "/close_communicator/")
    wait(lambda: receivers() <= before, 60)
    with socket.create_server(("127.0.0.1", good["port"])):
        post(http, "/init_communicator/", good)
        assert "in use" in post(http, "/reset_prefix_cache/", status=400)["error"]["message"]


@pytest.mark.slow
def test_two_engines_in_one_group(http, server, pool, trainer, tensors, checkpoints):
    import httpx

    other = Running(checkpoints["v0"])
    try:
        with httpx.Client(base_url=other.url, timeout=60, trust_env=False) as second:
            port = free_port()
            body = {"master_address": "127.0.0.1", "master_port": port, "world_size": 3, "backend": "gloo"}
            joins = [
                pool.submit(post, client, "/init_weights_update_group", body | {"rank_offset": rank})
                for rank, client in ((1, http), (2, second))
            ]
            trainer.tell("open", group="weight_update_group", port=port, world_size=3)
            assert all(join.result(20)["success"] for join in joins)
            updates = [
                pool.submit(post, client, "/update_weights_from_distributed", announced(tensors))
                for client in (http, second)
            ]
            trainer.tell("send", group="weight_update_group")
            assert all(update.result(20)["success"] for update in updates)
            assert generate(http) == generate(second) == (fresh(checkpoints["v1"]), "1")
    finally:
        other.stop()


@pytest.mark.slow
def test_another_shape_in_the_middle_of_traffic_changes_nobody(http, pool, trainer, tensors, checkpoints):
    """It is received, so that the trainer is not left waiting, and then refused; the group stays open."""
    opened(http, pool, trainer, "shapes")
    running = pool.submit(generate, http, 200)
    body = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[8, 4]], "group_name": "shapes"}
    assert tensors["model.norm.weight"].shape == (32,)
    for change, says in (
        (body, "has shape (8, 4)"),
        (body | {"names": ["model.other"], "shapes": [[32]]}, "no tensor"),
    ):
        future = pool.submit(post, http, "/update_weights_from_distributed", change, 400)
        trainer.tell("send", group="shapes", names=["model.norm.weight"])
        assert says in future.result(20)["message"]
    assert running.result(30) == (fresh(checkpoints["v0"], 200), "0")
    future = pool.submit(
        post, http, "/update_weights_from_distributed", announced(tensors) | {"group_name": "shapes"}
    )
    trainer.tell("send", group="shapes")
    assert future.result(20)["success"] is True and generate(http)[0] == fresh(checkpoints["v1"])


@pytest.mark.slow
@pytest.mark.parametrize("more, says", [(1, "another number of bytes"), (-1, "NaN")])
def test_other_sizes_than_announced_are_found(http, server, pool, doomed, tensors, checkpoints, more, says):
    """More bytes end the receiving process, fewer leave it with what it began with; the engine goes on."""
    opened(http, pool, doomed)
    body = announced(tensors) | {"group_name": "slime-pp_0", "load_format": "flattened_bucket"}
    future = pool.submit(post, http, "/update_weights_from_distributed", body, 400)
    doomed.begin("resized", group="slime-pp_0", more=more)
    assert says in future.result(20)["message"]
    assert generate(http) == (fresh(checkpoints["v0"]), "0") and server.server.service.worker.healthy
    assert not list(Path("/dev/shm").glob("fullarc-transfer-*"))


@pytest.mark.parametrize("end", ["die", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_trainer_that_breaks_off_leaves_the_old_weights(
    http, server, pool, doomed, tensors, checkpoints, monkeypatch, end
):
    """Killed, or stopped so that it sends nothing any more; requests run on meanwhile."""
    monkeypatch.setattr(transfer.Group.__init__, "__defaults__", (None, 4.0))
    opened(http, pool, doomed)
    post(http, "/begin_weight_update")
    running = pool.submit(generate, http, 200)
    future = pool.submit(
        post, http, "/update_weights_from_distributed", announced(tensors) | {"group_name": "slime-pp_0"}, 400
    )
    begin = time.monotonic()
    doomed.begin(end, group="slime-pp_0")
    told = future.result(20)
    assert time.monotonic() - begin < 15
    assert told["success"] is False and "did not send what it announced" in told["message"]
    assert running.result(20) == (fresh(checkpoints["v0"], 200), "0")
    ended = post(http, "/end_weight_update", status=400)
    assert "A part of this update failed" in ended["message"], "half an update is no update"
    again = announced(tensors) | {"group_name": "slime-pp_0"}
    assert "is closed" in post(http, "/update_weights_from_distributed", again, 400)["message"]
    assert generate(http) == (fresh(checkpoints["v0"]), "0") and server.server.service.worker.healthy


@pytest.mark.slow
def test_groups_that_cannot_be_are_refused(http, monkeypatch, pool):
    monkeypatch.setattr(transfer.Group.__init__, "__defaults__", (None, 0.5))
    good = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 2,
            "backend": "gloo"}  # fmt: skip
    for change, says in (
        ({"backend": "nccl"}, "not for CPUs"),
        ({"rank_offset": 0}, "no place"),
        ({"rank_offset": 2}, "no place"),
        ({"master_address": "10.255.255.1"}, "on this machine"),
        ({"master_address": "example.com"}, "on this machine"),
        ({}, "did not come together within 0.5 s"),
    ):
        begin = time.monotonic()
        told = post(http, "/init_weights_update_group", good | change, 400)
        assert says in told["message"] and time.monotonic() - begin < 10, change
    monkeypatch.setattr(transfer.Group.__init__, "__defaults__", (None, 3.0))
    monkeypatch.setattr("fullarc.engine.api.transfer.MAX_GROUPS", 1)
    names = ["first", "second"]
    joins = [
        pool.submit(http.post, "/init_weights_update_group", json=good | {"group_name": name})
        for name in names
    ]
    told = [join.result(20).json()["message"] for join in joins]
    assert sum("1 groups are open" in message for message in told) == 1, "waiting ones count"


def test_what_is_announced_is_checked_before_it_is_received(tensors):
    shape = [list(tensors["model.norm.weight"].shape)]
    good = ["model.norm.weight"], ["torch.float32"], shape
    assert transfer.specs(*good, 10**6)[0].bytes == 4 * shape[0][0]
    for names, dtypes, shapes in (
        (good[0] * 2, good[1] * 2, shape * 2), (good[0], good[1], []), (good[0], ["complex64"], shape),
        (good[0], good[1], [[-1]]), (good[0], good[1], [[2**50, 0]]), (good[0], good[1], [[10**5, 10**5]]),
        (good[0], good[1], [[1.5]]),
    ):  # fmt: skip
        with pytest.raises(FullarcError):
            transfer.specs(names, dtypes, shapes, 10**6)
    for text in (b"{", b"[]", b'{"float32": 3}', b'{"float32": [["a"]]}', b'{"float32": [["a", ["x"], 1]]}',
                 b'{"float32": [["a", [600000], 1]]}', b'{"float32":[["a",[9000],1]],"int8":[["b",[970000],1]]}',
                 b"[" * 100_000):  # fmt: skip
        with pytest.raises(FullarcError):
            receiver.read_description(text, 10**6)
    for text, message in ((b'{"complex64": [["a", [1], 1]]}', "a: complex64 .* is no tensor that is received here"),
                          (b'{"int8": [["a", [1], 1], ["a", [1], 1]]}', "A tensor is named twice")):  # fmt: skip
        with pytest.raises(FullarcError, match=message):
            receiver.read_description(text, 10**6)
    assert torch.float32 in receiver.read_description(b'{"float32": [["a", [3], 3]], "int8": []}', 10**6)
