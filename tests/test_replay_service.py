"""The replay service: an exact budget whatever workers do, and a run that continues where it stood."""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gsa.errors import FormatError, SpecMismatch, Unavailable, UsageError
from gsa.schema import Lease, NoLease
from replay_service.batches import Cutter, empty_batch
from replay_service.config import ReplayConfig
from replay_service.prefetch import BUFFERS, Prefetcher
from replay_service.service import ReplayService
from retrieval.store import TrajectoryStore
from tests.broadcasting import eventually
from tests.trajectories import counting, counting_spec

SPEC = counting_spec("toy/a", 2)
OTHER = counting_spec("toy/b", 3)
CONFIG = ReplayConfig(
    batch=4, length=4, rehearsal_share=0.25, samples_per_insert=8, min_size=20, budget=200, episode_steps=10,
    warmup_steps=30, warmup_episodes=2, lease_timeout_s=60, parallel_episodes=3,
)  # fmt: skip


class Clock:
    """Time that passes when told to."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def online(tmp_path):
    with TrajectoryStore.create(tmp_path / "online") as store:
        yield store


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Ten trajectories of each of two embodiments, with rewards that nobody may see."""
    with TrajectoryStore.create(tmp_path_factory.mktemp("pool") / "store") as store:
        for i in range(20):
            spec = (SPEC, OTHER)[i % 2]
            store.append(counting(200 + i, 9, spec), spec)
        yield store


def make(online, config=CONFIG, pool=None, rows=None, **options):
    return ReplayService(config, online, SPEC, pool, rows, max_action_dim=5, **options)


def collect(service, worker="w", steps=None):
    """Collects one episode as leased, or `steps` of it."""
    lease = service.lease(worker)
    assert isinstance(lease, Lease), lease
    assert service.add(worker, lease.episode, counting(lease.episode, steps or lease.max_steps, SPEC))
    return lease


def drain_batches(service):
    batches = []
    while (batch := service.sample()) is not None:
        batches.append(batch)
    return batches


# The budget


@pytest.mark.parametrize("seed", range(8))
def test_budget_is_exact_whatever_workers_do(online, seed):
    """Workers finish, end early, die, stall beyond the timeout, and repeat themselves; learning keeps pace."""
    rng, clock = random.Random(seed), Clock()
    service = make(online, clock=clock)
    held: list[tuple[str, Lease]] = []  # what some worker believes it holds
    accepted, numbers = {}, []
    for _ in range(10_000):
        if service.complete:
            break
        worker, event = f"w{rng.randrange(4)}", rng.random()
        if event < 0.4:
            lease = service.lease(worker)
            if isinstance(lease, Lease):
                held.append((worker, lease))
                numbers.append(lease.episode)
        elif event < 0.7 and held:
            who, lease = held.pop(rng.randrange(len(held)))
            episode = counting(lease.episode, rng.choice([lease.max_steps, rng.randint(1, lease.max_steps)]), SPEC)
            stored = service.add(who, lease.episode, episode)
            if stored:
                assert lease.episode not in accepted
                accepted[lease.episode] = len(episode)
            if rng.random() < 0.3:  # the acknowledgement was lost, or the worker made it twice
                assert not service.add(who, lease.episode, episode)
                assert not service.add(who, lease.episode, counting(lease.episode, 1, SPEC))
        elif event < 0.75:
            service.release(worker)
            held = [(w, lease) for w, lease in held if w != worker or rng.random() < 0.5]  # half of it comes late
        elif event < 0.8:
            clock.now_s += rng.choice([1, 30, 100])
        else:
            service.sample()
        open_steps = service.stats()["replay/leased"]
        assert service.collected + open_steps <= CONFIG.budget
        assert service.collected == sum(accepted.values()) == online.steps
    assert service.collected == CONFIG.budget
    assert service.lease("w0") is NoLease.DONE
    assert service.stats()["replay/sampled"] == (CONFIG.budget - CONFIG.min_size) * 8 // 16 * 16
    assert numbers == sorted(set(numbers)), "an episode number was granted twice"


def test_budget_is_exact_with_threads(online):
    """Eight threads at once, one of them learning."""
    service = make(online, replace(CONFIG, parallel_episodes=7, budget=300))
    failures = []

    def work(name):
        rng = random.Random(name)
        try:
            while (lease := service.lease(name)) is not NoLease.DONE:
                if lease is NoLease.WAIT:
                    continue
                if rng.random() < 0.1:
                    service.release(name)
                    continue
                service.add(name, lease.episode, counting(lease.episode, rng.randint(1, lease.max_steps), SPEC))
        except Exception as error:
            failures.append(error)

    def learn():
        try:
            while not service.target_reached:
                service.sample()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(7)] + [threading.Thread(target=learn)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures
    assert service.collected == online.steps == 300


def test_last_episode_is_shortened_and_what_it_leaves_is_leased_again(online):
    service = make(online, replace(CONFIG, budget=25, min_size=25))
    assert [collect(service).max_steps for _ in range(2)] == [10, 10]
    last = service.lease("a")
    assert last.max_steps == 5
    assert service.lease("b") is NoLease.WAIT, "a's lease may come back"
    assert service.add("a", last.episode, counting(2, 3, SPEC))
    again = service.lease("b")
    assert (again.max_steps, again.episode, again.agent_steps) == (2, 3, 23)
    assert service.add("b", again.episode, counting(3, 2, SPEC))
    assert service.lease("b") is NoLease.DONE
    assert service.finished


def test_timed_out_lease_goes_back_and_its_episode_is_refused(online):
    clock = Clock()
    service = make(online, replace(CONFIG, budget=10, min_size=10), clock=clock)
    lost = service.lease("a")
    assert service.lease("b") is NoLease.WAIT
    clock.now_s = 60
    found = service.lease("b")
    assert found.max_steps == 10
    assert found.episode > lost.episode
    assert not service.add("a", lost.episode, counting(0, 10, SPEC))
    assert service.add("b", found.episode, counting(1, 10, SPEC))
    assert online.steps == 10


def test_timed_out_lease_is_refused_though_nobody_asked_since(online):
    clock = Clock()
    service = make(online, clock=clock)
    lease = service.lease("a")
    clock.now_s = 59.9
    assert service.lease("b").agent_steps == 10
    clock.now_s = 60
    assert not service.add("a", lease.episode, counting(0, 10, SPEC))
    assert service.stats()["replay/leased"] == 10


def test_release_gives_back_one_lease_or_all(online):
    service = make(online, replace(CONFIG, budget=30, min_size=30))
    leases = [service.lease("a"), service.lease("a"), service.lease("b")]
    assert service.lease("c") is NoLease.WAIT
    assert service.release("a", leases[2].episode) == 0, "that one is b's"
    assert service.release("a", leases[0].episode) == 1
    assert service.lease("c").max_steps == 10
    assert service.release("a") == 1
    assert service.release("a") == 0
    assert not service.add("a", leases[1].episode, counting(1, 10, SPEC))
    assert service.add("b", leases[2].episode, counting(2, 10, SPEC))


def test_what_a_worker_was_leased_and_never_heard_of_is_given_back(online):
    service = make(online, replace(CONFIG, budget=30, min_size=30))
    other, known, lost = service.lease("b"), service.lease("a", []), service.lease("a", [0, 1])
    assert service.lease("a", [known.episode, lost.episode]) is NoLease.WAIT
    again = service.lease("a", [known.episode])
    assert (again.max_steps, again.episode > lost.episode) == (10, True)
    assert not service.add("a", lost.episode, counting(0, 10, SPEC))
    for i, (worker, lease) in enumerate([("a", known), ("a", again), ("b", other)]):
        assert service.add(worker, lease.episode, counting(i, 10, SPEC))
    assert service.lease("a", []) is NoLease.DONE


def test_a_lease_lasts_while_its_worker_is_heard_of(online):
    clock = Clock()
    service = make(online, clock=clock)
    heard, silent = service.lease("a/1"), service.lease("b/1")
    for now_s in (50, 100, 150):
        clock.now_s = now_s
        service.renew(["a/1"])
    assert not service.add("b/1", silent.episode, counting(1, 10, SPEC))
    assert service.add("a/1", heard.episode, counting(0, 10, SPEC))


def test_a_worker_that_only_seemed_dead_neither_delivers_nor_keeps_what_its_successor_must_collect(online):
    """Its network was cut; on its return what it sent arrives, after its successor has begun."""
    clock = Clock()
    service = make(online, replace(CONFIG, budget=20, min_size=10), clock=clock)
    before = service.lease("a/old")
    assert service.release("a") == 1
    late = service.lease("a/old")
    assert not service.add("a/old", before.episode, counting(0, 10, SPEC))
    assert service.add("a/new", service.lease("a/new").episode, counting(1, 10, SPEC))
    assert service.lease("a/new") is NoLease.WAIT
    clock.now_s = 60
    service.renew(["a/new"])
    last = service.lease("a/new")
    assert not service.add("a/old", late.episode, counting(2, 10, SPEC))
    assert service.add("a/new", last.episode, counting(3, 10, SPEC))
    assert (service.collected, service.lease("a/old")) == (20, NoLease.DONE)
    assert service.release("a") == 0


def test_a_lease_is_its_workers_alone(online):
    service = make(online)
    lease = service.lease("a")
    assert not service.add("b", lease.episode, counting(0, 10, SPEC))
    assert not service.add("a", lease.episode + 1, counting(0, 10, SPEC))
    episode = counting(0, 10, SPEC)
    assert service.add("a", lease.episode, episode)
    again = service.lease("a")
    assert not service.add("a", again.episode, episode), "the same trajectory under another lease"
    assert (service.collected, len(online)) == (10, 1)
    assert service.add("a", again.episode, counting(1, 10, SPEC))


def test_what_does_not_fit_is_refused_and_the_lease_stays(online):
    service = make(online)
    lease = service.lease("a")
    with pytest.raises(FormatError, match="at most 10 steps, not 11"):
        service.add("a", lease.episode, counting(0, 11, SPEC))
    with pytest.raises(FormatError, match="must have a reward"):
        service.add("a", lease.episode, counting(0, 10, SPEC, with_reward=False))
    with pytest.raises(SpecMismatch):
        service.add("a", lease.episode, counting(0, 10, OTHER))
    assert (service.collected, len(online)) == (0, 0)
    assert service.add("a", lease.episode, counting(0, 10, SPEC))


def test_a_full_disk_changes_nothing(online, monkeypatch):
    service = make(online)
    lease = service.lease("a")

    def full(*_):
        raise Unavailable("No space left on device.")

    with monkeypatch.context() as patch, pytest.raises(Unavailable):
        patch.setattr(online, "append", full)
        service.add("a", lease.episode, counting(0, 10, SPEC))
    assert service.collected == 0
    assert service.add("a", lease.episode, counting(0, 10, SPEC))
    assert service.collected == 10


ADD_FOR_EVER = """
import sys
from replay_service.service import ReplayService
from tests.test_replay_service import CONFIG, SPEC, collect
from retrieval.store import TrajectoryStore
from dataclasses import replace
service = ReplayService(replace(CONFIG, budget=10**6, min_size=10**6), TrajectoryStore.create(sys.argv[1]), SPEC)
while True:
    print(collect(service).episode, flush=True)
"""


def test_acknowledged_is_durable(tmp_path):
    """The service is killed at a random moment: what it acknowledged is there, whole, and counted once."""
    process = subprocess.Popen([sys.executable, "-c", ADD_FOR_EVER, str(tmp_path / "s")], stdout=subprocess.PIPE)
    lines = [process.stdout.readline() for _ in range(random.Random().randint(3, 40))]
    process.send_signal(signal.SIGKILL)
    acknowledged = [int(line) for line in lines + process.stdout.read().splitlines()]
    process.wait()
    with TrajectoryStore.open(tmp_path / "s", write=True) as store:
        service = make(store)
        episodes, _ = service.drain_episodes()
        assert [e["episode"] for e in episodes][: len(acknowledged)] == acknowledged
        assert len(episodes) - len(acknowledged) in (0, 1)
        assert service.collected == 10 * len(store)
        for row in range(len(store)):
            np.testing.assert_array_equal(store.read(row).reward, counting(row, 10, SPEC).reward)


# Who waits


def test_collection_waits_for_the_learner_with_open_leases_counted(online):
    service = make(online, replace(CONFIG, slack=None, parallel_episodes=2, budget=1000))
    while service.collected < 20:
        collect(service)
    leases = []
    while isinstance(lease := service.lease("w"), Lease):
        leases.append(lease)
    assert len(leases) == 1  # slack is 88 replayed steps: 11 collected ones
    assert service.sample() is not None
    service.release("w")
    drain_batches(service)
    assert isinstance(service.lease("w"), Lease)
    assert isinstance(service.lease("w"), Lease)
    assert service.lease("w") is NoLease.WAIT


def test_nothing_to_learn_from_before_min_size(online):
    service = make(online)
    assert service.sample() is None
    collect(service)
    assert service.sample() is None
    collect(service)
    assert service.sample() is not None


def test_the_learner_stops_where_the_budget_is_replayed(online):
    service = make(online)
    batches = 0
    while not service.complete:
        if service.sample() is not None:
            batches += 1
        elif not service.finished:
            collect(service)
    assert batches == (200 - 20) * 8 // 16
    assert service.sample() is None


def test_a_run_is_not_complete_while_the_learner_is_ahead_of_collection(online):
    service = make(online, replace(CONFIG, slack=10_000))
    while service.collected < 20:
        collect(service)
    while service.sample() is not None:
        pass
    assert service.target_reached  # the slack let the learner take all that the budget will pay for
    assert not service.complete
    while not service.finished:
        assert not service.complete
        collect(service)
    assert service.complete


def test_warm_up_lasts_for_steps_and_episodes(online):
    def warm_episodes(config):
        service = make(online, config)
        leases = [service.lease("w") for _ in range(8)]
        service.release("w")
        return [lease.warmup for lease in leases].count(True)

    many = replace(CONFIG, min_size=200)
    assert warm_episodes(replace(many, warmup_steps=30, warmup_episodes=2)) == 3
    assert warm_episodes(replace(many, warmup_steps=30, warmup_episodes=5)) == 5
    assert warm_episodes(replace(many, warmup_steps=0, warmup_episodes=0)) == 0
    collect(make(online, many))
    assert warm_episodes(replace(many, warmup_steps=30, warmup_episodes=5)) == 4


def test_lease_says_where_the_schedule_stands(online):
    service = make(online, replace(CONFIG, min_size=200))
    assert [service.lease("w").agent_steps for _ in range(3)] == [0, 10, 20]
    service.release("w", 1)
    assert service.lease("w").agent_steps == 20


# Batches


def test_batch_has_exact_shares_and_rehearsal_has_no_reward(online, pool):
    config = replace(CONFIG, batch=16, length=8, rehearsal_share=0.25, samples_per_insert=256)
    rows = np.array([1, 4, 7, 8])
    service = make(online, config, pool, rows)
    for _ in range(3):
        collect(service)
    batches = drain_batches(service)
    assert len(batches) > 10
    for batch in batches:
        assert [r.store for r in batch.refs] == ["online"] * 12 + ["pool"] * 4
        assert {r.trajectory for r in batch.refs[12:]} <= set(rows.tolist())
        assert not batch.reward[12:].any()
        assert not batch.reward_mask[12:].any()
        for b, ref in enumerate(batch.refs[:12]):
            n = len(ref)
            caused = [0.0] * (ref.start == 0) + [1000 * ref.trajectory + t for t in range(max(ref.start, 1), ref.stop)]
            assert batch.reward[b, :n].tolist() == caused
            assert batch.reward_mask[b, :n].tolist() == [t > 0 for t in range(ref.start, ref.stop)]


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.3, 1 / 3, 0.9, 1])
def test_any_ratio_is_exact(share):
    """Over any number of batches to less than a row; and in each batch the whole number below or above."""
    config, total = replace(CONFIG, batch=16, rehearsal_share=share), 0
    for i in range(3000):
        rows = config.rehearsal_rows(i, 0)
        assert rows in (int(16 * share + 1e-6), int(16 * share + 1 - 1e-6))
        total += rows
        assert abs(total - (i + 1) * 16 * share) < 1


def test_the_ratio_follows_its_schedule(online, pool):
    config = replace(CONFIG, batch=8, rehearsal_share="piecewise(20:0.5,60:0.25,61:0)", slack=None, min_size=20)
    service, seen = make(online, config, pool, np.arange(0, 20, 2)), {}
    while not service.complete:
        if (batch := service.sample()) is not None:
            seen.setdefault(service.collected, set()).add(sum(ref.store == "pool" for ref in batch.refs))
        elif not service.finished:
            collect(service)
    assert seen[20] == {4}
    assert seen[40] == {3}  # 0.375 of 8
    assert seen[60] == {2}
    assert all(rows == {0} for steps, rows in seen.items() if steps > 60)


def test_the_ratios_schedule_may_count_frames():
    config = replace(CONFIG, batch=8, rehearsal_share="linear(1,0,80) frames")
    assert [config.rehearsal_rows(0, steps, action_repeat=2) for steps in (0, 10, 20, 40)] == [8, 6, 4, 0]


def slow_positions(lengths, length):
    """Every (row, start) that a sequence may begin at, one by one."""
    return [(row, start) for row, t in lengths for start in range(t + 1) if start == 0 or start + length <= t + 1]


def test_draws_are_uniform_over_start_positions_for_every_seed(tmp_path, pool):
    """Against the slow list of all positions, online and rehearsed apart; a sampler that takes trajectories first and
    starts second fails the same test."""
    steps, length, seeds, batches = [10, 3, 7, 1, 10, 10, 2, 9], 4, 40, 60
    config = replace(CONFIG, batch=16, length=length, rehearsal_share=0.25, min_size=1, samples_per_insert=1e4,
                     slack=None, budget=1000)  # fmt: skip
    with TrajectoryStore.create(tmp_path / "online") as online:
        filled = make(online, config)
        for n in steps:
            collect(filled, steps=n)
            drain_batches(filled)
        trajectories = {"online": list(enumerate(steps)), "pool": [(4, 9), (8, 9)]}
        sides = {name: slow_positions(lengths, length) for name, lengths in trajectories.items()}
        excess = dict.fromkeys(sides, 0.0)
        for seed in range(seeds):
            service = make(online, config, pool, np.array([4, 8]), seed=seed)
            refs = [ref for _ in range(batches) for ref in service.draw()]
            for name, positions in sides.items():
                excess[name] += chi_square([(r.trajectory, r.start) for r in refs if r.store == name], positions)
        for name, positions in sides.items():
            cells = seeds * (len(positions) - 1)
            assert abs(excess[name] - cells) < 4 * np.sqrt(2 * cells), name
        rng, biased = np.random.default_rng(0), 0.0
        for _ in range(seeds):
            rows = rng.integers(len(steps), size=12 * batches)
            starts = [slow_positions([(row, steps[row])], length) for row in rows]
            biased += chi_square([s[rng.integers(len(s))] for s in starts], sides["online"])
        assert biased > 2 * seeds * (len(sides["online"]) - 1)


def chi_square(drawn, positions):
    expected = len(drawn) / len(positions)
    counts = Counter(drawn)
    assert set(counts) <= set(positions)
    return sum((counts[p] - expected) ** 2 / expected for p in positions)


@pytest.mark.parametrize("rows", [None, np.array([], np.int64)])
def test_without_a_rehearsal_set_batches_are_online(online, pool, rows):
    service = make(online, CONFIG, pool, rows)
    collect(service)
    collect(service)
    assert [r.store for r in service.sample().refs] == ["online"] * 4


def test_refuses_a_pool_that_shows_other_things(online, tmp_path):
    wide = replace(SPEC, embodiment="toy/wide", action_dim=6)
    with TrajectoryStore.create(tmp_path / "pool") as foreign:
        foreign.append(counting(0, 5, wide), wide)
        with pytest.raises(SpecMismatch, match="toy/wide has 6 actions; the model takes 5"):
            make(online, CONFIG, foreign, np.array([0]))


def test_capacity_bounds_what_is_drawn_from(online):
    service = make(online, replace(CONFIG, capacity=30))
    for _ in range(6):
        collect(service)
        newest = range(len(online) - 3, len(online))
        for batch in drain_batches(service):
            assert {r.trajectory for r in batch.refs} <= set(newest)
    assert len(online) == 6
    assert service.stats()["replay/drawn_from"] == 30


def test_batches_differ_and_follow_the_seed(online):
    def refs(seed):
        service = make(online, seed=seed)
        return [batch.refs for batch in drain_batches(service)]

    service = make(online)
    for _ in range(3):
        collect(service)
    assert len(set(refs(1))) == len(refs(1)) > 5
    assert refs(1) == refs(1)
    assert set(refs(1)).isdisjoint(refs(2))


def test_buffers_are_reused_in_turn(online):
    service = make(online, buffers=2)
    for _ in range(3):
        collect(service)
    first = service.sample()
    kept = first.observation["pixels"].copy()
    second = service.sample()
    np.testing.assert_array_equal(first.observation["pixels"], kept)
    third = service.sample()
    assert third.observation["pixels"] is first.observation["pixels"]
    assert second.observation["pixels"] is not first.observation["pixels"]


def test_a_cutter_reads_on_in_a_store_that_another_writes(online):
    service = make(online)
    with TrajectoryStore.open(online.path) as elsewhere:
        cutter = Cutter({"online": elsewhere}, service.layout)
        for _ in range(3):
            collect(service)
            while (refs := service.draw()) is not None:
                batch = cutter(refs)
                for b, ref in enumerate(refs):
                    assert (batch.observation["pixels"][b, : len(ref), 3, 3, 2] == np.arange(ref.start, ref.stop)).all()


# Making the next while one is used


class Counted:
    """A source of numbered batches in reused arrays, that has nothing every third time."""

    def __init__(self, n):
        self.asked, self.given, self.n = 0, 0, n
        self.buffers = [empty_batch(1, 1, SPEC.observation, 1) for _ in range(BUFFERS)]

    def __call__(self):
        self.asked += 1
        if self.asked % 3 == 0 or self.given == self.n:
            return None
        batch = self.buffers[self.given % BUFFERS]
        batch.reward[:] = self.given
        self.given += 1
        return batch


def test_a_prefetched_batch_is_good_until_the_next_and_none_is_lost():
    source = Counted(200)
    prefetcher = Prefetcher(source)
    used = 0
    while used < 200:
        if (batch := prefetcher.sample()) is not None:
            assert source.given <= used + BUFFERS, "more is ahead than there are buffers"
            assert batch.reward[0, 0] == used
            used += 1
    assert prefetcher.sample() is None
    eventually(lambda: prefetcher.idle, "all is handed out")
    prefetcher.close()


def test_a_prefetcher_hands_on_what_its_source_raises():
    def broken():
        raise FormatError("The store is gone.")

    prefetcher = Prefetcher(broken)
    with pytest.raises(FormatError, match="The store is gone"):
        while True:
            prefetcher.sample()
    prefetcher.close()


# Continuing


def play(service, steps, seed):
    """A step-locked run: what is granted and sampled, in order."""
    rng, seen = random.Random(seed), []
    for _ in range(steps):
        if (batch := service.sample()) is not None:
            arrays = (batch.observation["pixels"], batch.previous_action, batch.reward, batch.valid)
            seen.append((batch.refs, [a.tobytes() for a in arrays]))
        elif isinstance(lease := service.lease("w"), Lease):
            episode = counting(lease.episode, rng.randint(1, lease.max_steps), SPEC)
            service.add("w", lease.episode, replace(episode, id=f"run-{lease.episode}"))
            seen.append(lease)
        else:
            seen.append(lease)
    return seen


def test_continues_bit_for_bit(tmp_path, pool):
    config = replace(CONFIG, capacity=80)
    with TrajectoryStore.create(tmp_path / "a") as store:
        service = make(store, config, pool, np.arange(10), seed=7)
        play(service, 40, seed=1)
        state = json.loads(json.dumps(service.state()))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        expected = play(service, 200, seed=2)
        assert service.finished
    with TrajectoryStore.open(tmp_path / "b", write=True) as store:
        continued = make(store, config, pool, np.arange(10), seed=7)
        continued.restore(state)
        assert play(continued, 200, seed=2) == expected
        assert continued.state() | {"meter": None} == service.state() | {"meter": None}
        assert continued.state()["meter"]["totals"] == service.state()["meter"]["totals"]


def test_a_run_that_repeats_itself_finds_its_episodes_stored(tmp_path, pool):
    """Killed long after its last saved state: what it had collected since is collected again, and stored once."""
    config = replace(CONFIG, capacity=80)
    with TrajectoryStore.create(tmp_path / "a") as store:
        service = make(store, config, pool, np.arange(10), seed=7)
        play(service, 40, seed=1)
        held = service.lease("w")
        state, (_, cursor) = json.loads(json.dumps(service.state())), service.drain_episodes()
        expected = play(service, 200, seed=2)
        episodes = service.drain_episodes(cursor)
        rows, collected = len(store), service.collected
        assert episodes[0] and rows > state["rows"]
        continued = make(store, config, pool, np.arange(10), seed=7)
        continued.restore(state, exact=True)
        assert continued.collected < collected
        assert continued.drain_episodes(cursor) == ([], cursor), "what is ahead is not reported yet"
        assert play(continued, 200, seed=2) == expected
        assert continued.drain_episodes(cursor) == episodes
        assert (len(store), continued.collected) == (rows, collected)
        assert continued.add("w", held.episode, counting(held.episode, 1, SPEC)), "the lease was still open"


def test_a_run_that_does_not_repeat_itself_keeps_what_was_stored(online):
    service = make(online)
    state = service.state()
    for i in range(5):
        drain_batches(service)
        lease = service.lease("w")
        service.add("w", lease.episode, replace(counting(i, 10, SPEC), id=f"run-{i}"))
        state = service.state() if i == 1 else state
    continued = make(online)
    continued.restore(state, exact=True)
    lease = continued.lease("w")
    other = replace(counting(9, 10, SPEC), id=f"run-{lease.episode}")
    assert not continued.add("w", lease.episode, other)
    assert continued.collected == 50
    assert continued.stats()["replay/unrepeated_episodes"] == 3
    drain_batches(continued)
    assert [e["episode"] for e in continued.drain_episodes()[0]] == [0, 1, 2, 3, 4]
    assert collect(continued).episode == 5


def test_episodes_after_the_saved_state_are_neither_lost_nor_counted_twice(online):
    service = make(online)
    for _ in range(3):
        collect(service)
    drain_batches(service)
    state, (rows, cursor) = service.state(), service.drain_episodes()
    for steps in (10, 4, 7):
        collect(service, steps=steps)
    crashed = make(online)
    assert crashed.collected == 51, "even without any saved state"
    crashed.restore(state)
    assert crashed.collected == 51
    crashed.restore(state)
    assert crashed.collected == 51
    later, _ = crashed.drain_episodes(cursor)
    assert [e["episode"] for e in rows + later] == [0, 1, 2, 3, 4, 5]
    lease = crashed.lease("w")
    assert (lease.episode, lease.agent_steps) == (6, 51)


def test_open_leases_end_with_the_run(online):
    service = make(online, replace(CONFIG, budget=20))
    lost = service.lease("w"), service.lease("w")
    state = service.state()
    restored = make(online, replace(CONFIG, budget=20))
    restored.restore(state)
    assert not restored.add("w", lost[0].episode, counting(0, 10, SPEC))
    assert collect(restored).episode == 2
    assert collect(restored).max_steps == 10
    assert restored.lease("w") is NoLease.DONE


def test_refuses_foreign_states(online, tmp_path):
    service = make(online, seed=1)
    collect(service)
    state = service.state()
    with pytest.raises(FormatError, match="version 99"):
        service.restore(state | {"version": 99})
    with pytest.raises(UsageError, match="seed 1"):
        make(online, seed=2).restore(state)
    with TrajectoryStore.create(tmp_path / "other") as other, pytest.raises(FormatError, match="not the one"):
        make(other, seed=1).restore(state)
    with pytest.raises(FormatError, match="saved with 5"):
        service.restore(state | {"rows": 5})


def test_drained_episodes_tell_all_once(online):
    service = make(online)
    lease = service.lease("w")
    episode = replace(counting(0, 7, SPEC), stats={"return": 3.5})
    service.add("w", lease.episode, episode)
    rows, cursor = service.drain_episodes()
    assert rows == [{"return": 3.5, "episode": 0, "steps": 7, "agent_steps": 7, "frames": 14}]
    assert service.drain_episodes(cursor) == ([], cursor)
    collect(service)
    rows, _ = service.drain_episodes(cursor)
    assert [(r["episode"], r["frames"]) for r in rows] == [(1, 34)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slack": 10.0}, "slack must be at least"),
        ({"min_size": 201}, "above the budget"),
        ({"rehearsal_share": 1.5}, r"values lie in \[0, 1\]"),
        ({"rehearsal_share": "cosine(1)"}, "Not a schedule"),
        ({"capacity": 0}, "at least one agent step"),
        ({"budget": 0}, "budget must be positive"),
        ({"lease_timeout_s": -1.0}, "lease_timeout_s must be positive"),
    ],
)
def test_refuses_settings_without_sense(change, message):
    with pytest.raises(UsageError, match=message):
        replace(CONFIG, **change)


def test_stats_are_flat_numbers(online):
    service = make(online)
    collect(service)
    stats = service.stats()
    assert all(key.startswith("replay/") and isinstance(value, float) for key, value in stats.items())
    assert stats["replay/collected"] == 10
