"""The nouns of GSA: what crosses a process boundary, and how time is counted. numpy only.

Time, on disk and on the wire (Gymnasium's alignment): `observation` has T+1 rows, the others T.

    t            0    1    …   T−1   T
    observation  o0   o1       oT−1  oT     o_t+1 follows action_t
    action       a0   a1       aT−1         chosen after seeing o_t
    reward       r0   r1       rT−1         caused by action_t; may be absent (reward-free pool)
    discount     d0   d1       dT−1         0 only where the task truly ends; a time limit keeps 1

A model wants the action that *led to* an observation. That shift is made in one place, when a `Batch` is cut.

Axis letters: B batch, T time, E environments of a worker, H horizon, A action, Z latent.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gsa.errors import FormatError, SpecMismatch, unknown

METHODS = ("scratch", "naive", "rehearsal", "random-rehearsal", "gsa", "jsrl")
ACTION_SLACK = 1e-5  # how far float error may carry an executed action outside [-1, 1]
BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # numpy has none: the bits, in a dtype that nothing else is


class Controller(enum.IntEnum):
    """Who chose an action."""

    RANDOM = 0
    PRIOR = 1
    POLICY = 2
    HUMAN = 3


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one observation at one step. Images are [height, width, channel] uint8."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.dtype not in ("uint8", "float32"):
            raise FormatError(f"Observations are uint8 images or float32 vectors, not {self.dtype}.")
        if any(n <= 0 for n in self.shape) or (self.is_image and self.dtype != "uint8"):
            raise FormatError(f"An observation of shape {self.shape} and dtype {self.dtype} is not supported.")

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3


@dataclass(frozen=True)
class Spec:
    """What one embodiment senses and does. Written into every store; compared at the start of every run."""

    embodiment: str  # a robot with its action space: "metaworld/sawyer", "dmc/walker"
    observation: Mapping[str, ArraySpec]
    action_dim: int  # actions are float32 in [-1, 1]
    action_repeat: int = 1  # frames an agent step
    control_hz: float = 0.0  # agent steps a second of simulated time; 0 where unknown
    renderer: str = ""  # render profile and versions, as pixels depend on them: "fast mujoco-3.11.0"

    def __post_init__(self) -> None:
        if self.action_dim < 1 or self.action_repeat < 1:
            raise FormatError(f"{self.embodiment}: action_dim and action_repeat must be at least 1.")
        if not self.observation:
            raise FormatError(f"{self.embodiment}: an embodiment without observations.")

    def to_json(self) -> dict[str, Any]:
        observation = {k: {"shape": list(v.shape), "dtype": v.dtype} for k, v in self.observation.items()}
        return {
            "embodiment": self.embodiment, "observation": observation, "action_dim": self.action_dim,
            "action_repeat": self.action_repeat, "control_hz": self.control_hz, "renderer": self.renderer,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spec:
        try:
            observation = {k: ArraySpec(tuple(v["shape"]), v["dtype"]) for k, v in data["observation"].items()}
            return cls(
                str(data["embodiment"]), observation, int(data["action_dim"]), int(data.get("action_repeat", 1)),
                float(data.get("control_hz", 0.0)), str(data.get("renderer", "")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"Not a spec: {error!r}.") from None

    def differences(self, other: Spec) -> list[str]:
        """Each field in which `other` differs, as "field: ours / theirs". The renderer is left to the caller."""
        ours, theirs = self.to_json(), other.to_json()
        return [f"{k}: {ours[k]} / {theirs[k]}" for k in ours if k != "renderer" and ours[k] != theirs[k]]

    def require_same(self, other: Spec, ours: str, theirs: str) -> None:
        """Raises SpecMismatch, naming both sides, unless `other` is the same embodiment seen the same way."""
        if different := self.differences(other):
            raise SpecMismatch(f"{ours} and {theirs} do not fit: {'; '.join(different)}.")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode, checked when it is made. Arrays are not copied."""

    embodiment: str
    observation: Mapping[str, np.ndarray]  # name → [T+1, …]
    action: np.ndarray  # [T, A] float32 in [-1, 1], as executed
    discount: np.ndarray  # [T] float32
    reward: np.ndarray | None = None  # [T] float32
    controller: np.ndarray | None = None  # [T] uint8, of Controller
    policy_version: np.ndarray | None = None  # [T] int64, snapshot that acted; -1 before the first
    source: str = ""  # where it comes from: "metaworld/reach-v3/scripted-0.5"
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # unique; the same episode keeps it across stores
    stats: Mapping[str, float] = field(default_factory=dict)  # numbers about the episode: return, score

    def __post_init__(self) -> None:
        t = len(self.action)
        if self.action.ndim != 2 or self.action.dtype != np.float32 or t < 1:
            raise FormatError(f"{self.name}: action must be [T, A] float32 with T ≥ 1, not {_describe(self.action)}.")
        if not np.all(np.abs(self.action) <= 1 + ACTION_SLACK):  # also catches NaN
            raise FormatError(f"{self.name}: an action is NaN or outside [-1, 1].")
        for key, value in self.observation.items():
            if len(value) != t + 1:
                raise FormatError(f"{self.name}: {key} has {len(value)} rows; {t} actions need {t + 1}.")
            if value.dtype != np.uint8 and not np.all(np.isfinite(value)):
                raise FormatError(f"{self.name}: {key} has NaN or infinite values.")
        for key, dtype in (("discount", "f4"), ("reward", "f4"), ("controller", "u1"), ("policy_version", "i8")):
            value = getattr(self, key)
            if value is not None and (value.shape != (t,) or value.dtype != np.dtype(dtype)):
                raise FormatError(f"{self.name}: {key} must be [{t}] {dtype}, not {_describe(value)}.")
            if value is not None and dtype == "f4" and not np.all(np.isfinite(value)):
                raise FormatError(f"{self.name}: {key} has NaN or infinite values.")

    def __len__(self) -> int:
        """Agent steps, T."""
        return len(self.action)

    @property
    def name(self) -> str:
        return self.source or self.id

    def check(self, spec: Spec) -> None:
        """Raises SpecMismatch unless the trajectory is one of `spec`'s embodiment."""
        found = {k: ArraySpec(v.shape[1:], str(v.dtype)) for k, v in self.observation.items()}
        if self.embodiment != spec.embodiment or self.action.shape[1] != spec.action_dim or found != spec.observation:
            raise SpecMismatch(
                f"Trajectory {self.name} ({self.embodiment}, {self.action.shape[1]} actions, {found}) is not of "
                f"{spec.embodiment} ({spec.action_dim} actions, {dict(spec.observation)})."
            )


@dataclass(frozen=True, order=True)
class SequenceRef:
    """The address of a slice of a trajectory: observation rows start ≤ t < stop of row `trajectory` of a store."""

    store: str  # "pool" or "online"
    trajectory: int  # row of the store's catalog; rows never move
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of T observation rows to train on, cut and padded. Row t holds what led to observation t."""

    observation: Mapping[str, np.ndarray]  # name → [B, T, …]
    previous_action: np.ndarray  # [B, T, A] float32, zero at t=0 and in padded dimensions
    action_mask: np.ndarray  # [B, A] float32, 1 where the embodiment has that dimension
    reward: np.ndarray  # [B, T] float32, zero where reward_mask is False
    reward_mask: np.ndarray  # [B, T] bool, True where a reward was observed and may be read
    discount: np.ndarray  # [B, T] float32, 1 at t=0
    is_first: np.ndarray  # [B, T] bool, True at t=0: the latent starts anew
    valid: np.ndarray  # [B, T] bool, False after the end of a trajectory shorter than T
    refs: tuple[SequenceRef, ...]  # B

    @property
    def shape(self) -> tuple[int, int]:
        return self.is_first.shape


@dataclass(frozen=True, eq=False)
class WeightSnapshot:
    """Published weights: what acting needs, at one version."""

    version: int  # only ever rises within a run
    tensors: Mapping[str, np.ndarray]  # of the plain dtypes, or BFLOAT16
    meta: Mapping[str, Any] = field(default_factory=dict)  # architecture hash, updates, epoch


@dataclass(frozen=True)
class Lease:
    """The replay service's permission to collect one episode. What a budget counts is leased, so it is exact."""

    episode: int  # number within the run; with the run's seed it decides every random draw of the episode
    max_steps: int  # agent steps at most; fewer than an episode only where the budget ends
    agent_steps: int  # collected and leased before this one: where the guidance schedule stands
    warmup: bool  # collected by the prior alone (uniform random where there is none)


class NoLease(enum.Enum):
    """Why the replay service gives no lease."""

    WAIT = "wait"  # the learner is behind, or others hold what is left of the budget; ask again
    DONE = "done"  # the budget is collected


def require_method(name: str) -> str:
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return name


def _describe(value: np.ndarray) -> str:
    return f"{list(value.shape)} {value.dtype}"
