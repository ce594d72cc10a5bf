"""The settings of the replay service."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gsa.errors import UsageError
from gsa.schedule import schedule_value
from replay_service.limiter import RateLimiter


@dataclass(frozen=True)
class ReplayConfig:
    """What a batch is made of, how much is collected, and who waits for whom. Steps are agent steps."""

    batch: int = 16  # sequences
    length: int = 64  # observation rows a sequence
    rehearsal_share: float | str = 0.25  # of the batch, where there is a rehearsal set; or a schedule over agent steps
    samples_per_insert: float = 256.0  # replayed steps for each collected one
    min_size: int = 7_500  # collected before the first batch
    slack: float | None = None  # replayed steps either side may be ahead; None: enough for `parallel_episodes`
    parallel_episodes: int = 1  # how many are collected at a time, at most; only the default slack depends on it
    budget: int = 75_000  # to collect, exactly
    episode_steps: int = 500  # at most, of one episode
    warmup_steps: int = 7_500  # collected by the prior alone,
    warmup_episodes: int = 5  # or until this many episodes, whichever is later
    capacity: int | None = None  # newest steps that batches are drawn from; None: all
    lease_timeout_s: float = math.inf  # without a sign of life of its worker: then an episode goes back to the budget

    def __post_init__(self) -> None:
        positive = ("batch", "length", "samples_per_insert", "min_size", "budget", "episode_steps", "lease_timeout_s")
        for name in (*positive, "parallel_episodes"):
            if getattr(self, name) <= 0:
                raise UsageError(f"replay.{name} must be positive, not {getattr(self, name)}.")
        if self.capacity is not None and self.capacity < 1:
            raise UsageError(f"replay.capacity must be at least one agent step, not {self.capacity}.")
        schedule_value(self.rehearsal_share, 0)
        if self.min_size > self.budget:
            raise UsageError(f"replay.min_size ({self.min_size}) is above the budget ({self.budget}).")
        if self.slack is not None and self.slack < self.least_slack:
            raise UsageError(
                f"replay.slack must be at least {self.least_slack:g} replayed steps, not {self.slack:g}: with less, "
                f"collection and learning could wait for each other."
            )

    def rehearsal_rows(self, i: int, agent_steps: int, action_repeat: int = 1) -> int:
        """Sequences of batch number `i` that are rehearsed, with so many agent steps collected.

        The same in every batch where the share makes whole rows (4 of 16); else the two whole numbers around
        take turns so that n batches differ from n times the share by less than a row.
        """
        rows = self.batch * schedule_value(self.rehearsal_share, agent_steps, action_repeat)
        before, after = (math.floor(rows * n + 1e-6) for n in (i, i + 1))  # a hair more, for rounding
        return after - before

    @property
    def sample_steps(self) -> int:
        """Replayed steps a batch."""
        return self.batch * self.length

    @property
    def least_slack(self) -> float:
        return RateLimiter.least_slack(self.episode_steps, self.sample_steps, self.samples_per_insert)

    def limiter(self) -> RateLimiter:
        ahead = self.parallel_episodes * self.episode_steps
        slack = RateLimiter.least_slack(ahead, self.sample_steps, self.samples_per_insert)
        return RateLimiter(self.min_size, self.samples_per_insert, slack if self.slack is None else self.slack)
