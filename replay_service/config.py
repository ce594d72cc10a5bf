"""The settings of the replay service."""

from __future__ import annotations

from dataclasses import dataclass

from gsa.errors import UsageError
from replay_service.limiter import RateLimiter


@dataclass(frozen=True)
class ReplayConfig:
    """What a batch is made of, how much is collected, and who waits for whom. Steps are agent steps."""

    batch: int = 16  # sequences
    length: int = 64  # observation rows a sequence
    rehearsal_share: float = 0.25  # of the batch, where there is a rehearsal set
    samples_per_insert: float = 256.0  # replayed steps for each collected one
    min_size: int = 7_500  # collected before the first batch
    slack: float | None = None  # replayed steps either side may be ahead; None: enough for `parallel_episodes`
    parallel_episodes: int = 1  # how many are collected at a time, at most; only the default slack depends on it
    budget: int = 75_000  # to collect, exactly
    episode_steps: int = 500  # at most, of one episode
    warmup_steps: int = 7_500  # collected by the prior alone,
    warmup_episodes: int = 5  # or until this many episodes, whichever is later
    capacity: int | None = None  # newest steps that batches are drawn from; None: all
    lease_timeout_s: float = 600.0  # after which an unfinished episode goes back to the budget

    def __post_init__(self) -> None:
        positive = ("batch", "length", "samples_per_insert", "min_size", "budget", "episode_steps", "lease_timeout_s")
        for name in (*positive, "parallel_episodes"):
            if getattr(self, name) <= 0:
                raise UsageError(f"replay.{name} must be positive, not {getattr(self, name)}.")
        if not 0 <= self.rehearsal_share <= 1:
            raise UsageError(f"replay.rehearsal_share must be within 0 and 1, not {self.rehearsal_share}.")
        if self.min_size > self.budget:
            raise UsageError(f"replay.min_size ({self.min_size}) is above the budget ({self.budget}).")
        if self.slack is not None and self.slack < self.least_slack:
            raise UsageError(
                f"replay.slack must be at least {self.least_slack:g} replayed steps, not {self.slack:g}: with less, "
                f"collection and learning could wait for each other."
            )

    @property
    def rehearsal_rows(self) -> int:
        """Sequences of a batch that are rehearsed: exactly this many, in every batch."""
        return round(self.batch * self.rehearsal_share)

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
