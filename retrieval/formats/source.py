"""The seam between formats and the store: a `Source` names episodes and loads them; only its codec knows bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from gsa.errors import FormatError, UsageError, unknown
from gsa.schema import ACTION_SLACK, ArraySpec, Spec, Trajectory

MAX_BYTES = 1 << 30  # of an episode as it is stored
MAX_STEPS = 1 << 20  # of an episode
TEXT = 200  # characters of a name taken from a file


@dataclass(frozen=True)
class Options:
    """What a user may say about a source that it does not say itself, or wants otherwise."""

    observations: tuple[str, ...] = ()
    """Which of the source's observations to take and under which name: pixels=observation.images.top
    state=observation.state. Default: its only camera as pixels; without cameras, its vectors."""
    embodiment: str = ""
    """The robot with its action space, such as mylab/arm; default: what the source says."""
    resize: int = 0
    """Make images this many pixels high and wide, by area averaging; 0 keeps their size. The world model wants 64."""
    action_low: tuple[float, ...] = ()
    """Actions are scaled so that this becomes -1: one number for all dimensions, or one each."""
    action_high: tuple[float, ...] = ()
    """And this becomes 1. What lies outside is clipped, and counted."""
    action_repeat: int = 0
    """Simulator frames an action was held; 0: what the source says, else 1."""
    control_hz: float = 0.0
    """Actions a second; 0: what the source says."""
    drop_rewards: bool = False
    """Store no rewards."""

    def __post_init__(self) -> None:
        if bool(self.action_low) != bool(self.action_high):
            raise UsageError("Bounds of actions come in pairs: give both --action-low and --action-high.")
        if min(self.resize, self.action_repeat, self.control_hz) < 0 or not math.isfinite(self.control_hz):
            raise UsageError("--resize, --action-repeat and --control-hz cannot be negative.")
        if self.resize > 4096:
            raise UsageError(f"--resize {self.resize} is too large: 4096 at most.")
        names = [text.partition("=")[0] for text in self.observations]
        if any("=" not in text or not name for text, name in zip(self.observations, names, strict=True)):
            raise UsageError("--observations takes NAME=KEY, such as pixels=observation.images.top.")
        if len(set(names)) < len(names):
            raise UsageError(f"--observations gives a name twice: {', '.join(names)}.")

    @property
    def keys(self) -> dict[str, str]:
        """Name in the store → key in the source."""
        return {name: key for name, _, key in (text.partition("=") for text in self.observations)}


@dataclass(frozen=True)
class Entry:
    """An episode of a source before it is read."""

    name: str  # for messages
    id: str  # of its content: the same wherever the source lies
    bytes: int  # in a store, about


@dataclass(frozen=True)
class Bounds:
    """What of a source's actions becomes −1 and what becomes 1, by dimension."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    origin: str = ""  # who says so, for messages

    def __post_init__(self) -> None:
        pairs = list(zip(self.low, self.high, strict=False))
        if len(self.low) != len(self.high) or not all(
            math.isfinite(a) and math.isfinite(b) and a <= b for a, b in pairs
        ):
            raise UsageError(f"Bounds of actions must be finite, each low at most its high: {self.low}, {self.high}.")

    @property
    def inside(self) -> bool:
        """Whether actions within them are within [-1, 1] as they are."""
        return min(self.low, default=0) >= -1 - ACTION_SLACK and max(self.high, default=0) <= 1 + ACTION_SLACK

    def scale(self, action: np.ndarray) -> np.ndarray:
        """[T, A] of any float → [T, A] float32 with low at −1 and high at 1; a dimension without range becomes 0."""
        low, high = np.asarray(self.low, np.float64), np.asarray(self.high, np.float64)
        if low.size not in (1, action.shape[1]):
            raise UsageError(f"There are bounds for {low.size} actions; the source has {action.shape[1]}.")
        half = (high - low) / 2
        scaled = (action - (low + high) / 2) / np.where(half > 0, half, 1)
        return np.where(half > 0, scaled, 0).astype(np.float32)

    def __str__(self) -> str:
        return f"[{_numbers(self.low)}] to [{_numbers(self.high)}]"


@dataclass(frozen=True, eq=False)
class Loaded:
    """An episode, read."""

    trajectory: Trajectory
    spec: Spec
    clipped: bool = False  # an action was outside its bounds
    bounds: Bounds | None = None  # that its actions were scaled from


class Source(Protocol):
    """Episodes in a fixed order. Methods raise FormatError for an episode that is not what it should be."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of how it is read, a sentence each."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """For messages."""

    def entry(self, index: int) -> Entry:
        """Costs little beside `load`."""

    def load(self, index: int) -> Loaded:
        """Reads the episode. Memory is bounded by a few times MAX_BYTES, whatever is in the file."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Kind:
    """What one observation of a source is, at one step: an image of [height, width] or a vector of [size]."""

    shape: tuple[int, ...]

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 2

    def array_spec(self, resize: int) -> ArraySpec:
        """How it is stored."""
        if not self.is_image:
            return ArraySpec(self.shape, "float32")
        return ArraySpec((resize, resize, 3) if resize else (*self.shape, 3), "uint8")


def kind_of(shape: Sequence[int], dtype: np.dtype | str) -> Kind | None:
    """What an observation of that shape and dtype is at one step; None for what cannot be stored.

    uint8 [H, W, 3 or 4 or 1] is an image, and so are [3, H, W] and [H, W] from 8×8; other numbers are vectors.
    """
    shape, dtype = tuple(int(n) for n in shape), np.dtype(dtype)
    if dtype.kind not in "fuib" or dtype.itemsize > 8 or any(n < 1 for n in shape):
        return None
    if dtype == np.uint8 and (size := image_size(shape)) is not None:
        return Kind(size)
    return Kind((math.prod(shape),)) if math.prod(shape) <= 1 << 16 else None


def image_size(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width of an image of that shape, channels last or first or none; None if it is none."""
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        size, least = shape[:2], 1
    elif len(shape) == 3 and shape[0] in (1, 3):
        size, least = shape[1:], 8
    elif len(shape) == 2:
        size, least = shape, 8
    else:
        return None
    return (size[0], size[1]) if least <= min(size) and max(size) <= 4096 else None


def choose(kinds: Mapping[str, Kind], options: Options, where: str) -> tuple[dict[str, str], list[str]]:
    """Which observations to take, name → key, and what to say of it. UsageError where that is for the user to say."""
    if options.observations:
        for key in options.keys.values():
            if key not in kinds:
                raise unknown("observation", key, kinds)
        return options.keys, []
    images = [key for key, kind in kinds.items() if kind.is_image]
    if len(images) > 1:
        raise UsageError(
            f"{where} has several cameras: {', '.join(images)}. Say which to take, such as "
            f"--observations pixels={images[0]}."
        )
    if images:
        left = [key for key in kinds if key not in images]
        said = f"{images[0]} becomes pixels" + (f"; left out: {', '.join(left)}." if left else ".")
        return {"pixels": images[0]}, [said]
    if not kinds:
        raise UsageError(f"{where} has no observations that can be stored.")
    if len(kinds) == 1:
        return {"state": next(iter(kinds))}, []
    return {key.replace("/", "."): key for key in kinds}, []


def bounds_from(options: Options, given: Bounds | None) -> Bounds | None:
    """What to scale actions from: what the user says, else the source's own bounds where they leave [-1, 1]."""
    if options.action_low:
        size = max(len(options.action_low), len(options.action_high))
        low, high = (_repeat(v, size) for v in (options.action_low, options.action_high))
        return Bounds(low, high, "--action-low and --action-high")
    return given if given is not None and not given.inside else None


def adapt(spec: Spec, options: Options) -> Spec:
    """The spec with what the user says of the robot."""
    return replace(
        spec, embodiment=options.embodiment or spec.embodiment,
        action_repeat=options.action_repeat or spec.action_repeat, control_hz=options.control_hz or spec.control_hz,
    )  # fmt: skip


def make(
    spec: Spec, observation: Mapping[str, np.ndarray], action: np.ndarray, discount: np.ndarray,
    reward: np.ndarray | None, *, source: str, id: str, options: Options, bounds: Bounds | None, clip: bool = False,
    stats: Mapping[str, float] | None = None,
) -> Loaded:  # fmt: skip
    """An episode in our alignment, its actions [T, A] scaled and checked.

    Actions outside [-1, 1] are clipped where there are bounds or `clip` says that their simulator did so, and
    otherwise refused.
    """
    action = bounds.scale(action) if bounds is not None else np.ascontiguousarray(action, np.float32)
    reach = float(np.max(np.abs(action), initial=0))
    if reach > 1 + ACTION_SLACK and bounds is None and not clip:
        raise FormatError(
            f"Actions reach {reach:.4g}, outside [-1, 1]. Say what their range is with --action-low and --action-high."
        )
    trajectory = Trajectory(
        spec.embodiment, observation, np.clip(action, -1, 1), np.ascontiguousarray(discount, np.float32),
        None if reward is None or options.drop_rewards else np.ascontiguousarray(reward, np.float32),
        source=source, id=id, stats=stats or {},
    )  # fmt: skip
    return Loaded(trajectory, spec, reach > 1 + ACTION_SLACK, bounds)


def identify(spec: Spec, *content: Any) -> str:
    """An id of what an episode holds (arrays, numbers, names) and of how it is stored."""
    digest = hashlib.blake2b(json.dumps(spec.to_json()).encode(), digest_size=16)
    for part in content:
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()


def stored_bytes(spec: Spec, steps: int) -> int:
    """What an episode of that many steps takes in a store without a codec, about. FormatError if it is too much."""
    row = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in spec.observation.values())
    size = (steps + 1) * (row + 4 * spec.action_dim + 17)
    if not 1 <= steps <= MAX_STEPS or size > MAX_BYTES:
        raise FormatError(f"It has {steps} steps, {size} bytes; an episode has 1 to {MAX_STEPS}, {MAX_BYTES} at most.")
    return size


def text(value: Any) -> str:
    """Text from a file, fit to be a name: printable and short."""
    value = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return "".join(c if c.isprintable() else "?" for c in value[:TEXT])


def slug(value: Any) -> str:
    """Text from a file as a part of an embodiment's name."""
    return "-".join(text(value).lower().split()).replace("/", "-")


def _repeat(values: tuple[float, ...], size: int) -> tuple[float, ...]:
    return values * size if len(values) == 1 else values


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{v:.4g}" for v in values[:8])
    return shown + (", …" if len(values) > 8 else "")
