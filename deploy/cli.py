"""The command `gsa`. Thin: flags come from dataclasses, and what is heavy is imported only once they are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, subcommand

from deploy.config import FinetuneConfig, Imports
from deploy.data_commands import Collect, Index, Ingest, Retrieve, Shift, Store
from deploy.suite_commands import Suite
from gsa import __version__
from gsa import config as configs
from gsa.errors import FormatError, GsaError, SpecMismatch, StaleError, Stopped, UsageError
from learner.config import PretrainConfig

FAILED, WRONG_USE, INTERRUPTED, STOPPED = 1, 2, 130, 143
WRONG = (UsageError, FormatError, SpecMismatch, StaleError)  # what was given cannot be used
ABOUT = "Pre-train a world model on unlabelled trajectories, then specialise it to a task. --debug shows tracebacks."


@dataclass(frozen=True)
class Doctor:
    """Check this machine: packages, GPU, rendering, Redis, disk."""

    def __call__(self) -> int:
        from deploy.doctor import examine
        from deploy.progress import console

        findings = []
        for finding in examine():
            findings.append(finding)
            console.print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:14} {finding.text}", soft_wrap=True)
        return FAILED if any(not f.ok for f in findings) else 0


@dataclass(frozen=True)
class Tasks:
    """List the tasks with embodiment, action size and score rule."""

    def __call__(self) -> int:
        from actors.tasks import ALL

        print(f"{'task':40} {'embodiment':18} actions  score (frames an episode)")
        for task in ALL:
            print(f"{task.name:40} {task.embodiment:18} {task.action_dim:7}  {task.score_rule} ({task.episode_frames})")
        print("gym/<EnvId>: any Gymnasium environment with bounded continuous actions; its score is the return")
        return 0


@dataclass(frozen=True)
class Model:
    """Print the model sizes, or the layers of one; convert the paper's released weights to a world model."""

    model: str | None = None
    """A size to print the layers of."""
    world_model: Path | None = None
    """A world model to print the layers of: its folder, or a released file (dmcontrol.pt), which is converted."""
    out: Path | None = None
    """Folder for the converted world model; default: beside the file, by its name."""
    stoch: int | None = None
    """Latent variables of a released file, which it does not tell; default: 32, as in all that the authors released."""
    action_dim: int = 6
    """Actions of the task that actor and prior actor are counted for."""

    def __call__(self) -> int:
        from deploy import models

        if self.world_model is not None:
            return models.show_saved(models.folder(self.world_model, self.out, self.stoch))
        return models.show(self.model, self.action_dim) if self.model else models.show_sizes(self.action_dim)


@dataclass(frozen=True)
class CheckEnv:
    """Check that an environment, such as one of yours, does what training relies on; says what it observes."""

    task: Positional[str]
    seed: int = 0
    steps: int = 0
    """Agent steps of the episodes that are compared; 0: whole episodes, whose length is then checked too."""
    render: Literal["fast", "faithful"] = "fast"
    image: Path | None = None
    """Also write the first image of an episode as PNG, to look at."""
    imports: Imports = ()

    def __call__(self) -> int:
        from deploy.check_env import check_env

        return check_env(self.task, self.seed, self.steps, self.render, self.image, self.imports)


@dataclass(frozen=True)
class Pretrain:
    """Pre-train a world model on a store: reward-free, all embodiments. Goes on where it stopped."""

    store: Path
    out: Path
    """Folder of the world model, its checkpoints and its log."""
    processes: int = 1
    """Processes on this machine that share each batch; with GPUs, one for each. Over several machines: torchrun."""
    settings: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)

    def __call__(self) -> int:
        from deploy import stages

        return stages.pretrain(self.store, self.settings, self.out, self.processes)


@dataclass(frozen=True)
class Finetune:
    """Specialise a pre-trained world model to one task with few online interactions. --config FILE: start from YAML.
    --resume RUN: go on with a run that was stopped or killed."""

    settings: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __call__(self) -> int:
        from deploy import run

        run.finetune(self.settings)
        return 0


@dataclass(frozen=True)
class ResumeCheck:
    """Prove that a run goes on as if it had not been stopped. In one process: bit for bit, from one checkpoint to the
    next, in a copy. Over Ray: that checkpoint, store and log agree. Exit code 1 if they do not."""

    run: Positional[Path]
    scratch: Path | None = None
    """Folder for the copy; default: the system's for temporary files."""

    def __call__(self) -> int:
        from deploy.progress import bar
        from deploy.resume_check import resume_check

        with bar("resume-check") as progress:
            found = resume_check(self.run, self.scratch, progress)
        for sentence in found:
            print(sentence)
        print(f"{self.run}: {'does not go on exactly' if found else 'goes on as if it had not been stopped'}.")
        return FAILED if found else 0


@dataclass(frozen=True)
class Evaluate:
    """Play whole episodes with the policy of an agent's folder, by its mean action."""

    agent: Positional[Path]
    task: str
    episodes: int = 20
    seed: int = 0
    render: Literal["fast", "faithful"] = "fast"
    video: Path | None = None
    """Also write the first episode as mp4."""
    imports: Imports = ()

    def __call__(self) -> int:
        from deploy import stages

        return stages.evaluate(self.agent, self.task, self.episodes, self.seed, self.render, self.video, self.imports)


@dataclass(frozen=True)
class Report:
    """Write the report of a run, finished or not."""

    run: Positional[Path]

    def __call__(self) -> int:
        from deploy import run

        run.report(self.run)
        return 0


@dataclass(frozen=True)
class Demo:
    """The whole way on this machine: collect a pool, ingest, pre-train, index, fine-tune over Ray and Redis, report."""

    out: Path = Path("demo")
    quick: bool = False
    """Small enough for three minutes: shows that everything runs, not that it learns."""
    seed: int = 0

    def __call__(self) -> int:
        from deploy.demo import demo

        return demo(self.out, self.quick, self.seed)


Command = (
    Annotated[Doctor, subcommand("doctor")]
    | Annotated[Tasks, subcommand("tasks")]
    | Annotated[CheckEnv, subcommand("check-env")]
    | Annotated[Collect, subcommand("collect")]
    | Annotated[Ingest, subcommand("ingest")]
    | Annotated[Store, subcommand("store")]
    | Annotated[Model, subcommand("model")]
    | Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[Index, subcommand("index")]
    | Annotated[Retrieve, subcommand("retrieve")]
    | Annotated[Finetune, subcommand("finetune")]
    | Annotated[ResumeCheck, subcommand("resume-check")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Shift, subcommand("shift")]
    | Annotated[Suite, subcommand("suite")]
    | Annotated[Demo, subcommand("demo")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 it failed or found faults, 2 wrong use, 130 interrupted, 143 told to
    stop by SIGTERM and saved."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded: see docs/decisions/spinning-threads.md
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    if given == ["--version"]:
        print(f"gsa {__version__}")
        return 0
    try:
        return _parse(given)()
    except GsaError as error:
        if debug:
            raise
        print(f"gsa: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("gsa: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"gsa: {type(error).__name__}: {error} (this is a bug; --debug shows where)", file=sys.stderr)
        return FAILED


def exit_code(error: Exception) -> int:
    """What a process ends with that this error ended."""
    return STOPPED if isinstance(error, Stopped) else WRONG_USE if isinstance(error, WRONG) else FAILED


def _parse(given: list[str]) -> Callable[[], int]:
    """The command that the flags describe. `finetune --config FILE` starts from a file, such as a run's config.yaml;
    `finetune --resume RUN` goes on with a run, under its own settings but for the flags beside it."""
    if given[:1] == ["finetune"] and "--resume" in given:
        folder, rest = _take(given[1:], "--resume", "a run's folder")
        return lambda: _resume(Path(folder), rest)
    if given[:1] == ["finetune"] and "--config" in given:
        file, rest = _take(given[1:], "--config", "a file")
        return Finetune(_finetune_flags(configs.load(FinetuneConfig, file), rest))
    return tyro.cli(Command, prog="gsa", description=ABOUT, args=given)


def _take(given: list[str], flag: str, what: str) -> tuple[str, list[str]]:
    """The value of `flag`, and the other arguments."""
    at = given.index(flag)
    if at + 1 == len(given):
        raise UsageError(f"{flag} needs {what}.")
    return given[at + 1], given[:at] + given[at + 2 :]


def _finetune_flags(default: FinetuneConfig, given: list[str]) -> FinetuneConfig:
    return tyro.cli(FinetuneConfig, prog="gsa finetune", default=default, args=given)


def _resume(folder: Path, given: list[str]) -> int:
    from deploy import run

    run.resume(folder, lambda before: _finetune_flags(before, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
