"""E environments stepped at the same time under the guided policy, one forward for many of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from actors.episode import Episode, Outcome
from actors.guidance import GuidanceConfig, Guide, episode_plan, guided_action
from actors.hosting import Host, ready
from gsa.errors import EnvironmentFault, GsaError, cause_of
from gsa.schema import Controller, Lease

MAX_FAULTS = 10  # of one cause in a row: then it is no accident
RANDOM, HUMAN = int(Controller.RANDOM), int(Controller.HUMAN)  # looking an enum's member up takes microseconds


class ActingPolicy(Protocol):
    """What a rollout asks for actions: gsa.agent.policy.GuidedPolicy, or anything alike."""

    def begin(self, slot: int) -> None:
        """A new episode starts in `slot`."""

    def act(
        self,
        observation: Mapping[str, np.ndarray],
        controller: np.ndarray,
        rngs: Sequence[np.random.Generator],
        sample: bool = True,
        slots: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Actions [N, A] in [-1, 1] for observations [N, …] of `slots`; `controller` [N] says who chooses each.

        With `sample` the policy draws its action, else it takes the mean. `slots` ascend; None means all E. The
        observation's arrays are written anew for the next call.
        """

    def executed(self, action: np.ndarray, slots: Sequence[int] | None = None) -> None:
        """What is executed [N, A], where that is not what `act` returned: a guide took over."""

    def memory(self) -> dict[str, Any]:
        """What it remembers of the episodes under way, without its weights: numbers and arrays."""

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Takes back what `memory` gave."""


class Rollout:
    """Owns E environments and their episodes. Every episode is decided by (seed, episode number) alone.

    An environment that fails loses its episode and is made anew; ten failures of one cause with no whole episode
    between them are a GsaError.

    In lockstep all environments step together, and one forward serves all of them: deterministic to the bit. Else a
    forward serves the half that answered first, while the other half steps.
    """

    def __init__(
        self,
        make: Callable[[], Host],
        envs: int,
        policy: ActingPolicy,
        guidance: GuidanceConfig,
        has_prior: bool,
        seed: int,
        run: str = "run",
        sample: bool = True,
        guides: Sequence[Guide] = (),
        lockstep: bool = True,
    ) -> None:
        """`guides`: none, or one for each environment, that may take over from policy and prior."""
        self._make = make
        self.hosts = [make() for _ in range(envs)]
        self.policy, self.guidance, self.has_prior, self.guides = policy, guidance, has_prior, guides
        self.seed, self.run, self.sample, self.lockstep = seed, run, sample, lockstep
        self.version = -1  # of the weights that act
        self.episodes: list[Episode | None] = [None] * envs
        self._asked: dict[int, tuple[int, int] | None] = {}  # slot → controller and version of its step, None: a reset
        self._to_act: list[int] = []  # slots that wait for an action, as their environments answered
        self._faults: dict[str, int] = {}  # cause → in a row
        self.task, self.spec = self.hosts[0].task, self.hosts[0].spec
        self._blank = {k: np.zeros(v.shape, v.dtype) for k, v in self.spec.observation.items()}
        self._seen = {k: np.empty((envs, *v.shape), v.dtype) for k, v in self.spec.observation.items()}
        self._idle_rng = np.random.default_rng(0)  # draws for empty slots are thrown away

    @property
    def free_slots(self) -> list[int]:
        return [slot for slot, episode in enumerate(self.episodes) if episode is None]

    @property
    def leased(self) -> list[int]:
        """Numbers of the episodes under way."""
        return [episode.lease.episode for episode in self.episodes if episode is not None]

    def begin(self, slot: int, lease: Lease) -> None:
        """Begins the leased episode in a free slot. It is stepped once the environment has answered the reset."""
        rng = np.random.default_rng((self.seed, lease.episode))
        guide = Controller.HUMAN if self.guides else Controller.PRIOR if self.has_prior else None
        plan = episode_plan(self.guidance, lease, self.task.episode_steps, guide, rng, self.task.action_repeat)
        self.hosts[slot].ask_reset(int(rng.integers(2**31)))
        rows = {k: np.empty((len(plan) + 1, *v.shape), v.dtype) for k, v in self.spec.observation.items()}
        self.episodes[slot], self._asked[slot] = Episode(lease, plan, rng, rows), None

    def advance(self, wait_s: float = 0.0) -> list[Outcome]:
        """Takes what environments have answered, and asks for the next agent step where the policy has acted.

        One outcome for each step that was taken, and for each failed reset. Waits for as many answers as a forward is
        to serve, but no longer than `wait_s`. In lockstep, the steps that were asked for are taken too.
        """
        outcomes = self._take_answers(wait_s)
        if len(self._to_act) >= (enough := self._enough()):
            acting, self._to_act = sorted(self._to_act[:enough]), self._to_act[enough:]
            self._ask_steps(acting)
            if self.lockstep:
                outcomes += [self._take_step(slot) for slot in acting]
        return outcomes

    def state(self) -> dict[str, Any]:
        """What continues the rollout exactly, between two steps in lockstep of environments in this process."""
        episodes = [None if episode is None else episode.state() for episode in self.episodes]
        return {
            "version": self.version, "episodes": episodes, "policy": self.policy.memory(), "faults": dict(self._faults),
            "idle_rng": self._idle_rng.bit_generator.state,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> list[Lease]:
        """Plays the episodes under way again by what was done in them, and gives the policy its memory back.

        Returns the leases of those that cannot go on, since their environment fails or does not repeat itself.
        """
        lost = []
        for slot, saved in enumerate(state["episodes"]):
            if saved is not None and not self._replay(slot, saved):
                self.episodes[slot] = None
                lost.append(Lease(**saved["lease"]))
        self.policy.recall(state["policy"])
        self._idle_rng.bit_generator.state = state["idle_rng"]
        self.version = int(state["version"])
        self._faults = {str(cause): int(n) for cause, n in state["faults"].items()}
        return lost

    def _replay(self, slot: int, saved: Mapping[str, Any]) -> bool:
        """Whether the saved episode could be played again to where it stood, reward for reward."""
        self.begin(slot, Lease(**saved["lease"]))
        episode, host = self._answering(slot)
        try:
            episode.see(host.answer())
            for action, controller, version in zip(saved["action"], saved["controller"], saved["version"], strict=True):
                host.ask_step(action)
                episode.record(step := host.answer(), int(controller), int(version))
                if step.last:
                    return False
        except EnvironmentFault:
            return False
        episode.rng.bit_generator.state = saved["rng"]
        self._to_act.append(slot)
        return np.array_equal(episode.reward, saved["reward"])

    def close(self) -> None:
        for host in self.hosts:
            host.close()

    def _enough(self) -> int:
        """How many environments the next forward serves: all that do not reset in lockstep, else half of them: the
        other half steps meanwhile. At least one."""
        steps = len(self._to_act) + sum(asked is not None for asked in self._asked.values())
        return max(1, steps if self.lockstep else -(-steps // 2))

    def _take_answers(self, wait_s: float) -> list[Outcome]:
        """Takes answers as they come, until enough are there for the next forward, or `wait_s` are over."""
        outcomes: list[Outcome] = []
        until = time.monotonic() + wait_s
        while self._asked:
            short = len(self._to_act) < self._enough()
            for slot in ready({s: self.hosts[s] for s in self._asked}, until - time.monotonic() if short else 0.0):
                taken = self._take_reset(slot) if self._asked[slot] is None else self._take_step(slot)
                outcomes += [] if taken is None else [taken]
            if len(self._to_act) >= self._enough() or time.monotonic() >= until:
                break
        return outcomes

    def _take_reset(self, slot: int) -> Outcome | None:
        episode, host = self._answering(slot)
        try:
            episode.see(host.answer())
        except EnvironmentFault as fault:
            return self._lost(slot, fault)
        self.policy.begin(slot)
        self._to_act.append(slot)
        return None

    def _ask_steps(self, acting: Sequence[int]) -> None:
        """Asks for an agent step in these slots, ascending. In lockstep the policy sees all slots: which of them are
        empty changes no number."""
        slots = list(range(len(self.episodes))) if self.lockstep else acting
        episodes = [self.episodes[slot] if slot in acting else None for slot in slots]
        plan = [RANDOM if e is None else e.plan[len(e.action)] for e in episodes]
        controller = np.array(plan, np.uint8)
        actions = self._act(slots, episodes, controller)
        for slot, episode, action, chosen in zip(slots, episodes, actions, controller.tolist(), strict=True):
            if episode is not None:
                self.hosts[slot].ask_step(action)
                self._asked[slot] = chosen, self.version

    def _act(self, slots: Sequence[int], episodes: Sequence[Episode | None], controller: np.ndarray) -> np.ndarray:
        """Actions [N, A] for the episodes in `slots`; where there is none they mean nothing. `controller` [N] is who
        was planned, and is set to who did choose."""
        scheduled = controller == HUMAN
        for row in np.flatnonzero(scheduled).tolist():
            controller[row] = self._without_guide(episodes[row])
        seen = [self._blank if episode is None else episode.newest for episode in episodes]
        observation = {k: np.stack([one[k] for one in seen], out=to[: len(seen)]) for k, to in self._seen.items()}
        rngs = [self._idle_rng if episode is None else episode.rng for episode in episodes]
        actions = self.policy.act(observation, controller, rngs, self.sample, slots)
        if self.guides:
            for row, episode in enumerate(episodes):
                if episode is None:
                    continue
                step, asked = len(episode.action), bool(scheduled[row])
                taken = guided_action(self.guides[slots[row]], seen[row], step, asked, actions.shape[1])
                if taken is not None:
                    actions[row], controller[row] = taken, Controller.HUMAN
            self.policy.executed(actions, slots)
        return actions

    def _without_guide(self, episode: Episode | None) -> Controller:
        """Who takes a step of the guide's that it leaves to the others."""
        if self.has_prior:
            return Controller.PRIOR
        assert episode is not None, "a guide is asked in episodes only"
        return Controller.RANDOM if episode.lease.warmup else Controller.POLICY

    def _take_step(self, slot: int) -> Outcome:
        controller, version = self._asked[slot] or (0, 0)
        episode, host = self._answering(slot)
        try:
            step = host.answer()
        except EnvironmentFault as fault:
            return self._lost(slot, fault)
        episode.record(step, controller, version)
        if not step.last and len(episode.action) < episode.lease.max_steps:
            self._to_act.append(slot)
            return Outcome(episode.lease)
        self.episodes[slot] = None
        self._faults.clear()
        return Outcome(episode.lease, episode.trajectory(self.task, f"{self.run}-{episode.lease.episode:08d}"))

    def _answering(self, slot: int) -> tuple[Episode, Host]:
        """The episode and the environment of a slot whose answer is taken now."""
        episode = self.episodes[slot]
        assert episode is not None, "nothing was asked"
        del self._asked[slot]
        return episode, self.hosts[slot]

    def _lost(self, slot: int, fault: EnvironmentFault) -> Outcome:
        """Drops the slot's episode and makes its environment anew."""
        episode = self.episodes[slot]
        assert episode is not None
        self.episodes[slot] = None
        cause = cause_of(str(fault))
        self._faults[cause] = self._faults.get(cause, 0) + 1
        self.hosts[slot].close()
        if self._faults[cause] >= MAX_FAULTS:
            raise GsaError(f"The environment failed {MAX_FAULTS} times in a row for one cause: {fault}") from fault
        self.hosts[slot] = self._make()
        return Outcome(episode.lease, fault=fault)
