"""One environment, whatever the suite: time, clipping, action repeat and checks are here; suites only simulate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, Protocol

import numpy as np

from actors import rendering, tasks
from actors.tasks import IMAGE_SHAPE, Task
from gsa.errors import EnvironmentFault, UsageError, unknown
from gsa.schema import ArraySpec, Spec

Profile = Literal["fast", "faithful"]
PROFILES: tuple[Profile, ...] = ("fast", "faithful")

Observation = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Step:
    """What one agent step brought about: the row t of the time table in `gsa.schema`, and observation t+1."""

    observation: Observation  # as in the spec: images [64, 64, 3] uint8, vectors [D] float32, buffers of their own
    action: np.ndarray  # [A] float32 in [-1, 1], as executed: this is what is to be stored
    reward: float  # summed over the frames of the step
    discount: float  # 0 only where the task truly ended; a time limit keeps 1
    last: bool
    success: float | None  # of the last frame; None where the task does not tell


class Frame(NamedTuple):
    """What a suite reports for one simulator frame."""

    reward: float
    success: float | None = None
    terminated: bool = False  # the task truly ended
    truncated: bool = False  # the suite's own time limit


PIXELS = {"pixels": ArraySpec(IMAGE_SHAPE, "uint8")}  # what is observed unless a simulation says otherwise


class Simulation(Protocol):
    """What a suite must provide. Frames, not agent steps; one instance is one simulator.

    One that senses other things than its own image also has `observation`, their specs, and `observe()`, their values.
    """

    control_hz: float  # frames a second of simulated time
    renderer: str  # what the pixels depend on: profile and versions

    def reset(self, seed: int) -> None:
        """Starts an episode that depends on nothing but `seed`."""

    def frame(self, action: np.ndarray) -> Frame:
        """One simulator step under `action` [A] in [-1, 1]."""

    def render(self) -> np.ndarray:
        """The present image, [64, 64, 3] uint8, upright, in a buffer of its own."""

    def close(self) -> None: ...


class Environment:
    """A task being done: owns its simulator. Use it in the thread that first reset it."""

    def __init__(self, task: Task, simulation: Simulation) -> None:
        self.task = task
        self.simulation = simulation
        self.spec = Spec(
            embodiment=task.embodiment,
            observation=getattr(simulation, "observation", PIXELS),
            action_dim=task.action_dim,
            action_repeat=task.action_repeat,
            control_hz=simulation.control_hz / task.action_repeat,
            renderer=simulation.renderer,
        )
        self._arrays = [(k, v.shape, np.dtype(v.dtype), v.is_image) for k, v in self.spec.observation.items()]
        self._frames_left = 0

    @property
    def episode_steps(self) -> int:
        """Agent steps of a full episode."""
        return self.task.episode_steps

    def reset(self, seed: int) -> Observation:
        """Starts an episode; equal seeds give equal episodes for equal actions. Returns observation 0."""
        try:
            self.simulation.reset(int(seed))
            observation = self._observe()
        except UsageError:
            raise
        except Exception as error:
            self._fail("reset", error)
        self._frames_left = self.task.episode_frames
        return observation

    def step(self, action: np.ndarray) -> Step:
        """Clips `action` [A] to [-1, 1] and executes it for `action_repeat` frames, or until the episode ends.

        Raises EnvironmentFault if the simulator fails; the environment must then be rebuilt.
        """
        if self._frames_left <= 0:
            raise UsageError(f"{self.task.name}: the episode is over (or has not begun); call reset(seed).")
        executed = self._executable(action)
        reward, frame = 0.0, Frame(0.0)
        try:
            for _ in range(min(self.task.action_repeat, self._frames_left)):
                frame = self.simulation.frame(executed)
                reward += frame.reward
                self._frames_left -= 1
                if frame.terminated or frame.truncated:
                    self._frames_left = 0
                    break
            observation = self._observe()
        except UsageError:
            raise
        except Exception as error:
            self._fail("step", error)
        if not math.isfinite(reward):
            self._fail("step", ValueError(f"the reward is {reward}"))
        return Step(
            observation,
            executed,
            float(reward),
            0.0 if frame.terminated else 1.0,
            self._frames_left == 0,
            frame.success,
        )

    def score(self, episode_return: float, success: float | None = None) -> float:
        """The benchmark's score of one episode, see `Task.score`."""
        return self.task.score(episode_return, success)

    def close(self) -> None:
        """Frees the simulator and its rendering context. May be called twice."""
        self._frames_left = 0
        self.simulation.close()

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"An environment cannot be sent to another process; send the name '{self.task.name}' and call make() there."
        )

    def _executable(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, np.float32)
        # For so few numbers, Python's own functions take a fraction of the time of numpy's.
        if action.shape != (self.task.action_dim,) or not all(map(math.isfinite, values := action.tolist())):
            raise UsageError(f"{self.task.name} takes {self.task.action_dim} finite numbers as action, not {action!r}.")
        return np.array([min(max(value, -1.0), 1.0) for value in values], np.float32)

    def _observe(self) -> Observation:
        observe = getattr(self.simulation, "observe", None)
        observation = observe() if observe else {"pixels": self.simulation.render()}
        for name, shape, dtype, is_image in self._arrays:
            value = observation[name]
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{name} has shape {value.shape} and dtype {value.dtype}, not {shape} {dtype}")
            if not is_image and not np.all(np.isfinite(value)):
                raise ValueError(f"{name} has NaN or infinite values")
        return observation

    def _fail(self, where: str, error: Exception) -> NoReturn:
        self._frames_left = 0
        raise EnvironmentFault(
            f"{self.task.name} failed in {where}: {type(error).__name__}: {str(error).rstrip('.')}."
        ) from error


def make(task: str, render: Profile = "fast", imports: Iterable[str] = ()) -> Environment:
    """The environment of that task name, with images of that render profile.

    `fast` leaves out shadows, reflections and multisampling; `faithful` gives the suite's own pixels. `imports` are
    modules that register Gymnasium environments. UsageError for unknown names and missing packages.
    """
    if render not in PROFILES:
        raise unknown("render profile", render, PROFILES)
    if render == "fast":
        rendering.limit_threads()
    found = tasks.find(task, imports)
    return Environment(found, _simulate(found, render))


def _simulate(task: Task, profile: Profile) -> Simulation:
    """The suite's simulator; its packages are imported only here, after the rendering backend is chosen."""
    try:
        if task.suite == "dmc":
            from actors.dmc import DMControl

            return DMControl(task, profile)
        if task.suite == "metaworld":
            from actors.metaworld import MetaWorld

            return MetaWorld(task, profile)
        from actors.gymnasium_env import Gymnasium

        return Gymnasium(task)
    except ModuleNotFoundError as error:
        remedy = "" if task.suite == "gym" else f": pip install 'gsa-rl[{task.suite}]'"
        raise UsageError(f"{task.name} needs the package '{error.name}'{remedy}.") from error
