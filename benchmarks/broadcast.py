"""From the learner's `publish` to weights that N workers can use, against raw Redis and Ray's object store.

What acting needs of the models of 1.4M, 14M and 281M parameters (presets tiny, reference-small and paper, the last in
bfloat16), from this process to workers in processes of their own on this machine. In turns:

    ours-1, ours-4  from the learner's tensors, rounding included, by RedisPublisher.lend and publish, until the last
                    of 1 or 4 RedisSubscribers has handed over the snapshot
    redis           SET of the same bytes in the same chunks by redis-py here, then GET by redis-py in one other process
    ray             ray.put of the same bytes here, ray.get in one actor

Of each size there are many more rounds than versions that stay on the server, so that in most of them it has memory of
older ones to use again, as in a run; raw Redis has from its second SET of a key on.

Bytes that leave the server (INFO) are compared for 4 workers and 1. Last, the swap: a worker acts with the policy
of the size without pause while versions come as fast as they are sent; a step's pause is what `poll` and
`load_tensors` take between two steps. Beside it, steps of the same worker without versions and with them.

Goals: at most 1.3 times raw Redis for one worker; bytes independent of the number of workers.

    python -m benchmarks.broadcast [--quick] [--save]
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import redis

from benchmarks import harness
from deploy.redis_server import EmbeddedRedis
from gsa.broadcast import RedisPublisher, RedisSubscriber
from gsa.packing import pack
from gsa.schema import WeightSnapshot

State = dict[str, Any]  # name → tensor

MODELS = {"1.4M": ("tiny", False, 30), "14M": ("reference-small", False, 15), "281M": ("paper", True, 15)}
SWAP_S = {"1.4M": 6.0, "14M": 6.0, "281M": 30.0}
WORKERS = 4
WAIT_S = 60.0


def main() -> int:
    options = harness.arguments(__doc__)
    names = ["1.4M", "14M"] if options.quick else list(MODELS)
    results: dict[str, Any] = {}
    goals: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(EmbeddedRedis())
        getter = _ray_getter(stack)
        for name in names:
            size, bf16, rounds = MODELS[name]
            results[name] = _compare(server, size, bf16, 3 if options.quick else rounds, getter)
            goals[f"over_redis_{name}"] = harness.at_most(results[name]["ours_over_redis"], 1.3)
            goals[f"bytes_4_over_1_{name}"] = harness.at_most(results[name]["bytes_4_over_1"], 1.01)
        for name in names:
            size, bf16, _ = MODELS[name]
            results[name] |= _swap(server, size, bf16, 3.0 if options.quick else SWAP_S[name])
    return harness.finish("broadcast", results, goals, options)


def _compare(server: EmbeddedRedis, size: str, bf16: bool, rounds: int, getter: Any) -> dict[str, Any]:
    """One size: seconds of each rival, and bytes from the server."""
    state = acting_state(size)
    packed = pack(WeightSnapshot(0, arrays(state, bf16)))
    client = redis.Redis.from_url(server.url)
    sent: dict[str, list[int]] = {}
    with contextlib.ExitStack() as stack:
        rivals: dict[str, Callable[[], object]] = {}
        for n in (1, WORKERS):
            publisher = RedisPublisher(server.url, f"bench-{size}-{n}")
            stack.callback(publisher.close)
            followers = [stack.enter_context(_process(_follow, server.url, f"bench-{size}-{n}")) for _ in range(n)]
            rivals[f"ours-{n}"] = _counted(
                client, sent.setdefault(f"ours-{n}", []), _ours(publisher, followers, state, bf16)
            )
        other = stack.enter_context(_process(_get, server.url, len(packed.chunks)))

        def raw() -> None:
            for i, chunk in enumerate(packed.chunks):
                client.set(f"bench:{i}", chunk)  # type: ignore[arg-type]
            other.send(None)
            other.recv()

        rivals |= {"redis": raw, "ray": lambda: getter(packed.memory)}
        seconds = harness.interleaved(rivals, rounds)
    client.flushdb()  # this benchmark's own server
    client.close()
    return {
        "parameters": sum(t.numel() for t in state.values()),
        "mb": round(packed.size / 1e6, 1),
        "ms": {name: round(1e3 * float(np.median(s)), 1) for name, s in seconds.items()},
        "ours_over_redis": 1 / harness.ratio(seconds["ours-1"], seconds["redis"]),
        "ours_over_ray": 1 / harness.ratio(seconds["ours-1"], seconds["ray"]),
        "mb_sent": {name: round(float(np.median(b)) / 1e6, 2) for name, b in sent.items()},
        "bytes_4_over_1": float(np.median(sent[f"ours-{WORKERS}"]) / np.median(sent["ours-1"])),
    }


def acting_state(size: str) -> State:
    """What acting needs, as a learner has it."""
    from gsa.agent.policy import GuidedPolicy
    from gsa.agent.sizes import preset

    policy = GuidedPolicy(preset(size).world_model, preset(size).behaviour, action_dim=4)
    return dict(policy._nets.state_dict())


def arrays(state: State, bf16: bool, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """What Agent.acting_tensors makes of it."""
    from gsa.agent.storage import to_array

    return {k: to_array(v, bf16, None if out is None else out[k]) for k, v in state.items()}


def _ours(publisher: RedisPublisher, followers: list[Connection], state: State, bf16: bool) -> Callable[[], None]:
    version = 0

    def call() -> None:
        nonlocal version
        version += 1
        publisher.publish(WeightSnapshot(version, arrays(state, bf16, publisher.lend())))
        for follower in followers:
            while follower.recv() < version:
                pass

    return call


def _counted(client: redis.Redis, sent: list[int], call: Callable[[], None]) -> Callable[[], None]:
    """Notes what the server sends meanwhile, but for the first time: then connections are made."""
    calls = 0

    def counted() -> None:
        nonlocal calls
        before = _sent(client)
        call()
        if calls:
            sent.append(_sent(client) - before)
        calls += 1

    return counted


def _sent(client: redis.Redis) -> int:
    return int(client.info("stats")["total_net_output_bytes"])  # type: ignore[index]


@contextlib.contextmanager
def _process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process that runs target(connection, …); our end of the connection."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    assert ours.recv() == "ready"
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def _follow(connection: Connection, url: str, run: str) -> None:
    subscriber, version = RedisSubscriber(url, run), 0
    connection.send("ready")
    while True:
        with contextlib.suppress(Exception):
            version = subscriber.wait(version + 1, WAIT_S).version
            connection.send(version)


def _get(connection: Connection, url: str, chunks: int) -> None:
    client = redis.Redis.from_url(url)
    client.ping()
    connection.send("ready")
    while True:
        connection.recv()
        got = [client.get(f"bench:{i}") for i in range(chunks)]
        connection.send(len(got))


def _ray_getter(stack: contextlib.ExitStack) -> Callable[[np.ndarray], None]:
    import ray

    class Getter:
        def get(self, references: list[Any]) -> int:
            return len(ray.get(references[0]))

    alone = {"include_dashboard": False, "log_to_driver": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address="local", num_cpus=2, object_store_memory=3 << 30, logging_level=logging.ERROR, **alone)
    stack.callback(ray.shutdown)
    actor = ray.remote(Getter).remote()

    def get(whole: np.ndarray) -> None:
        ray.get(actor.get.remote([ray.put(whole)]))

    return get


def _swap(server: EmbeddedRedis, size: str, bf16: bool, seconds: float) -> dict[str, Any]:
    """What versions that come as fast as they are sent do to a worker's steps."""
    tensors, stop = arrays(acting_state(size), bf16), threading.Event()
    publisher = RedisPublisher(server.url, f"swap-{size}")

    def publish() -> None:
        version = 0
        while not stop.is_set():
            version += 1
            publisher.publish(WeightSnapshot(version, tensors))
            publisher.flush(WAIT_S)

    with _process(_act, server.url, f"swap-{size}", size) as worker:
        measured = {}
        for name in ("alone", "swapping"):
            if name == "swapping":
                thread = threading.Thread(target=publish)
                thread.start()
            worker.send(seconds)
            measured[name] = worker.recv()
        stop.set()
        thread.join()
    publisher.close()
    return {
        "swaps": measured["swapping"]["swaps"], "swap_ms": measured["swapping"]["pause_ms"],
        "step_ms": {name: m["step_ms"] for name, m in measured.items()},
    }  # fmt: skip


def _act(connection: Connection, url: str, run: str, size: str) -> None:
    """Acts as long as told, and says how long steps and swaps took."""
    import torch

    from gsa.agent.policy import GuidedPolicy
    from gsa.agent.sizes import preset
    from gsa.schema import Controller

    torch.set_num_threads(1)
    policy = GuidedPolicy(preset(size).world_model, preset(size).behaviour, action_dim=4)
    subscriber, rng = RedisSubscriber(url, run), np.random.default_rng(0)
    subscriber.stage = policy.stage
    image, controller = np.zeros((1, 64, 64, 3), np.uint8), np.array([Controller.POLICY], np.uint8)
    connection.send("ready")
    while True:
        end = time.monotonic() + connection.recv()
        pauses, steps = [], []
        while time.monotonic() < end:
            started = time.perf_counter()
            if (snapshot := subscriber.poll()) is not None:
                policy.load_tensors(snapshot.tensors)
                pauses.append(time.perf_counter() - started)
            began = time.perf_counter()
            policy.act({"pixels": image}, controller, [rng])
            steps.append(time.perf_counter() - began)
        connection.send({"swaps": len(pauses), "pause_ms": _spread(pauses), "step_ms": _spread(steps)})


def _spread(seconds: list[float]) -> dict[str, float]:
    points = {"median": 50, "p99": 99, "longest": 100}
    return {k: round(1e3 * float(np.percentile(seconds, p)), 2) for k, p in points.items()} if seconds else {}


if __name__ == "__main__":
    sys.exit(main())
