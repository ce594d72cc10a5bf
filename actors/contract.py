"""What every environment must do, as one check: run it in the tests of your own environments, or as gsa check-env.

def test_my_env():
    check_environment(lambda: make("gym/MyEnv-v0", imports=("my_envs",)))
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from actors.environment import Environment, Observation, Step
from actors.tasks import IMAGE_SHAPE
from gsa.errors import GsaError, UsageError
from gsa.schema import ArraySpec, Trajectory

TILT_ROWS = 4  # by how many rows a camera is tilted to see whether its image is upright


class ContractBroken(GsaError, AssertionError):
    """An environment does not do what the others rely on."""


class Finding(NamedTuple):
    """The outcome of one check: what was found, or what is wrong."""

    name: str
    ok: bool
    text: str


@dataclass
class Examination:
    """Two environments of one task, and the first episode of the first."""

    first: Environment
    second: Environment
    seed: int
    steps: int | None  # agent steps of the episodes that are compared; None: whole ones
    observations: list[Observation] = field(default_factory=list)
    record: list[Step] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.record[-1].last

    def require(self, condition: object, complaint: str) -> None:
        if not condition:
            raise ContractBroken(f"{self.first.task.name}: {complaint}.")


def check_environment(make_environment: Callable[[], Environment], seed: int = 0, steps: int | None = None) -> None:
    """Makes two environments and drives them. ContractBroken says what is wrong.

    `steps` limits the agent steps of the episodes that are compared; None runs whole ones, and checks their length.
    """
    for finding in examine(make_environment, seed, steps):
        if not finding.ok:
            raise ContractBroken(finding.text)


def examine(make_environment: Callable[[], Environment], seed: int = 0, steps: int | None = None) -> Iterator[Finding]:
    """Every check in turn. Ends early where a check fails that those after it build on."""
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(make_environment()) for _ in range(2))
        examination = Examination(first, second, seed, steps)
        for name, check in {**ESSENTIAL, **CHECKS}.items():
            try:
                yield Finding(name, True, check(examination))
            except GsaError as error:
                yield Finding(name, False, str(error))
                if name in ESSENTIAL:
                    return


def check_spec(e: Examination) -> str:
    """The spec fits the task; observations are images of 64×64 and float32 vectors."""
    task, spec = e.first.task, e.first.spec
    e.require(spec.embodiment == task.embodiment, f"the spec's embodiment is {spec.embodiment}")
    e.require(spec.action_dim == task.action_dim, f"the spec has {spec.action_dim} actions, not {task.action_dim}")
    e.require(spec.action_repeat == task.action_repeat, f"the spec's action repeat is {spec.action_repeat}")
    for name, array in spec.observation.items():
        fits = array == ArraySpec(IMAGE_SHAPE, "uint8") or (len(array.shape) == 1 and array.dtype == "float32")
        e.require(fits, f"{name} is {array}, neither an image {IMAGE_SHAPE} uint8 nor a vector [D] float32")
    e.require(bool(spec.renderer) or not _images(e.first), "the spec does not say how images are rendered")
    rate = f"{spec.control_hz:g} agent steps a simulated second" if spec.control_hz else "control rate unknown"
    return f"{task.embodiment}, {task.action_dim} actions, {rate}; observes {_described(spec.observation)}"


def check_time_table(e: Examination) -> str:
    """One episode under random actions is a whole, valid trajectory in the time table of `gsa.schema`."""
    task, rng = e.first.task, np.random.default_rng(e.seed)
    e.require(not _accepts_step(e.first), "it can be stepped before reset()")
    e.observations.append(e.first.reset(e.seed))
    while not e.record or not (e.ended or len(e.record) == e.steps):
        e.require(len(e.record) < task.episode_steps, f"the episode goes on after {task.episode_steps} steps")
        e.record.append(e.first.step(rng.uniform(-1, 1, task.action_dim).astype(np.float32)))
        e.observations.append(e.record[-1].observation)
        _check_step(e, e.record[-1])
    e.require(not e.ended or not _accepts_step(e.first), "it can be stepped after the last step")
    _trajectory(e).check(e.first.spec)
    return f"{len(e.record)} agent steps, {len(e.observations)} observations, return {_reward(e.record).sum():.4g}"


def check_length(e: Examination) -> str:
    """An episode ends where the task says, or, in gym tasks, before."""
    task, count = e.first.task, len(e.record)
    if not e.ended:
        return f"not checked: only {count} of {task.episode_steps} agent steps were run"
    short = count < task.episode_steps and e.record[-1].discount == 1 and task.suite != "gym"
    e.require(not short, f"the episode ended after {count} of {task.episode_steps} steps without a cause")
    cause = "the task ended (discount 0)" if e.record[-1].discount == 0 else "the time limit (discount 1)"
    return f"{count} of at most {task.episode_steps} agent steps, {task.episode_frames} frames; ended by {cause}"


def check_buffers(e: Examination) -> str:
    """No observation or action shares its memory with another, nor changes while the episode goes on."""
    for name in e.first.spec.observation:
        arrays = [o[name] for o in e.observations]
        shared = any(np.shares_memory(a, b) for i, a in enumerate(arrays[:50]) for b in arrays[i + 1 : i + 4])
        e.require(not shared, f"two observations of {name} share one buffer; each must have its own")
        kept = e.second.reset(e.seed)[name]
        e.require(np.array_equal(arrays[0], kept), f"{name} of observation 0 changed while the episode went on")
    action = np.zeros(e.first.task.action_dim, np.float32)
    e.require(not np.shares_memory(action, e.second.step(action).action), "the reported action is the one given")
    return "each observation and action has its own"


def check_determinism(e: Examination) -> str:
    """An episode depends on seed and actions alone: not on the instance, nor on episodes before it."""
    again, other = _replay(e.first, e, e.seed), _replay(e.second, e, e.seed)
    for name, replayed in {"repeated": again, "repeated by another instance": other}.items():
        e.require(_same(e, *replayed), f"an episode {name} with equal seed and actions came out otherwise")
    alike = _same(e, *_replay(e.first, e, e.seed + 1))
    e.require(not alike or e.first.task.suite == "gym", f"seeds {e.seed} and {e.seed + 1} give the same episode")
    note = "; note that every seed gives the same episode" if alike else ""
    return f"equal seeds and actions give equal episodes, in two instances and twice in one{note}"


def check_action_repeat(e: Examination) -> str:
    """A step lasts `action_repeat` frames of the simulator, sums their rewards and looks once."""
    repeat, simulation = e.first.task.action_repeat, e.first.simulation
    look = "observe" if hasattr(simulation, "observe") else "render"
    e.first.reset(e.seed)
    started = _time(simulation)
    with _watched(simulation, "frame") as frames, _watched(simulation, look) as looks:
        step = e.first.step(np.zeros(e.first.task.action_dim, np.float32))
    e.require(len(frames) == repeat or step.last, f"a step lasts {len(frames)} frames, not {repeat}")
    e.require(len(looks) == 1, f"a step looks {len(looks)} times; once is enough")
    e.require(np.isclose(step.reward, sum(f.reward for f in frames)), "a step's reward is not the sum of its frames'")
    elapsed, expected = _time(simulation) - started, len(frames) / repeat
    in_time = np.isnan(elapsed) or np.isclose(elapsed * e.first.spec.control_hz, expected)
    e.require(in_time, f"a step takes {elapsed} s of simulated time, but control_hz is {e.first.spec.control_hz}")
    return f"an agent step is {repeat} frame{'s' if repeat > 1 else ''} and one look"


def check_clipping(e: Examination) -> str:
    """Actions beyond [-1, 1] are executed, and reported, as the nearest ones within; the argument stays as it is."""
    beyond = np.where(np.arange(e.first.task.action_dim) % 2, -3.0, 3.0).astype(np.float32)
    given = beyond.copy()
    e.first.reset(e.seed)
    clipped = e.first.step(given)
    e.first.reset(e.seed)
    within = e.first.step(np.clip(beyond, -1, 1))
    e.require(np.array_equal(given, beyond), "step() changed the action it was given")
    e.require(np.array_equal(clipped.action, np.clip(beyond, -1, 1)), "the action reported is not the clipped one")
    same = clipped.reward == within.reward and _equal(clipped.observation, within.observation)
    e.require(same, "an action beyond [-1, 1] does not act as the clipped one")
    return "actions beyond [-1, 1] act, and are reported, as the nearest within"


def check_bad_actions(e: Examination) -> str:
    """Actions of the wrong length, and NaN, are refused."""
    e.first.reset(e.seed)
    for action in (np.zeros(e.first.task.action_dim + 1), np.full(e.first.task.action_dim, np.nan)):
        with contextlib.suppress(UsageError):
            e.first.step(action)
            raise ContractBroken(f"{e.first.task.name} accepts the action {action}.")
    return "wrong lengths and NaN are refused"


def check_images(e: Examination) -> str:
    """Images show something that changes, and, where a MuJoCo camera can be tilted, they are upright."""
    names = _images(e.first)
    for name in names:
        different = len({o[name].tobytes() for o in e.observations})
        e.require(different > 1, f"all images of {name} in an episode under random actions are equal")
    if not names:
        return "none is observed"
    camera = getattr(e.first.simulation, "camera", None)
    if camera is None:
        return "they change; whether they are upright no check can tell: look at one"
    e.first.reset(e.seed)
    moved = _rows_moved_up(e.first.simulation, camera)
    e.require(moved > 0, f"the image is upside down: what a camera tilted down sees moves by {moved} rows")
    return f"they change, and are upright: tilting the camera down moves what is seen up by {moved} rows"


def check_processes(e: Examination) -> str:
    """It refuses to cross a process boundary, and says what to do instead."""
    try:
        pickle.dumps(e.first)
    except TypeError as error:
        e.require("make()" in str(error), "its refusal to be pickled does not say what to do")
        return "a live environment refuses to be pickled"
    raise ContractBroken(f"{e.first.task.name} can be pickled; a live simulator must refuse.")


def check_close(e: Examination) -> str:
    """close() may be called twice, and ends it."""
    e.first.close()
    e.first.close()
    e.require(not _accepts_step(e.first), "it can still be stepped after close()")
    return "closing twice is harmless"


Check = Callable[[Examination], str]
ESSENTIAL: dict[str, Check] = {"spec": check_spec, "time table": check_time_table}
CHECKS: dict[str, Check] = {
    "episode length": check_length, "buffers": check_buffers, "determinism": check_determinism,
    "action repeat": check_action_repeat, "clipping": check_clipping, "bad actions": check_bad_actions,
    "images": check_images, "processes": check_processes, "close": check_close,
}  # fmt: skip


def _check_step(e: Examination, step: Step) -> None:
    e.require(step.action.dtype == np.float32, f"the executed action is {step.action.dtype}, not float32")
    e.require(isinstance(step.reward, float) and np.isfinite(step.reward), f"a reward is {step.reward!r}")
    e.require(step.discount in (0.0, 1.0), f"a discount is {step.discount!r}; it is 0 where the task ended, else 1")
    e.require(step.last or step.discount == 1.0, "the discount is 0 before the last step")
    needs_success = e.first.task.score_rule == "100*success"
    e.require(not needs_success or step.success in (0.0, 1.0), f"success is {step.success!r}, not 0 or 1")


def _trajectory(e: Examination) -> Trajectory:
    return Trajectory(
        e.first.task.embodiment, {k: np.stack([o[k] for o in e.observations]) for k in e.observations[0]},
        np.stack([s.action for s in e.record]), np.array([s.discount for s in e.record], np.float32),
        _reward(e.record),
    )  # fmt: skip


def _reward(record: list[Step]) -> np.ndarray:
    return np.array([s.reward for s in record], np.float32)


def _replay(environment: Environment, e: Examination, seed: int) -> tuple[list[Observation], list[Step]]:
    """The episode's actions again."""
    observations, record = [environment.reset(seed)], list[Step]()
    for step in e.record:
        record.append(environment.step(step.action))
        observations.append(record[-1].observation)
        if record[-1].last:
            break
    return observations, record


def _same(e: Examination, observations: list[Observation], record: list[Step]) -> bool:
    equal = all(_equal(a, b) for a, b in zip(e.observations, observations, strict=False))
    return equal and np.array_equal(_reward(record), _reward(e.record))


def _equal(a: Observation, b: Observation) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def _watched(simulation: Any, method: str) -> Iterator[list[Any]]:
    """Yields the list of what `method` returns from now on."""
    original, seen = getattr(simulation, method), list[Any]()

    def watched(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    setattr(simulation, method, watched)
    try:
        yield seen
    finally:
        setattr(simulation, method, original)


def _time(simulation: Any) -> float:
    """Simulated seconds; NaN where the simulation does not tell."""
    return float(getattr(getattr(simulation, "data", None), "time", np.nan))


def _rows_moved_up(simulation: Any, camera: int) -> int:
    """By how many rows the image moves up when the camera is tilted down by TILT_ROWS rows' worth of its view."""
    data, before = simulation.data, simulation.render().astype(int)
    pose = data.cam_xmat[camera].copy()
    sight = -pose.reshape(3, 3)[:, 2]
    axis = np.cross(sight, [0.0, 0.0, 1.0])
    angle = -np.radians(float(simulation.field_of_view)) * TILT_ROWS / IMAGE_SHAPE[0]
    data.cam_xmat[camera] = (_rotation(axis / np.linalg.norm(axis), angle) @ pose.reshape(3, 3)).ravel()
    after = simulation.render().astype(int)
    data.cam_xmat[camera] = pose
    margin = 2 * TILT_ROWS
    inner = before[margin:-margin]
    errors = {k: np.abs(after[margin - k : len(after) - margin - k] - inner).mean() for k in range(-margin, margin + 1)}
    return min(errors, key=errors.__getitem__)


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """[3, 3], about a unit axis, right-handed (Rodrigues)."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _images(environment: Environment) -> list[str]:
    return [name for name, spec in environment.spec.observation.items() if spec.is_image]


def _described(observation: Any) -> str:
    return ", ".join(f"{name} {list(spec.shape)} {spec.dtype}" for name, spec in observation.items())


def _accepts_step(environment: Environment) -> bool:
    try:
        environment.step(np.zeros(environment.task.action_dim, np.float32))
    except GsaError:
        return False
    return True
