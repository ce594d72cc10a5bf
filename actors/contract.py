"""What every environment must do, as one check: run it in the tests of your own environments.

def test_my_env():
    check_environment(lambda: make("gym/MyEnv-v0", imports=("my_envs",)))
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np

from actors.environment import Environment, Step
from actors.tasks import IMAGE_SHAPE
from gsa.errors import GsaError, UsageError
from gsa.schema import ArraySpec, Trajectory


class ContractBroken(GsaError, AssertionError):
    """An environment does not do what the others rely on."""


def check_environment(make_environment: Callable[[], Environment], seed: int = 0, steps: int | None = None) -> None:
    """Makes two environments and drives them. ContractBroken says what is wrong.

    `steps` limits the agent steps of the episodes that are compared; None runs whole ones, and checks their length.
    """
    first, second = make_environment(), make_environment()
    try:
        check_spec(first)
        check_pickling(first)
        episode = check_episode(first, seed, steps)
        check_determinism(first, second, seed, episode)
        check_clipping(first, seed)
        check_bad_actions(first, seed)
    finally:
        first.close()
        second.close()
    first.close()  # a second time must be harmless
    if _accepts_step(first):
        raise ContractBroken(f"{first.task.name} can still be stepped after close().")


def check_spec(environment: Environment) -> None:
    """The spec fits the task, and observations are images."""
    task, spec = environment.task, environment.spec
    _require(task, spec.embodiment == task.embodiment, f"the spec's embodiment is {spec.embodiment}")
    _require(task, spec.action_dim == task.action_dim, f"the spec has {spec.action_dim} actions, not {task.action_dim}")
    _require(task, spec.action_repeat == task.action_repeat, f"the spec's action repeat is {spec.action_repeat}")
    pixels = ArraySpec(IMAGE_SHAPE, "uint8")
    _require(task, dict(spec.observation) == {"pixels": pixels}, f"it observes {dict(spec.observation)}, not {pixels}")
    _require(task, bool(spec.renderer), "the spec does not say how images are rendered")
    _require(task, _accepts_step(environment) is False, "it can be stepped before reset()")


def check_pickling(environment: Environment) -> None:
    """It refuses to cross a process boundary, and says what to do instead."""
    try:
        pickle.dumps(environment)
    except TypeError as error:
        _require(environment.task, "make()" in str(error), "its refusal to be pickled does not say what to do")
        return
    raise ContractBroken(f"{environment.task.name} can be pickled; a live simulator must refuse.")


def check_episode(environment: Environment, seed: int, steps: int | None) -> Trajectory:
    """One episode under random actions is a whole, valid trajectory in the time table of `gsa.schema`."""
    task, rng = environment.task, np.random.default_rng(seed)
    images, record = [environment.reset(seed)["pixels"]], []
    kept = images[0].copy()
    for count in range(1, task.episode_steps + 1):
        step = environment.step(rng.uniform(-1, 1, task.action_dim).astype(np.float32))
        _check_step(environment, step)
        shared = any(np.shares_memory(step.observation["pixels"], image) for image in images[-2:])
        _require(task, not shared, "two observations share one buffer; each must have its own")
        images.append(step.observation["pixels"])
        record.append(step)
        if step.last or count == steps:
            break
    _require(task, np.array_equal(images[0], kept), "observation 0 changed while the episode went on")
    _require(task, record[-1].last or len(record) == steps, f"the episode goes on after {task.episode_steps} steps")
    short = record[-1].last and len(record) < task.episode_steps and record[-1].discount == 1 and task.suite != "gym"
    _require(task, not short, f"the episode ended after {len(record)} of {task.episode_steps} steps without a cause")
    _require(task, not record[-1].last or not _accepts_step(environment), "it can be stepped after the last step")
    _require(
        task, len({image.tobytes() for image in images}) > 1, "all images of an episode under random actions are equal"
    )
    trajectory = Trajectory(
        task.embodiment, {"pixels": np.stack(images)}, np.stack([s.action for s in record]),
        np.array([s.discount for s in record], np.float32), np.array([s.reward for s in record], np.float32),
    )  # fmt: skip
    trajectory.check(environment.spec)
    return trajectory


def check_determinism(first: Environment, second: Environment, seed: int, episode: Trajectory) -> None:
    """An episode depends on seed and actions alone: not on the instance, nor on episodes before it."""
    expected = np.asarray(episode.reward)
    again, other = _replay(first, seed, episode), _replay(second, seed, episode)
    for name, (images, rewards) in {"repeated": again, "repeated by another instance": other}.items():
        same = np.array_equal(images, episode.observation["pixels"]) and np.array_equal(rewards, expected)
        _require(first.task, same, f"an episode {name} with equal seed and actions came out otherwise")
    different = _replay(first, seed + 1, episode)
    equal = np.array_equal(different[0], episode.observation["pixels"]) and np.array_equal(different[1], expected)
    _require(first.task, not equal, f"seeds {seed} and {seed + 1} give the same episode")


def check_clipping(environment: Environment, seed: int) -> None:
    """Actions beyond [-1, 1] are executed, and reported, as the nearest ones within; the argument stays as it is."""
    task = environment.task
    beyond = np.where(np.arange(task.action_dim) % 2, -3.0, 3.0).astype(np.float32)
    given = beyond.copy()
    environment.reset(seed)
    clipped = environment.step(given)
    environment.reset(seed)
    within = environment.step(np.clip(beyond, -1, 1))
    _require(task, np.array_equal(given, beyond), "step() changed the action it was given")
    _require(task, np.array_equal(clipped.action, np.clip(beyond, -1, 1)), "the action reported is not the clipped one")
    same = (
        np.array_equal(clipped.observation["pixels"], within.observation["pixels"]) and clipped.reward == within.reward
    )
    _require(task, same, "an action beyond [-1, 1] does not act as the clipped one")


def check_bad_actions(environment: Environment, seed: int) -> None:
    """Actions of the wrong length, and NaN, are refused."""
    environment.reset(seed)
    for action in (np.zeros(environment.task.action_dim + 1), np.full(environment.task.action_dim, np.nan)):
        try:
            environment.step(action)
        except UsageError:
            continue
        raise ContractBroken(f"{environment.task.name} accepts the action {action}.")


def _check_step(environment: Environment, step: Step) -> None:
    task, pixels = environment.task, step.observation["pixels"]
    _require(
        task, pixels.shape == IMAGE_SHAPE and pixels.dtype == np.uint8, f"an image is {pixels.shape} {pixels.dtype}"
    )
    _require(task, step.action.dtype == np.float32, f"the executed action is {step.action.dtype}, not float32")
    _require(task, isinstance(step.reward, float) and np.isfinite(step.reward), f"a reward is {step.reward!r}")
    _require(
        task, step.discount in (0.0, 1.0), f"a discount is {step.discount!r}; it is 0 where the task ended, else 1"
    )
    _require(task, step.last or step.discount == 1.0, "the discount is 0 before the last step")
    needs_success = task.score_rule == "100*success"
    _require(task, not needs_success or step.success in (0.0, 1.0), f"success is {step.success!r}, not 0 or 1")


def _replay(environment: Environment, seed: int, episode: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    images = [environment.reset(seed)["pixels"]]
    rewards = []
    for action in episode.action:
        step = environment.step(action)
        images.append(step.observation["pixels"])
        rewards.append(step.reward)
        if step.last:
            break
    return np.stack(images), np.array(rewards, np.float32)


def _accepts_step(environment: Environment) -> bool:
    try:
        environment.step(np.zeros(environment.task.action_dim, np.float32))
    except GsaError:
        return False
    return True


def _require(task: object, condition: bool, complaint: str) -> None:
    if not condition:
        raise ContractBroken(f"{getattr(task, 'name', task)}: {complaint}.")
