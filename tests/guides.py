"""Guides to plug in."""

import os
import signal

import numpy as np

NOT_A_FUNCTION = 3


def half(task):
    """Takes the steps that the schedule gives it, by a fixed action out of bounds in one dimension."""
    return lambda observation, step, scheduled: np.array([0.5, -7.0][: task.action_dim]) if scheduled else None


def third(task):
    """Takes over in every third step, whatever the schedule says."""
    return lambda observation, step, scheduled: np.full(task.action_dim, 0.25) if step % 3 == 0 else None


def wrong(task):
    return lambda observation, step, scheduled: np.zeros(task.action_dim + 1)


def broken(task):
    def guide(observation, step, scheduled):
        raise OSError("the joystick is gone")

    return guide


def deadly(task):
    """Takes the worker's process with it, as a driver of a device may."""
    return lambda observation, step, scheduled: os.kill(os.getpid(), signal.SIGKILL)


def greedy(task):
    """Leaves every step to the others, but asks for 64 MB of memory in each."""

    def guide(observation, step, scheduled):
        np.empty(1 << 26, np.uint8)

    return guide
