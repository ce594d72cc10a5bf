"""Who must wait, collection or learning: the ratio of replayed to collected steps, as a pure object."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gsa.errors import UsageError


@dataclass
class RateLimiter:
    """Samples per insert in the sense of Reverb, counted in agent steps: inserts collected, samples replayed.

    The debt of the learner is (inserted − min_size) · samples_per_insert − sampled. Once min_size is reached it is kept
    within ±slack, but for the inserts that cross min_size together. No side ever waits for one that waits, too, if
    slack is at least `least_slack` of the sizes in use.
    """

    min_size: int  # agent steps collected before the first sample
    samples_per_insert: float
    slack: float  # replayed steps by which either side may be ahead
    inserted: int = 0
    sampled: int = 0

    def __post_init__(self) -> None:
        if self.min_size < 1 or not (0 < self.samples_per_insert < math.inf) or not (0 <= self.slack < math.inf):
            raise UsageError(
                f"A rate limiter needs min_size ≥ 1 and finite samples_per_insert > 0 and slack ≥ 0, not "
                f"{self.min_size}, {self.samples_per_insert}, {self.slack}."
            )

    @staticmethod
    def least_slack(insert: int, sample: int, samples_per_insert: float) -> float:
        """The slack that inserts of up to `insert` and samples of `sample` steps need, in replayed steps.

        A sample waits while debt < sample − slack, an insert while debt > slack − insert · samples_per_insert. No debt
        meets both if sample − slack ≤ slack − insert · samples_per_insert. And a whole sample must fit, so that
        a learner that has taken all samples but a fraction of one does not stop the last inserts.
        """
        return max(sample, (sample + insert * samples_per_insert) / 2) * (1 + 1e-6)  # a hair more, for rounding

    def can_insert(self, n: int, pending: int = 0) -> bool:
        """Whether `n` steps may be collected while `pending` more, already allowed, are on their way."""
        inserted = self.inserted + pending
        return inserted < self.min_size or self._debt(inserted + n) <= self.slack

    def can_sample(self, n: int) -> bool:
        return self.inserted >= self.min_size and n - self._debt(self.inserted) <= self.slack

    def insert(self, n: int) -> None:
        self.inserted += n

    def sample(self, n: int) -> None:
        self.sampled += n

    def samples_due(self, inserted: int, n: int) -> int:
        """Replayed steps, in whole samples of `n`, that `inserted` collected steps pay for in the end."""
        return max(0, math.floor((inserted - self.min_size) * self.samples_per_insert / n)) * n

    def _debt(self, inserted: int) -> float:
        return (inserted - self.min_size) * self.samples_per_insert - self.sampled
